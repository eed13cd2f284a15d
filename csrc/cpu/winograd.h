// 3x3 convolutions with stride 1 by fewer multiplies (Lavin and Gray, "Fast Algorithms for Convolutional Neural
// Networks", 2016).
//
// int8: by a quarter of them, and every bit the same: Winograd's F(4x4, 3x3) in whole numbers modulo 2^32.
//
// 6 x 6 pixels and 3 x 3 weights are transformed, multiplied element by element, summed over the input channels, and
// transformed back to 4 x 4 results. With all matrices scaled to whole numbers, what comes back is 576 = 9 * 64 times
// the convolution. Transformed pixels stay within 20400 and transformed weights within 18432, so both are 16-bit words
// whatever the bytes were. Their products are summed modulo 2^32, where 9 has an inverse and 64 costs six bits: a sum
// that fits 26 bits, which pack_int8 proves from the weights, comes back exactly. Words multiply at half the rate of
// bytes: of the time of the multiplies half is left, and the transforms' is added.
//
// Where one or two rows or columns are left at an image's edge, the tile is F(2, 3) in that direction: 4 points, whose
// weights are four of the six. A matrix product per point has the tiles that have this point.
//
// float32: F(2x2, 3x3) everywhere, by 4 / 9 of the multiplies, with about twice the rounding errors of the direct sums
// (F(4x4, 3x3) would lose some bits). Where one row or column is left, what lies beside the image is in the last point
// alone, and that in the second result alone, which is not kept.
//
// Included by the kernels of two instruction sets, each under its own target, with a `Set` that has: BYTES of a
// register; ELEMENT and WORD, bytes of an activation and of what is multiplied; RESULTS of a tile in one direction;
// WIDTH of a panel; ROWS of a register tile; widen(), multiply<R>().
#pragma once
#include <algorithm>
#include <cstring>

#include "each.h"
#include "layout.h"
#include "vec.h"

namespace r50 {
namespace {

constexpr int STRIP = 4;           // tiles side by side whose columns are transformed together, within L1
constexpr int LINE = 64, SUM = 4;  // bytes
constexpr int UNIT = 4;            // bytes of words that are multiplied and added at once: a pair of int16, a float32
constexpr uint32_t INVERSE_9 = 0x38e38e39;   // modulo 2^32
constexpr int SCALE_BITS = 6;

struct Tile {
  int n, y, x;      // of its first result
  bool tall, wide;  // int8: 4 rows, 4 columns, or else at most 2
  int place[4];     // among the tiles that have the points of each kind
  bool has(int kind) const { return (tall || !(kind & 1)) && (wide || !(kind & 2)); }
};

template <class Set>
struct Winograd {
  static constexpr int RESULTS = Set::RESULTS, PATCH = RESULTS + 2, POINTS = PATCH * PATCH;  // of a tile
  static constexpr int WORD = Set::WORD, LANES = Set::BYTES / WORD, WIDTH = Set::WIDTH;
  static constexpr bool FLOATS = WORD == 4;
  using Words = typename Set::Words;
  using Sums = typename Set::Sums;

  const Conv& conv;
  const Packed& w = *conv.w;
  const Layout &in, &out;
  const int most;  // tiles at a time, at most MANY_TILES
  const int channels = in.c / Set::ELEMENT, units = (channels * WORD + UNIT - 1) / UNIT;
  const int64_t of_tile = round_up(channels, LANES) * WORD;    // bytes of its words at one point
  const int64_t of_words = most * of_tile + LINE;              // of a point; not a power of two, or all points
  const int64_t of_sums = int64_t(most) * WIDTH * SUM + LINE;  // would share one set of L1
  uint8_t* const words = static_cast<uint8_t*>(
      scratch(size_t(POINTS * (of_words + of_sums) + (STRIP * RESULTS + 2) * PATCH * Set::BYTES)));
  uint8_t *const sums = words + POINTS * of_words, *const columns = sums + POINTS * of_sums;

  // the points 2 and -2
  static constexpr bool only_long(int point) { return PATCH == 6 && (point == 3 || point == 4); }
  static constexpr int kind(int down, int across) { return only_long(down) + 2 * only_long(across); }  // of a point

  // f.operator()<tall, wide>() as the tile is
  template <class F>
  static INLINE void as(const Tile& tile, F&& f) {
    if constexpr (FLOATS) {
      f.template operator()<false, false>();
    } else {
      if (tile.tall)
        tile.wide ? f.template operator()<true, true>() : f.template operator()<true, false>();
      else
        tile.wide ? f.template operator()<false, true>() : f.template operator()<false, false>();
    }
  }

