// Runs CUDA kernels on one CPU thread, slowly and suspiciously: threads are fibers that change at barriers and warp-wide
// instructions only, and every load and store of the kernels' own code is looked at. What stops a launch:
//   shared memory   outside of the block's; read before written; two threads' accesses of a byte, one of them a write,
//                   with no __syncthreads between them; touched while a cp.async into it is under way
//   global memory   (device_allocate's) outside of every buffer; read before written; one byte written by two blocks,
//                   or written by one and read by another
//   any memory      an access that is not aligned to its type
//   control         a barrier or warp-wide instruction that not all reach, or reach on different lines; a copy that is
//                   not waited for
// A cp.async lands as late as is allowed, in its thread's wait; until then its destination holds rubbish.
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <vector>

#include "cuda/dev.cuh"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

extern "C" void emulated_switch(void** save, void* load);
asm(R"(
.text
.globl emulated_switch
.type emulated_switch, @function
emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulated_switch, .-emulated_switch
)");

namespace {

using r50::emulated::Collective, r50::emulated::Line, r50::emulated::Matrices, r50::emulated::Product;

constexpr int WARP = 32, MAX_THREADS = 1024, STACK = 64 * 1024, MAX_SHARED = 227 * 1024;
constexpr uint32_t SHARED_START = 1024;  // the address of the first byte, as shared_address has it
constexpr size_t ARENA = size_t(1) << 30, GAP = 4096;
constexpr uint8_t RUBBISH = 0xcb;

enum class State { READY, BARRIER, COLLECTIVE, DONE };

struct Copy {
  uint32_t to;
  uint8_t bytes[16];
};

struct Thread {
  void* stack_pointer;
  State state;
  Line line;  // where it waits
  Collective what;
  const void* operands;
  std::vector<std::vector<Copy>> groups;  // of copies under way, the last one still open
};

struct Byte {  // of shared memory
  uint32_t written, read;  // epochs, which every barrier of the launch begins anew; 0: never
  uint16_t writer, reader;
  bool in_flight;
};
constexpr uint16_t SEVERAL = 0xffff;

// A byte of the arena: 0 outside of buffers, 1 uninitialised, 2 initialised, 3 + block: written in this launch by it.
constexpr uint32_t OUTSIDE = 0, UNINITIALISED = 1, INITIALISED = 2, WRITTEN = 3;

struct Buffer {
  size_t start, bytes;
};

struct Emulator {
  uint8_t *stacks, *shared, *arena;
  uint32_t* arena_state;
  std::vector<Byte> bytes = std::vector<Byte>(MAX_SHARED);
  std::vector<Thread> threads = std::vector<Thread>(MAX_THREADS);
  std::vector<Buffer> buffers;
  size_t arena_used = GAP;

  int current = -1, block_threads = 0, shared_bytes = 0;  // current < 0: the host runs
  uint32_t epoch = 0, block_epoch = 0, block = 0;
  void* host = nullptr;
  const std::function<void()>* kernel = nullptr;
  std::string error;

  int order = 0;  // of threads: 0 forward, 1 reverse, 2 shuffled anew each time
  std::mt19937 random{0};
  int multiprocessors = 4, shared_limit = MAX_SHARED;  // bytes, of a block
  int fastest = -1, measured = 0;  // of what is measured: which one takes no time, and how many there were
  int64_t conflicts = 0, multiplies = 0;  // of ldmatrix: passes beyond the first; mma instructions

  Emulator() {
    auto map = [](size_t bytes) {
      void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) abort();
      return static_cast<uint8_t*>(p);
    };
    stacks = map(size_t(MAX_THREADS) * STACK);
    shared = map(MAX_SHARED + 4096);
    arena = map(ARENA);
    arena_state = reinterpret_cast<uint32_t*>(map(ARENA * sizeof(uint32_t)));
  }

  Thread& self() { return threads[current]; }
  bool in_arena(const void* p) const { return p >= arena && p < arena + ARENA; }
  bool in_shared(const void* p) const { return p >= shared && p < shared + MAX_SHARED + 4096; }

