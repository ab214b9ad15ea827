"""The functions that an export holds: pure, of parameters and a dict of arrays, traced once for any batch size.

Notable: these are the rooms' own computations (`decode/`, `models/`) without the host's part in them, since an export
has none: no rows that are freed and filled again, no buckets. The number of users, of texts to score and of items is a
symbol, and nothing is branched on it; the lengths of prompts, texts and completions are fixed when it is exported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from calrec_jax.decode.draw import draw
from calrec_jax.decode.prefix import call, prefill
from calrec_jax.models.towers import mean_pool, unit
from calrec_jax.models.transformer import Transformer, empty_suffix

Arrays = dict[str, jax.Array]
Serving = Callable[[Any, Arrays], Arrays]
_Draw = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]  # logits [V], uniforms [N] → tokens, scores [N]


@dataclasses.dataclass(frozen=True)
class Lengths:
    """What is fixed in an export.

    Attributes:
      prompt: L, tokens of a prompt, the start token included.
      text: T, tokens of a text to score or to embed, EOS not counted.
      completion: tokens of a completion at most, EOS included.
    """

    prompt: int
    text: int
    completion: int


@dataclasses.dataclass(frozen=True)
class Function:
    """One function of an export.

    Attributes:
      call: `call(params, arrays) -> arrays`.
      inputs: name to (dtype, shape); an axis is a number or a symbol ("B", "N").
      outputs: the same of what it gives.
      purpose: one sentence for its users.
    """

    call: Serving
    inputs: Mapping[str, tuple[str, tuple[int | str, ...]]]
    outputs: Mapping[str, tuple[str, tuple[int | str, ...]]]
    purpose: str


def make_functions(
    model: Transformer,
    lengths: Lengths,
    *,
    start_id: int,
    eos_id: int,
    num_samples: int,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> dict[str, Function]:
    """The functions "user", "item", "score" and "sample" of a model.

    Args:
      model: the decoder.
      lengths: of prompts and texts.
      start_id: the token before a prompt and before a text that stands alone.
      eos_id: the token that ends a text.
      num_samples: N of "sample".
      temperature: of "sample".
      top_k: tokens that it can draw; see `draw.draw`.
      top_p: their probability; see there.
    """
    width, samples = model.config.embed_dim, num_samples
    prompts = {"tokens": ("int32", ("B", lengths.prompt)), "lengths": ("int32", ("B",))}

    def user(params: Any, x: Arrays) -> Arrays:
        return {"user_embedding": prefill(model, params, x["tokens"], x["lengths"], _no_keys(x))[2]}

    def item(params: Any, x: Arrays) -> Arrays:
        return {"item_embedding": _embed_item(model, params, x["tokens"], x["lengths"], start_id)}

    def score(params: Any, x: Arrays) -> Arrays:
        return _score(model, params, x, eos_id)

    def sample(params: Any, x: Arrays) -> Arrays:
        def one(logits: jax.Array, uniforms: jax.Array) -> tuple[jax.Array, jax.Array]:
            return draw(logits, uniforms, temperature, top_k, top_p)

        return _sample(model, params, x, one, samples, lengths.completion, eos_id)

    return {
        "user": Function(
            user,
            prompts,
            {"user_embedding": ("float32", ("B", width))},
            "The user tower: the unit vector of a history, whose dot product with an item's is their cosine.",
        ),
        "item": Function(
            item,
            {"tokens": ("int32", ("B", lengths.text)), "lengths": ("int32", ("B",))},
            {"item_embedding": ("float32", ("B", width))},
            "The item tower: the unit vector of an item's text.",
        ),
        "score": Function(
            score,
            {
                **prompts,
                "candidates": ("int32", ("B", "N", lengths.text)),
                "candidate_lengths": ("int32", ("B", "N")),
            },
            {"log_probs": ("float32", ("B", "N"))},
            "Log-probability of each candidate's text and EOS as what the user buys next.",
        ),
        "sample": Function(
            sample,
            {**prompts, "keys": ("uint32", ("B", 2))},
            {
                "completions": ("int32", ("B", samples, lengths.completion)),
                "completion_lengths": ("int32", ("B", samples)),
                "log_probs": ("float32", ("B", samples)),
                "finished": ("bool", ("B", samples)),
            },
            f"{samples} texts of the next item a user, drawn at temperature {temperature:g}; log-probabilities are at "
            "temperature 1. The same keys give the same texts.",
        ),
    }


def _no_keys(x: Arrays) -> jax.Array:
    return jnp.zeros((x["tokens"].shape[0], 2), jnp.uint32)


def _embed_item(model: Transformer, params: Any, tokens: jax.Array, lengths: jax.Array, start_id: int) -> jax.Array:
    """v_T [B, D] of texts [B, T]: the start token is put before them, and is in no mean."""
    tokens = jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=start_id)
    place = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    inside = place <= lengths[:, None]
    hidden = call(model, params, tokens, place, inside.astype(jnp.int32), method="activations")
    return unit(mean_pool(hidden, (inside & (place > 0)).astype(jnp.int32), 1)[:, 0])


def _score(model: Transformer, params: Any, x: Arrays, eos_id: int) -> Arrays:
    texts, counts = x["candidates"], x["candidate_lengths"]
    users, candidates, places = texts.shape
    hidden, shared, _ = prefill(model, params, x["tokens"], x["lengths"], _no_keys(x))
    at_first = jax.nn.log_softmax(call(model, params, hidden[:, 0], method="logits"))
    place = jnp.arange(places)
    ends = jnp.where(counts[:, :, None] == place + 1, eos_id, jnp.pad(texts[:, :, 1:], ((0, 0), (0, 0), (0, 1))))
    first = jnp.where(counts > 0, texts[:, :, 0], eos_id)  # an empty text is EOS alone
    positions = jnp.broadcast_to((shared.lengths[:, None] + place)[:, None], texts.shape)
    rows = users * candidates
    after, _ = call(
        model, params, texts.reshape(rows, places), positions.reshape(rows, places), None, shared.prefix, shared.mask,
        empty_suffix(model.config, rows, 0), jnp.tri(places, dtype=bool)[None], method="decode",
    )  # fmt: skip

    def at(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Log-probabilities [R] of one place's targets: logits of all places at once would be T times as many."""
        logits = call(model, params, inputs[0], method="logits")
        return jnp.take_along_axis(logits, inputs[1][:, None], 1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)

    scores = jax.lax.map(at, (after.swapaxes(0, 1), ends.reshape(rows, places).T))
    scores = jnp.where(place[:, None] < counts.reshape(-1), scores, 0).sum(0).reshape(users, candidates)
    return {"log_probs": jnp.take_along_axis(at_first, first, axis=1) + scores}


