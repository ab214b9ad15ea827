"""A small random dataset and completions of it, for the tests of ranking and evaluation."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from calrec_jax import artifacts
from calrec_jax.data.dataset import save_dataset
from calrec_jax.data.templates import Template

WORDS = [
    "wire",
    "rope",
    "glue",
    "drill",
    "bit",
    "lamp",
    "tape",
    "mask",
    "saw",
    "bolt",
    "red",
    "blue",
    "x",
    "10",
    "café",
]


def make_dataset(folder, *, num_users=12, num_items=17, seed=0, name="Tools"):
    rng = np.random.default_rng(seed)
    ids = [f"i{number:03d}" for number in range(num_items)]
    items = [
        {
            "item_id": ids[number],
            "title": " ".join(rng.choice(WORDS, rng.integers(1, 6))),
            "category": str(rng.choice(["Hand, Tools", "Lighting"])),
            "brand": str(rng.choice(["Acme", "Bolt & Co"])) if rng.random() < 0.7 else None,
            "price": None,
        }
        for number in range(num_items)
    ]
    items[3]["title"] = items[4]["title"]  # texts that tie
    lengths = rng.integers(3, 9, num_users)
    sequences = {
        "user_id": [f"u{number:03d}" for number in range(num_users)],
        "item_ids": [rng.choice(ids, length).tolist() for length in lengths],
        "timestamps": [list(range(length)) for length in lengths],
        "valid_position": (lengths - 2).astype(np.int32),
        "test_position": (lengths - 1).astype(np.int32),
    }
    return save_dataset(
        folder,
        name=name,
        items=pa.Table.from_pylist(items),
        sequences=pa.table(sequences),
        template=Template(),
        card={},
        made_from={},
        settings={},
    )


def random_texts(dataset, num_texts, rng):
    """Texts like a model's: items, mixtures of two, junk, nothing."""
    texts = []
    for _ in range(num_texts):
        kind = rng.integers(0, 6)
        first, second = rng.choice(dataset.texts, 2)
        texts.append(
            [first, first[: len(first) // 2] + second, "zzz qqq", "", " ".join(rng.choice(WORDS, 3)), second][kind]
        )
    return texts


def completion_rows(dataset, *, num_texts=8, seed=0, constrained=False, dimensions=0):
    rng = np.random.default_rng(seed)
    rows = []
    for user_id in dataset.user_ids:
        log_probs = rng.uniform(-90, -1, num_texts)
        if constrained:
            log_probs = np.sort(log_probs)[::-1]
        row = {
            "user_id": user_id,
            "texts": random_texts(dataset, num_texts, rng),
            "log_probs": log_probs.astype(np.float32).tolist(),
            "num_tokens": rng.integers(1, 30, num_texts).tolist(),
            "finished": [True] * num_texts,
            "item_ids": rng.choice(dataset.item_ids, num_texts, replace=False).tolist() if constrained else None,
            "user_embedding": None,
        }
        if dimensions:
            row["user_embedding"] = _unit(rng.normal(size=dimensions)).tolist()
        rows.append(row)
    return rows


def _unit(vector):
    return vector / np.linalg.norm(vector)


SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("texts", pa.list_(pa.string())),
        ("log_probs", pa.list_(pa.float32())),
        ("num_tokens", pa.list_(pa.int32())),
        ("finished", pa.list_(pa.bool_())),
        ("item_ids", pa.list_(pa.string())),
        ("user_embedding", pa.list_(pa.float32())),
    ]
)


def write_completions(folder, dataset, rows, *, split="test", dataset_hash=None, item_embeddings=None):
    """Two shards, the rows in any order."""
    with artifacts.atomic_folder(folder) as temporary:
        half = len(rows) // 2
        for number, part in enumerate([rows[half:], rows[:half]]):
            pq.write_table(pa.Table.from_pylist(part, SCHEMA), temporary / f"part-{number:05d}.parquet")
        if item_embeddings is not None:
            table = pa.table({"item_id": dataset.item_ids[::-1].tolist(), "embedding": item_embeddings[::-1].tolist()})
            pq.write_table(table, temporary / "item_embeddings.parquet")
        made_from = {"dataset": dataset_hash or dataset.hash}
        artifacts.write_manifest(
            temporary,
            kind="completions",
            made_from=made_from,
            settings={"split": split},
            files=artifacts.hash_files(temporary.glob("*.parquet")),
        )
    return folder
