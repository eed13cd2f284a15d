// Batch normalisation in training (arXiv 1502.03167), fused with the residual sum and the ReLU. NHWC: a row is a pixel.
//
//   forward    mean, var over the rows;  invstd = 1 / sqrt(var + eps)
//              y = relu((x - mean) * invstd * weight + bias + residual)
//   backward   g = grad where !(y <= 0);  dbias = sum g;  dweight = sum g * (x - mean) * invstd;  dresidual = g
//              dx = invstd * weight * (g - dbias / rows - (x - mean) * invstd * dweight / rows)
//
// Each direction reads its input twice: sums over the rows, then the result. The rows are cut into blocks by their
// number alone, and the blocks' sums are added in their order, so that the result does not depend on the threads. One
// template of gcc vectors serves every instruction set: their width and the caller's target make the difference.
//
// Tried and refused: several rows at a time in Reduce (its writes of the residual's gradient go to as many places, 0.6x
// to 0.8x), both gradients written by the second pass (0.75x to 1x), stores that bypass the caches (1.1x, paid back by
// whoever reads the result).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "vec.h"

namespace r50 {
namespace {

constexpr int GROUP = 8;  // rows whose moments are summed in float32 registers before they join the block's, in float64
constexpr int SAMPLES = 8;  // rows whose mean is the origin of the moments: one outlier among them does no harm
constexpr int64_t BLOCKS = 64, BLOCK_ELEMENTS = 1 << 15;  // at most so many blocks, of at least so many elements

template <int W>
INLINE void accumulate(double* p, const typename Vec<W>::F& v) {
  constexpr int H = W > 1 ? W / 2 : 1;  // as many float64 as one register holds; gcc takes wider ones through the stack
  typedef double Doubles __attribute__((vector_size(8 * H)));
  typename Vec<H>::F parts[W / H];
  std::memcpy(parts, &v, sizeof v);
  for (int i = 0; i < W / H; i++) {
    Doubles sum;
    std::memcpy(&sum, p + i * H, sizeof sum);
    sum += __builtin_convertvector(parts[i], Doubles);
    std::memcpy(p + i * H, &sum, sizeof sum);
  }
}

struct Job {  // one call: tensors of (rows, c), vectors of c floats; `a` and `b` hold a vector of c sums per block
  const void *x = nullptr, *residual = nullptr, *grad = nullptr, *y = nullptr;
  void *out = nullptr, *dresidual = nullptr;
  const float *mean = nullptr, *scale = nullptr, *slope = nullptr, *bias = nullptr;
  void *a = nullptr, *b = nullptr;
  int64_t rows, c;
  bool relu = false;

  int64_t block_rows() const {
    const int64_t least = std::max((rows + BLOCKS - 1) / BLOCKS, BLOCK_ELEMENTS / c);
    return std::max<int64_t>((least + GROUP - 1) / GROUP, 1) * GROUP;
  }
  int64_t blocks() const { return (rows + block_rows() - 1) / block_rows(); }
  template <class T>
  T* row(auto* tensor, int64_t index) const {
    return tensor ? static_cast<T*>(tensor) + index * c : nullptr;
  }
};

// fn<W>(channel) for all channels, in full vectors and then one by one
template <int W, class Fn>
INLINE void channels(int64_t c, const Fn& fn) {
  int64_t i = 0;
  for (; i + W <= c; i += W) fn.template operator()<W>(i);
  for (; i < c; i++) fn.template operator()<1>(i);
}

// a, b (float64) = sums of d and d * d, d = x - origin. The origin, a value from the middle of x, keeps a mean far from
// zero from costing digits.
template <class T>
struct Moments {
  template <int W>
  static INLINE void run(const Job& job, int64_t block, int64_t begin, int64_t end) {
    double *sum = static_cast<double*>(job.a) + block * job.c, *square = static_cast<double*>(job.b) + block * job.c;
    for (; begin + GROUP <= end; begin += GROUP) add<W, GROUP>(job, begin, sum, square);
    for (; begin < end; begin++) add<W, 1>(job, begin, sum, square);
  }

