"""finetune.py against naive loops, float64 and the network it started from: what is trained, at which rate, what is
kept, the losses, alignment, the data check, the report; every strategy stopped and resumed."""
import contextlib
import csv
import itertools
import json
import os
import re
import shutil
import signal
import sys
import types
import xml.dom.minidom

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import data
import finetune
import train
from resnet50 import (
    ResNet50,
    UserError,
    build_model,
    fuse,
    load_checkpoint,
    normalize,
    predict,
    save_checkpoint,
    torchvision_model,
)
from tests.conftest import equal_state

SHAPES = ("disk", "ring", "square")


def parse(*flags):
    return finetune.get_args_parser().parse_args([str(f) for f in flags])


def new_network(classes=5, seed=0, size=32, **config):
    torch.manual_seed(seed)
    model = ResNet50(num_classes=classes, **config)
    for module in model.modules():  # as trained ones are: no branch is silent, statistics are not 0 and 1
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 0.8)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    model.preprocess.update(crop=size, resize=size)
    return model.to(memory_format=torch.channels_last).eval()


WIDTHS = {"conv1": 8, **{f"layer{i}": 8 * 2 ** i for i in range(1, 5)},
          **{f"layer{i}.{j}.conv{k}": 4 * 2 ** i for i, n in enumerate((3, 4, 6, 3), 1) for j in range(n)
             for k in (1, 2)}}  # so that a step takes milliseconds


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A narrow network's checkpoint with five classes that nothing here has, for images of 32 pixels"""
    path = str(tmp_path_factory.mktemp("source") / "source.pt")
    save_checkpoint(path, new_network(widths=WIDTHS), classes=list("abcde"))
    return path


@pytest.fixture(scope="module")
def shapes(tiny, tmp_path_factory):
    """Three classes of the tiny set: 15 training and 9 validation images"""
    root = tmp_path_factory.mktemp("shapes") / "set"
    for split, name in itertools.product(("train", "val"), SHAPES):
        shutil.copytree(os.path.join(tiny, split, name), root / split / name)
    return str(root)


@pytest.fixture
def tune(source, shapes, tmp_path):
    """tune(flags...) -> result of a short run in this process, OUT being tmp_path / `out`"""
    def call(*flags, out="run", root=shapes, checkpoint=source):
        return finetune.main(parse("--data", root, *(["--checkpoint", checkpoint] if checkpoint else []),
                                   "--out", tmp_path / out, "--batch-size", 4, "--workers", 0,
                                   "--amp-dtype", "float32", *flags))
    return call


def interrupted(monkeypatch, work, *numbers, of="train_step", out=None):
    """Does work(), which a signal stops in the calls of train.py's function with these numbers, anew after each of them
    -> the last one's result, and how many calls there were. Of a run in `out` this is the last of its metrics."""
    real, count = getattr(train, of), itertools.count(1)

    def call(*args, **options):
        if next(count) in numbers:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(*args, **options)
    monkeypatch.setattr(train, of, call)
    for _ in numbers:
        with pytest.raises(UserError, match="stopped by SIGUSR1") as caught:
            work()
        assert caught.value.code == 75
        assert out is None or last_event(out) == "stopped"
    return work(), next(count) - 1


def last_event(out):
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["event"]


def plan_of(source, shapes, *flags, new_head=True):
    args = parse("--data", shapes, "--checkpoint", source, "--batch-size", 4, "--workers", 0, "--amp-dtype", "float32",
                 *flags)
    model, _, _ = finetune.load_source(args)
    finetune.resolve(args, model, 15)
    *sets, notes = data.open_folder(shapes)
    if not new_head:
        model = finetune.rebuilt(model, 0, True, num_classes=len(sets[2]))
    unstopped = types.SimpleNamespace(poll=lambda: False)
    plan = finetune.FineTuning(args, train.World(), unstopped, model, sets, notes, new_head, "none")
    return plan, plan.model(args, sets[2]), args


# ------------------------------------------------------------------------------------------------------ the network

@pytest.mark.parametrize("name", ["ours", "mobilenet_v2", "efficientnet_b4", "vit_b_16", "vgg11", "squeezenet1_1",
                                  "densenet121"])
def test_stages_hold_every_parameter_once_from_the_head_down(name):
    with torch.device("meta"):
        model = ResNet50() if name == "ours" else None
    model = model or torchvision_model(name, 7)
    stages = finetune.stages_of(model)
    assert stages[0] == [{"ours": "fc", "mobilenet_v2": "classifier.1", "efficientnet_b4": "classifier.1",
                          "vit_b_16": "heads.head", "vgg11": "classifier.6", "squeezenet1_1": "classifier.1",
                          "densenet121": "classifier"}[name]]
    assert 4 <= len(stages) <= 6
    if name == "ours":
        assert stages[1:] == [["layer4"], ["layer3"], ["layer2"], ["layer1"], ["conv1", "bn1"]]
    order = [n for n, _ in model.named_parameters()]
    if name == "vit_b_16":
        order.remove("class_token")
        order.remove("encoder.pos_embedding")
    depth = {n: [i for i, parts in enumerate(stages) if any(n.startswith(p + ".") for p in parts)] for n in order}
    assert all(len(d) == 1 for d in depth.values()), [n for n, d in depth.items() if len(d) != 1]
    below = [depth[n][0] for n in order if depth[n] != [0]]
    assert below == sorted(below, reverse=True)


@pytest.mark.parametrize("config", [{}, dict(attention="se"), dict(widths={"layer3.1.conv2": 40}), "mobilenet_v2",
                                    "mnasnet0_5"])
def test_a_new_head_and_nothing_else_changes(config):
    model = torchvision_model(config, 5) if isinstance(config, str) else new_network(**config)
    new, again, other = (finetune.rebuilt(model, seed, True, num_classes=3) for seed in (0, 0, 1))
    head = finetune.head_of(new)
    for key, value in model.state_dict().items():
        assert key.startswith(head + ".") or torch.equal(value, new.state_dict()[key])
    weight, bias = new.get_submodule(head).weight, new.get_submodule(head).bias
    assert weight.shape[0] == 3 and weight.std() < 0.02 and not bias.any() and new.config["num_classes"] == 3
    assert torch.equal(weight, again.get_submodule(head).weight)
    assert not torch.equal(weight, other.get_submodule(head).weight)


def test_images_are_normalised_as_the_network_was_trained(source, shapes):
    plan, _, args = plan_of(source, shapes, "--strategy", "full", "--image-size", 48)
    plan.source.preprocess["mean"] = [0.5, 0.4, 0.3]
    made = plan.model(args, SHAPES).preprocess
    assert made["mean"] == [0.5, 0.4, 0.3] and made["crop"] == 48


def test_lora_is_a_low_rank_sum_and_merges_into_plain_weights(source, shapes):
    plan, model, _ = plan_of(source, shapes, "--strategy", "lora", "--lora-rank", 3, "--lora-alpha", 6)
    before = build_model(load_checkpoint(source), source).state_dict()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        first = model.eval()(x)
        assert torch.allclose(first, finetune.merged(model)(x), atol=1e-6)
        for name, p in model.named_parameters():
            if name.endswith(".0.b"):
                nn.init.normal_(p, std=0.5)
        moved, plain = model(x), finetune.merged(model)
        assert (moved - first).abs().max() > 0.1 * first.abs().max() and (plain.eval()(x) - moved).abs().max() <= 1e-5
    assert {k: v.shape for k, v in plain.state_dict().items() if "fc" not in k} \
        == {k: v.shape for k, v in before.items() if "fc" not in k}
    low = model.layer2[1].conv2.parametrizations.weight[0]
    a, b, expected = low.a.detach().double(), low.b.detach().double(), before["layer2.1.conv2.weight"].double().clone()
    for o, i in itertools.product((0, 7, 15), (0, 5, 15)):
        for y, z in itertools.product(range(3), range(3)):
            expected[o, i, y, z] += 6 / 3 * sum(b[o, r] * a[r, i * 9 + y * 3 + z] for r in range(3))
    for o, i in itertools.product((0, 7, 15), (0, 5, 15)):
        assert torch.allclose(plain.layer2[1].conv2.weight[o, i].double(), expected[o, i], atol=1e-7)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("parametrizations.weight.0" in n or n.startswith("fc.") for n in trained) and len(trained) == 2 * 53 + 2
    assert all(type(m) is train.FrozenNorm for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_default_lora_trains_less_than_a_twentieth():
    args, model = parse(), new_network()
    finetune.add_lora(model, args.lora_rank, args.lora_alpha, 0)
    size = {name: p.numel() for name, p in model.named_parameters()}
    trained = sum(n for name, n in size.items() if "parametrizations.weight.0" in name or name.startswith("fc."))
    assert 0 < trained < 0.05 * sum(size.values())


def test_adapters_start_as_the_identity_and_stay_in_the_checkpoint(source, shapes, tmp_path):
    _, model, _ = plan_of(source, shapes, "--strategy", "adapter", "--adapter-channels", 6)
    x, old = torch.rand(2, 3, 32, 32), build_model(load_checkpoint(source), source)
    old.fc = model.fc
    model.eval()
    assert torch.allclose(model(x), old(x), atol=1e-6)
    nn.init.normal_(model.layer3[2].adapter.up.weight)
    y = torch.rand(2, 64, 2, 2)
    adapter = model.layer3[2].adapter
    inner = F.relu(F.conv2d(y, adapter.down.weight, adapter.down.bias))
    wanted = y + F.conv2d(inner, adapter.up.weight, adapter.up.bias)
    assert inner.shape[1] == 6 and torch.allclose(adapter(y), wanted, atol=1e-5)
    path = str(tmp_path / "a.pt")
    save_checkpoint(path, model, classes=SHAPES)
    again, now = build_model(load_checkpoint(path), path)(x), model(x)
    assert torch.allclose(again, now, atol=1e-4 * now.abs().max().item())
    with pytest.raises(UserError, match="adapters"):
        fuse(model)
    import compress
    with pytest.raises(UserError, match="adapters"):
        compress.open_model(compress.get_args_parser().parse_args(["--checkpoint", path, "--int8"]))


@pytest.mark.parametrize("name", ["ours", "mobilenet_v2", "densenet121"])
def test_features_are_what_the_head_reads(name):
    torch.manual_seed(1)
    model = new_network() if name == "ours" else torchvision_model(name, 5)
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        logits = predict(model, pixels)
        features = finetune.reader(model, None)(pixels)
        finetune.on_features(model)
        assert torch.allclose(model(features[:, :, None, None]), logits, atol=1e-4 * logits.abs().max())
        assert torch.equal(predict(model, pixels), logits)


def test_a_head_learns_from_every_view_and_from_features_that_are_aligned(source, shapes, tmp_path):
    flags = ("--strategy", "head", "--views", 3, "--target-domain", shapes, "--align-weight", 0.25)
    plan, model, args = plan_of(source, shapes, *flags)
    plan.cache, (files, val) = str(tmp_path / "features.pt"), plan.sets[:2]
    read, crops = finetune.reader(model, None), lambda epoch: data.train_transform(32, model.preprocess, args)

    def features(part, transform_at, epoch):
        images = data.Images(part, transform_at, args.seed)
        return read(images.batch([(epoch, i, 0) for i in range(len(part))])[0])
    plain = lambda epoch: data.eval_transform(model.preprocess)  # noqa: E731
    with torch.no_grad():
        views = torch.stack([features(files, crops, epoch) for epoch in range(3)])
        turn = finetune.recolouring(views.flatten(0, 1), features(plan.target, plain, 0))
        wanted = views.lerp(turn(views), 0.25)
        seen = features(val, plain, 0)
    got, _ = plan.images(files, crops, args, True)
    for epoch, index, repeat in itertools.product(range(4), range(len(files)), range(2)):
        value, label, _ = got[(epoch, index, repeat)]
        assert torch.allclose(value.flatten(), wanted[(epoch + repeat) % 3, index], atol=1e-4)
        assert label == files.labels[index]
    got, _ = plan.images(val, plain, args, False)  # scored as it learns, not as the source's are
    assert all(torch.allclose(got[(5, i, 0)][0].flatten(), row, atol=1e-4)
               for i, row in enumerate(seen.lerp(turn(seen), 0.25)))
    assert (views[0] - views[1]).abs().max() > 0.01 and (wanted - views).abs().max() > 0.01


def test_dropout_is_in_front_of_a_head_on_features():
    model = finetune.on_features(new_network(dropout=0.5)).train()
    x = torch.ones(1, 2048, 1, 1)
    assert not torch.equal(model(x), model(x)) and torch.equal(model.eval()(x), model(x))


def test_copies_of_a_feature_network_use_their_own_head():
    import copy
    model = finetune.on_features(new_network())
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.fc.weight)
    x = torch.rand(2, 2048, 1, 1)
    assert torch.equal(twin(x), twin.fc.bias.expand(2, 5)) and not torch.equal(model(x), twin(x))


