// Runs a grid on one OS thread: threadgroups one after the other, each GPU thread a fiber.
//
// Lanes of a SIMD group hand over in a ring: a lane that arrives at an operation lets the next one run, and the last to
// arrive goes straight on. A lane is therefore at most one operation ahead, so two sets of slots are enough.
// SIMD groups hand over in the same way at threadgroup barriers.
#include "context.h"
#include "machine.h"

using namespace emulator;

Machine emulator::machine;

namespace {

u32 random_state;

u32 random_below(u32 bound) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 17;
  random_state ^= random_state << 5;
  return random_state % bound;
}

// The order in which 0..count-1 run: forward, reverse or shuffled.
void fill_order(u32* order, u32 count) {
  for (u32 i = 0; i < count; ++i) order[i] = machine.launch->order == 1 ? count - 1 - i : i;
  if (machine.launch->order != 2) return;
  for (u32 i = count; i > 1; --i) {
    u32 j = random_below(i);
    u32 held = order[i - 1];
    order[i - 1] = order[j];
    order[j] = held;
  }
}

void resume(Thread* next) {
  Thread* previous = machine.current;
  if (next == previous) return;
  machine.current = next;
  emulator_switch(&previous->stack_pointer, next->stack_pointer);
}

Thread* following(Simdgroup* simdgroup, u32 lane) {
  u32 place = (simdgroup->place[lane] + 1) % simdgroup->count;
  return &machine.threads[simdgroup->first + simdgroup->ring[place]];
}

Thread* following_simdgroup(u32 index) {
  Group& group = machine.group;
  u32 place = (group.place[index] + 1) % group.simdgroup_count;
  return machine.simdgroups[group.ring[place]].resume;
}

void finish_thread() {
  Thread* thread = machine.current;
  Simdgroup* simdgroup = thread->simdgroup;
  if (simdgroup->arrived)
    emulator_fail(divergence, simdgroup->line, "a lane returned while others of its SIMD group wait here");
  emulator_check_pause();
  if (++simdgroup->finished < simdgroup->count) return resume(following(simdgroup, thread->lane));
  Group& group = machine.group;
  if (group.arrived)
    emulator_fail(divergence, group.line, "a SIMD group returned while others of its threadgroup wait here");
  if (++group.finished < group.simdgroup_count) return resume(following_simdgroup(simdgroup->index));
  emulator_stop();
}

void run_thread() {
  emulator_kernel(machine.launch->arguments);
  finish_thread();
  __builtin_unreachable();
}

void meet_group(Simdgroup* simdgroup, u32 memory_flags, u32 line) {
  Group& group = machine.group;
  if (group.finished) emulator_fail(divergence, line, "a barrier that SIMD groups which returned never reach");
  if (group.arrived == 0) group.line = line;
  if (group.line != line) emulator_fail(divergence, line, "SIMD groups of a threadgroup wait at different barriers");
  if (++group.arrived < group.simdgroup_count) {
    simdgroup->resume = machine.current;
    return resume(following_simdgroup(simdgroup->index));
  }
  group.arrived = 0;
  for (u32 memory = 0; memory < 2; ++memory)
    if (memory_flags & (1u << memory)) ++group.epochs[memory];
}

void start_group(Triple position) {
  Launch& launch = *machine.launch;
  Group& group = machine.group;
  group.position = position;
  u32 start[3] = {position.x * launch.group_size[0], position.y * launch.group_size[1],
                  position.z * launch.group_size[2]};
  u32 size[3];
  for (int d = 0; d < 3; ++d) {
    u32 left = launch.grid[d] - start[d];
    size[d] = left < launch.group_size[d] ? left : launch.group_size[d];
  }
  group.size = {size[0], size[1], size[2]};
  group.thread_count = size[0] * size[1] * size[2];
  group.simdgroup_count = (group.thread_count + max_lanes - 1) / max_lanes;
  group.arrived = group.finished = 0;
  group.threadgroup_used = 0;
  for (bool& known : group.variable_known) known = false;
  fill_order(group.ring, group.simdgroup_count);
  for (u32 s = 0; s < group.simdgroup_count; ++s) {
    Simdgroup& simdgroup = machine.simdgroups[s];
    group.place[group.ring[s]] = s;
    simdgroup.index = s;
    simdgroup.first = s * max_lanes;
    u32 left = group.thread_count - simdgroup.first;
    simdgroup.count = left < max_lanes ? left : max_lanes;
    simdgroup.arrived = simdgroup.finished = 0;
    simdgroup.reduced[0] = simdgroup.reduced[1] = false;
    fill_order(simdgroup.ring, simdgroup.count);
    for (u32 i = 0; i < simdgroup.count; ++i) simdgroup.place[simdgroup.ring[i]] = i;
    simdgroup.resume = &machine.threads[simdgroup.first + simdgroup.ring[0]];
  }
  for (u32 t = 0; t < group.thread_count; ++t) {
    Thread& thread = machine.threads[t];
    thread.simdgroup = &machine.simdgroups[t / max_lanes];
    thread.index = t;
    thread.lane = t % max_lanes;
    thread.operations = 0;
    thread.position = {t % size[0], t / size[0] % size[1], t / (size[0] * size[1])};
    thread.stack_pointer = fresh_stack(launch.stacks + u64(t) * launch.stack_bytes, launch.stack_bytes, run_thread);
  }
  emulator_check_group_start();
}

}  // namespace

