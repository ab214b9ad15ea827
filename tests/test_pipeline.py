"""The line's wiring: which step gets what, what is skipped, what is timed. The rooms are recorded, not run."""

import contextlib
import dataclasses
import pathlib
import sys
import types

import gin
import pytest

# First, while the modules that they read from are the real ones.
import calrec_jax.pretrained.tokenizer
import calrec_jax.rank.histories  # noqa: F401
from calrec_jax import artifacts, beside_line, config, pipeline, timing
from calrec_jax.errors import CalrecError
from calrec_jax.layout import RunLayout
from calrec_jax.pipeline import Line


@dataclasses.dataclass
class Recorder:
    """Stands for every room: writes a manifest as they do, and notes what it was given."""

    calls: list = dataclasses.field(default_factory=list)
    skipped: list = dataclasses.field(default_factory=list)
    fail_at: str | None = None

    def room(self, verb):
        def step(out, *inputs, **settings):
            if self.fail_at == verb:
                raise KeyboardInterrupt
            self.calls.append((verb, out, inputs, settings, gin.config.current_scope_str() if verb else None))
            if artifacts.is_done(out, kind=verb, made_from={}, settings={}):
                self.skipped.append(out)
            else:
                artifacts.write_manifest(out, kind=verb, made_from={}, settings={})
            return types.SimpleNamespace(card={})

        return step


@pytest.fixture
def rooms(monkeypatch):
    recorder = Recorder()

    def module(name, **members):
        monkeypatch.setitem(sys.modules, f"calrec_jax.{name}", types.SimpleNamespace(**members))

    class Loaded:
        load = staticmethod(lambda folder: f"read {folder}")

    module("data.prepare", prepare=recorder.room("prepare"))
    module("data.card", summary=lambda card: ["the card"])
    module("data.templates", Template=lambda: "template")
    module("data.dataset", Dataset=Loaded)
    module("tokenizer", make_tokenizer=recorder.room("vocab"), Tokenizer=Loaded)
    module("train.loop", train=recorder.room("train"))
    module("decode.run", decode=recorder.room("decode"))
    module("rank.run", rank=recorder.room("rank"))
    module("integrations.seqio_eval", eval_tasks=recorder.room("eval_tasks"))
    module("baselines.train", train_sasrec=recorder.room("baseline"))
    module("evaluate.run", evaluate=recorder.room("evaluate"))
    pipeline._load_dataset_cached.cache_clear()
    yield recorder
    pipeline._load_dataset_cached.cache_clear()


@pytest.fixture
def line(tmp_path):
    return Line(
        run_dir=str(tmp_path / "run"),
        target="Toys",
        categories=("Toys", "Games"),
        decodes=("sample", "beam"),
        rankings={"calrec": "sample", "beam": "beam", "blend": None},
    )


def test_the_whole_line(rooms, line, capsys):
    line.run()
    root = RunLayout(pathlib.Path(line.run_dir))
    assert [(verb, str(out.relative_to(root.root)), scope) for verb, out, _, _, scope in rooms.calls] == [
        ("prepare", "datasets/Toys", "Toys"),
        ("prepare", "datasets/Games", "Games"),
        ("vocab", "tokenizer", ""),
        ("train", "stage1", "stage1"),
        ("train", "stage2", "stage2"),
        ("decode", "completions/test-sample", "sample"),
        ("decode", "completions/test-beam", "beam"),
        ("rank", "rankings/test-calrec", "calrec"),
        ("rank", "rankings/test-beam", "beam"),
        ("rank", "rankings/test-blend", "blend"),
        ("evaluate", "report", ""),
    ]
    toys, games = (f"read {root.dataset(name)}" for name in ("Toys", "Games"))
    tokenizer = f"read {root.tokenizer}"
    inputs = [(given, settings) for _, _, given, settings, _ in rooms.calls]
    assert inputs[1] == (
        (),
        {
            "name": "Games",
            "reviews": None,  # the layout's usual names
            "metadata": None,
            "data_dir": str(root.raw),
        },
    )
    assert inputs[2] == (([toys, games], "template"), {})
    assert inputs[3] == (([toys, games], tokenizer), {"init_from": None})
    assert inputs[4] == (([toys], tokenizer), {"init_from": root.stage("stage1")})
    assert inputs[5] == ((toys, tokenizer, root.stage("stage2")), {"split": "test"})
    assert inputs[8] == ((toys, root.completions("test", "beam")), {"split": "test", "index_dir": root.index})
    assert inputs[9] == ((toys, None), {"split": "test", "index_dir": root.index})
    rankings = {name: root.ranking("test", name) for name in ("calrec", "beam", "blend")}
    assert inputs[10] == ((toys, rankings), {"split": "test", "oracle": None})
    out = capsys.readouterr().out
    assert f"calrec: train stage1 → {root.stage('stage1')}" in out
    assert "in all" in out and str(root.tokenizer) in out


