"""The verb `eval_tasks`: SeqIO tasks evaluated by `seqio.Evaluator`, with our decoder and our ranking metrics.

Notable: the prompts are read back from the task's converted features and decoded by the verb `decode`, whose shards lie
beside the metrics, so an interrupted evaluation goes on where it was. A user's random stream depends on the seed and
the user alone: with the same bindings of `decode` and `rank`, the numbers are those of `calrec evaluate`.
"""

import contextlib
import pathlib
from collections.abc import Sequence
from typing import Any

import gin
import numpy as np
import pyarrow.parquet as pq
import rich.console
import rich.table
import seqio
import tensorflow as tf

from calrec_jax import artifacts, tasks
from calrec_jax.data.dataset import SPLITS
from calrec_jax.data.examples import tokenise_catalogue
from calrec_jax.decode.prompts import GivenPrompts
from calrec_jax.decode.run import decode, history_budget
from calrec_jax.errors import CalrecError
from calrec_jax.features import CalrecFeatureConverter
from calrec_jax.train.checkpoints import read_facts

MIXTURE = "calrec_mixture"
_BATCH = 1024
_COLUMNS = ("recall@1", "recall@10", "ndcg@10", "mrr")


@gin.configurable(denylist=["out", "datasets", "tokenizer", "checkpoint", "split", "decode_scope", "rank_scope"])
def eval_tasks(
    out: pathlib.Path,
    datasets: Sequence[pathlib.Path],
    tokenizer: pathlib.Path,
    checkpoint: pathlib.Path,
    *,
    task: str | None = None,
    split: str = "test",
    decode_scope: str | None = None,
    rank_scope: str | None = None,
    num_examples: int | None = None,
) -> dict[str, Any]:
    """Evaluates a registered task, or each task of a mixture; prints a table and writes `out/metrics.json`.

    The tasks of `datasets` are registered, and a mixture `calrec_mixture` of them where there are several; tasks that
    the process has registered otherwise, with `calrec_jax.tasks.register_dataset`, can be evaluated as well.

    Args:
      out: folder of `metrics.json` and of the completions of each task.
      datasets: folders of prepared datasets.
      tokenizer: folder of the checkpoint's tokenizer.
      checkpoint: folder of a finished training stage.
      task: name of the task or mixture; None: the task of the first dataset.
      split: "validation" or "test".
      decode_scope: gin scope whose bindings of `decode` are used; None: those without a scope.
      rank_scope: the same of `rank`; a source that needs more than completions cannot be.
      num_examples: the first so many users alone, for a quick look; None is all.

    Returns:
      What `metrics.json` holds: "task", "split", and in "tasks" for each task its "dataset", "users" and "metrics".

    Raises:
      CalrecError: a folder is not complete, they do not belong together, the task is unknown, or `out` holds
      completions
        that were decoded otherwise.
    """
    if split not in SPLITS:
        raise CalrecError(f"split={split!r}: must be one of {list(SPLITS)}")
    _, facts = read_facts(checkpoint)
    names = [
        tasks.register_dataset(folder, tokenizer, max_target_tokens=facts["max_target_tokens"]) for folder in datasets
    ]
    if len(names) > 1 and MIXTURE not in seqio.MixtureRegistry.names():
        tasks.register_mixture(MIXTURE, names)
    chosen = task if task is not None else next(iter(names), None)
    results = {}
    for name in _subtasks(chosen):
        folder = pathlib.Path(out) / "completions" / f"{split}-{name}"
        predictor = Predictor(name, folder, checkpoint, split, decode_scope)
        results[name] = _evaluate(predictor, facts, rank_scope, num_examples)
    found = {"task": chosen, "split": split, "tasks": results}
    artifacts.write_json(pathlib.Path(out) / "metrics.json", found)
    _print_table(found)
    return found


def _subtasks(name: str | None) -> list[str]:
    known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    if name not in known:
        raise CalrecError(f"eval_tasks.task={name!r} is not registered; there are {', '.join(sorted(known)) or 'none'}")
    return sorted(task.name for task in seqio.get_subtasks(seqio.get_mixture_or_task(name)))


