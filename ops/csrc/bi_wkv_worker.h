// The phases of a thread of a Bi-WKV kernel; a barrier lies between two phases.
#pragma once

#include "bi_wkv.h"

namespace linvis::bi_wkv {

// Two channels of a token as they lie in memory.
template <class T>
struct Two {
  using One = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  using Bits = std::conditional_t<sizeof(T) == 2, uint32_t, uint64_t>;
  static constexpr int SIZE = 8 * sizeof(T);
  Bits bits;

  LINVIS_INLINE float get(int i) const {
    const One one = One(bits >> (SIZE * i));
    T x;
    std::memcpy(&x, &one, sizeof(T));
    return float(x);
  }
  LINVIS_INLINE void set(int i, float value) {
    const T x = T(value);
    One one;
    std::memcpy(&one, &x, sizeof(T));
    bits = (bits & ~(Bits(One(~One(0))) << (SIZE * i))) | (Bits(one) << (SIZE * i));
  }
};

// PAIRS threads along the channels, two channels each.
template <class T, int L, int PAIRS, Stage STAGE>
struct Worker {
  static constexpr int WIDTH = 2 * PAIRS;
  // Floats of a row of sums in shared memory; padded, so that the rows of a warp have own banks.
  static constexpr int ROW = FIELDS * WIDTH + PAIRS;
  static constexpr bool BACKWARD = STAGE == Stage::Adjoint || STAGE == Stage::Gradient;
  static constexpr int PHASES = STAGE == Stage::Sums      ? 2
                                : STAGE == Stage::Output  ? 3
                                : STAGE == Stage::Adjoint ? 4
                                                          : 6;

  const Args& args;
  float* shared;
  int thread, row, segment;
  int64_t batch, start, tile;
  int64_t channel;  // the first of two
  int count;        // tokens of the block; none where there is no channel
  float w2[2], d[2], own[2], top[2];
  bool near;
  Two<T> k[L], v[L], g[L];

  LINVIS_INLINE Worker(const Args& args, float* shared, unsigned block, int thread)
      : args(args), shared(shared), thread(thread), row(thread / PAIRS) {
    const unsigned tiles = (args.channels + WIDTH - 1) / WIDTH;
    // what the launch before read last is read first: it may still be in the cache
    if (STAGE == Stage::Output || STAGE == Stage::Adjoint) block = args.blocks - 1 - block;
    tile = block % tiles;
    block /= tiles;
    segment = int(block % args.segments);
    batch = block / args.segments;
    start = (int64_t(segment) * args.rows + row) * L;
    channel = tile * WIDTH + thread % PAIRS * 2;
    count = channel < args.channels ? int(most(least(L, args.tokens - start), 0)) : 0;
    near = true;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool there = channel + i < args.channels;
      const float w = there ? args.w[channel + i] : 0.0f;
      const float u = there ? args.u[channel + i] : 0.0f;
      w2[i] = w * LOG2E;
      d[i] = 1.0f + expm1f(-w);
      own[i] = exp2_of(u * LOG2E);
      near = near && fabsf(w) * L <= SPAN && fabsf(u) <= SPAN;
      // where far tokens weigh more, sums of p and q may exceed those of the block by far
      if (BACKWARD) near = near && w * float(args.tokens) >= -2.0f * SPAN;
    }
  }

  // phase is known when this is compiled, since the loop over phases is unrolled
  LINVIS_INLINE void run(int phase) {
    if (phase == 0) {
      load();
      add_block();
      if (STAGE != Stage::Sums) add_others(args.sums);
    } else if (phase == 1) {
      exchange(forward(), STAGE == Stage::Sums ? args.sums : nullptr);
    } else if (phase == 2 && STAGE == Stage::Output) {
      write_outputs();
    } else if (phase == 2) {
      add_adjoint();
      if (STAGE == Stage::Gradient) add_others(args.adjoints);
    } else if (phase == 3) {
      exchange(adjoint(), STAGE == Stage::Adjoint ? args.adjoints : nullptr);
    } else if (phase == 4) {
      write_gradients();
    } else {
      reduce();
    }
  }

