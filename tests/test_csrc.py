"""The extension's build and its operations, native and plain PyTorch, against references written out in numpy."""
import argparse
import concurrent.futures
import fcntl
import fractions
import hashlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import csrc
from csrc import reference
from csrc.__main__ import clean, main
from csrc.plan import BATCHES, BLOCKS, FIELDS, KINDS, WINOGRAD, build_plan, skip_unread, steps_of, tune
from tests.conftest import ROOT
from tests.emulate.kernels import two_of_four
from tests.emulate_cuda import device as emulated

NHWC = torch.channels_last
MULT_ONE = 2 ** 22  # a multiplier of 1


@pytest.fixture(scope="session")
def native():
    if csrc.compilers()[0] is None:
        pytest.skip("no C++ compiler")
    assert csrc.load(), csrc.describe()


def operation(name):
    csrc.load()
    return getattr(torch.ops.resnet50, name)


def plain(name):
    """The operation as it runs without the native library; packing has no other part than the check."""
    check, function = reference.OPERATIONS.get(name, (getattr(reference, f"check_{name}"), lambda *args: None))

    def call(*args, **more):
        check(*args, **more)
        return function(*args, **more)
    return call


def both(name, *args, **more):
    """-> the operation's result, which has the bits of the reference"""
    y, expected = operation(name)(*args, **more), plain(name)(*args, **more)
    assert y.dtype == expected.dtype and torch.equal(y, expected), (name, csrc.describe())
    return y


def u8(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)).to(
        memory_format=NHWC if len(shape) == 4 else torch.contiguous_format)


def s8(*shape, seed=1):
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed)).to(
        memory_format=NHWC if len(shape) == 4 else torch.contiguous_format)


def sparse(*shape, seed=1):
    """s8, of whose input channels two of each four at most are not zero"""
    mask = two_of_four(np.random.default_rng(seed), (shape[0], *shape[2:], shape[1]))
    return s8(*shape, seed=seed) * torch.from_numpy(mask).permute(0, 3, 1, 2)