class Predictor:
    """A `predict_fn` for `seqio.Evaluator`: rows of completions from the features of `CalrecFeatureConverter`.

    Args:
      task: name of a task of `calrec_jax.tasks`.
      folder: of the completions; what is there already is not decoded again.
      checkpoint: folder of a finished training stage.
      split: that is evaluated.
      scope: gin scope whose bindings of `decode` are used.
    """

    def __init__(self, task: str, folder: pathlib.Path, checkpoint: pathlib.Path, split: str, scope: str | None = None):
        self.task, self.folder, self.checkpoint, self.split, self.scope = task, folder, checkpoint, split, scope
        self.source = tasks.task_source(task)

    def __call__(self, dataset: tf.data.Dataset) -> list[tuple[int, dict[str, Any]]]:
        """Decodes an enumerated dataset of unpacked rows; gives each index its row of the completions contract."""
        indices, users, prompts = self._read(dataset)
        with _scope(self.scope):
            decode(
                self.folder,
                self.source.dataset,
                self.source.space.tokenizer,
                self.checkpoint,
                split=self.split,
                prompts=prompts,
            )
        artifacts.check_files(self.folder, artifacts.read_manifest(self.folder, kind="completions"))
        tables = [pq.read_table(path) for path in sorted(self.folder.glob(artifacts.SHARDS))]
        by_user = {row["user_id"]: row for table in tables for row in table.to_pylist()}
        ids = self.source.dataset.user_ids[users]
        nothing: dict[str, Any] = {"texts": []}  # not decoded, as decode.max_users asked
        return [(int(index), by_user.get(user, nothing)) for index, user in zip(indices, ids, strict=True)]

    def _read(self, dataset: tf.data.Dataset) -> tuple[np.ndarray, np.ndarray, GivenPrompts]:
        """Index and user of each row, and the prompts: each row's tokens up to the end of its history."""
        user_base, _ = self.source.space.bases(self.source.place)
        indices, users, values, lengths = [], [], [], []
        for index, rows in dataset.batch(_BATCH).as_numpy_iterator():
            size = 1 + (rows["user_pool"] > 0).sum(axis=1)  # the start token is in no pool
            tokens = rows["decoder_input_tokens"]
            indices.append(index)
            users.append(rows["target_user"][:, 0] - user_base)
            values += np.split(tokens[np.arange(tokens.shape[1]) < size[:, None]], np.cumsum(size)[:-1])
            lengths.append(size)
        found = np.concatenate(users)
        by_user = np.zeros(len(self.source.dataset.user_ids), np.int64)
        by_user[found] = np.concatenate(lengths)
        return (
            np.concatenate(indices),
            found,
            GivenPrompts(
                user_ids=self.source.dataset.user_ids,
                values=np.concatenate([values[row] for row in np.argsort(found)]).astype(np.int32),
                offsets=np.concatenate([[0], np.cumsum(by_user)]),
            ),
        )


def _evaluate(
    predictor: Predictor, facts: dict[str, Any], rank_scope: str | None, num_examples: int | None
) -> dict[str, Any]:
    """Runs the evaluator on one task; its own lengths, since a prompt's budget depends on the category's items."""
    source = predictor.source
    catalogue = tokenise_catalogue(
        [source.dataset], source.space.tokenizer, max_target_tokens=facts["max_target_tokens"]
    )
    evaluator = seqio.Evaluator(
        predictor.task,
        CalrecFeatureConverter(
            pack=False, start_id=source.space.tokenizer.start_id, eos_id=source.space.tokenizer.eos_id
        ),
        eval_split=predictor.split,
        sequence_length={"inputs": history_budget(facts, catalogue), "targets": facts["max_target_tokens"]},
        num_examples=num_examples,
        async_compute_metrics=False,  # gin's scopes belong to a thread
    )
    try:
        with _scope(rank_scope):
            future, _ = evaluator.evaluate(compute_metrics=True, predict_fn=predictor)
    except ValueError as error:
        if isinstance(error.__cause__, CalrecError):
            raise error.__cause__ from error
        raise
    examples = evaluator.cached_task_datasets[predictor.task].cardinality().numpy()
    return {
        "dataset": source.dataset.name,
        "users": int(examples),
        "metrics": dict(future.result()[predictor.task]),
        "made_from": {
            "dataset": source.dataset.hash,
            "completions": artifacts.read_manifest(predictor.folder, kind="completions")["hash"],
        },
    }


def _scope(name: str | None) -> contextlib.AbstractContextManager:
    """A gin scope of its own, not one inside the scope that is entered already."""
    return gin.config_scope([name] if name else [])


def _print_table(found: dict[str, Any]) -> None:
    table = rich.table.Table("task", "users", *_COLUMNS, title=f"{found['task']}, {found['split']}")
    for name, result in found["tasks"].items():
        table.add_row(name, f"{result['users']:,}", *(f"{result['metrics'][column]:.4f}" for column in _COLUMNS))
    rich.console.Console().print(table)
