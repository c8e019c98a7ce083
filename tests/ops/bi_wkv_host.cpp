// Runs the phases of the CUDA kernels of Bi-WKV on the CPU, thread after thread.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "bi_wkv_division.h"
#include "bi_wkv_stream_backward.h"
#include "bi_wkv_stream_pairs.h"

namespace bi_wkv = linvis::bi_wkv;
using bi_wkv::Args;
using bi_wkv::Stage;

namespace {

template <class T, class Shape, Stage STAGE>
void run(const Args& args) {
  using Worker = bi_wkv::Worker<T, Shape::LENGTH, Shape::PAIRS, STAGE>;
  const auto size = Worker::shared_floats(args.rows, args.segments);
  for (int64_t block = 0; block < args.blocks; ++block) {
    std::vector<float> shared(size, std::numeric_limits<float>::quiet_NaN());
    std::vector<Worker> workers;
    for (int thread = 0; thread < args.rows * Shape::PAIRS; ++thread)
      workers.emplace_back(args, shared.data(), block, thread);
    // both orders of the threads: the result must not depend on it
    for (int phase = 0; phase < Worker::PHASES; ++phase) {
      const bool reverse = (block + phase) % 2 != 0;
      for (size_t i = 0; i < workers.size(); ++i)
        workers[reverse ? workers.size() - 1 - i : i].run(phase);
    }
  }
}

template <class T, class Shape, Stage... STAGES>
void run_all(Args args, int64_t batch) {
  const int64_t length = int64_t(args.rows) * Shape::LENGTH, width = 2 * Shape::PAIRS;
  args.segments = int((args.tokens + length - 1) / length);
  args.blocks = batch * args.segments * ((args.channels + width - 1) / width);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> sums(batch * args.segments * bi_wkv::FIELDS * args.channels, nan);
  std::vector<float> adjoints(sums);
  args.sums = sums.data();
  args.adjoints = adjoints.data();
  // a sequence in one segment needs the last stage alone
  constexpr Stage LAST[] = {STAGES...};
  ((args.segments > 1 || STAGES == LAST[sizeof...(STAGES) - 1] ? run<T, Shape, STAGES>(args)
                                                               : void()),
   ...);
}

template <class T>
void run_pass(const Args& args, bool backward, int64_t batch) {
  if (backward)
    run_all<T, bi_wkv::Backward<T>, Stage::Sums, Stage::Adjoint, Stage::Gradient>(args, batch);
  else
    run_all<T, bi_wkv::Forward<T>, Stage::Sums, Stage::Output>(args, batch);
}

template <class Shape>
void divide(const int64_t* shape, int multiprocessors, int* out) {
  const auto division = bi_wkv::divide_tokens<Shape>(shape[0], shape[1], shape[2], multiprocessors);
  out[0] = division.rows;
  out[1] = division.segments;
  out[2] = Shape::LENGTH;
  out[3] = Shape::PAIRS;
}

}  // namespace

// Rows and segments that a GPU would be given, tokens of a row, threads along the channels.
extern "C" void bi_wkv_division(int bytes, int backward, const int64_t* shape, int multiprocessors,
                                int* out) {
  if (backward)
    (bytes == 2 ? divide<bi_wkv::Backward<c10::Half>>
                : divide<bi_wkv::Backward<float>>)(shape, multiprocessors, out);
  else
    (bytes == 2 ? divide<bi_wkv::Forward<c10::Half>>
                : divide<bi_wkv::Forward<float>>)(shape, multiprocessors, out);
}