# ------------------------------------------------------------------------------------------- what is trained, and how

@pytest.mark.parametrize("strategy, trains", [("full", True), ("layers:1", ["layer4"]), ("head", []), ("lora", [])])
def test_adapters_that_a_network_has_belong_to_their_stages(strategy, trains, shapes, tmp_path):
    path = str(tmp_path / "a.pt")
    save_checkpoint(path, new_network(widths=WIDTHS, adapter=6), classes=list("abcde"))
    plan, model, _ = plan_of(path, shapes, "--strategy", strategy)
    plan.begin(model, 0)
    for name, p in model.named_parameters():
        if ".adapter." in name and "weight.0" not in name:
            assert p.requires_grad == (trains is True or name.startswith(tuple(trains))), name
            assert plan.depth(name) == 5 - int(name[5]), name
    with pytest.raises(UserError, match="--adapter-channels 7: the network's have 6") as caught:
        plan_of(path, shapes, "--strategy", "adapter", "--adapter-channels", 7)
    assert caught.value.code == 2
    plan, model, _ = plan_of(path, shapes, "--strategy", "adapter", "--adapter-channels", 6)
    assert all(p.requires_grad == (".adapter." in n or n.startswith("fc.")) for n, p in model.named_parameters())
    before = load_checkpoint(path)["model"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if ".adapter." in k)


def test_a_head_without_a_bias_and_a_stage_of_more_than_norms():
    model = torchvision_model("maxvit_t", 4)
    new = finetune.rebuilt(model, 0, True, num_classes=3)
    assert new.get_submodule(finetune.head_of(new)).weight.shape[0] == 3
    model = torchvision_model("convnext_tiny", 4)
    top = finetune.stages_of(model)[1]  # the norm before the head is no stage by itself
    assert sum(p.numel() for part in top for p in model.get_submodule(part).parameters()) > 1e6


def trained_stages(plan, model):
    return sorted({plan.depth(n) for n, p in model.named_parameters() if p.requires_grad})


@pytest.mark.parametrize("flags, by_epoch", [
    (["--strategy", "head"], [[0]] * 7), (["--strategy", "layers:2"], [[0, 1, 2]] * 7),
    (["--strategy", "full"], [[0, 1, 2, 3, 4, 5]] * 7),
    (["--strategy", "gradual"], [list(range(min(e, 5) + 1)) for e in range(7)]),
    (["--strategy", "gradual", "--unfreeze-every", 2], [list(range(e // 2 + 1)) for e in range(7)])])
def test_what_an_epoch_trains(flags, by_epoch, source, shapes):
    plan, model, _ = plan_of(source, shapes, *flags)
    for epoch, expected in enumerate(by_epoch):
        changed = plan.begin(model, epoch)
        assert changed == (epoch == 0 or by_epoch[epoch - 1] != expected)
        assert trained_stages(plan, model) == expected
        norms = {n: type(m) for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
        assert all((kind is nn.BatchNorm2d) == (plan.depth(n + ".weight") in expected) for n, kind in norms.items())
    plan, model, _ = plan_of(source, shapes, *flags)  # a run resumed in a later epoch
    plan.begin(model, 3)
    assert trained_stages(plan, model) == by_epoch[3]
    plan, model, _ = plan_of(source, shapes, *flags, new_head=False)  # a head that has learned needs no epoch alone
    plan.begin(model, 0)
    assert trained_stages(plan, model) == ([0, 1] if plan.kind == "gradual" else by_epoch[0])


@pytest.mark.parametrize("flags, competes", [
    ([], True), (["--target-domain", "SHAPES"], False), (["--target-domain", "SHAPES", "--align", "none"], True),
    (["--then", "SHAPES"], False)])
def test_what_is_not_aligned_or_has_learned_nothing_that_stays_does_not_compete(flags, competes, source, shapes):
    flags = ["--strategy", "layers:1", *(shapes if f == "SHAPES" else f for f in flags)]
    assert plan_of(source, shapes, *flags, new_head=False)[0].knows == competes
    assert not plan_of(source, shapes, *flags)[0].knows


def test_frozen_stages_keep_weights_and_statistics_and_others_move(source, tune):
    result = tune("--strategy", "layers:1", "--epochs", 1, "--lr", 1e-2)
    before, after = (load_checkpoint(path)["model"] for path in (source, result["checkpoint"]))
    for name, value in before.items():
        moves = name.startswith(("layer4", "fc"))
        assert torch.equal(value, after[name]) if not moves else value.shape != after[name].shape \
            or not torch.equal(value, after[name]), name


def test_rates_fall_from_stage_to_stage(source, shapes):
    plan, model, args = plan_of(source, shapes, "--strategy", "full", "--layer-decay", 0.5, "--head-lr-mult", 8)
    optimizer = train.make_optimizer(model, "adamw", 0.1, 0.9, plan.share)
    shares = {id(p): g["lr_share"] for g in optimizer.param_groups for p in g["params"]}
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    expected = {"fc": 8, "layer4": 1, "layer3": 0.5, "layer2": 0.25, "layer1": 0.125, "conv1": 0.0625, "bn1": 0.0625}
    for name, p in model.named_parameters():
        assert shares[id(p)] == expected[name.split(".")[0]] and decays[id(p)] == (0.1 if p.ndim > 1 else 0)
    assert len(shares) == len(list(model.parameters()))


def test_l2_sp_pulls_to_the_start_and_ohem_takes_the_hardest(source, shapes):
    plan, model, _ = plan_of(source, shapes, "--strategy", "full", "--l2-sp", 0.3, "--ohem", 0.5)
    start = {n: p.detach().clone().double() for n, p in model.named_parameters()}
    loss = plan.teach(train.make_loss("ce"))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.01)
    pull = sum(((p.detach().double() - start[n]) ** 2).sum() for n, p in model.named_parameters()
               if not n.startswith("fc."))
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    losses = sorted((-torch.log_softmax(row, 0)[y].item() for row, y in zip(logits, labels)), reverse=True)
    assert loss(logits, labels).item() == pytest.approx(sum(losses[:3]) / 3 + 0.15 * pull.item(), rel=1e-5)


def test_strategy_by_the_number_of_images(source):
    model, _, _ = finetune.load_source(parse("--checkpoint", source))

    def chosen(images, *flags):
        args = parse("--checkpoint", source, *flags)
        note = finetune.resolve(args, model, images)
        assert (f"as {flags[0]} asks" if images < 1000 and args.strategy == "gradual" else f"{images} images") in note
        return args
    assert [chosen(n).strategy for n in (10, 999, 1000, 19999, 20000)] == ["head", "head", "gradual", "gradual", "full"]
    for flags in (["--cutmix-alpha", 1], ["--l2-sp", 1], ["--progressive", 32, 0, 1], ["--layer-decay", 0.5],
                  ["--unfreeze-every", 2], ["--grad-checkpointing"]):
        assert chosen(10, *flags).strategy == "gradual"  # what a head on cached features cannot do, or without
    assert chosen(20000, "--unfreeze-every", 2).strategy == chosen(20000, "--views", 2).strategy == "gradual"
    args = chosen(10, "--epochs", 3)
    assert args.epochs == 3 and args.lr == 1e-4 and args.image_size == 32
    assert train.preprocess_of(args)["resize"] == 32
    args = chosen(10, "--image-size", 224)
    assert (train.preprocess_of(args)["crop"], train.preprocess_of(args)["resize"]) == (224, 256)


# ---------------------------------------------------------------------------------------------------------- alignment

def test_coral_and_mmd_against_loops():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 3)), rng.normal(1, 2, size=(4, 3))
    cov = [np.cov(x, rowvar=False) for x in (a, b)]
    unit = np.trace(cov[0]) / 3
    expected = ((cov[0] - cov[1]) ** 2).sum() / 36 / unit ** 2 + ((a.mean(0) - b.mean(0)) ** 2).mean() / unit
    ta, tb = torch.from_numpy(a), torch.from_numpy(b)
    assert finetune.coral(ta, tb).item() == pytest.approx(expected)
    assert finetune.coral(ta, ta).item() == pytest.approx(0)
    both = np.concatenate([a, b])
    distance = np.array([[((p - q) ** 2).sum() for q in both] for p in both])
    width = distance.sum() / (9 * 8)
    kernel = sum(np.exp(-distance / (width * w)) for w in (0.25, 0.5, 1, 2, 4))
    total = sum(kernel[i, j] * (1 / 5 if i < 5 else -1 / 4) * (1 / 5 if j < 5 else -1 / 4)
                for i in range(9) for j in range(9))
    assert finetune.mmd(ta, tb).item() == pytest.approx(total)
    assert torch.autograd.gradcheck(lambda x: finetune.coral(ta, x), tb.clone().requires_grad_())
    for loss in (finetune.coral, finetune.mmd):  # units and widths are constants to the gradient
        x = ta.clone().requires_grad_()
        loss(x, tb).backward()
        assert loss(ta - 0.01 * x.grad, tb) < loss(ta, tb) - 0.005 * x.grad.square().sum()


def test_what_a_convolution_reads_is_aligned_by_its_means(shapes, tmp_path):
    path = str(tmp_path / "squeeze.pth")
    torch.save(torchvision_model("squeezenet1_1", 4).state_dict(), path)
    flags = ("--model", "squeezenet1_1", "--strategy", "layers:1", "--target-domain", shapes, "--image-size", 64)
    plan, model, _ = plan_of(path, shapes, *flags)
    read = []
    model.classifier[1].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    model(torch.rand(2, 3, 64, 64))
    assert read[0].shape[2:] == (3, 3) and plan.seen.shape == (2, 512)  # not 512 x 9: covariances would take 81 times
    assert torch.allclose(plan.seen[1, 7], sum(read[0][1, 7, i, j] for i in range(3) for j in range(3)) / 9)


def test_recoloured_features_have_the_target_s_moments():
    rng = np.random.default_rng(1)
    source = torch.from_numpy(rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6)) + 3)
    target = torch.from_numpy(rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6)) - 1)
    turned = finetune.recolouring(source, target, ridge=1e-9)(source).numpy()
    assert np.allclose(turned.mean(0), target.numpy().mean(0), atol=1e-4)
    assert np.allclose(np.cov(turned, rowvar=False), np.cov(target.numpy(), rowvar=False), atol=1e-3)
    few = torch.from_numpy(rng.normal(size=(4, 6)))  # fewer images than channels
    assert finetune.recolouring(few, target)(few).isfinite().all()


