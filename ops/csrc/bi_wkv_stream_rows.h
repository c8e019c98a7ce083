// The warps of the streaming kernel that compute.
#pragma once

#include "bi_wkv_stream_block.h"
#include "bi_wkv_stream_pairs.h"
#include "bi_wkv_stream_sums.h"

namespace linvis::bi_wkv::stream {

// What is kept of a row from its sums to its outputs: what it sees before it and behind it, and the
// sums of its second part for the first.
struct Kept {
  RowSums before, behind, second;
};

template <class T, class Shape>
struct Rows : Block<T, Shape> {
  using Base = Block<T, Shape>;
  using Base::args, Base::half, Base::items, Base::lane, Base::pair, Base::warp;
  using Base::Base;
  static constexpr int L = Shape::LENGTH, PART = Shape::PART, THREADS = 32 * Shape::WARPS;

  __device__ __forceinline__ void run() {
    Place p = items.place(blockIdx.x), before = p;
    Kept kept, waiting;
    int stage = 0, turn = 0;
    for (int i = 0; i < items.count; ++i) {
      this->full[stage].wait(turn);
      add_up(i, stage, p, kept);
      if constexpr (Shape::LAGS) {
        if (i > 0) write(i - 1, stage ? stage - 1 : Shape::STAGES - 1, before, waiting);
        waiting = kept;
      } else {
        write(i, stage, p, kept);
      }
      before = p;
      if (++stage == Shape::STAGES) {
        stage = 0;
        ++turn;
      }
      items.advance(p);
    }
    if constexpr (Shape::LAGS)
      write(items.count - 1, stage ? stage - 1 : Shape::STAGES - 1, before, waiting);
    sync<1, THREADS>();
    if (*this->marked) mend();
  }

 private:
  // A NaN of either dtype in place of the first output of a row whose sums cannot be plain numbers.
  static constexpr uint32_t MARK = 0x7fff;

  struct Constants {
    float decay[2], part[2], reference[2], own[2];
  };
  // Weights of the tokens of a part, and their products with v.
  struct Weights {
    float e[2][PART], x[2][PART];
  };

  __device__ __forceinline__ int row() const { return 2 * warp + half; }
  __device__ __forceinline__ void get(float (&to)[2], int stage, int which) const {
    const auto* table = reinterpret_cast<const float2*>(this->constants(stage));
    const float2 both = table[which * (WIDTH / 2) + pair];
    to[0] = both.x;
    to[1] = both.y;
  }
  __device__ __forceinline__ Constants get_constants(int stage) const {
    Constants c;
    get(c.decay, stage, DECAY);
    get(c.part, stage, PART_DECAY);
    get(c.reference, stage, REFERENCE);
    get(c.own, stage, OWN);
    return c;
  }
  __device__ __forceinline__ int64_t first_channel(const Place& p) const {
    return int64_t(p.tile) * WIDTH + 2 * pair;
  }
  __device__ __forceinline__ T* output(const Place& p) const {
    const int64_t token = int64_t(p.batch) * args.tokens + p.segment * Shape::TOKENS + row() * L;
    return static_cast<T*>(args.y) + token * args.channels + first_channel(p);
  }
  // Tokens of the sequence from the first one of this row on.
  __device__ __forceinline__ int tokens_left(const Place& p) const {
    return args.tokens - (p.segment * Shape::TOKENS + row() * L);
  }
  __device__ __forceinline__ const uint32_t* keys(int stage) const {
    const unsigned char* k = this->stages + stage * Shape::STAGE + row() * Shape::ROW;
    return reinterpret_cast<const uint32_t*>(k) + pair;
  }

  template <bool FULL>
  static __device__ __forceinline__ Weights weigh(const uint32_t* k, int first, int left,
                                                  const Constants& c) {
    Weights result;
#pragma unroll
    for (int r = 0; r < PART; ++r) {
      const uint32_t* at = k + (first + r) * (WIDTH / 2);
      const float2 key = unpack<T>(at[0]), value = unpack<T>(at[Shape::TENSOR / 4]);
      float e0 = exp2_of(fmaf(key.x, LOG2E, -c.reference[0]));
      float e1 = exp2_of(fmaf(key.y, LOG2E, -c.reference[1]));
      if (!FULL && first + r >= left) e0 = e1 = 0.0f;
      result.e[0][r] = e0, result.x[0][r] = e0 * value.x;
      result.e[1][r] = e1, result.x[1][r] = e1 * value.y;
    }
    return result;
  }

