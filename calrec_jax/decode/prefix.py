"""What all ways of decoding share: a batch of prompts, read once, and the completions that come of it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from calrec_jax.models.towers import mean_pool, unit
from calrec_jax.models.transformer import KeyValues, Transformer

_ROWS = 256  # rows whose logits are made and reduced at a time: they stay in the processor's cache


class Batch(NamedTuple):
    """Prompts of U users on the host, filled up to one length.

    Attributes:
      tokens: [U, L] int32.
      lengths: [U] int32 tokens of each; 0 marks a row that only fills the batch.
      keys: [U, 2] uint32 of the users' random streams, see `prompts.user_keys`.
      users: [U] int64, the users' rows in the dataset; −1 where the batch is only filled.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    keys: np.ndarray
    users: np.ndarray

    def part(self, begin: int, size: int) -> Batch:
        """`size` users from `begin` on, filled up where there are not so many."""
        missing = max(0, begin + size - len(self.users))

        def filled(x: np.ndarray, value: int = 0) -> np.ndarray:
            own = x[begin : begin + size]
            return np.pad(own, [(0, missing)] + [(0, 0)] * (own.ndim - 1), constant_values=value)

        return Batch(filled(self.tokens), filled(self.lengths), filled(self.keys), filled(self.users, -1))


class Completed(NamedTuple):
    """Completions of U users on the host; in tower mode N is 0.

    Attributes:
      tokens: [U, N, T] int32, EOS included, 0 after it; T is 0 where `items` says what was completed.
      num_tokens: [U, N] int32, EOS counted.
      log_probs: [U, N] float32, sum over the tokens at temperature 1.
      finished: [U, N] bool, EOS was reached.
      user_embedding: [U, D] float32, L2-normalised.
      items: [U, N] int32 item of the catalogue where decoding is constrained or candidates are scored (−1 none), else
        None.
    """

    tokens: np.ndarray
    num_tokens: np.ndarray
    log_probs: np.ndarray
    finished: np.ndarray
    user_embedding: np.ndarray
    items: np.ndarray | None = None


Said = Callable[[int, int], None]  # is told how many users were completed since, and with how many tokens


def nothing_said(users: int, tokens: int) -> None:
    """For callers that want no progress."""


class Decoder(Protocol):
    """Completes prompts.

    Attributes:
      compiled: its programs.
    """

    compiled: Compiled

    def __call__(self, batch: Batch, said: Said = nothing_said) -> Completed:
        """Completes prompts of any number of users."""


def in_batches(complete: Callable[[Batch], Completed], batch: Batch, size: int, said: Said) -> Completed:
    """Completes `size` users at a time; the last batch is filled up, so that its size changes no program."""
    parts = []
    for begin in range(0, len(batch.users), size):
        real = min(size, len(batch.users) - begin)
        done = complete(batch.part(begin, size))
        parts.append(Completed(*(None if x is None else x[:real] for x in done)))  # type: ignore[arg-type]
        said(real, int(parts[-1].num_tokens.sum()))
    whole = (None if xs[0] is None else np.concatenate(xs) for xs in zip(*parts, strict=True))
    return Completed(*whole)  # type: ignore[arg-type]


class Compiled:
    """Functions compiled ahead of their first call, once for each set of shapes, and the seconds it takes."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._programs: dict[Any, Callable[..., Any]] = {}

    def __call__(self, function: Callable[..., Any], *args: Any, donate: Sequence[int] = (), **static: Any) -> Any:
        """Calls `jax.jit(function)`.

        Args:
          function: what to compile.
          *args: arrays or trees of them.
          donate: which of `args` are given up, so that results are written in their place.
          **static: constants of the program.
        """
        leaves, tree = jax.tree.flatten(args)
        shapes = tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
        key = (function, tuple(sorted(static.items())), tree, shapes)
        if key not in self._programs:
            began = time.perf_counter()
            jitted = jax.jit(functools.partial(function, **static), donate_argnums=donate)
            self._programs[key] = jitted.lower(*args).compile()
            self.seconds += time.perf_counter() - began
        return self._programs[key](*args)


def call(model: Transformer, params: Any, *args: Any, method: str) -> Any:
    """A method of the model under these parameters."""
    return model.apply({"params": params}, *args, method=method)


def by_rows(function: Callable[..., Any], *rows: Any) -> Any:
    """`jax.vmap(function)(*rows)` in blocks of rows, for functions that make a row's logits and keep little of them."""
    count = len(jax.tree.leaves(rows)[0])
    blocks = -(-count // _ROWS)
    while count % blocks:
        blocks += 1
    size = count // blocks if count // blocks >= _ROWS // 4 else min(_ROWS, count)
    return jax.lax.map(lambda row: function(*row), rows, batch_size=size)


class Prefilled(NamedTuple):
    """What a user's completions share.

    Attributes:
      prefix: keys and values of B users.
      mask: [B, L] bool, real places.
      lengths: [B] int32 tokens read.
      keys: [B, 2] uint32 of the random streams.
    """

    prefix: KeyValues
    mask: jax.Array
    lengths: jax.Array
    keys: jax.Array


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
      Hidden states [B, P + 1, D] from each prompt's last token on, what the completions share, and v_U [B, D]: the
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
    """Keys and values [R, G, T, C] with room for `places` tokens; other T than multiples of 16 are slow on a CPU."""
    places = -(-places // 16) * 16
    return jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * 2 + [(0, places - x.shape[2]), (0, 0)]), suffix)