# ------------------------------------------------------------------------------------------------------- the data check

def checked(root, *flags):
    args = parse("--data", root, "--workers", 0, *flags)
    return finetune.check_data(data.open_folder(str(root)), args)


def test_data_check_names_what_is_odd(shapes, tmp_path):
    root = shutil.copytree(shapes, tmp_path / "odd")
    for other in sorted((root / "train" / "ring").iterdir())[1:]:
        other.unlink()  # a class of one image
    shutil.copy(root / "val" / "disk" / "0001.jpg", root / "train" / "disk" / "again.jpg")
    shutil.copy(root / "train" / "disk" / "0000.jpg", root / "train" / "square" / "twin.jpg")
    shutil.copy(root / "val" / "disk" / "0000.jpg", root / "val" / "ring" / "cross.jpg")
    Image.new("RGB", (20, 20)).save(root / "train" / "disk" / "odd.jpg", "GIF")  # the name lies
    files, val, classes, _, notes = checked(root)
    text = "\n".join(notes)
    assert [os.path.basename(files.path(i)) for i in range(len(files)) if "again" in files.path(i)] == []
    assert "1 training images are validation images too" in text and "disk/again.jpg is" in text
    for path in ("train/square/twin.jpg", "val/ring/cross.jpg"):
        assert any(f"{path} and" in n and "the same image in two classes" in n for n in notes)
    assert "disk/odd.jpg is the only GIF" in text and "ring (1)" in text
    assert "disk: 6 and 3, ring: 1 and 4, square: 6 and 3" in text
    assert len(files) == 13 and len(val) == 10 and list(classes) == ["disk", "ring", "square"]


def test_a_signal_stops_the_data_check(tune, tmp_path, monkeypatch):
    real, seen = finetune.examine, []

    def examine(*args):
        seen.append(args) or len(seen) == 2 and os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)
    monkeypatch.setattr(finetune, "examine", examine)
    with pytest.raises(UserError, match="stopped by SIGTERM in the data check, before the first step") as caught:
        tune()
    assert caught.value.code == 75 and len(seen) < 9 and os.listdir(tmp_path) == []


def test_a_class_may_have_no_image_from_the_start(shapes):
    sets = data.open_folder(shapes, [*SHAPES, "zebra"])
    files, *_, notes = finetune.check_data(sets, parse("--data", shapes, "--workers", 0))
    assert len(files) == 15 and any("very few training images: zebra (0)" in n for n in notes)


def test_raw_pixels_that_begin_as_a_bitmap_are_no_damaged_one(shapes, tmp_path):
    root = shutil.copytree(shapes, tmp_path / "raw")
    pixels = np.zeros((72, 72, 3), np.uint8)
    pixels[0, 0] = tuple(b"BM!")
    Image.fromarray(pixels).save(root / "train" / "disk" / "0000.png")
    data.make_pack(str(root), str(tmp_path / "pack"), "raw", side=72)
    files, val, _, _, notes = checked(tmp_path / "pack")
    assert (len(files), len(val)) == (16, 9) and not any("is the only" in n for n in notes)


def test_data_check_of_damaged_files(shapes, tmp_path):
    root = shutil.copytree(shapes, tmp_path / "bad")
    (root / "train" / "ring" / "0002.jpg").write_bytes((root / "train" / "ring" / "0002.jpg").read_bytes()[:300])
    (root / "val" / "disk" / "notes.png").write_bytes(b"hello")
    with pytest.raises(UserError, match="ring/0002.jpg: damaged"):
        checked(root)
    files, val, _, _, notes = checked(root, "--on-corrupt", "skip")
    assert (len(files), len(val)) == (14, 9)
    assert any("1 training files are left out" in n and "0002.jpg" in n for n in notes)
    assert any("1 validation files" in n and "notes.png: not an image" in n for n in notes)
    for path in (root / "train" / "square").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no training image is left of square"):
        checked(root, "--on-corrupt", "skip")


# ---------------------------------------------------------------------------------------------------------- whole runs

STOPPED = ["--strategy", "gradual", "--epochs", 3, "--model-ema-decay", 0.9, "--mixup-alpha", 0.2, "--dropout", 0.1]
RUNS = {"head": ["--strategy", "head", "--epochs", 3, "--views", 2, "--opt", "nesterov", "--dropout", 0.2],
        "gradual": STOPPED, "momentum": ["--strategy", "gradual", "--epochs", 3, "--opt", "sgd", "--layer-decay", 1],
        "layers": ["--strategy", "layers:2", "--epochs", 2, "--swa-start", 0.4, "--l2-sp", 0.01],
        "full": ["--strategy", "full", "--epochs", 2, "--drop-path", 0.2, "--ohem", 0.5, "--balanced"],
        "lora": ["--strategy", "lora", "--epochs", 2, "--model-ema-decay", 0.9],
        "adapter": ["--strategy", "adapter", "--epochs", 2, "--opt", "sgd", "--loss", "focal"],
        "coral": ["--strategy", "layers:1", "--epochs", 2, "--target-domain", "SHAPES"],
        "mmd": ["--strategy", "full", "--epochs", 2, "--target-domain", "SHAPES", "--align", "mmd"]}


