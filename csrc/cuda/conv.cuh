// A convolution as an implicit matrix product on tensor cores: rows are output pixels of all images, columns output
// channels, and k runs through the taps and channels of one or two inputs. Operands travel as bytes: 8-bit and 16-bit
// types have the same fragments and differ in the multiply instruction and the epilogue only.
//
// A block multiplies BM rows by BN columns in steps of 64 bytes of k, kept in STAGES buffers of shared memory that
// cp.async fills. 16-byte chunk c of row r lies at chunk c ^ (r / 2 % 4) of that row, so that the eight rows of an
// ldmatrix touch all 32 banks. The result goes through shared memory too and leaves in 16-byte stores.
#pragma once
#include "cuda/dev.cuh"
#include "cuda/kernels.h"

namespace r50::gpu {

constexpr int BK = 64, CHUNK = 16, CHUNKS = BK / CHUNK, STAGES = 4;  // bytes; chunks in a row of a buffer; buffers

// What a block of threads computes at a time, and how its warps share that.
template <int BM_, int BN_, int WARPS_M_, int WARPS_N_>
struct Tile {
  static constexpr int BM = BM_, BN = BN_, WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, THREADS = 32 * WARPS_M * WARPS_N;
  static constexpr int WM = BM / WARPS_M, WN = BN / WARPS_N;  // rows and columns of a warp
  static constexpr int STAGE = (BM + BN) * BK;                // bytes of a buffer
  // rows of the result are 16 bytes longer than needed, which spreads the fragments' rows over the banks
  template <class Output>
  static constexpr int PITCH = BN * int(sizeof(Output)) + CHUNK;
  template <class Output>
  static constexpr int SHARED = STAGES * STAGE > BM * PITCH<Output> ? STAGES * STAGE : BM * PITCH<Output>;
};

// Where a chunk of k lies in an input: the tap, and bytes into the channels of one pixel. It moves on by BK.
struct Position {
  int ky = 0, kx = 0, byte;
  R50_DEVICE Position(int start, int channel_bytes, int kw) : byte(start) { wrap(channel_bytes, kw); }
  R50_DEVICE void wrap(int channel_bytes, int kw) {
    while (byte >= channel_bytes) {
      byte -= channel_bytes;
      if (++kx == kw) kx = 0, ky++;
    }
  }
};

// One input as a block sees it: a corner of the window for each of its rows that this thread loads.
template <int ROWS>
struct Rows {
  const unsigned char* image[ROWS];  // this group's first channel of pixel (0, 0); of image 0 for rows beyond the last
  int y[ROWS], x[ROWS];              // of the window's first tap; rows beyond the last lie outside of every image
};

template <class Type, class T, bool ALIGNED>
class Product {
  using Element = typename Type::Element;
  static constexpr int SIZE = sizeof(Element);
  static constexpr int STEP = T::THREADS / CHUNKS;  // rows that all threads load at once, a chunk each
  static constexpr int ROWS_A = T::BM / STEP, ROWS_B = T::BN / STEP;
  static constexpr int TILES_M = T::WM / 16, TILES_N = T::WN / 8;
  static_assert(T::BM % STEP == 0 && T::BN % STEP == 0 && TILES_M > 0 && TILES_N % 2 == 0, "threads fill the tile");

 public:
  typename Type::Accumulator sum[TILES_M][TILES_N][4] = {};

  R50_DEVICE Product(const Conv& conv, int row, int column, int group)
      : p(conv), first_row(row), first_column(column), group(group), at(0, 1, 1) {}

  // Steps `begin` to `end` of k; those of the second input follow those of the first.
  R50_DEVICE void run(unsigned char* buffers, int begin, int end) {
    const uint32_t shared = shared_address(buffers);
    const int steps = steps_of(p.in[0]);
    open(begin < steps ? 0 : 1, begin < steps ? begin : begin - steps);
    auto load = [&](int step) {
      if (step < end) {
        if (step == steps && operand == 0) open(1, 0);
        const int stage = (step - begin) % STAGES * T::STAGE;
        fill<ROWS_A>(buffers + stage, shared + stage, true);
        fill<ROWS_B>(buffers + stage + T::BM * BK, shared + stage + T::BM * BK, false);
        at.byte += BK;
        at.wrap(channel_bytes(p.in[operand]), p.in[operand].kw);
        k += BK;
      }
      cp_async_commit();  // also an empty one: the wait below counts groups
    };
    for (int step = begin; step < begin + STAGES - 1; step++) load(step);
    for (int step = begin; step < end; step++) {
      cp_async_wait<STAGES - 2>();
      __syncthreads();
      load(step + STAGES - 1);  // into the buffer that all threads have read, one step ago
      multiply(shared + (step - begin) % STAGES * T::STAGE);
    }
    __syncthreads();  // the epilogue writes over the buffers; the copies under way are empty groups
  }

