// A convolution as an implicit matrix product on tensor cores: rows are output pixels of all images, columns output
// channels, and k runs through the taps and channels of one or two inputs. Operands travel as bytes: 8-bit and 16-bit
// types have the same fragments and differ in the multiply instruction and the epilogue only.
//
// A block multiplies BM rows by BN columns in steps of 64 bytes of k, kept in STAGES buffers of shared memory that
// cp.async fills. 16-byte chunk c of row r lies at chunk c ^ (r / 2 % 4) of that row, so that the eight rows of an
// ldmatrix touch all 32 banks. The result goes through shared memory too and leaves in 16-byte stores.
#pragma once
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>
#include <vector>

#include "cuda/cells.cuh"
#include "cuda/dev.cuh"
#include "cuda/kernels.h"

namespace r50::gpu {

constexpr int BK = 64, CHUNKS = BK / CHUNK, STAGES = 4;  // bytes; chunks in a row of a buffer; buffers

// What a block of threads computes at a time, and how its warps share that.
template <int BM_, int BN_, int WARPS_M_, int WARPS_N_>
struct Tile {
  static constexpr int BM = BM_, BN = BN_, WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, THREADS = 32 * WARPS_M * WARPS_N;
  static constexpr int WM = BM / WARPS_M, WN = BN / WARPS_N;  // rows and columns of a warp
  // rows of the result are 16 bytes longer than needed, which spreads the fragments' rows over the banks
  template <class Output>
  static constexpr int PITCH = BN * int(sizeof(Output)) + CHUNK;
};

// Where a chunk of a row of a buffer lies in it. A multiple of 8 rows further on, that is as many times BK bytes on.
R50_DEVICE uint32_t place_of(uint32_t row, uint32_t chunk) {
  return row * BK + (chunk ^ (row / 2 % CHUNKS)) * CHUNK;
}

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

R50_DEVICE int steps_of(const Input& in, int size) {  // of k, with elements of `size` bytes
  return (in.kh * in.kw * in.group_channels * size + BK - 1) / BK;
}

// The columns of a block: weights as they are, (O, k), whose rows lie in a buffer as those of the activations do.
template <class Type, class T>
class Dense {
  static constexpr int SIZE = sizeof(typename Type::Element);
  static constexpr int STEP = T::THREADS / CHUNKS, ROWS = T::BN / STEP;  // rows that all threads load at once
  static constexpr int TILES_M = T::WM / 16, TILES_N = T::WN / 8;
  static_assert(STEP % 8 == 0 && T::BN % STEP == 0 && TILES_M > 0 && TILES_N % 2 == 0, "threads fill the tile");

 public:
  static constexpr int BYTES = T::BN * BK;  // of a buffer
  static constexpr bool PACKED = false;

  R50_DEVICE Dense(const Conv& conv, int column, int group) : p(conv), first_column(column), group(group) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    copied = place_of(threadIdx.x / CHUNKS, threadIdx.x % CHUNKS);
    fragment_a = place_of(warp / T::WARPS_N * T::WM + lane % 16, lane / 16);
    fragment_b = place_of(warp % T::WARPS_N * T::WN + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }

  R50_DEVICE void open(const Input& in, int) {
    const int k_bytes = in.kh * in.kw * in.group_channels * SIZE;
#pragma unroll
    for (int i = 0; i < ROWS; i++)
      weights[i] = static_cast<const unsigned char*>(in.weight) +
                   int64_t(group * p.group_o + first_column + int(threadIdx.x) / CHUNKS + i * STEP) * k_bytes;
  }

  // The chunk that begins at byte k of this thread's rows, unless that is behind the last.
  R50_DEVICE void fill(uint32_t shared, const Input& in, int k, bool more) {
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      const uint32_t place = copied + i * STEP * BK;
      const bool valid = more & has_weights(i);
      cp_async16(shared + place, valid ? weights[i] + k : in.weight, valid);
    }
  }

