"""Quasi-round-robin over BM25: from the texts a model wrote for a user to a score of every item.

As in the paper's section on inference: BM25 of text i against every item is min-max scaled to b_ik in [0, 1];
b'_ik = exp(ε·S_i)·b_ik with S_i the text's log-probability; item k scores max over i of b'_ik. Each text's best match
scales to 1, so the texts' first choices come first, in the model's own order; second choices follow.

Notable: a user's repeated texts count once, with their best S. A text that matches nothing, or everything alike, scales
to zero: it contributes nothing, and a user all of whose texts do so has all items tied. Each distinct text is scored
once over all users as long as the texts still to be used fit the bank's memory. Lists much shorter than the catalogue
are made by `first_places.py`, which gives the same without scoring all items.
"""

import dataclasses
from collections.abc import Sequence

import gin
import numpy as np

from calrec_jax.compiled import compiled
from calrec_jax.errors import CalrecError
from calrec_jax.rank.bm25 import BM25Index
from calrec_jax.rank.ordering import Scores
from calrec_jax.rank.user_texts import UserTexts

EPSILON = 1 / 5000
BANK_BYTES = 512 * 2**20
SCALINGS = ("min_max", "max", "none")
TIES = ("first_choices", "none")
REPEATS = ("once", "all")


@gin.configurable
@dataclasses.dataclass(frozen=True)
class RoundRobinConfig:
    """What the paper leaves open.

    Attributes:
      scaling: of a text's BM25 scores over all items: "min_max" to [0, 1], "max" (divided by the greatest), or "none".
      ties: what decides between items of the same score: "first_choices", how many of the user's texts have the item as
        their best match, or "none".
      repeats: whether a text that the user has several times counts "once" as a first choice, or "all" times.
      exact_text_first: whether items whose text a completion repeats to the letter are its only best match; BM25
        may find others as good, or better.
    """

    scaling: str = "min_max"
    ties: str = "first_choices"
    repeats: str = "once"
    exact_text_first: bool = False

    def __post_init__(self) -> None:
        for name, known in (("scaling", SCALINGS), ("ties", TIES), ("repeats", REPEATS)):
            if getattr(self, name) not in known:
                raise CalrecError(f"RoundRobinConfig.{name} is {getattr(self, name)!r}: choose one of {list(known)}")


class ExactTexts:
    """Items by their text, for `RoundRobinConfig.exact_text_first`."""

    def __init__(self, texts: Sequence[str]):
        self._items: dict[str, list[int]] = {}
        for item, text in enumerate(texts):
            self._items.setdefault(text, []).append(item)

    def items(self, text: str) -> np.ndarray:
        """[items] int32, those with this text, ascending."""
        return np.array(self._items.get(text, ()), np.int32)


