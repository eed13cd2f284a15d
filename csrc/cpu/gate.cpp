// Attention on maps of uint8, NHWC: a gate per image and channel from the means of its map, and maps times gates added
// up. Sums and the mixing are exact in integers; the layers between them are float64, in the same order on every
// instruction set.
#include <algorithm>
#include <cmath>
#include <vector>

#include "pool.h"
#include "pooling.h"

namespace r50 {
namespace {

constexpr int GATE_BITS = 12;
constexpr int64_t BLOCK = 256;  // channels that are added up together

// Channels [first, first + count) of an image, over its pixels
WIDEST void add_up(const uint8_t* x, int64_t pixels, int64_t c, int64_t first, int64_t count, int64_t* sums) {
  constexpr int64_t FIT = 65535 / 255;  // pixels whose sum stays in 16 bits
  uint16_t part[BLOCK] = {};
  std::fill_n(sums + first, count, 0);
  for (int64_t i = 0; i < pixels; i++) {
    const uint8_t* from = x + i * c + first;
    for (int64_t k = 0; k < count; k++) part[k] += from[k];
    if (i % FIT == FIT - 1 || i == pixels - 1)
      for (int64_t k = 0; k < count; k++) sums[first + k] += part[k], part[k] = 0;
  }
}

// A row of `weight` (n) by x; eight sums, which any compiler can keep apart without changing a bit
double dot(const float* weight, const double* x, int64_t n) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int k = 0; k < 8; k++) sums[k] += weight[i + k] * x[i + k];
  for (; i < n; i++) sums[0] += weight[i] * x[i];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// What one image's two maps are multiplied with, in 2^-12, and what their zeros make of that: (c) each
struct Factors {
  std::vector<int32_t> first, second, addend;
};

Factors factors(const GateInt8& a, const int64_t* sums) {
  const bool split = !a.residual;
  const double pixels = double(a.pixels);
  std::vector<double> pooled(a.c), hidden(a.inner), told(split ? 2 * a.c : a.c);
  const auto mean = [&](int64_t k) { return (double(sums[k]) / pixels - a.zeros[0]) * a.scales[0]; };
  for (int64_t k = 0; k < a.c; k++) pooled[k] = split ? mean(k) + mean(a.c + k) : mean(k);
  for (int64_t k = 0; k < a.inner; k++)
    hidden[k] = std::max(dot(a.weight1 + k * a.c, pooled.data(), a.c) + a.bias1[k], 0.0);
  for (int64_t k = 0; k < int64_t(told.size()); k++)
    told[k] = dot(a.weight2 + k * a.inner, hidden.data(), a.inner) + a.bias2[k];
  const auto whole = [&](double gate, int map) {
    return int32_t(std::nearbyint(gate * (a.scales[map] / a.scales[2] * (1 << GATE_BITS))));
  };
  Factors f{std::vector<int32_t>(a.c), std::vector<int32_t>(a.c), std::vector<int32_t>(a.c)};
  for (int64_t k = 0; k < a.c; k++) {
    f.first[k] = whole(sigmoid(split ? told[k] - told[a.c + k] : told[k]), 0);
    f.second[k] = whole(split ? sigmoid(told[a.c + k] - told[k]) : 1.0, 1);
    f.addend[k] = -(a.zeros[0] * f.first[k] + a.zeros[1] * f.second[k]);
  }
  return f;
}

WIDEST void mix(const uint8_t* first, const uint8_t* second, const Factors& f, uint8_t* out, int64_t c) {
  const int32_t *of_first = f.first.data(), *of_second = f.second.data(), *addend = f.addend.data();
  for (int64_t k = 0; k < c; k++) {
    const int32_t acc = first[k] * of_first[k] + second[k] * of_second[k] + addend[k];
    const int32_t y = (acc + (1 << (GATE_BITS - 1)) - 1 + (acc >> GATE_BITS & 1)) >> GATE_BITS;  // half to even
    out[k] = uint8_t(std::clamp(y, 0, 255));
  }
}

}  // namespace

void gate_int8(const GateInt8& a, uint8_t* out, int threads) {
  const int64_t wide = a.residual ? a.c : 2 * a.c, blocks = (wide + BLOCK - 1) / BLOCK, image = a.pixels * wide;
  std::vector<int64_t> sums(a.n * wide);
  std::vector<Factors> found(a.n);
  const auto share = [](int64_t units, int thread, int count, auto&& work) {
    for (int64_t i = units * thread / count; i < units * (thread + 1) / count; i++) work(i);
  };
  parallel(threads, [&](int thread, int count) {
    share(a.n * blocks, thread, count, [&](int64_t i) {
      const int64_t n = i / blocks, first = i % blocks * BLOCK;
      add_up(a.x + n * image, a.pixels, wide, first, std::min(BLOCK, wide - first), &sums[n * wide]);
    });
  });
  parallel(std::min<int64_t>(threads, a.n), [&](int thread, int count) {
    share(a.n, thread, count, [&](int64_t n) { found[n] = factors(a, &sums[n * wide]); });
  });
  parallel(threads, [&](int thread, int count) {
    share(a.n * a.pixels, thread, count, [&](int64_t i) {
      const uint8_t* x = a.x + i * wide;
      mix(x, a.residual ? a.residual + i * a.c : x + a.c, found[i / a.pixels], out + i * a.c, a.c);
    });
  });
}

}  // namespace r50
