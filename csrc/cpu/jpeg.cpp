#include "jpeg.h"

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstring>

#ifdef USE_LIBJPEG
#include <jpeglib.h>

#include "huffman.h"
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
void count_only(j_common_ptr info, int level) { info->err->num_warnings += level < 0; }
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

// The restart segments under a box, as an image of their own, and how far libjpeg has come in it.
struct Segments {
  std::vector<uint8_t> header, bytes;
  std::vector<Segment> list;
  int64_t decoded;
  Scan scan;
  HuffmanTable tables[2 * NUM_HUFF_TBLS];  // of DC and of AC coefficients
  std::vector<JCOEF> coefficients;         // of as many as are decoded together
  const JCOEF *next, *end;                 // what libjpeg has not got of these
};

// A thread's buffers, kept from image to image. The decompressor is each image's own: a file without tables would be
// decoded with those of the image before.
struct Decoder {
  Errors errors;
  jpeg_decompress_struct info{};
  Segments segments;
  std::vector<uint8_t> pixels;
};

// The segments of a sequential file with `down` rows of `across`: those in [top, bottom) and [left, right). False where
// the markers are not what they should be.
bool find_segments(const uint8_t* f, int64_t n, const Headers& h, int64_t down, int64_t across, int64_t top,
                   int64_t bottom, int64_t left, int64_t right, Segments& s) {
  const int64_t step = h.restart * h.mcu_w;
  const int64_t height = std::min(bottom * h.mcu_h, h.height) - top * h.mcu_h;
  const int64_t width = std::min(right * step, h.width) - left * step;
  s.header.assign(f, f + h.data_at);
  for (int i = 0; i < 2; i++) {
    s.header[h.size_at + i] = uint8_t(height >> (8 - 8 * i));
    s.header[h.size_at + 2 + i] = uint8_t(width >> (8 - 8 * i));
  }
  s.header.insert(s.header.end(), {0xff, EOI});
  s.list.clear();
  const int64_t most = n - h.data_at + SEGMENT_AHEAD;
  if (int64_t(s.bytes.size()) < most) s.bytes.resize(most);
  uint8_t* to = s.bytes.data();
  int64_t at = h.data_at, segment = 0;
  for (int64_t y = 0; y < bottom; y++)
    for (int64_t x = 0; x < across; x++, segment++) {
      const bool wanted = y >= top && x >= left && x < right;
      uint8_t* const begin = to;
      int marker = 0;  // none, but a 255 with its zero
      while (!marker) {
        const void* found = at < n - 1 ? std::memchr(f + at, 0xff, n - 1 - at) : nullptr;
        if (!found) return false;
        const int64_t more = static_cast<const uint8_t*>(found) - f - at;
        marker = f[at + more + 1];
        if (wanted) std::memcpy(to, f + at, more + !marker), to += more + !marker;
        at += more + 2;
      }
      if (marker != (y == down - 1 && x == across - 1 ? EOI : RST0 + segment % 8)) return false;
      if (wanted) s.list.push_back({begin, to});
    }
  return true;
}

}  // namespace
}  // namespace r50

// What libjpeg calls for each MCU, for this begins so in all its versions, though in no header that is installed.
struct jpeg_entropy_decoder {
  void (*start_pass)(j_decompress_ptr);
  boolean (*decode_mcu)(j_decompress_ptr, JBLOCKROW*);
};

namespace r50 {
namespace {

// In its place: what decode_segments makes of some segments at a time
boolean next_mcu(j_decompress_ptr info, JBLOCKROW* to) {
  Segments& s = *static_cast<Segments*>(info->client_data);
  if (s.next == s.end) {
    const int64_t of_one = s.scan.coefficients();
    const int64_t count = std::min(int64_t(s.coefficients.size()) / of_one, int64_t(s.list.size()) - s.decoded);
    std::memset(s.coefficients.data(), 0, count * of_one * sizeof(JCOEF));
    if (!decode_segments(s.scan, s.list.data() + s.decoded, count, s.coefficients.data())) return FALSE;
    s.decoded += count, s.next = s.coefficients.data(), s.end = s.next + count * of_one;
  }
  for (int b = 0; b < s.scan.blocks; b++, s.next += DCTSIZE2)
    if (to) std::memcpy(to[b], s.next, sizeof(JBLOCK));
  return TRUE;
}

bool take_over(jpeg_decompress_struct& info, Segments& s) {
  const int64_t mcus = int64_t(info.MCUs_per_row) * info.MCU_rows_in_scan;
  if (mcus != int64_t(s.list.size()) * info.restart_interval) return false;
  s.scan.interval = int(info.restart_interval), s.scan.blocks = info.blocks_in_MCU;
  bool made[2 * NUM_HUFF_TBLS] = {};
  const auto table = [&](JHUFF_TBL* const* from, int number, bool dc) -> const HuffmanTable* {
    const int i = number + (dc ? 0 : NUM_HUFF_TBLS);
    if (!made[i]) made[i] = s.tables[i].set(from[number]->bits, from[number]->huffval, dc);
    return made[i] ? &s.tables[i] : nullptr;
  };
  for (int b = 0; b < info.blocks_in_MCU; b++) {
    s.scan.component[b] = info.MCU_membership[b];
    const jpeg_component_info& c = *info.cur_comp_info[info.MCU_membership[b]];
    s.scan.dc[b] = table(info.dc_huff_tbl_ptrs, c.dc_tbl_no, true);
    s.scan.ac[b] = table(info.ac_huff_tbl_ptrs, c.ac_tbl_no, false);
    if (!s.scan.dc[b] || !s.scan.ac[b]) return false;
  }
  constexpr int64_t TOGETHER = 1 << 15;  // coefficients: within L2
  s.coefficients.resize(s.scan.coefficients() * std::max(TOGETHER / s.scan.coefficients(), SEGMENTS_AT_ONCE));
  s.next = s.end = nullptr, s.decoded = 0;
  info.client_data = &s, info.entropy->decode_mcu = next_mcu;
  return true;
}

// The rows and columns of `box` at least, of a file that lies in memory, or of its segments and their header. Nothing
// here has a destructor: errors leave by longjmp.
bool decode(Decoder& d, const uint8_t* f, int64_t n, bool segments, const int64_t box[4], int shrink,
            JpegPixels& out) {
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
  if (segments && !take_over(info, d.segments)) {
    jpeg_destroy_decompress(&info);
    return false;
  }
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
    Segments& s = decoder.segments;
    if (find_segments(file, bytes, h, down, across / h.restart, top, bottom, left, right, s) &&
        decode(decoder, s.header.data(), int64_t(s.header.size()), true, inner, shrink, out)) {
      out.top += top * h.mcu_h / shrink, out.left += left * step / shrink;
      return true;
    }
  }
  return decode(decoder, file, bytes, false, box, shrink, out);
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
