"""Keywords declared once, as fields of a frozen dataclass: their checks, signatures, docstrings and flags follow.

    @documented
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Settings:
        \"\"\"What a call may choose.

        Attributes:
            {options}
        \"\"\"

        bits: int | None = option(None, help="bits per weight.", choices=(4, 8), flag="--q-bits")

        def __post_init__(self) -> None:
            check_values(self, ConversionError)

    @takes(Settings)
    def convert(path: str, **keywords: Unpack[SettingsKeywords]) -> None:
        check_keywords(keywords, Settings, error=ConversionError)
        settings = chosen(Settings, keywords)

The TypedDict names each keyword a second time, because nothing else tells a type checker; a test compares the two.
"""

import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field
from difflib import get_close_matches
from typing import Any, ClassVar, Protocol, TypeVar

from mlx_qwen.errors import MLXQwenError, PromptError
from mlx_qwen.value_types import expected_type, fits, shown

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., object])

_KEY = "option"
_PLACE = "{options}"
_WIDTH = 120


class Declared(Protocol):
    """A dataclass whose fields are declared with `option`."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


D = TypeVar("D", bound=Declared)


@dataclass(frozen=True, slots=True)
class Declaration:
    """What is said of one keyword beside its name, type and default.

    Attributes:
        help: one text for the docstrings and the flag.
        flags: its names on the command line; none where it has no flag.
        metavar: what the command line's help calls its value, where the type's name says too little.
        least: the lowest number it may be.
        above: a number that it must be above.
        most: the highest number it may be.
        choices: the values it may have.
        expected: what errors say was expected, where type and range say too little.
        check: False for values that fit the type and cannot be used all the same; it may also raise an error itself.
    """

    help: str
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    least: float | None = None
    above: float | None = None
    most: float | None = None
    choices: tuple[object, ...] = ()
    expected: str | None = None
    check: Callable[[Any], bool] | None = None

    def allows(self, value: object) -> bool:
        """Whether a value of the right type can be used."""
        if isinstance(value, int | float):
            within = self.least is None or value >= self.least
            within = within and (self.above is None or value > self.above)
            if not within or (self.most is not None and value > self.most):
                return False
        if self.choices and value not in self.choices:
            return False
        return self.check is None or self.check(value)

    def range(self) -> str:
        """The numbers or values that are allowed, in words; "" without bounds."""
        if self.choices:
            *others, last = map(repr, self.choices)
            return f"{', '.join(others)} or {last}" if others else last
        if self.least is not None and self.most is not None:
            return f"from {self.least} to {self.most}"
        bounds = {"above": self.above, "at least": self.least, "at most": self.most}
        return " and ".join(f"{words} {bound}" for words, bound in bounds.items() if bound is not None)


def option(
    default: T,
    *,
    help: str,  # noqa: A002, click's word for the same
    flag: str | Sequence[str] = (),
    metavar: str | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    choices: Sequence[object] = (),
    expected: str | None = None,
    check: Callable[[Any], bool] | None = None,
) -> T:
    """A dataclass field with its `Declaration`. `help` begins in lower case, as what follows a name and a colon."""
    declaration = Declaration(
        help=help,
        flags=(flag,) if isinstance(flag, str) else tuple(flag),
        metavar=metavar,
        least=least,
        above=above,
        most=most,
        choices=tuple(choices),
        expected=expected,
        check=check,
    )
    return field(default=default, metadata={_KEY: declaration})


def declared(*classes: type[Declared]) -> Iterator[tuple[Field[Any], Declaration]]:
    """The fields of the classes with their declarations, those of a subclass before its bases'."""
    for cls in classes:
        own = [name for base in cls.__mro__ for name in inspect.get_annotations(base)]
        fields = cls.__dataclass_fields__
        for name in dict.fromkeys(name for name in own if name in fields):
            declaration = fields[name].metadata.get(_KEY)
            if isinstance(declaration, Declaration):
                yield fields[name], declaration


_ANYTHING = Declaration("")


