// Atomics: relaxed order, as Metal offers them to kernels.
#pragma once

#include "simd.h"

namespace metal {
enum memory_order { memory_order_relaxed };
enum thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device };
inline constexpr thread_scope thread_scope_default = thread_scope_device;

template <typename T>
struct atomic {
  using value_type = T;
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<float> atomic_float;
typedef atomic<ulong> atomic_ulong;
}  // namespace metal

namespace emulator {
// Reads, lets `change` compute the new value and writes; nothing runs in between on one OS thread.
template <typename P, typename F>
EMULATOR_PLAIN inline auto change_atomically(P* object, F change, uint line) {
  auto* value = &object->value;
  note_access(value, atomic_update, line);
  auto before = *value;
  *value = change(before);
  return before;
}
}  // namespace emulator

namespace metal {
#define EMULATOR_ATOMIC_UPDATE(name, expression)                                        \
  template <typename P, typename U>                                                     \
  EMULATOR_PLAIN inline auto atomic_##name##_explicit(P* object, U given, memory_order, \
                                                      uint line = __builtin_LINE()) {   \
    return emulator::change_atomically(                                                        \
        object,                                                                         \
        [given](auto old) EMULATOR_PLAIN {                                              \
          using T = decltype(old);                                                      \
          T operand = T(given);                                                         \
          return T(expression);                                                         \
        },                                                                              \
        line);                                                                          \
  }
EMULATOR_ATOMIC_UPDATE(fetch_add, old + operand)
EMULATOR_ATOMIC_UPDATE(fetch_sub, old - operand)
EMULATOR_ATOMIC_UPDATE(fetch_max, max(old, operand))
EMULATOR_ATOMIC_UPDATE(fetch_min, min(old, operand))
EMULATOR_ATOMIC_UPDATE(fetch_and, old& operand)
EMULATOR_ATOMIC_UPDATE(fetch_or, old | operand)
EMULATOR_ATOMIC_UPDATE(fetch_xor, old ^ operand)
EMULATOR_ATOMIC_UPDATE(exchange, ((void)old, operand))
#undef EMULATOR_ATOMIC_UPDATE

template <typename P>
EMULATOR_PLAIN inline auto atomic_load_explicit(P* object, memory_order, uint line = __builtin_LINE()) {
  emulator::note_access(&object->value, emulator::atomic_load, line);
  auto value = object->value;
  return value;
}
template <typename P, typename U>
EMULATOR_PLAIN inline void atomic_store_explicit(P* object, U value, memory_order, uint line = __builtin_LINE()) {
  emulator::note_access(&object->value, emulator::atomic_store, line);
  object->value = decltype(+object->value)(value);
}
// The emulated exchange never fails for no reason, so weak behaves as strong.
template <typename P, typename E, typename U>
EMULATOR_PLAIN inline bool atomic_compare_exchange_weak_explicit(P* object, E* expected, U desired, memory_order,
                                                                 memory_order, uint line = __builtin_LINE()) {
  auto wanted = *expected;
  auto before = emulator::change_atomically(
      object, [=](auto old) EMULATOR_PLAIN { return old == wanted ? decltype(old)(desired) : old; }, line);
  *expected = before;
  return before == wanted;
}
inline void atomic_thread_fence(mem_flags, memory_order, thread_scope = thread_scope_device) {}
}  // namespace metal