def test_the_programs_of_a_finished_step_are_dropped(rooms, line, monkeypatch):
    at = []
    devices = [types.SimpleNamespace(platform="gpu")] * 4
    fake = types.SimpleNamespace(
        clear_caches=lambda: at.append(len(rooms.calls)),
        devices=lambda: devices,
        distributed=types.SimpleNamespace(is_initialized=lambda: False),
    )
    monkeypatch.setitem(sys.modules, "jax", fake)
    line.run()
    assert at == list(range(1, 12))
    for step in artifacts.read_json(line.layout.timing)["steps"]:
        computes = step["step"].split()[0] in ("train", "decode")
        assert step.get("device") == ("gpu" if computes else None), step
        assert not computes or step["device_seconds"] == pytest.approx(4 * step["seconds"], abs=0.01)


def test_device_seconds_add_up_over_resumed_runs(line):
    timing.add_seconds(line.layout, "train stage1", 10.0, ("gpu", 4))
    timing.add_seconds(line.layout, "train stage1", 5.0, ("gpu", 8))
    (step,) = artifacts.read_json(line.layout.timing)["steps"]
    assert step == {"step": "train stage1", "seconds": 15.0, "device": "gpu", "device_seconds": 80.0}


def test_a_second_run_skips_every_step_and_keeps_the_times(rooms, line, capsys):
    line.run()
    first = artifacts.read_json(line.layout.timing)
    assert [step["step"] for step in first["steps"]] == [
        "prepare Toys",
        "prepare Games",
        "vocab",
        "train stage1",
        "train stage2",
        "decode test-sample",
        "decode test-beam",
        "rank test-calrec",
        "rank test-beam",
        "rank test-blend",
        "evaluate test",
    ]
    assert first["seconds"] == pytest.approx(sum(step["seconds"] for step in first["steps"]), abs=0.01)
    capsys.readouterr()
    line.run()
    assert len(rooms.skipped) == 11
    assert artifacts.read_json(line.layout.timing) == first
    assert capsys.readouterr().out.count("was done already, skipped") == 11


def test_an_interrupted_line_goes_on_and_its_times_add_up(rooms, line):
    rooms.fail_at = "decode"
    with pytest.raises(KeyboardInterrupt):
        line.run()
    steps = artifacts.read_json(line.layout.timing)["steps"]
    assert steps[-1]["step"] == "decode test-sample", "what was interrupted counts"
    steps[-1]["seconds"] = 100.0
    artifacts.write_json(line.layout.timing, {"steps": steps, "seconds": 100.0})
    rooms.fail_at = None
    line.run()
    assert len(rooms.skipped) == 5
    (seconds,) = [
        step["seconds"]
        for step in artifacts.read_json(line.layout.timing)["steps"]
        if step["step"] == "decode test-sample"
    ]
    assert 100 <= seconds < 200


