// Convolution for AMX: int8, and bfloat16 in networks, which differ in the multiply and in what finishes a row.
//
// Unit: 32 rows x 64 channels, as two halves of 2x2 tiles: accumulators tmm0-3, rows in tmm4-5, weights in tmm6-7; per
// 64 bytes of k four loads and four tdpbusd or tdpbf16ps, which need 64 cycles and hide the loads while rows or weights
// are in L1. The accumulators start from the panel's start vector (a load with stride 0; tilezero would wait for the
// product before) and end in a scratch of 32 x 64 numbers of 32 bits. Each leaves its tile right before the tile starts
// again in the next half: by then its last product, 52 cycles long, is over, and products never pause. From the scratch
// the rows are finished one by one between the products of the next unit. From k = 320 bytes on one scratch of 8 KiB
// serves, because the first half of a unit already finishes all rows of the one before; two scratches would push
// weights out of L1.
#include <algorithm>
#include <cstring>
#include <memory>

#include "conv.h"

#if defined(__x86_64__)
#include "tiles.h"
#include "x86.h"
R50_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma,amx-tile,amx-int8,amx-bf16,prfchw")
#include "epilogue512.h"

namespace r50 {
namespace {

constexpr int ROWS = 32, WIDTH = 64, HALF = 32, STEP = 64;  // a unit, in halves of its width; bytes of k per tile
constexpr int SCRATCH = ROWS * WIDTH;
constexpr int BLOCK_BYTES = 32 << 10;  // of activations per pass over the panels: they stay in L1
constexpr int HEAVY_BYTES = 768 << 10;  // of weights that will not stay in L2
constexpr int STREAMED_BYTES = 16 << 10;  // of weights, from which on they pass L1 by and leave it to the rows
constexpr int FEW = 8;  // units; with so few per panel the weights are used hardly faster than they arrive

// A unit whose rows wait in the scratch, or, on the way there, is multiplied.
struct Unit {
  int32_t* acc = nullptr;
  int m = 0, rows = 0, panel = 0;  // rows is 16 or 32
  const int8_t* fetch = nullptr;   // weights read after this panel, of which each step fetches `lines` into L2
  int lines = 0;
};

// The units of a sweep in their order: blocks of rows, in each all panels, in each the rows 32 by 32.
struct Units {
  const Conv& conv;
  const int m0, m1, p0, p1, block;
  int32_t* const acc;
  const int other;  // accumulators between the scratches of one unit and the next
  int first, p, m, n = 0;

  Units(const Conv& conv, int m0, int m1, int p0, int p1, int block, int32_t* acc, int other)
      : conv(conv), m0(m0), m1(m1), p0(p0), p1(p1), block(block), acc(acc), other(other), first(m0), p(p0), m(m0) {}

  Unit next() {  // none left: no rows
    if (first >= m1) return {};
    const int end = std::min(m1, first + block);
    Unit unit{acc + n++ % 2 * other, m, std::min(end, m + ROWS) - m, p};
    // where few units share a panel, the next one is fetched while this one is used, evenly spread
    if (m1 - m0 <= FEW * ROWS) {
      const Packed& w = *conv.w;
      const int8_t* after = p + 1 < p1 ? w.panel(p + 1) : end < m1 ? w.panel(p0) : conv.next;
      const int units = (end - first + ROWS - 1) / ROWS;
      if (after) unit.lines = ROWS / units, unit.fetch = after + int64_t(m - first) / ROWS * unit.lines * 2 * w.ktotal;
    }
    m += ROWS;
    if (m >= end) p++, m = first;
    if (p == p1) p = p0, first += block, m = first;
    return unit;
  }
};

// The rows of a finished unit, leaving the scratch one after the other, `RATE` at each call; meanwhile, if asked for,
// the lines that the unit in work will fill are fetched for writing.
template <class Epilogue, int RATE>
struct Leaving {
  static constexpr int BYTES = WIDTH * Epilogue::BYTES;  // of a row
  const Epilogue epilogue;
  const uint8_t* residual;
  uint8_t *out, *ahead;
  const int32_t *acc, *outs;
  int64_t ahead_rows;  // how much further on than `outs`
  int left;
  const bool fetches;

  Leaving(const Conv& conv, const Unit& unit, const Unit& next)
      : epilogue(conv.w->start(unit.panel), conv.w->o - unit.panel * WIDTH),
        residual(conv.residual + unit.panel * BYTES), out(conv.out + unit.panel * BYTES),
        ahead(conv.out + next.panel * BYTES), acc(unit.acc), outs(conv.outs + unit.m),
        ahead_rows(std::max(0, std::min(next.m, conv.m - ROWS)) - unit.m),  // the last unit may be shorter
        left(unit.rows), fetches(conv.block & 1) {}

