"""Jinja for chat templates of strangers: no reach into Python, bounded time and memory.

Jinja's immutable sandbox keeps a template from running code, but not from looping or building
huge values. Here every loop step, call and operation is counted against a `Budget`, and every
value is measured when it is made, before its memory is taken: what a template holds or writes
stays in proportion to what it was given.

Only what chat templates use is offered; the environment is otherwise set up as transformers does.
This module imports jinja2, so import it inside of functions.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from string import Formatter
from typing import Any, NoReturn

from jinja2 import Template, TemplateSyntaxError, Undefined, nodes
from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.exceptions import TemplateError as JinjaError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

MAX_SOURCE = 256 * 1024  # characters; the longest template in use has about 20,000
MAX_STEPS = 1_000_000  # loop steps, calls and operations of one rendering
MAX_SECONDS = 2.0  # of processor time for one rendering
_MAX_INT_BITS = 4096
_MAX_SEPARATOR = 16


class LimitError(SecurityError):
    """A template asked for more time or memory than it may have."""


class Budget:
    """What one rendering may use. `size` counts characters and elements."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.steps = MAX_STEPS
        self.deadline = time.thread_time() + MAX_SECONDS

    def step(self) -> None:
        """Counts one step, and looks at the clock."""
        self.steps -= 1
        if self.steps < 0:
            raise LimitError(f"takes more than {MAX_STEPS} steps")
        if time.thread_time() > self.deadline:
            raise LimitError(f"takes more than {MAX_SECONDS:g} s of processor time")

    def length(self, size: int) -> None:
        """Refuses a value of this size; called before it is made."""
        if size > self.size:
            raise LimitError(f"builds more than {self.size} characters or elements")

    def value(self, value: Any) -> None:
        """Refuses a value that is too large."""
        self.length(weight(value, self.size))


def weight(value: Any, limit: int) -> int:
    """Characters and elements in a value, shared parts counted each time; stops past `limit`."""
    total, stack = 0, [value]
    while stack and total <= limit:
        part = stack.pop()
        if isinstance(part, str):
            total += len(part)
        elif isinstance(part, dict):
            total += 2 * len(part)
            stack.extend(part)
            stack.extend(part.values())
        elif isinstance(part, (list, tuple)):
            total += len(part)
            stack.extend(part)
        elif isinstance(part, int):
            total += 1 + part.bit_length() // 3
        else:
            total += 1
    return total


class _Namespace(Namespace):
    """Jinja's namespace; its own repr would write out all it holds, and may hold itself."""

    def __repr__(self) -> str:
        return "<namespace>"


class GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; here it passes through."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements inside of the block, in a scope of their own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [nodes.Scope(body, lineno=line)]


class _Instrument(NodeTransformer):
    """Routes loops, `~` and literal containers through the budget."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_counted")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "_concatenated")

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        return self._measured(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        return self._measured(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        return self._measured(node) if node.ctx == "load" else node

    def _measured(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        if all(isinstance(child, nodes.Const) for child in node.iter_child_nodes()):
            return node
        return _filtered(node, "_measured")


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


_STRING_METHODS = frozenset(
    """
    capitalize casefold center count endswith expandtabs find format index isalnum isalpha isascii
    isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust
    lower lstrip partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit
    rstrip split splitlines startswith strip swapcase title upper zfill
    """.split()  # noqa: SIM905
)
_FILTERS = """
    abs attr capitalize count d default dictsort e escape first float forceescape groupby int items
    last length list lower map max min reject rejectattr reverse safe select selectattr sort string
    title trim truncate unique upper urlencode wordcount
