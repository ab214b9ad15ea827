"""The pure training step, and where its arrays lie on the devices.

`train_step(state, batch) -> (state, metrics)` is jitted once with the state donated and explicit shardings over a mesh
(replica, data, fsdp, model). Metrics are sums with their weights; nothing is divided before it is reported, so means
over devices, batches and log windows are exact.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from calrec_jax.errors import CalrecError
from calrec_jax.losses import LossConfig, calrec_loss
from calrec_jax.models.transformer import Transformer, vocabulary_table
from calrec_jax.train.gradients import ROWS, Metrics, activations, make_gradients, over

MESH_AXES = ("replica", "data", "fsdp", "model")
# T5X's logical names → mesh axes.
LOGICAL_RULES = (
    ("batch", ROWS),
    ("vocab", "model"),
    ("embed", "fsdp"),
    ("mlp", "model"),
    ("heads", "model"),
    ("kv", None),
    ("layers", None),
    ("length", None),
)


@flax.struct.dataclass
class TrainState:
    """What a checkpoint holds.

    Attributes:
      step: scalar int32; also the data position.
      params: parameters.
      opt_state: the optimiser's.
      best_loss: scalar float32, lowest validation loss so far; it rides along, so that early stop resumes exactly.
      since_best: scalar int32, validations since then.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    best_loss: jax.Array
    since_best: jax.Array


Trained = Callable[[Any], Any]


def _all(params: Any) -> Any:
    return params


def make_mesh(shape: Sequence[int] | None = None) -> Mesh:
    """A mesh over all devices; by default all of them on the "data" axis.

    Args:
      shape: sizes of (replica, data, fsdp, model).

    Raises:
      CalrecError: the shape does not cover the devices.
    """
    devices = jax.devices()
    shape = tuple(shape) if shape else (1, len(devices), 1, 1)
    if len(shape) != len(MESH_AXES) or int(np.prod(shape)) != len(devices):
        raise CalrecError(f"mesh_shape={shape}: must be {MESH_AXES} sizes whose product is the {len(devices)} devices")
    return jax.make_mesh(shape, MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(MESH_AXES))


def row_shards(mesh: Mesh) -> int:
    """Number of parts that a batch's rows are split into."""
    return math.prod(size for name, size in mesh.shape.items() if name != "model")


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over every axis but "model"."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def init_state(
    model: Transformer, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int, trained: Trained = _all
) -> tuple[TrainState, Any]:
    """A fresh state laid out over the mesh, and its shardings.

    Parameters are initialised from `seed` alone: the same on any mesh. `trained` takes out of a model's parameters
    those that the state has.
    """
    create = _creator(model, optimizer, trained)
    _, shardings = abstract_state(model, optimizer, mesh, trained)
    state = jax.jit(lambda key: nn.unbox(create(key)), out_shardings=shardings)(jax.random.key(seed))
    return state, shardings


def abstract_params(model: Transformer, mesh: Mesh) -> Any:
    """Shapes, types and shardings of a model's parameters over a mesh."""
    abstract, shardings = abstract_state(model, optax.identity(), mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract.params, shardings.params
    )


def abstract_state(
    model: Transformer, optimizer: optax.GradientTransformation, mesh: Mesh, trained: Trained = _all
) -> tuple[TrainState, Any]:
    """Shapes of a state, and its shardings over a mesh that need not be there.

    Mesh axes that do not divide the dimension they are meant for split another one of the array, where one divides.
    """
    boxed = jax.eval_shape(_creator(model, optimizer, trained), jax.random.key(0))
    logical = nn.get_partition_spec(boxed)
    shardings = nn.unbox(nn.logical_to_mesh_sharding(logical, mesh, LOGICAL_RULES))
    abstract = nn.unbox(boxed)
    return abstract, jax.tree.map(_evenly, shardings, logical, abstract)


def _creator(
    model: Transformer, optimizer: optax.GradientTransformation, trained: Trained
) -> Callable[[jax.Array], TrainState]:
    """A function that makes a state, parameters boxed with their logical axes, from a key."""

    def create(key: jax.Array) -> TrainState:
        tokens = jnp.zeros((1, 8), jnp.int32)
        params = trained(model.init(key, tokens, tokens, tokens + 1)["params"])
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            best_loss=jnp.full((), jnp.inf, jnp.float32),
            since_best=jnp.zeros((), jnp.int32),
        )

    return create


