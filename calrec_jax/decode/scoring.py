"""Log-probabilities of given texts over prompts that were read once: candidates to rerank, forced tails of a beam."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from calrec_jax.data.examples import TokenCatalogue
from calrec_jax.decode.prefix import (
    Batch,
    Compiled,
    Completed,
    Prefilled,
    Said,
    by_rows,
    call,
    in_batches,
    nothing_said,
    prefill,
)
from calrec_jax.errors import CalrecError
from calrec_jax.models.transformer import KeyValues, Transformer, empty_suffix

_TOKENS = 8192  # read at a time; beyond that the parts of a layer outgrow what they gain
_BUCKET = 16


class Texts(NamedTuple):
    """N texts a user, each a row of tokens to read and those to score after them.

    Attributes:
      inputs: [B, N, Q] int32.
      targets: [B, N, Q] int32, the token after each input.
      counts: [B, N] int32, how many are real.
      read: [B, N] int32, places of the suffix that each row has written before.
    """

    inputs: np.ndarray
    targets: np.ndarray
    counts: np.ndarray
    read: np.ndarray


def log_probs(model: Transformer, params: Any, shared: Prefilled, suffix: KeyValues, texts: Texts) -> jax.Array:
    """Sums [B, N] of the log-probabilities of the targets.

    Args:
      model: the decoder.
      params: its parameters.
      shared: of the users.
      suffix: keys and values [B·N, G, T, C] of what each row has read beyond the prefix.
      texts: what to score.
    """
    users, rows, places = texts.inputs.shape
    own = jax.tree.map(lambda x: x.reshape(users, rows, *x.shape[1:]), suffix)

    def one(user: tuple[Prefilled, KeyValues, Texts]) -> jax.Array:
        shared, suffix, texts = user
        prefix = jax.tree.map(lambda x: x[None], shared.prefix)
        positions = shared.lengths + texts.read[:, None] + jnp.arange(places)
        before = jnp.arange(suffix[0][0].shape[2]) < texts.read[:, None]
        before = jnp.broadcast_to(before[:, None], (rows, places, before.shape[1]))
        causal = jnp.broadcast_to(jnp.tri(places, dtype=bool), (rows, places, places))
        hidden, _ = call(
            model, params, texts.inputs, positions, None, prefix, shared.mask[None], suffix,
            jnp.concatenate([before, causal], axis=2), method="decode",
        )  # fmt: skip

        def score(hidden: jax.Array, target: jax.Array) -> jax.Array:
            logits = call(model, params, hidden, method="logits")
            return logits[target] - jax.nn.logsumexp(logits)

        scores = by_rows(score, hidden.reshape(rows * places, -1), texts.targets.reshape(-1)).reshape(rows, places)
        return jnp.where(jnp.arange(places) < texts.counts[:, None], scores, 0).sum(1)

    return jax.lax.map(one, (shared, own, texts), batch_size=max(1, min(users, _TOKENS // (rows * places))))


def bucket(tokens: int) -> int:
    """Tokens that texts of at most so many are filled up to."""
    return max(1, -(-tokens // _BUCKET)) * _BUCKET


class Candidates(NamedTuple):
    """Items whose texts are scored for each of a dataset's U users, all users end to end.

    Attributes:
      items: int32 item indices.
      start, end: [U] int64; user u's are `items[start[u]:end[u]]`.
    """

    items: np.ndarray
    start: np.ndarray
    end: np.ndarray


class Scorer:
    """Scores given items for each user, the most probable first.

    Args:
      model: the decoder.
      params: its parameters.
      catalogue: the items' tokens.
      candidates: of each user.
      batch_users: users at a time.
    """

    def __init__(
        self,
        model: Transformer,
        params: Any,
        *,
        catalogue: TokenCatalogue,
        candidates: Candidates,
        batch_users: int,
    ):
        self._model, self._params, self._catalogue = model, params, catalogue
        self._candidates, self._batch_users = candidates, batch_users
        self._most = int((candidates.end - candidates.start).max(initial=0))
        if not self._most:
            raise CalrecError("decode.candidates: no user has any candidate")
        self.compiled = Compiled()

    def __call__(self, batch: Batch, said: Said = nothing_said) -> Completed:
        """Scores the candidates of any number of users; see `prefix.Decoder`."""
        return in_batches(self._complete, batch, self._batch_users, said)

    def _complete(self, batch: Batch) -> Completed:
        items = np.full((len(batch.users), self._most), -1, np.int32)
        for row, user in enumerate(batch.users):
            if user >= 0:
                own = self._candidates.items[self._candidates.start[user] : self._candidates.end[user]]
                items[row, : len(own)] = own
        first, texts = self._texts(items)
        lengths = batch.lengths.astype(np.int32)
        scores, embedding = self.compiled(self._score, self._params, batch.tokens, lengths, batch.keys, first, texts)
        scores = np.where(items >= 0, np.asarray(scores), -np.inf).astype(np.float32)
        by = np.argsort(-scores, axis=1, kind="stable")
        items, scores, counts = (np.take_along_axis(x, by, axis=1) for x in (items, scores, texts.counts + 1))
        real = items >= 0
        return Completed(
            np.zeros((*items.shape, 0), np.int32), counts * real, scores, real, np.asarray(embedding), items
        )

    def _texts(self, items: np.ndarray) -> tuple[np.ndarray, Texts]:
        """The first token of each candidate [B, N], and what is read and scored after it."""
        c = self._catalogue
        known = np.maximum(items, 0)
        counts = np.where(items >= 0, c.lengths[known], 0).astype(np.int32)
        place = np.arange(bucket(int(c.lengths.max())))  # one program whoever the candidates are
        inside = place < counts[:, :, None]
        tokens = np.zeros((*items.shape, len(place)), np.int32)
        tokens[inside] = c.tokens[(c.offsets[known][:, :, None] + place)[inside]]
        targets = np.zeros_like(tokens)
        targets[:, :, :-1] = tokens[:, :, 1:]
        np.put_along_axis(targets, np.maximum(counts - 1, 0)[:, :, None], c.eos_id, axis=2)
        first = np.where(counts > 0, tokens[:, :, 0], c.eos_id).astype(np.int32)  # an empty text is EOS alone
        return first, Texts(tokens, targets, counts, np.zeros_like(counts))

    def _score(self, params, tokens, lengths, keys, first, texts):
        hidden, shared, embedding = prefill(self._model, params, tokens, lengths, keys)
        at_first = jax.nn.log_softmax(call(self._model, params, hidden[:, 0], method="logits"))
        suffix = empty_suffix(self._model.config, first.size, 0)
        rest = log_probs(self._model, params, shared, suffix, texts)
        return jnp.take_along_axis(at_first, first, axis=1) + rest, embedding


class Tower:
    """Reads prompts for v_U alone; nothing is completed.

    Args:
      model: the decoder.
      params: its parameters.
      batch_users: users at a time.
    """

    def __init__(self, model: Transformer, params: Any, *, batch_users: int):
        self._model, self._params, self._batch_users = model, params, batch_users
        self.compiled = Compiled()

    def __call__(self, batch: Batch, said: Said = nothing_said) -> Completed:
        """Embeds any number of users; see `prefix.Decoder`."""
        return in_batches(self._complete, batch, self._batch_users, said)

    def _complete(self, batch: Batch) -> Completed:
        lengths = batch.lengths.astype(np.int32)
        embedding = self.compiled(self._embed, self._params, batch.tokens, lengths, batch.keys)
        none = np.zeros((len(lengths), 0), np.int32)
        return Completed(
            none[:, :, None], none, none.astype(np.float32), none.astype(bool), np.asarray(embedding), none
        )

    def _embed(self, params, tokens, lengths, keys):
        return prefill(self._model, params, tokens, lengths, keys)[2]
