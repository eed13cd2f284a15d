// A box of an image, resized with a filter as wide as what it averages, mirrored or not, straight into the batch: what
// PyTorch's interpolate(antialias=True) makes of uint8 pixels, bit for bit. As there, an axis has int16 weights with as
// many binary places as its largest weight leaves, and each pass, first across, then down, rounds to bytes once.
#include "crop_resize.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "x86.h"

namespace r50 {
namespace {

double weight(Kernel kernel, double x) {
  x = std::fabs(x);
  if (kernel == Kernel::bilinear) return x < 1 ? 1 - x : 0;
  constexpr double a = -0.5;  // Keys (1981), as Pillow has it
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// For each 16 bytes of a row that comes out: where the 64 bytes lie that all of them are made of, and, for each two
// taps, which of these they are and their weights.
struct Permutes {
  bool fits;  // 64 bytes were enough
  std::vector<int32_t> base, weights;
  std::vector<uint8_t> index;

  void set(const Filter& f, int64_t n) {
    const int64_t blocks = (3 * n + 15) / 16, pairs = f.taps / 2;
    base.resize(blocks), index.assign(blocks * pairs * 64, 0), weights.assign(blocks * pairs * 16, 0), fits = true;
    const int32_t* first = f.first.data();
    int32_t* two = weights.data();
    uint8_t* which = index.data();
    for (int64_t b = 0; b < blocks; b++, two += 16 * pairs, which += 64 * pairs) {
      int64_t i = b * 16 / 3, c = b * 16 % 3;
      base[b] = 3 * *std::min_element(first + i, first + std::min((b * 16 + 15) / 3, n - 1) + 1);
      for (int64_t k = 0; k < 16 && i < n; k++) {
        const int64_t at = 3 * first[i] + c - base[b];
        fits &= at + 3 * (f.taps - 1) < 64;
        for (int64_t p = 0; p < pairs; p++) {
          std::memcpy(two + p * 16 + k, &f.weights[i * f.taps + 2 * p], 4);
          which[p * 64 + 4 * k] = uint8_t(at + 6 * p), which[p * 64 + 4 * k + 2] = uint8_t(at + 6 * p + 3);
        }
        if (++c == 3) c = 0, i++;
      }
    }
  }
};

struct Scratch {  // of a thread, kept from image to image
  std::vector<uint8_t> narrow, edge;
  Permutes permutes;
};

inline uint8_t byte(int sum, int shift) { return uint8_t(std::clamp(sum >> shift, 0, 255)); }

// Four rows at a time, since they share their weights. out: n pixels, rounded up to four, and four bytes per row.
void across_plain(const uint8_t* const rows[4], const Filter& f, int64_t n, uint8_t* out, int64_t stride) {
  for (int r = 0; r < 4; r++)
    for (int64_t i = 0; i < n; i++)
      for (int c = 0; c < 3; c++) {
        int sum = 1 << (f.shift - 1);
        for (int t = 0; t < f.taps; t++)
          sum += rows[r][(f.first[i] + t) * 3 + c] * f.weights[i * f.taps + t];
        out[r * stride + i * 3 + c] = byte(sum, f.shift);
      }
}

// One row of n bytes from those at rows + t * stride
void down_plain(const uint8_t* rows, int64_t stride, const int16_t* w, int taps, int shift, int64_t n, uint8_t* out) {
  for (int64_t i = 0; i < n; i++) {
    int sum = 1 << (shift - 1);
    for (int t = 0; t < taps; t++) sum += rows[t * stride + i] * w[t];
    out[i] = byte(sum, shift);
  }
}

#if defined(__x86_64__) && !defined(RESNET50_EMULATED)
#pragma GCC push_options
R50_TARGET("avx2")

inline int32_t pair(const int16_t* w) {
  int32_t both;
  std::memcpy(&both, w, 4);
  return both;
}

inline __m256i two(const uint8_t* a, const uint8_t* b) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadl_epi64((const __m128i*)a)),
                                 _mm_loadl_epi64((const __m128i*)b), 1);
}

