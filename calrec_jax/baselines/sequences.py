"""Item sequences packed into rows: several users side by side, next to no padding.

Notable: the rows of an epoch are a function of (seed, epoch) alone, so a resumed run sees what one left alone would
have seen. Axis letters as everywhere: B rows, L items of a row, U users, I items of the catalogue.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from calrec_jax.compiled import compiled

Batch = dict[str, np.ndarray]


@compiled
def _place(lengths, row_items, rows, columns):  # pragma: no cover (compiled)
    row, used = 0, 0
    for sequence in range(len(lengths)):
        if used + lengths[sequence] > row_items:
            row += 1
            used = 0
        rows[sequence] = row
        columns[sequence] = used
        used += lengths[sequence]


def place(lengths: np.ndarray, row_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Puts sequences into rows in their order, each into the open row while it fits ("next fit").

    Args:
      lengths: [U] int64, each at most `row_items`.
      row_items: L.

    Returns:
      [U] int64 the row of each sequence, and [U] int64 the column where it begins.
    """
    rows, columns = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64)
    _place(lengths.astype(np.int64), row_items, rows, columns)
    return rows, columns


@dataclasses.dataclass(frozen=True)
class Sequences:
    """The sequences of U users inside one flat array.

    Attributes:
      items: flat item indices.
      begins: [U] int64, where each sequence begins in `items`.
      lengths: [U] int64.
    """

    items: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray

    def cut(self, longest: int) -> Sequences:
        """The same with at most the last `longest` items of each."""
        lengths = np.minimum(self.lengths, longest)
        return Sequences(self.items, self.begins + self.lengths - lengths, lengths)

    def pack(self, users: np.ndarray, row_items: int, batch_rows: int, *, with_targets: bool) -> Batch:
        """Rows of the sequences of `users`, in that order.

        Args:
          users: whose sequences; one without an item to put in takes no place.
          row_items: L.
          batch_rows: the number of rows is made a multiple of it by empty ones.
          with_targets: the last item of a sequence is only a target, each item the target of the one before it;
            otherwise every item is put in, and targets are 0.

        Returns:
          [B, L] int32 each: "items"; "targets"; "segments", 1 and up within a row, 0 where nothing is; "from_end", how
          many inputs of the sequence come after this one.
        """
        begins, lengths = self.begins[users], self.lengths[users] - int(with_targets)
        begins, lengths = begins[lengths > 0], lengths[lengths > 0]
        rows, columns = place(lengths, row_items)
        num_rows = -(-(int(rows[-1]) + 1 if len(rows) else 1) // batch_rows) * batch_rows
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        at = np.repeat(rows * row_items + columns, lengths) + within
        source = np.repeat(begins, lengths) + within
        first_of_row = np.searchsorted(rows, rows)
        values = {
            "items": self.items[source],
            "targets": self.items[source + 1] if with_targets else np.zeros_like(source),
            "segments": np.repeat(1 + np.arange(len(rows)) - first_of_row, lengths),
            "from_end": np.repeat(lengths, lengths) - 1 - within,
        }
        batch = {}
        for name, value in values.items():
            flat = np.zeros(num_rows * row_items, np.int32)
            flat[at] = value
            batch[name] = flat.reshape(num_rows, row_items)
        return batch

    def epoch(self, seed: int, epoch: int, row_items: int, batch_rows: int) -> Batch:
        """The training rows of an epoch: all sequences in the order of a permutation by (seed, epoch)."""
        order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(self.lengths))
        return self.pack(order, row_items, batch_rows, with_targets=True)
