// The current device and stream of PyTorch, and the dispatch key under which the kernels are registered. The tests
// replace this file to run them on the CPU.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/kernels.h"

#define R50_KEY CUDA

namespace r50::gpu {

using DeviceGuard = torch::stable::accelerator::DeviceGuard;

inline Stream current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<Stream>(stream);
}

}  // namespace r50::gpu
