// fuzz SEED COUNT FILE...: mutated files through everything that reads one. Prints what became of them.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <thread>
#include <vector>

#include "crop_resize.h"
#include "jpeg.h"

int main(int argc, char** argv) {
  std::mt19937_64 random(std::atoi(argv[1]));
  const auto below = [&](int64_t n) { return n > 0 ? int64_t(random() % uint64_t(n)) : 0; };
  std::vector<std::vector<uint8_t>> files;
  for (int i = 3; i < argc; i++) {
    std::ifstream f(argv[i], std::ios::binary);
    files.emplace_back(std::istreambuf_iterator<char>(f), std::istreambuf_iterator<char>());
  }
  long sizes = 0, decoded = 0, restarted = 0;
  for (long i = 0; i < std::atol(argv[2]); i++) {
    std::vector<uint8_t> f = files[below(files.size())];
    for (int64_t k = below(6); k >= 0; k--) {
      const int64_t head = below(2) ? f.size() : std::min<int64_t>(f.size(), 700), at = below(head);
      switch (below(7)) {
        case 0: f[at] = uint8_t(below(256)); break;
        case 1: f[at] ^= uint8_t(1 << below(8)); break;
        case 2: f.erase(f.begin() + at, f.begin() + at + below(std::min<int64_t>(f.size() - at, 40))); break;
        case 3: f.insert(f.begin() + at, below(30), uint8_t(below(256))); break;
        case 4: f[at] = 0xff; if (at + 1 < int64_t(f.size())) f[at + 1] = uint8_t(0xc0 + below(64)); break;
        case 5: f.resize(below(4) ? f.size() : at + 1); break;
        case 6: std::copy_n(f.begin() + below(f.size() - at), at ? below(at) : 0, f.begin()); break;
      }
      if (f.empty()) f.push_back(0xff);
    }
    std::vector<uint8_t> exact(f);  // its end is the allocation's
    exact.shrink_to_fit();
    const r50::JpegSize size = r50::jpeg_size(exact.data(), exact.size());
    sizes += size.height > 0;
    const bool bearable = size.height * size.width <= 4000000;
    const int64_t h = std::clamp<int64_t>(size.height, 8, 400), w = std::clamp<int64_t>(size.width, 8, 400);
    const bool whole = !below(4);
    const int64_t bh = whole ? h : 1 + below(h), bw = whole ? w : 1 + below(w), gap = below(3);
    const int64_t box[4] = {below(h - bh + 1), below(w - bw + 1), bh, bw}, enough[2] = {gap * 16, gap * 16};
    const auto decode = [&] {
      r50::JpegPixels p;
      if (!bearable || !r50::jpeg_decode(exact.data(), exact.size(), box, enough, p)) return;
      decoded++;
      std::vector<uint8_t> out(16 * 16 * 3);
      const auto axis = [&](int d, int64_t first, int64_t most) {
        const double start = double(box[d]) / p.shrink - double(first), length = double(box[2 + d]) / p.shrink;
        return r50::Axis{start, length, int64_t(start), std::min(int64_t(std::ceil(start + length)), most), 16, 0, 16,
                         false};
      };
      r50::crop_resize(p.rows, p.width * 3, p.end, axis(0, p.top, p.height), axis(1, p.left, p.width),
                       r50::Kernel::bicubic, out.data());
    };
    if (i % 4)
      decode();
    else  // whose buffers are not those of larger images before
      std::thread(decode).join();
    const int64_t rows = 1 + below(20), columns = 1 + below(40), top = below(rows), left = below(columns);
    const std::vector<uint8_t> pixels(rows * columns * 3, 255);  // packed ones end where the allocation does
    const int64_t high = 1 + below(24), wide = 1 + below(70);
    std::vector<uint8_t> made(high * wide * 3);
    r50::crop_resize(pixels.data(), columns * 3, pixels.data() + pixels.size(),
                     {double(top), double(rows - top), top, rows, high, 0, high, false},
                     {double(left), double(columns - left), left, columns, wide, 0, wide, i % 2 == 0},
                     i % 3 ? r50::Kernel::bilinear : r50::Kernel::bicubic, made.data());
    for (uint8_t value : made)
      if (value != 255) return 1;
    if (bearable && i % 8 == 0) restarted += !r50::jpeg_restart(exact.data(), exact.size(), 16).empty();
  }
  std::printf("%ld %ld %ld\n", sizes, decoded, restarted);
}
