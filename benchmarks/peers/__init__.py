"""The programs that smolrun is compared with, each behind one small face."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

from peers.llama_cpp import LlamaCppPeer
from peers.openvino import OpenVinoPeer
from peers.peer import Peer, Settings
from peers.smolrun import SmolrunPeer
from peers.transformers import TransformersPeer

__all__ = ["PEERS", "Peer", "Settings", "SmolrunPeer"]

# How each is loaded: ImportError where it is not installed, any other exception where it does not
# take the file.
PEERS: Mapping[str, Callable[[Path, Settings], Peer]] = {
    "llama.cpp": LlamaCppPeer,
    "openvino": OpenVinoPeer,
    "transformers-f32": functools.partial(TransformersPeer, dtype="float32"),
    "transformers-bf16": functools.partial(TransformersPeer, dtype="bfloat16"),
}
