"""SeqIO tasks and mixtures of prepared datasets.

One task a dataset, `calrec_<name>`, with SeqIO's splits train, validation and test, as users of SeqIO expect: the
split is an argument of `get_dataset` and of `seqio.Evaluator`, and the metric functions belong to the task (training
ignores them), so a second task for evaluation would only repeat the first. Its output features are `inputs` (the
prompt) and `targets` (the item's text and EOS), so that SeqIO's own converters work on it, too; what else
`CalrecFeatureConverter` needs rides along as further features of the examples. A mixture keeps those, which is why it
is a class of ours.

    from calrec_jax import tasks
    tasks.register_dataset("run/datasets/Office_Products", "run/tokenizer")
    tasks.register_dataset("run/datasets/Industrial_and_Scientific", "run/tokenizer")
    tasks.register_mixture("calrec_stage1", ["calrec_Office_Products", "calrec_Industrial_and_Scientific"])
    seqio.get_mixture_or_task("calrec_stage1").get_dataset({"inputs": 1024, "targets": 128}, split="train")

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
from calrec_jax.tasks import metrics, preprocessors
from calrec_jax.tasks.source import CalrecDataSource, CatalogueSpace
from calrec_jax.vocabularies import load_vocabulary

PREFIX = "calrec_"
MAX_TARGET_TOKENS = 128

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
    """Registers the task `calrec_<name>` of a dataset, unless this very task is registered already.

    Args:
      dataset_folder: as `calrec prepare` wrote it.
      tokenizer_folder: as `calrec vocab` or `calrec import_hf` wrote it.
      name: of the task, without the prefix; None: the dataset's.
      max_target_tokens: most tokens of an item, EOS included; longer texts are cut.
      metric_fns: SeqIO metric functions beside `metrics.RankingMetrics`.

    Returns:
      The task's name.

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
    tokenizer = vocabulary.calrec_tokenizer
    identity = (manifest["hash"], tokenizer.fingerprint, max_target_tokens)
    if task in seqio.TaskRegistry.names():
        if getattr(seqio.TaskRegistry.get(task).source, "identity", None) == identity:
            return task
        raise CalrecError(f"another task is registered as {task}; pass another name for {dataset_folder}")
    space = _spaces.setdefault(identity[1:], CatalogueSpace(tokenizer, max_target_tokens))
    source = CalrecDataSource(pathlib.Path(dataset_folder), space, identity)
    seqio.TaskRegistry.add(
        task,
        source=source,
        preprocessors=[
            functools.partial(preprocessors.tokenise, vocabulary=vocabulary, max_target_tokens=max_target_tokens),
            seqio.CacheDatasetPlaceholder(),
            functools.partial(preprocessors.trim_history, max_target_tokens=max_target_tokens),
        ],
        output_features=preprocessors.output_features(vocabulary),
        postprocess_fn=metrics.Postprocessor(source),
        metric_fns=[metrics.RankingMetrics(source), *metric_fns],
    )
    return task


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
