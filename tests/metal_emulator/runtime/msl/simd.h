// SIMD-group and quad-group functions. Every lane leaves its value in a slot and reads the others' after all have come.
#pragma once

#include "../machine.h"
#include "math.h"

namespace metal {
enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }
inline mem_flags operator&(mem_flags a, mem_flags b) { return mem_flags(uint(a) & uint(b)); }

inline void threadgroup_barrier(mem_flags flags, uint line = __builtin_LINE()) {
  emulator::emulator_meet(emulator::group_barrier, uint(flags), line);
}
inline void simdgroup_barrier(mem_flags flags, uint line = __builtin_LINE()) {
  emulator::emulator_meet(emulator::simd_barrier, uint(flags), line);
}
}  // namespace metal

namespace emulator {
// Pointers with an address space are only read by the compiler, never run.
template <typename P>
EMULATOR_PLAIN inline void note_access([[maybe_unused]] P* address, [[maybe_unused]] u32 access,
                                       [[maybe_unused]] uint line) {
#if !defined(EMULATOR_SYNTAX_ONLY)
  emulator_access(address, sizeof(P), access, line);
#endif
}

template <typename T>
struct Lanes {
  const T* values;
  Simdgroup* simdgroup;
  uint lane;
  uint side;
};

template <typename T>
EMULATOR_PLAIN inline Lanes<T> exchange(T value, uint line) {
  static_assert(sizeof(T) <= slot_bytes, "a SIMD operation moves at most 64 bytes a lane");
  Thread* self = machine.current;
  uint side = self->operations & 1;
  T* values = reinterpret_cast<T*>(self->simdgroup->slots[side]);
  values[self->lane] = value;
  emulator_meet(simd_operation, 0, line);
  return {values, self->simdgroup, self->lane, side};
}

// The butterfly 1, 2, 4, 8, 16; lanes outside a clipped group take no part.
template <typename T, typename F>
EMULATOR_PLAIN inline T reduce(T value, F combine, uint line) {
  Lanes<T> lanes = exchange(value, line);
  T* result = reinterpret_cast<T*>(lanes.simdgroup->result[lanes.side]);
  if (!lanes.simdgroup->reduced[lanes.side]) {
    T held[max_lanes];
    uint count = lanes.simdgroup->count;
    for (uint i = 0; i < count; ++i) held[i] = lanes.values[i];
    for (uint step = 1; step < max_lanes; step *= 2)
      for (uint i = 0; i + step < count; i += 2 * step) held[i] = combine(held[i], held[i + step]);
    *result = held[0];
    lanes.simdgroup->reduced[lanes.side] = true;
  }
  return *result;
}

template <typename T>
EMULATOR_PLAIN inline T taken_from(Lanes<T> lanes, uint source, uint line) {
  if (source >= lanes.simdgroup->count) {
    if (source < max_lanes) emulator_fail(divergence, line, "a value is taken from a lane that this SIMD group lacks");
    return lanes.values[lanes.lane];
  }
  return lanes.values[source];
}
}  // namespace emulator

