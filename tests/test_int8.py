"""The int8 network against integer arithmetic in numpy and against the float network; quantization's own promises;
int8 checkpoints; the fused float network; the real ImageNet weights."""
import copy
import csv
import os
import pickle

import numpy as np
import pytest
import torch

import csrc
import data
import resnet50
import train
from compress import masks_2_4
from csrc.reference import check_values
from resnet50 import ResNet50, UserError
from tests.test_resnet50 import randomise

WIDTHS = {"conv1": 16} | {f"layer{i}": 16 * i + 8 for i in range(1, 5)}
WIDTHS |= {f"layer{i + 1}.{j}.conv{k}": 4 * i + 8 for i, (_, blocks, _) in enumerate(resnet50.STAGES)
           for j in range(blocks) for k in (1, 2)}
ODD = {name: width + 1 + 2 * (i % 3) for i, (name, width) in enumerate(WIDTHS.items())}  # as pruning may leave them
VARIANTS = {"plain": {}, "pruned": dict(widths=ODD),
            "v1": dict(stride_on="1x1", widths={**WIDTHS, "conv1": WIDTHS["layer1"]}),  # layer1.0 projects nevertheless
            "small": dict(stem="small"), "deep": dict(stem="deep", widths=ODD), "se": dict(attention="se", widths=ODD),
            "split": dict(attention="split")}


pytestmark = pytest.mark.usefixtures("one_thread")


def photographs(n, h, w, seed=0):
    """uint8 (n, 3, h, w) NHWC: smooth colours with black and white in them"""
    g = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.interpolate(torch.rand(n, 3, 5, 5, generator=g), (h, w), mode="bicubic")
    return (x * 340 - 40).clamp(0, 255).byte().contiguous(memory_format=torch.channels_last)


def build(variant, seed=0, **config):
    torch.manual_seed(seed)
    model = randomise(ResNet50(**{"num_classes": 7, "widths": WIDTHS, **VARIANTS[variant], **config}), seed)
    return model.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def call(script, *args):
    return script.main(script.get_args_parser().parse_args(["--device", "cpu", *args]))


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request):
    """(float network, the same quantized by five images of 75 x 50)"""
    model = build(request.param)
    return model, resnet50.quantize(model, photographs(5, 75, 50).split(2))


# ------------------------------------------------------------------------- the program against numpy's integers

def requantize(acc, mult):
    whole, rest = np.divmod(acc * mult, 2 ** 22)
    return np.clip(whole + ((rest > 2 ** 21) | ((rest == 2 ** 21) & (whole % 2 == 1))), 0, 255)


def windows(x, kernel, stride, pad, fill):
    """int64 (N, H, W, C) -> a list of the kernel's taps, each (N, Ho, Wo, C)"""
    n, h, w, c = x.shape
    wide = np.empty((n, h + 2 * pad, w + 2 * pad, c), np.int64)
    wide[:] = fill
    wide[:, pad:pad + h, pad:pad + w] = x
    ho, wo = (h + 2 * pad - kernel) // stride + 1, (w + 2 * pad - kernel) // stride + 1
    return [wide[:, i:i + ho * stride:stride, j:j + wo * stride:stride][:, :ho, :wo]
            for i in range(kernel) for j in range(kernel)]


def conv(module, x, stride=1, pad=0, groups=1, residual=None, x2=None, stride2=1):
    weight, mult, bias = (getattr(module, k).numpy().astype(np.int64) for k in ("weight", "mult", "bias"))
    fill = 0 if module.pad_value is None else module.pad_value.numpy()
    taps = windows(x, weight.shape[2], stride, pad, fill)
    parts = []
    for g in range(groups):
        w = np.split(weight, groups)[g].transpose(2, 3, 1, 0).reshape(len(taps), weight.shape[1], -1)
        parts.append(sum(np.split(t, groups, 3)[g] @ m for t, m in zip(taps, w)))
    acc = np.concatenate(parts, 3) + bias
    if residual is not None:
        acc += module.gain.numpy().astype(np.int64) * residual
    if x2 is not None:
        acc += windows(x2, 1, stride2, 0, 0)[0] @ module.weight2[:, :, 0, 0].numpy().astype(np.int64).T
    return requantize(acc, mult)


