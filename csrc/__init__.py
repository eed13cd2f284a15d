"""The extension: `import csrc` gives the operations of library `resnet50` (csrc/README.md), built on first use.

  import csrc
  y = csrc.conv_int8(x, weight, mult, bias)     # the first call compiles csrc/, once per machine
  python -m csrc                                # compiles ahead of time

A call goes to torch.ops.resnet50.*, which torch.compile and torch.export see as one operation; a program that runs an
exported graph calls csrc.load() first. Without a compiler the same operations run as plain PyTorch (csrc/reference.py)
and give the same int8 bits. JPEGs are decoded where the compiler finds the headers of libjpeg-turbo.

RESNET50_EXT            off: plain PyTorch; cpu: no CUDA kernels; require: a build that fails is an error; unset:
                        whatever can be had. CUDA kernels are built where PyTorch has CUDA and nvcc is found.
RESNET50_EXT_CFLAGS     more flags for compiler and linker, such as -O1 -fsanitize=address
RESNET50_BUILD_TIMEOUT  seconds to wait for another process that builds (600)
RESNET50_ISA            amx, vnni, avx2 or plain: this one and not the CPU's best; one that the CPU lacks is an error
TORCH_CUDA_ARCH_LIST    GPUs to compile for; unset: those that are here, or 8.0;9.0+PTX
TORCH_EXTENSIONS_DIR    where builds are kept (~/.cache/resnet50); MAX_JOBS, CXX and CUDA_HOME as for any extension
"""
import contextlib
import functools
import glob
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time

import torch

from . import reference

FOLDER = os.path.dirname(os.path.abspath(__file__))
TARGET = "0x020b000000000000"  # PyTorch 2.11: its stable ABI is all that ops.cpp uses, and later ones run it
FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TARGET}"]
CUDA_FLAGS = ["-O3", "-std=c++17", "--expt-relaxed-constexpr"]
PROBED = 60  # seconds for what a compiler is asked before it builds; nothing else would end one that hangs
ISAS = ("plain", "avx2", "vnni", "amx")  # in the order of csrc/cpu/kernels.h


class BuildError(RuntimeError):
    """Why there is no native library, in one line."""


# ------------------------------------------------------------------------------------------------------- build

def sources():
    """The files that are compiled or included, in a fixed order."""
    return sorted(path for kind in ("cpp", "h", "cu", "cuh")
                  for path in glob.glob(os.path.join(FOLDER, "**", f"*.{kind}"), recursive=True))


def words(name, default=""):
    """An environment variable, as a shell takes it apart"""
    try:
        return shlex.split(os.environ.get(name) or default)
    except ValueError as error:
        raise BuildError(f"{name}={os.environ[name]}: {error}") from error


def cflags():
    return FLAGS + words("RESNET50_EXT_CFLAGS")


def openmp():
    """What links OpenMP: PyTorch's own copy where it brings one, since two would have threads of their own each."""
    root = os.path.dirname(torch.__file__)
    found = glob.glob(os.path.join(root, "lib", "libgomp*.so*")) + glob.glob(f"{root}.libs/libgomp*.so*")
    return found[:1] or ["-fopenmp"]


def compilers():
    """-> the C++ compiler and nvcc, as eight hex digits of their version and of the GPUs to compile for; None where
    there is none, and "cpu" for an nvcc that is not wanted."""
    def version(*command, more=""):
        try:
            said = subprocess.run([*command, "--version"], capture_output=True, check=True, timeout=PROBED).stdout
            return hashlib.sha256(said + more.encode()).hexdigest()[:8]
        except (OSError, subprocess.SubprocessError):
            return None
    nvcc = "cpu"
    if torch.version.cuda and os.environ.get("RESNET50_EXT") != "cpu":
        nvcc = version(os.path.join(cuda_home(), "bin", "nvcc"), more=gpus())
    return version(*cxx(), more=" ".join(libjpeg())), nvcc


def cxx():
    return words("CXX", "c++")


