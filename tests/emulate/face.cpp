// csrc/cpu as plain C functions for tests/emulate/kernels.py, which calls them through ctypes, in place of isa.cpp: the
// tests choose the instruction set call by call. Functions return 0, or 1 with the sentence that face_error() has.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>

#include "layout.h"
#include "network.h"
#include "pooling.h"
#include "tiles.h"

// which of the mistakes that test_kernels.py has planted is made in this process
extern int emulated_fault;
int emulated_fault = std::getenv("EMULATED_FAULT") ? std::atoi(std::getenv("EMULATED_FAULT")) : -1;

// While `alone` is a thread's, no other one gets memory (kernels.py links with --wrap=aligned_alloc).
static std::atomic<std::thread::id> alone;

extern "C" {
void* __real_aligned_alloc(size_t alignment, size_t bytes);
void* __wrap_aligned_alloc(size_t alignment, size_t bytes) {
  const std::thread::id id = alone;
  return id == std::thread::id() || id == std::this_thread::get_id() ? __real_aligned_alloc(alignment, bytes) : nullptr;
}
}

namespace r50 {
namespace {

std::atomic<int> chosen{0};
thread_local std::string error;
Bytes packed;

template <class Body>
int guarded(Body&& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& e) {
    error = e.what();
    tile_release();
    return 1;
  }
}

Bytes filled(int64_t bytes, int value) {  // of exactly this size: AddressSanitizer knows where it ends
  Bytes data(static_cast<uint8_t*>(std::malloc(size_t(bytes))));
  std::memset(data.get(), value, size_t(bytes));
  return data;
}

}  // namespace

Isa isa() { return Isa(chosen.load()); }
bool has_avx512_bf16() { return isa() >= Isa::vnni; }

// A convolution in layouts that conv_int8 does not use, in parts as a network's threads would take them.
struct Sweep {
  ConvInt8 conv;  // its images contiguous; padding becomes the border
  int64_t align, planes, interleaved, out_interleaved, out_border, kind, block, row_parts, panel_parts, in_place,
      merged,  // one run of kw * c bytes per row of the window, whether or not the layout has it
      tiles;   // by winograd.h, so many at a time; row_parts are then parts of all tiles
  const float* f32_scale;
};

constexpr int SLACK = 64, GUARD = 64, UNTOUCHED = 0x5a, NOISE = 0xa5;

struct Input {  // an activation in its layout; what lies behind it is noise
  Layout layout;
  Bytes data;
  Input(const Layout& l, const uint8_t* x, const uint8_t* border_value, int64_t align, bool tiles = false)
      : layout(l), data(filled(l.bytes + SLACK + (align > 1 ? 32 * l.pixel : tiles ? l.row + l.pixel : 0), NOISE)) {
    fill_border(data.get(), l, border_value);
    load_images(x, l.c, nullptr, Type::int8, data.get(), l, 0, l.images, 0, l.h);
  }
};

