"""The parts of train.py against torch, float64 and plain loops: schedules, losses, optimizers, averages, evaluation,
recipes."""
import contextlib
import functools
import importlib
import json
import math
import os
import re
import shlex
import shutil
import sys
import types
import xml.dom.minidom
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import data
import finetune
import train
from resnet50 import PREPROCESS, ResNet50, UserError, predict, save_checkpoint
from tests.conftest import ROOT
from tests.test_int8 import WIDTHS


def parse(*flags):
    return train.get_args_parser().parse_args([str(f) for f in flags])


# ----------------------------------------------------------------------------------------- recipes and arguments

def test_recipes_resolve_and_flags_win():
    assert parse().recipe == "demo" and parse().image_size == 64
    args = parse("--data", "x")
    assert (args.recipe, args.epochs, args.lr, args.opt, args.lr_milestones) == ("v1", 90, 0.1, "sgd", [30, 60])
    args = parse("--recipe", "v2", "--epochs", 3, "--mixup-alpha", 0)
    assert args.epochs == 3 and args.mixup_alpha == 0 and args.cutmix_alpha == 1.0 and args.repeated_aug == 4
    for name in train.RECIPES:
        args = parse("--recipe", name)
        for key, value in train.RECIPES[name].items():
            assert getattr(args, key) == value, (name, key)


def test_image_size_sets_training_and_evaluation():
    assert (train.preprocess_of(parse("--recipe", "v2"))["crop"] == 224
            and train.preprocess_of(parse("--recipe", "v2"))["resize"] == 232)
    args = parse("--recipe", "fast", "--image-size", 96)
    assert train.preprocess_of(args)["crop"] == 96 and args.progressive is None
    assert (train.preprocess_of(parse("--data", "x"))["resize"] == 256
            and train.preprocess_of(parse("--image-size", 32))["resize"] == 32)


@pytest.mark.parametrize("flags, changes", [
    ((), {}), (("--tta",), {}), (("--image-size", 48), dict(resize=48, crop=48)),
    (("--val-resize", 50, "--interpolation", "bilinear"), dict(resize=50, interpolation="bilinear")),
    (("--val-size", 224, "--val-resize", 232), dict(resize=232, crop=224))])
def test_a_network_is_scored_as_its_checkpoint_says_where_flags_do_not(flags, changes):
    base = dict(PREPROCESS, resize=40, crop=32, interpolation="bicubic")
    assert train.preprocess_of(parse("--eval-only", *flags), base) == {**base, **changes}


@pytest.mark.parametrize("flags, partner", [
    (("--lr-milestones", 2, 4), "--lr-scheduler multistep"), (("--lr-gamma", 0.5), "--lr-scheduler multistep"),
    (("--lr-restart-epochs", 2), "--lr-scheduler restarts"), (("--momentum", 0.5), "--opt sgd"),
    (("--recipe", "v1", "--lr-min", 0.01), "--lr-scheduler cosine"), (("--focal-gamma", 3), "--loss focal"),
    (("--recipe", "v1", "--lr-warmup-decay", 0.5), "--lr-warmup-epochs"), (("--ra-magnitude", 5), "--auto-augment ra"),
    (("--model-ema-decay", 0, "--model-ema-steps", 5), "--model-ema-decay"), (("--fused",), "--eval-only"),
    (("--class-weights", "balanced", "--loss", "bce"), "--loss ce"),
    *((("--eval-only", *more), "training; --eval-only scores") for more in (
        ("--resume", "x.pt"), ("--lr", 3), ("--mixup-alpha", 0.5), ("--overwrite",), ("--epochs", 7), ("--wandb",),
        ("--drop-path", 0.2), ("--balanced",)))])
def test_flags_that_would_do_nothing_are_refused(flags, partner, monkeypatch):
    monkeypatch.setattr(train, "run_processes", lambda *a: pytest.fail("it was to be refused before"))
    with pytest.raises(UserError, match=f" goes with {partner}") as caught:
        train.main(parse(*flags))
    assert caught.value.code == 2


def test_a_training_run_s_flags_may_be_those_of_its_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "run_processes", lambda args, work: args)
    (tmp_path / "args.json").write_text(json.dumps(dict(lr=3, recipe="v2", wandb=True, batch_size="auto")))
    given = "--eval-only", "--config", tmp_path / "args.json"
    assert train.main(parse(*given)).lr == 3
    with pytest.raises(UserError, match="--lr goes with training"):
        train.main(parse(*given, "--lr", 2))
    with pytest.raises(UserError, match="--batch-size auto is sought in training"):
        train.main(parse("--eval-only", "--batch-size", "auto"))


