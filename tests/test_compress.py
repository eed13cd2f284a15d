"""compress.py: pruning against networks whose channels are switched off, costs against counts, fake quantization
against the int8 program, losses against formulas written anew, and the commands on a small network and few images."""
import copy
import json
import os
import shutil
import signal
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import compress
import data
import resnet50
import train
from resnet50 import ResNet50, UserError
from tests.test_int8 import WIDTHS, build, photographs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=("plain", "v1", "se", "split"))
def model(request):
    return build(request.param)


def switched_off(model, keep):
    """The network with the scale and shift of every channel that is not kept at zero, computed as before"""
    result = copy.deepcopy(model)
    state = result.state_dict()
    for name, space in compress.spaces(model).items():
        gone = torch.ones(space.size, dtype=torch.bool)
        gone[keep.get(name, slice(None))] = False
        for key, dim, repeat in space.members:
            if dim == 0 and key.endswith(("weight", "bias")) and state[key].ndim == 1:
                state[key][gone.repeat(repeat)] = 0
    return result


# ---------------------------------------------------------------------------------------------------- pruning

@pytest.mark.parametrize("kind", compress.IMPORTANCE)
def test_pruned_network_computes_what_the_switched_off_one_does(model, kind):
    pixels, labels = photographs(2, 32, 32), torch.tensor([3, -100])
    importance = compress.rank(model, kind, pixels, labels)
    assert all(s.dtype == torch.float64 and len(s) == compress.spaces(model)[n].size for n, s in importance.items())
    x = resnet50.normalize(pixels, model.preprocess)
    sizes = []
    for tenth in range(10 if min(map(len, importance.values())) > 4 else 9):
        keep = compress.uniform(model, importance, tenth / 10, 1)
        for name, index in keep.items():
            gone = sorted(set(range(len(importance[name]))) - set(index.tolist()))
            assert len(gone) == len(importance[name]) - round(len(importance[name]) * (1 - tenth / 10))
            assert not gone or importance[name][gone].max() <= importance[name][index].min()
        small = compress.prune(model, keep)
        with torch.no_grad():
            got, expected = small(x), switched_off(model, keep)(x)
        assert torch.isfinite(got).all() and (got - expected).abs().max() < 1e-5 * expected.abs().max()
        sizes.append(sum(p.numel() for p in small.parameters()))
    assert sizes[0] == sum(p.numel() for p in model.parameters())
    assert all(b < a for a, b in zip(sizes, sizes[1:]))


def test_attention_keeps_the_strongest_of_its_own_channels():
    """Where a stage gets narrower, so that these do: those with the largest sums of absolute weights of what stays"""
    model = build("se", widths={**WIDTHS, "layer4": 256})
    small = compress.prune(model, {"layer4": torch.arange(0, 256, 2)})
    for whole, pruned in zip(model.layer4, small.layer4):
        strongest = whole.se.fc1.weight[:, ::2].abs().sum((1, 2, 3)).topk(8).indices.sort().values
        assert len(whole.se.fc1.weight) == 16 and torch.equal(pruned.se.fc1.weight, whole.se.fc1.weight[strongest, ::2])
        assert torch.equal(pruned.se.fc2.weight, whole.se.fc2.weight[::2, strongest])


def test_every_tensor_belongs_to_the_spaces_that_its_shape_says(model):
    """Along each dimension but the pixels' and classes', a tensor of weights lies in exactly one space"""
    dims = {(key, dim) for space in compress.spaces(model).values() for key, dim, _ in space.members}
    first = "conv1.0" if model.config["stem"] == "deep" else "conv1"
    for key, value in model.state_dict().items():
        for dim in range(min(2, value.ndim)):
            outside = (key, dim) in ((first + ".weight", 1), ("fc.weight", 0), ("fc.bias", 0))
            assert ((key, dim) in dims) != outside, (key, dim)


def test_importance_by_weights_and_gamma():
    model = build("plain")
    by = {kind: compress.rank(model, kind, None, None) for kind in ("l1", "l2", "bn")}
    w = {f"layer2.{i}.conv3": getattr(model.layer2, str(i)).conv3.weight for i in range(4)}
    w["down"] = model.layer2[0].downsample[0].weight
    for kind, p in (("l1", 1), ("l2", 2)):
        expected = [sum(v[c].abs().double().pow(p).sum().item() ** (1 / p) for v in w.values()) for c in range(40)]
        expected = torch.tensor(expected, dtype=torch.float64)
        assert torch.allclose(by[kind]["layer2"], expected / expected.mean(), rtol=1e-5)
    norms = [model.layer2[0].downsample[1]] + [block.bn3 for block in model.layer2]
    assert torch.allclose(by["bn"]["layer2"].float(), sum(n.weight.abs() for n in norms))
    assert torch.equal(by["bn"]["conv1"].float(), model.bn1.weight.abs())


def test_taylor_importance_is_the_gradient_of_a_gate():
    """A gate of 1 behind every batch-norm; its gradient is the first-order change of the loss without the channel"""
    model, pixels, labels = build("plain"), photographs(5, 64, 64), torch.tensor([1, 2, 3, 4, 0])
    got = compress.rank(model, "taylor", pixels, labels)
    probe, gates = copy.deepcopy(model), {}
    for name in ("layer3.2.bn2", "bn1"):
        gate = gates[name] = torch.ones(1, probe.get_submodule(name).num_features, 1, 1, requires_grad=True)
        probe.get_submodule(name).register_forward_hook(lambda m, i, y, gate=gate: y * gate)
    F.cross_entropy(probe(resnet50.normalize(pixels, model.preprocess)), labels).backward()
    for space, name in (("layer3.2.conv2", "layer3.2.bn2"), ("conv1", "bn1")):
        expected = gates[name].grad.flatten().double() ** 2
        assert torch.allclose(got[space], expected, rtol=1e-3, atol=1e-12)


def test_activation_importance():
    model, pixels = build("plain"), photographs(4, 64, 64)
    seen = {}
    model.layer1[1].bn1.register_forward_hook(lambda m, i, y: seen.update(y=y))
    with torch.no_grad():
        resnet50.predict(model, pixels)
    expected = seen["y"].clamp(min=0).mean((0, 2, 3)).double()
    got = compress.rank(model, "activation", pixels, None)["layer1.1.conv1"]
    assert torch.allclose(got, expected / expected.mean(), rtol=1e-4)


@pytest.mark.parametrize("kind", ("macs", "params"))
def test_costs_are_exact(model, kind):
    """Predicted cost of any widths == the count of the network built with them"""
    costs, ends, found = compress.cost_of(kind, model, 64), compress.ends(model), compress.spaces(model)
    importance = compress.rank(model, "random", None, None)
    for ratio in (0.0, 0.35):
        keep = compress.uniform(model, importance, ratio, 1)
        small = compress.prune(model, keep)
        left = {name: s.size / found[name].size for name, s in compress.spaces(small).items()}
        total = sum(a + b * left.get(ends[n][0], 1) * left.get(ends[n][1], 1) + c * left.get(ends[n][0], 1)
                    + d * left.get(ends[n][1], 1) for n, (a, b, c, d) in costs.items())
        counted = (sum(resnet50.count_macs(small, 64).values()) if kind == "macs"
                   else sum(p.numel() for p in small.parameters()))
        assert abs(total - counted) < 1e-6 * counted


def test_greedy_takes_the_cheapest_first_and_stops_at_the_budget():
    model = build("plain")
    importance = compress.rank(model, "l2", None, None)
    cost, ends = compress.cost_of("macs", model, 64), compress.ends(model)
    total = sum(map(sum, cost.values()))
    for share in (0.9, 0.5, 0.2):
        keep = compress.greedy(model, importance, cost, ends, share * total, 4)
        left = sum(resnet50.count_macs(compress.prune(model, keep), 64).values())
        assert 0.8 * share * total < left <= share * total
        assert all(len(k) % 4 == 0 or len(k) == len(importance[n]) for n, k in keep.items())
        for name, index in keep.items():  # the most important ones stay
            assert set(index.tolist()) == set(importance[name].topk(len(index)).indices.tolist())
    poor = {**importance, "layer3.1.conv2": importance["layer3.1.conv2"] * 1e-6}
    keep = compress.greedy(model, poor, cost, ends, 0.99 * total, 4)
    assert len(keep["layer3.1.conv2"]) < len(importance["layer3.1.conv2"])
    with pytest.raises(UserError, match="cannot be reached"):
        compress.greedy(model, importance, cost, ends, 1e-4 * total, 4)


@pytest.mark.parametrize("attention", ("se", "split"))
def test_greedy_counts_what_attention_loses_with_its_block(attention):
    model = ResNet50(num_classes=10, attention=attention)
    cost = compress.cost_of("params", model, 64)
    budget = 0.3 * sum(map(sum, cost.values()))
    keep = compress.greedy(model, compress.rank(model, "bn", None, None), cost, compress.ends(model), budget, 32)
    assert 0.98 * budget < sum(p.numel() for p in compress.prune(model, keep).parameters()) <= budget


def test_fit_finds_the_coefficients_and_none_below_zero():
    g = torch.Generator().manual_seed(0)
    i, o = torch.rand(2, 12, generator=g, dtype=torch.float64)
    rows = torch.stack([torch.ones_like(i), i * o, i, o], 1)
    for truth in ([0.2, 3.0, 0.5, 0.1], [0.0, 2.0, 0.0, 0.3]):
        found = compress.fit(rows, rows @ torch.tensor(truth, dtype=torch.float64))
        assert np.allclose(found, truth, atol=1e-9)
    found = compress.fit(rows, rows @ torch.tensor([1.0, 2.0, -0.5, 0.0], dtype=torch.float64))
    assert min(found) >= 0


