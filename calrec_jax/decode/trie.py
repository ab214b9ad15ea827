"""The trie of a catalogue's token sequences, as flat arrays.

Notable: it is built level by level from the lexicographically sorted sequences, without a loop over items. Nodes are
numbered breadth first and siblings by token, so the edges of a node are contiguous and edge e always leads to node
e + 1; the sequences below a node are contiguous in the sorted order, so a node is also a range of leaves.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from calrec_jax.errors import CalrecError


@dataclasses.dataclass(frozen=True, eq=False)
class Trie:
    """All token sequences of a catalogue, EOS included. Node 0 is the root; a leaf is a distinct sequence.

    Attributes:
      child_offsets: [nodes + 1] int32; node n's edges e are `[child_offsets[n], child_offsets[n + 1])`, to nodes e + 1.
      edge_tokens: [nodes − 1] int32, ascending within a node.
      node_leaves: [nodes, 2] int32, the range of leaves below a node.
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
        """Tokens of the longest sequence, EOS counted."""
        return len(self.level_offsets) - 2

    def children(self, node: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and nodes one step below."""
        edges = np.arange(self.child_offsets[node], self.child_offsets[node + 1])
        return self.edge_tokens[edges], edges + 1

    def fan_out(self, level: int) -> int:
        """Most children of a node of this depth."""
        begin, end = self.level_offsets[level], self.level_offsets[level + 1]
        return int(np.diff(self.child_offsets[begin : end + 1]).max())


def build_trie(tokens: np.ndarray, offsets: np.ndarray, eos_id: int) -> Trie:
    """Builds the trie of a catalogue.

    Args:
      tokens: [total] token ids of all items end to end, without EOS.
      offsets: [I + 1] into `tokens`; item i is `tokens[offsets[i]:offsets[i + 1]]`.
      eos_id: is put after each item.

    Raises:
      CalrecError: no items, or an item that holds EOS.
    """
    lengths = np.diff(offsets) + 1
    if not len(lengths):
        raise CalrecError("build_trie: the catalogue has no items")
    if np.any(tokens == eos_id):
        item = int(np.searchsorted(offsets, np.flatnonzero(tokens == eos_id)[0], side="right")) - 1
        raise CalrecError(f"build_trie: item {item} holds the EOS token {eos_id} inside its text; correct its text")
    matrix = np.full((len(lengths), int(lengths.max())), -1, np.int32)
    inside = np.arange(matrix.shape[1]) < lengths[:, None] - 1
    matrix[inside] = tokens
    matrix[np.arange(len(lengths)), lengths - 1] = eos_id
    order, leaf_offsets = _sorted_distinct(matrix)
    first = order[leaf_offsets[:-1]]
    matrix, lengths = matrix[first], lengths[first]
    # Tokens that a leaf shares with the leaf before it; a node of depth d begins wherever fewer than d are shared.
    shared = np.full(len(matrix), -1, np.int64)
    shared[1:] = (matrix[1:] != matrix[:-1]).argmax(axis=1)
    levels, ranges, edge_tokens, parents = [0, 1], [np.array([[0, len(matrix)]])], [], []
    above, base = np.zeros(1, np.int64), 0  # first leaves and first number of the nodes one level up
    for depth in range(1, matrix.shape[1] + 1):
        bounds = np.flatnonzero(shared < depth)
        ends = np.append(bounds[1:], len(matrix))
        nodes = lengths[bounds] >= depth
        begins, ends = bounds[nodes], ends[nodes]
        parents.append(base + np.searchsorted(above, begins, side="right") - 1)
        edge_tokens.append(matrix[begins, depth - 1])
        ranges.append(np.stack([begins, ends], axis=1))
        above, base = begins, levels[-1]
        levels.append(base + len(begins))
    counts = np.bincount(np.concatenate(parents), minlength=levels[-1])
    same = int(min(shared[1:].min() if len(matrix) > 1 else lengths[0], lengths.min() - 1))
    return Trie(
        child_offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        edge_tokens=np.concatenate(edge_tokens).astype(np.int32),
        node_leaves=np.concatenate(ranges).astype(np.int32),
        level_offsets=np.array(levels, np.int64),
        leaf_offsets=leaf_offsets,
        leaf_items=order.astype(np.int32),
        leaf_lengths=lengths.astype(np.int32),
        root_path=matrix[0, :same].copy(),
    )


def _sorted_distinct(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows in lexicographic order (ties by row number), and where each distinct row begins in that order."""
    # As big-endian byte strings the rows compare like the sequences: padding (−1) becomes 0, which sorts first.
    wide = matrix + 1
    keys = np.ascontiguousarray(wide, ">u2" if wide.max() < 1 << 16 else ">u4")
    strings = keys.view(f"S{keys.itemsize * keys.shape[1]}").reshape(-1)
    order = np.argsort(strings, kind="stable")
    ordered = strings[order]
    begins = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    return order, np.append(begins, len(order)).astype(np.int64)
