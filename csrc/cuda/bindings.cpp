// CUDA bindings of library `resnet50`, whose schemas are in csrc/ops.cpp; on torch's stable ABI.
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cuda/stream.h"

namespace {

namespace gpu = r50::gpu;
using r50::check, r50::check_vector, r50::data;
using r50::Geometry, r50::OptionalTensor, r50::ScalarType, r50::Tensor;

// What make() allocates. PyTorch's words on why it could not go to stderr, and the stable ABI throws others, from which
// nobody could tell that it was for want of memory.
template <class Make>
Tensor allocated(Make&& make) {
  try {
    return make();
  } catch (const std::runtime_error&) {
    throw std::runtime_error("CUDA out of memory, or what else PyTorch has said above");
  }
}

Tensor new_flat(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return allocated([&] { return torch::stable::empty(sizes, type, std::nullopt, like.device()); });
}

Tensor new_nhwc(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w, ScalarType type) {
  return allocated([&] { return r50::new_nhwc(like, n, c, h, w, type); });
}

// Memory for a kernel to write to between its launches; the caching allocator hands it on in stream order.
class Scratch {
 public:
  Scratch(const Tensor& like, size_t bytes) {
    if (bytes) tensor_ = new_flat(like, {int64_t(bytes)}, ScalarType::Byte);
  }
  void* get() { return tensor_ ? tensor_->mutable_data_ptr() : nullptr; }