def test_other_splits_stages_and_files(rooms, line, tmp_path):
    (tmp_path / "dumps").mkdir()
    oracle = tmp_path / "dumps" / "oracle_Toys.npz"
    oracle.write_bytes(b"")
    changed = dataclasses.replace(
        line,
        split="validation",
        stages=("stage2",),
        categories=(),
        data_dir=str(tmp_path / "dumps"),
        reviews="{category}.jsonl",
        decodes=("sample",),
        rankings={"calrec": "sample"},
    )
    changed.run()
    by_verb = {verb: (out, inputs, settings) for verb, out, inputs, settings, _ in rooms.calls}
    assert by_verb["prepare"][2]["reviews"] == "{category}.jsonl"
    assert by_verb["prepare"][2]["data_dir"] == str(tmp_path / "dumps")
    assert by_verb["train"][2] == {"init_from": None}
    assert by_verb["decode"][0].name == "validation-sample"
    assert by_verb["evaluate"][0].name == "report-validation"
    assert by_verb["evaluate"][2]["oracle"] is None, "the shop's oracle knows the last purchase, the test target"
    dataclasses.replace(changed, split="test").evaluate()
    assert rooms.calls[-1][3]["oracle"] == oracle


def test_a_part_of_the_validation_split_comes_first_and_a_ranking_is_scored(rooms, line):
    rankings = {"blend": None, "calrec": "sample", "rerank": "score"}
    changed = dataclasses.replace(
        line,
        decodes=("score", "sample"),
        rankings=rankings,
        candidates={"score": "blend"},
        validate=True,
        validation_users=5,
    )
    changed.run()
    root = RunLayout(pathlib.Path(line.run_dir))
    steps = [(f"{verb} {out.name}", settings) for verb, out, _, settings, _ in rooms.calls]
    names = [name for name, _ in steps]
    part = [
        "decode validation-sample",
        "rank validation-blend",
        "rank validation-calrec",
        "decode validation-score",
        "rank validation-rerank",
        "evaluate report-validation",
    ]
    at = names.index(part[0])
    assert names[at : at + 6] == part
    assert names[-6:] == [name.replace("report-validation", "report").replace("validation", "test") for name in part]
    settings = dict(steps)
    blend = str(root.ranking("validation", "blend"))
    assert settings["decode validation-score"] == {"split": "validation", "max_users": 5, "candidates": blend}
    assert settings["rank validation-rerank"]["missing"] == "skip"
    assert settings["evaluate report-validation"]["users"] == "ranked"
    assert settings["decode test-sample"] == {"split": "test"}
    assert settings["decode test-score"] == {"split": "test", "candidates": str(root.ranking("test", "blend"))}
    assert "missing" not in settings["rank test-rerank"] and "users" not in settings["evaluate report"]
    loaded = config.Config([config.Binding("score", "decode", "candidates", False, "run.gin:3")])
    with pytest.raises(CalrecError, match=r"run.candidates says what is scored"):
        changed.check(loaded)


def test_baselines_are_trained_once_ranked_each_and_reported(rooms, line):
    trained = dataclasses.replace(line, rankings={}, baselines=("sasrec", "sasrec_new", "other_removed"))
    trained.run_baselines()
    root = RunLayout(pathlib.Path(line.run_dir))
    assert [(verb, str(out.relative_to(root.root)), scope) for verb, out, _, _, scope in rooms.calls] == [
        ("prepare", "datasets/Toys", "Toys"),
        ("baseline", "baselines/sasrec", "sasrec"),
        ("rank", "rankings/test-sasrec", "sasrec"),
        ("baseline", "baselines/sasrec", "sasrec"),
        ("rank", "rankings/test-sasrec_new", "sasrec_new"),
        ("baseline", "baselines/other", "other"),
        ("rank", "rankings/test-other_removed", "other_removed"),
        ("evaluate", "report", ""),
    ]
    assert rooms.skipped == [root.baseline("sasrec")]
    rank = {"split": "test", "index_dir": root.index, "source": "sasrec", "baseline": root.baseline("sasrec")}
    assert rooms.calls[2][2:4] == ((f"read {root.dataset('Toys')}", None), rank | {"leave_out_history": "none"})
    assert rooms.calls[4][3] == rank | {"leave_out_history": "all"}
    assert rooms.calls[6][3] == rank | {"leave_out_history": "last", "baseline": root.baseline("other")}
    assert list(rooms.calls[-1][2][1]) == ["sasrec", "sasrec_new", "other_removed"]


