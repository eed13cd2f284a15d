// Schemas of library `resnet50` and their CPU bindings, on torch's stable ABI (kernels are free of torch headers).
// csrc/__init__.py parses the m.def lines below when it must register the PyTorch reference instead of this file.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/network.h"

STABLE_TORCH_LIBRARY(resnet50, m) {
  m.def("conv_int8(Tensor x, Tensor weight, Tensor mult, Tensor bias, Tensor? residual=None, Tensor? gain=None, "
        "Tensor? x2=None, Tensor? weight2=None, Tensor? pad_value=None, int[] stride=[1, 1], int[] padding=[0, 0], "
        "int[] stride2=[1, 1], int groups=1) -> Tensor");
  m.def("gemm_int8(Tensor a, Tensor b, Tensor? bias=None, Tensor? mult=None, Tensor? scale=None) -> Tensor");
  m.def("pack_int8(Tensor weight, Tensor mult, Tensor bias, Tensor? gain=None, Tensor? weight2=None) -> Tensor");
  m.def("network_int8(Tensor pixels, Tensor plan, int classes) -> Tensor");
  m.def("network_int8_profile(Tensor pixels, Tensor plan, int classes) -> Tensor");
  m.def("peak_macs(str kind, int milliseconds) -> float");
  m.def("conv_bn_relu(Tensor x, Tensor weight, Tensor scale, Tensor bias, Tensor? residual=None, "
        "bool relu=True, int[] stride=[1, 1], int[] padding=[0, 0], int groups=1) -> Tensor");
  m.def("bn_relu(Tensor x, Tensor weight, Tensor bias, Tensor? residual, float eps, bool relu) -> (Tensor, Tensor, Tensor)");
  m.def("bn_relu_backward(Tensor grad, Tensor y, Tensor x, Tensor weight, Tensor mean, Tensor invstd, "
        "bool relu, bool residual) -> (Tensor, Tensor, Tensor, Tensor)");
}

namespace {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;

int threads() { return std::min<int>(torch::stable::get_num_threads(), 256); }

std::string shape_of(const Tensor& t) {
  std::string text = "(";
  for (int64_t i = 0; i < t.dim(); i++) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + ")";
}

// Sizes as expected (-1: any positive one), dtype, CPU, and memory: channels_last for 4 dimensions, contiguous for others.
void check(const Tensor& t, const char* op, const char* name, ScalarType type, const char* type_name, std::initializer_list<int64_t> sizes,
           const char* expected) {
  bool fits = t.dim() == int64_t(sizes.size()) && t.scalar_type() == type && t.get_device_index() < 0;
  int64_t i = 0, stride = 1;
  if (fits)
    for (int64_t size : sizes) {
      fits &= t.size(i) > 0 && (size < 0 || t.size(i) == size);
      i++;
    }
  STD_TORCH_CHECK(fits, op, ": ", name, " must be ", type_name, " ", expected, " on the CPU and not empty, got shape ", shape_of(t));
  const int nhwc[] = {1, 3, 2, 0}, rows[] = {3, 2, 1, 0};
  for (int d = 0; d < t.dim(); d++) {
    const int dim = t.dim() == 4 ? nhwc[d] : rows[d + 4 - t.dim()];
    STD_TORCH_CHECK(t.size(dim) == 1 || t.stride(dim) == stride, op, ": ", name, " must be ",
                    t.dim() == 4 ? "channels_last" : "contiguous", ", expected ", expected);
    stride *= t.size(dim);
  }
}

void check_vector(const OptionalTensor& t, const char* op, const char* name, ScalarType type, const char* type_name, int64_t n) {
  if (t) check(*t, op, name, type, type_name, {n}, ("(" + std::to_string(n) + ",)").c_str());
}

template <typename T>
const T* data(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }
template <typename T>
const T* data(const OptionalTensor& t) { return t ? data<T>(*t) : nullptr; }

Tensor new_nhwc(int64_t n, int64_t c, int64_t h, int64_t w, ScalarType type) {
  return torch::stable::empty({n, c, h, w}, type, std::nullopt, std::nullopt, std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

struct Geometry {
  int64_t n, c, h, w, o, kh, kw, sh, sw, ph, pw, groups, oh, ow;
};

Geometry geometry(const char* op, const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                  const std::vector<int64_t>& padding, int64_t groups) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4, op, ": x must be (N, C, H, W) and weight (O, C / groups, kh, kw), got ", shape_of(x),
                  " and ", shape_of(weight));
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2, op, ": stride and padding must have two numbers each");
  Geometry g{x.size(0), x.size(1), x.size(2), x.size(3), weight.size(0), weight.size(2), weight.size(3), stride[0], stride[1],
             padding[0], padding[1], groups, 0, 0};
  STD_TORCH_CHECK(stride[0] > 0 && stride[1] > 0 && padding[0] >= 0 && padding[1] >= 0 && groups > 0 && g.c % groups == 0 &&
                      g.o % groups == 0 && weight.size(1) == g.c / groups,
                  op, ": weight must be (O, ", g.c, " / groups, kh, kw) with O a multiple of groups, and stride positive; got ",
                  shape_of(weight), ", groups ", groups);
  g.oh = (g.h + 2 * g.ph - g.kh) / g.sh + 1;
  g.ow = (g.w + 2 * g.pw - g.kw) / g.sw + 1;
  STD_TORCH_CHECK(g.h + 2 * g.ph >= g.kh && g.w + 2 * g.pw >= g.kw, op, ": x ", shape_of(x), " is smaller than the kernel");
  return g;
}

