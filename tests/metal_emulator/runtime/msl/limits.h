// numeric_limits and the named constants.
#pragma once

#include "types.h"

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define HALF_MAX half(65504.0f)
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define M_PI_F 3.14159265358979323846f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.69314718055994530942f
#define M_SQRT2_F 1.41421356237309504880f
#define M_E_F 2.71828182845904523536f

namespace metal {
template <typename T>
struct numeric_limits {
  static constexpr bool is_integer = true;
  static constexpr bool has_infinity = false;
  static constexpr T max() { return T(-1) > T(0) ? T(-1) : T((((unsigned long)1) << (sizeof(T) * 8 - 1)) - 1); }
  static constexpr T min() { return T(-1) > T(0) ? T(0) : T(-max() - 1); }
  static constexpr T lowest() { return min(); }
};

template <>
struct numeric_limits<bool> {
  static constexpr bool is_integer = true;
  static constexpr bool max() { return true; }
  static constexpr bool min() { return false; }
  static constexpr bool lowest() { return false; }
};

#define EMULATOR_FLOAT_LIMITS(T, MAX, MIN, EPSILON, DIGITS)          \
  template <>                                                        \
  struct numeric_limits<T> {                                         \
    static constexpr bool is_integer = false;                        \
    static constexpr bool has_infinity = true;                       \
    static constexpr int digits = DIGITS;                            \
    static constexpr T max() { return T(MAX); }                      \
    static constexpr T min() { return T(MIN); }                      \
    static constexpr T lowest() { return T(-(MAX)); }                \
    static constexpr T epsilon() { return T(EPSILON); }              \
    static constexpr T infinity() { return T(__builtin_inff()); }    \
    static constexpr T quiet_NaN() { return T(__builtin_nanf("")); } \
  };
EMULATOR_FLOAT_LIMITS(float, FLT_MAX, FLT_MIN, FLT_EPSILON, 24)
EMULATOR_FLOAT_LIMITS(half, 65504.0f, 6.103515625e-05f, 9.765625e-04f, 11)
EMULATOR_FLOAT_LIMITS(bfloat, 3.38953139e+38f, FLT_MIN, 7.8125e-03f, 8)
#undef EMULATOR_FLOAT_LIMITS
}  // namespace metal
