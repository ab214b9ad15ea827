"""`report.html`: one file that opens offline, from `metrics.json` and the artefacts behind it.

The page is a template, a style sheet and a few small scripts (`page/`), all written into the file, with the data as
JSON in a script element that is never executed, and the single users' as compressed JSON in another. The scripts build
every element with `createElement` and text nodes: a title is text, whatever is in it. A content security policy allows
the page its own style and script, by hash, and no network. The bytes depend on the inputs alone: no date, no path.
"""

import base64
import gzip
import hashlib
import html
import importlib.resources
import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from calrec_jax import artifacts
from calrec_jax.data.dataset import SPLITS, Dataset
from calrec_jax.errors import CalrecError
from calrec_jax.evaluate import showcase

REPORT_FILE = "report.html"
_SHARED_SCRIPTS = ("dom.js", "charts.js", "results.js")
_SCRIPTS = (*_SHARED_SCRIPTS, "analysis.js", "training.js", "data.js", "users.js", "main.js")
_USERS = ("items", "texts", "users")  # what is compressed
_MOST_POINTS = 300  # of a curve; more are not seen at the width of a plot and make the file large
_FIRST_METRICS = ("loss", "loss_next_item", "loss_user_target", "loss_target_target")
_LAST_METRICS = ("learning_rate", "tokens_per_second")


def write_report(
    out: Path,
    *,
    dataset: Dataset,
    metrics: dict[str, Any],
    rankings: Mapping[str, showcase.Ranking],
    completions: Mapping[str, Path],
    training: Mapping[str, Path],
    run_dir: Path | None = None,
    users: int = 100,
    seed: int = 0,
) -> Path:
    """Writes `out/report.html`.

    Args:
      out: the report's folder, made when missing.
      dataset: the evaluated dataset.
      metrics: what `metrics.json` holds.
      rankings: folder of ranking shards, or a ranking made by others, by the name of its row in `metrics`; may be
        empty.
      completions: folder of completion shards by name; may be empty.
      training: folder of a stage by name, in order; the curves are its `metrics.jsonl`. May be empty.
      run_dir: where `timing.json` is, if there is one; None: the folder above `out`.
      users: how many single users the page shows, at most.
      seed: of the draw of these users.

    Returns:
      The file's path.

    Raises:
      CalrecError: if `metrics` or a setting makes no sense, or shards are broken or of another dataset.
    """
    split = metrics.get("split")
    if split not in SPLITS:
        raise CalrecError(f"metrics.json: split is {split!r}, not one of {list(SPLITS)}. Run `calrec evaluate` again.")
    if not isinstance(metrics.get("rows"), list):
        raise CalrecError("metrics.json has no list `rows`. Run `calrec evaluate` again.")
    if users < 1:
        raise CalrecError(f"users={users}: the report shows at least one user.")
    names = _ranking_order(metrics, rankings)
    drawn = showcase.draw_users(dataset, split, rankings[names[0]] if names else None, users, seed)
    shown = showcase.show_users(dataset, split, drawn, rankings, completions)
    data = {
        "metrics": metrics,
        "dataset": {
            "name": dataset.name,
            "hash": dataset.hash,
            "template": dataset.template,
            "interactions": len(dataset.items),
        },
        "card": dataset.card,
        "training": [read_stage(name, Path(path)) for name, path in training.items()],
        "timing": _read_timing(Path(run_dir or Path(out).parent) / "timing.json"),
        "decoding": [made for name, path in completions.items() if (made := _read_decoding(name, Path(path)))],
        "configs": _read_configs({**training, **completions, **rankings}),
        "rankings": names,
        "sample": {
            "of": len(dataset.users_with(split)),
            "seed": seed,
            "ranking": names[0] if names else None,
        },
        "completions_of": shown["completions_of"],
    }
    path = Path(out) / REPORT_FILE
    page = render_page("report.html", _SCRIPTS, dataset.name, f"{dataset.name}, {split}: CALRec report", data,
                       {name: shown[name] for name in _USERS})  # fmt: skip
    return write_page(path, page)


def write_page(path: Path, page: str) -> Path:
    """Writes a page; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with artifacts.atomic_file(path) as temporary:
        # Text of a data file may hold lone surrogates (JSON allows them); UTF-8 does not.
        temporary.write_bytes(page.encode("utf-8", "replace"))
    return path


def render_page(
    template: str, scripts: Sequence[str], name: str, title: str, data: Mapping[str, Any], packed: Any = None
) -> str:
    """Fills a template of `page/` with style, scripts and data.

    Args:
      template: file name.
      scripts: file names, in order.
      name: heading.
      title: of the window.
      data: as JSON.
      packed: more data, compressed (`pack_json`).
    """
    page = importlib.resources.files("calrec_jax.evaluate") / "page"
    style = "\n" + (page / "report.css").read_text(encoding="utf-8")
    script = "\n" + "\n".join((page / file).read_text(encoding="utf-8") for file in scripts)
    parts = {
        "title": html.escape(title),
        "name": html.escape(name),
        "style": style,
        "style_hash": _content_hash(style),
        "script": script,
        "script_hash": _content_hash(script),
        "data": embed_json(data),
        "packed": pack_json(packed),
    }
    whole = (page / template).read_text(encoding="utf-8")
    # One pass: a marker inside a part stays what it is.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], whole)


def pack_json(value: Any) -> str:
    """JSON, compressed by gzip, in base64: the page unpacks it on opening. The same value gives the same text."""
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), 9, mtime=0)).decode()


def embed_json(value: Any) -> str:
    """JSON that can stand in a script element: no `<`, `>` or `&`, so that nothing in it ends the element.

    Numbers that JSON does not have (NaN, infinities) become null.
    """
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":  # JSON's structure uses none of them: they stand inside strings only
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


def _content_hash(text: str) -> str:
    """A hash source of Content Security Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _ranking_order(metrics: Mapping[str, Any], rankings: Mapping[str, Any]) -> list[str]:
    """Names of the rankings, CALRec's own first, in the order of the table."""
    rows = {row["name"]: (row.get("kind") != "calrec", place) for place, row in enumerate(metrics["rows"])}
    return sorted(rankings, key=lambda name: rows.get(name, (True, len(rows))))


