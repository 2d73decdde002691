"""Every error that smolrun raises on purpose.

SmolrunError
├── ModelFormatError (ValueError)      a model file breaks its format or contradicts itself
│   └── UnsupportedError               a sound file asks for something smolrun does not run
├── ModelNotFoundError (LookupError)   no file, folder, alias or repository answers to a name
├── DownloadError (OSError)            a model was found but could not be fetched whole
├── OutputError (OSError)              a file that was asked for could not be written
├── TemplateError (ValueError)         a chat template is broken, hostile, or refuses the messages
├── RequestError (ValueError)          an argument of one request; other requests go on
│   └── ContextLengthError             prompt and answer do not fit the context
├── QueueFullError                     too many requests are under way; it says when to come back
├── DeadlineError (TimeoutError)       a request took longer than it may
├── ClosedError                        the model is closed, or about to be
├── NonFiniteError (ArithmeticError)   a logit was not finite; only its request ends
└── ResourceError (MemoryError)        memory, or an instruction set, that this machine lacks

A message says where (file, tensor, field), what was expected and found, and what to do.
"""

from __future__ import annotations


class SmolrunError(Exception):
    """Base of all errors that smolrun raises on purpose."""


class ModelFormatError(SmolrunError, ValueError):
    """A model file breaks its format or contradicts itself."""


class UnsupportedError(ModelFormatError):
    """A sound file asks for something that smolrun does not run."""


class ModelNotFoundError(SmolrunError, LookupError):
    """No file, folder, alias or repository answers to a model name."""


class DownloadError(SmolrunError, OSError):
    """A model was found but could not be fetched whole."""


class OutputError(SmolrunError, OSError):
    """A file that was asked for could not be written; what stood in its place is unchanged."""


class TemplateError(SmolrunError, ValueError):
    """A chat template is broken, hostile, or refuses the messages."""


class RequestError(SmolrunError, ValueError):
    """An argument of one request can not be honoured; other requests go on."""


class ContextLengthError(RequestError):
    """Prompt and answer do not fit the context."""

    def __init__(self, prompt_tokens: int, context_size: int) -> None:
        super().__init__(
            f"the prompt has {prompt_tokens} tokens, the context holds {context_size}; "
            "shorten the prompt or raise the context size"
        )
        self.prompt_tokens = prompt_tokens
        self.context_size = context_size


class QueueFullError(SmolrunError):
    """Too many requests are under way; come back in `retry_after` seconds (1 to 30)."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(SmolrunError, TimeoutError):
    """A request took longer than it may; `started` says whether it ever ran."""

    def __init__(self, message: str, *, started: bool) -> None:
        super().__init__(message)
        self.started = started


class ClosedError(SmolrunError):
    """The model is closed, or takes no more requests because it is about to be."""


class NonFiniteError(SmolrunError, ArithmeticError):
    """A logit was not finite; only its request ends."""


class ResourceError(SmolrunError, MemoryError):
    """Memory, or an instruction set, that this machine lacks."""
