"""The verb `train`: one stage, from scratch, from another stage's parameters, or from its own last checkpoint.

Order of precedence at start: 1. done already: skip; 2. a checkpoint of this stage: resume from it, exactly;
3. `init_from`: parameters only, fresh optimiser and step (stage II); 4. scratch. The data position is the step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gin
import jax
import numpy as np
from jax.sharding import Mesh

from calrec_jax import artifacts, hosts
from calrec_jax.data.dataset import Dataset
from calrec_jax.data.examples import ExampleSet
from calrec_jax.data.packing import PackedStream
from calrec_jax.errors import CalrecError
from calrec_jax.losses import LossConfig
from calrec_jax.models.transformer import Transformer, TransformerConfig
from calrec_jax.tokenizer import Tokenizer
from calrec_jax.train import checkpoints as ckpt
from calrec_jax.train import lora, memory
from calrec_jax.train import step as steps
from calrec_jax.train.batching import Batching
from calrec_jax.train.feed import Feed, place
from calrec_jax.train.lora import LoraConfig
from calrec_jax.train.optimizer import OptimizerConfig
from calrec_jax.train.preemption import Preemption
from calrec_jax.train.profiling import Window
from calrec_jax.train.progress import TrainingLog
from calrec_jax.train.validation import Validation, sample


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What decides a stage's outcome beside its inputs; the arguments are `train`'s."""

    num_steps: int
    eval_every: int
    eval_users: int
    patience: int
    checkpoint_every: int
    max_skipped: int
    seed: int
    model: TransformerConfig = dataclasses.field(default_factory=TransformerConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    batching: Batching = dataclasses.field(default_factory=Batching)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)

    def __post_init__(self):
        for name in ("num_steps", "eval_every", "eval_users", "patience", "checkpoint_every", "max_skipped", "seed"):
            value, least = getattr(self, name), 1 if name in ("num_steps", "max_skipped") else 0
            if not isinstance(value, int) or value < least:
                raise CalrecError(f"train.{name}={value!r}: must be a whole number of at least {least}")

    def settings(self) -> dict[str, Any]:
        """As the manifest keeps them."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "lora"}
        return own | {"model": self.model.described()} | self.lora.settings()

    def stops(self, since_best: int) -> bool:
        """Whether patience has run out."""
        return bool(self.patience) and since_best >= self.patience

    def validation_due(self, step: int) -> bool:
        """Whether the model after `step` steps is validated."""
        every = self.eval_every or max(1, self.num_steps // 5)
        return step % every == 0 or step == self.num_steps


@gin.configurable(denylist=["out", "datasets", "tokenizer", "init_from"])
def train(
    out: Path,
    datasets: Sequence[Dataset],
    tokenizer: Tokenizer,
    *,
    init_from: Path | None = None,
    num_steps: int = gin.REQUIRED,
    eval_every: int = 0,
    eval_users: int = 512,
    patience: int = 0,
    checkpoint_every: int = 0,
    max_skipped: int = 100,
    log_every: int = 20,
    seed: int = 0,
    mesh_shape: Sequence[int] | None = None,
    profile_steps: Sequence[int] | None = None,
) -> Path:
    """Trains one stage into `out` (see docs/architecture.md, "The run folder").

    Args:
      out: the stage's folder.
      datasets: categories of the mixture; their validation targets are what is watched.
      tokenizer: of the run.
      init_from: a finished stage whose best parameters are the start; optimiser and step start fresh.
      num_steps: steps, and the length of the schedule.
      eval_every: steps between validation losses; 0 is five times a run.
      eval_users: validation examples, a seeded sample; 0 is all.
      patience: validations without a new best before the stage ends early; 0 is never.
      checkpoint_every: steps between checkpoints beside those of the validations; 0 is none.
      max_skipped: steps in a row without a finite loss and gradient, each of which changes nothing, before the stage
        ends with an error.
      log_every: steps between progress lines and log rows.
      seed: of initialisation, data order and dropout.
      mesh_shape: (replica, data, fsdp, model); None puts all devices on data.
      profile_steps: (first, last): these steps are traced into the folder `profile` of the stage; see `profiling`.

    Returns:
      `out`.

    Raises:
      CalrecError: bad settings, inputs that do not belong together, or a loss that is not finite.
    """
    out = Path(out)
    hosts.processes()  # hosts that were not joined would each take themselves for the first
    if log_every < 1:
        raise CalrecError(f"train.log_every={log_every!r}: must be a whole number of at least 1")
    plan = _Plan(
        num_steps=num_steps,
        eval_every=eval_every,
        eval_users=eval_users,
        patience=patience,
        checkpoint_every=checkpoint_every,
        max_skipped=max_skipped,
        seed=seed,
    )
    if plan.lora.rank and init_from is None:
        raise CalrecError(
            f"LoraConfig.rank={plan.lora.rank}: there is no base to adapt; set run.init_from, or rank to 0"
        )
    profile = Window(out, profile_steps)
    made_from = _inputs(datasets, tokenizer, init_from)
    if artifacts.is_done(out, kind="checkpoint", made_from=made_from, settings=plan.settings()):
        print(f"train: {out} is done already, skipped")
        return out
    hosts.barrier("nobody is done")  # before the first of them could be
    mesh, batching = steps.make_mesh(mesh_shape), plan.batching
    train_examples = batching.examples(datasets, tokenizer, "train")
    valid_examples = sample(batching.examples(datasets, tokenizer, "validation"), eval_users, seed)
    stream = PackedStream(train_examples, batching.packing(), seed=seed, mixture_exponent=batching.mixture_exponent)
    shards = steps.row_shards(mesh)
    if batching.batch_rows % (shards * batching.micro_batches):
        raise CalrecError(
            f"Batching.batch_rows={batching.batch_rows}: must divide by the mesh's {shards} parts of rows times "
            f"Batching.micro_batches={batching.micro_batches}"
        )
    base = _base_facts(out, init_from, plan.lora)
    hosts.first_then_all("claim", lambda: _claim(out, plan, made_from, train_examples, tokenizer, datasets, base))
    with TrainingLog(out, num_steps, log_every, writes=hosts.is_first()) as log, hosts.deaths(), profile:
        facts = _fit(out, plan, mesh, stream, valid_examples, tokenizer, init_from, log, profile)
    if hosts.is_first():
        artifacts.write_manifest(out, kind="checkpoint", made_from=made_from, settings=plan.settings(), **facts)
    hosts.barrier("manifest")
    return out


def _fit(
    out: Path,
    plan: _Plan,
    mesh: Mesh,
    stream: PackedStream,
    valid_examples: ExampleSet,
    tokenizer: Tokenizer,
    init_from: Path | None,
    log: TrainingLog,
    profile: Window,
) -> dict[str, Any]:
    """Trains from where the stage stands to its end; returns the manifest's facts."""
    plain, optimizer = Transformer(plan.model, tokenizer.vocab_size), plan.optimizer.transformation(plan.num_steps)
    model, frozen = lora.adapted(plain, plan.lora), None
    if plan.lora.rank:
        assert init_from is not None
        frozen = _parameters_from(init_from, plan.model, tokenizer, steps.abstract_params(plain, mesh))
    trained = {"trained": lora.adapters_of} if plan.lora.rank else {}
    state, shardings = steps.init_state(model, optimizer, mesh, plan.seed, **trained)
    feed = Feed(stream, mesh, sample_forced_tokens=plan.batching.sample_forced_tokens, seed=plan.seed)
    with ckpt.manager(out) as checkpoints, Preemption() as preemption:
        resumed = ckpt.resume(checkpoints, state)
        if resumed is not None:
            state = resumed
        elif init_from is not None and frozen is None:
            state = dataclasses.replace(state, params=_parameters_from(init_from, plan.model, tokenizer, state.params))
        step, since_best = int(state.step), int(state.since_best)
        log.resume(step)
        jitted = steps.make_train_step(
            model, plan.loss, optimizer, plan.seed, mesh, shardings, plan.batching.micro_batches,
            None if frozen is None else jax.tree.map(lambda x: x.sharding, frozen),
        )  # fmt: skip
        rest = () if frozen is None else (frozen,)
        train_step = memory.compiled_within_memory(jitted, state, feed.shapes(), *rest)
        validate = Validation(model, plan.loss, mesh, valid_examples, plan.batching)
        log.start(step, state.params, frozen, stream.examples, stream, plan.batching)
        log.memory(memory.memory_plan(train_step, state, shardings, jax.local_devices()[0]))
        with contextlib.closing(feed.batches(step, plan.num_steps)) as batches:
            while step < plan.num_steps and not plan.stops(since_best):
                profile.before(step, state.step)
                state, metrics = train_step(state, next(batches), *rest)
                step += 1
                log.step(step, metrics)
                if log.skipped >= plan.max_skipped:
                    raise _not_finite(out, step, log.skipped, feed)
                stopping = preemption.reached(step)
                if plan.validation_due(step):
                    with log.aside():
                        values = validate(lora.join(frozen, state.params))
                        state = _watch(state, values["loss_next_item"])
                        since_best = int(state.since_best)
                        log.validation(step, values, best=since_best == 0)
                        ckpt.save(checkpoints, step, state, values["loss_next_item"])
                elif stopping or (plan.checkpoint_every and step % plan.checkpoint_every == 0):
                    with log.aside():
                        ckpt.save(checkpoints, step, state, None)
                if stopping:
                    with artifacts.disk_errors(out):
                        checkpoints.wait_until_finished()
                    preemption.stop(out, step)
        if step < plan.num_steps:
            print(f"train: no better validation loss in {plan.patience} validations, stopped at step {step}")
        with artifacts.disk_errors(out):
            checkpoints.wait_until_finished()
        return {"best_validation_loss": float(state.best_loss), "best_step": checkpoints.best_step(), "last_step": step}


