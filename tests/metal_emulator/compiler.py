"""Compiles specialisations to shared libraries, kept on disk by content."""

import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from shlex import split

from tests.metal_emulator import rules
from tests.metal_emulator.sites import with_site_table

RUNTIME = Path(__file__).parent / "runtime"
_INCLUDE = [f"-I{RUNTIME / 'msl'}"]

_LANGUAGE = split(
    "-std=c++17 -fno-exceptions -fno-rtti -fno-strict-aliasing -ffp-contract=off -ferror-limit=5 "
    "-Xclang -ffloat16-excess-precision=none -Xclang -fbfloat16-excess-precision=none"
)
# Without -march x86-64 converts half floats through library calls.
_NATIVE = ["-march=native"] if platform.machine() in ("x86_64", "AMD64") else []
_CODE = [*_NATIVE, *split("-fPIC -fvisibility=hidden -fno-math-errno -w")]
# A misaligned vector must be reported by the checked mode, and not end the process in either.
_QUICK = split("-O2 -fno-sanitize=all -fmax-type-align=1")
_CHECKED = split(
    "-O1 -DEMULATOR_CHECKED -gline-tables-only -fmax-type-align=8 -fno-vectorize -fno-slp-vectorize -fno-builtin "
    "-fno-finite-loops -fno-optimize-sibling-calls -ftrivial-auto-var-init=pattern "
    "-fsanitize=thread,alignment,bounds,signed-integer-overflow,integer-divide-by-zero,shift "
    "-mllvm -tsan-instrument-func-entry-exit=0 -mllvm -tsan-instrument-read-before-write=1"
)
# Metal is C++14. What the emulator's own headers need beyond it is theirs: they are system headers to this pass.
_METAL_RULES = split(
    "-std=c++14 -fno-exceptions -fno-rtti -ferror-limit=5 -DEMULATOR_SYNTAX_ONLY -pedantic-errors "
    "-Wno-duplicate-decl-specifier -Wno-unknown-attributes -Wno-ignored-attributes -Wno-pragma-once-outside-header "
    "-Werror=implicit-float-conversion -Wno-implicit-int-float-conversion -Werror=uninitialized "
    "-Werror=sometimes-uninitialized"
)
_METAL_HEADERS = ["-isystem", str(RUNTIME / "msl")]

# On Linux nothing is linked that zig would first have to build: Python's process has libc and libm already.
_LINK = ["-shared", "-nostdlib" if sys.platform == "linux" else "-nostdlib++"]


class CompileError(Exception):
    """The compiler rejected a text; its messages are the argument."""


class MetalRulesError(CompileError):
    """The text is C++ but not Metal."""


def cache_directory() -> Path:
    """Where libraries are kept: METAL_EMULATOR_CACHE, or metal-emulator in the user's cache directory."""
    given = os.environ.get("METAL_EMULATOR_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    if base is None:
        base = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    path = Path(base).expanduser() / "metal-emulator"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.gettempdir()) / "metal-emulator"
    return path


def library(unit: str, *, checked: bool) -> Path:
    """The shared library of a translation unit linked with the runtime.

    Raises CompileError, and for checked code MetalRulesError: address spaces mixed up or missing, floats silently
    narrowed, locals used before they are set, a double, and what C++14 or Metal lacks (`rules.py`).
    """
    objects = [str(path) for path in _runtime_objects(checked)]
    build = _build_checked if checked else _build_quick
    return _kept(f"library {checked} {unit}", ".so", lambda work, made: build(unit, objects, work, made))


def _build_quick(unit: str, objects: list[str], work: Path, made: Path) -> None:
    source = written(work / "unit.cpp", unit)
    run([*compiler(), *_LANGUAGE, *_CODE, *_QUICK, *_INCLUDE, *_LINK, source, *objects, "-o", str(made)])


def _build_checked(unit: str, objects: list[str], work: Path, made: Path) -> None:
    source, assembly = written(work / "unit.cpp", unit), work / "unit.s"
    run([*plain_clang(), *_LANGUAGE, *_CODE, *_CHECKED, *_INCLUDE, "-S", source, "-o", str(assembly)])
    check_metal_rules(unit)
    located = written(assembly, with_site_table(assembly.read_text()))
    run([*compiler(), *_LINK, located, *objects, "-o", str(made)])