def gate(module, x, residual=None):
    def linear(layer, v):
        return v @ layer.weight.numpy().astype(np.float64).T + layer.bias.numpy()
    (sa, sb), (za, zb), out = module.scales.tolist(), module.zeros.tolist(), module.scale.item()
    pooled = (x.mean((1, 2)) - za) * sa
    if residual is None:
        a, b = np.split(x, 2, 3)
        p, q = np.split(pooled, 2, 1)
        p, q = np.split(linear(module.fc2, np.maximum(linear(module.fc1, p + q), 0)), 2, 1)
        first = 1 / (1 + np.exp(q - p))
        second = 1 - first
    else:
        a, b = x, residual
        first = 1 / (1 + np.exp(-linear(module.fc2, np.maximum(linear(module.fc1, pooled), 0))))
        second = np.ones_like(first)
    ga, gb = (np.rint(v * s / out * 4096).astype(np.int64)[:, None, None] for v, s in ((first, sa), (second, sb)))
    return np.clip(np.rint(((a - za) * ga + (b - zb) * gb) / 4096), 0, 255).astype(np.int64)


def average(x, kernel, stride, pad, count_pad):
    if pad == 0 and kernel == 2:  # a last odd row or column is averaged alone
        x = np.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)), constant_values=-1)
    taps = np.stack(windows(x, kernel, stride, pad, 0))
    count = kernel ** 2 if count_pad else (taps >= 0).sum(0)
    return np.rint(np.where(taps < 0, 0, taps).sum(0) / count).astype(np.int64)


