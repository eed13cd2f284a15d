#include "pool.h"

#include <sched.h>

#include <algorithm>
#include <exception>
#include <mutex>

#ifdef RESNET50_EMULATED
#include <thread>
#include <vector>
#else
#include <omp.h>
#include <pthread.h>
#endif

namespace r50 {
namespace {

constexpr int SPINS = 4000;   // 50 to 200 us: longer than the gap between two layers, shorter than a scheduler's tick
constexpr int YIELDS = 4000;  // some ms: longer than a virtual CPU that was halted takes to go on

constexpr uint32_t FEWEST_UNITS = 2;  // in a piece, whose beginning and end cost time

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

void wait_while(std::atomic<int>& value, int old) {
  for (int i = 0; i < SPINS; i++) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  for (int i = 0; i < YIELDS; i++) {
    if (value.load(std::memory_order_acquire) != old) return;
    sched_yield();
  }
  value.wait(old, std::memory_order_acquire);
}

std::mutex busy;
thread_local bool has_team = false, lost_team = false;

#ifdef RESNET50_EMULATED  // threads that a sanitizer sees begin and end
template <class Body>
void team(int threads, Body&& body) {
  std::vector<std::thread> others;
  for (int i = 1; i < threads; i++) others.emplace_back([&, i] { body(i, threads); });
  body(0, threads);
  for (auto& other : others) other.join();
}
#else
// The CPUs of a team. Where CPUs share no cache, as in many virtual machines, Linux wakes a thread that has slept for
// long on the CPU of the one that wakes it, and both take turns there, tens of milliseconds long. A thread that finds
// its CPU taken goes to another, from where it may be moved again as ever.
class Cpus {
#ifdef __linux__
  std::atomic<uint64_t> taken_[CPU_SETSIZE / 64] = {};

 public:
  bool take() {
    const int cpu = sched_getcpu();
    if (cpu < 0 || cpu >= CPU_SETSIZE) return true;
    const uint64_t bit = uint64_t(1) << cpu % 64;
    return !(taken_[cpu / 64].fetch_or(bit) & bit);
  }
  void settle() {
    cpu_set_t allowed;
    if (take() || sched_getaffinity(0, sizeof allowed, &allowed)) return;
    cpu_set_t free = allowed;
    for (int i = 0; i < CPU_SETSIZE; i++)
      if (taken_[i / 64] >> i % 64 & 1) CPU_CLR(i, &free);
    if (!CPU_COUNT(&free) || sched_setaffinity(0, sizeof free, &free)) return;
    sched_setaffinity(0, sizeof allowed, &allowed);
    take();
  }
#else
 public:
  void take() {}
  void settle() {}
#endif
};

template <class Body>
void team(int threads, Body&& body) {
  has_team = true;
  Cpus cpus;
  cpus.take();
#pragma omp parallel num_threads(threads)
  if (omp_get_num_threads() == threads) {
    if (omp_get_thread_num()) cpus.settle();
    body(omp_get_thread_num(), threads);
  } else if (omp_get_thread_num() == 0)
    body(0, 1);
}

// A forked child has the memory but not the threads, and OpenMP would wait for those of the thread that forked.
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { lost_team = has_team; });
#endif

}  // namespace

void parallel(int threads, const std::function<void(int, int)>& body) {
  std::unique_lock<std::mutex> lock(busy, std::defer_lock);
  // also from within a body, whose thread may hold the lock
  if (threads <= 1 || lost_team || !lock.try_lock()) return body(0, 1);
  std::exception_ptr error;
  std::mutex error_mutex;
  team(threads, [&](int thread, int count) {
    try {
      body(thread, count);
    } catch (...) {
      std::lock_guard<std::mutex> guard(error_mutex);
      if (!error) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

bool Barrier::wait(const std::function<void()>& last) {
  const int round = round_.load(std::memory_order_acquire);
  if (round == ABANDONED) return false;
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
    arrived_.store(0, std::memory_order_relaxed);
    if (last) last();
    round_.fetch_add(1, std::memory_order_acq_rel);
    round_.notify_all();
  } else {
    wait_while(round_, round);
  }
  return round_.load(std::memory_order_acquire) != ABANDONED;
}

void Barrier::abandon() {  // whoever does has not arrived, so nobody is about to begin the next round
  round_.store(ABANDONED, std::memory_order_release);
  round_.notify_all();
}

void Shares::begin(int count) {
  const int threads = int(parts_.size());
  for (int i = 0; i < threads; i++) {
    const uint64_t first = uint64_t(count) * i / threads, end = uint64_t(count) * (i + 1) / threads;
    parts_[i].piece = uint32_t(2 * (end - first) + 2) / 3;
    parts_[i].left.store(end << 32 | first, std::memory_order_relaxed);
  }
}

bool Shares::take(Part& part, bool own, int& first, int& last) {
  uint64_t left = part.left.load(std::memory_order_relaxed), rest;
  do {
    const uint32_t begin = uint32_t(left), end = uint32_t(left >> 32), count = end - begin;
    if (!count) return false;
    const uint32_t piece = std::min(count, std::max(FEWEST_UNITS, own ? part.piece : count - count / 2));
    first = int(own ? begin : end - piece), last = first + int(piece);
    rest = own ? uint64_t(end) << 32 | uint32_t(last) : uint64_t(first) << 32 | begin;
  } while (!part.left.compare_exchange_weak(left, rest, std::memory_order_relaxed));
  return true;
}

bool Shares::take(int thread, int& first, int& last) {
  const int threads = int(parts_.size());
  for (int i = 0; i < threads; i++)
    if (take(parts_[(thread + i) % threads], i == 0, first, last)) return true;
  return false;
}

}  // namespace r50
