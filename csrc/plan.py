"""A network's steps -> the block of bytes that network_int8 or network_float walks (cpu/network.h has the format).

Steps are dicts in execution order; values name activations, the first reads "pixels", the last makes the logits:
  conv     x, out, weight, mult, bias, stride, padding; optional residual + gain, x2 + weight2 + stride2, pad_value
  maxpool  x, out                    3x3, stride 2, padding 1
  avgpool  x, out, mult              over H and W
  linear   x, weight, bias, scale    float32 logits

Weights in bfloat16 or float32 make a network in these, where csrc.has_float(dtype): every convolution ends in a ReLU,
biases are float32, the first reads pixels less the `centre` that its step names, uint8 or float32 (3), and nothing has
mult, gain, scale or pad_value.
"""
import contextlib
import hashlib
import json
import math
import mmap
import os
import platform
import struct
import tempfile

import torch

from . import ISAS, build_key, cache_folders, isa, load

HEADER_STAMP = 0x35305206
HEADER = 9  # words
KINDS = dict(load=0, conv=1, maxpool=2, avgpool=3, linear=4, load_windows=5)
FIELDS = ("kind", "in", "out", "residual", "in2", "kh", "kw", "stride", "pad", "stride2", "residual_stride", "packed",
          "scale", "mult", "block_one", "block_many")
# what tune() tries (cpu/conv.h: Conv.block): rows, 0 for the kernel's own choice, and for avx2 nothing measured better
# (csrc/LOG.md); odd for AMX: the lines of results are fetched ahead
WINOGRAD = -1  # as a block: by cpu/winograd.h, where there are transformed weights; avx2 always does, always faster
# input times output channels up to which weights are transformed; vnni reads more of them slower than it multiplies
TRANSFORMED = dict(avx2=512 * 512, vnni=256 * 256)
BLOCKS = dict(plain=(0,), avx2=(0,), vnni=(0, 48, 192, 768, WINOGRAD),
              amx=(0, 1, 32, 33, 64, 65, 128, 129, 256, 257, 512, 513))
FIRST, ROUNDS = 2, 5  # of measuring: to find what loses, and to choose
FLOAT32 = 2  # PlanHeader.type; 26 s of measuring would gain 0 to 2 % (csrc/LOG.md)
METHOD = 2  # of measuring: what was kept of another is not taken
WORTH, LOST = 0.98, 1.1  # of the time of the kernel's own choice: what another must reach; what ends its trial
BATCHES = dict(block_one=1, block_many=8)  # images for which each field is chosen
PROBES = (224, 97)  # two image sizes tell apart feature maps of different size
STRIDES = dict(x="stride", x2="stride2", residual="residual_stride")  # with which a step reads an activation


def isa_of(dtype):
    """Whose kernels multiply weights of this type: AMX has no tiles of float32 (cpu/conv.h)."""
    return "vnni" if dtype == torch.float32 and isa() == "amx" else isa()


def reads(step):
    """Names of the activations that a step reads."""
    return [step[key] for key in STRIDES if step.get(key) is not None]


def in_place(step):
    """Whether the result may lie where the residual does."""
    return step.get("residual") is not None and step["residual_stride"] == 1


def skip_unread(steps):
    """-> the same network, without the pixels that nobody reads. Where only 1x1 convolutions with a stride read a
    result, as at the end of a stage of the 2015 network, the stride becomes that of the convolution which makes it, and
    moves on to what this one reads: three bottlenecks do a quarter of their last two convolutions, a tenth of the
    network. Such a sum reads its residual with the stride ("residual_stride"). Every step is given all STRIDES."""
    steps = [{**dict.fromkeys(STRIDES.values(), 1), **step} for step in steps]

    def movable(reader, key):
        """Whether this reading has a stride, and no use for what lies between the pixels that it reads"""
        return reader["kind"] == "conv" and (
            key != "x" or reader["weight"].shape[2:] == (1, 1) and not reader["padding"])
    for step in reversed(steps):  # readers first: what a stride saves goes on to what they read
        if step["kind"] != "conv":
            continue
        readers = [(reader, key) for reader in steps for key in STRIDES if reader.get(key) == step["out"]]
        stride = math.gcd(*(reader[STRIDES[key]] if movable(reader, key) else 1 for reader, key in readers))
        if stride <= 1:
            continue
        for reader, key in readers:
            reader[STRIDES[key]] //= stride
        for key in STRIDES:
            step[STRIDES[key]] *= stride if step.get(key) is not None else 1
    return steps


