"""A Jinja sandbox that foreign templates cannot hang or fill memory in.

A template in this process cannot be stopped from outside, so all by which one could grow passes a meter: turns of
loops, calls, filters, operators, literals, output. What is left between them is bounded by the template's length.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from threading import local
from time import thread_time
from types import BuiltinMethodType, GeneratorType
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.nodes import EvalContext
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

SECONDS = 5.0
# Of one value or the whole output, and of all values together: characters, and 64 for each value.
_MOST_AT_ONCE, _MOST_IN_ALL = 4_000_000, 250_000_000
_EACH = 64
_MOST_NUMBER = 1_000_000
_MOST_BITS = 100_000
_MOST_INDENT = 16
# Quadratic or slower, or made for web pages; no chat template needs them.
_FILTERS_LEFT_OUT = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
_METHODS_LEFT_OUT = ("encode", "expandtabs", "maketrans", "translate", "to_bytes")
_WIDTHS = re.compile(r"\d{5}|%[^a-zA-Z%]*\*|\{[^{}]+\{")


class Meter:
    """What one rendering may still use; `given` is the size of what it was given, which earns it more."""

    def __init__(self, given: int) -> None:
        self.most = _MOST_AT_ONCE + 16 * given
        self._left = _MOST_IN_ALL + 200 * given
        self._end = thread_time() + SECONDS

    def tick(self, size: int = _EACH) -> None:
        """Note that something happened that made `size` characters."""
        self._left -= size
        if self._left < 0:
            raise SecurityError(f"it makes more than {_MOST_IN_ALL >> 20} MB of text")
        if thread_time() > self._end:
            raise SecurityError(f"it runs for more than {SECONDS:g} seconds")

    def allow(self, size: float) -> None:
        """Refuse a value of this size before it is made."""
        if size > self.most:
            raise SecurityError(f"it makes a value of more than {self.most >> 20} MB")

    def made(self, value: object) -> None:
        """Note a value, with everything in it as often as it would be written."""
        size = self.size(value)
        self.allow(size)
        self.tick(size)

    def size(self, value: object) -> int:
        """Characters of a value and 64 for each part; just above the limit for any that is larger."""
        size, waiting = 0, [value]
        while waiting and size <= self.most:
            one = waiting.pop()
            size += _EACH
            if isinstance(one, str | bytes):
                size += len(one)
            elif isinstance(one, int):
                size += one.bit_length() // 3
            elif isinstance(one, Mapping):
                waiting += [*one.keys(), *one.values()]
            elif isinstance(one, list | tuple | set | frozenset):
                waiting += one
        return size


class _QuietNamespace(Namespace):
    """A namespace whose text is short, whatever it holds."""

    def __repr__(self) -> str:
        return "<Namespace>"


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with a meter for each rendering; see `metered`."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self, **settings: Any) -> None:
        # Nothing is computed while a template is compiled.
        super().__init__(optimized=False, finalize=_finalize, **settings)
        self._now = local()
        self.filters = {name: self._guarded(name, made) for name, made in self.filters.items()}
        for name in _FILTERS_LEFT_OUT:
            del self.filters[name]
        del self.globals["lipsum"]
        self.globals["namespace"] = _QuietNamespace

    @property
    def meter(self) -> Meter:
        """That of the rendering in this thread."""
        meter: Meter = self._now.meter
        return meter

    def metered(self, given: object, render: Callable[[], str]) -> str:
        """Renders a template that is given this; raises SecurityError when it takes too long or grows too large."""
        self._now.meter = Meter(0)
        self._now.meter = Meter(min(self.meter.size(given), _MOST_AT_ONCE) if given else 0)
        return render()

    def _generate(self, source: nodes.Template, *args: Any, **settings: Any) -> str:
        transformed = _Metering().visit(source)
        transformed.set_environment(self)
        return super()._generate(transformed, *args, **settings)

    def tick(self) -> None:
        """A loop turns."""
        self.meter.tick()

    def made(self, value: Any) -> Any:
        """A literal was written; returns it."""
        self.meter.made(value)
        return value

    def joined(self, *parts: Any) -> str:
        """What `~` makes of its parts."""
        self.meter.allow(sum(map(self.meter.size, parts)))
        return str(self.made("".join(map(str, parts))))

    def concat(self, pieces: Iterable[str]) -> str:
        """The output of a template, macro or block."""
        kept, size = [], 0
        for piece in pieces:
            size += len(piece)
            self.meter.allow(size)
            kept.append(piece)
        self.meter.tick(size)
        return "".join(kept)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Checks the size of what an operator makes, before and after."""
        meter = self.meter
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(other, int):
                    meter.allow(meter.size(one) * (other if not isinstance(one, int) else 1))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * right > _MOST_BITS:
                raise SecurityError("it computes a number that is too large")
        elif operator == "%" and isinstance(left, str):
            self._check_format(left, right)
        value = super().call_binop(context, operator, left, right)
        meter.made(value)
        return value

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Checks what a method is asked for, and the size of what any call gives."""
        if isinstance(__obj, BuiltinMethodType):
            __self._check(__obj.__name__, (__obj.__self__, *args), kwargs, method=True)
        __self.meter.tick()
        value = super().call(__context, __obj, *args, **kwargs)
        return __self._checked(value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Guards `str.format` beyond what the sandbox does."""
        made = super().wrap_str_format(value)
        if made is None:
            return None

        def guarded(*args: Any, **kwargs: Any) -> str:
            self._check_format(value.__self__, (args, kwargs))
            return made(*args, **kwargs)

        return guarded

    def add_filter(self, name: str, made: Callable[..., Any]) -> None:
        """Adds a filter, under the meter like all others."""
        self.filters[name] = self._guarded(name, made)

    def _guarded(self, name: str, made: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(made)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            own = [one for one in args if not isinstance(one, Context | EvalContext | MeteredEnvironment)]
            self._check(name, own, kwargs)
            self.meter.tick()
            return self._checked(made(*args, **kwargs))

        return guarded

    def _checked(self, value: Any) -> Any:
        if isinstance(value, GeneratorType):
            return self._each(value)
        return self.made(value)

    def _each(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            yield self.made(value)

    def _check(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], *, method: bool = False) -> None:
        """Refuses calls of methods and filters whose values would be far larger than what they are given."""
        meter = self.meter
        rest = [*args[1:], *kwargs.values()]
        numbers = [abs(one) for one in rest if isinstance(one, int)]
        if max(numbers, default=0) > _MOST_NUMBER or (method and name in _METHODS_LEFT_OUT):
            raise SecurityError(f"it calls {name} with more than is allowed")
        size = meter.size(args[0]) if args else 0
        widths = [len(one) if isinstance(one, str) else one for one in rest if isinstance(one, int | str)]
        if name == "replace" and len(args) > 2:
            meter.allow(size + str(args[0]).count(str(args[1])) * meter.size(args[2]))
        elif name == "join" and rest:
            # The filter is given the parts first, the method what stands between them.
            parts, between = (rest[0], args[0]) if method else (args[0], rest[0])
            meter.allow(meter.size(parts) // _EACH * meter.size(between))
        elif name == "indent":
            meter.allow(size * max([1, *widths]))
        elif name == "list" and isinstance(args[0], str):
            meter.allow(len(args[0]) * _EACH)
        elif name == "tojson" and max(widths, default=0) > _MOST_INDENT:
            raise SecurityError(f"it indents JSON by more than {_MOST_INDENT}")
        elif name == "format" and not method and args:
            self._check_format(str(args[0]), rest)

    def _check_format(self, pattern: str, values: object) -> None:
        if _WIDTHS.search(pattern):
            raise SecurityError("it formats with widths that are not allowed")
        self.meter.allow(len(pattern) + (pattern.count("%") + pattern.count("{")) * self.meter.size(values))


class _Metering(NodeTransformer):
    """Puts the meter into loops, literals and joins."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802, jinja2 finds it by this name
        """Every turn of a loop ticks."""
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("tick", node), lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        """`~` joins under the meter."""
        self.generic_visit(node)
        return _call("joined", node, *node.nodes)

    def _literal(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        is_stored = getattr(node, "ctx", "load") != "load"
        if is_stored or all(isinstance(one, nodes.Const) for one in getattr(node, "items", ())):
            return node  # type: ignore[no-any-return]
        return _call("made", node, node)

    visit_List = visit_Tuple = visit_Dict = _literal  # noqa: N815


def _call(name: str, at: nodes.Node, *args: nodes.Node) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name, lineno=at.lineno), list(args), [], None, None, lineno=at.lineno)


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    environment = context.environment
    assert isinstance(environment, MeteredEnvironment), "whose finalize this is"
    if not isinstance(value, str):
        environment.meter.allow(environment.meter.size(value))
    environment.meter.tick()
    return value
