"""One file that other runtimes load, compared with the network it was made of before it gets its name.

  python export.py --dynamic-batch                              # runs/compress/best.pt or the like -> ONNX
  python export.py --checkpoint FILE --pixels --softmax         # from uint8 pixels to probabilities
  python export.py --format torchscript | torch-export | aot-inductor | tensorrt
  python export.py --dynamic-batch --pixels --bench             # every runtime that is installed, in alternation

ONNX files of int8 networks are in Q/DQ form and compute what our own int8 program does, bit by bit: activations are
counted in their own steps, so all scales are whole numbers / 2^22. What else a file says of itself (classes,
preprocessing) is in its metadata and in FILE.json beside it.
"""
import argparse
import contextlib
import copy
import functools
import importlib.util
import io
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from unittest import mock

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.nn import functional as F

import csrc
import data
from csrc.reference import GATE_BITS, MULT_BITS, gate_int8
from resnet50 import (
    Cascade,
    FloatStep,
    Help,
    UserError,
    add_model_args,
    atomic_file,
    batch_norm_affine,
    check_sizes,
    example,
    fuse,
    load_some_model,
    measure,
    normalize,
    positive,
    predict,
    run_script,
)

DEFAULTS = ["runs/compress/best.pt", "runs/finetune/best.pt", "runs/train/best.pt"]
SUFFIX = {"onnx": ".onnx", "torchscript": ".ts", "torch-export": ".pt2", "aot-inductor": ".aoti.pt2",
          "tensorrt": ".engine"}
OPSETS = range(13, 21)  # from 13 on Q/DQ knows scales per channel; 20 is the last that torch.onnx's tracer writes
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "int8": 1e-4, "mixed": 2e-2, "coarse": 0.5}  # of the largest logit
REGRET = 0.5  # a network that is sure of nothing passes the coarser of these with any answer


# --------------------------------------------------------------------------------------- what every file computes

def conv_int8(x, weight, mult, bias, residual=None, gain=None, x2=None, weight2=None, pad_value=None,
              stride=(1, 1), padding=(0, 0), stride2=(1, 1), groups=1):
    """csrc.conv_int8 in operations that any PyTorch has. Sums of whole numbers below 2^24 are exact in float32."""
    def view(values):
        return values.double().view(1, -1, 1, 1)
    wide, bias = weight.float(), view(bias)
    x = x.float()
    if pad_value is not None:  # what lies around the pixels becomes zero
        x = x - pad_value.float().view(1, -1, 1, 1)
        bias = bias + view((wide * pad_value.float().view(1, -1, 1, 1)).sum((1, 2, 3)))
    acc = F.conv2d(x, wide, None, stride, padding, 1, groups)
    if x2 is not None:
        acc = acc + F.conv2d(x2.float(), weight2.float(), None, stride2)
    acc = acc.double() + bias
    if residual is not None:
        acc = acc + view(gain) * residual
    return (acc * (view(mult) / 2 ** MULT_BITS)).round().clamp(0, 255).to(torch.uint8)


def gemm_int8(a, b, bias=None, mult=None, scale=None):
    acc = a.double() @ b.double().t()
    return ((acc if bias is None else acc + bias) * scale.double()).float()


def max_pool_int8(x, kernel, stride, padding):
    return F.max_pool2d(x.float(), kernel, stride, padding).to(torch.uint8)


