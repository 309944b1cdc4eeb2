"""What Apple's compiler refuses though it is C++: found in clang's syntax tree and in the text.

After section 1 of the Metal Shading Language Specification 3.1, "Metal and C++14", and 4.2 on address spaces.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.metal_emulator.signature import KernelSource, Signature

# One node of clang's syntax tree as JSON.
Node = dict[str, Any]

MOST_BUFFERS = 31

_STATEMENTS = {
    "LambdaExpr": "lambda expressions",
    "GotoStmt": "goto",
    "IndirectGotoStmt": "goto",
    "CXXNewExpr": "new",
    "CXXDeleteExpr": "delete",
    "CXXDynamicCastExpr": "dynamic_cast",
    "CXXTypeidExpr": "typeid",
    "CXXThrowExpr": "exceptions",
    "CXXTryStmt": "exceptions",
}
_FUNCTIONS = ("FunctionDecl", "CXXMethodDecl", "CXXConstructorDecl", "CXXDestructorDecl", "CXXConversionDecl")
_DECLARATIONS = (*_FUNCTIONS, "VarDecl", "ParmVarDecl", "FieldDecl", "NonTypeTemplateParmDecl")
_ALIASES = ("TypeAliasDecl", "TypedefDecl")
_SPACE = re.compile(r"\b(?:device|constant|threadgroup|thread)\b")
_FUNCTION_POINTER = re.compile(r"\(\s*(?:\w+::)*[*&]+[^()]*\)\s*\(")
# A cast or a template argument: what ends in * or & before a bracket or a comma can only be a type.
_TYPE_IN_BRACKETS = re.compile(r"[(<,]\s*([\w:][^<>(),;{}=]*(?:<[^<>;]*>)?[^<>(),;{}=]*[*&])\s*(?=[>),])")
_TEXT_START = re.compile(r'#line \d+ "[^"\n]*\.(header|source)"\n')


class Broken(NamedTuple):
    """A rule that a text breaks, and where: the offset in the translation unit."""

    rule: str
    offset: int


def refused_outright(kernel: KernelSource, signature: Signature) -> str | None:
    """Why Metal or MLX takes no such kernel, whatever its statements are; None when nothing speaks against it."""
    text = kernel.header + kernel.source
    if not text.isascii():
        found = next(character for character in text if not character.isascii())
        return f"only ASCII reaches Metal's compiler, found {found!r}"
    if len(signature.parameters) > MOST_BUFFERS:
        return f"a kernel takes at most {MOST_BUFFERS} buffers, found {len(signature.parameters)}"
    return None


def broken_rules(unit: str, tree: Node) -> list[Broken]:
    """Where the kernel's own texts in a translation unit break a rule, in their order, each place once."""
    texts = _own_texts(unit)
    found = {*_in_text(unit, texts), *_in_tree(unit, tree)}
    own = [each for each in found if any(start <= each.offset < end for start, end in texts.values())]
    return sorted(own, key=lambda each: each.offset)


def message(unit: str, broken: Broken) -> str:
    """One line as clang would write it: the place, and what Metal does not have."""
    directive = list(re.finditer(r'#line (\d+) "([^"\n]*)"\n', unit[: broken.offset]))[-1]
    lines = unit[directive.end() : broken.offset].split("\n")
    line = int(directive[1]) + len(lines) - 1
    return f"{directive[2]}:{line}:{len(lines[-1]) + 1}: error: Metal has no {broken.rule}"


def _own_texts(unit: str) -> dict[str, tuple[int, int]]:
    """From and to which offset the header and the source stand in the unit."""
    return {
        match[1]: (match.end(), unit.find("\n#line ", match.end()) % (len(unit) + 1))
        for match in _TEXT_START.finditer(unit)
    }


def _in_text(unit: str, texts: dict[str, tuple[int, int]]) -> Iterator[Broken]:
    for start, end in texts.values():
        for match in _TYPE_IN_BRACKETS.finditer(unit, start, end):
            if not _qualified(match[1]):
                yield Broken("pointer or reference without an address space", match.start(1))
    for match in re.finditer(r"\bemulator::variable<", unit[slice(*texts["header"])]):
        yield Broken("threadgroup variables outside kernels", texts["header"][0] + match.start())


