"""The verb `rank`: completions (or histories, or a trained baseline) in, ranked lists of the catalogue out.

Notable: users are ranked in blocks, so memory is bounded whatever their number, and the shards appear together when
all is written. The same inputs and settings give the same bytes.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import gin
import numpy as np

from calrec_jax import artifacts
from calrec_jax.data.dataset import Dataset
from calrec_jax.errors import CalrecError
from calrec_jax.rank import fitting, sources
from calrec_jax.rank.bm25 import BM25Index, BM25Tokenizer
from calrec_jax.rank.completions import MISSING, Completions
from calrec_jax.rank.from_histories import FROM_HISTORIES, from_histories, source_settings
from calrec_jax.rank.histories import Histories
from calrec_jax.rank.parts import ByUser, CompletionTexts, Job, index_folder, kept_index, rank_in_processes, write_lists
from calrec_jax.rank.round_robin import EPSILON, RoundRobinConfig
from calrec_jax.rank.shards import RankingReader
from calrec_jax.rank.sources import LEAVE_OUT
from calrec_jax.rank.user_texts import SCORE_KINDS

KIND = "ranking"
WHOLE_CATALOGUE_UP_TO = 20_000
DEPTH_BEYOND = 1_000
FROM_COMPLETIONS = ("completions", "constrained", "tower")
TRAINED = ("sasrec",)
BASELINES = (*FROM_HISTORIES, *TRAINED)
SOURCES = (*FROM_COMPLETIONS, *BASELINES, "fusion")
FUSE_WEIGHTS = ("given", "fit")


@gin.configurable
def rank(
    out: pathlib.Path,
    dataset: Dataset,
    completions: pathlib.Path | None,
    *,
    split: str = "test",
    source: str = "completions",
    depth: int | None = None,
    epsilon: float = EPSILON,
    score: str = "sum",
    fill: str = "none",
    leave_out_history: str = "none",
    missing: str = "error",
    fuse: Mapping[str, float] | None = None,
    baseline: pathlib.Path | None = None,
    fuse_weights: str = "given",
    processes: int = 1,
    index_dir: pathlib.Path | None = None,
) -> pathlib.Path:
    """Ranks the catalogue for every user of a split. Skips when that is done.

    Args:
      out: folder of the ranking.
      dataset: whose catalogue is ranked.
      completions: folder of the dataset's completions for the split; None where the source needs none.
      split: "validation" or "test".
      source: "completions" (quasi-round-robin BM25 over free completions), "constrained" (the items of a constrained
        decode by log-probability, all others tied behind), "tower" (user vector · item vectors), one of
        `FROM_HISTORIES` (from the histories alone), "sasrec" (a trained baseline), or "fusion".
      depth: of the lists; None: the whole catalogue up to 20,000 items, else 1,000.
      epsilon: ε of quasi-round-robin.
      score: S of a completion: "sum" (the paper) or "mean" of its tokens' log-probabilities.
      fill: a source from histories that decides what the source leaves tied; "none": ties stay ties.
      leave_out_history: items moved to the bottom: "none", the "last" of the history, or "all" of it.
      missing: users without completions, or whom a ranking that is fused lacks: "error", or "skip" them (an evaluation
        counts them as misses).
      fuse: for "fusion": names of rankings beside `out` (without the split) to their weights.
      baseline: for "sasrec": folder of the trained model.
      fuse_weights: "given" (those of `fuse`), or "fit": the search for the best NDCG@10 on the validation split's
        rankings of the same names, over the users whom all of them rank, begins with them (`rank.fitting`); what it
        finds is in the manifest.
      processes: how many rank completions (without `fill`; whatever else is ranked takes one). They share the index;
        the result is the same, but texts that users of several processes have are scored by each.
      index_dir: where the BM25 index is kept, memory-mapped, for catalogues beyond 20,000 items and for several
        processes; None: the folder `index` beside `out`.

    Returns:
      `out`.

    Raises:
      CalrecError: a setting is not valid, the completions or the model are missing, incomplete or another dataset's, or
        `out` holds a ranking made otherwise.
    """
    _check_settings(source, fill, leave_out_history, depth, fuse, fuse_weights)
    _check_choices(epsilon, score, missing)
    if isinstance(processes, bool) or not isinstance(processes, int) or processes < 1:
        raise CalrecError(f"rank.processes is {processes!r}: it must be a whole number from 1")
    histories = Histories(dataset, split)
    out = pathlib.Path(out)
    tokenizer = BM25Tokenizer()
    folders = {} if source != "fusion" else {name: out.parent / f"{split}-{name}" for name in dict(fuse or {})}
    inputs = _inputs(dataset, completions, split, source, folders, baseline)
    fitted_on = _fitted_on(out, dataset, fuse) if fuse_weights == "fit" else {}
    inputs |= fitted_on
    made_from = {"dataset": dataset.hash, **{role: manifest["hash"] for role, (_, manifest) in inputs.items()}}
    settings = {
        "split": split,
        "source": source,
        "depth": depth,
        "epsilon": epsilon,
        "score": score,
        "fill": fill,
        "leave_out_history": leave_out_history,
        "missing": missing,
        "fuse": dict(fuse) if fuse else None,
        **({"fuse_weights": fuse_weights} if source == "fusion" else {}),
        "bm25": dataclasses.asdict(tokenizer),
        **({"round_robin": dataclasses.asdict(RoundRobinConfig())} if source == "completions" else {}),
        **{name: own for name in dict.fromkeys([source, fill]) if (own := source_settings(name))},
    }
    if artifacts.is_done(out, kind=KIND, made_from=made_from, settings=settings):
        return out
    for role, (folder, manifest) in inputs.items():
        if role != "baseline":  # orbax checks what it reads
            artifacts.check_files(folder, manifest)
    several = processes > 1 and source == "completions" and fill == "none"
    kept = index_dir or out.parent / "index"
    keep = several or len(dataset.item_ids) > WHOLE_CATALOGUE_UP_TO
    index = functools.cache(
        lambda: kept_index(kept, dataset, tokenizer) if keep else BM25Index(dataset.texts, tokenizer)
    )
    users = histories.users
    facts: dict[str, Any] = {}
    ranked: sources.Source
    if source in FROM_COMPLETIONS:
        loaded = _completions(dataset, completions, source, missing, split)
        users = loaded.users
        if source == "completions":
            texts = CompletionTexts(dataset, users, loaded.user_texts(score), epsilon, RoundRobinConfig())
            ranked = texts.source(index())
        else:
            ranked = ByUser(loaded.constrained() if source == "constrained" else loaded.tower(), users, dataset)
    elif source in TRAINED:
        ranked = _sasrec(dataset, histories, split, baseline)
    elif source == "fusion":
        weights = dict(fuse or {})
        if fitted_on:
            weights, fitted = _fit(dataset, [folder for folder, _ in fitted_on.values()], weights)
            facts |= fitted
        facts["weights"] = weights
        readers = [(RankingReader(folders[name], dataset), weight) for name, weight in weights.items()]
        if missing == "skip":
            users = _listed([reader for reader, _ in readers])
        ranked = sources.Fusion(readers, len(dataset.item_ids))
    else:
        ranked = from_histories(source, histories, dataset.texts, index)
    if fill != "none":
        ranked = sources.Filled(ranked, from_histories(fill, histories, dataset.texts, index))
    num_items = len(dataset.item_ids)
    wordless = index().without_words if source == "completions" else np.zeros(0, np.int64)
    if wordless.size:
        facts["items_without_words"] = dataset.item_ids[wordless].tolist()
        first = facts["items_without_words"][0]
        print(f"calrec: {wordless.size} items have no word in their text, {first!r} first; they go to the bottom")
    cut = min(num_items, depth or (num_items if num_items <= WHOLE_CATALOGUE_UP_TO else DEPTH_BEYOND))
    with artifacts.atomic_folder(out) as temporary:
        if several:
            job = Job(texts, index_folder(kept, dataset, tokenizer), split, leave_out_history, wordless, cut, temporary)
            rank_in_processes(job, processes)
        else:
            write_lists(temporary, dataset, users, sources.LeftOut(ranked, histories, leave_out_history, wordless), cut)
        artifacts.write_manifest(
            temporary,
            kind=KIND,
            made_from=made_from,
            settings=settings,
            name=dataset.name,
            users=len(users),
            items=num_items,
            list_depth=cut,
            **facts,
            files=artifacts.hash_files(sorted(temporary.glob(artifacts.SHARDS))),
        )
    return out


def _check_settings(
    source: str,
    fill: str,
    leave_out_history: str,
    depth: int | None,
    fuse: Mapping[str, float] | None,
    fuse_weights: str,
) -> None:
    if source not in SOURCES:
        raise CalrecError(f"rank.source is {source!r}: choose one of {list(SOURCES)}")
    if fill not in ("none", *FROM_HISTORIES):
        raise CalrecError(f"rank.fill is {fill!r}: choose one of {['none', *FROM_HISTORIES]}")
    if leave_out_history not in LEAVE_OUT:
        raise CalrecError(f"rank.leave_out_history is {leave_out_history!r}: choose one of {list(LEAVE_OUT)}")
    if depth is not None and (isinstance(depth, bool) or not isinstance(depth, int) or depth < 1):
        raise CalrecError(f"rank.depth is {depth!r}: it must be a whole number from 1, or None for the default")
    if (source == "fusion") != bool(fuse):
        raise CalrecError(
            "rank.source='fusion' and rank.fuse (names of rankings to weights) go together: set both or neither"
        )
    if fuse_weights not in FUSE_WEIGHTS:
        raise CalrecError(f"rank.fuse_weights is {fuse_weights!r}: choose one of {list(FUSE_WEIGHTS)}")
    if fuse_weights == "fit" and not fuse:
        raise CalrecError("rank.fuse_weights='fit' needs rank.source='fusion' and rank.fuse, whose weights it fits")
    values = list(dict(fuse or {}).values())
    if not all(_is_number(value) and value >= 0 for value in values) or (values and not any(values)):
        raise CalrecError(f"rank.fuse has the weights {values}: they must be numbers from 0, not all 0")


def _check_choices(epsilon: float, score: str, missing: str) -> None:
    if not (_is_number(epsilon) and epsilon >= 0):
        raise CalrecError(f"rank.epsilon is {epsilon!r}: it must be a number from 0 (the paper has 1/5000)")
    if score not in SCORE_KINDS:
        raise CalrecError(f"rank.score is {score!r}: choose one of {list(SCORE_KINDS)}")
    if missing not in MISSING:
        raise CalrecError(f"rank.missing is {missing!r}: choose one of {list(MISSING)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _fitted_on(
    out: pathlib.Path, dataset: Dataset, fuse: Mapping[str, float] | None
) -> dict[str, tuple[pathlib.Path, dict[str, Any]]]:
    """Role to folder and manifest of the validation rankings that weights are fitted on."""
    found = {}
    for name in dict(fuse or {}):
        folder = out.parent / f"validation-{name}"
        if not (folder / artifacts.MANIFEST).exists():
            raise CalrecError(
                f"rank.fuse_weights='fit' needs the ranking {name} of the validation split, and {folder} is not "
                "complete: run the same with --split=validation first, or set fuse_weights='given'"
            )
        manifest = artifacts.read_manifest(folder, kind=KIND)
        if manifest["settings"].get("split") != "validation":
            raise CalrecError(
                f"{folder} ranks for the split {manifest['settings'].get('split')!r}: weights are fitted on "
                "validation rankings alone, never on test users"
            )
        if manifest["made_from"].get("dataset") != dataset.hash:
            raise CalrecError(f"{folder} ranks another dataset than {dataset.name} as it is now; rank this one")
        found[f"validation ranking {name}"] = folder, manifest
    return found


def _fit(
    dataset: Dataset, folders: Sequence[pathlib.Path], given: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Weights by name that rank the validation targets best, and facts: the NDCG@10 they reach there, on how many."""
    readers = {name: RankingReader(folder, dataset) for name, folder in zip(given, folders, strict=True)}
    users = _listed(list(readers.values()))
    candidates = fitting.gather(readers, users, Histories(dataset, "validation").targets[users])
    weights, reached = fitting.fit(candidates, np.array(list(given.values()), np.float64))
    return dict(zip(given, weights.tolist(), strict=True)), {"fit_ndcg@10": reached, "fit_users": len(users)}


