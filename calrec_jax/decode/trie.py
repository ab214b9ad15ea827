"""The trie of a catalogue's token sequences, as flat arrays.

Notable: nodes end where one sequence is left, whose further tokens are its forced tail, so there are about as many as
places where items part, and not as many as tokens. Nodes are numbered breadth first and siblings by token, so the edges
of a node are contiguous and edge e always leads to node e + 1; the sequences below a node are contiguous in their
sorted order, so a node is also a range of leaves. Building takes memory for a few numbers an item beside the tokens.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from calrec_jax.errors import CalrecError

_MOST = 2**31 - 1  # nodes, leaves and items are numbered by int32 on the device


@dataclasses.dataclass(frozen=True, eq=False)
class Trie:
    """All token sequences of a catalogue, EOS included. Node 0 is the root; a leaf is a distinct sequence.

    Attributes:
      child_offsets: [nodes + 1] int32; node n's edges e are `[child_offsets[n], child_offsets[n + 1])`, to nodes e + 1.
      edge_tokens: [nodes − 1] int32, ascending within a node.
      node_leaves: [nodes, 2] int32, the range of leaves below a node; a node with one leaf has no children,
        unless the catalogue has no other.
      level_offsets: [levels + 1] int64; nodes of depth d are `[level_offsets[d], level_offsets[d + 1])`.
      leaf_offsets: [leaves + 1] int64 into `leaf_items`.
      leaf_items: [I] int32 items of each leaf, ascending within it (equal texts, or equal after the cut).
      leaf_lengths: [leaves] int32 tokens, EOS counted.
      root_path: [P] int32, the tokens that all sequences begin with; the last token of a sequence is never among them.
    """

    child_offsets: np.ndarray
    edge_tokens: np.ndarray
    node_leaves: np.ndarray
    level_offsets: np.ndarray
    leaf_offsets: np.ndarray
    leaf_items: np.ndarray
    leaf_lengths: np.ndarray
    root_path: np.ndarray

    @property
    def depth(self) -> int:
        """Tokens after which one sequence is left at the latest."""
        return len(self.level_offsets) - 2

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return sum(getattr(self, field.name).nbytes for field in dataclasses.fields(self))

    def children(self, node: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and nodes one step below."""
        edges = np.arange(self.child_offsets[node], self.child_offsets[node + 1])
        return self.edge_tokens[edges], edges + 1

    def fan_out(self, level: int) -> int:
        """Most children of a node of this depth."""
        begin, end = self.level_offsets[level], self.level_offsets[level + 1]
        return int(np.diff(self.child_offsets[begin : end + 1]).max())

    def depths(self, nodes: np.ndarray) -> np.ndarray:
        """Tokens from the root to each of these nodes."""
        return np.searchsorted(self.level_offsets, nodes, side="right") - 1


