// int8 convolution for AVX2, exact without 16-bit saturation and faster than widening to 16 bits.
//
// vpmaddubsw adds two u8 * s8 products in 16 bits and saturates: 2 * 255 * 127 does not fit. But an activation is (a &
// 127) + (a & 128), and 127 * (sum of four weights) nearly always fits, so the low parts of two groups of four k can
// even be added in 16 bits before vpmaddwd widens them: 3 multiplies per 64 MACs where 16-bit operands need 4. What
// does not fit is moved elsewhere, exactly:
//   weights      where four of one sign exceed 258, pack_int8 moves the excess into `fixes`, groups that are added
//                one by one
//   activations  above 127 are few after a ReLU (0.01 to 1 %): their high bits are listed while the rows are copied
//                and added one by one; where they are many, a second dense pass adds them
// The first convolution has the most of both, pixels and steep filters, in short runs: it multiplies 16-bit words, and
// reads overlapping windows in place instead of copying each.
// Register tile: 4 rows x 16 channels = 8 accumulators, 4 registers of weights, 4 temporaries.
#include <algorithm>
#include <cstring>

#include "layout.h"
#include "vec.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx2,fma")
#include "winograd.h"

namespace r50 {
namespace {

constexpr int ROWS = 4, WIDTH = 16, TILES = 48;  // a tile; tiles per block at most
constexpr int K_CHUNK = 1024;          // of a panel, 16 KiB: stays in L1 while the tiles of a block pass
constexpr int BLOCK_BYTES = 96 << 10;  // of copied activations: with a panel of weights beside it, inside a 512 KiB L2

constexpr int SHORT = 32;              // bytes of a run, below which a convolution with several is done in words

struct High {  // four activations of which some exceed 127
  int32_t row, k;
};

// k bytes of a row: as they are, and their low 7 bits; zeros up to kpad. Groups of four with a high bit are appended to
// `high`, unless it is null.
inline void copy_row(const uint8_t* from, int k, int kpad, uint8_t* raw, uint8_t* low, int row, int at, High*& high) {
  const __m256i mask = _mm256_set1_epi8(127);
  const auto list = [&](uint32_t bits, int i) {
    if (!high) return;
    for (; bits; bits &= ~(15u << (__builtin_ctz(bits) & ~3))) *high++ = {row, at + i + (__builtin_ctz(bits) & ~3)};
  };
  const auto copy16 = [&](int i) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(raw + i), x);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low + i), _mm_and_si128(x, _mm256_castsi256_si128(mask)));
    return uint32_t(_mm_movemask_epi8(x));
  };
  int i = 0;
  for (; i + 32 <= k; i += 32) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(raw + i), x);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + i), _mm256_and_si256(x, mask));
    list(uint32_t(_mm256_movemask_epi8(x)), i);
  }
  if (i < k) {
    uint32_t bits = 0;
    if (k - i >= 16) bits = copy16(i);
    if (k >= 16) {  // the last 16 overlap what is copied already
      const uint32_t last = copy16(k - 16);
      bits |= k - 16 >= i ? last << (k - 16 - i) : last >> (i - k + 16);
    } else {
      for (int b = i; b < k; b++) {
        raw[b] = from[b];
        low[b] = from[b] & 127;
        bits |= uint32_t(from[b] >> 7) << (b - i);
      }
    }
    list(bits, i);
  }
  for (i = k; i < kpad; i++) raw[i] = low[i] = 0;
}

inline __m256i four(const uint8_t* a) {
  int32_t value;
  std::memcpy(&value, a, 4);
  return _mm256_set1_epi32(value);
}
inline __m256i load(const int8_t* b) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)); }
// four u8 * s8 products per lane, where no pair saturates
inline __m256i dot(__m256i a, __m256i b) { return _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)); }