  // Shared memory: sums of blocks, sums of p and q of blocks, sums of other segments.
  static LINVIS_INLINE int64_t shared_floats(int rows, int segments) {
    return int64_t(ROW) * rows * (1 + BACKWARD + (segments > 1 && STAGE != Stage::Sums));
  }
  LINVIS_INLINE float* forward() const { return shared; }
  LINVIS_INLINE float* adjoint() const { return shared + ROW * args.rows; }
  LINVIS_INLINE float* others() const { return shared + ROW * args.rows * (1 + BACKWARD); }

  // Place of channel i in a row, and the channel at a place.
  LINVIS_INLINE int place(int i) const { return i * PAIRS + thread % PAIRS; }
  LINVIS_INLINE int64_t channel_at(int place) const {
    return tile * WIDTH + place % PAIRS * 2 + place / PAIRS;
  }
  static LINVIS_INLINE void put(float* rows, int row, int side, int place, const Sums& a) {
    float* p = rows + row * ROW + side * (FIELDS / 2) * WIDTH + place;
    p[0] = a.value;
    p[WIDTH] = a.distance;
    p[2 * WIDTH] = a.s0;
    p[3 * WIDTH] = a.s1;
  }
  static LINVIS_INLINE Sums get(const float* rows, int row, int side, int place) {
    const float* p = rows + row * ROW + side * (FIELDS / 2) * WIDTH + place;
    return {p[0], p[WIDTH], p[2 * WIDTH], p[3 * WIDTH]};
  }

  LINVIS_INLINE void load_from(const void* from, int64_t batch_stride, int64_t token_stride,
                               float fill, Two<T>* to) const {
    const T* p =
        static_cast<const T*>(from) + batch * batch_stride + start * token_stride + channel;
    Two<T> none{};
    none.set(0, fill);
    none.set(1, fill);
    if (args.paired) {
#pragma unroll
      for (int r = 0; r < L; ++r)
        to[r].bits = r < count
                         ? *reinterpret_cast<const typename Two<T>::Bits*>(p + r * token_stride)
                         : none.bits;
      return;
    }
#pragma unroll
    for (int r = 0; r < L; ++r) {
      to[r].set(0, r < count ? float(p[r * token_stride]) : fill);
      to[r].set(1, r < count && channels() > 1 ? float(p[r * token_stride + 1]) : fill);
    }
  }
  LINVIS_INLINE void load() {
    load_from(args.k, args.k_batch, args.k_token, -INFINITY, k);
    load_from(args.v, args.v_batch, args.v_token, 0.0f, v);
    if (BACKWARD) load_from(args.g, args.g_batch, args.g_token, 0.0f, g);
  }

  LINVIS_INLINE void store_to(void* to, const Two<T>* from) const {
    T* p = static_cast<T*>(to) + (batch * args.tokens + start) * args.channels + channel;
    const int64_t step = args.channels;
    if (args.paired) {
#pragma unroll
      for (int r = 0; r < L; ++r)
        if (r < count) *reinterpret_cast<typename Two<T>::Bits*>(p + r * step) = from[r].bits;
      return;
    }
#pragma unroll
    for (int r = 0; r < L; ++r) {
      if (r < count) p[r * step] = T(from[r].get(0));
      if (r < count && channels() > 1) p[r * step + 1] = T(from[r].get(1));
    }
  }

