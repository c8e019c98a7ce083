// Shared memory of a thread block of the streaming kernel of the backward pass, and the warp that
// fills it and exchanges sums.
#pragma once

#include "bi_wkv_stream_backward.h"
#include "bi_wkv_stream_block.h"
#include "bi_wkv_stream_sums.h"

namespace linvis::bi_wkv::stream {

// Sums of the inputs and of p and q.
enum Kind { OF_VALUES, OF_ADJOINTS };

// A thread has the channels 2 pair and 2 pair + 1 of an item; each half of a warp has a row. A row
// with an odd number has its tokens 1, 0, 3, 2, ... in memory, so that two rows have own banks.
template <class T, class Shape>
struct BackwardBlock {
  const BackwardArgs& args;
  unsigned char* stages;       // [STAGES]: k, v, g [TOKENS][WIDTH], constants [5][WIDTH]
  float* pair_sums;            // [2][WARPS][SUMS][WIDTH]: first of a pair, then what enters it
  float* partial;              // [WARPS][2][WIDTH]
  Barrier *full, *empty;       // [STAGES]: an item is there; it is done
  Barrier *summed, *entered;   // [2]: sums of a kind are stored; those that enter are there
  Items items;
  int lane, warp, half, pair;

  __device__ __forceinline__ BackwardBlock(const BackwardArgs& args, unsigned char* shared)
      : args(args),
        stages(shared),
        pair_sums(reinterpret_cast<float*>(shared + Shape::STAGES * Shape::STAGE)),
        partial(pair_sums + Shape::PAIR_SUMS),
        full(reinterpret_cast<Barrier*>(partial + Shape::PARTIAL)),
        empty(full + Shape::STAGES),
        summed(empty + Shape::STAGES),
        entered(summed + 2),
        items(args, blockIdx.x, gridDim.x),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        half(lane / 16),
        pair(lane % 16) {}

  __device__ __forceinline__ void init() {
    if (threadIdx.x == 0) {
      for (int s = 0; s < Shape::STAGES; ++s) {
        full[s].init(64);  // of each thread that copies: the copies, and the constants
        empty[s].init(32 * Shape::WARPS);
      }
      for (int kind = 0; kind < 2; ++kind) {
        summed[kind].init(32 * Shape::WARPS);
        entered[kind].init(32);
      }
    }
    sync<1, Shape::THREADS>();  // all warps come here, on two ways
  }
  __device__ __forceinline__ float* constants(int stage) const {
    return reinterpret_cast<float*>(stages + stage * Shape::STAGE + 3 * Shape::TENSOR);
  }
  // Sums of a warp's rows, [SUMS][WIDTH], from this thread's channels on.
  __device__ __forceinline__ float* sums_of(int kind, int warp) const {
    return pair_sums + (kind * Shape::WARPS + warp) * SUMS * WIDTH + 2 * pair;
  }
};

template <class T, class Shape>
struct BackwardHelper : BackwardBlock<T, Shape> {
  using Base = BackwardBlock<T, Shape>;
  using Base::args, Base::items, Base::lane, Base::half, Base::pair;
  using Base::Base;