// acc (R x 16) = low parts by the weights of k0 <= k < k1, plus `start` (16), or where this is null plus acc
template <int R>
inline void multiply_low(const uint8_t* low, int lda, const int8_t* b, int k0, int k1, const int32_t* start,
                         int32_t* acc) {
  __m256i sum[R][2];
  auto* sums = reinterpret_cast<__m256i*>(acc);
  const auto* from = start ? reinterpret_cast<const __m256i*>(start) : sums;
  for (int r = 0; r < R; r++)
    for (int v = 0; v < 2; v++) sum[r][v] = _mm256_load_si256(from + (start ? 0 : 2 * r) + v);
  b += k0 * WIDTH;
  for (int k = k0; k < k1; k += 8, b += 8 * WIDTH) {
    const __m256i b00 = load(b), b01 = load(b + 32), b10 = load(b + 64), b11 = load(b + 96);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const __m256i x0 = four(low + r * lda + k), x1 = four(low + r * lda + k + 4);
      const __m256i y0 = _mm256_add_epi16(_mm256_maddubs_epi16(x0, b00), _mm256_maddubs_epi16(x1, b10));
      const __m256i y1 = _mm256_add_epi16(_mm256_maddubs_epi16(x0, b01), _mm256_maddubs_epi16(x1, b11));
      sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(y0, _mm256_set1_epi16(1)));
      sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(y1, _mm256_set1_epi16(1)));
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < 2; v++) _mm256_store_si256(sums + 2 * r + v, sum[r][v]);
}

// What else belongs to the tile: the panel's fixes and, where they are dense, all high bits, as bytes 0 or 1 (else
// null). With those a pair of weights gives at most 256: 127 pairs fit 16 bits.
template <int R>
inline void multiply_rest(const Packed& w, int p, const uint8_t* raw, const uint8_t* ones, int lda, int32_t* acc) {
  constexpr int FITTING = 126 * 4;
  auto* sums = reinterpret_cast<__m256i*>(acc);
  const int32_t* fix_k = w.fix_k();
  for (int f = w.fix_start()[p]; f < w.fix_start()[p + 1]; f++) {
    const __m256i b0 = load(w.fix(f)), b1 = load(w.fix(f) + 32);
    for (int r = 0; r < R; r++) {
      const __m256i x = four(raw + r * lda + fix_k[f]);
      sums[2 * r] = _mm256_add_epi32(sums[2 * r], dot(x, b0));
      sums[2 * r + 1] = _mm256_add_epi32(sums[2 * r + 1], dot(x, b1));
    }
  }
  for (int k0 = 0; ones && k0 < w.ktotal; k0 += FITTING) {
    __m256i sum[R][2] = {};
    const int8_t* b = w.panel(p) + k0 * WIDTH;
    for (int k = k0; k < std::min(w.ktotal, k0 + FITTING); k += 4, b += 4 * WIDTH) {
      const __m256i b0 = load(b), b1 = load(b + 32);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const __m256i x = four(ones + r * lda + k);
        sum[r][0] = _mm256_add_epi16(sum[r][0], _mm256_maddubs_epi16(x, b0));
        sum[r][1] = _mm256_add_epi16(sum[r][1], _mm256_maddubs_epi16(x, b1));
      }
    }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < 2; v++)
        sums[2 * r + v] = _mm256_add_epi32(sums[2 * r + v], _mm256_madd_epi16(sum[r][v], _mm256_set1_epi16(128)));
  }
}

// the listed high bits of a block's rows
inline void add_high(const Packed& w, int p, const uint8_t* raw, int lda, const High* high, const High* end,
                     int32_t* acc) {
  for (; high < end; high++) {
    const __m256i x = _mm256_and_si256(four(raw + high->row * lda + high->k), _mm256_set1_epi8(-128));
    const int8_t* b = w.panel(p) + high->k * WIDTH;
    auto* sum = reinterpret_cast<__m256i*>(acc + high->row * WIDTH);
    sum[0] = _mm256_add_epi32(sum[0], dot(x, load(b)));
    sum[1] = _mm256_add_epi32(sum[1], dot(x, load(b + 32)));
  }
}

