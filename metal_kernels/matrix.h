// 8 x 8 matrices that a SIMD group holds together, two neighbours of a row in each lane.
#pragma once

#include <metal_stdlib>

namespace mlx_qwen {

using Matrix = metal::simdgroup_matrix<float, 8, 8>;

/// The row, and the first of two columns, whose elements of an 8 x 8 matrix a lane holds.
inline uint row_of(uint lane) {
  return lane / 16 * 4 + lane / 2 % 4;
}
inline uint column_of(uint lane) {
  return lane / 8 % 2 * 4 + lane % 2 * 2;
}

inline Matrix zeros() {
  return metal::make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
}

inline void scale(thread Matrix& matrix, float factor) {
  matrix.thread_elements()[0] *= factor;
  matrix.thread_elements()[1] *= factor;
}

}  // namespace mlx_qwen