def test_a_process_that_is_not_heard_of_is_one_line(monkeypatch):
    def work(world, stop):
        raise RuntimeError("[unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"not been heard of for 4 seconds \(--dist-timeout\), and process 0") as caught:
        train.run_processes(parse("--dist-timeout", 4, "--device", "cpu"), work)
    assert caught.value.code == 1


@pytest.mark.parametrize("flags", [
    ("--lr-scheduler", "multistep", "--lr-milestones", 2, 4), ("--recipe", "v1", "--lr-scheduler", "cosine"),
    ("--recipe", "a1", "--auto-augment", "none", "--opt", "sgd", "--lr-scheduler", "multistep", "--loss", "focal"),
    ("--recipe", "v2", "--model-ema-decay", 0, "--lr-warmup-epochs", 0), ("--eval-only", "--fused")])
def test_what_a_recipe_sets_is_no_flag_that_was_given(flags):
    args = parse(*flags)
    train.check_args(args, parse("--recipe", args.recipe))


def test_config_round_trip(tmp_path):
    args = parse("--recipe", "a2", "--lr", 0.25, "--lr-milestones", 1, 2, "--progressive", 160, 0.5, 0.75, "--seed", 5)
    saved = {k: v for k, v in vars(args).items() if k not in train.NOT_SAVED}
    path = tmp_path / "args.json"
    path.write_text(json.dumps(saved))
    again = parse("--config", path)
    assert {k: v for k, v in vars(again).items() if k not in train.NOT_SAVED} == saved
    assert parse("--config", path, "--lr", 1).lr == 1
    path.write_text('{"opt": null, "epochs": 3, "lr": 1, "hflip": 0, "tta": true, "batch_size": "auto"}')
    args = parse("--config", path)
    assert args.epochs == 3 and args.lr == 1.0 and args.tta is True and args.batch_size == "auto"
    assert args.opt == "adamw"  # the recipe's


def test_a_recipe_is_not_given_by_name_alone(tmp_path, capsys):
    """A run's file has a value for every flag"""
    path = tmp_path / "args.json"
    path.write_text(json.dumps(dict(vars(parse("--recipe", "v1", "--epochs", 3)), out=str(tmp_path / "before"))))
    assert parse("--config", path, "--recipe", "v1").epochs == 3
    for flags in (("--config", path), ("--resume", tmp_path / "last.pt")):
        with pytest.raises(SystemExit):
            parse(*flags, "--recipe", "fast")
        assert f"{path}: has the values of --recipe v1, not of fast" in capsys.readouterr().err
    path.write_text('{"lr": 3}')
    assert parse("--config", path, "--recipe", "fast").recipe == "fast"


def test_a_run_that_was_moved_goes_on_where_it_is(tmp_path):
    (tmp_path / "args.json").write_text('{"out": "before", "epochs": 3}')
    args = parse("--resume", tmp_path / "last.pt")
    assert args.out == str(tmp_path) and args.epochs == 3
    assert parse("--resume", tmp_path / "last.pt", "--out", "new").out == "new"
    assert parse("--resume", "last.pt").out == "."


@pytest.mark.parametrize("key, value", [
    ("learning_rate", 1), ("opt", "adam"), ("loss", "cross_entropy"), ("lr_scheduler", "step"), ("best_by", "top5"),
    ("on_corrupt", "ignore"), ("epochs", 1.5), ("epochs", True), ("epochs", [3]), ("tta", "no"), ("tta", 1),
    ("workers", "x"), ("amp_dtype", "int8"), ("lr", "fast"), ("lr", float("nan")), ("lr_milestones", 3),
    ("lr_milestones", [1, "x"]), ("lr_milestones", []), ("progressive", [32, 0.5]), ("out", 3), ("recipe", "best"),
    ("seed", -1)])
def test_a_config_holds_what_the_command_line_takes(key, value, tmp_path, capsys):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({key: value}))
    with pytest.raises(SystemExit) as caught:
        parse("--config", path)
    line = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2 and str(path) in line and key in line


@pytest.mark.parametrize("flag, values", [
    ("--lr", ("-1", "nan", "inf")), ("--lr-restart-epochs", ("0", "-1")), ("--mixup-alpha", ("-1", "nan")),
    ("--label-smoothing", ("1.5", "-0.1", "1")), ("--dropout", ("1.5",)), ("--drop-path", ("-0.5", "1")),
    ("--momentum", ("-1", "1")), ("--rotation", ("-5",)), ("--color-jitter", ("-1",)), ("--repeated-aug", ("0", "-2")),
    ("--weight-decay", ("-1",)), ("--lr-base-size", ("-5",)), ("--clip-grad-norm", ("-1",)), ("--hflip", ("7",)),
    ("--focal-gamma", ("-3",)), ("--crop-scale", ("2", "0")), ("--ra-magnitude", ("99", "1.5")),
    ("--patience", ("-1",)), ("--model-ema-decay", ("1",)), ("--swa-start", ("-0.5", "1")), ("--workers", ("-1",)),
    ("--shuffle-chunk", ("-1",)),
    ("--lr-warmup-decay", ("-1",)), ("--seed", ("99999999999999999999", "-1")), ("--device", ("foo", "mps", "cuda:x")),
    ("--epochs", ("0", "1.5")), ("--save-every", ("-1",)), ("--batch-size", ("0", "all")), ("--recipe", ("best",))])
def test_numbers_out_of_their_range_are_refused_by_name(flag, values, capsys):
    for value in values:
        with pytest.raises(SystemExit) as caught:
            parse(flag, value)
        line = capsys.readouterr().err.splitlines()[-1]
        assert caught.value.code == 2 and f"argument {flag}:" in line and value in line


@pytest.mark.parametrize("flags, complaint", [
    (["--compile", "--grad-checkpointing"], "exclude each other"), (["--sync-bn", "--fused-bn"], "exclude each other"),
    (["--sync-bn", "--device", "cpu"], "--sync-bn: PyTorch has synchronised batch-norm on CUDA only"),
    (["--fused-bn", "--amp-dtype", "float16"], "--fused-bn: float16 is for CUDA"),
    (["--elastic", 1, "--progressive", 23, 0, 1], "--elastic: takes images of more than 20"),
    (["--balanced", "--repeated-aug", 2], "exclude each other"),
    (["--resume", "auto"], "--resume auto and --overwrite exclude"),
    (["--balanced", "--shuffle-chunk", 8], "excludes --balanced"), (["--batch-size", 1], "--batch-size: leaves a"),
    (["--device", "cuda:7"], "no CUDA device"), (["--progressive", 0, 0, 1], "--progressive 0 0 1: PX"),
    (["--progressive", 32, 0.5, 0.2], "in this order"), (["--progressive", 48, 0, 1], "at most --image-size"),
    (["--swa-start", 0, "--model-ema-decay", 0.9], "exclude"),
    (["--opt", "nesterov", "--momentum", 0], "--opt nesterov needs some"),
    (["--num-classes", 7], "--num-classes 7: the data has 10"),
    (["--stride-on", "1x1", "--attention", "split"], "no meaning"),
    (["--wandb"], "pip install wandb"), (["--weights", "V9"], "IMAGENET1K_V1"),
    (["--val-size", 64, "--val-resize", 32], "--val-resize 32: is less than the 64 pixels")])
