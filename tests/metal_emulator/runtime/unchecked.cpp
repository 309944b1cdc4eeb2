// The checks of the quick mode: none.
#include "machine.h"

namespace emulator {
extern "C" {
void emulator_access(const void*, u64, u32, u32) {}
void emulator_check_group_start() {}
void emulator_check_launch_start() {}
void emulator_check_launch_end() {}
void emulator_check_cleanup() {}
void emulator_check_pause() {}
}
}  // namespace emulator