def avg_pool_int8(x, mult):
    pixels = x.shape[2] * x.shape[3]
    mult = torch.div(mult + pixels // 2, pixels, rounding_mode="floor")
    return (x.double().sum((2, 3)) * (mult / 2.0 ** MULT_BITS).double()).round().clamp(0, 255).to(torch.uint8)


PLAIN = {f.__name__: f for f in (conv_int8, gemm_int8, max_pool_int8, avg_pool_int8, gate_int8)}


class Exported(nn.Module):
    """uint8 pixels (N, H, W, 3), or what normalize makes of them, float32 (N, 3, H, W) -> float32 logits (N, classes),
    or with `softmax` probabilities, or with `top_k` the K largest of these and their classes, int64 (N, K)."""

    def __init__(self, model, pixels=False, softmax=False, top_k=0, half=False):
        super().__init__()
        self.int8, self.dtype = model.precision == "int8", torch.float16 if half else torch.float32
        self.model = halved(model) if half else model
        self.pixels, self.softmax, self.top_k = pixels, softmax, top_k
        for key in ("mean", "std"):
            self.register_buffer(key, 255 * torch.tensor(model.preprocess[key]).view(3, 1, 1))

    def forward(self, x):
        if self.pixels:
            x = x.permute(0, 3, 1, 2)
        if self.int8:
            x = x if self.pixels else (x * self.std + self.mean).round().clamp(0, 255).to(torch.uint8)
            y = self.model.run(x)
        else:
            x = (x.float() - self.mean) / self.std if self.pixels else x
            y = self.model(x.to(self.dtype))
        return self.head(y.float())

    def head(self, y):
        y = y.softmax(1) if self.softmax else y
        return tuple(y.topk(self.top_k, 1)) if self.top_k else y  # torch.export saves no named ones

    def input(self, batch, size):
        """-> name and shape of what forward takes"""
        return ("pixels", [batch, size, size, 3]) if self.pixels else ("input", [batch, 3, size, size])

    @property
    def outputs(self):
        name = "probabilities" if self.softmax else "logits"
        return [f"top_{name}", "top_classes"] if self.top_k else [name]


def halved(model):
    """In place, weights and arithmetic in float16. Batch-norms become a scale and a shift first: a variance may be
    beyond float16's range, as one of the 2015 weights' first convolution is."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data, module.bias.data = batch_norm_affine(module)
            module.running_mean.zero_()
            module.running_var.fill_(1)
    return model.half()


# ----------------------------------------------------------------------------------------------------------- ONNX

class Graph:
    """An int8 network as standard ONNX operators between QuantizeLinear and DequantizeLinear. A float tensor counts in
    the steps of its grid, so a scale is 1 where nothing is multiplied, and else mult / 2^22 or the like, which float32
    holds exactly: in exact arithmetic the file is our int8 program. `signed`: int8 activations without a zero point, in
    steps twice as large, for TensorRT, which knows no others; its first convolution then stays in float32.
    `quantize_adds`: a convolution is rounded, to two steps, before a residual is added, which our program does not do,
    but without which onnxruntime multiplies in float32."""

    def __init__(self, model, size, signed=False, quantize_adds=False):
        self.model, self.size = model, size
        self.signed, self.quantize_adds = signed, quantize_adds
        self.nodes, self.values, self.watched, self.sides = [], {}, [], {}
        model.run(example(model, 1, size), watch=lambda step, y: self.sides.update({step.name: y.shape[-1]}))

    def op(self, kind, *inputs, outputs=1, **attributes):
        """Adds a node; inputs are names, or arrays, which become constants -> its output's name, or their list"""
        number = len(self.nodes)
        names = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        made = [f"{kind}_{number}" + f"_{i}" * (outputs > 1) for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, names, made, name=f"{kind}_{number}", **attributes))
        return made[0] if outputs == 1 else made

    def constant(self, array):
        array = np.asarray(array, order="C")
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.values:
            self.values[key] = numpy_helper.from_array(array, f"constant_{len(self.values)}")
        return self.values[key].name

    def quantized(self, x, scale=1.0, zero=0, kind="QuantizeLinear"):
        """float -> what stands for scale * (value - zero)"""
        dtype, scale = (np.int8, 2 * scale) if self.signed else (np.uint8, scale)
        return self.op(kind, x, np.float32(scale), np.array(zero, dtype))

    def floats(self, x, scale=1.0, zero=0):
        return self.quantized(x, scale, zero, "DequantizeLinear")

    def weights(self, integers, scale):
        """int8 (O, ...) or int32 (O), scale (O) -> float"""
        scale = np.asarray(scale, np.float32)
        return self.op("DequantizeLinear", integers, scale, np.zeros(scale.shape, integers.dtype), axis=0)

    def build(self, exported, batch, opset):
        """-> onnx.ModelProto; `watched` then names what is quantized: [(step, output)]"""
        model, (name, shape) = self.model, exported.input(batch, self.size)
        kind = TensorProto.UINT8 if exported.pixels else TensorProto.FLOAT
        self.buffers = {"pixels": (self.pixels(name, exported), self.signed)}  # name of the tensor, whether it is float
        for step in model.steps:
            self.buffers[step.name] = self.add(step, model.get_submodule(step.name))
        x = self.buffers[model.steps[-1].name][0]
        if exported.softmax:
            x = self.op("Softmax", x, axis=1)
        classes, k = model.config["num_classes"], exported.top_k
        found = self.op("TopK", x, np.array([k]), axis=1, outputs=2) if k else [x]
        outputs = [helper.make_tensor_value_info(o, t, [batch, k or classes])
                   for o, t in zip(exported.outputs, (TensorProto.FLOAT, TensorProto.INT64))]
        for x, output in zip(found, outputs):
            self.nodes.append(helper.make_node("Identity", [x], [output.name], name=output.name))
        graph = helper.make_graph(self.nodes, "resnet50", [helper.make_tensor_value_info(name, kind, shape)], outputs,
                                  list(self.values.values()))
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)

    def pixels(self, x, exported):
        """The input -> uint8 (N, 3, H, W), or for `signed` the same in float32"""
        if exported.pixels:
            x = self.op("Transpose", x, perm=[0, 3, 1, 2])
            return self.op("Cast", x, to=TensorProto.FLOAT) if self.signed else x
        x = self.op("Add", self.op("Mul", x, exported.std[None].numpy()), exported.mean[None].numpy())
        return x if self.signed else self.quantized(x)

    def grid(self, name):
        """-> scale and zero of the step whose integers a buffer holds"""
        if name == "pixels":
            return 1.0, 0
        module = self.model.get_submodule(self.model.grids[name])
        return module.scale.item(), int(getattr(module, "zero", 0))

    def stored(self, name):
        """-> a buffer's integers"""
        x, is_float = self.buffers[name]
        return self.quantized(x, *self.grid(name)) if is_float else x

    def read(self, name, real=False):
        """-> float tensor of a buffer: its integers, as int8 convolutions read it, or `real`, as FloatSteps do"""
        x, is_float = self.buffers[name]
        if is_float and (real or name == "pixels"):
            return x
        return self.floats(self.stored(name), *self.grid(name) if real else ())

    def add(self, step, module):
        """One step -> (its tensor, whether it is float)"""
        floating = isinstance(module, FloatStep)
        if step.kind not in ("conv", "linear"):
            floating = any(self.buffers[name][1] for name in (step.x, step.residual) if name)
        y = getattr(self, f"add_{step.kind}")(step, module, floating)
        if floating or step.kind == "linear":
            return y, True
        self.watched.append((step.name, self.quantized(y)))
        return self.watched[-1][1], False

    def conv(self, x, weight, bias, stride, padding, groups=1):
        return self.op("Conv", x, weight, *([] if bias is None else [bias]), strides=[stride] * 2, pads=[padding] * 4,
                       group=groups)

    def add_conv(self, step, module, floating):
        x = self.read(step.x, floating)
        if floating:
            if module.centre is not None:
                x = self.op("Sub", x, module.centre.view(1, -1, 1, 1).numpy())
            (stride, _), (padding, _), _, groups = module.sizes
            y = self.conv(x, module.weight.numpy(), module.bias.numpy(), stride, padding, groups)
            if step.folded:
                y = self.op("Add", y, self.conv(self.read(step.x2, True), module.weight2.numpy(), None,
                                                module.stride2[0], 0))
            y = self.op("Add", y, self.read(step.residual, True)) if step.residual else y
            return self.op("Relu", y) if module.relu else y
        weight, bias, padding = module.weight, module.bias, module.padding
        unit = module.mult.numpy() / 2.0 ** MULT_BITS
        if step.x == "pixels":
            x, padding, bias = self.padded(x, module)
        if step.folded:  # one product over the channels of both, as the kernels have it
            x2 = self.read(step.x2)
            if module.stride2 > 1:
                x2 = self.op("MaxPool", x2, kernel_shape=[1, 1], strides=[module.stride2] * 2)
            x, weight = self.op("Concat", x, x2, axis=1), torch.cat([weight, module.weight2], 1)
            x = self.floats(self.quantized(x))
        weight = weight.contiguous().numpy()
        weight = (weight * unit.reshape(-1, 1, 1, 1)).astype(np.float32) if self.signed and step.x == "pixels" else \
            self.weights(weight, unit)
        y = self.conv(x, weight, self.weights(bias.numpy(), unit), module.stride, padding, module.groups)
        if step.residual:
            total = module.gain.double() * module.mult
            if (total == total[0]).all():
                r = self.floats(self.stored(step.residual), total[0].item() / 2 ** MULT_BITS)
            else:  # a channel that conv_grid gave a unit larger than the residual's
                r = self.read(step.residual)
                for factor in (module.gain.numpy(), unit):
                    r = self.op("Mul", r, factor.astype(np.float32).reshape(1, -1, 1, 1))
            if self.quantize_adds:
                rounding = () if self.signed else (2.0, 128)
                y = self.floats(self.quantized(y, *rounding), *rounding)
            y = self.op("Add", y, r)
        return self.op("Relu", y) if step.relu else y

    def padded(self, x, module):
        """Raw pixels -> the same with the mean colour around them, padding that is left to do, and the bias"""
        p, colour = module.padding, module.pad_value
        if self.signed:
            shift = (module.weight.double() * colour.double().view(1, -1, 1, 1)).sum((1, 2, 3))
            return self.op("Sub", x, colour.float().view(1, -1, 1, 1).numpy()), p, (module.bias + shift).int()
        channels = self.op("Split", self.buffers["pixels"][0], np.array([1, 1, 1]), axis=1, outputs=3)
        channels = [self.op("Pad", c, np.array([0, 0, p, p] * 2), value.numpy()) for c, value in zip(channels, colour)]
        return self.floats(self.op("Concat", *channels, axis=1)), 0, module.bias

    def add_maxpool(self, step, module, floating, kind="MaxPool", **more):
        return self.op(kind, self.read(step.x, floating), kernel_shape=[module.kernel_size] * 2,
                       strides=[module.stride] * 2, pads=[module.padding] * 4, **more)

    def add_pool(self, step, module, floating):
        return self.add_maxpool(step, module, floating, "AveragePool", ceil_mode=int(module.ceil_mode),
                                count_include_pad=int(module.count_include_pad))

    def add_avgpool(self, step, module, floating):
        y = self.op("Flatten", self.op("GlobalAveragePool", self.read(step.x, floating)))
        if floating:
            return y
        side = self.sides[step.x]
        return self.op("Mul", y, np.float32((module.mult.item() + side ** 2 // 2) // side ** 2 * side ** 2
                                            / 2 ** MULT_BITS))

    def add_linear(self, step, module, floating):
        if floating:
            return self.op("Gemm", self.read(step.x, True), module.weight.numpy(), module.bias.numpy(), transB=1)
        weight, bias = (self.weights(v.numpy(), module.scale.numpy()) for v in (module.weight, module.bias))
        return self.op("Gemm", self.read(step.x), weight, bias, transB=1)

    def add_gate(self, step, module, floating):
        """What gate_int8 does; gates are (N, C, 1, 1) throughout."""
        names = [step.x, step.residual or step.x]
        zeros = [0 if floating else z for z in module.zeros.tolist()]
        maps = [self.read(n, True) if floating else self.floats(self.buffers[n][0], zero=z)
                for n, z in zip(names, zeros)]
        pooled = self.op("GlobalAveragePool", maps[0])
        halves = np.array([len(module.fc2.bias) // 2] * 2)
        if not step.residual:
            pooled = self.op("Add", *self.op("Split", pooled, halves, axis=1, outputs=2))
            maps = self.op("Split", maps[0], halves, axis=1, outputs=2)
        y = pooled if floating else self.op("Mul", pooled, np.float32(module.scales[0].item()))
        for layer in (module.fc1, module.fc2):
            y = self.op("Conv", y, layer.weight[:, :, None, None].numpy(), layer.bias.numpy())
            y = self.op("Relu", y) if layer is module.fc1 else y
        if step.residual:
            gates = [self.op("Sigmoid", y), None]
        else:
            first, second = self.op("Split", y, halves, axis=1, outputs=2)
            gates = [self.op("Sigmoid", self.op("Sub", a, b)) for a, b in ((first, second), (second, first))]
        parts = []
        for x, gate, scale in zip(maps, gates, module.scales.tolist()):
            factor, one = scale / module.scale.item() * 2 ** GATE_BITS, 2.0 ** -GATE_BITS
            if gate is None:
                parts.append(x if floating else self.op("Mul", x, np.float32(round(factor) * one)))
                continue
            if not floating:
                gate = self.op("Mul", self.op("Round", self.op("Mul", gate, np.float32(factor))), np.float32(one))
            parts.append(self.op("Mul", x, gate))
        y = self.op("Add", *parts)
        return self.op("Relu", y) if floating else y


def onnx_model(model, args, exported):
    """-> (onnx.ModelProto, what its int8 tensors are called: [(step, output)])"""
    batch = "N" if args.dynamic_batch else args.batch_size
    if exported.int8:
        graph = Graph(model, args.image_size, args.signed, args.quantize_adds)
        proto = graph.build(exported, batch, args.opset)
        return proto, graph.watched
    x, buffer = feed(example_pixels(args.image_size, args.batch_size), model, args.pixels), io.BytesIO()
    name, _ = exported.input(batch, args.image_size)
    axes = {k: {0: "N"} for k in [name, *exported.outputs]} if args.dynamic_batch else None
    parts = mock.patch("torch.backends.mha.get_fastpath_enabled", lambda: False)  # attention as several operations
    with warnings.catch_warnings(), plain_operations(), parts:
        warnings.simplefilter("ignore")  # the tracer is deprecated, but the other exporter needs a package more
        try:
            torch.onnx.export(exported, (x,), buffer, dynamo=False, opset_version=args.opset, input_names=[name],
                              output_names=exported.outputs, dynamic_axes=axes)
        except torch.onnx.errors.OnnxExporterError as error:
            raise UserError(f"--format {args.format}: {str(error).strip().splitlines()[0]}") from error
    return onnx.load_model_from_string(buffer.getvalue()), []


def exact(proto, watched):
    """-> a copy that onnx.reference computes in float64, with the int8 tensors among its outputs"""
    double = type(proto).FromString(proto.SerializeToString())
    for value in double.graph.initializer:
        if value.data_type == TensorProto.FLOAT:
            value.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(value).astype(np.float64), value.name))
    for node in double.graph.node:
        for a in node.attribute:
            if node.op_type == "Cast" and a.i == TensorProto.FLOAT:
                a.i = TensorProto.DOUBLE
    double.opset_import[0].version = OPSETS[-1]  # the evaluator lacks Q/DQ before 19; its meaning has not changed
    double.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.UINT8, None) for _, name in watched)
    return double