  // What lies in a buffer: activations, and these columns, as an instruction and as a pointer have their address
  R50_DEVICE void multiply(uint32_t rows, const unsigned char*, uint32_t columns) {
#pragma unroll
    for (int half = 0; half < 2; half++) {  // 32 bytes of k each, which are two chunks: the swizzle moves by an xor
      const uint32_t from_a = rows + (fragment_a ^ 2 * CHUNK * half);
      const uint32_t from_b = columns + (fragment_b ^ 2 * CHUNK * half);
      uint32_t a[TILES_M][4], b[TILES_N / 2][4];
#pragma unroll
      for (int i = 0; i < TILES_M; i++) ldmatrix4(a[i], from_a + 16 * i * BK);  // 16 rows on the swizzle is the same
#pragma unroll
      for (int j = 0; j < TILES_N / 2; j++) ldmatrix4(b[j], from_b + 16 * j * BK);
#pragma unroll
      for (int j = 0; j < TILES_N; j++)
#pragma unroll
        for (int i = 0; i < TILES_M; i++) {
          const uint32_t column[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          Type::multiply_add(sum[i][j], a[i], column);
        }
    }
  }

  // f(row, column, sums): two at a time, of which the second is DOWN rows and ACROSS columns further on, behind
  // open(column) for all rows of these columns
  static constexpr int DOWN = 0, ACROSS = 1;
  template <class Open, class F>
  R50_DEVICE void each(Open&& open, F&& f) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = warp / T::WARPS_N * T::WM + lane / 4, column = warp % T::WARPS_N * T::WN + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < TILES_N; j++) {
      open(column + 8 * j);
#pragma unroll
      for (int i = 0; i < TILES_M; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) f(row + 16 * i + 8 * half, column + 8 * j, &sum[i][j][2 * half]);
    }
  }

 private:
  const Conv& p;
  const int first_column, group;
  // bytes into a buffer: the first chunk that this thread copies, and its row of the first ldmatrix of either operand
  uint32_t copied, fragment_a, fragment_b;
  const unsigned char* weights[ROWS];  // the first bytes of these rows, which need not exist
  typename Type::Accumulator sum[TILES_M][TILES_N][4] = {};

  R50_DEVICE bool has_weights(int i) const {
    return first_column + int(threadIdx.x) / CHUNKS + i * STEP < p.group_o;
  }
};

// Type's columns, which multiply, too
template <class Type, class T>
using Columns = typename Type::template Columns<T>;
template <class Type, class T>
constexpr int STAGE = T::BM * BK + Columns<Type, T>::BYTES;  // bytes of a buffer
template <class Type, class T>
constexpr int SHARED = STAGES * STAGE<Type, T> > T::BM * T::template PITCH<typename Type::Output>
                           ? STAGES * STAGE<Type, T>
                           : T::BM * T::template PITCH<typename Type::Output>;

template <class Type, class T>
class Product {
  static constexpr int SIZE = sizeof(typename Type::Element);
  static constexpr int STEP = T::THREADS / CHUNKS, ROWS = T::BM / STEP;  // rows that all threads load at once
  static_assert(STEP % 8 == 0 && T::BM % STEP == 0, "threads fill the tile");

 public:
  Columns<Type, T> columns;

  R50_DEVICE Product(const Conv& conv, int row, int column, int group)
      : columns(conv, column, group), p(conv), first_row(row), group(group),
        copied(place_of(threadIdx.x / CHUNKS, threadIdx.x % CHUNKS)), at(0, 1, 1) {}

  // Steps `begin` to `end` of k; those of the second input follow those of the first.
  R50_DEVICE void run(unsigned char* buffers, int begin, int end) {
    const uint32_t shared = shared_address(buffers);
    const int steps = steps_of(p.in[0], SIZE);
    bool second = begin >= steps;
    open(p.in[second], second ? begin - steps : begin);
    auto load = [&](int step) {
      if (step < end) {
        if (step == steps && !second) second = true, open(p.in[1], 0);
        fill(shared + unsigned(step - begin) % STAGES * STAGE<Type, T>);
      }
      cp_async_commit();  // also an empty one: the wait below counts groups
    };
    for (int step = begin; step < begin + STAGES - 1; step++) load(step);
    for (int step = begin; step < end; step++) {
      cp_async_wait<STAGES - 2>();
      __syncthreads();
      load(step + STAGES - 1);  // into the buffer that all threads have read, one step ago
      const uint32_t rows = unsigned(step - begin) % STAGES * STAGE<Type, T>, weights = rows + T::BM * BK;
      columns.multiply(shared + rows, buffers + weights, shared + weights);
    }
    __syncthreads();  // the epilogue writes over the buffers; the copies under way are empty groups
  }

 private:
  const Conv& p;
  const int first_row, group;
  const uint32_t copied;  // bytes into a buffer: the first chunk that this thread copies
  // What this thread copies next: its chunk of ROWS rows of activations.
  Input in;     // of this input
  int k;        // bytes of k before the chunk
  Position at;  // the same as a place in the input
  const unsigned char* window[ROWS];  // the first bytes of these rows, which need not exist
  int y[ROWS], x[ROWS];  // of the window's first tap; rows beyond the last lie outside of every image