  [[noreturn]] void fail(const std::string& what, const std::string& where) {
    if (error.empty())
      error = what + " at " + where + ", thread " + std::to_string(current) + " of block (" +
              std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + ")";
    void* dropped;
    emulated_switch(&dropped, host);
    abort();
  }
  static std::string place(Line line) {
    const char* name = strrchr(line.file, '/');
    return std::string(name ? name + 1 : line.file) + ":" + std::to_string(line.line);
  }
  static std::string place(const void* code) {
    Dl_info info{};
    char text[64];
    dladdr(code, &info);
    snprintf(text, sizeof text, "+%#zx", size_t(static_cast<const char*>(code) - static_cast<char*>(info.dli_fbase)) - 1);
    return text;
  }

  void yield(State state, Line line) {
    self().state = state, self().line = line;
    emulated_switch(&self().stack_pointer, host);
  }

  // ---------------------------------------------------------------------------------------------- memory

  template <class Where>
  void shared_read(size_t at, size_t bytes, int thread, Where where) {
    inside(at, bytes, where);
    for (size_t i = at; i < at + bytes; i++) {
      Byte& b = this->bytes[i];
      if (b.in_flight) fail("shared memory read while a cp.async into it is under way, byte " + std::to_string(i), place(where));
      if (b.written < block_epoch) fail("uninitialised shared memory read, byte " + std::to_string(i), place(where));
      if (b.written == epoch && b.writer != thread)
        fail("race in shared memory: read of byte " + std::to_string(i) + ", which thread " + std::to_string(b.writer) +
                 " wrote since the last barrier",
             place(where));
      b.reader = b.read == epoch && b.reader != thread ? SEVERAL : uint16_t(thread);
      b.read = epoch;
    }
  }
  template <class Where>
  void shared_write(size_t at, size_t bytes, int thread, Where where) {
    inside(at, bytes, where);
    for (size_t i = at; i < at + bytes; i++) {
      Byte& b = this->bytes[i];
      if (b.in_flight) fail("shared memory written while a cp.async into it is under way, byte " + std::to_string(i), place(where));
      const bool read = b.read == epoch && b.reader != thread, written = b.written == epoch && b.writer != thread;
      if (read || written)
        fail("race in shared memory: write of byte " + std::to_string(i) + ", which " +
                 (read ? "another thread read" : "thread " + std::to_string(b.writer) + " wrote") +
                 " since the last barrier",
             place(where));
      b.written = epoch, b.writer = uint16_t(thread);
    }
  }
  template <class Where>
  void inside(size_t at, size_t bytes, Where where) {
    if (at + bytes > size_t(shared_bytes))
      fail("outside of shared memory: byte " + std::to_string(at) + " of " + std::to_string(shared_bytes), place(where));
  }

  template <class Where>
  void global_read(size_t at, size_t bytes, Where where) {
    for (size_t i = at; i < at + bytes; i++) {
      const uint32_t state = arena_state[i];
      if (state == OUTSIDE) fail("global memory read outside of every buffer" + nearest(i), place(where));
      if (state == UNINITIALISED) fail("uninitialised global memory read" + nearest(i), place(where));
      if (state >= WRITTEN && state != WRITTEN + block)
        fail("race in global memory: read of what another block wrote" + nearest(i), place(where));
    }
  }
  template <class Where>
  void global_write(size_t at, size_t bytes, Where where) {
    for (size_t i = at; i < at + bytes; i++) {
      uint32_t& state = arena_state[i];
      if (state == OUTSIDE) fail("global memory written outside of every buffer" + nearest(i), place(where));
      if (state >= WRITTEN && state != WRITTEN + block)
        fail("race in global memory: two blocks write one byte" + nearest(i), place(where));
      state = WRITTEN + block;
    }
  }
  std::string nearest(size_t at) const {
    for (const Buffer& b : buffers)
      if (at + GAP / 2 >= b.start && at < b.start + b.bytes + GAP / 2)
        return ", byte " + std::to_string(int64_t(at) - int64_t(b.start)) + " of " + std::to_string(b.bytes);
    return "";
  }

