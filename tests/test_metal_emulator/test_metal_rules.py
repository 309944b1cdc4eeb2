"""What is C++ but not Metal is refused with its reason and its line; what only looks like it passes."""

import mlx.core as mx
import pytest

from tests.metal_emulator import KernelError
from tests.test_metal_emulator.kernels import run

I = "uint i = thread_position_in_grid.x;\n"  # noqa: E741
CALL = I + "out[i] = f(x[i]);"
SPACELESS = "pointer or reference without an address space"

# By what is wrong: the header, the source, the reason given and a piece of the line that is blamed.
BROKEN: dict[str, tuple[str, str, str, str]] = {
    "a pointer parameter": ("inline float f(float x, float* y = nullptr) { return x; }", CALL, SPACELESS, "float* y"),
    "a reference parameter": (
        "inline void g(float& y) { y = 1; }\ninline float f(float x) { g(x); return x; }",
        CALL,
        SPACELESS,
        "float& y",
    ),
    "a const reference parameter": (
        "inline float g(const float& y) { return y; }\ninline float f(float x) { return g(x); }",
        CALL,
        SPACELESS,
        "float& y",
    ),
    "a pointer to a template's type": (
        "template <typename T> float g(const T* x) { return *x; }\ninline float f(float x) { return g(&x); }",
        CALL,
        SPACELESS,
        "const T* x",
    ),
    "a pointer returned": (
        "inline float* g(thread float& x) { return &x; }\ninline float f(float x) { return *g(x); }",
        CALL,
        SPACELESS,
        "float* g",
    ),
    "a member": (
        "struct S { float* p; };\ninline float f(float x) { S s{&x}; return *s.p; }",
        CALL,
        SPACELESS,
        "float* p",
    ),
    "a local pointer": ("", I + "float y = x[i];\nfloat* p = &y;\nout[i] = *p;", SPACELESS, "float* p"),
    "a second declarator": (
        "",
        I + "float y = x[i];\nfloat a = y * y, *p = &y;\nout[i] = *p + a;",
        SPACELESS,
        "*p = &y",
    ),
    "the outer of two pointers": (
        "",
        I + "const device float* p = x + i;\nconst device float** q = &p;\nout[i] = **q;",
        SPACELESS,
        "** q",
    ),
    "a deduced reference": ("", I + "float y = x[i];\nauto& z = y;\nout[i] = z;", SPACELESS, "auto& z"),
    "a cast": ("", I + "float y = x[i];\nout[i] = *(float*)&y;", SPACELESS, "(float*)&y"),
    "a reinterpreted pointer": (
        "",
        I + "float y = x[i];\nout[i] = *reinterpret_cast<const float*>(&y);",
        SPACELESS,
        "<const float*>",
    ),
    "an alias": ("using P = float*;\ninline float f(float x) { P p = &x; return *p; }", CALL, SPACELESS, "float*"),
    "a lambda": ("", I + "auto f = [](float y) { return y; };\nout[i] = f(x[i]);", "lambda expressions", "[](float y)"),
    "if constexpr": (
        "template <int N> float f(float x) { if constexpr (N > 1) return x; return 0; }",
        I + "out[i] = f<2>(x[i]);",
        "constexpr if is a C++17 extension",
        "if constexpr",
    ),
    "a fold": ("template <typename... T> float f(T... x) { return (x + ...); }", CALL, "fold", "(x + ...)"),
    "an inline variable": ("inline constant constexpr float one = 1;", I + "out[i] = x[i] * one;", "C++17", "one = 1"),
    "a nested namespace": (
        "namespace a::b { inline float f(float x) { return x; } }",
        I + "out[i] = a::b::f(x[i]);",
        "C++17",
        "a::b",
    ),
    "recursion": ("inline float f(float x) { return x > 1 ? f(x - 1) : x; }", CALL, "recursion", "float f(float x)"),
    "recursion of two": (
        "inline float g(float x);\ninline float f(float x) { return g(x); }\n"
        "inline float g(float x) { return x > 1 ? f(x - 1) : x; }",
        CALL,
        "recursion",
        "float",
    ),
    "recursion of a method": (
        "struct S { float f(float x) const { return x > 1 ? f(x - 1) : x; } };",
        I + "out[i] = S{}.f(x[i]);",
        "recursion",
        "float f",
    ),
    "recursion of a template": (
        "template <typename T> T f(T x) { return x > 1 ? f(x - 1) : x; }",
        CALL,
        "recursion",
        "T f",
    ),
    "a virtual function": (
        "struct S { virtual float f(float x) const { return x; } };",
        I + "out[i] = S{}.f(x[i]);",
        "virtual functions",
        "virtual",
    ),
    "a function pointer": (
        "inline float g(float x) { return x; }\ninline float f(float x) { auto h = &g; return h(x); }",
        CALL,
        "function pointers",
        "auto h",
    ),
    "a function given to a template": (
        "inline float g(float x) { return x; }\ntemplate <typename F> float h(F g, float x) { return g(x); }\n"
        "inline float f(float x) { return h(g, x); }",
        CALL,
        "function pointers",
        "F g",
    ),
    "a static variable": (
        "inline float f(float x) { static int n = 2; return x * n; }",
        CALL,
        "static variables in functions",
        "static int n",
    ),
    "a static constant": (
        "inline float f(float x) { static constexpr int n = 2; return x * n; }",
        CALL,
        "static variables in functions",
        "n = 2",
    ),
    "a mutable global": (
        "int n;",
        I + "out[i] = x[i] * n;",
        "variables outside functions but in constant memory",
        "int n",
    ),
    "a constant not in constant memory": (
        "constexpr int n = 2;",
        I + "out[i] = x[i] * n;",
        "variables outside functions but in constant memory",
        "n = 2",
    ),
    "a static member not in constant memory": (
        "struct S { static constexpr int n = 2; };",
        I + "out[i] = x[i] * S::n;",
        "variables outside functions but in constant memory",
        "n = 2",
    ),
    "a threadgroup array in a function": (
        "inline float f(float x) {\n  threadgroup float s[32];\n  s[0] = x;\n  return s[0];\n}",
        CALL,
        "threadgroup variables outside kernels",
        "threadgroup float s",
    ),
    "an array of a size known late": (
        "",
        I + "int n = int(i) + 1;\nfloat v[n];\nv[0] = x[i];\nout[i] = v[0];",
        "variable length arrays",
        "v[n]",
    ),
    "goto": ("", I + "if (i == 0) goto end;\nend: out[i] = x[i];", "goto", "goto end"),
    "new": ("", I + "out[i] = *new float(x[i]);", "new", "new float"),
    "an empty array": ("struct S { float v[0]; };", I + "out[i] = x[i];", "zero size arrays", "v[0]"),
}


