// From 64 finished accumulators per row to 64 results, for the AVX-512 kernels. Included under their target pragma.
//
// int8: register v of 16 lanes holds the channels with 2h + t = v (panel_position in pack.cpp): after the fma the low
// 16 bits of each lane are the rounded value, registers 2h and 2h + 1 are merged into 16-bit words, and one packus puts
// all 64 channels in order. That is 4 fma, 2 shuffles, 1 pack and 1 store of a whole cache line per row; a residual
// adds a load, 2 unpacks and 4 vpdpwssd.
#pragma once
#include <algorithm>
#include <array>

#include "conv.h"
#include "x86.h"

namespace r50 {

// the bytes of the first channels, 1 or more
inline __mmask64 mask_of(int channels) { return ~__mmask64(0) >> (64 - std::min(channels, 64)); }

// The constants of one panel. Made where a loop begins and used by value, so that they stay in registers.
template <Rounding rounding_, bool residual_>
struct Epilogue512 {
  static constexpr Rounding rounding = rounding_;
  static constexpr bool residual = residual_, wide = false;
  static constexpr int BYTES = 1;  // of an element
  __m512 scale0, scale1, scale2, scale3, addend0, addend1, addend2, addend3;
  __m512i gain0, gain1, gain2, gain3;
  __mmask64 valid;

  // vectors: Packed::start() of the panel; left: channels from its first one on
  Epilogue512(const int32_t* vectors, int left) {
    const auto* scale = reinterpret_cast<const float*>(vectors + 64);
    const float* addend = scale + 64;
    const int32_t* gain = vectors + 3 * 64;
    scale0 = _mm512_load_ps(scale), scale1 = _mm512_load_ps(scale + 16);
    scale2 = _mm512_load_ps(scale + 32), scale3 = _mm512_load_ps(scale + 48);
    addend0 = _mm512_load_ps(addend), addend1 = _mm512_load_ps(addend + 16);
    addend2 = _mm512_load_ps(addend + 32), addend3 = _mm512_load_ps(addend + 48);
    gain0 = _mm512_load_si512(gain), gain1 = _mm512_load_si512(gain + 16);
    gain2 = _mm512_load_si512(gain + 32), gain3 = _mm512_load_si512(gain + 48);
    valid = mask_of(left);
  }

  static R50_INLINE __m512i round16(__m512i acc, __m512 scale, __m512 addend) {
    if constexpr (rounding == DOUBLE) {
      const __m512d magic = _mm512_set1_pd(6755399441055744.0);  // 1.5 * 2^52: the low half of the sum is the integer
      const __m512i low = _mm512_castpd_si512(_mm512_fmadd_pd(_mm512_cvtepi32_pd(_mm512_castsi512_si256(acc)),
                                                              _mm512_cvtps_pd(_mm512_castps512_ps256(scale)), magic));
      const __m512i high =
          _mm512_castpd_si512(_mm512_fmadd_pd(_mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(acc, 1)),
                                              _mm512_cvtps_pd(_mm512_extractf32x8_ps(scale, 1)), magic));
      const __m512i y =
          _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi64_epi32(low)), _mm512_cvtepi64_epi32(high), 1);
      return _mm512_max_epi32(_mm512_min_epi32(y, _mm512_set1_epi32(32767)), _mm512_set1_epi32(-32768));
    } else {
      const __m512 x = rounding == BIASED ? _mm512_castsi512_ps(acc) : _mm512_cvtepi32_ps(acc);
      return _mm512_castps_si512(_mm512_fmadd_ps(x, scale, addend));
    }
  }

  // A row's 4 registers of 16 accumulators begin with the residual, whose first byte of this panel is at `from`.
  R50_INLINE void add(__m512i& sum0, __m512i& sum1, __m512i& sum2, __m512i& sum3, const uint8_t* from) const {
    const __m512i bytes = _mm512_maskz_loadu_epi8(valid, from);
    const __m512i low = _mm512_unpacklo_epi8(bytes, _mm512_setzero_si512());
    const __m512i high = _mm512_unpackhi_epi8(bytes, _mm512_setzero_si512());
    sum0 = _mm512_dpwssd_epi32(sum0, low, gain0), sum1 = _mm512_dpwssd_epi32(sum1, low, gain1);
    sum2 = _mm512_dpwssd_epi32(sum2, high, gain2), sum3 = _mm512_dpwssd_epi32(sum3, high, gain3);
  }

  // the low halves of `odd`'s lanes in place of the high halves of `even`'s
  static R50_INLINE __m512i merge(__m512i even, __m512i odd) {
    const __m512i up = _mm512_set4_epi32(0x0d0c0000, 0x09080000, 0x05040000, 0x01000000);
    return _mm512_mask_shuffle_epi8(even, 0xcccccccccccccccc, odd, up);
  }

  R50_INLINE void store(__m512i sum0, __m512i sum1, __m512i sum2, __m512i sum3, uint8_t* to) const {
    const __m512i low = merge(round16(sum0, scale0, addend0), round16(sum1, scale1, addend1));
    const __m512i high = merge(round16(sum2, scale2, addend2), round16(sum3, scale3, addend3));
    _mm512_mask_storeu_epi8(to, valid, _mm512_packus_epi16(low, high));
  }
};