@pytest.mark.parametrize("int8", (False, True))
def test_latency_table_names_every_layer(int8):
    model = build("plain")
    table = compress.latency_table(model, 32, int8, probes=5)
    expected = {s.name for s in compress.fold_downsample(compress.flatten(model))} if int8 else \
        {s.name for s in compress.flatten(model)}
    assert set(table) == {n for n in expected if f"{n}.weight" in compress.ends(model)}
    assert all(min(c) >= 0 and sum(c) > 0 for c in table.values())


def test_latency_table_is_exact_where_times_are(monkeypatch):
    """Of a machine that takes a millisecond for a multiply-accumulate, also where widths are no multiples of 8"""
    model = build("plain")
    monkeypatch.setattr(compress, "step_times", lambda model, *_: resnet50.count_macs(model, 32))
    macs, ends = resnet50.count_macs(model, 32), compress.ends(model)
    table, found = compress.latency_table(model, 32, False, probes=6), compress.spaces(model)
    seen = [n for n in table if all(found[e].size > 8 and not compress.follows(e) for e in ends[f"{n}.weight"] if e)]
    assert len(seen) > 25  # of no more than 8 channels none goes, and nothing is learned
    for name in seen:
        i, o = (0.5 if end else 1.0 for end in ends[f"{name}.weight"])
        a, b, c, d = table[name]
        assert abs(a + b * i * o + c * i + d * o - macs[name] * i * o) < 1e-6 * macs[name], name


def test_recalibration_is_the_mean_over_the_batches():
    model, batches = build("plain"), photographs(6, 48, 48).split(2)
    seen = []
    train.recalibrate(model, batches)
    assert not model.training and model.bn1.momentum == 0.1
    with torch.no_grad():
        for pixels in batches:
            y = model.conv1(resnet50.normalize(pixels, model.preprocess))
            seen.append((y.mean((0, 2, 3)), y.var((0, 2, 3))))
    for got, values in zip((model.bn1.running_mean, model.bn1.running_var), zip(*seen)):
        assert torch.allclose(got, sum(values) / 3, rtol=1e-4, atol=1e-6)


def test_nothing_left_and_values_that_are_not_finite():
    model = build("plain")
    with pytest.raises(UserError, match="leaves nothing of the .* channels of conv1"):
        compress.uniform(model, compress.rank(model, "l2", None, None), 0.99, 1)
    with torch.no_grad():
        model.layer2[0].conv1.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="layer2.0.conv1: .*not finite"):
        compress.rank(model, "l1", None, None)


def test_a_pipeline_s_network_goes_to_its_device_and_stays_there(monkeypatch):
    """Stages on the CPU work on copies: the report times the networks where they were."""
    report = SimpleNamespace(world=SimpleNamespace(device="meta"), sets=None, checkpoint={})
    pipeline = compress.Pipeline(SimpleNamespace(equalise=False, sparsity=None, sparsity_2_4=False), report,
                                 build("plain"))
    assert {p.device.type for p in pipeline.network.parameters()} == {"meta"}
    pipeline.network, pipeline.pixels, moved = build("plain"), [photographs(2, 32, 32), None], []
    monkeypatch.setattr(nn.Module, "cpu", lambda self: moved.append(self) or self)
    resnet50.quantize_classifier(pipeline.network)
    pipeline.equalised()
    assert len(moved) == 2 and not set(moved) & set(pipeline.network.modules())


def test_training_takes_over_the_recipe_and_flags_win():
    saved = dict(recipe="v1", lr=0.8, mixup_alpha=0.3, batch_size="auto", opt="lars", image_size=48, workers=3)
    same = dict(lr_base_size=64, label_smoothing=0.3, loss="focal", class_weights="balanced", hflip=0.0, exif=True)
    saved.update(same, epochs=90, swa_start=0.5)  # what a training was, and what only its length meant
    report = SimpleNamespace(world=SimpleNamespace(device="cpu"), checkpoint=dict(args=saved),
                             sets=SimpleNamespace(root="images"))
    flags = "--seed 7 --workers 0 --amp-dtype float32 --image-size 64 --weight-decay 0.25 --out there".split()
    for more, peak in (["--resume"], 0.4), (["--lr", "0.1"], 0.1):
        args = compress.get_args_parser().parse_args(flags + more)
        run = compress.Pipeline(args, report, build("plain")).training_args("finetune", 2, 0.5)
        assert same.items() <= vars(run).items() and run.swa_start is None
        assert (run.recipe, run.mixup_alpha, run.batch_size, run.opt) == ("v1", 0.3, 32, "lars")
        assert (run.seed, run.workers, run.amp_dtype, run.image_size, run.weight_decay) == (7, 0, "float32", 64, 0.25)
        assert (run.lr, run.epochs, run.lr_warmup_epochs, run.lr_scheduler) == (peak, 2, 0.5, "cosine")
        assert run.resume == ("auto" if args.resume else None) and run.out == os.path.join("there", "0-finetune")


class Reached(Exception):
    pass


def reached(stage, function, flags, root, *inputs):
    """-> the arguments with which a stage of the pipeline calls a function, which is as far as it goes"""
    def stop(*given, **more):
        raise Reached(given, more)
    args = compress.get_args_parser().parse_args([*flags.split(), "--workers", "0", "--device", "cpu"])
    model, saved = build("plain"), dict(recipe="demo", batch_size=16, image_size=64, lr=0.5)
    report = SimpleNamespace(world=train.World("cpu"), sets=SimpleNamespace(root=root), tables={}, poll=None, stop=None,
                             checkpoint=dict(args=saved))
    pipeline = compress.Pipeline(args, report, model, model)
    pipeline.pixels, pipeline.rounds_left = [photographs(2, 32, 32), None], 1
    pipeline.whole = {name: space.size for name, space in compress.spaces(model).items()}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Reached) as caught:
        for name, value in (("gather", {}), ("equalise", "equal"), ("FakeQuantResNet50", model)):
            patch.setattr(compress, name, lambda *a, value=value, **k: value)
        patch.setattr(compress, "ranges_of", lambda found, observer: observer)
        patch.setattr(function, stop)
        getattr(pipeline, stage)(*inputs)
    return caught.value.args


def test_flags_reach_what_they_speak_of(tiny):
    for kind in ("bn", "taylor"):
        given, _ = reached("prune", "compress.rank", f"--prune 0.5 --importance {kind}", tiny)
        assert given[1] == kind and (given[2] is None) == (kind == "bn")
    given, _ = reached("prune", "train.recalibrate", "--prune 0.5", tiny)
    assert len(given[0].bn1.weight) < 16 and [len(part) for part in given[1]] == [2]
    given, more = reached("quantize", "compress.post_training",
                          "--int8 --observer entropy --correction biases --weight-bits 7 --per-tensor", tiny)
    assert (given[0], given[2]) == ("equal", "entropy")
    assert (more["correction"], more["bits"], more["per_tensor"]) == ("biases", 7, True)
    given, more = reached("quantize", "compress.post_training", "--int8 --no-equalise", tiny)
    assert isinstance(given[0], ResNet50) and (more["bits"], more["per_tensor"]) == (8, False)
    for flags, expected in (  # the set has 50 images; an epoch of fewer than a batch is a step as well
            ("--observer minmax --qat-ranges observed --freeze-bn-epochs 2", ("minmax", False, 6)),
            ("--observer mse --freeze-bn-epochs 2 --batch-size 64", ("mse", True, 2))):
        given, _ = reached("qat", "compress.FakeQuantResNet50", "--qat " + flags, tiny)
        assert given == ("equal", *expected)
    given, _ = reached("finetune", "train.train", "--prune 0.5 --rounds 2 --epochs 5", tiny)
    assert (given[0].epochs, given[0].lr) == (3, 0.25)  # a round's
    given, _ = reached("qat", "train.train", "--qat --qat-epochs 7", tiny)
    assert (given[0].epochs, given[0].lr) == (7, pytest.approx(0.05))
    given, _ = reached("teach", "compress.taught", "--distill self --kd-loss dist --kd-temperature 3 --kd-alpha 0.9 "
                       "--kd-features 0.1", tiny, "loss")
    assert given[0] == "loss" and given[3:] == ("dist", 3.0, 0.9, 0.1)


def test_the_report_says_how_many_times_less_and_faster():
    row = dict(stage="original", top1=90.0, top5=None, agreement=100.0, params=8e6, macs=5e9, bytes=32e6,
               latency_ms_bs1=30.0, images_per_second_bs32=10.0)
    after = dict(row, stage="quantize", params=2e6, macs=1e9, bytes=2e6, latency_ms_bs1=10.0, images_per_second_bs32=25)
    table = compress.Report.table(SimpleNamespace(rows=[row, row, after]))
    assert table.endswith("original -> quantize: 4.0x fewer parameters, 5.0x fewer MACs, 16.0x smaller, 3.0x faster at "
                          "batch 1, 2.5x faster at batch 32")


def test_the_report_times_networks_and_compares_outputs(monkeypatch):
    report = SimpleNamespace(rows=[{}], models=[build("plain")], extra={}, world=train.World("cpu"))
    monkeypatch.setattr(compress, "measure", lambda *_: 50.0)
    compress.Report.time(report)
    assert report.rows == [dict(latency_ms_bs1=50.0, images_per_second_bs32=640.0)]
    monkeypatch.setattr(compress, "logits_of", lambda model, pixels: model)
    a, b = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1))
    (p, q), same = (F.softmax(v, 1) for v in (a, b)), [x.argmax() == y.argmax() for x, y in zip(a, b)]
    assert np.allclose(compress.compare(a, b, None), ((p * (p / q).log()).sum() / 6, 100 * np.mean(same)), rtol=1e-5)