 private:
  OptionalTensor tensor_;
};

// x2 with its weights, 1x1
gpu::Input second(const Tensor& x2, const Tensor& weight2, const std::vector<int64_t>& stride2) {
  return {x2.const_data_ptr(), weight2.const_data_ptr(), int(x2.size(2)), int(x2.size(3)), int(x2.size(1)),
          int(x2.size(1)), 1, 1, int(stride2[0]), int(stride2[1]), 0, 0};
}

gpu::Conv conv(const Geometry& g, const Tensor& x, const Tensor& weight, const OptionalTensor& residual,
               Tensor& out) {
  // a tile's rows may lie beyond the last one
  STD_TORCH_CHECK(g.n * g.oh * g.ow <= (int64_t(1) << 31) - 512, "conv: more than 2^31 - 512 pixels of output");
  gpu::Conv p{};
  p.in[0] = {x.const_data_ptr(), weight.const_data_ptr(), int(g.h), int(g.w), int(g.c), int(g.c / g.groups),
             int(g.kh), int(g.kw), int(g.sh), int(g.sw), int(g.ph), int(g.pw)};
  p.in[1].kw = 1;
  p.m = int(g.n * g.oh * g.ow), p.o = int(g.o), p.oh = int(g.oh), p.ow = int(g.ow), p.groups = int(g.groups);
  p.group_o = int(g.o / g.groups);
  p.residual = residual ? residual->const_data_ptr() : nullptr;
  p.out = out.mutable_data_ptr();
  return p;
}

Tensor conv_int8(const Tensor& x, const Tensor& weight, const Tensor& mult, const Tensor& bias,
                 const OptionalTensor& residual, const OptionalTensor& gain, const OptionalTensor& x2,
                 const OptionalTensor& weight2, const OptionalTensor& pad_value, std::vector<int64_t> stride,
                 std::vector<int64_t> padding, std::vector<int64_t> stride2, int64_t groups) {
  const int device = x.get_device_index();
  const Geometry g = r50::check_conv_int8(x, weight, mult, bias, residual, gain, x2, weight2, pad_value, stride,
                                          padding, stride2, groups, device);
  const gpu::DeviceGuard guard(device);
  Tensor out = new_nhwc(x, g.n, g.o, g.oh, g.ow, ScalarType::Byte);
  gpu::Conv p = conv(g, x, weight, residual, out);
  if (x2) p.in[1] = second(*x2, *weight2, stride2);
  p.pad_value = data<uint8_t>(pad_value);
  p.mult = data<int32_t>(mult), p.bias = data<int32_t>(bias), p.gain = data<int32_t>(gain);
  Scratch scratch(x, gpu::conv_int8_scratch(p));
  gpu::conv_int8(p, scratch.get(), gpu::current_stream(device));
  return out;
}

// Weights that pack_2_4 (csrc/reference.py) has packed.
void check_packed(const char* op, const char* name, const Tensor& packed, const Tensor& x, int64_t o, int64_t taps,
                  int device) {
  const int64_t blocks = (o + 15) / 16, steps = (taps * x.size(1) + 63) / 64;
  STD_TORCH_CHECK(x.size(1) % 16 == 0, op, ": x and x2 must have multiples of 16 channels (N, C, H, W), got ",
                  r50::shape_of(x));
  const std::string sizes = std::to_string(blocks) + ", " + std::to_string(steps);
  check(packed, op, name, ScalarType::Byte, "uint8", {blocks, steps, gpu::BLOCK_2_4},
        ("(" + sizes + ", " + std::to_string(gpu::BLOCK_2_4) + ")").c_str(), device);
  STD_TORCH_CHECK(packed.numel() <= INT32_MAX, op, ": ", name, " must have fewer than 2^31 bytes");
  STD_TORCH_CHECK(gpu::aligned(packed.const_data_ptr()), op, ": ", name, " must begin at a multiple of 16 bytes");
}

Tensor conv_int8_2_4(const Tensor& x, const Tensor& weight, const Tensor& mult, const Tensor& bias,
                     std::vector<int64_t> kernel, const OptionalTensor& residual, const OptionalTensor& gain,
                     const OptionalTensor& x2, const OptionalTensor& weight2, std::vector<int64_t> stride,
                     std::vector<int64_t> padding, std::vector<int64_t> stride2) {
  const char* op = "conv_int8_2_4";
  const int device = x.get_device_index();
  r50::check(x, op, "x", ScalarType::Byte, "uint8", {-1, -1, -1, -1}, "(N, C, H, W)", device);
  STD_TORCH_CHECK(mult.dim() == 1 && kernel.size() == 2 && kernel[0] > 0 && kernel[1] > 0, op,
                  ": mult must be (O,), got ", r50::shape_of(mult), ", and kernel two numbers from 1");
  const Geometry g = r50::geometry(op, x, mult.size(0), kernel[0], kernel[1], stride, padding, 1);
  r50::check_sums(op, g, mult, bias, residual, gain, x2, weight2, stride2, device);
  check_packed(op, "weight", weight, x, g.o, g.kh * g.kw, device);
  if (x2) check_packed(op, "weight2", *weight2, *x2, g.o, 1, device);
  const gpu::DeviceGuard guard(device);
  Tensor out = new_nhwc(x, g.n, g.o, g.oh, g.ow, ScalarType::Byte);
  gpu::Conv p = conv(g, x, weight, residual, out);
  if (x2) p.in[1] = second(*x2, *weight2, stride2);
  p.mult = data<int32_t>(mult), p.bias = data<int32_t>(bias), p.gain = data<int32_t>(gain);
  Scratch scratch(x, gpu::conv_int8_2_4_scratch(p));
  gpu::conv_int8_2_4(p, scratch.get(), gpu::current_stream(device));
  return out;
}

Tensor gemm_int8(const Tensor& a, const Tensor& b, const OptionalTensor& bias, const OptionalTensor& mult,
                 const OptionalTensor& scale) {
  const int device = a.get_device_index();
  const ScalarType type = r50::check_gemm_int8(a, b, bias, mult, scale, device);
  const gpu::DeviceGuard guard(device);
  Tensor out = new_flat(a, {a.size(0), b.size(0)}, type);
  const Geometry g{a.size(0), a.size(1), 1, 1, b.size(0), 1, 1, 1, 1, 0, 0, 1, 1, 1};
  gpu::Conv p = conv(g, a, b, {}, out);
  p.mult = data<int32_t>(mult), p.bias = data<int32_t>(bias), p.scale = data<float>(scale);
  Scratch scratch(a, mult ? gpu::conv_int8_scratch(p) : gpu::gemm_int8_scratch(p));
  (mult ? gpu::conv_int8 : gpu::gemm_int8)(p, scratch.get(), gpu::current_stream(device));
  return out;
}

Tensor conv_bn_relu(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& bias,
                    const OptionalTensor& residual, bool relu, std::vector<int64_t> stride,
                    std::vector<int64_t> padding, int64_t groups) {
  const int device = x.get_device_index();
  const bool is_bf16 = r50::check_activations("conv_bn_relu", x, {}, device, ScalarType::Half, "float16",
                                              ScalarType::BFloat16, "bfloat16");
  const Geometry g = r50::check_conv_bn_relu(x, is_bf16 ? "bfloat16" : "float16", weight, scale, bias, residual,
                                             stride, padding, groups, device);
  const gpu::DeviceGuard guard(device);
  Tensor out = new_nhwc(x, g.n, g.o, g.oh, g.ow, x.scalar_type());
  gpu::Conv p = conv(g, x, weight, residual, out);
  p.scale = data<float>(scale), p.shift = data<float>(bias), p.relu = relu;
  Scratch scratch(x, gpu::conv_half_scratch(p));
  gpu::conv_half(p, is_bf16 ? gpu::Float::BFLOAT16 : gpu::Float::FLOAT16, scratch.get(), gpu::current_stream(device));
  return out;
}

Tensor max_pool_int8(const Tensor& x, int64_t kernel, int64_t stride, int64_t padding) {
  const char* op = "max_pool_int8";
  const int device = x.get_device_index();
  check(x, op, "x", ScalarType::Byte, "uint8", {-1, -1, -1, -1}, "(N, C, H, W)", device);
  STD_TORCH_CHECK(kernel > 0 && stride > 0 && padding >= 0 && 2 * padding <= kernel &&
                      x.size(2) + 2 * padding >= kernel && x.size(3) + 2 * padding >= kernel,
                  op, ": kernel, stride and padding must be positive, with padding at most half the kernel and the "
                  "kernel inside the padded x; got ", kernel, ", ", stride, ", ", padding, ", x ", r50::shape_of(x));
  const gpu::DeviceGuard guard(device);
  gpu::Pool p{data<uint8_t>(x), nullptr, int(x.size(0)), int(x.size(2)), int(x.size(3)), int(x.size(1)), int(kernel),
              int(stride), int(padding), int((x.size(2) + 2 * padding - kernel) / stride + 1),
              int((x.size(3) + 2 * padding - kernel) / stride + 1)};
  Tensor out = new_nhwc(x, p.n, p.c, p.oh, p.ow, ScalarType::Byte);
  p.out = static_cast<uint8_t*>(out.mutable_data_ptr());
  gpu::max_pool_int8(p, gpu::current_stream(device));
  return out;
}

Tensor avg_pool_int8(const Tensor& x, const Tensor& mult) {
  const char* op = "avg_pool_int8";
  const int device = x.get_device_index();
  check(x, op, "x", ScalarType::Byte, "uint8", {-1, -1, -1, -1}, "(N, C, H, W)", device);
  check_vector(mult, op, "mult", ScalarType::Int, "int32", 1, device);
  const gpu::DeviceGuard guard(device);
  Tensor out = new_flat(x, {x.size(0), x.size(1)}, ScalarType::Byte);
  gpu::avg_pool_int8(data<uint8_t>(x), static_cast<uint8_t*>(out.mutable_data_ptr()), int(x.size(0)),
                     int(x.size(2) * x.size(3)), int(x.size(1)), data<int32_t>(mult), gpu::current_stream(device));
  return out;
}

// Checks x and what is like it -> the problem, with its types and sizes.
gpu::BatchNorm batch_norm(const char* op, const Tensor& x,
                          std::initializer_list<std::pair<const char*, const Tensor*>> others, int device) {
  gpu::BatchNorm p{};
  if (x.scalar_type() == ScalarType::Float) {
    r50::check_activations(op, x, others, device, ScalarType::Half, "float16", ScalarType::Float, "float32");
    p.type = gpu::Float::FLOAT32;
  } else {
    const bool is_bf16 = r50::check_activations(op, x, others, device, ScalarType::Half, "float32, float16",
                                                ScalarType::BFloat16, "bfloat16");
    p.type = is_bf16 ? gpu::Float::BFLOAT16 : gpu::Float::FLOAT16;
  }
  p.m = x.numel() / x.size(1), p.c = int(x.size(1)), p.x = x.const_data_ptr();
  return p;
}

Tensor new_like(const Tensor& x) { return new_nhwc(x, x.size(0), x.size(1), x.size(2), x.size(3), x.scalar_type()); }
float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

std::tuple<Tensor, Tensor, Tensor> bn_relu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                           const OptionalTensor& residual, double eps, bool relu) {
  const char* op = "bn_relu";
  const int device = x.get_device_index();
  gpu::BatchNorm p = batch_norm(op, x, {}, device);
  if (residual) batch_norm(op, x, {{"residual", &*residual}}, device);
  check_vector(weight, op, "weight", ScalarType::Float, "float32", p.c, device);
  check_vector(bias, op, "bias", ScalarType::Float, "float32", p.c, device);
  const gpu::DeviceGuard guard(device);
  Tensor y = new_like(x), mean = new_flat(x, {p.c}, ScalarType::Float), invstd = new_flat(x, {p.c}, ScalarType::Float);
  p.relu = relu, p.eps = float(eps), p.residual = residual ? residual->const_data_ptr() : nullptr;
  p.weight = data<float>(weight), p.bias = data<float>(bias);
  p.mean = floats(mean), p.invstd = floats(invstd), p.y = y.mutable_data_ptr();
  Scratch scratch(x, gpu::bn_relu_scratch(p));
  gpu::bn_relu(p, scratch.get(), gpu::current_stream(device));
  return {y, mean, invstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_relu_backward(const Tensor& grad, const Tensor& y, const Tensor& x,
                                                            const Tensor& weight, const Tensor& mean,
                                                            const Tensor& invstd, bool relu, bool residual) {
  const char* op = "bn_relu_backward";
  const int device = x.get_device_index();
  gpu::BatchNorm p = batch_norm(op, x, {{"grad", &grad}, {"y", &y}}, device);
  check_vector(weight, op, "weight", ScalarType::Float, "float32", p.c, device);
  check_vector(mean, op, "mean", ScalarType::Float, "float32", p.c, device);
  check_vector(invstd, op, "invstd", ScalarType::Float, "float32", p.c, device);
  const gpu::DeviceGuard guard(device);
  Tensor dx = new_like(x), dresidual = residual ? new_like(x) : new_flat(x, {0}, x.scalar_type());
  Tensor dweight = new_flat(x, {p.c}, ScalarType::Float), dbias = new_flat(x, {p.c}, ScalarType::Float);
  p.relu = relu, p.weight = data<float>(weight);
  p.mean = const_cast<float*>(data<float>(mean)), p.invstd = const_cast<float*>(data<float>(invstd));
  p.y = const_cast<void*>(y.const_data_ptr()), p.grad = grad.const_data_ptr(), p.dx = dx.mutable_data_ptr();
  p.dresidual = residual ? dresidual.mutable_data_ptr() : nullptr, p.dweight = floats(dweight), p.dbias = floats(dbias);
  Scratch scratch(x, gpu::bn_relu_scratch(p));
  gpu::bn_relu_backward(p, scratch.get(), gpu::current_stream(device));
  return {dx, dresidual, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet50, R50_KEY, m) {
  m.impl("conv_int8", TORCH_BOX(&conv_int8));
  m.impl("conv_int8_2_4", TORCH_BOX(&conv_int8_2_4));
  m.impl("gemm_int8", TORCH_BOX(&gemm_int8));
  m.impl("conv_bn_relu", TORCH_BOX(&conv_bn_relu));
  m.impl("max_pool_int8", TORCH_BOX(&max_pool_int8));
  m.impl("avg_pool_int8", TORCH_BOX(&avg_pool_int8));
  m.impl("bn_relu", TORCH_BOX(&bn_relu));
  m.impl("bn_relu_backward", TORCH_BOX(&bn_relu_backward));
}
