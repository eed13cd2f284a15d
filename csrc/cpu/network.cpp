#include "network.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <list>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "layout.h"
#include "pool.h"
#include "pooling.h"

namespace r50 {
namespace {

constexpr int64_t SLACK = 64;              // kernels read whole vectors past the last pixel
constexpr int LARGEST_GROUP = 32;          // images at a time where weights outweigh activations most
constexpr int FEWEST_TOGETHER = 8;         // of a batch's rest, in one pass
constexpr int FEWEST_APART = 4;            // images per thread, from which on threads never share one; AMX's at a time
constexpr int64_t WINOGRAD = -1;           // in place of a block (csrc/plan.py)
constexpr int CROWDED = 1024;              // bytes; a column of such pixels lies in few sets of L1
constexpr size_t CACHED_BYTES = 2u << 30;  // idle workspaces kept, least recently used dropped first

struct Plan {
  const uint8_t* data;
  const PlanHeader& header() const { return *reinterpret_cast<const PlanHeader*>(data); }
  Type type() const { return Type(header().type); }
  const PlanBuffer& buffer(int64_t i) const {
    return reinterpret_cast<const PlanBuffer*>(data + sizeof(PlanHeader))[i];
  }
  const PlanStep& step(int64_t i) const {
    return reinterpret_cast<const PlanStep*>(data + sizeof(PlanHeader) + header().buffers * sizeof(PlanBuffer))[i];
  }
};

// Buffers and tables for one plan, image size and number of images at a time; used by one call at a time.
struct Workspace {
  std::tuple<int64_t, int, int, int> key;  // plan id, images, height, width
  std::vector<Layout> layouts;
  std::vector<uint8_t*> buffers;
  std::vector<bool> wide;  // the buffer holds all images, not only those of one pass
  std::vector<Tables> tables;
  std::vector<int> group;
  struct Turn {
    int step, image;  // of `group` images the first
  };
  std::vector<Turn> order;
  Bytes memory;
  size_t bytes = 0;

  Workspace(const Plan& plan, int images, int h, int w);
};

struct Span {
  int first, last;  // steps
};

// -> where buffers of these sizes lie in one memory: those that are never in use at the same time may share it, so that
// results go where the caches still hold what nobody needs any more
std::vector<int64_t> arrange(const std::vector<int64_t>& sizes, const std::vector<Span>& used) {
  std::vector<int> order(sizes.size()), placed;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return sizes[a] > sizes[b]; });
  std::vector<int64_t> offsets(sizes.size());
  for (int b : order) {
    int64_t at = 0;
    for (bool moved = true; moved;) {
      moved = false;
      for (int other : placed)
        if (used[b].first <= used[other].last && used[other].first <= used[b].last &&
            at < offsets[other] + sizes[other] && offsets[other] < at + sizes[b])
          at = offsets[other] + sizes[other], moved = true;
    }
    offsets[b] = at;
    placed.push_back(b);
  }
  return offsets;
}

