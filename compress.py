"""Make a trained network smaller and faster, and measure what that costs.

  python compress.py --prune 0.5 --int8    # runs/{finetune,train}/best.pt: half the channels, fine-tuned, int8
  python compress.py --int8 --checkpoint FILE --data FOLDER   # post-training quantization, as without flags: minutes
  python compress.py --qat --checkpoint FILE --data FOLDER    # quantization-aware training
  python compress.py --target-latency 5 --int8                # milliseconds per image on this machine
  python compress.py --checkpoint FILE --distill self --student resnet18   # a student taught by FILE
  python compress.py --cascade SMALL BIG                      # BIG sees only what SMALL is unsure of
  torchrun --nproc_per_node=8 compress.py --prune 0.5 --data /imagenet --epochs 50

Stages run in the order distill, prune, finetune, qat, quantize, as far as flags ask for them; --stages says otherwise.
Every stage leaves a checkpoint in --out; best.pt is the last one's. The report compares all of them with the network
as it came, on the same images and, in alternation, on this device. Unstructured and 2:4 sparsity (--sparsity,
--sparsity-2-4) make the file smaller, not the network faster: of all kernels here only CUDA's for 2:4 int8 skip zeros,
and how much faster they are has not been measured yet.
"""
import argparse
import contextlib
import copy
import functools
import glob
import html
import itertools
import json
import math
import os
import re
import statistics
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import csrc
import data
import train
from csrc.reference import MULT_BITS
from resnet50 import (
    HEADROOM,
    Bottleneck,
    Cascade,
    Flat,
    Help,
    Int8Conv,
    Int8Linear,
    ResNet50,
    SplitAttention,
    SqueezeExcite,
    UserError,
    add_model_args,
    amount,
    below_one,
    between,
    build_model,
    check_sizes,
    conv_grid,
    count_macs,
    device_name,
    example,
    fetch_weights,
    flatten,
    fold_downsample,
    fold_norm,
    fraction,
    fuse,
    linear_unit,
    load_checkpoint,
    load_model,
    load_some_model,
    load_weights,
    measure,
    normalize,
    positive,
    predict,
    quantize,
    quantize_classifier,
    run_script,
    save_checkpoint,
    torchvision_model,
    weights,
    write_atomic,
)

DEFAULTS = ["runs/finetune/best.pt", "runs/train/best.pt"]
TARGETS = ("macs", "params", "latency")
GOALS = ("prune", "sparsity", "sparsity_2_4", *(f"target_{kind}" for kind in TARGETS))  # flags that say what shall go
STAGES = ("distill", "prune", "finetune", "qat", "quantize")
IMPORTANCE = ("l1", "l2", "bn", "taylor", "activation", "random")


def say(text):
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------- pruning

class Space(NamedTuple):
    """Channels that stay or go together: all tensors that make, scale, add or read them."""
    name: str  # its name in config["widths"]; "....se" and "....inner" are attention's, whose width follows the others'
    size: int
    width: int  # config["widths"] counts so many times the size
    members: list  # of (key in the state dict, dimension, how often the channels repeat along it)


def spaces(model):
    """ResNet50 -> {name: Space}. A stage's stream is one space: what its blocks add up, and what the next stage reads.
    Split attention's halves and branches repeat their space, so that its two groups lose the same channels."""
    found, state = {}, model.state_dict()

    def join(name, key, dim, repeat=1, width=1):
        if name is not None:
            size = state[key].shape[dim] // repeat
            found.setdefault(name, Space(name, size, width, [])).members.append((key, dim, repeat))

    def layer(key, reads, makes, bn=None, repeat=1, width=1):
        join(makes, key + ".weight", 0, repeat, width)
        join(reads, key + ".weight", 1)
        norm = [f"{bn}.{k}" for k in ("weight", "bias", "running_mean", "running_var")] if bn else []
        for name in [f"{key}.bias"] * (key + ".bias" in state) + norm:
            join(makes, name, 0, repeat)

    if model.config["stem"] == "deep":
        layer("conv1.0", None, "conv1.0", "conv1.1")
        layer("conv1.3", "conv1.0", "conv1.3", "conv1.4")
        layer("conv1.6", "conv1.3", "conv1", "bn1")
    else:
        layer("conv1", None, "conv1", "bn1")
    x = "conv1"
    for at, block in model.named_modules():
        if not isinstance(block, Bottleneck):
            continue
        stage, one, two = at.split(".")[0], at + ".conv1", at + ".conv2"
        layer(at + ".conv1", x, one, at + ".bn1", repeat=1 + block.split, width=1 + block.split)
        if block.split:
            layer(two + ".conv", one, two, two + ".bn0", repeat=2)
            layer(two + ".fc1", two, at + ".inner", two + ".bn1")
            layer(two + ".fc2", at + ".inner", two, repeat=2)
        else:
            layer(two, one, two, at + ".bn2")
        layer(at + ".conv3", two, stage, at + ".bn3")
        if block.se is not None:
            layer(at + ".se.fc1", stage, at + ".se")
            layer(at + ".se.fc2", at + ".se", stage)
        if block.downsample is not None:
            i = len(block.downsample) - 2
            layer(f"{at}.downsample.{i}", x, stage, f"{at}.downsample.{i + 1}")
        x = stage
    join(x, "fc.weight", 1)
    return found


def follows(name):
    """True for a space whose width the network's constructor derives from another's."""
    return name.endswith((".se", ".inner"))


def leader(name):
    """-> (space that a name follows, function from that one's width to this one's)"""
    at, _, kind = name.rpartition(".")
    return (at.split(".")[0], SqueezeExcite.inner) if kind == "se" else (at + ".conv1", SplitAttention.inner)


def prune(model, keep):
    """ResNet50, {space: indices of the channels that stay} -> a ResNet50 without the others; physically smaller."""
    state, found = dict(model.state_dict()), spaces(model)
    widths = {name: found[name].width * len(index) for name, index in keep.items()}
    result = ResNet50(**{**model.config, "widths": {**model.config["widths"], **widths}})
    shapes = {key: value.shape for key, value in result.state_dict().items()}
    for name, space in found.items():
        index = keep.get(name)
        if follows(name):
            rows = sum(state[key].abs().flatten(1).sum(1) for key, dim, _ in space.members
                       if dim == 0 and state[key].ndim > 1)
            index = rows.topk(shapes[space.members[0][0]][0]).indices.sort().values
        if index is None:
            continue
        for key, dim, repeat in space.members:
            every = torch.cat([index + i * space.size for i in range(repeat)]).to(state[key].device)
            state[key] = state[key].index_select(dim, every)
    result.load_state_dict(state)
    result.preprocess = dict(model.preprocess)
    return result.to(next(model.parameters()).device, memory_format=torch.channels_last).eval()


def rank(model, kind, pixels, labels, seed=0):
    """How much each channel matters -> {space: float64 (channels)}, for the prunable spaces.

    l1, l2      norm of the weights that make the channel (arXiv 1608.08710)
    bn          |gamma| (arXiv 1708.06519)
    taylor      (gamma * dloss/dgamma + beta * dloss/dbeta)^2, the loss's first-order change without it, summed over
                batches (arXiv 1906.10771); labels (N) of -100 take the network's own arg-max
    activation  mean after the ReLU
    random      for comparison
    All but taylor and bn are divided by their mean over the space, to be comparable between spaces."""
    found, generator = spaces(model), torch.Generator().manual_seed(seed)
    score = {name: torch.zeros(space.size, dtype=torch.float64) for name, space in found.items() if not follows(name)}
    where = {key: (name, repeat) for name, space in found.items() for key, dim, repeat in space.members if dim == 0}

    def add(key, values):
        name, repeat = where[key]
        if name in score:
            score[name] += values.detach().double().cpu().view(repeat, -1).sum(0)

    norms = [step.bn for step in flatten(model) if step.bn]
    if kind in ("l1", "l2"):
        for key, weight in model.named_parameters():
            if weight.ndim == 4:
                add(key, weight.flatten(1).norm(p=int(kind[1]), dim=1))
    elif kind == "bn":
        for bn in norms:
            add(bn + ".weight", model.get_submodule(bn).weight.abs())
    elif kind == "taylor":
        probe = copy.deepcopy(model).eval().requires_grad_(True)
        for images, target in zip(pixels.split(32), labels.split(32)):
            logits = probe(normalize(images, model.preprocess))
            F.cross_entropy(logits, torch.where(target < 0, logits.argmax(1), target)).backward()
            for bn in norms:
                w, b = probe.get_submodule(bn).parameters()
                add(bn + ".weight", (w * w.grad + b * b.grad) ** 2)
            probe.zero_grad(set_to_none=True)
    elif kind == "activation":
        run_float(fuse(model), pixels.split(32), lambda step, y: step.kind == "conv" and add(
            step.name + ".weight", y.clamp(min=0).mean((0, 2, 3))))
    else:
        score = {name: torch.rand(s.shape, generator=generator, dtype=torch.float64) for name, s in score.items()}
    if kind in ("l1", "l2", "activation"):
        score = {name: s / s.mean().clamp(min=1e-30) for name, s in score.items()}
    for name, s in score.items():
        if not s.isfinite().all():
            raise UserError(f"{name}: a weight, activation or gradient of its channels is not finite")
    return score


@torch.no_grad()
def run_float(fused, batches, watch):
    """FusedResNet50, iterable of uint8 pixels (N, 3, H, W): watch(step, result) sees every float result."""
    for pixels in batches:
        fused.run(normalize(pixels, fused.preprocess).contiguous(memory_format=torch.channels_last), watch=watch)


def ends(model):
    """-> {key in the state dict: (space that it reads, space that it makes)}; None for the pixels, the classes, and
    what tensors of one dimension read"""
    found = {key: [None, None] for key in model.state_dict()}
    for name, space in spaces(model).items():
        for key, dim, _ in space.members:
            found[key][1 - dim] = name
    return found


# What a tensor's share in the network costs is a + b * i * o + c * i + d * o, where i and o are the shares of the
# channels it reads and makes that are left. Multiply-accumulates and parameters are of that form exactly, milliseconds
# nearly.

def cost_of(kind, model, size, int8=False, poll=lambda: None):
    """-> {key in the state dict: (a, b, c, d)} for kind "macs", "params" or "latency" (milliseconds for one image,
    measured here, with poll() before each network), of which the last two know layers, and so their weights, alone."""
    if kind == "params":
        return {key: (0, parameter.numel(), 0, 0) for key, parameter in model.named_parameters()}
    table = latency_table(model, size, int8, poll) if kind == "latency" else {
        layer: (0, macs, 0, 0) for layer, macs in count_macs(model, size).items()}
    return {f"{layer}.weight": cost for layer, cost in table.items()}


def latency_table(model, size, int8, poll=lambda: None, probes=10, seed=0):
    """Milliseconds of each layer in its place: `probes` networks with random widths run whole, step by step timed, and
    each layer's times are fitted (least squares, no negative terms). int8: in the int8 network of this machine."""
    generator, known = torch.Generator().manual_seed(seed), ends(model)
    sizes = {name: space.size for name, space in spaces(model).items() if not follows(name)}
    samples, times = [], []
    for probe in range(probes):
        poll()
        share = {name: float(torch.rand((), generator=generator) * 0.85 + 0.15) if probe else 1.0 for name in sizes}
        left = {name: min(n, max(8, round(n * share[name] / 8) * 8)) for name, n in sizes.items()}
        samples.append({name: left[name] / n for name, n in sizes.items()})
        times.append(step_times(prune(model, {name: torch.arange(n) for name, n in left.items()}), size, int8))
    table = {}
    for layer in times[0]:
        if f"{layer}.weight" not in known:
            continue
        i, o = (torch.tensor([s.get(name, 1.0) for s in samples], dtype=torch.float64)
                for name in known[f"{layer}.weight"])
        rows = torch.stack([torch.ones_like(i), i * o, i, o], 1)
        table[layer] = fit(rows, torch.tensor([t[layer] for t in times], dtype=torch.float64))
    return table


