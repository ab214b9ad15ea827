"""`calrec compare`: paired by user, several seeds together, and refusals that say why."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from ranking_data import completion_rows, make_dataset, write_completions

from calrec_jax import artifacts, cli
from calrec_jax.errors import CalrecError
from calrec_jax.evaluate.bootstrap import holm, paired
from calrec_jax.evaluate.compare import compare, parse_groups
from calrec_jax.evaluate.run import evaluate
from calrec_jax.evaluate.side_by_side import common_slices
from calrec_jax.rank.run import rank


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Four run folders: of two seeds each; their rankings differ."""
    root = tmp_path_factory.mktemp("compare")
    dataset = make_dataset(root / "dataset", num_users=30)
    for seed, name in enumerate(("a0", "a1", "b0", "b1")):
        made = write_completions(
            root / name / "completions" / "test-sample", dataset, completion_rows(dataset, seed=seed)
        )
        ranking = rank(root / name / "rankings" / "test-calrec", dataset, made)
        evaluate(root / name / "report", dataset, {"calrec": ranking}, resamples=50)
    return root, dataset


def values_of(run, metric="ndcg@10"):
    table = pq.read_table(run / "report" / "per_user.parquet").to_pylist()
    return np.array([row[metric] for row in sorted(table, key=lambda row: row["user_id"]) if row["name"] == "calrec"])


def test_two_runs_are_paired_by_user(runs, tmp_path):
    root, _ = runs
    found = compare(parse_groups([str(root / "a0"), str(root / "b0")]), tmp_path, resamples=300)
    assert [row["name"] for row in found["rows"][:2]] == ["a0: calrec", "b0: calrec"]
    assert [row["name"] for row in found["rows"][2:]] == ["popularity", "last_item", "transitions", "bm25_last"]
    expected = paired(values_of(root / "b0"), values_of(root / "a0"), resamples=300)
    own = next(each for each in found["comparisons"] if each["metric"] == "ndcg@10")
    assert (own["a"], own["b"]) == ("b0: calrec", "a0: calrec")
    assert own["difference"] == pytest.approx(expected.difference) and own["p"] == expected.p
    assert own["interval"] == list(expected.interval)
    assert json.loads((tmp_path / "compare.json").read_text()) == found
    page = (tmp_path / "compare.html").read_text()
    assert "{{" not in page and "b0: calrec" in page


def test_seeds_are_mean_and_deviation_and_stay_together(runs, tmp_path):
    root, _ = runs
    groups = parse_groups(
        [f"one={root / 'a0'},{root / 'a1'}", f"two={root / 'b0'},{root / 'b1'}", f"alone={root}/report"]
    )
    assert [len(paths) for paths in groups.values()] == [2, 2, 1]
    del groups["alone"]
    found = compare(groups, tmp_path, resamples=300)
    one = found["rows"][0]
    each = [values_of(root / name) for name in ("a0", "a1")]
    assert one["seeds"] == 2 and one["metrics"]["ndcg@10"] == pytest.approx(np.mean(each))
    assert one["deviation"]["ndcg@10"] == pytest.approx(np.std([v.mean() for v in each], ddof=1))
    other = np.mean([values_of(root / name) for name in ("b0", "b1")], axis=0)
    expected = paired(other, np.mean(each, axis=0), resamples=300)
    own = [each for each in found["comparisons"] if each["metric"] == "ndcg@10"]
    assert own[0]["difference"] == pytest.approx(expected.difference) and own[0]["p"] == pytest.approx(expected.p)
    assert own[0]["p_holm"] == pytest.approx(holm([own[0]["p"]])[0])
    assert found["rows"][2]["deviation"] is None


