"""The ranking metrics as a SeqIO metric function, so that `seqio.Evaluator` reports what `calrec evaluate` does.

Notable: predictions are ranked by the verb `rank` itself, under the bindings of the gin scope it is called in, and the
ranks come from the lists as `calrec evaluate` reads them. So there is one ranking and one definition of each metric,
and the numbers are the same.
"""

import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from calrec_jax import artifacts
from calrec_jax.decode import shards
from calrec_jax.errors import CalrecError
from calrec_jax.evaluate.metrics import metric_names, per_user_metrics
from calrec_jax.evaluate.places import Targets
from calrec_jax.evaluate.run import ranking_places
from calrec_jax.rank.histories import Histories
from calrec_jax.rank.run import KIND, rank
from calrec_jax.tasks.source import CalrecDataSource

Prediction = str | Sequence[str] | Mapping[str, Any]


class Target(NamedTuple):
    """What is to be predicted: rows of the user and the item in the dataset, and the split."""

    user: int
    item: int
    split: str


class Postprocessor:
    """SeqIO's `postprocess_fn`: a target becomes a `Target`; a prediction stays as it is."""

    def __init__(self, source: CalrecDataSource):
        self._source = source

    def __call__(
        self, decoded: Any, example: Mapping[str, Any] | None = None, is_target: bool = False, **unused: Any
    ) -> Any:
        """Turns the text of a target into its numbers, with the help of its example."""
        del unused
        if not is_target or example is None:
            return decoded
        user_base, item_base = self._source.space.bases(self._source.place)
        split = example["split"]
        return Target(
            int(example["target_user"]) - user_base,
            int(example["items"][-1]) - item_base,
            split.decode() if isinstance(split, bytes) else str(split),
        )


class RankingMetrics:
    """Recall, NDCG and MRR over the whole catalogue, ties by mean rank: means over the evaluated users.

    A prediction is a row of the completions contract (docs/architecture.md) as a dict, a list of texts, or one text;
    texts without log-probabilities all count the same. A user without any text is a miss.
    """

    def __init__(self, source: CalrecDataSource):
        self._source = source

    def __call__(self, targets: Sequence[Target], predictions: Sequence[Prediction]) -> dict[str, float]:
        """Metric name to mean.

        Raises:
          CalrecError: targets of several splits, or a prediction that cannot be ranked.
        """
        dataset = self._source.dataset
        splits = sorted({target.split for target in targets})
        if len(splits) != 1:
            raise CalrecError(f"{dataset.name}: the targets are of the splits {splits}; evaluate one at a time")
        users = np.array([target.user for target in targets])
        histories = Histories(dataset, splits[0])
        wrong = histories.targets[users] != [target.item for target in targets]
        if wrong.any():
            raise CalrecError(f"{dataset.name}: {wrong.sum()} targets are not the {splits[0]} purchases of their users")
        rows = [_completions(dataset.user_ids[u], p) for u, p in zip(users, predictions, strict=True)]
        rows = [row for row in rows if row["texts"]]
        if not rows:
            raise CalrecError(f"{dataset.name}: none of the {len(users)} predictions has a text to rank")
        with tempfile.TemporaryDirectory(prefix="calrec-") as folder:
            completions, ranking = pathlib.Path(folder, "completions"), pathlib.Path(folder, "ranking")
            table = pa.Table.from_pylist(rows, schema=shards.SCHEMA)
            shard = shards.shard_path(completions, 0)
            shards.write_shard(shard, table, "")
            artifacts.write_manifest(
                completions,
                kind="completions",
                made_from={"dataset": dataset.hash},
                settings={"split": splits[0]},
                files=artifacts.hash_files([shard]),
            )
            rank(ranking, dataset, completions, split=splits[0], missing="skip")
            depth = artifacts.read_manifest(ranking, kind=KIND)["list_depth"]
            # A user may be asked for more than once, in any order: each is placed once and read as often as asked.
            evaluated, rows_of = np.unique(users, return_inverse=True)
            places = ranking_places(ranking, Targets(dataset, histories, evaluated), depth)
        means = per_user_metrics(places.ranks, "mean_rank")[rows_of].mean(axis=0)
        return dict(zip(metric_names(), map(float, means), strict=True))


def _completions(user_id: str, prediction: Prediction) -> dict[str, Any]:
    """A row of the completions contract."""
    if isinstance(prediction, Mapping):
        return {name: prediction.get(name) for name in shards.SCHEMA.names} | {"user_id": user_id}
    texts = [prediction] if isinstance(prediction, str) else list(prediction)
    if not all(isinstance(text, str) for text in texts):
        raise CalrecError(f"the prediction of user {user_id!r} is not a text, a list of texts or a row of completions")
    zeros = [0] * len(texts)
    return {
        "user_id": user_id,
        "texts": texts,
        "log_probs": [float(zero) for zero in zeros],
        "num_tokens": zeros,
        "finished": [True] * len(texts),
    }