def check_metal_rules(unit: str) -> None:
    """Raises MetalRulesError where a translation unit is C++ but not Metal."""
    with tempfile.TemporaryDirectory() as work:
        source = written(Path(work) / "unit.cpp", unit)
        command = [*plain_clang(), *_METAL_RULES, *_METAL_HEADERS, "-include-pch", str(_headers_parsed()), source]
        try:
            tree = json.loads(run([*command, "-fsyntax-only", "-Xclang", "-ast-dump=json"]))
        except CompileError as error:
            raise MetalRulesError(*error.args) from None
    if found := rules.broken_rules(unit, tree):
        raise MetalRulesError("\n".join(rules.message(unit, each) for each in found))


@cache
def _headers_parsed() -> Path:
    """The headers as the pass for Metal's rules reads them; syntax trees then hold the kernel's texts alone."""

    def parse(_: Path, made: Path) -> None:
        command = [
            *plain_clang(),
            *_METAL_RULES,
            *_METAL_HEADERS,
            "-x",
            "c++-header",
            str(RUNTIME / "msl" / "prelude.h"),
        ]
        run([*command, "-Xclang", "-emit-pch", "-Xclang", "-fno-pch-timestamp", "-o", str(made)])

    return _kept(f"headers of {RUNTIME}", ".pch", parse)


@cache
def compiler() -> tuple[str, ...]:
    """The command of a clang of at least version 17: METAL_EMULATOR_CXX, ziglang, or one on the path."""
    given = os.environ.get("METAL_EMULATOR_CXX")
    if given:
        return tuple(given.split())
    zig = importlib.util.find_spec("ziglang")
    if zig is not None and zig.origin is not None:
        return (str(Path(zig.origin).parent / "zig"), "c++")
    for name in ("clang++", *(f"clang++-{version}" for version in range(30, 16, -1))):
        path = shutil.which(name)
        if path and _clang_version(path) >= 17:
            return (path,)
    raise RuntimeError("the Metal emulator needs clang 17 or newer: pip install ziglang, or set METAL_EMULATOR_CXX")


def plain_clang() -> tuple[str, ...]:
    """`zig c++` chooses sanitizers itself and insists on an object; `zig clang` is the clang inside it."""
    return tuple("clang" if word == "c++" else word for word in compiler())


def _clang_version(path: str) -> int:
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"clang version (\d+)", text)
    version = int(found.group(1)) if found else 0
    # Apple's 16.0 is made from LLVM 17.
    return version + 1 if "Apple" in text else version


@cache
def _identity() -> str:
    """Changes when the compiler, the flags, the processor or any file of the runtime does."""
    version = subprocess.run([*compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    processor = Path("/proc/cpuinfo")
    features = re.findall(r"^flags.*", processor.read_text(), re.MULTILINE)[:1] if processor.exists() else []
    digest = hashlib.sha256(f"{version} {platform.machine()} {features}".encode())
    files = [
        Path(__file__),
        *(Path(__file__).with_name(name) for name in ("sites.py", "rules.py")),
        *RUNTIME.rglob("*"),
    ]
    for path in sorted(path for path in files if path.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@cache
def _runtime_objects(checked: bool) -> tuple[Path, ...]:
    names = ["scheduler.cpp", "conversions.cpp", *(("checks.cpp", "hooks.cpp") if checked else ("unchecked.cpp",))]

    def compiled(name: str) -> Path:
        source = str(RUNTIME / name)
        command = [*compiler(), *_LANGUAGE, *_CODE, *_QUICK, "-c", source, "-o"]
        return _kept(f"object {name}", ".o", lambda _, made: run([*command, str(made)]))

    return tuple(compiled(name) for name in names)


def _kept(key: str, suffix: str, build: Callable[[Path, Path], None]) -> Path:
    """The file of this content, from the cache or built in a working directory."""
    folder = cache_directory()
    target = folder / (hashlib.sha256(f"{_identity()} {key}".encode()).hexdigest()[:32] + suffix)
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made = Path(work) / f"made{suffix}"
        build(Path(work), made)
        made.replace(target)
    return target


def written(path: Path, text: str) -> str:
    """The path of a file that now holds `text`."""
    path.write_text(text)
    return str(path)


def run(command: list[str]) -> str:
    """What a compiler prints. Raises CompileError with its messages when it fails."""
    zig_cache = str(cache_directory() / "zig")
    environment = {"ZIG_LOCAL_CACHE_DIR": zig_cache, "ZIG_GLOBAL_CACHE_DIR": zig_cache, **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise CompileError(done.stderr)
    return done.stdout
