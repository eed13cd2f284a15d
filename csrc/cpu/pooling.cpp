#include "pooling.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "vec.h"

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace r50 {

// n bytes less n others, as bfloat16: whole numbers of 8 bits and a sign, of which the lower half of a float is 0
WIDEST static void differences(const uint8_t* from, const uint8_t* value, int64_t n, uint8_t* out) {
  typedef uint16_t Half __attribute__((aligned(1), may_alias));
  auto* to = reinterpret_cast<Half*>(out);
  for (int64_t i = 0; i < n; i++) to[i] = uint16_t(std::bit_cast<uint32_t>(float(from[i] - value[i])) >> 16);
}
WIDEST static void differences_f32(const uint8_t* from, const float* value, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i++) to[i] = float(from[i]) - value[i];
}

template <class T>
static std::vector<T> repeated(const T* value, int c, int64_t n, int times) {  // null: zeros
  std::vector<T> line(n * times);
  for (int64_t i = 0; value && i < int64_t(line.size()); i += int64_t(c) * times)
    for (int k = 0; k < c; k++) std::fill_n(line.begin() + i + k * times, times, value[k]);
  return line;
}

void load_images(const uint8_t* pixels, int c, const uint8_t* value, Type type, uint8_t* out, const Layout& to, int n0,
                 int n1, int y0, int y1) {
  const int together = to.dense() ? to.w : 1;  // pixels
  const int64_t run = int64_t(together) * c;
  const auto bytes = repeated(value, c, type == Type::bf16 ? run : 0, 1);
  const auto floats = repeated(reinterpret_cast<const float*>(value), c, type == Type::f32 ? run : 0, 1);
  for (int n = n0; n < n1; n++)
    for (int y = y0; y < y1; y++)
      for (int x = 0; x < to.w; x += together) {
        const uint8_t* from = pixels + ((int64_t(n) * to.h + y) * to.w + x) * c;
        uint8_t* line = out + to.at(n, y, x);
        if (type == Type::int8)
          std::memcpy(line, from, run);
        else if (type == Type::bf16)
          differences(from, bytes.data(), run, line);
        else
          differences_f32(from, floats.data(), run, reinterpret_cast<float*>(line));
      }
}

#if defined(__x86_64__)
// 16 bytes of each of 8 rows -> 16 groups of 8: three rounds of interleaving rows 0 and 4, 1 and 5, ...
static inline void interleave8(const uint8_t* const rows[8], int64_t at, uint8_t* out) {
  __m128i a[8], b[8];
  for (int r = 0; r < 8; r++) a[r] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r] + at));
  for (int round = 0; round < 3; round++) {
    for (int i = 0; i < 4; i++) {
      b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 4]);
      b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 4]);
    }
    std::memcpy(a, b, sizeof a);
  }
  for (int i = 0; i < 8; i++) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * i), a[i]);
}
#endif

void load_windows(const uint8_t* pixels, int h, int w, int c, const uint8_t* value, Type type, int stride, int pad,
                  uint8_t* out, const Layout& to, int n0, int n1, int y0, int y1) {
  const int64_t row = int64_t(w) * c, edge = int64_t(pad) * c, all = row + 2 * edge;
  const auto outside = repeated(value, c, row, 1), sides = repeated(value, c, edge, 8);
  const auto values = repeated(value, c, type == Type::int8 ? 0 : all, 8);
  std::vector<uint8_t> bytes(values.size());
  for (int n = n0; n < n1; n++)
    for (int y = y0; y < y1; y++) {
      const uint8_t* rows[8];
      for (int r = 0; r < 8; r++) {
        const int from = y * stride - pad + r;
        rows[r] = from >= 0 && from < h ? pixels + (int64_t(n) * h + from) * row : outside.data();
      }
      uint8_t* line = type == Type::int8 ? out + to.at(n, y, 0) : bytes.data();
      std::memcpy(line, sides.data(), 8 * edge);
      std::memcpy(line + 8 * (edge + row), sides.data(), 8 * edge);
      int64_t i = 0;
#if defined(__x86_64__)
      for (; i + 16 <= row; i += 16) interleave8(rows, i, line + 8 * (edge + i));
#endif
      for (; i < row; i++)
        for (int r = 0; r < 8; r++) line[8 * (edge + i) + r] = rows[r][i];
      if (type == Type::bf16) differences(line, values.data(), 8 * all, out + to.at(n, y, 0));
    }
}

