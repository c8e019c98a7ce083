// Shared memory of a thread block of the streaming kernel, and the warps that fill it.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "bi_wkv_stream.h"
#include "bi_wkv_stream_ptx.h"

namespace linvis::bi_wkv::stream {

// Two channels of a token.
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t bits) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
  } else {
    return __half22float2(*reinterpret_cast<const __half2*>(&bits));
  }
}
template <class T>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&both);
  } else {
    const __half2 both = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
}

// Constants of channels, as they lie behind k and v of an item.
enum { W2, DECAY, PART_DECAY, REFERENCE, OWN };

template <class T, class Shape, class AnyArgs>
__device__ __forceinline__ void load_constants(const AnyArgs& args, const Place& p, int lane,
                                               float* to) {
  const int channel = p.tile * WIDTH + lane;
  const bool there = channel < args.channels;
  const float w = there ? args.w[channel] : 0.0f, u = there ? args.u[channel] : 0.0f;
  const T* middle = static_cast<const T*>(args.k) + p.batch * args.k_batch +
                    int64_t(args.tokens / 2) * args.k_token;
  const float key = there ? float(middle[channel]) : 0.0f;
  const bool plain = fabsf(w) * Shape::LENGTH <= SPAN && fabsf(u) <= SPAN;
  to[W2 * WIDTH] = w * LOG2E;
  to[DECAY * WIDTH] = exp2_of(-w * LOG2E);
  to[PART_DECAY * WIDTH] = exp2_of(-w * LOG2E * Shape::PART);
  to[REFERENCE * WIDTH] = plain ? key * LOG2E : NAN;
  to[OWN * WIDTH] = exp2_of(u * LOG2E);
}

// A thread has the channels 2 pair and 2 pair + 1 of an item; of a warp that computes, each half
// has a row.
template <class T, class Shape>
struct Block {
  const Args& args;
  unsigned char* stages;      // [STAGES]: k [ROWS], v [ROWS], constants [5][WIDTH]
  float* pair_sums;           // [WARPS][SUMS][WIDTH]
  float* entering;            // [2][SUMS][WIDTH]
  Barrier *full, *empty;      // [STAGES]: an item is there; it is no longer needed
  Barrier *summed, *entered;  // [2]: sums of a segment are stored; those that enter it are there
  int* marked;                // whether any row is to be computed again
  Items items;
  int lane, warp, half, pair;

  __device__ __forceinline__ Block(const Args& args, unsigned char* shared)
      : args(args),
        stages(shared),
        pair_sums(reinterpret_cast<float*>(shared + Shape::STAGES * Shape::STAGE)),
        entering(pair_sums + Shape::PAIR_SUMS),
        full(reinterpret_cast<Barrier*>(entering + Shape::ENTERING)),
        empty(full + Shape::STAGES),
        summed(empty + Shape::STAGES),
        entered(summed + 2),
        marked(reinterpret_cast<int*>(entered + 2)),
        items(args, blockIdx.x, gridDim.x),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        half(lane / 16),
        pair(lane % 16) {}

  __device__ __forceinline__ void init() {
    if (threadIdx.x == 0) {
      for (int s = 0; s < Shape::STAGES; ++s) {
        full[s].init(64);  // of each thread that copies: the copies, and the constants
        empty[s].init(Shape::WARPS);
      }
      for (int i = 0; i < 2; ++i) {
        summed[i].init(2);
        entered[i].init(32);
      }
      *marked = 0;
    }
    __syncthreads();
  }
  __device__ __forceinline__ float* constants(int stage) const {
    return reinterpret_cast<float*>(stages + stage * Shape::STAGE + 2 * Shape::TENSOR);
  }
  // Sums of a segment, (SUMS, C), from the first channel of its tile on.
  __device__ __forceinline__ float* segment_sums(const Place& p) const {
    return args.sums + (int64_t(p.batch) * args.segments + p.segment) * SUMS * args.channels +
           p.tile * WIDTH;
  }
};

// The helpers: a warp that brings items into shared memory, and, where a sequence may have several
// segments, a warp that exchanges sums with the other thread blocks.
template <class T, class Shape>
struct Helper : Block<T, Shape> {
  using Base = Block<T, Shape>;
  using Base::args, Base::items, Base::lane, Base::half, Base::pair;
  using Base::Base;

  __device__ __forceinline__ void run() {
    Place p = items.place(blockIdx.x);
    if (this->warp == Shape::WARPS) {
      for (int i = 0; i < items.count; ++i, items.advance(p)) {
        const int stage = i % Shape::STAGES, turn = i / Shape::STAGES;
        if (turn > 0) this->empty[stage].wait(turn - 1);
        load(stage, p);
      }
    } else if (args.segments > 1) {
      for (int i = 0; i < items.count; ++i, items.advance(p)) exchange(i, p);
    }
  }