  // f(row, column, values): two neighbours of a row of the tile at a time
  template <class F>
  R50_DEVICE void each(F&& f) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = warp / T::WARPS_N * T::WM + lane / 4, column = warp % T::WARPS_N * T::WN + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < TILES_N; j++)
#pragma unroll
      for (int i = 0; i < TILES_M; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) f(row + 16 * i + 8 * half, column + 8 * j, &sum[i][j][2 * half]);
  }

  static R50_DEVICE int channel_bytes(const Input& in) { return in.group_channels * SIZE; }
  static R50_DEVICE int steps_of(const Input& in) { return (in.kh * in.kw * channel_bytes(in) + BK - 1) / BK; }

 private:
  const Conv& p;
  const int first_row, first_column, group;
  int operand, k;  // the input being loaded; bytes of k before this thread's next chunk
  Position at;     // the same as a place in the input
  Rows<ROWS_A> rows;

  R50_DEVICE void open(int which, int step) {
    operand = which;
    const Input& in = p.in[which];
    k = step * BK + int(threadIdx.x) % CHUNKS * CHUNK;
    at = Position(k, channel_bytes(in), in.kw);
#pragma unroll
    for (int i = 0; i < ROWS_A; i++) {
      const int row = first_row + int(threadIdx.x) / CHUNKS + i * STEP;
      const int pixels = p.oh * p.ow, image = row / pixels, pixel = row % pixels;
      rows.image[i] = static_cast<const unsigned char*>(in.x) +
                      (row < p.m ? size_t(image) * in.h * in.w * in.c * SIZE : 0) + group * channel_bytes(in);
      rows.y[i] = row < p.m ? pixel / p.ow * in.sh - in.ph : -(1 << 30);
      rows.x[i] = pixel % p.ow * in.sw - in.pw;
    }
  }

  // ROWS rows of one operand's buffer
  template <int ROWS>
  R50_DEVICE void fill(unsigned char* to, uint32_t shared, bool activations) {
    const Input& in = p.in[operand];
    const int bytes = in.kh * in.kw * channel_bytes(in);
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      const int row = int(threadIdx.x) / CHUNKS + i * STEP, chunk = int(threadIdx.x) % CHUNKS;
      const int place = row * BK + (chunk ^ (row / 2 % CHUNKS)) * CHUNK;
      const bool inside = activations || first_column + row < p.group_o;
      const unsigned char* weights = static_cast<const unsigned char*>(in.weight) +
                                     (inside ? size_t(group * p.group_o + first_column + row) * bytes : 0);
      if constexpr (ALIGNED) {
        if (activations) {
          const int y = rows.y[i] + at.ky, x = rows.x[i] + at.kx;
          const bool valid = k < bytes && unsigned(y) < unsigned(in.h) && unsigned(x) < unsigned(in.w);
          const size_t pixel = valid ? (size_t(y) * in.w + x) * in.c * SIZE + at.byte : 0;
          cp_async16(shared + place, rows.image[i] + pixel, valid);
        } else {
          cp_async16(shared + place, weights + (k < bytes ? k : 0), inside && k < bytes);
        }
      } else {
        *reinterpret_cast<uint4*>(to + place) = gather(activations, i, inside ? weights : nullptr, bytes);
      }
    }
  }

  // A chunk element by element: k ends inside of it, or it spans taps, or padding is not zero. Elements enter their
  // words by shifts, for an array with a running index would lie in slow memory.
  R50_DEVICE uint4 gather(bool activations, int i, const unsigned char* weights, int bytes) const {
    const Input& in = p.in[operand];
    Position here = at;
    uint32_t word[4];
#pragma unroll
    for (int n = 0; n < 4; n++) {
      word[n] = 0;
#pragma unroll 1
      for (int j = 0; j < 4; j += SIZE) {
        Element value = 0;
        if (k + 4 * n + j < bytes) {
          if (activations) {
            const int y = rows.y[i] + here.ky, x = rows.x[i] + here.kx;
            const size_t pixel = (size_t(y) * in.w + x) * in.c * SIZE;
            if (unsigned(y) < unsigned(in.h) && unsigned(x) < unsigned(in.w))
              value = *reinterpret_cast<const Element*>(rows.image[i] + pixel + here.byte);
            else if (SIZE == 1 && p.pad_value)
              value = Element(p.pad_value[group * in.group_channels + here.byte]);
          } else if (weights) {
            value = *reinterpret_cast<const Element*>(weights + k + 4 * n + j);
          }
        }
        word[n] |= uint32_t(value) << 8 * j;
        here.byte += SIZE;
        here.wrap(channel_bytes(in), in.kw);
      }
    }
    return make_uint4(word[0], word[1], word[2], word[3]);
  }

  R50_DEVICE void multiply(uint32_t stage) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row_a = warp / T::WARPS_N * T::WM + lane % 16;
    const int row_b = warp % T::WARPS_N * T::WN + lane % 8 + lane / 16 * 8;