// A lane of 128 bits is one pixel of one row: red, green, blue and nothing, 32 bits each, from pairs of 16-bit pixels.
void across_avx2(const uint8_t* const rows[4], const Filter& f, int64_t n, uint8_t* out, int64_t stride) {
  const __m256i spread = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1));
  const __m256i close = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
  const __m256i half = _mm256_set1_epi32(1 << (f.shift - 1));
  const __m128i shift = _mm_cvtsi32_si128(f.shift);
  for (int64_t i = 0; i < n; i += 4) {
    __m256i upper[4], lower[4];
    for (int k = 0; k < 4; k++) {
      const int64_t at = int64_t(f.first[i + k]) * 3;
      const int16_t* w = f.weights.data() + (i + k) * f.taps;
      upper[k] = lower[k] = half;
      for (int t = 0; t < f.taps; t += 2) {
        const __m256i both = _mm256_set1_epi32(pair(w + t));
        const __m256i a = _mm256_shuffle_epi8(two(rows[0] + at + t * 3, rows[1] + at + t * 3), spread);
        const __m256i b = _mm256_shuffle_epi8(two(rows[2] + at + t * 3, rows[3] + at + t * 3), spread);
        upper[k] = _mm256_add_epi32(upper[k], _mm256_madd_epi16(a, both));
        lower[k] = _mm256_add_epi32(lower[k], _mm256_madd_epi16(b, both));
      }
      upper[k] = _mm256_sra_epi32(upper[k], shift), lower[k] = _mm256_sra_epi32(lower[k], shift);
    }
    for (int r = 0; r < 4; r += 2) {
      const __m256i* s = r ? lower : upper;
      const __m256i bytes = _mm256_shuffle_epi8(
          _mm256_packus_epi16(_mm256_packs_epi32(s[0], s[1]), _mm256_packs_epi32(s[2], s[3])), close);
      _mm_storeu_si128((__m128i*)(out + r * stride + i * 3), _mm256_castsi256_si128(bytes));
      _mm_storeu_si128((__m128i*)(out + (r + 1) * stride + i * 3), _mm256_extracti128_si256(bytes, 1));
    }
  }
}

inline __m128i down16(const uint8_t* rows, int64_t stride, const int16_t* w, int taps, int shift) {
  __m256i low = _mm256_set1_epi32(1 << (shift - 1)), high = low;
  for (int t = 0; t < taps; t += 2) {
    const __m256i both = _mm256_set1_epi32(pair(w + t));
    const __m128i a = _mm_loadu_si128((const __m128i*)(rows + t * stride));
    const __m128i b = _mm_loadu_si128((const __m128i*)(rows + (t + 1) * stride));
    low = _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(a, b)), both));
    high = _mm256_add_epi32(high, _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_unpackhi_epi8(a, b)), both));
  }
  const __m128i by = _mm_cvtsi32_si128(shift);
  __m256i bytes = _mm256_packs_epi32(_mm256_sra_epi32(low, by), _mm256_sra_epi32(high, by));
  bytes = _mm256_packus_epi16(bytes, bytes);
  bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5));
  return _mm256_castsi256_si128(bytes);
}

// Rows are readable to 32 bytes behind their end.
void down_avx2(const uint8_t* rows, int64_t stride, const int16_t* w, int taps, int shift, int64_t n, uint8_t* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) _mm_storeu_si128((__m128i*)(out + i), down16(rows + i, stride, w, taps, shift));
  if (i < n) {
    uint8_t rest[16];
    _mm_storeu_si128((__m128i*)rest, down16(rows + i, stride, w, taps, shift));
    std::memcpy(out + i, rest, n - i);
  }
}
#pragma GCC pop_options

#pragma GCC push_options
R50_TARGET("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni")

