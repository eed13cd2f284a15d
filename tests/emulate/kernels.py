"""The kernels of networks of csrc/cpu, built so that any x86-64 CPU runs all four of them, and what they must compute.

AVX-512 and AMX are emulated (emulated_x86.h, emulated_tiles.h); AVX2 and plain C++ are compiled as they are. Everything
here needs numpy and g++ alone, because `python -m tests.emulate.kernels LIBRARY ISAS GROUP...` also runs in processes
with a sanitizer preloaded, and with faulty builds, which end with a line "differs: ..." or a crash.

Arrays are NHWC: x uint8 (n, h, w, c), weight int8 (o, kh, kw, c / groups), results (n, oh, ow, o).
"""
import concurrent.futures
import contextlib
import ctypes
import hashlib
import os
import subprocess
import sys
import threading
import time

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
SOURCE = os.path.join(os.path.dirname(os.path.dirname(HERE)), "csrc", "cpu")
UNITS = ("conv_plain", "conv_avx2", "conv_f32", "conv_vnni", "conv_amx", "pack", "layout", "conv_int8", "network",
         "pooling", "pool")
FLAGS = ("-std=c++20", "-fPIC", "-Wno-psabi", "-pthread")
WEEK = 7 * 24 * 3600  # seconds that an unused build is kept
MULT_BITS = 22
GAINS = (-32768, 32767)


def has_avx2():
    with open("/proc/cpuinfo") as f:
        return " avx2 " in f.read()


ISAS = {name: i for i, name in enumerate(("plain", "avx2", "vnni", "amx")) if name != "avx2" or has_avx2()}


# ------------------------------------------------------------------------------------------------------- build

class Builder:
    """Compiles into a folder where a file's name says all that it depends on, so that nothing is compiled twice."""

    def __init__(self, folder):
        self.folder = str(folder)
        self.version = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout
        self.pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
        for path in (os.path.join(folder, name) for name in os.listdir(folder)):
            with contextlib.suppress(FileNotFoundError):  # another process tidies up as well
                if time.time() - os.path.getmtime(path) > WEEK:
                    os.unlink(path)

    def run(self, key, suffix, *command):
        """g++ `command` -o file, unless the file of this key is there. -> path"""
        name = hashlib.sha256(repr((self.version, FLAGS, key)).encode()).hexdigest()[:24]
        path = os.path.join(self.folder, name + suffix)
        if not os.path.exists(path):
            temporary = f"{path}.{os.getpid()}.{threading.get_ident()}"
            done = subprocess.run(["g++", *FLAGS, *command, "-o", temporary], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr[-3000:])
            os.replace(temporary, path)
        os.utime(path)
        return path

    def compile(self, path, *flags):
        """-> object. Quoted headers come from the file's folder first, then from csrc/cpu."""
        texts = []
        for folder in (os.path.dirname(path), SOURCE, HERE):
            texts += [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.endswith(".h")]
        key = [hashlib.sha256(open(text, "rb").read()).hexdigest() for text in texts + [path]]
        return self.run((key, flags), ".o", "-c", path, f"-I{SOURCE}", f"-I{HERE}", *flags)

    def start(self, suffix, sources, flags, *link_flags):
        """Compiles `sources` and links them, meanwhile. -> function that waits for it and returns the path"""
        objects = [self.pool.submit(self.compile, source, *flags) for source in sources]
        return lambda: self.link(suffix, *(o.result() for o in objects), *link_flags)

    def library(self, *flags, other=()):
        """Like start: face.cpp and the units, emulated; `other` paths replace the units of their names."""
        paths = {os.path.basename(path): path for path in
                 (os.path.join(HERE, "face.cpp"), *(os.path.join(SOURCE, f"{unit}.cpp") for unit in UNITS), *other)}
        return self.start(".so", paths.values(), ("-DRESNET50_EMULATED", *flags), "-shared", "-Wl,--wrap=aligned_alloc",
                          *flags)

    def link(self, suffix, *command):
        return self.run(command, suffix, *command)