  // Six pixels, or four if not LONG -> at the points 0, 1, -1, 2, -2 and infinity, but not LONG those of 2 and -2
  template <bool LONG>
  static INLINE void transform_pixels(const Words (&x)[PATCH], Words (&y)[PATCH]) {
    if constexpr (FLOATS) {
      y[0] = x[0] - x[2];
      y[1] = x[1] + x[2];
      y[2] = x[2] - x[1];
      y[3] = x[3] - x[1];
    } else if constexpr (LONG) {
      const Words a = x[4] - (x[2] << 2), b = x[3] - (x[1] << 2), c = x[4] - x[2], d = x[3] - x[1], e = d + d;
      y[0] = (x[0] << 2) + (a - x[2]);
      y[1] = a + b;
      y[2] = a - b;
      y[3] = c + e;
      y[4] = c - e;
      y[5] = x[5] - x[3] - (d << 2);
    } else {
      const Words d = x[3] - x[1];
      y[0] = (x[0] - x[2]) << 2;
      y[1] = (x[1] + x[2]) * uint16_t(-3);
      y[2] = (x[1] - x[2]) * uint16_t(3);
      y[5] = d + d;
    }
  }

  template <bool LONG>
  static INLINE void transform_sums(const Sums (&m)[PATCH], Sums (&y)[RESULTS]) {
    const Sums s = m[1] + m[2], t = m[1] - m[2];
    if constexpr (LONG) {
      const Sums u = m[3] + m[4], v = m[3] - m[4];
      y[0] = m[0] + s + u;
      y[1] = t + v + v;
      y[2] = s + (u << 2);
      y[3] = t + (v << 3) + (m[5] + m[5]);
    } else {
      y[0] = m[0] + s;
      y[1] = t + m[PATCH - 1];
    }
  }

  // A strip of tiles side by side, LANES channels from `from` on, `byte` of their words. Bytes behind the last channel
  // become words that meet no weights.
  template <bool TALL>
  void transform_strip(const Tile* tiles, int count, const uint8_t* from, int64_t byte) {
    constexpr int ROWS = TALL ? PATCH : 4;
    const int64_t row_bytes = in.row, pixel = in.pixel;
    uint8_t* const columns = this->columns;
    const int width = (count - 1) * RESULTS + (tiles[count - 1].wide ? PATCH : 4);
    for (int x = 0; x < width; x++) {
      Words d[PATCH], y[PATCH];
      each<ROWS>([&](auto row) __attribute__((always_inline)) {
        Set::widen(from + row * row_bytes + x * pixel, d[row]);
      });
      transform_pixels<TALL>(d, y);
      each<PATCH>([&](auto down) __attribute__((always_inline)) {
        if constexpr (TALL || !only_long(down))
          std::memcpy(columns + (x * PATCH + down) * Set::BYTES, &y[down], Set::BYTES);
      });
    }
    for (int t = 0; t < count; t++) {
      const uint8_t* column = columns + t * RESULTS * PATCH * Set::BYTES;
      if constexpr (!FLOATS)
        if (tiles[t].wide) {
          transform_rows<TALL, true>(tiles[t], column, byte);
          continue;
        }
      transform_rows<TALL, false>(tiles[t], column, byte);
    }
  }
  template <bool TALL, bool WIDE>
  void transform_rows(const Tile& tile, const uint8_t* column, int64_t byte) {
    const int64_t stride = of_words;  // members would be read again after every store
    uint8_t* to[4];
    for (int k = 0; k < 4; k++) to[k] = words + tile.place[k] * of_tile + byte;
    each<PATCH>([&](auto down) __attribute__((always_inline)) {
      if constexpr (TALL || !only_long(down)) {
        Words d[PATCH], y[PATCH];
        each<WIDE ? PATCH : 4>([&](auto x) __attribute__((always_inline)) {
          std::memcpy(&d[x], column + (x * PATCH + down) * Set::BYTES, Set::BYTES);
        });
        transform_pixels<WIDE>(d, y);
        each<PATCH>([&](auto across) __attribute__((always_inline)) {
          if constexpr (WIDE || !only_long(across))
            std::memcpy(to[kind(down, across)] + (down * PATCH + across) * stride, &y[across], Set::BYTES);
        });
      }
    });
  }

  // One point's `count` tiles by one panel; the weights of the next point are fetched meanwhile, since most networks'
  // do not stay in L2
  void multiply_point(int point, const uint8_t* b, int count) {
    const int of_unit = WIDTH * UNIT, groups = (count + Set::ROWS - 1) / Set::ROWS;
    const uint8_t* ahead = b + units * of_unit;
    const int step = groups ? (of_unit + groups - 1) / groups : 0;
    for (int t = 0, rows; t < count; t += rows) {
      const int left = count - t;
      rows = left >= 2 * Set::ROWS ? Set::ROWS : left > Set::ROWS ? (left + 1) / 2 : left;
      const uint8_t* a = words + point * of_words + t * of_tile;
      uint8_t* to = sums + point * of_sums + t * WIDTH * SUM;
      switch (rows) {
        case 1: Set::template multiply<1>(a, of_tile, b, units, to, ahead, step); break;
        case 2: Set::template multiply<2>(a, of_tile, b, units, to, ahead, step); break;
        case 3: Set::template multiply<3>(a, of_tile, b, units, to, ahead, step); break;
        case 4: Set::template multiply<4>(a, of_tile, b, units, to, ahead, step); break;
        case 5: Set::template multiply<5>(a, of_tile, b, units, to, ahead, step); break;
        default: Set::template multiply<6>(a, of_tile, b, units, to, ahead, step);
      }
      ahead += units * step;
    }
  }