namespace metal {
#define EMULATOR_SIMD_REDUCTION(name, expression)                                                \
  template <typename T>                                                                          \
  EMULATOR_PLAIN inline T name(T value, uint line = __builtin_LINE()) {                          \
    return emulator::reduce(value, [](T a, T b) EMULATOR_PLAIN { return T(expression); }, line); \
  }
EMULATOR_SIMD_REDUCTION(simd_sum, a + b)
EMULATOR_SIMD_REDUCTION(simd_product, a* b)
EMULATOR_SIMD_REDUCTION(simd_max, max(a, b))
EMULATOR_SIMD_REDUCTION(simd_min, min(a, b))
EMULATOR_SIMD_REDUCTION(simd_and, a& b)
EMULATOR_SIMD_REDUCTION(simd_or, a | b)
EMULATOR_SIMD_REDUCTION(simd_xor, a ^ b)
#undef EMULATOR_SIMD_REDUCTION

// A shuffle returns the value of the lane `source`; outside 0..31 the fill rule of the function applies.
#define EMULATOR_SIMD_SHUFFLE(name, argument, source_expression)                         \
  template <typename T>                                                                  \
  EMULATOR_PLAIN inline T name(T value, ushort argument, uint line = __builtin_LINE()) { \
    auto lanes = emulator::exchange(value, line);                                        \
    uint lane = lanes.lane;                                                              \
    return emulator::taken_from(lanes, source_expression, line);                         \
  }
EMULATOR_SIMD_SHUFFLE(simd_shuffle, from, ((void)lane, from))
EMULATOR_SIMD_SHUFFLE(simd_broadcast, from, ((void)lane, from))
EMULATOR_SIMD_SHUFFLE(simd_shuffle_xor, mask, lane ^ mask)
EMULATOR_SIMD_SHUFFLE(simd_shuffle_down, delta, lane + delta)
EMULATOR_SIMD_SHUFFLE(simd_shuffle_up, delta, lane - delta)
EMULATOR_SIMD_SHUFFLE(simd_shuffle_rotate_down, delta, (lane + delta) % 32)
EMULATOR_SIMD_SHUFFLE(simd_shuffle_rotate_up, delta, (lane - delta) % 32)
EMULATOR_SIMD_SHUFFLE(quad_shuffle, from, (lane & ~3u) + from)
EMULATOR_SIMD_SHUFFLE(quad_broadcast, from, (lane & ~3u) + from)
EMULATOR_SIMD_SHUFFLE(quad_shuffle_xor, mask, lane ^ mask)
#undef EMULATOR_SIMD_SHUFFLE

template <typename T>
EMULATOR_PLAIN inline T simd_broadcast_first(T value, uint line = __builtin_LINE()) {
  return emulator::exchange(value, line).values[0];
}
template <typename T>
EMULATOR_PLAIN inline T simd_shuffle_and_fill_down(T value, T filling, ushort delta, uint line = __builtin_LINE()) {
  auto lanes = emulator::exchange(value, line);
  auto fill = emulator::exchange(filling, line);
  uint source = lanes.lane + delta;
  return source < 32 ? emulator::taken_from(lanes, source, line) : emulator::taken_from(fill, source - 32, line);
}
template <typename T>
EMULATOR_PLAIN inline T simd_shuffle_and_fill_up(T value, T filling, ushort delta, uint line = __builtin_LINE()) {
  auto lanes = emulator::exchange(value, line);
  auto fill = emulator::exchange(filling, line);
  return lanes.lane >= delta ? emulator::taken_from(lanes, lanes.lane - delta, line)
                             : emulator::taken_from(fill, 32 + lanes.lane - delta, line);
}

#define EMULATOR_SIMD_PREFIX(name, start, combine)                                              \
  template <typename T>                                                                         \
  EMULATOR_PLAIN inline T simd_prefix_inclusive_##name(T value, uint line = __builtin_LINE()) { \
    auto lanes = emulator::exchange(value, line);                                               \
    T total = T(start);                                                                         \
    for (uint i = 0; i <= lanes.lane; ++i) total = T(total combine lanes.values[i]);            \
    return total;                                                                               \
  }                                                                                             \
  template <typename T>                                                                         \
  EMULATOR_PLAIN inline T simd_prefix_exclusive_##name(T value, uint line = __builtin_LINE()) { \
    auto lanes = emulator::exchange(value, line);                                               \
    T total = T(start);                                                                         \
    for (uint i = 0; i < lanes.lane; ++i) total = T(total combine lanes.values[i]);             \
    return total;                                                                               \
  }
EMULATOR_SIMD_PREFIX(sum, 0, +)
EMULATOR_SIMD_PREFIX(product, 1, *)
#undef EMULATOR_SIMD_PREFIX

template <typename T>
EMULATOR_PLAIN inline T quad_sum(T value, uint line = __builtin_LINE()) {
  auto lanes = emulator::exchange(value, line);
  const T* quad = lanes.values + (lanes.lane & ~3u);
  return T(T(quad[0] + quad[1]) + T(quad[2] + quad[3]));
}
template <typename T>
EMULATOR_PLAIN inline T quad_max(T value, uint line = __builtin_LINE()) {
  auto lanes = emulator::exchange(value, line);
  const T* quad = lanes.values + (lanes.lane & ~3u);
  return max(max(quad[0], quad[1]), max(quad[2], quad[3]));
}

struct simd_vote {
  ulong bits;
  explicit operator ulong() const { return bits; }
};
EMULATOR_PLAIN inline simd_vote simd_ballot(bool value, uint line = __builtin_LINE()) {
  auto lanes = emulator::exchange(value, line);
  ulong bits = 0;
  for (uint i = 0; i < lanes.simdgroup->count; ++i) bits |= ulong(lanes.values[i]) << i;
  return {bits};
}
EMULATOR_PLAIN inline bool simd_any(bool value, uint line = __builtin_LINE()) {
  return simd_ballot(value, line).bits != 0;
}
EMULATOR_PLAIN inline bool simd_all(bool value, uint line = __builtin_LINE()) { return !simd_any(!value, line); }
inline bool simd_is_first() { return emulator::machine.current->lane == 0; }
}  // namespace metal
