// conv_bn_relu for inference: y = relu?(conv(x, w) * scale + bias + residual), NHWC, float32 or bfloat16 with sums in
// float32 and one rounding.
//
// The output is taken in blocks: some lines of an image, or some whole images where these are small, so that what a
// block reads stays in L2. The kernels (conv_float.cpp) read x itself where nothing lies around it, else a copy of the
// block's lines with zeros around them, widened where the CPU cannot multiply bfloat16. Where an instruction takes more
// of K at a time than a tap has (bfloat16, 3 channels) the windows themselves are copied, with zeros behind each: a
// neighbour's NaN times a zero weight would be seen.
//
// Weights are packed at each call. If several blocks use them that is done first; if only one does (batch 1, small
// images), each panel is packed before its use, while the multiplies of the one before it fetch its weights.
#include <algorithm>
#include <cstring>
#include <vector>

#include "conv_float.h"
#include "layout.h"
#include "pool.h"
#include "vec.h"

namespace r50 {
namespace {

constexpr int64_t ROWS = 192;  // of a block, about: they pay for loading a chunk of weights from beyond L2
constexpr int SLACK = 64;      // bytes that are read, or for a moment written, behind the end of a copy

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// One group of a convolution. A 1x1 of all pixels is a convolution of one image, one pixel wide.
struct Job {
  ConvFloat a;
  const FloatKernel& kernel;
  int64_t group, cg, og, k;  // its channels; K
  int oh, ow;

  Job(const ConvFloat& conv, int64_t group)
      : a(conv), kernel(float_kernel(a.is_bf16)), group(group), cg(a.c / a.groups), og(a.o / a.groups),
        k(a.kh * a.kw * cg) {
    if (a.kh == 1 && a.kw == 1 && a.stride_h == 1 && a.stride_w == 1 && !a.pad_h && !a.pad_w) {
      a.h *= a.n * a.w;
      a.n = a.w = 1;
    }
    oh = outputs(int(a.h), int(a.kh), int(a.stride_h), int(a.pad_h));
    ow = outputs(int(a.w), int(a.kw), int(a.stride_w), int(a.pad_w));
  }
  bool flat() const { return a.w == 1 && a.n == 1 && k == cg; }
  int bytes() const { return a.is_bf16 ? 2 : 4; }
  bool widens() const { return bytes() != kernel.element; }
  int units() const { return int(round_up(k * kernel.element, std::max(kernel.step, 16)) / 4); }  // fours, for pack()
  int panels() const { return int(ceil_div(og, kernel.width)); }
  int64_t panel_floats() const { return int64_t(units()) * kernel.width; }
  int64_t out_offset(int64_t n, int64_t y) const { return ((n * oh + y) * ow * a.o + group * og) * bytes(); }
  const uint8_t* x(int64_t n, int64_t y) const {
    return static_cast<const uint8_t*>(a.x) + ((n * a.h + y) * a.w * a.c + group * cg) * bytes();
  }
  const uint8_t* weight(int64_t channel) const {
    return static_cast<const uint8_t*>(a.weight) + (group * og + channel) * k * bytes();
  }
  void copy(const uint8_t* from, uint8_t* to, int64_t n) const {
    if (widens()) {
      kernel.widen(reinterpret_cast<const uint16_t*>(from), reinterpret_cast<float*>(to), n);
    } else {
      std::memcpy(to, from, n * bytes());
    }
  }
  void pack(int panel, float* to) const;
};

// 4x4: columns of `from` -> rows of `to`; from_row in bytes
inline void transpose4(const uint8_t* from, int64_t from_row, float* to, int64_t to_row) {
  using I = Vec<4>::U;
  Vec<4>::F r[4];
  for (int i = 0; i < 4; i++) r[i] = load<4>(reinterpret_cast<const float*>(from + i * from_row));
  const auto a = __builtin_shuffle(r[0], r[1], I{0, 4, 1, 5}), b = __builtin_shuffle(r[0], r[1], I{2, 6, 3, 7});
  const auto c = __builtin_shuffle(r[2], r[3], I{0, 4, 1, 5}), d = __builtin_shuffle(r[2], r[3], I{2, 6, 3, 7});
  store<4>(to, __builtin_shuffle(a, c, I{0, 1, 4, 5}));
  store<4>(to + to_row, __builtin_shuffle(a, c, I{2, 3, 6, 7}));
  store<4>(to + 2 * to_row, __builtin_shuffle(b, d, I{0, 1, 4, 5}));
  store<4>(to + 3 * to_row, __builtin_shuffle(b, d, I{2, 3, 6, 7}));
}

// (og, k) weights -> units() x width of this panel, zeros where there are none
void Job::pack(int panel, float* to) const {
  constexpr int BLOCK = 64;
  const int width = kernel.width, per_unit = 4 / kernel.element;
  for (int first = 0; first < units(); first += BLOCK) {
    const int64_t at = int64_t(first) * per_unit, taken = std::min<int64_t>(BLOCK * per_unit, k - at);
    for (int c = 0; c < width; c += 4) {
      const int64_t channel = int64_t(panel) * width + c;
      const uint8_t* from = weight(channel) + at * bytes();
      int64_t row = k * bytes();
      uint8_t rows[4][4 * BLOCK];
      if (widens() || taken < BLOCK * per_unit || channel + 4 > og) {
        std::memset(rows, 0, sizeof rows);
        for (int i = 0; i < 4 && channel + i < og; i++) copy(from + i * row, rows[i], taken);
        from = rows[0];
        row = sizeof rows[0];
      }
      for (int u = 0; u < std::min(BLOCK, units() - first); u += 4)
        transpose4(from + 4 * u, row, to + int64_t(first + u) * width + c, width);
    }
  }
}

// Blocks of one size: `lines` lines of an image, or all lines of `images` images.
struct Block {
  const Job& job;
  const int images, lines;
  Layout in;
  bool copied, gathered;
  Tables strip, windows;  // what the kernel walks if it reads x or its copy, and if it reads windows
  std::vector<Run> runs;
  std::vector<Chunk> chunks;

