// The AVX-512 intrinsics that the kernels of networks use, as plain C++, so that any CPU runs the kernels' own source.
//
// Each function does what Intel's Software Developer's Manual says of its instruction, element by element; there are no
// more of them than the kernels call. An aligned access of an unaligned address, a fault on the processor, throws.
// Masked loads and stores touch the selected bytes only, so that a sanitizer sees what the processor would fault on.
#pragma once
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>

template <class T, int N, int ALIGNMENT>
struct alignas(ALIGNMENT) EmulatedVector {
  std::array<T, N> lane;
};
using __m256 = EmulatedVector<float, 8, 32>;
using __m256i = EmulatedVector<int32_t, 8, 32>;
using __m512 = EmulatedVector<float, 16, 64>;
using __m512d = EmulatedVector<double, 8, 64>;
using __m512i = EmulatedVector<int32_t, 16, 64>;
using __m512bh = __m512i;  // its 32 halves, of which the kernels see the bits alone
using __mmask16 = uint16_t;
using __mmask32 = uint32_t;
using __mmask64 = uint64_t;

namespace emulated {

// the same bits as lanes of another type, and back
template <class T, class V>
std::array<T, sizeof(V) / sizeof(T)> lanes(const V& v) {
  return std::bit_cast<std::array<T, sizeof(V) / sizeof(T)>>(v);
}
template <class V, class T, size_t N>
V vector(const std::array<T, N>& lanes) {
  static_assert(sizeof(V) == sizeof lanes, "every bit of the register has a value");
  return std::bit_cast<V>(lanes);
}

template <class V, class F>
V each(F&& f) {  // lane i = f(i)
  V v;
  for (size_t i = 0; i < v.lane.size(); i++) v.lane[i] = f(i);
  return v;
}

inline void check_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64)
    throw std::runtime_error("emulated AVX-512: an aligned access of an unaligned address");
}
template <class V>
V load(const void* p) {
  check_aligned(p);
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class To, class From>
To saturate(From x) {
  return To(x < From(std::numeric_limits<To>::min()) ? std::numeric_limits<To>::min()
            : x > From(std::numeric_limits<To>::max()) ? std::numeric_limits<To>::max() : x);
}

inline float flushed(float x) {  // denormals are zeros
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}

// float32 -> bfloat16 as VCVTNE2PS2PBF16 does: half to even, a NaN quiet, denormals to zeros
inline uint16_t half(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(flushed(x));
  if (std::isnan(x)) return uint16_t(bits >> 16 | 0x40);
  const uint32_t kept = bits >> 16, rest = bits & 0xffff;
  return uint16_t(kept + (rest > 0x8000 || (rest == 0x8000 && kept & 1)));
}

// bytes of a and b in turn, from the low (0) or high (8) half of each 128-bit part
inline __m512i unpack(const __m512i& a, const __m512i& b, int half) {
  const auto x = lanes<uint8_t>(a), y = lanes<uint8_t>(b);
  std::array<uint8_t, 64> to;
  for (int part = 0; part < 64; part += 16)
    for (int i = 0; i < 8; i++) to[part + 2 * i] = x[part + half + i], to[part + 2 * i + 1] = y[part + half + i];
  return vector<__m512i>(to);
}

}  // namespace emulated

// ------------------------------------------------------------------------------------------------ memory
inline __m512 _mm512_load_ps(const void* p) { return emulated::load<__m512>(p); }
inline __m512i _mm512_load_si512(const void* p) { return emulated::load<__m512i>(p); }
inline void _mm512_store_si512(void* p, const __m512i& v) {
  emulated::check_aligned(p);
  std::memcpy(p, &v, sizeof v);
}
inline __m512i _mm512_maskz_loadu_epi8(__mmask64 mask, const void* p) {
  std::array<uint8_t, 64> to{};
  for (int i = 0; i < 64; i++)
    if (mask >> i & 1) to[i] = static_cast<const uint8_t*>(p)[i];
  return emulated::vector<__m512i>(to);
}
inline void _mm512_mask_storeu_epi8(void* p, __mmask64 mask, const __m512i& v) {
  const auto from = emulated::lanes<uint8_t>(v);
  for (int i = 0; i < 64; i++)
    if (mask >> i & 1) static_cast<uint8_t*>(p)[i] = from[i];
}
inline __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* p) {
  std::array<uint16_t, 32> to{};
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1) std::memcpy(&to[i], static_cast<const uint8_t*>(p) + 2 * i, 2);
  return emulated::vector<__m512i>(to);
}
inline void _mm512_mask_storeu_epi16(void* p, __mmask32 mask, const __m512i& v) {
  const auto from = emulated::lanes<uint16_t>(v);
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1) std::memcpy(static_cast<uint8_t*>(p) + 2 * i, &from[i], 2);
}

inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* p) {
  __m512 to{};
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) std::memcpy(&to.lane[i], static_cast<const float*>(p) + i, 4);
  return to;
}
inline void _mm512_mask_storeu_ps(void* p, __mmask16 mask, const __m512& v) {
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) std::memcpy(static_cast<float*>(p) + i, &v.lane[i], 4);
}

// ------------------------------------------------------------------------------------- constants and casts
inline __m512i _mm512_setzero_si512() { return {}; }
inline __m512i _mm512_set1_epi32(int32_t x) { return emulated::each<__m512i>([&](int) { return x; }); }
inline __m512i _mm512_set4_epi32(int32_t d, int32_t c, int32_t b, int32_t a) {
  return emulated::each<__m512i>([&](int i) { return std::array{a, b, c, d}[i % 4]; });
}
inline __m512d _mm512_set1_pd(double x) { return emulated::each<__m512d>([&](int) { return x; }); }
inline __m512 _mm512_castsi512_ps(const __m512i& v) { return std::bit_cast<__m512>(v); }
inline __m512i _mm512_castps_si512(const __m512& v) { return std::bit_cast<__m512i>(v); }
inline __m512i _mm512_castpd_si512(const __m512d& v) { return std::bit_cast<__m512i>(v); }
inline __m256i _mm512_extracti64x4_epi64(const __m512i& v, int half) {
  return emulated::each<__m256i>([&](int i) { return v.lane[8 * half + i]; });
}
inline __m256 _mm512_extractf32x8_ps(const __m512& v, int half) {
  return emulated::each<__m256>([&](int i) { return v.lane[8 * half + i]; });
}
inline __m256i _mm512_castsi512_si256(const __m512i& v) { return _mm512_extracti64x4_epi64(v, 0); }
inline __m256 _mm512_castps512_ps256(const __m512& v) { return _mm512_extractf32x8_ps(v, 0); }
inline __m512i _mm512_inserti64x4(const __m512i& v, const __m256i& x, int half) {
  return emulated::each<__m512i>([&](int i) { return i / 8 == half ? x.lane[i % 8] : v.lane[i]; });
}
inline __m512i _mm512_castsi256_si512(const __m256i& v) {  // the upper half is undefined: something that would be seen
  return _mm512_inserti64x4(_mm512_set1_epi32(int32_t(0xdeadbeef)), v, 0);
}

