"""Each term of the objective against float64 NumPy, and the whole on packed rows against one example at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from calrec_jax.errors import CalrecError
from calrec_jax.losses import (
    DIRECTIONS,
    LossConfig,
    calrec_loss,
    example_normalised_weights,
    info_nce,
    weighted_token_loss,
)
from calrec_jax.models.towers import mean_pool, unit
from calrec_jax.train.step import MESH_AXES


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def token_case(seed, rows=3, length=10, width=5, vocab=11, density=0.5):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(rows, length, width)).astype(np.float32)
    table = rng.normal(size=(vocab, width)).astype(np.float32)
    targets = rng.integers(0, vocab, (rows, length)).astype(np.int32)
    weights = (rng.random((rows, length)) * (rng.random((rows, length)) < density)).astype(np.float32)
    return hidden, table, targets, weights


def token_reference(hidden, table, targets, weights, cap=None):
    """Σ w·(−log p) and its gradients, one place at a time, float64."""
    hidden, table = hidden.astype(np.float64), table.astype(np.float64)
    total, d_hidden, d_table = 0.0, np.zeros_like(hidden), np.zeros_like(table)
    for b in range(hidden.shape[0]):
        for p in range(hidden.shape[1]):
            scores = table @ hidden[b, p]
            slope = 1.0 if cap is None else 1 / np.cosh(scores / cap) ** 2
            log_p = log_softmax(scores if cap is None else cap * np.tanh(scores / cap))
            total -= weights[b, p] * log_p[targets[b, p]]
            error = weights[b, p] * (np.exp(log_p) - np.eye(len(table))[targets[b, p]]) * slope
            d_hidden[b, p] = error @ table
            d_table += np.outer(error, hidden[b, p])
    return total, d_hidden, d_table


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("chunk", [1, 4, 10, 64])
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_weighted_token_loss_and_gradients_equal_the_reference(seed, chunk, density):
    case = token_case(seed, density=density)
    expected, d_hidden, d_table = token_reference(*case)
    assert float(weighted_token_loss(*case, chunk)) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    value, grads = jax.value_and_grad(lambda h, t: 3.0 * weighted_token_loss(h, t, case[2], case[3], chunk), (0, 1))(
        *case[:2]
    )
    assert float(value) == pytest.approx(3 * expected, rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(grads[0], 3 * d_hidden, atol=2e-5)
    np.testing.assert_allclose(grads[1], 3 * d_table, atol=2e-5)


@pytest.mark.parametrize("chunk", [1, 3, 10, 64])
def test_chunks_that_fill_over_the_rows_of_a_device_give_the_same(chunk):
    """Rows of very different numbers of weighted places; one has none."""
    hidden, table, targets, weights = token_case(7)
    weights[0], weights[1, 3:] = 1.0, 0.0
    expected, d_hidden, d_table = token_reference(hidden, table, targets, weights)
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), MESH_AXES)
    rows = NamedSharding(mesh, PartitionSpec(MESH_AXES[:3]))
    value, grads = jax.value_and_grad(
        lambda h, t: weighted_token_loss(h, t, targets, weights, chunk, rows=rows), (0, 1)
    )(hidden, table)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(grads[0], d_hidden, atol=1e-5)
    np.testing.assert_allclose(grads[1], d_table, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_soft_capped_logits_have_the_loss_and_gradients_of_the_reference(seed):
    hidden, table, targets, weights = token_case(seed)
    case = 2 * hidden, table, targets, weights
    expected, d_hidden, d_table = token_reference(*case, cap=3.0)
    assert abs(expected - token_reference(*case)[0]) > 0.5, "the cap is felt"
    assert float(weighted_token_loss(*case, 4, 3.0)) == pytest.approx(expected, rel=1e-5)
    value, grads = jax.value_and_grad(lambda h, t: weighted_token_loss(h, t, targets, weights, 4, 3.0), (0, 1))(
        *case[:2]
    )
    assert float(value) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(grads[0], d_hidden, atol=2e-5)
    np.testing.assert_allclose(grads[1], d_table, atol=2e-5)


def test_token_loss_is_finite_for_huge_logits():
    hidden, table, targets, weights = token_case(0)
    value, grad = jax.value_and_grad(weighted_token_loss)(hidden * 300, table * 300, targets, weights, 4)
    assert np.isfinite(value) and np.isfinite(grad).all()


def contrast_case(seed, size=7, width=4):
    rng = np.random.default_rng(seed)
    anchors, candidates = (np.asarray(unit(jnp.asarray(rng.normal(size=(size, width)), jnp.float32))) for _ in range(2))
    mask = (rng.random(size) < 0.8).astype(np.float32)
    mask[0] = 1
    excluded = rng.random((size, size)) < 0.2
    return anchors, candidates, mask, excluded | excluded.T


@pytest.mark.parametrize("seed", range(5))
def test_info_nce_equals_the_reference(seed):
    anchors, candidates, mask, excluded = contrast_case(seed)
    tau, total, hits = 0.3, 0.0, 0
    for e in np.flatnonzero(mask):
        allowed = [j for j in np.flatnonzero(mask) if j == e or not excluded[e, j]]
        scores = candidates[allowed].astype(np.float64) @ anchors[e].astype(np.float64) / tau
        own = allowed.index(e)
        total -= log_softmax(scores)[own]
        hits += scores[own] >= scores.max()
    value, top = info_nce(anchors, candidates, mask, excluded, tau)
    assert float(value) == pytest.approx(total, rel=1e-5)
    assert float(top) == hits


def test_a_lone_example_has_no_negatives_and_no_loss():
    vector = np.ones((1, 3), np.float32) / np.sqrt(3)
    assert float(info_nce(vector, vector, np.ones(1, np.float32), np.ones((1, 1), bool), 0.1)[0]) == pytest.approx(
        0, abs=1e-6
    )


def test_mean_pool_equals_the_reference():
    rng = np.random.default_rng(1)
    hidden, pool = rng.normal(size=(2, 9, 3)).astype(np.float32), rng.integers(0, 4, (2, 9)).astype(np.int32)
    pool[1][pool[1] == 2] = 0  # an example without places
    pooled = np.asarray(mean_pool(hidden, pool, 3))
    for b in range(2):
        for k in range(1, 4):
            places = hidden[b][pool[b] == k].astype(np.float64)
            np.testing.assert_allclose(pooled[b, k - 1], places.mean(0) if len(places) else np.zeros(3), atol=1e-6)


def test_unit_keeps_zero_and_its_gradient_finite():
    assert (np.asarray(unit(jnp.zeros((2, 3)))) == 0).all()
    assert np.isfinite(jax.grad(lambda v: unit(v).sum())(jnp.zeros((2, 3)))).all()


def loss_batch(seed, rows=2, length=16, row_examples=3, vocab=13):
    """Rows of examples with four places of history, two of the target in context, two of the target alone."""
    rng = np.random.default_rng(seed)
    batch = {
        k: np.zeros((rows, length), np.int32) for k in ("decoder_segment_ids", "user_pool", "target_pool", "item_pool")
    }
    weights = np.zeros((rows, length), np.float32)
    mask = np.zeros((rows, row_examples), np.float32)
    for b in range(rows):
        for k in range(2 - b % 2):  # the second row holds one example and padding
            at = 8 * k
            batch["decoder_segment_ids"][b, at : at + 6], batch["decoder_segment_ids"][b, at + 6 : at + 8] = (
                2 * k + 1,
                2 * k + 2,
            )
            batch["user_pool"][b, at + 1 : at + 4] = batch["target_pool"][b, at + 4 : at + 6] = k + 1
            batch["item_pool"][b, at + 7] = k + 1
            weights[b, at + 3 : at + 6] = rng.random(3)
            mask[b, k] = 1
    ids = {
        k: rng.integers(0, 3, (rows, row_examples)).astype(np.int32)
        for k in ("target_user", "target_item", "target_text")
    }
    targets = rng.integers(0, vocab, (rows, length)).astype(np.int32)
    hidden = rng.normal(size=(rows, length, 6)).astype(np.float32)
    table = rng.normal(size=(vocab, 6)).astype(np.float32)
    return (
        hidden,
        table,
        batch | ids | {"decoder_loss_weights": weights, "example_mask": mask, "decoder_target_tokens": targets},
    )


def objective_reference(hidden, table, batch, config):
    """paper.md's objective, one example at a time, float64."""
    examples = [(b, k) for b, k in np.argwhere(batch["example_mask"] > 0)]
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    mean = lambda name, b, k: hidden[b][batch[name][b] == k + 1].astype(np.float64).mean(0)  # noqa: E731
    nll = [[], []]
    for b, k in examples:
        places = np.flatnonzero((batch["decoder_segment_ids"][b] == 2 * k + 1) & (batch["decoder_loss_weights"][b] > 0))
        log_p = log_softmax(hidden[b][places].astype(np.float64) @ table.astype(np.float64).T)
        nll[0].append(
            -(
                batch["decoder_loss_weights"][b][places]
                * log_p[range(len(places)), batch["decoder_target_tokens"][b][places]]
            ).sum()
        )
        nll[1].append(batch["decoder_loss_weights"][b][places].sum())
    generation = np.mean(np.divide(*nll)) if config.normalise == "examples" else np.sum(nll[0]) / np.sum(nll[1])

    def same(e, other):
        return any(batch[key][e] == batch[key][other] for key in ("target_user", "target_item", "target_text"))

    def contrast(anchor, candidate):
        losses = []
        for e in examples:
            candidates = [other for other in examples if other == e or not (config.mask_same and same(e, other))]
            scores = [cosine(mean(anchor, *e), mean(candidate, *other)) / config.temperature for other in candidates]
            losses.append(-log_softmax(np.array(scores))[candidates.index(e)])
        return np.mean(losses)

    def term(context):
        one, other = contrast("item_pool", context), contrast(context, "item_pool")
        return {"item_to_context": one, "context_to_item": other, "symmetric": (one + other) / 2}[config.direction]

    parts = generation, term("target_pool"), term("user_pool")
    return (1 - config.alpha - config.beta) * parts[0] + config.alpha * parts[1] + config.beta * parts[2], parts


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("normalise", ["tokens", "examples"])
@pytest.mark.parametrize("mask_same", [True, False])
def test_the_objective_equals_the_reference(direction, normalise, mask_same):
    for seed in range(4):
        config = LossConfig(
            alpha=0.2,
            beta=-0.05 if seed % 2 else 0.1,
            temperature=0.4,
            direction=direction,
            mask_same=mask_same,
            normalise=normalise,
            chunk=3,
        )
        hidden, table, batch = loss_batch(seed)
        expected, parts = objective_reference(hidden, table, batch, config)
        loss, metrics = calrec_loss(hidden, table, batch, config)
        got = [
            metrics[k] / metrics[f"{k}_weight"] for k in ("loss_next_item", "loss_target_target", "loss_user_target")
        ]
        np.testing.assert_allclose([*got, loss], [*parts, expected], rtol=1e-5, err_msg=f"seed {seed}")


