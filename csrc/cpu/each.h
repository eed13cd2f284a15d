// Included by kernels under their target pragma: a lambda is compiled for the target that holds where it is written.
#pragma once
#include <utility>

#include "vec.h"

namespace r50 {
namespace {

// f(0) ... f(N - 1) with constants: an array that is indexed by nothing else is made of registers
template <int N, class F>
INLINE void each(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>()), ...);
  }(std::make_integer_sequence<int, N>());
}

}  // namespace
}  // namespace r50
