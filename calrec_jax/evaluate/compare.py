"""The verb `compare`: the reports of several runs side by side, paired by user.

A run is named `RUN`, or `NAME=RUN,RUN,…` for one configuration run with several seeds: the group's numbers are then
the mean and the standard deviation over its runs, and a user's rows of all its runs stay together in every resample
and test.

Notable: runs are compared only where every user, target and setting of the metrics is the same; what differs is named.
The first group is the reference; each ranking of the others is compared with the ranking of the same name in it, or,
where the reference has only one, with that. Baselines are the same in all runs; they are shown once.
"""

import dataclasses
import difflib
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from calrec_jax import artifacts
from calrec_jax.errors import CalrecError
from calrec_jax.evaluate import bootstrap
from calrec_jax.evaluate.metrics import headline
from calrec_jax.evaluate.places import AS_IT_STANDS, VIEWS
from calrec_jax.evaluate.side_by_side import common_slices, curves
from calrec_jax.layout import RunLayout

KIND = "report"
# Settings of a report that its numbers depend on; the others (baselines, what the page shows) may differ.
_SAME_SETTINGS = ("split", "cutoffs", "ndcg_cutoffs", "mrr_cutoffs", "ties", "users")
_MOST_LINES = 60  # of differing config lines that are shown of a run


@dataclasses.dataclass(frozen=True)
class Report:
    """A run's report, read back.

    Attributes:
      folder: of the report.
      run: its folder as the user named it.
      metrics: of `metrics.json`.
      settings: of the report.
      config: gin's operative config, lines.
      users: [U] user ids, ascending.
      values: row name to [U, M] metrics, users ascending.
    """

    folder: pathlib.Path
    run: str
    metrics: dict[str, Any]
    settings: dict[str, Any]
    config: list[str]
    users: np.ndarray
    values: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one configuration: a name and a report a seed."""

    name: str
    reports: list[Report]


def parse_groups(arguments: Sequence[str]) -> dict[str, list[pathlib.Path]]:
    """Name of each group to its run folders, from arguments `RUN` and `NAME=RUN,RUN,…`.

    Raises:
      CalrecError: fewer than two runs, a run named twice, or two groups of one name.
    """
    groups: dict[str, list[pathlib.Path]] = {}
    for argument in arguments:
        name, equals, runs = argument.partition("=")
        if pathlib.Path(argument).exists() or not equals:
            name, runs = pathlib.Path(argument).resolve().name, argument
            paths = [pathlib.Path(argument)] if pathlib.Path(argument).exists() else runs.split(",")
        else:
            paths = runs.split(",")
        if name in groups:
            raise CalrecError(f"two runs would be named {name!r}; name one, as in other={runs}")
        groups[name] = [pathlib.Path(path).expanduser() for path in paths if str(path)]
    every = [path.resolve() for paths in groups.values() for path in paths]
    if len(every) < 2:
        raise CalrecError("calrec compare needs two runs or more, for example: calrec compare runs/a runs/b")
    twice = [path for path in every if every.count(path) > 1]
    if twice:
        raise CalrecError(f"{twice[0]} is named twice; compare different runs")
    return groups


def compare(
    groups: dict[str, list[pathlib.Path]],
    out: pathlib.Path,
    *,
    split: str = "test",
    resamples: int = bootstrap.RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Compares runs and writes `out/compare.json` and `out/compare.html`.

    Args:
      groups: name to run folders, the reference first; see `parse_groups`.
      out: folder of both files; what is there is replaced.
      split: whose reports are compared.
      resamples: of intervals and tests.
      level: coverage of the intervals.
      seed: of the resamples.

    Returns:
      What `compare.json` holds.

    Raises:
      CalrecError: a run has no report, a report's files were changed, or the reports are not of the same dataset,
        split, users and settings.
    """
    from calrec_jax.evaluate.report import render_page, write_page

    loaded = [Group(name, [_read(path, split) for path in paths]) for name, paths in groups.items()]
    _check_same([report for group in loaded for report in group.reports])
    first = loaded[0].reports[0]
    draws = {"resamples": resamples, "seed": seed, "level": level}
    names = list(first.metrics["rows"][0]["metrics"])
    found = {
        **{key: first.metrics[key] for key in ("dataset", "split", "users", "items", "depth", "ties", "population")},
        "headline": headline(names),
        "bootstrap": draws,
        "groups": [
            {"name": group.name, "runs": [report.run for report in group.reports],
             "config": _config_differences(loaded[0].reports[0], group.reports[0]),
             "within": [_config_differences(group.reports[0], other) for other in group.reports[1:]]}
            for group in loaded
        ],
        "rows": [row for group in loaded for row in _rows(group, names, draws)] + _baselines(loaded, names),
        "comparisons": _comparisons(loaded, names, draws),
        "slices": _slices(loaded),
        "training": _curves(loaded),
        "made_from": {report.run: artifacts.read_manifest(report.folder, kind=KIND)["hash"]
                      for group in loaded for report in group.reports},
    }  # fmt: skip
    out = pathlib.Path(out)
    artifacts.write_json(out / "compare.json", found)
    title = f"{found['dataset']}, {split}: {', '.join(groups)} compared"
    scripts = ("dom.js", "charts.js", "results.js", "analysis.js", "training.js", "compare.js")
    write_page(out / "compare.html", render_page("compare.html", scripts, found["dataset"], title, found))
    return found