# ------------------------------------------------------------------------------------------------- the comparison

def plain_operations():
    """Inside, an int8 network is made of PyTorch's own operations, not of the extension's."""
    return mock.patch.multiple(csrc, **PLAIN)


def example_pixels(size, count, seed=0):
    """-> uint8 (count, 3, size, size), channels_last: noise, smooth colours, black, white, squares, and so on"""
    rng = torch.Generator().manual_seed(seed)
    images = torch.empty((count, 3, size, size), dtype=torch.uint8, memory_format=torch.channels_last)
    for i in range(count):
        kind = i % 5
        if kind == 0:
            image = torch.randint(0, 256, (3, size, size), generator=rng)
        elif kind == 1:
            image = F.interpolate(255 * torch.rand(1, 3, 5, 5, generator=rng), size=size, mode="bicubic")[0]
        elif kind == 4:
            image = (torch.arange(size)[:, None] // 9 + torch.arange(size) // 7).remainder(2).expand(3, -1, -1) * 255
        else:
            image = torch.full((3, size, size), 255 * (kind - 2))
        images[i] = image.clamp(0, 255)
    return images


def feed(pixels, model, as_pixels):
    """What the file takes of uint8 (N, 3, H, W)"""
    if as_pixels:
        return pixels.permute(0, 2, 3, 1).contiguous()
    return normalize(pixels, model.preprocess).contiguous()


class Case:
    """A batch, and what the network in this process says of it"""

    def __init__(self, pixels, model, exported):
        self.pixels, self.x = pixels, feed(pixels, model, exported.pixels)
        with torch.no_grad():
            logits = predict(model, pixels)
            wanted = exported.head(logits)
        if not logits.isfinite().all():
            raise UserError("the network's own logits are not all finite; nothing was written")
        self.logits, self.softmax = logits.numpy(), exported.softmax
        self.wanted = [w.numpy() for w in wanted] if exported.top_k else [wanted.numpy()]


def compare(run, cases):
    """run(x of a Case) -> its outputs, arrays. -> dict(max_difference, argmax_agreement, regret): the first of the
    largest logit, or of 1, for probabilities that of their logarithms; the second in percent of images; the third what
    the network's logits of the classes found fall short of its own best, in units of what the average class does, so
    that those which are level may trade places"""
    worst, same, count, lost, possible = 0.0, 0, 0, 0.0, 0.0
    for case in cases:
        got = [np.asarray(y) for y in run(case.x)]
        for a, b in zip(got, case.wanted, strict=True):
            if a.shape != b.shape or a.dtype != b.dtype:
                raise UserError(f"gives {a.dtype} {a.shape}, expected {b.dtype} {b.shape}")
        values = [np.log(np.maximum(y[0], 1e-30)) if case.softmax else y[0] for y in (got, case.wanted)]
        difference = np.abs(values[0].astype(np.float64) - values[1]).max() / max(1.0, np.abs(case.logits).max())
        worst = max(worst, difference if difference == difference else np.inf)
        top = [y[1] if len(y) > 1 else y[0].argmax(1)[:, None] for y in (got, case.wanted)]
        same, count = same + int((top[0][:, 0] == top[1][:, 0]).sum()), count + len(top[0])
        found, best = (np.take_along_axis(case.logits, classes, 1).astype(np.float64) for classes in top)
        lost += np.abs(best - found).sum()
        possible += np.abs(best - case.logits.mean(1, keepdims=True)).sum()
    return dict(max_difference=float(f"{worst:.3g}"), argmax_agreement=round(100 * same / count, 2),
                regret=float(f"{lost / (possible or 1):.3g}"), images=count)


RELOAD = """
import io, sys, torch
kind, path, inputs, outputs = sys.argv[1:]
if kind == "torchscript":
    call = torch.jit.load(path)
elif kind == "torch-export":
    call = torch.export.load(path).module()
else:
    call = torch._inductor.aoti_load_package(path)
made = io.BytesIO()
with torch.no_grad():
    torch.save([call(x) for x in torch.load(inputs, weights_only=True)], made)
with open(outputs, "wb") as f:
    f.write(made.getvalue())
"""


def in_a_fresh_process(kind, path, cases):
    """Loads a file where neither this folder nor its extension is known -> run, as compare() takes it"""
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = (os.path.join(folder, name) for name in ("inputs", "outputs"))
        made = io.BytesIO()
        torch.save([case.x for case in cases], made)
        pathlib.Path(inputs).write_bytes(made.getvalue())  # where it fails with OSError, torch.save has another
        link = os.path.join(folder, "model.pt2")  # torch asks for this ending
        os.symlink(os.path.abspath(path), link)
        done = subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", RELOAD, kind, link, inputs, outputs],
                              cwd=folder, capture_output=True, text=True)
        if done.returncode:
            why = (done.stderr.strip() or "killed").splitlines()[-1]
            raise UserError(f"{path}: a fresh process cannot run it: {why}")
        results = torch.load(outputs, weights_only=True)
    found = {id(case.x): y if isinstance(y, (list, tuple)) else [y] for case, y in zip(cases, results, strict=True)}
    return lambda x: [y.numpy() for y in found[id(x)]]


