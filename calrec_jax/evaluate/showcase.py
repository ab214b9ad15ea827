"""The users that the report shows: drawn by seed, half hits and half misses, each with all that the line made of them.

Only the drawn users' rows are kept in memory. The place of a target is computed from the ranking's scores, so that ties
are seen: a target that shares its score stands at ranks ``first`` to ``last``. Items and texts are written once and
named by number, so that 10,000 users fit into a page of a few megabytes (`report.pack_json`).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from calrec_jax import artifacts
from calrec_jax.data.dataset import Dataset
from calrec_jax.errors import CalrecError
from calrec_jax.evaluate.foreign import ForeignRanking
from calrec_jax.rank.shards import RankedLists, RankingReader

HIT_CUT = 10  # a hit has its target among the first ten (mean rank)
TOP = 10  # items of a ranking that are shown
HISTORY_CAP = 50  # latest purchases of a history that are shown
TITLE_CAP = 240  # characters
COMPLETION_CAP = 400  # characters
COMPLETIONS_CAP = 12  # most probable distinct texts of a user that are shown; the target's besides

Ranking = Path | ForeignRanking


def _rows(
    folder: Path, columns: list[str], dataset: Dataset, users: np.ndarray
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (user, row) of the shards' rows of `users`."""
    files = sorted(str(file) for file in Path(folder).glob(artifacts.SHARDS))
    if not files:
        raise CalrecError(f"{folder} has no part-*.parquet; run the step that makes it again")
    wanted = pc.field("user_id").isin(pa.array(dataset.user_ids[users], pa.string()))
    index = {dataset.user_ids[user]: user for user in users.tolist()}
    try:
        shards = pads.dataset(files, format="parquet")
        missing = [name for name in columns if name not in shards.schema.names]
        if missing:
            raise CalrecError(f"{folder}: the shards lack the columns {missing}; run the step that makes them again")
        for batch in shards.scanner(columns=["user_id", *columns], filter=wanted).to_batches():
            for row in batch.to_pylist():
                yield index[row["user_id"]], row
    except (pa.ArrowInvalid, OSError) as error:
        raise CalrecError(f"{folder}: a shard cannot be read as Parquet ({error}); run the step again") from error


def target_places(block: RankedLists, targets: np.ndarray) -> np.ndarray:
    """First and last rank of each target among the items of its score.

    Args:
      block: B ranked lists.
      targets: [B] item indices.

    Returns:
      [B, 2] int64; 0 where the list does not reach the target.
    """
    is_target = block.items == targets[:, None]
    found = is_target.any(axis=1)
    score = np.where(found, np.where(is_target, block.scores, -np.inf).max(axis=1, initial=-np.inf), np.nan)[:, None]
    above = (block.scores > score).sum(axis=1)
    same = (block.scores == score).sum(axis=1)
    lowest = block.scores[np.arange(len(targets)), np.maximum(block.lengths - 1, 0)]
    same = same + np.where(lowest == score[:, 0], block.ties_beyond_depth, 0)
    return np.where(found[:, None], np.stack([above + 1, above + same], axis=1), 0)


def _blocks(ranking: Ranking, dataset: Dataset) -> Iterator[RankedLists]:
    return ranking.blocks() if isinstance(ranking, ForeignRanking) else RankingReader(ranking, dataset).blocks()


