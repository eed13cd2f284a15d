"""The other engines that tests.bench.infer compares with, and what holds all of them to the same conditions.

A peer is exported and quantized once, on the calibration images, into a folder keyed by weights and versions; later
runs only compile it. Every function imports its packages itself, so that a missing one costs its own contender alone.
"""
import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import struct
import sys
from importlib import metadata

import torch
from torch import nn
from torch.nn import functional as F

import export
from resnet50 import norm_relu, normalize

PACKAGES = ("torch", "openvino", "nncf", "onnxruntime", "onnx", "numpy")


class Skip(Exception):
    """Why a contender cannot run here: one line."""


def versions():
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


# ------------------------------------------------------------------------------------------- instruction sets

ONEDNN = {"amx": None, "vnni": "AVX512_CORE_VNNI", "avx2": "AVX2", "plain": "SSE41"}
ATEN = {"amx": None, "vnni": "avx512", "avx2": "avx2", "plain": "default"}


def deny_amx():
    """Refuses the system call by which a process asks Linux for tile registers, here and in what is executed from here:
    the one switch that every library obeys, those that ask cpuid alone included. -> whether the kernel took it."""
    instructions = ((0x20, 0, 0, 0),  # load seccomp_data.nr
                    (0x15, 0, 3, 158),  # not arch_prctl: allow
                    (0x20, 0, 0, 16),  # load the low half of its first argument
                    (0x15, 0, 1, 0x1023),  # not ARCH_REQ_XCOMP_PERM: allow
                    (0x06, 0, 0, 0x00050001),  # answer EPERM
                    (0x06, 0, 0, 0x7fff0000))  # allow
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *i) for i in instructions))
    program = ctypes.create_string_buffer(struct.pack("HP", len(instructions), ctypes.addressof(code)))
    prctl = ctypes.CDLL(None).prctl
    return prctl(38, 1, 0, 0, 0) == 0 and prctl(22, 2, program) == 0  # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP


def limit_isa(isa, say):
    """Starts this command again so that nothing in it uses more than `isa`, as far as each library can be held."""
    if os.environ.get("RESNET50_ISA") == isa:
        return
    if isa != "amx":
        say(f"--isa {isa}: AMX {'denied to all' if deny_amx() else 'cannot be denied on this system'}; PyTorch and "
            f"OpenVINO held to {isa}" + ("" if isa == "vnni" else "; onnxruntime knows no limit below AVX-512"))
    os.environ["RESNET50_ISA"] = isa
    for variable, value in (("ONEDNN_MAX_CPU_ISA", ONEDNN[isa]), ("ATEN_CPU_CAPABILITY", ATEN[isa])):
        if value:
            os.environ[variable] = value
    sys.stderr.flush()
    os.execv(sys.executable, sys.orig_argv)


# ------------------------------------------------------------------------------------------------ built peers

def check_bf16(name):
    """Raises Skip where an engine would emulate bf16, seconds per image."""
    if name == "openvino_bf16":
        usable = "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    else:
        usable = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not usable:
        raise Skip("this CPU has no bf16 that the engine uses")


def compiled(call):
    """torch.compile with the weights frozen into the graph. Every batch size and number of threads compiles anew."""
    import torch._inductor.config
    torch._inductor.config.freezing = True
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(call, dynamic=False)


