"""Images per second from uint8 pixels to logits: our int8, bf16 and fp32 against the engines people use on a CPU.

  python -m tests.bench.infer                                    # batch 1, 8, 32; one and two threads; four minutes
  python -m tests.bench.infer --only int8,openvino_int8 --batches 8 --threads 1 --seconds 20
  python -m tests.bench.infer --isa vnni                         # everything held to AVX-512 VNNI
  python -m tests.bench.infer --per-layer --batches 8            # microseconds and percent of peak of each layer
  python -m tests.bench.infer --device cuda                      # tests.bench.gpu --part networks

The contenders alternate in one process, round by round, on the same bytes; a ratio is the median over rounds of the
two rates in one round. Some machines change speed by a factor of two or more within fractions of a second, so that one
round can hold both: fast and slow are the ratios of the upper and of the lower tenths of the two rates instead. The
multiply-add peak is timed right before and right after every sample; percent of peak uses that pair, and is of the
multiply-adds that the network defines: engines that do not compute what nobody reads, or do with fewer (Winograd), can
pass 100 (--per-layer counts what is read). The first run quantizes and exports the peers into runs/bench, which takes
half a minute more.
"""
import argparse
import copy
import functools
import itertools
import math
import operator
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor

import torch

import csrc
import data
import resnet50
from csrc.plan import skip_unread
from tests.bench import peers

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SHARED = os.path.join(os.path.dirname(ROOT), "shared", "data")
IMAGES = 32  # for calibration and agreement
KINDS = {"int8": "int8", "onnxruntime_int8": "int8", "openvino_int8": "int8",  # in the order of a round
         "onnxruntime_exported": "int8", "openvino_exported": "int8",  # what export.py makes of our int8
         "bf16": "bf16", "openvino_bf16": "bf16", "eager_bf16": "bf16", "compile_bf16": "bf16",
         "fp32": "fp32", "openvino_fp32": "fp32", "eager_fp32": "fp32", "compile_fp32": "fp32"}
ON_A_GPU = "--device cuda: as python -m tests.bench.gpu --part {}, with its flags"
OURS = ("int8", "bf16", "fp32")
SLOW_TO_BUILD = ("compile_fp32", "compile_bf16", "onnxruntime_exported", "openvino_exported")
CORES = os.sched_getaffinity(0)
PIECE = 0.1  # seconds of a sample: many states of the machine last longer
PEAK_MS = 4
SETTLE = 0.02  # seconds in which the last contender's worker threads stop spinning

Contender = namedtuple("Contender", "name kind threads call")
Sample = namedtuple("Sample", "rate before after")  # calls per second, peaks in multiply-adds per second


class Stolen:
    """The share of the CPUs' time, since this was made, that a hypervisor gave to others"""

    def __init__(self):
        self.begin = self.jiffies()

    def jiffies(self):
        with open("/proc/stat") as f:
            return list(map(int, f.readline().split()[1:9]))  # Linux: man 5 proc_stat

    def share(self):
        passed = [now - then for now, then in zip(self.jiffies(), self.begin)]
        return round(passed[7] / max(sum(passed), 1), 4)


def say(text=""):
    print(text, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------- measuring

def limit(threads):
    """One thread stays on one core; threads that a contender starts meanwhile inherit that."""
    torch.set_num_threads(threads)
    os.sched_setaffinity(0, {max(CORES)} if threads == 1 else CORES)


def peak(kind, threads, milliseconds=PEAK_MS):
    """Multiply-adds per second of `threads` cores at once; NaN without the native extension."""
    if not csrc.load():
        return math.nan
    if threads == 1:
        return torch.ops.resnet50.peak_macs(kind, milliseconds)

    def of_core(core):
        os.sched_setaffinity(0, {core})  # of this thread alone: two that begin on one core would share it for a while
        return torch.ops.resnet50.peak_macs(kind, milliseconds)
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(of_core, sorted(CORES)[-threads:]))


def bandwidth(threads):
    """Bytes per second, read and written, of the best of five copies of 256 MiB."""
    limit(threads)
    source, target = torch.ones(1 << 26), torch.zeros(1 << 26)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(times)


