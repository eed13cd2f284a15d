// int8 convolution for AMX.
//
// Unit: 32 rows x 64 channels, as two halves of 2x2 tiles: accumulators tmm0-3, rows in tmm4-5, weights in tmm6-7; per 64 k four loads
// and four tdpbusd, which need 64 cycles and hide the loads while rows or weights are in L1. The accumulators start from the panel's
// start vector (a load with stride 0) and end in a scratch of 32 x 64 int32. From there the rows are finished one by one between the
// tdpbusd of the next unit: tile stores, epilogue and multiplies share only the front end. With k >= 512 one scratch of 8 KiB serves,
// because the first half of a unit already finishes all rows of the one before; two scratches would push weights out of L1.
#include <algorithm>
#include <memory>

#include "conv.h"

#if defined(__x86_64__)
#include "tiles.h"
#include "x86.h"
R50_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,amx-tile,amx-int8,prfchw")
#include "epilogue512.h"

namespace r50 {
namespace {

constexpr int ROWS = 32, WIDTH = 64, STEP = 64;  // a unit; bytes of k per tile
constexpr int BLOCK_BYTES = 32 << 10;            // of activations per pass over the panels
constexpr int SCRATCH = ROWS * WIDTH;

// Rows of a finished unit that still have to leave the scratch, and the lines of the unit after it, fetched for writing meanwhile.
template <class Epilogue>
struct Pending {
  Epilogue& epilogue;
  const int32_t* acc = nullptr;
  int m = 0, row = 0, rows = 0;
  const uint8_t* ahead = nullptr;  // where the unit that is being multiplied will go
  const int32_t* ahead_rows = nullptr;

  void finish(int count) {
    for (; count > 0 && row < rows; count--, row++) {
      epilogue.row(acc + row * WIDTH, m + row);
      __builtin_prefetch(ahead + ahead_rows[row], 1);
    }
  }
};

// One half (registers 2h and 2h + 1 of the panel) of the unit at row m; `rate` rows are finished after each multiply.
template <class Waiting>
inline void half_unit(const Conv& conv, int m, int p, int h, int32_t* acc, Waiting& waiting, int rate, const int8_t*& fetch,
                      int fetches) {
  const Packed& w = *conv.w;
  const int32_t* start = w.start(p) + 32 * h;
  tile_load<0>(start, 0);
  tile_load<1>(start + 16, 0);
  tile_load<2>(start, 0);
  tile_load<3>(start + 16, 0);
  const int8_t* b = w.panel(p) + 128 * h;
  const int second = m + 16 < conv.m ? 16 : 0;  // the last unit may have one group of rows only
  for (int s = 0; s < w.operands; s++) {
    const Operand& in = conv.in[s];
    const uint8_t *a0 = in.a + in.rows[m], *a1 = in.a + in.rows[m + second];
    const int64_t lda = in.lda;
    for (int t = 0; t < in.ntaps; t++) {
      const uint8_t *x0 = a0 + in.taps[t], *x1 = a1 + in.taps[t];
      for (int k = 0; k < in.k; k += STEP, b += STEP * WIDTH) {
        tile_load<4>(x0 + k, lda);
        tile_load<6>(b, 4 * WIDTH);
        tile_dot_u8s8<0, 4, 6>();
        waiting.finish(rate);
        tile_load<7>(b + 64, 4 * WIDTH);
        tile_dot_u8s8<1, 4, 7>();
        waiting.finish(rate);
        tile_load<5>(x1 + k, lda);
        tile_dot_u8s8<2, 5, 6>();
        waiting.finish(rate);
        for (int i = 0; i < fetches; i++, fetch += 64) __builtin_prefetch(fetch, 0, 2);
        tile_dot_u8s8<3, 5, 7>();
        waiting.finish(rate);
      }
    }
  }
  tile_store<0>(acc + 32 * h, 4 * WIDTH);
  tile_store<1>(acc + 32 * h + 16, 4 * WIDTH);
  tile_store<2>(acc + 16 * WIDTH + 32 * h, 4 * WIDTH);
  tile_store<3>(acc + 16 * WIDTH + 32 * h + 16, 4 * WIDTH);
}

struct Nothing {
  void finish(int) {}
};

template <class Epilogue>
void sweep(const Conv& conv, int m0, int m1, int p0, int p1, int block, Epilogue& epilogue) {
  const Packed& w = *conv.w;
  alignas(64) int32_t acc[2 * SCRATCH];
  const int multiplies = 4 * w.ktotal / STEP;  // per half
  const bool single = multiplies >= ROWS;
  const int rate = single ? 1 : (ROWS + 2 * multiplies - 1) / (2 * multiplies);
  Pending<Epilogue> waiting{epilogue};
  int unit = 0, pending_panel = p0, loaded_panel = -1;
  for (int first = m0; first < m1; first += block) {
    const int end = std::min(m1, first + block);
    // the next panel's weights come from beyond L2 when few units share a panel: fetch it, evenly spread, while this one is used
    const int units = (end - first + ROWS - 1) / ROWS;
    const int fetches = units <= 8 ? ROWS / units : 0;
    for (int p = p0; p < p1; p++) {
      const int8_t* fetch = p + 1 < p1 ? w.panel(p + 1) : end < m1 ? w.panel(p0) : conv.next;
      const int lines = fetch ? fetches : 0;
      for (int m = first; m < end; m += ROWS, unit++) {
        int32_t* to = acc + (single ? 0 : (unit & 1) * SCRATCH);
        if (pending_panel != loaded_panel) epilogue.panel(loaded_panel = pending_panel);
        waiting.ahead = conv.out + p * WIDTH;
        waiting.ahead_rows = conv.outs + std::max(0, std::min(m, conv.m - ROWS));  // the last unit may be shorter
        half_unit(conv, m, p, 0, to, waiting, rate, fetch, lines);
        half_unit(conv, m, p, 1, to, waiting, rate, fetch, lines);
        waiting.acc = to;
        waiting.m = m;
        waiting.row = 0;
        waiting.rows = std::min(end, m + ROWS) - m;
        pending_panel = p;
      }
    }
  }
  epilogue.panel(pending_panel);
  waiting.finish(ROWS);
}

}  // namespace

void conv_amx(const Conv& conv, int m0, int m1, int p0, int p1) {
  const int wanted = conv.block ? conv.block : BLOCK_BYTES / conv.w->ktotal;
  const int block = std::clamp(wanted / ROWS * ROWS, ROWS, 16 * ROWS);
  tile_configure();
  if (conv.kind == Out::u8) {
    with_epilogue(conv, [&]<Rounding rounding, bool residual>() {
      Epilogue512<rounding, residual> epilogue(conv);
      sweep(conv, m0, m1, p0, p1, block, epilogue);
    });
  } else {
    alignas(64) int32_t acc[SCRATCH];
    Nothing nothing;
    const int8_t* fetch = nullptr;
    for (int m = m0; m < m1; m += ROWS)
      for (int p = p0; p < p1; p++) {
        for (int h = 0; h < 2; h++) half_unit(conv, m, p, h, acc, nothing, 0, fetch, 0);
        for (int r = 0; r < ROWS && m + r < m1; r++)
          if (conv.outs[m + r] >= 0) finish_row(conv, m + r, p, acc + r * WIDTH);
      }
  }
  tile_release();
}

}  // namespace r50

#else
namespace r50 {
void conv_amx(const Conv& conv, int m0, int m1, int p0, int p1) { conv_plain(conv, m0, m1, p0, p1); }
}  // namespace r50
#endif