def test_the_front_is_what_no_other_network_beats():
    points = [(5, 90), (1, 50), (3, 80), (4, 70), (3, 60), (6, 90)]
    rows = [dict(latency_ms_bs1=ms, top1=top1) for ms, top1 in points]
    assert compress.front(rows, lambda row: row["top1"]) == [rows[1], rows[2], rows[0]]


def test_masks():
    model = build("plain")
    masks = compress.masks_global(model, 0.8)
    weights = torch.cat([model.get_parameter(n).abs().flatten() for n in masks])
    kept = torch.cat([m.flatten() for m in masks.values()])
    assert abs(kept.float().mean() - 0.2) < 1e-3 and weights[kept].min() >= weights[~kept].max()
    for name, mask in compress.masks_2_4(model).items():
        groups = mask.movedim(1, -1).reshape(-1, 4)
        values = model.get_parameter(name).abs().movedim(1, -1).reshape(-1, 4)
        assert (groups.sum(1) == 2).all()
        assert torch.equal((values * groups).sum(1), values.sort(1, descending=True).values[:, :2].sum(1))


# ------------------------------------------------------------------------------- quantization-aware training

@torch.no_grad()
def check_within_one_step(fake, net, pixels):
    """Layer by layer, on the int8 program's own inputs. -> logits of both through the whole network"""
    made, logits = {}, resnet50.predict(fake, pixels)
    net.run(pixels, watch=lambda step, y: made.update({step.name: y}))

    def real(name):
        if name == "pixels":
            return resnet50.normalize(pixels, fake.preprocess)
        return ((made[name].double() - fake.zero_of[name]) * fake.scale_of[name]).float()
    for step in net.steps:
        y = fake.call(step, **{k: real(n) for k, n in (("x", step.x), ("residual", step.residual), ("x2", step.x2))
                               if n})
        if step.kind == "linear":
            assert torch.allclose(y, made["fc"], atol=1e-4)
        else:
            steps = y.double() / fake.scale_of[step.name] + fake.zero_of[step.name] - made[step.name].double()
            assert steps.abs().max() < 1.01 and (steps.abs() > 0.5).double().mean() < 0.05, step.name
    return logits, made["fc"]


def test_fake_quantized_layers_are_the_int8_program_within_one_step(model):
    pixels = photographs(6, 64, 64)
    for grid in ({}, dict(bits=4, per_tensor=True)):
        fake = compress.FakeQuantResNet50(model, resnet50.observe(model, [pixels]), **grid).eval()
        net = resnet50.quantize(fake, ranges=fake.ranges(), **grid)
        a, b = check_within_one_step(fake, net, pixels)
    assert torch.equal(a.argmax(1), b.argmax(1))


def test_fake_quantize_has_lsq_s_gradient():
    x = torch.linspace(-1, 4, 101, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.0101, dtype=torch.float64, requires_grad=True)
    y = compress.fake_quantize(x, scale, 10.0)
    ints = (x.detach() / 0.0101 + 10).round().clamp(0, 255) - 10
    assert torch.allclose(y, ints * 0.0101)
    y.sum().backward()
    inside = (x.detach() / 0.0101 + 10 >= 0) & (x.detach() / 0.0101 + 10 <= 255)
    assert torch.equal(x.grad, inside.double())
    expected = torch.where(inside, ints - x.detach() / 0.0101, ints).sum()
    assert torch.allclose(scale.grad, expected)


def test_a_learned_scale_s_gradient_is_divided_as_lsq_does():
    model = build("plain")
    fake = compress.FakeQuantResNet50(model, resnet50.observe(model, [photographs(2, 64, 64)]))
    step, x = next(s for s in fake.steps if s.kind == "avgpool"), 3 * torch.rand(2, 24, 3, 3)
    fake.scale_of, fake.zero_of, fake.range_of = {step.x: 0.01}, {step.x: 0.0}, fake.ranges()
    fake.call(step, x).sum().backward()
    scale = fake.log_scale.detach()[fake.at[step.name]].exp().requires_grad_()
    compress.fake_quantize(x.mean((2, 3)), scale, 0.0).sum().backward()
    expected = scale.grad * scale / (24 * 9 * 255) ** 0.5  # of the logarithm
    assert torch.allclose(fake.log_scale.grad[fake.at[step.name]], expected, rtol=1e-3) and expected != 0


@pytest.mark.parametrize("variant, norm", [("plain", "layer2.0.bn2"), ("split", "layer2.0.conv2.bn0"),
                                           ("split", "layer2.0.conv2.bn1")])
def test_batch_norm_is_live_for_so_many_steps_and_then_frozen(variant, norm):
    model, pixels = build(variant), photographs(4, 32, 32)
    fake = compress.FakeQuantResNet50(model, resnet50.observe(model, [pixels]), freeze_after=2).train()
    x, means = resnet50.normalize(pixels, model.preprocess), []
    for _ in range(4):
        fake(x).sum().backward()
        means.append(fake.get_submodule(norm).running_mean.clone())
    assert not torch.equal(means[0], means[1]) and torch.equal(means[1], means[2]) and torch.equal(means[2], means[3])
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fake.parameters() if p.requires_grad)


def test_live_batch_norm_computes_what_the_frozen_one_does_with_the_batch_s_statistics():
    model, pixels = build("plain"), photographs(4, 32, 32)
    fake = compress.FakeQuantResNet50(model, resnet50.observe(model, [pixels]), freeze_after=9)
    fixed = compress.FakeQuantResNet50(model, resnet50.observe(model, [pixels]))
    conv, step = "layer1.0.conv1", next(s for s in fake.steps if s.name == "layer1.0.conv1")
    y = torch.rand(8, model.get_submodule(conv).in_channels, 9, 9)
    z = F.conv2d(y, model.get_submodule(conv).weight)
    for net in (fake, fixed):
        net.layer1[0].bn1.running_mean.copy_(z.mean((0, 2, 3)))
        net.layer1[0].bn1.running_var.copy_(z.var((0, 2, 3), unbiased=False))
        net.scale_of, net.zero_of = {step.x: 1 / 255}, {step.x: 0}
    fake.live = True
    live, frozen = (net.train().conv(step, y, None, None, 0.0, 4.0)[0] for net in (fake, fixed))
    assert (live - frozen).abs().max() < 0.05 * frozen.abs().max()


# ------------------------------------------------------------------------------------------------ distillation

def test_a_foreign_teacher_strides_where_it_is_said_to(tmp_path):
    torch.manual_seed(0)
    old = resnet50.ResNet50(num_classes=3, stride_on="1x1").eval()
    for name, value in old.named_parameters():
        if name.endswith("bn3.weight"):  # zero in a new network: its blocks would do nothing
            nn.init.ones_(value)
    torch.save(old.state_dict(), tmp_path / "foreign.pth")
    resnet50.save_checkpoint(str(tmp_path / "ours.pt"), old, classes=["a", "b", "c"])
    x = torch.randn(1, 3, 64, 64)
    for name, stride_on in (("foreign.pth", "1x1"), ("ours.pt", None), ("ours.pt", "3x3")):  # ours says it itself
        teacher = compress.load_teacher(str(tmp_path / name), old, None, "cpu", stride_on)
        torch.testing.assert_close(teacher(x), old(x))


def test_losses_against_formulas():
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 6, 5, generator=g, dtype=torch.float64)
    y, t = torch.tensor([0, 1, 2, 3, 4, 0]), 3.0
    p, q = (F.softmax(v / t, 1).numpy() for v in (a, b))

    def soft(kind):
        return compress.soft_loss(kind, t, a, b, y).item()
    assert np.isclose(soft("kl"), t * t * (q * np.log(q / p)).sum() / 6)
    between = np.mean([np.corrcoef(p[i], q[i])[0, 1] for i in range(6)])
    within = np.mean([np.corrcoef(p[:, j], q[:, j])[0, 1] for j in range(5)])
    assert np.isclose(soft("dist"), t * t * (2 - between - within))
    parts = []
    for i in range(6):
        pt, qt, others = p[i, y[i]], q[i, y[i]], [j for j in range(5) if j != y[i]]
        target = qt * np.log(qt / pt) + (1 - qt) * np.log((1 - qt) / (1 - pt))
        pn, qn = p[i, others] / p[i, others].sum(), q[i, others] / q[i, others].sum()
        parts.append(target + 8 * (qn * np.log(qn / pn)).sum())
    assert np.isclose(soft("dkd"), t * t * np.mean(parts))


def test_teacher_sees_the_student_s_images_in_its_own_normalization():
    student, teacher, pixels = build("plain"), build("se", 1), photographs(3, 64, 64)
    teacher.preprocess = dict(teacher.preprocess, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4])
    taught, hooks = compress.taught(train.make_loss("ce"), teacher, student, "kl", 2.0, 0.3, 2.0)
    images, y = resnet50.normalize(pixels, student.preprocess), torch.tensor([1, 2, 3])
    student.train().requires_grad_(True)
    logits = student(images)
    loss = taught(logits, y, images)
    with torch.no_grad():
        other = teacher(resnet50.normalize(pixels, teacher.preprocess))
        kl = 4 * F.kl_div((logits / 2).log_softmax(1), (other / 2).softmax(1), reduction="batchmean")
        plain = 0.7 * F.cross_entropy(logits, y) + 0.3 * kl
        maps = []
        for net, x in ((student, images), (teacher, resnet50.normalize(pixels, teacher.preprocess))):
            x = net.maxpool(F.relu(net.bn1(net.conv1(x))))
            for i in range(1, 5):
                x = getattr(net, f"layer{i}")(x)
                e = (x ** 2).mean(1).flatten(1)
                maps.append(e / e.norm(dim=1, keepdim=True))
        features = sum(((m - n) ** 2).mean() for m, n in zip(maps[:4], maps[4:]))
    assert torch.allclose(loss, plain + 2 * features, rtol=1e-3)
    loss.backward()
    assert student.conv1.weight.grad.abs().sum() > 0 and all(p.grad is None for p in teacher.parameters())
    student(images[..., :5, :5])
    with pytest.raises(UserError, match="no feature maps of the same size"):
        taught(logits, y, images[..., :5, :5])  # 3, 2 and 1 pixels wide
    for hook in hooks:
        hook.remove()
    assert not any(m._forward_hooks for net in (student, teacher) for m in net.modules())