def sample(contender, seconds, warm):
    """`warm`: one call before the clock starts brings the weights back into the caches, where that is cheap."""
    limit(contender.threads)
    if contender.threads > 1:
        time.sleep(SETTLE)
    if warm:
        contender.call()
    before, calls, elapsed = peak(contender.kind, contender.threads), 0, 0.0
    start = time.perf_counter()
    while elapsed < seconds:
        contender.call()
        calls, elapsed = calls + 1, time.perf_counter() - start
    return Sample(calls / elapsed, before, peak(contender.kind, contender.threads))


def alternate(contenders, seconds, piece=PIECE):
    """-> {(name, threads): {round: Sample}}. All take part in the first round; after it those of the first contender's
    kind run in every round and the others so seldom that they take no more than half of the time, if at all."""
    samples, cost, started = defaultdict(dict), {}, time.monotonic()
    for number in itertools.count():
        if number == 1:
            main = sum(cost[c] for c in contenders if c.kind == contenders[0].kind)
            every = math.ceil(sum(cost.values()) / main - 1) or 1
        for c in contenders[::-1 if number % 2 else 1]:  # so that none always follows the same one
            if number == 0 or c.kind == contenders[0].kind or number % every == 0:
                found = samples[c.name, c.threads][number] = sample(c, piece, warm=cost.get(c) == piece)
                cost[c] = max(piece, 1 / found.rate)
        if time.monotonic() - started > seconds:
            limit(len(CORES))
            return samples


def quartiles(values):
    values = list(values)
    return statistics.quantiles(values, n=4) if len(values) > 1 else values * 3


def tenths(samples):
    """-> rates that a tenth of the samples did not reach, and that a tenth exceeded"""
    rates = [s.rate for s in samples.values()]
    return statistics.quantiles(rates, n=10, method="inclusive")[::8] if len(rates) > 1 else rates * 2


def ratios(a, b, samples):
    """-> [rate of a / rate of b in one round, ...]"""
    ours, theirs = samples[a.name, a.threads], samples[b.name, b.threads]
    return [ours[number].rate / theirs[number].rate for number in sorted(ours.keys() & theirs.keys())]


def hardware():
    """Prints what the figures belong to. -> the same for the JSON line."""
    with open("/proc/cpuinfo") as f:
        cpu = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), "unknown")
    git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    found = {"cpu": cpu, "cores": len(CORES), "isa": csrc.isa(), "commit": git.stdout.strip() or "unknown"}
    versions = peers.versions()
    for key, value in {**resnet50.environment(), **found, **versions}.items():
        say(f"{key:12} {value}")
    return {**found, **{f"version.{k}": v for k, v in versions.items()}}


def ceilings(kinds, threads, result):
    """Prints and notes peak and bandwidth per number of threads."""
    for t in threads:
        limit(t)
        peaks = {kind: peak(kind, t, 100) for kind in kinds}
        speed = bandwidth(t)
        result |= {f"peak.{kind}.t{t}": round(p) for kind, p in peaks.items() if p == p}
        result[f"bandwidth.t{t}"] = round(speed)
        say(f"{t} thread{'s' * (t > 1)}: " + ", ".join(f"{k} {p / 1e9:.1f}" for k, p in peaks.items())
            + f" GMAC/s from registers; copy {speed / 1e9:.1f} GB/s, read and written")


# -------------------------------------------------------------------------------------------------- contenders

def floating(model, dtype, pixels):
    return model(resnet50.normalize(pixels, model.preprocess).to(dtype))