  void access(const void* p, size_t bytes, bool write, const void* code) {
    if (current < 0) return;
    if (in_shared(p)) {
      const size_t at = static_cast<const uint8_t*>(p) - shared;
      write ? shared_write(at, bytes, current, code) : shared_read(at, bytes, current, code);
    } else if (in_arena(p)) {
      const size_t at = static_cast<const uint8_t*>(p) - arena;
      write ? global_write(at, bytes, code) : global_read(at, bytes, code);
    } else if (reinterpret_cast<uintptr_t>(p) < 4096) {
      fail("access through a null pointer", place(code));
    }
  }

  // ---------------------------------------------------------------------------------------------- a block

  static void enter() {
    Emulator& e = get();
    (*e.kernel)();
    if (!e.self().groups.back().empty() || e.self().groups.size() > 1) {
      for (const auto& group : e.self().groups)
        if (!group.empty()) e.fail("a cp.async that its thread never waits for", "the kernel's end");
    }
    e.self().state = State::DONE;
    emulated_switch(&e.self().stack_pointer, e.host);
    abort();
  }

  void run_block() {
    block_epoch = ++epoch;
    for (int t = 0; t < block_threads; t++) {
      auto* top = reinterpret_cast<void**>(stacks + size_t(t + 1) * STACK) - 2;
      *top = reinterpret_cast<void*>(&enter);
      threads[t] = Thread{top - 6, State::READY, {}, {}, nullptr, {{}}};
    }
    for (int i = 0; i < shared_bytes; i++) bytes[i].in_flight = false;
    std::vector<int> ready;
    while (error.empty()) {
      ready.clear();
      int done = 0, waiting = 0;
      for (int t = 0; t < block_threads; t++) {
        if (threads[t].state == State::READY) ready.push_back(t);
        done += threads[t].state == State::DONE;
        waiting += threads[t].state == State::BARRIER;
      }
      if (done == block_threads) return;
      if (ready.empty()) {
        if (waiting + done < block_threads) return stuck("deadlock");
        if (done) return stuck("a barrier that not all threads of the block reach");
        for (int t = 1; t < block_threads; t++)
          if (threads[t].line.line != threads[0].line.line) return stuck("barriers on different lines");
        epoch++;
        for (int t = 0; t < block_threads; t++) threads[t].state = State::READY;
        continue;
      }
      if (order == 1) std::reverse(ready.begin(), ready.end());
      if (order == 2) std::shuffle(ready.begin(), ready.end(), random);
      for (int t : ready) {
        current = t;
        threadIdx = {unsigned(t), 0, 0};
        emulated_switch(&host, threads[t].stack_pointer);
        current = -1;
        if (!error.empty()) return;
      }
    }
  }
  void stuck(const char* what) {
    std::map<std::string, int> places;
    for (int t = 0; t < block_threads; t++)
      places[threads[t].state == State::DONE ? "the kernel's end" : place(threads[t].line)]++;
    error = what;
    for (const auto& [name, count] : places) error += ", " + std::to_string(count) + " threads at " + name;
  }

  // ---------------------------------------------------------------------------------------------- warps

  void collective(Collective what, const void* operands, Line line) {
    const int first = current / WARP * WARP;
    self().what = what, self().operands = operands;
    int arrived = 1;
    for (int t = first; t < first + WARP; t++) {
      if (t == current) continue;
      if (threads[t].state == State::DONE) fail("a warp-wide instruction that a lane has left", place(line));
      if (threads[t].state != State::COLLECTIVE) continue;
      if (threads[t].what != what || threads[t].line.line != line.line)
        fail("a warp that diverges: lanes at " + place(threads[t].line), place(line));
      arrived++;
    }
    if (arrived < WARP) return yield(State::COLLECTIVE, line);
    if (what == Collective::LDMATRIX)
      ldmatrix(first, line);
    else
      multiply(first, what, line);
    for (int t = first; t < first + WARP; t++) threads[t].state = State::READY;
  }

