"""Temperature sampling of N completions a user from one prefill.

Notable: a draw is an inverse CDF in two levels (sums of 64 columns of the vocabulary, then inside one column), which
needs one random number where the Gumbel trick needs V; a user's random numbers depend on (seed, user, step) alone; the
suffix's keys and values grow by a phase of tokens at a time, so that short completions do not pay for long ones.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from calrec_jax.models.towers import mean_pool, unit
from calrec_jax.models.transformer import KeyValues, Transformer, empty_suffix

_COLUMNS = 64
_ROWS = 256  # samples whose logits are made and reduced at a time: they stay in the processor's cache
PHASE_TOKENS = 32


def call(model: Transformer, params: Any, *args: Any, method: str) -> Any:
    """A method of the model under these parameters."""
    return model.apply({"params": params}, *args, method=method)


class Completed(NamedTuple):
    """Completions of a batch on the host.

    Attributes:
      tokens: [B, N, T] int32, EOS included, 0 after it.
      num_tokens: [B, N] int32, EOS counted.
      log_probs: [B, N] float32, sum over the tokens at temperature 1.
      finished: [B, N] bool, EOS was reached.
      user_embedding: [B, D] float32, L2-normalised.
      items: [B, N] int32 index of what was completed where decoding is constrained (−1 none), else None.
    """

    tokens: np.ndarray
    num_tokens: np.ndarray
    log_probs: np.ndarray
    finished: np.ndarray
    user_embedding: np.ndarray
    items: np.ndarray | None = None

    def first(self, users: int) -> Completed:
        """Without the rows that only filled the batch."""
        return Completed(*(None if x is None else x[:users] for x in self))  # type: ignore[arg-type]


class Compiled:
    """Functions compiled ahead of their first call, once for each set of shapes, and the seconds it takes."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._programs: dict[Any, Callable[..., Any]] = {}

    def __call__(self, function: Callable[..., Any], *args: Any, **static: Any) -> Any:
        """Calls `jax.jit(function)` with `static` as constants; `args` are arrays or trees of them."""
        leaves, tree = jax.tree.flatten(args)
        shapes = tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
        key = (function, tuple(sorted(static.items())), tree, shapes)
        if key not in self._programs:
            began = time.perf_counter()
            self._programs[key] = jax.jit(functools.partial(function, **static)).lower(*args).compile()
            self.seconds += time.perf_counter() - began
        return self._programs[key](*args)