def test_what_cannot_be_honoured_is_refused_and_overwrites_nothing(flags, complaint, tiny, tmp_path):
    if flags == ["--device", "cuda:7"] and torch.cuda.is_available():
        pytest.skip("there is CUDA")
    (tmp_path / "best.pt").write_bytes(b"an earlier run's")
    with pytest.raises(UserError, match=complaint) as caught:
        train.main(parse("--data", tiny, "--out", tmp_path, "--overwrite", "--epochs", 1, "--image-size", 32,
                         "--device", "cpu", *flags))
    assert caught.value.code == 2 and os.listdir(tmp_path) == ["best.pt"]


# ------------------------------------------------------------------------------------------------ optimization

def test_schedules():
    args = parse("--recipe", "v2", "--epochs", 100)
    rates = [train.lr_at(e, args, 0.5) for e in (0, 2.5, 5, 52.5, 100)]
    assert rates == pytest.approx([0.005, 0.2525, 0.5, 0.25, 0.0])
    args = parse("--recipe", "v1")
    assert [train.lr_at(e, args, 1) for e in (0, 29.99, 30, 59, 60, 89)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    args = parse("--recipe", "fast")
    assert [train.lr_at(e, args, 2) for e in (2, 9, 16)] == pytest.approx([2, 1, 0])
    args = parse("--lr-scheduler", "restarts", "--lr-restart-epochs", 2, "--lr-warmup-epochs", 0, "--epochs", 14)
    assert [train.lr_at(e, args, 1) for e in (0, 1, 2, 4, 6, 10)] == pytest.approx([1, 0.5, 1, 0.5, 1, 0.5])
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.3),
                                                           10, 0.01)
    args = parse("--epochs", 10, "--lr-warmup-epochs", 0, "--lr-min", 0.01)
    for epoch in range(10):
        assert train.lr_at(epoch, args, 0.3) == pytest.approx(reference.get_last_lr()[0])
        reference.optimizer.step()
        reference.step()


def test_progressive_sizes():
    args = parse("--recipe", "fast", "--epochs", 100)
    sizes = [train.size_at(e, args) for e in range(100)]
    assert (sizes[0] == sizes[74] == 160 and sizes[86] == sizes[99] == 192 and set(sizes) == {160, 176, 192}
            and sizes == sorted(sizes))


def test_losses():
    torch.manual_seed(0)
    logits, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2, 0])
    p, w = torch.rand(6, 4, dtype=torch.float64).softmax(1), torch.tensor([1.0, 2, 0.5, 3], dtype=torch.float64)
    ce = train.make_loss("ce", 0.1, weights=w)
    assert (torch.equal(ce(logits, y), F.cross_entropy(logits, y, w, label_smoothing=0.1))
            and torch.equal(ce(logits, p), F.cross_entropy(logits, p, w, label_smoothing=0.1)))
    bce = sum(F.binary_cross_entropy_with_logits(logits[i], F.one_hot(y[i], 4).double() * 0.9 + 0.025, reduction="sum")
              for i in range(6)) / 6
    assert torch.allclose(train.make_loss("bce", 0.1)(logits, y), bce)
    assert torch.allclose(train.make_loss("focal", gamma=0)(logits, y), F.cross_entropy(logits, y))
    naive = sum(-(1 - q[t]) ** 2 * math.log(q[t]) * w[t] for q, t in zip(logits.softmax(1), y)) / 6
    assert torch.allclose(train.make_loss("focal", gamma=2.0, weights=w)(logits, y), naive)
    sure = torch.tensor([[40.0, 0, 0], [0, 40, 0], [1, 0, 0]], requires_grad=True)  # right, wrong, unsure
    for gamma in (0.5, 1e-3, 0, 2):
        gradient, = torch.autograd.grad(train.make_loss("focal", gamma=gamma)(sure, torch.tensor([0, 0, 0])), sure)
        assert gradient.isfinite().all() and gradient[0].abs().max() < 1e-6 and (gradient[1:, 0] < 0).all()


