// The gated delta rule in the chunked WY form: what 16 tokens do to the state becomes products of 8 x 8 matrices. A
// SIMD group keeps eight value rows of the state, transposed, in registers and computes their share of every chunk.
// Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule" (2024).

#include <metal_stdlib>
#include "../../matrix.h"
#include "prefill_tile.h"

namespace mlx_qwen {

constant constexpr int CHUNK = 16;
constant constexpr int BLOCKS = CHUNK / 8;
// Rows a multiple of 32 floats apart would fall on the same banks of threadgroup memory.
constant constexpr int PAD = 8;
constant constexpr int PAIR_STRIDE = CHUNK + PAD;

/// exp of the summed log decays of the tokens in (after, last]. The sum is formed directly: a difference of two running
/// sums would cancel when a strong decay stands before both.
inline float decay_between(threadgroup const float4* gates, int after, int last) {
  float sum = 0;
  for (int i = 0; i < CHUNK; ++i) {
    sum += i > after && i <= last ? gates[i].x : 0.0f;
  }
  return metal::precise::exp(sum);
}

/// One 8 x 8 block of left right^T, entry (i, j) times the decay of the tokens in (j, i] and `factor` of its row, into
/// `pairs`. Above the diagonal it is zero.
template <int Dk>
void pair_block(
    threadgroup const float* left,
    threadgroup const float* right,
    threadgroup const float4* gates,
    threadgroup float* pairs,
    uint block_row,
    uint block_column,
    float factor,
    uint lane) {
  constexpr int key_stride = Dk + PAD;
  Matrix sum = zeros(), a, b;
  // Four at a time: with all loads on their way at once, too few registers are left for the state.
#pragma unroll 4
  for (int i = 0; i < Dk; i += 8) {
    metal::simdgroup_load(a, left + block_row * 8 * key_stride + i, key_stride);
    metal::simdgroup_load(b, right + block_column * 8 * key_stride + i, key_stride, ulong2(0), true);
    metal::simdgroup_multiply_accumulate(sum, a, b, sum);
  }
  const int row = block_row * 8 + row_of(lane);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int column = block_column * 8 + column_of(lane) + e;
    const float weight = factor * decay_between(gates, column, row);
    pairs[row * PAIR_STRIDE + column] = row >= column ? sum.thread_elements()[e] * weight : 0.0f;
  }
}

/// Turns an 8 x 8 block L on the diagonal of `pairs` into (I + strictly_lower(L))^-1 diag(beta), by forward substitution
/// with a column a lane; powers of the matrix would lose accuracy when keys repeat. For one SIMD group.
inline void invert_block(threadgroup float* block, threadgroup const float4* gates, uint lane) {
  const int column = lane % 8;
  float solution[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    solution[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
    for (int j = 0; j < i; ++j) {
      solution[i] -= block[i * PAIR_STRIDE + j] * solution[j];
    }
  }
  metal::simdgroup_barrier(metal::mem_flags::mem_threadgroup);
  if (lane < 8) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      block[i * PAIR_STRIDE + column] = solution[i] * gates[column].z;
    }
  }
}

/// Adds a block of `pairs` times an 8 x 8 matrix to `sum`.
inline void add_product(
    threadgroup const float* pairs, int block_row, int block_column, Matrix right, thread Matrix& sum) {
  Matrix block;
  metal::simdgroup_load(block, pairs + block_row * 8 * PAIR_STRIDE + block_column * 8, PAIR_STRIDE);
  metal::simdgroup_multiply_accumulate(sum, block, right, sum);
}

/// Eight value rows of the state, transposed: Dk x 8; and what the chunk's keys and queries find in it, CHUNK x 8 each.
template <int Dk>
struct StateColumns {
  Matrix blocks[Dk / 8];
  Matrix recalled[BLOCKS];
  Matrix read[BLOCKS];

  template <bool HAS_STATE, typename Source>
  void load(Source state, uint lane) {
#pragma unroll
    for (int i = 0; i < Dk / 8; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        blocks[i].thread_elements()[e] = HAS_STATE ? state[(column_of(lane) + e) * Dk + 8 * i + row_of(lane)] : 0.0f;
      }
    }
  }

  void store(device float* state) {
#pragma unroll
    for (int i = 0; i < Dk / 8; ++i) {
      metal::simdgroup_store(blocks[i], state + 8 * i, Dk, ulong2(0), true);
    }
  }

  void look_up(threadgroup const float* keys, threadgroup const float* queries) {
    constexpr int key_stride = Dk + PAD;
    Matrix row;
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i) {
      recalled[i] = read[i] = zeros();
#pragma unroll
      for (int j = 0; j < Dk / 8; ++j) {
        metal::simdgroup_load(row, keys + i * 8 * key_stride + 8 * j, key_stride);
        metal::simdgroup_multiply_accumulate(recalled[i], row, blocks[j], recalled[i]);
        metal::simdgroup_load(row, queries + i * 8 * key_stride + 8 * j, key_stride);
        metal::simdgroup_multiply_accumulate(read[i], row, blocks[j], read[i]);
      }
    }
  }

  /// Replaces this SIMD group's columns of the chunk's values by its results, and advances the state over the chunk.
  void advance(
      threadgroup const float* keys,
      threadgroup const float* key_key,
      threadgroup const float* query_key,
      threadgroup const float2* decays,
      threadgroup float* values,
      int value_stride,
      uint lane) {
    constexpr int key_stride = Dk + PAD;
    Matrix residual, delta[BLOCKS], key;
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i) {
      const float decay = decays[8 * i + row_of(lane)].x;
      scale(recalled[i], -decay);
      scale(read[i], decay);
      metal::simdgroup_load(residual, values + i * 8 * value_stride, value_stride);
      residual.thread_elements()[0] += recalled[i].thread_elements()[0];
      residual.thread_elements()[1] += recalled[i].thread_elements()[1];
      delta[i] = zeros();
      // Forward substitution by blocks: what earlier tokens wrote is known, the block's own tokens are inverted.
#pragma unroll
      for (int j = 0; j < i; ++j) {
        add_product(key_key, i, j, delta[j], residual);
      }
      add_product(key_key, i, i, residual, delta[i]);
#pragma unroll
      for (int j = 0; j <= i; ++j) {
        add_product(query_key, i, j, delta[j], read[i]);
      }
      metal::simdgroup_store(read[i], values + i * 8 * value_stride, value_stride);
    }
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i) {
      scale(delta[i], decays[8 * i + row_of(lane)].y);
    }
    const float whole_decay = decays[CHUNK - 1].x;
