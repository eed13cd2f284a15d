// The threads are OpenMP's, the same that PyTorch's operations use: others would have to share the cores with them,
// since they go on spinning for milliseconds after an operation.
#pragma once
#include <atomic>
#include <functional>

namespace r50 {

// Runs body(thread, threads) for thread = 0 ... threads - 1 at the same time, the caller being thread 0, and waits.
// Where another caller is in it, or so many threads cannot be had, body(0, 1) runs alone: bodies take the count that
// they are given. The first exception is rethrown.
void parallel(int threads, const std::function<void(int thread, int threads)>& body);

// All `threads` bodies of one parallel() meet here. A body that leaves by an exception calls abandon() on its way, or
// the others would wait for it for ever.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  [[nodiscard]] bool wait();  // false: the barrier is abandoned, the body has to return
  void abandon();

 private:
  static constexpr int ABANDONED = -1;
  const int threads_;
  std::atomic<int> arrived_{0}, round_{0};
};

}  // namespace r50
