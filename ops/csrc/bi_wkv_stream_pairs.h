// Outputs of an item of the streaming kernel for any inputs: pairs are joined token by token. For
// GPU and CPU.
#pragma once

#include "bi_wkv_stream.h"

namespace linvis::bi_wkv::stream {

// One row of one channel of an item. All rows share the tokens outside of the segment: each adds
// up as many, puts its sums into a table and, behind a barrier, joins those of all others.
template <class T, class Shape>
struct PairRow {
  static constexpr int L = Shape::LENGTH, ROWS = Shape::ROWS;
  // Of a row: a share of the tokens before the segment, for its first token, and of those behind
  // it, for its last; its own tokens, for what is behind them and for what is before them.
  enum { BEFORE, BEHIND, FORWARD, BACKWARD, KINDS };
  static constexpr int FLOATS = ROWS * KINDS * (FIELDS / 2) * WIDTH;  // of a table

  Far<T> tokens;         // all of the sequence
  int place;             // of the channel in its tile
  int row, start, stop;  // of the segment
  int first, last;       // of the row: first == last where it is empty

  LINVIS_INLINE PairRow(const Args& args, const Place& p, int row, int place)
      : place(place), row(row) {
    const int64_t channel = int64_t(p.tile) * WIDTH + place;
    tokens = {static_cast<const T*>(args.k) + p.batch * args.k_batch + channel,
              static_cast<const T*>(args.v) + p.batch * args.v_batch + channel,
              args.k_token,
              args.v_token,
              args.w[channel] * LOG2E,
              args.u[channel],
              args.tokens};
    start = p.segment * Shape::TOKENS;
    stop = int(least(start + Shape::TOKENS, args.tokens));
    first = int(least(start + row * L, stop));
    last = int(least(first + L, stop));
  }

  LINVIS_INLINE Sums token(int t, int distance) const {
    Sums a = tokens.token(t);
    a.distance = float(distance);
    return a;
  }
  LINVIS_INLINE float* field(float* table, int of_row, int kind) const {
    return table + (of_row * KINDS + kind) * (FIELDS / 2) * WIDTH + place;
  }
  LINVIS_INLINE void put(float* table, int kind, const Sums& a) const {
    float* to = field(table, row, kind);
    to[0] = a.value;
    to[WIDTH] = a.distance;
    to[2 * WIDTH] = a.s0;
    to[3 * WIDTH] = a.s1;
  }
  // Joins what a row has put, seen from so many tokens further away.
  LINVIS_INLINE Sums joined(const Sums& a, float* table, int of_row, int kind, int further) const {
    const float* from = field(table, of_row, kind);
    return join(tokens.w2, a,
                {from[0], from[WIDTH] + float(further), from[2 * WIDTH], from[3 * WIDTH]});
  }

  LINVIS_CALL void add_up(float* table) const {
    Sums before, behind, forward, backward;
#pragma unroll 4
    for (int t = row; t < start; t += ROWS)
      before = join(tokens.w2, before, token(t, start - 1 - t));
#pragma unroll 4
    for (int t = stop + row; t < tokens.tokens; t += ROWS)
      behind = join(tokens.w2, behind, token(t, t - stop));
    for (int t = first; t < last; ++t) {
      forward = join(tokens.w2, forward, token(t, last - 1 - t));
      backward = join(tokens.w2, backward, token(t, t - first));
    }
    put(table, BEFORE, before);
    put(table, BEHIND, behind);
    put(table, FORWARD, forward);
    put(table, BACKWARD, backward);
  }

  LINVIS_CALL void write(float* table, T* y, int64_t y_token) const {
    Sums before, behind;
    for (int m = 0; m < ROWS; ++m) {
      before = joined(before, table, m, BEFORE, first - start);
      behind = joined(behind, table, m, BEHIND, stop - last);
    }
    for (int m = 0; m < row; ++m) before = joined(before, table, m, FORWARD, (row - 1 - m) * L);
    // rows that are empty hold nothing
    for (int m = row + 1; m < ROWS; ++m)
      behind = joined(behind, table, m, BACKWARD, (m - 1 - row) * L);
    Far<T> own = tokens;
    own.k += first * own.k_token;
    own.v += first * own.v_token;
    own.tokens = last - first;
    outputs<Far<T>, L>(own, before, behind, [=](int r, float x) { y[r * y_token] = T(x); });
  }
};

}  // namespace linvis::bi_wkv::stream
