// A convolution as the kernels of a network see it: a matrix product whose left rows are addressed through tables.
//
// Output pixel m reads, for each operand and each tap, `k` contiguous bytes at a + rows[m] + taps[t]; its `o` results
// go to out + outs[m]. Layout, stride, padding and batch order live in the tables alone, so one kernel per instruction
// set does every layer. The right side is a blob written once by pack_int8: panels of `width` output channels, K
// innermost in groups as the instruction wants them, channels permuted so that the epilogue needs no cross-lane
// shuffle, and the epilogue's vectors beside them.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#include "kernels.h"

namespace r50 {

constexpr int MULT_BITS = 22;             // y = acc * j / 2^22
constexpr int32_t MAGIC_BITS = 0x4B400000;  // the float 1.5 * 2^23; adding an int to these bits adds it to the float
constexpr float MAGIC = 12582912.0f;      // the same as a number

enum Rounding : int32_t { BIASED = 0, SINGLE = 1, DOUBLE = 2 };  // the three rows of csrc/README.md's table
enum class Out { u8, s32, f32, floats };  // floats: of the activations' type, behind a ReLU
enum class Type : int32_t { int8, bf16, f32 };  // of weights; activations are uint8, bfloat16 or float32
inline int bytes_of(Type type) { return 1 << int(type); }
// Whose kernel multiplies this: AMX has no tiles of float32.
inline Isa isa_of(Type type) { return type == Type::f32 ? std::min(isa(), Isa::vnni) : isa(); }

struct Packed {  // header of the blob; all offsets in bytes from its start
  static constexpr int32_t STAMP = 0x35305204;
  int32_t stamp, isa, o, width, panels, operands;
  int32_t taps[2], k[2], kpad[2];  // per operand; k bytes of activations per tap, padded with zero weights to kpad
  int32_t ktotal;                  // sum of taps * kpad
  Rounding rounding;
  Type type;
  int64_t weights, vectors, fixes, winograd, bytes;  // winograd: 0 where the blob has no transformed weights

