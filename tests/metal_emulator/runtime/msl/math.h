// Arithmetic on scalars and vectors. half and bfloat are computed in float and rounded once.
#pragma once

#include "limits.h"

namespace metal {
// The type of a mixed call: as C++ promotes, except that equal types stay as they are.
template <typename A, typename B>
struct common {
  using type = decltype(A() + B());
};
template <typename A>
struct common<A, A> {
  using type = A;
};
template <typename A, typename B>
using common_t = typename common<remove_cv_t<A>, remove_cv_t<B>>::type;

// The scalar or element-wise result of `function`; a scalar argument beside a vector is repeated.
template <typename T>
inline auto lane_of(T value, int i) {
  if constexpr (size_of_vector<T> == 1) {
    return value;
  } else {
    return element_t<T>(value[i]);
  }
}
template <typename V, typename F, typename... A>
inline V elementwise(F function, A... values) {
  if constexpr (size_of_vector<V> == 1) {
    return V(function(values...));
  } else {
    V out = {};
    for (int i = 0; i < size_of_vector<V>; ++i) out[i] = element_t<V>(function(lane_of(values, i)...));
    return out;
  }
}

// Metal overloads these for each type, so that arguments of two scalar types are ambiguous there.
#if defined(EMULATOR_SYNTAX_ONLY)
template <typename A, typename B>
constexpr bool one_type = is_same_v<remove_cv_t<A>, remove_cv_t<B>> || size_of_vector<A> != size_of_vector<B>;
#define EMULATOR_ONE_TYPE(A, B) static_assert(one_type<A, B>, "ambiguous in Metal: the arguments differ in type");
#else
#define EMULATOR_ONE_TYPE(A, B)
#endif

#define EMULATOR_FLOAT_FUNCTION(name, builtin)                                     \
  template <typename T, typename = enable_if_t<is_floating_point_v<element_t<T>>>> \
  inline T name(T x) {                                                             \
    return elementwise<T>([](auto e) { return builtin(float(e)); }, x);            \
  }
#define EMULATOR_FLOAT_FUNCTION_2(name, builtin)                                                          \
  template <typename A, typename B>                                                                       \
  inline common_t<A, B> name(A x, B y) {                                                                  \
    EMULATOR_ONE_TYPE(A, B)                                                                               \
    return elementwise<common_t<A, B>>([](auto a, auto b) { return builtin(float(a), float(b)); }, x, y); \
  }

namespace emulated {
inline float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
inline float fract(float x) { return __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f); }
inline float exp10(float x) { return __builtin_powf(10.0f, x); }
inline float cospi(float x) { return __builtin_cosf(M_PI_F * x); }
inline float sinpi(float x) { return __builtin_sinf(M_PI_F * x); }
inline float divide(float x, float y) { return x / y; }
inline float sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : x == 0 ? x : 0.0f; }
}  // namespace emulated

