"""What fine-tuning reaches: top-1, trained parameters and time of the strategies, and alignment on a shifted copy.

  python -m tests.bench.finetune --data FOLDER --checkpoint FILE [--stride-on 1x1] [--seeds 3] [--strategies head lora]
  python -m tests.bench.finetune ... --strategies --shift inverted    # CORAL and MMD against none, on inverted colours

Every row is `finetune.py` as a person would call it, in a process of its own, once per seed; a shifted copy of FOLDER
is made in a temporary folder, its training images are the unlabelled target and its validation images are scored."""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

from PIL import ImageOps

import data
from resnet50 import UserError, environment, run_script

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SHIFTS = dict(inverted=ImageOps.invert, grey=lambda image: ImageOps.grayscale(image).convert("RGB"))


def get_args_parser():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", required=True, metavar="FOLDER")
    p.add_argument("--checkpoint", required=True, metavar="FILE")
    p.add_argument("--stride-on", choices=("3x3", "1x1"))
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--strategies", nargs="*", default=["head", "gradual", "full", "lora"])
    p.add_argument("--shift", choices=SHIFTS)
    p.add_argument("--align", nargs="*", default=["none", "coral"])
    p.add_argument("--more", default="", metavar="FLAGS", help="for finetune.py, such as '--epochs 5'")
    return p


def shifted(root, change, out):
    """A copy of the images of a folder, each changed"""
    for name in data.images_below(root):
        with open(os.path.join(root, name), "rb") as f:
            image = change(data.decode(f.read()))
        path = os.path.join(out, os.path.splitext(name)[0] + ".jpg")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        image.save(path, "JPEG", quality=95)
    return out


def tune(args, seed, *flags):
    """-> the JSON result of one run"""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "finetune.py", "--data", args.data, "--checkpoint", args.checkpoint, "--out", out,
                   "--seed", str(seed), "--on-corrupt", "skip", *flags, *args.more.split(),
                   *(["--stride-on", args.stride_on] if args.stride_on else [])]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise UserError(done.stderr.splitlines()[-1])
        trained = [line for line in done.stderr.splitlines() if "parameters are trained" in line]
        return dict(json.loads(done.stdout.splitlines()[-1]), trained=trained[-1])  # gradual begins with the head


def main(args):
    print(f"{environment()}\nseeds 0 to {args.seeds - 1}", file=sys.stderr)
    rows = {}

    def add(name, key, *flags):
        found = [tune(args, seed, *flags) for seed in range(args.seeds)]
        values = {k: [r[k] for r in found] for k in (key, "last_top1", "loss", "seconds")}
        rows[name] = dict(mean=round(statistics.mean(values[key]), 2), values=values[key],
                          last=round(statistics.mean(values["last_top1"]), 2),
                          loss=round(statistics.mean(values["loss"]), 4),
                          seconds=round(statistics.median(values["seconds"]), 1))
        print(f"{name:28} {key} {rows[name]['mean']:6.2f} {values[key]}, last epoch {rows[name]['last']:.2f}, "
              f"loss {rows[name]['loss']:.4f}, {rows[name]['seconds']:.0f} s; {found[0]['trained']}",
              file=sys.stderr, flush=True)

    for strategy in args.strategies:
        add(strategy, "top1", "--strategy", strategy)
    if args.shift:
        with tempfile.TemporaryDirectory() as folder:
            target = shifted(args.data, SHIFTS[args.shift], folder)
            for align in args.align:
                add(f"{args.shift}, {align}", "target_top1", "--target-domain", target, "--align", align)
    return rows


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args(), "tests.bench.finetune")
