// The threads are OpenMP's, the same that PyTorch's operations use: others would have to share the cores with them,
// since they go on spinning for milliseconds after an operation.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

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
  // last: what the last to arrive does before any goes on. -> false: the barrier is abandoned, the body has to return
  [[nodiscard]] bool wait(const std::function<void()>& last = nullptr);
  void abandon();

 private:
  static constexpr int ABANDONED = -1;
  const int threads_;
  std::atomic<int> arrived_{0}, round_{0};
};

// Units of work that a team shares: each thread takes two thirds of its own part, then the rest of it, then half of
// what another has not begun, so that all end together though one be slower: its core has other work, or is virtual.
class Shares {
 public:
  explicit Shares(int threads) : parts_(threads) {}
  void begin(int count);  // of so many units; while nobody takes
  bool take(int thread, int& first, int& last);  // -> units [first, last), or false: none are left

 private:
  struct alignas(64) Part {
    std::atomic<uint64_t> left{0};  // [low half, high half)
    uint32_t piece = 0;  // that its owner takes
  };
  bool take(Part& part, bool own, int& first, int& last);
  std::vector<Part> parts_;
};

}  // namespace r50