#define EMULATOR_MATH                                \
  EMULATOR_FLOAT_FUNCTION(exp, __builtin_expf)       \
  EMULATOR_FLOAT_FUNCTION(exp2, __builtin_exp2f)     \
  EMULATOR_FLOAT_FUNCTION(exp10, emulated::exp10)    \
  EMULATOR_FLOAT_FUNCTION(log, __builtin_logf)       \
  EMULATOR_FLOAT_FUNCTION(log2, __builtin_log2f)     \
  EMULATOR_FLOAT_FUNCTION(log10, __builtin_log10f)   \
  EMULATOR_FLOAT_FUNCTION(sqrt, __builtin_sqrtf)     \
  EMULATOR_FLOAT_FUNCTION(rsqrt, emulated::rsqrt)    \
  EMULATOR_FLOAT_FUNCTION(sin, __builtin_sinf)       \
  EMULATOR_FLOAT_FUNCTION(cos, __builtin_cosf)       \
  EMULATOR_FLOAT_FUNCTION(tan, __builtin_tanf)       \
  EMULATOR_FLOAT_FUNCTION(asin, __builtin_asinf)     \
  EMULATOR_FLOAT_FUNCTION(acos, __builtin_acosf)     \
  EMULATOR_FLOAT_FUNCTION(atan, __builtin_atanf)     \
  EMULATOR_FLOAT_FUNCTION(sinh, __builtin_sinhf)     \
  EMULATOR_FLOAT_FUNCTION(cosh, __builtin_coshf)     \
  EMULATOR_FLOAT_FUNCTION(tanh, __builtin_tanhf)     \
  EMULATOR_FLOAT_FUNCTION(asinh, __builtin_asinhf)   \
  EMULATOR_FLOAT_FUNCTION(acosh, __builtin_acoshf)   \
  EMULATOR_FLOAT_FUNCTION(atanh, __builtin_atanhf)   \
  EMULATOR_FLOAT_FUNCTION(cospi, emulated::cospi)    \
  EMULATOR_FLOAT_FUNCTION(sinpi, emulated::sinpi)    \
  EMULATOR_FLOAT_FUNCTION(ceil, __builtin_ceilf)     \
  EMULATOR_FLOAT_FUNCTION(floor, __builtin_floorf)   \
  EMULATOR_FLOAT_FUNCTION(trunc, __builtin_truncf)   \
  EMULATOR_FLOAT_FUNCTION(round, __builtin_roundf)   \
  EMULATOR_FLOAT_FUNCTION(rint, __builtin_rintf)     \
  EMULATOR_FLOAT_FUNCTION(fract, emulated::fract)    \
  EMULATOR_FLOAT_FUNCTION_2(pow, __builtin_powf)     \
  EMULATOR_FLOAT_FUNCTION_2(powr, __builtin_powf)    \
  EMULATOR_FLOAT_FUNCTION_2(fmod, __builtin_fmodf)   \
  EMULATOR_FLOAT_FUNCTION_2(atan2, __builtin_atan2f) \
  EMULATOR_FLOAT_FUNCTION_2(divide, emulated::divide)

namespace precise {
EMULATOR_MATH
}
namespace fast {
EMULATOR_MATH
}
using namespace precise;

EMULATOR_FLOAT_FUNCTION(fabs, __builtin_fabsf)
EMULATOR_FLOAT_FUNCTION(sign, emulated::sign)
EMULATOR_FLOAT_FUNCTION_2(fmin, __builtin_fminf)
EMULATOR_FLOAT_FUNCTION_2(fmax, __builtin_fmaxf)
EMULATOR_FLOAT_FUNCTION_2(copysign, __builtin_copysignf)
EMULATOR_FLOAT_FUNCTION_2(fdim, __builtin_fdimf)

template <typename T>
inline T abs(T x) {
  return elementwise<T>([](auto e) { return e < decltype(e)(0) ? -e : e; }, x);
}
template <typename T>
inline T fma(T a, T b, T c) {
  return elementwise<T>([](auto x, auto y, auto z) { return __builtin_fmaf(float(x), float(y), float(z)); }, a, b, c);
}
template <typename T>
inline T ldexp(T x, int e) {
  return T(__builtin_ldexpf(float(x), e));
}

