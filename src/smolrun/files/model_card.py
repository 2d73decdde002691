"""What a model's README.md says about it in its front matter, and GGUF's keys for that.

Of YAML only what model cards use is read: texts and lists of texts. Anything else is left out.
Source: llama.cpp's converter, `gguf-py/gguf/metadata.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from smolrun.files.gguf_writer import TypedValue
from smolrun.files.mapping import read_small_file

MAX_CARD_BYTES = 4 << 20
_MAX_FRONT_MATTER_LINES = 10_000

Card = dict[str, "str | list[str]"]

# Key in the front matter: key in GGUF
_TEXTS = {
    "name": "general.name",
    "author": "general.author",
    "version": "general.version",
    "organization": "general.organization",
    "finetune": "general.finetune",
    "basename": "general.basename",
    "description": "general.description",
    "size_label": "general.size_label",
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
}
# GGUF key: keys in the front matter whose texts it lists
_LISTS = {"general.tags": ("tags", "pipeline_tag"), "general.languages": ("language", "languages")}
_REPOSITORIES = {"base_model": "general.base_model", "datasets": "general.dataset"}
_HUB = "https://huggingface.co/"


def read_card(folder: Path) -> Card:
    """The front matter of a folder's README.md; empty where there is none."""
    content = read_small_file(folder / "README.md", MAX_CARD_BYTES)
    lines = (content or b"").decode("utf-8", "replace").splitlines()[:_MAX_FRONT_MATTER_LINES]
    if not lines or lines[0].strip() != "---":
        return {}
    card: Card = {}
    key = ""
    for line in lines[1:]:
        if line.strip() == "---":
            return card
        item = re.match(r"\s*-\s+(.*)", line)
        if item and isinstance(values := card.get(key), list):
            # An item that is itself a mapping, as in model-index, is none of ours.
            if ": " not in item[1] and not item[1].endswith(":"):
                values.append(_plain(item[1]))
            continue
        entry = re.match(r"([A-Za-z_][\w-]*):(?:\s+(.*))?$", line)
        if not entry:
            continue
        key, value = entry[1], (entry[2] or "").strip()
        if value.startswith("[") and value.endswith("]"):
            card[key] = [_plain(one) for one in value[1:-1].split(",") if one.strip()]
        elif not value:
            card[key] = []
        elif value[0] not in "|>{&*!":
            card[key] = _plain(value)
    return {}  # the front matter never ends: it was none


def _plain(value: str) -> str:
    """A scalar without its quotes and without a comment behind it."""
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] == '"':
        try:
            return str(json.loads(value))
        except ValueError:
            return value[1:-1]
    if len(value) > 1 and value[0] == value[-1] == "'":
        return value[1:-1].replace("''", "'")
    return re.sub(r"\s+#.*$", "", value)


def card_metadata(card: Card) -> dict[str, TypedValue]:
    """The keys of GGUF that the front matter fills."""
    metadata: dict[str, TypedValue] = {}
    for name, key in _TEXTS.items():
        value = card.get(name)
        if name == "license" and isinstance(value, list):
            value = ",".join(value)
        if value and isinstance(value, str):
            metadata[key] = TypedValue("string", value)
    for key, names in _LISTS.items():
        values = [text for name in names for text in _as_list(card.get(name))]
        if values:
            metadata[key] = TypedValue("string[]", values)
    for name, prefix in _REPOSITORIES.items():
        repositories = _as_list(card.get(name))
        if repositories:
            metadata[f"{prefix}.count"] = TypedValue("u32", len(repositories))
        for index, repository in enumerate(repositories):
            for part, text in _repository(repository).items():
                metadata[f"{prefix}.{index}.{part}"] = TypedValue("string", text)
    return metadata


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def _repository(name: str) -> dict[str, str]:
    """What GGUF says of a repository on the Hub."""
    path = name.removeprefix(_HUB)
    if "://" in path:
        return {"repo_url": name}
    organization, _, model = path.rpartition("/")
    found = {"name": title(model)}
    if version := name_parts(model).get("version"):
        found["version"] = version
    if organization:
        found["organization"] = title(organization)
        found["repo_url"] = _HUB + path
    return found


def title(name: str) -> str:
    """A repository's name as a title: tiny-smollm3 -> Tiny Smollm3."""
    words = name.replace("-", " ").split()
    is_version = re.compile(r"v?\d.*")
    return " ".join(
        word.title() if word.islower() and not is_version.fullmatch(word) else word
        for word in words
    )


def name_parts(name: str, parameters: int | None = None) -> dict[str, str]:
    """GGUF's parts of a model's name: SmolLM2-135M-Instruct -> basename, size_label, finetune.

    Empty where the name has no part that is a size, or one that is far from `parameters`.
    """
    parts = [part for part in name.split("-") if part]
    is_size = re.compile(r"(\d+(?:[._]\d+)?)([KMBT])", re.IGNORECASE)
    sizes = [(n, match) for n, part in enumerate(parts) if n and (match := is_size.fullmatch(part))]
    if not sizes:
        return {}
    place, match = sizes[0]
    label = (match[1].replace("_", ".") + match[2]).upper()
    size = float(label[:-1]) * 1000 ** (1 + "KMBT".index(label[-1]))
    if parameters is not None and abs(size - parameters) > 7 / 8 * parameters:
        return {}
    versions = [part for part in parts[place + 1 :] if re.fullmatch(r"v\d+(\.\d+)*", part, re.I)]
    rest = [part for part in parts[place + 1 :] if part not in versions]
    found = {
        "basename": "-".join(parts[:place]),
        "size_label": label,
        "finetune": "-".join(rest),
        "version": "-".join(versions),
    }
    return {key: value for key, value in found.items() if value}


def size_label(parameters: int) -> str:
    """A number of parameters in two digits or more: 134515008 -> 135M, 5314816 -> 5.3M."""
    for unit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters > unit or suffix == "K":
            value = parameters / unit
            digits = max(2 - len(str(round(value)).lstrip("0")), 0)
            return f"{value:.{digits}f}{suffix}"
    raise AssertionError


def card_text(metadata: Mapping[str, object], title: str) -> str:
    """A README.md whose front matter carries what a GGUF file says about its model."""
    lines = []
    for name, key in _TEXTS.items():
        value = metadata.get(key)
        if isinstance(value, str) and value:
            lines.append(f"{name}: {json.dumps(value, ensure_ascii=False)}")
    for key, names in _LISTS.items():
        lines += _yaml_list(names[0], metadata.get(key))
    for name, prefix in _REPOSITORIES.items():
        count = metadata.get(f"{prefix}.count")
        urls = [
            metadata.get(f"{prefix}.{index}.repo_url")
            for index in range(count if isinstance(count, int) and count < 1000 else 0)
        ]
        lines += _yaml_list(name, [str(url).removeprefix(_HUB) for url in urls if url])
    front = "\n".join(["---", *lines, "---"])
    return f"{front}\n\n# {title}\n\nConverted from a GGUF file by smolrun.\n"


def _yaml_list(name: str, values: object) -> list[str]:
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        return []
    return [f"{name}:", *(f"- {json.dumps(str(value), ensure_ascii=False)}" for value in values)]