@pytest.mark.parametrize("name", RUNS)
def test_every_strategy_resumes_to_the_same_bits(name, tune, source, shapes, tmp_path, monkeypatch):
    """And keeps what came sparse so"""
    flags, path, thin = [shapes if f == "SHAPES" else f for f in RUNS[name]], str(tmp_path / "sparse.pt"), {}
    model = build_model(load_checkpoint(source), source)
    for key in ("conv1.weight", "layer4.2.conv1.weight"):
        thin[key] = model.get_parameter(key).data.bernoulli_(0.5).float()
    save_checkpoint(path, model, classes=list("abcde"), encode=dict.fromkeys(thin, "sparse"))
    monkeypatch.setitem(finetune.STRATEGIES["head"], "epochs", 2)  # that gradual begins with
    result, total = interrupted(monkeypatch, lambda: tune(*flags, checkpoint=path, out="straight"))
    stops = [2, 5] + [total - 1] * ("gradual" in flags)  # in mid-epoch, here in the second part
    resumed, _ = interrupted(monkeypatch, lambda: tune(*flags, "--resume", checkpoint=path, out="stopped"), *stops,
                             out=tmp_path / "stopped")
    assert not equal_state(tmp_path / "straight" / "last.pt", tmp_path / "stopped" / "last.pt")
    for key in ("top1", "loss", "per_class", "best_epoch"):
        assert resumed[key] == result[key]
    best = load_checkpoint(result["checkpoint"])
    assert best["classes"] == list(SHAPES) and best["config"]["num_classes"] == 3
    assert last_event(tmp_path / "stopped") == "epoch" and best["encode"] == dict.fromkeys(thin, "sparse")
    assert all(not best["model"][key][weight == 0].any() for key, weight in thin.items())
    model = build_model(best, "best")  # LoRA is merged, nothing else is special about the file
    assert ("adapter" in model.config) == (name == "adapter")
    with pytest.raises(UserError, match="last.pt: is a run .* lora") if name == "lora" else contextlib.nullcontext():
        build_model(load_checkpoint(str(tmp_path / "straight" / "last.pt")), "last.pt")
    assert not (tmp_path / "straight" / "features.pt").exists()


def test_gradual_goes_on_from_the_heads_best_epoch_which_competes(tune, tmp_path, monkeypatch):
    monkeypatch.setitem(finetune.STRATEGIES["head"], "epochs", 3)
    flags = ["--strategy", "gradual", "--epochs", 2]
    results = [tune(*flags, "--lr", lr, out=name) for lr, name in ((1e-4, "gentle"), (0.3, "wild"))]
    for result, name in zip(results, ("gentle", "wild")):
        out = tmp_path / name
        head = load_checkpoint(out / "head" / "best.pt")
        epochs = [r for r in map(json.loads, open(out / "metrics.jsonl")) if r["event"] == "epoch"]
        assert [r["epoch"] for r in epochs] == [0, 1, 2] and "train_loss" not in epochs[0]
        assert epochs[0]["top1"] == pytest.approx(head["metrics"]["top1"]) == result["top1"] or result["best_epoch"]
        assert epochs[0]["loss"] == pytest.approx(head["metrics"]["loss"], rel=1e-3)
        assert result["top1"] == max(r["top1"] for r in epochs)
        assert not (out / "features.pt").exists()
    wild = load_checkpoint(results[1]["checkpoint"])  # no epoch was better than the head
    head = load_checkpoint(tmp_path / "wild" / "head" / "best.pt")
    assert results[1]["best_epoch"] == 0 and wild["metrics"]["epoch"] == 0
    assert all(torch.equal(v, head["model"][k]) for k, v in wild["model"].items())
    # what is resumed needs no head before
    monkeypatch.setattr(train, "train_step", lambda *a, **k: pytest.fail("there is nothing left to train"))
    moved = tune(*flags, "--lr", 1e-4, "--resume", tmp_path / "gentle" / "last.pt", out="moved")
    assert moved["loss"] == results[0]["loss"] and not (tmp_path / "moved" / "head").exists()
    monkeypatch.undo()
    # a network that knows the classes competes under every strategy, but not with a target domain: it is not aligned
    again = tune("--strategy", "full", "--epochs", 1, "--lr", 0.3, checkpoint=results[0]["checkpoint"], out="again")
    assert again["best_epoch"] == 0 and again["top1"] == results[0]["top1"]


def test_every_part_of_a_run_is_one_of_its_own_in_other_tools(tune, monkeypatch):
    """mlflow.start_run raises while another run is active, wandb.init gives that one back"""
    class Tool:
        def __init__(self):
            self.active, self.runs = None, []

        def start_run(self, run_name):
            assert self.active is None, f"Run {self.active} is already active"
            self.active = run_name

        def init(self, dir, **_):
            self.active = self.active or dir
            return self

        def end_run(self):
            self.active = None
        finish = end_run

        def log_metrics(self, values, step):
            self.runs.append(os.path.basename(self.active))
        log = log_metrics

        def log_params(self, values):
            pass
    tools = dict(mlflow=Tool(), wandb=Tool())
    for name, tool in tools.items():
        monkeypatch.setitem(sys.modules, name, tool)
    monkeypatch.setitem(finetune.STRATEGIES["head"], "epochs", 1)
    tune("--strategy", "gradual", "--epochs", 1, "--mlflow", "--wandb", "--views", 1)
    for tool in tools.values():
        assert [name for name, _ in itertools.groupby(tool.runs)] == ["head", "run"]


def test_averaged_weights_are_the_mean_over_epochs_with_statistics_of_their_own(tune, monkeypatch):
    ends, averages, update, recalibrate = [], [], train.EMA.update, train.recalibrate

    def spy(self, model):
        ends.append({k: v.clone() for k, v in model.state_dict().items()})
        update(self, model)

    def watch(model, batches):
        batches = [p.clone() for p in batches]
        averages.append({k: v.clone() for k, v in model.state_dict().items()})
        recalibrate(model, batches)
        means = []
        hook = model.layer4[2].bn3.register_forward_pre_hook(lambda _, x: means.append(x[0].mean((0, 2, 3))))
        model.train()
        with torch.no_grad():
            kept = {k: v.clone() for k, v in model.state_dict().items()}
            for pixels in batches:
                model(normalize(pixels, model.preprocess))
        hook.remove()
        model.load_state_dict(kept)
        model.eval()
        assert len(batches) == 3 and torch.allclose(torch.stack(means).mean(0), model.layer4[2].bn3.running_mean,
                                                    atol=1e-5)
    monkeypatch.setattr(train.EMA, "update", spy)
    monkeypatch.setattr(train, "recalibrate", watch)
    result = tune("--strategy", "layers:1", "--epochs", 5, "--lr", 1e-3, "--swa-start", 0.4)
    assert len(ends) == 5 and len(averages) == 2  # of epochs 3 and 4, then of 3, 4 and 5
    for average, first in zip(averages, (2, 2)):
        last = first + 2 + (average is averages[-1])
        for key in ("layer4.0.conv2.weight", "fc.bias", "layer4.1.bn2.weight"):
            assert torch.allclose(average[key], torch.stack([e[key] for e in ends[first:last]]).mean(0), atol=1e-6)
    assert len(result["per_class"]) == 3


def test_a_run_stopped_while_it_evaluates_does_not_average_an_epoch_twice(tune, tmp_path, monkeypatch):
    flags = ["--strategy", "layers:1", "--epochs", 3, "--lr", 1e-3, "--swa-start", 0.3, "--drop-path", 0.5]
    tune(*flags, out="straight")
    # in the first epoch that is averaged with another
    interrupted(monkeypatch, lambda: tune(*flags, "--resume", out="stopped"), 3, of="evaluate")
    assert not equal_state(tmp_path / "straight" / "last.pt", tmp_path / "stopped" / "last.pt")


def test_best_by_loss(tune, tmp_path):
    result = tune("--strategy", "full", "--epochs", 4, "--lr", 3e-3, "--best-by", "loss")
    epochs = [r for r in map(json.loads, open(tmp_path / "run" / "metrics.jsonl")) if r["event"] == "epoch"]
    assert result["best_epoch"] == min(epochs, key=lambda r: r["loss"])["epoch"]
    assert result["loss"] == pytest.approx(min(r["loss"] for r in epochs), rel=1e-4)


def test_cached_features_are_computed_once_and_again_where_the_images_differ(tune, tmp_path, monkeypatch):
    reads, reader = [], finetune.reader
    monkeypatch.setattr(finetune, "reader", lambda *a: reads.append(1) or reader(*a))
    real = train.train_step
    monkeypatch.setattr(train, "train_step", lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM) or real(*a, **k))
    for flags, expected in ((["--views", 2], 2), (["--views", 2], 2), (["--views", 2, "--crop-scale", 0.9], 4)):
        with pytest.raises(UserError, match="stopped by SIGTERM"):
            tune("--strategy", "head", "--epochs", 2, "--resume", *flags)
        os.unlink(tmp_path / "run" / "last.pt")
        assert len(reads) == expected
    monkeypatch.setattr(finetune, "reader", lambda *a: os.kill(os.getpid(), signal.SIGTERM) or reader(*a))
    with pytest.raises(UserError, match="stopped by SIGTERM while it computed features"):
        tune("--strategy", "head", out="early")
    assert last_event(tmp_path / "early") == "stopped"


def test_features_of_one_part_are_not_another_s(tune, shapes, tmp_path, monkeypatch):
    for part in ("train", "val"):  # the same names everywhere
        for shape, i in itertools.product(SHAPES, range(3)):
            path = tmp_path / "set" / part / shape / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(os.path.join(shapes, part, shape, f"{i:04d}.jpg"), path)
    seen, features = [], finetune.FineTuning.features
    monkeypatch.setattr(finetune.FineTuning, "features", lambda *a: seen.append(features(*a)) or seen[-1])
    for target in ("train", "val"):
        tune("--strategy", "head", "--epochs", 1, "--views", 1, "--target-domain", tmp_path / "set" / target,
             root=str(tmp_path / "set"), out=target)
    assert len(seen) == 6 and all(v.shape == (1, 9, 128) for v in seen)
    training, first, val, _, second, _ = seen  # the crops of validation, of the images of either
    assert not torch.equal(training, val) and not torch.equal(first, training) and not torch.equal(first, val)
    assert torch.equal(second, val)