def _listed(readers: Sequence[RankingReader]) -> np.ndarray:
    """The users whom all of these rank, ascending.

    Raises:
      CalrecError: there is none.
    """
    users = functools.reduce(np.intersect1d, [reader.users for reader in readers])
    if not len(users):
        raise CalrecError(f"no user is in all of the rankings {[str(reader.folder) for reader in readers]}")
    return users


def _inputs(
    dataset: Dataset,
    completions: pathlib.Path | None,
    split: str,
    source: str,
    folders: Mapping[str, pathlib.Path],
    baseline: pathlib.Path | None,
) -> dict[str, tuple[pathlib.Path, dict[str, Any]]]:
    """Role to folder and manifest of what a source reads beside the dataset; they must be of the dataset and split."""
    inputs = {
        f"ranking {name}": (folder, artifacts.read_manifest(folder, kind=KIND)) for name, folder in folders.items()
    }
    if source in FROM_COMPLETIONS:
        if completions is None:
            raise CalrecError(
                f"rank.source={source!r} needs completions: run `calrec decode`, and name its decode here"
            )
        inputs["completions"] = completions, artifacts.read_manifest(completions, kind="completions")
    if source in TRAINED:
        if baseline is None:
            raise CalrecError(f"rank.source={source!r} ranks a trained model: name it in run.baselines instead")
        inputs["baseline"] = baseline, artifacts.read_manifest(baseline, kind="baseline")
    for role, (folder, manifest) in inputs.items():
        if manifest["made_from"].get("dataset") != dataset.hash:
            raise CalrecError(
                f"the {role} ({folder}) were made from another dataset than {dataset.name} as it is now; "
                "make them again from this one"
            )
        theirs = manifest["settings"].get("split", split)
        if theirs != split:
            raise CalrecError(
                f"the {role} are of the split {theirs!r}, and {split!r} is to be ranked; correct the path"
            )
    return inputs


def _completions(dataset: Dataset, folder: pathlib.Path | None, source: str, missing: str, split: str) -> Completions:
    columns = {
        "completions": ("texts", "log_probs", "num_tokens"),
        "constrained": ("item_ids", "log_probs"),
        "tower": ("user_embedding",),
    }
    assert folder is not None
    return Completions(folder, dataset, columns[source], missing, split)


def _sasrec(dataset: Dataset, histories: Histories, split: str, folder: pathlib.Path | None) -> sources.Source:
    """A trained SASRec as a source."""
    from calrec_jax.baselines.train import load_sasrec  # JAX: other rankings do without

    assert folder is not None
    return sources.Tower(*load_sasrec(folder, dataset, split), histories.popularity)
