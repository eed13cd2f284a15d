// The float convolution's inner loops: one template of vectors for every instruction set, and AMX.
//
// Register tile: 6 rows by 2 (16 registers) or 4 (32 registers) vectors of output channels, one broadcast unit of a row at a time:
// 12 or 24 independent sums cover the latency of two multiply-adds a cycle, with two thirds of a load or less for each. A chunk of a
// panel's weights stays in L1 while all rows of the block pass over it; between chunks the sums rest in `acc`.
#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "conv_float.h"
#include "vec.h"

#if defined(__x86_64__)
#include "tiles.h"
#endif

namespace r50 {
namespace {

constexpr int ROWS = 6;

// One row's sums -> y = relu(sum * scale + bias + residual), from channel `column` on.
template <class Isa, class T, int V>
INLINE void finish(const FloatConv& c, int m, int column, const typename Vec<Isa::W>::F* sum) {
  constexpr int W = Isa::W;
  const int32_t offset = c.outs[m];
  if (offset < 0) return;
  T* const out = reinterpret_cast<T*>(c.out + offset) + column;
  const T* residual = c.residual ? reinterpret_cast<const T*>(c.residual + offset) + column : nullptr;
  const int valid = std::min(V * W, c.o - column);
  T part[V * W], *to = out;
  if (valid < V * W) {
    std::memset(part, 0, sizeof part);
    if (residual) residual = static_cast<const T*>(std::memcpy(part, residual, valid * sizeof(T)));
    to = part;
  }
  const float least = c.relu ? 0 : -std::numeric_limits<float>::infinity();
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    auto y = sum[v] * load<W>(c.scale + column + v * W) + load<W>(c.bias + column + v * W);
    if (residual) y += load<W>(residual + v * W);
    Isa::put(to + v * W, y < least ? least : y);  // a NaN is not less
  }
  if (valid < V * W) std::memcpy(out, part, valid * sizeof(T));
}

// R rows from m on by the first V vectors of panel p: sums += the chunk's products, which leave by finish() after the last chunk.
template <class Isa, class T, int R, int V>
INLINE void multiply(const FloatConv& c, const Chunk& chunk, int m, int p) {
  constexpr int W = Isa::W, WIDTH = Isa::V * W;
  using F = typename Vec<W>::F;
  F sum[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sum[r][v] = chunk.at ? load<W>(c.acc + (m + r) * WIDTH + v * W) : F{};
  const float* b = c.weights + (int64_t(p) * c.units + chunk.at) * WIDTH;
  for (int i = chunk.first; i < chunk.last; i++) {
    const uint8_t* rows[R];
    for (int r = 0; r < R; r++) rows[r] = c.a + c.rows[m + r] + c.runs[i].offset;
    for (int64_t k = 0, end = c.runs[i].units; k < end; k++, b += WIDTH) {
      F w[V];
      for (int v = 0; v < V; v++) w[v] = load<W>(b + v * W);
#pragma GCC unroll 6
      for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[r][v] = Isa::multiply_add(rows[r] + 4 * k, w[v], sum[r][v]);
    }
  }
  if (&chunk + 1 == c.chunks + c.nchunks) {
    for (int r = 0; r < R; r++) finish<Isa, T, V>(c, m + r, p * WIDTH, sum[r]);
  } else {
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) store<W>(c.acc + (m + r) * WIDTH + v * W, sum[r][v]);
  }
}

template <int WIDTH_OF_VECTOR, int VECTORS>
struct Floats {
  static constexpr int W = WIDTH_OF_VECTOR, V = VECTORS;
  using F = typename Vec<W>::F;
  static INLINE F multiply_add(const uint8_t* a, const F& w, const F& sum) {
    float x;
    std::memcpy(&x, a, 4);
    return sum + w * x;
  }
  static INLINE void put(auto* to, const F& y) { store<W>(to, y); }
};

struct Plain : Floats<4, 2> {
  template <class T, int R, int N>
  static void tile(const FloatConv& c, const Chunk& chunk, int m, int p) { multiply<Plain, T, R, N>(c, chunk, m, p); }
  static void widen(const uint16_t* from, float* to, int64_t n);
};

struct Avx2 : Floats<8, 2> {
  template <class T, int R, int N>
  TARGET("avx2,fma")
  static void tile(const FloatConv& c, const Chunk& chunk, int m, int p) { multiply<Avx2, T, R, N>(c, chunk, m, p); }
};

#define AVX512 "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq"

struct Avx512 : Floats<16, 4> {
  template <class T, int R, int N>
  TARGET(AVX512)
  static void tile(const FloatConv& c, const Chunk& chunk, int m, int p) { multiply<Avx512, T, R, N>(c, chunk, m, p); }
};

struct Avx512Bf16 : Floats<16, 4> {  // by assembler: gcc inlines no intrinsic into a function that is itself to be inlined
  static INLINE F multiply_add(const uint8_t* a, const F& w, F sum) {
    uint32_t pair;
    std::memcpy(&pair, a, 4);
#if defined(__x86_64__) && !defined(RESNET50_EMULATED)
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(Vec<W>::U{} | pair), "v"(w));
#else
    const auto high = (Vec<W>::U)w & 0xffff0000, low = (Vec<W>::U)w << 16;
    sum += (F)high * std::bit_cast<float>(pair & 0xffff0000) ;
    sum += (F)low * std::bit_cast<float>(pair << 16);
#endif
    return sum;
  }
  static INLINE void put(bf16* to, const F& y) {
#if defined(__x86_64__) && !defined(RESNET50_EMULATED)
    Vec<W>::H h;
    __asm__("vcvtneps2bf16 %1, %0" : "=v"(h) : "v"(y));
    std::memcpy(to, &h, sizeof h);
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

}  // namespace
}  // namespace r50