Workspace::Workspace(const Plan& plan, int images, int h, int w) : key(plan.header().id, images, h, w) {
  const PlanHeader& header = plan.header();
  const int align = alignment(isa_of(plan.type()));
  std::vector<int> heights(header.buffers), widths(header.buffers), held(header.buffers, 0),
      first_pass(header.buffers, -1), passes;
  std::vector<bool> exchanged(header.buffers, false);  // between passes
  // one image at a time while its activations outweigh the weights, then as many as balance them, so that weights are
  // read less often
  const auto balanced = [&](const PlanStep& s, int64_t activations) {
    const int64_t weights =
        Step(s.kind) == Step::conv ? reinterpret_cast<const Packed*>(plan.data + s.packed)->weight_bytes() : 0;
    int images = 1;
    while (images < LARGEST_GROUP && images * activations < weights) images *= 2;
    return images;
  };
  struct Form {  // what is one for a sum and its residual, which lie at the same offsets
    int64_t border;
    bool planes, interleaved = false, whole = true;
    bool operator==(const Form&) const = default;
  };
  std::vector<Form> forms;
  for (int64_t b = 0; b < header.buffers; b++) forms.push_back({plan.buffer(b).border, plan.buffer(b).planes != 0});
  std::vector<int> wanted;  // images at a time that suit each step
  for (int64_t i = 0; i < header.steps; i++) {
    const PlanStep& s = plan.step(i);
    int oh = 1, ow = 1;
    const Step kind = Step(s.kind);
    if (kind == Step::load) oh = h, ow = w;
    if (kind == Step::conv || kind == Step::max_pool || kind == Step::load_windows) {
      oh = outputs(s.in < 0 ? h : heights[s.in], int(s.kh), int(s.stride), int(s.pad));
      ow = outputs(s.in < 0 ? w : widths[s.in], int(s.kw), int(s.stride), int(s.pad));
      if (oh < 1 || ow < 1)
        throw std::runtime_error("network: images of " + std::to_string(h) + "x" + std::to_string(w) +
                                 " are too small");
    }
    if (s.out >= 0) heights[s.out] = oh, widths[s.out] = ow;
    const auto size = [&](int64_t b) { return b < 0 ? 0 : int64_t(heights[b]) * widths[b] * plan.buffer(b).pixel; };
    wanted.push_back(balanced(s, size(s.in) + size(s.out)));
    // what a window reads is written as many images at a time as it is read: they lie inside its pixels (see below)
    if (kind == Step::conv && s.kw > 1)
      for (int64_t writer = i; writer-- > 0;)
        if (plan.step(writer).out == s.in) {
          wanted[writer] = std::max(wanted[writer], wanted[i]);
          break;
        }
  }
  int pass = 0, largest = 1;
  const auto touch = [&](int64_t buffer, int g) {
    if (buffer < 0) return;
    if (first_pass[buffer] >= 0 && first_pass[buffer] != pass) held[buffer] = images, exchanged[buffer] = true;
    if (first_pass[buffer] < 0) first_pass[buffer] = pass;
    held[buffer] = std::max(held[buffer], g);
  };
  for (int64_t i = 0; i < header.steps; i++) {
    const PlanStep& s = plan.step(i);
    const Step kind = Step(s.kind);
    largest = std::max(largest, wanted[i]);
    group.push_back(std::gcd(images, largest));
    if (i && group[i] != group[i - 1]) pass++;
    passes.push_back(pass);
    for (int64_t b : {s.in, s.in2, s.residual, s.out}) touch(b, group[i]);
    if (kind == Step::conv && s.kw > 1 && plan.buffer(s.in).pixel % 64)
      forms[s.in].whole = false;  // its taps cannot be taken apart
    // without a border pixels fill whole tiles image by image, and sums are read and written as one run
    if (kind == Step::conv && s.kw > 1 && align > 1 && group[i] > 1) forms[s.in].interleaved = true;
  }
  for (bool changed = true; changed;) {
    changed = false;
    for (int64_t i = 0; i < header.steps; i++) {
      const PlanStep& s = plan.step(i);
      if (s.residual < 0 || s.residual_stride > 1 || forms[s.residual] == forms[s.out]) continue;
      const Form a = forms[s.residual], b = forms[s.out];
      forms[s.residual] = forms[s.out] = {std::max(a.border, b.border), a.planes && b.planes,
                                          a.interleaved || b.interleaved, a.whole && b.whole};
      changed = true;
    }
  }
  std::vector<Span> used(header.buffers, {int(header.steps), -1});
  const auto use = [&](int64_t b, int64_t first, int64_t last) {
    used[b] = {std::min(used[b].first, int(first)), std::max(used[b].last, int(last))};
  };
  for (int64_t i = 0; i < header.steps; i++) {
    const PlanStep& s = plan.step(i);
    const auto [begin, end] = std::equal_range(passes.begin(), passes.end(), passes[i]);
    for (int64_t b : {s.in, s.in2, s.residual, s.out}) {
      if (b < 0) continue;
      if (forms[b].border)  // which is written once, below
        use(b, 0, header.steps);
      else if (exchanged[b])  // while the first pass writes it image by image, and the last one reads it so
        use(b, begin - passes.begin(), end - passes.begin() - 1);
      else
        use(b, i, i);
    }
  }
  std::vector<int64_t> sizes;
  for (int64_t b = 0; b < header.buffers; b++) {
    const PlanBuffer& p = plan.buffer(b);
    const Form& f = forms[b];
    const bool apart = align > 1 && !f.border && p.pixel % CROWDED == 0;
    layouts.emplace_back(held[b], heights[b], widths[b], int(p.pixel), int(f.border), f.planes && f.whole,
                         f.interleaved && f.whole, apart ? 64 : 0);
    wide.push_back(held[b] == images);
    for (int64_t i = 0; i < header.steps; i++)
      if (const PlanStep& s = plan.step(i); s.out == b && Step(s.kind) == Step::load_windows)
        layouts[b] = Layout::windows(held[b], heights[b], widths[b], int(s.kw), int(s.stride), int(s.pad),
                                     int(header.channels) * bytes_of(plan.type()), w);
    // groups of AMX rows run past the last pixel by up to 15 of the largest distance, two pixels; tiles of winograd.h
    // past the border by a row and a pixel
    const int64_t behind = align > 1 ? 32 * layouts[b].pixel : f.border ? layouts[b].row + layouts[b].pixel : 0;
    sizes.push_back(round_up(layouts[b].bytes + behind + SLACK, 64));
  }
  const std::vector<int64_t> offsets = arrange(sizes, used);
  for (int64_t b = 0; b < header.buffers; b++) bytes = std::max(bytes, size_t(offsets[b] + sizes[b]));
  memory = allocate(int64_t(bytes));
  std::memset(memory.get(), 0, bytes);
  for (int64_t b = 0; b < header.buffers; b++) {
    buffers.push_back(memory.get() + offsets[b]);
    if (const int64_t fill = plan.buffer(b).fill; fill >= 0 && layouts[b].border)
      fill_border(buffers[b], layouts[b], plan.data + fill);
  }
  for (int64_t first = 0, end; first < header.steps; first = end) {  // steps [first, end) are one pass
    for (end = first + 1; end < header.steps && passes[end] == passes[first]; end++) {
    }
    for (int n = 0; n < images; n += group[first])
      for (int64_t i = first; i < end; i++) order.push_back({int(i), n});
  }
  tables.resize(header.steps);
  for (int64_t i = 0; i < header.steps; i++) {
    const PlanStep& s = plan.step(i);
    if (Step(s.kind) != Step::conv && Step(s.kind) != Step::linear) continue;
    const bool linear = Step(s.kind) == Step::linear;
    const Packed& w = *reinterpret_cast<const Packed*>(plan.data + s.packed);
    // only `group` images per pass, in buffers that may hold more: same distances, fewer images
    Layout out = linear ? Layout(group[i], 1, 1, w.o, 0) : layouts[s.out];
    out.images = group[i];
    const Window window{int(s.kh), int(s.kw), int(s.stride), int(s.stride), int(s.pad), int(s.pad)};
    tables[i].build(layouts[s.in], window, out, s.in2 >= 0 ? &layouts[s.in2] : nullptr, int(s.stride2), int(s.stride2),
                    linear ? 4 : 1, align, &w, plan.buffer(s.in).fill < 0,
                    s.residual_stride > 1 ? &layouts[s.residual] : nullptr, int(s.residual_stride));
    bytes += (tables[i].outs.size() * 3 + tables[i].residuals.size()) * sizeof(int32_t);
  }
}