void fill_border(uint8_t* out, const Layout& to, const uint8_t* value) {
  if (!value) {
    std::memset(out, 0, to.bytes);
    return;
  }
  for (int64_t i = 0; i < to.bytes; i++) out[i] = value[i % to.c];  // origin and all distances are multiples of c
}

template <class T, int BYTES>  // of a vector
static INLINE void max_pool_of(const uint8_t* in, const Layout& from, uint8_t* out, const Layout& to, int n0, int n1,
                               int y0, int y1) {
  typedef T Line __attribute__((vector_size(BYTES), aligned(1), may_alias));
  typedef T One __attribute__((aligned(1), may_alias));
  constexpr int STRIP = 4;  // pixels; one slice of their channels is made after the other, and they stay in L1
  const int bytes = from.c, width = from.w;
  std::vector<int64_t> offsets(width + to.w);  // of columns; behind pointers, whose use calls no function
  int64_t *const columns = offsets.data(), *const results = columns + width;
  for (int x = 0; x < width; x++) columns[x] = from.at(0, 0, x) - from.at(0, 0, 0);
  for (int x = 0; x < to.w; x++) results[x] = to.at(0, 0, x) - to.at(0, 0, 0);
  for (int n = n0; n < n1; n++)
    for (int y = y0; y < y1; y++) {
      // at the edges a pixel is looked at twice, which does not change the largest
      const auto row = [&](int i) { return in + from.at(n, std::clamp(i, 0, from.h - 1), 0); };
      const uint8_t *const above = row(2 * y - 1), *const middle = row(2 * y), *const below = row(2 * y + 1);
      uint8_t* const line = out + to.at(n, y, 0);
      for (int x0 = 0; x0 < to.w; x0 += STRIP) {
        const int x1 = std::min(x0 + STRIP, to.w);
        const auto slice = [&]<class V>(int k) __attribute__((always_inline)) {
          const auto largest = [](V a, V b) __attribute__((always_inline)) { return a > b ? a : b; };
          const auto column = [&](int x) __attribute__((always_inline)) {
            const int64_t at = columns[x] + k;
            return largest(largest(*reinterpret_cast<const V*>(above + at), *reinterpret_cast<const V*>(middle + at)),
                           *reinterpret_cast<const V*>(below + at));
          };
          V before = column(std::max(2 * x0 - 1, 0));
          for (int x = x0; x < x1; x++) {
            const V here = column(2 * x), after = 2 * x + 1 < width ? column(2 * x + 1) : here;
            *reinterpret_cast<V*>(line + results[x] + k) = largest(largest(before, here), after);
            before = after;
          }
        };
        int k = 0;
        for (; k + BYTES <= bytes; k += BYTES) slice.template operator()<Line>(k);
        for (; k < bytes; k += sizeof(T)) slice.template operator()<One>(k);
      }
    }
}

