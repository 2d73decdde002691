"""Who holds which block of the KV cache, and which prefixes are already computed.

Blocks hold 32 tokens. A request is let in only when the blocks it may ever need (prompt and
max_tokens) are to be had; they are promised at once and taken one by one as it grows, so whoever
is in can finish and nothing is ever preempted, while blocks nobody took yet still serve as
prefix cache.

A full block is known by a hash of the model and of all tokens up to its end. Keys and values of a
block depend on nothing else (every token's numbers are the same however a prompt was cut), so a
block found again has the same bits as one computed again. A block that nobody holds stays until
its place is needed; the one unused for longest goes first.

Used by the engine's loop only: there are no locks here.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

BLOCK_TOKENS = 32


def blocks_for(tokens: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // BLOCK_TOKENS)


@dataclass
class BlockTable:
    """The blocks of one sequence, in the order of its tokens."""

    blocks: list[int] = field(default_factory=list)
    promised: int = 0  # blocks it may still take
    key: bytes = b""  # of the last block that `committed` counts, or of the empty prefix
    committed: int = 0  # leading blocks that were offered to, or came from, the prefix cache

    @property
    def cached_tokens(self) -> int:
        """Tokens of the leading blocks known to the prefix cache."""
        return self.committed * BLOCK_TOKENS


class BlockPool:
    """All blocks of one model's KV cache.

    Args:
        num_blocks: blocks in the pool.
        model: identity of the model; the start of every prefix.
        max_cached: most blocks that nobody holds which are kept as prefix cache; None is all.
    """

    def __init__(self, num_blocks: int, model: bytes = b"", *, max_cached: int | None = None):
        self.num_blocks = num_blocks
        self._model = hashlib.blake2b(model, digest_size=16).digest()
        self._max_cached = num_blocks if max_cached is None else max_cached
        # The last one is taken first: memory that was touched is used again before new memory.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # cached, held by nobody, oldest first
        self._promised = 0

    @property
    def available(self) -> int:
        """Blocks that can still be promised."""
        return len(self._free) + len(self._unused) - self._promised

    @property
    def held(self) -> int:
        """Blocks that sequences hold."""
        return self.num_blocks - len(self._free) - len(self._unused)

    @property
    def cached(self) -> int:
        """Blocks that the prefix cache can find."""
        return len(self._block_of)

    def admit(self, tokens: Sequence[int], total: int, salt: bytes = b"") -> BlockTable | None:
        """Start a sequence of `tokens` that may grow to `total` tokens.

        Leading blocks that the prefix cache knows are taken from it, but never the last token:
        its logits have to be computed. None when the blocks are not to be had now. Sequences
        with different salts never share a block.
        """
        table = BlockTable(key=hashlib.blake2b(self._model + salt, digest_size=16).digest())
        for start in range(0, len(tokens) - BLOCK_TOKENS, BLOCK_TOKENS):
            key = _next_key(table.key, tokens[start : start + BLOCK_TOKENS])
            block = self._block_of.get(key)
            if block is None:
                break
            table.blocks.append(block)
            table.key = key
            table.committed += 1
        table.promised = max(blocks_for(total) - len(table.blocks), 0)
        revived = sum(block in self._unused for block in table.blocks)
        if table.promised + revived > self.available:
            return None
        self._promised += table.promised
        for block in table.blocks:
            self._unused.pop(block, None)
            self._references[block] += 1
        return table

    def promise(self, table: BlockTable, total: int) -> bool:
        """Promise `table` the blocks for `total` tokens; False when they are not to be had."""
        more = blocks_for(total) - len(table.blocks) - table.promised
        if more > self.available:
            return False
        if more > 0:
            table.promised += more
            self._promised += more
        return True

    def grow(self, table: BlockTable, tokens: int) -> None:
        """Take the blocks for `tokens` tokens out of what was promised to `table`."""
        for _ in range(blocks_for(tokens) - len(table.blocks)):
            if table.promised < 1:
                raise RuntimeError("a sequence outgrew the blocks promised to it")
            if not self._free:
                self._forget(next(iter(self._unused)))
            block = self._free.pop()
            self._references[block] = 1
            table.blocks.append(block)
            table.promised -= 1
            self._promised -= 1

    def commit(self, table: BlockTable, tokens: Sequence[int], computed: int) -> None:
        """Make the full blocks among the first `computed` tokens known to the prefix cache.

        Call it only once logits that depend on them were found finite.
        """
        while (end := (table.committed + 1) * BLOCK_TOKENS) <= computed:
            table.key = _next_key(table.key, tokens[end - BLOCK_TOKENS : end])
            block = table.blocks[table.committed]
            table.committed += 1
            # Two sequences may have computed the same tokens side by side: the first one stays.
            if table.key not in self._block_of:
                self._block_of[table.key] = block
                self._key_of[block] = table.key

    def release(self, table: BlockTable) -> None:
        """End a sequence; what the prefix cache knows of it stays until its place is needed."""
        # From the end: of a prefix, the last block is the first to go.
        for block in reversed(table.blocks):
            self._references[block] -= 1
            if self._references[block]:
                continue
            if block in self._key_of:
                self._unused[block] = None
            else:
                self._free.append(block)
        self._drop(table)
        while len(self._unused) > self._max_cached:
            self._forget(next(iter(self._unused)))

    def discard(self, table: BlockTable) -> list[int]:
        """End a sequence whose numbers went bad; returns the blocks to wipe.

        They leave the prefix cache. Blocks that other sequences hold too were proven good by them.
        """
        bad = [block for block in table.blocks if self._references[block] == 1]
        for block in bad:
            self._unregister(block)
        self.release(table)
        return bad

    def truncate(self, table: BlockTable, tokens: int) -> None:
        """Give back the blocks past the first `tokens` tokens of an uncached sequence."""
        while len(table.blocks) > blocks_for(tokens):
            block = table.blocks.pop()
            self._references[block] -= 1
            self._free.append(block)

    def _drop(self, table: BlockTable) -> None:
        self._promised -= table.promised
        table.promised = 0
        table.blocks.clear()

    def _forget(self, block: int) -> None:
        del self._unused[block]
        self._unregister(block)
        self._free.append(block)

    def _unregister(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]


def _next_key(key: bytes, tokens: Sequence[int]) -> bytes:
    return hashlib.blake2b(key + array("i", tokens).tobytes(), digest_size=16).digest()