std::mutex cache_mutex;
std::list<std::unique_ptr<Workspace>> cache;  // idle ones, most recently used first

std::unique_ptr<Workspace> take(const Plan& plan, int images, int h, int w) {
  const std::tuple<int64_t, int, int, int> key(plan.header().id, images, h, w);
  {
    std::lock_guard<std::mutex> lock(cache_mutex);
    for (auto it = cache.begin(); it != cache.end(); ++it)
      if ((*it)->key == key) {
        auto found = std::move(*it);
        cache.erase(it);
        return found;
      }
  }
  return std::make_unique<Workspace>(plan, images, h, w);
}

void give_back(std::unique_ptr<Workspace> workspace) {
  std::lock_guard<std::mutex> lock(cache_mutex);
  cache.push_front(std::move(workspace));
  size_t total = 0;
  for (auto it = cache.begin(); it != cache.end();) {
    total += (*it)->bytes;
    it = total > CACHED_BYTES ? cache.erase(it) : std::next(it);
  }
}

// A batch's parts, of which each thread takes the next when it is done with one: where a core is slower than another,
// as one that other work shares or a virtual one, its thread has fewer images. The larger ones come first, as many of a
// size as there are threads. -> where each ends
std::vector<int> parts(int n, int threads, int least) {
  if (threads == 1) return {n};
  std::vector<int> ends;
  for (int at = 0; at < n;) {
    const int rest = n - at;
    int images = least;
    while (images < LARGEST_GROUP && 3 * images * threads <= rest) images *= 2;
    images = std::min(images, (rest + threads - 1) / threads);
    for (int i = 0; i < threads && at < n; i++) ends.push_back(at = std::min(n, at + images));
  }
  return ends;
}

