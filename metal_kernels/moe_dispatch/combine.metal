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
  using T4 = metal::vec<T, 4>;
  const ulong K = outputs_shape[1];
  const ulong column = 4 * position.x;
  const ulong token = position.y;
  float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int slot = 0; slot < k; ++slot) {
    const float score = scores[token * k + slot];
    const T4 row = *(const device T4*)(outputs + places[token * k + slot] * K + column);
    for (int i = 0; i < 4; ++i) total[i] += score * float(row[i]);
  }
  const float score = shared_score[token];
  const T4 row = *(const device T4*)(shared + token * K + column);
  T4 sum;
  for (int i = 0; i < 4; ++i) sum[i] = T(total[i] + score * float(row[i]));
  *(device T4*)(combined + token * K + column) = sum;
}

}  // namespace mlx_qwen
