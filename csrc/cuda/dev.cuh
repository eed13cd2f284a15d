// Everything of CUDA that the kernels use: one wrapper per instruction, and the launch. No kernel includes anything else
// or contains assembly, so that tests/emulate_cuda/cuda/dev.cuh, found first on its include path, runs the same sources
// on a CPU. The rules that this asks of a kernel are in csrc/README.md.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#define R50_DEVICE __device__ __forceinline__
// A kernel's shared memory: `name` is an unsigned char array of the size given at launch, aligned to 128 bytes.
#define R50_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace r50 {

// The address of shared memory as the instructions below take it; adding bytes to it is allowed.
R50_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Copies 16 bytes, both ends aligned to 16, asynchronously; where `valid` is false it writes zeros and reads nothing.
R50_DEVICE void cp_async16(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
R50_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `Pending` of this thread's latest groups are under way.
template <int Pending>
R50_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Four 8 x 16-byte matrices, their rows at the addresses of lanes 0-7, 8-15, 16-23 and 24-31.
R50_DEVICE void ldmatrix4(uint32_t (&r)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

// d += a b: 16 rows of 32 bytes by 8 columns of 32 bytes, in the fragment layout of the PTX manual.
R50_DEVICE void mma_u8s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same with 64 of k, of which rows of `a` keep two of each four: 32 bytes. `kept` has their places in the four, 2
// bits each, the lower one first: lane 4 g + m those of row g + 8 (m % 2), for the half m / 2 of k.
R50_DEVICE void mma_sparse_s8u8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t kept) {
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(kept));
}
R50_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
R50_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Two 16-bit floats in one register, `low` in its low half; to nearest, ties to even.
R50_DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
R50_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
R50_DEVICE float unpack_f16(uint16_t half) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(half));
  return r;
}
R50_DEVICE float unpack_bf16(uint16_t half) { return __uint_as_float(uint32_t(half) << 16); }

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// kernel<<<grid, block, shared bytes, stream>>>(args...); throws what CUDA says.
template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), dim3 grid, int block, int shared, cudaStream_t stream, Args... args) {
  if (shared > 48 * 1024) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  kernel<<<grid, block, shared, stream>>>(args...);
  check(cudaGetLastError());
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device));
  return device;
}
inline int attribute(cudaDeviceAttr which) {  // of the current device
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, current_device()));
  return value;
}
inline int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }  // streaming ones
inline int shared_memory() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }  // bytes, of one block

// Whether what is launched is recorded for a graph instead of run, as by cudaStreamBeginCapture.
inline bool is_recorded(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  check(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

// How long f() takes, which launches on the stream: the least of a few times.
template <class F>
float milliseconds(cudaStream_t stream, F&& f) {
  struct Relaxed {  // another thread may record a graph, which waiting for an event would otherwise end
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    Relaxed() { check(cudaThreadExchangeStreamCaptureMode(&mode)); }
    ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode); }
  } relaxed;
  struct Event {
    cudaEvent_t event;
    Event() { check(cudaEventCreate(&event)); }
    ~Event() { cudaEventDestroy(event); }
  } begin, end;
  float least = 1e30f;
  for (int i = 0; i < 5; i++) {
    f();  // the device is at work while the others are launched
    check(cudaEventRecord(begin.event, stream));
    for (int j = 0; j < 3; j++) f();
    check(cudaEventRecord(end.event, stream));
    check(cudaEventSynchronize(end.event));
    float time = 0;
    check(cudaEventElapsedTime(&time, begin.event, end.event));
    least = time < least ? time : least;
  }
  return least / 3;
}

}  // namespace r50