def identical_bytes(run, watched, model, cases):
    """-> percent of the int8 values of all layers that run(x) finds as our program does"""
    same, count = 0, 0
    for case in cases:
        ours = {}
        with torch.no_grad():
            model.run(case.pixels, watch=lambda step, y: ours.__setitem__(step.name, y))
        for (name, _), theirs in zip(watched, run(case.x)[-len(watched):], strict=True):
            equal = ours[name].numpy().reshape(theirs.shape) == theirs
            same, count = same + int(equal.sum()), count + equal.size
    return round(100 * same / count, 5)


# ------------------------------------------------------------------------------------------------------ runtimes

def onnxruntime_call(path, batch=None):
    onnxruntime = imported("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # into the next one's time
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x.numpy()})


def openvino_call(path, batch=None):
    openvino = imported("openvino")
    core = openvino.Core()
    model = core.read_model(path)
    if batch:
        model.reshape([batch, *list(model.input().partial_shape)[1:]])
    compiled = core.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads(),
                                                 "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()

    def run(x):
        request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
        request.infer()
        return [output.data.copy() for output in request.output_tensors]
    return run


RUNTIMES = {"onnxruntime": onnxruntime_call, "openvino": openvino_call}


def installed(package):
    return importlib.util.find_spec(package) is not None


