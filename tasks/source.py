"""A prepared dataset as a SeqIO data source: a user's purchases up to a split's target, as texts and indices.

Notable: nothing is tokenised and no example is made before it is read. The catalogue and the sequences are held as flat
tensors; an example is gathered from them by the user's number, in graph, so sources shard at will, shuffle whole, and
read in the same order everywhere. Users and items are numbered over all datasets of a `CatalogueSpace`, so that batches
of a mixture can tell the same user, item or text from another.
"""

import functools
import pathlib
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from calrec_jax import artifacts
from calrec_jax.data import templates
from calrec_jax.data.dataset import Dataset
from calrec_jax.data.examples import TokenCatalogue, tokenise_catalogue
from calrec_jax.errors import CalrecError
from calrec_jax.tokenizer import Tokenizer

SPLITS = ("train", "validation", "test")
_SHARDS = 16  # of a split, for caching jobs


@functools.lru_cache(maxsize=16)
def _load(folder: pathlib.Path, manifest_hash: str) -> Dataset:
    """The dataset, read once for all tasks that are made from it."""
    del manifest_hash
    return Dataset.load(folder)


class CatalogueSpace:
    """Datasets under one tokenizer whose users, items and texts are numbered together, in the order they were added.

    The numbers are those of `build_examples` over the same datasets in the same order; adding another leaves them as
    they are.

    Attributes:
      tokenizer: of all of them.
      max_target_tokens: an item's tokens are cut to this number less one, which is EOS's.
      datasets: added so far.
    """

    def __init__(self, tokenizer: Tokenizer, max_target_tokens: int):
        self.tokenizer = tokenizer
        self.max_target_tokens = max_target_tokens
        self.datasets: list[Dataset] = []
        self._catalogues: dict[float, tuple[int, TokenCatalogue]] = {}

    def add(self, dataset: Dataset) -> int:
        """Adds a dataset, unless it is there; returns its place."""
        hashes = [known.hash for known in self.datasets]
        if dataset.hash not in hashes:
            self.datasets.append(dataset)
            return len(hashes)
        return hashes.index(dataset.hash)

    def bases(self, place: int) -> tuple[int, int]:
        """The numbers of the first user and the first item of the dataset at `place`."""
        before = self.datasets[:place]
        return sum(len(dataset.user_ids) for dataset in before), sum(len(dataset.texts) for dataset in before)

    def catalogue(self, forced_token_weight: float = 1.0) -> TokenCatalogue:
        """The tokens of all items; `CalrecFeatureConverter` takes the weights of its loss from here."""
        count, catalogue = self._catalogues.get(forced_token_weight, (0, None))
        if catalogue is None or count < len(self.datasets):
            catalogue = tokenise_catalogue(
                self.datasets,
                self.tokenizer,
                max_target_tokens=self.max_target_tokens,
                forced_token_weight=forced_token_weight,
            )
            self._catalogues[forced_token_weight] = (len(self.datasets), catalogue)
        return catalogue


class CalrecDataSource(seqio.DataSource):
    """One dataset's users; an example has

    * `segments`: string [2 + 2n], the prompt INTRO, FIRST, item 1, NEXT, …, item n, NEXT, oldest item first;
    * `targets`: string scalar, the text of the item to predict;
    * `items`: int32 [n + 1], numbers of the history's items and of the target;
    * `target_user`, `target_text`: int32 scalars, numbers of the user and of the target's tokens (equal texts are
      equal);
    * `user_id`, `split`: string scalars.

    "train" has the users with two training items or more, and predicts the last of them; "validation" and "test" have
    the users with a target.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        space: CatalogueSpace,
        identity: Hashable = None,
        splits: Sequence[str] = SPLITS,
    ):
        """Reads the dataset in `folder`.

        Args:
          folder: as `calrec prepare` wrote it.
          space: where its users, items and texts get their numbers.
          identity: kept, to tell whether a task is registered again or another one under its name.
          splits: those of `SPLITS` that it has.

        Raises:
          CalrecError: the folder is not a complete dataset.
        """
        self.folder = folder
        self.space = space
        self.identity = identity
        self.dataset = _load(folder, artifacts.read_manifest(folder, kind="dataset")["hash"])
        self.place = space.add(self.dataset)
        super().__init__(
            splits=tuple(splits),
            num_input_examples={split: len(self.users(split)) for split in splits},
            caching_permitted=True,
        )

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """True: a shard is a stride of the users."""
        return True

    def list_shards(self, split: str) -> list[str]:
        """Names of the shards a caching job works on."""
        count = max(1, min(_SHARDS, len(self.users(split))))
        return [f"{split}-{shard:05d}-of-{count:05d}" for shard in range(count)]

    def users(self, split: str) -> np.ndarray:
        """Rows of the dataset's users in a split, ascending."""
        if split not in SPLITS:
            raise CalrecError(f"split={split!r}: {self.dataset.name} has {', '.join(SPLITS)}")
        return self.dataset.users_with(split)

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: Any,
    ) -> tf.data.Dataset:
        """The examples of a split, in the order of the users unless shuffled (all of them, not within a buffer)."""
        del unused
        users = self.users(split)
        numbers = tf.data.Dataset.from_tensor_slices(users)
        if shard_info is not None:
            numbers = numbers.shard(shard_info.num_shards, shard_info.index)
        if shuffle:
            numbers = numbers.shuffle(max(1, len(users)), seed=seed)
        return numbers.map(self._example_fn(split), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

    @functools.cached_property
    def _tensors(self) -> dict[str, tf.Tensor]:
        dataset = self.dataset
        _, item_base = self.space.bases(self.place)
        text_ids = self.space.catalogue().text_ids[item_base : item_base + len(dataset.texts)]
        return {
            "texts": tf.constant(dataset.texts),
            "text_ids": tf.constant(text_ids, tf.int32),
            "user_ids": tf.constant(list(dataset.user_ids)),
            "offsets": tf.constant(dataset.offsets, tf.int64),
            "items": tf.constant(dataset.items, tf.int32),
        }

    def _example_fn(self, split: str) -> Any:
        tensors = self._tensors
        user_base, item_base = self.space.bases(self.place)
        stop = self.dataset.train_end - 1 if split == "train" else self.dataset.target_positions(split)
        stops = tf.constant(stop, tf.int64)
        frame = tf.constant([templates.INTRO, templates.FIRST])

        def example(user: tf.Tensor) -> dict[str, tf.Tensor]:
            begin = tensors["offsets"][user]
            items = tensors["items"][begin : begin + stops[user] + 1]
            history = tf.gather(tensors["texts"], items[:-1])
            following = tf.fill(tf.shape(history), templates.NEXT)
            return {
                "segments": tf.concat([frame, tf.reshape(tf.stack([history, following], 1), [-1])], 0),
                "targets": tf.gather(tensors["texts"], items[-1]),
                "items": items + item_base,
                "target_user": tf.cast(user, tf.int32) + user_base,
                "target_text": tf.gather(tensors["text_ids"], items[-1]),
                "user_id": tf.gather(tensors["user_ids"], user),
                "split": tf.constant(split),
            }

        return example
