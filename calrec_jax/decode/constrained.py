"""Beam search over the catalogue's trie: every hypothesis is a path of it, so every completion is an item.

Notable: what all items begin with is read with the prompt, once a user. A hypothesis with one text left is complete: it
keeps its place by its score so far, and the tails that are then forced are scored in one pass at the end. As many
children are looked at as the widest node of the levels at hand has. Items can be left out a user: the search then is
that of a catalogue without them.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from calrec_jax.data.examples import TokenCatalogue
from calrec_jax.decode import scoring
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
from calrec_jax.decode.scoring import Candidates, Texts
from calrec_jax.decode.trie import Trie
from calrec_jax.models.transformer import KeyValues, Transformer, empty_suffix

_PHASE_STEPS = (1, 15)  # the first level is by far the widest
_LATER_STEPS = 32
_NARROW = 16  # up to a share of 1/16 of the vocabulary, children's logits alone are cheaper than all
_NONE = np.iinfo(np.int32).max  # where a user leaves out fewer leaves than the widest does


class Hypotheses(NamedTuple):
    """The loop's state, [B, K]. Scores fall along K; −inf marks an empty place."""

    step: jax.Array
    nodes: jax.Array
    scores: jax.Array
    complete: jax.Array
    suffix: KeyValues


class _Tables(NamedTuple):
    """The trie on the device; node n is reached by `tokens[n]` and has the leaves `[first[n], last[n])`."""

    child_offsets: jax.Array
    tokens: jax.Array
    first: jax.Array
    last: jax.Array