// A panel and its fixes as 16-bit words: for each group of four k the registers of its even k, then those of its odd k.
inline void widen_panel(const Packed& w, int p, __m256i* words) {
  const auto add = [](__m256i* to, const int8_t* group) {
    for (int v = 0; v < 2; v++) {
      const __m256i b = load(group + 32 * v);
      to[v] = _mm256_add_epi16(to[v], _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
      to[2 + v] = _mm256_add_epi16(to[2 + v], _mm256_srai_epi16(b, 8));
    }
  };
  std::memset(words, 0, w.ktotal / 4 * 4 * sizeof *words);
  for (int k = 0; k < w.ktotal; k += 4) add(words + k, w.panel(p) + k * WIDTH);
  for (int f = w.fix_start()[p]; f < w.fix_start()[p + 1]; f++) add(words + w.fix_k()[f], w.fix(f));
}

// acc (R x 16) = start + the rows at raw + rows[r], each `in.ntaps` runs of `run` bytes, by widened weights
template <int R>
inline void multiply_words(const uint8_t* raw, const int32_t* rows, const Operand& in, int run, const __m256i* words,
                           const int32_t* start, int32_t* acc) {
  __m256i sum[R][2];
  auto* sums = reinterpret_cast<__m256i*>(acc);
  for (int r = 0; r < R; r++)
    for (int v = 0; v < 2; v++) sum[r][v] = _mm256_load_si256(reinterpret_cast<const __m256i*>(start) + v);
  for (int t = 0; t < in.ntaps; t++) {
    const uint8_t* x[R];
    for (int r = 0; r < R; r++) x[r] = raw + rows[r] + in.taps[t];
    for (int k = 0; k < run; k += 4, words += 4) {
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const __m256i both = four(x[r] + k), even = _mm256_and_si256(both, _mm256_set1_epi16(255));
        const __m256i odd = _mm256_srli_epi16(both, 8);
        for (int v = 0; v < 2; v++) {
          sum[r][v] = _mm256_add_epi32(sum[r][v], _mm256_madd_epi16(even, words[v]));
          sum[r][v] = _mm256_add_epi32(sum[r][v], _mm256_madd_epi16(odd, words[2 + v]));
        }
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < 2; v++) _mm256_store_si256(sums + 2 * r + v, sum[r][v]);
}

// 8 accumulators -> 8 lanes whose low 16 bits are the rounded value
template <Rounding rounding>
inline __m256i round8(__m256i acc, __m256 scale, __m256 addend) {
  if constexpr (rounding == DOUBLE) {
    const __m256d magic = _mm256_set1_pd(6755399441055744.0);  // 1.5 * 2^52: the low half of the sum is the integer
    const __m256d low = _mm256_fmadd_pd(_mm256_cvtepi32_pd(_mm256_castsi256_si128(acc)),
                                        _mm256_cvtps_pd(_mm256_castps256_ps128(scale)), magic);
    const __m256d high = _mm256_fmadd_pd(_mm256_cvtepi32_pd(_mm256_extracti128_si256(acc, 1)),
                                         _mm256_cvtps_pd(_mm256_extractf128_ps(scale, 1)), magic);
    const __m256 both = _mm256_shuffle_ps(_mm256_castpd_ps(low), _mm256_castpd_ps(high), 0x88);
    const __m256i y = _mm256_permute4x64_epi64(_mm256_castps_si256(both), 0xd8);
    return _mm256_max_epi32(_mm256_min_epi32(y, _mm256_set1_epi32(32767)), _mm256_set1_epi32(-32768));
  } else {
    const __m256 x = rounding == BIASED ? _mm256_castsi256_ps(acc) : _mm256_cvtepi32_ps(acc);
    return _mm256_castps_si256(_mm256_fmadd_ps(x, scale, addend));
  }
}

// The rows m ... m + rows of one panel. Register v holds the channels 2i + v: the two become 16-bit words by a shift
// and a blend, and a residual's bytes, widened to words, are pairs of which vpmaddwd takes the one that its gain stands
// beside.
template <Rounding rounding, bool residual>
void finish(const Conv& conv, int m, int rows, int p, const int32_t* acc) {
  const Packed& w = *conv.w;
  const int64_t column = int64_t(p) * WIDTH, valid = std::min<int64_t>(WIDTH, w.o - column);
  const __m256 scale0 = _mm256_loadu_ps(w.scale(p)), scale1 = _mm256_loadu_ps(w.scale(p) + 8);
  const __m256 addend0 = _mm256_loadu_ps(w.addend(p)), addend1 = _mm256_loadu_ps(w.addend(p) + 8);
  const auto* gains = reinterpret_cast<const __m256i*>(w.gain(p));
  const __m256i gain0 = _mm256_loadu_si256(gains), gain1 = _mm256_loadu_si256(gains + 1);
  for (int r = 0; r < rows; r++) {
    const int32_t offset = conv.outs[m + r];
    if (offset < 0) continue;
    const auto* sums = reinterpret_cast<const __m256i*>(acc + r * WIDTH);
    __m256i even = _mm256_load_si256(sums), odd = _mm256_load_si256(sums + 1);
    alignas(16) uint8_t part[16];
    if constexpr (residual) {
      const uint8_t* from = conv.residual + offset + column;
      if (valid < WIDTH) {
        std::memcpy(part, from, valid);
        from = part;
      }
      const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
      even = _mm256_add_epi32(even, _mm256_madd_epi16(words, gain0));
      odd = _mm256_add_epi32(odd, _mm256_madd_epi16(words, gain1));
    }
    even = round8<rounding>(even, scale0, addend0);
    odd = round8<rounding>(odd, scale1, addend1);
    const __m256i words = _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xaa);
    const __m128i result = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    uint8_t* to = conv.out + offset + column;
    if (valid == WIDTH) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), result);
    } else {
      _mm_store_si128(reinterpret_cast<__m128i*>(part), result);
      std::memcpy(to, part, valid);
    }
  }
}