// dtype: 0 float32, 1 float16, 2 bfloat16. pointers: w, u, k, v, g, y or dv, dk, partial; strides:
// batch and token of k, v, g; shape: B, T, C.
extern "C" void bi_wkv_run(int dtype, int backward, int paired, int rows, void** pointers,
                           const int64_t* strides, const int64_t* shape) {
  Args args{};
  args.w = static_cast<const float*>(pointers[0]);
  args.u = static_cast<const float*>(pointers[1]);
  args.k = pointers[2];
  args.v = pointers[3];
  args.g = pointers[4];
  args.y = pointers[5];
  args.dk = pointers[6];
  args.partial = static_cast<float*>(pointers[7]);
  args.k_batch = strides[0], args.k_token = strides[1];
  args.v_batch = strides[2], args.v_token = strides[3];
  args.g_batch = strides[4], args.g_token = strides[5];
  args.tokens = int(shape[1]);
  args.channels = int(shape[2]);
  args.rows = rows;
  args.paired = paired != 0;
  if (dtype == 0) run_pass<float>(args, backward != 0, shape[0]);
  if (dtype == 1) run_pass<c10::Half>(args, backward != 0, shape[0]);
  if (dtype == 2) run_pass<c10::BFloat16>(args, backward != 0, shape[0]);
}

namespace stream = bi_wkv::stream;

// Of the kernel for short sequences and of the one for long ones, forward, then backward: tokens of
// a row, of a segment, bytes of shared memory.
extern "C" void bi_wkv_stream_shapes(int* out) {
  const auto put = [&out](auto shape) {
    using Shape = decltype(shape);
    for (const int n : {Shape::LENGTH, Shape::TOKENS, Shape::BYTES}) *out++ = n;
  };
  put(stream::Short{});
  put(stream::Long<2>{});
  put(stream::Long<3>{});
  put(stream::ShortBackward{});
  put(stream::LongBackward{});
  put(stream::WideBackward{});
}

// Batch, tile and segment of the items of one of several thread blocks; returns their number.
extern "C" int bi_wkv_stream_items(int batch, int tiles, int segments, int block, int blocks,
                                   int* out) {
  stream::Args args{};
  args.tiles = tiles;
  args.segments = segments;
  args.items = batch * tiles * segments;
  const stream::Items items(args, block, blocks);
  auto p = items.place(block);
  for (int i = 0; i < items.count; ++i, items.advance(p)) {
    for (const int n : {p.batch, p.tile, p.segment}) *out++ = n;
  }
  return items.count;
}

namespace {

template <class Shape>
void mend(const stream::Args& args, int batch) {
  using Row = stream::PairRow<float, Shape>;
  float* y = static_cast<float*>(args.y);
  for (int item = 0; item < batch * args.tiles * args.segments; ++item) {
    const auto p = stream::Items(args, 0, 1).place(item);
    std::vector<float> table(Row::FLOATS, std::numeric_limits<float>::quiet_NaN());
    const int first = p.tile * stream::WIDTH;
    const int width = std::min(stream::WIDTH, args.channels - first);
    for (int n = 0; n < Shape::ROWS * width; ++n)
      Row(args, p, n / width, n % width).add_up(table.data());
    for (int n = 0; n < Shape::ROWS * width; ++n) {
      const Row row(args, p, n / width, n % width);
      if (row.first == row.last) continue;
      const int64_t at = (int64_t(p.batch) * args.tokens + row.first) * args.channels + first;
      row.write(table.data(), y + at + n % width, args.channels);
    }
  }
}

}  // namespace

// pointers: w, u, k, v, y; strides: batch and token of k, v; shape: B, T, C. Every row is marked.
extern "C" void bi_wkv_stream_pairs(int is_long, void** pointers, const int64_t* strides,
                                    const int64_t* shape) {
  stream::Args args{};
  args.w = static_cast<const float*>(pointers[0]);
  args.u = static_cast<const float*>(pointers[1]);
  args.k = pointers[2];
  args.v = pointers[3];
  args.y = pointers[4];
  args.k_batch = strides[0], args.k_token = strides[1];
  args.v_batch = strides[2], args.v_token = strides[3];
  args.tokens = int(shape[1]);
  args.channels = int(shape[2]);
  const int tokens = is_long ? stream::Long<2>::TOKENS : stream::Short::TOKENS;
  args.segments = (args.tokens + tokens - 1) / tokens;
  args.tiles = (args.channels + stream::WIDTH - 1) / stream::WIDTH;
  (is_long ? mend<stream::Long<2>> : mend<stream::Short>)(args, int(shape[0]));
}
