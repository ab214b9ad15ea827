"""The line in a row: each step of a run folder, from raw dumps to the report.

Notable: a step that is done is skipped, one that was interrupted goes on, so `Line.run` is called again after anything
that stopped it. The same `Line` serves each verb of the command, which is why one gin file holds a whole run:
`run_settings.py` has what it says of the run, `beside_line.py` what is no step of the line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gin

from calrec_jax import artifacts, hosts, timing
from calrec_jax.baselines import split_name
from calrec_jax.errors import CalrecError
from calrec_jax.run_settings import RunSettings

if TYPE_CHECKING:
    from calrec_jax.data.dataset import Dataset
    from calrec_jax.tokenizer import Tokenizer


@gin.configurable("run")
@dataclasses.dataclass(frozen=True)
class Line(RunSettings):
    """The steps of a run, in order and one by one; its attributes are those of `RunSettings`."""

    def prepare(self, category: str) -> None:
        """Makes a category's dataset from its raw dumps."""
        from calrec_jax.data.card import summary
        from calrec_jax.data.prepare import prepare

        out = self.layout.dataset(category)
        scope = gin.config_scope(category) if category.isidentifier() else contextlib.nullcontext()
        reviews, metadata = (
            names.get(category) if isinstance(names, Mapping) else names for names in (self.reviews, self.metadata)
        )
        with self.step(f"prepare {category}", out), scope:
            dataset = prepare(out, name=category, reviews=reviews, metadata=metadata, data_dir=self.data_folder)
            print(*(f"  {line}" for line in summary(dataset.card)), sep="\n", flush=True)

    def vocab(self) -> None:
        """Trains the tokenizer on the catalogues of all categories, or takes that of `init_from`."""
        from calrec_jax.data.templates import Template
        from calrec_jax.pretrained.tokenizer import adopt_tokenizer
        from calrec_jax.tokenizer import make_tokenizer

        if self.start_folder is not None:
            with self.step("vocab", self.layout.tokenizer):
                adopt_tokenizer(self.layout.tokenizer, self.start_folder)
                print(f"vocab: the tokenizer of {self.start_folder}; vocab.* settings are not used")
            return
        with self.step("vocab", self.layout.tokenizer):
            make_tokenizer(self.layout.tokenizer, self.datasets(self.all_categories), Template())

    def train(self, stage: str) -> None:
        """Trains a stage, from the parameters of the one before it in `stages`."""
        from calrec_jax.train.loop import train

        if stage not in self.stages:
            raise CalrecError(f"--stage={stage} is not in run.stages, which has {', '.join(self.stages)}")
        before = self.stages[: self.stages.index(stage)]
        names = self.categories or (self.target,)
        if stage == "stage2":
            names = (self.target,)
        out = self.layout.stage(stage)
        with self.step(f"train {stage}", out), gin.config_scope(stage):
            train(
                out,
                self.datasets(names),
                self.tokenizer(),
                init_from=self.layout.stage(before[-1]) if before else self.start_folder,
            )

    def decode(self, name: str) -> None:
        """Writes completions for the users of the split from the last stage's checkpoint."""
        from calrec_jax.decode.run import decode

        self.check_name(name, self.decodes, "run.decodes")
        if not self.stages:
            raise CalrecError("run.stages is empty, so there is no checkpoint to decode from")
        out = self.layout.completions(self.split, name)
        with self.step(f"decode {self.split}-{name}", out), gin.config_scope(name):
            checkpoint = self.layout.stage(self.stages[-1])
            own: dict[str, Any] = {"max_users": self.validation_users} if self._part else {}
            if name in self.candidates:
                own["candidates"] = str(self.layout.ranking(self.split, self.candidates[name]))
            decode(out, self.dataset(self.target), self.tokenizer(), checkpoint, split=self.split, **own)

    def rank(self, name: str) -> None:
        """Turns completions into a ranking of the catalogue."""
        from calrec_jax.rank.run import rank

        self.check_name(name, self.rankings, "run.rankings")
        decode = self.rankings[name]
        completions = self.layout.completions(self.split, decode) if decode is not None else None
        out = self.layout.ranking(self.split, name)
        with self.step(f"rank {self.split}-{name}", out), gin.config_scope(name):
            own: dict[str, Any] = {"missing": "skip"} if self._part else {}
            rank(
                out,
                self.dataset(self.target),
                completions,
                split=self.split,
                index_dir=self.layout.index,
                **own,
            )

    def baseline(self, name: str) -> None:
        """Trains a baseline of `baselines`, and ranks the catalogue by it."""
        from calrec_jax.baselines.train import train_sasrec
        from calrec_jax.rank.run import rank

        self.check_name(name, self.baselines, "run.baselines")
        model, left_out = split_name(name)
        folder, out = self.layout.baseline(model), self.layout.ranking(self.split, name)
        dataset = self.dataset(self.target)
        with self.step(f"baseline {model}", folder), gin.config_scope(model):
            train_sasrec(folder, dataset)
        with self.step(f"rank {self.split}-{name}", out), gin.config_scope(name):
            rank(
                out, dataset, None, split=self.split, index_dir=self.layout.index, source="sasrec",
                leave_out_history=left_out, baseline=folder,
            )  # fmt: skip

    def run_baselines(self, name: str | None = None) -> None:
        """Makes the target's dataset, then the baselines, and evaluates them: all into the run's report, or one alone.

        Args:
          name: of `baselines`, or any that `evaluate.baselines` could have; its report is
            `baselines/reports/<split>-<name>/` of the run folder.
        """
        if name is None:
            self._check_ranked()
        self.prepare(self.target)
        if name is None:
            for each in self.baselines:
                self.baseline(each)
            self.evaluate()
            return
        from calrec_jax.evaluate.baselines import BASELINES
        from calrec_jax.evaluate.run import evaluate

        self.check_name(name, (*self.baselines, *BASELINES), "run.baselines or evaluate.baselines")
        trained = {}
        if name in self.baselines:
            self.baseline(name)
            trained = {name: self.layout.ranking(self.split, name)}
        out = self.layout.baseline_report(self.split, name)
        with self.step(f"evaluate {self.split}-{name}", out):
            counted = () if trained else (name,)
            evaluate(out, self.dataset(self.target), trained, split=self.split, baselines=counted)

    def _check_ranked(self) -> None:
        """Raises a `CalrecError` for rankings of the report that are not made yet, before hours go into baselines."""
        folders = [self.layout.ranking(self.split, name) for name in self.rankings]
        missing = [str(folder) for folder in folders if not (folder / artifacts.MANIFEST).exists()]
        if missing:
            raise CalrecError(
                f"the report shows the rankings of run.rankings, too, and there is no {', '.join(missing)} yet: run "
                "`calrec run`, which makes all; or `calrec baselines --name=…` for one baseline alone; or set "
                "run.rankings={}"
            )

    def evaluate(self) -> None:
        """Scores the rankings beside the baselines, and writes the report."""
        from calrec_jax.evaluate.run import evaluate

        rankings = {name: self.layout.ranking(self.split, name) for name in (*self.baselines, *self.rankings)}
        out = self.layout.report(self.split)
        # The shop knows the probabilities of the last purchase, which is the test split's target.
        oracle = pathlib.Path(self.data_folder, self.oracle.replace("{category}", self.target))
        with self.step(f"evaluate {self.split}", out):
            evaluate(
                out,
                self.dataset(self.target),
                rankings,
                split=self.split,
                oracle=oracle if self.split == "test" and oracle.exists() else None,
                **({"users": "ranked"} if self._part else {}),
            )

    def steps(self) -> list[Callable[[], None]]:
        """The whole line, in order; of several hosts all train and decode, and the first does the rest alone."""
        return [
            *(_by_first(f"prepare {category}", self.prepare, category) for category in self.all_categories),
            *([_by_first("vocab", self.vocab)] if self.stages else []),  # nothing else reads the tokenizer
            *(functools.partial(self.train, stage) for stage in self.stages),
            *self.steps_after_training(),
        ]

    def steps_after_training(self) -> list[Callable[[], None]]:
        """Decodes, rankings, baselines and report; a decode that scores a ranking comes after it."""
        decodes = {name: functools.partial(self.decode, name) for name in self.decodes}
        steps: list[Callable[[], None]] = [decodes.pop(name) for name in self.decodes if name not in self.candidates]
        for name, decode in self.rankings.items():
            steps += [decodes.pop(decode)] if decode in decodes else []
            steps.append(_by_first(f"rank {name}", self.rank, name))
        return [
            *steps,
            *decodes.values(),
            *(_by_first(f"baseline {name}", self.baseline, name) for name in self.baselines),
            _by_first("evaluate", self.evaluate),
        ]

    def run(self) -> None:
        """Runs the line, which ends in the report's table, and prints what was made and the seconds of each step.

        Each of several hosts that were joined calls it.
        """
        if self.validate and self.split == "test":
            dataclasses.replace(self, split="validation").run()
        for step in self.steps():
            step()
        if hosts.is_first():
            timing.print_summary(self.layout, self.split)

    # What the steps read.

    @property
    def _part(self) -> bool:
        """Whether only a part of the split's users is decoded."""
        return self.split == "validation" and self.validation_users is not None

    def dataset(self, name: str) -> Dataset:
        """A category's dataset, read once for all steps of a process."""
        return _load_dataset(self.layout.dataset(name))

    def datasets(self, names: Sequence[str]) -> list[Dataset]:
        """Those of several categories."""
        return [self.dataset(name) for name in names]

    def tokenizer(self) -> Tokenizer:
        """The run's."""
        from calrec_jax.tokenizer import Tokenizer

        return Tokenizer.load(self.layout.tokenizer)

    def check_name(self, name: str, names: Sequence[str] | Mapping[str, Any], setting: str) -> None:
        """Raises a `CalrecError` for a `--name` that the setting does not have."""
        if name not in names:
            raise CalrecError(f"--name={name} is not in {setting}, which has {', '.join(names) or 'none'}")

    def step(self, name: str, out: pathlib.Path) -> contextlib.AbstractContextManager[None]:
        """What a step is done in; see `timing.step`."""
        return timing.step(self.layout, name, out)


def _by_first(name: str, step: Callable[..., None], *arguments: Any) -> Callable[[], None]:
    """A step that the first of several hosts does alone."""
    return functools.partial(hosts.first_alone, name, functools.partial(step, *arguments))


@functools.lru_cache(maxsize=4)
def _load_dataset_cached(folder: pathlib.Path, modified: int) -> Dataset:
    from calrec_jax.data.dataset import Dataset

    del modified
    return Dataset.load(folder)


def _load_dataset(folder: pathlib.Path) -> Dataset:
    """The dataset, read once for all steps of a process unless it was made anew."""
    manifest = folder / artifacts.MANIFEST
    return _load_dataset_cached(folder, manifest.stat().st_mtime_ns if manifest.exists() else 0)
