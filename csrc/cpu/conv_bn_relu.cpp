// conv_bn_relu for inference: y = relu?(conv(x, w) * scale + bias + residual), float32 or bfloat16, NHWC, sums in float32.
//
// The output is taken in blocks: some lines of an image, or some whole images where these are small, so that what a block reads stays
// in L2. The kernels (conv_float.cpp) read x itself where nothing lies around it, else a copy of the block's lines with zeros around
// them, which widens bfloat16 where the CPU cannot multiply it. Where an instruction takes more of K at a time than a tap has
// (bfloat16, 3 channels), the windows themselves are copied, each with zeros behind it: times zero, a neighbour's NaN would be seen.
#include <algorithm>
#include <cstring>
#include <vector>

#include "conv_float.h"
#include "layout.h"
#include "pool.h"
#include "vec.h"

namespace r50 {
namespace {

constexpr int64_t ROWS = 192;  // of a block, about: they pay for loading a chunk of weights from beyond L2, and fit there themselves
constexpr int SLACK = 64;      // bytes that are read, or for a moment written, behind the end of a copy

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// One group of a convolution. A 1x1 of all pixels is a convolution of one image, one pixel wide.
struct Job {
  ConvFloat a;
  const FloatKernel& kernel;
  int group, oh, ow;
  int64_t cg, og, k;  // channels of the group; K

  Job(const ConvFloat& conv, int group) : a(conv), kernel(float_kernel(conv.is_bf16)), group(group) {
    if (a.kh == 1 && a.kw == 1 && a.stride_h == 1 && a.stride_w == 1 && !a.pad_h && !a.pad_w) {
      a.h *= a.n * a.w;
      a.n = a.w = 1;
    }
    oh = outputs(int(a.h), int(a.kh), int(a.stride_h), int(a.pad_h));
    ow = outputs(int(a.w), int(a.kw), int(a.stride_w), int(a.pad_w));
    cg = a.c / a.groups;
    og = a.o / a.groups;
    k = a.kh * a.kw * cg;
  }
  int bytes() const { return a.is_bf16 ? 2 : 4; }
  bool widens() const { return bytes() != kernel.element; }
  int units() const { return int(round_up(k * kernel.element, std::max(kernel.step, 16)) / 4); }  // fours, for pack()
  int panels() const { return int((og + kernel.width - 1) / kernel.width); }
  int64_t panel_floats() const { return int64_t(units()) * kernel.width; }
  const uint8_t* x(int64_t n, int64_t y) const {
    return static_cast<const uint8_t*>(a.x) + ((n * a.h + y) * a.w * a.c + group * cg) * bytes();
  }
  int64_t out_offset(int64_t n, int64_t y) const { return ((n * oh + y) * ow * a.o + group * og) * bytes(); }
  void copy(const uint8_t* from, uint8_t* to, int64_t n) const {  // n channels
    if (widens()) {
      kernel.widen(reinterpret_cast<const uint16_t*>(from), reinterpret_cast<float*>(to), n);
    } else {
      std::memcpy(to, from, n * bytes());
    }
  }
  void pack(int panel, float* to) const;
};

// 4x4: columns of `from` -> rows of `to`
inline void transpose4(const float* from, int64_t from_row, float* to, int64_t to_row) {
  using I = Vec<4>::U;
  Vec<4>::F r[4];
  for (int i = 0; i < 4; i++) r[i] = load<4>(from + i * from_row);
  const auto a = __builtin_shuffle(r[0], r[1], I{0, 4, 1, 5}), b = __builtin_shuffle(r[0], r[1], I{2, 6, 3, 7});
  const auto c = __builtin_shuffle(r[2], r[3], I{0, 4, 1, 5}), d = __builtin_shuffle(r[2], r[3], I{2, 6, 3, 7});
  store<4>(to, __builtin_shuffle(a, c, I{0, 1, 4, 5}));
  store<4>(to + to_row, __builtin_shuffle(a, c, I{2, 3, 6, 7}));
  store<4>(to + 2 * to_row, __builtin_shuffle(b, d, I{0, 1, 4, 5}));
  store<4>(to + 3 * to_row, __builtin_shuffle(b, d, I{2, 3, 6, 7}));
}

// (og, k) weights -> units of `width` channels each
void Job::pack(int panel, float* to) const {
  constexpr int BLOCK = 64;
  const auto* weight = static_cast<const uint8_t*>(a.weight);
  const int count = units(), width = kernel.width, per_unit = 4 / kernel.element;
  for (int first = 0; first < count; first += BLOCK) {
    const int64_t at = int64_t(first) * per_unit, taken = std::min<int64_t>(BLOCK * per_unit, k - at);
    const int used = std::min(BLOCK, count - first);
    for (int c = 0; c < width; c += 4) {
      float block[4][BLOCK];
      for (int i = 0; i < 4; i++) {
        const int64_t n = int64_t(panel) * width + c + i;
        if (n >= og || taken < BLOCK * per_unit) std::memset(block[i], 0, sizeof block[i]);
        if (n < og) copy(weight + ((group * og + n) * k + at) * bytes(), reinterpret_cast<uint8_t*>(block[i]), taken);
      }
      for (int u = 0; u < used; u += 4) transpose4(block[0] + u, BLOCK, to + int64_t(first + u) * width + c, width);
    }
  }
}

// Blocks of one size: `lines` lines of an image, or all lines of `images` images.
struct Block {
  const Job& job;
  int images, lines;
  Layout in;
  bool copied = false, gathered = false;
  Tables strip, windows;  // what the kernel walks if it reads the strip, and if it reads windows
  std::vector<Run> runs;
  std::vector<Chunk> chunks;

