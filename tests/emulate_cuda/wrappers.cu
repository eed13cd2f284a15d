// One kernel for each wrapper of cuda/dev.cuh, for one warp: every lane reads words of its own from `in`, calls the
// wrapper, and writes words of its own to `out`. The emulator runs them, and ptx.py what nvcc makes of them.
#include <cuda/dev.cuh>  // not the one beside this file, where nvcc compiles it

using namespace r50;

#define KERNEL(name) extern "C" __global__ void name(const uint32_t* in, uint32_t* out)

template <int READS>
struct Words {
  uint32_t word[READS];
  R50_DEVICE Words(const uint32_t* in) {
    for (int i = 0; i < READS; i++) word[i] = in[threadIdx.x * READS + i];
  }
};

#define PRODUCT(name, type, to_bits, from_bits)                                          \
  KERNEL(kernel_##name) {                                                                \
    Words<10> x(in);                                                                     \
    const uint32_t a[4] = {x.word[0], x.word[1], x.word[2], x.word[3]};                  \
    const uint32_t b[2] = {x.word[4], x.word[5]};                                        \
    type d[4];                                                                           \
    for (int i = 0; i < 4; i++) d[i] = from_bits(x.word[6 + i]);                         \
    name(d, a, b);                                                                       \
    for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = to_bits(d[i]);                \
  }
PRODUCT(mma_u8s8, int32_t, uint32_t, int32_t)
PRODUCT(mma_f16, float, __float_as_uint, __uint_as_float)
PRODUCT(mma_bf16, float, __float_as_uint, __uint_as_float)

KERNEL(kernel_mma_sparse_s8u8) {
  Words<13> x(in);
  const uint32_t a[4] = {x.word[0], x.word[1], x.word[2], x.word[3]};
  const uint32_t b[4] = {x.word[4], x.word[5], x.word[6], x.word[7]};
  int32_t d[4];
  for (int i = 0; i < 4; i++) d[i] = int32_t(x.word[9 + i]);
  mma_sparse_s8u8(d, a, b, x.word[8]);
  for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = uint32_t(d[i]);
}

// lane i's 16 bytes of shared memory, and whose address it gives
KERNEL(kernel_ldmatrix4) {
  R50_SHARED(shared);
  Words<5> x(in);
  uint32_t* const mine = reinterpret_cast<uint32_t*>(shared) + threadIdx.x * 4;
  for (int i = 0; i < 4; i++) mine[i] = x.word[i];
  __syncthreads();
  uint32_t r[4];
  ldmatrix4(r, shared_address(shared) + x.word[4] * 16);
  for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = r[i];
}

// 16 bytes into the next lane's place, or zeros; a second, later group that must not have come before it
KERNEL(kernel_cp_async16) {
  R50_SHARED(shared);
  const bool valid = in[threadIdx.x * 4] & 1;
  cp_async16(shared_address(shared) + (threadIdx.x + 1) % 32 * 16, in + threadIdx.x * 4, valid);
  cp_async_commit();
  cp_async16(shared_address(shared) + 512 + threadIdx.x * 16, in + (31 - threadIdx.x) * 4, true);
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();
  const uint32_t* const words = reinterpret_cast<uint32_t*>(shared) + threadIdx.x * 4;
  for (int i = 0; i < 4; i++) out[threadIdx.x * 8 + i] = words[i];
  cp_async_wait<0>();
  for (int i = 0; i < 4; i++) out[threadIdx.x * 8 + 4 + i] = words[128 + i];
}

#define PACK(name)                                                                           \
  KERNEL(kernel_##name) {                                                                    \
    Words<2> x(in);                                                                          \
    out[threadIdx.x] = name(__uint_as_float(x.word[0]), __uint_as_float(x.word[1]));         \
  }
PACK(pack_f16)
PACK(pack_bf16)
#define UNPACK(name)                                                                         \
  KERNEL(kernel_##name) {                                                                    \
    Words<1> x(in);                                                                          \
    out[threadIdx.x] = __float_as_uint(name(uint16_t(x.word[0])));                           \
  }
UNPACK(unpack_f16)
UNPACK(unpack_bf16)

// kernels in the order of device.py's WRAPPERS
void run_wrapper(int which, const uint32_t* in, uint32_t* out) {
  void (*const kernels[])(const uint32_t*, uint32_t*) = {
      kernel_mma_u8s8,   kernel_mma_sparse_s8u8, kernel_mma_f16,  kernel_mma_bf16,   kernel_ldmatrix4,
      kernel_cp_async16, kernel_pack_f16,        kernel_pack_bf16, kernel_unpack_f16, kernel_unpack_bf16};
  launch(kernels[which], dim3(1), 32, 1024, nullptr, in, out);
}