def _read(run: pathlib.Path, split: str) -> Report:
    """The report in a run folder, or that folder itself where it is a report."""
    folder = run if (run / "per_user.parquet").exists() else RunLayout(run).report(split)
    manifest = artifacts.read_manifest(folder, kind=KIND)
    artifacts.check_files(folder, manifest)
    metrics = artifacts.read_json(folder / "metrics.json")
    if metrics["split"] != split:
        raise CalrecError(f"{folder} evaluates the split {metrics['split']!r}, not {split!r}; set --split")
    table = pq.read_table(folder / "per_user.parquet")
    names = list(metrics["rows"][0]["metrics"])
    ids, rows = np.array(table["user_id"].to_pylist(), object), np.array(table["name"].to_pylist(), object)
    values = {}
    for row in metrics["rows"]:
        own = np.flatnonzero(rows == row["name"])
        own = own[np.argsort(ids[own].astype(str), kind="stable")]
        users = ids[own]
        values[row["name"]] = np.stack([table[name].to_numpy()[own] for name in names], axis=1)
    config = [line for line in manifest["gin"].splitlines() if line.strip() and not line.startswith("#")]
    return Report(folder, str(run), metrics, manifest["settings"], config, users, values)


def _check_same(reports: Sequence[Report]) -> None:
    """Refuses reports whose numbers are not of the same users and targets."""
    first = reports[0]
    for other in reports[1:]:
        wrong = []
        ours, theirs = (report.metrics["made_from"]["dataset"] for report in (first, other))
        if ours != theirs:
            wrong.append(
                f"their datasets differ ({first.metrics['dataset']} {ours[:8]} and "
                f"{other.metrics['dataset']} {theirs[:8]})"
            )
        for name in _SAME_SETTINGS:
            if first.settings.get(name) != other.settings.get(name):
                wrong.append(f"evaluate.{name} is {first.settings.get(name)!r} and {other.settings.get(name)!r}")
        if not wrong and not np.array_equal(first.users, other.users):
            wrong.append(f"they evaluate different users ({len(first.users):,} and {len(other.users):,})")
        if wrong:
            raise CalrecError(
                f"{first.run} and {other.run} cannot be compared: {'; '.join(wrong)}; "
                "evaluate both alike, from one dataset"
            )


def _ours(group: Group) -> list[str]:
    """Rankings, baselines and the oracle aside, that every run of a group has."""
    rows = [row["name"] for row in group.reports[0].metrics["rows"] if row["kind"] in ("calrec", "other")]
    return [name for name in rows if all(name in report.values for report in group.reports)]


def _stacked(group: Group, name: str) -> tuple[np.ndarray, np.ndarray]:
    """[seeds · U, M] values of a ranking in all runs of a group, and the user of each row."""
    values = np.concatenate([report.values[name] for report in group.reports])
    return values, np.tile(np.arange(len(group.reports[0].users)), len(group.reports))


