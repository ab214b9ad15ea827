"""Training and evaluation examples over a tokenised catalogue.

An item's text stands in many histories, so what is cached is the *catalogue's* token ids (one array and offsets) beside
the sequences; an example is three integers (user, start, end) and its tokens are assembled when a row is filled
(`packing.py`). Both the trainer and the SeqIO tasks take their tokens from here, so they agree id for id.

Lengths are in tokens. The joint segment of an example is

    input:   start INTRO FIRST item1 NEXT item2 ... NEXT target
    target:  INTRO FIRST item1 NEXT item2 ... NEXT target EOS

and its item-alone segment is `start target` / `target EOS`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from calrec_jax.data import templates
from calrec_jax.data.dataset import Dataset
from calrec_jax.errors import CalrecError
from calrec_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TokenCatalogue:
    """Token ids of every item text of one or several datasets, end to end, without EOS.

    Attributes:
      tokens: [total] int32.
      offsets: [I+1] int64 into `tokens`.
      text_ids: [I] int32; equal texts (after the cut) have equal ids.
      token_weights: [total + I] float32, loss weight of each item's tokens and of its EOS (see `branch_weights`); item
        i's weights start at `offsets[i] + i`.
      intro, first, next: token ids of the template's sentences, int32.
      start_id, eos_id: special ids.
      cut: number of items whose text was cut to the token limit.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    text_ids: np.ndarray
    token_weights: np.ndarray
    intro: np.ndarray
    first: np.ndarray
    next: np.ndarray
    start_id: int
    eos_id: int
    cut: int

    @property
    def lengths(self) -> np.ndarray:
        """[I] int64 token counts, EOS not counted."""
        return np.diff(self.offsets)

    def item(self, index: int) -> np.ndarray:
        """Token ids of one item, EOS not included."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def tokenise_catalogue(
    datasets: Sequence[Dataset], tokenizer: Tokenizer, *, max_target_tokens: int = 128, forced_token_weight: float = 1.0
) -> TokenCatalogue:
    """Tokenises each distinct item text once; datasets keep their order and their items' order.

    Args:
      datasets: catalogues to join; item i of dataset d has index `sum(len of earlier catalogues) + i`.
      tokenizer: any tokenizer of the house.
      max_target_tokens: an item's tokens are cut to this number less one, which is EOS's.
      forced_token_weight: see `branch_weights`.

    Raises:
      CalrecError: no dataset, an item without tokens, or a limit that leaves no room.
    """
    if not datasets:
        raise CalrecError("tokenise_catalogue: no dataset given; name at least one category")
    if max_target_tokens < 2:
        raise CalrecError(f"max_target_tokens={max_target_tokens}: needs at least 2 (one token and EOS)")
    ids_by_text: dict[str, list[int]] = {}
    distinct = list(dict.fromkeys(text for dataset in datasets for text in dataset.texts))
    cut_texts = set()
    for text, ids in zip(distinct, tokenizer.encode_many(distinct), strict=True):
        if not ids:
            raise CalrecError(f"item text {text!r} has no tokens under this tokenizer; give the item a title")
        if len(ids) > max_target_tokens - 1:
            cut_texts.add(text)
        ids_by_text[text] = ids[: max_target_tokens - 1]
    per_item = [ids_by_text[text] for dataset in datasets for text in dataset.texts]
    offsets = np.zeros(len(per_item) + 1, np.int64)
    np.cumsum([len(ids) for ids in per_item], out=offsets[1:])
    tokens = np.fromiter((t for ids in per_item for t in ids), np.int32, count=int(offsets[-1]))
    keys: dict[tuple[int, ...], int] = {}
    text_ids = np.fromiter((keys.setdefault(tuple(ids), len(keys)) for ids in per_item), np.int32, count=len(per_item))
    weights, begin = [], 0
    for dataset in datasets:
        end = begin + len(dataset.texts)
        weights.append(branch_weights(per_item[begin:end], forced_token_weight))
        begin = end
    return TokenCatalogue(
        tokens=tokens,
        offsets=offsets,
        text_ids=text_ids,
        token_weights=np.concatenate(weights),
        intro=np.asarray(tokenizer.encode(templates.INTRO), np.int32),
        first=np.asarray(tokenizer.encode(templates.FIRST), np.int32),
        next=np.asarray(tokenizer.encode(templates.NEXT), np.int32),
        start_id=tokenizer.start_id,
        eos_id=tokenizer.eos_id,
        cut=sum(text in cut_texts for dataset in datasets for text in dataset.texts),
    )


def branch_weights(per_item: Sequence[Sequence[int]], forced_token_weight: float) -> np.ndarray:
    """Loss weight of each item token: 1 where the catalogue's trie branches, `forced_token_weight` where it does not.

    Most tokens of a title follow from the ones before once the catalogue is known; weighting them less lets a small
    model spend its capacity on *which* item comes. 1.0 gives every token the weight 1 (the paper's loss).

    Args:
      per_item: token ids of each item of one catalogue, EOS not included.
      forced_token_weight: weight of tokens that have no alternative in the catalogue, from 0 to 1.

    Returns:
      [sum(len + 1)] float32 in item order: each item's tokens, then its EOS.
    """
    if not 0.0 <= forced_token_weight <= 1.0:
        raise CalrecError(f"forced_token_weight={forced_token_weight}: must lie between 0 and 1")
    lengths = np.fromiter((len(ids) + 1 for ids in per_item), np.int64, count=len(per_item))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    weights = np.ones(int(starts[-1]), np.float32)
    if forced_token_weight == 1.0:
        return weights
    eos = -1  # sorts before every token; never equal to one
    padded = np.full((len(per_item), int(lengths.max())), -2, np.int64)
    for i, ids in enumerate(per_item):
        padded[i, : len(ids)] = ids
        padded[i, len(ids)] = eos
    node = np.zeros(len(per_item), np.int64)  # id of the trie node that each item's prefix has reached
    for position in range(padded.shape[1]):
        alive = np.flatnonzero(padded[:, position] != -2)
        edges, child = np.unique(np.stack([node[alive], padded[alive, position]], 1), axis=0, return_inverse=True)
        child = child.reshape(-1)
        nodes, fan_out = np.unique(edges[:, 0], return_counts=True)
        forced = fan_out[np.searchsorted(nodes, node[alive])] == 1
        weights[starts[alive[forced]] + position] = forced_token_weight
        node[alive] = child
    return weights


@dataclasses.dataclass(frozen=True)
class ExampleSet:
    """Examples over a `TokenCatalogue`: example e reads `items[start[e]:end[e]]`, the last of which is its target.

    Attributes:
      catalogue: the tokens.
      items: [interactions] int32 global item indices, all sequences end to end.
      start, end: [E] int64 into `items`.
      user: [E] int32, unique over all datasets.
      group: [E] int32, dataset of the example.
      group_sizes: [number of datasets] users of each, for the mixture's rates.
      joint_lengths, alone_lengths: [E] int64, tokens of the two segments.
      dropped_items: history items left out because a history was longer than its budget.
    """

    catalogue: TokenCatalogue
    items: np.ndarray
    start: np.ndarray
    end: np.ndarray
    user: np.ndarray
    group: np.ndarray
    group_sizes: np.ndarray
    joint_lengths: np.ndarray
    alone_lengths: np.ndarray
    dropped_items: int

    def __len__(self) -> int:
        return len(self.start)

    @property
    def lengths(self) -> np.ndarray:
        """[E] tokens of both segments together."""
        return self.joint_lengths + self.alone_lengths

    def fingerprint(self) -> str:
        """Hash of all that a row reads from here: resumed training refuses another one."""
        digest = hashlib.sha256()
        for owner in (self.catalogue, self):
            for field in dataclasses.fields(owner):
                value = getattr(owner, field.name)
                if not isinstance(value, TokenCatalogue):
                    digest.update(np.ascontiguousarray(value).tobytes())
        return digest.hexdigest()


def build_examples(
    datasets: Sequence[Dataset],
    catalogue: TokenCatalogue,
    *,
    split: str,
    max_history_tokens: int,
    row_tokens: int | None = None,
    split_long_histories: bool = False,
) -> ExampleSet:
    """One example a user (its last item before the split's boundary), or several where long histories are split.

    Args:
      datasets: the datasets `catalogue` was made from, in its order.
      catalogue: their tokens.
      split: "train" (target: the last training item), "validation" or "test".
      max_history_tokens: budget of INTRO, FIRST, the history, and the last NEXT; the oldest items go first.
      row_tokens: L; when given, an example's history also leaves room in the row for its target, twice.
      split_long_histories: cut a training sequence that exceeds the budget into several examples that overlap in one
        item, so that with next-item loss on all items each item but a sequence's first is predicted once. Nothing is
        dropped then.

    Raises:
      CalrecError: nothing to train on, or a budget that an item and its frame do not fit.
    """
    if split not in ("train", "validation", "test"):
        raise CalrecError(f"split={split!r}: must be 'train', 'validation' or 'test'")
    lengths = catalogue.lengths
    frame = len(catalogue.intro) + len(catalogue.first) + 1
    _check_budgets(catalogue, frame, max_history_tokens, row_tokens)
    flat, start, end, user, group_of = _sequences(datasets, split)
    if not len(start):
        names = ", ".join(d.name for d in datasets)
        raise CalrecError(
            f"{split}: no user of {names} has two purchases before the split; the categories are too small"
        )
    cost = lengths[flat] + len(catalogue.next)  # an item and the NEXT after it
    before = np.concatenate([[0], np.cumsum(cost)])
    budget = np.full(len(flat), max_history_tokens - frame)  # of the history before each place
    if row_tokens is not None:
        budget = np.minimum(budget, row_tokens - frame - 1 - 2 * lengths[flat])
    rows, first_dropped = _cut(start, end, before, budget, split_long_histories and split == "train")
    start, end, user, group_of = rows[1], rows[2], user[rows[0]], group_of[rows[0]]
    joint = frame + (before[end - 1] - before[start]) + lengths[flat[end - 1]]
    return ExampleSet(
        catalogue=catalogue,
        items=flat.astype(np.int32),
        start=start,
        end=end,
        user=user,
        group=group_of,
        group_sizes=np.array([len(d.user_ids) for d in datasets], np.int64),
        joint_lengths=joint,
        alone_lengths=lengths[flat[end - 1]] + 1,
        dropped_items=int(first_dropped),
    )


def _check_budgets(catalogue: TokenCatalogue, frame: int, max_history_tokens: int, row_tokens: int | None) -> None:
    """Raises CalrecError when a prompt of one item, or its row, has no room for the longest item."""
    longest, following = int(catalogue.lengths.max()), len(catalogue.next)
    if frame + longest + following > max_history_tokens:
        raise CalrecError(
            f"max_history_tokens={max_history_tokens}: the prompt's frame and the longest item need "
            f"{frame + longest + following} tokens; raise max_history_tokens or lower max_target_tokens"
        )
    if row_tokens is not None and frame + 3 * longest + following + 1 > row_tokens:
        raise CalrecError(
            f"row_tokens={row_tokens}: the frame and three times the longest item need "
            f"{frame + 3 * longest + following + 1} tokens; raise row_tokens or lower max_target_tokens"
        )


def _sequences(
    datasets: Sequence[Dataset], split: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All datasets end to end: items [interactions] int64; start, end [E] int64, user, group [E] int32 of a split."""
    items, starts, ends, users, groups = [], [], [], [], []
    item_base = user_base = position_base = 0
    for group, dataset in enumerate(datasets):
        items.append(dataset.items.astype(np.int64) + item_base)
        # A user without a target of the split has position −1, and so no example.
        stop = dataset.train_end if split == "train" else dataset.target_positions(split) + 1
        keep = np.flatnonzero(stop >= 2)  # a target needs at least one item before it
        starts.append(dataset.offsets[:-1][keep] + position_base)
        ends.append(dataset.offsets[:-1][keep] + stop[keep] + position_base)
        users.append(keep + user_base)
        groups.append(np.full(len(keep), group))
        item_base += len(dataset.texts)
        user_base += len(dataset.user_ids)
        position_base += len(dataset.items)
    flat, start, end = (np.concatenate(x).astype(np.int64) for x in (items, starts, ends))
    return flat, start, end, np.concatenate(users).astype(np.int32), np.concatenate(groups).astype(np.int32)


def _cut(
    start: np.ndarray, end: np.ndarray, before: np.ndarray, budget: np.ndarray, split_long: bool
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], int]:
    """Cuts each [start, end) from its oldest item until its history fits `budget` of its target.

    `split_long` keeps what was cut, as examples of its own.
    """
    index = np.arange(len(start))
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    dropped = 0
    while len(index):
        # The oldest position whose history [position, end-1) costs at most the budget.
        oldest = np.searchsorted(before, before[end - 1] - budget[end - 1], side="left")
        begin = np.minimum(np.maximum(start, oldest), end - 2)
        kept.append((index, begin, end))
        if not split_long:
            dropped += int((begin - start).sum())
            break
        more = begin > start
        index, start, end = index[more], start[more], begin[more] + 1
    joined = [np.concatenate(parts) for parts in zip(*kept, strict=True)]
    order = np.lexsort((joined[1], joined[0]))
    return (joined[0][order], joined[1][order], joined[2][order]), dropped
