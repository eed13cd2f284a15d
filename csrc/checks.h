// What the bindings for both devices share: checks of arguments, whose sentences name what is expected.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace r50 {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;

inline std::string shape_of(const Tensor& t) {
  std::string text = "(";
  for (int64_t i = 0; i < t.dim(); i++) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + ")";
}

// Sizes as expected (-1: any positive one), dtype, device (-1: the CPU), and memory: channels_last for 4 dimensions,
// contiguous for others.
inline void check(const Tensor& t, const char* op, const char* name, ScalarType type, const char* type_name,
                  std::initializer_list<int64_t> sizes, const char* expected, int device) {
  bool fits = t.dim() == int64_t(sizes.size()) && t.scalar_type() == type && t.get_device_index() == device;
  int64_t i = 0, stride = 1;
  if (fits)
    for (int64_t size : sizes) {
      fits &= t.size(i) > 0 && (size < 0 || t.size(i) == size);
      i++;
    }
  const auto place = [](int index) { return index < 0 ? "the CPU" : "cuda:" + std::to_string(index); };
  STD_TORCH_CHECK(fits, op, ": ", name, " must be ", type_name, " ", expected, " on ", place(device),
                  " and not empty, got shape ", shape_of(t), " on ", place(t.get_device_index()));
  const int nhwc[] = {1, 3, 2, 0}, rows[] = {3, 2, 1, 0};
  for (int d = 0; d < t.dim(); d++) {
    const int dim = t.dim() == 4 ? nhwc[d] : rows[d + 4 - t.dim()];
    STD_TORCH_CHECK(t.size(dim) == 1 || t.stride(dim) == stride, op, ": ", name, " must be ",
                    t.dim() == 4 ? "channels_last" : "contiguous", ", expected ", expected);
    stride *= t.size(dim);
  }
}

inline void check_vector(const OptionalTensor& t, const char* op, const char* name, ScalarType type,
                         const char* type_name, int64_t n, int device) {
  if (t) check(*t, op, name, type, type_name, {n}, ("(" + std::to_string(n) + ",)").c_str(), device);
}

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
const T* data(const OptionalTensor& t) {
  return t ? data<T>(*t) : nullptr;
}

// Like `like` in device.
inline Tensor new_nhwc(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w, ScalarType type) {
  return torch::stable::empty({n, c, h, w}, type, std::nullopt, like.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

struct Geometry {
  int64_t n, c, h, w, o, kh, kw, sh, sw, ph, pw, groups, oh, ow;
};

// Of a convolution of x, which has four dimensions, by o * kh * kw weights for each channel of a group.
inline Geometry geometry(const char* op, const Tensor& x, int64_t o, int64_t kh, int64_t kw,
                         const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, int64_t groups) {
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2, op, ": stride and padding must have two numbers each");
  for (int i = 0; i < 2; i++)
    STD_TORCH_CHECK(stride[i] <= INT32_MAX && padding[i] <= (INT32_MAX - x.size(2 + i)) / 2, op, ": stride ", stride[i],
                    ", padding ", padding[i], ": the stride and the padded x ", shape_of(x), " must fit int32");
  STD_TORCH_CHECK(stride[0] > 0 && stride[1] > 0 && padding[0] >= 0 && padding[1] >= 0 && groups > 0, op,
                  ": stride and groups must be positive and padding not negative");
  Geometry g{x.size(0), x.size(1), x.size(2), x.size(3), o, kh, kw, stride[0], stride[1], padding[0], padding[1],
             groups, 0, 0};
  STD_TORCH_CHECK(g.h + 2 * g.ph >= g.kh && g.w + 2 * g.pw >= g.kw, op, ": x ", shape_of(x),
                  " is smaller than the kernel");
  g.oh = (g.h + 2 * g.ph - g.kh) / g.sh + 1;
  g.ow = (g.w + 2 * g.pw - g.kw) / g.sw + 1;
  return g;
}

inline Geometry geometry(const char* op, const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                         const std::vector<int64_t>& padding, int64_t groups) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4, op,
                  ": x must be (N, C, H, W) and weight (O, C / groups, kh, kw), got ", shape_of(x), " and ",
                  shape_of(weight));
  const Geometry g = geometry(op, x, weight.size(0), weight.size(2), weight.size(3), stride, padding, groups);
  STD_TORCH_CHECK(g.c % groups == 0 && g.o % groups == 0 && weight.size(1) == g.c / groups, op, ": weight must be (O, ",
                  g.c, " / groups, kh, kw) with O a multiple of groups; got ", shape_of(weight), ", groups ", groups);
  return g;
}

