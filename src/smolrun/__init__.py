"""Run the SmolLM family of language models on the CPU you have.

from smolrun import Model

with Model("smollm2-135m") as model:
    print(model.chat("Why is the sky blue?").text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from smolrun.api import (
        ChoiceScore,
        EndEvent,
        Model,
        ModelConfig,
        Perplexity,
        Place,
        ProgressEvent,
        ReasoningEvent,
        Result,
        Terms,
        TextEvent,
        Timings,
        TokenLogprob,
        ToolCall,
        ToolCallEvent,
        Usage,
    )
    from smolrun.api.asynchronous import AsyncModel, AsyncStream
    from smolrun.api.conversion import Converted, convert
    from smolrun.api.quantization import Quantized, Substitution, quantize
    from smolrun.errors import (
        ClosedError,
        ContextLengthError,
        DeadlineError,
        DownloadError,
        ModelFormatError,
        ModelNotFoundError,
        NonFiniteError,
        OutputError,
        QueueFullError,
        RequestError,
        ResourceError,
        SmolrunError,
        TemplateError,
        UnsupportedError,
    )

__all__ = [
    "AsyncModel",
    "AsyncStream",
    "ChoiceScore",
    "ClosedError",
    "ContextLengthError",
    "Converted",
    "DeadlineError",
    "DownloadError",
    "EndEvent",
    "Model",
    "ModelConfig",
    "ModelFormatError",
    "ModelNotFoundError",
    "NonFiniteError",
    "OutputError",
    "Perplexity",
    "Place",
    "ProgressEvent",
    "Quantized",
    "QueueFullError",
    "ReasoningEvent",
    "RequestError",
    "ResourceError",
    "Result",
    "SmolrunError",
    "Substitution",
    "TemplateError",
    "Terms",
    "TextEvent",
    "Timings",
    "TokenLogprob",
    "ToolCall",
    "ToolCallEvent",
    "UnsupportedError",
    "Usage",
    "__version__",
    "convert",
    "quantize",
]


def __getattr__(name: str) -> object:
    # Imported when first asked for: `import smolrun` itself costs nothing.
    if name not in __all__:
        raise AttributeError(f"module 'smolrun' has no attribute {name!r}")
    from importlib import import_module

    if name in ("AsyncModel", "AsyncStream"):
        module = "smolrun.api.asynchronous"
    elif name in ("Converted", "convert"):
        module = "smolrun.api.conversion"
    elif name in ("Quantized", "Substitution", "quantize"):
        module = "smolrun.api.quantization"
    else:
        module = "smolrun.errors" if name.endswith("Error") else "smolrun.api"
    value: object = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
