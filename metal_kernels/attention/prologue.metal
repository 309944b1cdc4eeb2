// From the fused projection row of attention to its queries, keys and values: RMS norm per head, rotary positions,
// heads before tokens. One SIMD group takes one head of one token.

#include <metal_stdlib>

namespace mlx_qwen {

constant constexpr uint LANES = 32;

/// What turns each pair of one token. `positions` [3, B, T] are absolute, or those of the first token when ADVANCING.
template <bool ADVANCING, typename Frequencies, typename Axes, typename Positions>
struct Rotation {
  Frequencies frequencies;
  Axes axes;
  Positions positions;
  int64_t axis_stride;
  uint token;

  float angle(uint pair) const {
    const auto position = positions[axes[pair] * axis_stride] + (ADVANCING ? static_cast<int>(token) : 0);
    return static_cast<float>(position) * frequencies[pair];
  }
};

/// out = the head at `x`, normed and with its first DIMS of D elements turned.
template <typename T, uint D, uint DIMS, typename Rotation>
void place_head(
    const device T* x,
    int64_t x_stride,
    const device float* weight,
    int64_t weight_stride,
    Rotation rotation,
    float eps,
    device T* out,
    uint lane) {
  constexpr uint HALF = DIMS / 2;
  constexpr uint PAIRS = (HALF + LANES - 1) / LANES;
  constexpr uint OTHERS = (D - DIMS + LANES - 1) / LANES;
  float first[PAIRS];
  float second[PAIRS];
  float others[OTHERS > 0 ? OTHERS : 1];
  float squares = 0;
  for (uint j = 0, i = lane; j < PAIRS; ++j, i += LANES) {
    const bool inside = i < HALF;
    first[j] = inside ? static_cast<float>(x[i * x_stride]) : 0.0f;
    second[j] = inside ? static_cast<float>(x[(i + HALF) * x_stride]) : 0.0f;
    squares += first[j] * first[j] + second[j] * second[j];
  }
  for (uint j = 0, i = DIMS + lane; j < OTHERS; ++j, i += LANES) {
    others[j] = i < D ? static_cast<float>(x[i * x_stride]) : 0.0f;
    squares += others[j] * others[j];
  }
  const float inverse = metal::precise::rsqrt(metal::simd_sum(squares) / D + eps);
  for (uint j = 0, i = lane; j < PAIRS; ++j, i += LANES) {
    if (i < HALF) {
      const float a = first[j] * inverse * weight[i * weight_stride];
      const float b = second[j] * inverse * weight[(i + HALF) * weight_stride];
      const float angle = rotation.angle(i);
      const float c = metal::precise::cos(angle);
      const float s = metal::precise::sin(angle);
      out[i] = static_cast<T>(a * c - b * s);
      out[i + HALF] = static_cast<T>(b * c + a * s);
    }
  }
  for (uint j = 0, i = DIMS + lane; j < OTHERS; ++j, i += LANES) {
    if (i < D) {
      out[i] = static_cast<T>(others[j] * inverse * weight[i * weight_stride]);
    }
  }
}

/// q [B, H, T, D] and kv [2, B, HKV, T, D] from qkv [B, T, (H + 2 HKV) D + ...]. The grid is lanes, heads, B * T.
template <
    typename T,
    uint H,
    uint HKV,
    uint D,
    uint DIMS,
    bool ADVANCING,
    typename Frequencies,
    typename Axes,
    typename Positions>
void attention_prologue(
    const device T* qkv,
    const constant int* qkv_shape,
    const constant int64_t* qkv_strides,
    const device float* q_weight,
    const constant int64_t* q_weight_strides,
    const device float* k_weight,
    const constant int64_t* k_weight_strides,
    Frequencies frequencies,
    Axes axes,
    Positions positions,
    const constant int64_t* positions_strides,
    const constant float& eps,
    device T* q,
    device T* kv,
    uint3 place) {
  const uint lane = place.x;
  const uint head = place.y;
  const uint tokens = qkv_shape[1];
  const uint batch = place.z / tokens;
  const uint token = place.z % tokens;
  const device T* x = qkv + batch * qkv_strides[0] + token * qkv_strides[1] + head * D * qkv_strides[2];
  const bool is_query = head < H;
  const bool is_value = head >= H + HKV;
  const int64_t outer = is_query ? batch * H + head : ((is_value ? qkv_shape[0] : 0) + batch) * HKV + (head - H) % HKV;
  device T* out = (is_query ? q : kv) + (outer * tokens + token) * D;

  if (is_value) {
    for (uint i = lane; i < D; i += LANES) {
      out[i] = x[i * qkv_strides[2]];
    }
    return;
  }
  const Rotation<ADVANCING, Frequencies, Axes, Positions> rotation{
      frequencies,
      axes,
      positions + batch * positions_strides[1] + token * positions_strides[2],
      positions_strides[0],
      token};
  const device float* weight = is_query ? q_weight : k_weight;
  const int64_t weight_stride = is_query ? q_weight_strides[0] : k_weight_strides[0];
  place_head<T, D, DIMS>(x, qkv_strides[2], weight, weight_stride, rotation, eps, out, lane);
}

}  // namespace mlx_qwen