def fit(rows, values):
    """Non-negative least squares by trying every subset of the columns. -> list"""
    tried = []
    for chosen in itertools.product((False, True), repeat=rows.shape[1]):
        found, chosen = rows.new_zeros(rows.shape[1]), torch.tensor(chosen)
        found[chosen] = torch.linalg.lstsq(rows[:, chosen], values[:, None]).solution[:, 0]
        if (found >= 0).all():
            tried.append(((rows @ found - values).square().sum().item(), found.tolist()))
    return min(tried)[1]


def stand_in(model):
    """The int8 network of the model's shapes, with ranges out of the air: to measure time"""
    ranges = {step.name: (0.0, 6.0) for step in flatten(model)}
    return quantize(copy.deepcopy(model).cpu(), ranges=ranges).to(next(model.parameters()).device)


@torch.no_grad()
def milliseconds(model, size, int8):
    """Median time of one image of size x size pixels through the network as it will run"""
    net = stand_in(model) if int8 else model
    x = example(net, 1, size)
    return measure(lambda: net(x), x.device, 15)


@torch.no_grad()
def step_times(model, size, int8, repeats=5):
    """-> {layer: least milliseconds of `repeats` runs}; a folded downsampling convolution's are in its sum's."""
    net = stand_in(model) if int8 else fuse(model)
    pixels, times = example(net, 1, size), []  # a run's milliseconds, step by step
    for _ in range(repeats + 1):
        if (plan := net.plan_for(pixels)) is not None:
            profile = csrc.network_profile(pixels, plan, net.config["num_classes"])
            times.append([nanoseconds / 1e6 for nanoseconds in profile.tolist()[-len(net.steps):]])
            continue
        ends = [time.perf_counter()]

        def watch(step, y):
            if y.is_cuda:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
        net.run(pixels, watch=watch)
        times.append([(end - begin) * 1e3 for begin, end in itertools.pairwise(ends)])
    return {step.name: min(column) for step, column in zip(net.steps, zip(*times))}


class Unreachable(UserError):
    """No channels that could go are left, and more were asked for"""

    def __init__(self, message):
        super().__init__(message, code=2)


