"""Mistakes planted in csrc/cuda, and what runs to notice them: python -m tests.emulate_cuda.faults LIBRARY GROUP.
Without torch, whose import takes longer than a group."""
import os
import sys

import numpy as np

from tests.emulate.kernels import Case, compare, extremes
from tests.emulate_cuda.device import CSRC, Device

FAULTS = {  # what: (file, text, the same with a mistake where FAULT is true, what must be said, where)
    "no barrier in the main loop": ("conv.cuh", "cp_async_wait<STAGES - 2>();\n      __syncthreads();",
        "cp_async_wait<STAGES - 2>();\n      if (!FAULT) __syncthreads();",
        "race in shared memory|under way", "conv"),
    "no barrier before the epilogue": ("conv.cuh", "__syncthreads();  // the epilogue",
        "if (!FAULT) __syncthreads();  // the epilogue",
        "race in shared", "conv"),
    "no barrier before the stores": ("conv.cuh", "  __syncthreads();\n  each_piece<T, Output>",
        "  if (!FAULT) __syncthreads();\n  each_piece<T, Output>",
        "race in shared", "conv"),
    "no barrier behind the residual": ("conv.cuh", "    __syncthreads();\n  }\n  constexpr",
        "    if (!FAULT) __syncthreads();\n  }\n  constexpr",
        "race in shared", "conv"),
    "a barrier for half of the warps": ("conv.cuh", "__syncthreads();  // the epilogue",
        "if (!FAULT || threadIdx.x < 64) __syncthreads();  // the epilogue",
        "race in shared|not all threads|barriers on different lines", "conv"),
    "a wait that is off by one": ("conv.cuh", "cp_async_wait<STAGES - 2>();",
        "FAULT ? cp_async_wait<STAGES - 1>() : cp_async_wait<STAGES - 2>();",
        "under way", "conv"),
    "a buffer refilled too early": ("conv.cuh", "load(step + STAGES - 1);",
        "load(step + STAGES - 1 + (FAULT ? 1 : 0));",
        "race in shared|under way|differs|uninitialised", "conv"),
    "rows beyond the last": ("conv.cuh", "if (row >= p.m)",
        "if (!FAULT && row >= p.m)",
        "outside of every buffer", "rows"),
    "an edge of the image": ("conv.cuh", "(unsigned(y) < unsigned(in.h))",
        "(unsigned(y) < unsigned(in.h) + (FAULT ? 1 : 0))",
        "outside of every buffer|differs", "conv"),
    "channels beyond the last": ("conv.cuh", "return first_column + int(threadIdx.x)",
        "return FAULT || first_column + int(threadIdx.x)",
        "outside of every buffer", "conv"),
    "k beyond the end": ("conv.cuh", "more = k < k_bytes()",
        "more = FAULT || k < k_bytes()",
        "outside of every buffer|differs", "ragged"),
    "no zeros where nothing is copied": ("conv.cuh", "cp_async16(shared + place, valid ? window",
        "if (!FAULT || valid) cp_async16(shared + place, valid ? window",
        "uninitialised shared|differs", "conv"),
    "an address that nothing is read from": ("conv.cuh", "valid ? weights[i] + k : in.weight",
        "valid || FAULT ? weights[i] + k : in.weight",
        "cp.async from outside of every buffer", "conv"),
    "a swizzle on one side": ("conv.cuh", "lane % 16, lane / 16);",
        "lane % 16, FAULT ? lane / 16 ^ lane / 2 % 4 : lane / 16);",
        "differs", "conv"),
    "no swizzle": ("conv.cuh", "row / 2 % CHUNKS",
        "(FAULT ? 0 : row / 2 % CHUNKS)",
        "bank conflicts", "conv"),
    "scale beyond the last channel": ("conv.cuh", "for (int j = 0; j <= ACROSS && channel + j < p.group_o; j++)",
        "for (int j = 0; j <= ACROSS && (FAULT || channel + j < p.group_o); j++)",
        "outside of every buffer", "odd"),
    "16 bytes to an odd address": ("conv.cuh", "const bool whole = p.pieces &&",
        "const bool whole = FAULT || p.pieces &&",
        "not aligned|outside of every buffer|differs|never written", "odd"),
    "a grid that is rounded down": ("conv.cuh", "rows = (p.m + T::BM - 1) / T::BM",
        "rows = FAULT && p.m > T::BM ? p.m / T::BM : (p.m + T::BM - 1) / T::BM",
        "never written", "conv"),
    "parts that overlap": ("conv.cuh", "end = int(int64_t(steps) * (part + 1) / parts)",
        "end = int(int64_t(steps) * (part + 1) / parts) + (FAULT && parts > 1 && part == 0 ? 1 : 0)",
        "differs", "split"),
    "parts in one place": ("conv.cuh", "static_cast<Output*>(p.out) + size_t(part) * p.m * p.o",
        "static_cast<Output*>(p.out) + size_t(FAULT ? 0 : part) * p.m * p.o",
        "two blocks write", "split"),
    "a lane that leaves its warp": ("conv.cuh", "    for (int half = 0; half < 2; half++) {  // 32 bytes",
        "    for (int half = 0; half < 2; half++) {\n      if (FAULT && threadIdx.x == 37) break;  // 32 bytes",
        "diverges|has left|deadlock", "conv"),
    "channels of the next pixel": ("cells.cuh", "if (++channel == p.channels)",
        "if (++channel == p.channels + (FAULT ? 1 : 0))",
        "outside of every buffer|differs", "pixels"),
    "no zeros at a cell's end": ("cells.cuh", "if (y < (cy + 1) * p.fy - p.ph)",
        "if (FAULT || y < (cy + 1) * p.fy - p.ph)",
        "differs", "pixels"),
    "black instead of the mean": ("cells.cuh", "else if (SIZE == 1 && p.around)",
        "else if (SIZE == 1 && !FAULT && p.around)",
        "differs", "pixels"),
    "sparse channels beyond the last": ("conv_int8_2_4.cu", "(channels < last ? channels : last)",
        "(FAULT || channels < last ? channels : last)",
        "outside of every buffer", "sparse"),
    "sparse weights beyond the buffer": ("conv_int8_2_4.cu", "if (copy < COPIES)",
        "if (FAULT || copy < COPIES)",
        "race in shared|under way|outside of", "sparse"),
    "a block of sparse weights left out": ("conv_int8_2_4.cu", "from[i] += BLOCK;",
        "from[i] += FAULT ? 2 * BLOCK : BLOCK;",
        "outside of every buffer|differs", "sparse"),
    "places of another lane": ("conv_int8_2_4.cu", "FRAGMENTS + lane * 4)",
        "FRAGMENTS + (FAULT ? lane ^ 1 : lane) * 4)",
        "differs", "sparse"),
    "pixels before the weights": ("conv_int8_2_4.cu", "rows + place_of(warp / T::WARPS_N * T::WM + lane % 8, lane / 8)",
        "rows + place_of(warp / T::WARPS_N * T::WM + lane % 8, FAULT ? lane / 8 ^ 1 : lane / 8)",
        "differs", "sparse"),
    "places that are not in order": ("conv_int8_2_4.cu", "pixels, which[i]);",
        "pixels, FAULT ? 0 : which[i]);",
        "not in order", "sparse"),
    "sums that leave the mantissa": ("int8.cuh", "return doubt >> 23;",
        "return FAULT ? false : doubt >> 23;",
        "differs", "extremes"),
    "an addend that is off": ("int8.cuh", "12582912 - 3 * mult",
        "12582912 - (FAULT ? 2 : 3) * mult",
        "differs", "conv"),
    "a residual that is read too far": ("conv.cuh", "if (first_row + row >= p.m || first_column + column >= p.group_o)",
        "if (!FAULT && (first_row + row >= p.m || first_column + column >= p.group_o))",
        "outside of every buffer", "large"),
    "no zeros beside a residual": ("conv.cuh", "*reinterpret_cast<Output*>(shared + place) = 0;",
        "if (!FAULT) *reinterpret_cast<Output*>(shared + place) = 0;",
        "uninitialised shared", "beside"),
    "ties away from even": ("int8.cuh", "((1 << 21) - 1) + (product >> 22 & 1)",
        "((1 << 21) - 1) + (FAULT ? 1 : product >> 22 & 1)",
        "differs", "extremes"),
    "sums of a block not waited for": ("bn_relu.cu", "rows /= 2) {\n    __syncthreads();",
        "rows /= 2) {\n    if (!FAULT) __syncthreads();",
        "race in shared|uninitialised shared", "norm"),
    "sums of slices not waited for": ("bn_relu.cu", "= sum[which];\n  __syncthreads();",
        "= sum[which];\n  if (!FAULT) __syncthreads();",
        "race in shared|uninitialised shared", "norm"),
}



