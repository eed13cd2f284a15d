"""Post-training quantization: observers against brute force, equalisation, bias correction, fewer bits, mistakes."""
import copy
import csv
import os

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import compress
import csrc
import data
import resnet50
from csrc.reference import check_values
from resnet50 import UserError
from tests.test_int8 import build, naive, photographs, same_state, scaled_as

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=["v1", "se", "split"])  # se: odd widths
def case(request):
    """(float network, batches of calibration, Statistics of its steps)"""
    model, batches = build(request.param), photographs(6, 75, 50).split(4)
    return model, batches, compress.gather(model, batches)


def values_of(kind, n=20000):
    """float32 (5, 4, n / 20): as after a ReLU with a few outliers, signed and lopsided, or constant"""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(n, generator=g)
    x = {"relu": x.relu() * (1 + 30 * (torch.rand(n, generator=g) < 1e-3)),
         "signed": x * 2 - 1.5 * x.square().clamp(max=2), "constant": torch.full((n,), 0.3)}[kind]
    return x.view(5, 4, -1)


def statistics(x, pieces=5):
    found = compress.Statistics()
    for piece in x.split(len(x) // pieces):
        found.add("x", piece)
    return found


# --------------------------------------------------------------------------------------------------- statistics

@pytest.mark.parametrize("kind", ["relu", "signed", "constant"])
def test_statistics_are_those_of_all_values_at_once(kind):
    x = values_of(kind) * torch.tensor([0.0, 1e-6, 1.0, 3.0, 20.0]).view(5, 1, 1)  # the histogram extends, also from 0
    found = statistics(x)
    assert (found.low, found.high) == (min(x.min().item(), 0), x.max().item())
    torch.testing.assert_close(found.max, x.amax((0, 2)).clamp(min=0).double())
    torch.testing.assert_close(found.mean, x.double().mean((0, 2)))
    assert found.counts.sum() == x.numel() and found.counts.numel() == 2 * compress.BINS
    edges = np.linspace(-found.reach, found.reach, 2 * compress.BINS + 1)
    expected = np.histogram(x.double().numpy(), edges)[0]
    moved = np.abs(np.cumsum(expected) - np.cumsum(found.counts.numpy())).max()  # float32 at the edges of bins
    assert moved <= 1e-3 * x.numel()


@pytest.mark.parametrize("kind", ["relu", "signed"])
@pytest.mark.parametrize("share", [0.99, 0.9999])
def test_percentile_is_the_quantile(kind, share):
    x = values_of(kind)
    found = statistics(x)
    low, high = compress.percentile(found, share)
    expected = np.quantile(x.double().numpy(), [1 - share, share], method="inverted_cdf")
    width = found.reach / compress.BINS
    assert abs(high - max(expected[1], 0)) <= 2 * width and abs(low - min(expected[0], 0)) <= 2 * width
    assert (compress.OBSERVERS["percentile"](found) == (low, high)) == (share == 0.9999)


def quantized(x, low, high):
    scale = (high - low) / 255
    zero = round(-low / scale)
    return ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale


@pytest.mark.parametrize("observer, power", [("mse", 2), ("lp", 2.4)])
@pytest.mark.parametrize("kind", ["relu", "signed", "constant"])
def test_search_finds_the_least_error_of_the_values_themselves(kind, observer, power):
    x = values_of(kind).double()
    found = statistics(x.float())

    def error(low, high):
        return (quantized(x, low, high) - x).abs().pow(power).sum().item()
    tried = [error(f * found.low, f * found.high) for f in np.linspace(0.05, 1, 400)]
    got = error(*compress.OBSERVERS[observer](found))
    assert got <= 1.03 * min(tried) + 1e-4 * x.abs().pow(power).sum().item() * (kind == "constant")
    assert kind == "constant" or got < error(found.low, found.high)


def test_entropy_is_tensorrts():
    """The divergence by loops over bins and levels"""
    found = statistics(values_of("relu"))
    width, total, prices = found.reach / compress.BINS, found.counts[compress.BINS:].tolist(), {}
    total[0] = 0  # zeros
    for fraction in (1.0, 0.7, 0.4):
        scale = fraction * found.high / 255
        levels = [min(255, round((i + 0.5) * width / scale)) for i in range(compress.BINS)]
        inside = [i for i in range(compress.BINS) if (i + 0.5) * width < 255.5 * scale]
        p = [total[i] for i in inside]
        p[-1] += sum(total[len(inside):])
        members = {}
        for i in inside:
            members.setdefault(levels[i], []).append(total[i])
        q = [sum(members[levels[i]]) / np.count_nonzero(members[levels[i]]) if total[i] else 0.0 for i in inside]
        prices[fraction] = sum(a / sum(p) * np.log(a / sum(p) / max(b / sum(q), 1e-12)) for a, b in zip(p, q) if a)
        centres = (torch.arange(compress.BINS).double() + 0.5) * width
        ints = (centres / scale).round().clamp(0, 255)
        got = compress.clipped_divergence(found.counts[compress.BINS:], centres, ints, 0, scale)
        assert abs(got - prices[fraction]) < 1e-9 * abs(prices[fraction])
    assert len(set(prices.values())) == 3
    assert compress.OBSERVERS["entropy"](found) == compress.search(found, compress.clipped_divergence)


def test_every_observer_gives_a_network(case):
    model, batches, found = case
    logits = torch.cat([resnet50.predict(model, batch) for batch in batches])
    for observer in compress.OBSERVERS:
        ranges = compress.ranges_of(found, observer)
        assert ranges.keys() == found.keys() and all(low <= 0 <= high for low, high in ranges.values())
        assert all(low >= found[k].low - 1e-6 and high <= found[k].high + 1e-6 for k, (low, high) in ranges.items())
        if observer in ("minmax", "mse", "lp"):
            got = resnet50.quantize(model, ranges=ranges)(torch.cat(batches))
            assert (got - logits).std() < 0.1 * logits.std()
    ours, theirs = compress.ranges_of(found, "minmax"), resnet50.observe(model, batches)
    assert ours == theirs


# ------------------------------------------------------------------------------------------------- equalisation

def test_equalisation_leaves_the_function_and_narrows_the_ranges(case):
    model, batches, _ = case
    before = copy.deepcopy(model.state_dict())
    equal = compress.equalise(model, batches)
    x = resnet50.normalize(torch.cat(batches), model.preprocess).double()
    a, b = (copy.deepcopy(m).double()(x) for m in (model, equal))
    assert (a - b).abs().max() <= 1e-6 * a.abs().max()  # factors are float32, as weights are
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    changed = {k for k, v in equal.state_dict().items() if not torch.equal(v, before[k])}
    split, deep = model.config["attention"] == "split", model.config["stem"] == "deep"
    norms = ["bn1"] + ["conv1.1", "conv1.4"] * deep + [f"{name}.{norm}" for name, block in model.named_modules()
                                                       if isinstance(block, resnet50.Bottleneck)
                                                       for norm in ("bn1", "bn2")[:1 if split else 2]]
    for norm in norms:
        assert {f"{norm}.weight", f"{norm}.bias"} <= changed
    assert {k for k in changed if k.endswith("bias")} == {f"{norm}.bias" for norm in norms}
    for key in ("conv1", "conv2.conv" if split else "conv3", f"downsample.{int(split)}"):
        assert f"layer1.0.{key}.weight" in changed


@pytest.mark.parametrize("variant", ["plain", "se"])
def test_equalisation_is_exact_in_float64(variant):
    model, batches = build(variant).double(), photographs(2, 64, 64).split(2)
    x = resnet50.normalize(batches[0], model.preprocess).double()
    a, b = model(x), compress.equalise(model, batches)(x)
    assert (a - b).abs().max() <= 1e-12 * a.abs().max()


def test_equalised_channels_reach_as_far_as_their_weights():
    """sqrt(activation / weight) makes both proportional, over all that read a channel; rows of weights have scales of
    their own, so what their batch-norms become does not count."""
    model, pixels = build("plain"), photographs(6, 75, 50)
    equal = compress.equalise(model, [pixels])
    before, after = (compress.gather(m, [pixels]) for m in (model, equal))
    for source, *readers in (("conv1", ("layer1.0.conv1", "layer1.0.bn1"),
                              ("layer1.0.downsample.0", "layer1.0.downsample.1")),
                             ("layer2.0.conv1", ("layer2.0.conv2", "layer2.0.bn2")),
                             ("layer3.0.conv2", ("layer3.0.conv3", "layer3.0.bn3"))):
        peak = 0.0
        for conv, norm in readers:
            bn = model.get_submodule(norm)
            gain = (bn.weight / (bn.running_var + bn.eps).sqrt()).abs().view(-1, 1)
            peak = np.maximum(peak, (equal.get_submodule(conv).weight.abs().amax((2, 3)) * gain).amax(0).numpy())
        reach = before[source].max.numpy()
        ratio = (after[source].max.numpy() / peak)[reach > 0.04 * reach.max()]
        assert len(ratio) > 5 and ratio.max() < 1.001 * ratio.min()


def test_equalisation_helps_where_channels_differ():
    """Channels 30 times larger than others, undone by the next convolution, cost nothing once they are equalised."""
    model, pixels = build("plain"), photographs(6, 75, 50)
    for block in model.blocks():
        for bn, conv in ((block.bn1, block.conv2), (block.bn2, block.conv3)):
            factor = torch.ones(len(bn.weight))
            factor[::5] = 30.0
            bn.weight.mul_(factor)
            bn.bias.mul_(factor)
            conv.weight.div_(factor.view(1, -1, 1, 1))
    logits = resnet50.predict(model, pixels)
    error = [(compress.post_training(m, pixels.split(3))(pixels) - logits).std()
             for m in (model, compress.equalise(model, [pixels]))]
    assert error[1] < 0.5 * error[0]


# ---------------------------------------------------------------------------------------- correction, fewer bits

def gptq(weight, hessian, limit):
    """Algorithm 1 of arXiv 2210.17323, in the order of falling diagonal entries, a column at a time; what is zero stays
    zero, as with a mask in arXiv 2301.00774"""
    order = hessian.diagonal().argsort(descending=True)
    inverse = torch.linalg.cholesky(hessian[order][:, order].inverse(), upper=True)
    weight, result = weight[:, order].clone(), torch.zeros_like(weight)
    mask = weight != 0
    for i in range(weight.shape[1]):
        result[:, i] = weight[:, i].round().clamp(-limit, limit) * mask[:, i]
        error = (weight[:, i] - result[:, i]) / inverse[i, i]
        weight[:, i:] -= error[:, None] * inverse[i, i:]
    return result[:, order.argsort()]


@pytest.mark.parametrize("outputs, inputs, limit", [(1, 1, 127), (3, 2, 1), (5, 70, 127), (4, 150, 7)])
def test_weights_are_rounded_as_gptq_does(outputs, inputs, limit):
    g = torch.Generator().manual_seed(inputs)
    x = torch.randn(3 * inputs + 2, inputs, generator=g, dtype=torch.float64).relu() @ torch.randn(
        inputs, inputs, generator=g, dtype=torch.float64)
    hessian = x.T @ x / len(x) + 0.01 * torch.eye(inputs, dtype=torch.float64)
    weight = torch.randn(outputs, inputs, generator=g, dtype=torch.float64) * limit / 2
    sparse = weight * (torch.rand(weight.shape, generator=g) < 0.5)
    assert torch.equal(compress.nearest_plane(sparse, hessian, limit), gptq(sparse, hessian, limit))
    got = compress.nearest_plane(weight, hessian, limit)
    assert torch.equal(got, gptq(weight, hessian, limit))
    cost = lambda ints: ((weight - ints) @ hessian * (weight - ints)).sum()  # noqa: E731
    plain = weight.round().clamp(-limit, limit)
    assert got.abs().max() <= limit and cost(got) <= cost(plain) and (inputs < 70 or cost(got) < 0.8 * cost(plain))


def test_covariance_is_of_what_convolutions_multiply():
    """Two that add up, with strides, padding by a value and groups, against windows cut out one by one"""
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randint(0, 256, size, generator=g, dtype=torch.uint8) for size in ((18, 4, 7, 6), (18, 3, 7, 6)))
    inputs = [(a, (3, 2), 2, 1, 90.0), (b, (1, 1), 2, 0, 0.0)]
    wide = np.pad(a.numpy().astype(float), ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=90)
    windows = [[wide[:, :, i:i + 3, j:j + 2].reshape(18, -1) for j in range(0, 7, 2)] for i in range(0, 7, 2)]
    with pytest.raises(RuntimeError):  # 4 x 4 outputs and 4 x 3
        compress.covariance(inputs, 1)
    inputs[1] = (F.pad(b, (0, 1)), (1, 1), 2, 0, 0.0)
    both = [np.concatenate([windows[i][j], F.pad(b, (0, 1)).numpy()[:, :, 2 * i, 2 * j]], 1)
            for i in range(4) for j in range(4)]
    expected = np.cov(np.concatenate(both), rowvar=False, bias=True)
    torch.testing.assert_close(compress.covariance(inputs, 1, damp=0)[0], torch.from_numpy(expected),
                               rtol=1e-4, atol=0.01)
    rows = np.concatenate([w for row in windows for w in row])
    for k, part in enumerate(compress.covariance(inputs[:1], 2, damp=0.5)):
        expected = np.cov(rows[:, 12 * k:12 * k + 12], rowvar=False, bias=True)
        expected += 0.5 * np.diag(expected).mean() * np.eye(12)
        torch.testing.assert_close(part, torch.from_numpy(expected), rtol=1e-4, atol=0.01)
    some = compress.covariance(inputs[:1], 1, rows=1, damp=0)[0]  # 4 of each image's 16 outputs: 3 for each of 24
    assert 0.7 < (some.diagonal().mean() / np.cov(rows, rowvar=False).diagonal().mean()).item() < 1.3