""".split()  # noqa: SIM905


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The environment of all chat templates of a process; safe to use from several threads."""

    intercepted_binops = frozenset({"+", "*", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationTag, loopcontrols],
            finalize=self._finalize,
            cache_size=0,
        )
        self._local = threading.local()
        self.concat = self._joined  # type: ignore[method-assign]
        self.globals = {
            "range": safe_range,
            "dict": dict,
            "namespace": _Namespace,
            "cycler": Cycler,
            "joiner": Joiner,
            "raise_exception": _raise_exception,
            # Replaced at each rendering by the date asked for.
            "strftime_now": functools.partial(strftime, datetime.datetime.min),
        }
        offered = {name: FILTERS[name] for name in _FILTERS} | {
            "batch": self._batch,
            "center": self._center,
            "format": self._format,
            "indent": self._indent,
            "join": self._join,
            "replace": self._replace,
            "round": _round,
            "sum": _sum,
            "tojson": self._to_json,
        }
        self.filters = {name: self._bounded(function) for name, function in offered.items()}
        self.filters["_counted"] = self._counted
        self.filters["_measured"] = self._measured
        self.filters["_concatenated"] = self._joined

    # ---- compiling and rendering

    def prepare(self, source: str) -> tuple[Template, frozenset[str]]:
        """A compiled template and the names of the variables that it reads from outside."""
        if len(source) > MAX_SOURCE:
            raise LimitError(f"has {len(source)} characters; at most {MAX_SOURCE} are read")
        self._local.budget = Budget(4 * len(source) + 65536)
        try:
            tree = self.parse(source)
            names = frozenset(find_undeclared_variables(tree))
            code = self.compile(_Instrument().visit(tree))
        except RecursionError:
            raise TemplateSyntaxError("is nested too deeply", 1) from None
        return Template.from_code(self, code, self.make_globals(None)), names

    def run(self, template: Template, variables: Mapping[str, Any], size: int) -> str:
        """Renders within a budget of `size` characters."""
        self._local.budget = budget = Budget(size)
        pieces: list[str] = []
        written = 0
        for piece in template.generate(variables):
            written += len(piece)
            budget.length(written)
            budget.step()
            pieces.append(piece)
        return "".join(pieces)

    @property
    def budget(self) -> Budget:
        """The budget of the rendering that this thread is at."""
        budget: Budget | None = getattr(self._local, "budget", None)
        if budget is None:
            budget = self._local.budget = Budget(65536)
        return budget

    # ---- hooks of the sandbox

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Allows of strings' methods the ones whose result is bounded, of numbers' none."""
        if isinstance(obj, str) and attr not in _STRING_METHODS:
            return False
        if isinstance(obj, (int, float, bytes, type)):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Refuses at once; Jinja's own answer would print as an empty string."""
        raise SecurityError(f"reaches for {attribute!r} of {type(obj).__name__!r}")

    def call(
        __self,  # noqa: B902
        __context: Context,
        __obj: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Calls on behalf of a template, and measures what comes back."""
        __self.budget.step()
        if isinstance(__obj, types.BuiltinMethodType) and isinstance(__obj.__self__, str):
            args = __self._string_call(__obj.__self__, __obj.__name__, args, kwargs)
        return __self._result(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`+`, `*`, `%` and `**`, measured before they are carried out."""
        budget = self.budget
        budget.step()
        if operator == "%" and isinstance(left, str):
            values = right if isinstance(right, tuple) else (right,)
            self._percent_format(left, values)
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (abs(right) if operator == "**" else 1) + right.bit_length()
            if bits > _MAX_INT_BITS:
                raise LimitError(f"computes a number of more than {_MAX_INT_BITS} bits")
        elif operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(value, (str, list, tuple)) and isinstance(count, int):
                    budget.length(weight(value, budget.size) * count)
        elif operator == "+":
            budget.length(weight(left, budget.size) + weight(right, budget.size))
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` inside of the sandbox, its widths and repetitions measured."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        template: str = value.__self__

        def formatted(*args: Any, **kwargs: Any) -> str:
            fields = 0
            for _, name, specification, _ in Formatter().parse(template):
                fields += name is not None
                if specification and re.search(r"\{|\d{4}", specification):
                    raise LimitError("uses a format width that is too large or computed")
            self._repeated(template, fields, (*args, *kwargs.values()))
            return wrapped(*args, **kwargs)

        return formatted

    # ---- measuring

    def _finalize(self, value: Any) -> Any:
        self.budget.value(value)
        return value

    def _result(self, value: Any) -> Any:
        if isinstance(value, (str, list, tuple, dict)):
            self.budget.value(value)
        elif isinstance(value, types.GeneratorType):
            return self._counted(value)
        return value

    def _measured(self, value: Any) -> Any:
        self.budget.value(value)
        return value

    def _counted(self, iterable: Iterable[Any]) -> Iterator[Any]:
        budget, total = self.budget, 0
        for item in iterable:
            budget.step()
            if not isinstance(item, (list, tuple, dict)):  # those were measured when made
                total += weight(item, budget.size)
                # A list of them may hold one value many times, hence the slack.
                budget.length(total // 16)
            yield item

    def _bounded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.budget.step()
            return self._result(function(*args, **kwargs))

        return bounded

    def _joined(self, values: Iterable[Any]) -> str:
        budget, total, pieces = self.budget, 0, []
        for value in values:
            budget.value(value)
            text = str(value)
            total += len(text)
            budget.length(total)
            pieces.append(text)
        return "".join(pieces)

    def _repeated(self, template: str, fields: int, values: tuple[Any, ...]) -> None:
        size = self.budget.size
        largest = max((weight(value, size) for value in values), default=0)
        self.budget.length(len(template) + fields * largest)

    def _percent_format(self, template: str, values: tuple[Any, ...]) -> None:
        if re.search(r"%[^%a-zA-Z]*(\d{4}|\*)", template):
            raise LimitError("uses a format width that is too large or computed")
        self._repeated(template, template.count("%"), values)

    def _string_call(
        self, text: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...]:
        length = self.budget.length
        if method in ("center", "ljust", "rjust", "zfill") and args:
            length(_whole(args[0]))
        elif method == "expandtabs":
            size = args[0] if args else kwargs.get("tabsize", 8)
            length(len(text) + text.count("\t") * _whole(size))
        elif method == "replace" and len(args) >= 2:
            self._measure_replace(text, args[0], args[1])
        elif method == "join" and len(args) == 1:
            items = list(self._counted(args[0]))
            length(len(text) * len(items) + sum(weight(item, self.budget.size) for item in items))
            return (items,)
        return args

    def _measure_replace(self, text: str, old: Any, new: Any) -> None:
        old, new = str(old), str(new)
        self.budget.length(len(text) + (text.count(old) if old else len(text) + 1) * len(new))

    # ---- filters whose result may be larger than what they are given

    def _batch(self, value: Iterable[Any], linecount: int, fill_with: Any = None) -> Iterator[Any]:
        self.budget.length(_whole(linecount))
        filled: Iterator[Any] = FILTERS["batch"](value, linecount, fill_with)
        return filled

    def _center(self, value: Any, width: int = 80) -> str:
        self.budget.length(_whole(width))
        return str(value).center(width)

    def _format(self, value: Any, *args: Any, **kwargs: Any) -> str:
        if args and kwargs:
            raise TemplateRuntimeError("format takes positional or keyword arguments, not both")
        self._percent_format(str(value), (*args, *kwargs.values()))
        formatted: str = str(value) % (kwargs or args)
        return formatted

    def _indent(
        self, s: Any, width: int | str = 4, first: bool = False, blank: bool = False
    ) -> str:
        text = str(s)
        size = len(width) if isinstance(width, str) else _whole(width)
        self.budget.length(len(text) + (len(text.splitlines()) + 1) * size)
        indented: str = FILTERS["indent"](text, width, first, blank)
        return indented

    def _join(self, value: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            value = [self.getitem(item, attribute) for item in self._counted(value)]
        separator = str(d)
        pieces: list[Any] = []
        for item in self._counted(value):
            pieces += [separator, item] if pieces else [item]
        return self._joined(pieces)

    def _replace(self, s: Any, old: Any, new: Any, count: int = -1) -> str:
        text = str(s)
        self._measure_replace(text, old, new)
        return text.replace(str(old), str(new), -1 if count is None else count)

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as transformers writes it: no HTML escapes, any script as it is."""
        self.budget.value(value)
        for text in (*(separators or ()), indent):
            if (len(text) if isinstance(text, str) else text or 0) > _MAX_SEPARATOR:
                raise LimitError("writes JSON with an indent or separator that is too large")
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        # Piece by piece: deep indents can be far larger than the value.
        return self._joined(encoder.iterencode(value))


def _whole(value: Any) -> int:
    if not isinstance(value, int):
        raise TemplateRuntimeError(f"expected a whole number, found {type(value).__name__}")
    return value


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    if abs(_whole(precision)) > 20:
        raise LimitError("rounds to more than 20 places")
    rounded: float = FILTERS["round"](value, precision, method)
    return rounded


def _sum(iterable: Iterable[float], start: float = 0) -> float:
    # Numbers only: adding up lists takes quadratic time.
    total = start
    for item in iterable:
        if not isinstance(item, (int, float)) or not isinstance(start, (int, float)):
            raise TemplateRuntimeError("sum adds numbers only")
        total += item
    return total


def _raise_exception(message: Any) -> NoReturn:
    raise JinjaError(str(message))


_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
)


def strftime(moment: datetime.datetime, pattern: str) -> str:
    """`strftime` in English whatever the locale: templates were trained with English names."""
    if len(pattern) > 256 or re.search(r"%[-_0^#EO]*\d", pattern):
        raise LimitError("asks for a date in too long a format")
    month, day = _MONTHS[moment.month - 1], _DAYS[moment.weekday()]
    names = {"%%": "%%", "%B": month, "%b": month[:3], "%A": day, "%a": day[:3]}
    return moment.strftime(re.sub(r"%[%BbAa]", lambda found: names[found[0]], pattern))


@functools.cache
def environment() -> TemplateEnvironment:
    """The one environment of this process."""
    return TemplateEnvironment()