def plant(folder):
    """Copies csrc/cuda with all of FAULTS, each of which EMULATED_FAULT turns on."""
    (folder / "cuda").mkdir()
    texts = {}
    for name in os.listdir(os.path.join(CSRC, "cuda")):
        if name.endswith((".cu", ".cuh")) and name != "dev.cuh":
            with open(os.path.join(CSRC, "cuda", name)) as f:
                texts[name] = f.read()
    for i, (what, (name, text, wrong, *_)) in enumerate(FAULTS.items()):
        assert text in texts[name], f"{name} has no {text!r} any more: plant {what!r} anew"
        texts[name] = texts[name].replace(text, wrong.replace("FAULT", f"(emulated_fault == {i})"))
    for name, text in texts.items():
        (folder / "cuda" / name).write_text(f"extern const int emulated_fault;\n{text}")


GROUPS = dict(
    conv=[dict(n=2, h=9, w=11, c=64, o=72, kernel=(3, 3), padding=(1, 1), residual=True)],
    rows=[dict(n=1, h=5, w=5, c=32, o=16)], ragged=[dict(n=1, h=9, w=9, c=80, o=144)],
    odd=[dict(n=1, h=7, w=7, c=64, o=59, residual=True)],
    pixels=[dict(n=1, h=12, w=9, c=3, o=16, kernel=(7, 7), stride=(2, 2), padding=(3, 3), pad_value=True)],
    large=[dict(n=1, h=7, w=7, c=64, o=59, residual=True, bias=1 << 23, mult=64)],
    beside=[dict(n=1, h=11, w=11, c=16, o=72, residual=True)],
    split=[dict(n=1, h=7, w=7, c=512, o=64, kernel=(3, 3))],
    sparse=[dict(n=1, h=9, w=9, c=80, o=72, kernel=(3, 3), padding=(1, 1), sparse=True)])


def run_group(device, group):
    device.use(order="shuffled", seed=1, multiprocessors=16 if group == "split" else 2)
    if group == "beside":  # a tile that is larger than what one step of k has filled
        os.environ["RESNET50_TILE"] = "2"
    if group == "norm":
        rng = np.random.default_rng(0)
        x, one = rng.standard_normal((100, 16), np.float32), np.ones(16, np.float32)
        mean = x.astype(np.float64).mean(0).astype(np.float32)
        compare(device.bn_relu(x, one, one)[1].round(3), mean.round(3), "mean")
        return
    for case in (case for _, case, _ in extremes()) if group == "extremes" else (
            Case(**shape, seed=i) for i, shape in enumerate(GROUPS[group])):
        compare((device.conv_int8_2_4 if group == "sparse" else device.conv_int8)(case), case.want, case.text)
        if device.lib.device_conflicts():
            raise AssertionError(f"{device.lib.device_conflicts()} bank conflicts")


if __name__ == "__main__":
    run_group(Device(sys.argv[1]), sys.argv[2])
