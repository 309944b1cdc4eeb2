#include <metal_stdlib>
#include "activations.h"

namespace mlx_qwen {

// Four neighbouring outputs of a row that holds the gate's values before those of up; rows may begin anywhere.
template <typename T>
void swiglu_rows(const device T* gate_up, const constant int* gate_up_shape, device T* hidden, uint3 position) {
  const ulong I = gate_up_shape[1] / 2;
  const ulong column = 4 * position.x;
  gate_up += position.y * 2 * I + column;
  hidden += position.y * I + column;
#pragma unroll
  for (int i = 0; i < 4; ++i) hidden[i] = T(swiglu(float(gate_up[i]), float(gate_up[I + i])));
}

}  // namespace mlx_qwen
