"""SeqIO tasks and mixtures of prepared datasets.

A dataset gives three tasks over the same examples: `calrec_<name>` with the splits train, validation and test;
`calrec_<name>_train` with train and validation and no metrics, for a trainer's loss; `calrec_<name>_eval` with
validation and test and the ranking metrics, for `seqio.Evaluator` and for configurations that name the two apart, as
T5X's do. Their output features are `inputs` (the
prompt) and `targets` (the item's text and EOS), so that SeqIO's own converters work on it, too; what else
`CalrecFeatureConverter` needs rides along as further features of the examples. A mixture keeps those, which is why it
is a class of ours.

    from calrec_jax import tasks
    tasks.register_dataset("run/datasets/Office_Products", "run/tokenizer")
    tasks.register_dataset("run/datasets/Industrial_and_Scientific", "run/tokenizer")
    tasks.register_mixture("calrec_stage1", ["calrec_Office_Products", "calrec_Industrial_and_Scientific"])
    seqio.get_mixture_or_task("calrec_stage1").get_dataset({"inputs": 1024, "targets": 128}, split="train")

`register_run` does all of that for a run folder; the module `calrec_jax.tasks.run_folder` does it when it is imported,
for programs that are given a module's name alone (`seqio_cache_tasks`, T5X).

Registering reads the dataset and the tokenizer, and makes nothing. The order of registration numbers users, items and
texts as `build_examples` does for the same order.
"""

import functools
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import seqio
import tensorflow as tf

from calrec_jax import artifacts
from calrec_jax.errors import CalrecError
from calrec_jax.layout import RunLayout
from calrec_jax.tasks import metrics, preprocessors
from calrec_jax.tasks.source import SPLITS, CalrecDataSource, CatalogueSpace
from calrec_jax.vocabularies import load_vocabulary

PREFIX = "calrec_"
STAGE1 = "calrec_stage1"
# Suffix of a task to its splits.
KINDS = {"": SPLITS, "_train": ("train", "validation"), "_eval": ("validation", "test")}
MAX_TARGET_TOKENS = 128

FACTS_FILE = "model.json"  # as `train.checkpoints` names it, which imports orbax

_spaces: dict[tuple[str, int], CatalogueSpace] = {}


class CalrecMixture(seqio.Mixture):
    """A mixture whose examples keep the features that ride along with `inputs` and `targets`."""

    def get_dataset(
        self, *args: Any, passthrough_features: Sequence[str] | None = None, **kwargs: Any
    ) -> tf.data.Dataset:
        """As `seqio.Mixture.get_dataset`; `passthrough_features` are kept beside those of `CalrecFeatureConverter`."""
        kept = [*preprocessors.ALONG, *(passthrough_features or ())]
        return super().get_dataset(*args, passthrough_features=kept, **kwargs)


def register_dataset(
    dataset_folder: str | pathlib.Path,
    tokenizer_folder: str | pathlib.Path,
    *,
    name: str | None = None,
    max_target_tokens: int = MAX_TARGET_TOKENS,
    metric_fns: Sequence[Callable[..., Any]] = (),
) -> str:
    """Registers the tasks `calrec_<name>`, `calrec_<name>_train` and `calrec_<name>_eval` of a dataset.

    Those that are registered already, from the same dataset and tokenizer, are left as they are.

    Args:
      dataset_folder: as `calrec prepare` wrote it.
      tokenizer_folder: as `calrec vocab` or `calrec import_hf` wrote it.
      name: of the task, without the prefix; None: the dataset's.
      max_target_tokens: most tokens of an item, EOS included; longer texts are cut.
      metric_fns: SeqIO metric functions beside `metrics.RankingMetrics`.

    Returns:
      The first task's name.

    Raises:
      CalrecError: a folder is not complete, they do not belong together, or another task has the name.
    """
    if max_target_tokens < 2:
        raise CalrecError(f"max_target_tokens={max_target_tokens}: needs at least 2 (one token and EOS)")
    vocabulary = load_vocabulary(tokenizer_folder)
    manifest = artifacts.read_manifest(dataset_folder, kind="dataset")
    template = artifacts.read_manifest(tokenizer_folder, kind="tokenizer")["made_from"].get("template")
    if template is not None and manifest["made_from"]["template"] != template:  # an imported one goes with any
        raise CalrecError(
            f"{dataset_folder} was made with another template than {tokenizer_folder}; make one of them again"
        )
    task = PREFIX + re.sub(r"[^\w.:#]", "_", name if name is not None else manifest["name"])
    identity = (manifest["hash"], vocabulary.calrec_tokenizer.fingerprint, max_target_tokens)
    for suffix in KINDS:
        if task + suffix in seqio.TaskRegistry.names():
            if getattr(seqio.TaskRegistry.get(task + suffix).source, "identity", None) != identity:
                raise CalrecError(
                    f"another task is registered as {task + suffix}; pass another name for {dataset_folder}"
                )
            continue
        _register(task, suffix, pathlib.Path(dataset_folder), vocabulary, identity, metric_fns)
    return task


