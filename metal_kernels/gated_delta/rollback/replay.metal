// Takes tokens of a verify step back: replays the kept ones on the state from before. The rows of a value head are one
// threadgroup's, or several threadgroups', which have nothing to tell each other.

#include <metal_stdlib>
#include "../head.h"

namespace mlx_qwen {

/// Writes the W - 1 inputs of the convolution up to the last kept one, for the channels that belong to the head.
template <typename E, int DK, int DV, int W, int THREADS>
void keep_rows(
    const device E* rows,
    const constant int64_t* row_strides,
    const device E* state,
    const constant int64_t* state_strides,
    device E* new_state,
    int kept,
    Head head,
    uint thread_index) {
  rows += head.batch * row_strides[0];
  state += head.batch * state_strides[0];
  new_state += static_cast<int64_t>(head.batch) * (W - 1) * head.channels;
  for (uint i = head.first ? thread_index : 2 * DK + thread_index; i < 2 * DK + DV; i += THREADS) {
    const uint channel = head.channel<DK, DV>(i);
    for (int w = kept; w < kept + W - 1; ++w) {
      new_state[(w - kept) * head.channels + channel] =
          w < W - 1 ? state[w * state_strides[1] + channel * state_strides[2]]
                    : rows[(w - W + 1) * row_strides[1] + channel * row_strides[2]];
    }
  }
}

/// Of both states after `kept` [B] tokens of a tape: what belongs to one value head, or to some rows of it.
template <typename E, int DK, int DV, int W, int ROWS, int SIMDGROUPS, typename LogDecays, typename Kept>
void gated_delta_replay(
    const device float* k, const constant int64_t* k_strides,
    const device float* delta, const constant int* delta_shape, const constant int64_t* delta_strides,
    LogDecays log_decay, const constant int64_t* log_decay_strides,
    const device E* rows, const constant int* rows_shape, const constant int64_t* rows_strides,
    Kept kept, const constant int64_t* kept_strides,
    const device E* conv_state, const constant int64_t* conv_state_strides,
    const device float* state, const constant int64_t* state_strides,
    device E* new_conv_state, device float* new_state,
    uint3 group, uint thread_index, uint lane, uint simdgroup) {
  const Head head = head_of<DK, DV>(group, delta_shape[2], rows_shape[2]);
  const int tokens = metal::clamp(static_cast<int>(kept[head.batch * kept_strides[0]]), 0, delta_shape[1]);
  if (group.x == 0) {
    keep_rows<E, DK, DV, W, 32 * SIMDGROUPS>(rows, rows_strides, conv_state, conv_state_strides, new_conv_state, tokens,
                                             head, thread_index);
  }
  k += head.batch * k_strides[0] + head.key * k_strides[2];
  delta += head.batch * delta_strides[0] + head.value * delta_strides[2];
  log_decay += head.batch * log_decay_strides[0] + head.value * log_decay_strides[2];
  state += head.batch * state_strides[0] + head.value * state_strides[1];
  new_state += static_cast<int64_t>(head.batch * head.value_heads + head.value) * DV * DK;
  const RowLane at = row_lane_of<ROWS>(group.x * SIMDGROUPS + simdgroup, lane);
  if (at.row < DV) {
    StatePart<DK, ROWS> part;
    part.load(state, state_strides[2], state_strides[3], at);
    for (int t = 0; t < tokens; ++t) {
      const float decay = metal::precise::exp(log_decay[t * log_decay_strides[1]]);
      part.rewrite(k + t * k_strides[1], k_strides[3], delta + t * delta_strides[1], delta_strides[3], decay, at);
    }
    part.store(new_state, at);
  }
}

}  // namespace mlx_qwen
