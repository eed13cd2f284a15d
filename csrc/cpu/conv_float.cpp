// The float convolution's inner loops: one template of vectors for every instruction set, and AMX.
//
// Register tile: 6 rows by 2 (16 registers) or 4 (32 registers) vectors of output channels, one unit of a row broadcast
// at a time: 12 or 24 independent sums cover the latency of two multiply-adds a cycle, at two thirds of a load or less
// for each. A chunk of a panel's weights stays in L1 while all rows of the block pass over it; sums of chunks are added
// in `acc`, which also keeps long ones exact.
#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <utility>

#include "conv_float.h"
#include "vec.h"

#if defined(__x86_64__) || defined(RESNET50_EMULATED)
#include "tiles.h"
#endif

namespace r50 {
namespace {

constexpr int ROWS = 6;

// One row's sums -> y = relu(sum * scale + bias + residual), N vectors from channel `column` on.
template <class Isa, class T, int N>
INLINE void finish(const FloatConv& c, int m, int column, const typename Isa::F* sum) {
  constexpr int W = Isa::W;
  const int32_t offset = c.outs[m];
  if (offset < 0) return;
  T* const to = reinterpret_cast<T*>(c.out + offset) + column;
  const T* residual = c.residual ? reinterpret_cast<const T*>(c.residual + offset) + column : nullptr;
  const float least = c.relu ? 0 : -std::numeric_limits<float>::infinity();
#pragma GCC unroll 4
  for (int v = 0; v < N; v++) {
    auto y = sum[v] * load<W>(c.scale + column + v * W) + load<W>(c.bias + column + v * W);
    if (residual) y += load<W>(residual + v * W);
    Isa::put(to + v * W, y < least ? least : y);  // a NaN is not less
  }
}

// The same where the channels end within the vectors
template <class T>
void finish_part(const FloatConv& c, int m, int column, const float* sum) {
  if (c.outs[m] < 0) return;
  T* const to = reinterpret_cast<T*>(c.out + c.outs[m]);
  const T* residual = reinterpret_cast<const T*>(c.residual + (c.residual ? c.outs[m] : 0));
  for (int n = column; n < c.o; n++) {
    auto y = load<1>(sum + n - column) * c.scale[n] + c.bias[n];
    if (residual) y += load<1>(residual + n);
    store<1>(to + n, c.relu && y[0] < 0 ? Vec<1>::F{} : y);
  }
}

// R rows from m on by the first N vectors of panel p: the chunk's products join the sums, and the last chunk's finish
// them. What finish() touches is fetched first.
template <class Isa, class T, int R, int N>
INLINE void multiply(const FloatConv& c, const Chunk& chunk, int m, int p) {
  constexpr int W = Isa::W, WIDTH = Isa::V * W;
  float* acc = c.acc + int64_t(m) * WIDTH;
  typename Isa::F sum[R][N] = {};
  const float* b = c.weights + (int64_t(p) * c.units + chunk.at) * WIDTH;
  const bool last = &chunk + 1 == c.chunks + c.nchunks;
  if (last)
    for (int r = 0; r < R; r++)
      for (int v = 0; v < N * W * int(sizeof(T)); v += 64) {
        __builtin_prefetch(c.out + c.outs[m + r] + p * WIDTH * sizeof(T) + v, 1);
        if (c.residual) __builtin_prefetch(c.residual + c.outs[m + r] + p * WIDTH * sizeof(T) + v);
      }
  for (int i = chunk.first; i < chunk.last; i++) {
    const uint8_t* rows[R];
    for (int r = 0; r < R; r++) rows[r] = c.a + c.rows[m + r] + c.runs[i].offset;
    const auto step = [&](int64_t k) __attribute__((always_inline)) {
      typename Isa::F w[N];
#pragma GCC unroll 4
      for (int v = 0; v < N; v++) w[v] = load<W>(b + v * W);
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) {
        uint32_t unit;
        std::memcpy(&unit, rows[r] + 4 * k, 4);
#pragma GCC unroll 4
        for (int v = 0; v < N; v++) Isa::multiply_add(sum[r][v], typename Isa::U{} | unit, w[v]);
      }
      b += WIDTH;
    };
    int64_t k = 0;
    if constexpr (R >= 5 && N == Isa::V)  // the common heights: fewer instructions for a core that is shared
      for (; k + 4 <= c.runs[i].units; k += 4) step(k), step(k + 1), step(k + 2), step(k + 3);
    for (; k < c.runs[i].units; k++) step(k);
  }
  if (chunk.at) {
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < N; v++) sum[r][v] += load<W>(acc + r * WIDTH + v * W);
  }
  const bool whole = (p * WIDTH + N * W) <= c.o;
  if (last && whole) {
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) finish<Isa, T, N>(c, m + r, p * WIDTH, sum[r]);
    return;
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < N; v++) store<W>(acc + r * WIDTH + v * W, sum[r][v]);
  if (last)
    for (int r = 0; r < R; r++) finish_part<T>(c, m + r, p * WIDTH, acc + r * WIDTH);
}