def _register(
    task: str,
    suffix: str,
    folder: pathlib.Path,
    vocabulary: seqio.Vocabulary,
    identity: tuple[str, str, int],
    metric_fns: Sequence[Callable[..., Any]],
) -> None:
    """Registers one of the tasks of a dataset; `identity` is (dataset, tokenizer, max_target_tokens)."""
    max_target_tokens = identity[2]
    space = _spaces.setdefault(identity[1:], CatalogueSpace(vocabulary.calrec_tokenizer, max_target_tokens))
    source = CalrecDataSource(folder, space, identity, KINDS[suffix])
    measured = suffix != "_train"
    seqio.TaskRegistry.add(
        task + suffix,
        source=source,
        preprocessors=[
            functools.partial(preprocessors.tokenise, vocabulary=vocabulary, max_target_tokens=max_target_tokens),
            seqio.CacheDatasetPlaceholder(),
            functools.partial(preprocessors.trim_history, max_target_tokens=max_target_tokens),
        ],
        output_features=preprocessors.output_features(vocabulary),
        postprocess_fn=metrics.Postprocessor(source) if measured else None,
        metric_fns=[metrics.RankingMetrics(source), *metric_fns] if measured else [],
    )


def register_run(run_dir: str | pathlib.Path, *, max_target_tokens: int | None = None) -> list[str]:
    """Registers the tasks of every dataset of a run folder, and the mixture `calrec_stage1` of their `_train` tasks.

    Args:
      run_dir: as `calrec run` fills it.
      max_target_tokens: see `register_dataset`; None: that of the run's stages, where one was begun.

    Returns:
      The names of the datasets' first tasks, in the order of their folders.

    Raises:
      CalrecError: there is no dataset or no tokenizer, stages differ in `max_target_tokens`, or a name is taken.
    """
    layout = RunLayout(pathlib.Path(run_dir))
    folders = sorted(path.parent for path in layout.dataset("").glob(f"*/{artifacts.MANIFEST}"))
    if not folders:
        raise CalrecError(f"{run_dir} has no datasets; run `calrec prepare` and `calrec vocab` first")
    if max_target_tokens is None:
        facts = [layout.stage(stage) / FACTS_FILE for stage in ("stage1", "stage2")]
        found = {artifacts.read_json(path)["max_target_tokens"] for path in facts if path.exists()}
        if len(found) > 1:
            raise CalrecError(f"{run_dir}: its stages have max_target_tokens {sorted(found)}; say which one is meant")
        max_target_tokens = found.pop() if found else MAX_TARGET_TOKENS
    names = [register_dataset(folder, layout.tokenizer, max_target_tokens=max_target_tokens) for folder in folders]
    parts = [f"{name}_train" for name in names]
    if STAGE1 in seqio.MixtureRegistry.names():
        known = [task.name for task in seqio.MixtureRegistry.get(STAGE1).tasks]
        if sorted(known) != sorted(parts):
            raise CalrecError(f"{STAGE1} is registered already, of {known}; register one run folder in a process")
    else:
        register_mixture(STAGE1, parts)
    return names


def register_mixture(name: str, tasks: Sequence[str], *, exponent: float = 0.3) -> str:
    """Registers a mixture that draws from each task at the rate (its users)^exponent, as CALRec's stage I does.

    Args:
      name: of the mixture.
      tasks: names of tasks that `register_dataset` gave.
      exponent: 0 draws from all alike, 1 in proportion to their users.

    Returns:
      `name`.

    Raises:
      CalrecError: no task, one that is unknown or not ours, tasks of different tokenizers, or the name is taken.
    """
    sources = [task_source(task) for task in tasks]
    if not sources:
        raise CalrecError(f"mixture {name}: no task given")
    if len({id(source.space) for source in sources}) > 1:
        raise CalrecError(
            f"mixture {name}: its tasks have different tokenizers or max_target_tokens; register them with the same"
        )
    if name in seqio.MixtureRegistry.names() or name in seqio.TaskRegistry.names():
        raise CalrecError(f"{name} is registered already; choose another name for the mixture")
    rates = [float(len(source.dataset.user_ids)) ** exponent for source in sources]
    seqio.MixtureRegistry.add_provider(name, CalrecMixture(name, list(zip(tasks, rates, strict=True))))
    return name


def task_source(task: str) -> CalrecDataSource:
    """The data source of a registered task of ours.

    Raises:
      CalrecError: it is not registered, or not by `register_dataset`.
    """
    if task not in seqio.TaskRegistry.names():
        raise CalrecError(f"no task {task!r} is registered; register_dataset gives a task's name")
    source = seqio.TaskRegistry.get(task).source
    if not isinstance(source, CalrecDataSource):
        raise CalrecError(f"{task!r} is not a task of register_dataset")
    return source
