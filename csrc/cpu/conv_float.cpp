// The float convolution's inner loops: one template of vectors for every instruction set, and AMX.
//
// Register tile: 6 rows by 2 (16 registers) or 4 (32 registers) vectors of output channels, one unit of a row broadcast at a time: 12
// or 24 independent sums cover the latency of two multiply-adds a cycle, at two thirds of a load or less for each. A chunk of a
// panel's weights stays in L1 while all rows of the block pass over it; between chunks the sums rest in `acc`.
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

// One row's sums -> y = relu(sum * scale + bias + residual), from channel `column` on.
template <class Isa, class T, int N>
INLINE void finish(const FloatConv& c, int m, int column, const typename Isa::F* sum) {
  constexpr int W = Isa::W;
  const int32_t offset = c.outs[m];
  if (offset < 0) return;
  T* const out = reinterpret_cast<T*>(c.out + offset) + column;
  const T* residual = c.residual ? reinterpret_cast<const T*>(c.residual + offset) + column : nullptr;
  const int valid = std::min(N * W, c.o - column);
  T part[N * W], *to = out;
  if (valid < N * W) {
    std::memset(part, 0, sizeof part);
    if (residual) residual = static_cast<const T*>(std::memcpy(part, residual, valid * sizeof(T)));
    to = part;
  }
  const float least = c.relu ? 0 : -std::numeric_limits<float>::infinity();
#pragma GCC unroll 4
  for (int v = 0; v < N; v++) {
    auto y = sum[v] * load<W>(c.scale + column + v * W) + load<W>(c.bias + column + v * W);
    if (residual) y += load<W>(residual + v * W);
    Isa::put(to + v * W, y < least ? least : y);  // a NaN is not less
  }
  if (valid < N * W) std::memcpy(out, part, valid * sizeof(T));
}

// R rows from m on by the first N vectors of panel p: the chunk's products join the sums, which after the last chunk are finished.
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
    for (int64_t k = 0, end = c.runs[i].units; k < end; k++, b += WIDTH) {
      typename Isa::F w[N];
#pragma GCC unroll 4
      for (int v = 0; v < N; v++) w[v] = load<W>(b + v * W);
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) Isa::template multiply_add<N>(sum[r], rows[r] + 4 * k, w);
    }
  }
  if (chunk.at) {
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < N; v++) sum[r][v] += load<W>(acc + r * WIDTH + v * W);
  }
  if (last) {
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) finish<Isa, T, N>(c, m + r, p * WIDTH, sum[r]);
  } else {
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < N; v++) store<W>(acc + r * WIDTH + v * W, sum[r][v]);
  }
}

template <int W>
INLINE void widen(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store<W>(to + i, load<W>(reinterpret_cast<const bf16*>(from) + i));
  for (; i < n; i++) to[i] = std::bit_cast<float>(uint32_t(from[i]) << 16);
}

template <int WIDTH, int VECTORS>
struct Floats {
  static constexpr int W = WIDTH, V = VECTORS;
  using F = typename Vec<W>::F;
  template <int N>
  static INLINE void multiply_add(F* sum, const uint8_t* a, const F* w) {
    float x;
    std::memcpy(&x, a, 4);
#pragma GCC unroll 4
    for (int v = 0; v < N; v++) sum[v] += w[v] * x;
  }
  template <class T>
  static INLINE void put(T* to, const F& y) { store<W>(to, y); }
};

struct Plain : Floats<4, 2> {
  template <class T, int R, int N>
  static void tile(const FloatConv& c, const Chunk& chunk, int m, int p) { multiply<Plain, T, R, N>(c, chunk, m, p); }
  static void widen(const uint16_t* from, float* to, int64_t n) { r50::widen<W>(from, to, n); }
};

struct Avx2 : Floats<8, 2> {
  template <class T, int R, int N>
  TARGET("avx2,fma")
  static void tile(const FloatConv& c, const Chunk& chunk, int m, int p) { multiply<Avx2, T, R, N>(c, chunk, m, p); }
  TARGET("avx2,fma")
  static void widen(const uint16_t* from, float* to, int64_t n) { r50::widen<W>(from, to, n); }
};

#define AVX512 "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq"

struct Avx512 : Floats<16, 4> {
  template <class T, int R, int N>
  TARGET(AVX512)
  static void tile(const FloatConv& c, const Chunk& chunk, int m, int p) { multiply<Avx512, T, R, N>(c, chunk, m, p); }
  TARGET(AVX512)
  static void widen(const uint16_t* from, float* to, int64_t n) { r50::widen<W>(from, to, n); }
};

