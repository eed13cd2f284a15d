"""The kernels of networks of csrc/cpu, all four on any CPU (tests/emulate), bit for bit against exact numbers in numpy;
the mistakes that these tests must notice; the same cases under sanitizers; what the compiler made of the AVX-512
loops."""
import os
import platform
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import csrc.plan
from resnet50 import ResNet50
from tests.conftest import ROOT
from tests.emulate import kernels as emulate
from tests.emulate.kernels import HERE, ISAS, SOURCE, Case, Kernels, conv_sums, requantize

pytestmark = pytest.mark.skipif(shutil.which("g++") is None or platform.machine() != "x86_64",
                                reason="needs g++ and x86-64")
MAX_MACS = 3e6  # of one layer in test_layers: the emulation does some 10^9 a second
SANITIZE = ("-Og", "-g1", "-fno-sanitize-recover=all")
RACES = (*SANITIZE, "-DRESNET50_EMULATED", "-fsanitize=thread")


@pytest.fixture(scope="session")
def builds(pytestconfig, tmp_path_factory):
    """All that the tests compile, from the start and beside them: {name: function that waits and returns the path}."""
    builder = emulate.Builder(pytestconfig.cache.mkdir("kernels"))
    cpu = lambda *names: [os.path.join(SOURCE, f"{name}.cpp") for name in names]  # noqa: E731
    folder = tmp_path_factory.mktemp("faulty")
    yield dict(
        library=builder.library("-O1"),
        isa=builder.start(".so", cpu("isa"), ["-DRESNET50_EMULATED"], "-shared"),
        faulty=builder.library("-O1", other=plant(folder)),
        sanitized=builder.library(*SANITIZE, "-fsanitize=address,undefined"),
        races=builder.start("", [os.path.join(HERE, "races.cpp"), *cpu("pool")], RACES, *RACES),
        native=builder.start(".so", cpu("conv_vnni", "conv_amx", "conv_f32"), ["-O3"], "-shared"))
    builder.pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def library(builds):
    return builds["library"]()


@pytest.fixture
def kernels(library):
    k = Kernels(library)
    yield k
    assert k.lib.face_configured() == 0, "a kernel returned without tile_release"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("group", emulate.GROUPS)
def test_values(kernels, isa, group):
    emulate.GROUPS[group](kernels, isa)


# ---------------------------------------------------------------------------------------------- the network's layers

def layer_shapes(**config):
    """{(h, w, c, o, kernel, stride, padding)} of the convolutions of ResNet50(**config) at 224 pixels"""
    shapes = set()

    def note(m, inputs, _):
        shapes.add((*inputs[0].shape[2:], m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding))
    with torch.device("meta"):
        model = ResNet50(**config).eval()
        for m in model.modules():
            if isinstance(m, nn.Conv2d):
                m.register_forward_hook(note)
        model(torch.empty(1, 3, 224, 224))
    return shapes


def pruned():
    """Widths that are multiples of 8 and ones that are not, as no table of ours has them."""
    widths = {"layer1": 184, "layer2": 392, "layer3": 619, "layer4": 1001}
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            for conv in (1, 2):
                widths[f"layer{stage + 1}.{block}.conv{conv}"] = (24, 40, 59)[(block + conv) % 3] << stage
    return widths


@pytest.fixture(scope="module")
def layers():
    """A Case of every distinct layer, its image cut to MAX_MACS: channels, window, stride and parity stay. Those with
    1x1 windows and stride 1, such as the last of each block, add a residual."""
    shapes = layer_shapes() | layer_shapes(stride_on="1x1") | layer_shapes(stem="deep") | layer_shapes(widths=pruned())
    cases = []
    for i, (h, w, c, o, kernel, stride, padding) in enumerate(sorted(shapes)):
        macs = h * w * c * o * kernel[0] * kernel[1] / stride[0] / stride[1]
        cut = lambda size: size - 2 * int((size - max(3, size * min(1, MAX_MACS / macs) ** 0.5)) / 2)  # noqa: E731
        cases.append(Case(1, cut(h), cut(w), c, o, kernel, stride, padding, residual=kernel == stride, seed=i))
    return cases


@pytest.mark.parametrize("isa", ISAS)
def test_layers(kernels, isa, layers):
    assert len(layers) > 50
    emulate.check_layers(kernels, isa, layers)


# -------------------------------------------------------------------------------------------------------- networks

def rounded(x):
    """numpy -> the nearest bfloat16, as float32"""
    return torch.from_numpy(x.astype(np.float32)).bfloat16().float().numpy()


