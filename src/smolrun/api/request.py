"""What may be asked of an answer, and how that becomes a request of the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from smolrun.engine.answer import Answer
from smolrun.engine.guide import ChatGuide, TextGuide
from smolrun.engine.sampling import Constraint, SamplingParameters, sampling_parameters
from smolrun.engine.thinking import ThinkingLimiter, tokens_for_thinking
from smolrun.errors import RequestError, TemplateError
from smolrun.text.thinking import thinking_of

if TYPE_CHECKING:
    import datetime

    from smolrun.engine.answer import CallParser
    from smolrun.engine.load import LoadedModel
    from smolrun.text.chat import ChatTemplate
    from smolrun.text.code_calls import Signatures
    from smolrun.text.grammar import GrammarCompiler, Matcher
    from smolrun.text.structure import Structure
    from smolrun.text.thinking import ReasoningEffort
    from smolrun.text.tokenizer import Tokenizer
    from smolrun.text.tool_calls import ToolPlan

Messages = str | Sequence[Mapping[str, Any]]


class SamplingArguments(TypedDict, total=False):
    """How to sample. What is left out, or None, is as the model's files or makers recommend.

    The order is: logit bias, penalties, structure and thinking, temperature, top-k, top-p, min-p.
    """

    max_tokens: int | None  # tokens to generate at most; default: what the context leaves
    temperature: float | None  # 0 to 100; 0 always takes the likeliest token
    top_k: int | None  # only the k likeliest; 0 or -1: all
    top_p: float | None  # only the likeliest that together reach p
    min_p: float | None  # only those at least p times as likely as the likeliest
    repeat_penalty: float | None  # on logits of the last 64 tokens: positive ones are divided by
    # it, negative ones multiplied; 1 is off
    presence_penalty: float | None  # -2 to 2, off the logit of each token of the answer so far
    frequency_penalty: float | None  # -2 to 2, likewise, times how often it occurred
    logit_bias: Mapping[int, float] | None  # token id: -100 to 100, added to its logit
    seed: int | None  # 0 to 2**64 - 1; default: a random one, which the result tells
    stop: str | Sequence[str] | None  # the answer ends before the first of these
    logprobs: bool | None  # log-probabilities of the model's own logits
    top_logprobs: int | None  # and of so many likeliest tokens, at most 20
    ignore_eos: bool | None  # go on past end-of-text tokens, for measurements


class TextArguments(SamplingArguments, total=False):
    """How to sample, and what form the text must have: one of four, or any.

    An answer that `max_tokens` cuts off (`finish_reason` "length") is only the beginning of one.
    """

    # {"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": ...}}, a JSON
    # Schema itself, or a class with `model_json_schema()` as pydantic's
    response_format: Mapping[str, Any] | type | None
    regex: str | None  # of the whole text; Rust's syntax, no look-around or backreferences
    grammar: str | None  # in Lark's or llama.cpp's (GBNF) notation
    choices: Sequence[str] | None  # one of these texts


class ChatArguments(TextArguments, total=False):
    """What may be asked of the answer to a conversation. Structure begins after the reasoning."""

    think: bool | None  # reason before the answer, or not; None leaves it to the model
    thinking_budget: int | None  # most tokens of reasoning; 0: none, -1: as many as it takes
    reasoning_effort: ReasoningEffort | None  # the same in words
    # Functions that it may call, as JSON Schema objects, or in Python (see `function_tool`)
    tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None
    # "auto" (default), "none", "required", or the name of the tool that it must call
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None  # several calls in one answer; default: yes
    date: datetime.date | None  # what the model takes for today; None is the real date
    template_arguments: Mapping[str, Any] | None  # see `smolrun.text.chat.TEMPLATE_ARGUMENTS`
    keep_reasoning: bool | None  # leave the reasoning of past answers in the prompt
    continue_final_message: bool | None  # the last message is an answer that has begun: go on
    separate_reasoning: bool | None  # False: leave it in the text, between its tags


@dataclass(frozen=True)
class PreparedRequest:
    """What `Engine.submit` takes."""

    prompt: list[int]
    parameters: SamplingParameters
    answer: Answer
    constraint: Constraint | None


def tokenizer_of(loaded: LoadedModel) -> Tokenizer:
    """RequestError for a model that has none."""
    if loaded.tokenizer is None:
        raise RequestError(f"{loaded.name}: this model has no tokenizer; pass token ids")
    return loaded.tokenizer


def template_of(loaded: LoadedModel) -> ChatTemplate:
    """TemplateError for a model that has none."""
    if loaded.template is None:
        raise TemplateError(
            f"{loaded.name}: this model has no chat template; use generate() with plain text"
        )
    return loaded.template


def as_messages(messages: Messages) -> Sequence[Mapping[str, Any]]:
    """A text is the message of a user."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    return messages


def prepare_text(
    loaded: LoadedModel, prompt: list[int], arguments: Mapping[str, Any]
) -> PreparedRequest:
    """A request that continues token ids; arguments and errors as of `Model.generate`."""
    given = dict(arguments)
    structure = _structure(given)
    parameters = sampling_parameters(given, loaded.sampling, loaded.config.vocab_size)
    guide = None
    if structure is not None:
        guide = TextGuide(_matcher(loaded, structure, parameters))
    answer = Answer(loaded.tokenizer, prompt, parameters, chat=False, guide=guide)
    return PreparedRequest(prompt, parameters, answer, guide)


