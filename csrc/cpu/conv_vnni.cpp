// int8 convolution for AVX-512 VNNI: vpdpbusd, activations read in place. Register tile: 6 rows x 64 channels = 24
// accumulators, 4 registers of weights, 1 broadcast of 4 bytes.
#include <algorithm>
#include <cstring>

#include "conv.h"

#if defined(__x86_64__)
#include "x86.h"
R50_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")
#include "epilogue512.h"

namespace r50 {
namespace {

constexpr int ROWS = 6, WIDTH = 64;
constexpr int BLOCK_BYTES = 256 << 10;  // of activations, to stay in L2 while all panels pass over them

template <int R>
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
          for (int v = 0; v < 4; v++) sum[r][v] = _mm512_dpbusd_epi32(sum[r][v], x, weights[v]);
        }
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < 4; v++) _mm512_store_si512(acc + r * WIDTH + 16 * v, sum[r][v]);
}

template <class Finish>
void sweep(const Conv& conv, int m0, int m1, int p0, int p1, Finish&& finish) {
  const int block =
      conv.block ? conv.block : std::clamp(BLOCK_BYTES / conv.w->ktotal / ROWS * ROWS, 4 * ROWS, 128 * ROWS);
  for (int first = m0; first < m1; first += block)
    for (int p = p0; p < p1; p++)
      for (int m = first, end = std::min(m1, first + block); m < end; m += ROWS) {
        alignas(64) int32_t acc[ROWS * WIDTH];
        const int rows = std::min(ROWS, end - m);
        switch (rows) {
          case 1: multiply<1>(conv, m, p, acc); break;
          case 2: multiply<2>(conv, m, p, acc); break;
          case 3: multiply<3>(conv, m, p, acc); break;
          case 4: multiply<4>(conv, m, p, acc); break;
          case 5: multiply<5>(conv, m, p, acc); break;
          default: multiply<6>(conv, m, p, acc);
        }
        finish(m, rows, p, acc);
      }
}

}  // namespace

void conv_vnni(const Conv& conv, int m0, int m1, int p0, int p1) {
  if (conv.kind != Out::u8) {
    sweep(conv, m0, m1, p0, p1, [&](int m, int rows, int p, const int32_t* acc) {
      for (int r = 0; r < rows; r++)
        if (conv.outs[m + r] >= 0) finish_row(conv, m + r, p, acc + r * WIDTH);
    });
    return;
  }
  with_epilogue(conv, [&]<class Epilogue>() {
    sweep(conv, m0, m1, p0, p1, [&](int m, int rows, int p, const int32_t* acc) {
      const Epilogue epilogue(*conv.w, p);
      for (int r = 0; r < rows; r++) {
        const int64_t offset = conv.outs[m + r] + int64_t(p) * WIDTH;
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
