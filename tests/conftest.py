"""Fixtures that several test files share."""

import dataclasses
import os
import pathlib
import types

# Before JAX starts. Tests compile a lot and compute little: LLVM's expensive passes take most of their time.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import gin
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _gin_left_empty():
    """Bindings and gin's lock are process-wide: a test that loads a run file leaves neither to the next one."""
    yield
    gin.clear_config()


@dataclasses.dataclass(frozen=True)
class SmallRun:
    """Two small datasets with equal, long and odd texts, and a tokenizer over both."""

    folders: tuple[pathlib.Path, pathlib.Path]
    tokenizer_folder: pathlib.Path
    datasets: tuple
    tokenizer: object


def _small_dataset(folder, name, seed, users, items):
    import pyarrow as pa

    from calrec_jax.data import dataset as dataset_lib
    from calrec_jax.data.templates import Template

    rng = np.random.default_rng(seed)
    words = ["blue", "steel", "rope", "▁odd", "naïve", "鋼", "hook", "wire", "pack"]
    catalogue = []
    for item in range(items):
        length = 40 if item == 3 else int(rng.integers(1, 6))  # one text is longer than an item may be
        title = "the same title" if item in (1, 2) else " ".join(rng.choice(words, length))
        catalogue.append(
            {"item_id": f"{name}{item:03}", "title": title, "category": rng.choice(["Tools", "Glue", None])}
        )
    sequences = []
    for user in range(users):
        length = int(rng.integers(3, 15))
        sequences.append(
            {
                "user_id": f"{name}-user{user:03}",
                "item_ids": [f"{name}{i:03}" for i in rng.integers(0, items, length)],
                "timestamps": list(range(length)),
                "valid_position": length - 2,
                "test_position": length - 1,
            }
        )
    return dataset_lib.save_dataset(
        folder,
        name=name,
        items=pa.Table.from_pylist(catalogue, dataset_lib.ITEMS_SCHEMA.remove(5)),
        sequences=pa.Table.from_pylist(sequences, dataset_lib.SEQUENCES_SCHEMA),
        template=Template(),
        card={},
        made_from={},
        settings={"seed": seed},
    )


@pytest.fixture(scope="session")
def small_run(tmp_path_factory) -> SmallRun:
    from calrec_jax.data.templates import Template
    from calrec_jax.tokenizer import make_tokenizer

    root = tmp_path_factory.mktemp("small_run")
    folders = (root / "Tools", root / "Office")
    datasets = (
        _small_dataset(folders[0], "Tools", 0, users=23, items=12),
        _small_dataset(folders[1], "Office", 1, users=17, items=9),
    )
    tokenizer = make_tokenizer(root / "tokenizer", datasets, Template(), vocab_size=340)
    return SmallRun(folders, root / "tokenizer", datasets, tokenizer)


@pytest.fixture(scope="module")
def registries():
    """SeqIO's registries and ours, emptied for a file of tests and put back after it."""
    import seqio

    from calrec_jax.tasks import registry

    kept = types.SimpleNamespace(
        tasks=dict(seqio.TaskRegistry._REGISTRY),
        mixtures=dict(seqio.MixtureRegistry._REGISTRY),
        spaces=dict(registry._spaces),
    )
    for known in (seqio.TaskRegistry._REGISTRY, seqio.MixtureRegistry._REGISTRY, registry._spaces):
        known.clear()
    yield
    for known, before in (
        (seqio.TaskRegistry._REGISTRY, kept.tasks),
        (seqio.MixtureRegistry._REGISTRY, kept.mixtures),
        (registry._spaces, kept.spaces),
    ):
        known.clear()
        known.update(before)