def build_trie(tokens: np.ndarray, offsets: np.ndarray, eos_id: int, keep: np.ndarray | None = None) -> Trie:
    """Builds the trie of a catalogue.

    Args:
      tokens: [total] token ids of all items end to end, without EOS.
      offsets: [I + 1] into `tokens`; item i is `tokens[offsets[i]:offsets[i + 1]]`.
      eos_id: is put after each item; no item may hold it.
      keep: [I] bool, items that are in the trie; None is all.

    Raises:
      CalrecError: no items, an item that holds EOS, or more items or nodes than int32 can number.
    """
    items = np.arange(len(offsets) - 1) if keep is None else np.flatnonzero(keep)
    if not len(items):
        raise CalrecError(
            "build_trie: the catalogue has no items"
            + (" that are not left out and have a text" if keep is not None else "")
        )
    if len(items) > _MOST:
        raise CalrecError(f"build_trie: {len(items):,} items, and int32 numbers {_MOST:,}; split the catalogue")
    if np.any(tokens == eos_id):
        item = int(np.searchsorted(offsets, np.flatnonzero(tokens == eos_id)[0], side="right")) - 1
        raise CalrecError(f"build_trie: item {item} holds the EOS token {eos_id} inside its text; correct its text")
    order, shared = _sorted(tokens, offsets, eos_id, items)
    lengths = (np.diff(offsets)[order] + 1).astype(np.int32)
    begins = np.flatnonzero(shared < lengths)  # an item that shares all its tokens has the sequence of the one before
    leaves, leaf_lengths = order[begins], lengths[begins]
    shared = shared[begins]
    # A leaf parts from both its neighbours after this many tokens, where its last node is.
    ends = np.maximum(shared, np.append(shared[1:], -1)) + 1
    if len(leaves) == 1:
        ends[:] = leaf_lengths
    same = int(min(shared[1:].min() if len(leaves) > 1 else leaf_lengths[0], leaf_lengths.min() - 1))
    levels, ranges, edge_tokens, counts = [0, 1], [np.array([[0, len(leaves)]], np.int32)], [], []
    above = np.zeros(1, np.int64)  # first leaves of the nodes one level up
    alive = np.arange(len(leaves))  # leaves that have a node at this depth
    for depth in range(1, int(ends.max()) + 1):
        alive = alive[ends[alive] >= depth]
        begin = alive[shared[alive] < depth]
        edge_tokens.append(_token(tokens, offsets, eos_id, leaves[begin], depth - 1).astype(np.int32))
        # All leaves below a node are among `alive`: its last one stands there before the first of the next node.
        last = np.append(np.searchsorted(alive, begin[1:]) - 1, len(alive) - 1)
        node_ends = alive[last] + 1
        ranges.append(np.stack([begin, node_ends], axis=1).astype(np.int32))
        counts.append(np.bincount(np.searchsorted(above, begin, side="right") - 1, minlength=len(above)))
        above = begin
        levels.append(levels[-1] + len(begin))
        if levels[-1] > _MOST:
            raise CalrecError(f"build_trie: over {_MOST:,} nodes, more than int32 numbers; split the catalogue")
    counts.append(np.zeros(len(above), np.int64))
    return Trie(
        child_offsets=np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int32),
        edge_tokens=np.concatenate(edge_tokens),
        node_leaves=np.concatenate(ranges),
        level_offsets=np.array(levels, np.int64),
        leaf_offsets=np.append(begins, len(order)),
        leaf_items=order.astype(np.int32),
        leaf_lengths=leaf_lengths,
        root_path=tokens[offsets[leaves[0]] : offsets[leaves[0]] + same].astype(np.int32),
    )


def _token(tokens: np.ndarray, offsets: np.ndarray, eos_id: int, items: np.ndarray, place: int) -> np.ndarray:
    """Token number `place` of each item, EOS behind its last one."""
    at = offsets[items] + place
    inside = at < offsets[items + 1]
    return np.where(inside, tokens[np.where(inside, at, 0)], eos_id) if len(tokens) else np.full(len(items), eos_id)


def _sorted(tokens: np.ndarray, offsets: np.ndarray, eos_id: int, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Items in the lexicographic order of their tokens and EOS (ties by number).

    Groups of items that share all tokens so far are sorted by the next one, until each is alone or has ended.

    Returns:
      The items in order, and how many tokens each shares with the one before it (−1 for the first), EOS counted.
    """
    order, shared = items.copy(), np.zeros(len(items), np.int32)
    shared[0] = -1
    at = np.arange(len(order)) if len(order) > 1 else np.arange(0)  # places of items that are in a group
    group = np.zeros(len(at), np.int64)
    for depth in range(int(np.diff(offsets).max()) + 1):
        if not len(at):
            break
        token = _token(tokens, offsets, eos_id, order[at], depth)
        by = np.lexsort((token, group))
        order[at], token = order[at][by], token[by]  # `group` is ascending, so sorting leaves it as it is
        parts = np.append(True, (token[1:] != token[:-1]) | (group[1:] != group[:-1]))
        shared[at[~parts]] = depth + 1  # equal so far; a later depth may find more
        number = np.cumsum(parts) - 1
        alone = np.bincount(number)[number] == 1
        goes_on = ~alone & (token != eos_id)
        at, group = at[goes_on], number[goes_on]
    return order, shared
