// The second pass of attention over a long context: what the runs of keys gave, each beside its own maximum, summed.

#include <metal_stdlib>

namespace mlx_qwen {

/// out [heads * rows, D] from partial [heads, runs, rows, D] and sums [heads, runs, rows, 2]. The grid is D, rows, heads.
template <typename T, uint D, typename Sums>
void combine_attention(
    const device float* partial,
    const constant int* partial_shape,
    Sums sums,
    device T* out,
    uint3 place) {
  const uint runs = partial_shape[1], rows = partial_shape[2];
  const uint first = place.z * runs * rows + place.y;
  float most = sums[2 * first];
  for (uint run = 1; run < runs; ++run) {
    most = metal::max(most, sums[2 * (first + run * rows)]);
  }
  float sum = 0.0f, total = 0.0f;
  for (uint run = 0; run < runs; ++run) {
    const uint from = first + run * rows;
    const float weight = metal::precise::exp(sums[2 * from] - most);
    sum += weight * partial[static_cast<int64_t>(from) * D + place.x];
    total += weight * sums[2 * from + 1];
  }
  out[(static_cast<int64_t>(place.z) * rows + place.y) * D + place.x] = static_cast<T>(sum / total);
}

}  // namespace mlx_qwen
