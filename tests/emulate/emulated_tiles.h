// csrc/cpu/tiles.h on any CPU: eight tiles of 16 rows of 64 bytes per thread; an exception where the processor faults.
// Loads and stores go straight to the caller's memory, byte for byte, so that a sanitizer sees what they touch.
#pragma once
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace r50 {

struct EmulatedTiles {
  static constexpr int ROWS = 16, ROW_BYTES = 64;
  alignas(64) uint8_t tile[8][ROWS * ROW_BYTES];
  bool configured = false;
};
inline thread_local EmulatedTiles emulated_tiles;
inline std::atomic<int> emulated_configured{0};  // threads that hold a configuration: none between kernels

template <int T>
uint8_t* emulated_tile() {
  static_assert(T >= 0 && T < 8, "there are eight tiles");
  if (!emulated_tiles.configured) throw std::runtime_error("emulated AMX: a tile is used without a configuration");
  return emulated_tiles.tile[T];
}

inline void tile_configure() {
  if (!emulated_tiles.configured) emulated_configured++;
  emulated_tiles.configured = true;
  std::memset(emulated_tiles.tile, 0, sizeof emulated_tiles.tile);  // as ldtilecfg does
}
inline void tile_release() {
  if (emulated_tiles.configured) emulated_configured--;
  emulated_tiles.configured = false;
}
template <int T>
void tile_zero() {
  std::memset(emulated_tile<T>(), 0, sizeof emulated_tiles.tile[T]);
}
template <int T, bool = false>
void tile_load(const void* from, int64_t stride) {  // stride 0: one row sixteen times
  uint8_t* tile = emulated_tile<T>();
  for (int r = 0; r < EmulatedTiles::ROWS; r++)
    std::memcpy(tile + r * EmulatedTiles::ROW_BYTES, static_cast<const uint8_t*>(from) + r * stride,
                EmulatedTiles::ROW_BYTES);
}
template <int T>
void tile_store(void* to, int64_t stride) {
  if (stride < EmulatedTiles::ROW_BYTES && stride > -EmulatedTiles::ROW_BYTES)
    throw std::runtime_error("emulated AMX: tile_store with rows that overlap, which no kernel wants");
  const uint8_t* tile = emulated_tile<T>();
  for (int r = 0; r < EmulatedTiles::ROWS; r++)
    std::memcpy(static_cast<uint8_t*>(to) + r * stride, tile + r * EmulatedTiles::ROW_BYTES, EmulatedTiles::ROW_BYTES);
}

template <int C, int A, int B>
void tile_dot_u8s8() {  // wraps, never saturates
  static_assert(C != A && C != B && A != B, "tdpbusd faults on equal operands");
  uint8_t* to = emulated_tile<C>();
  const uint8_t* a = emulated_tile<A>();
  const auto* b = reinterpret_cast<const int8_t*>(emulated_tile<B>());
  for (int m = 0; m < 16; m++) {
    uint32_t sum[16];
    std::memcpy(sum, to + 64 * m, 64);
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 16; n++) {
        int32_t dot = 0;
        for (int i = 0; i < 4; i++) dot += a[64 * m + 4 * k + i] * b[64 * k + 4 * n + i];
        sum[n] += uint32_t(dot);
      }
    std::memcpy(to + 64 * m, sum, 64);
  }
}

// Denormal operands and results are zeros whatever MXCSR says.
inline float emulated_flush(float x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}
inline float emulated_bf16(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  return emulated_flush(std::bit_cast<float>(uint32_t(half) << 16));
}

// The order of Intel's manual: the even and the odd products of k are two chains of fma, whose sum is added to C.
template <int C, int A, int B>
void tile_dot_bf16() {
  static_assert(C != A && C != B && A != B, "tdpbf16ps faults on equal operands");
  uint8_t* to = emulated_tile<C>();
  const uint8_t *a = emulated_tile<A>(), *b = emulated_tile<B>();
  for (int m = 0; m < 16; m++)
    for (int n = 0; n < 16; n++) {
      float chain[2] = {};
      for (int k = 0; k < 16; k++)
        for (int i = 0; i < 2; i++)
          chain[i] = emulated_flush(std::fma(emulated_bf16(a + 64 * m + 4 * k + 2 * i),
                                             emulated_bf16(b + 64 * k + 4 * n + 2 * i), chain[i]));
      float sum;
      std::memcpy(&sum, to + 64 * m + 4 * n, 4);
      sum = emulated_flush(emulated_flush(sum) + emulated_flush(chain[0] + chain[1]));
      std::memcpy(to + 64 * m + 4 * n, &sum, 4);
    }
}

}  // namespace r50
