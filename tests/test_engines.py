"""The same rules on DuckDB and on a local Spark session give the same dataset: every value, every byte."""

import importlib.util
import shutil
import time

import pytest

from calrec_jax import artifacts
from calrec_jax.data.prepare import prepare
from calrec_jax.data.synth import Synth, write_synth

SPARK = "pyspark://?spark.master=local[2]&spark.sql.shuffle.partitions=4&spark.driver.host=127.0.0.1"
needs_spark = pytest.mark.skipif(
    importlib.util.find_spec("pyspark") is None or shutil.which("java") is None,
    reason="pyspark or Java is not installed",
)
RULES = {"near_duplicate_days": 30, "core": (3, 5)}


@needs_spark
@pytest.mark.slow
@pytest.mark.parametrize("split", ["leave_last_out", "global_time"])
def test_spark_makes_the_same_dataset(tmp_path, split):
    reviews, metadata = write_synth(tmp_path, Synth(users=16_000, items=2_000, reviews_per_user=8, seed=1))
    made, seconds = {}, {}
    for name, engine in {"duckdb": "duckdb", "spark": SPARK}.items():
        begin = time.perf_counter()
        made[name] = prepare(
            tmp_path / name, name="x", reviews=reviews, metadata=metadata, split=split, engine=engine, **RULES
        )
        seconds[name] = round(time.perf_counter() - begin, 1)
    first, second = made.values()
    print(f"{first.card['rules'][0]['interactions_out']:,} interactions read, {len(first.items):,} kept: {seconds}")
    assert first.card["rules"][0]["interactions_out"] >= 100_000
    assert first.hash == second.hash
    cards = [{key: value for key, value in dataset.card.items() if key != "made_by"} for dataset in (first, second)]
    assert cards[0] == cards[1]
    assert [dataset.card["made_by"]["engine"].split()[0] for dataset in (first, second)] == ["duckdb", "pyspark"]
    for file in ("items.parquet", "sequences.parquet", artifacts.MANIFEST):
        assert (tmp_path / "duckdb" / file).read_bytes() == (tmp_path / "spark" / file).read_bytes(), file