# ------------------------------------------------------------------------------------------------ the commands

@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny):
    """A small network's checkpoint that knows its data: 10 classes, 32 px"""
    torch.manual_seed(0)
    model = ResNet50(num_classes=10, widths={**WIDTHS, "conv1": 16}).eval()
    model.preprocess = dict(model.preprocess, crop=32, resize=32)
    for block in model.blocks():
        nn.init.constant_(block.bn3.weight, 0.3)
    path = str(tmp_path_factory.mktemp("trained") / "best.pt")
    train.recalibrate(model, photographs(8, 32, 32).split(4))
    resnet50.save_checkpoint(path, model, classes=sorted(data.DEMO_CLASSES),
                             args=dict(data=tiny, recipe="demo", image_size=32, batch_size=16, model_ema_decay=0.0))
    return path


@pytest.fixture
def call(tmp_path, trained):
    """call(flags...) -> what main() returns; --out is a folder of the test's"""
    def main(*flags, checkpoint=trained):
        flags = list(map(str, flags))
        if "--out" not in flags:
            flags += ["--out", str(tmp_path / "out")]
        if checkpoint and "--cascade" not in flags:
            flags += ["--checkpoint", checkpoint]
        return compress.main(compress.get_args_parser().parse_args(flags + ["--workers", "0", "--device", "cpu"]))
    return main


ROW = {"stage", "top1", "top5", "params", "macs", "bytes", "latency_ms_bs1", "images_per_second_bs32", "agreement",
       "checkpoint", "images"}


def logits(path, pixels):
    model = resnet50.build_model(resnet50.load_checkpoint(path), path)
    with torch.no_grad():
        return resnet50.predict(model, pixels)


def test_prune_and_int8(call, tmp_path, trained, tiny, run):
    result = call("--prune", 0.5, "--int8", "--epochs", 1, "--calib-images", 20)
    assert [r["stage"] for r in result["stages"]] == ["original", "prune", "finetune", "quantize"]
    assert all(set(r) == ROW for r in result["stages"]) and result["before"]["agreement"] == 100
    assert result["data"] == tiny and result["after"]["images"] == 29
    before, after = result["before"], result["after"]
    assert after["params"] < 0.45 * before["params"] and after["bytes"] == os.path.getsize(after["checkpoint"])
    assert result["unpruned_int8"]["latency_ms_bs1"] > 0
    assert json.load(open(tmp_path / "out" / "report.json")) == result
    scored = train.main(train.get_args_parser().parse_args(
        ["--eval-only", "--checkpoint", after["checkpoint"], "--data", tiny, "--device", "cpu"]))
    assert scored["top1"] == after["top1"]  # the report's figure is what another script measures
    pixels, paths = photographs(2, 32, 32), [row["checkpoint"] for row in result["stages"][1:]]
    np.save(tmp_path / "pixels.npy", pixels.numpy())  # a fresh process rebuilds the same bits from the files alone
    fresh = run("--help", script="compress.py", before=(
        "import numpy, torch, resnet50\n"
        f"p = torch.from_numpy(numpy.load({str(tmp_path / 'pixels.npy')!r}))\n"
        f"made = [resnet50.build_model(resnet50.load_checkpoint(f), f) for f in {paths!r}]\n"
        "torch.set_num_threads(1)\n"
        f"torch.save([resnet50.predict(m, p).detach() for m in made], {str(tmp_path / 'logits.pt')!r})"))
    assert fresh.returncode == 0, fresh.stderr
    for path, got in zip(paths, torch.load(tmp_path / "logits.pt"), strict=True):
        assert torch.equal(got, logits(path, pixels))
    with pytest.raises(UserError, match="not empty"):
        call("--int8")
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.pt")}
    again = call("--prune", 0.5, "--int8", "--epochs", 1, "--calib-images", 20, "--resume")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.pt")} == written
    assert [r["top1"] for r in again["stages"]] == [r["top1"] for r in result["stages"]]
    assert len(result["signal_to_noise_db"]) > 50 and again["signal_to_noise_db"] == result["signal_to_noise_db"]


def test_a_target_that_is_met_already_changes_nothing(call):
    result = call("--target-macs", 1e12, "--epochs", 0, "--calib-images", 2)
    assert result["after"]["agreement"] == 100 and result["after"]["top1"] == result["before"]["top1"]


@pytest.mark.parametrize("flags", [
    ("--target-macs", 5e5), ("--target-macs", 5e5, "--rounds", 2), ("--target-params", 4e4, "--importance", "taylor"),
    ("--prune", 0.4, "--ranking", "global", "--importance", "bn", "--sensitivity"),
    ("--prune", 0.6, "--rounds", 2, "--importance", "activation", "--sensitivity")])
def test_pruning_flags(call, flags):
    epochs = 2 if "--rounds" in flags else 0
    result = call(*flags, "--epochs", epochs, "--calib-images", 20, "--round-to", 4)
    after, before = result["after"], result["before"]
    if flags[0].startswith("--target"):
        key = flags[0].rpartition("-")[2]
        assert 0.8 * flags[1] < after[key] <= flags[1]
    if "--sensitivity" in flags:
        assert all(kl > 0 and 0 <= same <= 100 for kl, same in result["sensitivity"].values())
    if "global" in flags:
        channels = [sum(s.size for n, s in compress.spaces(resnet50.build_model(
            resnet50.load_checkpoint(r["checkpoint"]), "x")).items() if not compress.follows(n))
            for r in (before, after)]
        assert 0.5 < channels[1] / channels[0] <= 0.6
    if epochs:
        assert [r["stage"] for r in result["stages"][1:]] == ["prune", "finetune"] * 2
        steps = [result["stages"][i]["macs"] / result["stages"][i - 1]["macs"] for i in (1, 3)]
        assert all(step < 0.9 for step in steps)
        assert "--prune" not in flags or after["params"] < 0.4 * before["params"]


@pytest.mark.parametrize("ranking, ratio, step", [("layer", 0.5, 8), ("global", 0.5, 8), ("global", 0.9, 1)])
def test_rounds_end_where_one_round_does(ranking, ratio, step, monkeypatch, capsys):
    """Rounding in one round is no start for the next: the widths of all are shares of those that the network had"""
    model, flags = build("plain"), f"--prune {ratio} --rounds 7 --ranking {ranking} --no-recalibrate --round-to {step}"
    args = compress.get_args_parser().parse_args(flags.split())
    report = SimpleNamespace(world=train.World("cpu"), sets=SimpleNamespace(root="images"), checkpoint={}, tables={},
                             add=lambda *_: None)
    pipeline, made = compress.Pipeline(args, report, model), []
    monkeypatch.setattr(pipeline, "save", lambda path: made.append(pipeline.network))
    monkeypatch.setattr(pipeline, "finetune", lambda: None)
    monkeypatch.setattr(compress, "load_checkpoint", lambda path: dict(metrics={}))
    monkeypatch.setattr(compress, "build_model", lambda *_: made[-1])
    pipeline.run(["prune", "finetune"] * 7)
    before, after = ({name: s.size for name, s in compress.spaces(net).items()} for net in (model, made[-1]))
    if ranking == "layer":
        assert after == {name: min(n, max(8, round(n / 16) * 8)) for name, n in before.items()}
    else:
        assert 0 <= sum(before.values()) * (1 - ratio) - sum(after.values()) < step
    assert "not trained since" not in capsys.readouterr().err
    pipeline.run(["finetune", "prune"])
    assert "not trained since" in capsys.readouterr().err


def test_target_latency_at_both_ends(call):
    """What is fast enough loses nothing; what no network reaches is said"""
    result = call("--target-latency", 1e6, "--int8", "--epochs", 0, "--calib-images", 8)
    assert result["stages"][1]["params"] == result["before"]["params"]
    for flags in ("--int8", "--overwrite"), ("--prune", 0.9, "--ranking", "global"):  # nothing came of the first
        with pytest.raises(UserError, match="cannot be reached"):
            call(*["--target-latency", 1e-6] * ("--prune" not in flags), *flags, "--epochs", 0)


@pytest.mark.parametrize("power", [0.5, 1, 2])
def test_target_latency_is_approached_whatever_the_table_says(call, trained, monkeypatch, power):
    """On a machine whose time is not what the table of its layers adds up to"""
    def clock(model, size, int8):
        return sum(resnet50.count_macs(model, size).values()) ** power
    monkeypatch.setattr(compress, "milliseconds", clock)
    monkeypatch.setattr(compress, "latency_table", lambda model, size, int8, poll: {
        name: (0, macs, 0, 0) for name, macs in resnet50.count_macs(model, size).items()})
    goal = clock(resnet50.build_model(resnet50.load_checkpoint(trained), trained), 32, True) * 0.4
    result = call("--target-latency", goal, "--int8", "--epochs", 0, "--calib-images", 8, "--round-to", 1)
    assert abs(result["stages"][1]["macs"] ** power / goal - 1) < 0.05


