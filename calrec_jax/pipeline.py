"""The line in a row: each step of a run folder, from raw dumps to the report.

Notable: a step that is done is skipped, one that was interrupted goes on, so `Line.run` is called again after anything
that stopped it. The same `Line` serves each verb of the command, which is why one gin file holds a whole run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gin

from calrec_jax import artifacts, hosts
from calrec_jax.baselines import split_name
from calrec_jax.config import Config
from calrec_jax.errors import CalrecError
from calrec_jax.layout import RunLayout

if TYPE_CHECKING:
    from calrec_jax.data.dataset import Dataset
    from calrec_jax.tokenizer import Tokenizer

SPLITS = ("validation", "test")
_FROM_LINE = "the run passes it; set it in run.* instead"
# What the line passes itself, so that binding it would be ignored.
_PASSED = {
    "prepare": ("out", "name", "reviews", "metadata", "data_dir"),
    "vocab": ("out", "datasets", "template"),
    "train": ("out", "datasets", "tokenizer", "init_from"),
    "decode": ("out", "dataset", "tokenizer", "checkpoint", "split"),
    "rank": ("out", "dataset", "completions", "split", "baseline", "index_dir"),
    "sasrec": ("out", "dataset"),
    "evaluate": ("out", "dataset", "rankings", "split", "files", "oracle", "run_dir"),
    "export": ("out", "format", "origin", "dataset", "tokenizer"),
}


@gin.configurable("run")
@dataclasses.dataclass(frozen=True)
class Line:
    """One run: which categories, which steps, in which folder.

    Attributes:
      run_dir: the run folder.
      target: the category to recommend in; stage II and everything after it.
      categories: what stage I and the tokenizer are trained on; the target belongs to them, too, when it is listed.
      data_dir: folder or URL of the raw dumps; `raw/` of the run folder when None.
      reviews: file names of a category's reviews in `data_dir`, one or several; `{category}` stands for its name. None:
        the usual name in `prepare.layout`. A dict from category to names where the categories are of several releases;
        each category is a gin scope of `prepare`, so that `Toys/prepare.layout = "2014"` is of Toys alone.
      metadata: the same of its metadata.
      oracle: the same of the synthetic shop's own probabilities; where there is one, the report shows the ceiling.
      stages: training stages in order, each a gin scope of `train`: "stage1" trains on `categories`, "stage2" on
        `target`, from the parameters of the stage before.
      decodes: gin scopes of `decode`; the completions each writes have its name.
      rankings: gin scope of `rank` to the name of the decode it ranks, or None where it needs no completions.
      baselines: baselines that are trained (`evaluate.baselines` has the others): gin scopes of `sasrec` and of `rank`.
        A name that ends in "_removed" or "_new" ranks the model of the name before that, with the last item or all of
        the history left out; the model is trained once.
      split: "validation" or "test"; what is decoded, ranked and evaluated.
      init_from: what the first stage starts from: a folder that `calrec import_hf` wrote, or a stage of another run.
        Its tokenizer is the run's, too; none is trained.
      candidates: name of a decode of mode "score" to the ranking of `rankings` whose first items it scores.
      validate: whether `calrec run` does the validation split before the test split, for what is fitted there.
      validation_users: how many users of the validation split are decoded, ranked and evaluated; None is all.
    """

    run_dir: str
    target: str
    categories: tuple[str, ...] = ()
    data_dir: str | None = None
    reviews: str | Sequence[str] | Mapping[str, str | Sequence[str]] | None = None
    metadata: str | Sequence[str] | Mapping[str, str | Sequence[str]] | None = None
    oracle: str = "oracle_{category}.npz"
    stages: tuple[str, ...] = ("stage1", "stage2")
    decodes: tuple[str, ...] = ("sample",)
    rankings: Mapping[str, str | None] = dataclasses.field(default_factory=lambda: {"calrec": "sample"})
    baselines: tuple[str, ...] = ()
    split: str = "test"
    init_from: str | None = None
    candidates: Mapping[str, str] = dataclasses.field(default_factory=dict)
    validate: bool = False
    validation_users: int | None = None

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise CalrecError(f"run.split is {self.split!r}; it can be {' or '.join(SPLITS)}")
        for stage in self.stages:
            if stage not in ("stage1", "stage2"):
                raise CalrecError(f"run.stages has {stage!r}; it can have stage1 and stage2")
        for name, decode in self.rankings.items():
            if decode is not None and decode not in self.decodes:
                raise CalrecError(
                    f"run.rankings: {name} ranks the decode {decode!r}, and run.decodes has {self.decodes}"
                )
        for decode, ranking in self.candidates.items():
            places = {name: place for place, name in enumerate(self.rankings)}
            users = [name for name, own in self.rankings.items() if own == decode]
            if decode not in self.decodes or ranking not in places:
                raise CalrecError(
                    f"run.candidates: {decode} is to score the ranking {ranking!r}; run.decodes has {self.decodes}, "
                    f"and run.rankings {tuple(self.rankings)}"
                )
            if any(places[name] <= places[ranking] for name in users):
                raise CalrecError(f"run.rankings: {ranking} must stand before {users}, which rank what {decode} scores")
        both = sorted({name for name in self.baselines if self.baselines.count(name) > 1 or name in self.rankings})
        if both:
            raise CalrecError(f"run.baselines: {', '.join(both)} would be ranked twice (run.rankings counts, too)")
        for category in self.all_categories:
            if not category or category.startswith(".") or "/" in category or "\\" in category:
                raise CalrecError(f"run.categories: {category!r} cannot be the name of a category")
        for what, names in (("reviews", self.reviews), ("metadata", self.metadata)):
            unknown = sorted(set(names) - set(self.all_categories)) if isinstance(names, Mapping) else []
            if unknown:
                raise CalrecError(f"run.{what} names {unknown}, which are none of {list(self.all_categories)}")

    @property
    def all_categories(self) -> tuple[str, ...]:
        """The target and the categories, each once, in a stable order."""
        return tuple(dict.fromkeys([*self.categories, self.target]))

    @property
    def layout(self) -> RunLayout:
        """The paths in the run folder."""
        return RunLayout(pathlib.Path(self.run_dir))

    @property
    def _data_dir(self) -> str:
        return os.path.expanduser(self.data_dir) if self.data_dir is not None else str(self.layout.raw)

    @property
    def _init_from(self) -> pathlib.Path | None:
        return pathlib.Path(self.init_from).expanduser() if self.init_from is not None else None

    def check(self, config: Config) -> None:
        """Raises a `CalrecError` for what this run would not read: a scope it never enters, what it passes itself."""
        models = [split_name(name)[0] for name in self.baselines]
        ranks = [*self.rankings, *self.baselines]
        config.check_scopes([*self.all_categories, *self.stages, *self.decodes, *ranks, *models])
        for selector, scopes in (
            ("prepare", self.all_categories),
            ("train", self.stages),
            ("decode", self.decodes),
            ("rank", ranks),
            ("sasrec", models),
        ):
            config.check_scopes(scopes, selector)
        for selector, parameters in _PASSED.items():
            config.check_not_bound(selector, parameters, _FROM_LINE)
        if self.candidates:
            config.check_not_bound("decode", ("candidates",), "run.candidates says what is scored")

    # The steps.

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
            dataset = prepare(out, name=category, reviews=reviews, metadata=metadata, data_dir=self._data_dir)
            print(*(f"  {line}" for line in summary(dataset.card)), sep="\n", flush=True)

    def vocab(self) -> None:
        """Trains the tokenizer on the catalogues of all categories, or takes that of `init_from`."""
        from calrec_jax.data.templates import Template
        from calrec_jax.pretrained.tokenizer import adopt_tokenizer
        from calrec_jax.tokenizer import make_tokenizer

        if self._init_from is not None:
            with self.step("vocab", self.layout.tokenizer):
                adopt_tokenizer(self.layout.tokenizer, self._init_from)
                print(f"vocab: the tokenizer of {self._init_from}; vocab.* settings are not used")
            return
        with self.step("vocab", self.layout.tokenizer):
            make_tokenizer(self.layout.tokenizer, self._datasets(self.all_categories), Template())

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
                self._datasets(names),
                self._tokenizer(),
                init_from=self.layout.stage(before[-1]) if before else self._init_from,
            )

    def decode(self, name: str) -> None:
        """Writes completions for the users of the split from the last stage's checkpoint."""
        from calrec_jax.decode.run import decode

        self._check_name(name, self.decodes, "run.decodes")
        if not self.stages:
            raise CalrecError("run.stages is empty, so there is no checkpoint to decode from")
        out = self.layout.completions(self.split, name)
        with self.step(f"decode {self.split}-{name}", out), gin.config_scope(name):
            checkpoint = self.layout.stage(self.stages[-1])
            own: dict[str, Any] = {"max_users": self.validation_users} if self._part else {}
            if name in self.candidates:
                own["candidates"] = str(self.layout.ranking(self.split, self.candidates[name]))
            decode(out, self._dataset(self.target), self._tokenizer(), checkpoint, split=self.split, **own)

    def rank(self, name: str) -> None:
        """Turns completions into a ranking of the catalogue."""
        from calrec_jax.rank.run import rank

        self._check_name(name, self.rankings, "run.rankings")
        decode = self.rankings[name]
        completions = self.layout.completions(self.split, decode) if decode is not None else None
        out = self.layout.ranking(self.split, name)
        with self.step(f"rank {self.split}-{name}", out), gin.config_scope(name):
            own: dict[str, Any] = {"missing": "skip"} if self._part else {}
            rank(
                out,
                self._dataset(self.target),
                completions,
                split=self.split,
                index_dir=self.layout.index,
                **own,
            )

    def baseline(self, name: str) -> None:
        """Trains a baseline of `baselines`, and ranks the catalogue by it."""
        from calrec_jax.baselines.train import train_sasrec
        from calrec_jax.rank.run import rank

        self._check_name(name, self.baselines, "run.baselines")
        model, left_out = split_name(name)
        folder, out = self.layout.baseline(model), self.layout.ranking(self.split, name)
        dataset = self._dataset(self.target)
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

        self._check_name(name, (*self.baselines, *BASELINES), "run.baselines or evaluate.baselines")
        trained = {}
        if name in self.baselines:
            self.baseline(name)
            trained = {name: self.layout.ranking(self.split, name)}
        out = self.layout.baseline_report(self.split, name)
        with self.step(f"evaluate {self.split}-{name}", out):
            counted = () if trained else (name,)
            evaluate(out, self._dataset(self.target), trained, split=self.split, baselines=counted)

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

    def doctor(self) -> None:
        """Prints how well BM25 finds the target category's items by their own texts, and by the completions there."""
        from calrec_jax.rank import doctor
        from calrec_jax.rank.bm25 import BM25Index
        from calrec_jax.rank.completions import Completions

        dataset = self._dataset(self.target)
        index = BM25Index(dataset.texts)
        print(doctor.report(self.target, doctor.examine(index, dataset.texts)), flush=True)
        for name in self.decodes:
            folder = self.layout.completions(self.split, name)
            if not (folder / artifacts.MANIFEST).exists():
                print(f"completions {folder.name}: none yet", flush=True)
                continue
            distinct, count = Completions(folder, dataset, ["texts"], missing="skip").distinct_texts()
            print(doctor.report_texts(folder.name, doctor.examine_texts(index, dataset.texts, distinct, count)))

    def evaluate(self) -> None:
        """Scores the rankings beside the baselines, and writes the report."""
        from calrec_jax.evaluate.run import evaluate

        rankings = {name: self.layout.ranking(self.split, name) for name in (*self.baselines, *self.rankings)}
        out = self.layout.report(self.split)
        # The shop knows the probabilities of the last purchase, which is the test split's target.
        oracle = pathlib.Path(self._data_dir, self.oracle.replace("{category}", self.target))
        with self.step(f"evaluate {self.split}", out):
            evaluate(
                out,
                self._dataset(self.target),
                rankings,
                split=self.split,
                oracle=oracle if self.split == "test" and oracle.exists() else None,
                **({"users": "ranked"} if self._part else {}),
            )

    def evaluate_files(self, arguments: Sequence[str]) -> None:
        """Scores rankings made by others, `FILE` or `NAME=FILE`, beside those of the run that are there.

        The report is in `report-<names>` (with the split before the names where that is not test).
        """
        from calrec_jax.evaluate import foreign
        from calrec_jax.evaluate.run import evaluate

        files = foreign.parse_names(arguments)
        own = {name: self.layout.ranking(self.split, name) for name in self.rankings}
        made = {name: folder for name, folder in own.items() if (folder / artifacts.MANIFEST).exists()}
        if len(made) < len(own):
            print(f"calrec: not made yet, and left out: {', '.join(name for name in own if name not in made)}")
        out = self.layout.report(self.split)
        out = out.with_name("-".join([out.name, *files]))
        with self.step(f"evaluate {self.split} {' '.join(files)}", out):
            evaluate(out, self._dataset(self.target), made, split=self.split, files=files, run_dir=self.layout.root)
        print(f"Made:\n  {out / 'report.html'}")

    def eval_tasks(self, name: str | None = None) -> None:
        """Evaluates SeqIO tasks as the ranking `name` does it; None is the first one that ranks completions.

        What it decodes and its metrics lie in `eval_tasks/<split>-<name>/` of the run folder. The default task is the
        target's.
        """
        from calrec_jax.integrations.seqio_eval import eval_tasks

        names = {ranking: decode for ranking, decode in self.rankings.items() if decode is not None}
        if not names or not self.stages:
            raise CalrecError(
                "run.rankings names no decode, or run.stages is empty, so there is nothing to evaluate with"
            )
        name = next(iter(names)) if name is None else name
        self._check_name(name, names, "run.rankings")
        target_first = dict.fromkeys([self.target, *self.categories])
        out = self.layout.eval_tasks(self.split, name)
        with self.step(f"eval_tasks {self.split}-{name}", out):
            eval_tasks(
                out,
                [self.layout.dataset(category) for category in target_first],
                self.layout.tokenizer,
                self.layout.stage(self.stages[-1]),
                split=self.split,
                decode_scope=names[name],
                rank_scope=name,
            )

    def export(self, format: str, stage: str | None = None, out: str | None = None) -> None:
        """Writes a stage, the last one by default, for serving or for T5X; see `calrec_jax.export.run.export`.

        Args:
          format: "saved_model", "jax" or "t5x".
          stage: of `stages`.
          out: folder; None is `exports/<format>/` of the run folder.
        """
        from calrec_jax.export.card import Origin
        from calrec_jax.export.run import export

        if not self.stages:
            raise CalrecError("run.stages is empty, so there is no checkpoint to export")
        if stage is not None and stage not in self.stages:
            raise CalrecError(f"--stage={stage} is not in run.stages, which has {', '.join(self.stages)}")
        stages = self.stages[: self.stages.index(stage) + 1] if stage is not None else self.stages
        names = self.all_categories if "stage1" in stages else (self.target,)
        rankings = {
            name: (self.layout.ranking(self.split, name), self.layout.completions(self.split, decode))
            for name, decode in self.rankings.items()
            if decode is not None
        }
        origin = Origin(
            [self.layout.stage(name) for name in stages],
            [self.layout.dataset(name) for name in names],
            rankings,
            self.layout.report(self.split),
        )
        folder = pathlib.Path(out).expanduser() if out is not None else self.layout.export(format)
        with self.step(f"export {format}", folder):
            export(folder, format, origin, self._dataset(self.target), self.layout.tokenizer)

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
            print_summary(self.layout, self.split)

    # What the steps read.

    @property
    def _part(self) -> bool:
        """Whether only a part of the split's users is decoded."""
        return self.split == "validation" and self.validation_users is not None

    def _dataset(self, name: str) -> Dataset:
        return _load_dataset(self.layout.dataset(name))

    def _datasets(self, names: Sequence[str]) -> list[Dataset]:
        return [self._dataset(name) for name in names]

    def _tokenizer(self) -> Tokenizer:
        from calrec_jax.tokenizer import Tokenizer

        return Tokenizer.load(self.layout.tokenizer)

    def _check_name(self, name: str, names: Sequence[str] | Mapping[str, Any], setting: str) -> None:
        if name not in names:
            raise CalrecError(f"--name={name} is not in {setting}, which has {', '.join(names) or 'none'}")

    @contextlib.contextmanager
    def step(self, name: str, out: pathlib.Path) -> Iterator[None]:
        """Says what is done and where, and adds the seconds to `timing.json`, also when the step is interrupted."""
        was_complete = (out / artifacts.MANIFEST).exists()
        print(f"calrec: {name} → {out}" + (" (checking what is there)" if was_complete else ""), flush=True)
        start = time.monotonic()
        try:
            yield
        except KeyboardInterrupt:
            self._add_seconds(name, time.monotonic() - start, _devices(name))
            raise
        except RuntimeError as error:
            if "Required bindings" not in str(error):  # gin's words
                raise
            raise CalrecError(f"the gin files leave a setting unset that has no default: {error}") from error
        seconds = time.monotonic() - start
        devices = _devices(name)
        _free_programs()
        if not was_complete:
            self._add_seconds(name, seconds, devices)
        print(
            f"calrec: {name} " + ("was done already, skipped" if was_complete else f"took {seconds:.1f} s"), flush=True
        )

    def _add_seconds(self, name: str, seconds: float, devices: tuple[str, int] | None = None) -> None:
        """Adds to what a step took; `devices` (platform, how many) computed for it, which gives its device-seconds."""
        if not hosts.is_first():
            return
        steps = {step["step"]: step for step in _read_steps(self.layout)}
        own = steps.setdefault(name, {"step": name, "seconds": 0.0})
        if devices is not None:
            before = own.get("device_seconds", 0.0)
            own |= {"device": devices[0], "device_seconds": round(before + seconds * devices[1], 3)}
        own["seconds"] = round(own["seconds"] + seconds, 3)
        total = round(sum(step["seconds"] for step in steps.values()), 3)
        artifacts.write_json(self.layout.timing, {"steps": list(steps.values()), "seconds": total})


