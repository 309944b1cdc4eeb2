// One value head of one sequence, the work of a threadgroup, and the head's state in the registers of its lanes.
//
// A row of the state lies over 8 lanes: they read 128 bytes at once, and three shuffles sum a row. A SIMD group holds
// 4 * ROWS rows; where DV is more than all groups hold, they take the rows in turns.
#pragma once

#include <metal_stdlib>

namespace mlx_qwen {

struct Head {
  uint batch;
  uint value;  // index of the value head
  uint value_heads;
  uint key;  // index of the key head that it reads
  uint key_heads;
  bool first;  // whether it is the first value head of its key head
  uint channels;  // of the convolution, of all heads

  /// The channel of the convolution behind element i of a token's [q, k, v].
  template <int DK, int DV>
  uint channel(uint i) const {
    if (i < DK) {
      return key * DK + i;
    }
    return i < 2 * DK ? (key_heads + key - 1) * DK + i : (2 * key_heads - 2) * DK + value * DV + i;
  }
};

/// The head of the threadgroup at (any, value head, sequence).
template <int DK, int DV>
Head head_of(uint3 group, uint value_heads, uint channels) {
  const uint key_heads = (channels - value_heads * DV) / (2 * DK);
  const uint sharing = value_heads / key_heads;
  return Head{group.z, group.y, value_heads, group.y / sharing, key_heads, group.y % sharing == 0, channels};
}

constant constexpr int ROW_LANES = 8;
constant constexpr int ROWS_AT_ONCE = 32 / ROW_LANES;

inline float sum_over_row(float x) {
  x += metal::simd_shuffle_xor(x, 1);
  x += metal::simd_shuffle_xor(x, 2);
  return x + metal::simd_shuffle_xor(x, 4);
}

/// The first row that a lane works on, and its place among the lanes of a row.
struct RowLane {
  uint row;
  uint lane;
};

template <int ROWS>
RowLane row_lane_of(uint simdgroup, uint lane) {
  return RowLane{simdgroup * ROWS_AT_ONCE * ROWS + lane / ROW_LANES, lane % ROW_LANES};
}

/// Four neighbours of a row that may lie at any multiple of a float, `stride` apart.
inline float4 load4(const device float* x, int64_t stride) {
  return stride == 1 ? float4(*reinterpret_cast<const device packed_float4*>(x))
                     : float4(x[0], x[stride], x[2 * stride], x[3 * stride]);
}

/// What one lane holds of the state: DK / 8 columns, in fours, of ROWS rows.
template <int DK, int ROWS>
struct StatePart {
  float4 columns[ROWS][DK / 32];

  void load(const device float* state, int64_t row_stride, int64_t stride, RowLane at) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int i = 0; i < DK / 32; ++i) {
        const uint row = at.row + r * ROWS_AT_ONCE;
        columns[r][i] = load4(state + row * row_stride + 4 * (at.lane + i * ROW_LANES) * stride, stride);
      }
    }
  }

  void store(device float* state, RowLane at) const {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int i = 0; i < DK / 32; ++i) {
        const uint row = at.row + r * ROWS_AT_ONCE;
        *reinterpret_cast<device float4*>(state + row * DK + 4 * (at.lane + i * ROW_LANES)) = columns[r][i];
      }
    }
  }

  /// Decays the state and writes a token to it; `deltas`, unless null, gets what was added along the key.
  void write(
      const threadgroup float4* key, const threadgroup float* values, float2 gate, device float* deltas, RowLane at) {
    float4 k[DK / 32];
#pragma unroll
    for (int i = 0; i < DK / 32; ++i) {
      k[i] = key[at.lane + i * ROW_LANES];
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      // One lane alone touches the value of its row, in whose place `read` puts the output.
      const bool is_first = at.lane == 0;
      float missing = is_first ? values[at.row + r * ROWS_AT_ONCE] : 0.0f;
#pragma unroll
      for (int i = 0; i < DK / 32; ++i) {
        columns[r][i] *= gate.x;
        missing -= metal::dot(columns[r][i], k[i]);
      }
      const float delta = sum_over_row(missing) * gate.y;
#pragma unroll
      for (int i = 0; i < DK / 32; ++i) {
        columns[r][i] += delta * k[i];
      }
      if (deltas != nullptr && is_first) {
        deltas[at.row + r * ROWS_AT_ONCE] = delta;
      }
    }
  }

  /// Decays the state and adds what `write` once added.
  void rewrite(
      const device float* key,
      int64_t key_stride,
      const device float* deltas,
      int64_t delta_stride,
      float decay,
      RowLane at) {
#pragma unroll
    for (int i = 0; i < DK / 32; ++i) {
      const float4 k = load4(key + 4 * (at.lane + i * ROW_LANES) * key_stride, key_stride);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        columns[r][i] *= decay;
        columns[r][i] += deltas[(at.row + r * ROWS_AT_ONCE) * delta_stride] * k;
      }
    }
  }

  /// Reads the state at a query.
  void read(const threadgroup float4* query, threadgroup float* out, RowLane at) const {
    float4 q[DK / 32];
#pragma unroll
    for (int i = 0; i < DK / 32; ++i) {
      q[i] = query[at.lane + i * ROW_LANES];
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < DK / 32; ++i) {
        sum += metal::dot(columns[r][i], q[i]);
      }
      sum = sum_over_row(sum);
      if (at.lane == 0) {
        out[at.row + r * ROWS_AT_ONCE] = sum;
      }
    }
  }
};

}  // namespace mlx_qwen
