// What becomes of int32 sums: uint8 by integers alone (csrc/README.md has the formula), or the sums themselves.
#pragma once
#include "cuda/conv.cuh"

namespace r50::gpu {

struct Int8 {
  using Element = uint8_t;
  template <class T>
  using Columns = Dense<Int8, T>;
  using Accumulator = int32_t;
  static constexpr bool EXACT = true;  // sums are the same in any order
  static R50_DEVICE void multiply_add(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_u8s8(d, a, b);
  }
};

// By one fma where the sum is below 2^22, which as bits of a float are its mantissa then: those of 1.5 * 2^23 + sum.
// That times j / 2^22 is 3 j too much, and added to 1.5 * 2^23 there is no room for a fraction: one rounding.
struct Requantized : Int8 {
  using Output = uint8_t;
  static constexpr bool RESIDUAL = true;
  static constexpr uint32_t MAGIC = 0x4b400000, EXPONENT = 0x4b000000;  // of the float 1.5 * 2^23
  struct Channel {
    uint32_t start = MAGIC;  // + bias
    int32_t gain = 0;
    float scale = 0, addend = 0;
  };
  static R50_DEVICE Channel channel(const Conv& p, int n) {
    const int32_t mult = p.mult[n];
    return {MAGIC + uint32_t(p.bias ? p.bias[n] : 0), p.residual ? p.gain[n] : 0, float(mult) * 0x1p-22f,
            float(12582912 - 3 * mult)};
  }
  static R50_DEVICE uint8_t clamped(int32_t y) { return uint8_t(y < 0 ? 0 : y > 255 ? 255 : y); }

  template <bool WITH>
  static R50_DEVICE uint32_t bits(const Channel& c, int32_t acc, const uint8_t* residual) {
    return c.start + uint32_t(acc) + (WITH ? uint32_t(c.gain * *residual) : 0);
  }
  template <bool WITH>
  static R50_DEVICE uint8_t finish(const Conv&, const Channel& c, int32_t acc, const uint8_t* residual,
                                   uint32_t& doubt) {
    const uint32_t sum = bits<WITH>(c, acc, residual);
    doubt |= sum ^ EXPONENT;
    return clamped(int32_t(__float_as_uint(__fmaf_rn(__uint_as_float(sum), c.scale, c.addend)) - MAGIC));
  }
  static R50_DEVICE bool failed(uint32_t doubt) { return doubt >> 23; }

  static R50_DEVICE uint8_t exact(const Conv&, const Channel& c, int32_t acc, const uint8_t* residual) {
    const uint32_t sum = residual ? bits<true>(c, acc, residual) : bits<false>(c, acc, residual);
    const int64_t product = int64_t(int32_t(sum - MAGIC)) * int32_t(c.scale * 0x1p22f);
    // half less one, and one more where the quotient is odd: ties go to the even neighbour
    return clamped(int32_t((product + ((1 << 21) - 1) + (product >> 22 & 1)) >> 22));
  }
};

// The accumulators themselves, with or without the bias, or as many bits of float32.
struct Raw : Int8 {
  using Output = int32_t;
  static constexpr bool RESIDUAL = false;
  struct Channel {
    int32_t bias;
    float scale;
  };
  static R50_DEVICE Channel channel(const Conv& p, int n) {
    return {p.bias ? p.bias[n] : 0, p.scale ? p.scale[n] : 0};
  }
  static R50_DEVICE int32_t exact(const Conv& p, const Channel& c, int32_t acc, const int32_t*) {
    acc += c.bias;
    return p.scale ? __float_as_int(float(double(acc) * double(c.scale))) : acc;
  }
  template <bool>
  static R50_DEVICE int32_t finish(const Conv& p, const Channel& c, int32_t acc, const int32_t* none, uint32_t&) {
    return exact(p, c, acc, none);
  }
  static R50_DEVICE bool failed(uint32_t) { return false; }
};

}  // namespace r50::gpu
