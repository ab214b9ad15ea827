"""The texts that users have, each user's repeated ones gathered, over all of which the same text is one string."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from calrec_jax.errors import CalrecError

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
      counts: int32, how often the user has the text.
    """

    texts: list[str]
    starts: np.ndarray
    codes: np.ndarray
    scores: np.ndarray
    completions: np.ndarray
    counts: np.ndarray

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
        counts = np.diff(np.append(np.flatnonzero(~repeated), len(by)))
        by = by[~repeated]
        best_first = np.lexsort((places[by], -values[by], users[by]))
        by, counts = by[best_first], counts[best_first].astype(np.int32)
        starts = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(np.bincount(users[by], minlength=len(lengths)), out=starts[1:])
        return cls(texts, starts, codes[by].astype(np.int32), values[by], places[by].astype(np.int16), counts)

    def part(self, begin: int, end: int) -> "UserTexts":
        """Users `[begin, end)` alone, with the texts that they have."""
        own = slice(self.starts[begin], self.starts[end])
        used, codes = np.unique(self.codes[own], return_inverse=True)
        return UserTexts(
            [self.texts[code] for code in used.tolist()],
            self.starts[begin : end + 1] - self.starts[begin],
            codes.astype(np.int32),
            self.scores[own],
            self.completions[own],
            self.counts[own],
        )

    def of_user(self, user: int) -> slice:
        """Where a user's texts are in the flat arrays."""
        return slice(self.starts[user], self.starts[user + 1])


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
