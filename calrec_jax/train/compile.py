"""The verb `compile`: a stage's training step, compiled for a TPU slice that is not here, and whether it fits.

Notable: libtpu holds the TPU's compiler and needs no TPU for it (`pip install -e '.[tpu]'`). What is compiled is
the very step that `train` runs, of the shapes that the run file gives; no data, tokenizer or run folder is read.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
from pathlib import Path
from typing import Any

import gin
import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from calrec_jax import tokenizer
from calrec_jax.errors import CalrecError
from calrec_jax.losses import LossConfig
from calrec_jax.models import attention_kernels
from calrec_jax.models.transformer import Transformer, TransformerConfig
from calrec_jax.train import step as steps
from calrec_jax.train.batching import Batching
from calrec_jax.train.checkpoints import read_facts
from calrec_jax.train.feed import batch_shapes
from calrec_jax.train.flops import CHIPS, step_flops
from calrec_jax.train.hlo import Program
from calrec_jax.train.lora import LoraConfig
from calrec_jax.train.memory import WAYS_OUT, MemoryPlan, compiled_within_memory, memory_plan
from calrec_jax.train.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What a compiled training step needs, per chip where not said otherwise.

    Attributes:
      chip_kind: JAX's name of the chip.
      devices: number of JAX devices; a v4 chip's two cores are one each unless the topology joins them.
      parameters: of the model, in all.
      memory: what lies in a chip's memory.
      splash: whether attention is the kernel.
      flops: of the compiled step, kernels among them, the vocabulary's loop left out.
      analytic_flops: the same from the model's sizes.
      vocabulary_flops: of one turn of the vocabulary's loop; a chip makes as many as its rows' weighted
        tokens fill chunks.
      collective_bytes: by kind, those of the vocabulary's loop left out.
      vocabulary_collective_bytes: of one turn of the vocabulary's loop.
    """

    chip_kind: str
    devices: int
    parameters: int
    memory: MemoryPlan
    splash: bool
    flops: float
    analytic_flops: float
    vocabulary_flops: float
    collective_bytes: dict[str, float]
    vocabulary_collective_bytes: float


def compile_stage(stage: str, topology: str, num_slices: int = 1, init_from: str | None = None) -> StepReport:
    """Compiles a stage's training step as gin has bound it, and prints the report.

    The vocabulary has as many rows as that of `init_from`, where there is one, else `vocab.vocab_size`.

    Raises:
      CalrecError: libtpu is missing, the topology is unknown, the mesh does not cover it, or the step does not fit.
    """
    with gin.config_scope(stage):
        bound = gin.get_bindings("train")
        if LoraConfig().rank:
            raise CalrecError(
                "compile: LoraConfig.rank is set, and a step with adapters is not counted yet; set it to 0"
            )
        vocab_size = bound_vocab_size(init_from)
        mesh = make_mesh(topology, num_slices, bound.get("mesh_shape"))
        report = compile_step(
            mesh,
            TransformerConfig(),
            LossConfig(),
            OptimizerConfig(),
            Batching(),
            vocab_size,
            bound.get("num_steps", 1),
        )
    _print(stage, topology, mesh, report, bound.get("num_steps"))
    if report.memory.fits is False:
        raise CalrecError(f"{stage} does not fit {topology}: {report.memory}. {WAYS_OUT}")
    return report


def bound_vocab_size(init_from: str | None = None) -> int:
    """V of the checkpoint that training starts from, where there is one, else as gin has bound it for the tokenizer."""
    if init_from is not None:
        return int(read_facts(Path(init_from).expanduser())[1]["vocab_size"])
    default = inspect.signature(tokenizer.make_tokenizer).parameters["vocab_size"].default
    return int(gin.get_bindings("vocab").get("vocab_size", default))