#pragma unroll
    for (int half = 0; half < 2; half++) {  // 32 bytes of k each
      const int chunk_a = 2 * half + lane / 16, chunk_b = 2 * half + lane / 8 % 2;
      uint32_t a[TILES_M][4], b[TILES_N / 2][4];
#pragma unroll
      for (int i = 0; i < TILES_M; i++) {
        const int row = row_a + 16 * i;
        ldmatrix4(a[i], stage + row * BK + (chunk_a ^ (row / 2 % CHUNKS)) * CHUNK);
      }
#pragma unroll
      for (int j = 0; j < TILES_N / 2; j++) {
        const int row = row_b + 16 * j;
        ldmatrix4(b[j], stage + T::BM * BK + row * BK + (chunk_b ^ (row / 2 % CHUNKS)) * CHUNK);
      }
#pragma unroll
      for (int j = 0; j < TILES_N; j++)
#pragma unroll
        for (int i = 0; i < TILES_M; i++) {
          const uint32_t column[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          Type::multiply_add(sum[i][j], a[i], column);
        }
    }
  }
};

// Rows of the tile between shared memory (rows `pitch` bytes apart) and an (M, O) matrix, 16 bytes at a time where its
// rows are aligned to that: f(shared, global, bytes), the pieces inside the matrix only.
template <class T, class Output, class F>
R50_DEVICE void each_piece(const Conv& p, int first_row, int first_column, int group, F&& f) {
  constexpr int PIECES = T::BN * int(sizeof(Output)) / CHUNK;
  const int columns = p.group_o - first_column;  // that exist from here on
  const bool whole = p.pieces && p.group_o * sizeof(Output) % CHUNK == 0;
  for (int piece = threadIdx.x; piece < T::BM * PIECES; piece += T::THREADS) {
    const int row = piece / PIECES, column = piece % PIECES * int(CHUNK / sizeof(Output));
    if (first_row + row >= p.m || column >= columns) continue;
    const size_t place = size_t(first_row + row) * p.o + group * p.group_o + first_column + column;
    const int shared = row * T::template PITCH<Output> + column * int(sizeof(Output));
    if (whole) {
      f(shared, place, true);
    } else {
      for (int j = 0; j < int(CHUNK / sizeof(Output)) && column + j < columns; j++)
        f(shared + j * int(sizeof(Output)), place + j, false);
    }
  }
}

template <class Type, class T, bool ALIGNED>
__global__ void __launch_bounds__(T::THREADS) conv(const __grid_constant__ Conv p) {
  using Output = typename Type::Output;
  R50_SHARED(shared);
  const int columns = (p.group_o + T::BN - 1) / T::BN;  // neighbouring blocks share rows, which the L2 then holds
  const int first_row = blockIdx.x / columns * T::BM, first_column = blockIdx.x % columns * T::BN;
  const int group = blockIdx.y, part = blockIdx.z, parts = gridDim.z;

  Product<Type, T, ALIGNED> product(p, first_row, first_column, group);
  const int steps = product.steps_of(p.in[0]) + product.steps_of(p.in[1]);
  const int begin = int(int64_t(steps) * part / parts), end = int(int64_t(steps) * (part + 1) / parts);
  product.run(shared, begin, end);

  Output* const out = static_cast<Output*>(p.out) + size_t(part) * p.m * p.o;
  if (Type::RESIDUAL && p.residual) {
    const Output* const residual = static_cast<const Output*>(p.residual);
    each_piece<T, Output>(p, first_row, first_column, group, [&](int place, size_t at, bool whole) {
      if (whole)
        *reinterpret_cast<uint4*>(shared + place) = *reinterpret_cast<const uint4*>(residual + at);
      else
        *reinterpret_cast<Output*>(shared + place) = residual[at];
    });
    __syncthreads();
  }
  product.each([&](int row, int column, const typename Type::Accumulator* values) {
    const int channel = first_column + column;
    if (first_row + row >= p.m || channel >= p.group_o) return;
    Output* const place =
        reinterpret_cast<Output*>(shared + row * T::template PITCH<Output> + column * int(sizeof(Output)));
    const int n = group * p.group_o + channel;
    for (int j = 0; j < 2 && channel + j < p.group_o; j++)
      place[j] = Type::finish(p, n + j, values[j], place + j);
  });
  __syncthreads();
  each_piece<T, Output>(p, first_row, first_column, group, [&](int place, size_t at, bool whole) {
    if (whole)
      *reinterpret_cast<uint4*>(out + at) = *reinterpret_cast<const uint4*>(shared + place);
    else
      out[at] = *reinterpret_cast<const Output*>(shared + place);
  });
}

