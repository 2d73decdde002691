"""What a user imports."""

from smolrun.api.conversion import convert
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
from smolrun.files.convert import Converted
from smolrun.model.config import ModelConfig

__all__ = [
    "DEFAULT_MODEL",
    "ChoiceScore",
    "Converted",
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
    "convert",
]