@pytest.mark.parametrize("strategy", ["head", "layers:1"])
def test_damaged_images_of_a_set_too_large_to_be_read_before(strategy, tune, shapes, tmp_path, monkeypatch):
    root = shutil.copytree(shapes, tmp_path / "set")
    for name in ("train/ring/0001.jpg", "val/disk/0001.jpg"):
        (root / name).write_bytes(b"hello")
    monkeypatch.setattr(finetune, "CHECKED", 5)
    result = tune("--strategy", strategy, "--epochs", 1, "--on-corrupt", "skip", root=str(root))
    right = sum(result["per_class"][name] / 100 * count for name, count in zip(SHAPES, (2, 3, 3)))
    assert result["mistakes"] == pytest.approx(8 - right, abs=1e-3)
    assert result["top1"] == pytest.approx(100 / 8 * right, abs=1e-3)
    with open(tmp_path / "run" / "confusion.csv", newline="") as f:
        assert sum(sum(map(int, row[1:4])) for row in list(csv.reader(f))[1:]) == 8
    with pytest.raises(UserError, match="disk/0001.jpg"):
        finetune.logits_of(new_network(3), data.open_folder(str(root))[1], parse("--workers", 0), train.World())


@pytest.mark.parametrize("strategy", ["head", "layers:1"])
def test_damaged_images_of_the_target_are_skipped(strategy, tune, shapes, tmp_path):
    target = shutil.copytree(shapes, tmp_path / "target")
    for name in ("train/ring/0001.jpg", "val/disk/0001.jpg"):
        (target / name).write_bytes(b"hello")
    flags = ["--strategy", strategy, "--epochs", 1, "--target-domain", target]
    result = tune(*flags, "--on-corrupt", "skip")
    assert result["target_top1"] * 8 / 100 == pytest.approx(round(result["target_top1"] * 8 / 100), abs=1e-3)
    with pytest.raises(UserError, match="0001.jpg"):
        tune(*flags, out="strict")


def test_the_report_is_of_both_mirror_images_where_evaluation_is(tune, shapes):
    model, val = new_network(3), data.open_folder(shapes)[1]
    nn.init.normal_(model.fc.weight)
    one, two = (finetune.logits_of(model, val, parse("--workers", 0, *flags), train.World())
                for flags in ((), ("--tta",)))
    pixels = [data.eval_transform(model.preprocess)(data.load(val.path(i))).permute(2, 0, 1) for i in range(len(val))]
    with torch.no_grad():
        straight, mirrored = (predict(model, torch.stack(p)) for p in (pixels, [p.flip(2) for p in pixels]))
    close = 1e-4 * straight.abs().max()
    assert (one - straight).abs().max() < close and (two - (straight + mirrored) / 2).abs().max() < close
    assert (one - two).abs().max() > 10 * close


@pytest.mark.parametrize("flags", [["--unfreeze-every", 2, "--layer-decay", 0.5], ["--views", 1, "--cutmix-alpha", 1]])
def test_what_auto_could_have_used_does_not_stand_in_a_resumed_run_s_way(flags, tune, tmp_path, monkeypatch):
    monkeypatch.setitem(finetune.STRATEGIES["head"], "epochs", 1)
    first = tune(*flags, "--epochs", 1)
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    assert args["strategy"] == first["strategy"] == "gradual"
    assert tune("--resume")["loss"] == first["loss"]


def test_the_report_counts_every_image(tune, shapes, tmp_path):
    result = tune("--strategy", "full", "--epochs", 1, "--lr", 1e-3)
    model = build_model(load_checkpoint(result["checkpoint"]), "best")
    _, val, _, _, _ = data.open_folder(shapes)
    right, matrix = 0, np.zeros((3, 3), int)
    for i in range(len(val)):
        with open(val.path(i), "rb") as f:
            pixels = data.eval_transform(model.preprocess)(data.decode(f.read()))
        with torch.no_grad():
            said = model(normalize(pixels.permute(2, 0, 1)[None], model.preprocess)).argmax().item()
        matrix[val.labels[i], said] += 1
        right += said == val.labels[i]
    assert result["top1"] == pytest.approx(100 * right / 9, abs=1e-3) and result["mistakes"] == 9 - right
    with open(tmp_path / "run" / "confusion.csv", newline="") as f:
        rows = list(csv.reader(f))
    assert rows[0] == ["true \\ predicted", *SHAPES, "accuracy"]
    for i, row in enumerate(rows[1:]):
        assert row[0] == SHAPES[i] and list(map(int, row[1:4])) == matrix[i].tolist()
        assert float(row[4]) == pytest.approx(100 * matrix[i, i] / 3, abs=1e-3)
        assert result["per_class"][SHAPES[i]] == pytest.approx(100 * matrix[i, i] / 3, abs=1e-3)
    xml.dom.minidom.parse(str(tmp_path / "run" / "confusion.svg"))
    with Image.open(tmp_path / "run" / "mistakes.png") as sheet:
        assert sheet.width == 4 * 228 + 8
    assert json.loads((tmp_path / "run" / "args.json").read_text())["strategy"] == "full"


def test_no_mistakes_leave_no_picture_of_an_earlier_run_s(shapes, tmp_path, monkeypatch):
    val, args, seen = data.open_folder(shapes)[1], parse("--workers", 0, "--out", tmp_path), []
    right = F.one_hot(torch.from_numpy(val.labels).long(), 3).float()
    for logits in (right.flip(1), right):
        monkeypatch.setattr(finetune, "logits_of", lambda *a, logits=logits: logits)
        finetune.report(new_network(3), val, list(SHAPES), args, train.World())
        seen.append(os.path.exists(tmp_path / "mistakes.png"))
    assert seen == [True, False]


def test_the_worst_mistakes_come_first(shapes, tmp_path, monkeypatch):
    val, shown = data.open_folder(shapes)[1], []
    right = F.one_hot(torch.from_numpy(val.labels).long(), 3).float()
    monkeypatch.setattr(finetune, "logits_of", lambda *a: right.flip(1) * torch.arange(1, 10)[:, None])
    monkeypatch.setattr(finetune, "contact_sheet", lambda tiles: shown.extend(text for _, text in tiles) or b"")
    finetune.report(new_network(3), val, list(SHAPES), parse("--workers", 0, "--out", tmp_path), train.World(), most=4)
    assert [text.splitlines()[:2] for text in shown] == [[os.path.basename(val.path(i)), f"is {SHAPES[val.labels[i]]}"]
                                                         for i in (8, 7, 6, 2)]
    assert shown[3].endswith("taken for square, 91 %")  # e^3 / (e^3 + 2)


def test_the_report_of_a_class_whose_name_is_no_text(shapes, tmp_path):
    """A folder as it comes out of an old archive, with bytes that are no UTF-8"""
    root = shutil.copytree(shapes, tmp_path / "set")
    for split in ("train", "val"):
        os.rename(root / split / "ring", os.path.join(os.fsencode(root / split), b"K\xfcche, gr\xfcn"))
    _, val, classes, _, _ = data.open_folder(str(root))
    found = finetune.report(new_network(3), val, classes, parse("--workers", 0, "--out", tmp_path), train.World())
    assert found["per_class"].keys() == set(classes)
    with open(tmp_path / "confusion.csv", newline="", encoding="utf-8") as f:
        assert next(csv.reader(f))[1:4] == ["K\\udcfcche, gr\\udcfcn", "disk", "square"]
    xml.dom.minidom.parse(str(tmp_path / "confusion.svg"))


def test_the_report_of_two_classes_of_one_name(shapes, tmp_path):
    val = data.open_folder(shapes)[1]
    found = finetune.report(new_network(3), val, ["crane", "disk", "crane"], parse("--workers", 0, "--out", tmp_path),
                            train.World())
    shares = found["per_class"]
    counts = np.bincount(val.labels)
    assert list(shares) == ["crane (0)", "disk", "crane (2)"]
    assert sum(a * k for a, k in zip(shares.values(), counts)) / counts.sum() == pytest.approx(found["top1"], abs=1e-3)


def test_confusion_picture_with_odd_and_many_names():
    names = ['a "b" <c> & d', "x" * 60] + [f"class {i}" for i in range(98)]
    for n in (1, 2, 61, 100):
        matrix = np.arange(n * n).reshape(n, n) % 7
        xml.dom.minidom.parseString(finetune.confusion_svg(matrix, names[:n]))
    drawn = finetune.confusion_svg(np.array([[8, 2], [0, 5]]), ["a", "b"])  # shares of what it is
    assert [float(v) for v in re.findall('fill-opacity="(.*?)"', drawn)] == pytest.approx([0.816, 0.264, 1.0])


def test_contact_sheet_places_every_tile():
    tiles = [(Image.new("RGB", size, colour), "one\ntwo\nthree")
             for size, colour in (((300, 100), "red"), ((10, 50), "lime"), ((220, 220), "blue"))]
    import io
    sheet = np.asarray(Image.open(io.BytesIO(finetune.contact_sheet(tiles, columns=2, side=100))))
    for colour, share in (((255, 0, 0), 100 * 33), ((0, 255, 0), 10 * 50), ((0, 0, 255), 100 * 100)):
        assert (sheet == colour).all(2).sum() == share


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_b4"])
def test_torchvision_s_classifiers(name, tune, tmp_path):
    torch.manual_seed(0)
    model = torchvision_model(name, 11)
    path = str(tmp_path / "foreign.pth")
    torch.save({"module." + k: v for k, v in model.state_dict().items()}, path)
    result = tune("--model", name, "--strategy", "layers:1", "--epochs", 1, "--image-size", 32, checkpoint=path)
    after = build_model(load_checkpoint(result["checkpoint"]), "best")
    assert after.config == dict(arch=name, num_classes=3)
    assert torch.equal(after.features[0][0].weight, model.features[0][0].weight)
    assert not torch.equal(after.features[-1][0].weight, model.features[-1][0].weight)
    again = tune("--strategy", "head", "--epochs", 1, "--views", 1, checkpoint=result["checkpoint"], out="again")
    assert again["checkpoint"] and load_checkpoint(again["checkpoint"])["config"]["arch"] == name