def _not_finite(out: Path, step: int, skipped: int, feed: Feed) -> CalrecError:
    """The error of a run that cannot go on; the batch at hand is kept for inspection."""
    path = out / f"not_finite_step_{step}_process_{jax.process_index()}.npz"
    with artifacts.disk_errors(out), artifacts.atomic_file(path) as temporary, Path(temporary).open("wb") as file:
        np.savez(file, allow_pickle=False, **feed.host_rows())
    return CalrecError(
        f"{out}: no finite loss or gradient in the last {skipped} steps (train.max_skipped); the batch of step {step} "
        f"is in {path.name}. Lower OptimizerConfig.learning_rate, delete the folder and train again"
    )


def _watch(state: steps.TrainState, loss: float) -> steps.TrainState:
    """The state after a validation: the best loss so far, and how many validations ago it was."""
    better = np.float32(loss) < float(state.best_loss)
    best = np.float32(loss) if better else np.float32(state.best_loss)
    since = np.int32(0 if better else int(state.since_best) + 1)
    return dataclasses.replace(
        state,
        best_loss=place(best, state.best_loss.sharding),
        since_best=place(since, state.since_best.sharding),
    )


def _inputs(datasets: Sequence[Dataset], tokenizer: Tokenizer, init_from: Path | None) -> dict[str, str]:
    """Hashes of what the stage is made from."""
    if not datasets:
        raise CalrecError("train: no dataset given; name at least one category")
    templates = {d.template for d in datasets}
    if len(templates) > 1:
        names = ", ".join(f"{d.name} ({d.template[:8]})" for d in datasets)
        raise CalrecError(f"train: datasets of different templates: {names}; prepare them again with one template")
    made_from = {"tokenizer": tokenizer.fingerprint, "template": templates.pop()}
    made_from |= {f"dataset/{d.name}": d.hash for d in datasets}
    if init_from is not None:
        made_from["checkpoint"] = artifacts.read_manifest(Path(init_from), kind="checkpoint")["hash"]
    return made_from


