"""report.html: the file is parsed and its embedded data read back; nothing here needs a browser but one slow test."""

import base64
import gzip
import hashlib
import importlib.resources
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calrec_jax import artifacts, timing
from calrec_jax.data import dataset as dataset_lib
from calrec_jax.data import templates
from calrec_jax.errors import CalrecError
from calrec_jax.evaluate import report, showcase
from calrec_jax.pipeline import Line
from calrec_jax.rank.shards import RankedLists

HOSTILE = '</script><img src=x onerror="document.title=1"><!--<script> & \u2028 {{data}} 𝄞'
NUM_USERS, NUM_ITEMS = 40, 30
STEPS = [("shop", 1.25), ("prepare Shop", 2.0), ("train stage1", 61.5)]


def make_dataset(folder, num_users=NUM_USERS, num_items=NUM_ITEMS, longest=9, name="Shop", seed=0):
    """A dataset with a hostile title, an absent one, and user `u000` with the longest history."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, longest + 1, num_users)
    lengths[0] = longest
    titles = [f"Item {i}, made of brass" for i in range(num_items)]
    titles[0], titles[1] = HOSTILE, None
    items = pa.table(
        {
            "item_id": [f"i{i:03d}" for i in range(num_items)],
            "title": pa.array(titles, pa.string()),
            "category": ["Tools"] * num_items,
            "brand": pa.array([None if i % 3 else "Akro & Söhne" for i in range(num_items)], pa.string()),
            "price": pa.array([None] * num_items, pa.string()),
        }
    )
    bought = [rng.integers(0, num_items, length) for length in lengths]
    bought[0][0] = 0
    sequences = pa.table(
        {
            "user_id": [f"u{u:03d}" for u in range(num_users)],
            "item_ids": [[f"i{i:03d}" for i in row] for row in bought],
            "timestamps": [[86_400 * (100 + k) for k in range(length)] for length in lengths],
            "valid_position": pa.array(lengths - 2, pa.int32()),
            "test_position": pa.array(lengths - 1, pa.int32()),
        }
    )
    rules = [{"rule": "read", "users_in": 50, "users_out": 40, "interactions_in": 400, "interactions_out": 300}]
    return dataset_lib.save_dataset(
        folder,
        name=name,
        items=items,
        sequences=sequences,
        template=templates.Template(),
        card={"name": name, "rules": rules},
        made_from={},
        settings={},
    )


def write_ranking(folder, dataset, scores, sources=None, made_from=None, users=None):
    """Writes scores [U, I] as a ranking of the whole catalogue."""
    folder.mkdir(parents=True)
    order = np.argsort(-scores, axis=1, kind="stable")
    sources = np.full(scores.shape, -1) if sources is None else sources
    users = range(len(scores)) if users is None else users
    table = {
        "user_id": [dataset.user_ids[u] for u in users],
        "item_ids": [dataset.item_ids[order[u]].tolist() for u in users],
        "scores": pa.array([scores[u][order[u]].tolist() for u in users], pa.list_(pa.float32())),
        "sources": pa.array([sources[u][order[u]].tolist() for u in users], pa.list_(pa.int16())),
        "ties_beyond_depth": pa.array([0 for _ in users], pa.int32()),
    }
    pq.write_table(pa.table(table), folder / "part-00000.parquet")
    artifacts.write_manifest(
        folder, kind="rankings", made_from={"completions": made_from} if made_from else {}, settings={}
    )
    return folder


def write_completions(folder, dataset, texts, log_probs):
    """Writes completions (lists by user), all finished."""
    folder.mkdir(parents=True)
    table = {
        "user_id": dataset.user_ids.tolist(),
        "texts": pa.array(texts, pa.list_(pa.string())),
        "log_probs": pa.array(log_probs, pa.list_(pa.float32())),
        "num_tokens": pa.array([[5] * len(row) for row in texts], pa.list_(pa.int32())),
        "finished": pa.array([[True] * len(row) for row in texts], pa.list_(pa.bool_())),
        "item_ids": pa.array([None] * len(texts), pa.list_(pa.string())),
    }
    pq.write_table(pa.table(table), folder / "part-00000.parquet")
    return artifacts.write_manifest(folder, kind="completions", made_from={}, settings={})


def make_metrics(dataset, names=("popularity", "calrec"), split="test"):
    rng = np.random.default_rng(7)
    keys = ["recall@1", "recall@5", "recall@10", "recall@50", "ndcg@10", "ndcg@50", "mrr"]
    rows = []
    for name in names:
        values = dict(zip(keys, np.sort(rng.random(len(keys))).tolist(), strict=True))
        ties = {
            way: {key: value * scale for key, value in values.items()}
            for way, scale in (("optimistic", 1.1), ("pessimistic", 0.9), ("expected", 1.01), ("mean_rank", 1.0))
        }
        interval = {key: [value * 0.95, value * 1.05] for key, value in values.items()}
        kind = "calrec" if name.startswith("calrec") else "baseline"
        rows.append({"name": name, "kind": kind, "metrics": values, "ties": ties, "interval": interval})
    users, items = len(dataset.user_ids), len(dataset.item_ids)
    made_from = {"dataset": dataset.hash}
    return {"dataset": dataset.name, "split": split, "users": users, "items": items, "depth": items,
            "ties": "mean_rank", "rows": rows, "made_from": made_from}  # fmt: skip


class Page(HTMLParser):
    """What the tests look at: tags with attributes, and the text of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.raw, self._open = [], [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open = tag
        if tag in ("script", "style"):
            self.raw.append((tag, dict(attributes), []))

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open in ("script", "style"):
            self.raw[-1][2].append(data)

    def text(self, tag, **attributes):
        found = ["".join(data) for name, given, data in self.raw if name == tag and attributes.items() <= given.items()]
        assert len(found) == 1, f"{len(found)} elements {tag} {attributes}"
        return found[0]

    @property
    def data(self):
        packed = self.text("script", type="application/octet-stream")
        return json.loads(self.text("script", type="application/json")) | json.loads(
            gzip.decompress(base64.b64decode(packed))
        )


def read(path):
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("datasets") / "Shop")