def naive(net, pixels):
    """The int8 network by ResNet's structure, written anew: uint8 (N, 3, H, W) -> float32 (N, classes)"""
    get, config = net.get_submodule, net.config
    x = pixels.permute(0, 2, 3, 1).numpy().astype(np.int64)
    if config["stem"] == "deep":
        x = conv(get("conv1.3"), conv(get("conv1.0"), x, 2, 1), 1, 1)
        x = conv(get("conv1.6"), x, 1, 1)
    else:
        x = conv(get("conv1"), x, 1, 1) if config["stem"] == "small" else conv(get("conv1"), x, 2, 3)
    if config["stem"] != "small":
        x = np.maximum.reduce(windows(x, 3, 2, 1, -1))
    for layer, blocks in enumerate((3, 4, 6, 3), 1):
        for block in range(blocks):
            at, stride = f"layer{layer}.{block}.", 2 if layer > 1 and block == 0 else 1
            on_1x1 = config["stride_on"] == "1x1"
            projects = block == 0
            y = conv(get(at + "conv1"), x, stride if on_1x1 else 1)
            if config["attention"] == "split":
                y = gate(get(at + "conv2"), conv(get(at + "conv2.conv"), y, 1, 1, groups=2))
                shortcut = x
                if stride == 2:
                    y, shortcut = average(y, 3, 2, 1, True), average(x, 2, 2, 0, False)
                more = dict(x2=shortcut) if projects else dict(residual=x)
                x = conv(get(at + "conv3"), y, **more)
                continue
            y = conv(get(at + "conv2"), y, 1 if on_1x1 else stride, 1)
            if config["attention"] == "se":
                shortcut = conv(get(at + "downsample.0"), x, stride) if projects else x
                x = gate(get(at + "se"), conv(get(at + "conv3"), y), shortcut)
            else:
                more = dict(x2=x, stride2=stride) if projects else dict(residual=x)
                x = conv(get(at + "conv3"), y, **more)
    area = x.shape[1] * x.shape[2]
    pooled = requantize(x.sum((1, 2)), (2 * net.avgpool.mult.item() + area) // (2 * area))
    acc = pooled @ net.fc.weight.numpy().astype(np.int64).T + net.fc.bias.numpy()
    return torch.from_numpy((acc * net.fc.scale.numpy().astype(np.float64)).astype(np.float32))


@pytest.mark.parametrize("n, h, w", [(1, 75, 50), (3, 64, 64), (2, 33, 97)])
def test_every_bit_is_that_of_plain_integers(pair, n, h, w):
    _, net = pair
    pixels = photographs(n, h, w, seed=1)
    pixels[0, :, :9, :9] = torch.randint(0, 2, (3, 9, 9), generator=torch.Generator().manual_seed(2)).byte() * 255
    expected = naive(net, pixels)
    assert expected.std() > 0.01 and torch.equal(net.run(pixels), expected)
    assert torch.equal(net(pixels), expected)  # as one call, where the native library has one


def test_images_of_a_batch_do_not_meet():
    """The full widths, whose last stages go 8 and 32 images at a time, and whose pixels lie apart there."""
    torch.manual_seed(3)
    net = resnet50.quantize(randomise(ResNet50(num_classes=10)).eval(), [photographs(4, 64, 64, seed=3)])
    pixels = photographs(41, 64, 64, seed=4)
    logits = net(pixels)  # 32, 8 and 1
    assert torch.equal(logits[:2], naive(net, pixels[:2])) and logits.std() > 0.01
    assert torch.equal(logits, torch.cat([net(p) for p in pixels.split(1)]))
    assert torch.equal(logits[:20], net(pixels[:20]))  # 16 and 4


def scaled_as(net, name):
    """The step that says what a buffer's values stand for."""
    return name if name != "maxpool" else "conv1.6" if net.config["stem"] == "deep" else "conv1"


def test_each_step_stands_for_its_float_counterpart(pair):
    """Every buffer, scaled back, is the float network's up to noise, also at another size than the calibration's."""
    model, net = pair
    for pixels in (photographs(5, 75, 50), photographs(2, 64, 96, seed=3)):
        ints, noise = {}, {}
        net.run(pixels, watch=lambda step, y: ints.update({step.name: y}))

        def watch(step, y):
            if step.name in ints and step.kind not in ("pool", "linear"):
                module = net.get_submodule(scaled_as(net, step.name))
                value = (ints[step.name].double() - getattr(module, "zero", 0)) * module.scale
                noise[step.name] = ((value - y).square().mean() / y.double().square().mean()).sqrt().item()
        resnet50.fuse(model).run(resnet50.normalize(pixels, model.preprocess), watch=watch)
        assert len(noise) > 45 and np.median(list(noise.values())) < 0.03
        assert max(noise.values()) < 0.1, max(noise, key=noise.get)
        logits = resnet50.predict(model, pixels)
        assert (resnet50.predict(net, pixels) - logits).std() < 0.05 * logits.std()


# ------------------------------------------------------------------------------------------------- quantization

def test_integers_keep_their_bounds_and_use_their_range(pair):
    model, net = pair
    for step in net.steps:
        module = net.get_submodule(step.name)
        if step.kind != "conv":
            continue
        weights = [w for w in (module.weight, module.weight2) if w is not None]
        largest = torch.stack([w.int().abs().amax((1, 2, 3)) for w in weights]).amax(0)
        check_values(step.name, weights, module.bias, module.mult, module.gain)
        assert 110 <= largest.max() <= 127 and module.mult.min() > 0 and step.bn not in net.state_dict()
        assert (module.mult % 64 == 0).all()  # exact in float32 where it does not saturate
        if module.gain is None:
            continue
        # a residual of r steps adds r times the ratio of the scales, in steps of the result
        ratio = (net.get_submodule(scaled_as(net, step.residual)).scale / module.scale).item()
        got = module.gain.double() * module.mult / 2 ** 22
        assert (got == got[0]).all() and got[0].item() == pytest.approx(ratio, rel=1e-12)


@pytest.mark.parametrize("k, bias, residual", [(20000, 0.0, None), (3, -1e5, None), (3, 0.0, 1e3), (20000, 100.0, 1.0)])
def test_accumulators_stay_exact_in_float32(k, bias, residual):
    """Weights of one sign, a bias or a residual that dwarfs all else: one accumulator's worst case is below 2^24."""
    module = resnet50.Int8Conv(resnet50.Step("conv", "x", "y", residual and "z"), torch.nn.Conv2d(k, 2, 1))
    weight = torch.ones(2, k, 1, 1, dtype=torch.float64) * torch.tensor([1e-3, -2e-3]).view(2, 1, 1, 1)
    resnet50.fill_conv(module, "x", [(weight, 0.1)], torch.full((2,), bias, dtype=torch.float64), residual, 0.0, 9.0,
                       torch.zeros(k))
    gain = 0 if residual is None else module.gain.long()
    worst = module.bias.long().abs() + 255 * (module.weight.long().abs().flatten(1).sum(1) + gain)
    assert worst.max() < 2 ** 24


def test_pixels_at_the_mean_are_zero_to_the_first_convolution():
    model = build("plain")
    net = resnet50.quantize(model, [photographs(2, 64, 64)])
    assert net.conv1.pad_value.tolist() == [124, 116, 104]
    mean = torch.tensor([123.675, 116.28, 103.53], dtype=torch.float64)
    offset = (net.conv1.weight.double() * mean.view(1, 3, 1, 1)).sum((1, 2, 3))
    unit = net.conv1.mult.double() / 2 ** 22 * net.conv1.scale
    _, shift = resnet50.batch_norm_affine(model.bn1)
    assert ((net.conv1.bias + offset) * unit - shift).abs().max() <= 0.5 * unit.max() + 1e-12


def test_degenerate_networks():
    pixels = photographs(2, 64, 64)
    fresh = ResNet50(num_classes=3, widths=WIDTHS).eval()  # the last batch-norm of each block is zero
    cases = {"fresh": lambda m: None,
             "dead channels": lambda m: (m.layer1[0].bn1.weight.zero_(), m.layer1[0].bn1.bias.fill_(-1)),
             "a dead network": lambda m: [p.zero_() for p in m.parameters()],
             "huge bias": lambda m: m.layer2[1].bn3.bias.fill_(1e4),
             "huge weight": lambda m: m.layer2[1].conv2.weight[3].fill_(1e6),
             "tiny residual": lambda m: (m.layer3[0].bn3.weight.fill_(1e-9), m.layer3[0].bn3.bias.zero_(),
                                         m.layer3[0].downsample[1].weight.mul_(1e-9),
                                         m.layer3[1].bn3.weight.fill_(1e6))}
    for name, change in cases.items():
        model = ResNet50(**fresh.config).eval()
        model.load_state_dict(fresh.state_dict())
        with torch.no_grad():
            change(model)
            logits = resnet50.predict(model, pixels)
        net = resnet50.quantize(model, [pixels])
        for step in net.steps:
            if step.kind == "conv":
                m = net.get_submodule(step.name)
                check_values(name, [w for w in (m.weight, m.weight2) if w is not None], m.bias, m.mult, m.gain)
        got = net(pixels)
        assert torch.equal(got, naive(net, pixels)) and (got - logits).abs().max() <= 0.1 * logits.abs().max(), name


def test_ranges_can_be_given(tmp_path):
    model, pixels = build("pruned"), photographs(3, 64, 64)
    ranges = resnet50.observe(model, pixels.split(1))
    assert same_state(resnet50.quantize(model, ranges=ranges), resnet50.quantize(model, pixels.split(1)))
    assert ranges["layer1.0.downsample.0"][0] < 0 == ranges["layer1.0.conv3"][0]
    halved = resnet50.quantize(model, ranges={**ranges, "layer1.1.conv2": (0.0, ranges["layer1.1.conv2"][1] / 2)})
    exact = resnet50.quantize(model, ranges=ranges)
    assert halved.layer1.get_submodule("1.conv2").scale == exact.layer1.get_submodule("1.conv2").scale / 2


def test_mistakes_of_quantization():
    model = build("plain")
    with pytest.raises(UserError, match="there are none"):
        resnet50.quantize(model, [])
    for value in (float("nan"), float("inf")):
        model = build("plain")
        model.layer2[1].conv2.weight.data[0, 0, 0, 0] = value
        with pytest.raises(UserError, match="layer2.1.conv2: a weight or .* not finite"):
            resnet50.quantize(model, [photographs(1, 64, 64)])
    model = build("plain")
    ranges = resnet50.observe(model, [photographs(1, 64, 64)])
    for value in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="layer3.0.conv1: .*range of the results is not finite"):
            resnet50.quantize(model, ranges={**ranges, "layer3.0.conv1": (0.0, value)})


