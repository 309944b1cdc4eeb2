// What a threadgroup does with a tile of keys and values: scores, the running maximum and sum of each row, the output.
#pragma once

#include <metal_stdlib>
#include "../../matrix.h"

namespace mlx_qwen {

/// The score of what a row does not see, and the maximum of no score.
constant constexpr float HIDDEN = -3.0e38f;

/// What the rows of one key head see: the first `keys` less what comes behind their own token, or what a mask says.
template <bool MASKED, typename Mask>
struct Sight {
  uint keys;
  uint tokens;
  uint first_row;
  Mask mask;
  int64_t token_stride;
  int64_t key_stride;

  bool has(uint row, uint key) const {
    const uint token = (first_row + row) % tokens;
    if (key >= keys) {
      return false;
    }
    return MASKED ? mask[token * token_stride + key * key_stride] : key + tokens <= keys + token;
  }
};

/// Query rows [rows, D] of one key head, in threadgroup memory or where they lie; rows behind the last are zero.
template <typename T, int D, int STRIDE, bool STAGED>
struct Queries {
  const device T* given;
  const threadgroup T* staged;
  uint rows;

  float at(uint row, uint channel) const {
    if (STAGED) {
      return static_cast<float>(staged[row * STRIDE + channel]);
    }
    return row < rows ? static_cast<float>(given[row * D + channel]) : 0.0f;
  }
};

/// Scores of the SIMD group's eight keys, from `first` on, for all rows: into columns of `scores` from `column` on.
/// Within 32 channels a lane takes eight neighbours; each product takes two of them, of keys and queries alike.
template <int D, int ROW_BLOCKS, int STRIDE, typename Keys, typename Q, typename S>
void score_keys(
    Keys keys, Q queries, S sight, float factor, uint first, uint column, threadgroup float* scores, uint lane) {
  const uint row = row_of(lane), pair = column_of(lane);
  const uint key = first + row;
  Matrix sums[ROW_BLOCKS], left, right;
#pragma unroll
  for (int block = 0; block < ROW_BLOCKS; ++block) {
    sums[block] = zeros();
  }
  for (uint channel = 0; channel < D; channel += 32) {
    float eight[8] = {};
    if (key < sight.keys) {
      keys.read(key, channel + 4 * pair, eight);
    }
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      left.thread_elements()[0] = eight[2 * part];
      left.thread_elements()[1] = eight[2 * part + 1];
      const uint place = channel + row / 2 * 8 + 2 * part + row % 2;
#pragma unroll
      for (int block = 0; block < ROW_BLOCKS; ++block) {
        right.thread_elements()[0] = queries.at(8 * block + pair, place);
        right.thread_elements()[1] = queries.at(8 * block + pair + 1, place);
        metal::simdgroup_multiply_accumulate(sums[block], left, right, sums[block]);
      }
    }
  }
#pragma unroll
  for (int block = 0; block < ROW_BLOCKS; ++block) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const uint query = 8 * block + pair + e;
      const float score = sums[block].thread_elements()[e] * factor;
      scores[query * STRIDE + column + row] = sight.has(query, key) ? score : HIDDEN;
    }
  }
}

/// The running maximum and sum of the rows that a SIMD group keeps: every SIMDGROUPS-th.
template <int ROWS, int TILE, int STRIDE, int SIMDGROUPS>
struct Softmax {
  static constexpr constant int OWN = (ROWS + SIMDGROUPS - 1) / SIMDGROUPS;
  static constexpr constant int PARTS = (TILE + 31) / 32;
  float most[OWN];
  float total[OWN];

  void begin() {
#pragma unroll
    for (int n = 0; n < OWN; ++n) {
      most[n] = HIDDEN;
      total[n] = 0.0f;
    }
  }