@pytest.fixture(scope="module")
def run(tmp_path_factory, dataset):
    """A run folder with everything: arguments of write_report."""
    root = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(3)
    texts, log_probs = [], []
    for user in range(NUM_USERS):
        target = dataset.texts[dataset.target(user, "test")]
        texts.append(["Title: A.", target, "Title: A.", HOSTILE])
        log_probs.append([-3.25, -1.5, -3.25, -9.0])
    made = write_completions(root / "completions" / "test-sample", dataset, texts, log_probs)
    scores = np.round(rng.random((NUM_USERS, NUM_ITEMS)), 1)
    sources = np.where(scores > 0.5, rng.integers(0, 4, scores.shape), -1)
    ranking = write_ranking(root / "rankings" / "test-calrec", dataset, scores, sources, made)
    (root / "stage1").mkdir()
    lines = [{"step": s, "split": "train", "loss": 4 / s, "tokens_per_second": 100.0 + s} for s in range(1, 31)]
    lines += [{"step": s, "split": "validation", "loss": 5 / s, "ndcg@10": 0.01 * s} for s in (10, 20, 30)]
    (root / "stage1" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    line = Line(run_dir=str(root), target="Shop")
    for step, seconds in STEPS:
        timing.add_seconds(line.layout, step, seconds)
    arguments = {
        "dataset": dataset,
        "metrics": make_metrics(dataset),
        "rankings": {"calrec": ranking},
        "completions": {"test-sample": root / "completions" / "test-sample"},
        "training": {"stage1": root / "stage1"},
        "users": 20,
    }
    return root, arguments, scores, sources


@pytest.fixture(scope="module")
def page(run):
    root, arguments, *_ = run
    path = report.write_report(root / "report", **arguments)
    assert path == root / "report" / "report.html"
    return read(path)


def test_embeds_the_numbers_of_metrics_json(page, run):
    metrics = run[1]["metrics"]
    assert page.data["metrics"] == metrics
    assert page.data["metrics"]["rows"][1]["interval"]["ndcg@10"] == metrics["rows"][1]["interval"]["ndcg@10"]


def test_names_the_dataset_and_what_was_dropped(page, dataset):
    assert page.data["dataset"] == {
        "name": "Shop", "hash": dataset.hash, "template": dataset.template, "interactions": len(dataset.items)
    }  # fmt: skip
    assert page.data["card"] == dataset.card


def test_is_one_file_without_addresses(page):
    for tag, attributes in page.tags:
        assert "src" not in attributes, tag
        assert attributes.get("href", "#").startswith("#"), attributes
        assert tag not in ("link", "iframe", "img", "object", "embed", "base"), tag
    code = "".join("".join(data) for _, given, data in page.raw if "type" not in given)
    for address in (r"https?:", r"\burl\(", r"@import", r"\bfetch\(", "XMLHttpRequest", "WebSocket", r"\bimport\b"):
        assert not re.search(address, code), address


def test_policy_allows_its_own_style_and_script_alone(page):
    policy = next(given["content"] for tag, given in page.tags if given.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    scripts = ["".join(data) for tag, given, data in page.raw if tag == "script" and "type" not in given]
    assert len(scripts) == 1
    for rule, text in (("style-src", page.text("style")), ("script-src", scripts[0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"


def test_scripts_never_parse_text_as_html():
    folder = importlib.resources.files("calrec_jax.evaluate") / "page"
    scripts = {file.name: file.read_text() for file in folder.iterdir() if file.name.endswith(".js")}
    assert sorted(scripts) == sorted([*report._SCRIPTS, "compare.js"])
    for name, text in scripts.items():
        for way in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "Function(",
            "DOMParser",
        ):
            assert way not in text, f"{way} in {name}"
        assert "</" not in text, name


def test_hostile_text_stays_text(run, tmp_path):
    dataset = make_dataset(tmp_path / "datasets" / "x", name=HOSTILE)
    arguments = {**run[1], "dataset": dataset, "metrics": make_metrics(dataset, names=(HOSTILE, "calrec"))}
    arguments["training"] = {HOSTILE: tmp_path / "nowhere"}
    page = read(report.write_report(tmp_path / "report", **arguments))
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert not [given for _, given in page.tags if any(name.startswith("on") for name in given)]
    assert page.data["dataset"]["name"] == page.data["metrics"]["rows"][0]["name"] == HOSTILE
    assert page.data["training"][0]["name"] == HOSTILE
    assert HOSTILE in [row[0] for row in page.data["items"]]
    assert HOSTILE in page.data["texts"]


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=12,
    )
)
def test_embedded_json_reads_back_and_cannot_end_its_element(value):
    text = report.embed_json(value)
    assert json.loads(text) == value
    assert not set("<>&\u2028\u2029") & set(text)


def test_numbers_that_json_lacks_become_null():
    assert report.embed_json({"a": [math.nan, math.inf, 1.5], 2: (-math.inf,)}) == '{"a":[null,null,1.5],"2":[null]}'


def test_lone_surrogates_do_not_break_the_file(run, dataset, tmp_path):
    metrics = {**make_metrics(dataset), "made_from": {"dataset": "\ud83d"}}
    path = report.write_report(tmp_path / "report", **{**run[1], "metrics": metrics})
    assert read(path).data["metrics"]["made_from"] == {"dataset": "?"}


def test_bytes_depend_on_the_inputs_alone(run, tmp_path):
    root, arguments, *_ = run
    first = report.write_report(tmp_path / "a" / "report", **arguments).read_bytes()
    assert first == report.write_report(tmp_path / "b" / "report", **arguments).read_bytes()
    other = report.write_report(tmp_path / "c" / "report", **{**arguments, "seed": 1})
    drawn = [[user["id"] for user in Page(text).data["users"]] for text in (first.decode(), other.read_text())]
    assert drawn[0] != drawn[1]
    assert str(root) not in first.decode()
    assert [path.name for path in (tmp_path / "a" / "report").iterdir()] == ["report.html"]


def test_missing_pieces_are_said(dataset, tmp_path):
    arguments = {
        "dataset": dataset,
        "metrics": make_metrics(dataset),
        "rankings": {},
        "completions": {},
        "training": {},
    }
    page = read(report.write_report(tmp_path / "report", **arguments))
    data = page.data
    assert data["training"] == data["timing"] == data["rankings"] == []
    assert data["completions_of"] == {}
    assert len(data["users"]) == NUM_USERS
    assert all(user["rankings"] == user["completions"] == {} and user["history"]["items"] for user in data["users"])
    scripts = "".join("".join(text) for tag, given, text in page.raw if tag == "script" and not given)
    for sentence in (
        "No training run belongs to this report.",
        "No timings were recorded for this run.",
        "No rankings belong to this report.",
        "No completions belong to the ranking",
        "No completion was made for this user.",
    ):
        assert sentence in scripts


def test_users_hold_history_ranking_completions_and_target(page, run, dataset):
    _, _, scores, sources = run
    data = page.data
    name_of = [row[4] for row in data["items"]]
    assert len(data["users"]) == 20
    assert data["completions_of"] == {"calrec": "test-sample"}
    for shown in data["users"]:
        user = dataset.user_ids.tolist().index(shown["id"])
        target = dataset.target(user, "test")
        history = dataset.history(user, "test")
        assert name_of[shown["target"]] == dataset.item_ids[target]
        assert [name_of[item] for item in shown["history"]["items"]] == dataset.item_ids[history].tolist()
        assert shown["history"]["dates"][0] == "1970-04-11"  # day 100
        row = np.float32(scores[user])
        order = np.argsort(-row, kind="stable")[:10]
        top = shown["rankings"]["calrec"]
        assert [name_of[item] for item in top["items"]] == dataset.item_ids[order].tolist()
        np.testing.assert_allclose(top["scores"], row[order], rtol=1e-5)
        shown_place = {-1: -1, 0: 1, 1: 0, 2: 1, 3: 2}  # the second completion is the most probable, 0 and 2 are one
        assert top["sources"] == [shown_place[source] for source in sources[user][order].tolist()]
        first, last = shown["rankings"]["calrec"]["rank"]
        assert (first, last) == (1 + (row > row[target]).sum(), (row >= row[target]).sum())
        assert shown["rankings"]["calrec"]["depth"] == NUM_ITEMS


def test_completions_are_folded_and_sorted(page):
    for user in page.data["users"]:
        made = user["completions"]["test-sample"]
        assert made["log_probs"] == [-1.5, -3.25, -9.0]
        assert [page.data["texts"][text] for text in made["texts"]][1:] == ["Title: A.", HOSTILE]
        assert (made["times"], made["targets"], made["unfinished"]) == ([1, 2, 1], [0], [])
        assert (made["of"], made["distinct"]) == (4, 3)


def test_less_probable_completions_are_left_out_but_never_the_targets(dataset):
    store = showcase._Store()
    row = {"texts": [f"t{n}" for n in range(30)], "log_probs": [-float(n) for n in range(30)], "num_tokens": [3] * 30,
           "finished": [True] * 30, "item_ids": None}  # fmt: skip
    made, place_of = showcase._fold(row, "i", "t25", store)
    assert [store.values()[text] for text in made["texts"]] == [*(f"t{n}" for n in range(12)), "t25"]
    assert (made["targets"], made["distinct"], made["of"]) == ([12], 30, 30)
    assert (place_of[11], place_of[25], place_of[12]) == (11, 12, -1)
    assert [showcase._shown_place(source, place_of) for source in (-1, 3, 12, 25)] == [-1, 3, -2, 12]


def test_items_carry_attributes_and_absent_ones_are_null(page, dataset):
    for title, brand, category, price, identifier in page.data["items"]:
        item = dataset.item_ids.tolist().index(identifier)
        expected = [dataset.attributes[name][item] for name in ("title", "brand", "category", "price")]
        assert [title, brand, category, price] == expected


def test_long_texts_and_histories_are_cut_and_counted(tmp_path):
    dataset = make_dataset(tmp_path / "x", longest=showcase.HISTORY_CAP + 8)
    long = "x" * 1000
    write_completions(tmp_path / "completions", dataset, [[long]] * NUM_USERS, [[-1.0]] * NUM_USERS)
    made = showcase.show_users(dataset, "test", np.array([0]), {}, {"c": tmp_path / "completions"})
    user = made["users"][0]
    whole = dataset.history(0, "test")
    assert len(user["history"]["items"]) == showcase.HISTORY_CAP
    assert user["history"]["earlier"] == len(whole) - showcase.HISTORY_CAP
    last = made["items"][user["history"]["items"][-1]]
    assert last[4] == dataset.item_ids[whole[-1]]
    text = made["texts"][user["completions"]["c"]["texts"][0]]
    assert len(text) == showcase.COMPLETION_CAP and text.endswith("…")


def test_a_hundred_users_stay_under_two_megabytes(tmp_path):
    dataset = make_dataset(tmp_path / "x", num_users=120, num_items=400, longest=80)
    rng = np.random.default_rng(0)
    texts = [[f"Title: {'word ' * 20}{u} {n}. Category: Tools." for n in range(32)] for u in range(120)]
    made = write_completions(tmp_path / "completions", dataset, texts, rng.normal(size=(120, 32)).tolist())
    rankings = {
        f"calrec-{k}": write_ranking(tmp_path / f"r{k}", dataset, rng.random((120, 400)), made_from=made)
        for k in range(4)
    }
    path = report.write_report(
        tmp_path / "report", dataset=dataset, metrics=make_metrics(dataset, tuple(rankings)), rankings=rankings,
        completions={"c": tmp_path / "completions"}, training={},
    )  # fmt: skip
    assert len(read(path).data["users"]) == 100
    assert path.stat().st_size < 2e6


@pytest.mark.parametrize(("num_users", "most"), [(500, 1e6), pytest.param(10_000, 10e6, marks=pytest.mark.slow)])
def test_ten_thousand_users_stay_under_ten_megabytes(tmp_path, num_users, most):
    """Histories, three rankings and 32 completions each, texts like a catalogue's and half of them with a new end."""
    num_items = 3_000
    rng = np.random.default_rng(0)
    words = [
        f"{a}{b}"
        for a in ("bra", "ste", "pol", "fil", "cop", "tap")
        for b in ("ss", "el", "ymer", "ter", "per", "e", "ing")
    ]
    dataset = make_dataset(tmp_path / "x", num_users=num_users, num_items=num_items, longest=14)
    texts_of_items = [" ".join(rng.choice(words, 20)) for _ in range(num_items)]
    changed = rng.random((num_users, 32)) < 0.5
    which = np.minimum(rng.geometric(0.004, (num_users, 32)), num_items - 1)
    texts = [
        [
            texts_of_items[k][:-8] + rng.choice(words) if new else texts_of_items[k]
            for k, new in zip(row, news, strict=True)
        ]
        for row, news in zip(which, changed, strict=True)
    ]
    made = write_completions(tmp_path / "c", dataset, texts, (-30 * rng.random((num_users, 32))).tolist())
    rankings = {}
    for name in ("calrec", "beam", "tower"):
        items = rng.permuted(np.tile(np.arange(num_items), (100, 1)), axis=1)[:, :20][rng.integers(0, 100, num_users)]
        table = {
            "user_id": dataset.user_ids.tolist(),
            "item_ids": dataset.item_ids[items].tolist(),
            "scores": np.sort(rng.random((num_users, 20)).astype(np.float32))[:, ::-1].tolist(),
            "sources": pa.array(rng.integers(-1, 32, (num_users, 20)).tolist(), pa.list_(pa.int16())),
            "ties_beyond_depth": pa.array(np.zeros(num_users, np.int32)),
        }
        (tmp_path / name).mkdir()
        pq.write_table(pa.table(table), tmp_path / name / "part-00000.parquet")
        artifacts.write_manifest(tmp_path / name, kind="ranking", made_from={"completions": made}, settings={})
        rankings[name] = tmp_path / name
    path = report.write_report(
        tmp_path / "report", dataset=dataset, metrics=make_metrics(dataset, tuple(rankings)), rankings=rankings,
        completions={"c": tmp_path / "c"}, training={}, users=num_users,
    )  # fmt: skip
    data = read(path).data
    assert len(data["users"]) == num_users and set(data["users"][7]["rankings"]) == set(rankings)
    assert len(data["users"][7]["completions"]["c"]["texts"]) == showcase.COMPLETIONS_CAP
    assert path.stat().st_size < most


def test_configs_and_decoding_times_are_read_once_each(tmp_path):
    for name, gin in (("stage1", "train.seed = 1"), ("stage2", "train.seed = 1"), ("c", "decode.seed = 2")):
        (tmp_path / name).mkdir()
        artifacts.write_json(tmp_path / name / "manifest.json", {"gin": gin})
    (tmp_path / "bare").mkdir()
    folders = {name: tmp_path / name for name in ("stage1", "stage2", "c", "bare")}
    assert report._read_configs(folders) == [
        {"names": ["stage1", "stage2"], "gin": "train.seed = 1"},
        {"names": ["c"], "gin": "decode.seed = 2"},
    ]
    artifacts.write_json(tmp_path / "c" / "timing.json", {"users": 5, "seconds": 2.0})
    assert report._read_decoding("c", tmp_path / "c") == {"name": "c", "users": 5, "seconds": 2.0}
    assert report._read_decoding("bare", tmp_path / "bare") is None


@st.composite
def ranked_lists(draw):
    """Lists cut at a depth, with tied scores, and the targets' whole-catalogue scores."""
    rows, items = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    scores = np.array(draw(st.lists(st.lists(st.integers(-2, 2), min_size=items, max_size=items), min_size=rows,
                                    max_size=rows)), np.float32)  # fmt: skip
    depth = draw(st.integers(1, items))
    targets = np.array(draw(st.lists(st.integers(0, items - 1), min_size=rows, max_size=rows)))
    return scores, depth, targets


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(ranked_lists())
def test_target_places_equal_a_slow_reference(drawn):
    scores, depth, targets = drawn
    order = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
    kept = np.take_along_axis(scores, order, axis=1)
    beyond = (scores == kept[:, -1:]).sum(axis=1) - (kept == kept[:, -1:]).sum(axis=1)
    # A longer list elsewhere in the block pads these.
    pad = ((0, 0), (0, 2))
    block = RankedLists(
        users=np.arange(len(scores)), items=np.pad(order, pad, constant_values=-1).astype(np.int32),
        scores=np.pad(kept, pad, constant_values=np.nan), lengths=np.full(len(scores), depth),
        ties_beyond_depth=beyond.astype(np.int32), sources=np.full((len(scores), depth + 2), -1, np.int16),
    )  # fmt: skip
    places = showcase.target_places(block, targets)
    for row, target in enumerate(targets):
        own = scores[row, target]
        expected = [0, 0]
        if target in order[row]:
            expected = [1 + sum(score > own for score in scores[row]), sum(score >= own for score in scores[row])]
        assert places[row].tolist() == expected


@pytest.mark.parametrize(
    ("hits", "asked", "expected_hits"), [(20, 10, 5), (2, 10, 2), (0, 10, 0), (38, 10, 8), (38, 30, 28), (20, 99, 20)]
)
def test_draw_is_half_hits_where_there_are_that_many(dataset, tmp_path, hits, asked, expected_hits):
    scores = np.tile(-np.arange(NUM_ITEMS, dtype=float), (NUM_USERS, 1))
    targets = showcase.all_targets(dataset, "test")
    scores[np.arange(NUM_USERS), targets] = np.where(np.arange(NUM_USERS) < hits, 1.0, -99.0)
    ranking = write_ranking(tmp_path / "r", dataset, scores)
    drawn = showcase.draw_users(dataset, "test", ranking, asked, seed=5)
    assert len(drawn) == min(asked, NUM_USERS)
    assert len(set(drawn.tolist())) == len(drawn)
    assert (np.diff(drawn) > 0).all()
    assert (drawn < hits).sum() == expected_hits
    np.testing.assert_array_equal(drawn, showcase.draw_users(dataset, "test", ranking, asked, seed=5))


def test_a_user_without_a_list_is_shown_without_one(dataset, tmp_path):
    ranking = write_ranking(tmp_path / "r", dataset, np.random.default_rng(0).random((NUM_USERS, NUM_ITEMS)), users=[3])
    made = showcase.show_users(dataset, "test", np.array([2, 3]), {"calrec": ranking}, {})
    assert [list(user["rankings"]) for user in made["users"]] == [[], ["calrec"]]


def test_the_validation_split_has_its_own_targets(dataset, tmp_path):
    arguments = {"dataset": dataset, "metrics": make_metrics(dataset, split="validation"), "rankings": {},
                 "completions": {}, "training": {}}  # fmt: skip
    data = read(report.write_report(tmp_path / "report", **arguments)).data
    for shown in data["users"]:
        user = dataset.user_ids.tolist().index(shown["id"])
        assert data["items"][shown["target"]][4] == dataset.item_ids[dataset.target(user, "validation")]
        assert len(shown["history"]["items"]) == len(dataset.history(user, "validation"))


def test_rankings_follow_the_table_with_calrec_first(dataset, tmp_path):
    scores = np.random.default_rng(0).random((NUM_USERS, NUM_ITEMS))
    names = ("popularity", "calrec-b", "calrec-a")
    rankings = {name: write_ranking(tmp_path / name, dataset, scores) for name in sorted(names)}
    data = read(report.write_report(tmp_path / "report", dataset=dataset, metrics=make_metrics(dataset, names),
                                    rankings=rankings, completions={}, training={})).data  # fmt: skip
    assert data["rankings"] == ["calrec-b", "calrec-a", "popularity"]
    assert data["sample"] == {"of": NUM_USERS, "seed": 0, "ranking": "calrec-b"}


def test_completions_are_linked_by_hash_then_by_name(dataset, tmp_path):
    made = write_completions(tmp_path / "c1", dataset, [["a"]] * NUM_USERS, [[-1.0]] * NUM_USERS)
    scores = np.zeros((NUM_USERS, NUM_ITEMS))
    rankings = {
        "by-hash": write_ranking(tmp_path / "r1", dataset, scores, made_from=made),
        "same-name": write_ranking(tmp_path / "r2", dataset, scores),
        "of-others": write_ranking(tmp_path / "r3", dataset, scores, made_from="0" * 64),
        "none": write_ranking(tmp_path / "r4", dataset, scores),
    }
    links = showcase.link_completions(rankings, {"x": tmp_path / "c1", "same-name": tmp_path / "c2"})
    assert links == {"by-hash": "x", "same-name": "same-name"}


def test_curves_of_training(page):
    (stage,) = page.data["training"]
    assert [each["name"] for each in stage["metrics"]] == ["loss", "ndcg@10", "tokens_per_second"]
    loss = stage["metrics"][0]["splits"]
    assert sorted(loss) == ["train", "validation"]
    assert loss["validation"] == {"points": [[10, 0.5], [20, 0.25], [30, 0.166667]], "best": [30, 5 / 30]}
    assert (stage["last_step"], stage["averaged"], stage["skipped_lines"]) == (30, 1, 0)
    assert stage["tokens_per_second"] == np.median(100.0 + np.arange(1, 31))


def test_curves_of_an_interrupted_and_resumed_stage(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        '{"step": 2, "split": "train", "loss": 2.0}\n{"step": 1, "split": "train", "loss": 3.0, "lucky": true}\n'
        '{"step": 2, "split": "train", "loss": 1.0}\n\n{"step": 3, "split": "train", "loss": NaN, "note": "odd"}\n'
        '{"step": "4", "split": "train", "loss": 9.0}\n[1]\n{"step": 5, "spl'
    )
    stage = report.read_stage("stage1", tmp_path)
    assert stage["metrics"] == [
        {"name": "loss", "splits": {"train": {"points": [[1, 3.0], [2, 1.0]], "best": [2, 1.0]}}}
    ]
    assert stage["skipped_lines"] == 3
    assert stage["tokens_per_second"] is None
    assert report.read_stage("stage1", file) == stage


def test_long_curves_are_means_of_consecutive_points(tmp_path):
    values = np.random.default_rng(0).random(1000)
    lines = [{"step": step + 1, "split": "train", "loss": value} for step, value in enumerate(values)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stage = report.read_stage("stage1", tmp_path)
    curve = stage["metrics"][0]["splits"]["train"]
    assert stage["averaged"] == 4
    assert [step for step, _ in curve["points"]] == list(range(4, 1001, 4))
    np.testing.assert_allclose([value for _, value in curve["points"]], values.reshape(-1, 4).mean(axis=1), rtol=1e-5)
    assert curve["best"] == [int(values.argmin()) + 1, values.min()]


@pytest.mark.parametrize(("text", "reason"), [(None, "left no metrics.jsonl"), ("\n", "holds no numbers")])
def test_a_stage_without_curves_says_why(tmp_path, text, reason):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    stage = report.read_stage("stage2", tmp_path)
    assert stage["name"] == "stage2" and reason in stage["missing"]


def test_step_times_are_those_that_the_line_wrote(page):
    assert page.data["timing"] == [{"step": step, "seconds": seconds} for step, seconds in STEPS]


def test_errors_name_what_is_wrong(run, dataset, tmp_path):
    _, arguments, *_ = run

    def write(**changes):
        report.write_report(tmp_path / "run" / "report", **{**arguments, **changes})

    with pytest.raises(CalrecError, match=r"metrics\.json: split is 'train', not one of"):
        write(metrics={**arguments["metrics"], "split": "train"})
    with pytest.raises(CalrecError, match=r"metrics\.json has no list `rows`"):
        write(metrics={"split": "test"})
    with pytest.raises(CalrecError, match="users=0: the report shows at least one user"):
        write(users=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalrecError, match=r"empty has no part-\*\.parquet"):
        write(rankings={"calrec": tmp_path / "empty"})
    with pytest.raises(CalrecError, match=r"empty has no part-\*\.parquet"):
        write(completions={"test-sample": tmp_path / "empty"})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "part-00000.parquet").write_bytes(b"not Parquet")
    with pytest.raises(CalrecError, match="broken.*cannot be read as Parquet"):
        write(completions={"test-sample": tmp_path / "broken"})
    (tmp_path / "other").mkdir()
    pq.write_table(pa.table({"user_id": ["u001"], "texts": [["a"]]}), tmp_path / "other" / "part-00000.parquet")
    with pytest.raises(CalrecError, match=r"other: the shards lack the columns \['log_probs'"):
        write(completions={"test-sample": tmp_path / "other"})
    for wrong in (
        [1, 2],
        {"train stage1": 61.5},
        {"steps": [{"step": "vocab", "seconds": None}]},
        {"steps": ["vocab"]},
    ):
        artifacts.write_json(tmp_path / "run" / "timing.json", wrong)
        with pytest.raises(CalrecError, match=r"timing\.json does not list steps with their seconds"):
            write()
    assert not (tmp_path / "run" / "report" / "report.html").exists()


def rendered(path: Path, profile: Path, *more: str) -> tuple[str, str]:
    """The page's elements after its scripts ran, as Chromium writes them, and what it put on the console."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium, and there is none on this machine")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", "--virtual-time-budget=8000",
             "--enable-logging=stderr", "--v=0"]  # fmt: skip
    command = [browser, *flags, *more, f"--user-data-dir={profile}", "--dump-dom", f"file://{path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if ":CONSOLE:" in line)


def full_report(folder):
    """A report by the verb itself: rankings with completions, one made by others, all sections."""
    from ranking_data import completion_rows
    from ranking_data import make_dataset as make_tools
    from ranking_data import write_completions as write_made

    from calrec_jax.evaluate.run import evaluate
    from calrec_jax.rank.run import rank

    tools = make_tools(folder / "dataset", num_users=30)
    made = write_made(folder / "completions" / "test-sample", tools, completion_rows(tools, seed=2))
    ranking = rank(folder / "rankings" / "test-calrec", tools, made)
    theirs = folder / "theirs.trec"
    theirs.write_text("".join(f"{user} Q0 {tools.item_ids[3]} 1 0.5 t\n" for user in ("u000", "stranger")))
    (folder / "stage1").mkdir()
    lines = [{"step": s, "split": "train", "loss": 4 / s} for s in range(1, 31)]
    (folder / "stage1" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    line = Line(run_dir=str(folder), target="Tools")
    timing.add_seconds(line.layout, "train stage1", 61.5, ("gpu", 4))
    timing.add_seconds(line.layout, "rank test-calrec", 3.0)
    evaluate(folder / "report", tools, {"calrec": ranking}, files={"theirs": theirs}, resamples=200)
    return folder / "report" / "report.html"


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_draws_every_section(tmp_path, width):
    """Needs Chromium. Every section has its content, and nothing is on the console."""
    path = full_report(tmp_path / "run")
    shown, console = rendered(path, tmp_path / "profile", f"--window-size={width},900")
    body = shown[: shown.index('<script type="application/json"')]
    for fragment in (
        'class="row-calrec"', 'class="series', "1 min 02 s", "History left out", "p, Holm", "by purchases in the",
        "Coverage", "Could not be matched", "stranger", "Target reached", "Written, missed",
        "Accelerator-seconds a user", "8.2 s (gpu)", "Its rank in", "Completions test-sample", "<details>",
    ):  # fmt: skip
        assert fragment in body, fragment
    assert "NaN" not in body and "undefined" not in body and "[object" not in body
    assert console == ""


@pytest.mark.slow
def test_a_browser_draws_the_page_of_a_comparison(tmp_path):
    """Needs Chromium."""
    from calrec_jax.evaluate.compare import compare, parse_groups

    for name in ("a", "b"):
        full_report(tmp_path / name)
    compare(parse_groups([str(tmp_path / "a"), str(tmp_path / "b")]), tmp_path / "out", resamples=100)
    shown, console = rendered(tmp_path / "out" / "compare.html", tmp_path / "profile")
    body = shown[: shown.index('<script type="application/json"')]
    for fragment in (
        "b: calrec",
        "a: theirs",
        "Differences, user by user",
        "p, Holm",
        "The reference.",
        'class="bar"',
        "by purchases in the",
        "stage1",
        "a, train",
        "b, train",
    ):
        assert fragment in body, fragment
    assert "NaN" not in body and "undefined" not in body and console == ""


@pytest.mark.slow
def test_a_browser_draws_a_bare_report(dataset, tmp_path):
    """Needs Chromium."""
    bare = {"dataset": dataset, "metrics": make_metrics(dataset), "rankings": {}, "completions": {}, "training": {}}
    shown, console = rendered(report.write_report(tmp_path / "run" / "report", **bare), tmp_path / "b")
    body = shown[: shown.index('<script type="application/json"')]
    for sentence in (
        "No training run belongs",
        "No timings were recorded",
        "No rankings belong to this report",
        "No completions belong",
        "holds no slices",
        "nothing to compare",
    ):
        assert sentence in body
    assert "<img" not in body and "<title>1</title>" not in body and console == ""
