// Schemas of library `resnet50` and their CPU bindings, on torch's stable ABI (kernels are free of torch headers).
// csrc/__init__.py parses the m.def lines below when it must register the PyTorch reference instead of this file.
#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/crop_resize.h"
#include "cpu/jpeg.h"
#include "cpu/kernels.h"
#include "cpu/network.h"

STABLE_TORCH_LIBRARY(resnet50, m) {
  m.def("conv_int8(Tensor x, Tensor weight, Tensor mult, Tensor bias, Tensor? residual=None, Tensor? gain=None, "
        "Tensor? x2=None, Tensor? weight2=None, Tensor? pad_value=None, int[] stride=[1, 1], int[] padding=[0, 0], "
        "int[] stride2=[1, 1], int groups=1) -> Tensor");
  m.def("conv_int8_2_4(Tensor x, Tensor weight, Tensor mult, Tensor bias, int[] kernel, Tensor? residual=None, "
        "Tensor? gain=None, Tensor? x2=None, Tensor? weight2=None, int[] stride=[1, 1], int[] padding=[0, 0], "
        "int[] stride2=[1, 1]) -> Tensor");
  m.def("gemm_int8(Tensor a, Tensor b, Tensor? bias=None, Tensor? mult=None, Tensor? scale=None) -> Tensor");
  m.def("pack_int8(Tensor weight, Tensor mult, Tensor bias, Tensor? gain=None, Tensor? weight2=None, "
        "bool winograd=False) -> Tensor");
  m.def("pack_float(Tensor weight, Tensor bias, Tensor? weight2=None, bool winograd=False) -> Tensor");
  m.def("network_int8(Tensor pixels, Tensor plan, int classes) -> Tensor");
  m.def("network_float(Tensor pixels, Tensor plan, int classes) -> Tensor");
  m.def("network_profile(Tensor pixels, Tensor plan, int classes) -> Tensor");
  m.def("peak_macs(str kind, int milliseconds) -> float");
  m.def("conv_bn_relu(Tensor x, Tensor weight, Tensor scale, Tensor bias, Tensor? residual=None, "
        "bool relu=True, int[] stride=[1, 1], int[] padding=[0, 0], int groups=1) -> Tensor");
  m.def("max_pool_int8(Tensor x, int kernel, int stride, int padding) -> Tensor");
  m.def("avg_pool_int8(Tensor x, Tensor mult) -> Tensor");
  m.def("gate_int8(Tensor x, Tensor? residual, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, "
        "Tensor scales, Tensor zeros) -> Tensor");
  m.def("jpeg_sizes(Tensor[] files, Tensor places) -> Tensor");
  m.def("jpeg_restart(Tensor file, int pixels) -> Tensor");
  m.def("crop_images(Tensor(a!) out, Tensor[] files, Tensor places, Tensor sizes, Tensor crops, str kernel, int gap) "
        "-> Tensor");
  m.def("bn_relu(Tensor x, Tensor weight, Tensor bias, Tensor? residual, float eps, bool relu) "
        "-> (Tensor, Tensor, Tensor)");
  m.def("bn_relu_backward(Tensor grad, Tensor y, Tensor x, Tensor weight, Tensor mean, Tensor invstd, "
        "bool relu, bool residual) -> (Tensor, Tensor, Tensor, Tensor)");
}

