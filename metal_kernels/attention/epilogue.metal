// The gate on attention's output: heads back beside each other, times sigmoid(gate).

#include <metal_stdlib>

namespace mlx_qwen {

/// The same on either side of 0 as MLX's sigmoid, and finite everywhere.
inline float sigmoid(float x) {
  const float y = 1.0f / (1.0f + metal::precise::exp(metal::abs(x)));
  return x < 0 ? y : 1.0f - y;
}

/// gated [B, T, H D] from attended [B, H, T, D] and gate [B, T, H D]. The grid is columns, T, B, where a thread takes
/// every column that is its own plus a multiple of the grid's width.
template <typename T, uint D>
void attention_epilogue(
    const device T* attended,
    const constant int* attended_shape,
    const constant int64_t* attended_strides,
    const device T* gate,
    const constant int64_t* gate_strides,
    device T* gated,
    uint3 place,
    uint3 grid) {
  const uint width = attended_shape[1] * D;
  attended += place.z * attended_strides[0] + place.y * attended_strides[2];
  gate += place.z * gate_strides[0] + place.y * gate_strides[1];
  gated += (static_cast<int64_t>(place.z) * grid.y + place.y) * width;
  for (uint column = place.x; column < width; column += grid.x) {
    const T value = attended[column / D * attended_strides[1] + column % D * attended_strides[3]];
    const float factor = sigmoid(static_cast<float>(gate[column * gate_strides[2]]));
    gated[column] = static_cast<T>(static_cast<float>(value) * factor);
  }
}

}  // namespace mlx_qwen
