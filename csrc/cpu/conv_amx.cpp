// int8 convolution for AMX.
//
// Unit: 32 rows x 64 channels, as two halves of 2x2 tiles: accumulators tmm0-3, rows in tmm4-5, weights in tmm6-7; per
// 64 k four loads and four tdpbusd, which need 64 cycles and hide the loads while rows or weights are in L1. The
// accumulators start from the panel's start vector (a load with stride 0) and end in a scratch of 32 x 64 int32. From
// there the rows are finished one by one between the tdpbusd of the next unit: tile stores, epilogue and multiplies
// share only the front end. With k >= 512 one scratch of 8 KiB serves, because the first half of a unit already
// finishes all rows of the one before; two scratches would push weights out of L1.
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

constexpr int ROWS = 32, WIDTH = 64, HALF = 32, STEP = 64;  // a unit, in halves of its width; bytes of k per tile
constexpr int SCRATCH = ROWS * WIDTH;
constexpr int BLOCK_BYTES = 32 << 10;  // of activations per pass over the panels: they stay in L1
constexpr int FEW = 8;  // units; with so few per panel the weights are used hardly faster than they arrive

// A unit whose rows wait in the scratch, or, on the way there, is multiplied.
struct Unit {
  const int32_t* acc = nullptr;
  int m = 0, rows = 0, panel = 0;  // rows is 16 or 32
};

// The rows of a finished unit, leaving the scratch one after the other, `RATE` at each call; meanwhile the lines that
// the unit in work will fill are fetched for writing.
template <class Epilogue, int RATE>
struct Leaving {
  const Epilogue epilogue;
  const uint8_t* residual;
  uint8_t *out, *ahead;
  const int32_t *acc, *outs;
  int64_t ahead_rows;  // how much further on than `outs`
  int left;

  Leaving(const Conv& conv, const Unit& unit, const Unit& next, int done)
      : epilogue(*conv.w, unit.panel), residual(conv.residual + unit.panel * WIDTH), out(conv.out + unit.panel * WIDTH),
        ahead(conv.out + next.panel * WIDTH), acc(unit.acc + done * WIDTH), outs(conv.outs + unit.m + done),
        ahead_rows(std::max(0, std::min(next.m, conv.m - ROWS)) - unit.m),  // the last unit may be shorter
        left(unit.rows - done) {}

  R50_INLINE void step() {
    if (left <= 0) return;
    for (int i = 0; i < RATE; i++) {
      const int64_t offset = outs[i];
      if (offset >= 0) epilogue.row(acc + i * WIDTH, residual + offset, out + offset);
      __builtin_prefetch(ahead + outs[i + ahead_rows], 1);
    }
    acc += RATE * WIDTH;
    outs += RATE;
    left -= RATE;
  }
};

struct Nothing {
  void step() {}
};

// One half (registers 2h and 2h + 1 of the panel) of a unit.
template <class Rows>
R50_INLINE void half_unit(const Conv& conv, const Unit& unit, int h, int32_t* acc, Rows leaving, const int8_t*& fetch,
                          int fetches) {
  const Packed& w = *conv.w;
  const int32_t* start = w.start(unit.panel) + 32 * h;
  tile_load<0>(start, 0);
  tile_load<1>(start + 16, 0);
  tile_load<2>(start, 0);
  tile_load<3>(start + 16, 0);
  const int8_t* b = w.panel(unit.panel) + int64_t(h) * HALF * w.ktotal;
  for (int s = 0; s < w.operands; s++) {
    const Operand& in = conv.in[s];
    const uint8_t *a0 = in.a + in.rows[unit.m], *a1 = in.a + in.rows[unit.m + unit.rows - 16];
    const int64_t lda = in.lda;
    for (int t = 0; t < in.ntaps; t++) {
      const uint8_t *x0 = a0 + in.taps[t], *x1 = a1 + in.taps[t];
      for (int k = 0; k < in.k; k += STEP, b += STEP * HALF) {
        tile_load<4>(x0 + k, lda);
        tile_load<6>(b, STEP);
        tile_dot_u8s8<0, 4, 6>();
        leaving.step();
        tile_load<7>(b + STEP * HALF / 2, STEP);
        tile_dot_u8s8<1, 4, 7>();
        leaving.step();
        tile_load<5>(x1 + k, lda);
        tile_dot_u8s8<2, 5, 6>();
        leaving.step();
        for (int i = 0; i < fetches; i++, fetch += 64) __builtin_prefetch(fetch, 0, 2);
        tile_dot_u8s8<3, 5, 7>();
        leaving.step();
      }
    }
  }
  tile_store<0>(acc + 32 * h, 4 * WIDTH);
  tile_store<1>(acc + 32 * h + 16, 4 * WIDTH);
  tile_store<2>(acc + 16 * WIDTH + 32 * h, 4 * WIDTH);
  tile_store<3>(acc + 16 * WIDTH + 32 * h + 16, 4 * WIDTH);
}

