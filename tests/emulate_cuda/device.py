"""The kernels of csrc/cuda on the emulator: how they are compiled by g++, and a device that numpy arrays go to."""
import ctypes
import hashlib
import os
import re
import subprocess

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
CSRC = os.path.join(os.path.dirname(os.path.dirname(HERE)), "csrc")
KERNELS = ("conv_int8.cu", "conv_int8_2_4.cu", "conv_half.cu", "pooling.cu", "bn_relu.cu")
# The hooks of the thread sanitizer are the emulator's own: what they see must be what the source says, so no
# vectorisation, and no contraction, which nvcc does where the source does not spell it out.
FLAGS = ("-O1", "-g1", "-fno-tree-vectorize", "-ffp-contract=off", "-Wno-unknown-pragmas", "-fsanitize=alignment")
WRAPPERS = ("mma_u8s8", "mma_sparse_s8u8", "mma_f16", "mma_bf16", "ldmatrix4", "cp_async16", "pack_f16", "pack_bf16",
            "unpack_f16", "unpack_bf16")  # wrappers.cu
FLOATS = dict(float32=0, float16=1, bfloat16=2)  # kernels.h
ORDERS = dict(forward=0, reverse=1, shuffled=2)


def compile_with(builder, path, *flags, folder=None):
    """-> object of a source, whose headers are looked for in `folder`, then here, then in csrc"""
    places = [*([folder] if folder else []), HERE, CSRC]
    headers = [os.path.join(place, "cuda", name) for place in places for name in sorted(os.listdir(
        os.path.join(place, "cuda"))) if name.endswith((".h", ".cuh"))] + [os.path.join(CSRC, "checks.h")]
    key = [hashlib.sha256(open(text, "rb").read()).hexdigest() for text in (*headers, path)]
    kernel = (*FLAGS, "-fsanitize=thread") if path.endswith(".cu") else ("-O2",)
    return builder.run((key, kernel, flags), ".o", "-c", *kernel, *flags, *(f"-I{place}" for place in places),
                       "-x", "c++", path)


def start(builder, faults=None):
    """Compiles kernels, emulator and face, meanwhile. `faults` is a folder with a copy of csrc/cuda that has mistakes
    in it. -> function that waits and returns the library's path"""
    sources = [os.path.join(faults or CSRC, "cuda", name) for name in KERNELS]
    sources += [os.path.join(HERE, name) for name in ("emulator.cpp", "face.cpp", "wrappers.cu")]
    objects = [builder.pool.submit(compile_with, builder, path, folder=faults) for path in sources]
    return lambda: builder.link(".so", *(o.result() for o in objects), "-shared", "-ldl")


def start_operations(builder):
    """The same under the operations of library resnet50, as the CPU's kernels: for a process with RESNET50_EXT=off."""
    from torch.utils.cpp_extension import include_paths, library_paths

    from csrc import FLAGS as ABI
    flags = [flag for flag in ABI if flag.startswith("-D")] + [f"-I{path}" for path in include_paths()]
    sources = [os.path.join(CSRC, "cuda", name) for name in KERNELS] + [os.path.join(HERE, "emulator.cpp")]
    objects = [builder.pool.submit(compile_with, builder, path) for path in sources]
    objects.append(builder.pool.submit(compile_with, builder, os.path.join(CSRC, "cuda", "bindings.cpp"), *flags))
    libraries = [option for path in library_paths() for option in (f"-L{path}", f"-Wl,-rpath,{path}")]
    return lambda: builder.link(".so", *(o.result() for o in objects), "-shared", "-ldl", *libraries, "-ltorch_cpu",
                                "-lc10")