 private:
  __device__ __forceinline__ void load(int stage, const Place& p) {
    constexpr int STEP = 8;  // tokens that a warp copies at once: four lanes have one
    const int start = p.segment * Shape::TOKENS;
    const int64_t channel = p.tile * WIDTH + lane % 4 * 8, first = start + lane / 4;
    const T* k =
        static_cast<const T*>(args.k) + p.batch * args.k_batch + first * args.k_token + channel;
    const T* v =
        static_cast<const T*>(args.v) + p.batch * args.v_batch + first * args.v_token + channel;
    const int64_t k_step = STEP * args.k_token, v_step = STEP * args.v_token;
    uint32_t to = shared_address(this->stages + stage * Shape::STAGE) + lane / 4 * (WIDTH * 2) +
                  lane % 4 * 16;
    if (start + Shape::TOKENS <= args.tokens && (p.tile + 1) * WIDTH <= args.channels) {
      int t = lane / 4;
#pragma unroll 4
      for (int j = 0; j < Shape::TOKENS / STEP; ++j) {
        const uint32_t at = to + t / Shape::LENGTH * 64;
        copy_16(at, k, 16);
        copy_16(at + Shape::TENSOR, v, 16);
        to += STEP * (WIDTH * 2), k += k_step, v += v_step, t += STEP;
      }
      if (Shape::TOKENS % STEP && t < Shape::TOKENS) {
        const uint32_t at = to + t / Shape::LENGTH * 64;
        copy_16(at, k, 16);
        copy_16(at + Shape::TENSOR, v, 16);
      }
    } else {
      for (int t = lane / 4; t < Shape::TOKENS; t += STEP) {
        const uint32_t at = to + t / Shape::LENGTH * 64;
        const bool there = start + t < args.tokens && channel < args.channels;
        copy_16(at, there ? k : args.k, there ? 16 : 0);
        copy_16(at + Shape::TENSOR, there ? v : args.v, there ? 16 : 0);
        to += STEP * (WIDTH * 2), k += k_step, v += v_step;
      }
    }
    load_constants<T, Shape>(args, p, lane, this->constants(stage) + lane);
    this->full[stage].arrive();
    this->full[stage].arrive_after_copies();
  }

  // Announces the sums of this segment, waits for all others and adds up what enters: the first
  // half of the warp what comes from before, the second what comes from behind.
  __device__ __forceinline__ void exchange(int i, const Place& p) {
    constexpr int AT_ONCE = 8;
    const int channel = p.tile * WIDTH + 2 * pair;
    const bool there = channel < args.channels;
    float2 decay = make_float2(1.0f, 1.0f);  // along a segment
    if (there) {
      decay.x = exp2_of(-args.w[channel] * (LOG2E * Shape::TOKENS));
      decay.y = exp2_of(-args.w[channel + 1] * (LOG2E * Shape::TOKENS));
    }
    unsigned* arrived = args.arrived + p.batch * args.tiles + p.tile;
    this->summed[i & 1].wait(i / 2);
    if (lane == 0) count_up(arrived);
    wait_for_count(arrived, args.segments);

    const int last = args.segments - 1;
    const int count = half ? last - p.segment : p.segment;
    const int64_t step = int64_t(half ? -SUMS : SUMS) * args.channels;
    // both halves end at their neighbour; the one that has fewer begins with numbers below 0
    int m = count - max(p.segment, last - p.segment);
    const float* from = this->segment_sums({p.batch, p.tile, half ? last : 0}) +
                        (half ? SUMS / 2 * args.channels : 0) + (there ? 2 * pair : 0) + m * step;
    float2 top = make_float2(0.0f, 0.0f), bottom = top;
    while (m < count) {
      float2 x[AT_ONCE], e[AT_ONCE];
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        const bool exists = m + j >= 0 && m + j < count;
        x[j] = e[j] = make_float2(0.0f, 0.0f);
        if (exists) {
          x[j] = __ldcg(reinterpret_cast<const float2*>(from));
          e[j] = __ldcg(reinterpret_cast<const float2*>(from + args.channels));
        }
        from += step;
      }
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        if (m + j >= count) continue;
        top.x = fmaf(top.x, decay.x, x[j].x), top.y = fmaf(top.y, decay.y, x[j].y);
        bottom.x = fmaf(bottom.x, decay.x, e[j].x), bottom.y = fmaf(bottom.y, decay.y, e[j].y);
      }
      m += AT_ONCE;
    }
    float* out = this->entering + ((i & 1) * SUMS + half * (SUMS / 2)) * WIDTH + 2 * pair;
    *reinterpret_cast<float2*>(out) = top;
    *reinterpret_cast<float2*>(out + WIDTH) = bottom;
    this->entered[i & 1].arrive();
  }
};

}  // namespace linvis::bi_wkv::stream