void finish_32bit(const Conv& conv, int m, int rows, int p, const int32_t* acc) {
  for (int r = 0; r < rows; r++)
    if (conv.outs[m + r] >= 0) finish_row(conv, m + r, p, acc + r * WIDTH);
}

using Finish = void (*)(const Conv&, int, int, int, const int32_t*);

Finish finish_function(const Conv& conv) {
  if (conv.kind != Out::u8) return finish_32bit;
  constexpr Finish all[3][2] = {{finish<BIASED, false>, finish<BIASED, true>},
                                {finish<SINGLE, false>, finish<SINGLE, true>},
                                {finish<DOUBLE, false>, finish<DOUBLE, true>}};
  return all[conv.w->rounding][conv.residual != nullptr];
}

// f.template operator()<rows of the tile>(first row)
template <class F>
void tiles(int rows, F&& f) {
  int r = 0;
  for (; r + ROWS <= rows; r += ROWS) f.template operator()<ROWS>(r);
  switch (rows - r) {
    case 1: f.template operator()<1>(r); break;
    case 2: f.template operator()<2>(r); break;
    case 3: f.template operator()<3>(r); break;
  }
}

// body(k, end) for each run of k that a segment multiplies: slices side by side are one; an empty one where it has none
template <class Body>
void each_run(const Conv& conv, const Segment& segment, Body&& body) {
  int k = 0, end = 0;
  for (int i = segment.first; i < segment.last; i++) {
    const Slice& slice = conv.slices[i];
    if (slice.at != end) {
      if (k < end) body(k, end);
      k = slice.at;
    }
    end = slice.at + (slice.k + 7) / 8 * 8;
  }
  body(k, end);
}

// Convolutions with several short runs per row. The rows of a block lie in one region, which is copied with what a
// rounded-up run reads behind it.
void conv_words(const Conv& conv, int run, int m0, int m1, int p0, int p1) {
  const Packed& w = *conv.w;
  const Operand& in = conv.in[0];
  const Finish done = finish_function(conv);
  const auto [low, high] = std::minmax_element(in.taps, in.taps + in.ntaps);
  for (int m = m0; m < m1;) {
    int32_t first = in.rows[m], last = first, at[TILES * ROWS];
    int rows = 0;
    for (; rows < TILES * ROWS && m + rows < m1; rows++) {
      const int32_t row = in.rows[m + rows];
      if (rows && std::max(last, row) - std::min(first, row) > BLOCK_BYTES) break;
      first = std::min(first, row), last = std::max(last, row);
    }
    const int64_t begin = int64_t(first) + *low, bytes = int64_t(last) + *high + in.k - begin;
    auto* const words = static_cast<__m256i*>(scratch(w.ktotal * sizeof(__m256i) + bytes + run));
    auto* const raw = reinterpret_cast<uint8_t*>(words + w.ktotal);
    std::memcpy(raw, in.a + begin, bytes);
    std::memset(raw + bytes, 0, run);
    for (int r = 0; r < rows; r++) at[r] = int32_t(in.rows[m + r] - begin);
    for (int p = p0; p < p1; p++) {
      alignas(32) int32_t acc[TILES * ROWS * WIDTH];
      widen_panel(w, p, words);
      tiles(rows, [&]<int R>(int r) {
        multiply_words<R>(raw, at + r, in, run, words, w.start(p), acc + r * WIDTH);
      });
      done(conv, m, rows, p, acc);
    }
    m += rows;
  }
}

struct Avx2 {  // for winograd.h
  static constexpr int BYTES = 32, ELEMENT = 1, WORD = 2, RESULTS = 4, WIDTH = r50::WIDTH, ROWS = 6;
  typedef uint16_t Words __attribute__((vector_size(BYTES)));
  typedef uint32_t Sums __attribute__((vector_size(BYTES)));
  typedef int32_t Signed __attribute__((vector_size(BYTES)));

  static INLINE void widen(const uint8_t* from, Words& to) {
    to = (Words)_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }

