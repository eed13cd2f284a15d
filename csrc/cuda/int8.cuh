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

struct Requantized : Int8 {
  using Output = uint8_t;
  static constexpr bool RESIDUAL = true;
  struct Channel {
    int32_t mult, bias, gain;
  };
  static R50_DEVICE Channel channel(const Conv& p, int n) {
    return {p.mult[n], p.bias ? p.bias[n] : 0, p.residual ? p.gain[n] : 0};
  }
  static R50_DEVICE uint8_t finish(const Conv& p, const Channel& c, int32_t acc, const uint8_t* residual) {
    acc += c.bias;
    if (p.residual) acc += c.gain * *residual;
    const int64_t product = int64_t(acc) * c.mult;
    // half less one, and one more where the quotient is odd: ties go to the even neighbour
    const int32_t y = int32_t((product + ((1 << 21) - 1) + (product >> 22 & 1)) >> 22);
    return uint8_t(y < 0 ? 0 : y > 255 ? 255 : y);
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
  static R50_DEVICE int32_t finish(const Conv& p, const Channel& c, int32_t acc, const int32_t*) {
    acc += c.bias;
    return p.scale ? __float_as_int(float(double(acc) * double(c.scale))) : acc;
  }
};

}  // namespace r50::gpu
