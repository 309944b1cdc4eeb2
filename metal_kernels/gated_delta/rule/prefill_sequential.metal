// The gated delta rule token by token. A SIMD group keeps eight value rows of the state in registers: four groups of
// eight lanes, two rows a group, Dk over its lanes. Tokens come through tiles in threadgroup memory.

#include <metal_stdlib>
#include "prefill_tile.h"

namespace mlx_qwen {

/// Sums over the eight lanes that share value rows.
inline float4 sum_over_row(float4 x) {
  x += metal::simd_shuffle_xor(x, 1);
  x += metal::simd_shuffle_xor(x, 2);
  return x + metal::simd_shuffle_xor(x, 4);
}

/// Keeps a compiler from loading all of a wide key before it is used, for which there are not registers enough.
template <int Dk>
inline void take_turns(int i) {
  if (Dk > 128 && i % 2 == 0) {
    metal::simdgroup_barrier(metal::mem_flags::mem_none);
  }
}

/// A lane's share of two value rows of the state: every eighth float4 from its own on.
template <int Dk>
struct StateRows {
  float4 first[Dk / 32];
  float4 second[Dk / 32];

  /// Decays the rows, writes one token to them and returns what its query reads. Old rows are read for both results, so
  /// that one pass of shuffles serves both: S' q = decay S q + delta (k . q).
  float2 step(threadgroup const float4* key, threadgroup const float4* query, float4 gate, float2 value) {
    float4 recalled_and_read = 0;
#pragma unroll
    for (int i = 0; i < Dk / 32; ++i) {
      take_turns<Dk>(i);
      const float4 k = key[8 * i], q = query[8 * i];
      recalled_and_read += float4(
          metal::dot(first[i], k), metal::dot(second[i], k), metal::dot(first[i], q), metal::dot(second[i], q));
    }
    recalled_and_read = gate.y * sum_over_row(recalled_and_read);
    const float2 delta = gate.z * (value - recalled_and_read.xy);
#pragma unroll
    for (int i = 0; i < Dk / 32; ++i) {
      take_turns<Dk>(i);
      first[i] = gate.y * first[i] + delta.x * key[8 * i];
      second[i] = gate.y * second[i] + delta.y * key[8 * i];
    }
    return recalled_and_read.zw + gate.w * delta;
  }
};

template <int Dk, typename Source>
void read_state(thread float4* row, Source state, uint lane_in_row) {
#pragma unroll
  for (int i = 0; i < Dk / 32; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      row[i][j] = state[32 * i + 4 * lane_in_row + j];
    }
  }
}

template <int Dk>
void write_state(thread const float4* row, device float* state, uint lane_in_row) {
#pragma unroll
  for (int i = 0; i < Dk / 32; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      state[32 * i + 4 * lane_in_row + j] = row[i][j];
    }
  }
}

/// q, k [B, T, Hk, Dk] and v [B, T, Hv, Dv] at any strides; log_decay, beta [B, T, Hv]; mask [B, T], read if MASKED;
/// state [B, Hv, Dv, Dk], read if HAS_STATE. Writes y [B, T, Hv, Dv] and last_state. One threadgroup of ROWS / 8 SIMD
/// groups for each (block of ROWS value rows, value head, sequence).
template <int Dk, int ROWS, int TOKENS, bool HAS_STATE, bool MASKED,
          typename QK, typename V, typename Y, typename Gates, typename Mask, typename State>
void gated_delta_prefill_sequential(
    const device QK* q,
    const constant int* q_shape,
    const constant int64_t* q_strides,
    const device QK* k,
    const constant int64_t* k_strides,
    const device V* v,
    const constant int* v_shape,
    const constant int64_t* v_strides,
    Gates log_decay,
    const constant int64_t* log_decay_strides,
    Gates beta,
    const constant int64_t* beta_strides,
    Mask mask,
    const constant int64_t* mask_strides,
    State state,
    device Y* y,
    device float* last_state,
    uint3 group,
    uint simdgroup,
    uint lane,
    threadgroup float4* q_tile,
    threadgroup float4* k_tile,
    threadgroup float* v_tile,
    threadgroup float4* gates) {
  static_assert(TOKENS % 8 == 0, "tokens are taken eight at a time");
  const int T = q_shape[1], Hv = v_shape[2], Dv = v_shape[3];
  constexpr int value_stride = ROWS + 8;
  Tile<TOKENS, Dk, Dk, ROWS, value_stride> tile{
      (threadgroup float*)q_tile, (threadgroup float*)k_tile, v_tile, gates};

  const uint lane_in_row = lane % 8;
  const uint row = simdgroup * 8 + lane / 8 * 2;
  const int64_t head_rows = (static_cast<int64_t>(group.z) * Hv + group.y) * Dv + group.x * ROWS;
  StateRows<Dk> rows{};
  if (HAS_STATE) {
    read_state<Dk>(rows.first, state + (head_rows + row) * Dk, lane_in_row);
    read_state<Dk>(rows.second, state + (head_rows + row + 1) * Dk, lane_in_row);
  }
  y += (static_cast<int64_t>(group.z) * T * Hv + group.y) * Dv + group.x * ROWS;

  for (int start = 0; start < T; start += TOKENS) {
    // Made anew for every tile, as there are no registers for it beside a wide state.
    const Tokens<QK, V, Gates, Mask> source = tokens_of<ROWS>(
        q, q_shape, q_strides, k, k_strides, v, v_shape, v_strides, log_decay, log_decay_strides, beta, beta_strides,
        mask, mask_strides, group);
    tile.template load<MASKED>(source, start, simdgroup, lane);
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    for (int first = 0; first < TOKENS && start + first < T; first += 8) {
      // Each of the eight lanes holds one token's values and results: a place is read and written by one lane alone.
      threadgroup float* own = v_tile + (first + lane_in_row) * value_stride + row;
      const float2 values = float2(own[0], own[1]);
      float2 results = 0;
      for (int i = 0; i < 8; ++i) {
        const uint slot = first + i;
        const float2 value = metal::simd_shuffle(values, lane - lane_in_row + i);
        const uint place = slot * (Dk / 4) + lane_in_row;
        const float2 result = rows.step(k_tile + place, q_tile + place, gates[slot], value);
        results = lane_in_row == static_cast<uint>(i) ? result : results;
      }
      own[0] = results.x;
      own[1] = results.y;
    }
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    tile.store(y, static_cast<int64_t>(Hv) * Dv, start, T, simdgroup, lane);
  }
  write_state<Dk>(rows.first, last_state + (head_rows + row) * Dk, lane_in_row);
  write_state<Dk>(rows.second, last_state + (head_rows + row + 1) * Dk, lane_in_row);
}

}  // namespace mlx_qwen
