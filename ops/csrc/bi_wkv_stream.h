// Bi-WKV's forward pass in one launch that reads its inputs once: how its work is divided. For GPU
// and CPU.
//
// An item is WIDTH channels of one segment of one sequence. A thread block takes one item after the
// other; the rows of a segment are summed up by its threads, two channels each. Sums are plain
// numbers in units of exp(key of the middle token of the sequence), the reference; where they
// cannot be, they are NaN. linvis_ops/bi_wkv/README.md has the reasons.
//
// B sequences, T tokens, C channels, N segments of a sequence.
#pragma once

#include "bi_wkv.h"

namespace linvis::bi_wkv::stream {

// Channels of an item.
constexpr int WIDTH = 32;
// Numbers that a segment adds up, a channel: two sums for what is behind it, two for what is
// before.
constexpr int SUMS = 4;
// Least sum of the weights of a row and largest sum of what a token sees for which plain numbers
// lose nothing: with |w| times the tokens of a row and |u| at most SPAN, the denominator of a token
// is above 2^-104 and its bonus stays below 2^126.
constexpr float LEAST = 0x1p-70f;
constexpr float LARGEST = 0x1p95f;

// Tokens of a row; warps that compute, with two rows each; warps that move and exchange; items in
// shared memory; whether the outputs of an item wait until the next one is summed up, meanwhile its
// sums are exchanged with the other segments.
template <int LENGTH_, int WARPS_, int HELPERS_, int STAGES_, bool LAGS_>
struct Shape {
  static constexpr int LENGTH = LENGTH_, WARPS = WARPS_, HELPERS = HELPERS_, STAGES = STAGES_;
  static constexpr bool LAGS = LAGS_;
  static constexpr int PART = LENGTH / 2;  // tokens whose weights a thread holds at a time
  static constexpr int ROWS = 2 * WARPS;
  static constexpr int TOKENS = ROWS * LENGTH;  // of a segment
  static constexpr int THREADS = 32 * (WARPS + HELPERS);
  // Bytes in shared memory: a row of k or v, padded so that two rows have own banks; k or v; an
  // item with the five constants of its channels.
  static constexpr int ROW = LENGTH * WIDTH * 2 + 64;
  static constexpr int TENSOR = ROWS * ROW;
  static constexpr int STAGE = 2 * TENSOR + 5 * WIDTH * 4;
  // Floats: sums of pairs of rows; sums that enter a segment, for two items.
  static constexpr int PAIR_SUMS = WARPS * SUMS * WIDTH;
  static constexpr int ENTERING = 2 * SUMS * WIDTH;
  static constexpr int BARRIERS = 2 * STAGES + 4;
  static constexpr int BYTES = STAGES * STAGE + (PAIR_SUMS + ENTERING) * 4 + BARRIERS * 8 + 4;
};

// Sequences of one segment, and any others.
using Short = Shape<14, 7, 1, 2, false>;
template <int STAGES>
using Long = Shape<16, 8, 2, STAGES, true>;

struct Args {
  const float* w;  // (C,)
  const float* u;  // (C,)
  const void* k;   // (B, T, C), strides (k_batch, k_token, 1), rows aligned to 16 bytes
  const void* v;
  void* y;            // (B, T, C), contiguous
  float* sums;        // (B, N, SUMS, C)
  unsigned* arrived;  // (B, tiles): segments whose sums are in memory
  int64_t k_batch, k_token, v_batch, v_token;
  int tokens, channels, segments, tiles, items;
};

struct Place {
  int batch, tile, segment;
};

// Items of one of `blocks` thread blocks: every so many, so that the segments of a sequence, which
// wait for one another, are at work at the same time.
struct Items {
  int segments, tiles, count;
  Place step;

  template <class AnyArgs>
  LINVIS_INLINE Items(const AnyArgs& args, int block, int blocks)
      : segments(args.segments), tiles(args.tiles), step(place(blocks)) {
    count = (args.items - block + blocks - 1) / blocks;
  }
  LINVIS_INLINE Place place(int item) const {
    return {item / segments / tiles, item / segments % tiles, item % segments};
  }
  LINVIS_INLINE void advance(Place& p) const {
    p.segment += step.segment;
    p.tile += step.tile;
    p.batch += step.batch;
    if (p.segment >= segments) {
      p.segment -= segments;
      ++p.tile;
    }
    if (p.tile >= tiles) {
      p.tile -= tiles;
      ++p.batch;
    }
  }
};

}  // namespace linvis::bi_wkv::stream
