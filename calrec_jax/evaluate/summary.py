"""From places to numbers: `metrics.json` and `per_user.parquet`.

Notable: every number is over the same users, the population; what a row lacks is a miss. A slice without users keeps
its place, without numbers.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from calrec_jax.errors import CalrecError
from calrec_jax.evaluate import bootstrap
from calrec_jax.evaluate.beyond import Catalogue, beyond_hits
from calrec_jax.evaluate.metrics import TIES, headline, metric_names, per_user_metrics
from calrec_jax.evaluate.places import AS_IT_STANDS, VIEWS, Places, Targets
from calrec_jax.evaluate.slices import Slice

BASELINE, CALREC, OTHER, ORACLE = "baseline", "calrec", "other", "oracle"
COMPARED_VIEWS = (AS_IT_STANDS, "history_left_out")


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
      name: of the ranking.
      kind: "baseline", "calrec" (made by the line), "other" (a ranking made by others) or "oracle".
      places: where it puts the targets.
      facts: what else `metrics.json` says of it: what its settings leave out, what of a file could not be matched.
    """

    name: str
    kind: str
    places: Places
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Summary:
    """The numbers of all rows.

    Attributes:
      targets: what was asked.
      rows: of the table.
      population: rows of `targets` that count, ascending.
      names: of the metrics.
      headline: the one that slices show and the terminal gives an interval of.
    """

    def __init__(self, rows: Sequence[Row], targets: Targets, settings: Mapping[str, Any]):
        """Computes every user's metrics.

        Raises:
          CalrecError: nobody counts.
        """
        self.rows, self.targets, self._settings = rows, targets, settings
        cutoffs = [settings[name] for name in ("cutoffs", "ndcg_cutoffs", "mrr_cutoffs")]
        self.names = metric_names(*cutoffs)
        self.headline = headline(self.names)
        self._cutoffs = cutoffs
        counted = np.ones(len(targets.users), bool)
        if settings["users"] == "ranked":
            counted = np.logical_and.reduce([row.places.listed for row in rows])
        if not counted.any():
            raise CalrecError("no user has a list in every ranking; rank the same users, or set evaluate.users='all'")
        self.population = np.flatnonzero(counted)
        self._values = [self._table(row, settings["ties"], AS_IT_STANDS) for row in rows]

    def _table(self, row: Row, ties: str, view: str) -> np.ndarray:
        """[population, M] metrics."""
        return per_user_metrics(row.places.views[view], ties, *self._cutoffs)[self.population]

    def _bootstrap(self) -> dict[str, Any]:
        return {name: self._settings[name] for name in ("resamples", "seed", "level")}

    def metrics(self, slices: Sequence[Slice], catalogue: Catalogue) -> dict[str, Any]:
        """What `metrics.json` holds of rankings, slices and comparisons."""
        dataset, settings = self.targets.dataset, self._settings
        return {
            "dataset": dataset.name,
            "split": settings["split"],
            "users": len(self.population),
            "population": settings["users"],
            "items": len(dataset.item_ids),
            "depth": min(row.places.ranks.depth for row in self.rows),
            "ties": settings["ties"],
            "headline": self.headline,
            "beyond_cutoff": settings["beyond_cutoff"],
            "targets_in_history": int(self.targets.in_history[self.population].sum()),
            "targets_last_item": int(self.targets.is_last[self.population].sum()),
            "targets_of_shared_text": int((self.targets.twins[self.population] > 0).sum()),
            "bootstrap": self._bootstrap(),
            "rows": [self._row(row, values, catalogue) for row, values in zip(self.rows, self._values, strict=True)],
            "comparisons": self._comparisons(),
            "slices": [self._slice(each) for each in slices],
        }

    def _named(self, values: np.ndarray) -> dict[str, Any]:
        return dict(zip(self.names, values.tolist(), strict=True))

    def _row(self, row: Row, values: np.ndarray, catalogue: Catalogue) -> dict[str, Any]:
        ranks = row.places.ranks
        ties = {way: self._named(self._table(row, way, AS_IT_STANDS).mean(axis=0)) for way in TIES}
        return {
            "name": row.name,
            "kind": row.kind,
            "depth": ranks.depth,
            "users_without_ranking": int((~row.places.listed[self.population]).sum()),
            "targets_not_found": int((~ranks.found[self.population]).sum()),
            "metrics": self._named(values.mean(axis=0)),
            "ties": ties,
            "interval": self._named(bootstrap.intervals(values, **self._bootstrap())),
            "views": {view: self._view(row, view) for view in VIEWS if view != AS_IT_STANDS},
            "beyond": beyond_hits(row.places, self.population, catalogue, self._settings["beyond_cutoff"]),
            **row.facts,
        }

    def _view(self, row: Row, view: str) -> dict[str, Any]:
        """Metrics of a view, and the headline's interval."""
        values = self._table(row, self._settings["ties"], view)
        column = values[:, [self.names.index(self.headline)]]
        interval = bootstrap.intervals(column, **self._bootstrap())[0].tolist()
        return {"metrics": self._named(values.mean(axis=0)), "interval": {self.headline: interval}}

    def _comparisons(self) -> list[dict[str, Any]]:
        """Each ranking that is no baseline against each baseline; p-values corrected within a metric and a view."""
        ours = [number for number, row in enumerate(self.rows) if row.kind in (CALREC, OTHER)]
        baselines = [number for number, row in enumerate(self.rows) if row.kind == BASELINE]
        found = []
        for view in COMPARED_VIEWS:
            tables = self._values
            if view != AS_IT_STANDS:
                tables = [self._table(row, self._settings["ties"], view) for row in self.rows]
            for column, name in enumerate(self.names):
                if view != AS_IT_STANDS and name != self.headline:
                    continue
                family = [
                    (a, b, bootstrap.paired(tables[a][:, column], tables[b][:, column], **self._bootstrap()))
                    for a in ours
                    for b in baselines
                ]
                adjusted = bootstrap.holm([each.p for _, _, each in family])
                found += [
                    {"view": view, "metric": name, "a": self.rows[a].name, "b": self.rows[b].name,
                     "difference": each.difference, "interval": list(each.interval), "p": each.p, "p_holm": p}
                    for (a, b, each), p in zip(family, adjusted.tolist(), strict=True)
                ]  # fmt: skip
        return found

    def _slice(self, each: Slice) -> dict[str, Any]:
        groups = [
            {"name": name, "users": int(inside[self.population].sum()), "rows": self._group(inside[self.population])}
            for name, inside in each.groups.items()
        ]
        return {"name": each.name, "meaning": each.meaning, "groups": groups}

    def _group(self, inside: np.ndarray) -> dict[str, Any]:
        """Metrics and the headline's interval of each row over some users; nothing where there are none."""
        if not inside.any():
            return {}
        at = self.names.index(self.headline)
        rows = {}
        for row, values in zip(self.rows, self._values, strict=True):
            interval = bootstrap.intervals(values[inside][:, [at]], **self._bootstrap())[0].tolist()
            rows[row.name] = {
                "metrics": self._named(values[inside].mean(axis=0)),
                "interval": {self.headline: interval},
            }
        return rows

    def per_user(self) -> pa.Table:
        """A row a user and ranking; ranks are null for a miss, and columns of another view begin with its name."""
        user_ids = self.targets.dataset.user_ids[self.targets.users[self.population]]
        tables = []
        for row, metrics in zip(self.rows, self._values, strict=True):
            columns = {
                "user_id": pa.array(user_ids, pa.string()),
                "name": pa.array([row.name] * len(user_ids), pa.string()),
            }
            for view, ranks in row.places.views.items():
                before = "" if view == AS_IT_STANDS else f"{view}_"
                miss = ~ranks.found[self.population]
                for way in ("optimistic", "pessimistic"):
                    own = getattr(ranks, way)[self.population]
                    columns[f"{before}rank_{way}"] = pa.array(own, pa.int64(), mask=miss)
            columns |= {name: pa.array(metrics[:, column]) for column, name in enumerate(self.names)}
            tables.append(pa.table(columns))
        return pa.concat_tables(tables)
