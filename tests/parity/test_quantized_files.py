"""llama.cpp computes from our quantized files what we do, as closely as from its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from smolrun import Model
from smolrun.files.quantize import quantize_files
from smolrun.quant.mixes import MIXES
from tests.models import nmse
from tests.parity.test_mixes import llama_cpp_quantize
from tests.parity.test_real_model import llama_cpp_logits

pytestmark = pytest.mark.parity


def difference(path: Path, ids: list[int]) -> float:
    """NMSE of llama.cpp's logits beside ours."""
    with Model(path, activations="exact") as model:
        ours = model.forward([ids], all_positions=True)[0]
    return nmse(llama_cpp_logits(path, ids), ours)


@pytest.mark.parametrize("name", [name for name, mix in MIXES.items() if not mix.base.is_float])
def test_logits(shared_data: Path, tmp_path: Path, name: str) -> None:
    folder = shared_data / "tiny-smollm3"
    ids = np.load(folder / "golden.npz")["medium_ids"].tolist()
    source = folder / "tiny-smollm3-bf16.gguf"
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    quantize_files(source, ours, MIXES[name])
    llama_cpp_quantize(source, theirs, MIXES[name].file_type)
    found, usual = difference(ours, ids), difference(theirs, ids)
    print(f"{name}: NMSE {found:.2e}, on llama.cpp's own file {usual:.2e}")
    # What llama.cpp's rounding of inputs to 8 bits makes, which a wrong code would exceed by far.
    assert found <= min(2 * usual, 5e-4)
