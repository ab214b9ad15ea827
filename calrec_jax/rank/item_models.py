"""Linear models of items from who bought what: ItemKNN and EASE.

Notable: a user's score of an item is the sum, over the distinct items of the history, of that item's weight for it; a
decay by the purchases since then (1: none, as published) is the only thing they know of order. Ties by popularity.
"""

import dataclasses

import gin
import numpy as np
import scipy.linalg
import scipy.sparse

from calrec_jax.compiled import compiled
from calrec_jax.errors import CalrecError
from calrec_jax.rank.histories import Histories
from calrec_jax.rank.ordering import Scores


@gin.configurable
@dataclasses.dataclass(frozen=True)
class ItemKNNConfig:
    """Settings of ItemKNN.

    Attributes:
      neighbours: most similar items that are kept of each item; those tied with the last one are kept, too.
      shrinkage: added to the product of the norms, so that few common users count less.
      decay: weight of a history's item against that of the item after it; 1: all alike.
    """

    neighbours: int = 100
    shrinkage: float = 10.0
    decay: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.neighbours, int) or self.neighbours < 1:
            raise CalrecError(f"ItemKNNConfig.neighbours={self.neighbours!r}: must be a whole number of at least 1")
        if not self.shrinkage >= 0:
            raise CalrecError(f"ItemKNNConfig.shrinkage={self.shrinkage}: must be at least 0")
        _check_decay("ItemKNNConfig", self.decay)


class ItemKNN:
    """Cosine of the items' users, the nearest neighbours of each item of the history.

    x_i is the 0/1 vector of the users who have item i in their history; the similarity of i and j ≠ i is
    x_i·x_j / (|x_i||x_j| + shrinkage). Deshpande and Karypis, "Item-based top-N recommendation algorithms", TOIS 2004;
    the shrinkage as in Ferrari Dacrema, Cremonesi and Jannach, RecSys 2019.
    """

    def __init__(self, histories: Histories, config: ItemKNNConfig):
        self.histories = histories
        self.decay = config.decay
        together = co_occurrences(histories)
        norms = np.sqrt(together.diagonal())
        similar = together.tocoo()
        between = similar.row != similar.col
        first, second = similar.row[between], similar.col[between]
        values = similar.data[between] / (norms[first] * norms[second] + config.shrinkage)
        similar = scipy.sparse.csr_array((values, (first, second)), together.shape)
        _keep_greatest(similar.data, similar.indptr, config.neighbours)
        similar.eliminate_zeros()
        self.similar = similar

    def scores(self, users: np.ndarray) -> Scores:
        """See `Source`."""
        primary = (self.histories.distinct(users, self.decay) @ self.similar).toarray()
        return Scores(primary, self.histories.popularity[None])


@compiled
def _keep_greatest(data, indptr, keep):  # pragma: no cover (compiled)
    """Zeroes what is below the `keep`-th greatest of each row."""
    for row in range(len(indptr) - 1):
        begin, end = indptr[row], indptr[row + 1]
        if end - begin > keep:
            least = np.sort(data[begin:end])[end - begin - keep]
            for at in range(begin, end):
                if data[at] < least:
                    data[at] = 0.0


@gin.configurable
@dataclasses.dataclass(frozen=True)
class EASEConfig:
    """Settings of EASE.

    Attributes:
      regularisation: λ, added to the diagonal of the items' co-occurrences.
      decay: weight of a history's item against that of the item after it; 1: all alike.
      max_items: largest catalogue whose dense inverse is made.
    """

    regularisation: float = 200.0
    decay: float = 1.0
    max_items: int = 20_000

    def __post_init__(self) -> None:
        if not self.regularisation > 0:
            raise CalrecError(f"EASEConfig.regularisation={self.regularisation}: must be above 0")
        _check_decay("EASEConfig", self.decay)


class EASE:
    """The linear autoencoder with a zero diagonal, in closed form.

    P = (XᵀX + λ1)⁻¹ with X [U, I] the 0/1 histories; the weight of item i for j ≠ i is −P_ij / P_jj. Steck,
    "Embarrassingly shallow autoencoders for sparse data", WWW 2019.
    """

    def __init__(self, histories: Histories, config: EASEConfig):
        """Inverts the matrix: I² · 8 bytes twice over, and I³ operations.

        Raises:
          CalrecError: the catalogue has more items than `config.max_items`.
        """
        num_items = histories.num_items
        if num_items > config.max_items:
            raise CalrecError(
                f"ease inverts a dense matrix of {num_items:,} × {num_items:,} items, which takes "
                f"{2 * 8 * num_items**2 / 2**30:.0f} GiB, and EASEConfig.max_items is {config.max_items:,}: raise that "
                "on a machine with so much memory, or take ease out of the baselines"
            )
        self.histories = histories
        self.decay = config.decay
        gram = co_occurrences(histories).toarray(order="F")
        gram[np.diag_indices(num_items)] += config.regularisation
        lower, failed = scipy.linalg.lapack.dpotrf(gram, lower=1, overwrite_a=1)
        inverse, failed_inverse = scipy.linalg.lapack.dpotri(lower, lower=1, overwrite_c=1)
        assert not failed and not failed_inverse, "a Gram matrix plus λ > 0 is positive definite"
        for column in range(num_items):  # LAPACK leaves the upper triangle as it was
            inverse[column, column + 1 :] = inverse[column + 1 :, column]
        self._diagonal = inverse.diagonal().copy()
        inverse[np.diag_indices(num_items)] = 0.0
        self._inverse = inverse.T  # symmetric; rows lie together

    def scores(self, users: np.ndarray) -> Scores:
        """See `Source`."""
        primary = -(self.histories.distinct(users, self.decay) @ self._inverse) / self._diagonal
        # Rounded from float64, so that scores that differ by the inverse's rounding alone tie.
        return Scores(primary.astype(np.float32).astype(np.float64), self.histories.popularity[None])


def co_occurrences(histories: Histories) -> scipy.sparse.csr_array:
    """[I, I] float64: how many users have both items in their history; on the diagonal, how many have the item."""
    bought = histories.distinct(np.arange(len(histories.lengths)), 1.0)
    return (bought.T @ bought).tocsr()


def _check_decay(name: str, decay: float) -> None:
    if not 0 < decay <= 1:
        raise CalrecError(f"{name}.decay={decay}: must be above 0 and at most 1")
