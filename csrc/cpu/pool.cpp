#include "pool.h"

#include <pthread.h>

#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace r50 {
namespace {

constexpr int ACTIVE = 1 << 10;  // a round's number times this, plus how many threads take part in it
constexpr int SPINS =
    4000;  // some 50 to 100 us: longer than the gap between two layers, shorter than a scheduler's tick

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
  value.wait(old, std::memory_order_acquire);
}

struct Pool {
  std::mutex busy;
  std::vector<std::thread> workers;
  std::atomic<int> round{0}, left{0};
  const std::function<void(int, int)>* body = nullptr;
  std::exception_ptr error;
  std::mutex error_mutex;

  void call(int thread, int threads) {
    try {
      (*body)(thread, threads);
    } catch (...) {
      std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  }
  void work(int thread, int seen) {
    for (;;) {
      wait_while(round, seen);
      seen = round.load(std::memory_order_acquire);
      if (const int active = seen % ACTIVE; thread < active) {
        call(thread, active);
        if (left.fetch_sub(1, std::memory_order_acq_rel) == 1) left.notify_one();
      }
    }
  }
};

Pool* pool = new Pool;  // never destroyed: workers may still wait when the process ends

// A forked child has the memory but not the threads; it starts a pool of its own.
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });

}  // namespace

void parallel(int threads, const std::function<void(int, int)>& body) {
  if (threads <= 1) return body(0, 1);  // also from within a body, whose thread may hold the lock
  Pool& p = *pool;
  std::unique_lock<std::mutex> lock(p.busy, std::try_to_lock);
  threads = threads < ACTIVE ? threads : ACTIVE - 1;
  if (!lock.owns_lock()) return body(0, 1);
  while (int(p.workers.size()) < threads - 1) {
    const int thread = int(p.workers.size()) + 1;
    p.workers.emplace_back(&Pool::work, &p, thread, p.round.load());
    p.workers.back().detach();
  }
  p.body = &body;
  p.error = nullptr;
  p.left.store(threads - 1, std::memory_order_relaxed);
  p.round.store((p.round.load() / ACTIVE + 1) % ACTIVE * ACTIVE + threads, std::memory_order_release);
  p.round.notify_all();
  p.call(0, threads);
  for (int left; (left = p.left.load(std::memory_order_acquire)) != 0;) wait_while(p.left, left);
  if (p.error) std::rethrow_exception(p.error);
}

bool Barrier::wait() {
  const int round = round_.load(std::memory_order_acquire);
  if (round == ABANDONED) return false;
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
    arrived_.store(0, std::memory_order_relaxed);
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

}  // namespace r50