// Reads to 64 bytes behind the first byte of the last pixel, and writes whole blocks of 16.
void across_vbmi(const uint8_t* const rows[4], const Filter& f, const Permutes& p, uint8_t* out, int64_t stride) {
  const __m512i half = _mm512_set1_epi32(1 << (f.shift - 1)), zero = _mm512_setzero_si512();
  const __m128i shift = _mm_cvtsi32_si128(f.shift);
  constexpr __mmask64 LOW_BYTES = 0x5555555555555555;
  const int64_t pairs = f.taps / 2, blocks = int64_t(p.base.size());
  const uint8_t *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3], *index = p.index.data();
  const int32_t *base = p.base.data(), *weights = p.weights.data();
  const auto add = [](__m512i sum, __m512i bytes, __m512i which, __m512i w) __attribute__((always_inline)) {
    return _mm512_dpwssd_epi32(sum, _mm512_maskz_permutexvar_epi8(LOW_BYTES, which, bytes), w);
  };
  const auto store = [&](__m512i sum, uint8_t* to) __attribute__((always_inline)) {
    _mm_storeu_si128((__m128i*)to, _mm512_cvtusepi32_epi8(_mm512_max_epi32(_mm512_sra_epi32(sum, shift), zero)));
  };
  for (int64_t block = 0; block < blocks; block++, out += 16) {
    const __m512i bytes_a = _mm512_loadu_si512(a + base[block]), bytes_b = _mm512_loadu_si512(b + base[block]);
    const __m512i bytes_c = _mm512_loadu_si512(c + base[block]), bytes_d = _mm512_loadu_si512(d + base[block]);
    __m512i sum_a = half, sum_b = half, sum_c = half, sum_d = half;
    for (int64_t t = 0; t < pairs; t++, index += 64, weights += 16) {
      const __m512i which = _mm512_loadu_si512(index), w = _mm512_loadu_si512(weights);
      sum_a = add(sum_a, bytes_a, which, w), sum_b = add(sum_b, bytes_b, which, w);
      sum_c = add(sum_c, bytes_c, which, w), sum_d = add(sum_d, bytes_d, which, w);
    }
    store(sum_a, out), store(sum_b, out + stride), store(sum_c, out + 2 * stride), store(sum_d, out + 3 * stride);
  }
}

inline __m256i down32(const uint8_t* rows, int64_t stride, const int16_t* w, int taps, int shift) {
  __m512i low = _mm512_set1_epi32(1 << (shift - 1)), high = low;
  for (int t = 0; t < taps; t += 2) {
    const __m512i both = _mm512_set1_epi32(pair(w + t));
    const __m512i a = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(rows + t * stride)));
    const __m512i b = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(rows + (t + 1) * stride)));
    low = _mm512_dpwssd_epi32(low, _mm512_unpacklo_epi16(a, b), both);
    high = _mm512_dpwssd_epi32(high, _mm512_unpackhi_epi16(a, b), both);
  }
  const __m128i by = _mm_cvtsi32_si128(shift);
  const __m512i words = _mm512_packs_epi32(_mm512_sra_epi32(low, by), _mm512_sra_epi32(high, by));
  return _mm512_cvtusepi16_epi8(_mm512_max_epi16(words, _mm512_setzero_si512()));
}

void down_vbmi(const uint8_t* rows, int64_t stride, const int16_t* w, int taps, int shift, int64_t n, uint8_t* out) {
  for (int64_t i = 0; i < n; i += 32) {
    const __m256i bytes = down32(rows + i, stride, w, taps, shift);
    _mm256_mask_storeu_epi8(out + i, n - i >= 32 ? ~0u : (1u << (n - i)) - 1, bytes);
  }
}
#pragma GCC pop_options
#else
constexpr auto across_avx2 = across_plain;
constexpr auto down_avx2 = down_plain, down_vbmi = down_plain;
void across_vbmi(const uint8_t* const*, const Filter&, const Permutes&, uint8_t*, int64_t) {}
#endif

}  // namespace