@pytest.mark.parametrize("flags", [("--sparsity", 0.2), ("--sparsity", 0.9), ("--sparsity-2-4",),
                                   ("--sparsity-2-4", "--int8"), ("--int4-weights", 32)])
def test_smaller_files(call, flags):
    result = call(*flags, *["--epochs", 1] * ("--int4-weights" not in flags), "--calib-images", 20)
    state = resnet50.load_checkpoint(result["checkpoint"])["model"]
    weights = {k: v for k, v in state.items() if v.ndim > 1 and not k.startswith("conv1")}
    zeros = sum(int((v == 0).sum()) for v in weights.values()) / sum(v.numel() for v in weights.values())
    if "--sparsity" in flags:
        assert flags[1] - 0.01 < zeros < flags[1] + 0.02
    elif "--sparsity-2-4" in flags:
        for key, value in weights.items():
            assert (value.movedim(1, -1).reshape(-1, 4).count_nonzero(1) <= 2).all()
    if "--int8" in flags:
        net = resnet50.build_model(resnet50.load_checkpoint(result["checkpoint"]), "it")
        net.pack_sparse()
        convs = {step.name: net.get_submodule(step.name) for step in net.steps if step.kind == "conv"}
        fit = {name for name, layer in convs.items() if layer.pad_value is None and all(
            w is None or w.shape[1] % 16 == 0 for w in (layer.weight, layer.weight2))}
        assert len(fit) > 5 and net.sparse.keys() == fit  # CUDA's kernels take them
    small = call("--sparsity", 0.0001, "--epochs", 0, "--out", os.path.dirname(result["checkpoint"]) + "-dense")
    limit = 0.95 if 0.2 in flags else 0.9 if "--sparsity-2-4" in flags else 0.7
    assert result["after"]["bytes"] < limit * small["after"]["bytes"]


def test_what_came_sparse_stays_sparse(call, tmp_path, tiny, trained, monkeypatch):
    """In training, here and by train.py, in other stages' files, and in the files of several networks"""
    monkeypatch.setattr(compress, "measure", lambda *_: 1.0)
    sparse = call("--sparsity", 0.9, "--epochs", 0, "--out", tmp_path / "sparse")["checkpoint"]
    zero = {k: v == 0 for k, v in resnet50.load_checkpoint(sparse)["model"].items() if v.ndim > 1}
    again = call("--distill", "self", "--epochs", 1, "--dynamic", checkpoint=sparse)
    for row in again["stages"][1:]:
        state = resnet50.load_checkpoint(row["checkpoint"])["model"]
        assert all(not v[zero[k]].any() for k, v in state.items() if k in zero)
        assert row["bytes"] < 1.05 * again["before"]["bytes"]
    ints = resnet50.load_checkpoint(call("--qat", "--qat-epochs", 1, "--out", tmp_path / "qat", checkpoint=sparse)[
        "checkpoint"])["model"]
    both = {k: (v, ints[k]) for k, v in zero.items() if k in ints}
    assert len(both) > 40 and all(not v[z].any() for z, v in both.values())
    flags = ["--data", tiny, "--checkpoint", sparse, "--out", str(tmp_path / "more"), "--recipe", "demo",
             "--image-size", "32", "--workers", "0", "--device", "cpu"]
    for more in (["--epochs", "1"], ["--epochs", "2", "--resume"]):
        path = train.main(train.get_args_parser().parse_args(flags + more))["checkpoint"].replace("best", "last")
        assert all(not v[zero[k]].any() for k, v in resnet50.load_checkpoint(path)["model"].items() if k in zero)
    monkeypatch.setattr(compress.Pipeline, "run", lambda self, stages: None)
    found = call("--auto", "--overwrite", checkpoint=sparse)
    assert found["after"]["bytes"] < 1.05 * again["before"]["bytes"]
    both = call("--cascade", sparse, trained, "--calib-images", 8, "--out", tmp_path / "both")
    assert both["after"]["bytes"] < 1.05 * (again["before"]["bytes"] + both["before"]["bytes"])


def test_dynamic_quantization_of_the_classifier(call, run, tiny, tmp_path, capsys):
    """Against float64, with the rounding of weights and inputs written anew; in a fresh process; not to be trained"""
    path = call("--dynamic", "--prune", 0.5, "--epochs", 0)["checkpoint"]
    pruned = os.path.join(os.path.dirname(path), "1-prune.pt")
    assert f"python finetune.py --strategy full --checkpoint {pruned} --data {tiny}" in capsys.readouterr().err
    model = resnet50.build_model(resnet50.load_checkpoint(path), path)
    before = resnet50.build_model(resnet50.load_checkpoint(pruned), pruned)
    g = torch.Generator().manual_seed(0)
    x = torch.rand(3, before.fc.in_features, generator=g) * torch.tensor([[1.0], [50.0], [0.0]])
    weight, scale = before.fc.weight.double(), before.fc.weight.double().abs().amax(1) / 127
    step = (x.double().amax(1, keepdim=True) / 255).clamp(min=1e-30)
    expected = ((x / step).round() * step) @ ((weight / scale[:, None]).round() * scale[:, None]).T + before.fc.bias
    torch.testing.assert_close(model.fc(x).double(), expected, rtol=1e-4, atol=2e-3)
    pixels = photographs(4, 32, 32)
    a, b = (resnet50.predict(m, pixels) for m in (before, model))
    assert 0 < (a - b).abs().max() < 0.05 * a.std()
    assert torch.equal(resnet50.predict(model, pixels[2:]), b[2:])  # a row's scale is its own
    assert torch.allclose(resnet50.predict(resnet50.fuse(model), pixels), b, atol=1e-4 * a.abs().max().item())
    for script, flags, code in (("resnet50.py", ("--checkpoint", path), 0),
                                ("train.py", ("--checkpoint", path, "--data", tiny, "--out", tmp_path / "train"), 3)):
        done = run(*flags, "--device", "cpu", script=script)
        assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == 1 and "is int8, which cannot be trained" in done.stderr


def test_qat(call, tmp_path):
    """What was trained is what the int8 checkpoint holds"""
    result = call("--qat", "--qat-epochs", 1, "--freeze-bn-epochs", 1, "--calib-images", 20)
    assert [r["stage"] for r in result["stages"]] == ["original", "qat"]
    net = resnet50.build_model(resnet50.load_checkpoint(result["checkpoint"]), "int8")
    assert net.precision == "int8"
    trained = resnet50.load_checkpoint(str(tmp_path / "out" / "1-qat" / "best.pt"))
    fake = compress.FakeQuantResNet50(ResNet50(**trained["config"]), dict.fromkeys(
        (s.name for s in net.steps), (0.0, 1.0)))
    fake.load_state_dict(trained["model"])
    fake.preprocess = trained["preprocess"]
    check_within_one_step(fake.eval(), net, photographs(6, 32, 32))


@pytest.mark.parametrize("student", ("mobilenet_v2", "0.125"))
def test_student(call, trained, student, monkeypatch):
    networks, inner = [], compress.load_weights
    monkeypatch.setattr(compress, "load_weights", lambda model, *rest: networks.append(model) or inner(model, *rest))
    result = call("--distill", trained, "--student", student, "--epochs", 1, "--kd-features", 1, "--calib-images", 20)
    assert [r["stage"] for r in result["stages"]] == ["original", "distill"]
    config = resnet50.load_checkpoint(result["checkpoint"])["config"]
    assert config["arch"] == "mobilenet_v2" if student[0] == "m" else config["widths"]["layer4"] == 256
    assert not any(m._forward_hooks for m in networks[0].modules())  # later stages make no maps for the teacher


def test_mixed_precision_goes_back_to_float_until_the_drop_is_allowed(call, tmp_path, trained, monkeypatch):
    monkeypatch.setattr(compress.Report, "accuracy", lambda self, row: row["agreement"])  # this network knows little
    steps = compress.fold_downsample(compress.flatten(resnet50.build_model(resnet50.load_checkpoint(trained), trained)))
    chosen = [s.name for s in steps if s.kind == "conv"][12:]  # by hand, so that few are ranked
    flags = ("--int8", "--calib-images", 8, "--correction", "none", "--weight-bits", 2, "--float-layers", *chosen)
    result = call(*flags, "--max-drop", 30)
    assert result["agreement"] >= 70 and result["signal_to_noise_db"]["fc"] > 0  # of the network that was kept
    config = resnet50.load_checkpoint(result["checkpoint"])["config"]
    assert set(chosen) < set(config["float_layers"])
    for more, text in (("--max-drop", -50), "-50: 0.00 points were lost before int8"), (
            ("--prune", 0.9, "--epochs", 0, "--max-drop", -50), "points were lost before int8, .*1-prune.pt"):
        with pytest.raises(UserError, match=text) as caught:
            call(*flags, *more, "--out", tmp_path / f"out{len(more)}")
        assert caught.value.code == 2 and not (tmp_path / f"out{len(more)}" / "best.pt").exists()
    chosen = call("--int8", "--float-layers", "conv1", "fc", "--calib-images", 20, "--overwrite")
    assert resnet50.load_checkpoint(chosen["checkpoint"])["config"]["float_layers"] == ["conv1", "fc"]


@pytest.mark.parametrize("need", [1, 5, 6, 13])
def test_no_more_layers_return_to_float_than_are_needed(need, monkeypatch):
    monkeypatch.setattr(compress, "compare", lambda model, net, pixels: (int((net or [99])[-1]), 0.0))
    report = SimpleNamespace(poll=lambda: None, score=len, drop=lambda layers: 2.0 * (layers < need))
    steps = [resnet50.Step("conv", str(i), "") for i in reversed(range(13))]
    pipeline = SimpleNamespace(args=SimpleNamespace(float_layers=[], max_drop=1.0), report=report,
                               network=SimpleNamespace(steps=steps), calibration=lambda: [torch.zeros(1)])
    compress.Pipeline.back_to_float(pipeline, None, lambda float_layers, **_: float_layers)
    assert pipeline.network == [str(i) for i in range(need)]


