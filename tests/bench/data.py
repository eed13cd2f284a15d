"""Images per second and core from files to training batches, against torchvision, Pillow and ffcv.

  python -m tests.bench.data                       # photographs of about 500 pixels, 224-pixel crops, one core
  python -m tests.bench.data --data FOLDER --rounds 9 --threads 2

Every contender reads the same images in shuffled batches of 64 with labels, crops and flips them at random, and gives
uint8. All are in one process, on one core, with files in the page cache; they alternate, round by round; figures are
medians with quartiles, ratios those of a round. Then the own loaders again with --threads threads on as many cores.
The ceilings: for pixels the copy of a crop's bytes from and to memory, for JPEGs the decoder alone.
"""
import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from importlib import metadata

import numpy as np
import torch
import torchvision
from PIL import Image, ImageFilter
from torchvision.transforms import v2

import csrc
import data
from resnet50 import PREPROCESS, environment
from tests.bench.infer import bandwidth

BATCH, SIZE = 64, 224
CORES = sorted(os.sched_getaffinity(0))
PHOTOGRAPHS = os.path.join(os.path.dirname(__file__), "..", "..", "..", "shared", "data", "raccoon")
PACKS = {"packed_lossless": dict(mode="lossless"), "packed_jpeg": dict(mode="jpeg", side=400, quality=90),
         "packed_raw": dict(mode="raw", side=256)}


def parse():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", help="JPEGs, in folders of any depth (default: photographs, or drawn ones without them)")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--seconds", type=float, default=1.0, help="of a contender in a round")
    p.add_argument("--threads", type=int, default=len(CORES))
    return p.parse_args()


