"""Train ResNet-50 from a folder of images.

  python train.py                                                      # the built-in demo set, minutes on two CPU cores
  python train.py --data /imagenet --recipe v2                         # one GPU, or the CPU where there is none
  torchrun --nproc_per_node=8 train.py --data /imagenet                # one machine, eight GPUs
  torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train.py --data /imagenet
  python train.py --eval-only --checkpoint FILE --data /imagenet       # score a checkpoint

A run is resumed with --resume auto, at any step, by the same command. On the CPU the resumed run ends with the same
bits as an uninterrupted one: order, augmentation, mixing, dropout and learning rate are functions of (seed, step), not
of history.
"""
import argparse
import contextlib
import copy
import ctypes
import datetime
import functools
import html
import importlib
import itertools
import json
import math
import os
import resource
import signal
import sys
import time
import warnings
from fractions import Fraction

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

import data
from resnet50 import (
    PREPROCESS,
    Help,
    ResNet50,
    UserError,
    add_model_args,
    amount,
    below_one,
    between,
    check_sizes,
    cpu_isa,
    device_name,
    find_device,
    finite,
    fraction,
    fuse,
    load_checkpoint,
    load_model,
    load_weights,
    normalize,
    positive,
    predict,
    read_classes,
    run_script,
    save_checkpoint,
    write_atomic,
)

# what shall replace DDP's broadcast_buffers gives every process the first one's statistics when a run is resumed
warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)

# ResNet strikes back (arXiv 2110.00476); its RandAugment strengths 7 +- .5 of 10 are 21 +- 1.5 of 30 here
STRIKES_BACK = dict(
    batch_size=256, lr=5e-3, lr_base_size=2048, opt="lamb", weight_decay=0.02, lr_warmup_epochs=5.0, lr_min=1e-6,
    loss="bce", mixup_alpha=0.1, cutmix_alpha=1.0, auto_augment="ra", ra_magnitude=21, ra_std=1.5, image_size=224,
    val_resize=236, interpolation="bicubic")
# Each recipe is a set of defaults; a flag on the command line wins.
# Learning rates are for a global batch of lr_base_size.
RECIPES = dict(
    demo=dict(epochs=5, batch_size=32, lr=2e-3, lr_base_size=32, opt="adamw", weight_decay=0.05, lr_warmup_epochs=1.0,
              label_smoothing=0.1, image_size=64, crop_scale=0.5, model_ema_decay=0.98),
    v1=dict(  # torchvision IMAGENET1K_V1: 76.13 in 90 epochs, 8 x 32 (ours spares BN and biases the weight decay)
        epochs=90, batch_size=32, lr=0.1, lr_base_size=256, opt="sgd", weight_decay=1e-4, lr_scheduler="multistep",
        lr_milestones=[30, 60], image_size=224),
    v2=dict(  # torchvision IMAGENET1K_V2: 80.86 in 600 epochs, 8 x 128. Their --model-ema-decay 0.99998 is rescaled
        # there by 8 * 128 * 32 / 600; this is the result, per update
        epochs=600, batch_size=128, lr=0.5, lr_base_size=1024, opt="sgd", weight_decay=2e-5, lr_warmup_epochs=5.0,
        lr_warmup_decay=0.01, label_smoothing=0.1, mixup_alpha=0.2, cutmix_alpha=1.0, auto_augment="ta_wide",
        random_erase=0.1, repeated_aug=4, model_ema_decay=1 - 2e-5 * 8 * 128 * 32 / 600, model_ema_steps=32,
        image_size=176, val_size=224, val_resize=232),
    a1=dict(STRIKES_BACK, epochs=600, weight_decay=0.01, label_smoothing=0.1, mixup_alpha=0.2, repeated_aug=3,
            drop_path=0.05),  # 80.4
    a2=dict(STRIKES_BACK, epochs=300, repeated_aug=3, drop_path=0.05),  # 79.8
    a3=dict(STRIKES_BACK, epochs=100, lr=8e-3, ra_magnitude=18, image_size=160, val_size=224),  # 78.1
    fast=dict(  # FFCV's schedule without its blur pooling: 16 epochs 73.8, with --epochs 88 78.4 there
        epochs=16, batch_size=512, lr=1.7, lr_base_size=4096, opt="sgd", weight_decay=1e-4, lr_scheduler="linear",
        lr_warmup_epochs=2.0, lr_warmup_decay=1e-4, label_smoothing=0.1, image_size=192, progressive=[160, 0.74, 0.86],
        val_size=224, val_resize=256, tta=True),
)
TOTALS = ("loss_sum", "correct", "count", "skipped")  # what processes add up: of the epoch so far; steps of the run
SWA_BATCHES = 64  # of training images, from which the averaged weights' batch-norm statistics come
LOGGERS = dict(tensorboard="torch.utils.tensorboard", mlflow="mlflow", wandb="wandb")  # flag, and package: module
RUN_FILES = ("best.pt", "last.pt", "metrics.jsonl", "curves.svg")  # which --overwrite deletes
SCORES = ("recipe", "data", "out", "config", "eval_only", "fused", "batch_size", "workers", "val_split", "on_corrupt",
          "exif", "device", "amp_dtype", "compile", "deterministic", "dist_timeout", "image_size", "val_size",
          "val_resize", "interpolation", "tta", "checkpoint", "weights", "stride_on", "attention", "stem",
          "num_classes", "classes", "seed", "log_every")  # what --eval-only reads; the last two are in scripts by habit
NOT_SAVED = ("resume", "overwrite", "config", "eval_only", "fused")  # what args.json does not repeat in another run


class Parser(argparse.ArgumentParser):
    """Defaults come from the recipe, usual(args) where none is named, then from --config or the resumed run's
    args.json; flags win over both. --help shows those that its own command line would have."""

    def __init__(self, recipes, usual, **options):
        super().__init__(formatter_class=Help, **options)
        self.recipes, self.usual = recipes, usual

    def parse_known_args(self, args=None, namespace=None):
        words = [w for w in (sys.argv[1:] if args is None else args) if w not in ("-h", "--help")]
        first, _ = super().parse_known_args(words, argparse.Namespace())
        saved, known = {}, {a.dest for a in self._actions}
        try:
            path = first.config or (first.resume and resumed_args_path(first))
            if path:
                with open(path, encoding="utf-8") as f:
                    saved = dict(json.load(f))
                unknown = sorted(set(saved) - known)
                if unknown:
                    self.error(f"{path}: unknown key{'s' * (len(unknown) > 1)} {', '.join(unknown)}")
                saved = {a.dest: self.checked(path, a, saved[a.dest]) for a in self._actions
                         if saved.get(a.dest) is not None}  # null is no value
                # with a value for every flag: nothing would be left of another recipe but its name
                asked = getattr(first, "recipe", None)
                if asked not in (None, saved.get("recipe", asked)):
                    self.error(f"{path}: has the values of --recipe {saved['recipe']}, not of {asked}")
            if first.resume not in (None, "auto"):  # args.json may have another name, of before it was moved
                saved["out"] = os.path.dirname(first.resume) or "."
        except (OSError, ValueError, TypeError) as error:
            self.error(f"{path}: {error}")
        given = argparse.Namespace(**{k: v if v is not None else saved.get(k) for k, v in vars(first).items()})
        name = getattr(given, "recipe", None) or self.usual(given)
        recipe = dict(self.recipes[name])
        if given.image_size not in (None, recipe["image_size"]):
            for key in ("val_size", "val_resize", "progressive"):  # these belong to the recipe's own image size
                recipe.pop(key, None)
        if first.eval_only:  # the checkpoint says how it wants its images, unless the command line does
            recipe.update(dict.fromkeys(known & {"image_size", "val_size", "val_resize", "interpolation", "max_size"}))
        self.set_defaults(**{**recipe, **saved, **({"recipe": name} if "recipe" in known else {})})
        return super().parse_known_args(args, namespace)

    def checked(self, path, action, value):
        """-> a file's value for a flag, as if it had been given on the command line"""
        if action.nargs == 0:
            fits = isinstance(value, bool)
        elif fits := isinstance(value, list) == (action.nargs not in (None, "?")):
            items = value if isinstance(value, list) else [value]
            try:
                if action.type:
                    items = [action.type(v if isinstance(v, str) else json.dumps(v)) for v in items]
                fits = (action.nargs in (None, "?", len(items)) or action.nargs == "+" and items) and all(
                    v in action.choices if action.choices else action.type or isinstance(v, str) for v in items)
                value = items if isinstance(value, list) else items[0]
            except (ValueError, TypeError, argparse.ArgumentTypeError):
                fits = False
        if not fits:
            self.error(f"{path}: {action.dest}: {json.dumps(value)} is no value for {action.option_strings[0]}")
        return value


def resumed_args_path(args):
    folder = args.out if args.resume == "auto" else os.path.dirname(args.resume)
    path = os.path.join(folder, "args.json")
    return path if os.path.exists(path) else None


def batch_size(text):
    return text if text == "auto" else positive(text)


def get_args_parser():
    p = Parser(RECIPES, lambda args: "v1" if args.data else "demo", prog="train.py",
               description="Train ResNet-50 on a folder of images.",
               epilog="The defaults are those of --recipe: with --recipe NAME --help, NAME's.")
    p.add_argument("--recipe", choices=RECIPES, help="set of defaults; demo without --data, else v1")
    return add_training_args(p)


