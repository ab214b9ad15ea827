"""`calrec prepare` on raw dumps of 5 M reviews with texts, 2018 layout, gzipped, against a plain pandas script.

    python benchmarks/prepare.py --reviews=500000 --items=20000 --data=/tmp/prepare
    python benchmarks/prepare.py --reviews=5000000 --items=200000 --data=/tmp/prepare

The dumps are made by `calrec synth` once and kept in `--data`. Each way runs in a process of its own, whose seconds,
CPU seconds and peak memory are printed, then whether both gave the same sequences and item texts. Nothing of the
readers' cache is used. `--only=calrec` or `--only=pandas` runs one of them. Run it alone.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

CATEGORY = "Office_Products"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--reviews", type=int, default=5_000_000)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--memory_limit", default="3GB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("calrec", "pandas"))
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.data / f"{arguments.reviews}-{arguments.items}"
    files = folder / f"{CATEGORY}_5.json.gz", folder / f"meta_{CATEGORY}.json.gz"
    if arguments.worker:
        way, out = arguments.worker
        {"calrec": with_calrec, "pandas": with_pandas}[way](*files, Path(out), arguments)
        return
    if not files[0].exists():
        from calrec_jax.data.synth import Synth, write_synth

        begin = time.perf_counter()
        write_synth(folder, Synth(users=arguments.reviews // 8, items=arguments.items, category=CATEGORY))
        print(f"dumps made in {time.perf_counter() - begin:.0f} s")
    print(
        f"{arguments.reviews:,} reviews, {files[0].stat().st_size / 1e6:,.0f} MB gzipped; load {os.getloadavg()[0]:.1f}"
    )
    made = {}
    for way in [arguments.only] if arguments.only else ["calrec", "pandas"]:
        made[way] = folder / way
        measure(way, made[way])
    if len(made) == 2:
        compare(made["calrec"], made["pandas"])


def measure(way, out):
    """Runs a way in a new process and prints what it took."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", way, str(out)]
    begin = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{way} failed with {process.returncode}")
    cpu = used.ru_utime + used.ru_stime
    print(f"{way}: {seconds:.1f} s, {cpu:.1f} s of CPU, peak memory {used.ru_maxrss / 2**20:.2f} GiB", flush=True)


def with_calrec(reviews, metadata, out, arguments):
    from calrec_jax.data.card import summary
    from calrec_jax.data.prepare import prepare

    limits = {"memory_limit": arguments.memory_limit, "threads": arguments.threads, "cache_gib": 0}
    dataset = prepare(out, name=CATEGORY, reviews=reviews, metadata=metadata, **limits)
    print(*(f"  {line}" for line in summary(dataset.card)), sep="\n")


def with_pandas(reviews, metadata, out, arguments):
    """What people write: parse every line, one frame, drop, sort, filter, group."""
    import gzip
    import html
    import json

    import pandas as pd

    del arguments
    rows = []
    with gzip.open(reviews, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file):
            try:
                review = json.loads(line)
                rows.append((review["reviewerID"], review["asin"], review["unixReviewTime"], number))
            except (ValueError, KeyError):
                continue
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp", "line"])
    del rows
    frame = frame.drop_duplicates(["user_id", "item_id", "timestamp"])
    frame = frame.sort_values(["user_id", "timestamp", "line"])
    previous = frame.groupby("user_id")["item_id"].shift()
    frame = frame[frame["item_id"] != previous]
    frame = frame[frame.groupby("user_id")["item_id"].transform("size") >= 3]
    sequences = frame.groupby("user_id").agg(item_ids=("item_id", list), timestamps=("timestamp", list)).reset_index()
    sequences["test_position"] = sequences["item_ids"].str.len() - 1
    sequences["valid_position"] = sequences["test_position"] - 1
    items = []
    with gzip.open(metadata, "rt", encoding="utf-8") as file:
        for line in file:
            try:
                item = json.loads(line)
            except ValueError:
                continue
            values = (html.unescape(item["title"]), ", ".join(item["category"]), item["brand"], item["price"])
            fields = zip(("Title", "Category", "Brand", "Price"), values, strict=True)
            text = " ".join(f"{field}: {value or 'Unknown'}." for field, value in fields)
            items.append((item["asin"], *values, text))
    catalogue = pd.DataFrame(items, columns=["item_id", "title", "category", "brand", "price", "text"])
    catalogue = catalogue.drop_duplicates("item_id").sort_values("item_id")
    out.mkdir(parents=True)
    sequences.to_parquet(out / "sequences.parquet")
    catalogue.to_parquet(out / "items.parquet")


def compare(first, second):
    """Prints whether the two made the same tables."""
    import pyarrow.parquet as pq

    for file, columns in {
        "sequences.parquet": ["user_id", "item_ids", "timestamps", "valid_position", "test_position"],
        "items.parquet": ["item_id", "text"],
    }.items():
        ours, theirs = (pq.read_table(folder / file, columns=columns) for folder in (first, second))
        same = ours.cast(theirs.schema).equals(theirs)
        print(f"{file}: {'the same' if same else 'DIFFERENT'}, {ours.num_rows:,} rows")


if __name__ == "__main__":
    main()