def make_set(source, root, count=1000):
    """Links to about `count` images, the same over and over or a few of many, in a class folder. -> their names"""
    os.makedirs(os.path.join(root, "a"))
    if not source:
        rng = np.random.default_rng(0)
        for i in range(100):
            coarse, fine = (Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
                            for h, w in ((12, 16), (375, 500)))
            coarse, fine = coarse.resize(fine.size, Image.Resampling.BICUBIC), fine.filter(ImageFilter.GaussianBlur(1))
            Image.blend(coarse, fine, 0.3).save(os.path.join(root, f"{i}.jpg"), quality=90)
        source = root
    names = [n for n in data.images_below(source) if n.lower().endswith((".jpg", ".jpeg"))]
    if not names:
        sys.exit(f"{source}: no JPEGs")
    names = names[::-(-len(names) // count)]
    for i in range(count // len(names) * len(names)):
        os.symlink(os.path.abspath(os.path.join(source, names[i % len(names)])), os.path.join(root, "a", f"{i:06}.jpg"))
    return names


def ours(root, workers):
    files = data.scan_unlabelled(root)
    flags = argparse.ArgumentParser()
    data.add_augment_args(flags)
    images = data.Images(files, lambda _: data.train_transform(SIZE, PREPROCESS, flags.parse_args([])), replace=True)
    order = data.Order(files.labels, BATCH)

    def epochs():  # end to end: of a thousand images there are twenty in a second
        while True:
            yield from order
            order.epoch += 1
    for pixels, labels, _ in data.make_loader(images, epochs(), workers):
        yield len(labels)


def folder(root, transform, loader=torchvision.datasets.folder.default_loader):
    images = torchvision.datasets.ImageFolder(root, transform, loader=loader)
    while True:
        for pixels, labels in torch.utils.data.DataLoader(images, BATCH, shuffle=True, drop_last=True):
            yield len(labels)


def crop_with_pillow(image):
    """Pillow's fastest: decoded smaller where that does, and crop and resize in one"""
    width, height = image.size
    top, left, h, w = RANDOM_CROP.make_params([torch.empty(3, height, width)]).values()
    image.draft("RGB", (SIZE * width // w, SIZE * height // h))
    x, y = image.width / width, image.height / height
    made = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR, reducing_gap=2.0,
                                       box=(left * x, top * y, (left + w) * x, (top + h) * y))
    return torch.from_numpy(np.array(made.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(()) < 0.5 else made))


RANDOM_CROP = v2.RandomResizedCrop(SIZE, antialias=True)


def with_ffcv(root):
    """Its loader, of JPEGs of at most 400 pixels and of pixels of at most 256: -> contenders"""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor
    from ffcv.writer import DatasetWriter
    images = torchvision.datasets.ImageFolder(os.path.join(root, "set"))

    def endless(path):
        pipeline = [RandomResizedCropRGBImageDecoder((SIZE, SIZE)), RandomHorizontalFlip(), ToTensor()]
        loader = Loader(path, batch_size=BATCH, num_workers=1, order=OrderOption.RANDOM, drop_last=True,
                        pipelines=dict(image=pipeline))
        while True:
            for pixels, labels in loader:
                yield len(labels)
    made = {}
    for name, field in (("ffcv_jpeg", dict(write_mode="jpg", max_resolution=400, jpeg_quality=90)),
                        ("ffcv_raw", dict(write_mode="raw", max_resolution=256))):
        path = os.path.join(root, name)
        writer = DatasetWriter(path, dict(image=RGBImageField(**field), label=IntField()), num_workers=1)
        writer.from_indexed_dataset(images)
        made[name] = endless(path)
    return made


def contenders(root):
    def decode_jpeg(path):
        return torchvision.io.decode_image(torchvision.io.read_file(path), torchvision.io.ImageReadMode.RGB)
    usual = [v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()]
    images = os.path.join(root, "set")
    found = {"torchvision": folder(images, v2.Compose([*usual, v2.PILToTensor()])),
             "decode_jpeg": folder(images, v2.Compose(usual), decode_jpeg),
             "pillow": folder(images, crop_with_pillow, Image.open), "folder": ours(images, 1)}
    for name, options in PACKS.items():
        with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
            data.make_pack(images, os.path.join(root, name), **options)
        found[name] = ours(os.path.join(root, name), 1)
    try:
        found |= with_ffcv(root)
    except ImportError as error:
        print(f"ffcv: not here ({error})")
    return found


def rate(batches, seconds):
    """Images per second, by whole batches"""
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        count += next(batches)
    return count / elapsed


def quartiles(values):
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{middle:9.2f} [{low:.2f}, {high:.2f}]"


def ceilings(root):
    """-> images per second of the copies that a crop of packed pixels takes, and of the decoder alone, on one core"""
    pack = data.Pack(os.path.join(root, "packed_raw"))
    seeds = np.arange(len(pack), dtype=np.uint64)
    boxes = data.random_crops(pack.height.astype(int), pack.width.astype(int), seeds, SIZE, 0.08, 0.5)
    moved = 3 * (boxes[:, 2] * boxes[:, 3]).mean() + 2 * 3 * SIZE * SIZE  # read; read for ownership and written
    files = data.scan_unlabelled(os.path.join(root, "set"))
    contents = [torchvision.io.read_file(files.path(i)) for i in range(min(len(files), 200))]
    for _ in range(2):
        start = time.perf_counter()
        for content in contents:
            torchvision.io.decode_jpeg(content, torchvision.io.ImageReadMode.RGB)
        seconds = time.perf_counter() - start
    return bandwidth(1) / moved, len(contents) / seconds


def main():
    args = parse()
    versions = {p: metadata.version(p) for p in ("torch", "torchvision", "pillow", "numpy")}
    with tempfile.TemporaryDirectory() as root:
        source = args.data or (PHOTOGRAPHS if os.path.isdir(PHOTOGRAPHS) else None)
        names = make_set(source, os.path.join(root, "set"))
        os.sched_setaffinity(0, CORES[-1:])
        torch.set_num_threads(1)
        found = contenders(root)
        pack = data.Pack(os.path.join(root, "packed_lossless"))
        print(f"{environment()}\n{versions}, {csrc.isa()}, libjpeg-turbo in the extension: {bool(csrc.libjpeg())}\n"
              f"{len(names)} photographs{'' if source else ', drawn'}, {len(pack) // len(names)} times each: "
              f"{(pack.height.astype(float) * pack.width).mean() / 1e6:.3f} megapixels, "
              f"{np.mean([os.path.getsize(os.path.join(source or root, n)) for n in names]) / 1e3:.0f} kB on average; "
              f"{args.rounds} rounds of {args.seconds:g} s")
        for batches in found.values():  # also compares every checksum, once per process
            rate(batches, args.seconds)
            for _ in range(len(pack) // BATCH):
                next(batches)
        pixels, decoder = ceilings(root)
        print(f"ceilings, images/s: {pixels:.0f} copies of a crop of packed_raw, {decoder:.0f} whole images by "
              "torchvision.io.decode_jpeg")
        rounds = []
        for number in range(args.rounds):
            order = list(found)[::-1 if number % 2 else 1]
            rounds.append({name: rate(found[name], args.seconds) for name in order})
        result = {}
        for name in found:
            over = [r[name] / r["torchvision"] for r in rounds]
            result[f"images_per_second.{name}"] = statistics.median(r[name] for r in rounds)
            result[f"ratio.{name}.torchvision"] = statistics.median(over)
            print(f"{name:16} {quartiles([r[name] for r in rounds])} images/s  {quartiles(over)} x torchvision")
        os.sched_setaffinity(0, CORES[-args.threads:])
        for name in ("folder", *PACKS):
            one, many = (ours(os.path.join(root, name if name in PACKS else "set"), n) for n in (1, args.threads))
            pairs = []
            for number in range(args.rounds + 1):
                pairs.append([rate(many, args.seconds)])
                os.sched_setaffinity(0, CORES[-1:])
                pairs[-1].append(rate(one, args.seconds))
                os.sched_setaffinity(0, CORES[-args.threads:])
            result[f"scaling.{name}.{args.threads}"] = statistics.median(a / b for a, b in pairs[1:])
            print(f"{name:16} {quartiles([a / b for a, b in pairs[1:]])} with {args.threads} threads over one")
        sys.stdout.flush()
        print(json.dumps({k: round(v, 3) for k, v in result.items()}))


if __name__ == "__main__":
    main()
