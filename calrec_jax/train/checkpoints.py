"""Checkpoints: orbax step folders, the latest and the best kept, and the facts that say what belongs together.

A stage folder holds `checkpoints/<step>/` (orbax: state, and its metrics), `model.json` (written before step 0: sizes,
template, tokenizer and dataset hashes) and, when the stage is done, `manifest.json`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from calrec_jax import artifacts, hosts
from calrec_jax.errors import CalrecError
from calrec_jax.models.transformer import TransformerConfig
from calrec_jax.train import lora

FACTS_FILE = "model.json"
METRIC = "validation_loss"


class _Chatter(logging.Filter):
    """Drops orbax's warnings that restate options we chose; everything else passes."""

    SAID = ("CheckpointManagerOptions.read_only=True", "Given directory is read only", "Requested `tracked_metric`")

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is printed."""
        return not record.getMessage().startswith(self.SAID)


logging.getLogger("absl").addFilter(_Chatter())


def manager(stage: Path, *, read_only: bool = False, alone: bool = False) -> ocp.CheckpointManager:
    """Orbax's manager over `stage/checkpoints`: asynchronous; the latest two and the best are kept.

    Args:
      stage: a stage's folder.
      read_only: whether nothing is saved; several processes need not read at the same time.
      alone: whether one of several processes saves and restores here without the others.
    """
    folder = (stage / "checkpoints").absolute()
    if alone and not read_only:
        folder.mkdir(parents=True, exist_ok=True)  # orbax makes it for all processes together alone
    policies = checkpoint_managers.preservation_policy
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(
            [
                policies.LatestN(2),  # should the newest be damaged, there is one to fall back to
                policies.BestN(get_metric_fn=lambda m: -m[METRIC], n=1, keep_checkpoints_without_metrics=False),
            ]
        ),
        best_fn=lambda m: -m[METRIC],
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
        enable_async_checkpointing=not read_only,
        create=not (read_only or alone),
        multiprocessing_options=_processes(alone=alone or read_only),
    )
    return ocp.CheckpointManager(folder, options=options, item_handlers=ocp.StandardCheckpointHandler())


def _processes(alone: bool) -> ocp.options.MultiprocessingOptions:
    """Which processes take part in a save or restore, and wait for each other: all, or this one."""
    if not alone:
        return ocp.options.MultiprocessingOptions()
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})


def save(checkpoints: ocp.CheckpointManager, step: int, state: Any, validation_loss: float | None) -> None:
    """Starts saving a step; `checkpoints.wait_until_finished()` ends it."""
    metrics = (
        None if validation_loss is None or not math.isfinite(validation_loss) else {METRIC: float(validation_loss)}
    )
    with artifacts.disk_errors(checkpoints.directory):
        checkpoints.save(step, args=ocp.args.StandardSave(state), metrics=metrics)


def save_parameters(stage: Path, params: Any) -> None:
    """Saves parameters alone as step 0, one after the other: the host holds no more than the largest of them."""
    most = max(sum(shard.data.nbytes for shard in x.addressable_shards) for x in jax.tree.leaves(params))
    limit = 1.01 * most / 1e9  # orbax counts in GB
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=limit, save_device_host_concurrent_gb=limit)
    with (
        artifacts.disk_errors(stage),
        ocp.CheckpointManager((stage / "checkpoints").absolute(), item_handlers=handler) as checkpoints,
    ):
        checkpoints.save(0, args=ocp.args.PyTreeSave({"params": params}))
        checkpoints.wait_until_finished()


def resume(checkpoints: ocp.CheckpointManager, state: Any, *, alone: bool = False) -> Any | None:
    """The newest saved state that can be read, or None where none was saved; damaged steps are named and deleted.

    Args:
      checkpoints: of the stage.
      state: a state of the wanted layout.
      alone: as `manager` was given it; else several processes agree on what can be read.

    Raises:
      CalrecError: there are checkpoints, and none can be read.
    """
    damaged: list[int] = []
    error: CalrecError | None = None
    for step in sorted(checkpoints.all_steps(), reverse=True):
        restored, failure = None, None
        try:
            restored = restore(checkpoints, step, state)
        except CalrecError as caught:
            failure = caught
        readable = failure is None
        if not (readable if alone else hosts.all_agree(readable)):
            failure = failure or CalrecError(f"{checkpoints.directory}/{step}: another process cannot restore it")
            print(f"train: {failure}", flush=True)
            damaged.append(step)
            error = error or failure
            continue
        for bad in damaged:
            print(f"train: falling back to step {step}; the damaged step {bad} is deleted", flush=True)
            checkpoints.delete(bad)
        return restored
    if error is not None:
        raise error
    return None


def restore(checkpoints: ocp.CheckpointManager, step: int, state: Any) -> Any:
    """A saved state in the layout (shapes, types, shardings) of `state`, whatever layout wrote it.

    Raises:
      CalrecError: the step is damaged, or its arrays have other names or shapes.
    """
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    try:
        return checkpoints.restore(step, args=ocp.args.StandardRestore(abstract))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CalrecError(
            f"{checkpoints.directory}/{step}: cannot be restored ({str(error).splitlines()[0]}); "
            "delete the stage's folder to train again"
        ) from error


def write_facts(stage: Path, config: TransformerConfig, facts: dict[str, Any]) -> None:
    """Writes what a later step must know before it reads the arrays."""
    artifacts.write_json(stage / FACTS_FILE, {"model": config.described(), **facts})


def read_facts(stage: Path) -> tuple[TransformerConfig, dict[str, Any]]:
    """Reads `write_facts`' file.

    Raises:
      CalrecError: no trained stage there, or written by another version.
    """
    path = Path(stage) / FACTS_FILE
    if not path.is_file():
        raise CalrecError(
            f"{stage}: no trained stage there ({FACTS_FILE} is missing); run `calrec train` or `import_hf`"
        )
    facts = artifacts.read_json(path)
    config = TransformerConfig.from_described(facts.pop("model", None))
    if config is None:
        raise CalrecError(f"{path}: its model settings are not this version's; train the stage again")
    return config, facts


def load_checkpoint(
    stage: str | Path, which: str = "best", like: Any = None
) -> tuple[TransformerConfig, Any, dict[str, Any]]:
    """Parameters of a trained stage, or of an imported model; the optimiser's state is not read.

    Args:
      stage: folder of a stage, e.g. RUN/stage2.
      which: "best" (by validation loss) or "latest".
      like: parameters whose shapes, types and shardings are wanted; None: as saved, on this process's default device.

    Returns:
      (config, params, facts); facts has vocab_size, tokenizer, template, datasets, max_history_tokens,
      max_target_tokens, and "step", the one that was read, and "hash", which names these parameters.

    Raises:
      CalrecError: nothing there, not finished, or damaged.
    """
    stage = Path(stage)
    config, facts = read_facts(stage)
    if config.attention == "splash":  # of training's rows; what reads the parameters has rows of other lengths
        config = dataclasses.replace(config, attention="auto")
    manifest = artifacts.read_manifest(stage, kind="checkpoint")
    with manager(stage, read_only=True) as checkpoints:
        step = checkpoints.best_step() if which == "best" else checkpoints.latest_step()
        if step is None:
            step = checkpoints.latest_step()
        if step is None:
            raise CalrecError(f"{stage}/checkpoints: no whole checkpoint there; run `calrec train` again")
        try:
            if like is None or "lora" in facts:
                device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
                saved = checkpoints.item_metadata(step).tree["params"]
                wanted = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), saved)
            else:
                wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
            params = _read_params(Path(checkpoints.directory) / str(step) / "default", wanted)
        except (ValueError, KeyError, TypeError, OSError, AttributeError) as error:
            raise CalrecError(
                f"{stage}/checkpoints/{step}: cannot be read ({str(error).splitlines()[0]}); "
                f"delete {stage} and train again"
            ) from error
    if "lora" in facts:
        params = _merged(stage, facts, params, like)
    return config, params, facts | {"step": step, "hash": artifacts.hash_json([manifest["hash"], step])}


def _merged(stage: Path, facts: dict[str, Any], adapters: Any, like: Any) -> Any:
    """Base and adapters as plain parameters."""
    path = Path(os.path.normpath(stage.absolute() / facts["base"]["path"]))
    if not (path / artifacts.MANIFEST).exists():
        raise CalrecError(f"{stage}: has adapters alone, and their base is not at {path}; put it back there")
    if artifacts.read_manifest(path, kind="checkpoint")["hash"] != facts["base"]["hash"]:
        raise CalrecError(f"{stage}: its adapters belong to another base than {path} is now; train the stage again")
    base = load_checkpoint(path, like=like)[1]
    return lora.merge(base, adapters, lora.LoraConfig(**facts["lora"]))


def _read_params(item: Path, wanted: Any) -> Any:
    """The parameters of a saved state, and nothing else of it: the optimiser's moments are twice as large."""
    tree = {"params": wanted}
    arguments = ocp.args.PyTreeRestore(
        item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
    )
    with ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(), multiprocessing_options=_processes(alone=True)
    ) as checkpointer:
        return checkpointer.restore(item, args=arguments)["params"]