def result(step, values, nearest):
    """What one step of csrc/plan.py makes of the activations (n, h, w, c): uint8, or float32 by `nearest`, whole
    numbers in all of FloatNetwork's convolutions."""
    x, kind = values[step["x"]], step["kind"]
    is_float = x.dtype != np.uint8 or "centre" in step
    if kind == "maxpool":
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        return np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))[:, ::2, ::2].max((-1, -2))
    if kind == "avgpool":
        pixels = x.shape[1] * x.shape[2]
        if is_float:
            return nearest(x.sum((1, 2), dtype=np.float32) / np.float32(pixels))[:, None, None]
        mult = np.array((2 * step["mult"] + pixels) // (2 * pixels))  # mult / pixels, rounded half up
        return requantize(x.sum((1, 2), dtype=np.int64), mult)[:, None, None]
    weight, bias = step["weight"].float().numpy(), step["bias"].numpy()
    if kind == "linear" and is_float:
        return (x[:, 0, 0].astype(np.float64) @ weight.T + bias).astype(np.float32)
    if kind == "linear":
        acc = x[:, 0, 0].astype(np.int64) @ weight.astype(np.int64).T + bias
        return (acc * step["scale"].numpy().astype(np.float64)).astype(np.float32)
    if "centre" in step:
        x = x - step["centre"].numpy().astype(np.float64)
    weight, fill = weight.transpose(0, 2, 3, 1), step.get("pad_value")
    acc = conv_sums(x, weight, (step["stride"],) * 2, (step["padding"],) * 2, None if fill is None else fill.numpy())
    if step.get("x2"):
        weight2 = step["weight2"].float().numpy().transpose(0, 2, 3, 1)
        acc += conv_sums(values[step["x2"]], weight2, (step["stride2"],) * 2, (0, 0))
    acc += bias.astype(np.int64)
    if is_float:
        if step.get("residual"):
            acc += values[step["residual"]].astype(np.int64)
        return nearest(np.maximum(acc, 0))
    if step.get("residual"):
        acc += step["gain"].numpy().astype(np.int64) * values[step["residual"]]
    return requantize(acc, step["mult"].numpy())


def execute(steps, pixels):
    values, nearest = {"pixels": pixels}, rounded if steps[0]["weight"].dtype == torch.bfloat16 else np.float32
    for step in steps:
        values[step.get("out", "logits")] = result(step, values, nearest)
    return values["logits"]


class Network:
    """Steps with random weights, scaled as they are added so that `pixels` give values all over 0..255."""

    nearest = None

    def __init__(self, pixels):
        self.rng, self.steps, self.values = np.random.default_rng(7), [], {"pixels": pixels}

    def draw(self, low, high, size, dtype=torch.int32):
        return torch.from_numpy(self.rng.integers(low, high, size)).to(dtype)

    def add(self, kind, x, **step):
        step = dict(kind=kind, x=x, out=f"{len(self.steps)}", **step)
        self.steps.append(step)
        self.values[step["out"]] = result(step, self.values, self.nearest)
        return step["out"]

    def conv(self, x, o, kernel=1, stride=1, x2=None, stride2=1, fill=False, residual=None):
        channels = self.values[x].shape[-1]
        step = dict(weight=self.draw(-128, 128, (o, channels, kernel, kernel), torch.int8), stride=stride,
                    padding=kernel // 2)
        if fill:
            step["pad_value"] = self.draw(60, 200, channels, torch.uint8)
        if x2:
            step |= dict(x2=x2, stride2=stride2,
                         weight2=self.draw(-128, 128, (o, self.values[x2].shape[-1], 1, 1), torch.int8))
        reach = 75 * (channels * kernel ** 2 * 120 ** 2) ** 0.5
        if residual:
            step |= dict(residual=residual, gain=self.draw(int(-reach / 60), int(reach / 60), o).clamp_(-32767, 32767))
        return self.add("conv", x, bias=self.draw(int(-reach), int(reach), o),
                        mult=self.draw(int(2 ** 22 * 40 / reach), int(2 ** 22 * 160 / reach), o), **step)

    def block(self, x, mid, o, stride=1, on_1x1=False, fill=False):
        y = self.conv(x, mid, stride=stride if on_1x1 else 1)
        y = self.conv(y, mid, 3, stride=1 if on_1x1 else stride, fill=fill)
        if self.values[x].shape[-1] == o and stride == 1:
            return self.conv(y, o, residual=x)
        return self.conv(y, o, x2=x, stride2=stride)

    def head(self, x, classes):
        x = self.add("avgpool", x, mult=2 ** 21 + 12345)
        weight = self.draw(-128, 128, (classes, self.values[x].shape[-1]), torch.int8)
        scale = torch.from_numpy(self.rng.uniform(-1e-3, 1e-3, classes).astype(np.float32))
        self.steps.append(dict(kind="linear", x=x, weight=weight, bias=self.draw(-1000, 1000, classes), scale=scale))
        return self.steps


class FloatNetwork(Network):
    """The same in float32. Every sum is exact, in whatever order, so that results are compared in every bit: weights
    are small integers, all but a few of them zeros, so that values grow slowly."""

    dtype, centre, nearest = torch.float32, torch.float32, np.float32

    def sparse(self, *shape, least=3):
        """`least` numbers of -2..1 at each output channel, anywhere in its window"""
        o, k = shape[0], int(np.prod(shape[1:]))
        weight = np.zeros((o, k))
        for row in weight:
            row[self.rng.choice(k, min(least, k), replace=False)] = self.rng.choice((-2, -1, -1, 1, 1), min(least, k))
        return torch.from_numpy(weight.reshape(shape)).to(self.dtype)

    def conv(self, x, o, kernel=1, stride=1, x2=None, stride2=1, fill=False, residual=None):
        step = dict(weight=self.sparse(o, self.values[x].shape[-1], kernel, kernel), stride=stride, padding=kernel // 2)
        if x == "pixels":
            step["centre"] = torch.tensor([124, 0, 255], dtype=self.centre)
        if x2:
            step |= dict(x2=x2, stride2=stride2, weight2=self.sparse(o, self.values[x2].shape[-1], 1, 1))
        if residual:
            step["residual"] = residual
        name = self.add("conv", x, bias=self.draw(-60, 60, o, torch.float32), **step)
        values = self.values[name]
        assert (values > 0).mean() > 0.2 and values.max() < 2 ** 20  # alive, and sums of a few such are exact
        return name

    def head(self, x, classes):
        x = self.add("avgpool", x)
        weight = self.sparse(classes, self.values[x].shape[-1], least=1)  # one sum, one rounding
        self.steps.append(dict(kind="linear", x=x, weight=weight, bias=self.draw(-60, 60, classes, torch.float32)))
        return self.steps


class Bf16Network(FloatNetwork):
    dtype, centre, nearest = torch.bfloat16, torch.uint8, staticmethod(rounded)


def standard(pixels, Network=Network):
    net = Network(pixels)
    x = net.add("maxpool", net.conv("pixels", 64, 7, 2, fill=True))
    for mid, o, stride in ((64, 128, 1), (64, 128, 1), (64, 192, 2), (72, 192, 1), (128, 128, 2)):
        x = net.block(x, mid, o, stride)
    return net.head(x, 59)


def narrow(pixels, Network=Network):
    """Pruned widths, the v1 wiring, a small stem."""
    net = Network(pixels)
    x = net.conv("pixels", 24, 3, fill=True)
    for mid, o, stride in ((24, 40, 1), (59, 40, 1), (24, 113, 2)):
        x = net.block(x, mid, o, stride, on_1x1=True)
    x = net.conv(x, 113, 3, 2)  # three pixels of 113 bytes fill no tiles
    for mid, o, stride in ((24, 113, 1), (59, 64, 2)):
        x = net.block(x, mid, o, stride, on_1x1=True)
    return net.head(x, 1)


def short(pixels, Network=Network):
    """Stages of one block each in the v1 wiring: what strides save goes through sums with two inputs."""
    net = Network(pixels)
    x = net.add("maxpool", net.conv("pixels", 24, 3, fill=True))
    for mid, o, stride in ((24, 40, 1), (24, 48, 2), (16, 72, 2), (24, 40, 2)):
        x = net.block(x, mid, o, stride, on_1x1=True)
    return net.head(x, 5)


def filled(pixels):
    """Borders with values inside the network, as quantizers with zero points need them, before strides of 1 and 2."""
    net = Network(pixels)
    x = net.conv("pixels", 64, 3, fill=True)
    for mid, o, stride in ((64, 64, 1), (64, 128, 2), (128, 128, 1), (24, 64, 2)):
        x = net.block(x, mid, o, stride, fill=True)
    return net.head(x, 10)


def bright(pixels):
    """An average of more pixels than fit 16 bits, of all brightnesses."""
    net = Network(pixels)
    x = net.conv("pixels", 64, 3, fill=True)
    x = net.add("conv", x, weight=torch.zeros(64, 64, 1, 1, dtype=torch.int8), stride=1, padding=0,
                bias=8 * torch.arange(64, dtype=torch.int32), mult=torch.full((64,), 2 ** 22, dtype=torch.int32))
    return net.head(x, 7)


def standard_bf16(pixels):
    return standard(pixels, Bf16Network)


def narrow_bf16(pixels):
    return narrow(pixels, Bf16Network)


def standard_f32(pixels):
    return standard(pixels, FloatNetwork)


def narrow_f32(pixels):
    return narrow(pixels, FloatNetwork)


HAVE = {torch.int8: ISAS, torch.bfloat16: ("vnni", "amx"), torch.float32: [isa for isa in ISAS if isa != "plain"]}
NETWORKS = [(standard, 1, 45, 59), (standard, 11, 17, 23), (standard, 8, 8, 9), (narrow, 3, 13, 9), (narrow, 8, 5, 4),
            (short, 2, 41, 36), (filled, 1, 11, 12), (filled, 16, 5, 6), (bright, 2, 18, 17),
            (standard_bf16, 1, 45, 59), (standard_bf16, 11, 17, 23), (narrow_bf16, 3, 13, 9), (narrow_bf16, 8, 5, 4),
            (standard_f32, 1, 45, 59), (standard_f32, 11, 17, 23), (narrow_f32, 3, 13, 9), (narrow_f32, 8, 5, 4)]


@pytest.fixture(scope="module")
def networks(library, tmp_path_factory):
    """-> .npz files, each with the plan of every instruction set that has one, pixels, and the logits to expect"""
    kernels, paths = Kernels(library), []
    kernel_layout = lambda t: None if t is None else np.ascontiguousarray(t.numpy().transpose(0, 2, 3, 1))  # noqa: E731

    def pack(weight, mult, bias, gain=None, weight2=None, winograd=False):
        vectors = [None if v is None else v.numpy() for v in (mult, bias, gain)]
        return torch.from_numpy(kernels.pack(kernel_layout(weight), *vectors, kernel_layout(weight2), winograd).copy())

    def pack_float(weight, bias, weight2=None, winograd=False):
        bits = lambda t: None if t is None else kernel_layout(  # noqa: E731
            t.view(torch.int16) if t.dtype == torch.bfloat16 else t)
        return torch.from_numpy(kernels.pack_float(bits(weight), bias.numpy(), bits(weight2), winograd).copy())
    for i, (make, n, h, w) in enumerate(NETWORKS):
        pixels = np.random.default_rng(i).integers(0, 256, (n, h, w, 3), np.uint8)
        steps = make(pixels)
        plans = {}
        for isa in HAVE[steps[0]["weight"].dtype]:
            kernels.use(isa)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(csrc.plan, "load", lambda: True)
                patch.setattr(csrc.plan, "isa", lambda: isa)
                patch.setattr(torch.ops.resnet50, "pack_int8", pack, raising=False)
                patch.setattr(torch.ops.resnet50, "pack_float", pack_float, raising=False)
                plan = csrc.plan.build_plan(steps)
                if i % 2:
                    fields = [csrc.plan.FIELDS.index(field) for field in csrc.plan.BATCHES]
                    csrc.plan.steps_of(plan)[:, fields] = csrc.plan.WINOGRAD
                plans[isa] = plan.numpy()
        paths.append(str(tmp_path_factory.mktemp("network") / f"{i}.npz"))
        np.savez(paths[-1], pixels=pixels, logits=execute(steps, pixels), **plans)
    return paths


@pytest.mark.parametrize("isa", ISAS)
def test_networks(kernels, isa, networks):
    for path in networks:
        emulate.check_network(kernels, isa, path)


# ------------------------------------------------------------------------------------------- refusals, choice of ISA

@pytest.mark.parametrize("isa", ISAS)
def test_pack_refuses(kernels, isa):
    kernels.use(isa)
    good = dict(weight=np.full((1, 1, 1, 3), 127, np.int8), mult=2 ** 22, bias=2 ** 31 - 1 - 3 * 255 * 127, gain=0)
    for change, message in (
            ({}, None), (dict(bias=good["bias"] + 1), "could reach 2147483648"),
            (dict(gain=1), "could reach 2147483902"), (dict(mult=2 ** 22 + 1), "mult 4194305 and gain 0"),
            (dict(mult=-1), "mult -1"), (dict(gain=32768, bias=0), "gain 32768"),
            (dict(gain=-32769, bias=0), "gain -32769")):
        given = {k: np.array([v], np.int32) if isinstance(v, int) else v for k, v in (good | change).items()}
        if message:
            with pytest.raises(RuntimeError, match=re.escape(message)):
                kernels.pack(**given)
        else:
            kernels.pack(**given)


@pytest.mark.parametrize("isa", ISAS)
def test_tables_refuse(kernels, isa):
    """Layouts that take the taps of packed weights apart: the channels that each kernel can read so, and no others."""
    kernels.use(isa)
    align = 16 if isa == "amx" else 1
    multiple = {"plain": 1, "avx2": 8, "vnni": 4, "amx": 64}[isa]
    for c in sorted({multiple, 3 * multiple, 2, 4, 12, 32}):
        for stride, layout in ((1, "interleaved"), (2, "planes")):
            case = Case(2, 5, 6, c, 24, (3, 3), (stride, stride), (1, 1), pad_value=True, seed=c)
            options = {"align": align, layout: True, "merged": True}
            if c % multiple:
                with pytest.raises(RuntimeError, match=f"channels in multiples of {multiple}, got {c}$"):
                    kernels.sweep(case, **options)
            else:
                emulate.compare(kernels.sweep(case, **options)[0], case.want, f"{isa}: {layout}: {case.text}")
    for odd in (dict(kernel=(3, 3)), dict(kernel=(3, 3), stride=(2, 1)), dict(kernel=(3, 3), stride=(3, 2)),
                dict(kernel=(1, 2), stride=(2, 1)), dict(padding=(1, 0))):
        with pytest.raises(RuntimeError, match="a window on planes needs strides in multiples of 2, got [13]$"):
            kernels.sweep(Case(1, 5, 6, 64, 24, **odd), align=align, planes=True)
    case = Case(1, 5, 6, 64, 24)  # one tap reads any pixel
    emulate.compare(kernels.sweep(case, align=align, planes=True)[0], case.want, f"{isa}: {case.text}")


def test_choice_of_isa(builds):
    """RESNET50_ISA, which each process reads once; the emulation claims every feature."""
    code = ("import ctypes, sys; name = ctypes.CDLL(sys.argv[1])._ZN3r508isa_nameEv\n"
            "name.restype = ctypes.c_char_p; print(name())")
    for given in ("", "plain", "avx2", "vnni", "amx", "sse"):
        done = subprocess.run([sys.executable, "-c", code, builds["isa"]()], text=True,
                              env={**os.environ, "RESNET50_ISA": given},
                              capture_output=True)
        if given == "sse":
            assert done.returncode and "RESNET50_ISA=sse: none of amx, vnni, avx2, plain" in done.stderr
        else:
            assert done.stdout.strip() == repr((given or "amx").encode()), done.stderr


# ------------------------------------------------------------------------------------------------ the emulation itself

def bf16(values):
    """float32 -> (bits uint16, the value they stand for), cut"""
    bits = values.astype(np.float32).view(np.uint32) >> 16
    return bits.astype(np.uint16), (bits << 16).astype(np.uint32).view(np.float32)


def test_emulated_tiles(kernels):
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (16, 64), np.uint8)
    b = rng.integers(-128, 128, (16, 16, 4), np.int8)  # (k / 4, n, k % 4)
    c = rng.integers(-2 ** 31, 2 ** 31, (16, 16), np.int32)
    c[0], c[1] = 2 ** 31 - 1, -2 ** 31  # sums that wrap
    want = c + a.astype(np.int64) @ b.transpose(0, 2, 1).reshape(64, 16).astype(np.int64)
    kernels.call("face_tile_dot", *(v.ctypes.data_as(emulate.ctypes.c_void_p) for v in (a, b, c)), 0)
    assert want.max() >= 2 ** 31 and want.min() < -2 ** 31 and np.array_equal(c, want.astype(np.int32))

    (a, x), (b, y) = bf16(rng.normal(size=(16, 16, 2))), bf16(rng.normal(size=(16, 16, 2)))  # a: (m, k / 2, k % 2)
    c = rng.normal(size=(16, 16)).astype(np.float32)
    c[0], a[1], x[1] = 1e-39, 1, 0  # denormals count as zeros
    exact = np.where(np.abs(c) < 1e-38, 0, c) + np.einsum("mki,kni->mn", x.astype(np.float64), y.astype(np.float64))
    scale = np.abs(c) + np.einsum("mki,kni->mn", np.abs(x), np.abs(y))
    start = c.copy()
    kernels.call("face_tile_dot", *(v.ctypes.data_as(emulate.ctypes.c_void_p) for v in (a, b, c)), 1)
    assert (np.abs(c - exact) <= 20 * 2 ** -24 * scale).all() and np.array_equal(c[1], start[1]) and (c[0] != 0).all()
    with pytest.raises(RuntimeError, match="without a configuration"):
        kernels.call("face_tile_unconfigured")


# ------------------------------------------------------------------------------------------------------ planted faults

def run_cases(library, *groups, timeout=None, **env):
    return subprocess.run([sys.executable, "-m", "tests.emulate.kernels", library, *groups], cwd=ROOT, timeout=timeout,
                          capture_output=True, text=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1", **env})


FAULTS = {  # what: (file, text, the same with a mistake where FAULT is true, instruction sets, cases that must notice)
    "permutation": ("pack.cpp", "((c / 8 & 1) * 2 + (c & 1)) * 16",
                    "(FAULT ? (c & 1) * 2 + (c / 8 & 1) : (c / 8 & 1) * 2 + (c & 1)) * 16", "vnni,amx", "odd"),
    "gain in the other half": ("pack.cpp", ": c & 1 ?", ": c & (FAULT ? 2 : 1) ?", "vnni,amx", "extremes"),
    "no magic in the start": ("pack.cpp", "if (h.rounding == BIASED) start",
                              "if (h.rounding == BIASED && !FAULT) start", "vnni,amx", "odd"),
    "float past 2^24": ("pack.cpp", "reach >= 1 << 24", "reach >= (1 << 24) + FAULT", "vnni,amx", "extremes"),
    "no clamp after double": ("epilogue512.h", "return _mm512_max_epi32",
                              "if (FAULT) return y; return _mm512_max_epi32", "vnni,amx", "extremes"),
    "panel's last channels": ("epilogue512.h", "(64 - std::min(channels, 64))",
                              "(FAULT ? 0 : 64 - std::min(channels, 64))", "vnni,amx", "odd"),
    "rows of a pass": ("sweep.h", "case 5: run.template operator()<5>()",
                       "case 5: FAULT ? run.template operator()<4>() : run.template operator()<5>()", "vnni", "odd"),
    "rows of a tile": ("conv_vnni.cpp", "tables[slice->operand] + m", "tables[slice->operand] + (FAULT ? 0 : m)",
                       "vnni", "odd"),
    "second operand": ("conv_vnni.cpp", "pixels[slice->operand]", "pixels[FAULT ? 0 : slice->operand]", "vnni", "odd"),
    "dropped row stored": ("conv_amx.cpp", "if (offset >= 0) fin", "if (FAULT || offset >= 0) fin", "amx", "sweeps"),
    "tap": ("conv_amx.cpp", "a1 + *tap, lda", "a1 + (FAULT && tap > in.taps ? tap[-1] : *tap), lda", "amx", "odd"),
    "scratch overwritten": ("conv_amx.cpp", "single ? 0 :", "FAULT || single ? 0 :", "amx", "odd"),
    "rows left over": ("conv_amx.cpp", "if (multiplies >= ROWS", "if (FAULT || multiplies >= ROWS", "amx", "odd"),
    "half in the other's place": ("conv_amx.cpp", "next, 0, unit.acc + HALF", "next, 0, unit.acc + (FAULT ? 0 : HALF)",
                                  "amx", "odd"),
    "last half": ("conv_amx.cpp", "  store_half(unit.acc", "  if (!FAULT) store_half(unit.acc", "amx", "odd"),
    "last unit": ("conv_amx.cpp", "leaving(conv, unit, unit);", "leaving(conv, FAULT ? last : unit, unit);", "amx",
                  "odd"),
    "last group": ("conv_amx.cpp", "*a1 = in.a + in.rows[unit.m + unit.rows - 16]",
                   "*a1 = in.a + in.rows[unit.m + (FAULT ? 0 : unit.rows - 16)]", "amx", "odd"),
    "panel of the rows that wait": ("conv_amx.cpp", "epilogue(conv.w->start(unit.panel)",
                                    "epilogue(conv.w->start(FAULT ? next.panel : unit.panel)", "amx", "odd"),
    "block of 40 rows": ("conv_amx.cpp", "std::clamp(wanted, 1, 2",
                         "FAULT && conv.block ? conv.block : std::clamp(wanted, 1, 2", "amx", "sweeps"),
    "tiles kept": ("conv_amx.cpp", "  tile_release();", "  if (!FAULT) tile_release();", "amx", "gemm"),
    "a window's last row": ("layout.cpp", "std::min(window.kh, in.h + above)",
                            "std::min(window.kh, in.h + above - FAULT)", "vnni,avx2", "odd"),
    "a window's first column": ("layout.cpp", "dx * in.c, of_tap", "(FAULT ? 0 : dx * in.c), of_tap", "vnni,avx2",
                                "odd"),
    "values around left out": ("layout.cpp", "slicing && zeros", "slicing && (FAULT || zeros)", "vnni,avx2", "odd"),
    "next part of the image": ("sweep.h", "std::min(end, here->end)", "std::min(end, FAULT ? end : here->end)",
                               "vnni", "odd"),
    "next part of the image, AVX2": ("conv_avx2.cpp", "m1 - m, segment->end - m}",
                                     "m1 - m, FAULT ? block : segment->end - m}", "avx2", "odd"),
    "beginning of a run": ("conv_avx2.cpp", "k = slice.at;", "k = slice.at + (FAULT ? 8 : 0);", "avx2", "odd"),
    "distance of rows": ("layout.cpp", "all[next].in == first.in + i * step &&",
                         "(FAULT || all[next].in == first.in + i * step) &&", "amx", "odd"),
    "taps of odd widths": ("network.cpp", "f.planes && f.whole", "f.planes && (FAULT || f.whole)", "amx", "network"),
    "another thread's images": ("network.cpp", "pixels + int64_t(begin)",
                                "pixels + int64_t(FAULT ? 0 : begin)", "plain", "network"),
    "rows of a piece": ("network.cpp", "units.part(begin, end, all);",
                        "units.part(begin + (FAULT && begin), end, all);", "plain,avx2", "network"),
    "panels of a piece": ("network.cpp", "units.part(begin, end, conv.w->panels)",
                          "units.part(begin + (FAULT && begin), end, conv.w->panels)", "plain,avx2", "network"),
    "a piece of others": ("pool.cpp", "first = int(own ? begin : end - piece)",
                          "first = int(own ? begin : end - piece + (FAULT && piece > 1))", "plain", "network"),
    "sums beyond 16 bits": ("pooling.cpp", "if (i % FIT == FIT - 1 ||", "if ((i % FIT == FIT - 1 && !FAULT) ||",
                            "plain", "network"),
    "window of the maximum": ("pooling.cpp", "column(2 * x + 1) : here", "column(2 * x + !FAULT) : here",
                              "plain", "network"),
    "first column of a strip": ("pooling.cpp", "column(std::max(2 * x0 - 1,", "column(std::max(2 * x0 - !FAULT,",
                                "vnni,amx", "network"),
    "bf16: second half of a row": ("epilogue512.h", "loadu_epi16(valid1, from + 64)",
                                   "loadu_epi16(valid1, from + (FAULT ? 32 : 64))", "vnni,amx", "network"),
    "bf16: last channels": ("epilogue512.h", "mask_of(left) >> 32", "(FAULT ? 0 : mask_of(left)) >> 32", "vnni,amx",
                            "network"),
    "bf16: residual's other half": ("epilogue512.h", "second, other)", "FAULT ? first : second, other)",
                                    "vnni,amx", "network"),
    "bf16: no ReLU": ("epilogue512.h", "_mm512_max_ps(zero, _mm512_castsi512_ps(sum0))",
                      "_mm512_max_ps(FAULT ? _mm512_castsi512_ps(sum0) : zero, _mm512_castsi512_ps(sum0))", "amx",
                      "network"),
    "bf16: logits of a panel": ("conv_plain.cpp", "size_t(std::min(w.width,", "size_t(std::min(FAULT ? 32 : w.width,",
                                "vnni,amx", "network"),
    "bf16: panel of a row": ("conv_vnni.cpp", "WIDTH * Epilogue::BYTES;", "WIDTH * (FAULT ? 1 : Epilogue::BYTES);",
                             "vnni", "network"),
    "bf16: no centre": ("network.cpp", "type != Type::int8 ?", "type != Type::int8 && !FAULT ?", "vnni,amx", "network"),
    "bf16: average cut": ("pooling.cpp", "bits + 0x7fff +", "bits + (FAULT ? 0 : 0x7fff) +", "vnni,amx", "network"),
    "bf16: order of maxima": ("pooling.cpp", "max_pool_of<uint16_t, BYTES>", "(FAULT ? max_pool_of<uint8_t, BYTES> "
                              ": max_pool_of<uint16_t, BYTES>)", "vnni,amx", "network"),
    "f32: last channels": ("conv_vnni.cpp", "__mmask16(valid >> 16 * v), _mm512_castsi512_ps(bits)",
                           "__mmask16(valid >> 16 * (FAULT ? 0 : v)), _mm512_castsi512_ps(bits)", "vnni,amx",
                           "network"),
    "f32: registers of a residual": ("conv_vnni.cpp", "from + 64 * v);", "from + 64 * (FAULT ? v & 2 : v));",
                                     "vnni,amx", "network"),
    "f32: no centre": ("pooling.cpp", "float(from[i]) - value[i]", "float(from[i]) - (FAULT ? 0 : value[i])",
                       "avx2,vnni", "network"),
    "f32: no ReLU": ("conv_f32.cpp", "_mm256_max_ps(_mm256_setzero_ps(), sum[v])",
                     "_mm256_max_ps(FAULT ? sum[v] : _mm256_setzero_ps(), sum[v])", "avx2", "network"),
    "f32: channels of a panel": ("conv_f32.cpp", "std::min(WIDTH, left))", "std::min(WIDTH, left) - FAULT)", "avx2",
                                 "network"),
    "f32: Winograd's pixels": ("winograd.h", "y[2] = x[2] - x[1];", "y[2] = FAULT ? x[1] - x[2] : x[2] - x[1];",
                               "avx2,vnni", "network"),
    "f32: Winograd's panel of a row": ("conv_vnni.cpp", "WIDTH * Epilogue::BYTES);",
                                       "WIDTH * (FAULT ? 1 : Epilogue::BYTES));", "vnni", "network"),
    "f32: Winograd's tiles": ("winograd.h", "tiles_along(out.w, w.type)", "tiles_along(out.w - FAULT, w.type)",
                              "avx2,vnni", "network"),
    "f32: Winograd beyond the image": ("winograd.h", "y < out.h && x < out.w ?", "y < out.h && (FAULT || x < out.w) ?",
                                       "avx2,vnni", "network"),
    "f32: order of maxima": ("pooling.cpp", "max_pool_of<uint32_t, BYTES>", "(FAULT ? max_pool_of<uint16_t, BYTES> "
                             ": max_pool_of<uint32_t, BYTES>)", "avx2,vnni", "network"),
    "residual without its stride": ("layout.cpp", "x * residual_stride)", "(FAULT ? x : x * residual_stride))",
                                    "plain,vnni,amx", "network"),
    "residual of other channels": ("network.cpp", "residuals[m] + first,", "residuals[m] + (FAULT ? 0 : first),",
                                   "plain", "network"),
    "residual of too few channels": ("network.cpp", "size_t(count));", "size_t(FAULT ? count - 1 : count));",
                                     "plain,vnni,amx", "network"),
    "memory shared within a step": ("network.cpp", "use(b, i, i);", "use(b, i + FAULT, i);", "plain,vnni,amx",
                                    "network"),
    "memory shared between passes": ("network.cpp", "exchanged[buffer] = true", "exchanged[buffer] = !FAULT",
                                     "plain,vnni,amx", "network"),
    "border written over": ("network.cpp", "if (forms[b].border)  //", "if (forms[b].border && !FAULT)  //",
                            "plain,vnni,amx", "network"),
    "residual of dropped rows": ("network.cpp", "if (conv.outs[m] >= 0)", "if (FAULT || conv.outs[m] >= 0)", "amx",
                                 "network"),
    "Winograd: points 2 and -2": ("winograd.h", "y[3] = c + e;", "y[3] = FAULT ? c - e : c + e;", "vnni,avx2",
                                  "winograd"),
    "Winograd: short tile": ("winograd.h", "(x[1] - x[2]) * uint16_t(3)", "(x[1] - x[FAULT ? 0 : 2]) * uint16_t(3)",
                             "vnni,avx2", "winograd"),
    "Winograd: tile's last rows": ("winograd.h", "out.h - tile.y > 2", "out.h - tile.y > (FAULT ? 3 : 2)", "vnni,avx2",
                                   "winograd"),
    "Winograd: place among tiles": ("winograd.h", "tile.place[k] = count[k]++", "tile.place[k] = FAULT ? t - first : "
                                    "count[k]++", "vnni,avx2", "winograd"),
    "Winograd: inverse": ("winograd.h", "(y[x] * INVERSE_9)", "(y[x] * (INVERSE_9 + FAULT))", "vnni,avx2", "winograd"),
    "Winograd: 27 bits": ("pack.cpp", "high - bias[n] < 1 << 25", "high - bias[n] < 1 << (FAULT ? 26 : 25)",
                          "vnni,avx2", "winograd"),
    "Winograd: odd channels": ("pack.cpp", "const int pairs = (c + 1) / 2;", "const int pairs = (c + !FAULT) / 2;",
                               "vnni,avx2", "winograd"),
    "Winograd: tiles of a thread": ("network.cpp", "most, rows.begin", "most, rows.begin + FAULT",
                                    "vnni,avx2", "network"),
    "Winograd: panels of a thread": ("network.cpp", "panels.end);\n        break;", "panels.end - (FAULT && "
                                     "panels.end > 1));\n        break;", "vnni,avx2", "network"),
    "no values around": ("network.cpp", "fill >= 0 &&", "fill >= 0 && !FAULT &&", "amx", "network"),
}


def plant(folder):
    """Copies what FAULTS names, with all the mistakes, each of which EMULATED_FAULT turns on. -> files to compile"""
    texts = {}
    for i, (name, text, wrong, *_) in enumerate(FAULTS.values()):
        if name not in texts:
            with open(os.path.join(SOURCE, name)) as f:
                texts[name] = f.read()
        if texts[name].count(text) != 1:
            pytest.fail(f"{name} has {texts[name].count(text)} times {text!r}: plant {list(FAULTS)[i]!r} anew")
        texts[name] = texts[name].replace(text, wrong.replace("FAULT", f"(emulated_fault == {i})"))
    for name, text in texts.items():
        with open(os.path.join(folder, name), "w") as f:
            f.write(f"extern int emulated_fault;\n{text}")
    return [os.path.join(folder, name) for name in texts if name.endswith(".cpp")]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(builds, networks, fault):
    *_, isas, group = FAULTS[fault]
    if group == "network":  # of the fault's type, or the others take the time that is meant for it
        groups = [f"network={path}" for path, (make, *_) in zip(networks, NETWORKS)
                  if re.findall("f16|f32", make.__name__) == re.findall("f16|f32", fault)]
    else:
        groups = [group]
    try:
        done = run_cases(builds["faulty"](), isas, *groups, timeout=120, EMULATED_FAULT=str(list(FAULTS).index(fault)))
    except subprocess.TimeoutExpired:  # what a stray store has hit can make it loop for ever
        return
    noticed = done.returncode < 0 or "differs" in done.stderr or "takes runs of taps apart needs" in done.stderr
    assert noticed, done.stdout + done.stderr


# --------------------------------------------------------------------------------------------------------- sanitizers

def preload(*names):
    """Sanitizers must come first in a process; libstdc++ with them, for exceptions."""
    paths = [subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
             for name in (*names, "libstdc++.so")]
    if not all(map(os.path.isabs, paths)):
        pytest.skip(f"this g++ comes without {' '.join(names)}")
    return " ".join(paths)


def test_address_and_undefined_behaviour(builds, networks):
    """Operands lie in memory of exactly their size; odd shapes, every layout, whole networks."""
    sanitizers = preload("libasan.so", "libubsan.so")
    done = run_cases(builds["sanitized"](), ",".join(ISAS), "odd", "gemm", "sweeps=12", "winograd=12",
                     *(f"network={networks[i]}" for i in (2, 4, 5, 9, 11)), LD_PRELOAD=sanitizers,
                     ASAN_OPTIONS="detect_leaks=0")
    assert done.returncode == 0 and "all equal" in done.stdout, done.stdout + done.stderr[:4000]


@pytest.mark.skipif("avx2" not in ISAS, reason="only the AVX2 kernel allocates between barriers")
def test_thread_without_memory(library, networks):
    done = run_cases(library, "avx2", f"starved={networks[2]}", timeout=60)
    assert done.returncode == 0 and "all equal" in done.stdout, done.stdout + done.stderr


def test_races(builds):
    """pool.cpp with callers at the same time, barriers and exceptions, under ThreadSanitizer."""
    preload("libtsan.so")
    # libtsan of gcc 12 does not start where the system spreads addresses over more bits than it expects
    same_addresses = ["setarch", "-R"] if shutil.which("setarch") else []
    done = subprocess.run([*same_addresses, builds["races"]()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "done\n", done.stdout + done.stderr[:4000]


# ------------------------------------------------------------------------------------------------------- machine code

def loops(path):
    """-> (function, instructions, how many loops lie within) of every backward jump, from objdump"""
    text = subprocess.run(["objdump", "-d", "--no-show-raw-insn", "-C", path], capture_output=True, text=True,
                          check=True)
    for function in re.split(r"\n(?=[0-9a-f]{16} <)", text.stdout):
        lines = [(int(at, 16), line) for at, line in re.findall(r"^ *([0-9a-f]+):\t(.+)$", function, re.M)]
        index, starts = {at: i for i, (at, _) in enumerate(lines)}, []
        for i, (_, line) in enumerate(lines):
            if (jump := re.match(r"j\w+ +([0-9a-f]+) ", line)) and index.get(int(jump[1], 16), i + 1) <= i:
                start = index[int(jump[1], 16)]
                yield function.split("\n")[0], [line for _, line in lines[start:i + 1]], sum(s >= start for s in starts)
                starts.append(start)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.parametrize("instruction, kernel, most, around, variants", [
    ("vpdpbusd", "multiply", 24, 0, 36), ("vdpbf16ps", "multiply", 24, 0, 10),  # at most: 6 rows x 4 registers
    ("vfmadd231ps", "multiply", 24, 0, 10), ("vfmadd231ps", "conv_f32", 12, 0, 15),
    ("vpdpwssd", "Winograd<", 24, 0, 6), ("vfmadd231ps", "Winograd<", 24, 0, 12),
    ("tdpbusd", "sweep", 4, 9, 9), ("tdpbf16ps", "sweep", 4, 9, 9)])  # 2 x 2 tiles; all loops around them, too
def test_loops_stay_in_registers(builds, instruction, kernel, most, around, variants):
    """The loops around the multiplies, as -O3 compiles them: no vector goes to the stack or comes from it, no function
    is called. Without this the epilogue of AMX takes longer than the multiplies that should hide it."""
    count = 0
    for name, body, within in loops(builds["native"]()):
        if kernel in name and within <= around and 0 < sum(instruction in line for line in body) <= most:
            count += 1
            register = "ymm" if kernel == "conv_f32" or "Avx2" in name else "zmm"
            moved = rf"{register}.*\(%r[sb]p|\(%r[sb]p.*{register}|call"
            assert not [line for line in body if re.search(moved, line)], name
    assert count >= variants
