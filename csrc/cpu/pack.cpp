// Weights into the order in which a kernel reads them, with the proof of how each panel may round.
//
// A panel holds `width` output channels; for each group of `group` consecutive k the width * group bytes lie together:
//   plain  width 16, group 1      one scalar column after the other
//   avx2   width 16, group 4      two registers per group; k padded to two groups, see conv_avx2.cpp
//   vnni   width 64, group 4      vpdpbusd; four registers per group
//   amx    width 64, group 4      first the left 32 columns for all k, then the right ones; of each the two B tiles of
//                                 every 64 k, 1 KiB apiece: what a half unit reads is one run. k padded to whole tiles
// Transformed weights (winograd.h) are words: for each panel, point and pair of input channels the panel's pairs; in
// float32 for each panel, point and input channel the panel's, and these alone.
#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "conv.h"

namespace r50 {
namespace {

struct Order {
  int width, group, multiple;  // multiple: k of a tap is padded to this
};

Order order(Isa isa) {
  switch (isa) {
    case Isa::plain: return {16, 1, 1};
    case Isa::avx2: return {16, 4, 8};
    case Isa::vnni: return {64, 4, 4};
    default: return {64, 4, 64};
  }
}

}  // namespace

int tap_multiple(Isa isa, Type type) { return type == Type::f32 ? 4 : order(isa).multiple; }

int panel_position(Isa isa, int c) {
  switch (isa) {
    case Isa::plain: return c;
    case Isa::avx2: return (c & 1) * 8 + c / 2;  // two registers of 8, the even and the odd 16-bit halves of one
    // four registers of 16, c = 16 * quarter + 8 * h + 2 * i + t: register 2h + t, element 4 * quarter + i. Registers
    // 2h and 2h + 1 are the even and odd 16-bit halves of one, and packus takes h = 0 and 1 per 128-bit lane.
    default: return ((c / 8 & 1) * 2 + (c & 1)) * 16 + c / 16 * 4 + (c / 2 & 3);
  }
}

// Offset of (k, position) in a panel.
static int64_t panel_offset(Isa isa, int ktotal, int k, int at) {
  const Order o = order(isa);
  if (isa != Isa::amx) return int64_t(k / o.group) * o.group * o.width + at * o.group + k % o.group;
  constexpr int HALF = 32, TILE = 16, STEP = 64;
  return int64_t(at / HALF) * HALF * ktotal + (k / STEP * 2 + at % HALF / TILE) * TILE * STEP +
         k % STEP / o.group * o.group * TILE + at % TILE * o.group + k % o.group;
}

static Packed header(Isa isa, const PackedShape& s, Type type) {
  const Order order_ = order(isa);
  Packed h{};
  h.stamp = Packed::STAMP;
  h.isa = int(isa);
  h.type = type;
  h.o = s.o;
  h.width = order_.width;
  h.panels = (s.o + order_.width - 1) / order_.width;
  h.operands = s.operands;
  for (int i = 0; i < s.operands; i++) {
    h.taps[i] = s.taps[i];
    h.k[i] = s.k[i] * bytes_of(type);
    h.kpad[i] = int(round_up(h.k[i], tap_multiple(isa, type)));
    h.ktotal += h.taps[i] * h.kpad[i];
  }
  h.vectors = round_up(sizeof(Packed), 64);
  h.weights = round_up(h.vectors + int64_t(h.panels) * 5 * h.width * 4, 64);
  h.fixes = round_up(h.weights + int64_t(h.panels) * h.ktotal * h.width, 64);
  h.bytes = h.fixes;
  return h;
}

// conv_avx2.cpp adds the low 7 bits of two groups of four k in 16 bits: of the four weights that meet in a lane the
// positive ones may sum to 258 and the negative ones to -258. Takes the excess out of `panel` (ktotal x 16) and puts it
// into groups of their own, of at most 128 per pair so that they meet all 8 bits; -> their k. An excess is at most 4 *
// 128 - 258, two pairs of 127.
static std::vector<int32_t> move_excess(int8_t* panel, int ktotal, std::vector<int8_t>& fixes) {
  constexpr int LIMIT = 258, PAIR = 128, WIDTH = 16;
  std::vector<int32_t> where;
  for (int k = 0; k < ktotal; k += 8) {
    int8_t moved[2][4 * WIDTH] = {};
    bool any[2] = {false, false};
    for (int lane = 0; lane < 2 * WIDTH; lane++)
      for (int sign : {1, -1}) {
        int8_t* pairs[2] = {panel + k * WIDTH + 2 * lane, panel + (k + 4) * WIDTH + 2 * lane};
        int sum = 0;
        for (auto* pair : pairs)
          for (int i = 0; i < 2; i++) sum += std::max(0, sign * pair[i]);
        int excess = sum - LIMIT;
        for (int g = 0; g < 2; g++)
          for (int i = 0, left = PAIR; i < 2 && excess > 0; i++) {
            const int take = std::min({excess, left, std::max(0, sign * pairs[g][i])});
            pairs[g][i] = int8_t(pairs[g][i] - sign * take);
            moved[g][2 * lane + i] = int8_t(sign * take);
            any[g] |= take > 0;
            excess -= take;
            left -= take;
          }
      }
    for (int g = 0; g < 2; g++)
      if (any[g]) {
        where.push_back(k + 4 * g);
        fixes.insert(fixes.end(), moved[g], moved[g] + 4 * WIDTH);
      }
  }
  return where;
}

// weight (o, 3, 3, c) -> G w G^T, whose numbers are Words; at(n, point, i) says which of `to` is the one of output
// channel n and input channel i
template <class Word, class Sum, int N, int K, class Weight, class At>
static void transform_weights(const Sum (&G)[N][K], int o, int c, const Weight* weight, uint8_t* to, At&& at) {
  for (int n = 0; n < o; n++)
    for (int i = 0; i < c; i++)
      for (int a = 0; a < N; a++) {
        Sum column[K] = {};  // of G w
        for (int y = 0; y < K; y++)
          for (int x = 0; x < K; x++) column[x] += G[a][y] * weight[((int64_t(n) * K + y) * K + x) * c + i];
        for (int b = 0; b < N; b++) {
          const auto word = Word(G[b][0] * column[0] + G[b][1] * column[1] + G[b][2] * column[2]);
          std::memcpy(to + at(n, a * N + b, i) * int64_t(sizeof word), &word, sizeof word);
        }
      }
}

// G is 24 times that of F(4, 3), its last row 12 times
static void transform_int8(Isa isa, int o, int c, int width, const int8_t* weight, uint8_t* to) {
  constexpr int G[6][3] = {{6, 0, 0}, {-4, -4, -4}, {-4, 4, -4}, {1, 2, 4}, {1, -2, 4}, {0, 0, 12}};
  const int pairs = (c + 1) / 2;
  transform_weights<int16_t>(G, o, c, weight, to, [&](int n, int point, int i) {
    const int64_t pair = (int64_t(n / width) * 36 + point) * pairs + i / 2;
    return (pair * width + panel_position(isa, n % width)) * 2 + i % 2;
  });
}

static void transform_floats(int o, int c, int width, const float* weight, uint8_t* to) {  // F(2, 3)
  constexpr double G[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
  transform_weights<float>(G, o, c, weight, to, [&](int n, int point, int i) {
    return ((int64_t(n / width) * 16 + point) * c + i) * width + n % width;
  });
}

void pack_int8(Isa isa, const PackedShape& s, const int8_t* const weight[2], const int32_t* mult, const int32_t* bias,
               const int32_t* gain, const std::function<uint8_t*(int64_t)>& allocate) {
  Packed h = header(isa, s, Type::int8);
  const int width = h.width, c = s.taps[0] * s.k[0] / 9;  // of 3x3 weights
  bool transform = s.winograd && (isa == Isa::avx2 || isa == Isa::vnni) && s.operands == 1 && !gain;
  std::vector<uint8_t> blob(h.fixes);
  uint8_t* bytes = blob.data();
  for (int p = 0; p < h.panels; p++) {
    auto* start = reinterpret_cast<int32_t*>(bytes + h.vectors) + int64_t(p) * 5 * width;
    auto* scale = reinterpret_cast<float*>(start + width);
    int32_t *gains = start + 3 * width, *mults = start + 4 * width;
    auto* panel = reinterpret_cast<int8_t*>(bytes + h.weights + int64_t(p) * h.ktotal * width);
    for (int c = 0; c < width && p * width + c < s.o; c++) {
      const int n = p * width + c, at = panel_position(isa, c);
      int64_t low = bias[n], high = bias[n];
      int first = 0;  // k of the tap
      for (int i = 0; i < s.operands; i++) {
        const int8_t* w = weight[i] + int64_t(n) * s.taps[i] * s.k[i];
        for (int t = 0; t < s.taps[i]; t++, first += h.kpad[i])
          for (int k = 0; k < s.k[i]; k++) {
            const int8_t value = *w++;
            panel[panel_offset(isa, h.ktotal, first + k, at)] = value;
            (value > 0 ? high : low) += 255 * value;
          }
      }
      transform = transform && high - bias[n] < 1 << 25 && bias[n] - low <= 1 << 25;  // 26 bits
      const int32_t j = mult[n], g = gain ? gain[n] : 0;
      (g > 0 ? high : low) += int64_t(255) * g;
      if (low < std::numeric_limits<int32_t>::min() || high > std::numeric_limits<int32_t>::max())
        throw std::runtime_error("pack_int8: the accumulator of output channel " + std::to_string(n) + " could reach " +
                                 std::to_string(high > -low ? high : low) + ", which is outside int32");
      if (j < 0 || j > (1 << MULT_BITS) || g < -32768 || g > 32767)
        throw std::runtime_error("pack_int8: output channel " + std::to_string(n) + " has mult " + std::to_string(j) +
                                 " and gain " + std::to_string(g) +
                                 "; expected 0 <= mult <= 2^22 and -2^15 <= gain < 2^15");
      const int64_t reach = high > -low ? high : -low;
      const bool small = reach * j < (int64_t(32767) << MULT_BITS);  // (2^31 * 2^22 fits)
      const Rounding needed = !small || reach >= 1 << 24 ? DOUBLE : reach >= 1 << 22 ? SINGLE : BIASED;
      h.rounding = needed > h.rounding ? needed : h.rounding;
      start[at] = bias[n];
      scale[at] = float(j) / float(1 << MULT_BITS);
      gains[at] = isa == Isa::plain ? g : c & 1 ? int32_t(uint32_t(g) << 16) : g & 0xffff;
      mults[at] = j;
    }
  }
  for (int p = 0; p < h.panels; p++) {
    auto* start = reinterpret_cast<int32_t*>(bytes + h.vectors) + int64_t(p) * 5 * width;
    for (int i = 0; i < width; i++) {
      const int32_t j = start[4 * width + i];
      // BIASED: the accumulator is read as 1.5 * 2^23 + acc; times j / 2^22 that is 3j too much
      reinterpret_cast<float*>(start)[2 * width + i] = MAGIC - (h.rounding == BIASED ? 3.0f * float(j) : 0.0f);
      if (h.rounding == BIASED) start[i] += MAGIC_BITS;
    }
  }
  std::vector<int32_t> begins{0}, where;
  std::vector<int8_t> fixes;
  if (isa == Isa::avx2) {
    for (int p = 0; p < h.panels; p++) {
      const auto more =
          move_excess(reinterpret_cast<int8_t*>(bytes + h.weights) + int64_t(p) * h.ktotal * width, h.ktotal, fixes);
      where.insert(where.end(), more.begin(), more.end());
      begins.push_back(int32_t(where.size()));
    }
    h.bytes = round_up(h.fixes + (begins.size() + where.size()) * 4 + fixes.size(), 64);
  }
  if (transform) {
    h.winograd = round_up(h.bytes, 64);
    h.bytes = h.winograd + int64_t(h.panels) * width * 36 * ((c + 1) / 2) * 4;
  }
  std::memcpy(bytes, &h, sizeof h);
  uint8_t* out = allocate(h.bytes);
  std::memset(out + h.fixes, 0, h.bytes - h.fixes);
  if (transform) transform_int8(isa, s.o, c, width, weight[0], out + h.winograd);
  std::memcpy(out, bytes, h.fixes);
  if (isa == Isa::avx2) {
    out = std::copy_n(reinterpret_cast<const uint8_t*>(begins.data()), begins.size() * 4, out + h.fixes);
    out = std::copy_n(reinterpret_cast<const uint8_t*>(where.data()), where.size() * 4, out);
    std::copy_n(reinterpret_cast<const uint8_t*>(fixes.data()), fixes.size(), out);
  }
}

// The bytes of a bfloat16 or a float32 lie where two or four int8 weights would.
void pack_float(Type type, const PackedShape& s, const void* const weight[2], const float* bias,
                const std::function<uint8_t*(int64_t)>& allocate) {
  const Isa isa = isa_of(type);
  const int element = bytes_of(type);
  const int c = s.taps[0] * s.k[0] / 9;  // of 3x3 weights
  Packed h = header(isa, s, type);
  if (s.winograd) {
    h.winograd = h.weights;
    h.bytes = h.fixes = h.winograd + int64_t(h.panels) * h.width * 16 * c * element;
  }
  uint8_t* bytes = allocate(h.bytes);
  std::memset(bytes, 0, h.bytes);
  std::memcpy(bytes, &h, sizeof h);
  if (s.winograd) transform_floats(s.o, c, h.width, static_cast<const float*>(weight[0]), bytes + h.winograd);
  for (int n = 0; n < s.o; n++) {
    const int p = n / h.width, at = n % h.width;
    std::memcpy(bytes + h.vectors + (int64_t(p) * 5 * h.width + at) * 4, bias + n, 4);
    if (s.winograd) continue;
    uint8_t* panel = bytes + h.weights + int64_t(p) * h.ktotal * h.width;
    int first = 0;  // byte of k of the tap
    for (int i = 0; i < s.operands; i++) {
      const auto* w = static_cast<const uint8_t*>(weight[i]) + int64_t(n) * s.taps[i] * s.k[i] * element;
      for (int t = 0; t < s.taps[i]; t++, first += h.kpad[i])
        for (int k = 0; k < s.k[i] * element; k += element, w += element)
          std::memcpy(panel + panel_offset(isa, h.ktotal, first + k, at), w, element);
    }
  }
}

}  // namespace r50
