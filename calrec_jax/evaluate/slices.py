"""Slices of the evaluated users.

They are by length of the history, how often the target was bought in training, repeat or new, category, and whether
another item has the target's text.

Notable: groups are fixed by number before anything is scored, a group without users is kept and says so, and what
"training" is comes from the purchases before every user's validation target, whatever split is evaluated.
"""

import dataclasses

import numpy as np

from calrec_jax.data.dataset import Dataset
from calrec_jax.evaluate.places import Targets

LENGTHS = ((0, 0), (1, 2), (3, 5), (6, 10), (11, 20), (21, None))
RARE_UP_TO = 5
HEAD_SHARE = 0.5
CATEGORIES = 10


@dataclasses.dataclass(frozen=True)
class Slice:
    """A way to divide the evaluated users into groups.

    Attributes:
      name: as in `metrics.json`.
      meaning: in words.
      groups: name of each group to [E] bool.
    """

    name: str
    meaning: str
    groups: dict[str, np.ndarray]


def training_purchases(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """User and item of every purchase that training sees: two flat arrays."""
    lengths = np.maximum(dataset.train_end.astype(np.int64), 0)
    users = np.repeat(np.arange(len(lengths)), lengths)
    places = np.arange(len(users)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return users, dataset.items[dataset.offsets[:-1][users] + places]


def head_items(counts: np.ndarray) -> np.ndarray:
    """[I] bool: the most bought items, as many as it takes to make up half of the training purchases.

    Items bought as often as the last of them belong to it, too.
    """
    by = np.sort(counts)[::-1]
    reached = np.flatnonzero(np.cumsum(by) >= HEAD_SHARE * by.sum())
    return counts >= max(1, by[reached[0]]) if len(reached) else np.zeros(len(counts), bool)


def make_slices(targets: Targets) -> list[Slice]:
    """All slices of the evaluated users; the groups of each are disjoint and cover everybody."""
    counts = np.bincount(training_purchases(targets.dataset)[1], minlength=targets.num_items)
    return [
        _by_length(targets.histories.lengths[targets.users]),
        _by_frequency(counts, targets.items),
        Slice(
            "repeat",
            "whether the target was bought before",
            {"new": ~targets.in_history, "repeat": targets.in_history},
        ),
        _by_category(targets),
        Slice(
            "equal_text",
            "whether another item of the catalogue has the target's text",
            {"text of its own": targets.twins == 0, "shared text": targets.twins > 0},
        ),
    ]


def _by_length(lengths: np.ndarray) -> Slice:
    groups = {}
    for low, high in LENGTHS:
        name = f"{low}+" if high is None else f"{low}" if low == high else f"{low} to {high}"
        groups[name] = (lengths >= low) & (lengths <= (np.inf if high is None else high))
    return Slice("history_length", "purchases in the history", groups)


def _by_frequency(counts: np.ndarray, items: np.ndarray) -> Slice:
    own, head = counts[items], head_items(counts)[items]
    rare = (own >= 1) & (own <= RARE_UP_TO)
    groups = {
        "never seen": own == 0,
        "rare": rare,
        "middle": (own > RARE_UP_TO) & ~head,
        "head": (own > RARE_UP_TO) & head,
    }
    meaning = (
        f"how often the target was bought in training: never, up to {RARE_UP_TO} times (rare), more (middle), or one "
        f"of the most bought items that together make up {HEAD_SHARE:.0%} of the training purchases (head)"
    )
    return Slice("target_frequency", meaning, groups)


def _by_category(targets: Targets) -> Slice:
    column = targets.dataset.attributes.get("category", [None] * targets.num_items)
    own = np.array([column[item] or "" for item in targets.items], object)
    names, sizes = np.unique(own[own != ""], return_counts=True)
    largest = names[np.lexsort((names.astype(str), -sizes))][:CATEGORIES]
    groups = {str(name): own == name for name in largest}
    rest = (own != "") & ~np.isin(own, largest)
    if rest.any():
        groups[_free("other", groups)] = rest
    if (own == "").any():
        groups[_free("none", groups)] = own == ""
    return Slice("category", f"the target's category, the {CATEGORIES} with most targets", groups)


def _free(name: str, groups: dict[str, np.ndarray]) -> str:
    """`name`, or something like it that no category has."""
    return name if name not in groups else f"({name})"