def test_a_changed_network_is_packed_anew():
    pixels = photographs(2, 64, 64)
    a, b = (resnet50.quantize(build("plain", seed), [pixels]) for seed in (0, 1))
    expected = a(pixels), b(pixels)
    assert not torch.equal(*expected)
    a.load_state_dict(b.state_dict())
    assert torch.equal(a(pixels), expected[1])
    a.to("cpu")
    assert a.packed is None and torch.equal(a(pixels), expected[1])


def test_sparse_weights_are_packed_for_cuda():
    """What a GPU would run, in plain PyTorch: the same bits, and of weights that have changed nothing is left."""
    pixels, nets = photographs(2, 32, 32), []
    for seed in (0, 1):
        model = build("plain", seed, widths={name: 16 for name in WIDTHS})
        for name, mask in masks_2_4(model).items():
            model.get_parameter(name).mul_(mask)
        nets.append(resnet50.quantize(model, [pixels]))
    a, b = nets
    expected = a(pixels), b(pixels)
    a.pack_sparse()
    assert len(a.sparse) == 48 and "conv1" not in a.sparse and torch.equal(a.run(pixels), expected[0])
    a.sparse["layer2.0.conv2"][0].zero_()
    assert not torch.equal(a.run(pixels), expected[0])  # so these are what runs
    for other in (pickle.loads(pickle.dumps(a)), copy.deepcopy(a), copy.copy(a).to("cpu")):
        assert other.sparse is None and torch.equal(other.run(pixels), expected[0])
    a.load_state_dict(b.state_dict())
    assert a.sparse is None and torch.equal(a.run(pixels), expected[1])
    b.get_submodule("layer1.0.conv1").weight[0, :4] = 1
    b.pack_sparse()
    assert len(b.sparse) == 47


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
def test_a_copy_is_packed_for_the_machine_that_it_is_on(dtype, monkeypatch):
    pixels, model = photographs(2, 64, 64), build("plain")
    net = resnet50.quantize(model, [pixels]) if dtype == torch.int8 else resnet50.fuse(model, dtype)
    expected, content = net(pixels), pickle.dumps(net)
    for twin in (pickle.loads(content), copy.deepcopy(net)):
        assert dtype == torch.bfloat16 or twin.packed is None
        assert torch.equal(twin(pixels), expected) and (twin.plan() is None) == (net.plan() is None)
    monkeypatch.setattr(csrc, "has_float", lambda dtype: False)
    if dtype != torch.int8:
        elsewhere, error = pickle.loads(content), 0.05 if dtype == torch.bfloat16 else 1e-5
        assert elsewhere.plan() is None
        torch.testing.assert_close(elsewhere(pixels), expected, rtol=0, atol=error * expected.abs().max().item())
    elif csrc.load():
        net.packed[:] = 0  # no plan of this process: only what is packed anew runs
        assert torch.equal(copy.deepcopy(net)(pixels), expected)


