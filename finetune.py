"""Fine-tune a pretrained network on a user's own classes, or boxes.

  python finetune.py --data FOLDER                           # from runs/train/best.pt, else torchvision's weights
  python finetune.py --data FOLDER --checkpoint FILE --strategy gradual
  python finetune.py --data FOLDER --model efficientnet_b4 --weights DEFAULT
  python finetune.py --data FOLDER --target-domain OTHER     # images without labels that it shall work on too
  python finetune.py --task detect --data ANNOTATED          # Faster R-CNN on the network; Pascal-VOC or COCO
  torchrun --nproc_per_node=8 finetune.py --data FOLDER --strategy full

FOLDER is what train.py takes. The head is new, for the folder's classes; how much of the rest is trained is --strategy:

  head       nothing: the head learns from features that are computed once, in --views augmented views of each image
  gradual    the head as above, then stage after stage from the top, from its best epoch
  layers:N   the head and the N stages below it
  full       everything
  lora       low-rank additions to the convolutions, merged into plain weights at the end (arXiv 2106.09685)
  adapter    small bottlenecks behind the blocks, which stay in the network
  auto       head, gradual or full, by the number of images

--lr is the network's rate; what is new (head, LoRA, adapters) learns --head-lr-mult times as fast, and each stage below
the top one --layer-decay times as fast as the one above. What is frozen keeps its batch-norm statistics too. The loop,
its files, resuming and exit statuses are train.py's; beside them a run leaves confusion.csv, confusion.svg and
mistakes.png.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import copy
import csv
import glob
import hashlib
import html
import io
import itertools
import json
import math
import os
import re
import sys
import time
import warnings
import xml.etree.ElementTree
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import data
import train
from data import some
from resnet50 import (
    PREPROCESS,
    ResNet50,
    UserError,
    above_zero,
    amount,
    as_checkpoint,
    build_model,
    fetch_weights,
    fuse,
    load_checkpoint,
    load_some_model,
    load_weights,
    norm_relu,
    normalize,
    positive,
    predict,
    run_script,
    torchvision_model,
    write_atomic,
)

# of a 1x1 convolution that is used twice in a step: the sum of its gradients has the same bytes by other strides
warnings.filterwarnings("ignore", "Grad strides do not match", UserWarning)

RECIPES = dict(  # by --task
    classify=dict(batch_size=32, lr=1e-4, opt="adamw", weight_decay=0.01, lr_base_size=0, lr_warmup_epochs=0.5,
                  label_smoothing=0.1, crop_scale=0.25, image_size=None, interpolation=None, head_lr_mult=10.0),
    detect=dict(epochs=6, batch_size=4, lr=1e-4, opt="adamw", weight_decay=0.01, lr_base_size=0,
                lr_warmup_epochs=0.5, clip_grad_norm=10.0, image_size=320, max_size=640, head_lr_mult=3.0))
AUGMENTATION = tuple(a.dest for a in data.add_augment_args(argparse.ArgumentParser())._group_actions)
DETECTS = ("trainable_stages", "max_size", "nms_threshold", "detections", "score_threshold")  # --task detect's flags
CLASSIFIES = (  # and those that it has no use for
    "unfreeze_every", "views", "lora_rank", "lora_alpha", "adapter_channels", "align", "align_weight", "interpolation",
    "focal_gamma", "model", "strategy", "search", "lr_find", "then", "target_domain", "l2_sp", "layer_decay",
    "tta", "compile", "sync_bn", "fused_bn", "class_weights", "progressive", "val_size", "val_resize", "exif",
    "grad_checkpointing", "best_by", "label_smoothing", "loss", "classes", "num_classes", "swa_start", "fused",
    "drop_path", "dropout", "shuffle_chunk", *(k for k in AUGMENTATION if k != "hflip"))
# What a strategy sets where the command line does not
STRATEGIES = {kind: dict(epochs=20 if kind == "head" else 8, layer_decay=0.5 if kind == "layers" else 1.0)
              for kind in ("head", "gradual", "layers", "full", "lora", "adapter")}
DEFAULTS = ["runs/train/best.pt"]
STAGES = 5  # that a network is divided into below its head, at most
FEW, MANY = 1000, 20000  # images: below, --strategy auto trains the head; from there on everything
TINY = 5  # images of a class, below which it is named
CHECKED = 50000  # files; larger sets are not decoded beforehand, but for a head, whose features are of all images
PROPOSALS = 128  # of an image that the box head learns from; torchvision's 512 take most of a step at small sizes
SEARCHED = (1.0, 0.3, 3.0, 0.1, 10.0)  # times --lr
# What a head on features that are computed once cannot have or has no use for, as it is without
BEYOND_HEAD = dict(tta=False, cutmix_alpha=0.0, progressive=None, l2_sp=0.0, drop_path=None, layer_decay=1.0,
                   unfreeze_every=1, grad_checkpointing=False)


def strategy(text):
    kind, _, number = text.partition(":")
    if kind not in ("auto", *STRATEGIES) or (kind == "layers") != number.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, {', '.join(STRATEGIES)} (layers:N)")
    return text


def get_args_parser():
    p = train.Parser(RECIPES, lambda args: args.task, prog="finetune.py",
                     description="Fine-tune a pretrained network on a folder of images.",
                     epilog="The defaults are those of --task. Where none is shown, --strategy or the checkpoint may "
                            "have one.")
    g = p.add_argument_group("fine-tuning")
    g.add_argument("--task", choices=RECIPES, default="classify")
    g.add_argument("--model", metavar="NAME", help="torchvision's classifier, of --checkpoint or --weights (DEFAULT)")
    g.add_argument("--list-models", action="store_true", help="what --model takes")
    g.add_argument("--strategy", type=strategy, default="auto", metavar="NAME", help="auto, head, gradual, layers:N, "
                   "full, lora or adapter")
    g.add_argument("--head-lr-mult", type=amount, metavar="F", help="what is new learns so much faster")
    g.add_argument("--layer-decay", type=above_zero, metavar="F", help="rate of a stage by that of the stage above it")
    g.add_argument("--unfreeze-every", type=positive, default=1, metavar="N", help="gradual: epochs per stage")
    g.add_argument("--views", type=positive, default=4, metavar="N", help="head, gradual: augmentations of each image")
    g.add_argument("--lora-rank", type=positive, default=8, metavar="R")
    g.add_argument("--lora-alpha", type=amount, default=16.0, metavar="A", help="additions count A/R times")
    g.add_argument("--adapter-channels", type=positive, default=32, metavar="N")
    g.add_argument("--ohem", type=above_zero, default=1.0, metavar="F", help="learn from this share of each batch, the "
                   "hardest images, or of 128 proposals in each image (arXiv 1604.03540)")
    g.add_argument("--l2-sp", type=amount, default=0.0, metavar="A",
                   help="pull towards the weights it started from (arXiv 1802.01483)")
    g.add_argument("--then", metavar="FOLDER", help="go on from the result on this data set: --data is only a step")
    g.add_argument("--lr-find", action="store_true", help="take --lr from a range test; leaves lr.svg")
    g.add_argument("--search", type=positive, metavar="N",
                   help="compare N settings of strategy and rate by successive halving, then train the best")
    g = p.add_argument_group("detection")
    g.add_argument("--trainable-stages", type=int, choices=range(5), default=3, help="of the network, from the top")
    g.add_argument("--max-size", type=positive, metavar="PX",
                   help="of an image's long side, where --image-size is its short one")
    g.add_argument("--nms-threshold", type=above_zero, metavar="IOU",
                   help="of two found boxes that overlap more the better one stays (0.5)")
    g.add_argument("--detections", type=positive, metavar="N", help="boxes per image at most (100)")
    g.add_argument("--score-threshold", type=above_zero, default=0.5, metavar="S",
                   help="boxes that predictions.png shows")
    g = p.add_argument_group("domain shift")
    g.add_argument("--target-domain", metavar="FOLDER",
                   help="images without labels; class folders in its val/ are scored")
    g.add_argument("--align", choices=("coral", "mmd", "none"), default="coral",
                   help="what makes features of both alike: second moments (arXiv 1607.01719) or the kernel mean "
                   "discrepancy (arXiv 1502.02791)")
    g.add_argument("--align-weight", type=amount, default=1.0, metavar="A")
    train.add_training_args(p)
    p.set_defaults(out="runs/finetune")
    return p


def changed(args, **values):
    """-> a copy of the flags in which some have other values"""
    return argparse.Namespace(**{**vars(args), **values})


def at_odds(args, kind):
    """-> {text: whether it applies} of flags that exclude each other or lack another, for a strategy of that kind"""
    if args.task == "detect":
        return {"--task detect needs --data": not args.data,
                "--batch-size auto: not with --task detect": args.batch_size == "auto"}
    only = args.grad_checkpointing or args.stem or args.attention or args.stride_on or kind == "adapter"
    wrong = kind == "head" and beyond_head(changed(args, then=None))  # whose classes are not known yet
    return {
        "--batch-size auto: --lr-find needs a number": args.lr_find and args.batch_size == "auto",
        f"--model {args.model}: --grad-checkpointing, --stem, --attention, --stride-on and --strategy adapter are "
        "ResNet-50's": args.model and only,
        f"{wrong}: --strategy head sees features that are computed once, and trains nothing below; name another": wrong,
        "--checkpoint and --weights exclude each other": args.model and args.checkpoint and args.weights,
        "--ohem: a mixed image is neither hard nor easy; give it without --mixup-alpha and --cutmix-alpha":
            args.ohem < 1 and (args.mixup_alpha or args.cutmix_alpha),
        "--search decides the rate by itself, for one data set: no --then, no --lr-find":
            args.search and (args.then or args.lr_find),
        "--compile: alignment watches the features, which a compiled network does not show":
            args.target_domain and args.align != "none" and args.compile}


def check_args(args):
    asked = ["--config", args.config] if args.eval_only and args.config else []
    usual = get_args_parser().parse_args(["--task", args.task, *asked] + ["--eval-only"] * args.eval_only)
    kind = args.strategy.partition(":")[0]
    any_kind = kind == "auto" or args.search or args.resume  # args.json has what auto has chosen
    train.refuse_unused(
        args, usual, (args.task == "detect", "--task detect", *DETECTS),
        (args.task == "classify", "--task classify", *CLASSIFIES),
        (kind in ("head", "gradual") or any_kind, "--strategy head and gradual", "views"),
        (kind == "gradual" or any_kind, "--strategy gradual", "unfreeze_every"),
        (kind == "lora", "--strategy lora", "lora_rank", "lora_alpha"),
        (kind == "adapter", "--strategy adapter", "adapter_channels"),
        (kind == "full", "--strategy full", "fused_bn", "sync_bn"),  # a frozen batch-norm computes no statistics
        (kind not in ("lora", "adapter"), "a --strategy that trains the network's weights",
         "l2_sp", *["layer_decay"] * (args.layer_decay != 1)),
        (args.target_domain, "--target-domain", "align", "align_weight"),
        (args.align != "none", "--align coral and mmd", "align_weight"),
        # --strategy stands in every args.json
        (not args.eval_only, "training, not with --eval-only", "target_domain", "search", "then", "lr_find", "views",
         "ohem", "head_lr_mult", "trainable_stages", "score_threshold"),
        (not args.eval_only, "training; --eval-only scores what --checkpoint holds", "model",
         *("weights", "stride_on", "attention", "stem") * (args.task == "detect")))
    train.check_args(args, usual)
    if wrong := [text for text, applies in at_odds(args, kind).items() if applies]:
        raise UserError(wrong[0], code=2)


def beyond_head(args):
    """-> the flag that asks for more than a head on cached features, or None; a step has --then among its flags where
    its head will go"""
    wrong = [f"--{k.replace('_', '-')}" for k, without in BEYOND_HEAD.items()
             if getattr(args, k) not in (None, 0, without)]
    wrong += ["--align mmd"] * bool(args.target_domain and args.align == "mmd") + ["--then"] * bool(args.then)
    return wrong[0] if wrong else None


def other_views(args):
    return args.views != get_args_parser().get_default("views")


def linear_head(model):
    """-> whether its head can learn from features of whole images, as a convolution cannot"""
    return isinstance(model.get_submodule(head_of(model)), nn.Linear)


def head_alone(args, model):
    """-> whether a head on cached features can do what the flags ask"""
    return linear_head(model) and not beyond_head(args)


# ----------------------------------------------------------------------------------------------------- the network

def load_source(args):
    """-> model in eval mode, its checkpoint dict, where it came from. --classes and --num-classes speak of the data."""
    if not args.model:
        return load_some_model(changed(args, classes=None, num_classes=None), DEFAULTS, trains=True)
    torchvision_model(args.model)  # refuses the name
    if args.checkpoint:
        checkpoint, source = load_checkpoint(args.checkpoint), args.checkpoint
        if not checkpoint["config"]:
            last = [v for v in checkpoint["model"].values() if v.ndim > 1][-1:]
            checkpoint["config"] = dict(arch=args.model, num_classes=len(last[0]) if last else 0)
        elif checkpoint["config"].get("arch") != args.model:
            raise UserError(f"{source}: holds {checkpoint['config'].get('arch', 'ResNet-50')}, not {args.model}")
    else:
        source = f"{args.model} {args.weights or 'DEFAULT'}"
        checkpoint = fetch_weights(args.weights or "DEFAULT", args.model)
    return build_model(checkpoint, source), checkpoint, source


def trained_share(model):
    trained, total = (sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (0, 1))
    return f"{trained:,} of {total:,} parameters are trained ({100 * trained / total:.2f} %)"


def head_of(model):
    """-> name of the layer whose outputs are the classes: the last linear one or convolution"""
    name, module = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    if module.weight.shape[0] != model.config["num_classes"]:
        raise UserError(f"{model.config.get('arch')}: found no head: {name} has {module.weight.shape[0]} outputs")
    return name


def plain_resnet(model):
    """-> whether it is a ResNet-50 as fuse() and a detector take it, without adapters"""
    return isinstance(model, ResNet50) and not model.config.get("adapter")


def rebuilt(model, seed, new_head, **changes):
    """-> a copy of the network with some of its config changed; the head is new if new_head, and adapters if it has
    none"""
    torch.manual_seed(seed)
    config = {**model.config, **changes}
    new = torchvision_model(**config) if "arch" in config else ResNet50(**config)
    head = head_of(new)
    state = model.state_dict()  # has versions of the modules, without which mnasnet refuses it
    for key in [k for k in state if new_head and k.startswith(head + ".")]:
        del state[key]
    new.load_state_dict(state, strict=False)
    if new_head:
        layer = new.get_submodule(head)
        nn.init.normal_(layer.weight, std=0.01)
        if layer.bias is not None:  # maxvit_t has none
            nn.init.zeros_(layer.bias)
    new.preprocess, new.sparse_keys = dict(model.preprocess), getattr(model, "sparse_keys", ())
    return new.to(memory_format=torch.channels_last).eval()


def stages_of(model):
    """-> lists of names of submodules, from the top down; the first is the head's. A part that holds most of the
    parameters is divided further, and no more than STAGES are left below the head."""
    head = head_of(model)

    def below(name):
        return [p for n, p in model.named_parameters() if n.startswith(name + ".") and not n.startswith(head + ".")]

    def size(name):
        return sum(p.numel() for p in below(name))

    def inside(module, prefix=""):
        return [prefix + n for n, m in module.named_children() if size(prefix + n)]
    parts = inside(model)
    while True:
        largest = max(parts, key=size)
        inner = inside(model.get_submodule(largest), largest + ".")
        if not inner or size(largest) <= 0.8 * sum(map(size, parts)):
            break
        at = parts.index(largest)
        parts[at:at + 1] = inner
    groups = []
    for part in parts:  # a batch-norm belongs to the convolution before it
        if groups and all(p.ndim < 2 for p in below(part)):
            groups[-1].append(part)
        else:
            groups.append([part])
    chunks = np.array_split(np.arange(len(groups)), min(STAGES, len(groups)))
    return [[head]] + [[n for i in chunk for n in groups[i]] for chunk in reversed(chunks)]


class LowRank(nn.Module):
    """weight -> weight + alpha / rank * B A, of a convolution (O, I, h, w): A (rank, I h w) starts at random, B
    (O, rank) at zero, so that the network starts as it was (Hu et al., arXiv 2106.09685). What is zero stays zero:
    sparsity survives."""

    def __init__(self, weight, rank, alpha):
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, weight[0].numel()))
        self.b = nn.Parameter(torch.zeros(len(weight), rank))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.a, math.sqrt(5))

    def forward(self, weight):
        return weight + (self.scale * self.b @ self.a).view_as(weight) * (weight != 0)


def add_lora(model, rank, alpha, seed):
    """A LowRank on every convolution but grouped ones"""
    torch.manual_seed(seed)
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank, alpha))


def merged(model):
    """-> a network in which LowRanks have become plain weights. (Not by remove_parametrizations on a copy: the copy
    shares its classes with the original, which would lose them.)"""
    state = {k.replace("parametrizations.weight.original", "weight"): v for k, v in model.state_dict().items()
             if ".parametrizations.weight.0." not in k}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            state[name + ".weight"] = module.weight.detach()
    return build_model(as_checkpoint(model, state, encode=dict.fromkeys(model.sparse_keys, "sparse")), "LoRA")


def on_features(model):
    """Makes the model, in place, take what its head reads, (N, C, 1, 1), as well as images."""
    name = head_of(model)

    class OnFeatures(type(model)):
        def forward(self, x):
            if x.shape[-1] > 1:
                return super().forward(x)
            return self.get_submodule(name)(F.dropout(x.flatten(1), self.config.get("dropout", 0.0), self.training))
    model.__class__ = OnFeatures
    return model


def reader(model, amp):
    """-> callable: uint8 pixels (N, 3, H, W) -> what the head reads, float32 (N, C). On the CPU a ResNet-50 runs on the
    fused kernels, with the identity for its classifier."""
    head = head_of(model)
    layer = model.get_submodule(head)
    if plain_resnet(model) and not layer.weight.is_cuda:
        probe = rebuilt(model, 0, True, num_classes=layer.in_features)
        nn.init.eye_(probe.fc.weight)
        net, amp = fuse(probe, amp if amp == torch.bfloat16 else torch.float32), None  # it casts by itself
    else:
        net = copy.deepcopy(model).eval()
        net.set_submodule(head, nn.Identity())

    def read(pixels):
        with torch.autocast(pixels.device.type, amp or torch.bfloat16, enabled=amp is not None):
            return predict(net, pixels)
    return read


# ---------------------------------------------------------------------------------------------------- before training

def examine(files, i):
    """-> (i, path, format, digest of the file), or (i, complaint, None, None)"""
    path, raw = files.path(i), files.pack is not None and files.pack.head["mode"] == "raw"
    try:
        data.load(path)
        content = data.read(path)
        kind = "pixels" if raw else Image.open(io.BytesIO(content)).format  # pixels may begin as a format's files do
        return i, path, kind, hashlib.blake2b(content, digest_size=16).digest()
    except (OSError, ValueError) as error:
        return i, f"{path}: {error}", None, None


def leave_out(files, val, args, stop=None):
    """Training and validation Files -> the same without what does not decode (an error unless --on-corrupt skip) and
    without training images that are validation images too; notes; examine()'s of what decodes of either. The train.Stop
    ends it."""
    if len(files) + len(val) > CHECKED and not (args.search or args.strategy in ("head", "gradual")):
        return files, val, [f"data check: more than {CHECKED} files are not read beforehand"], ((), ())
    notes, found = [], []
    for name, part in (("training", files), ("validation", val)):
        with concurrent.futures.ThreadPoolExecutor(max(1, args.workers)) as pool:
            seen = list(pool.map(lambda i: not (stop and stop.requested) and examine(part, i), range(len(part))))
        if by := stop and next(filter(None, stop.world.gather(stop.requested)), None):
            raise UserError(f"stopped by {by} in the data check, before the first step; the same command begins "
                            "again", code=75)
        bad = [complaint for _, complaint, kind, _ in seen if not kind]
        train.check_corrupt(bad, args.on_corrupt)
        if bad:
            notes.append(f"data check: {len(bad)} {name} files are left out, as they do not decode: {some(bad)}")
        found.append([row for row in seen if row[2]])
    held = {digest: path for _, path, _, digest in found[1]}
    twice = [f"{path} is {held[digest]}" for _, path, _, digest in found[0] if digest in held]
    if twice:
        notes.append(f"data check: {len(twice)} training images are validation images too and left out of training: "
                     + some(twice))
    kept = [i for i, _, _, digest in found[0] if digest not in held], [i for i, *_ in found[1]]
    for name, keep in zip(("training", "validation"), kept):
        if not keep:
            raise UserError(f"{args.data}: no {name} image is left")
    return files.select(np.array(kept[0])), val.select(np.array(kept[1])), notes, found


def check_data(sets, args, stop=None):
    """(train Files, val Files, classes, wnids, notes) -> the same as leave_out() leaves it; the notes say what a person
    should look at before training."""
    every, val, classes, wnids, notes = sets
    files, val, more, found = leave_out(every, val, args, stop)
    notes, first = notes + more, {}
    for part, (i, path, _, digest) in [(part, row) for part, rows in zip(sets, found) for row in rows]:
        label, other = first.setdefault(digest, (part.labels[i], path))
        if label != part.labels[i]:
            notes.append(f"data check: {path} and {other} are the same image in two classes")
    formats = collections.Counter(kind for part in found for _, _, kind, _ in part)
    odd = [f"{path} is the only {kind}" for part in found for _, path, kind, _ in part
           if formats[kind] == 1 and len(formats) > 1]
    notes += [f"data check: {some(odd)}, see whether it belongs there"] if odd else []
    counts = [np.bincount(part.labels, minlength=len(classes)) for part in (files, val)]
    # a class of --classes may have none from the start
    if missing := [classes[i] for i in np.unique(every.labels) if not counts[0][i]]:
        raise UserError(f"{args.data}: no training image is left of {some(missing)}")
    if tiny := [f"{c} ({n})" for c, n in zip(classes, counts[0]) if n < TINY]:
        notes.append(f"data check: classes of very few training images: {some(tiny, 10)}")
    table = [f"{c[:40]}: {a} and {b}" for c, a, b in zip(classes, *counts)]
    return files, val, classes, wnids, notes + ["training and validation images by class: " + some(table, 20)]


def resolve(args, model, images):
    """Fills in what --strategy decides. -> a line of text"""
    kind, _, number = args.strategy.partition(":")
    why = ""
    if kind == "auto":
        kind = ("head" if images < FEW and head_alone(args, model) else
                "gradual" if images < MANY or args.unfreeze_every > 1 or other_views(args) else "full")
        why = f", for {images} images " + {
            "head": "are too few to move a whole network (--strategy gradual does)",
            "gradual": "allow the stages to follow the head one by one", "full": "are enough to train everything"}[kind]
        if kind == "gradual" and images < FEW:
            wrong = beyond_head(args)
            why = f", as {wrong} asks for more than a head alone" if wrong else ", as the head is a convolution"
        args.strategy = kind
    for key, value in STRATEGIES[kind].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.image_size = args.image_size or model.preprocess["crop"]
    args.interpolation = args.interpolation or model.preprocess["interpolation"]
    if args.image_size == model.preprocess["crop"] and not args.val_size and not args.val_resize:
        args.val_size, args.val_resize = model.preprocess["crop"], model.preprocess["resize"]
    if kind == "head" and not head_alone(args, model):
        raise UserError(f"--strategy head: {model.config['arch']}'s head is a convolution, which reads no features of "
                        "whole images; layers:1 trains it too", code=2)
    if args.target_domain and args.align == "coral" and kind != "head" and args.batch_size == 1:
        raise UserError("--batch-size 1: one image has no covariance for --align coral; at least 2, or --align mmd",
                        code=2)
    if kind == "adapter" and "arch" in model.config:
        raise UserError(f"--strategy adapter: {model.config['arch']} has no place for them, ResNet-50 does", code=2)
    if kind == "layers" and not 0 < int(number) < len(stages_of(model)):
        raise UserError(f"--strategy {args.strategy}: this network has {len(stages_of(model)) - 1} stages", code=2)
    return f"strategy {args.strategy}{why}"


# ----------------------------------------------------------------------------------------------------- the strategies

class Features(torch.utils.data.Dataset):
    """What the head reads of every image: key (epoch, index, repeat) -> (float32 (1, 1, C), label, None), in turn from
    all views"""

    def __init__(self, files, values):
        self.files, self.values = files, values  # float32 (views, N, C)

    def __getitem__(self, key):
        epoch, index, repeat = key
        value = self.values[(epoch + repeat) % len(self.values), index]
        return value.view(1, 1, -1), int(self.files.labels[index]), None


class FineTuning(train.Plan):
    """A run on the sets of `source`, the network that it starts from"""

    def __init__(self, args, world, stop, source, sets, notes, new_head, cache):
        self.args, self.world, self.stop, self.sets, self.cache = args, world, stop, sets, cache
        self.source, self.notes, self.new_head = source, notes, new_head
        self.kind, _, self.number = args.strategy.partition(":")
        self.amp = train.amp_dtype(args, world.device)
        target = data.scan_unlabelled(args.target_domain) if args.target_domain else None
        self.target = target if args.align != "none" else None
        # what is not aligned yet does not compete, nor what has learned nothing that --then keeps
        self.knows = not new_head and self.target is None and not args.then

    def open(self, args, world):
        return *self.sets, self.notes

    def model(self, args, classes):
        changes = {k: v for k, v in dict(drop_path=args.drop_path, dropout=args.dropout).items() if v is not None}
        if changes and "arch" in self.source.config:
            raise UserError("--drop-path and --dropout are ResNet-50's", code=2)
        if self.kind == "adapter":
            changes["adapter"] = args.adapter_channels
            has = self.source.config.get("adapter", args.adapter_channels)
            if has != args.adapter_channels:
                raise UserError(f"--adapter-channels {args.adapter_channels}: the network's have {has}", code=2)
        model = rebuilt(self.source, args.seed, self.new_head, num_classes=len(classes), **changes)
        model.preprocess = train.preprocess_of(args, self.source.preprocess)
        self.net, self.stages, self.opened = train.prepare(model, args), stages_of(model), None
        if self.kind == "head":
            on_features(model)
        elif self.world.device.type == "cpu":
            train.cpu_convolutions(model, args.compile)  # before LoRA, which makes classes of its own of these
        if self.kind == "lora":
            add_lora(model, args.lora_rank, args.lora_alpha, args.seed)
        if self.kind in ("lora", "adapter"):
            self.begin(model, 0)  # so that the optimizer has no state of what they never train
        if self.target is not None and self.kind != "head":
            model.get_submodule(self.stages[0][0]).register_forward_pre_hook(
                lambda _, inputs: setattr(self, "seen", means(inputs[0])))  # no method: copies would copy the plan
        return model

    def rehearse(self):
        """Makes the network, and tries out a batch of one, which may be too few for a batch-norm of any stage"""
        args, net = self.args, self.model(self.args, self.sets[2]).to(self.world.device)
        if args.batch_size == 1:
            self.begin(net.train(), args.unfreeze_every * STAGES)
            train.wrap(net, args, self.world, self.amp)

    def depth(self, name):
        """Of a parameter: 0 in the head and in what LoRA and adapters add, then the stage's number from the top"""
        if "parametrizations.weight.0" in name or self.kind == "adapter" and ".adapter." in name:
            return 0
        return next((i for i, stage in enumerate(self.stages) if any(name.startswith(part + ".") for part in stage)),
                    len(self.stages) - 1)  # a vision transformer has parameters beside its parts

    def share(self, name):
        depth = self.depth(name)
        return self.args.layer_decay ** (depth - 1) if depth else self.args.head_lr_mult

    def begin(self, model, epoch):
        """The stages that an epoch trains"""
        count = {"layers": 1 + int(self.number or 0), "full": len(self.stages),
                 "gradual": 2 - self.new_head + epoch // self.args.unfreeze_every}.get(self.kind, 1)
        count = min(count, len(self.stages))
        if count == self.opened:
            return False
        self.opened = count
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                train.freeze(module, self.depth(name + ".weight") >= count)
        for name, p in model.named_parameters():
            p.requires_grad_(self.depth(name) < count)
        return True

    def plain(self, model):
        return merged(model) if self.kind == "lora" else model

    def describe(self, args, model):
        shown = ("opt", "weight_decay", "layer_decay", "head_lr_mult", "label_smoothing", "loss", "image_size")
        return [f"strategy {args.strategy}: " + ", ".join(f"{k}={getattr(args, k)}" for k in shown),
                trained_share(model) + " in this epoch" * (self.kind == "gradual")]

    def images(self, files, transform_at, args, training):
        images, workers = super().images(files, transform_at, args, training)
        if self.kind != "head":
            return images, workers
        values = self.features(images, args.views if training else 1, "training" if training else "validation")
        if self.target is not None and training:
            target = data.Images(self.target, lambda _: data.eval_transform(self.net.preprocess), exif=args.exif,
                                 replace=True)  # a damaged one: moments take another instead
            self.recolour = recolouring(values.flatten(0, 1), self.features(target, 1, "target")[0])
        if self.target is not None:
            values = values.lerp(self.recolour(values), args.align_weight)
        return Features(files, values), 0

    def features(self, images, views, part):
        """What the head reads of all images of that part of the data, in as many epochs' augmentations -> float32
        (views, N, C), from the file `cache` where another run, or this one before it was stopped, has left them"""
        args, world, path = self.args, self.world, self.cache
        shown = [(k, v) for k, v in sorted(vars(args).items()) if k in AUGMENTATION + ("seed", "exif", "image_size")]
        about = part, images.files.root, shown, views, self.net.preprocess, str(self.amp)
        key = hashlib.blake2b(repr(about).encode())
        for value in (images.files.blob, *(v.numpy() for v in self.source.state_dict().values())):
            key.update(np.ascontiguousarray(value))
        key, known = key.hexdigest(), {}
        with contextlib.suppress(Exception):  # a cache: missing, or whatever is wrong with it, it is computed again
            known = torch.load(path, weights_only=True)
        if key in known:
            return known[key]
        read, parts, n = reader(self.net, self.amp), [], len(images.files)
        batches = [[(epoch, i, 0) for _, i, _ in batch] for epoch in range(views)
                   for batch in data.eval_batches(n, 32, world.rank, world.size)]
        loader = iter(data.make_loader(images, batches, args.workers, world.device))
        with torch.no_grad():
            for at in range(views * len(data.eval_batches(n, 32, 0, world.size))):
                if self.stop.poll():  # collective: as often in every process
                    raise UserError(f"stopped by {self.stop.requested or 'a signal'} while it computed features; the "
                                    "same command with --resume auto goes on", code=75)
                if at < len(batches):
                    pixels, labels, bad = next(loader)
                    train.check_corrupt(bad, "error" if len(labels) < len(batches[at]) else args.on_corrupt)
                    parts.append(read(pixels).cpu())
        mine = torch.cat(parts).view(views, -1, parts[0].shape[1]) if parts else torch.zeros(views, 0, 1)
        values = torch.empty(views, n, self.net.get_submodule(self.stages[0][0]).weight.shape[1])
        for rank, theirs in enumerate(world.gather(mine)):
            values[:, rank::world.size] = theirs
        if world.rank == 0:
            buffer = io.BytesIO()
            torch.save({**known, key: values}, buffer)
            write_atomic(path, buffer.getbuffer())
        world.barrier()
        return values

    def teach(self, loss_fn):
        args, aligns = self.args, self.target is not None and self.kind != "head"
        start = {n: p.detach().clone() for n, p in self.net.named_parameters() if args.l2_sp and self.depth(n)}
        if aligns:
            images = data.Images(
                self.target, lambda _: data.train_transform(args.image_size, self.net.preprocess, args),
                args.seed, args.exif, replace=True)
            match = coral if args.align == "coral" else mmd

        def loss(logits, target, pixels=None):
            if args.ohem < 1:
                hardness = F.cross_entropy(logits.detach(), target, reduction="none")
                hard = hardness.topk(max(1, round(args.ohem * len(target)))).indices
                logits, target = logits[hard], target[hard]
            total = loss_fn(logits, target, pixels)
            if start:
                pull = sum(((p - start[n]) ** 2).sum() for n, p in self.net.named_parameters()
                           if n in start and p.requires_grad)
                total = total + args.l2_sp / 2 * pull
            if aligns:
                source = self.seen
                # the step's generator: a resumed run draws the same images
                draws, index = (torch.randint(n, (len(source),)).tolist() for n in (2 ** 31, len(self.target)))
                batch, _, bad = images.batch([(0, i, draw) for i, draw in zip(index, draws)])
                train.check_corrupt(bad, args.on_corrupt)
                with torch.autocast(self.world.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None):
                    self.net(normalize(batch.to(self.world.device), self.net.preprocess))
                total = total + args.align_weight * match(source.float(), self.seen.float())
            return total
        return loss


# ---------------------------------------------------------------------------------------------------------- alignment

def means(features):
    """(N, C), or what a convolution reads (N, C, H, W) -> (N, C)"""
    return features.flatten(2).mean(2) if features.ndim > 2 else features


def covariance(x):
    x = x - x.mean(0)
    return x.T @ x / max(len(x) - 1, 1)


def coral(source, target):
    """float (N, C), (M, C) -> squared distance of the covariances / 4 C^2 (Deep CORAL, arXiv 1607.01719), in units of
    the source's mean variance, so that its weight does not depend on the scale of the features; and of the means"""
    a, b = covariance(source), covariance(target)
    unit = a.diagonal().mean().detach().clamp(min=1e-12)
    shift = (source.mean(0) - target.mean(0)).square().mean() / unit
    return (a - b).square().sum() / (4 * len(a) ** 2 * unit ** 2) + shift


def mmd(source, target):
    """float (N, C), (M, C) -> squared maximum mean discrepancy under a sum of five Gaussian kernels around the mean
    squared distance (arXiv 1502.02791); biased, so never negative"""
    x = torch.cat([source, target])
    squares = torch.cdist(x, x).square()
    width = squares.detach().sum() / (len(x) * (len(x) - 1))
    kernel = sum(torch.exp(-squares / (width * 2.0 ** k)) for k in range(-2, 3))
    n = len(source)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


def recolouring(source, target, ridge=10.0):
    """float (N, C), (M, C) -> callable that gives features of the source the mean and covariance of the target's
    (CORAL, arXiv 1511.05547): (x - mean_s) Cs^-1/2 Ct^1/2 + mean_t, where `ridge` times the mean variance is added to
    both diagonals: there are fewer images than channels, and with little of it the noise of the small directions is
    blown up (with 0.1 the recoloured validation images of the source lose 18 points). In float64."""
    means, roots = [], []
    for x, power in ((source.double(), -0.5), (target.double(), 0.5)):
        c = covariance(x)
        c.diagonal().add_(ridge * c.diagonal().mean().clamp(min=1e-12))
        values, vectors = torch.linalg.eigh(c)
        means.append(x.mean(0))
        roots.append(vectors * values.clamp(min=1e-12) ** power @ vectors.T)
    turn = roots[0] @ roots[1]
    return lambda x: ((x.double() - means[0]) @ turn + means[1]).float()


# ------------------------------------------------------------------------------------------------- rates and searches

def range_test(plan, args, world, rates):
    """Trains a copy, a step at each rate -> smoothed losses, up to where it diverges, and images in a step"""
    files, classes = plan.sets[0], plan.sets[2]
    model = plan.model(args, classes).to(world.device, memory_format=torch.channels_last).train()
    optimizer = train.make_optimizer(model, args.opt, args.weight_decay, args.momentum, plan.share)
    plan.begin(model, 0)
    loss_fn = plan.teach(train.loss_of(args, files, classes, world.device))
    images, workers = plan.images(
        files, lambda _: data.train_transform(args.image_size, model.preprocess, args), args, True)
    order = data.Order(files.labels, min(args.batch_size, len(files)), seed=args.seed, balanced=args.balanced)
    loader, losses, smooth = data.make_loader(images, order, workers, world.device), [], 0.0

    def batches():
        for epoch in itertools.count():
            order.epoch = epoch
            yield from loader
    for rate, (pixels, labels, _) in zip(rates, batches()):
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_share"]
        torch.manual_seed(data.seed_for(args.seed, 4, len(losses)))
        loss, _, applied = train.train_step(model, model, [(pixels, labels)], optimizer, loss_fn, amp=plan.amp)
        loss, applied = world.gather((loss.item(), applied))[0]  # or GPUs' roundings would end it at different steps
        if plan.stop.poll():
            raise UserError(f"stopped by {plan.stop.requested or 'a signal'} in the range test; the same command "
                            "with --resume auto starts it anew", code=75)
        if not applied or not math.isfinite(loss):
            break
        smooth = 0.9 * smooth + 0.1 * loss
        losses.append(smooth / (1 - 0.9 ** (len(losses) + 1)))
        if losses[-1] > 3 * min(losses):
            break
    return losses, order.global_batch


def find_lr(plan, args, world, steps=80, low=1e-6, high=1e-1):
    """range_test() with a rate that grows from step to step (Smith, arXiv 1506.01186) -> the rate around which the loss
    falls most; leaves OUT/lr.svg. It is --lr's, for --lr-base-size: new parts learn faster as ever."""
    rates = [low * (high / low) ** (i / (steps - 1)) for i in range(steps)]
    losses, batch = range_test(plan, args, world, rates)
    if not losses:
        raise UserError("--lr-find: training diverged at once", code=4)
    # Over a factor of ten: from one step to the next the batches' noise is greater than the fall. What comes after the
    # lowest loss is on the way up.
    half, upto = steps // 10, int(np.argmin(losses)) + 1
    falls = np.subtract(losses[2 * half:upto], losses[:max(0, upto - 2 * half)])
    chosen = rates[half + int(np.argmin(falls))] if len(falls) else low
    if world.rank == 0:
        write_atomic(os.path.join(args.out, "lr.svg"), rates_svg(rates[:len(losses)], losses, chosen).encode())
    return chosen * args.lr_base_size / batch if args.lr_base_size else chosen


def rates_svg(rates, losses, chosen):
    """Loss over the logarithm of the rate, and the rate that was taken"""
    left, top, width, height = 60, 30, 560, 260
    x = lambda r: left + width * math.log(r / rates[0]) / math.log(max(rates[-1] / rates[0], 1.001))  # noqa: E731
    low, high = min(losses), max(losses)
    y = lambda v: top + height * (high - v) / (high - low or 1)  # noqa: E731
    ticks = [10.0 ** e for e in range(math.ceil(math.log10(rates[0])), math.floor(math.log10(rates[-1])) + 1)]
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 20} {top + height + 45}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>',
        *(f'<path d="M{x(t):.1f} {top}V{top + height}" stroke="#ddd"/><text x="{x(t):.1f}" y="{top + height + 17}" '
          f'text-anchor="middle">{t:g}</text>' for t in ticks),
        *(f'<text x="{left - 8}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.3g}</text>' for v in (low, high)),
        f'<path d="M{x(chosen):.1f} {top}V{top + height}" stroke="#c05020"/><text x="{x(chosen):.1f}" y="{top - 8}" '
        f'text-anchor="middle" fill="#c05020">{chosen:.2g}</text>',
        f'<polyline points="{" ".join(f"{x(r):.1f},{y(v):.1f}" for r, v in zip(rates, losses))}" fill="none" '
        'stroke="#4878a8" stroke-width="1.6"/>',
        f'<text x="{left + width}" y="{top + height + 34}" text-anchor="end" fill="#666">learning rate (--lr); '
        'smoothed training loss above</text></svg>'])


