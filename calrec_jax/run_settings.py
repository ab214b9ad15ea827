"""What a run file says of a run (`run.*`), and what is checked of it before anything is done."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence

from calrec_jax.baselines import split_name
from calrec_jax.config import Config
from calrec_jax.errors import CalrecError
from calrec_jax.layout import RunLayout

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


@dataclasses.dataclass(frozen=True)
class RunSettings:
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
    def data_folder(self) -> str:
        """Folder or URL of the raw dumps."""
        return os.path.expanduser(self.data_dir) if self.data_dir is not None else str(self.layout.raw)

    @property
    def start_folder(self) -> pathlib.Path | None:
        """Of the checkpoint that the first stage starts from."""
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
