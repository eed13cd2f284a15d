#include "jpeg.h"

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstring>

#ifdef USE_LIBJPEG
#include <jpeglib.h>
#include <jerror.h>
#endif

namespace r50 {

#ifdef USE_LIBJPEG
namespace {

constexpr int64_t MOST = 89478485;  // pixels: Pillow warns of decompression bombs from there on
constexpr int DRI = 0xdd, SOS = 0xda, EOI = 0xd9, RST0 = 0xd0;

// What the headers of a file say, as far as the first scan.
struct Headers {
  int64_t height = 0, width = 0, size_at = 0, data_at = 0, restart = 0;  // restart: blocks of a scan (MCUs)
  int64_t mcu_h = 8, mcu_w = 8;
  bool sequential = false, whole = false;  // whole: the first scan has all components
};

bool parse(const uint8_t* f, int64_t n, Headers& h) {
  int components = 0;
  if (n < 4 || f[0] != 0xff || f[1] != 0xd8) return false;
  for (int64_t at = 2; at + 4 <= n;) {
    if (f[at] != 0xff) return false;
    const int marker = f[at + 1];
    if (marker == 0xff) {
      at++;
      continue;
    }
    const int64_t length = f[at + 2] << 8 | f[at + 3];
    if (length < 2 || at + 2 + length > n) return false;
    const uint8_t* body = f + at + 4;
    if (marker >= 0xc0 && marker <= 0xc2 && !components) {
      if (length < 8 || body[0] != 8) return false;
      h.sequential = marker != 0xc2, h.size_at = at + 5;
      h.height = body[1] << 8 | body[2], h.width = body[3] << 8 | body[4], components = body[5];
      if ((components != 1 && components != 3) || length < 8 + 3 * components) return false;
      if (components == 3)
        for (int c = 0; c < 3; c++) {
          h.mcu_w = std::max<int64_t>(h.mcu_w, 8 * (body[7 + 3 * c] >> 4));
          h.mcu_h = std::max<int64_t>(h.mcu_h, 8 * (body[7 + 3 * c] & 15));
        }
    } else if (marker == DRI && length == 4) {
      h.restart = body[0] << 8 | body[1];
    } else if (marker == SOS) {
      h.whole = length > 2 && body[0] == components, h.data_at = at + 2 + length;
      break;
    }
    at += 2 + length;
  }
  return components && h.data_at && h.height && h.width && h.height * h.width <= MOST;
}

bool ends(const uint8_t* f, int64_t n, int64_t from) {  // from the back: it should be the last marker
  for (int64_t at = n - 2; at >= from; at--)
    if (f[at] == 0xff && f[at + 1] == EOI) return true;
  return false;
}

struct Errors {
  jpeg_error_mgr manager;
  std::jmp_buf back;
};

[[noreturn]] void leave(j_common_ptr info) { std::longjmp(reinterpret_cast<Errors*>(info->err)->back, 1); }
// Bytes between the segments, which cut() puts there, are no damage.
void count_only(j_common_ptr info, int level) {
  info->err->num_warnings += level < 0 && info->err->msg_code != JWRN_EXTRANEOUS_DATA;
}
void say_nothing(j_common_ptr) {}

jpeg_error_mgr* quiet(Errors& errors) {
  jpeg_error_mgr* manager = jpeg_std_error(&errors.manager);
  manager->error_exit = leave, manager->emit_message = count_only, manager->output_message = say_nothing;
  return manager;
}

// libjpeg's own destination in memory leaves a pointer to freed memory behind an error.
struct Destination {
  jpeg_destination_mgr manager;
  std::vector<uint8_t> bytes;