def test_decay_spares_norms_and_biases():
    model = ResNet50(num_classes=3, attention="se")
    decayed, spared = train.make_optimizer(model, "sgd", 0.1, 0.9).param_groups
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0 and all(p.ndim > 1 for p in decayed["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_lars_and_lamb_against_a_plain_loop(name):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 1)).double()
    optimizer = train.make_optimizer(model, name, 0.05, 0.9)
    w = [p.detach().clone() for p in model.parameters()]
    m, v = [torch.zeros_like(p) for p in w], [torch.zeros_like(p) for p in w]
    for t in range(1, 5):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / t
        model(torch.randn(8, 5, dtype=torch.float64)).square().sum().backward()
        for i, p in enumerate(model.parameters()):
            g, decay = p.grad, 0.05 if p.ndim > 1 else 0.0
            if name == "lars":
                u = g + decay * w[i]
                if p.ndim > 1:
                    u = u * 0.001 * w[i].norm() / (g.norm() + decay * w[i].norm())
                m[i] = 0.9 * m[i] + u
                w[i] = w[i] - 0.1 / t * m[i]
            else:
                m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g * g
                u = m[i] / (1 - 0.9 ** t) / ((v[i] / (1 - 0.999 ** t)).sqrt() + 1e-6) + decay * w[i]
                w[i] = w[i] - 0.1 / t * u * (w[i].norm() / u.norm() if p.ndim > 1 else 1)
        optimizer.step()
        optimizer.zero_grad()
        for p, q in zip(model.parameters(), w):
            assert torch.allclose(p, q, rtol=1e-10), t


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_lars_and_lamb_where_a_norm_is_zero(name):
    """Weights without a gradient stay, and weights that are zero move, by the rate itself"""
    model, zeros = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
    nn.init.zeros_(zeros.weight)
    optimizer = train.make_optimizer(nn.Sequential(model, zeros), name, 0.0, 0.0)
    before = model.weight.detach().clone()
    model.weight.grad, zeros.weight.grad = torch.zeros(2, 3), torch.ones(2, 3)
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step()
    assert torch.equal(model.weight, before)
    torch.testing.assert_close(zeros.weight.detach(), torch.full((2, 3), -0.25))


def test_ema_includes_batch_norm_statistics():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    ema = train.EMA(model, 0.9)
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    for t in range(1, 6):
        model(torch.randn(4, 3, 5, 5) * t + t)
        ema.update(model)
        decay = min(0.9, (1 + t) / (10 + t))
        for k, v in model.state_dict().items():
            expected[k] = v.clone() if not v.is_floating_point() else decay * expected[k] + (1 - decay) * v
    for k, v in ema.model.state_dict().items():
        assert torch.allclose(v, expected[k], atol=1e-6), k
    assert not ema.model.training and ema.model[1].num_batches_tracked == 5


def small_step(model, optimizer, pixels, labels, **options):
    return train.train_step(model, model,
                            [(pixels, labels)] if isinstance(labels, torch.Tensor) else list(zip(pixels, labels)),
                            optimizer, train.make_loss("ce"), **options)


def test_step_accumulates_like_a_plain_loop():
    torch.manual_seed(3)
    model, pixels, labels = (ResNet50(num_classes=3), torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8),
                             torch.randint(3, (2, 4)))
    plain = ResNet50(num_classes=3)
    plain.load_state_dict(model.state_dict())
    reference = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    for x, y in zip(pixels, labels):
        (F.cross_entropy(plain.train()((x.float() / 255 - torch.tensor(PREPROCESS["mean"]).view(3, 1, 1))
                                       / torch.tensor(PREPROCESS["std"]).view(3, 1, 1)), y) / 2).backward()
    norm = nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    reference.step()
    optimizer = train.make_optimizer(model.train(), "sgd", 0.0, 0.9)
    loss, correct, applied = small_step(model, optimizer, pixels, list(labels), clip=1.0)
    assert applied and norm > 1 and 0 <= correct <= 8
    for (name, a), b in zip(model.state_dict().items(), plain.state_dict().values()):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), name


def test_a_non_finite_step_changes_nothing():
    torch.manual_seed(4)
    model = ResNet50(num_classes=3).train()
    optimizer = train.make_optimizer(model, "nesterov", 1e-4, 0.9)
    pixels, labels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.tensor([0, 1, 2, 0])
    assert small_step(model, optimizer, pixels, labels)[2]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    momentum = optimizer.state[model.fc.weight]["momentum_buffer"].clone()
    model.preprocess = dict(model.preprocess, std=[0.0, 0.2, 0.2])  # infinities in the input
    assert not small_step(model, optimizer, pixels, labels)[2]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(momentum, optimizer.state[model.fc.weight]["momentum_buffer"]) and model.fc.weight.grad is None
    model.preprocess = dict(PREPROCESS)
    assert small_step(model, optimizer, pixels, labels)[2]


def test_loss_scaling_skips_and_recovers():
    torch.manual_seed(5)
    model = ResNet50(num_classes=3).train()
    optimizer, scaler = train.make_optimizer(model, "sgd", 0.0, 0.9), torch.amp.GradScaler("cpu", init_scale=2.0 ** 127)
    pixels, labels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        model.fc.weight.mul_(30)  # a loss that the first scales push past the largest float
    before = model.fc.weight.clone()
    applied = [small_step(model, optimizer, pixels, labels, scaler=scaler)[2] for _ in range(16)]
    assert (not applied[0] and applied[-1] and not torch.equal(before, model.fc.weight)
            and bool(torch.isfinite(model.fc.weight).all()))


def test_the_loss_is_what_the_flags_ask_for():
    files = types.SimpleNamespace(labels=np.array([0, 0, 0, 1, 1, 2]))
    logits, y = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 0])
    weights = torch.tensor([6 / 3 / 3, 6 / 2 / 3, 6 / 1 / 3])  # every class counts as much
    for flags, expected in ((("--loss", "ce", "--class-weights", "balanced", "--label-smoothing", 0.2),
                             F.cross_entropy(logits, y, weights, label_smoothing=0.2)),
                            (("--loss", "focal", "--focal-gamma", 3, "--label-smoothing", 0),
                             train.make_loss("focal", gamma=3)(logits, y)),
                            (("--loss", "bce", "--label-smoothing", 0.2), train.make_loss("bce", 0.2)(logits, y))):
        assert torch.allclose(train.loss_of(parse(*flags), files, "abc", "cpu")(logits, y), expected), flags


class Enough(Exception):
    pass


