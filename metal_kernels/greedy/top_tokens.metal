// The K highest of rows of logits, in order, and the logarithm of their sum of exponentials: a row is cut into parts, one
// a threadgroup. Each SIMD group ranks the logits in its registers, and lists that are ranked are merged: those of a
// threadgroup's SIMD groups first, those of all parts in a second launch.

#include <metal_stdlib>
#include "sums.h"

namespace mlx_qwen {

constant constexpr uint NO_TOKEN = 0xFFFFFFFFu;

// Integers in the order of logits: 0 is for none, then NaN, and both zeros are one.
inline uint order_of(float logit) {
  if (metal::isnan(logit)) return 1;
  const uint bits = as_type<uint>(logit == 0.0f ? 0.0f : logit);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

inline float logit_of(uint order) {
  return as_type<float>(order >> 31 ? order & 0x7FFFFFFFu : ~order);
}

// Where the highest of a SIMD group is: the lowest of equal ones' tokens, the same in every lane.
inline uint lowest_of_highest(uint order, uint token) {
  return metal::simd_min(order == metal::simd_max(order) ? token : NO_TOKEN);
}

// The K highest of LISTS lists of K that are ranked, by one SIMD group, whose lanes each hold the heads of some lists.
template <int LISTS, int K>
void merge(
    const threadgroup uint* orders,
    const threadgroup uint* tokens,
    device uint32_t* merged_tokens,
    device float* merged_logits,
    uint lane) {
  constexpr int PER_LANE = (LISTS + 31) / 32;
  uint place[PER_LANE], order[PER_LANE], token[PER_LANE];
#pragma unroll
  for (int l = 0; l < PER_LANE; ++l) {
    const uint list = lane + 32 * l;
    place[l] = list < LISTS ? 0 : K;
    order[l] = list < LISTS ? orders[list * K] : 0;
    token[l] = list < LISTS ? tokens[list * K] : NO_TOKEN;
  }
  for (int rank = 0; rank < K; ++rank) {
    uint highest = 0;
    uint at = NO_TOKEN;
#pragma unroll
    for (int l = 0; l < PER_LANE; ++l) {
      // Later lists are of later tokens.
      if (order[l] > highest) {
        highest = order[l];
        at = token[l];
      }
    }
    const uint winner = lowest_of_highest(highest, at);
    if (at == winner && (winner != NO_TOKEN || lane == 0)) {
      merged_tokens[rank] = winner;
      merged_logits[rank] = logit_of(highest);
    }
#pragma unroll
    for (int l = 0; l < PER_LANE; ++l) {
      if (token[l] == winner && place[l] < K) {
        ++place[l];
        const uint next = (lane + 32 * l) * K + place[l];
        order[l] = place[l] < K ? orders[next] : 0;
        token[l] = place[l] < K ? tokens[next] : NO_TOKEN;
      }
    }
  }
}

template <typename T, int PARTS, int PER_THREAD, int K>
void top_of_parts(
    const device T* logits,
    const constant int* logits_shape,
    device uint32_t* best,
    device float* scores,
    device float* largest,
    device float* sums,
    uint3 group,
    uint3 thread_in_group,
    uint lane,
    uint simdgroup,
    threadgroup uint* shared_orders,
    threadgroup uint* shared_tokens,
    threadgroup float* shared_values) {
  constexpr uint THREADS = 256;
  constexpr uint SIMDGROUPS = THREADS / 32;
  const uint V = logits_shape[1];
  const uint first = group.x * THREADS * PER_THREAD + thread_in_group.x;
  const device T* row = logits + ulong(group.y) * V;

  float values[PER_THREAD];
  float most = -INFINITY;
#pragma unroll
  for (int j = 0; j < PER_THREAD; ++j) {
    const uint i = first + j * THREADS;
    values[j] = i < V ? float(row[i]) : -INFINITY;
    // NaN is never larger.
    if (values[j] > most) most = values[j];
  }
  most = metal::simd_max(most);
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < PER_THREAD; ++j) sum += weight_of(values[j], most);
  sum = metal::simd_sum(sum);

  uint left[PER_THREAD];
#pragma unroll
  for (int j = 0; j < PER_THREAD; ++j) left[j] = first + j * THREADS < V ? order_of(values[j]) : 0;
  for (int rank = 0; rank < K; ++rank) {
    uint highest = 0;
    uint token = NO_TOKEN;
#pragma unroll
    for (int j = 0; j < PER_THREAD; ++j) {
      if (left[j] > highest) {
        highest = left[j];
        token = first + j * THREADS;
      }
    }
    const uint winner = lowest_of_highest(highest, token);
    if (token == winner && (winner != NO_TOKEN || lane == 0)) {
      shared_orders[simdgroup * K + rank] = highest;
      shared_tokens[simdgroup * K + rank] = winner;
    }
#pragma unroll
    for (int j = 0; j < PER_THREAD; ++j) left[j] = first + j * THREADS == winner ? 0 : left[j];
  }
  if (lane == 0) {
    shared_values[simdgroup] = most;
    shared_values[SIMDGROUPS + simdgroup] = sum;
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  if (simdgroup != 0) return;

  const ulong part = ulong(group.y) * PARTS + group.x;
  merge<SIMDGROUPS, K>(shared_orders, shared_tokens, best + part * K, scores + part * K, lane);
  const float own = lane < SIMDGROUPS ? shared_values[lane] : -INFINITY;
  most = metal::simd_max(own);
  sum = metal::simd_sum(lane < SIMDGROUPS ? part_of_sum(shared_values[SIMDGROUPS + lane], own, most) : 0.0f);
  if (lane == 0) {
    largest[part] = most;
    sums[part] = sum;
  }
}

// One threadgroup a row, so that its lists are read at once.
template <int PARTS, int K>
void top_of_all(
    const device uint32_t* best,
    const device float* scores,
    const device float* largest,
    const device float* sums,
    device uint32_t* tokens,
    device float* logits,
    device float* total,
    uint3 group,
    uint3 thread_in_group,
    uint lane,
    uint simdgroup,
    threadgroup uint* shared_orders,
    threadgroup uint* shared_tokens) {
  constexpr uint THREADS = 256;
  const ulong first = ulong(group.y) * PARTS;
  for (uint i = thread_in_group.x; i < PARTS * K; i += THREADS) {
    const uint token = best[first * K + i];
    shared_tokens[i] = token;
    shared_orders[i] = token == NO_TOKEN ? 0 : order_of(scores[first * K + i]);
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  if (simdgroup != 0) return;

  const ulong row = group.y;
  merge<PARTS, K>(shared_orders, shared_tokens, tokens + row * K, logits + row * K, lane);
  float most = -INFINITY;
  for (uint part = lane; part < PARTS; part += 32) most = metal::max(most, largest[first + part]);
  most = metal::simd_max(most);
  const float whole = log_of_sums<PARTS>(largest + first, sums + first, most, lane);
  if (lane == 0) total[row] = whole;
}

}  // namespace mlx_qwen