  int64_t weight_bytes() const { return int64_t(panels) * ktotal * width; }
  const uint8_t* at(int64_t offset) const { return reinterpret_cast<const uint8_t*>(this) + offset; }
  const int8_t* panel(int p) const {
    return reinterpret_cast<const int8_t*>(at(weights + int64_t(p) * ktotal * width));
  }
  // per panel, `width` of each, in the panel's own order of channels: start of the accumulator, and for int8 j / 2^22,
  // addend, gain (but for plain already in the half of the lane where a product of pairs meets its byte), j
  const int32_t* start(int p) const { return reinterpret_cast<const int32_t*>(at(vectors)) + int64_t(p) * 5 * width; }
  const float* scale(int p) const { return reinterpret_cast<const float*>(start(p) + width); }
  const float* addend(int p) const { return reinterpret_cast<const float*>(start(p) + 2 * width); }
  const int32_t* gain(int p) const { return start(p) + 3 * width; }
  const int32_t* mult(int p) const { return start(p) + 4 * width; }
  // avx2 only (conv_avx2.cpp): panel p's fixes are fix_start()[p] ... fix_start()[p + 1]; each is 4 k from fix_k()[f]
  // on by 16 channels
  const int32_t* fix_start() const { return reinterpret_cast<const int32_t*>(at(fixes)); }
  const int32_t* fix_k() const { return fix_start() + panels + 1; }
  const int8_t* fix(int f) const {
    return reinterpret_cast<const int8_t*>(fix_k() + fix_start()[panels]) + 64 * int64_t(f);
  }
};

struct Slice {  // k contiguous bytes of every row at this offset, which meet the weights from `at` on of a panel's k
  int32_t operand, offset, k, at;
};
struct Segment {  // rows up to `end`, which read slices [first, last): others would read zeros around the image
  int32_t end, first, last;
};

struct Operand {
  const uint8_t* a = nullptr;
  const int32_t* rows = nullptr;  // one per output row
  const int32_t* taps = nullptr;  // ntaps of them, each of k contiguous bytes; may be split finer than the blob's; for
                                  // AMX one per tile of 64 bytes
  int ntaps = 0, k = 0;
  int lda = 0;  // AMX only: the distance between the rows of one group of 16
};

struct Conv {
  const Packed* w = nullptr;
  Operand in[2];
  uint8_t* out = nullptr;
  const uint8_t* residual = nullptr;  // at the same offsets as the output, and may be the output
  const int32_t* outs = nullptr;      // byte offset per row, or -1 for a row that is computed and dropped
  const Segment* segments = nullptr;  // AVX2 and VNNI: what of a row is multiplied; the last ends at m
  const Slice* slices = nullptr;
  int m = 0;
  Out kind = Out::u8;
  const float* f32_scale = nullptr;  // (o), for Out::f32 of int8
  int block = 0;                     // rows per pass over the panels, at most 1: the kernel's own choice; for AMX odd
                                     // if the lines that results will fill are to be fetched ahead
  const int8_t* next = nullptr;      // what will be read after the last panel, for prefetching
};

// Position of channel `c` of a panel of `width` channels inside the panel, for the blob of this instruction set.
int panel_position(Isa isa, int c);

// k of a tap is padded to a multiple of this in the blob for this instruction set.
int tap_multiple(Isa isa, Type type);

// Rows come in groups of so many (layout.h: Tables::build).
inline int alignment(Isa isa) { return isa == Isa::amx ? 16 : 1; }

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows [m0, m1) by panels [p0, p1). AMX: m0 and m1 are multiples of 32 or the end.
void conv_plain(const Conv&, int m0, int m1, int p0, int p1);
void conv_avx2(const Conv&, int m0, int m1, int p0, int p1);
void conv_vnni(const Conv&, int m0, int m1, int p0, int p1);
void conv_amx(const Conv&, int m0, int m1, int p0, int p1);
void conv_f32(const Conv&, int m0, int m1, int p0, int p1);  // for AVX2, float32

using ConvFunction = void (*)(const Conv&, int, int, int, int);
inline ConvFunction conv_function(const Packed& w) {
#if defined(__x86_64__)
  constexpr ConvFunction all[] = {conv_plain, conv_avx2, conv_vnni, conv_amx};
  return w.type == Type::f32 && Isa(w.isa) == Isa::avx2 ? conv_f32 : all[w.isa];
#else
  return conv_plain;
#endif
}

// RNE(acc * j / 2^22) clamped to a byte: the definition.
inline uint8_t requantize(int64_t acc, int32_t j) {
  const int64_t product = acc * j, half = int64_t(1) << (MULT_BITS - 1), rest = product & (2 * half - 1);
  int64_t y = product >> MULT_BITS;
  y += rest > half || (rest == half && (y & 1));
  return uint8_t(y < 0 ? 0 : y > 255 ? 255 : y);
}

// One row of a panel from finished accumulators (without the residual), scalar: what plain C++ uses for everything and
// the other kernels for 32-bit outputs.
void finish_row(const Conv&, int m, int p, const int32_t* acc);

// Scratch of the calling thread, 64-byte aligned, kept between calls.
void* scratch(size_t bytes);

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Bytes = std::unique_ptr<uint8_t, Free>;  // 64-byte aligned
Bytes allocate(int64_t bytes);

struct PackedShape {  // what packing needs to know; weights are (o, taps, k) elements each
  int o, operands, taps[2], k[2];
  bool winograd = false;  // 3x3: transformed weights as well, where winograd.h can compute all that these sums can be;
                          // in float32 these alone
  bool operator==(const PackedShape&) const = default;
};
// gain may be null; `allocate` gets the blob's size and gives its memory. Throws where an accumulator could leave
// int32.
void pack_int8(Isa, const PackedShape&, const int8_t* const weight[2], const int32_t* mult, const int32_t* bias,
               const int32_t* gain, const std::function<uint8_t*(int64_t)>& allocate);
// Weights bfloat16, for Isa::vnni and amx, or float32, for avx2 and vnni; bias float32 (o).
void pack_float(Type, const PackedShape&, const void* const weight[2], const float* bias,
                const std::function<uint8_t*(int64_t)>& allocate);

}  // namespace r50
