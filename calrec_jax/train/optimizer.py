"""AdamW with warm-up and cosine decay."""

from __future__ import annotations

import dataclasses
from typing import Any

import gin
import jax
import optax

from calrec_jax.errors import CalrecError


@gin.configurable
@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter, 2019) under a warm-up and cosine schedule.

    Attributes:
      learning_rate: peak.
      warmup_fraction: share of the steps over which the rate rises linearly from 0.
      final_fraction: rate at the last step, as a share of the peak.
      weight_decay: decoupled; not applied to vectors (norm scales, biases).
      beta1, beta2, epsilon: of Adam.
      clip_norm: gradients are scaled down to this global norm; 0 is off.
    """

    learning_rate: float = 3e-3
    warmup_fraction: float = 0.03
    final_fraction: float = 0.0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-8
    clip_norm: float = 1.0

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise CalrecError(f"OptimizerConfig.learning_rate={self.learning_rate}: must be above 0")
        for name in ("warmup_fraction", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise CalrecError(f"OptimizerConfig.{name}={getattr(self, name)}: must be at least 0 and below 1")
        for name in ("final_fraction", "weight_decay", "epsilon", "clip_norm"):
            if getattr(self, name) < 0:
                raise CalrecError(f"OptimizerConfig.{name}={getattr(self, name)}: must be at least 0")

    def schedule(self, steps: int) -> optax.Schedule:
        """Learning rate by step."""
        warmup = max(1, round(self.warmup_fraction * steps))
        return optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, warmup, max(steps, warmup + 1), self.final_fraction * self.learning_rate
        )

    def transformation(self, steps: int) -> optax.GradientTransformation:
        """The optimiser for a run of `steps` steps."""
        adamw = optax.adamw(
            self.schedule(steps),
            b1=self.beta1,
            b2=self.beta2,
            eps=self.epsilon,
            weight_decay=self.weight_decay,
            mask=_decayed,
        )
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), adamw) if self.clip_norm else adamw


def _decayed(params: Any) -> Any:
    """True for matrices, False for norm scales and biases (by name: scanned, they are matrices too).

    Parameters may be boxed.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: all(getattr(key, "key", None) not in ("scale", "bias") for key in path), params
    )