def _claim(
    out: Path,
    plan: _Plan,
    made_from: dict[str, str],
    examples: ExampleSet,
    tokenizer: Tokenizer,
    datasets: Sequence[Dataset],
    base: dict[str, Any],
) -> None:
    """Writes the stage's facts, or refuses a half-trained folder that was begun with other settings or inputs."""
    settings = plan.settings()
    facts = {
        "made_from": made_from,
        "settings": settings,
        "tokenizer": tokenizer.fingerprint,
        "template": datasets[0].template,
        "datasets": [d.hash for d in datasets],
        "vocab_size": tokenizer.vocab_size,
        "max_history_tokens": plan.batching.max_history_tokens,
        "max_target_tokens": plan.batching.max_target_tokens,
        "row_tokens": plan.batching.row_tokens,
        "examples": examples.fingerprint(),
    } | base
    if (out / ckpt.FACTS_FILE).exists():
        old = ckpt.read_facts(out)[1]
        differences = artifacts.request_differences(old["made_from"], old["settings"], made_from, settings)
        if differences or old["examples"] != facts["examples"]:
            raise CalrecError(
                f"{out}: holds a stage begun otherwise ({'; '.join(differences) or 'other examples'}); "
                "go back to those settings to resume it, delete the folder to train again, or choose another --run_dir"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    ckpt.write_facts(out, plan.model, facts)


def _base_facts(out: Path, init_from: Path | None, config: LoraConfig) -> dict[str, Any]:
    """What a stage keeps of the one it starts from: what was imported, and what its adapters belong to."""
    if init_from is None:
        return {}
    origin = ckpt.read_facts(init_from)[1].get("origin")
    facts: dict[str, Any] = {} if origin is None else {"origin": origin}
    if config.rank:
        manifest = artifacts.read_manifest(init_from, kind="checkpoint")
        path = os.path.relpath(Path(init_from).absolute(), Path(out).absolute())
        facts |= config.settings() | {"base": {"path": path, "hash": manifest["hash"]}}
    return facts


def _parameters_from(stage: Path, config: TransformerConfig, tokenizer: Tokenizer, like: Any) -> Any:
    """Another stage's best parameters in the layout of `like`."""
    other, facts = ckpt.read_facts(stage)
    if facts["tokenizer"] != tokenizer.fingerprint:
        raise CalrecError(f"{stage}: was trained with another tokenizer; use that one, or train the stage again")
    if other.settings() != config.settings():
        differences = artifacts.request_differences({}, other.settings(), {}, config.settings())
        written = stage / "model.gin"
        way_out = f"include {written}" if written.exists() else "use the same TransformerConfig"
        raise CalrecError(f"{stage}: has another model ({'; '.join(differences)}); {way_out}")
    return ckpt.load_checkpoint(stage, like=like)[1]
