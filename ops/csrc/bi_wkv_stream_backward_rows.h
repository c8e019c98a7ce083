// The warps of the streaming kernel of the backward pass that compute.
#pragma once

#include "bi_wkv_stream_backward_block.h"

namespace linvis::bi_wkv::stream {

template <class T, class Shape>
struct BackwardRows : BackwardBlock<T, Shape> {
  using Base = BackwardBlock<T, Shape>;
  using Base::args, Base::half, Base::items, Base::lane, Base::pair, Base::warp;
  using Base::Base;
  static constexpr int L = Shape::LENGTH, PART = Shape::PART;

  __device__ __forceinline__ void run() {
    Place p = items.place(blockIdx.x), next = p;
    Added added;
    // between the sums of p and q of an item and its gradients, those travel and the next item is
    // added up
#pragma unroll 1
    for (int i = -1; i < items.count; ++i) {
      Summed summed;
      if (i >= 0) summed = add_up_adjoints(i, p, added);
      if (i + 1 < items.count) {
        if (i >= 0) items.advance(next);
        added = add_up(i + 1, next);
      }
      if (i >= 0) write(i, p, summed);
      p = next;
    }
  }

 private:
  // Sums of (v, 1): of the row's second part for the first, and of the warp's other row for this.
  struct Added {
    RowSums second, other;
  };
  // What the row sees before it and behind it, and both of the above, also of p and q.
  struct Summed {
    RowSums before, behind, second, p_second, p_other;
  };
  struct Constants {
    float decay[2], part[2], length[2], reference[2], own[2];
  };
  // One channel of the tokens of a part: weights, and their products with v.
  struct Weights {
    float e[PART], x[PART];
  };
  // Two channels of the tokens of a part, as they lie in memory.
  struct Words {
    uint32_t k[PART], v[PART], g[PART];
  };

  __device__ __forceinline__ int row() const { return 2 * warp + half; }
  __device__ __forceinline__ Constants get_constants(int stage) const {
    const auto* table = reinterpret_cast<const float2*>(this->constants(stage)) + pair;
    const auto get = [=](float (&to)[2], int which) {
      const float2 both = table[which * (WIDTH / 2)];
      to[0] = both.x;
      to[1] = both.y;
    };
    Constants c;
    get(c.decay, DECAY);
    get(c.part, PART_DECAY);
    get(c.reference, REFERENCE);
    get(c.own, OWN);
#pragma unroll
    for (int j = 0; j < 2; ++j) c.length[j] = c.part[j] * c.part[j];
    return c;
  }
  // Tokens of the sequence from the first one of this row on.
  __device__ __forceinline__ int tokens_left(const Place& p) const {
    return args.tokens - (p.segment * Shape::TOKENS + row() * L);
  }
  template <bool G>
  __device__ __forceinline__ Words get_words(int stage, int h) const {
    const auto* at = reinterpret_cast<const uint32_t*>(this->stages + stage * Shape::STAGE) +
                     (row() * L + h * PART) * (WIDTH / 2) + pair;
    const int to_odd = (PART % 2 && h ? -half : half) * (WIDTH / 2);
    Words words;
#pragma unroll
    for (int r = 0; r < PART; ++r) {
      const int t = r * (WIDTH / 2) + (r % 2 ? -to_odd : to_odd);
      words.k[r] = at[t];
      words.v[r] = at[t + Shape::TENSOR / 4];
      if (G) words.g[r] = at[t + 2 * Shape::TENSOR / 4];
    }
    return words;
  }
  // Whether a channel of this row has anything but zeros: of v (1) or g (2).
  __device__ __forceinline__ bool holds(int stage, int tensor, int j) const {
    const auto* at = reinterpret_cast<const uint32_t*>(this->stages + stage * Shape::STAGE +
                                                       tensor * Shape::TENSOR) +
                     row() * L * (WIDTH / 2) + pair;
    uint32_t bits = 0;
#pragma unroll 1
    for (int t = 0; t < L; ++t) bits |= at[t * (WIDTH / 2)];
    return bits & (j ? 0x7fff0000u : 0x7fffu);
  }
  static __device__ __forceinline__ float channel(uint32_t word, int j) {
    const float2 both = unpack<T>(word);
    return j ? both.y : both.x;
  }
  template <bool FULL>
  static __device__ __forceinline__ Weights weigh(const Words& words, int j, int left,
                                                  const Constants& c) {
    Weights a;
#pragma unroll
    for (int r = 0; r < PART; ++r) {
      a.e[r] = exp2_of(fmaf(channel(words.k[r], j), LOG2E, -c.reference[j]));
      if (!FULL && r >= left) a.e[r] = 0.0f;
      a.x[r] = a.e[r] * channel(words.v[r], j);
    }
    return a;
  }