def means_off(model, net, pixels):
    """{convolution or classifier: mean over its channels of how far an int8 channel's mean is from the float's, divided
    by the standard deviation of the results}"""
    ints, off = {}, {}
    net.run(pixels, watch=lambda step, y: ints.update({step.name: y}))

    def watch(step, y):
        if step.name in ints and step.kind in ("conv", "linear"):
            got = ints[step.name].double()
            if step.kind == "conv":
                module = net.get_submodule(step.name)
                got = (got - module.zero) * module.scale
            dims = [0, 2, 3][:y.dim() - 1]
            off[step.name] = ((got.mean(dims) - y.double().mean(dims)).abs().mean() / y.std()).item()
    resnet50.fuse(model).run(resnet50.normalize(pixels, model.preprocess), watch=watch)
    return off


def test_bias_correction_brings_the_means_of_channels_together(case):
    model, batches, found = case
    pixels = torch.cat(batches)
    for bits in (4, 8):
        plain = resnet50.quantize(model, ranges=compress.ranges_of(found, "mse"), bits=bits)
        corrected = compress.post_training(model, batches, correction="biases", bits=bits)
        before, after = (means_off(model, net, pixels) for net in (plain, corrected))
        assert sum(after.values()) < 0.6 * sum(before.values()) and after["fc"] < max(1e-4, 0.3 * before["fc"])


