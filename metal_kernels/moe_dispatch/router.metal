#include <metal_stdlib>
#include "router.h"

namespace mlx_qwen {

// One SIMD group routes one token.
template <typename T, int E, int k, bool normalize, typename Logits>
void route(
    Logits logits,
    const constant int64_t* strides,
    device uint32_t* indices,
    device float* scores,
    device float* shared_score,
    uint3 position,
    uint lane) {
  const ulong token = position.y;
  write_choice<E, k, normalize>(
      logits + token * strides[0], strides[1], token, indices, scores, shared_score, lane);
}

}  // namespace mlx_qwen