def test_a_baseline_alone_has_a_report_of_its_own(rooms, line):
    line = dataclasses.replace(line, baselines=("sasrec",))
    root = RunLayout(pathlib.Path(line.run_dir))
    line.run_baselines("sasrec")
    assert [call[0] for call in rooms.calls] == ["prepare", "baseline", "rank", "evaluate"]
    _, out, inputs, settings, _ = rooms.calls[-1]
    assert out == root.root / "baselines" / "reports" / "test-sasrec"
    assert inputs[1] == {"sasrec": root.ranking("test", "sasrec")} and settings == {"split": "test", "baselines": ()}
    line.run_baselines("ease_new")
    _, out, inputs, settings, _ = rooms.calls[-1]
    assert out == root.root / "baselines" / "reports" / "test-ease_new"
    assert inputs[1] == {} and settings == {"split": "test", "baselines": ("ease_new",)}
    with pytest.raises(CalrecError, match="--name=magic is not in run.baselines or evaluate"):
        line.run_baselines("magic")


def test_the_whole_line_has_the_baselines_and_no_tokenizer_where_nothing_is_trained_on_text(rooms, line):
    dataclasses.replace(line, stages=(), decodes=(), rankings={}, baselines=("sasrec",)).run()
    verbs = [call[0] for call in rooms.calls]
    assert verbs == ["prepare", "prepare", "baseline", "rank", "evaluate"]


def test_baselines_beside_rankings_that_are_not_made(rooms, line):
    line = dataclasses.replace(line, baselines=("sasrec",))
    with pytest.raises(CalrecError, match=r"there is no .*test-calrec, .*test-blend yet: run `calrec run`"):
        line.run_baselines()
    assert not rooms.calls


def test_seqio_tasks_are_evaluated_as_a_ranking_is_made(rooms, line):
    beside_line.eval_tasks(line)
    beside_line.eval_tasks(line, "beam")
    (_, out, inputs, first, _), (_, _, _, second, _) = rooms.calls
    root = RunLayout(pathlib.Path(line.run_dir))
    assert out == root.root / "eval_tasks" / "test-calrec"
    assert inputs == ([root.dataset("Toys"), root.dataset("Games")], root.tokenizer, root.stage("stage2"))
    assert first == {"split": "test", "decode_scope": "sample", "rank_scope": "calrec"}
    assert second == {"split": "test", "decode_scope": "beam", "rank_scope": "beam"}
    with pytest.raises(CalrecError, match="--name=blend is not in run.rankings, which has calrec, beam"):
        beside_line.eval_tasks(line, "blend")
    with pytest.raises(CalrecError, match="names no decode"):
        beside_line.eval_tasks(dataclasses.replace(line, rankings={"blend": None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "train"}, r"run.split is 'train'; it can be validation or test"),
        ({"stages": ("stage3",)}, r"run.stages has 'stage3'; it can have stage1 and stage2"),
        ({"rankings": {"calrec": "sampel"}}, r"run.rankings: calrec ranks the decode 'sampel'"),
        ({"categories": ("../Toys",)}, r"'../Toys' cannot be the name of a category"),
        ({"baselines": ("calrec",)}, r"run.baselines: calrec would be ranked twice"),
        ({"baselines": ("sasrec", "sasrec")}, r"run.baselines: sasrec would be ranked twice"),
        ({"candidates": {"beam": "x"}}, r"run.candidates: beam is to score the ranking 'x'"),
        ({"candidates": {"beam": "blend"}}, r"run.rankings: blend must stand before \['beam'\]"),
        ({"target": ""}, r"'' cannot be the name of a category"),
    ],
)
def test_settings_that_cannot_be(line, changes, message):
    with pytest.raises(CalrecError, match=message):
        dataclasses.replace(line, **changes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda line: line.train("stage9"), r"--stage=stage9 is not in run.stages, which has stage1, stage2"),
        (lambda line: line.decode("x"), r"--name=x is not in run.decodes, which has sample, beam"),
        (lambda line: line.rank("x"), r"--name=x is not in run.rankings, which has calrec, beam, blend"),
        (lambda line: dataclasses.replace(line, stages=()).decode("sample"), r"run.stages is empty"),
    ],
)
def test_names_that_are_not_in_the_run(rooms, line, call, message):
    with pytest.raises(CalrecError, match=message):
        call(line)