template <int W>
INLINE void widen(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store<W>(to + i, load<W>(reinterpret_cast<const bf16*>(from) + i));
  for (; i < n; i++) to[i] = std::bit_cast<float>(uint32_t(from[i]) << 16);
}

// The multiply-adds are assembler: gcc moves the sums of an unrolled loop around, and inlines an intrinsic only into
// functions of its target, which templates for all of them have not.
#if defined(__x86_64__) && !defined(RESNET50_EMULATED)
#define INSTRUCTION(text, plainly)                                   \
  F s = sum; /* an array's element would keep the array in memory */ \
  __asm__(text " %2, %1, %0" : "+v"(s) : "v"(x), "v"(w));            \
  sum = s
#else
#define INSTRUCTION(text, plainly) plainly
#endif
#define AVX2 "avx2,fma"
#define AVX512 "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq"

template <int WIDTH, int VECTORS>
struct Vectors {
  static constexpr int W = WIDTH, V = VECTORS;
  using F = typename Vec<W>::F;
  using U = typename Vec<W>::U;
  template <class T>
  static INLINE void put(T* to, const F& y) { store<W>(to, y); }
};

struct Plain : Vectors<4, 2> {
  static INLINE void multiply_add(F& sum, const U& x, const F& w) { sum += (F)x * w; }
  template <class T, int R, int N>
  static void tile(const FloatConv& c, const Chunk& chunk, int m, int p) { multiply<Plain, T, R, N>(c, chunk, m, p); }
  static void widen(const uint16_t* from, float* to, int64_t n) { r50::widen<W>(from, to, n); }
};

struct Avx2 : Vectors<8, 2> {
  static INLINE void multiply_add(F& sum, const U& x, const F& w) { INSTRUCTION("vfmadd231ps", sum += (F)x * w); }
  template <class T, int R, int N>
  TARGET(AVX2)
  static void tile(const FloatConv& c, const Chunk& chunk, int m, int p) { multiply<Avx2, T, R, N>(c, chunk, m, p); }
  TARGET(AVX2)
  static void widen(const uint16_t* from, float* to, int64_t n) { r50::widen<W>(from, to, n); }
};

struct Avx512 : Vectors<16, 4> {
  static INLINE void multiply_add(F& sum, const U& x, const F& w) { INSTRUCTION("vfmadd231ps", sum += (F)x * w); }
  template <class T, int R, int N>
  TARGET(AVX512)
  static void tile(const FloatConv& c, const Chunk& chunk, int m, int p) { multiply<Avx512, T, R, N>(c, chunk, m, p); }
  TARGET(AVX512)
  static void widen(const uint16_t* from, float* to, int64_t n) { r50::widen<W>(from, to, n); }
};