template <int BYTES>
static INLINE void max_pool_by(Type type, const uint8_t* in, const Layout& from, uint8_t* out, const Layout& to, int n0,
                               int n1, int y0, int y1) {
  switch (type) {  // numbers without a sign are ordered as their bits
    case Type::int8: return max_pool_of<uint8_t, BYTES>(in, from, out, to, n0, n1, y0, y1);
    case Type::bf16: return max_pool_of<uint16_t, BYTES>(in, from, out, to, n0, n1, y0, y1);
    case Type::f32: return max_pool_of<uint32_t, BYTES>(in, from, out, to, n0, n1, y0, y1);
  }
}
TARGET("avx512f,avx512bw")
static void max_pool_64(Type type, const uint8_t* in, const Layout& from, uint8_t* out, const Layout& to, int n0,
                        int n1, int y0, int y1) {
  max_pool_by<64>(type, in, from, out, to, n0, n1, y0, y1);
}
TARGET("avx2")
static void max_pool_32(Type type, const uint8_t* in, const Layout& from, uint8_t* out, const Layout& to, int n0,
                        int n1, int y0, int y1) {
  max_pool_by<32>(type, in, from, out, to, n0, n1, y0, y1);
}

void max_pool(Type type, const uint8_t* in, const Layout& from, uint8_t* out, const Layout& to, int n0, int n1, int y0,
              int y1) {
  if (isa() >= Isa::vnni) return max_pool_64(type, in, from, out, to, n0, n1, y0, y1);
  if (isa() >= Isa::avx2) return max_pool_32(type, in, from, out, to, n0, n1, y0, y1);
  max_pool_by<16>(type, in, from, out, to, n0, n1, y0, y1);
}

WIDEST void average_pool(const uint8_t* in, const Layout& from, uint8_t* out, const Layout& to, int32_t mult, int n0,
                         int n1) {
  constexpr int FIT = 65535 / 255;  // pixels whose sum stays in 16 bits
  const int c = from.c, pixels = from.h * from.w;
  std::vector<uint16_t> part(c);
  std::vector<uint32_t> sum(c);
  const int32_t j = (mult + pixels / 2) / pixels;
  for (int n = n0; n < n1; n++) {
    std::fill(part.begin(), part.end(), 0);
    std::fill(sum.begin(), sum.end(), 0);
    for (int i = 0; i < pixels; i++) {
      const uint8_t* a = in + from.at(n, i / from.w, i % from.w);
      for (int k = 0; k < c; k++) part[k] += a[k];
      if (i % FIT == FIT - 1 || i == pixels - 1)
        for (int k = 0; k < c; k++) sum[k] += part[k], part[k] = 0;
    }
    // requantize(sum, j) in doubles, exact: the product is at most 255 mult, and behind the addend there is no room for
    // a fraction, so the one addition rounds half to even
    constexpr double ADDEND = 6755399441055744.0;  // 1.5 * 2^52
    uint8_t* to_pixel = out + to.at(n, 0, 0);
    for (int k = 0; k < c; k++) {
      const double y = (double(sum[k]) * (double(j) / (1 << MULT_BITS)) + ADDEND) - ADDEND;
      to_pixel[k] = uint8_t(int32_t(std::clamp(y, 0.0, 255.0)));
    }
  }
}

WIDEST void average_pool_floats(Type type, const uint8_t* in, const Layout& from, uint8_t* out, const Layout& to,
                                int n0, int n1) {
  const int channels = from.c / bytes_of(type), pixels = from.h * from.w;
  std::vector<float> sum(channels);
  for (int n = n0; n < n1; n++) {
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (int i = 0; i < pixels; i++) {
      const uint8_t* a = in + from.at(n, i / from.w, i % from.w);
      if (type == Type::f32)
        for (int k = 0; k < channels; k++) sum[k] += reinterpret_cast<const float*>(a)[k];
      else
        for (int k = 0; k < channels; k++)
          sum[k] += std::bit_cast<float>(uint32_t(reinterpret_cast<const uint16_t*>(a)[k]) << 16);
    }
    uint8_t* to_pixel = out + to.at(n, 0, 0);
    for (int k = 0; k < channels; k++) {
      const float mean = sum[k] / float(pixels);
      const uint32_t bits = std::bit_cast<uint32_t>(mean);
      if (type == Type::f32)
        reinterpret_cast<float*>(to_pixel)[k] = mean;
      else
        reinterpret_cast<uint16_t*>(to_pixel)[k] = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // half to even
    }
  }
}

}  // namespace r50