@pytest.mark.parametrize("work, flags", [
    ("covariance", ["--int8"]), ("step_times", ["--target-latency", 1e-3, "--epochs", 0]),
    ("compare", ["--prune", 0.5, "--sensitivity", "--epochs", 0]),
    ("compare", ["--int8", "--weight-bits", 2, "--correction", "none", "--max-drop", 0])])
def test_a_stop_waits_for_one_layer_not_for_all(call, monkeypatch, work, flags):
    calls, inner = [], getattr(compress, work)

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(*args)
    monkeypatch.setattr(compress, work, interrupted)
    monkeypatch.setattr(compress.Report, "accuracy", lambda self, row: row["agreement"])
    with pytest.raises(UserError, match="stopped by SIGTERM; .* --resume goes on") as caught:
        call(*flags, "--calib-images", 8)
    assert caught.value.code == 75 and len(calls) == 2


def test_cascade(call, tmp_path, trained, tiny):
    small = call("--prune", 0.5, "--epochs", 1, "--calib-images", 20, "--out", tmp_path / "small")["checkpoint"]
    result = call("--cascade", small, trained, "--max-drop", 5, "--calib-images", 30)
    assert [r["stage"] for r in result["stages"]] == ["big", "small", "cascade"]
    pixels = photographs(9, 32, 32)
    a, b, c = (logits(p, pixels) for p in (small, trained, result["checkpoint"]))
    files = data.open_folder(tiny)[0].select(np.arange(30) * 50 // 30)
    show = data.eval_transform(dict(resnet50.PREPROCESS, crop=32, resize=32))

    def read(files):
        return torch.stack([show(data.decode(open(files.path(i), "rb").read())) for i in range(len(files))]
                           ).permute(0, 3, 1, 2)
    images = read(files)
    first, second, truth = logits(small, images), logits(trained, images), torch.from_numpy(files.labels)
    scores = {}  # by threshold, all that the calibration images distinguish
    for threshold in first.softmax(1).amax(1).tolist():
        answer = torch.where(first.softmax(1).amax(1) >= threshold, first.argmax(1), second.argmax(1))
        scores[threshold] = 100 * (answer == truth).double().mean().item()
    enough = 100 * (second.argmax(1) == truth).double().mean().item() - 5 - 1e-9
    least = min((t for t, score in scores.items() if score >= enough), default=1.0)
    assert abs(result["threshold"] - least) < 1e-5
    sure = a.softmax(1).amax(1) >= result["threshold"]
    assert torch.equal(c[sure], a[sure]) and torch.allclose(c[~sure], b[~sure], atol=1e-4)
    share = (logits(small, read(data.open_folder(tiny)[1])).softmax(1).amax(1) < result["threshold"]).double().mean()
    whole, part, both = result["stages"]
    assert set(both) == {*ROW, "deferred"} and abs(both["deferred"] / 100 - share) < 1e-4
    for key, power in (("macs", 1), ("latency_ms_bs1", 1), ("images_per_second_bs32", -1)):  # of the mean image
        assert abs(both[key] ** power / (part[key] ** power + share * whole[key] ** power) - 1) < 0.02


def test_a_cascade_is_no_cascade_s_member(call, tmp_path, trained):
    model = resnet50.build_model(resnet50.load_checkpoint(trained), trained)
    resnet50.save_checkpoint(path := str(tmp_path / "both.pt"), resnet50.Cascade(model, copy.deepcopy(model), 0.5),
                             classes=sorted(data.DEMO_CLASSES))
    for networks in (path, trained), (trained, path):
        with pytest.raises(UserError, match="both.pt: is a cascade itself"):
            call("--cascade", *networks)


def test_cascade_whose_small_network_is_often_equally_sure(call, tmp_path, trained, tiny, capsys):
    """A threshold sends all images of one probability the same way, and none those of exactly 1"""
    model = resnet50.build_model(resnet50.load_checkpoint(trained), trained)
    for name, weight, bias in (("constant", 0.0, torch.arange(10.0)), ("sure", 1e5, torch.zeros(10))):
        with torch.no_grad():
            model.fc.weight[:] = weight * torch.randn(model.fc.weight.shape, generator=torch.Generator().manual_seed(0))
            model.fc.bias[:] = bias
        resnet50.save_checkpoint(str(tmp_path / f"{name}.pt"), model, classes=sorted(data.DEMO_CLASSES))
    flags = ("--data", tiny, "--calib-images", 50, "--max-drop", -1)  # first come the one class that it knows
    found = call("--cascade", tmp_path / "constant.pt", trained, *flags)
    assert found["threshold"] == 1 and found["after"]["agreement"] == 100
    assert "--max-drop -1 chose the threshold on 50 calibration images; of the 29 evaluated ones 0.00 points are " \
        "lost" in capsys.readouterr().err
    with pytest.raises(UserError, match="sure.pt: gives wrong answers a probability of 1"):
        call("--cascade", tmp_path / "sure.pt", trained, *flags[:-1], -90, "--overwrite")


def test_auto_says_where_no_network_gains_as_much_as_is_asked(call, monkeypatch):
    monkeypatch.setattr(compress.Pipeline, "run", lambda self, stages: self.report.add("same", self.network, None))
    with pytest.raises(UserError, match="--max-drop -100: no network") as caught:
        call("--auto", "--max-drop", -100)
    assert caught.value.code == 2


def test_auto_takes_a_ratio_that_no_widths_reach_for_too_much(call, monkeypatch):
    def run(self, stages):
        tried.append(self.args.prune)
        if self.args.prune and self.args.prune > 0.3:
            raise compress.Unreachable("no widths")
        self.report.tables["of"] = self.args.prune
        self.report.save(path := f"{self.report.args.out}/{self.args.prune}.pt", self.network)
        self.report.add("same", self.network, path)
    monkeypatch.setattr(compress.Pipeline, "run", run)
    clock, tried = iter(range(100, 0, -1)), []  # the last is the fastest
    monkeypatch.setattr(compress, "measure", lambda *_: next(clock))
    result = call("--auto", "--ranking", "global")
    assert tried == [None, 0.25, 0.5, 0.75, 0.375, 0.312]  # between what does and the least that does not
    assert result["max_drop"] == 1
    stages = [row["stage"] for row in result["stages"]]
    assert stages[:3] == ["original", "0 same", "0.25 same"] and "0.5 same" not in stages
    assert stages[-1] == f"{result['of']} same"  # tables are the chosen network's


def test_auto(call, tmp_path):
    result = call("--auto", "--max-drop", 100, "--epochs", 1, "--calib-images", 20)
    stages = [r["stage"] for r in result["stages"]]
    assert stages[0] == "original" and {"0 quantize", "0.5 finetune", "0.75 quantize"} <= set(stages)
    fastest = min(result["stages"], key=lambda r: r["latency_ms_bs1"])
    assert result["after"]["latency_ms_bs1"] == fastest["latency_ms_bs1"]
    assert logits(result["checkpoint"], photographs(1, 32, 32)).shape == (1, 10)
    assert (tmp_path / "out" / "pareto.svg").read_text().startswith("<svg")


def test_photographs_are_turned_where_training_turned_them(call, tmp_path, trained, tiny, monkeypatch):
    upright, tag = resnet50.load_checkpoint(trained), Image.Exif()
    tag[0x0112] = 3  # upside down
    for name in data.images_below(tiny):
        path = tmp_path / "turned" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.open(os.path.join(tiny, name)).convert("RGB").rotate(180).save(path, exif=tag)
    resnet50.save_checkpoint(str(tmp_path / "exif.pt"), resnet50.build_model(upright, trained),
                             classes=upright["classes"], args=dict(upright["args"], exif=True))
    made, inner = [], compress.read_pixels
    monkeypatch.setattr(compress, "read_pixels", lambda *args: made.append(inner(*args)) or made[-1])
    found = [call("--int8", "--data", folder, "--calib-images", 10, "--out", tmp_path / f"out{i}", checkpoint=file)
             for i, (folder, file) in enumerate([(tiny, trained), (tmp_path / "turned", str(tmp_path / "exif.pt"))])]
    assert found[0]["before"]["top5"] == found[1]["before"]["top5"] and torch.equal(made[0][0], made[1][0])
    both = call("--cascade", tmp_path / "exif.pt", tmp_path / "exif.pt", "--data", tmp_path / "turned",
                "--calib-images", 10, "--out", tmp_path / "both")
    assert resnet50.load_checkpoint(both["checkpoint"])["args"]["exif"] and torch.equal(made[0][0], made[2][0])


@pytest.mark.parametrize("share", [None, 0.3])
def test_what_a_network_learned_from_is_not_evaluated(share, call, tmp_path, trained, tiny):
    """In a folder without val/ either: it is split as in training"""
    flat, made = str(shutil.copytree(os.path.join(tiny, "train"), tmp_path / "flat")), resnet50.load_checkpoint(trained)
    resnet50.save_checkpoint(str(tmp_path / "flat.pt"), resnet50.build_model(made, trained), classes=made["classes"],
                             args=dict(made["args"], data=flat, val_split=share))
    result = call("--int8", "--calib-images", 10, "--correction", "none", checkpoint=str(tmp_path / "flat.pt"))
    assert result["data"] == flat and result["after"]["images"] == len(data.open_folder(flat, val_split=share)[1])


def test_what_a_network_learned_from_here_is_not_evaluated_later(call, tmp_path, trained, tiny):
    flat = str(shutil.copytree(os.path.join(tiny, "train"), tmp_path / "flat"))
    taught = call("--distill", "self", "--epochs", 1, "--data", flat, "--val-split", 0.3)
    both = call("--cascade", taught["checkpoint"], taught["checkpoint"], "--out", tmp_path / "both")
    assert taught["after"]["images"] == both["after"]["images"] < 25
    for path in taught["checkpoint"], both["checkpoint"]:
        scored = train.main(train.get_args_parser().parse_args(
            ["--eval-only", "--checkpoint", path, "--data", flat, "--device", "cpu"]))
        assert scored["images"] == taught["after"]["images"]


def test_images_without_labels(call, tmp_path, tiny):
    folder = tmp_path / "flat"
    folder.mkdir()
    for i, name in enumerate(data.images_below(tiny, "train")[:30]):
        (folder / f"{i}.jpg").write_bytes(open(os.path.join(tiny, name), "rb").read())
    result = call("--int8", "--data", folder, "--calib-images", 10)
    assert result["top1"] is None and result["after"]["top5"] is None
    assert 0 <= result["agreement"] <= 100 and result["after"]["images"] == 20


@pytest.mark.parametrize("flags, code, text", [
    (("--prune", "0.999", "--round-to", "1"), 2, "--prune 0.999: leaves nothing"),
    (("--prune", "0.99", "--ranking", "global"), 2, "--prune 0.99 --ranking global: cannot be reached: with 0.5 % of"),
    (("--prune", "0.5", "--round-to", "4096"), 2, "--prune 0.5: in multiples of --round-to 4096 every layer stays"),
    (("--student", "0.001", "--distill", "TRAINED", "--epochs", "1"), 2, "--student 0.001: leaves nothing"),
    (("--prune", "0.5", "--target-macs", "1e6"), 2, "exclude each other"),
    (("--int8", "--data", "EMPTY"), 3, "no images"),
    (("--int8", "--data", "nowhere"), 3, "nowhere: no such folder"),
    (("--int8", "--data", __file__), 3, "test_compress.py: no such folder"),
    (("--prune", "0.5", "--data", "EMPTY"), 3, "EMPTY"),
    (("--distill", "nowhere.pt", "--int8"), 3, "nowhere.pt: neither a file nor a model"),
    (("--int8", "--float-layers", "conv9"), 2, "conv9"),
    (("--int8", "--stages", "prune"), 2, "the flags ask for quantize"),
    (("--max-drop", "1", "--prune", "0.5"), 2, "--max-drop"),
    (("--max-drop", "1", "--int8", "--qat"), 2, "--max-drop"),
    (("--student", "resnet18", "--int8"), 2, "only ResNet-50s"),
    (("--student", "1.5"), 2, "lies in (0, 1]"),
    (("--int8", "--kd-alpha", "0.9"), 2, "--kd-alpha goes with --distill"),
    (("--prune", "0.5", "--weight-bits", "4"), 2, "--weight-bits goes with --int8, --qat or --auto"),
    (("--int8", "--importance", "l1"), 2, "--importance goes with --prune"),
    (("--int8", "--dynamic"), 2, "--dynamic excludes --int8"),
    (("--int8", "--distill", "TRAINED", "--epochs", "0"), 2, "--distill teaches in training"),
    (("--int8", "--lr", "0.1"), 2, "--lr goes with training"),
    (("--int8", "--batch-size", "8"), 2, "--batch-size goes with training"),
    (("--qat", "--epochs", "30"), 2, "--epochs: --qat trains for --qat-epochs"),
    (("--int8", "--epochs", "30"), 2, "--epochs: nothing here is trained"),
    (("--qat", "--distill", "self", "--kd-features", "1"), 2, "--kd-features: not with --qat"),
    (("--prune", "0.5", "--calib-images", "1"), 2, "one calibration image has no batch-norm statistics"),
    (("--prune", "0.5", "--rounds", "2", "--stages", "finetune", "prune"), 2, "finetune right after prune"),
    (("--int8", "--no-equalise", "--qat", "--epochs", "0", "--opt", "sgd", "--no-recalibrate"), 2, "--no-recalibrate"),
    (("--prune", "0.5", "--no-equalise"), 2, "--no-equalise goes with"),
    (("--int8", "--prune", "0.5", "--stages", "quantize", "prune", "finetune"), 2, "prune cannot follow quantize"),
    (("--qat", "--prune", "0.5", "--stages", "prune", "qat", "finetune"), 2, "finetune cannot follow qat"),
    (("--sparsity-2-4", "--epochs", "1", "--distill", "self", "--int8", "--stages", "finetune", "quantize", "prune"), 2,
     "prune cannot follow quantize"),
    (("--prune", "0.5", "--int8", "--rounds", "2", "--stages", "prune", "quantize", "finetune"), 2, "--stages"),
    (("--cascade", "TRAINED", "TRAINED", "--epochs", "9"), 2, "--epochs: --cascade"),
    (("--cascade", "TRAINED", "TRAINED", "--checkpoint", "TRAINED"), 2, "--checkpoint: --cascade"),
    (("--auto", "--prune", "0.5"), 2, "--auto decides by itself"),
    (("--auto", "--distill", "self", "--stages", "finetune"), 2, "--auto decides by itself"),
    (("--sparsity", "0.5", "--rounds", "2"), 2, "--rounds goes with"),
    (("--int8", "--observer", "mse", "--qat", "--round-to", "4"), 2, "--round-to goes with"),
    (("--int8", "--qat", "--correction", "none"), 2, "--correction goes with --int8 or --auto, and not with --qat"),
    (("--qat", "--correction", "biases"), 2, "--correction goes with --int8 or --auto"),
    (("--int8", "--qat", "--float-layers", "fc"), 2, "--float-layers goes with --int8 or --auto, and not with --qat"),
    (("--int8", "--int4-weights", "32"), 2, "--int4-weights excludes"),
    (("--target-macs", "1e9", "--ranking", "global"), 2, "--ranking goes with --prune or --auto"),
    (("--student", "resnet18", "--round-to", "4"), 2, "--round-to goes with --prune"),
    (("--distill", "TRAINED", "--student", "0.5", "--epochs", "0"), 2, "--student needs --epochs"),
    (("--cascade", "nowhere.pt", "TRAINED"), 3, "nowhere.pt: No such file")])
def test_bad_input_is_one_line_and_leaves_nothing(call, tmp_path, trained, flags, code, text):
    (tmp_path / "EMPTY").mkdir()
    flags = [str(tmp_path / "EMPTY") if f == "EMPTY" else trained if f == "TRAINED" else f for f in flags]
    before = open(trained, "rb").read()
    with pytest.raises(UserError) as caught:
        call(*flags)
    assert caught.value.code == code and text.replace("EMPTY", str(tmp_path / "EMPTY")) in str(caught.value)
    assert not list((tmp_path / "out").glob("*.pt")) and open(trained, "rb").read() == before


def test_without_flags_it_quantizes(call, tmp_path, capsys):
    result = call("--calib-images", 8)
    assert [row["stage"] for row in result["stages"]] == ["original", "quantize"]
    assert resnet50.load_checkpoint(result["checkpoint"])["precision"] == "int8"
    assert "no flag says what to do: --int8" in capsys.readouterr().err
    with open(tmp_path / "out" / "args.json", encoding="utf-8") as f:
        assert json.load(f)["int8"] is True


def test_batches_that_cannot_be_normalised_are_refused_in_one_line(call):
    with pytest.raises(UserError, match="--batch-size: leaves a batch-norm a single value") as caught:
        call("--prune", 0.5, "--epochs", 1, "--batch-size", 1, "--calib-images", 8)
    assert caught.value.code == 2


def test_other_flags_do_not_resume_and_inputs_are_not_overwritten(call, tmp_path, trained, monkeypatch):
    call("--int8", "--calib-images", 10)
    with pytest.raises(UserError, match="--resume: --prune was null in") as caught:
        call("--int8", "--calib-images", 10, "--prune", 0.5, "--epochs", 0, "--resume")
    assert caught.value.code == 2
    with monkeypatch.context() as patch:  # where the first process finds no file, none may skip the stage
        gather, before = train.World.gather, os.stat(tmp_path / "out" / "best.pt").st_ino
        patch.setattr(train.World, "gather", lambda self, value: gather(self, value is not True and value))
        call("--int8", "--calib-images", 10, "--resume", "--eval-batch-size", 7)  # no matter of the result
    assert os.stat(tmp_path / "out" / "best.pt").st_ino != before
    only = tmp_path / "only"
    only.mkdir()
    os.link(trained, only / "best.pt")
    with pytest.raises(UserError, match="--resume: .*only holds no args.json") as caught:
        call("--int8", "--resume", "--out", only)
    assert caught.value.code == 2
    for flags in (["--checkpoint", only / "best.pt"], ["--checkpoint", trained, "--distill", only / "best.pt"]):
        with pytest.raises(UserError, match="--overwrite would delete .*best.pt, which is read"):
            call("--prune", 0.5, "--overwrite", "--out", only, *flags, checkpoint=None)
    with pytest.raises(UserError, match="--overwrite would delete"):
        call("--cascade", trained, only / "best.pt", "--overwrite", "--out", only)
    assert os.listdir(only) == ["best.pt"]
    (tmp_path / "odd" / "best.pt").mkdir(parents=True)
    for content, flag, said in (("[1", "--resume", "Expecting"), ("[1]", "--resume", "cannot convert"),
                                ("{}", "--overwrite", "Is a directory")):
        (tmp_path / "odd" / "args.json").write_text(content)
        with pytest.raises(UserError, match=f"{flag}: .*odd/.*: {said}"):
            call("--int8", flag, "--out", tmp_path / "odd")


def test_overwriting_leaves_nothing_to_resume(call, tmp_path, monkeypatch):
    """A second run that was stopped before its training goes on with what it made, not with the first one's network"""
    flags = ["--prune", 0.5, "--epochs", 1, "--calib-images", 8, "--round-to", 4]
    first = call(*flags)
    for name in ("prune-0.25", "notes"):
        (tmp_path / "out" / name).mkdir()
        (tmp_path / "out" / name / "1-prune.pt").write_text("")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="told to stop"):
        patch.setattr(train, "train", mock.Mock(side_effect=UserError("told to stop", 75)))
        call(*flags, "--importance", "l1", "--overwrite")
    assert not (tmp_path / "out" / "prune-0.25" / "1-prune.pt").exists()
    assert (tmp_path / "out" / "notes" / "1-prune.pt").exists()
    old = resnet50.load_checkpoint(str(tmp_path / "out" / "1-prune.pt"))["model"]["conv1.weight"]
    resumed = call(*flags, "--importance", "l1", "--resume")
    trained = resnet50.load_checkpoint(resumed["checkpoint"])["model"]["conv1.weight"]
    assert first["checkpoint"] == resumed["checkpoint"] and (trained - old).abs().max() < 0.1
    with pytest.raises(UserError, match="--overwrite would delete .*2-finetune/best.pt, which is read"):
        call(*flags, "--overwrite", checkpoint=str(tmp_path / "out" / "2-finetune" / "best.pt"))