class Networks:
    """One network in all its forms."""

    def __init__(self, args):
        v1 = os.path.join(SHARED, "resnet50_v1_imagenet.pth")
        said = (args.checkpoint, args.weights, args.stride_on, args.attention, args.stem, args.num_classes)
        if not any(said) and os.path.exists(v1):
            args.checkpoint, args.stride_on = v1, "1x1"  # where the 2015 weights stride
        self.model, _, source = resnet50.load_model(args)
        if self.model and self.model.precision != "float":
            raise resnet50.UserError(f"{source}: the benchmark quantizes by itself; give it a float checkpoint", code=2)
        preprocess = self.model.preprocess if self.model else resnet50.PREPROCESS
        self.pixels, images = self.read_images(preprocess)
        if self.model is None:
            self.model, source = self.random_model(args), "random weights (speed does not depend on them)"
        self.model.float().eval()
        self.macs = sum(resnet50.count_macs(self.model, preprocess["crop"]).values())
        self.reference = torch.cat([resnet50.predict(self.model, p) for p in self.pixels.split(8)]).argmax(1)
        say(f"network      {source}, {self.macs / 1e9:.3f} GMAC an image\nimages       {images}")
        self.makers, self.kind = {}, args.kind
        for name in args.names:
            try:
                self.makers[name] = self.prepare(name)
            except (peers.Skip, ImportError) as error:
                say(f"skipped      {name}: {error}")

    @staticmethod
    def read_images(preprocess):
        root, size = os.path.join(SHARED, "imagenet-cc"), preprocess["crop"]
        if not os.path.isdir(root):
            pixels = torch.randint(0, 256, (IMAGES, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
            return pixels, "random (agreement says little)"
        files = data.open_folder(root, eval_only=True)[1]
        images = data.Images(files, lambda _: data.eval_transform(preprocess))
        chosen = [images[0, i * len(files) // IMAGES, 0] for i in range(IMAGES)]
        return data.collate(chosen)[0], f"{IMAGES} of {root}"

    def random_model(self, args):
        """Batch norms have seen the images, so that activations keep their size from layer to layer."""
        config = dict(stride_on=args.stride_on, attention=args.attention, stem=args.stem, num_classes=args.num_classes)
        model = resnet50.ResNet50(**{k: v for k, v in config.items() if v is not None})
        for block in model.blocks():
            torch.nn.init.constant_(block.bn3.weight, 0.3)
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        usual = norms[0].momentum
        for norm in norms:
            norm.momentum = 1.0  # what it sees replaces the statistics
        model.train()(resnet50.normalize(self.pixels[:8], model.preprocess))
        for norm in norms:
            norm.momentum = usual
        return model.to(memory_format=torch.channels_last)

    @functools.cached_property
    def int8(self):
        return resnet50.quantize(self.model, self.pixels.split(8))

    def prepare(self, name):
        """Quantizes and exports what `name` needs, on all cores. -> maker(batch, threads) -> call(pixels uint8
        (N, 3, H, W) channels_last) -> logits (N, classes)."""
        if name == "int8":
            return lambda batch, threads, call=self.int8: call
        engine, _, precision = name.rpartition("_")
        cache, size = os.path.join(ROOT, "runs", "bench"), self.model.preprocess["crop"]
        if engine and precision == "bf16":
            peers.check_bf16(name)
        if precision == "exported":
            path = peers.exported_file(cache, self.int8)
            return functools.partial(peers.onnxruntime_call, path) if engine == "onnxruntime" else \
                functools.partial(peers.openvino_call, path, "int8", self.model.preprocess, size)
        if engine == "openvino":
            folder = peers.openvino_files(cache, self.model, self.pixels)
            return functools.partial(peers.openvino_call, folder, precision, self.model.preprocess, size)
        if engine == "onnxruntime":
            return functools.partial(peers.onnxruntime_call, peers.onnxruntime_file(cache, self.model, self.pixels))
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        if not engine:
            return lambda batch, threads, call=resnet50.fuse(self.model, dtype): call
        call = functools.partial(floating, copy.deepcopy(self.model).to(dtype), dtype)
        return lambda batch, threads: peers.compiled(call) if engine == "compile" else call

    def contenders(self, batch, threads, seconds):
        """-> [Contender], {name: how many of the images got the fp32 network's class}. One of another kind than the
        first is left out if a call of it takes longer than `seconds`."""
        rows = torch.arange(max(batch, 8)) % IMAGES
        pixels = self.pixels[rows].contiguous(memory_format=torch.channels_last)
        found, same = [], {}
        limit(threads)
        for name, maker in self.makers.items():
            call, start = maker(batch, threads), time.monotonic()
            classes = torch.cat([call(p).argmax(1) for p in pixels.split(batch) if len(p) == batch])
            same[name] = f"{(classes == self.reference[rows[:len(classes)]]).sum()}/{len(classes)}"
            contender = Contender(name, KINDS[name], threads, functools.partial(call, pixels[:batch]))
            if found and contender.kind != found[0].kind and time.monotonic() - start > seconds:
                start = time.monotonic()
                contender.call()  # without what only the first call does
                if (elapsed := time.monotonic() - start) > seconds:
                    say(f"  {name:17}left out: {elapsed:.1f} s a call, class as fp32 {same[name]}")
                    continue
            found.append(contender)
        # two threads over one, measured side by side
        found += [c._replace(threads=1) for c in found if c.name in OURS and c.kind == found[0].kind and threads > 1]
        return found, same


# ------------------------------------------------------------------------------------------------------ report

def report(contenders, samples, same, batch, macs):
    """Prints one configuration's table. -> its figures, flat."""
    threads, result = contenders[0].threads, {}
    tail = f"bs{batch}.t{threads}"
    say(f"  {'':17}{'img/s':>8}{'quartiles':>18}{'peak':>7}{'same':>7}   ours / it")
    for c in (c for c in contenders if c.threads == threads):
        mine = samples[c.name, threads].values()
        low, rate, high = (q * batch for q in quartiles(s.rate for s in mine))
        share = statistics.median(s.rate * batch * macs * 2 / (s.before + s.after) for s in mine)
        result |= {f"ips.{c.name}.{tail}": round(rate, 2), f"n.{c.name}.{tail}": len(mine)}
        if share == share:
            result[f"peak_share.{c.name}.{tail}"] = round(share, 4)
        texts = []
        for a in (a for a in contenders if a.name in OURS and a.threads == threads and c.name not in OURS):
            found = ratios(a, c, samples)
            q1, median, q3 = quartiles(found)
            key = f"ratio.{a.name}.{c.name}.{tail}"
            result[key] = round(median, 3)
            if a.kind != c.kind:
                texts.append(f"{a.name} {median:.2f}")
                continue
            slow, fast = map(operator.truediv, tenths(samples[a.name, threads]), tenths(samples[c.name, threads]))
            figures = dict(q1=q1, q3=q3, slow=slow, fast=fast)
            result |= {f"{key}.n": len(found), **{f"{key}.{k}": round(v, 3) for k, v in figures.items()}}
            text = f"{a.name} {median:.2f} [{q1:.2f}, {q3:.2f}] n={len(found)}, fast {fast:.2f}, slow {slow:.2f}"
            texts.append(text)
        spread = f"[{low:.1f}, {high:.1f}]"
        say(f"  {c.name:17}{rate:8.1f}{spread:>18}{share:7.1%}{same[c.name]:>7}   " + "; ".join(texts))
    for one in (c for c in contenders if c.threads < threads):
        found = ratios(one._replace(threads=threads), one, samples)
        q1, median, q3 = quartiles(found)
        result[f"scaling.{one.name}.bs{batch}"] = round(median, 3)
        say(f"  {one.name:17}{threads} threads over one: {median:.2f} [{q1:.2f}, {q3:.2f}] n={len(found)}")
    return result


def computed(program):
    """-> {convolution: share of its results that are computed}; the rest nobody reads"""
    sides = {"pixels": 1.0}
    for old, new in zip(program, skip_unread(program)):
        sides[new["out"]] = sides[new["x"]] * old.get("stride", 1) / new.get("stride", 1)
    return {name: side ** 2 for name, side in sides.items()}


def per_layer(networks, batch, threads, seconds):
    """Prints the steps of one of our networks: microseconds an image, share of the time, percent of the peak."""
    kind = networks.kind
    model = networks.int8 if kind == "int8" else resnet50.fuse(
        networks.model, torch.bfloat16 if kind == "bf16" else torch.float32)
    if (plan := model.plan()) is None:
        raise resnet50.UserError(f"--per-layer: attention, and {kind} on this CPU, are not one call", code=2)
    macs = resnet50.count_macs(networks.model, networks.model.preprocess["crop"])
    steps = resnet50.fold_downsample(resnet50.flatten(networks.model))
    names = ["pixels", *(step.name for step in steps)]
    share = computed(model.program())
    work = [0, *((macs.get(step.name, 0) + (macs[step.folded.name] if step.folded else 0)) * share.get(step.name, 1)
                 for step in steps)]
    pixels = networks.pixels[torch.arange(batch) % IMAGES].contiguous(memory_format=torch.channels_last)
    profile = functools.partial(csrc.network_profile, pixels, plan, model.config["num_classes"])
    times, peaks = [], []
    limit(threads)
    profile()
    start = time.monotonic()
    while time.monotonic() - start < seconds or len(times) < 3:
        before = peak(kind, threads)
        times.append(profile().double() / 1e3 / batch)
        peaks.append((before + peak(kind, threads)) / 2e6)  # multiply-adds per microsecond
    limit(len(CORES))
    times, result = torch.stack(times), {}
    rows = list(zip(names, work, times.unbind(1))) + [("all", sum(work), times.sum(1))]
    say(f"  {'':26}{'MMAC':>8}{'us/image':>10}{'quartiles':>20}{'time':>7}{'peak':>7}   n={len(peaks)}")
    for name, mmac, values in rows:
        low, middle, high = quartiles(values.tolist())
        share = statistics.median((mmac / values / torch.tensor(peaks, dtype=torch.double)).tolist())
        part = statistics.median((values / times.sum(1)).tolist())
        result[f"us.{name}.bs{batch}.t{threads}"] = round(middle, 2)
        if share == share:
            result[f"peak_share.{name}.bs{batch}.t{threads}"] = round(share, 4)
        spread = f"[{low:.1f}, {high:.1f}]"
        say(f"  {name:26}{mmac / 1e6:8.1f}{middle:10.1f}{spread:>20}{part:7.1%}{share:7.1%}")
    return result


def numbers(text):
    return [int(part) for part in text.split(",")]


def on_device(part, main, parse):
    """-> main and its arguments, with --device cuda those of tests.bench.gpu for this part"""
    p = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args, rest = p.parse_known_args()
    if args.device == "cpu":
        return main, parse(rest)
    from tests.bench import gpu  # which imports this module
    return gpu.main, gpu.parse(["--part", part, *rest])


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=ON_A_GPU.format("networks"))
    resnet50.add_model_args(p)
    p.add_argument("--only", metavar="NAME[,NAME]", help=f"of {', '.join(KINDS)}")
    p.add_argument("--full", action="store_true", help=f"also {' and '.join(SLOW_TO_BUILD)}, a minute of building")
    p.add_argument("--batches", type=numbers, default=[1, 8, 32], metavar="N[,N]")
    p.add_argument("--threads", type=numbers, default=[1, 2], metavar="N[,N]")
    p.add_argument("--seconds", type=float, default=150, help="of measuring, all configurations (default %(default)s)")
    p.add_argument("--isa", choices=("amx", "vnni", "avx2", "plain"), help="hold everything to this instruction set")
    p.add_argument("--per-layer", action="store_true", help="our int8 network's layers (--only bf16 or fp32: of that)")
    args = p.parse_args(argv)
    names = args.only.split(",") if args.only else [n for n in KINDS if args.full or n not in SLOW_TO_BUILD]
    if unknown := set(names) - set(KINDS):
        p.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(KINDS)}")
    args.kind = names[0] if names in (["bf16"], ["fp32"]) else "int8"  # of --per-layer
    args.names = [n for n in KINDS if n in names and not args.per_layer]
    return args


def main(args):
    if args.isa:
        peers.limit_isa(args.isa, say)
        try:
            csrc.isa()
        except RuntimeError as error:
            raise resnet50.UserError(error, code=2) from error
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    threads = [t for t in args.threads if t <= len(CORES) or say(f"{t} threads skipped: {len(CORES)} cores")]
    result = hardware()
    ceilings(dict.fromkeys(KINDS.values()), threads, result)
    limit(len(CORES))
    networks, stolen = Networks(args), Stolen()
    weights = {batch: 32 + batch for batch in args.batches}  # large batches: fewer samples in the same time
    for t in threads:
        for batch in args.batches:
            say(f"\nbatch {batch}, {t} thread{'s' * (t > 1)}")
            seconds = args.seconds / len(threads) * weights[batch] / sum(weights.values())
            if args.per_layer:
                result |= per_layer(networks, batch, t, seconds)
                continue
            contenders, same = networks.contenders(batch, t, seconds / 8)
            if contenders:
                samples = alternate(contenders, seconds)
                result |= report(contenders, samples, same, batch, networks.macs)
    return {**result, "stolen": stolen.share()}


if __name__ == "__main__":
    resnet50.run_script(*on_device("networks", main, parse), "tests.bench.infer")