def _rows(group: Group, names: list[str], draws: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name in _ours(group):
        values, users = _stacked(group, name)
        each = [report.values[name].mean(axis=0) for report in group.reports]
        deviation = np.std(each, axis=0, ddof=1) if len(each) > 1 else None
        bounds = bootstrap.intervals(values, users=users, **draws)
        own = [next(row for row in report.metrics["rows"] if row["name"] == name) for report in group.reports]
        views = {
            view: {
                "metrics": {k: statistics.fmean(row["views"][view]["metrics"][k] for row in own) for k in names},
                "interval": own[0]["views"][view]["interval"] if len(own) == 1 else {},
            }
            for view in VIEWS
            if view != AS_IT_STANDS
        }
        rows.append(
            {
                "name": f"{group.name}: {name}",
                "kind": own[0]["kind"],
                "group": group.name,
                "ranking": name,
                "seeds": len(each),
                "metrics": dict(zip(names, values.mean(axis=0).tolist(), strict=True)),
                "deviation": None if deviation is None else dict(zip(names, deviation.tolist(), strict=True)),
                "interval": dict(zip(names, bounds.tolist(), strict=True)),
                "views": views,
            }
        )
    return rows


def _baselines(groups: Sequence[Group], names: list[str]) -> list[dict[str, Any]]:
    """Baselines of all runs, each name once; where runs give one name other numbers, each of them with its run."""
    kept: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for group in groups:
        for report in group.reports:
            for row in report.metrics["rows"]:
                own = kept.setdefault(row["name"], [])
                if row["kind"] in ("baseline", "oracle") and all(
                    row["metrics"] != there["metrics"] for _, there in own
                ):
                    own.append((report.run, row))
    shown = ("kind", "metrics", "interval", "views")
    return [
        {
            "name": name if len(own) == 1 else f"{name} ({run})",
            **{key: row[key] for key in shown},
            "seeds": 1,
            "deviation": None,
        }
        for name, own in kept.items()
        for run, row in own
    ]  # fmt: skip


def _slices(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Slices of the rows of `_rows`, then of the first run's baselines."""
    reports = [report for group in groups for report in group.reports]
    index = {id(report): place for place, report in enumerate(reports)}
    ours = [(f"{group.name}: {name}", [(index[id(report)], name) for report in group.reports])
            for group in groups for name in _ours(group)]  # fmt: skip
    baselines = [(row["name"], [(0, row["name"])])
                 for row in reports[0].metrics["rows"] if row["kind"] in ("baseline", "oracle")]  # fmt: skip
    return common_slices([report.metrics for report in reports], ours + baselines)


def _curves(groups: Sequence[Group]) -> list[dict[str, Any]]:
    from calrec_jax.evaluate.run import training_of

    return curves(
        [(group.name, [(report.run, training_of(report.folder.parent)) for report in group.reports])
         for group in groups]
    )  # fmt: skip


def _comparisons(groups: Sequence[Group], names: list[str], draws: dict[str, Any]) -> list[dict[str, Any]]:
    """Rankings of the other groups against the reference's; Holm within a metric."""
    reference = groups[0]
    own = _ours(reference)
    pairs = [
        (group, name, name if name in own else own[0])
        for group in groups[1:]
        for name in _ours(group)
        if name in own or len(own) == 1
    ]
    found = []
    for column, metric in enumerate(names):
        family = [(group, a, b, _paired(group, a, reference, b, column, draws)) for group, a, b in pairs]
        adjusted = bootstrap.holm([each.p for *_, each in family]).tolist()
        found += [
            {"view": AS_IT_STANDS, "metric": metric, "a": f"{group.name}: {a}", "b": f"{reference.name}: {b}",
             "difference": each.difference, "interval": list(each.interval), "p": each.p, "p_holm": p}
            for (group, a, b, each), p in zip(family, adjusted, strict=True)
        ]  # fmt: skip
    return found


def _paired(group: Group, a: str, reference: Group, b: str, column: int, draws: dict[str, Any]) -> bootstrap.Paired:
    """By user: each one's mean over the runs of either group, so that the numbers of seeds may differ."""
    means = [
        np.mean([report.values[name][:, column] for report in side.reports], axis=0)
        for side, name in ((group, a), (reference, b))
    ]
    return bootstrap.paired(*means, **draws)


def _config_differences(one: Report, other: Report) -> list[str]:
    """Lines of the operative configs that differ, − the first's, + the other's; folders and seeds, too."""
    lines = [line for line in difflib.unified_diff(one.config, other.config, lineterm="", n=0)
             if line[:1] in "+-" and line[:3] not in ("+++", "---")]  # fmt: skip
    return lines[:_MOST_LINES] + ([f"… and {len(lines) - _MOST_LINES} more lines"] if len(lines) > _MOST_LINES else [])


def print_comparison(found: dict[str, Any]) -> None:
    """Prints rows and comparisons."""
    import rich.box
    import rich.console
    import rich.table

    from calrec_jax.evaluate.terminal import label, number, p_value

    main = found["headline"]
    names = [name for name in found["rows"][0]["metrics"] if not name.startswith("ndcg@") or name == main]
    table = rich.table.Table(
        title=f"{found['dataset']}, {found['split']}: {found['users']:,} users; several seeds: mean ± deviation",
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("ranking")
    for name in names:
        table.add_column(label(name, found["depth"], found["items"]), justify="right", no_wrap=True)
    for row in found["rows"]:
        cells = [number(row["metrics"][name]) + (f" ±{number(row['deviation'][name])}" if row["deviation"] else "")
                 for name in names]  # fmt: skip
        table.add_row(row["name"], *cells)
    console = rich.console.Console()
    console.print(table)
    for each in found["comparisons"]:
        if each["metric"] == main:
            low, high = each["interval"]
            console.print(
                f"{each['a']} against {each['b']}: {label(main, 1, 1)} {each['difference']:+.4f} "
                f"({low:+.4f} to {high:+.4f}), p {p_value(each['p_holm'], found['bootstrap']['resamples'])} after Holm",
                highlight=False,
            )