template <class Epilogue, int RATE>
void sweep(const Conv& conv, int m0, int m1, int p0, int p1, int block) {
  const Packed& w = *conv.w;
  alignas(64) int32_t acc[2 * SCRATCH];
  const int multiplies = 4 * w.ktotal / STEP;  // per half
  const bool single = multiplies >= ROWS;
  Unit last;
  last.panel = p0;
  for (int first = m0, n = 0; first < m1; first += block) {
    const int end = std::min(m1, first + block);
    // where few units share a panel, the next one is fetched into L2 while this one is used, evenly spread
    const int units = (end - first + ROWS - 1) / ROWS;
    for (int p = p0; p < p1; p++) {
      const int8_t* fetch = p + 1 < p1 ? w.panel(p + 1) : end < m1 ? w.panel(p0) : conv.next;
      const int fetches = fetch && m1 - m0 <= FEW * ROWS ? ROWS / units : 0;
      for (int m = first; m < end; m += ROWS, n++) {
        int32_t* to = acc + (single ? 0 : n % 2 * SCRATCH);
        const Unit unit{to, m, std::min(end, m + ROWS) - m, p};
        half_unit(conv, unit, 0, to, Leaving<Epilogue, RATE>(conv, last, unit, 0), fetch, fetches);
        half_unit(conv, unit, 1, to, Leaving<Epilogue, RATE>(conv, last, unit, std::min(last.rows, RATE * multiplies)),
                  fetch, fetches);
        last = unit;
      }
    }
  }
  Leaving<Epilogue, RATE> rest(conv, last, last, 0);
  while (rest.left > 0) rest.step();
}

}  // namespace

void conv_amx(const Conv& conv, int m0, int m1, int p0, int p1) {
  // a pass over the panels reads all weights: as many rows as L1 holds, or all where that is few units anyway
  const int row_bytes = conv.in[0].lda + conv.in[1].lda, all = (m1 - m0 + ROWS - 1) / ROWS;
  const int fitting = all <= FEW / 2 ? all : BLOCK_BYTES / std::max(row_bytes, 1) / ROWS;
  const int wanted = conv.block ? conv.block / ROWS : fitting;
  const int block = std::clamp(wanted, 1, 2 * FEW) * ROWS;
  tile_configure();
  if (conv.kind == Out::u8) {
    const int multiplies = 8 * conv.w->ktotal / STEP;  // of a unit, between which the rows of another leave
    with_epilogue(conv, [&]<class Epilogue>() {
      if (multiplies >= ROWS)
        sweep<Epilogue, 1>(conv, m0, m1, p0, p1, block);
      else if (2 * multiplies >= ROWS)
        sweep<Epilogue, 2>(conv, m0, m1, p0, p1, block);
      else
        sweep<Epilogue, 4>(conv, m0, m1, p0, p1, block);
    });
  } else {
    alignas(64) int32_t acc[SCRATCH];
    const int8_t* fetch = nullptr;
    for (int m = m0; m < m1; m += ROWS)
      for (int p = p0; p < p1; p++) {
        const Unit unit{acc, m, std::min(m1, m + ROWS) - m, p};
        for (int h = 0; h < 2; h++) half_unit(conv, unit, h, acc, Nothing(), fetch, 0);
        for (int r = 0; r < unit.rows; r++)
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
