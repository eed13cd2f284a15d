// Maxima and means of uint8 (N, H, W, C), up to 16 channels per thread.
#include "cuda/dev.cuh"
#include "cuda/kernels.h"

namespace r50::gpu {
namespace {

constexpr int THREADS = 256;

template <int BYTES>
struct Vector;
template <>
struct Vector<16> {
  using Type = uint4;
};
template <>
struct Vector<1> {
  using Type = uint8_t;
};

template <int BYTES>
union Bytes {
  typename Vector<BYTES>::Type vector;
  uint8_t byte[BYTES];
};

template <int BYTES>
__global__ void __launch_bounds__(THREADS) max_pool(const __grid_constant__ Pool p) {
  const int vectors = p.c / BYTES;
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= int64_t(p.n) * p.oh * p.ow * vectors) return;
  const int channel = int(i % vectors) * BYTES, pixel = int(i / vectors);
  const int x0 = pixel % p.ow * p.stride - p.padding, y0 = pixel / p.ow % p.oh * p.stride - p.padding;
  const uint8_t* const image = p.x + size_t(pixel / p.ow / p.oh) * p.h * p.w * p.c + channel;
  Bytes<BYTES> most;
#pragma unroll
  for (int j = 0; j < BYTES; j++) most.byte[j] = 0;
  for (int y = y0 < 0 ? 0 : y0; y < y0 + p.kernel && y < p.h; y++)
    for (int x = x0 < 0 ? 0 : x0; x < x0 + p.kernel && x < p.w; x++) {
      Bytes<BYTES> here;
      here.vector = *reinterpret_cast<const typename Vector<BYTES>::Type*>(image + (size_t(y) * p.w + x) * p.c);
#pragma unroll
      for (int j = 0; j < BYTES; j++) most.byte[j] = most.byte[j] > here.byte[j] ? most.byte[j] : here.byte[j];
    }
  *reinterpret_cast<typename Vector<BYTES>::Type*>(p.out + size_t(pixel) * p.c + channel) = most.vector;
}

__global__ void __launch_bounds__(THREADS)
    avg_pool(const uint8_t* x, uint8_t* out, int64_t count, int pixels, int c, const int32_t* mult) {
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= count) return;
  const uint8_t* const image = x + size_t(i / c) * pixels * c + i % c;
  int64_t sum = 0;
  for (int pixel = 0; pixel < pixels; pixel++) sum += image[size_t(pixel) * c];
  const int64_t product = sum * ((*mult + pixels / 2) / pixels);
  const int64_t y = (product + ((1 << 21) - 1) + (product >> 22 & 1)) >> 22;
  out[i] = uint8_t(y > 255 ? 255 : y);
}

dim3 blocks(int64_t threads) { return dim3(unsigned((threads + THREADS - 1) / THREADS)); }

}  // namespace

void max_pool_int8(const Pool& p, Stream stream) {
  const int64_t count = int64_t(p.n) * p.oh * p.ow * p.c;
  if (p.c % 16 || !aligned(p.x) || !aligned(p.out))
    launch(max_pool<1>, blocks(count), THREADS, 0, stream, p);
  else
    launch(max_pool<16>, blocks(count / 16), THREADS, 0, stream, p);
}

void avg_pool_int8(const uint8_t* x, uint8_t* out, int n, int pixels, int c, const int32_t* mult, Stream stream) {
  const int64_t count = int64_t(n) * c;
  launch(avg_pool, blocks(count), THREADS, 0, stream, x, out, count, pixels, c, mult);
}

}  // namespace r50::gpu
