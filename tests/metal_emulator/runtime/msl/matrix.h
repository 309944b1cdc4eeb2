// simdgroup_matrix: 8 x 8, two neighbouring elements of a row in each lane, as on Apple GPUs.
#pragma once

#include "simd.h"

namespace metal {
template <typename T, int Rows = 8, int Columns = 8>
struct simdgroup_matrix {
  static_assert(Rows == 8 && Columns == 8, "only 8 x 8 matrices exist");
  vec<T, 2> held;

  simdgroup_matrix() = default;
  // A matrix made from a number is that number's multiple of the identity.
  explicit simdgroup_matrix(T diagonal);
  thread vec<T, 2>& thread_elements() thread { return held; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
}  // namespace metal

namespace emulator {
EMULATOR_PLAIN inline uint current_lane() { return machine.current->lane; }
inline uint matrix_row(uint lane) { return (lane / 16) * 4 + (lane / 2) % 4; }
inline uint matrix_column(uint lane) { return (lane / 4 & 2) * 2 + (lane % 2) * 2; }
inline uint matrix_lane(uint row, uint column) {
  return (row & 4) * 4 + (column & 4) * 2 + (row & 3) * 2 + (column & 2) / 2;
}

EMULATOR_PLAIN inline void meet_matrix(uint line) {
  if (machine.current->simdgroup->count != max_lanes)
    emulator_fail(divergence, line, "matrix functions need all 32 lanes of a SIMD group");
  emulator_meet(simd_operation, 0, line);
}

template <typename P>
EMULATOR_PLAIN inline P* matrix_element(P* source, ulong stride, ulong2 origin, bool transposed, uint i) {
  uint row = matrix_row(current_lane());
  uint column = matrix_column(current_lane()) + i;
  long y = long(origin.y) + (transposed ? column : row);
  long x = long(origin.x) + (transposed ? row : column);
  return source + y * long(stride) + x;
}
}  // namespace emulator

namespace metal {
template <typename T, int R, int C>
inline simdgroup_matrix<T, R, C>::simdgroup_matrix(T diagonal) {
  uint lane = emulator::current_lane();
  uint row = emulator::matrix_row(lane), column = emulator::matrix_column(lane);
  held = vec<T, 2>{column == row ? diagonal : T(0), column + 1 == row ? diagonal : T(0)};
}

template <typename T, int R = 8, int C = R>
inline simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, R, C> out;
  out.held = vec<T, 2>{value, value};
  return out;
}

template <typename T, typename P>
EMULATOR_PLAIN inline void simdgroup_load(simdgroup_matrix<T, 8, 8>& out, P* source, ulong stride = 8,
                                          ulong2 origin = 0, bool transposed = false, uint line = __builtin_LINE()) {
  static_assert(is_same_v<element_t<__remove_cv(P)>, T> || sizeof(P) == sizeof(T), "matrix and memory differ in type");
  emulator::meet_matrix(line);
  for (uint i = 0; i < 2; ++i) {
    auto* element = emulator::matrix_element(source, stride, origin, transposed, i);
    emulator::note_access(element, emulator::reads, line);
    out.held[i] = *element;
  }
}

template <typename T, typename P>
EMULATOR_PLAIN inline void simdgroup_store(simdgroup_matrix<T, 8, 8> matrix, P* target, ulong stride = 8,
                                           ulong2 origin = 0, bool transposed = false, uint line = __builtin_LINE()) {
  emulator::meet_matrix(line);
  for (uint i = 0; i < 2; ++i) {
    auto* element = emulator::matrix_element(target, stride, origin, transposed, i);
    emulator::note_access(element, emulator::writes, line);
    *element = matrix.held[i];
  }
}

// D = A B + C, products summed in the order of k in D's type.
template <typename D, typename A, typename B, typename C>
EMULATOR_PLAIN inline void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                                         simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c,
                                                         uint line = __builtin_LINE()) {
  struct Pair {
    vec<A, 2> a;
    vec<B, 2> b;
  };
  auto lanes = emulator::exchange(Pair{a.held, b.held}, line);
  if (lanes.simdgroup->count != 32) emulator::meet_matrix(line);
  uint row = emulator::matrix_row(lanes.lane), column = emulator::matrix_column(lanes.lane);
  for (uint i = 0; i < 2; ++i) {
    float sum = float(c.held[i]);
    for (uint k = 0; k < 8; ++k) {
      float left = float(lanes.values[emulator::matrix_lane(row, k)].a[k & 1]);
      float right = float(lanes.values[emulator::matrix_lane(k, column)].b[i]);
      sum = __builtin_fmaf(left, right, sum);
    }
    d.held[i] = D(sum);
  }
}
template <typename D, typename A, typename B>
EMULATOR_PLAIN inline void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                              simdgroup_matrix<B, 8, 8> b, uint line = __builtin_LINE()) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8, 8>(D(0)), line);
}
}  // namespace metal
