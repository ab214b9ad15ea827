"""Temperature sampling of N completions a user from one prefill, in rows that are never idle for long.

Notable: a completion that ends frees its row, and rows freed take new users, so a step costs what the completions that
are still being written cost; a user's prompt is in memory once, for as long as one of their completions is written. A
user's random numbers depend on (seed, user, step, sample) alone.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from calrec_jax.decode.draw import draw
from calrec_jax.decode.prefix import Batch, Compiled, Completed, Said, by_rows, call, nothing_said, prefill
from calrec_jax.models.attention import Cells
from calrec_jax.models.transformer import KeyValues, Transformer, empty_suffix

RING_TOKENS = 16  # by which the suffix grows; other sizes than multiples of 16 cost a CPU twice as much a step


def _phase_steps() -> int:
    """Steps between two looks of the host at what has ended: a look costs about 1 ms, a step on a CPU ten times."""
    return 4 if jax.default_backend() == "cpu" else 16


class Sampler:
    """Samples N completions of each user.

    Args:
      model: the decoder.
      params: its parameters.
      eos_id: the token that ends a completion.
      num_samples: N.
      temperature: of sampling; scores are at temperature 1.
      max_new_tokens: T, EOS included.
      batch_users: prompts in memory, P.
      live_share: rows, as a share of P·N: about the mean length of a completion by that of a user's longest.
      top_k, top_p: see `draw.draw`.
    """

    def __init__(
        self,
        model: Transformer,
        params: Any,
        *,
        eos_id: int,
        num_samples: int,
        temperature: float,
        max_new_tokens: int,
        batch_users: int,
        live_share: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ):
        self._model, self._params, self._eos_id = model, params, eos_id
        self._num_samples, self._limit = num_samples, max_new_tokens
        self._draw = functools.partial(draw, temperature=temperature, top_k=top_k, top_p=top_p)
        self._places = batch_users
        self._rows = math.ceil(batch_users * live_share) * num_samples
        self._together = max(1, batch_users // 16)  # users that are prefilled at once
        self.compiled = Compiled()

    def __call__(self, batch: Batch, said: Said = nothing_said) -> Completed:
        """Completes prompts of any number of users; see `prefix.Decoder`."""
        rows = _Rows(self._places, self._num_samples, self._rows, len(batch.users), self._limit)
        prefix = self._empty_prefix(batch.tokens.shape[1])
        suffix = empty_suffix(self._model.config, self._rows, 2 * RING_TOKENS)
        clock, steps = 0, _phase_steps()
        embedding = np.zeros((len(batch.users), self._model.config.embed_dim), np.float32)
        while rows.waiting() or rows.alive.any():
            while users := rows.next_users(self._together):
                prefix = self._admit(rows, users, batch, prefix, embedding)
            if rows.alive.any():
                suffix, clock = self._room(suffix, clock, min(rows.oldest() + steps - 1, self._limit - 1))
                state = (rows.last, rows.ages, rows.alive, rows.row_of, rows.cell_of, rows.lengths, rows.keys)
                suffix, *written = self.compiled(
                    self._extend, self._params, prefix, suffix, np.int32(clock), *state, donate=(2,), steps=steps
                )
                clock += steps
                rows.read(jax.device_get(written), self._eos_id)
            said(*rows.left())
        return Completed(rows.tokens, rows.num_tokens, rows.log_probs, rows.finished, embedding)

    def _empty_prefix(self, length: int) -> KeyValues:
        c = self._model.config
        key, value = ((self._places, c.num_kv_heads, *x) for x in ((c.head_width, length), (length, c.head_width)))
        return tuple((jnp.zeros(key, c.dtype), jnp.zeros(value, c.dtype)) for _ in range(c.num_layers))

    def _room(self, suffix: KeyValues, clock: int, wanted: int) -> tuple[KeyValues, int]:
        """A suffix in which a row may have `wanted` places; a ring that grows is turned to begin with its oldest."""
        size = suffix[0][0].shape[2]
        if wanted <= size:
            return suffix, clock
        more = -(-wanted // RING_TOKENS) * RING_TOKENS - size
        return self.compiled(_turn, suffix, np.int32(clock % size), more=more), size

    def _admit(self, rows: _Rows, users: range, batch: Batch, prefix: KeyValues, embedding: np.ndarray) -> KeyValues:
        """Prefills users into free places and draws their first tokens."""
        places = rows.free_places(len(users))
        fill = np.minimum(np.arange(self._together), len(users) - 1)  # the last one again, where there are too few
        own = np.array(users)[fill]
        prefix, first, scores, vectors = self.compiled(
            self._begin, self._params, prefix, batch.tokens[own], batch.lengths[own].astype(np.int32), batch.keys[own],
            places[fill], donate=(1,),
        )  # fmt: skip
        embedding[users] = np.asarray(vectors)[: len(users)]
        first, scores = np.asarray(first)[: len(users)], np.asarray(scores)[: len(users)]
        rows.put(np.array(users), places, batch, first, scores, self._eos_id)
        return prefix

    def _begin(self, params, prefix, tokens, lengths, keys, places):
        """Prefill and the first token, whose distribution all samples of a user share."""
        hidden, shared, embedding = prefill(self._model, params, tokens, lengths, keys)
        logits = call(self._model, params, hidden[:, 0], method="logits")
        first, scores = jax.vmap(self._draw)(logits, self._uniforms(keys, jnp.zeros(len(keys), jnp.int32)))
        prefix = jax.tree.map(lambda all_, new: all_.at[places].set(new), prefix, shared.prefix)
        return prefix, first, scores, embedding

    def _extend(self, params, prefix, suffix, clock, last, ages, alive, row_of, cell_of, lengths, keys, *, steps):
        """Up to `steps` more tokens of every row that is alive.

        Keys and values of all rows go to the same place of the suffix, a ring; a row attends to as many of the places
        behind it as it has tokens.

        Returns:
          The suffix, tokens [R, steps], their scores [R, steps], how many of them are real [R], and whether each row is
          still alive.
        """
        ring = suffix[0][0].shape[2]
        user = cell_of // self._num_samples
        mask = jnp.arange(prefix[0][0].shape[-1]) < lengths[:, None]
        cells = Cells(row_of, cell_of)

        def unfinished(state):
            return (state[0] < steps) & state[4].any()

        def step(state):
            i, suffix, last, ages, alive, tokens, scores, counts = state
            at = (clock + i) % ring
            lag = (at - jnp.arange(ring)) % ring
            hidden, suffix = call(
                self._model, params, last[:, None], (lengths + ages - 1)[user][:, None], at, prefix, mask, suffix,
                (lag < ages[user][:, None])[:, None], cells, method="decode",
            )  # fmt: skip
            uniforms = self._uniforms(keys, ages).reshape(-1)[cell_of]

            def one(hidden, uniform):
                drawn, score = self._draw(call(self._model, params, hidden, method="logits"), uniform[None])
                return drawn[0], score[0]

            drawn, score = by_rows(one, hidden[:, 0], uniforms)
            drawn = jnp.where(alive, drawn, 0)
            tokens = jax.lax.dynamic_update_index_in_dim(tokens, drawn, i, axis=1)
            scores = jax.lax.dynamic_update_index_in_dim(scores, score, i, axis=1)
            ages += 1
            counts += alive
            alive &= (drawn != self._eos_id) & (ages[user] < self._limit)
            return i + 1, suffix, drawn, ages, alive, tokens, scores, counts

        none = jnp.zeros((len(last), steps), jnp.int32)
        state = (jnp.int32(0), suffix, last, ages, alive, none, none.astype(jnp.float32), jnp.zeros_like(last))
        _, suffix, _, _, alive, tokens, scores, counts = jax.lax.while_loop(unfinished, step, state)
        return suffix, tokens, scores, counts, alive

    def _uniforms(self, keys: jax.Array, steps: jax.Array) -> jax.Array:
        """[B, N] of each user's step; sample n of a user gets the same number whatever N and the batch are."""

        def one(key: jax.Array, step: jax.Array) -> jax.Array:
            stream = jax.random.wrap_key_data(key, impl="threefry2x32")
            return jax.random.uniform(jax.random.fold_in(stream, step), (self._num_samples,))

        return jax.vmap(one)(keys, steps)


