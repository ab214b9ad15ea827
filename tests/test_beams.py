"""The beam over all texts against a slow one, and the stochastic beam against sampling without replacement."""

import itertools

import numpy as np
import pytest
from decoding_reference import EOS, batch_of, log_distributions, teacher_forced, tiny_model
from scipy import stats

from calrec_jax.decode.beam import BeamSearch

PROMPTS = [[0, 5, 9, 3, 30, 7], [0, 8, 2], [0, 4, 4, 4, 4, 4, 33]]


@pytest.fixture(scope="module")
def tiny():
    return tiny_model(40, seed=5, num_layers=1)


def slow_beam(model, params, prompt, beams, limit):
    beam = [([], 0.0)]
    for _ in range(limit):
        candidates = []
        for path, score in beam:
            if path and path[-1] == EOS:
                candidates.append((path, score))
                continue
            step = log_distributions(model, params, [*prompt, *path])[-1]
            candidates += [([*path, t], score + step[t]) for t in range(len(step))]
        beam = sorted(candidates, key=lambda c: -c[1])[:beams]
    return beam


def test_beam_equals_a_slow_reference_with_exact_scores(tiny):
    model, params = tiny
    search = BeamSearch(model, params, eos_id=EOS, num_beams=5, max_new_tokens=6, batch_users=2)
    found = search(batch_of(PROMPTS, 10))
    ended = 0
    for row, prompt in enumerate(PROMPTS):
        for k, (path, score) in enumerate(slow_beam(model, params, prompt, 5, 6)):
            count = int(found.num_tokens[row, k])
            assert found.tokens[row, k, :count].tolist() == path
            assert not found.tokens[row, k, count:].any()
            assert found.finished[row, k] == (path[-1] == EOS)
            ended += path[-1] == EOS
            np.testing.assert_allclose(found.log_probs[row, k], score, atol=1e-4)
            np.testing.assert_allclose(score, teacher_forced(model, params, prompt, path), atol=1e-4)
    assert 0 < ended < 15, "the case must hold hypotheses that end and some that do not"


def test_a_beam_wider_than_the_model_has_texts():
    model, params = tiny_model(3, seed=2, num_layers=1)
    search = BeamSearch(model, params, eos_id=EOS, num_beams=20, max_new_tokens=3, batch_users=1)
    found = search(batch_of([[0, 2]], 4))
    texts = {tuple(found.tokens[0, k, : found.num_tokens[0, k]].tolist()) for k in range(20)} - {()}
    assert texts == set(all_texts(3, 3))
    np.testing.assert_allclose(np.exp(found.log_probs[0]).sum(), 1, atol=1e-5)
    assert np.isinf(found.log_probs[0, len(texts) :]).all() and not found.finished[0, len(texts) :].any()


def all_texts(vocab: int, limit: int) -> list[tuple[int, ...]]:
    others = [t for t in range(vocab) if t != EOS]
    ended = [(*p, EOS) for n in range(limit) for p in itertools.product(others, repeat=n)]
    return ended + list(itertools.product(others, repeat=limit))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_stochastic_beam_samples_without_replacement(temperature):
    """3,000 users with one prompt: the first two texts of each against p(a) · p(b) / (1 − p(a))."""
    model, params = tiny_model(4, seed=2, eos_scale=1.0, num_layers=1)
    prompt, limit = [0, 3, 2], 2
    texts = all_texts(4, limit)
    log_probs = np.array([teacher_forced(model, params, prompt, list(t)) for t in texts])
    chosen = np.zeros(len(texts))
    for i, text in enumerate(texts):  # at this temperature, token by token
        table = log_distributions(model, params, [*prompt, *text])[len(prompt) - 1 : -1] / temperature
        table -= np.log(np.exp(table).sum(-1, keepdims=True))
        chosen[i] = np.exp(table[np.arange(len(text)), list(text)].sum())
    np.testing.assert_allclose(chosen.sum(), 1, atol=1e-6)
    draw = BeamSearch(
        model, params, eos_id=EOS, num_beams=3, max_new_tokens=limit, batch_users=500, temperature=temperature
    )
    found = draw(batch_of([prompt] * 3000, 3))
    number = {text: i for i, text in enumerate(texts)}
    drawn = np.array(
        [[number[tuple(found.tokens[u, k, : found.num_tokens[u, k]].tolist())] for k in range(3)] for u in range(3000)]
    )
    assert all(len(set(row)) == 3 for row in drawn.tolist())
    np.testing.assert_allclose(found.log_probs, log_probs[drawn], atol=1e-4)
    pairs = chosen[:, None] * chosen[None] / (1 - chosen[:, None])
    np.fill_diagonal(pairs, 0)
    seen = np.zeros_like(pairs)
    np.add.at(seen, (drawn[:, 0], drawn[:, 1]), 1)
    big = pairs * 3000 >= 5
    assert big.sum() > 10, "the case must have many pairs"
    expected = np.append(pairs[big], pairs[~big].sum()) * 3000
    assert stats.chisquare(np.append(seen[big], seen[~big].sum()), expected).pvalue > 1e-3


def test_stochastic_beam_depends_on_no_batch(tiny):
    model, params = tiny
    users = ["anna", "bert", "cleo"]

    def draw(batch, **settings):
        chosen = {"eos_id": EOS, "num_beams": 4, "max_new_tokens": 5, "temperature": 0.8, "batch_users": 3} | settings
        return BeamSearch(model, params, **chosen)(batch)

    one = draw(batch_of(PROMPTS, 10, users))
    other = draw(batch_of(PROMPTS[::-1], 16, users[::-1]), batch_users=2)
    np.testing.assert_array_equal(other.tokens[::-1], one.tokens)
    np.testing.assert_allclose(other.log_probs[::-1], one.log_probs, atol=1e-5)
    for row, prompt in enumerate(PROMPTS):
        text = one.tokens[row, 0, : one.num_tokens[row, 0]].tolist()
        np.testing.assert_allclose(one.log_probs[row, 0], teacher_forced(model, params, prompt, text), atol=1e-4)
