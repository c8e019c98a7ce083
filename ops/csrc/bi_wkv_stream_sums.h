// Sums of a row of the streaming kernels, two channels of a thread.
#pragma once

namespace linvis::bi_wkv::stream {

// Two channels of the sums of values and of weights.
struct RowSums {
  float x[2] = {0.0f, 0.0f}, e[2] = {0.0f, 0.0f};

  // This, seen through `decay`, and the other.
  __device__ __forceinline__ RowSums then(const float (&decay)[2], const RowSums& other) const {
    RowSums r;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      r.x[c] = fmaf(x[c], decay[c], other.x[c]);
      r.e[c] = fmaf(e[c], decay[c], other.e[c]);
    }
    return r;
  }
  __device__ __forceinline__ void store(float* to, int64_t step) const {
    *reinterpret_cast<float2*>(to) = make_float2(x[0], x[1]);
    *reinterpret_cast<float2*>(to + step) = make_float2(e[0], e[1]);
  }
  static __device__ __forceinline__ RowSums load(const float* from, int64_t step) {
    const float2 x = *reinterpret_cast<const float2*>(from);
    const float2 e = *reinterpret_cast<const float2*>(from + step);
    return {{x.x, x.y}, {e.x, e.y}};
  }
  static __device__ __forceinline__ RowSums choose(bool first, const RowSums& a, const RowSums& b) {
    RowSums r;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      r.x[c] = first ? a.x[c] : b.x[c];
      r.e[c] = first ? a.e[c] : b.e[c];
    }
    return r;
  }
  __device__ __forceinline__ RowSums from_other_half() const {
    RowSums r;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      r.x[c] = __shfl_xor_sync(0xffffffffu, x[c], 16);
      r.e[c] = __shfl_xor_sync(0xffffffffu, e[c], 16);
    }
    return r;
  }
};

}  // namespace linvis::bi_wkv::stream
