"""What requests may hold. A field that is not here is an error that names it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

from smolrun.engine.sampling import (
    LEAST_PENALTY,
    MAX_LOGIT_BIASES,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_TOP_LOGPROBS,
)
from smolrun.server.limits import Limits

_LIMITS = Limits()
_INT32 = 2**31 - 1


def _only(value: bool, why: str) -> AfterValidator:
    """For a flag that can have one value. `Literal[False]` would take 0, which equals it."""

    def check(given: bool) -> bool:
        if given is not value:
            raise ValueError(why)
        return given

    return AfterValidator(check)


_FALSE = WithJsonSchema({"type": "boolean", "const": False})
StoresNothing = Annotated[bool, _only(False, "nothing is stored"), _FALSE]

TokenId = Annotated[int, Field(ge=0, le=_INT32)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Choices = Annotated[int, Field(ge=1, le=_LIMITS.choices)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Strict(BaseModel):
    """No unknown fields, and no value taken for one of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class StreamOptions(Strict):
    """How a stream is sent."""

    include_usage: bool = False


class Generation(Strict):
    """What requests for text have in common."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0, le=_INT32)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Choices | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Annotated[int, Field(ge=0, le=2**64 - 1)] | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=r"^[0-9]{1,10}$")],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Field(max_length=MAX_LOGIT_BIASES),
        ]
        | None
    ) = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_INT32)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(ge=LEAST_PENALTY, le=10)] | None = None
    repetition_penalty: Annotated[float, Field(ge=LEAST_PENALTY, le=10)] | None = None
    ignore_eos: bool | None = None
    return_tokens: bool | None = None
    return_progress: bool | None = None
    timings_per_token: bool | None = None
    cache_prompt: bool | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    metadata: dict[str, str] | None = None
    store: StoresNothing | None = None


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    """A call that an assistant made: the arguments are JSON text, or an object."""

    name: Annotated[str, Field(min_length=1)]
    arguments: str | dict[str, Any] | None = None


class ToolCall(Strict):
    """A call of a past answer."""

    id: str | None = None
    type: Literal["function"] | None = None
    index: int | None = None
    function: CalledFunction


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    # What clients send back of an answer as they received it.
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class Function(Strict):
    """A function that a model may call."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool; there are only functions."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """Names a function."""

    name: str


class NamedTool(Strict):
    """A tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class PlainFormat(Strict):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"]


class JsonSchema(Strict):
    """A schema with a name."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | bool, Field(alias="schema")]
    strict: bool | None = None


class SchemaFormat(Strict):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class TemplateArguments(Strict):
    """What a request may hand to the chat template."""

    enable_thinking: bool | None = None
    xml_tools: list[Any] | None = None
    python_tools: list[Any] | None = None


class Reasoning(Strict):
    """The effort, as in OpenAI's newer routes."""

    effort: Effort | None = None


class Thinking(Strict):
    """Thinking, as Anthropic spells it."""

    type: Literal["enabled", "disabled"]
    budget_tokens: Annotated[int, Field(ge=1, le=_INT32)] | None = None


Budget = Annotated[int, Field(ge=-1, le=_INT32)]


class ThinkingFields(Strict):
    """The ways to say whether, and how long, the model thinks: they must agree."""

    reasoning_effort: Effort | None = None
    reasoning: Reasoning | None = None
    thinking: Thinking | None = None
    think: bool | Effort | None = None
    thinking_budget: Budget | None = None
    thinking_budget_tokens: Budget | None = None
    thinking_token_budget: Budget | None = None
    reasoning_budget_tokens: Budget | None = None


class Conversation(Strict):
    """Messages, and how the template renders them."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    chat_template_kwargs: TemplateArguments | None = None


class Structured(Strict):
    """What form the text must have: one of these, or any; some under several names."""

    response_format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = (
        None
    )
    json_schema: dict[str, Any] | None = None
    guided_json: dict[str, Any] | None = None
    regex: str | None = None
    guided_regex: str | None = None
    grammar: str | None = None
    guided_grammar: str | None = None
    choices: list[str] | None = None
    guided_choice: list[str] | None = None


class ChatRequest(Generation, ThinkingFields, Conversation, Structured):
    """POST /v1/chat/completions."""

    max_completion_tokens: Annotated[int, Field(ge=1, le=_INT32)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_format: Literal["auto", "deepseek", "none"] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


Prompts = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(min_length=1, max_length=_LIMITS.prompts),
]
TokenPrompt = Annotated[list[TokenId], Field(min_length=1)]
TokenPrompts = Annotated[list[TokenPrompt], Field(min_length=1, max_length=_LIMITS.prompts)]


class CompletionRequest(Generation, Structured):
    """POST /v1/completions."""

    prompt: Annotated[str, Field(min_length=1)] | TokenPrompt | Prompts | TokenPrompts
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: Choices | None = None


class ScoreRequest(Strict):
    """POST /v1/score: how likely each choice is to follow the prompt."""

    model: str | None = None
    prompt: Annotated[str, Field(min_length=1)] | TokenPrompt
    choices: (
        Annotated[
            list[Annotated[str, Field(min_length=1)]],
            Field(min_length=1, max_length=_LIMITS.score_choices),
        ]
        | Annotated[list[TokenPrompt], Field(min_length=1, max_length=_LIMITS.score_choices)]
    )


Inputs = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(min_length=1, max_length=_LIMITS.embedding_inputs),
]
TokenInputs = Annotated[list[TokenPrompt], Field(min_length=1, max_length=_LIMITS.embedding_inputs)]


class EmbeddingRequest(Strict):
    """POST /v1/embeddings."""

    model: str | None = None
    input: Annotated[str, Field(min_length=1)] | TokenPrompt | Inputs | TokenInputs
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=_INT32)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None


class TokenizeRequest(Strict):
    """POST /tokenize: a text, or a conversation."""

    model: str | None = None
    content: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)] | None = None
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


class TemplateRequest(Conversation, ThinkingFields):
    """POST /apply-template."""

    model: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False


# Fields of other servers and of OpenAI's, and why they are refused.
REFUSED: dict[str, str] = {
    "adapters": "adapters are not supported",
    "audio": "these models write text only",
    "bad_words": "not supported; logit_bias takes token ids",
    "allowed_token_ids": "not supported; logit_bias takes token ids",
    "chat_template": "a template comes with the model, never with a request",
    "documents": "not supported; write them into a message",
    "function_call": "an older form of tool_choice",
    "functions": "an older form of tools",
    "lora": "adapters are not supported",
    "min_tokens": "not supported; see ignore_eos",
    "modalities": "these models write text only",
    "n_predict": "here it is max_tokens",
    "prediction": "predicted output is not supported",
    "samplers": "the order of samplers is fixed",
    "suffix": "these models do not fill gaps",
    "truncate_prompt_tokens": "a prompt is never cut",
    "use_beam_search": "not supported",
    "web_search_options": "this server searches nothing",
}