namespace {

using r50::check, r50::check_vector, r50::data, r50::new_nhwc;
using r50::Geometry, r50::OptionalTensor, r50::ScalarType, r50::Tensor;

constexpr int CPU = -1;  // as get_device_index() has it

int threads() { return std::min<int>(torch::stable::get_num_threads(), 256); }

Tensor conv_int8(const Tensor& x, const Tensor& weight, const Tensor& mult, const Tensor& bias,
                 const OptionalTensor& residual, const OptionalTensor& gain, const OptionalTensor& x2,
                 const OptionalTensor& weight2, const OptionalTensor& pad_value, std::vector<int64_t> stride,
                 std::vector<int64_t> padding, std::vector<int64_t> stride2, int64_t groups) {
  const Geometry g = r50::check_conv_int8(x, weight, mult, bias, residual, gain, x2, weight2, pad_value, stride,
                                          padding, stride2, groups, CPU);
  r50::ConvInt8 a{g.n, g.h, g.w, g.c, g.o, g.kh, g.kw, g.sh, g.sw, g.ph, g.pw, groups, data<uint8_t>(x),
                  data<int8_t>(weight), data<int32_t>(mult), data<int32_t>(bias), data<int32_t>(gain),
                  data<uint8_t>(residual), 0, 0, 0, 1, 1, data<uint8_t>(x2), data<int8_t>(weight2),
                  data<uint8_t>(pad_value)};
  if (x2) {
    a.h2 = x2->size(2), a.w2 = x2->size(3), a.c2 = x2->size(1);
    a.stride2_h = stride2[0], a.stride2_w = stride2[1];
  }
  Tensor out = new_nhwc(x, g.n, g.o, g.oh, g.ow, ScalarType::Byte);
  r50::conv_int8(a, static_cast<uint8_t*>(out.mutable_data_ptr()), threads());
  return out;
}

Tensor gemm_int8(const Tensor& a, const Tensor& b, const OptionalTensor& bias, const OptionalTensor& mult,
                 const OptionalTensor& scale) {
  const ScalarType type = r50::check_gemm_int8(a, b, bias, mult, scale, CPU);
  Tensor out = torch::stable::empty({a.size(0), b.size(0)}, type);
  r50::gemm_int8(data<uint8_t>(a), data<int8_t>(b), data<int32_t>(bias), data<int32_t>(mult), data<float>(scale),
                 a.size(0), b.size(0), a.size(1), out.mutable_data_ptr(), threads());
  return out;
}

Tensor gate_int8(const Tensor& x, const OptionalTensor& residual, const Tensor& weight1, const Tensor& bias1,
                 const Tensor& weight2, const Tensor& bias2, const Tensor& scales, const Tensor& zeros) {
  const char* op = "gate_int8";
  check(x, op, "x", ScalarType::Byte, "uint8", {-1, -1, -1, -1}, "(N, C, H, W)", CPU);
  const int64_t maps = residual ? 1 : 2, n = x.size(0), c = x.size(1) / maps, h = x.size(2), w = x.size(3);
  STD_TORCH_CHECK(x.size(1) == maps * c, op, ": x must be (N, 2 C, H, W) without a residual, got ", x.size(1),
                  " channels");
  if (residual) check(*residual, op, "residual", ScalarType::Byte, "uint8", {n, c, h, w}, "like x (N, C, H, W)", CPU);
  check(weight1, op, "weight1", ScalarType::Float, "float32", {-1, c}, "(inner, C)", CPU);
  const int64_t inner = weight1.size(0);
  check_vector(bias1, op, "bias1", ScalarType::Float, "float32", inner, CPU);
  check(weight2, op, "weight2", ScalarType::Float, "float32", {maps * c, inner}, "(C or 2 C, inner)", CPU);
  check_vector(bias2, op, "bias2", ScalarType::Float, "float32", maps * c, CPU);
  check_vector(scales, op, "scales", ScalarType::Double, "float64", 3, CPU);
  check_vector(zeros, op, "zeros", ScalarType::Int, "int32", 2, CPU);
  const auto* scale = data<double>(scales);
  const auto* zero = data<int32_t>(zeros);
  STD_TORCH_CHECK(scale[0] >= 0 && scale[1] >= 0 && scale[0] + scale[1] <= 16 * scale[2] && scale[2] > 0, op,
                  ": scales must be 0 or more, and the first two together at most 16 times the last (3,)");
  STD_TORCH_CHECK(std::min(zero[0], zero[1]) >= 0 && std::max(zero[0], zero[1]) <= 255, op,
                  ": zeros must be 0 to 255 (2,)");
  Tensor out = new_nhwc(x, n, c, h, w, ScalarType::Byte);
  r50::gate_int8({n, h * w, c, inner, data<uint8_t>(x), data<uint8_t>(residual), data<float>(weight1),
                  data<float>(bias1), data<float>(weight2), data<float>(bias2), scale, zero},
                 static_cast<uint8_t*>(out.mutable_data_ptr()), threads());
  return out;
}

// -> uint8 (bytes,), for csrc/plan.py
Tensor pack_int8(const Tensor& weight, const Tensor& mult, const Tensor& bias, const OptionalTensor& gain,
                 const OptionalTensor& weight2, bool winograd) {
  const char* op = "pack_int8";
  check(weight, op, "weight", ScalarType::Char, "int8", {-1, -1, -1, -1}, "(O, C, kh, kw)", CPU);
  const int64_t o = weight.size(0), c = weight.size(1), kh = weight.size(2), kw = weight.size(3);
  check_vector(mult, op, "mult", ScalarType::Int, "int32", o, CPU);
  check_vector(bias, op, "bias", ScalarType::Int, "int32", o, CPU);
  check_vector(gain, op, "gain", ScalarType::Int, "int32", o, CPU);
  if (weight2) check(*weight2, op, "weight2", ScalarType::Char, "int8", {o, -1, 1, 1}, "(O, C2, 1, 1)", CPU);
  const int64_t c2 = weight2 ? weight2->size(1) : 0;
  Tensor out;
  r50::pack_int8(o, kh, kw, c, data<int8_t>(weight), c2, data<int8_t>(weight2), data<int32_t>(mult),
                 data<int32_t>(bias), data<int32_t>(gain), winograd, [&](int64_t bytes) {
                   out = torch::stable::empty({bytes}, ScalarType::Byte);
                   return static_cast<uint8_t*>(out.mutable_data_ptr());
                 });
  return out;
}

Tensor pack_float(const Tensor& weight, const Tensor& bias, const OptionalTensor& weight2, bool winograd) {
  const char* op = "pack_float";
  const bool is_bf16 = weight.scalar_type() == ScalarType::BFloat16;
  const ScalarType type = is_bf16 ? ScalarType::BFloat16 : ScalarType::Float;
  const char* name = is_bf16 ? "bfloat16" : "float32";
  check(weight, op, "weight", type, "bfloat16 or float32", {-1, -1, -1, -1}, "(O, C, kh, kw)", CPU);
  const int64_t o = weight.size(0), c = weight.size(1), kh = weight.size(2), kw = weight.size(3);
  check_vector(bias, op, "bias", ScalarType::Float, "float32", o, CPU);
  if (weight2) check(*weight2, op, "weight2", type, name, {o, -1, 1, 1}, "(O, C2, 1, 1)", CPU);
  Tensor out;
  r50::pack_float(is_bf16, o, kh, kw, c, weight.const_data_ptr(), weight2 ? weight2->size(1) : 0,
                  weight2 ? weight2->const_data_ptr() : nullptr, data<float>(bias), winograd, [&](int64_t bytes) {
                    out = torch::stable::empty({bytes}, ScalarType::Byte);
                    return static_cast<uint8_t*>(out.mutable_data_ptr());
                  });
  return out;
}

Tensor run_network(const Tensor& pixels, const Tensor& plan, int64_t classes, Tensor* nanoseconds, const char* op,
                   int is_float) {  // -1: of either
  check(plan, op, "plan", ScalarType::Byte, "uint8", {-1}, "(bytes,) from csrc.build_plan", CPU);
  STD_TORCH_CHECK(plan.numel() >= int64_t(sizeof(r50::PlanHeader)), op,
                  ": plan is not what csrc.build_plan returned");
  const auto& header = *reinterpret_cast<const r50::PlanHeader*>(data<uint8_t>(plan));
  check(pixels, op, "pixels", ScalarType::Byte, "uint8", {-1, header.channels, -1, -1}, "(N, 3, H, W)",
        CPU);
  STD_TORCH_CHECK(classes == header.classes, op, ": the plan has ", header.classes, " classes, not ", classes);
  STD_TORCH_CHECK(is_float < 0 || is_float == (header.type > 0), op, ": the plan is one of ",
                  header.type ? "floats" : "int8");
  Tensor logits = torch::stable::empty({pixels.size(0), classes}, ScalarType::Float);
  if (nanoseconds) {
    *nanoseconds = torch::stable::empty({header.steps}, ScalarType::Long);
    torch::stable::zero_(*nanoseconds);
  }
  r50::network(data<uint8_t>(plan), plan.numel(), data<uint8_t>(pixels), int(pixels.size(0)), int(pixels.size(2)),
               int(pixels.size(3)), static_cast<float*>(logits.mutable_data_ptr()), threads(),
               nanoseconds ? static_cast<int64_t*>(nanoseconds->mutable_data_ptr()) : nullptr);
  return logits;
}

Tensor network_int8(const Tensor& pixels, const Tensor& plan, int64_t classes) {
  return run_network(pixels, plan, classes, nullptr, "network_int8", 0);
}

Tensor network_float(const Tensor& pixels, const Tensor& plan, int64_t classes) {
  return run_network(pixels, plan, classes, nullptr, "network_float", 1);
}

Tensor network_profile(const Tensor& pixels, const Tensor& plan, int64_t classes) {
  Tensor nanoseconds;
  run_network(pixels, plan, classes, &nanoseconds, "network_profile", -1);
  return nanoseconds;
}

double peak_macs(std::string kind, int64_t milliseconds) { return r50::peak_macs(kind.c_str(), int(milliseconds)); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet50, CPU, m) {
  m.impl("conv_int8", TORCH_BOX(&conv_int8));
  m.impl("gemm_int8", TORCH_BOX(&gemm_int8));
  m.impl("gate_int8", TORCH_BOX(&gate_int8));
  m.impl("pack_int8", TORCH_BOX(&pack_int8));
  m.impl("pack_float", TORCH_BOX(&pack_float));
  m.impl("network_int8", TORCH_BOX(&network_int8));
  m.impl("network_float", TORCH_BOX(&network_float));
  m.impl("network_profile", TORCH_BOX(&network_profile));
}

STABLE_TORCH_LIBRARY_IMPL(resnet50, CompositeExplicitAutograd, m) { m.impl("peak_macs", TORCH_BOX(&peak_macs)); }

namespace {

bool check_activations(const char* op, const Tensor& x,
                       std::initializer_list<std::pair<const char*, const Tensor*>> others) {
  return r50::check_activations(op, x, others, CPU, ScalarType::Float, "float32", ScalarType::BFloat16, "bfloat16");
}

Tensor new_like(const Tensor& x) { return new_nhwc(x, x.size(0), x.size(1), x.size(2), x.size(3), x.scalar_type()); }
Tensor new_floats(int64_t c) { return torch::stable::empty({c}, ScalarType::Float); }
float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

std::tuple<Tensor, Tensor, Tensor> bn_relu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                           const OptionalTensor& residual, double eps, bool relu) {
  const char* op = "bn_relu";
  const bool is_bf16 = check_activations(op, x, {});
  if (residual) check_activations(op, x, {{"residual", &*residual}});
  const int64_t c = x.size(1);
  check_vector(weight, op, "weight", ScalarType::Float, "float32", c, CPU);
  check_vector(bias, op, "bias", ScalarType::Float, "float32", c, CPU);
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
  check_vector(weight, op, "weight", ScalarType::Float, "float32", c, CPU);
  check_vector(mean, op, "mean", ScalarType::Float, "float32", c, CPU);
  check_vector(invstd, op, "invstd", ScalarType::Float, "float32", c, CPU);
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

Tensor conv_bn_relu(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& bias,
                    const OptionalTensor& residual, bool relu, std::vector<int64_t> stride,
                    std::vector<int64_t> padding, int64_t groups) {
  const bool is_bf16 = check_activations("conv_bn_relu", x, {});
  const Geometry g = r50::check_conv_bn_relu(x, is_bf16 ? "bfloat16" : "float32", weight, scale, bias, residual, stride,
                                        padding, groups, CPU);
  Tensor out = new_nhwc(x, g.n, g.o, g.oh, g.ow, x.scalar_type());
  r50::conv_bn_relu({g.n, g.h, g.w, g.c, g.o, g.kh, g.kw, g.sh, g.sw, g.ph, g.pw, groups, is_bf16, relu,
                     x.const_data_ptr(), weight.const_data_ptr(), data<float>(scale), data<float>(bias),
                     residual ? residual->const_data_ptr() : nullptr},
                    out.mutable_data_ptr(), threads());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet50, CPU, m) { m.impl("conv_bn_relu", TORCH_BOX(&conv_bn_relu)); }

// ------------------------------------------------------------------------------------------------------ images

namespace {

using Tensors = std::vector<Tensor>;

void check_files(const char* op, const Tensors& files) {
  for (const Tensor& file : files) check(file, op, "files", ScalarType::Byte, "uint8", {-1}, "(bytes,)", CPU);
}

// Row i of places, (which file, offset, bytes), lies within it.
const uint8_t* file_at(const char* op, const Tensors& files, const Tensor& places, int64_t i, int64_t& bytes) {
  const int64_t *place = data<int64_t>(places) + 3 * i, which = place[0], offset = place[1];
  const int64_t size = which >= 0 && which < int64_t(files.size()) ? files[which].size(0) : -1;
  bytes = place[2];
  STD_TORCH_CHECK(offset >= 0 && bytes >= 0 && offset <= size && bytes <= size - offset, op, ": places[", i, "] = (",
                  which, ", ", offset, ", ", bytes, ") lies outside the ", files.size(), " files");
  return data<uint8_t>(files[which]) + offset;
}

Tensor jpeg_sizes(Tensors files, const Tensor& places) {
  const char* op = "jpeg_sizes";
  check_files(op, files);
  check(places, op, "places", ScalarType::Long, "int64", {-1, 3}, "(N, 3)", CPU);
  const int64_t n = places.size(0);
  Tensor out = torch::stable::empty({n, 2}, ScalarType::Long);
  auto* sizes = static_cast<int64_t*>(out.mutable_data_ptr());
  for (int64_t i = 0, bytes; i < n; i++) {
    const uint8_t* file = file_at(op, files, places, i, bytes);
    const r50::JpegSize size = r50::jpeg_size(file, bytes);
    sizes[2 * i] = size.height, sizes[2 * i + 1] = size.width;
  }
  return out;
}

Tensor jpeg_restart(const Tensor& file, int64_t pixels) {
  const char* op = "jpeg_restart";
  check(file, op, "file", ScalarType::Byte, "uint8", {-1}, "(bytes,)", CPU);
  STD_TORCH_CHECK(pixels > 0, op, ": pixels must be positive, got ", pixels);
  const std::vector<uint8_t> made = r50::jpeg_restart(data<uint8_t>(file), file.size(0), pixels);
  Tensor out = torch::stable::empty({int64_t(made.size())}, ScalarType::Byte);
  std::copy(made.begin(), made.end(), static_cast<uint8_t*>(out.mutable_data_ptr()));
  return out;
}

Tensor crop_images(Tensor out, Tensors files, const Tensor& places, const Tensor& sizes, const Tensor& crops,
                   std::string kernel, int64_t gap) {
  const char* op = "crop_images";
  check(out, op, "out", ScalarType::Byte, "uint8", {-1, 3, -1, -1}, "(N, 3, H, W)", CPU);
  check_files(op, files);
  const int64_t n = out.size(0), h = out.size(2), w = out.size(3);
  const std::string rows = "(" + std::to_string(n);
  check(places, op, "places", ScalarType::Long, "int64", {n, 3}, (rows + ", 3)").c_str(), CPU);
  check(sizes, op, "sizes", ScalarType::Long, "int64", {n, 2}, (rows + ", 2)").c_str(), CPU);
  check(crops, op, "crops", ScalarType::Long, "int64", {n, 9}, (rows + ", 9)").c_str(), CPU);
  STD_TORCH_CHECK(kernel == "bilinear" || kernel == "bicubic", op, ": kernel must be bilinear or bicubic, got ",
                  kernel);
  STD_TORCH_CHECK(gap >= 0, op, ": gap must not be negative, got ", gap);
  const auto filter = kernel == "bilinear" ? r50::Kernel::bilinear : r50::Kernel::bicubic;
  Tensor done = torch::stable::empty({n}, ScalarType::Bool);
  auto* good = static_cast<bool*>(done.mutable_data_ptr());
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  for (int64_t i = 0, bytes; i < n; i++) {
    const uint8_t* file = file_at(op, files, places, i, bytes);
    const int64_t *c = data<int64_t>(crops) + 9 * i, *size = data<int64_t>(sizes) + 2 * i;
    const bool raw = size[0] || size[1];
    constexpr int64_t MOST = 1 << 28;         // three bytes for each still fit int32
    constexpr int64_t MOST_RESIZED = 1 << 28;  // as MAX_RESIZED in csrc/reference.py
    STD_TORCH_CHECK(std::min({c[0], c[1], c[6], c[7]}) >= 0 && std::min({c[2], c[3], c[4], c[5]}) > 0 &&
                        std::max({c[0], c[1], c[2], c[3]}) <= MOST && c[6] <= c[4] - h && c[7] <= c[5] - w,
                    op, ": crops[", i, "]: expected (top, left, height, width, resized height, resized width, row, "
                    "column, flip) with ", h, "x", w, " pixels of the resized box");
    STD_TORCH_CHECK(!raw || (size[0] > 0 && size[1] > 0 && size[0] <= MOST && size[1] <= MOST &&
                             bytes == size[0] * size[1] * 3 && c[0] + c[2] <= size[0] && c[1] + c[3] <= size[1]),
                    op, ": image ", i, " of ", bytes, " bytes is no ", size[0], "x", size[1],
                    " RGB image around its box");
    r50::JpegPixels p{file, file + bytes, size[0], size[1], 0, 0, 1};
    good[i] = c[4] <= MOST_RESIZED / c[5];
    if (!good[i]) continue;
    const int64_t enough[] = {gap * c[4], gap * c[5]};
    good[i] = raw || r50::jpeg_decode(file, bytes, c, enough, p);
    if (!good[i]) continue;
    const auto axis = [&](int d, int64_t first, int64_t most, int64_t count, bool flip) {
      const double start = double(c[d]) / p.shrink - double(first), length = double(c[2 + d]) / p.shrink;
      return r50::Axis{start, length, int64_t(start), std::min(int64_t(std::ceil(start + length)), most), c[4 + d],
                       c[6 + d], count, flip};
    };
    r50::crop_resize(p.rows, p.width * 3, p.end, axis(0, p.top, p.height, h, false), axis(1, p.left, p.width, w, c[8]),
                     filter, to + i * h * w * 3);
  }
  return done;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet50, CPU, m) {
  m.impl("jpeg_sizes", TORCH_BOX(&jpeg_sizes));
  m.impl("jpeg_restart", TORCH_BOX(&jpeg_restart));
  m.impl("crop_images", TORCH_BOX(&crop_images));
}