# ---------------------------------------------------------------------------------------------- compile, export

@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_network_is_packed_while_it_is_traced(backend):
    pixels = photographs(2, 64, 64)
    a, b = (resnet50.quantize(build("plain", seed), [pixels]) for seed in (0, 1))
    compiled = torch.compile(a, fullgraph=True, backend=backend)
    assert torch.equal(compiled(pixels), a(pixels))
    a.load_state_dict(b.state_dict())  # the plan of before is no constant of the graph
    assert torch.equal(compiled(pixels), b(pixels))


@pytest.mark.parametrize("variant", ["plain", "se"])
def test_an_exported_network_holds_nothing_of_this_machine(variant, tmp_path):
    pixels, path = photographs(3, 64, 64), str(tmp_path / "int8.pt2")
    net = resnet50.quantize(build(variant), [pixels])
    expected = net(pixels)  # and net is packed now
    batch = torch.export.Dim("batch", max=16)
    torch.export.save(torch.export.export(net, (pixels[:2],), dynamic_shapes={"pixels": {0: batch}}), path)
    program = torch.export.load(path)
    assert torch.equal(program.module()(pixels), expected)
    called = {str(node.target) for node in program.graph.nodes}
    assert "resnet50.conv_int8.default" in called and not any("network" in name or "pack" in name for name in called)


def test_the_fused_network_is_compiled_and_exported():
    model = build("plain")
    fused, x = resnet50.fuse(model), resnet50.normalize(photographs(2, 64, 64), model.preprocess)
    for f in (torch.compile(fused, fullgraph=True, backend="eager"), torch.export.export(fused, (x,)).module()):
        torch.testing.assert_close(f(x), fused(x))
    fused, pixels = resnet50.fuse(model, torch.bfloat16), photographs(2, 64, 64)
    assert torch.equal(torch.compile(fused, fullgraph=True, backend="eager")(pixels), fused(pixels))
    for strict in (True, False):  # an operation at a time: a plan is this machine's
        program = torch.export.export(fused, (pixels,), strict=strict)
        assert not any("network" in str(node.target) for node in program.graph.nodes)
    wanted = fused(resnet50.normalize(pixels, model.preprocess)).float()
    torch.testing.assert_close(program.module()(pixels), wanted)


# -------------------------------------------------------------------------------------------------- checkpoints

