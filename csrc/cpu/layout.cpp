#include "layout.h"

#include <algorithm>
#include <compare>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>

namespace r50 {

Layout::Layout(int images, int h, int w, int c, int border, bool planes, bool interleaved, int gap)
    : images(images), h(h), w(w), c(c), border(border), planes(planes), interleaved(interleaved) {
  const int64_t ph = planes ? (h + 1) / 2 : h, pw = planes ? (w + 1) / 2 : w;
  pixel = int64_t(interleaved ? images : 1) * (c + gap);
  row = (pw + border) * pixel;
  image = interleaved ? c + gap : (ph + border) * row;
  origin = border * (row + pixel);
  plane = ((interleaved ? 1 : images) * (ph + border) + border) * row + border * pixel;
  bytes = (planes ? 4 : 1) * plane;
}

namespace {

struct Part {  // of a window that lies inside the image
  int top, bottom, left, right;
  auto operator<=>(const Part&) const = default;
};
struct Row {
  int64_t in, in2, out, residual;
};

int32_t narrow(int64_t offset) {
  if (offset > std::numeric_limits<int32_t>::max())
    throw std::runtime_error("convolution: an image of more than 2 GiB");
  return int32_t(offset);
}

}  // namespace

void Tables::build(const Layout& in, const Window& window, const Layout& out, const Layout* in2, int stride2_h,
                   int stride2_w, int element, int align, const Packed* packed, bool zeros, const Layout* residual,
                   int residual_stride) {
  const bool merged = in.dense();
  const auto refuse = [](const char* what, int multiple, int got) {
    throw std::runtime_error(std::string("convolution: ") + what + " in multiples of " + std::to_string(multiple) +
                             ", got " + std::to_string(got));
  };
  // weights packed for whole runs of kw * c bytes have no padding between the taps of a run
  if (packed && !merged && packed->taps[0] < window.kh * window.kw)
    if (const int multiple = tap_multiple(Isa(packed->isa), packed->type); in.c % multiple)
      refuse("a layout that takes runs of taps apart needs channels", multiple, in.c);
  // the distance from the pixel of a row to that of a tap must not depend on the pixel's parity
  for (const auto& [kernel, stride, pad] : {std::tuple(window.kh, window.stride_h, window.pad_h),
                                            std::tuple(window.kw, window.stride_w, window.pad_w)})
    if (in.planes && (kernel > 1 || pad) && stride % 2) refuse("a window on planes needs strides", 2, stride);
  for (int dy = 0; dy < window.kh; dy++)
    for (int dx = 0; dx < (merged ? 1 : window.kw); dx++)
      taps[0].push_back(narrow(in.at(0, dy - window.pad_h, dx - window.pad_w) - in.at(0, 0, 0)));
  k[0] = merged ? window.kw * in.c : in.c;
  if (in2) {
    taps[1] = {0};
    k[1] = in2->c;
  }
  if (packed && Isa(packed->isa) == Isa::amx)  // one entry per tile of 64 bytes
    for (int s = 0; s < 2; s++) {
      constexpr int STEP = 64;
      std::vector<int32_t> steps;
      for (int32_t tap : taps[s])
        for (int i = 0; i < k[s]; i += STEP) steps.push_back(narrow(int64_t(tap) + i));
      taps[s] = std::move(steps);
      k[s] = STEP;
    }
  const Isa isa = packed ? Isa(packed->isa) : Isa::plain;
  const bool slicing = isa == Isa::vnni || isa == Isa::avx2;
  const int multiple = tap_multiple(isa, packed ? packed->type : Type::int8);
  // what a window has outside the image are zeros, which need not be multiplied; a run is cut between groups of k only
  const bool cuts = slicing && zeros && align == 1, between = !merged || in.c % multiple == 0;
  const auto inside = [&](int y, int x) {
    Part part{0, window.kh, 0, window.kw};
    const int above = window.pad_h - y * window.stride_h, before = window.pad_w - x * window.stride_w;
    if (cuts) part.top = std::max(0, above), part.bottom = std::min(window.kh, in.h + above);
    if (cuts && between) part.left = std::max(0, before), part.right = std::min(window.kw, in.w + before);
    return part;
  };
  std::map<Part, std::vector<Row>> parts;
  auto here = parts.end();
  for (int n = 0; n < out.images; n++)
    for (int y = 0; y < out.h; y++)
      for (int x = 0; x < out.w; x++) {
        const Part part = inside(y, x);
        if (here == parts.end() || here->first != part) here = parts.try_emplace(part).first;
        here->second.push_back({in.at(n, y * window.stride_h, x * window.stride_w),
                                in2 ? in2->at(n, y * stride2_h, x * stride2_w) : 0, out.at(n, y, x) * element,
                                residual ? residual->at(n, y * residual_stride, x * residual_stride) : 0});
      }
  std::vector<Row> all;
  all.reserve(size_t(out.images) * out.h * out.w);
  const auto whole = [&](int k) { return int(round_up(k, multiple)); };
  for (const auto& [part, of_part] : parts) {
    all.insert(all.end(), of_part.begin(), of_part.end());
    if (!slicing) continue;
    const int first = int(slices.size());
    for (int dy = part.top; dy < part.bottom; dy++)
      for (int dx = part.left; dx < part.right; dx = merged ? part.right : dx + 1) {
        const int64_t offset = in.at(0, dy - window.pad_h, dx - window.pad_w) - in.at(0, 0, 0);
        const int of_row = dy * whole(window.kw * in.c) + dx * in.c, of_tap = (dy * window.kw + dx) * whole(in.c);
        slices.push_back({0, narrow(offset), merged ? (part.right - dx) * in.c : in.c, merged ? of_row : of_tap});
      }
    if (in2) slices.push_back({1, 0, in2->c, packed->taps[0] * packed->kpad[0]});
    segments.push_back({int(all.size()), first, int(slices.size())});
  }
  if (align == 1) {
    for (const Row& r : all) {
      rows[0].push_back(narrow(r.in));
      if (in2) rows[1].push_back(narrow(r.in2));
      outs.push_back(narrow(r.out));
      if (residual) residuals.push_back(narrow(r.residual));
    }
    return;
  }
  // Groups of `align` rows at the distance lda in the input (and lda2 in the second): taken in the order of the input's
  // memory; pixels that the output has not (a border, every other column) become rows to drop when they lie inside a
  // group.
  std::sort(all.begin(), all.end(), [](const Row& a, const Row& b) { return a.in < b.in; });
  const auto distance = [&](int64_t Row::*member) {
    int64_t least = std::numeric_limits<int32_t>::max();
    for (size_t i = 1; i < all.size(); i++)
      if (const int64_t d = all[i].*member - all[i - 1].*member; d > 0) least = std::min(least, d);
    return all.size() > 1 ? least : 0;
  };
  // Rows further apart than two pixels (results one pixel wide) would leave the room behind a buffer: each is a group
  // of its own.
  const auto within = [](int64_t d, const Layout& l) { return d <= 2 * l.pixel ? d : 0; };
  const int64_t step = within(distance(&Row::in), in), step2 = in2 ? within(distance(&Row::in2), *in2) : 0;
  lda[0] = narrow(step);
  lda[1] = narrow(step2);
  for (size_t next = 0; next < all.size();) {
    const Row first = all[next];
    for (int i = 0; i < align; i++) {
      const bool here =
          next < all.size() && all[next].in == first.in + i * step && (!in2 || all[next].in2 == first.in2 + i * step2);
      outs.push_back(here ? narrow(all[next].out) : -1);
      if (residual) residuals.push_back(here ? narrow(all[next].residual) : -1);
      rows[0].push_back(narrow(first.in + i * step));
      if (in2) rows[1].push_back(narrow(first.in2 + i * step2));
      next += here;
    }
  }
  if (!segments.empty()) segments.back().end = int(outs.size());  // the only one, with rows to drop
}

void Tables::attach(Conv& conv, int operands) const {
  for (int i = 0; i < operands; i++) {
    conv.in[i].rows = rows[i].data();
    conv.in[i].taps = taps[i].data();
    conv.in[i].ntaps = int(taps[i].size());
    conv.in[i].k = k[i];
    conv.in[i].lda = lda[i];
  }
  conv.outs = outs.data();
  conv.segments = segments.data();
  conv.slices = slices.data();
  conv.m = int(outs.size());
}

}  // namespace r50