class ConstrainedBeam:
    """Finds the items of the highest probability for each user.

    With `renormalise`, the model's probabilities are renormalised over each node's children: tokens without an
    alternative cost nothing and all items that are not left out sum to 1. Without, a score is the plain log-probability
    of the item's tokens and EOS under the model.

    Args:
      model: the decoder.
      params: its parameters.
      catalogue: the items' tokens.
      trie: of the catalogue.
      num_beams: K, hypotheses kept; with as many as the catalogue has texts the search is exact.
      renormalise: see above.
      batch_users: users at a time.
      left_out: items that each user is not to get.
    """

    def __init__(
        self,
        model: Transformer,
        params: Any,
        *,
        catalogue: TokenCatalogue,
        trie: Trie,
        num_beams: int,
        renormalise: bool,
        batch_users: int,
        left_out: Candidates | None = None,
    ):
        self._model, self._params, self._catalogue, self._trie = model, params, catalogue, trie
        self._num_beams, self._renormalise, self._batch_users = num_beams, renormalise, batch_users
        self._left_out = left_out
        self._most_left_out = 0 if left_out is None else int((left_out.end - left_out.start).max(initial=0))
        self._leaf_of = np.full(len(catalogue.lengths), -1, np.int32)
        sizes = np.diff(trie.leaf_offsets)
        self._leaf_of[trie.leaf_items] = np.repeat(np.arange(len(sizes)), sizes)
        self._forced = len(trie.root_path)
        self._root = int(trie.level_offsets[self._forced])
        tokens = np.concatenate([[0], trie.edge_tokens]).astype(np.int32)  # the token that leads to each node
        first, last = np.ascontiguousarray(trie.node_leaves.T)
        self._tables = _Tables(*(jnp.asarray(x) for x in (trie.child_offsets, tokens, first, last)))
        self.compiled = Compiled()

    def __call__(self, batch: Batch, said: Said = nothing_said) -> Completed:
        """Finds items for any number of users; see `prefix.Decoder`.

        A text of several items gives them all, in item order, with the text's score.
        """
        done = in_batches(self._complete, batch, self._batch_users, said)
        leaves = done.items
        assert leaves is not None
        found, sizes = leaves >= 0, np.diff(self._trie.leaf_offsets)
        sizes = np.where(found, sizes[leaves], 0)
        at = np.repeat(self._trie.leaf_offsets[leaves].reshape(-1), sizes.reshape(-1))
        row = np.repeat(np.arange(leaves.size), sizes.reshape(-1))
        begin = np.cumsum(sizes.reshape(-1)) - sizes.reshape(-1)
        items = self._trie.leaf_items[at + np.arange(len(at)) - begin[row]]
        user = row // leaves.shape[1]
        keep = np.ones(len(items), bool)
        for u in np.unique(user) if self._most_left_out else ():
            own = user == u
            keep[own] = ~np.isin(items[own], self._items_left_out(batch.users[u]))
        items, row, user = items[keep], row[keep], user[keep]
        counts = np.bincount(user, minlength=len(leaves))
        inside = np.arange(counts.max(initial=0)) < counts[:, None]

        def expanded(x: np.ndarray, empty: float) -> np.ndarray:
            out = np.full(inside.shape, empty, x.dtype)
            out[inside] = x
            return out

        return Completed(
            np.zeros((*inside.shape, 0), np.int32),
            expanded(done.num_tokens.reshape(-1)[row], 0),
            expanded(done.log_probs.reshape(-1)[row], -np.inf),
            inside,
            done.user_embedding,
            expanded(items, -1),
        )

    def _items_left_out(self, user: int) -> np.ndarray:
        if self._left_out is None or user < 0:
            return np.zeros(0, np.int32)
        return np.unique(self._left_out.items[self._left_out.start[user] : self._left_out.end[user]])

    def _leaves_left_out(self, users: np.ndarray) -> np.ndarray:
        """[B, E] int32 leaves all of whose items a user leaves out, ascending, filled up with `_NONE`."""
        out = np.full((len(users), self._most_left_out), _NONE, np.int32)
        sizes = np.diff(self._trie.leaf_offsets)
        for row, user in enumerate(users):
            leaves, counts = np.unique(self._leaf_of[self._items_left_out(user)], return_counts=True)
            whole = leaves[(leaves >= 0) & (counts == sizes[leaves])]
            out[row, : len(whole)] = whole
        return out

    def _complete(self, batch: Batch) -> Completed:
        """`items` of the result are leaves."""
        trie = self._trie
        lengths = batch.lengths.astype(np.int32)
        left_out = self._leaves_left_out(batch.users)
        prompts = np.pad(batch.tokens, ((0, 0), (0, self._forced)))
        np.put_along_axis(prompts, np.maximum(lengths, 1)[:, None] + np.arange(self._forced), trie.root_path[None], 1)
        shared, found, embedding = self.compiled(
            self._begin, self._params, self._tables, prompts, lengths, batch.keys, left_out,
            width=trie.fan_out(self._forced),
        )  # fmt: skip
        begin, deepest = 1, trie.depth - self._forced
        phases = iter(_PHASE_STEPS)
        while begin < deepest and not bool(found.complete.all()):
            end = min(begin + next(phases, _LATER_STEPS), deepest)
            width = max(trie.fan_out(self._forced + step) for step in range(begin, end))
            found = self.compiled(
                self._extend, self._params, self._tables, shared, left_out, found, bound=end, width=width
            )
            begin = end
        nodes, scores = np.asarray(found.nodes), np.asarray(found.scores)
        leaves = np.where(np.isfinite(scores), self._only_leaf(nodes, np.isfinite(scores), left_out), -1)
        if not self._renormalise:
            texts = self._tails(nodes, leaves)
            if texts.counts.any():
                scores = scores + np.asarray(self.compiled(self._score, self._params, shared, found.suffix, texts))
        by = np.argsort(-scores, axis=1, kind="stable")
        scores, leaves = np.take_along_axis(scores, by, axis=1), np.take_along_axis(leaves, by, axis=1)
        return Completed(
            tokens=np.zeros((*leaves.shape, 0), np.int32),
            num_tokens=np.where(leaves >= 0, trie.leaf_lengths[leaves], 0).astype(np.int32),
            log_probs=scores,
            finished=leaves >= 0,
            user_embedding=np.asarray(embedding),
            items=leaves,
        )

    def _only_leaf(self, nodes: np.ndarray, found: np.ndarray, left_out: np.ndarray) -> np.ndarray:
        """[B, K] int32, the one leaf below each node found that its user does not leave out."""
        first, last = np.moveaxis(self._trie.node_leaves[nodes], 2, 0)
        leaf = first.copy()
        for row, beam in np.argwhere(found & (last - first > 1)):
            leaf[row, beam] = np.setdiff1d(np.arange(first[row, beam], last[row, beam]), left_out[row])[0]
        return leaf

    def _tails(self, nodes: np.ndarray, leaves: np.ndarray) -> Texts:
        """What the leaves' texts have beyond the nodes."""
        c, trie = self._catalogue, self._trie
        depth = trie.depths(nodes)
        item = trie.leaf_items[trie.leaf_offsets[np.maximum(leaves, 0)]]
        counts = np.where(leaves >= 0, trie.leaf_lengths[leaves] - depth, 0).astype(np.int32)
        place = np.arange(scoring.bucket(int(counts.max())))
        inside = place < counts[:, :, None]
        at = (c.offsets[item] + depth)[:, :, None] + place
        targets = np.zeros(at.shape, np.int32)
        before_eos = inside & (at < c.offsets[item + 1][:, :, None])
        targets[before_eos] = c.tokens[at[before_eos]]
        targets[inside & ~before_eos] = c.eos_id
        inputs = np.zeros_like(targets)
        inputs[:, :, 0] = np.where(nodes > 0, trie.edge_tokens[np.maximum(nodes, 1) - 1], 0)
        inputs[:, :, 1:] = targets[:, :, :-1]
        return Texts(inputs, targets, counts, np.maximum(depth - self._forced - 1, 0).astype(np.int32))

    def _score(self, params, shared: Prefilled, suffix: KeyValues, texts: Texts) -> jax.Array:
        return scoring.log_probs(self._model, params, shared, suffix, texts)

    def _begin(self, params, tables: _Tables, tokens, lengths, keys, left_out, *, width: int):
        """Prefill, and the first token that items differ in."""
        hidden, shared, embedding = prefill(self._model, params, tokens, lengths, keys, self._forced)
        root = jnp.full(lengths.shape, self._root, jnp.int32)
        scores = self._child_scores(params, tables, left_out, hidden[:, -1], root, width)
        if not self._renormalise:  # the forced tokens cost what the model says
            logits = call(self._model, params, hidden[:, :-1], method="logits")
            path = jnp.asarray(self._trie.root_path)[None, :, None]
            path_scores = jnp.take_along_axis(jax.nn.log_softmax(logits), path, axis=2)[:, :, 0]
            scores += path_scores.sum(axis=1, keepdims=True)
        candidates = jnp.pad(scores, ((0, 0), (0, max(0, self._num_beams - width))), constant_values=-jnp.inf)
        best, slot = jax.lax.top_k(candidates, self._num_beams)
        nodes = jnp.where(jnp.isfinite(best), tables.child_offsets[self._root] + slot + 1, self._root)
        complete = (_left(tables, left_out, nodes) == 1) | ~jnp.isfinite(best) | (lengths == 0)[:, None]
        suffix = empty_suffix(self._model.config, nodes.size, 0)
        return shared, Hypotheses(jnp.int32(1), nodes, best, complete, suffix), embedding

    def _extend(
        self, params, tables: _Tables, shared: Prefilled, left_out, found: Hypotheses, *, bound: int, width: int
    ) -> Hypotheses:
        """Steps until every hypothesis is complete or has `bound` tokens beyond the root path."""

        def unfinished(state: Hypotheses) -> jax.Array:
            return (state.step < bound) & ~state.complete.all()

        step = functools.partial(self._step, params, tables, shared, left_out, width)
        return jax.lax.while_loop(unfinished, step, found._replace(suffix=grow(found.suffix, bound - 1)))

    def _step(self, params, tables: _Tables, shared: Prefilled, left_out, width: int, state: Hypotheses) -> Hypotheses:
        """Reads each hypothesis's last token and keeps the best K of all continuations and completed ones."""
        users, beams = state.nodes.shape
        positions = jnp.broadcast_to((shared.lengths + state.step - 1)[:, None], state.nodes.shape)
        written = jnp.arange(state.suffix[0][0].shape[2])[None, None] < state.step
        hidden, suffix = call(
            self._model, params, tables.tokens[state.nodes].reshape(-1, 1), positions.reshape(-1, 1), state.step - 1,
            shared.prefix, shared.mask, state.suffix, written, method="decode",
        )  # fmt: skip
        scores = self._child_scores(params, tables, left_out, hidden[:, 0], state.nodes.reshape(-1), width)
        own = jnp.arange(width) == 0  # a completed hypothesis is its own only continuation
        kept = jnp.where(own, state.scores[..., None], -jnp.inf)
        added = state.scores[..., None] + scores.reshape(users, beams, width)
        candidates = jnp.where(state.complete[..., None], kept, added)
        best, index = jax.lax.top_k(candidates.reshape(users, -1), beams)
        parent, slot = index // width, index % width
        before = jnp.take_along_axis(state.nodes, parent, axis=1)
        done = jnp.take_along_axis(state.complete, parent, axis=1)
        nodes = jnp.where(done | ~jnp.isfinite(best), before, tables.child_offsets[before] + slot + 1)
        rows = (jnp.arange(users)[:, None] * beams + parent).reshape(-1)
        complete = done | (_left(tables, left_out, nodes) == 1) | ~jnp.isfinite(best)
        return Hypotheses(state.step + 1, nodes, best, complete, jax.tree.map(lambda x: x[rows], suffix))

    def _child_scores(
        self, params, tables: _Tables, left_out: jax.Array, hidden: jax.Array, nodes: jax.Array, width: int
    ) -> jax.Array:
        """Log-probabilities [R, W] of each node's children after hidden [R, D]; −inf beyond the last child."""
        edges = tables.child_offsets[nodes][:, None] + jnp.arange(width)
        real = edges < tables.child_offsets[nodes + 1][:, None]
        children = jnp.where(real, edges + 1, 0)
        if self._most_left_out:
            users = left_out.shape[0]
            left = _left(tables, left_out, children.reshape(users, -1)).reshape(children.shape)
            real &= left > 0
        tokens = tables.tokens[children]

        def one(hidden: jax.Array, tokens: jax.Array, real: jax.Array) -> jax.Array:
            if self._renormalise and width * _NARROW <= self._model.vocab_size:
                child = call(self._model, params, hidden, tokens, method="logits_of")
            else:
                logits = call(self._model, params, hidden, method="logits")
                child = logits[tokens]
            child = jnp.where(real, child, -jnp.inf)
            return child - jax.nn.logsumexp(jnp.where(real.any(), child, 0.0) if self._renormalise else logits)

        return by_rows(one, hidden, tokens, real)


def _left(tables: _Tables, left_out: jax.Array, nodes: jax.Array) -> jax.Array:
    """[B, X] leaves below each of these nodes that the user does not leave out; `left_out` is [B, E], ascending."""
    first, last = tables.first[nodes], tables.last[nodes]
    if not left_out.shape[1]:
        return last - first
    count = jax.vmap(lambda own, bound: jnp.searchsorted(own, bound).astype(jnp.int32))
    return last - first - (count(left_out, last) - count(left_out, first))
