// The x86 intrinsics: the compiler's, or for the tests, which run every kernel on any CPU, plain C++ of the same names.
#pragma once
#ifdef RESNET50_EMULATED
#include "emulated_x86.h"
#define R50_TARGET(features)  // the emulation must not make the compiler use what it emulates
#define R50_INLINE inline
#else
#include <immintrin.h>
#define R50_PRAGMA(text) _Pragma(#text)
#define R50_TARGET(features) R50_PRAGMA(GCC target(features))  // for the rest of the file
#define R50_INLINE inline __attribute__((always_inline))  // one call inside a loop, and its constants lie in memory
#endif
