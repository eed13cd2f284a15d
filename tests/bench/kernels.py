"""Microseconds of single operations on ResNet-50's own shapes, ours against PyTorch's.

  python -m tests.bench.kernels                                     # batch 8, one thread, two minutes
  python -m tests.bench.kernels --device cuda                       # tests.bench.gpu --part layers
  python -m tests.bench.kernels --ops gemm_int8 --layers layer4 --batch-size 1 --threads 2

conv_int8      u8 x s8 -> u8            beside F.conv2d with folded batch norm + ReLU in fp32 and bf16; it packs its
                                        weights at each call, which the network does once: `pack` is that part
conv_bn_relu   fp32 and bf16            beside the same
gemm_int8      u8 x s8 -> s32, 1x1s     beside torch._int_mm (s8 x s8 -> s32); it packs, too
bn_relu        training, fp32           beside F.batch_norm + ReLU, forward, and forward with backward

All contenders of a layer alternate as in tests.bench.infer. `network` sums a column over the layers, each as often as
it occurs in ResNet-50.
"""
import argparse
import statistics
from collections import defaultdict, namedtuple

import torch
from torch import nn
from torch.nn import functional as F

import csrc
import resnet50
from tests.bench import infer, peers
from tests.bench.infer import CORES, Contender, quartiles, ratios, say

OPS = {"conv_int8": ("conv2d_fp32", "conv2d_bf16"), "conv_bn_relu_fp32": ("conv2d_fp32",),
       "conv_bn_relu_bf16": ("conv2d_bf16",), "gemm_int8": ("int_mm",), "bn_relu": ("batch_norm",),
       "bn_relu_backward": ("batch_norm_backward",)}  # ours: PyTorch's
PIECE = 0.02  # seconds of a sample: a few calls of the larger layers

Layer = namedtuple("Layer", "cin cout kernel stride size")  # of a convolution; `size` is the input's height and width


def layers(text=""):
    """-> {Layer: (name of the first convolution of that shape, how many there are)} of those whose name holds text."""
    found, model = {}, resnet50.ResNet50().eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            def hook(module, inputs, output, name=name):
                key = Layer(module.in_channels, module.out_channels, module.kernel_size[0], module.stride[0],
                            inputs[0].shape[-1])
                first, count = found.get(key, (name, 0))
                found[key] = first, count + 1
            module.register_forward_hook(hook)
    model(torch.zeros(1, 3, 224, 224))
    if named := {layer: (first, count) for layer, (first, count) in found.items() if text in first}:
        return named
    names = ", ".join(first for first, _ in found.values())
    raise resnet50.UserError(f"--layers {text}: no name of {names} holds that", code=2)


def nhwc(*size):
    return torch.randn(size).contiguous(memory_format=torch.channels_last)


