// mobilemoe::quantized_moe_ffn: an MoE layer's router and routed experts as one ExecuTorch operator.
//
// It takes the arguments of ExecuTorch's own llama::quantized_moe_ffn, whose x86 build dequantizes every active expert at
// every call, but weights in the layout of tile_layout.h. moe_layer.h computes; this file is the operator's face to ExecuTorch and to Python.

#include <atomic>
#include <cinttypes>
#include <string>

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include "moe_layer.h"
#include "tile_kernels.h"

namespace mobilemoe {

std::atomic<int64_t> experts_read{0};

constexpr auto in_parallel = [](int64_t begin, int64_t end, int64_t grain, const auto& f) {
  executorch::extension::parallel_for(begin, end, grain, f);
};

using executorch::aten::ScalarType;
using executorch::aten::string_view;
using executorch::aten::Tensor;
using executorch::runtime::Error;

constexpr int64_t kMostSize = int64_t{1} << 20;

Tensor& quantized_moe_ffn_out(executorch::runtime::KernelRuntimeContext& ctx, const Tensor& x, const Tensor& gate_weight,
                              const Tensor& expert_bias, const Tensor& packed_w13, const Tensor& packed_w2,
                              int64_t num_activated_experts, int64_t num_experts, int64_t hidden_dim, int64_t dim,
                              int64_t group_size, int64_t weight_nbit, string_view score_func, double route_scale,
                              Tensor& out) {
  const int64_t D = dim, F = hidden_dim, E = num_experts;
  // Bounds first: the products below must not overflow.
  ET_KERNEL_CHECK_MSG(ctx, D > 0 && F > 0 && E > 0 && D < kMostSize && F < kMostSize && E < kMostSize, InvalidArgument,
                      out, "dim, hidden_dim and num_experts must be positive and below 2^20");
  ET_KERNEL_CHECK_MSG(ctx, weight_nbit == 4 && score_func == "sigmoid", InvalidArgument, out,
                      "mobilemoe::quantized_moe_ffn takes 4-bit weights and sigmoid routing only");
  ET_KERNEL_CHECK_MSG(ctx, group_size > 0 && group_size % 32 == 0 && D % group_size == 0 && F % group_size == 0,
                      InvalidArgument, out, "dim and hidden_dim must be multiples of group_size, and that of 32");
  const int64_t w13_bytes = blob_bytes(2 * F, D, group_size), w2_bytes = blob_bytes(D, F, group_size);
  // The runtime hands over pointers of any type, so a wrong one would be read as what is expected here.
  ET_KERNEL_CHECK_MSG(ctx,
                      x.scalar_type() == ScalarType::Float && gate_weight.scalar_type() == ScalarType::Float &&
                          expert_bias.scalar_type() == ScalarType::Float && out.scalar_type() == ScalarType::Float &&
                          packed_w13.scalar_type() == ScalarType::Byte && packed_w2.scalar_type() == ScalarType::Byte,
                      InvalidArgument, out, "x, gate_weight, expert_bias and out are float, the packed weights uint8");
  ET_KERNEL_CHECK_MSG(
      ctx,
      x.dim() == 2 && x.size(1) == D && gate_weight.numel() == E * D &&
          (expert_bias.numel() == 0 || expert_bias.numel() == E) && num_activated_experts > 0 &&
          num_activated_experts <= E && packed_w13.numel() == E * w13_bytes && packed_w2.numel() == E * w2_bytes,
      InvalidArgument, out, "tensor shapes do not fit the layer's dimensions; an older version has written the program: export it "
      "anew");
  const int64_t T = x.size(0);
  const Tensor::SizesType sizes[2] = {static_cast<Tensor::SizesType>(T), static_cast<Tensor::SizesType>(D)};
  ET_KERNEL_CHECK(ctx, executorch::runtime::resize_tensor(out, {sizes, 2}) == Error::Ok, InvalidArgument, out);
  const float* bias = expert_bias.numel() ? expert_bias.const_data_ptr<float>() : nullptr;
  experts_read += moe_ffn({T, D, F, E, num_activated_experts, group_size, x.const_data_ptr<float>(),
                           gate_weight.const_data_ptr<float>(), bias, packed_w13.const_data_ptr<uint8_t>(),
                           packed_w2.const_data_ptr<uint8_t>(), static_cast<float>(route_scale),
                           out.mutable_data_ptr<float>()},
                          fastest_kernel().compute, in_parallel);
  return out;
}

}  // namespace mobilemoe

EXECUTORCH_LIBRARY(mobilemoe, "quantized_moe_ffn.out", mobilemoe::quantized_moe_ffn_out);

// The functions that Python calls through ctypes (eval/device/expert_op/__init__.py).
extern "C" {

// Returns the names of the kernels that this processor has, the fastest first, with commas between them.
const char* mobilemoe_kernels() {
  static const std::string names = [] {
    std::string found;
    for (const mobilemoe::NamedKernel& kernel : mobilemoe::kKernels) {
      if (kernel.is_available()) found += (found.empty() ? "" : ",") + std::string(kernel.name);
    }
    return found;
  }();
  return names.c_str();
}

// Returns the number of experts read since the library was loaded; an expert counts once for each layer and call.
int64_t mobilemoe_experts_read() { return mobilemoe::experts_read; }

// Computes the layer with the kernel of this name. Returns 1 if this processor does not have it, else 0.
int mobilemoe_run(const char* kernel_name, int64_t T, int64_t D, int64_t F, int64_t E, int64_t K, int64_t group_size,
                  const float* x, const float* gate, const float* bias, const uint8_t* w13, const uint8_t* w2,
                  double route_scale, float* out) {
  using namespace mobilemoe;
  const TileKernel kernel = find_kernel(kernel_name);
  if (!kernel) return 1;
  experts_read += moe_ffn({T, D, F, E, K, group_size, x, gate, bias, w13, w2, static_cast<float>(route_scale), out},
                          kernel, in_parallel);
  return 0;
}
}
