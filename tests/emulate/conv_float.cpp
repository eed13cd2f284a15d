// csrc/cpu's conv_bn_relu as a C function that takes any instruction set on any CPU. It stands in for isa.cpp, and for
// the memory of conv_plain.cpp: every piece is new and of the size that was asked for, so that a sanitizer knows its
// end.
#include <cstdlib>
#include <new>

#include "conv.h"
#include "tiles.h"

namespace r50 {
namespace {
Isa chosen = Isa::plain;
bool bf16_units = false;
}  // namespace

Isa isa() { return chosen; }
bool has_avx512() { return chosen >= Isa::vnni; }
bool has_avx512_bf16() { return has_avx512() && bf16_units; }

Bytes allocate(int64_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, size_t(bytes))) throw std::bad_alloc();
  return Bytes(static_cast<uint8_t*>(memory));
}

void* scratch(size_t bytes) {
  thread_local Bytes buffer;
  buffer = allocate(int64_t(bytes));
  return buffer.get();
}
}  // namespace r50

// -> how many threads still hold AMX tiles
extern "C" int float_conv(const r50::ConvFloat* conv, void* out, int threads, int isa, int bf16_units) {
  r50::chosen = r50::Isa(isa);
  r50::bf16_units = bf16_units;
  r50::conv_bn_relu(*conv, out, threads);
  return r50::emulated_configured;
}
