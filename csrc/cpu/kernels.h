// What the CPU kernels offer to the bindings. Plain pointers, no torch headers. Layout is NHWC everywhere; sizes in
// elements unless a name says bytes. Errors are std::runtime_error with the whole sentence.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

namespace r50 {

// ------------------------------------------------------------------------------------------- instruction sets
enum class Isa { plain, avx2, vnni, amx };  // each includes the ones before it
Isa isa();               // the best this CPU and kernel allow, or what RESNET50_ISA names; decided once per process
const char* isa_name();  // "plain", "avx2", "vnni", "amx"
bool has_avx512();       // F, BW, VL, DQ, where isa() is vnni or more: a CPU without VNNI takes AVX2 for floats too
bool has_avx512_vbmi();  // and VNNI
bool has_avx512_bf16();
double peak_macs(const char* kind,
                 int milliseconds);  // multiply-adds per second from registers; kind: "int8", "fp32", "bf16"

// ------------------------------------------------------------------------------------------------------ int8
struct ConvInt8 {
  int64_t n, h, w, c, o, kh, kw, stride_h, stride_w, pad_h, pad_w, groups;
  const uint8_t* x;         // (n, h, w, c)
  const int8_t* weight;     // (o, kh, kw, c / groups)
  const int32_t *mult, *bias;  // (o)
  const int32_t* gain;      // (o) with residual, else null
  const uint8_t* residual;  // like the output
  int64_t h2, w2, c2, stride2_h, stride2_w;
  const uint8_t* x2;         // (n, h2, w2, c2) or null
  const int8_t* weight2;     // (o, c2)
  const uint8_t* pad_value;  // (c) or null for 0
};
void conv_int8(const ConvInt8&, uint8_t* out, int threads);
// a (m, k) x b (n, k): with mult uint8, else with scale float, else int32. bias may be null.
void gemm_int8(const uint8_t* a, const int8_t* b, const int32_t* bias, const int32_t* mult, const float* scale,
               int64_t m, int64_t n, int64_t k, void* out, int threads);
struct GateInt8 {
  int64_t n, pixels, c, inner;
  const uint8_t* x;         // (n, pixels, c), without residual (n, pixels, 2 c)
  const uint8_t* residual;  // (n, pixels, c) or null
  const float *weight1, *bias1, *weight2, *bias2;  // (inner, c), (inner), (c, inner) or (2 c, inner), (c) or (2 c)
  const double* scales;                            // of both maps and of the result; both at most 16 of its
  const int32_t* zeros;                            // of both maps, 0 to 255
};
void gate_int8(const GateInt8&, uint8_t* out, int threads);  // out: (n, pixels, c)
// The blob for a step of a network plan: (o, kh, kw, c) weights, and (o, c2) for a second operand (weight2 may be
// null). winograd: for a 3x3 convolution with stride 1 also what winograd.h reads, 8 times as much as the weights.
void pack_int8(int64_t o, int64_t kh, int64_t kw, int64_t c, const int8_t* weight, int64_t c2, const int8_t* weight2,
               const int32_t* mult, const int32_t* bias, const int32_t* gain, bool winograd,
               const std::function<uint8_t*(int64_t)>& allocate);
// The same in bfloat16, where has_avx512_bf16(), or in float32, from Isa::avx2 on; bias float32. winograd: in float32
// only what winograd.h reads, 16 / 9 of the bytes.
void pack_float(bool is_bf16, int64_t o, int64_t kh, int64_t kw, int64_t c, const void* weight, int64_t c2,
                const void* weight2, const float* bias, bool winograd,
                const std::function<uint8_t*(int64_t)>& allocate);

// ----------------------------------------------------------------------------------------------------- float
struct ConvFloat {
  int64_t n, h, w, c, o, kh, kw, stride_h, stride_w, pad_h, pad_w, groups;
  bool is_bf16, relu;         // x, weight, residual and the output are bf16, else f32
  const void* x;              // (n, h, w, c)
  const void* weight;         // (o, kh, kw, c / groups)
  const float *scale, *bias;  // (o)
  const void* residual;       // like the output, or null
};
void conv_bn_relu(const ConvFloat&, void* out, int threads);

// --------------------------------------------------------------------------------------------------- training
// x, residual (may be null), y: (rows, c), f32 or bf16 (is_bf16); weight, bias, mean, invstd: c floats. rows = N * H *
// W.
void bn_relu(const void* x, const void* residual, const float* weight, const float* bias, float eps, bool relu,
             bool is_bf16, int64_t rows, int64_t c, void* y, float* mean, float* invstd, int threads);
// grad, y, x -> dx, dresidual (may be null), dweight, dbias
void bn_relu_backward(const void* grad, const void* y, const void* x, const float* weight, const float* mean,
                      const float* invstd, bool relu, bool is_bf16, int64_t rows, int64_t c, void* dx, void* dresidual,
                      float* dweight, float* dbias, int threads);

}  // namespace r50