Tensor conv_int8(const Tensor& x, const Tensor& weight, const Tensor& mult, const Tensor& bias, const OptionalTensor& residual,
                 const OptionalTensor& gain, const OptionalTensor& x2, const OptionalTensor& weight2, const OptionalTensor& pad_value,
                 std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> stride2, int64_t groups) {
  const char* op = "conv_int8";
  const Geometry g = geometry(op, x, weight, stride, padding, groups);
  check(x, op, "x", ScalarType::Byte, "uint8", {-1, -1, -1, -1}, "(N, C, H, W)");
  check(weight, op, "weight", ScalarType::Char, "int8", {-1, -1, -1, -1}, "(O, C / groups, kh, kw)");
  check_vector(mult, op, "mult", ScalarType::Int, "int32", g.o);
  check_vector(bias, op, "bias", ScalarType::Int, "int32", g.o);
  check_vector(gain, op, "gain", ScalarType::Int, "int32", g.o);
  check_vector(pad_value, op, "pad_value", ScalarType::Byte, "uint8", g.c);
  STD_TORCH_CHECK(bool(residual) == bool(gain) && bool(x2) == bool(weight2), op, ": residual goes with gain, and x2 with weight2");
  r50::ConvInt8 a{g.n,  g.h,  g.w,  g.c, g.o, g.kh, g.kw, g.sh, g.sw, g.ph, g.pw, groups, data<uint8_t>(x), data<int8_t>(weight),
                  data<int32_t>(mult), data<int32_t>(bias), data<int32_t>(gain), data<uint8_t>(residual), 0, 0, 0, 1, 1,
                  data<uint8_t>(x2), data<int8_t>(weight2), data<uint8_t>(pad_value)};
  if (residual)
    check(*residual, op, "residual", ScalarType::Byte, "uint8", {g.n, g.o, g.oh, g.ow}, "like the output (N, O, H', W')");
  if (x2) {
    check(*x2, op, "x2", ScalarType::Byte, "uint8", {g.n, -1, -1, -1}, "(N, C2, H2, W2)");
    a.h2 = x2->size(2), a.w2 = x2->size(3), a.c2 = x2->size(1);
    check(*weight2, op, "weight2", ScalarType::Char, "int8", {g.o, a.c2, 1, 1}, "(O, C2, 1, 1)");
    STD_TORCH_CHECK(groups == 1 && stride2.size() == 2 && stride2[0] > 0 && stride2[1] > 0 && (a.h2 - 1) / stride2[0] + 1 == g.oh &&
                        (a.w2 - 1) / stride2[1] + 1 == g.ow,
                    op, ": x2 with stride2 must give the output's size ", g.oh, "x", g.ow, ", and groups must be 1; got x2 ",
                    shape_of(*x2));
    a.stride2_h = stride2[0], a.stride2_w = stride2[1];
  }
  Tensor out = new_nhwc(g.n, g.o, g.oh, g.ow, ScalarType::Byte);
  r50::conv_int8(a, static_cast<uint8_t*>(out.mutable_data_ptr()), threads());
  return out;
}

Tensor gemm_int8(const Tensor& a, const Tensor& b, const OptionalTensor& bias, const OptionalTensor& mult, const OptionalTensor& scale) {
  const char* op = "gemm_int8";
  check(a, op, "a", ScalarType::Byte, "uint8", {-1, -1}, "(M, K)");
  check(b, op, "b", ScalarType::Char, "int8", {-1, a.size(1)}, "(N, K)");
  const int64_t n = b.size(0);
  check_vector(bias, op, "bias", ScalarType::Int, "int32", n);
  check_vector(mult, op, "mult", ScalarType::Int, "int32", n);
  check_vector(scale, op, "scale", ScalarType::Float, "float32", n);
  STD_TORCH_CHECK(!(mult && scale), op, ": mult (uint8 result) and scale (float32 result) exclude each other");
  Tensor out = torch::stable::empty({a.size(0), n}, mult ? ScalarType::Byte : scale ? ScalarType::Float : ScalarType::Int);
  r50::gemm_int8(data<uint8_t>(a), data<int8_t>(b), data<int32_t>(bias), data<int32_t>(mult), data<float>(scale), a.size(0), n,
                 a.size(1), out.mutable_data_ptr(), threads());
  return out;
}

