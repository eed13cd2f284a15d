#include "huffman.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels.h"
#include "vec.h"

#ifdef __x86_64__
#pragma GCC target("bmi,bmi2")  // shifts by a register in one step; part of what isa() calls avx2
#endif

namespace r50 {
namespace {

constexpr int END = 80;  // the step of a code that ends its block, more than any run of zeros

struct Places {  // in natural order, of coefficients in zigzag order; what lies behind the last goes to its place
  uint8_t at[64 + END];
  constexpr Places() : at{} {
    for (int i = 0, x = 0, y = 0; i < 64; i++) {
      at[i] = uint8_t(8 * y + x);
      const bool up = (x + y) % 2 == 0;
      if (up ? x == 7 : y == 7)
        up ? y++ : x++;
      else if (up ? y == 0 : x == 0)
        up ? x++ : y++;
      else
        up ? (x++, y--) : (x--, y++);
    }
    for (int i = 64; i < 64 + END; i++) at[i] = 63;
  }
};
constexpr Places PLACES;

// Which code comes next: that of a block's DC coefficient or of the others
struct State {
  const HuffmanTable* table;
  const State* next[2];  // where the block goes on, and where it has ended
};

struct Lane {  // a segment that is being decoded
  uint64_t next;               // its bits, and behind them a 1, the lowest bit when they were read
  const uint8_t *at, *furthest;  // where that was
  int16_t *block, *stop;
  const State* state;
  int64_t k;  // the coefficient before, in zigzag order

  INLINE void read(unsigned used) {
    at = std::min(at + used / 8, furthest);
    std::memcpy(&next, at, 8);
    next = (__builtin_bswap64(next) | 1) << used % 8;
  }
  INLINE unsigned used() const { return unsigned(__builtin_ctzll(next)); }
  INLINE void refill() { read(used()); }  // 56 bits at least: two codes of at most 16 with values of 10 or, once, 11
};

struct Queue {
  const Scan& scan;
  const Segment* segments;
  int64_t count, begun;
  int16_t* coefficients;
  bool bad;
  State states[2 * Scan::MOST];

  __attribute__((noinline)) void start(Lane& lane) {
    const Segment& s = segments[begun];
    int16_t* to = coefficients + begun++ * scan.coefficients();
    lane = {0, s.begin, s.end + SEGMENT_AHEAD - 8, to, to + scan.coefficients(), states, -1};
    lane.read(0);
  }
  // Its DC coefficients are differences so far. False: it has more or fewer bytes than were read.
  __attribute__((noinline)) bool finish(Lane& lane) const {
    lane.refill();
    const uint8_t* end = lane.furthest - (SEGMENT_AHEAD - 8);
    if (bad || lane.at + (lane.used() > 0) != end) return false;
    int16_t last[Scan::MOST] = {}, *block = lane.stop - scan.coefficients();
    for (int m = 0; m < scan.interval; m++)
      for (int b = 0; b < scan.blocks; b++, block += 64) block[0] = last[scan.component[b]] += block[0];
    return true;
  }
};

__attribute__((noinline)) Code find(const HuffmanTable& table, uint64_t next, bool& bad) {
  const Code code = table.find(next);
  bad |= !code.total;
  return code.total ? code : Code{1, 1, 63, END, 0};
}

// N lanes, until one of them finds no segment to go on with. No branch depends on what is read, but for rare codes and
// segments' ends: where a block ends, every ninth code, could not be foretold.
template <int N>
INLINE bool run(Lane* lanes, Queue& queue) {
  for (;;) {
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) lanes[i].refill();
#pragma GCC unroll 2
    for (int twice = 0; twice < 2; twice++)
#pragma GCC unroll 8
      for (int i = 0; i < N; i++) {
        Lane& lane = lanes[i];
        const HuffmanTable& table = *lane.state->table;
        const Code* code = &table.codes[lane.next >> (64 - CODE_BITS)];
        Code rare;
        if (__builtin_expect(!code->total, 0)) rare = find(table, lane.next, queue.bad), code = &rare;
        const uint64_t value = lane.next << (code->length & 63);
        lane.next <<= code->total & 63;
        const int64_t k = lane.k + code->step, ended = (62 - k) >> 63;  // 0 or -1
        lane.block[PLACES.at[k]] =
            int16_t(int(value >> 1 >> (code->shift & 63)) + (code->low & ~int(int64_t(value) >> 63)));
        lane.k = k | ended;
        lane.block += ended & 64;
        lane.state = lane.state->next[ended & 1];
        if (__builtin_expect(lane.block == lane.stop, 0)) {
          if (!queue.finish(lane)) return false;
          if (queue.begun == queue.count) {
            std::swap(lane, lanes[N - 1]);
            return true;
          }
          queue.start(lane);
        }
      }
  }
}

template <int N>
INLINE bool run_down(Lane* lanes, Queue& queue, int64_t busy) {
  if (busy >= N && !run<N>(lanes, queue)) return false;
  if constexpr (N > 1) return run_down<N - 1>(lanes, queue, busy);
  return true;
}

}  // namespace

bool HuffmanTable::set(const uint8_t bits[17], const uint8_t symbols[256], bool dc) {
  std::fill(codes, codes + (1 << CODE_BITS), Code{});
  uint32_t word = 0, n = 0;  // what all 16-bit words begin with that come next
  for (int length = 1; length <= 16; length++) {
    const uint32_t words = 1u << (16 - length);
    first[length] = n - word / words;  // modulo 2^32
    for (int i = 0; i < bits[length]; i++, n++, word += words) {
      if (n >= 256 || word + words > 1 << 16) return false;
      const int size = dc ? symbols[n] : symbols[n] & 15, run = symbols[n] >> 4;
      if (size > (dc ? 11 : 10)) return false;
      all[n] = {uint8_t(length), uint8_t(length + size), uint8_t(63 - size),
                uint8_t(dc ? 1 : size || run == 15 ? run + 1 : END), 1 - (1 << size)};
      if (length <= CODE_BITS)
        std::fill_n(codes + (word >> (16 - CODE_BITS)), 1 << (CODE_BITS - length), all[n]);
    }
    past[length] = word;
  }
  return true;
}

Code HuffmanTable::find(uint64_t next) const {
  const uint32_t word = uint32_t(next >> 48);
  for (int length = CODE_BITS + 1; length <= 16; length++)
    if (word < past[length]) return all[first[length] + (word >> (16 - length))];
  return {};
}

bool decode_segments(const Scan& scan, const Segment* segments, int64_t count, int16_t* coefficients) {
#ifdef __x86_64__
  if (isa() < Isa::avx2) return false;
#endif
  Lane lanes[SEGMENTS_AT_ONCE];
  Queue queue{scan, segments, count, 0, coefficients, false, {}};
  for (int b = 0; b < scan.blocks; b++) {
    State* of_block = queue.states + 2 * b;
    const State* following = queue.states + 2 * ((b + 1) % scan.blocks);
    for (int ac = 0; ac < 2; ac++) of_block[ac] = {ac ? scan.ac[b] : scan.dc[b], {of_block + 1, following}};
  }
  const int64_t busy = std::min(SEGMENTS_AT_ONCE, count);
  for (int64_t i = 0; i < busy; i++) queue.start(lanes[i]);
  return run_down<SEGMENTS_AT_ONCE>(lanes, queue, busy);
}

}  // namespace r50
