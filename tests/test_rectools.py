"""What lists hold beyond hits, beside RecTools' metrics, which run in an environment of their own: it needs NumPy 1."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from ranking_data import make_dataset

from calrec_jax.evaluate.beyond import Catalogue, beyond_hits
from calrec_jax.evaluate.places import Targets, places_of_source
from calrec_jax.rank.bm25 import BM25Tokenizer
from calrec_jax.rank.histories import Histories
from calrec_jax.rank.ordering import Scores

VERSION = "0.19.0"
THEIRS = """
import json, sys
import pandas as pd
from rectools.metrics import AvgRecPopularity, CatalogCoverage, IntraListDiversity, MeanInvUserFreq

given = json.load(sys.stdin)
reco = pd.DataFrame(given["reco"], columns=["user_id", "item_id", "rank"])
bought = pd.DataFrame(given["bought"], columns=["user_id", "item_id"])
distances = {(a, b): d for a, b, d in given["distances"]}
class Words:
    def __getitem__(self, pairs):
        return [distances[pair] for pair in zip(*pairs)]
k, users = given["k"], reco.user_id.unique()
print(json.dumps({
    "coverage": CatalogCoverage(k=k, normalize=True).calc(reco, given["catalog"]),
    "popularity": AvgRecPopularity(k=k).calc(reco, bought),
    "novelty": MeanInvUserFreq(k=k).calc(reco, bought),
    "diversity": IntraListDiversity(k=k, distance_calculator=Words()).calc(reco),
}))
"""


class Drawn:
    """A source with random scores."""

    def __init__(self, scores):
        self.all = scores

    def scores(self, users):
        return Scores(self.all[users])


@pytest.mark.slow
def test_coverage_popularity_novelty_and_diversity_equal_rectools(tmp_path):
    """Installs RecTools into a folder of the test's."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", f"rectools=={VERSION}"], check=True, timeout=900)
    k = 7
    dataset = make_dataset(tmp_path / "dataset", num_users=60, num_items=40, seed=5)
    scores = np.random.default_rng(1).permuted(np.tile(np.arange(40.0), (60, 1)), axis=1) ** 2
    rows = np.arange(0, 60, 2)
    targets = Targets(dataset, Histories(dataset, "test"), np.arange(60))
    ours = beyond_hits(places_of_source(Drawn(scores), targets), rows, Catalogue(dataset), k)
    words = [set(BM25Tokenizer()(text)) for text in dataset.texts]
    lists = np.argsort(-scores[rows], axis=1)
    given = {
        "k": k,
        "catalog": list(range(40)),
        "reco": [[int(user), int(item), rank + 1] for user, own in zip(rows, lists, strict=True)
                 for rank, item in enumerate(own)],
        "bought": [[user, int(item)] for user in range(60) for item in dataset.train_items(user)],
        "distances": [[a, b, 1 - len(words[a] & words[b]) / len(words[a] | words[b])]
                      for a, b in itertools.product(range(40), repeat=2)],
    }  # fmt: skip
    done = subprocess.run([python, "-c", THEIRS], input=json.dumps(given), capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout)
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=1e-12)