def integers(low, high, size):
    x = torch.randint(low, high, size, dtype=torch.uint8 if high == 256 else torch.int32)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def weights(size):
    """int8, distributed as trained ones are, the largest at four deviations: a kernel's path may depend on it."""
    x = (torch.randn(size) * 32).round_().clamp_(-127, 127).to(torch.int8)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def convolutions(layer, batch):
    """-> {name: (kind, call)} of one layer, float and int8, with a batch norm folded in."""
    shape, same = (layer.cout, layer.cin, layer.kernel, layer.kernel), dict(stride=layer.stride,
                                                                           padding=layer.kernel // 2)
    x, weight, scale, bias = (nhwc(batch, layer.cin, layer.size, layer.size), nhwc(*shape), torch.rand(layer.cout),
                              torch.randn(layer.cout))
    pairs = {k: [v, v] for k, v in same.items()}
    found = {}
    for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, w, b = x.to(dtype), weight.to(dtype), bias.to(dtype)
        folded = (weight * scale.view(-1, 1, 1, 1)).to(dtype).contiguous(memory_format=torch.channels_last)
        found[f"conv2d_{kind}"] = kind, lambda a=a, w=folded, b=b: F.conv2d(a, w, b, **same).relu_()
        found[f"conv_bn_relu_{kind}"] = kind, lambda a=a, w=w: csrc.conv_bn_relu(a, w, scale, bias, **pairs)
    pixels, weight8 = integers(0, 256, x.shape), weights(shape)
    mult, bias8 = (integers(low, 1000, (layer.cout,)) for low in (1, -1000))
    found["conv_int8"] = "int8", lambda: csrc.conv_int8(pixels, weight8, mult, bias8, **pairs)
    found["pack"] = "int8", lambda: csrc.pack_int8(weight8, mult, bias8)
    if pixels.is_cuda and layer.cin % 16 == 0:  # a CPU has no kernel for it
        mask = torch.arange(layer.cin).view(1, -1, 1, 1) % 4 % 3 == 0
        packed = csrc.pack_2_4(weight8 * mask)
        found["conv_int8_2_4"] = "int8", lambda: csrc.conv_int8_2_4(pixels, packed, mult, bias8, shape[2:], **pairs)
    return found


def products(layer, batch):
    """-> the same for a 1x1 convolution as a matrix product; nothing for the others."""
    if layer.kernel > 1:
        return {}
    rows = batch * (layer.size // layer.stride) ** 2
    a, b = integers(0, 256, (rows, layer.cin)), weights((layer.cout, layer.cin))
    signed, transposed = a.view(torch.int8), b.t().contiguous()
    return {"gemm_int8": ("int8", lambda: csrc.gemm_int8(a, b)),
            "int_mm": ("int8", lambda: torch._int_mm(signed, transposed))}


def norms(layer, batch):
    """-> the same for the batch norm and ReLU behind a convolution, in training."""
    size = layer.size // layer.stride
    x, weight, bias, gradient = (nhwc(batch, layer.cout, size, size), torch.rand(layer.cout), torch.randn(layer.cout),
                                 nhwc(batch, layer.cout, size, size))
    mean, variance = torch.zeros(layer.cout), torch.ones(layer.cout)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]

    def ours(x, weight, bias):
        return csrc.bn_relu(x, weight, bias, None, mean, variance)

    def theirs(x, weight, bias):
        return F.relu(F.batch_norm(x, mean, variance, weight, bias, training=True), inplace=True)

    @torch.enable_grad()
    def both(function):
        torch.autograd.grad(function(*leaves), leaves, gradient)
    return {"bn_relu": ("fp32", lambda: ours(x, weight, bias)), "batch_norm": ("fp32", lambda: theirs(x, weight, bias)),
            "bn_relu_backward": ("fp32", lambda: both(ours)), "batch_norm_backward": ("fp32", lambda: both(theirs))}


def passes(name):
    """How often the activation crosses memory at least: two reads and a write forward; backward needs the gradient and
    the activation twice and writes one."""
    return 8 if name.endswith("backward") else 3


def slow_int_mm():
    """Less than 1e9 multiply-adds a second."""
    a = torch.ones(256, 256, dtype=torch.int8)
    return resnet50.measure(lambda: torch._int_mm(a, a), a.device, repeats=1) > 256**3 / 1e9 * 1e3


def wanted(ops):
    """-> names of the contenders, without those that this machine cannot run."""
    names = dict.fromkeys(name for op in ops for name in (op, *OPS[op], *(["pack"] if op == "conv_int8" else [])))
    if not csrc.load():
        names.pop("pack", None)
    if "int_mm" in names and slow_int_mm():
        names.pop("int_mm")
        say("skipped      int_mm: PyTorch has only plain loops for it on this CPU")
    try:
        peers.check_bf16("eager_bf16")
    except peers.Skip as error:
        say(f"skipped      bf16: {error}")
        names = {name: None for name in names if "bf16" not in name}
    return list(names)


def measure(layer, args, seconds):
    """-> contenders, their samples, multiply-adds of a call."""
    made = {**convolutions(layer, args.batch_size), **products(layer, args.batch_size), **norms(layer, args.batch_size)}
    contenders = []
    infer.limit(args.threads)
    for name in args.names:
        if name in made:
            try:
                made[name][1]()
                contenders.append(Contender(name, made[name][0], args.threads, made[name][1]))
            except RuntimeError as error:
                say(f"  {name} skipped: {str(error).splitlines()[0][:100]}")
    samples = infer.alternate(contenders, seconds, PIECE) if contenders else {}
    area = (layer.size // layer.stride) ** 2
    return contenders, samples, args.batch_size * area * layer.cout * layer.cin * layer.kernel**2


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=infer.ON_A_GPU.format("layers"))
    p.add_argument("--ops", default=",".join(OPS), metavar="OP[,OP]", help="default %(default)s")
    p.add_argument("--layers", default="", metavar="TEXT", help="only layers whose name holds it")
    p.add_argument("--batch-size", type=int, default=8, metavar="N")
    p.add_argument("--threads", type=int, default=1, metavar="N")
    p.add_argument("--seconds", type=float, default=120, help="of measuring, all layers (default %(default)s)")
    args = p.parse_args(argv)
    args.ops = args.ops.split(",")
    if unknown := set(args.ops) - set(OPS):
        p.error(f"--ops: {', '.join(sorted(unknown))} is none of {', '.join(OPS)}")
    if args.threads > len(CORES):
        p.error(f"--threads {args.threads}: this process may use {len(CORES)} cores")
    return args


def main(args):
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    result = infer.hardware()
    args.names = wanted(args.ops)
    infer.ceilings(("int8", "bf16", "fp32"), [args.threads], result)
    todo = layers(args.layers)
    total = defaultdict(float)
    for layer, (name, count) in todo.items():
        contenders, samples, macs = measure(layer, args, args.seconds / len(todo))
        say(f"\n{name} ({count}x): {layer.cin} -> {layer.cout}, {layer.kernel}x{layer.kernel}, stride {layer.stride}, "
            f"{layer.size} px, batch {args.batch_size}")
        by_name = {c.name: c for c in contenders}
        for c in contenders:
            mine = samples[c.name, c.threads].values()
            low, middle, high = (1e6 / q for q in reversed(quartiles(s.rate for s in mine)))
            total[c.name] += middle * count
            text = f"  {c.name:20}{middle:10.1f} us [{low:.1f}, {high:.1f}]"
            if "norm" in c.name or c.name.startswith("bn_"):
                moved = 4 * passes(c.name) * args.batch_size * layer.cout * (layer.size // layer.stride) ** 2
                text += f"  {moved / middle / 1e3:.1f} GB/s"
            elif c.name != "pack":
                text += f"  {statistics.median(s.rate * macs * 2 / (s.before + s.after) for s in mine):.1%} of peak"
            for other in (by_name[o] for o in OPS.get(c.name, ()) if o in by_name):
                found = ratios(c, other, samples)
                q1, median, q3 = quartiles(found)
                result[f"ratio.{c.name}.{other.name}.{name}"] = round(median, 3)
                text += f"  {median:.2f}x {other.name} [{q1:.2f}, {q3:.2f}] n={len(found)}"
            say(text)
    say(f"\nnetwork, batch {args.batch_size}, {args.threads} thread{'s' * (args.threads > 1)}")
    for name, microseconds in total.items():
        result[f"us.{name}"] = round(microseconds, 1)
        say(f"  {name:20}{microseconds:12.1f} us")
    result |= {f"ratio.{op}.{other}": round(total[other] / total[op], 3)
               for op in args.ops for other in OPS[op] if total.get(op) and total.get(other)}
    result.update(batch_size=args.batch_size, threads=args.threads)
    return result


if __name__ == "__main__":
    resnet50.run_script(*infer.on_device("layers", main, parse), "tests.bench.kernels")