// The parts into which a product was split along k, added in order, then what `Type` does with the sum.
template <class Type>
__global__ void __launch_bounds__(256)
    add_parts(const __grid_constant__ Conv p, const typename Type::Accumulator* sums, int parts) {
  using Output = typename Type::Output;
  const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x, count = size_t(p.m) * p.o;
  if (i >= count) return;
  auto sum = sums[i];
  for (int part = 1; part < parts; part++) sum += sums[part * count + i];
  const Output residual = Type::RESIDUAL && p.residual ? static_cast<const Output*>(p.residual)[i] : Output(0);
  static_cast<Output*>(p.out)[i] = Type::finish(p, int(i % p.o), sum, &residual);
}

// ------------------------------------------------------------------------------------------------- the host's side

// Whether every 16-byte chunk of k lies in one tap and one input, at a multiple of 16.
inline bool aligned(const Conv& p, int size) {
  for (const Input& in : p.in)
    if (in.group_channels * size % CHUNK || in.c * size % CHUNK || !aligned(in.x) || !aligned(in.weight)) return false;
  return !p.pad_value;
}

template <class T>
dim3 grid(const Conv& p, int parts) {
  const int64_t rows = (p.m + T::BM - 1) / T::BM, columns = (p.group_o + T::BN - 1) / T::BN;
  return dim3(unsigned(rows * columns), unsigned(p.groups), unsigned(parts));
}

template <class Type, class T, bool ALIGNED>
void run(Conv p, int parts, Stream stream) {
  p.pieces = aligned(p.residual) && aligned(p.out) && p.o * sizeof(typename Type::Output) % CHUNK == 0;
  launch(conv<Type, T, ALIGNED>, grid<T>(p, parts), T::THREADS, T::template SHARED<typename Type::Output>, stream, p);
}

using Small = Tile<64, 64, 2, 2>;
using Narrow = Tile<128, 64, 4, 2>;
using Wide = Tile<128, 128, 2, 4>;

// Parts along k that give every multiprocessor a few blocks of the small tile, none shorter than 8 steps.
inline int parts_of(const Conv& p, int size) {
  if (!aligned(p, size)) return 1;
  int64_t steps = 0;
  for (const Input& in : p.in) steps += (int64_t(in.kh) * in.kw * in.group_channels * size + BK - 1) / BK;
  const dim3 blocks = grid<Small>(p, 1);
  const int64_t wanted = 2 * multiprocessors() / (int64_t(blocks.x) * blocks.y);
  return int(wanted < 2 || steps < 16 ? 1 : wanted < steps / 8 ? wanted : steps / 8);
}

// Type's result, or through the scratch in parts of Parts' sums.
template <class Type, class Parts>
void choose(const Conv& p, int size, void* scratch, Stream stream) {
  if (!aligned(p, size)) return run<Type, Small, false>(p, 1, stream);
  if (const int parts = parts_of(p, size); parts > 1) {
    Conv q = p;
    q.out = scratch;
    q.bias = nullptr;  // not once per part
    run<Parts, Small, true>(q, parts, stream);
    const size_t count = size_t(p.m) * p.o;
    return launch(add_parts<Type>, dim3(unsigned((count + 255) / 256)), 256, 0, stream, p,
                  static_cast<const typename Type::Accumulator*>(scratch), parts);
  }
  // the largest tile of which there are enough to keep all multiprocessors at work twice over
  const dim3 wide = grid<Wide>(p, 1), narrow = grid<Narrow>(p, 1);
  const unsigned enough = 2 * unsigned(multiprocessors());
  if (p.group_o > Narrow::BN && wide.x * wide.y >= enough) return run<Type, Wide, true>(p, 1, stream);
  if (narrow.x * narrow.y >= enough) return run<Type, Narrow, true>(p, 1, stream);
  run<Type, Small, true>(p, 1, stream);
}

template <class Accumulator>
size_t scratch_of(const Conv& p, int size) {
  const int parts = parts_of(p, size);
  return parts > 1 ? size_t(parts) * p.m * p.o * sizeof(Accumulator) : 0;
}

}  // namespace r50::gpu
