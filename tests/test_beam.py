"""The constrained beam: exact scores of items, nothing outside the catalogue, and the probabilities of all items."""

import numpy as np
import pytest
from decoding_reference import EOS, log_distributions, padded, teacher_forced, tiny_model

from calrec_jax.decode.beam import BeamSearch
from calrec_jax.decode.prompts import user_keys
from calrec_jax.decode.trie import Trie, build_trie

V = 40
PROMPTS = [[0, 5, 9, 3, 30, 7], [0, 8, 2], [0, 4, 4, 4, 4, 4, 33]]
COMMON = [10, 11]
ENDINGS = [[20], [20, 21], [20, 21, 22, 23], [20, 21, 22, 24], [12, 13, 14], [12, 13, 14], [15, 16, 17, 18, 19, 20, 21]]


def trie_of(sequences: list[list[int]]) -> Trie:
    offsets = np.concatenate([[0], np.cumsum([len(s) for s in sequences])])
    return build_trie(np.array([t for s in sequences for t in s], np.int32), offsets, EOS)


def search(model, params, trie, prompts=PROMPTS, length=10, **settings):
    tokens, lengths = padded(prompts, length)
    keys = user_keys([str(i) for i in range(len(prompts))], 0)
    return BeamSearch(model, params, trie, **{"num_beams": 12, "renormalise": False} | settings)(tokens, lengths, keys)


def leaf_sequences(trie: Trie, sequences: list[list[int]]) -> list[list[int]]:
    """Tokens of each leaf, EOS included."""
    return [[*sequences[trie.leaf_items[begin]], EOS] for begin in trie.leaf_offsets[:-1]]


def renormalised(model, params, prompt: list[int], leaves: list[list[int]]) -> np.ndarray:
    """log P of each leaf when each step is renormalised over the tokens that some leaf continues with."""
    scores = []
    for leaf in leaves:
        table = log_distributions(model, params, [*prompt, *leaf])
        score = 0.0
        for n, token in enumerate(leaf):
            allowed = sorted({other[n] for other in leaves if other[:n] == leaf[:n]})
            step = table[len(prompt) - 1 + n]
            score += step[token] - np.log(np.exp(step[allowed]).sum())
        scores.append(score)
    return np.array(scores)


@pytest.fixture(scope="module")
def tiny():
    return tiny_model(V, seed=5, num_layers=1)


@pytest.mark.parametrize("common", [[], COMMON], ids=["no root path", "root path"])
def test_plain_scores_equal_teacher_forcing(tiny, common):
    model, params = tiny
    sequences = [common + e for e in ENDINGS]
    trie = trie_of(sequences)
    assert trie.root_path.tolist() == common
    leaves = leaf_sequences(trie, sequences)
    found = search(model, params, trie)
    for row, prompt in enumerate(PROMPTS):
        exact = np.array([teacher_forced(model, params, prompt, leaf) for leaf in leaves])
        assert found.items[row, : len(leaves)].tolist() == np.argsort(-exact).tolist()
        assert (found.items[row, len(leaves) :] == -1).all()
        np.testing.assert_allclose(found.log_probs[row, : len(leaves)], np.sort(exact)[::-1], atol=1e-4)
        lengths = [len(leaves[i]) for i in found.items[row, : len(leaves)]]
        assert found.num_tokens[row, : len(leaves)].tolist() == lengths


@pytest.mark.parametrize("common", [[], COMMON], ids=["no root path", "root path"])
def test_renormalised_scores_equal_a_slow_reference_and_sum_to_one(tiny, common):
    model, params = tiny
    sequences = [common + e for e in ENDINGS]
    trie = trie_of(sequences)
    leaves = leaf_sequences(trie, sequences)
    found = search(model, params, trie, renormalise=True)
    for row, prompt in enumerate(PROMPTS):
        exact = renormalised(model, params, prompt, leaves)
        assert found.items[row, : len(leaves)].tolist() == np.argsort(-exact).tolist()
        np.testing.assert_allclose(found.log_probs[row, : len(leaves)], np.sort(exact)[::-1], atol=1e-4)
        np.testing.assert_allclose(np.exp(found.log_probs[row][np.isfinite(found.log_probs[row])]).sum(), 1, atol=1e-4)


@pytest.mark.parametrize("renormalise", [False, True])
def test_a_random_catalogue_wider_than_the_beam(tiny, renormalise):
    """Against a beam search in plain Python over the same trie."""
    model, params = tiny
    rng = np.random.default_rng(8)
    sequences = [rng.integers(2, 7, rng.integers(1, 6)).tolist() for _ in range(60)]
    trie = trie_of(sequences)
    leaves = leaf_sequences(trie, sequences)
    found = search(model, params, trie, num_beams=4, renormalise=renormalise)
    for row, prompt in enumerate(PROMPTS):
        expected = slow_beam(model, params, prompt, leaves, 4, renormalise)
        assert found.items[row].tolist() == [leaves.index(path) for path, _ in expected], f"seed 8, row {row}"
        np.testing.assert_allclose(found.log_probs[row], [score for _, score in expected], atol=1e-4)


def slow_beam(model, params, prompt, leaves, beams, renormalise):
    def below(path):
        return [leaf for leaf in leaves if leaf[: len(path)] == path]

    def is_complete(path):
        return len(below(path)) == 1 if renormalise else path in leaves

    beam = [([], 0.0)]
    while not all(is_complete(path) for path, _ in beam):
        candidates = []
        for path, score in beam:
            if is_complete(path):
                candidates.append((path, score))
                continue
            step = log_distributions(model, params, [*prompt, *path])[-1]
            tokens = sorted({leaf[len(path)] for leaf in below(path)})
            norm = np.log(np.exp(step[tokens]).sum()) if renormalise else 0.0
            candidates += [([*path, t], score + step[t] - norm) for t in tokens]
        beam = sorted(candidates, key=lambda c: -c[1])[:beams]
    return [(below(path)[0], score) for path, score in beam]


def test_one_item_and_equal_texts(tiny):
    model, params = tiny
    trie = trie_of([[3, 4], [3, 4]])
    assert trie.root_path.tolist() == [3, 4]
    for renormalise in (True, False):
        found = search(model, params, trie, num_beams=3, renormalise=renormalise)
        assert found.items.tolist() == [[0, -1, -1]] * 3
        score = 0.0 if renormalise else teacher_forced(model, params, PROMPTS[0], [3, 4, EOS])
        np.testing.assert_allclose(found.log_probs[0, 0], score, atol=1e-4)


def test_a_user_depends_on_no_batch_or_bucket(tiny):
    model, params = tiny
    trie = trie_of(ENDINGS)
    one = search(model, params, trie, num_beams=3)
    other = search(model, params, trie, [PROMPTS[2], [], PROMPTS[0]], 16, num_beams=3)
    for row, user in ((0, 2), (2, 0)):
        assert other.items[row].tolist() == one.items[user].tolist()
        np.testing.assert_allclose(other.log_probs[row], one.log_probs[user], atol=1e-5)
