// The coefficients of a JPEG's restart segments, several segments at once (ITU-T T.81, annex F: sequential scans of
// 8-bit samples). Where a code begins is known when the one before it has been looked up, so that a segment is a chain
// of waits; but segments do not wait for each other.
#pragma once
#include <cstdint>

namespace r50 {

constexpr int CODE_BITS = 9;  // looked up at once; longer codes, one in a hundred, are searched for

struct Code {
  uint8_t length, total;  // bits of the code, and with its value; 0: a longer code, or none
  uint8_t shift;          // 63 without the bits of the value
  uint8_t step;           // how far its coefficient lies behind the one before
  int32_t low;            // added to values that begin with a 0
};

struct HuffmanTable {
  // bits[n] codes of n bits, and the symbols of all, as in the file. False: no such code, or values that 8-bit samples
  // do not have
  bool set(const uint8_t bits[17], const uint8_t symbols[256], bool dc);
  Code find(uint64_t next) const;  // that the highest bits are

  Code codes[1 << CODE_BITS], all[256];
  uint32_t past[17], first[17];  // of n bits: the first 16-bit word behind them, and what leads from codes to `all`
};

struct Scan {
  static constexpr int MOST = 10;
  int interval, blocks;  // MCUs of a segment, blocks of an MCU
  int component[MOST];   // of each block
  const HuffmanTable *dc[MOST], *ac[MOST];
  int64_t coefficients() const { return int64_t(interval) * blocks * 64; }  // of a segment
};

struct Segment {
  const uint8_t *begin, *end;  // without the zeros that are stuffed behind 255; readable SEGMENT_AHEAD bytes further
};
constexpr int64_t SEGMENT_AHEAD = 16, SEGMENTS_AT_ONCE = 5;

// `count` segments -> their coefficients, which must be zeros before: one block of 64 in natural order after the other.
// False: damaged, or nothing that encoders write, or a CPU that is slow at this.
bool decode_segments(const Scan& scan, const Segment* segments, int64_t count, int16_t* coefficients);

}  // namespace r50