namespace emulator {
extern "C" {

void emulator_meet(u32 meeting, u32 memory_flags, u32 line) {
  Thread* thread = machine.current;
  Simdgroup* simdgroup = thread->simdgroup;
  emulator_check_pause();
  if (simdgroup->finished) emulator_fail(divergence, line, "lanes of this SIMD group that returned never come here");
  if (simdgroup->arrived == 0) {
    simdgroup->line = line;
    simdgroup->kind = meeting;
  } else if (simdgroup->line != line || simdgroup->kind != meeting) {
    machine.launch->failure.other_line = simdgroup->line;
    emulator_fail(divergence, line, "lanes of one SIMD group are at different operations");
  }
  ++thread->operations;
  if (++simdgroup->arrived < simdgroup->count) return resume(following(simdgroup, thread->lane));
  simdgroup->arrived = 0;
  simdgroup->reduced[(thread->operations + 1) & 1] = false;
  for (u32 memory = 0; memory < 2; ++memory)
    if (memory_flags & (1u << memory)) ++simdgroup->epochs[memory];
  if (meeting == group_barrier) meet_group(simdgroup, memory_flags, line);
}

void* emulator_threadgroup_variable(u32 id, u64 size, u64 alignment, u32 line) {
  Group& group = machine.group;
  if (!group.variable_known[id]) {
    u64 offset = (group.threadgroup_used + alignment - 1) / alignment * alignment;
    group.threadgroup_used = offset + size;
    group.variable_offset[id] = offset;
    group.variable_known[id] = true;
    if (group.threadgroup_used > threadgroup_memory_limit)
      emulator_fail(threadgroup_memory, line, "a threadgroup has 32768 bytes of memory, this variable exceeds it");
  }
  return machine.launch->threadgroup_memory + group.variable_offset[id];
}

void emulator_record(u32 kind, u32 line, const char* text) {
  Failure& failure = machine.launch->failure;
  Thread* thread = machine.current;
  failure.kind = kind;
  failure.line = line;
  u32 i = 0;
  for (; text[i] && i + 1 < sizeof failure.text; ++i) failure.text[i] = text[i];
  failure.text[i] = 0;
  failure.group[0] = machine.group.position.x;
  failure.group[1] = machine.group.position.y;
  failure.group[2] = machine.group.position.z;
  if (thread) {
    failure.has_thread = 1;
    failure.thread[0] = thread->position.x;
    failure.thread[1] = thread->position.y;
    failure.thread[2] = thread->position.z;
  }
}

void emulator_fail(u32 kind, u32 line, const char* text) {
  emulator_record(kind, line, text);
  emulator_stop();
}

void emulator_stop() {
  void* abandoned;
  emulator_switch(&abandoned, machine.scheduler_stack_pointer);
  __builtin_unreachable();
}

__attribute__((visibility("default"))) void emulator_launch(Launch* launch) {
  machine.launch = launch;
  random_state = launch->seed | 1;
  u32 groups[3];
  for (int d = 0; d < 3; ++d) groups[d] = (launch->grid[d] + launch->group_size[d] - 1) / launch->group_size[d];
  machine.groups_per_grid = {groups[0], groups[1], groups[2]};
  machine.group.serial = 0;
  machine.current = nullptr;
  emulator_check_launch_start();
  u32 count = groups[0] * groups[1] * groups[2];
  u32 stride = 1;
  if (launch->order == 2 && count > 2) {
    // A stride coprime to the count visits every group once without a table.
    auto divisor = [](u32 a, u32 b) {
      while (b) {
        u32 rest = a % b;
        a = b;
        b = rest;
      }
      return a;
    };
    do stride = 1 + random_below(count - 1);
    while (divisor(stride, count) != 1);
  }
  for (u32 i = 0; i < count && !launch->failure.kind; ++i) {
    u32 g = launch->order == 1 ? count - 1 - i : u32(u64(i) * stride % count);
    ++machine.group.serial;
    start_group({g % groups[0], g / groups[0] % groups[1], g / (groups[0] * groups[1])});
    machine.current = machine.simdgroups[machine.group.ring[0]].resume;
    emulator_switch(&machine.scheduler_stack_pointer, machine.current->stack_pointer);
    machine.current = nullptr;
  }
  if (!launch->failure.kind) emulator_check_launch_end();
  emulator_check_cleanup();
}
}
}  // namespace emulator
