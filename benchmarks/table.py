"""Prints reports' tables as Markdown, as docs/results.md holds them.

python benchmarks/table.py RUN/report/metrics.json [RUN2/report/metrics.json ...]
"""

import json
import sys

COLUMNS = ("recall@1", "recall@5", "recall@10", "recall@50", "ndcg@10", "ndcg@50", "mrr")


def main(paths):
    for path in paths:
        with open(path, encoding="utf-8") as file:
            report = json.load(file)
        print(f"\n{report['dataset']}, {report['split']}: {report['users']:,} users, {report['items']:,} items, "
              f"ties by {report['ties']}\n")  # fmt: skip
        print(
            "| ranking | " + " | ".join([*(c.replace("recall", "R") for c in COLUMNS), "NDCG@10, 95 % interval"]) + " |"
        )
        print("| --- " * (len(COLUMNS) + 2) + "|")
        for row in report["rows"]:
            low, high = row["interval"]["ndcg@10"]
            values = [f"{row['metrics'][c]:.4f}".removeprefix("0") for c in COLUMNS]
            print(f"| {row['name']} | " + " | ".join([*values, f"{low:.4f} to {high:.4f}"]) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