  __device__ __forceinline__ void run() {
    Place p = items.place(blockIdx.x), loading = p;
    load(0, loading);
    if (items.count > 1) {
      items.advance(loading);
      load(1, loading);
    }
    exchange(OF_VALUES, 0, p);
#pragma unroll 1
    for (int i = 0; i < items.count; ++i) {
      exchange(OF_ADJOINTS, i, p);
      Place next = p;
      items.advance(next);
      if (i + 1 < items.count) exchange(OF_VALUES, i + 1, next);
      this->empty[i % 2].wait(i / 2);
      write_partial(p);
      if (i + 2 < items.count) {
        items.advance(loading);
        load(i % 2, loading);
      }
      p = next;
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
    const T* g =
        static_cast<const T*>(args.g) + p.batch * args.g_batch + first * args.g_token + channel;
    const int64_t k_step = STEP * args.k_token, v_step = STEP * args.v_token,
                  g_step = STEP * args.g_token;
    const uint32_t to = shared_address(this->stages + stage * Shape::STAGE) + lane % 4 * 16;
    const int left = channel < args.channels ? args.tokens - start : 0;
#pragma unroll 4
    for (int t = lane / 4; t < Shape::TOKENS; t += STEP) {
      const uint32_t at = to + (t ^ (t / Shape::LENGTH & 1)) * (WIDTH * 2);
      const bool there = t < left;
      copy_16(at, there ? k : args.k, there ? 16 : 0);
      copy_16(at + Shape::TENSOR, there ? v : args.v, there ? 16 : 0);
      copy_16(at + 2 * Shape::TENSOR, there ? g : args.g, there ? 16 : 0);
      k += k_step, v += v_step, g += g_step;
    }
    load_constants<T, Shape>(args, p, lane, this->constants(stage) + lane);
    // before any row of the item may find it wrong
    if (args.segments == 1 && lane == 0) args.marks[p.batch * args.tiles + p.tile] = IN_ORDER;
    this->full[stage].arrive();
    this->full[stage].arrive_after_copies();
  }

  // Replaces the sums of the rows of each warp by those of all tokens before them (first half of
  // the warp) and behind them (second half).
  __device__ __forceinline__ void exchange(int kind, int i, const Place& p) {
    constexpr int WARPS = Shape::WARPS;
    this->summed[kind].wait(i);
    float w2[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) w2[j] = this->constants(i % 2)[W2 * WIDTH + 2 * pair + j];
    const float along_rows[2] = {exp2_of(-w2[0] * (2 * Shape::LENGTH)),
                                 exp2_of(-w2[1] * (2 * Shape::LENGTH))};
    float* first = this->sums_of(kind, half ? WARPS - 1 : 0) + half * (SUMS / 2) * WIDTH;
    const int step = (half ? -SUMS : SUMS) * WIDTH;
    RowSums of_warp[WARPS], a;
    const auto load = [&] {
#pragma unroll
      for (int m = 0; m < WARPS; ++m) of_warp[m] = RowSums::load(first + m * step, WIDTH);
    };
    load();
#pragma unroll
    for (int m = 0; m < WARPS; ++m) a = a.then(along_rows, of_warp[m]);
    a = args.segments > 1 ? entering(kind, w2, a, p) : RowSums();
    load();  // which needs no registers meanwhile
#pragma unroll
    for (int m = 0; m < WARPS; ++m) {
      a.store(first + m * step, WIDTH);
      a = a.then(along_rows, of_warp[m]);
    }
    this->entered[kind].arrive();
  }

  // Sums never have the bits of what is absent, not even those that are NaN.
  static __device__ __forceinline__ float present(float x) {
    return __float_as_uint(x) == ABSENT ? NAN : x;
  }
  static __device__ __forceinline__ bool is_absent(const float4& x) {
    return __float_as_uint(x.x) == ABSENT || __float_as_uint(x.y) == ABSENT ||
           __float_as_uint(x.z) == ABSENT || __float_as_uint(x.w) == ABSENT;
  }
  // Publishes the sums of this segment and adds up those of all others, as they come, that enter.
  __device__ __forceinline__ RowSums entering(int kind, const float (&w2)[2], const RowSums& own,
                                              const Place& p) const {
    constexpr int AT_ONCE = 12;
    RowSums a;
    if (p.tile * WIDTH + 2 * pair >= args.channels) return a;
    const float decay[2] = {exp2_of(-w2[0] * Shape::TOKENS), exp2_of(-w2[1] * Shape::TOKENS)};
    const int64_t step = 4 * int64_t(args.channels);  // of a segment
    float* sums = args.sums + (int64_t(kind) * args.batch + p.batch) * args.segments * step +
                  half * 2 * int64_t(args.channels) + p.tile * (2 * WIDTH) + 4 * pair;
    publish(sums + p.segment * step, make_float4(present(own.x[0]), present(own.x[1]),
                                                 present(own.e[0]), present(own.e[1])));
    const int last = args.segments - 1;
    const int count = half ? last - p.segment : p.segment;
    // both halves end at their neighbour; the one that has fewer begins with numbers below 0
    int m = count - max(p.segment, last - p.segment);
    const int64_t forth = half ? -step : step;
    const float* from = sums + (half ? last : 0) * step + m * forth;
    for (; m < count; m += AT_ONCE, from += AT_ONCE * forth) {
      float4 x[AT_ONCE];
      bool absent;
      do {
        absent = false;
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
          x[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
          if (m + j >= 0 && m + j < count) x[j] = look_up(from + j * forth);
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) absent = absent || is_absent(x[j]);
      } while (absent);
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j)
        if (m + j < count) a = a.then(decay, {{x[j].x, x[j].y}, {x[j].z, x[j].w}});
    }
    return a;
  }

  // Gradients by w and u of the segment: sums over its rows, in their order.
  __device__ __forceinline__ void write_partial(const Place& p) const {
    const int channel = p.tile * WIDTH + lane;
    float by_w = 0.0f, by_u = 0.0f;
#pragma unroll
    for (int m = 0; m < Shape::WARPS; ++m) {
      by_w += this->partial[2 * m * WIDTH + lane];
      by_u += this->partial[(2 * m + 1) * WIDTH + lane];
    }
    if (channel >= args.channels) return;
    float* to = args.partial +
                (int64_t(p.batch) * args.segments + p.segment) * 2 * args.channels + channel;
    to[0] = by_w;
    to[args.channels] = by_u;
  }
};

}  // namespace linvis::bi_wkv::stream
