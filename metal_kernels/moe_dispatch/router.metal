#include <metal_stdlib>
#include "activations.h"

namespace mlx_qwen {

// Probabilities as integers of the same order: 0 is for none, NaN stands above all as in mx.argsort.
inline uint order_of(float probability) {
  return metal::isnan(probability) ? 0xFFFFFFFFu : as_type<uint>(probability) + 1;
}

// Zero where MLX's exp is: subnormal numbers, which GPUs flush, must not decide the order of unlikely experts.
inline float exp_of_difference(float x) { return x < -87.68f ? 0.0f : metal::precise::exp(x); }

// One SIMD group routes one token: softmax over its E logits, then k times the largest probability that is left. Lane
// i keeps the choice of rank i; ranks ascend, and of equal probabilities the higher expert ranks higher.
template <typename T, int E, int k, bool normalize, typename Logits>
void route(
    Logits logits,
    const constant int64_t* strides,
    device uint32_t* indices,
    device float* scores,
    device float* shared_score,
    uint3 position,
    uint lane) {
  constexpr int per_lane = (E + 31) / 32;
  const ulong token = position.y;
  const ulong row = token * strides[0];

  float values[per_lane];
  float largest = -INFINITY;
  for (int i = 0; i < per_lane; ++i) {
    const uint expert = lane + 32 * i;
    values[i] = expert < E ? float(logits[row + expert * strides[1]]) : -INFINITY;
    largest = metal::max(largest, values[i]);
  }
  largest = metal::simd_max(largest);

  float sum = 0.0f;
  for (int i = 0; i < per_lane; ++i) {
    values[i] = exp_of_difference(values[i] - largest);
    sum += lane + 32 * i < E ? values[i] : 0.0f;
  }
  const float inverse = 1.0f / metal::simd_sum(sum);

  uint left[per_lane];
  for (int i = 0; i < per_lane; ++i) left[i] = lane + 32 * i < E ? order_of(values[i] * inverse) : 0;

  uint choice = 0;
  float score = 0.0f;
  for (int rank = k - 1; rank >= 0; --rank) {
    uint best = 0;
    uint expert = 0;
    for (int i = 0; i < per_lane; ++i) {
      if (left[i] >= best) {
        best = left[i];
        expert = lane + 32 * i;
      }
    }
    const uint winning = metal::simd_max(best);
    const uint winner = metal::simd_max(best == winning ? expert : 0);
    for (int i = 0; i < per_lane; ++i) left[i] = lane + 32 * i == winner ? 0 : left[i];
    if (int(lane) == rank) {
      choice = winner;
      score = as_type<float>(winning - 1);
    }
  }

  if (normalize) {
    float total = 0.0f;
    for (int i = 0; i < k; ++i) total += metal::simd_shuffle(score, i);
    score /= total;
  }
  if (lane < k) {
    indices[token * k + lane] = choice;
    scores[token * k + lane] = score;
  }
  if (lane == 0) shared_score[token] = sigmoid(float(logits[row + E * strides[1]]));
}

}  // namespace mlx_qwen
