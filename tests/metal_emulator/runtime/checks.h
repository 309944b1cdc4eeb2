// The one function that all instrumented accesses call.
#pragma once

#include "machine.h"

namespace emulator {
u32 line_of(u32 site);
u32 site_of(const void* address);
void check(const void* address, u64 size, u32 access_kind, u32 site);
void check_aligned(const void* address, u64 size, u32 access_kind, u32 site);
}  // namespace emulator
