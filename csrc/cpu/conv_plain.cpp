// The definition in plain loops; every other kernel gives these bits.
#include <algorithm>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "conv.h"

namespace r50 {

void finish_row(const Conv& conv, int m, int p, const int32_t* acc) {
  const Packed& w = *conv.w;
  if (w.type != Type::int8) {  // logits, and acc holds floats
    std::memcpy(conv.out + conv.outs[m] + p * w.width * 4, acc, size_t(std::min(w.width, w.o - p * w.width)) * 4);
    return;
  }
  const int32_t hidden = w.rounding == BIASED ? MAGIC_BITS : 0;  // what pack_int8 put into the start of the accumulator
  for (int c = 0, n = p * w.width; c < w.width && n < w.o; c++, n++) {
    const int at = panel_position(Isa(w.isa), c);
    const int32_t sum = int32_t(uint32_t(acc[at]) - uint32_t(hidden));
    if (conv.kind == Out::s32) {
      reinterpret_cast<int32_t*>(conv.out + conv.outs[m])[n] = sum;
    } else if (conv.kind == Out::f32) {
      reinterpret_cast<float*>(conv.out + conv.outs[m])[n] = float(double(sum) * double(conv.f32_scale[n]));
    } else {
      const int64_t residual = conv.residual ? conv.residual[conv.outs[m] + n] : 0;
      conv.out[conv.outs[m] + n] = requantize(sum + residual * w.gain(p)[at], w.mult(p)[at]);
    }
  }
}

void conv_plain(const Conv& conv, int m0, int m1, int p0, int p1) {
  const Packed& w = *conv.w;
  for (int m = m0; m < m1; m++) {
    if (conv.outs[m] < 0) continue;
    for (int p = p0; p < p1; p++) {
      int32_t acc[16];
      for (int i = 0; i < 16; i++) acc[i] = w.start(p)[i];
      const int8_t* b = w.panel(p);
      for (int s = 0; s < w.operands; s++)
        for (int t = 0; t < conv.in[s].ntaps; t++) {
          const uint8_t* a = conv.in[s].a + conv.in[s].rows[m] + conv.in[s].taps[t];
          for (int k = 0; k < conv.in[s].k; k++, b += 16)
            for (int i = 0; i < 16; i++) acc[i] += a[k] * b[i];
        }
      finish_row(conv, m, p, acc);
    }
  }
}

Bytes allocate(int64_t bytes) {
  constexpr int64_t LARGE = 2 << 20;  // a page of that size, where there are any, saves 500 entries of the TLB
  const int64_t align = bytes >= LARGE ? LARGE : 64;
  const size_t size = size_t((bytes + align - 1) / align * align);
  Bytes data(static_cast<uint8_t*>(std::aligned_alloc(size_t(align), size)));
  if (!data) throw std::bad_alloc();
#if defined(__linux__)
  if (bytes >= LARGE) madvise(data.get(), size, MADV_HUGEPAGE);  // a wish
#endif
  return data;
}

void* scratch(size_t bytes) {
  thread_local Bytes buffer;
  thread_local size_t size = 0;
  if (size < bytes) {
    size = 0;
    buffer = allocate(int64_t(bytes));
    size = bytes;
  }
  return buffer.get();
}

}  // namespace r50