  template <int W, int G>
  static INLINE void add(const Job& job, int64_t row, double* sum, double* square) {
    const int64_t c = job.c;
    const T* x = job.row<const T>(job.x, row);
    const float* origin = job.mean;
    channels<W>(c, [=]<int V>(int64_t i) __attribute__((always_inline)) {
      typename Vec<V>::F sums = {}, squares = {};
      for (int g = 0; g < G; g++) {
        const auto d = load<V>(x + g * c + i) - load<V>(origin + i);
        sums += d;
        squares += d * d;
      }
      accumulate<V>(sum + i, sums);
      accumulate<V>(square + i, squares);
    });
  }
};

template <class T>
struct Apply {
  template <int W>
  static INLINE void run(const Job& job, int64_t, int64_t begin, int64_t end) {
    const float least = job.relu ? 0 : -std::numeric_limits<float>::infinity();
    for (int64_t row = begin; row < end; row++) {
      const T *x = job.row<const T>(job.x, row), *residual = job.row<const T>(job.residual, row);
      T* y = job.row<T>(job.out, row);
      channels<W>(job.c, [=, &job]<int V>(int64_t i) __attribute__((always_inline)) {
        auto v = (load<V>(x + i) - load<V>(job.mean + i)) * load<V>(job.scale + i) + load<V>(job.bias + i);
        if (residual) v += load<V>(residual + i);
        store<V>(y + i, v < least ? least : v);  // a NaN is not less
      });
    }
  }
};

template <int V, class T>
INLINE typename Vec<V>::F masked(const T* grad, const T* y) {
  const auto g = load<V>(grad);
  return y ? load<V>(y) <= 0 ? 0 : g : g;  // as PyTorch's ReLU, which lets a NaN's gradient pass
}

// a, b (float32) = sums of g and g * (x - mean). The residual's gradient is written here, and read by the second pass.
template <class T>
struct Reduce {
  template <int W>
  static INLINE void run(const Job& job, int64_t block, int64_t begin, int64_t end) {
    const int64_t c = job.c;
    float *sum = static_cast<float*>(job.a) + block * c, *product = static_cast<float*>(job.b) + block * c;
    for (int64_t row = begin; row < end; row++) {
      const T *x = job.row<const T>(job.x, row), *y = job.row<const T>(job.y, row);
      const T* grad = job.row<const T>(job.grad, row);
      T* dresidual = job.row<T>(job.dresidual, row);
      channels<W>(c, [=, &job]<int V>(int64_t i) __attribute__((always_inline)) {
        const auto g = masked<V>(grad + i, y ? y + i : y);
        if (dresidual) store<V>(dresidual + i, g);
        store<V>(sum + i, load<V>(sum + i) + g);
        store<V>(product + i, load<V>(product + i) + g * (load<V>(x + i) - load<V>(job.mean + i)));
      });
    }
  }
};

// dx = scale * (g + slope * (x - mean) + bias), where the sum may cancel: what multiplies all of it comes last
template <class T>
struct Gradient {
  template <int W>
  static INLINE void run(const Job& job, int64_t, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const T *x = job.row<const T>(job.x, row), *y = job.row<const T>(job.dresidual ? nullptr : job.y, row);
      const T* grad = job.row<const T>(job.dresidual ? job.dresidual : job.grad, row);
      T* dx = job.row<T>(job.out, row);
      channels<W>(job.c, [=, &job]<int V>(int64_t i) __attribute__((always_inline)) {
        const auto rest = (load<V>(x + i) - load<V>(job.mean + i)) * load<V>(job.slope + i) + load<V>(job.bias + i);
        store<V>(dx + i, (masked<V>(grad + i, y ? y + i : y) + rest) * load<V>(job.scale + i));
      });
    }
  }
};

using Run = void (*)(const Job&, int64_t block, int64_t begin, int64_t end);
template <class Kernel>
void run_plain(const Job& job, int64_t block, int64_t begin, int64_t end) {
  Kernel::template run<4>(job, block, begin, end);
}
template <class Kernel>
TARGET("avx2,fma")
void run_avx2(const Job& job, int64_t block, int64_t begin, int64_t end) {
  Kernel::template run<8>(job, block, begin, end);
}
template <class Kernel>
TARGET("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")
void run_avx512(const Job& job, int64_t block, int64_t begin, int64_t end) {
  Kernel::template run<16>(job, block, begin, end);
}

template <template <class> class Kernel, class T>
Run best() {
  if (has_avx512()) return run_avx512<Kernel<T>>;
  return isa() >= Isa::avx2 ? run_avx2<Kernel<T>> : run_plain<Kernel<T>>;
}

// All blocks, each thread its own: last to first in the second pass, which so begins with what the caches hold.
template <template <class> class Kernel>
void run(const Job& job, bool is_bf16, bool backwards, int threads) {
  const Run fn = is_bf16 ? best<Kernel, bf16>() : best<Kernel, float>();
  const int64_t blocks = job.blocks(), height = job.block_rows();
  parallel(int(std::min<int64_t>(threads, blocks)), [&](int thread, int threads) {
    const int64_t first = blocks * thread / threads, last = blocks * (thread + 1) / threads;
    for (int64_t i = first; i < last; i++) {
      const int64_t block = backwards ? first + last - 1 - i : i;
      fn(job, block, block * height, std::min(job.rows, (block + 1) * height));
    }
  });
}

}  // namespace

