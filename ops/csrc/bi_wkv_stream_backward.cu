// The streaming kernel of Bi-WKV's backward pass, and the operator linvis_cuda::bi_wkv_stream_bwd.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAMacros.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <limits>
#include <tuple>

#include "bi_wkv_division.h"
#include "bi_wkv_stream_backward_rows.h"
#include "bi_wkv_stream_host.h"

namespace linvis::bi_wkv::stream {
namespace {

using at::Tensor;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::THREADS, Shape::BLOCKS)
    bi_wkv_stream_backward_kernel(const __grid_constant__ BackwardArgs args) {
  extern __shared__ __align__(128) unsigned char memory[];
  // each branch makes the barriers by itself: shared code before them would keep its registers
  if (threadIdx.x < 32 * Shape::WARPS) {
    BackwardRows<T, Shape> rows(args, memory);
    rows.init();
    rows.run();
  } else {
    BackwardHelper<T, Shape> helper(args, memory);
    helper.init();
    helper.run();
  }
}

// One stage of a worker's segments, one after the other.
template <class T, class Shape, Stage STAGE>
__device__ void mend_stage(const bi_wkv::Args& args, float* shared, int64_t batch, int64_t tile,
                           int64_t tiles) {
  using Thread = Worker<T, Shape::LENGTH, Shape::PAIRS, STAGE>;
#pragma unroll 1
  for (int n = 0; n < args.segments; ++n) {
    const int64_t block = (batch * args.segments + n) * tiles + tile;
    Thread worker(args, shared, unsigned(STAGE == Stage::Adjoint ? args.blocks - 1 - block : block),
                  threadIdx.x);
#pragma unroll
    for (int phase = 0; phase < Thread::PHASES; ++phase) {
      worker.run(phase);
      __syncthreads();
    }
  }
}

// Computes the gradients of sequences and tiles again whose plain sums are wrong: with pairs, for
// any inputs. A thread block takes one after the other, all segments of it.
template <class T, class Shape>
__global__ void __maxnreg__(Shape::REGISTERS)
    bi_wkv_mend_kernel(const __grid_constant__ bi_wkv::Args args,
                       const __grid_constant__ BackwardArgs stream) {
  constexpr int LEAST_WIDTH = 2 * Shape::PAIRS;
  extern __shared__ __align__(128) unsigned char memory[];
  auto* shared = reinterpret_cast<float*>(memory);
  const int tiles = (args.channels + LEAST_WIDTH - 1) / LEAST_WIDTH;
  const int count = int(args.blocks / args.segments);
  const auto is_wrong = [&](int i) {
    return stream.marks[i / tiles * stream.tiles + i % tiles * LEAST_WIDTH / WIDTH] != IN_ORDER;
  };
  bool any = false;
  for (int64_t i = blockIdx.x + int64_t(threadIdx.x) * gridDim.x; i < count;
       i += int64_t(blockDim.x) * gridDim.x)
    any = any || is_wrong(int(i));
  if (!__syncthreads_or(any)) return;
#pragma unroll 1
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    if (!is_wrong(int(i))) continue;
    const int64_t batch = i / tiles, tile = i % tiles;
    if (args.segments > 1) {
      mend_stage<T, Shape, Stage::Sums>(args, shared, batch, tile, tiles);
      mend_stage<T, Shape, Stage::Adjoint>(args, shared, batch, tile, tiles);
    }
    mend_stage<T, Shape, Stage::Gradient>(args, shared, batch, tile, tiles);
    // all of its gradients by w and u in place of those of the first segment
    for (int j = threadIdx.x; j < 2 * LEAST_WIDTH; j += blockDim.x) {
      const int64_t which = j / LEAST_WIDTH, c = tile * LEAST_WIDTH + j % LEAST_WIDTH;
      if (c >= args.channels) continue;
      const float* from =
          args.partial + ((which * (count / tiles) + batch) * args.segments) * args.channels + c;
      float* to = stream.partial + (batch * stream.segments * 2 + which) * args.channels + c;
      float sum = 0.0f;
      for (int64_t n = 0; n < args.segments; ++n) sum += from[n * args.channels];
      for (int64_t n = 0; n < stream.segments; ++n)
        to[n * 2 * args.channels] = n == 0 ? sum : 0.0f;
    }
    __syncthreads();
  }
}

