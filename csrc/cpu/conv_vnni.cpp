// Convolution for AVX-512: int8 by VNNI's vpdpbusd and, in networks, bfloat16 by vdpbf16ps and float32 by vfmadd231ps,
// activations read in place.
// Register tile: 6 rows x 64 channels = 24 accumulators, 4 registers of weights, 1 broadcast of 4 bytes.
#include <algorithm>
#include <cstring>

#include "layout.h"
#include "vec.h"

#if defined(__x86_64__)
#include "x86.h"
R50_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma")
#include "each.h"
#include "epilogue512.h"
#include "sweep.h"
#include "winograd.h"

namespace r50 {
namespace {

constexpr int ROWS = 6, WIDTH = 64;

template <int BYTES>  // of an element
R50_INLINE __m512i dot(__m512i sum, __m512i x, __m512i weights) {
  if constexpr (BYTES == 1)
    return _mm512_dpbusd_epi32(sum, x, weights);
  else if constexpr (BYTES == 2)
    return _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(sum), (__m512bh)x, (__m512bh)weights));
  else
    return _mm512_castps_si512(
        _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(weights), _mm512_castsi512_ps(sum)));
}

// What epilogue512.h has for int8 and bfloat16, for float32: the accumulators have bias and scale in them already.
template <bool residual_>
struct EpilogueF32 {
  static constexpr bool residual = residual_, wide = false;
  static constexpr int BYTES = 4;  // of an element
  __mmask64 valid;

  EpilogueF32(const int32_t*, int left) { valid = mask_of(left); }

  R50_INLINE void add(__m512i& sum0, __m512i& sum1, __m512i& sum2, __m512i& sum3, const uint8_t* from) const {
    add(sum0, from, 0), add(sum1, from, 1), add(sum2, from, 2), add(sum3, from, 3);
  }
  R50_INLINE void add(__m512i& sum, const uint8_t* from, int v) const {
    const __m512 other = _mm512_maskz_loadu_ps(__mmask16(valid >> 16 * v), from + 64 * v);
    sum = _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(sum), other));
  }
  // as EpilogueBf16: a NaN stays one, and there is no -0
  R50_INLINE void store(__m512i sum0, __m512i sum1, __m512i sum2, __m512i sum3, uint8_t* to) const {
    store(sum0, to, 0), store(sum1, to, 1), store(sum2, to, 2), store(sum3, to, 3);
  }
  R50_INLINE void store(__m512i sum, uint8_t* to, int v) const {
    const __m512 y = _mm512_max_ps(_mm512_castsi512_ps(_mm512_setzero_si512()), _mm512_castsi512_ps(sum));
    const __m512i bits = _mm512_and_si512(_mm512_castps_si512(y), _mm512_set1_epi32(0x7fffffff));
    _mm512_mask_storeu_ps(to + 64 * v, __mmask16(valid >> 16 * v), _mm512_castsi512_ps(bits));
  }
};

