"""`Model` on a small folder: what a user calls, and that it is what the parts say."""

from __future__ import annotations

import datetime
import gc
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smolrun
from smolrun import (
    ContextLengthError,
    EndEvent,
    Model,
    ModelFormatError,
    ProgressEvent,
    ReasoningEvent,
    RequestError,
    Result,
    SmolrunError,
    TemplateError,
    TextEvent,
)
from smolrun.engine.sampling import uniform
from smolrun.model.llama import build
from smolrun.model.random import random_weights
from smolrun.model.reference import ReferenceRunner
from smolrun.quant.types import WeightType
from tests.engine.fakes import GatedRunner
from tests.models import nmse, values_of
from tests.waiting import SECONDS, eventually, joined, started

from .tiny import VOCABULARY, make_folder

QUESTION = "Why is the sky blue?"


@pytest.fixture(scope="module")
def oracle(model: Model) -> ReferenceRunner:
    weights = values_of(random_weights(model.config, 3, WeightType.F32))
    return ReferenceRunner(build(model.config), weights, rounded_kv=True)


def greedy(oracle: ReferenceRunner, ids: list[int], count: int) -> list[int]:
    """The definition: one token after the other, nothing kept."""
    tokens = list(ids)
    for _ in range(count):
        oracle.clear()
        tokens.append(int(oracle.forward(tokens)[0, -1].argmax()))
    return tokens[len(ids) :]


def test_importing_smolrun_imports_nothing_else() -> None:
    heavy = ["numpy", "tokenizers", "jinja2", "huggingface_hub", "rich", "safetensors"]
    code = f"import sys, smolrun; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=SECONDS
    )
    assert done.stdout.strip() == "[]"
    for name in smolrun.__all__:
        assert getattr(smolrun, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        smolrun.nonsense  # noqa: B018


def test_forward_is_the_reference(model: Model, oracle: ReferenceRunner) -> None:
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (3, 70))
    oracle.clear()
    expected = oracle.forward(ids)
    logits = model.forward(ids, all_positions=True)
    assert logits.shape == (3, 70, VOCABULARY)
    assert logits.dtype == np.float32
    assert nmse(logits, expected) < 1e-6
    assert np.array_equal(model.forward(ids), logits[:, -1:])
    model.forward(ids[:, :40])
    assert np.array_equal(model.forward(ids[:, 40:], start_pos=40), logits[:, -1:])
    assert model.forward(ids[0]).shape == (1, 1, VOCABULARY)
    model.clear_kv_cache()
    assert model.statistics()["kv_blocks_held"] == 0


def test_generate_is_the_reference(model: Model, oracle: ReferenceRunner) -> None:
    prompt = model.tokenize("The sky is blue because")
    result = model.generate(
        "The sky is blue because", temperature=0, max_tokens=20, ignore_eos=True
    )
    assert list(result.token_ids) == greedy(oracle, prompt, 20)
    assert result.text == model.detokenize(result.token_ids, skip_special=True)
    assert result.usage.prompt_tokens == len(prompt)
    assert result.usage.completion_tokens == 20
    assert result.finish_reason == "length"
    same = model.generate(prompt, temperature=0, max_tokens=20, ignore_eos=True)
    assert same.token_ids == result.token_ids
    array: Any = np.array(prompt)
    assert model.generate(array, temperature=0, max_tokens=2).token_ids == result.token_ids[:2]


def test_a_list_of_prompts(model: Model) -> None:
    prompts = ["The sky", "A small model", "def add(a, b):", "1234"]
    together = model.generate(prompts, temperature=1, seed=3, max_tokens=15)
    for prompt, result in zip(prompts, together, strict=True):
        alone = model.generate(prompt, temperature=1, seed=3, max_tokens=15)
        assert alone.token_ids == result.token_ids
    by_ids = model.generate(
        [model.tokenize(prompt) for prompt in prompts], temperature=1, seed=3, max_tokens=15
    )
    assert [result.text for result in by_ids] == [result.text for result in together]


def test_chat_is_generate_on_the_rendered_text(model: Model) -> None:
    text = model.render(QUESTION)
    assert text == f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    plain = model.generate(text, temperature=0, max_tokens=20)
    for messages in (QUESTION, [{"role": "user", "content": QUESTION}]):
        result = model.chat(messages, temperature=0, max_tokens=20)
        assert result.token_ids == plain.token_ids
    quiet = model.chat(QUESTION, think=False, temperature=0, max_tokens=20)
    assert quiet.usage.prompt_tokens > result.usage.prompt_tokens
    assert quiet.reasoning is None