def _sample(model: Transformer, params: Any, x: Arrays, one: _Draw, samples: int, limit: int, eos_id: int) -> Arrays:
    keys = x["keys"]
    users = keys.shape[0]
    rows = users * samples
    hidden, shared, _ = prefill(model, params, x["tokens"], x["lengths"], keys)

    def uniforms(step: jax.Array) -> jax.Array:
        """[B, N], as `sampling.Sampler` draws them."""

        def of_user(key: jax.Array) -> jax.Array:
            stream = jax.random.wrap_key_data(key, impl="threefry2x32")
            return jax.random.uniform(jax.random.fold_in(stream, step), (samples,))

        return jax.vmap(of_user)(keys)

    drawn, score = jax.vmap(one)(call(model, params, hidden[:, 0], method="logits"), uniforms(jnp.int32(0)))
    drawn, score = drawn.reshape(rows), score.reshape(rows)
    tokens = jnp.zeros((rows, limit), jnp.int32).at[:, 0].set(drawn)
    room = -(-limit // 16) * 16  # other sizes than multiples of 16 cost a CPU twice as much a step
    place = jnp.arange(room)

    def unfinished(state):
        return (state[0] < limit) & state[3].any()

    def step(state):
        i, suffix, last, alive, tokens, scores, counts = state
        positions = jnp.broadcast_to((shared.lengths + i - 1)[:, None], (users, samples)).reshape(rows, 1)
        hidden, suffix = call(
            model, params, last[:, None], positions, i - 1, shared.prefix, shared.mask, suffix,
            (place < i)[None, None], method="decode",
        )  # fmt: skip
        logits = call(model, params, hidden[:, 0], method="logits")
        drawn, score = jax.vmap(lambda row, number: one(row, number[None]))(logits, uniforms(i).reshape(rows))
        drawn = jnp.where(alive, drawn[:, 0], 0)
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, drawn, i, axis=1)
        scores += jnp.where(alive, score[:, 0], 0)
        counts += alive
        return i + 1, suffix, drawn, alive & (drawn != eos_id), tokens, scores, counts

    state = (
        jnp.int32(1), empty_suffix(model.config, rows, room), drawn, drawn != eos_id, tokens, score,
        jnp.ones_like(drawn),
    )  # fmt: skip
    _, _, _, _, tokens, scores, counts = jax.lax.while_loop(unfinished, step, state)
    lengths = counts.reshape(users, samples)
    ended = jnp.take_along_axis(tokens, counts[:, None] - 1, axis=1)[:, 0] == eos_id
    return {
        "completions": tokens.reshape(users, samples, limit),
        "completion_lengths": lengths,
        "log_probs": scores.reshape(users, samples),
        "finished": ended.reshape(users, samples),
    }
