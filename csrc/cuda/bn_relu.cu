// Batch-norm + residual + ReLU for training, forward and backward, over the rows of an NHWC (M, C) matrix.
//
// Both directions are two passes over memory. The first sums two values per channel: threads of a block share a slab of
// channels and split its rows, add up in shared memory, and leave one row of partial sums per block. A small kernel
// adds these in a fixed order, so that a result never depends on the order of blocks. The second pass applies them.
#include <type_traits>

#include "cuda/dev.cuh"
#include "cuda/kernels.h"

namespace r50::gpu {
namespace {

constexpr int THREADS = 256, MAX_SLICES = 256;  // slices of rows, each a block's
constexpr int AHEAD = 4;  // rows that a thread of sum_forward reads at once: one would not keep the memory at work

template <Float TYPE>
struct Type {
  using Element = uint16_t;
  static R50_DEVICE float load(uint16_t v) { return TYPE == Float::FLOAT16 ? unpack_f16(v) : unpack_bf16(v); }
  static R50_DEVICE uint16_t store(float v) {
    return uint16_t(TYPE == Float::FLOAT16 ? pack_f16(v, 0) : pack_bf16(v, 0));
  }
};
template <>
struct Type<Float::FLOAT32> {
  using Element = float;
  static R50_DEVICE float load(float v) { return v; }
  static R50_DEVICE float store(float v) { return v; }
};

// V neighbouring channels of one row, in one access.
template <class T, int V>
struct Values {
  using Element = typename T::Element;
  float value[V];