  LINVIS_INLINE Near<L> near_block(int i, const Sums& reference) const {
    Near<L> block;
    block.w2 = w2[i];
    block.d = d[i];
    block.own = own[i];
    block.value = reference.value;
    block.distance = reference.distance;
    const float shift = w2[i] * reference.distance;
#pragma unroll
    for (int r = 0; r < L; ++r) {
      block.e[r] = exp2_of(fmaf(k[r].get(i) - reference.value, LOG2E, shift));
      block.x[r] = block.e[r] * v[r].get(i);
    }
    return block;
  }
  // Beside the largest log weight: of the tokens, and of what enters from both sides.
  LINVIS_INLINE Near<L> near_block(int i, const Sums& before, const Sums& behind) const {
    Sums reference;
    reference.value = top[i];
    if (exceeds(w2[i], before, reference)) reference = before;
    if (exceeds(w2[i], behind, reference)) reference = behind;
    return near_block(i, reference);
  }
  LINVIS_INLINE int64_t at(int64_t batch_stride, int64_t token_stride, int i) const {
    return batch * batch_stride + start * token_stride + channel + i;
  }
  LINVIS_INLINE Far<T> far_block(int i) const {
    return {static_cast<const T*>(args.k) + at(args.k_batch, args.k_token, i),
            static_cast<const T*>(args.v) + at(args.v_batch, args.v_token, i),
            args.k_token,
            args.v_token,
            w2[i],
            args.u[channel + i],
            count};
  }
  LINVIS_INLINE int64_t out(int i) const {
    return at(int64_t(args.tokens) * args.channels, args.channels, i);
  }
  // Number of channels of this thread that exist.
  LINVIS_INLINE int channels() const { return int(least(2, args.channels - channel)); }

