"""What a user imports to talk to models; beside it `asynchronous`, `conversion`, `quantization`."""

from smolrun.api.model import DEFAULT_MODEL, Model
from smolrun.api.request import ChatArguments, Messages, SamplingArguments, TextArguments
from smolrun.api.stream import Stream
from smolrun.engine.answer import (
    EndEvent,
    Event,
    ProgressEvent,
    ReasoningEvent,
    Result,
    TextEvent,
    TokenLogprob,
    ToolCallEvent,
    Usage,
)
from smolrun.engine.likelihood import ChoiceScore, Perplexity
from smolrun.engine.places import Place
from smolrun.engine.sequence import Terms, Timings
from smolrun.model.config import ModelConfig
from smolrun.text.tools import ToolCall

__all__ = [
    "DEFAULT_MODEL",
    "ChatArguments",
    "ChoiceScore",
    "EndEvent",
    "Event",
    "Messages",
    "Model",
    "ModelConfig",
    "Perplexity",
    "Place",
    "ProgressEvent",
    "ReasoningEvent",
    "Result",
    "SamplingArguments",
    "Stream",
    "Terms",
    "TextArguments",
    "TextEvent",
    "Timings",
    "TokenLogprob",
    "ToolCall",
    "ToolCallEvent",
    "Usage",
]
