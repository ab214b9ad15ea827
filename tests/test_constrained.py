"""The constrained beam: exact scores of items, nothing outside the catalogue, and the probabilities of all items."""

import numpy as np
import pytest
from decoding_reference import EOS, batch_of, log_distributions, teacher_forced, tiny_model

from calrec_jax.data.examples import TokenCatalogue
from calrec_jax.decode.constrained import ConstrainedBeam
from calrec_jax.decode.scoring import Candidates
from calrec_jax.decode.trie import Trie, build_trie

V = 40
PROMPTS = [[0, 5, 9, 3, 30, 7], [0, 8, 2], [0, 4, 4, 4, 4, 4, 33]]
COMMON = [10, 11]
ENDINGS = [[20], [20, 21], [20, 21, 22, 23], [20, 21, 22, 24], [12, 13, 14], [12, 13, 14], [15, 16, 17, 18, 19, 20, 21]]


def catalogue_of(sequences: list[list[int]]) -> TokenCatalogue:
    offsets = np.concatenate([[0], np.cumsum([len(s) for s in sequences])])
    tokens = np.array([t for s in sequences for t in s], np.int32)
    none = np.zeros(0, np.int32)
    return TokenCatalogue(tokens, offsets, none, none, none, none, none, start_id=0, eos_id=EOS, cut=0)


def trie_of(sequences: list[list[int]]) -> Trie:
    catalogue = catalogue_of(sequences)
    return build_trie(catalogue.tokens, catalogue.offsets, EOS)


def decoder(model, params, sequences, **settings):
    chosen = {"num_beams": 12, "renormalise": False, "batch_users": 2, "left_out": None} | settings
    return ConstrainedBeam(model, params, catalogue=catalogue_of(sequences), trie=trie_of(sequences), **chosen)


def search(model, params, sequences, prompts=PROMPTS, length=10, **settings):
    """What is found, with the items of a text as one: the number of its leaf."""
    found = decoder(model, params, sequences, **settings)(batch_of(prompts, length))
    trie = trie_of(sequences)
    leaf_of = np.full(len(sequences) + 1, -1)
    leaf_of[trie.leaf_items] = np.repeat(np.arange(len(trie.leaf_lengths)), np.diff(trie.leaf_offsets))
    first = np.ones(found.items.shape, bool)
    leaves = leaf_of[found.items]
    first[:, 1:] = (leaves[:, 1:] != leaves[:, :-1]) & (leaves[:, 1:] >= 0)
    rows = [np.flatnonzero(row) for row in first]
    width = max(map(len, rows))
    pick = np.array([np.append(row, np.repeat(found.items.shape[1], width - len(row))) for row in rows])

    def picked(x, empty):
        return np.take_along_axis(np.pad(x, ((0, 0), (0, 1)), constant_values=empty), pick, axis=1)

    return found._replace(
        items=picked(leaves, -1), log_probs=picked(found.log_probs, -np.inf), num_tokens=picked(found.num_tokens, 0)
    )


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
    found = search(model, params, sequences)
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
    found = search(model, params, sequences, renormalise=True)
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
    found = search(model, params, sequences, num_beams=4, renormalise=renormalise)
    for row, prompt in enumerate(PROMPTS):
        expected = slow_beam(model, params, prompt, leaves, 4, renormalise)
        assert found.items[row].tolist() == [leaves.index(path) for path, _ in expected], f"seed 8, row {row}"
        np.testing.assert_allclose(found.log_probs[row], [score for _, score in expected], atol=1e-4)


def slow_beam(model, params, prompt, leaves, beams, renormalise):
    """Hypotheses with one text left are complete; their tails are scored at the end."""

    def below(path):
        return [leaf for leaf in leaves if leaf[: len(path)] == path]

    def is_complete(path):
        return len(below(path)) == 1

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
    if renormalise:
        return [(below(path)[0], score) for path, score in beam]
    whole = [below(path)[0] for path, _ in beam]
    return sorted(((leaf, teacher_forced(model, params, prompt, leaf)) for leaf in whole), key=lambda c: -c[1])


@pytest.mark.parametrize("renormalise", [False, True])
def test_items_left_out_are_as_if_the_catalogue_had_them_not(tiny, renormalise):
    """Against a catalogue without them, user by user; of two items with one text, the other one stays."""
    model, params = tiny
    left_out = [[0, 3], [4], [1, 2, 3, 6]]
    flat = np.array([i for row in left_out for i in row], np.int32)
    ends = np.cumsum([len(row) for row in left_out])
    candidates = Candidates(flat, np.concatenate([[0], ends[:-1]]), ends)
    found = decoder(model, params, ENDINGS, renormalise=renormalise, left_out=candidates)(batch_of(PROMPTS, 10))
    for row, items in enumerate(left_out):
        kept = [i for i in range(len(ENDINGS)) if i not in items]
        alone = decoder(model, params, [ENDINGS[i] for i in kept], renormalise=renormalise)
        expected = alone(batch_of([PROMPTS[row]], 10))
        count = len(kept)
        assert found.items[row, :count].tolist() == [kept[i] for i in expected.items[0]]
        assert (found.items[row, count:] == -1).all()
        np.testing.assert_allclose(found.log_probs[row, :count], expected.log_probs[0], atol=1e-4)


def test_a_user_may_leave_out_everything(tiny):
    model, params = tiny
    everything = Candidates(np.arange(7, dtype=np.int32), np.array([0, 0, 0]), np.array([7, 0, 0]))
    found = decoder(model, params, ENDINGS, left_out=everything)(batch_of(PROMPTS, 10))
    assert (found.items[0] == -1).all() and not found.finished[0].any()
    assert sorted(found.items[1].tolist()) == list(range(7))


def test_a_text_of_several_items_gives_them_all(tiny):
    found = decoder(*tiny, ENDINGS)(batch_of(PROMPTS, 10))
    for row in range(3):
        assert sorted(found.items[row].tolist()) == list(range(7))
        at = found.items[row].tolist().index(4)
        assert found.items[row, at + 1] == 5 and found.log_probs[row, at] == found.log_probs[row, at + 1]


def test_one_item_and_equal_texts(tiny):
    model, params = tiny
    sequences = [[3, 4], [3, 4]]
    trie = trie_of(sequences)
    assert trie.root_path.tolist() == [3, 4]
    for renormalise in (True, False):
        found = search(model, params, sequences, num_beams=3, renormalise=renormalise)
        assert found.items.tolist() == [[0]] * 3
        score = 0.0 if renormalise else teacher_forced(model, params, PROMPTS[0], [3, 4, EOS])
        np.testing.assert_allclose(found.log_probs[0, 0], score, atol=1e-4)


def test_a_user_depends_on_no_batch_or_bucket(tiny):
    model, params = tiny
    sequences = ENDINGS
    one = search(model, params, sequences, num_beams=3)
    other = search(model, params, sequences, [PROMPTS[2], [], PROMPTS[0]], 16, num_beams=3)
    for row, user in ((0, 2), (2, 0)):
        assert other.items[row].tolist() == one.items[user].tolist()
        np.testing.assert_allclose(other.log_probs[row], one.log_probs[user], atol=1e-5)
