// Pointwise functions of a Gated DeltaNet layer, in fp32.
#pragma once

#include <metal_stdlib>

namespace mlx_qwen {

inline float sigmoid(float x) {
  const float small = 1.0f / (1.0f + metal::precise::exp(metal::abs(x)));
  return x < 0 ? small : 1.0f - small;
}

inline float silu(float x) {
  return x * sigmoid(x);
}

/// log(1 + x) for x >= 0. The quotient undoes the rounding of 1 + x, which would lose the low bits of a small x.
inline float log_one_plus(float x) {
  const float sum = 1.0f + x;
  return sum == 1.0f ? x : metal::precise::log(sum) * (x / (sum - 1.0f));
}

inline float softplus(float x) {
  return metal::max(x, 0.0f) + log_one_plus(metal::precise::exp(-metal::abs(x)));
}

}  // namespace mlx_qwen
