"""The trie of token sequences against a dictionary of dictionaries."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calrec_jax.decode.trie import Trie, build_trie
from calrec_jax.errors import CalrecError

EOS = 1
SEQUENCES = st.lists(st.lists(st.integers(2, 5), min_size=1, max_size=6), min_size=1, max_size=25)


def flat(sequences: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.concatenate([[0], np.cumsum([len(s) for s in sequences])])
    return np.array([t for s in sequences for t in s], np.int32), offsets


def walk(trie: Trie, node: int = 0, path: tuple[int, ...] = ()) -> dict[tuple[int, ...], list[int]]:
    """Path to the node where one leaf is left, and the items of the leaf, for every leaf, by walking the edges."""
    tokens, nodes = trie.children(node)
    begin, end = trie.node_leaves[node]
    assert trie.depths(np.array([node])) == [len(path)]
    if not len(tokens):
        assert end == begin + 1
        assert trie.leaf_lengths[begin] >= len(path)
        return {path: trie.leaf_items[trie.leaf_offsets[begin] : trie.leaf_offsets[begin + 1]].tolist()}
    assert end > begin + 1 or len(trie.leaf_lengths) == 1
    assert (np.diff(tokens) > 0).all()
    found: dict[tuple[int, ...], list[int]] = {}
    for token, child in zip(tokens.tolist(), nodes.tolist(), strict=True):
        found |= walk(trie, child, (*path, token))
    assert len(found) == end - begin
    return found


@settings(max_examples=100, deadline=None)
@given(SEQUENCES)
def test_every_sequence_and_nothing_else_is_in_the_trie(sequences):
    trie = build_trie(*flat(sequences), EOS)
    expected: dict[tuple[int, ...], list[int]] = {}
    for item, sequence in enumerate(sequences):
        expected.setdefault((*sequence, EOS), []).append(item)
    found = walk(trie)
    assert list(found.values()) == [expected[path] for path in sorted(expected)]
    assert trie.leaf_lengths.tolist() == [len(path) for path in sorted(expected)]
    prefixes = {path[:n] for path in expected for n in range(len(path) + 1)}
    for path, items in found.items():
        whole = next(p for p, others in expected.items() if others == items)
        assert whole[: len(path)] == path
        alone = [n for n in range(len(whole) + 1) if sum(p[:n] == whole[:n] for p in expected) == 1]
        assert len(path) == (alone[0] if len(expected) > 1 else len(whole))
    inner = {path[:n] for path in found for n in range(len(path) + 1)}
    assert len(trie.node_leaves) == len(inner)
    assert len(trie.edge_tokens) == len(trie.child_offsets) - 2 == trie.level_offsets[-1] - 1
    assert trie.depth == max(map(len, found))
    for level in range(trie.depth + 1):
        nodes = [p for p in inner if len(p) == level]
        assert trie.level_offsets[level + 1] - trie.level_offsets[level] == len(nodes)
        fans = [sum(q[:-1] == p for q in prefixes if q) for p in nodes if sum(f[:level] == p for f in found) > 1]
        assert trie.fan_out(level) == max(fans, default=trie.fan_out(level) if len(found) == 1 else 0)


@settings(max_examples=50, deadline=None)
@given(SEQUENCES, st.data())
def test_items_can_be_left_out(sequences, data):
    keep = data.draw(st.lists(st.booleans(), min_size=len(sequences), max_size=len(sequences)))
    if not any(keep):
        with pytest.raises(CalrecError, match="no items that are not left out"):
            build_trie(*flat(sequences), EOS, np.array(keep))
        return
    trie = build_trie(*flat(sequences), EOS, np.array(keep))
    rows = np.flatnonzero(keep)
    alone = build_trie(*flat([sequences[i] for i in rows]), EOS)
    assert trie.leaf_items.tolist() == rows[alone.leaf_items].tolist()
    assert walk(trie).keys() == walk(alone).keys()


@settings(max_examples=50, deadline=None)
@given(SEQUENCES, st.lists(st.integers(2, 5), max_size=3))
def test_root_path_is_the_common_beginning(sequences, common):
    sequences = [common + s for s in sequences]
    trie = build_trie(*flat(sequences), EOS)
    paths = [(*s, EOS) for s in sequences]
    shortest = min(map(len, paths)) - 1
    same = next((i for i in range(shortest) if len({p[i] for p in paths}) > 1), shortest)
    assert trie.root_path.tolist() == list(paths[0][:same])


def test_token_ids_of_two_bytes_and_more_sort_as_numbers():
    for high in (300, 70_000):
        trie = build_trie(*flat([[high], [2], [256]]), EOS)
        assert trie.children(0)[0].tolist() == [2, 256, high]


def test_a_catalogue_of_real_size_takes_no_time():
    rng = np.random.default_rng(0)
    sequences = [rng.integers(2, 4096, rng.integers(5, 40)).tolist() for _ in range(4385)]
    arrays = flat(sequences)
    began = time.process_time()
    trie = build_trie(*arrays, EOS)
    assert time.process_time() - began < 1.0
    assert len(trie.leaf_items) == 4385


def test_what_int32_cannot_number_is_refused(monkeypatch):
    arrays = flat([[2, 3], [2, 4], [5]])
    monkeypatch.setattr("calrec_jax.decode.trie._MOST", 2)
    with pytest.raises(CalrecError, match="3 items, and int32 numbers 2; split the catalogue"):
        build_trie(*arrays, EOS)
    monkeypatch.setattr("calrec_jax.decode.trie._MOST", 4)
    with pytest.raises(CalrecError, match="over 4 nodes, more than int32 numbers"):
        build_trie(*arrays, EOS)


def test_bad_catalogues_are_named():
    with pytest.raises(CalrecError, match="no items$"):
        build_trie(np.zeros(0, np.int32), np.zeros(1, np.int64), EOS)
    with pytest.raises(CalrecError, match="item 1 holds the EOS"):
        build_trie(*flat([[3, 4], [3, EOS]]), EOS)
