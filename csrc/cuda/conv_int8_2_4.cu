// conv_int8_2_4: of every four weights along k two at most are not zero, and only two are multiplied, at twice the
// rate (Mishra et al., Accelerating Sparse Deep Neural Networks, 2021). The sparse operand of the instruction is its
// rows, so these are output channels here, and its columns are pixels.
#include "cuda/int8.cuh"

namespace r50::gpu {
namespace {

// Weights as pack_2_4 (csrc/reference.py) orders them: for 16 channels and BK of k one block, each lane's 16 bytes of
// the fragment, then each lane's word that says which two of four its group of lanes has kept.
template <class T>
class Sparse {
  static constexpr int CHANNELS = 16, FRAGMENTS = 32 * CHUNK, BLOCK = FRAGMENTS + 32 * 4;
  static constexpr int COPIES = T::BN / CHANNELS * BLOCK / CHUNK, ROUNDS = (COPIES + T::THREADS - 1) / T::THREADS;
  static constexpr int TILES_M = T::WM / 8, TILES_N = T::WN / CHANNELS;
  static_assert(BLOCK == BLOCK_2_4 && BK == 64 && T::BM % 8 == 0 && TILES_M > 0 && TILES_N > 0, "warps fill the tile");

 public:
  static constexpr int BYTES = T::BN / CHANNELS * BLOCK;  // of a buffer
  static constexpr bool PACKED = true;

  R50_DEVICE Sparse(const Conv& conv, int column, int) : p(conv), first_column(column) {}

  R50_DEVICE void open(const Input& in, int step) {
    const int steps = steps_of(in, 1), last = (p.o + CHANNELS - 1) / CHANNELS - 1;
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
      const int byte = (int(threadIdx.x) + i * T::THREADS) * CHUNK, channels = first_column / CHANNELS + byte / BLOCK;
      // behind the last channels these again: the instruction may do anything where its words are not valid
      from[i] = ((channels < last ? channels : last) * steps + step) * BLOCK + byte % BLOCK;
    }
  }

  R50_DEVICE void fill(uint32_t shared, const Input& in, int, bool) {
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
      const int copy = int(threadIdx.x) + i * T::THREADS;
      const unsigned char* const weights = static_cast<const unsigned char*>(in.weight);
      if (copy < COPIES) cp_async16(shared + copy * CHUNK, weights + from[i], true);
      from[i] += BLOCK;
    }
  }

  R50_DEVICE void multiply(uint32_t rows, const unsigned char* columns, uint32_t) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned char* const blocks = columns + warp % T::WARPS_N * TILES_N * BLOCK;
    uint4 kept[TILES_N];
    uint32_t which[TILES_N];
#pragma unroll
    for (int i = 0; i < TILES_N; i++) {
      kept[i] = *reinterpret_cast<const uint4*>(blocks + i * BLOCK + lane * CHUNK);
      which[i] = *reinterpret_cast<const uint32_t*>(blocks + i * BLOCK + FRAGMENTS + lane * 4);
    }
    const uint32_t fragment = rows + place_of(warp / T::WARPS_N * T::WM + lane % 8, lane / 8);
#pragma unroll
    for (int j = 0; j < TILES_M; j++) {
      uint32_t pixels[4];
      ldmatrix4(pixels, fragment + 8 * j * BK);  // 8 rows on the swizzle is the same
#pragma unroll
      for (int i = 0; i < TILES_N; i++) {
        const uint32_t a[4] = {kept[i].x, kept[i].y, kept[i].z, kept[i].w};
        mma_sparse_s8u8(sum[j][i], a, pixels, which[i]);
      }
    }
  }

  static constexpr int DOWN = 1, ACROSS = 0;
  template <class Open, class F>
  R50_DEVICE void each(Open&& open, F&& f) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = warp / T::WARPS_N * T::WM + lane % 4 * 2, column = warp % T::WARPS_N * T::WN + lane / 4;
#pragma unroll
    for (int i = 0; i < 2 * TILES_N; i++) {
      open(column + 8 * i);
#pragma unroll
      for (int j = 0; j < TILES_M; j++) f(row + 8 * j, column + 8 * i, &sum[j][i / 2][i % 2 * 2]);
    }
  }

 private:
  const Conv& p;
  const int first_column;
  int from[ROUNDS];  // bytes into the weights, of what this thread copies next
  int32_t sum[TILES_M][TILES_N][4] = {};
};

template <class Result>
struct OfSparse : Result {
  template <class T>
  using Columns = Sparse<T>;
};

}  // namespace

size_t conv_int8_2_4_scratch(const Conv& p) { return scratch_of<OfSparse<Requantized>>(p); }
void conv_int8_2_4(const Conv& p, void* scratch, Stream stream) {
  choose<OfSparse<Requantized>, OfSparse<Raw>>(p, scratch, stream);
}

}  // namespace r50::gpu
