// Kernels of Bi-WKV, and the operators linvis_cuda::bi_wkv_fwd and bi_wkv_bwd.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "bi_wkv_division.h"

namespace linvis::bi_wkv {
namespace {

using at::Tensor;

template <class T, class Shape, Stage STAGE>
__global__ void __maxnreg__(Shape::REGISTERS) bi_wkv_kernel(const __grid_constant__ Args args) {
  extern __shared__ float shared[];
  using Thread = Worker<T, Shape::LENGTH, Shape::PAIRS, STAGE>;
  Thread worker(args, shared, blockIdx.x, threadIdx.x);
#pragma unroll
  for (int phase = 0; phase < Thread::PHASES; ++phase) {
    if (phase > 0) __syncthreads();
    worker.run(phase);
  }
}

template <class T, class Shape, Stage STAGE>
void launch(const Args& args) {
  using Thread = Worker<T, Shape::LENGTH, Shape::PAIRS, STAGE>;
  const auto kernel = bi_wkv_kernel<T, Shape, STAGE>;
  const auto bytes = int(Thread::shared_floats(args.rows, args.segments) * sizeof(float));
  if (bytes > 48 * 1024) {
    C10_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  }
  kernel<<<unsigned(args.blocks), args.rows * Shape::PAIRS, bytes,
           c10::cuda::getCurrentCUDAStream()>>>(args);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// The tensor (B, T, C) with channels next to one another in memory, copied if they are not.
Tensor by_rows(const Tensor& x) { return x.stride(2) == 1 || x.size(2) == 1 ? x : x.contiguous(); }

bool is_paired(const Tensor& x) {
  const auto even = [](int64_t stride) { return stride % 2 == 0; };
  return even(x.size(2)) && even(x.stride(0)) && even(x.stride(1)) &&
         reinterpret_cast<uintptr_t>(x.data_ptr()) % (2 * x.element_size()) == 0;
}

// Arguments that both passes share, with memory for the sums of segments in `sums`.
template <class Shape>
Args arguments(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v, Tensor& sums) {
  TORCH_CHECK(v.size(1) <= std::numeric_limits<int>::max() / 2 &&
                  v.size(2) <= std::numeric_limits<int>::max() / 2,
              "bi_wkv: at most 2^30 tokens and 2^30 channels, got ", v.sizes());
  int multiprocessors = 0;
  C10_CUDA_CHECK(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, v.device().index()));
  const auto division = divide_tokens<Shape>(v.size(0), v.size(1), v.size(2), multiprocessors);
  Args args{};
  args.w = w.const_data_ptr<float>();
  args.u = u.const_data_ptr<float>();
  args.k = k.const_data_ptr();
  args.v = v.const_data_ptr();
  args.k_batch = k.stride(0), args.k_token = k.stride(1);
  args.v_batch = v.stride(0), args.v_token = v.stride(1);
  args.tokens = int(v.size(1));
  args.channels = int(v.size(2));
  args.rows = division.rows;
  args.segments = division.segments;
  const int64_t tiles = (v.size(2) + 2 * Shape::PAIRS - 1) / (2 * Shape::PAIRS);
  args.blocks = v.size(0) * division.segments * tiles;
  TORCH_CHECK(args.blocks <= std::numeric_limits<int>::max(), "bi_wkv: too many tokens, got ",
              v.sizes());
  args.paired = is_paired(k) && is_paired(v);
  if (division.segments > 1) {
    sums = at::empty({2, v.size(0), division.segments, FIELDS, v.size(2)}, w.options());
    args.sums = sums.mutable_data_ptr<float>();
    args.adjoints = args.sums + sums.stride(0);
  }
  return args;
}

template <class T>
Tensor forward_of(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v) {
  using Shape = Forward<T>;
  Tensor sums, y = at::empty(v.sizes(), v.options());
  Args args = arguments<Shape>(w, u, k, v, sums);
  args.y = y.mutable_data_ptr();
  if (args.segments > 1) launch<T, Shape, Stage::Sums>(args);
  launch<T, Shape, Stage::Output>(args);
  return y;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class T>
Gradients backward_of(const Tensor& g, const Tensor& w, const Tensor& u, const Tensor& k,
                      const Tensor& v) {
  using Shape = Backward<T>;
  Tensor sums, dk = at::empty(k.sizes(), k.options()), dv = at::empty(v.sizes(), v.options());
  Args args = arguments<Shape>(w, u, k, v, sums);
  const Tensor partial = at::empty({2, v.size(0) * args.segments, v.size(2)}, w.options());
  args.g = g.const_data_ptr();
  args.g_batch = g.stride(0), args.g_token = g.stride(1);
  args.paired = args.paired && is_paired(g);
  args.y = dv.mutable_data_ptr();
  args.dk = dk.mutable_data_ptr();
  args.partial = partial.mutable_data_ptr<float>();
  if (args.segments > 1) {
    launch<T, Shape, Stage::Sums>(args);
    launch<T, Shape, Stage::Adjoint>(args);
  }
  launch<T, Shape, Stage::Gradient>(args);
  return {partial.select(0, 0).sum(0), partial.select(0, 1).sum(0), dk, dv};
}

Tensor forward(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v) {
  const c10::cuda::CUDAGuard guard(v.device());
  const Tensor w_ = w.contiguous(), u_ = u.contiguous(), k_ = by_rows(k), v_ = by_rows(v);
  switch (v.scalar_type()) {
    case at::kFloat:
      return forward_of<float>(w_, u_, k_, v_);
    case at::kHalf:
      return forward_of<c10::Half>(w_, u_, k_, v_);
    case at::kBFloat16:
      return forward_of<c10::BFloat16>(w_, u_, k_, v_);
    default:
      TORCH_CHECK(false, "bi_wkv: the kernels take float32, float16 and bfloat16, got ",
                  v.scalar_type());
  }
}

Gradients backward(const Tensor& g, const Tensor& w, const Tensor& u, const Tensor& k,
                   const Tensor& v) {
  const c10::cuda::CUDAGuard guard(v.device());
  const Tensor w_ = w.contiguous(), u_ = u.contiguous(), k_ = by_rows(k), v_ = by_rows(v);
  const Tensor g_ = by_rows(g);
  switch (v.scalar_type()) {
    case at::kFloat:
      return backward_of<float>(g_, w_, u_, k_, v_);
    case at::kHalf:
      return backward_of<c10::Half>(g_, w_, u_, k_, v_);
    case at::kBFloat16:
      return backward_of<c10::BFloat16>(g_, w_, u_, k_, v_);
    default:
      TORCH_CHECK(false, "bi_wkv: the kernels take float32, float16 and bfloat16, got ",
                  v.scalar_type());
  }
}

}  // namespace
}  // namespace linvis::bi_wkv

// Shapes, dtypes and devices are checked by the callers in Python.
TORCH_LIBRARY_FRAGMENT(linvis_cuda, m) {
  m.def("bi_wkv_fwd(Tensor w, Tensor u, Tensor k, Tensor v) -> Tensor");
  m.def(
      "bi_wkv_bwd(Tensor gy, Tensor w, Tensor u, Tensor k, Tensor v)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(linvis_cuda, CUDA, m) {
  m.impl("bi_wkv_fwd", linvis::bi_wkv::forward);
  m.impl("bi_wkv_bwd", linvis::bi_wkv::backward);
}
