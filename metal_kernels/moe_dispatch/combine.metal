#include <metal_stdlib>

namespace mlx_qwen {

// Four neighbouring outputs of a token: the sum over its k experts, whose rows lie sorted by expert, and the shared one.
template <typename T, int k, typename Scores, typename SharedScore>
void combine(
    const device T* outputs,
    const constant int* outputs_shape,
    const device uint32_t* places,
    Scores scores,
    const device T* shared,
    SharedScore shared_score,
    device T* combined,
    uint3 position) {
  const ulong K = outputs_shape[1];
  const ulong column = 4 * position.x;
  const ulong token = position.y;
  float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int slot = 0; slot < k; ++slot) {
    const float score = scores[token * k + slot];
    const device T* row = outputs + places[token * k + slot] * K + column;
#pragma unroll
    for (int i = 0; i < 4; ++i) total[i] += score * float(row[i]);
  }
  const float score = shared_score[token];
  const device T* row = shared + token * K + column;
#pragma unroll
  for (int i = 0; i < 4; ++i) combined[token * K + column + i] = T(total[i] + score * float(row[i]));
}

}  // namespace mlx_qwen