def test_cascade_of_foreign_weights_without_names(call, tmp_path, monkeypatch):
    monkeypatch.setattr(compress, "measure", lambda *_: 1.0)  # 224 pixels make the timing long
    wide = ResNet50(num_classes=10, stride_on="1x1").eval()
    torch.save(wide.state_dict(), tmp_path / "wide.pth")
    names = tmp_path / "names.json"
    names.write_text(json.dumps(sorted(data.DEMO_CLASSES)))
    result = call("--cascade", tmp_path / "wide.pth", tmp_path / "wide.pth", "--stride-on", "1x1", "--classes", names,
                  "--data", data.make_demo(str(tmp_path / "few"), train=1, val=1), "--calib-images", 4)
    saved = resnet50.load_checkpoint(result["checkpoint"])
    assert saved["classes"] == sorted(data.DEMO_CLASSES)
    assert resnet50.build_model(saved, "x").big.config["stride_on"] == "1x1"


def test_flags_are_for_the_one_of_two_networks_that_does_not_say_what_it_is(call, tmp_path, monkeypatch):
    names, seen = tmp_path / "names.json", []
    names.write_text(json.dumps(list("abc")))
    torch.save(ResNet50(num_classes=3, stride_on="1x1").state_dict(), tmp_path / "foreign.pth")
    student = resnet50.torchvision_model("squeezenet1_1", 3)
    resnet50.save_checkpoint(str(tmp_path / "student.pt"), student, classes=list("abc"))
    monkeypatch.setattr(compress, "open_sets", lambda args, checkpoint, big, *a, **k: seen.append(big.config) or 1 / 0)
    flags = "--stride-on", "1x1", "--classes", names
    with pytest.raises(ZeroDivisionError):
        call("--cascade", tmp_path / "student.pt", tmp_path / "foreign.pth", *flags)
    assert seen[0]["stride_on"] == "1x1"
    resnet50.save_checkpoint(str(tmp_path / "v15.pt"), ResNet50(num_classes=3, widths=WIDTHS), classes=list("abc"))
    with pytest.raises(UserError, match="v15.pt: was made with stride_on=3x3, not 1x1"):
        call("--cascade", tmp_path / "v15.pt", tmp_path / "v15.pt", *flags)


