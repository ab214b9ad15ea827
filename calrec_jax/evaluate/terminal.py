"""The report's tables on the terminal."""

from collections.abc import Mapping
from typing import Any

from calrec_jax.evaluate.metrics import headline

STYLES = {"calrec": "bold", "other": "bold", "oracle": "dim"}


def number(value: float | None) -> str:
    """A metric as papers print it: .0812."""
    return "–" if value is None else f"{value:.4f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.4f}"


def label(name: str, depth: int, items: int) -> str:
    """A metric's column: R@10, NDCG@10, MRR, or MRR@1000 where lists are cut there."""
    if name == "mrr" and depth < items:
        return f"MRR@{depth}"
    return name.replace("recall", "R").upper()


def p_value(p: float, resamples: int) -> str:
    """A p-value, "<" where it is the smallest that so many resamples can give (times the correction)."""
    return f"< {max(p, 1 / resamples):.4f}" if p <= 1 / resamples else f"{p:.4f}"


def print_table(metrics: Mapping[str, Any]) -> None:
    """Prints the rows of `metrics.json`, as they stand and with the history left out, and how they compare."""
    import rich.box
    import rich.console
    import rich.table

    names = list(metrics["rows"][0]["metrics"])
    main = headline(names)
    console = rich.console.Console()
    shown = [name for name in names if not name.startswith("ndcg@") or name == main]
    if console.width < 90:  # the column without history must be seen
        shown = [name for name in shown if name != "recall@5"]
    cut = f", lists of {metrics['depth']:,}" if metrics["depth"] < metrics["items"] else ""
    table = rich.table.Table(
        title=f"{metrics['dataset']}, {metrics['split']}: {metrics['users']:,} users, {metrics['items']:,} items{cut}; "
        f"ties: {metrics['ties']}",
        caption=f"−hist.: {label(main, 1, 1)} with the history left out of the list; a target bought before "
        f"({metrics['targets_in_history']:,} users) is a miss there",
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("ranking", no_wrap=True)
    for name in shown:
        table.add_column(label(name, metrics["depth"], metrics["items"]), justify="right", no_wrap=True)
        if name == main:
            table.add_column(f"{metrics['bootstrap']['level']:.0%} interval", no_wrap=True)
    table.add_column("−hist.", justify="right", no_wrap=True)
    for row in metrics["rows"]:
        cells = []
        for name in shown:
            cells.append(number(row["metrics"][name]))
            if name == main:
                cells.append("–".join(number(bound) for bound in row["interval"][name]))
        cells.append(number(row["views"]["history_left_out"]["metrics"][main]))
        table.add_row(row["name"], *cells, style=STYLES.get(row["kind"]))
    console.print(table)
    for line in verdicts(metrics):
        console.print(line, highlight=False)


def verdicts(metrics: Mapping[str, Any]) -> list[str]:
    """One sentence for each ranking that is no baseline: how it does against the best baseline, how surely."""
    rows = {row["name"]: row for row in metrics["rows"]}
    main = headline(list(metrics["rows"][0]["metrics"]))
    baselines = [row for row in rows.values() if row["kind"] == "baseline"]
    if not baselines:
        return []
    best = max(baselines, key=lambda row: row["metrics"][main])["name"]
    lines = []
    for found in metrics["comparisons"]:
        if (found["view"], found["metric"], found["b"]) != ("as_it_stands", main, best):
            continue
        low, high = found["interval"]
        lines.append(
            f"{found['a']} against the best baseline, {best}: {label(main, 1, 1)} {found['difference']:+.4f} "
            f"({low:+.4f} to {high:+.4f}), p {p_value(found['p_holm'], metrics['bootstrap']['resamples'])} after Holm"
        )
    return lines