// What joins the sums of an int8 convolution, and what they are multiplied by.
inline void check_sums(const char* op, const Geometry& g, const Tensor& mult, const Tensor& bias,
                       const OptionalTensor& residual, const OptionalTensor& gain, const OptionalTensor& x2,
                       const OptionalTensor& weight2, const std::vector<int64_t>& stride2, int device) {
  check_vector(mult, op, "mult", ScalarType::Int, "int32", g.o, device);
  check_vector(bias, op, "bias", ScalarType::Int, "int32", g.o, device);
  check_vector(gain, op, "gain", ScalarType::Int, "int32", g.o, device);
  STD_TORCH_CHECK(bool(residual) == bool(gain) && bool(x2) == bool(weight2), op,
                  ": residual goes with gain, and x2 with weight2");
  if (residual)
    check(*residual, op, "residual", ScalarType::Byte, "uint8", {g.n, g.o, g.oh, g.ow},
          "like the output (N, O, H', W')", device);
  if (x2) {
    check(*x2, op, "x2", ScalarType::Byte, "uint8", {g.n, -1, -1, -1}, "(N, C2, H2, W2)", device);
    STD_TORCH_CHECK(g.groups == 1 && stride2.size() == 2 && stride2[0] > 0 && stride2[1] > 0 &&
                        std::max(stride2[0], stride2[1]) <= INT32_MAX &&
                        (x2->size(2) - 1) / stride2[0] + 1 == g.oh && (x2->size(3) - 1) / stride2[1] + 1 == g.ow,
                    op, ": x2 with stride2 must give the output's size ", g.oh, "x", g.ow,
                    ", and groups must be 1; got x2 ", shape_of(*x2));
  }
}

inline Geometry check_conv_int8(const Tensor& x, const Tensor& weight, const Tensor& mult, const Tensor& bias,
                                const OptionalTensor& residual, const OptionalTensor& gain, const OptionalTensor& x2,
                                const OptionalTensor& weight2, const OptionalTensor& pad_value,
                                const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                const std::vector<int64_t>& stride2, int64_t groups, int device) {
  const char* op = "conv_int8";
  const Geometry g = geometry(op, x, weight, stride, padding, groups);
  check(x, op, "x", ScalarType::Byte, "uint8", {-1, -1, -1, -1}, "(N, C, H, W)", device);
  check(weight, op, "weight", ScalarType::Char, "int8", {-1, -1, -1, -1}, "(O, C / groups, kh, kw)", device);
  check_vector(pad_value, op, "pad_value", ScalarType::Byte, "uint8", g.c, device);
  check_sums(op, g, mult, bias, residual, gain, x2, weight2, stride2, device);
  if (x2) check(*weight2, op, "weight2", ScalarType::Char, "int8", {g.o, x2->size(1), 1, 1}, "(O, C2, 1, 1)", device);
  return g;
}

// -> dtype of the result
inline ScalarType check_gemm_int8(const Tensor& a, const Tensor& b, const OptionalTensor& bias,
                                  const OptionalTensor& mult, const OptionalTensor& scale, int device) {
  const char* op = "gemm_int8";
  check(a, op, "a", ScalarType::Byte, "uint8", {-1, -1}, "(M, K)", device);
  check(b, op, "b", ScalarType::Char, "int8", {-1, a.size(1)}, "(N, K)", device);
  check_vector(bias, op, "bias", ScalarType::Int, "int32", b.size(0), device);
  check_vector(mult, op, "mult", ScalarType::Int, "int32", b.size(0), device);
  check_vector(scale, op, "scale", ScalarType::Float, "float32", b.size(0), device);
  STD_TORCH_CHECK(!(mult && scale), op, ": mult (uint8 result) and scale (float32 result) exclude each other");
  return mult ? ScalarType::Byte : scale ? ScalarType::Float : ScalarType::Int;
}

// All (N, C, H, W) alike, channels_last, of one of the two types that a device computes in. -> whether it is the second
inline bool check_activations(const char* op, const Tensor& x,
                              std::initializer_list<std::pair<const char*, const Tensor*>> others, int device,
                              ScalarType first, const char* first_name, ScalarType second, const char* second_name) {
  const bool is_second = x.scalar_type() == second;
  const ScalarType type = is_second ? second : first;
  const std::string names = std::string(first_name) + " or " + second_name;
  check(x, op, "x", type, names.c_str(), {-1, -1, -1, -1}, "(N, C, H, W)", device);
  const std::string like = "like x " + shape_of(x);
  for (const auto& [name, t] : others)
    check(*t, op, name, type, is_second ? second_name : first_name, {x.size(0), x.size(1), x.size(2), x.size(3)},
          like.c_str(), device);
  return is_second;
}

// The rest of conv_bn_relu's arguments, once x is checked.
inline Geometry check_conv_bn_relu(const Tensor& x, const char* type_name, const Tensor& weight, const Tensor& scale,
                                   const Tensor& bias, const OptionalTensor& residual,
                                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                   int64_t groups, int device) {
  const char* op = "conv_bn_relu";
  const Geometry g = geometry(op, x, weight, stride, padding, groups);
  check(weight, op, "weight", x.scalar_type(), type_name, {-1, -1, -1, -1}, "(O, C / groups, kh, kw)", device);
  check_vector(scale, op, "scale", ScalarType::Float, "float32", g.o, device);
  check_vector(bias, op, "bias", ScalarType::Float, "float32", g.o, device);
  if (residual)
    check(*residual, op, "residual", x.scalar_type(), type_name, {g.n, g.o, g.oh, g.ow},
          "like the output (N, O, H', W')", device);
  return g;
}

}  // namespace r50
