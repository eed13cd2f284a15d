// The single operations conv_int8 and gemm_int8: pack, lay out, run. (A network does the first two once; see
// network.cpp.)
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <list>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "layout.h"
#include "pool.h"
#include "pooling.h"

namespace r50 {
namespace {

constexpr int64_t CHUNK_BYTES = 1 << 30;  // images of one pass; offsets are int32

PackedShape merged(int64_t o, int64_t kh, int64_t kw, int64_t c, int64_t c2) {
  return {int(o), c2 ? 2 : 1, {int(kh), 1}, {int(kw * c), int(c2)}};
}

// A network measures where winograd.h is faster; here it is taken where it always is (csrc/LOG.md).
bool by_winograd(const ConvInt8& a, int64_t o, int64_t c) {
  const bool fits = a.kh == 3 && a.kw == 3 && a.stride_h == 1 && a.stride_w == 1 && a.pad_h == 1 && a.pad_w == 1 &&
                    !a.residual && !a.x2;
  return fits && o >= 16 && (isa() == Isa::avx2 || (isa() == Isa::vnni && c >= 32 && c * o <= 128 * 128));
}

// Weights that were packed lately. Packing takes longer than an image's convolution, but weights may change in place
// and their memory may become another tensor's: so a blob is used again only where all bytes that it was made of are
// still the same.
struct Recent {
  Isa isa;
  const void* where;
  PackedShape shape;
  std::vector<uint8_t> source;
  Bytes blob;
};
constexpr size_t RECENT_BYTES = 512u << 20;
std::mutex recent_mutex;
std::list<std::shared_ptr<const Recent>> recent_ones;  // the last used first

std::shared_ptr<const Recent> packed(const PackedShape& shape, const int8_t* const weights[2], const int32_t* mult,
                                     const int32_t* bias, const int32_t* gain) {
  struct Part {
    const void* data;
    size_t bytes;
  };
  const size_t vector = sizeof(int32_t) * shape.o;
  const Part parts[] = {{weights[0], size_t(shape.o) * shape.taps[0] * shape.k[0]},
                        {weights[1], size_t(shape.o) * shape.taps[1] * shape.k[1]},
                        {mult, vector}, {bias, vector}, {gain, gain ? vector : 0}};
  size_t bytes = 0;
  for (const Part& part : parts) bytes += part.bytes;
  std::shared_ptr<const Recent> found;
  {
    std::lock_guard<std::mutex> lock(recent_mutex);
    for (auto it = recent_ones.begin(); it != recent_ones.end(); ++it)
      if ((*it)->isa == isa() && (*it)->where == weights[0] && (*it)->shape == shape && (*it)->source.size() == bytes) {
        recent_ones.splice(recent_ones.begin(), recent_ones, it);
        found = *it;
        break;
      }
  }
  if (found) {
    const uint8_t* at = found->source.data();
    bool same = true;
    for (const Part& part : parts)
      if (same && part.bytes) same = std::memcmp(at, part.data, part.bytes) == 0, at += part.bytes;
    if (same) return found;
  }
  auto made = std::make_shared<Recent>(Recent{isa(), weights[0], shape, {}, {}});
  pack_int8(isa(), shape, weights, mult, bias, gain, [&](int64_t size) { return (made->blob = allocate(size)).get(); });
  made->source.reserve(bytes);
  for (const Part& part : parts) {
    const auto* from = static_cast<const uint8_t*>(part.data);
    if (part.bytes) made->source.insert(made->source.end(), from, from + part.bytes);
  }
  std::lock_guard<std::mutex> lock(recent_mutex);
  recent_ones.remove(found);
  recent_ones.push_front(made);
  size_t total = 0;
  for (auto it = recent_ones.begin(); it != recent_ones.end();) {
    total += (*it)->source.size() + size_t(reinterpret_cast<const Packed*>((*it)->blob.get())->bytes);
    it = total > RECENT_BYTES ? recent_ones.erase(it) : std::next(it);
  }
  return made;
}

// An operand that kernels can read: the caller's own memory where no read leaves it, else a bordered copy with room
// behind it.
struct Source {
  Layout layout;
  const uint8_t* data = nullptr;
  Bytes copy;

