// Switching between fibers: callee-saved registers are pushed on the old stack and popped from the new one.
#pragma once

extern "C" void emulator_switch(void** save, void* load);

#if defined(__APPLE__)
#define EMULATOR_SYMBOL(name) "_" #name
#define EMULATOR_HIDDEN ".private_extern "
#else
#define EMULATOR_SYMBOL(name) #name
#define EMULATOR_HIDDEN ".hidden "
#endif

// clang-format off
#if defined(__x86_64__)
asm(".text\n.p2align 4\n.globl " EMULATOR_SYMBOL(emulator_switch) "\n"
    EMULATOR_HIDDEN EMULATOR_SYMBOL(emulator_switch) "\n"
    EMULATOR_SYMBOL(emulator_switch) ":\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  retq\n");
#elif defined(__aarch64__)
asm(".text\n.p2align 4\n.globl " EMULATOR_SYMBOL(emulator_switch) "\n"
    EMULATOR_HIDDEN EMULATOR_SYMBOL(emulator_switch) "\n"
    EMULATOR_SYMBOL(emulator_switch) ":\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n"
    "  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n  str x9, [x0]\n  mov sp, x1\n"
    "  ldp x19, x20, [sp]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n"
    "  ldp x25, x26, [sp, #48]\n  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n"
    "  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n  ret\n");
#else
#error "The Metal emulator switches fibers on x86-64 and arm64 only."
#endif
// clang-format on

// A stack on which emulator_switch starts `entry`, which must never return.
inline void* fresh_stack(unsigned char* bottom, unsigned long size, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(bottom + size);
#if defined(__x86_64__)
  // At entry the ABI wants rsp to be 8 past a multiple of 16, as after a call.
  void** pointer = top - 8;
  for (int i = 0; i < 6; ++i) pointer[i] = nullptr;
  pointer[6] = reinterpret_cast<void*>(entry);
  pointer[7] = nullptr;
#else
  void** pointer = top - 20;
  for (int i = 0; i < 20; ++i) pointer[i] = nullptr;
  pointer[11] = reinterpret_cast<void*>(entry);
#endif
  return pointer;
}