def test_a_setting_without_default_that_is_not_set(rooms, line):
    with (
        pytest.raises(CalrecError, match=r"unset that has no default.*num_steps"),
        line.step("x", line.layout.tokenizer),
    ):
        raise RuntimeError("Required bindings for `train` not provided in config: ['num_steps']")
    with pytest.raises(RuntimeError, match="other"), line.step("x", line.layout.tokenizer):
        raise RuntimeError("other")


def test_bindings_that_the_run_would_not_read(line, tmp_path):
    @gin.configurable("pipeline_probe")
    def probe(rate=1):
        return rate

    with contextlib.ExitStack() as stack:
        stack.callback(gin.clear_config)
        for scope in ("stage1", "sample", "blend"):
            line.check(config.load([], [f"{scope}/pipeline_probe.rate=2"], modules=()))
        with pytest.raises(CalrecError, match=r"nothing uses the scope sampel/; did you mean sample"):
            line.check(config.load([], ["sampel/pipeline_probe.rate=2"], modules=()))
        loaded = config.Config([config.Binding("sample", "rank", "epsilon", False, "run.gin:3")])
        with pytest.raises(CalrecError, match=r"run.gin:3: nothing uses rank in the scope sample/"):
            line.check(loaded)  # `sample` is a decode; its ranking is called `calrec`


def test_the_layout_is_the_documented_one(tmp_path):
    layout = RunLayout(tmp_path)
    paths = [
        layout.raw,
        layout.dataset("Toys"),
        layout.tokenizer,
        layout.stage("stage1"),
        layout.completions("test", "sample"),
        layout.ranking("test", "calrec"),
        layout.report("test"),
        layout.report("validation"),
        layout.index,
        layout.baseline("sasrec"),
        layout.baseline_report("test", "sasrec"),
        layout.timing,
    ]
    assert [str(path.relative_to(tmp_path)) for path in paths] == [
        "raw",
        "datasets/Toys",
        "tokenizer",
        "stage1",
        "completions/test-sample",
        "rankings/test-calrec",
        "report",
        "report-validation",
        "index",
        "baselines/sasrec",
        "baselines/reports/test-sasrec",
        "timing.json",
    ]


def test_export_is_given_the_runs_parts(rooms, line, monkeypatch):
    given = {}

    def export(out, format, origin, dataset, tokenizer):
        given.update(out=out, format=format, origin=origin, dataset=dataset, tokenizer=tokenizer)

    monkeypatch.setitem(sys.modules, "calrec_jax.export.run", types.SimpleNamespace(export=export))
    root = pathlib.Path(line.run_dir)
    beside_line.export(line, "jax")
    assert (given["out"], given["format"]) == (root / "exports" / "jax", "jax")
    assert given["origin"].stages == [root / "stage1", root / "stage2"]
    assert given["origin"].datasets == [root / "datasets" / "Toys", root / "datasets" / "Games"]
    assert given["origin"].rankings == {
        "calrec": (root / "rankings" / "test-calrec", root / "completions" / "test-sample"),
        "beam": (root / "rankings" / "test-beam", root / "completions" / "test-beam"),
    }
    assert given["tokenizer"] == root / "tokenizer" and given["dataset"] == f"read {root / 'datasets' / 'Toys'}"
    beside_line.export(line, "t5x", stage="stage1", out=str(root / "other"))
    assert given["origin"].stages == [root / "stage1"] and given["out"] == root / "other"
    with pytest.raises(CalrecError, match="--stage=stage3 is not in run.stages, which has stage1, stage2"):
        beside_line.export(line, "jax", stage="stage3")
    with pytest.raises(CalrecError, match="run.stages is empty, so there is no checkpoint to export"):
        beside_line.export(dataclasses.replace(line, stages=()), "jax")