void sweep(const Sweep& s, uint8_t* result, int32_t* rounding) {
  const ConvInt8& a = s.conv;
  const int n = int(a.n), element = Out(s.kind) == Out::u8 ? 1 : 4;
  const Window window{int(a.kh), int(a.kw), int(a.stride_h), int(a.stride_w), int(a.pad_h), int(a.pad_w)};
  const int oh = outputs(int(a.h), window.kh, window.stride_h, window.pad_h);
  const int ow = outputs(int(a.w), window.kw, window.stride_w, window.pad_w);
  const int border = int(std::max(a.pad_h, a.pad_w));
  const Input x(Layout(n, int(a.h), int(a.w), int(a.c), border, s.planes, s.interleaved), a.x, a.pad_value, s.align,
                s.tiles);
  std::unique_ptr<Input> x2;
  if (a.x2)
    x2 = std::make_unique<Input>(Layout(n, int(a.h2), int(a.w2), int(a.c2), 0, s.planes, s.interleaved), a.x2, nullptr,
                                 s.align);

  // one run of kw * c bytes per row of the window where pixels touch, or where splitting it leaves no padding
  const bool merged = s.merged || x.layout.dense() || a.c % 64 == 0;
  const int64_t taps = merged ? a.kh : a.kh * a.kw, k = merged ? a.kw * a.c : a.c;
  const PackedShape shape{int(a.o), a.x2 ? 2 : 1, {int(taps), 1}, {int(k), int(a.c2)}, s.tiles > 0};
  const int8_t* const weights[2] = {a.weight, a.weight2};
  Bytes blob;
  pack_int8(isa(), shape, weights, a.mult, a.bias, a.gain,
            [&](int64_t bytes) { return (blob = allocate(bytes)).get(); });
  const auto& w = *reinterpret_cast<const Packed*>(blob.get());
  *rounding = w.rounding;

  const Layout out(n, oh, ow, int(a.o), int(s.out_border), false, s.out_interleaved);
  const int64_t bytes = out.bytes * element;
  const Bytes memory = filled(bytes + 2 * GUARD, UNTOUCHED), residual = filled(out.bytes, NOISE);
  const auto each_pixel = [&](auto&& body) {  // body(where it lies, its index in contiguous NHWC)
    for (int i = 0, index = 0; i < n; i++)
      for (int y = 0; y < oh; y++)
        for (int x = 0; x < ow; x++, index++) body(out.at(i, y, x), index * a.o);
  };
  Conv conv;
  conv.w = &w;
  conv.out = memory.get() + GUARD;
  if (a.residual) {
    uint8_t* to = s.in_place ? conv.out : residual.get();
    each_pixel([&](int64_t at, int64_t index) { std::memcpy(to + at, a.residual + index, a.o); });
    conv.residual = to;
  }
  Tables tables;
  tables.build(x.layout, window, out, x2 ? &x2->layout : nullptr, int(a.stride2_h), int(a.stride2_w), element,
               int(s.align), &w, !a.pad_value);
  tables.attach(conv, w.operands);
  conv.in[0].a = x.data.get();
  if (x2) conv.in[1].a = x2->data.get();
  conv.kind = Out(s.kind);
  conv.f32_scale = s.f32_scale;
  conv.block = int(s.block);
  conv.next = w.panel(0);
  const int units = (conv.m + 31) / 32, rows = int(s.row_parts), panels = int(s.panel_parts);
  if (s.tiles && !w.winograd) throw std::runtime_error("no transformed weights");
  const int tiles = n * tiles_along(oh, w.type) * tiles_along(ow, w.type);
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < panels; j++)
      if (s.tiles)
        winograd_function(w)(conv, x.layout, out, int(s.tiles), tiles * i / rows, tiles * (i + 1) / rows,
                             w.panels * j / panels, w.panels * (j + 1) / panels);
      else
        conv_function(*conv.w)(conv, units * i / rows * 32, std::min(conv.m, units * (i + 1) / rows * 32),
                        w.panels * j / panels, w.panels * (j + 1) / panels);

  each_pixel([&](int64_t at, int64_t index) {
    std::memcpy(result + index * element, conv.out + at * element, a.o * element);
    std::memset(conv.out + at * element, UNTOUCHED, a.o * element);
  });
  for (int64_t i = 0; i < bytes + 2 * GUARD; i++)
    if (memory.get()[i] != UNTOUCHED)
      throw std::runtime_error("differs: byte " + std::to_string(i - GUARD) + " of " + std::to_string(bytes) +
                               " was stored and is no pixel");
}

}  // namespace r50

using namespace r50;

extern "C" {

const char* face_error() { return error.c_str(); }
void face_use(int isa) { chosen = isa; }
void face_starve_others(int on) { alone = on ? std::this_thread::get_id() : std::thread::id(); }
int face_configured() { return emulated_configured; }

int face_conv(const ConvInt8* conv, uint8_t* out, int threads) {
  return guarded([&] { conv_int8(*conv, out, threads); });
}
int face_gemm(const uint8_t* a, const int8_t* b, const int32_t* bias, const int32_t* mult, const float* scale,
              int64_t m, int64_t n, int64_t k, void* out, int threads) {
  return guarded([&] { gemm_int8(a, b, bias, mult, scale, m, n, k, out, threads); });
}
int face_sweep(const Sweep* s, uint8_t* out, int32_t* rounding) {
  return guarded([&] { sweep(*s, out, rounding); });
}
// -> the blob, which lives until the next call, and its size; null where it failed
const uint8_t* face_pack(int64_t o, int64_t kh, int64_t kw, int64_t c, const int8_t* weight, int64_t c2,
                         const int8_t* weight2, const int32_t* mult, const int32_t* bias, const int32_t* gain,
                         int64_t* bytes, int winograd) {
  const int failed = guarded([&] {
    pack_int8(o, kh, kw, c, weight, c2, weight2, mult, bias, gain, winograd,
              [&](int64_t size) { return (packed = allocate(*bytes = size)).get(); });
  });
  return failed ? nullptr : packed.get();
}
const uint8_t* face_pack_float(int64_t o, int64_t kh, int64_t kw, int64_t c, const void* weight,
                               int64_t c2, const void* weight2, const float* bias, int64_t* bytes, int is_bf16,
                               int winograd) {
  const int failed = guarded([&] {
    pack_float(is_bf16, o, kh, kw, c, weight, c2, weight2, bias, winograd,
               [&](int64_t size) { return (packed = allocate(*bytes = size)).get(); });
  });
  return failed ? nullptr : packed.get();
}
int face_network(const uint8_t* plan, int64_t bytes, const uint8_t* pixels, int n, int h, int w, float* logits,
                 int threads) {
  return guarded([&] { network(plan, bytes, pixels, n, h, w, logits, threads); });
}
// one product of tiles, and one tile too early
int face_tile_dot(const void* a, const void* b, void* c, int bf16) {
  return guarded([&] {
    tile_configure();
    tile_load<0>(c, 64);
    tile_load<1>(a, 64);
    tile_load<2>(b, 64);
    bf16 ? tile_dot_bf16<0, 1, 2>() : tile_dot_u8s8<0, 1, 2>();
    tile_store<0>(c, 64);
    tile_release();
  });
}
int face_tile_unconfigured() { return guarded([] { tile_zero<0>(); }); }
}
