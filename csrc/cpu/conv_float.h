// A float convolution as the kernels see it: conv.h's matrix product with addressed rows, on blocks of output pixels.
//
// All is counted in units of 4 bytes: a float32, or a pair of bfloat16 that one instruction multiplies. A panel holds
// `width` output channels, for each unit of K the `width` weights side by side.
#pragma once
#include "conv.h"

namespace r50 {

struct Run {  // contiguous units of every row: a tap, or a part of one
  int32_t offset, units;  // offset in bytes
};
struct Chunk {  // runs [first, last), which meet the weights from unit `at` on
  int first, last, at;
};

struct FloatConv {
  const uint8_t* a = nullptr;
  const int32_t* rows = nullptr;  // byte offset per row; AMX: groups of 16 at the distance lda
  int lda = 0, m = 0;
  const Run* runs = nullptr;
  const Chunk* chunks = nullptr;
  int nchunks = 0, units = 0;      // units of K, zeros up to a whole step included
  const float* weights = nullptr;  // panel 0
  const float *scale = nullptr, *bias = nullptr;  // zeros up to whole panels
  int o = 0;
  bool relu = false;
  uint8_t* out = nullptr;
  const uint8_t* residual = nullptr;  // at the same offsets as the output
  const int32_t* outs = nullptr;      // byte offset per row, or -1 for a row that is computed and dropped
  float* acc = nullptr;               // m rows of a panel
  const uint8_t* next = nullptr;      // what will be read after this panel, for prefetching; null: the next panel
};

struct FloatKernel {
  int width;    // output channels of a panel
  int step;     // bytes of K that it takes at a time
  int element;  // bytes of an activation and of a weight as it reads them: 4 also where bfloat16 has to be widened
  int align;    // Tables::build's
  int chunk;    // bytes of a panel that stay in L1
  void (*run)(const FloatConv&, int p0, int p1);
  void (*widen)(const uint16_t* from, float* to, int64_t n);
};
const FloatKernel& float_kernel(bool is_bf16);

}  // namespace r50
