"""The CUDA kernels against exact references: on the emulator (tests/emulate_cuda), which also sees races, accesses out
of bounds and alignment, values read before they are written; and with a GPU the same cases on that: pytest -m cuda.

compute-sanitizer sees an access out of bounds where every tensor has an allocation of its own, with which no graph can
be recorded: PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python -m pytest -m cuda -k "not graph and not network"
"""
import argparse
import concurrent.futures
import contextlib
import copy
import itertools
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from unittest.mock import MagicMock, call

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import csrc
from compress import masks_2_4
from csrc import graphs, reference
from resnet50 import ResNet50, UserError, fuse, normalize, quantize
from tests.bench import gpu
from tests.conftest import ROOT
from tests.emulate.kernels import ODD, Builder, Case, compare, extremes, requantize
from tests.emulate_cuda import device as emulated
from tests.emulate_cuda import ptx
from tests.emulate_cuda.faults import FAULTS, GROUPS, plant
from tests.test_int8 import VARIANTS, WIDTHS, photographs
from tests.test_resnet50 import randomise

NHWC = torch.channels_last
emulates = pytest.mark.skipif(shutil.which("g++") is None or os.uname().machine != "x86_64",
                              reason="the emulator needs g++ and x86-64")


class Gpu:
    """emulated.Device's calls, on a GPU through the operations of library resnet50."""

    shift = 0

    def __init__(self):  # else PyTorch's own operations would run, and pass
        assert csrc.has_cuda(), f"the extension has no CUDA kernels: {csrc.describe()}"

    def use(self, shift=0, **_):
        self.shift = shift

    def tensor(self, array):
        """An array NHWC, or of fewer dimensions, on the GPU"""
        if array is None:
            return None
        tensor = torch.from_numpy(np.append(np.zeros(self.shift, array.dtype), array)).cuda()
        tensor = tensor[self.shift:].view(array.shape)
        return tensor.permute(0, 3, 1, 2) if tensor.dim() == 4 else tensor

    def array(self, tensor):
        return (tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor).contiguous().cpu().numpy()

    def conv_int8(self, case):
        weight2 = None if case.weight2 is None else case.weight2[:, None, None]
        x, weight, residual, x2, weight2, mult, bias, gain, pad_value = map(self.tensor, (
            case.x, case.weight, case.residual, case.x2, weight2, case.mult, case.bias, case.gain, case.pad_value))
        return self.array(csrc.conv_int8(x, weight, mult, bias, residual, gain, x2, weight2, pad_value, case.stride,
                                         case.padding, case.stride2, case.groups))

    def conv_int8_2_4(self, case):
        packed = [None if w is None else csrc.pack_2_4(torch.from_numpy(w).permute(0, 3, 1, 2)).cuda() for w in (
            case.weight, None if case.weight2 is None else case.weight2[:, None, None])]
        x, residual, x2, mult, bias, gain = map(self.tensor, (case.x, case.residual, case.x2, case.mult, case.bias,
                                                              case.gain))
        return self.array(csrc.conv_int8_2_4(x, packed[0], mult, bias, case.weight.shape[1:3], residual, gain, x2,
                                             packed[1], case.stride, case.padding, case.stride2))

    def gemm_int8(self, *args, **options):
        return self.array(csrc.gemm_int8(*map(self.tensor, args), **{k: self.tensor(v) for k, v in options.items()}))

    def conv_half(self, x, weight, scale, shift, residual=None, relu=True, stride=(1, 1), padding=(0, 0), groups=1,
                  type="bfloat16"):
        half = lambda a: None if a is None else self.tensor(a.view(np.int16)).view(getattr(torch, type))  # noqa: E731
        y = csrc.conv_bn_relu(half(x), half(weight), self.tensor(scale), self.tensor(shift), half(residual), relu,
                              stride, padding, groups)
        return self.array(y.view(torch.int16)).view(np.uint16)

    def max_pool_int8(self, x, *args):
        return self.array(csrc.max_pool_int8(self.tensor(x), *args))

    def avg_pool_int8(self, x, mult):
        return self.array(csrc.avg_pool_int8(self.tensor(x), torch.tensor([mult], dtype=torch.int32, device="cuda")))

    def rows(self, array, type):
        """(m, c) -> (m, c, 1, 1), which is NHWC"""
        if array is None:
            return None
        tensor = self.tensor(array.view(np.int16) if array.dtype == np.uint16 else array)
        return (tensor if array.dtype == np.float32 else tensor.view(getattr(torch, type)))[:, :, None, None].to(
            memory_format=NHWC)

    def flat(self, tensor):
        tensor = tensor[:, :, 0, 0] if tensor.dim() == 4 else tensor
        return tensor.contiguous().cpu().numpy() if tensor.dtype == torch.float32 else \
            tensor.contiguous().view(torch.int16).cpu().numpy().view(np.uint16)

    def bn_relu(self, x, weight, bias, residual=None, eps=1e-5, relu=True, type="float32"):
        csrc.load()
        return [*map(self.flat, torch.ops.resnet50.bn_relu(
            self.rows(x, type), self.tensor(weight), self.tensor(bias), self.rows(residual, type), eps, relu))]

    def bn_relu_backward(self, grad, y, x, weight, mean, invstd, relu=True, residual=False, type="float32"):
        csrc.load()
        made = torch.ops.resnet50.bn_relu_backward(*(self.rows(a, type) for a in (grad, y, x)),
                                                   *map(self.tensor, (weight, mean, invstd)), relu, residual)
        return [self.flat(t) if t.numel() else None for t in made]


@pytest.fixture(scope="session")
def libraries(pytestconfig, tmp_path_factory):
    builder = Builder(pytestconfig.cache.mkdir("cuda"))
    folder = tmp_path_factory.mktemp("faults")
    plant(folder)
    yield dict(right=emulated.start(builder), faulty=emulated.start(builder, faults=str(folder)),
               operations=emulated.start_operations(builder))
    builder.pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def emulator(libraries):
    return emulated.Device(libraries["right"]())