def _turn(suffix: KeyValues, by: jax.Array, *, more: int) -> KeyValues:
    """Rolls [R, G, T, C] so that place `by` comes first, and adds places behind."""
    return jax.tree.map(lambda x: jnp.pad(jnp.roll(x, -by, axis=2), ((0, 0), (0, 0), (0, more), (0, 0))), suffix)


class _Rows:
    """The host's books: who is in which place, which completion is in which row, and what was written so far.

    P places hold a user's prompt each; R rows a completion each.

    Attributes:
      last: [R] int32, the token to read next.
      alive: [R] bool.
      cell_of: [R] int32, place · N + sample.
      row_of: [P, N] int32; 0 where a sample has no row.
      ages: [P] int32, tokens that each living sample of the place has.
      lengths, keys: of the prompts in the places.
      tokens, num_tokens, log_probs, finished: of all users; see `prefix.Completed`.
    """

    def __init__(self, places: int, samples: int, rows: int, users: int, limit: int):
        self._users, self._admitted, self._samples = users, 0, samples
        self._user_of = np.full(places, -1)
        self._told_users = self._told = 0
        self.last, self.cell_of, self.alive = np.zeros(rows, np.int32), np.zeros(rows, np.int32), np.zeros(rows, bool)
        self.row_of = np.zeros((places, samples), np.int32)
        self.ages, self.lengths = np.ones(places, np.int32), np.ones(places, np.int32)
        self.keys = np.zeros((places, 2), np.uint32)
        self.tokens = np.zeros((users, samples, limit), np.int32)
        self.num_tokens = np.zeros((users, samples), np.int32)
        self.log_probs = np.zeros((users, samples), np.float32)
        self.finished = np.zeros((users, samples), bool)

    def waiting(self) -> bool:
        """Whether there are users that were not admitted yet."""
        return self._admitted < self._users

    def next_users(self, together: int) -> range:
        """The next users, when there is room for all of them."""
        count = min(together, self._users - self._admitted)
        rows = len(self.alive) - int(self.alive.sum())
        if (self._user_of < 0).sum() < count or rows < count * self._samples:
            return range(0)
        self._admitted += count
        return range(self._admitted - count, self._admitted)

    def free_places(self, count: int) -> np.ndarray:
        """The first free places."""
        return np.flatnonzero(self._user_of < 0)[:count].astype(np.int32)

    def put(self, users: np.ndarray, places: np.ndarray, batch: Batch, first: np.ndarray, scores: np.ndarray, eos: int):
        """Gives users' completions rows, but for those that end with their first token."""
        self.lengths[places], self.keys[places] = np.maximum(batch.lengths[users], 1), batch.keys[users]
        self.ages[places] = 1
        self.tokens[users, :, 0], self.num_tokens[users], self.log_probs[users] = first, 1, scores
        self.finished[users] = first == eos
        goes_on = (first != eos) & (self.tokens.shape[2] > 1)
        goes_on &= (batch.lengths[users] > 0)[:, None]
        which, sample = np.nonzero(goes_on)
        rows = np.flatnonzero(~self.alive)[: len(which)]
        self.alive[rows], self.last[rows] = True, first[which, sample]
        self.cell_of[rows] = places[which] * self._samples + sample
        self.row_of[places] = 0
        self.row_of[places[which], sample] = rows
        self._user_of[places[goes_on.any(axis=1)]] = users[goes_on.any(axis=1)]

    def oldest(self) -> int:
        """Tokens of the longest completion that is being written."""
        return int(self.ages[self.cell_of[self.alive] // self._samples].max())

    def read(self, written: list[np.ndarray], eos: int) -> None:
        """Enters what a phase has written; see `Sampler._extend`."""
        tokens, scores, counts, alive = written
        place, sample = self.cell_of // self._samples, self.cell_of % self._samples
        user, ages = self._user_of[place], self.ages[place]
        for i in range(tokens.shape[1]):
            rows = np.flatnonzero(counts > i)
            self.tokens[user[rows], sample[rows], ages[rows] + i] = tokens[rows, i]
            self.log_probs[user[rows], sample[rows]] += scores[rows, i]
        rows = np.flatnonzero(counts)
        self.last[rows] = tokens[rows, counts[rows] - 1]
        self.num_tokens[user[rows], sample[rows]] += counts[rows]
        self.finished[user[rows], sample[rows]] = self.last[rows] == eos
        self.alive[:] = alive
        self.ages += counts.max()
        living = np.zeros(len(self._user_of), bool)
        living[place[alive]] = True
        self._user_of[~living] = -1

    def left(self) -> tuple[int, int]:
        """Users done since the last call, and their tokens."""
        done = self._admitted - int((self._user_of >= 0).sum())
        tokens = int(self.num_tokens.sum())
        news = done - self._told_users, tokens - self._told
        self._told_users, self._told = done, tokens
        return news
