"""What a user imports to talk to models; `conversion` and `quantization` are beside it."""

from smolrun.api.model import DEFAULT_MODEL, Messages, Model
from smolrun.api.stream import SamplingArguments, Stream
from smolrun.engine.answer import (
    EndEvent,
    Event,
    ProgressEvent,
    ReasoningEvent,
    Result,
    TextEvent,
    TokenLogprob,
    Usage,
)
from smolrun.engine.likelihood import ChoiceScore, Perplexity
from smolrun.engine.sequence import Timings
from smolrun.model.config import ModelConfig

__all__ = [
    "DEFAULT_MODEL",
    "ChoiceScore",
    "EndEvent",
    "Event",
    "Messages",
    "Model",
    "ModelConfig",
    "Perplexity",
    "ProgressEvent",
    "ReasoningEvent",
    "Result",
    "SamplingArguments",
    "Stream",
    "TextEvent",
    "Timings",
    "TokenLogprob",
    "Usage",
]