  void ldmatrix(int first, Line line) {
    for (int matrix = 0; matrix < 4; matrix++) {
      int banks[32] = {};
      for (int row = 0; row < 8; row++) {
        const int lane = first + 8 * matrix + row;
        const uint32_t from = static_cast<const Matrices*>(threads[lane].operands)->from;
        if (from % 16) fail("ldmatrix of a row that is not aligned to 16 bytes", place(line));
        shared_read(from - SHARED_START, 16, lane, line);
        for (int word = 0; word < 4; word++) {
          banks[(from / 4 + word) % 32]++;
          std::memcpy(&static_cast<const Matrices*>(threads[first + 4 * row + word].operands)->result[matrix],
                      shared + from - SHARED_START + 4 * word, 4);
        }
      }
      conflicts += *std::max_element(banks, banks + 32) - 1;
    }
  }

  // The fragments of the PTX manual: lane = 4 * group + member holds, of a row or column `group`, bytes 4 * member on.
  void multiply(int first, Collective what, Line line) {
    multiplies++;
    const bool sparse = what == Collective::MMA_SPARSE_S8U8;
    uint8_t a[16][32], b[8][64];
    for (int lane = 0; lane < WARP; lane++) {
      const auto* p = static_cast<const Product*>(threads[first + lane].operands);
      const int group = lane / 4, member = lane % 4;
      for (int i = 0; i < 4; i++) std::memcpy(&a[group + i % 2 * 8][i / 2 * 16 + member * 4], &p->a[i], 4);
      for (int i = 0; i < (sparse ? 4 : 2); i++) std::memcpy(&b[group][i * 16 + member * 4], &p->b[i], 4);
    }
    int32_t sums[16][8];
    double products[16][8];
    if (what == Collective::MMA_U8S8) {
      for (int m = 0; m < 16; m++)
        for (int n = 0; n < 8; n++) {
          int32_t sum = 0;
          for (int k = 0; k < 32; k++) sum += int(a[m][k]) * int(int8_t(b[n][k]));
          sums[m][n] = sum;
        }
    } else if (sparse) {
      for (int m = 0; m < 16; m++) {
        int place[32];  // of what is kept
        for (int i = 0; i < 32; i++) {
          const auto* p = static_cast<const Product*>(threads[first + m % 8 * 4 + i / 16 * 2 + m / 8].operands);
          place[i] = i / 2 * 4 + int(p->kept >> i % 16 * 2 & 3);
          if (i % 2 && place[i] <= place[i - 1]) fail("mma.sp with places that are not in order", Emulator::place(line));
        }
        for (int n = 0; n < 8; n++) {
          sums[m][n] = 0;
          for (int i = 0; i < 32; i++) sums[m][n] += int(int8_t(a[m][i])) * int(b[n][place[i]]);
        }
      }
    } else {
      float x[16][16], y[8][16];
      auto widen = [&](const uint8_t* from, float* to) {
        for (int k = 0; k < 16; k++) {
          uint16_t half;
          std::memcpy(&half, from + 2 * k, 2);
          to[k] = what == Collective::MMA_F16 ? r50::emulated::from_f16(half) : r50::unpack_bf16(half);
        }
      };
      for (int m = 0; m < 16; m++) widen(a[m], x[m]);
      for (int n = 0; n < 8; n++) widen(b[n], y[n]);
      for (int m = 0; m < 16; m++)
        for (int n = 0; n < 8; n++) {
          double sum = 0;
          for (int k = 0; k < 16; k++) sum += double(x[m][k]) * double(y[n][k]);
          products[m][n] = sum;
        }
    }
    for (int lane = 0; lane < WARP; lane++) {
      const auto* p = static_cast<const Product*>(threads[first + lane].operands);
      for (int i = 0; i < 4; i++) {
        const int m = lane / 4 + i / 2 * 8, n = lane % 4 * 2 + i % 2;
        if (what == Collective::MMA_U8S8 || sparse)
          static_cast<int32_t*>(p->d)[i] = int32_t(uint32_t(static_cast<int32_t*>(p->d)[i]) + uint32_t(sums[m][n]));
        else
          static_cast<float*>(p->d)[i] = float(double(static_cast<float*>(p->d)[i]) + products[m][n]);
      }
    }
  }

