// Which experts a token goes to, found by one SIMD group from its logits.
#pragma once

#include <metal_stdlib>
#include "activations.h"

namespace mlx_qwen {

// Probabilities as integers of the same order: 0 is for none, NaN stands above all as in mx.argsort.
inline uint order_of(float probability) {
  return metal::isnan(probability) ? 0xFFFFFFFFu : as_type<uint>(probability) + 1;
}

// Zero where MLX's exp is: subnormal numbers, which GPUs flush, must not decide the order of unlikely experts.
inline float exp_of_difference(float x) { return x < -87.68f ? 0.0f : metal::precise::exp(x); }

struct Choice {
  uint expert;
  float score;
};

// Softmax over E logits, then k times the largest probability that is left. Lane i keeps the choice of rank i; ranks
// ascend, and of equal probabilities the higher expert ranks higher. Ranks below `lowest` are left alone.
template <int E, int k, bool normalize, typename Logits>
Choice choose(Logits logits, int64_t stride, int lowest, uint lane) {
  constexpr int per_lane = (E + 31) / 32;
  float values[per_lane];
  float largest = -INFINITY;
#pragma unroll
  for (int i = 0; i < per_lane; ++i) {
    const uint expert = lane + 32 * i;
    values[i] = expert < E ? float(logits[expert * stride]) : -INFINITY;
    largest = metal::max(largest, values[i]);
  }
  largest = metal::simd_max(largest);

  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < per_lane; ++i) {
    values[i] = exp_of_difference(values[i] - largest);
    sum += lane + 32 * i < E ? values[i] : 0.0f;
  }
  const float inverse = 1.0f / metal::simd_sum(sum);

  uint left[per_lane];
#pragma unroll
  for (int i = 0; i < per_lane; ++i) left[i] = lane + 32 * i < E ? order_of(values[i] * inverse) : 0;

  Choice own = {0, 0.0f};
  for (int rank = k - 1; rank >= lowest; --rank) {
    uint best = 0;
    uint expert = 0;
#pragma unroll
    for (int i = 0; i < per_lane; ++i) {
      if (left[i] >= best) {
        best = left[i];
        expert = lane + 32 * i;
      }
    }
    const uint winning = metal::simd_max(best);
    const uint winner = metal::simd_max(best == winning ? expert : 0);
#pragma unroll
    for (int i = 0; i < per_lane; ++i) left[i] = lane + 32 * i == winner ? 0 : left[i];
    if (int(lane) == rank) {
      own.expert = winner;
      own.score = as_type<float>(winning - 1);
    }
  }
  if (normalize && lowest == 0) {
    float total = 0.0f;
    for (int i = 0; i < k; ++i) total += metal::simd_shuffle(own.score, i);
    own.score /= total;
  }
  return own;
}

// A token's choice and the sigmoid of its shared expert's gate, the last of its logits, written by one SIMD group.
template <int E, int k, bool normalize, typename Logits>
void write_choice(
    Logits logits,
    int64_t stride,
    ulong token,
    device uint32_t* indices,
    device float* scores,
    device float* shared_score,
    uint lane) {
  const Choice own = choose<E, k, normalize>(logits, stride, 0, lane);
  if (lane < k) {
    indices[token * k + lane] = own.expert;
    scores[token * k + lane] = own.score;
  }
  if (lane == 0) shared_score[token] = sigmoid(float(logits[E * stride]));
}

}  // namespace mlx_qwen