  Block(const Job& job, int64_t images, int64_t lines);
  const Tables& tables() const { return gathered ? windows : strip; }
  int64_t pixels() const { return int64_t(images) * lines * job.ow; }
  // scratch; groups of rows may go on behind the last pixel (layout.cpp)
  int64_t strip_bytes() const { return copied ? round_up(in.bytes + 2 * job.kernel.align * in.pixel + SLACK, 64) : 0; }
  int64_t window_bytes() const {
    return gathered ? round_up(round_up(pixels(), job.kernel.align) * job.units() * 4 + SLACK, 64) : 0;
  }
  void split(int most);
  void load(int64_t n, int64_t y, uint8_t* strip) const;
  void gather(const uint8_t* strip, uint8_t* windows) const;
};

Block::Block(const Job& job, int64_t images, int64_t lines) : job(job), images(int(images)), lines(int(lines)) {
  const ConvFloat& a = job.a;
  const FloatKernel& kernel = job.kernel;
  const bool tiles = kernel.align > 1;
  const int border = int(a.pad_w), c = int(job.cg * kernel.element), out_c = int(a.o) * job.bytes();
  const bool exact = c % kernel.step == 0 && (!tiles || (job.flat() && pixels() % kernel.align == 0));
  copied = a.pad_h || a.pad_w || job.widens() || !exact;
  if (copied) {
    in = Layout(int(images), int((lines - 1) * a.stride_h + a.kh), int(a.w), c, border);
  } else {
    in = Layout(int(images), int(a.h), int(a.w), int(a.c) * job.bytes(), 0);
    in.c = c;
  }
  // To copy windows costs AMX as much as 64 to 128 output channels, and saves it the pixels between the lines.
  gathered = copied && ((a.kw * c) % kernel.step || (tiles && a.kh * a.kw > 1 && job.og >= 256));
  strip.build(in, {int(a.kh), int(a.kw), int(a.stride_h), int(a.stride_w), 0, border},
              Layout(int(images), int(lines), job.ow, out_c, 0), nullptr, 1, 1, 1, gathered ? 1 : kernel.align);
  if (gathered)
    windows.build(Layout(1, int(pixels()), 1, job.units() * 4, 0), {1, 1, 1, 1, 0, 0},
                  Layout(1, int(pixels()), 1, out_c, 0), nullptr, 1, 1, 1, kernel.align);
  split(kernel.chunk / 4 / kernel.width);
}

// The taps -> runs of at most so many units, and chunks of runs
void Block::split(int most) {
  const int units = tables().k[0] / 4, step = job.kernel.step / 4;
  const int piece = int(round_up(ceil_div(units, ceil_div(units, most)), step));
  int at = 0;
  for (const int32_t tap : tables().taps[0])
    for (int k = 0; k < units; k += piece) {
      const int taken = std::min(piece, units - k), index = int(runs.size());
      if (chunks.empty() || at + taken - chunks.back().at > most) chunks.push_back({index, index, at});
      runs.push_back({tap + 4 * k, taken});
      chunks.back().last = index + 1;
      at += taken;
    }
}

// The lines that a block beginning with line y of image n reads, as far as there are such, with zeros around them
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
        for (int64_t p = 0; p < a.w; p++)
          job.copy(job.x(n + i, from) + p * a.c * job.bytes(), line + p * in.pixel, job.cg);
      }
    }
}