  // ---------------------------------------------------------------------------------------------- copies

  void copy_async(uint32_t to, const void* from, bool valid, Line line) {
    if (to % 16 || reinterpret_cast<uintptr_t>(from) % 16) fail("cp.async of 16 bytes that are not aligned", place(line));
    Copy copy{to, {}};
    const size_t source = static_cast<const uint8_t*>(from) - arena;
    // also where nothing is read: what checks a GPU's accesses may look at the address all the same
    if (in_arena(from) && arena_state[source] == OUTSIDE)
      fail("cp.async from outside of every buffer" + nearest(source), place(line));
    if (valid) {
      if (in_arena(from)) global_read(source, 16, line);
      std::memcpy(copy.bytes, from, 16);
    }
    const size_t at = to - SHARED_START;
    shared_write(at, 16, current, line);
    std::memset(shared + at, RUBBISH, 16);
    for (int i = 0; i < 16; i++) bytes[at + i].in_flight = true;
    self().groups.back().push_back(copy);
  }
  void wait(int pending) {  // the open group, which is not committed, stays
    auto& groups = self().groups;
    while (int(groups.size()) - 1 > pending) {
      for (const Copy& copy : groups.front()) {
        const size_t at = copy.to - SHARED_START;
        std::memcpy(shared + at, copy.bytes, 16);
        for (int i = 0; i < 16; i++)
          bytes[at + i].in_flight = false, bytes[at + i].written = epoch, bytes[at + i].writer = uint16_t(current);
      }
      groups.erase(groups.begin());
    }
  }

  void launch(dim3 grid, int count, int bytes, const std::function<void()>& function) {
    if (count < 1 || count > MAX_THREADS || count % WARP || bytes < 0 || bytes > shared_limit || grid.y > 65535 ||
        grid.z > 65535 || !grid.x || !grid.y || !grid.z)
      throw std::runtime_error("CUDA: invalid configuration argument");
    gridDim = grid, blockDim = dim3(unsigned(count)), block_threads = count, shared_bytes = bytes, kernel = &function;
    error.clear();
    block = 0;
    for (unsigned z = 0; z < grid.z; z++)
      for (unsigned y = 0; y < grid.y; y++)
        for (unsigned x = 0; x < grid.x && error.empty(); x++, block++) {
          blockIdx = {x, y, z};
          run_block();
        }
    current = -1;
    for (const Buffer& b : buffers)
      for (size_t i = b.start; i < b.start + b.bytes; i++)
        if (arena_state[i] >= WRITTEN) arena_state[i] = INITIALISED;
    if (!error.empty()) throw std::runtime_error(error);
  }

  static Emulator& get() {
    static Emulator emulator;
    return emulator;
  }
};

}  // namespace

// ------------------------------------------------------------------------------------------------- cuda/dev.cuh

namespace r50 {

int multiprocessors() { return Emulator::get().multiprocessors; }
int shared_memory() { return Emulator::get().shared_limit; }
bool is_recorded(CUstream_st*) { return Emulator::get().fastest < 0; }
float next_time() {
  Emulator& e = Emulator::get();
  return float(std::abs(e.measured++ - e.fastest));
}
uint32_t shared_address(const void* p) {
  return SHARED_START + uint32_t(static_cast<const uint8_t*>(p) - Emulator::get().shared);
}

namespace emulated {

unsigned char* shared_memory() { return Emulator::get().shared; }
void barrier(Line line) { Emulator::get().yield(State::BARRIER, line); }
void collective(Collective what, const void* operands, Line line) { Emulator::get().collective(what, operands, line); }
void copy_async(uint32_t to, const void* from, bool valid, Line line) {
  Emulator::get().copy_async(to, from, valid, line);
}
void commit() { Emulator::get().self().groups.emplace_back(); }
void wait(int pending) { Emulator::get().wait(pending); }
void run(dim3 grid, int block, int shared, const std::function<void()>& kernel) {
  Emulator::get().launch(grid, block, shared, kernel);
}

uint16_t to_f16(float x) { return std::isnan(x) ? 0x7fff : std::bit_cast<uint16_t>(_Float16(x)); }
float from_f16(uint16_t x) { return float(std::bit_cast<_Float16>(x)); }
uint16_t to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return std::isnan(x) ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulated
}  // namespace r50

// ----------------------------------------------------------------------------------------- what g++ calls in kernels

#define ACCESS(name, bytes, write)               \
  extern "C" void __tsan_##name(void* p) {       \
    Emulator::get().access(p, bytes, write, __builtin_return_address(0)); \
  }
