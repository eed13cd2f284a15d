// csrc/cuda/dev.cuh for a CPU: the same names, run by emulator.cpp. Kernels are compiled by g++ -fsanitize=thread, whose
// calls at every load and store go to the emulator, too; collectives and copies say which line they stand on.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>

struct CUstream_st;

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define R50_DEVICE inline
#define R50_SHARED(name) unsigned char* const name = r50::emulated::shared_memory()

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace r50 {
namespace emulated {

struct Line {
  const char* file;
  int line;
};
enum class Collective { BARRIER, LDMATRIX, MMA_U8S8, MMA_SPARSE_S8U8, MMA_F16, MMA_BF16 };

unsigned char* shared_memory();
void barrier(Line line);
// Lanes of a warp leave their operands; the last one runs the instruction for all.
void collective(Collective what, const void* operands, Line line);
void copy_async(uint32_t to, const void* from, bool valid, Line line);
void commit();
void wait(int pending);
void run(dim3 grid, int block, int shared, const std::function<void()>& kernel);

struct Matrices {
  uint32_t* result;
  uint32_t from;
};
struct Product {
  void* d;
  const uint32_t *a, *b;
  uint32_t kept = 0;
};
uint16_t to_f16(float x);
uint16_t to_bf16(float x);
float from_f16(uint16_t x);

}  // namespace emulated

#define R50_LINE emulated::Line line = {__builtin_FILE(), __builtin_LINE()}

uint32_t shared_address(const void* p);
inline void cp_async16(uint32_t to, const void* from, bool valid, R50_LINE) {
  emulated::copy_async(to, from, valid, line);
}
inline void cp_async_commit() { emulated::commit(); }
template <int Pending>
void cp_async_wait() {
  emulated::wait(Pending);
}
inline void ldmatrix4(uint32_t (&r)[4], uint32_t from, R50_LINE) {
  const emulated::Matrices operands{r, from};
  emulated::collective(emulated::Collective::LDMATRIX, &operands, line);
}
inline void mma_u8s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], R50_LINE) {
  const emulated::Product operands{d, a, b};
  emulated::collective(emulated::Collective::MMA_U8S8, &operands, line);
}
inline void mma_sparse_s8u8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t kept, R50_LINE) {
  const emulated::Product operands{d, a, b, kept};
  emulated::collective(emulated::Collective::MMA_SPARSE_S8U8, &operands, line);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], R50_LINE) {
  const emulated::Product operands{d, a, b};
  emulated::collective(emulated::Collective::MMA_F16, &operands, line);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], R50_LINE) {
  const emulated::Product operands{d, a, b};
  emulated::collective(emulated::Collective::MMA_BF16, &operands, line);
}
inline uint32_t pack_f16(float low, float high) {
  return emulated::to_f16(low) | uint32_t(emulated::to_f16(high)) << 16;
}
inline uint32_t pack_bf16(float low, float high) {
  return emulated::to_bf16(low) | uint32_t(emulated::to_bf16(high)) << 16;
}
inline float unpack_f16(uint16_t half) { return emulated::from_f16(half); }
inline float unpack_bf16(uint16_t half) { return std::bit_cast<float>(uint32_t(half) << 16); }

template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), dim3 grid, int block, int shared, CUstream_st*, Args... args) {
  emulated::run(grid, block, shared, [&] { kernel(args...); });
}

int multiprocessors();
int shared_memory();
inline int current_device() { return 0; }
bool is_recorded(CUstream_st*);  // as long as no time is wanted
float next_time();
template <class F>
float milliseconds(CUstream_st*, F&& f) {
  f();
  return next_time();
}

}  // namespace r50

inline void __syncthreads(r50::emulated::Line line = {__builtin_FILE(), __builtin_LINE()}) {
  r50::emulated::barrier(line);
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
