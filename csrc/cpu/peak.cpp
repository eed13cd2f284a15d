// Multiply-adds per second from registers: the ceiling that every figure of the benchmarks stands beside.
//
// Each loop is one block of assembler, so that the accumulators are in registers whatever the compiler thinks of
// values that nobody reads. Twelve independent accumulators cover the longest latency (6 cycles) at the highest rate
// (2 a cycle) of any instruction here; AMX starts a product every 16 cycles and four accumulators suffice.
// Contents are zeros, as denormals would be slow.
#include <chrono>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(__x86_64__)
#include "tiles.h"
#endif

namespace r50 {
namespace {

constexpr int CHAINS = 12;
using Loop = void (*)(int64_t rounds);

#if defined(__x86_64__)

#define EACH_CHAIN(instructions) ".irp n,0,1,2,3,4,5,6,7,8,9,10,11\n" instructions "\n.endr\n"
#define VECTOR_LOOP(zero, instructions)                                                                   \
  __asm__ volatile(".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14\n" zero "\n.endr\n"                         \
                   ".p2align 5\n1:\n" EACH_CHAIN(instructions) "dec %0\njnz 1b\nvzeroupper\n"             \
                   : "+r"(rounds)                                                                         \
                   :                                                                                      \
                   : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
                     "xmm10", "xmm11", "xmm12", "xmm13", "xmm14")
#define ZERO_YMM "vpxor %%ymm\\n,%%ymm\\n,%%ymm\\n"
#define ZERO_ZMM "vpxord %%zmm\\n,%%zmm\\n,%%zmm\\n"

void fma_ymm(int64_t rounds) { VECTOR_LOOP(ZERO_YMM, "vfmadd231ps %%ymm12,%%ymm13,%%ymm\\n"); }
void fma_zmm(int64_t rounds) { VECTOR_LOOP(ZERO_ZMM, "vfmadd231ps %%zmm12,%%zmm13,%%zmm\\n"); }
void bf16_zmm(int64_t rounds) { VECTOR_LOOP(ZERO_ZMM, "vdpbf16ps %%zmm12,%%zmm13,%%zmm\\n"); }
void int8_zmm(int64_t rounds) { VECTOR_LOOP(ZERO_ZMM, "vpdpbusd %%zmm12,%%zmm13,%%zmm\\n"); }

// Without VNNI the bound is pairs of bytes summed in 16 bits. Results need 32: every kernel widens now and then, by
// a vpmaddwd that takes a multiplier's place: after each product it would reach half of this.
void int8_ymm(int64_t rounds) {
  VECTOR_LOOP(ZERO_YMM, "vpmaddubsw %%ymm12,%%ymm13,%%ymm14\nvpaddw %%ymm14,%%ymm\\n,%%ymm\\n");
}

#define TILE_LOOP(product)  /* all tiles are zeros from the configuration on */                        \
  tile_configure();                                                                                    \
  __asm__ volatile(".p2align 5\n1:\n.irp n,0,1,2,3\n" product " %%tmm5,%%tmm4,%%tmm\\n\n.endr\n"     \
                   "dec %0\njnz 1b\n"                                                                  \
                   : "+r"(rounds)                                                                      \
                   :                                                                                   \
                   : "cc");                                                                            \
  tile_release()

void int8_tmm(int64_t rounds) { TILE_LOOP("tdpbusd"); }
void bf16_tmm(int64_t rounds) { TILE_LOOP("tdpbf16ps"); }
constexpr int TILES = 4, ROWS = 16, COLUMNS = 16;

#endif

// What a compiler makes of a multiply-add on vectors of 16 bytes, without any extension of the instruction set.
template <class T>
void plain(int64_t rounds) {
  typedef T Vector __attribute__((vector_size(16)));
  volatile T zero = 0;  // unknown to the compiler: neither the products nor equal chains can be merged
  Vector acc[CHAINS], factor = {}, addend = {};
  for (Vector& v : acc) v = Vector{}, v[0] = zero;
  factor[0] = zero, addend[0] = zero;
  for (; rounds; rounds--)
#pragma GCC unroll 12
    for (Vector& v : acc) v = v * factor + addend;
  for (Vector& v : acc) zero = v[0];
}

// Pieces of some 10 us until the time is over. The first ones, in which AMX and wide vectors wake up, do not count.
double rate(Loop loop, int macs_per_round, int milliseconds) {
  using Clock = std::chrono::steady_clock;
  const auto seconds = [](Clock::time_point t) { return std::chrono::duration<double>(Clock::now() - t).count(); };
  constexpr double PIECE = 1e-5, WARM = 2e-4;
  int64_t rounds = 64, done = 0;
  for (const auto start = Clock::now(); seconds(start) < WARM;) {
    const auto piece = Clock::now();
    loop(rounds);
    if (seconds(piece) < PIECE) rounds *= 2;
  }
  const auto start = Clock::now();
  double elapsed = 0;
  for (; elapsed < milliseconds * 1e-3; elapsed = seconds(start), done += rounds) loop(rounds);
  return double(done) * macs_per_round / elapsed;
}

double peak_int8(int milliseconds) {
#if defined(__x86_64__)
  if (isa() == Isa::amx) return rate(int8_tmm, TILES * ROWS * COLUMNS * 64, milliseconds);
  if (isa() == Isa::vnni) return rate(int8_zmm, CHAINS * 64, milliseconds);
  if (isa() == Isa::avx2) return rate(int8_ymm, CHAINS * 32, milliseconds);
#endif
  return rate(plain<int16_t>, CHAINS * 8, milliseconds);  // a bound: sums of bytes need 32 bits
}

double peak_fp32(int milliseconds) {
#if defined(__x86_64__)
  if (has_avx512()) return rate(fma_zmm, CHAINS * 16, milliseconds);
  if (isa() >= Isa::avx2) return rate(fma_ymm, CHAINS * 8, milliseconds);
#endif
  return rate(plain<float>, CHAINS * 4, milliseconds);
}

double peak_bf16(int milliseconds) {
#if defined(__x86_64__)
  if (isa() == Isa::amx) return rate(bf16_tmm, TILES * ROWS * COLUMNS * 32, milliseconds);
  if (has_avx512_bf16()) return rate(bf16_zmm, CHAINS * 32, milliseconds);
#endif
  return peak_fp32(milliseconds);
}

}  // namespace

double peak_macs(const char* kind, int milliseconds) {
  const std::string name = kind;
  if (milliseconds < 1) throw std::runtime_error("peak_macs: milliseconds is less than 1");
  if (name == "int8") return peak_int8(milliseconds);
  if (name == "fp32") return peak_fp32(milliseconds);
  if (name == "bf16") return peak_bf16(milliseconds);
  throw std::runtime_error("peak_macs: kind is none of int8, fp32, bf16: " + name);
}

}  // namespace r50
