// Bi-WKV's backward pass in one launch that reads its inputs once: how its work is divided. For GPU
// and CPU.
//
// Items, rows and plain sums are those of the forward pass (bi_wkv_stream.h). The rows of an item
// are summed up; with the sums of all others they find y and the denominator of each token, and add
// up p = g / denominator and q = p y; with the sums of those they write the gradients.
#pragma once

#include "bi_wkv_stream.h"

namespace linvis::bi_wkv::stream {

// What p and q may be for plain numbers to lose nothing. With |w| times the tokens of a row and |u|
// at most SPAN, denominators are between 2^-80 and 2^80, so that p is a number where g is one of
// 2^-40 to 2^40; where all that a row knows of g or of v is less than LEAST_ADJOINT, it is less.
constexpr float LEAST_WEIGHT = 0x1p-50f;
constexpr float LARGEST_SUM = 0x1p50f;
constexpr float LEAST_ADJOINT = 0x1p-100f;
constexpr float LARGEST_ADJOINT = 0x1p100f;

// Bytes of what is not there yet, in memory that thread blocks exchange sums by: no sum is this
// NaN. Marks of sequences that are in order are made of them, too.
constexpr unsigned char ABSENT_BYTE = 0xff;
constexpr uint32_t ABSENT = 0xffffffffu;
constexpr int IN_ORDER = -1, WRONG = 1;

// Tokens of a row; warps that compute, with two rows each; thread blocks of a multiprocessor; parts
// of a row that are written out one after the other, which takes more code and no registers for the
// loop.
template <int LENGTH_, int WARPS_, int BLOCKS_, int UNROLL_>
struct BackwardShape {
  static constexpr int LENGTH = LENGTH_, WARPS = WARPS_, BLOCKS = BLOCKS_, UNROLL = UNROLL_;
  static constexpr int STAGES = 2;
  static constexpr int PART = LENGTH / 2;  // tokens that a thread holds at a time
  static constexpr int ROWS = 2 * WARPS;
  static constexpr int TOKENS = ROWS * LENGTH;  // of a segment
  static constexpr int THREADS = 32 * (WARPS + 1);
  // Bytes in shared memory: k, v or g; an item with the five constants of its channels.
  static constexpr int TENSOR = TOKENS * WIDTH * 2;
  static constexpr int STAGE = 3 * TENSOR + 5 * WIDTH * 4;
  // Floats: sums of pairs of rows, of (v, 1) and of (p, q); gradients by w and u of pairs of rows.
  static constexpr int PAIR_SUMS = 2 * WARPS * SUMS * WIDTH;
  static constexpr int PARTIAL = 2 * WARPS * WIDTH;
  static constexpr int BARRIERS = 2 * STAGES + 4;
  static constexpr int BYTES = STAGES * STAGE + (PAIR_SUMS + PARTIAL) * 4 + BARRIERS * 8;
};

// Sequences of one segment; any others; long ones, where the GPU has the shared memory. All are 16
// warps of a multiprocessor, which may have 128 registers each.
using ShortBackward = BackwardShape<14, 7, 2, 1>;
using LongBackward = BackwardShape<16, 7, 2, 2>;
using WideBackward = BackwardShape<16, 15, 1, 2>;
// Tokens from which on sequences are long; measured on an H200.
constexpr int WIDE_TOKENS = 8192;

struct BackwardArgs {
  const float* w;  // (C,)
  const float* u;  // (C,)
  const void* k;   // (B, T, C), strides (k_batch, k_token, 1), rows aligned to 16 bytes
  const void* v;
  const void* g;      // gradient by y
  void* dk;           // (B, T, C), contiguous
  void* dv;           // (B, T, C), contiguous
  float* partial;  // (B, N, 2, C): gradients by w and u of each segment
  float* sums;     // (2, B, N, 2, 2 C): of (v, 1) and (p, q), forward and backward, by two channels
  int* marks;      // (B, tiles): whether plain sums are good enough
  int64_t k_batch, k_token, v_batch, v_token, g_batch, g_token;
  int tokens, channels, segments, tiles, items, batch;
};

}  // namespace linvis::bi_wkv::stream
