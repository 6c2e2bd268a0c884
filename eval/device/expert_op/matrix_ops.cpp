// mobilemoe::quantized_embedding and mobilemoe::quantized_linear: two operators over one packed matrix, so that a program
// holds the embedding, which is also the output projection, once.

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include "packed_matrix.h"
#include "tile_kernels.h"

namespace mobilemoe {

namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;

constexpr int64_t kMostRows = int64_t{1} << 24, kMostColumns = int64_t{1} << 20;

constexpr auto in_parallel = [](int64_t begin, int64_t end, int64_t grain, const auto& f) {
  executorch::extension::parallel_for(begin, end, grain, f);
};

// Whether the sizes are those of a packed matrix; none of its products overflows.
bool is_matrix(const Tensor& packed, int64_t rows, int64_t k, int64_t group_size) {
  return rows > 0 && k > 0 && rows < kMostRows && k < kMostColumns && group_size > 0 && group_size % 32 == 0 &&
         k % group_size == 0 && packed.scalar_type() == ScalarType::Byte &&
         packed.numel() == blob_bytes(rows, k, group_size);
}

// Gives `out` the sizes of `like`, and `width` in place of (or, with `adds`, after) the last one.
Error resize(const Tensor& like, bool adds, int64_t width, Tensor& out) {
  Tensor::SizesType sizes[16];
  const auto n = static_cast<size_t>(like.dim()) + (adds ? 1 : 0);
  if (n < 1 || n > 16) return Error::InvalidArgument;
  for (size_t i = 0; i + 1 < n; ++i) sizes[i] = static_cast<Tensor::SizesType>(like.size(i));
  sizes[n - 1] = static_cast<Tensor::SizesType>(width);
  return executorch::runtime::resize_tensor(out, {sizes, n});
}

}  // namespace

Tensor& quantized_embedding_out(KernelRuntimeContext& ctx, const Tensor& ids, const Tensor& packed, int64_t rows,
                                int64_t k, int64_t group_size, Tensor& out) {
  ET_KERNEL_CHECK_MSG(ctx,
                      is_matrix(packed, rows, k, group_size) && ids.scalar_type() == ScalarType::Long &&
                          out.scalar_type() == ScalarType::Float,
                      InvalidArgument, out, "mobilemoe::quantized_embedding: tensors do not fit the sizes");
  ET_KERNEL_CHECK(ctx, resize(ids, true, k, out) == Error::Ok, InvalidArgument, out);
  const int64_t* id = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids.numel(); ++i) {
    ET_KERNEL_CHECK_MSG(ctx, id[i] >= 0 && id[i] < rows, InvalidArgument, out, "an id is not a row of the embedding");
    look_up({packed.const_data_ptr<uint8_t>(), rows, k, group_size}, id[i], out.mutable_data_ptr<float>() + i * k);
  }
  return out;
}

Tensor& quantized_linear_out(KernelRuntimeContext& ctx, const Tensor& x, const Tensor& packed, int64_t rows, int64_t k,
                             int64_t group_size, Tensor& out) {
  ET_KERNEL_CHECK_MSG(ctx,
                      is_matrix(packed, rows, k, group_size) && x.scalar_type() == ScalarType::Float &&
                          out.scalar_type() == ScalarType::Float && x.dim() > 0 && x.size(x.dim() - 1) == k,
                      InvalidArgument, out, "mobilemoe::quantized_linear: tensors do not fit the sizes");
  ET_KERNEL_CHECK(ctx, resize(x, false, rows, out) == Error::Ok, InvalidArgument, out);
  const auto x_rows = quantize_rows(x.const_data_ptr<float>(), x.numel() / k, k, group_size, in_parallel);
  multiply({packed.const_data_ptr<uint8_t>(), rows, k, group_size}, x_rows, fastest_kernel().compute, in_parallel,
           out.mutable_data_ptr<float>());
  return out;
}

}  // namespace mobilemoe

EXECUTORCH_LIBRARY(mobilemoe, "quantized_embedding.out", mobilemoe::quantized_embedding_out);
EXECUTORCH_LIBRARY(mobilemoe, "quantized_linear.out", mobilemoe::quantized_linear_out);

// The functions that Python calls through ctypes (eval/device/expert_op/matrix_ops.py).
extern "C" {

void mobilemoe_look_up(int64_t n, int64_t rows, int64_t k, int64_t group_size, const int64_t* ids, const uint8_t* packed,
                       float* out) {
  for (int64_t i = 0; i < n; ++i) mobilemoe::look_up({packed, rows, k, group_size}, ids[i], out + i * k);
}

void mobilemoe_multiply(int64_t n, int64_t rows, int64_t k, int64_t group_size, const float* x, const uint8_t* packed,
                        float* out) {
  using namespace mobilemoe;
  multiply({packed, rows, k, group_size}, quantize_rows(x, n, k, group_size, in_parallel), fastest_kernel().compute,
           in_parallel, out);
}
}
