"""The inference operation conv_bn_relu (csrc/cpu/conv_bn_relu.cpp): against float64, with at most twice PyTorch's own
error; its kernels for AVX-512 and AMX, emulated, against the same."""
import ctypes
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import csrc
from csrc import reference
from tests.emulate import kernels as emulate
from tests.test_kernels import preload

NHWC = torch.channels_last
DTYPES = [torch.float32, torch.bfloat16]
LIBRARY = "RESNET50_SANITIZED"  # path of the sanitized build, in the process that preloads the sanitizers
SANITIZED = LIBRARY in os.environ

# n, c, h, w, o, kernel, stride, padding, groups; a number stands for two
LAYERS = {  # ResNet-50's kinds, with fewer pixels and channels, but more than one block and chunk of them
    "stem": (2, 3, 37, 41, 64, 7, 2, 3), "1x1": (3, 64, 17, 17, 64, 1), "3x3": (2, 64, 19, 17, 64, 3, 1, 1),
    "widening": (1, 64, 25, 25, 256, 1), "narrowing": (2, 256, 12, 9, 64, 1),
    "3x3 strided": (3, 64, 23, 23, 80, 3, 2, 1), "downsample": (2, 128, 21, 21, 160, 1, 2),
    "3x3 of layer3": (1, 256, 14, 14, 96, 3, 1, 1), "deep": (5, 2048, 7, 7, 64, 1), "wide": (1, 256, 7, 7, 1024, 1),
    "3x3 of layer4": (8, 128, 7, 7, 96, 3, 1, 1)}
ODD = {
    "one": (1, 1, 1, 1, 1, 1), "pixel": (3, 59, 1, 1, 113, 1), "row": (1, 3, 1, 500, 5, 1),
    "column": (2, 3, 300, 1, 5, 1), "no multiple": (1, 113, 13, 13, 59, 3, 2, 1), "1x1 strided": (2, 5, 9, 7, 17, 1, 2),
    "pruned": (2, 24, 15, 14, 72, 3, 1, 1), "no padding": (1, 10, 6, 6, 33, 3),
    "only padding": (2, 4, 1, 1, 8, 3, 1, 1), "wide padding": (1, 4, 3, 3, 8, 3, 1, 2),
    "padded 1x1": (2, 32, 5, 4, 32, 1, 1, 1), "oblong": (2, 9, 6, 10, 65, (1, 5), (2, 3), (0, 2)),
    "stride beyond the kernel": (2, 34, 14, 11, 48, 2, 3), "split attention": (2, 64, 9, 9, 128, 3, 1, 1, 2),
    "groups": (2, 6, 9, 5, 10, 3, 1, 1, 2), "1x1 groups": (3, 64, 11, 11, 96, 1, 1, 0, 2),
    "depthwise": (2, 7, 8, 5, 7, 3, 1, 1, 7)}


