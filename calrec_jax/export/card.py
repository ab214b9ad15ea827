"""The model card of an export: what the model was made from, how, how well it does, and under whose terms.

Notable: nothing in it is typed in but licences; the rest is read from the run's manifests, and a metric is in it only
where its ranking came, hash by hash, from the very checkpoint that is exported.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from calrec_jax import __version__, artifacts
from calrec_jax.errors import CalrecError

CARD_FILE, README_FILE = "model_card.json", "README.md"
VERSION = 1  # of the card's fields
_SOURCE = "https://arxiv.org/abs/2405.02429"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a run's parts lie, as far as the card tells of them.

    Attributes:
      stages: folders of the training stages in order, the one that is exported last.
      datasets: folders of the datasets of these stages.
      rankings: name to (folder of the ranking, folder of its completions).
      report: folder of the report.
    """

    stages: Sequence[pathlib.Path]
    datasets: Sequence[pathlib.Path] = ()
    rankings: Mapping[str, tuple[pathlib.Path, pathlib.Path]] = dataclasses.field(default_factory=dict)
    report: pathlib.Path | None = None


def make_card(
    origin: Origin,
    facts: Mapping[str, Any],
    *,
    parameters: int,
    licence: str | None,
    base_model: str | None,
    base_licence: str | None,
) -> dict[str, Any]:
    """The fields of `model_card.json`.

    Args:
      origin: of the model.
      facts: of the exported checkpoint, as `load_checkpoint` gives them.
      parameters: how many the model has.
      licence: of the model, as its owner states it.
      base_model: the name of the language model that training began with.
      base_licence: of that model.

    Raises:
      CalrecError: training began with a model whose name and licence are not said, or a part of the run is not whole.
    """
    stages = [_stage(folder) for folder in origin.stages]
    began_with = stages[0]["made_from"].get("checkpoint")
    if began_with is not None and not (base_model and base_licence):
        raise CalrecError(
            f"{origin.stages[0]} began with another model ({began_with[:8]}), whose terms go with every export: set "
            "export.base_model and export.base_licence"
        )
    if began_with is None and (base_model or base_licence):
        raise CalrecError(
            f"export.base_model and export.base_licence are set, but {origin.stages[0]} was trained from scratch"
        )
    base = {"name": base_model, "licence": base_licence, "checkpoint": began_with} if began_with else None
    return {
        "version": VERSION,
        "method": _SOURCE,
        "licence": licence,
        "base_model": base,
        "model": facts["settings"]["model"] if "settings" in facts else None,
        "parameters": parameters,
        "stages": stages,
        "exported": {"stage": origin.stages[-1].name, "step": facts["step"]},
        "data": [_data(folder) for folder in origin.datasets],
        "metrics": _metrics(origin, facts["hash"]),
        "hashes": {
            "checkpoint": facts["hash"],
            "tokenizer": facts["tokenizer"],
            "template": facts["template"],
            "datasets": facts["datasets"],
        },
        "made_by": {"calrec_jax": __version__, "jax": jax.__version__},
    }


def _stage(folder: pathlib.Path) -> dict[str, Any]:
    manifest = artifacts.read_manifest(folder, kind="checkpoint")
    names = ("best_step", "last_step", "best_validation_loss")
    return {
        "name": folder.name,
        "hash": manifest["hash"],
        "made_from": manifest["made_from"],
        "settings": manifest["settings"],
        **{name: manifest.get(name) for name in names},
    }


def _data(folder: pathlib.Path) -> dict[str, Any]:
    manifest = artifacts.read_manifest(folder, kind="dataset")
    card = artifacts.read_json(folder / "data_card.json") if (folder / "data_card.json").exists() else {}
    wanted = ("users", "items", "interactions", "first_day", "last_day")
    statistics = card.get("statistics") or {}
    return {
        "name": manifest["name"],
        "hash": manifest["hash"],
        "statistics": {name: statistics[name] for name in wanted if name in statistics},
        "split": card.get("split"),
        "sources": card.get("sources"),
    }


def _metrics(origin: Origin, checkpoint: str) -> dict[str, Any] | None:
    """What the report says of the rankings made from this checkpoint; None where there are none."""
    report = origin.report
    if report is None or not (report / artifacts.MANIFEST).exists():
        return None
    found = artifacts.read_json(report / "metrics.json")
    own = [name for name, folders in origin.rankings.items() if _is_from(checkpoint, name, folders, found)]
    rows = [row for row in found["rows"] if row["name"] in own]
    if not rows:
        return None
    names = ("dataset", "split", "users", "population", "items", "ties")
    return {
        **{name: found[name] for name in names},
        "report": artifacts.read_manifest(report, kind="report")["hash"],
        "rows": [{name: row[name] for name in ("name", "metrics", "interval")} for row in rows],
        "baselines": {row["name"]: row["metrics"] for row in found["rows"] if row["kind"] == "baseline"},
    }


