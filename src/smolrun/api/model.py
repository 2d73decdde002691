"""A model to talk to."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from smolrun.api.reader import Reader, as_items
from smolrun.api.request import (
    ChatArguments,
    Messages,
    PreparedRequest,
    TextArguments,
    as_messages,
    prepare_chat,
    prepare_text,
    template_of,
    tokenizer_of,
)
from smolrun.api.stream import Stream
from smolrun.engine.answer import Result
from smolrun.engine.engine import DEFAULT_TERMS
from smolrun.engine.forward import Forward
from smolrun.engine.load import MAX_SEQUENCES, LoadedModel, load_config, load_model
from smolrun.engine.native import DEFAULT_ACTIVATIONS
from smolrun.engine.sampling import SamplingParameters
from smolrun.errors import RequestError
from smolrun.model.config import ModelConfig
from smolrun.model.random import random_weights, zero_weights
from smolrun.quant.types import WeightType

if TYPE_CHECKING:
    import datetime

    import numpy.typing as npt
    from typing_extensions import Unpack

    from smolrun.engine.native import Activations
    from smolrun.engine.places import Place
    from smolrun.engine.sequence import Terms
    from smolrun.files.checkpoint import Dtype
    from smolrun.text.chat import ChatTemplate
    from smolrun.text.tokenizer import Tokenizer

DEFAULT_MODEL = "smollm2-135m"


class Model(Reader):
    """A language model, ready to run. Safe to use from any number of threads.

    Requests of several threads share steps, and give the same answers as each alone. A model is
    closed by `close()`, by leaving a `with` block, or with its last reference.

    Args:
        name_or_path: a .gguf file, a .safetensors file or a folder; a `user/repo[:quant]` on the
            Hugging Face Hub; or an alias such as `smollm3-3b:q4_k_m`.
        dtype: what float weights are held in: "auto" (as stored), "f32", "f16", "bf16".
        context_size: most tokens of one request, prompt and answer. Default: what the model and
            the memory allow, at most 32768. More than SmolLM3 was trained for turns YaRN on.
        threads: default: as many as the CPUs, their cores and the cgroup allow.
        isa: instruction set, "scalar", "avx2" or "avx512"; default: the fastest there is.
        activations: what the inputs of products are rounded to: "fast", mostly 8 bits where
            weights are quantized, and 16 bits where they are F16 or BF16, which adds a third of
            the divergence that is usual elsewhere; or "exact", 16 bits and float32, which adds
            next to none and takes prompts in more slowly.
        max_sequences: requests that run side by side; more wait their turn.
        download_progress: called with what is fetched, the bytes done, and those in all or None.
        load_progress: called with the bytes of weights made ready, and those in all.
        offline: never ask the network; default: as SMOLRUN_OFFLINE and HF_HUB_OFFLINE say.

    Raises:
        ModelNotFoundError, DownloadError: no such model, or it can not be fetched.
        ModelFormatError: its files are broken. UnsupportedError: smolrun does not run them.
        TemplateError: its chat template is broken or dangerous.
        ResourceError: weights and KV cache do not fit in memory.
        RequestError: an argument is out of range.
    """

    def __init__(
        self,
        name_or_path: str | Path = DEFAULT_MODEL,
        *,
        dtype: Dtype = "auto",
        context_size: int | None = None,
        threads: int | None = None,
        isa: str | None = None,
        activations: Activations = DEFAULT_ACTIVATIONS,
        max_sequences: int = MAX_SEQUENCES,
        download_progress: Callable[[str, int, int | None], None] | None = None,
        load_progress: Callable[[int, int], None] | None = None,
        offline: bool | None = None,
    ) -> None:
        self._start(
            load_model(
                name_or_path,
                dtype=dtype,
                context_size=context_size,
                threads=threads,
                isa=isa,
                activations=activations,
                max_sequences=max_sequences,
                download_progress=download_progress,
                load_progress=load_progress,
                offline=offline,
            )
        )

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path = DEFAULT_MODEL, **options: Any) -> Model:
        """The same as `Model(name_or_path, ...)`."""
        return cls(name_or_path, **options)

    @classmethod
    def from_config(
        cls,
        config: ModelConfig,
        *,
        seed: int | None = None,
        weight_type: WeightType = WeightType.F32,
        context_size: int | None = None,
        threads: int | None = None,
        isa: str | None = None,
        max_sequences: int = MAX_SEQUENCES,
    ) -> Model:
        """A model without files, for tests and sizing: `forward` and token prompts work.

        Args:
            config: sizes; `ModelConfig`, or `smolrun.model.presets.preset(name)`.
            seed: of random weights; None makes all weights zero.
            weight_type: F32, F16 or BF16.
            context_size, threads, isa, max_sequences: as for `Model`.

        Raises:
            RequestError, ResourceError: as for `Model`.
        """
        if not isinstance(config, ModelConfig):
            raise RequestError(f"config: expected a ModelConfig, got {type(config).__name__}")
        if not isinstance(weight_type, WeightType) or not weight_type.is_float:
            raise RequestError(f"weight_type: expected F32, F16 or BF16, got {weight_type!r:.80}")
        if seed is not None and not (type(seed) is int and 0 <= seed < 1 << 64):
            raise RequestError(f"seed: expected a whole number below 2**64, got {seed!r:.80}")
        tensors = (
            zero_weights(config, weight_type)
            if seed is None
            else random_weights(config, seed, weight_type)
        )
        return cls._of(
            load_config(
                config,
                tensors,
                context_size=context_size,
                threads=threads,
                isa=isa,
                max_sequences=max_sequences,
            )
        )

    @classmethod
    def _of(cls, loaded: LoadedModel) -> Model:
        model = cls.__new__(cls)
        model._start(loaded)
        return model

    def _start(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self._forward = Forward(loaded.engine)
        # Also at exit: the loop must not outlive what it computes with.
        self._finalizer = weakref.finalize(self, loaded.engine.close)

    def __repr__(self) -> str:
        return f"Model({self.name!r}, context_size={self.context_size})"

    # --- what it is

    @property
    def name(self) -> str:
        """What the files call the model."""
        return self.loaded.name

    @property
    def config(self) -> ModelConfig:
        """Sizes and settings, under the names of Hugging Face configurations."""
        return self.loaded.config

    @property
    def context_size(self) -> int:
        """Most tokens of one request, prompt and answer."""
        return self.loaded.engine.context_size

    @property
    def notes(self) -> list[str]:
        """What was decided at load that a user should know, one sentence each."""
        return self.loaded.notes

    @property
    def tokenizer(self) -> Tokenizer:
        """RequestError for a model that has none."""
        return tokenizer_of(self.loaded)

    @property
    def template(self) -> ChatTemplate:
        """TemplateError for a model that has none."""
        return template_of(self.loaded)

    @property
    def default_sampling(self) -> SamplingParameters:
        """How a request is sampled that does not say."""
        return self.loaded.sampling

    def statistics(self) -> dict[str, int]:
        """Counts of requests, tokens and KV blocks since the start."""
        return self.loaded.engine.statistics()

    # --- logits

    def forward(
        self, input_ids: npt.ArrayLike, start_pos: int = 0, all_positions: bool = False
    ) -> npt.NDArray[np.float32]:
        """Logits of tokens, with a KV cache that the next call may continue.

        Args:
            input_ids: (batch, n) or (n,) token ids.
            start_pos: position of the first; 0 starts anew, otherwise up to the number of tokens
                already passed, whose keys and values are kept.
            all_positions: logits of every position instead of the last.

        Returns:
            float32 (batch, 1, vocab_size), or (batch, n, vocab_size) for all positions.

        Raises:
            RequestError: wrong shape, token or start_pos. ContextLengthError: too many tokens.
            ResourceError: no KV blocks to be had for this batch.
            NonFiniteError: a logit is NaN or infinite.
        """
        return self._forward.forward(input_ids, start_pos, all_positions)

    def clear_kv_cache(self) -> None:
        """Give back the KV cache of `forward`."""
        self._forward.clear()

    # --- text

    def tokenize(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Token ids of a text; `parse_special`: the text of a control token means that token."""
        return self.tokenizer.encode(text, parse_special=parse_special)

    def detokenize(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(ids, skip_special=skip_special)

    def render(
        self,
        messages: Messages,
        *,
        think: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        date: datetime.date | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text that the model is given for a conversation; arguments as of `chat`."""
        return self.template.render(
            as_messages(messages),
            tools=tools,
            enable_thinking=think,
            date=date,
            add_generation_prompt=add_generation_prompt,
        )

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a Sequence[str] too
        self,
        prompt: str | Sequence[int],
        *,
        terms: Terms = DEFAULT_TERMS,
        **arguments: Unpack[TextArguments],
    ) -> Result: ...

    @overload
    def generate(
        self,
        prompt: Sequence[str] | Sequence[Sequence[int]],
        *,
        terms: Terms = DEFAULT_TERMS,
        **arguments: Unpack[TextArguments],
    ) -> list[Result]: ...

    def generate(
        self,
        prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        *,
        terms: Terms = DEFAULT_TERMS,
        **arguments: Unpack[TextArguments],
    ) -> Result | list[Result]:
        """Continue plain text, or token ids, without a chat template.

        Args:
            prompt: a text or a list of token ids; or a list of these, which run side by side.
            terms: whose request it is, and how long it may take.
            arguments: see `TextArguments`.

        Raises:
            RequestError: an argument is wrong; the message begins with its name.
            ContextLengthError: a prompt does not fit the context.
            NonFiniteError: the model computed NaN or infinity.
            QueueFullError, DeadlineError: there are limits (`limit_queue`, `terms`), and they are
                reached. ClosedError: the model is closed.
        """
        streams, single = self.started(prompt, terms, arguments)
        with contextlib.ExitStack() as stack:  # an error of one cancels the others
            for stream in streams:
                stack.enter_context(stream)
            results = [stream.result() for stream in streams]
        return results[0] if single else results

    def started(
        self, prompt: Any, terms: Terms, arguments: Mapping[str, Any]
    ) -> tuple[list[Stream], bool]:
        """The streams of `generate`, and whether `prompt` is a single one."""
        items, single = as_items(prompt)
        prompts = [self._prompt_ids(item) for item in items]
        prepared = [prepare_text(self.loaded, ids, arguments) for ids in prompts]
        return [self._submit(request, terms) for request in prepared], single

    def chat(
        self,
        messages: Messages,
        *,
        terms: Terms = DEFAULT_TERMS,
        **arguments: Unpack[ChatArguments],
    ) -> Result:
        """Answer a conversation.

        Args:
            messages: objects with `role` and `content`, in order, or the text of a user's message.
            terms: whose request it is, and how long it may take.
            arguments: see `ChatArguments`. Stop strings, structure and tools count in the answer,
                not in the reasoning before it.

        Raises:
            RequestError, ContextLengthError, NonFiniteError, ...: as for `generate`.
            TemplateError: the model's template refuses the messages, tools or thinking.
        """
        return self.stream(messages, terms=terms, **arguments).result()

    def stream(
        self,
        messages: Messages,
        *,
        terms: Terms = DEFAULT_TERMS,
        **arguments: Unpack[ChatArguments],
    ) -> Stream:
        """The same as `chat`, piece by piece: an iterator of events, the last an `EndEvent`.

        Wrong arguments raise here, not at the first event.
        """
        return self._submit(prepare_chat(self.loaded, messages, arguments), terms)

    def stream_text(
        self,
        prompt: str | Sequence[int],
        *,
        terms: Terms = DEFAULT_TERMS,
        **arguments: Unpack[TextArguments],
    ) -> Stream:
        """The same as `generate` of one prompt, piece by piece."""
        return self._submit(prepare_text(self.loaded, self._prompt_ids(prompt), arguments), terms)

    # --- many callers

    def limit_queue(self, requests: int | None = None, prompt_tokens: int | None = None) -> None:
        """Turn requests away, with a QueueFullError, while many are under way.

        Args:
            requests: that may be prepared or wait beside the `max_sequences` that run.
            prompt_tokens: of requests that wait; one may always wait. None is no limit.
        """
        engine = self.loaded.engine
        engine.places.limit = None if requests is None else engine.max_sequences + requests
        engine.places.token_limit = prompt_tokens

    def reserve(self, count: int = 1) -> list[Place]:
        """Places for requests that are still to be prepared, each to be handed on in `Terms`.

        Raises:
            QueueFullError: there are not so many. ClosedError: the model drains.
        """
        return self.loaded.engine.places.take(count)

    def drain(self, timeout: float | None = None) -> bool:
        """Take no new requests, but those that have a place, and wait for all to end.

        Returns:
            Whether they have; False where that takes longer than `timeout` seconds.
        """
        return self.loaded.engine.drain(timeout)

    def close(self) -> None:
        """Stop the model after its current step; answers under way end in an error."""
        self._finalizer()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, request: PreparedRequest, terms: Terms) -> Stream:
        loaded = self.loaded
        return Stream(
            loaded.engine.submit(
                request.prompt,
                request.parameters,
                request.answer,
                stop_ids=loaded.stop_ids,
                terms=terms,
                constraint=request.constraint,
            )
        )
