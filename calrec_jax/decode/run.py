"""The verb `decode`: a checkpoint and a dataset's users in, shards of completions out.

Notable: users are decoded in the order of their prompts' length, longest first, so that batches hold little padding;
a shard is written when it is whole and skipped by the next run.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import gin
import numpy as np
import pyarrow as pa

from calrec_jax import artifacts
from calrec_jax.data.dataset import SPLITS, Dataset
from calrec_jax.data.examples import TokenCatalogue, tokenise_catalogue
from calrec_jax.decode import prompts as prompting
from calrec_jax.decode import shards
from calrec_jax.decode.beam import BeamSearch
from calrec_jax.decode.embeddings import item_embeddings
from calrec_jax.decode.sampling import Compiled, Completed, Sampler
from calrec_jax.decode.trie import Trie, build_trie
from calrec_jax.errors import CalrecError
from calrec_jax.models.transformer import Transformer
from calrec_jax.tokenizer import Tokenizer
from calrec_jax.train.checkpoints import load_checkpoint

MODES = ("sample", "constrained_beam")


class Decoder(Protocol):
    """Completes a batch of prompts; see `sampling.Sampler`."""

    compiled: Compiled

    def __call__(self, tokens: np.ndarray, lengths: np.ndarray, keys: np.ndarray) -> Completed:
        """Completes [B, L] prompts of [B] lengths; [B, 2] keys seed the users' random streams."""


@gin.configurable(denylist=["out", "dataset", "tokenizer", "checkpoint", "split", "prompts"])
def decode(
    out: Path,
    dataset: Dataset,
    tokenizer: Tokenizer,
    checkpoint: Path,
    *,
    split: str = "test",
    mode: str = "sample",
    num_samples: int = 32,
    temperature: float = 0.5,
    num_beams: int = 32,
    renormalise: bool = True,
    max_new_tokens: int | None = None,
    batch_users: int = 32,
    shard_users: int = 1024,
    seed: int = 0,
    max_users: int | None = None,
    with_embeddings: bool = True,
    prompts: prompting.GivenPrompts | None = None,
) -> Path:
    """Writes completions for the users of a split (docs/architecture.md, "Completions").

    Args:
      out: folder of the completions.
      dataset: whose users and catalogue; it need not be one the checkpoint was trained on.
      tokenizer: the checkpoint's.
      checkpoint: a finished training stage.
      split: "validation" or "test".
      mode: "sample" (the paper) or "constrained_beam" (each completion is an item of the catalogue).
      num_samples: N, samples a user; mode "sample".
      temperature: of sampling; log-probabilities are always at temperature 1; mode "sample".
      num_beams: hypotheses kept; mode "constrained_beam".
      renormalise: see `beam.BeamSearch`; mode "constrained_beam".
      max_new_tokens: T, EOS included; None is the checkpoint's max_target_tokens; mode "sample".
      batch_users: users a batch.
      shard_users: users a shard.
      seed: of all random streams; a user's depends on it and on the user's id alone.
      max_users: the first so many users of a seeded permutation, for quick comparisons; None is all.
      with_embeddings: whether to write v_U of each user and v_T of each item.
      prompts: in place of those made from the dataset; users who have none are left out.

    Returns:
      `out`.

    Raises:
      CalrecError: a setting is not valid, inputs do not belong together, or `out` holds other completions.
    """
    out = Path(out)
    if split not in SPLITS:
        raise CalrecError(f"split={split!r}: must be one of {list(SPLITS)}")
    if mode not in MODES:
        raise CalrecError(f"decode.mode={mode!r}: must be one of {list(MODES)}")
    config, params, facts = load_checkpoint(checkpoint)
    _check_inputs(checkpoint, facts, dataset, tokenizer)
    limit = facts["max_target_tokens"] if max_new_tokens is None else max_new_tokens
    settings: dict[str, Any] = {
        "split": split,
        "mode": mode,
        "batch_users": batch_users,
        "shard_users": shard_users,
        "seed": seed,
        "max_users": max_users,
        "with_embeddings": with_embeddings,
    }
    if mode == "sample":
        settings |= {"num_samples": num_samples, "temperature": temperature, "max_new_tokens": limit}
    else:
        settings |= {"num_beams": num_beams, "renormalise": renormalise}
    _check_positive(settings)
    if prompts is not None:
        settings["prompts"] = prompts.fingerprint
    made_from = {"dataset": dataset.hash, "tokenizer": tokenizer.fingerprint, "checkpoint": facts["hash"]}
    if artifacts.is_done(out, kind="completions", made_from=made_from, settings=settings):
        print(f"decode: {out} is done already, skipped")
        return out
    request = shards.claim(out, made_from, settings)
    catalogue = tokenise_catalogue([dataset], tokenizer, max_target_tokens=facts["max_target_tokens"])
    model = Transformer(config, facts["vocab_size"])
    decoder: Decoder
    trie = None
    if mode == "sample":
        decoder = Sampler(
            model,
            params,
            eos_id=tokenizer.eos_id,
            num_samples=num_samples,
            temperature=temperature,
            max_new_tokens=limit,
        )
    else:
        trie = build_trie(catalogue.tokens, catalogue.offsets, tokenizer.eos_id)
        decoder = BeamSearch(model, params, trie, num_beams=num_beams, renormalise=renormalise)
    budget = history_budget(facts, catalogue)
    writer = _Writer(
        out=out,
        request=request,
        dataset=dataset,
        tokenizer=tokenizer,
        prompts=prompts
        if prompts is not None
        else prompting.build_prompts(dataset, catalogue, split=split, max_history_tokens=budget),
        decoder=decoder,
        trie=trie,
        seed=seed,
        batch_users=batch_users,
        with_embeddings=with_embeddings,
    )
    users = _chosen(dataset, max_users, seed)
    written = writer.write(users[writer.prompts.lengths[users] > 0], shard_users)
    if with_embeddings:
        vectors = item_embeddings(model, params, catalogue, decoder.compiled)
        shards.write_item_embeddings(out, dataset.item_ids.tolist(), vectors, request)
        written.append(out / shards.ITEM_EMBEDDINGS_FILE)
    artifacts.write_manifest(
        out,
        kind="completions",
        made_from=made_from,
        settings=settings,
        files=artifacts.hash_files(written),
        users=writer.users,
        dropped_history_items=writer.prompts.dropped_items,
        history_tokens=budget,
    )
    return out