void bn_relu(const void* x, const void* residual, const float* weight, const float* bias, float eps, bool relu,
             bool is_bf16, int64_t rows, int64_t c, void* y, float* mean, float* invstd, int threads) {
  Job job{.x = x, .residual = residual, .out = y, .mean = mean, .rows = rows, .c = c, .relu = relu};
  const int64_t blocks = job.blocks();
  std::vector<double> sums(2 * blocks * c);
  std::vector<float> scale(c), shift(c);
  double *sum = sums.data(), *square = sum + blocks * c;
  job.a = sum;
  job.b = square;
  job.scale = scale.data();
  job.bias = shift.data();
  for (int64_t i = 0; i < c; i++) {
    double total = 0;
    for (int64_t k = 0; k < SAMPLES; k++) {
      const int64_t at = (2 * k + 1) * rows / (2 * SAMPLES) * c + i;
      total += is_bf16 ? load<1>(static_cast<const bf16*>(x) + at)[0] : static_cast<const float*>(x)[at];
    }
    mean[i] = float(total / SAMPLES);
  }
  run<Moments>(job, is_bf16, false, threads);
  for (int64_t block = 1; block < blocks; block++)
    for (int64_t i = 0; i < c; i++) {
      sum[i] += sum[block * c + i];
      square[i] += square[block * c + i];
    }
  for (int64_t i = 0; i < c; i++) {
    const double change = sum[i] / rows, center = mean[i] + change;
    const double variance = std::max(square[i] / rows - change * change, 0.0);  // a NaN stays one
    const double inverse = 1 / std::sqrt(variance + eps), factor = inverse * weight[i];
    mean[i] = float(center);
    invstd[i] = float(inverse);
    scale[i] = float(factor);
    shift[i] = float(bias[i] + (mean[i] - center) * factor);  // what rounding the mean has cost is given back
  }
  run<Apply>(job, is_bf16, true, threads);
}

void bn_relu_backward(const void* grad, const void* y, const void* x, const float* weight, const float* mean,
                      const float* invstd, bool relu, bool is_bf16, int64_t rows, int64_t c, void* dx, void* dresidual,
                      float* dweight, float* dbias, int threads) {
  Job job{.x = x, .grad = grad, .y = relu ? y : nullptr, .out = dx, .dresidual = dresidual, .mean = mean, .rows = rows,
          .c = c};
  const int64_t blocks = job.blocks();
  std::vector<float> sums(2 * blocks * c), scale(c), slope(c), bias(c);
  float *sums_g = sums.data(), *sums_gx = sums_g + blocks * c;
  std::vector<double> sum(c), product(c);
  job.a = sums_g;
  job.b = sums_gx;
  job.scale = scale.data();
  job.slope = slope.data();
  job.bias = bias.data();
  run<Reduce>(job, is_bf16, false, threads);
  for (int64_t block = 0; block < blocks; block++)
    for (int64_t i = 0; i < c; i++) {
      sum[i] += sums_g[block * c + i];
      product[i] += sums_gx[block * c + i];
    }
  for (int64_t i = 0; i < c; i++) {
    dbias[i] = float(sum[i]);
    dweight[i] = float(product[i] * invstd[i]);
    scale[i] = invstd[i] * weight[i];
    slope[i] = float(-product[i] * invstd[i] * invstd[i] / rows);
    bias[i] = float(-sum[i] / rows);
  }
  run<Gradient>(job, is_bf16, true, threads);
}

}  // namespace r50