def check_values(values: Declared, error: type[MLXQwenError] = PromptError) -> None:
    """Raises `error` for the first field whose type or value is not what was declared."""
    for one, declaration in declared(type(values)):
        check_value(one.name, getattr(values, one.name), one.type, declaration, default=one.default, error=error)


def check_value(
    name: str,
    value: object,
    annotation: object,
    declaration: Declaration = _ANYTHING,
    *,
    default: object = MISSING,
    error: type[MLXQwenError] = PromptError,
) -> None:
    """Raises `error`, with what was expected and found, unless the value has the type and fits the declaration."""
    typed = fits(value, annotation)
    if typed and declaration.allows(value):
        return
    kind, bounds = expected_type(annotation), declaration.range()
    expected = bounds if typed or declaration.choices else f"{kind}, {bounds}" if bounds else kind
    raise error(f"{name} is {shown(value)}; expected {declaration.expected or expected}{_without(default)}")


def _without(default: object) -> str:
    if default is MISSING:
        return "."
    return ", or None." if default is None else f". Leave it out for {default!r}."


def check_keywords(
    keywords: Mapping[str, object], *classes: type[Declared], error: type[MLXQwenError] = PromptError
) -> None:
    """Raises `error` for a keyword that none of the classes declares, with the one that was probably meant."""
    known = {one.name: declaration for one, declaration in declared(*classes)}
    for name in keywords:
        if name not in known:
            near = _nearest(name, known)
            meant = f"did you mean {near}?" if near else f"expected some of {', '.join(known)}."
            raise error(f"There is no option {name!r}; {meant}")


def _nearest(name: str, known: Mapping[str, Declaration]) -> str | None:
    """The option that is spelt most like `name`, in Python, on the command line or by its first letters."""
    spelt = {flag.strip("-").replace("-", "_"): option for option, one in known.items() for flag in one.flags}
    spelt |= {option: option for option in known}
    near = get_close_matches(name.lower(), spelt, n=1)
    near = near or [one for one in spelt if len(name) > 2 and one.startswith(name)]
    return spelt[near[0]] if near else None


def chosen(cls: type[D], keywords: Mapping[str, object]) -> D:
    """The value of a class that those of the keywords give which are its own; raises what the class raises."""
    return cls(**{name: value for name, value in keywords.items() if name in cls.__dataclass_fields__})


def takes(*classes: type[Declared]) -> Callable[[F], F]:
    """Shows the keywords of the classes in a function's signature, for help and completion, and in its docstring.

    They stand in place of its `**keywords`, and of the line {options} in the docstring.
    """

    def decorate(function: F) -> F:
        shown: Any = function
        shown.__signature__ = signature_of(function, *classes)
        shown.__doc__ = filled(function.__doc__, *classes)
        return function

    return decorate


def documented(cls: type[D]) -> type[D]:
    """Writes the fields of a class in place of the line {options} of its docstring."""
    cls.__doc__ = filled(cls.__doc__, cls)
    return cls


def signature_of(function: Callable[..., object], *classes: type[Declared]) -> inspect.Signature:
    """The signature of a function with the keywords of the classes in place of its `**keywords`."""
    own = inspect.signature(function)
    kinds = inspect.Parameter
    kept = [one for one in own.parameters.values() if one.kind is not kinds.VAR_KEYWORD]
    names = {one.name for one in kept}
    added = [
        kinds(one.name, kinds.KEYWORD_ONLY, default=one.default, annotation=one.type)
        for one, _ in declared(*classes)
        if one.name not in names
    ]
    return own.replace(parameters=[*kept, *added])


def filled(doc: str | None, *classes: type[Declared]) -> str | None:
    """A docstring with a line for each keyword of the classes in place of the line {options}."""
    if doc is None:  # python -OO
        return None
    lines = []
    for line in doc.splitlines():
        if line.strip() != _PLACE:
            lines.append(line)
            continue
        indent = line[: line.index(_PLACE)]
        for one, declaration in declared(*classes):
            text = f"{one.name}: {declaration.help}"
            lines += textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent + " " * 4)
    return "\n".join(lines)
