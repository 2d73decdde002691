"""From a model's name to a running engine."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from smolrun.engine.engine import Engine
from smolrun.engine.machine import (
    KvPlan,
    Limit,
    available_cpus,
    choose_threads,
    memory_available,
    plan_kv_blocks,
)
from smolrun.engine.native import DEFAULT_ACTIVATIONS, Activations, build_runner
from smolrun.engine.sampling import SamplingParameters, sampling_parameters
from smolrun.errors import ModelFormatError, RequestError, ResourceError
from smolrun.files.checkpoint import Checkpoint, Dtype, open_checkpoint
from smolrun.files.weights import NativeWeights, WeightLoading
from smolrun.model.llama import build

if TYPE_CHECKING:
    from smolrun.model.config import ModelConfig
    from smolrun.model.program import Program
    from smolrun.quant.tensor import Tensor
    from smolrun.text.chat import ChatTemplate
    from smolrun.text.grammar import GrammarCompiler
    from smolrun.text.tokenizer import Tokenizer

# Tokens of context where the caller names no number. A request without max_tokens is promised
# what the context leaves, so a larger one would let fewer requests run side by side.
DEFAULT_CONTEXT = 32768
MAX_SEQUENCES = 64  # requests that share steps
MAX_STEP_TOKENS = 256

# Model cards and the smollm repository; the file's own generation config comes before.
_FAMILY_SAMPLING = {
    "llama": {"temperature": 0.2, "top_p": 0.9},
    "smollm3": {"temperature": 0.6, "top_p": 0.95},
}
# generation_config.json: our argument
_SAMPLING_KEYS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


@dataclass
class LoadedModel:
    """Everything that belongs to a model that runs."""

    name: str
    path: Path | None  # None for a model made from a configuration
    config: ModelConfig
    program: Program
    engine: Engine
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    grammars: GrammarCompiler | None  # None where there is no tokenizer
    sampling: SamplingParameters  # defaults of a request
    stop_ids: frozenset[int]
    threads: Limit
    kv_plan: KvPlan
    notes: list[str] = field(default_factory=list)  # what a user should know, one sentence each


def load_model(
    name_or_path: str | Path,
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
) -> LoadedModel:
    """Open a model and start its engine; arguments and errors as of `Model`."""
    _check_choice("dtype", dtype, get_args(Dtype))
    _check_choice("activations", activations, get_args(Activations))
    from smolrun.files.names import resolve
    from smolrun.text.chat import ChatTemplate
    from smolrun.text.grammar import GrammarCompiler
    from smolrun.text.tokenizer import Tokenizer

    path = resolve(name_or_path, progress=download_progress, offline=offline)
    checkpoint = open_checkpoint(path, dtype)
    try:
        plan = _planned(checkpoint.config, checkpoint.tensors, context_size, threads, max_sequences)
        with WeightLoading.from_file(
            checkpoint, plan.program, plan.threads.value, as_codes=activations == "fast"
        ) as loading:
            tokenizer = template = None
            if checkpoint.tokenizer is not None:
                tokenizer = Tokenizer(checkpoint.tokenizer, plan.config.vocab_size)
                if checkpoint.chat_template is not None:
                    origin = str(checkpoint.path)
                    template = ChatTemplate(checkpoint.chat_template, tokenizer, origin)
                checkpoint.drop_vocabulary()
                _trim_heap()  # before all the weights are in
            weights = loading.finish(load_progress)
        engine = _started(plan, weights, isa, activations, max_sequences, str(checkpoint.path))
        eos = {*checkpoint.config.eos_token_ids, *_generation_eos(checkpoint)}
        stop_ids = tokenizer.stop_ids(eos) if tokenizer else frozenset(eos)
        return LoadedModel(
            name=checkpoint.name,
            path=checkpoint.path,
            config=plan.config,
            program=plan.program,
            engine=engine,
            tokenizer=tokenizer,
            template=template,
            grammars=GrammarCompiler(tokenizer, stop_ids) if tokenizer else None,
            sampling=_default_sampling(plan.config, checkpoint.generation, str(checkpoint.path)),
            stop_ids=stop_ids,
            threads=plan.threads,
            kv_plan=plan.kv,
            notes=plan.notes,
        )
    finally:
        checkpoint.close()


def load_config(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    context_size: int | None = None,
    threads: int | None = None,
    isa: str | None = None,
    activations: Activations = DEFAULT_ACTIVATIONS,
    max_sequences: int = MAX_SEQUENCES,
) -> LoadedModel:
    """Start an engine on weights that lie in memory; there is no tokenizer."""
    _check_choice("activations", activations, get_args(Activations))
    plan = _planned(config, tensors, context_size, threads, max_sequences, in_memory=True)
    plan.program.check(tensors)
    with WeightLoading.from_memory(
        tensors, plan.program, plan.threads.value, as_codes=activations == "fast"
    ) as loading:
        weights = loading.finish()
    return LoadedModel(
        name=config.model_type,
        path=None,
        config=plan.config,
        program=plan.program,
        engine=_started(plan, weights, isa, activations, max_sequences, config.model_type),
        tokenizer=None,
        template=None,
        grammars=None,
        sampling=_default_sampling(config, {}, config.model_type),
        stop_ids=frozenset(config.eos_token_ids),
        threads=plan.threads,
        kv_plan=plan.kv,
        notes=plan.notes,
    )


@dataclass
class _Plan:
    config: ModelConfig
    program: Program
    kv: KvPlan
    threads: Limit
    notes: list[str]


def _planned(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    context_size: int | None,
    threads: int | None,
    max_sequences: int,
    *,
    in_memory: bool = False,
) -> _Plan:
    """Decide on context, KV cache and threads before anything large is read."""
    for name, value in (("context_size", context_size), ("max_sequences", max_sequences)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise RequestError(f"{name}: expected a whole number, got {value!r:.80}")
    if not 1 <= max_sequences <= MAX_STEP_TOKENS:
        raise RequestError(f"max_sequences: expected 1 to {MAX_STEP_TOKENS}, got {max_sequences}")
    notes: list[str] = []
    trained = config.max_position_embeddings
    if context_size is not None and context_size > trained:
        config = config.with_context(context_size)
        notes.append(
            f"The context of {context_size} tokens is longer than the {trained} the model was "
            f"trained for: YaRN is on, with factor {config.rope_scaling.factor:g}."
        )
    available = memory_available()
    weights = 0 if in_memory else sum(tensor.data.nbytes for tensor in tensors.values())
    if weights > available.value:
        raise ResourceError(
            f"the weights take {weights >> 20} MiB, and {available.value >> 20} MiB are to be had "
            f"({available.why}); take a smaller model or one of fewer bits"
        )
    # Pages of a mapped file count as free, but the weights need them all the time.
    left = Limit(available.value - weights, f"{available.why}, less {weights >> 20} MiB of weights")
    kv = plan_kv_blocks(config, context_size, sequences=max_sequences, available=left)
    if context_size is None:
        if kv.context_size < min(config.max_position_embeddings, DEFAULT_CONTEXT):
            notes.append(f"The context holds {kv.context_size} tokens: {kv.why}.")
        elif kv.context_size > DEFAULT_CONTEXT:
            kv = plan_kv_blocks(config, DEFAULT_CONTEXT, sequences=max_sequences, available=left)
            kv = KvPlan(kv.context_size, kv.blocks, f"the default; the model allows {trained}")
    return _Plan(config, build(config), kv, choose_threads(threads=threads), notes)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RequestError(f"{name}: expected one of {', '.join(choices)}, got {value!r:.80}")


def _started(
    plan: _Plan,
    weights: NativeWeights,
    isa: str | None,
    activations: Activations,
    max_sequences: int,
    identity: str,
) -> Engine:
    runner = build_runner(
        plan.program,
        weights,
        kv_blocks=plan.kv.blocks,
        threads=plan.threads.value,
        isa=isa,
        activations=activations,
        max_step_tokens=MAX_STEP_TOKENS,
    )
    return Engine(
        runner,
        vocab_size=plan.config.vocab_size,
        hidden_size=plan.config.hidden_size,
        context_size=plan.kv.context_size,
        kv_blocks=plan.kv.blocks,
        model=hashlib.sha256(f"{identity}\n{plan.config}".encode()).digest(),
        max_step_tokens=MAX_STEP_TOKENS,
        max_sequences=max_sequences,
        handover=plan.threads.value >= available_cpus(),
    )


def _trim_heap() -> None:
    """Give freed memory back to the system.

    Building a tokenizer of 128k tokens leaves 40 MB of it behind (GGUF), or 100 (tokenizer.json),
    in pieces that the C library would keep for later.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def _default_sampling(
    config: ModelConfig, generation: Mapping[str, object], origin: str
) -> SamplingParameters:
    arguments: dict[str, Any] = dict(_FAMILY_SAMPLING[config.model_type])
    for key, name in _SAMPLING_KEYS.items():
        if generation.get(key) is not None:
            arguments[name] = generation[key]
    try:
        return sampling_parameters(arguments, SamplingParameters(), config.vocab_size)
    except RequestError as error:
        raise ModelFormatError(f"{origin}: in the generation config, {error}") from None


def _generation_eos(checkpoint: Checkpoint) -> list[int]:
    value = checkpoint.generation.get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    return [token for token in values if isinstance(token, int) and not isinstance(token, bool)]
