// The best token of rows of logits and the logarithm of their sum of exponentials: a row is cut into parts, one a
// threadgroup, whose threads hold their logits in registers; a second launch joins the parts.

#include <metal_stdlib>
#include "sums.h"

namespace mlx_qwen {

// Where the largest value of a SIMD group is: the lowest of equal ones' tokens, the same in every lane.
inline uint lowest_of_largest(float value, uint token, float largest) {
  return metal::simd_min(value == largest ? token : 0xFFFFFFFFu);
}

template <typename T, int PARTS, int PER_THREAD>
void best_of_parts(
    const device T* logits,
    const constant int* logits_shape,
    device uint32_t* best,
    device float* largest,
    device float* sums,
    uint3 group,
    uint3 thread_in_group,
    uint lane,
    uint simdgroup,
    threadgroup float* shared_values,
    threadgroup uint* shared_tokens) {
  constexpr uint THREADS = 256;
  constexpr uint SIMDGROUPS = THREADS / 32;
  const uint V = logits_shape[1];
  const uint first = group.x * THREADS * PER_THREAD;
  const device T* row = logits + ulong(group.y) * V;

  float values[PER_THREAD];
  float mine = -INFINITY;
  uint token = first + thread_in_group.x;
#pragma unroll
  for (int j = 0; j < PER_THREAD; ++j) {
    const uint i = first + j * THREADS + thread_in_group.x;
    values[j] = i < V ? float(row[i]) : -INFINITY;
    // NaN is never larger.
    if (values[j] > mine) {
      mine = values[j];
      token = i;
    }
  }

  float most = metal::simd_max(mine);
  token = lowest_of_largest(mine, token, most);
  if (lane == 0) {
    shared_values[simdgroup] = most;
    shared_tokens[simdgroup] = token;
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  const float other = lane < SIMDGROUPS ? shared_values[lane] : -INFINITY;
  const uint others_token = lane < SIMDGROUPS ? shared_tokens[lane] : 0xFFFFFFFFu;
  most = metal::simd_max(other);
  token = lowest_of_largest(other, others_token, most);
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);

  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < PER_THREAD; ++j) sum += weight_of(values[j], most);
  sum = metal::simd_sum(sum);
  if (lane == 0) shared_values[simdgroup] = sum;
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  sum = metal::simd_sum(lane < SIMDGROUPS ? shared_values[lane] : 0.0f);

  if (thread_in_group.x == 0) {
    const ulong place = ulong(group.y) * PARTS + group.x;
    best[place] = token;
    largest[place] = most;
    sums[place] = sum;
  }
}

// One SIMD group a row.
template <int PARTS>
void best_of_all(
    const device uint32_t* best,
    const device float* largest,
    const device float* sums,
    device uint32_t* tokens,
    device float* logprobs,
    device float* total,
    uint3 group,
    uint lane) {
  const ulong first = ulong(group.y) * PARTS;
  float mine = -INFINITY;
  uint token = 0xFFFFFFFFu;
  for (uint part = lane; part < PARTS; part += 32) {
    const float value = largest[first + part];
    if (value > mine || token == 0xFFFFFFFFu) {
      mine = value;
      token = best[first + part];
    }
  }
  const float most = metal::simd_max(mine);
  token = lowest_of_largest(mine, token, most);

  const float whole = log_of_sums<PARTS>(largest + first, sums + first, most, lane);
  if (lane == 0) {
    tokens[group.y] = token;
    logprobs[group.y] = most - whole;
    total[group.y] = whole;
  }
}

}  // namespace mlx_qwen