class Case:
    """Arguments of one convolution. Tensors lie between NaNs: what is read beside one of them is seen."""

    def __init__(self, n, c, h, w, o, kernel, stride=1, padding=0, groups=1, dtype=torch.float32, seed=0):
        two = [v if isinstance(v, tuple) else (v, v) for v in (kernel, stride, padding)]
        self.generator = torch.Generator().manual_seed(seed)
        kernel, self.stride, self.padding = two
        self.groups, self.dtype = groups, dtype
        size = [(a + 2 * p - k) // s + 1 for a, p, k, s in zip((h, w), self.padding, kernel, self.stride)]
        self.x = self.tensor(n, c, h, w)
        self.weight = self.tensor(o, c // groups, *kernel, scale=(c // groups * kernel[0] * kernel[1]) ** -0.5)
        self.scale, self.bias = (self.tensor(o, dtype=torch.float32) for _ in range(2))
        self.residual = self.tensor(n, o, *size)

    def tensor(self, *size, scale=1.0, dtype=None):
        values = torch.randn(size, generator=self.generator) * scale
        if SANITIZED:  # which knows where a tensor ends
            return values.to(dtype or self.dtype, memory_format=NHWC if len(size) == 4 else torch.contiguous_format)
        memory = torch.full((size[0] + 2, *size[1:]), float("nan"), dtype=dtype or self.dtype)
        if len(size) == 4:
            memory = memory.to(memory_format=NHWC)
        memory[1:-1] = values
        return memory[1:-1]

    def arguments(self, relu, residual):
        return (self.x, self.weight, self.scale, self.bias, self.residual if residual else None, relu, self.stride,
                self.padding, self.groups)


def formula(x, weight, scale, bias, residual, relu, stride, padding, groups, dtype):
    """PyTorch's operations one by one, all in `dtype`"""
    x, weight, scale, bias = (t.to(dtype) for t in (x, weight, scale, bias))
    y = F.conv2d(x, weight, None, stride, padding, 1, groups) * scale.view(-1, 1, 1) + bias.view(-1, 1, 1)
    y = y if residual is None else y + residual.to(dtype)
    return y.relu() if relu else y


def compare(y, arguments):
    """The largest error is at most twice PyTorch's, plus half a step of the largest result and of the largest sum of
    magnitudes: how far PyTorch's own sums are from one another depends on the width of its vectors, thus on the CPU."""
    dtype = arguments[0].dtype
    exact, plain = formula(*arguments, torch.float64), formula(*arguments, dtype)
    assert y.dtype == dtype and y.shape == exact.shape and y.is_contiguous(memory_format=NHWC) and y.isfinite().all()
    own, other = ((t.double() - exact).abs().max().item() for t in (y, plain))
    terms = formula(*(t.abs() if isinstance(t, torch.Tensor) else t for t in arguments), torch.float64)
    floor = torch.finfo(dtype).eps / 2 * exact.abs().max().item() + 2.0**-24 * terms.max().item()
    assert own <= 2 * other + floor, f"error {own:.3g}, PyTorch's {other:.3g}, floor {floor:.3g}"
    # one rounding: half a step of each result, and float32's error, which grows with the terms of its sum
    allowed = torch.finfo(dtype).eps / 2 * exact.abs() + 2.0**-21 * terms
    assert ((y.double() - exact).abs() <= allowed).all(), "more than one rounding"


@pytest.fixture(scope="module")
def native():
    if not csrc.load():
        pytest.skip("no native extension")
    return torch.ops.resnet50.conv_bn_relu


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", [*LAYERS.values(), *ODD.values()], ids=[*LAYERS, *ODD])
def test_values(native, shape, dtype):
    case = Case(*shape, dtype=dtype)
    for relu, residual in ((True, True), (False, False)):
        arguments = case.arguments(relu, residual)
        compare(native(*arguments), arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", ODD.values(), ids=ODD)
def test_the_reference(shape, dtype):
    """What runs where nothing is compiled, and in float32 on CUDA"""
    case = Case(*shape, dtype=dtype)
    for relu, residual in ((True, True), (False, False)):
        arguments = case.arguments(relu, residual)
        reference.check_conv_bn_relu(*arguments)
        compare(reference.conv_bn_relu(*arguments), arguments)
        if dtype == torch.float32:
            compare(csrc._conv_float32(*arguments), arguments)


@pytest.mark.parametrize("relu, residual", [(True, False), (False, True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
def test_relu_and_residual_are_apart(native, dtype, relu, residual):
    arguments = Case(*LAYERS["1x1"], dtype=dtype).arguments(relu, residual)
    compare(native(*arguments), arguments)


SPLIT = [LAYERS[k] for k in ("stem", "3x3", "widening", "3x3 strided", "wide", "3x3 of layer4")] + [ODD["groups"]]


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", SPLIT, ids=str)
def test_threads_and_batch_change_no_bit(native, shape, dtype):
    arguments = Case(*shape, dtype=dtype).arguments(True, True)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(native(*arguments))
    finally:
        torch.set_num_threads(before)
    x, *others = arguments
    alone = [native(x[i:i + 1], *others[:3], others[3][i:i + 1], *others[4:]) for i in range(len(x))]
    assert all(torch.equal(results[0], y) for y in [*results[1:], torch.cat(alone)])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", [LAYERS["stem"], LAYERS["1x1"], LAYERS["3x3"], *ODD.values()], ids=str)
def test_non_finite_pixels_reach_what_they_touch_and_no_more(native, shape, dtype, value):
    case = Case(*shape, dtype=dtype)
    clean = native(*case.arguments(False, True))
    n, c, h, w = case.x.shape
    touched = torch.zeros(case.x.shape)
    for place in ((n - 1, c - 1, h - 1, w - 1), (0, c // 2, h // 2, w // 2), (0, 0, 0, 0)):
        case.x[place], touched[place] = value, 1
    touched = F.conv2d(touched, torch.ones(case.weight.shape), None, case.stride, case.padding, 1, case.groups) > 0
    y = native(*case.arguments(False, True))
    assert not y[touched].isfinite().any() and torch.equal(y[~touched], clean[~touched])
    if value != value:
        y = native(*case.arguments(True, True))
        assert y[touched].isnan().all() and torch.equal(y[~touched], clean[~touched].relu())


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
def test_non_finite_residuals_scales_and_weights_stay_where_they_are(native, dtype):
    case = Case(2, 64, 9, 8, 59, 1, dtype=dtype)
    clean = native(*case.arguments(True, True))
    case.residual[1, 58, 8, 7], case.residual[0, 3, 0, 0], case.residual[0, 4, 0, 0] = (
        float(v) for v in ("nan", "inf", "-inf"))
    case.scale[16], case.bias[17], case.weight[18, 63] = (float("nan"),) * 3
    y, wrong = native(*case.arguments(True, True)), torch.zeros(clean.shape, dtype=torch.bool)
    wrong[:, 16:19] = wrong[1, 58, 8, 7] = True
    assert y[wrong].isnan().all() and y[0, 3, 0, 0] == float("inf") and y[0, 4, 0, 0] == 0
    wrong[0, 3:5, 0, 0] = True
    assert torch.equal(y[~wrong], clean[~wrong])


def test_bfloat16_rounds_half_to_even(native):
    """A weight of 0 leaves the residual, which is exact; a bias of half a step makes ties."""
    residual = (1 + torch.arange(128) / 128).bfloat16().view(1, 1, 128, 1)
    for sign in (1, -1):
        y = native(torch.ones_like(residual), torch.zeros(1, 1, 1, 1).bfloat16(), torch.ones(1),
                   torch.full((1,), sign * 2.0**-8), sign * residual, False)
        assert torch.equal(y, (sign * (residual.float() + 2.0**-8)).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
def test_small_and_large_numbers(native, dtype):
    """A sum far below and far above 1 keeps its relative precision, up to infinity."""
    case = Case(1, 64, 5, 5, 40, 3, 1, 1, dtype=dtype)
    case.bias.zero_()
    one = native(*case.arguments(False, False)).double()
    for factor in (2.0**-60, 2.0**60):
        case.x *= factor
        torch.testing.assert_close(native(*case.arguments(False, False)).double(), one * factor, rtol=1e-12, atol=0)
        case.x /= factor
    case.x *= 2.0**120
    case.scale *= 2.0**20
    assert native(*case.arguments(False, False)).isinf().all()


@pytest.mark.parametrize("change, message", [
    (dict(x=torch.rand(2, 8, 4, 4)), r"x must be channels_last, expected \(N, C, H, W\)"),
    (dict(x=torch.rand(2, 8, 4)), r"x must be float32 or bfloat16 \(N, C, H, W\).*got shape \(2, 8, 4\)"),
    (dict(x=torch.rand(2, 8, 4, 4).half()), r"x must be float32 or bfloat16 \(N, C, H, W\)"),
    (dict(x=torch.rand(0, 8, 4, 4)), r"x must be .* not empty, got .*\(0, 8, 4, 4\)"),
    (dict(x=torch.rand(2, 8, 2, 4).contiguous(memory_format=NHWC)), r"x \(2, 8, 2, 4\) is smaller than the kernel"),
    (dict(weight=torch.rand(6, 7, 3, 3)), r"weight must be \(O, 8 / groups, kh, kw\).*got \(6, 7, 3, 3\), groups 1"),
    (dict(weight=torch.rand(6, 8, 3, 3)), r"weight must be channels_last, expected \(O, C / groups, kh, kw\)"),
    (dict(weight=torch.rand(6, 8, 3, 3).bfloat16()), r"weight must be float32 \(O, C / groups, kh, kw\)"),
    (dict(groups=3), r"weight must be \(O, 8 / groups, kh, kw\).*groups 3"),
    (dict(stride=[0, 1]), r"stride and groups must be positive"),
    (dict(stride=[1]), r"stride and padding must have two numbers"),
    (dict(padding=[-1, 0]), r"stride .* padding not negative"),
    (dict(scale=torch.rand(7)), r"scale must be float32 \(6,\).*\(7\)"),
    (dict(bias=torch.rand(6).double()), r"bias must be float32 \(6,\)"),
    (dict(bias=torch.rand(12)[::2]), r"bias must be contiguous, expected \(6,\)"),
    (dict(residual=torch.rand(2, 6, 2, 3)), r"residual must be float32 like the output \(N, O, H', W'\)"),
    (dict(residual=torch.rand(2, 6, 2, 2).bfloat16()), r"residual must be float32 like the output"),
    (dict(residual=torch.rand(2, 6, 2, 2)), r"residual must be channels_last, expected like the output"),
])
def test_errors_name_what_is_expected(native, change, message):
    arguments = dict(x=torch.rand(2, 8, 4, 4).contiguous(memory_format=NHWC), scale=torch.rand(6), bias=torch.rand(6),
                     weight=torch.rand(6, 8, 3, 3).contiguous(memory_format=NHWC)) | change
    with pytest.raises(RuntimeError, match="conv_bn_relu: " + message):
        native(**arguments)


@pytest.mark.parametrize("isa", ["plain", "avx2", "vnni"])
def test_instruction_sets(native, isa):
    """Where the library may use no more than this, which is decided once per process."""
    if "RESNET50_ISA" in os.environ or csrc.ISAS.index(csrc.isa()) <= csrc.ISAS.index(isa):
        pytest.skip(f"{isa} is what ran")
    chosen = "values and not emulated or bit or pixels"
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", chosen],
                          env={**os.environ, "RESNET50_ISA": isa, "PYTEST_ADDOPTS": ""}, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stdout


# ----------------------------------------------------------------------------------------------------- emulation

class ConvFloat(ctypes.Structure):  # csrc/cpu/kernels.h
    _fields_ = [(name, ctypes.c_int64) for name in
                ("n", "h", "w", "c", "o", "kh", "kw", "stride_h", "stride_w", "pad_h", "pad_w", "groups")] + \
               [(name, ctypes.c_bool) for name in ("is_bf16", "relu")] + \
               [(name, ctypes.c_void_p) for name in ("x", "weight", "scale", "bias", "residual")]


PATHS = {"AVX-512": ("vnni", False), "AVX-512 BF16": ("vnni", True), "AMX": ("amx", True)}  # isa, whether it has bf16
SANITIZE = ("-Og", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.fixture(scope="module", autouse=True)
def builds(pytestconfig):
    """Starts the two builds of float_conv (tests/emulate/conv_float.cpp), which go on beside the first tests.
    -> for each, plain and sanitized, a function that waits for its path; none without g++, or where one is given"""
    if shutil.which("g++") is None or LIBRARY in os.environ or "RESNET50_ISA" in os.environ:
        return None
    builder = emulate.Builder(pytestconfig.cache.mkdir("kernels"))
    units = ("conv_bn_relu", "conv_float", "layout", "pack", "pool")
    sources = [os.path.join(emulate.SOURCE, f"{unit}.cpp") for unit in units]
    sources.insert(0, os.path.join(emulate.HERE, "conv_float.cpp"))
    wide = ("-mavx2",) if emulate.has_avx2() else ()
    return [builder.start(".so", sources, ("-O1", "-DRESNET50_EMULATED", *wide, *flags), "-shared", *flags)
            for flags in ((), SANITIZE)]


@pytest.fixture(scope="module")
def emulated(builds):
    """-> function of a path and of the operation's arguments"""
    if LIBRARY not in os.environ and builds is None:
        pytest.skip("needs g++")
    library = ctypes.CDLL(os.environ.get(LIBRARY) or builds[0]())

    def call(path, x, weight, scale, bias, residual, relu, stride, padding, groups, threads=1):
        n, c, h, w = x.shape
        o, _, *kernel = weight.shape
        size = [(a + 2 * p - k) // s + 1 for a, p, k, s in zip((h, w), padding, kernel, stride)]
        y = torch.full((n, o, *size), float("nan"), dtype=x.dtype).to(memory_format=NHWC)
        conv = ConvFloat(n, h, w, c, o, *kernel, *stride, *padding, groups, x.dtype == torch.bfloat16, relu,
                         x.data_ptr(), weight.data_ptr(), scale.data_ptr(), bias.data_ptr(),
                         None if residual is None else residual.data_ptr())
        isa, bf16 = PATHS[path]
        assert library.float_conv(ctypes.byref(conv), ctypes.c_void_p(y.data_ptr()), threads, csrc.ISAS.index(isa),
                                  bf16) == 0, "a kernel returned without tile_release"
        return y
    return call


SMALL = {**ODD, "stem": LAYERS["stem"], "1x1": LAYERS["1x1"], "256 channels": (1, 256, 6, 5, 256, 3, 1, 1),
         "1x1 of two blocks": (2, 96, 13, 13, 40, 1), "images left over": (8, 40, 7, 7, 72, 3, 1, 1)}
if SANITIZED:  # several times slower: one shape of each way to copy and to end
    SMALL = {name: SMALL[name] for name in ("pixel", "no multiple", "oblong", "groups", "stem", "256 channels",
                                            "1x1 of two blocks", "images left over")}


@pytest.mark.parametrize("path, dtype", [("AVX-512", torch.float32), *((path, torch.bfloat16) for path in PATHS)],
                         ids=["f32 AVX-512", *(f"bf16 {path}" for path in PATHS)])
@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
def test_emulated_values(emulated, shape, path, dtype):
    case = Case(*shape, dtype=dtype)
    for relu, residual in ((True, True), (False, False)):
        arguments = case.arguments(relu, residual)
        y = emulated(path, *arguments)
        compare(y, arguments)
    assert torch.equal(emulated(path, *arguments, threads=3), y)
    n, c, h, w = case.x.shape
    case.x[n - 1, c - 1, h - 1, w - 1] = case.x[0, 0, 0, 0] = float("nan")
    expected = formula(*case.arguments(False, False), torch.float64)
    assert torch.equal(emulated(path, *case.arguments(False, False)).isnan(), expected.isnan())


def test_sanitizers(builds):
    """The emulated paths where no byte beside a tensor may be touched"""
    if builds is None:
        pytest.skip("needs g++")
    env = {**os.environ, "LD_PRELOAD": preload("libasan.so", "libubsan.so"), "ASAN_OPTIONS": "detect_leaks=0",
           "RESNET50_EXT": "off", LIBRARY: builds[1](), "PYTEST_ADDOPTS": ""}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", "emulated_values"], env=env,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
