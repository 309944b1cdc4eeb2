"""Gives each instrumented access in checked code its source line, by a table added to the assembly."""

import re

_LOCATION = re.compile(r"\s*\.loc\s+\d+\s+(\d+)")
_HOOK = re.compile(r"\s*(?:callq?|bl)\s+_{0,3}(?:tsan_|ubsan_)")


def with_site_table(assembly: str) -> str:
    """The assembly with `emulator_sites`: pairs of (address after a call of a check, source line), ended by a zero."""
    apple = ".subsections_via_symbols" in assembly
    local, name = ("L", "_emulator_sites") if apple else (".L", "emulator_sites")
    lines: list[str] = []
    sites: list[tuple[str, int]] = []
    line = 0
    for text in assembly.split("\n"):
        lines.append(text)
        location = _LOCATION.match(text)
        if location:
            # Line 0 marks code the compiler cannot place: what came before is the best guess.
            line = int(location.group(1)) or line
        elif _HOOK.match(text):
            label = f"{local}emulator_site_{len(sites)}"
            lines.append(f"{label}:")
            sites.append((label, line))
    table = [".section __DATA,__data" if apple else ".data", ".p2align 3", f".globl {name}", f"{name}:"]
    for label, line in sites:
        table += [f".quad {label}", f".quad {line}"]
    return "\n".join([*lines, *table, ".quad 0", ".quad 0", ""])
