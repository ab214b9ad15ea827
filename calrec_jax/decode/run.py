"""The verb `decode`: a checkpoint and a dataset's users in, shards of completions out.

Notable: a shard is written when it is whole and skipped by the next run; the folder's request, whose hash every shard
carries, says what it answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gin
import numpy as np

from calrec_jax import artifacts
from calrec_jax.data.dataset import SPLITS, Dataset
from calrec_jax.data.examples import TokenCatalogue, tokenise_catalogue
from calrec_jax.decode import prompts as prompting
from calrec_jax.decode import shards
from calrec_jax.decode.beam import BeamSearch
from calrec_jax.decode.embeddings import item_embeddings
from calrec_jax.decode.sampling import Sampler
from calrec_jax.decode.trie import Trie, build_trie
from calrec_jax.decode.writer import Decoder, Writer
from calrec_jax.errors import CalrecError
from calrec_jax.models.transformer import Transformer
from calrec_jax.tokenizer import Tokenizer
from calrec_jax.train.checkpoints import load_checkpoint

MODES = ("sample", "constrained_beam")


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
        settings |= {"num_samples": num_samples, "temperature": temperature, "max_new_tokens": max_new_tokens}
    else:
        settings |= {"num_beams": num_beams, "renormalise": renormalise}
    _check_settings(settings)
    config, params, facts = load_checkpoint(checkpoint)
    _check_inputs(checkpoint, facts, dataset, tokenizer)
    if prompts is not None:
        settings["prompts"] = prompts.fingerprint
    if mode == "sample" and max_new_tokens is None:
        settings["max_new_tokens"] = facts["max_target_tokens"]
    made_from = {"dataset": dataset.hash, "tokenizer": tokenizer.fingerprint, "checkpoint": facts["hash"]}
    if artifacts.is_done(out, kind="completions", made_from=made_from, settings=settings):
        print(f"decode: {out} is done already, skipped")
        return out
    request = shards.claim(out, made_from, settings)
    catalogue = tokenise_catalogue([dataset], tokenizer, max_target_tokens=facts["max_target_tokens"])
    budget = history_budget(facts, catalogue)
    given: prompting.Prompts | prompting.GivenPrompts
    given = prompts or prompting.build_prompts(dataset, catalogue, split=split, max_history_tokens=budget)
    model = Transformer(config, facts["vocab_size"])
    decoder, trie = _decoder(model, params, catalogue, settings)
    writer = Writer(out, request, dataset, tokenizer, given, decoder, trie, seed, batch_users, with_embeddings)
    users = _chosen(dataset.users_with(split), max_users, seed)
    users = users[given.lengths[users] > 0]
    written = writer.write(users, shard_users)
    if with_embeddings:
        vectors = item_embeddings(model, params, catalogue, decoder.compiled)
        written.append(shards.write_item_embeddings(out, dataset.item_ids.tolist(), vectors, request))
    artifacts.write_manifest(
        out,
        kind="completions",
        made_from=made_from,
        settings=settings,
        files=artifacts.hash_files(written),
        users=len(users),
        dropped_history_items=given.dropped_items,
        history_tokens=budget,
    )
    return out


def _decoder(
    model: Transformer, params: Any, catalogue: TokenCatalogue, settings: dict[str, Any]
) -> tuple[Decoder, Trie | None]:
    """What completes prompts as the settings say, and the catalogue's trie where it is bound to it."""
    if settings["mode"] == "sample":
        names = ("num_samples", "temperature", "max_new_tokens")
        return Sampler(model, params, eos_id=catalogue.eos_id, **{name: settings[name] for name in names}), None
    trie = build_trie(catalogue.tokens, catalogue.offsets, catalogue.eos_id)
    search = BeamSearch(model, params, trie, num_beams=settings["num_beams"], renormalise=settings["renormalise"])
    return search, trie


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


def _check_settings(settings: dict[str, Any]) -> None:
    """Names the setting that is not valid."""
    if settings["split"] not in SPLITS:
        raise CalrecError(f"split={settings['split']!r}: must be one of {list(SPLITS)}")
    if settings["mode"] not in MODES:
        raise CalrecError(f"decode.mode={settings['mode']!r}: must be one of {list(MODES)}")
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


def _chosen(users: np.ndarray, max_users: int | None, seed: int) -> np.ndarray:
    """Rows of the users to decode, ascending, out of those of the split."""
    if max_users is None or max_users >= len(users):
        return users
    permutation = np.random.Generator(np.random.Philox(key=[seed, 1 << 42])).permutation(len(users))
    return users[np.sort(permutation[:max_users])]