@pytest.fixture
def given(tiny, tmp_path, monkeypatch):
    """given(flags..., steps=N, rank=R, size=S) -> what each of the first N steps of a run has been given, as the R-th
    of S processes, and its result where it ends before. Nothing is trained or evaluated; the third step fails."""
    def call(*flags, steps=math.inf, rank=0, size=1):
        taken, keys, batch, world = [], [], data.Images.batch, train.World()
        world.rank, world.size, world.barrier = rank, size, lambda: None
        world.sum = lambda *numbers: list(map(float, numbers))
        world.gather = lambda value: [value] + [value | {"theirs"} if isinstance(value, set) else value] * (size - 1)

        def train_step(net, model, batches, optimizer, loss_fn, **options):
            if len(taken) == steps:
                raise Enough
            taken.append(types.SimpleNamespace(
                model=model, keys=[*keys], sizes={p.shape[2] for p, _ in batches}, fc=model.fc.weight.clone(),
                draw=torch.rand(1).item(), groups=[dict(g) for g in optimizer.param_groups], **options))
            keys.clear()
            return torch.tensor(2.0), torch.tensor(4), len(taken) != 3

        def evaluate(model, *args, tta, **options):
            taken[-1].scored, taken[-1].tta = model, tta
            return dict(top1=50.0, top5=90.0, loss=1.0, images=29, corrupt=0)
        for name, stub in dict(train_step=train_step, evaluate=evaluate, wrap=lambda model, *a: model,
                               ResNet50=functools.partial(ResNet50, widths=WIDTHS)).items():
            monkeypatch.setattr(train, name, stub)
        monkeypatch.setattr(data.Images, "batch", lambda self, k, **o: keys.extend(k) or batch(self, k, **o))
        result, stop = None, types.SimpleNamespace(poll=lambda: False, requested=None)
        with contextlib.suppress(Enough):
            result = train.train(parse("--data", tiny, "--recipe", "demo", "--out", tmp_path / "run", "--overwrite",
                                       "--device", "cpu", "--workers", 0, "--image-size", 32, "--batch-size", 5,
                                       "--mixup-alpha", 0, *flags), world, stop)
        monkeypatch.undo()
        return taken, result
    return call


def test_a_step_is_given_what_the_flags_ask_for(given, tmp_path):
    taken, result = given(
        "--epochs", 4, "--accumulate", 2, "--lr", 0.1, "--lr-base-size", 20, "--lr-warmup-epochs", 1,
        "--lr-warmup-decay", 0.1, "--opt", "sgd", "--momentum", 0.5, "--weight-decay", 0.07, "--clip-grad-norm", 3,
        "--model-ema-decay", 0.9, "--model-ema-steps", 3, "--image-size", 64, "--progressive", 32, 0.25, 0.75, "--tta",
        "--dropout", 0.3, "--drop-path", 0.2, "--grad-checkpointing", "--fused-bn")
    peak, at = 0.1 * 10 / 20, [step / 5 for step in range(20)]
    rates = [peak * (0.1 + 0.9 * t if t < 1 else (1 + math.cos(math.pi * (t - 1) / 3)) / 2) for t in at]
    for t, rate, step in zip(at, rates, taken, strict=True):
        assert [(g["lr"], g["weight_decay"], g["momentum"]) for g in step.groups] == [
            (pytest.approx(rate), decay, 0.5) for decay in (0.07, 0)]
        assert step.clip == 3 and step.mixer is None and step.sizes == {(32, 32, 48, 64)[int(t)]}
        assert [key[0] for key in step.keys[:10]] == [int(t)] * 10
    model = taken[0].model
    assert (model.grad_checkpointing and model.config["dropout"] == 0.3 and model.layer4[2].drop_rate == 0.2
            and all(m.fused for m in model.modules() if isinstance(m, nn.BatchNorm2d)))
    assert all(step.tta and step.scored is not model for step in taken[4::5])
    last = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert last["ema_updates"] == 5 and result["skipped_steps"] == 1 and result["samples_seen"] == 200
    for record in map(json.loads, open(tmp_path / "run" / "metrics.jsonl")):
        assert record["event"] == "step" or (record["train_loss"], record["train_top1"]) == (2.0, 40.0)
    for flags, kinds in ((["--compile"], (nn.Conv2d, train.PixelConv)), ([], (train.FlatConv, train.PixelConv))):
        block = given(*flags, steps=1)[0][0].model.layer4[0]
        assert (type(block.conv1), type(block.conv2)) == kinds, flags


def test_processes_share_an_epoch_and_seeds_change_all_that_is_drawn(given, monkeypatch):
    def indices(taken):
        return [key[1:] for step in taken for key in step.keys]
    one, two = (given("--hflip", 0, steps=4, rank=rank, size=2)[0] for rank in (0, 1))
    assert len(set(indices(one) + indices(two))) == 40  # of 50, in four of five steps
    other = given("--hflip", 0, "--seed", 1, steps=4, size=2)[0]
    assert indices(other) != indices(one) and not torch.equal(other[0].fc, one[0].fc)
    assert torch.equal(one[0].fc, two[0].fc) and len({step.draw for step in one + two + other}) == 12
    twice = indices(given("--repeated-aug", 2, steps=10)[0])
    assert {i for i, _ in twice} == {i for i, repeat in twice if repeat} and len({i for i, _ in twice}) == 25
    assert len({i for i, _ in indices(given("--balanced", steps=10)[0])}) < 50  # drawn one by one
    skipped = []
    monkeypatch.setattr(train, "save_training", lambda *state, **_: skipped.append(state[5]["skipped"]))
    given("--save-every", 4, steps=4, rank=1, size=2)
    assert skipped == [0]  # the first process counts for all


def test_a_mean_over_epochs_counts_those_that_are_in_it(given, tmp_path):
    """Where a resumed run begins to average earlier than was planned, too"""
    def updates():
        return torch.load(tmp_path / "run" / "last.pt", weights_only=True)["ema_updates"]
    given("--model-ema-decay", 0, "--batch-size", 50, "--swa-start", 0.28, "--epochs", 25, steps=9)
    assert updates() == 2  # those of the eighth and ninth epoch
    flags = "--model-ema-decay", 0, "--batch-size", 25, "--swa-start"
    given(*flags, 0.5, "--epochs", 8, steps=5)  # stopped in the third epoch
    assert updates() == 1  # the last epoch's weights alone
    given(*flags, 0, "--epochs", 4, "--resume")
    assert updates() == 3  # those of the second to the fourth epoch


def test_a_best_network_that_was_moved_away_is_waited_for(given, tmp_path):
    flags = "--batch-size", 25, "--epochs", 4, "--patience", 1
    assert given(*flags)[1]["epochs"] == 2
    (tmp_path / "run" / "best.pt").unlink()
    assert given(*flags, "--resume")[1]["best_epoch"] == 3


