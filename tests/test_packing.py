"""Examples and packed rows against a slow, obvious reading of the batch contract."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calrec_jax.data import templates
from calrec_jax.data.examples import branch_weights, build_examples, tokenise_catalogue
from calrec_jax.data.packing import PackedStream, Packing, best_fit_decreasing, evaluation_batches, fill_rows
from calrec_jax.errors import CalrecError


def examples_of(run, split="train", **settings):
    settings = {"max_history_tokens": 150, "row_tokens": None} | settings
    catalogue = tokenise_catalogue(run.datasets, run.tokenizer, max_target_tokens=30)
    return build_examples(run.datasets, catalogue, split=split, **settings)


def item_lists(run):
    """(dataset, user, its items as global indices) of everybody, by the plain methods of Dataset."""
    base = user_base = 0
    for dataset in run.datasets:
        for user in range(len(dataset.user_ids)):
            yield dataset, user_base + user, user, base
        base, user_base = base + len(dataset.texts), user_base + len(dataset.user_ids)


def tokens_of_text(run, text):
    return run.tokenizer.encode(text)[:29]


def test_the_catalogue_holds_each_items_tokens(small_run):
    catalogue = tokenise_catalogue(small_run.datasets, small_run.tokenizer, max_target_tokens=30)
    texts = [t for d in small_run.datasets for t in d.texts]
    for i, text in enumerate(texts):
        assert catalogue.item(i).tolist() == tokens_of_text(small_run, text)
    assert catalogue.cut == sum(len(small_run.tokenizer.encode(t)) > 29 for t in texts) > 0
    for i, j in np.argwhere(np.triu(catalogue.text_ids[:, None] == catalogue.text_ids[None, :], 1)):
        assert tokens_of_text(small_run, texts[i]) == tokens_of_text(small_run, texts[j])
    assert catalogue.text_ids[1] == catalogue.text_ids[2] or texts[1] != texts[2]
    assert catalogue.next.tolist() == small_run.tokenizer.encode(templates.NEXT)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("budget", [60, 100, 400])
def test_examples_end_in_the_splits_target_and_drop_the_oldest_items(small_run, split, budget):
    examples = examples_of(small_run, split, max_history_tokens=budget)
    catalogue, cost = examples.catalogue, examples.catalogue.lengths + len(examples.catalogue.next)
    expected, dropped = [], 0
    for dataset, user, local, base in item_lists(small_run):
        sequence = list(
            dataset.train_items(local)
            if split == "train"
            else [*dataset.history(local, split), dataset.target(local, split)]
        )
        if len(sequence) < 2:
            continue
        history, target = [base + i for i in sequence[:-1]], base + sequence[-1]
        frame = len(catalogue.intro) + len(catalogue.first) + 1
        while len(history) > 1 and frame + sum(cost[history]) > budget:
            history, dropped = history[1:], dropped + 1
        expected.append((user, [*history, target]))
    got = [
        (int(examples.user[e]), examples.items[examples.start[e] : examples.end[e]].tolist())
        for e in range(len(examples))
    ]
    assert got == expected
    assert examples.dropped_items == dropped


def test_split_long_histories_predict_every_item_but_the_first_once(small_run):
    examples = examples_of(small_run, max_history_tokens=60, split_long_histories=True)
    assert examples.dropped_items == 0
    for dataset, user, local, base in item_lists(small_run):
        sequence = (dataset.train_items(local) + base).tolist()
        spans = [(examples.start[e], examples.end[e]) for e in np.flatnonzero(examples.user == user)]
        predicted = [i for start, end in spans for i in range(start + 1, end)]
        if len(sequence) >= 2:
            first = min(start for start, _ in spans)
            assert sorted(predicted) == list(range(first + 1, first + len(sequence)))
            assert examples.items[first : first + len(sequence)].tolist() == sequence


def obvious_row(run, examples, members, packing):
    """One row of the contract, built with Python lists from the texts."""
    texts = [t for d in run.datasets for t in d.texts]
    encode = run.tokenizer.encode
    keys = ("inputs", "targets", "segments", "positions", "weights", "user_pool", "target_pool", "item_pool")
    row = {k: [] for k in keys}

    def segment(number, tokens, ends, weights, pools):
        inputs = [0, *tokens]
        targets = [*tokens, 1]
        if packing.next_item_loss == "all":
            for end in ends:
                targets[end] = 1
        row["inputs"] += inputs
        row["targets"] += targets
        row["segments"] += [number] * len(inputs)
        row["positions"] += range(len(inputs))
        row["weights"] += weights
        for name in ("user_pool", "target_pool", "item_pool"):
            row[name] += [0, *pools[name]]

    for slot, e in enumerate(members):
        items = examples.items[examples.start[e] : examples.end[e]]
        tokens, weights, ends, user, target = [], [], [], [], []
        for sentence in (templates.INTRO, templates.FIRST):
            tokens += encode(sentence)
        weights += [0.0] * len(tokens)
        user += [slot + 1] * len(tokens)
        target += [0] * len(tokens)
        for n, item in enumerate(items):
            ids, last = tokens_of_text(run, texts[item]), n == len(items) - 1
            bears = last or (packing.next_item_loss == "all" and n > 0)
            tokens += ids
            weights += [float(bears)] * len(ids)
            user += [0 if last else slot + 1] * len(ids)
            target += [slot + 1 if last else 0] * len(ids)
            if not last:
                ends.append(len(tokens))
                following = encode(templates.NEXT)
                tokens += following
                weights += [float(bears), *[0.0] * (len(following) - 1)]
                user += [slot + 1] * len(following)
                target += [0] * len(following)
        weights.append(1.0)  # the target's EOS
        none = [0] * len(tokens)
        segment(2 * slot + 1, tokens, ends, weights, {"user_pool": user, "target_pool": target, "item_pool": none})
        ids = tokens_of_text(run, texts[items[-1]])
        none = [0] * len(ids)
        pools = {"user_pool": none, "target_pool": none, "item_pool": [slot + 1] * len(ids)}
        segment(2 * slot + 2, ids, [], [0.0] * (len(ids) + 1), pools)
    return {k: v + [0] * (packing.row_tokens - len(v)) for k, v in row.items()}


@pytest.mark.parametrize("next_item_loss", ["last", "all"])
def test_rows_equal_the_obvious_ones(small_run, next_item_loss):
    packing = Packing(700, 5, 2, next_item_loss)
    examples = examples_of(small_run)
    rows = [np.array([3, 0, 7]), np.array([30, 1]), np.array([], np.int64)]
    batch = fill_rows(examples, rows, packing)
    names = {
        "inputs": "decoder_input_tokens", "targets": "decoder_target_tokens", "segments": "decoder_segment_ids",
        "positions": "decoder_positions", "weights": "decoder_loss_weights",
    }  # fmt: skip
    for r, members in enumerate(rows):
        for key, values in obvious_row(small_run, examples, members, packing).items():
            assert batch[names.get(key, key)][r].tolist() == values, (r, key)
        assert batch["example_mask"][r].tolist() == [1.0] * len(members) + [0.0] * (5 - len(members))
        targets = examples.items[examples.end[members] - 1] if len(members) else np.array([], int)
        assert batch["target_item"][r, : len(members)].tolist() == targets.tolist()
        assert batch["target_user"][r, : len(members)].tolist() == examples.user[members].tolist()
        assert batch["target_text"][r, : len(members)].tolist() == examples.catalogue.text_ids[targets].tolist()
    assert {str(v.dtype) for k, v in batch.items() if "weights" not in k and "mask" not in k} == {"int32"}


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 120), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_packing_law_every_example_once_and_no_row_overflows(lengths, row_tokens, row_examples):
    lengths = np.array(lengths)
    rows = best_fit_decreasing(lengths, row_tokens, row_examples)
    assert rows.shape == lengths.shape
    assert sorted(set(rows.tolist())) == list(range(rows.max() + 1))
    assert (np.bincount(rows, weights=lengths) <= row_tokens).all()
    assert (np.bincount(rows) <= row_examples).all()


@given(st.lists(st.lists(st.integers(3, 6), min_size=1, max_size=6), min_size=1, max_size=12), st.floats(0, 0.9))
@settings(max_examples=60, deadline=None)
def test_branch_weights_equal_a_count_of_alternatives(per_item, weight):
    flat = branch_weights(per_item, weight)
    expected = []
    for ids in per_item:
        whole = [*ids, 1]
        for place in range(len(whole)):
            options = {tuple([*o, 1])[place] for o in per_item if [*o, 1][:place] == whole[:place] and len(o) >= place}
            expected.append(1.0 if len(options) > 1 else np.float32(weight))
    assert flat.tolist() == pytest.approx(expected)


def test_the_stream_is_addressable_shared_by_hosts_and_complete(small_run):
    examples = examples_of(small_run)
    packing = Packing(512, 4, 4, window=16)
    stream = PackedStream(examples, packing, seed=5)
    batches = [stream.batch(s) for s in range(12)]
    fresh = PackedStream(examples, packing, seed=5)
    for s in (11, 2, 7):  # any order, as after a resume
        for key, value in fresh.batch(s).items():
            np.testing.assert_array_equal(value, batches[s][key], err_msg=f"step {s} {key}")
    half = packing.batch_rows // 2
    parts = [stream.batch(9, 0, half), PackedStream(examples, packing, seed=5).batch(9, half)]
    for key, value in batches[9].items():
        np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), value)
    other = PackedStream(examples, packing, seed=6).batch(0)
    assert any((other[k] != batches[0][k]).any() for k in other)


def test_each_category_gets_its_share_and_each_epoch_every_example(small_run):
    examples = examples_of(small_run)
    stream = PackedStream(examples, Packing(512, 4, 4, window=10), seed=1, mixture_exponent=0.3)
    sizes = np.array([23.0, 17.0]) ** 0.3
    np.testing.assert_allclose(stream.rates, sizes / sizes.sum())
    drawn = np.concatenate([stream.window_examples(w) for w in range(40)])
    assert len(drawn) == 400
    for group in range(2):
        mine = drawn[examples.group[drawn] == group]
        assert abs(len(mine) - 400 * stream.rates[group]) <= 1
        members = np.flatnonzero(examples.group == group)
        seen = np.bincount(mine, minlength=len(examples))[members]
        assert seen.max() - seen.min() <= 1


def test_evaluation_batches_hold_every_example_once(small_run):
    examples = examples_of(small_run, "validation")
    batches = list(evaluation_batches(examples, Packing(512, 4, 3)))
    users = np.concatenate([b["target_user"][b["example_mask"] > 0] for b in batches])
    assert sorted(users.tolist()) == sorted(examples.user.tolist())
    assert all(b["example_mask"].shape == (3, 4) for b in batches)


def test_errors_name_the_setting(small_run):
    with pytest.raises(CalrecError, match="max_history_tokens=20: the prompt's frame and the longest item need"):
        examples_of(small_run, max_history_tokens=20)
    with pytest.raises(CalrecError, match="row_tokens=80: the frame and three times the longest item need"):
        examples_of(small_run, row_tokens=80)
    with pytest.raises(CalrecError, match="split='dev': must be"):
        examples_of(small_run, "dev")
    with pytest.raises(CalrecError, match="max_target_tokens=1: needs at least 2"):
        tokenise_catalogue(small_run.datasets, small_run.tokenizer, max_target_tokens=1)
    with pytest.raises(CalrecError, match="forced_token_weight=1.5: must lie between 0 and 1"):
        branch_weights([[3]], 1.5)
    with pytest.raises(CalrecError, match="row_tokens=90: the longest example has"):
        PackedStream(examples_of(small_run), Packing(90, 4, 4), seed=0)
    with pytest.raises(CalrecError, match="next_item_loss='some'"):
        Packing(512, 4, 4, "some")
    with pytest.raises(CalrecError, match="window=0: must be at least 1"):
        Packing(512, 4, 4, window=0)
