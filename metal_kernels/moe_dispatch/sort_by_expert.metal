#include <metal_stdlib>

namespace mlx_qwen {

// A stable counting sort of (token, expert) pairs. One SIMD group places all pairs of one expert: their first place is
// the number of pairs with lower experts, and they keep their order.
template <typename Indices>
void sort_by_expert(
    Indices indices,
    const constant int* indices_shape,
    device uint32_t* tokens,
    device uint32_t* experts,
    device uint32_t* places,
    uint3 position,
    uint lane) {
  const uint k = indices_shape[1];
  const uint pairs = indices_shape[0] * k;
  const uint expert = position.y;

  uint lower = 0;
  uint own = 0;
  for (uint pair = lane; pair < pairs; pair += 32) {
    lower += indices[pair] < expert;
    own += indices[pair] == expert;
  }
  uint place = metal::simd_sum(lower);
  const uint end = place + metal::simd_sum(own);

  for (uint start = 0; place < end; start += 32) {
    const uint pair = start + lane;
    const uint is_own = pair < pairs && indices[pair] == expert;
    const uint before = metal::simd_prefix_exclusive_sum(is_own);
    if (is_own) {
      tokens[place + before] = pair / k;
      experts[place + before] = expert;
      places[pair] = place + before;
    }
    place += metal::simd_sum(is_own);
  }
}

}  // namespace mlx_qwen