def test_reasoning(model: Model) -> None:
    """Biased into an open think block."""
    opened = model.tokenizer.id_of("<think>")
    assert opened is not None
    events = list(model.stream(QUESTION, logit_bias={opened: 100}, max_tokens=4, temperature=0))
    end = events[-1]
    assert isinstance(end, EndEvent)
    assert end.result.usage.reasoning_tokens == 4
    assert end.result.text == ""
    assert not any(isinstance(event, TextEvent) for event in events)
    first = model.chat(QUESTION, logit_bias={opened: 100}, max_tokens=1, temperature=0)
    assert first.token_ids == (opened,)


def test_stream_is_chat(model: Model) -> None:
    arguments: dict[str, Any] = {"temperature": 1, "seed": 5, "max_tokens": 40, "logprobs": True}
    result = model.chat(QUESTION, **arguments)
    events = list(model.stream(QUESTION, **arguments))
    end = events.pop()
    assert isinstance(end, EndEvent)
    assert end.result.token_ids == result.token_ids
    assert end.result.logprobs == result.logprobs
    assert "".join(e.text for e in events if isinstance(e, TextEvent)) == result.text
    reasoning = "".join(e.text for e in events if isinstance(e, ReasoningEvent))
    assert reasoning == (result.reasoning or "")
    assert model.stream(QUESTION, **arguments).result().text == result.text
    stream = model.stream_text("The sky", max_tokens=3)
    assert isinstance(list(stream)[-1], EndEvent)
    with pytest.raises(RequestError, match="read to its end"):
        stream.result()


def test_long_prompts_tell_their_progress(model: Model) -> None:
    ids = [5] * 400
    events = list(model.stream_text(ids, max_tokens=1))
    assert [e for e in events if isinstance(e, ProgressEvent)] == [
        ProgressEvent(256, 400),
        ProgressEvent(400, 400),
    ]


def test_a_second_turn_finds_the_first_in_the_cache(tiny_folder: Path) -> None:
    with Model(tiny_folder) as model:
        messages = [{"role": "user", "content": QUESTION * 6}]
        first = model.chat(messages, temperature=0, max_tokens=30)
        assert first.usage.cached_tokens == 0
        messages += [
            {"role": "assistant", "content": first.text},
            {"role": "user", "content": "And why is it red at night?"},
        ]
        second = model.chat(messages, temperature=0, max_tokens=30)
        assert second.usage.cached_tokens >= first.usage.prompt_tokens // 32 * 32
    with Model(tiny_folder) as model:
        fresh = model.chat(messages, temperature=0, max_tokens=30)
    assert fresh.usage.cached_tokens == 0
    assert fresh.token_ids == second.token_ids


def test_stop_ids_and_stop_strings(model: Model) -> None:
    im_end = model.tokenizer.id_of("<|im_end|>")
    assert im_end is not None
    result = model.generate("x", logit_bias={im_end: 100}, temperature=0, max_tokens=9)
    assert (result.finish_reason, result.text, result.token_ids) == ("stop", "", ())
    assert result.usage.completion_tokens == 1
    result = model.generate("x", logit_bias={im_end: 100}, max_tokens=3, ignore_eos=True)
    assert result.usage.completion_tokens == 3
    word = model.tokenize("model")[0]
    text = model.detokenize([word])
    result = model.generate(
        "x", logit_bias={word: 100}, temperature=0, max_tokens=9, stop=text[-1] + text[0]
    )
    assert (result.finish_reason, result.text) == ("stop", text[:-1])
    assert result.usage.completion_tokens == 2


def test_the_seed_is_told_and_gives_the_same_again(model: Model) -> None:
    first = model.generate("The", temperature=1.5, max_tokens=30)
    second = model.generate("The", temperature=1.5, max_tokens=30)
    assert first.token_ids != second.token_ids
    again = model.generate("The", temperature=1.5, max_tokens=30, seed=first.seed)
    assert again.token_ids == first.token_ids


def test_sampled_tokens_are_drawn_by_seed_and_position(
    model: Model, oracle: ReferenceRunner
) -> None:
    """The inverse of the cumulative distribution, by rising token id, at Philox(seed, position)."""
    prompt = model.tokenize("The sky")
    result = model.generate(
        prompt, temperature=0.8, top_p=1, seed=9, max_tokens=12, ignore_eos=True
    )
    tokens = [*prompt, *result.token_ids]
    oracle.clear()
    logits = oracle.forward(tokens)[0]
    for position in range(len(prompt), len(tokens)):
        scaled = logits[position - 1] / 0.8
        cumulative = np.cumsum(np.exp(scaled - scaled.max()))
        draw = uniform(9, position) * cumulative[-1]
        distance = np.abs(cumulative - draw).min() / cumulative[-1]
        if distance > 1e-4:  # otherwise rounding decides
            assert tokens[position] == np.searchsorted(cumulative, draw, side="right")