def draw(logits: jax.Array, uniforms: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
    """Draws from softmax(logits / temperature) by inverse CDF.

    The vocabulary is laid out as a table of 64 columns; a uniform number first finds its column, then a token of it.

    Args:
      logits: [V] float32.
      uniforms: [N] in [0, 1).
      temperature: positive.

    Returns:
      tokens [N] int32 and their log-probabilities [N] at temperature 1.
    """
    top = logits.max()
    log_total = jnp.log(jnp.exp(logits - top).sum())
    table = jnp.pad(logits, (0, -logits.size % _COLUMNS), constant_values=-jnp.inf).reshape(-1, _COLUMNS)
    weights = jnp.exp((table - top) / temperature).sum(0)
    cumulative = jnp.cumsum(weights)
    targets = uniforms * cumulative[-1]
    column = jax.vmap(_first_above, (None, None, 0))(cumulative, weights, targets)
    inside = jnp.take(table, column, axis=1).T
    inside_weights = jnp.exp((inside - top) / temperature)
    rest = targets - (cumulative - weights)[column]
    row = jax.vmap(_first_above)(jnp.cumsum(inside_weights, axis=-1), inside_weights, rest)
    log_probs = jnp.take_along_axis(inside, row[:, None], axis=1)[:, 0] - top - log_total
    return row * _COLUMNS + column, log_probs


def _first_above(cumulative: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """First index whose cumulative weight exceeds the target; rounding can never choose a weight of 0."""
    above = (cumulative > target) & (weights > 0)
    return jnp.where(above.any(), jnp.argmax(above), jnp.argmax(weights)).astype(jnp.int32)


class Samples(NamedTuple):
    """The loop's state: the first `step` tokens of each sample are there."""

    step: jax.Array
    tokens: jax.Array
    num_tokens: jax.Array
    log_probs: jax.Array
    finished: jax.Array
    suffix: KeyValues


class Prefilled(NamedTuple):
    """What a user's samples share: keys and values, real places [B, L], tokens read [B], and `user_keys` [B, 2]."""

    prefix: KeyValues
    mask: jax.Array
    lengths: jax.Array
    keys: jax.Array


class Sampler:
    """Samples N completions of each user of a batch.

    Args:
      model: the decoder.
      params: its parameters.
      eos_id: the token that ends a completion.
      num_samples: N.
      temperature: of sampling; scores are at temperature 1.
      max_new_tokens: T, EOS included.
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
    ):
        self._model, self._params, self._eos_id = model, params, eos_id
        self._num_samples, self._temperature, self._limit = num_samples, temperature, max_new_tokens
        self.compiled = Compiled()

    def __call__(self, tokens: np.ndarray, lengths: np.ndarray, keys: np.ndarray) -> Completed:
        """Completes a batch of prompts.

        Args:
          tokens: [B, L] int32 prompts.
          lengths: [B] tokens of each; 0 marks a row that only fills the batch.
          keys: [B, 2] uint32, see `prompts.user_keys`.
        """
        shared, samples, embedding = self.compiled(self._begin, self._params, tokens, lengths.astype(np.int32), keys)
        bound = 1
        while bound < self._limit and not bool(samples.finished.all()):
            bound = min(bound + PHASE_TOKENS, self._limit)
            samples = self.compiled(self._extend, self._params, shared, samples, bound=bound)
        host = jax.device_get(samples._replace(suffix=()))
        return Completed(host.tokens, host.num_tokens, host.log_probs, host.finished, np.asarray(embedding))

    def _begin(self, params, tokens, lengths, keys):
        """Prefill and the first token, whose distribution all samples of a user share."""
        hidden, shared, embedding = prefill(self._model, params, tokens, lengths, keys)
        logits = call(self._model, params, hidden[:, 0], method="logits")
        first, log_probs = jax.vmap(functools.partial(draw, temperature=self._temperature))(
            logits, self._uniforms(keys, 0)
        )
        none = jnp.broadcast_to((lengths == 0)[:, None], first.shape)
        store = jnp.zeros((*first.shape, self._limit), jnp.int32).at[:, :, 0].set(first)
        suffix = empty_suffix(self._model.config, first.shape[0], first.shape[1], 0)
        samples = Samples(jnp.int32(1), store, jnp.ones_like(first), log_probs, none | (first == self._eos_id), suffix)
        return shared, samples, embedding

    def _extend(self, params, shared: Prefilled, samples: Samples, *, bound: int) -> Samples:
        """Steps until every sample has ended or has `bound` tokens."""
        places = bound - 1  # the last token is never read
        grown = grow(samples.suffix, places)

        def unfinished(state: Samples) -> jax.Array:
            return (state.step < bound) & ~state.finished.all()

        return jax.lax.while_loop(
            unfinished, functools.partial(self._step, params, shared), samples._replace(suffix=grown)
        )

    def _step(self, params, shared: Prefilled, state: Samples) -> Samples:
        """Reads the last token of every sample and draws the next."""
        last = jax.lax.dynamic_index_in_dim(state.tokens, state.step - 1, axis=2, keepdims=False)
        positions = jnp.broadcast_to((shared.lengths + state.step - 1)[:, None], last.shape)
        hidden, suffix = call(
            self._model,
            params,
            last,
            positions,
            state.step - 1,
            shared.prefix,
            shared.mask,
            state.suffix,
            method="decode",
        )

        def one(row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return draw(call(self._model, params, row[0], method="logits"), row[1], self._temperature)

        rows = (hidden.reshape(-1, hidden.shape[-1]), self._uniforms(shared.keys, state.step).reshape(-1, 1))
        drawn, scores = jax.lax.map(one, rows, batch_size=min(_ROWS, len(rows[0])))
        alive = ~state.finished
        drawn = jnp.where(alive, drawn.reshape(last.shape), 0)
        return Samples(
            state.step + 1,
            jax.lax.dynamic_update_index_in_dim(state.tokens, drawn, state.step, axis=2),
            state.num_tokens + alive,
            state.log_probs + jnp.where(alive, scores.reshape(last.shape), 0.0),
            state.finished | (drawn == self._eos_id),
            suffix,
        )

    def _uniforms(self, keys: jax.Array, step: int | jax.Array) -> jax.Array:
        """[B, N] of this step; sample n of a user gets the same number whatever N and the batch are."""

        def one(key: jax.Array) -> jax.Array:
            stream = jax.random.wrap_key_data(key, impl="threefry2x32")
            return jax.random.uniform(jax.random.fold_in(stream, step), (self._num_samples,))

        return jax.vmap(one)(keys)


def prefill(
    model: Transformer, params: Any, tokens: jax.Array, lengths: jax.Array, keys: jax.Array, forced: int = 0
) -> tuple[jax.Array, Prefilled, jax.Array]:
    """Reads the prompts once.

    Args:
      model: the decoder.
      params: its parameters.
      tokens: [B, L]; after a prompt stand the `forced` tokens that begin every completion.
      lengths: [B] of the prompts; 0 for rows that only fill the batch.
      keys: [B, 2], handed on.
      forced: P.

    Returns:
      Hidden states [B, P + 1, D] from each prompt's last token on, what the samples share, and v_U [B, D]: the
      L2-normalised mean over the history's input tokens, the start token left out.
    """
    place = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    read = jnp.maximum(lengths, 1) + forced
    mask = place < read[:, None]
    hidden, prefix = call(model, params, tokens, place, mask.astype(jnp.int32), method="prefill")
    pool = ((place < lengths[:, None]) & (place > 0)).astype(jnp.int32)
    embedding = unit(mean_pool(hidden, pool, 1)[:, 0])
    ends = (read - 1 - forced)[:, None] + jnp.arange(forced + 1)
    last = jnp.take_along_axis(hidden, ends[:, :, None], axis=1)
    return last, Prefilled(prefix, mask, read, keys), embedding


def grow(suffix: KeyValues, places: int) -> KeyValues:
    """Keys and values [B, N, G, T, C] with room for `places` tokens."""
    return jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * 3 + [(0, places - x.shape[3]), (0, 0)]), suffix)