template <typename A, typename B>
inline common_t<A, B> min(A a, B b) {
  EMULATOR_ONE_TYPE(A, B)
  using T = common_t<A, B>;
  if constexpr (is_floating_point_v<element_t<T>>) {
    return fmin(a, b);
  } else {
    return elementwise<T>(
        [](auto x, auto y) { return element_t<T>(y) < element_t<T>(x) ? element_t<T>(y) : element_t<T>(x); }, a, b);
  }
}
template <typename A, typename B>
inline common_t<A, B> max(A a, B b) {
  EMULATOR_ONE_TYPE(A, B)
  using T = common_t<A, B>;
  if constexpr (is_floating_point_v<element_t<T>>) {
    return fmax(a, b);
  } else {
    return elementwise<T>(
        [](auto x, auto y) { return element_t<T>(x) < element_t<T>(y) ? element_t<T>(y) : element_t<T>(x); }, a, b);
  }
}
template <typename T>
inline T min3(T a, T b, T c) {
  return min(a, min(b, c));
}
template <typename T>
inline T max3(T a, T b, T c) {
  return max(a, max(b, c));
}
template <typename A, typename B, typename C>
inline common_t<A, common_t<B, C>> clamp(A x, B low, C high) {
  return min(max(x, low), high);
}
template <typename T>
inline T saturate(T x) {
  return clamp(x, element_t<T>(0), element_t<T>(1));
}
template <typename T, typename U>
inline T mix(T a, T b, U t) {
  return a + (b - a) * t;
}

template <typename T>
inline element_t<T> dot(T a, T b) {
  element_t<T> sum = element_t<T>(0);
  for (int i = 0; i < size_of_vector<T>; ++i) sum = element_t<T>(sum + element_t<T>(a[i] * b[i]));
  return sum;
}
template <typename T>
inline element_t<T> length(T a) {
  return sqrt(dot(a, a));
}

template <typename T>
using truth = conditional_t<size_of_vector<T> == 1, bool, vec<int, size_of_vector<T> == 1 ? 2 : size_of_vector<T>>>;
template <typename T>
inline truth<T> isnan(T x) {
  return elementwise<truth<T>>([](auto e) { return bool(__builtin_isnan(float(e))); }, x);
}
template <typename T>
inline truth<T> isinf(T x) {
  return elementwise<truth<T>>([](auto e) { return bool(__builtin_isinf(float(e))); }, x);
}
template <typename T>
inline truth<T> isfinite(T x) {
  return elementwise<truth<T>>([](auto e) { return bool(__builtin_isfinite(float(e))); }, x);
}
template <typename T>
inline truth<T> signbit(T x) {
  return elementwise<truth<T>>([](auto e) { return bool(__builtin_signbit(float(e))); }, x);
}
template <typename T, typename C>
inline T select(T otherwise, T chosen, C condition) {
  return elementwise<T>([](auto a, auto b, auto c) { return c ? b : a; }, otherwise, chosen, condition);
}
template <typename T>
inline bool any(T x) {
  bool found = false;
  for (int i = 0; i < size_of_vector<T>; ++i) found = found || lane_of(x, i);
  return found;
}
template <typename T>
inline bool all(T x) {
  bool every = true;
  for (int i = 0; i < size_of_vector<T>; ++i) every = every && lane_of(x, i);
  return every;
}

template <typename T>
inline T popcount(T x) {
  return T(__builtin_popcountll((unsigned long long)x & (~0ull >> (64 - 8 * sizeof(T)))));
}
template <typename T>
inline T clz(T x) {
  unsigned long long bits = (unsigned long long)x & (~0ull >> (64 - 8 * sizeof(T)));
  return bits ? T(__builtin_clzll(bits) - (64 - 8 * int(sizeof(T)))) : T(8 * sizeof(T));
}
template <typename T>
inline T ctz(T x) {
  return x ? T(__builtin_ctzll((unsigned long long)x)) : T(8 * sizeof(T));
}
template <typename T>
inline T reverse_bits(T x) {
  T out = 0;
  for (unsigned i = 0; i < 8 * sizeof(T); ++i) out |= T((x >> i) & 1) << (8 * sizeof(T) - 1 - i);
  return out;
}
template <typename T>
inline T extract_bits(T x, uint offset, uint bits) {
  return bits == 0 ? T(0) : T(T(x << (8 * sizeof(T) - bits - offset)) >> (8 * sizeof(T) - bits));
}
inline uint mulhi(uint a, uint b) { return uint((ulong(a) * ulong(b)) >> 32); }
inline int mulhi(int a, int b) { return int((long(a) * long(b)) >> 32); }
}  // namespace metal
