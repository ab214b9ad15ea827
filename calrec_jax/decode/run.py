"""The verb `decode`: a checkpoint and a dataset's users in, shards of completions out.

Notable: a shard is written when it is whole and skipped by the next run; the folder's request, whose hash every shard
carries, says what it answers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gin
import numpy as np

from calrec_jax import artifacts, hosts
from calrec_jax.data.dataset import Dataset
from calrec_jax.data.examples import TokenCatalogue, tokenise_catalogue
from calrec_jax.decode import given, modes, shards
from calrec_jax.decode import prompts as prompting
from calrec_jax.decode.embeddings import item_embeddings
from calrec_jax.decode.prefix import Compiled
from calrec_jax.decode.writer import Writer
from calrec_jax.errors import CalrecError
from calrec_jax.models.transformer import Transformer
from calrec_jax.tokenizer import Tokenizer
from calrec_jax.train.checkpoints import load_checkpoint

_PROCESS_VARIABLES = ("CALREC_PROCESS_INDEX", "CALREC_PROCESS_COUNT")


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
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int = 32,
    renormalise: bool = True,
    leave_out_history: str = "none",
    leave_out_items: str | None = None,
    candidates: str | None = None,
    num_candidates: int = 100,
    max_new_tokens: int | None = None,
    batch_users: int = 32,
    live_share: float = 0.7,
    shard_users: int = 1024,
    seed: int = 0,
    max_users: int | None = None,
    with_embeddings: bool = True,
    process_index: int | None = None,
    process_count: int | None = None,
    prompts: prompting.GivenPrompts | None = None,
) -> Path:
    """Writes completions for the users of a split (docs/architecture.md, "Completions").

    Several processes, of one host or of many that see the same folder, share the work: they decode different shards.
    Those that were joined (`hosts`) wait for each other, and the first writes the manifest; of others, which are given
    their numbers, who finds all shards there writes it.

    Args:
      out: folder of the completions.
      dataset: whose users and catalogue; it need not be one the checkpoint was trained on.
      tokenizer: the checkpoint's.
      checkpoint: a finished training stage.
      split: "validation" or "test".
      mode: "sample" (the paper); "beam", the most probable texts; "stochastic_beam", samples without replacement;
        "constrained_beam", where each completion is an item of the catalogue whose text has a word; "score", given
        items by their log-probability; "tower", the users' vectors alone.
      num_samples: N, samples a user; modes "sample" and "stochastic_beam".
      temperature: of sampling; log-probabilities are always at temperature 1; the same modes.
      top_k: tokens that can be drawn, None all; mode "sample".
      top_p: probability of the tokens that can be drawn, None all; mode "sample".
      num_beams: hypotheses kept; modes "beam" and "constrained_beam".
      renormalise: see `constrained.ConstrainedBeam`; mode "constrained_beam".
      leave_out_history: items of a user's history that the user is not to get: "none", the "last" or "all" of it; mode
        "constrained_beam".
      leave_out_items: Parquet or CSV file whose column `item_id` names items that nobody is to get, such as those out
        of stock; mode "constrained_beam".
      candidates: folder of rankings, or Parquet file with `user_id` and `item_ids`, whose items are scored; mode
        "score".
      num_candidates: the first so many of each user; mode "score".
      max_new_tokens: T, EOS included; None is the checkpoint's max_target_tokens; where texts are free.
      batch_users: users a batch, or whose prompts are in memory at once.
      live_share: of `batch_users · num_samples` rows, those that are computed; see `sampling.Sampler`; mode "sample".
      shard_users: users a shard.
      seed: of all random streams; a user's depends on it and on the user's id alone.
      max_users: the first so many users of a seeded permutation, for quick comparisons; None is all.
      with_embeddings: whether to write v_U of each user and v_T of each item.
      process_index: which of the processes this is, from 0; None asks the environment (CALREC_PROCESS_INDEX), then
        `hosts`.
      process_count: how many there are; None asks the environment (CALREC_PROCESS_COUNT), then `hosts`.
      prompts: in place of those made from the dataset; users who have none are left out.

    Returns:
      `out`.

    Raises:
      CalrecError: a setting is not valid, inputs do not belong together, `out` holds other completions, or memory is
        too small for the settings.
    """
    arguments = dict(locals())
    out = Path(out)
    common = ("split", "mode", "batch_users", "shard_users", "seed", "max_users", "with_embeddings")
    settings: dict[str, Any] = {name: arguments[name] for name in (*common, *modes.MODES.get(mode, ()))}
    modes.check(settings)
    process = _process(process_index, process_count)
    config, params, facts = load_checkpoint(checkpoint)
    check_inputs(checkpoint, facts, dataset, tokenizer)
    if prompts is not None:
        settings["prompts"] = prompts.fingerprint
    if "max_new_tokens" in settings and max_new_tokens is None:
        settings["max_new_tokens"] = facts["max_target_tokens"]
    made_from = {"dataset": dataset.hash, "tokenizer": tokenizer.fingerprint, "checkpoint": facts["hash"]}
    extra = _given(dataset, settings, made_from, leave_out_items, candidates)
    done = artifacts.is_done(out, kind="completions", made_from=made_from, settings=settings)
    hosts.barrier(f"decode {out.name}")  # before the first of them could be done
    if done:
        print(f"decode: {out} is done already, skipped")
        return out
    request = hosts.first_then_all("claim", lambda: shards.claim(out, made_from, settings))
    catalogue = tokenise_catalogue([dataset], tokenizer, max_target_tokens=facts["max_target_tokens"])
    budget = history_budget(facts, catalogue)
    asked: prompting.Prompts | prompting.GivenPrompts
    asked = prompts or prompting.build_prompts(dataset, catalogue, split=split, max_history_tokens=budget)
    model = Transformer(config, facts["vocab_size"])
    decoder = modes.make(model, params, catalogue, settings, **extra)
    writer = Writer(out, request, dataset, tokenizer, asked, decoder, seed, with_embeddings, process)
    users = _chosen(dataset.users_with(split), max_users, seed)
    users = users[asked.lengths[users] > 0]
    with _memory_named(settings):
        written = writer.write(users, shard_users)
    if with_embeddings:
        path = out / shards.ITEM_EMBEDDINGS_FILE
        mine = len(written) % process[1] == process[0]  # one more shard
        if mine and not shards.is_written(path, request, len(dataset.item_ids)):
            vectors = item_embeddings(model, params, catalogue, Compiled())
            shards.write_item_embeddings(out, dataset.item_ids.tolist(), vectors, request)
        written.append(path)
    hosts.barrier("decoded")
    missing = [path.name for path in written if not path.exists()]
    if missing:
        print(f"decode: this process is done; others have {len(missing):,} files left to write, {missing[0]} first")
        return out
    if hosts.is_first():
        artifacts.write_manifest(
            out,
            kind="completions",
            made_from=made_from,
            settings=settings,
            files=artifacts.hash_files(written),
            users=len(users),
            dropped_history_items=asked.dropped_items,
            history_tokens=budget,
        )
    hosts.barrier("manifest")
    return out


@contextlib.contextmanager
def _memory_named(settings: dict[str, Any]) -> Iterator[None]:
    """Where memory is too small, names the settings that decide how much is needed."""
    import jax

    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        names = ("batch_users", "num_samples", "num_beams", "num_candidates", "max_new_tokens", "shard_users")
        set_to = ", ".join(f"decode.{name}={settings[name]}" for name in names if name in settings)
        reason = str(error).splitlines()[0] if str(error) else "out of memory"
        raise CalrecError(
            f"the decode does not fit into memory ({reason}); lower one of {set_to}, batch_users first: the texts stay "
            "the same"
        ) from error


def _process(index: int | None, count: int | None) -> tuple[int, int]:
    """Which of how many processes this is."""
    given_values = []
    for value, name in zip((index, count), _PROCESS_VARIABLES, strict=True):
        text = os.environ.get(name)
        if value is None and text is not None:
            if not text.isdecimal():
                raise CalrecError(f"{name}={text!r} in the environment: must be a whole number")
            value = int(text)
        given_values.append(value)
    if given_values == [None, None]:
        return hosts.processes()
    index, count = given_values
    if index is None or count is None or not 0 <= index < count:
        raise CalrecError(
            f"decode.process_index={index} of decode.process_count={count}: both must be set, the index from 0 and "
            "below the count"
        )
    return index, count


def _given(
    dataset: Dataset, settings: dict[str, Any], made_from: dict[str, str], leave_out_items: str | None,
    candidates: str | None,
) -> dict[str, Any]:  # fmt: skip
    """What `modes.make` wants beside the settings; the files it is read from enter `made_from`."""
    mode = settings["mode"]
    if mode == "score":
        if candidates is None:
            raise CalrecError("decode.candidates is not set: mode 'score' needs a folder of rankings or a Parquet file")
        found, digest = given.candidates(Path(candidates), dataset, settings["num_candidates"])
        made_from["candidates"] = digest
        return {"candidates": found}
    if mode != "constrained_beam":
        return {}
    extra: dict[str, Any] = {"left_out": given.history(dataset, settings["split"], settings["leave_out_history"])}
    no_words = given.without_words(dataset)
    if no_words.any():
        extra["keep"] = ~no_words
    if leave_out_items is not None:
        extra["keep"] = ~(no_words | given.items_left_out(Path(leave_out_items), dataset))
        made_from["leave_out_items"] = artifacts.hash_file(leave_out_items)
    return extra


def history_budget(facts: dict[str, Any], catalogue: TokenCatalogue) -> int:
    """Most tokens of a prompt: the training budget, within positions that a training row can reach.

    A training row also holds the target; the longest item stands for it, since a prompt must not depend on its target.
    """
    budget = int(facts["max_history_tokens"])
    row_tokens = facts.get("row_tokens")
    return budget if row_tokens is None else min(budget, int(row_tokens) - int(catalogue.lengths.max()) - 1)


def check_inputs(checkpoint: Path, facts: dict[str, Any], dataset: Dataset, tokenizer: Tokenizer) -> None:
    """Tokenizer and template must be the checkpoint's; a catalogue it has never seen is welcome."""
    if "template" not in facts:
        raise CalrecError(f"{checkpoint}: was imported and not trained yet; name it in run.init_from and train a stage")
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


def _chosen(users: np.ndarray, max_users: int | None, seed: int) -> np.ndarray:
    """Rows of the users to decode, ascending, out of those of the split."""
    if max_users is None or max_users >= len(users):
        return users
    permutation = np.random.Generator(np.random.Philox(key=[seed, 1 << 42])).permutation(len(users))
    return users[np.sort(permutation[:max_users])]
