"""Beam search over the catalogue's trie: every hypothesis is a path of it, so every completion is an item.

Notable: what all items begin with is read with the prompt, once a user; a completed hypothesis stays in the beam and
competes with its final score; as many children are looked at as the widest node of the levels at hand has.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from calrec_jax.decode.sampling import _ROWS, Compiled, Completed, Prefilled, call, grow, prefill
from calrec_jax.decode.trie import Trie
from calrec_jax.models.transformer import KeyValues, Transformer, empty_suffix

_PHASE_STEPS = (1, 15)  # the first level is by far the widest
_LATER_STEPS = 32


class Hypotheses(NamedTuple):
    """The loop's state. Scores fall along K; −inf marks an empty place."""

    step: jax.Array
    nodes: jax.Array
    scores: jax.Array
    complete: jax.Array
    suffix: KeyValues


class BeamSearch:
    """Finds the items of the highest probability for each user of a batch.

    With `renormalise`, the model's probabilities are renormalised over each node's children: tokens without an
    alternative cost nothing, all items sum to 1, and a hypothesis with one item left is complete at
    once. Without, a score is the plain log-probability of the item's tokens and EOS under the model.

    Args:
      model: the decoder.
      params: its parameters.
      trie: of the catalogue.
      num_beams: K, hypotheses kept; with as many as the catalogue has texts the search is exact.
      renormalise: see above.
    """

    def __init__(self, model: Transformer, params: Any, trie: Trie, *, num_beams: int, renormalise: bool):
        self._model, self._params, self._trie = model, params, trie
        self._num_beams, self._renormalise = num_beams, renormalise
        self._forced = len(trie.root_path)
        self._root = int(trie.level_offsets[self._forced])
        complete = trie.child_offsets[1:] == trie.child_offsets[:-1]
        if renormalise:
            complete = np.diff(trie.node_leaves, axis=1)[:, 0] == 1
        tokens = np.concatenate([[0], trie.edge_tokens]).astype(np.int32)  # the token that leads to each node
        self._tables = _Tables(*(jnp.asarray(x) for x in (trie.child_offsets, tokens, complete)))
        self.compiled = Compiled()

    def __call__(self, tokens: np.ndarray, lengths: np.ndarray, keys: np.ndarray) -> Completed:
        """Completes a batch of prompts; see `Sampler.__call__`. `items` are leaves of the trie; `tokens` is empty."""
        lengths = lengths.astype(np.int32)
        prompts = np.pad(tokens, ((0, 0), (0, self._forced)))
        np.put_along_axis(
            prompts, np.maximum(lengths, 1)[:, None] + np.arange(self._forced), self._trie.root_path[None], axis=1
        )
        shared, found, embedding = self.compiled(
            self._begin, self._params, self._tables, prompts, lengths, keys, width=self._trie.fan_out(self._forced)
        )
        begin, deepest = 1, self._trie.depth - self._forced
        phases = iter(_PHASE_STEPS)
        while begin < deepest and not bool(found.complete.all()):
            end = min(begin + next(phases, _LATER_STEPS), deepest)
            width = max(self._trie.fan_out(self._forced + step) for step in range(begin, end))
            found = self.compiled(self._extend, self._params, self._tables, shared, found, bound=end, width=width)
            begin = end
        host = jax.device_get(found._replace(suffix=()))
        leaves = np.where(np.isfinite(host.scores), self._trie.node_leaves[host.nodes, 0], -1).astype(np.int32)
        return Completed(
            tokens=np.zeros((*leaves.shape, 0), np.int32),
            num_tokens=np.where(leaves >= 0, self._trie.leaf_lengths[leaves], 0).astype(np.int32),
            log_probs=host.scores,
            finished=leaves >= 0,
            user_embedding=np.asarray(embedding),
            items=leaves,
        )

    def _begin(self, params, tables: _Tables, tokens, lengths, keys, *, width: int):
        """Prefill, and the first token that items differ in."""
        hidden, shared, embedding = prefill(self._model, params, tokens, lengths, keys, self._forced)
        root = jnp.full(lengths.shape, self._root, jnp.int32)
        scores = self._child_scores(params, tables, hidden[:, -1], root, width)
        if not self._renormalise:  # the forced tokens cost what the model says
            logits = call(self._model, params, hidden[:, :-1], method="logits")
            path = jnp.asarray(self._trie.root_path)[None, :, None]
            path_scores = jnp.take_along_axis(jax.nn.log_softmax(logits), path, axis=2)[:, :, 0]
            scores += path_scores.sum(axis=1, keepdims=True)
        candidates = jnp.pad(scores, ((0, 0), (0, max(0, self._num_beams - width))), constant_values=-jnp.inf)
        best, slot = jax.lax.top_k(candidates, self._num_beams)
        nodes = jnp.where(jnp.isfinite(best), tables.child_offsets[self._root] + slot + 1, self._root)
        complete = tables.complete[nodes] | ~jnp.isfinite(best) | (lengths == 0)[:, None]
        suffix = empty_suffix(self._model.config, nodes.shape[0], nodes.shape[1], 0)
        return shared, Hypotheses(jnp.int32(1), nodes, best, complete, suffix), embedding

    def _extend(self, params, tables: _Tables, shared: Prefilled, found: Hypotheses, *, bound: int, width: int):
        """Steps until every hypothesis is complete or has `bound` tokens beyond the root path."""

        def unfinished(state: Hypotheses) -> jax.Array:
            return (state.step < bound) & ~state.complete.all()

        step = functools.partial(self._step, params, tables, shared, width)
        return jax.lax.while_loop(unfinished, step, found._replace(suffix=grow(found.suffix, bound - 1)))

    def _step(self, params, tables: _Tables, shared: Prefilled, width: int, state: Hypotheses) -> Hypotheses:
        """Reads each hypothesis's last token and keeps the best K of all continuations and completed ones."""
        batch, beams = state.nodes.shape
        positions = jnp.broadcast_to((shared.lengths + state.step - 1)[:, None], state.nodes.shape)
        last = tables.tokens[state.nodes]
        hidden, suffix = call(
            self._model, params, last, positions, state.step - 1, shared.prefix, shared.mask, state.suffix,
            method="decode",
        )  # fmt: skip
        scores = self._child_scores(
            params, tables, hidden.reshape(-1, hidden.shape[-1]), state.nodes.reshape(-1), width
        ).reshape(batch, beams, width)
        stays = jnp.arange(width) == 0  # a completed hypothesis is its own only continuation
        kept = jnp.where(stays, state.scores[..., None], -jnp.inf)
        candidates = jnp.where(state.complete[..., None], kept, state.scores[..., None] + scores)
        best, index = jax.lax.top_k(candidates.reshape(batch, -1), beams)
        parent, slot = index // width, index % width
        before = jnp.take_along_axis(state.nodes, parent, axis=1)
        done = jnp.take_along_axis(state.complete, parent, axis=1)
        nodes = jnp.where(done | ~jnp.isfinite(best), before, tables.child_offsets[before] + slot + 1)
        suffix = jax.tree.map(lambda x: jnp.take_along_axis(x, parent[:, :, None, None, None], axis=1), suffix)
        complete = done | tables.complete[nodes] | ~jnp.isfinite(best)
        return Hypotheses(state.step + 1, nodes, best, complete, suffix)

    def _child_scores(self, params, tables: _Tables, hidden: jax.Array, nodes: jax.Array, width: int) -> jax.Array:
        """Log-probabilities [R, W] of each node's children after hidden [R, D]; −inf beyond the last child."""

        def one(row: tuple[jax.Array, jax.Array]) -> jax.Array:
            logits = call(self._model, params, row[0], method="logits")
            edges = tables.child_offsets[row[1]] + jnp.arange(width)
            real = edges < tables.child_offsets[row[1] + 1]
            child = jnp.where(real, logits[tables.tokens[jnp.where(real, edges + 1, 0)]], -jnp.inf)
            return child - jax.nn.logsumexp(jnp.where(real.any(), child, 0.0) if self._renormalise else logits)

        return jax.lax.map(one, (hidden, nodes), batch_size=min(_ROWS, len(nodes)))


class _Tables(NamedTuple):
    """The trie on the device; node n is reached by `tokens[n]`."""

    child_offsets: jax.Array
    tokens: jax.Array
    complete: jax.Array
