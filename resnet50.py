"""ResNet-50 in one file: the network, its checkpoints, and what it costs.

  python resnet50.py                                      # stages, parameters, MACs, milliseconds, environment
  python resnet50.py --checkpoint runs/train/best.pt      # the same for a trained or pruned network
  python resnet50.py --profile --batch-size 8             # torch.profiler, operators sorted by time
  python resnet50.py --fused                              # convolution, batch-norm and ReLU as one kernel of csrc/

The network is He et al. 2015 (arXiv 1512.03385) with the stride on the 3x3 ("v1.5"). Module and parameter names are
torchvision's, so its files and timm's load with no renaming. Squeeze-and-excitation (arXiv 1709.01507) uses timm's
names, split attention (ResNeSt, arXiv 2004.08955) the published ones. Imports only csrc/.
"""
import argparse
import contextlib
import copy
import functools
import glob
import io
import itertools
import json
import math
import os
import pickle
import platform
import re
import statistics
import struct
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import csrc
from csrc.graphs import Graphs
from csrc.plan import build_plan, cpuinfo, tune
from csrc.reference import MULT_BITS

FORMAT = "resnet50/1"
STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))  # channels of the 3x3, blocks, stride of the first block
EXPANSION = 4  # a stage's output has this many times the channels of its 3x3
CHOICES = dict(stem=("standard", "deep", "small"), stride_on=("3x3", "1x1"), attention=("none", "se", "split"),
               classifier=("float", "int8"))
