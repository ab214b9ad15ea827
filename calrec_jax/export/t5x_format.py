"""Parameters as a T5X checkpoint, without importing T5X: `checkpoint_<step>/state`, as its orbax manager reads it."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp


def write_t5x(folder: pathlib.Path, params: Any, step: int) -> None:
    """Writes `folder/checkpoint_<step>` with {"target": parameters, "state": {"step"}}.

    There is no optimiser state in it: T5X infers and evaluates from it as it is, and trains from it with
    `RestoreCheckpointConfig.fallback_to_scratch = True`, which begins a fresh optimiser.

    Args:
      folder: which exists.
      params: of the model.
      step: of the checkpoint's name, and T5X's step.
    """
    options = ocp.CheckpointManagerOptions(step_prefix="checkpoint", enable_async_checkpointing=False)
    handlers = {"state": ocp.PyTreeCheckpointHandler(use_ocdbt=True)}
    tree = {"target": jax.tree.map(np.asarray, params), "state": {"step": np.int32(step)}}
    with ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handlers) as manager:
        manager.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(tree)))
        manager.wait_until_finished()