def test_threads_get_what_each_alone_gets(model: Model) -> None:
    prompts = [f"{word} {number}" for number in range(6) for word in ("The", "small")]
    expected = [model.generate(p, temperature=1, seed=1, max_tokens=25) for p in prompts]
    found: dict[int, Result] = {}

    def work(number: int) -> None:
        found[number] = model.generate(prompts[number], temperature=1, seed=1, max_tokens=25)

    joined([started(work, n) for n in range(len(prompts))])
    assert [found[n].token_ids for n in range(12)] == [r.token_ids for r in expected]
    assert model.statistics()["kv_blocks_held"] == 0


@pytest.fixture
def gated(tiny_folder: Path) -> Iterator[tuple[Model, GatedRunner]]:
    """A model whose steps wait when told to."""
    with Model(tiny_folder) as model:
        runner = model.loaded.engine.runner = GatedRunner(model.loaded.engine.runner)
        yield model, runner
        runner.go_on()


def test_leaving_a_stream_ends_its_request(gated: tuple[Model, GatedRunner]) -> None:
    model, runner = gated
    runner.hold(1)
    for _ in model.stream(QUESTION, ignore_eos=True):
        break
    gc.collect()
    runner.go_on()
    model.generate("x", max_tokens=1)
    runner.hold(1)
    with model.stream(QUESTION, ignore_eos=True) as stream:
        next(stream)
    runner.go_on()
    model.generate("x", max_tokens=1)
    runner.hold(5)
    stream = model.stream(QUESTION, ignore_eos=True)
    next(stream)
    stream.cancel()
    runner.go_on()
    result = stream.result()
    assert result.finish_reason == "cancelled"
    assert len(result.token_ids) <= 6
    model.generate("x", max_tokens=1)
    statistics = model.statistics()
    assert statistics["cancelled"] == 3
    assert statistics["kv_blocks_held"] == 0


INTERRUPTED = """
import os, pathlib, signal, sys, threading
from smolrun import Model

wakes = sys.argv[2] == "wakes"

with Model(pathlib.Path(sys.argv[1]), threads=1) as model:
    runner, steps = model.loaded.engine.runner, []

    class Interrupting:
        def step(self, *arrays):
            runner.step(*arrays)
            steps.append(1)
            if len(steps) == 3:
                # The main thread sits in chat(). One that comes just before it falls asleep does
                # not wake it, no more than one that another thread takes.
                if wakes:
                    os.kill(os.getpid(), signal.SIGINT)
                else:
                    signal.pthread_kill(threading.get_ident(), signal.SIGINT)
                stopped.wait()

    stopped = threading.Event()
    model.loaded.engine.runner = Interrupting()
    try:
        model.chat("x", ignore_eos=True)
    except KeyboardInterrupt:
        stopped.set()
    model.loaded.engine.runner = runner
    model.generate("x", max_tokens=1)
    statistics = model.statistics()
    print(statistics["cancelled"], statistics["kv_blocks_held"], len(steps) < 6)
"""


@pytest.mark.parametrize("signal", ["wakes", "does not wake"])
def test_ctrl_c_ends_the_request(tiny_folder: Path, signal: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tiny_folder), signal],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("1 0 True\n", "", 0)


def test_the_context_is_a_limit(tiny_folder: Path) -> None:
    with Model(tiny_folder, context_size=64) as model:
        assert model.context_size == 64
        with pytest.raises(ContextLengthError) as caught:
            model.generate([5] * 65)
        assert (caught.value.prompt_tokens, caught.value.context_size) == (65, 64)
        with pytest.raises(ContextLengthError):
            model.stream(QUESTION * 30)
        result = model.generate([5] * 63, max_tokens=10, ignore_eos=True)
        assert (len(result.token_ids), result.finish_reason) == (1, "length")
        result = model.generate([5] * 40, ignore_eos=True)
        assert (len(result.token_ids), result.finish_reason) == (24, "length")
        with pytest.raises(ContextLengthError):
            model.forward([5] * 65)


WRONG: list[tuple[str, Any]] = [
    ("prompt", ""),
    ("prompt", []),
    ("prompt", [[]]),
    ("prompt", [-1]),
    ("prompt", [VOCABULARY]),
    ("prompt", [1, "x"]),
    ("prompt", ["x", 1]),
    ("prompt", 5),
    ("prompt", None),
    ("prompt", b"x"),
    ("prompt", {"a": 1}),
    ("prompt", [1.5]),
]


@pytest.mark.parametrize(("field", "prompt"), WRONG, ids=repr)
def test_wrong_prompts(model: Model, field: str, prompt: Any) -> None:
    with pytest.raises(RequestError, match=f"^{field}: "):
        model.generate(prompt)