def test_a_network_without_batch_norm_is_saved_and_resumed(tune, tmp_path, monkeypatch):
    path = str(tmp_path / "squeeze.pth")
    torch.save(torchvision_model("squeezenet1_1", 4).state_dict(), path)
    flags = ["--model", "squeezenet1_1", "--strategy", "layers:1", "--epochs", 2, "--image-size", 64]
    tune(*flags, checkpoint=path, out="straight")
    interrupted(monkeypatch, lambda: tune(*flags, "--resume", checkpoint=path, out="stopped"), 2)
    assert not equal_state(tmp_path / "straight" / "last.pt", tmp_path / "stopped" / "last.pt")


def test_parameters_beside_the_parts_belong_to_the_lowest_stage(shapes, tmp_path):
    path = str(tmp_path / "vit.pth")
    torch.save(torchvision_model("vit_b_16", 4).state_dict(), path)
    flags = ("--model", "vit_b_16", "--image-size", 224, "--strategy", "gradual")
    plan, model, _ = plan_of(path, shapes, *flags)
    for epoch, trained in ((0, False), (4, False), (5, True)):
        plan.begin(model, epoch)
        assert model.class_token.requires_grad == model.conv_proj.weight.requires_grad == trained
        assert model.heads.head.weight.requires_grad
    for more, wrong in ((("--image-size", 64), "--image-size 64"), (("--val-size", 256), "--val-size 256"),
                        (("--progressive", 160, 0.1, 0.5), "--progressive 160")):
        with pytest.raises(UserError, match=wrong) as caught:
            plan_of(path, shapes, *flags, *more)
        assert caught.value.code == 2


def test_a_convolution_as_head_is_trained_with_the_stage_below():
    model = torchvision_model("squeezenet1_1", 4)
    args = parse()
    assert "gradual" in finetune.resolve(args, model, 15)
    with pytest.raises(UserError, match="head is a convolution"):
        finetune.resolve(parse("--strategy", "head"), model, 15)


def falling(monkeypatch, loss_at):
    """Steps of training that do nothing, with the loss loss_at(number of the step, rate)"""
    count = itertools.count()

    def step(net, model, batches, optimizer, *_, **__):
        assert np.ptp([g["lr"] / g["lr_share"] for g in optimizer.param_groups]) < 1e-9  # each part learns at its own
        loss = torch.tensor(loss_at(next(count), optimizer.param_groups[0]["lr"]))
        return loss, torch.zeros(()), bool(loss.isfinite())
    monkeypatch.setattr(train, "train_step", step)


def test_range_test_sees_the_fall_through_the_noise(source, shapes, tmp_path, monkeypatch):
    rng, drawn = np.random.default_rng(3), []  # noise whose steepest step is none of the fall's
    falling(monkeypatch, lambda i, rate: 2 - 1.5 / (1 + (1e-4 / rate) ** 2) + max(0, rate / 3e-3 - 1)
            + float(rng.normal(0, 0.2)))
    monkeypatch.setattr(finetune, "rates_svg", lambda rates, losses, chosen: drawn.append((rates, losses)) or "")
    plan, _, args = plan_of(source, shapes, "--strategy", "layers:1", "--head-lr-mult", 1, "--out", tmp_path)
    assert 2e-5 < finetune.find_lr(plan, args, train.World()) < 1e-3  # the smoothed loss is some steps late
    (rates, losses), = drawn
    assert len(rates) == len(losses) > 50


def test_range_test_has_the_run_s_loss_and_batch(source, shapes, tmp_path, monkeypatch):
    losses, rates = [], []
    monkeypatch.setattr(finetune.FineTuning, "teach", lambda self, loss_fn: losses.append(loss_fn))
    for base in (0, 256):
        falling(monkeypatch, lambda i, rate: 2 - 1.5 / (1 + (1e-4 / rate) ** 2))
        plan, _, args = plan_of(source, shapes, "--strategy", "layers:1", "--out", tmp_path, "--label-smoothing", 0,
                                "--class-weights", "balanced", "--lr-base-size", base)
        plan.sets[0] = plan.sets[0].select(np.arange(7))  # five disks and two rings
        rates.append(finetune.find_lr(plan, args, train.World()))
    assert rates[1] == pytest.approx(rates[0] * 256 / 4)  # which then is scaled by 4 / 256
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    wanted = F.cross_entropy(logits, labels, torch.tensor([8 / 15, 8 / 6, 8 / 3]))
    assert losses[0](logits, labels).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_range_test_takes_no_rate_at_which_training_diverges(source, shapes, tmp_path, monkeypatch):
    plan, _, args = plan_of(source, shapes, "--strategy", "layers:1", "--head-lr-mult", 1, "--out", tmp_path)
    falling(monkeypatch, lambda i, rate: float("nan") if i == 60 else 2 - 1.5 / (1 + (1e-5 / rate) ** 2))
    assert 5e-6 < finetune.find_lr(plan, args, train.World()) < 1e-4
    falling(monkeypatch, lambda i, rate: float("nan"))
    with pytest.raises(UserError, match="diverged at once") as caught:
        finetune.find_lr(plan, args, train.World())
    assert caught.value.code == 4


def test_range_test_goes_by_the_first_process_s_losses(source, shapes, tmp_path, monkeypatch):
    """On GPUs the others' differ in their last bits: they must end at the same step, with the same rate"""
    plan, _, args = plan_of(source, shapes, "--strategy", "layers:1", "--head-lr-mult", 1, "--out", tmp_path)
    curve = lambda i, rate: 2 - 1.5 / (1 + (1e-5 / rate) ** 2) + 10 * (i > 60)  # noqa: E731
    found, rates = [], [1e-6 * 1e5 ** (i / 79) for i in range(80)]
    for rank, mine in enumerate((curve, lambda i, rate: 1.0)):
        falling(monkeypatch, mine)
        world, steps = train.World(), itertools.count()
        monkeypatch.setattr(world, "gather", lambda value, steps=steps: [
            (float(torch.tensor(curve(i := next(steps), rates[i]))), True), value])
        found.append((finetune.find_lr(plan, args, world), next(steps)))
    assert found[0] == found[1] and found[0][1] < 80 and 5e-6 < found[0][0] < 1e-4


def test_a_rate_that_was_found_stays_in_both_steps_where_they_are_resumed(tune, tiny, shapes, tmp_path, monkeypatch):
    rates = iter([3e-3, 2e-3, 3e-3, 2e-3])
    monkeypatch.setattr(finetune, "find_lr", lambda *a: next(rates))
    flags = ["--then", shapes, "--strategy", "layers:1", "--epochs", 2, "--lr-find"]
    result, total = interrupted(monkeypatch, lambda: tune(*flags, root=tiny, out="straight"))
    resumed, _ = interrupted(monkeypatch, lambda: tune(*flags, "--resume", root=tiny, out="stopped"), 2, total - 2)
    assert resumed["loss"] == result["loss"]
    for part in ("step/last.pt", "last.pt"):
        assert not equal_state(tmp_path / "straight" / part, tmp_path / "stopped" / part)


def test_range_test_finds_a_rate_and_draws_it(tune, tmp_path):
    results = [tune("--strategy", "head", "--views", 1, "--epochs", 1, "--lr-find", out=out) for out in "ab"]
    rates = [json.loads((tmp_path / out / "args.json").read_text())["lr"] for out in "ab"]
    assert rates[0] == rates[1] and 1e-6 < rates[0] < 1e-1 and results[0]["loss"] == results[1]["loss"]
    assert f"{rates[0]:.2g}" in (tmp_path / "a" / "lr.svg").read_text()
    xml.dom.minidom.parse(str(tmp_path / "a" / "lr.svg"))


def test_search_halves():
    runs = []

    def run(args):
        runs.append((args.strategy, args.lr, args.epochs))
        return dict(top1=90.0 if args.strategy == "full" else 10.0, loss=args.lr, seconds=0.0)
    rows, best = finetune.search(parse("--search", 7), run, ["head", "gradual", "full"])
    assert len(rows) == len(runs) == 7 + 3 and [r[2] for r in runs] == [1] * 7 + [2] * 3
    assert len(set(runs[:7])) == 7 and best == dict(strategy="full", lr=pytest.approx(3e-5))
    rows, best = finetune.search(parse("--search", 1, "--lr", 0.5), run, ["lora"])
    assert best == dict(strategy="lora", lr=0.5) and len(rows) == 1


def test_search_then_train(tune, tmp_path):
    result = tune("--search", 3, "--strategy", "head", "--views", 1, "--epochs", 2)
    assert [r["epochs"] for r in result["search"]] == [1, 1, 1] and result["epochs"] == 2
    assert result["search"][0].keys() == {"strategy", "lr", "epochs", "top1", "loss", "seconds"}
    best = min(result["search"], key=lambda r: (-r["top1"], r["loss"]))
    assert load_checkpoint(result["checkpoint"])["args"]["lr"] == best["lr"]
    again = tune("--search", 3, "--strategy", "head", "--views", 1, "--epochs", 2, "--resume")
    assert again["loss"] == result["loss"]
    with pytest.raises(UserError, match="--search 2: --resume found one of 3 settings"):
        tune("--search", 2, "--strategy", "head", "--views", 1, "--epochs", 2, "--resume")
    other = tune("--search", 3, "--strategy", "head", "--views", 1, "--epochs", 2, "--seed", 1, "--overwrite")
    first, read, anew = ([r["loss"] for r in found["search"]] for found in (result, again, other))
    assert first == read and first != anew


def test_a_search_that_overwrites_another_takes_nothing_of_it(tune, tmp_path, monkeypatch):
    flags = ["--search", 2, "--strategy", "head", "--views", 1, "--epochs", 1]
    tune(*flags)
    expected = tune(*flags, "--seed", 7, out="straight")
    how, reports = iter(["--overwrite", "--resume"]), list((tmp_path / "run").glob("confusion.*"))
    gone = []

    def work():
        gone.append(not any(path.exists() for path in reports))
        return tune(*flags, "--seed", 7, next(how))
    resumed, _ = interrupted(monkeypatch, work, 2, out=tmp_path / "run")
    assert len(reports) == 2 and gone == [False, True]
    for found, wanted in zip(resumed["search"], expected["search"], strict=True):
        assert found["loss"] == wanted["loss"]


