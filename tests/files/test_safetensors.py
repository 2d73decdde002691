"""The safetensors reader against what the safetensors package writes and takes."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from smolrun.errors import ModelFormatError
from smolrun.files.checkpoint import open_checkpoint
from smolrun.files.safetensors import SafetensorsFile, open_shards
from smolrun.quant.types import WeightType

from .corpus_folders import index, whole
from .images import safetensors_image, tiny_config, tiny_safetensors

GOOD = '{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'


def test_what_the_package_writes(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    arrays: dict[str, np.ndarray[Any, np.dtype[Any]]] = {
        "matrix": random.normal(size=(5, 7)).astype(np.float32),
        "halves": random.normal(size=(3, 2)).astype(np.float16),
        "vector": random.normal(size=9).astype(np.float32),
    }
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    file = SafetensorsFile.open(path)
    assert file.metadata == {"format": "pt"}
    assert file.tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        tensor = file.tensors[name]
        assert tensor.shape == array.shape
        assert tensor.type is (WeightType.F16 if array.dtype == np.float16 else WeightType.F32)
        assert tensor.data.tobytes() == array.tobytes()
        assert not tensor.data.flags.writeable


def test_bfloat16(tmp_path: Path) -> None:
    """NumPy has no bfloat16, so the package's reader is the oracle here, not its writer."""
    written = safetensors_image({"x": ("BF16", (2, 3), bytes(range(12)))}).to_bytes()
    path = tmp_path / "model.safetensors"
    path.write_bytes(written)
    tensor = SafetensorsFile.open(path).tensors["x"]
    ((name, theirs),) = safetensors.deserialize(written)  # type: ignore[no-untyped-call]
    assert (name, theirs["dtype"], theirs["shape"]) == ("x", "BF16", [2, 3])
    assert (tensor.type, tensor.shape) == (WeightType.BF16, (2, 3))
    assert tensor.data.tobytes() == bytes(theirs["data"])


@pytest.mark.parametrize(
    "header",
    [
        f'{{"a":{GOOD}}}',
        f'  \n{{"a":{GOOD}}}',
        f'{{"a":{GOOD}}}      ',
        f'{{"__metadata__":{{"x":"y"}},"a":{GOOD}}}',
        f'{{"a":{GOOD[:-1]},"more":1}}}}',
        '{"b":{"dtype":"F16","shape":[2],"data_offsets":[12,16]},'
        '"a":{"dtype":"F32","shape":[3,1],"data_offsets":[0,12]}}',
    ],
    ids=["plain", "space before", "space after", "metadata", "extra field", "any order"],
)
def test_accepted_headers(header: str, tmp_path: Path) -> None:
    """The rows of the table that a reader must take, taken by the reference too."""
    content = struct.pack("<Q", len(header)) + header.encode() + bytes(16)
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    theirs = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    assert {name for name, _ in theirs} == SafetensorsFile.open(path).tensors.keys()


def test_nan_weights_load(tmp_path: Path) -> None:
    """Numbers are looked at when they are used, not at load."""
    values = np.full(4, np.nan, np.float32)
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_image({"a": ("F32", (4,), values.tobytes())}).to_bytes())
    assert SafetensorsFile.open(path).tensors["a"].data.tobytes() == values.tobytes()


# -- shards -----------------------------------------------------------------------------------


def write_shards(root: Path, parts: int = 3) -> dict[str, bytes]:
    """The tiny model in several files; returns the content of each tensor."""
    image = tiny_safetensors()
    contents = {
        name: image.data[slice(*entry["data_offsets"])] for name, entry in image.header.items()
    }
    weight_map: dict[str, str] = {}
    for part in range(parts):
        file_name = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        names = list(contents)[part::parts]
        tensors: dict[str, Any] = {}
        for name in names:
            shape = tuple(image.header[name]["shape"])
            tensors[name] = ("F32", shape, contents[name])
            weight_map[name] = file_name
        (root / file_name).write_bytes(safetensors_image(tensors).to_bytes())
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (root / "config.json").write_text(json.dumps(tiny_config()))
    return contents


def test_sharded_model(tmp_path: Path) -> None:
    contents = write_shards(tmp_path)
    for path in (tmp_path, tmp_path / "model-00002-of-00003.safetensors"):
        checkpoint = open_checkpoint(path)
        found = {name: tensor.data.tobytes() for name, tensor in checkpoint.tensors.items()}
        assert found == contents
        assert len(checkpoint.files) == 3
        assert checkpoint.file_bytes == sum(
            p.stat().st_size for p in tmp_path.glob("*.safetensors")
        )


def test_the_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "models--user--repo"
    blobs, snapshot = repository / "blobs", repository / "snapshots/abc123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    write_shards(blobs)
    for place, file in enumerate(sorted(blobs.iterdir())):
        blob = file.rename(blobs / f"{place:064x}")
        os.symlink(f"../../blobs/{blob.name}", snapshot / file.name)
    assert len(open_checkpoint(snapshot).tensors) == len(tiny_safetensors().header)


def test_nothing_outside_the_folder_is_opened(tmp_path: Path) -> None:
    """Every file that Python opens is watched while hostile names are tried."""
    root, secret = tmp_path / "model", tmp_path / "secret.safetensors"
    root.mkdir()
    secret.write_bytes(tiny_safetensors().to_bytes())
    os.symlink(secret, root / "link.safetensors")
    os.symlink(tmp_path, root / "sub")
    opened: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open":
            opened.append(os.path.realpath(str(arguments[0])))

    sys.addaudithook(watch)  # stays for the life of the process
    try:
        for name in (
            "../secret.safetensors",
            str(secret),
            "a/../../secret.safetensors",
            "link.safetensors",
            "sub/secret.safetensors",
        ):
            index(whole(name))(root)
            with pytest.raises(ModelFormatError, match="weight_map"):
                open_shards(root / "model.safetensors.index.json")
    finally:
        watching = False
    assert str(root / "model.safetensors.index.json") in opened
    assert str(secret) not in opened
