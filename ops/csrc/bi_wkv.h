// Bi-WKV on one thread: what is computed between two barriers, for GPU and CPU.
//
// A thread has two channels of one block of L tokens and keeps them in registers. The blocks of a
// segment (all of a sequence, or a part) are the rows of one thread block, which exchanges the sums
// of blocks through shared memory; segments exchange theirs through global memory, between
// launches. linvis_ops/bi_wkv/README.md has the equations and what a pair (value, distance) is.
//
// B sequences, T tokens, C channels, N segments of a sequence.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#define LINVIS_INLINE __host__ __device__ __forceinline__
#define LINVIS_CALL __host__ __device__ __noinline__
#else
#define LINVIS_INLINE inline
#define LINVIS_CALL inline
#endif

namespace linvis::bi_wkv {

constexpr float LOG2E = 1.4426950408889634f;
// Log weight of no tokens.
constexpr float NOTHING = -1e30f;
// Largest |w| L and largest |u| for which a block is computed beside one reference.
constexpr float SPAN = 20.0f;
// Value, distance and two sums of what the tokens behind see; the same of what those before see.
constexpr int FIELDS = 8;
constexpr int MOST_THREADS = 512;

enum class Stage { Sums, Output, Adjoint, Gradient };

struct Args {
  const float* w;  // (C,)
  const float* u;  // (C,)
  const void* k;   // (B, T, C), strides (k_batch, k_token, 1)
  const void* v;
  const void* g;    // gradient by y
  void* y;          // (B, T, C), contiguous; the gradient by v in the backward pass
  void* dk;         // (B, T, C), contiguous
  float* sums;      // (B, N, FIELDS, C): of (v, 1), by segment
  float* adjoints;  // (B, N, FIELDS, C): of (g, g y) / denominator
  float* partial;   // (2, B, N, C): gradients by w and u of each segment
  int64_t k_batch, k_token, v_batch, v_token, g_batch, g_token;
  int64_t blocks;  // thread blocks: B N tiles
  int tokens, channels, segments, rows;
  bool paired;  // whether two channels can be moved at once
};

LINVIS_INLINE float exp2_of(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

LINVIS_INLINE float divide(float x, float y) {
#ifdef __CUDA_ARCH__
  return __fdividef(x, y);
#else
  return x / y;
#endif
}

LINVIS_INLINE constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
LINVIS_INLINE constexpr int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }

// Two sums in units of exp(value - w distance).
struct Sums {
  float value = NOTHING, distance = 0.0f, s0 = 0.0f, s1 = 0.0f;
};

// The smaller of both, NaN if x is: fminf would hide it.
LINVIS_INLINE float at_most(float x, float most) {
#ifdef __CUDA_ARCH__
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(most));
  return y;
#else
  return x > most ? most : x;
#endif
}

// exp(log weight of a - that of b), for b that is not much smaller; w2 = w log2(e).
LINVIS_INLINE float ratio(float w2, float value, float distance, float b_value, float b_distance) {
  return exp2_of(at_most((value - b_value) * LOG2E - w2 * (distance - b_distance), 120.0f));
}

LINVIS_INLINE bool exceeds(float w2, const Sums& a, const Sums& b) {
  return (a.value - b.value) * LOG2E > w2 * (a.distance - b.distance);
}

LINVIS_INLINE Sums join(float w2, const Sums& a, const Sums& b) {
  const bool second = exceeds(w2, b, a);
  Sums c;
  c.value = second ? b.value : a.value;
  c.distance = second ? b.distance : a.distance;
  const float p = ratio(w2, a.value, a.distance, c.value, c.distance);
  const float q = ratio(w2, b.value, b.distance, c.value, c.distance);
  c.s0 = a.s0 * p + b.s0 * q;
  c.s1 = a.s1 * p + b.s1 * q;
  return c;
}

struct Plain {
  float s0 = 0.0f, s1 = 0.0f;
};

// p = g / denominator and q = p y; y to the last place, since v - y may cancel.
LINVIS_INLINE Plain adjoint_terms(float g, float numerator, float denominator) {
  const float inverse = divide(1.0f, denominator);
  float y = numerator * inverse;
  y += (numerator - y * denominator) * inverse;
  const float p = g * inverse;
  return {p, p * y};
}

// One channel of a block, in units of exp(value - w distance), all in registers.
template <int L>
struct Near {
  using Sum = Plain;
  static constexpr int UNROLL = L;
  float w2, d, own, value, distance;  // d = exp(-w), own = exp(u)
  float e[L], x[L];                   // weights, and weights times v