def _records(path: Path) -> Iterator[dict[str, Any] | None]:
    """Lines of a `metrics.jsonl`; None for one that is not a record (a crash may leave half a line)."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            valid = isinstance(record, dict) and isinstance(record.get("step"), int) and "split" in record
            yield record if valid else None


def read_stage(name: str, path: Path) -> dict[str, Any]:
    """Curves of one training stage. A step that was logged twice (a resumed run) counts once, as logged last."""
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        return {"name": name, "missing": "This stage left no metrics.jsonl."}
    values: dict[str, dict[str, dict[int, float]]] = {}
    skipped = 0
    for record in _records(file):
        if record is None:
            skipped += 1
            continue
        for key, value in record.items():
            if (
                key != "step"
                and isinstance(value, int | float)
                and not isinstance(value, bool)
                and math.isfinite(value)
            ):
                values.setdefault(key, {}).setdefault(str(record["split"]), {})[record["step"]] = float(value)
    if not values:
        return {"name": name, "missing": "This stage's metrics.jsonl holds no numbers.", "skipped_lines": skipped}
    longest = max(len(points) for splits in values.values() for points in splits.values())
    speeds = values.get("tokens_per_second", {}).get("train", {})
    return {
        "name": name,
        "last_step": max(step for splits in values.values() for points in splits.values() for step in points),
        "averaged": math.ceil(longest / _MOST_POINTS),
        "skipped_lines": skipped,
        "tokens_per_second": statistics.median(speeds.values()) if speeds else None,
        "metrics": [
            {"name": key, "splits": {split: _curve(values[key][split]) for split in sorted(values[key])}}
            for key in sorted(values, key=_metric_order)
        ],
    }


def _metric_order(key: str) -> tuple[int, int, str]:
    if key in _FIRST_METRICS:
        return 0, _FIRST_METRICS.index(key), key
    if key in _LAST_METRICS:
        return 2, _LAST_METRICS.index(key), key
    return 1, 0, key


def _curve(points: Mapping[int, float]) -> dict[str, Any]:
    """Points by step, means of consecutive ones where there are too many, and the lowest one of all."""
    ordered = sorted(points.items())
    best = min(ordered, key=lambda point: point[1])
    size = math.ceil(len(ordered) / _MOST_POINTS)
    groups = [ordered[begin : begin + size] for begin in range(0, len(ordered), size)]
    shown = [[group[-1][0], float(f"{statistics.fmean(value for _, value in group):.6g}")] for group in groups]
    return {"points": shown, "best": [best[0], best[1]]}


def _read_timing(path: Path) -> list[dict[str, Any]]:
    """Steps and seconds of `timing.json`, as `pipeline.Line` writes them: in the order in which they were first run."""
    if not path.is_file():
        return []
    timing = artifacts.read_json(path)
    steps = timing.get("steps") if isinstance(timing, dict) else None
    if not isinstance(steps, list) or not all(_is_step(step) for step in steps):
        raise CalrecError(f"{path} does not list steps with their seconds. Remove it: the next run writes it again.")
    kept = ("step", "seconds", "device", "device_seconds")
    return [{name: step[name] for name in kept if name in step} for step in steps]


def _read_decoding(name: str, folder: Path) -> dict[str, Any] | None:
    """What the last run of a decode took, as `decode` writes it; None where it did not."""
    if not (folder / "timing.json").is_file():
        return None
    timing = artifacts.read_json(folder / "timing.json")
    return {"name": name, **timing} if isinstance(timing, dict) else None


def _read_configs(folders: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The gin configs in the artefacts' manifests, each once, with the names of those that have it."""
    found: dict[str, list[str]] = {}
    for name, folder in folders.items():
        path = Path(folder) / artifacts.MANIFEST if isinstance(folder, str | Path) else None
        if path is not None and path.is_file():
            found.setdefault(str(artifacts.read_json(path).get("gin", "")), []).append(name)
    return [{"names": names, "gin": text} for text, names in found.items() if text.strip()]


def _is_step(step: Any) -> bool:
    if not isinstance(step, dict) or not isinstance(step.get("step"), str):
        return False
    seconds = step.get("seconds")
    return isinstance(seconds, int | float) and not isinstance(seconds, bool) and math.isfinite(seconds)
