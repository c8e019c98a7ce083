// How (B, T, C) is divided into thread blocks.
#pragma once

#include "bi_wkv_worker.h"

namespace linvis::bi_wkv {

// Tokens of a thread, threads along the channels, and most registers of a thread. For T = 196 and
// 16 bits, a multiprocessor holds three thread blocks forward and two backward.
template <class T>
struct Forward {
  static constexpr int LENGTH = sizeof(T) == 2 ? 16 : 8, PAIRS = 16, REGISTERS = 96;
};
template <class T>
struct Backward {
  static constexpr int LENGTH = 8, PAIRS = 8, REGISTERS = 128;
};

struct Division {
  int rows;      // blocks of a segment, which are the rows of a thread block
  int segments;  // of a sequence
};

// Whole sequences where their blocks fit one thread block: every input is read once. Else segments
// of at most 16 blocks, shorter ones where there would be less than two for every multiprocessor.
template <class Shape>
Division divide_tokens(int64_t batch, int64_t tokens, int64_t channels, int multiprocessors) {
  const int64_t blocks = (tokens + Shape::LENGTH - 1) / Shape::LENGTH;
  if (blocks <= MOST_THREADS / Shape::PAIRS) return {int(blocks), 1};
  const int64_t tiles = (channels + 2 * Shape::PAIRS - 1) / (2 * Shape::PAIRS);
  int64_t rows = 16;
  while (rows > 4 && batch * tiles * ((blocks + rows - 1) / rows) < 2 * multiprocessors) rows /= 2;
  const int64_t segments = (blocks + rows - 1) / rows;
  return {int((blocks + segments - 1) / segments), int(segments)};
}

}  // namespace linvis::bi_wkv