def _by_first(name: str, step: Callable[..., None], *arguments: Any) -> Callable[[], None]:
    """A step that the first of several hosts does alone."""
    return functools.partial(hosts.first_alone, name, functools.partial(step, *arguments))


_COMPUTING = ("train", "decode")


def _devices(step: str) -> tuple[str, int] | None:
    """Platform and number of JAX's devices, for the steps that compute on them."""
    if step.split()[0] not in _COMPUTING or "jax" not in sys.modules:
        return None
    devices = sys.modules["jax"].devices()
    return devices[0].platform, len(devices)


def _free_programs() -> None:
    """Drops the step's compiled programs: those of all steps together would take half of a small machine's memory."""
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()


def _read_steps(layout: RunLayout) -> list[dict[str, Any]]:
    """What `timing.json` says of each step so far, in the order in which the steps were first run."""
    return artifacts.read_json(layout.timing)["steps"] if layout.timing.exists() else []


def _read_seconds(layout: RunLayout) -> dict[str, float]:
    """Seconds of each step so far, in the order in which the steps were first run."""
    return {step["step"]: step["seconds"] for step in _read_steps(layout)}


@functools.lru_cache(maxsize=4)
def _load_dataset_cached(folder: pathlib.Path, modified: int) -> Dataset:
    from calrec_jax.data.dataset import Dataset

    del modified
    return Dataset.load(folder)


def _load_dataset(folder: pathlib.Path) -> Dataset:
    """The dataset, read once for all steps of a process unless it was made anew."""
    manifest = folder / artifacts.MANIFEST
    return _load_dataset_cached(folder, manifest.stat().st_mtime_ns if manifest.exists() else 0)


def print_summary(layout: RunLayout, split: str) -> None:
    """Prints the paths of what the run made and the seconds of each step; the table is `evaluate`'s."""
    made = [layout.root / "datasets", layout.tokenizer, layout.stage("stage1"), layout.stage("stage2")]
    made += [layout.root / "completions", layout.root / "rankings", layout.report(split) / "report.html"]
    print("Made:", *(f"  {path}" for path in made if path.exists()), sep="\n")
    timing = _read_seconds(layout)
    print("Seconds:", *(f"  {seconds:9.1f}  {name}" for name, seconds in timing.items()), sep="\n")
    print(f"  {sum(timing.values()):9.1f}  in all", flush=True)