def test_corrected_weights_bring_the_results_together(case):
    """Of images that were not calibrated with, in fewer bits, where weights make most of the noise"""
    model, batches, found = case
    unseen, last = photographs(10, 75, 50)[6:], [s.name for s in resnet50.flatten(model) if s.kind == "conv"][-1]
    noise = {}
    for correction in ("biases", "weights"):
        net = compress.post_training(model, batches, correction=correction, bits=4)
        noise[correction] = compress.signal_to_noise(model, net, [unseen])[last]
        for step in net.steps:
            if step.kind == "conv":
                m = net.get_submodule(step.name)
                stored = [w for w in (m.weight, m.weight2) if w is not None]
                check_values(step.name, stored, m.bias, m.mult, m.gain)
                assert all(w.abs().max() <= 7 for w in stored)
        assert torch.equal(net(unseen), naive(net, unseen))
    assert noise["weights"] > noise["biases"] + 1, noise


def test_corrected_biases_stay_in_their_bounds():
    """Means that no bias can reach"""
    model, pixels = build("plain"), photographs(2, 64, 64)
    net = resnet50.quantize(model, ranges=resnet50.observe(model, [pixels]))
    before = net(pixels)
    means = {step.name: torch.tensor(1e9, dtype=torch.float64) for step in net.steps}
    compress.Correction(net, model, means).run(pixels)
    for step in net.steps[1:]:
        if step.kind == "conv":
            m = net.get_submodule(step.name)
            assert m.bias.abs().max() <= resnet50.HEADROOM
            check_values(step.name, [w for w in (m.weight, m.weight2) if w is not None], m.bias, m.mult, m.gain)
    assert not torch.equal(net(pixels), before) and torch.equal(net(pixels), net.run(pixels))  # packed anew


