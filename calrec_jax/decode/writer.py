"""Decodes users batch by batch and writes shard by shard, saying how far it is.

Notable: users go in the order of their prompts' length, longest first, so that batches hold little padding; every batch
is filled up to `batch_users`, so a user's completions are the same bit for bit whoever else is in it.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from calrec_jax import artifacts
from calrec_jax.data.dataset import Dataset
from calrec_jax.decode import prompts as prompting
from calrec_jax.decode import shards
from calrec_jax.decode.sampling import Compiled, Completed
from calrec_jax.decode.trie import Trie
from calrec_jax.tokenizer import Tokenizer


class Decoder(Protocol):
    """Completes a batch of prompts; see `sampling.Sampler`."""

    compiled: Compiled

    def __call__(self, tokens: np.ndarray, lengths: np.ndarray, keys: np.ndarray) -> Completed:
        """Completes [B, L] prompts of [B] lengths; [B, 2] keys seed the users' random streams."""


@dataclasses.dataclass
class Writer:
    """Decodes users shard by shard.

    Attributes:
      out: folder of the shards.
      request: hash that each shard carries.
      dataset, tokenizer, prompts: of the users.
      decoder: completes a batch.
      trie: of the catalogue where decoding is constrained.
      seed: of all random streams.
      batch_users: users a batch.
      with_embeddings: whether to write v_U.
    """

    out: Path
    request: str
    dataset: Dataset
    tokenizer: Tokenizer
    prompts: prompting.Prompts | prompting.GivenPrompts
    decoder: Decoder
    trie: Trie | None
    seed: int
    batch_users: int
    with_embeddings: bool

    def write(self, users: np.ndarray, shard_users: int) -> list[Path]:
        """Decodes what is not there yet; returns the paths of all shards."""
        buckets = prompting.bucket_lengths(self.prompts.lengths[users])
        users = users[np.argsort(-buckets, kind="stable")]
        paths = []
        progress = _Progress(len(users), self.prompts.lengths[users])
        if self.prompts.dropped_items:
            print(f"decode: {self.prompts.dropped_items:,} oldest history items lie beyond the prompt's budget")
        for index, begin in enumerate(range(0, len(users), shard_users)):
            shard = users[begin : begin + shard_users]
            path = shards.shard_path(self.out, index)
            paths.append(path)
            if shards.is_written(path, self.request, len(shard)):
                progress.skip(len(shard))
                continue
            tables = []
            own = prompting.bucket_lengths(self.prompts.lengths[shard])
            for batch in prompting.batches(shard, own, self.batch_users):
                completed = self.complete(batch)
                tables.append(self._table(batch, completed))
                progress.step(len(batch), int(completed.num_tokens[: len(batch)].sum()))
            shards.write_shard(path, pa.concat_tables(tables).combine_chunks(), self.request)
        timing = progress.finish(self.decoder.compiled.seconds)
        if timing:
            artifacts.write_json(self.out / "timing.json", timing)
        return paths

    def complete(self, batch: np.ndarray) -> Completed:
        """Decodes users of one bucket; the batch is filled up, so that its size changes no program and no rounding."""
        length = int(prompting.bucket_lengths(self.prompts.lengths[batch]).max())
        tokens = np.zeros((self.batch_users, length), np.int32)
        lengths = np.zeros(self.batch_users, np.int64)
        keys = np.zeros((self.batch_users, 2), np.uint32)
        tokens[: len(batch)] = self.prompts.tokens(batch, length)
        lengths[: len(batch)] = self.prompts.lengths[batch]
        keys[: len(batch)] = prompting.user_keys(self.prompts.user_ids[batch], self.seed)
        return self.decoder(tokens, lengths, keys)

    def _table(self, batch: np.ndarray, completed: Completed) -> pa.Table:
        """Rows of the contract, from what the device gave."""
        completed = completed.first(len(batch))
        embeddings = completed.user_embedding if self.with_embeddings else None
        user_ids = self.dataset.user_ids[batch]
        if completed.items is not None:
            assert self.trie is not None
            counts, columns = self._item_columns(self.trie, completed, completed.items)
        else:
            counts = np.full(len(batch), completed.num_tokens.shape[1])
            columns = {
                "texts": pa.array(self._texts(completed), pa.string()),
                "log_probs": pa.array(completed.log_probs.reshape(-1), pa.float32()),
                "num_tokens": pa.array(completed.num_tokens.reshape(-1), pa.int32()),
                "finished": pa.array(completed.finished.reshape(-1), pa.bool_()),
            }
        return shards.completions_table(user_ids, counts, columns, embeddings)

    def _texts(self, completed: Completed) -> np.ndarray:
        """[B·N] object: each distinct row of tokens is turned into text once."""
        tokens = np.ascontiguousarray(completed.tokens.reshape(-1, completed.tokens.shape[-1]))
        lengths = (completed.num_tokens - completed.finished).reshape(-1)
        rows = tokens.view(np.dtype((np.void, tokens.itemsize * tokens.shape[1]))).reshape(-1)
        _, first, which = np.unique(rows, return_index=True, return_inverse=True)
        texts = self.tokenizer.decode_many([tokens[i, : lengths[i]].tolist() for i in first])
        return np.array(texts, dtype=object)[which.reshape(-1)]

    def _item_columns(
        self, trie: Trie, completed: Completed, leaf_of: np.ndarray
    ) -> tuple[np.ndarray, dict[str, pa.Array]]:
        """A text of several items gives them all, in item order, with the text's score."""
        found = leaf_of >= 0
        leaves = leaf_of[found]
        sizes = np.diff(trie.leaf_offsets)[leaves]
        counts = np.zeros(len(found), np.int64)
        np.add.at(counts, np.nonzero(found)[0], sizes)
        begin = np.repeat(trie.leaf_offsets[leaves] - (np.cumsum(sizes) - sizes), sizes)
        items = trie.leaf_items[begin + np.arange(int(sizes.sum()))]
        texts = pa.array(self.dataset.texts, pa.string())
        return counts, {
            "texts": texts.take(pa.array(items)),
            "log_probs": pa.array(np.repeat(completed.log_probs[found], sizes), pa.float32()),
            "num_tokens": pa.array(np.repeat(completed.num_tokens[found], sizes), pa.int32()),
            "finished": pa.array(np.ones(len(items), bool)),
            "item_ids": pa.array(self.dataset.item_ids[items], pa.string()),
        }


class _Progress:
    """A line now and then: users a second and the time left, weighted by the prompts' lengths."""

    def __init__(self, users: int, lengths: np.ndarray, every_seconds: float = 5.0):
        # A completion costs about as much as a hundred prompt tokens and more, so short prompts are not free.
        self._costs = np.concatenate([[0.0], np.cumsum(lengths + 200.0)])
        self._users, self._every = users, every_seconds
        self._at = self._skipped = self._decoded = self._tokens = 0
        self._cost_done = 0.0
        self._began = self._said = time.monotonic()

    def skip(self, users: int) -> None:
        """Counts users of a shard that was there already."""
        self._at += users
        self._skipped += users

    def step(self, users: int, tokens: int) -> None:
        """Counts a decoded batch."""
        self._cost_done += self._costs[self._at + users] - self._costs[self._at]
        self._at += users
        self._decoded += users
        self._tokens += tokens
        now = time.monotonic()
        if now - self._said >= self._every or self._at == self._users:
            self._said = now
            seconds = now - self._began
            left = seconds / self._cost_done * (self._costs[-1] - self._costs[self._at])
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
