// Convolution for AVX-512: int8 by VNNI's vpdpbusd and, in networks, bfloat16 by vdpbf16ps, activations read in place.
// Register tile: 6 rows x 64 channels = 24 accumulators, 4 registers of weights, 1 broadcast of 4 bytes.
#include <algorithm>
#include <cstring>

#include "layout.h"
#include "vec.h"

#if defined(__x86_64__)
#include "x86.h"
R50_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma")
#include "epilogue512.h"
#include "winograd.h"

namespace r50 {
namespace {

constexpr int ROWS = 6, WIDTH = 64;
constexpr int BLOCK_BYTES = 256 << 10;  // of activations, to stay in L2 while all panels pass over them
constexpr int FEW = 64, LEAST = 3;      // tiles that share a panel, for which the next one is fetched ahead

template <int BYTES>  // of an element
R50_INLINE __m512i dot(__m512i sum, __m512i x, __m512i weights) {
  if constexpr (BYTES == 1)
    return _mm512_dpbusd_epi32(sum, x, weights);
  else
    return _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(sum), (__m512bh)x, (__m512bh)weights));
}

struct Ahead {  // the weights to come, fetched evenly while few rows use the present ones
  const int8_t* line;
  int step;  // bytes per 4 bytes of K; 0: they stay in L2 anyway
};