def add_training_args(p):
    """The flags that train() reads, into a Parser"""
    local = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    g = p.add_argument_group("run")
    g.add_argument("--data", metavar="FOLDER",
                   help="train/ and val/ with a folder per class, or one folder of them; none: the demo set")
    g.add_argument("--out", default="runs/train", metavar="FOLDER",
                   help="checkpoints, metrics.jsonl, args.json, curves.svg")
    g.add_argument("--config", metavar="FILE", help="JSON of flags, such as an earlier run's args.json")
    g.add_argument("--resume", nargs="?", const="auto", metavar="PATH",
                   help="go on from PATH, in its folder without --out; with 'auto' from OUT/last.pt if it is there")
    g.add_argument("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    g.add_argument("--eval-only", action="store_true", help="score a checkpoint (default: OUT/best.pt) and stop")
    g.add_argument("--fused", action="store_true", help="with --eval-only: convolution, batch-norm, ReLU in one kernel")
    g.add_argument("--epochs", type=positive, metavar="N")
    g.add_argument("--batch-size", type=batch_size, metavar="N",
                   help="images per process and forward pass; 'auto': the largest that fits")
    g.add_argument("--accumulate", type=positive, default=1, metavar="N", help="forward passes per optimizer step")
    g.add_argument("--workers", type=between(0), default=max(1, min(8, (os.cpu_count() or 1) // local)), metavar="N",
                   help="loader threads; processes where augmentations follow the crop")
    g.add_argument("--shuffle-chunk", type=between(0), default=0, metavar="N",
                   help="use N neighbouring images near to one another, so that a pack larger than memory is read in "
                        f"pieces of N; {data.MIXED} such chunks are mixed (default: every image by itself)")
    g.add_argument("--val-split", type=float, metavar="F",
                   help="share held out where there is no val/ (0.1 if not given)")
    g.add_argument("--on-corrupt", choices=("error", "skip"), default="error", help="for files that do not decode")
    g.add_argument("--exif", action="store_true", help="turn photographs as their EXIF orientation says")
    g.add_argument("--seed", type=between(0, 2 ** 63 - 1), default=0)
    g.add_argument("--device", type=device_name, default="cuda" if torch.cuda.is_available() else "cpu")
    g.add_argument("--amp-dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                   help="auto: bfloat16 where the hardware multiplies it, and float32 with --eval-only")
    g.add_argument("--compile", action="store_true", help="torch.compile")
    g.add_argument("--grad-checkpointing", action="store_true",
                   help="recompute blocks in the backward pass: less memory, more time")
    g.add_argument("--deterministic", action="store_true",
                   help="deterministic algorithms on CUDA too (on the CPU they always are)")
    g.add_argument("--sync-bn", action="store_true", help="batch statistics over all processes")
    g.add_argument("--fused-bn", action="store_true", help="batch-norm, residual and ReLU as one kernel of csrc/")
    g.add_argument("--dist-timeout", type=positive, default=600, metavar="S",
                   help="seconds a process waits for the others")
    g.add_argument("--save-every", type=between(0), default=0, metavar="STEPS",
                   help="write last.pt every so many steps, not only each epoch")
    g.add_argument("--max-skips", type=between(0), default=10, metavar="N",
                   help="steps with a non-finite gradient skipped in a row before giving up")
    g.add_argument("--patience", type=between(0), default=0, metavar="N",
                   help="stop after so many epochs without a better one")
    g.add_argument("--best-by", choices=("top1", "loss"), default="top1",
                   help="what makes an epoch better, on validation: best.pt and --patience go by it")
    g.add_argument("--log-every", type=positive, default=20, metavar="STEPS")
    g.add_argument("--tensorboard", action="store_true", help="log to OUT/tensorboard too")
    g.add_argument("--mlflow", action="store_true", help="log to MLflow too")
    g.add_argument("--wandb", action="store_true", help="log to Weights & Biases too, offline")
    g = p.add_argument_group("images")
    g.add_argument("--image-size", type=positive, metavar="PX",
                   help="crop for training, and for evaluation if --val-size is not given")
    g.add_argument("--val-size", type=positive, metavar="PX", help="evaluation crop")
    g.add_argument("--val-resize", type=positive, metavar="PX",
                   help="short side before that crop (8/7 of it; below 128 px the crop itself)")
    g.add_argument("--interpolation", choices=("bilinear", "bicubic"), default="bilinear")
    g.add_argument("--progressive", type=float, nargs=3, metavar=("PX", "FROM", "TO"),
                   help="train at PX (rounded to 16) until the share FROM of the epochs, growing to --image-size at TO")
    g.add_argument("--tta", action="store_true", help="evaluate on the mean of the image and its mirror image")
    data.add_augment_args(p)
    g = p.add_argument_group("optimization")
    g.add_argument("--opt", choices=("sgd", "nesterov", "adamw", "lars", "lamb"), default="nesterov")
    g.add_argument("--lr", type=amount, help="for a global batch of --lr-base-size; scaled linearly with the batch")
    g.add_argument("--lr-base-size", type=between(0), default=256, metavar="N", help="0: take --lr as it is")
    g.add_argument("--momentum", type=below_one, default=0.9)
    g.add_argument("--weight-decay", type=amount, default=1e-4, help="not applied to batch-norm and biases")
    g.add_argument("--lr-scheduler", choices=("cosine", "multistep", "linear", "restarts"), default="cosine")
    g.add_argument("--lr-warmup-epochs", type=amount, default=0.0)
    g.add_argument("--lr-warmup-decay", type=fraction, default=0.01, metavar="F",
                   help="share of the rate at the first step")
    g.add_argument("--lr-min", type=amount, default=0.0, help="rate at the end of cosine and linear")
    g.add_argument("--lr-milestones", type=between(0), nargs="+", default=[30, 60], metavar="EPOCH")
    g.add_argument("--lr-gamma", type=amount, default=0.1)
    g.add_argument("--lr-restart-epochs", type=between(0.0, kind=float, above=True), default=10.0, metavar="N",
                   help="first cycle of 'restarts'; each next one is twice as long")
    g.add_argument("--loss", choices=("ce", "bce", "focal"), default="ce")
    g.add_argument("--label-smoothing", type=below_one, default=0.0)
    g.add_argument("--focal-gamma", type=amount, default=2.0)
    g.add_argument("--class-weights", choices=("none", "balanced"), default="none",
                   help="balanced: inverse class frequency")
    g.add_argument("--clip-grad-norm", type=amount, default=0.0, metavar="NORM")
    g.add_argument("--model-ema-decay", type=below_one, default=0.0, metavar="D",
                   help="moving average of the weights: share kept per update")
    g.add_argument("--model-ema-steps", type=positive, default=1, metavar="STEPS", help="steps per update")
    g.add_argument("--swa-start", type=below_one, metavar="F",
                   help="from this share of the epochs on evaluate and save the mean of their weights")
    g = add_model_args(p)
    g.add_argument("--drop-path", type=below_one, metavar="P",
                   help="stochastic depth at the last block, growing from 0")
    g.add_argument("--dropout", type=below_one, metavar="P", help="before the classifier")
    return p


# -------------------------------------------------------------------------------------------------- processes

class World:
    """This process among the others, as torchrun's environment says. `control` is a gloo group beside NCCL for what
    lives on the CPU: flags, counts, names."""

    def __init__(self, device="cpu", timeout=600):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank, self.local_size = (int(os.environ.get("LOCAL_RANK", 0)),
                                            int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self.device, self.control, self.store = find_device(device), None, None
        self.begun, self.made = set(), []  # runs, and their folders
        if self.device.type == "cuda":
            if self.device.index is not None and self.local_size > 1:
                raise UserError(f"--device {device}: one GPU for {self.local_size} processes; cuda gives each its own",
                                code=2)
            self.device = find_device(f"cuda:{self.local_rank if self.device.index is None else self.device.index}")
            torch.cuda.set_device(self.device)
        elif self.size > 1:
            # torchrun leaves 1, however many cores
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.local_size))
        wait = datetime.timedelta(seconds=timeout)
        if self.size > 1 or dist.is_torchelastic_launched():
            self.store, _, _ = next(rendezvous("env://", timeout=wait))
        if self.size > 1:
            # torchrun keeps one store over its restarts; without a prefix a restarted process may find a dead one's
            # address there and wait for it (seen with gloo, three processes, torch 2.15). On several machines the
            # counts can differ.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if self.local_size == self.size else "0"
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo",
                                    store=dist.PrefixStore(f"attempt {attempt}", self.store),
                                    rank=self.rank, world_size=self.size, timeout=wait)
            self.control = dist.new_group(backend="gloo", timeout=wait)

    def sum(self, *numbers):
        """Sums over the processes, in float64 (exact for counts)."""
        total = torch.tensor(numbers, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(total, group=self.control)
        return total.tolist()

    def gather(self, value):
        """-> the picklable `value` of every process, in rank order."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def barrier(self):
        if self.size > 1:
            dist.barrier(group=self.control)

    def begin(self, out):
        """Notes, where torchrun keeps it for the attempts after this one, that the run in `out` is ours"""
        self.begun.add(os.path.abspath(out))
        if self.store is not None:
            self.store.set(os.path.abspath(out), "begun")

    def restarted(self, out):
        """-> whether an attempt before this one has begun the run in `out` (torchrun --max-restarts)"""
        path = os.path.abspath(out)
        return self.gather(self.rank == 0 and self.store is not None and path not in self.begun
                           and self.store.check([path]))[0]

    def close(self):
        for path in reversed(self.made):  # empty still where the run was refused
            with contextlib.suppress(OSError):
                os.rmdir(path)
        if self.size > 1:
            dist.destroy_process_group()


class Stop:
    """SIGTERM, SIGINT and SIGUSR1 ask for a stop; poll() tells every process of it at the same step. The flags travel
    while the next step computes, so polling costs nothing and the answer is one step old."""

    def __init__(self, world):
        self.world, self.requested, self.pending = world, None, None
        self.previous = {s: signal.signal(s, self.request) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}

    def request(self, number, _):
        self.requested = signal.Signals(number).name

    def poll(self):
        wanted = self.requested is not None
        if self.world.size == 1:
            return wanted
        if self.pending is not None:
            work, flag = self.pending
            work.wait()
            if flag.item():  # once agreed it stays so
                return True
        flag = torch.tensor([int(wanted)])
        self.pending = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.world.control, async_op=True), flag
        return False

    def close(self):
        if self.pending is not None:
            with contextlib.suppress(RuntimeError):
                self.pending[0].wait()
        for number, handler in self.previous.items():
            signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------- optimization

def with_gradients(optimizer):
    """-> its groups, and of each the parameters that have gradients, if there are any. All of them are updated at once:
    one by one they are thousands of launches, for which a GPU waits"""
    for group in optimizer.param_groups:
        if weights := [p for p in group["params"] if p.grad is not None]:
            yield group, weights


def scale(updates, weights, others, ratio):
    """Multiplies updates of what has more than one dimension, in place, by ratio(norms of the weights, of the others)
    where neither is zero."""
    if rows := [row for row in zip(updates, weights, others) if row[1].ndim > 1]:
        updates, *pair = zip(*rows)
        norms = [torch.stack(torch._foreach_norm(tensors)) for tensors in pair]
        torch._foreach_mul_(updates, torch.where((norms[0] > 0) & (norms[1] > 0), ratio(*norms), 1.0).unbind())


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose rate is scaled per layer by trust * |w| / (|g| + decay * |w|) (You et al., arXiv
    1708.03888). One-dimensional parameters are not scaled."""

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust=0.001):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust))

    @torch.no_grad()
    def step(self):
        for group, weights in with_gradients(self):
            gradients, decay = [p.grad for p in weights], group["weight_decay"]
            updates = torch._foreach_add(gradients, weights, alpha=decay)
            scale(updates, weights, gradients, lambda weight, gradient: group["trust"] * weight / (
                gradient + decay * weight))
            for p in weights:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum"] for p in weights]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, updates)
            torch._foreach_add_(weights, momenta, alpha=-group["lr"])


