// The inputs of a convolution as its kernel wants them: chunks of 16 bytes at multiples of 16, each of one tap.
//
// What comes otherwise (other numbers of channels, odd addresses, padding that is not zero) is written out first:
// padding in place, the channels of each group filled up with zeros. Where a uint8 pixel has less than a chunk, as
// images of three colours do, the pixels that a stride passes over together become one cell: a convolution of 7 x 7
// taps with stride 2 over three channels is one of 4 x 4 taps with stride 1 over twelve, whose windows begin at whole
// cells. Weights are rearranged likewise, with zeros for taps that are not there; the sums are the same.
#pragma once
#include "cuda/dev.cuh"
#include "cuda/kernels.h"

namespace r50::gpu {

constexpr int CHUNK = 16;  // bytes

// Images (N, h, w, groups * channels), or weights (O, h, w, channels), and their cells (N, cells_h, cells_w, groups *
// cell).
struct Cells {
  const void* x;
  void* out;
  const uint8_t* around;  // (groups * channels), the value outside of an image; null: 0
  int64_t chunks;         // in all of `out`
  int h, w, groups, channels, ph, pw;
  int fy, fx, cells_h, cells_w, cell;  // pixels in a cell; cell is its channels in one group, zeros at its end
};

template <class Element>
__global__ void __launch_bounds__(256) fill_cells(const __grid_constant__ Cells p) {
  constexpr int SIZE = sizeof(Element), LANES = CHUNK / SIZE;
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.chunks) return;
  const int parts = p.cell / LANES, first = int(i % parts) * LANES;
  const int group = int(i / parts % p.groups);
  const int64_t place = i / parts / p.groups;
  const int cx = int(place % p.cells_w), cy = int(place / p.cells_w % p.cells_h);
  const int64_t image = place / p.cells_w / p.cells_h;
  const int x0 = cx * p.fx - p.pw;
  int channel = first % p.channels, x = x0 + first / p.channels % p.fx;
  int y = cy * p.fy - p.ph + first / p.channels / p.fx;
  uint32_t word[4];  // an array of elements with a running index would lie in slow memory
#pragma unroll
  for (int n = 0; n < 4; n++) {
    word[n] = 0;
#pragma unroll 1
    for (int j = 0; j < 4; j += SIZE) {
      Element value = 0;
      const int64_t from = int64_t(group) * p.channels + channel;
      if (y < (cy + 1) * p.fy - p.ph) {  // else the zeros at the end
        if (unsigned(y) < unsigned(p.h) && unsigned(x) < unsigned(p.w))
          value = static_cast<const Element*>(p.x)[((image * p.h + y) * p.w + x) * p.groups * p.channels + from];
        else if (SIZE == 1 && p.around)
          value = Element(p.around[from]);
      }
      word[n] |= uint32_t(value) << 8 * j;
      if (++channel == p.channels) {
        channel = 0;
        if (++x == x0 + p.fx) x = x0, y++;
      }
    }
  }
  static_cast<uint4*>(p.out)[i] = make_uint4(word[0], word[1], word[2], word[3]);
}

// Whether the kernel can copy an input as it is.
inline bool fits(const Input& in, int size) {
  return in.group_channels * size % CHUNK == 0 && in.c * size % CHUNK == 0 && aligned(in.x) && aligned(in.weight);
}

// Scratch that is given out piece by piece, or, without memory, counted.
struct Pieces {
  unsigned char* memory;
  size_t bytes = 0;
  void* take(int64_t size) {
    void* const piece = memory ? memory + bytes : nullptr;
    bytes += size_t(size);
    return piece;
  }
};

template <class Element>
void* to_cells(Cells p, int64_t images, Pieces& scratch, Stream stream) {
  p.chunks = images * p.cells_h * p.cells_w * p.groups * p.cell * int(sizeof(Element)) / CHUNK;
  p.out = scratch.take(p.chunks * CHUNK);
  if (p.out) launch(fill_cells<Element>, dim3(unsigned((p.chunks + 255) / 256)), 256, 0, stream, p);
  return p.out;
}

// -> the same convolution, of inputs that fit; what did not is rearranged into the scratch, if that has memory.
// `packed` weights are not touched: their inputs' channels are multiples of a chunk, and no padding lies around.
template <class Element>
Conv in_cells(Conv p, bool packed, Pieces& scratch, Stream stream) {
  constexpr int SIZE = sizeof(Element), LANES = CHUNK / SIZE;
  for (int i = 0; i < 2; i++) {
    Input& in = p.in[i];
    const uint8_t* const around = i == 0 ? p.pad_value : nullptr;
    if (fits(in, SIZE) && !around) continue;
    // not floats, of which some times the zeros of taps that are not there would be NaN
    const bool joined = SIZE == 1 && in.group_channels < CHUNK;
    const int fy = joined ? in.sh : 1, fx = joined ? in.sw : 1;
    Input to = in;
    to.kh = (in.kh + fy - 1) / fy, to.kw = (in.kw + fx - 1) / fx, to.sh = in.sh / fy, to.sw = in.sw / fx;
    to.h = (p.oh - 1) * to.sh + to.kh, to.w = (p.ow - 1) * to.sw + to.kw, to.ph = to.pw = 0;
    to.group_channels = (fy * fx * in.group_channels + LANES - 1) / LANES * LANES;
    to.c = p.groups * to.group_channels;
    to.x = to_cells<Element>({in.x, nullptr, around, 0, in.h, in.w, p.groups, in.group_channels, in.ph, in.pw, fy, fx,
                              to.h, to.w, to.group_channels}, p.m / (p.oh * p.ow), scratch, stream);
    if (!packed)
      to.weight = to_cells<Element>({in.weight, nullptr, nullptr, 0, in.kh, in.kw, 1, in.group_channels, 0, 0, fy, fx,
                                     to.kh, to.kw, to.group_channels}, p.o, scratch, stream);
    in = to;
  }
  p.pad_value = nullptr;
  return p;
}

}  // namespace r50::gpu
