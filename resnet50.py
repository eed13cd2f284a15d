"""ResNet-50 in one file: the network, its checkpoints, and what it costs.

  python resnet50.py                                      # stages, parameters, MACs, milliseconds, environment
  python resnet50.py --checkpoint runs/train/best.pt      # the same for a trained or pruned network
  python resnet50.py --profile --batch-size 8             # torch.profiler, operators sorted by time

The network is He et al. 2015 (arXiv 1512.03385) with the stride on the 3x3 ("v1.5"). Module and parameter names are
torchvision's, so its files and timm's load with no renaming. Squeeze-and-excitation (arXiv 1709.01507) uses timm's
names, split attention (ResNeSt, arXiv 2004.08955) the published ones. Imports nothing of this repository.
"""
import argparse
import contextlib
import glob
import io
import json
import os
import pickle
import platform
import statistics
import struct
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

FORMAT = "resnet50/1"
STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))  # channels of the 3x3, blocks, stride of the first block
EXPANSION = 4  # a stage's output has this many times the channels of its 3x3
PREPROCESS = dict(resize=256, crop=224, interpolation="bilinear", mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


class UserError(Exception):
    """A mistake that the user can mend: shown as one line, and the exit status is `code`
    (2 usage, 3 data or checkpoint, 4 training diverged, 75 stopped with the state saved)."""

    def __init__(self, message, code=3):
        super().__init__(" ".join(str(message).split()))
        self.code = code


def run_script(main, args, prog):
    """main(args) -> a dict or None; the dict becomes the last line of stdout, a UserError one line and a status."""
    try:
        result = main(args)
    except UserError as error:
        print(f"{prog}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.code)
    if result is not None:
        print(json.dumps(result), flush=True)


# ---------------------------------------------------------------------------------------------------- network

class SqueezeExcite(nn.Module):
    """x * sigmoid(fc2(relu(fc1(mean over H, W)))); 16 times fewer channels inside, as timm's seresnet50."""

    def __init__(self, channels):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, max(channels // 16, 8), 1)
        self.fc2 = nn.Conv2d(self.fc1.out_channels, channels, 1)

    def forward(self, x):  # (N, C, H, W) -> same
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class SplitAttention(nn.Module):
    """ResNeSt's radix-2 3x3: two branches of one grouped convolution,
    mixed per channel by a softmax over the branches."""

    def __init__(self, cin, cout):
        super().__init__()
        inner = max(cin * 2 // 4, 32)
        self.conv = nn.Conv2d(cin, 2 * cout, 3, padding=1, groups=2, bias=False)
        self.bn0 = nn.BatchNorm2d(2 * cout)
        self.fc1 = nn.Conv2d(cout, inner, 1)
        self.bn1 = nn.BatchNorm2d(inner)
        self.fc2 = nn.Conv2d(inner, 2 * cout, 1)

    def forward(self, x):  # (N, cin, H, W) -> (N, cout, H, W)
        a, b = F.relu(self.bn0(self.conv(x))).chunk(2, 1)
        gap = (a + b).mean((2, 3), keepdim=True)
        wa, wb = self.fc2(F.relu(self.bn1(self.fc1(gap)))).chunk(2, 1)
        share = torch.sigmoid(wa - wb)  # a softmax over two is a sigmoid of the difference
        return share * a + (1 - share) * b


def drop_path(x, rate, training):
    """Stochastic depth (arXiv 1603.09382): the whole residual branch of a sample is dropped with probability `rate`."""
    if not training or rate == 0.0:
        return x
    return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(1 - rate).div_(1 - rate)


class Bottleneck(nn.Module):
    """1x1 -> 3x3 -> 1x1 with a residual. Widths come in as numbers, so a pruned block is built like any other."""

    def __init__(self, cin, mid1, mid2, cout, stride, config, drop_rate):
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
        self.downsample = None
        if split and (stride > 1 or cin != cout):
            self.downsample = nn.Sequential(
                nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False),
                nn.Conv2d(cin, cout, 1, bias=False), nn.BatchNorm2d(cout))
        elif stride > 1 or cin != cout:
            self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        if self.split:
            x = self.pool(self.conv2(x))
        else:
            x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = self.bn3(self.conv3(x))
        if self.se is not None:
            x = self.se(x)
        return F.relu(drop_path(x, self.drop_rate, self.training) + identity, inplace=True)


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
    """

    def __init__(self, num_classes=1000, stem=None, stride_on="3x3", attention="none", drop_path=0.0, dropout=0.0,
                 widths=None):
        super().__init__()
        stem = stem or ("deep" if attention == "split" else "standard")
        for name, value, known in (("stem", stem, ("standard", "deep", "small")),
                                   ("stride_on", stride_on, ("3x3", "1x1")),
                                   ("attention", attention, ("none", "se", "split"))):
            if value not in known:
                raise ValueError(f"ResNet50: {name}={value!r} is none of {', '.join(known)}")
        if attention == "split" and stride_on == "1x1":
            raise ValueError("ResNet50: split attention strides by a pool after the 3x3; "
                             "stride_on='1x1' has no meaning there")
        self.config = config = dict(num_classes=num_classes, stem=stem, stride_on=stride_on, attention=attention,
                                    drop_path=drop_path, dropout=dropout, widths=dict(widths or {}))
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
                                        stride if j == 0 else 1, config, drop_path * done / (total - 1)))
                c, done = cout, done + 1
            setattr(self, f"layer{i}", stage)
        if unused:
            raise ValueError(f"ResNet50: widths names no convolution of this network: {', '.join(sorted(unused))}")
        self.fc = nn.Linear(c, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)  # every block starts as the identity (arXiv 1706.02677, 5.1)

    def blocks(self):
        for i in range(1, len(STAGES) + 1):
            yield from getattr(self, f"layer{i}")

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
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
    (Momentum 0, not track_running_stats: the checkpointing counts the tensors that both passes save.)"""
    norms = [(m, m.momentum, m.num_batches_tracked.clone())
             for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m, _, _ in norms:
        m.momentum = 0.0
    try:
        yield
    finally:
        for m, momentum, batches in norms:
            m.momentum = momentum
            m.num_batches_tracked.copy_(batches)


def normalize(pixels, preprocess):
    """uint8 (N, 3, H, W), any memory format -> float32, same shape and format: (pixels / 255 - mean) / std."""
    mean, std = (torch.tensor(preprocess[k], device=pixels.device).view(3, 1, 1) * 255 for k in ("mean", "std"))
    return pixels.float().sub_(mean).div_(std)


def predict(model, pixels):
    """uint8 pixels (N, 3, H, W) -> float32 logits (N, classes). What every consumer calls: where and how the pixels are
    normalised is the model's affair."""
    return model(normalize(pixels, model.preprocess)).float()


# ------------------------------------------------------------------------------------------------ checkpoints

def write_atomic(path, data):
    """bytes -> file. Readers see the old content or the new, never a part: temporary file in the same folder, fsync,
    rename, fsync of the folder.
    Failure (a full disk) raises UserError, removes the temporary and keeps the old file."""
    folder, name = os.path.split(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
        for stale in glob.glob(os.path.join(glob.escape(folder), f".{glob.escape(name)}.*.tmp")):  # of a killed writer
            os.unlink(stale)
        temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as f:
                f.write(data)
                f.flush()
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


def save_checkpoint(path, model, *, classes, wnids=None, metrics=None, args=None, **state):
    """One dict of plain types and tensors, loadable with weights_only=True.
    `state` is what last.pt adds for resuming."""
    model = getattr(model, "module", model)
    checkpoint = dict(format=FORMAT, model=model.state_dict(), config=model.config, classes=list(classes), wnids=wnids,
                      preprocess=model.preprocess, metrics=metrics or {}, args=args or {}, **state)
    # serialised in memory first: a full disk is then an OSError of write(), not an abort inside torch
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
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
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, AttributeError, TypeError) as error:
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
        while name.startswith(("module.", "_orig_mod.")):
            name = name.split(".", 1)[1]
        if isinstance(value, torch.Tensor) and name != "n_averaged":
            state[name] = value
    if not state:
        raise UserError(f"{path}: holds no weights")
    return state


def load_checkpoint(path):
    """-> dict with the fields of DESIGN's checkpoint; for a foreign file `config` is empty and `classes` None."""
    raw = read_file(path)
    if isinstance(raw, dict) and str(raw.get("format", "")).startswith("resnet50/"):
        if raw["format"] != FORMAT:
            raise UserError(f"{path}: format {raw['format']!r}; this version reads {FORMAT!r}")
        return raw
    return dict(format=None, model=find_state_dict(raw, path), config={}, classes=None, wnids=None, preprocess=None,
                metrics={}, args={})


def load_weights(model, state, path):
    """Strict load_state_dict whose complaint is one line with the file and the keys."""
    own = model.state_dict()
    state = {k: v for k, v in state.items() if not (k.endswith("num_batches_tracked") and k not in own)}
    missing = [k for k in own
               if k not in state and not k.endswith("num_batches_tracked")]  # absent in files before 2018
    surplus = [k for k in state if k not in own]
    shapes = [f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
              for k in own if k in state and state[k].shape != own[k].shape]

    def some(title, keys):
        return f"{title} {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}; " if keys else ""

    if missing or surplus or shapes:
        text = some("missing", missing) + some("surplus", surplus) + some("wrong shape", shapes)
        raise UserError(f"{path}: does not fit this network: {text.rstrip('; ')}")
    model.load_state_dict(state, strict=False)


def build_model(checkpoint, path, **config):
    """A checkpoint dict -> ResNet50 in eval mode, channels_last, with .preprocess. `config` (None = not said) supplies
    what a foreign file lacks; where the file says otherwise it is refused, not overridden."""
    config = {k: v for k, v in config.items() if v is not None}
    for key, value in checkpoint["config"].items():
        if key in ("drop_path", "dropout"):  # regularisation is the run's choice, not the network's shape
            config.setdefault(key, value)
        elif config.setdefault(key, value) != value:
            raise UserError(f"{path}: was made with {key}={value}, not {config[key]}", code=2)
    if not checkpoint["config"] and "num_classes" not in config and "fc.weight" in checkpoint["model"]:
        config["num_classes"] = len(checkpoint["model"]["fc.weight"])
    try:
        model = ResNet50(**config)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    load_weights(model, checkpoint["model"], path)
    model.preprocess.update(checkpoint["preprocess"] or {})
    return model.to(memory_format=torch.channels_last).eval()


def fetch_weights(name):
    """torchvision's weights by name, as a checkpoint dict. Downloads once into torch's cache."""
    from torchvision.models import ResNet50_Weights
    if name not in ResNet50_Weights.__members__:
        raise UserError(f"--weights {name}: torchvision has {', '.join(ResNet50_Weights.__members__)}", code=2)
    weights = ResNet50_Weights[name]
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"--weights {name}: cannot be fetched from {weights.url} ({error}); "
                        "on a machine without network give a file with --checkpoint") from error
    transform = weights.transforms()
    preprocess = dict(resize=transform.resize_size[0], crop=transform.crop_size[0],
                      interpolation=transform.interpolation.value, mean=list(transform.mean), std=list(transform.std))
    return dict(format=None, model=state, config={}, classes=list(weights.meta["categories"]), wnids=None,
                preprocess=preprocess, metrics={}, args={})


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


def add_model_args(parser):
    """The flags that every script with a --checkpoint shares; a checkpoint from elsewhere carries no config."""
    group = parser.add_argument_group("network")
    group.add_argument("--checkpoint", metavar="FILE", help="ours, torchvision's or timm's weights")
    group.add_argument("--weights", metavar="NAME", help="torchvision's weights by name, such as IMAGENET1K_V2")
    group.add_argument("--stride-on", choices=("3x3", "1x1"),
                       help="where a stage strides: 3x3 is v1.5, 1x1 the 2015 weights")
    group.add_argument("--attention", choices=("none", "se", "split"),
                       help="squeeze-and-excitation, or ResNeSt's split attention")
    group.add_argument("--stem", choices=("standard", "deep", "small"),
                       help="small: 3x3 and no max-pool, for images up to 64 px")
    group.add_argument("--num-classes", type=int, metavar="N")
    group.add_argument("--classes", metavar="FILE", help="JSON list of class names, or of {index, wnid, name}")
    return group


def load_model(args, defaults=(), **config):
    """What add_model_args' flags name -> (model, checkpoint dict, source text), or (None, None, None) if they name
    nothing and none of the files in `defaults` exists. args.classes replaces the checkpoint's class names."""
    path = args.checkpoint or next((p for p in defaults if os.path.exists(p)), None)
    if args.checkpoint and args.weights:
        raise UserError("--checkpoint and --weights exclude each other", code=2)
    if args.weights:
        path, checkpoint = args.weights, fetch_weights(args.weights)
    elif path:
        checkpoint = load_checkpoint(path)
    else:
        return None, None, None
    model = build_model(checkpoint, path, stride_on=args.stride_on, attention=args.attention, stem=args.stem,
                        num_classes=args.num_classes, **config)
    if args.classes:
        checkpoint["classes"], checkpoint["wnids"] = read_classes(args.classes)
    if checkpoint["classes"] is not None and len(checkpoint["classes"]) != model.config["num_classes"]:
        raise UserError(f"{args.classes or path}: {len(checkpoint['classes'])} class names for "
                        f"{model.config['num_classes']} outputs")
    return model, checkpoint, path


# ---------------------------------------------------------------------------------------------------- summary

def count_macs(model, size=224):
    """-> {name of a convolution or linear layer: multiply-accumulates for one (3, size, size) image}."""
    macs, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            def hook(module, inputs, output, name=name):
                macs[name] = output[0].numel() * module.weight[0].numel()
            handles.append(module.register_forward_hook(hook))
    training = model.training
    with torch.no_grad():
        parameter = next(model.parameters())
        model.eval()(torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype))
    model.train(training)
    for handle in handles:
        handle.remove()
    return macs


def measure(fn, device, repeats=7):
    """Median milliseconds of fn() after two warm-up calls."""
    times = []
    for _ in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        fn()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[2:])


def stages(model):
    """(name, callable) in forward order; together they are the network."""
    yield "stem", lambda x: model.maxpool(F.relu(model.bn1(model.conv1(x))))
    for i in range(1, len(STAGES) + 1):
        yield f"layer{i}", getattr(model, f"layer{i}")
    yield "head", lambda x: model.fc(x.mean((2, 3)))


@torch.no_grad()
def summarize(model, size, batch_size, device):
    """-> rows of (stage, output shape, parameters, MACs per image, milliseconds per batch)."""
    belongs = {"conv1": "stem", "bn1": "stem", "fc": "head"}
    macs, rows = count_macs(model, size), []
    x = torch.rand(batch_size, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    for name, stage in stages(model):
        def mine(key):
            return belongs.get(key.split(".")[0], key.split(".")[0]) == name
        params = sum(p.numel() for k, p in model.named_parameters() if mine(k))
        milliseconds = measure(lambda: stage(x), device)
        x = stage(x)
        rows.append((name, "x".join(map(str, x.shape[1:])), params,
                     sum(v for k, v in macs.items() if mine(k)), milliseconds))
    return rows


def cpu_isa():
    """The instruction sets that decide how fast the kernels can be, as the system reports them."""
    wanted = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd")
    try:
        with open("/proc/cpuinfo") as f:
            flags = next((line for line in f if line.lower().startswith(("flags", "features"))), "").split()
    except OSError:
        flags = []
    return [w for w in wanted if w in flags] or [torch.backends.cpu.get_cpu_capability().lower()]


def environment():
    """-> {what: version or state}, printed before any figure."""
    import torchvision
    cuda = ("not built in" if torch.version.cuda is None
            else f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"torch": torch.__version__, "torchvision": torchvision.__version__, "python": platform.python_version(),
            "CUDA": cuda, "GPUs": ", ".join(gpus) or "none", "CPU": f"{platform.machine()} {' '.join(cpu_isa())}",
            "threads": torch.get_num_threads(), "extension": "none in this checkout: PyTorch's own operators run"}


def get_args_parser():
    parser = argparse.ArgumentParser(prog="resnet50.py",
                                     description="What the network costs, layer by layer, and where it runs.")
    add_model_args(parser)
    parser.add_argument("--image-size", type=int, metavar="PX", help="default: the checkpoint's crop, else 224")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N",
                        help="images per timed batch (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", action="store_true", help="print torch.profiler's table of one forward pass")
    return parser


def main(args):
    device = torch.device(args.device)
    model, _, source = load_model(args)
    if model is None:
        config = dict(stride_on=args.stride_on, attention=args.attention, stem=args.stem, num_classes=args.num_classes)
        try:
            model = ResNet50(**{k: v for k, v in config.items() if v is not None}).to(
                memory_format=torch.channels_last).eval()
        except ValueError as error:
            raise UserError(error, code=2) from error
    model.to(device)
    size = args.image_size or model.preprocess["crop"]
    say = lambda text: print(text, file=sys.stderr)  # noqa: E731
    for key, value in environment().items():
        say(f"{key:12} {value}")
    say(f"\n{'':12} {source or 'untrained'}, {size} px, batch {args.batch_size} on {device}")
    rows = summarize(model, size, args.batch_size, device)
    say(f"{'stage':8}{'output':>14}{'parameters':>14}{'GMAC':>9}{'ms':>9}")
    for name, shape, params, macs, milliseconds in rows:
        say(f"{name:8}{shape:>14}{params:>14,}{macs / 1e9:>9.3f}{milliseconds:>9.2f}")
    params, macs = sum(r[2] for r in rows), sum(r[3] for r in rows)
    with torch.no_grad():
        x = torch.rand(args.batch_size, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
        milliseconds = measure(lambda: model(x), device)
        say(f"{'total':8}{'':>14}{params:>14,}{macs / 1e9:>9.3f}{milliseconds:>9.2f}")
        if args.profile:
            from torch.profiler import ProfilerActivity, profile
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
            with profile(activities=activities) as profiler:
                model(x)
            say(profiler.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=20))
    return dict(params=params, macs=macs, latency_ms=round(milliseconds, 3), batch_size=args.batch_size,
                image_size=size, device=str(device), checkpoint=source)


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args(), "resnet50.py")