  // Sums of a warp's rows, from those of this one: the second row has those of both for what is
  // behind, the first those for what is before. Returns what the other row adds for this one.
  __device__ __forceinline__ RowSums put(int kind, const Constants& c, const RowSums& forward,
                                         const RowSums& backward) {
    const RowSums other = RowSums::choose(half, backward, forward).from_other_half();
    const RowSums own = RowSums::choose(half, forward, backward);
    other.then(c.length, own).store(this->sums_of(kind, warp) + (half ? 0 : SUMS / 2) * WIDTH,
                                    WIDTH);
    this->summed[kind].arrive();
    return other;
  }
  // All that this row sees before it and behind it.
  __device__ __forceinline__ void get(int kind, int turn, const Constants& c, const RowSums& other,
                                      RowSums& before, RowSums& behind) {
    this->entered[kind].wait(turn);
    const float* sums = this->sums_of(kind, warp);
    before = RowSums::load(sums, WIDTH);
    behind = RowSums::load(sums + SUMS / 2 * WIDTH, WIDTH);
    before = RowSums::choose(half, before.then(c.length, other), before);
    behind = RowSums::choose(half, behind, behind.then(c.length, other));
  }

  template <bool FULL>
  __device__ __forceinline__ void part_sums(int stage, int left, const Constants& c,
                                            RowSums (&forward)[2], RowSums (&backward)[2]) const {
#pragma unroll Shape::UNROLL
    for (int h = 0; h < 2; ++h) {
      const Words words = get_words<false>(stage, h);
      forward[0] = forward[1];
      backward[0] = backward[1];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const Weights a = weigh<FULL>(words, j, left - h * PART, c);
        float fx = a.x[0], fe = a.e[0], bx = a.x[PART - 1], be = a.e[PART - 1];
#pragma unroll
        for (int r = 1; r < PART; ++r) {
          fx = fmaf(fx, c.decay[j], a.x[r]);
          fe = fmaf(fe, c.decay[j], a.e[r]);
          bx = fmaf(bx, c.decay[j], a.x[PART - 1 - r]);
          be = fmaf(be, c.decay[j], a.e[PART - 1 - r]);
        }
        forward[1].x[j] = fx, forward[1].e[j] = fe;
        backward[1].x[j] = bx, backward[1].e[j] = be;
      }
    }
  }