struct Avx512Bf16 : Vectors<16, 4> {  // a unit is a pair
#if defined(__x86_64__) && !defined(RESNET50_EMULATED)
  static INLINE void put(bf16* to, const F& y) {
    Vec<W>::H half;
    __asm__("vcvtneps2bf16 %1, %0" : "=v"(half) : "v"(y));
    std::memcpy(to, &half, sizeof half);
  }
#endif
  static INLINE void multiply_add(F& sum, const U& x, const F& w) {
    INSTRUCTION("vdpbf16ps", (sum += (F)(x << 16) * (F)((U)w << 16),
                              sum += (F)(x & 0xffff0000) * (F)((U)w & 0xffff0000)));
  }
  template <class T, int R, int N>
  TARGET(AVX512)
  static void tile(const FloatConv& c, const Chunk& chunk, int m, int p) {
    multiply<Avx512Bf16, T, R, N>(c, chunk, m, p);
  }
};

using Tile = void (*)(const FloatConv&, const Chunk&, int m, int p);

// every height, by half a panel and by a whole one
template <class Isa, class T, int... I>
constexpr std::array<Tile, sizeof...(I)> tiles(std::integer_sequence<int, I...>) {
  return {Isa::template tile<T, I % ROWS + 1, I < ROWS ? Isa::V / 2 : Isa::V>...};
}

template <class Isa, class T>
void run(const FloatConv& c, int p0, int p1) {
  static constexpr auto all = tiles<Isa, T>(std::make_integer_sequence<int, 2 * ROWS>());
  constexpr int WIDTH = Isa::V * Isa::W;
  const int count = (c.m + ROWS - 1) / ROWS;  // tiles of almost equal height: none is too low to cover the latency
  for (int p = p0; p < p1; p++) {
    const Tile* tile = all.data() + (c.o - p * WIDTH > WIDTH / 2 ? ROWS : 0);
    for (int i = 0; i < c.nchunks; i++) {
      const int at = c.chunks[i].at, end = i + 1 < c.nchunks ? c.chunks[i + 1].at : c.units;
      const int64_t lines = int64_t(end - at) * WIDTH * 4 / 64;
      const auto* ahead = reinterpret_cast<const uint8_t*>(c.weights + (int64_t(p) * c.units + end) * WIDTH);
      if (c.next) ahead = c.next + int64_t(at) * WIDTH * 4;
      for (int t = 0; t < count; t++) {
        const int m = int(int64_t(c.m) * t / count);
        for (int64_t l = lines * t / count; l < lines * (t + 1) / count; l++) __builtin_prefetch(ahead + 64 * l, 0, 2);
        tile[int64_t(c.m) * (t + 1) / count - m - 1](c, c.chunks[i], m, p);
      }
    }
  }
}

#if defined(__x86_64__) || defined(RESNET50_EMULATED)
// AMX works on the int8 kernel's unit (conv_amx.cpp), 32 rows x 64 channels in two halves of 2x2 tiles, and like it
// finishes the rows of a unit between the multiplies of the next.
struct Amx {
  static constexpr int ROWS = 32, WIDTH = 64, STEP = 16;  // a unit; units of K per tile
  static constexpr int BLOCK_BYTES = 32 << 10;            // of activations per pass over the panels

  struct Pending {  // rows of a finished unit that still have to leave `acc`
    const FloatConv& c;
    const float* acc = nullptr;
    int m = 0, column = 0, row = 0, rows = 0;

    INLINE void finish(int count) {
      for (; count > 0 && row < rows; count--, row++) {
        const float* from = acc + row * WIDTH;
        if (column + WIDTH > c.o) {
          finish_part<bf16>(c, m + row, column, from);
          continue;
        }
        const Avx512Bf16::F sum[4] = {load<16>(from), load<16>(from + 16), load<16>(from + 32), load<16>(from + 48)};
        r50::finish<Avx512Bf16, bf16, 4>(c, m + row, column, sum);
      }
    }
  };