struct Part {
  int begin, end;
};

// What a team divides a step into
struct Units {
  int count, size;  // lines of a map, images, rows of a convolution, tiles of winograd.h; the last unit may have fewer
  bool panels;      // or panels of weights
  Part part(int begin, int end, int all) const { return {std::min(all, begin * size), std::min(all, end * size)}; }
};

int tiles_of(const Layout& out, Type type) { return tiles_along(out.h, type) * tiles_along(out.w, type); }

bool by_winograd(const Plan& plan, int64_t i, int images) {
  const PlanStep& s = plan.step(i);
  if (Step(s.kind) != Step::conv || !reinterpret_cast<const Packed*>(plan.data + s.packed)->winograd) return false;
  return s.block[images > 1] == WINOGRAD || isa() == Isa::avx2 || plan.type() == Type::f32;
}

Units units_of(const Plan& plan, const Workspace& ws, int64_t i, int threads) {
  const PlanStep& s = plan.step(i);
  const int g = ws.group[i];
  const Type type = plan.type();
  const auto of = [](int n, int size, bool panels) { return Units{(n + size - 1) / size, size, panels}; };
  switch (Step(s.kind)) {
    case Step::load:
    case Step::load_windows:
    case Step::max_pool:
      return of(ws.layouts[s.out].h, 1, false);
    case Step::average_pool:
      return of(g, 1, false);
    default: {
      const Packed& w = *reinterpret_cast<const Packed*>(plan.data + s.packed);
      if (by_winograd(plan, i, g)) {
        const auto share = [&](int n) { return (n + threads - 1) / threads; };
        const int tiles = g * tiles_of(ws.layouts[s.out], type);
        // each call transforms all it reads: no more calls than threads
        if (tiles < FEW_TILES * threads && w.panels >= threads) return of(w.panels, share(w.panels), true);
        const int most = tiles_at_once(ws.layouts[s.in].c / bytes_of(type), type);
        const int calls = (share(tiles) + most - 1) / most;
        return of(tiles, (share(tiles) + calls - 1) / calls, false);
      }
      // where there are more weights than activations each thread takes its share of the weights; VNNI, slower than
      // they arrive, where they are many times as much: activations would come from the other core's cache
      const int64_t share = isa_of(type) == Isa::vnni ? 8 : 1;
      const int64_t rows = int64_t(ws.tables[i].outs.size());
      if (w.panels >= threads && w.weight_bytes() > share * rows * w.ktotal) return of(w.panels, 1, true);
      return of(int(rows), isa_of(type) == Isa::amx ? 32 : 12, false);  // AMX's rows; a multiple of the others' 4 and 6
    }
  }
}

