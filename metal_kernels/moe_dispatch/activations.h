// Activations in fp32.
#pragma once

#include <metal_stdlib>

namespace mlx_qwen {

// Of the absolute value, then mirrored: never exp of a large number, and the bits of MLX's own.
inline float sigmoid(float x) {
  float y = 1.0f / (1.0f + metal::precise::exp(metal::abs(x)));
  return x < 0.0f ? y : 1.0f - y;
}

inline float swiglu(float gate, float up) { return gate * sigmoid(gate) * up; }

}  // namespace mlx_qwen