// Sums over the rows of x (rows, 2 C), in a fixed order: a thread block has 32 columns.
constexpr int SUM_THREADS = 1024;
__global__ void __launch_bounds__(SUM_THREADS)
    bi_wkv_sum_kernel(const float* x, float* dw, float* du, int rows, int channels) {
  constexpr int SHARES = SUM_THREADS / 32;
  __shared__ float sums[SHARES][32];
  const int share = threadIdx.x / 32, column = blockIdx.x * 32 + threadIdx.x % 32;
  float sum = 0.0f;
  if (column < 2 * channels) {
#pragma unroll 8
    for (int r = share; r < rows; r += SHARES) sum += x[int64_t(r) * 2 * channels + column];
  }
  sums[share][threadIdx.x % 32] = sum;
  __syncthreads();
  if (share > 0 || column >= 2 * channels) return;
  for (int s = 1; s < SHARES; ++s) sum += sums[s][threadIdx.x];
  (column < channels ? dw : du)[column % channels] = sum;
}

// Thread blocks that the device, which is the current one, has at work at once.
template <class T, class Shape>
int most_blocks(int device) {
  static std::array<std::atomic<int>, C10_COMPILE_TIME_MAX_GPUS> known{};
  int blocks = known[device];
  if (blocks == 0) {
    const auto kernel = bi_wkv_stream_backward_kernel<T, Shape>;
    const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    TORCH_CHECK(Shape::BYTES <= most, "bi_wkv: the streaming kernel of the backward pass needs ",
                Shape::BYTES, " bytes of shared memory, this GPU has ", most);
    C10_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::BYTES));
    C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, Shape::THREADS,
                                                                 Shape::BYTES));
    blocks *= attribute(cudaDevAttrMultiProcessorCount, device);
    known[device] = blocks;
  }
  return blocks;
}

template <class T>
void launch_mend(const BackwardArgs& given, const Tensor& v) {
  using Shape = Backward<T>;
  constexpr int MOST_ROWS = 32, LEAST_WIDTH = 2 * Shape::PAIRS;
  bi_wkv::Args args{};
  args.w = given.w, args.u = given.u;
  args.k = given.k, args.v = given.v, args.g = given.g;
  args.y = given.dv, args.dk = given.dk;
  args.k_batch = given.k_batch, args.k_token = given.k_token;
  args.v_batch = given.v_batch, args.v_token = given.v_token;
  args.g_batch = given.g_batch, args.g_token = given.g_token;
  args.tokens = given.tokens, args.channels = given.channels;
  args.paired = true;
  const int64_t batch = given.batch;
  const int rows = (given.tokens + Shape::LENGTH - 1) / Shape::LENGTH;
  args.rows = int(least(MOST_ROWS, rows));
  args.segments = (rows + args.rows - 1) / args.rows;
  const int64_t count = batch * ((given.channels + LEAST_WIDTH - 1) / LEAST_WIDTH);
  args.blocks = count * args.segments;
  TORCH_CHECK(args.blocks <= std::numeric_limits<int>::max(), "bi_wkv: too many tokens, got ",
              v.sizes());
  const auto f32 = v.options().dtype(at::kFloat);
  const Tensor partial = at::empty({2, batch, args.segments, given.channels}, f32);
  args.partial = partial.mutable_data_ptr<float>();
  Tensor sums;
  if (args.segments > 1) {
    sums = at::empty({2, batch, args.segments, FIELDS, given.channels}, f32);
    args.sums = sums.mutable_data_ptr<float>();
    args.adjoints = args.sums + sums.stride(0);
  }
  using Thread = Worker<T, Shape::LENGTH, Shape::PAIRS, Stage::Gradient>;
  const int bytes = int(Thread::shared_floats(args.rows, args.segments) * sizeof(float));
  const auto kernel = bi_wkv_mend_kernel<T, Shape>;
  if (bytes > 48 * 1024) {
    C10_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  }
  const int most = 2 * attribute(cudaDevAttrMultiProcessorCount, v.device().index());
  kernel<<<int(least(count, most)), args.rows * Shape::PAIRS, bytes,
           c10::cuda::getCurrentCUDAStream()>>>(args, given);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T, class Shape>
void launch(BackwardArgs& args, const Tensor& v, Tensor& partial) {
  const int64_t segments = (v.size(1) + Shape::TOKENS - 1) / Shape::TOKENS;
  const int64_t tiles = (v.size(2) + WIDTH - 1) / WIDTH, sequences = v.size(0) * tiles;
  TORCH_CHECK(sequences * segments <= std::numeric_limits<int>::max() / 2,
              "bi_wkv: too many tokens, got ", v.sizes());
  args.segments = int(segments);
  args.tiles = int(tiles);
  args.batch = int(v.size(0));
  args.items = int(sequences * segments);
  const int most = most_blocks<T, Shape>(v.device().index());
  // thread blocks that wait for one another must not be more than one item apart
  TORCH_CHECK(segments <= most, "bi_wkv: at most ", int64_t(most) * Shape::TOKENS,
              " tokens on this GPU, got ", v.sizes());
  const int blocks = int(least(most, args.items));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto kernel = bi_wkv_stream_backward_kernel<T, Shape>;
  const auto f32 = v.options().dtype(at::kFloat);
  partial = at::empty({v.size(0) * segments, 2 * v.size(2)}, f32);
  args.partial = partial.mutable_data_ptr<float>();
  // behind one another, to be set at once
  const int64_t size = segments == 1 ? 0 : 8 * v.size(0) * segments * v.size(2);
  const Tensor shared = at::empty({size + sequences}, f32);
  args.sums = shared.mutable_data_ptr<float>();
  args.marks = reinterpret_cast<int*>(args.sums + size);
  if (segments == 1) {
    kernel<<<blocks, Shape::THREADS, Shape::BYTES, stream>>>(args);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  } else {
    C10_CUDA_CHECK(
        cudaMemsetAsync(args.sums, ABSENT_BYTE, (size + sequences) * sizeof(float), stream));
    // cooperative: all thread blocks are at work at once
    void* arguments[] = {&args};
    C10_CUDA_CHECK(cudaLaunchCooperativeKernel(kernel, dim3(blocks), dim3(Shape::THREADS),
                                               arguments, Shape::BYTES, stream));
  }
  launch_mend<T>(args, v);
}

template <class T>
void launch_any(BackwardArgs& args, const Tensor& v, Tensor& partial) {
  if (v.size(1) <= ShortBackward::TOKENS) return launch<T, ShortBackward>(args, v, partial);
  const int bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, v.device().index());
  if (v.size(1) >= WIDE_TOKENS && WideBackward::BYTES <= bytes)
    return launch<T, WideBackward>(args, v, partial);
  launch<T, LongBackward>(args, v, partial);
}