  LINVIS_INLINE int count() const { return L; }
  LINVIS_INLINE Sum token(int r) const { return {x[r], e[r]}; }
  LINVIS_INLINE Sum step(const Sum& a, const Sum& x) const {
    return {fmaf(a.s0, d, x.s0), fmaf(a.s1, d, x.s1)};
  }
  LINVIS_INLINE Sum enter(const Sums& a) const {
    const float scale = ratio(w2, a.value, a.distance, value, distance);
    return {a.s0 * scale, a.s1 * scale};
  }
  LINVIS_INLINE Sum enter_adjoint(const Sums& a) const {
    const float scale = ratio(w2, a.value, a.distance, -value, -distance);
    return {a.s0 * scale, a.s1 * scale};
  }
  LINVIS_INLINE Sums leave(const Sum& a) const { return {value, distance, a.s0, a.s1}; }
  LINVIS_INLINE Sums leave_adjoint(const Sum& a) const { return {-value, -distance, a.s0, a.s1}; }
  LINVIS_INLINE Sum total(const Sum& before, const Sum& behind, int r) const {
    return {fmaf(own, x[r], before.s0 + behind.s0), fmaf(own, e[r], before.s1 + behind.s1)};
  }
  LINVIS_INLINE Sum adjoint(float g, const Sum& total) const {
    return adjoint_terms(g, total.s0, total.s1);
  }
  LINVIS_INLINE Sum with_own(const Sum& a, const Sum& p) const {
    return {fmaf(own, p.s0, a.s0), fmaf(own, p.s1, a.s1)};
  }
  LINVIS_INLINE float product(float sum, const Sum& p, const Sum& a) const {
    return fmaf(p.s0, a.s0, fmaf(-p.s1, a.s1, sum));
  }
  LINVIS_INLINE float by_w(float sum) const { return -d * sum; }
  LINVIS_INLINE float by_u(int r, const Sum& p) const { return own * (x[r] * p.s0 - e[r] * p.s1); }
  LINVIS_INLINE Plain by_vk(int r, const Sum& a, const Sum& b) const {
    const float s0 = a.s0 + b.s0, s1 = a.s1 + b.s1;
    return {e[r] * s0, x[r] * s0 - e[r] * s1};
  }
};

// The same for any w and u: every sum has a pair of its own, and tokens are read when needed.
template <class T>
struct Far {
  using Sum = Sums;
  static constexpr int UNROLL = 1;
  const T *k, *v;
  int64_t k_token, v_token;
  float w2, u;
  int tokens;

  LINVIS_INLINE int count() const { return tokens; }
  LINVIS_INLINE Sum token(int r) const {
    return {float(k[r * k_token]), 0.0f, float(v[r * v_token]), 1.0f};
  }
  LINVIS_INLINE Sum step(Sum a, const Sum& x) const {
    a.distance += 1.0f;
    return join(w2, a, x);
  }
  LINVIS_INLINE Sum enter(const Sums& a) const { return a; }
  LINVIS_INLINE Sum enter_adjoint(const Sums& a) const { return a; }
  LINVIS_INLINE Sums leave(const Sum& a) const { return a; }
  LINVIS_INLINE Sums leave_adjoint(const Sum& a) const { return a; }
  LINVIS_INLINE Sum total(const Sum& before, const Sum& behind, int r) const {
    Sum x = token(r);
    x.value += u;
    return join(w2, join(w2, before, behind), x);
  }
  LINVIS_INLINE Sum adjoint(float g, const Sum& total) const {
    const Plain p = adjoint_terms(g, total.s0, total.s1);
    return {-total.value, -total.distance, p.s0, p.s1};
  }
  LINVIS_INLINE Sum with_own(const Sum& a, Sum p) const {
    p.value += u;
    return join(w2, a, p);
  }
  LINVIS_INLINE float product(float sum, const Sum& p, const Sum& a) const {
    const float scale = ratio(w2, a.value, a.distance + 1.0f, -p.value, -p.distance);
    return sum + scale * (p.s0 * a.s0 - p.s1 * a.s1);
  }
  LINVIS_INLINE float by_w(float sum) const { return -sum; }
  LINVIS_INLINE float by_u(int r, const Sum& p) const {
    const Sum x = token(r);
    return ratio(w2, x.value + u, 0.0f, -p.value, -p.distance) * (x.s0 * p.s0 - p.s1);
  }
  LINVIS_INLINE Plain by_vk(int r, const Sum& a, const Sum& b) const {
    const Sum x = token(r), c = join(w2, a, b);
    const float scale = ratio(w2, x.value, 0.0f, -c.value, -c.distance);
    return {scale * c.s0, scale * (x.s0 * c.s0 - c.s1)};
  }
};

// What the block adds for the tokens behind it and before it.
template <class Block>
LINVIS_INLINE void block_sums(const Block& block, Sums& forward, Sums& backward) {
  typename Block::Sum a, b;
#pragma unroll Block::UNROLL
  for (int r = 0; r < block.count(); ++r) a = block.step(a, block.token(r));
#pragma unroll Block::UNROLL
  for (int r = block.count() - 1; r >= 0; --r) b = block.step(b, block.token(r));
  forward = block.leave(a);
  backward = block.leave(b);
}

