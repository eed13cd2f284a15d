// conv_bn_relu in float16 and bfloat16: sums, scale, bias, residual and ReLU in float32, rounded once.
#include "cuda/conv.cuh"

namespace r50::gpu {
namespace {

template <Float TYPE>
struct Type {
  using Element = uint16_t;
  template <class T>
  using Columns = Dense<Type, T>;
  using Accumulator = float;
  static constexpr bool EXACT = false;  // sums depend on their order
  using Output = uint16_t;
  static constexpr bool RESIDUAL = true;
  static R50_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    TYPE == Float::FLOAT16 ? mma_f16(d, a, b) : mma_bf16(d, a, b);
  }
  struct Channel {
    float scale, shift;
  };
  static R50_DEVICE Channel channel(const Conv& p, int n) { return {p.scale[n], p.shift[n]}; }
  template <bool WITH>
  static R50_DEVICE uint16_t finish(const Conv& p, const Channel& c, float acc, const uint16_t* residual, uint32_t&) {
    float y = __fmaf_rn(acc, c.scale, c.shift);
    if (WITH) y = __fadd_rn(y, TYPE == Float::FLOAT16 ? unpack_f16(*residual) : unpack_bf16(*residual));
    if (p.relu && y < 0) y = 0;  // NaN stays, as it does in PyTorch
    return uint16_t(TYPE == Float::FLOAT16 ? pack_f16(y, 0) : pack_bf16(y, 0));
  }
  static R50_DEVICE bool failed(uint32_t) { return false; }
  static R50_DEVICE uint16_t exact(const Conv& p, const Channel& c, float acc, const uint16_t* residual) {
    uint32_t doubt = 0;
    return residual ? finish<true>(p, c, acc, residual, doubt) : finish<false>(p, c, acc, residual, doubt);
  }
};

template <Float TYPE>
struct Part : Type<TYPE> {
  using Output = float;
  static constexpr bool RESIDUAL = false;
  struct Channel {};
  static R50_DEVICE Channel channel(const Conv&, int) { return {}; }
  static R50_DEVICE float exact(const Conv&, const Channel&, float acc, const float*) { return acc; }
  template <bool>
  static R50_DEVICE float finish(const Conv&, const Channel&, float acc, const float*, uint32_t&) {
    return acc;
  }
};

}  // namespace

size_t conv_half_scratch(const Conv& p) { return scratch_of<Type<Float::FLOAT16>>(p); }
void conv_half(const Conv& p, Float type, void* scratch, Stream stream) {
  if (type == Float::FLOAT16)
    choose<Type<Float::FLOAT16>, Part<Float::FLOAT16>>(p, scratch, stream);
  else
    choose<Type<Float::BFLOAT16>, Part<Float::BFLOAT16>>(p, scratch, stream);
}

}  // namespace r50::gpu