// The rows m ... m + R of one panel, from the start of their accumulators to the output. These start with the residual:
// added at the end it would keep the next rows' products waiting.
template <int R, class Epilogue>
void multiply(const Conv& conv, const Segment& segment, int m, int p, Ahead& ahead) {
  const Packed& w = *conv.w;
  __m512i sum[R][4];
  each<4 * R>([&](auto i) __attribute__((always_inline)) {
    sum[i / 4][i % 4] = _mm512_load_si512(w.start(p) + 16 * (i % 4));
  });
  const int64_t column = int64_t(p) * WIDTH * Epilogue::BYTES;
  if constexpr (!Epilogue::wide) {
    const Epilogue epilogue(w, p);
    each<R>([&](auto r) __attribute__((always_inline)) {
      const int64_t now = conv.outs[m + r] + column, then = conv.outs[std::min(m + r + R, conv.m - 1)] + column;
      if constexpr (Epilogue::residual)
        epilogue.add(sum[r][0], sum[r][1], sum[r][2], sum[r][3], conv.residual + now);
      for (int line = 0; line < 64 * Epilogue::BYTES; line += 64) {
        if constexpr (Epilogue::residual) __builtin_prefetch(conv.residual + then + line);
        __builtin_prefetch(conv.out + now + line, 1);
      }
    });
  }
  const int8_t* line = ahead.line;
  const uint8_t* rows[2][R];
  for (int s = 0; s < w.operands; s++)
    for (int r = 0; r < R; r++) rows[s][r] = conv.in[s].a + conv.in[s].rows[m + r];
  for (int i = segment.first; i < segment.last; i++) {
    const Slice& slice = conv.slices[i];
    const int8_t* b = w.panel(p) + int64_t(slice.at) * WIDTH;
    const uint8_t* x[R];
    for (int r = 0; r < R; r++) x[r] = rows[slice.operand][r] + slice.offset;
    for (int k = 0; k < slice.k; k += 4, b += 4 * WIDTH) {
      __builtin_prefetch(line, 0, 2);
      line += ahead.step;
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
  ahead.line = line;
  const Epilogue epilogue(w, p);  // anew: its constants would take registers from the sums
  each<R>([&](auto r) __attribute__((always_inline)) {
    const int32_t out = conv.outs[m + r];
    if (out < 0) return;
    if constexpr (Epilogue::wide) {
      alignas(64) int32_t acc[WIDTH];
      each<4>([&](auto v) __attribute__((always_inline)) { _mm512_store_si512(acc + 16 * v, sum[r][v]); });
      finish_row(conv, m + r, p, acc);
    } else {
      epilogue.store(sum[r][0], sum[r][1], sum[r][2], sum[r][3], conv.out + out + column);
    }
  });
}

template <class Epilogue>
void sweep(const Conv& conv, int m0, int m1, int p0, int p1) {
  const int block =
      conv.block ? conv.block : std::clamp(BLOCK_BYTES / conv.w->ktotal / ROWS * ROWS, 4 * ROWS, 128 * ROWS);
  const Segment* segment = conv.segments;
  for (int first = m0; first < m1; first += block) {
    while (segment->end <= first) segment++;
    const int end = std::min(m1, first + block);
    for (int p = p0; p < p1; p++) {
      const Segment* here = segment;
      const int tiles = (end - first + ROWS - 1) / ROWS;
      const int8_t* after = p + 1 < p1 ? conv.w->panel(p + 1) : end < m1 ? conv.w->panel(p0) : conv.next;
      Ahead ahead{after, after && tiles >= LEAST && tiles <= FEW ? std::min(64, (4 * WIDTH + tiles - 1) / tiles) : 0};
      for (int m = first, rows; m < end; m += rows) {
        here += here->end <= m;
        const int left = std::min(end, here->end) - m;
        rows = left >= 2 * ROWS ? ROWS : left > ROWS ? (left + 1) / 2 : left;  // none too low to cover the latency
        switch (rows) {
          case 1: multiply<1, Epilogue>(conv, *here, m, p, ahead); break;
          case 2: multiply<2, Epilogue>(conv, *here, m, p, ahead); break;
          case 3: multiply<3, Epilogue>(conv, *here, m, p, ahead); break;
          case 4: multiply<4, Epilogue>(conv, *here, m, p, ahead); break;
          case 5: multiply<5, Epilogue>(conv, *here, m, p, ahead); break;
          default: multiply<6, Epilogue>(conv, *here, m, p, ahead);
        }
      }
    }
  }
}

struct Vnni {  // for winograd.h
  static constexpr int BYTES = 64, WIDTH = r50::WIDTH, ROWS = r50::ROWS;
  typedef uint16_t Words __attribute__((vector_size(BYTES)));
  typedef uint32_t Sums __attribute__((vector_size(BYTES)));
  typedef int32_t Signed __attribute__((vector_size(BYTES)));

  static R50_INLINE void widen(const uint8_t* from, Words& to) {
    __m256i bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    const __m512i words = _mm512_cvtepu8_epi16(bytes);
    std::memcpy(&to, &words, sizeof to);
  }

  // R rows of words, `lda` bytes apart, by one panel of pairs; a step of it is fetched from `ahead` for every pair
  template <int R>
  static void multiply(const uint8_t* a, int64_t lda, const uint8_t* b, int pairs, uint8_t* to, const uint8_t* ahead,
                       int step) {
    __m512i sum[R][4];
    each<4 * R>([&](auto i) __attribute__((always_inline)) { sum[i / 4][i % 4] = _mm512_setzero_si512(); });
    for (int k = 0; k < pairs; k++, b += 4 * WIDTH, ahead += step) {
      __builtin_prefetch(ahead, 0, 2);
      const __m512i b0 = _mm512_load_si512(b), b1 = _mm512_load_si512(b + 64);
      const __m512i b2 = _mm512_load_si512(b + 128), b3 = _mm512_load_si512(b + 192);
      each<R>([&](auto r) __attribute__((always_inline)) {
        int32_t pair;
        std::memcpy(&pair, a + r * lda + 4 * k, 4);
        const __m512i words = _mm512_set1_epi32(pair);
        sum[r][0] = _mm512_dpwssd_epi32(sum[r][0], words, b0);
        sum[r][1] = _mm512_dpwssd_epi32(sum[r][1], words, b1);
        sum[r][2] = _mm512_dpwssd_epi32(sum[r][2], words, b2);
        sum[r][3] = _mm512_dpwssd_epi32(sum[r][3], words, b3);
      });
    }
    each<4 * R>([&](auto i) __attribute__((always_inline)) { _mm512_store_si512(to + 64 * i, sum[i / 4][i % 4]); });
  }
};

}  // namespace

void winograd_vnni(const Conv& conv, const Layout& in, const Layout& out, int most, int t0, int t1, int p0, int p1) {
  const auto run = [&]<Rounding rounding>() {
    Winograd<Vnni>{.conv = conv, .in = in, .out = out, .most = most}.run(
        t0, t1, p0, p1, [&](const int32_t* offsets, int p, const int32_t* acc) {
          const Epilogue512<rounding, false> epilogue(*conv.w, p);
          for (int i = 0; i < RESULTS * RESULTS; i++, acc += WIDTH)
            if (offsets[i] >= 0)
              epilogue.store(_mm512_load_si512(acc), _mm512_load_si512(acc + 16), _mm512_load_si512(acc + 32),
                             _mm512_load_si512(acc + 48), conv.out + offsets[i] + int64_t(p) * WIDTH);
        });
  };
  switch (conv.w->rounding) {
    case BIASED: return run.template operator()<BIASED>();
    case SINGLE: return run.template operator()<SINGLE>();
    default: return run.template operator()<DOUBLE>();
  }
}

void conv_vnni(const Conv& conv, int m0, int m1, int p0, int p1) {
  with_epilogue(conv, [&]<class Epilogue>() { sweep<Epilogue>(conv, m0, m1, p0, p1); });
}

}  // namespace r50

#endif