  // -> accumulators of a panel, WIDTH of each result
  template <bool TALL, bool WIDE>
  void transform_back(const Tile& tile, int p, uint32_t* acc) {
    constexpr int ROWS = TALL ? RESULTS : 2, COLUMNS = WIDE ? RESULTS : 2;
    const int64_t stride = of_sums;
    const uint8_t* from[4];
    for (int k = 0; k < 4; k++) from[k] = sums + tile.place[k] * WIDTH * SUM;
    for (int v = 0; v < WIDTH * SUM; v += Set::BYTES) {
      Sums start;
      std::memcpy(&start, reinterpret_cast<const uint8_t*>(w.start(p)) + v, sizeof start);
      Sums rows[RESULTS][PATCH];
      each<PATCH>([&](auto across) __attribute__((always_inline)) {
        if constexpr (WIDE || !only_long(across)) {
          Sums m[PATCH], y[RESULTS];
          each<PATCH>([&](auto down) __attribute__((always_inline)) {
            if constexpr (TALL || !only_long(down))
              std::memcpy(&m[down], from[kind(down, across)] + (down * PATCH + across) * stride + v, Set::BYTES);
          });
          transform_sums<TALL>(m, y);
          each<ROWS>([&](auto row) __attribute__((always_inline)) { rows[row][across] = y[row]; });
        }
      });
      each<ROWS>([&](auto row) __attribute__((always_inline)) {
        Sums y[RESULTS];
        transform_sums<WIDE>(rows[row], y);
        each<COLUMNS>([&](auto x) __attribute__((always_inline)) {
          Sums sum;
          if constexpr (FLOATS)
            sum = y[x] + start;
          else
            sum = (Sums)((typename Set::Signed)(y[x] * INVERSE_9) >> SCALE_BITS) + start;
          std::memcpy(reinterpret_cast<uint8_t*>(acc + (row * RESULTS + x) * WIDTH) + v, &sum, sizeof sum);
        });
      });
    }
  }

  // The tiles [t0, t1) of all images, `most` at a time, by panels [p0, p1). finish(offsets, p, acc): RESULTS^2 rows of
  // accumulators to the results at these offsets, which are -1 outside the image
  template <class Finish>
  void run(int t0, int t1, int p0, int p1, Finish&& finish) {
    const int down = tiles_along(out.h, w.type), across = tiles_along(out.w, w.type);
    Tile tiles[MANY_TILES];
    const int passes = (t1 - t0 + most - 1) / most;  // of almost equal length: a few tiles take as long as many
    for (int pass = 0, first = t0, here; pass < passes; pass++, first += here) {
      here = int(int64_t(t1 - t0) * (pass + 1) / passes) - (first - t0);
      int count[4] = {};
      for (int i = 0; i < here; i++) {
        const int t = first + i;
        Tile& tile = tiles[i];
        tile = {t / (down * across), t / across % down * RESULTS, t % across * RESULTS, false, false, {}};
        tile.tall = !FLOATS && out.h - tile.y > 2;
        tile.wide = !FLOATS && out.w - tile.x > 2;
        for (int k = 0; k < 4; k++)
          if (tile.has(k)) tile.place[k] = count[k]++;
      }
      for (int i = 0, strip; i < here; i += strip) {
        const Tile& tile = tiles[i];
        strip = std::min({STRIP, here - i, across - tile.x / RESULTS});
        const uint8_t* from = conv.in[0].a + in.at(tile.n, tile.y - 1, tile.x - 1);
        for (int c = 0; c < channels; c += LANES)
          as(tile, [&]<bool TALL, bool>() { transform_strip<TALL>(&tile, strip, from + c * Set::ELEMENT, c * WORD); });
      }
      for (int p = p0; p < p1; p++) {
        const uint8_t* b = w.at(w.winograd) + int64_t(p) * POINTS * units * WIDTH * UNIT;
        for (int point = 0; point < POINTS; point++, b += units * WIDTH * UNIT)
          multiply_point(point, b, count[kind(point / PATCH, point % PATCH)]);
        for (const Tile* t = tiles; t < tiles + here; t++) {
          const Tile& tile = *t;
          alignas(64) uint32_t acc[RESULTS * RESULTS * WIDTH];
          as(tile, [&]<bool TALL, bool WIDE>() { transform_back<TALL, WIDE>(tile, p, acc); });
          int32_t offsets[RESULTS * RESULTS];
          for (int i = 0; i < RESULTS * RESULTS; i++) {
            const int y = tile.y + i / RESULTS, x = tile.x + i % RESULTS;
            offsets[i] = y < out.h && x < out.w ? int32_t(out.at(tile.n, y, x)) : -1;
          }
          finish(offsets, p, reinterpret_cast<const int32_t*>(acc));
        }
      }
    }
  }
};

}  // namespace
}  // namespace r50
