"""The item tower: v_T of every catalogue item, from its text alone."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from calrec_jax.data.examples import TokenCatalogue
from calrec_jax.decode.sampling import Compiled, call
from calrec_jax.models.towers import mean_pool, unit
from calrec_jax.models.transformer import Transformer

_BUCKET = 32
_BATCH_TOKENS = 8192


def item_embeddings(model: Transformer, params: Any, catalogue: TokenCatalogue, compiled: Compiled) -> np.ndarray:
    """v_T [I, D] float32, L2-normalised: the mean over an item's input tokens in its item-alone segment (start, item).

    Args:
      model: the decoder.
      params: its parameters.
      catalogue: whose items; equal texts are computed once.
      compiled: where programs are kept.
    """
    _, rows, text_of = np.unique(catalogue.text_ids, return_index=True, return_inverse=True)
    lengths = catalogue.lengths[rows] + 1  # the start token
    buckets = (lengths + _BUCKET - 1) // _BUCKET * _BUCKET
    vectors = np.empty((len(rows), model.config.embed_dim), np.float32)
    for bucket in np.unique(buckets):
        members = np.flatnonzero(buckets == bucket)
        size = max(1, _BATCH_TOKENS // int(bucket))
        for begin in range(0, len(members), size):
            batch = members[begin : begin + size]
            tokens = np.full((size, int(bucket)), catalogue.start_id, np.int32)
            for row, index in enumerate(rows[batch]):
                tokens[row, 1 : lengths[batch[row]]] = catalogue.item(index)
            own = np.zeros(size, np.int32)
            own[: len(batch)] = lengths[batch]
            vectors[batch] = np.asarray(compiled(_embed, params, tokens, own, model=model))[: len(batch)]
    return vectors[text_of.reshape(-1)]


def _embed(params, tokens: jax.Array, lengths: jax.Array, *, model: Transformer) -> jax.Array:
    place = jax.numpy.broadcast_to(jax.numpy.arange(tokens.shape[1]), tokens.shape)
    inside = place < lengths[:, None]
    hidden = call(model, params, tokens, place, inside.astype(np.int32), method="activations")
    return unit(mean_pool(hidden, (inside & (place > 0)).astype(np.int32), 1)[:, 0])
