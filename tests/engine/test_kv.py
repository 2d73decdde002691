from __future__ import annotations

import random

import pytest

from smolrun.engine.kv import BLOCK_TOKENS, BlockPool, BlockTable, blocks_for


def run(
    pool: BlockPool, tokens: list[int], total: int | None = None, salt: bytes = b""
) -> BlockTable:
    """Admit a sequence and compute all of its tokens."""
    table = pool.admit(tokens, total or len(tokens), salt)
    assert table is not None
    pool.grow(table, len(tokens))
    pool.commit(table, tokens, len(tokens))
    return table


def test_a_prefix_is_found_again_but_never_the_last_token() -> None:
    pool = BlockPool(16)
    tokens = list(range(96))
    pool.release(run(pool, tokens))
    assert (pool.held, pool.cached, pool.available) == (0, 3, 16)
    again = pool.admit(tokens, 96)
    assert again is not None
    assert again.cached_tokens == 64
    longer = pool.admit([*tokens, 7], 97)
    assert longer is not None
    assert longer.cached_tokens == 96
    assert longer.blocks[:2] == again.blocks


def test_a_changed_token_ends_the_prefix() -> None:
    pool = BlockPool(16)
    tokens = list(range(100))
    pool.release(run(pool, tokens))
    for changed, expected in ((0, 0), (31, 0), (32, 32), (63, 32), (64, 64), (99, 96)):
        other = list(tokens)
        other[changed] += 1000
        table = pool.admit(other, 100)
        assert table is not None
        assert table.cached_tokens == expected
        pool.release(table)


def test_models_and_salts_share_nothing() -> None:
    tokens = list(range(64))
    pool = BlockPool(16)
    pool.release(run(pool, tokens, salt=b"one"))
    table = pool.admit([*tokens, 1], 65, b"two")
    assert table is not None
    assert table.cached_tokens == 0
    first, second = BlockPool(4, b"a"), BlockPool(4, b"b")
    assert run(first, tokens).key != run(second, tokens).key


def test_who_is_let_in_can_finish() -> None:
    pool = BlockPool(4)
    first = pool.admit([1] * 10, 96)
    assert first is not None
    assert pool.admit([2] * 10, 64) is None
    second = pool.admit([2] * 10, 32)
    assert second is not None
    pool.grow(first, 10)
    pool.grow(second, 32)
    pool.grow(first, 96)
    with pytest.raises(RuntimeError, match="outgrew"):
        pool.grow(first, 97)


def test_blocks_taken_from_the_cache_count_against_what_is_available() -> None:
    pool = BlockPool(4)
    tokens = list(range(65))
    pool.release(run(pool, tokens))
    assert pool.available == 4
    other = pool.admit([9], 64)  # promised two of the four, takes none yet
    assert other is not None
    assert pool.admit(tokens, 97) is None  # two from the cache and two more
    table = pool.admit(tokens, 65 - 1)
    assert table is not None
    assert pool.available == 0


def test_the_longest_unused_prefix_goes_first_and_its_end_before_its_start() -> None:
    pool = BlockPool(4)
    pool.release(run(pool, [1] * 64))
    pool.release(run(pool, [2] * 64))
    pool.release(run(pool, [3] * 20))  # takes the place of one block
    for token, expected in ((1, 32), (2, 64)):
        table = pool.admit([token] * 65, 65)
        assert table is not None
        assert table.cached_tokens == expected
        pool.release(table)


def test_the_prefix_cache_has_a_limit() -> None:
    pool = BlockPool(8, max_cached=2)
    pool.release(run(pool, list(range(128))))
    assert pool.cached == 2
    table = pool.admit(list(range(129)), 129)
    assert table is not None
    assert table.cached_tokens == 64


def test_memory_that_was_touched_is_used_again() -> None:
    pool = BlockPool(100)
    for token in range(20):
        table = pool.admit([token] * 20, 60)
        assert table is not None
        pool.grow(table, 60)
        assert max(table.blocks) < 2
        pool.release(table)


def test_discarded_blocks_leave_the_cache() -> None:
    pool = BlockPool(8)
    good = run(pool, [5] * 32)
    bad = pool.admit([5] * 32 + [6] * 64, 96)
    assert bad is not None
    assert bad.cached_tokens == 32
    pool.grow(bad, 96)
    pool.commit(bad, [5] * 32 + [6] * 64, 70)
    wiped = pool.discard(bad)
    assert len(wiped) == 2
    assert not set(wiped) & set(good.blocks)
    assert pool.cached == 1
    assert pool.held == 1


def test_twins_side_by_side() -> None:
    pool = BlockPool(8)
    tokens = list(range(64))
    tables = [pool.admit(tokens, 64) for _ in range(2)]
    for table in tables:
        assert table is not None
        pool.grow(table, 64)
    for table in tables:
        assert table is not None
        pool.commit(table, tokens, 64)
    assert pool.cached == 2
    for table in tables:
        assert table is not None
        pool.release(table)
    assert (pool.held, pool.available, pool.cached) == (0, 8, 2)


def test_truncate() -> None:
    pool = BlockPool(8)
    table = BlockTable()
    assert pool.promise(table, 200)
    pool.grow(table, 200)
    pool.truncate(table, 33)
    assert len(table.blocks) == 2
    assert pool.available == 6
    assert not pool.promise(table, 8 * BLOCK_TOKENS + 1)


@pytest.mark.parametrize("seed", range(5))
def test_random_traffic_loses_no_block_and_shares_no_wrong_one(seed: int) -> None:
    choose = random.Random(seed)
    pool = BlockPool(24, max_cached=choose.choice([0, 5, 24]))
    content: dict[tuple[int, int], int] = {}  # (block, slot): token
    running: list[tuple[BlockTable, list[int], int]] = []
    for _ in range(600):
        if running and choose.random() < 0.5:
            table, tokens, total = running.pop(choose.randrange(len(running)))
            if len(tokens) < total and choose.random() < 0.7:
                tokens.append(choose.randrange(2))
                running.append((table, tokens, total))
            elif choose.random() < 0.2:
                for block in pool.discard(table):
                    for slot in range(BLOCK_TOKENS):
                        content.pop((block, slot), None)
                continue
            else:
                pool.release(table)
                continue
        else:
            tokens = [choose.randrange(2) for _ in range(choose.choice([3, 33, 64, 90]))]
            tokens[:40] = [choose.randrange(2)] * len(tokens[:40])
            total = len(tokens) + choose.randrange(60)
            admitted = pool.admit(tokens, total)
            if admitted is None:
                assert running
                continue
            table = admitted
            running.append((table, tokens, total))
        first = min(len(tokens) - 1, table.cached_tokens)
        pool.grow(table, len(tokens))
        for position in range(first, len(tokens)):
            content[table.blocks[position // BLOCK_TOKENS], position % BLOCK_TOKENS] = tokens[
                position
            ]
        pool.commit(table, tokens, len(tokens))
        for held, known, _ in running:
            for position, token in enumerate(known[: len(held.blocks) * BLOCK_TOKENS]):
                block = held.blocks[position // BLOCK_TOKENS]
                assert content[block, position % BLOCK_TOKENS] == token
    for table, _, _ in running:
        pool.release(table)
    assert pool.held == 0
    assert pool.available == pool.num_blocks


def test_blocks_for() -> None:
    assert [blocks_for(n) for n in (0, 1, 32, 33)] == [0, 1, 1, 2]
