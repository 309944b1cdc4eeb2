// Sums of exponentials of parts of a row, each beside the part's largest value.
#pragma once

#include <metal_stdlib>

namespace mlx_qwen {

// exp(x - largest); what is -inf adds nothing, also where all is.
inline float weight_of(float x, float largest) {
  return x == -INFINITY ? 0.0f : metal::precise::exp(x - largest);
}

// A part's sum beside the largest value of all. One without any number but NaN has no largest, and passes its NaN on.
inline float part_of_sum(float sum, float largest, float most) {
  return sum * (largest == -INFINITY ? 1.0f : metal::precise::exp(largest - most));
}

// The logarithm of the sum over all parts of a row, whose largest value is `most`, by one SIMD group.
template <int PARTS>
float log_of_sums(const device float* largest, const device float* sums, float most, uint lane) {
  float sum = 0.0f;
  for (uint part = lane; part < PARTS; part += 32) sum += part_of_sum(sums[part], largest[part], most);
  sum = metal::simd_sum(sum);
  return most == INFINITY ? most : most + metal::precise::log(sum);
}

}  // namespace mlx_qwen