alignas(64) inline constexpr auto UPPER = [] {  // of each lane: the words of 32 in two registers of float32
  std::array<uint16_t, 64> from{};
  for (int i = 0; i < 32; i++) from[2 * i + 1] = uint16_t(i);
  return from;
}();

// What Epilogue512 is for int8, for bfloat16: the accumulators have bias and scale in them already.
template <bool residual_>
struct EpilogueBf16 {
  static constexpr bool residual = residual_, wide = false;
  static constexpr int BYTES = 2;  // of an element
  __mmask32 valid0, valid1;

  EpilogueBf16(const int32_t*, int left) {
    valid0 = __mmask32(mask_of(left)), valid1 = __mmask32(mask_of(left) >> 32);
  }

  R50_INLINE void add(__m512i& sum0, __m512i& sum1, __m512i& sum2, __m512i& sum3, const uint8_t* from) const {
    add(sum0, sum1, _mm512_maskz_loadu_epi16(valid0, from));
    add(sum2, sum3, _mm512_maskz_loadu_epi16(valid1, from + 64));
  }
  static R50_INLINE void add(__m512i& sum0, __m512i& sum1, __m512i other) {  // word i moves to word 2 i + 1
    const __m512i first = _mm512_load_si512(UPPER.data()), second = _mm512_load_si512(UPPER.data() + 32);
    const __m512i low = _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, first, other);
    const __m512i high = _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, second, other);
    sum0 = _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(sum0), _mm512_castsi512_ps(low)));
    sum1 = _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(sum1), _mm512_castsi512_ps(high)));
  }

  // 32 channels. A NaN stays one, as the maximum's second operand; cleared signs leave no -0, so that the order of
  // results is that of their bits, as max_pool needs it.
  static R50_INLINE void store(__m512i sum0, __m512i sum1, uint8_t* to, __mmask32 valid) {
    const __m512 zero = _mm512_castsi512_ps(_mm512_setzero_si512());
    const __m512 low = _mm512_max_ps(zero, _mm512_castsi512_ps(sum0));
    const __m512 high = _mm512_max_ps(zero, _mm512_castsi512_ps(sum1));
    const __m512bh y = _mm512_cvtne2ps_pbh(high, low);
    _mm512_mask_storeu_epi16(to, valid, _mm512_and_si512((__m512i)y, _mm512_set1_epi32(0x7fff7fff)));
  }
  R50_INLINE void store(__m512i sum0, __m512i sum1, __m512i sum2, __m512i sum3, uint8_t* to) const {
    store(sum0, sum1, to, valid0);
    store(sum2, sum3, to + 64, valid1);
  }
};

// 32-bit results, for the last layer: finish_row() makes them
template <int BYTES_>
struct Wide {
  static constexpr bool wide = true;
  static constexpr int BYTES = BYTES_;
  Wide(const int32_t*, int) {}
};

// run.template operator()<the epilogue>() for this convolution
template <class Run>
void with_epilogue(const Conv& conv, Run&& run) {
  const bool is_bf16 = conv.w->type == Type::bf16;
  const auto either = [&]<class First, class Second>(bool second) {
    second ? run.template operator()<Second>() : run.template operator()<First>();
  };
  if (conv.kind == Out::s32 || conv.kind == Out::f32) return either.template operator()<Wide<1>, Wide<2>>(is_bf16);
  const bool residual = conv.residual != nullptr;
  if (is_bf16) return either.template operator()<EpilogueBf16<false>, EpilogueBf16<true>>(residual);
  switch (conv.w->rounding) {
    case BIASED: return either.template operator()<Epilogue512<BIASED, false>, Epilogue512<BIASED, true>>(residual);
    case SINGLE: return either.template operator()<Epilogue512<SINGLE, false>, Epilogue512<SINGLE, true>>(residual);
    default: return either.template operator()<Epilogue512<DOUBLE, false>, Epilogue512<DOUBLE, true>>(residual);
  }
}

}  // namespace r50
