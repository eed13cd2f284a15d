// Convolution for AVX-512: int8 by VNNI's vpdpbusd and, in networks, bfloat16 by vdpbf16ps, activations read in place.
// Register tile: 6 rows x 64 channels = 24 accumulators, 4 registers of weights, 1 broadcast of 4 bytes.
#include <algorithm>
#include <cstring>

#include "conv.h"

#if defined(__x86_64__)
#include "x86.h"
R50_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma")
#include "epilogue512.h"

namespace r50 {
namespace {

constexpr int ROWS = 6, WIDTH = 64;
constexpr int BLOCK_BYTES = 256 << 10;  // of activations, to stay in L2 while all panels pass over them

template <int BYTES>  // of an element
R50_INLINE __m512i dot(__m512i sum, __m512i x, __m512i weights) {
  if constexpr (BYTES == 1)
    return _mm512_dpbusd_epi32(sum, x, weights);
  else
    return _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(sum), (__m512bh)x, (__m512bh)weights));
}

template <int R, int BYTES>
void multiply(const Conv& conv, int m, int p, int32_t* acc) {
  const Packed& w = *conv.w;
  __m512i sum[R][4];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < 4; v++) sum[r][v] = _mm512_load_si512(w.start(p) + 16 * v);
  const int8_t* b = w.panel(p);
  for (int s = 0; s < w.operands; s++) {
    const Operand& in = conv.in[s];
    const uint8_t* rows[R];
    for (int r = 0; r < R; r++) rows[r] = in.a + in.rows[m + r];
    for (int t = 0; t < in.ntaps; t++) {
      const int32_t tap = in.taps[t];
      for (int k = 0; k < in.k; k += 4, b += 4 * WIDTH) {
        __m512i weights[4];
        for (int v = 0; v < 4; v++) weights[v] = _mm512_load_si512(b + 64 * v);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
          int32_t four;
          std::memcpy(&four, rows[r] + tap + k, 4);
          const __m512i x = _mm512_set1_epi32(four);
          for (int v = 0; v < 4; v++) sum[r][v] = dot<BYTES>(sum[r][v], x, weights[v]);
        }
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < 4; v++) _mm512_store_si512(acc + r * WIDTH + 16 * v, sum[r][v]);
}

template <int BYTES, class Finish>
void sweep(const Conv& conv, int m0, int m1, int p0, int p1, Finish&& finish) {
  const int block =
      conv.block ? conv.block : std::clamp(BLOCK_BYTES / conv.w->ktotal / ROWS * ROWS, 4 * ROWS, 128 * ROWS);
  for (int first = m0; first < m1; first += block)
    for (int p = p0; p < p1; p++)
      for (int m = first, end = std::min(m1, first + block); m < end; m += ROWS) {
        alignas(64) int32_t acc[ROWS * WIDTH];
        const int rows = std::min(ROWS, end - m);
        switch (rows) {
          case 1: multiply<1, BYTES>(conv, m, p, acc); break;
          case 2: multiply<2, BYTES>(conv, m, p, acc); break;
          case 3: multiply<3, BYTES>(conv, m, p, acc); break;
          case 4: multiply<4, BYTES>(conv, m, p, acc); break;
          case 5: multiply<5, BYTES>(conv, m, p, acc); break;
          default: multiply<6, BYTES>(conv, m, p, acc);
        }
        finish(m, rows, p, acc);
      }
}

}  // namespace

void conv_vnni(const Conv& conv, int m0, int m1, int p0, int p1) {
  if (conv.kind != Out::u8 && conv.kind != Out::bf16) {
    const auto finish = [&](int m, int rows, int p, const int32_t* acc) {
      for (int r = 0; r < rows; r++)
        if (conv.outs[m + r] >= 0) finish_row(conv, m + r, p, acc + r * WIDTH);
    };
    return conv.w->type == Type::int8 ? sweep<1>(conv, m0, m1, p0, p1, finish)
                                      : sweep<2>(conv, m0, m1, p0, p1, finish);
  }
  with_epilogue(conv, [&]<class Epilogue>() {
    sweep<Epilogue::BYTES>(conv, m0, m1, p0, p1, [&](int m, int rows, int p, const int32_t* acc) {
      const Epilogue epilogue(*conv.w, p);
      for (int r = 0; r < rows; r++) {
        const int64_t offset = conv.outs[m + r] + int64_t(p) * WIDTH * Epilogue::BYTES;
        if (conv.outs[m + r] >= 0) epilogue.row(acc + r * WIDTH, conv.residual + offset, conv.out + offset);
      }
    });
  });
}

}  // namespace r50

#else
namespace r50 {
void conv_vnni(const Conv& conv, int m0, int m1, int p0, int p1) { conv_plain(conv, m0, m1, p0, p1); }
}  // namespace r50
#endif