@functools.lru_cache(1)
def libjpeg():
    """-> flags of a compiler that finds the headers of libjpeg-turbo, whose crop and skip csrc/cpu/jpeg.cpp needs"""
    about = "#include <stdio.h>\n#include <jpeglib.h>\n#ifndef LIBJPEG_TURBO_VERSION\n#error\n#endif\n"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run([*cxx(), *cflags(), "-x", "c++", "-E", "-"], input=about, text=True, timeout=PROBED,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return ["-DUSE_LIBJPEG"] * (not found.returncode)
    return []


def cuda_home():
    """The folder of the CUDA toolkit; it need not exist."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = os.path.realpath(shutil.which("nvcc") or "")  # may be a script that lies apart from the toolkit
    homes = [named] if named else [os.path.dirname(os.path.dirname(found)), "/usr/local/cuda"]
    return next((home for home in homes if os.path.exists(os.path.join(home, "include", "cuda_runtime.h"))), homes[-1])


def gpus():
    """The GPUs to compile for, as TORCH_CUDA_ARCH_LIST has it."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"]
    here = set()
    with contextlib.suppress(RuntimeError):  # GPUs that are counted, by a driver that is too old for this PyTorch
        here = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(here)) or "8.0;9.0+PTX"


def build_key():
    """Sixteen hex digits of all that a build depends on, but for the compiler."""
    key = hashlib.sha256(repr((torch.__version__, torch.version.cuda, platform.machine(), platform.libc_ver(),
                               cflags())).encode())
    for path in sources():
        with open(path, "rb") as f:
            key.update(f"{os.path.relpath(path, FOLDER)}\0".encode() + hashlib.sha256(f.read()).digest())
    return key.hexdigest()[:16]


