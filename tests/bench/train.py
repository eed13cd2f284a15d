"""Images per second of a training step and of the whole loop, against torchvision's model in a plain PyTorch loop.

  python -m tests.bench.train                                  # CPU: 64 px, batch 32
  python -m tests.bench.train --device cuda --image-size 224 --batch-size 128 --workers 8

The contenders alternate, round by round, in one process; figures are medians with quartiles. The ceiling is what the
hardware multiplies: one large matrix product in the training dtype, measured in the same run, over the step's 6
operations per MAC.
"""
import argparse
import json
import statistics
import sys
import time

import torch
import torchvision
from torch.nn import functional as F

import data
import train
from resnet50 import PREPROCESS, ResNet50, count_macs, environment


def parse():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--image-size", type=int, default=64)
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--workers", type=int, default=1)
    p.add_argument("--steps", type=int, default=6, help="steps per round")
    p.add_argument("--rounds", type=int, default=7)
    return p.parse_args()


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def contenders(args, device, amp, classes=10):
    """name -> (step(pixels, labels), loader factory). `plain` is what a tutorial writes: channels-first, torchvision's
    folder."""
    torch.manual_seed(0)
    ours = ResNet50(num_classes=classes).to(device, memory_format=torch.channels_last).train()
    if device.type == "cpu":
        train.cpu_convolutions(ours)
    optimizer, loss = train.make_optimizer(ours, "nesterov", 1e-4, 0.9), train.make_loss("ce")
    theirs = torchvision.models.resnet50(num_classes=classes).to(device).train()
    plain = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    mean, std = (torch.tensor(PREPROCESS[k], device=device).view(3, 1, 1) for k in ("mean", "std"))

    def our_step(pixels, labels):
        train.train_step(ours, ours, [(pixels, labels)], optimizer, loss, amp=amp)

    def plain_step(pixels, labels, model=theirs, opt=plain):
        images = (pixels.float() / 255 - mean) / std
        with torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        opt.step()
        opt.zero_grad()
    nhwc = torchvision.models.resnet50(num_classes=classes).to(device, memory_format=torch.channels_last).train()
    other = torch.optim.SGD(nhwc.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    return {"ours": our_step, "plain": plain_step, "plain_channels_last": lambda p, y: plain_step(p, y, nhwc, other)}


def ceiling(device, amp):
    """Operations per second of a 2048-cubed product in the training dtype."""
    a = torch.randn(2048, 2048, device=device, dtype=amp or torch.float32)
    times = []
    for _ in range(8):
        sync(device)
        start = time.perf_counter()
        a @ a
        sync(device)
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times)


def loaders(args, device):
    """Endless batches from the demo set: our loader, and torchvision's ImageFolder with the usual transforms."""
    from torchvision.transforms import v2
    root = data.make_demo()
    files = data.open_folder(root)[0]
    order = data.Order(files.labels, args.batch_size)
    flags = argparse.ArgumentParser()
    data.add_augment_args(flags)
    images = data.Images(files, lambda _: data.train_transform(args.image_size, PREPROCESS, flags.parse_args([])),
                         replace=True)
    ours = data.make_loader(images, order, args.workers, device)
    transform = v2.Compose([v2.RandomResizedCrop(args.image_size, antialias=True), v2.RandomHorizontalFlip(),
                            v2.PILToTensor()])
    folder = torchvision.datasets.ImageFolder(f"{root}/train", transform)
    plain = torch.utils.data.DataLoader(folder, args.batch_size, shuffle=True, num_workers=args.workers, drop_last=True,
                                        pin_memory=device.type == "cuda", persistent_workers=args.workers > 0)

    def endless(loader):
        while True:
            for batch in loader:
                yield batch[0], batch[1]
    return {"ours": endless(ours), "plain": endless(plain)}


def main():
    args = parse()
    device = torch.device(args.device)
    if device.type == "cpu":
        train.keep_freed_memory()  # for all contenders: the ratio then shows the rest
    amp = train.amp_dtype(argparse.Namespace(amp_dtype="auto", eval_only=False), device)
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    for key, value in environment().items():
        say(f"{key:12} {value}")
    peak = ceiling(device, amp)
    macs = sum(count_macs(ResNet50(num_classes=10), args.image_size).values())
    roof = peak / (6 * macs)
    say(f"{args.image_size} px, batch {args.batch_size}, {amp or torch.float32}; "
        f"ceiling {peak / 1e12:.2f} TFLOP/s = {roof:.0f} img/s")
    pixels = torch.randint(0, 256, (args.batch_size, 3, args.image_size, args.image_size), dtype=torch.uint8,
                           device=device)
    channels_last, labels = (pixels.contiguous(memory_format=torch.channels_last),
                             torch.randint(10, (args.batch_size,), device=device))
    steps, feeds = contenders(args, device, amp), loaders(args, device)
    rates, waits = {}, []

    def timed(name, body):
        sync(device)
        start = time.perf_counter()
        for _ in range(args.steps):
            body()
        sync(device)
        rates.setdefault(name, []).append(args.steps * args.batch_size / (time.perf_counter() - start))

    def loop(name):
        start = time.perf_counter()
        x, y = next(feeds[name])
        if name == "ours":
            waits.append(time.perf_counter() - start)
        steps[name](x.to(device, non_blocking=True), y.to(device, non_blocking=True))
    for r in range(args.rounds + 1):
        for name in steps:
            timed(f"step.{name}", lambda name=name: steps[name](channels_last if name == "ours" else pixels, labels))
        for name in feeds:
            timed(f"loop.{name}", lambda name=name: loop(name))
        if r == 0:  # warm-up
            rates.clear()
            waits.clear()
    result = {}
    for name, values in rates.items():
        low, median, high = statistics.quantiles(values, n=4)
        result[name] = round(median, 2)
        say(f"{name:26} {median:8.1f} img/s  [{low:.1f}, {high:.1f}]  {median / roof:.1%} of the ceiling")
    for kind, base in (("step", "plain"), ("step", "plain_channels_last"), ("loop", "plain")):
        pairs = [a / b for a, b in zip(rates[f"{kind}.ours"], rates[f"{kind}.{base}"])]
        result[f"ratio.{kind}.{base}"] = round(statistics.median(pairs), 3)
        say(f"{kind} ours / {base}: {statistics.median(pairs):.2f}x [{min(pairs):.2f}, {max(pairs):.2f}]")
    result["data_wait"] = round(sum(waits) / (args.steps * args.batch_size * sum(1 / r for r in rates["loop.ours"])), 4)
    result.update(image_size=args.image_size, batch_size=args.batch_size, device=args.device, roof=round(roof, 1))
    say(f"share of our loop spent waiting for data: {result['data_wait']:.1%}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