@pytest.mark.parametrize("bits, per_tensor", [(8, False), (8, True), (4, False), (4, True), (2, False)])
def test_bits_and_units_of_weights(case, bits, per_tensor):
    model, batches, found = case
    ranges = compress.ranges_of(found, "mse")
    net = resnet50.quantize(model, ranges=ranges, bits=bits, per_tensor=per_tensor)
    for step in net.steps:
        module = net.get_submodule(step.name)
        if step.kind not in ("conv", "linear"):
            continue
        weights = [w for w in (module.weight, getattr(module, "weight2", None)) if w is not None]
        for weight in weights:
            assert all(len(channel.unique()) <= 2 ** bits - 1 for channel in weight), step.name
        if per_tensor:
            assert len((module.mult if step.kind == "conv" else module.scale).unique()) == 1
        if step.kind == "conv":
            check_values(step.name, weights, module.bias, module.mult, module.gain)
    pixels = torch.cat(batches)
    assert torch.equal(net(pixels), naive(net, pixels))
    if (bits, per_tensor) == (8, False):  # nothing but fill_conv's refactoring lies between these
        assert same_state(net, resnet50.quantize(model, ranges=ranges))


# ------------------------------------------------------------------------------------- measures, mistakes, real

def test_signal_to_noise_is_that_of_the_buffers(case):
    model, batches, _ = case
    net = compress.post_training(model, batches)
    got = compress.signal_to_noise(model, net, batches)
    assert list(got) == [s.name for s in resnet50.flatten(model) if s.name in {t.name for t in net.steps}]
    ints, expected, pixels = {}, {}, torch.cat(batches)
    net.run(pixels, watch=lambda step, y: ints.update({step.name: y}))

    def watch(step, y):
        if step.name in ints and step.kind in ("conv", "maxpool", "gate", "avgpool"):
            module = net.get_submodule(scaled_as(net, step.name))
            noise = (ints[step.name].double() - getattr(module, "zero", 0)) * module.scale - y
            expected[step.name] = 10 * np.log10((y.double().square().sum() / noise.square().sum()).item())
    resnet50.fuse(model).run(resnet50.normalize(pixels, model.preprocess), watch=watch)
    assert len(expected) > 45 and all(abs(got[k] - v) < 0.01 for k, v in expected.items())
    assert min(got.values()) > 20


