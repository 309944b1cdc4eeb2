// RMS norm of the residual stream, alone or behind the addition of a branch. One threadgroup a row; its threads hold
// the row in registers, so that nothing is read twice.

#include <metal_stdlib>

namespace mlx_qwen {

struct Row {
  uint size;
  uint first;
  uint step;
  uint lane;
  uint simdgroup;
  uint simdgroups;
};

/// Sum of one value a thread over the threadgroup; `partials` has a place for each of at most 32 SIMD groups.
inline float sum_over_threadgroup(float value, Row row, threadgroup float* partials) {
  value = metal::simd_sum(value);
  if (row.lane == 0) {
    partials[row.simdgroup] = value;
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  return metal::simd_sum(row.lane < row.simdgroups ? partials[row.lane] : 0.0f);
}

/// Writes values * weight / sqrt(mean(values^2) + eps), the values being those of elements first, first + step, ...
template <typename T, int PER_THREAD>
void write_normed(
    const thread float* values,
    const device float* weight,
    int64_t weight_stride,
    float eps,
    device T* normed,
    Row row,
    threadgroup float* partials) {
  float squares = 0;
  for (int j = 0; j < PER_THREAD; ++j) {
    squares += values[j] * values[j];
  }
  const float mean = sum_over_threadgroup(squares, row, partials) / row.size;
  const float inverse = metal::precise::rsqrt(mean + eps);
  for (int j = 0; j < PER_THREAD; ++j) {
    const uint i = row.first + j * row.step;
    if (i < row.size) {
      normed[i] = static_cast<T>(values[j] * inverse * weight[i * weight_stride]);
    }
  }
}

/// Which row of [B, T, ...] a threadgroup has.
inline int64_t row_number(uint3 group, const constant int* shape) {
  return static_cast<int64_t>(group.z) * shape[1] + group.y;
}

inline Row row_of(uint size, uint3 position, uint3 threads, uint lane, uint simdgroup, uint simdgroups) {
  return Row{size, position.x, threads.x, lane, simdgroup, simdgroups};
}

/// normed [B, T, D] from x [B, T, D]; weight [D].
template <typename X, typename T, int PER_THREAD>
void rms_norm(
    const device X* x,
    const constant int* x_shape,
    const constant int64_t* x_strides,
    const device float* weight,
    const constant int64_t* weight_strides,
    const constant float& eps,
    device T* normed,
    uint3 group,
    uint3 position,
    uint3 threads,
    uint lane,
    uint simdgroup,
    uint simdgroups,
    threadgroup float* partials) {
  const Row row = row_of(x_shape[2], position, threads, lane, simdgroup, simdgroups);
  x += group.z * x_strides[0] + group.y * x_strides[1];
  float values[PER_THREAD];
  for (int j = 0; j < PER_THREAD; ++j) {
    const uint i = row.first + j * row.step;
    values[j] = i < row.size ? static_cast<float>(x[i * x_strides[2]]) : 0.0f;
  }
  normed += row_number(group, x_shape) * row.size;
  write_normed<T, PER_THREAD>(values, weight, weight_strides[0], eps, normed, row, partials);
}

/// total = x + branch in fp32, and its norm; all [B, T, D].
template <typename X, typename T, int PER_THREAD>
void add_rms_norm(
    const device X* x,
    const constant int* x_shape,
    const constant int64_t* x_strides,
    const device T* branch,
    const constant int64_t* branch_strides,
    const device float* weight,
    const constant int64_t* weight_strides,
    const constant float& eps,
    device float* total,
    device T* normed,
    uint3 group,
    uint3 position,
    uint3 threads,
    uint lane,
    uint simdgroup,
    uint simdgroups,
    threadgroup float* partials) {
  const Row row = row_of(x_shape[2], position, threads, lane, simdgroup, simdgroups);
  x += group.z * x_strides[0] + group.y * x_strides[1];
  branch += group.z * branch_strides[0] + group.y * branch_strides[1];
  const int64_t first = row_number(group, x_shape) * row.size;
  total += first;
  float values[PER_THREAD];
  for (int j = 0; j < PER_THREAD; ++j) {
    const uint i = row.first + j * row.step;
    values[j] = 0.0f;
    if (i < row.size) {
      values[j] = static_cast<float>(x[i * x_strides[2]]) + static_cast<float>(branch[i * branch_strides[2]]);
      total[i] = values[j];
    }
  }
  write_normed<T, PER_THREAD>(values, weight, weight_strides[0], eps, normed + first, row, partials);
}

}  // namespace mlx_qwen