def test_example_normalised_weights_sum_to_one_an_example():
    _, _, batch = loss_batch(0)
    scaled = np.asarray(example_normalised_weights(batch["decoder_loss_weights"], batch["decoder_segment_ids"], 3))
    assert scaled.sum() == pytest.approx(batch["example_mask"].sum(), rel=1e-6)
    assert (scaled[batch["decoder_loss_weights"] == 0] == 0).all()


def test_masking_removes_negatives_of_the_same_user():
    hidden, table, batch = loss_batch(0)
    batch["target_user"][:] = 5  # everybody is the same user: no negatives are left
    batch["target_item"] = np.arange(6, dtype=np.int32).reshape(2, 3)
    metrics = calrec_loss(hidden, table, batch, LossConfig())[1]
    assert float(metrics["loss_user_target"]) == pytest.approx(0, abs=1e-6)
    assert float(calrec_loss(hidden, table, batch, LossConfig(mask_same=False))[1]["loss_user_target"]) > 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"direction": "sideways"}, "LossConfig.direction='sideways': must be one of"),
        ({"normalise": "rows"}, "LossConfig.normalise='rows': must be 'tokens' or 'examples'"),
        ({"temperature": 0}, "LossConfig.temperature=0: must be above 0"),
        ({"alpha": 0.9, "beta": 0.2}, "alpha \\+ |beta| <= 1"),
        ({"chunk": 0}, "LossConfig.chunk=0: must be at least 1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(CalrecError, match=message):
        LossConfig(**settings)