def test_damaged_files_are_counted_by_a_resumed_run_too(given, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "d")
    (tmp_path / "d" / "train" / "ring" / "0002.jpg").write_bytes(b"not an image")
    flags = "--data", tmp_path / "d", "--on-corrupt", "skip", "--batch-size", 25, "--epochs", 1
    assert [given(*flags, *more)[1]["corrupt"] for more in ((), ("--resume",))] == [1, 1]
    given(*flags, "--batch-size", 5, "--save-every", 1, steps=1, size=2)
    assert "theirs" in torch.load(tmp_path / "run" / "last.pt", weights_only=True)["corrupt"]


def test_an_optimizer_s_or_a_network_s_state_that_is_another_s_names_the_file(given, tmp_path):
    given("--batch-size", 25, "--epochs", 1, "--amp-dtype", "float16")
    path = tmp_path / "run" / "last.pt"
    whole = torch.load(path, weights_only=True)
    groups = whole["optimizer"]["param_groups"]
    for optimizer in (3, {}, dict(state=3, param_groups=groups), *(dict(state={}, param_groups=wrong) for wrong in (
            [], [3] * len(groups), [dict(g, params=[]) for g in groups])), dict(
                state={0: dict(exp_avg=torch.zeros(3), exp_avg_sq=torch.zeros(3))}, param_groups=groups)):
        torch.save({**whole, "optimizer": optimizer}, path)
        with pytest.raises(UserError, match="last.pt: another optimizer's state"):
            given("--batch-size", 25, "--epochs", 2, "--resume")
    torch.save(whole, path)
    with pytest.raises(UserError, match="last.pt: holds another network: attention none, not se$"):
        given("--batch-size", 25, "--epochs", 2, "--resume", "--attention", "se")
    torch.save({**whole, "scaler": {**whole["scaler"], "scale": 8.0}}, path)
    step, = given("--batch-size", 50, "--epochs", 2, "--resume", "--amp-dtype", "float16", steps=1)[0]
    assert step.scaler.get_scale() == 8


def test_statistics_that_are_equal_already_are_averaged_to_the_same_bits(monkeypatch):
    model = nn.BatchNorm2d(99)
    nn.init.normal_(model.running_mean)
    before = model.running_mean.clone()
    for size in (2, 3, 7):
        monkeypatch.setattr(train.dist, "all_reduce", lambda values: values.mul_(size))
        train.average_statistics(types.SimpleNamespace(size=size), [model])
        assert torch.equal(model.running_mean, before) and (model.running_var == 1).all()


# ------------------------------------------------------------------------------------------------- evaluation

@pytest.fixture(scope="module")
def scored(tiny, tmp_path_factory):
    """A checkpoint, and its scores on the 29 images by a plain loop over single images."""
    torch.manual_seed(6)
    model = ResNet50(num_classes=10).eval()
    nn.init.normal_(model.fc.weight, std=0.5)
    model.preprocess.update(resize=40, crop=32)
    path = str(tmp_path_factory.mktemp("scored") / "c.pt")
    save_checkpoint(path, model, classes=list(data.DEMO_CLASSES))
    files, transform = data.open_folder(tiny, eval_only=True)[1], data.eval_transform(model.preprocess)
    with torch.no_grad():
        pixels = [transform(data.decode(open(files.path(i), "rb").read())).permute(2, 0, 1)[None] for i in range(29)]
        logits = torch.cat([predict(model, p) for p in pixels])
        flipped = torch.cat([predict(model, p.flip(3)) for p in pixels])
    y = torch.tensor(files.labels).long()

    def expected(z):
        rank = (z > z.gather(1, y[:, None])).sum(1)
        return dict(top1=100 * (rank == 0).float().mean().item(), top5=100 * (rank < 5).float().mean().item(),
                    loss=F.cross_entropy(z, y).item(), images=29, corrupt=0)
    return path, model, files, expected(logits), expected((logits + flipped) / 2)


@pytest.mark.parametrize("batch, workers, tta", [(4, 0, False), (29, 2, False), (3, 1, True)])
def test_evaluate_against_a_plain_loop(scored, batch, workers, tta):
    _, model, files, plain, mirrored = scored
    dataset = data.Images(files, lambda _: data.eval_transform(model.preprocess))
    got = train.evaluate(model, dataset, batch, train.World(), workers=workers, tta=tta)
    assert got == pytest.approx(mirrored if tta else plain, rel=1e-4)


@pytest.mark.parametrize("processes", [1, 3])
def test_eval_only_is_exact_on_any_number_of_processes(scored, tiny, tmp_path, run, processes):
    path, _, _, plain, _ = scored
    done = run("--eval-only", "--checkpoint", path, "--data", tiny, "--batch-size", 4, "--workers", 0,
               "--out", tmp_path / "o", processes=processes)
    result = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and {k: result[k] for k in plain} == pytest.approx(plain, rel=1e-4)
    assert not os.path.exists(tmp_path / "o")


def test_flags_change_what_eval_only_scores(scored, tiny, capsys):
    train.main(parse("--eval-only", "--checkpoint", scored[0], "--data", tiny, "--workers", 0, "--device", "cpu",
                     "--val-resize", 50))
    assert "50 -> 32 px" in capsys.readouterr().err


def test_photographs_are_scored_as_they_were_trained_on(scored, tiny, tmp_path):
    """A network that was trained with --exif sees them turned, whether the flag is repeated or not."""
    path, model, files, plain, _ = scored
    tag = Image.Exif()
    tag[0x0112] = 3  # upside down
    for i in range(len(files)):
        turned = tmp_path / "set" / "val" / f"{files.name(i)}.png"
        turned.parent.mkdir(parents=True, exist_ok=True)
        data.load(files.path(i)).rotate(180).save(turned, exif=tag)
    save_checkpoint(str(tmp_path / "exif.pt"), model, classes=list(data.DEMO_CLASSES), args=dict(exif=True))
    for file, flags in ((tmp_path / "exif.pt", ()), (path, ["--exif"])):
        result = train.main(parse("--eval-only", "--checkpoint", file, "--data", tmp_path / "set", "--workers", 0,
                                  "--device", "cpu", *flags))
        assert {k: result[k] for k in plain} == pytest.approx(plain, rel=1e-4)