  LINVIS_INLINE void add_block() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = NOTHING;
#pragma unroll
      for (int r = 0; r < L; ++r) top[i] = fmaxf(top[i], k[r].get(i));
      Sums before, behind;
      if (near) {
        Sums reference;
        reference.value = top[i];
        block_sums(near_block(i, reference), before, behind);
      } else if (count > 0 && i < channels()) {
        far_block_sums(far_block(i), before, behind);
      }
      put(forward(), row, 0, place(i), before);
      put(forward(), row, 1, place(i), behind);
    }
  }

  // Every row joins a share of the other segments, as the ends of this segment see them.
  LINVIS_INLINE void add_others(const float* sums) const {
    if (args.segments == 1) return;
    const int share = (args.segments + args.rows - 1) / args.rows;
    const int64_t first = row * share, last = least(first + share, args.segments);
    const int64_t size = int64_t(args.rows) * L;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Sums before, behind;
      if (channel + i < args.channels) {
        for (int64_t m = first; m < least(last, segment); ++m)
          before =
              join(w2[i], before, segment_sums(sums, m, 0, i, float((segment - m - 1) * size)));
        for (int64_t m = most(first, segment + 1); m < last; ++m)
          behind =
              join(w2[i], behind, segment_sums(sums, m, 1, i, float((m - segment - 1) * size)));
      }
      put(others(), row, 0, place(i), before);
      put(others(), row, 1, place(i), behind);
    }
  }
  LINVIS_INLINE Sums segment_sums(const float* sums, int64_t m, int side, int i, float gap) const {
    const int64_t field = (batch * args.segments + m) * FIELDS + side * (FIELDS / 2);
    const float* p = sums + field * args.channels + channel + i;
    const int64_t step = args.channels;
    return {p[0], p[step] + gap, p[2 * step], p[3 * step]};
  }

  // Replaces the sums of every block by those of all tokens on that side of it; stores the sums of
  // the segment if asked to. One thread has one channel and one side.
  LINVIS_INLINE void exchange(float* rows, float* totals) const {
    for (int q = thread; q < 2 * WIDTH; q += args.rows * PAIRS) {
      const int side = q / WIDTH, place = q % WIDTH;
      const int64_t c = channel_at(place);
      if (c >= args.channels) continue;
      const float decay = args.w[c] * LOG2E;
      Sums a;
      if (STAGE != Stage::Sums && args.segments > 1 && totals == nullptr) {
        const int shares = int(least(args.rows, args.segments));
        for (int j = 0; j < shares; ++j)
          a = join(decay, a, get(others(), side ? shares - 1 - j : j, side, place));
      }
      Sums next = get(rows, side ? args.rows - 1 : 0, side, place);
      for (int j = 0; j < args.rows; ++j) {
        const int at = side ? args.rows - 1 - j : j;
        const Sums own = next;
        if (j + 1 < args.rows) next = get(rows, side ? at - 1 : at + 1, side, place);
        put(rows, at, side, place, a);
        a.distance += L;
        a = join(decay, a, own);
      }
      if (totals == nullptr) continue;
      const int64_t field = (batch * args.segments + segment) * FIELDS + side * (FIELDS / 2);
      float* p = totals + field * args.channels + c;
      const int64_t step = args.channels;
      p[0] = a.value;
      p[step] = a.distance;
      p[2 * step] = a.s0;
      p[3 * step] = a.s1;
    }
  }

  LINVIS_INLINE void write_outputs() {
    if (count == 0) return;
    T* y = static_cast<T*>(args.y);
    if (!near) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (i < channels())
          far_outputs<T, L>(far_block(i), get(forward(), row, 0, place(i)),
                            get(forward(), row, 1, place(i)), y + out(i), args.channels);
      return;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Sums before = get(forward(), row, 0, place(i)),
                 behind = get(forward(), row, 1, place(i));
      outputs<Near<L>, L>(near_block(i, before, behind), before, behind,
                          [&](int r, float x) { v[r].set(i, x); });
    }
    store_to(args.y, v);
  }

  LINVIS_INLINE void add_adjoint() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Sums before = get(forward(), row, 0, place(i)),
                 behind = get(forward(), row, 1, place(i));
      Sums p_before, p_behind;
      if (count > 0 && near) {
        adjoint_sums<Near<L>, L>(
            near_block(i, before, behind), before, behind, [&](int r) { return g[r].get(i); },
            p_before, p_behind);
      } else if (count > 0 && i < channels()) {
        far_adjoint_sums<T, L>(far_block(i), before, behind,
                               static_cast<const T*>(args.g) + at(args.g_batch, args.g_token, i),
                               args.g_token, p_before, p_behind);
      }
      put(adjoint(), row, 0, place(i), p_before);
      put(adjoint(), row, 1, place(i), p_behind);
    }
  }

  LINVIS_INLINE void write_gradients() {
    ByChannel by[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Sums before = get(forward(), row, 0, place(i)),
                 behind = get(forward(), row, 1, place(i));
      const Sums p_before = get(adjoint(), row, 0, place(i));
      const Sums p_behind = get(adjoint(), row, 1, place(i));
      if (count > 0 && near) {
        by[i] = gradients<Near<L>, L>(
            near_block(i, before, behind), before, behind, p_before, p_behind,
            [&](int r) { return g[r].get(i); },
            [&](int r, float dv, float dk) {
              v[r].set(i, dv);
              k[r].set(i, dk);
            });
      } else if (count > 0 && i < channels()) {
        by[i] = far_gradients<T, L>(
            far_block(i), before, behind, p_before, p_behind,
            static_cast<const T*>(args.g) + at(args.g_batch, args.g_token, i), args.g_token,
            static_cast<T*>(args.y) + out(i), static_cast<T*>(args.dk) + out(i), args.channels);
      }
      adjoint()[row * ROW + place(i)] = by[i].w;
      adjoint()[row * ROW + WIDTH + place(i)] = by[i].u;
    }
    if (count > 0 && near) {
      store_to(args.y, v);
      store_to(args.dk, k);
    }
  }

  // Sums of the gradients by w and u over the rows, in their order.
  LINVIS_INLINE void reduce() const {
    for (int q = thread; q < 2 * WIDTH; q += args.rows * PAIRS) {
      const int64_t c = channel_at(q % WIDTH);
      if (c >= args.channels) continue;
      float sum = 0.0f;
      for (int j = 0; j < args.rows; ++j) sum += adjoint()[j * ROW + q];
      const int64_t places = args.blocks / ((args.channels + WIDTH - 1) / WIDTH);  // B N
      args.partial[((q / WIDTH) * places + batch * args.segments + segment) * args.channels + c] =
          sum;
    }
  }
};

}  // namespace linvis::bi_wkv