def s32(n, low, high, seed=2):
    return torch.randint(low, high, (n,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- conv_int8

def naive_conv(x, weight, mult, bias, residual=None, gain=None, x2=None, weight2=None, pad_value=None, stride=(1, 1),
               padding=(0, 0), stride2=(1, 1), groups=1):
    """csrc/README.md's formula in numpy. Float64 holds every product of 31 and 22 bits, and np.rint is half to even."""
    x, weight = x.numpy().astype(float), weight.numpy().astype(float)
    (n, c, h, w), (o, cg, kh, kw) = x.shape, weight.shape
    padded = np.zeros((n, c, h + 2 * padding[0], w + 2 * padding[1]))
    padded += 0 if pad_value is None else pad_value.numpy()[None, :, None, None]
    padded[:, :, padding[0]:padding[0] + h, padding[1]:padding[1] + w] = x
    oh, ow = (padded.shape[2] - kh) // stride[0] + 1, (padded.shape[3] - kw) // stride[1] + 1
    acc = np.zeros((n, o, oh, ow)) + bias.numpy()[None, :, None, None]
    for g in range(groups):
        outs, ins = slice(g * o // groups, (g + 1) * o // groups), slice(g * cg, (g + 1) * cg)
        for i in range(kh):
            for j in range(kw):
                window = padded[:, ins, i::stride[0], j::stride[1]][:, :, :oh, :ow]
                acc[:, outs] += np.moveaxis(np.tensordot(window, weight[outs, :, i, j], (1, 1)), -1, 1)
    if x2 is not None:
        chosen = x2.numpy().astype(float)[:, :, ::stride2[0], ::stride2[1]]
        acc += np.moveaxis(np.tensordot(chosen, weight2.numpy().astype(float)[:, :, 0, 0], (1, 1)), -1, 1)
    if residual is not None:
        acc += gain.numpy().astype(float)[None, :, None, None] * residual.numpy()
    assert -2 ** 31 <= acc.min() and acc.max() < 2 ** 31
    return np.clip(np.rint(acc * mult.numpy()[None, :, None, None] / MULT_ONE), 0, 255).astype(np.uint8)


def case(n, c, h, w, o, kernel, stride=1, padding=0, groups=1, residual=False, second=None, pad_value=False, mult=None):
    """Arguments of conv_int8 whose results spread over 0..255. kernel, stride, padding: a number or two; second:
    channels and stride of x2."""
    kernel, stride, padding = (v if isinstance(v, tuple) else (v, v) for v in (kernel, stride, padding))
    oh, ow = (h + 2 * padding[0] - kernel[0]) // stride[0] + 1, (w + 2 * padding[1] - kernel[1]) // stride[1] + 1
    weight = s8(o, c // groups, *kernel)
    typical = 150 * 74 * weight[0].numel() ** 0.5 + 1000
    mult = s32(o, 1, min(int(200 / typical * MULT_ONE), MULT_ONE)) if mult is None else mult
    arguments = dict(x=u8(n, c, h, w), weight=weight, mult=mult, bias=s32(o, -5000, 9000), stride=stride,
                     padding=padding, groups=groups)
    if residual:
        arguments.update(residual=u8(n, o, oh, ow, seed=3), gain=s32(o, -100, 300, seed=4))
    if second:
        c2, s2 = second
        arguments.update(x2=u8(n, c2, (oh - 1) * s2 + 1, ow * s2, seed=5), weight2=s8(o, c2, 1, 1, seed=6),
                         stride2=(s2, s2))
    if pad_value:
        arguments.update(pad_value=u8(c, seed=7))
    return arguments


ODD = {
    "one": (1, 1, 1, 1, 1, 1),
    "pixel": (3, 59, 1, 1, 113, 1),
    "channels": (2, 7, 5, 3, 13, 1),
    "strided": (2, 5, 9, 7, 17, 1, 2),
    "3x3": (1, 3, 5, 7, 5, 3, 1, 1),
    "3x3 strided": (2, 6, 8, 11, 20, 3, 2, 1),
    "no padding": (1, 10, 6, 6, 33, 3),
    "all padding": (2, 4, 1, 1, 8, 3, 1, 1),
    "wide padding": (1, 4, 3, 3, 8, 3, 1, 2),
    "oblong": (2, 9, 6, 10, 65, (1, 5), (2, 3), (0, 2)),
    "groups": (2, 6, 9, 5, 10, 3, 1, 1, 2),
    "groups strided": (1, 128, 6, 6, 128, 3, 2, 1, 2),
    "depthwise": (1, 6, 5, 5, 6, 3, 1, 1, 6),
    "deep": (1, 2048, 2, 3, 70, 1),
}


@pytest.mark.parametrize("shape", ODD.values(), ids=ODD)
@pytest.mark.parametrize("extra", [dict(), dict(residual=True), dict(pad_value=True)], ids=["", "+", "pad"])
def test_conv_int8_odd_sizes(native, shape, extra):
    arguments = case(*shape, **extra)
    y = both("conv_int8", **arguments)
    np.testing.assert_array_equal(y.numpy(), naive_conv(**arguments))
    assert y.is_contiguous(memory_format=NHWC)


@pytest.mark.parametrize("shape, second", [
    ((2, 64, 14, 14, 256, 1), (64, 1)), ((1, 7, 5, 3, 9, 1), (3, 2)), ((3, 128, 1, 1, 70, 1), (5, 2)),
    ((1, 12, 7, 7, 24, 3, 1, 1), (33, 3))])
@pytest.mark.parametrize("residual", [False, True])
def test_conv_int8_with_a_second_input(native, shape, second, residual):
    arguments = case(*shape, second=second, residual=residual)
    np.testing.assert_array_equal(both("conv_int8", **arguments).numpy(), naive_conv(**arguments))


RESNET = [(3, 224, 64, 7, 2, 3)] + [
    layer for c, mid, size, stride in ((64, 64, 56, 1), (256, 128, 56, 2), (512, 256, 28, 2), (1024, 512, 14, 2))
    for layer in ((c, size, mid, 1), (mid, size, mid, 3, stride, 1), (mid, size // stride, 4 * mid, 1),
                  (c, size, 4 * mid, 1, stride), (4 * mid, size // stride, mid, 1),
                  (mid, size // stride, mid, 3, 1, 1), (4 * c, size, mid, 1, stride))[:7 if c > 64 else 6]]


@pytest.mark.parametrize("layer", RESNET, ids=lambda layer: "x".join(map(str, layer)))
def test_conv_int8_of_every_layer_of_resnet50(native, layer):
    c, size, o, *rest = layer
    arguments = case(1, c, size, size, o, *rest, pad_value=c == 3, residual=o > c > 3)
    np.testing.assert_array_equal(both("conv_int8", **arguments).numpy(), naive_conv(**arguments))


@pytest.mark.parametrize("pixel", [0, 1, 128, 255])
@pytest.mark.parametrize("value", [-128, -127, -1, 0, 127])
@pytest.mark.parametrize("mult", [0, 1, 77, 2 ** 21, MULT_ONE])
def test_conv_int8_extremes(native, pixel, value, mult):
    o = 20
    arguments = dict(x=torch.full((1, 35, 4, 5), pixel, dtype=torch.uint8).to(memory_format=NHWC),
                     weight=torch.full((o, 35, 3, 3), value, dtype=torch.int8).to(memory_format=NHWC),
                     mult=torch.full((o,), mult, dtype=torch.int32), bias=s32(o, -10 ** 7, 10 ** 7), padding=(1, 1),
                     pad_value=torch.full((35,), 255 - pixel, dtype=torch.uint8))
    np.testing.assert_array_equal(both("conv_int8", **arguments).numpy(), naive_conv(**arguments))


@pytest.mark.parametrize("gain", [-2 ** 15, -1, 0, 2 ** 15 - 1])
def test_conv_int8_gain_and_bias_to_the_ends_of_int32(native, gain):
    """One channel's accumulator may reach the last values of int32, and one more is refused."""
    weight = torch.tensor([[[[127]]], [[[-128]]]], dtype=torch.int8)
    high = 2 ** 31 - 1 - 255 * (127 + max(gain, 0))
    low = -2 ** 31 + 255 * (128 - min(gain, 0))
    arguments = dict(x=u8(1, 1, 8, 32), weight=weight, mult=torch.tensor([1, 1], dtype=torch.int32),
                     bias=torch.tensor([high, low], dtype=torch.int32), residual=u8(1, 2, 8, 32, seed=3),
                     gain=torch.full((2,), gain, dtype=torch.int32))
    arguments["x"][0, 0, 0, :2] = arguments["residual"][0, :, 0, :2] = 255
    for mult in (1, 3, 2 ** 21 + 1, MULT_ONE):
        arguments["mult"].fill_(mult)
        np.testing.assert_array_equal(both("conv_int8", **arguments).numpy(), naive_conv(**arguments))
    for step in ((1, 0), (0, -1)):
        wrong = dict(arguments, bias=arguments["bias"] + torch.tensor(step, dtype=torch.int32))
        for run in (csrc.conv_int8, reference.conv_int8):
            with pytest.raises(RuntimeError, match="outside int32"):
                run(**wrong)


@pytest.mark.parametrize("shift", range(22))
def test_conv_int8_rounds_ties_to_even(native, shift):
    """Multipliers 2^shift, accumulators one below, at and one above a tie, from 9 bits to 31: all ways to round."""
    values = torch.tensor([-2, -1, 0, 1, 2, 3, 4, 63, 64, 100, 101, 127, 128, 254, 255, 256] * 4)
    weight = torch.where(torch.arange(len(values)) % 32 < 16, 1, -1).to(torch.int8)
    arguments = dict(x=torch.tensor([0, 1, 2], dtype=torch.uint8).view(1, 1, 1, 3).to(memory_format=NHWC),
                     weight=weight.view(-1, 1, 1, 1), mult=torch.full_like(values, 1 << shift).int(),
                     bias=(((2 * values + 1) << (21 - shift)) - weight).int())
    y = both("conv_int8", **arguments)
    np.testing.assert_array_equal(y.numpy(), naive_conv(**arguments))
    assert torch.equal(y[0, :, 0, 1].long(), (values + values % 2).clamp(0, 255))  # of v and v + 1 the even one


@pytest.mark.parametrize("bits", [12, 16, 20, 23, 25, 29])
def test_conv_int8_random_sums_of_every_magnitude(native, bits):
    """The bias sets the magnitude of the sum, and the multiplier brings it back to a byte."""
    o = 192
    arguments = case(1, 16, 9, 9, o, 1, mult=s32(o, 1, min(2 ** (30 - bits), MULT_ONE) + 1))
    arguments["bias"] = s32(o, -2 ** bits // 8, 2 ** bits)
    y = both("conv_int8", **arguments)
    np.testing.assert_array_equal(y.numpy(), naive_conv(**arguments))
    assert len(y.unique()) > 100


# ------------------------------------------------------------------------------------------------ conv_int8_2_4

@pytest.mark.parametrize("shape", [(16, 64, 1, 1), (40, 32, 3, 3), (7, 16, 2, 1), (130, 80, 1, 3)])
def test_two_of_four_are_packed(shape):
    """In the order of the GPU's instruction, against one that is written weight by weight; and back."""
    weight = sparse(*shape)
    packed = csrc.pack_2_4(weight)
    rows = weight.permute(0, 2, 3, 1).reshape(shape[0], -1).numpy()
    np.testing.assert_array_equal(packed.numpy(), emulated.pack_2_4(rows))
    assert torch.equal(reference.unpack_2_4(packed, *shape[:2], shape[2:]), weight)
    weight[-1, 4:7, 0, 0] = 1  # three of four
    assert csrc.pack_2_4(weight) is None and csrc.pack_2_4(sparse(8, 24, 1, 1)) is None


def test_conv_int8_2_4_is_conv_int8():
    arguments = case(2, 48, 9, 7, 24, 3, 1, 1, residual=True, second=(32, 2))
    dense = {**arguments, "weight": sparse(24, 48, 3, 3), "weight2": sparse(24, 32, 1, 1)}
    packed = {k: csrc.pack_2_4(v) if k.startswith("weight") else v for k, v in dense.items() if k != "groups"}
    np.testing.assert_array_equal(csrc.conv_int8_2_4(**packed, kernel=(3, 3)).numpy(), naive_conv(**dense))


# ------------------------------------------------------------------------------------------------- gemm_int8

@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (3, 59, 113), (5, 2048, 1000), (33, 127, 65), (64, 64, 64), (2, 63, 7)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gemm_int8(native, m, k, n, with_bias):
    a, b, bias = u8(m, k), s8(n, k), s32(n, -10 ** 6, 10 ** 6) if with_bias else None
    acc = a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T + (bias.numpy() if with_bias else 0)
    np.testing.assert_array_equal(both("gemm_int8", a, b, bias).numpy(), acc)
    scale = torch.exp2(torch.rand(n) * 200 - 100) * torch.where(torch.arange(n) % 3 == 0, -1, 1)
    np.testing.assert_array_equal(both("gemm_int8", a, b, bias, None, scale).numpy(),
                                  (acc * scale.numpy().astype(float)).astype(np.float32))
    mult = s32(n, 0, max(int(300 / (5000 * k ** 0.5) * MULT_ONE), 2))
    expected = np.clip(np.rint(acc * mult.numpy().astype(float) / MULT_ONE), 0, 255)
    np.testing.assert_array_equal(both("gemm_int8", a, b, bias, mult).numpy(), expected)


def test_gemm_int8_extremes(native):
    for pixel in (0, 255):
        for value in (-128, -127, 127):
            a, b = torch.full((3, 4099), pixel, dtype=torch.uint8), torch.full((5, 4099), value, dtype=torch.int8)
            assert (both("gemm_int8", a, b) == pixel * value * 4099).all()
    a, b = torch.full((2, 66_312), 255, dtype=torch.uint8), torch.full((2, 66_312), 127, dtype=torch.int8)
    for run in (csrc.gemm_int8, reference.gemm_int8):
        with pytest.raises(RuntimeError, match="outside int32"):
            run(a, b)  # 255 * 127 * 66,312 is the first that leaves it
    assert (both("gemm_int8", a[:, 1:].contiguous(), b[:, 1:].contiguous()) == 255 * 127 * 66_311).all()


# ---------------------------------------------------------------------------------------------- network_int8

def step(x, out, c, o, kernel=1, stride=1, padding=0, residual=None, pad_value=False):
    """A convolution of a plan, with random weights that suit it."""
    arguments = case(1, c, 9, 9, o, kernel, stride, padding, residual=residual is not None, pad_value=pad_value)
    return dict(kind="conv", x=x, out=out, residual=residual, stride=stride, padding=padding,
                **{k: arguments[k] for k in ("weight", "mult", "bias", "gain", "pad_value") if k in arguments})


SMALL = [step("pixels", "stem", 3, 12, 7, 2, 3, pad_value=True), dict(kind="maxpool", x="stem", out="a"),
         step("a", "b", 12, 9), step("b", "c", 9, 10, 3, 1, 1), step("c", "d", 10, 12, residual="a"),
         dict(kind="avgpool", x="d", out="e", mult=3_000_001),
         dict(kind="linear", x="e", weight=s8(7, 12, seed=10), bias=s32(7, -9999, 9999),
              scale=torch.linspace(-1, 2, 7))]


def naive_network(steps, pixels):
    """uint8 (N, 3, H, W) -> float32 logits (N, classes) in numpy, one step after the other."""
    values = {"pixels": pixels}
    for s in steps:
        x = values[s["x"]]
        if s["kind"] == "conv":
            arguments = {k: s[k] for k in ("weight", "mult", "bias", "gain", "pad_value") if k in s}
            arguments.update({k: (s[k], s[k]) for k in ("stride", "padding")}, residual=values.get(s["residual"]))
            values[s["out"]] = torch.from_numpy(naive_conv(x, **arguments))
        elif s["kind"] == "maxpool":
            values[s["out"]] = F.max_pool2d(x.float(), 3, 2, 1).to(torch.uint8)
        elif s["kind"] == "avgpool":
            j = int(s["mult"] / (x.shape[2] * x.shape[3]) + 0.5)
            values[s["out"]] = np.clip(np.rint(x.numpy().sum((2, 3), dtype=float) * j / MULT_ONE), 0, 255)
        else:
            return ((x @ s["weight"].numpy().astype(float).T + s["bias"].numpy()) * s["scale"].numpy().astype(float)
                    ).astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (3, 3, 33, 18), (2, 3, 1, 5)])
@pytest.mark.parametrize("block", [0, WINOGRAD])
def test_network_int8(native, shape, block):
    pixels, plan = u8(*shape), build_plan(SMALL)
    steps_of(plan)[:, [FIELDS.index(field) for field in BATCHES]] = block
    np.testing.assert_array_equal(csrc.network_int8(pixels, plan, 7).numpy(), naive_network(SMALL, pixels))
    nanoseconds = csrc.network_profile(pixels, plan, 7)
    assert nanoseconds.dtype == torch.int64 and len(nanoseconds) == len(SMALL) + 1 and (nanoseconds >= 0).all()
    for name in ("network_int8", "network_profile"):
        tests = ("test_schema", "test_faketensor") + ("test_aot_dispatch_dynamic",) * (name == "network_int8")
        torch.library.opcheck(operation(name).default, (pixels, plan, 7), test_utils=tests)  # times never repeat


def test_a_residual_that_is_read_again_stays(native):
    steps = [*SMALL[:5], step("d", "f", 12, 12, residual="a"), SMALL[5] | dict(x="f"), SMALL[6]]
    pixels = u8(2, 3, 33, 18)
    np.testing.assert_array_equal(csrc.network_int8(pixels, build_plan(steps), 7).numpy(), naive_network(steps, pixels))


def test_networks_that_differ_in_values_alone_do_not_meet(native):
    pixels, other = u8(1, 3, 33, 18), [SMALL[0] | dict(pad_value=255 - SMALL[0]["pad_value"]), *SMALL[1:]]
    for steps in (SMALL, other, SMALL):
        found = csrc.network_int8(pixels, build_plan(steps), 7)
        np.testing.assert_array_equal(found.numpy(), naive_network(steps, pixels))


def blocks(plan):
    """-> int64 (convolutions, 2): what tune() has chosen"""
    table = steps_of(plan)
    return table[table[:, 0] == KINDS["conv"]][:, [FIELDS.index(field) for field in BATCHES]]


def test_blocks_are_measured_once_and_kept(native, monkeypatch, tmp_path):
    """Also where nothing can be written, and anew where the file holds anything but one of BLOCKS for each layer."""
    monkeypatch.setitem(BLOCKS, csrc.isa(), (0, 48, 64))
    monkeypatch.setattr(csrc.plan, "cache_folders", lambda: [str(tmp_path / "gone"), str(tmp_path)])
    pixels = u8(3, 3, 32, 32)
    expected = naive_network(SMALL, pixels)
    assert set(blocks(tune(build_plan(SMALL), 32)).flatten().tolist()) <= {0, 48, 64}
    path, = tmp_path.iterdir()
    known, n = json.loads(path.read_text()), len(blocks(build_plan(SMALL)))
    kept = known | dict(block_one=[48] * n, block_many=[64] * n)
    path.write_text(json.dumps(kept))
    plan = tune(build_plan(SMALL), 32)
    assert blocks(plan).tolist() == [[48, 64]] * n and json.loads(path.read_text()) == kept
    np.testing.assert_array_equal(csrc.network_int8(pixels, plan, 7).numpy(), expected)
    for text in ("", json.dumps(known)[:40], "null", "[]", *(json.dumps(known | dict(block_many=wrong)) for wrong in (
            48, [48], [None] * n, ["48"] * n, [-48] * n, [2 ** 40] * n, [[0]] * n))):
        path.write_text(text)
        plan = tune(build_plan(SMALL), 32)
        assert set(blocks(plan).flatten().tolist()) <= {0, 48, 64} and path.read_text() != text, text
        assert blocks(tune(build_plan(SMALL), 32)).equal(blocks(plan)) and list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(csrc.plan, "cache_folders", lambda: [str(tmp_path / "gone")])
    np.testing.assert_array_equal(csrc.network_int8(pixels, tune(build_plan(SMALL), 32), 7).numpy(), expected)


def test_blocks_are_measured_for_each_machine_size_and_network(native, monkeypatch, tmp_path):
    monkeypatch.setitem(BLOCKS, csrc.isa(), (0, 48))
    monkeypatch.setattr(csrc.plan, "cache_folders", lambda: [str(tmp_path)])
    monkeypatch.setattr(torch.ops.resnet50, "network_profile", lambda _, plan, classes: torch.ones(len(steps_of(plan))))
    tune(build_plan(SMALL), 32)
    tune(build_plan(SMALL), 33)
    tune(build_plan([step("pixels", "stem", 3, 12, 7, 1, 3, pad_value=True), *SMALL[1:]]), 33)
    for where, name, value in ((torch, "get_num_threads", 99), (csrc.plan, "cpuinfo", "another"),
                               (csrc.plan, "build_key", "another"), (csrc.plan, "METHOD", 99)):
        monkeypatch.setattr(where, name, value if name == "METHOD" else lambda *_, value=value: value)
        tune(build_plan(SMALL), 33)
    assert len(list(tmp_path.iterdir())) == 7


def test_what_loses_does_not_spoil_what_another_layer_gains(native, monkeypatch, tmp_path):
    """The first layer gains by blocks of 48 unless the last one, which loses by them, has such too, or the caches do
    not hold yet what it needs for them; by blocks of 64 all gain too little."""
    monkeypatch.setitem(BLOCKS, csrc.isa(), (0, 48, 64))
    monkeypatch.setattr(csrc.plan, "cache_folders", lambda: [str(tmp_path)])
    plan = build_plan(SMALL)
    table = steps_of(plan)
    convs = (table[:, 0] == KINDS["conv"]).nonzero()[:, 0]
    cached = [0]  # the first layer's blocks in the call before

    def profile(pixels, plan, classes):
        chosen, times = blocks(plan)[:, int(len(pixels) > 1)], torch.full((len(table),), 100)
        times[convs[chosen == 64]] = 99
        times[convs[0]] -= 20 * int(chosen[0] == 48 and chosen[-1] != 48)
        times[convs[-1]] += 50 * int(chosen[-1] == 48)
        times[convs[0]] += 40 * int(chosen[0] == 48 != cached[0])
        cached[0] = int(chosen[0])
        return times

    monkeypatch.setattr(torch.ops.resnet50, "network_profile", profile)
    assert blocks(tune(plan, 32)).tolist() == [[48, 48]] + [[0, 0]] * (len(convs) - 1)


def test_pixels_that_nobody_reads_are_skipped():
    """The v1 wiring (stride on the 1x1), v1.5, and stages of one block. Values: test_kernels.py's networks."""
    def conv(out, x, kernel=1, stride=1, **more):
        weight = torch.zeros(8, 8, kernel, kernel, dtype=torch.int8)
        return dict(kind="conv", out=out, x=x, weight=weight, stride=stride, padding=kernel // 2, **more)

    def strides(steps):
        keys = "stride", "stride2", "residual_stride"
        return {s["out"]: tuple(s.get(k, 1) for k in keys) for s in steps if s["kind"] == "conv"}
    first = [conv("a", "pixels", 3), conv("b", "a"), conv("c", "b", 3), conv("d", "c", residual="a")]
    v1 = [conv("e", "d", stride=2), conv("f", "e", 3), conv("g", "f", x2="d", stride2=2)]
    end, plain = [dict(kind="avgpool", x="g", out="h")], strides(first + v1)
    skipped = plain | {"c": (2, 1, 1), "d": (1, 1, 2), "e": (1, 1, 1), "g": (1, 1, 1)}
    assert strides(skip_unread(first + v1 + end)) == skipped
    assert strides(first + v1) == plain  # what was given is as it was
    short = [conv("i", "g", stride=2), conv("j", "i", 3), conv("k", "j", x2="g", stride2=2)]
    assert strides(skip_unread(first + v1 + short + [dict(end[0], x="k")])) == skipped | {
        "f": (2, 1, 1), "g": (1, 2, 1), "i": (1, 1, 1), "j": (1, 1, 1), "k": (1, 1, 1)}
    v1_5 = [conv("e", "d"), conv("f", "e", 3, 2), conv("g", "f", x2="d", stride2=2)]
    wide = [conv("e", "d", 3, 2), conv("f", "e", 3), conv("g", "f", x2="d", stride2=2)]  # reads neighbours
    padded = [v1[0] | dict(padding=1), *v1[1:]]
    pooled = v1 + [dict(kind="avgpool", x="d", out="z")]
    for steps in (v1_5, wide, padded, pooled):
        assert strides(skip_unread(first + steps + end)) == strides(first + steps)


def test_a_residual_of_another_size_is_refused(native):
    weight, one = torch.ones(8, 8, 1, 1, dtype=torch.int8), torch.ones(8, dtype=torch.int32)
    conv = dict(kind="conv", weight=weight, mult=one, bias=one, stride=1, padding=0)
    three = dict(weight=torch.ones(8, 8, 3, 3, dtype=torch.int8), padding=1)  # reads every pixel of a
    steps = [conv | dict(x="pixels", out="a"), conv | three | dict(x="a", out="b", stride=4),
             conv | dict(x="b", out="c", residual="a", gain=one), conv | dict(x="c", out="d", stride=2),
             dict(kind="avgpool", x="d", out="e", mult=1)]
    with pytest.raises(ValueError, match="c and its residual a differ in size"):
        build_plan(steps)


# ---------------------------------------------------------------------------------------------- network_float

BF16 = dict(weight=torch.ones(8, 6, 3, 3).bfloat16().to(memory_format=NHWC), bias=torch.ones(8),
            weight2=torch.ones(8, 5, 1, 1).bfloat16())  # tests/test_kernels.py has the values


@pytest.mark.parametrize("dtype, centre, needs", [
    (torch.bfloat16, torch.zeros(3, dtype=torch.uint8), "bfloat16 need AVX-512 BF16"),
    (torch.float32, torch.zeros(3), "float32 need AVX2")])
def test_float_networks(native, dtype, centre, needs):
    arguments = {k: v if k == "bias" else v.to(dtype) for k, v in BF16.items()}
    with open("/proc/cpuinfo") as f:
        flags, isa = f.read(), csrc.isa()
    able = isa in ("vnni", "amx") and " avx512_bf16" in flags if dtype == torch.bfloat16 else isa != "plain"
    assert csrc.has_float(dtype) == able
    if not able:
        with pytest.raises(RuntimeError, match=f"pack_float: networks in {needs}"):
            csrc.pack_float(**arguments)
        return
    torch.library.opcheck(operation("pack_float").default, tuple(arguments.values()))
    with pytest.raises(RuntimeError, match="pack_float: weight2 must be"):
        csrc.pack_float(**{**arguments, "weight2": arguments["weight2"].half()})
    weight = torch.ones(7, 3, 1, 1, dtype=dtype)
    steps = [dict(kind="conv", x="pixels", out="a", weight=weight, bias=torch.zeros(7), stride=1, padding=0,
                  centre=centre), dict(kind="avgpool", x="a", out="b"),
             dict(kind="linear", x="b", weight=torch.eye(7, dtype=dtype), bias=torch.zeros(7))]
    pixels, plan = torch.full((2, 3, 5, 4), 9, dtype=torch.uint8).to(memory_format=NHWC), build_plan(steps)
    assert (csrc.network_float(pixels, plan, 7) == 27).all()
    torch.library.opcheck(operation("network_float").default, (pixels, plan, 7))
    with pytest.raises(RuntimeError, match="network_int8: the plan is one of floats"):
        csrc.network_int8(pixels, plan, 7)


def test_a_plan_of_the_other_type_is_refused(native):
    with pytest.raises(RuntimeError, match="network_float: the plan is one of int8"):
        csrc.network_float(u8(1, 3, 32, 32), build_plan(SMALL), 7)


# -------------------------------------------------------------------------------------------------- bn_relu, pools

class Float64BnRelu(torch.autograd.Function):
    """The reference and its backward in float64, where finite differences are sharp."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, relu):
        y, mean, invstd = reference.bn_relu(x, weight, bias, residual, 1e-5, relu)
        ctx.relu, ctx.residual = relu, residual is not None
        ctx.save_for_backward(y, x, weight, mean, invstd)
        return y

    @staticmethod
    def backward(ctx, grad):
        dx, dresidual, dweight, dbias = reference.bn_relu_backward(grad, *ctx.saved_tensors, ctx.relu, ctx.residual)
        return dx, dweight, dbias, dresidual if ctx.residual else None, None


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_bn_relu_gradients(relu, with_residual):
    """gradcheck of the formula in float64; then the operation's float32 gradients against it."""
    g = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(2, 3, 3, 5, generator=g, dtype=torch.float64).to(memory_format=NHWC).requires_grad_()
                   for _ in range(2))
    weight, bias = (torch.randn(3, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    inputs = (x, weight, bias, residual if with_residual else None)
    assert torch.autograd.gradcheck(Float64BnRelu.apply, (*inputs, relu))

    wanted = [t for t in inputs if t is not None]
    upstream = torch.randn(x.shape, generator=g)  # not channels_last: autograd promises no layout
    expected = torch.autograd.grad(Float64BnRelu.apply(*inputs, relu), wanted, upstream.double())
    single = [None if t is None else t.detach().float().requires_grad_() for t in inputs]
    y = csrc.bn_relu(single[0], single[1], single[2], single[3], relu=relu)
    torch.testing.assert_close(y.double(), Float64BnRelu.apply(*inputs, relu), rtol=1e-5, atol=1e-6)
    for got, want in zip(torch.autograd.grad(y, [t for t in single if t is not None], upstream), expected):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_bn_relu_follows_batchnorm2d():
    """Output, running statistics and eval-mode results after three steps are those of torch.nn.BatchNorm2d."""
    ours, theirs = nn.BatchNorm2d(5, momentum=0.3), nn.BatchNorm2d(5, momentum=0.3)
    for step in range(3):
        x = (torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(step)) * 3 + 7).to(memory_format=NHWC)
        y = csrc.bn_relu(x, ours.weight, ours.bias, None, ours.running_mean, ours.running_var, ours.momentum, ours.eps)
        torch.testing.assert_close(y, theirs(x).relu(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    statistics = operation("bn_relu")(x, ours.weight, ours.bias, None, ours.eps, True)[1:]
    assert not any(t.requires_grad for t in statistics)  # nothing passes through these
    assert y.requires_grad and not ours.running_mean.requires_grad and not ours.running_var.requires_grad
    with pytest.raises(ValueError, match="more than one value per channel"):
        csrc.bn_relu(x[:1, :, :1, :1].contiguous(memory_format=NHWC), ours.weight, ours.bias, None, ours.running_mean,
                     ours.running_var)


@pytest.mark.parametrize("kernel, stride, padding", [(3, 2, 1), (2, 2, 0), (1, 1, 0), (4, 3, 2), (5, 1, 0)])
def test_pools_are_maxima_and_rounded_means(kernel, stride, padding):
    """Against loops over windows of numpy."""
    x = u8(2, 3, 7, 6, seed=kernel)
    padded = np.zeros((2, 3, 7 + 2 * padding, 6 + 2 * padding), np.uint8)
    padded[:, :, padding:padding + 7, padding:padding + 6] = x.numpy()
    rows, columns = ((size + 2 * padding - kernel) // stride + 1 for size in (7, 6))
    want = np.array([[padded[:, :, i * stride:i * stride + kernel, j * stride:j * stride + kernel].max((2, 3))
                      for j in range(columns)] for i in range(rows)]).transpose(2, 3, 0, 1)
    got = csrc.max_pool_int8(x, kernel, stride, padding)
    assert got.is_contiguous(memory_format=NHWC) and np.array_equal(got.numpy(), want)
    for mult in (0, 1, 42 * 1000 + 21, MULT_ONE):
        j = (mult + 21) // 42
        means = np.rint(x.numpy().astype(np.int64).sum((2, 3)) * j / MULT_ONE)  # to even; exact in float64
        got = csrc.avg_pool_int8(x, torch.tensor([mult], dtype=torch.int32))
        assert np.array_equal(got.numpy(), means.clip(0, 255))


def gate_case(n, c, h, w, inner, split=False, seed=0):
    """Arguments of gate_int8 whose gates and results spread over their range"""
    generator, maps = torch.Generator().manual_seed(seed), 1 + split

    def normal(*shape):
        return torch.randn(*shape, generator=generator)
    return dict(x=u8(n, maps * c, h, w, seed=seed), residual=None if split else u8(n, c, h, w, seed=seed + 1),
                weight1=normal(inner, c) / c ** 0.5, bias1=normal(inner), weight2=normal(maps * c, inner),
                bias2=normal(maps * c), scales=torch.tensor([0.021, 0.013, 0.019], dtype=torch.float64),
                zeros=torch.tensor([100, 100 if split else 7], dtype=torch.int32))


def naive_gate(x, residual, weight1, bias1, weight2, bias2, scales, zeros):
    """A pixel at a time, and the mixing in whole numbers"""
    a = x.numpy().astype(np.int64).transpose(0, 2, 3, 1)
    (sa, sb, out), (za, zb), c = scales.tolist(), zeros.tolist(), x.shape[1] // (1 if residual is not None else 2)
    pooled = (a.mean((1, 2)) - za) * sa
    pooled = pooled if residual is not None else pooled[:, :c] + pooled[:, c:]
    weights = [t.numpy().astype(np.float64) for t in (weight1, bias1, weight2, bias2)]
    told = np.maximum(pooled @ weights[0].T + weights[1], 0) @ weights[2].T + weights[3]
    b = residual.numpy().astype(np.int64).transpose(0, 2, 3, 1) if residual is not None else a[..., c:]
    gates = (1 / (1 + np.exp(-told)), np.ones_like(told)) if residual is not None else (
        1 / (1 + np.exp(told[:, c:] - told[:, :c])), 1 / (1 + np.exp(told[:, :c] - told[:, c:])))
    first, second = (np.rint(g * (s / out * 4096)).astype(np.int64) for g, s in zip(gates, (sa, sb)))
    found = np.zeros((*a.shape[:3], c), np.uint8)
    for n, y, k in np.ndindex(found.shape[:3]):
        acc = (a[n, y, k, :c] - za) * first[n] + (b[n, y, k] - zb) * second[n]
        found[n, y, k] = np.clip([round(fractions.Fraction(int(v), 4096)) for v in acc], 0, 255)  # half to even
    return found.transpose(0, 3, 1, 2)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("n, c, h, w, inner",
                         [(1, 1, 1, 1, 1), (2, 7, 3, 5, 3), (1, 64, 17, 19, 16), (3, 300, 7, 7, 21)])
def test_gates_are_those_of_a_naive_loop(threads, split, n, c, h, w, inner):
    arguments, before = gate_case(n, c, h, w, inner, split, seed=c), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = both("gate_int8", **arguments)
    finally:
        torch.set_num_threads(before)
    assert y.shape == (n, c, h, w) and y.is_contiguous(memory_format=NHWC)
    np.testing.assert_array_equal(y.numpy(), naive_gate(**arguments))


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("zero", [0, 255])
@pytest.mark.parametrize("bias", [-500.0, 0.0, 500.0])
def test_gates_at_the_ends_of_their_range(value, zero, bias):
    """Gates of 0 and 1, and sums up to 2^24; halves between two integers, which go to the even one."""
    arguments = gate_case(2, 9, 300, 3, 5)
    for map_ in (arguments["x"], arguments["residual"]):
        map_.fill_(value)
    arguments.update(bias2=torch.full((9,), bias), zeros=torch.full((2,), zero, dtype=torch.int32),
                     weight2=torch.zeros(9, 5))
    for scales in ((8.0, 8.0, 1.0), (1.0, 0.0, 1.0), (0.5, 0.125, 1.0)):
        arguments["scales"] = torch.tensor(scales, dtype=torch.float64)
        np.testing.assert_array_equal(both("gate_int8", **arguments).numpy(), naive_gate(**arguments))


@pytest.mark.parametrize("change, message", [
    (dict(scales=torch.tensor([8.0, 8.1, 1.0], dtype=torch.float64)), "scales must be"),
    (dict(scales=torch.tensor([float("nan"), 1.0, 1.0], dtype=torch.float64)), "scales must be"),
    (dict(scales=torch.zeros(3, dtype=torch.float64)), "scales must be"),
    (dict(zeros=torch.tensor([0, 256], dtype=torch.int32)), "zeros must be"),
    (dict(zeros=torch.tensor([-1, 0], dtype=torch.int32)), "zeros must be")])
def test_gates_that_could_overflow_are_refused(native, change, message):
    with pytest.raises(RuntimeError, match=message):
        operation("gate_int8")(**{**gate_case(1, 4, 2, 2, 3), **change})


@pytest.mark.parametrize("name", ["weight", "mult", "bias", "gain", "weight2"])
@pytest.mark.parametrize("last", [False, True])
def test_weights_that_change_in_place_are_noticed(name, last):
    """Packed weights are kept between calls."""
    arguments = case(1, 12, 6, 5, 70, 3, padding=1, residual=True, second=(9, 1))
    both("conv_int8", **arguments)
    before = both("conv_int8", **arguments)
    values = arguments[name].view(-1) if arguments[name].dim() == 1 else arguments[name].permute(0, 2, 3, 1).view(-1)
    at = -1 if last else 0
    values[at] = -values[at] if name != "mult" else values[at] + 5000
    assert not torch.equal(both("conv_int8", **arguments), before)


def test_another_tensor_in_the_place_of_kept_weights():
    memory = torch.empty(1 << 12, dtype=torch.int8)
    for seed, (o, c) in enumerate([(8, 16), (16, 8), (8, 16), (4, 16), (8, 16)]):
        weight = memory[:o * c].view(o, 1, 1, c).permute(0, 3, 1, 2)
        weight.copy_(s8(o, c, 1, 1, seed=seed))
        arguments = dict(case(1, c, 3, 3, o, 1), weight=weight)
        np.testing.assert_array_equal(both("conv_int8", **arguments).numpy(), naive_conv(**arguments))
        x, b = u8(5, c, seed=seed), weight.reshape(o, c)
        assert b.data_ptr() == memory.data_ptr() and torch.equal(both("gemm_int8", x, b), (x.long() @ b.long().T).int())


# ------------------------------------------------------------------------------------------- what is refused

def arguments_of(name):
    x, f = u8(2, 6, 5, 4), torch.rand(2, 6, 5, 4).to(memory_format=NHWC)
    vector = torch.ones(6)
    return {
        "conv_int8": dict(x=x, weight=s8(8, 6, 3, 3), mult=s32(8, 0, 9), bias=s32(8, 0, 9), residual=u8(2, 8, 3, 2),
                          gain=s32(8, 0, 9), x2=u8(2, 5, 6, 4), weight2=s8(8, 5, 1, 1), pad_value=u8(6), stride=[1, 1],
                          padding=[0, 0], stride2=[2, 2], groups=1),
        "conv_int8_2_4": dict(
            x=u8(2, 32, 5, 4), weight=csrc.pack_2_4(sparse(8, 32, 3, 3)), mult=s32(8, 0, 9), bias=s32(8, 0, 9),
            kernel=[3, 3], residual=u8(2, 8, 3, 2), gain=s32(8, 0, 9), x2=u8(2, 16, 6, 4),
            weight2=csrc.pack_2_4(sparse(8, 16, 1, 1)), stride=[1, 1], padding=[0, 0], stride2=[2, 2]),
        "gemm_int8": dict(a=u8(3, 6), b=s8(4, 6), bias=s32(4, 0, 9), mult=s32(4, 0, 9), scale=None),
        "pack_int8": dict(weight=s8(8, 6, 3, 3), mult=s32(8, 0, 9), bias=s32(8, 0, 9), gain=s32(8, 0, 9),
                          weight2=s8(8, 5, 1, 1)),
        "pack_float": BF16,
        "conv_bn_relu": dict(x=f, weight=torch.rand(8, 6, 3, 3).to(memory_format=NHWC), scale=torch.rand(8),
                             bias=torch.rand(8), residual=torch.rand(2, 8, 3, 2).to(memory_format=NHWC), relu=True,
                             stride=[1, 1], padding=[0, 0], groups=1),
        "max_pool_int8": dict(x=x, kernel=3, stride=2, padding=1),
        "avg_pool_int8": dict(x=x, mult=s32(1, 0, MULT_ONE)),
        "gate_int8": gate_case(2, 6, 5, 4, 3),
        "bn_relu": dict(x=f, weight=vector, bias=vector, residual=f, eps=1e-5, relu=True),
        "bn_relu_backward": dict(grad=f, y=f, x=f, weight=vector, mean=vector, invstd=vector, relu=True, residual=True),
    }[name]


def spoiled(tensor):
    """The tensor with a wrong dtype, number of dimensions, size, no elements, and its memory in the wrong order."""
    yield "dtype", tensor.to(torch.int16)
    yield "dimensions", tensor[None]
    if tensor.dim() == 4:
        yield "layout", torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(tensor)
    elif tensor.dim() == 2:
        yield "layout", tensor.T.contiguous().T
    if tensor.dim() == 1:
        yield "size", torch.cat([tensor, tensor[:1]])
        yield "layout", torch.stack([tensor, tensor], 1)[:, 0]
    yield "empty", tensor[:0]


IMAGES = ("jpeg_sizes", "jpeg_restart", "crop_images")  # test_decoder.py
NAMES = [*(name for name in reference.OPERATIONS if name not in IMAGES), "pack_int8"]


@pytest.mark.parametrize("name", [*NAMES, "pack_float"])
def test_wrong_arguments_are_named(native, name):
    """By the native operation, and by the check that the reference and the fake kernels share."""
    right = arguments_of(name)
    for run in (operation(name), plain(name)):
        if name != "pack_float" or csrc.has_float(torch.bfloat16):
            run(*right.values())
    for argument, value in right.items():
        for what, wrong in spoiled(value) if isinstance(value, torch.Tensor) else ():
            if what == "layout" and wrong.is_contiguous(memory_format=NHWC if wrong.dim() == 4 else
                                                        torch.contiguous_format):
                continue  # a 1x1 weight is in both orders
            for run in (operation(name), plain(name)):
                with pytest.raises(RuntimeError, match=rf"{name}: .*(must be|expected).*\("):
                    run(*{**right, argument: wrong}.values())


WRONG_SPARSE = [
    (dict(kernel=[3]), "kernel"), (dict(kernel=[0, 3]), "kernel"), (dict(kernel=[6, 1]), "x "),
    (dict(weight=torch.zeros(1, 4, 640, dtype=torch.uint8)), r"weight must be uint8 \(1, 5, 640"),
    (dict(x=u8(2, 24, 5, 4)), "multiples of 16"), (dict(x2=u8(2, 8, 6, 4)), "multiples of 16"),
    (dict(weight2=None), "weight2"), (dict(gain=None), "gain"), (dict(stride2=[1, 1]), "x2"),
    (dict(stride=[0, 1]), "stride"), (dict(padding=[0, -1]), "stride"),
    (dict(weight=torch.zeros(3201, dtype=torch.uint8)[1:].view(1, 5, 640)), "begin at a multiple of 16")]


@pytest.mark.parametrize("change, message", WRONG_SPARSE)
def test_wrong_combinations_of_sparse_arguments_are_named(change, message):
    with pytest.raises(RuntimeError, match=f"conv_int8_2_4: .*{message}"):
        operation("conv_int8_2_4")(*{**arguments_of("conv_int8_2_4"), **change}.values())


@pytest.mark.parametrize("change, message", [
    (dict(stride=[0, 1]), "stride"), (dict(stride=[1]), "stride"), (dict(padding=[-1, 0]), "stride"),
    (dict(groups=4), "groups"), (dict(groups=2), r"weight must be|groups"), (dict(gain=None), "residual"),
    (dict(weight2=None), "weight2"), (dict(stride2=[1, 1]), "x2"), (dict(weight=s8(8, 6, 6, 3)), "x "),
    (dict(mult=torch.full((8,), -1, dtype=torch.int32)), "mult"),
    (dict(mult=torch.full((8,), MULT_ONE + 1, dtype=torch.int32)), "mult"),
    (dict(gain=torch.full((8,), 2 ** 15, dtype=torch.int32)), "gain"),
    (dict(gain=torch.full((8,), -2 ** 15 - 1, dtype=torch.int32)), "gain")])
def test_wrong_combinations_are_named(native, change, message):
    wrong = {**arguments_of("conv_int8"), **change}
    for run in (operation("conv_int8"), plain("conv_int8")):
        with pytest.raises(RuntimeError, match=message):
            run(*wrong.values())


def test_groups_pools_and_devices_that_no_kernel_takes_are_named(native):
    grouped, right = case(1, 4, 3, 3, 4, 1, groups=2, second=(4, 1)), arguments_of("conv_int8")
    for run in (operation, plain):
        with pytest.raises(RuntimeError, match="x2 .*groups (must be )?1"):
            run("conv_int8")(**grouped)
        with pytest.raises(RuntimeError, match="half the kernel|max_pool_int8: .*padding"):
            run("max_pool_int8")(u8(1, 3, 5, 5), 3, 2, 2)
    with pytest.raises(RuntimeError, match=r"mult must be int32 \(8,\) on cpu and not empty, got .* on meta"):
        plain("conv_int8")(**right | dict(mult=right["mult"].to("meta")))


def test_strides_and_paddings_beyond_int32_are_refused(native):
    arguments = case(1, 4, 1, 1, 4, 1, second=(4, 1))
    long = dict(arguments, stride=(2 ** 31 - 1, 2 ** 31 - 1), stride2=(2 ** 31 - 1, 1))
    np.testing.assert_array_equal(both("conv_int8", **long).numpy(), naive_conv(**arguments))
    f = arguments_of("conv_bn_relu") | dict(residual=None)
    for change in (dict(stride=(1, 2 ** 31)), dict(stride=(2 ** 32, 1)), dict(stride2=(2 ** 32, 1)),
                   dict(padding=(0, 2 ** 30)), dict(padding=(2 ** 32, 0))):
        for run in (operation, plain):
            with pytest.raises(RuntimeError, match="must fit int32|stride2"):
                run("conv_int8")(**{**arguments, **change})
            if "stride2" not in change:
                with pytest.raises(RuntimeError, match="conv_bn_relu: .*must fit int32"):
                    run("conv_bn_relu")(*{**f, **change}.values())


def test_huge_arguments_are_refused_before_memory_is_asked_for():
    from torch._subclasses import FakeTensorMode
    csrc.load()
    with FakeTensorMode():
        x = torch.empty(2 ** 15, 64, 64, 64, dtype=torch.uint8, memory_format=NHWC)
        with pytest.raises(RuntimeError, match=r"conv_int8: x must have fewer than 2\^31 elements"):
            csrc.conv_int8(x, *(torch.empty(s, dtype=d) for s, d in (((4, 64, 1, 1), torch.int8), ((4,), torch.int32),
                                                                     ((4,), torch.int32))))


# ------------------------------------------------------------------------ opcheck, compile, export, threads

@pytest.mark.parametrize("name", NAMES)
def test_opcheck(native, name):
    """Schema, fake kernel, autograd and tracing agree with the operation: dtypes, sizes and strides."""
    arguments = list(arguments_of(name).values())
    if name == "bn_relu":
        arguments = [t.clone().requires_grad_() if isinstance(t, torch.Tensor) else t for t in arguments]
    torch.library.opcheck(operation(name).default, arguments)


def test_opcheck_of_degenerate_sizes(native):
    """Where sizes are 1, several strides mean the same memory, and the fake kernel must still name the right ones."""
    for arguments in (case(1, 1, 1, 1, 1, 1), case(1, 3, 1, 1, 5, 1), case(2, 1, 3, 3, 1, 3, 1, 1)):
        torch.library.opcheck(torch.ops.resnet50.conv_int8.default, (), arguments,
                              test_utils=("test_schema", "test_faketensor"))
    ones = torch.ones(3)
    for shape in ((4, 3, 1, 1), (1, 3, 1, 1), (1, 3, 4, 1)):
        x = torch.rand(shape).to(memory_format=NHWC)
        torch.library.opcheck(torch.ops.resnet50.bn_relu.default, (x, ones, ones, None, 1e-5, True),
                              test_utils=("test_schema", "test_faketensor"))
    for mult, scale in ((None, None), (None, torch.rand(1)), (s32(1, 0, 9), None)):
        torch.library.opcheck(torch.ops.resnet50.gemm_int8.default, (u8(1, 1), s8(1, 1), None, mult, scale),
                              test_utils=("test_schema", "test_faketensor"))


class Two(nn.Module):
    """uint8 (N, 6, H, W) -> float32 (N, 7): a convolution, its pixels summed, a matrix product."""

    def __init__(self):
        super().__init__()
        for name, value in case(1, 6, 5, 4, 8, 3, 1, 1).items():
            if isinstance(value, torch.Tensor) and name != "x":
                self.register_buffer(name, value)
        self.register_buffer("head", s8(7, 8))
        self.register_buffer("scale", torch.rand(7, generator=torch.Generator().manual_seed(9)))

    def forward(self, x):
        y = csrc.conv_int8(x, self.weight, self.mult, self.bias, padding=(1, 1))
        return csrc.gemm_int8(y.amax((2, 3)), self.head, None, None, self.scale)


def test_compile_whole_graphs():
    """Inference and training go through torch.compile without a break, with the bits of eager mode."""
    model, x = Two(), u8(3, 6, 5, 4)
    assert torch.equal(torch.compile(model, fullgraph=True)(x), model(x))

    def train(x, weight, bias, mean, var):
        return csrc.bn_relu(x, weight, bias, x * 0.5, mean, var)
    results = []
    for f in (train, torch.compile(train, fullgraph=True, backend="aot_eager")):
        inputs = [torch.linspace(-1, 2, 2 * 3 * 4 * 4).view(2, 3, 4, 4).to(memory_format=NHWC), torch.ones(3),
                  torch.zeros(3)]
        inputs, running = [t.requires_grad_() for t in inputs], [torch.zeros(3), torch.ones(3)]
        y = f(*inputs, *running)
        y.square().sum().backward()
        results.append([y.detach(), *(t.grad for t in inputs), *running])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_export_with_a_free_batch_size(tmp_path):
    model, path = Two(), tmp_path / "two.pt2"
    batch = torch.export.Dim("batch", max=64)
    program = torch.export.export(model, (u8(2, 6, 5, 4),), dynamic_shapes={"x": {0: batch}})
    torch.export.save(program, path)
    x = u8(5, 6, 5, 4, seed=3)
    assert torch.equal(torch.export.load(path).module()(x), model(x))


def test_many_threads_and_shapes_at_once(native):
    cases = [case(1 + i % 3, 6 + i, 5 + i, 9, 16 + i, 3, 1 + i % 2, 1, residual=i % 2 == 0) for i in range(8)]
    expected = [naive_conv(**c) for c in cases]
    start = threading.Barrier(8)

    def work(i):
        start.wait()
        return all(np.array_equal(csrc.conv_int8(**cases[i]).numpy(), expected[i]) for _ in range(50))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def in_child(arguments, connection):
    with csrc._lock:
        connection.send(csrc.conv_int8(**arguments).numpy())


def test_a_forked_process_computes(native):
    """As in a DataLoader's worker: the parent's threads are not there, not even one that held the lock of load()."""
    arguments, threads = case(2, 64, 28, 28, 64, 3, 1, 1), torch.get_num_threads()
    torch.set_num_threads(2)  # OpenMP waits for ever for a thread that was not forked along
    expected = csrc.conv_int8(**arguments).numpy()
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=in_child, args=(arguments, theirs))
    with csrc._lock:
        child.start()
    torch.set_num_threads(threads)
    try:
        assert ours.poll(30), "the forked process hangs"
        np.testing.assert_array_equal(ours.recv(), expected)
    finally:
        child.kill()
        child.join()


# ----------------------------------------------------------------------------------------------------- build

def digest():
    """Of the int8 bits of a spread of calls."""
    sha = hashlib.sha256()
    for shape in ODD.values():
        for extra in (dict(), dict(residual=True), dict(pad_value=True)):
            sha.update(csrc.conv_int8(**case(*shape, **extra)).contiguous().numpy().tobytes())
    for m, k, n in ((3, 59, 113), (5, 2048, 100)):
        for options in (dict(), dict(mult=s32(n, 0, 9999)), dict(scale=torch.linspace(-1, 1, n))):
            sha.update(csrc.gemm_int8(u8(m, k), s8(n, k), s32(n, -999, 999), **options).numpy().tobytes())
    return sha.hexdigest()


def python(code, **env):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env={**os.environ, **env})


@pytest.mark.parametrize("env", [dict(RESNET50_EXT="off"), dict(CXX="no-such-compiler")], ids=["off", "no compiler"])
def test_plain_pytorch_gives_the_same_bits_and_says_so_once(native, env, tmp_path):
    run = python("import csrc; from tests.test_csrc import digest, Two, u8; import torch; x = u8(3, 6, 5, 4)\n"
                 "# the library is loaded inside of the trace: nothing came before it\n"
                 "y = torch.compile(Two(), fullgraph=True, backend='eager')(x)\n"
                 "print(digest(), csrc.isa(), csrc.load(), y.tolist() == Two()(x).tolist())",
                 TORCH_EXTENSIONS_DIR=str(tmp_path), **env)
    assert run.stdout.split() == [digest(), "pytorch", "False", "True"], run.stderr
    assert run.stderr.count("plain PyTorch") == 1 and "Traceback" not in run.stderr
    assert env.get("CXX", "RESNET50_EXT=off") in run.stderr


def test_require_makes_a_missing_compiler_an_error(tmp_path):
    run = python("import csrc; csrc.load()", RESNET50_EXT="require", CXX="no-such-compiler",
                 TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert run.returncode and "BuildError: no C++ compiler: no-such-compiler does not run" in run.stderr


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The build as a module of its own, with one small source: what it does with sources it does with any."""
    if csrc.compilers()[0] is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path / "csrc"
    (folder / "cpu").mkdir(parents=True)
    for name in ("__init__.py", "reference.py"):
        shutil.copy(os.path.join(ROOT, "csrc", name), folder)
    (folder / "ops.cpp").write_text('#include "cpu/answer.h"\nextern "C" int answer() { return ANSWER; }\n')
    (folder / "cpu" / "answer.h").write_text("#define ANSWER 42\n")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("RESNET50_EXT", "cpu")
    spec = importlib.util.spec_from_file_location("csrc_copy", folder / "__init__.py",
                                                  submodule_search_locations=[str(folder)])
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "csrc_copy", module)
    spec.loader.exec_module(module)
    return module


def test_build_once_and_again_when_anything_changes(package, monkeypatch, capfd):
    assert "not built yet" in package.describe()
    path = package.build()
    assert os.path.exists(path) and package.build() == path
    assert capfd.readouterr().err.count("compiling") == 1
    keys = [package.build_key()]
    with monkeypatch.context() as patch:  # headers that were installed since
        compiler = package.compilers()[0]
        patch.setattr(package, "libjpeg", lambda: ["-DMORE"])
        assert package.compilers()[0] != compiler
    for change in (lambda: monkeypatch.setattr(package.platform, "machine", lambda: "another"),
                   lambda: monkeypatch.setattr(package.platform, "libc_ver", lambda: ("another", "1")),
                   lambda: monkeypatch.setenv("RESNET50_EXT_CFLAGS", "-DMORE=1"),
                   lambda: open(os.path.join(package.FOLDER, "cpu", "answer.h"), "a").write("\n"),
                   lambda: open(os.path.join(package.FOLDER, "cpu", "new.cpp"), "w").close(),
                   lambda: os.rename(os.path.join(package.FOLDER, "cpu", "new.cpp"),
                                     os.path.join(package.FOLDER, "cpu", "newer.cpp")),
                   lambda: monkeypatch.setattr(torch, "__version__", "2.99"),
                   lambda: monkeypatch.setattr(torch.version, "cuda", "99.0")):
        change()
        keys.append(package.build_key())
    assert len(set(keys)) == len(keys)
    other = package.build()
    assert other != path and os.path.exists(path)
    monkeypatch.setenv("CXX", "no-such-compiler")  # a machine where someone else has built
    assert package.build() == other


def test_a_build_whose_library_was_cut_short_is_made_anew(package):
    size = os.path.getsize(path := package.build())
    os.truncate(path, size - 1)
    assert os.path.getsize(package.build()) == size


def test_a_build_that_was_killed_is_no_build(package, tmp_path):
    """Also where any compiler's will do, and by the name that older versions gave it"""
    name, builds = package.build_name(("a" * 8, "cpu")), tmp_path / "[builds]"
    for folder in (f"{name}.5.tmp", f".{name}.5.tmp", name):
        assert package.find_build([str(builds)], ("a" * 8, None)) is None
        (builds / folder).mkdir(parents=True)
        (builds / folder / "resnet50.so").write_bytes(bytes(64))  # no ELF header asks for more
    assert package.find_build([str(builds)], ("a" * 8, None)) == str(builds / name / "resnet50.so")


def test_folders_with_a_space(package, tmp_path):
    """This package, the builds, and PyTorch itself"""
    site = tmp_path / "with space"
    shutil.copytree(package.FOLDER, site / "csrc")
    (site / "csrc" / "apart").mkdir()
    (site / "csrc" / "apart" / "more.cpp").write_text('#include "cpu/answer.h"\nint more = ANSWER;\n')
    for name in ("torch", "torch.libs"):
        if os.path.exists(real := os.path.join(os.path.dirname(os.path.dirname(torch.__file__)), name)):
            (site / name).symlink_to(real)
    done = subprocess.run([sys.executable, "-c", "import csrc; print(csrc.build())"], cwd=site, capture_output=True,
                          text=True, env={**os.environ, "TORCH_EXTENSIONS_DIR": str(site / "cache")})
    assert os.path.exists(done.stdout.strip()), done.stderr


@pytest.mark.parametrize("name, value, said", [
    ("RESNET50_BUILD_TIMEOUT", "abc", "expected a number of seconds"), ("RESNET50_EXT_CFLAGS", '"x', "No closing quot"),
    ("CXX", "'x", "No closing quot")])
def test_variables_that_mean_nothing_are_named(package, name, value, said, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(package.BuildError, match=f"{name}={value}: {said}"):
        package.build()


def test_a_variable_that_means_nothing_is_one_line(tmp_path):
    run = python("import csrc; print(csrc.describe())", RESNET50_EXT_CFLAGS='"x', TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert run.stdout.startswith('plain PyTorch: RESNET50_EXT_CFLAGS="x: '), run.stderr
    assert run.stderr.count("\n") == 1


def test_a_compiler_that_hangs_is_none(package, monkeypatch):
    monkeypatch.setattr(package, "PROBED", 0.1)
    monkeypatch.setenv("CXX", f"{sys.executable} -c 'import time; time.sleep(600)'")
    package.libjpeg.cache_clear()
    assert package.libjpeg() == [] and package.compilers()[0] is None


def test_errors_are_the_compilers_first_lines(package):
    with open(os.path.join(package.FOLDER, "ops.cpp"), "a") as f:
        f.write("int wrong = nowhere;\n")
    for _ in range(2):  # trying again is not confused by the first time
        with pytest.raises(package.BuildError, match=r"ops\.cpp:3:13: error: .*nowhere") as caught:
            package.build()
        assert len(str(caught.value)) < 600
    assert os.listdir(os.environ["TORCH_EXTENSIONS_DIR"]) == ["resnet50.lock"]


def test_more_flags_are_the_linker_s_too(package, monkeypatch):
    monkeypatch.setenv("RESNET50_EXT_CFLAGS", "-Wl,--no-such-flag")
    with pytest.raises(package.BuildError, match="error: ld returned"):
        package.build()


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a PyTorch with CUDA")
def test_kernels_for_cuda_that_do_not_compile_leave_those_for_the_cpu(package, monkeypatch, tmp_path, capfd):
    """A toolkit whose compiler fails: one line says so, once, and the next process is not made to try again."""
    toolkit = tmp_path / "cuda"
    fails = "#!/bin/sh\n[ $1 = --version ] && echo 13.0 && exit\necho 'a.cu(1): error: no' >&2\nexit 1\n"
    for path, text in (("include/cuda_runtime.h", ""), ("bin/nvcc", fails)):
        (toolkit / path).parent.mkdir(parents=True)
        (toolkit / path).write_text(text)
        (toolkit / path).chmod(0o755)
    (tmp_path / "csrc" / "cuda").mkdir()
    (tmp_path / "csrc" / "cuda" / "kernel.cu").write_text("")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setenv("RESNET50_EXT", "auto")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    plain = package.build()
    monkeypatch.setenv("RESNET50_EXT", "cpu")
    assert package.build() == plain and capfd.readouterr().err.count("compiling") == 1
    monkeypatch.setenv("RESNET50_EXT", "auto")
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    path = package.build()
    assert os.path.exists(path) and path != plain and "TORCH_CUDA_ARCH_LIST" not in os.environ
    said = capfd.readouterr().err
    assert said.count("once more without") == 1 and "error: no" in said, said
    assert package.build() == path and not capfd.readouterr().err
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))  # as where someone built, and now there is no toolkit
    assert package.build() == path
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.setenv("RESNET50_EXT", "require")
    with pytest.raises(package.BuildError, match=r"a\.cu\(1\): error: no"):
        package.build()


def test_the_toolkit_and_the_gpus_that_are_compiled_for(native, monkeypatch, tmp_path):
    """CUDA kernels are in the library wherever nvcc is, with or without a GPU; without one, for two kinds of it."""
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert torch.cuda.device_count() or csrc.gpus() == "8.0;9.0+PTX"
    with monkeypatch.context() as patch:  # what a driver that is too old for PyTorch does
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "get_device_capability", Mock(side_effect=RuntimeError("too old")))
        assert csrc.gpus() == "8.0;9.0+PTX"
    home = csrc.cuda_home()
    assert csrc.has_cuda() == (torch.version.cuda is not None and os.path.exists(os.path.join(home, "bin", "nvcc")))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert csrc.gpus() == "8.6" and csrc.cuda_home() == str(tmp_path) and csrc.compilers()[1] in (None, "cpu")


def test_a_killed_build_neither_hangs_nor_poisons_the_next(package, tmp_path):
    """Killed while the compiler runs, which lives on: as an out-of-memory killer leaves things."""
    slow, marker = tmp_path / "slow", tmp_path / "compiling"
    slow.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec c++ --version\ntouch {marker}\nexec sleep 60\n')
    slow.chmod(0o755)
    victim = subprocess.Popen([sys.executable, "-c", "import csrc; csrc.build()"], cwd=tmp_path, start_new_session=True,
                              env={**os.environ, "CXX": str(slow), "PYTHONPATH": str(tmp_path)})
    try:
        deadline = time.monotonic() + 60
        while not marker.exists():
            assert victim.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        victim.kill()
        victim.wait()
        os.environ["RESNET50_BUILD_TIMEOUT"] = "5"
        cache = os.path.dirname(os.path.dirname(package.build()))
    finally:
        os.environ.pop("RESNET50_BUILD_TIMEOUT", None)
        os.killpg(victim.pid, signal.SIGKILL)
    assert not [name for name in os.listdir(cache) if name.endswith(".tmp")]


def test_waiting_for_another_build_ends(package, monkeypatch):
    folder = os.environ["TORCH_EXTENSIONS_DIR"]
    os.makedirs(folder)
    with open(os.path.join(folder, "resnet50.lock"), "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        for seconds in ("0.2", "nan"):
            monkeypatch.setenv("RESNET50_BUILD_TIMEOUT", seconds)
            with pytest.raises(RuntimeError, match=rf"^RESNET50_BUILD_TIMEOUT={seconds}: .*resnet50\.lock;"):
                package.build()  # by this beginning run_script knows it as one line's
    assert os.path.exists(package.build())
    with package.locked(folder):
        fd, = (fd for fd in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{fd}").endswith(".lock"))
        child = os.dup(int(fd))  # as one that was forked meanwhile holds it
    with package.locked(folder):
        os.close(child)


def test_a_cache_that_cannot_be_written(package, monkeypatch, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(package.tempfile, "gettempdir", lambda: str(tmp_path))
    own = tmp_path / f"resnet50-{os.getuid()}"
    path = package.build()
    assert path.startswith(str(own)) and own.stat().st_mode & 0o777 == 0o700 and package.build() == path
    assert capfd.readouterr().err.count("cannot be written") == 1
    for change in (lambda: own.chmod(0o777), lambda: own.chmod(0o770),  # others could have put a library there
                   lambda: own.rename(tmp_path / "moved").chmod(0o700) or own.symlink_to(tmp_path / "moved")):
        change()
        with pytest.raises(package.BuildError, match="not a folder of this user alone"):
            package.build()


def test_what_is_built_is_found_where_nothing_can_be_written(package, monkeypatch):
    """As in a container whose files are all read-only"""
    path = package.build()
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(package.tempfile, "gettempdir", Mock(side_effect=FileNotFoundError("no temporary folder")))
    assert package.build() == path


def test_threads_that_load_at_once_build_once(package, capfd):
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(package.build())) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(paths) == 4 and len(set(paths)) == 1 and capfd.readouterr().err.count("compiling") == 1


def test_threads_that_load_at_once_register_once(native, monkeypatch):
    loads = []
    monkeypatch.setattr(csrc, "_state", None)
    monkeypatch.setattr(csrc, "_load", lambda: loads.append(time.sleep(0.05)) or (True, None))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: csrc.load(), range(4))) and len(loads) == 1


def test_what_is_dense_is_what_pytorch_says():
    for size in itertools.product((1, 2, 3), repeat=4):
        for order in itertools.permutations(range(4)):
            x = torch.zeros([size[d] for d in order]).permute([order.index(d) for d in range(4)])
            for layout in (NHWC, torch.contiguous_format):
                for view in (x, x[:, :2], x[::2], x[..., 1:]) if x.shape[3] > 1 else (x,):
                    assert reference.is_dense(view, layout) == view.is_contiguous(memory_format=layout)


def test_clean_removes_our_other_builds_only(tmp_path):
    keep, other = f"resnet50-{'0' * 16}-{'a' * 8}-cpu", f"resnet50-{'1' * 16}-{'a' * 8}-{'b' * 8}"
    for name in (keep, other, other + ".123.tmp", f".{other}.124.tmp", "resnet50-of-someone-else", "their_extension"):
        (tmp_path / name).mkdir()
    assert clean(str(tmp_path), keep) == 3
    assert sorted(os.listdir(tmp_path)) == [keep, "resnet50-of-someone-else", "resnet50.lock", "their_extension"]


def test_ahead_of_time(native):
    run = subprocess.run([sys.executable, "-m", "csrc"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    result = json.loads(run.stdout.splitlines()[-1])
    assert os.path.isdir(result["folder"]) and result["isa"] == csrc.isa() and result["seconds"] >= 0, run.stderr


@pytest.mark.parametrize("name, value, said", [
    ("RESNET50_EXT", "off", "asks for no build"), ("RESNET50_EXT", "maybe", "expected off, cpu or require"),
    ("RESNET50_ISA", "sse", "none of")])
def test_ahead_of_time_by_variables_that_forbid_it(name, value, said, native, monkeypatch):
    def isa():  # which a process reads once
        raise RuntimeError(f"RESNET50_ISA={value}: none of amx, vnni, avx2, plain")
    monkeypatch.setenv("RESNET50_EXT", "")
    monkeypatch.setenv(name, value)
    if name == "RESNET50_ISA":
        monkeypatch.setattr(csrc, "isa", isa)
    else:
        monkeypatch.setattr(csrc, "_state", None)
    with pytest.raises(SystemExit, match=f"^csrc: error: {name}={value}: {said}"):
        main(argparse.Namespace(clean=False))


def test_ahead_of_time_a_library_that_cannot_be_loaded_is_a_failure(monkeypatch):
    monkeypatch.setenv("RESNET50_EXT", "cpu")
    monkeypatch.setattr(csrc, "load", lambda: False)
    monkeypatch.setattr(csrc, "build", lambda: pytest.fail("it went on"))
    with pytest.raises(SystemExit, match="^1$"):
        main(argparse.Namespace(clean=False))


def test_schemas_are_those_of_the_native_library(native):
    """What plain PyTorch registers is parsed from ops.cpp; the library that was compiled from it knows better."""
    from torch._C import parse_schema
    parsed = {schema.name.split("::")[-1]: schema for schema in map(parse_schema, csrc.schemas())}
    assert set(parsed) >= set(csrc.FAKES) and "peak_macs" in parsed
    for name, schema in parsed.items():
        compiled = operation(name).default._schema
        assert str(compiled) == "resnet50::" + str(schema)


@pytest.mark.skipif(sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="one CPU")
def test_threads_that_wake_on_one_cpu_do_not_stay_there():
    """As where CPUs share no cache, and Linux wakes a thread beside the one that wakes it"""
    code = """
import os, threading, torch, csrc
csrc.load()
torch.set_num_threads(2)
before = set(os.listdir("/proc/self/task"))
a, b = torch.ones(2048, 512, dtype=torch.uint8), torch.ones(512, 512, dtype=torch.int8)
csrc.gemm_int8(a, b)
team = [int(t) for t in {*os.listdir("/proc/self/task")} - before] + [threading.get_native_id()]
assert len(team) == 2, team
cpus, apart = os.sched_getaffinity(0), [0]
def cpu(t):
    return int(open(f"/proc/self/task/{t}/stat").read().rsplit(")", 1)[1].split()[36])
while len(apart) < 4 and apart[-1] < 15:  # a busy machine may have moved them again; left alone they are apart 10 times
  apart.append(0)
  for _ in range(20):
    for allowed in ({min(cpus)}, cpus):
        for t in team:
            os.sched_setaffinity(t, allowed)
    csrc.gemm_int8(a, b)
    apart[-1] += cpu(team[0]) != cpu(team[1])
    assert all(os.sched_getaffinity(t) == cpus for t in team)
print(apart[-1])
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 15
