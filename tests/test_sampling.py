"""Sampling against exact probabilities, and its scores against teacher forcing."""

import jax
import numpy as np
import pytest
from decoding_reference import EOS, batch_of, log_distributions, teacher_forced, tiny_model
from scipy import stats

from calrec_jax.decode.draw import draw
from calrec_jax.decode.prompts import user_keys
from calrec_jax.decode.sampling import Sampler

V = 70
PROMPTS = [[0, 5, 9, 3, 60, 7], [0, 8, 2], [0, 4, 4, 4, 4, 4, 4, 4, 33]]
USERS = ["anna", "bert", "cleo"]
SEED = 3


def sampler(model, params, **settings):
    chosen = {"eos_id": EOS, "num_samples": 6, "temperature": 0.8, "max_new_tokens": 9, "batch_users": 2}
    return Sampler(model, params, **chosen | settings)


@pytest.fixture(scope="module")
def tiny():
    return tiny_model(V)


@pytest.fixture(scope="module")
def usual(tiny):
    """A sampler that is used several times, since compiling is what takes time here."""
    return sampler(*tiny)


@pytest.fixture(scope="module")
def done(usual):
    return usual(batch_of(PROMPTS, 12, USERS, SEED))


@pytest.mark.parametrize("vocab", [3, 64, 65, 200])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_exact_distribution(vocab, temperature):
    seed = 11
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, vocab).astype(np.float32)
    uniforms = rng.random(40_000, np.float32)
    tokens, log_probs = jax.jit(draw, static_argnums=2)(logits, uniforms, temperature)
    exact = np.exp(logits.astype(np.float64) / temperature)
    exact /= exact.sum()
    expected = exact * len(uniforms)
    big = expected >= 5
    seen = np.bincount(tokens, minlength=vocab)
    groups = np.append(expected[big], expected[~big].sum()), np.append(seen[big], seen[~big].sum())
    keep = groups[0] > 0
    pvalue = stats.chisquare(groups[1][keep], groups[0][keep]).pvalue
    assert pvalue > 1e-3, f"seed {seed}: p = {pvalue}"
    at_one = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    np.testing.assert_allclose(log_probs, at_one[tokens], atol=1e-5)


def test_a_draw_is_the_inverse_of_the_cdf():
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))
    tokens, _ = draw(logits, np.array([0.0, 0.0999, 0.1001, 0.2999, 0.3001, 0.61, 0.9999], np.float32), 1.0)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 3, 3]


@pytest.mark.parametrize(("top_k", "top_p"), [(3, None), (None, 0.6), (5, 0.7), (1, 1.0), (None, 1e-9), (500, 1.0)])
def test_top_k_and_top_p_keep_what_a_sort_keeps(top_k, top_p):
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 2, 100).astype(np.float32)
    logits[[4, 90]] = np.sort(logits)[-3]  # ties with the third
    uniforms = rng.random(20_000, np.float32)
    tokens, log_probs = jax.jit(draw, static_argnums=(2, 3, 4))(logits, uniforms, 0.5, top_k, top_p)
    weights = np.exp(2 * logits.astype(np.float64))
    if top_k is not None and top_k < 100:
        weights[weights < np.sort(weights)[-top_k]] = 0
    if top_p is not None:
        fallen = np.sort(weights)[::-1]
        last = fallen[np.argmax(np.cumsum(fallen) >= top_p * fallen.sum() * (1 - 1e-7))]
        weights[weights < last] = 0
    assert set(tokens.tolist()) <= set(np.flatnonzero(weights).tolist())
    expected = weights / weights.sum() * len(uniforms)
    big = expected >= 5
    seen = np.bincount(tokens, minlength=100)
    if big.sum() > 1:
        rest = expected[~big].sum(), seen[~big].sum()
        groups = [np.append(expected[big], rest[0]), np.append(seen[big], rest[1])]
        keep = groups[0] > 0
        assert stats.chisquare(groups[1][keep], groups[0][keep]).pvalue > 1e-3
    at_one = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    np.testing.assert_allclose(log_probs, at_one[tokens], atol=1e-5)


def test_impossible_tokens_are_never_drawn():
    logits = np.full(130, -np.inf, np.float32)
    logits[[7, 71, 128]] = [0.0, 1.0, -80.0]
    edges = np.array([0.0, 1e-30, 0.5, 1 - 2**-24, 1.0], np.float32)  # 1.0 itself is never given; rounding may reach it
    tokens, log_probs = draw(logits, edges, 0.5)
    assert set(tokens.tolist()) <= {7, 71}
    assert np.isfinite(log_probs).all()


def test_scores_equal_teacher_forcing(tiny, done):
    model, params = tiny
    ended = 0
    for row, prompt in enumerate(PROMPTS):
        for n in range(6):
            count = int(done.num_tokens[row, n])
            tokens = done.tokens[row, n, :count].tolist()
            assert EOS not in tokens[:-1]
            assert done.finished[row, n] == (tokens[-1] == EOS)
            assert done.finished[row, n] or count == 9
            assert not done.tokens[row, n, count:].any()
            ended += int(done.finished[row, n])
            expected = teacher_forced(model, params, prompt, tokens)
            np.testing.assert_allclose(done.log_probs[row, n], expected, atol=1e-4)
    assert 0 < ended < 18, "the case must hold completions that end and some that do not"


