"""What is in a model: configuration, weight types, real bits per weight, and memory it needs."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from smolrun.cli import options
from smolrun.cli.options import Parser
from smolrun.cli.terminal import Console, human_bytes, table

if TYPE_CHECKING:
    from smolrun.files.checkpoint import Checkpoint
    from smolrun.model.config import ModelConfig

CONTEXTS = (2048, 8192, 32768, 65536, 131072)
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def add_arguments(parser: Parser) -> None:
    """Flags of `smolrun show`."""
    parser.add_argument("words", nargs="*", metavar="[MODEL]", help="a path, an alias, user/repo")
    options.add_model(parser)
    parser.flag("--program", action="store_true", help="print the listing that is computed")
    parser.flag("--tensors", action="store_true", help="list every tensor with its type")
    parser.flag("--template", action="store_true", help="print the chat template")
    parser.flag("--json", action="store_true", help="print everything as one JSON object")
    options.add_output(parser)


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Run the verb."""
    name, rest = (arguments.model, arguments.words) if arguments.model else (None, [])
    if name is None:
        name, rest = (
            (arguments.words[0], arguments.words[1:])
            if arguments.words
            else options.model_and_words(arguments)
        )
    if rest:
        raise options.UsageError(f"show takes one model, found also {' '.join(rest)}")
    path = options.resolved(name, arguments, console)
    from smolrun.files.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    try:
        if arguments.program:
            from smolrun.model.llama import build

            console.print(str(build(checkpoint.config)))
        elif arguments.tensors:
            console.print(_tensor_table(checkpoint))
        elif arguments.template:
            console.print(checkpoint.chat_template or "")
        elif arguments.json:
            console.print(json.dumps(describe(checkpoint), ensure_ascii=False, indent=1))
        else:
            console.print(as_text(checkpoint))
    finally:
        checkpoint.close()
    return 0


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything that `--json` prints."""
    import dataclasses

    config = checkpoint.config
    template = checkpoint.chat_template
    return {
        "name": checkpoint.name,
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "file_bytes": checkpoint.file_bytes,
        "config": dataclasses.asdict(config),
        "num_parameters": config.num_parameters,
        "weights": _weights(checkpoint),
        "bits_per_weight": bits_per_weight(checkpoint),
        "tensors": [
            {"name": name, "type": tensor.type.value, "shape": list(tensor.shape)}
            for name, tensor in checkpoint.tensors.items()
        ],
        "memory": _memory(checkpoint),
        "generation": checkpoint.generation,
        "chat_template": template,
    }


def bits_per_weight(checkpoint: Checkpoint) -> float:
    """Bits of all tensors over the number of all weights: what the mix really comes to."""
    tensors = checkpoint.tensors.values()
    weights = sum(tensor.rows * tensor.columns for tensor in tensors)
    return 8 * sum(tensor.data.nbytes for tensor in tensors) / weights


def _weights(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Per weight type: tensors, weights, bytes; the largest first."""
    counts: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for tensor in checkpoint.tensors.values():
        count = counts[tensor.type.value]
        count[0] += 1
        count[1] += tensor.rows * tensor.columns
        count[2] += tensor.data.nbytes
    made = [
        {
            "type": name,
            "tensors": tensors,
            "weights": weights,
            "bytes": size,
            "bits_per_weight": 8 * size / weights,
        }
        for name, (tensors, weights, size) in counts.items()
    ]
    return sorted(made, key=lambda entry: -int(entry["bytes"]))


def _tensor_table(checkpoint: Checkpoint) -> str:
    rows = [("tensor", "type", "shape", "size")]
    for name, tensor in checkpoint.tensors.items():
        shape = " x ".join(map(str, tensor.shape))
        rows.append((name, tensor.type.value, shape, human_bytes(tensor.data.nbytes)))
    return table(rows, right=(2, 3))