  Block(const Job& job, int images, int lines);
  const Tables& tables() const { return gathered ? windows : strip; }
  int64_t pixels() const { return int64_t(images) * lines * job.ow; }
  int64_t strip_bytes() const { return copied ? round_up(in.bytes + 2 * in.border * in.pixel + 32 * in.pixel + SLACK, 64) : 0; }
  int64_t window_bytes() const { return gathered ? round_up(round_up(pixels(), 16) * job.units() * 4 + SLACK, 64) : 0; }
  void load(int64_t n, int64_t y, uint8_t* strip) const;
  void gather(const uint8_t* strip, uint8_t* windows) const;
};

Block::Block(const Job& job, int images, int lines) : job(job), images(images), lines(lines) {
  const ConvFloat& a = job.a;
  const FloatKernel& kernel = job.kernel;
  const bool tiles = kernel.align > 1, flat = a.w == 1 && a.kh == 1;
  const int border = int(a.pad_w), c = int(job.cg * kernel.element);
  const bool fits = c % kernel.step == 0 && (!tiles || (flat && a.n == 1 && pixels() % kernel.align == 0));
  copied = a.pad_h || a.pad_w || job.widens() || !fits;
  if (copied) {
    in = Layout(images, int((lines - 1) * a.stride_h + a.kh), int(a.w), c, border);
  } else {
    in = Layout(images, int(a.h), int(a.w), int(a.c * kernel.element), 0);
    in.c = c;
  }
  // A window's copy costs as much as the tiles spend on 64 to 128 output channels, and saves them the pixels between the lines.
  gathered = copied && ((a.kw * c) % kernel.step || (tiles && a.kh * a.kw > 1 && job.og >= 256));
  const Window window{int(a.kh), int(a.kw), int(a.stride_h), int(a.stride_w), 0, border};
  const Layout out(images, lines, job.ow, int(a.o) * job.bytes(), 0);
  strip.build(in, window, out, nullptr, 1, 1, 1, gathered ? 1 : kernel.align);
  if (gathered)
    windows.build(Layout(1, int(pixels()), 1, job.units() * 4, 0), {1, 1, 1, 1, 0, 0},
                  Layout(1, int(pixels()), 1, int(a.o) * job.bytes(), 0), nullptr, 1, 1, 1, kernel.align);
  const int most = kernel.chunk / 4 / kernel.width, step = kernel.step / 4, units = tables().k[0] / 4;
  const int pieces = (units + most - 1) / most, piece = int(round_up((units + pieces - 1) / pieces, step));
  int at = 0;
  for (const int32_t tap : tables().taps[0])
    for (int k = 0; k < units; k += piece) {
      const int taken = std::min(piece, units - k), index = int(runs.size());
      runs.push_back({tap + 4 * k, taken});
      if (chunks.empty() || at + taken - chunks.back().at > most) chunks.push_back({index, index, at});
      chunks.back().last = index + 1;
      at += taken;
    }
}

// The input of the block that begins with line y of image n, as far as it lies in the image, and zeros
void Block::load(int64_t n, int64_t y, uint8_t* strip) const {
  const ConvFloat& a = job.a;
  const int64_t edge = in.border * in.pixel, width = in.w * in.pixel;
  for (int i = 0; i < images; i++)
    for (int l = 0; l < in.h; l++) {
      uint8_t* line = strip + in.at(i, l, 0);
      std::memset(line - edge, 0, edge);
      std::memset(line + width, 0, edge);
      const int64_t from = y * a.stride_h - a.pad_h + l;
      if (from < 0 || from >= a.h) {
        std::memset(line, 0, width);
      } else if (job.cg == a.c) {
        job.copy(job.x(n + i, from), line, a.w * a.c);
      } else {
        for (int64_t p = 0; p < a.w; p++) job.copy(job.x(n + i, from) + p * a.c * job.bytes(), line + p * in.pixel, job.cg);
      }
    }
}

void Block::gather(const uint8_t* from, uint8_t* to) const {
  constexpr int PIECE = 32;  // the last one of a run writes too much: zeros or the next run take its place
  const int64_t row = job.units() * 4, run = strip.k[0], used = run * int64_t(strip.taps[0].size());
  for (const int32_t offset : strip.rows[0]) {
    uint8_t* at = to;
    for (const int32_t tap : strip.taps[0]) {
      for (int64_t i = 0; i < run; i += PIECE) std::memcpy(at + i, from + offset + tap + i, PIECE);
      at += run;
    }
    std::memset(at, 0, row - used);
    to += row;
  }
}

void run(const Job& job, uint8_t* out, int threads) {
  const ConvFloat& a = job.a;
  const FloatKernel& kernel = job.kernel;
  int64_t lines = std::clamp<int64_t>(ROWS / job.ow, 1, job.oh), images = 1;
  int64_t pieces = std::max<int64_t>(1, (2 * job.oh + lines) / (2 * lines));  // of an image, about `ROWS` rows each
  lines = (job.oh + pieces - 1) / pieces;
  pieces = (job.oh + lines - 1) / lines;
  if (pieces == 1) images = std::clamp<int64_t>(ROWS / (lines * job.ow), 1, a.n);
  std::vector<Block> shapes{Block(job, int(images), int(lines))};  // and what is left over
  if (const int64_t rest = pieces == 1 ? a.n % images : job.oh % lines)
    shapes.emplace_back(job, int(pieces == 1 ? rest : 1), int(pieces == 1 ? lines : rest));

  const int64_t blocks = pieces == 1 ? (a.n + images - 1) / images : a.n * pieces;
  const int panels = job.panels(), width = kernel.width;
  const int parts = blocks % threads && blocks < 8 * threads ? std::min(threads, panels) : 1;  // of the panels, for a thread each
  const int64_t panel_bytes = job.panel_floats() * 4;
  std::vector<float> scale(int64_t(panels) * width), bias(scale.size());
  std::copy_n(a.scale + job.group * job.og, job.og, scale.begin());
  std::copy_n(a.bias + job.group * job.og, job.og, bias.begin());
  Bytes packed;  // unless each panel is used once
  if (blocks > 1) {
    packed = allocate(panels * panel_bytes);
    parallel(std::min(threads, panels), [&](int thread, int count) {
      for (int p = panels * thread / count; p < panels * (thread + 1) / count; p++)
        job.pack(p, reinterpret_cast<float*>(packed.get() + p * panel_bytes));
    });
  }
  const int64_t strip_bytes = shapes[0].strip_bytes(), window_bytes = shapes[0].window_bytes();
  const int64_t acc_bytes = round_up(shapes[0].pixels() * width * 4, 64);
  parallel(int(std::min<int64_t>(threads, blocks * parts)), [&](int thread, int count) {
    auto* strip = static_cast<uint8_t*>(scratch(strip_bytes + window_bytes + acc_bytes + (packed ? 0 : panel_bytes)));
    uint8_t* windows = strip + strip_bytes;
    auto* acc = reinterpret_cast<float*>(windows + window_bytes);
    auto* panel = reinterpret_cast<float*>(windows + window_bytes + acc_bytes);
    for (int64_t item = blocks * parts * thread / count; item < blocks * parts * (thread + 1) / count; item++) {
      const int64_t index = item / parts, part = item % parts;
      const int64_t n = pieces == 1 ? index * images : index / pieces, y = pieces == 1 ? 0 : index % pieces * lines;
      const bool rest = pieces == 1 ? n + images > a.n : y + lines > job.oh;
      const Block& block = shapes[rest];
      FloatConv c;
      c.a = job.x(n, y * a.stride_h);
      if (block.copied) {
        block.load(n, y, strip);
        c.a = strip;
        if (block.gathered) {
          block.gather(strip, windows);
          c.a = windows;
        }
      }
      const Tables& tables = block.tables();
      c.rows = tables.rows[0].data();
      c.lda = tables.lda[0];
      c.outs = tables.outs.data();
      c.m = int(tables.outs.size());
      c.runs = block.runs.data();
      c.chunks = block.chunks.data();
      c.nchunks = int(block.chunks.size());
      c.units = job.units();
      c.relu = a.relu;
      c.acc = acc;
      const int p0 = int(panels * part / parts), p1 = int(panels * (part + 1) / parts), step = packed ? p1 - p0 : 1;
      for (int p = p0; p < p1; p += step) {
        const int64_t column = int64_t(p) * width, offset = job.out_offset(n, y) + column * job.bytes();
        if (!packed) {
          job.pack(p, panel);
          c.next = static_cast<const uint8_t*>(a.weight) + (job.group * job.og + (p + 1) * int64_t(width)) * job.k * job.bytes();
        }
        c.weights = packed ? reinterpret_cast<const float*>(packed.get() + p * panel_bytes) : panel;
        c.scale = scale.data() + column;
        c.bias = bias.data() + column;
        c.o = int(job.og - column);
        c.out = out + offset;
        if (a.residual) c.residual = static_cast<const uint8_t*>(a.residual) + offset;
        kernel.run(c, 0, step);
      }
    }
  });
}

}  // namespace

void conv_bn_relu(const ConvFloat& a, void* out, int threads) {
  for (int group = 0; group < a.groups; group++) run(Job(a, group), static_cast<uint8_t*>(out), threads);
}

}  // namespace r50
