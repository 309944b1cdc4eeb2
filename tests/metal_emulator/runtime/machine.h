// What the scheduler, the checks and the stand-in for metal_stdlib know of one launch.
#pragma once

namespace emulator {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

constexpr u32 max_lanes = 32;
constexpr u32 max_threads = 1024;
constexpr u32 max_threadgroup_variables = 64;
constexpr u64 threadgroup_memory_limit = 32768;
constexpr u64 slot_bytes = 64;

struct Triple {
  u32 x, y, z;
};

struct Simdgroup;

struct Thread {
  void* stack_pointer;
  Simdgroup* simdgroup;
  Triple position;
  u32 index;
  u32 lane;
  u32 operations;
};

struct Simdgroup {
  u32 index;
  u32 first;
  u32 count;
  u32 arrived;
  u32 finished;
  u32 line;
  u32 kind;
  u32 ring[max_lanes];
  u32 place[max_lanes];
  Thread* resume;
  u64 epochs[2];
  bool reduced[2];
  alignas(64) u8 slots[2][max_lanes * slot_bytes];
  alignas(64) u8 result[2][slot_bytes];
};

// Shared with launch.py, field for field.
struct Failure {
  u32 kind;
  u32 line;
  u32 other_line;
  // 1 + the index of a buffer, all ones for threadgroup memory, or 0.
  u32 buffer;
  u32 has_thread;
  u32 thread[3];
  u32 group[3];
  i64 offset;
  char text[200];
};

// Shared with launch.py, field for field.
struct Buffer {
  u8* data;
  u64 size;
  u32 granularity;
  u32 flags;
  u64 read_lines;
  u64 written_lines;
  u64 unique_read_lines;
  u64 unique_written_lines;
};

enum BufferFlags : u32 { writable = 1, initialised = 2, may_stay_unwritten = 4 };

// Shared with launch.py, field for field.
struct Launch {
  u32 grid[3];
  u32 group_size[3];
  u32 order;
  u32 seed;
  void** arguments;
  Buffer* buffers;
  u32 buffer_count;
  u32 stack_bytes;
  u8* stacks;
  u8* threadgroup_memory;
  u64 threadgroup_bytes;
  Failure failure;
};

enum FailureKind : u32 {
  none = 0,
  out_of_bounds,
  misaligned,
  race,
  double_write,
  divergence,
  uninitialised,
  write_to_input,
  unwritten,
  threadgroup_memory,
  undefined_behaviour,
};

enum Memory : u32 { device_memory = 0, threadgroup_space = 1 };
enum Access : u32 {
  reads = 1,
  writes = 2,
  in_one_step = 4,
  atomic_load = reads | in_one_step,
  atomic_store = writes | in_one_step,
  atomic_update = reads | writes | in_one_step,
};
enum Meeting : u32 { simd_operation = 0, simd_barrier = 1, group_barrier = 2 };

struct Group {
  u32 serial;
  u32 thread_count;
  u32 simdgroup_count;
  u32 arrived;
  u32 finished;
  u32 line;
  u32 ring[max_lanes];
  u32 place[max_lanes];
  Triple position;
  Triple size;
  u64 epochs[2];
  u64 variable_offset[max_threadgroup_variables];
  bool variable_known[max_threadgroup_variables];
  u64 threadgroup_used;
};

struct Machine {
  Launch* launch;
  Triple groups_per_grid;
  Group group;
  Thread threads[max_threads];
  Simdgroup simdgroups[max_lanes];
  Thread* current;
  void* scheduler_stack_pointer;
};

__attribute__((visibility("hidden"))) extern Machine machine;

extern "C" {
// The calling thread meets the others of its SIMD group (or threadgroup) at a source line; returns when all have come.
void emulator_meet(u32 meeting, u32 memory_flags, u32 line);

// The address of threadgroup variable `id`, the same for all threads of a group.
void* emulator_threadgroup_variable(u32 id, u64 size, u64 alignment, u32 line);

// Notes a failure at the current thread; emulator_fail also stops the launch.
void emulator_record(u32 kind, u32 line, const char* text);
[[noreturn]] void emulator_fail(u32 kind, u32 line, const char* text);
[[noreturn]] void emulator_stop();

// Tells the checks of an access made outside instrumented code. The unchecked runtime does nothing.
void emulator_access(const void* address, u64 size, u32 access, u32 line);
void emulator_check_group_start();
void emulator_check_launch_start();
void emulator_check_launch_end();
void emulator_check_cleanup();
void emulator_check_pause();

// The kernel, called once per thread.
void emulator_kernel(void** arguments);
}

}  // namespace emulator
