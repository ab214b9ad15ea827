"""Gradient accumulation: the same loss, metrics and gradients however many micro-batches there are."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from calrec_jax.data.packing import PackedStream
from calrec_jax.errors import CalrecError
from calrec_jax.losses import LossConfig
from calrec_jax.models.transformer import Transformer, TransformerConfig
from calrec_jax.train import step as steps
from calrec_jax.train.batching import Batching
from calrec_jax.train.feed import training_batch
from calrec_jax.train.gradients import make_gradients

SIZES = {"embed_dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "mlp_dim": 24}
BATCHING = Batching(
    batch_rows=8, row_tokens=256, row_examples=4, max_history_tokens=120, max_target_tokens=24, next_item_loss="all",
    forced_token_weight=0.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def case(small_run):
    """A model, its parameters and a batch of 8 rows."""
    examples = BATCHING.examples(small_run.datasets, small_run.tokenizer, "train")
    batch = training_batch(PackedStream(examples, BATCHING.packing(), seed=0), 0, sample_forced_tokens=False, seed=0)
    model = Transformer(TransformerConfig(**SIZES), small_run.tokenizer.vocab_size)
    row = np.ones((1, 4), np.int32)
    return model, nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), row, row, row))["params"], batch


def gradients(case, config, micro_batches, model=None):
    function = make_gradients(model or case[0], config, 0, steps.make_mesh((1, 1, 1, 1)), micro_batches)
    return jax.device_get(jax.jit(function)(case[1], case[2], np.int32(3)))


@pytest.mark.parametrize(
    "config",
    [
        LossConfig(alpha=0.3, beta=0.2, temperature=0.1, chunk=16),
        LossConfig(alpha=0.3, beta=-0.1, direction="symmetric", normalise="examples", chunk=16),
    ],
    ids=["tokens", "examples"],
)
def test_any_number_of_micro_batches_gives_the_same_gradients(case, config):
    metrics, grads = gradients(case, config, 1)
    assert float(metrics["loss_user_target"]) > 0
    for micro_batches in (2, 8):
        other_metrics, other = gradients(case, config, micro_batches)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), other, grads)
        assert set(metrics) == set(other_metrics)
        for name, value in metrics.items():
            np.testing.assert_allclose(other_metrics[name], value, rtol=1e-5, err_msg=name)


def test_negatives_of_one_micro_batch_alone_would_give_another_gradient(case):
    """What summing gradients of micro-batches would do: so the test above can fail."""
    config = LossConfig(alpha=0.8, beta=0.0, temperature=0.1)
    whole = gradients(case, config, 1)[1]
    model, params, batch = case
    halves = [
        gradients((model, params, {k: v[rows] for k, v in batch.items()}), config, 1)[1]
        for rows in (slice(0, 4), slice(4, 8))
    ]
    summed = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    difference = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), summed, whole)
    assert max(jax.tree.leaves(difference)) > 1e-3


def test_dropout_is_the_same_in_both_passes(case):
    """With the masks of the first pass the pulled gradient is that of the loss: a directional derivative agrees."""
    model = Transformer(dataclasses.replace(case[0].config, dropout_rate=0.2), case[0].vocab_size)
    config = LossConfig(alpha=0.5, beta=0.4, temperature=0.2)
    function = jax.jit(make_gradients(model, config, 0, steps.make_mesh((1, 1, 1, 1)), 4))
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), case[1])
    size = 1e-3

    def loss(sign):
        moved = jax.tree.map(lambda p, d: p + sign * size * d, case[1], direction)
        return float(function(moved, case[2], np.int32(3))[0]["loss"])

    gradient = function(case[1], case[2], np.int32(3))[1]
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    slope = sum(float(np.vdot(g, d)) for g, d in pairs)
    assert slope == pytest.approx((loss(1) - loss(-1)) / (2 * size), rel=0.02, abs=2e-3)


def test_micro_batches_must_be_positive():
    with pytest.raises(CalrecError, match="Batching.micro_batches=0: must be at least 1"):
        Batching(micro_batches=0)