  __device__ __forceinline__ Added add_up(int i, const Place& p) {
    const int stage = i % 2;
    this->full[stage].wait(i / 2);
    const Constants c = get_constants(stage);
    const int left = tokens_left(p);
    RowSums f[2], b[2];
    if (left >= L) {
      part_sums<true>(stage, left, c, f, b);
    } else if (left > 0) {
      part_sums<false>(stage, left, c, f, b);
    }
    RowSums forward = f[0].then(c.part, f[1]), backward = b[1].then(c.part, b[0]);
    Added added;
    added.second = b[1];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      // not if it is NaN either
      if (left > 0 && !(forward.e[j] + backward.e[j] >= LEAST_WEIGHT)) {
        forward.x[j] = forward.e[j] = backward.x[j] = backward.e[j] = NAN;
        added.second.e[j] = NAN;
      }
    }
    added.other = put(OF_VALUES, c, forward, backward);
    return added;
  }

  template <bool FULL>
  __device__ __forceinline__ void adjoint_sums(int stage, int left, const Constants& c,
                                               const Summed& s, RowSums& forward,
                                               RowSums (&backward)[2]) const {
    RowSums f = s.before;
#pragma unroll Shape::UNROLL
    for (int h = 0; h < 2; ++h) {
      const Words words = get_words<true>(stage, h);
      const RowSums behind = h ? s.behind : s.behind.then(c.part, s.second);
      backward[0] = backward[1];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const Weights a = weigh<FULL>(words, j, left - h * PART, c);
        const float d = c.decay[j];
        float p[PART], q[PART], bx = behind.x[j], be = behind.e[j];
#pragma unroll
        for (int r = PART - 1; r >= 0; --r) {
          p[r] = fmaf(c.own[j], a.x[r], bx);
          q[r] = fmaf(c.own[j], a.e[r], be);
          bx = fmaf(bx, d, a.x[r]);
          be = fmaf(be, d, a.e[r]);
        }
#pragma unroll
        for (int r = 0; r < PART; ++r) {
          terms(channel(words.g[r], j), f.x[j] + p[r], f.e[j] + q[r], p[r], q[r]);
          f.x[j] = fmaf(f.x[j], d, a.x[r]);
          f.e[j] = fmaf(f.e[j], d, a.e[r]);
          forward.x[j] = fmaf(forward.x[j], d, p[r]);
          forward.e[j] = fmaf(forward.e[j], d, q[r]);
        }
        bx = p[PART - 1], be = q[PART - 1];
#pragma unroll
        for (int r = PART - 2; r >= 0; --r) {
          bx = fmaf(bx, d, p[r]);
          be = fmaf(be, d, q[r]);
        }
        backward[1].x[j] = bx, backward[1].e[j] = be;
      }
    }
  }
  // p = g / denominator and q = p y.
  static __device__ __forceinline__ void terms(float g, float numerator, float denominator,
                                               float& p, float& q) {
    const float inverse = reciprocal(denominator);
    p = g * inverse;
    q = p * (numerator * inverse);
  }

  __device__ __forceinline__ Summed add_up_adjoints(int i, const Place& p, const Added& added) {
    const int stage = i % 2;
    const Constants c = get_constants(stage);
    Summed s;
    s.second = added.second;
    get(OF_VALUES, i, c, added.other, s.before, s.behind);
    const int left = tokens_left(p);
    RowSums forward, backward[2];
    if (left >= L) {
      adjoint_sums<true>(stage, left, c, s, forward, backward);
    } else if (left > 0) {
      adjoint_sums<false>(stage, left, c, s, forward, backward);
    }
    s.p_second = backward[1];
    s.p_other = put(OF_ADJOINTS, c, forward, backward[1].then(c.part, backward[0]));
    return s;
  }

  // Writes the gradients of a row; whether its sums are none to rely on.
  template <bool FULL>
  __device__ __forceinline__ bool gradients(int stage, int left, const Constants& c,
                                            const Summed& s, RowSums before, const RowSums& behind,
                                            float (&by_w)[2], float (&by_u)[2], const Place& p,
                                            bool there) const {
    const unsigned step = unsigned(args.channels) / 2;
    const int64_t token = int64_t(p.batch) * args.tokens + p.segment * Shape::TOKENS + row() * L;
    const int64_t at = (token * args.channels + p.tile * WIDTH) / 2 + pair;
    uint32_t *dk = static_cast<uint32_t*>(args.dk) + at, *dv = static_cast<uint32_t*>(args.dv) + at;
    RowSums f = s.before, moment, b, b_begin, r_, r_begin;
#pragma unroll Shape::UNROLL
    for (int h = 0; h < 2; ++h) {
      const Words words = get_words<true>(stage, h);
      b = h ? s.behind : s.behind.then(c.part, s.second);
      r_ = h ? behind : behind.then(c.part, s.p_second);
      float by_v[2][PART], by_k[2][PART];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const Weights a = weigh<FULL>(words, j, left - h * PART, c);
        const float d = c.decay[j];
        float s0[PART], s1[PART], p_[PART], q_[PART], within = 0.0f;
#pragma unroll
        for (int r = PART - 1; r >= 0; --r) {
          s0[r] = b.x[j], s1[r] = b.e[j];
          b.x[j] = fmaf(b.x[j], d, a.x[r]);
          b.e[j] = fmaf(b.e[j], d, a.e[r]);
        }
#pragma unroll
        for (int r = 0; r < PART; ++r) {
          terms(channel(words.g[r], j), fmaf(c.own[j], a.x[r], f.x[j] + s0[r]),
                fmaf(c.own[j], a.e[r], f.e[j] + s1[r]), p_[r], q_[r]);
          by_w[j] = fmaf(before.x[j], s0[r], by_w[j]);
          by_w[j] = fmaf(-before.e[j], s1[r], by_w[j]);
          within = fmaf(p_[r], moment.x[j], within);
          within = fmaf(-q_[r], moment.e[j], within);
          by_u[j] = fmaf(a.x[r], p_[r], by_u[j]);
          by_u[j] = fmaf(-a.e[r], q_[r], by_u[j]);
          moment.x[j] = fmaf(moment.x[j], d, f.x[j]);
          moment.e[j] = fmaf(moment.e[j], d, f.e[j]);
          f.x[j] = fmaf(f.x[j], d, a.x[r]);
          f.e[j] = fmaf(f.e[j], d, a.e[r]);
          s0[r] = fmaf(c.own[j], p_[r], before.x[j]);
          s1[r] = fmaf(c.own[j], q_[r], before.e[j]);
          before.x[j] = fmaf(before.x[j], d, p_[r]);
          before.e[j] = fmaf(before.e[j], d, q_[r]);
        }
        by_w[j] += within;
#pragma unroll
        for (int r = PART - 1; r >= 0; --r) {
          const float g0 = s0[r] + r_.x[j], g1 = s1[r] + r_.e[j];
          by_v[j][r] = a.e[r] * g0;
          by_k[j][r] = fmaf(a.x[r], g0, -(a.e[r] * g1));
          r_.x[j] = fmaf(r_.x[j], d, p_[r]);
          r_.e[j] = fmaf(r_.e[j], d, q_[r]);
        }
      }
#pragma unroll
      for (int r = 0; r < PART; ++r) {
        if (there && (FULL || h * PART + r < left)) {
          dv[unsigned(r) * step] = pack<T>(by_v[0][r], by_v[1][r]);
          dk[unsigned(r) * step] = pack<T>(by_k[0][r], by_k[1][r]);
        }
      }
      dv += PART * step, dk += PART * step;
      if (h == 0) b_begin = b, r_begin = r_;
    }
    // all that any token of the row sees has come together at its ends, and so has what it adds
    bool wrong = false;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      by_w[j] = fmaf(behind.x[j], moment.x[j], fmaf(-behind.e[j], moment.e[j], by_w[j]));
      const float values = fabsf(f.x[j]) + fabsf(b_begin.x[j]),
                  weights = f.e[j] + b_begin.e[j];
      const float p_size = fabsf(before.x[j]) + fabsf(r_begin.x[j]),
                  q_size = fabsf(before.e[j]) + fabsf(r_begin.e[j]);
      // not if it is NaN either
      if (!(values + weights < LARGEST_SUM && p_size + q_size < LARGEST_ADJOINT)) wrong = true;
      // so small that something may have been lost
      if (!(p_size > LEAST_ADJOINT && q_size > LEAST_ADJOINT) && holds(stage, 2, j) &&
          (!(p_size > LEAST_ADJOINT) || holds(stage, 1, j)))
        wrong = true;
    }
    return wrong;
  }

  __device__ __forceinline__ void write(int i, const Place& p, const Summed& s) {
    const int stage = i % 2;
    const Constants c = get_constants(stage);
    RowSums before, behind;
    get(OF_ADJOINTS, i, c, s.p_other, before, behind);
    const int left = tokens_left(p);
    const bool there = p.tile * WIDTH + 2 * pair < args.channels;
    float by_w[2] = {0.0f, 0.0f}, by_u[2] = {0.0f, 0.0f};
    bool wrong = false;
    if (left >= L) {
      wrong = gradients<true>(stage, left, c, s, before, behind, by_w, by_u, p, there);
    } else if (left > 0) {
      wrong = gradients<false>(stage, left, c, s, before, behind, by_w, by_u, p, there);
    }
    if (wrong && there) args.marks[p.batch * args.tiles + p.tile] = WRONG;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      by_w[j] += __shfl_xor_sync(0xffffffffu, by_w[j], 16);
      by_u[j] += __shfl_xor_sync(0xffffffffu, by_u[j], 16);
    }
    auto* to = reinterpret_cast<float2*>(this->partial + 2 * warp * WIDTH) + pair;
    if (half == 0) {
      to[0] = make_float2(-c.decay[0] * by_w[0], -c.decay[1] * by_w[1]);
      to[WIDTH / 2] = make_float2(c.own[0] * by_u[0], c.own[1] * by_u[1]);
    }
    this->empty[stage].arrive();
  }
};

}  // namespace linvis::bi_wkv::stream