def _memory(checkpoint: Checkpoint) -> list[dict[str, int]]:
    """Per context size: bytes of the KV cache of one conversation, and with the weights."""
    config = checkpoint.config
    limit = config.max_position_embeddings
    if config.model_type == "smollm3" and limit == 65536:
        limit *= 2  # YaRN, see ModelConfig.with_context
    sizes = sorted({size for size in CONTEXTS if size < limit} | {limit})
    weights = sum(tensor.data.nbytes for tensor in checkpoint.tensors.values())
    return [
        {
            "context_size": size,
            "kv_bytes": size * config.kv_bytes_per_token,
            "total_bytes": size * config.kv_bytes_per_token + weights,
        }
        for size in sizes
    ]


def as_text(checkpoint: Checkpoint) -> str:
    """The same for people."""
    config = checkpoint.config
    facts = [
        ("file", f"{checkpoint.path}"),
        ("format", f"{checkpoint.format.upper()}, {human_bytes(checkpoint.file_bytes)}"),
        ("parameters", f"{config.num_parameters:,}" + _tied(config)),
        ("layers", f"{config.num_hidden_layers} of {config.hidden_size} wide{_nope(config)}"),
        ("feed-forward", f"{config.intermediate_size}"),
        (
            "attention",
            f"{config.num_attention_heads} heads of {config.head_dim}, "
            f"{config.num_key_value_heads} KV heads",
        ),
        ("context", f"{config.max_position_embeddings} tokens, {_rope(config)}"),
        ("vocabulary", f"{config.vocab_size} tokens"),
        ("chat", _chat(checkpoint)),
    ]
    settings = [
        f"{key} {value:g}"
        for key, value in checkpoint.generation.items()
        if key in _SAMPLING and isinstance(value, (int, float))
    ]
    if settings:
        facts.append(("sampling", ", ".join(settings)))
    rows = [("weights", "tensors", "parameters", "size", "bits each")]
    for entry in _weights(checkpoint):
        rows.append(
            (
                f"  {entry['type']}",
                f"{entry['tensors']}",
                f"{entry['weights']:,}",
                human_bytes(entry["bytes"]),
                f"{entry['bits_per_weight']:.2f}",
            )
        )
    size = sum(tensor.data.nbytes for tensor in checkpoint.tensors.values())
    count = sum(tensor.rows * tensor.columns for tensor in checkpoint.tensors.values())
    rows.append(
        (
            "  all",
            f"{len(checkpoint.tensors)}",
            f"{count:,}",
            human_bytes(size),
            f"{bits_per_weight(checkpoint):.2f}",
        )
    )
    memory = [("context", "KV cache", "with weights")]
    memory += [
        (
            f"  {entry['context_size']}",
            human_bytes(entry["kv_bytes"]),
            human_bytes(entry["total_bytes"]),
        )
        for entry in _memory(checkpoint)
    ]
    return "\n".join(
        [
            checkpoint.name,
            table([(f"  {name}", value) for name, value in facts]),
            "",
            table(rows, right=(1, 2, 3, 4)),
            "",
            table(memory, right=(1, 2)),
            "  The KV cache grows as the conversation does. Buffers and tokenizer come on top: "
            f"at most {200 if config.vocab_size > 100_000 else 100} MB.",
        ]
    )


def _tied(config: ModelConfig) -> str:
    return ", embedding and head tied" if config.tie_word_embeddings else ""


def _nope(config: ModelConfig) -> str:
    without = [layer for layer, rope in enumerate(config.no_rope_layers) if not rope]
    return f", {len(without)} without RoPE ({', '.join(map(str, without))})" if without else ""


def _rope(config: ModelConfig) -> str:
    scaling = config.rope_scaling
    text = f"RoPE theta {config.rope_theta:g}"
    return text if scaling.type == "default" else f"{text}, {scaling.type} x {scaling.factor:g}"


def _chat(checkpoint: Checkpoint) -> str:
    template = checkpoint.chat_template
    if template is None:
        return "no template: continues text"
    thinks = "enable_thinking" in template
    tools = "tools" in template
    return "has a template" + ", can think" * thinks + ", can call tools" * tools
