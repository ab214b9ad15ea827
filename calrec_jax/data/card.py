"""The data card: what was read, what each rule did, and what came out; docs/architecture.md lists its fields."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from calrec_jax import __version__
from calrec_jax.data.readers import RawCategory
from calrec_jax.data.sources import Source

VERSION = 2  # of the card's fields


def made_by(engine: str) -> dict[str, str]:
    """The versions that made a dataset; they say how, and change nothing of what came out."""
    return {"calrec_jax": __version__, "engine": engine, "pyarrow": pa.__version__}


def read_facts(
    name: str, files: Mapping[str, Sequence[Source]], raw: RawCategory, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The card's first fields: version, name, settings, sources with hashes, and what became of the lines."""
    return {
        "version": VERSION,
        "name": name,
        "settings": dict(settings),
        "sources": {
            role: [{"file": source.name, "bytes": source.size, "sha256": source.sha256} for source in found]
            for role, found in files.items()
        },
        "lines": {"reviews": raw.reviews.to_json(), "metadata": raw.metadata.to_json()},
    }


def summary(card: Mapping[str, Any]) -> list[str]:
    """The card's main lines, as `calrec prepare` prints them; fields that the card lacks are left out."""
    lines = [_read_line(role, counts) for role, counts in card.get("lines", {}).items()]
    for rule in card.get("rules", [])[1:]:
        gone = rule["interactions_in"] - rule["interactions_out"]
        lines.append(f"dropped {gone:,} of {rule['interactions_in']:,} interactions: {rule['rule']}")
    statistics, split, catalogue = (card.get(name) for name in ("statistics", "split", "catalogue"))
    if statistics and catalogue:
        lines.append(
            f"{statistics['users']:,} users, {statistics['items']:,} items bought ({catalogue['items']:,} in the "
            f"catalogue), {statistics['interactions']:,} interactions, density {statistics['density']:.2e}; "
            f"{statistics['length_mean']:.1f} purchases a user (median {statistics['length_median']:g})"
        )
        lines.append(
            f"{statistics['first_day']} to {statistics['last_day']}; {statistics['tied_share']:.1%} of purchases are "
            f"as old as the one before, {statistics['repeats_share']:.1%} are repeats"
        )
    if split:
        lines.append(
            f"split {split['kind']}: {split['train_interactions']:,} training purchases, targets of "
            f"{split['validation_users']:,} users for validation and {split['test_users']:,} for test"
        )
    lines += [_leakage_line(card["leakage"])] if card.get("leakage", {}).get("test") else []
    return lines


def _read_line(role: str, counts: Mapping[str, Any]) -> str:
    bad, dropped = sum(counts["quarantined"].values()), sum(counts["dropped"].values())
    return f"{role}: {counts['lines']:,} lines, {counts['kept']:,} kept, {dropped:,} dropped, {bad:,} quarantined"


def _leakage_line(leakage: Mapping[str, Any]) -> str:
    test, overlap = leakage["test"], leakage["global_time"]
    return (
        f"test targets: {test['tied_targets_share']:.1%} as old as the purchase before, "
        f"{test['targets_in_training_share']:.1%} in the user's training purchases; "
        f"{overlap['later_pairs_share']:.1%} of training purchases are later than a test target"
    )
