"""Decodes users batch by batch and writes shard by shard, saying how far it is.

Notable: users go in the order of their prompts' length, longest first, so that prompts hold little padding. A shard is
decoded by itself, whoever else is decoded and whichever process does it, so made again it is the same byte for byte.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from calrec_jax import artifacts
from calrec_jax.data.dataset import Dataset
from calrec_jax.decode import prompts as prompting
from calrec_jax.decode import shards
from calrec_jax.decode.prefix import Batch, Completed, Decoder, Said, nothing_said
from calrec_jax.tokenizer import Tokenizer


@dataclasses.dataclass
class Writer:
    """Decodes users shard by shard.

    Attributes:
      out: folder of the shards.
      request: hash that each shard carries.
      dataset, tokenizer, prompts: of the users.
      decoder: completes prompts.
      seed: of all random streams.
      with_embeddings: whether to write v_U.
      process: (index, count); of `count` processes over the folder, this one decodes shards index, index + count, ….
    """

    out: Path
    request: str
    dataset: Dataset
    tokenizer: Tokenizer
    prompts: prompting.Prompts | prompting.GivenPrompts
    decoder: Decoder
    seed: int
    with_embeddings: bool
    process: tuple[int, int] = (0, 1)

    def write(self, users: np.ndarray, shard_users: int) -> list[Path]:
        """Decodes those of this process's shards that are not there yet; returns the paths of all processes' shards."""
        buckets = prompting.bucket_lengths(self.prompts.lengths[users])
        users = users[np.argsort(-buckets, kind="stable")]
        parts = [users[begin : begin + shard_users] for begin in range(0, len(users), shard_users)]
        paths = [shards.shard_path(self.out, index) for index in range(len(parts))]
        index, count = self.process
        own = list(zip(paths, parts, strict=True))[index::count]
        progress = _Progress([self.prompts.lengths[part] for _, part in own])
        if self.prompts.dropped_items:
            print(f"decode: {self.prompts.dropped_items:,} oldest history items lie beyond the prompt's budget")
        for path, part in own:
            if shards.is_written(path, self.request, len(part)):
                progress.skip(len(part))
                continue
            tables = []
            for group in prompting.groups(part, prompting.bucket_lengths(self.prompts.lengths[part])):
                tables.append(self._table(group, self.complete(group, progress.step)))
            shards.write_shard(path, pa.concat_tables(tables).combine_chunks(), self.request)
        timing = progress.finish(self.decoder.compiled.seconds)
        if timing:
            artifacts.write_json(self.out / ("timing.json" if not index else f"timing-{index:05d}.json"), timing)
        return paths

    def complete(self, users: np.ndarray, said: Said = nothing_said) -> Completed:
        """Decodes users of one bucket."""
        lengths = self.prompts.lengths[users]
        tokens = self.prompts.tokens(users, int(prompting.bucket_lengths(lengths).max()))
        keys = prompting.user_keys(self.prompts.user_ids[users], self.seed)
        return self.decoder(Batch(tokens, lengths.astype(np.int32), keys, users), said)

    def _table(self, users: np.ndarray, completed: Completed) -> pa.Table:
        """Rows of the contract, from what the device gave."""
        embeddings = completed.user_embedding if self.with_embeddings else None
        if not completed.num_tokens.shape[1] and completed.items is not None:
            return shards.completions_table(self.dataset.user_ids[users], None, {}, embeddings)
        real = np.isfinite(completed.log_probs)  # of a beam that found fewer, and of users with fewer candidates
        columns = {
            "log_probs": pa.array(completed.log_probs[real], pa.float32()),
            "num_tokens": pa.array(completed.num_tokens[real], pa.int32()),
            "finished": pa.array(completed.finished[real], pa.bool_()),
        }
        if completed.items is None:
            columns["texts"] = pa.array(self._texts(completed)[real.reshape(-1)], pa.string())
        else:
            items = completed.items[real]
            columns["texts"] = self._item_texts.take(pa.array(items))
            columns["item_ids"] = pa.array(self.dataset.item_ids[items], pa.string())
        return shards.completions_table(self.dataset.user_ids[users], real.sum(1), columns, embeddings)

    @functools.cached_property
    def _item_texts(self) -> pa.Array:
        return pa.array(self.dataset.texts, pa.string())

    def _texts(self, completed: Completed) -> np.ndarray:
        """[U·N] object: each distinct row of tokens is turned into text once."""
        tokens = np.ascontiguousarray(completed.tokens.reshape(-1, completed.tokens.shape[-1]))
        lengths = (completed.num_tokens - completed.finished).reshape(-1)
        rows = tokens.view(np.dtype((np.void, tokens.itemsize * tokens.shape[1]))).reshape(-1)
        _, first, which = np.unique(rows, return_index=True, return_inverse=True)
        texts = self.tokenizer.decode_many([tokens[i, : lengths[i]].tolist() for i in first])
        return np.array(texts, dtype=object)[which.reshape(-1)]


class _Progress:
    """A line now and then: users a second and the time left, weighted by the prompts' lengths."""

    def __init__(self, lengths: Sequence[np.ndarray], every_seconds: float = 5.0):
        # A completion costs about as much as a hundred prompt tokens and more, so short prompts are not free.
        self._costs = np.concatenate([[0.0], *(own + 200.0 for own in lengths)]).cumsum()
        self._users, self._every = len(self._costs) - 1, every_seconds
        self._at = self._skipped = self._decoded = self._tokens = 0
        self._cost_done = 0.0
        self._began = self._said = time.monotonic()

    def skip(self, users: int) -> None:
        """Counts users of a shard that was there already."""
        self._at += users
        self._skipped += users

    def step(self, users: int, tokens: int) -> None:
        """Counts decoded users, and tokens since the last call."""
        self._cost_done += self._costs[self._at + users] - self._costs[self._at]
        self._at += users
        self._decoded += users
        self._tokens += tokens
        now = time.monotonic()
        if self._cost_done and (now - self._said >= self._every or self._at == self._users):
            self._said = now
            seconds = now - self._began
            left = seconds / max(self._cost_done, 1.0) * (self._costs[-1] - self._costs[self._at])
            print(
                f"decode: {self._at:,}/{self._users:,} users, {self._decoded / seconds:.1f} users/s, "
                f"{self._tokens / seconds:,.0f} tokens/s, {int(left // 60)}:{int(left % 60):02d} left",
                file=sys.stderr,
                flush=True,
            )

    def finish(self, compile_seconds: float) -> dict[str, float] | None:
        """What this run took; None if there was nothing to do."""
        if self._skipped:
            print(f"decode: {self._skipped:,} users were there already")
        if not self._decoded:
            return None
        seconds = time.monotonic() - self._began
        print(
            f"decode: {self._decoded:,} users in {seconds:.0f} s, {compile_seconds:.0f} s of it compiling; "
            f"{self._tokens / seconds:,.0f} tokens/s"
        )
        return {
            "users": self._decoded,
            "seconds": seconds,
            "compile_seconds": compile_seconds,
            "tokens": self._tokens,
            "tokens_per_second": self._tokens / seconds,
        }
