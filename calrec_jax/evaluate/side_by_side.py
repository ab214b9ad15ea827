"""What the page of a comparison shows beside the paired table: slices and training curves of several runs."""

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def common_slices(
    reports: Sequence[Mapping[str, Any]], rows: Sequence[tuple[str, Sequence[tuple[int, str]]]]
) -> list[dict[str, Any]]:
    """Slices that all reports have with the same groups and the same numbers of users.

    Args:
      reports: `metrics.json` of each run, all of the same users.
      rows: name of a row and where it is from: indices into `reports` and its name there, one a seed.

    Returns:
      In the form of `metrics.json`. The metrics of several seeds are their mean; their interval is None, as one run's
      would not be that of the mean.
    """
    by_run = [{each["name"]: each for each in report.get("slices", [])} for report in reports]
    return [
        {
            "name": name,
            "meaning": first["meaning"],
            "groups": [
                {"name": group["name"], "users": group["users"], "rows": _rows_of(by_run, name, place, rows)}
                for place, group in enumerate(first["groups"])
            ],
        }
        for name, first in (by_run[0].items() if by_run else ())
        if all(name in own and _sizes(own[name]) == _sizes(first) for own in by_run)
    ]


def _sizes(each: Mapping[str, Any]) -> list[tuple[str, int]]:
    return [(group["name"], group["users"]) for group in each["groups"]]


def _rows_of(
    by_run: Sequence[Mapping[str, Any]],
    name: str,
    place: int,
    rows: Sequence[tuple[str, Sequence[tuple[int, str]]]],
) -> dict[str, Any]:
    found = {}
    for row, sources in rows:
        own = [by_run[run][name]["groups"][place]["rows"].get(there) for run, there in sources]
        if not own or not all(own):  # an empty group holds no rows
            continue
        found[row] = {
            "metrics": {key: statistics.fmean(each["metrics"][key] for each in own) for key in own[0]["metrics"]},
            "interval": own[0]["interval"] if len(own) == 1 else None,
        }
    return found


def curves(groups: Sequence[tuple[str, Sequence[tuple[str, Mapping[str, pathlib.Path]]]]]) -> list[dict[str, Any]]:
    """Training curves of each run that has some.

    Args:
      groups: name of a group, and of each of its runs the name and the folders of its stages by stage.
    """
    from calrec_jax.evaluate.report import read_stage

    return [
        {"group": group, "run": run, "stages": [read_stage(name, path) for name, path in stages.items()]}
        for group, runs in groups
        for run, stages in runs
        if stages
    ]
