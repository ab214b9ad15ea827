"""Where everything of a run is: one folder, the same names for every step."""

from __future__ import annotations

import dataclasses
import pathlib


@dataclasses.dataclass(frozen=True)
class RunLayout:
    """The paths inside a run folder; nothing is made or read here."""

    root: pathlib.Path

    @property
    def raw(self) -> pathlib.Path:
        """The raw dumps of the synthetic shop (quickstart only)."""
        return self.root / "raw"

    def dataset(self, name: str) -> pathlib.Path:
        """A category's dataset."""
        return self.root / "datasets" / name

    @property
    def tokenizer(self) -> pathlib.Path:
        """The vocabulary of the run."""
        return self.root / "tokenizer"

    def stage(self, name: str) -> pathlib.Path:
        """A training stage: "stage1" or "stage2"."""
        return self.root / name

    def completions(self, split: str, decode: str) -> pathlib.Path:
        """What the decode named `decode` wrote for a split."""
        return self.root / "completions" / f"{split}-{decode}"

    def ranking(self, split: str, name: str) -> pathlib.Path:
        """What the ranking named `name` says for a split."""
        return self.root / "rankings" / f"{split}-{name}"

    @property
    def index(self) -> pathlib.Path:
        """BM25 indices of catalogues, a folder each, where they are kept."""
        return self.root / "index"

    def baseline(self, name: str) -> pathlib.Path:
        """A baseline that is trained: its model."""
        return self.root / "baselines" / name

    def baseline_report(self, split: str, name: str) -> pathlib.Path:
        """What `calrec baselines --name` says of one baseline alone."""
        return self.root / "baselines" / "reports" / f"{split}-{name}"

    def report(self, split: str) -> pathlib.Path:
        """The report; that of the test split, which is the one to show, has the plain name."""
        return self.root / ("report" if split == "test" else f"report-{split}")

    def eval_tasks(self, split: str, name: str) -> pathlib.Path:
        """What `calrec eval_tasks` decodes and measures as the ranking named `name`."""
        return self.root / "eval_tasks" / f"{split}-{name}"

    def export(self, format: str) -> pathlib.Path:
        """What `calrec export` writes for serving, or for T5X."""
        return self.root / "exports" / format

    @property
    def timing(self) -> pathlib.Path:
        """Seconds of each step, added up over resumed runs."""
        return self.root / "timing.json"
