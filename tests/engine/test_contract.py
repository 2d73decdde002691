"""The numeric contract, on the native runner and through the engine: the same bits whatever the
threads, the chunks, the company and the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from smolrun import _core
from smolrun.engine.engine import Engine
from smolrun.engine.forward import Forward
from smolrun.engine.native import Activations
from smolrun.engine.runner import Int32Array, Runner
from smolrun.engine.sampling import SampledToken, SamplingParameters, sampling_parameters
from smolrun.engine.sequence import Terms
from smolrun.errors import NonFiniteError
from smolrun.quant.types import WeightType
from tests.engine.fakes import TokenOutput, collect
from tests.models import SCALE_OFFSETS
from tests.native.models import Model, nmse, random_blocks, small_config

CONTEXT = 512
TYPES = [
    WeightType.Q4_K,
    WeightType.F32,
    WeightType.Q8_0,
    WeightType.BF16,
    WeightType.Q4_1,
    WeightType.Q6_K,
    WeightType.F16,
]
GREEDY = {"max_tokens": 12, "logprobs": True, "top_logprobs": 3}
SEEDED = {**GREEDY, "temperature": 0.9, "top_p": 0.95, "seed": 77, "repeat_penalty": 1.1}


each_reading = pytest.mark.parametrize(
    ("isa", "activations"), [(isa, kind) for isa in _core.isas() for kind in ("exact", "fast")]
)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.random(small_config(tie_word_embeddings=False), TYPES)


@contextmanager
def engine_of(
    model: Model,
    *,
    threads: int = 1,
    chunk: int = 256,
    isa: str | None = None,
    activations: Activations = "exact",
    kv_blocks: int = 20 * CONTEXT // 32,
    wrap: Any = lambda runner: runner,
) -> Iterator[Engine]:
    runner: Runner = model.runner(
        threads=threads, isa=isa, activations=activations, kv_blocks=kv_blocks
    )
    engine = Engine(
        wrap(runner),
        vocab_size=model.config.vocab_size,
        hidden_size=model.config.hidden_size,
        context_size=CONTEXT,
        kv_blocks=kv_blocks,
        max_step_tokens=chunk,
    )
    try:
        yield engine
    finally:
        engine.close()


def parameters(arguments: dict[str, Any]) -> SamplingParameters:
    return sampling_parameters(arguments, SamplingParameters(), 300)


def prompts(count: int, seed: int = 0, shortest: int = 1, longest: int = 150) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [
        generator.integers(0, 300, generator.integers(shortest, longest)).tolist()
        for _ in range(count)
    ]


def answers(
    engine: Engine, some: list[list[int]], arguments: dict[str, Any]
) -> list[list[SampledToken]]:
    """All at once; log-probabilities are floats whose every bit counts."""
    requests = [engine.submit(p, parameters(arguments), TokenOutput()) for p in some]
    return [collect(request)[0] for request in requests]


def alone(
    model: Model, some: list[list[int]], arguments: dict[str, Any], **options: Any
) -> list[list[SampledToken]]:
    with engine_of(model, **options) as engine:
        return [answers(engine, [prompt], arguments)[0] for prompt in some]


def bits(array: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    return array.view(np.uint32)


@each_reading
def test_logits_do_not_depend_on_threads_and_chunks(
    model: Model, isa: str, activations: Activations
) -> None:
    ids = np.random.default_rng(1).integers(0, 300, (2, 170))
    expected = None
    for threads in (1, 2, 4):
        for chunk in (1, 7, 64, 256):
            with engine_of(
                model, threads=threads, chunk=chunk, isa=isa, activations=activations
            ) as engine:
                logits = Forward(engine).forward(ids, all_positions=True)
            if expected is None:
                expected = logits
            assert np.array_equal(bits(logits), bits(expected)), (threads, chunk)
    assert expected is not None
    # Rounding to 8 bits, a scale for each 16, leaves 2e-5 in each product.
    limit = 1e-5 if activations == "exact" else 5e-4
    assert nmse(expected, model.reference().forward(ids)) < limit


@each_reading
@pytest.mark.parametrize("arguments", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_an_answer_does_not_depend_on_its_company(
    model: Model, arguments: dict[str, Any], isa: str, activations: Activations
) -> None:
    reading: dict[str, Any] = {"isa": isa, "activations": activations}
    some = prompts(3, longest=100)
    expected = alone(model, some, arguments, **reading)
    for neighbours, threads, chunk in ((1, 2, 256), (7, 4, 7), (13, 2, 64), (13, 1, 256)):
        company = prompts(neighbours, seed=neighbours)
        mixed = [*company[: neighbours // 2], *some, *company[neighbours // 2 :]]
        with engine_of(model, threads=threads, chunk=chunk, **reading) as engine:
            got = answers(engine, mixed, arguments)
        assert got[neighbours // 2 : neighbours // 2 + 3] == expected, (neighbours, threads, chunk)


@each_reading
def test_an_answer_does_not_depend_on_the_prefix_cache(
    model: Model, isa: str, activations: Activations
) -> None:
    reading: dict[str, Any] = {"isa": isa, "activations": activations}
    prompt = prompts(1, seed=5, shortest=140)[0]
    with engine_of(model, threads=2, **reading) as engine:
        request = engine.submit(prompt, parameters(SEEDED), TokenOutput())
        miss, ending = collect(request)
        assert ending.cached_tokens == 0
        hit, ending = collect(engine.submit(prompt, parameters(SEEDED), TokenOutput()))
        assert ending.cached_tokens == (len(prompt) - 1) // 32 * 32
        assert hit == miss
        # A prefix whose blocks were written while generating, one token at a time.
        longer = [*prompt, *[token.id for token in miss], *range(40)]
        hit, ending = collect(engine.submit(longer, parameters(SEEDED), TokenOutput()))
        assert ending.cached_tokens >= (len(prompt) + len(miss) - 1) // 32 * 32
    assert [hit] == alone(model, [longer], SEEDED, **reading)


def test_reused_blocks_leave_no_trace(model: Model) -> None:
    some = prompts(6, seed=9, shortest=60)
    expected = alone(model, some, GREEDY)
    with engine_of(model, kv_blocks=CONTEXT // 32) as engine:
        for salt in (b"a", b"b", b"c"):  # with another salt nothing comes from the prefix cache
            for prompt, answer in zip(some, expected, strict=True):
                request = engine.submit(
                    prompt, parameters(GREEDY), TokenOutput(), terms=Terms(salt=salt)
                )
                tokens, ending = collect(request)
                assert tokens == answer
                assert ending.cached_tokens == 0
        forward = Forward(engine)
        ids = np.random.default_rng(1).integers(0, 300, (1, 200))
        found = forward.forward(ids)
    with engine_of(model) as engine:
        assert np.array_equal(bits(found), bits(Forward(engine).forward(ids)))


class Careless:
    """A runner that is off by one unit in the last place of one logit when it has company."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def step(
        self,
        tokens: Int32Array,
        positions: Int32Array,
        sequences: Int32Array,
        block_tables: Int32Array,
        logit_rows: Int32Array,
        logits: npt.NDArray[np.float32],
    ) -> None:
        self._runner.step(tokens, positions, sequences, block_tables, logit_rows, logits)
        if len(block_tables) > 1:
            place = logits.argmax(axis=1)
            rows = np.arange(len(logits))
            logits[rows, place] = np.nextafter(logits[rows, place], np.float32(np.inf))