@pytest.mark.parametrize("flag, value, text", [
    ("--prune", "1", "lie in [0, 1)"), ("--prune", "-0.1", "lie in [0, 1)"), ("--sparsity", "1.5", "lie in (0, 1)"),
    ("--sparsity", "0", "lie in (0, 1)"), ("--target-latency", "-1", "be above 0"),
    ("--epochs", "-1", "be at least 0")])
def test_number_outside_is_wrong_usage(capsys, flag, value, text):
    with pytest.raises(SystemExit) as caught:
        compress.get_args_parser().parse_args([flag, value])
    assert caught.value.code == 2 and f"{flag}: {value} must {text}" in capsys.readouterr().err


def test_checkpoints_that_cannot_be_compressed(call, tmp_path, trained):
    model = resnet50.build_model(resnet50.load_checkpoint(trained), trained)
    classes = sorted(data.DEMO_CLASSES)
    with torch.no_grad():
        model.layer3[0].conv2.weight[0] = float("nan")
    resnet50.save_checkpoint(str(tmp_path / "nan.pt"), model, classes=classes)
    with pytest.raises(UserError, match=r"nan.pt: layer3.0.conv2.weight holds values that are not finite"):
        call("--int8", checkpoint=str(tmp_path / "nan.pt"))
    for flags in (["--distill", tmp_path / "nan.pt"], ["--cascade", trained, tmp_path / "nan.pt"],
                  ["--cascade", tmp_path / "nan.pt", trained]):
        with pytest.raises(UserError, match=rf"{flags[0]}.* .*nan.pt: layer3.0.conv2.weight holds") as caught:
            call(*flags, "--out", tmp_path / "zero")
        assert caught.value.code == 3 and not (tmp_path / "zero").exists()
    int8 = call("--int8", "--calib-images", 10)["checkpoint"]
    with pytest.raises(UserError, match="is int8, which cannot be trained"):
        call("--prune", 0.5, "--out", tmp_path / "second", checkpoint=int8)
    other = ResNet50(num_classes=10, widths=WIDTHS)
    resnet50.save_checkpoint(str(tmp_path / "other.pt"), other, classes=[f"x{i}" for i in range(10)])
    more = ResNet50(num_classes=11, widths=WIDTHS)
    resnet50.save_checkpoint(str(tmp_path / "more.pt"), more, classes=[f"x{i}" for i in range(11)])
    for path, text in (("other.pt", r"has other classes than the student, 'x0' in place of '\w+'"),
                       ("more.pt", r"has other classes \(11\) than the student \(10\)")):
        with pytest.raises(UserError, match=f"{path}: {text}"):
            call("--distill", tmp_path / path, "--out", tmp_path / "third")
    assert not (tmp_path / "second").exists() and not (tmp_path / "third").exists()


def test_stopped_in_fine_tuning_and_resumed_ends_with_the_same_bits(run, trained, tmp_path):
    flags = ("--checkpoint", trained, "--prune", 0.5, "--int8", "--epochs", 2, "--calib-images", 20, "--workers", 0,
             "--device", "cpu", "--out")
    straight = run(*flags, tmp_path / "straight", script="compress.py")
    assert straight.returncode == 0, straight.stderr
    stop_at_4 = ("import train\ninner, calls = train.train_step, []\n"
                 "def step(*args, **more):\n    calls.append(1)\n"
                 "    if len(calls) == 4: os.kill(os.getpid(), signal.SIGTERM)\n    return inner(*args, **more)\n"
                 "train.train_step = step")
    stopped = run(*flags, tmp_path / "cut", script="compress.py", before=stop_at_4)
    assert stopped.returncode == 75 and "--resume auto goes on" in stopped.stderr.splitlines()[-1]
    resumed = run(*flags, tmp_path / "cut", "--resume", "auto", script="compress.py")
    assert resumed.returncode == 0, resumed.stderr
    for name in ("1-prune", "2-finetune", "best"):
        a, b = (resnet50.load_checkpoint(str(tmp_path / run / f"{name}.pt"))["model"] for run in ("straight", "cut"))
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_a_killed_worker_restarts_from_the_stage_it_was_in(run, trained, tmp_path, flags):
    kill_at_3 = ("import train\ninner, calls = train.train_step, []\n"
                 "def step(*args, **more):\n    calls.append(1)\n"
                 "    if len(calls) == 3 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
                 "        os.kill(os.getpid(), signal.SIGKILL)\n    return inner(*args, **more)\n"
                 "train.train_step = step")
    done = run("--checkpoint", trained, "--prune", 0.5, "--epochs", 1, "--calib-images", 20, "--workers", 0, "--device",
               "cpu", "--save-every", 1, "--out", tmp_path / "out", *flags, script="compress.py", before=kill_at_3,
               restarts=1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"resumed {tmp_path}/out/2-finetune/last.pt at epoch 0, step 2" in done.stderr


def test_two_processes(run, trained, tmp_path):
    """Of which the second takes its machine for slower, and so would prune more"""
    clocks = ("from resnet50 import count_macs\n"
              "script.milliseconds = lambda model, size, int8: "
              "sum(count_macs(model, size).values()) * (1 + 0.3 * int(os.environ['RANK']))\n"
              "script.latency_table = lambda model, size, int8, poll: "
              "{name: (0, macs, 0, 0) for name, macs in count_macs(model, size).items()}\n")
    result = run("--checkpoint", trained, "--target-latency", 5e5, "--int8", "--epochs", 2, "--calib-images", 20,
                 "--round-to", 4, "--workers", 0, "--device", "cpu", "--out", tmp_path / "out", script="compress.py",
                 before=clocks, processes=2)
    assert result.returncode == 0, result.stderr
    result = json.loads(result.stdout.splitlines()[-1])
    assert [r["images"] for r in result["stages"]] == [29] * 4 and all(set(r) == ROW for r in result["stages"])
