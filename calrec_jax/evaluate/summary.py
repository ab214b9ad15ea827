"""From ranks to what is shown: `metrics.json`, `per_user.parquet` and the table on the terminal.

Notable: the bootstrap's resamples are shared by all rows, so their differences are paired.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from calrec_jax.data.dataset import Dataset
from calrec_jax.errors import CalrecError
from calrec_jax.evaluate import bootstrap
from calrec_jax.evaluate.metrics import TIES, TargetRanks, metric_names, per_user_metrics

ORACLE = "oracle"


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table: a ranking's name, its kind, and where it puts the targets."""

    name: str
    kind: str
    ranks: TargetRanks
    listed: np.ndarray  # [U] bool: who has a list


def summarise(
    rows: Sequence[Row], settings: Mapping[str, Any], dataset: Dataset, users: np.ndarray
) -> tuple[dict[str, Any], pa.Table]:
    """What `metrics.json` and `per_user.parquet` hold, from the ranks of all rows; `users` are those of the split."""
    cutoffs, ndcg_cutoffs, ties = settings["cutoffs"], settings["ndcg_cutoffs"], settings["ties"]
    names = metric_names(cutoffs, ndcg_cutoffs)
    population = np.zeros(len(dataset.user_ids), bool)
    population[users] = True
    if settings["users"] == "ranked":
        population = np.logical_and.reduce([population, *(row.listed for row in rows)])
    if not population.any():
        raise CalrecError("no user has a list in every ranking; rank the same users, or set evaluate.users='all'")
    tables = {
        way: [per_user_metrics(row.ranks, way, cutoffs, ndcg_cutoffs)[population] for row in rows] for way in TIES
    }
    bounds = bootstrap.intervals(
        np.concatenate(tables[ties], axis=1),
        resamples=settings["resamples"],
        seed=settings["seed"],
        level=settings["level"],
    )
    metrics = {
        "dataset": dataset.name,
        "split": settings["split"],
        "users": int(population.sum()),
        "population": settings["users"],
        "items": len(dataset.item_ids),
        "depth": min(row.ranks.depth for row in rows),
        "ties": ties,
        "bootstrap": {name: settings[name] for name in ("resamples", "level", "seed")},
        "rows": [
            {
                "name": row.name,
                "kind": row.kind,
                "depth": row.ranks.depth,
                "users_without_ranking": int((~row.listed[population]).sum()),
                "targets_not_found": int((~row.ranks.found[population]).sum()),
                "metrics": _named(names, tables[ties][number].mean(axis=0)),
                "ties": {way: _named(names, tables[way][number].mean(axis=0)) for way in TIES},
                "interval": _named(names, bounds[number * len(names) : (number + 1) * len(names)]),
            }
            for number, row in enumerate(rows)
        ],
    }
    return metrics, _per_user(dataset.user_ids[population], rows, population, tables[ties], names)


def _named(names: Sequence[str], values: np.ndarray) -> dict[str, Any]:
    return dict(zip(names, values.tolist(), strict=True))


def _per_user(
    user_ids: np.ndarray,
    rows: Sequence[Row],
    population: np.ndarray,
    values: Sequence[np.ndarray],
    names: Sequence[str],
) -> pa.Table:
    """A row a user and ranking; ranks are null for a miss."""
    tables = []
    for row, metrics in zip(rows, values, strict=True):
        miss = ~row.ranks.found[population]
        columns = {
            "user_id": pa.array(user_ids, pa.string()),
            "name": pa.array([row.name] * len(user_ids), pa.string()),
            "rank_optimistic": pa.array(row.ranks.optimistic[population], pa.int64(), mask=miss),
            "rank_pessimistic": pa.array(row.ranks.pessimistic[population], pa.int64(), mask=miss),
            **{name: pa.array(metrics[:, column]) for column, name in enumerate(names)},
        }
        tables.append(pa.table(columns))
    return pa.concat_tables(tables)


def print_table(metrics: Mapping[str, Any]) -> None:
    """Prints the rows of `metrics.json` as a table."""
    import rich.box
    import rich.console
    import rich.table

    shown = [name for name in metrics["rows"][0]["metrics"] if not name.startswith("ndcg@")]
    headline = next((name for name in metrics["rows"][0]["metrics"] if name.startswith("ndcg@")), "mrr")
    if headline not in shown:
        shown.insert(-1, headline)
    cut = f", lists of {metrics['depth']:,}" if metrics["depth"] < metrics["items"] else ""
    table = rich.table.Table(
        title=f"{metrics['dataset']}, {metrics['split']}: {metrics['users']:,} users, {metrics['items']:,} items{cut}; "
        f"ties: {metrics['ties']}",
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("ranking", no_wrap=True)
    for name in shown:
        table.add_column(name.replace("recall", "R").upper(), justify="right", no_wrap=True)
        if name == headline:
            table.add_column(f"{metrics['bootstrap']['level']:.0%} interval", no_wrap=True)
    for row in metrics["rows"]:
        cells = []
        for name in shown:
            cells.append(f"{row['metrics'][name]:.4f}".removeprefix("0"))
            if name == headline:
                cells.append("–".join(f"{bound:.4f}".removeprefix("0") for bound in row["interval"][name]))
        style = {"calrec": "bold", ORACLE: "dim"}.get(row["kind"])
        table.add_row(row["name"], *cells, style=style)
    rich.console.Console().print(table)
