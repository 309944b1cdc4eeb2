#include <metal_stdlib>
#include "activations.h"

namespace mlx_qwen {

// Four neighbouring outputs of a row that holds the gate's values before those of up.
template <typename T>
void swiglu_rows(const device T* gate_up, const constant int* gate_up_shape, device T* hidden, uint3 position) {
  using T4 = metal::vec<T, 4>;
  const ulong I = gate_up_shape[1] / 2;
  const ulong column = 4 * position.x;
  const ulong row = position.y;
  const T4 gate = *(const device T4*)(gate_up + row * 2 * I + column);
  const T4 up = *(const device T4*)(gate_up + row * 2 * I + I + column);
  T4 result;
  for (int i = 0; i < 4; ++i) result[i] = T(swiglu(float(gate[i]), float(up[i])));
  *(device T4*)(hidden + row * I + column) = result;
}

}  // namespace mlx_qwen