def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_checkpoint_round_trip(pair, tmp_path):
    model, net = pair
    path = str(tmp_path / "int8.pt")
    net.preprocess.update(crop=64, resize=72)
    resnet50.save_checkpoint(path, net, classes="abcdefg", metrics={"top1": 1.0})
    raw = torch.load(path, weights_only=True)
    assert raw["format"] == "resnet50/1" and raw["precision"] == "int8" and raw["config"] == model.config
    again = resnet50.build_model(resnet50.load_checkpoint(path), path)
    pixels = photographs(2, 75, 50)
    assert same_state(net, again) and again.preprocess == net.preprocess and not again.training
    assert torch.equal(again(pixels), net(pixels)) and torch.equal(resnet50.predict(again, pixels), net(pixels))
    raw["model"].pop("fc.scale")
    with pytest.raises(UserError, match="int8.pt: does not fit this network: missing fc.scale"):
        resnet50.build_model(raw, path)
    with pytest.raises(UserError, match=f"was made with stem={model.config['stem']}"):
        resnet50.build_model(raw, path, stem="deep" if model.config["stem"] == "small" else "small")
    torch.save({**raw, "precision": "int3"}, path)
    with pytest.raises(UserError, match="int8.pt: precision 'int3'"):
        resnet50.load_checkpoint(path)


def test_checkpoints_of_before_are_float(tmp_path):
    path = str(tmp_path / "f.pt")
    resnet50.save_checkpoint(path, build("plain"), classes="abcdefg")
    raw = torch.load(path, weights_only=True)
    assert raw.pop("precision") == "float"
    torch.save(raw, path)
    assert resnet50.load_checkpoint(path)["precision"] == "float"
    assert isinstance(resnet50.build_model(resnet50.load_checkpoint(path), path), ResNet50)


def test_the_full_network_takes_a_byte_per_weight(tmp_path):
    path = str(tmp_path / "int8.pt")
    net = resnet50.Int8ResNet50()
    resnet50.save_checkpoint(path, net, classes=list(map(str, range(1000))))
    assert 25.5e6 < os.path.getsize(path) < 26.5e6
    assert sum(resnet50.count_macs(net, 64).values()) == sum(resnet50.count_macs(ResNet50(), 64).values())


def test_scripts_take_an_int8_checkpoint_and_training_refuses_it(tiny, tmp_path, run, capsys):
    torch.manual_seed(0)
    model = randomise(ResNet50(num_classes=10, widths=WIDTHS, stem="small")).eval()
    model.preprocess.update(crop=48, resize=56)
    net = resnet50.quantize(model, [photographs(4, 48, 48)])
    path, floating = str(tmp_path / "int8.pt"), str(tmp_path / "float.pt")
    for file, module in ((path, net), (floating, model)):
        resnet50.save_checkpoint(file, module, classes=sorted(os.listdir(os.path.join(tiny, "train"))))

    def score(*args):
        return call(train, "--eval-only", "--data", tiny, "--workers", "0", "--batch-size", "7", "--checkpoint", *args)
    ours, plain, fused = score(path), score(floating), score(floating, "--fused")
    assert ours["images"] == 29 and abs(ours["loss"] - plain["loss"]) < 0.02 * plain["loss"]
    assert abs(fused["loss"] - plain["loss"]) < 1e-5 and fused["top1"] == plain["top1"]
    for args, words in (((path, "--fused"), "not int8"), ((path, "--amp-dtype", "bfloat16"), "int8.pt is int8")):
        with pytest.raises(UserError, match=words) as error:
            score(*args)
        assert error.value.code == 2
    with pytest.raises(UserError, match="--fused goes with --eval-only"):
        call(train, "--data", tiny, "--fused")
    done = run("--data", tiny, "--checkpoint", path, "--out", tmp_path / "o")
    assert done.returncode == 3 and done.stderr.count("\n") == 1 and "cannot be trained" in done.stderr, done.stderr
    capsys.readouterr()
    ours, fused = call(resnet50, "--checkpoint", path), call(resnet50, "--checkpoint", floating, "--fused")
    assert "int8, 48 px" in capsys.readouterr().err and ours["precision"] == "int8"
    assert ours["macs"] == fused["macs"] == sum(resnet50.count_macs(model, 48).values())
    assert fused["params"] == sum(p.numel() for p in model.parameters())
    # two numbers of each batch-norm have become one bias, and a block's downsampling has none of its own
    norms = {k: len(m.weight) for k, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert fused["params"] - ours["params"] == sum(n * (1 + ("downsample" in k)) for k, n in norms.items())


# --------------------------------------------------------------------------------------------- fused, real weights

@pytest.mark.parametrize("dtype, floor", [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)])
def test_fused_equals_the_plain_network(pair, dtype, floor):
    """At most twice the error of PyTorch's own operators at the same precision, both against float64."""
    model, net = pair
    x = resnet50.normalize(photographs(3, 75, 50, seed=4), model.preprocess)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        plain = copy.deepcopy(model).to(dtype)(x.to(dtype))
        fused = resnet50.fuse(model, dtype)(x)
    assert fused.dtype == dtype and fused.isfinite().all()
    assert (fused - exact).abs().max() <= 2 * (plain - exact).abs().max() + floor * exact.abs().max()
    with pytest.raises(UserError, match="float ResNet-50 in float32 or bfloat16, not int8"):
        resnet50.fuse(net)