  R50_INLINE void finish(const int32_t* sums, const uint8_t* from, uint8_t* to) const {
    __m512i sum0 = _mm512_load_si512(sums), sum1 = _mm512_load_si512(sums + 16);
    __m512i sum2 = _mm512_load_si512(sums + 32), sum3 = _mm512_load_si512(sums + 48);
    if constexpr (Epilogue::residual) epilogue.add(sum0, sum1, sum2, sum3, from);
    epilogue.store(sum0, sum1, sum2, sum3, to);
  }

  R50_INLINE void step() {
    if (left <= 0) return;
    for (int i = 0; i < RATE; i++) {
      const int64_t offset = outs[i];
      if (offset >= 0) finish(acc + i * WIDTH, residual + offset, out + offset);
      if (fetches)
        for (int line = 0; line < BYTES; line += 64) __builtin_prefetch(ahead + outs[i + ahead_rows] + line, 1);
    }
    acc += RATE * WIDTH;
    outs += RATE;
    left -= RATE;
  }
};

struct Nothing {
  void step() {}
};

template <int BYTES, int C, int A, int B>  // of an element
R50_INLINE void tile_dot() {
  if constexpr (BYTES == 1)
    tile_dot_u8s8<C, A, B>();
  else
    tile_dot_bf16<C, A, B>();
}

// 64 bytes of k of a half. The first step of a half also stores what the tiles hold of the half before, into `done`.
template <bool FIRST, int BYTES, bool STREAM, class Rows>
R50_INLINE void half_step(const uint8_t* x0, const uint8_t* x1, int64_t lda, const int8_t* b, Rows& leaving,
                          const int32_t* start = nullptr, int32_t* done = nullptr) {
  if constexpr (FIRST) tile_store<0>(done, 4 * WIDTH), tile_load<0>(start, 0);
  tile_load<4>(x0, lda);
  tile_load<6, STREAM>(b, STEP);
  tile_dot<BYTES, 0, 4, 6>();
  leaving.step();
  if constexpr (FIRST) tile_store<1>(done + 16, 4 * WIDTH), tile_load<1>(start + 16, 0);
  tile_load<7, STREAM>(b + STEP * HALF / 2, STEP);
  tile_dot<BYTES, 1, 4, 7>();
  leaving.step();
  if constexpr (FIRST) tile_store<2>(done + 16 * WIDTH, 4 * WIDTH), tile_load<2>(start, 0);
  tile_load<5>(x1, lda);
  tile_dot<BYTES, 2, 5, 6>();
  leaving.step();
  if constexpr (FIRST) tile_store<3>(done + 16 * WIDTH + 16, 4 * WIDTH), tile_load<3>(start + 16, 0);
  tile_dot<BYTES, 3, 5, 7>();
  leaving.step();
}

template <int BYTES, bool STREAM, class Rows>
R50_INLINE void first_step(const Conv& conv, const Unit& unit, int h, int32_t* done, Rows& leaving) {
  const Operand& in = conv.in[0];
  const uint8_t* a = in.a + in.taps[0];
  half_step<true, BYTES, STREAM>(a + in.rows[unit.m], a + in.rows[unit.m + unit.rows - 16], in.lda,
                                 conv.w->panel(unit.panel) + h * conv.w->ktotal * HALF, leaving,
                                 conv.w->start(unit.panel) + HALF * h, done);
}

template <int BYTES, bool STREAM, class Rows>
R50_INLINE void other_steps(const Conv& conv, const Unit& unit, int h, Rows& leaving) {
  const int8_t* b = conv.w->panel(unit.panel) + (h * conv.w->ktotal + STEP) * HALF;
  const int8_t* fetch = unit.fetch + h * conv.w->ktotal * unit.lines;
  for (int s = 0; s < conv.w->operands; s++) {
    const Operand& in = conv.in[s];
    const uint8_t *a0 = in.a + in.rows[unit.m], *a1 = in.a + in.rows[unit.m + unit.rows - 16];
    const int64_t lda = in.lda;
    for (const int32_t *tap = in.taps + (s == 0), *end = in.taps + in.ntaps; tap < end; tap++, b += STEP * HALF) {
      half_step<false, BYTES, STREAM>(a0 + *tap, a1 + *tap, lda, b, leaving);
      for (int i = 0; i < unit.lines; i++, fetch += 64) __builtin_prefetch(fetch, 0, 2);
    }
  }
}

R50_INLINE void store_half(int32_t* done) {
  tile_store<0>(done, 4 * WIDTH);
  tile_store<1>(done + 16, 4 * WIDTH);
  tile_store<2>(done + 16 * WIDTH, 4 * WIDTH);
  tile_store<3>(done + 16 * WIDTH + 16, 4 * WIDTH);
}

template <class Epilogue, int RATE, bool STREAM>
void sweep(const Conv& conv, int m0, int m1, int p0, int p1, int block) {
  constexpr int BYTES = Epilogue::BYTES;
  alignas(64) int32_t acc[2 * SCRATCH];
  // the rows of a unit leave between the first step of the next one and that of the one after; with that step's second
  // half the next one enters the scratch
  const bool single = 4 * conv.w->ktotal / STEP >= ROWS / RATE + 4;
  Units units(conv, m0, m1, p0, p1, block, acc, single ? 0 : SCRATCH);
  Nothing nothing;
  Unit last{acc, m0, 0, p0}, unit = units.next();
  first_step<BYTES, STREAM>(conv, unit, 0, acc, nothing);
  while (true) {
    const Unit next = units.next();
    Leaving<Epilogue, RATE> leaving(conv, last, unit);
    other_steps<BYTES, STREAM>(conv, unit, 0, leaving);
    first_step<BYTES, STREAM>(conv, unit, 1, unit.acc, leaving);
    other_steps<BYTES, STREAM>(conv, unit, 1, leaving);
    if (!next.rows) {
      while (leaving.left > 0) leaving.step();
      break;
    }
    first_step<BYTES, STREAM>(conv, next, 0, unit.acc + HALF, leaving);
    last = unit;
    unit = next;
  }
  store_half(unit.acc + HALF);
  Leaving<Epilogue, RATE> leaving(conv, unit, unit);
  while (leaving.left > 0) leaving.step();
}

// Rows of 32-bit results, for the last layer: nothing is hidden.
template <int BYTES>
void wide_rows(const Conv& conv, int m0, int m1, int p0, int p1) {
  alignas(64) int32_t acc[SCRATCH];
  Nothing nothing;
  for (int m = m0; m < m1; m += ROWS)
    for (int p = p0; p < p1; p++) {
      const Unit unit{acc, m, std::min(m1, m + ROWS) - m, p};
      for (int h = 0; h < 2; h++) {
        first_step<BYTES, false>(conv, unit, h, acc, nothing);
        other_steps<BYTES, false>(conv, unit, h, nothing);
        store_half(acc + HALF * h);
      }
      for (int r = 0; r < unit.rows; r++)
        if (conv.outs[m + r] >= 0) finish_row(conv, m + r, p, acc + r * WIDTH);
    }
}

}  // namespace

void conv_amx(const Conv& conv, int m0, int m1, int p0, int p1) {
  if (m0 >= m1 || p0 >= p1) return;  // a thread without a share
  // a pass over the panels reads all weights: as many rows as L1 holds, or all where those are few units anyway or
  // where the weights would come from beyond L2 each time
  const int row_bytes = conv.in[0].lda + conv.in[1].lda, all = (m1 - m0 + ROWS - 1) / ROWS;
  const bool heavy = conv.w->bytes > HEAVY_BYTES || all <= FEW / 2;
  const int fitting = heavy ? all : BLOCK_BYTES / std::max(row_bytes, 1) / ROWS;
  const int wanted = conv.block >= ROWS ? conv.block / ROWS : fitting;
  const int block = std::clamp(wanted, 1, 2 * FEW) * ROWS;
  tile_configure();
  const int multiplies = 4 * conv.w->ktotal / STEP;  // of a half
  const bool streams = conv.w->ktotal > STEP && int64_t(p1 - p0) * conv.w->ktotal * WIDTH >= STREAMED_BYTES;
  const auto run = [&]<class Epilogue, bool STREAM>() {
    // one row per multiply is hidden; two also are where that makes one scratch serve
    if constexpr (Epilogue::wide)
      wide_rows<Epilogue::BYTES>(conv, m0, m1, p0, p1);
    else if (multiplies >= ROWS + 4 || (2 * multiplies >= ROWS && multiplies < ROWS / 2 + 4))
      sweep<Epilogue, 1, STREAM>(conv, m0, m1, p0, p1, block);
    else if (4 * multiplies >= ROWS)
      sweep<Epilogue, 2, STREAM>(conv, m0, m1, p0, p1, block);
    else
      sweep<Epilogue, 4, STREAM>(conv, m0, m1, p0, p1, block);
  };
  with_epilogue(conv, [&]<class Epilogue>() {
    streams ? run.template operator()<Epilogue, true>() : run.template operator()<Epilogue, false>();
  });
  tile_release();
}

}  // namespace r50

#endif