Filter::Filter(const Axis& axis, Kernel kernel) {
  const double scale = axis.size / double(axis.full), wide = std::max(scale, 1.0);
  const double support = (kernel == Kernel::bilinear ? 1 : 2) * wide, narrow = 1 / wide;
  const int64_t n = axis.high - axis.low, most = std::min<int64_t>(int64_t(std::ceil(support)) * 2 + 1, n);
  static thread_local std::vector<double> w;
  w.resize((axis.count + 1) * most);
  std::vector<int32_t> begin(axis.count + 1), count(axis.count + 1);
  double largest = 0;
  for (int64_t i = 0; i < axis.full; i++) {
    // those that are not wanted, perhaps thousands for each that is, have a say in the places and share the last row
    const int64_t row = i >= axis.from && i < axis.from + axis.count ? i - axis.from : axis.count;
    const double center = axis.start - double(axis.low) + (double(i) + 0.5) * scale;
    const int64_t from = std::clamp<int64_t>(int64_t(center - support + 0.5), 0, n - 1);
    const int64_t many = std::clamp<int64_t>(std::min(int64_t(center + support + 0.5), n) - from, 1, most);
    double total = 0, *at = w.data() + row * most;
    for (int64_t j = 0; j < many; j++) total += at[j] = weight(kernel, (double(j + from) - center + 0.5) * narrow);
    if (total == 0) total = at[0] = 1;
    for (int64_t j = 0; j < many; j++) largest = std::max(largest, at[j] /= total);
    begin[row] = int32_t(from), count[row] = int32_t(many);
  }
  shift = 0;
  while (shift < 22 && int(0.5 + largest * (1 << (shift + 1))) < 1 << 15) shift++;

  std::vector<int16_t> whole(axis.count * most);
  int64_t widest = 1;
  for (int64_t i = 0; i < axis.count; i++) {
    int16_t* to = whole.data() + i * most;
    for (int64_t j = 0; j < count[i]; j++) {
      const double value = w[i * most + j] * (1 << shift);
      to[j] = int16_t(value < 0 ? value - 0.5 : value + 0.5);
    }
    int64_t zeros = 0;  // in front, and then behind
    while (zeros + 1 < count[i] && !to[zeros]) zeros++;
    std::copy(to + zeros, to + count[i], to);
    begin[i] += int32_t(zeros), count[i] -= int32_t(zeros);
    while (count[i] > 1 && !to[count[i] - 1]) count[i]--;
    widest = std::max<int64_t>(widest, count[i]);
  }
  const int64_t padded = rounded_up(axis.count, 4);
  taps = int(rounded_up(widest, 2));
  first.resize(padded), weights.assign(padded * taps, 0);
  low = axis.high, high = axis.low;
  for (int64_t i = 0; i < axis.count; i++) {
    const int64_t to = axis.flip ? axis.count - 1 - i : i;
    // all taps are read: they stay inside where there is room
    const int64_t from = std::max<int64_t>(std::min<int64_t>(begin[i], n - taps), 0);
    std::copy_n(whole.data() + i * most, count[i], weights.data() + to * taps + begin[i] - from);
    first[to] = int32_t(axis.low + from);
    low = std::min(low, axis.low + from), high = std::max(high, std::min(axis.low + from + taps, axis.high));
  }
  std::fill(first.begin() + axis.count, first.end(), first[axis.count - 1]);
}

void crop_resize(const uint8_t* rows, int64_t stride, const uint8_t* end, const Axis& y, const Axis& x, Kernel kernel,
                 uint8_t* out) {
  static thread_local Scratch scratch;
  constexpr int BEHIND = 64;  // bytes that the vector kernels read behind a row's last pixel and write behind theirs
  const Filter fx(x, kernel), fy(y, kernel);
  const bool fast = isa() >= Isa::avx2, vbmi = has_avx512_vbmi();
  if (vbmi) scratch.permutes.set(fx, x.count);
  const bool permutes = vbmi && scratch.permutes.fits;
  const int64_t to = rounded_up(x.count * 3, 16) + 16, span = (fx.high - fx.low) * 3, n = x.count * 3;
  // a box of one row has two taps, the second of weight 0
  const int64_t height = std::max<int64_t>(fy.high - fy.low, fy.taps);
  scratch.narrow.resize(rounded_up(height, 4) * to + BEHIND);
  scratch.edge.resize(4 * (span + 2 * BEHIND));
  for (int64_t r = fy.low; r < fy.high; r += 4) {
    const uint8_t* four[4];
    for (int k = 0; k < 4; k++) {
      four[k] = rows + std::min(r + k, fy.high - 1) * stride;
      if (end - (four[k] + fx.high * 3) < BEHIND) {
        uint8_t* copy = scratch.edge.data() + k * (span + 2 * BEHIND);
        std::memcpy(copy, four[k] + fx.low * 3, span);
        four[k] = copy - fx.low * 3;
      }
    }
    uint8_t* narrow = scratch.narrow.data() + (r - fy.low) * to;
    if (permutes)
      across_vbmi(four, fx, scratch.permutes, narrow, to);
    else
      (fast ? across_avx2 : across_plain)(four, fx, x.count, narrow, to);
  }
  const auto down = vbmi ? down_vbmi : fast ? down_avx2 : down_plain;
  for (int64_t i = 0; i < y.count; i++)
    down(scratch.narrow.data() + (fy.first[i] - fy.low) * to, to, fy.weights.data() + i * fy.taps, fy.taps, fy.shift, n,
         out + i * n);
}

}  // namespace r50