  static R50_DEVICE int channel_bytes(const Input& in) { return in.group_channels * SIZE; }

  R50_DEVICE void open(const Input& input, int step) {
    in = input;
    k = step * BK + int(threadIdx.x) % CHUNKS * CHUNK;
    at = Position(k, channel_bytes(in), in.kw);
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      const int row = first_row + int(threadIdx.x) / CHUNKS + i * STEP;
      const int pixels = p.oh * p.ow, image = row / pixels, pixel = row % pixels;
      y[i] = pixel / p.ow * in.sh - in.ph, x[i] = pixel % p.ow * in.sw - in.pw;
      window[i] = static_cast<const unsigned char*>(in.x) + group * channel_bytes(in) +
                  ((int64_t(image) * in.h + y[i]) * in.w + x[i]) * (in.c * SIZE);
      if (row >= p.m) y[i] = -(1 << 30);
    }
    columns.open(in, step);
  }

  R50_DEVICE int k_bytes() const { return in.kh * in.kw * channel_bytes(in); }
  R50_DEVICE bool inside(int y, int x) const {  // without branches, for what is asked for in every step
    return (unsigned(y) < unsigned(in.h)) & (unsigned(x) < unsigned(in.w));
  }
  // Bytes from a window's first tap. The rows of one window are few, so that its pixels fit int32.
  R50_DEVICE int64_t offset(const Position& at) const {
    return int64_t(at.ky * in.w + at.kx) * (in.c * SIZE) + at.byte;
  }

  // A buffer, and on by BK. Addresses are valid where nothing is read, too: compute-sanitizer might look at them.
  R50_DEVICE void fill(uint32_t shared) {
    const bool more = k < k_bytes();
    const int64_t tap = offset(at);
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      const uint32_t place = copied + i * STEP * BK;
      const bool valid = more & inside(y[i] + at.ky, x[i] + at.kx);
      cp_async16(shared + place, valid ? window[i] + tap : in.x, valid);
    }
    columns.fill(shared + T::BM * BK, in, k, more);
    at.byte += BK;
    at.wrap(channel_bytes(in), in.kw);
    k += BK;
  }
};

// Rows of the tile between shared memory (rows `pitch` bytes apart) and an (M, O) matrix, 16 bytes at a time where its
// rows are aligned to that: f(shared, global, whole) for the pieces inside the matrix, other(shared) for elements that
// are not.
template <class T, class Output, class F, class Other>
R50_DEVICE void each_piece(const Conv& p, int first_row, int first_column, int group, F&& f, Other&& other) {
  constexpr int PIECES = T::BN * int(sizeof(Output)) / CHUNK;
  const int columns = p.group_o - first_column;  // that exist from here on
  const bool whole = p.pieces && p.group_o * sizeof(Output) % CHUNK == 0;
  for (int piece = threadIdx.x; piece < T::BM * PIECES; piece += T::THREADS) {
    const int row = piece / PIECES, column = piece % PIECES * int(CHUNK / sizeof(Output));
    const bool exists = first_row + row < p.m;
    const size_t place = size_t(first_row + row) * p.o + group * p.group_o + first_column + column;
    const int shared = row * T::template PITCH<Output> + column * int(sizeof(Output));
    if (exists && whole && column < columns) {
      f(shared, place, true);
    } else {
      for (int j = 0; j < int(CHUNK / sizeof(Output)); j++)
        exists && column + j < columns ? f(shared + j * int(sizeof(Output)), place + j, false)
                                       : other(shared + j * int(sizeof(Output)));
    }
  }
}

