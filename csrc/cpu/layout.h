// Where the pixel (n, y, x) of an activation lies, and from that the tables that conv.h's kernels walk.
#pragma once
#include <cstdint>
#include <vector>

#include "conv.h"

namespace r50 {

// NHWC with `border` pixels around each image, which hold what stands for zero and are shared between neighbouring rows
// and images: (y, w) is (y + 1, -1). Two other orders serve AMX, whose tiles want 16 rows at one distance:
//   planes        four planes by the parity of y and x, so that a stride-2 convolution reads consecutive pixels
//   interleaved   the images of a group inside the pixel, (y, x, n, c), so that small feature maps fill whole tiles
// and `gap` unused bytes behind each pixel of each image: rows 512 bytes and more apart would share too few sets of L1.
struct Layout {
  int images = 0, h = 0, w = 0, c = 0, border = 0;
  bool planes = false, interleaved = false;
  int64_t pixel = 0, row = 0, image = 0, plane = 0, origin = 0, bytes = 0;  // distances and size in bytes

  Layout() = default;
  Layout(int images, int h, int w, int c, int border, bool planes = false, bool interleaved = false, int gap = 0);
  int64_t at(int n, int y, int x) const {
    if (planes) return origin + (2 * (y & 1) + (x & 1)) * plane + n * image + (y >> 1) * row + (x >> 1) * pixel;
    return origin + n * image + y * row + x * pixel;
  }
  // What AMX's first convolution reads (load_windows): for each output row the `channels` bytes of 8 input rows side by
  // side, so that the whole window of an output pixel is one run of 8 * kw * channels bytes, `stride` pixels after the
  // run of its neighbour.
  static Layout windows(int images, int h, int w, int kw, int stride, int pad, int channels, int input_w) {
    Layout l(images, h, w, 8 * kw * channels, 0);
    l.pixel = 8 * stride * channels;
    l.row = int64_t(input_w + 2 * pad) * 8 * channels;
    l.image = h * l.row;
    l.bytes = images * l.image;
    return l;
  }
  bool dense() const { return !planes && pixel == c; }  // the pixels of a row touch: kw of them are one run of bytes
};

struct Window {
  int kh, kw, stride_h, stride_w, pad_h, pad_w;
};
inline int outputs(int size, int kernel, int stride, int pad) { return (size + 2 * pad - kernel) / stride + 1; }

// The tables of one convolution, and the Conv that points into them. `align`: 1, or 16 for AMX: rows then come in
// groups of 16 at one distance, with rows to drop (outs -1) where a group has none left.
struct Tables {
  std::vector<int32_t> rows[2], taps[2], outs, residuals;  // residuals: where build() was given one
  std::vector<Slice> slices;
  std::vector<Segment> segments;
  int lda[2] = {0, 0}, k[2] = {0, 0};
  // out: the layout of the results, whose offsets are scaled by `element` bytes; in2 may be null (1x1 with stride2).
  // packed: the weights of a network's kernel; zeros: the border of `in` is; residual: what is read with
  // residual_stride, not at the offsets of the results. Throws where weights or strides do not fit the layouts.
  void build(const Layout& in, const Window& window, const Layout& out, const Layout* in2, int stride2_h, int stride2_w,
             int element, int align, const Packed* packed = nullptr, bool zeros = false,
             const Layout* residual = nullptr, int residual_stride = 1);
  void attach(Conv& conv, int operands) const;
};

// winograd.h: 3x3 convolutions with stride 1 and no residual, for blobs that have transformed weights and for `in` with
// a border, behind which a row, a pixel and 64 bytes may be read. Tiles [t0, t1) of all images, `most` at a time, by
// panels [p0, p1). Of conv only w, in[0].a and out are used.
void winograd_vnni(const Conv&, const Layout& in, const Layout& out, int most, int t0, int t1, int p0, int p1);
void winograd_avx2(const Conv&, const Layout& in, const Layout& out, int most, int t0, int t1, int p0, int p1);
void winograd_f32_vnni(const Conv&, const Layout& in, const Layout& out, int most, int t0, int t1, int p0, int p1);
void winograd_f32_avx2(const Conv&, const Layout& in, const Layout& out, int most, int t0, int t1, int p0, int p1);

inline int tiles_along(int size, Type type) { return type == Type::f32 ? (size + 1) / 2 : (size + 3) / 4; }
// With fewer tiles per thread than the first, threads share out the panels instead.
constexpr int FEW_TILES = 24, MORE_TILES = 32, MANY_TILES = 64;
inline int tiles_at_once(int channels, Type type) {
  return type == Type::f32 && channels >= 256 ? MANY_TILES : MORE_TILES;
}

using WinogradFunction = void (*)(const Conv&, const Layout&, const Layout&, int, int, int, int, int);
inline WinogradFunction winograd_function(const Packed& w) {
#if defined(__x86_64__)
  if (w.type == Type::f32) return Isa(w.isa) == Isa::vnni ? winograd_f32_vnni : winograd_f32_avx2;
  return Isa(w.isa) == Isa::vnni ? winograd_vnni : winograd_avx2;
#else
  return nullptr;  // no blob has such weights
#endif
}

}  // namespace r50
