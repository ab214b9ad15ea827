"""Sampling against exact probabilities, and its scores against teacher forcing."""

import jax
import numpy as np
import pytest
from decoding_reference import EOS, log_distributions, padded, teacher_forced, tiny_model
from scipy import stats

from calrec_jax.decode.prompts import user_keys
from calrec_jax.decode.sampling import Sampler, draw

V = 70
PROMPTS = [[0, 5, 9, 3, 60, 7], [0, 8, 2], [0, 4, 4, 4, 4, 4, 4, 4, 33]]
USERS = ["anna", "bert", "cleo"]
SEED = 3


def sampler(model, params, **settings):
    chosen = {"eos_id": EOS, "num_samples": 6, "temperature": 0.8, "max_new_tokens": 9}
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
    return usual(*padded(PROMPTS, 12), user_keys(USERS, SEED))


@pytest.mark.parametrize("vocab", [3, 64, 65, 200])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_exact_distribution(vocab, temperature):
    seed = 11
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, vocab).astype(np.float32)
    uniforms = rng.random(40_000, np.float32)
    tokens, log_probs = jax.jit(draw)(logits, uniforms, temperature)
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


def test_growing_the_suffix_in_phases_changes_nothing(tiny, done, monkeypatch):
    model, params = tiny
    monkeypatch.setattr("calrec_jax.decode.sampling.PHASE_TOKENS", 3)
    parts = sampler(model, params)(*padded(PROMPTS, 12), user_keys(USERS, SEED))
    np.testing.assert_array_equal(parts.tokens, done.tokens)
    np.testing.assert_allclose(parts.log_probs, done.log_probs, atol=1e-5)


def test_a_user_depends_on_no_batch_bucket_order_or_number_of_samples(tiny, done):
    model, params = tiny
    order = [2, 0, 1]
    tokens, lengths = padded([PROMPTS[i] for i in order] + [[]], 20)
    keys = np.concatenate([user_keys([USERS[i] for i in order], SEED), np.zeros((1, 2), np.uint32)])
    other = sampler(model, params, num_samples=9)(tokens, lengths, keys)
    for row, user in enumerate(order):
        np.testing.assert_array_equal(other.tokens[row, :6], done.tokens[user])
        np.testing.assert_allclose(other.log_probs[row, :6], done.log_probs[user], atol=1e-5)


def test_same_again_and_streams_differ_by_user_and_seed(usual, done):
    again = usual(*padded(PROMPTS, 12), user_keys(USERS, SEED))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(again[:5], done[:5], strict=True))
    same = usual(*padded([PROMPTS[0]] * 3, 12), user_keys(USERS, SEED))
    np.testing.assert_array_equal(same.tokens[0], done.tokens[0])
    assert (same.tokens[0] != same.tokens[1]).any()
    other = usual(*padded(PROMPTS, 12), user_keys(USERS, SEED + 1))
    assert (other.tokens != done.tokens).any(axis=(1, 2)).all()
    keys = np.concatenate([user_keys([f"user {i}" for i in range(5000)], seed) for seed in (0, 1)])
    assert len({tuple(key) for key in keys.tolist()}) == 10_000


def test_first_tokens_follow_the_model(tiny):
    """The first token's distribution over many samples of one user, and the second's after the most frequent first."""
    model, params = tiny
    many = sampler(model, params, num_samples=4000, max_new_tokens=2, temperature=0.5)
    tokens = many(*padded(PROMPTS[:1], 6), user_keys(USERS[:1], SEED)).tokens[0]

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