  static INLINE void half_unit(const FloatConv& c, int m, int p, int h, float* acc, Pending& pending, int rate) {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    const float* b = c.weights + int64_t(p) * c.units * WIDTH + 32 * h;
    const uint8_t *a0 = c.a + c.rows[m], *a1 = c.a + c.rows[m + 16 < c.m ? m + 16 : m];
    for (int i = 0; i < c.chunks[c.nchunks - 1].last; i++) {
      const uint8_t *x0 = a0 + c.runs[i].offset, *x1 = a1 + c.runs[i].offset;
      for (int k = 0; k < c.runs[i].units; k += STEP, b += STEP * WIDTH) {
        tile_load<4>(x0 + 4 * k, c.lda);
        tile_load<6>(b, 4 * WIDTH);
        tile_dot_bf16<0, 4, 6>();
        pending.finish(rate);
        tile_load<7>(b + 16, 4 * WIDTH);
        tile_dot_bf16<1, 4, 7>();
        pending.finish(rate);
        tile_load<5>(x1 + 4 * k, c.lda);
        tile_dot_bf16<2, 5, 6>();
        pending.finish(rate);
        tile_dot_bf16<3, 5, 7>();
        pending.finish(rate);
      }
    }
    tile_store<0>(acc + 32 * h, 4 * WIDTH);
    tile_store<1>(acc + 32 * h + 16, 4 * WIDTH);
    tile_store<2>(acc + 16 * WIDTH + 32 * h, 4 * WIDTH);
    tile_store<3>(acc + 16 * WIDTH + 32 * h + 16, 4 * WIDTH);
  }

  TARGET(AVX512)
  static void run(const FloatConv& c, int p0, int p1) {
    alignas(64) float acc[2][ROWS * WIDTH];
    const int multiplies = 4 * c.units / STEP;  // per half
    const int rate = (ROWS + 2 * multiplies - 1) / (2 * multiplies);
    const int block = std::clamp(BLOCK_BYTES / (4 * c.units) / ROWS * ROWS, ROWS, 16 * ROWS);
    Pending pending{c};
    tile_configure();
    for (int first = 0, unit = 0; first < c.m; first += block)
      for (int p = p0; p < p1; p++)
        for (int m = first, end = std::min(c.m, first + block); m < end; m += ROWS, unit++) {
          float* to = acc[unit & 1];
          half_unit(c, m, p, 0, to, pending, rate);
          half_unit(c, m, p, 1, to, pending, rate);
          pending.finish(ROWS);
          pending.acc = to;
          pending.m = m;
          pending.column = p * WIDTH;
          pending.row = 0;
          pending.rows = std::min(end, m + ROWS) - m;
        }
    pending.finish(ROWS);
    tile_release();
  }
};
#endif

template <class Isa, class T>
constexpr FloatKernel kernel_of(int chunk, int element) {
  void (*widen)(const uint16_t*, float*, int64_t) = nullptr;
  if constexpr (requires { Isa::widen; }) widen = Isa::widen;
  return {Isa::V * Isa::W, 4, element, 1, chunk, run<Isa, T>, widen};
}

}  // namespace

const FloatKernel& float_kernel(bool is_bf16) {
  constexpr int SMALL = 16 << 10, LARGE = 32 << 10;  // a chunk: half of a 32 KiB L1, two thirds of a 48 KiB one
#if defined(__x86_64__) || defined(RESNET50_EMULATED)
  static constexpr FloatKernel amx{Amx::WIDTH, 64, 2, 16, LARGE, Amx::run, nullptr};
  static constexpr FloatKernel pairs = kernel_of<Avx512Bf16, bf16>(LARGE, 2);
  static constexpr FloatKernel avx512[] = {kernel_of<Avx512, float>(LARGE, 4), kernel_of<Avx512, bf16>(LARGE, 4)};
  static constexpr FloatKernel avx2[] = {kernel_of<Avx2, float>(SMALL, 4), kernel_of<Avx2, bf16>(SMALL, 4)};
  if (is_bf16 && isa() == Isa::amx) return amx;
  if (is_bf16 && has_avx512_bf16()) return pairs;
  if (has_avx512()) return avx512[is_bf16];
  if (isa() >= Isa::avx2) return avx2[is_bf16];
#endif
  static constexpr FloatKernel plain[] = {kernel_of<Plain, float>(SMALL, 4), kernel_of<Plain, bf16>(SMALL, 4)};
  return plain[is_bf16];
}

}  // namespace r50
