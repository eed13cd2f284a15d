// What surrounds the convolutions of a network; each works on images [n0, n1) and, of the output, rows [y0, y1)
// or channels.
#pragma once
#include "layout.h"

// Of functions with plain loops, which the compiler vectorizes; the loader picks a body.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(RESNET50_EMULATED) && __GNUC__ >= 12
#define WIDEST __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#elif defined(__x86_64__) && defined(__gnu_linux__) && !defined(RESNET50_EMULATED)
#define WIDEST __attribute__((target_clones("avx2", "default")))  // other names of processors mean them alone
#else
#define WIDEST
#endif

namespace r50 {

// pixels, contiguous NHWC of c channels, into the interior of a bordered buffer; bfloat16: less the bytes
// value[c], exactly; float32: less the floats value[c]
void load_images(const uint8_t* pixels, int c, const uint8_t* value, Type type, uint8_t* out, const Layout& to, int n0,
                 int n1, int y0, int y1);
// pixels of images (h, w, c) into Layout::windows of a kernel of up to 8 rows; value[c] stands outside the image;
// bfloat16: less value[c], so that this is 0
void load_windows(const uint8_t* pixels, int h, int w, int c, const uint8_t* value, Type type, int stride, int pad,
                  uint8_t* out, const Layout& to, int n0, int n1, int y0, int y1);
// every byte of the buffer that is a border of some pixel: value[c]; null: 0. Called once, before the interior is
// written.
void fill_border(uint8_t* out, const Layout& to, const uint8_t* value);
// 3x3, stride 2, padding 1, of values after a ReLU (the border's 0 never wins)
void max_pool(Type type, const uint8_t* in, const Layout& from, uint8_t* out, const Layout& to, int n0, int n1, int y0,
              int y1);
// RNE(j * sum over H and W / 2^22), j = mult / (H * W) rounded half up; `to` is 1x1
void average_pool(const uint8_t* in, const Layout& from, uint8_t* out, const Layout& to, int32_t mult, int n0, int n1);
// the sum in float32, times 1 / (H * W), rounded
void average_pool_floats(Type type, const uint8_t* in, const Layout& from, uint8_t* out, const Layout& to, int n0,
                         int n1);

}  // namespace r50