def test_these_checks_can_fail(model: Model) -> None:
    some = prompts(3, longest=100)
    expected = alone(model, some, GREEDY)
    with engine_of(model, wrap=Careless) as engine:
        assert answers(engine, some, GREEDY) != expected
        ids = np.random.default_rng(1).integers(0, 300, (2, 20))
        logits = Forward(engine).forward(ids)
        row = Forward(engine).forward(ids[:1])
    assert not np.array_equal(bits(logits[:1]), bits(row))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", [20, 90])
def test_a_broken_weight_ends_the_requests_it_reaches(value: float, place: int) -> None:
    """A bad embedding row reaches those who use its token."""
    model = Model.random(small_config(tie_word_embeddings=False), [WeightType.F32])
    name = "model.embed_tokens.weight"
    data = np.frombuffer(model.values[name].tobytes(), np.float32).reshape(300, -1).copy()
    data[299, 5] = value
    model.native[name] = _core.Weight("F32", 300, data.shape[1], data.view(np.uint8).reshape(-1))
    good = [[token % 299 for token in prompt] for prompt in prompts(5)]
    bias = {"logit_bias": {299: -100.0}, **GREEDY}
    expected = alone(model, good, bias)
    bad = [7] * place + [299] + [8] * 30
    with engine_of(model, threads=2) as engine:
        requests = [engine.submit(p, parameters(bias), TokenOutput()) for p in good]
        broken = engine.submit(bad, parameters(bias), TokenOutput())
        with pytest.raises(NonFiniteError, match="non-finite logits"):
            list(broken)
        assert [collect(request)[0] for request in requests] == expected
        assert engine.statistics()["corrupted"] == 1
        assert engine.statistics()["kv_blocks_held"] == 0
        assert answers(engine, good, bias) == expected
        with pytest.raises(NonFiniteError):
            Forward(engine).forward(bad)
        assert engine.statistics()["kv_blocks_held"] == 0
        retry = engine.submit([*bad, 1], parameters(bias), TokenOutput())
        with pytest.raises(NonFiniteError):
            list(retry)
        fine, ending = collect(
            engine.submit([7] * place + [8] * 31, parameters(bias), TokenOutput())
        )
        assert ending.cached_tokens == 0
        assert [fine] == alone(model, [[7] * place + [8] * 31], bias)


@pytest.mark.parametrize("weight_type", [t for t in WeightType if not t.is_float])
def test_one_bad_scale_in_any_matrix_is_found(weight_type: WeightType) -> None:
    """Quantizing activations and taking maxima must not turn NaN or infinity into a number."""
    model = Model.random(small_config(tie_word_embeddings=False), [weight_type])
    matrices = [name for name, shape in model.program.weights.items() if len(shape) == 2]
    for place, name in enumerate(matrices):
        rows, columns = model.program.weights[name]
        data = random_blocks(np.random.default_rng(place), weight_type, rows, columns).copy()
        blocks = data.reshape(-1, weight_type.block_bytes)
        block = 3 * (columns // weight_type.block_weights) if "embed" in name else len(blocks) // 2
        offset = SCALE_OFFSETS[weight_type][place % len(SCALE_OFFSETS[weight_type])]
        value = np.array([(np.nan, np.inf, -np.inf)[place % 3]], np.float16)
        blocks[block, offset : offset + 2] = value.view(np.uint8)
        sound = model.native[name]
        model.native[name] = _core.Weight(weight_type.value, rows, columns, data)
        isa = _core.isas()[place % len(_core.isas())]
        activations: Activations = "fast" if place % 2 else "exact"
        with engine_of(model, isa=isa, activations=activations) as engine:
            request = engine.submit([3] * 33, parameters(GREEDY), TokenOutput())
            with pytest.raises(NonFiniteError):
                list(request)
            with pytest.raises(NonFiniteError):
                Forward(engine).forward([3] * 33)
        model.native[name] = sound