def test_quantization_is_deterministic(case):
    model, batches, _ = case
    assert same_state(compress.post_training(model, batches), compress.post_training(model, batches))


def test_mistakes():
    model, pixels = build("plain"), photographs(1, 64, 64)
    for call in (lambda: compress.post_training(model, []), lambda: compress.gather(model, []),
                 lambda: compress.equalise(model, iter([]))):
        with pytest.raises(UserError, match="there are none"):
            call()
    ranges = resnet50.observe(model, [pixels])
    for value in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="layer3.0.conv1: .*range of the results is not finite"):
            resnet50.quantize(build("plain"), ranges={**ranges, "layer3.0.conv1": (0.0, value)})
        model.layer2[1].conv2.weight[0, 0, 0, 0] = value
        for call in (compress.post_training, compress.gather, compress.equalise):
            with pytest.raises(UserError, match="layer2.1.conv2: results in calibration are not finite"):
                call(model, [pixels])
        with pytest.raises(UserError, match="layer2.1.conv2: a weight or .* not finite"):
            resnet50.quantize(model, ranges=ranges)


def test_a_dead_network():
    model, pixels = build("se"), photographs(2, 64, 64)
    for p in model.parameters():
        p.zero_()
    for observer in compress.OBSERVERS:
        net = compress.post_training(compress.equalise(model, [pixels]), [pixels], observer=observer)
        assert torch.equal(net(pixels), torch.zeros(2, 7))


def test_real_weights_agree_with_the_float_network(shared):
    """2015's ImageNet weights, 32 photographs to calibrate and 100 others: at most four arg-maxima differ."""
    if not csrc.load():
        pytest.skip("takes minutes without the native library")
    path = os.path.join(shared, "resnet50_v1_imagenet.pth")
    model = resnet50.build_model(resnet50.load_checkpoint(path), path, stride_on="1x1")
    transform, pixels = data.eval_transform(model.preprocess), []
    with open(os.path.join(shared, "imagenet-cc.csv")) as f:
        for row in list(csv.DictReader(f))[::3][:132]:
            with open(os.path.join(shared, row["path"]), "rb") as image:
                pixels.append(transform(data.decode(image.read())))
    seen, unseen = torch.stack(pixels).permute(0, 3, 1, 2).split([32, 100])
    net = compress.post_training(model, seen.split(8))
    a, b = (torch.cat([resnet50.predict(m, batch) for batch in unseen.split(10)]).detach() for m in (model, net))
    assert (a.argmax(1) == b.argmax(1)).sum() >= 96 and (a - b).std() < 0.04 * a.std()