@pytest.mark.parametrize("flags, complaint", [
    (["--strategy", "layers:9"], "has 5 stages"), (["--data", "nowhere"], "nowhere: no such folder"),
    (["--val-resize", 16], "--val-resize 16: is less than the 32"), (["--search", 16], "there are 15 settings"),
    (["--batch-size", 1, "--strategy", "gradual", "--epochs", 1], "--batch-size: leaves a batch-norm a single value"),
    (["--batch-size", 1, "--search", 2], "--batch-size: leaves a batch-norm a single value"),
    (["--checkpoint", "OUT/best.pt"], "--overwrite would delete .*best.pt, which is read"),
    (["--data", "DAMAGED"], "0001.jpg: not an image"),
    (["--data", "DAMAGED", "--then", "SHAPES"], "0001.jpg: not an image")])
def test_overwriting_loses_nothing_where_the_new_run_cannot_begin(flags, complaint, tune, shapes, tmp_path):
    root = shutil.copytree(shapes, tmp_path / "set")
    (root / "train" / "ring" / "0001.jpg").write_bytes(b"hello")
    out, named = tmp_path / "run", dict(DAMAGED=root, SHAPES=shapes, **{"OUT/best.pt": tmp_path / "run" / "best.pt"})
    tune("--strategy", "layers:1", "--epochs", 1)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with pytest.raises(UserError, match=complaint):
        tune(*(named.get(f, f) for f in flags), "--overwrite")
    assert {"best.pt", "last.pt", "args.json"} <= before.keys()
    assert before == {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


@pytest.mark.parametrize("flags", [["--align", "mmd", "--target-domain", "SHAPES"], ["--tta"],
                                   ["--model", "squeezenet1_1", "--image-size", 64]])
def test_a_search_leaves_out_heads_that_cannot_do_what_is_asked(flags, tune, shapes, source, tmp_path, monkeypatch):
    path = str(tmp_path / "squeeze.pth")
    torch.save(torchvision_model("squeezenet1_1", 4).state_dict(), path)
    monkeypatch.setitem(finetune.STRATEGIES["head"], "epochs", 2)
    real, runs = train.train, []

    def spy(args, *a):
        runs.append((os.path.relpath(args.out, tmp_path / "run"), args.epochs))
        return dict(real(args, *a), seconds=100.0)
    monkeypatch.setattr(train, "train", spy)
    result = tune("--search", 2, "--epochs", 1, *[shapes if f == "SHAPES" else f for f in flags],
                  checkpoint=path if "--model" in flags else source)
    assert [r["strategy"] for r in result["search"]] == ["gradual", "full"]
    again = parse("--config", tmp_path / "run" / "args.json")  # asks for the same once more
    assert (again.search, again.strategy, again.lr) == (2, "auto", 1e-4)
    head = "--model" not in flags  # which is a convolution, and not trained alone
    assert [r["seconds"] for r in result["search"]] == [100.0 * (1 + head), 100.0]
    assert runs[:1 + head] == [("search/gradual-0.0001-1/head", 1), ("search/gradual-0.0001-1", 1)][1 - head:]
    assert ("head", 2) in runs if head and result["strategy"] == "gradual" else ("head", 2) not in runs


def test_two_steps_named_by_flags_that_only_the_first_takes_resume(tune, tiny, shapes, source, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "fetch_weights", lambda *a: load_checkpoint(source))
    monkeypatch.setattr("resnet50.fetch_weights", lambda *a: load_checkpoint(source))
    flags = ["--weights", "IMAGENET1K_V2", "--then", shapes, "--strategy", "layers:1", "--epochs", 1]
    first = tune(*flags, root=tiny, checkpoint=None)
    again = tune(*flags, "--resume", root=tiny, checkpoint=None)
    assert again["loss"] == first["loss"] and again["step"] == first["step"]


def test_two_steps(tune, tiny, shapes, tmp_path):
    result = tune("--then", shapes, "--strategy", "layers:1", "--epochs", 1, root=tiny)
    step = load_checkpoint(str(tmp_path / "run" / "step" / "best.pt"))
    best = load_checkpoint(result["checkpoint"])
    assert len(step["classes"]) == 10 and best["classes"] == list(SHAPES) and result["step"] == step["metrics"]["top1"]
    assert torch.equal(step["model"]["layer3.0.conv1.weight"], best["model"]["layer3.0.conv1.weight"])
    again = tune("--then", shapes, "--strategy", "layers:1", "--epochs", 1, "--resume", root=tiny)
    assert again["loss"] == result["loss"]


def test_a_step_to_other_classes_leaves_more_than_the_head_that_goes(tune, shapes, source, tmp_path, monkeypatch):
    real, begun = finetune.classify, []

    def classify(args, *a, **k):
        begun.append(args)
        return real(args, *a, **k) if args.strategy == "auto" and args.then else dict(checkpoint=source, top1=0)
    monkeypatch.setattr(finetune, "classify", classify)
    monkeypatch.setitem(finetune.STRATEGIES["head"], "epochs", 1)
    other = shutil.copytree(shapes, tmp_path / "other", ignore=shutil.ignore_patterns("square"))
    # no epoch is better than the head that it begins with
    tune("--then", other, "--epochs", 1, "--views", 1, "--lr", 1e-6, "--head-lr-mult", 1e4)
    before, after = (load_checkpoint(path)["model"]["layer4.0.conv1.weight"] for path in (
        source, str(tmp_path / "run" / "step" / "best.pt")))
    assert begun[0].strategy == "gradual" and not torch.equal(before, after)
    knows = str(tmp_path / "run" / "step" / "best.pt")
    tune("--then", other, "--epochs", 1, "--views", 1, checkpoint=knows, out="views")  # the next head learns from them
    del begun[2:]
    with pytest.raises(UserError, match="--strategy head: .* has other classes") as caught:
        tune("--then", other, "--strategy", "head", out="head")
    assert caught.value.code == 2 and len(begun) == 2
    tune("--then", shapes, "--strategy", "head", out="same")  # whose head stays
    assert [args.then for args in begun[2:]] == [None, None]


@pytest.mark.parametrize("strategy, moves", [("head", ("fc.",)), ("layers:1", ("fc.", "layer4."))])
def test_averaging_leaves_frozen_statistics_alone(strategy, moves, source, tune, shapes):
    result = tune("--strategy", strategy, "--epochs", 2, "--lr", 1e-3, "--swa-start", 0, "--best-by", "loss")
    before, after = load_checkpoint(source)["model"], load_checkpoint(result["checkpoint"])["model"]
    averaged = load_checkpoint(result["checkpoint"].replace("best.pt", "last.pt"))["ema"]
    for name in (n for n in before if not n.startswith(moves)):
        assert torch.equal(before[name], after[name]) and torch.equal(before[name], averaged[name]), name
    again = finetune.main(parse("--eval-only", "--checkpoint", result["checkpoint"], "--data", shapes, "--workers", 0))
    assert again["loss"] == pytest.approx(result["loss"], rel=1e-4)  # best.pt is the network that was scored


def test_a_head_that_knows_the_classes_is_kept_and_said(tune, capsys):
    first = tune("--strategy", "full", "--epochs", 1, "--lr", 1e-3)
    second = tune("--strategy", "head", "--epochs", 1, "--lr", 1e-12, "--views", 1, checkpoint=first["checkpoint"],
                  out="second")
    assert second["per_class"] == first["per_class"]
    said = capsys.readouterr().err
    assert all(text in said for text in ("its head is kept: it knows these 3 classes", "disk: 5 and 3", "a new head"))
    with pytest.raises(UserError, match="--views 1: no head is trained on features here, it is kept"):
        tune("--strategy", "gradual", "--views", 1, checkpoint=first["checkpoint"], out="third")


@pytest.mark.parametrize("names, wnids, kept", [
    (("plate", "loop", "box"), list(SHAPES), True), (("plate", "loop", "box"), list(SHAPES[::-1]), False),
    (SHAPES[::-1], None, False)])
def test_folders_named_by_the_wnids_of_a_network_are_its_classes(names, wnids, kept, tune, tmp_path):
    network = new_network(3, widths=WIDTHS)
    save_checkpoint(tmp_path / "known.pt", network, classes=names, wnids=wnids)
    result = tune("--strategy", "head", "--epochs", 1, "--lr", 1e-12, "--views", 1, checkpoint=tmp_path / "known.pt")
    after = load_checkpoint(result["checkpoint"])
    assert torch.allclose(after["model"]["fc.weight"], network.fc.weight, atol=1e-6) == kept
    assert (after["classes"], after["wnids"]) == ((list(names), wnids) if kept else (list(SHAPES), None))
    assert set(result["per_class"]) == set(names if kept else SHAPES)


def test_target_domain_is_scored(tune, shapes, tmp_path):
    target = tmp_path / "target"
    for dirpath, _, names in os.walk(shapes):
        for name in names:
            folder = target / os.path.relpath(dirpath, shapes)
            folder.mkdir(parents=True, exist_ok=True)
            with Image.open(os.path.join(dirpath, name)) as image:
                image.point(lambda v: 255 - v).save(folder / name, quality=95)
    result = tune("--strategy", "head", "--epochs", 2, "--views", 1, "--lr", 0.1, "--target-domain", target)
    model = build_model(load_checkpoint(result["checkpoint"]), "best")
    _, val, _, _, _ = data.open_folder(str(target))
    logits = finetune.logits_of(model, val, parse("--workers", 0), train.World())
    right = (logits.argmax(1).numpy() == val.labels).mean() * 100
    assert result["target_top1"] == pytest.approx(right, abs=1e-3)
    _, val, _, _, _ = data.open_folder(shapes)  # as it is: the epochs saw it recoloured
    logits, labels = finetune.logits_of(model, val, parse("--workers", 0), train.World()), torch.tensor(val.labels)
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, labels.long()).item(), rel=1e-4)
    assert result["top5"] == 100 and result["top1"] == pytest.approx(
        100 * (logits.argmax(1) == labels).float().mean().item(), abs=1e-3)
    plain = tmp_path / "plain"
    plain.mkdir()
    shutil.copy(os.path.join(shapes, "val", "disk", "0000.jpg"), plain / "x.jpg")
    result = tune("--strategy", "layers:1", "--epochs", 1, "--target-domain", plain, out="unlabelled")
    assert result["target_top1"] is None