// The rows [m, end) of one panel, R at a time, from the start of their accumulators to the output. These start with the
// residual: added at the end it would keep the next rows' products waiting. Between the products of two tiles lies as
// little as can be, for what is done there is not hidden: no call, no pointer but those in use, nothing read twice.
// For every 4 bytes of K `step` bytes of the weights to come are fetched from `line` on. -> where to go on fetching
template <int R, class Epilogue>
const int8_t* multiply(const Conv& conv, Segment segment, int m, int end, int p, const int8_t* line, int step) {
  const Packed& w = *conv.w;
  const int32_t* start = w.start(p);
  const int64_t column = int64_t(p) * WIDTH * Epilogue::BYTES;
  const Slice *first = conv.slices + segment.first, *last = conv.slices + segment.last;
  const int8_t* panel = w.panel(p);
  uint8_t* to = conv.out + column;
  const uint8_t* residual = conv.residual + column;
  const uint8_t* const pixels[] = {conv.in[0].a, conv.in[1].a};
  const int32_t* const tables[] = {conv.in[0].rows, conv.in[1].rows};
  const int left = w.o - p * WIDTH;
  for (; m < end; m += R) {
    const int32_t *outs = conv.outs + m, *then = m + 2 * R <= conv.m ? outs + R : outs;
    __m512i sum[R][4];
    each<4 * R>([&](auto i) __attribute__((always_inline)) {
      sum[i / 4][i % 4] = _mm512_load_si512(start + 16 * (i % 4));
    });
    if constexpr (!Epilogue::wide) {
      const Epilogue epilogue(start, left);
      each<R>([&](auto r) __attribute__((always_inline)) {
        const int64_t now = outs[r];
        if constexpr (Epilogue::residual) epilogue.add(sum[r][0], sum[r][1], sum[r][2], sum[r][3], residual + now);
        for (int line = 0; line < 64 * Epilogue::BYTES; line += 64) {
          if constexpr (Epilogue::residual) __builtin_prefetch(residual + then[r] + line);
          __builtin_prefetch(to + now + line, 1);
        }
      });
    }
    for (const Slice* slice = first; slice < last; slice++) {
      const uint8_t* a = pixels[slice->operand] + slice->offset;
      const int32_t* rows = tables[slice->operand] + m;
      const int8_t* b = panel + int64_t(slice->at) * WIDTH;
      const uint8_t* x[R];
      for (int r = 0; r < R; r++) x[r] = a + rows[r];
      for (int k = 0; k < slice->k; k += 4, b += 4 * WIDTH) {
        __builtin_prefetch(line, 0, 2);
        line += step;
        const __m512i b0 = _mm512_load_si512(b), b1 = _mm512_load_si512(b + 64);
        const __m512i b2 = _mm512_load_si512(b + 128), b3 = _mm512_load_si512(b + 192);
        each<R>([&](auto r) __attribute__((always_inline)) {
          int32_t four;
          std::memcpy(&four, x[r] + k, 4);
          const __m512i values = _mm512_set1_epi32(four);
          sum[r][0] = dot<Epilogue::BYTES>(sum[r][0], values, b0);
          sum[r][1] = dot<Epilogue::BYTES>(sum[r][1], values, b1);
          sum[r][2] = dot<Epilogue::BYTES>(sum[r][2], values, b2);
          sum[r][3] = dot<Epilogue::BYTES>(sum[r][3], values, b3);
        });
      }
    }
    const Epilogue epilogue(start, left);  // anew: its constants would take registers from the sums
    each<R>([&](auto r) __attribute__((always_inline)) {
      const int64_t out = outs[r];
      if (out < 0) return;
      if constexpr (Epilogue::wide) {
        alignas(64) int32_t acc[WIDTH];
        each<4>([&](auto v) __attribute__((always_inline)) { _mm512_store_si512(acc + 16 * v, sum[r][v]); });
        finish_row(conv, m + r, p, acc);
      } else {
        epilogue.store(sum[r][0], sum[r][1], sum[r][2], sum[r][3], to + out);
      }
    });
  }
  return line;
}

// For winograd.h: R rows of 4 bytes, `lda` bytes apart, by one panel; a step of what is multiplied next is fetched from
// `ahead` for each four. FLOATS: a float32, else two int16.
template <bool FLOATS, int R>
R50_INLINE void multiply_words(const uint8_t* a, int64_t lda, const uint8_t* b, int units, uint8_t* to,
                               const uint8_t* ahead, int step) {
  __m512i sum[R][4];
  each<4 * R>([&](auto i) __attribute__((always_inline)) { sum[i / 4][i % 4] = _mm512_setzero_si512(); });
  for (int k = 0; k < units; k++, b += 4 * WIDTH, ahead += step) {
    __builtin_prefetch(ahead, 0, 2);
    const __m512i weights[] = {_mm512_load_si512(b), _mm512_load_si512(b + 64), _mm512_load_si512(b + 128),
                               _mm512_load_si512(b + 192)};
    each<R>([&](auto r) __attribute__((always_inline)) {
      int32_t four;
      std::memcpy(&four, a + r * lda + 4 * k, 4);
      const __m512i words = _mm512_set1_epi32(four);
      each<4>([&](auto v) __attribute__((always_inline)) {
        if constexpr (FLOATS)
          sum[r][v] = dot<4>(sum[r][v], words, weights[v]);
        else
          sum[r][v] = _mm512_dpwssd_epi32(sum[r][v], words, weights[v]);
      });
    });
  }
  each<4 * R>([&](auto i) __attribute__((always_inline)) { _mm512_store_si512(to + 64 * i, sum[i / 4][i % 4]); });
}

