// The host's view of the CUDA kernels. Pointers are the device's, activations NHWC, errors std::runtime_error.
#pragma once
#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace r50::gpu {

using Stream = CUstream_st*;  // cudaStream_t, without CUDA's headers

// One input of a convolution with its weights (O, kh, kw, group_channels); all zeros where there is none.
struct Input {
  const void *x, *weight;
  int h, w, c, group_channels, kh, kw, sh, sw, ph, pw;
};

// acc = the sum over both inputs, (M, O) with M = N * oh * ow; the epilogue depends on the kernel.
struct Conv {
  Input in[2];
  int m, o, oh, ow, groups, group_o;  // group_o = o / groups: a GPU has no instruction that divides
  const uint8_t* pad_value;  // (C) of the first input, lies around it; null: 0
  const void* residual;      // as `out`, or null
  void* out;
  const int32_t *mult, *bias, *gain;  // (O): int8, see csrc/README.md
  const float *scale, *shift;         // (O): y = acc * scale + shift
  bool relu;
  bool pieces;  // set by the launch: rows of `residual` and `out` are multiples of 16 bytes at multiples of 16
};

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }  // for accesses of 16 bytes

enum class Float { FLOAT32, FLOAT16, BFLOAT16 };

// Bytes of scratch that the same convolution asks for, 0 where it needs none.
size_t conv_int8_scratch(const Conv& p);
size_t conv_int8_2_4_scratch(const Conv& p);
size_t conv_half_scratch(const Conv& p);
size_t gemm_int8_scratch(const Conv& p);
// uint8 by int8 -> uint8; fp16 or bf16 by the same -> the same
void conv_int8(const Conv& p, void* scratch, Stream stream);
// the same where Input.weight is what pack_2_4 (csrc/reference.py) makes of it: fewer than 2^31 bytes, in blocks of
constexpr int BLOCK_2_4 = 640;
void conv_int8_2_4(const Conv& p, void* scratch, Stream stream);
void conv_half(const Conv& p, Float type, void* scratch, Stream stream);
// -> int32 acc + bias (bias may be null), or, with scale, float32
void gemm_int8(const Conv& p, void* scratch, Stream stream);

// uint8 (N, H, W, C) -> (N, oh, ow, C), maxima of windows
struct Pool {
  const uint8_t* x;
  uint8_t* out;
  int n, h, w, c, kernel, stride, padding, oh, ow;
};
void max_pool_int8(const Pool& p, Stream stream);
// uint8 (N, H, W, C) -> (N, C): clamp(RNE(j * sum / 2^22)), j = floor(mult / pixels + 1/2), mult one number
void avg_pool_int8(const uint8_t* x, uint8_t* out, int n, int pixels, int c, const int32_t* mult,
                   Stream stream);

// Batch-norm over the rows of (M, C), + residual, + ReLU. x, y, residual and gradients are of `type`, the rest float32.
struct BatchNorm {
  Float type;
  int64_t m;
  int c;
  bool relu;
  float eps;
  const void *x, *residual;  // residual may be null
  const float *weight, *bias;
  float *mean, *invstd;  // (C): written by forward, read by backward
  void* y;               // likewise
  const void* grad;
  void *dx, *dresidual;  // dresidual may be null
  float *dweight, *dbias;
};
size_t bn_relu_scratch(const BatchNorm& p);
void bn_relu(const BatchNorm& p, void* scratch, Stream stream);
void bn_relu_backward(const BatchNorm& p, void* scratch, Stream stream);

}  // namespace r50::gpu