def tried(header: str, source: str) -> None:
    x = mx.arange(32).astype(mx.float32)
    run(source, {"x": x}, {"out": ((32,), mx.float32)}, header=header + "\n")


@pytest.mark.parametrize("fault", BROKEN)
def test_what_metal_does_not_have_is_refused_by_name_and_line(fault: str) -> None:
    header, source, reason, blamed = BROKEN[fault]
    with pytest.raises(KernelError) as caught:
        tried(header, source)
    assert caught.value.kind == "metal rules", caught.value
    assert reason in caught.value.message
    assert blamed in caught.value.text


SOUND: dict[str, tuple[str, str]] = {
    "pointers and references with their spaces": (
        "inline void g(thread float& y, const device float* x, constant const int& n, thread float* thread* q) {\n"
        "  y = *x * n;\n  **q = y;\n}",
        I + "int n = 1;\nfloat y, z;\nthread float* p = &z;\nconst device float* a = x, *b = a + i;\ny = *b * x[0];\n"
        "thread float* thread* q = &p;\n**q = y;\nout[i] = z;",
    ),
    "products that look like pointers": (
        "inline float g(float a, float b) { return a; }",
        I
        + "float a = x[i], b = a;\nbool c = a < b, d = a * b > (a);\nfloat e = a * b, h = (a * b) * (a), k = g(a, b);\n"
        "uint m = i & 1, n = (i & m) & (m);\nout[i] = e + h + k + n + c + d;",
    ),
    "a pointer of the caller's space": (
        "template <typename P> float g(P p) { return p[0]; }",
        I + "thread float y = x[i];\nout[i] = g(x) + g(&y);",
    ),
    "arrays given as they are": (
        "inline float f(thread const float (&v)[2]) { return v[1]; }",
        I + "float v[2] = {x[i], 1};\nout[i] = f(v);",
    ),
    "constants in constant memory": (
        "constant float table[2] = {1, 2};\nconstant constexpr int n = 1;\n"
        "struct S { static constexpr constant int m = 3; };",
        I + "constexpr int k = 2;\nconst int l = 2;\nout[i] = x[i] * table[n] + S::m + k + l;",
    ),
    "templates that name themselves with another number": (
        "template <int N> struct Sum { static float of(float x) { return x + Sum<N - 1>::of(x); } };\n"
        "template <> struct Sum<0> { static float of(float x) { return x; } };",
        I + "out[i] = Sum<4>::of(x[i]);",
    ),
    "overloads that call each other": (
        "inline float f(float x, int n) { return x * n; }\ninline float f(float x) { return f(x, 2); }",
        CALL,
    ),
    "a method as its function's namesake": (
        "inline float f(float x) { return x; }\nstruct S { float f(float x) const { return ::f(x); } };",
        I + "out[i] = S{}.f(x[i]);",
    ),
    "words in comments": ("// virtual, goto, float* p, [](float x) { }\n", I + "out[i] = x[i];  /* static int n; */"),
    "attributes and brackets": ("", I + "float v[2] = {x[i], x[i]};\nint k[1] = {1};\nout[i] = v[k[0]] + v[(k[0])];"),
    "threadgroup arrays of the kernel given to a function": (
        "inline float f(threadgroup float* s, threadgroup float (&t)[32], uint i) { return s[i] + t[i]; }",
        I + "threadgroup float s[32], t[32];\ns[i] = x[i];\nt[i] = 1;\nout[i] = f(s, t, i);",
    ),
}


@pytest.mark.parametrize("name", SOUND)
def test_what_only_looks_like_a_fault_passes(name: str) -> None:
    tried(*SOUND[name])


def test_text_that_is_not_ascii_is_refused_even_in_a_comment() -> None:
    with pytest.raises(KernelError, match="only ASCII reaches Metal's compiler, found '·'") as caught:
        tried("// a · b", I + "out[i] = x[i];")
    assert caught.value.kind == "metal rules"


@pytest.mark.parametrize("buffers", [31, 32])
def test_a_kernel_has_at_most_31_buffers(buffers: int) -> None:
    """Ten inputs with a shape and strides each, and one output; then one more input."""
    names = [f"x{n}" for n in range(10)]
    sums = [f"{name}[i * {name}_strides[0]] + {name}_shape[0]" for name in names]
    names += ["y"] * (buffers - 31)
    inputs = {name: mx.arange(32).astype(mx.float32) for name in names}

    def tried() -> None:
        run(f"{I}out[i] = {' + '.join(sums)};", inputs, {"out": ((32,), mx.float32)})

    if buffers == 31:
        tried()
    else:
        with pytest.raises(KernelError, match="metal rules: a kernel takes at most 31 buffers, found 32"):
            tried()