// put(r, y) for every token, half a block after the other, which takes fewer registers.
template <class Block, int L, class Put>
LINVIS_INLINE void outputs(const Block& block, const Sums& before, const Sums& behind, Put put) {
  constexpr int HALF = (L + 1) / 2;
  typename Block::Sum seen[HALF], a = block.enter(before);
#pragma unroll
  for (int first = 0; first < L; first += HALF) {
    auto b = block.enter(behind);
#pragma unroll Block::UNROLL
    for (int r = block.count() - 1; r >= first; --r) {
      if (r < first + HALF) seen[r - first] = b;
      b = block.step(b, block.token(r));
    }
#pragma unroll Block::UNROLL
    for (int r = first; r < least(block.count(), first + HALF); ++r) {
      const auto total = block.total(a, seen[r - first], r);
      put(r, divide(total.s0, total.s1));
      a = block.step(a, block.token(r));
    }
  }
}

// What the block adds to the sums of p and q, for the tokens behind it and before it.
template <class Block, int L, class Get>
LINVIS_INLINE void adjoint_sums(const Block& block, const Sums& before, const Sums& behind, Get g,
                                Sums& forward, Sums& backward) {
  typename Block::Sum seen[L], a = block.enter(behind), c;
#pragma unroll Block::UNROLL
  for (int r = block.count() - 1; r >= 0; --r) {
    seen[r] = a;
    a = block.step(a, block.token(r));
  }
  a = block.enter(before);
#pragma unroll Block::UNROLL
  for (int r = 0; r < block.count(); ++r) {
    seen[r] = block.adjoint(g(r), block.total(a, seen[r], r));
    a = block.step(a, block.token(r));
    c = block.step(c, seen[r]);
  }
  forward = block.leave_adjoint(c);
  c = {};
#pragma unroll Block::UNROLL
  for (int r = block.count() - 1; r >= 0; --r) c = block.step(c, seen[r]);
  backward = block.leave_adjoint(c);
}

struct ByChannel {
  float w = 0.0f, u = 0.0f;
};

// put(r, dv, dk) for every token; returns what the block adds to the gradients by w and u.
template <class Block, int L, class Get, class Put>
LINVIS_INLINE ByChannel gradients(const Block& block, const Sums& before, const Sums& behind,
                                  const Sums& adjoint_before, const Sums& adjoint_behind, Get g,
                                  Put put) {
  typename Block::Sum seen[L], p[L], rest[L], a = block.enter(before);
#pragma unroll Block::UNROLL
  for (int r = 0; r < block.count(); ++r) {
    seen[r] = a;
    a = block.step(a, block.token(r));
  }
  a = block.enter(behind);
  auto c = block.enter_adjoint(adjoint_behind);
  ByChannel by;
#pragma unroll Block::UNROLL
  for (int r = block.count() - 1; r >= 0; --r) {
    p[r] = block.adjoint(g(r), block.total(seen[r], a, r));
    by.w = block.product(by.w, c, seen[r]);
    rest[r] = block.with_own(c, p[r]);
    seen[r] = a;
    a = block.step(a, block.token(r));
    c = block.step(c, p[r]);
  }
  c = block.enter_adjoint(adjoint_before);
#pragma unroll Block::UNROLL
  for (int r = 0; r < block.count(); ++r) {
    by.w = block.product(by.w, c, seen[r]);
    by.u += block.by_u(r, p[r]);
    const Plain by_vk = block.by_vk(r, c, rest[r]);
    put(r, by_vk.s0, by_vk.s1);
    c = block.step(c, p[r]);
  }
  by.w = block.by_w(by.w);
  return by;
}

// The functions for Far blocks are calls, so that they take no registers from the others.
template <class T>
LINVIS_CALL void far_block_sums(const Far<T>& block, Sums& forward, Sums& backward) {
  block_sums(block, forward, backward);
}

template <class T, int L>
LINVIS_CALL void far_outputs(const Far<T>& block, const Sums& before, const Sums& behind, T* y,
                             int64_t y_token) {
  outputs<Far<T>, L>(block, before, behind, [=](int r, float x) { y[r * y_token] = T(x); });
}

template <class T, int L>
LINVIS_CALL void far_adjoint_sums(const Far<T>& block, const Sums& before, const Sums& behind,
                                  const T* g, int64_t g_token, Sums& forward, Sums& backward) {
  const auto get = [=](int r) { return float(g[r * g_token]); };
  adjoint_sums<Far<T>, L>(block, before, behind, get, forward, backward);
}

template <class T, int L>
LINVIS_CALL ByChannel far_gradients(const Far<T>& block, const Sums& before, const Sums& behind,
                                    const Sums& adjoint_before, const Sums& adjoint_behind,
                                    const T* g, int64_t g_token, T* dv, T* dk, int64_t y_token) {
  const auto get = [=](int r) { return float(g[r * g_token]); };
  const auto put = [=](int r, float by_v, float by_k) {
    dv[r * y_token] = T(by_v);
    dk[r * y_token] = T(by_k);
  };
  return gradients<Far<T>, L>(block, before, behind, adjoint_before, adjoint_behind, get, put);
}

}  // namespace linvis::bi_wkv