struct Avx512Bf16 {  // in assembler, since gcc inlines an intrinsic only into functions of its target, which templates here have not
  static constexpr int W = 16, V = 4;
  using F = Vec<W>::F;
  template <int N>
  static INLINE void multiply_add(F* sum, const uint8_t* a, const F* w) {
    uint32_t pair;
    std::memcpy(&pair, a, 4);
#pragma GCC unroll 4
    for (int v = 0; v < N; v++) {
#if defined(__x86_64__) && !defined(RESNET50_EMULATED)
      F s = sum[v];  // an array element as the operand would keep the array in memory
      __asm__("vdpbf16ps %2, %1, %0" : "+v"(s) : "v"(Vec<W>::U{} | pair), "v"(w[v]));
      sum[v] = s;
#else
      sum[v] += (F)((Vec<W>::U)w[v] & 0xffff0000) * std::bit_cast<float>(pair & 0xffff0000);
      sum[v] += (F)((Vec<W>::U)w[v] << 16) * std::bit_cast<float>(pair << 16);
#endif
    }
  }
  static INLINE void put(bf16* to, const F& y) {
#if defined(__x86_64__) && !defined(RESNET50_EMULATED)
    Vec<W>::H half;
    __asm__("vcvtneps2bf16 %1, %0" : "=v"(half) : "v"(y));
    std::memcpy(to, &half, sizeof half);
#else
    store<W>(to, y);
#endif
  }
  template <class T, int R, int N>
  TARGET(AVX512)
  static void tile(const FloatConv& c, const Chunk& chunk, int m, int p) {
    multiply<Avx512Bf16, T, R, N>(c, chunk, m, p);
  }
};

using Tile = void (*)(const FloatConv&, const Chunk&, int m, int p);

template <class Isa, class T, int... I>
constexpr std::array<Tile, sizeof...(I)> tiles(std::integer_sequence<int, I...>) {
  return {Isa::template tile<T, I % ROWS + 1, I / ROWS + 1>...};
}

template <class Isa, class T>
void run(const FloatConv& c, int p0, int p1) {
  static constexpr auto all = tiles<Isa, T>(std::make_integer_sequence<int, ROWS * Isa::V>());
  const int count = (c.m + ROWS - 1) / ROWS;  // tiles of almost equal height: none is too low to cover the latency
  for (int p = p0; p < p1; p++) {
    const int vectors = std::min((c.o - p * Isa::V * Isa::W + Isa::W - 1) / Isa::W, Isa::V);
    const Tile* tile = all.data() + (vectors - 1) * ROWS - 1;
    for (int i = 0; i < c.nchunks; i++) {
      const int64_t end = i + 1 < c.nchunks ? c.chunks[i + 1].at : c.units, bytes = (end - c.chunks[i].at) * Isa::V * Isa::W * 4;
      const auto* ahead = reinterpret_cast<const uint8_t*>(c.weights + (int64_t(p) * c.units + end) * Isa::V * Isa::W);
      if (c.next) ahead = c.next + int64_t(c.chunks[i].at) * Isa::V * Isa::W * 4;
      for (int t = 0; t < count; t++) {
        const int m = int(int64_t(c.m) * t / count);
        for (int64_t l = bytes * t / count / 64; l < bytes * (t + 1) / count / 64; l++) __builtin_prefetch(ahead + 64 * l, 0, 2);
        tile[int64_t(c.m) * (t + 1) / count - m](c, c.chunks[i], m, p);
      }
    }
  }
}

#if defined(__x86_64__) || defined(RESNET50_EMULATED)
// AMX works on the int8 kernel's unit (conv_amx.cpp), 32 rows x 64 channels in two halves of 2x2 tiles, and like it finishes the rows
// of a unit between the multiplies of the next.
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
  static constexpr FloatKernel amx{Amx::WIDTH, 64, 2, 16, LARGE, Amx::run, nullptr}, pairs = kernel_of<Avx512Bf16, bf16>(LARGE, 2);
  static constexpr FloatKernel avx512[] = {kernel_of<Avx512, float>(LARGE, 4), kernel_of<Avx512, bf16>(LARGE, 4)};
  static constexpr FloatKernel avx2[] = {kernel_of<Avx2, float>(SMALL, 4), kernel_of<Avx2, bf16>(SMALL, 4)};
  if (is_bf16 && has_amx_bf16()) return amx;
  if (is_bf16 && has_avx512_bf16()) return pairs;
  if (has_avx512()) return avx512[is_bf16];
  if (isa() >= Isa::avx2) return avx2[is_bf16];
#endif
  static constexpr FloatKernel plain[] = {kernel_of<Plain, float>(SMALL, 4), kernel_of<Plain, bf16>(SMALL, 4)};
  return plain[is_bf16];
}

}  // namespace r50
