// From 64 finished accumulators per row to 64 bytes, for the AVX-512 kernels. Included under their target pragma.
//
// Register v of 16 lanes holds the channels with 2h + t = v (panel_position in pack.cpp): after the fma the low 16 bits of each lane
// are the rounded value, registers 2h and 2h + 1 are merged into 16-bit words, and one packus puts all 64 channels in order. That is 4
// fma, 2 shifts, 2 blends, 1 pack and 1 store of a whole cache line per row; a residual adds a load, 2 unpacks and 4 vpdpwssd.
#pragma once
#include "conv.h"
#include "x86.h"

namespace r50 {

template <Rounding rounding, bool residual>
struct Epilogue512 {
  __m512 scale[4], addend[4];
  __m512i gain[4];
  __mmask64 valid;
  const Conv& conv;
  int64_t column = 0;

  explicit Epilogue512(const Conv& conv) : conv(conv) {}

  void panel(int p) {
    const Packed& w = *conv.w;
    for (int v = 0; v < 4; v++) {
      scale[v] = _mm512_load_ps(w.scale(p) + 16 * v);
      addend[v] = _mm512_load_ps(w.addend(p) + 16 * v);
      if (residual) gain[v] = _mm512_load_si512(w.gain(p) + 16 * v);
    }
    column = int64_t(p) * 64;
    const int left = w.o - int(column);
    valid = left >= 64 ? ~__mmask64(0) : (__mmask64(1) << left) - 1;
  }

  static __m512i round16(__m512i acc, __m512 scale, __m512 addend) {
    if constexpr (rounding == DOUBLE) {
      const __m512d magic = _mm512_set1_pd(6755399441055744.0);  // 1.5 * 2^52: the low half of the sum is the integer
      const __m512i low = _mm512_castpd_si512(_mm512_fmadd_pd(_mm512_cvtepi32_pd(_mm512_castsi512_si256(acc)),
                                                              _mm512_cvtps_pd(_mm512_castps512_ps256(scale)), magic));
      const __m512i high = _mm512_castpd_si512(_mm512_fmadd_pd(_mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(acc, 1)),
                                                               _mm512_cvtps_pd(_mm512_extractf32x8_ps(scale, 1)), magic));
      const __m512i y = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi64_epi32(low)), _mm512_cvtepi64_epi32(high), 1);
      return _mm512_max_epi32(_mm512_min_epi32(y, _mm512_set1_epi32(32767)), _mm512_set1_epi32(-32768));
    } else {
      const __m512 x = rounding == BIASED ? _mm512_castsi512_ps(acc) : _mm512_cvtepi32_ps(acc);
      return _mm512_castps_si512(_mm512_fmadd_ps(x, scale, addend));
    }
  }

  // acc: 4 registers of 16 int32; m: the output row
  void row(const int32_t* acc, int m) const {
    const int32_t offset = conv.outs[m];
    if (offset < 0) return;
    __m512i sum[4];
    for (int v = 0; v < 4; v++) sum[v] = _mm512_load_si512(acc + 16 * v);
    if constexpr (residual) {
      const __m512i bytes = _mm512_maskz_loadu_epi8(valid, conv.residual + offset + column);
      const __m512i low = _mm512_unpacklo_epi8(bytes, _mm512_setzero_si512());
      const __m512i high = _mm512_unpackhi_epi8(bytes, _mm512_setzero_si512());
      for (int v = 0; v < 4; v++) sum[v] = _mm512_dpwssd_epi32(sum[v], v < 2 ? low : high, gain[v]);
    }
    for (int v = 0; v < 4; v++) sum[v] = round16(sum[v], scale[v], addend[v]);
    const __m512i low = _mm512_mask_blend_epi16(0xaaaaaaaa, sum[0], _mm512_slli_epi32(sum[1], 16));
    const __m512i high = _mm512_mask_blend_epi16(0xaaaaaaaa, sum[2], _mm512_slli_epi32(sum[3], 16));
    _mm512_mask_storeu_epi8(conv.out + offset + column, valid, _mm512_packus_epi16(low, high));
  }
};

// run.template operator()<rounding, residual>() for this convolution
template <class Run>
void with_epilogue(const Conv& conv, Run&& run) {
  const bool residual = conv.residual != nullptr;
  switch (conv.w->rounding) {
    case BIASED: return residual ? run.template operator()<BIASED, true>() : run.template operator()<BIASED, false>();
    case SINGLE: return residual ? run.template operator()<SINGLE, true>() : run.template operator()<SINGLE, false>();
    default: return residual ? run.template operator()<DOUBLE, true>() : run.template operator()<DOUBLE, false>();
  }
}

}  // namespace r50
