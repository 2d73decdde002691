"""Arguments of the wrong kind are refused by name, wherever they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from smolrun import Model, RequestError
from smolrun.quant.types import WeightType

HUGE = 10**400

CALLS: list[tuple[str, Callable[[Any], object]]] = [
    ("prompt", lambda model: model.generate(np.array(3))),
    ("prompt", lambda model: model.generate(np.array([1.0]))),
    ("logit_bias", lambda model: model.generate("a", logit_bias={1: HUGE})),
    ("temperature", lambda model: model.generate("a", temperature=HUGE)),
    ("date", lambda model: model.chat("a", date="2025-01-01")),
    ("date", lambda model: model.render("a", date=20250101)),
    ("input_ids", lambda model: model.forward([[1, 2], [3]])),
    ("input_ids", lambda model: model.forward([[2**70]])),
    ("start_pos", lambda model: model.forward([1], start_pos="0")),
    ("start_pos", lambda model: model.forward([1], start_pos=0.0)),
    ("start_pos", lambda model: model.forward([1], start_pos=None)),
    ("start_pos", lambda model: model.forward([1], start_pos=np.array([0, 0]))),
    ("text", lambda model: model.tokenize(None)),
    ("text", lambda model: model.tokenize(b"a")),
    ("text", lambda model: model.tokenize(["a"])),
    ("ids", lambda model: model.detokenize(5)),
    ("ids", lambda model: model.detokenize("ab")),
    ("token id", lambda model: model.detokenize(["a"])),
    ("token id", lambda model: model.detokenize([1.5])),
    ("token id", lambda model: model.detokenize([[1]])),
    ("config", lambda _: Model.from_config({"vocab_size": 5})),  # type: ignore[arg-type]
    ("weight_type", lambda model: Model.from_config(model.config, weight_type="F32")),  # type: ignore[arg-type]
    ("weight_type", lambda model: Model.from_config(model.config, weight_type=WeightType.Q4_0)),
    ("seed", lambda model: Model.from_config(model.config, seed=-1)),
    ("seed", lambda model: Model.from_config(model.config, seed=1.5)),  # type: ignore[arg-type]
    ("model", lambda _: Model(None)),  # type: ignore[arg-type]
    ("model", lambda _: Model(5)),  # type: ignore[arg-type]
    ("model", lambda _: Model(b"smollm2-135m")),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("place", range(len(CALLS)))
def test_it_is_named(model: Model, place: int) -> None:
    field, call = CALLS[place]
    with pytest.raises(RequestError, match=field):
        call(model)


def test_numpy_integers_and_iterators_are_as_good(model: Model) -> None:
    expected = model.forward([1, 2, 3])
    model.forward(np.array([[1, 2]], np.uint8), start_pos=np.int64(0))
    found = model.forward([3], start_pos=np.int32(2))
    np.testing.assert_array_equal(found, expected)
    model.clear_kv_cache()
    wanted = model.generate([5, 6], max_tokens=2, temperature=0).token_ids
    prompts: list[Any] = [np.array([5, 6]), iter([5, 6]), (5, np.int64(6))]
    for prompt in prompts:
        assert model.generate(prompt, max_tokens=2, temperature=0).token_ids == wanted