Gradients backward(const Tensor& g, const Tensor& w, const Tensor& u, const Tensor& k,
                   const Tensor& v) {
  const c10::cuda::CUDAGuard guard(v.device());
  TORCH_CHECK(is_whole(k) && is_whole(v) && is_whole(g),
              "bi_wkv: the streaming kernel takes rows of whole 16 bytes, got strides ",
              k.strides(), ", ", v.strides(), " and ", g.strides());
  TORCH_CHECK(v.size(1) <= std::numeric_limits<int>::max() / 2 &&
                  v.size(2) <= std::numeric_limits<int>::max() / 8,
              "bi_wkv: at most 2^30 tokens and 2^28 channels, got ", v.sizes());
  const Tensor w_ = w.contiguous(), u_ = u.contiguous();
  const Tensor dw = at::empty(w.sizes(), w_.options()), du = at::empty(u.sizes(), u_.options()),
               dk = at::empty(k.sizes(), k.options()), dv = at::empty(v.sizes(), v.options());
  BackwardArgs args{};
  args.w = w_.const_data_ptr<float>();
  args.u = u_.const_data_ptr<float>();
  args.k = k.const_data_ptr();
  args.v = v.const_data_ptr();
  args.g = g.const_data_ptr();
  args.dk = dk.mutable_data_ptr();
  args.dv = dv.mutable_data_ptr();
  args.k_batch = k.stride(0), args.k_token = k.stride(1);
  args.v_batch = v.stride(0), args.v_token = v.stride(1);
  args.g_batch = g.stride(0), args.g_token = g.stride(1);
  args.tokens = int(v.size(1));
  args.channels = int(v.size(2));
  Tensor partial;
  if (v.scalar_type() == at::kBFloat16) {
    launch_any<c10::BFloat16>(args, v, partial);
  } else {
    TORCH_CHECK(v.scalar_type() == at::kHalf,
                "bi_wkv: the streaming kernel takes float16 and bfloat16, got ", v.scalar_type());
    launch_any<c10::Half>(args, v, partial);
  }
  bi_wkv_sum_kernel<<<unsigned((2 * v.size(2) + 31) / 32), SUM_THREADS, 0,
                      c10::cuda::getCurrentCUDAStream()>>>(
      args.partial, dw.mutable_data_ptr<float>(), du.mutable_data_ptr<float>(),
      int(partial.size(0)), args.channels);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {dw, du, dk, dv};
}

}  // namespace
}  // namespace linvis::bi_wkv::stream

// Shapes, dtypes and devices are checked by the callers in Python.
TORCH_LIBRARY_FRAGMENT(linvis_cuda, m) {
  m.def(
      "bi_wkv_stream_bwd(Tensor gy, Tensor w, Tensor u, Tensor k, Tensor v)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(linvis_cuda, CUDA, m) {
  m.impl("bi_wkv_stream_bwd", linvis::bi_wkv::stream::backward);
}