def test_a_network_is_not_scored_on_what_it_learned_from(scored, tiny, tmp_path):
    """In a folder without val/: the images that were held out then, unless --val-split says otherwise"""
    flat, other = (str(shutil.copytree(os.path.join(tiny, "train"), tmp_path / name)) for name in ("flat", "other"))
    save_checkpoint(str(tmp_path / "c.pt"), scored[1], classes=list(data.DEMO_CLASSES),
                    args=dict(data=flat + "/", val_split=0.3))
    for root, flags, share in ((flat, (), 0.3), (flat, ("--val-split", 0.5), 0.5), (other, (), None)):
        result = train.main(parse("--eval-only", "--checkpoint", tmp_path / "c.pt", "--data", root, "--workers", 0,
                                  "--device", "cpu", *flags))
        assert result["images"] == (len(data.open_folder(root, val_split=share)[1]) if share else 50)


@pytest.mark.parametrize("script", ["train.py", "finetune.py"])  # which of them wrote OUT/best.pt is not known
def test_eval_only_needs_a_checkpoint_and_names_both_ways(script, tiny, tmp_path, run):
    done = run("--eval-only", "--data", tiny, "--out", tmp_path / "o", script=script)
    assert done.returncode == 3 and "Traceback" not in done.stderr
    assert f"no {tmp_path}/o/best.pt: train a network (python train.py), or name one with --checkpoint" in done.stderr


def test_eval_only_compiles_what_it_scores(scored, tiny, tmp_path, run):
    """The compiler takes a minute: a stand-in says that it was asked, for the network that is then called."""
    before = """
def compile(self):
    self._compiled_call_impl = lambda *a: print("compiled", file=sys.stderr) or self._call_impl(*a)
train.nn.Module.compile = compile
"""
    flags = ["--eval-only", "--checkpoint", scored[0], "--data", tiny, "--workers", 0, "--out", tmp_path / "o"]
    plain, compiled = run(*flags, before=before), run(*flags, "--compile", before=before)
    assert "compiled" not in plain.stderr and "compiled" in compiled.stderr, compiled.stderr
    assert json.loads(compiled.stdout)["top1"] == json.loads(plain.stdout)["top1"]


def test_imagenet_weights_score_as_stated(shared):
    """A hundred of the photographs; all 400 give 91.25 / 98.75."""
    from resnet50 import build_model, load_checkpoint, read_classes
    path = os.path.join(shared, "resnet50_v1_imagenet.pth")
    model = build_model(load_checkpoint(path), path, stride_on="1x1")
    files = data.open_folder(os.path.join(shared, "imagenet-cc"),
                             *read_classes(os.path.join(shared, "imagenet-classes.json")), eval_only=True)[1]
    files = files.select(torch.arange(0, len(files), 4).numpy())
    got = train.evaluate(model, data.Images(files, lambda _: data.eval_transform(model.preprocess)), 20, train.World(),
                         workers=1)
    assert got["top1"] >= 86 and got["top5"] >= 96 and got["images"] == 100


def test_corrupt_files_in_evaluation(scored, tiny, tmp_path, run):
    import shutil
    shutil.copytree(tiny, tmp_path / "d")
    victim = tmp_path / "d" / "val" / "disk" / "0001.jpg"
    victim.write_bytes(victim.read_bytes()[:300])
    flags = ["--eval-only", "--checkpoint", scored[0], "--data", tmp_path / "d", "--out", tmp_path / "o",
             "--batch-size", 8, "--workers", 1]
    done = run(*flags)
    assert done.returncode == 3 and "disk/0001.jpg" in done.stderr and "Traceback" not in done.stderr
    done = run(*flags, "--on-corrupt", "skip")
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["images"] == 28 and result["corrupt"] == 1 and "disk/0001.jpg" in done.stderr


# -------------------------------------------------------------------------------------------- what a person sees

def test_curves_are_valid_and_complete():
    records = [dict(event="step", epoch=i / 10, step=i, loss=3 / (1 + i), top1=i, lr=0.1, images_per_second=1)
               for i in range(1, 31)]
    records += [dict(event="epoch", epoch=e, step=e * 10, loss=1 / e, top1=20.0 * e, lr=0.1) for e in (1, 2, 3)]
    records.append(dict(event="step", epoch=3.1, step=31, loss=float("nan"), top1=0, lr=0.1))
    svg = train.curves_svg(records)
    document = xml.dom.minidom.parseString(svg)
    lines = document.getElementsByTagName("polyline")
    assert [len(line.getAttribute("points").split()) for line in lines] == [30, 3, 31, 3, 31] and "nan" not in svg
    assert train.curves_svg([]).startswith("<svg")


def test_a_terminal_s_line_is_redrawn_within_its_width(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((10, 5)))
    data.progress("x" * 30)
    data.progress("y" * 30, last=True)
    assert capsys.readouterr().err == f"\r\x1b[K{'x' * 9}\r\x1b[K{'y' * 30}\n"


def test_batch_size_auto_fits_and_is_bounded(monkeypatch):
    model = ResNet50(num_classes=4)
    found = train.find_batch_size(model, 32, None, train.World(), limit=20)
    assert 8 <= found <= 20 and model.bn1.num_batches_tracked == 0
    tried = []
    monkeypatch.setattr(train, "normalize", lambda p, _: tried.append(len(p)) or p[:, :, :1, :1].float())
    with pytest.raises(UserError, match="stopped by SIGTERM while it sought --batch-size") as caught:
        train.find_batch_size(model, 32, None, train.World(), 1024, lambda: "SIGTERM" if 16 in tried else None)
    assert caught.value.code == 75 and tried == [4, 8, 16]
    world = train.World()
    world.gather = lambda mine: [mine, (8, None)]
    assert train.find_batch_size(model, 32, None, world, 64) == 8  # what fits everywhere


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
                                   RuntimeError("CUDA out of memory, or what else PyTorch has said above")])