@pytest.fixture(params=[pytest.param("emulated", marks=emulates), pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        return Gpu()
    emulator = request.getfixturevalue("emulator")
    emulator.use(order="shuffled")
    return emulator


# Layers that fill the larger tiles, and those with few pixels and a long k, which is split.
LAYERS = [
    dict(n=1, h=28, w=28, c=64, o=64),
    dict(n=2, h=30, w=27, c=64, o=128, kernel=(3, 3), padding=(1, 1), residual=True),
    dict(n=1, h=14, w=14, c=256, o=256, residual=True),
    dict(n=1, h=7, w=7, c=512, o=64, kernel=(3, 3), padding=(1, 1)),
    dict(n=1, h=7, w=7, c=2048, o=80, residual=True),
    dict(n=3, h=23, w=21, c=80, o=144, stride=(2, 2), c2=48, stride2=(2, 2)),
    dict(n=1, h=7, w=7, c=512, o=144, c2=1024, stride2=(2, 2)),
    dict(n=2, h=15, w=15, c=96, o=160, kernel=(3, 3), padding=(1, 1), stride=(2, 2), groups=2),
    dict(n=8, h=7, w=9, c=16, o=200, kernel=(3, 3), padding=(1, 1)),
    dict(n=1, h=40, w=33, c=3, o=64, kernel=(7, 7), stride=(2, 2), padding=(3, 3), pad_value=True),
]

# Layers that take the larger tiles on up to 196 multiprocessors; smaller ones fill them on the emulator's few.
LARGE = [dict(n=16, h=56, w=56, c=64, o=256, residual=True), dict(n=16, h=56, w=56, c=64, o=256, c2=64),
         dict(n=16, h=56, w=56, c=256, o=128), dict(n=16, h=56, w=56, c=256, o=64)]


@pytest.mark.parametrize("order", emulated.ORDERS)
def test_convolutions_are_exact(device, order):
    """Sizes, strides, groups, paddings, second inputs; odd ones, and the pixels, are put into cells first."""
    for i, shape in enumerate(ODD + LAYERS):
        case = Case(**shape, seed=i)
        device.use(order=order, seed=i)
        compare(device.conv_int8(case), case.want, case.text)


@pytest.mark.parametrize("multiprocessors", [1, 16, 132])
def test_every_tile_and_split_gives_the_same(device, multiprocessors):
    """The number of multiprocessors decides on the tile and on the parts of k."""
    for i, shape in enumerate(LAYERS):
        case = Case(**shape, seed=50 + i)
        device.use(order="shuffled", seed=i, multiprocessors=multiprocessors)
        compare(device.conv_int8(case), case.want, f"{multiprocessors}: {case.text}")


# Those whose weights can be 2:4 sparse, and other numbers of channels and taps.
SPARSE = [shape for shape in LAYERS if shape.get("groups", 1) == 1 and shape["c"] % 16 == 0] + [
    dict(n=1, h=5, w=5, c=16, o=7), dict(n=2, h=9, w=6, c=32, o=17, kernel=(2, 3), residual=True),
    dict(n=1, h=6, w=6, c=176, o=129, kernel=(1, 3), padding=(0, 1), c2=16)]


@pytest.mark.parametrize("multiprocessors", [1, 16, 132])
@pytest.mark.parametrize("order", emulated.ORDERS)
def test_sparse_convolutions_are_exact(device, order, multiprocessors):
    for i, shape in enumerate(SPARSE):
        case = Case(**shape, sparse=True, seed=i)
        device.use(order=order, seed=i, multiprocessors=multiprocessors)
        compare(device.conv_int8_2_4(case), case.want, case.text)
    for value in (-128, 127):  # the largest sums
        case = Case(n=1, h=6, w=6, c=512, o=20, kernel=(3, 3), x=np.full((1, 6, 6, 512), 255),
                    weight=np.full((20, 3, 3, 512), value), sparse=True)
        compare(device.conv_int8_2_4(case), case.want, case.text)


# threads and bytes of shared memory of a block, for uint8 results (csrc/cuda/conv.cuh)
TILES = [(128, 32 << 10), (256, 48 << 10), (256, 64 << 10), (128, 64 << 10), (128, 80 << 10), (256, 96 << 10)]


@pytest.mark.parametrize("tile", range(len(TILES)))
def test_every_tile_gives_the_same(device, tile, monkeypatch):
    monkeypatch.setenv("RESNET50_TILE", str(tile))
    for i, shape in enumerate((LAYERS[1], LAYERS[5], LAYERS[7])):
        case = Case(**shape, seed=80 + i)
        compare(device.conv_int8(case), case.want, f"tile {tile}: {case.text}")
        if isinstance(device, emulated.Device) and i < 2:  # the third has fewer rows than some
            assert (device.lib.device_threads(), device.lib.device_shared()) == TILES[tile]
    rng = np.random.default_rng(tile)
    a, b = rng.integers(0, 256, (300, 80), np.uint8), rng.integers(-128, 128, (130, 80), np.int8)
    np.testing.assert_array_equal(device.gemm_int8(a, b), a.astype(np.int32) @ b.T.astype(np.int32))
    x, weight = (rng.normal(size=s).astype(np.float16).view(np.uint16) for s in ((1, 15, 19, 24), (72, 3, 3, 24)))
    ones = np.ones(72, np.float32)
    got = device.conv_half(x, weight, ones, ones, padding=(1, 1), type="float16")
    monkeypatch.setenv("RESNET50_TILE", "0")
    np.testing.assert_array_equal(got, device.conv_half(x, weight, ones, ones, padding=(1, 1), type="float16"))


# the same with sparse weights: four buffers of 64 bytes for a pixel, 40 for a channel
SPARSE_SHARED = [4 * (64 * m + 40 * n) for m, n in (
    (64, 64), (128, 64), (128, 128), (128, 128), (256, 64), (256, 128))]


@pytest.mark.parametrize("tile", range(len(TILES)))
def test_every_tile_gives_the_same_of_sparse_weights(device, tile, monkeypatch):
    monkeypatch.setenv("RESNET50_TILE", str(tile))
    for i, shape in enumerate((LAYERS[1], LAYERS[5], LAYERS[6])):
        case = Case(**shape, sparse=True, seed=90 + i)
        compare(device.conv_int8_2_4(case), case.want, f"tile {tile}: {case.text}")
        if isinstance(device, emulated.Device) and i < 2:  # the third has fewer rows than some
            assert (device.lib.device_threads(), device.lib.device_shared()) == (TILES[tile][0], SPARSE_SHARED[tile])
            assert device.lib.device_conflicts() == 0


@emulates
def test_sparse_weights_halve_the_multiplies(emulator):
    emulator.use()
    case = Case(n=1, h=16, w=16, c=64, o=64, kernel=(3, 3), padding=(1, 1), sparse=True)
    emulator.conv_int8(case)
    dense = emulator.lib.device_multiplies()
    emulator.conv_int8_2_4(case)
    assert 2 * emulator.lib.device_multiplies() == dense


@emulates
def test_tiles_that_do_not_fit_are_left_out(emulator, monkeypatch):
    """Blocks of sm_86 and sm_89 have 99 KiB of shared memory; 256 x 128 sums of 32 bits pass through more."""
    monkeypatch.setenv("RESNET50_TILE", "5")
    emulator.use(multiprocessors=16)
    a, b = np.ones((300, 64), np.uint8), np.ones((130, 64), np.int8)
    try:
        for kib, threads in ((227, 256), (99, 128)):  # the second is the first way, 64 x 64
            emulator.lib.device_shared_limit(kib << 10)
            assert (emulator.gemm_int8(a, b) == 64).all() and emulator.lib.device_threads() == threads
    finally:
        emulator.lib.device_shared_limit(227 << 10)


@emulates
def test_the_fastest_way_is_found_once(emulator):
    emulator.use(multiprocessors=16)
    try:
        for width, tile in ((21, 2), (22, 5), (21, 2)):  # a width of its own per problem, the third is known
            case = Case(n=1, h=20, w=width, c=64, o=128, seed=1)
            emulator.lib.device_fastest(tile)
            compare(emulator.conv_int8(case), case.want, case.text)
            known = emulator.lib.device_measured()
            compare(emulator.conv_int8(case), case.want, case.text)
            assert (emulator.lib.device_threads(), emulator.lib.device_shared()) == TILES[tile]
            assert emulator.lib.device_measured() == known
        assert known == 0
    finally:
        emulator.lib.device_fastest(-1)


def test_a_gpu_without_our_kernels_does_not_pass(monkeypatch):
    monkeypatch.setattr(csrc, "has_cuda", lambda: False)
    with pytest.raises(AssertionError, match="no CUDA kernels"):
        Gpu()
    with pytest.raises(UserError, match="no CUDA kernels"):
        gpu.main(argparse.Namespace(device="cuda"))


@pytest.mark.cuda
def test_larger_tiles_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    for i, shape in enumerate(LARGE):
        case = Case(**shape, seed=i)
        compare(Gpu().conv_int8(case), case.want, case.text)


def test_extremes(device):
    for name, case, _ in extremes():
        compare(device.conv_int8(case), case.want, name)


@emulates
def test_fragments_are_loaded_without_conflicts(emulator, monkeypatch):
    emulator.use()
    for i, shape in enumerate(LAYERS):
        emulator.conv_int8(Case(**shape, seed=i))
        assert emulator.lib.device_multiplies() > 0 and emulator.lib.device_conflicts() == 0
    for tile in range(len(TILES)):
        monkeypatch.setenv("RESNET50_TILE", str(tile))
        emulator.conv_int8(Case(**LAYERS[1], seed=1))
        assert emulator.lib.device_shared() == TILES[tile][1] and emulator.lib.device_conflicts() == 0


@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (5, 2048, 100), (70, 59, 113), (3, 512, 16), (129, 80, 65)])
def test_gemm(device, m, k, n):
    rng = np.random.default_rng(m)
    a, b = rng.integers(0, 256, (m, k), np.uint8), rng.integers(-128, 128, (n, k), np.int8)
    bias, scale = rng.integers(-10 ** 6, 10 ** 6, n, np.int32), (rng.random(n) - 0.5).astype(np.float32)
    sums = a.astype(np.int64) @ b.T.astype(np.int64)
    mult = rng.integers(0, 2 ** 22 // max(int(np.abs(sums).max()) // 128, 1) + 2, n).astype(np.int32)
    compare(device.gemm_int8(a, b), sums.astype(np.int32), "sums")
    compare(device.gemm_int8(a, b, bias), (sums + bias).astype(np.int32), "sums and bias")
    want = ((sums + bias).astype(np.float64) * scale.astype(np.float64)).astype(np.float32)
    compare(device.gemm_int8(a, b, bias, scale=scale), want, "float32")
    compare(device.gemm_int8(a, b, bias, mult=mult), requantize(sums + bias, mult), "uint8")
    compare(device.gemm_int8(a, b, mult=mult), requantize(sums, mult), "uint8 without bias")


@pytest.mark.parametrize("size, kernel, stride, padding", [
    ((2, 9, 7, 48), 3, 2, 1), ((1, 5, 6, 3), 2, 2, 0), ((3, 8, 8, 16), 1, 1, 0), ((1, 7, 4, 17), 4, 3, 2)])
def test_pools(device, size, kernel, stride, padding):
    x = np.random.default_rng(kernel).integers(0, 256, size, np.uint8)
    nchw = torch.from_numpy(x).permute(0, 3, 1, 2)
    want = reference.max_pool_int8(nchw, kernel, stride, padding).permute(0, 2, 3, 1).contiguous().numpy()
    compare(device.max_pool_int8(x, kernel, stride, padding), want, "max")
    pixels = size[1] * size[2]
    for mult in (0, pixels // 2, 1000 * pixels + 1, 2 ** 22):
        want = reference.avg_pool_int8(nchw, torch.tensor([mult], dtype=torch.int32)).numpy()
        compare(device.avg_pool_int8(x, mult), want, f"mean, {mult}")


def bits(tensor):
    """16-bit floats NHWC or flat -> uint16"""
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


HALVES = [  # n, h, w, c, o, kernel, stride, padding, groups
    (2, 9, 7, 32, 64, 3, 1, 1, 1), (1, 11, 13, 3, 24, 7, 2, 3, 1), (1, 7, 7, 512, 80, 1, 1, 0, 1),
    (3, 17, 17, 64, 136, 3, 2, 1, 2), (1, 1, 1, 1, 1, 1, 1, 0, 1), (1, 30, 30, 64, 128, 1, 1, 0, 1),
    (2, 6, 5, 59, 113, 3, 1, 1, 1), (1, 8, 8, 8, 8, 2, 1, 1, 1)]
LARGE_HALVES = [(16, 56, 56, 64, 256, 1, 1, 0, 1), (16, 56, 56, 256, 64, 1, 1, 0, 1)]


@pytest.mark.parametrize("type", ["bfloat16", "float16"])
def test_conv_bn_relu_rounds_once(device, type):
    """Within the rounding of the result, one part in 2^8 or 2^11, and of float32 sums, which are below 4. Tensor cores
    cut these off, once for each 8 of k (Fasi et al., Numerical behavior of NVIDIA tensor cores, 2021)."""
    dtype = getattr(torch, type)
    cases = HALVES + LARGE_HALVES * isinstance(device, Gpu)
    for i, (n, h, w, c, o, k, stride, padding, groups) in enumerate(cases):
        g = torch.Generator().manual_seed(i)
        x = torch.randn(n, h, w, c, generator=g).to(dtype)
        weight = (torch.randn(o, k, k, c // groups, generator=g) / (k * k * c // groups) ** 0.5).to(dtype)
        scale, shift = torch.rand(o, generator=g), torch.randn(o, generator=g)
        exact = F.conv2d(x.double().permute(0, 3, 1, 2), weight.double().permute(0, 3, 1, 2), None, stride, padding, 1,
                         groups) * scale[:, None, None].double() + shift[:, None, None].double()
        residual = torch.randn(exact.shape, generator=g).to(dtype) if i % 2 == 0 else None
        exact = exact if residual is None else exact + residual.double()
        exact = (exact.relu() if i % 3 else exact).permute(0, 2, 3, 1)
        got = device.conv_half(bits(x), bits(weight), scale.numpy(), shift.numpy(),
                               None if residual is None else bits(residual.permute(0, 2, 3, 1)), bool(i % 3),
                               (stride,) * 2, (padding,) * 2, groups, type)
        got = torch.from_numpy(got.view(np.int16)).view(dtype).double()
        limit = exact.abs() * 2.0 ** (-8 if type == "bfloat16" else -11) + 1e-6 + (
            k * k * c // groups / 8 + 2) * 2.0 ** -22
        assert ((got - exact).abs() <= limit).all(), (i, ((got - exact).abs() / limit).max())


@pytest.mark.parametrize("channels, stride, where", [(16, 1, slice(3, 6)), (3, 2, slice(2, 3))])
def test_not_a_number_stays_in_its_window(device, channels, stride, where):
    x = np.zeros((1, 9, 9, channels), np.uint16)
    x[0, 4, 4, 2] = 0x7fc0
    weight = np.full((16, 3, 3, channels), 0x3f80, np.uint16)
    y = device.conv_half(x, weight, np.ones(16, np.float32), np.ones(16, np.float32), None, True, (stride, stride),
                         (1, 1))
    nan = (y & 0x7fff) > 0x7f80
    inside = np.zeros(y.shape[1:3], bool)
    inside[where, where] = True
    assert (nan == inside[None, :, :, None]).all() and (y[~nan] == 0x3f80).all()


# --------------------------------------------------------------------------------------------------- batch-norm

@pytest.mark.parametrize("type", emulated.FLOATS)
@pytest.mark.parametrize("m, c, offset", [(300, 64, 0), (77, 24, 100), (5, 3, 0), (2, 1, -3), (1500, 16, 1000),
                                          (40, 264, 5)])
def test_bn_relu(device, type, m, c, offset):
    """Forward and backward against float64; an offset of many deviations costs no more than x's own rounding."""
    g, dtype = torch.Generator().manual_seed(m), getattr(torch, type)
    x, residual, grad = ((torch.randn(m, c, generator=g) + o).to(dtype) for o in (offset, 0, 0))
    weight, bias = torch.rand(c, generator=g) + 0.5, torch.randn(c, generator=g)
    array = lambda t: t.numpy() if type == "float32" else bits(t)  # noqa: E731
    wide = lambda a: torch.from_numpy(a).double() if a.dtype == np.float32 else \
        torch.from_numpy(a.view(np.int16)).view(dtype).double()  # noqa: E731
    ulp = dict(float32=2e-6, float16=2 ** -10, bfloat16=2 ** -7)[type]
    for with_residual, relu in ((False, False), (False, True), (True, True)):
        y, mean, invstd = device.bn_relu(array(x), weight.numpy(), bias.numpy(), array(residual) if with_residual else
                                         None, relu=relu, type=type)
        four = [t.double()[:, :, None, None] for t in (x, residual, grad)]
        exact = reference.bn_relu(four[0], weight.double(), bias.double(), four[1] if with_residual else None, 1e-5,
                                  relu)
        torch.testing.assert_close(torch.from_numpy(mean).double(), exact[1], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(torch.from_numpy(invstd).double(), exact[2], rtol=1e-4 if offset else 1e-5, atol=0)
        torch.testing.assert_close(wide(y), exact[0][:, :, 0, 0], rtol=ulp, atol=max(ulp, abs(offset) * 1e-6) * 4)
        made = device.bn_relu_backward(array(grad), y, array(x), weight.numpy(), mean, invstd, relu, with_residual,
                                       type)
        want = reference.bn_relu_backward(four[2], wide(y)[:, :, None, None], four[0], weight.double(),
                                          *(torch.from_numpy(a).double() for a in (mean, invstd)), relu, with_residual)
        assert (made[1] is None) == (not with_residual)
        largest = float((grad.double().abs() * torch.from_numpy(invstd) * weight).max())  # of what cancels in dx
        for got, expected in zip(made, want):
            if got is not None:
                expected = expected[:, :, 0, 0] if expected.dim() == 4 else expected
                scale = max(float(expected.abs().max()), largest) + 1e-3
                torch.testing.assert_close(wide(got), expected, rtol=ulp, atol=scale * max(ulp, 1e-5))


def test_bn_relu_gradient_of_not_a_number(device):
    """PyTorch's ReLU passes the gradient where its result is not a number."""
    x, one = np.float32([[1, 2], [3, 4], [5, 6]]), np.ones(2, np.float32)
    y = np.float32([[np.nan, 0], [1, -1], [0, 2]])
    _, dresidual, _, dbias = device.bn_relu_backward(np.full((3, 2), 7, np.float32), y, x, one, one, one, True, True)
    assert np.array_equal(dresidual, np.float32([[7, 0], [7, 0], [0, 7]])) and np.array_equal(dbias, [14, 7])


def test_tensors_at_odd_addresses(device):
    """Where views of larger ones may lie: nothing is read 16 bytes at a time then."""
    device.use(order="shuffled", shift=1)
    case = Case(n=1, h=9, w=7, c=32, o=48, residual=True, c2=16, sparse=True)
    compare(device.conv_int8(case), case.want, case.text)
    compare(device.conv_int8_2_4(case), case.want, case.text)
    test_pools(device, (2, 9, 7, 48), 3, 2, 1)
    for type in emulated.FLOATS:
        test_bn_relu(device, type, 77, 24, 100)


# --------------------------------------------------------------------------------------------------- planted faults

def in_process(library, group, fault):
    """A process of its own, which a fault may end."""
    return subprocess.run([sys.executable, "-m", "tests.emulate_cuda.faults", library, group], cwd=ROOT, text=True,
                          capture_output=True, timeout=120, env={**os.environ, "EMULATED_FAULT": str(fault)})


@emulates
@pytest.mark.parametrize("group", [*GROUPS, "norm", "extremes"])
def test_without_a_fault_nothing_is_said(libraries, group):
    done = in_process(libraries["faulty"](), group, -1)
    assert done.returncode == 0, done.stderr


@emulates
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(libraries, fault):
    *_, said, group = FAULTS[fault]
    done = in_process(libraries["faulty"](), group, list(FAULTS).index(fault))
    assert done.returncode == 1 and re.search(said, done.stderr.splitlines()[-1]), done.stderr


# --------------------------------------------------------------------------------------------------- whole networks

# name: (configuration, image size, images). Widths that are multiples of 16 are read in place, others put into cells.
SIXTEENS = {name: (width + 15) // 16 * 16 for name, width in WIDTHS.items()}
NETWORKS = dict(sixteens=(dict(widths=SIXTEENS), 64, 2), plain=(VARIANTS["plain"], 33, 3), v1=(VARIANTS["v1"], 40, 1),
                pruned=(VARIANTS["pruned"], 64, 1), se=(VARIANTS["se"], 64, 1), split=(VARIANTS["split"], 32, 1),
                sparse=(dict(widths=SIXTEENS), 64, 2), deep=(VARIANTS["deep"], 40, 1))


def network(name):
    """-> Int8ResNet50 and pixels"""
    config, size, batch = NETWORKS[name]
    torch.manual_seed(0)
    model = randomise(ResNet50(**{"num_classes": 7, "widths": WIDTHS, **config}), 0).eval().requires_grad_(False)
    if name == "sparse":
        for parameter, mask in masks_2_4(model).items():
            model.get_parameter(parameter).mul_(mask)
    model = quantize(model.to(memory_format=NHWC), photographs(5, 75, 50).split(2))
    return model, photographs(batch, size, size, seed=1)


@emulates
def test_networks_have_the_bits_of_the_cpu(libraries, tmp_path):
    """Through the same Python as on a GPU: bindings, checks, operations, the network's steps."""
    saved = []
    for name in NETWORKS:
        model, pixels = network(name)
        saved.append((name, model.config, model.state_dict(), pixels, model(pixels)))
    torch.save(saved, tmp_path / "networks.pt")
    code = f"""
import pytest, torch, csrc
from resnet50 import Int8ResNet50, ResNet50, fuse
from tests.test_csrc import WRONG_SPARSE, arguments_of
from tests.test_cuda import SIXTEENS, photographs, randomise
csrc.load()
torch.ops.load_library({libraries["operations"]()!r})
for name, config, state, pixels, logits in torch.load({str(tmp_path / "networks.pt")!r}, weights_only=True):
    model = Int8ResNet50(**config)
    model.load_state_dict(state)
    model.pack_sparse()  # as on CUDA
    assert len(model.sparse) == (48 if name == "sparse" else 0)  # all but conv1, four of them with a downsample
    with torch.no_grad():
        got = model(pixels)
    assert torch.equal(got, logits), (name, (got - logits).abs().max())

with pytest.raises(RuntimeError, match="CUDA out of memory"):
    torch.ops.resnet50.gemm_int8(*(torch.zeros(2 ** 24, 1, dtype=d) for d in (torch.uint8, torch.int8)))
right = arguments_of("conv_int8_2_4")  # by the bindings, what the reference's checks refuse, too
torch.ops.resnet50.conv_int8_2_4(*right.values())
for change, message in WRONG_SPARSE:
    with pytest.raises(RuntimeError, match="conv_int8_2_4: .*" + message):
        torch.ops.resnet50.conv_int8_2_4(*{{**right, **change}}.values())

torch.manual_seed(0)
model = randomise(ResNet50(num_classes=7, widths=SIXTEENS), 0).eval().requires_grad_(False)
x = photographs(2, 64, 64, seed=1).float() / 99 - 1
want, got = model(x), fuse(model, torch.bfloat16)(x.bfloat16()).float()
assert (got - want).abs().max() < 0.05 * want.abs().max(), (got - want).abs().max()  # 50 roundings to 8 bits
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "RESNET50_EXT": "off"})
    assert done.returncode == 0, done.stderr


@pytest.mark.cuda
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_on_a_gpu_has_the_bits_of_the_cpu(name):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model, pixels = network(name)
    logits = model(pixels)
    assert torch.equal(model.cuda()(pixels.cuda()).cpu(), logits)
    assert bool(model.sparse) == (name == "sparse")
    many = pixels.repeat(70, 1, 1, 1)[:70]  # enough that slices are tried
    assert torch.equal(model(many.cuda()).cpu(), logits.repeat(70, 1)[:70]) and model.graphs.chosen.keys() > {96}


# --------------------------------------------------------------------------------------------------- graphs

@pytest.fixture
def record(monkeypatch):
    """record(function) -> Graphs of it, without a GPU: to replay is to compute anew in the memory of the recording.
    Streams are numbers, of which each priority has 32 that are handed out in turn, as PyTorch does it."""
    for name in ("device", "stream", "Stream", "Event", "current_stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    pools = {priority: itertools.cycle([MagicMock(name=f"{priority}.{i}") for i in range(32)]) for priority in (0, -1)}
    monkeypatch.setattr(torch.cuda, "Stream", lambda priority=0: next(pools[priority]))

    def made(function, *ways):
        runs = []

        def watched(x, **way):
            runs.append((x, function(x, **way), way))
            return runs[-1][1]

        class Recording:
            def __init__(self):
                self.at = len(runs)  # the run that follows

            def replay(self):
                x, y, way = runs[self.at]
                y.copy_(function(x, **way))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
        return graphs.Graphs(watched, *ways)
    return made


def test_graphs_are_few_and_fill_up_their_batches(record, monkeypatch):
    function = lambda x: x.float().mean((2, 3))  # noqa: E731
    network, pixels = record(function), photographs(70, 4, 4)
    kept = [(network(pixels[:n]), function(pixels[:n])) for n in (*range(1, 40), 65, 70, 3, 1)]
    assert all(torch.equal(got, want) for got, want in kept)  # in memory of their own, too
    assert sorted(size for _, _, size, _ in network.recorded) == [1, 2, 4, 8, 16, 32, 64, 96]
    monkeypatch.setattr(graphs, "KEPT", 2)
    network = record(function)
    for n in (1, 2, 1, 4, 1):
        network(pixels[:n])
    assert [size for _, _, size, _ in network.recorded] == [4, 1]  # the longest unused one went


def test_the_fastest_way_is_kept(record, monkeypatch):
    times, seen = iter([3.0, 1.0, 2.0]), []
    monkeypatch.setattr(graphs, "milliseconds", lambda graph: next(times))

    def function(x, more=0):
        seen.append((len(x), more))
        return x.float().mean((2, 3)) + 0 * more
    network = record(function, lambda n: [dict(more=i) for i in range(3)] if n > 2 else [{}])
    x = photographs(4, 4, 4)
    for n in (2, 4, 3):
        assert torch.equal(network(x[:n]), function(x[:n]))
    assert network.chosen == {2: {}, 4: dict(more=1)}
    assert [s for s in seen if s[0] == 4] == [(4, 0), (4, 0), (4, 1), (4, 1), (4, 2), (4, 2), (4, 1), (4, 0), (4, 1)]


def test_the_time_of_a_graph_is_the_least(monkeypatch):
    events = iter([MagicMock(**{"elapsed_time.return_value": 3.0 * t}) for t in (5, 0, 2, 0, 4, 0, 3, 0)])
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: next(events))
    graph = MagicMock()
    assert graphs.milliseconds(graph) == 2 and graph.replay.call_count == 16


@pytest.mark.parametrize("name", ["sixteens", "v1", "se", "split", "deep"])
def test_a_network_in_slices_has_the_same_bits(name):
    model, _ = network(name)
    pixels = photographs(5, 33, 35, seed=2)
    logits = model(pixels)
    for images in (1, 2, 4):
        for way in model.ways(256)[1:4]:
            assert torch.equal(model.run_sliced(pixels, images, way["stage"]), logits), (images, way)
    assert model.ways(32) == [{}] and all(way["images"] < 64 for way in model.ways(64)[1:])
    model.config["float_layers"] = ["fc"]  # whose sums may be others in another batch
    assert model.ways(256) == [{}]


def test_nothing_is_recorded_on_the_stream_of_another_thread(record):
    network, theirs = record(lambda x: x.relu()), torch.cuda.Stream()
    for size in range(40):
        network(torch.ones(1, 3, 4, size + 1))
    streams = [call.kwargs["stream"] for call in torch.cuda.graph.call_args_list]
    assert len(streams) == 40 and theirs not in streams


def test_calls_of_threads_follow_each_other(record, monkeypatch):
    """Also on the device; each gets its own result, of its own type, and one graph is recorded at a time."""
    recording, most = [], []

    @contextlib.contextmanager
    def graph(*_, **more):
        recording.append(more)
        most.append(len(recording))
        time.sleep(0.01)
        yield
        recording.pop()

    def function(x):
        time.sleep(0.001)
        return x.float() * 2
    monkeypatch.setattr(torch.cuda, "graph", graph)
    network = record(function)
    networks = [network, *(graphs.Graphs(network.function) for _ in range(3))]

    def ask(i):
        x = torch.full((2, 3, 4, 4), i / 2).to(torch.uint8 if i % 8 < 4 else torch.float32)
        return torch.equal(networks[i % 4](x), x.float() * 2)
    stream, done = torch.cuda.current_stream(), torch.cuda.Event()  # which a mock makes when it is asked first
    assert not stream.wait_event.called and not done.record.called
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(80))) and most == [1] * 8
    assert stream.wait_event.call_args_list == [call(done)] * 80 and done.record.call_args_list == [call(stream)] * 80


def test_graphs_serve_inference_mode_and_others(record):
    network, x = record(lambda x: x.relu()), torch.ones(2, 3, 4, 4)
    with torch.inference_mode():
        network(x * 2)
    with torch.no_grad():
        assert torch.equal(network(x), x)
    assert not network(x.requires_grad_()).requires_grad


def test_copies_of_a_network_record_their_own():
    model = fuse(ResNet50(num_classes=7, widths=WIDTHS))
    model.graphs = graphs.Graphs(model.run)
    assert copy.deepcopy(model).graphs is None and pickle.loads(pickle.dumps(model)).graphs is None and model.graphs


def test_pixels_are_normalised_in_what_is_recorded(monkeypatch):
    """Where it is no launch of its own"""
    model, pixels, seen = fuse(ResNet50(num_classes=7, widths=WIDTHS)), photographs(2, 33, 33), []
    monkeypatch.setattr(model, "plan_for", lambda pixels: None)
    monkeypatch.setattr(model, "replay", lambda x: seen.append(x.dtype) or model.run_sliced(x))
    assert torch.equal(model(pixels), model(normalize(pixels, model.preprocess)))
    assert seen == [torch.uint8, torch.float32]


@pytest.mark.cuda
def test_graphs_on_a_gpu(monkeypatch):
    """Two networks asked by threads, on streams of their own and in both modes, while another thread pins memory, which
    is forbidden beside a recording of mode "global"; with recordings that come and go."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    monkeypatch.setattr(graphs, "KEPT", 2)
    model, _ = network("plain")
    pixels, done = photographs(40, 33, 33, seed=1), threading.Event()
    logits = model(pixels)
    models, pixels = [model.cuda(), copy.deepcopy(model)], pixels.cuda()

    def pin():
        held = []  # what is freed would be at hand for the next
        while not done.wait(0.001):
            held.append(torch.empty(1, dtype=torch.uint8, pin_memory=True))

    def ask(seed):
        rng, stream = np.random.default_rng(seed), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream), torch.inference_mode(seed % 2 == 0):
            for _ in range(20):
                first, count = rng.integers(20), rng.integers(1, 21)
                got = models[seed // 2 % 2](pixels[first:first + count]).cpu()
                assert torch.equal(got, logits[first:first + count]), (seed, first, count)
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        pinning, asking = pool.submit(pin), [pool.submit(ask, seed) for seed in range(4)]
        concurrent.futures.wait(asking)
        done.set()
        for job in (pinning, *asking):
            job.result()


# --------------------------------------------------------------------------------------------------- machine code

NVCC = os.path.join(csrc.cuda_home(), "bin", "nvcc")
has_nvcc = pytest.mark.skipif(not os.path.exists(NVCC), reason="needs nvcc")


def nvcc(*arguments):
    done = subprocess.run([NVCC, "-std=c++17", *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def ptx_of(folder, csrc_folder):
    """-> {kernel of wrappers.cu: PTX instructions}"""
    path = os.path.join(folder, "wrappers.ptx")
    nvcc("-ptx", "-arch=sm_80", f"-I{csrc_folder}", os.path.join(emulated.HERE, "wrappers.cu"), "-o", path)
    with open(path) as f:
        return ptx.kernels(f.read())


def words_of(name):
    """-> operands uint32 (32, words) of a wrapper's kernel, and how many results a lane has"""
    rng = np.random.default_rng(len(name))
    if name in ("pack_f16", "pack_bf16"):  # ties, overflow to infinity, denormals, NaN, and numbers at random
        special = np.float32([1, 1 + 2 ** -8, 1 + 3 * 2 ** -8, 1 + 2 ** -11, 1 + 3 * 2 ** -11, 65519.9, 65520, 6e-8,
                              2e-8, -3e-8, 3.4e38, np.inf, -np.inf, np.nan, 0, -0.0, 1e-40, -9e-41])
        return np.concatenate([special, (rng.standard_normal(64 - len(special)) * 100)]).astype(np.float32).view(
            np.uint32).reshape(32, 2), 1
    if name in ("unpack_f16", "unpack_bf16"):
        special = [0, 0x8000, 1, 0x83ff, 0x7c00, 0xfc00, 0x3c00, 0x7bff]
        return np.uint32([*special, *rng.integers(0, 0x7c00, 24)])[:, None], 1
    if name == "ldmatrix4":
        return np.column_stack([rng.integers(0, 2 ** 32, (32, 4)), rng.permutation(32)]).astype(np.uint32), 4
    if name == "cp_async16":
        return rng.integers(0, 2 ** 32, (32, 4)).astype(np.uint32), 8
    if name == "mma_sparse_s8u8":
        words = rng.integers(0, 2 ** 32, (32, 13)).astype(np.uint32)
        pairs = np.uint32([a | b << 2 for b in range(4) for a in range(b)])  # two of four, in order
        words[:, 8] = (pairs[rng.integers(0, 6, (32, 8))] << np.arange(0, 32, 4, dtype=np.uint32)).sum(1)
        return words, 4
    words = rng.integers(0, 2 ** 32, (32, 10)).astype(np.uint32)
    if name != "mma_u8s8":  # small multiples of 1/8: every order of summing gives the same
        operands = (rng.integers(-40, 41, (32, 12)) / 8).astype(np.float16 if name == "mma_f16" else np.float32)
        halves = operands.view(np.uint16) if name == "mma_f16" else (operands.view(np.uint32) >> 16).astype(np.uint16)
        words[:, :6] = halves.copy().view(np.uint32)
        words[:, 6:] = (rng.integers(-40, 41, (32, 4)) / 8).astype(np.float32).view(np.uint32)
    return words, 4


@emulates
@has_nvcc
def test_the_emulator_agrees_with_the_ptx(emulator, tmp_path):
    """What nvcc makes of each wrapper's assembly, run by an interpreter, against the emulator's own instruction."""
    made = ptx_of(tmp_path, emulated.CSRC)
    emulator.use()
    assert set(made) == {f"kernel_{name}" for name in emulated.WRAPPERS}
    for name in emulated.WRAPPERS:
        words, results = words_of(name)
        compare(ptx.run(made[f"kernel_{name}"], words, results), emulator.wrapper(name, words, results), name)


@emulates
@has_nvcc
@pytest.mark.parametrize("text, wrong, name", [
    ('"r"(a[0]), "r"(a[1]), "r"(a[2])', '"r"(a[0]), "r"(a[2]), "r"(a[1])', "mma_u8s8"),
    ("s32.u8.s8.s32", "s32.s8.u8.s32", "mma_u8s8"), ("{%8, %9}", "{%9, %8}", "mma_f16"),
    ("{%0, %1, %2, %3}, [%4]", "{%0, %2, %1, %3}, [%4]", "ldmatrix4"),
    ('"r"(b[1]), "r"(b[2])', '"r"(b[2]), "r"(b[1])', "mma_sparse_s8u8"),
    ("s32.s8.u8.s32", "s32.s8.s8.s32", "mma_sparse_s8u8"),
    ('"f"(high), "f"(low)', '"f"(low), "f"(high)', "pack_bf16"), ("valid ? 16 : 0", "16", "cp_async16"),
    ('"n"(Pending)', '"n"(Pending + 1)', "cp_async16")])
def test_swapped_operands_are_noticed(emulator, tmp_path, text, wrong, name):
    (tmp_path / "cuda").mkdir()
    with open(os.path.join(emulated.CSRC, "cuda", "dev.cuh")) as f:
        source = f.read()
    assert text in source
    (tmp_path / "cuda" / "dev.cuh").write_text(source.replace(text, wrong))
    made = ptx_of(tmp_path, tmp_path)
    words, results = words_of(name)
    try:
        got = ptx.run(made[f"kernel_{name}"], words, results)
    except KeyError:  # another multiply than those of the wrappers
        return
    assert (got != emulator.wrapper(name, words, results)).any()


def test_assembly_is_not_moved():
    """What touches memory, or must run by all lanes together, is volatile; and what touches memory says so."""
    with open(os.path.join(emulated.CSRC, "cuda", "dev.cuh")) as f:
        statements = re.findall(r"asm\b(.*?)\);", f.read(), re.S)
    assert len(statements) == 11
    for statement in statements:
        if re.search(r"cp\.async|ldmatrix|mma\.s", statement):
            assert statement.strip().startswith("volatile"), statement
        if re.search(r"cp\.async|ldmatrix", statement):
            assert statement.rstrip().endswith('"memory"'), statement


@has_nvcc
def test_kernels_stay_in_registers_and_use_tensor_cores(tmp_path):
    """ptxas reports no spill on either architecture; the machine code has the instructions that the sources mean."""
    meant = dict(conv_int8=("IMMA.16832.U8.S8", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128"),
                 conv_int8_2_4=("IMMA.SP.16864.S8.U8", "LDS.128", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128"),
                 conv_half=("HMMA.16816.F32 ", "HMMA.16816.F32.BF16", "LDSM.16.M88.4"), bn_relu=(), pooling=())

    def compile_for(kernel, architecture):
        path = str(tmp_path / f"{kernel}.{architecture}.cubin")
        source = os.path.join(emulated.CSRC, "cuda", f"{kernel}.cu")
        return path, nvcc("-cubin", f"-arch={architecture}", "-Xptxas", "-v", *csrc.CUDA_FLAGS, f"-I{csrc.FOLDER}",
                          source, "-o", path)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {(kernel, architecture): pool.submit(compile_for, kernel, architecture)
                for kernel in meant for architecture in ("sm_80", "sm_90")}
    for (kernel, architecture), job in jobs.items():
        path, said = job.result()
        functions = re.findall(r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
                               r"(\d+) bytes spill loads", said, re.S)
        assert functions and all(int(n) == 0 for f in functions for n in f[1:]), (kernel, architecture, functions)
        if meant[kernel] and (disassembler := find_disassembler()):
            code = subprocess.run([disassembler, path], capture_output=True, text=True, check=True).stdout
            for instruction in meant[kernel]:
                assert instruction in code, (architecture, instruction)


def find_disassembler():
    """nvdisasm, which toolkits may lack and triton brings along"""
    beside = os.path.join(os.path.dirname(NVCC), "nvdisasm")
    try:
        import triton
        brought = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "nvdisasm")
    except ImportError:
        brought = ""
    return next((path for path in (beside, brought) if os.path.exists(path)), None)
