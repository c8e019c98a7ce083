// Instructions of sm_80 and newer that C++ has no words for.
#pragma once

#include <cstdint>

namespace linvis::bi_wkv::stream {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes to shared memory: the first `bytes` of them, then zeros.
__device__ __forceinline__ void copy_16(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}

// A barrier in shared memory, on which some threads arrive and others wait.
struct Barrier {
  uint64_t state;

  __device__ __forceinline__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals)
                 : "memory");
  }
  __device__ __forceinline__ void arrive() {
    asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0]; }" ::"r"(shared_address(this))
                 : "memory");
  }
  // Arrives when the copies that this thread has begun are done.
  __device__ __forceinline__ void arrive_after_copies() {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(this))
                 : "memory");
  }
  // Waits for all arrivals of a turn: 0, 1, 2, ... The next turn must not end before.
  __device__ __forceinline__ void wait(int turn) {
    const uint32_t address = shared_address(this), parity = turn & 1;
#if __CUDA_ARCH__ >= 900
#define LINVIS_TRY "mbarrier.try_wait.parity.shared.b64"
#else
#define LINVIS_TRY "mbarrier.test_wait.parity.shared.b64"
#endif
    asm volatile("{ .reg .pred p; AGAIN_%=: " LINVIS_TRY
                 " p, [%0], %1; @p bra DONE_%=; bra AGAIN_%=; DONE_%=: }" ::"r"(address),
                 "r"(parity)
                 : "memory");
#undef LINVIS_TRY
  }
};

// Barrier `ID` of the first THREADS threads of a thread block.
template <int ID, int THREADS>
__device__ __forceinline__ void sync() {
  asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(THREADS) : "memory");
}

// The same; whether the condition holds for any of them.
template <int ID, int THREADS>
__device__ __forceinline__ bool sync_any(bool condition) {
  int any;
  asm volatile(
      "{ .reg .pred p, q; setp.ne.s32 p, %1, 0; bar.red.or.pred q, %2, %3, p; "
      "selp.s32 %0, 1, 0, q; }"
      : "=r"(any)
      : "r"(int(condition)), "n"(ID), "n"(THREADS)
      : "memory");
  return any;
}

// Adds one to a count in global memory, after all that this thread knows to be written.
__device__ __forceinline__ void count_up(unsigned* count) {
  asm volatile("fence.acq_rel.gpu; red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(count)
               : "memory");
}

__device__ __forceinline__ void wait_for_count(const unsigned* count, unsigned wanted) {
  unsigned seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(count) : "memory");
  } while (seen < wanted);
}

// Four numbers in global memory that other thread blocks see, each by itself at some time.
__device__ __forceinline__ void publish(float* to, const float4& x) {
  asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x.x), "f"(x.y),
               "f"(x.z), "f"(x.w)
               : "memory");
}
__device__ __forceinline__ float4 look_up(const float* from) {
  float4 x;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(from)
               : "memory");
  return x;
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace linvis::bi_wkv::stream