@pytest.mark.parametrize("match, flags", [(finetune.coral, ["--align-weight", 3]), (finetune.mmd, ["--align", "mmd"])])
def test_a_step_draws_target_images_anew_in_crops_of_their_own(match, flags, source, shapes, tmp_path):
    for name, shape in (("a.jpg", "disk"), ("b.jpg", "square")):
        shutil.copy(os.path.join(shapes, "val", shape, "0000.jpg"), tmp_path / name)
    plan, model, _ = plan_of(source, shapes, "--strategy", "layers:1", "--target-domain", tmp_path, *flags)
    loss, passed, read = plan.teach(train.make_loss("ce")), [], []
    model.register_forward_pre_hook(lambda _, inputs: passed.append(inputs[0].clone()))
    model.fc.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))

    def target_of(seed):
        torch.manual_seed(seed)
        logits, labels = model(images), torch.zeros(8, dtype=torch.int64)
        total = loss(logits, labels)
        wanted = F.cross_entropy(logits, labels) + (3 if match is finetune.coral else 1) * match(*read[-2:])
        assert torch.allclose(total, wanted, rtol=1e-4) and match(*read[-2:]) > 0
        return passed.pop()
    images = torch.randn(8, 3, 32, 32)
    first, again, other = (target_of(seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len({row.numpy().tobytes() for row in first}) > 2  # than there are images


def test_notes_advise_what_can_be_followed(tune, shapes, tmp_path, capsys):
    tune("--strategy", "head", "--epochs", 1, "--views", 1)
    assert "note:" not in capsys.readouterr().err  # this network has its stem already
    train.main(train.get_args_parser().parse_args(["--data", shapes, "--image-size", "32", "--epochs", "1", "--workers",
                                                   "0", "--batch-size", "8", "--out", str(tmp_path / "new"),
                                                   "--lr-warmup-epochs", "2"]))
    notes = capsys.readouterr().err
    assert all(text in notes for text in ("--stem small is much more accurate", "the rate never falls in 1 epochs",
                                          "the rate only grows, as --lr-warmup-epochs is 2 of 1"))


def test_two_processes_train_the_same_stages(run, tune, source, shapes, tmp_path):
    flags = ("--data", shapes, "--checkpoint", source, "--batch-size", 2, "--workers", 0, "--amp-dtype", "float32")
    sums = f"""
import train
real = train.save_training
def save_training(path, model, *a, **k):
    with open({str(tmp_path)!r} + "/" + os.environ["RANK"], "w") as f:
        print([p.double().sum().item() for p in model.parameters()], file=f)
    real(path, model, *a, **k)
train.save_training = save_training
"""
    done = run(*flags, "--out", tmp_path / "two", "--strategy", "gradual", "--epochs", 3, "--target-domain", shapes,
               before=sums, script="finetune.py", processes=2)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr[-2000:]
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text()
    before, after = (load_checkpoint(p)["model"] for p in (source, str(tmp_path / "two" / "last.pt")))
    moved = {n.split(".")[0] for n in before if n != "fc.weight" and before[n].shape == after[n].shape
             and not torch.equal(before[n], after[n])}
    assert moved == {"layer4", "layer3", "layer2"}  # after the head alone
    head = ("--strategy", "head", "--epochs", 2, "--views", 2)
    done = run(*flags, "--out", tmp_path / "head", *head, script="finetune.py", processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_checkpoint(r["checkpoint"])["model"]["fc.weight"]
                for r in (tune(*head), json.loads(done.stdout.splitlines()[-1])))
    assert torch.allclose(one, two, atol=1e-4) and one.std() > 0.005


def test_two_processes_find_the_same_setting(run, source, shapes, tmp_path):
    """Of which the better one's last epoch is not its best"""
    scores = f"""
top1, real = iter([40, 30, 20, 10, 50, 10, 20, 30, 60]), script.search
train.evaluate = lambda *a, **k: dict(top1=float(next(top1)), top5=100.0, loss=1.0, images=9, corrupt=0)
def search(*a):
    rows, best = real(*a)
    open({str(tmp_path)!r} + "/" + os.environ["RANK"], "w").write(str(best))
    return rows, best
script.search = search
"""
    done = run("--data", shapes, "--checkpoint", source, "--batch-size", 2, "--workers", 0, "--out", tmp_path / "run",
               "--search", 4, "--strategy", "layers:1", "--epochs", 1, before="import train\n" + scores,
               script="finetune.py", processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text() == "{'strategy': 'layers:1', 'lr': 0.0001}"


@pytest.mark.parametrize("flags, complaint, code", [
    (["--strategy", "best"], "none of auto", 2), (["--strategy", "layers"], "none of auto", 2),
    (["--strategy", "layers:9"], "has 5 stages", 2), (["--layer-decay", "1.5"], "must lie in (0, 1]", 2),
    (["--fused-bn", "--strategy", "head"], "--fused-bn goes with", 2), (["--fused-bn"], "--fused-bn goes with", 2),
    (["--lora-rank", 4], "--lora-rank goes with --strategy lora", 2), (["--max-size", 9], "goes with --task detect", 2),
    (["--align", "mmd"], "--align goes with", 2), (["--lr-find", "--batch-size", "auto"], "needs a number", 2),
    (["--views", 2, "--strategy", "full"], "--views goes with", 2), (["--tta", "--strategy", "head"], "--tta", 2),
    (["--then", "nowhere"], "nowhere: no such folder", 3),
    (["--cutmix-alpha", 1, "--strategy", "head"], "sees features", 2),
    (["--ohem", 0.5, "--mixup-alpha", 1], "--ohem", 2), (["--num-classes", 7], "the data has 3 classes", 2),
    (["--model", "resnet99"], "resnet99", 3), (["--model", "mobilenet_v2", "--attention", "se"], "ResNet-50's", 2),
    (["--model", "mobilenet_v2"], "holds ResNet-50, not mobilenet_v2", 3),
    (["--search", 2, "--lr-find"], "--search decides", 2), (["--target-domain", "nowhere"], "nowhere", 3),
    (["--target-domain", "nowhere", "--align", "none"], "nowhere: no such folder", 3),
    (["--target-domain", ".", "--align", "none", "--align-weight", 2], "--align-weight goes with --align coral", 2),
    (["--checkpoint", "nowhere.pt"], "nowhere.pt: No such file", 3), (["--swa-start", 1], "--swa-start: 1 must lie", 2),
    (["--l2-sp", 1, "--strategy", "lora"], "--l2-sp goes with", 2),
    (["--l2-sp", 1, "--strategy", "head"], "--l2-sp: --strategy head sees", 2),
    (["--search", 16], "there are 15 settings", 2),
    (["--layer-decay", 0.5, "--strategy", "adapter"], "--layer-decay goes with", 2),
    (["--grad-checkpointing", "--strategy", "head"], "--grad-checkpointing: --strategy head sees", 2),
    (["--drop-path", 0.1, "--strategy", "head"], "--drop-path: --strategy head sees", 2),
    (["--progressive", 32, 0, 1, "--strategy", "head"], "--progressive: --strategy head sees", 2),
    (["--eval-only", "--model", "mobilenet_v2"], "--eval-only scores what --checkpoint holds", 2),
    (["--batch-size", 1, "--target-domain", ".", "--strategy", "layers:1"], "one image has no covariance", 2),
    (["--eval-only", "--ohem", 0.5], "--ohem goes with training", 2),
    (["--eval-only", "--target-domain", "."], "--target-domain goes with training", 2),
    (["--lr-milestones", 3], "--lr-milestones goes with --lr-scheduler multistep", 2),
    (["--model", "mobilenet_v2", "--weights", "DEFAULT"], "--checkpoint and --weights exclude each other", 2),
    (["--align", "mmd", "--target-domain", ".", "--strategy", "head"], "--align mmd: --strategy head sees", 2)])
def test_what_cannot_be_honoured_is_refused(flags, complaint, code, tune, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "train", lambda *a: pytest.fail("it was to be refused before"))
    with pytest.raises((UserError, SystemExit)) as caught:
        tune(*flags)
    assert caught.value.code == code
    assert complaint in (str(caught.value) if isinstance(caught.value, UserError) else capsys.readouterr().err)
    assert os.listdir(tmp_path) == []


def test_names_that_the_second_step_does_not_know_are_refused_before_the_first(tune, tiny, shapes, tmp_path,
                                                                               monkeypatch):
    monkeypatch.setattr(train, "train", lambda *a: pytest.fail("it was to be refused before"))
    (tmp_path / "names.json").write_text(json.dumps(list(SHAPES)))
    for wrong, complaint in ((["--classes", tmp_path / "names.json"], "class folders"),
                             (["--num-classes", 3], "--num-classes 3: .* has 10 classes"),
                             *[(["--strategy", "full", "--batch-size", 1], "a single value per channel")] * 2):
        with pytest.raises(UserError, match=complaint):
            tune("--then", tiny, *wrong)


def test_list_models():
    names = finetune.main(parse("--list-models"))["models"]
    assert {"efficientnet_b4", "mobilenet_v2", "resnet50"} <= set(names) and "fasterrcnn_resnet50_fpn" not in names
