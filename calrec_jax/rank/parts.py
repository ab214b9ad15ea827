"""Writing the ranked lists of users, in one process or in several that share one memory-mapped index.

Notable: each process ranks a run of whole shards, so that the shards are the same, byte for byte, however many
processes there are. Processes are started afresh (a fork of one that runs JAX may hang) and are given what they need;
the index they read from disk.
"""

import concurrent.futures
import concurrent.futures.process
import dataclasses
import itertools
import multiprocessing
import pathlib

import numpy as np

from calrec_jax import artifacts
from calrec_jax.data.dataset import Dataset
from calrec_jax.errors import CalrecError
from calrec_jax.rank import sources
from calrec_jax.rank.bm25 import KIND as INDEX_KIND
from calrec_jax.rank.bm25 import BM25Index, BM25Tokenizer
from calrec_jax.rank.first_places import FirstPlaces
from calrec_jax.rank.histories import Histories
from calrec_jax.rank.ordering import Ordered
from calrec_jax.rank.round_robin import RoundRobin, RoundRobinConfig
from calrec_jax.rank.shards import USERS_A_SHARD, RankingWriter
from calrec_jax.rank.user_texts import UserTexts

USERS_A_BLOCK = 256


class ByUser:
    """A source that knows its own rows of users, asked by rows of the dataset."""

    def __init__(self, source: sources.Source, users: np.ndarray, dataset: Dataset):
        """Keeps the source; its row j is the dataset's `users[j]`."""
        self._source = source
        self._row_of = np.full(len(dataset.user_ids), -1, np.int64)
        self._row_of[users] = np.arange(len(users))
        if hasattr(source, "first"):
            self.first = self._first

    def scores(self, users: np.ndarray) -> sources.Scores:
        """See `sources.Source`."""
        return self._source.scores(self._row_of[users])

    def _first(self, users: np.ndarray, depth: int, rows: np.ndarray, items: np.ndarray) -> Ordered:
        """See `sources.LeftOut`."""
        return self._source.first(self._row_of[users], depth, rows, items)  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class CompletionTexts:
    """Users with their texts, and how those are made into scores.

    Attributes:
      dataset: of the users and the catalogue.
      users: [B] rows of the dataset, ascending.
      texts: theirs, row j those of `users[j]`.
      epsilon: of quasi-round-robin.
      config: what the paper leaves open.
    """

    dataset: Dataset
    users: np.ndarray
    texts: UserTexts
    epsilon: float
    config: RoundRobinConfig

    def source(self, index: BM25Index) -> ByUser:
        """Quasi-round-robin over an index of the dataset's texts, asked by rows of the dataset."""
        made = RoundRobin(index, self.texts, self.epsilon, config=self.config, texts=self.dataset.texts)
        return ByUser(FirstPlaces(made), self.users, self.dataset)

    def part(self, begin: int, end: int) -> "CompletionTexts":
        """Users `[begin, end)` alone."""
        return dataclasses.replace(self, users=self.users[begin:end], texts=self.texts.part(begin, end))


@dataclasses.dataclass(frozen=True)
class Job:
    """What each process is given.

    Attributes:
      texts: of the users that it ranks.
      index: folder of the BM25 index.
      split, leave_out_history: see `rank`.
      everyone: items that are left out for all users.
      depth: of the lists.
      out: folder of the shards.
      first_shard: number of the first one.
      shard_users: users a shard.
    """

    texts: CompletionTexts
    index: pathlib.Path
    split: str
    leave_out_history: str
    everyone: np.ndarray
    depth: int
    out: pathlib.Path
    first_shard: int = 0
    shard_users: int = USERS_A_SHARD

    def run(self) -> None:
        """Ranks the users and writes their shards."""
        dataset = self.texts.dataset
        index = BM25Index.load(self.index, dataset.hash, check=False)  # by whoever started this
        ranked = self.texts.source(index)
        histories = Histories(dataset, self.split)
        lists = sources.LeftOut(ranked, histories, self.leave_out_history, self.everyone)
        write_lists(self.out, dataset, self.texts.users, lists, self.depth, self.first_shard, self.shard_users)


def rank_in_processes(job: Job, processes: int) -> None:
    """Splits a job over processes, by users.

    Raises:
      CalrecError: of a process; or one ended without a word.
    """
    users, size = len(job.texts.users), job.shard_users
    shards = -(-users // size)
    bounds = np.unique(np.linspace(0, shards, min(processes, max(1, shards)) + 1).astype(int))
    parts = [
        dataclasses.replace(job, texts=job.texts.part(begin * size, min(users, end * size)), first_shard=begin)
        for begin, end in itertools.pairwise(bounds.tolist())
    ]
    context = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(max(1, len(parts)), mp_context=context) as pool:
            for done in [pool.submit(part.run) for part in parts]:
                done.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise CalrecError(
            f"one of the {len(parts)} processes that rank ended without a word, as when memory runs out: set "
            "rank.processes lower and run again"
        ) from error


def index_folder(parent: pathlib.Path, dataset: Dataset, tokenizer: BM25Tokenizer) -> pathlib.Path:
    """Where the index of a dataset's texts is kept: a folder for each dataset and tokenizer."""
    return parent / artifacts.hash_json({"dataset": dataset.hash, "bm25": dataclasses.asdict(tokenizer)})[:16]


def kept_index(parent: pathlib.Path, dataset: Dataset, tokenizer: BM25Tokenizer) -> BM25Index:
    """The index of a dataset's texts, read from disk; made and saved there first where it is not.

    Raises:
      CalrecError: what is there is damaged.
    """
    folder = index_folder(parent, dataset, tokenizer)
    settings = dataclasses.asdict(tokenizer)
    if not artifacts.is_done(folder, kind=INDEX_KIND, made_from={"dataset": dataset.hash}, settings=settings):
        BM25Index(dataset.texts, tokenizer).save(folder, dataset.hash)
    return BM25Index.load(folder, dataset.hash)


def write_lists(
    folder: pathlib.Path,
    dataset: Dataset,
    users: np.ndarray,
    source: sources.LeftOut,
    depth: int,
    first_shard: int = 0,
    shard_users: int = USERS_A_SHARD,
) -> None:
    """Ranks and writes users, block by block and `shard_users` a shard."""
    # Blocks shrink with the catalogue where several float64 matrices of users × items live at once.
    block = USERS_A_BLOCK
    if not source.makes_short_lists(depth):
        block = max(1, min(block, 2**23 // len(dataset.item_ids)))
    for shard, begin in enumerate(range(0, len(users), shard_users), first_shard):
        end = min(begin + shard_users, len(users))
        with RankingWriter(folder, dataset, shard) as writer:
            for at in range(begin, end, block):
                part = users[at : min(at + block, end)]
                writer.write(part, source.lists(part, depth))