@pytest.mark.parametrize("dtype, floor", [(torch.bfloat16, 1e-3), (torch.float32, 2e-7)])
@pytest.mark.parametrize("size", [(75, 50), (64, 64), (33, 47)])
def test_fused_from_pixels(pair, size, dtype, floor):
    """float32 logits, by one call where the CPU can: at most twice the error of PyTorch's own operators at the same
    precision, four times that of their direct sums with Winograd's, and then the same bits in batches of any size, by
    any number of threads."""
    model, _ = pair
    pixels, fused = photographs(9, *size, seed=5), resnet50.fuse(model, dtype)
    assert (fused.plan() is not None) == (csrc.has_float(dtype) and model.config["attention"] == "none")
    x = resnet50.normalize(pixels, model.preprocess)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        plain = copy.deepcopy(model).to(dtype)(x.to(dtype))
        logits = resnet50.predict(fused, pixels)
    assert logits.dtype == torch.float32 and logits.shape == exact.shape
    times = 4 if dtype == torch.float32 else 2
    assert (logits - exact).abs().max() <= times * (plain - exact).abs().max() + floor * exact.abs().max()
    if fused.plan() is not None:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            try:
                for n in (1, 2, 9):
                    assert torch.equal(fused(pixels[:n]), logits[:n])
            finally:
                torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_fused_weights_that_are_no_numbers_stay_where_they_are(value, dtype):
    """What is packed for one call has zeros behind a tap, and zero times infinity is no number: these are not."""
    model = build("plain")
    with torch.no_grad():
        model.fc.weight[2, 5] = value
        fused = resnet50.fuse(model, dtype)
        logits = fused(photographs(3, 64, 64))
    assert fused.plan() is None and not logits[:, 2].isfinite().any() and logits[:, :2].isfinite().all()


@torch.no_grad()
def test_fused_bfloat16_computes_an_int8_classifier():
    model, pixels = resnet50.quantize_classifier(build("plain")), photographs(3, 64, 64)
    expected, logits = (resnet50.predict(m, pixels) for m in (model, resnet50.fuse(model, torch.bfloat16)))
    assert (logits - expected).abs().max() <= 0.05 * expected.abs().max()


def test_real_weights_keep_their_accuracy(shared):
    """2015's ImageNet weights, 100 photographs that calibration has not seen: within 2 points."""
    if not csrc.load():
        pytest.skip("takes minutes without the native library")
    path = os.path.join(shared, "resnet50_v1_imagenet.pth")
    model = resnet50.build_model(resnet50.load_checkpoint(path), path, stride_on="1x1")
    transform, pixels, labels = data.eval_transform(model.preprocess), [], []
    with open(os.path.join(shared, "imagenet-cc.csv")) as f:
        for row in list(csv.DictReader(f))[:132]:
            with open(os.path.join(shared, row["path"]), "rb") as image:
                pixels.append(transform(data.decode(image.read())))
            labels.append(int(row["index"]))
    pixels, labels = torch.stack(pixels).permute(0, 3, 1, 2), torch.tensor(labels)
    net = resnet50.quantize(model, pixels[:32].split(8))
    with torch.no_grad():
        a, b = (torch.cat([resnet50.predict(m, batch) for batch in pixels[32:].split(10)]) for m in (model, net))

    def correct(logits):
        return (logits.argmax(1) == labels[32:]).sum().item()
    assert correct(a) >= 85 and abs(correct(a) - correct(b)) <= 2 and (a.argmax(1) == b.argmax(1)).sum() >= 95
