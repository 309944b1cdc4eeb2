// What MLX puts before a custom kernel's header: names from its utils.h that kernels use.
#pragma once

#include "atomics.h"
#include "matrix.h"

using namespace metal;

template <typename T>
struct Limits {
  static constexpr bool floating = metal::is_floating_point_v<T>;
  static constexpr T infinite(bool negative) {
    if constexpr (floating) {
      return negative ? T(-metal::numeric_limits<T>::infinity()) : metal::numeric_limits<T>::infinity();
    } else {
      return negative ? metal::numeric_limits<T>::lowest() : metal::numeric_limits<T>::max();
    }
  }
  static constexpr constant T max = infinite(false);
  static constexpr constant T min = infinite(true);
  static constexpr constant T finite_max = metal::numeric_limits<T>::max();
  static constexpr constant T finite_min = metal::numeric_limits<T>::lowest();
};

struct complex64_t {
  float real, imag;
  complex64_t() = default;
  constexpr complex64_t(float r, float i = 0.0f) : real(r), imag(i) {}
};
constexpr complex64_t operator+(complex64_t a, complex64_t b) { return {a.real + b.real, a.imag + b.imag}; }
constexpr complex64_t operator-(complex64_t a, complex64_t b) { return {a.real - b.real, a.imag - b.imag}; }
constexpr complex64_t operator*(complex64_t a, complex64_t b) {
  return {a.real * b.real - a.imag * b.imag, a.real * b.imag + a.imag * b.real};
}
constexpr bool operator==(complex64_t a, complex64_t b) { return a.real == b.real && a.imag == b.imag; }

template <typename I = int64_t>
inline I elem_to_loc(I element, constant const int* shape, constant const int64_t* strides, int ndim) {
  I location = 0;
  for (int d = ndim - 1; d >= 0; --d) {
    location += I(element % shape[d]) * I(strides[d]);
    element /= shape[d];
  }
  return location;
}

template <typename T, typename U>
inline T ceildiv(T n, U m) {
  return (n + m - 1) / m;
}

inline float log1p(float x) { return __builtin_log1pf(x); }
inline bfloat16_t log1p(bfloat16_t x) { return bfloat16_t(__builtin_log1pf(float(x))); }

inline uint16_t bfloat16_to_uint16(bfloat16_t x) { return as_type<uint16_t>(x); }
inline bfloat16_t uint16_to_bfloat16(uint16_t x) { return as_type<bfloat16_t>(x); }

#if defined(EMULATOR_SYNTAX_ONLY)
#define double metal_has_no_double
#endif