def draw_users(dataset: Dataset, split: str, ranking: Ranking | None, users: int, seed: int) -> np.ndarray:
    """Draws the users to show: half of them hits of `ranking` where there are that many, the others misses.

    Returns:
      Ascending indices of at most `users` users of the dataset who have a target in the split.
    """
    order = np.random.default_rng(seed).permutation(dataset.users_with(split))
    if ranking is None:
        return np.sort(order[:users])
    is_hit = np.zeros(len(dataset.user_ids), bool)
    targets = all_targets(dataset, split)
    for block in _blocks(ranking, dataset):
        places = target_places(block, targets[block.users])
        is_hit[block.users] = (places[:, 0] > 0) & (places.mean(axis=1) <= HIT_CUT)
    hits, misses = order[is_hit[order]], order[~is_hit[order]]
    from_hits = min(len(hits), max(users // 2, users - len(misses)))
    return np.sort(np.concatenate([hits[:from_hits], misses[: users - from_hits]]))


def all_targets(dataset: Dataset, split: str) -> np.ndarray:
    """Every user's target: [U] item indices, −1 where the user has none."""
    positions = dataset.target_positions(split)
    return np.where(positions >= 0, dataset.items[dataset.offsets[:-1] + np.maximum(positions, 0)], -1)


class _Store:
    """Numbers what the page names, so that each is written once."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}

    def number(self, value: Any) -> int:
        return self._numbers.setdefault(value, len(self._numbers))

    def values(self) -> list[Any]:
        """In the order of their numbers."""
        return list(self._numbers)


def _item_rows(dataset: Dataset, items: list[int]) -> list[list[str | None]]:
    """[title, brand, category, price, item_id] of each; an item that is not in the catalogue (−2) has none of them.

    Of items with other attributes, the first stands for the title, and the next three that are left fill the gaps.
    """
    attributes = dataset.attributes
    shown: list[str | None] = [name if name in attributes else None for name in ("title", "brand", "category", "price")]
    others = iter([name for name in attributes if name not in shown])
    shown = [name if name is not None else next(others, None) for name in shown]
    absent = [None] * len(dataset.item_ids)
    columns = [attributes[name] if name is not None else absent for name in shown]
    return [
        [*(_cut(column[item], TITLE_CAP) for column in columns), str(dataset.item_ids[item])]
        if item >= 0
        else ["(not in the catalogue)", None, None, None, ""]
        for item in items
    ]


def _cut(text: str | None, cap: int) -> str | None:
    return text if text is None or len(text) <= cap else text[: cap - 1].rstrip() + "…"


def _dates(timestamps: np.ndarray) -> list[str]:
    return np.datetime_as_string(timestamps.astype("datetime64[s]"), unit="D").tolist()


def _history(dataset: Dataset, user: int, split: str, store: _Store) -> dict[str, Any]:
    items = dataset.history(user, split)
    begin = dataset.offsets[user]
    earlier = max(0, len(items) - HISTORY_CAP)
    return {
        "items": [store.number(item) for item in items[earlier:].tolist()],
        "dates": _dates(dataset.timestamps[begin + earlier : begin + len(items)]),
        "earlier": earlier,
    }


def _tops(ranking: Ranking, dataset: Dataset, split: str, users: np.ndarray, store: _Store) -> dict[int, dict]:
    """The shown part of one ranking for each drawn user who has a list in it; `sources` number his completions."""
    targets = all_targets(dataset, split)
    rows: dict[int, dict] = {}
    for block in _blocks(ranking, dataset):
        block = block.take(np.flatnonzero(np.isin(block.users, users)))
        places = target_places(block, targets[block.users])
        for row, user in enumerate(block.users.tolist()):
            length = int(block.lengths[row])
            shown = min(TOP, length)
            rows[user] = {
                "rank": places[row].tolist() if places[row, 0] else None,
                "depth": length,
                "items": [store.number(item) for item in block.items[row, :shown].tolist()],
                "scores": [float(f"{score:.6g}") for score in block.scores[row, :shown]],
                "sources": block.sources[row, :shown].tolist(),
            }
    return rows


def _fold(row: Mapping[str, Any], target_id: str, target_text: str, store: _Store) -> tuple[dict[str, Any], list[int]]:
    """A user's distinct completions, most probable first, and the place among them of each completion (or −1)."""
    groups: dict[str, dict[str, Any]] = {}
    item_ids = row["item_ids"] or [None] * len(row["texts"])
    columns = (row["texts"], row["log_probs"], row["num_tokens"], row["finished"], item_ids)
    for index, (text, log_prob, tokens, finished, item_id) in enumerate(zip(*columns, strict=True)):
        is_target = item_id == target_id if item_id is not None else text.strip() == target_text.strip()
        fresh = {"log_prob": log_prob, "tokens": tokens, "finished": finished, "target": is_target, "indices": []}
        group = groups.setdefault(text, fresh)
        group["log_prob"] = max(group["log_prob"], log_prob)
        group["finished"] = group["finished"] or finished
        group["target"] = group["target"] or is_target
        group["indices"].append(index)
    ordered = sorted(groups.items(), key=lambda each: (-each[1]["log_prob"], each[0]))
    shown = [each for place, each in enumerate(ordered) if place < COMPLETIONS_CAP or each[1]["target"]]
    place_of = [-1] * len(row["texts"])
    for place, (_, group) in enumerate(shown):
        for index in group["indices"]:
            place_of[index] = place
    made = {
        "texts": [store.number(_cut(text, COMPLETION_CAP)) for text, _ in shown],
        "log_probs": [round(group["log_prob"], 3) for _, group in shown],
        "tokens": [group["tokens"] for _, group in shown],
        "times": [len(group["indices"]) for _, group in shown],
        "unfinished": [place for place, (_, group) in enumerate(shown) if not group["finished"]],
        "targets": [place for place, (_, group) in enumerate(shown) if group["target"]],
        "of": len(row["texts"]),
        "distinct": len(groups),
    }
    return made, place_of


def _completions(
    folder: Path, dataset: Dataset, split: str, users: np.ndarray, store: _Store
) -> dict[int, tuple[dict[str, Any], list[int]]]:
    targets = all_targets(dataset, split)
    return {
        user: _fold(row, str(dataset.item_ids[targets[user]]), dataset.texts[targets[user]], store)
        for user, row in _rows(folder, ["texts", "log_probs", "num_tokens", "finished", "item_ids"], dataset, users)
    }


def link_completions(rankings: Mapping[str, Ranking], completions: Mapping[str, Path]) -> dict[str, str]:
    """Which completions each ranking was made from: by the hash in its manifest, else by an equal name."""

    def manifest(folder: Ranking) -> dict[str, Any]:
        if isinstance(folder, ForeignRanking):
            return {"made_from": {"completions": "others"}}
        path = Path(folder) / "manifest.json"
        return artifacts.read_json(path) if path.exists() else {}

    by_hash = {manifest(folder).get("hash"): name for name, folder in completions.items()}
    links = {}
    for name, folder in rankings.items():
        made_from = manifest(folder).get("made_from", {}).get("completions")
        linked = by_hash.get(made_from) if made_from else (name if name in completions else None)
        if linked:
            links[name] = linked
    return links


def show_users(
    dataset: Dataset,
    split: str,
    users: np.ndarray,
    rankings: Mapping[str, Ranking],
    completions: Mapping[str, Path],
) -> dict[str, Any]:
    """Everything that the page shows of the drawn users, ready for JSON.

    Args:
      dataset: what rankings and completions were made from.
      split: "validation" or "test".
      users: ascending user indices.
      rankings: folder of shards, or a ranking made by others, by name.
      completions: folder of shards by name.

    Returns:
      ``items`` (a row each: title, brand, category, price, item_id) and ``texts`` (of completions), ``users``, which
      name both by number, and ``completions_of``: the completions' name by ranking. A ranking's ``sources`` are places
      among the user's shown completions, −1 none, −2 one that is not shown.

    Raises:
      CalrecError: if shards are missing or broken, or name users or items that the dataset does not have.
    """
    items, texts = _Store(), _Store()
    links = link_completions(rankings, completions)
    tops = {name: _tops(ranking, dataset, split, users, items) for name, ranking in rankings.items()}
    made = {name: _completions(folder, dataset, split, users, texts) for name, folder in completions.items()}
    for name, rows in tops.items():
        for user, row in rows.items():
            place_of = made[links[name]].get(user, ({}, []))[1] if name in links else []
            row["sources"] = [_shown_place(source, place_of) for source in row["sources"]]
    shown = []
    for user in users.tolist():
        position = len(dataset.history(user, split))
        when = dataset.timestamps[dataset.offsets[user] + position]
        shown.append(
            {
                "id": str(dataset.user_ids[user]),
                "target": items.number(dataset.target(user, split)),
                "target_date": _dates(np.array([when]))[0],
                "history": _history(dataset, user, split, items),
                "rankings": {name: rows[user] for name, rows in tops.items() if user in rows},
                "completions": {name: rows[user][0] for name, rows in made.items() if user in rows},
            }
        )
    return {
        "items": _item_rows(dataset, items.values()),
        "texts": texts.values(),
        "users": shown,
        "completions_of": links,
    }


def _shown_place(source: int, place_of: list[int]) -> int:
    if source < 0 or source >= len(place_of):
        return -1
    return place_of[source] if place_of[source] >= 0 else -2
