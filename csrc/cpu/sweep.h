// The order in which kernels that read activations in place go through a convolution: blocks of rows, of each all
// panels, of each tiles of up to ROWS rows.
#pragma once
#include <algorithm>

#include "conv.h"

namespace r50 {
namespace {

constexpr int BLOCK = 256 << 10;    // of k of activations, which stay in L2 or near it while all panels pass over them
constexpr int FEW = 64, LEAST = 3;  // tiles that share a panel, for which the next one is fetched ahead

// Rows [m0, m1) by panels [p0, p1). multiply.operator()<R>(segment, m, end, p, line, step): the rows [m, end) of a
// panel, R at a time; for every 4 bytes of K `step` bytes of the weights to come are fetched from `line` on; -> where
// to go on fetching.
template <int ROWS, int WIDTH, class Multiply>
void sweep(const Conv& conv, int m0, int m1, int p0, int p1, Multiply&& multiply) {
  static_assert(ROWS == 6, "see the cases below");
  const int suits = BLOCK / (conv.w->ktotal / bytes_of(conv.w->type)) / ROWS * ROWS;
  const int block = conv.block ? conv.block : std::clamp(suits, 4 * ROWS, 128 * ROWS);
  const Segment* segment = conv.segments;
  for (int first = m0; first < m1; first += block) {
    while (segment->end <= first) segment++;
    const int end = std::min(m1, first + block);
    for (int p = p0; p < p1; p++) {
      const Segment* here = segment;
      const int tiles = (end - first + ROWS - 1) / ROWS;
      const int8_t* line = p + 1 < p1 ? conv.w->panel(p + 1) : end < m1 ? conv.w->panel(p0) : conv.next;
      // few rows use a panel: the next one is fetched meanwhile; otherwise they stay in L2 anyway
      const int step = line && tiles >= LEAST && tiles <= FEW ? std::min(64, (4 * WIDTH + tiles - 1) / tiles) : 0;
      for (int m = first, until; m < end; m = until) {
        here += here->end <= m;
        const int left = std::min(end, here->end) - m, whole = left % ROWS ? left / ROWS - 1 : left / ROWS;
        const int rows = whole > 0 ? ROWS : left > ROWS ? (left + 1) / 2 : left;  // none too low to cover the latency
        until = m + (whole > 0 ? whole * ROWS : rows);
        const auto run = [&]<int R> { line = multiply.template operator()<R>(*here, m, until, p, line, step); };
        switch (rows) {
          case 1: run.template operator()<1>(); break;
          case 2: run.template operator()<2>(); break;
          case 3: run.template operator()<3>(); break;
          case 4: run.template operator()<4>(); break;
          case 5: run.template operator()<5>(); break;
          default: run.template operator()<6>();
        }
      }
    }
  }
}

}  // namespace
}  // namespace r50
