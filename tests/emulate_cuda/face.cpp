// csrc/cuda/kernels.h as plain C functions for device.py. They return 0, or 1 with the sentence that face_error() has.
#include <cstdlib>
#include <exception>
#include <string>

#include "cuda/kernels.h"

// Which of the mistakes that device.py plants is made; none without EMULATED_FAULT.
extern const int emulated_fault = getenv("EMULATED_FAULT") ? atoi(getenv("EMULATED_FAULT")) : -1;

namespace {

std::string message;

template <class F>
int guarded(F&& f) {
  try {
    f();
    return 0;
  } catch (const std::exception& e) {
    message = e.what();
    return 1;
  }
}

}  // namespace

void run_wrapper(int which, const uint32_t* in, uint32_t* out);  // wrappers.cu

using namespace r50::gpu;

extern "C" {

const char* face_error() { return message.c_str(); }
int64_t face_conv_int8_scratch(const Conv* p) { return int64_t(conv_int8_scratch(*p)); }
int64_t face_conv_int8_2_4_scratch(const Conv* p) { return int64_t(conv_int8_2_4_scratch(*p)); }
int64_t face_conv_half_scratch(const Conv* p) { return int64_t(conv_half_scratch(*p)); }
int64_t face_gemm_int8_scratch(const Conv* p) { return int64_t(gemm_int8_scratch(*p)); }
int64_t face_bn_relu_scratch(const BatchNorm* p) { return int64_t(bn_relu_scratch(*p)); }
int face_conv_int8(const Conv* p, void* scratch) {
  return guarded([&] { conv_int8(*p, scratch, nullptr); });
}
int face_conv_int8_2_4(const Conv* p, void* scratch) {
  return guarded([&] { conv_int8_2_4(*p, scratch, nullptr); });
}
int face_conv_half(const Conv* p, int type, void* scratch) {
  return guarded([&] { conv_half(*p, Float(type), scratch, nullptr); });
}
int face_gemm_int8(const Conv* p, void* scratch) {
  return guarded([&] { gemm_int8(*p, scratch, nullptr); });
}
int face_max_pool_int8(const Pool* p) {
  return guarded([&] { max_pool_int8(*p, nullptr); });
}
int face_avg_pool_int8(const uint8_t* x, uint8_t* out, int n, int pixels, int c, const int32_t* mult) {
  return guarded([&] { avg_pool_int8(x, out, n, pixels, c, mult, nullptr); });
}
int face_wrapper(int which, const uint32_t* in, uint32_t* out) {
  return guarded([&] { run_wrapper(which, in, out); });
}
int face_bn_relu(const BatchNorm* p, void* scratch) {
  return guarded([&] { bn_relu(*p, scratch, nullptr); });
}
int face_bn_relu_backward(const BatchNorm* p, void* scratch) {
  return guarded([&] { bn_relu_backward(*p, scratch, nullptr); });
}
}
