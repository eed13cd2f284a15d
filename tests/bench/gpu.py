"""All figures of one GPU in one call of under nine minutes: roofs, layers, whole networks, a training step.

  python -m tests.bench.gpu --json FILE               # the last line is JSON with every figure, FILE has those so far
  python -m tests.bench.gpu --part networks           # of layers, networks, training: this one alone
  python -m tests.bench.gpu --device cpu --size 64 --batches 1 --seconds 8 --layers layer4      # does it run at all

Roofs are measured first: the largest products of PyTorch's own int8 and bf16 libraries, and a copy. A layer's roof is
the larger of its multiplies and its bytes by these; as it repeats on the same tensors, the L2 may hold them and the
layer pass its roof. Contenders of a table alternate, sample by sample, and a ratio is the median over rounds. Networks
go from uint8 pixels to logits, ours as CUDA graphs; layers are graphs, too, so that launches do not count.
torch.compile comes last, and as far as --limit allows: it tunes anew for each batch.
"""
import argparse
import contextlib
import copy
import json
import statistics
import time

import torch
from torch.nn import functional as F

import csrc
import resnet50
from compress import masks_2_4
from csrc import graphs
from tests.bench import kernels
from tests.bench.infer import quartiles, say

PIECE = 0.02  # seconds of a sample
PARTS = {"layers": 0.4, "networks": 0.45, "training": 0.15}  # of --seconds
LAYERS = ("conv_int8", "conv_bn_relu_bf16", "conv_int8_2_4", "conv2d_bf16")