def test_batch_size_auto_is_bisected_on_a_gpu(monkeypatch, error):
    """By what PyTorch says of its memory, and csrc/; processes do not wait for each other's batch-norms"""
    class Network(nn.Sequential):
        preprocess = PREPROCESS

        def forward(self, x):
            assert type(self[0]) is nn.BatchNorm2d
            if len(x) > 100:
                raise error
            return self[0](x)
    zeros, world = torch.zeros, types.SimpleNamespace(device=torch.device("cuda"), gather=lambda mine: [mine])
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **more: zeros(*size, **more))
    model = Network(nn.SyncBatchNorm(3))
    assert train.find_batch_size(model, 4, None, world, 1024) == 80 and type(model[0]) is nn.SyncBatchNorm
    error.args = ("CUDA error: an illegal memory access was encountered",)
    with pytest.raises(RuntimeError, match="illegal"):
        train.find_batch_size(model, 4, None, world, 1024)


def test_a_kernel_that_timed_out_is_no_other_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    error = RuntimeError("CUDA error: the launch timed out and was terminated")
    for rank in (None, "1"):
        with pytest.raises(UserError if rank else RuntimeError, match="process 1 ends" if rank else "terminated"):
            train.run_processes(parse("--device", "cpu", "--eval-only"), MagicMock(side_effect=error))
        monkeypatch.setenv("RANK", "1")


@pytest.mark.parametrize("device, message", [("cuda", "--device cuda:2: PyTorch sees 2"), ("cuda:1", "one GPU for 3")])
def test_each_process_has_a_gpu(monkeypatch, device, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("WORLD_SIZE", "3"), ("LOCAL_WORLD_SIZE", "3"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        train.World(device)


def test_files_of_an_earlier_run_that_are_none(tmp_path):
    (tmp_path / "r" / "metrics.jsonl").mkdir(parents=True)
    args = parse("--out", tmp_path / "r", "--overwrite")
    with pytest.raises(UserError, match="--overwrite: .*metrics.jsonl: Is a directory"):
        train.begin_run(args, train.World(), None)
    with pytest.raises(UserError, match="metrics.jsonl: IsADirectoryError"):
        train.RunLog(args, train.World(), dict(step=2, epoch=0))


def test_tensorboard_log(tiny, tmp_path, run):
    pytest.importorskip("tensorboard")
    done = run("--data", tiny, "--recipe", "demo", "--epochs", 1, "--image-size", 32, "--batch-size", 10,
               "--out", tmp_path / "r", "--tensorboard", "--log-every", 2)
    assert done.returncode == 0, done.stderr
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path / "r" / "tensorboard")).Reload()
    assert len(events.Scalars("step/loss")) == 3 and len(events.Scalars("epoch/top1")) == 1
    args = parse("--out", tmp_path / "r", "--tensorboard")
    for resumed, steps in (dict(step=2, epoch=0), [2, 3]), (None, [1]):  # killed behind its checkpoint; overwritten
        train.RunLog(args, train.World(), resumed).write("step", step=steps[-1], loss=0.5)
        events = EventAccumulator(str(tmp_path / "r" / "tensorboard")).Reload()
        assert [e.step for e in events.Scalars("step/loss")] == steps


@pytest.mark.parametrize("name", ["train", "data", "resnet50", "finetune", "compress", "export", "serve"])
def test_commands_that_are_shown_are_understood(name):
    """By the flags of the script: those of the README and of the script's own head. Its help can be written, too."""
    script = importlib.import_module(name)
    text = " ".join(script.get_args_parser().format_help().split())
    assert f"--{'data' if name == 'data' else 'checkpoint'}" in text and "default: None" not in text
    assert re.search(r"--(workers N|out FOLDER|drain-timeout S|device DEVICE) [^-]*\(default: ", text)
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        text = f.read() + script.__doc__
    shown = re.findall(rf"^ *(?:\w+=\w+ )?(?:python|torchrun .*) {name}\.py(.*)", text, re.M)
    assert len(shown) > 3
    for flags in shown:
        flags = shlex.split(flags.partition("  #")[0].partition("|")[0], comments=True)
        args = script.get_args_parser().parse_args([flag for flag in flags if flag != "..."])
        if name == "train":
            train.check_args(args, parse("--recipe", args.recipe))
        elif name in ("finetune", "compress", "export"):
            script.check_args(args)


@pytest.mark.parametrize("module, flags", [
    (train, ()), (train, ("--data", "x")), (train, ("--recipe", "a1")), (train, ("--eval-only",)),
    (finetune, ()), (finetune, ("--task", "detect"))])
def test_help_shows_the_defaults_that_its_command_line_has(module, flags, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as caught:
        module.get_args_parser().parse_args([*flags, "--help"])
    shown, wanted = capsys.readouterr().out, module.get_args_parser().parse_args(flags)
    assert caught.value.code == 0
    for key in ("weight_decay", "lr", "lr_base_size", "batch_size", "crop_scale", "image_size", "model_ema_decay",
                "epochs", "opt", "loss", "label_smoothing"):
        values = re.findall(rf"^ *--{key.replace('_', '-')} \S+\s+(?![-\s]).*\(default: (\S+)\)$", shown, re.M)
        assert values == [str(value) for value in [getattr(wanted, key)] if value is not None], key


def test_user_error_is_one_line():
    assert str(UserError("a\n  b")) == "a b" and UserError("x").code == 3
