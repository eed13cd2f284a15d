"""Executes the PTX that nvcc makes of wrappers.cu, as the PTX manual (chapter 9.7) has it, for the 32 lanes of a warp
at once. It knows no more than these kernels need: straight lines of code, in which every lane is always active."""
import re

import numpy as np

IN, OUT, SHARED = 1 << 32, 2 << 32, 4096  # where the operands and shared memory lie
LANES = np.arange(32)


def kernels(text):
    """PTX -> {name: its instructions}"""
    bodies = re.findall(r"\.entry (\w+)\([^)]*\)[^{]*\{(.*?)\n\}", text, re.S)
    return {name: [line.strip() for line in re.sub(r"//.*", "", body).split(";") if line.strip()]
            for name, body in bodies}


def half(bits):
    return (bits & 0xffff).astype(np.uint16).view(np.float16).astype(np.float64)


def bfloat(bits):
    return ((bits & 0xffff).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def to_half(x):
    return np.where(np.isnan(x), np.uint16(0x7fff), x.astype(np.float16).view(np.uint16))


def to_bfloat(x):
    """The nearer of the two neighbours, and of equally near ones the even."""
    below = x.view(np.uint32) >> 16
    pair = np.stack([below, below + 1])
    exact = x.astype(np.float64)
    distance = np.abs((pair << 16).astype(np.uint32).view(np.float32).astype(np.float64) - exact)
    # infinity stands for the number that would follow the largest
    distance[1] = np.where((below & 0x7fff) == 0x7f7f, np.abs(np.sign(exact) * 2.0 ** 128 - exact), distance[1])
    up = (distance[1] < distance[0]) | ((distance[1] == distance[0]) & (below % 2 == 1))
    up &= ~np.isinf(x)
    return np.where(np.isnan(x), np.uint16(0x7fff), np.where(up, pair[1], pair[0])).astype(np.uint16)


class Warp:
    def __init__(self, words, results, shared_bytes):
        self.memory = {IN: np.ascontiguousarray(words).view(np.uint8).reshape(-1),
                       OUT: np.zeros(32 * results * 4, np.uint8), SHARED: np.zeros(shared_bytes, np.uint8)}
        self.registers, self.groups = {}, [[]]

    def find(self, address):
        start = max(s for s in self.memory if s <= address)
        assert address < start + len(self.memory[start]), "outside of memory"
        return self.memory[start], address - start

    def load(self, address, size):
        """addresses (32) -> uint64 (32)"""
        found = [self.find(int(a)) for a in address]
        return np.array([int.from_bytes(m[at:at + size].tobytes(), "little") for m, at in found], np.uint64)

    def store(self, address, values, size):
        for a, value in zip(address, values):
            memory, at = self.find(int(a))
            memory[at:at + size] = np.frombuffer(int(value).to_bytes(8, "little")[:size], np.uint8)

    def value(self, operand):
        if operand == "%tid.x":
            return LANES.astype(np.uint64)
        if operand == "shared":
            return np.full(32, SHARED, np.uint64)
        if operand.startswith("%"):
            return self.registers[operand]
        return np.full(32, int(operand, 0) % 2 ** 64, np.uint64)

    def address(self, operand):
        base, _, offset = operand.strip("[]").partition("+")
        return self.value(base) + np.uint64(int(offset or 0))

    def floats(self, registers):
        return np.stack([self.value(r).astype(np.uint32).view(np.float32) for r in registers], 1)

    def run(self, instructions):
        for line in instructions:
            if not line.startswith("."):
                op, _, rest = line.partition(" ")
                operands = [[name.strip() for name in group.strip("{}").split(",")] if group.startswith("{") else group
                            for group in re.findall(r"\{[^}]*\}|[^,\s]+", rest)]
                self.execute(op.strip(), operands)

    def execute(self, op, x):
        r, name = self.registers, op.split(".")[0]
        bits = np.uint64(0xffffffff) if re.search(r"\.[subf]32$", op) else np.uint64(0xffffffffffffffff)
        if op in ("ret", "bar.sync"):
            return
        if op.startswith("ld.param"):
            r[x[0]] = np.full(32, IN if x[1].endswith("_0]") else OUT, np.uint64)
        elif op.startswith(("ld.", "st.")):
            size, to = int(op[-2:]) // 8, x[1 if op[0] == "s" else 0]
            for i, register in enumerate(to if isinstance(to, list) else [to]):
                address = self.address(x[0 if op[0] == "s" else 1]) + np.uint64(i * size)
                if op[0] == "l":
                    r[register] = self.load(address, size)
                else:
                    self.store(address, self.value(register), size)
        elif name in ("mov", "cvta"):
            r[x[0]] = self.value(x[1])
        elif op == "mul.wide.u32" or op == "mul.lo.s32":
            product = self.value(x[1]) * self.value(x[2])
            r[x[0]] = product if "wide" in op else product & bits
        elif name in ("add", "sub", "and", "shl", "or"):
            a, b = self.value(x[1]), self.value(x[2])
            shifted = a << (b & np.uint64(63))
            r[x[0]] = {"add": a + b, "sub": a - b, "and": a & b, "or": a | b, "shl": shifted}[name] & bits
        elif op == "cvt.f32.f16":
            r[x[0]] = half(self.value(x[1])).astype(np.float32).view(np.uint32).astype(np.uint64)
        elif op in ("cvt.rn.f16x2.f32", "cvt.rn.bf16x2.f32"):  # the first source goes to the upper half
            convert = to_half if "bf16" not in op else to_bfloat
            high, low = (convert(self.floats([register])[:, 0]).astype(np.uint64) for register in x[1:])
            r[x[0]] = high << np.uint64(16) | low
        elif op == "ldmatrix.sync.aligned.m8n8.x4.shared.b16":
            rows = self.value(x[1].strip("[]"))
            for i, register in enumerate(x[0]):  # lane 4 g + m: bytes 4 m on of the row whose address lane 8 i + g has
                r[register] = self.load(rows[8 * i + LANES // 4] + (LANES % 4 * 4).astype(np.uint64), 4)
        elif op == "cp.async.cg.shared.global":
            to, source = self.address(x[0]), self.address(x[1])
            self.groups[-1].append((to, [self.load(source[i:i + 1] + np.uint64(j), 1)[0] if j < size else 0
                                         for i, size in enumerate(self.value(x[3])) for j in range(int(x[2]))]))
        elif op == "cp.async.commit_group":
            self.groups.append([])
        elif op == "cp.async.wait_group":
            while len(self.groups) - 1 > int(x[0]):
                for to, data in self.groups.pop(0):
                    self.store((to[:, None] + np.arange(16, dtype=np.uint64)).ravel(), data, 1)
        elif name == "mma":
            self.multiply(op, *x)
        else:
            raise NotImplementedError(op)

    def multiply(self, op, d, a, b, c, *sparse):
        """The fragments of m16n8k16 and m16n8k32. Of lane 4 g + m, register i of a holds 4 bytes from 4 m + 16 (i / 2)
        on of row g + 8 (i % 2); of b, from 4 m + 16 i on of column g; of c, d row g + 8 (i / 2), column 2 m + i % 2.
        Of the sparse m16n8k64 the same, where a's 32 bytes are two of each 4 of 64: words of lanes 4 g and 4 g + 2 say
        which of row g, for each half, and those of 4 g + 1 and 4 g + 3 of row g + 8, each two bits from the lowest on.
        """
        g, m = LANES // 4, LANES % 4
        left, right = np.zeros((16, 32), np.uint8), np.zeros((8, 16 * len(b)), np.uint8)
        for i, register in enumerate(a):
            for byte in range(4):
                left[g + i % 2 * 8, i // 2 * 16 + 4 * m + byte] = self.value(register) >> np.uint64(8 * byte) & 255
        for i, register in enumerate(b):
            for byte in range(4):
                right[g, i * 16 + 4 * m + byte] = self.value(register) >> np.uint64(8 * byte) & 255
        place = [(g + i // 2 * 8, 2 * m + i % 2) for i in range(4)]
        if op in ("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32",
                  "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.u8.s32"):
            if sparse:
                kept, selector = self.value(sparse[0]).reshape(8, 2, 2), int(sparse[1], 0)  # g, half, row below
                assert selector == 0
                places = kept[..., None] >> (2 * np.arange(16)).astype(np.uint64) & np.uint64(3)
                places = places.transpose(2, 0, 1, 3).reshape(16, 32).astype(int) + np.arange(32) // 2 * 4
                wide = np.zeros((16, 64), np.int8)
                np.put_along_axis(wide, places, left.view(np.int8), 1)
                products = wide.astype(np.int64) @ right.astype(np.int64).T
            else:
                products = left.astype(np.int64) @ right.view(np.int8).astype(np.int64).T
            for i, (to, add) in enumerate(zip(d, c)):
                self.registers[to] = (products[place[i]] + self.value(add).astype(np.int64)).astype(np.uint32).astype(
                    np.uint64)
        else:
            widen = {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": half,
                     "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": bfloat}[op]
            products = widen(left.view(np.uint16)) @ widen(right.view(np.uint16)).T
            sums = self.floats(c).astype(np.float64)
            for i, to in enumerate(d):
                total = (products[place[i]] + sums[:, i]).astype(np.float32)
                self.registers[to] = total.view(np.uint32).astype(np.uint64)


def run(instructions, words, results, shared_bytes=1024):
    """uint32 (32, words) -> uint32 (32, results), as device.Device.wrapper"""
    warp = Warp(words, results, shared_bytes)
    with np.errstate(over="ignore", invalid="ignore"):
        warp.run(instructions)
    return warp.memory[OUT].view(np.uint32).reshape(32, results)