class TextBank:
    """BM25 scores of the texts still to be used, each text scored once while they fit.

    Attributes:
      num_scored: how many texts were scored so far.
    """

    def __init__(
        self,
        index: BM25Index,
        user_texts: UserTexts,
        num_bytes: int = BANK_BYTES,
        exact: ExactTexts | None = None,
    ):
        """Texts that `exact` knows score a little more at its items than anywhere else."""
        most = int(np.diff(user_texts.starts).max(initial=1))
        self.index = index
        self.user_texts = user_texts
        self._exact = exact
        self.num_slots = max(most, min(len(user_texts.texts), num_bytes // (4 * index.num_items)))
        self.num_scored = 0
        self._rows = np.empty((self.num_slots, index.num_items), np.float32)
        self._slot_of = np.full(len(user_texts.texts), -1, np.int32)
        self._free = np.arange(self.num_slots, dtype=np.int32)
        self._uses_left = np.bincount(user_texts.codes, minlength=len(user_texts.texts))

    @property
    def max_users(self) -> int:
        """How many users at once are sure to fit."""
        return max(1, self.num_slots // int(np.diff(self.user_texts.starts).max(initial=1)))

    def rows(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The bank, [slots, I] float32, and the slot of each of `codes`; valid until the next call."""
        wanted = np.unique(codes)
        new = wanted[self._slot_of[wanted] < 0]
        if len(new) > len(self._free):
            self._evict(wanted, len(new) - len(self._free))
        slots, self._free = self._free[: len(new)], self._free[len(new) :]
        self._slot_of[new] = slots
        texts = [self.user_texts.texts[code] for code in new]
        self._rows[slots] = self.index.scores(texts)
        for slot, text in zip(slots, texts if self._exact else (), strict=False):
            assert self._exact is not None
            self._rows[slot, self._exact.items(text)] = above(self._rows[slot].max())
        self.num_scored += len(new)
        return self._rows, self._slot_of[codes]

    def release(self, codes: np.ndarray) -> None:
        """Says that these uses (one a user and text) are over; a text without further uses gives its slot back."""
        np.subtract.at(self._uses_left, codes, 1)
        used = np.unique(codes)
        self._give_back(used[(self._uses_left[used] <= 0) & (self._slot_of[used] >= 0)])

    def _evict(self, wanted: np.ndarray, count: int) -> None:
        held = np.setdiff1d(np.flatnonzero(self._slot_of >= 0), wanted)
        self._give_back(held[np.argsort(self._uses_left[held], kind="stable")[:count]])

    def _give_back(self, codes: np.ndarray) -> None:
        self._free = np.concatenate([self._free, self._slot_of[codes]])
        self._slot_of[codes] = -1


def above(score: np.float32) -> np.float32:
    """The next greater score."""
    return np.nextafter(np.float32(score), np.float32(np.inf))


@compiled
def span_of(scaling, low, high):  # pragma: no cover (compiled)
    """What is taken off a text's scores, and what they are then divided by; 0 where it contributes nothing.

    `scaling` is a place in `SCALINGS`; low and high are the text's least and greatest scores over all items.
    """
    if scaling == 0:
        return np.float64(low), np.float64(high) - np.float64(low)
    if scaling == 1:
        return 0.0, np.float64(high)
    return 0.0, 1.0 if high > 0 else 0.0


@compiled
def _combine(
    rows, slots, weights, counts, completions, starts, scaling, best, first_choices, sources
):  # pragma: no cover (compiled)
    num_items = rows.shape[1]
    for user in range(len(starts) - 1):
        for text in range(starts[user], starts[user + 1]):
            row = rows[slots[text]]
            low = row[0]
            high = row[0]
            for item in range(num_items):
                low = min(low, row[item])
                high = max(high, row[item])
            base, span = span_of(scaling, low, high)
            if span <= 0.0:
                continue
            for item in range(num_items):
                value = weights[text] * ((np.float64(row[item]) - base) / span)
                if value > best[user, item]:
                    best[user, item] = value
                    sources[user, item] = completions[text]
                if row[item] == high:
                    first_choices[user, item] += counts[text]


class RoundRobin:
    """Quasi-round-robin scores of users, from their texts.

    Attributes:
      user_texts: the distinct texts of every user.
      bank: their BM25 scores.
      epsilon: ε; 0 makes all texts equal.
    """

    def __init__(
        self,
        index: BM25Index,
        user_texts: UserTexts,
        epsilon: float = EPSILON,
        bank_bytes: int = BANK_BYTES,
        config: RoundRobinConfig | None = None,
        texts: Sequence[str] | None = None,
    ):
        """Prepares to score.

        Args:
          index: BM25 over the catalogue.
          user_texts: the distinct texts of every user.
          epsilon: ε of the paper.
          bank_bytes: memory for the scores of texts that are used again.
          config: what the paper leaves open.
          texts: [I] those of the catalogue; for `exact_text_first` alone.

        Raises:
          CalrecError: `epsilon` is negative or no number.
        """
        if not (np.isfinite(epsilon) and epsilon >= 0):
            raise CalrecError(f"epsilon is {epsilon}: it must be a number that is not negative (the paper has 1/5000)")
        self.user_texts = user_texts
        self.epsilon = epsilon
        self.config = config or RoundRobinConfig()
        self.exact = ExactTexts(texts or ()) if self.config.exact_text_first else None
        self.bank = TextBank(index, user_texts, bank_bytes, self.exact)

    def weights(self, flat: np.ndarray | slice) -> np.ndarray:
        """exp(ε·S) of texts, by their place in the flat arrays."""
        return np.exp(self.epsilon * self.user_texts.scores[flat])

    def first_choice_counts(self, flat: np.ndarray | slice) -> np.ndarray:
        """What texts count for as a first choice, by their place in the flat arrays: float64."""
        counts = self.user_texts.counts[flat].astype(np.float64)
        return counts if self.config.repeats == "all" else np.ones_like(counts)

    def scores(self, users: np.ndarray) -> Scores:
        """Scores every item for these users; ask for each user once, or the bank scores texts again.

        Args:
          users: [B] rows of `user_texts`.

        Returns:
          primary: max over texts of b'. secondary: how many of the user's texts have the item as a best match (items
          with the same best score all count). sources: the completion that gave the primary, −1 where it is zero;
          of several, the one with the highest S, then the first.
        """
        num_items = self.bank.index.num_items
        best = np.zeros((len(users), num_items))
        first_choices = np.zeros((len(users), num_items))
        sources = np.full((len(users), num_items), -1, np.int16)
        for at in range(0, len(users), self.bank.max_users):
            part = slice(at, at + self.bank.max_users)
            self._add(users[part], best[part], first_choices[part], sources[part])
        return Scores(best, first_choices if self.config.ties == "first_choices" else None, sources)

    def _add(self, users: np.ndarray, best: np.ndarray, first_choices: np.ndarray, sources: np.ndarray) -> None:
        own = self.user_texts
        lengths = own.starts[users + 1] - own.starts[users]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        flat = np.arange(starts[-1]) + np.repeat(own.starts[users] - starts[:-1], lengths)
        codes = own.codes[flat]
        rows, slots = self.bank.rows(codes)
        scaling = SCALINGS.index(self.config.scaling)
        counts = self.first_choice_counts(flat)
        completions = own.completions[flat]
        _combine(
            rows, slots, self.weights(flat), counts, completions, starts, scaling, best, first_choices, sources
        )  # fmt: skip
        self.bank.release(codes)


def round_robin_scores(
    index: BM25Index,
    texts: Sequence[Sequence[str]],
    log_probs: Sequence[Sequence[float]],
    num_tokens: Sequence[Sequence[int]] | None = None,
    *,
    epsilon: float = EPSILON,
    score: str = "sum",
    config: RoundRobinConfig | None = None,
) -> Scores:
    """Quasi-round-robin scores of users given as nested lists, all at once.

    Args:
      index: BM25 over the catalogue.
      texts: for each of B users the texts of their completions.
      log_probs: as `texts`, nats, summed over tokens.
      num_tokens: as `texts`; needed for "mean".
      epsilon: ε of the paper.
      score: "sum" or "mean" of the log-probabilities.
      config: what the paper leaves open; not `exact_text_first`, which needs a `RoundRobin`.

    Raises:
      CalrecError: a setting or a log-probability is not valid.
    """
    user_texts = UserTexts.of(texts, log_probs, num_tokens, score)
    return RoundRobin(index, user_texts, epsilon, config=config).scores(np.arange(len(texts)))