void Block::gather(const uint8_t* from, uint8_t* to) const {
  constexpr int PIECE = 32;  // the last one of a run writes too much: the next run or zeros take its place
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

// A job cut into blocks, and these, where they do not suffice for the threads, into parts of the panels.
struct Plan {
  const Job& job;
  int64_t images = 1, lines, pieces, blocks;  // of a block; blocks of an image that is cut, else 1; all
  int panels, parts;
  std::vector<Block> shapes;  // of all blocks but the last one of an image, or of all images
  std::vector<float> scale, bias;
  Bytes packed;  // unless there is one block
  int64_t strip_bytes = 0, window_bytes = 0, acc_bytes, panel_bytes;

  Plan(const Job& job, int threads);
  void run(uint8_t* out, int thread, int count) const;
  void multiply(FloatConv c, int64_t offset, uint8_t* out, int p0, int p1, float* panel) const;
};

Plan::Plan(const Job& job, int threads) : job(job) {
  const int align = job.kernel.align;
  lines = std::clamp<int64_t>(ROWS / job.ow, 1, job.oh);
  lines = ceil_div(job.oh, std::max<int64_t>(1, (2 * job.oh + lines) / (2 * lines)));  // of almost equal height
  if (job.flat() && lines < job.oh) lines = std::max<int64_t>(1, lines / align) * align;
  pieces = ceil_div(job.oh, lines);
  if (pieces == 1) images = std::clamp<int64_t>(ROWS / (lines * job.ow), 1, job.a.n);
  blocks = ceil_div(job.a.n, images) * pieces;
  shapes.reserve(2);
  shapes.emplace_back(job, images, lines);
  if (pieces == 1 ? job.a.n % images : job.oh % lines)
    shapes.emplace_back(job, pieces == 1 ? job.a.n % images : 1, pieces == 1 ? lines : job.oh % lines);
  panels = job.panels();
  parts = blocks % threads && blocks < 8 * threads ? std::min(threads, panels) : 1;

  panel_bytes = job.panel_floats() * 4;
  for (const Block& block : shapes) {
    strip_bytes = std::max(strip_bytes, block.strip_bytes());
    window_bytes = std::max(window_bytes, block.window_bytes());
  }
  acc_bytes = round_up(shapes[0].pixels() * job.kernel.width * 4, 64);
  scale.resize(int64_t(panels) * job.kernel.width);
  bias.resize(scale.size());
  std::copy_n(job.a.scale + job.group * job.og, job.og, scale.begin());
  std::copy_n(job.a.bias + job.group * job.og, job.og, bias.begin());
  if (blocks == 1) return;
  packed = allocate(panels * panel_bytes);
  parallel(std::min(threads, panels), [&](int thread, int count) {
    for (int p = panels * thread / count; p < panels * (thread + 1) / count; p++)
      job.pack(p, reinterpret_cast<float*>(packed.get() + p * panel_bytes));
  });
}

void Plan::run(uint8_t* out, int thread, int count) const {
  const size_t bytes = strip_bytes + window_bytes + acc_bytes + (packed ? 0 : panel_bytes);
  auto* const strip = static_cast<uint8_t*>(scratch(bytes));
  uint8_t *const windows = strip + strip_bytes, *const acc = windows + window_bytes, *const panel = acc + acc_bytes;
  int64_t loaded = -1;
  for (int64_t item = blocks * parts * thread / count; item < blocks * parts * (thread + 1) / count; item++) {
    const int64_t index = item / parts, part = item % parts;
    const int64_t n = pieces == 1 ? index * images : index / pieces, y = index % pieces * lines;
    const Block& block = shapes[n + images > job.a.n || y + lines > job.oh];
    const Tables& tables = block.tables();
    if (block.copied && index != loaded) {
      block.load(n, y, strip);
      if (block.gathered) block.gather(strip, windows);
      loaded = index;
    }
    FloatConv c;
    c.a = block.gathered ? windows : block.copied ? strip : job.x(n, y * job.a.stride_h);
    c.rows = tables.rows[0].data();
    c.lda = tables.lda[0];
    c.outs = tables.outs.data();
    c.m = int(tables.outs.size());
    c.runs = block.runs.data();
    c.chunks = block.chunks.data();
    c.nchunks = int(block.chunks.size());
    c.units = job.units();
    c.relu = job.a.relu;
    c.acc = reinterpret_cast<float*>(acc);
    multiply(c, job.out_offset(n, y), out, int(panels * part / parts), int(panels * (part + 1) / parts),
             reinterpret_cast<float*>(panel));
  }
}

// The block's results for panels p0 to p1, of which the first output lies at `offset`; `panel` is room for one.
void Plan::multiply(FloatConv c, int64_t offset, uint8_t* out, int p0, int p1, float* panel) const {
  const int width = job.kernel.width, step = packed ? p1 - p0 : 1;
  for (int p = p0; p < p1; p += step) {
    const int64_t column = int64_t(p) * width, at = offset + column * job.bytes();
    c.weights = panel;
    if (packed) {
      c.weights = reinterpret_cast<const float*>(packed.get() + p * panel_bytes);
    } else {
      job.pack(p, panel);
      c.next = job.weight(column + width);
    }
    c.scale = scale.data() + column;
    c.bias = bias.data() + column;
    c.o = int(job.og - column);
    c.out = out + at;
    if (job.a.residual) c.residual = static_cast<const uint8_t*>(job.a.residual) + at;
    job.kernel.run(c, 0, step);
  }
}

}  // namespace

void conv_bn_relu(const ConvFloat& a, void* out, int threads) {
  for (int64_t group = 0; group < a.groups; group++) {
    const Job job(a, group);
    const Plan plan(job, threads);
    parallel(int(std::min<int64_t>(threads, plan.blocks * plan.parts)),
             [&](int thread, int count) { plan.run(static_cast<uint8_t*>(out), thread, count); });
  }
}

}  // namespace r50