// -> uint8 (bytes,), for csrc/plan.py
Tensor pack_int8(const Tensor& weight, const Tensor& mult, const Tensor& bias, const OptionalTensor& gain, const OptionalTensor& weight2) {
  const char* op = "pack_int8";
  check(weight, op, "weight", ScalarType::Char, "int8", {-1, -1, -1, -1}, "(O, C, kh, kw)");
  const int64_t o = weight.size(0), c = weight.size(1), kh = weight.size(2), kw = weight.size(3);
  check_vector(mult, op, "mult", ScalarType::Int, "int32", o);
  check_vector(bias, op, "bias", ScalarType::Int, "int32", o);
  check_vector(gain, op, "gain", ScalarType::Int, "int32", o);
  if (weight2) check(*weight2, op, "weight2", ScalarType::Char, "int8", {o, -1, 1, 1}, "(O, C2, 1, 1)");
  const int64_t c2 = weight2 ? weight2->size(1) : 0;
  Tensor out;
  r50::pack_int8(o, kh, kw, c, data<int8_t>(weight), c2, data<int8_t>(weight2), data<int32_t>(mult), data<int32_t>(bias),
                 data<int32_t>(gain), [&](int64_t bytes) {
                   out = torch::stable::empty({bytes}, ScalarType::Byte);
                   return static_cast<uint8_t*>(out.mutable_data_ptr());
                 });
  return out;
}

Tensor run_network(const Tensor& pixels, const Tensor& plan, int64_t classes, Tensor* nanoseconds, const char* op) {
  check(plan, op, "plan", ScalarType::Byte, "uint8", {-1}, "(bytes,) from csrc.build_plan");
  STD_TORCH_CHECK(plan.numel() >= int64_t(sizeof(r50::PlanHeader)), op, ": plan is not what csrc.build_plan returned");
  const auto& header = *reinterpret_cast<const r50::PlanHeader*>(data<uint8_t>(plan));
  check(pixels, op, "pixels", ScalarType::Byte, "uint8", {-1, header.channels, -1, -1}, "(N, 3, H, W)");
  STD_TORCH_CHECK(classes == header.classes, op, ": the plan has ", header.classes, " classes, not ", classes);
  Tensor logits = torch::stable::empty({pixels.size(0), classes}, ScalarType::Float);
  if (nanoseconds) {
    *nanoseconds = torch::stable::empty({header.steps}, ScalarType::Long);
    torch::stable::zero_(*nanoseconds);
  }
  r50::network_int8(data<uint8_t>(plan), plan.numel(), data<uint8_t>(pixels), int(pixels.size(0)), int(pixels.size(2)),
                    int(pixels.size(3)), static_cast<float*>(logits.mutable_data_ptr()), threads(),
                    nanoseconds ? static_cast<int64_t*>(nanoseconds->mutable_data_ptr()) : nullptr);
  return logits;
}

Tensor network_int8(const Tensor& pixels, const Tensor& plan, int64_t classes) {
  return run_network(pixels, plan, classes, nullptr, "network_int8");
}

Tensor network_int8_profile(const Tensor& pixels, const Tensor& plan, int64_t classes) {
  Tensor nanoseconds;
  run_network(pixels, plan, classes, &nanoseconds, "network_int8_profile");
  return nanoseconds;
}

double peak_macs(std::string kind, int64_t milliseconds) { return r50::peak_macs(kind.c_str(), int(milliseconds)); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet50, CPU, m) {
  m.impl("conv_int8", TORCH_BOX(&conv_int8));
  m.impl("gemm_int8", TORCH_BOX(&gemm_int8));
  m.impl("pack_int8", TORCH_BOX(&pack_int8));
  m.impl("network_int8", TORCH_BOX(&network_int8));
  m.impl("network_int8_profile", TORCH_BOX(&network_int8_profile));
}

STABLE_TORCH_LIBRARY_IMPL(resnet50, CompositeExplicitAutograd, m) { m.impl("peak_macs", TORCH_BOX(&peak_macs)); }