def cache_folders():
    """Where builds are looked for; the last one can be written, unless nothing can: what has been built will do then. A
    temporary one must be this user's alone, because what lies there is loaded and run."""
    root = os.path.abspath(os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/resnet50"))
    with contextlib.suppress(OSError):
        os.makedirs(root, exist_ok=True)
    if os.access(root, os.W_OK | os.X_OK):
        return [root]
    try:
        own = os.path.join(tempfile.gettempdir(), f"resnet50-{os.getuid()}")
        os.makedirs(own, mode=0o700, exist_ok=True)
        status = os.lstat(own)
    except OSError:
        return [root]
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise BuildError(f"{root} cannot be written, and {own} is not a folder of this user alone")
    return [root, own]


def build_name(versions):
    """The folder of a build from these files with these flags by these compilers; a pattern where one is missing."""
    return "-".join(["resnet50", build_key(), *(version or "*" for version in versions)])


def find_build(folders, versions):
    """-> path of a library, or None. Without a compiler (None) what any has built will do."""
    for folder in folders:  # "cpu", which is no hexadecimal number, comes last
        for path in sorted(glob.glob(os.path.join(glob.escape(folder), build_name(versions), "resnet50*.so"))):
            # half a library, by a version that gave it such a name
            if not os.path.dirname(path).endswith(".tmp") and is_whole(path):
                return path


def is_whole(path):
    """Whether a library is as long as its ELF header says: to load one that was cut short would be a bus error."""
    with contextlib.suppress(OSError, struct.error), open(path, "rb") as f:
        offset, size, count = struct.unpack("<40xQ10xHH2x", f.read(64))  # of the sections' headers, which end it
        return os.path.getsize(path) >= offset + size * count
    return False


@contextlib.contextmanager
def locked(folder):
    """One build at a time per folder. The system frees the lock of a process that dies."""
    import fcntl
    path, seconds = os.path.join(folder, "resnet50.lock"), os.environ.get("RESNET50_BUILD_TIMEOUT") or "600"
    try:
        deadline = time.monotonic() + float(seconds)
    except ValueError:
        raise BuildError(f"RESNET50_BUILD_TIMEOUT={seconds}: expected a number of seconds") from None
    with open(path, "w") as f:
        while True:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not time.monotonic() < deadline:  # nor a NaN
                    raise RuntimeError(f"RESNET50_BUILD_TIMEOUT={seconds}: for longer than that another process has "
                                       f"been building the extension and holds {path}; wait for it, or set "
                                       "RESNET50_EXT=off") from None
                time.sleep(0.05)
        try:
            yield
        finally:
            fcntl.flock(f, fcntl.LOCK_UN)  # said, since a forked child may hold the file open too


def build():
    """-> path of the shared library, which is compiled if nobody has yet. Raises BuildError."""
    folders, versions = cache_folders(), compilers()
    path = find_build(folders, versions)
    if path:
        return path
    if versions[0] is None:
        raise BuildError(f"no C++ compiler: {os.environ.get('CXX') or 'c++'} does not run")
    if len(folders) > 1:
        print(f"resnet50: {folders[0]} cannot be written; the extension goes to {folders[-1]}", file=sys.stderr)
    with locked(folders[-1]):
        versions = versions[0], versions[1] or "cpu"
        return find_build(folders, versions) or compile_into(folders[-1], build_name(versions), versions[1] != "cpu")


def compile_into(folder, name, cuda):
    """Compiles in a folder that nobody knows and renames that: killed at any point, it leaves no half of a library.
    Where the CUDA kernels do not compile, the library has those for the CPU alone."""
    print(f"resnet50: compiling the extension into {os.path.join(folder, name)}, once", file=sys.stderr, flush=True)
    for stale in os.listdir(folder):
        if re.fullmatch(r"\.?resnet50-.*\.tmp", stale):  # of builds that were killed
            shutil.rmtree(os.path.join(folder, stale), ignore_errors=True)
    temporary = os.path.join(folder, f".{name}.{time.time_ns()}.tmp")  # the dot: no pattern for builds matches it
    os.mkdir(temporary)
    try:
        # a machine with the CUDA toolkit and no GPU would be told so at this import
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        from torch.utils import cpp_extension
        if shutil.which("ninja") is None:  # an environment that is not activated has it beside its packages
            import ninja
            os.environ["PATH"] += os.pathsep + ninja.BIN_DIR
        compile_flags = cflags() + ["-DUSE_CUDA"] * cuda + libjpeg()
        link_flags = openmp() + ["-ljpeg"] * bool(libjpeg()) + words("RESNET50_EXT_CFLAGS")
        # what it puts into commands as it is, though a virtual environment may lie in a folder with a space
        cpp_extension.TORCH_LIB_PATH = shlex.quote(os.path.join(os.path.dirname(torch.__file__), "lib"))
        wanted = [path for path in sources() if path.endswith((".cpp", ".cu"))
                  and (cuda or not path.startswith(os.path.join(FOLDER, "cuda")))]
        if cuda:
            cpp_extension.CUDA_HOME = cuda_home()
        silent = cuda and not os.environ.get("TORCH_CUDA_ARCH_LIST")  # then PyTorch compiles for every GPU there is
        try:
            if silent:
                os.environ["TORCH_CUDA_ARCH_LIST"] = gpus()
            cpp_extension.load("resnet50", wanted, extra_cflags=list(map(shlex.quote, compile_flags)),
                               extra_ldflags=list(map(shlex.quote, link_flags)), extra_cuda_cflags=CUDA_FLAGS,
                               extra_include_paths=[FOLDER], build_directory=temporary, with_cuda=cuda,
                               is_python_module=False)
        finally:
            if silent:
                del os.environ["TORCH_CUDA_ARCH_LIST"]
        library, = glob.glob(os.path.join(temporary, "resnet50*.so"))
        with open(library, "rb") as f:
            os.fsync(f.fileno())
        shutil.rmtree(os.path.join(folder, name), ignore_errors=True)  # a build without its library would be in the way
        os.rename(temporary, os.path.join(folder, name))
        return os.path.join(folder, name, os.path.basename(library))
    except (ImportError, OSError, RuntimeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        wrong = [line.strip() for line in lines if re.search(r"error: |undefined reference|cannot find", line)]
        message = "the extension does not build: " + " | ".join((wrong or lines)[:3])
        if not cuda or os.environ.get("RESNET50_EXT") == "require":
            raise BuildError(message) from error
        print(f"resnet50: with CUDA {message}; once more without", file=sys.stderr, flush=True)
        return compile_into(folder, name, False)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ------------------------------------------------------------------------------------------------ registration

_state = None  # (whether the native library is loaded, why not), once load() has run
_library = None  # registrations last as long as this


def _unlock():
    global _lock
    _lock = threading.Lock()


_unlock()
os.register_at_fork(after_in_child=_unlock)  # a thread that was loading exists in the parent only


def load():
    """Registers the operations, with the native library if it can be had. -> whether it could. Any number of calls,
    from any thread."""
    global _state
    if _state is None:
        with _lock:
            if _state is None:
                _state = _load()
    return _state[0]


# What torch.compiler.assume_constant_result does, without its import of the compiler (seconds): load() runs while code
# is traced, and is no part of the graph.
load._dynamo_marked_constant = True


def _load():
    mode, reason = os.environ.get("RESNET50_EXT") or "auto", "RESNET50_EXT=off"
    if mode not in ("auto", "off", "cpu", "require"):
        raise RuntimeError(f"RESNET50_EXT={mode}: expected off, cpu or require, or nothing")
    if mode != "off":
        try:
            torch.ops.load_library(build())
            reason = None
        except (BuildError, OSError) as error:
            if mode == "require":
                raise
            reason = str(error)
    if reason:
        print(f"resnet50: plain PyTorch instead of the native extension: {reason}", file=sys.stderr, flush=True)
    register(native=reason is None)
    return reason is None, reason


def schemas():
    """The operations as ops.cpp declares them: the strings of its m.def(...) lines, adjacent literals joined."""
    with open(os.path.join(FOLDER, "ops.cpp"), encoding="utf-8") as f:
        calls = re.findall(r'\bm\.def\(\s*((?:"[^"]*"\s*)+)\)', f.read())
    return ["".join(re.findall(r'"([^"]*)"', call)) for call in calls]


def register(native):
    """The reference serves every device that has no kernel of its own; fake kernels and gradients serve both."""
    global _library
    _library = torch.library.Library("resnet50", "FRAGMENT")
    for schema in () if native else schemas():
        _library.define(schema)
    for name, (check, function) in reference.OPERATIONS.items():
        def kernel(*args, check=check, function=function):
            check(*args)
            return function(*args)
        _library.impl(name, kernel, "CompositeExplicitAutograd")
    for name, fake in FAKES.items():
        torch.library.register_fake(f"resnet50::{name}", fake, lib=_library)
    torch.library.register_autograd("resnet50::bn_relu", _bn_relu_backward, setup_context=_bn_relu_saves, lib=_library)
    torch.library.register_autograd("resnet50::bn_relu_backward", _not_twice, lib=_library)


def _empty(like, size, dtype=None):
    y = like.new_empty(size, dtype=dtype)
    return y.to(memory_format=torch.channels_last) if y.dim() == 4 else y


def _fake(check, dtype=None):
    """-> a fake kernel: its result has the size that the check returns, or one that only running tells, and the dtype
    of the first tensor unless another is given."""
    def fake(*args):
        size = check(*args) or (torch.library.get_ctx().new_dynamic_size(),)
        return _empty(next(a for a in args if isinstance(a, torch.Tensor)), size, dtype)
    return fake


def _fake_gemm_int8(a, b, bias=None, mult=None, scale=None):
    size = reference.check_gemm_int8(a, b, bias, mult, scale)
    return _empty(a, size, torch.uint8 if mult is not None else torch.int32 if scale is None else torch.float32)


def _fake_bn_relu(x, weight, *args):
    size = reference.check_bn_relu(x, weight, *args)
    return _empty(x, size), torch.empty_like(weight), torch.empty_like(weight)


def _fake_bn_relu_backward(grad, y, x, weight, mean, invstd, relu, residual):
    size = reference.check_bn_relu_backward(grad, y, x, weight, mean, invstd, relu, residual)
    return (_empty(x, size), _empty(x, size if residual else 0), torch.empty_like(weight), torch.empty_like(weight))


FAKES = {name: _fake(check) for name, (check, _) in reference.OPERATIONS.items()} | {
    "gemm_int8": _fake_gemm_int8, "bn_relu": _fake_bn_relu, "bn_relu_backward": _fake_bn_relu_backward,
    "crop_images": _fake(reference.check_crop_images, torch.bool),
    "pack_int8": _fake(reference.check_pack_int8, torch.uint8),
    "pack_float": _fake(reference.check_pack_float, torch.uint8)} | {
    name: _fake(functools.partial(reference.check_network, name), dtype) for name, dtype in (
        ("network_int8", torch.float32), ("network_float", torch.float32), ("network_profile", torch.int64))}


def _bn_relu_saves(ctx, inputs, output):
    x, weight, _, residual, _, ctx.relu = inputs
    y, mean, invstd = output
    ctx.residual = residual is not None
    ctx.save_for_backward(y, x, weight, mean, invstd)
    ctx.mark_non_differentiable(mean, invstd)


def _bn_relu_backward(ctx, grad, *_):
    grad = grad.contiguous(memory_format=torch.channels_last)
    dx, dresidual, dweight, dbias = torch.ops.resnet50.bn_relu_backward(grad, *ctx.saved_tensors, ctx.relu,
                                                                        ctx.residual)
    return dx, dweight, dbias, dresidual if ctx.residual else None, None, None


def _not_twice(ctx, *_):  # without a formula its gradients would be constants
    raise RuntimeError("bn_relu: is not differentiable twice; use batch_norm and relu of torch.nn.functional for that")


# -------------------------------------------------------------------------------------------------- operations

def _ops():
    load()
    return torch.ops.resnet50


def _native(name, *args):
    if not load():
        raise RuntimeError(f"{name} needs the native extension, which is not loaded: {_state[1]}")
    return getattr(torch.ops.resnet50, name)(*args)


def conv_int8(x, weight, mult, bias, residual=None, gain=None, x2=None, weight2=None, pad_value=None, stride=(1, 1),
              padding=(0, 0), stride2=(1, 1), groups=1):
    """uint8 (N, C, H, W) NHWC by int8 (O, C / groups, kh, kw) -> uint8 (N, O, Ho, Wo) NHWC:
    clamp(RNE(mult / 2^22 * (bias + conv(x, weight) + conv(x2, weight2, stride2) + gain * residual)), 0, 255).
    mult, bias, gain int32 (O); residual uint8 as the result; x2 uint8 (N, C2, H2, W2) with weight2 int8 (O, C2, 1, 1);
    pad_value uint8 (C), 0 without it."""
    return _ops().conv_int8(x, weight, mult, bias, residual, gain, x2, weight2, pad_value, stride, padding, stride2,
                            groups)


def pack_2_4(weight):
    """int8 (O, C, kh, kw) NHWC -> uint8, what conv_int8_2_4 takes; None unless C is a multiple of 16 and of each four
    channels that follow each other two at least are zero (compress.py --sparsity-2-4). Never saved."""
    return reference.pack_2_4(weight)


def conv_int8_2_4(x, weight, mult, bias, kernel, residual=None, gain=None, x2=None, weight2=None, stride=(1, 1),
                  padding=(0, 0), stride2=(1, 1)):
    """conv_int8 with the kernel (kh, kw), weight and weight2 packed by pack_2_4: the same bits. On CUDA half of the
    multiplies; elsewhere there is no kernel for it, and PyTorch unpacks the weights."""
    return _ops().conv_int8_2_4(x, weight, mult, bias, kernel, residual, gain, x2, weight2, stride, padding, stride2)


def gemm_int8(a, b, bias=None, mult=None, scale=None):
    """uint8 (M, K) by int8 (N, K), bias int32 (N) -> int32 (M, N); with mult int32 (N) requantized to uint8 as in
    conv_int8; with scale float32 (N) float32."""
    return _ops().gemm_int8(a, b, bias, mult, scale)


def pack_int8(weight, mult, bias, gain=None, weight2=None, winograd=False):
    """conv_int8's parameters -> uint8 (bytes), in the order in which this machine's kernels read them. Never saved.
    winograd: for 3x3 with stride 1 and padding 1, also as cpu/winograd.h reads them, 8 times the bytes."""
    return _native("pack_int8", weight, mult, bias, gain, weight2, winograd)


def pack_float(weight, bias, weight2=None, winograd=False):
    """bfloat16 or float32 (O, C, kh, kw), float32 (O), the weights' type (O, C2, 1, 1) -> uint8 (bytes), as pack_int8,
    if has_float(weight.dtype). winograd: float32 alone as cpu/winograd.h reads them, 16 / 9 of the bytes."""
    return _native("pack_float", weight, bias, weight2, winograd)


def network_int8(pixels, plan, classes):
    """uint8 (N, 3, H, W) NHWC, a plan uint8 (bytes) -> logits float32 (N, classes): the whole network in one call."""
    return _native("network_int8", pixels, plan, classes)


def network_float(pixels, plan, classes):
    """The same with a plan in bfloat16 or float32, where has_float(it)."""
    return _native("network_float", pixels, plan, classes)


def network_profile(pixels, plan, classes):
    """network_int8's or network_float's arguments -> int64 (steps): nanoseconds of each step of the plan."""
    return _native("network_profile", pixels, plan, classes)


def max_pool_int8(x, kernel, stride, padding):
    """uint8 (N, C, H, W) NHWC -> uint8 (N, C, Ho, Wo): maxima of square windows."""
    return _ops().max_pool_int8(x, kernel, stride, padding)


def avg_pool_int8(x, mult):
    """uint8 (N, C, H, W) NHWC, mult int32 (1) -> uint8 (N, C): clamp(RNE(j / 2^22 * sum)), j = mult / (H W) rounded."""
    return _ops().avg_pool_int8(x, mult)


def gate_int8(x, residual, weight1, bias1, weight2, bias2, scales, zeros):
    """uint8 (N, C, H, W) NHWC, residual the same: relu(gate(x) * x + residual); or without residual (N, 2 C, H, W), two
    branches: gate(x) * a + (1 - gate(x)) * b -> uint8 (N, C, H, W). The gate's layers are float32 (inner, C), (inner),
    (C or 2 C, inner), (C or 2 C); scales float64 (3) of both maps and of the result, zeros int32 (2) of both maps. What
    exactly: reference.gate_int8."""
    return _ops().gate_int8(x, residual, weight1, bias1, weight2, bias2, scales, zeros)


def jpeg_sizes(files, places):
    """files, a list of uint8 (bytes), places int64 (N, 3): which of them, offset and length -> int64 (N, 2): height and
    width of those JPEGs that crop_images decodes: 8-bit grey or colour, with an end. Zeros for all others."""
    return _ops().jpeg_sizes(files, places)


def jpeg_restart(file, pixels=64):
    """A JPEG file uint8 (bytes) -> one with the same coefficients and metadata, sequential, with a restart marker about
    every `pixels` columns; empty if it is damaged, no JPEG, or there is no libjpeg-turbo."""
    return _ops().jpeg_restart(file, pixels)


def crop_images(out, files, places, sizes, crops, kernel="bilinear", gap=0):
    """Writes a box of each image, resized with antialiasing and cut to out's size, into out uint8 (N, 3, H, W) NHWC on
    the CPU, in the caller's thread and without Python's lock. Row i of crops int64 (N, 9): the box (top, left, height,
    width), its size when resized, the first row and column wanted of that, and 1 to mirror. An image lies in `files` at
    places[i], as jpeg_sizes has them: a JPEG, or, where sizes int64 (N, 2) has its height and width, RGB pixels. Only
    what the box needs of a JPEG is decoded, at a half, a quarter or an eighth of its size where `gap` (0: never) times
    the resized size is left. -> bool (N): which were written. The others are no intact JPEGs, or would have more than
    2^28 pixels when resized, which is for strips thousands of times as long as they are wide. Pixels are those of
    torch.nn.functional.interpolate(antialias=True) on the decoded box, bit for bit."""
    return _ops().crop_images(out, files, places, sizes, crops, kernel, gap)


def _conv_float32(x, weight, scale, bias, residual, relu, stride, padding, groups):
    """conv_bn_relu on CUDA, where it is PyTorch's: with as few passes over the result, which take the time there, as
    PyTorch's own network"""
    y = torch.conv2d(x, weight, None, stride, padding, 1, groups)
    y = torch.addcmul(bias.view(-1, 1, 1), y, scale.view(-1, 1, 1))
    y = y if residual is None else y.add_(residual)
    return (y.relu_() if relu else y).contiguous(memory_format=torch.channels_last)


def conv_bn_relu(x, weight, scale, bias, residual=None, relu=True, stride=(1, 1), padding=(0, 0), groups=1):
    """relu(conv(x, weight) * scale + bias + residual) for inference. x (N, C, H, W) NHWC, weight (O, C / groups, kh,
    kw) and residual float32 or bfloat16 (on CUDA float16 too), scale and bias float32 (O): a batch-norm folds into
    these. float32 on CUDA is PyTorch's own convolution."""
    ops = _ops()
    if x.is_cuda and x.dtype == torch.float32:
        reference.check_conv_bn_relu(x, weight, scale, bias, residual, relu, stride, padding, groups)
        return _conv_float32(x, weight, scale, bias, residual, relu, stride, padding, groups)
    return ops.conv_bn_relu(x, weight, scale, bias, residual, relu, stride, padding, groups)


def bn_relu(x, weight, bias, residual=None, running_mean=None, running_var=None, momentum=0.1, eps=1e-5, relu=True):
    """relu(batch_norm(x) + residual) in training, differentiable. x, residual (N, C, H, W) NHWC float32 or bfloat16,
    the rest float32 (C). The running statistics are updated as by torch.nn.BatchNorm2d."""
    y, mean, invstd = _ops().bn_relu(x, weight, bias, residual, eps, relu)
    if running_mean is not None:
        count = x.numel() // x.shape[1]
        if count < 2:
            raise ValueError(f"bn_relu: x is {tuple(x.shape)}; expected more than one value per channel for a variance")
        with torch.no_grad():
            # the variance from invstd: off by 1e-7 of (variance + eps), and that sum is all it will be used in
            variance = (invstd.pow(-2) - eps).clamp_(min=0) * (count / (count - 1))
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(variance, momentum)
    return y


# -------------------------------------------------------------------------------------------------- what there is

def has_cuda():
    """Whether the library has CUDA kernels, with or without a GPU to run them."""
    return load() and torch._C._dispatch_has_kernel_for_dispatch_key("resnet50::conv_int8", "CUDA")


def isa():
    """The instruction set that the int8 kernels use: plain, avx2, vnni or amx; "pytorch" without the native library."""
    if not load():
        return "pytorch"
    one = torch.ones(1, dtype=torch.int32)
    return ISAS[int(pack_int8(one.to(torch.int8).view(1, 1, 1, 1), one, one)[4:8].view(torch.int32))]  # Packed.isa


def has_float(dtype):
    """Whether networks in bfloat16 run as one call: with AMX, or AVX-512 and its BF16 part; in float32: with AVX2."""
    with contextlib.suppress(RuntimeError):
        pack_float(torch.ones(1, 1, 1, 1, dtype=dtype), torch.ones(1))
        return True
    return False


def describe():
    """One line on what runs; it loads a library that is built but builds none."""
    if _state is None and os.environ.get("RESNET50_EXT") != "off":
        with contextlib.suppress(BuildError, OSError):  # load() says what is wrong with the folders, or with variables
            if (versions := compilers())[0] and not find_build(cache_folders(), versions):
                return "not built yet: its first use builds it, or python -m csrc"
    return f"native, {isa()}{' and CUDA' if has_cuda() else ''}" if load() else f"plain PyTorch: {_state[1]}"