# ------------------------------------------------------------------------------------------------------- calls

class ConvInt8(ctypes.Structure):  # kernels.h
    _fields_ = [(name, ctypes.c_int64) for name in
                ("n", "h", "w", "c", "o", "kh", "kw", "stride_h", "stride_w", "pad_h", "pad_w", "groups")] + \
               [(name, ctypes.c_void_p) for name in ("x", "weight", "mult", "bias", "gain", "residual")] + \
               [(name, ctypes.c_int64) for name in ("h2", "w2", "c2", "stride2_h", "stride2_w")] + \
               [(name, ctypes.c_void_p) for name in ("x2", "weight2", "pad_value")]


class Sweep(ctypes.Structure):  # face.cpp
    _fields_ = [("conv", ConvInt8)] + [(name, ctypes.c_int64) for name in (
        "align", "planes", "interleaved", "out_interleaved", "out_border", "kind", "block", "row_parts", "panel_parts",
        "in_place", "merged", "tiles")] + [("f32_scale", ctypes.c_void_p)]


def pointer(array):
    return None if array is None else array.ctypes.data


class Kernels:
    def __init__(self, path):
        self.lib = ctypes.CDLL(path)
        self.lib.face_error.restype = ctypes.c_char_p
        self.lib.face_pack.restype = self.lib.face_pack_float.restype = ctypes.c_void_p

    def call(self, name, *args):
        if getattr(self.lib, name)(*args):
            raise RuntimeError(self.lib.face_error().decode())

    def use(self, isa):
        self.lib.face_use(ISAS[isa])

    def conv(self, case, threads=1):
        out = np.full(case.size, 0x5a, np.uint8)
        self.call("face_conv", ctypes.byref(case.arguments()), ctypes.c_void_p(pointer(out)), threads)
        return out

    def gemm(self, a, b, bias=None, mult=None, scale=None, threads=1):
        out = np.full((len(a), len(b)), 0x5a, np.int32 if mult is None and scale is None else
                      np.uint8 if scale is None else np.float32)
        self.call("face_gemm", *map(ctypes.c_void_p, map(pointer, (a, b, bias, mult, scale))),
                  *map(ctypes.c_int64, (len(a), len(b), a.shape[1])), ctypes.c_void_p(pointer(out)), threads)
        return out

    def sweep(self, case, kind=0, f32_scale=None, **options):
        """-> (result, rounding). kind 0 uint8, 1 int32, 2 float32"""
        given = dict(align=1, row_parts=1, panel_parts=1, kind=kind, f32_scale=pointer(f32_scale)) | options
        out = np.full(case.size, 0x5a, (np.uint8, np.int32, np.float32)[kind])
        rounding = ctypes.c_int32(-1)
        self.call("face_sweep", ctypes.byref(Sweep(conv=case.arguments(), **given)), ctypes.c_void_p(pointer(out)),
                  ctypes.byref(rounding))
        return out, rounding.value

    def blob(self, pack, weight, weight2, *vectors, more=()):
        sizes, size = [ctypes.c_int64(s) for s in weight.shape], ctypes.c_int64()
        c2 = ctypes.c_int64(0 if weight2 is None else weight2.size // len(weight))
        weight, weight2, *vectors = (ctypes.c_void_p(pointer(a)) for a in (weight, weight2, *vectors))
        blob = pack(*sizes, weight, c2, weight2, *vectors, ctypes.byref(size), *more)
        if not blob:
            raise RuntimeError(self.lib.face_error().decode())
        return np.frombuffer(ctypes.string_at(blob, size.value), np.uint8)

    def pack(self, weight, mult, bias, gain=None, weight2=None, winograd=False):
        """-> the blob of a plan's step, uint8 (bytes)"""
        return self.blob(self.lib.face_pack, weight, weight2, mult, bias, gain, more=[int(winograd)])

    def pack_float(self, weight, bias, weight2=None, winograd=False):
        """The same for weights in float32, or in bfloat16, given as their bits int16, and bias float32 (o)"""
        more = [int(weight.dtype == np.int16), int(winograd)]
        return self.blob(self.lib.face_pack_float, weight, weight2, bias, more=more)

    def network(self, plan, pixels, classes, threads=1):
        """plan uint8 (bytes) at a multiple of 64, pixels uint8 (n, h, w, c)"""
        out = np.full((len(pixels), classes), np.nan, np.float32)
        self.call("face_network", ctypes.c_void_p(pointer(plan)), ctypes.c_int64(plan.size),
                  ctypes.c_void_p(pointer(pixels)), *pixels.shape[:3], ctypes.c_void_p(pointer(out)), threads)
        return out


# --------------------------------------------------------------------------------------------------- reference

def requantize(acc, mult):
    """int64 (..., o), int32 (o) -> uint8. The product has at most 53 bits: float64 holds it and its 2^-22 exactly."""
    product = acc * mult.astype(np.int64)
    assert np.abs(product).max(initial=0) <= 2 ** 53
    return np.clip(np.rint(product.astype(np.float64) / 2 ** MULT_BITS), 0, 255).astype(np.uint8)


def conv_sums(x, weight, stride, padding, pad_value=None, groups=1):
    """-> int64 (n, oh, ow, o); float64 products and sums of such integers are exact"""
    n, h, w, c = x.shape
    o, kh, kw, _ = weight.shape
    (top, left), (sh, sw) = padding, stride
    padded = np.empty((n, h + 2 * top, w + 2 * left, c))
    padded[:] = 0 if pad_value is None else pad_value
    padded[:, top:top + h, left:left + w] = x
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kh, kw), (1, 2))[:, ::sh, ::sw]  # n oh ow c kh kw
    parts = []
    for g in range(groups):
        part = windows[..., g * c // groups:(g + 1) * c // groups, :, :].transpose(0, 1, 2, 4, 5, 3)
        rows = weight[g * o // groups:(g + 1) * o // groups].reshape(o // groups, -1).astype(np.float64)
        parts.append(part.reshape(-1, rows.shape[1]) @ rows.T)
    return np.concatenate(parts, 1).astype(np.int64).reshape(*windows.shape[:3], o)


def two_of_four(rng, size):
    """-> bool: of each four along the last dimension two, seldom one"""
    order = rng.random(size).reshape(-1, 4).argsort(1)
    return (order < np.where(rng.random((len(order), 1)) < 0.1, 1, 2)).reshape(size)


class Case:
    """A convolution with its operands, drawn from `seed`, and its exact accumulators `acc` and result `want`."""

    def __init__(self, n, h, w, c, o, kernel=(1, 1), stride=(1, 1), padding=(0, 0), groups=1, residual=False, c2=0,
                 stride2=(1, 1), pad_value=False, mult=None, bias=None, gain=None, x=None, weight=None, sparse=False,
                 seed=0):
        self.text = f"{n}x{h}x{w}x{c} -> {o}, {kernel}, stride {stride}, padding {padding}, groups {groups}, " \
                    f"residual {residual}, c2 {c2}"
        rng = np.random.default_rng(seed)
        self.stride, self.stride2, self.padding, self.groups = stride, stride2, padding, groups
        draw = lambda dtype, *size: rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max + 1, size, dtype)  # noqa: E731
        self.x = draw(np.uint8, n, h, w, c) if x is None else np.ascontiguousarray(x, np.uint8)
        self.weight = (draw(np.int8, o, *kernel, c // groups) if weight is None
                       else np.ascontiguousarray(weight, np.int8))
        if sparse:  # of each four input channels two at most are not zero
            self.weight = self.weight * two_of_four(rng, self.weight.shape)
        self.pad_value = draw(np.uint8, c) if pad_value else None
        oh, ow = ((s + 2 * p - k) // t + 1 for s, p, k, t in zip((h, w), padding, kernel, stride))
        self.size = n, oh, ow, o
        self.x2 = self.weight2 = None
        sums = conv_sums(self.x, self.weight, stride, padding, self.pad_value, groups)
        if c2:
            h2, w2 = ((s - 1) * t + 1 + rng.integers(t) for s, t in zip((oh, ow), stride2))
            self.x2, self.weight2 = draw(np.uint8, n, h2, w2, c2), draw(np.int8, o, c2)
            if sparse:
                self.weight2 *= two_of_four(rng, self.weight2.shape)
            sums += conv_sums(self.x2, self.weight2.reshape(o, 1, 1, c2), stride2, (0, 0))
        spread = max(sums.std(), 1)
        self.bias = np.asarray(rng.integers(-spread, spread + 1, o) - sums.mean((0, 1, 2)) if bias is None else bias)
        self.bias = np.ascontiguousarray(np.broadcast_to(self.bias, o), np.int32)
        self.residual = draw(np.uint8, *self.size) if residual else None
        if residual:
            share = int(np.clip(spread / 128, 1, 32767))
            gain = rng.integers(-share, share + 1, o) if gain is None else gain
        self.gain = None if not residual else np.ascontiguousarray(np.broadcast_to(gain, o), np.int32)
        self.acc = sums + self.bias + (self.gain.astype(np.int64) * self.residual if residual else 0)
        if mult is None:  # most results inside 0..255
            mult = np.clip(2 ** MULT_BITS * 128 / (rng.uniform(0.7, 3, o) * spread), 1, 2 ** MULT_BITS)
        self.mult = np.ascontiguousarray(np.broadcast_to(mult, o), np.int32)
        self.want = requantize(self.acc, self.mult)

    def arguments(self):
        n, h, w, c = self.x.shape
        o, kh, kw, _ = self.weight.shape
        second = (0, 0, 0) if self.x2 is None else self.x2.shape[1:]
        return ConvInt8(n, h, w, c, o, kh, kw, *self.stride, *self.padding, self.groups,
                        *map(pointer, (self.x, self.weight, self.mult, self.bias, self.gain, self.residual)),
                        *second, *self.stride2, *map(pointer, (self.x2, self.weight2, self.pad_value)))


def compare(got, want, what):
    """Raises with the first element that differs. Float results are compared in every bit, too."""
    wrong = got.view(np.uint32) != want.view(np.uint32) if got.dtype == np.float32 else got != want
    if wrong.any():
        at = tuple(int(i[0]) for i in np.nonzero(wrong))
        raise AssertionError(f"differs: {what} at {at}: {got[at]} instead of {want[at]}, "
                             f"{np.count_nonzero(wrong)} of {wrong.size}")


# ------------------------------------------------------------------------------------------------------- cases

ODD = [  # every way out of a loop: sizes 1, 3, 59, 113; pruned widths; rows, panels and k that fill nothing
    dict(n=1, h=1, w=1, c=1, o=1),
    dict(n=1, h=1, w=1, c=59, o=113, residual=True),
    dict(n=3, h=1, w=3, c=24, o=40, residual=True),
    dict(n=8, h=3, w=1, c=40, o=24),
    dict(n=1, h=37, w=29, c=3, o=64, kernel=(7, 7), stride=(2, 2), padding=(3, 3), pad_value=True),
    dict(n=3, h=22, w=23, c=3, o=59, kernel=(7, 7), stride=(2, 2), padding=(3, 3), pad_value=True, residual=True),
    dict(n=3, h=13, w=11, c=24, o=40, kernel=(3, 3), padding=(1, 1), residual=True),
    dict(n=1, h=9, w=7, c=59, o=59, kernel=(3, 3), padding=(1, 1), pad_value=True),
    dict(n=8, h=7, w=7, c=40, o=59, kernel=(3, 3), stride=(2, 2), padding=(1, 1)),
    dict(n=3, h=14, w=15, c=64, o=128, stride=(2, 2)),
    dict(n=1, h=15, w=13, c=192, o=65, residual=True),
    dict(n=2, h=7, w=5, c=576, o=129, residual=True),
    dict(n=1, h=5, w=5, c=113, o=200, kernel=(3, 3), padding=(1, 1)),
    dict(n=1, h=59, w=3, c=8, o=3, kernel=(3, 1), stride=(2, 1), padding=(1, 0)),
    dict(n=1, h=3, w=59, c=7, o=24, kernel=(1, 3), stride=(1, 2), padding=(0, 1)),
    dict(n=2, h=11, w=8, c=6, o=10, kernel=(5, 2), stride=(3, 2), padding=(2, 1), groups=2, pad_value=True),
    dict(n=1, h=9, w=10, c=2, o=5, stride=(3, 2)),
    dict(n=2, h=6, w=4, c=16, o=16, kernel=(2, 4), padding=(1, 2)),
    dict(n=3, h=41, w=5, c=24, o=24, kernel=(1, 5)),  # results one pixel wide: their inputs lie a whole row apart
    dict(n=3, h=4, w=4, c=24, o=40, kernel=(4, 4)),  # or a whole image
    dict(n=2, h=5, w=41, c=24, o=24, stride=(1, 41)),
    dict(n=2, h=2, w=2, c=64, o=64, kernel=(3, 3), stride=(2, 2), padding=(1, 1)),
    dict(n=1, h=9, w=9, c=12, o=20, kernel=(3, 3), padding=(1, 1), groups=4, residual=True),
    dict(n=3, h=5, w=6, c=128, o=140, kernel=(3, 3), padding=(1, 1), groups=2, pad_value=True),
    dict(n=2, h=4, w=5, c=6, o=6, kernel=(3, 3), stride=(2, 2), padding=(1, 1), groups=6),
    dict(n=3, h=7, w=6, c=64, o=113, c2=59),
    dict(n=2, h=5, w=7, c=40, o=64, c2=128, stride2=(2, 2), residual=True),
    dict(n=1, h=8, w=8, c=59, o=70, c2=24, stride=(2, 2), stride2=(1, 3)),
]


def check_odd(kernels, isa):
    kernels.use(isa)
    for i, shape in enumerate(ODD):
        case = Case(**shape, seed=i)
        for threads in {1, 2 + i % 4}:
            compare(kernels.conv(case, threads), case.want, f"{isa}, {threads} threads: {case.text}")


def check_layers(kernels, isa, layers):
    kernels.use(isa)
    for i, case in enumerate(layers):
        compare(kernels.conv(case, 1 + i % 2), case.want, f"{isa}: {case.text}")


def extremes():
    """(name, case, the path that pack must choose: 0 one fma on the biased bits, 1 float, 2 double)"""
    column = lambda *values: np.array(values, np.int8).reshape(-1, 1, 1, 1)  # noqa: E731
    everything = np.arange(256, dtype=np.uint8).reshape(1, 1, 256, 1)
    half = 2 ** (MULT_BITS - 1)
    # ties: acc / 2 and acc / 2^12 at .5 above even and odd numbers; a second channel sets the path of both
    yield "ties", Case(1, 1, 256, 1, 2, x=everything, weight=column(1, -1), mult=half, bias=(7, 300)), 0
    for path, bound in ((1, 2 ** 22), (2, 2 ** 24)):
        yield "ties beside a large channel", Case(1, 1, 256, 1, 3, x=everything, weight=column(1, -1, 0),
                                                  bias=(7, 300, bound), mult=(half, half, 1)), path
        for sign in (1, -1):  # sign -1: the accumulators below zero, whose results are zero, but for ties towards it
            yield "ties of large sums", Case(1, 1, 256, 1, 64, x=everything, weight=column(*[16 * sign] * 64),
                                             bias=sign * (bound + 2048 - 4096 * np.arange(64)), mult=2 ** 10), path
    yield "ties of sums beyond 2^22", Case(1, 1, 256, 1, 64, x=everything, weight=column(*[16] * 64), mult=2 ** 5,
                                           bias=2 ** 22 + 2 ** 16 - 16 * 128 + 2 ** 17 * np.arange(64)), 1
    # the last accumulator of each path and the first of the next, reached by pixels of 255 and by pixels of 0
    ends = np.array([0, 255], np.uint8).reshape(1, 1, 2, 1)
    for bound, below, above in ((2 ** 22, 0, 1), (2 ** 24, 1, 2)):
        for sign in (1, -1):
            for reach, path in ((bound - 1, below), (bound, above)):
                yield f"reach {sign * reach}", Case(
                    1, 1, 2, 1, 64, x=ends, weight=column(*[127 * sign] * 64), bias=sign * (reach - 255 * 127),
                    mult=np.arange(64) * 8191 * (2 ** 22 // bound) // 63), path
    # |y| just below and at 2^15: from there only double keeps the sum of the fma inside one binade
    yield "y below 2^15", Case(1, 1, 2, 1, 1, x=ends, weight=column(1), bias=2 ** 15 - 2 - 255, mult=2 ** 22), 0
    yield "y at 2^15", Case(1, 1, 2, 1, 1, x=ends, weight=column(1), bias=2 ** 15 - 1 - 255, mult=2 ** 22), 2
    # the ends of int32, and multipliers 0 and 1
    for bias in (2 ** 31 - 1 - 255 * 127, -2 ** 31 + 255 * 127):
        yield f"bias {bias}", Case(1, 1, 2, 1, 7, x=ends, weight=column(*[127 if bias > 0 else -127] * 7), bias=bias,
                                   mult=(0, 1, 2, 2 ** 21 - 1, 2 ** 21, 2 ** 22 - 1, 2 ** 22)), 2
    # all pixels and weights at their ends, at the largest k of the network and at one between tiles
    for k in (4608, 69):
        for value in (-128, 127):
            for pixel in (0, 255):
                yield f"{k} weights {value} pixels {pixel}", Case(
                    2, 1, 3, k, 65, x=np.full((2, 1, 3, k), pixel), weight=np.full((65, 1, 1, k), value), bias=1,
                    residual=True, mult=np.arange(65) * 3), None
    for gain in GAINS:  # in every position of a panel, beside channels whose gain is 1 or 0
        for other in (0, 1):
            gains = np.where(np.arange(128) % 2 == other, gain, np.arange(128) % 3 % 2)
            yield f"gain {gain}", Case(1, 2, 16, 4, 128, residual=True, gain=gains, mult=9), 1
            yield f"gain {gain}", Case(1, 2, 16, 4, 128, residual=True, gain=gains, mult=2 ** 22), 2
    for j in (0, 2 ** 22):
        yield f"mult {j}", Case(1, 3, 11, 20, 70, residual=True, mult=j, bias=100), None


def check_extremes(kernels, isa):
    kernels.use(isa)
    for name, case, path in extremes():
        got, rounding = kernels.sweep(case, align=16 if isa == "amx" else 1)
        compare(got, case.want, f"{isa}: {name}: {case.text}")
        if path is not None and rounding != path:
            raise AssertionError(f"differs: {isa}: {name} takes path {rounding} instead of {path}")
        compare(kernels.conv(case), case.want, f"{isa}: conv_int8: {name}: {case.text}")


def check_sweeps(kernels, isa, count=70):
    """Layouts, blocks, parts and kinds that only a network's plan uses, drawn `count` times."""
    kernels.use(isa)
    for seed in range(int(count)):
        rng = np.random.default_rng(seed)
        pick = lambda *choices: choices[rng.integers(len(choices))]  # noqa: E731
        k, stride = pick((1, 1), (1, 2), (3, 1), (3, 2))
        planes, interleaved = stride == 2 and pick(False, True), pick(False, True)
        case = Case(n=pick(1, 2, 3, 8), h=pick(1, 6, 9), w=pick(3, 7, 10), c=pick(3, 24, 59, 64, 192),
                    o=pick(24, 59, 64, 130), kernel=(k, k), stride=(stride, stride), padding=(k // 2, k // 2),
                    residual=pick(False, True), pad_value=pick(False, True), c2=pick(0, 0, 40, 64),
                    stride2=pick((1, 1), (2, 2)), seed=seed)
        kind = pick(0, 0, 0, 1, 2) if case.residual is None else 0
        scale = rng.uniform(-1, 1, case.size[3]).astype(np.float32)
        options = dict(align=16 if isa == "amx" else pick(1, 16), planes=planes, interleaved=interleaved,
                       out_interleaved=pick(False, True), out_border=pick(0, 1), block=pick(0, 1, 32, 40, 50, 64),
                       row_parts=pick(1, 2, 3), panel_parts=pick(1, 2), in_place=pick(False, True))
        if planes and case.x2 is not None and case.stride2 == (1, 1):
            options["planes"] = False  # a second operand read pixel by pixel has one plane only
        want = (case.want, case.acc.astype(np.int32), (case.acc * scale.astype(np.float64)).astype(np.float32))[kind]
        got, _ = kernels.sweep(case, kind, scale, **options)
        compare(got, want, f"{isa}: {options}: {case.text}")


def check_winograd(kernels, isa, count=40):
    """cpu/winograd.h: sizes with every rest of 4, channels around a register's, tiles and panels in parts, blobs of
    every rounding; the largest pixels and weights; and sums that 26 bits hold by one and miss by one."""
    if isa not in ("avx2", "vnni"):
        return
    kernels.use(isa)
    for seed in range(int(count)):
        rng = np.random.default_rng(seed)
        pick = lambda *choices: choices[rng.integers(len(choices))]  # noqa: E731
        shape = dict(n=pick(1, 2, 3), h=pick(1, 2, 3, 4, 5, 7, 9, 14), w=pick(1, 2, 3, 4, 6, 7, 11, 17),
                     c=pick(1, 3, 15, 16, 17, 31, 32, 33, 59, 64), o=pick(3, 16, 24, 59, 64, 65, 130), seed=seed)
        extreme = seed % 3 == 0
        if extreme:
            shape |= dict(x=rng.choice((0, 255), (shape["n"], shape["h"], shape["w"], shape["c"])),
                          weight=rng.choice((-128, 127), (shape["o"], 3, 3, shape["c"])))
        case = Case(**shape, kernel=(3, 3), padding=(1, 1), pad_value=pick(False, True),
                    bias=pick(None, None, 2 ** 22, -2 ** 24))
        options = dict(tiles=pick(1, 2, 5, 6, 13, 24), out_border=pick(0, 1), row_parts=pick(1, 2, 3),
                       panel_parts=pick(1, 2))
        compare(kernels.sweep(case, **options)[0], case.want, f"{isa}: {options}: {case.text}")
    bright = np.full((1, 3, 3, 128), 255)
    for sign, last in ((1, 2 ** 25 - 1), (-1, 2 ** 25)):
        for more in (0, 1):  # the multiples of 255 below and above
            weight = np.diff(np.minimum(np.arange(9 * 128 + 1) * 127, last // 255 + more)).reshape(1, 3, 3, 128)
            case = Case(1, 3, 3, 128, 1, kernel=(3, 3), padding=(1, 1), x=bright, mult=2 ** 4, weight=sign * weight,
                        bias=100 * 2 ** 18 - sign * 2 ** 25)  # the middle's result is 100
            try:
                compare(kernels.sweep(case, tiles=1)[0], case.want, f"{isa}: 26 bits: {case.text}")
            except RuntimeError as error:
                if not more or "no transformed weights" not in str(error):
                    raise
            else:
                if more:
                    raise AssertionError("differs: transformed weights for sums beyond 26 bits")


def check_gemm(kernels, isa):
    kernels.use(isa)
    sizes = (1, 1, 1), (3, 59, 113), (59, 3, 64), (8, 1000, 131), (33, 65, 576), (113, 24, 40)
    for seed, (m, n, k) in enumerate(sizes):
        case = Case(n=m, h=1, w=1, c=k, o=n, seed=seed)
        a, b, acc = case.x.reshape(m, k), case.weight.reshape(n, k), case.acc.reshape(m, n)
        scale = np.random.default_rng(seed).uniform(-1e-3, 1e-3, n).astype(np.float32)
        for threads in (1, 3):
            what = f"{isa}, {threads} threads: gemm {m}x{n}x{k}"
            compare(kernels.gemm(a, b, case.bias, threads=threads), acc.astype(np.int32), what)
            compare(kernels.gemm(a, b, threads=threads), (acc - case.bias).astype(np.int32), what + " without bias")
            compare(kernels.gemm(a, b, case.bias, case.mult, threads=threads), case.want.reshape(m, n),
                    what + " to uint8")
            compare(kernels.gemm(a, b, case.bias, scale=scale, threads=threads),
                    (acc.astype(np.float64) * scale.astype(np.float64)).astype(np.float32), what + " to float32")


def read_network(isa, path):
    """An .npz with the plan of each instruction set that can run it, pixels and logits -> plan at a multiple of 64, or
    None, pixels, logits"""
    with np.load(path) as saved:
        if isa not in saved:
            return None, None, None
        plan = saved[isa]
        aligned = np.empty(plan.size + 64, np.uint8)
        aligned = aligned[-aligned.ctypes.data % 64:][:plan.size]
        aligned[:] = plan
        return aligned, saved["pixels"], saved["logits"]


def check_network(kernels, isa, path):
    kernels.use(isa)
    aligned, pixels, want = read_network(isa, path)
    if aligned is None:
        return
    for threads in (1, 3):
        compare(kernels.network(aligned, pixels, want.shape[1], threads), want, f"{isa}, {threads} threads: network")
    with concurrent.futures.ThreadPoolExecutor(3) as pool:  # callers at the same time
        for got in pool.map(lambda threads: kernels.network(aligned, pixels, want.shape[1], threads), (2, 1, 2)):
            compare(got, want, f"{isa}: network, one of three callers")


def check_starved(kernels, isa, path):
    """A thread of the pool that gets no memory between two barriers: an exception, no wait for ever, and the pool goes
    on. In a process of its own, because a thread keeps what it has got once."""
    kernels.use(isa)
    plan, pixels, want = read_network(isa, path)
    kernels.lib.face_starve_others(1)
    try:
        kernels.network(plan, pixels, want.shape[1], threads=3)
    except RuntimeError as error:
        if "bad_alloc" not in str(error):
            raise
    else:
        raise AssertionError(f"differs: {isa}: nothing was allocated in a thread of the pool")
    kernels.lib.face_starve_others(0)
    compare(kernels.network(plan, pixels, want.shape[1], threads=3), want, f"{isa}: network after an exception")


GROUPS = {"odd": check_odd, "extremes": check_extremes, "sweeps": check_sweeps, "gemm": check_gemm,
          "winograd": check_winograd}


def main(library, isas, *groups):
    kernels, checks = Kernels(library), {**GROUPS, "network": check_network, "starved": check_starved}
    for group in groups:
        name, _, argument = group.partition("=")
        for isa in isas.split(","):
            checks[name](kernels, isa, *[argument] if argument else [])
            if kernels.lib.face_configured():
                raise AssertionError(f"differs: {isa}: {group} leaves tiles configured")
    print("all equal")


if __name__ == "__main__":
    main(*sys.argv[1:])