def pack_2_4(weight):
    """int8 (o, k), at most two of each four along k not zero -> uint8, as csrc.pack_2_4, a weight at a time: for 16
    rows and 64 of k each lane's fragments of mma.sp, then each lane's word of places."""
    (o, k), size = weight.shape, ((len(weight) + 15) // 16, (weight.shape[1] + 63) // 64, 32)
    kept, words = np.zeros((*size, 16), np.int8), np.full(size, 0x44444444, np.uint32)  # the places 0 and 1
    for row, first in np.ndindex(o, k // 4):
        four = weight[row, 4 * first:4 * first + 4].tolist()
        places = sorted(sorted(range(4), key=lambda i: (four[i] == 0, i))[:2])
        block, g, high, at = (row // 16, first // 16), row % 8, row % 16 // 8, first % 16 * 2  # of the 32 that it keeps
        for value, place in zip((at, at + 1), places):
            kept[(*block, 4 * g + value % 16 // 4, 4 * (2 * (value // 16) + high) + value % 4)] = four[place]
        word, shift = (*block, 4 * g + 2 * (at // 16) + high), 2 * (at % 16)
        words[word] = words[word] ^ np.uint32(4 << shift) ^ np.uint32((places[0] | places[1] << 2) << shift)
    return np.concatenate([a.view(np.uint8).reshape(*size[:2], -1) for a in (kept, words)], 2)


class Input(ctypes.Structure):  # kernels.h
    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "weight")] + \
               [(name, ctypes.c_int) for name in ("h", "w", "c", "group_channels", "kh", "kw", "sh", "sw", "ph", "pw")]


class Conv(ctypes.Structure):  # kernels.h
    _fields_ = [("input", Input * 2)] + \
               [(name, ctypes.c_int) for name in ("m", "o", "oh", "ow", "groups", "group_o")] + \
               [(name, ctypes.c_void_p) for name in
                ("pad_value", "residual", "out", "mult", "bias", "gain", "scale", "shift")] + \
               [(name, ctypes.c_bool) for name in ("relu", "pieces")]


class Pool(ctypes.Structure):  # kernels.h
    _fields_ = [("x", ctypes.c_void_p), ("out", ctypes.c_void_p)] + \
               [(name, ctypes.c_int) for name in ("n", "h", "w", "c", "kernel", "stride", "padding", "oh", "ow")]


class BatchNorm(ctypes.Structure):  # kernels.h
    _fields_ = [("type", ctypes.c_int), ("m", ctypes.c_int64), ("c", ctypes.c_int), ("relu", ctypes.c_bool),
                ("eps", ctypes.c_float)] + \
               [(name, ctypes.c_void_p) for name in ("x", "residual", "weight", "bias", "mean", "invstd", "y", "grad",
                                                     "dx", "dresidual", "dweight", "dbias")]


class Device:
    """What a GPU would be to the tests. Arrays are NHWC; 16-bit floats travel as uint16."""

    shift = 0  # elements between a multiple of 256 bytes and each operand

    def __init__(self, path):
        self.path, self.lib = path, ctypes.CDLL(path)
        self.lib.device_allocate.restype = ctypes.c_void_p
        self.lib.face_error.restype = ctypes.c_char_p
        for name in ("device_read", "device_conflicts", "device_multiplies", "face_conv_int8_scratch",
                     "face_conv_int8_2_4_scratch", "face_conv_half_scratch", "face_gemm_int8_scratch",
                     "face_bn_relu_scratch"):
            getattr(self.lib, name).restype = ctypes.c_int64

    def use(self, order="forward", seed=0, multiprocessors=4, shift=0):
        self.shift = shift
        self.lib.device_order(ORDERS[order], seed)
        self.lib.device_multiprocessors(multiprocessors)

    def put(self, array):
        """-> pointer to memory that ends with it"""
        if array is None:
            return None
        array = np.append(np.zeros(self.shift, array.dtype), array)
        start = self.lib.device_allocate(ctypes.c_size_t(array.nbytes), array.ctypes.data_as(ctypes.c_void_p))
        return ctypes.c_void_p(start + self.shift * array.itemsize)

    def empty(self, size, dtype):
        """-> array to be filled by get(), and pointer"""
        array = np.empty(size, dtype)
        return array, ctypes.c_void_p(self.lib.device_allocate(ctypes.c_size_t(array.nbytes), None))

    def get(self, array, pointer):
        unwritten = self.lib.device_read(pointer, ctypes.c_size_t(array.nbytes), array.ctypes.data_as(ctypes.c_void_p))
        if unwritten:
            raise RuntimeError(f"{unwritten} of {array.nbytes} bytes of the result were never written")
        return array

    def call(self, name, *args):
        if getattr(self.lib, name)(*args):
            raise RuntimeError(self.where(self.lib.face_error().decode()))

    def where(self, message):
        """Addresses in the library, +0x..., as the lines of their sources."""
        def line(match):
            said = subprocess.run(["addr2line", "-e", self.path, match[1]], capture_output=True, text=True).stdout
            return os.path.basename(said.split()[0])
        return re.sub(r"\+(0x[0-9a-f]+)", line, message)

    def conv(self, x, weight, stride, padding, groups, x2=None, weight2=None, stride2=(1, 1), pad_value=None,
             residual=None, out=None, **vectors):
        """-> Conv whose first input is x (n, h, w, c) by weight (o, kh, kw, c / groups)"""
        n, h, w, c = x.shape
        o, kh, kw, _ = weight.shape
        oh, ow = ((s + 2 * p - k) // t + 1 for s, p, k, t in zip((h, w), padding, (kh, kw), stride))
        inputs = [Input(self.put(x), self.put(weight), h, w, c, c // groups, kh, kw, *stride, *padding), Input(kw=1)]
        if x2 is not None:
            c2 = x2.shape[3]
            inputs[1] = Input(self.put(x2), self.put(weight2), *x2.shape[1:3], c2, c2, 1, 1, *stride2, 0, 0)
        return Conv(input=(Input * 2)(*inputs), m=n * oh * ow, o=o, oh=oh, ow=ow, groups=groups,
                    group_o=o // groups, out=out, pad_value=self.put(pad_value), residual=self.put(residual),
                    **{name: self.put(value) for name, value in vectors.items()})

    def scratch(self, bytes):
        return self.empty((bytes,), np.uint8)[1] if bytes else None

    def conv_int8(self, case, name="face_conv_int8"):
        """tests.emulate.kernels.Case -> uint8 (n, oh, ow, o)"""
        self.lib.device_reset()
        out, pointer = self.empty(case.size, np.uint8)
        conv = self.conv(case.x, case.weight, case.stride, case.padding, case.groups, case.x2, case.weight2,
                         case.stride2, case.pad_value, case.residual, pointer, mult=case.mult, bias=case.bias,
                         gain=case.gain)
        if name == "face_conv_int8_2_4":
            shift, self.shift = self.shift, 0  # the operation refuses packed weights at odd addresses
            for i, weight in enumerate([case.weight, case.weight2][:1 + (case.weight2 is not None)]):
                conv.input[i].weight = self.put(pack_2_4(weight.reshape(len(weight), -1)))
            self.shift = shift
        self.call(name, ctypes.byref(conv), self.scratch(getattr(self.lib, name + "_scratch")(ctypes.byref(conv))))
        return self.get(out, pointer)

    def conv_int8_2_4(self, case):
        """The same, where of each four weights along k two at most are not zero."""
        return self.conv_int8(case, "face_conv_int8_2_4")

    def gemm_int8(self, a, b, bias=None, mult=None, scale=None):
        self.lib.device_reset()
        dtype = np.uint8 if mult is not None else np.int32 if scale is None else np.float32
        out, pointer = self.empty((len(a), len(b)), dtype)
        conv = self.conv(a[:, None, None], b[:, None, None], (1, 1), (0, 0), 1, out=pointer, bias=bias, mult=mult,
                         scale=scale)
        name = "face_gemm_int8" if mult is None else "face_conv_int8"
        self.call(name, ctypes.byref(conv), self.scratch(getattr(self.lib, name + "_scratch")(ctypes.byref(conv))))
        return self.get(out, pointer)

    def conv_half(self, x, weight, scale, shift, residual=None, relu=True, stride=(1, 1), padding=(0, 0), groups=1,
                  type="bfloat16"):
        """x (n, h, w, c), weight (o, kh, kw, c / groups), residual: uint16, the bits of `type` -> the same"""
        self.lib.device_reset()
        o, kh, kw, _ = weight.shape
        size = len(x), *((s + 2 * p - k) // t + 1 for s, p, k, t in zip(x.shape[1:3], padding, (kh, kw), stride)), o
        out, pointer = self.empty(size, np.uint16)
        conv = self.conv(x, weight, stride, padding, groups, residual=residual, out=pointer, scale=scale, shift=shift)
        conv.relu = relu
        scratch = self.scratch(self.lib.face_conv_half_scratch(ctypes.byref(conv)))
        self.call("face_conv_half", ctypes.byref(conv), FLOATS[type], scratch)
        return self.get(out, pointer)

    def wrapper(self, name, words, results):
        """uint32 (32, words) -> uint32 (32, results), a row per lane"""
        self.lib.device_reset()
        out, pointer = self.empty((32, results), np.uint32)
        self.call("face_wrapper", WRAPPERS.index(name), self.put(words), pointer)
        return self.get(out, pointer)

    def max_pool_int8(self, x, kernel, stride, padding):
        self.lib.device_reset()
        n, h, w, c = x.shape
        oh, ow = ((s + 2 * padding - kernel) // stride + 1 for s in (h, w))
        out, pointer = self.empty((n, oh, ow, c), np.uint8)
        self.call("face_max_pool_int8", ctypes.byref(Pool(self.put(x), pointer, n, h, w, c, kernel, stride, padding, oh,
                                                          ow)))
        return self.get(out, pointer)

    def avg_pool_int8(self, x, mult):
        self.lib.device_reset()
        n, h, w, c = x.shape
        out, pointer = self.empty((n, c), np.uint8)
        self.call("face_avg_pool_int8", self.put(x), pointer, n, h * w, c, self.put(np.array([mult], np.int32)))
        return self.get(out, pointer)

    def bn_relu(self, x, weight, bias, residual=None, eps=1e-5, relu=True, type="float32"):
        """x, residual (m, c) -> y, mean, invstd"""
        self.lib.device_reset()
        (m, c), made = x.shape, [self.empty(x.shape, x.dtype)] + [self.empty(x.shape[1:], np.float32) for _ in range(2)]
        norm = BatchNorm(type=FLOATS[type], m=m, c=c, relu=relu, eps=eps, x=self.put(x), residual=self.put(residual),
                         weight=self.put(weight), bias=self.put(bias),
                         **{name: pointer for name, (_, pointer) in zip(("y", "mean", "invstd"), made)})
        self.call("face_bn_relu", ctypes.byref(norm), self.scratch(self.lib.face_bn_relu_scratch(ctypes.byref(norm))))
        return [self.get(*one) for one in made]

    def bn_relu_backward(self, grad, y, x, weight, mean, invstd, relu=True, residual=False, type="float32"):
        """-> dx, dresidual (or None), dweight, dbias"""
        self.lib.device_reset()
        (m, c) = x.shape
        names = ["dx", *["dresidual"] * residual, "dweight", "dbias"]
        made = {name: self.empty((c,) if name in ("dweight", "dbias") else x.shape,
                                 np.float32 if name in ("dweight", "dbias") else x.dtype) for name in names}
        given = dict(grad=grad, y=y, x=x, weight=weight, mean=mean, invstd=invstd)
        norm = BatchNorm(type=FLOATS[type], m=m, c=c, relu=relu, **{k: self.put(v) for k, v in given.items()},
                         **{name: pointer for name, (_, pointer) in made.items()})
        self.call("face_bn_relu_backward", ctypes.byref(norm),
                  self.scratch(self.lib.face_bn_relu_scratch(ctypes.byref(norm))))
        return [self.get(*made[name]) if name in made else None for name in ("dx", "dresidual", "dweight", "dbias")]