  // Sums of both parts of a row, for what is behind them and for what is before them.
  template <bool FULL>
  static __device__ __forceinline__ void part_sums(const uint32_t* k, int left, const Constants& c,
                                                   RowSums (&forward)[2], RowSums (&backward)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Weights a = weigh<FULL>(k, h * PART, left, c);
      RowSums f, b;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        f.x[i] = a.x[i][0], f.e[i] = a.e[i][0];
        b.x[i] = a.x[i][PART - 1], b.e[i] = a.e[i][PART - 1];
#pragma unroll
        for (int r = 1; r < PART; ++r) {
          f.x[i] = fmaf(f.x[i], c.decay[i], a.x[i][r]);
          f.e[i] = fmaf(f.e[i], c.decay[i], a.e[i][r]);
          b.x[i] = fmaf(b.x[i], c.decay[i], a.x[i][PART - 1 - r]);
          b.e[i] = fmaf(b.e[i], c.decay[i], a.e[i][PART - 1 - r]);
        }
      }
      forward[h] = f;
      backward[h] = b;
    }
  }

  // Sums up the rows of an item; what each sees of the others of its segment is kept.
  __device__ __forceinline__ void add_up(int i, int stage, const Place& p, Kept& kept) {
    const Constants c = get_constants(stage);
    const int left = tokens_left(p);
    RowSums f[2], b[2];
    if (left >= L) {
      part_sums<true>(keys(stage), left, c, f, b);
    } else if (left > 0) {
      part_sums<false>(keys(stage), left, c, f, b);
    }
    RowSums forward = f[0].then(c.part, f[1]), backward = b[1].then(c.part, b[0]);
    kept.second = b[1];
    float length[2], both[2];  // decays along a row and along the two rows of a warp
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      length[j] = c.part[j] * c.part[j];
      both[j] = length[j] * length[j];
      // not if it is NaN either
      if (left > 0 && !(forward.e[j] + backward.e[j] >= LEAST)) {
        forward.x[j] = forward.e[j] = backward.x[j] = backward.e[j] = NAN;
        kept.second.e[j] = NAN;
      }
    }
    // of the other row of the warp: what it adds for this one
    const RowSums other = RowSums::choose(half, backward, forward).from_other_half();
    const RowSums own = RowSums::choose(half, forward, backward);
    // the second row has the sums of both for what is behind, the first those for what is before
    if (i > 0) sync<2, THREADS>();
    other.then(length, own)
        .store(this->pair_sums + (warp * SUMS + (half ? 0 : SUMS / 2)) * WIDTH + 2 * pair, WIDTH);
    sync<1, THREADS>();
    const float* pairs = this->pair_sums + 2 * pair;
    RowSums before, behind;
#pragma unroll 2
    for (int m = 0; m < warp; ++m)
      before = before.then(both, RowSums::load(pairs + m * SUMS * WIDTH, WIDTH));
#pragma unroll 2
    for (int m = Shape::WARPS - 1; m > warp; --m)
      behind = behind.then(both, RowSums::load(pairs + (m * SUMS + SUMS / 2) * WIDTH, WIDTH));
    kept.before = RowSums::choose(half, before.then(length, other), before);
    kept.behind = RowSums::choose(half, behind, behind.then(length, other));
    if (args.segments > 1) {
      const bool ends = first_channel(p) < args.channels;
      float* sums = this->segment_sums(p) + 2 * pair;
      if (warp == Shape::WARPS - 1) {
        if (half && ends) kept.before.then(length, forward).store(sums, args.channels);
        __syncwarp();
        if (lane == 0) this->summed[i & 1].arrive();
      }
      if (warp == 0) {
        if (!half && ends)
          kept.behind.then(length, backward)
              .store(sums + int64_t(SUMS / 2) * args.channels, args.channels);
        __syncwarp();
        if (lane == 0) this->summed[i & 1].arrive();
      }
    }
  }

  // Writes the outputs of a row; bits for those of its two channels whose sums are no numbers.
  template <bool FULL>
  __device__ __forceinline__ uint32_t outputs(const uint32_t* k, int left, const Constants& c,
                                              const Kept& kept, uint32_t* y, bool there) const {
    const unsigned step = unsigned(args.channels) / 2;
    RowSums f = kept.before;
    float zero[2] = {0.0f, 0.0f};  // no longer if an output is no number
    uint32_t wrong = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Weights a = weigh<FULL>(k, h * PART, left, c);
      RowSums b = h ? kept.behind : kept.behind.then(c.part, kept.second);
      float top[2][PART], bottom[2][PART];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int r = PART - 1; r >= 0; --r) {
          top[i][r] = fmaf(c.own[i], a.x[i][r], b.x[i]);
          bottom[i][r] = fmaf(c.own[i], a.e[i][r], b.e[i]);
          b.x[i] = fmaf(b.x[i], c.decay[i], a.x[i][r]);
          b.e[i] = fmaf(b.e[i], c.decay[i], a.e[i][r]);
        }
      }