def windows(step):
    """A first convolution of up to 8 rows, for AMX: the load puts 8 rows of pixels side by side, so that the window of
    an output pixel is one run of bytes and the convolution a 1x1 (cpu/layout.h)."""
    weight = step["weight"]
    o, c, kh, kw = weight.shape
    runs = torch.zeros(o, kw, c, 8, dtype=weight.dtype)
    runs[..., :kh] = weight.permute(0, 3, 1, 2)
    load = dict(kind="load_windows", out=step["x"], kh=kh, kw=kw, stride=step["stride"], pad=step["padding"],
                channels=8 * kw * c)
    return load, dict(step, weight=runs.view(o, -1, 1, 1), stride=1, padding=0)


def large(size):
    """-> empty uint8 tensor on pages of 2 MiB where the system has them: weights are read as fast as they arrive, and
    look-ups of 4 KiB pages cost 2 to 4 % of a call."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has small pages mostly
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def shrink(sizes, kernel, stride, padding):
    """Of feature maps -> of what a convolution or pool makes of them"""
    return tuple((size + 2 * padding - kernel) // stride + 1 for size in sizes)


class Buffers:
    """Names -> buffers. A buffer serves many names, one after the other, if their feature maps agree in size, channels
    and border; a residual sum takes the place of its residual."""

    def __init__(self, steps):
        self.last = {name: i for i, step in enumerate(steps) for name in reads(step)}
        self.border, self.fill = {}, {}
        for step in steps:
            if step["kind"] == "conv":
                self.border[step["x"]] = max(self.border.get(step["x"], 0), step["padding"])
                if step.get("pad_value") is not None:
                    self.fill[step["x"]] = step["pad_value"]
        self.planes = self.split(steps) if isa_of(steps[0]["weight"].dtype) == "amx" else set()
        self.shapes, self.of = {}, {}  # by name: (bytes of a pixel, size for each of PROBES), index of its buffer
        self.keys, self.owner = [], []  # by buffer: (shape, border, name if it has a fill), name that it holds now

    @staticmethod
    def split(steps):
        """Names whose pixels lie in four planes: what a stride of 2 reads, if nothing reads neighbouring pixels of it
        with a stride of 1; and, because a sum lies where its residual is, the whole chain of sums."""
        strides, windows = {}, set()
        for step in steps:
            kernel = step["weight"].shape[-1] if step["kind"] == "conv" else 0
            for name, stride, kernel in ((step["x"], step["stride"], kernel), (step.get("x2"), step["stride2"], 1)):
                if name is not None:
                    strides.setdefault(name, set()).add(stride)
                    if kernel != 1 and stride == 1:
                        windows.add(name)
        planes = {name for name, s in strides.items() if 2 in s and name not in windows} - {steps[0]["x"]}
        sums = [{step["out"], step["residual"]} for step in steps if in_place(step)]
        for pair in sums[::-1] + sums:
            if pair & planes:
                planes |= pair
        return planes

    def make(self, i, step, shape):
        """-> index of the buffer that takes what step i makes."""
        name, residual = step["out"], step.get("residual")
        key = shape, self.border.get(name, 0), int(name in self.planes), name if name in self.fill else None
        if residual is not None:
            pixel, sizes = self.shapes[residual]
            if (pixel, shrink(sizes, 1, step["residual_stride"], 0)) != shape or \
                    in_place(step) and self.keys[self.of[residual]] != key:
                raise ValueError(f"build_plan: {name} and its residual {residual} differ in size, channels or border")
        if in_place(step) and self.last[residual] == i:
            index = self.of[residual]
        else:
            index = next((j for j, k in enumerate(self.keys) if k == key and self.last.get(self.owner[j], -1) < i),
                         len(self.keys))
        if index == len(self.keys):
            self.keys.append(key)
            self.owner.append(name)
        self.shapes[name], self.of[name], self.owner[index] = shape, index, name
        return index


def build_plan(steps):
    """-> uint8 tensor, for this process's instruction set only."""
    load()
    ops, dtype = torch.ops.resnet50, steps[0]["weight"].dtype
    element, kernels = dtype.itemsize, isa_of(dtype)  # bytes of a value
    steps, channels, sizes = skip_unread(steps), steps[0]["weight"].shape[1], PROBES
    first = dict(kind="load", out=steps[0]["x"], channels=channels)
    if kernels == "amx" and 4 < steps[0]["weight"].shape[2] <= 8:
        sizes = shrink(PROBES, steps[0]["weight"].shape[2], steps[0]["stride"], steps[0]["padding"])
        first, steps[0] = windows(steps[0])
    nhwc = dict(memory_format=torch.channels_last)
    buffers, constants, table = Buffers(steps), [], []
    position = 0  # of the next constant, behind the tables; made absolute below

    def constant(tensor):
        nonlocal position
        data = tensor.contiguous().view(torch.uint8).flatten()
        data = torch.nn.functional.pad(data, (0, -len(data) % 64))
        constants.append(data)
        position += len(data)
        return position - len(data)

    first["out"] = buffers.make(-1, first, (first.pop("channels") * element, sizes))
    if element > 1:
        first["scale"] = constant(steps[0]["centre"])
    table.append(first)
    for i, step in enumerate(steps):
        kind = step["kind"]
        row = dict(kind=kind, **{field: buffers.of[step[key]] for key, field in
                                 (("x", "in"), ("x2", "in2"), ("residual", "residual")) if step.get(key) is not None})
        pixel, sizes = buffers.shapes[step["x"]]
        if kind in ("conv", "linear"):
            weight = step["weight"]
            if kind == "linear":
                weight = weight[:, :, None, None]
                row.update(kh=1, kw=1, stride=1)
                if element == 1:
                    row["scale"] = constant(step["scale"])
                classes, mult = len(weight), torch.zeros(len(weight), dtype=torch.int32)
            else:
                row.update(kh=weight.shape[2], kw=weight.shape[3], stride=step["stride"], pad=step["padding"],
                           stride2=step["stride2"], residual_stride=step["residual_stride"])
                shape = len(weight) * element, shrink(sizes, weight.shape[2], step["stride"], step["padding"])
                mult = step.get("mult")
            weight, weight2 = weight.contiguous(**nhwc), step.get("weight2")
            weight2 = None if weight2 is None else weight2.contiguous(**nhwc)
            winograd = kind == "conv" and weight.shape[2:] == (3, 3) and step["stride"] == step["padding"] == 1
            if element == 1:
                winograd = winograd and weight.shape[0] * weight.shape[1] <= TRANSFORMED.get(kernels, 0)
                row["packed"] = constant(ops.pack_int8(weight, mult, step["bias"], step.get("gain"), weight2, winograd))
            else:
                winograd = winograd and step.get("residual") is None
                row["packed"] = constant(ops.pack_float(weight, step["bias"], weight2, winograd))
        elif kind == "maxpool":
            row.update(kh=3, kw=3, stride=2, pad=1)
            shape = pixel, shrink(sizes, 3, 2, 1)
        else:
            row["mult"] = int(step.get("mult", 0))
            shape = pixel, (1,) * len(sizes)
        if kind != "linear":
            row["out"] = buffers.make(i, step, shape)
        table.append(row)

    base = 8 * (HEADER + 4 * len(buffers.keys) + len(FIELDS) * len(table))
    base += -base % 64
    words = [word for (shape, border, planes, filled) in buffers.keys
             for word in (shape[0], border, planes, base + constant(buffers.fill[filled]) if filled else -1)]
    for row in table:
        row["kind"] = KINDS[row["kind"]]
        row |= {field: base + row[field] for field in ("packed", "scale") if field in row}
        words += [row.get(field, -1 if field in ("in", "out", "residual", "in2") else 0) for field in FIELDS]
    body = torch.cat(constants)
    digest = hashlib.sha256(struct.pack(f"<{len(words)}q", *words) + body.numpy().tobytes()).digest()
    header = [HEADER_STAMP, ISAS.index(kernels), base + len(body), struct.unpack("<q", digest[:8])[0],
              len(buffers.keys), len(table), classes, channels, element.bit_length() - 1]
    head = torch.frombuffer(bytearray(struct.pack(f"<{len(header) + len(words)}q", *header, *words)), dtype=torch.uint8)
    return torch.cat([head, torch.zeros(base - len(head), dtype=torch.uint8), body], out=large(base + len(body)))