def test_wrong_arguments_raise_at_once(model: Model) -> None:
    with pytest.raises(RequestError, match="^temperature: "):
        model.stream(QUESTION, temperature=-1)
    arguments: dict[str, Any] = {"best_of": 3}
    with pytest.raises(RequestError, match="^best_of: "):
        model.chat(QUESTION, **arguments)
    wrong: Any
    for wrong in ([], None, [123], [{}], [{"role": "user", "content": 5}]):
        with pytest.raises(RequestError, match="^messages"):
            model.chat(wrong)
    with pytest.raises(TemplateError, match="tools"):
        model.chat(QUESTION, tools=[{"name": "f", "parameters": {}}])
    assert model.statistics()["running"] == 0


def test_the_date_can_be_pinned(tmp_path: Path, tiny_folder: Path) -> None:
    folder = make_folder(tmp_path / "dated")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }} on {{ strftime_now('%d %B %Y') }}{% endfor %}"
    )
    with Model(folder) as model:
        assert model.render("Day", date=datetime.date(2025, 7, 8)) == "Day on 08 July 2025"
        long = model.chat("Day", date=datetime.date(2025, 7, 8), max_tokens=1)
        assert long.usage.prompt_tokens == len(model.tokenize("Day on 08 July 2025"))


def test_defaults_come_from_the_file_then_from_the_family(tmp_path: Path, model: Model) -> None:
    assert (model.default_sampling.temperature, model.default_sampling.top_p) == (0.6, 0.95)
    folder = make_folder(tmp_path / "llama", model_type="llama", no_rope_layers=(1, 1, 1, 1))
    with Model(folder) as llama:
        assert (llama.default_sampling.temperature, llama.default_sampling.top_p) == (0.2, 0.9)
    settings = {"temperature": 0.5, "top_k": 20, "repetition_penalty": 1.1, "eos_token_id": [7, 9]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    with Model(folder) as llama:
        defaults = llama.default_sampling
        assert (defaults.temperature, defaults.top_k, defaults.top_p) == (0.5, 20, 0.9)
        assert defaults.repeat_penalty == 1.1
        assert {7, 9, 2} <= llama.loaded.stop_ids
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 500}))
    with pytest.raises(ModelFormatError, match="temperature"):
        Model(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("context_size", 0),
        ("context_size", -5),
        ("context_size", "8k"),
        ("context_size", True),
        ("threads", 0),
        ("max_sequences", 0),
        ("max_sequences", 257),
        ("max_sequences", 1.5),
        ("dtype", "q4"),
        ("activations", "int8"),
    ],
)
def test_wrong_options(tiny_folder: Path, field: str, value: Any) -> None:
    arguments: dict[str, Any] = {field: value}
    with pytest.raises(RequestError, match=field.replace("_", "[_ ]")):
        Model(tiny_folder, **arguments)


def test_an_error_of_one_prompt_cancels_the_others(gated: tuple[Model, GatedRunner]) -> None:
    model, runner = gated
    runner.hold()
    with pytest.raises(ContextLengthError):
        model.generate([[5] * 10, [5] * 600], ignore_eos=True)
    runner.go_on()
    model.generate("x", max_tokens=1)
    assert model.statistics()["cancelled"] == 1
    assert model.statistics()["kv_blocks_held"] == 0


def test_closing(gated: tuple[Model, GatedRunner], tiny_folder: Path) -> None:
    model, runner = gated
    before = threading.active_count()
    runner.hold(5)
    stream = model.stream(QUESTION, ignore_eos=True)
    next(stream)
    closing = started(model.close)
    assert eventually(lambda: model.loaded.engine.closed)
    runner.go_on()
    joined([closing])
    with pytest.raises(SmolrunError, match="closed"):
        list(stream)
    with pytest.raises(SmolrunError, match="closed"):
        model.generate("x")
    with pytest.raises(SmolrunError, match="closed"):
        model.forward([1])
    model.close()
    dropped = Model(tiny_folder)
    dropped.generate("x", max_tokens=1)
    del dropped
    gc.collect()
    assert threading.active_count() == before


def test_a_process_that_forgets_to_close_ends_well(tiny_folder: Path) -> None:
    code = (
        "import sys, pathlib; from smolrun import Model\n"
        "model = Model(pathlib.Path(sys.argv[1]))\n"
        "stream = model.stream('x', ignore_eos=True); next(stream)\n"
        "print('done')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_it_says_what_it_is(model: Model) -> None:
    assert repr(model) == "Model('tiny', context_size=512)"
    assert model.config.vocab_size == VOCABULARY
