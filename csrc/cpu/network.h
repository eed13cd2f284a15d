// A whole network as one call: int8; on AMX and AVX-512 BF16 bfloat16; on AVX2 and AVX-512 float32. The plan is one
// block of bytes: a header, a table of buffers, a table of steps, and the constants that they point to; csrc/plan.py
// writes it. Sizes of feature maps are not in it: they follow from the pixels.
#pragma once
#include "kernels.h"

namespace r50 {

struct PlanHeader {
  static constexpr int64_t STAMP = 0x35305206;
  int64_t stamp, isa, bytes, id, buffers, steps, classes, channels, type;  // conv.h: Type
};
struct PlanBuffer {
  int64_t pixel, border, planes, fill;  // bytes of a pixel; fill: offset of the border's pixel, or -1 for zeros
};
enum class Step : int64_t { load = 0, conv = 1, max_pool = 2, average_pool = 3, linear = 4, load_windows = 5 };
struct PlanStep {
  int64_t kind, in, out, residual, in2;  // buffers, -1 for none
  int64_t kh, kw, stride, pad, stride2, residual_stride;  // these of in2 and residual: 0 or 1 for none
  int64_t packed;  // offset of a blob of pack_int8 or pack_float
  int64_t scale;   // offset of: int8, linear, the logits' scales; floats, load, a uint8 per channel to subtract
  int64_t mult;    // int8: average pooling's j
  int64_t block[2];  // conv: Conv.block (conv.h) where one image goes through at a time, and where several do
};

// pixels (n, h, w, channels) uint8 -> logits (n, classes) float. nanoseconds, if given, gets the time of each step,
// summed.
void network(const uint8_t* plan, int64_t plan_bytes, const uint8_t* pixels, int n, int h, int w, float* logits,
             int threads, int64_t* nanoseconds = nullptr);

}  // namespace r50