def _in_tree(unit: str, tree: Node) -> Iterator[Broken]:
    calls: dict[str, set[str]] = {}
    first: dict[str, str] = {}
    places: dict[str, int] = {}
    for node, function in _nodes(tree, None):
        place = _offset(node.get("loc") or {}) if "loc" in node else _offset(node.get("range", {}).get("begin", {}))
        if node["kind"] in _FUNCTIONS:
            first[node["id"]] = first.get(node.get("previousDecl", ""), node["id"])
            if place is not None:
                places[first[node["id"]]] = place
        if function is not None and (called := _called(node)):
            calls.setdefault(first[function], set()).add(called)
        if place is not None and not node.get("isImplicit"):
            yield from (Broken(rule, place) for rule in _of_node(unit, node, place, in_function=function is not None))
    known = {caller: {first.get(each, each) for each in called} for caller, called in calls.items()}
    yield from (Broken("recursion", places[each]) for each in known if each in places and _reaches(known, each))


def _nodes(node: Node, function: str | None) -> Iterator[tuple[Node, str | None]]:
    """Every node, and the id of the function that it stands in."""
    if "kind" not in node:
        return
    yield node, function
    inside = node["id"] if node["kind"] in _FUNCTIONS else function
    for inner in node.get("inner", ()):
        yield from _nodes(inner, inside)


def _offset(location: Node) -> int | None:
    """Where in the main file; None for what stands in an included one."""
    location = location.get("expansionLoc", location)
    return None if "includedFrom" in location else location.get("offset")


def _of_node(unit: str, node: Node, place: int, *, in_function: bool) -> Iterator[str]:
    kind = node["kind"]
    if kind in _STATEMENTS:
        yield _STATEMENTS[kind]
    if node.get("virtual"):
        yield "virtual functions"
    if kind in ("VarDecl", "ParmVarDecl", "FieldDecl", "NonTypeTemplateParmDecl", *_ALIASES):
        kinds = node["type"]
        if _FUNCTION_POINTER.search(kinds.get("desugaredQualType", kinds["qualType"])):
            yield "function pointers"
    if kind == "VarDecl":
        yield from _of_variable(node, in_function=in_function)
    if kind in (*_DECLARATIONS, *_ALIASES):
        begin = _offset(node["range"]["begin"])
        if begin is not None and not _qualified(
            _aliased(unit, begin) if kind in _ALIASES else _declared(unit, begin, place)
        ):
            yield "pointer or reference without an address space"


def _of_variable(node: Node, *, in_function: bool) -> Iterator[str]:
    if node.get("tls"):
        yield "thread_local"
    elif in_function:
        if node.get("storageClass") == "static":
            yield "static variables in functions"
    elif not re.search(
        r"\bconstant\b|address_space\(2\)", node["type"].get("desugaredQualType", node["type"]["qualType"])
    ):
        yield "variables outside functions but in constant memory"


def _declared(unit: str, begin: int, name: int) -> str:
    """A declaration up to its name, from the words before clang's begin on: `thread` is nothing to clang."""
    while unit[begin - 1].isspace() or unit[begin - 1].isalnum():
        begin -= 1
    return unit[begin:name]


def _aliased(unit: str, begin: int) -> str:
    """The type that `using name = type;` or `typedef type name;` names."""
    text = unit[begin : unit.find(";", begin)]
    return text.partition("=")[2] or text


def _qualified(declared: str) -> bool:
    """Whether each * and & of a type, or of a declaration up to its name, has an address space."""
    pieces = re.split(r",(?![^<(\[]*[>)\]])", declared)
    specifiers = re.split(r"[*&=]", pieces[0], maxsplit=1)[0]
    declarator = pieces[-1][len(specifiers) :] if len(pieces) == 1 else pieces[-1]
    marks = len(re.findall(r"&&|[*&]", declarator))
    return len(_SPACE.findall(specifiers + declarator)) >= marks


def _called(node: Node) -> str | None:
    if node["kind"] == "DeclRefExpr" and node["referencedDecl"]["kind"] in _FUNCTIONS:
        return str(node["referencedDecl"]["id"])
    return node.get("referencedMemberDecl") if node["kind"] == "MemberExpr" else None


def _reaches(calls: dict[str, set[str]], function: str) -> bool:
    """Whether a function comes to call itself."""
    seen: set[str] = set()
    waiting = list(calls[function])
    while waiting:
        called = waiting.pop()
        if called == function:
            return True
        if called not in seen:
            seen.add(called)
            waiting.extend(calls.get(called, ()))
    return False
