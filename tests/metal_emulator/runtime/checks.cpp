// The checks of the checked mode: each load and store of a kernel comes here before it is made.
#include "checks.h"

#include "shadow.h"

extern "C" {
void* calloc(unsigned long count, unsigned long size);
void free(void* memory);
// Made by sites.py: pairs of (address after a call, source line), ended by a zero.
extern const emulator::u64 emulator_sites[];
}

namespace emulator {
namespace {

constexpr u32 in_threadgroup_memory = ~0u;
constexpr u64 line_bytes = 64;
constexpr u64 margin = 1 << 16;

struct Shadow {
  Cell* cells;
  u32* read_stamps;
  u32* write_stamps;
};

Shadow* shadows;
Cell* threadgroup_cells;

// A store by a thread to what another wrote without a barrier between: a fault if it changes the value.
struct Doubtful {
  u8* address;
  u64 size;
  u8 before[16];
  Site site;
  Site other;
  u32 buffer;
  i64 offset;
} doubtful;

u64 lines_of(const Buffer& buffer) {
  return ((u64)buffer.data % line_bytes + buffer.size + line_bytes - 1) / line_bytes;
}

void fail_at(u32 kind, Site site, u32 buffer, i64 offset, const char* text, Site other = 0) {
  Failure& failure = machine.launch->failure;
  failure.buffer = buffer;
  failure.offset = offset;
  if (other) failure.other_line = line_of(other);
  emulator_fail(kind, line_of(site), text);
}

void settle_doubtful() {
  if (!doubtful.address) return;
  u8* address = doubtful.address;
  doubtful.address = nullptr;
  for (u64 i = 0; i < doubtful.size; ++i)
    if (address[i] != doubtful.before[i])
      fail_at(double_write, doubtful.site, doubtful.buffer, doubtful.offset,
              "two threads write different values with no barrier between", doubtful.other);
}

void count_lines(Buffer& buffer, u32* stamps, const u8* address, u64 size, u64& per_group, u64& unique) {
  u64 first = (u64)buffer.data / line_bytes;
  for (u64 line = (u64)address / line_bytes; line <= ((u64)address + size - 1) / line_bytes; ++line) {
    u32& stamp = stamps[line - first];
    if (stamp == machine.group.serial) continue;
    if (stamp == 0) ++unique;
    ++per_group;
    stamp = machine.group.serial;
  }
}

// One cell's part of an access. `fresh` memory has no content until a thread writes it.
void visit(Cell& cell, bool fresh, const Moment& now, u32 access_kind, u32 buffer, i64 offset, u8* address, u64 size) {
  bool stores = access_kind & writes;
  if ((access_kind & reads) && fresh && cell.written_group == 0)
    fail_at(uninitialised, now.site, buffer, offset,
            "read before any thread wrote it: a barrier is missing, or nobody writes it");
  Conflict conflict = stores ? conflict_of_write(cell, now) : conflict_of_read(cell, now);
  if (conflict == with_read)
    fail_at(race, now.site, buffer, offset, "written while another thread may still read it", cell.read_site);
  if (conflict == with_write && !stores)
    fail_at(race, now.site, buffer, offset, "read while another thread may still write it", cell.written_site);
  if (conflict == with_write && (now.atomically || cell.written_atomically))
    fail_at(race, now.site, buffer, offset, "one thread writes atomically, another not", cell.written_site);
  if (conflict == with_write && !doubtful.address && size <= sizeof doubtful.before) {
    doubtful = {address, size, {}, now.site, cell.written_site, buffer, offset};
    for (u64 i = 0; i < size; ++i) doubtful.before[i] = address[i];
  }
  if (stores)
    note_write(cell, now);
  else if (!now.atomically)
    note_read(cell, now);
}

Moment moment_in(u32 memory, Site site, u32 access_kind) {
  Thread* thread = machine.current;
  return {machine.group.serial,
          u32(machine.group.epochs[memory]),
          u32(thread->simdgroup->epochs[memory]),
          u16(thread->index),
          site,
          bool(access_kind & in_one_step)};
}

void check_threadgroup(u8* address, u64 size, u32 access_kind, Site site) {
  i64 offset = address - machine.launch->threadgroup_memory;
  if (u64(offset) + size > machine.group.threadgroup_used)
    fail_at(out_of_bounds, site, in_threadgroup_memory, offset, "an address past all threadgroup variables");
  Moment now = moment_in(threadgroup_space, site, access_kind);
  for (u64 i = 0; i < size; ++i) {
    Cell& cell = threadgroup_cells[offset + i];
    if (cell.written_group != now.group) cell.written_group = 0;
    if (cell.read_group != now.group) cell.read_scope = nobody;
    visit(cell, true, now, access_kind, in_threadgroup_memory, offset + i, address, size);
  }
}

void check_buffer(u32 index, u8* address, u64 size, u32 access_kind, Site site) {
  Buffer& buffer = machine.launch->buffers[index];
  Shadow& shadow = shadows[index];
  u64 offset = address - buffer.data;
  if (offset + size > buffer.size)
    fail_at(out_of_bounds, site, index + 1, offset, "an access that starts inside a buffer ends outside");
  if ((access_kind & writes) && !(buffer.flags & writable))
    fail_at(write_to_input, site, index + 1, offset, "an input is written");
  if (access_kind & reads)
    count_lines(buffer, shadow.read_stamps, address, size, buffer.read_lines, buffer.unique_read_lines);
  if (access_kind & writes)
    count_lines(buffer, shadow.write_stamps, address, size, buffer.written_lines, buffer.unique_written_lines);
  if (!shadow.cells) return;
  Moment now = moment_in(device_memory, site, access_kind);
  for (u64 i = offset / buffer.granularity; i <= (offset + size - 1) / buffer.granularity; ++i)
    visit(shadow.cells[i], !(buffer.flags & initialised), now, access_kind, index + 1, i * buffer.granularity, address,
          size);
}

void fail_outside(const u8* address, Site site) {
  const Launch& launch = *machine.launch;
  for (u32 i = 0; i < launch.buffer_count; ++i) {
    const Buffer& buffer = launch.buffers[i];
    if (address + margin >= buffer.data && address < buffer.data + buffer.size + margin)
      fail_at(out_of_bounds, site, i + 1, address - buffer.data, "an address outside the buffer");
  }
  fail_at(out_of_bounds, site, 0, 0, "an address far from every buffer and threadgroup variable");
}

}  // namespace

u32 line_of(Site site) {
  if (site & line_mark) return site & ~line_mark;
  u64 address = (u64)(const void*)&emulator_kernel + (i64)(i32)(site << 1) / 2;
  for (const u64* entry = emulator_sites; entry[0]; entry += 2)
    if (entry[0] == address) return entry[1];
  return 0;
}

Site site_of(const void* address) { return u32((u64)address - (u64)(const void*)&emulator_kernel) & ~line_mark; }

void check(const void* where, u64 size, u32 access_kind, Site site) {
  settle_doubtful();
  Launch& launch = *machine.launch;
  Thread* thread = machine.current;
  if (!thread) return;
  u8* address = (u8*)where;
  u8* stack = launch.stacks + u64(thread->index) * launch.stack_bytes;
  if (u64(address - stack) < launch.stack_bytes) return;
  if (u64(address - launch.threadgroup_memory) < launch.threadgroup_bytes)
    return check_threadgroup(address, size, access_kind, site);
  for (u32 i = 0; i < launch.buffer_count; ++i)
    if (u64(address - launch.buffers[i].data) < launch.buffers[i].size)
      return check_buffer(i, address, size, access_kind, site);
  fail_outside(address, site);
}

// The kernel's own stack is aligned by the compiler for itself.
void check_aligned(const void* address, u64 size, u32 access_kind, Site site) {
  check(address, size, access_kind, site);
  bool on_stack = u64((u8*)address - machine.launch->stacks) < u64(max_threads) * machine.launch->stack_bytes;
  if ((u64)address % size && machine.current && !on_stack)
    fail_at(misaligned, site, 0, 0, "a pointer is not aligned as its type needs");
}

extern "C" {

void emulator_access(const void* address, u64 size, u32 access_kind, u32 line) {
  check(address, size, access_kind, line | line_mark);
}

void emulator_check_pause() { settle_doubtful(); }

// New threadgroup memory holds what hardware may leave there: anything.
void emulator_check_group_start() {
  for (u64 i = 0; i < threadgroup_memory_limit; ++i) machine.launch->threadgroup_memory[i] = 0xff;
}

void emulator_check_launch_start() {
  Launch& launch = *machine.launch;
  doubtful.address = nullptr;
  if (!threadgroup_cells) threadgroup_cells = (Cell*)calloc(threadgroup_memory_limit, sizeof(Cell));
  for (u64 i = 0; i < threadgroup_memory_limit; ++i)
    threadgroup_cells[i].written_group = threadgroup_cells[i].read_group = 0;
  shadows = (Shadow*)calloc(launch.buffer_count + 1, sizeof(Shadow));
  for (u32 i = 0; i < launch.buffer_count; ++i) {
    const Buffer& buffer = launch.buffers[i];
    shadows[i].read_stamps = (u32*)calloc(lines_of(buffer) + 1, sizeof(u32));
    shadows[i].write_stamps = (u32*)calloc(lines_of(buffer) + 1, sizeof(u32));
    if (buffer.flags & writable) shadows[i].cells = (Cell*)calloc(buffer.size / buffer.granularity + 1, sizeof(Cell));
  }
}

void emulator_check_launch_end() {
  Launch& launch = *machine.launch;
  for (u32 i = 0; i < launch.buffer_count; ++i) {
    const Buffer& buffer = launch.buffers[i];
    bool complete = !(buffer.flags & writable) || (buffer.flags & (initialised | may_stay_unwritten));
    for (u64 e = 0; !complete && !launch.failure.kind && e < buffer.size / buffer.granularity; ++e) {
      if (shadows[i].cells[e].written_group) continue;
      launch.failure.buffer = i + 1;
      launch.failure.offset = e * buffer.granularity;
      emulator_record(unwritten, 0, "no thread writes this element of an output");
    }
  }
}

void emulator_check_cleanup() {
  for (u32 i = 0; i < machine.launch->buffer_count; ++i) {
    free(shadows[i].read_stamps);
    free(shadows[i].write_stamps);
    free(shadows[i].cells);
  }
  free(shadows);
}
}
}  // namespace emulator