class LAMB(torch.optim.Optimizer):
    """Adam with decoupled decay whose step is scaled per layer by |w| / |step| (You et al., arXiv 1904.00962),
    bias-corrected. Parameters without decay (one-dimensional) are not scaled."""

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group, weights in with_gradients(self):
            (b1, b2), gradients = group["betas"], [p.grad for p in weights]
            for p in weights:
                if not self.state[p]:
                    self.state[p].update(step=0, first=torch.zeros_like(p), second=torch.zeros_like(p))
                self.state[p]["step"] += 1
            steps, first, second = ([self.state[p][key] for p in weights] for key in ("step", "first", "second"))
            torch._foreach_lerp_(first, gradients, 1 - b1)
            torch._foreach_mul_(second, b2)
            torch._foreach_addcmul_(second, gradients, gradients, 1 - b2)
            updates = torch._foreach_div(first, [1 - b1 ** step for step in steps])
            roots = torch._foreach_div(second, [1 - b2 ** step for step in steps])
            torch._foreach_sqrt_(roots)
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_div_(updates, roots)
            torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
            scale(updates, weights, updates, torch.div)
            torch._foreach_add_(weights, updates, alpha=-group["lr"])


def begin_momentum(optimizer, *_):
    """Gives what is trained for the first time a momentum of zero: where stages are unfrozen one by one, SGD's fused
    step takes no group of which only some parameters have one"""
    for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        optimizer.state[p].setdefault("momentum_buffer", torch.zeros_like(p))


def make_optimizer(model, name, weight_decay, momentum, share=lambda name: 1.0):
    """Weight decay on what has more than one dimension: not on batch-norm, not on biases. The rate is set at every
    step, in each group to `lr_share` of the schedule's, which is share(parameter's name)."""
    trained = [((share(key), p.ndim > 1), p) for key, p in model.named_parameters() if p.requires_grad]
    # always both groups, the decayed one first: what last.pt holds
    groups = [dict(params=[p for kind, p in trained if kind == (part, decays)], lr_share=part,
                   weight_decay=weight_decay if decays else 0.0)
              for part in sorted({part for (part, _), _ in trained}, reverse=True) for decays in (True, False)]
    if name in ("sgd", "nesterov"):
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=momentum, nesterov=name == "nesterov", fused=True)
        if momentum:
            optimizer.register_step_pre_hook(begin_momentum)
        return optimizer
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.1, fused=True)
    return LARS(groups, lr=0.1, momentum=momentum) if name == "lars" else LAMB(groups, lr=0.1)


def lr_at(epoch, args, peak):
    """Learning rate at a fractional epoch."""
    warm = args.lr_warmup_epochs
    if epoch < warm:
        return peak * (args.lr_warmup_decay + (1 - args.lr_warmup_decay) * epoch / warm)
    if args.lr_scheduler == "multistep":
        return peak * args.lr_gamma ** sum(epoch >= m for m in args.lr_milestones)
    share = (epoch - warm) / max(args.epochs - warm, 1e-9)
    if args.lr_scheduler == "restarts":  # arXiv 1608.03983, T_mult = 2
        length, at = args.lr_restart_epochs, epoch - warm
        while at >= length:
            at, length = at - length, length * 2
        share = at / length
    fall = 1 - share if args.lr_scheduler == "linear" else (1 + math.cos(math.pi * share)) / 2
    return args.lr_min + (peak - args.lr_min) * fall


def size_at(epoch, args):
    """Training crop of an epoch, in pixels; multiples of 16 while it grows."""
    if not args.progressive:
        return args.image_size
    start, begin, end = args.progressive
    share = min(max((epoch / args.epochs - begin) / max(end - begin, 1e-9), 0), 1)
    return args.image_size if share == 1 else int(round((start + (args.image_size - start) * share) / 16) * 16)


def make_loss(kind, smoothing=0.0, gamma=2.0, weights=None):
    """-> callable (logits float (N, C), target, images) -> scalar. Target: indices (N,), or probabilities (N, C) after
    mixing. The images are there for a teacher (compress.py) and not looked at."""
    def loss(logits, target, images=None):
        if kind == "ce":
            return F.cross_entropy(logits, target, weights, label_smoothing=smoothing)
        p = target if target.ndim == 2 else F.one_hot(target, logits.shape[1]).to(logits.dtype)
        p = p * (1 - smoothing) + smoothing / logits.shape[1]
        if kind == "bce":  # summed over classes: the gradient's size does not fall with their number
            return F.binary_cross_entropy_with_logits(logits, p, reduction="sum") / len(logits)
        log = logits.log_softmax(1)  # focal loss, arXiv 1708.02002
        # 1 - exp(log), but never 0, where a power below 1 has no gradient
        rest = (-log.expm1()).clamp(min=torch.finfo(log.dtype).tiny)
        terms = p * rest ** gamma * log
        return -(terms if weights is None else terms * weights).sum() / len(logits)
    return loss


def loss_of(args, files, classes, device):
    """make_loss() as the flags ask, for these training Files"""
    weights = None
    if args.class_weights == "balanced":
        counts = torch.from_numpy(np.bincount(files.labels, minlength=len(classes))).float().clamp(min=1)
        weights = (counts.sum() / counts / len(classes)).to(device)
    return make_loss(args.loss, args.label_smoothing, args.focal_gamma, weights)


class EMA:
    """Exponential moving average of weights and batch-norm statistics; integer buffers are copied. The decay grows as
    (1 + t) / (10 + t) at first, so that short runs are not held back by the initial weights. With decay None it is the
    plain mean of all updates (SWA, arXiv 1803.05407)."""

    def __init__(self, model, decay):
        self.model, self.decay, self.updates = copy.deepcopy(model).eval().requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, model):
        self.updates += 1
        mine, theirs = list(self.model.state_dict().values()), list(model.state_dict().values())
        floats = [i for i, t in enumerate(mine) if t.is_floating_point()]
        decay = (1 - 1 / self.updates if self.decay is None
                 else min(self.decay, (1 + self.updates) / (10 + self.updates)))
        torch._foreach_lerp_([mine[i] for i in floats], [theirs[i] for i in floats], 1 - decay)
        for i in set(range(len(mine))) - set(floats):
            mine[i].copy_(theirs[i])


def statistics(model):
    """-> the batch-norm buffers of a model, floats and counters."""
    return [b for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
            for b in m.buffers(recurse=False)]


def float_statistics(models):
    """-> the batch-norm buffers of all models that are floats, and their values as one float64 tensor"""
    buffers = [b for model in models for b in statistics(model) if b.is_floating_point()]
    return buffers, torch.cat([b.double().flatten() for b in buffers] or [torch.zeros(0, dtype=torch.float64)])


@torch.no_grad()
def set_statistics(models, values):
    """float_statistics' values into the buffers"""
    buffers, _ = float_statistics(models)
    for buffer, part in zip(buffers, values.split([b.numel() for b in buffers])):
        buffer.copy_(part.view_as(buffer))


def average_statistics(world, models):
    """Every process has seen other images; before evaluation their batch-norm statistics are averaged. In float64, so
    that averaging what is equal already changes no bit (a run stopped in its evaluation does it twice)."""
    buffers, values = float_statistics(models)
    if world.size > 1 and buffers:
        dist.all_reduce(values)
        set_statistics(models, values / world.size)


def recalibrate(model, batches):
    """Batch-norm statistics anew, as plain means over the batches of pixels; nothing else changes."""
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and not isinstance(m, FrozenNorm) for m in model.modules()):
        update_bn((normalize(p, model.preprocess) for p in batches if len(p) > 1), model.eval())


def classify(net, model, pixels, labels, loss_fn, mixer=None, amp=None):
    """uint8 pixels (N, 3, H, W), labels (N,) -> loss, number of correct predictions"""
    images = normalize(pixels, model.preprocess)
    images, target = mixer(images, labels) if mixer else (images, labels)
    with torch.autocast(pixels.device.type, amp or torch.bfloat16, enabled=amp is not None):
        logits = net(images)
    loss = loss_fn(logits.float(), target, images)
    return loss, (logits.argmax(1) == (target.argmax(1) if mixer else labels)).sum()


def train_step(net, model, batches, optimizer, loss_fn, *, scaler=None, mixer=None, amp=None, clip=0.0,
               forward=classify):
    """One optimizer step over `batches`, a list of (uint8 pixels, labels) on the device. `net` is `model` or a wrapper
    of it. -> (loss, correct predictions: device tensors summed over the batches; True if the step was applied).
    A non-finite gradient applies nothing: weights, optimizer and batch-norm statistics stay as they were."""
    scaler = scaler or torch.amp.GradScaler(enabled=False)  # which passes everything through
    before = [b.clone() for b in statistics(model)]
    loss_sum = correct = 0
    for i, (pixels, labels) in enumerate(batches):
        last = i == len(batches) - 1
        with contextlib.nullcontext() if last or not hasattr(net, "no_sync") else net.no_sync():
            loss, right = forward(net, model, pixels, labels, loss_fn, mixer, amp)
            loss = loss / len(batches)
            scaler.scale(loss).backward()
        loss_sum = loss_sum + loss.detach()
        correct = correct + right
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    finite = bool(torch.isfinite(norm))  # waits for the device, once a step; the price of never applying a NaN
    if finite:
        if clip:
            nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        scaler.step(optimizer)
    else:
        for buffer, value in zip(statistics(model), before):
            buffer.copy_(value)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss_sum, correct, finite