template <class Type, class T>
__global__ void __launch_bounds__(T::THREADS) conv(const __grid_constant__ Conv p) {
  using Output = typename Type::Output;
  R50_SHARED(shared);
  const int columns = (p.group_o + T::BN - 1) / T::BN;  // neighbouring blocks share rows, which the L2 then holds
  const int first_row = blockIdx.x / columns * T::BM, first_column = blockIdx.x % columns * T::BN;
  const int group = blockIdx.y, part = blockIdx.z, parts = gridDim.z;

  Product<Type, T> product(p, first_row, first_column, group);
  const int size = sizeof(typename Type::Element), steps = steps_of(p.in[0], size) + steps_of(p.in[1], size);
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
    }, [&](int place) { *reinterpret_cast<Output*>(shared + place) = 0; });
    __syncthreads();
  }
  constexpr int DOWN = Columns<Type, T>::DOWN, ACROSS = Columns<Type, T>::ACROSS;
  using Channel = typename Type::Channel;
  using Sum = typename Type::Accumulator;
  Channel channels[1 + ACROSS] = {};
  const auto each = [&](auto&& f) {  // also what lies outside of the matrix, and is left in shared memory
    product.columns.each(
        [&](int column) {  // what stays in registers for all rows: the stores below could change it, for all nvcc knows
          const int channel = first_column + column;
          for (int j = 0; j <= ACROSS && channel + j < p.group_o; j++)
            channels[j] = Type::channel(p, group * p.group_o + channel + j);
        },
        [&](int row, int column, const Sum* sums) {
          for (int j = 0; j < 2; j++) f(row + j * DOWN, column + j * ACROSS, channels[j * ACROSS], sums[j]);
        });
  };
  const auto place_at = [&](int row, int column) {
    return reinterpret_cast<Output*>(shared + row * T::template PITCH<Output> + column * int(sizeof(Output)));
  };
  uint32_t doubt = 0;
  if (Type::RESIDUAL && p.residual)
    each([&](int row, int column, const Channel& channel, Sum sum) {
      Output* const place = place_at(row, column);
      *place = Type::template finish<true>(p, channel, sum, place, doubt);
    });
  else
    each([&](int row, int column, const Channel& channel, Sum sum) {
      *place_at(row, column) = Type::template finish<false>(p, channel, sum, nullptr, doubt);
    });
  if (Type::failed(doubt))  // for one of this thread's sums at least; seldom
    each([&](int row, int column, const Channel& channel, Sum sum) {
      if (first_row + row >= p.m || first_column + column >= p.group_o) return;
      const size_t at = size_t(first_row + row) * p.o + group * p.group_o + first_column + column;
      const Output* const residual = p.residual ? static_cast<const Output*>(p.residual) + at : nullptr;
      *place_at(row, column) = Type::exact(p, channel, sum, residual);
    });
  __syncthreads();
  each_piece<T, Output>(p, first_row, first_column, group, [&](int place, size_t at, bool whole) {
    if (whole)
      *reinterpret_cast<uint4*>(out + at) = *reinterpret_cast<const uint4*>(shared + place);
    else
      out[at] = *reinterpret_cast<const Output*>(shared + place);
  }, [](int) {});
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
  const Output* const residual = Type::RESIDUAL && p.residual ? static_cast<const Output*>(p.residual) + i : nullptr;
  static_cast<Output*>(p.out)[i] = Type::exact(p, Type::channel(p, int(i % p.o)), sum, residual);
}

// ------------------------------------------------------------------------------------------------- the host's side

template <class T>
dim3 grid(const Conv& p, int parts) {
  const int64_t rows = (p.m + T::BM - 1) / T::BM, columns = (p.group_o + T::BN - 1) / T::BN;
  return dim3(unsigned(rows * columns), unsigned(p.groups), unsigned(parts));
}

template <class Type, class T>
void run(Conv p, int parts, Stream stream) {
  p.pieces = aligned(p.residual) && aligned(p.out) && p.o * sizeof(typename Type::Output) % CHUNK == 0;
  launch(conv<Type, T>, grid<T>(p, parts), T::THREADS, SHARED<Type, T>, stream, p);
}

// More rows and columns per warp need fewer bytes of shared memory for as many multiplies, and larger tiles fewer bytes
// of L2; smaller ones leave room for more blocks and waste less at the edges.
using Small = Tile<64, 64, 2, 2>;
using Narrow = Tile<128, 64, 4, 2>;
using Wide = Tile<128, 128, 2, 4>;
using Square = Tile<128, 128, 2, 2>;
using Tall = Tile<256, 64, 4, 1>;
using Large = Tile<256, 128, 4, 2>;
enum { SMALL, NARROW, WIDE, SQUARE, TALL, LARGE, TILES };

template <class Type>
constexpr bool PACKED = Columns<Type, Small>::PACKED;  // weights in an order of their own

// f(the tile of this number)
template <class F>
auto with_tile(int tile, F&& f) {
  switch (tile) {
    case SMALL: return f(Small());
    case NARROW: return f(Narrow());
    case WIDE: return f(Wide());
    case SQUARE: return f(Square());
    case TALL: return f(Tall());
    default: return f(Large());
  }
}

// How a convolution is computed. Sums along k are made in the same order with every tile, but not in parts.
struct Way {
  int tile, parts;
};

