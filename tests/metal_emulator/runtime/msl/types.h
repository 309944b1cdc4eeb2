// Scalar and vector types of the Metal Shading Language, on clang's extended vectors.
#pragma once

#if defined(EMULATOR_SYNTAX_ONLY)
#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#elif defined(EMULATOR_REGISTERS)  // as the GPU that registers are counted on numbers them
#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(4)))
#define threadgroup __attribute__((address_space(3)))
#else
#define device
#define constant const
#define threadgroup
#endif
#define thread
#define kernel
#define METAL_FUNC inline __attribute__((always_inline))
#define METAL_CONST static constexpr constant

// Runtime calls made inside are the check; their own loads and stores are not the kernel's.
#if defined(EMULATOR_CHECKED)
#define EMULATOR_PLAIN __attribute__((no_sanitize("thread", "alignment", "bounds", "signed-integer-overflow")))
#else
#define EMULATOR_PLAIN
#endif

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef _Float16 half;
typedef __bf16 bfloat;
typedef half float16_t;
typedef bfloat bfloat16_t;

template <typename T, int N>
using vec = T __attribute__((ext_vector_type(N)));

// packed vectors have the alignment of their elements.
#define EMULATOR_VECTORS(T)                                                        \
  typedef vec<T, 2> T##2;                                                          \
  typedef vec<T, 3> T##3;                                                          \
  typedef vec<T, 4> T##4;                                                          \
  typedef T packed_##T##2 __attribute__((ext_vector_type(2), aligned(sizeof(T)))); \
  typedef T packed_##T##4 __attribute__((ext_vector_type(4), aligned(sizeof(T)))); \
  namespace metal {                                                                \
  using ::packed_##T##2;                                                           \
  using ::packed_##T##4;                                                           \
  using ::T##2;                                                                    \
  using ::T##3;                                                                    \
  using ::T##4;                                                                    \
  }
EMULATOR_VECTORS(char)
EMULATOR_VECTORS(uchar)
EMULATOR_VECTORS(short)
EMULATOR_VECTORS(ushort)
EMULATOR_VECTORS(int)
EMULATOR_VECTORS(uint)
EMULATOR_VECTORS(long)
EMULATOR_VECTORS(ulong)
EMULATOR_VECTORS(half)
EMULATOR_VECTORS(bfloat)
EMULATOR_VECTORS(float)
#undef EMULATOR_VECTORS
typedef vec<bool, 2> bool2;
typedef vec<bool, 3> bool3;
typedef vec<bool, 4> bool4;

namespace metal {
using ::bfloat;
using ::half;
using ::uchar;
using ::uint;
using ::ulong;
using ::ushort;
using ::vec;

template <bool C, typename A, typename B>
struct conditional {
  using type = A;
};
template <typename A, typename B>
struct conditional<false, A, B> {
  using type = B;
};
template <bool C, typename A, typename B>
using conditional_t = typename conditional<C, A, B>::type;

template <bool C, typename T = void>
struct enable_if {};
template <typename T>
struct enable_if<true, T> {
  using type = T;
};
template <bool C, typename T = void>
using enable_if_t = typename enable_if<C, T>::type;

template <typename T, T V>
struct integral_constant {
  static constexpr T value = V;
  using value_type = T;
  constexpr operator T() const { return V; }
};
using true_type = integral_constant<bool, true>;
using false_type = integral_constant<bool, false>;

template <typename A, typename B>
struct is_same : integral_constant<bool, __is_same(A, B)> {};
template <typename A, typename B>
constexpr bool is_same_v = __is_same(A, B);

template <typename T>
using remove_cv_t = __remove_cv(T);
template <typename T>
using remove_reference_t = __remove_reference_t(T);
template <typename T>
using remove_pointer_t = __remove_pointer(T);
template <typename T>
struct remove_cv {
  using type = __remove_cv(T);
};

template <typename T>
constexpr bool is_floating_point_v =
    is_same_v<remove_cv_t<T>, float> || is_same_v<remove_cv_t<T>, half> || is_same_v<remove_cv_t<T>, bfloat>;
template <typename T>
constexpr bool is_integral_v = __is_integral(T);
template <typename T>
struct is_floating_point : integral_constant<bool, is_floating_point_v<T>> {};
template <typename T>
struct is_integral : integral_constant<bool, is_integral_v<T>> {};
template <typename T>
constexpr bool is_unsigned_v = __is_unsigned(T);
template <typename T>
constexpr bool is_signed_v = __is_signed(T);

template <typename T>
struct vector_traits {
  using element = T;
  static constexpr int size = 1;
};
template <typename T, int N>
struct vector_traits<T __attribute__((ext_vector_type(N)))> {
  using element = T;
  static constexpr int size = N;
};
template <typename T>
using element_t = typename vector_traits<remove_cv_t<T>>::element;
template <typename T>
constexpr int size_of_vector = vector_traits<remove_cv_t<T>>::size;

template <typename To, typename From>
inline To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of one size");
  return __builtin_bit_cast(To, value);
}
}  // namespace metal
using metal::as_type;

namespace emulator {
template <typename V, typename A>
inline void append(V& out, int& at, A value) {
  using E = metal::element_t<V>;
  if constexpr (metal::size_of_vector<A> == 1) {
    out[at++] = static_cast<E>(value);
  } else {
    for (int i = 0; i < metal::size_of_vector<A>; ++i) out[at++] = static_cast<E>(value[i]);
  }
}

// Stands for a constructor call, vec<T, N>(...), which extended vectors lack.
template <typename V, typename... A>
inline V construct(A... values) {
  using E = metal::element_t<V>;
  if constexpr (metal::size_of_vector<V> == 1) {
    return V(values...);
  } else {
    constexpr int given = (metal::size_of_vector<A> + ... + 0);
    V out = {};
    if constexpr (sizeof...(A) == 1 && given == 1) {
      for (int i = 0; i < metal::size_of_vector<V>; ++i) out[i] = (static_cast<E>(values), ...);
    } else {
      static_assert(given == metal::size_of_vector<V> || given == 0, "a vector is built from as many elements");
      int at = 0;
      (append(out, at, values), ...);
    }
    return out;
  }
}
}  // namespace emulator
