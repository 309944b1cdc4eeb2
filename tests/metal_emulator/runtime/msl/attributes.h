// The thread attributes that MLX passes to a kernel, read from the running thread.
#pragma once

#include "simd.h"

namespace emulator {
EMULATOR_PLAIN inline const Thread& self() { return *machine.current; }
EMULATOR_PLAIN inline uint3 triple(Triple t) { return uint3{t.x, t.y, t.z}; }
EMULATOR_PLAIN inline uint3 triple(const u32* t) { return uint3{t[0], t[1], t[2]}; }
EMULATOR_PLAIN inline uint simdgroups(uint threads) { return (threads + 31) / 32; }
EMULATOR_PLAIN inline uint quadgroups(uint threads) { return (threads + 3) / 4; }

namespace attribute {
EMULATOR_PLAIN inline uint3 dispatch_threads_per_threadgroup() { return triple(machine.launch->group_size); }
EMULATOR_PLAIN inline uint dispatch_threads() {
  uint3 size = dispatch_threads_per_threadgroup();
  return size.x * size.y * size.z;
}
EMULATOR_PLAIN inline uint dispatch_quadgroups_per_threadgroup() { return quadgroups(dispatch_threads()); }
EMULATOR_PLAIN inline uint dispatch_simdgroups_per_threadgroup() { return simdgroups(dispatch_threads()); }
EMULATOR_PLAIN inline uint3 grid_origin() { return uint3{0, 0, 0}; }
EMULATOR_PLAIN inline uint3 grid_size() { return triple(machine.launch->grid); }
EMULATOR_PLAIN inline uint quadgroup_index_in_threadgroup() { return self().index / 4; }
EMULATOR_PLAIN inline uint quadgroups_per_threadgroup() { return quadgroups(machine.group.thread_count); }
EMULATOR_PLAIN inline uint simdgroup_index_in_threadgroup() { return self().simdgroup->index; }
EMULATOR_PLAIN inline uint simdgroups_per_threadgroup() { return machine.group.simdgroup_count; }
EMULATOR_PLAIN inline uint thread_execution_width() { return 32; }
EMULATOR_PLAIN inline uint thread_index_in_quadgroup() { return self().index % 4; }
EMULATOR_PLAIN inline uint thread_index_in_simdgroup() { return self().lane; }
EMULATOR_PLAIN inline uint thread_index_in_threadgroup() { return self().index; }
EMULATOR_PLAIN inline uint3 thread_position_in_threadgroup() { return triple(self().position); }
EMULATOR_PLAIN inline uint3 threadgroup_position_in_grid() { return triple(machine.group.position); }
EMULATOR_PLAIN inline uint3 thread_position_in_grid() {
  return threadgroup_position_in_grid() * dispatch_threads_per_threadgroup() + thread_position_in_threadgroup();
}
EMULATOR_PLAIN inline uint3 threadgroups_per_grid() { return triple(machine.groups_per_grid); }
EMULATOR_PLAIN inline uint3 threads_per_grid() { return grid_size(); }
EMULATOR_PLAIN inline uint threads_per_simdgroup() { return 32; }
EMULATOR_PLAIN inline uint3 threads_per_threadgroup() { return triple(machine.group.size); }
}  // namespace attribute

// A threadgroup variable: the same memory for all threads of a group.
template <typename T, uint id>
EMULATOR_PLAIN inline T* variable(uint line = __builtin_LINE()) {
  return (T*)emulator_threadgroup_variable(id, sizeof(T), alignof(T), line);
}
}  // namespace emulator