// Parts along k that give every multiprocessor a few blocks of the small tile, none shorter than 8 steps.
inline int parts_of(const Conv& p, int size) {
  int64_t steps = 0;
  for (const Input& in : p.in) steps += (int64_t(in.kh) * in.kw * in.group_channels * size + BK - 1) / BK;
  const dim3 blocks = grid<Small>(p, 1);
  const int64_t wanted = 2 * multiprocessors() / (int64_t(blocks.x) * blocks.y);
  return int(wanted < 2 || steps < 16 ? 1 : wanted < steps / 8 ? wanted : steps / 8);
}

// Ways with the same result, the one that is fastest as a rule first.
template <class Type>
std::vector<Way> ways_of(const Conv& p) {
  std::vector<Way> ways;
  if (const int parts = parts_of(p, sizeof(typename Type::Element)); parts > 1) {
    ways.push_back({SMALL, parts});
    if (!Type::EXACT) return ways;
  } else {  // the largest tile of which there are enough to keep all multiprocessors at work twice over
    const dim3 wide = grid<Wide>(p, 1), narrow = grid<Narrow>(p, 1);
    const unsigned enough = 2 * unsigned(multiprocessors());
    const bool is_wide = p.group_o > Narrow::BN && wide.x * wide.y >= enough;
    ways.push_back({is_wide ? WIDE : narrow.x * narrow.y >= enough ? NARROW : SMALL, 1});
  }
  for (int tile = 0; tile < TILES; tile++)
    with_tile(tile, [&](auto t) {
      using T = decltype(t);
      const bool fits = SHARED<Type, T> <= shared_memory();
      const bool is_used = (T::BM == Small::BM || p.m > T::BM / 2) && (T::BN == Small::BN || p.group_o > T::BN / 2);
      if (fits && is_used && (ways[0].tile != tile || ways[0].parts > 1)) ways.push_back({tile, 1});
    });
  return ways;
}

// The fastest of them: measured when this process first meets the problem on this device, by run(way). RESNET50_TILE
// names a tile by its number instead, where it is one of them.
template <class Run>
Way fastest(const Conv& p, const std::vector<Way>& ways, Stream stream, Run&& run) {
  if (const char* named = std::getenv("RESNET50_TILE")) {
    for (const Way& way : ways)
      if (way.tile == std::atoi(named) && way.parts == 1) return way;
    return ways[0];
  }
  static std::mutex mutex;
  static std::map<std::vector<int64_t>, Way> known;
  std::vector<int64_t> key{current_device(), p.m, p.o, p.groups, p.residual != nullptr};
  for (const Input& in : p.in)
    key.insert(key.end(), {in.h, in.w, in.c, in.kh, in.kw, in.sh, in.sw, in.ph, in.pw});
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  if (ways.size() == 1 || is_recorded(stream)) return ways[0];
  Way best = ways[0];
  float least = std::numeric_limits<float>::infinity();
  for (const Way& way : ways)
    if (const float time = milliseconds(stream, [&] { run(way); }); time < least) least = time, best = way;
  return known[key] = best;
}

// Type's result, or through the scratch in parts of Parts' sums.
template <class Type, class Parts>
void choose(const Conv& conv, void* memory, Stream stream) {
  Pieces scratch{static_cast<unsigned char*>(memory)};
  const Conv p = in_cells<typename Type::Element>(conv, PACKED<Type>, scratch, stream);
  const auto compute = [&](const Way& way) {
    if (way.parts == 1) return with_tile(way.tile, [&](auto tile) { run<Type, decltype(tile)>(p, 1, stream); });
    Conv q = p;
    q.out = Pieces(scratch).take(0);
    q.bias = nullptr, q.scale = nullptr;  // not once per part
    run<Parts, Small>(q, way.parts, stream);
    const size_t count = size_t(p.m) * p.o;
    launch(add_parts<Type>, dim3(unsigned((count + 255) / 256)), 256, 0, stream, p,
           static_cast<const typename Type::Accumulator*>(q.out), way.parts);
  };
  compute(fastest(p, ways_of<Type>(p), stream, compute));
}

template <class Type>
size_t scratch_of(const Conv& conv) {
  Pieces scratch{};
  const Conv p = in_cells<typename Type::Element>(conv, PACKED<Type>, scratch, nullptr);
  const int parts = parts_of(p, sizeof(typename Type::Element));
  if (parts > 1) scratch.take(int64_t(parts) * p.m * p.o * sizeof(typename Type::Accumulator));
  return scratch.bytes;
}

}  // namespace r50::gpu
