// The functions that clang's thread and undefined-behaviour sanitizers call, bound to the emulator's checks.
#include "checks.h"

using namespace emulator;

namespace {
// The layout that clang gives a sanitizer's static data begins so.
struct Place {
  const char* file;
  u32 line;
  u32 column;
};
}  // namespace

extern "C" {

void __tsan_init() {}

// The unaligned hooks are called for types that promise less than their size, as packed vectors do.
#define ACCESS_HOOKS(size)                                                                                   \
  void __tsan_read##size(void* p) { check_aligned(p, size, reads, site_of(__builtin_return_address(0))); }   \
  void __tsan_write##size(void* p) { check_aligned(p, size, writes, site_of(__builtin_return_address(0))); } \
  void __tsan_unaligned_read##size(void* p) { check(p, size, reads, site_of(__builtin_return_address(0))); } \
  void __tsan_unaligned_write##size(void* p) { check(p, size, writes, site_of(__builtin_return_address(0))); }
ACCESS_HOOKS(1)
ACCESS_HOOKS(2)
ACCESS_HOOKS(4)
ACCESS_HOOKS(8)
ACCESS_HOOKS(16)

void* __tsan_memcpy(u8* to, const u8* from, u64 size) {
  u32 site = site_of(__builtin_return_address(0));
  for (u64 i = 0; i < size; ++i) {
    check(from + i, 1, reads, site);
    check(to + i, 1, writes, site);
    to[i] = from[i];
  }
  return to;
}

void* __tsan_memset(u8* to, int value, u64 size) {
  u32 site = site_of(__builtin_return_address(0));
  for (u64 i = 0; i < size; ++i) {
    check(to + i, 1, writes, site);
    to[i] = u8(value);
  }
  return to;
}

void* __tsan_memmove(u8* to, const u8* from, u64 size) {
  u32 site = site_of(__builtin_return_address(0));
  for (u64 i = 0; i < size; ++i) {
    u64 at = to < from ? i : size - 1 - i;
    check(from + at, 1, reads, site);
    check(to + at, 1, writes, site);
    to[at] = from[at];
  }
  return to;
}

void __ubsan_handle_type_mismatch_v1(const Place* place, void*) {
  emulator_fail(misaligned, place->line, "a pointer is not aligned as its type needs");
}
void __ubsan_handle_out_of_bounds(const Place* place, u64) {
  emulator_fail(out_of_bounds, place->line, "an index outside the array");
}
void __ubsan_handle_add_overflow(const Place* place, u64, u64) {
  emulator_fail(undefined_behaviour, place->line, "a signed sum overflows");
}
void __ubsan_handle_sub_overflow(const Place* place, u64, u64) {
  emulator_fail(undefined_behaviour, place->line, "a signed difference overflows");
}
void __ubsan_handle_mul_overflow(const Place* place, u64, u64) {
  emulator_fail(undefined_behaviour, place->line, "a signed product overflows");
}
void __ubsan_handle_negate_overflow(const Place* place, u64) {
  emulator_fail(undefined_behaviour, place->line, "a negation overflows");
}
void __ubsan_handle_divrem_overflow(const Place* place, u64, u64) {
  emulator_fail(undefined_behaviour, place->line, "a division by zero or one that overflows");
}
void __ubsan_handle_shift_out_of_bounds(const Place* place, u64, u64) {
  emulator_fail(undefined_behaviour, place->line, "a shift by more bits than the type has");
}
}