def uniform(model, importance, ratio, round_to, whole=None, flag="pruning"):
    """The same share of every space goes: the least important channels of each; of `whole`, {space: channels}, where
    some went before. -> keep"""
    keep, found = {}, spaces(model)
    for name, score in importance.items():
        size, step = found[name].size, max(1, round_to // found[name].width)
        left = (whole or {}).get(name, size) * (1 - ratio)
        if left < 0.5:
            raise Unreachable(f"{flag}: leaves nothing of the {size} channels of {name}")
        count = min(size, max(step, round(left / step) * step)) if ratio else size
        keep[name] = score.topk(count).indices.sort().values
    return keep


def greedy(model, importance, cost, ends, budget, round_to, floor=0.1, flag="pruning"):
    """Takes `round_to` channels at a time where the importance lost per cost saved is least, until the sum of `cost`
    is within the budget; `ends` says which spaces its keys read and make. No space keeps less than the share `floor`.
    -> keep"""
    found = spaces(model)
    leaders = {name: leader(name) for name in found if follows(name)}
    touching = {name: [key for key in cost if any(name == leaders.get(end, (end,))[0] for end in ends[key])]
                for name in importance}
    left = {name: found[name].size for name in found}
    order = {name: score.sort(descending=True) for name, score in importance.items()}
    total_of = {name: torch.cat([s.values.new_zeros(1), s.values.cumsum(0)]) for name, s in order.items()}

    def share(name):
        if name in leaders:
            first, width = leaders[name]
            return width(left[first] * found[first].width) / found[name].size
        return left[name] / found[name].size if name else 1.0

    def price(key):
        i, o = map(share, ends[key])
        a, b, c, d = cost[key]
        return a + b * i * o + c * i + d * o

    def attempt(name):
        """-> (importance lost per cost saved, cost saved, name, channels left)"""
        step = max(1, round_to // found[name].width)
        count = left[name] - (left[name] % step or step)
        if count < max(step, found[name].size * floor):
            return math.inf, 0.0, name, left[name]
        before, now = sum(map(price, touching[name])), left[name]
        lost = (total_of[name][now] - total_of[name][count]).item()
        left[name] = count
        saved = before - sum(map(price, touching[name]))
        left[name] = now
        return lost / saved if saved > 0 else math.inf, saved, name, count

    total = whole = sum(map(price, cost))
    while total > budget:
        loss, saved, name, count = min(map(attempt, importance), key=lambda offer: offer[0])
        if loss == math.inf:
            raise Unreachable(f"{flag}: cannot be reached: with {100 * floor:.3g} % of every layer, in multiples of "
                              f"--round-to {round_to}, {100 * total / whole:.3g} % of the network is left, "
                              f"{100 * budget / whole:.3g} % was asked for")
        total -= saved
        left[name] = count
    return {name: order[name].indices[:left[name]].sort().values for name in importance}


# ------------------------------------------------------------------------------------------------ distillation

def taught(loss_fn, teacher, student, kind, temperature, alpha, beta):
    """-> (loss_fn with which the student also follows a teacher on the same augmented images, hooks on both networks
    that the caller removes after training):

      (1 - alpha) * loss + alpha * soft_loss + beta * features

    Features: attention transfer (arXiv 1612.03928), the mean squared difference of normalised maps of channel energy,
    wherever both networks have a map of the same size, below half the images'; widths and depths may differ."""
    mine, theirs = {}, {}
    hooks = [hook for model, maps in ((student, mine), (teacher, theirs)) if beta for hook in keep_maps(model, maps)]

    def loss(logits, target, images):
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            other = teacher(renormalize(images, student.preprocess, teacher.preprocess)).float()
        common = [size for size in theirs if size in mine and 1 < size[0] < images.shape[2] // 2]
        if beta and not common:
            raise UserError("--kd-features: teacher and student have no feature maps of the same size", code=2)
        features = sum((energy(mine[size]) - energy(theirs[size])).square().mean() for size in common)
        mine.clear()
        theirs.clear()
        soft = soft_loss(kind, temperature, logits, other, target)
        return (1 - alpha) * loss_fn(logits, target) + alpha * soft + beta * features
    return loss, hooks


def keep_maps(model, maps):
    """-> hooks that put into maps, {(H, W): (N, C, H, W)}, the last result of each size of modules two levels deep"""
    def hook(module, _, y):
        if isinstance(y, torch.Tensor) and y.ndim == 4:
            maps[y.shape[2:]] = y
    return [module.register_forward_hook(hook) for name, module in model.named_modules()
            if name and name.count(".") < 2]


def renormalize(images, mine, theirs):
    """Images normalised by the student's preprocessing -> as the teacher was trained to see them"""
    if all(list(mine[k]) == list(theirs[k]) for k in ("mean", "std")):
        return images
    mean, std, to_mean, to_std = (torch.tensor(preprocess[k], device=images.device).view(3, 1, 1)
                                  for preprocess in (mine, theirs) for k in ("mean", "std"))
    return (images * std + mean - to_mean) / to_std


def soft_loss(kind, t, logits, other, target):
    """Between the student's logits and the teacher's, softened by the temperature t:

    kl    T^2 * KL(teacher || student) (Hinton et al., arXiv 1503.02531)
    dkd   the same split into the target's share and the others', the latter eight times as heavy (arXiv 2203.08679)
    dist  1 - Pearson correlation, between classes and between images (arXiv 2205.10536)"""
    if kind == "kl":
        return F.kl_div((logits / t).log_softmax(1), (other / t).log_softmax(1), log_target=True,
                        reduction="batchmean") * t * t
    p, q = (logits / t).softmax(1), (other / t).softmax(1)
    if kind == "dist":
        return (2 - correlation(p, q) - correlation(p.T, q.T)) * t * t
    truth = F.one_hot(target if target.ndim == 1 else target.argmax(1), logits.shape[1]).bool()
    hit = [torch.stack([x[truth], 1 - x[truth]], 1).clamp(min=1e-8) for x in (p, q)]
    rest = [(x / t).masked_fill(truth, -1e4).log_softmax(1) for x in (logits, other)]
    target_part = F.kl_div(hit[0].log(), hit[1], reduction="batchmean")
    return (target_part + 8 * F.kl_div(rest[0], rest[1], log_target=True, reduction="batchmean")) * t * t


def correlation(p, q):
    """Mean over rows of Pearson's correlation."""
    return F.cosine_similarity(p - p.mean(1, keepdim=True), q - q.mean(1, keepdim=True), dim=1).mean()


def energy(x):
    """(N, C, H, W) -> (N, H * W): mean square over channels, scaled to norm 1"""
    return F.normalize(x.float().square().mean(1).flatten(1))


def load_teacher(name, model, classes, device, stride_on=None):
    """A checkpoint (`stride_on` is for one that does not say it), a torchvision model by name with its pretrained
    weights, or "self", a copy of `model` -> eval() network"""
    if name == "self":
        return copy.deepcopy(model).to(device)
    checkpoint = load_checkpoint(name) if os.path.exists(name) else fetch_weights("DEFAULT", name)
    foreign = not checkpoint["config"]
    teacher, names = build_model(checkpoint, name, stride_on=stride_on if foreign else None), checkpoint["classes"]
    if teacher.precision != "float":
        raise UserError(f"--distill {name}: is not a float network but {teacher.precision}")
    count, mine = teacher.config["num_classes"], model.config["num_classes"]
    if count != mine:
        raise UserError(f"--distill {name}: has other classes ({count}) than the student ({mine})")
    for theirs, ours in zip(names or (), classes or ()):
        if theirs != ours:
            raise UserError(f"--distill {name}: has other classes than the student, {theirs!r} in place of {ours!r}")
    check_finite(teacher, f"--distill {name}")
    return teacher.to(device, memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------- post-training quantization

BINS = 4096  # of a histogram on each side of zero: 8 to 16 for each of the 256 levels


class Statistics:
    """What calibration sees of one step's results (N, C, ...): a histogram over 2 BINS bins of (-reach, reach), and per
    channel the maximum and the mean. The histogram extends itself by doubling: bins merge two by two, and zero stays an
    edge."""

    def __init__(self):
        self.counts, self.reach = torch.zeros(2 * BINS, dtype=torch.float64), 0.0
        self.low = self.high = self.max = self.mean = 0.0
        self.seen = 0

    def add(self, name, y):
        low, high = (v.item() for v in y.aminmax())
        if not math.isfinite(high - low):
            raise UserError(f"{name}: results in calibration are not finite")
        most = max(-low, high)
        self.reach = self.reach or most
        while self.reach < most:
            self.counts = torch.cat([torch.zeros(BINS // 2), self.counts.view(-1, 2).sum(1), torch.zeros(BINS // 2)])
            self.reach *= 2
        if most:
            self.counts += torch.histc(y, 2 * BINS, -self.reach, self.reach).double()
        else:
            self.counts[BINS] += y.numel()
        self.low, self.high = min(self.low, low), max(self.high, high)
        wide = y.flatten(2) if y.dim() > 2 else y[:, :, None]
        self.max = torch.maximum(wide.amax((0, 2)).double(), torch.as_tensor(self.max))
        self.seen += len(y)
        self.mean = self.mean + (wide.mean(2, dtype=torch.float64) - self.mean).sum(0) / self.seen


def gather(model, batches):
    """float ResNet50, iterable of uint8 pixels (N, 3, H, W) -> {step name: Statistics} for every step's result."""
    found = {}
    run_float(fuse(model), batches, lambda step, y: found.setdefault(step.name, Statistics()).add(step.name, y))
    if not found:
        raise UserError("quantization needs images to observe, and there are none")
    return found


def percentile(found, share=0.9999):
    """As much as 1 - share of the values lies beyond either end."""
    below = found.counts.cumsum(0) / found.counts.sum()
    first, last = ((below >= q).nonzero()[0].item() - BINS for q in (1 - share, share))
    width = found.reach / BINS
    return min(max(first * width, found.low), 0.0), max(min((last + 1) * width, found.high), 0.0)


def search(found, cost):
    """The fraction of the whole range whose cost is least, as (low, high)"""
    occupied = slice(0 if found.low < 0 else BINS, None)
    counts = found.counts[occupied]
    centres = ((torch.arange(2 * BINS, dtype=torch.float64) + 0.5 - BINS) * (found.reach / BINS))[occupied]

    def price(fraction):
        low, scale = fraction * found.low, fraction * (found.high - found.low) / 255
        zero = round(-low / scale)
        return cost(counts, centres, ((centres / scale).round_() + zero).clamp_(0, 255), zero, scale)
    best = min(torch.linspace(1, 0.3, 71, dtype=torch.float64).tolist(), key=price)
    return best * found.low, best * found.high


def error_to(power, counts, centres, ints, zero, scale):
    """The error of quantization to this power, summed over the values that a histogram counts. 2.4 is what the code of
    BRECQ takes (Li et al. 2021, arXiv 2102.05426): it spares the few values that are far off, which are one image's."""
    return torch.dot(counts, ((ints - zero) * scale - centres).abs_().pow_(power)).item()


def clipped_divergence(counts, centres, ints, zero, scale):
    """TensorRT's measure (Migacz 2017, "8-bit Inference with TensorRT"): the Kullback-Leibler divergence of the clipped
    histogram from the one that 256 levels keep of it. Zeros, which every range keeps, do not count."""
    counts = torch.where((ints == zero) & (centres.abs() == centres.abs().min()), 0, counts)
    inside = (centres > (-zero - 0.5) * scale) & (centres < (255.5 - zero) * scale)
    kept, ints = counts * inside, ints.long()
    total, filled = (torch.zeros(256, dtype=torch.float64).index_add_(0, ints, v) for v in (kept, (kept > 0).double()))
    p, q = kept.clone(), torch.where(kept > 0, (total / filled.clamp_(min=1))[ints], 0)
    first, last = inside.nonzero()[[0, -1], 0].tolist()
    p[first] += counts[:first].sum()
    p[last] += counts[last + 1:].sum()
    p, q = p / p.sum().clamp(min=1), q / q.sum().clamp(min=1)
    return torch.where(p > 0, p * (p / q.clamp(min=1e-12)).log(), 0).sum().item()


OBSERVERS = {"minmax": lambda found: (found.low, found.high), "percentile": percentile,
             **{name: functools.partial(search, cost=cost) for name, cost in (
                 ("mse", functools.partial(error_to, 2)), ("lp", functools.partial(error_to, 2.4)),
                 ("entropy", clipped_divergence))}}


def ranges_of(found, observer):
    """{step name: Statistics} -> {step name: (low, high)}, with zero in every range"""
    return {name: OBSERVERS[observer](s) if s.reach else (0.0, 0.0) for name, s in found.items()}


def by_group(weight, conv):
    """A convolution's (O, C / groups, kh, kw) -> a view (groups, O / groups, C / groups, kh, kw)"""
    return weight.unflatten(0, (conv.groups, -1))


@torch.no_grad()
def equalise(model, batches):
    """Cross-layer equalisation (Nagel et al. 2019, arXiv 1906.04721; with ranges of activations as SmoothQuant, arXiv
    2211.10438) -> a copy of the float network that computes the same. ReLU lets channel c be divided by a factor before
    it and the next convolutions' weights be multiplied by it: sqrt(largest activation / largest weight), so that both
    have the same spread. So it is done wherever a ReLU's results go, through pooling or not, into convolutions alone;
    not on the stream of the blocks, where a step has a residual or, at a stage's begin, no ReLU, nor for what split
    attention reads."""
    result, found, steps, origin = copy.deepcopy(model), gather(model, batches), flatten(model), {"pixels": None}
    for step in steps:
        origin[step.name] = origin[step.x] if step.kind in ("maxpool", "pool") else step.name
    for step in steps:
        readers = [r for r in steps if origin[r.name] == r.name and origin[r.x] == step.name]
        if not step.bn or not step.relu or step.residual or any(r.kind != "conv" for r in readers):
            continue
        convs, reach = [result.get_submodule(r.name) for r in readers], found[step.name].max
        peak = torch.stack([by_group(fold_norm(model, r)[0], conv).abs().amax((1, 3, 4)).flatten()
                            for r, conv in zip(readers, convs)]).amax(0)
        factor = (reach.clamp(min=0.03 * reach.max()) / peak.clamp(min=0.01 * peak.median())).sqrt()
        factor = factor / factor.max()
        if not factor.isfinite().all():  # all channels or weights are zero
            continue
        result.get_submodule(step.bn).weight.div_(factor)
        result.get_submodule(step.bn).bias.div_(factor)
        for conv in convs:
            by_group(conv.weight, conv).mul_(factor.view(conv.groups, 1, -1, 1, 1))
    return result


def nearest_plane(weight, hessian, limit):
    """float64 (O, K), (K, K) -> whole numbers (O, K) within +-limit, near the weights in the sense of error @ hessian @
    error: columns are rounded from the last to the first, each after what its successors' errors add to it
    (Babai's nearest plane; GPTQ, arXiv 2210.17323, is the same: arXiv 2507.18553). The largest diagonal entries come
    first, while most columns are left to make up for them. What is zero stays zero: sparsity survives."""
    order = hessian.diagonal().argsort()
    factor = torch.linalg.cholesky(hessian[order][:, order], upper=True)
    factor = factor / factor.diagonal()[:, None]
    weight, block = weight[:, order], 64
    error = torch.zeros_like(weight)
    for end in range(weight.shape[1], 0, -block):
        begin = max(0, end - block)
        wanted = weight[:, begin:end] + error[:, end:] @ factor[begin:end, end:].T
        for i in reversed(range(begin, end)):
            rounded = (wanted[:, i - begin] + error[:, i + 1:end] @ factor[i, i + 1:end]).round()
            error[:, i] = weight[:, i] - rounded.clamp(-limit, limit) * (weight[:, i] != 0)
    return (weight - error).round()[:, order.argsort()]


def covariance(inputs, groups, rows=4096, damp=0.1):
    """inputs: [(uint8 (N, C, H, W), kernel, stride, padding, value of the padding)], of convolutions that add up ->
    float64 (groups, K, K) of what they multiply their weights with, over a random choice of at least `rows` and 3 K
    outputs, if there are so many; the diagonal is larger by `damp` times its mean: for images that were not seen"""
    total, mean, count, generator = 0.0, 0.0, 0, torch.Generator().manual_seed(0)
    images = len(inputs[0][0])
    rows = max(rows, 3 * sum(x.shape[1] * math.prod(kernel) for x, kernel, *_ in inputs) // groups)
    for part in torch.arange(images).split(16):
        seen = torch.cat([F.unfold(F.pad(x[part].float(), [padding] * 4, value=value), kernel, stride=stride)
                          for x, kernel, stride, padding, value in inputs], 1)
        chosen = torch.randperm(seen.shape[2], generator=generator)[:-(-rows // images)]
        seen = seen[:, :, chosen].unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(2)  # (groups, K, outputs)
        total, mean, count = total + (seen @ seen.mT).double(), mean + seen.double().sum(2), count + seen.shape[2]
    mean = mean / count
    result = total / count - mean[:, :, None] * mean[:, None]
    diagonal = result.diagonal(dim1=1, dim2=2)
    diagonal += damp * diagonal.mean(1, keepdim=True) + 1e-9
    return result


class Correction(Flat):
    """What post-training quantization mends with data: run(pixels) goes through the int8 network in order and, in
    place, for each layer on inputs that are mended already,

    rounds weights anew, each convolution's by nearest_plane and the covariance of its inputs, where `limit` is given,
      the largest whole number that a weight may be
    corrects biases (Nagel et al. 2019, arXiv 1906.04721, section 4.2): by how far the float network's mean of a
      channel's results, `means` {step name: float64 (C)} of the same pixels, lies above the int8's

    A bias stays within HEADROOM, so what conv_grid proves of accumulators holds."""

    def __init__(self, net, model, means, limit=None):
        self.net, self.steps, self.model, self.means, self.limit = net, net.steps, model, means, limit
        net.forget()  # it holds the integers of before

    def call(self, step, x, **more):
        module = self.net.get_submodule(step.name)
        if not isinstance(module, (Int8Conv, Int8Linear)):
            return self.net.call(step, x, **more)
        if step.kind == "conv":
            unit = module.mult.double() * module.scale / 2 ** MULT_BITS
            if self.limit:
                self.round(step, module, unit, x, more.get("x2"))
            y = self.net.call(step, x, **more)
            mean = (y.sum((0, 2, 3)).double() / (y.numel() / y.shape[1]) - module.zero) * module.scale
        else:
            unit, mean = module.scale.double(), self.net.call(step, x).double().mean(0)
        old = module.bias.double()
        new = old + ((self.means[step.name] - mean) / unit).round()
        module.bias.copy_(torch.minimum(torch.maximum(new, old.clamp(max=-HEADROOM)), old.clamp(min=HEADROOM)))
        return self.net.call(step, x, **more)

    def round(self, step, module, unit, x, x2):
        parts = [(step, x, module.weight, module.stride, module.padding)]
        if step.folded:
            parts.append((step.folded, x2, module.weight2, module.stride2, 0))
        scales = [1.0 if part.x == "pixels" else self.net.get_submodule(self.net.grids[part.x]).scale.item()
                  for part, *_ in parts]
        exact = torch.cat([fold_norm(self.model, part)[0].flatten(1) * (scale / unit[:, None])
                           for (part, *_), scale in zip(parts, scales)], 1)
        pad = 0 if module.pad_value is None else module.pad_value.double().mean().item()
        inputs = [(self.net.converted(part.x, z, False), weight.shape[2:], stride, padding, pad)
                  for part, z, weight, stride, padding in parts]
        ints = [nearest_plane(w, h, self.limit) for w, h in
                zip(exact.chunk(module.groups), covariance(inputs, module.groups))]
        for stored, new in zip((p[2] for p in parts), torch.cat(ints).split([p[2][0].numel() for p in parts], 1)):
            stored.copy_(new.view(stored.shape))


@torch.no_grad()
def post_training(model, batches, observer="lp", correction="weights", found=None, watch=None, **more):
    """Post-training quantization of a float ResNet50 on the CPU, from `batches` of uint8 pixels (N, 3, H, W) ->
    Int8ResNet50: ranges by `observer`, then Correction, for which all pixels run at once: of "weights" and biases, of
    "biases" alone, or "none". `found` is gather(model, batches), if it is known; watch(step, result) sees what
    corrected layers make; `more` is quantize()'s: float_layers, bits, per_tensor. `model` had better be equalise(model,
    batches)."""
    batches = list(batches)
    found = found or gather(model, batches)
    net = quantize(model, ranges=ranges_of(found, observer), **more)
    if correction != "none":
        limit = 2 ** (more.get("bits", 8) - 1) - 1 if correction == "weights" else None
        Correction(net, model, {name: s.mean for name, s in found.items()}, limit).run(
            torch.cat(batches).contiguous(memory_format=torch.channels_last), watch=watch)
    return net


@torch.no_grad()
def signal_to_noise(model, net, batches):
    """float ResNet50, its Int8ResNet50, iterable of uint8 pixels -> {step name: dB}: the power of a float result over
    that of what its int8 counterpart, scaled back, differs by. `model` is what quantize() was given."""
    fused, power, noise = fuse(model), {}, {}
    for pixels in batches:
        ints = {}
        net.run(pixels.contiguous(memory_format=torch.channels_last), watch=lambda s, y: ints.update({s.name: y}))

        def watch(step, y):
            if step.name in ints:  # a downsampling convolution is no step of its own there
                error = net.converted(step.name, ints.pop(step.name), floating=True) - y
                power[step.name] = power.get(step.name, 0.0) + y.square().sum(dtype=torch.float64).item()
                noise[step.name] = noise.get(step.name, 0.0) + error.square().sum(dtype=torch.float64).item()
        run_float(fused, [pixels], watch)
    return {name: 10 * math.log10(max(power[name], 1e-30) / max(noise[name], 1e-30)) for name in power}


# ------------------------------------------------------------------------------- quantization-aware training

def straight(x, rounded):
    """The value of `rounded` with the gradient of x (the straight-through estimator, arXiv 1308.3432)"""
    return x + (rounded.to(x.dtype) - x).detach()


class FakeQuantResNet50(Flat, ResNet50):
    """ResNet50 that computes in float what its int8 program will: weights rounded to conv_grid's integers after the
    batch-norm is folded into them, activations to uint8. Gradients pass straight through the rounding.

    Each activation's scale is learned as its logarithm (LSQ, arXiv 1902.08153), or stays as observed. Batch-norm uses
    the batch's statistics for the first `freeze_after` steps, on outputs scaled back to before folding
    (arXiv 1806.08342, section 3.2), and the running ones from then on."""

    def __init__(self, model, ranges, learned=True, freeze_after=0, **grid):
        super().__init__(**model.config)
        self.load_state_dict(model.state_dict())
        self.preprocess, self.steps, self.grid = dict(model.preprocess), fold_downsample(flatten(model)), grid
        self.freeze_after, self.live = freeze_after, False
        scales, zeros = [], []
        for step in self.steps:
            low, high = ranges[step.name]
            low, high = min(low, 0.0) * (not step.relu), max(high, 0.0)
            scale = (high - low) / 255 or 1.0
            scales.append(math.log(scale))
            zeros.append(round(-low / scale))
        self.log_scale = nn.Parameter(torch.tensor(scales), requires_grad=learned)
        self.register_buffer("zero", torch.tensor(zeros, dtype=torch.float32))
        self.register_buffer("begun", self.bn1.num_batches_tracked.clone())
        self.at = {step.name: i for i, step in enumerate(self.steps)}

    def forward(self, x):  # (N, 3, H, W), normalised -> (N, num_classes)
        self.scale_of, self.zero_of = {"pixels": 1.0}, {"pixels": 0.0}
        self.live = self.training and int(self.bn1.num_batches_tracked - self.begun) < self.freeze_after
        self.range_of = self.ranges()
        return self.run(x)

    def call(self, step, x, residual=None, x2=None):
        scale = self.scale_of[step.x]
        module = self.get_submodule(step.name) if step.kind != "avgpool" else None
        if step.kind == "linear":
            weight, bias = module.weight.detach().double() * scale, module.bias.detach().double()
            unit = linear_unit(weight, bias, **self.grid)[:, None]
            rounded = ((weight / unit).round().clamp(-127, 127) * unit / scale).to(x.dtype)
            unit = unit[:, 0].double()
            return F.linear(F.dropout(x, self.config["dropout"], self.training), straight(module.weight, rounded),
                            straight(module.bias, (bias / unit).round() * unit))
        zero, (low, high) = 0.0, self.range_of[step.name]
        if step.kind == "maxpool":
            y, zero = module(x), self.zero_of[step.x]
        elif step.kind == "pool":
            y = fake_quantize(module(x), scale, zero)
        else:
            learned, share = self.log_scale[self.at[step.name]].exp(), (x[0].numel() * 255) ** -0.5
            learned = learned * share + (learned * (1 - share)).detach()  # LSQ divides gradients by sqrt(values * 255)
            if step.kind == "conv":
                y, scale, zero = self.conv(step, x, residual, x2, low, high)
            elif step.kind == "avgpool":
                y, scale = x.mean((2, 3)), max(high / 255, scale / 256)
            else:
                for norm in module.children():  # split attention has one of its own
                    norm.train(self.live)
                y = module.mix(x) if residual is None else F.relu(module(x) + residual)
                scale = max(high / 255, (scale + self.scale_of[step.residual or step.x]) / 15)
            y = fake_quantize(y, learned * (scale / learned.detach().double()).to(learned.dtype), zero)
        self.scale_of[step.name], self.zero_of[step.name] = scale, zero
        return y

    def conv(self, step, x, residual, x2, low, high):
        """-> (float result before rounding, scale, zero)"""
        parts, folded, shift = [(step, x)] + ([(step.folded, x2)] if step.folded else []), [], 0.0
        for part, _ in parts:
            bn, weight = self.get_submodule(part.bn), self.get_submodule(part.name).weight
            factor = bn.weight * (bn.running_var + bn.eps).rsqrt()
            shift = shift + bn.bias - bn.running_mean * factor
            folded.append((weight * factor.view(-1, 1, 1, 1), factor, bn))
        std = 1.0
        if step.x == "pixels":
            std = 255 * torch.tensor(self.preprocess["std"], device=x.device).view(1, -1, 1, 1)
        exact = [((w / std).detach().double(), self.scale_of[part.x]) for (w, _, _), (part, _) in zip(folded, parts)]
        grid = conv_grid(step.name, exact, shift.detach().double(), self.scale_of.get(step.residual), low, high,
                         **self.grid)
        y, offset, live = 0.0, 0.0, self.live
        for (weight, factor, bn), (part, z), (w, scale) in zip(folded, parts, exact):
            ints = grid.weights(w, scale)
            if step.x == "pixels":
                centre = 255 * torch.tensor(self.preprocess["mean"], device=x.device, dtype=torch.float64)
                offset = (ints * centre.view(1, -1, 1, 1)).flatten(1).sum(1)
            rounded = (ints * (grid.unit / scale).view(-1, 1, 1, 1)).to(z.dtype) * std
            z = self.get_submodule(part.name)._conv_forward(z, straight(weight, rounded), None)
            y = y + (bn(z / torch.where(factor.abs() < 1e-6, 1e-6, factor).view(1, -1, 1, 1)) if live else z)
        if not live:
            bias = (grid.bias(shift.detach().double(), offset) + offset) * grid.unit - grid.zero * grid.scale
            y = y + straight(shift, bias).view(1, -1, 1, 1)
        y = y if residual is None else y + residual
        return F.relu(y) if step.relu else y, grid.scale, float(grid.zero)

    def ranges(self):
        """-> {step name: (low, high)} as observe() gives, of the scales as they are now"""
        pairs = zip(self.log_scale.detach().double().exp().tolist(), self.zero.tolist())  # a GPU is waited for once
        return {step.name: (-zero * scale, (255 - zero) * scale) for step, (scale, zero) in zip(self.steps, pairs)}


def fake_quantize(x, scale, zero):
    """Float -> the nearest of scale * (0 ... 255 - zero). Differentiable in x and scale."""
    steps = (x / scale + zero).clamp(0, 255)
    return (straight(steps, steps.round()) - zero) * scale


# -------------------------------------------------------------------------------------------------------- data

class Sets(NamedTuple):
    """What is measured on, and what calibrates."""
    root: str
    calibration: data.Files
    evaluation: data.Files
    labelled: bool  # whether the evaluation's labels are this network's classes
    classes: list  # names of the outputs, as far as anybody knows them
    notes: list
    exif: bool  # whether photographs are turned as their tags say: as in the network's training

    def images(self, files, model):
        """-> what the network sees of them in evaluation"""
        return data.Images(files, lambda _: data.eval_transform(model.preprocess), exif=self.exif)


def open_sets(args, checkpoint, model, world, trains):
    """Images from --data, else from where the checkpoint was trained, else the demo set. Calibration images are spread
    evenly over the training images; in a folder without train/ and val/ that it did not learn from they are then not
    evaluated. Where the folders are not this network's classes, the images serve without labels."""
    recorded = checkpoint["args"].get("data")
    root = args.data or (recorded if recorded and data.is_folder(recorded) else None)
    origin = "--data" if args.data else "the checkpoint's record" if root else "the demo set"
    root, classes, wnids = train.data_root(root, world), checkpoint["classes"], checkpoint["wnids"]
    if not data.is_folder(root):
        raise UserError(f"{root}: no such folder")
    train.split_again(args, checkpoint, root)
    part = next(p for p in ("train", *data.VAL_NAMES, "") if data.is_folder(os.path.join(root, p)))
    folders = data.list_classes(os.path.join(root, part))[0]
    index = data.class_index(classes or folders, data.ids_of(classes or folders, wnids, folders))
    labelled = bool(folders) and all(index.get(name) is not None for name in folders) \
        and len(classes or folders) == model.config["num_classes"]
    if trains and not labelled:
        raise UserError(f"{root}: its folders are not this network's classes; --classes FILE must say which is which")
    if not labelled:
        first = last = data.scan_unlabelled(root)
        notes = [f"{root}: has no folders of this network's classes: agreement with it stands for accuracy"]
    else:
        first, last, _, _, notes = data.open_folder(root, classes, wnids, args.val_split, not (trains or part))
        first = last if first is None else first
    count = min(args.calib_images, len(first) // 2 if first is last else len(first))
    chosen = np.arange(count) * len(first) // max(count, 1)  # evenly through the folders: every class in its share
    if not count:
        raise UserError(f"{root}: {len(first)} images are too few to calibrate and to evaluate")
    evaluation = last.select(np.setdiff1d(np.arange(len(last)), chosen)) if first is last else last
    notes.append(f"{origin}, {root}: {count} images calibrate, {len(evaluation)} others evaluate")
    names = classes or (folders if labelled else [str(i) for i in range(model.config["num_classes"])])
    return Sets(root, first.select(chosen), evaluation, labelled, names, notes, bool(checkpoint["args"].get("exif")))


def read_pixels(sets, model, args):
    """-> (uint8 pixels (N, 3, H, W) NHWC, labels (N)) of the calibration images"""
    batches = data.eval_batches(len(sets.calibration), 32)
    pixels, labels, complaints = zip(*data.make_loader(sets.images(sets.calibration, model), batches, args.workers))
    train.check_corrupt(sum(complaints, []), args.on_corrupt)
    if not any(map(len, labels)):
        raise UserError(f"{sets.calibration.root}: no image could be decoded")
    pixels = torch.cat([p for p in pixels if len(p)])
    return pixels.contiguous(memory_format=torch.channels_last), torch.cat(labels)


# ------------------------------------------------------------------------------------------------------ report

class Report:
    """Every stage's network on the same images; the first is the network as it came."""

    def __init__(self, args, sets, world, stop, checkpoint):
        self.args, self.sets, self.world, self.stop, self.checkpoint = args, sets, world, stop, checkpoint
        self.rows, self.models, self.original = [], [], None
        self.tables, self.extra = {}, {}  # what stages found, which their checkpoints keep; networks beside the rows

    def poll(self, *_):
        """Ends the run where a signal has asked for it: to be called as often in every process"""
        if self.stop.poll():
            raise UserError(f"stopped by {self.stop.requested or 'a signal'}; the stages that are done are in "
                            f"{self.args.out}, and the same command with --resume goes on", code=75)

    def score(self, model):
        """-> dict(top1, top5, agreement with the first network scored; percent; images), of a cascade also the percent
        of images that were `deferred` to its big network"""
        outputs, on = [], []
        hook = model.register_forward_hook(lambda net, *_: on.append(getattr(net, "deferred", 0)))
        score = train.evaluate(model.to(self.world.device), self.sets.images(self.sets.evaluation, model),
                               self.args.eval_batch_size, self.world, workers=self.args.workers,
                               on_corrupt=self.args.on_corrupt, outputs=outputs, poll=self.stop.poll)
        hook.remove()
        if score is None:
            self.poll()
        predictions = torch.cat(outputs).argmax(1).tolist() if outputs else []
        self.original = predictions if self.original is None else self.original
        same, on, total = self.world.sum(sum(a == b for a, b in zip(predictions, self.original)), sum(on),
                                         len(predictions))
        return dict(**{k: score[k] if self.sets.labelled else None for k in ("top1", "top5")},
                    agreement=round(100 * same / total, 4), images=score["images"],
                    **{"deferred": round(100 * on / total, 4)} if isinstance(model, Cascade) else {})

    def accuracy(self, row):
        return row["top1"] if self.sets.labelled else row["agreement"]

    def drop(self, row):
        """Points of top-1 below the first network's, or without labels of agreement with it"""
        return self.accuracy(self.rows[0]) - self.accuracy(row)

    def add(self, stage, model, path):
        """The row of a network and its file, all but the times"""
        score, size = self.score(model), model.preprocess["crop"]
        macs = sum(count_macs(model, size).values())
        if isinstance(model, Cascade):  # of the mean image
            macs -= round((1 - score["deferred"] / 100) * sum(count_macs(model.big, size).values()))
        row = dict(stage=stage, **score, params=sum(p.numel() for _, p in weights(model)), macs=macs,
                   bytes=os.path.getsize(path) if path else None, checkpoint=path)
        self.rows.append(row)
        self.models.append(model)
        accuracy = f"top-1 {row['top1']:.2f}, " if self.sets.labelled else ""
        say(f"{stage}: {accuracy}agreement {row['agreement']:.2f} % on {row['images']} images"
            + (f", of which {row['deferred']:.2f} % went on to the big network" if "deferred" in row else ""))

    def save(self, path, model, encode=None):
        """The checkpoint of a network with the first one's classes and training, for all processes to read"""
        if self.world.rank == 0:
            save_checkpoint(path, model, classes=self.checkpoint["classes"], wnids=self.checkpoint["wnids"],
                            metrics=self.tables, args=self.checkpoint["args"], encode=encode)
        self.world.barrier()

    @torch.no_grad()
    def time(self):
        """Milliseconds at batch 1 and images per second at batch 32 into the rows: networks in alternation, medians;
        by the first process, while the others wait. A cascade's are the sum of its networks', the big one's for the
        share of the evaluation's images that it saw: which of some noise it would see says nothing. A pruned int8
        network is compared with an int8 network of the first one's widths too, into extra["unpruned_int8"]."""
        rows, models = list(self.rows), list(self.models)
        if models[-1].precision == "int8" and models[-1].config["widths"] != models[0].config["widths"]:
            rows.append(self.extra.setdefault("unpruned_int8", {}))
            models.append(stand_in(models[0]))
        alone = [m for m in models if not isinstance(m, Cascade)]
        for key, batch, rounds, repeats in (("latency_ms_bs1", 1, 6, 3), ("images_per_second_bs32", 32, 4, 1)):
            values = None
            if self.world.rank == 0:
                inputs = [example(m, batch, m.preprocess["crop"]) for m in alone]
                times = [[measure(lambda: m(x), self.world.device, repeats, 0) for m, x in zip(alone, inputs)]
                         for _ in range(rounds)][1:]  # the first round warms up
                took = {m: statistics.median(column) for m, column in zip(alone, zip(*times))}
                values = [took[m] if m in took else took[m.small] + took[m.big] * row["deferred"] / 100
                          for m, row in zip(models, rows)]
            for row, ms in zip(rows, self.world.gather(values)[0]):
                row[key] = round(ms, 3) if batch == 1 else round(batch / ms * 1e3, 2)

    def table(self):
        head = ("stage", "top-1", "top-5", "same", "M param", "GMAC", "MB", "ms, 1", "img/s, 32")
        lines = [("{:12}" + "{:>10}" * 8).format(*head)]
        for r in self.rows:
            values = (r["top1"], r["top5"], r["agreement"], r["params"] / 1e6, r["macs"] / 1e9,
                      r["bytes"] and r["bytes"] / 1e6, r["latency_ms_bs1"], r["images_per_second_bs32"])
            lines.append(f"{r['stage']:12}" + "".join(f"{'-' if v is None else f'{v:.2f}':>10}" for v in values))
        first, last = self.rows[0], self.rows[-1]
        ratios = [f"{first[k] / last[k]:.1f}x {name}" for k, name in
                  (("params", "fewer parameters"), ("macs", "fewer MACs"), ("bytes", "smaller"),
                   ("latency_ms_bs1", "faster at batch 1")) if first[k] and last[k]]
        ratios.append(f"{last['images_per_second_bs32'] / first['images_per_second_bs32']:.1f}x faster at batch 32")
        return "\n".join(lines + [f"{first['stage']} -> {last['stage']}: " + ", ".join(ratios)])


# ------------------------------------------------------------------------------------------------------ stages

KEPT = ("opt", "momentum", "weight_decay", "loss", "label_smoothing", "focal_gamma", "class_weights", "clip_grad_norm",
        "crop_scale", "hflip", "color_jitter", "rotation", "elastic", "auto_augment", "ra_magnitude", "ra_std",
        "random_erase", "mixup_alpha", "cutmix_alpha", "image_size", "batch_size", "exif", "lr_base_size",
        "model_ema_decay", "model_ema_steps")  # what training after pruning takes over from the training before,
SHARED = ("device", "seed", "workers", "on_corrupt", "val_split", "overwrite", "amp_dtype", "save_every")  # from here
CHOSEN = ("batch_size", "weight_decay", "image_size", "opt")  # and from here where they are given


def share_of(student):
    """--student's share of ResNet-50's channels; None where it is a network of torchvision"""
    with contextlib.suppress(ValueError):
        return float(student)


class Pipeline(train.Plan):
    """The network between stages, and what stages share. A stage is a method that replaces `network`; what trains in
    it is this network, which knows its classes and may have a teacher."""

    def __init__(self, args, report, network, teacher=None):
        self.args, self.report, self.teacher, self.network = args, report, teacher, network.to(report.world.device)
        self.world, self.sets, self.checkpoint = report.world, report.sets, report.checkpoint
        # also what came sparse stays so
        self.sparse = args.sparsity or args.sparsity_2_4 or "sparse" in self.checkpoint.get("encode", {}).values()
        self.pixels, self.encode, self.hooks, self.at, self.whole = None, {}, [], 0, None

    def open(self, args, world):
        return train.open_data(args, world, self.checkpoint["classes"], self.checkpoint["wnids"])

    def model(self, args, classes):
        return self.network

    def teach(self, loss_fn):
        if self.teacher is None:
            return loss_fn
        args = self.args
        loss, hooks = taught(loss_fn, self.teacher, self.network, args.kd_loss, args.kd_temperature, args.kd_alpha,
                             args.kd_features)
        self.hooks += hooks
        return loss

    def run(self, stages):
        """Each stage, its checkpoint and its row. What goes on is what the checkpoint holds; with --resume a finished
        stage has one."""
        for self.at, stage in enumerate(stages, 1):
            self.rounds_left = stages[self.at - 1:].count("prune")
            if stage == "prune" and self.whole is None:  # as it comes to the first round, which may be done already
                self.whole = {name: space.size for name, space in spaces(self.network).items()}
            path = self.path(stage if self.at < len(stages) else "best") + ".pt"
            # for a later process the first one's file may be there already
            if not (self.args.resume and self.world.gather(os.path.exists(path))[0]):
                getattr(self, stage)()
                self.save(path)
            saved = load_checkpoint(path)
            self.network = build_model(saved, path).to(self.world.device)
            self.report.tables.update(saved["metrics"])
            self.report.add(stage, self.network, path)
            if stage == "prune" and not {"finetune", "qat"}.intersection(stages[self.at:]):
                say("pruned and not trained since, which costs most of the accuracy: next, --epochs 5 instead of 0, or "
                    f"python finetune.py --strategy full --checkpoint {path} --data {self.sets.root}")

    def path(self, name):
        return os.path.join(self.args.out, name if name == "best" else f"{self.at}-{name}")

    def save(self, path):
        encode = self.encode or {key: "sparse" for key, value in self.network.state_dict().items()  # a bit each
                                 if self.sparse and value.ndim > 1
                                 and (value == 0).float().mean() > 1 / (8 * value.element_size())}
        self.report.save(path, self.network, encode)

    def calibration(self):
        """-> pixels (N, 3, H, W), labels (N) of the calibration images, on the device, decoded once"""
        if self.pixels is None:
            self.pixels = [t.to(self.world.device) for t in read_pixels(self.sets, self.network, self.args)]
        return self.pixels

    def training_args(self, stage, epochs, lr_share):
        """-> a namespace for train.train: the checkpoint's own recipe, for `epochs` at `lr_share` of its peak rate"""
        args, root, saved = self.args, self.sets.root, self.checkpoint["args"]
        recipe = saved.get("recipe") or ("demo" if os.path.abspath(root) == os.path.abspath(data.DEMO) else "v1")
        run = vars(train.get_args_parser().parse_args(["--recipe", recipe, "--data", root, "--out", self.path(stage)]))
        run.update((k, saved[k]) for k in KEPT if k in saved)
        run.update((k, vars(args)[k]) for k in SHARED)
        run.update((k, vars(args)[k]) for k in CHOSEN if vars(args)[k] is not None)
        run.update(epochs=epochs, lr=args.lr if args.lr is not None else saved.get("lr", run["lr"]) * lr_share,
                   lr_warmup_epochs=min(1.0, epochs / 4), lr_scheduler="cosine", progressive=None,
                   resume="auto" if args.resume else None)
        if run["batch_size"] == "auto":
            run["batch_size"] = 32
        return argparse.Namespace(**run)

    def fit(self, stage, epochs, lr_share):
        """Trains the network in OUT/<n>-<stage>, by --distill's teacher where there is one, and leaves it with the best
        epoch's weights."""
        self.network.sparse_keys = [name for name, p in self.network.named_parameters() if self.sparse and p.ndim > 1]
        run = self.training_args(stage, epochs, lr_share)
        for net in filter(None, (self.network, self.teacher)):
            check_sizes(net, {run.image_size: "--image-size"})
        result = train.train(run, self.world, self.report.stop, self)
        while self.hooks:
            self.hooks.pop().remove()
        self.world.barrier()
        load_weights(self.network, load_checkpoint(result["checkpoint"])["model"], result["checkpoint"])
        self.network.eval()

    def distill(self):
        self.network = self.student().to(self.world.device)
        self.fit("distill", self.args.epochs, 1.0)

    def student(self):
        """--student: a share of ResNet-50's channels, or torchvision's network of that name; new weights"""
        share, config = share_of(self.args.student), {**self.network.config, "widths": {}}
        torch.manual_seed(self.args.seed)
        if share is None:
            student = torchvision_model(self.args.student, config["num_classes"])
        else:
            full = ResNet50(**config)
            keep = uniform(full, rank(full, "random", None, None), 1 - share, self.args.round_to,
                           flag=f"--student {self.args.student}")
            student = ResNet50(**prune(full, keep).config)
        student.preprocess = dict(self.network.preprocess)
        return student

    def prune(self):
        args, model = self.args, self.network
        if args.sparsity or args.sparsity_2_4:
            masks = masks_2_4(model) if args.sparsity_2_4 else masks_global(model, args.sparsity)
            with torch.no_grad():
                for name, mask in masks.items():
                    model.get_parameter(name).mul_(mask)
            skips = "but with --int8 on CUDA" if args.sparsity_2_4 else "for no kernel here skips zeros"
            say(f"{sum(int((~m).sum()) for m in masks.values()):,} weights are zero: the file gets smaller, the "
                f"network not faster, {skips}")
            return
        done = (args.rounds - self.rounds_left + 1) / args.rounds  # of the way, in logarithms, with this round
        pixels, labels = self.calibration() if args.importance in ("taylor", "activation") else (None, None)
        importance = rank(model, args.importance, pixels, labels, args.seed)
        if args.prune is not None and args.ranking == "layer":
            keep = uniform(model, importance, 1 - (1 - args.prune) ** done, args.round_to, self.whole,
                           f"--prune {args.prune:g}")
        elif args.prune is not None:
            cost = {name: (0, 0, 0, len(score)) for name, score in importance.items()}
            keep = greedy(model, importance, cost, {name: (None, name) for name in cost},
                          sum(map(self.whole.get, importance)) * (1 - args.prune) ** done, args.round_to,
                          min(0.1, (1 - args.prune) / 2), f"--prune {args.prune:g} --ranking global")
        else:
            keep = self.reach_target(importance, 1 / self.rounds_left)
        # what the first process found: times, and a GPU's sums, are not the same in all
        keep = self.world.gather(keep)[0]
        if args.prune and self.rounds_left == 1 and all(len(keep[name]) == self.whole[name] for name in keep):
            raise Unreachable(f"--prune {args.prune:g}: in multiples of --round-to {args.round_to} every layer stays "
                              "as it is")
        self.network = prune(model, keep)
        if args.sensitivity:
            self.say_sensitivity(model, importance)
        if args.recalibrate and any(len(keep[name]) < len(score) for name, score in importance.items()):
            pixels = self.calibration()[0]
            if len(pixels) == 1:
                raise UserError("one calibration image has no batch-norm statistics: more, or --no-recalibrate", 2)
            train.recalibrate(self.network, pixels.split(32))
        say(widths_line(model, keep))

    def say_sensitivity(self, model, importance):
        """Of the network as it came to this stage, each space alone pruned by half, where rounding lets some channels
        go -> into the report, {space: (KL of the outputs, share of arg-maxes kept, in percent)}"""
        table = {}
        for name, score in importance.items():
            self.report.poll()
            keep = uniform(model, {name: score}, 0.5, self.args.round_to)
            if len(keep[name]) < len(score):
                table[name] = compare(model, prune(model, keep), self.calibration()[0][:64])
        say(f"{'half of':24}{'KL of logits':>14}{'same, %':>10}")
        for name, (kl, same) in sorted(table.items(), key=lambda item: -item[1][0]):
            say(f"{name:24}{kl:>14.3e}{same:>10.1f}")
        self.report.tables["sensitivity"] = table

    def reach_target(self, importance, part):
        """-> what prune keeps to go `part` of the way, in logarithms, to --target-macs, --target-params or
        --target-latency"""
        args, model, size = self.args, self.network, self.network.preprocess["crop"]
        kind = next(k for k in TARGETS if getattr(args, "target_" + k) is not None)
        goal, int8 = getattr(args, "target_" + kind), args.int8 or args.qat
        # times are the first process's: as many polls in all
        cost = self.world.gather(cost_of(kind, model, size, int8, self.report.poll))[0]
        total = sum(map(sum, cost.values()))
        now = self.world.gather(milliseconds(model, size, int8))[0] if kind == "latency" else total
        if now <= goal:
            say(f"--target-{kind} {goal:g}: the network is there already, at {now:.6g}")
            return {name: torch.arange(len(score)) for name, score in importance.items()}
        target = now * (goal / now) ** part
        budget, tried = total * target / now, []
        for _ in range(6):  # what the table of latencies says is corrected by what the pruned network takes
            keep = greedy(model, importance, cost, ends(model), budget, args.round_to,
                          flag=f"--target-{kind} {goal:g}")
            if kind != "latency":
                return keep
            self.report.poll()
            reached = self.world.gather(milliseconds(prune(model, keep), size, int8))[0]
            say(f"latency {now:.2f} -> {reached:.2f} ms, {target:.2f} wanted")
            tried.append((abs(math.log(reached / target)), budget, reached, keep))
            if abs(reached / target - 1) < 0.03:
                break
            below = max((b for _, b, r, _ in tried if r <= target), default=None)
            above = min((b for _, b, r, _ in tried if r > target), default=None)
            budget = math.sqrt(below * above) if below and above else min(total, budget * target / reached)
        return min(tried, key=lambda t: t[0])[-1]

    def finetune(self):
        self.fit("finetune", -(-self.args.epochs // self.args.rounds), 0.5)

    def qat(self):
        args, (float_model, batches) = self.args, self.equalised()
        run = self.training_args("qat", args.qat_epochs, 1.0)
        images = len(data.open_folder(self.sets.root, val_split=args.val_split)[0])
        steps = args.freeze_bn_epochs * max(1, images // (run.batch_size * self.world.size))
        fake = self.network = FakeQuantResNet50(float_model, ranges_of(gather(float_model, batches), args.observer),
                                              args.qat_ranges == "learned", steps, **self.grid())
        self.fit("qat", args.qat_epochs, 0.1)
        self.network = quantize(fake.cpu(), ranges=fake.ranges(), **self.grid())
        pixels = self.calibration()[0].cpu()
        _, same = compare(fake, self.network, pixels)
        say(f"fake-quantized network and int8 program agree on {same:.2f} % of {len(pixels)} images")

    def grid(self):
        return dict(bits=self.args.weight_bits, per_tensor=self.args.per_tensor)

    def equalised(self):
        """-> the float network on the CPU, its channels equalised if --equalise says so, and batches of pixels"""
        batches, model = self.calibration()[0].cpu().split(32), copy.deepcopy(self.network).cpu()  # the report times it
        return equalise(model, batches) if self.args.equalise else model, batches

    def quantize(self):
        args = self.args
        if args.int4_weights:
            self.encode = {key: f"int4:{args.int4_weights}" for key, p in self.network.named_parameters() if p.ndim > 1}
            return
        if args.dynamic:
            self.network = quantize_classifier(self.network)
            return
        float_model, batches = self.equalised()
        found = gather(float_model, batches)
        to_int8 = functools.partial(post_training, float_model, batches, args.observer, found=found,
                                    correction=args.correction, watch=self.report.poll, **self.grid())
        self.network = to_int8(float_layers=args.float_layers)
        if args.max_drop is not None and self.report.drop(self.report.score(self.network)) > args.max_drop:
            before = self.report.rows[-1]
            if self.report.drop(before) > args.max_drop:
                raise UserError(f"--max-drop {args.max_drop:g}: {self.report.drop(before):.2f} points were lost before "
                                f"int8, which layers in float do not bring back: {before['checkpoint']}", code=2)
            self.back_to_float(float_model, to_int8)
        table = self.report.tables["signal_to_noise_db"] = signal_to_noise(float_model, self.network.cpu(), batches[:2])
        say("\n".join([f"{'layer':24}{'signal to noise, dB':>20}"] + [f"{k:24}{v:>20.1f}" for k, v in table.items()]))

    def back_to_float(self, float_model, to_int8):
        """Layers return to float, those first whose return brings the logits of the calibration images nearest to the
        float network's, as few as bring the drop within --max-drop. Ranked without correction, a minute each."""
        pixels, chosen, gains = self.calibration()[0][:64].cpu(), list(self.args.float_layers), {}
        names = [s.name for s in self.network.steps if s.kind in ("conv", "linear") and s.name not in chosen]
        for i, name in enumerate(["", *names]):
            self.report.poll()
            if i % 10 == 1:
                say(f"layers {i} to {min(i + 9, len(names))} of {len(names)}: what their return to float would bring")
            net = to_int8(float_layers=chosen + [name] * (i > 0), correction="none")
            gains[name] = compare(float_model, net, pixels)[0]
        names.sort(key=gains.get)
        say(f"{'layer back in float':24}{'KL of logits':>14} (all int8: {gains['']:.3e})")
        say("\n".join(f"{name:24}{gains[name]:>14.3e}" for name in names[:10]))
        few, enough, count = 0, math.inf, 1  # doubled until they do, then halved between what does and what does not
        while enough - few > 1:
            net = to_int8(float_layers=chosen + names[:count])
            drop = self.report.drop(self.report.score(net))
            say(f"{count} layers in float: {drop:.2f} points lost")
            if drop <= self.args.max_drop:
                self.network, enough = net, count
            elif count == len(names):
                raise UserError(f"--max-drop {self.args.max_drop:g}: {drop:.2f} points are lost with every layer in "
                                "float", code=2)
            else:
                few = count
            count = min(len(names), 2 * count) if enough == math.inf else (few + enough) // 2


@torch.no_grad()
def logits_of(model, pixels):
    return torch.cat([predict(model, part) for part in pixels.split(32)])


def compare(model, other, pixels):
    """-> mean KL(model || other) of the outputs for the pixels, percent of arg-maxes that are the same"""
    a, b = (logits_of(m, pixels) for m in (model, other))
    kl = F.kl_div(b.log_softmax(1), a.log_softmax(1), log_target=True, reduction="batchmean").item()
    return kl, 100 * (a.argmax(1) == b.argmax(1)).float().mean().item()


def masks_global(model, share):
    """The weights of least magnitude, over all convolutions and the classifier but the first -> {name: mask}"""
    found = {name: p for name, p in model.named_parameters() if p.ndim > 1 and not name.startswith("conv1")}
    every = torch.cat([p.detach().abs().flatten() for p in found.values()])
    threshold = every.kthvalue(max(1, round(share * len(every)))).values
    return {name: p.detach().abs() > threshold for name, p in found.items()}


def masks_2_4(model):
    """Of each four consecutive inputs the two of greatest magnitude -> {name: mask} (arXiv 2104.08378)"""
    masks = {}
    for name, p in model.named_parameters():
        if p.ndim > 1 and p.shape[1] % 4 == 0 and not name.startswith("conv1"):
            groups = p.detach().abs().movedim(1, -1).unflatten(-1, (-1, 4))
            mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(2, -1).indices, True)
            masks[name] = mask.flatten(-2).movedim(-1, 1)
    return masks


def widths_line(model, keep):
    """How many channels are left, by stage"""
    found, parts = spaces(model), {}
    for name, index in keep.items():
        part = parts.setdefault(name.split(".")[0], [0, 0])
        part[0] += len(index)
        part[1] += found[name].size
    return "channels left: " + ", ".join(f"{name} {a}/{b}" for name, (a, b) in parts.items())


# -------------------------------------------------------------------------------------------------------- main

def get_args_parser():
    above = between(0.0, kind=float, above=True)
    p = argparse.ArgumentParser(prog="compress.py", description="Prune, distil and quantize a trained network.",
                                formatter_class=Help)
    g = p.add_argument_group("run")
    g.add_argument("--data", metavar="FOLDER", help="images; default: the checkpoint's own, else the demo set")
    g.add_argument("--out", default="runs/compress", metavar="FOLDER")
    g.add_argument("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    g.add_argument("--resume", nargs="?", const="auto", choices=("auto",),
                   help="go on where a stopped run of the same flags was")
    g.add_argument("--stages", nargs="+", choices=STAGES, help="another order than the usual one")
    g.add_argument("--workers", type=between(0), default=max(1, min(8, os.cpu_count() or 1)), metavar="N")
    g.add_argument("--eval-batch-size", type=positive, default=32, metavar="N")
    g.add_argument("--val-split", type=float, metavar="F", help="share held out where there is no val/")
    g.add_argument("--on-corrupt", choices=("error", "skip"), default="error", help="for files that do not decode")
    g.add_argument("--seed", type=between(0, 2 ** 63 - 1), default=0)
    g.add_argument("--device", type=device_name, default="cuda" if torch.cuda.is_available() else "cpu")
    g.add_argument("--dist-timeout", type=positive, default=600, metavar="S")
    add_model_args(p).description = f"without --checkpoint or --weights: the first there is of {', '.join(DEFAULTS)}"
    g = p.add_argument_group("pruning")
    g.add_argument("--prune", type=below_one, metavar="RATIO", help="share of the channels that goes")
    g.add_argument("--target-macs", type=above, metavar="N", help="multiply-accumulates per image to get down to")
    g.add_argument("--target-params", type=above, metavar="N", help="parameters to get down to")
    g.add_argument("--target-latency", type=above, metavar="MS", help="milliseconds per image, on this machine")
    g.add_argument("--importance", choices=IMPORTANCE, default="l2", help="what tells which channels matter")
    g.add_argument("--ranking", choices=("layer", "global"), default="layer",
                   help="the same share of every layer, or the least important of all")
    g.add_argument("--round-to", type=positive, default=8, metavar="N", help="channels are left in multiples")
    g.add_argument("--sensitivity", action="store_true", help="report what halving each layer alone would do")
    g.add_argument("--rounds", type=positive, default=1, metavar="N", help="prune and fine-tune by and by")
    g.add_argument("--recalibrate", action=argparse.BooleanOptionalAction, default=True,
                   help="batch-norm statistics anew after pruning")
    g.add_argument("--sparsity", type=between(0.0, 1.0, float, above=True, below=True), metavar="RATIO",
                   help="share of single weights set to zero: a smaller file, not a faster network")
    g.add_argument("--sparsity-2-4", action="store_true", help="two of every four weights: the same, but that CUDA "
                   "skips them in int8")
    g = p.add_argument_group("several networks")
    g.add_argument("--auto", action="store_true", help="search prune ratio and precision, within --max-drop")
    g.add_argument("--cascade", nargs=2, metavar=("SMALL", "BIG"),
                   help="one network of two checkpoints, that asks BIG when SMALL is unsure")
    g = p.add_argument_group("training")
    g.add_argument("--epochs", type=between(0), default=5, metavar="N", help="after pruning, or of a student")
    g.add_argument("--lr", type=amount,
                   help="peak rate, scaled with the batch as in train.py; default: a share of the recipe's")
    g.add_argument("--batch-size", type=positive, metavar="N")
    g.add_argument("--image-size", type=positive, metavar="PX")
    g.add_argument("--opt", choices=("sgd", "nesterov", "adamw", "lars", "lamb"))
    g.add_argument("--weight-decay", type=amount)
    g.add_argument("--amp-dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    g.add_argument("--save-every", type=between(0), default=0, metavar="STEPS")
    g = p.add_argument_group("distillation")
    g.add_argument("--distill", metavar="TEACHER", help="a checkpoint, a torchvision model's name, or self")
    g.add_argument("--student", metavar="WHAT", help="torchvision's name, or a share of ResNet-50's channels")
    g.add_argument("--kd-loss", choices=("kl", "dkd", "dist"), default="kl")
    g.add_argument("--kd-temperature", type=above, default=4.0)
    g.add_argument("--kd-alpha", type=fraction, default=0.5, help="weight of the teacher's outputs against the labels'")
    g.add_argument("--kd-features", type=amount, default=0.0, metavar="BETA", help="weight of intermediate maps")
    g = p.add_argument_group("quantization")
    g.add_argument("--int8", action="store_true", help="post-training quantization")
    g.add_argument("--dynamic", action="store_true",
                   help="int8 for the classifier alone, its inputs rounded as they come: needs no calibration")
    g.add_argument("--qat", action="store_true", help="quantization-aware training, then int8")
    g.add_argument("--qat-epochs", type=positive, default=2, metavar="N")
    g.add_argument("--qat-ranges", choices=("learned", "observed"), default="learned")
    g.add_argument("--freeze-bn-epochs", type=between(0), default=0, metavar="N",
                   help="batch statistics for so long, then the running ones")
    g.add_argument("--observer", choices=OBSERVERS, default="lp",
                   help="what chooses the range of activations; mse, lp: squared errors, errors to the power of 2.4")
    g.add_argument("--equalise", action=argparse.BooleanOptionalAction, default=True,
                   help="even out channels first, between one convolution and the next")
    g.add_argument("--correction", choices=("weights", "biases", "none"), default="weights",
                   help="weights: rounded so that their errors cancel on the calibration images, and biases shifted to "
                        "the float network's channel means; biases: these alone")
    g.add_argument("--weight-bits", type=int, choices=range(2, 9), default=8, metavar="2..8",
                   help="use fewer of int8's values for weights")
    g.add_argument("--per-tensor", action="store_true", help="one scale for all of a layer's weights, not per channel")
    g.add_argument("--float-layers", nargs="+", default=[], metavar="LAYER", help="stay float, such as conv1 and fc")
    g.add_argument("--max-drop", type=between(-100.0, 100.0, float), metavar="POINTS",
                   help="return layers to float until no more is lost; with --auto (1 if not given) and --cascade "
                        "(0.5) what may be lost")
    g.add_argument("--int4-weights", type=positive, metavar="GROUP",
                   help="4-bit weights in the file, one scale per so many; computes in float")
    g.add_argument("--calib-images", type=positive, default=256, metavar="N")
    return p


ANY_TIME = ("resume", "overwrite", "out", "workers", "dist_timeout", "device", "eval_batch_size", "save_every")
CASCADES = ("cascade", "data", "val_split", "on_corrupt", "seed", "stride_on", "attention", "stem", "num_classes",
            "classes", "max_drop", "calib_images", *ANY_TIME)  # what --cascade reads


def given(args):
    """-> {name: value} of the flags that are not at their defaults"""
    defaults = vars(get_args_parser().parse_args([]))
    return {k: value for k, value in vars(args).items() if value != defaults[k]}


def stage_list(args):
    """-> the stages that the flags ask for, in order; gradual pruning repeats two of them"""
    pruned = any(k in GOALS for k in given(args))
    taught = args.distill and not args.student and not args.qat  # which is training by itself
    wanted = dict(distill=args.student, prune=pruned, finetune=args.epochs and (pruned or taught), qat=args.qat,
                  quantize=args.int8 and not args.qat or args.int4_weights or args.dynamic)
    stages = [stage for stage in args.stages or STAGES if wanted[stage]]
    if args.rounds > 1:
        at = stages.index("prune")
        stages[at:at + 2] = ["prune", "finetune"] * args.rounds
    return stages


# What --resume would go on from, so what --overwrite deletes: with --auto there is a run in each prune-...
RUN_FILES = r"(prune-[\d.]+/)?(best\.pt|\d+-\w+(/best|/last)?\.pt|(report|args)\.json|pareto\.svg)"


def prepare_out(args, world, inputs):
    """Refuses an --out that holds more than a run that made nothing, unless --overwrite or --resume says what shall
    become of it: the one not where it would delete one of the files `inputs`, the other not without args.json there or
    with other flags than it has. What an attempt before this one has begun (torchrun --max-restarts) goes on by
    itself."""
    if world.restarted(args.out):
        args.resume, args.overwrite = "auto", False
    holds = os.listdir(args.out) if os.path.isdir(args.out) else []
    if set(holds) - {"args.json"} and not (args.overwrite or args.resume):
        raise UserError(f"{args.out} is not empty: --resume goes on, --overwrite starts anew, --out names another "
                        "folder", code=2)
    if args.resume and holds and "args.json" not in holds:
        raise UserError(f"--resume: {args.out} holds no args.json, and so no run of compress.py", code=2)
    flags, path = {k: v for k, v in vars(args).items() if k not in ANY_TIME}, os.path.join(args.out, "args.json")
    there = glob.glob(os.path.join(glob.escape(args.out), "**"), recursive=True) if args.overwrite else ()
    old = [name for name in there if re.fullmatch(RUN_FILES, os.path.relpath(name, args.out))]
    for name in filter(os.path.exists, filter(None, inputs)):
        if any(os.path.samefile(name, other) for other in old):
            raise UserError(f"--overwrite would delete {name}, which is read: --out names another folder", code=2)
    if args.resume and os.path.exists(path):
        try:
            with open(path, encoding="utf-8") as f:
                saved = dict(json.load(f))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"--resume: {path}: {error}", code=2) from error
        for key in (k for k in flags if k in saved and saved[k] != flags[k]):
            raise UserError(f"--resume: --{key.replace('_', '-')} was {json.dumps(saved[key])} in {args.out}'s run", 2)
    world.barrier()  # nobody writes before everybody has looked
    try:
        os.makedirs(args.out, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out}: {error.strerror}", code=2) from error
    if world.rank == 0:
        train.delete(old)
        write_atomic(path, json.dumps(flags, indent=1).encode())
        world.begin(args.out)
    world.barrier()


def check_args(args):
    def refuse(text):
        raise UserError(text, code=2)
    flags = {k: f"--{'no-' * (value is False)}{k.replace('_', '-')}" for k, value in given(args).items()}
    goals = [k for k in GOALS if k in flags]
    if len(goals) > 1:
        refuse(f"{' and '.join(flags[k] for k in goals)} exclude each other")
    if args.cascade and (unused := [flag for k, flag in flags.items() if k not in CASCADES]):
        refuse(f"{unused[0]}: --cascade decides by itself and has no use for it")
    channels, share = goals and "sparsity" not in goals[0], args.student and share_of(args.student)
    int8, changed = args.int8 or args.auto, args.int8 or args.qat or args.dynamic or args.int4_weights
    trains = args.auto or args.qat or args.student or args.epochs and (goals or args.distill)
    for fits, partner, *names in (
            (args.distill, "--distill", "kd_loss", "kd_temperature", "kd_alpha", "kd_features"),
            (args.qat, "--qat", "qat_epochs", "qat_ranges", "freeze_bn_epochs"),
            (int8 or args.qat, "--int8, --qat or --auto", "observer", "equalise", "weight_bits", "per_tensor"),
            (int8 and not args.qat, "--int8 or --auto, and not with --qat", "correction", "float_layers"),
            ((int8 or args.cascade) and not args.qat, "--int8, --auto or --cascade, and not with --qat", "max_drop"),
            (channels and args.epochs, "--prune or a --target-..., and --epochs", "rounds"),
            (channels or share is not None or args.auto, "--prune, --target-..., --auto or a share as --student",
             "round_to"),
            (channels or args.auto, "--prune, --target-... or --auto", "importance", "sensitivity", "recalibrate"),
            (args.prune is not None or args.auto, "--prune or --auto", "ranking"),
            (trains, "training, and nothing is trained", "lr", "opt", "weight_decay", "batch_size", "amp_dtype",
             "save_every")):
        if not fits and (found := [flags[name] for name in names if name in flags]):
            refuse(f"{found[0]} goes with {partner}")
    for wrong, text in (
            (args.auto and (goals or changed or args.student or args.stages), "--auto decides by itself: no --prune, "
             "--int8, --dynamic, --qat, --student, --int4-weights, --stages with it"),
            (args.dynamic and (args.int8 or args.qat or args.int4_weights),
             "--dynamic excludes --int8, --qat and --int4-weights"),
            (args.int4_weights and (args.int8 or args.qat or args.sparsity or args.sparsity_2_4),
             "--int4-weights excludes --int8, --qat and sparsity"),
            (share is not None and not 0 < share <= 1,
             f"--student {args.student}: a share of the channels lies in (0, 1]"),
            (args.student and share is None and (goals or changed),
             f"--student {args.student}: only ResNet-50s are pruned and quantized"),
            (args.student and not args.epochs, "--student needs --epochs"),
            (args.distill and not trains, "--distill teaches in training: give it --epochs or --qat"),
            (args.qat and args.kd_features,
             "--kd-features: not with --qat, whose network computes without the modules that make these maps"),
            ("epochs" in flags and args.epochs and not (
                args.auto or goals or args.student or args.distill and not args.qat),
             "--epochs: " + ("--qat trains for --qat-epochs" if args.qat else "nothing here is trained for them"))):
        if wrong:
            refuse(text)
    wanted = stage_list(argparse.Namespace(**{**vars(args), "stages": None, "rounds": 1}))
    if args.stages and sorted(args.stages) != sorted(wanted):
        refuse(f"--stages {' '.join(args.stages)}: the flags ask for {' '.join(wanted) or 'none'}")
    for stage, then in itertools.pairwise(args.stages or ()):
        if stage in ("qat", "quantize"):
            refuse(f"--stages: {then} cannot follow {stage}, whose network is not trained any more")
    if args.rounds > 1 and "prune finetune" not in " ".join(args.stages or STAGES):
        refuse("--rounds prunes and fine-tunes by turns: --stages must have finetune right after prune")
    if not (wanted or args.cascade or args.auto):
        say("no flag says what to do: --int8")
        args.int8 = True


def check_finite(model, source):
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f"{source}: {name} holds values that are not finite")


def open_model(args):
    """-> what load_some_model returns, of a float ResNet50 whose weights are finite"""
    model, checkpoint, source = load_some_model(args, DEFAULTS, trains=True)
    if not isinstance(model, ResNet50):
        raise UserError(f"{source}: is no ResNet-50 of ours; such a network can teach (--distill) or be a --student")
    if model.config.get("adapter"):
        raise UserError(f"{source}: has adapters, which are neither pruned nor quantized; finetune.py --strategy lora "
                        "leaves a plain network")
    check_finite(model, source)
    size = argparse.Namespace(image_size=args.image_size, val_size=None, val_resize=None, interpolation=None)
    model.preprocess = train.preprocess_of(size, model.preprocess)
    return model, checkpoint, source


def compress(args, world, stop):
    model, checkpoint, source = open_model(args)
    stages = [] if args.auto else stage_list(args)
    trains = bool(args.auto or {"finetune", "qat", "distill"} & set(stages))
    sets = open_sets(args, checkpoint, model, world, trains)
    checkpoint["classes"] = checkpoint["classes"] or sets.classes
    if trains:  # what it has learned from by then
        checkpoint["args"] = dict(checkpoint["args"], data=sets.root, val_split=args.val_split)
    known = {step.name for step in fold_downsample(flatten(model)) if step.kind in ("conv", "linear")}
    if unknown := sorted(set(args.float_layers) - known):
        raise UserError(f"--float-layers {' '.join(unknown)}: no such layer in this network's int8 program", code=2)
    teacher = args.distill and load_teacher(args.distill, model, checkpoint["classes"], world.device,
                                           args.stride_on)
    prepare_out(args, world, [source, args.distill])
    say("\n".join([f"{source}: {', '.join(stages)}"] + sets.notes))
    report = Report(args, sets, world, stop, checkpoint)
    report.add("original", copy.deepcopy(model), source if os.path.exists(source) else None)
    if args.auto:
        return auto(args, report, model, teacher)
    Pipeline(args, report, model, teacher).run(stages)
    report.time()
    return finish(report)


def auto(args, report, model, teacher):
    """Prune ratio x precision: quarters first, then twice the middle between the last ratio that keeps within
    --max-drop (default 1) and the first that does not. The fastest network within it becomes best.pt."""
    allowed, tried = 1.0 if args.max_drop is None else args.max_drop, {}

    def attempt(ratio):
        run = argparse.Namespace(**{**vars(args), "prune": ratio or None, "int8": True, "max_drop": None,
                                    "out": os.path.join(args.out, f"prune-{ratio:g}")})
        first, report.tables = len(report.rows), {}
        try:
            Pipeline(run, report, copy.deepcopy(model), teacher).run(stage_list(run))
        except Unreachable as error:  # before its first row
            say(str(error))
            tried[ratio] = False
            return
        for row in report.rows[first:]:
            row["stage"] = f"{ratio:g} {row['stage']}"
        tried[ratio] = report.drop(report.rows[-1]) <= allowed
    for ratio in (0.0, 0.25, 0.5, 0.75):
        attempt(ratio)
    for _ in range(2):
        low = max((r for r in tried if tried[r]), default=0.0)
        high = min((r for r in tried if not tried[r] and r > low), default=0.95)
        attempt(round((low + high) / 2, 3))
    report.time()
    if not (within := [r for r in report.rows if report.drop(r) <= allowed]):
        raise UserError(f"--max-drop {allowed:g}: no network that was tried gains so much; they are in {args.out}", 2)
    chosen = min(within, key=lambda r: r["latency_ms_bs1"])
    path, at = os.path.join(args.out, "best.pt"), report.rows.index(chosen)
    made = load_checkpoint(chosen["checkpoint"]) if at else dict(report.checkpoint, metrics={})
    report.tables = made["metrics"]
    report.save(path, report.models[at], made.get("encode"))
    if report.world.rank == 0:
        write_atomic(os.path.join(args.out, "pareto.svg"), pareto_svg(report.rows, chosen, report.accuracy).encode())
    report.rows.append({**chosen, "checkpoint": path, "bytes": os.path.getsize(path)})
    return finish(report, max_drop=allowed)


def front(rows, accuracy):
    """The rows that no other beats in accuracy and in latency, from fast to slow"""
    found = []
    for row in sorted(rows, key=lambda r: (r["latency_ms_bs1"], -accuracy(r))):
        if not found or accuracy(row) > accuracy(found[-1]):
            found.append(row)
    return found


def pareto_svg(rows, chosen, accuracy):
    """Accuracy over milliseconds (logarithmic), a circle per network with the area of its file, and the front"""
    width, height, left, top = 720, 400, 60, 30
    x0, x1 = (f(math.log(r["latency_ms_bs1"]) for r in rows) for f in (min, max))
    y0, y1 = (f(map(accuracy, rows)) for f in (min, max))
    place = lambda r: (left + (math.log(r["latency_ms_bs1"]) - x0) / (x1 - x0 or 1) * width,  # noqa: E731
                       top + height - (accuracy(r) - y0) / (y1 - y0 or 1) * height)
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, front(rows, accuracy)))
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 150} {top + height + 60}" '
           'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>',
           f'<polyline points="{line}" fill="none" stroke="#4878a8"/>',
           f'<text x="{left}" y="{top + height + 45}">milliseconds per image: {math.exp(x0):.2f} to '
           f'{math.exp(x1):.2f}, logarithmic; top-1 or agreement: {y0:.1f} to {y1:.1f} %; areas: file size</text>']
    for row in rows:
        (x, y), radius = place(row), math.sqrt((row["bytes"] or 0) / 1e5)
        colour = "#c05020" if row is chosen else "#4878a8"
        svg.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius + 2:.1f}" fill="{colour}" fill-opacity="0.4"/>'
                   f'<text x="{x + radius + 4:.1f}" y="{y + 4:.1f}">{html.escape(row["stage"])} {accuracy(row):.1f} % '
                   f'{row["latency_ms_bs1"]:.1f} ms</text>')
    return "\n".join(svg + ["</svg>"])


def cascade(args, world, stop):
    """--cascade: SMALL answers what it is sure of, BIG the rest. The threshold on the largest probability is the least
    with which no more than --max-drop points (default 0.5) of BIG's top-1 on the calibration images, or without labels
    of the agreement with it, are lost."""
    foreign = [path for path in args.cascade if not load_checkpoint(path)["config"]]

    def member(path):  # where one file says what it holds, flags speak of the other
        says = dict.fromkeys(("stride_on", "attention", "stem")) if foreign and path not in foreign else {}
        return load_model(argparse.Namespace(**{**vars(args), "checkpoint": path, **says}))
    (small, other, _), (big, checkpoint, _) = map(member, args.cascade)
    for net, path in zip((small, big), args.cascade):
        if isinstance(net, Cascade):
            raise UserError(f"--cascade: {path}: is a cascade itself")
        check_finite(net, f"--cascade: {path}")
    small, big = small.to(world.device), big.to(world.device)
    if other["classes"] != checkpoint["classes"]:
        raise UserError(f"--cascade: {args.cascade[0]} and {args.cascade[1]} have different classes")
    model = Cascade(small, big, 1.0).eval()
    sets = open_sets(args, checkpoint, big, world, trains=False)
    prepare_out(args, world, args.cascade)
    say("\n".join(sets.notes))
    pixels, labels = read_pixels(sets, big, args)
    first, second = (logits_of(m, pixels.to(world.device)).cpu() for m in (small, big))
    sure, guess = first.softmax(1).max(1)
    truth = labels if sets.labelled else second.argmax(1)
    order = sure.argsort(descending=True)
    gain = (guess == truth)[order].double() - (second.argmax(1) == truth)[order].double()
    lost = -100 * gain.cumsum(0) / len(gain)  # points below BIG if SMALL answers the surest so many
    whole = F.pad(sure[order].diff() != 0, (0, 1), value=True)  # no threshold parts images that are equally sure
    most = 0.5 if args.max_drop is None else args.max_drop
    allowed = (whole & (lost <= most)).nonzero()
    count = int(allowed[-1]) + 1 if len(allowed) else 0
    model.threshold = sure[order[count - 1]].item() if count else 1.0
    if not count and (sure == 1).any():  # which no threshold sends on
        raise UserError(f"{args.cascade[0]}: gives wrong answers a probability of 1, more than --max-drop allows")
    say(f"threshold {model.threshold:.4f}: {count} of {len(sure)} calibration images stop at {args.cascade[0]}")
    saved = dict(checkpoint, classes=checkpoint["classes"] or sets.classes)
    report, path = Report(args, sets, world, stop, saved), os.path.join(args.out, "best.pt")
    report.add("big", big, args.cascade[1])
    report.add("small", small, args.cascade[0])
    report.save(path, model, {f"{member}.{k}": v for member, its in (("small", other), ("big", checkpoint))
                              for k, v in its.get("encode", {}).items()})
    report.add("cascade", model, path)
    if (drop := report.drop(report.rows[-1])) > most:
        say(f"--max-drop {most:g} chose the threshold on {len(sure)} calibration images; of the "
            f"{report.rows[-1]['images']} evaluated ones {drop:.2f} points are lost: more --calib-images know better")
    report.time()
    return finish(report, threshold=model.threshold)


def finish(report, **more):
    """Prints the table of the networks, which are timed, and writes report.json. -> the dict on the last line"""
    say(report.table())
    before, after = report.rows[0], report.rows[-1]
    result = dict(top1=after["top1"], top5=after["top5"], agreement=after["agreement"], before=before, after=after,
                  stages=report.rows, checkpoint=after["checkpoint"], data=report.sets.root, **report.tables,
                  **report.extra, **more)
    if report.world.rank == 0:
        write_atomic(os.path.join(report.args.out, "report.json"), json.dumps(result, indent=1).encode())
    return result


def main(args):
    check_args(args)
    run = argparse.Namespace(**vars(args), eval_only=False, deterministic=False)
    return train.run_processes(run, functools.partial(cascade if args.cascade else compress, args))


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args(), "compress.py")
