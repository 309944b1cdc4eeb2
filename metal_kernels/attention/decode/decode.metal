// Attention of a few tokens to all that is remembered. A threadgroup takes one key head and a run of keys, for every
// query row that shares the head, so that keys and values are read once for all of them. Each SIMD group compares
// eight keys of a tile with all rows, then makes its own channels of the output from the whole tile.
// Source: Dao, "FlashAttention-2" (2023), for the running maximum and sum; "Flash-Decoding" (2023) for the runs.

#include <metal_stdlib>
#include "rows.h"
#include "tile.h"

namespace mlx_qwen {

/// Attention of query rows, the group.x-th ROWS of the `rows` of one key head and sequence. Where keys are SPLIT over
/// threadgroups, each writes its output, not yet divided, and the maximum and sum of its rows.
template <int D, int ROW_BLOCKS, int SIMDGROUPS, bool SPLIT, bool STAGED, typename T, typename Keys, typename Values,
          typename S>
void attend(
    const device T* q, Keys keys, Values values, S sight, uint rows, float factor,
    device T* out, device float* partial, device float* sums,
    threadgroup T* staged, threadgroup float* scores, threadgroup float* factors,
    uint3 group, uint3 grid, uint simdgroup, uint lane) {
  constexpr int ROWS = 8 * ROW_BLOCKS, TILE = 8 * SIMDGROUPS, STRIDE = TILE + 4, CHANNELS = D / SIMDGROUPS;
  constexpr int QUERY_STRIDE = D + 8;
  const uint own = metal::min(static_cast<uint>(ROWS), rows - sight.first_row);
  q += (static_cast<int64_t>(group.z) * rows + sight.first_row) * D;
  if (STAGED) {
    for (uint i = simdgroup * 32 + lane; i < ROWS * D; i += 32 * SIMDGROUPS) {
      staged[i / D * QUERY_STRIDE + i % D] = i < own * D ? q[i] : static_cast<T>(0.0f);
    }
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  }
  const Queries<T, D, QUERY_STRIDE, STAGED> queries{q, staged, own};
  const uint tiles = (sight.keys + TILE - 1) / TILE;
  const uint run = (tiles + grid.y - 1) / grid.y * TILE;
  const uint end = metal::min(sight.keys, (group.y + 1) * run);
  const uint channel = simdgroup * CHANNELS;
  using Running = Softmax<ROWS, TILE, STRIDE, SIMDGROUPS>;
  Running softmax;
  Output<ROW_BLOCKS, CHANNELS> output;
  softmax.begin();
  output.begin();
  for (uint first = group.y * run; first < end; first += TILE) {
    score_keys<D, ROW_BLOCKS, STRIDE>(
        keys, queries, sight, factor, first + 8 * simdgroup, 8 * simdgroup, scores, lane);
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    softmax.take(scores, factors, simdgroup, lane);
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    output.template take<STRIDE>(values, first, sight.keys, channel, TILE, scores, factors, lane);
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  }
  const int64_t run_place = SPLIT ? static_cast<int64_t>(group.z) * grid.y + group.y : group.z;
  const int64_t place = run_place * rows + sight.first_row;
#pragma unroll
  for (int n = 0; n < Running::OWN; ++n) {
    const uint row = n * SIMDGROUPS + simdgroup;
    if (row < ROWS && lane == 0) {
      factors[row] = SPLIT ? 1.0f : 1.0f / softmax.total[n];
      if (SPLIT && row < own) {
        sums[(place + row) * 2] = softmax.most[n];
        sums[(place + row) * 2 + 1] = softmax.total[n];
      }
    }
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  if (SPLIT) {
    output.template write<D>(partial + place * D, own, channel, factors, lane);
  } else {
    output.template write<D>(out + place * D, own, channel, factors, lane);
  }
}

/// Attention of q [B, H, T, D] to k and v [B, HKV, S, D]. The grid is threads, 8 * ROW_BLOCKS of the rows that
/// share a key head a threadgroup; runs of keys; B * HKV.
template <typename T, int D, int ROW_BLOCKS, int SIMDGROUPS, bool MASKED, bool SPLIT, bool STAGED, typename Mask>
void decode_attention(
    const device T* q, const constant int* q_shape,
    const device T* k, const constant int* k_shape, const constant int64_t* k_strides,
    const device T* v, const constant int64_t* v_strides,
    float factor,
    Mask mask, const constant int64_t* mask_strides,
    device T* out, device float* partial, device float* sums,
    threadgroup T* staged, threadgroup float* scores, threadgroup float* factors,
    uint3 group, uint3 grid, uint simdgroup, uint lane) {
  const uint heads = k_shape[1], batch = group.z / heads, head = group.z % heads;
  const PlainRows<T> keys{k + batch * k_strides[0] + head * k_strides[1], k_strides[2]};
  const PlainRows<T> values{v + batch * v_strides[0] + head * v_strides[1], v_strides[2]};
  const Sight<MASKED, Mask> sight{
      static_cast<uint>(k_shape[2]),
      static_cast<uint>(q_shape[2]),
      group.x * ROW_BLOCKS * 8,
      MASKED ? mask + batch * mask_strides[0] : mask,
      MASKED ? mask_strides[2] : 0,
      MASKED ? mask_strides[3] : 0};
  attend<D, ROW_BLOCKS, SIMDGROUPS, SPLIT, STAGED>(
      q, keys, values, sight, q_shape[1] / heads * q_shape[2], factor, out, partial, sums, staged, scores, factors,
      group, grid, simdgroup, lane);
}

/// The same for keys and values packed to BITS bits in groups of GROUP channels.
template <typename T, int D, int ROW_BLOCKS, int SIMDGROUPS, bool MASKED, bool SPLIT, bool STAGED, int BITS, int GROUP,
          typename Words, typename Factors, typename Mask>
void packed_decode_attention(
    const device T* q, const constant int* q_shape,
    Words k, const constant int* k_shape, const constant int64_t* k_strides,
    Factors k_scales, const constant int64_t* k_scales_strides,
    Factors k_biases, const constant int64_t* k_biases_strides,
    Words v, const constant int64_t* v_strides,
    Factors v_scales, const constant int64_t* v_scales_strides,
    Factors v_biases, const constant int64_t* v_biases_strides,
    float factor,
    Mask mask, const constant int64_t* mask_strides,
    device T* out, device float* partial, device float* sums,
    threadgroup T* staged, threadgroup float* scores, threadgroup float* factors,
    uint3 group, uint3 grid, uint simdgroup, uint lane) {
  const uint heads = k_shape[1], batch = group.z / heads, head = group.z % heads;
  const PackedRows<BITS, GROUP, Words, Factors> keys{
      k + batch * k_strides[0] + head * k_strides[1], k_strides[2],
      k_scales + batch * k_scales_strides[0] + head * k_scales_strides[1],
      k_biases + batch * k_biases_strides[0] + head * k_biases_strides[1],
      k_scales_strides[2], k_biases_strides[2]};
  const PackedRows<BITS, GROUP, Words, Factors> values{
      v + batch * v_strides[0] + head * v_strides[1], v_strides[2],
      v_scales + batch * v_scales_strides[0] + head * v_scales_strides[1],
      v_biases + batch * v_biases_strides[0] + head * v_biases_strides[1],
      v_scales_strides[2], v_biases_strides[2]};
  const Sight<MASKED, Mask> sight{
      static_cast<uint>(k_shape[2]),
      static_cast<uint>(q_shape[2]),
      group.x * ROW_BLOCKS * 8,
      MASKED ? mask + batch * mask_strides[0] : mask,
      MASKED ? mask_strides[2] : 0,
      MASKED ? mask_strides[3] : 0};
  attend<D, ROW_BLOCKS, SIMDGROUPS, SPLIT, STAGED>(
      q, keys, values, sight, q_shape[1] / heads * q_shape[2], factor, out, partial, sums, staged, scores, factors,
      group, grid, simdgroup, lane);
}

}  // namespace mlx_qwen
