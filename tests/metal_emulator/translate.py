"""From Metal text to a C++ translation unit: the few edits that macros cannot make."""

import re
from itertools import count

from tests.metal_emulator.signature import KernelSource, Signature

# Lines of the kernel's texts are numbered from these, so that a line number alone tells where it stands.
HEADER_LINES = 1_000_000
SOURCE_LINES = 2_000_000

_SCALARS = "char|uchar|short|ushort|int|uint|long|ulong|half|bfloat|float|bool"
_VECTOR = rf"(?:metal::)?(?:packed_)?(?:{_SCALARS})[234]"
_COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
_VARIABLE = re.compile(
    r"(?<![\w(,<])(?:alignas\s*\(\s*\w+\s*\)\s*)?threadgroup\s+"
    r"(?P<type>(?:(?:un)?signed\s+)?(?:metal::)?\w+(?:::\w+)*(?:\s*<[^;(){}]*>)?)\s+"
    r"(?P<names>\w+\s*(?:\[[^;]*?\]\s*)*(?:,\s*\w+\s*(?:\[[^;]*?\]\s*)*)*);"
)
_LITERAL = re.compile(r"(?<![\w.])((?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)(bf|[hH])?(?![\w.])")
_LITERAL_TYPES = {"bf": "bfloat", "h": "half", "H": "half"}
_ALIAS = re.compile(
    rf"\busing\s+(\w+)\s*=\s*(?:metal::)?(?:vec\s*<|{_VECTOR}\b)|"
    rf"\btypedef\s+(?:metal::)?(?:vec\s*<[^;]*>|{_VECTOR})\s+(\w+)\s*;"
)


def translation_unit(kernel: KernelSource, signature: Signature) -> str:
    """C++ that defines `emulator_kernel`, one GPU thread's call of the specialised kernel."""
    call = f"void emulator_kernel(void** arguments) {{\n  {signature.call()};\n}}"
    return _unit(kernel, signature, f'extern "C" EMULATOR_PLAIN {call}')


def gpu_unit(kernel: KernelSource, signature: Signature, threads: int, registers: int) -> str:
    """C++ that defines `emulator_kernel` as an entry function of clang's own GPU target, with the kernel's buffers."""
    parameters = ", ".join(parameter.text for parameter in signature.parameters)
    given = [parameter.text.split()[-1] for parameter in signature.parameters]
    given += [f"emulator::attribute::{name}()" for name in signature.attributes]
    # A SIMD unit of that GPU has 1,024 registers a lane: so many waves leave each so many.
    limits = f"amdgpu_num_vgpr({registers}), amdgpu_waves_per_eu({1024 // registers})"
    attributes = f"__attribute__((amdgpu_kernel, amdgpu_flat_work_group_size({threads}, {threads}), {limits}))"
    call = f"{signature.function}{signature.template_arguments}({', '.join(given)})"
    entry = f'extern "C" {attributes} void emulator_kernel({parameters}) {{\n  {call};\n}}'
    return _unit(kernel, signature, entry)


def _unit(kernel: KernelSource, signature: Signature, entry: str) -> str:
    header = _without_comments(kernel.header)
    body = _without_comments(signature.body)
    variables = count()
    aliases = {name for match in _ALIAS.finditer(header + body) for name in match.groups() if name}
    header, body = (_edit(text, variables, aliases) for text in (header, body))
    return "\n".join(
        [
            '#include "prelude.h"',
            f'#line {HEADER_LINES + 1} "{kernel.name}.header"',
            header,
            f'#line 1 "{kernel.name}.signature"',
            signature.opening.rstrip("\n"),
            f'#line {SOURCE_LINES + 1} "{kernel.name}.source"',
            body,
            "}",
            '#line 1 "emulator"',
            entry,
            "",
        ]
    )


def source_line(kernel: KernelSource, line: int) -> tuple[str, int, str]:
    """Which text a reported line stands in ("source", "header" or ""), its number there and its words."""
    for part, start, text in (("source", SOURCE_LINES, kernel.source), ("header", HEADER_LINES, kernel.header)):
        if line > start:
            lines = text.split("\n")
            number = line - start
            return part, number, lines[number - 1].strip() if number <= len(lines) else ""
    return "", line, ""


def readable_diagnostics(kernel: KernelSource, text: str) -> tuple[str, int]:
    """The compiler's messages with lines counted in the kernel's own texts, and the first line as it reported it."""
    place = re.compile(r"(\.(?:header|source):)(\d+)")
    first = place.search(text)
    own = place.sub(lambda match: f"{match[1]}{source_line(kernel, int(match[2]))[1]}", text)
    return own, int(first[2]) if first else 0


def _without_comments(text: str) -> str:
    def blank(match: re.Match[str]) -> str:
        found = match.group()
        return found if found.startswith('"') else " " + "\n" * found.count("\n")

    return _COMMENT_OR_STRING.sub(blank, text)


def _edit(text: str, variables: "count[int]", aliases: set[str]) -> str:
    text = _VARIABLE.sub(lambda match: _variables(match, variables), text)
    text = _LITERAL.sub(_literal, text)
    names = "|".join([_VECTOR, *sorted(aliases)])
    text = re.sub(rf"(?<![\w:.>])({names})\s*\((?=\s*[^)\s*&])", r"emulator::construct<\1>(", text)
    text = re.sub(
        rf"\bstatic_cast\s*<\s*({names}|(?:metal::)?vec\s*<[^<>]*>)\s*>\s*\(", r"emulator::construct<\1>(", text
    )
    return _edit_vec_calls(text)


def _literal(match: re.Match[str]) -> str:
    """Metal has no double: a literal without a suffix is a float."""
    number, suffix = match.groups()
    return f"{_LITERAL_TYPES[suffix]}({number}f)" if suffix else f"{number}f"


def _variables(match: re.Match[str], variables: "count[int]") -> str:
    """`threadgroup T x[N];` as a reference into the threadgroup's memory."""
    out = []
    for declarator in _split(match["names"]):
        name, extent = re.fullmatch(r"\s*(\w+)\s*(.*?)\s*", declarator, re.DOTALL).groups()  # type: ignore[union-attr]
        kind = f"threadgroup {match['type']}"
        reference = f"(&{name}){extent}" if extent else f"&{name}"
        out.append(f"{kind} {reference} = *emulator::variable<{kind}{extent}, {next(variables)}>();")
    return " ".join(out)


def _split(text: str) -> list[str]:
    """Parts between the commas that stand outside brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "[(<") - (char in "])>")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _edit_vec_calls(text: str) -> str:
    """`vec<T, N>(...)` as a call of `emulator::construct`."""
    out, position = [], 0
    for match in re.finditer(r"(?<![\w:])(?:metal::)?vec\s*<", text):
        end = _closing(text, match.end())
        if match.start() < position or not re.match(r"\s*\(\s*[^)\s*&]", text[end:]):
            continue
        out.append(text[position : match.start()])
        out.append(f"emulator::construct<{text[match.start() : end]}>")
        position = end
    return "".join(out) + text[position:]


def _closing(text: str, start: int) -> int:
    """The position after the `>` that closes the `<` before `start`."""
    depth = 1
    for i in range(start, len(text)):
        depth += (text[i] == "<") - (text[i] == ">")
        if depth == 0:
            return i + 1
    return len(text)
