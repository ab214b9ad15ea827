"""Prompts of a split's users as token ids, and the groups in which they are decoded.

Notable: a prompt is cut and joined as ids exactly as the history of an example is (`data/examples.py`), so the model
reads at inference what it was trained on. A user's bucket depends on the length of their own prompt alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from calrec_jax.compiled import compiled
from calrec_jax.data.dataset import Dataset
from calrec_jax.data.examples import TokenCatalogue, build_examples

_BUCKET = 64  # tokens; beyond 256 a quarter of the power of two above


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts of all U users of a dataset: start INTRO FIRST item NEXT … item NEXT.

    Users without a target of the split have the prompt of an empty history; `decode` leaves them out.

    Attributes:
      catalogue: where the tokens come from.
      user_ids: [U] object (str).
      items: [interactions] int32 item indices, all sequences end to end.
      start, end: [U] int64; user u's history is `items[start[u]:end[u]]`, empty where nothing is before the target.
      lengths: [U] int64, tokens of each prompt.
      dropped_items: history items that did not fit `max_history_tokens`.
    """

    catalogue: TokenCatalogue
    user_ids: np.ndarray
    items: np.ndarray
    start: np.ndarray
    end: np.ndarray
    lengths: np.ndarray
    dropped_items: int

    def tokens(self, users: np.ndarray, length: int) -> np.ndarray:
        """[B, L] int32 prompts of these users, filled up with 0 at the end; `length` is L."""
        out = np.zeros((len(users), length), np.int32)
        c = self.catalogue
        frame = np.concatenate([[c.start_id], c.intro, c.first]).astype(np.int32)
        _fill(out, self.start[users], self.end[users], self.items, c.tokens, c.offsets, frame, c.next)
        return out


@dataclasses.dataclass(frozen=True, eq=False)
class GivenPrompts:
    """Prompts of some of a dataset's U users that were tokenised elsewhere, as by the SeqIO tasks.

    Attributes:
      user_ids: [U] object (str).
      values: int32, all prompts end to end, their start tokens included.
      offsets: [U+1] int64 into `values`; a user without a prompt has none of them.
      dropped_items: history items that did not fit, as far as is known here.
    """

    user_ids: np.ndarray
    values: np.ndarray
    offsets: np.ndarray
    dropped_items: int = 0

    @property
    def lengths(self) -> np.ndarray:
        """[U] int64, tokens of each prompt."""
        return np.diff(self.offsets)

    @property
    def fingerprint(self) -> str:
        """Hash of all prompts."""
        return hashlib.sha256(self.offsets.tobytes() + self.values.tobytes()).hexdigest()

    def tokens(self, users: np.ndarray, length: int) -> np.ndarray:
        """[B, L] int32 prompts of these users, filled up with 0 at the end; `length` is L."""
        inside = np.arange(length) < self.lengths[users][:, None]
        out = np.zeros(inside.shape, np.int32)
        rows, places = np.nonzero(inside)
        out[rows, places] = self.values[self.offsets[users][rows] + places]
        return out


@compiled
def _fill(out, start, end, items, tokens, offsets, frame, following):  # pragma: no cover (compiled)
    for row in range(out.shape[0]):
        at = len(frame)
        out[row, :at] = frame
        for position in range(start[row], end[row]):
            low, high = offsets[items[position]], offsets[items[position] + 1]
            out[row, at : at + high - low] = tokens[low:high]
            at += high - low
            out[row, at : at + len(following)] = following
            at += len(following)


def build_prompts(dataset: Dataset, catalogue: TokenCatalogue, *, split: str, max_history_tokens: int) -> Prompts:
    """The prompts of all users of a dataset.

    Args:
      dataset: whose users.
      catalogue: tokens of this dataset's catalogue alone.
      split: "validation" or "test".
      max_history_tokens: budget of a prompt; the oldest items go first.

    Raises:
      CalrecError: a budget that an item and its frame do not fit.
    """
    examples = build_examples([dataset], catalogue, split=split, max_history_tokens=max_history_tokens)
    start = dataset.offsets[:-1].copy()  # who is not among the examples has no history
    end = start.copy()
    start[examples.user], end[examples.user] = examples.start, examples.end - 1
    frame = len(catalogue.intro) + len(catalogue.first) + 1
    before = np.concatenate([[0], np.cumsum(catalogue.lengths[dataset.items] + len(catalogue.next))])
    return Prompts(
        catalogue=catalogue,
        user_ids=dataset.user_ids,
        items=dataset.items,
        start=start,
        end=end,
        lengths=frame + before[end] - before[start],
        dropped_items=examples.dropped_items,
    )


def bucket_lengths(lengths: np.ndarray) -> np.ndarray:
    """Tokens that prompts of these lengths are filled up to: few distinct values, so few compilations."""
    exponent = np.maximum(np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64), 2)
    step = np.maximum(_BUCKET, 1 << (exponent - 2))
    return (lengths + step - 1) // step * step


def groups(users: np.ndarray, buckets: np.ndarray) -> list[np.ndarray]:
    """Splits users into groups of one bucket each, in their order.

    Args:
      users: in the order of their buckets.
      buckets: of the same users, monotone.
    """
    return np.split(users, np.flatnonzero(np.diff(buckets)) + 1) if len(users) else []


def user_keys(user_ids: Sequence[str], seed: int) -> np.ndarray:
    """[U, 2] uint32, a 64-bit hash of the seed and each user id: the key of the user's random stream."""
    digests = b"".join(hashlib.blake2b(f"{seed} {user}".encode(), digest_size=8).digest() for user in user_ids)
    return np.frombuffer(digests, "<u4").reshape(-1, 2)