#pragma unroll
    for (int j = 0; j < Dk / 8; ++j) {
      scale(blocks[j], whole_decay);
#pragma unroll
      for (int i = 0; i < BLOCKS; ++i) {
        metal::simdgroup_load(key, keys + i * 8 * key_stride + 8 * j, key_stride, ulong2(0), true);
        metal::simdgroup_multiply_accumulate(blocks[j], key, delta[i], blocks[j]);
      }
    }
  }
};

/// Q K^T weighted by decay, and of K K^T what forward substitution by blocks takes: inverses on the diagonal, the
/// negative of the weighted block below. One block a turn, so that the two inverses are on different SIMD groups. And
/// for each token the decay from the chunk's start up to it and from it to the chunk's end.
template <int Dk, int SIMDGROUPS>
void compare_tokens(
    threadgroup const float* queries,
    threadgroup const float* keys,
    threadgroup const float4* gates,
    threadgroup float* key_key,
    threadgroup float* query_key,
    threadgroup float2* decays,
    uint simdgroup,
    uint lane) {
  uint turn = 0;
  for (uint below = 0; below < BLOCKS; ++below) {
    for (uint j = 0; j + below < BLOCKS; ++j) {
      const uint i = j + below;
      if (turn++ % SIMDGROUPS == simdgroup) {
        const float factor = below == 0 ? gates[8 * i + row_of(lane)].z : -1.0f;
        pair_block<Dk>(keys, keys, gates, key_key, i, j, factor, lane);
        if (below == 0) {
          metal::simdgroup_barrier(metal::mem_flags::mem_threadgroup);
          invert_block(key_key + i * 8 * (PAIR_STRIDE + 1), gates + 8 * i, lane);
        }
      }
      if (turn++ % SIMDGROUPS == simdgroup) {
        pair_block<Dk>(queries, keys, gates, query_key, i, j, 1.0f, lane);
      }
    }
  }
  if (simdgroup == SIMDGROUPS - 1 && lane < CHUNK) {
    decays[lane] = float2(decay_between(gates, -1, lane), decay_between(gates, lane, CHUNK - 1));
  }
}

/// Arguments, results and threadgroups as of gated_delta_prefill_sequential.
template <int Dk, int ROWS, int TOKENS, bool HAS_STATE, bool MASKED,
          typename QK, typename V, typename Y, typename Gates, typename Mask, typename State>
void gated_delta_prefill_chunked(
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
    threadgroup float* q_tile,
    threadgroup float* k_tile,
    threadgroup float* v_tile,
    threadgroup float4* gates,
    threadgroup float* key_key,
    threadgroup float* query_key,
    threadgroup float2* decays) {
  static_assert(TOKENS == CHUNK, "the threadgroup arrays are made for another chunk");
  const Tokens<QK, V, Gates, Mask> source = tokens_of<ROWS>(
      q, q_shape, q_strides, k, k_strides, v, v_shape, v_strides, log_decay, log_decay_strides, beta, beta_strides,
      mask, mask_strides, group);
  const int T = q_shape[1], Hv = v_shape[2], Dv = v_shape[3];
  constexpr int value_stride = ROWS + PAD;
  Tile<CHUNK, Dk, Dk + PAD, ROWS, value_stride> tile{q_tile, k_tile, v_tile, gates};

  const int64_t first_row = (static_cast<int64_t>(group.z) * Hv + group.y) * Dv + group.x * ROWS + simdgroup * 8;
  StateColumns<Dk> columns;
  columns.template load<HAS_STATE>(state + first_row * Dk, lane);
  y += (static_cast<int64_t>(group.z) * T * Hv + group.y) * Dv + group.x * ROWS;

  for (int start = 0; start < T; start += CHUNK) {
    tile.template load<MASKED>(source, start, simdgroup, lane);
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    compare_tokens<Dk, ROWS / 8>(q_tile, k_tile, gates, key_key, query_key, decays, simdgroup, lane);
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    columns.look_up(k_tile, q_tile);
    columns.advance(k_tile, key_key, query_key, decays, v_tile + simdgroup * 8, value_stride, lane);
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    tile.store(y, static_cast<int64_t>(Hv) * Dv, start, T, simdgroup, lane);
  }
  columns.store(last_state + first_row * Dk);
}

}  // namespace mlx_qwen