struct Vnni {
  static constexpr int BYTES = 64, ELEMENT = 1, WORD = 2, RESULTS = 4, WIDTH = r50::WIDTH, ROWS = r50::ROWS;
  typedef uint16_t Words __attribute__((vector_size(BYTES)));
  typedef uint32_t Sums __attribute__((vector_size(BYTES)));
  typedef int32_t Signed __attribute__((vector_size(BYTES)));

  static R50_INLINE void widen(const uint8_t* from, Words& to) {
    __m256i bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    const __m512i words = _mm512_cvtepu8_epi16(bytes);
    std::memcpy(&to, &words, sizeof to);
  }
  template <int R, class... Args>
  static void multiply(Args... args) { multiply_words<false, R>(args...); }
};

struct VnniF32 {
  static constexpr int BYTES = 64, ELEMENT = 4, WORD = 4, RESULTS = 2, WIDTH = r50::WIDTH, ROWS = r50::ROWS;
  typedef float Words __attribute__((vector_size(BYTES)));
  typedef Words Sums;

  static R50_INLINE void widen(const uint8_t* from, Words& to) { std::memcpy(&to, from, sizeof to); }
  template <int R, class... Args>
  static void multiply(Args... args) { multiply_words<true, R>(args...); }
};

}  // namespace

template <class Set, class Epilogue>
static void winograd(const Conv& conv, const Layout& in, const Layout& out, int most, int t0, int t1, int p0, int p1) {
  Winograd<Set>{.conv = conv, .in = in, .out = out, .most = most}.run(
      t0, t1, p0, p1, [&](const int32_t* offsets, int p, const int32_t* acc) {
        const Epilogue epilogue(conv.w->start(p), conv.w->o - p * WIDTH);
        for (int i = 0; i < Set::RESULTS * Set::RESULTS; i++, acc += WIDTH)
          if (offsets[i] >= 0)
            epilogue.store(_mm512_load_si512(acc), _mm512_load_si512(acc + 16), _mm512_load_si512(acc + 32),
                           _mm512_load_si512(acc + 48), conv.out + offsets[i] + int64_t(p) * WIDTH * Epilogue::BYTES);
      });
}

void winograd_vnni(const Conv& conv, const Layout& in, const Layout& out, int most, int t0, int t1, int p0, int p1) {
  switch (conv.w->rounding) {
    case BIASED: return winograd<Vnni, Epilogue512<BIASED, false>>(conv, in, out, most, t0, t1, p0, p1);
    case SINGLE: return winograd<Vnni, Epilogue512<SINGLE, false>>(conv, in, out, most, t0, t1, p0, p1);
    default: return winograd<Vnni, Epilogue512<DOUBLE, false>>(conv, in, out, most, t0, t1, p0, p1);
  }
}

void winograd_f32_vnni(const Conv& conv, const Layout& in, const Layout& out, int most, int t0, int t1, int p0,
                       int p1) {
  winograd<VnniF32, EpilogueF32<false>>(conv, in, out, most, t0, t1, p0, p1);
}

void conv_vnni(const Conv& conv, int m0, int m1, int p0, int p1) {
  const auto run = [&]<class Epilogue>() {
    sweep<ROWS, WIDTH>(conv, m0, m1, p0, p1, [&]<int R>(auto... args) { return multiply<R, Epilogue>(conv, args...); });
  };
  if (conv.w->type != Type::f32) return with_epilogue(conv, run);
  if (conv.kind == Out::f32) return run.template operator()<Wide<4>>();
  conv.residual ? run.template operator()<EpilogueF32<true>>() : run.template operator()<EpilogueF32<false>>();
}

}  // namespace r50

#endif
