// The rounding of float to bfloat16 that clang calls on processors without an instruction for it.
extern "C" __attribute__((weak, visibility("hidden"))) __bf16 __truncsfbf2(float value) {
  unsigned bits = __builtin_bit_cast(unsigned, value);
  bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  unsigned rounded = is_nan ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1);
  return __builtin_bit_cast(__bf16, (unsigned short)(rounded >> 16));
}