def _evenly(sharding: NamedSharding, logical: PartitionSpec, array: jax.ShapeDtypeStruct) -> NamedSharding:
    """`sharding`, with mesh axes moved that do not divide their dimension; they split nothing where none divides.

    A width of 1,152 does not divide by 256 chips, and parameters that are whole on each of them would fill its memory.
    Layers are never split, since a scan reads them one by one, nor are vectors, which are small.
    """
    mesh = sharding.mesh
    names = [*logical, *[None] * (len(array.shape) - len(logical))]
    axes: list[tuple[str, ...]] = [(a,) if isinstance(a, str) else tuple(a or ()) for a in sharding.spec]
    axes += [()] * (len(array.shape) - len(axes))

    def divides(place: int, more: tuple[str, ...] = ()) -> bool:
        return array.shape[place] % math.prod(mesh.shape[name] for name in (*axes[place], *more)) == 0

    uneven = [place for place in range(len(axes)) if not divides(place)]
    moved = [axes[place] for place in uneven]
    for place in uneven:
        axes[place] = ()
    inner = [place for place, name in enumerate(names) if name != "layers"]
    for left in moved:
        places = [place for place in inner if divides(place, left)] if len(inner) > 1 else []
        if places:
            largest = max(places, key=lambda place: array.shape[place])
            axes[largest] += left
    # One name stands for itself, so that a sharding reads the same however it came about.
    spec = [names[0] if len(names) == 1 else names or None for names in axes]
    return NamedSharding(mesh, PartitionSpec(*spec))


def make_train_step(
    model: Transformer,
    loss_config: LossConfig,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    state_shardings: Any,
    micro_batches: int = 1,
    frozen_shardings: Any = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Builds the jitted `train_step(state, batch) -> (state, metrics)`; the state is donated.

    With `frozen_shardings` it is `train_step(state, batch, frozen)`: parameters that the state does not have (LoRA).

    `micro_batches` is how many parts of the batch are in memory one after the other; see `gradients.make_gradients`.

    A step whose loss or gradient is not finite leaves parameters and optimiser as they were and counts in "skipped".
    """
    gradients = make_gradients(model, loss_config, seed, mesh, micro_batches)

    def train_step(state: TrainState, batch: dict[str, jax.Array], frozen: Any = None):
        metrics, grads = gradients(state.params, batch, state.step, frozen)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
        new = dataclasses.replace(
            state,
            step=state.step + 1,
            params=jax.tree.map(keep, params, state.params),
            opt_state=jax.tree.map(keep, opt_state, state.opt_state),
        )
        one = jnp.ones((), jnp.float32)
        metrics = {k: jnp.where(finite, v, jnp.zeros_like(v)) for k, v in metrics.items()}
        metrics |= {"gradient_norm": jnp.where(finite, norm, 0.0), "gradient_norm_weight": finite.astype(jnp.float32)}
        real = jnp.sum(batch["decoder_segment_ids"] != 0, dtype=jnp.float32)
        return new, metrics | {
            "skipped": (~finite).astype(jnp.float32),
            "skipped_weight": one,
            "real_token_share": real,
            "real_token_share_weight": jnp.float32(batch["decoder_segment_ids"].size),
        }

    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(state_shardings, batch_sharding(mesh), *([] if frozen_shardings is None else [frozen_shardings])),
        out_shardings=(state_shardings, replicated),
    )


def make_eval_step(
    model: Transformer, loss_config: LossConfig, mesh: Mesh
) -> Callable[[Any, dict[str, jax.Array]], Metrics]:
    """Builds the jitted `eval_step(params, batch) -> metrics`, without dropout."""
    model = over(model, mesh)

    def eval_step(params: Any, batch: dict[str, jax.Array]) -> Metrics:
        hidden, soft_cap = activations(model, params, batch), model.config.logit_soft_cap
        return calrec_loss(hidden, vocabulary_table(params), batch, loss_config, soft_cap, model.rows)[1]

    return jax.jit(
        eval_step, in_shardings=(None, batch_sharding(mesh)), out_shardings=NamedSharding(mesh, PartitionSpec())
    )


def averages(sums: dict[str, float]) -> dict[str, float]:
    """Divides each metric's sum by its weight; a metric of weight 0 is left out."""
    names = [k for k in sums if f"{k}_weight" in sums]
    return {k: float(sums[k] / sums[f"{k}_weight"]) for k in names if sums[f"{k}_weight"] > 0}