  R50_DEVICE void load(const void* from, size_t at) {
    const Element* const p = static_cast<const Element*>(from) + at;
    if constexpr (V == 1) {
      value[0] = T::load(*p);
    } else {
      union {
        uint4 vector;
        Element element[V];
      } bytes;
      bytes.vector = *reinterpret_cast<const uint4*>(p);
#pragma unroll
      for (int j = 0; j < V; j++) value[j] = T::load(bytes.element[j]);
    }
  }
  R50_DEVICE void store(void* to, size_t at) const {
    Element* const p = static_cast<Element*>(to) + at;
    if constexpr (V == 1) {
      *p = T::store(value[0]);
    } else {
      union {
        uint4 vector;
        Element element[V];
      } bytes;
#pragma unroll
      for (int j = 0; j < V; j++) bytes.element[j] = T::store(value[j]);
      *reinterpret_cast<uint4*>(p) = bytes.vector;
    }
  }
};

// A value per channel, of V neighbours.
template <int V>
R50_DEVICE void load(const float* from, int channel, float (&to)[V]) {
  constexpr int STEP = V == 1 ? 1 : 4;
#pragma unroll
  for (int j = 0; j < V; j += STEP) {
    Values<Type<Float::FLOAT32>, STEP> part;
    part.load(from, channel + j);
#pragma unroll
    for (int i = 0; i < STEP; i++) to[j + i] = part.value[i];
  }
}

// Threads of a block: `lanes` of them side by side, V channels each, and THREADS / lanes rows.
constexpr int lanes_of(int c, int v) {
  int lanes = 1;
  while (lanes < 32 && lanes * v < c) lanes *= 2;
  return lanes;
}

// first, second: this thread's sums -> sums[slice][0 and 1][c], over the rows of the block
template <int V>
R50_DEVICE void add_up(const float (&first)[V], const float (&second)[V], int channel, int c, int lanes, float* sums) {
  R50_SHARED(shared);
  float* const all = reinterpret_cast<float*>(shared);  // [2 V][THREADS]
  __syncthreads();
#pragma unroll
  for (int j = 0; j < V; j++) {
    all[j * THREADS + threadIdx.x] = first[j];
    all[(V + j) * THREADS + threadIdx.x] = second[j];
  }
  for (int rows = THREADS / lanes / 2; rows > 0; rows /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < rows * lanes)
#pragma unroll
      for (int j = 0; j < 2 * V; j++)
        all[j * THREADS + threadIdx.x] += all[j * THREADS + threadIdx.x + rows * lanes];
  }
  __syncthreads();
  if (int(threadIdx.x) < lanes && channel < c)
#pragma unroll
    for (int j = 0; j < V; j++) {
      sums[size_t(2 * blockIdx.y) * c + channel + j] = all[j * THREADS + threadIdx.x];
      sums[size_t(2 * blockIdx.y + 1) * c + channel + j] = all[(V + j) * THREADS + threadIdx.x];
    }
}

// Sums of x - x[0] and of its square: differences from one of the values lose no digits to a large mean.
// At two blocks per multiprocessor nvcc takes the registers that all AHEAD reads need.
template <class T, int V>
__global__ void __launch_bounds__(THREADS, 2) sum_forward(const __grid_constant__ BatchNorm p, float* sums) {
  const int lanes = lanes_of(p.c, V), channel = (blockIdx.x * lanes + threadIdx.x % lanes) * V;
  float first[V] = {}, second[V] = {};
  if (channel < p.c) {
    Values<T, V> shift, x[AHEAD];
    shift.load(p.x, channel);
    const int rows = THREADS / lanes;
    const int64_t step = int64_t(gridDim.y) * rows;
    for (int64_t row = int64_t(blockIdx.y) * rows + threadIdx.x / lanes; row < p.m; row += AHEAD * step) {
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {  // behind the last row the first again, which adds zeros
        const int64_t at = row + i * step;
        x[i].load(p.x, size_t(at < p.m ? at : 0) * p.c + channel);
      }
#pragma unroll
      for (int i = 0; i < AHEAD; i++)
#pragma unroll
        for (int j = 0; j < V; j++) {
          const float difference = x[i].value[j] - shift.value[j];
          first[j] += difference;
          second[j] = __fmaf_rn(difference, difference, second[j]);
        }
    }
  }
  add_up(first, second, channel, p.c, lanes, sums);
}

// What of the gradient passes the ReLU: all but where y <= 0, so that NaN does, as in PyTorch.
R50_DEVICE float passed(float grad, float y) { return y <= 0 ? 0.0f : grad; }

// Sums of the gradient and of its product with the normalised x.
template <class T, int V>
__global__ void __launch_bounds__(THREADS) sum_backward(const __grid_constant__ BatchNorm p, float* sums) {
  const int lanes = lanes_of(p.c, V), channel = (blockIdx.x * lanes + threadIdx.x % lanes) * V;
  float first[V] = {}, second[V] = {};
  if (channel < p.c) {
    Values<T, V> x, y, grad;
    float mean[V], invstd[V];
    load(p.mean, channel, mean);
    load(p.invstd, channel, invstd);
    const int rows = THREADS / lanes;
    for (int64_t row = int64_t(blockIdx.y) * rows + threadIdx.x / lanes; row < p.m; row += int64_t(gridDim.y) * rows) {
      const size_t at = size_t(row) * p.c + channel;
      x.load(p.x, at);
      grad.load(p.grad, at);
      if (p.relu) y.load(p.y, at);
#pragma unroll
      for (int j = 0; j < V; j++) {
        const float g = p.relu ? passed(grad.value[j], y.value[j]) : grad.value[j];
        first[j] += g;
        second[j] = __fmaf_rn(g, (x.value[j] - mean[j]) * invstd[j], second[j]);
      }
    }
  }
  add_up(first, second, channel, p.c, lanes, sums);
}

// Both sums of a channel over all slices: a block's warps share these for a channel per lane, and the first adds up.
R50_DEVICE void add_slices(const float* sums, int slices, int c, int channel, double (&sum)[2]) {
  R50_SHARED(shared);
  double* const all = reinterpret_cast<double*>(shared);  // [2][THREADS]
  if (channel < c)
    for (int slice = threadIdx.x / 32; slice < slices; slice += THREADS / 32)
      for (int which = 0; which < 2; which++) sum[which] += sums[size_t(2 * slice + which) * c + channel];
  for (int which = 0; which < 2; which++) all[which * THREADS + threadIdx.x] = sum[which];
  __syncthreads();
  if (threadIdx.x < 32)
    for (int at = threadIdx.x + 32; at < THREADS; at += 32)
      for (int which = 0; which < 2; which++) sum[which] += all[which * THREADS + at];
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    finish_forward(const __grid_constant__ BatchNorm p, const float* sums, int slices) {
  const int channel = blockIdx.x * 32 + threadIdx.x % 32;
  double sum[2] = {};
  add_slices(sums, slices, p.c, channel, sum);
  if (threadIdx.x >= 32 || channel >= p.c) return;
  const double count = double(p.m), mean = sum[0] / count, variance = sum[1] / count - mean * mean;
  p.mean[channel] = float(T::load(static_cast<const typename T::Element*>(p.x)[channel]) + mean);
  p.invstd[channel] = float(1 / sqrt((variance > 0 || variance != variance ? variance : 0) + double(p.eps)));
}

__global__ void __launch_bounds__(THREADS)
    finish_backward(const __grid_constant__ BatchNorm p, const float* sums, int slices) {
  const int channel = blockIdx.x * 32 + threadIdx.x % 32;
  double sum[2] = {};
  add_slices(sums, slices, p.c, channel, sum);
  if (threadIdx.x >= 32 || channel >= p.c) return;
  p.dbias[channel] = float(sum[0]);
  p.dweight[channel] = float(sum[1]);
}

template <class T, int V>
__global__ void __launch_bounds__(THREADS) apply_forward(const __grid_constant__ BatchNorm p) {
  const int64_t i = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * V;
  if (i >= p.m * p.c) return;
  const int channel = int(i % p.c);
  Values<T, V> x, residual;
  x.load(p.x, i);
  if (p.residual) residual.load(p.residual, i);
  float mean[V], invstd[V], weight[V], bias[V];
  load(p.mean, channel, mean);
  load(p.invstd, channel, invstd);
  load(p.weight, channel, weight);
  load(p.bias, channel, bias);
#pragma unroll
  for (int j = 0; j < V; j++) {
    float y = __fmaf_rn(x.value[j] - mean[j], invstd[j] * weight[j], bias[j]);
    if (p.residual) y += residual.value[j];
    x.value[j] = p.relu && y < 0 ? 0.0f : y;
  }
  x.store(p.y, i);
}

template <class T, int V>
__global__ void __launch_bounds__(THREADS) apply_backward(const __grid_constant__ BatchNorm p) {
  const int64_t i = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * V;
  if (i >= p.m * p.c) return;
  const int channel = int(i % p.c);
  Values<T, V> x, y, grad;
  x.load(p.x, i);
  grad.load(p.grad, i);
  if (p.relu) y.load(p.y, i);
  const float share = 1.0f / float(p.m);
  float mean[V], invstd[V], weight[V], dweight[V], dbias[V];
  load(p.mean, channel, mean);
  load(p.invstd, channel, invstd);
  load(p.weight, channel, weight);
  load(p.dweight, channel, dweight);
  load(p.dbias, channel, dbias);
#pragma unroll
  for (int j = 0; j < V; j++) {
    const float g = p.relu ? passed(grad.value[j], y.value[j]) : grad.value[j];
    const float normal = (x.value[j] - mean[j]) * invstd[j];
    const float common = (dbias[j] + normal * dweight[j]) * share;
    x.value[j] = (g - common) * (invstd[j] * weight[j]);
    grad.value[j] = g;
  }
  x.store(p.dx, i);
  if (p.dresidual) grad.store(p.dresidual, i);
}

// The grid of a summing kernel: slabs of channels by slices of rows, enough to keep every multiprocessor at work.
dim3 slabs(const BatchNorm& p, int v) {
  const int lanes = lanes_of(p.c, v);
  const int64_t columns = (p.c + lanes * v - 1) / (lanes * v), rows = THREADS / lanes;
  int64_t slices = (p.m + rows * 4 - 1) / (rows * 4);  // four rows per thread at least
  const int64_t enough = (8 * multiprocessors() + columns - 1) / columns;
  slices = slices > enough ? enough : slices;
  return dim3(unsigned(columns), unsigned(slices > MAX_SLICES ? MAX_SLICES : slices));
}

dim3 threads(int64_t count) { return dim3(unsigned((count + THREADS - 1) / THREADS)); }

template <class T, int V>
void forward(const BatchNorm& p, float* sums, Stream stream) {
  const dim3 grid = slabs(p, V);
  launch(sum_forward<T, V>, grid, THREADS, 2 * V * THREADS * int(sizeof(float)), stream, p, sums);
  launch(finish_forward<T>, dim3((p.c + 31) / 32), THREADS, 2 * THREADS * int(sizeof(double)), stream, p,
         static_cast<const float*>(sums), int(grid.y));
  launch(apply_forward<T, V>, threads(p.m * p.c / V), THREADS, 0, stream, p);
}

template <class T, int V>
void backward(const BatchNorm& p, float* sums, Stream stream) {
  const dim3 grid = slabs(p, V);
  launch(sum_backward<T, V>, grid, THREADS, 2 * V * THREADS * int(sizeof(float)), stream, p, sums);
  launch(finish_backward, dim3((p.c + 31) / 32), THREADS, 2 * THREADS * int(sizeof(double)), stream, p,
         static_cast<const float*>(sums), int(grid.y));
  launch(apply_backward<T, V>, threads(p.m * p.c / V), THREADS, 0, stream, p);
}

// Whether every row of every tensor can be read 16 bytes, which are v channels, at a time.
bool vectors(const BatchNorm& p, int v) {
  const void* const tensors[] = {p.x,    p.residual, p.weight, p.bias,      p.mean,    p.invstd,
                                 p.y,    p.grad,     p.dx,     p.dresidual, p.dweight, p.dbias};
  for (const void* tensor : tensors)
    if (!aligned(tensor)) return false;
  return p.c % v == 0;
}

template <int N>
using Count = std::integral_constant<int, N>;

// f(Type, Count of channels that are accessed together)
template <class T, class F>
void with_count(const BatchNorm& p, F&& f) {
  constexpr int V = 16 / int(sizeof(typename T::Element));
  vectors(p, V) ? f(T{}, Count<V>{}) : f(T{}, Count<1>{});
}
template <class F>
void with_type(const BatchNorm& p, F&& f) {
  switch (p.type) {
    case Float::FLOAT32: return with_count<Type<Float::FLOAT32>>(p, f);
    case Float::FLOAT16: return with_count<Type<Float::FLOAT16>>(p, f);
    case Float::BFLOAT16: return with_count<Type<Float::BFLOAT16>>(p, f);
  }
}

}  // namespace

size_t bn_relu_scratch(const BatchNorm& p) { return size_t(MAX_SLICES) * 2 * p.c * sizeof(float); }
void bn_relu(const BatchNorm& p, void* scratch, Stream stream) {
  with_type(p, [&](auto type, auto v) { forward<decltype(type), v>(p, static_cast<float*>(scratch), stream); });
}
void bn_relu_backward(const BatchNorm& p, void* scratch, Stream stream) {
  with_type(p, [&](auto type, auto v) { backward<decltype(type), v>(p, static_cast<float*>(scratch), stream); });
}

}  // namespace r50::gpu
