// Vectors of W lanes for kernels that are written once: gcc's vector extension, compiled for whatever the calling
// function targets.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && !defined(RESNET50_EMULATED)
#define TARGET(isa) __attribute__((target(isa)))
#else
#define TARGET(isa)
#endif
#define INLINE inline __attribute__((always_inline))  // must be: inlined, it is compiled for its caller's target
#pragma GCC diagnostic ignored "-Wpsabi"             // vectors are returned by inlined functions only

namespace r50 {

struct bf16 {
  uint16_t bits;
};

template <int W>
struct Vec {
  typedef float F __attribute__((vector_size(4 * W)));
  typedef uint32_t U __attribute__((vector_size(4 * W)));
  typedef uint16_t H __attribute__((vector_size(2 * W)));
};

template <int W>
INLINE typename Vec<W>::F load(const float* p) {
  typename Vec<W>::F v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <int W>
INLINE typename Vec<W>::F load(const bf16* p) {
  typename Vec<W>::H h;
  std::memcpy(&h, p, sizeof h);
  return (typename Vec<W>::F)(__builtin_convertvector(h, typename Vec<W>::U) << 16);
}

template <int W>
INLINE void store(float* p, const typename Vec<W>::F& v) {
  std::memcpy(p, &v, sizeof v);
}

template <int W>
INLINE void store(bf16* p, const typename Vec<W>::F& v) {  // round half to even; a NaN stays one
  const auto bits = (typename Vec<W>::U)v;
  const auto rounded = v == v ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
  const auto h = __builtin_convertvector(rounded >> 16, typename Vec<W>::H);
  std::memcpy(p, &h, sizeof h);
}

}  // namespace r50