namespace {

// All (N, C, H, W) alike, channels_last, of one dtype. -> whether that is bfloat16
bool check_activations(const char* op, const Tensor& x,
                       std::initializer_list<std::pair<const char*, const Tensor*>> others) {
  const bool is_bf16 = x.scalar_type() == ScalarType::BFloat16;
  const ScalarType type = is_bf16 ? ScalarType::BFloat16 : ScalarType::Float;
  check(x, op, "x", type, "float32 or bfloat16", {-1, -1, -1, -1}, "(N, C, H, W)");
  const std::string like = "like x " + shape_of(x);
  for (const auto& [name, t] : others)
    check(*t, op, name, type, is_bf16 ? "bfloat16" : "float32", {x.size(0), x.size(1), x.size(2), x.size(3)},
          like.c_str());
  return is_bf16;
}

Tensor new_like(const Tensor& x) { return new_nhwc(x.size(0), x.size(1), x.size(2), x.size(3), x.scalar_type()); }
Tensor new_floats(int64_t c) { return torch::stable::empty({c}, ScalarType::Float); }
float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

std::tuple<Tensor, Tensor, Tensor> bn_relu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                           const OptionalTensor& residual, double eps, bool relu) {
  const char* op = "bn_relu";
  const bool is_bf16 = check_activations(op, x, {});
  if (residual) check_activations(op, x, {{"residual", &*residual}});
  const int64_t c = x.size(1);
  check_vector(weight, op, "weight", ScalarType::Float, "float32", c);
  check_vector(bias, op, "bias", ScalarType::Float, "float32", c);
  Tensor y = new_like(x), mean = new_floats(c), invstd = new_floats(c);
  r50::bn_relu(x.const_data_ptr(), residual ? residual->const_data_ptr() : nullptr, data<float>(weight),
               data<float>(bias), float(eps), relu, is_bf16, x.numel() / c, c, y.mutable_data_ptr(), floats(mean),
               floats(invstd), threads());
  return {y, mean, invstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_relu_backward(const Tensor& grad, const Tensor& y, const Tensor& x,
                                                            const Tensor& weight, const Tensor& mean,
                                                            const Tensor& invstd, bool relu, bool residual) {
  const char* op = "bn_relu_backward";
  const bool is_bf16 = check_activations(op, x, {{"grad", &grad}, {"y", &y}});
  const int64_t c = x.size(1);
  check_vector(weight, op, "weight", ScalarType::Float, "float32", c);
  check_vector(mean, op, "mean", ScalarType::Float, "float32", c);
  check_vector(invstd, op, "invstd", ScalarType::Float, "float32", c);
  Tensor dx = new_like(x), dresidual = residual ? new_like(x) : torch::stable::empty({0}, x.scalar_type());
  Tensor dweight = new_floats(c), dbias = new_floats(c);
  r50::bn_relu_backward(grad.const_data_ptr(), y.const_data_ptr(), x.const_data_ptr(), data<float>(weight),
                        data<float>(mean), data<float>(invstd), relu, is_bf16, x.numel() / c, c, dx.mutable_data_ptr(),
                        residual ? dresidual.mutable_data_ptr() : nullptr, floats(dweight), floats(dbias), threads());
  return {dx, dresidual, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet50, CPU, m) {
  m.impl("bn_relu", TORCH_BOX(&bn_relu));
  m.impl("bn_relu_backward", TORCH_BOX(&bn_relu_backward));
}

namespace {

Tensor conv_bn_relu(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& bias, const OptionalTensor& residual,
                    bool relu, std::vector<int64_t> stride, std::vector<int64_t> padding, int64_t groups) {
  const char* op = "conv_bn_relu";
  const Geometry g = geometry(op, x, weight, stride, padding, groups);
  const bool is_bf16 = check_activations(op, x, {});
  const ScalarType type = x.scalar_type();
  const char* type_name = is_bf16 ? "bfloat16" : "float32";
  check(weight, op, "weight", type, type_name, {-1, -1, -1, -1}, "(O, C / groups, kh, kw)");
  check_vector(scale, op, "scale", ScalarType::Float, "float32", g.o);
  check_vector(bias, op, "bias", ScalarType::Float, "float32", g.o);
  if (residual)
    check(*residual, op, "residual", type, type_name, {g.n, g.o, g.oh, g.ow}, "like the output (N, O, H', W')");
  Tensor out = new_nhwc(g.n, g.o, g.oh, g.ow, type);
  r50::conv_bn_relu({g.n, g.h, g.w, g.c, g.o, g.kh, g.kw, g.sh, g.sw, g.ph, g.pw, groups, is_bf16, relu, x.const_data_ptr(),
                     weight.const_data_ptr(), data<float>(scale), data<float>(bias),
                     residual ? residual->const_data_ptr() : nullptr},
                    out.mutable_data_ptr(), threads());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet50, CPU, m) { m.impl("conv_bn_relu", TORCH_BOX(&conv_bn_relu)); }
