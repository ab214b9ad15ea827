"""Packs examples into rows: the batch contract of docs/architecture.md, made by NumPy and numba alone.

The stream of rows is a pure function of (examples, seed): windows of W consecutive examples of a seeded permutation are
packed each on its own by best-fit decreasing, and their rows follow each other. Batch s is rows [s*B, (s+1)*B) of that
stream, so the data position in a checkpoint is the step, hosts take slices of a batch, and resuming replays nothing:
only lengths are packed again up to the window at hand. In a mixture, category c gets the share (users_c)^exponent / sum
of every window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from calrec_jax.compiled import compiled
from calrec_jax.data.examples import ExampleSet
from calrec_jax.errors import CalrecError

Batch = dict[str, np.ndarray]

TOKEN_KEYS = ("decoder_input_tokens", "decoder_target_tokens", "decoder_segment_ids", "decoder_positions")
POOL_KEYS = ("user_pool", "target_pool", "item_pool")
EXAMPLE_KEYS = ("target_user", "target_item", "target_text")


@compiled
def best_fit_decreasing(lengths: np.ndarray, row_tokens: int, row_examples: int) -> np.ndarray:
    """[E] row of each example: longest first, each into the fullest row that still takes it.

    Rows are numbered as opened.
    """
    order = np.argsort(-lengths, kind="mergesort")
    rows = np.empty(len(lengths), np.int64)
    free = np.empty(len(lengths), np.int64)
    count = np.empty(len(lengths), np.int64)
    used = 0
    for example in order:
        best, best_free = -1, row_tokens + 1
        for row in range(used):
            if free[row] >= lengths[example] and free[row] < best_free and count[row] < row_examples:
                best, best_free = row, free[row]
        if best < 0:
            best = used
            free[best] = row_tokens
            count[best] = 0
            used += 1
        rows[example] = best
        free[best] -= lengths[example]
        count[best] += 1
    return rows


@compiled
def _fill(
    row_of, slot_of, example_of, start, end, user, items, tokens, offsets, text_ids, weights, intro, first, following,
    start_id, eos_id, all_items, inputs, targets, segments, positions, loss_weights, user_pool, target_pool, item_pool,
    mask, target_user, target_item, target_text,
):  # fmt: skip
    """Writes examples into zeroed rows. One loop over tokens: long, since it is the whole contract in one place."""
    cursor = np.zeros(inputs.shape[0], np.int64)
    for n in range(len(row_of)):
        row, slot, e = row_of[n], slot_of[n], example_of[n]
        at, segment = cursor[row], 2 * slot + 1
        begin = at
        inputs[row, at] = start_id
        for part in range(2):  # frame
            sentence = intro if part == 0 else first
            for token in sentence:
                targets[row, at] = token
                at += 1
                inputs[row, at] = token
                user_pool[row, at] = slot + 1
        for position in range(start[e], end[e]):
            item = items[position]
            last = position == end[e] - 1
            weighted = last or (all_items and position > start[e])
            low, high = offsets[item], offsets[item + 1]
            for t in range(low, high):
                targets[row, at] = tokens[t]
                if weighted:
                    loss_weights[row, at] = weights[t + item]
                at += 1
                inputs[row, at] = tokens[t]
                if last:
                    target_pool[row, at] = slot + 1
                else:
                    user_pool[row, at] = slot + 1
            if last:
                targets[row, at] = eos_id
                loss_weights[row, at] = weights[high + item]
                at += 1
            else:
                for j in range(len(following)):
                    targets[row, at] = following[j]
                    if j == 0 and all_items:
                        # The item ends here: EOS for every item, so that each item's loss is the last one's.
                        targets[row, at] = eos_id
                        if weighted:
                            loss_weights[row, at] = weights[high + item]
                    at += 1
                    inputs[row, at] = following[j]
                    user_pool[row, at] = slot + 1
        for p in range(begin, at):
            segments[row, p] = segment
            positions[row, p] = p - begin
        begin = at
        item = items[end[e] - 1]
        inputs[row, at] = start_id
        for t in range(offsets[item], offsets[item + 1]):
            targets[row, at] = tokens[t]
            at += 1
            inputs[row, at] = tokens[t]
            item_pool[row, at] = slot + 1
        targets[row, at] = eos_id
        at += 1
        for p in range(begin, at):
            segments[row, p] = segment + 1
            positions[row, p] = p - begin
        cursor[row] = at
        mask[row, slot] = 1.0
        target_user[row, slot] = user[e]
        target_item[row, slot] = item
        target_text[row, slot] = text_ids[item]


@dataclasses.dataclass(frozen=True)
class Packing:
    """Shape of the packed batches.

    Attributes:
      row_tokens: L.
      row_examples: K.
      batch_rows: B, over all hosts.
      next_item_loss: "last" (the paper: only the target is predicted) or "all" (every item but a sequence's first).
      window: examples packed together; larger pads less and shuffles the same.
    """

    row_tokens: int
    row_examples: int
    batch_rows: int
    next_item_loss: str = "last"
    window: int = 1024

    def __post_init__(self):
        if self.next_item_loss not in ("last", "all"):
            raise CalrecError(f"next_item_loss={self.next_item_loss!r}: must be 'last' or 'all'")
        for name in ("row_tokens", "row_examples", "batch_rows", "window"):
            if getattr(self, name) < 1:
                raise CalrecError(f"{name}={getattr(self, name)}: must be at least 1")


def fill_rows(examples: ExampleSet, rows: list[np.ndarray], packing: Packing) -> Batch:
    """Assembles rows of example indices.

    Args:
      examples: where the tokens come from.
      rows: one array of example indices a row, at most K each, together at most L tokens; may be empty (a padding row).
      packing: L, K and which items bear loss.

    Returns:
      The batch contract with B = len(rows).
    """
    shape, width = (len(rows), packing.row_tokens), (len(rows), packing.row_examples)
    # One spare column: an input token is written one place after its target.
    wide = {k: np.zeros((shape[0], shape[1] + 1), np.int32) for k in (*TOKEN_KEYS, *POOL_KEYS)}
    loss_weights = np.zeros(shape, np.float32)
    mask = np.zeros(width, np.float32)
    per_example = {k: np.zeros(width, np.int32) for k in EXAMPLE_KEYS}
    outputs = [*(wide[k] for k in TOKEN_KEYS), loss_weights, *(wide[k] for k in POOL_KEYS)]
    outputs += [mask, *(per_example[k] for k in EXAMPLE_KEYS)]
    catalogue = examples.catalogue
    if any(len(row) for row in rows):
        _fill(
            np.concatenate([np.full(len(row), r, np.int64) for r, row in enumerate(rows)]),
            np.concatenate([np.arange(len(row)) for row in rows]),
            np.concatenate(rows).astype(np.int64),
            examples.start, examples.end, examples.user, examples.items, catalogue.tokens, catalogue.offsets,
            catalogue.text_ids, catalogue.token_weights, catalogue.intro, catalogue.first, catalogue.next,
            catalogue.start_id, catalogue.eos_id, packing.next_item_loss == "all", *outputs,
        )  # fmt: skip
    batch = {k: np.ascontiguousarray(v[:, :-1]) for k, v in wide.items()}
    return batch | {"decoder_loss_weights": loss_weights, "example_mask": mask} | per_example


def pack_window(lengths: np.ndarray, packing: Packing, *, seed: int, window: int) -> list[np.ndarray]:
    """The rows of one window: positions in `lengths`, ascending within a row; the rows are in the order of the stream.

    Args:
      lengths: [W] tokens of each example, both segments together.
      packing: L and K.
      seed: of the stream.
      window: number of the window.
    """
    row = best_fit_decreasing(lengths, packing.row_tokens, packing.row_examples)
    order = np.argsort(row, kind="stable")
    rows = np.split(order, np.flatnonzero(np.diff(row[order])) + 1)
    # Best-fit decreasing opens rows by falling length; mixed again so that no batch is all long histories.
    rng = np.random.Generator(np.random.Philox(key=[seed, (window << 16) + 0xFFFE]))
    return [rows[i] for i in rng.permutation(len(rows))]


class PackedStream:
    """The endless stream of packed training rows, addressable by step.

    Args:
      examples: what to pack.
      packing: shapes.
      seed: of the permutations; another seed is another order.
      mixture_exponent: a category's rate is (its users)^exponent; 0.3 is CALRec's stage I, 1 is proportional.

    Raises:
      CalrecError: an example longer than a row.
    """

    def __init__(
        self,
        examples: ExampleSet,
        packing: Packing,
        *,
        seed: int,
        mixture_exponent: float = 0.3,
    ):
        check_fits(examples, packing)
        self.examples, self.packing, self.seed = examples, packing, seed
        self._members = [np.flatnonzero(examples.group == g) for g in range(len(examples.group_sizes))]
        rates = np.array(
            [
                float(u) ** mixture_exponent if len(m) else 0.0
                for u, m in zip(examples.group_sizes, self._members, strict=True)
            ]
        )
        self.rates = rates / rates.sum()
        self._cumulative_rates = np.concatenate([[0.0], np.cumsum(self.rates)])
        self._first_rows = [0]  # first row of window w, for the windows packed so far
        self._cached: tuple[int, list[np.ndarray]] = (-1, [])
        self._permutations: dict[int, tuple[int, np.ndarray]] = {}

    def _permutation(self, group: int, epoch: int) -> np.ndarray:
        if self._permutations.get(group, (-1,))[0] != epoch:
            rng = np.random.Generator(np.random.Philox(key=[self.seed, (epoch << 16) + group]))
            self._permutations[group] = (epoch, rng.permutation(self._members[group]))
        return self._permutations[group][1]

    def window_examples(self, window: int) -> np.ndarray:
        """[W] example indices of a window: each category's share of its own permutations, mixed."""
        size = self.packing.window
        bounds = np.floor(np.outer([window * size, (window + 1) * size], self._cumulative_rates) + 0.5).astype(np.int64)
        low, high = bounds[0, 1:] - bounds[0, :-1], bounds[1, 1:] - bounds[1, :-1]
        drawn = []
        for group, members in enumerate(self._members):
            position, stop = int(low[group]), int(max(low[group], high[group]))
            while position < stop:
                epoch, offset = divmod(position, len(members))
                take = min(stop - position, len(members) - offset)
                drawn.append(self._permutation(group, epoch)[offset : offset + take])
                position += take
        rng = np.random.Generator(np.random.Philox(key=[self.seed, (window << 16) + 0xFFFF]))
        return rng.permutation(np.concatenate(drawn))

    def _window_rows(self, window: int) -> list[np.ndarray]:
        if self._cached[0] != window:
            members = self.window_examples(window)
            rows = pack_window(self.examples.lengths[members], self.packing, seed=self.seed, window=window)
            self._cached = (window, [members[row] for row in rows])
            if window == len(self._first_rows) - 1:
                self._first_rows.append(self._first_rows[-1] + len(rows))
        return self._cached[1]

    def rows(self, begin: int, end: int) -> list[np.ndarray]:
        """Example indices of stream rows [begin, end)."""
        while self._first_rows[-1] <= begin:
            self._window_rows(len(self._first_rows) - 1)
        window = int(np.searchsorted(self._first_rows, begin, side="right")) - 1
        out: list[np.ndarray] = []
        while len(out) < end - begin:
            rows = self._window_rows(window)
            offset = begin + len(out) - self._first_rows[window]
            out += rows[offset : offset + end - begin - len(out)]
            window += 1
        return out

    def batch(self, step: int, begin: int = 0, end: int | None = None) -> Batch:
        """Rows [begin, end) of batch `step`; all of them by default."""
        first = step * self.packing.batch_rows
        end = self.packing.batch_rows if end is None else end
        return fill_rows(self.examples, self.rows(first + begin, first + end), self.packing)


def evaluation_batches(examples: ExampleSet, packing: Packing) -> Iterator[Batch]:
    """Every example once, in a fixed order, packed window by window; the last batch is filled up with empty rows."""
    check_fits(examples, packing)
    rows: list[np.ndarray] = []
    for begin in range(0, len(examples), packing.window):
        row = best_fit_decreasing(
            examples.lengths[begin : begin + packing.window], packing.row_tokens, packing.row_examples
        )
        order = np.argsort(row, kind="stable")
        rows += np.split(order + begin, np.flatnonzero(np.diff(row[order])) + 1)
        while len(rows) >= packing.batch_rows:
            yield fill_rows(examples, rows[: packing.batch_rows], packing)
            rows = rows[packing.batch_rows :]
    if rows:
        yield fill_rows(examples, rows + [np.empty(0, np.int64)] * (packing.batch_rows - len(rows)), packing)


def check_fits(examples: ExampleSet, packing: Packing) -> None:
    """Raises CalrecError when an example is longer than a row."""
    longest = int(examples.lengths.max())
    if longest > packing.row_tokens:
        raise CalrecError(
            f"row_tokens={packing.row_tokens}: the longest example has {longest} tokens; raise row_tokens, or lower "
            "max_history_tokens or max_target_tokens"
        )