#pragma unroll
      for (int r = 0; r < PART; ++r) {
        float out[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          out[i] = (f.x[i] + top[i][r]) * reciprocal(f.e[i] + bottom[i][r]);
          f.x[i] = fmaf(f.x[i], c.decay[i], a.x[i][r]);
          f.e[i] = fmaf(f.e[i], c.decay[i], a.e[i][r]);
        }
        if (FULL || h * PART + r < left) {
          if (there) y[unsigned(h * PART + r) * step] = pack<T>(out[0], out[1]);
#pragma unroll
          for (int i = 0; i < 2; ++i) zero[i] = fmaf(out[i], 0.0f, zero[i]);
        }
      }
      // all weights that any token of the row sees have come together at its ends; values of opposite
      // signs may have cancelled there; not if it is NaN either
      const RowSums& end = h ? f : b;
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (!(fabsf(end.x[i]) + end.e[i] < LARGEST)) wrong |= 1 << i;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (!(zero[i] == 0.0f)) wrong |= 1 << i;
    return wrong;
  }

  __device__ __forceinline__ void write(int i, int stage, const Place& p, Kept& kept) {
    const Constants c = get_constants(stage);
    if (args.segments > 1) {
      float w2[2], before[2], behind[2];  // log decay; decays along the rows on either side
      get(w2, stage, W2);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        before[j] = exp2_of(-w2[j] * float(row() * L));
        behind[j] = exp2_of(-w2[j] * float((Shape::ROWS - 1 - row()) * L));
      }
      this->entered[i & 1].wait(i / 2);
      const float* entering = this->entering + (i & 1) * SUMS * WIDTH + 2 * pair;
      kept.before = RowSums::load(entering, WIDTH).then(before, kept.before);
      kept.behind = RowSums::load(entering + SUMS / 2 * WIDTH, WIDTH).then(behind, kept.behind);
    }
    const int left = tokens_left(p);
    const bool there = first_channel(p) < args.channels;
    T* y = output(p);
    uint32_t wrong = 0;
    if (left >= L) {
      wrong = outputs<true>(keys(stage), left, c, kept, reinterpret_cast<uint32_t*>(y), there);
    } else if (left > 0) {
      wrong = outputs<false>(keys(stage), left, c, kept, reinterpret_cast<uint32_t*>(y), there);
    }
    if (wrong && there) {
      auto* first = reinterpret_cast<uint32_t*>(y);
      const uint32_t one = wrong & 1 ? 0xffffu : 0u, two = wrong & 2 ? 0xffffu << 16 : 0u;
      *first = (*first & ~(one | two)) | (MARK & one) | (MARK << 16 & two);
      *this->marked = 1;
    }
    __syncwarp();
    if (lane == 0) this->empty[stage].arrive();
  }

  // Computes the outputs of marked rows, once nothing else is left to do.
  __device__ __forceinline__ void mend() const {
    using Row = PairRow<T, Shape>;
    static_assert(Row::FLOATS * 4 <= Shape::STAGES * Shape::STAGE);
    auto* table = reinterpret_cast<float*>(this->stages);
    Place p = items.place(blockIdx.x);
#pragma unroll 1
    for (int i = 0; i < items.count; ++i, items.advance(p)) {
      const bool there = first_channel(p) < args.channels;
      T* y = output(p);
      uint32_t wrong = 0;
      if (there && tokens_left(p) > 0) {
        const uint32_t first = *reinterpret_cast<const uint32_t*>(y);
        wrong = ((first & 0xffffu) == MARK ? 1 : 0) | (first >> 16 == MARK ? 2 : 0);
      }
      if (!sync_any<1, THREADS>(wrong)) continue;
#pragma unroll 1
      for (int j = 0; j < 2 && there; ++j) Row(args, p, row(), 2 * pair + j).add_up(table);
      sync<1, THREADS>();
#pragma unroll 1
      for (int j = 0; j < 2; ++j)
        if (wrong >> j & 1) Row(args, p, row(), 2 * pair + j).write(table, y + j, args.channels);
    }
  }
};

}  // namespace linvis::bi_wkv::stream
