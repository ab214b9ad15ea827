"""Low-rank adapters (LoRA, Hu et al., 2021, arXiv 2106.09685) by qwix: what is trained and saved in place of a model.

Notable: the base's parameters are an argument of the step, neither in the state nor in its checkpoints, so that the
optimiser's state and the checkpoint are those of the adapters. Whoever reads such a checkpoint gets base and adapters
merged into plain parameters: W + α/r · A·B.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import gin
import jax
import jax.numpy as jnp
import numpy as np

from calrec_jax.errors import CalrecError
from calrec_jax.models.transformer import Transformer

MODULES = ("query", "key", "value", "output", "gate", "up", "down")
_A, _B = "kernel_lora_a", "kernel_lora_b"


@gin.configurable
@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Adapters of a training stage.

    Attributes:
      rank: r; 0 is off: all parameters are trained.
      alpha: α; adapters are added with the weight α / r.
      modules: of each block, the products that have adapters.
    """

    rank: int = 0
    alpha: float = 16.0
    modules: tuple[str, ...] = MODULES

    def __post_init__(self):
        object.__setattr__(self, "modules", tuple(self.modules))
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 0:
            raise CalrecError(f"LoraConfig.rank={self.rank!r}: must be a whole number of at least 0 (0 is off)")
        if self.alpha <= 0:
            raise CalrecError(f"LoraConfig.alpha={self.alpha}: must be above 0")
        unknown = sorted({*self.modules} - {*MODULES})
        if unknown or not self.modules:
            raise CalrecError(f"LoraConfig.modules={self.modules}: must be some of {list(MODULES)}")

    def settings(self) -> dict[str, Any]:
        """As manifests keep them: nothing where it is off."""
        return {"lora": dataclasses.asdict(self)} if self.rank else {}


def adapted(model: Transformer, config: LoraConfig) -> Transformer:
    """The model with adapters, which are parameters beside the kernels they belong to; itself where rank is 0.

    Raises:
      CalrecError: qwix is not installed.
    """
    if not config.rank:
        return model
    try:
        import qwix
    except ImportError as error:
        raise CalrecError(f"LoraConfig.rank={config.rank}: needs qwix (pip install -e '.[lora]')") from error
    # Unrolled, a block stands alone and its modules have no parent's name before theirs.
    path = f"(layers/)?({'|'.join(config.modules)})"
    provider = qwix.LoraProvider(module_path=path, rank=config.rank, alpha=config.alpha)
    return qwix.apply_lora_to_model(model, provider, methods=("activations", "__call__"))


def adapters_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """The adapters alone of an adapted model's parameters, boxed or not."""
    found = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            inside = adapters_of(value)
            if inside:
                found[name] = inside
        elif name in (_A, _B):
            found[name] = value
    return found


def join(frozen: Mapping[str, Any] | None, params: Mapping[str, Any]) -> Any:
    """The adapted model's parameters from the base's and the adapters; `params` where nothing is frozen."""
    if frozen is None:
        return params
    joined = dict(frozen)
    for name, value in params.items():
        joined[name] = join(frozen[name], value) if isinstance(value, Mapping) else value
    return joined


def merge(base: Mapping[str, Any], adapters: Mapping[str, Any], config: LoraConfig) -> dict[str, Any]:
    """Plain parameters that compute what base and adapters do.

    Args:
      base: parameters; the kernels that have adapters are given up for the merged ones.
      adapters: beside the kernels' names, A [L, inputs, r] and B [L, r, outputs] of L layers.
      config: rank and α.
    """
    merged = dict(base)
    for name, value in adapters.items():
        if isinstance(value, Mapping) and _A in value:
            a, b = np.asarray(value[_A]), np.asarray(value[_B])
            kernel = base[name]["kernel"]
            add = jax.jit(_merge_kernel, donate_argnums=0, out_shardings=kernel.sharding)
            merged[name] = dict(base[name]) | {"kernel": add(kernel, a, b, config.alpha / config.rank)}
        else:
            merged[name] = merge(base[name], value, config)
    return merged


def _merge_kernel(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    return kernel + scale * jnp.einsum("lir,lro->lio", a, b).reshape(kernel.shape)