def search(args, run, kinds):
    """Successive halving (arXiv 1502.07943) over strategies of these kinds and learning rate: all of N settings for one
    epoch, then the better half for two, and so on. run(args) is a run's result. -> (rows of a table, best setting)"""
    settings = [dict(strategy=kind, lr=args.lr * factor) for factor in SEARCHED for kind in kinds]
    rows, alive, epochs = [], settings[:args.search], 1
    while True:
        for setting in alive:
            name = f"{setting['strategy']}-{setting['lr']:.2g}-{epochs}".replace(":", "")
            result = run(changed(args, **setting, epochs=epochs, patience=0, resume=args.resume and "auto",
                                 overwrite=True, out=os.path.join(args.out, "search", name)))
            rows.append(dict(setting, epochs=epochs, **{k: result[k] for k in ("top1", "loss", "seconds")}))
        ranked = sorted(zip(rows[-len(alive):], alive), key=lambda pair: (-pair[0]["top1"], pair[0]["loss"]))
        alive = [setting for _, setting in ranked[:max(1, len(alive) // 2)]]
        if len(alive) == 1:
            return rows, alive[0]
        epochs *= 2


# ----------------------------------------------------------------------------------------------- what a person looks at

@torch.no_grad()
def logits_of(model, files, args, world):
    """-> float32 (N, classes) of all files, by evaluate()'s way, on every process; NaN for what does not decode (an
    error unless --on-corrupt skip)"""
    numbered = copy.copy(files)
    numbered.labels = np.arange(len(files), dtype=np.int32)
    images = data.Images(numbered, lambda _: data.eval_transform(model.preprocess), exif=args.exif)
    batches = data.eval_batches(len(files), 32, world.rank, world.size)
    net, mine = fuse(model) if plain_resnet(model) and world.device.type == "cpu" else model, []
    for pixels, at, bad in data.make_loader(images, batches, args.workers, world.device):
        train.check_corrupt(bad, args.on_corrupt)
        if len(at):
            logits = predict(net, pixels)
            mine.append((at.cpu(), ((logits + predict(net, pixels.flip(3))) / 2 if args.tta else logits).cpu()))
    logits = torch.full((len(files), model.config["num_classes"]), math.nan)
    for at, values in itertools.chain(*world.gather(mine)):
        logits[at] = values
    return logits


def accuracy(logits, labels, k=1):
    """-> percent whose label is among the k likeliest, of the rows that have logits; None where none has"""
    right = (logits.topk(min(k, logits.shape[1])).indices.numpy() == labels[:, None]).any(1)
    right = right[~logits[:, 0].isnan().numpy()]
    return round(100 * float(right.mean()), 4) if len(right) else None


def confusion_svg(matrix, classes):
    """int (n, n), images of class row that were taken for class column -> a picture of the rows' shares; with numbers
    and names as long as they can be read"""
    n, named = len(classes), len(classes) <= 60
    cell = max(4, min(48, 900 // n))
    left = 12 + (min(max(map(len, classes)), 24) * 7 if named else 0)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + n * cell + 20} {left + n * cell + 30}" '
           'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>',
           f'<text x="{left}" y="{left + n * cell + 20}">rows: what it is; columns: what it was taken for</text>']
    for i, j in np.argwhere((matrix > 0) | np.eye(n, dtype=bool)).tolist():
        red, x, y = i != j, left + j * cell, left + i * cell
        svg.append(f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" '
                   f'fill="{"#c05020" if red else "#4878a8"}" fill-opacity="{0.08 + 0.92 * shares[i, j]:.3f}"><title>'
                   f'{html.escape(classes[i])} as {html.escape(classes[j])}: {matrix[i, j]}</title></rect>')
        if cell >= 24:
            svg.append(f'<text x="{x + cell / 2 - 0.5}" y="{y + cell / 2 + 4}" text-anchor="middle" '
                       f'fill="{"white" if shares[i, j] > 0.5 else "black"}">{matrix[i, j]}</text>')
    for i, name in enumerate(classes if named else ()):
        name, at = html.escape(name[:24]), left + i * cell + cell / 2
        svg.append(f'<text x="{left - 6}" y="{at + 4}" text-anchor="end">{name}</text>'
                   f'<text transform="translate({at + 4} {left - 6}) rotate(-90)">{name}</text>')
    return "\n".join(svg + ["</svg>"])


def contact_sheet(tiles, columns=4, side=220):
    """[(PIL RGB image, caption)] -> PNG bytes: the images in a grid, each within side x side pixels over its caption"""
    rows, line, gap = -(-len(tiles) // columns), 13, 8
    height = side + 3 * line + gap
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * height + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(tiles):
        x, y = gap + i % columns * (side + gap), gap + i // columns * height
        small = image.copy()
        small.thumbnail((side, side))
        sheet.paste(small, (x + (side - small.width) // 2, y + side - small.height))
        for k, text in enumerate(caption.split("\n")[:3]):
            text = text.encode("latin-1", "replace").decode("latin-1")  # what PIL's own font has
            pen.text((x, y + side + 2 + k * line), text[:side // 6], fill="black")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def report(model, val, classes, args, world, most=24):
    """Scores the finished network on `val`; the first process writes confusion.csv, confusion.svg and, of up to `most`
    mistakes, the worst first, mistakes.png. -> dict(top1, top5, loss, per_class, mistakes)"""
    logits, labels, n = logits_of(model, val, args, world), torch.from_numpy(val.labels).long(), len(classes)
    predicted, seen = logits.argmax(1), ~logits[:, 0].isnan()
    matrix = (labels * n + predicted)[seen].bincount(minlength=n * n).view(n, n).numpy()
    counts = matrix.sum(1)
    shares = [round(100 * matrix[i, i] / counts[i], 3) if counts[i] else None for i in range(n)]
    per_class = {c if classes.count(c) == 1 else f"{c} ({i})": a  # ImageNet has two cranes
                 for i, (c, a) in enumerate(zip(classes, shares))}
    loss = F.cross_entropy(logits, labels, reduction="none")
    wrong = [i for i in loss.argsort(descending=True, stable=True).tolist() if seen[i] and predicted[i] != labels[i]]
    if world.rank == 0:
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([["true \\ predicted", *classes, "accuracy"]] + [
            [c, *row, share] for c, row, share in zip(classes, matrix, shares)])
        for name, text in (("csv", table.getvalue()), ("svg", confusion_svg(matrix, classes))):
            # a class has its folder's name, which may be any bytes
            write_atomic(os.path.join(args.out, f"confusion.{name}"), text.encode(errors="backslashreplace"))
        tiles = [(data.load(val.path(i), args.exif), f"{os.path.basename(val.path(i))}\nis {classes[labels[i]]}\ntaken "
                  f"for {classes[predicted[i]]}, {100 * logits[i].softmax(0)[predicted[i]].item():.0f} %")
                 for i in wrong[:most]]
        path = os.path.join(args.out, "mistakes.png")
        if tiles:
            write_atomic(path, contact_sheet(tiles))
        elif os.path.exists(path):  # an overwritten run's
            os.unlink(path)
        worst = sorted((a, c) for c, a in per_class.items() if a is not None)
        print("accuracy by class, worst first: " + some([f"{c} {a:.1f} %" for a, c in worst], 20), file=sys.stderr)
    return dict(top1=accuracy(logits, val.labels), top5=accuracy(logits, val.labels, 5),
                loss=round(loss[seen].mean().item(), 6), per_class=per_class, mistakes=len(wrong))


# ---------------------------------------------------------------------------------------------------------- detection

class Boxes(NamedTuple):
    """Of one image: float64 (K, 4) x1 y1 x2 y2 in pixels, int (K,) labels from 1 (0 is the background), float64 (K,)
    areas (COCO counts an object's own pixels, where it has them), and which boxes are neither right nor wrong to find:
    crowds, which may be found many times, and VOC's difficult ones"""
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    ignored: np.ndarray


def find_image(names, folders, who, taken):
    """-> path of the first of these names that one of the folders holds; ValueError where none does, or where another
    than `who` has `taken` it: the boxes of one of them would be lost"""
    for path in (os.path.normpath(os.path.join(f, n)) for n in names for f in folders):
        if os.path.isfile(path):
            if (other := taken.setdefault(path, who)) != who:
                raise ValueError(f"its image {path} is that of {other} too")
            return path
    raise ValueError(f"its image {names[-1]} is not in {' or '.join(folders)}")


def size_of(width, height):
    """-> the image's size that an annotation states, or None where it states none"""
    with contextlib.suppress(TypeError, ValueError):
        return (float(width), float(height)) if float(width) and float(height) else None


VOC_OBJECT = ("name", "bndbox/xmin", "bndbox/ymin", "bndbox/xmax", "bndbox/ymax")


def read_voc(paths, folders):
    """Pascal-VOC xml files -> [(image's path, size_of() it, [(class, x1, y1, x2, y2, area, crowd, ignored)])], and the
    complaints about single files. An image is looked for under its file's own name, as who renames both leaves the
    name in the file as it was, then under that; coordinates count from 1 and include the last pixel."""
    entries, complaints, taken = [], [], {}
    for path in paths:
        try:
            root, found = xml.etree.ElementTree.parse(path).getroot(), []
            named = os.path.basename((root.findtext("filename") or "").replace("\\", "/"))
            stem = os.path.splitext(os.path.basename(path))[0]
            own = [stem + e for ext in data.EXTENSIONS for e in (ext, ext.upper())]
            names = [named] * (os.path.splitext(named)[0] == stem) + own + [named or own[0]]
            image = find_image(names, folders, path, taken)
            for item in root.iter("object"):
                if missing := [k for k in VOC_OBJECT if not item.findtext(k, "").strip()]:
                    raise ValueError(f"an object without {missing[0]}")
                name, *corners = (item.findtext(k).strip() for k in VOC_OBJECT)
                x1, y1, x2, y2 = map(float, corners)
                difficult = (item.findtext("difficult") or "0").strip() == "1"
                found.append((name, x1 - 1, y1 - 1, x2, y2, (x2 - x1 + 1) * (y2 - y1 + 1), False, difficult))
            entries.append((image, size_of(root.findtext("size/width"), root.findtext("size/height")), found))
        except (xml.etree.ElementTree.ParseError, OSError, LookupError, ValueError) as error:  # Lookup: encodings
            complaints.append(f"{path}: {error}")
    return entries, complaints


def read_coco(path, folders):
    """COCO json -> the same, and the complaints about single images and boxes"""
    try:
        with open(path, encoding="utf-8-sig") as f:
            content = json.load(f)
        names, by_image, entries, complaints, taken = {}, {}, [], [], {}
        for item in content["categories"]:
            if names.setdefault(item["id"], str(item["name"])) != str(item["name"]):
                raise ValueError(f"two categories have the id {item['id']}")
        for item in content["images"]:
            if by_image.setdefault(item["id"], found := []) is not found:
                raise ValueError(f"two images have the id {item['id']}")
        for a in content["annotations"]:
            try:
                x, y, w, h = map(float, a["bbox"])
                by_image[a["image_id"]].append((names[a["category_id"]], x, y, x + w, y + h,
                                                float(a.get("area", w * h)), bool(a.get("iscrowd")), False))
            except (KeyError, ValueError, TypeError) as error:
                complaints.append(f"{path}: annotation {a.get('id')}: {type(error).__name__}: {error}")
        for item in content["images"]:
            try:
                image = find_image([item["file_name"]], folders, f"image {item['id']}", taken)
                entries.append((image, size_of(item.get("width"), item.get("height")), by_image[item["id"]]))
            except ValueError as error:
                complaints.append(f"{path}: image {item['id']}: {error}")
        return entries, complaints
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not COCO annotations ({type(error).__name__}: {error})") from error


def folders_in(root, *names):
    paths = [os.path.join(root, n) for n in names]  # to some systems Annotations is annotations
    return list({os.stat(p).st_ino: p for p in paths if os.path.isdir(p)}.values())


def xmls_in(folder):
    return [os.path.join(folder, n) for n in sorted(os.listdir(folder))
            if n.lower().endswith(".xml") and not n.startswith(".")]


def common_folder(root, notes, eval_only):
    """annotations() where the folder `notes` has all splits': told apart by json files' names or by lists of images"""
    lists, found = os.path.join(root, "ImageSets", "Main"), {}
    pictures = [*folders_in(root, "images", "JPEGImages"), root]
    for split, names in (("train", ("train", "trainval")), ("val", ("val", "test")[:1 + eval_only])):
        listed = [path for n in names if os.path.isfile(path := os.path.join(lists, n + ".txt"))]
        jsons = [n for n in sorted(os.listdir(notes)) if re.fullmatch(rf"(instances_)?{split}.*\.json", n)]
        if jsons:  # annotations/instances_train2017.json and train2017/
            name = jsons[0].removesuffix(".json").removeprefix("instances_")
            found[split] = read_coco(os.path.join(notes, jsons[0]),
                                     [os.path.join(p, name) for p in pictures] + pictures)
            found[split][1].extend(f"{os.path.join(notes, n)}: not read, as {jsons[0]} is" for n in jsons[1:])
        elif listed:
            with open(listed[0], encoding="utf-8-sig", errors="surrogateescape") as f:
                lines = [line.strip() for line in f if line.strip()]
            # a class's own list has 1 or -1 behind each name, and a name may have blanks
            stems = dict.fromkeys(n if os.path.isfile(os.path.join(notes, n + ".xml")) else n.split()[0] for n in lines)
            found[split] = read_voc([os.path.join(notes, s + ".xml") for s in stems], pictures)
    files = [] if found else xmls_in(notes)
    return dict(train=read_voc(files, pictures)) if files else found


def annotations(root, eval_only):
    """-> {split: what read_voc() returns} of the layouts in the README; only "train" where there is no validation set,
    and only that one where it is all that is scored"""
    if not os.path.isdir(root):
        raise UserError(f"{root}: no such folder")
    found, notes = {}, ("annotations", "Annotations")
    for split, names in (("train", ("train",)), ("val", data.VAL_NAMES)):
        for folder in folders_in(root, *names):  # a folder for each split
            if os.path.isfile(coco := os.path.join(folder, "_annotations.coco.json")):
                found[split] = read_coco(coco, [folder])
            elif files := [path for sub in [*folders_in(folder, *notes), folder] for path in xmls_in(sub)]:
                found[split] = read_voc(files, [*folders_in(folder, "images", "JPEGImages"), folder])
    if not found and (common := folders_in(root, *notes)):
        found = common_folder(root, common[0], eval_only)
    if eval_only and "val" in found:
        return dict(val=found["val"])
    if "train" not in found:
        raise UserError(f"{root}: no annotations (train/annotations/*.xml, Annotations/*.xml with ImageSets/Main/"
                        "train.txt, annotations/instances_train*.json or train/_annotations.coco.json)")
    return found


def open_split(root, entries, classes, args, odd):
    """What read_voc() says of one split -> Files, {path: Boxes}, notes on what is left out. Boxes are cut to the image,
    and those without an area are left out. The lists `odd` get the paths of images of another size than stated, of
    those with boxes beyond them, and of each box without an area"""
    kept, known, notes, index = [], {}, [], {name: i + 1 for i, name in enumerate(classes)}
    other, beyond, empty = odd
    for path, stated, boxes in entries:
        name = os.path.relpath(path, root)  # without what a COCO file_name may have, ./ and ../
        path = os.path.join(root, name)
        try:
            with Image.open(path) as image:
                width, height = image.size
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            train.check_corrupt([f"{path}: {error}"], args.on_corrupt)
            notes.append(f"{path} is left out: {error}")
            continue
        if strange := sorted({b[0] for b in boxes} - set(index)):
            raise UserError(f"{path}: class {strange[0]} is not among the training set's: {some(classes, 10)}")
        corners = np.array([b[1:5] for b in boxes], dtype=np.float64).reshape(-1, 4)
        cut = np.clip(corners, 0, [width, height, width, height])
        good = (cut[:, 2:] - cut[:, :2] > 0.01).all(1)  # less may be nothing in float32
        rows = [(index[b[0]], *b[5:]) for b, use in zip(boxes, good) if use]
        known[path] = Boxes(cut[good], *(np.array([r[i] for r in rows], dtype=kind)
                                         for i, kind in enumerate((int, float, bool, bool))))
        other += [path] * (stated not in (None, (width, height)))
        beyond += [path] * bool((corners[:, :2] >= (width, height)).any())
        empty += [path] * int((~good).sum())
        kept.append(name)
    return data.Files(root, kept, np.zeros(len(kept))), known, notes


def hold_out(files, args, held):
    """Files of a folder without a validation set -> {split: Files} by data.hash_split, and a note. --val-split is the
    share, else `held`, where 0 is everything: nobody learned here"""
    none = f"{files.root}: no validation set, "
    if args.val_split is None and held == 0:
        return dict(val=files), none + "all of it is scored; --val-split 0.1 scores what training here holds out"
    first, last = data.hash_split(files, held if args.val_split is None else args.val_split)
    return dict(train=first, val=last), f"{none}{len(last)} of {len(files)} images held out by a hash of their names"


def open_boxes(root, args, classes=None, held=None, stop=None):
    """-> (train Files, with --eval-only perhaps None, val Files, classes, {path: Boxes}, notes); `held` as in
    hold_out(). UserError names what cannot be read, unless --on-corrupt skip, which leaves it out."""
    found, notes, known, files = annotations(root, args.eval_only), [], {}, {}
    if "val" in found and args.val_split is not None:
        raise UserError(f"--val-split: {root} has a validation set of its own", code=2)
    train.check_corrupt([c for _, complaints in found.values() for c in complaints], args.on_corrupt)
    classes = classes or sorted({box[0] for *_, boxes in found["train"][0] for box in boxes})
    if not classes:
        raise UserError(f"{root}: not one box in the training annotations")
    odd = other, beyond, empty = [], [], []
    for split, (entries, complaints) in found.items():
        notes += [f"{len(complaints)} {split} annotations are left out: {some(complaints)}"] * bool(complaints)
        files[split], boxes, more = open_split(root, entries, classes, args, odd)
        known.update(boxes)
        notes += more
    notes += [f"{len(paths)} {what} {some(paths)}" for paths, what in (
        (other, "images have another size than was annotated, made smaller or turned by a tag that is not followed "
                "here: their boxes may lie elsewhere:"),
        (beyond, "images have boxes that lie outside of them: were they annotated at another size?"),
        (empty, "boxes without an area, or outside of their image, are left out:")) if paths]
    if "val" not in files:
        files, note = hold_out(files["train"], args, held)
        notes.append(note)
    if not args.eval_only:
        *parts, more, _ = leave_out(files["train"], files["val"], args, stop)
        files, notes = dict(zip(("train", "val"), parts)), notes + more
    for split, part in files.items():
        boxes = [known[part.path(i)] for i in range(len(part))]
        if all((b.crowd | b.ignored).all() for b in boxes):
            raise UserError(f"{root}: no box in the {split} annotations that is to be found")
        labels = np.concatenate([b.labels for b in boxes])
        counts = np.bincount(labels, minlength=len(classes) + 1)[1:]
        notes.append(f"{split}: {len(part)} images, {len(labels)} boxes: "
                     + some([f"{c} {n}" for c, n in zip(classes, counts)], 20))
    return files.get("train"), files["val"], classes, known, notes


def scale_of(width, height, size, largest):
    """What an image is multiplied by: its short side becomes `size`, unless its long side would exceed `largest`"""
    return min(size / min(width, height), largest / max(width, height))


def anchors_of(files, known, size, largest):
    """-> five sizes, pixels after scaling, ascending, and three ratios height / width: quantiles of the boxes'. Where
    boxes are alike the sizes are spread by at least a quarter."""
    sizes, ratios = [], []
    for i in range(len(files)):
        with Image.open(files.path(i)) as image:
            scale = scale_of(*image.size, size, largest)
        extent = known[files.path(i)].boxes[:, 2:] - known[files.path(i)].boxes[:, :2]
        sizes += list(np.sqrt(extent.prod(1)) * scale)
        ratios += list(extent[:, 1] / extent[:, 0])
    sizes = np.quantile(sizes, (0.1, 0.3, 0.5, 0.7, 0.9))
    for i in (1, 0):
        sizes[i] = min(sizes[i], sizes[i + 1] / 1.25)
    for i in (3, 4):
        sizes[i] = max(sizes[i], sizes[i - 1] * 1.25)
    low, middle, high = np.quantile(ratios, (0.15, 0.5, 0.85))
    ratios = (min(low, middle / 1.3), middle, max(high, middle * 1.3))
    return [round(float(s), 1) for s in sizes], [round(float(r), 3) for r in ratios]


class BoxImages(data.Images):
    """Images at their scale with boxes: pixels uint8 (H, W, 3), and as label float32 (1 + K, 5): height, width, the
    original's height and width, index; then x1, y1, x2, y2, label of each box in the scaled image. In training flipped
    and scaled by chance, and without the boxes that are ignored."""
    __getitems__ = None  # they come one by one

    def __init__(self, files, known, args, replace):
        super().__init__(files, lambda _: None, args.seed, replace=replace)
        self.known, self.args = known, args

    def sample(self, image, i, key):
        chance = torch.Generator().manual_seed(data.seed_for(self.seed, *key))
        args, known = self.args, self.known[self.files.path(i)]
        scale = scale_of(*image.size, args.image_size, args.max_size)
        boxes, labels, flip = known.boxes, known.labels, False
        if self.replace:
            use = ~(known.crowd | known.ignored)
            boxes, labels = boxes[use], labels[use]
            scale *= 1.25 ** (2 * torch.rand((), generator=chance).item() - 1)
            flip = torch.rand((), generator=chance).item() < args.hflip
        width, height = (max(1, round(side * scale)) for side in image.size)
        pixels = np.array(image.resize((width, height), Image.Resampling.BILINEAR))
        rows = np.zeros((1 + len(boxes), 5), np.float32)
        rows[0] = height, width, image.height, image.width, i
        rows[1:, :4] = boxes * np.array([width / image.width, height / image.height] * 2)
        rows[1:, 4] = labels
        if flip:
            pixels = pixels[:, ::-1]
            rows[1:, [0, 2]] = width - rows[1:, [2, 0]]
        return torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(rows)

    def collate(self, samples):
        """-> pixels uint8 (N, 3, H, W), padded to multiples of 32 with grey, and rows (N, 1 + most, 5), with zeros"""
        good = [(pixels, rows) for pixels, rows, _ in samples if pixels is not None]
        complaints = [c for _, _, c in samples if c]
        height, width = (-(-max((p.shape[d] for p, _ in good), default=1) // 32) * 32 for d in (0, 1))
        pixels = torch.full((len(good), height, width, 3), 116, dtype=torch.uint8)  # about the usual mean
        rows = torch.zeros(len(good), max((len(r) for _, r in good), default=1), 5)
        for i, (p, r) in enumerate(good):
            pixels[i, :p.shape[0], :p.shape[1]] = p
            rows[i, :len(r)] = r
        return pixels.permute(0, 3, 1, 2), rows, complaints


class Pyramid(nn.Module):
    """ResNet50's four stages under torchvision's feature pyramid (arXiv 1612.03144)"""
    out_channels = 256

    def __init__(self, config):
        from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool
        super().__init__()
        self.body = ResNet50(**config)
        self.body.fc = nn.Identity()
        widths = [getattr(self.body, f"layer{i}")[-1].conv3.out_channels for i in range(1, 5)]
        self.fpn = FeaturePyramidNetwork(widths, self.out_channels, LastLevelMaxPool())

    def forward(self, x):
        x, maps = self.body.maxpool(norm_relu(self.body.bn1, self.body.conv1(x))), {}
        for i in range(4):
            x = maps[str(i)] = getattr(self.body, f"layer{i + 1}")(x)
        return self.fpn(maps)


def harden(heads, keep):
    """Makes torchvision's RoIHeads, in place, learn from the hardest proposals instead of a random sample: all of them
    are scored first, without gradients, and the `keep` of an image with the highest loss remain (arXiv 1604.03540)"""
    class HardRoIHeads(type(heads)):
        def forward(self, features, proposals, image_shapes, targets=None):
            self.seen = features, image_shapes
            try:
                return super().forward(features, proposals, image_shapes, targets)
            finally:
                self.seen = None  # what has a graph cannot be copied, as save_training copies the model

        def select_training_samples(self, proposals, targets):
            proposals, matched, labels, regression = super().select_training_samples(proposals, targets)
            features, shapes = self.seen
            with torch.no_grad():
                logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, shapes)))
                target, goal = torch.cat(labels), torch.cat(regression)
                own = deltas.view(len(deltas), -1, 4)[torch.arange(len(deltas)), target]
                loss = F.cross_entropy(logits, target, reduction="none") \
                    + F.smooth_l1_loss(own, goal, beta=1 / 9, reduction="none").sum(1) * (target > 0)
            hard = [part.topk(min(keep, len(part))).indices for part in loss.split([len(p) for p in proposals])]
            return tuple([x[h] for x, h in zip(parts, hard)] for parts in (proposals, matched, labels, regression))
    heads.__class__ = HardRoIHeads
    heads.fg_bg_sampler.batch_size_per_image, heads.fg_bg_sampler.positive_fraction = 10 ** 6, 1.0  # everything


class Detector(nn.Module):
    """Faster R-CNN (arXiv 1506.01497) of torchvision's parts on a ResNet50: float images (N, 3, H, W), normalised, and
    rows (N, 1 + K, 5) as BoxImages makes them -> in training the sum of the losses, else for each image a dict of boxes
    (M, 4) in the scaled image, labels and scores (M,). `config` rebuilds it."""
    precision = "float"

    def __init__(self, task, backbone, num_classes, sizes, ratios, image_size, max_size, nms, detections):
        from torchvision.models.detection import FasterRCNN
        from torchvision.models.detection.anchor_utils import AnchorGenerator
        super().__init__()
        self.config = dict(task=task, backbone=backbone, num_classes=num_classes, sizes=sizes, ratios=ratios,
                           image_size=image_size, max_size=max_size, nms=nms, detections=detections)
        anchors = AnchorGenerator(tuple((s,) for s in sizes), (tuple(ratios),) * len(sizes))
        parts = FasterRCNN(Pyramid(backbone), num_classes + 1, rpn_anchor_generator=anchors, box_nms_thresh=nms,
                           box_score_thresh=0.01, box_detections_per_img=detections, rpn_post_nms_top_n_test=300,
                           box_batch_size_per_image=PROPOSALS, rpn_post_nms_top_n_train=1000)
        self.backbone, self.rpn, self.roi_heads = parts.backbone, parts.rpn, parts.roi_heads
        # the pooler takes the levels' scales from the first image it sees, and with much padding finds wrong ones
        pool, side = self.roi_heads.box_roi_pool, 1024 if backbone.get("stem") == "small" else 256
        pool({name: torch.zeros(1, 1, side >> i, side >> i) for i, name in enumerate(pool.featmap_names)},
             [torch.zeros(1, 4)], [(1024, 1024)])
        self.preprocess, self.amp = dict(PREPROCESS), None

    def forward(self, images, rows=None):
        from torchvision.models.detection.image_list import ImageList
        if rows is None:  # what train.wrap shows a network at first
            rows = torch.tensor([[images.shape[2]] * 5, [0, 0, 16, 16, 1]], device=images.device)
            rows = rows.float().expand(len(images), 2, 5)
        with torch.autocast(images.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None):
            features = self.backbone(images)
        features = {k: v.float() for k, v in features.items()}
        shapes = [(int(h), int(w)) for h, w in rows[:, 0, :2].tolist()]
        targets = [dict(boxes=r[r[:, 4] > 0, :4], labels=r[r[:, 4] > 0, 4].long()) for r in rows[:, 1:]]
        targets = targets if self.training else None
        proposals, losses = self.rpn(ImageList(images, shapes), features, targets)
        found, more = self.roi_heads(features, proposals, shapes, targets)
        return sum(losses.values()) + sum(more.values()) if self.training else found


def load_detector(path):
    """-> Detector in eval mode and its checkpoint dict"""
    checkpoint = load_checkpoint(path)
    if checkpoint["config"].get("task") != "detect":
        raise UserError(f"{path}: is no detector of finetune.py --task detect")
    try:
        model = Detector(**checkpoint["config"])
    except TypeError as error:
        raise UserError(f"{path}: {error}") from error
    load_weights(model, checkpoint.get("ema") or checkpoint["model"], path)
    model.preprocess.update(checkpoint["preprocess"])
    return model.to(memory_format=torch.channels_last).eval(), checkpoint


@torch.no_grad()
def find_boxes(model, images, batch, world, *, workers=0, loader=None, poll=lambda: False, on_corrupt="error"):
    """train.evaluate() for a Detector and BoxImages -> mean_average_precision()'s dict with the numbers of `images` and
    of damaged files; and {index: (boxes float64 (M, 4) in the original image, labels, scores)}. None, None if poll()
    said stop."""
    n = len(images.files)
    training, mine, complaints, batches = model.training, {}, 0, iter(loader or data.make_loader(
        images, data.eval_batches(n, batch, world.rank, world.size), workers, world.device))
    model.eval()
    try:
        for _ in range(len(data.eval_batches(n, batch, 0, world.size))):  # as often everywhere: polling is collective
            if poll():
                return None, None
            pixels, rows, bad = next(batches, (None, None, ()))
            train.check_corrupt(bad, on_corrupt)
            complaints += len(bad)
            if pixels is None or not len(rows):
                continue
            pixels = normalize(pixels, model.preprocess)
            for image, (h, w, height, width, index) in zip(pixels, rows[:, 0].tolist()):
                # alone: what the largest image of a batch adds to the others' borders would change their scores
                image = image[None, :, :-(-int(h) // 32) * 32, :-(-int(w) // 32) * 32]
                one, = model(image.contiguous(memory_format=torch.channels_last),
                             torch.tensor([[[h, w, height, width, index]]], device=world.device))
                back = np.array([width / w, height / h] * 2)
                mine[int(index)] = (one["boxes"].double().cpu().numpy() * back, one["labels"].cpu().numpy(),
                                    one["scores"].double().cpu().numpy())
    finally:
        model.train(training)
    found = {i: boxes for theirs in world.gather(mine) for i, boxes in theirs.items()}
    score = mean_average_precision(found, {i: images.known[images.files.path(i)] for i in found},
                                   model.config["num_classes"])
    return dict(score, images=len(found), corrupt=int(world.sum(complaints)[0])), found


def overlaps(found, truth, crowd):
    """IoU of float64 (M, 4) and (K, 4) -> (M, K); with a crowd the share of the found box inside it"""
    low, high = np.maximum(found[:, None, :2], truth[None, :, :2]), np.minimum(found[:, None, 2:], truth[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(2)
    areas = [(b[:, 2:] - b[:, :2]).prod(1) for b in (found, truth)]
    union = np.where(crowd[None], areas[0][:, None], areas[0][:, None] + areas[1][None] - both)
    return both / np.maximum(union, 1e-300)


THRESHOLDS = np.linspace(0.5, 0.95, 10)
AREAS = dict(all=(0, 1e10), small=(0, 32 ** 2), medium=(32 ** 2, 96 ** 2), large=(96 ** 2, 1e10))


def match(found, truth, size, crowd, ignored, area):
    """One image, one class: greedily, best score first, as COCO does -> right (10, M) and skipped (10, M) for the
    found boxes, and how many boxes were there to find"""
    low, high = area
    spare = crowd | ignored | (size < low) | (size > high)
    order = np.argsort(spare, kind="stable")
    truth, crowd, spare = truth[order], crowd[order], spare[order]
    iou = overlaps(found, truth, crowd)
    mine = (found[:, 2:] - found[:, :2]).prod(1)
    outside = (mine < low) | (mine > high)
    right, skipped = np.zeros((2, len(THRESHOLDS), len(found)), bool)
    for t, threshold in enumerate(THRESHOLDS):
        taken = np.zeros(len(truth), bool)
        for d in range(len(found)):
            best, at = min(threshold, 1 - 1e-10), -1
            for g in range(len(truth)):
                if taken[g] and not crowd[g]:
                    continue
                if at >= 0 and not spare[at] and spare[g]:
                    break  # the rest is spare, and it has a real one
                if iou[d, g] >= best:
                    best, at = iou[d, g], g
            if at >= 0:
                taken[at], right[t, d], skipped[t, d] = True, True, spare[at]
            else:
                skipped[t, d] = outside[d]
    return right, skipped, int((~spare).sum())


def mean_average_precision(found, known, classes, most=100):
    """found: {image: (boxes, labels, scores)}, known: {image: Boxes}, over the same images -> dict of percentages, as
    COCO's evaluation gives them: map over IoU 0.5 to 0.95, map50, map75, map_small, map_medium, map_large, recall (at
    `most` boxes per image and class), per_class {name: map}; None where there was nothing to find"""
    precision = {area: np.full((len(THRESHOLDS), 101, classes), np.nan) for area in AREAS}
    recall, none = np.full((len(THRESHOLDS), classes), np.nan), np.zeros((0, 4))
    for c, (name, area) in itertools.product(range(classes), AREAS.items()):
        parts, total = [], 0
        for image, truth in known.items():
            boxes, labels, scores = found.get(image, (none, np.zeros(0), np.zeros(0)))
            order = np.flatnonzero(labels == c + 1)
            order = order[np.argsort(-scores[order], kind="stable")[:most]]
            own = truth.labels == c + 1
            if len(order) or own.any():
                right, skipped, count = match(boxes[order], truth.boxes[own], truth.areas[own], truth.crowd[own],
                                              truth.ignored[own], area)
                parts.append((scores[order], right, skipped))
                total += count
        if not total:
            continue
        scores = np.concatenate([p[0] for p in parts])
        order = np.argsort(-scores, kind="stable")
        right, skipped = (np.concatenate([p[k] for p in parts], axis=1)[:, order] for k in (1, 2))
        hits, misses = np.cumsum(right & ~skipped, axis=1), np.cumsum(~right & ~skipped, axis=1)
        for t in range(len(THRESHOLDS)):
            reached, value = hits[t] / total, hits[t] / np.maximum(hits[t] + misses[t], np.spacing(1))
            value = np.maximum.accumulate(value[::-1])[::-1]
            at = np.searchsorted(reached, np.linspace(0, 1, 101), side="left")
            precision[name][t, :, c] = np.append(value, 0.0)[at]
            if name == "all":
                recall[t, c] = reached[-1] if len(reached) else 0.0

    def percent(values):
        return None if np.isnan(values).all() else round(float(100 * np.nanmean(values)), 7)
    p = precision["all"]
    return dict(map=percent(p), map50=percent(p[0]), map75=percent(p[5]), recall=percent(recall),
                **{f"map_{area}": percent(precision[area]) for area in ("small", "medium", "large")},
                per_class=[percent(p[:, :, c]) for c in range(classes)])


class Detection(train.Plan):
    """A run on annotated images"""
    measures = {"map50": "mAP@0.5", "map": "mAP"}

    def __init__(self, args, world, source, sets):
        self.args, self.world, self.source, self.sets = args, world, source, sets

    def open(self, args, world):
        return *self.sets[:3], None, self.sets[4]

    def model(self, args, classes):
        torch.manual_seed(args.seed)
        sizes, ratios = anchors_of(self.sets[0], self.sets[3], args.image_size, args.max_size)
        config = {**self.source.config, "dropout": 0.0, "drop_path": 0.0}  # what is frozen gives the same
        model = Detector("detect", config, len(classes), sizes, ratios, args.image_size, args.max_size,
                         args.nms_threshold or 0.5, args.detections or 100)
        model.backbone.body.load_state_dict({k: v for k, v in self.source.state_dict().items()
                                             if not k.startswith("fc.")})
        model.preprocess, model.amp = dict(self.source.preprocess), train.amp_dtype(args, self.world.device)
        train.freeze(model.backbone.body)
        for i in range(5 - args.trainable_stages, 5):
            for p in getattr(model.backbone.body, f"layer{i}").parameters():
                p.requires_grad_(p.ndim > 1)  # batch-norm stays as it is everywhere: batches are small
        if args.ohem < 1:
            harden(model.roi_heads, max(1, round(PROPOSALS * args.ohem)))
        return model

    def share(self, name):
        return 1.0 if name.startswith("backbone.body.") else self.args.head_lr_mult

    def images(self, files, transform_at, args, training):
        return BoxImages(files, self.sets[3], args, training), args.workers

    def forward(self, net, model, pixels, rows, loss_fn, mixer, amp):
        images = normalize(pixels, model.preprocess).contiguous(memory_format=torch.channels_last)
        return net(images, rows), torch.zeros((), device=pixels.device)

    def evaluate(self, model, images, batch, world, *, amp, tta, **options):
        score, _ = find_boxes(model, images, batch, world, **options)
        return score and dict(score, loss=None)

    def describe(self, args, model):
        return ["anchors of {sizes} pixels on the five levels, height / width {ratios}".format(**model.config),
                trained_share(model)]


def draw_boxes(image, found, truth, classes, threshold):
    """-> a copy of the PIL image with the annotated boxes in green, in red those found with a score of `threshold`"""
    image, pen_width = image.copy(), max(2, min(image.size) // 150)
    pen = ImageDraw.Draw(image)
    for box in truth.boxes:
        pen.rectangle(tuple(box), outline=(40, 200, 60), width=pen_width)
    for box, label, score in zip(*found):
        if score >= threshold:
            pen.rectangle(tuple(box), outline=(230, 40, 40), width=pen_width)
            pen.text((box[0] + 4, box[1] + 4), f"{classes[label - 1]} {score:.2f}", fill=(230, 40, 40),
                     font_size=max(12, min(image.size) // 20))
    return image


def detect(args, world, stop, most=16):
    """One run of --task detect, from the flags to the pictures; with --eval-only the scores of a checkpoint"""
    begin = time.perf_counter()
    if args.eval_only:
        path = args.checkpoint or os.path.join(args.out, "best.pt")
        model, checkpoint = load_detector(path)
        model.amp = train.amp_dtype(args, world.device)
        model.roi_heads.nms_thresh = args.nms_threshold or model.config["nms"]
        model.roi_heads.detections_per_img = args.detections or model.config["detections"]
        args.image_size = args.image_size or model.config["image_size"]
        args.max_size = args.max_size or model.config["max_size"]
        held = checkpoint["args"].get("val_split") if train.learned_from(checkpoint, args.data) else 0
        sets, result = open_boxes(args.data, args, checkpoint["classes"], held), dict(checkpoint=path)
        if world.rank == 0:
            print("\n".join(sets[4]), file=sys.stderr)
    else:
        resume = open_run(args, world)
        model, _, source = load_source(args)
        if not plain_resnet(model):
            raise UserError(f"{source}: --task detect builds on a plain ResNet-50")
        sets = open_boxes(args.data, args, stop=stop)
        sets[4].append(f"backbone: {source}")
        begin_run(args, world, resume)
        args.overwrite = True  # open_run has looked
        result = train.train(args, world, stop, Detection(args, world, model, sets))
        world.barrier()
        model, _ = load_detector(result["checkpoint"])
    val, classes, known = sets[1], sets[2], sets[3]
    model.to(world.device)
    score, found = find_boxes(model, BoxImages(val, known, args, replace=False), args.batch_size, world,
                              workers=args.workers, on_corrupt=args.on_corrupt)
    if world.rank == 0 and not args.eval_only:
        tiles = [(draw_boxes(data.load(path := val.path(i)), found[i], known[path], classes, args.score_threshold),
                  os.path.basename(path)) for i in sorted(found)[:most]]
        write_atomic(os.path.join(args.out, "predictions.png"), contact_sheet(tiles))
    score["per_class"] = dict(zip(classes, score["per_class"]))
    return {**result, **score, "seconds": round(time.perf_counter() - begin, 1)}


# ---------------------------------------------------------------------------------------------------------------- main

def open_run(args, world):
    """train.open_run(), also where the run begins with one of DEFAULTS"""
    named = args.weights or args.model
    return train.open_run(args, world, None if named else next(filter(os.path.exists, DEFAULTS), None))


def begin_run(args, world, resume):
    """train.begin_run(), for a run of several parts, and with pictures"""
    # of a run that is overwritten: or --resume, or a person, would take them for this one's
    if not args.resume and world.rank == 0:
        for part in ("args.json", "search.json", "head/last.pt", "search/*/last.pt", "search/*/head/last.pt", "lr.svg",
                     "confusion.csv", "confusion.svg", "mistakes.png", "predictions.png"):
            for path in glob.glob(os.path.join(glob.escape(args.out), part)):
                os.unlink(path)
    train.begin_run(args, world, resume)


# What a FineTuning has beside its flags; sets: training and validation Files, classes, wnids
Start = collections.namedtuple("Start", "world stop source sets notes new_head cache")


def open_start(args, world, stop, asked):
    """The network and the data that the flags name, tried out, as far as something may be refused, before what
    --overwrite deletes is gone -> Start, strategies that --search chooses from"""
    model, checkpoint, source = load_source(args)
    *sets, notes = check_data(train.Plan().open(args, world), args, stop)
    if sets[3] is None:
        sets[2:] = data.known_as(list(sets[2]), checkpoint["classes"], checkpoint["wnids"])
    classes = list(sets[2])
    if args.num_classes not in (None, len(classes)):
        raise UserError(f"--num-classes {args.num_classes}: the data has {len(classes)} classes", code=2)
    known = checkpoint["classes"] == classes and model.config["num_classes"] == len(classes)
    notes += [f"network: {source}", f"its head is kept: it knows these {len(classes)} classes" if known else
              f"a new head for {len(classes)} classes instead of its {model.config['num_classes']}"]
    start = Start(world, stop, model, sets, notes, not known, os.path.join(args.out, "features.pt"))
    kinds = ["head"] * head_alone(args, model) + ["gradual", "full"] if args.strategy == "auto" else [args.strategy]
    if args.search and args.search > (most := len(SEARCHED) * len(kinds)):
        raise UserError(f"--search {args.search}: of {', '.join(kinds)} there are {most} settings", code=2)
    trial = changed(args, strategy=kinds[-1] if args.search else args.strategy)
    resolve(trial, model, len(sets[0]))
    leads = linear_head(model) and (not known or args.then)  # or the next part's does
    if other_views(args) and trial.strategy == "gradual" and not leads and not args.search and not asked:
        raise UserError(f"--views {args.views}: no head is trained on features here, it is "
                        f"{'kept' if linear_head(model) else 'a convolution'}", code=2)
    FineTuning(trial, *start).rehearse()
    return start, kinds


def lead(args, start, epochs):
    """Trains the head that gradual begins with, in OUT/head -> Start of what follows, seconds"""
    last = os.path.join(args.out, "last.pt") if args.resume == "auto" else args.resume
    if last and os.path.exists(last):  # which holds what the head has become
        source = rebuilt(start.source, args.seed, True, num_classes=len(start.sets[2]))
        return start._replace(source=source, new_head=False), 0.0
    # linear probing first leaves the features less to unlearn (Kumar et al., arXiv 2202.10054)
    first = changed(args, **BEYOND_HEAD, strategy="head", epochs=epochs, target_domain=None,
                    out=os.path.join(args.out, "head"), resume=args.resume and "auto")
    *notes, note = start.notes
    plan = FineTuning(first, *start._replace(notes=[*notes, f"{note}: the head alone"]))
    head = train.train(first, start.world, start.stop, plan)
    start.world.barrier()
    path = head["checkpoint"]
    return start._replace(source=build_model(load_checkpoint(path), path), notes=[f"network: {path}", note],
                          new_head=False), head["seconds"]


def one_run(args, start, head_epochs, resume=None, asked=None):
    """Trains one setting, for gradual after `head_epochs` of its head -> train.train()'s result"""
    note = resolve(args, start.source, len(start.sets[0]))
    start, spent = start._replace(notes=[*start.notes, note]), 0.0
    if args.strategy == "gradual" and start.new_head and linear_head(start.source):
        start, spent = lead(args, start, head_epochs)
    plan = FineTuning(args, *start)
    if args.lr_find and resume:  # a part's args.json is not read again
        args.lr = load_checkpoint(resume)["args"]["lr"]
    elif args.lr_find:
        args.lr = find_lr(plan, args, start.world)
        plan.notes.append(f"learning rate {args.lr:.3g} by the range test, see {args.out}/lr.svg")
    plan.asked = asked
    result = train.train(args, start.world, start.stop, plan)
    return dict(result, seconds=round(spent + result["seconds"], 1))


def searched(args, start, kinds):
    """search(), or what OUT/search.json has of it where the run is resumed, printed"""
    path = os.path.join(args.out, "search.json")
    if args.resume and os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            rows, best = json.load(file)
        if (tried := sum(row["epochs"] == 1 for row in rows)) != args.search:
            raise UserError(f"--search {args.search}: --resume found one of {tried} settings in {args.out}", 2)
    else:
        usual = STRATEGIES["head"]["epochs"]
        rows, best = search(args, lambda part: one_run(part, start, min(part.epochs, usual)), kinds)
    if start.world.rank == 0:
        write_atomic(path, json.dumps([rows, best], indent=1).encode())
        lines = ["strategy            lr  epochs   top-1     loss      s",
                 *("{:12}{:>10.2g}{:>8}{:>8.2f}{:>9.4f}{:>7.0f}".format(*r.values()) for r in rows),
                 f"trained in full: {best['strategy']} at {best['lr']:.2g}"]
        print("\n".join(lines), file=sys.stderr)
    return rows, best


def classify(args, world, stop, asked=None, before=lambda: None):
    """One fine-tuning run, from the flags to the report; args.json gets the `asked` ones where it is a part of more,
    which `before` begins once nothing can be refused any more"""
    begin, resume = time.perf_counter(), open_run(args, world)
    start, kinds = open_start(args, world, stop, asked)
    before()
    begin_run(args, world, resume)
    extra = {}
    if args.search:
        extra["search"], best = searched(args, start, kinds)
        asked = train.saved(args)  # with its strategy they would ask for a search of that one alone
        vars(args).update(best)
    args.overwrite = True  # open_run has looked; now the folder holds what this run put there
    result = one_run(args, start, STRATEGIES["head"]["epochs"], resume, asked)
    world.barrier()
    with contextlib.suppress(FileNotFoundError):
        if world.rank == 0:
            os.unlink(start.cache)
    best, classes = build_model(load_checkpoint(result["checkpoint"]), result["checkpoint"]), list(start.sets[2])
    found = report(best.to(world.device), start.sets[1], classes, args, world)
    if args.target_domain:
        extra.update(score_target(best, classes, start.sets[3], args, world))
    if args.strategy == "head":
        result["images_per_second"] = None  # of features, it says nothing
    return dict(result, **found, strategy=args.strategy, seconds=round(time.perf_counter() - begin, 1), **extra)


def score_target(model, classes, wnids, args, world):
    """-> dict(target_top1) where the target domain's val/ has class folders, which only score"""
    try:
        _, val, _, _, _ = data.open_folder(args.target_domain, classes, wnids, eval_only=True)
    except UserError as error:
        return dict(target_top1=None, target_note=str(error))
    return dict(target_top1=accuracy(logits_of(model, val, args, world), val.labels))


def main(args):
    if args.list_models:
        from torchvision import models
        names = [n for n in models.list_models(module=models) if n not in ("googlenet", "inception_v3")]
        print(", ".join(names), file=sys.stderr)
        return dict(models=names)
    check_args(args)
    return train.run_processes(args, lambda world, stop: logged(args, world, stop))


def logged(args, world, stop):
    """fine_tune(), where a stop in any part of the run is the last line of its own metrics"""
    try:
        return fine_tune(args, world, stop)
    except UserError as error:
        if error.code == 75 and os.path.abspath(args.out) in world.begun:  # in the first process alone
            path, lines = os.path.join(args.out, "metrics.jsonl"), []
            with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
                lines = [line for line in file if line.endswith("\n")]
            last = json.loads(lines[-1]) if lines else dict(event=None, epoch=0, step=0)
            if last["event"] != "stopped":
                record = dict(event="stopped", epoch=last["epoch"], step=last["step"])
                write_atomic(path, "".join([*lines, json.dumps(record) + "\n"]).encode())
        raise


def fine_tune(args, world, stop):
    """--data alone, or as a step on the way to --then"""
    if args.task == "detect":
        return detect(args, world, stop)
    if args.eval_only:
        return train.eval_only(args, world)
    if not args.then:
        return classify(args, world, stop)
    resume = open_run(args, world)
    final = changed(args, data=args.then, then=None, overwrite=True)
    # what is wrong with the second is better said before the first step
    classes, others = (list(train.Plan().open(part, world)[2]) for part in (final, args))
    if args.num_classes not in (None, len(classes)):
        raise UserError(f"--num-classes {args.num_classes}: {args.then} has {len(classes)} classes", code=2)
    if args.strategy == "head" and classes != others:
        raise UserError(f"--strategy head: {args.then} has other classes, so nothing would stay of a step that trains "
                        "the head alone; name another", code=2)
    step = changed(args, out=os.path.join(args.out, "step"), then=args.then if classes != others else None,
                   resume=args.resume and "auto")
    first = classify(step, world, stop, before=lambda: begin_run(args, world, resume))
    asked = train.saved(args)
    final = changed(final, checkpoint=first["checkpoint"], weights=None, model=None)
    return dict(classify(final, world, stop, asked), step=first["top1"])


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args(), "finetune.py")
