// What the checked mode remembers of each element: who wrote and read it last, and when.
#pragma once

#include "machine.h"

namespace emulator {

// A place in the kernel: a source line (marked by the top bit), or code, as its distance from emulator_kernel.
using Site = u32;
constexpr Site line_mark = 0x80000000u;
u32 line_of(Site site);

enum ReadScope : u8 { nobody = 0, one_thread, one_simdgroup, several_simdgroups };

struct Cell {
  u32 written_group;
  u32 written_epoch;
  u32 written_simd_epoch;
  Site written_site;
  u32 read_group;
  u32 read_epoch;
  u32 read_simd_epoch;
  Site read_site;
  u16 writer;
  u16 reader;
  ReadScope read_scope;
  bool written_atomically;
  bool read_by_several_groups;
};

// Where and by whom an access is made.
struct Moment {
  u32 group;
  u32 epoch;
  u32 simd_epoch;
  u16 thread;
  Site site;
  bool atomically;
};

enum Conflict : u32 { no_conflict, with_write, with_read };

inline bool same_simdgroup(u32 a, u32 b) { return a / max_lanes == b / max_lanes; }

// Whether barriers order an earlier write before this moment.
inline bool ordered_after_write(const Cell& cell, const Moment& now) {
  if (cell.written_group == 0) return true;
  if (cell.written_group != now.group) return false;
  if (cell.writer == now.thread || cell.written_epoch < now.epoch) return true;
  return same_simdgroup(cell.writer, now.thread) && cell.written_simd_epoch < now.simd_epoch;
}

inline bool ordered_after_reads(const Cell& cell, const Moment& now) {
  if (cell.read_scope == nobody) return true;
  if (cell.read_by_several_groups || cell.read_group != now.group) return false;
  if (cell.read_epoch < now.epoch) return true;
  if (cell.read_scope == several_simdgroups || !same_simdgroup(cell.reader, now.thread)) return false;
  if (cell.read_simd_epoch < now.simd_epoch) return true;
  return cell.read_scope == one_thread && cell.reader == now.thread;
}

inline void note_read(Cell& cell, const Moment& now) {
  ReadScope scope = one_thread;
  if (cell.read_scope != nobody && cell.read_group != now.group) {
    cell.read_by_several_groups = true;
  } else if (cell.read_scope != nobody && cell.read_epoch == now.epoch) {
    if (cell.read_scope == several_simdgroups || !same_simdgroup(cell.reader, now.thread))
      scope = several_simdgroups;
    else if (cell.read_simd_epoch == now.simd_epoch && (cell.reader != now.thread || cell.read_scope == one_simdgroup))
      scope = one_simdgroup;
  }
  cell.read_group = now.group;
  cell.read_epoch = now.epoch;
  cell.read_simd_epoch = now.simd_epoch;
  cell.read_site = now.site;
  cell.reader = now.thread;
  cell.read_scope = scope;
}

inline void note_write(Cell& cell, const Moment& now) {
  cell.written_group = now.group;
  cell.written_epoch = now.epoch;
  cell.written_simd_epoch = now.simd_epoch;
  cell.written_site = now.site;
  cell.writer = now.thread;
  cell.written_atomically = now.atomically;
}

inline Conflict conflict_of_read(const Cell& cell, const Moment& now) {
  if (now.atomically && cell.written_atomically) return no_conflict;
  return ordered_after_write(cell, now) ? no_conflict : with_write;
}

inline Conflict conflict_of_write(const Cell& cell, const Moment& now) {
  if (!ordered_after_reads(cell, now)) return with_read;
  return conflict_of_read(cell, now);
}

}  // namespace emulator