ACCESS(read1, 1, false)
ACCESS(read2, 2, false)
ACCESS(read4, 4, false)
ACCESS(read8, 8, false)
ACCESS(read16, 16, false)
ACCESS(write1, 1, true)
ACCESS(write2, 2, true)
ACCESS(write4, 4, true)
ACCESS(write8, 8, true)
ACCESS(write16, 16, true)
ACCESS(unaligned_read2, 2, false)
ACCESS(unaligned_read4, 4, false)
ACCESS(unaligned_read8, 8, false)
ACCESS(unaligned_read16, 16, false)
ACCESS(unaligned_write2, 2, true)
ACCESS(unaligned_write4, 4, true)
ACCESS(unaligned_write8, 8, true)
ACCESS(unaligned_write16, 16, true)
extern "C" {
void __tsan_read_range(void* p, long bytes) { Emulator::get().access(p, size_t(bytes), false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, long bytes) { Emulator::get().access(p, size_t(bytes), true, __builtin_return_address(0)); }
uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) { return *p; }  // of the host's static variables
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
// -fsanitize=alignment: g++ splits a 16-byte access that it knows to be unaligned, so the hooks above do not see it
void __ubsan_handle_type_mismatch_v1(void*, void* p) {
  Emulator& e = Emulator::get();
  if (e.current >= 0) e.fail("an access that is not aligned", Emulator::place(__builtin_return_address(0)));
  (void)p;
}

// ---------------------------------------------------------------------------------------------- the tests' face

void* device_allocate(size_t bytes, const void* contents) {
  Emulator& e = Emulator::get();
  if (e.arena_used + bytes + 2 * GAP > ARENA) return nullptr;
  const size_t start = e.arena_used;
  e.arena_used = (start + bytes + GAP + 255) / 256 * 256;
  e.buffers.push_back({start, bytes});
  std::fill_n(e.arena_state + start, bytes, contents ? INITIALISED : UNINITIALISED);
  if (contents) std::memcpy(e.arena + start, contents, bytes);
  return e.arena + start;
}
// -> how many of the bytes nothing has been written to
size_t device_read(const void* from, size_t bytes, void* to) {
  Emulator& e = Emulator::get();
  const size_t start = static_cast<const uint8_t*>(from) - e.arena;
  std::memcpy(to, from, bytes);
  return size_t(std::count(e.arena_state + start, e.arena_state + start + bytes, UNINITIALISED));
}
void device_reset() {
  Emulator& e = Emulator::get();
  for (const Buffer& b : e.buffers) std::fill_n(e.arena_state + b.start, b.bytes, OUTSIDE);
  e.buffers.clear();
  e.arena_used = GAP;
  e.conflicts = e.multiplies = 0;
}
void device_order(int order, unsigned seed) {
  Emulator::get().order = order;
  Emulator::get().random.seed(seed);
}
void device_multiprocessors(int count) { Emulator::get().multiprocessors = count; }
void device_fastest(int which) {
  Emulator::get().fastest = which;
  Emulator::get().measured = 0;
}
int device_measured() { return Emulator::get().measured; }
int device_threads() { return Emulator::get().block_threads; }  // of the last launch
int device_shared() { return Emulator::get().shared_bytes; }
void device_shared_limit(int bytes) { Emulator::get().shared_limit = bytes; }
int64_t device_conflicts() { return Emulator::get().conflicts; }
int64_t device_multiplies() { return Emulator::get().multiplies; }
}