def imported(package):
    """-> the module; UserError where it is broken. Signals wait: of an exception in the middle an extension module
    makes an ImportError."""
    came = []
    before = {s: signal.signal(s, lambda number, _: came.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        return importlib.import_module(package)
    except Exception as error:  # OSError, for a library that it lacks, or its own
        raise UserError(f"{package} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def trtexec(*flags):
    """Runs TensorRT's own command; UserError with its complaint"""
    done = subprocess.run([shutil.which("trtexec"), *flags], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "[E]" in line]
        raise UserError(f"trtexec: {(lines or [f'status {done.returncode}'])[-1].strip()}")


def tensorrt_engine(content, args, exported):
    """Bytes of an ONNX file -> bytes of a strongly typed engine, which takes the batches that args asks for"""
    batches = (1, min(8, args.max_batch), args.max_batch) if args.dynamic_batch else (args.batch_size,) * 3
    (name, *_), shapes = zip(*(exported.input(n, args.image_size) for n in batches))
    if not installed("tensorrt"):
        with tempfile.TemporaryDirectory() as folder:
            source, target = os.path.join(folder, "model.onnx"), os.path.join(folder, "model.engine")
            pathlib.Path(source).write_bytes(content)
            ranges = [f"--{k}Shapes={name}:{'x'.join(map(str, s))}" for k, s in zip(("min", "opt", "max"), shapes)]
            trtexec(f"--onnx={source}", f"--saveEngine={target}", "--stronglyTyped", "--skipInference",
                    *ranges * args.dynamic_batch)
            return pathlib.Path(target).read_bytes()
    trt = imported("tensorrt")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # from 11 on there is no other kind
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser, config = trt.OnnxParser(network, logger), builder.create_builder_config()
    if not parser.parse(content):
        raise UserError(f"tensorrt: {parser.get_error(0).desc()}")
    if args.dynamic_batch:
        profile = builder.create_optimization_profile()
        profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise UserError("tensorrt: no engine could be built")
    return bytes(engine)


def trtexec_call(path):
    """Engine file -> run, a process per batch"""
    def run(x):
        with tempfile.TemporaryDirectory() as folder:
            inputs, outputs = os.path.join(folder, "inputs"), os.path.join(folder, "outputs.json")
            x.numpy().tofile(inputs)
            name = "pixels" if x.dtype == torch.uint8 else "input"
            trtexec(f"--loadEngine={path}", f"--shapes={name}:{'x'.join(map(str, x.shape))}", "--iterations=1",
                    f"--loadInputs={name}:{inputs}", f"--exportOutput={outputs}")
            found = json.loads(pathlib.Path(outputs).read_text())
        kinds = {"top_classes": np.int64}
        return [np.array(o["values"], kinds.get(o["name"], np.float32)).reshape(len(x), -1) for o in found]
    return run


def tensorrt_call(path):
    """Engine file -> run on the GPU; torch holds its buffers"""
    if not installed("tensorrt"):
        return trtexec_call(path)
    trt = imported("tensorrt")
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(pathlib.Path(path).read_bytes())
    context = engine.create_execution_context()
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    kinds = {trt.float32: torch.float32, trt.uint8: torch.uint8, trt.int64: torch.int64, trt.int32: torch.int32}

    def run(x):
        context.set_input_shape(names[0], tuple(x.shape))
        tensors = {names[0]: x.cuda()} | {name: torch.empty(
            tuple(context.get_tensor_shape(name)), device="cuda", dtype=kinds[engine.get_tensor_dtype(name)])
            for name in names[1:]}
        for name, tensor in tensors.items():
            context.set_tensor_address(name, tensor.data_ptr())
        stream = torch.cuda.current_stream()
        context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()
        return [tensors[name].cpu().numpy() for name in names[1:]]
    return run


# -------------------------------------------------------------------------------------------------------- formats

def torch_file(args, exported, x, extra):
    """-> bytes of a TorchScript archive, an exported program, or a package of compiled code"""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), plain_operations(), torch.no_grad():
        warnings.simplefilter("ignore")
        if args.format == "torchscript":
            made = scripted(exported, x) if args.script else torch.jit.trace(exported, x, check_trace=False)
            torch.jit.save(made, buffer, _extra_files=extra)
            return buffer.getvalue()
        sizes = ({0: torch.export.Dim("N", min=1, max=args.max_batch)},) if args.dynamic_batch else None
        program = torch.export.export(exported, (x,), dynamic_shapes=sizes)
        if args.format == "torch-export":
            torch.export.save(program, buffer, extra_files=extra)
            return buffer.getvalue()
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model.pt2")
            try:
                torch._inductor.aoti_compile_and_package(program, package_path=path,
                                                         inductor_configs={"aot_inductor.metadata": extra})
            except Exception as error:  # a compiler fails in as many ways as there are compilers
                raise UserError(f"--format aot-inductor: {str(error).strip().splitlines()[-1][:200]}") from error
            return pathlib.Path(path).read_bytes()


def scripted(exported, x):
    """TorchScript by its compiler: of the operations that run for x, written out as a straight line"""
    from torch.fx.experimental.proxy_tensor import make_fx
    graph = make_fx(exported, tracing_mode="real")(x)
    for node in graph.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            node.target = node.target.overloadpacket
    graph.recompile()
    return torch.jit.script(graph)


def geometry(model, size):
    """-> the network's preprocessing for another size, with the same share of the image in the crop"""
    kept = model.preprocess
    return {**kept, "crop": size, "resize": round(kept["resize"] * size / kept["crop"])}


def describe(model, checkpoint, args, exported, cascade):
    """What a consumer must know of a file and cannot read off its tensors"""
    name, shape = exported.input(-1 if args.dynamic_batch else args.batch_size, args.image_size)
    precision = "int8" if exported.int8 else "float16" if args.fp16 else "float32"
    return dict(format=args.format, precision=precision, opset=args.opset,
                input=dict(name=name, dtype="uint8" if args.pixels else "float32", shape=shape,
                           layout="NHWC" if args.pixels else "NCHW", normalized=not args.pixels),
                outputs=exported.outputs, preprocess=dict(geometry(model, args.image_size), exif=turns(checkpoint)),
                classes=checkpoint["classes"], wnids=checkpoint["wnids"], cascade=cascade)


def turns(checkpoint):
    """-> whether images are turned as their EXIF orientation says, as in the network's training"""
    return bool(checkpoint["args"].get("exif"))


def check_fit(model, args, source):
    """Refuses what this network cannot honour"""
    int8 = model.precision == "int8"
    for wrong, text in (
            (args.fp16 and int8, "--fp16: an int8 network has no weights to halve"),
            (args.signed and not int8, "--signed goes with an int8 network"),
            (args.quantize_adds and not int8, "--quantize-adds goes with an int8 network"),
            (args.signed and (model.config.get("attention") != "none" or model.config.get("float_layers")),
             "--signed: not with attention or float layers"),
            (args.top_k > model.config["num_classes"], f"--top-k {args.top_k}: the network has "
                                                       f"{model.config['num_classes']} classes")):
        if wrong:
            raise UserError(f"{source}: {text}", code=2)


def export(model, exported, checkpoint, args, path, cascade, files):
    """Writes one file and its description, which get their names where the ExitStack `files` ends -> report"""
    about = describe(model, checkpoint, args, exported, cascade)
    sizes = (1, 2, 5) if args.dynamic_batch else (args.batch_size,) * -(-5 // args.batch_size)
    cases = [Case(p, model, exported) for p in example_pixels(args.image_size, sum(sizes)).split(sizes)]
    images = real_images(args, model, checkpoint, exported) if args.data else []
    kind = about["precision"]
    if kind == "int8" and (model.config["attention"] != "none" or model.config.get("float_layers")):
        kind = "mixed"  # what is computed in floats decides how an int8 value near a half is rounded
    kind = "coarse" if args.signed or args.quantize_adds else kind
    report = dict(file=path, format=args.format, precision=about["precision"], opset=args.opset, runtimes={})
    beside = files.enter_context(atomic_file(path + ".json"))  # begun first, named after what it describes
    temporary = files.enter_context(atomic_file(path))
    if args.format in ("onnx", "tensorrt"):
        content = onnx_file(model, args, exported, about, cases, kind, report)
    else:
        x = feed(example_pixels(args.image_size, 2 if args.dynamic_batch else args.batch_size), model, args.pixels)
        content = torch_file(args, exported, x, {"resnet50.json": json.dumps(about)})
    if args.format == "tensorrt":
        content = tensorrt_engine(content, args, exported)
    pathlib.Path(temporary).write_bytes(content)
    report["bytes"] = len(content)
    if args.format == "tensorrt":
        found = report["runtimes"]["tensorrt"] = in_runtime(tensorrt_call, temporary, cases, images)
        if "error" in found:
            raise UserError(f"the engine does not run: {found['error']}")
        # its float32 products are TensorFloat-32's
        judge(found, "coarse" if kind == "coarse" else "float16", "the engine")
    elif args.format == "onnx":
        for name in filter(installed, RUNTIMES):
            report["runtimes"][name] = in_runtime(RUNTIMES[name], temporary, cases, images)
        if images and not report["runtimes"]:
            report["runtimes"]["onnx.reference"] = in_runtime(reference_call, temporary, cases, images)
    else:
        report.update(compare(in_a_fresh_process(args.format, temporary, cases), cases))
        judge(report, kind, "a fresh process")
    pathlib.Path(beside).write_text(json.dumps(about, indent=1))
    return report


def table(report):
    """-> lines for a person"""
    yield (f"{report['file']}: {report['bytes'] / 1e6:.2f} MB, {report['precision']}, largest difference "
           f"{report['max_difference']:.2g} of the largest logit, arg-max the same on {report['argmax_agreement']} %"
           + (f", {report['identical_bytes']} % of all int8 values the same" if "identical_bytes" in report else ""))
    for name, found in report["runtimes"].items():
        if "error" in found:
            yield f"  {name}: {found['error']}"
            continue
        on = found.get("on_images")
        yield (f"  {name}: difference {found['max_difference']:.2g}, {found['latency_ms']} ms for {found['batch']}"
               + (f", arg-max the same on {on['argmax_agreement']} % of {on['images']} images" if on else ""))


def judge(found, kind, where):
    limit, same = TOLERANCE[kind], found.get("identical_bytes", 100)
    if not (found["max_difference"] <= limit and found["regret"] <= REGRET) or kind == "int8" and same < 100:
        raise UserError(f"{where} computes something else: {found['max_difference']:.3g} of the largest logit off, "
                        f"{limit} allowed, {found['argmax_agreement']} % of arg-max agree"
                        + f", {same} % of int8 values" * ("identical_bytes" in found) + "; nothing was written")


def reference_call(model, double=False):
    """File or onnx.ModelProto -> run, by onnx.reference"""
    evaluator = ReferenceEvaluator(model)

    def run(x):
        x = x.double() if double and x.is_floating_point() else x
        return evaluator.run(None, {evaluator.input_names[0]: x.numpy()})
    return run


def onnx_file(model, args, exported, about, cases, kind, report):
    """-> bytes of a checked file; `report` takes what the check found"""
    with torch.no_grad():
        proto, watched = onnx_model(model, args, exported)
    helper.set_model_props(proto, {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()
                                   if v is not None})
    proto.producer_name, proto.producer_version, proto.doc_string = "resnet50", "1", ""
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UserError(f"--opset {args.opset}: {str(error).strip().splitlines()[0]}") from error
    run = reference_call(exact(proto, watched) if exported.int8 else proto, exported.int8)
    report.update(compare(lambda x: [y.astype(w.dtype) for y, w in zip(run(x), cases[0].wanted)], cases))
    if watched and not (args.signed or args.quantize_adds):
        report["identical_bytes"] = identical_bytes(run, watched, model, cases[:2])
    judge(report, kind, "onnx.reference")
    return proto.SerializeToString()


def in_runtime(call, path, cases, images):
    """-> what an installed runtime makes of a file: differences, milliseconds of the smallest batch. A runtime's own
    faults are reported; the file is judged by the reference."""
    try:
        found = compare(run := call(path), cases)
        if found["max_difference"] == np.inf:  # which JSON does not know
            return dict(error="what it computes is not a number")
        if images:
            found["on_images"] = compare(run, images)
        x = cases[0].x
        return dict(found, latency_ms=round(measure(lambda: run(x), x.device, 5), 2), batch=len(x))
    except UserError as error:
        return dict(error=str(error))
    except Exception as error:  # as many kinds as there are libraries
        return dict(error=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")


# ------------------------------------------------------------------------------------------------------ benchmark

def contenders(model, args, exported, path):
    """-> {name: batch size -> run(x)} of what is installed here"""
    def ours(batch):
        fast = model if exported.int8 else fuse(model)
        return lambda x: predict(fast, x.permute(0, 3, 1, 2) if args.pixels else x)
    compiled = torch.compile(exported, dynamic=False)
    found = {"pytorch": lambda batch: exported, "torch.compile": lambda batch: compiled}
    if args.pixels or not exported.int8:
        found["extension"] = ours
    for name, call in RUNTIMES.items():
        if installed(name):
            found[name] = functools.partial(call, path)
    return found


BENCH_SECONDS = 20.0  # of each batch size


def bench(model, args, exported, path):
    """Latency of one image and throughput of 32, all runtimes in turn -> {name: {...}}; prints a table"""
    table = {}
    makers = contenders(model, args, exported, path)
    for batch in (1, 32):
        x, runs, times = feed(example_pixels(args.image_size, batch), model, args.pixels), {}, {}
        for name, make in makers.items():
            try:
                with plain_operations() if name in ("pytorch", "torch.compile") else contextlib.nullcontext():
                    runs[name] = make(batch)
                    runs[name](x)
            except Exception as error:  # of a foreign library or compiler
                print(f"{name}: {str(error).strip().splitlines()[0][:160]}", file=sys.stderr)
                runs.pop(name, None)
        end = time.perf_counter() + BENCH_SECONDS
        while time.perf_counter() < end or len(times.get("pytorch", [])) < 3:
            for name, run in runs.items():
                with plain_operations() if name in ("pytorch", "torch.compile") else contextlib.nullcontext():
                    times.setdefault(name, []).append(measure(lambda: run(x), x.device, 1, 0))
        for name, values in times.items():
            row, middle = table.setdefault(name, {}), statistics.median(values)
            ratio = statistics.median([a / b for a, b in zip(times["pytorch"], values)])
            row.update({"latency_ms_bs1": round(middle, 2)} if batch == 1 else
                       {"images_per_second_bs32": round(1e3 * batch / middle, 1)})
            row[f"over_pytorch_bs{batch}"] = round(ratio, 2)
    print(f"{'runtime':15}{'ms, batch 1':>13}{'images/s, 32':>14}{'over pytorch':>20}", file=sys.stderr)
    for name, row in table.items():
        print(f"{name:15}{row.get('latency_ms_bs1', '-'):>13}{row.get('images_per_second_bs32', '-'):>14}"
              f"{row.get('over_pytorch_bs1', '-'):>12}{row.get('over_pytorch_bs32', '-'):>8}", file=sys.stderr)
    return table


def real_images(args, model, checkpoint, exported):
    """The first --images of --data as Cases of one image each, or of the file's batch"""
    files = data.scan_unlabelled(args.data)
    images = data.Images(files, lambda epoch: data.eval_transform(geometry(model, args.image_size)),
                         exif=turns(checkpoint))
    batch = 1 if args.dynamic_batch else args.batch_size
    pixels, _, complaints = images.batch([(0, i, 0) for i in range(min(args.images, len(files)))])
    if complaints:
        raise UserError(complaints[0])
    whole = len(pixels) // batch * batch
    if not whole:
        raise UserError(f"{args.data}: fewer than {batch} images")
    return [Case(p, model, exported) for p in pixels[:whole].split(batch)]


# ----------------------------------------------------------------------------------------------------------- main

def get_args_parser():
    p = argparse.ArgumentParser(prog="export.py", formatter_class=Help,
                                description="Write a network as one file that other runtimes load.")
    add_model_args(p)
    p.add_argument("--format", choices=SUFFIX, default="onnx")
    p.add_argument("--out", default="runs/export", metavar="FOLDER")
    p.add_argument("--name", default="resnet50", help="of the file, without its ending")
    p.add_argument("--overwrite", action="store_true", help="replace a file of that name")
    g = p.add_argument_group("input and output")
    g.add_argument("--batch-size", type=positive, default=1, metavar="N", help="that the file is for")
    g.add_argument("--dynamic-batch", action="store_true", help="any batch size instead")
    g.add_argument("--max-batch", type=positive, default=32, metavar="N",
                   help="with --dynamic-batch: the largest that torch.export and TensorRT provide for")
    g.add_argument("--image-size", type=positive, metavar="N", help="default: the checkpoint's")
    g.add_argument("--pixels", action="store_true",
                   help="uint8 (N, H, W, 3) in, normalised inside; default: normalised float32 (N, 3, H, W)")
    g.add_argument("--softmax", action="store_true", help="probabilities out; default: logits")
    g.add_argument("--top-k", type=positive, default=0, metavar="K", help="the K largest and their classes out")
    g = p.add_argument_group("precision and form")
    g.add_argument("--fp16", action="store_true", help="float16 weights and arithmetic")
    g.add_argument("--signed", action="store_true",
                   help="of an int8 network: int8 activations without zero points, half as fine: TensorRT's")
    g.add_argument("--quantize-adds", action="store_true",
                   help="of an int8 network: round convolutions before residuals are added; faster in onnxruntime")
    g.add_argument("--opset", type=int, metavar="N", help=f"of ONNX, {OPSETS[0]} to {OPSETS[-1]} (default: 20)")
    g.add_argument("--script", action="store_true", help="TorchScript by its compiler instead of its tracer")
    g = p.add_argument_group("checks")
    g.add_argument("--data", metavar="FOLDER", help="images on which installed runtimes are compared too")
    g.add_argument("--images", type=positive, default=64, metavar="N", help="of these at most")
    g.add_argument("--bench", action="store_true", help="time every runtime that is installed, in alternation")
    return p


def check_args(args):
    def refuse(text):
        raise UserError(text, code=2)
    graph = args.format in ("onnx", "tensorrt")
    if args.opset is not None and args.opset not in OPSETS:
        refuse(f"--opset {args.opset}: {OPSETS[0]} to {OPSETS[-1]} can be written; before {OPSETS[0]} there are no "
               f"scales per channel, and torch.onnx's tracer ends at {OPSETS[-1]}")
    for flag, given, fits, partner in (
            ("--opset", args.opset is not None, graph, "--format onnx or tensorrt"),
            ("--signed", args.signed, graph, "--format onnx or tensorrt"),
            ("--quantize-adds", args.quantize_adds, graph, "--format onnx or tensorrt"),
            ("--script", args.script, args.format == "torchscript", "--format torchscript"),
            ("--bench", args.bench, args.format == "onnx", "--format onnx"),
            ("--bench", args.bench, args.dynamic_batch, "--dynamic-batch"),
            ("--data", args.data, graph, "--format onnx or tensorrt"),
            ("--images", args.images != 64, args.data, "--data"),
            ("--max-batch", args.max_batch != 32, args.dynamic_batch and args.format not in ("onnx", "torchscript"),
             "--dynamic-batch and --format torch-export, aot-inductor or tensorrt")):
        if given and not fits:
            refuse(f"{flag} goes with {partner}")
    if args.dynamic_batch and args.batch_size != 1:
        refuse("--batch-size and --dynamic-batch exclude each other")
    if args.dynamic_batch and args.max_batch < 5:
        refuse(f"--max-batch {args.max_batch}: files are checked with batches of up to 5")
    if os.path.basename(args.name) != args.name or args.name.startswith(".") or not args.name:
        refuse(f"--name {args.name}: expected a file name without folders")
    args.opset = args.opset or OPSETS[-1] if graph else None


def main(args):
    check_args(args)
    model, checkpoint, source = load_some_model(args, DEFAULTS)
    members = {"": model} if not isinstance(model, Cascade) else dict(model.named_children())
    paths = {k: os.path.join(args.out, f"{args.name}{'-' * bool(k)}{k}{SUFFIX[args.format]}") for k in members}
    args.image_size = args.image_size or model.preprocess["crop"]
    if args.format == "tensorrt" and not (installed("tensorrt") or shutil.which("trtexec")):
        raise UserError("--format tensorrt: neither the package tensorrt nor trtexec is installed; --format onnx makes "
                        "the file that both build from (of an int8 network with --signed)")
    for name in [name for path in paths.values() for name in (path, path + ".json")]:
        if os.path.isdir(name):
            raise UserError(f"{name}: is a folder", code=2)
        if os.path.lexists(name) and not args.overwrite:
            raise UserError(f"{name}: exists; --overwrite replaces it", code=2)
        if os.path.realpath(name) == os.path.realpath(source):
            raise UserError(f"{name}: is the network that is read; --out or --name must be another", code=2)
    for member in members.values():
        check_sizes(member, {args.image_size: "--image-size"})
        check_fit(member, args, source)
    print(f"{source} -> {', '.join(paths.values())}", file=sys.stderr)
    exported = {name: Exported(copy.deepcopy(member) if args.fp16 else member, args.pixels, args.softmax, args.top_k,
                               args.fp16).eval() for name, member in members.items()}
    with contextlib.ExitStack() as files:
        files.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)))
        reports = {name: export(member, exported[name], checkpoint, args, paths[name],
                                dict(member=name, threshold=model.threshold) if name else None, files)
                   for name, member in members.items()}
    for name, report in reports.items():
        print("\n".join(table(report)), file=sys.stderr)
        if args.bench:
            report["bench"] = bench(members[name], args, exported[name], paths[name])
    return dict(reports[""], source=source) if "" in reports else dict(members=reports, source=source,
                                                                       threshold=model.threshold)


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args(), "export.py")
