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
#include "winograd.h"

namespace r50 {
namespace {

constexpr int ROWS = 6, WIDTH = 16, LANES = 8;

constexpr int32_t CHOSEN[2 * WIDTH] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};

// Channels of a panel of which `left` are there: the lanes of each register
struct Valid {
  __m256i lanes[2];
  explicit Valid(int left) {
    const auto* chosen = reinterpret_cast<const __m256i*>(CHOSEN + WIDTH - std::min(WIDTH, left));
    each<2>([&](auto v) __attribute__((always_inline)) { lanes[v] = _mm256_loadu_si256(chosen + v); });
  }
};

// A row's 16 sums through ReLU
INLINE void store(const __m256 (&sum)[2], float* to, int left, const Valid& valid) {
  each<2>([&](auto v) __attribute__((always_inline)) {
    // a NaN stays one, as the maximum's second operand; no -0, as max_pool needs it
    const __m256 y = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_max_ps(_mm256_setzero_ps(), sum[v]));
    if (left >= WIDTH)
      _mm256_storeu_ps(to + LANES * v, y);
    else
      _mm256_maskstore_ps(to + LANES * v, valid.lanes[v], y);
  });
}

enum class End { first, sum, logits };  // ReLU; residual + ReLU; neither

// As conv_vnni.cpp's multiply.
template <int R, End end_>
const int8_t* multiply(const Conv& conv, Segment segment, int m, int end, int p, const int8_t* line, int step) {
  const Packed& w = *conv.w;
  const auto* start = reinterpret_cast<const float*>(w.start(p));
  const int left = w.o - p * WIDTH;
  const Valid valid(left);
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
        sum[r][0] = _mm256_add_ps(sum[r][0], _mm256_maskload_ps(from, valid.lanes[0]));
        sum[r][1] = _mm256_add_ps(sum[r][1], _mm256_maskload_ps(from + LANES, valid.lanes[1]));
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
        store(sum[r], reinterpret_cast<float*>(conv.out + out) + p * WIDTH, left, valid);
      }
    });
  }
  return line;
}

struct Avx2F32 {  // for winograd.h
  static constexpr int BYTES = 32, ELEMENT = 4, WORD = 4, RESULTS = 2, WIDTH = r50::WIDTH, ROWS = r50::ROWS;
  typedef float Words __attribute__((vector_size(BYTES)));
  typedef Words Sums;

  static INLINE void widen(const uint8_t* from, Words& to) { std::memcpy(&to, from, sizeof to); }

  template <int R>
  static void multiply(const uint8_t* a, int64_t lda, const uint8_t* b, int units, uint8_t* to, const uint8_t* ahead,
                       int step) {
    __m256 sum[R][2];
    each<2 * R>([&](auto i) __attribute__((always_inline)) { sum[i / 2][i % 2] = _mm256_setzero_ps(); });
    for (int k = 0; k < units; k++, b += 4 * WIDTH, ahead += step) {
      __builtin_prefetch(ahead, 0, 2);
      const __m256 b0 = _mm256_load_ps(reinterpret_cast<const float*>(b));
      const __m256 b1 = _mm256_load_ps(reinterpret_cast<const float*>(b) + LANES);
      each<R>([&](auto r) __attribute__((always_inline)) {
        const __m256 value = _mm256_broadcast_ss(reinterpret_cast<const float*>(a + r * lda) + k);
        sum[r][0] = _mm256_fmadd_ps(value, b0, sum[r][0]);
        sum[r][1] = _mm256_fmadd_ps(value, b1, sum[r][1]);
      });
    }
    each<2 * R>([&](auto i) __attribute__((always_inline)) {
      _mm256_store_ps(reinterpret_cast<float*>(to) + LANES * i, sum[i / 2][i % 2]);
    });
  }
};

}  // namespace

void winograd_f32_avx2(const Conv& conv, const Layout& in, const Layout& out, int most, int t0, int t1, int p0,
                       int p1) {
  Winograd<Avx2F32>{.conv = conv, .in = in, .out = out, .most = most}.run(
      t0, t1, p0, p1, [&](const int32_t* offsets, int p, const int32_t* acc) {
        const int left = conv.w->o - p * WIDTH;
        const Valid valid(left);
        for (int i = 0; i < Avx2F32::RESULTS * Avx2F32::RESULTS; i++, acc += WIDTH) {
          if (offsets[i] < 0) continue;
          const auto* from = reinterpret_cast<const float*>(acc);
          const __m256 sum[] = {_mm256_load_ps(from), _mm256_load_ps(from + LANES)};
          store(sum, reinterpret_cast<float*>(conv.out + offsets[i]) + p * WIDTH, left, valid);
        }
      });
}

void conv_f32(const Conv& conv, int m0, int m1, int p0, int p1) {
  const auto run = [&]<End end_>() {
    sweep<ROWS, WIDTH>(conv, m0, m1, p0, p1, [&]<int R>(auto... args) { return multiply<R, end_>(conv, args...); });
  };
  if (conv.kind == Out::f32) return run.template operator()<End::logits>();
  conv.residual ? run.template operator()<End::sum>() : run.template operator()<End::first>();
}

}  // namespace r50

#endif
