// AMX tile registers, one wrapper per instruction. gcc's own macros paste register numbers as text, which templates
// cannot give them, and its _tile_loadconfig lets the stores that fill the configuration be dropped (gcc 12).
#pragma once
#ifdef RESNET50_EMULATED
#include "emulated_tiles.h"
#else
#include <cstdint>

namespace r50 {

struct alignas(64) TileConfig {  // all eight tiles 16 rows of 64 bytes
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "the memory operand of ldtilecfg");

inline void tile_configure() {
  static const TileConfig config;
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
}
inline void tile_release() { __asm__ volatile("tilerelease"); }
template <int T, bool PAST_L1 = false>
inline void tile_load(const void* from, int64_t stride) {  // PAST_L1: what is there already stays
  if constexpr (PAST_L1)
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T));
  else
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T));
}
template <int T>
inline void tile_store(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int C, int A, int B>
inline void tile_dot_u8s8() {  // C += A (16 rows of 64 u8) x B (16 rows of 4 k for 16 columns, s8)
  __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
inline void tile_dot_bf16() {  // C += A (16 rows of 32 bf16) x B (16 rows of 2 k for 16 columns), float32
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

}  // namespace r50
#endif