  explicit Destination(size_t size) : bytes(size) {
    manager.init_destination = [](j_compress_ptr info) { of(info)->from(0); };
    manager.empty_output_buffer = [](j_compress_ptr info) -> boolean {
      const size_t full = of(info)->bytes.size();
      of(info)->bytes.resize(2 * full);
      of(info)->from(full);
      return TRUE;
    };
    manager.term_destination = [](j_compress_ptr info) {
      of(info)->bytes.resize(of(info)->bytes.size() - info->dest->free_in_buffer);
    };
  }
  static Destination* of(j_compress_ptr info) { return reinterpret_cast<Destination*>(info->dest); }
  void from(size_t at) {
    manager.next_output_byte = bytes.data() + at;
    manager.free_in_buffer = bytes.size() - at;
  }
};

// A thread's buffers, kept from image to image. The decompressor is each image's own: a file without tables would be
// decoded with those of the image before.
struct Decoder {
  Errors errors;
  jpeg_decompress_struct info{};
  std::vector<uint8_t> part, pixels;
};

// Cuts a sequential file with `across` restart segments to each row of MCUs down to `rows` times `columns` of them from
// `top` and `left` on: a file of its own, in `part`. False where the markers are not what they should be.
bool cut(const uint8_t* f, int64_t n, const Headers& h, int64_t across, int64_t top, int64_t rows, int64_t left,
         int64_t columns, std::vector<uint8_t>& part) {
  const int64_t width = std::min(columns * h.restart * h.mcu_w, h.width - left * h.restart * h.mcu_w);
  const int64_t height = std::min(rows * h.mcu_h, h.height - top * h.mcu_h);
  part.assign(f, f + h.data_at);
  for (int i = 0; i < 2; i++) {
    part[h.size_at + i] = uint8_t(height >> (8 - 8 * i));
    part[h.size_at + 2 + i] = uint8_t(width >> (8 - 8 * i));
  }
  // libjpeg-turbo reads 8 bytes ahead, and each block (MCU) where it meets a marker so once more and slowly; and all
  // blocks slowly where less than a few KiB are left
  constexpr uint8_t AHEAD[8] = {};
  constexpr size_t LEFT = 512 * D_MAX_BLOCKS_IN_MCU;
  int64_t segment = 0, begin = h.data_at, copied = 0;
  const int64_t last = (top + rows - 1) * across + left + columns - 1;
  for (int64_t at = begin; segment <= last;) {
    if (at >= n - 1) return false;  // a marker was the file's last
    const auto* found = static_cast<const uint8_t*>(std::memchr(f + at, 0xff, n - 1 - at));
    if (!found) return false;
    at = found - f;
    const int marker = f[at + 1];
    if (marker == 0 || marker == 0xff) {
      at += marker ? 1 : 2;
      continue;
    }
    if (marker != EOI && marker != RST0 + segment % 8) return false;
    if (marker == EOI && segment != last) return false;
    const int64_t column = segment % across;
    if (segment / across >= top && column >= left && column < left + columns) {
      if (copied) part.insert(part.end(), {0xff, uint8_t(RST0 + (copied - 1) % 8)});
      part.insert(part.end(), f + begin, f + at);
      part.insert(part.end(), AHEAD, AHEAD + sizeof AHEAD);
      copied++;
    }
    segment++, at += 2, begin = at;
  }
  part.insert(part.end(), {0xff, EOI});
  part.resize(part.size() + LEFT);
  return true;
}

// The rows and columns of `box` at least, of a file that lies in memory. Nothing here has a destructor: errors leave by
// longjmp.
bool decode(Decoder& d, const uint8_t* f, int64_t n, const int64_t box[4], int shrink, JpegPixels& out) {
  jpeg_decompress_struct& info = d.info;
  info.err = quiet(d.errors);
  jpeg_destroy_decompress(&info);  // where the image before ran out of memory
  if (setjmp(d.errors.back)) {
    jpeg_destroy_decompress(&info);
    return false;
  }
  jpeg_create_decompress(&info);
  jpeg_mem_src(&info, const_cast<unsigned char*>(f), n);  // older headers have no const
  jpeg_read_header(&info, TRUE);
  info.out_color_space = JCS_RGB, info.dct_method = JDCT_ISLOW, info.do_fancy_upsampling = TRUE;
  info.scale_num = 1, info.scale_denom = shrink;
  jpeg_start_decompress(&info);
  const int64_t height = info.output_height, width = info.output_width;
  // chroma is interpolated from its neighbours, so that a column or row at the edge of what is decoded would differ
  constexpr int64_t MARGIN = 2;
  const int64_t top = std::max<int64_t>(box[0] / shrink - MARGIN, 0);
  const int64_t bottom = std::min((box[0] + box[2] + shrink - 1) / shrink + MARGIN, height);
  const int64_t left = std::max<int64_t>(box[1] / shrink - MARGIN, 0);
  const int64_t right = std::min((box[1] + box[3] + shrink - 1) / shrink + MARGIN, width);
  JDIMENSION from = JDIMENSION(left), count = JDIMENSION(right - left);
  if (right - left < width) jpeg_crop_scanline(&info, &from, &count);
  if (top) jpeg_skip_scanlines(&info, JDIMENSION(top));
  const int64_t stride = int64_t(count) * 3;
  // resize() runs destructors of nothing, and throws past no C frame
  d.pixels.resize((bottom - top) * stride + 64);  // the resize reads behind the last
  while (info.output_scanline < bottom) {
    JSAMPROW rows[8];
    const int64_t at = info.output_scanline - top, most = std::min<int64_t>(8, bottom - info.output_scanline);
    for (int64_t r = 0; r < most; r++) rows[r] = d.pixels.data() + (at + r) * stride;
    if (!jpeg_read_scanlines(&info, rows, JDIMENSION(most))) break;
  }
  const bool fine = info.output_scanline >= bottom && !info.err->num_warnings;
  jpeg_destroy_decompress(&info);
  out = {d.pixels.data(), d.pixels.data() + d.pixels.size(), bottom - top, count, top, from, shrink};
  return fine;
}

}  // namespace

JpegSize jpeg_size(const uint8_t* file, int64_t bytes) {
  Headers h;
  return parse(file, bytes, h) && ends(file, bytes, h.data_at) ? JpegSize{h.height, h.width} : JpegSize{};
}

bool jpeg_decode(const uint8_t* file, int64_t bytes, const int64_t box[4], const int64_t enough[2], JpegPixels& out) {
  static thread_local Decoder decoder;
  Headers h;
  if (!parse(file, bytes, h) || box[0] + box[2] > h.height || box[1] + box[3] > h.width) return false;
  int shrink = 1;
  while (shrink < 8 && enough[0] && box[2] / (2 * shrink) >= enough[0] && box[3] / (2 * shrink) >= enough[1])
    shrink *= 2;
  const int64_t across = (h.width + h.mcu_w - 1) / h.mcu_w, down = (h.height + h.mcu_h - 1) / h.mcu_h;
  if (h.sequential && h.whole && h.restart && across % h.restart == 0) {
    const int64_t margin = 2 * shrink, step = h.mcu_w * h.restart;
    const int64_t top = std::max<int64_t>(box[0] - margin, 0) / h.mcu_h;
    const int64_t bottom = std::min((box[0] + box[2] + margin + h.mcu_h - 1) / h.mcu_h, down);
    const int64_t left = std::max<int64_t>(box[1] - margin, 0) / step;
    const int64_t right = std::min((box[1] + box[3] + margin + step - 1) / step, across / h.restart);
    const int64_t inner[4] = {box[0] - top * h.mcu_h, box[1] - left * step, box[2], box[3]};
    if (cut(file, bytes, h, across / h.restart, top, bottom - top, left, right - left, decoder.part) &&
        decode(decoder, decoder.part.data(), int64_t(decoder.part.size()), inner, shrink, out)) {
      out.top += top * h.mcu_h / shrink, out.left += left * step / shrink;
      return true;
    }
  }
  return decode(decoder, file, bytes, box, shrink, out);
}

std::vector<uint8_t> jpeg_restart(const uint8_t* file, int64_t bytes, int64_t pixels) {
  Headers h;
  if (!parse(file, bytes, h) || !ends(file, bytes, h.data_at)) return {};
  const int64_t across = (h.width + h.mcu_w - 1) / h.mcu_w, wanted = std::max<int64_t>(pixels / h.mcu_w, 1);
  int64_t interval = across;  // or that divisor of it which is nearest to what is wanted, in ratio
  for (int64_t i = 1; i < across; i++)
    if (across % i == 0 && std::max(i, wanted) * std::min(interval, wanted) <
                               std::max(interval, wanted) * std::min(i, wanted))
      interval = i;

  struct Both {
    Errors errors;
    jpeg_decompress_struct from{};
    jpeg_compress_struct to{};
    ~Both() {
      jpeg_destroy_compress(&to);
      jpeg_destroy_decompress(&from);
    }
  } both;
  Destination made(bytes + 4096);
  both.from.err = both.to.err = quiet(both.errors);
  if (setjmp(both.errors.back)) return {};
  jpeg_create_decompress(&both.from);
  jpeg_create_compress(&both.to);
  jpeg_mem_src(&both.from, const_cast<unsigned char*>(file), bytes);
  jpeg_save_markers(&both.from, JPEG_COM, 0xffff);
  for (int i = 0; i < 16; i++) jpeg_save_markers(&both.from, JPEG_APP0 + i, 0xffff);
  jpeg_read_header(&both.from, TRUE);
  jvirt_barray_ptr* coefficients = jpeg_read_coefficients(&both.from);
  both.to.dest = &made.manager;
  jpeg_copy_critical_parameters(&both.from, &both.to);
  both.to.optimize_coding = TRUE;
  both.to.restart_interval = unsigned(interval);
  both.to.write_JFIF_header = both.to.write_Adobe_marker = FALSE;  // they are among those that are copied
  jpeg_write_coefficients(&both.to, coefficients);
  for (jpeg_saved_marker_ptr m = both.from.marker_list; m; m = m->next)
    jpeg_write_marker(&both.to, m->marker, m->data, m->data_length);
  jpeg_finish_compress(&both.to);
  jpeg_finish_decompress(&both.from);
  if (both.errors.manager.num_warnings) return {};
  return made.bytes;
}

#else

JpegSize jpeg_size(const uint8_t*, int64_t) { return {}; }
bool jpeg_decode(const uint8_t*, int64_t, const int64_t*, const int64_t*, JpegPixels&) { return false; }
std::vector<uint8_t> jpeg_restart(const uint8_t*, int64_t, int64_t) { return {}; }

#endif

}  // namespace r50