  Source(const uint8_t* x, int n, int h, int w, int c, int border, const uint8_t* pad_value, bool own) {
    layout = Layout(n, h, w, c, border);
    if (!own) {
      data = x;
      return;
    }
    const int64_t bytes = layout.bytes + 64 + std::max(32 * layout.pixel, layout.row + layout.pixel);
    copy = allocate(bytes);
    std::memset(copy.get(), 0, bytes);
    if (pad_value) fill_border(copy.get(), layout, pad_value);
    load_images(x, c, nullptr, Type::int8, copy.get(), layout, 0, n, 0, h);
    data = copy.get();
  }
};

void run(const Conv& conv, int threads) {
  const int panels = conv.w->panels;
  parallel(threads, [&](int thread, int count) {
    const int units = (conv.m + 31) / 32;
    if (units >= 2 * count) {
      const int end = std::min(conv.m, units * (thread + 1) / count * 32);
      conv_function(*conv.w)(conv, units * thread / count * 32, end, 0, panels);
    } else {
      conv_function(*conv.w)(conv, 0, conv.m, panels * thread / count, panels * (thread + 1) / count);
    }
  });
}

}  // namespace

void pack_int8(int64_t o, int64_t kh, int64_t kw, int64_t c, const int8_t* weight, int64_t c2, const int8_t* weight2,
               const int32_t* mult, const int32_t* bias, const int32_t* gain, bool winograd,
               const std::function<uint8_t*(int64_t)>& allocate) {
  const int8_t* const weights[2] = {weight, weight2};
  PackedShape shape = merged(o, kh, kw, c, c2);
  shape.winograd = winograd && kh == 3 && kw == 3;
  pack_int8(isa(), shape, weights, mult, bias, gain, allocate);
}

void pack_float(bool is_bf16, int64_t o, int64_t kh, int64_t kw, int64_t c, const void* weight, int64_t c2,
                const void* weight2, const float* bias, bool winograd,
                const std::function<uint8_t*(int64_t)>& allocate) {
  if (is_bf16 && !has_avx512_bf16()) throw std::runtime_error("pack_float: networks in bfloat16 need AVX-512 BF16");
  if (isa() < Isa::avx2) throw std::runtime_error("pack_float: networks in float32 need AVX2");
  const void* const weights[2] = {weight, weight2};
  PackedShape shape = merged(o, kh, kw, c, c2);
  shape.winograd = winograd && !is_bf16 && !c2 && kh == 3 && kw == 3;
  pack_float(is_bf16 ? Type::bf16 : Type::f32, shape, weights, bias, allocate);
}

void conv_int8(const ConvInt8& a, uint8_t* out, int threads) {
  const Window window{int(a.kh), int(a.kw), int(a.stride_h), int(a.stride_w), int(a.pad_h), int(a.pad_w)};
  const int oh = outputs(int(a.h), window.kh, window.stride_h, window.pad_h);
  const int ow = outputs(int(a.w), window.kw, window.stride_w, window.pad_w);
  const int cg = int(a.c / a.groups), og = int(a.o / a.groups), border = int(std::max(a.pad_h, a.pad_w));
  PackedShape shape =
      a.groups == 1 ? merged(og, a.kh, a.kw, cg, a.c2) : PackedShape{og, 1, {int(a.kh * a.kw), 0}, {cg, 0}};
  shape.winograd = by_winograd(a, og, cg);
  const int64_t per_image =
      std::max({(a.h + border) * (a.w + border) * a.c, oh * int64_t(ow) * a.o, a.h2 * a.w2 * a.c2, int64_t(1)});
  const int chunk = int(std::clamp<int64_t>(CHUNK_BYTES / per_image, 1, a.n));
  for (int g = 0; g < a.groups; g++) {
    const int8_t* const weights[2] = {a.weight + int64_t(g) * og * a.kh * a.kw * cg, a.weight2};
    const auto kept = packed(shape, weights, a.mult + g * og, a.bias + g * og, a.gain ? a.gain + g * og : nullptr);
    const auto* w = reinterpret_cast<const Packed*>(kept->blob.get());
    const auto padded = [&](int i) { return w->kpad[i] != w->k[i] || alignment(isa()) > 1; };
    for (int64_t n = 0; n < a.n; n += chunk) {
      const int images = int(std::min<int64_t>(chunk, a.n - n));
      const Source x(a.x + n * a.h * a.w * a.c, images, int(a.h), int(a.w), int(a.c), border, a.pad_value,
                     border || padded(0));
      Layout of_group = x.layout;
      of_group.c = cg;
      const Layout results(images, oh, ow, int(a.o), 0);
      Conv conv;
      conv.w = w;
      conv.in[0].a = x.data + g * cg;
      conv.out = out + n * oh * ow * a.o + g * og;
      if (w->winograd) {
        const int tiles = images * tiles_along(oh, w->type) * tiles_along(ow, w->type);
        parallel(threads, [&](int thread, int count) {
          winograd_function(*w)(conv, of_group, results, tiles_at_once(cg, w->type),
                                int(int64_t(tiles) * thread / count), int(int64_t(tiles) * (thread + 1) / count), 0,
                                w->panels);
        });
        continue;
      }
      std::unique_ptr<Source> x2;
      if (a.x2)
        x2 = std::make_unique<Source>(a.x2 + n * a.h2 * a.w2 * a.c2, images, int(a.h2), int(a.w2), int(a.c2), 0,
                                      nullptr, padded(1));
      Tables tables;
      tables.build(of_group, window, results, x2 ? &x2->layout : nullptr, int(a.stride2_h),
                   int(a.stride2_w), 1, alignment(isa()), w, !a.pad_value);
      tables.attach(conv, w->operands);
      if (x2) conv.in[1].a = x2->data;
      if (a.residual) conv.residual = a.residual + n * oh * ow * a.o + g * og;
      run(conv, threads);
    }
  }
}

void gemm_int8(const uint8_t* a, const int8_t* b, const int32_t* bias, const int32_t* mult, const float* scale,
               int64_t m, int64_t n, int64_t k, void* out, int threads) {
  const PackedShape shape = merged(n, 1, 1, k, 0);
  const std::unique_ptr<int32_t[]> zeros(new int32_t[n]());
  const int8_t* const weights[2] = {b, nullptr};
  const auto kept = packed(shape, weights, mult ? mult : zeros.get(), bias ? bias : zeros.get(), nullptr);
  Conv conv;
  conv.w = reinterpret_cast<const Packed*>(kept->blob.get());
  const bool own = conv.w->kpad[0] != conv.w->k[0] || alignment(isa()) > 1;
  const int element = mult ? 1 : 4;
  const int64_t chunk = std::clamp<int64_t>(CHUNK_BYTES / std::max(k, n * element), 1, m);
  for (int64_t first = 0; first < m; first += chunk) {
    const int rows = int(std::min(chunk, m - first));
    const Source x(a + first * k, rows, 1, 1, int(k), 0, nullptr, own);
    Tables tables;
    tables.build(x.layout, {1, 1, 1, 1, 0, 0}, Layout(rows, 1, 1, int(n), 0), nullptr, 1, 1, element, alignment(isa()),
                 conv.w);
    tables.attach(conv, 1);
    conv.in[0].a = x.data;
    conv.out = static_cast<uint8_t*>(out) + first * n * element;
    conv.kind = mult ? Out::u8 : scale ? Out::f32 : Out::s32;
    conv.f32_scale = scale;
    run(conv, threads);
  }
}

}  // namespace r50
