#pragma once
#include <cstdint>
#include <vector>

namespace r50 {

enum class Kernel { bilinear, bicubic };

// One axis: `size` pixels from `start`, which need not be whole numbers, within [low, high), become `full`; `count` of
// them from `from` on are wanted, in reverse if `flip`.
struct Axis {
  double start, size;
  int64_t low, high, full, from, count;
  bool flip;
};

// For each output pixel: the first pixel it reads and `taps` (even) weights / 2^shift, of which the last may be 0.
struct Filter {
  int taps, shift;
  int64_t low, high;  // pixels that are read, all of them inside the axis' unless it has but one
  std::vector<int32_t> first;
  std::vector<int16_t> weights;

  Filter(const Axis& axis, Kernel kernel);
};

// rows: the first byte of uint8 (h, w, 3) pixels, `stride` bytes from row to row, of which those at and behind `end`
// may not be read. out: uint8 (y.count, x.count, 3)
void crop_resize(const uint8_t* rows, int64_t stride, const uint8_t* end, const Axis& y, const Axis& x, Kernel kernel,
                 uint8_t* out);

}  // namespace r50