def test_the_same_inputs_give_the_same_bytes(runs, tmp_path):
    root, _ = runs
    groups = parse_groups([str(root / "a0"), str(root / "b0")])
    for name in ("one", "two"):
        compare(groups, tmp_path / name, resamples=100)
    for name in ("compare.json", "compare.html"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_runs_that_do_not_belong_together_are_refused(runs, tmp_path):
    root, dataset = runs
    other = make_dataset(tmp_path / "dataset", num_users=30, seed=8)
    evaluate(tmp_path / "other" / "report", other, {}, resamples=20)
    evaluate(tmp_path / "ties" / "report", dataset, {}, ties="expected", cutoffs=(1, 10), resamples=20)
    evaluate(tmp_path / "validation" / "report-validation", dataset, {}, split="validation", resamples=20)
    for name, message in (
        ("other", "cannot be compared: their datasets differ"),
        ("ties", r"evaluate.cutoffs is \[1, 5, 10, 50\] and \[1, 10\]; evaluate.ties is 'mean_rank' and 'expected'"),
        ("validation", "report .*does not exist"),
    ):
        with pytest.raises(CalrecError, match=message):
            compare(parse_groups([str(root / "a0"), str(tmp_path / name)]), tmp_path / "out")
    with pytest.raises(CalrecError, match="evaluates the split 'validation', not 'test'"):
        compare(parse_groups([str(root / "a0"), str(tmp_path / "validation" / "report-validation")]), tmp_path / "out")
    shutil.copytree(root / "b0", tmp_path / "changed")
    metrics = tmp_path / "changed" / "report" / "metrics.json"
    metrics.write_text(metrics.read_text() + " ")
    with pytest.raises(CalrecError, match=r"metrics\.json was changed after it was written"):
        compare(parse_groups([str(root / "a0"), str(tmp_path / "changed")]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_arguments_that_make_no_sense_are_named(runs):
    root, _ = runs
    for arguments, message in (
        ([str(root / "a0")], "needs two runs or more"),
        ([str(root / "a0"), f"x={root / 'a0'}"], "is named twice"),
        ([str(root / "a0"), f"a0={root / 'b0'}"], "two runs would be named 'a0'"),
    ):
        with pytest.raises(CalrecError, match=message):
            parse_groups(arguments)


def test_the_command_compares_and_says_where(runs, tmp_path, capsys):
    root, _ = runs
    assert cli.main(["compare", str(root / "a0"), str(root / "b0"), f"--out={tmp_path / 'c'}"]) == 0
    printed = capsys.readouterr().out
    assert "b0: calrec against a0: calrec: NDCG@10" in printed and "compare.html" in printed
    assert artifacts.read_json(tmp_path / "c" / "compare.json")["split"] == "test"
    assert cli.main(["compare", str(root / "a0")]) == 1
    assert "needs two runs" in capsys.readouterr().err


def test_slices_are_the_reports_own_and_the_mean_of_seeds(runs, tmp_path):
    root, _ = runs
    groups = parse_groups([f"one={root / 'a0'},{root / 'a1'}", f"two={root / 'b0'}"])
    found = compare(groups, tmp_path, resamples=50)
    reports = [json.loads((root / name / "report" / "metrics.json").read_text()) for name in ("a0", "a1", "b0")]
    assert [each["name"] for each in found["slices"]] == [each["name"] for each in reports[0]["slices"]]
    for place, each in enumerate(found["slices"]):
        for number, group in enumerate(each["groups"]):
            a0, a1, b0 = (report["slices"][place]["groups"][number] for report in reports)
            assert group["users"] == a0["users"]
            if not a0["users"]:
                continue
            seeds = [own["rows"]["calrec"]["metrics"]["ndcg@10"] for own in (a0, a1)]
            one, two = group["rows"]["one: calrec"], group["rows"]["two: calrec"]
            assert one["metrics"]["ndcg@10"] == pytest.approx(np.mean(seeds)) and one["interval"] is None
            assert two == b0["rows"]["calrec"] and group["rows"]["popularity"] == a0["rows"]["popularity"]


def test_a_slice_cut_otherwise_in_one_run_is_left_out():
    def report(users):
        rows = {"x": {"metrics": {"mrr": 0.5}, "interval": {"mrr": [0.4, 0.6]}}}
        return {
            "slices": [
                {"name": "length", "meaning": "m", "groups": [{"name": "1", "users": users, "rows": rows}]},
                {"name": "kind", "meaning": "m", "groups": [{"name": "a", "users": 9, "rows": rows}]},
            ]
        }

    found = common_slices([report(3), report(4)], [("a: x", [(0, "x")]), ("b: x", [(1, "x")])])
    assert [each["name"] for each in found] == ["kind"]
    assert list(found[0]["groups"][0]["rows"]) == ["a: x", "b: x"]
    assert common_slices([{}], []) == []


def test_curves_are_those_of_each_run(runs, tmp_path):
    root, _ = runs
    for name in ("a0", "b0"):
        shutil.copytree(root / name / "report", tmp_path / name / "report")
    (tmp_path / "b0" / "stage2").mkdir()
    lines = [{"step": step, "split": "train", "loss": 4 / step} for step in (1, 2)]
    (tmp_path / "b0" / "stage2" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compare(parse_groups([str(tmp_path / "a0"), str(tmp_path / "b0")]), tmp_path / "out", resamples=50)
    [own] = found["training"]
    assert own["group"] == "b0" and own["stages"][0]["name"] == "stage2"
    assert own["stages"][0]["metrics"][0]["splits"]["train"]["points"] == [[1, 4.0], [2, 2.0]]
