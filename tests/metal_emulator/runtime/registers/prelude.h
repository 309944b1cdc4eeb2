// What a kernel's texts stand behind when only its registers are counted, on a GPU that clang compiles for: SIMD-group
// functions are single instructions that nobody runs.
#pragma once

#define EMULATOR_REGISTERS
#include "../msl/math.h"

using namespace metal;

namespace emulator {
template <typename T>
inline T instruction(T value, uint argument = 0) {
  return elementwise<T>(
      [argument](auto element) {
        float in = float(element), out;
        asm("; lanes %0 %1 %2" : "=v"(out) : "v"(in), "v"(argument));
        return out;
      },
      value);
}

template <typename T, uint id>
inline T* variable() {
  static __attribute__((loader_uninitialized)) T held;
  return &held;
}

namespace attribute {
inline uint thread_index_in_threadgroup() { return __builtin_amdgcn_workitem_id_x(); }
inline uint thread_index_in_simdgroup() { return thread_index_in_threadgroup() % 32; }
inline uint simdgroup_index_in_threadgroup() { return thread_index_in_threadgroup() / 32; }
inline uint3 thread_position_in_threadgroup() {
  return uint3{__builtin_amdgcn_workitem_id_x(), __builtin_amdgcn_workitem_id_y(), __builtin_amdgcn_workitem_id_z()};
}
inline uint3 threadgroup_position_in_grid() {
  return uint3{__builtin_amdgcn_workgroup_id_x(), __builtin_amdgcn_workgroup_id_y(), __builtin_amdgcn_workgroup_id_z()};
}
inline uint3 threads_per_threadgroup() { return uint3{GROUP_X, GROUP_Y, GROUP_Z}; }
inline uint simdgroups_per_threadgroup() { return (GROUP_X * GROUP_Y * GROUP_Z + 31) / 32; }
inline uint3 threads_per_grid() { return *(const constant uint3*)__builtin_amdgcn_implicitarg_ptr(); }
inline uint3 thread_position_in_grid() {
  return threadgroup_position_in_grid() * threads_per_threadgroup() + thread_position_in_threadgroup();
}
}  // namespace attribute
}  // namespace emulator

namespace metal {
enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
inline void threadgroup_barrier(mem_flags) { asm volatile("; barrier" ::: "memory"); }
inline void simdgroup_barrier(mem_flags) { asm volatile("; barrier" ::: "memory"); }

#define EMULATOR_OF_LANES(name)                          \
  template <typename T>                                  \
  inline T name(T value, ushort argument = 0) {          \
    return emulator::instruction(value, argument);       \
  }
EMULATOR_OF_LANES(simd_sum)
EMULATOR_OF_LANES(simd_max)
EMULATOR_OF_LANES(simd_min)
EMULATOR_OF_LANES(simd_shuffle)
EMULATOR_OF_LANES(simd_shuffle_xor)
EMULATOR_OF_LANES(simd_broadcast)
EMULATOR_OF_LANES(simd_prefix_exclusive_sum)
EMULATOR_OF_LANES(simd_prefix_inclusive_sum)
EMULATOR_OF_LANES(quad_sum)
#undef EMULATOR_OF_LANES

template <typename T, int Rows = 8, int Columns = 8>
struct simdgroup_matrix {
  vec<T, 2> held;
  thread vec<T, 2>& thread_elements() thread { return held; }
};

using simdgroup_float8x8 = simdgroup_matrix<float>;

template <typename T, int R = 8, int C = R>
inline simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T value) {
  return {vec<T, 2>{value, value}};
}

template <typename P>
inline P* matrix_element(P* memory, ulong stride, bool transposed, uint i) {
  const uint lane = emulator::attribute::thread_index_in_simdgroup();
  const uint row = lane / 16 * 4 + lane / 2 % 4, column = lane / 8 % 2 * 4 + lane % 2 * 2 + i;
  return memory + (transposed ? column * uint(stride) + row : row * uint(stride) + column);
}

template <typename T, typename P>
inline void simdgroup_load(simdgroup_matrix<T>& out, P* memory, ulong stride = 8, ulong2 = 0, bool transposed = false) {
  for (uint i = 0; i < 2; ++i) out.held[i] = *matrix_element(memory, stride, transposed, i);
}
template <typename T, typename P>
inline void simdgroup_store(simdgroup_matrix<T> matrix, P* memory, ulong stride = 8, ulong2 = 0, bool transposed = false) {
  for (uint i = 0; i < 2; ++i) *matrix_element(memory, stride, transposed, i) = matrix.held[i];
}

template <typename D, typename A, typename B, typename C>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<D>& d, simdgroup_matrix<A> a, simdgroup_matrix<B> b,
                                          simdgroup_matrix<C> c) {
  float first = c.held[0], second = c.held[1];
  asm("; matrix %0 %1 %2 %3 %4 %5"
      : "+v"(first), "+v"(second)
      : "v"(float(a.held[0])), "v"(float(a.held[1])), "v"(float(b.held[0])), "v"(float(b.held[1])));
  d.held = vec<D, 2>{D(first), D(second)};
}
template <typename D, typename A, typename B>
inline void simdgroup_multiply(simdgroup_matrix<D>& d, simdgroup_matrix<A> a, simdgroup_matrix<B> b) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D>(0));
}
}  // namespace metal
