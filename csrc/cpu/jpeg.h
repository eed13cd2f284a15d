// JPEG files through libjpeg-turbo, no more of them than is wanted. Without its headers nothing here is a JPEG, and the
// callers decode in another way.
#pragma once
#include <cstdint>
#include <vector>

namespace r50 {

struct JpegSize {
  int64_t height = 0, width = 0;  // zeros: not a JPEG of 8-bit grey or colour that ends with its marker
};
JpegSize jpeg_size(const uint8_t* file, int64_t bytes);

// Decoded pixels: uint8 (height, width, 3), the first of them `top` rows and `left` columns into the image, which was
// decoded at 1 / shrink of its size. They belong to the thread and last until its next call.
struct JpegPixels {
  const uint8_t *rows, *end;
  int64_t height, width, top, left;
  int shrink;
};

// The box (top, left, height, width) of the image, and no less. It is decoded at a half, a quarter or an eighth where
// it then still has `enough` rows and columns (0: never). False: damaged, or nothing that libjpeg-turbo knows.
bool jpeg_decode(const uint8_t* file, int64_t bytes, const int64_t box[4], const int64_t enough[2], JpegPixels& out);

// The same coefficients and metadata, sequential, with a restart marker about every `pixels` columns of each row of
// blocks, so that jpeg_decode steps over what lies outside its box. Empty: no JPEG, or damaged.
std::vector<uint8_t> jpeg_restart(const uint8_t* file, int64_t bytes, int64_t pixels);

}  // namespace r50