def _is_from(checkpoint: str, name: str, folders: tuple[pathlib.Path, pathlib.Path], found: Mapping[str, Any]) -> bool:
    ranking, completions = folders
    if not all((folder / artifacts.MANIFEST).exists() for folder in folders):
        return False
    ranked = artifacts.read_manifest(ranking, kind="ranking")
    decoded = artifacts.read_manifest(completions, kind="completions")
    return (
        found["made_from"].get(f"ranking {name}") == ranked["hash"]
        and ranked["made_from"].get("completions") == decoded["hash"]
        and decoded["made_from"]["checkpoint"] == checkpoint
    )


def readme(card: Mapping[str, Any], use: str) -> str:
    """The card for people, in Markdown; `use` says how the export is loaded."""
    lines = ["---", "library_name: calrec_jax"]
    lines += [f"license: {card['licence']}"] if card["licence"] else []
    lines += ["tags: [recommendation]", "---", "", "# A CALRec model", ""]
    lines += [
        "It reads a user's purchases as text and writes the next item "
        f"([Li et al., 2024]({card['method']})): a decoder of {card['parameters']:,} parameters, stage "
        f"`{card['exported']['stage']}`, step {card['exported']['step']}.",
        "",
        use.strip(),
        "",
        "## Licence",
        "",
        f"Of this model: {card['licence'] or 'not stated; ask whoever gave it to you'}.",
    ]
    base = card["base_model"]
    if base is None:
        lines.append("It was trained from scratch: there is no base model.")
    else:
        lines.append(f"Its base model is {base['name']}, licence: {base['licence']}.")
    lines += ["", "## Data", "", "| dataset | users | items | purchases | split | hash |", "|---|---|---|---|---|---|"]
    for data in card["data"]:
        counts = (f"{data['statistics'][k]:,}" if k in data["statistics"] else "" for k in _COUNTS)
        split = (data["split"] or {}).get("kind", "")
        lines.append(f"| {data['name']} | {' | '.join(counts)} | {split} | `{data['hash'][:12]}` |")
    lines += [
        "",
        "## Training",
        "",
        "| stage | steps | best step | validation loss | datasets |",
        "|---|---|---|---|---|",
    ]
    for stage in card["stages"]:
        names = [role.removeprefix("dataset/") for role in stage["made_from"] if role.startswith("dataset/")]
        loss = stage["best_validation_loss"]
        lines.append(
            f"| {stage['name']} | {stage['last_step']} | {stage['best_step']} | "
            f"{'' if loss is None else f'{loss:.4f}'} | {', '.join(names)} |"
        )
    lines += ["", "## Metrics", ""]
    metrics = card["metrics"]
    if metrics is None:
        lines.append("The run has no report of rankings made from this checkpoint.")
    else:
        lines += _metrics_table(metrics)
    hashes = card["hashes"]
    lines += ["", "## Made from", ""]
    lines += [f"- {name}: `{hashes[name]}`" for name in ("checkpoint", "tokenizer", "template")]
    lines += [f"- dataset {data['name']}: `{data['hash']}`" for data in card["data"]]
    made_by = ", ".join(f"{name} {version}" for name, version in card["made_by"].items())
    lines += [f"- by {made_by}", ""]
    return "\n".join(lines)


_COUNTS = ("users", "items", "interactions")
_SHOWN = ("recall@1", "recall@10", "ndcg@10", "mrr")


def _metrics_table(metrics: Mapping[str, Any]) -> list[str]:
    """A row a ranking, with its interval, and the baselines below."""
    lines = [
        f"{metrics['dataset']}, {metrics['split']} split, {metrics['users']:,} users, the whole catalogue of "
        f"{metrics['items']:,} items ranked.",
        "",
        f"| ranking | {' | '.join(_SHOWN)} |",
        f"|---|{'---|' * len(_SHOWN)}",
    ]
    for row in metrics["rows"]:
        cells = []
        for name in _SHOWN:
            low, high = row["interval"][name]
            cells.append(f"{row['metrics'][name]:.4f} ({low:.4f} to {high:.4f})")
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    for name, values in metrics["baselines"].items():
        lines.append(f"| {name} (baseline) | {' | '.join(f'{values[metric]:.4f}' for metric in _SHOWN)} |")
    return lines