def test_rows_that_are_freed_and_a_ring_that_grows_change_nothing(tiny, done, monkeypatch):
    """Many users through few rows: they enter at different steps, and the ring is turned while they are written."""
    model, params = tiny
    monkeypatch.setattr("calrec_jax.decode.sampling.RING_TOKENS", 2)
    many = sampler(model, params, batch_users=3, live_share=0.4)
    users = [f"user {i}" for i in range(8)]
    parts = many(batch_of((PROMPTS * 3)[:8] + PROMPTS, 12, users + USERS, SEED))
    np.testing.assert_array_equal(parts.tokens[8:], done.tokens)
    np.testing.assert_allclose(parts.log_probs[8:], done.log_probs, atol=1e-5)
    np.testing.assert_allclose(parts.user_embedding[8:], done.user_embedding, atol=1e-6)
    assert len({tuple(row) for row in parts.tokens.reshape(-1, 9).tolist()}) > 20
    for row in range(8):
        count = int(parts.num_tokens[row, 0])
        expected = teacher_forced(model, params, PROMPTS[row % 3], parts.tokens[row, 0, :count].tolist())
        np.testing.assert_allclose(parts.log_probs[row, 0], expected, atol=1e-4)


def test_progress_counts_every_user_and_token_once(usual):
    said = []
    found = usual(batch_of(PROMPTS * 2, 12), lambda users, tokens: said.append((users, tokens)))
    assert np.array(said).sum(0).tolist() == [6, found.num_tokens.sum()]


def test_a_user_depends_on_no_batch_bucket_order_or_number_of_samples(tiny, done):
    model, params = tiny
    order = [2, 0, 1]
    shuffled = batch_of([PROMPTS[i] for i in order], 20, [USERS[i] for i in order], SEED)
    other = sampler(model, params, num_samples=9, batch_users=5)(shuffled)
    for row, user in enumerate(order):
        np.testing.assert_array_equal(other.tokens[row, :6], done.tokens[user])
        np.testing.assert_allclose(other.log_probs[row, :6], done.log_probs[user], atol=1e-5)


def test_texts_of_many_users_agree_but_for_near_ties(tiny):
    """2,400 texts in other batches, buckets and order: what differs must part where the draw was within rounding."""
    model, params = tiny
    prompts = [PROMPTS[i % 3] for i in range(300)]
    names = [f"user {i}" for i in range(300)]
    one = sampler(model, params, num_samples=8, batch_users=16)(batch_of(prompts, 12, names, SEED))
    order = np.random.default_rng(1).permutation(300)
    batch = batch_of([prompts[i] for i in order], 16, [names[i] for i in order], SEED)
    other = sampler(model, params, num_samples=8, batch_users=7, live_share=0.6)(batch)
    same = (other.tokens == one.tokens[order]).all(-1)
    assert same.mean() >= 0.999
    for row, sample in np.argwhere(~same):  # named: user, sample, step, and how near the tie is
        user = int(order[row])
        step = int(np.argmax(other.tokens[row, sample] != one.tokens[user, sample]))
        written = one.tokens[user, sample, :step].tolist()
        gap = distance_to_a_tie(model, params, prompts[user], written, names[user], sample, step)
        assert gap < 1e-5, f"user {user}, sample {sample}, step {step}: {gap} from a tie"


def distance_to_a_tie(model, params, prompt, written, name, sample, step):
    """How far the uniform number lies from a border of the inverse CDF."""
    key = jax.random.wrap_key_data(user_keys([name], SEED)[0], impl="threefry2x32")
    uniform = float(jax.random.uniform(jax.random.fold_in(key, step), (8,))[sample])
    weights = np.exp(log_distributions(model, params, [*prompt, *written])[-1] / 0.8)
    table = np.pad(weights, (0, -V % 64)).reshape(-1, 64)  # column by column, as the draw lays the vocabulary out
    return np.abs(np.cumsum(table.T.reshape(-1)) / weights.sum() - uniform).min()


def test_same_again_and_streams_differ_by_user_and_seed(usual, done):
    again = usual(batch_of(PROMPTS, 12, USERS, SEED))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(again[:5], done[:5], strict=True))
    same = usual(batch_of([PROMPTS[0]] * 3, 12, USERS, SEED))
    np.testing.assert_array_equal(same.tokens[0], done.tokens[0])
    assert (same.tokens[0] != same.tokens[1]).any()
    other = usual(batch_of(PROMPTS, 12, USERS, SEED + 1))
    assert (other.tokens != done.tokens).any(axis=(1, 2)).all()
    keys = np.concatenate([user_keys([f"user {i}" for i in range(5000)], seed) for seed in (0, 1)])
    assert len({tuple(key) for key in keys.tolist()}) == 10_000


def test_first_tokens_follow_the_model(tiny):
    """The first token's distribution over many samples of one user, and the second's after the most frequent first."""
    model, params = tiny
    many = sampler(model, params, num_samples=4000, max_new_tokens=2, temperature=0.5)
    tokens = many(batch_of(PROMPTS[:1], 6, USERS, SEED)).tokens[0]

    def check(seen, log_probs):
        exact = np.exp(2 * log_probs)
        expected = exact / exact.sum() * len(seen)
        big = expected >= 5
        counts = np.bincount(seen, minlength=V)
        pvalue = stats.chisquare(
            np.append(counts[big], counts[~big].sum()), np.append(expected[big], expected[~big].sum())
        ).pvalue
        assert pvalue > 1e-3, f"seed {SEED}: p = {pvalue}"

    check(tokens[:, 0], log_distributions(model, params, PROMPTS[0])[-1])
    usual = next(t for t in np.argsort(-np.bincount(tokens[:, 0])) if t != EOS)
    check(tokens[tokens[:, 0] == usual, 1], log_distributions(model, params, [*PROMPTS[0], int(usual)])[-1])
