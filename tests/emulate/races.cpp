// pool.cpp as several programs' threads use it at the same time, for ThreadSanitizer: unsynchronized writes whose order
// only the pool and its barriers guarantee, changing thread counts, and an exception now and then.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "pool.h"

namespace {

constexpr int CALLERS = 3, CALLS = 60;

void expect(bool fine, const char* what) {
  if (fine) return;
  std::fprintf(stderr, "races: %s\n", what);
  std::exit(1);
}

void call(int round) {
  const int threads = 1 + round % 4;
  std::vector<int> first(threads), second(threads);
  r50::Barrier barrier(threads);
  int active = 0;
  r50::parallel(threads, [&](int thread, int count) {
    if (thread == 0) active = count;
    first[thread] = thread + 1;
    if (count > 1) expect(barrier.wait(), "a barrier was abandoned by nobody");
    second[thread] = first[(thread + 1) % count];  // what a neighbour wrote before the barrier
    if (count > 1) expect(barrier.wait(), "a barrier was abandoned by nobody");
    first[thread] = -1;
  });
  expect(active == threads || active == 1, "neither all threads nor one took part");
  for (int i = 0; i < active; i++)
    expect(second[i] == (i + 1) % active + 1 && first[i] == -1, "a body did not run to its end");
  for (int rounds = 0; rounds < 3; rounds++) {  // one body throws behind so many barriers, at which the others wait
    r50::Barrier left(threads);
    bool caught = false;
    try {
      r50::parallel(threads, [&](int thread, int count) {
        for (int i = 0; i < rounds; i++)
          if (count > 1 && !left.wait()) return;
        if (thread == round % count) {
          left.abandon();
          throw std::runtime_error("expected");
        }
        expect(!left.wait(), "a barrier was passed without all");
      });
    } catch (const std::runtime_error&) {
      caught = true;
    }
    expect(caught, "an exception was lost");
  }
}

// Every unit is taken once, also where a thread does not come back from its first piece until all others are done.
void share(int round, int units) {
  const int threads = 1 + round % 4, rounds = 3;
  std::vector<int> taken(units);
  std::atomic<int> done{0};
  r50::Shares shares(threads);
  r50::Barrier barrier(threads);
  const auto begin = [&] {
    done = 0;
    shares.begin(units);
  };
  begin();
  r50::parallel(threads, [&](int thread, int count) {
    for (int i = 0; i < rounds; i++) {
      for (int first, last; shares.take(thread, first, last);) {
        expect(0 <= first && first < last && last <= units, "units that are none");
        for (int unit = first; unit < last; unit++) taken[unit]++;
        done += last - first;
        while (count > 1 && thread == (round + i) % count && done < units) std::this_thread::yield();
      }
      if (count == 1)
        begin();
      else
        expect(barrier.wait(begin), "a barrier was abandoned by nobody");
    }
  });
  for (int times : taken) expect(times == rounds, "a unit was not taken once in each round");
}

}  // namespace

int main() {
  std::vector<std::thread> callers;
  for (int i = 0; i < CALLERS; i++)
    callers.emplace_back([i] {
      for (int round = 0; round < CALLS; round++) {
        call(round + i);
        for (int units : {0, 1, 2, 7, 50}) share(round + i, units);
      }
    });
  for (auto& caller : callers) caller.join();
  std::puts("done");
}
