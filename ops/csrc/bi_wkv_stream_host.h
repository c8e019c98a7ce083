// What the launches of both streaming kernels ask of the device and of their inputs.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace linvis::bi_wkv::stream {

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// Whether the rows of x (B, T, C), of numbers of two bytes, are made of aligned 16 bytes.
inline bool is_whole(const at::Tensor& x) {
  const auto aligned = [](int64_t stride) { return stride % 8 == 0; };
  return x.stride(2) == 1 && aligned(x.size(2)) && aligned(x.stride(0)) && aligned(x.stride(1)) &&
         reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
}

}  // namespace linvis::bi_wkv::stream
