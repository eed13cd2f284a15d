// A few threads that wait for work by spinning briefly, so that handing a layer over costs about a microsecond.
#pragma once
#include <atomic>
#include <functional>

namespace r50 {

// Runs body(thread, threads) for thread = 0 ... threads - 1 at the same time, the caller being thread 0, and waits. Where the pool is
// in use by another caller, body(0, 1) runs alone: bodies take the count that they are given. The first exception is rethrown.
void parallel(int threads, const std::function<void(int thread, int threads)>& body);

// All `threads` bodies of one parallel() meet here.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait();

 private:
  const int threads_;
  std::atomic<int> arrived_{0}, round_{0};
};

}  // namespace r50
