"""Quasi-round-robin over BM25: from the texts a model wrote for a user to a score of every item.

As in the paper's section on inference: BM25 of text i against every item is min-max scaled to b_ik in [0, 1];
b'_ik = exp(ε·S_i)·b_ik with S_i the text's log-probability; item k scores max over i of b'_ik. Each text's best match
scales to 1, so the texts' first choices come first, in the model's own order; second choices follow.

Notable: a user's repeated texts count once, with their best S. A text that matches nothing, or everything alike, scales
to zero: it contributes nothing, and a user all of whose texts do so has all items tied. Each distinct text is scored
once over all users as long as the texts still to be used fit the bank's memory.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from calrec_jax.compiled import compiled
from calrec_jax.errors import CalrecError
from calrec_jax.rank.bm25 import BM25Index
from calrec_jax.rank.ordering import Scores

EPSILON = 1 / 5000
BANK_BYTES = 512 * 2**20
SCORE_KINDS = ("sum", "mean")
MOST_COMPLETIONS = int(np.iinfo(np.int16).max)  # of a user: `sources` of a ranking are int16


@dataclasses.dataclass(frozen=True)
class UserTexts:
    """The distinct texts of every user, flat; a user's texts are in order of falling score.

    Attributes:
      texts: [M] list of the distinct texts over all users.
      starts: [U+1] int64 offsets into the arrays below.
      codes: int32, index into `texts`.
      scores: float64, S of the text (its best, where the user has it more than once).
      completions: int16, which of the user's completions it is.
    """

    texts: list[str]
    starts: np.ndarray
    codes: np.ndarray
    scores: np.ndarray
    completions: np.ndarray

    @classmethod
    def of(
        cls,
        texts: Sequence[Sequence[str]],
        log_probs: Sequence[Sequence[float]],
        num_tokens: Sequence[Sequence[int]] | None = None,
        score: str = "sum",
    ) -> "UserTexts":
        """Gathers nested lists, a list a user. See `from_flat`."""
        import pyarrow as pa

        flat = [text for user in texts for text in user]
        coded = pa.array(flat, pa.string()).dictionary_encode()
        tokens = None if num_tokens is None else np.array([n for user in num_tokens for n in user], np.int64)
        return cls.from_flat(
            coded.dictionary.to_pylist(),
            coded.indices.to_numpy(zero_copy_only=False),
            np.array([len(user) for user in texts], np.int64),
            np.array([value for user in log_probs for value in user], np.float64),
            tokens,
            score,
        )

    @classmethod
    def from_flat(
        cls,
        texts: list[str],
        codes: np.ndarray,
        lengths: np.ndarray,
        log_probs: np.ndarray,
        num_tokens: np.ndarray | None,
        score: str = "sum",
    ) -> "UserTexts":
        """Drops each user's repeated texts, keeping the best score, and sorts the rest by score.

        Args:
          texts: the distinct texts.
          codes: index into `texts` of each completion, users one after the other.
          lengths: [U] number of completions of each user.
          log_probs: of each completion, nats, summed over its tokens.
          num_tokens: of each completion; needed for "mean".
          score: "sum" or "mean" (over tokens) of the log-probabilities.

        Raises:
          CalrecError: `score` is unknown, a log-probability is NaN or +inf, or a user has more completions than a
            ranking can name.
        """
        check_count(lengths, "decode.num_samples")
        if score not in SCORE_KINDS:
            raise CalrecError(f"score is {score!r}: choose one of {list(SCORE_KINDS)}")
        if np.isnan(log_probs).any() or np.isposinf(log_probs).any():
            count = int(np.isnan(log_probs).sum() + np.isposinf(log_probs).sum())
            raise CalrecError(f"{count} log_probs of the completions are NaN or infinite; decode again")
        values = np.asarray(log_probs, np.float64)
        if score == "mean":
            if num_tokens is None:
                raise CalrecError('score is "mean" but the completions have no num_tokens; use "sum"')
            values = values / np.maximum(num_tokens, 1)
        users = np.repeat(np.arange(len(lengths)), lengths)
        places = np.arange(len(users)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        by = np.lexsort((places, -values, codes, users))
        repeated = np.zeros(len(by), bool)
        repeated[1:] = (users[by][1:] == users[by][:-1]) & (codes[by][1:] == codes[by][:-1])
        by = by[~repeated]
        by = by[np.lexsort((places[by], -values[by], users[by]))]
        starts = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(np.bincount(users[by], minlength=len(lengths)), out=starts[1:])
        return cls(texts, starts, codes[by].astype(np.int32), values[by], places[by].astype(np.int16))


def check_count(lengths: np.ndarray, setting: str) -> None:
    """Raises a CalrecError, which names the setting of `decode`, where a user has more than `MOST_COMPLETIONS`.

    Args:
      lengths: [U] number of completions of each user.
      setting: that decides the number.
    """
    most = int(np.max(lengths, initial=0))
    if most > MOST_COMPLETIONS:
        raise CalrecError(
            f"a user has {most:,} completions, and a ranking can name {MOST_COMPLETIONS:,} at most; set {setting} "
            "lower and decode again"
        )


class TextBank:
    """BM25 scores of the texts still to be used, each text scored once while they fit.

    Attributes:
      num_scored: how many texts were scored so far.
    """

    def __init__(self, index: BM25Index, user_texts: UserTexts, num_bytes: int = BANK_BYTES):
        most = int(np.diff(user_texts.starts).max(initial=1))
        self.index = index
        self.user_texts = user_texts
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
        self._rows[slots] = self.index.scores([self.user_texts.texts[code] for code in new])
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


@compiled
def _combine(rows, slots, weights, completions, starts, best, first_choices, sources):  # pragma: no cover (compiled)
    num_items = rows.shape[1]
    for user in range(len(starts) - 1):
        for text in range(starts[user], starts[user + 1]):
            row = rows[slots[text]]
            low = row[0]
            high = row[0]
            for item in range(num_items):
                low = min(low, row[item])
                high = max(high, row[item])
            if high <= low:
                continue
            span = np.float64(high) - np.float64(low)
            for item in range(num_items):
                value = weights[text] * ((np.float64(row[item]) - np.float64(low)) / span)
                if value > best[user, item]:
                    best[user, item] = value
                    sources[user, item] = completions[text]
                if row[item] == high:
                    first_choices[user, item] += 1.0


class RoundRobin:
    """Quasi-round-robin scores of users, from their texts.

    Attributes:
      user_texts: the distinct texts of every user.
      bank: their BM25 scores.
      epsilon: ε; 0 makes all texts equal.
    """

    def __init__(self, index: BM25Index, user_texts: UserTexts, epsilon: float = EPSILON, bank_bytes: int = BANK_BYTES):
        if not (np.isfinite(epsilon) and epsilon >= 0):
            raise CalrecError(f"epsilon is {epsilon}: it must be a number that is not negative (the paper has 1/5000)")
        self.user_texts = user_texts
        self.epsilon = epsilon
        self.bank = TextBank(index, user_texts, bank_bytes)

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
        return Scores(best, first_choices, sources)

    def _add(self, users: np.ndarray, best: np.ndarray, first_choices: np.ndarray, sources: np.ndarray) -> None:
        own = self.user_texts
        lengths = own.starts[users + 1] - own.starts[users]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        flat = np.arange(starts[-1]) + np.repeat(own.starts[users] - starts[:-1], lengths)
        codes = own.codes[flat]
        rows, slots = self.bank.rows(codes)
        weights = np.exp(self.epsilon * own.scores[flat])
        _combine(rows, slots, weights, own.completions[flat], starts, best, first_choices, sources)
        self.bank.release(codes)


def round_robin_scores(
    index: BM25Index,
    texts: Sequence[Sequence[str]],
    log_probs: Sequence[Sequence[float]],
    num_tokens: Sequence[Sequence[int]] | None = None,
    *,
    epsilon: float = EPSILON,
    score: str = "sum",
) -> Scores:
    """Quasi-round-robin scores of users given as nested lists, all at once.

    Args:
      index: BM25 over the catalogue.
      texts: for each of B users the texts of their completions.
      log_probs: as `texts`, nats, summed over tokens.
      num_tokens: as `texts`; needed for "mean".
      epsilon: ε of the paper.
      score: "sum" or "mean" of the log-probabilities.

    Raises:
      CalrecError: a setting or a log-probability is not valid.
    """
    user_texts = UserTexts.of(texts, log_probs, num_tokens, score)
    return RoundRobin(index, user_texts, epsilon).scores(np.arange(len(texts)))