def prepare_chat(
    loaded: LoadedModel, messages: Messages, arguments: Mapping[str, Any]
) -> PreparedRequest:
    """A request that answers a conversation; arguments and errors as of `Model.chat`."""
    given = dict(arguments)
    structure = _structure(given)
    signatures = _code_signatures(given)
    tools, plan = _tools(given)
    thinking = thinking_of(
        given.pop("think", None),
        given.pop("thinking_budget", None),
        given.pop("reasoning_effort", None),
    )
    template = template_of(loaded)
    prompt = template.encode(
        as_messages(messages),
        tools=tools if plan is not None else None,
        enable_thinking=thinking.enabled,
        date=given.pop("date", None),
        template_arguments=given.pop("template_arguments", None),
        keep_reasoning=bool(given.pop("keep_reasoning", None)),
        continue_final=bool(given.pop("continue_final_message", None)),
    )
    separate = given.pop("separate_reasoning", None) is not False
    parameters = sampling_parameters(given, loaded.sampling, loaded.config.vocab_size)
    tokenizer = tokenizer_of(loaded)
    matcher = None
    calls: CallParser | None = None
    if structure is not None or (plan is not None and plan.required):
        signatures = None  # it must have another form
    if plan is not None:
        from smolrun.text.tool_calls import ToolCallParser, tool_matcher

        calls = ToolCallParser(tokenizer)
        grammars = _grammars(loaded, "tools", parameters)
        matcher = tool_matcher(
            grammars, tokenizer, plan, template.tool_call_style, structure, code=bool(signatures)
        )
    elif structure is not None:
        matcher = _matcher(loaded, structure, parameters)
    if signatures:
        from smolrun.text.code_calls import CodeCallParser, MixedCallParser

        calls = (MixedCallParser if plan else CodeCallParser)(tokenizer, signatures)
    limiter = None
    thinks = template.supports_thinking and thinking.enabled is not False
    if thinking.limited or (matcher is not None and thinks):
        room = max(loaded.engine.context_size - len(prompt), 0)
        room = room if parameters.max_tokens is None else min(parameters.max_tokens, room)
        stop_ids = () if parameters.ignore_eos else loaded.stop_ids
        limiter = ThinkingLimiter(tokenizer, tokens_for_thinking(thinking.budget, room), stop_ids)
    guide = ChatGuide(tokenizer, prompt, limiter, matcher) if limiter or matcher else None
    answer = Answer(
        tokenizer, prompt, parameters, chat=True, separate=separate, guide=guide, calls=calls
    )
    return PreparedRequest(prompt, parameters, answer, guide)


def _structure(given: dict[str, Any]) -> Structure | None:
    """Takes the arguments that ask for a form out of `given`."""
    names = ("response_format", "regex", "grammar", "choices")
    asked = {name: given.pop(name, None) for name in names}
    if all(value is None for value in asked.values()):
        return None
    from smolrun.text.structure import structure_of  # few requests need it, and all would wait

    return structure_of(**asked)


def _tools(given: dict[str, Any]) -> tuple[list[Any] | None, ToolPlan | None]:
    """Takes tools and how to call them out of `given`."""
    tools, choice, parallel = (
        given.pop(name, None) for name in ("tools", "tool_choice", "parallel_tool_calls")
    )
    arguments = given.get("template_arguments")
    beside = arguments.get("xml_tools") if isinstance(arguments, Mapping) else None
    if tools is None and choice is None and parallel is None and beside is None:
        return None, None
    from smolrun.text.tool_calls import as_tools, described_tools, tool_plan

    tools = as_tools(tools)
    # What the template is given under its own name can be called as well.
    return tools, tool_plan(described_tools(beside) if tools is None else tools, choice, parallel)


def _code_signatures(given: Mapping[str, Any]) -> Signatures | None:
    """What the template's `python_tools` define; None where no calls of them are to be read."""
    arguments = given.get("template_arguments")
    tools = arguments.get("python_tools") if isinstance(arguments, Mapping) else None
    if not isinstance(tools, list) or not tools or given.get("tool_choice") == "none":
        return None
    if given.get("parallel_tool_calls") is False:
        raise RequestError("parallel_tool_calls: Python may make several calls; leave it out")
    from smolrun.text.code_calls import signatures_of

    return signatures_of(tools)


def _matcher(loaded: LoadedModel, structure: Structure, parameters: SamplingParameters) -> Matcher:
    grammars = _grammars(loaded, structure.field, parameters)
    return grammars.compile(structure.lark, structure.field)


def _grammars(loaded: LoadedModel, field: str, parameters: SamplingParameters) -> GrammarCompiler:
    if parameters.ignore_eos:
        raise RequestError(f"ignore_eos and {field} contradict each other")
    if loaded.grammars is None:
        raise RequestError(f"{field}: {loaded.name} has no tokenizer")
    return loaded.grammars