def history_budget(facts: dict[str, Any], catalogue: TokenCatalogue) -> int:
    """Most tokens of a prompt: the training budget, within positions that a training row can reach.

    A training row also holds the target; the longest item stands for it, since a prompt must not depend on its target.
    """
    budget = int(facts["max_history_tokens"])
    row_tokens = facts.get("row_tokens")
    return budget if row_tokens is None else min(budget, int(row_tokens) - int(catalogue.lengths.max()) - 1)


def _check_inputs(checkpoint: Path, facts: dict[str, Any], dataset: Dataset, tokenizer: Tokenizer) -> None:
    """Tokenizer and template must be the checkpoint's; a catalogue it has never seen is welcome."""
    if facts["tokenizer"] != tokenizer.fingerprint:
        raise CalrecError(
            f"{checkpoint}: was trained with another tokenizer ({facts['tokenizer'][:8]}, and this one is "
            f"{tokenizer.fingerprint[:8]}); decode with the tokenizer of its run, or train again"
        )
    if facts["template"] != dataset.template:
        raise CalrecError(
            f"{checkpoint}: was trained on texts of another template than dataset {dataset.name!r} was prepared with "
            f"({facts['template'][:8]} and {dataset.template[:8]}); prepare the dataset with that one, or train again"
        )


def _check_positive(settings: dict[str, Any]) -> None:
    """Numbers that must be positive: named by their gin binding when they are not."""
    for name in (
        "num_samples", "num_beams", "max_new_tokens", "batch_users", "shard_users", "max_users", "temperature"
    ):  # fmt: skip
        value = settings.get(name)
        if value is None:
            continue
        whole = name != "temperature"
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not 0 < value < 2**31:
            raise CalrecError(f"decode.{name}={value!r}: must be a positive {'whole number' if whole else 'number'}")
    seed = settings["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise CalrecError(f"decode.seed={seed!r}: must be a whole number from 0 to 2^32 − 1")


def _chosen(dataset: Dataset, max_users: int | None, seed: int) -> np.ndarray:
    """Rows of the users to decode, ascending."""
    count = len(dataset.user_ids)
    if max_users is None or max_users >= count:
        return np.arange(count)
    permutation = np.random.Generator(np.random.Philox(key=[seed, 1 << 42])).permutation(count)
    return np.sort(permutation[:max_users])


@dataclasses.dataclass
class _Writer:
    """Decodes users shard by shard."""

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
    users: int = 0

    def write(self, users: np.ndarray, shard_users: int) -> list[Path]:
        """Decodes what is not there yet; returns the paths of all shards."""
        self.users = len(users)
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
                completed = self._complete(batch)
                tables.append(self._table(batch, completed))
                progress.step(len(batch), int(completed.num_tokens[: len(batch)].sum()))
            shards.write_shard(path, pa.concat_tables(tables).combine_chunks(), self.request)
        timing = progress.finish(self.decoder.compiled.seconds)
        if timing:
            artifacts.write_json(self.out / "timing.json", timing)
        return paths

    def _complete(self, batch: np.ndarray) -> Completed:
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