// ----------------------------------------------------------------------------------------------- numbers
inline __m512 _mm512_cvtepi32_ps(const __m512i& v) {  // rounds to nearest even, as the default mode says
  return emulated::each<__m512>([&](int i) { return float(v.lane[i]); });
}
inline __m512d _mm512_cvtepi32_pd(const __m256i& v) {
  return emulated::each<__m512d>([&](int i) { return double(v.lane[i]); });
}
inline __m512d _mm512_cvtps_pd(const __m256& v) {
  return emulated::each<__m512d>([&](int i) { return double(v.lane[i]); });
}
inline __m256i _mm512_cvtepi64_epi32(const __m512i& v) {  // the low half of each
  return emulated::each<__m256i>([&](int i) { return v.lane[2 * i]; });
}
inline __m512bh _mm512_cvtne2ps_pbh(const __m512& high, const __m512& low) {  // the second operand is the lower half
  std::array<uint16_t, 32> to;
  for (int i = 0; i < 16; i++) to[i] = emulated::half(low.lane[i]), to[16 + i] = emulated::half(high.lane[i]);
  return emulated::vector<__m512bh>(to);
}
inline __m512 _mm512_add_ps(const __m512& a, const __m512& b) {
  return emulated::each<__m512>([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline __m512 _mm512_max_ps(const __m512& a, const __m512& b) {  // b where they are equal, or one is a NaN
  return emulated::each<__m512>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline __m512 _mm512_fmadd_ps(const __m512& a, const __m512& b, const __m512& c) {  // one rounding
  return emulated::each<__m512>([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
}
inline __m512d _mm512_fmadd_pd(const __m512d& a, const __m512d& b, const __m512d& c) {
  return emulated::each<__m512d>([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
}
inline __m512i _mm512_and_si512(const __m512i& a, const __m512i& b) {
  return emulated::each<__m512i>([&](int i) { return a.lane[i] & b.lane[i]; });
}
inline __m512i _mm512_min_epi32(const __m512i& a, const __m512i& b) {
  return emulated::each<__m512i>([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline __m512i _mm512_max_epi32(const __m512i& a, const __m512i& b) {
  return emulated::each<__m512i>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}

// --------------------------------------------------------------------------------------- bytes and words
inline __m512i _mm512_unpacklo_epi8(const __m512i& a, const __m512i& b) { return emulated::unpack(a, b, 0); }
inline __m512i _mm512_unpackhi_epi8(const __m512i& a, const __m512i& b) { return emulated::unpack(a, b, 8); }
inline __m512i _mm512_cvtepu8_epi16(const __m256i& v) {
  const auto from = emulated::lanes<uint8_t>(v);
  std::array<uint16_t, 32> to;
  for (int i = 0; i < 32; i++) to[i] = from[i];
  return emulated::vector<__m512i>(to);
}
inline __m512i _mm512_mask_shuffle_epi8(const __m512i& kept, __mmask64 mask, const __m512i& v, const __m512i& from) {
  auto to = emulated::lanes<uint8_t>(kept);
  const auto bytes = emulated::lanes<uint8_t>(v), index = emulated::lanes<uint8_t>(from);
  for (int i = 0; i < 64; i++)  // of its own 128 bits; 0 where the index is negative
    if (mask >> i & 1) to[i] = index[i] & 128 ? 0 : bytes[i / 16 * 16 + (index[i] & 15)];
  return emulated::vector<__m512i>(to);
}
inline __m512i _mm512_maskz_permutexvar_epi16(__mmask32 mask, const __m512i& from, const __m512i& v) {
  const auto words = emulated::lanes<uint16_t>(v), index = emulated::lanes<uint16_t>(from);
  std::array<uint16_t, 32> to{};
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1) to[i] = words[index[i] & 31];
  return emulated::vector<__m512i>(to);
}
inline __m512i _mm512_packus_epi16(const __m512i& a, const __m512i& b) {  // per 128 bits: 8 of a, 8 of b
  const auto x = emulated::lanes<int16_t>(a), y = emulated::lanes<int16_t>(b);
  std::array<uint8_t, 64> to;
  for (int i = 0; i < 64; i++) to[i] = emulated::saturate<uint8_t>((i & 8 ? y : x)[i / 16 * 8 + i % 8]);
  return emulated::vector<__m512i>(to);
}
inline __m512i _mm512_dpbusd_epi32(const __m512i& sum, const __m512i& a, const __m512i& b) {  // wraps, never saturates
  const auto x = emulated::lanes<uint8_t>(a);
  const auto y = emulated::lanes<int8_t>(b);
  return emulated::each<__m512i>([&](int i) {
    int32_t dot = 0;
    for (int j = 4 * i; j < 4 * i + 4; j++) dot += x[j] * y[j];
    return int32_t(uint32_t(sum.lane[i]) + uint32_t(dot));
  });
}
// Even and odd products are two steps of fma; denormals count as zeros whatever MXCSR says.
inline __m512 _mm512_dpbf16_ps(const __m512& sum, const __m512bh& a, const __m512bh& b) {
  const auto x = emulated::lanes<uint16_t>(a), y = emulated::lanes<uint16_t>(b);
  const auto wide = [](uint16_t bits) { return emulated::flushed(std::bit_cast<float>(uint32_t(bits) << 16)); };
  return emulated::each<__m512>([&](int i) {
    const float odd = emulated::flushed(
        std::fma(wide(x[2 * i + 1]), wide(y[2 * i + 1]), emulated::flushed(sum.lane[i])));
    return emulated::flushed(std::fma(wide(x[2 * i]), wide(y[2 * i]), odd));
  });
}
inline __m512i _mm512_dpwssd_epi32(const __m512i& sum, const __m512i& a, const __m512i& b) {
  const auto x = emulated::lanes<int16_t>(a), y = emulated::lanes<int16_t>(b);
  return emulated::each<__m512i>([&](int i) {
    const int64_t dot = int64_t(x[2 * i]) * y[2 * i] + int64_t(x[2 * i + 1]) * y[2 * i + 1];
    return int32_t(uint32_t(sum.lane[i]) + uint32_t(dot));
  });
}