  /// Replaces a tile's scores by exponentials beside the new maximum; `factors` gets what older ones are worth beside it.
  void take(threadgroup float* scores, threadgroup float* factors, uint simdgroup, uint lane) {
#pragma unroll
    for (int n = 0; n < OWN; ++n) {
      const uint row = n * SIMDGROUPS + simdgroup;
      if (row < ROWS) {
        threadgroup float* own = scores + row * STRIDE;
        float score[PARTS];
        float best = most[n];
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
          const uint key = 32 * i + lane;
          score[i] = key < TILE ? own[key] : HIDDEN;
          best = metal::max(best, score[i]);
        }
        best = metal::simd_max(best);
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
          const uint key = 32 * i + lane;
          const float weight = score[i] > HIDDEN ? metal::precise::exp(score[i] - best) : 0.0f;
          sum += weight;
          if (key < TILE) {
            own[key] = weight;
          }
        }
        const float older = metal::precise::exp(most[n] - best);
        total[n] = total[n] * older + metal::simd_sum(sum);
        most[n] = best;
        if (lane == 0) {
          factors[row] = older;
        }
      }
    }
  }
};

/// A SIMD group's channels of the output, CHANNELS from `first` on, of all rows. Within 32 of them a lane has the eight
/// neighbours that it reads of a value.
template <int ROW_BLOCKS, int CHANNELS>
struct Output {
  Matrix parts[ROW_BLOCKS][CHANNELS / 8];

  void begin() {
#pragma unroll
    for (int block = 0; block < ROW_BLOCKS; ++block) {
#pragma unroll
      for (int i = 0; i < CHANNELS / 8; ++i) {
        parts[block][i] = zeros();
      }
    }
  }

  /// What older tiles gave, times `factors`, and a tile of `tile` keys with their weights.
  template <int STRIDE, typename Values>
  void take(
      Values values,
      uint first,
      uint keys,
      uint channel,
      uint tile,
      const threadgroup float* weights,
      const threadgroup float* factors,
      uint lane) {
    const uint row = row_of(lane), pair = column_of(lane);
    Matrix weight, value;
#pragma unroll
    for (int block = 0; block < ROW_BLOCKS; ++block) {
      const float factor = factors[8 * block + row];
#pragma unroll
      for (int i = 0; i < CHANNELS / 8; ++i) {
        scale(parts[block][i], factor);
      }
    }
    for (uint key = 0; key < tile; key += 8) {
#pragma unroll
      for (int run = 0; run < CHANNELS / 32; ++run) {
        float eight[8] = {};
        if (first + key + row < keys) {
          values.read(first + key + row, channel + 32 * run + 4 * pair, eight);
        }
#pragma unroll
        for (int block = 0; block < ROW_BLOCKS; ++block) {
          metal::simdgroup_load(weight, weights + 8 * block * STRIDE + key, STRIDE);
#pragma unroll
          for (int part = 0; part < 4; ++part) {
            value.thread_elements()[0] = eight[2 * part];
            value.thread_elements()[1] = eight[2 * part + 1];
            metal::simdgroup_multiply_accumulate(
                parts[block][4 * run + part], weight, value, parts[block][4 * run + part]);
          }
        }
      }
    }
  }

  /// Writes `rows` rows of D channels, each times its factor.
  template <int D, typename E>
  void write(device E* out, uint rows, uint channel, const threadgroup float* factors, uint lane) {
    const uint row = row_of(lane), pair = column_of(lane);
#pragma unroll
    for (int block = 0; block < ROW_BLOCKS; ++block) {
      const uint query = 8 * block + row;
      if (query < rows) {
        const float factor = factors[query];
        device E* own = out + query * D + channel + 4 * pair;
#pragma unroll
        for (int i = 0; i < CHANNELS / 8; ++i) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float sum = parts[block][i].thread_elements()[e] * factor;
            own[i / 4 * 32 + i % 4 * 2 + e] = static_cast<E>(sum);
          }
        }
      }
    }
  }
};

}  // namespace mlx_qwen