@torch.no_grad()
def evaluate(model, dataset, batch_size, world, *, workers=0, amp=None, tta=False, loader=None,
             poll=lambda: False, on_corrupt="error", outputs=None):
    """Exact over all processes: every image once, sums and counts added, the total checked. -> dict(top1, top5 in
    percent, loss, images, corrupt), or None if poll() said stop. `model` takes pixels through predict() and is left in
    evaluation mode. A list `outputs` receives the logits of this process's images, in order, on the CPU; a label of
    -100 is none."""
    device = world.device
    loader = loader or data.make_loader(dataset,
                                        data.eval_batches(len(dataset.files), batch_size, world.rank, world.size),
                                        workers, device)
    model.eval()
    sums, complaints = torch.zeros(4, dtype=torch.float64, device=device), []
    batches = iter(loader)
    # the same number everywhere: polling is collective
    for _ in range(len(data.eval_batches(len(dataset.files), batch_size, 0, world.size))):
        if poll():
            return None
        pixels, labels, bad = next(batches, (None, (), ()))
        complaints += bad
        check_corrupt(bad, on_corrupt)
        if not len(labels):
            continue
        with torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None):
            logits = predict(model, pixels)
            if tta:
                logits = (logits + predict(model, pixels.flip(3))) / 2
        if outputs is not None:
            outputs.append(logits.cpu())
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        sums += torch.stack([hits[:, 0].sum(), hits.sum(), F.cross_entropy(logits, labels, reduction="sum"),
                             labels.new_full((), len(labels))]).double()  # no copy, which the GPU would be waited for
    top1, top5, loss, n = world.sum(*sums.tolist())
    damaged = sorted(itertools.chain(*world.gather(complaints)))
    if n + len(damaged) != len(dataset.files):
        raise RuntimeError(f"evaluation saw {n:.0f} + {len(damaged)} of {len(dataset.files)} images")
    if world.rank == 0:
        name_damaged("evaluation", *damaged)
    if not n:
        raise UserError("no image of the validation set could be decoded")
    return dict(top1=round(100 * top1 / n, 4), top5=round(100 * top5 / n, 4), loss=round(loss / n, 6),
                images=int(n), corrupt=len(damaged))


@functools.cache
def name_damaged(use, *complaints):
    """Says what was left out, once where the same images are scored again"""
    if complaints:
        data.progress(f"{len(complaints)} damaged files skipped in {use}: " + "; ".join(complaints[:10]), last=True)


def check_corrupt(complaints, policy):
    if complaints and policy == "error":
        raise UserError(f"{complaints[0]} (--on-corrupt skip goes on without such files)")


# ---------------------------------------------------------------------------------------------------- logging

class RunLog:
    """metrics.jsonl, the line on the terminal, curves.svg, and other tools' logs. Only rank 0 has one that writes."""

    def __init__(self, args, world, resumed=None):
        self.on, self.out, self.path = world.rank == 0, args.out, os.path.join(args.out, "metrics.jsonl")
        self.records, self.sinks = [], []
        if not self.on:
            return
        if resumed and os.path.exists(self.path):  # a killed run has logged past its last checkpoint
            try:
                with open(self.path, encoding="utf-8") as f:
                    lines = [line for line in f if line.endswith("\n")]
                self.records = [r for r in map(json.loads, lines) if r["step"] <= resumed["step"]
                                and (r["event"] != "epoch" or r["epoch"] <= resumed["epoch"])]
            except (OSError, ValueError, LookupError, TypeError) as error:
                raise UserError(f"{self.path}: {type(error).__name__}: {error}") from error
        write_atomic(self.path, "".join(json.dumps(r) + "\n" for r in self.records).encode())
        self.file = open(self.path, "a", encoding="utf-8")
        self.add_sinks(args, resumed["step"] + 1 if resumed else 0)

    def add_sinks(self, args, step):
        def numbers(r, between="/"):
            return {f"{r['event']}{between}{k}": v for k, v in r.items() if isinstance(v, (int, float)) and k != "step"}
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            # what a killed or overwritten run has logged from this step on is not shown
            writer = SummaryWriter(os.path.join(self.out, "tensorboard"), purge_step=step)
            self.sinks.append(lambda r: [writer.add_scalar(k, v, r["step"]) for k, v in numbers(r).items()]
                              + [writer.flush()])
        if args.mlflow:
            import mlflow
            mlflow.end_run()  # that of an earlier part, such as the head's
            mlflow.start_run(run_name=self.out)
            mlflow.log_params({k: str(v)[:250] for k, v in vars(args).items()})
            self.sinks.append(lambda r: mlflow.log_metrics(numbers(r, "."), step=r["step"]))
        if args.wandb:
            import wandb
            wandb.finish()
            run = wandb.init(mode="offline", dir=self.out, project="resnet50", config=vars(args))
            self.sinks.append(lambda r: run.log(numbers(r), step=r["step"]))

    def say(self, text, last=True):
        if self.on:
            data.progress(text, last)

    def write(self, event, **values):
        if self.on:
            record = finite(dict(event=event, **values))
            self.records.append(record)
            try:
                self.file.write(json.dumps(record) + "\n")
                self.file.flush()
            except OSError as error:
                raise UserError(f"{self.path}: {error.strerror}") from error
            for sink in self.sinks:
                sink(record)
            if event == "epoch":
                write_atomic(os.path.join(self.out, "curves.svg"), curves_svg(self.records).encode())


def curves_svg(records):
    """Records of metrics.jsonl -> an SVG with loss, top-1 (of a detector mAP) and learning rate over epochs."""
    def curve(name, colour, event, key):
        return name, colour, [(r["epoch"], r[key]) for r in records
                              if r["event"] == event and r.get(key) is not None and math.isfinite(r[key])]
    key, title = ("map50", "mAP@0.5") if any("map50" in r for r in records) else ("top1", "top-1")
    panels = [(title, [curve("training", "#4878a8", "step", mine), curve("validation", "#c05020", "epoch", theirs)])
              for title, mine, theirs in (("loss", "loss", "loss"), (f"{title}, %", "top1", key))]
    panels.append(("learning rate", [curve("", "#508050", "step", "lr")]))
    width, height, left, top, gap = 760, 190, 70, 34, 68
    right = max((r["epoch"] for r in records), default=1) or 1

    def ticks(low, high):
        raw = (high - low) / 4 or 1
        unit = 10 ** math.floor(math.log10(raw))
        step = next(u * unit for u in (1, 2, 5, 10) if u * unit >= raw)
        return [round(i * step, 10) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]

    total = top + len(panels) * (height + gap)
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 30} {total}" '
           'font-family="sans-serif" font-size="12">',
           '<rect width="100%" height="100%" fill="white"/>']
    for i, (title, series) in enumerate(panels):
        values = [y for _, _, points in series for _, y in points] or [0, 1]
        low, high = min(0, min(values)), max(values) or 1
        y0 = top + i * (height + gap)
        px = lambda x: left + x / right * width  # noqa: E731
        py = lambda y: y0 + height - (y - low) / (high - low or 1) * height  # noqa: E731
        svg.append(f'<text x="{left}" y="{y0 - 10}" font-weight="bold">{html.escape(title)}</text>')
        for t in ticks(low, high):
            svg.append(f'<path d="M{left} {py(t):.1f}H{left + width}" stroke="#ddd"/>'
                       f'<text x="{left - 8}" y="{py(t) + 4:.1f}" text-anchor="end">{t:g}</text>')
        for t in ticks(0, right):
            svg.append(f'<text x="{px(t):.1f}" y="{y0 + height + 17}" text-anchor="middle">{t:g}</text>')
        svg.append(f'<text x="{left + width}" y="{y0 + height + 32}" text-anchor="end" fill="#666">epoch</text>')
        for j, (name, colour, points) in enumerate(series):
            path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)
            svg.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
            svg += [f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="2.6" fill="{colour}">'
                    f'<title>epoch {x:g}: {y:g}</title></circle>'
                    for x, y in (points if name == "validation" else points[-1:])]
            if name:
                svg.append(f'<text x="{left + width - 160 + 80 * j}" y="{y0 - 10}" fill="{colour}">{name}</text>')
    return "\n".join(svg + ["</svg>"])