// Units [begin, end) of one step, for the images [n0, n0 + group) of this workspace.
void run_step(const Plan& plan, const Workspace& ws, int64_t i, int n0, const uint8_t* pixels, int h, int w,
              float* logits, const Units& units, int begin, int end) {
  const PlanStep& s = plan.step(i);
  const int g = ws.group[i], c = int(plan.header().channels);
  const Type type = plan.type();
  const auto at = [&](int64_t b) { return ws.buffers[b] + (ws.wide[b] ? n0 * ws.layouts[b].image : 0); };
  const int64_t of_load = type != Type::int8 ? s.scale : s.out < 0 ? -1 : plan.buffer(s.out).fill;
  const uint8_t* value = of_load < 0 ? nullptr : plan.data + of_load;  // of pixels that stands for 0
  const Layout* to = s.out >= 0 ? &ws.layouts[s.out] : nullptr;
  pixels += int64_t(n0) * h * w * c;
  switch (Step(s.kind)) {
    case Step::load:
      load_images(pixels, c, value, type, at(s.out), *to, 0, g, begin, end);
      break;
    case Step::load_windows:
      load_windows(pixels, h, w, c, value, type, int(s.stride), int(s.pad), at(s.out), *to, 0, g, begin, end);
      break;
    case Step::max_pool:
      max_pool(type, at(s.in), ws.layouts[s.in], at(s.out), *to, 0, g, begin, end);
      break;
    case Step::average_pool:
      if (type == Type::int8)
        average_pool(at(s.in), ws.layouts[s.in], at(s.out), *to, int32_t(s.mult), begin, end);
      else
        average_pool_floats(type, at(s.in), ws.layouts[s.in], at(s.out), *to, begin, end);
      break;
    default: {
      Conv conv;
      conv.w = reinterpret_cast<const Packed*>(plan.data + s.packed);
      ws.tables[i].attach(conv, conv.w->operands);
      conv.in[0].a = at(s.in);
      if (s.in2 >= 0) conv.in[1].a = at(s.in2);
      const int64_t block = s.block[g > 1];
      conv.block = int(std::max<int64_t>(block, 0));
      for (int64_t n = i + 1; n < plan.header().steps && !conv.next; n++)
        if (Step(plan.step(n).kind) == Step::conv || Step(plan.step(n).kind) == Step::linear)
          conv.next = reinterpret_cast<const Packed*>(plan.data + plan.step(n).packed)->panel(0);
      if (Step(s.kind) == Step::linear) {
        conv.kind = Out::f32;
        conv.f32_scale = reinterpret_cast<const float*>(plan.data + s.scale);
        conv.out = reinterpret_cast<uint8_t*>(logits + int64_t(n0) * plan.header().classes);
      } else {
        conv.kind = type == Type::int8 ? Out::u8 : Out::floats;
        conv.out = at(s.out);
        conv.residual = s.residual >= 0 ? at(s.residual) : nullptr;
      }
      const bool winograd = by_winograd(plan, i, g);
      const int all = winograd ? g * tiles_of(*to, type) : conv.m;
      const Part rows = units.panels ? Part{0, all} : units.part(begin, end, all);
      const Part panels = units.panels ? units.part(begin, end, conv.w->panels) : Part{0, conv.w->panels};
      if (winograd) {
        const Layout& in = ws.layouts[s.in];
        const int most = tiles_at_once(in.c / bytes_of(type), type);
        winograd_function(*conv.w)(conv, in, *to, most, rows.begin, rows.end, panels.begin, panels.end);
        break;
      }
      if (s.residual_stride > 1) {  // the thread's own part of it, to where the kernel looks for it
        const int64_t panel = int64_t(conv.w->width) * bytes_of(type), first = panels.begin * panel;
        const int64_t count = std::min(panels.end * panel, int64_t(conv.w->o) * bytes_of(type)) - first;
        for (int m = rows.begin; m < rows.end; m++)
          if (conv.outs[m] >= 0)
            std::memcpy(conv.out + conv.outs[m] + first, conv.residual + ws.tables[i].residuals[m] + first,
                        size_t(count));
        conv.residual = conv.out;
      }
      conv_function(*conv.w)(conv, rows.begin, rows.end, panels.begin, panels.end);
    }
  }
}

}  // namespace

