"""The losses of a split's targets, which training is watched by."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from calrec_jax.data.examples import ExampleSet
from calrec_jax.data.packing import evaluation_batches
from calrec_jax.losses import LossConfig
from calrec_jax.models.transformer import Transformer
from calrec_jax.train import step as steps
from calrec_jax.train.batching import Batching
from calrec_jax.train.feed import place


def sample(examples: ExampleSet, users: int, seed: int) -> ExampleSet:
    """A seeded sample of examples, in their order."""
    if not users or len(examples) <= users:
        return examples
    keep = np.sort(
        np.random.Generator(np.random.Philox(key=[seed, 1 << 40])).choice(len(examples), users, replace=False)
    )
    fields = ("start", "end", "user", "group", "joint_lengths", "alone_lengths")
    return dataclasses.replace(examples, **{name: getattr(examples, name)[keep] for name in fields})


class Validation:
    """Losses over the validation targets, with training's token weights: the choice of the item, not its spelling.

    Forced tokens weigh `forced_token_weight` here, too (never sampled): compare runs of equal weight only.
    """

    def __init__(
        self, model: Transformer, loss_config: LossConfig, mesh: Mesh, examples: ExampleSet, batching: Batching
    ):
        self._step = steps.make_eval_step(model, loss_config, mesh)
        self._sharding = steps.batch_sharding(mesh)
        self._examples, self._packing = examples, batching.packing("last")

    def __call__(self, params: Any) -> dict[str, float]:
        """The losses, each divided by its weight, as "loss_next_item" and the like."""
        sums: dict[str, Any] = {}
        for batch in evaluation_batches(self._examples, self._packing):
            metrics = self._step(params, {name: place(array, self._sharding) for name, array in batch.items()})
            sums = metrics if not sums else jax.tree.map(jnp.add, sums, metrics)
        return steps.averages({name: float(value) for name, value in jax.device_get(sums).items()})
