"""A conversation to the text, and the token ids, that a model was trained to answer.

The model's own Jinja template does it, in the sandbox of `smolrun.text.sandbox`. Text of messages
stays text: `<|im_end|>` in what a user writes ends no turn (`ChatTemplate.encode`).
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from smolrun.errors import RequestError, TemplateError
from smolrun.text.messages import MessageStyle, normalize_messages

if TYPE_CHECKING:
    from smolrun.text.tokenizer import Tokenizer
    from smolrun.text.tools import ToolCallStyle

TEMPLATE_ARGUMENTS = {"enable_thinking": bool, "xml_tools": list, "python_tools": list}
"""What a request may hand to a template beside messages and tools, and its type."""

# SHA-256 of the templates in circulation, without surrounding whitespace. They are known to be
# harmless, so they need no trial: starting a process for one takes about 0.1 s of a load that is
# otherwise as short.
_KNOWN_TEMPLATES = frozenset(
    {
        "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",  # SmolLM2
        "d81783689eec63dd44205be10a85675cadfd2319927b15e676f46b3ee18696f5",  # SmolLM3, Hub
        "3e0e275a527f249670056e0078e474eadbdd007c134b4fdfae5a7b3089702814",  # SmolLM3, Hub
        "0dab472abbdc499c8d82acae3ad6e8404f672d2d50d9df582181daf062f66eb7",  # SmolLM3, at launch
        "b9b66f04c64fbb8695cf5b35c37780efd0b8e0829fbfe3e30fafb9f469b7d30e",  # SmolLM3, ggml-org
        "cbc1d50f777ec029b33f53b23d7a224cceb65bcc8c7fac54946dbb56514e4d1e",  # SmolLM3, Unsloth
    }
)

# Stands for the first character of control tokens in messages while these are rendered, so that
# markup of the template can be told from text that looks like it. Letters (of Linear A), because
# templates may strip, escape or upper-case.
_GUARDS = tuple(chr(0x10600 + place) for place in range(0x130))

_MARK = "smolrun-was-here"
# Conversations that show whether a template renders a later system message, or a tool's result.
_TRIALS = {
    "system": [("user", "a"), ("system", _MARK), ("user", "b")],
    "tool": [("user", "a"), ("assistant", "b"), ("tool", _MARK)],
}


class ChatTemplate:
    """The chat template of one model, compiled.

    Args:
        source: Jinja source.
        tokenizer: of the same model; names the special tokens and encodes what is rendered.
        origin: where the source comes from, for error messages.

    Raises:
        TemplateError: the template is broken, or fails its trial (see `probe`).
    """

    def __init__(self, source: str, tokenizer: Tokenizer, origin: str) -> None:
        self.source = source
        self.origin = origin
        self._tokenizer = tokenizer
        self._special = _special_token_texts(tokenizer)
        self.probe()
        self._template, self._names = self._compile()
        self._honoured_roles: dict[str, bool] = {}

    @property
    def supports_thinking(self) -> bool:
        """Whether the template lets thinking be switched on and off."""
        return "enable_thinking" in self._names

    @property
    def supports_tools(self) -> bool:
        """Whether the template has a place for tools."""
        return bool(self._names & {"tools", "xml_tools"})

    @property
    def tool_call_style(self) -> ToolCallStyle:
        """How the model writes calls of tools."""
        return "objects" if self.supports_tools or self.supports_thinking else "list"

    def probe(self) -> None:
        """Tries the template in a child process with limits, unless it is a well-known one.

        Raises:
            TemplateError: it is broken, reaches for what it may not, or takes too much.
        """
        known = hashlib.sha256(self.source.strip().encode("utf-8", "replace")).hexdigest()
        if known not in _KNOWN_TEMPLATES:
            from smolrun.text import probe as trial

            trial.probe(self.source, self._special, self.origin)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        date: datetime.date | None = None,
        add_generation_prompt: bool = True,
        template_arguments: Mapping[str, Any] | None = None,
        keep_reasoning: bool = False,
        continue_final: bool = False,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: objects with `role` and `content`, in order; see `normalize_messages`.
            tools: descriptions of the functions that the model may call (JSON Schema objects).
            enable_thinking: True or False; None leaves it to the template.
            date: what the template takes for today; None is the real date.
            add_generation_prompt: open the answer's turn at the end.
            template_arguments: further variables, of `TEMPLATE_ARGUMENTS` only.
            keep_reasoning: leave the reasoning of past answers in.
            continue_final: the last message is an answer that has begun; the text ends with it.

        Raises:
            RequestError: an argument is not what it should be; names its field.
            TemplateError: the template refuses the messages or has no place for the tools.
        """
        variables = self._variables(
            messages,
            tools,
            enable_thinking,
            add_generation_prompt,
            template_arguments,
            keep_reasoning,
            continue_final,
        )
        text = self._render_checked(variables, date)
        return self._begun(text) if continue_final else text

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        date: datetime.date | None = None,
        add_generation_prompt: bool = True,
        template_arguments: Mapping[str, Any] | None = None,
        keep_reasoning: bool = False,
        continue_final: bool = False,
    ) -> list[int]:
        """Token ids of a conversation; arguments and errors as of `render`.

        Only the template writes control tokens: their text inside of messages, tools or
        arguments is encoded as ordinary text. Where there is none, these are the ids of
        `render`'s text. No beginning-of-sequence token is put in front; templates write it.
        """
        variables = self._variables(
            messages,
            tools,
            enable_thinking,
            add_generation_prompt,
            template_arguments,
            keep_reasoning,
            continue_final,
        )
        date = date or datetime.date.today()  # midnight must not pass between two renderings
        text = self._render_checked(variables, date)
        try:
            guarded = self._guarded_rendering(variables, text, date)
        except RecursionError:
            raise RequestError("messages or tools are nested too deeply") from None
        if guarded is None:
            return self._tokenizer.encode(
                self._begun(text) if continue_final else text, add_bos=False
            )
        rendered, guards = guarded
        return self._encode_guarded(self._begun(rendered) if continue_final else rendered, guards)

    def render_variables(self, variables: Mapping[str, Any], date: datetime.date | None) -> str:
        """Renders variables as they are: nothing is checked, changed or added but the date."""
        from smolrun.text import sandbox

        if date is None:
            moment = datetime.datetime.now()
        elif not isinstance(date, datetime.date):
            raise RequestError(f"date: expected a datetime.date, found {date!r:.80}")
        else:
            moment = datetime.datetime(date.year, date.month, date.day)
        given: dict[str, Any] = {**self._special, **variables}
        given["strftime_now"] = functools.partial(sandbox.strftime, moment)
        size = 4 * (sandbox.weight(given, 1 << 30) + len(self.source)) + 65536
        try:
            return sandbox.environment().run(self._template, given, size)
        except (sandbox.LimitError, RecursionError) as error:
            reason = "it does not end" if isinstance(error, RecursionError) else f"it {error}"
            raise TemplateError(f"{self.origin}: the chat template was stopped: {reason}") from None
        except Exception as error:
            raise TemplateError(
                f"{self.origin}: the chat template does not accept these messages: {error}"
            ) from error

    def _compile(self) -> tuple[Any, frozenset[str]]:
        from jinja2.exceptions import TemplateError as JinjaError

        from smolrun.text import sandbox

        try:
            return sandbox.environment().prepare(self.source)
        except (JinjaError, SyntaxError) as error:
            raise TemplateError(f"{self.origin}: not a usable chat template: {error}") from error

    # ---- arguments

    def _variables(
        self,
        messages: object,
        tools: object,
        enable_thinking: bool | None,
        add_generation_prompt: bool,
        template_arguments: object,
        keep_reasoning: bool,
        continue_final: bool,
    ) -> dict[str, Any]:
        variables = self._checked_arguments(template_arguments)
        if enable_thinking is not None:
            if variables.get("enable_thinking", enable_thinking) != enable_thinking:
                raise RequestError(
                    "template_arguments.enable_thinking contradicts the argument enable_thinking"
                )
            variables["enable_thinking"] = enable_thinking
        thinking = variables.get("enable_thinking")
        if thinking is not None and not isinstance(thinking, bool):
            raise RequestError(
                f"enable_thinking: expected true or false, found {type(thinking).__name__}"
            )
        if thinking and not self.supports_thinking:
            raise TemplateError(f"{self.origin}: this model's chat template has no thinking mode")
        as_code = bool(variables.get("python_tools"))
        beside = tools or variables.get("xml_tools")
        style = MessageStyle(
            reads_tool_calls="tool_calls" in self.source,
            tool_calls="code" if as_code and not beside else self.tool_call_style,
            code=_only_in_code(variables["python_tools"], beside) if as_code else frozenset(),
            thinks=self.supports_thinking,
        )
        made = normalize_messages(messages, style, keep_reasoning=keep_reasoning)
        if continue_final and made[-1]["role"] == "assistant":  # it may have begun to reason
            made[-1:] = normalize_messages(messages[-1:], style, keep_reasoning=True)  # type: ignore[index]
        self._check_roles(made)
        variables.update(self._tool_variables(tools, variables, made))
        if continue_final:
            self._mark_final(messages, made, style)
        variables["messages"] = made
        variables["add_generation_prompt"] = bool(add_generation_prompt) and not continue_final
        return variables

    def _mark_final(
        self, messages: Any, made: list[dict[str, object]], style: MessageStyle
    ) -> None:
        """Marks the end of the last message, which is an answer that has begun."""
        last = made[-1]
        if last["role"] != "assistant" or messages[-1].get("tool_calls") or not last["content"]:
            raise RequestError(
                "continue_final_message: expected text of the assistant as the last message"
            )
        last["content"] = f"{last['content']}{_MARK}"

    def _begun(self, text: str) -> str:
        """A rendering up to the mark."""
        begun, mark, _ = text.rpartition(_MARK)
        if not mark:
            raise TemplateError(
                f"{self.origin}: the chat template does not leave the last message as it is, so "
                "nothing can go on with it"
            )
        return begun

    def _checked_arguments(self, arguments: object) -> dict[str, Any]:
        if arguments is None:
            return {}
        if not isinstance(arguments, Mapping):
            raise RequestError(
                f"template_arguments: expected an object, found {type(arguments).__name__}"
            )
        for name, value in arguments.items():
            expected = TEMPLATE_ARGUMENTS.get(name)
            if expected is None:
                raise RequestError(
                    f"template_arguments.{name}: not an argument of templates; "
                    f"known are {', '.join(TEMPLATE_ARGUMENTS)}"
                )
            if not isinstance(value, expected):
                raise RequestError(
                    f"template_arguments.{name}: expected {expected.__name__}, "
                    f"found {type(value).__name__}"
                )
            if name not in self._names and not (name == "enable_thinking" and not value):
                raise TemplateError(
                    f"{self.origin}: this model's chat template does not read {name!r}"
                )
        return dict(arguments)

    def _tool_variables(
        self, tools: object, given: Mapping[str, Any], messages: Sequence[Mapping[str, object]]
    ) -> dict[str, Any]:
        if tools is None:
            return {}
        if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
            raise RequestError(f"tools: expected a list of tools, found {type(tools).__name__}")
        names = []
        for index, tool in enumerate(tools):
            if not isinstance(tool, Mapping):
                raise RequestError(
                    f"tools[{index}]: expected an object, found {type(tool).__name__}"
                )
            function = tool.get("function", tool)
            name = function.get("name") if isinstance(function, Mapping) else None
            if not isinstance(name, str) or not name:
                raise RequestError(f"tools[{index}]: expected a function with a name")
            names.append(name)
        if not tools:
            return {}
        if "tools" in self._names:
            return {"tools": list(tools)}
        if "xml_tools" not in self._names:
            first = messages[0]
            if first["role"] == "system" and all(name in str(first["content"]) for name in names):
                return {}
            raise TemplateError(
                f"{self.origin}: this model's chat template has no place for tools; name each of "
                "them in a system message, in the words that the model was trained on"
            )
        if given.get("xml_tools"):
            raise TemplateError(
                f"{self.origin}: this model's chat template has no place for tools beside those "
                "of template_arguments"
            )
        return {"xml_tools": list(tools)}

    def _check_roles(self, messages: Sequence[Mapping[str, object]]) -> None:
        """Refuses messages that the template would leave out without a word."""
        for index, message in enumerate(messages):
            role = str(message["role"])
            if role not in _TRIALS or (role == "system" and index == 0):
                continue
            if role not in self._honoured_roles:
                self._honoured_roles[role] = self._honours(_TRIALS[role])
            if not self._honoured_roles[role]:
                expected = (
                    "a system message may only come first"
                    if role == "system"
                    else (f"it knows no role {role!r}")
                )
                raise TemplateError(
                    f"{self.origin}: the chat template would leave out messages[{index}]: "
                    f"{expected}"
                )

    def _honours(self, conversation: Sequence[tuple[str, str]]) -> bool:
        messages = [{"role": role, "content": content} for role, content in conversation]
        variables = {"messages": messages, "add_generation_prompt": False}
        try:
            return _MARK in self.render_variables(variables, None)
        except TemplateError:
            return True  # it speaks for itself when it comes to the real messages

    def _render_checked(self, variables: Mapping[str, Any], date: datetime.date | None) -> str:
        text = self.render_variables(variables, date)
        for name in ("tools", "xml_tools", "python_tools"):
            if variables.get(name):
                without = {key: value for key, value in variables.items() if key != name}
                try:
                    left_out = self.render_variables(without, date) == text
                except TemplateError:  # it can not do without them
                    left_out = False
                if left_out:
                    raise TemplateError(
                        f"{self.origin}: the chat template leaves {name} out of this conversation"
                        " (a system message with /system_override replaces them)"
                    )
        return text

    # ---- control tokens

    @functools.cached_property
    def _guard_of(self) -> dict[str, str]:
        """First characters of control tokens, each with its guard."""
        firsts = sorted({text[0] for text in self._tokenizer.control_tokens if text})
        if len(firsts) > len(_GUARDS):
            raise TemplateError(
                f"{self._tokenizer.origin}: control tokens begin with {len(firsts)} different "
                f"characters; at most {len(_GUARDS)} can be told from text"
            )
        return dict(zip(firsts, _GUARDS, strict=False))

    @functools.cached_property
    def _control(self) -> re.Pattern[str]:
        """Finds control tokens, longest first."""
        texts = sorted(self._tokenizer.control_tokens, key=len, reverse=True)
        return re.compile("|".join(re.escape(text) for text in texts if text))

    def _guarded_rendering(
        self, variables: Mapping[str, Any], text: str, date: datetime.date
    ) -> tuple[str, dict[str, str]] | None:
        """The text with what looks like a control token inside of messages guarded.

        Returns:
            The text and the guards in it (guard -> character), or None if the template's own
            control tokens are all there are.
        """
        guards, given = self._guard_of, dict(variables)
        if not any(first in string for string in _strings(given) for first in guards):
            return None
        if any(guard in text for guard in guards.values()):
            free = [guard for guard in _GUARDS if guard not in text]
            if len(free) < len(guards):
                raise RequestError("messages: every character that could mark their text is in it")
            guards = dict(zip(guards, free, strict=False))
        restore = {guard: first for first, guard in guards.items()}
        # Every first character is guarded, so that no token can come about by what the template
        # cuts out of a text. A template that looks for that character itself renders something
        # else then: for it only whole tokens are guarded.
        firsts = re.compile("|".join(map(re.escape, guards)))
        for pattern in (firsts, self._control):
            guard = functools.partial(pattern.sub, lambda found: guards[found[0][0]] + found[0][1:])
            rendered = self.render_variables(_mapped(variables, guard), date)
            if _restored(rendered, restore) == text:
                break
        if len(self._control.findall(rendered)) == len(self._control.findall(text)):
            return None
        return rendered, restore

    def _encode_guarded(self, rendered: str, restore: Mapping[str, str]) -> list[int]:
        ids: list[int] = []
        start = 0
        for found in [*self._control.finditer(rendered), None]:
            stop = len(rendered) if found is None else found.start()
            piece = _restored(rendered[start:stop], restore)
            ids += self._tokenizer.encode(piece, parse_special=False, add_bos=False)
            if found is not None:
                token_id = self._tokenizer.id_of(found[0])
                assert token_id is not None
                ids.append(token_id)
                start = found.end()
        return ids


def _only_in_code(python_tools: Sequence[object], others: object) -> frozenset[str]:
    """Names of tools that can be called from Python and in no other way."""
    from smolrun.text.code_calls import signatures_of  # few conversations need it

    named = signatures_of(others) if isinstance(others, Sequence) else {}
    return frozenset(signatures_of(python_tools)) - frozenset(named)


def _restored(text: str, restore: Mapping[str, str]) -> str:
    return text.translate({ord(guard): first for guard, first in restore.items()})


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _mapped(value: Any, change: Any, *, top: bool = True) -> Any:
    """A copy with every string changed, names of variables and of messages' fields excepted."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            key if top or not isinstance(key, str) else change(key): _mapped(
                item, change, top=top and key == "messages"
            )
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_mapped(item, change, top=top) for item in value]
    return value


def _special_token_texts(tokenizer: Tokenizer) -> dict[str, str]:
    ids = {
        "bos_token": tokenizer.bos_token_id,
        "eos_token": tokenizer.eos_token_id,
        "pad_token": tokenizer.pad_token_id,
    }
    return {name: tokenizer.decode([i]) for name, i in ids.items() if i is not None}