def memory_gib(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# -------------------------------------------------------------------------------------------------- the parts

def keep_freed_memory():
    """glibc returns every large tensor to the system when it is freed, and the next one pays for fresh zeroed pages: 15
    to 50 % of a CPU training step. These settings keep freed memory in the process. Elsewhere than glibc nothing
    happens."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own per block
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap


class FlatConv(nn.Conv2d):
    """A 1x1 convolution as the matrix product that it is. oneDNN's backward pass of small convolutions spends most of
    its time on blocked weight layouts; as a product a training step on the CPU takes half to nine tenths of the time.
    Without gradients the convolution is faster and runs."""

    def _conv_forward(self, x, weight, bias):  # (N, C, H, W) channels_last -> same
        if not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
            return super()._conv_forward(x, weight, bias)
        x = x[:, :, ::self.stride[0], ::self.stride[1]] if self.stride[0] > 1 else x
        # the gradient then has the weight's own strides, as DDP's buckets want
        weight = weight.permute(0, 2, 3, 1).flatten(0, 2)
        return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


class PixelConv(nn.Conv2d):
    """A strided 3x3 convolution without its stride on a map of one pixel, where that steps nowhere: with it oneDNN 3.12
    leaves the elements of a bfloat16 weight's gradient that meet padding alone as the memory was, NaN at worst."""

    def _conv_forward(self, x, weight, bias):
        if x.shape[2:] == (1, 1):
            return F.conv2d(x, weight, bias, padding=1, groups=self.groups)
        return super()._conv_forward(x, weight, bias)


def cpu_convolutions(model, compiled=False):
    """Turns the model's 1x1 convolutions into FlatConv, unless they get `compiled`, and its strided 3x3 into PixelConv,
    in place; names, parameters and results stay."""
    for module in model.modules():
        if type(module) is nn.Conv2d and module.kernel_size == (1, 1) and module.groups == 1 and not compiled:
            module.__class__ = FlatConv
        elif type(module) is nn.Conv2d and module.kernel_size == (3, 3) and module.padding == (1, 1) != module.stride:
            module.__class__ = PixelConv
    return model


class FrozenNorm(nn.BatchNorm2d):
    """Batch-norm that keeps its statistics in training too."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def reset_running_stats(self):  # which update_bn calls
        pass


def freeze(module, frozen=True):
    """Stops training of a part of a network, in place: no gradients, batch-norm keeps its statistics; or undoes it.
    Names in the state dict stay."""
    module.requires_grad_(not frozen)
    for m in module.modules():
        if type(m) in (nn.BatchNorm2d, FrozenNorm):
            m.__class__ = FrozenNorm if frozen else nn.BatchNorm2d


def amp_dtype(args, device):
    """-> torch dtype for autocast, or None for plain float32."""
    if args.amp_dtype != "auto":
        return None if args.amp_dtype == "float32" else getattr(torch, args.amp_dtype)
    if args.eval_only:
        return None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if {"amx_bf16", "avx512_bf16"} & set(cpu_isa()) else None


def preprocess_of(args, base=PREPROCESS):
    """The evaluation's geometry as the checkpoint stores it: `base` with what the flags say."""
    crop = args.val_size or args.image_size
    cut = dict(crop=crop, resize=round(crop * 8 / 7) if crop >= 128 else crop) if crop else {}
    given = dict(resize=args.val_resize, interpolation=args.interpolation)
    found = {**base, **cut, **{k: v for k, v in given.items() if v is not None}}
    if found["resize"] < found["crop"]:
        raise UserError(f"--val-resize {found['resize']}: is less than the {found['crop']} pixels that are cut out, "
                        "--val-size or --image-size", code=2)
    return found


def find_batch_size(model, size, amp, world, limit, told=lambda: None):
    """The largest batch whose forward and backward pass fit, less a tenth, as a multiple of 8; the same on every
    process. CUDA: doubled until memory runs out, then bisected. CPU: doubled while the peak so far, extrapolated, stays
    under 80 % of the machine's free memory. told() is the signal that asks this process to stop, if one does; there is
    nothing to save yet."""
    device, probe = world.device, copy.deepcopy(model).train()
    for module in probe.modules():  # each process tries sizes of its own, and none may wait for others' statistics
        if isinstance(module, nn.SyncBatchNorm):
            module.__class__ = nn.BatchNorm2d

    def attempt(n):
        pixels = torch.zeros(n, 3, size, size, dtype=torch.uint8, device=device).contiguous(
            memory_format=torch.channels_last)
        try:
            with torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None):
                probe(normalize(pixels, model.preprocess)).float().sum().backward()
            return True
        except RuntimeError as error:  # torch.OutOfMemoryError, or csrc's that its ABI makes of one
            if "CUDA out of memory" not in str(error):
                raise
            return False
        finally:
            probe.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()

    fits = 8
    if device.type == "cuda":
        while fits < limit and not told() and attempt(fits * 2):
            fits *= 2
        fails = fits * 2
        while fails - fits > max(8, fits // 8) and not told():
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if attempt(middle) else (fits, middle)
    else:
        with open("/proc/meminfo") as f:
            free = (next(int(line.split()[1]) for line in f if line.startswith("MemAvailable"))
                    / 2**20 / world.local_size * 0.8)
        attempt(4)
        base = memory_gib(device)
        attempt(8)
        while not told() and fits * 2 <= limit and (memory_gib(device) - base) / (fits - 4) * fits * 2 < free:
            fits *= 2
            attempt(fits)
    found, names = zip(*world.gather((fits, told())))
    if name := next(filter(None, names), None):
        raise UserError(f"stopped by {name} while it sought --batch-size, before the first step; the same command "
                        "begins again", code=75)
    found = min(*found, limit)
    return max(1, found * 9 // 10 // 8 * 8) if found > 8 else found


def open_run(args, world, source=None):
    """Checks --out and makes it; -> path of the checkpoint to resume from, or None. `source`: file that the run begins
    with, --checkpoint or what is taken without it."""
    last, restarted = os.path.join(args.out, "last.pt"), world.restarted(args.out)
    if restarted and (args.resume is None or os.path.exists(last)):
        args.resume = "auto"
    if args.resume == "auto":
        path = last if os.path.exists(last) else None
        if (path is None and os.path.exists(os.path.join(args.out, "best.pt")) and not args.overwrite
                and not restarted):
            raise UserError(f"{args.out} is not empty: it has a best.pt, and no last.pt that --resume auto could go on "
                            "from; --overwrite starts anew, --out names another folder", code=2)
    else:
        path = args.resume
        if path and not os.path.exists(path):
            raise UserError(f"--resume {path}: no such file")
        if (any(files for *_, files in os.walk(args.out)) and not args.overwrite and not restarted
                and not (path and os.path.dirname(os.path.abspath(path)) == os.path.abspath(args.out))):
            raise UserError(f"{args.out} is not empty: --resume auto goes on, --overwrite starts anew, "
                            "--out names another folder", code=2)
    source = args.checkpoint or source
    if path is None and args.overwrite and source and os.path.exists(source):
        for old in filter(os.path.exists, (os.path.join(args.out, name) for name in RUN_FILES)):
            if os.path.samefile(old, source):
                raise UserError(f"--overwrite would delete {old}, which is read: --out names another folder", code=2)
    world.barrier()  # nobody writes before everybody has looked
    if world.rank == 0:
        world.made += [args.out] * (not os.path.exists(args.out))
        try:
            os.makedirs(args.out, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {args.out}: {error.strerror}", code=2) from error
    return path


def delete(files):
    for name in files:
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
        except OSError as error:
            raise UserError(f"--overwrite: {name}: {error.strerror}", code=2) from error


def begin_run(args, world, resume):
    """From here on --out holds this run: what it overwrites goes, and if another folder's goes on here, that one's best
    network, metrics and state come (a run that has ended writes none). By the first process, once nothing can be
    refused any more."""
    if world.rank:
        return
    there = resume and os.path.dirname(os.path.abspath(resume))
    if there != os.path.abspath(args.out):
        delete(os.path.join(args.out, name) for name in RUN_FILES if args.overwrite)
        for name in ("best.pt", "metrics.jsonl", "last.pt") if there else ():
            source = resume if name == "last.pt" else os.path.join(there, name)
            with contextlib.suppress(FileNotFoundError), open(source, "rb") as f:
                write_atomic(os.path.join(args.out, name), f.read())
    world.begin(args.out)


def save_training(path, model, ema, optimizer, scaler, progress, world, **fields):
    """last.pt: all that a resumed run needs. Collective; rank 0 writes. In mid-epoch every process has batch-norm
    statistics of its own: `model` and `ema` hold their mean, `statistics` each process's, and the run itself goes on
    untouched."""
    models = [model] + ([ema.model] if ema else [])
    everyone = world.gather(float_statistics(models)[1].cpu())
    totals = dict(zip(TOTALS, world.sum(*(progress[k] for k in TOTALS))))
    if world.rank == 0:
        if world.size > 1:
            models = copy.deepcopy(models)
            set_statistics(models, torch.stack(everyone).mean(0))
        save_checkpoint(path, models[0], optimizer=optimizer.state_dict(),
                        scaler=scaler.state_dict() if scaler else None, ema=models[1].state_dict() if ema else None,
                        ema_updates=ema.updates if ema else 0, statistics=everyone if world.size > 1 else None,
                        **{**progress, **totals}, **fields)
    world.barrier()


def restore_training(path, model, ema, optimizer, scaler, progress, world, classes, args):
    """Reads what save_training wrote into the given objects -> what the last evaluation found, if there was one, and
    the damaged images met so far. Raises UserError if the run is another one."""
    checkpoint = load_checkpoint(path)
    if missing := [key for key in ("optimizer", *progress) if key not in checkpoint]:
        raise UserError(f"{path}: holds no training state of this version, no {missing[0]} (best.pt and foreign files "
                        "have none); start from it with --checkpoint")
    if checkpoint["classes"] != list(classes):
        raise UserError(f"{path}: was trained on other classes than these {len(classes)}")
    theirs, mine = checkpoint["config"], model.config
    if differ := [f"{k} {theirs.get(k)}, not {mine.get(k)}" if k not in ("widths", "backbone") else f"other {k}"
                  for k in sorted((theirs.keys() | mine.keys()) - {"drop_path", "dropout"})
                  if theirs.get(k) != mine.get(k)]:
        raise UserError(f"{path}: holds another network: {'; '.join(differ)}")
    for key in ("opt", "best_by"):  # the optimizer's state and the best value so far mean nothing to another
        saved = checkpoint["args"].get(key, getattr(args, key))
        if saved != getattr(args, key):
            raise UserError(f"{path}: was trained with --{key.replace('_', '-')} {saved}, not {getattr(args, key)}",
                            code=2)
    load_weights(model, checkpoint["model"], path)
    if (args.swa_start is None) != (checkpoint["args"].get("swa_start") is None):
        raise UserError(f"{path}: --swa-start was {'on' if args.swa_start is None else 'off'} in this run", code=2)
    if (ema is None) != (checkpoint["ema"] is None):
        raise UserError(f"{path}: --model-ema-decay was {'on' if ema is None else 'off'} in this run", code=2)
    if ema:
        load_weights(ema.model, checkpoint["ema"], path)
        ema.updates = checkpoint["ema_updates"]
    if checkpoint["statistics"] is not None and len(checkpoint["statistics"]) == world.size:
        set_statistics([model] + ([ema.model] if ema else []), checkpoint["statistics"][world.rank])
    try:
        saved, groups = checkpoint["optimizer"], optimizer.state_dict()["param_groups"]
        # decay and momentum are as this run's flags say
        optimizer.load_state_dict(dict(saved, param_groups=[
            dict(mine, params=theirs["params"], lr=theirs["lr"])
            for mine, theirs in zip(groups, saved["param_groups"], strict=True)]))
        for p, state in optimizer.state.items():
            if wrong := [k for k, v in state.items() if getattr(v, "ndim", 0) and v.shape != p.shape]:
                raise ValueError(f"{wrong[0]} of another shape")
        if scaler and checkpoint["scaler"]:
            scaler.load_state_dict(checkpoint["scaler"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: another optimizer's state ({error})") from error
    progress.update({key: checkpoint[key] for key in progress})
    if world.rank:  # totals over all processes: rank 0 carries them on
        progress.update(dict.fromkeys(TOTALS, 0.0))
    return checkpoint["metrics"] or None, set(checkpoint.get("corrupt", ()))


def saved(args):
    """-> the flags as args.json and checkpoints have them"""
    return {k: v for k, v in vars(args).items() if k not in NOT_SAVED}


def data_root(root, world):
    """-> the folder `root`, or where there is none the demo set's, made by the first process of each machine."""
    if root is None:
        if world.local_rank == 0:
            data.make_demo()
        world.barrier()
    return root or data.DEMO


def open_data(args, world, classes=None, wnids=None):
    """-> what data.open_folder returns"""
    found = data.open_folder(data_root(args.data, world), classes, wnids, args.val_split, args.eval_only)
    if found[1].pack:
        found[1].pack.turns(args.exif)  # which refuses what it cannot do, before anything is written
    return found


def learned_from(checkpoint, root):
    """-> whether that is the folder that the checkpoint's training read"""
    recorded = checkpoint["args"].get("data")
    return bool(recorded) and os.path.realpath(recorded) == os.path.realpath(root)


def split_again(args, checkpoint, root):
    """Has of the folder that a checkpoint learned from, where there is no val/, the images held out that were so then,
    unless --val-split is given: the others would flatter it"""
    if (args.val_split is None and learned_from(checkpoint, root)
            and not any(data.is_folder(os.path.join(root, name)) for name in data.VAL_NAMES)):
        args.val_split = checkpoint["args"].get("val_split") or data.HELD_OUT


def eval_only(args, world):
    model, checkpoint, source = load_model(args, defaults=[os.path.join(args.out, "best.pt")])
    if model is None:
        raise UserError(f"no {args.out}/best.pt: train a network (python train.py), or name one with --checkpoint FILE "
                        "or --weights IMAGENET1K_V2")
    classes, wnids = checkpoint["classes"], checkpoint["wnids"]
    split_again(args, checkpoint, data_root(args.data, world))
    _, val, folder_classes, _, notes = open_data(args, world, classes, wnids)
    if classes is None and len(folder_classes) != model.config["num_classes"]:
        raise UserError(f"{source}: has no class names and {model.config['num_classes']} outputs, "
                        f"{args.data or data.DEMO} has "
                        f"{len(folder_classes)} class folders: --classes FILE must say which is which")
    model.preprocess = preprocess_of(args, model.preprocess)
    check_sizes(model, {model.preprocess["crop"]: "--val-size" if args.val_size else "--image-size"})
    model.to(world.device)
    amp = amp_dtype(args, world.device)
    if model.precision != "float" and amp:
        raise UserError(f"--amp-dtype {args.amp_dtype}: takes a float network, {source} is {model.precision}", code=2)
    if args.fused:
        model, amp = fuse(model, amp or torch.float32), None  # it casts by itself
    if args.compile:
        model.compile()
    exif = args.exif or bool(checkpoint["args"].get("exif"))  # as in the network's training
    dataset = data.Images(val, lambda _: data.eval_transform(model.preprocess), exif=exif)
    size = 32 if args.batch_size == "auto" else args.batch_size
    if world.rank == 0:
        print("\n".join(notes + [f"{source} on {len(val)} images, "
                                 f"{model.preprocess['resize']} -> {model.preprocess['crop']} px"]), file=sys.stderr)
    start = time.perf_counter()
    result = evaluate(model, dataset, size, world, workers=args.workers, amp=amp, tta=args.tta,
                      on_corrupt=args.on_corrupt)
    seconds = time.perf_counter() - start
    return dict(result, checkpoint=source, data=args.data or data.DEMO,
                images_per_second=round(result["images"] / seconds, 2))


def make_model(args, classes):
    """A new network for the classes, or --checkpoint's / --weights' if it has as many outputs."""
    if args.num_classes not in (None, len(classes)):
        raise UserError(f"--num-classes {args.num_classes}: the data has {len(classes)} classes", code=2)
    if args.checkpoint or args.weights:
        model, checkpoint, source = load_model(args, trains=True, drop_path=args.drop_path, dropout=args.dropout)
        known = checkpoint["classes"] or []
        if model.config["num_classes"] != len(classes):
            raise UserError(f"{source}: has {model.config['num_classes']} outputs, the data {len(classes)} classes; "
                            "finetune.py replaces the head")
        if known != list(classes) and sorted(known) == sorted(classes):
            raise UserError(f"{source}: has the classes in another order than the data: --classes FILE must give it")
    else:
        torch.manual_seed(args.seed)
        shape = {k: getattr(args, k) for k in ("stem", "stride_on", "attention", "drop_path", "dropout")}
        try:
            model = ResNet50(num_classes=len(classes), **{k: v for k, v in shape.items() if v is not None})
        except ValueError as error:
            raise UserError(error, code=2) from error
    model.preprocess = preprocess_of(args, model.preprocess)
    return prepare(model, args)


def prepare(model, args):
    """What the flags ask of a network in training -> the network"""
    if "arch" in model.config and (args.grad_checkpointing or args.fused_bn):
        raise UserError("--grad-checkpointing and --fused-bn are ResNet-50's", code=2)
    check_sizes(model, {size_at(0, args): "--progressive", model.preprocess["crop"]: "--val-size",
                        args.image_size: "--image-size"})
    model.grad_checkpointing = args.grad_checkpointing
    for module in model.modules() if args.fused_bn else ():
        if isinstance(module, nn.BatchNorm2d):
            module.fused = True
    if args.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def wrap(model, args, world, amp):
    """DDP and torch.compile around the model. DDP regroups its gradient buckets after the first backward pass; that
    pass is made here on zeros, so that an uninterrupted and a resumed run add up gradients in the same grouping at
    every step. A batch of one is tried out: it may be too few for a batch-norm."""
    net = model
    if world.size > 1:
        net = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    if args.compile:
        net = torch.compile(net)
    if world.size > 1 or args.batch_size == 1:
        before, size = [b.clone() for b in statistics(model)], size_at(0, args)
        with torch.autocast(world.device.type, amp or torch.bfloat16, enabled=amp is not None):
            net(torch.zeros(min(2, args.batch_size), 3, size, size, device=world.device)).float().sum().backward()
        model.zero_grad(set_to_none=True)
        for buffer, value in zip(statistics(model), before):
            buffer.copy_(value)
    return net


def refuse_unused(args, usual, *rows):
    """UserError for a flag that is not as `usual` and would do nothing; rows of whether it is honoured, what it goes
    with, and names of such flags"""
    for fits, partner, *names in rows:
        if wrong := [] if fits else [k for k in names if getattr(args, k) != getattr(usual, k)]:
            raise UserError(f"--{wrong[0].replace('_', '-')} goes with {partner}", code=2)


def check_args(args, usual):
    """`usual` is what args are where nothing but a recipe or task is asked for; with --eval-only that is --config too,
    which may well be of a training run"""
    refuse_unused(
        args, usual, (args.lr_scheduler == "multistep", "--lr-scheduler multistep", "lr_milestones", "lr_gamma"),
        (args.lr_scheduler == "restarts", "--lr-scheduler restarts", "lr_restart_epochs"),
        (args.lr_scheduler != "multistep", "--lr-scheduler cosine, linear and restarts", "lr_min"),
        (args.lr_warmup_epochs, "--lr-warmup-epochs", "lr_warmup_decay"),
        (args.opt in ("sgd", "nesterov", "lars"), "--opt sgd, nesterov and lars", "momentum"),
        (args.loss == "focal", "--loss focal", "focal_gamma"),
        (args.loss != "bce", "--loss ce and focal", "class_weights"),
        (args.model_ema_decay, "--model-ema-decay", "model_ema_steps"),
        (args.auto_augment == "ra", "--auto-augment ra", "ra_magnitude", "ra_std"),
        (args.eval_only, "--eval-only", "fused"),
        (not args.eval_only, "training; --eval-only scores what --checkpoint names",
         *(k for k in vars(get_args_parser().parse_args([])) if k not in SCORES)))
    px, begin, end = args.progressive or (16, 0, 1)
    most = args.image_size or math.inf
    refused = {
        "--swa-start and --model-ema-decay exclude each other": args.swa_start is not None and args.model_ema_decay,
        "--momentum 0: --opt nesterov needs some, sgd does without": args.opt == "nesterov" and not args.momentum,
        "--compile and --grad-checkpointing exclude each other (the compiler plans recomputation itself)":
            args.compile and args.grad_checkpointing,
        "--resume auto and --overwrite exclude each other: one goes on, the other starts anew":
            args.resume == "auto" and args.overwrite,
        "--batch-size auto is sought in training; --eval-only needs a number":
            args.eval_only and "auto" == args.batch_size != usual.batch_size,
        "--balanced and --repeated-aug exclude each other": args.balanced and args.repeated_aug > 1,
        "--shuffle-chunk excludes --balanced, which draws images one by one": args.balanced and args.shuffle_chunk,
        "--sync-bn and --fused-bn exclude each other (the fused one has statistics of its own process)":
            args.sync_bn and args.fused_bn,
        "--fused-bn: float16 is for CUDA, on the CPU --amp-dtype float32 or bfloat16":
            args.fused_bn and (args.device, args.amp_dtype) == ("cpu", "float16"),
        "--sync-bn: PyTorch has synchronised batch-norm on CUDA only":
            args.sync_bn and args.device == "cpu" and not args.eval_only,
        "--elastic: takes images of more than 20 pixels (a --progressive below 24 is 16)":
            args.elastic and (px < 24 if args.progressive else most <= 20) and not args.eval_only,
        f"--progressive {px:g} {begin:g} {end:g}: PX must be at least 16 and at most --image-size, and FROM and TO lie "
        "in [0, 1], in this order": args.progressive and not (16 <= px <= most and 0 <= begin <= end <= 1)}
    for text, wrong in refused.items():
        if wrong:
            raise UserError(text, code=2)
    if args.val_size or args.image_size:
        preprocess_of(args)
    for package, module in LOGGERS.items() if not args.eval_only else ():
        try:
            if getattr(args, package):
                importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"--{package}: pip install {package} ({error})", code=2) from error


# --------------------------------------------------------------------------------------------------- the loop

class Plan:
    """What a later script decides about a run; here everything is as train.py has it."""
    measures = {"top1": "top-1", "top5": "top-5"}  # what evaluate gives beside the loss; the first makes an epoch best
    asked = None  # flags for args.json, where a run is a part of what they ask for
    knows = False  # whether the network is scored before its first epoch, as epoch 0: it may stay the best

    forward = staticmethod(classify)
    model = staticmethod(make_model)

    def evaluate(self, *args, **options):
        return evaluate(*args, **options)

    def describe(self, args, model):
        """-> lines of text for the start of a run"""
        return [f"recipe {args.recipe}: " + ", ".join(f"{k}={getattr(args, k)}" for k in RECIPES[args.recipe])]

    def open(self, args, world):
        """-> train Files, val Files, classes, wnids, notes"""
        return open_data(args, world, *(read_classes(args.classes) if args.classes else (None, None)))

    def images(self, files, transform_at, args, training):
        """-> data set of what the model reads, and the number of processes that load it"""
        return data.Images(files, transform_at, args.seed, args.exif, replace=training), args.workers

    def teach(self, loss_fn):
        """-> what stands for loss_fn in training"""
        return loss_fn

    def share(self, name):
        """Of the learning rate, for the parameter of that name"""
        return 1.0

    def begin(self, model, epoch):
        """Before an epoch, also a resumed one. -> True if other parameters are trained than before"""
        return False

    def plain(self, model):
        """-> the network as best.pt holds it"""
        return model


class Run:
    """What a run is made of, and its steps: those of train(), in their order."""

    def __init__(self, args, world, stop, plan):
        self.args, self.world, self.stop, self.plan = args, world, stop, plan
        device, resume = world.device, open_run(args, world)
        self.files, self.val_files, classes, wnids, notes = plan.open(args, world)
        # resuming needs last.pt alone, not what the run began with
        begun = dict(checkpoint=resume, weights=None) if resume and (args.checkpoint or args.weights) else {}
        model = plan.model(argparse.Namespace(**{**vars(args), **begun}), classes)
        self.amp = amp_dtype(args, device)
        if device.type == "cpu":
            cpu_convolutions(model, args.compile)
        self.model = model = model.to(device, memory_format=torch.channels_last).train()
        if args.batch_size == "auto" and resume:  # with the same one as it began
            args.batch_size = load_checkpoint(resume)["args"].get("batch_size", "auto")
        if args.batch_size == "auto":
            args.batch_size = find_batch_size(model, args.image_size, self.amp, world,
                                              max(1, min(1024, len(self.files) // world.size)), lambda: stop.requested)
        self.order = data.Order(self.files.labels, args.batch_size, world.rank, world.size, args.accumulate, args.seed,
                                args.repeated_aug, args.balanced, args.shuffle_chunk)
        self.files.keep_together(args.shuffle_chunk)
        for name, weight in model.named_parameters():  # zero without a gradient stays zero under every optimizer here
            if weight.requires_grad and name in getattr(model, "sparse_keys", ()):
                weight.register_hook(lambda gradient, mask=weight.detach() != 0: gradient * mask)
        self.loss_fn = plan.teach(loss_of(args, self.files, classes, device))
        self.mixer = data.make_mixer(args.mixup_alpha, args.cutmix_alpha, len(classes))
        self.optimizer = make_optimizer(model, args.opt, args.weight_decay, args.momentum, plan.share)
        self.scaler = torch.amp.GradScaler(device.type) if self.amp == torch.float16 else None
        averages = args.model_ema_decay or args.swa_start is not None
        self.ema = EMA(model, args.model_ema_decay or None) if averages else None
        self.progress = progress = dict(epoch=0, seen=0, step=0, samples_seen=0, best=-math.inf, best_epoch=0,
                                        averaged=0, skips=0, **dict.fromkeys(TOTALS, 0.0))
        self.last, self.best = os.path.join(args.out, "last.pt"), os.path.join(args.out, "best.pt")
        self.result, self.corrupt = None, set()  # of the last evaluation; of training
        if resume:
            self.result, self.corrupt = restore_training(resume, model, self.ema, self.optimizer, self.scaler, progress,
                                                         world, classes, args)
            if not os.path.exists(os.path.join(os.path.dirname(resume), "best.pt")):  # moved away: the next is best
                progress.update(best=-math.inf, best_epoch=progress["epoch"])
        plan.begin(model, progress["epoch"])
        self.net = wrap(model, args, world, self.amp)
        begin_run(args, world, resume)
        self.log = RunLog(args, world, progress if resume else None)
        self.fields = dict(classes=classes, wnids=wnids, args=saved(args))
        if world.rank == 0:
            told = json.dumps(plan.asked or self.fields["args"], indent=1).encode()
            write_atomic(os.path.join(args.out, "args.json"), told)
        self.peak = args.lr * (self.order.global_batch / args.lr_base_size if args.lr_base_size else 1)
        self.main = next(iter(plan.measures))
        self.introduce(notes, resume)
        self.open_loaders()

    def introduce(self, notes, resume):
        args, world, order, progress = self.args, self.world, self.order, self.progress
        self.log.say("\n".join(notes + [
            f"{len(self.files)} training and {len(self.val_files)} validation images, {len(self.fields['classes'])} "
            f"classes; {world.size} process{'es' * (world.size > 1)} on {world.device.type}, "
            f"{self.amp or torch.float32}".replace("torch.", ""),
            *self.plan.describe(args, self.model),
            f"global batch {args.batch_size} x {world.size} x {args.accumulate} = {order.global_batch}, "
            f"{order.steps} steps per epoch, learning rate "
            f"{args.lr:g} x {order.global_batch}/{args.lr_base_size or order.global_batch} = {self.peak:g}"]
            + [f"resumed {resume} at epoch {progress['epoch']}, step {progress['step']}"] * bool(resume)))
        if args.lr_scheduler == "multistep" and min(args.lr_milestones) >= args.epochs:
            self.log.say(f"note: the rate never falls in {args.epochs} epochs; --lr-milestones, or --lr-scheduler "
                         "cosine")
        if args.lr_warmup_epochs >= args.epochs:
            self.log.say(f"note: the rate only grows, as --lr-warmup-epochs is {args.lr_warmup_epochs:g} of "
                         f"{args.epochs}")
        new = self.plan.model is make_model and not (args.checkpoint or args.weights)
        if new and args.image_size <= 40 and self.model.config["stem"] == "standard":
            self.log.say(f"note: at {args.image_size} px --stem small is much more accurate (and slower)")

    def open_loaders(self):
        args, world, plan, preprocess = self.args, self.world, self.plan, self.model.preprocess
        images, workers = plan.images(
            self.files, lambda epoch: data.train_transform(size_at(epoch, args), preprocess, args), args, True)
        self.val_images, _ = plan.images(self.val_files, lambda _: data.eval_transform(preprocess), args, False)
        self.loader = data.make_loader(images, self.order, workers, world.device)
        self.val_batch = args.batch_size * 2
        batches = data.eval_batches(len(self.val_files), self.val_batch, world.rank, world.size)
        self.val_loader = data.make_loader(self.val_images, batches, workers, world.device)

    def save(self):
        save_training(self.last, self.model, self.ema, self.optimizer, self.scaler, self.progress, self.world,
                      rng=dict(seed=self.args.seed), metrics=self.result,
                      corrupt=sorted(set().union(*self.world.gather(self.corrupt))), **self.fields)

    def diverged(self, why):
        left = f"{self.last} was left untouched" if os.path.exists(self.last) else "there is no checkpoint yet"
        return UserError(f"training diverged: {why}; {left}", code=4)

    def out_of_patience(self):
        args, waited = self.args, self.progress["epoch"] - self.progress["best_epoch"]
        if over := args.patience and waited >= args.patience:
            goal = "loss" if args.best_by == "loss" else self.plan.measures[self.main]
            self.log.say(f"no better {goal} for {args.patience} epochs: stopped early")
        return over

    def steps(self):
        """What is left of an epoch -> True if it was told to stop"""
        args, world, order, progress, model = self.args, self.world, self.order, self.progress, self.model
        epoch, epoch_samples = progress["epoch"], order.steps * order.global_batch
        model.train()
        if self.plan.begin(model, epoch):
            self.net = None  # DDP's hooks go with it
            self.net = wrap(model, args, world, self.amp)
        # a run with a smaller global batch may have used more of the epoch than this one would
        order.epoch, order.start = epoch, min(progress["seen"], epoch_samples)
        steps = len(order) // args.accumulate
        batches = iter(self.loader) if steps else iter(())
        # where a logging interval begins; evaluating and saving are not part of its rate
        window = dict(progress, time=time.perf_counter(), wait=0.0)
        for left in reversed(range(steps)):
            lr = lr_at(epoch + progress["seen"] / epoch_samples, args, self.peak)
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["lr_share"]
            waiting = time.perf_counter()
            micro = [next(batches) for _ in range(args.accumulate)]
            window["wait"] += time.perf_counter() - waiting
            complaints = [c for _, _, bad in micro for c in bad]
            self.corrupt.update(complaints)
            check_corrupt(complaints, args.on_corrupt)
            if any(len(labels) != args.batch_size for _, labels, _ in micro):
                raise UserError(f"too many damaged files in a row, from {complaints[0]}")
            micro = [(pixels, labels) for pixels, labels, _ in micro]
            torch.manual_seed(data.seed_for(args.seed, 1, progress["step"], world.rank))  # mixing, dropout, drop-path
            loss, correct, applied = train_step(self.net, model, micro, self.optimizer, self.loss_fn,
                                                scaler=self.scaler, mixer=self.mixer, amp=self.amp,
                                                clip=args.clip_grad_norm, forward=self.plan.forward)
            progress["step"] += 1
            progress["seen"] += order.global_batch
            progress["samples_seen"] += order.global_batch
            if applied:
                progress["skips"] = 0
                if args.model_ema_decay and progress["step"] % args.model_ema_steps == 0:
                    self.ema.update(model)
            else:
                self.skipped(lr)
            samples = args.batch_size * args.accumulate
            for key, value in (("loss_sum", loss * samples), ("correct", correct)):
                progress[key] = progress[key] + value.double()  # on the device: nobody waits for it
            progress["count"] += samples
            if progress["step"] % args.log_every == 0 or not left:
                log_window(window, progress, self.log, order, lr, world, args, "top1" in self.plan.measures)
                window = dict(progress, time=time.perf_counter(), wait=0.0)
            if args.save_every and progress["step"] % args.save_every == 0 and not progress["skips"]:
                self.save()
            if self.stop.poll():
                return True
        return False

    def skipped(self, lr):
        progress = self.progress
        progress["skips"] += 1
        progress["skipped"] += self.world.rank == 0
        self.log.say(f"step {progress['step']}: gradient not finite, step skipped ({progress['skips']} in a row)")
        if progress["skips"] > self.args.max_skips:
            raise self.diverged(f"{progress['skips']} steps in a row without a finite gradient at lr {lr:g}")

    def average(self):
        """After an epoch: the mean over epochs of --swa-start, and what processes have each for themselves"""
        args, world, progress, model, ema = self.args, self.world, self.progress, self.model, self.ema
        epoch = progress["epoch"]
        if args.swa_start is not None:
            if progress["averaged"] == epoch:  # not again by a run that was stopped while it evaluated
                # the mean of the epochs since then; before that the network itself. Exactly: 0.28 * 25 is above 7
                first = math.ceil(Fraction(str(args.swa_start)) * args.epochs)
                ema.updates = min(ema.updates, max(0, epoch - first))
                ema.update(model)
                progress["averaged"] += 1
            if ema.updates > 1:
                self.order.start = 0
                torch.manual_seed(data.seed_for(args.seed, 3, epoch, world.rank))  # dropout, drop-path
                for mine, theirs in zip(ema.model.modules(), model.modules()):  # frozen as they are now
                    if isinstance(theirs, nn.BatchNorm2d):
                        mine.__class__ = theirs.__class__
                recalibrate(ema.model, (p.to(world.device) for p, _, _ in itertools.islice(self.loader, SWA_BATCHES)))
        average_statistics(world, [model] + ([ema.model] if ema else []))

    def judge(self, epoch, since):
        """Scores what `epoch` epochs have made and keeps it -> False if it was told to stop before"""
        args, world, plan, progress = self.args, self.world, self.plan, self.progress
        judged = self.ema.model if self.ema else self.model
        score = plan.evaluate(judged, self.val_images, self.val_batch, world, amp=self.amp, tta=args.tta,
                              loader=self.val_loader, poll=self.stop.poll, on_corrupt=args.on_corrupt)
        if score is None:
            return False
        if score["loss"] is not None and not math.isfinite(score["loss"]):
            raise self.diverged(f"the loss on validation is {score['loss']}")
        if progress["best"] == -math.inf and world.gather(not os.path.exists(self.last))[0]:
            self.save()  # killed with a best.pt alone, a run could not be told from another whose last.pt is gone
        loss_sum, correct, count, skipped = world.sum(*(progress[k] for k in TOTALS))
        progress.update(epoch=epoch, seen=0, loss_sum=0.0, correct=0.0, count=0.0)
        learned = dict(train_loss=round(loss_sum / count, 5)) if count else {}
        if count and "top1" in plan.measures:
            learned["train_top1"] = round(100 * correct / count, 3)
        record = dict(epoch=epoch, step=progress["step"], **{k: score[k] for k in ("loss", *plan.measures)}, **learned,
                      lr=lr_at(epoch, args, self.peak), seconds=round(time.perf_counter() - since, 2),
                      skipped=int(skipped))
        value = -score["loss"] if args.best_by == "loss" else score[self.main]
        self.result, better = dict(score, epoch=epoch), value > progress["best"]
        if better:
            progress.update(best=value, best_epoch=epoch)
            if world.rank == 0:
                save_checkpoint(self.best, plan.plain(judged), metrics=self.result, **self.fields)
        self.log.write("epoch", **record)
        self.save()
        measured = [f"loss {score['loss']:.4f}"] if score["loss"] is not None else []
        measured += [f"{name} {score[k]:.2f}" for k, name in plan.measures.items()]
        self.log.say(f"epoch {epoch}/{args.epochs}: {' '.join(measured)} on validation; "
                     + f"{' '.join(map(str, learned.values()))} in training; " * bool(learned)
                     + f"{record['seconds']:.0f} s{' *' * better}")
        return True

    def leave(self):
        """Ends a process that was told to stop"""
        self.save()
        self.log.write("stopped", epoch=self.progress["epoch"], step=self.progress["step"])
        name = next(n for n in self.world.gather(self.stop.requested) if n)
        if self.world.rank:
            sys.exit(75)  # one process says it
        raise UserError(f"stopped by {name}, state saved in {self.last}; the same command with --resume auto goes on",
                        code=75)

    def report(self, seconds, rate):
        """-> the JSON object of the last line"""
        world, progress = self.world, self.progress
        bad = sorted(set().union(*world.gather(self.corrupt)))
        if world.rank == 0:
            name_damaged("training", *bad)
        # the same in all processes: a search goes by it
        shown = world.gather(load_checkpoint(self.best)["metrics"] if world.rank == 0 else None)[0]
        return dict({k: shown[k] for k in (*self.plan.measures, "loss")}, checkpoint=self.best,
                    epochs=progress["epoch"], best_epoch=progress["best_epoch"],
                    **{f"last_{self.main}": self.result[self.main]}, images_per_second=rate and round(rate, 2),
                    seconds=round(seconds, 1), samples_seen=progress["samples_seen"],
                    skipped_steps=int(progress["skipped"]), corrupt=len(bad) + shown["corrupt"], out=self.args.out)


def train(args, world, stop, plan=Plan()):
    """A run from start to end, as the flags say and a later script's `plan`. -> dict of its report"""
    run = Run(args, world, stop, plan)
    progress, stopped = run.progress, stop.poll()
    begin, worked, before = time.perf_counter(), 0.0, progress["samples_seen"]  # when this process started
    if plan.knows and not progress["step"] and progress["best"] == -math.inf and not stopped:
        stopped = not run.judge(0, begin)
    while progress["epoch"] < args.epochs and not stopped and not run.out_of_patience():
        since = time.perf_counter()
        stopped = run.steps()
        worked += time.perf_counter() - since
        if not stopped:
            run.average()
            stopped = not run.judge(progress["epoch"] + 1, since)
    if stopped:
        run.leave()
    return run.report(time.perf_counter() - begin, (progress["samples_seen"] - before) / worked if worked else None)


def log_window(window, progress, log, order, lr, world, args, counts):
    """One record and one line of a logging interval, from `window`, what `progress` was at its beginning; with the
    accuracy if the run `counts` right answers. Waits for the device."""
    loss, correct, samples, _ = (float(progress[k] - window[k]) for k in TOTALS)
    seconds, memory = time.perf_counter() - window["time"], memory_gib(world.device)
    rate, share = samples * world.size / seconds, window["wait"] / seconds
    at = progress["epoch"] + progress["seen"] / (order.steps * order.global_batch)
    left = ((args.epochs - at) * order.steps * order.global_batch) / rate
    log.write("step", epoch=round(at, 4), step=progress["step"], loss=round(loss / samples, 5),
              **({"top1": round(100 * correct / samples, 3)} if counts else {}), lr=lr,
              images_per_second=round(rate, 2), data_wait=round(share, 4), memory_gib=round(memory, 3),
              samples_seen=progress["samples_seen"])
    log.say(f"epoch {progress['epoch'] + 1} step {progress['step']}/{args.epochs * order.steps} "
            f"loss {loss / samples:.4f} " + (f"top-1 {100 * correct / samples:.1f} " if counts else "")
            + f"lr {lr:.2e} {rate:.1f} img/s data {share:.0%} mem {memory:.1f}G "
            f"eta {datetime.timedelta(seconds=int(left))}", last=False)


def run_processes(args, work):
    """work(world, stop) -> dict, as one of the processes that --device and torchrun's environment ask for; what the
    first one returns"""
    if args.device == "cpu":
        keep_freed_memory()
    elif not args.deterministic:
        torch.backends.cudnn.benchmark = True
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        with (contextlib.closing(World(args.device, args.dist_timeout)) as world,
              contextlib.nullcontext() if args.eval_only else contextlib.closing(Stop(world)) as stop):
            result = work(world, stop)
            return result if world.rank == 0 else None
    except (RuntimeError, ValueError) as error:
        if "more than 1 value per channel" in str(error):
            raise UserError("--batch-size: leaves a batch-norm a single value per channel, at least 2 are needed here",
                            code=2) from error
        rank = os.environ.get("RANK")  # without others these words are not of them: a kernel may have timed out
        if rank and ("by peer" in str(error) or "Broken pipe" in str(error)):  # gloo's words
            raise UserError(f"another process has ended (killed, or its own line says why), and process {rank} with it",
                            code=1) from error
        if rank and "imed out" in str(error):  # gloo's and the rendezvous's
            raise UserError(f"another process has not been heard of for {args.dist_timeout} seconds (--dist-timeout), "
                            f"and process {rank} ends with it", code=1) from error
        # killed: almost always shared memory, of which </torch_... is a file
        if "DataLoader worker (pid" in str(error) or "</torch_" in str(error):
            why = str(error).strip().splitlines()[-1].removeprefix("RuntimeError: ")
            raise UserError(f"a loader process failed ({why}); if /dev/shm is small (docker: --shm-size=8g) use "
                            "--workers 0") from error
        raise


def main(args):
    asked = ["--config", args.config] if args.eval_only and args.config else []
    check_args(args, get_args_parser().parse_args(["--recipe", args.recipe, *asked]))
    return run_processes(args, lambda world, stop: eval_only(args, world) if args.eval_only
                         else train(args, world, stop))


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args(), "train.py")