def seconds_of(call, count, device):
    """Of `count` calls on the device, one after the other."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(count):
            call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def recorded(call, device):
    """The call as one launch."""
    if device == "cpu":
        return call
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@contextlib.contextmanager
def skipping(name):
    """Names what fails and goes on, so that the others of a run have their figures."""
    try:
        yield
    except RuntimeError as error:
        say(f"  {name} skipped: {f'{error}'.strip().partition(chr(10))[0][:120]}")


def alternate(calls, seconds, device):
    """{name: call} -> {name: [seconds per call, a round each]}"""
    counts = {}
    for name, call in calls.items():
        seconds_of(call, 2, device)
        counts[name] = max(1, round(PIECE / max(seconds_of(call, 1, device), 1e-6)))
    found, start = {name: [] for name in calls}, time.monotonic()
    while time.monotonic() - start < seconds or len(next(iter(found.values()))) < 3:
        for name in list(calls)[::-1 if len(found[name]) % 2 else 1]:
            found[name].append(seconds_of(calls[name], counts[name], device) / counts[name])
    return found


def roofs(device, result):
    """Multiply-adds per second of the largest products, and bytes per second of a copy, read and written."""
    n = 8192 if device == "cuda" else 512
    a = torch.randn(n, n, dtype=torch.bfloat16, device=device)
    b = torch.randint(-9, 9, (n, n), dtype=torch.int8, device=device)
    source = torch.ones(n * n * 4, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = {name: min(seconds_of(call, 5, device) / 5 for _ in range(4)) for name, call in (
        ("bf16", lambda: a @ a), ("int8", lambda: torch._int_mm(b, b.t())), ("copy", lambda: target.copy_(source)))}
    result |= {f"roof.{kind}": round(n ** 3 / best[kind]) for kind in ("int8", "bf16")}
    result["roof.bytes"] = round(2 * source.nbytes / best["copy"])
    say(f"roofs        int8 {result['roof.int8'] / 1e12:.2f}, bf16 {result['roof.bf16'] / 1e12:.2f} TMAC/s; "
        f"copy {result['roof.bytes'] / 1e9:.0f} GB/s")


def show(name, times, ours, result, key, text=""):
    """A line of a table; ratios to the contenders of ours that `times` has."""
    low, middle, high = quartiles(times[name])
    result[f"us.{name}.{key}"] = round(middle * 1e6, 2)
    for our in ours:
        if name not in ours and our in times:
            ratio = statistics.median(b / a for a, b in zip(times[our], times[name]))
            result[f"ratio.{our}.{name}.{key}"] = round(ratio, 3)
            text += f"  {our} is {ratio:.2f}x"
    say(f"  {name:18}{middle * 1e6:11.1f} us [{low * 1e6:.1f}, {high * 1e6:.1f}] n={len(times[name])}{text}")


def layers(args, seconds, result):
    batch = max(args.batches) if args.device == "cpu" else 64
    todo = kernels.layers(args.layers)
    say(f"\nlayers, batch {batch}")
    total = dict.fromkeys(LAYERS, 0.0)
    with torch.device(args.device):
        for layer, (title, count) in todo.items():
            made, calls = kernels.convolutions(layer, batch), {}
            for name in filter(made.get, LAYERS):
                with skipping(name):
                    calls[name] = recorded(made[name][1], args.device)
            times = alternate(calls, seconds / len(todo), args.device)
            area = (layer.size // layer.stride) ** 2
            weights = layer.cin * layer.cout * layer.kernel ** 2
            macs, moved = batch * area * weights, batch * (layer.size ** 2 * layer.cin + area * layer.cout) + weights
            say(f" {title} ({count}x): {layer.cin} -> {layer.cout}, {layer.kernel}x{layer.kernel}, {layer.size} px")
            for name in times:
                kind, size = ("int8", 1) if "int8" in name else ("bf16", 2)
                middle = statistics.median(times[name])
                total[name] += middle * count
                made_of = macs / 2 if "2_4" in name else macs
                roof = max(made_of / result[f"roof.{kind}"], moved * size / result["roof.bytes"])
                result[f"roof_share.{name}.{title}"] = round(roof / middle, 4)
                show(name, times, LAYERS[:2], result, title, f"  {roof / middle:.1%} of its roof")
    result |= {f"us.{name}.layers": round(value * 1e6, 1) for name, value in total.items() if value}
    save(args, result)


class CudnnResNet50(resnet50.FusedResNet50):
    """The same steps by the fusions that PyTorch has of cuDNN."""

    def __init__(self, model, dtype):
        super().__init__(model, dtype)
        for step in self.steps:
            if step.kind == "conv":
                conv = self.get_submodule(step.name)
                conv.weight.data = (conv.weight.float() * conv.scale[:, None, None, None]).to(dtype)
                conv.shift = conv.shift.to(dtype)

    def call(self, step, x, residual=None):
        if step.kind != "conv":
            return super().call(step, x, residual)
        conv = self.get_submodule(step.name)
        more = conv.shift, conv.stride, conv.padding, (1, 1), conv.groups
        if residual is not None:
            return torch.cudnn_convolution_add_relu(x, conv.weight, residual, 1.0, *more)
        if step.relu and x.shape[1] % 8 == 0:  # cuDNN may have no fused engine for other channels, as of pixels
            return torch.cudnn_convolution_relu(x, conv.weight, *more)
        y = F.conv2d(x, conv.weight, *more)
        return y.relu_() if step.relu else y


def save(args, result):
    if args.json:
        resnet50.write_atomic(args.json, json.dumps(result, indent=1).encode())


def network(args, made, pixels, seconds):
    """One batch through each of `made`, {name: function of pixels} -> figures"""
    calls, batch, found = {}, len(pixels), {}
    for name, run in made.items():
        with skipping(name):
            run(pixels)
            calls[name] = lambda run=run: run(pixels)
    times = alternate(calls, seconds, args.device)
    say(f"\nnetwork, batch {batch}, {args.size} px")
    for name in calls:
        rate = batch / statistics.median(times[name])
        found[f"ips.{name}.bs{batch}"] = round(rate, 1)
        show(name, times, ("int8", "bf16"), found, f"bs{batch}", f"  {rate:9.1f} images/s")
    return found


def networks(args, seconds, result):
    """-> function() that measures torch.compile, too"""
    torch.manual_seed(0)
    model = resnet50.ResNet50().eval().requires_grad_(False).to(memory_format=torch.channels_last)
    for block in model.blocks():
        torch.nn.init.constant_(block.bn3.weight, 0.3)
    pixels = torch.randint(0, 256, (max(args.batches), 3, args.size, args.size), dtype=torch.uint8)
    pixels = pixels.to(memory_format=torch.channels_last)
    int8 = resnet50.quantize(model, [pixels[:8]]).to(args.device)
    sparse = copy.deepcopy(model)
    for name, mask in masks_2_4(sparse).items():
        sparse.get_parameter(name).mul_(mask)
    model, pixels = model.to(args.device), pixels.to(args.device)

    def floating(network, dtype):
        return lambda x: network(resnet50.normalize(x, model.preprocess).to(dtype))
    eager = {name: floating(copy.deepcopy(model).to(dtype), dtype)
             for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))}
    made = {"int8": int8, "bf16": resnet50.fuse(model, torch.bfloat16), "eager_bf16": eager["bf16"]}
    if args.device == "cuda":
        made |= {"int8_2_4": resnet50.quantize(sparse.cpu(), [pixels[:8].cpu()]).to(args.device),
                 "eager_fp16": eager["fp16"],
                 "cudnn_bf16": CudnnResNet50(model, torch.bfloat16)}
    for batch in args.batches:
        result |= network(args, made, pixels[:batch], seconds / len(args.batches))
        if int8.graphs and (way := int8.graphs.chosen.get(graphs.bucket(batch))) is not None:
            say(f"  int8 at batch {batch}: {way or 'whole'}")
        save(args, result)

    def compiled():
        run, longest = torch.compile(eager["bf16"], mode="max-autotune", dynamic=False), 150
        for batch in args.batches:
            began = time.monotonic()
            if args.began + args.limit - began < longest:
                return say(f"compile_bf16 skipped from batch {batch} on: {longest:.0f} seconds may not be left")
            beside = {"int8": int8, "bf16": made["bf16"], "compile_bf16": run}
            result.update(network(args, beside, pixels[:batch], 5) | result)  # what is measured already stays
            save(args, result)
            longest = 1.5 * (time.monotonic() - began)
    return compiled


def training(args, seconds, result):
    """A step of SGD under bf16 autocast, --fused-bn against PyTorch's batch-norm."""
    batch, calls = (128 if args.device == "cuda" else max(args.batches) + 1), {}
    x = torch.randn(batch, 3, args.size, args.size, device=args.device).to(memory_format=torch.channels_last)
    target = torch.arange(batch, device=args.device) % 1000
    for name, fused in (("fused_bn", True), ("eager_bn", False)):
        model = resnet50.ResNet50().to(args.device, memory_format=torch.channels_last).train()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.fused = fused
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        @torch.enable_grad()
        def step(model=model, optimizer=optimizer):
            with torch.autocast(args.device, torch.bfloat16):
                loss = F.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        calls[name] = step
    times = alternate(calls, seconds, args.device)
    say(f"\ntraining step, batch {batch}, {args.size} px, bf16 autocast")
    for name in calls:
        result[f"ips.{name}"] = round(batch / statistics.median(times[name]), 1)
        show(name, times, ("fused_bn",), result, "train", f"  {result[f'ips.{name}']:9.1f} images/s")
    save(args, result)


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    p.add_argument("--part", choices=tuple(PARTS), help="this one alone")
    p.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 64, 256],
                   metavar="N[,N]")
    p.add_argument("--size", type=int, default=224, metavar="PIXELS")
    p.add_argument("--layers", default="", metavar="TEXT", help="only layers whose name holds it")
    p.add_argument("--seconds", type=float, default=240, help="of measuring, without compiling (default %(default)s)")
    p.add_argument("--limit", type=float, default=540, help="seconds for all, past which nothing is compiled "
                   "(default %(default)s)")
    p.add_argument("--json", metavar="FILE", help="gets the figures as they come")
    args = p.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: no GPU is visible")
    return args


def main(args):
    args.began = time.monotonic()
    if args.device == "cuda" and not csrc.has_cuda():  # or PyTorch's operations would be measured as ours
        raise resnet50.UserError(f"the extension has no CUDA kernels: {csrc.describe()}")
    torch.set_grad_enabled(False)
    torch.backends.cudnn.benchmark = True  # as train.py has it: PyTorch at its best
    csrc.load()
    result = {"version.torch": torch.__version__, "version.cuda": torch.version.cuda, "extension": csrc.describe(),
              "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu"}
    for key, value in result.items():
        say(f"{key:14} {value}")
    save(args, result)  # a FILE that cannot be written is told now
    roofs(args.device, result)
    parts = {args.part: 1.0} if args.part else PARTS
    if "layers" in parts:
        layers(args, args.seconds * parts["layers"], result)
    if "networks" in parts:
        compiled = networks(args, args.seconds * parts["networks"], result)
    if "training" in parts:
        training(args, args.seconds * parts["training"], result)
    if args.device == "cuda" and "networks" in parts:
        compiled()
    return result


if __name__ == "__main__":
    resnet50.run_script(main, parse(), "tests.bench.gpu")