def cpuinfo(*keys):
    """What Linux says of the first core under one of these; empty where it says nothing."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        return next((line.partition(":")[2].strip() for line in f if line.lower().startswith(keys)), "")
    return ""


def steps_of(plan):
    """-> int64 (steps, FIELDS), the plan's own memory"""
    buffers, count = plan[32:48].view(torch.int64).tolist()
    return plan[8 * (HEADER + 4 * buffers):][:8 * count * len(FIELDS)].view(torch.int64).view(count, len(FIELDS))


def tune(plan, size):
    """Chooses for each convolution how many rows pass over the weights at a time, by running the whole network on
    images of `size` pixels with each of BLOCKS. What was measured is kept in the cache folder, by CPU, threads and
    shapes, so that this happens once per machine. Changes the plan in place; results do not depend on it."""
    kernels, type = ISAS[int(plan[8:16].view(torch.int64))], int(plan[64:72].view(torch.int64))
    if len(BLOCKS[kernels]) == 1 or type == FLOAT32:
        return plan
    table, classes, at = steps_of(plan), int(plan[48:56].view(torch.int64)), FIELDS.index
    convs = [i for i in range(len(table)) if table[i, 0] == KINDS["conv"]]
    # of all steps: on AMX a first convolution's own lies in the step that loads its windows
    geometry = table[:, [at(name) for name in ("kind", "kh", "kw", "stride", "stride2")]].tolist()

    def signature(i):
        packed = plan[int(table[i, at("packed")]):][:64].view(torch.int32)  # cpu/conv.h: struct Packed
        return " ".join(map(str, packed[:15].tolist()))
    cpu = cpuinfo("model name") or platform.machine()
    here = f"{cpu} {kernels} {torch.get_num_threads()} threads {size} px {build_key()} {METHOD}"
    digest = hashlib.sha256(" | ".join([here, str(geometry), *map(signature, convs)]).encode()).hexdigest()[:16]
    path = os.path.join(cache_folders()[-1], f"blocks-{digest}.json")
    try:
        with open(path) as f:
            known = json.load(f)
        # a kernel trusts its plan: what it never measured, such as a negative number, would lead it out of its memory
        if all(len(known[field]) == len(convs) and set(known[field]) <= set(BLOCKS[kernels]) for field in BATCHES):
            for field in BATCHES:
                table[convs, at(field)] = torch.tensor(known[field], dtype=torch.int64)
            return plan
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # not measured yet, or not readable
    known = dict(machine=here)
    for field, images in BATCHES.items():
        pixels = torch.zeros(images, size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        blocks = torch.tensor(BLOCKS[kernels])
        tried = blocks[:, None].expand(-1, len(convs))
        gains = []
        for _ in range(FIRST + ROUNDS):
            times = []
            for chosen in tried:
                table[convs, at(field)] = chosen
                for _ in range(2):  # the first finds in the caches what another choice has left there
                    time = torch.ops.resnet50.network_profile(pixels, plan, classes)[convs].double()
                times.append(time)
            # against the kernel's own choice of the same round: some machines change speed from one second to the next
            gains.append(torch.stack(times) / times[0])
            if len(gains) == FIRST:
                # what a layer lost by is not tried there again: it would push others' data out of the caches, as the
                # transformed weights of winograd.h do
                lost = torch.stack(gains).amin(0) > LOST
                tried = torch.where(lost, 0, tried)
        gain, best = torch.stack(gains[FIRST:]).quantile(0.5, dim=0).masked_fill(lost, 1).min(0)
        known[field] = blocks[torch.where(gain < WORTH, best, 0)].tolist()
        table[convs, at(field)] = torch.tensor(known[field], dtype=torch.int64)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs the next start some seconds
        descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(path))
        with os.fdopen(descriptor, "w") as f:
            json.dump(known, f)
        os.replace(temporary, path)
    return plan
