"""Beam search over all texts, plain and stochastic.

Notable: a completed hypothesis stays in the beam and competes with its final score, so the search ends when all K are
complete; log-probabilities are exact sums at temperature 1. The stochastic beam (Kool et al., 2019) keeps the K
hypotheses of the greatest Gumbel-perturbed log-probability: a sample without replacement of the model's texts.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from calrec_jax.decode.prefix import (
    Batch,
    Compiled,
    Completed,
    Prefilled,
    Said,
    by_rows,
    call,
    grow,
    in_batches,
    nothing_said,
    prefill,
)
from calrec_jax.models.transformer import KeyValues, Transformer, empty_suffix

PHASE_TOKENS = 32  # by which the suffix grows


class Hypotheses(NamedTuple):
    """The loop's state, [B, K, ...], best first. Hypotheses fall in `order`; −inf marks an empty place.

    Attributes:
      step: tokens of each hypothesis that is not complete.
      tokens: [B, K, T].
      num_tokens: EOS counted.
      log_probs: at temperature 1.
      sampled: log-probability at the temperature of the stochastic beam.
      order: what the beam keeps the greatest of.
      complete: whether EOS was reached.
      suffix: keys and values [B·K, G, T, C].
    """

    step: jax.Array
    tokens: jax.Array
    num_tokens: jax.Array
    log_probs: jax.Array
    sampled: jax.Array
    order: jax.Array
    complete: jax.Array
    suffix: KeyValues


class BeamSearch:
    """Finds texts of high probability, or draws distinct ones.

    Args:
      model: the decoder.
      params: its parameters.
      eos_id: the token that ends a completion.
      num_beams: K.
      max_new_tokens: T, EOS included; hypotheses that have not ended by then are cut.
      batch_users: users at a time.
      temperature: None searches; otherwise the stochastic beam draws from the model at this temperature.
    """

    def __init__(
        self,
        model: Transformer,
        params: Any,
        *,
        eos_id: int,
        num_beams: int,
        max_new_tokens: int,
        batch_users: int,
        temperature: float | None = None,
    ):
        self._model, self._params, self._eos_id = model, params, eos_id
        self._num_beams, self._limit, self._batch_users = num_beams, max_new_tokens, batch_users
        self._temperature = temperature
        self.compiled = Compiled()

    def __call__(self, batch: Batch, said: Said = nothing_said) -> Completed:
        """Completes prompts of any number of users; see `prefix.Decoder`.

        The most probable text is first; of the stochastic beam, the one drawn first: its first n are a sample of n.
        Places that the model has no texts for have −inf and no tokens.
        """
        return in_batches(self._complete, batch, self._batch_users, said)

    def _complete(self, batch: Batch) -> Completed:
        lengths = batch.lengths.astype(np.int32)
        shared, found, embedding = self.compiled(self._begin, self._params, batch.tokens, lengths, batch.keys)
        bound = 1
        while bound < self._limit and not bool(found.complete.all()):
            bound = min(bound + PHASE_TOKENS, self._limit)
            found = self.compiled(self._extend, self._params, shared, found, bound=bound)
        host = jax.device_get(found._replace(suffix=()))
        real = np.isfinite(host.log_probs)
        return Completed(
            host.tokens, host.num_tokens * real, host.log_probs, host.complete & real, np.asarray(embedding)
        )

    def _begin(self, params, tokens, lengths, keys):
        """Prefill, and the first token: one hypothesis, the empty text, is continued."""
        hidden, shared, embedding = prefill(self._model, params, tokens, lengths, keys)
        users, beams = len(lengths), self._num_beams
        none = jnp.zeros((users, 1))
        # The greatest of all perturbed log-probabilities may be taken as given (Kool et al., section 4.2): 0.
        log_probs, sampled, order, token = self._candidates(params, hidden[:, 0], keys, 0, none, none, none)
        missing = ((0, 0), (0, beams - token.shape[1]))
        log_probs, sampled, order = (jnp.pad(x, missing, constant_values=-jnp.inf) for x in (log_probs, sampled, order))
        token = jnp.pad(token, missing)
        complete = (token == self._eos_id) | ~jnp.isfinite(order) | (lengths == 0)[:, None]
        store = jnp.zeros((users, beams, self._limit), jnp.int32).at[:, :, 0].set(token)
        suffix = empty_suffix(self._model.config, users * beams, 0)
        ones = jnp.ones((users, beams), jnp.int32)
        return shared, Hypotheses(jnp.int32(1), store, ones, log_probs, sampled, order, complete, suffix), embedding

    def _extend(self, params, shared: Prefilled, found: Hypotheses, *, bound: int) -> Hypotheses:
        """Steps until every hypothesis is complete or has `bound` tokens."""

        def unfinished(state: Hypotheses) -> jax.Array:
            return (state.step < bound) & ~state.complete.all()

        grown = found._replace(suffix=grow(found.suffix, bound - 1))  # the last token is never read
        return jax.lax.while_loop(unfinished, functools.partial(self._step, params, shared), grown)

    def _step(self, params, shared: Prefilled, state: Hypotheses) -> Hypotheses:
        """Reads each hypothesis's last token and keeps the best K of all continuations and completed ones."""
        users, beams = state.order.shape
        last = jax.lax.dynamic_index_in_dim(state.tokens, state.step - 1, axis=2, keepdims=False)
        positions = jnp.broadcast_to((shared.lengths + state.step - 1)[:, None], last.shape)
        written = jnp.arange(state.suffix[0][0].shape[2])[None, None] < state.step
        hidden, suffix = call(
            self._model, params, last.reshape(-1, 1), positions.reshape(-1, 1), state.step - 1, shared.prefix,
            shared.mask, state.suffix, written, method="decode",
        )  # fmt: skip
        candidates = self._candidates(
            params, hidden[:, 0], shared.keys, state.step, state.log_probs, state.sampled, state.order
        )
        *scores, token = (x.reshape(users, beams, -1) for x in candidates)
        own = jnp.arange(token.shape[2]) == 0  # a completed hypothesis is its own only continuation
        done = state.complete[..., None]
        before = (state.log_probs, state.sampled, state.order)
        log_probs, sampled, order = (
            jnp.where(done, jnp.where(own, old[..., None], -jnp.inf), new)
            for old, new in zip(before, scores, strict=True)
        )
        best, index = jax.lax.top_k(order.reshape(users, -1), beams)
        parent = index // token.shape[2]

        def chosen(x: jax.Array) -> jax.Array:
            return jnp.take_along_axis(x.reshape(users, -1), index, axis=1)

        def of_parent(x: jax.Array) -> jax.Array:
            return jnp.take_along_axis(x, parent.reshape(parent.shape + (1,) * (x.ndim - 2)), axis=1)

        was_complete = of_parent(state.complete)
        drawn = jnp.where(was_complete, 0, chosen(token))
        tokens = jax.lax.dynamic_update_index_in_dim(of_parent(state.tokens), drawn, state.step, axis=2)
        rows = (jnp.arange(users)[:, None] * beams + parent).reshape(-1)
        return Hypotheses(
            state.step + 1,
            tokens,
            of_parent(state.num_tokens) + ~was_complete,
            chosen(log_probs),
            chosen(sampled),
            best,
            was_complete | (drawn == self._eos_id) | ~jnp.isfinite(best),
            jax.tree.map(lambda x: x[rows], suffix),
        )

    def _candidates(self, params, hidden, keys, step, log_probs, sampled, order):
        """The best K continuations of each hypothesis.

        Args:
          params: of the model.
          hidden: [B·k, D] of the k hypotheses of each user.
          keys: [B, 2].
          step: tokens of each hypothesis.
          log_probs: [B, k] of the hypotheses, as the next two.
          sampled: see `Hypotheses`.
          order: see `Hypotheses`.

        Returns:
          log_probs, sampled, order and tokens of the continuations, each [B·k, min(K, V)].
        """
        users, beams = order.shape
        count = min(self._num_beams, self._model.vocab_size)
        rows = jnp.arange(users * beams)
        streams = jax.vmap(lambda key: jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), step))(
            keys
        )

        def one(row, hidden, log_prob, sampled, order):
            logits = call(self._model, params, hidden, method="logits")
            at_one = jax.nn.log_softmax(logits)
            if self._temperature is None:
                added, token = jax.lax.top_k(at_one, count)
                score = log_prob + added
                return score, score, score, token
            scores = sampled + jax.nn.log_softmax(logits / self._temperature)
            key = jax.random.fold_in(streams[row // beams], row % beams)
            best, token = jax.lax.top_k(_given_maximum(scores + jax.random.gumbel(key, scores.shape), order), count)
            return log_prob + at_one[token], scores[token], best, token

        return by_rows(one, rows, hidden, log_probs.reshape(-1), sampled.reshape(-1), order.reshape(-1))


def _given_maximum(perturbed: jax.Array, maximum: jax.Array) -> jax.Array:
    """Gumbel-perturbed scores conditioned on their maximum (Kool et al., 2019, section 4.3 and appendix B.3)."""
    v = maximum - perturbed + _log1mexp(perturbed - perturbed.max())
    return maximum - jnp.maximum(v, 0) - jnp.log1p(jnp.exp(-jnp.abs(v)))


def _log1mexp(x: jax.Array) -> jax.Array:
    """log(1 − exp(x)) for x ≤ 0 without cancellation (Mächler, 2012)."""
    small = jnp.log(-jnp.expm1(jnp.minimum(x, -1e-37)))
    return jnp.where(x > -0.6931472, jnp.where(x < 0, small, -jnp.inf), jnp.log1p(-jnp.exp(x)))