def cached(root, model, suffix, build):
    """-> folder that holds what build(folder) wrote, whole: it is renamed into place."""
    digest = hashlib.blake2b(repr((versions(), model.config, model.preprocess)).encode(), digest_size=8)
    for tensor in model.state_dict().values():
        digest.update(tensor.contiguous().numpy().tobytes())
    folder = os.path.join(root, f"{suffix}-{digest.hexdigest()}")
    if not os.path.isdir(folder):
        part = f"{folder}.{os.getpid()}"
        os.makedirs(part)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # progress bars
                build(part)
            os.rename(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


@functools.cache
def openvino_core():
    """The plugin counts the cores that it may use once, at its first use: to be called before any thread is pinned."""
    import openvino
    core = openvino.Core()
    core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return core


def openvino_files(root, model, pixels):
    """-> folder with float.xml and int8.xml: normalised float (1, 3, H, W) in."""
    import openvino
    openvino_core()

    def build(folder):
        import nncf
        images = normalize(pixels, model.preprocess).contiguous()
        converted = openvino.convert_model(model, example_input=images[:1])
        converted.reshape([1, *images.shape[1:]])
        openvino.save_model(converted, os.path.join(folder, "float.xml"), compress_to_fp16=False)
        dataset = nncf.Dataset([image[None].numpy() for image in images])
        quantized = nncf.quantize(converted, dataset, preset=nncf.QuantizationPreset.PERFORMANCE,
                                  subset_size=len(images))
        openvino.save_model(quantized, os.path.join(folder, "int8.xml"))
    return cached(root, model, "openvino", build)


def exported_file(root, model):
    """-> resnet50.onnx of an int8 network: uint8 (N, H, W, 3) in, by export.py"""
    def build(folder):
        args = export.get_args_parser().parse_args(["--pixels", "--dynamic-batch"])
        args.image_size, args.opset = model.preprocess["crop"], export.OPSETS[-1]
        export.export(model, dict(classes=None, wnids=None), args, os.path.join(folder, "resnet50.onnx"))
    return os.path.join(cached(root, model, "exported", build), "resnet50.onnx")


def openvino_call(path, precision, preprocess, size, batch, threads):
    """-> call(uint8 (N, 3, H, W) channels_last) -> float32 (N, classes). `path` is openvino_files' folder, or what
    exported_file wrote. The same bytes as ours, by reference; conversion, mean and scale are part of the graph."""
    import openvino
    from openvino.preprocess import PrePostProcessor
    core = openvino_core()
    if path.endswith(".onnx"):
        model = core.read_model(path)
        model.reshape([batch, size, size, 3])
    else:
        model = core.read_model(os.path.join(path, "int8.xml" if precision == "int8" else "float.xml"))
        model.reshape([batch, 3, size, size])
        steps = PrePostProcessor(model)
        steps.input().tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
        steps.input().model().set_layout(openvino.Layout("NCHW"))
        mean, std = ([255 * v for v in preprocess[k]] for k in ("mean", "std"))
        steps.input().preprocess().convert_element_type(openvino.Type.f32).mean(mean).scale(std)
        model = steps.build()
    options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    if precision != "int8":  # its own choice follows the CPU
        options["INFERENCE_PRECISION_HINT"] = {"bf16": "bf16", "fp32": "f32"}[precision]
    request = core.compile_model(model, "CPU", options).create_infer_request()

    def call(pixels):
        request.set_input_tensor(openvino.Tensor(pixels.permute(0, 2, 3, 1).numpy(), shared_memory=True))
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data)
    return call


class FromPixels(nn.Module):
    """uint8 (N, H, W, 3) -> logits, normalisation inside. The pooling is written as the operator that has an int8
    kernel in onnxruntime."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixels):
        x = normalize(pixels.permute(0, 3, 1, 2), self.model.preprocess)
        x = self.model.maxpool(norm_relu(self.model.bn1, self.model.conv1(x)))
        for block in self.model.blocks():
            x = block(x)
        return self.model.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def onnxruntime_file(root, model, pixels):
    """-> int8.onnx: uint8 (N, H, W, 3) in, Q/DQ form, u8 activations, s8 weights per channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process
    images = pixels.permute(0, 2, 3, 1).numpy()

    class Reader(CalibrationDataReader):
        rows = ({"pixels": images[i:i + 1]} for i in range(len(images)))

        def get_next(self):
            return next(self.rows, None)

    def build(folder):
        raw, ready = (os.path.join(folder, name) for name in ("float.onnx", "ready.onnx"))
        torch.onnx.export(FromPixels(model), (torch.from_numpy(images[:1]),), raw, dynamo=False, opset_version=17,
                          input_names=["pixels"], output_names=["logits"], dynamic_axes={"pixels": {0: "N"}})
        quant_pre_process(raw, ready, skip_symbolic_shape=True)
        quantize_static(ready, os.path.join(folder, "int8.onnx"), Reader(), quant_format=QuantFormat.QDQ,
                        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, per_channel=True,
                        op_types_to_quantize=["Conv", "Add", "MaxPool", "GlobalAveragePool", "Gemm"])
        os.unlink(raw)
        os.unlink(ready)
    return os.path.join(cached(root, model, "onnxruntime", build), "int8.onnx")


def onnxruntime_call(path, batch, threads):
    """-> call as openvino_call's. The graph takes the uint8 NHWC bytes themselves, without a copy, and normalises them:
    some 1 % of its time."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_free_dimension_override_by_name("N", batch)
    # its workers would spin for tens of milliseconds into the next contender's time
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(None, {"pixels": pixels.permute(0, 2, 3, 1).numpy()})[0])