void network(const uint8_t* data, int64_t bytes, const uint8_t* pixels, int n, int h, int w, float* logits,
             int threads, int64_t* nanoseconds) {
  const Plan plan{data};
  if (bytes < int64_t(sizeof(PlanHeader)) || plan.header().stamp != PlanHeader::STAMP || plan.header().bytes != bytes)
    throw std::runtime_error("network: plan is not what csrc.build_plan returned");
  if (plan.header().isa != int64_t(isa_of(plan.type())))
    throw std::runtime_error("network: the plan was packed for another instruction set than this process uses");
  const PlanHeader& header = plan.header();
  // each thread its own images: nobody waits, and no cache is shared. AMX is so fast that few images wait for weights
  const bool amx = isa_of(plan.type()) == Isa::amx;
  if (threads > 1 && (n >= FEWEST_APART * threads || (n % threads == 0 && !amx))) {
    std::atomic<size_t> next{0};
    parallel(threads, [&](int thread, int count) {
      const std::vector<int> ends = parts(n, count, amx ? FEWEST_APART : 2);
      for (size_t i; (i = next.fetch_add(1)) < ends.size();) {
        const int begin = i ? ends[i - 1] : 0;
        network(data, bytes, pixels + int64_t(begin) * h * w * header.channels, ends[i] - begin, h, w,
                logits + int64_t(begin) * header.classes, 1, thread == 0 ? nanoseconds : nullptr);
      }
    });
    return;
  }
  for (int done = 0; done < n;) {
    int images = LARGEST_GROUP;  // halved until there are as many, so that all but a few go in large groups
    while (images > n - done && images > FEWEST_TOGETHER) images /= 2;
    images = std::min(images, n - done);
    auto workspace = take(plan, images, h, w);
    const Workspace& ws = *workspace;
    const uint8_t* from = pixels + int64_t(done) * h * w * header.channels;
    float* to = logits + int64_t(done) * header.classes;
    Barrier barrier(threads);
    Shares shares(threads);
    Units units;
    const auto prepare = [&](size_t turn) {
      if (turn == ws.order.size()) return;
      units = units_of(plan, ws, ws.order[turn].step, threads);
      shares.begin(units.count);
    };
    const auto run_steps = [&](int thread, int count) {
      for (size_t turn = 0; turn < ws.order.size(); turn++) {
        const auto [i, n0] = ws.order[turn];
        const auto begin = std::chrono::steady_clock::now();
        if (count > 1) {
          for (int first, last; shares.take(thread, first, last);)
            run_step(plan, ws, i, n0, from, h, w, to, units, first, last);
          if (!barrier.wait([&] { prepare(turn + 1); })) return;
        } else {
          const Units all = units_of(plan, ws, i, 1);
          run_step(plan, ws, i, n0, from, h, w, to, all, 0, all.count);
        }
        if (nanoseconds && thread == 0)
          nanoseconds[i] +=
              std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - begin).count();
      }
    };
    prepare(0);
    parallel(threads, [&](int thread, int count) {
      try {
        run_steps(thread, count);
      } catch (...) {  // such as a thread whose scratch finds no memory
        barrier.abandon();
        throw;
      }
    });
    give_back(std::move(workspace));
    done += images;
  }
}

}  // namespace r50
