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


class NonFiniteError(SmolrunError, ArithmeticError):
    """A logit was not finite; only its request ends."""


class ResourceError(SmolrunError, MemoryError):
    """Memory, or an instruction set, that this machine lacks."""