# plain values beside the weights, where torchvision's and timm's scripts have trained; nothing of it is called
torch.serialization.add_safe_globals([argparse.Namespace])
PREPROCESS = dict(resize=256, crop=224, interpolation="bilinear", mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


class UserError(Exception):
    """A mistake that the user can mend: shown as one line, and the exit status is `code`
    (2 usage, 3 data or checkpoint, 4 training diverged, 75 stopped with the state saved)."""

    def __init__(self, message, code=3):
        super().__init__(" ".join(filter(None, map(str.strip, str(message).splitlines()))))  # blanks may be a name's
        self.code = code


def finite(value):
    """The same with None for NaN and infinities, which JSON does not know"""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# of RuntimeErrors: csrc's, which knows no UserError, the allocators' of what is too large for this machine, and what a
# network of torchvision may meet on CUDA with --deterministic
ONE_LINE = ("^RESNET50_|can't allocate memory|Storage size calculation overflowed|CUDA out of memory"
            "|does not have a deterministic implementation")


class Told(io.FileIO):
    """A stream that may be a terminal that was closed, a pipe without a reader or a file on a full disk: what it does
    not take is dropped, since telling of a run must not end it."""

    def write(self, text):
        with contextlib.suppress(OSError):
            return super().write(text) or len(text)
        return len(text)


def run_script(main, args, prog):
    """main(args) -> a dict or None; the dict becomes the last line of stdout, a UserError or Ctrl-C one line and a
    status."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # was closed: the next file would get its number, and what libraries say
            setattr(sys, name, open(os.devnull, "w"))
    if sys.stderr is sys.__stderr__:
        sys.stderr = io.TextIOWrapper(io.BufferedWriter(Told(2, "w", closefd=False)), sys.stderr.encoding,
                                      sys.stderr.errors, line_buffering=True)
    try:
        result = main(args)
        if result is not None:
            try:
                print(json.dumps(finite(result)), flush=True)
            except OSError as error:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter's end flushes once more
                raise UserError(f"the run is done, and its result not told: stdout: {error.strerror}") from error
    except (UserError, RuntimeError) as error:
        message, _, _ = str(error).partition("\n")
        if not isinstance(error, UserError) and not re.search(ONE_LINE, message):
            raise
        print(f"{prog}: error: {message}", file=sys.stderr, flush=True)
        sys.exit(getattr(error, "code", 2))
    except KeyboardInterrupt:  # where nothing is to be kept: while something is loaded, or in a script that only reads
        print(f"{prog}: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


# ---------------------------------------------------------------------------------------------------- network

class SqueezeExcite(nn.Module):
    """x * sigmoid(fc2(relu(fc1(mean over H, W)))); 16 times fewer channels inside, as timm's seresnet50."""

    def __init__(self, channels):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, self.inner(channels), 1)
        self.fc2 = nn.Conv2d(self.fc1.out_channels, channels, 1)

    @staticmethod
    def inner(channels):
        return max(channels // 16, 8)

    def forward(self, x):  # (N, C, H, W) -> same
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class SplitAttention(nn.Module):
    """ResNeSt's radix-2 3x3: two branches of one grouped convolution,
    mixed per channel by a softmax over the branches."""

    def __init__(self, cin, cout):
        super().__init__()
        inner = self.inner(cin)
        self.conv = nn.Conv2d(cin, 2 * cout, 3, padding=1, groups=2, bias=False)
        self.bn0 = nn.BatchNorm2d(2 * cout)
        self.fc1 = nn.Conv2d(cout, inner, 1)
        self.bn1 = nn.BatchNorm2d(inner)
        self.fc2 = nn.Conv2d(inner, 2 * cout, 1)

    @staticmethod
    def inner(cin):
        return max(cin * 2 // 4, 32)

    def forward(self, x):  # (N, cin, H, W) -> (N, cout, H, W)
        return self.mix(F.relu(self.bn0(self.conv(x))))

    def mix(self, x):  # (N, 2 * cout, H, W), the two branches -> (N, cout, H, W)
        a, b = x.chunk(2, 1)
        gap = (a + b).mean((2, 3), keepdim=True)
        wa, wb = self.fc2(F.relu(self.bn1(self.fc1(gap)))).chunk(2, 1)
        share = torch.sigmoid(wa - wb)  # a softmax over two is a sigmoid of the difference
        return share * a + (1 - share) * b


def drop_path(x, rate, training):
    """Stochastic depth (arXiv 1603.09382): the whole residual branch of a sample is dropped with probability `rate`."""
    if not training or rate == 0.0:
        return x
    return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(1 - rate).div_(1 - rate)


def norm_relu(bn, x, residual=None):
    """relu(bn(x) + residual); in training one operation of csrc/ where `bn.fused` is set (train.py --fused-bn)"""
    if bn.training and getattr(bn, "fused", False):
        bn.num_batches_tracked.add_(1)
        momentum = 1 / bn.num_batches_tracked if bn.momentum is None else bn.momentum  # None: plain means
        return csrc.bn_relu(x.contiguous(memory_format=torch.channels_last), bn.weight, bn.bias, residual,
                            bn.running_mean, bn.running_var, momentum, bn.eps)
    x = bn(x)
    return F.relu(x if residual is None else x + residual, inplace=True)


class Adapter(nn.Module):
    """x + up(relu(down(x))), two 1x1 convolutions with few channels between them (Houlsby et al., arXiv 1902.00751).
    Starts as the identity."""

    def __init__(self, channels, inner):
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, x):  # (N, C, H, W) -> same
        return x + self.up(F.relu(self.down(x)))


class Bottleneck(nn.Module):
    """1x1 -> 3x3 -> 1x1 with a residual, which a stage's first block projects, also where pruning has left as many
    channels before as behind it. Widths come in as numbers, so a pruned block is built like any other."""

    def __init__(self, cin, mid1, mid2, cout, stride, projects, config, drop_rate):
        super().__init__()
        split = config["attention"] == "split"
        s1, s2 = (stride, 1) if config["stride_on"] == "1x1" else (1, stride)
        self.conv1 = nn.Conv2d(cin, mid1, 1, s1, bias=False)
        self.bn1 = nn.BatchNorm2d(mid1)
        if split:
            self.conv2 = SplitAttention(mid1, mid2)
            self.pool = nn.AvgPool2d(3, stride, 1) if stride > 1 else nn.Identity()
        else:
            self.conv2 = nn.Conv2d(mid1, mid2, 3, s2, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(mid2)
        self.conv3 = nn.Conv2d(mid2, cout, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(cout)
        self.split, self.drop_rate = split, drop_rate
        self.se = SqueezeExcite(cout) if config["attention"] == "se" else None
        self.adapter = Adapter(cout, config["adapter"]) if config.get("adapter") else None
        self.downsample = None
        if projects:
            pool = [nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)] if split else []
            self.downsample = nn.Sequential(*pool, nn.Conv2d(cin, cout, 1, 1 if split else stride, bias=False),
                                            nn.BatchNorm2d(cout))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        x = norm_relu(self.bn1, self.conv1(x))
        x = self.pool(self.conv2(x)) if self.split else norm_relu(self.bn2, self.conv2(x))
        x = self.conv3(x)
        if self.se is None and self.drop_rate == 0:
            x = norm_relu(self.bn3, x, identity)
        else:
            x = self.bn3(x)
            if self.se is not None:
                x = self.se(x)
            x = F.relu(drop_path(x, self.drop_rate, self.training) + identity, inplace=True)
        return x if self.adapter is None else self.adapter(x)


class DynamicLinear(nn.Module):
    """float (N, C), none negative -> float32 logits (N, classes). Weights are int8, one scale per class; inputs are
    rounded to uint8 as they come, by the largest of each row (dynamic quantization), so nothing is calibrated."""

    def __init__(self, c, classes):
        super().__init__()
        self.register_buffer("weight", torch.zeros(classes, c, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(classes))
        self.register_buffer("bias", torch.zeros(classes))

    @torch.no_grad()
    def fill(self, linear):
        """The integers of an nn.Linear"""
        self.scale.copy_(linear.weight.abs().amax(1).clamp(min=1e-30) / 127)
        self.weight.copy_((linear.weight / self.scale[:, None]).round())
        self.bias.copy_(linear.bias)

    def forward(self, x):
        step = x.float().amax(1, keepdim=True).clamp(min=1e-30) / 255
        ints = (x / step).round().clamp(0, 255).to(torch.uint8)
        return csrc.gemm_int8(ints, self.weight, scale=self.scale.float()) * step + self.bias


class ResNet50(nn.Module):
    """float (N, 3, H, W), normalised -> float logits (N, num_classes).
    `config` holds the arguments: ResNet50(**m.config).

    num_classes  size of the head
    stem         "standard" 7x7 stride 2 + max-pool; "deep" three 3x3 + max-pool (ResNeSt, ResNet-C);
                 "small" one 3x3, no pooling, for CIFAR-size images; None: "deep" with split attention, else "standard"
    stride_on    "3x3" (v1.5) or "1x1" (the 2015 Caffe weights)
    attention    "none", "se" or "split"
    drop_path    rate of stochastic depth at the last block, growing linearly from 0 at the first
    dropout      rate before the classifier
    widths       {convolution name: output channels} where they differ from the full network, as pruning leaves them;
                 "layer1" ... "layer4" name the stream that all blocks of a stage add to
    classifier   "float", or "int8" for a DynamicLinear, which cannot be trained
    adapter      channels inside an Adapter behind every block; 0: none (finetune.py --strategy adapter)
    """
    precision = "float"

    def __init__(self, num_classes=1000, stem=None, stride_on="3x3", attention="none", drop_path=0.0, dropout=0.0,
                 widths=None, classifier="float", adapter=0):
        super().__init__()
        stem = stem or ("deep" if attention == "split" else "standard")
        for name, value in dict(stem=stem, stride_on=stride_on, attention=attention, classifier=classifier).items():
            if value not in CHOICES[name]:
                raise ValueError(f"ResNet50: {name}={value!r} is none of {', '.join(CHOICES[name])}")
        for name, rate in dict(drop_path=drop_path, dropout=dropout).items():
            if not 0 <= rate < 1:
                raise ValueError(f"ResNet50: {name}={rate!r} is no rate")
        if num_classes < 1:
            raise ValueError(f"ResNet50: num_classes={num_classes!r}")
        if attention == "split" and stride_on == "1x1":
            raise ValueError("ResNet50: split attention strides by a pool after the 3x3; "
                             "stride_on='1x1' has no meaning there")
        self.config = config = dict(num_classes=num_classes, stem=stem, stride_on=stride_on, attention=attention,
                                    drop_path=drop_path, dropout=dropout, widths=dict(widths or {}),
                                    classifier=classifier, **({"adapter": adapter} if adapter else {}))
        self.preprocess = dict(PREPROCESS)
        self.grad_checkpointing = False
        unused = dict(config["widths"])

        def width(name, default):
            return unused.pop(name, default)

        c = width("conv1", 64)
        if stem == "deep":
            c0, c3 = width("conv1.0", 32), width("conv1.3", 32)
            self.conv1 = nn.Sequential(
                nn.Conv2d(3, c0, 3, 2, 1, bias=False), nn.BatchNorm2d(c0), nn.ReLU(inplace=True),
                nn.Conv2d(c0, c3, 3, 1, 1, bias=False), nn.BatchNorm2d(c3), nn.ReLU(inplace=True),
                nn.Conv2d(c3, c, 3, 1, 1, bias=False))
        else:
            self.conv1 = (nn.Conv2d(3, c, 3, 1, 1, bias=False) if stem == "small"
                          else nn.Conv2d(3, c, 7, 2, 3, bias=False))
        self.bn1 = nn.BatchNorm2d(c)
        self.maxpool = nn.Identity() if stem == "small" else nn.MaxPool2d(3, 2, 1)
        total, done = sum(blocks for _, blocks, _ in STAGES), 0
        for i, (mid, blocks, stride) in enumerate(STAGES, 1):
            cout, stage = width(f"layer{i}", mid * EXPANSION), nn.Sequential()
            for j in range(blocks):
                name = f"layer{i}.{j}"
                stage.append(Bottleneck(c, width(name + ".conv1", mid), width(name + ".conv2", mid), cout,
                                        stride if j == 0 else 1, j == 0, config, drop_path * done / (total - 1)))
                c, done = cout, done + 1
            setattr(self, f"layer{i}", stage)
        if unused:
            raise ValueError(f"ResNet50: widths names no convolution of this network: {', '.join(sorted(unused))}")
        self.fc = nn.Linear(c, num_classes) if classifier == "float" else DynamicLinear(c, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)  # every block starts as the identity (arXiv 1706.02677, 5.1)
        for block in self.blocks() if adapter else ():
            nn.init.zeros_(block.adapter.up.weight)

    def blocks(self):
        for i in range(1, len(STAGES) + 1):
            yield from getattr(self, f"layer{i}")

    def forward(self, x):
        x = self.maxpool(norm_relu(self.bn1, self.conv1(x)))
        for block in self.blocks():
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(
                    block, x, use_reentrant=False,
                    context_fn=lambda block=block: (contextlib.nullcontext(), statistics_kept(block)))
            else:
                x = block(x)
        x = F.dropout(x.mean((2, 3)), self.config["dropout"], self.training)
        return self.fc(x)


@contextlib.contextmanager
def statistics_kept(block):
    """Recomputation sees each batch a second time; without this the running statistics would be updated twice.
    (Not by track_running_stats: the checkpointing counts the tensors that both passes save.)"""
    kept = [(buffer, buffer.clone()) for buffer in block.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)


def per_channel(values, device):
    """-> float32 (3, 1, 1), of pixels from 0 to 255"""
    return torch.tensor(values, device=device).view(3, 1, 1) * 255


@functools.lru_cache
def per_channel_once(values, device):
    """per_channel, made on the CPU: it is copied before this returns, and any stream may read it"""
    with torch.inference_mode(False):
        return per_channel(values, "cpu").to(device)


def normalize(pixels, preprocess):
    """uint8 (N, 3, H, W), any memory format -> float32, same shape and format: (pixels / 255 - mean) / std. What is
    floating point has been normalised already and stays."""
    if pixels.is_floating_point():
        return pixels
    again = pixels.is_cuda and not torch.compiler.is_compiling()  # a copy would wait for all that the GPU has to do
    make = per_channel_once if again else per_channel
    mean, std = (make(tuple(preprocess[k]), pixels.device) for k in ("mean", "std"))
    return pixels.float().sub_(mean).div_(std)


def predict(model, pixels):
    """uint8 pixels (N, 3, H, W) -> float32 logits (N, classes). What every consumer calls: where and how the pixels are
    normalised is the model's affair."""
    takes_pixels = model.precision != "float" or isinstance(model, FusedResNet50)
    return model(pixels if takes_pixels else normalize(pixels, model.preprocess)).float()


def torchvision_model(arch, num_classes=1000):
    """torchvision's classifier of that name, untrained, in eval mode, with what every consumer of a float network asks
    for. UserError where there is none, as for detectors and quantized networks, or where training would want more than
    its logits (the auxiliary heads of inception_v3 and googlenet)."""
    from torchvision import models
    if arch not in models.list_models(module=models):
        raise UserError(f"arch {arch!r} is no classifier of torchvision")
    try:
        model = models.get_model(arch, weights=None, num_classes=num_classes)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"arch {arch}, num_classes {num_classes!r}: {error}") from error
    if getattr(model, "aux_logits", False):
        raise UserError(f"arch {arch}: has auxiliary classifiers, which nothing here trains")
    model.precision, model.config = "float", dict(arch=arch, num_classes=num_classes)
    model.preprocess, model.grad_checkpointing = dict(PREPROCESS), False
    return model.to(memory_format=torch.channels_last).eval()


class Cascade(nn.Module):
    """uint8 pixels (N, 3, H, W) -> float32 logits (N, classes): `small` answers, and the images of which its largest
    softmax probability is below `threshold` go on to `big` (IDK cascades, arXiv 1706.00885). `deferred` is how many of
    the last call's did. The members, of any precision, must agree in classes and preprocess; UserError otherwise."""
    precision = "cascade"

    def __init__(self, small, big, threshold):
        super().__init__()
        for what, a, b in (("outputs", small.config["num_classes"], big.config["num_classes"]),
                           ("preprocess", small.preprocess, big.preprocess)):
            if a != b:
                raise UserError(f"cascade: its networks disagree in {what}: {a} and {b}")
        if not (isinstance(threshold, (int, float)) and 0 <= threshold <= 1):
            raise UserError(f"cascade: threshold {threshold!r} is no probability")
        self.small, self.big, self.threshold, self.deferred = small, big, float(threshold), 0
        self.config = dict(num_classes=small.config["num_classes"])
        self.preprocess = small.preprocess = big.preprocess  # one dict: what is set in it holds for all three

    def forward(self, pixels):
        logits = predict(self.small, pixels)
        rest = (~(logits.softmax(1).amax(1) >= self.threshold)).nonzero()[:, 0]  # with those that are NaN
        self.deferred = len(rest)
        return logits.index_copy(0, rest, predict(self.big, pixels[rest])) if self.deferred else logits


# ------------------------------------------------------------------------------------------ the network laid flat

class Step(NamedTuple):
    """One operation, which writes the buffer that bears its name; the first buffer is "pixels"."""
    kind: str  # conv, maxpool, pool (an average that keeps the map), gate (attention), avgpool (over H and W), linear
    name: str  # its module's
    x: str  # the buffer that it reads
    residual: str | None = None  # another, which it adds before the ReLU
    bn: str | None = None  # the batch-norm behind a convolution
    relu: bool = True
    x2: str | None = None  # the buffer that `folded` reads,
    folded: "Step | None" = None  # a downsampling convolution that adds into this one's accumulator


def flatten(model):
    """ResNet50 -> its Steps in order. A downsampling convolution is a step of its own, whose buffer is the residual."""
    if model.config.get("adapter"):
        raise UserError("a network with adapters runs as it is: neither fused nor pruned nor quantized")
    steps, x = [], "pixels"

    def add(kind, name, x, residual=None, bn=None, relu=True):
        steps.append(Step(kind, name, x, residual, bn, relu))
        return name

    if model.config["stem"] == "deep":
        x = add("conv", "conv1.0", x, bn="conv1.1")
        x = add("conv", "conv1.3", x, bn="conv1.4")
    x = add("conv", "conv1.6" if model.config["stem"] == "deep" else "conv1", x, bn="bn1")
    if model.config["stem"] != "small":
        x = add("maxpool", "maxpool", x)
    for name, block in model.named_modules():
        if not isinstance(block, Bottleneck):
            continue
        at, identity = name + ".", x
        if block.downsample is not None:
            i = len(block.downsample) - 2  # 1 where ResNeSt averages first
            if i and block.downsample[0].kernel_size > 1:
                identity = add("pool", at + "downsample.0", identity)
            identity = add("conv", f"{at}downsample.{i}", identity, bn=f"{at}downsample.{i + 1}", relu=False)
        x = add("conv", at + "conv1", x, bn=at + "bn1")
        if block.split:
            x = add("conv", at + "conv2.conv", x, bn=at + "conv2.bn0")
            x = add("gate", at + "conv2", x)
            if not isinstance(block.pool, nn.Identity):
                x = add("pool", at + "pool", x)
        else:
            x = add("conv", at + "conv2", x, bn=at + "bn2")
        if block.se is None:
            x = add("conv", at + "conv3", x, identity, bn=at + "bn3")
        else:
            x = add("conv", at + "conv3", x, bn=at + "bn3", relu=False)
            x = add("gate", at + "se", x, identity)
    add("linear", "fc", add("avgpool", "avgpool", x))
    return steps


def fold_downsample(steps):
    """Where a convolution's residual is a downsampling convolution, both become one step with two inputs."""
    made = {step.name: step for step in steps}
    sums = {step.name: made[step.residual] for step in steps
            if step.kind == "conv" and step.residual and made[step.residual].bn and not made[step.residual].relu}
    gone = {step.name for step in sums.values()}
    return [step._replace(residual=None, x2=sums[step.name].x, folded=sums[step.name]) if step.name in sums else step
            for step in steps if step.name not in gone]


def is_exporting():
    return torch.compiler.is_exporting()


is_exporting._dynamo_marked_constant = True  # asked while torch.compile traces: what PyTorch 2.11 traces says true


class Flat:
    """A network that runs by its list `steps`; call(step, x, residual, x2) is the subclass's, and so is program(): the
    steps as csrc.plan.build_plan takes them, or None where csrc/ cannot run them all as one operation."""

    graphs = packed = sparse = None

    def forget(self):
        """What was made of the tensors as they were until now"""
        self.graphs = self.packed = self.sparse = None

    def pack(self):
        """Makes `packed`, the network as this machine's kernels read it, once."""
        if self.packed is None and (program := self.program()):
            self.packed = tune(build_plan(program), self.preprocess["crop"])

    # as csrc.load: torch.compile runs it while it traces, and what it makes is an input of the graph
    pack._dynamo_marked_constant = True

    def plan(self):
        self.pack()
        return self.packed

    def plan_for(self, pixels):
        """plan(), where it is of use. An exported program shall run on machines of other kinds."""
        fits = pixels.dtype == torch.uint8 and pixels.device.type == "cpu" and not is_exporting()
        return self.plan() if fits else None

    def __getstate__(self):  # a copy may run on another instruction set, and records graphs of its own
        return {**self.__dict__, "packed": None, "graphs": None, "sparse": None}

    def replay(self, x):
        """run_sliced(x), on CUDA as one launch"""
        if not x.is_cuda or torch.compiler.is_compiling():
            return self.run_sliced(x)
        self.graphs = self.graphs or Graphs(self.run_sliced, self.ways)
        return self.graphs(x)

    def ways(self, n):
        """-> how run_sliced can take n images with the same result, in keyword arguments"""
        return [{}]

    def run_sliced(self, x, images=None, stage="fc"):
        """run(x), up to the end of a stage so many images at a time: of few of them a layer's result is still in the
        L2 when the next one reads it"""
        if images is None:
            return self.run(x)
        cut = 1 + max(i for i, step in enumerate(self.steps) if step.name.startswith(stage))
        y = torch.cat([self.run(part, self.steps[:cut]) for part in x.split(images)])
        return self.run(y, self.steps[cut:]) if cut < len(self.steps) else y

    def _apply(self, fn, recurse=True):
        self.forget()  # what was recorded reads the tensors that fn is about to replace
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args):  # which loading a cascade calls too
        self.forget()
        return super()._load_from_state_dict(*args)

    def run(self, x, steps=None, watch=None):
        """The first of the steps (default: all) reads x -> what the last makes. watch(step, result) sees each result.
        A buffer is dropped after its last use."""
        steps = self.steps if steps is None else steps
        last = {name: i for i, step in enumerate(steps) for name in (step.x, step.residual, step.x2)}
        buffers = {steps[0].x: x}
        for i, step in enumerate(steps):
            reads = {k: name for k, name in (("x", step.x), ("residual", step.residual), ("x2", step.x2)) if name}
            y = buffers[step.name] = self.call(step, **{k: buffers[name] for k, name in reads.items()})
            for name in reads.values():
                if last[name] == i:
                    buffers.pop(name, None)
            if watch:
                watch(step, y)
        return y


def batch_norm_affine(bn):
    """Inference: bn(x) = x * scale + shift. -> float64 (C), (C)"""
    scale = bn.weight.double() * (bn.running_var.double() + bn.eps).rsqrt()
    return scale, bn.bias.double() - bn.running_mean.double() * scale


def fold_norm(model, step):
    """-> float64 (O, C, kh, kw) or (O, C), (O): a layer's weights and bias with its batch-norm folded in, the first
    one's for pixels 0 to 255 less their mean"""
    layer = model.get_submodule(step.name)
    if step.kind == "linear":
        return layer.weight.double(), layer.bias.double()
    scale, shift = batch_norm_affine(model.get_submodule(step.bn))
    weight = layer.weight.double() * scale.view(-1, 1, 1, 1)
    if step.x == "pixels":
        weight = weight / (255 * torch.tensor(model.preprocess["std"], dtype=torch.float64).view(1, -1, 1, 1))
    return weight, shift


def fold_norms(model, step):
    """-> ([weights of the layer and of the downsampling convolution that is folded into it], sum of their biases), as
    fold_norm has them"""
    weights, biases = zip(*(fold_norm(model, part) for part in (step, step.folded) if part))
    return weights, sum(biases)


def float_program(model, dtype):
    """ResNet50 without attention -> its steps in bfloat16 or float32 as csrc.plan.build_plan takes them, batch-norms,
    mean and std of the pixels folded into the weights. In bfloat16 padding is the mean colour in whole steps of 1/255,
    as in the int8 one."""
    def describe(step):
        row = dict(kind=step.kind, x=step.x, residual=step.residual, x2=step.x2, out=step.name)
        if step.kind not in ("conv", "linear"):
            return row
        (weight, *weight2), bias = fold_norms(model, step)
        if step.folded:
            row.update(weight2=weight2[0].to(dtype), stride2=model.get_submodule(step.folded.name).stride[0])
        if step.x == "pixels":
            mean = 255 * torch.tensor(model.preprocess["mean"], dtype=torch.float64)
            row["centre"] = mean.round().to(torch.uint8) if dtype == torch.bfloat16 else mean.float()
            bias = bias + (weight * (row["centre"] - mean).view(-1, 1, 1)).sum((1, 2, 3))
        if step.kind == "conv":
            layer = model.get_submodule(step.name)
            row.update(stride=layer.stride[0], padding=layer.padding[0])
        return dict(row, weight=weight.to(dtype), bias=bias.float())
    return [describe(step) for step in fold_downsample(flatten(model))]


class FusedResNet50(Flat, ResNet50):
    """ResNet50 for inference: convolution, batch-norm, residual and ReLU are one operation of csrc/, in float32 or
    bfloat16; from pixels the whole network is, on a CPU with kernels for that (csrc.has_float), which in float32 may
    be Winograd's. What the weights are when it is made, it keeps."""

    def __init__(self, model, dtype):
        super().__init__(**model.config)
        self.load_state_dict(model.state_dict())
        self.preprocess, self.dtype, self.steps = dict(model.preprocess), dtype, flatten(model)
        device = next(model.parameters()).device
        self.to(device, dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
        for step in self.steps:
            if step.kind == "conv":
                for name, value in zip(("scale", "shift"), batch_norm_affine(model.get_submodule(step.bn))):
                    self.get_submodule(step.name).register_buffer(name, value.float().detach(), persistent=False)
        self.whole = (device.type, self.config["attention"], self.config["classifier"]) == ("cpu", "none", "float")
        # of bfloat16 while the weights are exact; of float32, as many bytes as these, when it is wanted
        self.rows = self.program_of(model) if dtype == torch.bfloat16 else None

    @torch.no_grad()
    def program_of(self, model):
        if not self.whole or not csrc.has_float(self.dtype):
            return None
        rows = float_program(model, self.dtype)
        # else an image's NaN could reach its neighbours by the zeros behind a tap
        self.whole = all(v.isfinite().all() for row in rows for v in row.values() if torch.is_tensor(v))
        return rows if self.whole else None

    def program(self):
        if self.dtype == torch.float32:
            return self.program_of(self)
        return self.rows if csrc.has_float(self.dtype) else None

    def call(self, step, x, residual=None):
        if step.kind == "avgpool":
            return x.mean((2, 3))
        module = self.get_submodule(step.name)
        if step.kind == "conv":
            return csrc.conv_bn_relu(x, module.weight, module.scale, module.shift, residual, step.relu,
                                     module.stride, module.padding, module.groups)
        if step.kind == "gate":
            return module.mix(x) if residual is None else F.relu(module(x) + residual)
        return module(x)

    def run_sliced(self, x, **way):  # pixels are normalised within what is recorded
        return super().run_sliced(normalize(x, self.preprocess).to(self.dtype), **way)

    def forward(self, x):  # (N, 3, H, W), normalised -> (N, num_classes); uint8 pixels -> the same in float32
        pixels, x = x.dtype == torch.uint8, x.contiguous(memory_format=torch.channels_last)
        if (plan := self.plan_for(x)) is not None:
            return csrc.network_float(x, plan, self.config["num_classes"])
        y = self.replay(x)
        return y.float() if pixels else y


def fuse(model, dtype=torch.float32):
    """ResNet50 -> its fused copy, on the same device."""
    on_cuda = any(p.is_cuda for p in model.parameters())
    if not isinstance(model, ResNet50) or dtype not in (torch.float32, torch.bfloat16, *[torch.float16] * on_cuda):
        raise UserError(f"--fused: takes a float ResNet-50 in float32 or bfloat16{', or float16' * on_cuda}, not "
                        f"{model.config.get('arch', model.precision)} in {dtype}", 2)
    return FusedResNet50(model, dtype)


# ----------------------------------------------------------------------------------------------------------- int8

# What may add up in an accumulator: products of one sign, and the bias or the residual. With these the sum stays below
# 2^24 (with the pixels' mean in the bias, 2^25): int32 holds it whatever the widths, and float32 exactly.
REACH, HEADROOM = 2 ** 24 - 2 ** 22, 2 ** 20
# It divides every mult. acc * mult / 2^22 is then exact in float32 where it does not saturate, and a runtime of ONNX
# files, which requantizes in float32, rounds as csrc/ does
EXACT = 64


class Int8Conv(nn.Module):
    """uint8 NHWC (N, C, H, W) -> uint8 (N, O, Ho, Wo), by csrc/README.md's formula. A value of the result stands for
    scale * (value - zero); pad_value is there where x is pixels."""

    def __init__(self, step, conv, folded=None):
        super().__init__()
        self.stride, self.padding, self.groups = conv.stride[0], conv.padding[0], conv.groups
        self.stride2 = folded.stride[0] if folded else 1
        o = (conv.out_channels,)
        for name, dtype, shape in (("weight", torch.int8, conv.weight.shape), ("mult", torch.int32, o),
                                   ("bias", torch.int32, o), ("gain", torch.int32, o if step.residual else None),
                                   ("weight2", torch.int8, folded.weight.shape if folded else None),
                                   ("pad_value", torch.uint8, (conv.in_channels,) if step.x == "pixels" else None),
                                   ("scale", torch.float64, ()), ("zero", torch.int32, ())):
            self.register_buffer(name, None if shape is None else torch.zeros(shape, dtype=dtype))

    def pack_2_4(self):
        """-> (weight, weight2) as csrc.conv_int8_2_4 takes them, or None where it cannot run this"""
        if self.groups > 1 or self.pad_value is not None or (weight := csrc.pack_2_4(self.weight)) is None:
            return None
        weight2 = None if self.weight2 is None else csrc.pack_2_4(self.weight2)
        return None if (weight2 is None) != (self.weight2 is None) else (weight, weight2)

    def forward(self, x, residual=None, x2=None, packed=None):
        """packed: what pack_2_4 returned"""
        sizes = [[size] * 2 for size in (self.stride, self.padding, self.stride2)]
        if packed:
            return csrc.conv_int8_2_4(x, packed[0], self.mult, self.bias, self.weight.shape[2:], residual, self.gain,
                                      x2, packed[1], *sizes)
        return csrc.conv_int8(x, self.weight, self.mult, self.bias, residual, self.gain, x2, self.weight2,
                              self.pad_value, *sizes, self.groups)


class Int8AvgPool(nn.Module):
    """uint8 (N, C, H, W) -> uint8 (N, C). `mult` holds for one pixel: the formula's j is mult / (H * W), rounded. Maps
    in float32 give float32."""

    def __init__(self, *_):
        super().__init__()
        self.register_buffer("mult", torch.zeros((), dtype=torch.int32))
        self.register_buffer("scale", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        # not view(1), of which PyTorch 2.11's Inductor cannot make code
        return x.mean((2, 3)) if x.is_floating_point() else csrc.avg_pool_int8(x, self.mult.expand(1))


class Int8Linear(nn.Module):
    """uint8 (N, C) -> float32 logits (N, classes)"""

    def __init__(self, step, linear, folded):
        super().__init__()
        classes = linear.out_features
        self.register_buffer("weight", torch.zeros(classes, linear.in_features, dtype=torch.int8))
        self.register_buffer("bias", torch.zeros(classes, dtype=torch.int32))
        self.register_buffer("scale", torch.zeros(classes))

    def forward(self, x):
        return csrc.gemm_int8(x, self.weight, self.bias, scale=self.scale)


class FloatStep(nn.Module):
    """A convolution or linear layer that an int8 network keeps in float32, with its batch-norm and a downsampling
    convolution folded in: x (N, C, H, W) or (N, C), residual, x2 -> float32. Of the pixels 0-255 it takes `centre` (C),
    their mean, before it pads. An int8 step sees the result as scale * (value - zero)."""

    def __init__(self, step, layer, folded=None):
        super().__init__()
        self.relu, self.linear = step.relu and step.kind == "conv", step.kind == "linear"
        self.sizes = () if self.linear else (layer.stride, layer.padding, layer.dilation, layer.groups)
        self.stride2 = folded.stride if folded else 1
        for name, dtype, shape in (("weight", torch.float32, layer.weight.shape),
                                   ("bias", torch.float32, layer.weight.shape[:1]),
                                   ("weight2", torch.float32, folded.weight.shape if folded else None),
                                   ("centre", torch.float32, (layer.in_channels,) if step.x == "pixels" else None),
                                   ("scale", torch.float64, ()), ("zero", torch.int32, ())):
            self.register_buffer(name, None if shape is None else torch.zeros(shape, dtype=dtype))

    @torch.no_grad()
    def fill(self, weights, bias, low, high, centre=None):
        """weights: one (O, ...) or two, the second the downsampling convolution's; bias (O): both with their
        batch-norms folded, and for the pixels with their std; low, high: range of the result; centre: their mean."""
        low, high = min(low, 0.0), max(high, 0.0)
        self.scale.fill_((high - low) / 255 or 1.0)
        self.zero.fill_(round(-low / self.scale.item()))
        for name, value in zip(("weight", "weight2"), weights):
            getattr(self, name).copy_(value)
        self.bias.copy_(bias)
        if self.centre is not None:
            self.centre.copy_(centre)

    def forward(self, x, residual=None, x2=None):
        if self.linear:
            return F.linear(x, self.weight, self.bias)
        x = x if self.centre is None else x - self.centre.view(-1, 1, 1)
        y = F.conv2d(x, self.weight, self.bias, *self.sizes)
        y = y if x2 is None else y + F.conv2d(x2, self.weight2, None, self.stride2)
        y = y if residual is None else y + residual
        return F.relu(y) if self.relu else y


class Int8Gate(nn.Module):
    """Attention between uint8 maps: csrc.gate_int8. Maps in float32 give float32, and nothing is rounded.

    squeeze-and-excitation  x (N, C, H, W), residual the same -> relu(gate(x) * x + residual)
    split attention         x (N, 2 C, H, W), two branches    -> gate(x) * branch a + (1 - gate(x)) * branch b"""

    def __init__(self, step, attention, folded):
        super().__init__()
        for name in ("fc1", "fc2"):
            conv = getattr(attention, name)
            setattr(self, name, nn.Linear(conv.in_channels, conv.out_channels).requires_grad_(False))
        self.register_buffer("scales", torch.ones(2, dtype=torch.float64))  # of the two maps that are added
        self.register_buffer("zeros", torch.zeros(2, dtype=torch.int32))
        self.register_buffer("scale", torch.zeros((), dtype=torch.float64))

    def forward(self, x, residual=None):
        fc1, fc2 = self.fc1, self.fc2
        if not x.is_floating_point():
            return csrc.gate_int8(x, residual, fc1.weight, fc1.bias, fc2.weight, fc2.bias,
                                  torch.cat([self.scales, self.scale.view(1)]), self.zeros)
        mean = x.mean((2, 3))
        if residual is not None:
            return F.relu(x * fc2(F.relu(fc1(mean))).sigmoid()[:, :, None, None] + residual)
        (a, b), (first, second) = x.chunk(2, 1), fc2(F.relu(fc1(sum(mean.chunk(2, 1))))).chunk(2, 1)
        share = (first - second).sigmoid()[:, :, None, None]
        return share * a + (1 - share) * b


class Int8ResNet50(Flat, nn.Module):
    """uint8 pixels (N, 3, H, W) -> float32 logits (N, num_classes). ResNet50's config; quantize() fills it. Names of
    modules are ResNet50's, without the batch-norms and what is folded.

    float_layers  names of convolutions and linear layers that stay in float32, as FloatStep. They read uint8 as
                  scale * (value - zero) of the step that made it, and make float32, which pools and gates keep; the
                  next int8 convolution or linear layer rounds it to uint8 as the int8 network would have had it"""
    precision = "int8"

    def __init__(self, float_layers=(), **config):
        super().__init__()
        with torch.device("meta"):
            model = ResNet50(**config)
        self.config, self.preprocess = model.config, dict(PREPROCESS)
        self.steps = fold_downsample(flatten(model))
        if self.config["classifier"] != "float":
            raise ValueError("Int8ResNet50: classifier='int8' is of float networks")
        if unknown := sorted(set(float_layers) - {s.name for s in self.steps if s.kind in ("conv", "linear")}):
            raise ValueError("Int8ResNet50: float_layers names no convolution or linear layer of this network, or one "
                             f"that is part of another: {', '.join(unknown)}")
        if float_layers:
            self.config["float_layers"] = list(float_layers)
        self.grids = {}  # name of a buffer -> of the step whose scale and zero it has
        kinds = dict(conv=Int8Conv, gate=Int8Gate, avgpool=Int8AvgPool, linear=Int8Linear)
        layers = dict(model.named_modules())
        for step in sorted(self.steps, key=lambda step: step.name):  # a gate comes before the convolution in it
            node, (*path, leaf) = self, step.name.split(".")
            for name in path:
                if name not in node._modules:
                    node.add_module(name, nn.Module())
                node = node.get_submodule(name)
            layer, folded = layers.get(step.name), step.folded and layers[step.folded.name]
            kind = FloatStep if step.name in float_layers else kinds.get(step.kind)
            node.add_module(leaf, kind(step, layer, folded) if kind else layer)  # a pool is what it was
        for step in self.steps:
            self.grids[step.name] = self.grids[step.x] if step.kind in ("maxpool", "pool") else step.name
        self.to(memory_format=torch.channels_last).eval()

    def program(self):
        if self.config["attention"] != "none" or self.config.get("float_layers") or not csrc.load():
            return None

        def describe(step):
            module = self.get_submodule(step.name)
            sizes = {k: getattr(module, k) for k in ("stride", "padding", "stride2", "groups") if hasattr(module, k)}
            return dict(kind=step.kind, name=step.name, x=step.x, residual=step.residual, x2=step.x2, out=step.name,
                        **sizes, **dict(module.named_buffers()))
        return [describe(step) for step in self.steps]

    def ways(self, n):
        if n < 64 or self.config.get("float_layers"):  # whose sums may be others in another batch
            return [{}]
        return [{}, *(dict(images=images, stage=stage) for images in (32, 64, 128) if images < n
                      for stage in ("layer1", "layer2", "fc"))]

    def pack_sparse(self):
        """Makes `sparse`, {step name: weights}, of the convolutions that are 2:4 sparse: CUDA has kernels for those."""
        found = {step.name: self.get_submodule(step.name) for step in self.steps}
        found = {name: layer.pack_2_4() for name, layer in found.items() if isinstance(layer, Int8Conv)}
        self.sparse = {name: packed for name, packed in found.items() if packed}

    def grid_of(self, name):
        """-> (scale, zero) of a buffer: a value stands for scale * (value - zero)"""
        if name == "pixels":
            return 1.0, 0
        module = self.get_submodule(self.grids[name])
        return module.scale.item(), int(getattr(module, "zero", 0))

    def converted(self, name, x, floating):
        """The buffer `name` as float32 or as uint8, by the grid of the step that made it; the pixels are on none."""
        if x.is_floating_point() == floating:
            return x
        if name == "pixels":
            return x.float()
        module = self.get_submodule(self.grids[name])
        scale, zero = module.scale.float(), getattr(module, "zero", 0)
        if floating:
            return (x.float() - zero) * scale
        return ((x / scale).round_() + zero).clamp_(0, 255).to(torch.uint8)

    def call(self, step, x, **more):
        module = self.get_submodule(step.name)
        floating = isinstance(module, FloatStep)
        if step.kind not in ("conv", "linear"):  # these follow what they read
            floating = any(value.is_floating_point() for value in (x, *more.values()))
        x = self.converted(step.x, x, floating)
        more = {k: self.converted(getattr(step, k), value, floating) for k, value in more.items()}
        if step.kind == "maxpool" and not floating:
            return csrc.max_pool_int8(x, module.kernel_size, module.stride, module.padding)
        if step.kind == "pool" and not floating:
            return module(x.float()).round().to(torch.uint8)
        if self.sparse and step.name in self.sparse and not torch.compiler.is_compiling():
            more["packed"] = self.sparse[step.name]
        return module(x, **more)

    def forward(self, pixels):
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        if (plan := self.plan_for(pixels)) is not None:
            return csrc.network_int8(pixels, plan, self.config["num_classes"])
        if pixels.is_cuda and self.sparse is None and not (
                torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()):  # it looks at the weights
            self.pack_sparse()
        return self.replay(pixels)


@torch.no_grad()
def observe(model, batches):
    """float ResNet50, iterable of uint8 pixels (N, 3, H, W) -> {step name: (low, high)} for every step's result."""
    fused, ranges = fuse(model), {}

    def watch(step, y):
        low, high = ranges.get(step.name, (0.0, 0.0))
        ranges[step.name] = min(low, y.min().item()), max(high, y.max().item())
    for pixels in batches:
        fused.run(normalize(pixels, model.preprocess).contiguous(memory_format=torch.channels_last), watch=watch)
    if not ranges:
        raise UserError("quantization needs images to observe, and there are none")
    return ranges


class Grid(NamedTuple):
    """What the integers of one convolution stand for."""
    scale: float  # a value of the result stands for scale * (value - zero)
    zero: int
    mult: torch.Tensor  # float64 (O), whole numbers
    unit: torch.Tensor  # float64 (O), what one in the accumulator stands for: exactly mult / 2^22 * scale
    limit: int  # of a weight's magnitude

    def weights(self, weight, scale):
        """float64 (O, ...), scale of its input -> whole numbers, what the weight is stored as"""
        unit = self.unit.view(-1, *[1] * (weight.dim() - 1))
        return (weight * scale / unit).round().clamp(-self.limit, self.limit)

    def bias(self, bias, offset):
        """float64 (O), of both that the weights make of inputs which stand for zero -> whole numbers, as stored"""
        return ((bias + self.zero * self.scale) / self.unit - offset).round()


@functools.lru_cache(1024)
def rich_number(limit):
    """-> the number of most divisors in (limit - 2 %, limit], and these in ascending order as float64"""
    first = max(limit - min(limit // 50, 1000), 1)
    numbers, small = np.arange(first, limit + 1)[:, None], np.arange(1, math.isqrt(limit) + 1)
    best = int(first + (numbers % small == 0).sum(1).argmax())
    low = small[best % small == 0]
    return best, torch.from_numpy(np.union1d(low, best // low)).double()


def conv_grid(name, weights, bias, residual, low, high, bits=8, per_tensor=False):
    """weights: [(float64 (O, C, kh, kw), scale of its input)], one or two that add up; bias float64 (O); residual: its
    scale or None; low, high: range of the result -> Grid. Weights of fewer `bits` use fewer of int8's values, and
    per_tensor gives all channels one unit: both are harder to bear than need be, for comparison and training.

    One unit of the accumulator is mult / 2^22 * scale exactly, so rounding `mult` costs nothing but range: it is the
    least for which the largest weight fits, in steps of EXACT. A residual's gain * mult is one number for all channels,
    residual / scale * 2^22, which the scale is enlarged for by up to 2 %: a Q/DQ file has one scale for it too."""
    low, high, limit = min(low, 0.0), max(high, 0.0), 2 ** (bits - 1) - 1
    flat = [w.flatten(1) * scale for w, scale in weights]
    reach = torch.maximum(*(sum((sign * w).clamp(min=0).sum(1) for w in flat) for sign in (1, -1))) * 255
    least = torch.stack([w.abs().amax(1) / limit for w in flat]
                        + [(bias.abs() - low) / HEADROOM, reach / REACH]).amax(0)
    if per_tensor:
        least = least.max().expand_as(least)
    if residual:
        least = least.clamp(min=residual * 255 / HEADROOM)
    largest = least.max().item()
    scale = max((high - low) / 255, largest) or 1.0  # where all is zero, any will do
    if not math.isfinite(largest * scale):
        raise UserError(f"{name}: a weight or the range of the results is not finite")
    steps, divisors = 2 ** MULT_BITS // EXACT, None
    if residual and (room := int(residual / scale * steps)):
        total, divisors = rich_number(room)
        divisors = divisors[divisors <= steps].to(least.device)
        scale = residual * steps / total
    mult = (least / scale * steps * (1 - 1e-12)).ceil().clamp(1, steps)
    if divisors is not None:  # a channel whose unit is larger than the residual's keeps its own, and gain is 1 or 0
        at = torch.searchsorted(divisors, mult)
        mult = torch.where(at < len(divisors), divisors[at.clamp(max=len(divisors) - 1)], mult)
    mult = mult * EXACT
    return Grid(scale, round(-low / scale), mult, mult * scale / 2 ** MULT_BITS, limit)


def linear_unit(weight, bias, bits=8, per_tensor=False):
    """float64 (classes, C), in units of its input, and (classes) -> float32 (classes), what one in each accumulator
    stands for"""
    unit = torch.maximum(weight.abs().amax(1) / (2 ** (bits - 1) - 1), bias.abs() / HEADROOM).clamp(min=1e-30)
    return (unit.max().expand_as(unit) if per_tensor else unit).float()


def fill_conv(module, name, weights, bias, residual, low, high, centre, **grid):
    """The integers of one convolution, by conv_grid's arguments; centre (C): inputs that stand for zero."""
    grid = conv_grid(name, weights, bias, residual, low, high, **grid)
    ints = [grid.weights(w, s) for w, s in weights]
    offset = (ints[0] * centre.view(1, -1, 1, 1)).flatten(1).sum(1)  # of the weights as they are now
    values = dict(weight=ints[0], weight2=ints[1] if ints[1:] else None, mult=grid.mult,
                  bias=grid.bias(bias, offset),
                  gain=(residual / grid.unit).round() if residual else None, scale=grid.scale, zero=grid.zero)
    for key, value in values.items():
        if value is not None:
            getattr(module, key).copy_(torch.as_tensor(value, dtype=torch.float64))


def quantize_classifier(model):
    """float ResNet50 -> the same with a DynamicLinear for its classifier"""
    result = ResNet50(**{**model.config, "classifier": "int8"})
    result.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("fc.")}, strict=False)
    result.fc.fill(copy.deepcopy(model.fc).cpu())
    result.preprocess = dict(model.preprocess)
    return result.to(memory_format=torch.channels_last).eval()


@torch.no_grad()
def quantize(model, batches=None, ranges=None, float_layers=(), **grid):
    """Post-training quantization of a float ResNet50 on the CPU -> Int8ResNet50. `ranges`, or what observe() says of
    the `batches` of pixels, give uint8 activations one scale per tensor; weights are symmetric, one scale per channel
    (`grid`: conv_grid's bits and per_tensor)."""
    ranges = observe(model, batches) if ranges is None else ranges
    result = Int8ResNet50(float_layers, **model.config)
    result.preprocess = dict(model.preprocess)
    mean = torch.tensor(model.preprocess["mean"], dtype=torch.float64) * 255
    for step in result.steps:
        module, (scale, _), (low, high) = result.get_submodule(step.name), result.grid_of(step.x), ranges[step.name]
        low = 0.0 if step.kind == "conv" and step.relu else low
        if step.name in float_layers:
            module.fill(*fold_norms(model, step), low, high, mean)
        elif step.kind == "conv":
            weights, bias = fold_norms(model, step)
            centre = mean if step.x == "pixels" else torch.zeros(weights[0].shape[1], dtype=torch.float64)
            scales = [result.grid_of(name)[0] for name in (step.x, step.x2, step.residual) if name]
            fill_conv(module, step.name, list(zip(weights, scales)), bias, scales[-1] if step.residual else None,
                      low, high, centre, **grid)
            if step.x == "pixels":
                module.pad_value.copy_(mean.round().clamp(0, 255))  # the nearest to what stands for zero
        elif step.kind == "gate":
            attention, both = model.get_submodule(step.name), map(result.grid_of, (step.x, step.residual or step.x))
            for buffer, values in zip((module.scales, module.zeros), zip(*both)):
                buffer.copy_(torch.tensor(values, dtype=torch.float64))
            module.scale.fill_(max(high / 255, sum(module.scales).item() / 15))
            for name in ("fc1", "fc2"):
                getattr(module, name).weight.copy_(getattr(attention, name).weight.flatten(1))
                getattr(module, name).bias.copy_(getattr(attention, name).bias)
            if not step.residual:  # split attention has a batch-norm there
                factor, shift = batch_norm_affine(attention.bn1)
                module.fc1.weight.mul_(factor[:, None])
                module.fc1.bias.mul_(factor).add_(shift)
        elif step.kind == "avgpool":
            module.scale.fill_(max(high / 255, scale / 256))
            module.mult.copy_((scale / module.scale * 2 ** MULT_BITS).round())
        elif step.kind == "linear":
            weight, bias = fold_norm(model, step)
            weight = weight * scale
            unit = linear_unit(weight, bias, **grid)
            module.weight.copy_((weight / unit[:, None]).round().clamp(-127, 127))
            module.bias.copy_((bias / unit).round())
            module.scale.copy_(unit)
    return result


# ------------------------------------------------------------------------------------------------ checkpoints

@contextlib.contextmanager
def atomic_file(path):
    """with atomic_file(path) as temporary: write it. Readers see the old content of `path` or the new, never a part:
    temporary file in the same folder, fsync, rename, fsync of the folder. Failure, of the writer or of the disk,
    removes the temporary and keeps the old file; an OSError becomes a UserError."""
    folder, name = os.path.split(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
        for stale in glob.glob(os.path.join(glob.escape(folder), f".{glob.escape(name)}.*.tmp")):  # of a killed writer
            os.unlink(stale)
        temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
        try:
            yield temporary
            with open(temporary, "rb") as f:
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"{path}: not written ({error.strerror or error}); what was there before is intact") from error


def write_atomic(path, data):
    """bytes -> file, as atomic_file does it"""
    with atomic_file(path) as temporary, open(temporary, "wb") as f:
        f.write(data)


def encode_tensor(tensor, encoding):
    """A weight -> the dict of plain types and smaller tensors that a checkpoint holds in its place, or ValueError.

    sparse      one bit per element, and the values that are not zero, in any dtype; a negative zero becomes a zero
    int4:GROUP  float (O, ...) in 4.x bits: integers from -7 to 7, two per byte, the first in the low half, times one
                float16 scale per GROUP consecutive inputs of an output channel. Decoded and encoded again, the same"""
    kind, _, group = encoding.partition(":")
    stored = dict(encoding=encoding, shape=list(tensor.shape))
    if encoding == "sparse":
        flat = tensor.detach().cpu().flatten()
        present = flat != 0
        return dict(stored, mask=torch.from_numpy(np.packbits(present.numpy())), values=flat[present])
    if kind != "int4" or not group.isdecimal() or int(group) < 1:
        raise ValueError(f"encoding {encoding!r} is neither sparse nor int4:GROUP")
    if tensor.dim() < 2 or not tensor.is_floating_point():
        raise ValueError(f"int4 takes float weights (O, ...), not {tensor.dtype} {tuple(tensor.shape)}")
    flat, group = tensor.detach().cpu().float().flatten(1), int(group)
    groups = F.pad(flat, (0, -flat.shape[1] % group)).unflatten(1, (-1, group))
    scales = (groups.abs().amax(2) / 7).half()
    if not scales.isfinite().all():
        raise ValueError("a weight is not finite, or too large for int4's float16 scales")
    ints = (groups / scales.float().clamp(min=1e-8)[:, :, None]).round().clamp(-7, 7).flatten(1)[:, :flat.shape[1]]
    pairs = F.pad((ints + 8).to(torch.uint8), (0, flat.shape[1] % 2)).unflatten(1, (-1, 2))
    return dict(stored, values=pairs[:, :, 0] | pairs[:, :, 1] << 4, scales=scales)


def decode_tensor(stored):
    """encode_tensor's dict -> the tensor, float32 from int4. Lengths that disagree are a ValueError."""
    encoding, shape = stored["encoding"], stored["shape"]
    kind, _, group = encoding.partition(":")
    values, size = stored["values"], math.prod(shape)

    def check(name, tensor, dtype, *lengths):
        if tensor.dtype != dtype or tensor.shape != lengths or min(shape, default=0) < 0:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {lengths} for {shape}")
    if encoding == "sparse":
        check("mask", stored["mask"], torch.uint8, -(-size // 8))
        present = torch.from_numpy(np.unpackbits(stored["mask"].numpy(), count=size)).bool()
        check("values", values, values.dtype, int(present.count_nonzero()))
        return values.new_zeros(size).masked_scatter_(present, values).view(shape)
    if kind != "int4":
        raise ValueError(f"unknown encoding {encoding!r}")
    inputs, group = math.prod(shape[1:]), int(group)
    check("values", values, torch.uint8, shape[0], -(-inputs // 2))
    check("scales", stored["scales"], torch.float16, shape[0], -(-inputs // group))
    ints = torch.stack((values & 15, values >> 4), 2).flatten(1)[:, :inputs].float() - 8
    return (ints * stored["scales"].float().repeat_interleave(group, 1)[:, :inputs]).view(shape)


def encode_state(state, encode, path):
    """A state dict with the tensors that `encode` names, {key: encoding}, in their encodings."""
    if unknown := sorted(set(encode) - set(state)):
        raise UserError(f"{path}: not written: encode names no tensor of this network: {', '.join(unknown)}")
    result = dict(state)
    for name, encoding in encode.items():
        try:
            result[name] = encode_tensor(state[name], encoding)
        except ValueError as error:
            raise UserError(f"{path}: not written: {name}: {error}") from error
    return result


def decode_state(checkpoint, path):
    """Puts plain tensors in the place of the encoded ones, and into `encode` what save_checkpoint was told of them."""
    checkpoint["encode"] = {}
    for name, value in checkpoint["model"].items():
        if not isinstance(value, torch.Tensor):
            try:
                checkpoint["model"][name] = decode_tensor(value)
            except (ValueError, TypeError, AttributeError, LookupError, RuntimeError, ArithmeticError) as error:
                raise UserError(f"{path}: {name}: damaged encoding ({type(error).__name__}: {error})") from error
            checkpoint["encode"][name] = value["encoding"]


def as_checkpoint(model, state, **fields):
    """-> the dict that a file holds of a model whose state dict is `state`; of a cascade, with its members' own."""
    checkpoint = dict(format=FORMAT, precision=model.precision, model=state, config=model.config,
                      preprocess=model.preprocess, **fields)
    if model.precision == "cascade":
        members = [as_checkpoint(member, {k.removeprefix(name + "."): v for k, v in state.items()
                                          if k.startswith(name + ".")}, **fields)
                   for name, member in model.named_children()]
        checkpoint.update(model={}, members=members, threshold=model.threshold)
    return checkpoint


def save_checkpoint(path, model, *, classes, wnids=None, metrics=None, args=None, encode=None, **state):
    """One dict of plain types and tensors, loadable with weights_only=True. `encode`, {key: "sparse" or "int4:GROUP"},
    makes the file smaller by encode_tensor; load_checkpoint undoes it. By default what came sparse,
    `model.sparse_keys`, is written so again. `state` is what last.pt adds for resuming."""
    model = getattr(model, "module", model)
    weights = model.state_dict()
    if encode is None:
        encode = {key: "sparse" for key in getattr(model, "sparse_keys", ()) if key in weights}
    weights = encode_state(weights, encode, path)
    checkpoint = as_checkpoint(model, weights, classes=list(classes), wnids=wnids, metrics=metrics or {},
                               args=args or {})
    checkpoint.update(state)
    # serialised in memory first: a full disk is then an OSError of write(), not an abort inside torch
    buffer = io.BytesIO()
    try:
        torch.save(checkpoint, buffer)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "unexpected pos" not in str(error):  # of an end that does not fit either
            raise
        raise UserError(f"{path}: not written (out of memory); what was there before is intact") from error
    write_atomic(path, buffer.getbuffer())


def read_file(path):
    """What torch.save or safetensors wrote, onto the CPU, without running code from the file. Raises UserError."""
    try:
        with open(path, "rb") as f:
            head = f.read(9)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    try:
        if head[8:] == b"{":  # safetensors: 8-byte length, JSON header, raw data
            return read_safetensors(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = []
        with contextlib.suppress(Exception):  # on damaged files it fails in as many ways as unpickling does
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if foreign:
            raise UserError(f"{path}: refused, this pickle wants to run other code than tensors need: "
                            f"{', '.join(sorted(foreign))}. Save the state_dict alone, where it was made") from error
        raise UserError(f"{path}: not a checkpoint, or a damaged one") from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, OSError, AttributeError, TypeError,
            AssertionError, MemoryError, OverflowError, struct.error) as error:
        raise UserError(f"{path}: truncated or damaged "
                        f"({str(error).splitlines()[0][:120] if str(error) else type(error).__name__})") from error


def read_safetensors(path):
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
             "BF16": torch.bfloat16, "I64": torch.int64}
    with open(path, "rb") as f:
        blob = f.read()
    size = struct.unpack("<Q", blob[:8])[0]
    tensors, data = {}, bytearray(blob[8 + size:])
    for name, entry in json.loads(blob[8:8 + size]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            flat = torch.frombuffer(data[begin:end], dtype=kinds[entry["dtype"]]) if end > begin else torch.empty(0)
            tensors[name] = flat.reshape(entry["shape"])
    return tensors


def find_state_dict(raw, path):
    """The weights in a foreign file: bare, or under the names that torchvision and timm use, averaged ones first."""
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(raw, dict) and isinstance(raw.get(key), dict):
            raw = raw[key]
            break
    state = {}
    for name, value in raw.items() if isinstance(raw, dict) else ():
        name = str(name)
        while name.startswith(("module.", "_orig_mod.")):
            name = name.split(".", 1)[1]
        if isinstance(value, torch.Tensor) and name != "n_averaged":
            state[name] = value
    if not state:
        raise UserError(f"{path}: holds no weights")
    return state


ARGS_READ = dict(data=str, val_split=float)  # of what a run was told, by others than its own --resume


def is_sound(field, value):
    """Whether a file's field may be as_checkpoint's; what is in a state dict is fitting's business."""
    try:
        if field not in ("model", "ema"):
            json.dumps(value)
        if field in ("classes", "wnids"):
            return isinstance(value, list) and all(isinstance(v, str) for v in value)
        if field == "preprocess":
            value = {**PREPROCESS, **value}
            return (all(isinstance(value[k], int) and 0 < value[k] < 10 ** 4 for k in ("resize", "crop"))
                    and value["interpolation"] in ("bilinear", "bicubic")
                    and all(isinstance(value[k], (list, tuple)) and len(value[k]) == 3 for k in ("mean", "std"))
                    and all(abs(v) < 1e30 for v in [*value["mean"], *value["std"]])
                    and min(value["std"]) > 1e-30)  # as float32 knows them, times 255
        if field == "args" and not all(isinstance(value.get(k) or kind(), kind) for k, kind in ARGS_READ.items()):
            return False
        return isinstance(value, dict) and all(isinstance(k, str) for k in value)
    except (TypeError, ValueError, AttributeError, RecursionError):
        return False


def read_fields(raw, path):
    """Checks a dict that as_checkpoint made, decodes its weights in place -> the same dict."""
    if raw.get("format") != FORMAT:
        raise UserError(f"{path}: format {raw.get('format')!r}; this version reads {FORMAT!r}")
    raw.update({**dict(precision="float", wnids=None, metrics={}, args={}), **raw})  # which a file need not have
    if raw["precision"] not in ("float", "int8", "cascade"):
        raise UserError(f"{path}: precision {raw['precision']!r}; this version reads 'float', 'int8' and 'cascade'")
    own = ("members", "threshold") if raw["precision"] == "cascade" else ()
    bad = [k for k in ("model", "config", "classes", "preprocess", "metrics", "args") if not is_sound(k, raw.get(k))]
    bad += [k for k in ("wnids", "ema") if raw.get(k) is not None and not is_sound(k, raw[k])]
    if bad := bad + [k for k in own if k not in raw]:
        raise UserError(f"{path}: damaged: has no {', '.join(bad)} of use")
    decode_state(raw, path)
    if own:
        if not isinstance(raw["members"], list) or [type(m) for m in raw["members"]] != [dict, dict]:
            raise UserError(f"{path}: damaged: members are not two checkpoints")
        for name, member in zip(("small.", "big."), raw["members"]):
            raw["encode"].update({name + k: v for k, v in read_fields(member, path)["encode"].items()})
    return raw


def load_checkpoint(path):
    """-> dict with the fields of DESIGN's checkpoint; for a foreign file `config` is empty and `classes` None."""
    raw = read_file(path)
    if isinstance(raw, dict) and str(raw.get("format", "")).startswith("resnet50/"):
        return read_fields(raw, path)
    return dict(format=None, precision="float", model=find_state_dict(raw, path), config={}, classes=None, wnids=None,
                preprocess=None, metrics={}, args={})


def fitting(model, state, path):
    """-> what a strict load_state_dict takes of a state dict; its complaint is one line with the file and the keys."""
    own = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta:
            raise UserError(f"{path}: {name}: is no plain tensor")
    state = {k: v for k, v in state.items() if not (k.endswith("num_batches_tracked") and k not in own)}
    missing = [k for k in own
               if k not in state and not k.endswith("num_batches_tracked")]  # absent in files before 2018
    surplus = [k for k in state if k not in own]
    shapes = [f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
              for k in own if k in state and state[k].shape != own[k].shape]
    kinds = [f"{k} {state[k].dtype} instead of {own[k].dtype}" for k in own if k in state
             and state[k].is_floating_point() != own[k].is_floating_point() and not k.endswith("num_batches_tracked")]

    def some(title, keys):
        return f"{title} {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}; " if keys else ""

    if text := (some("missing", missing) + some("surplus", surplus) + some("wrong shape", shapes)
                + some("wrong type", kinds)):
        raise UserError(f"{path}: does not fit this network: {text.rstrip('; ')}")
    for key in own.keys() - state.keys():
        del own[key]
    own.update(state)  # in place: it has versions of the modules, without which mnasnet refuses it
    return own


def load_weights(model, state, path):
    """Strict load_state_dict with the complaints of fitting()"""
    model.load_state_dict(fitting(model, state, path), strict=False)


def build_model(checkpoint, path, **config):
    """A checkpoint dict -> ResNet50, Int8ResNet50, Cascade or torchvision's `arch`, in eval mode, channels_last, with
    .preprocess; of a last.pt the averaged weights, which are what its run was scored by. `config` (None = not said)
    supplies what a foreign file lacks; where the file says otherwise it is refused, not overridden."""
    if checkpoint["config"].get("task") == "detect":
        raise UserError(f"{path}: is a detector, which finetune.py --task detect --eval-only scores")
    if checkpoint["config"] and any(".parametrizations." in name for name in checkpoint["model"]):
        raise UserError(f"{path}: is a run of --strategy lora to be resumed, whose best.pt is the plain network")
    config = {k: v for k, v in config.items() if v is not None}
    for key, value in checkpoint["config"].items():
        if key in ("drop_path", "dropout"):  # regularisation is the run's choice, not the network's shape
            config.setdefault(key, value)
        elif config.setdefault(key, value) != value:
            raise UserError(f"{path}: was made with {key}={value}, not {config[key]}", code=2)
    if not checkpoint["config"] and "num_classes" not in config and "fc.weight" in checkpoint["model"]:
        config["num_classes"], *_ = *checkpoint["model"]["fc.weight"].shape, 1
    if checkpoint["precision"] == "cascade":
        config = dict(small=build_model(checkpoint["members"][0], path, **config),
                      big=build_model(checkpoint["members"][1], path, **config), threshold=checkpoint["threshold"])
    kinds = dict(int8=Int8ResNet50, cascade=Cascade, float=torchvision_model if "arch" in config else ResNet50)
    make = functools.partial(kinds[checkpoint["precision"]], **config)
    try:
        # on meta what the file's weights do not fill takes no memory; some of torchvision's cannot be made there
        with torch.device("cpu" if "arch" in config else "meta"):
            model = make()
    except (TypeError, ValueError, RuntimeError, UserError) as error:
        raise UserError(f"{path}: {error}") from error
    if checkpoint["precision"] != "cascade":  # its members have theirs
        state = fitting(model, checkpoint.get("ema") or checkpoint["model"], path)
        model = model if "arch" in config else make()
        model.load_state_dict(state, strict=False)
    model.preprocess.update(checkpoint["preprocess"] or {})
    model.sparse_keys = [key for key, encoding in checkpoint.get("encode", {}).items() if encoding == "sparse"]
    return model.to(memory_format=torch.channels_last).eval()


def fetch_weights(name, arch=None):
    """torchvision's weights by name, for ResNet-50 or its classifier `arch`, as a checkpoint dict. Downloads once into
    torch's cache."""
    from torchvision.models import get_model_weights
    try:
        known = get_model_weights(arch or "resnet50")
    except ValueError as error:
        raise UserError(f"{arch}: neither a file nor a model of torchvision") from error
    if name not in known.__members__:
        raise UserError(f"--weights {name}: torchvision has {', '.join(known.__members__)}", code=2)
    weights = known[name]
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{arch or '--weights ' + name}: cannot be fetched from {weights.url} ({error}); "
                        "on a machine without network give a file with --checkpoint") from error
    transform = weights.transforms()
    preprocess = dict(resize=transform.resize_size[0], crop=transform.crop_size[0],
                      interpolation=transform.interpolation.value, mean=list(transform.mean), std=list(transform.std))
    config = dict(arch=arch, num_classes=len(weights.meta["categories"])) if arch else {}
    return dict(format=None, precision="float", model=state, config=config, classes=list(weights.meta["categories"]),
                wnids=None, preprocess=preprocess, metrics={}, args={})


def read_classes(path):
    """A JSON list of names, or of objects with `index`, `wnid`, `name` -> (names, wnids or None), in index order."""
    try:
        with open(path, encoding="utf-8") as f:
            entries = json.load(f)
        if not isinstance(entries, list):
            raise ValueError("not a list")
        if all(isinstance(e, str) for e in entries):
            return list(entries), None
        entries = sorted(entries, key=lambda e: e["index"])
        if [e["index"] for e in entries] != list(range(len(entries))):
            raise ValueError("`index` must run from 0 without a gap")
        return [e["name"] for e in entries], [e.get("wnid", e["name"]) for e in entries]
    except OSError as error:
        raise UserError(f"--classes {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--classes {path}: neither a JSON list of names nor of objects with index, wnid, name "
                        f"({type(error).__name__}: {error})") from error


def between(low, high=math.inf, kind=int, above=False, below=False):
    """-> an argparse type: finite numbers from `low` to `high`, `above` and `below` them without the ends themselves"""
    def number(text):
        value = kind(text)
        if not (low <= value <= high) or above and value == low or below and value == high or math.isinf(value):
            span = (f"be {'above' if above else 'at least'} {low:g}" if math.isinf(high) else
                    f"lie in {'[('[above]}{low:g}, {high:g}{'])'[below]}")
            raise argparse.ArgumentTypeError(f"{text} must {span}")
        return value
    number.__name__ = kind.__name__  # as argparse calls it
    return number


positive, amount = between(1, 10 ** 9), between(0.0, kind=float)
fraction, below_one, above_zero = (between(0.0, 1.0, float, **k) for k in ({}, dict(below=True), dict(above=True)))


def device_name(text):
    """An argparse type"""
    if text not in ("cpu", "cuda", *map("cuda:{}".format, range(128))):  # as far as PyTorch counts
        raise argparse.ArgumentTypeError(f"{text} is none of cpu, cuda and cuda:N")
    return text


def find_device(name):
    """A name that device_name lets pass -> torch.device; UserError where PyTorch has none of that name"""
    device, count = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"--device {name}: PyTorch sees {count or 'no'} CUDA device{'s' * (count != 1)} here", code=2)
    return device


class Help(argparse.HelpFormatter):
    """Shows a flag's default behind its help, or alone, but for None, False and what the help itself speaks of"""

    def add_argument(self, action):
        if not (action.default in (None, [], argparse.SUPPRESS) or action.default is False
                or "default" in (action.help or "")):
            action = copy.copy(action)
            action.help = f"{action.help or ''} (default: %(default)s)"
        super().add_argument(action)


def add_model_args(parser):
    """The flags that every script with a --checkpoint shares; a checkpoint from elsewhere carries no config."""
    group = parser.add_argument_group("network")
    group.add_argument("--checkpoint", metavar="FILE", help="ours, torchvision's or timm's weights")
    group.add_argument("--weights", metavar="NAME", help="torchvision's weights by name, such as IMAGENET1K_V2")
    group.add_argument("--stride-on", choices=CHOICES["stride_on"],
                       help="where a stage strides: 3x3 is v1.5, 1x1 the 2015 weights")
    group.add_argument("--attention", choices=CHOICES["attention"],
                       help="squeeze-and-excitation, or ResNeSt's split attention")
    group.add_argument("--stem", choices=CHOICES["stem"],
                       help="small: 3x3 and no max-pool, for images up to 64 px")
    group.add_argument("--num-classes", type=positive, metavar="N")
    group.add_argument("--classes", metavar="FILE", help="JSON list of class names, or of {index, wnid, name}")
    return group


def load_model(args, defaults=(), trains=False, **config):
    """What add_model_args' flags name -> (model, checkpoint dict, source text), or (None, None, None) if they name
    nothing and none of the files in `defaults` exists. args.classes replaces the checkpoint's class names. A script
    that `trains` gets float networks only."""
    path = args.checkpoint or next((p for p in defaults if os.path.exists(p)), None)
    if args.checkpoint and args.weights:
        raise UserError("--checkpoint and --weights exclude each other", code=2)
    if args.weights:
        path, checkpoint = args.weights, fetch_weights(args.weights)
    elif path:
        checkpoint = load_checkpoint(path)
    else:
        return None, None, None
    kind = "int8" if checkpoint["config"].get("classifier") == "int8" else checkpoint["precision"]
    if trains and kind != "float":
        raise UserError(f"{path}: is {kind}, which cannot be trained; start from the float checkpoint it was made of")
    model = build_model(checkpoint, path, stride_on=args.stride_on, attention=args.attention, stem=args.stem,
                        num_classes=args.num_classes, **config)
    if args.classes:
        checkpoint["classes"], checkpoint["wnids"] = read_classes(args.classes)
    if checkpoint["classes"] is not None and len(checkpoint["classes"]) != model.config["num_classes"]:
        raise UserError(f"{args.classes or path}: {len(checkpoint['classes'])} class names for "
                        f"{model.config['num_classes']} outputs")
    return model, checkpoint, path


def load_some_model(args, defaults, trains=False):
    """load_model, and where there is nothing torchvision's IMAGENET1K_V2; UserError where they cannot be had either"""
    found = load_model(args, defaults, trains)
    if found[0] is not None:
        return found
    try:
        return load_model(argparse.Namespace(**{**vars(args), "weights": "IMAGENET1K_V2"}), trains=trains)
    except UserError as error:
        raise UserError(f"no checkpoint: train one (python train.py writes {defaults[-1]}) or name one with "
                        f"--checkpoint FILE; {error}") from error


# ---------------------------------------------------------------------------------------------------- summary

def example(model, batch_size, size):
    """-> what model(x) takes, where the model is: uint8 pixels or floats (N, 3, size, size), NHWC"""
    weight = next(itertools.chain(model.parameters(), model.buffers()))
    x = torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8, device=weight.device)
    x = x if model.precision != "float" else normalize(x, model.preprocess).to(weight.dtype)
    return x.contiguous(memory_format=torch.channels_last)


def check_sizes(model, sizes):
    """UserError where a network in eval mode takes no images of one of these sizes, {pixels: flag that asks for them}:
    torchvision's vision transformers take one alone, and others leave nothing of small images. Ours take all."""
    for size, flag in sizes.items() if not isinstance(model, (Flat, ResNet50)) else ():
        try:
            with torch.no_grad():
                model(example(model, 1, size))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UserError(f"{flag} {size}: {error}", code=2) from error


def weights(model):
    """(name, tensor) of what is counted as parameters; scales and statistics are not."""
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers()
                if name.rpartition(".")[2] in ("weight", "weight2", "bias"))


def count_macs(model, size=224):
    """-> {name of a convolution or linear layer: multiply-accumulates for one (3, size, size) image}. Of a cascade both
    members', as for an image that goes on to the big one."""
    if isinstance(model, Cascade):
        return {f"{name}.{k}": v for name, member in model.named_children()
                for k, v in count_macs(member, size).items()}
    if isinstance(model, Flat):  # calls no modules that could be watched, and costs what the network does that it is of
        with torch.device("meta"):
            model = ResNet50(**{k: v for k, v in model.config.items() if k not in ("float_layers", "classifier")})
    macs, kinds = {}, (nn.Conv2d, nn.Linear, DynamicLinear)
    names = {m: name for name, m in model.named_modules() if isinstance(m, kinds)}

    def watch(module, inputs, output):
        if module in names:
            macs[names[module]] = output[0].numel() * module.weight[0].numel()
    training = model.training
    with torch.no_grad(), nn.modules.module.register_module_forward_hook(watch):
        model.eval()(example(model, 1, size))
    model.train(training)
    return macs


def measure(fn, device, repeats=7, warmup=2):
    """Median milliseconds of fn() after the warm-up calls."""
    times, wait = [], functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    for _ in range(repeats + warmup):
        wait()
        start = time.perf_counter()
        fn()
        wait()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[warmup:])


def stage_of(name):
    """The stage that a parameter or step belongs to."""
    first = name.split(".")[0]
    return {"conv1": "stem", "bn1": "stem", "maxpool": "stem", "avgpool": "head", "fc": "head"}.get(first, first)


def parts(model, x):
    """-> {name: (callable, its inputs)} of model(x), for summarize(): the stages of a ResNet-50; of another network the
    modules that it calls, of a cascade both members."""
    if isinstance(model, Cascade):
        return {name: (functools.partial(predict, member), (x,)) for name, member in model.named_children()}
    result, stages = {}, ()
    if isinstance(model, Flat):
        stages = [(name, functools.partial(model.run, steps=list(steps)))
                  for name, steps in itertools.groupby(model.steps, lambda step: stage_of(step.name))]
    elif isinstance(model, ResNet50):
        stages = [("stem", lambda x: model.maxpool(F.relu(model.bn1(model.conv1(x))))),
                  *((f"layer{i}", getattr(model, f"layer{i}")) for i in range(1, len(STAGES) + 1)),
                  ("head", lambda x: model.fc(x.mean((2, 3))))]
    for name, stage in stages:
        result[name], x = (stage, (x,)), stage(x)
    if result:
        return result
    names = {child: name for name, child in model.named_children()}

    def watch(module, inputs):
        if module in names:
            result[names[module]] = module.forward, inputs
    with nn.modules.module.register_module_forward_pre_hook(watch):
        model(x)
    return result


@torch.no_grad()
def summarize(model, size, batch_size, device):
    """-> rows of (stage, output shape, parameters, MACs per image, milliseconds per batch)."""
    macs, rows = count_macs(model, size), []
    of = stage_of if isinstance(model, (Flat, ResNet50)) else lambda name: name.split(".")[0]
    for name, (part, inputs) in parts(model, example(model, batch_size, size)).items():
        rows.append((name, "x".join(map(str, part(*inputs).shape[1:])),
                     sum(p.numel() for k, p in weights(model) if of(k) == name),
                     sum(v for k, v in macs.items() if of(k) == name), measure(lambda: part(*inputs), device)))
    return rows


def cpu_isa():
    """The instruction sets that decide how fast the kernels can be, as the system reports them."""
    wanted = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd")
    flags = cpuinfo("flags", "features").split()
    return [w for w in wanted if w in flags] or [torch.backends.cpu.get_cpu_capability().lower()]


def environment():
    """-> {what: version or state}, printed before any figure."""
    import torchvision
    cuda = ("not built in" if torch.version.cuda is None
            else f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"torch": torch.__version__, "torchvision": torchvision.__version__, "python": platform.python_version(),
            "CUDA": cuda, "GPUs": ", ".join(gpus) or "none", "CPU": f"{platform.machine()} {' '.join(cpu_isa())}",
            "threads": torch.get_num_threads(), "extension": csrc.describe()}


def get_args_parser():
    parser = argparse.ArgumentParser(prog="resnet50.py", formatter_class=Help,
                                     description="What the network costs, layer by layer, and where it runs.")
    add_model_args(parser)
    parser.add_argument("--image-size", type=positive, metavar="PX", help="default: the checkpoint's crop, else 224")
    parser.add_argument("--batch-size", type=positive, default=1, metavar="N",
                        help="images per timed batch")
    parser.add_argument("--device", type=device_name, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fused", action="store_true",
                        help="run a float network's convolutions and batch-norms as one kernel each")
    parser.add_argument("--profile", action="store_true", help="print torch.profiler's table of one forward pass")
    return parser


def main(args):
    device = find_device(args.device)
    model, _, source = load_model(args)
    if model is None:
        if args.classes:
            raise UserError("--classes names the outputs of a --checkpoint or of --weights", code=2)
        config = dict(stride_on=args.stride_on, attention=args.attention, stem=args.stem, num_classes=args.num_classes)
        try:
            model = ResNet50(**{k: v for k, v in config.items() if v is not None}).to(
                memory_format=torch.channels_last).eval()
        except ValueError as error:
            raise UserError(error, code=2) from error
    model.to(device)
    if args.fused:
        model = fuse(model)
    size = args.image_size or model.preprocess["crop"]
    check_sizes(model, {size: "--image-size"})
    say = lambda text: print(text, file=sys.stderr)  # noqa: E731
    for key, value in environment().items():
        say(f"{key:12} {value}")
    say(f"\n{'':12} {source or 'untrained'}, {model.precision}, {size} px, batch {args.batch_size} on {device}")
    rows = summarize(model, size, args.batch_size, device)
    width = max(8, *(len(row[0]) + 1 for row in rows))
    say(f"{'stage':{width}}{'output':>14}{'parameters':>14}{'GMAC':>9}{'ms':>9}")
    for name, shape, params, macs, milliseconds in rows:
        say(f"{name:{width}}{shape:>14}{params:>14,}{macs / 1e9:>9.3f}{milliseconds:>9.2f}")
    params, macs = sum(p.numel() for _, p in weights(model)), sum(count_macs(model, size).values())
    with torch.no_grad():
        x = example(model, args.batch_size, size)
        milliseconds = measure(lambda: model(x), device)
        say(f"{'total':{width}}{'':>14}{params:>14,}{macs / 1e9:>9.3f}{milliseconds:>9.2f}")
        if args.profile:
            from torch.profiler import ProfilerActivity, profile
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
            with profile(activities=activities) as profiler:
                model(x)
            say(profiler.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=20))
    return dict(precision=model.precision, params=params, macs=macs, latency_ms=round(milliseconds, 3),
                batch_size=args.batch_size, image_size=size, device=str(device), checkpoint=source)


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args(), "resnet50.py")
