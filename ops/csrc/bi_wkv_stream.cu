// The streaming kernel of Bi-WKV's forward pass, and the operator linvis_cuda::bi_wkv_stream_fwd.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAMacros.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <limits>

#include "bi_wkv_stream_host.h"
#include "bi_wkv_stream_rows.h"

namespace linvis::bi_wkv::stream {
namespace {

using at::Tensor;

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::THREADS, 2)
    bi_wkv_stream_kernel(const __grid_constant__ Args args) {
  extern __shared__ __align__(128) unsigned char shared[];
  Block<T, Shape>(args, shared).init();
  if (threadIdx.x < 32 * Shape::WARPS) {
    Rows<T, Shape>(args, shared).run();
  } else {
    Helper<T, Shape>(args, shared).run();
  }
}

// Thread blocks that the device, which is the current one, has at work at once.
template <class T, class Shape>
int most_blocks(int device) {
  static std::array<std::atomic<int>, C10_COMPILE_TIME_MAX_GPUS> known{};
  int blocks = known[device];
  if (blocks == 0) {
    const auto kernel = bi_wkv_stream_kernel<T, Shape>;
    C10_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::BYTES));
    C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, Shape::THREADS,
                                                                 Shape::BYTES));
    blocks *= attribute(cudaDevAttrMultiProcessorCount, device);
    known[device] = blocks;
  }
  return blocks;
}

template <class T, class Shape>
void launch(Args args, const Tensor& v) {
  const int64_t segments = (v.size(1) + Shape::TOKENS - 1) / Shape::TOKENS;
  const int64_t tiles = (v.size(2) + WIDTH - 1) / WIDTH, sequences = v.size(0) * tiles;
  TORCH_CHECK(sequences * segments <= std::numeric_limits<int>::max() / 2,
              "bi_wkv: too many tokens, got ", v.sizes());
  args.segments = int(segments);
  args.tiles = int(tiles);
  args.items = int(sequences * segments);
  const int most = most_blocks<T, Shape>(v.device().index());
  // with the outputs of one item behind its sums, thread blocks that wait for one another must not
  // be more than one item apart
  TORCH_CHECK(segments <= most, "bi_wkv: at most ", int64_t(most) * Shape::TOKENS,
              " tokens on this GPU, got ", v.sizes());
  const int blocks = int(least(most, args.items));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto kernel = bi_wkv_stream_kernel<T, Shape>;
  if (segments == 1) {
    kernel<<<blocks, Shape::THREADS, Shape::BYTES, stream>>>(args);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return;
  }
  const auto f32 = v.options().dtype(at::kFloat);
  const Tensor sums = at::empty({v.size(0), segments, SUMS, v.size(2)}, f32);
  const Tensor arrived = at::empty({sequences}, f32.dtype(at::kInt));
  args.sums = sums.mutable_data_ptr<float>();
  args.arrived = static_cast<unsigned*>(arrived.mutable_data_ptr());
  C10_CUDA_CHECK(cudaMemsetAsync(args.arrived, 0, sequences * sizeof(unsigned), stream));
  // cooperative: all thread blocks are at work at once
  void* arguments[] = {&args};
  C10_CUDA_CHECK(cudaLaunchCooperativeKernel(kernel, dim3(blocks), dim3(Shape::THREADS), arguments,
                                             Shape::BYTES, stream));
}

template <class T>
void launch_any(const Args& args, const Tensor& v) {
  if (v.size(1) <= Short::TOKENS) return launch<T, Short>(args, v);
  // an item more in shared memory where two thread blocks fit; the driver takes 1 KiB for each
  const int bytes = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, v.device().index());
  if (2 * (Long<3>::BYTES + 1024) <= bytes) return launch<T, Long<3>>(args, v);
  launch<T, Long<2>>(args, v);
}

Tensor forward(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v) {
  const c10::cuda::CUDAGuard guard(v.device());
  TORCH_CHECK(is_whole(k) && is_whole(v),
              "bi_wkv: the streaming kernel takes rows of whole 16 bytes, got strides ",
              k.strides(), " and ", v.strides());
  TORCH_CHECK(v.size(1) <= std::numeric_limits<int>::max() / 2 &&
                  v.size(2) <= std::numeric_limits<int>::max() / 8,
              "bi_wkv: at most 2^30 tokens and 2^28 channels, got ", v.sizes());
  const Tensor w_ = w.contiguous(), u_ = u.contiguous(), y = at::empty(v.sizes(), v.options());
  Args args{};
  args.w = w_.const_data_ptr<float>();
  args.u = u_.const_data_ptr<float>();
  args.k = k.const_data_ptr();
  args.v = v.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.k_batch = k.stride(0), args.k_token = k.stride(1);
  args.v_batch = v.stride(0), args.v_token = v.stride(1);
  args.tokens = int(v.size(1));
  args.channels = int(v.size(2));
  if (v.scalar_type() == at::kBFloat16) {
    launch_any<c10::BFloat16>(args, v);
  } else {
    TORCH_CHECK(v.scalar_type() == at::kHalf,
                "bi_wkv: the streaming kernel takes float16 and bfloat16, got ", v.scalar_type());
    launch_any<c10::Half>(args, v);
  }
  return y;
}

}  // namespace
}  // namespace linvis::bi_wkv::stream

// Shapes, dtypes and devices are checked by the callers in Python.
TORCH_LIBRARY_FRAGMENT(linvis_cuda, m) {
  m.def("bi_wkv_stream_fwd(Tensor w, Tensor u, Tensor k, Tensor v) -> Tensor");
}

TORCH_LIBRARY_IMPL(linvis_cuda, CUDA, m) {
  m.impl("bi_wkv_stream_fwd", linvis::bi_wkv::stream::forward);
}
