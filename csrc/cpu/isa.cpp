// Which instruction sets may run: asked of the CPU by cpuid, of the system by XGETBV, and AMX of the Linux kernel,
// which keeps its 8 KiB of tile registers only for processes that request them. Once per process.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(__x86_64__) && !defined(RESNET50_EMULATED)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace r50 {
namespace {

constexpr const char* NAMES[] = {"plain", "avx2", "vnni", "amx"};

struct Features {
  bool avx2 = false, avx512 = false, vnni = false, vbmi = false, avx512_bf16 = false, amx = false;
  Isa isa = Isa::plain;  // what is used of them
};

Features detect() {
  Features f;
#if defined(RESNET50_EMULATED)  // the tests' build runs every path on any CPU
  f = {true, true, true, true, true, true};
#elif defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return f;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const bool fma = c & bit_FMA, ymm = (low & 0x6) == 0x6, zmm = (low & 0xe6) == 0xe6,
             tiles = (low & 0x60000) == 0x60000;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  f.avx2 = ymm && fma && (b & bit_AVX2) && (b & bit_BMI) && (b & bit_BMI2);
  f.avx512 = f.avx2 && zmm && (b & bit_AVX512F) && (b & bit_AVX512BW) && (b & bit_AVX512DQ) && (b & bit_AVX512VL);
  f.vnni = f.avx512 && (c & (1u << 11)), f.vbmi = f.vnni && (c & (1u << 1));
  const bool amx = (d & (1u << 24)) && (d & (1u << 25)) && (d & (1u << 22));  // tiles, int8, bf16
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) f.avx512_bf16 = f.avx512 && (a & (1u << 5));
#if defined(__linux__)
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
  f.amx = f.vnni && f.avx512_bf16 && tiles && amx && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
#endif
#endif
  return f;
}

Features decide() {
  Features f = detect();
  f.isa = f.amx ? Isa::amx : f.vnni ? Isa::vnni : f.avx2 ? Isa::avx2 : Isa::plain;
  const char* forced = std::getenv("RESNET50_ISA");
  if (!forced || !*forced) return f;
  for (int i = 0; i < 4; i++)
    if (!std::strcmp(forced, NAMES[i])) {
      if (i > int(f.isa))
        throw std::runtime_error(std::string("RESNET50_ISA=") + forced + ": this CPU has no more than " +
                                 NAMES[int(f.isa)]);
      f.isa = Isa(i);
      return f;
    }
  throw std::runtime_error(std::string("RESNET50_ISA=") + forced + ": none of amx, vnni, avx2, plain");
}

const Features& features() {
  static const Features f = decide();
  return f;
}

}  // namespace

Isa isa() { return features().isa; }
const char* isa_name() { return NAMES[int(isa())]; }
bool has_avx512() { return features().avx512 && isa() >= Isa::vnni; }
bool has_avx512_vbmi() { return features().vbmi && isa() >= Isa::vnni; }
bool has_avx512_bf16() { return features().avx512_bf16 && isa() >= Isa::vnni; }

}  // namespace r50