def make_mesh(topology: str, num_slices: int, shape: Any = None) -> Mesh:
    """The mesh of `train` over a slice that is not here; by default parameters are spread over each slice (fsdp).

    Slices are the outermost axis of the mesh, so only the axes on the left cross the data centre's network.
    """
    # libtpu asks the cloud what machine this is, and lets one process alone have the TPU: there is neither here.
    settings = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    try:
        slices = {} if num_slices == 1 else {"num_slices": num_slices}
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **slices)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CalrecError(
            f"--topology={topology}: {first}. It takes libtpu (pip install -e '.[tpu]') and a name such as "
            "v5e:4x4, v5e:16x16, v4:8x8x8 or v6e:8x8"
        ) from error
    devices = described.devices
    shape = tuple(shape) if shape else (num_slices, 1, len(devices) // num_slices, 1)
    if len(shape) != len(steps.MESH_AXES) or math.prod(shape) != len(devices):
        raise CalrecError(
            f"train.mesh_shape={shape}: must be {steps.MESH_AXES} sizes whose product is the {len(devices)} devices of "
            f"{num_slices} × {topology}"
        )
    return Mesh(np.array(devices).reshape(shape), steps.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def compile_step(
    mesh: Mesh,
    config: TransformerConfig,
    loss: LossConfig,
    optimizer_config: OptimizerConfig,
    batching: Batching,
    vocab_size: int,
    num_steps: int,
) -> StepReport:
    """Compiles `train`'s step over a mesh of devices that need not be there.

    Raises:
      CalrecError: the batch does not divide, or the compiler finds no way to fit the step.
    """
    parts = steps.row_shards(mesh) * batching.micro_batches
    if batching.batch_rows % parts:
        raise CalrecError(
            f"Batching.batch_rows={batching.batch_rows}: must divide by {parts}, the mesh's parts of rows times "
            f"Batching.micro_batches={batching.micro_batches}"
        )
    model, optimizer = Transformer(config, vocab_size), optimizer_config.transformation(num_steps)
    state, shardings = steps.abstract_state(model, optimizer, mesh)
    step = steps.make_train_step(model, loss, optimizer, 0, mesh, shardings, batching.micro_batches)
    compiled = compiled_within_memory(step, state, batch_shapes(batching.packing()))
    text = compiled.as_text()
    assert text is not None
    cost = Program(text, functools.partial(attention_kernels.kernel_flops, window=_common_window(config))).cost()
    device = mesh.devices.flat[0]
    splash = attention_kernels.takes_splash(config.attention, steps.batch_sharding(mesh), batching.row_tokens)
    turns = max(1, batching.micro_batches)
    return StepReport(
        chip_kind=device.device_kind,
        devices=mesh.size,
        parameters=sum(math.prod(x.shape) for x in jax.tree.leaves(state.params)),
        memory=memory_plan(compiled, state, shardings, device),
        splash=splash,
        flops=cost.flops,
        analytic_flops=step_flops(config, batching, splash=splash) / mesh.size,
        vocabulary_flops=sum(turn.flops for turn in cost.dynamic_loops) / turns,
        collective_bytes=dict(cost.collective_bytes),
        vocabulary_collective_bytes=sum(sum(turn.collective_bytes.values()) for turn in cost.dynamic_loops) / turns,
    )


def _common_window(config: TransformerConfig) -> int | None:
    return config.sliding_window if all(config.local_layers) else None


def _print(stage: str, topology: str, mesh: Mesh, report: StepReport, num_steps: int | None) -> None:
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    print(f"compile: {stage} on {topology}: {report.devices} × {report.chip_kind}, mesh {axes}")
    print(f"  parameters      {report.parameters / 1e6:,.2f} M")
    print(f"  HBM             {report.memory}")
    print(f"  attention       {'splash' if report.splash else 'xla'}")
    print(
        f"  FLOPs a chip    {report.flops / 1e9:,.1f} G compiled, {report.analytic_flops / 1e9:,.1f} G by the sizes "
        f"({report.flops / report.analytic_flops:.3f}); vocabulary {report.vocabulary_flops / 1e9:,.1f} G a turn, apart"
    )
    for kind, size in sorted(report.collective_bytes.items()):
        print(f"  {kind:<15} {size / 2**20:,.1f} MiB a chip")
    print(f"  {'of a turn':<15} {report.vocabulary_collective_bytes / 2**20:,.1f} MiB a chip, all collectives, apart")
    chip = CHIPS.get(report.chip_kind)
    if chip is not None:
        seconds = (report.flops + report.vocabulary_flops) / (0.5e12 * chip.peak_tflops)
        hours = f", {seconds * num_steps / 3600:,.2f} h for {num_steps:,} steps" if num_steps else ""
        print(f"  at half of peak {seconds * 1e3:,.1f} ms a step with one turn{hours}")
