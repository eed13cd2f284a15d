// conv_int8 and gemm_int8: uint8 by int8 in int32.
#include "cuda/int8.cuh"

namespace r50::gpu {

size_t conv_int8_scratch(const Conv& p) { return scratch_of<Requantized>(p); }
void conv_int8(const Conv& p, void* scratch, Stream stream) { choose<Requantized, Raw>(p, scratch, stream); }

size_t gemm_int8_scratch(const Conv& p) { return scratch_of<Raw>(p); }
void gemm_int8(const Conv& p, void* scratch, Stream stream) { choose<Raw, Raw>(p, scratch, stream); }

}  // namespace r50::gpu
