// Convolution of float32 networks for AVX2, activations read in place; conv_vnni.cpp has it for AVX-512.
// Register tile: 6 rows x 16 channels = 12 accumulators, 2 registers of weights, 1 broadcast.
#include <algorithm>
#include <cstring>

#include "layout.h"
#include "vec.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx2,fma")
#include "each.h"
#include "sweep.h"

namespace r50 {
namespace {

constexpr int ROWS = 6, WIDTH = 16, LANES = 8;

constexpr int32_t CHOSEN[2 * WIDTH] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};

enum class End { first, sum, logits };  // ReLU; residual + ReLU; neither

// As conv_vnni.cpp's multiply.
template <int R, End end_>
const int8_t* multiply(const Conv& conv, Segment segment, int m, int end, int p, const int8_t* line, int step) {
  const Packed& w = *conv.w;
  const auto* start = reinterpret_cast<const float*>(w.start(p));
  const int left = std::min(WIDTH, w.o - p * WIDTH);
  const auto* chosen = reinterpret_cast<const __m256i*>(CHOSEN + WIDTH - left);
  const __m256i valid[] = {_mm256_loadu_si256(chosen), _mm256_loadu_si256(chosen + 1)};
  for (; m < end; m += R) {
    const int32_t *outs = conv.outs + m, *then = m + 2 * R <= conv.m ? outs + R : outs;
    __m256 sum[R][2];
    each<2 * R>([&](auto i) __attribute__((always_inline)) {
      sum[i / 2][i % 2] = _mm256_load_ps(start + LANES * (i % 2));
    });
    each<R>([&](auto r) __attribute__((always_inline)) {
      const int64_t at = outs[r] + int64_t(p) * WIDTH * 4;
      if constexpr (end_ == End::sum) {
        const auto* from = reinterpret_cast<const float*>(conv.residual + at);
        sum[r][0] = _mm256_add_ps(sum[r][0], _mm256_maskload_ps(from, valid[0]));
        sum[r][1] = _mm256_add_ps(sum[r][1], _mm256_maskload_ps(from + LANES, valid[1]));
        __builtin_prefetch(conv.residual + then[r] + int64_t(p) * WIDTH * 4);
      }
      if constexpr (end_ != End::logits) __builtin_prefetch(conv.out + at, 1);
    });
    for (int i = segment.first; i < segment.last; i++) {
      const Slice& slice = conv.slices[i];
      const Operand& in = conv.in[slice.operand];
      const int8_t* b = w.panel(p) + int64_t(slice.at) * WIDTH;
      const uint8_t* x[R];
      for (int r = 0; r < R; r++) x[r] = in.a + slice.offset + in.rows[m + r];
      for (int k = 0; k < slice.k; k += 4, b += 4 * WIDTH) {
        __builtin_prefetch(line, 0, 2);
        line += step;
        const __m256 b0 = _mm256_load_ps(reinterpret_cast<const float*>(b));
        const __m256 b1 = _mm256_load_ps(reinterpret_cast<const float*>(b) + LANES);
        each<R>([&](auto r) __attribute__((always_inline)) {
          const __m256 value = _mm256_broadcast_ss(reinterpret_cast<const float*>(x[r] + k));
          sum[r][0] = _mm256_fmadd_ps(value, b0, sum[r][0]);
          sum[r][1] = _mm256_fmadd_ps(value, b1, sum[r][1]);
        });
      }
    }
    each<R>([&](auto r) __attribute__((always_inline)) {
      const int64_t out = outs[r];
      if (out < 0) return;
      if constexpr (end_ == End::logits) {
        alignas(32) int32_t acc[WIDTH];
        each<2>([&](auto v) __attribute__((always_inline)) {
          _mm256_store_ps(reinterpret_cast<float*>(acc) + LANES * v, sum[r][v]);
        });
        finish_row(conv, m + r, p, acc);
      } else {
        auto* to = reinterpret_cast<float*>(conv.out + out) + p * WIDTH;
        each<2>([&](auto v) __attribute__((always_inline)) {
          // a NaN stays one, as the maximum's second operand; no -0, as max_pool needs it
          const __m256 y = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_max_ps(_mm256_setzero_ps(), sum[r][v]));
          if (left == WIDTH)
            _mm256_storeu_ps(to + LANES * v, y);
          else
            _mm256_maskstore_ps(to + LANES * v, valid[v], y);
        });
      }
    });
  }
  return line;
}

}  // namespace

void conv_f32(const Conv& conv, int m0, int m1, int p0, int p1) {
  const auto run = [&]<End end_>() {
    sweep<ROWS, WIDTH>(conv, m0, m1, p0, p1, [&]<int R>(auto... args) { return multiply<R, end_>(conv, args...); });
  };
  if (conv.kind == Out::f32) return run.template operator()<End::logits>();
  conv.residual ? run.template operator()<End::sum>() : run.template operator()<End::first>();
}

}  // namespace r50

#endif