  template <int R>
  static void multiply(const uint8_t* a, int64_t lda, const uint8_t* b, int pairs, uint8_t* to, const uint8_t* ahead,
                       int step) {
    __m256i sum[R][2];
    each<2 * R>([&](auto i) __attribute__((always_inline)) { sum[i / 2][i % 2] = _mm256_setzero_si256(); });
    for (int k = 0; k < pairs; k++, b += 4 * WIDTH, ahead += step) {
      __builtin_prefetch(ahead, 0, 2);
      const __m256i b0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(b));
      const __m256i b1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(b + 32));
      each<R>([&](auto r) __attribute__((always_inline)) {
        const __m256i words = four(a + r * lda + 4 * k);
        sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(words, b0));
        sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(words, b1));
      });
    }
    each<2 * R>([&](auto i) __attribute__((always_inline)) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + 32 * i), sum[i / 2][i % 2]);
    });
  }
};

}  // namespace

void winograd_avx2(const Conv& conv, const Layout& in, const Layout& out, int most, int t0, int t1, int p0, int p1) {
  Conv tile = conv;
  const Finish done = finish_function(conv);
  Winograd<Avx2>{.conv = conv, .in = in, .out = out, .most = most}.run(
      t0, t1, p0, p1, [&](const int32_t* offsets, int p, const int32_t* acc) {
        tile.outs = offsets;
        done(tile, 0, Avx2::RESULTS * Avx2::RESULTS, p, acc);
      });
}

void conv_avx2(const Conv& conv, int m0, int m1, int p0, int p1) {
  const Packed& w = *conv.w;
  const auto run = [&](int s) { return w.kpad[s] == w.k[s] ? conv.in[s].k : w.kpad[s]; };  // split finer: no padding
  if (w.operands == 1 && conv.in[0].ntaps > 1 && run(0) < SHORT) return conv_words(conv, run(0), m0, m1, p0, p1);
  const int lda = int(round_up(w.ktotal, 32));
  const int wanted = conv.block ? conv.block : std::max(4 * ROWS, BLOCK_BYTES / lda);
  const int block = std::clamp(wanted / ROWS, 1, TILES) * ROWS;
  const size_t plane = size_t(block) * lda;
  auto* raw = static_cast<uint8_t*>(scratch(3 * plane + (plane / 4 + 1) * sizeof(High)));
  uint8_t *low = raw + plane, *ones = low + plane;
  auto* const highs = reinterpret_cast<High*>(ones + plane);
  const Finish done = finish_function(conv);
  bool dense = false;  // once a block is, the others are taken to be
  const Segment* segment = conv.segments;
  for (int m = m0, rows; m < m1; m += rows) {
    while (segment->end <= m) segment++;
    rows = std::min({block, m1 - m, segment->end - m});
    High* high = dense ? nullptr : highs;
    for (int r = 0; r < rows; r++) {
      int at = 0;
      for (int s = 0; s < w.operands; s++) {
        const Operand& in = conv.in[s];
        const int kpad = run(s);
        for (int t = 0; t < in.ntaps; t++, at += kpad)
          copy_row(in.a + in.rows[m + r] + in.taps[t], in.k, kpad, raw + r * lda + at, low + r * lda + at, r, at, high);
      }
    }
    dense = dense || high - highs > int64_t(rows) * w.ktotal / 12;
    for (int64_t i = 0; dense && i < int64_t(rows) * lda; i += 32) {
      const __m256i x = _mm256_srli_epi16(_mm256_load_si256(reinterpret_cast<const __m256i*>(raw + i)), 7);
      _mm256_store_si256(reinterpret_cast<__m256i*>(ones + i), _mm256_and_si256(x, _mm256_set1_epi8(1)));
    }
    for (int p = p0; p < p1; p++) {
      alignas(32) int32_t acc[TILES * ROWS * WIDTH];
      const int32_t* start = w.start(p);
      each_run(conv, *segment, [&](int k, int end) {
        do {
          tiles(rows, [&]<int R>(int r) {
            multiply_low<R>(low + r * lda, lda, w.panel(p), k, std::min(end, k + K_CHUNK), start, acc + r * WIDTH);
          });
          start = nullptr;
          k += K_CHUNK;
        } while (k < end);
      });
      if (dense || w.fix_start()[p] < w.fix_start()[p + 1])
        tiles(rows, [&]<int R>(int r) {
          multiply_rest<R>(w, p, raw + r * lda, dense ? ones + r * lda : nullptr, lda, acc + r * WIDTH);
        });
      if (!dense) add_high(w, p, raw, lda, highs, high, acc);
      done(conv, m, rows, p, acc);
    }
  }
}

}  // namespace r50

#endif
