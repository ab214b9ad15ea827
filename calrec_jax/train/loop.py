"""The verb `train`: one stage, from scratch, from another stage's parameters, or from its own last checkpoint.

Order of precedence at start: 1. done already: skip; 2. a checkpoint of this stage: resume from it, exactly;
3. `init_from`: parameters only, fresh optimiser and step (stage II); 4. scratch. The data position is the step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gin
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from calrec_jax import artifacts
from calrec_jax.data.dataset import Dataset
from calrec_jax.data.examples import ExampleSet, build_examples, tokenise_catalogue
from calrec_jax.data.packing import PackedStream, Packing, evaluation_batches
from calrec_jax.errors import CalrecError
from calrec_jax.losses import LossConfig
from calrec_jax.models.transformer import Transformer, TransformerConfig
from calrec_jax.tokenizer import Tokenizer
from calrec_jax.train import checkpoints as ckpt
from calrec_jax.train import step as steps
from calrec_jax.train.optimizer import OptimizerConfig
from calrec_jax.train.progress import TrainingLog


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Batching:
    """Rows and what they hold; see docs/architecture.md, "Examples and batches".

    Attributes:
      batch_rows: B, over all devices and hosts.
      row_tokens: L.
      row_examples: K.
      max_history_tokens: prompt budget; the oldest items go first.
      max_target_tokens: an item's tokens, EOS included.
      next_item_loss: "last" (the paper) or "all".
      forced_token_weight: loss weight of item tokens without an alternative in the catalogue; 1 is the paper's.
      sample_forced_tokens: in training, give forced tokens weight 1 with that probability in place of that weight: the
        same expected loss, and the vocabulary is skipped for the rest.
      split_long_histories: long training sequences become several examples rather than lose their oldest items.
      mixture_exponent: a category's rate is users^exponent.
      window: examples that are packed together.
    """

    batch_rows: int = 32
    row_tokens: int = 1280
    row_examples: int = 8
    max_history_tokens: int = 1024
    max_target_tokens: int = 128
    next_item_loss: str = "last"
    forced_token_weight: float = 1.0
    sample_forced_tokens: bool = False
    split_long_histories: bool = False
    mixture_exponent: float = 0.3
    window: int = 1024

    def __post_init__(self):
        if self.mixture_exponent < 0:
            raise CalrecError(f"Batching.mixture_exponent={self.mixture_exponent}: must be at least 0")

    def packing(self, next_item_loss: str | None = None) -> Packing:
        """The shapes alone."""
        return Packing(
            self.row_tokens, self.row_examples, self.batch_rows, next_item_loss or self.next_item_loss, self.window
        )

    def examples(self, datasets: Sequence[Dataset], tokenizer: Tokenizer, split: str) -> ExampleSet:
        """Examples of a split under these budgets."""
        catalogue = tokenise_catalogue(
            datasets,
            tokenizer,
            max_target_tokens=self.max_target_tokens,
            forced_token_weight=self.forced_token_weight,
        )
        return build_examples(
            datasets,
            catalogue,
            split=split,
            max_history_tokens=self.max_history_tokens,
            row_tokens=self.row_tokens,
            split_long_histories=self.split_long_histories,
        )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What decides a stage's outcome beside its inputs; the arguments are `train`'s."""

    num_steps: int
    eval_every: int
    eval_users: int
    patience: int
    checkpoint_every: int
    seed: int
    model: TransformerConfig = dataclasses.field(default_factory=TransformerConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    batching: Batching = dataclasses.field(default_factory=Batching)

    def __post_init__(self):
        for name in ("num_steps", "eval_every", "eval_users", "patience", "checkpoint_every", "seed"):
            value, least = getattr(self, name), 1 if name == "num_steps" else 0
            if not isinstance(value, int) or value < least:
                raise CalrecError(f"train.{name}={value!r}: must be a whole number of at least {least}")

    def settings(self) -> dict[str, Any]:
        """As the manifest keeps them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def stops(self, state: steps.TrainState) -> bool:
        """Whether patience has run out."""
        return bool(self.patience) and int(state.since_best) >= self.patience

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
    log_every: int = 20,
    seed: int = 0,
    mesh_shape: Sequence[int] | None = None,
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
      log_every: steps between progress lines and log rows.
      seed: of initialisation, data order and dropout.
      mesh_shape: (replica, data, fsdp, model); None puts all devices on data.

    Returns:
      `out`.

    Raises:
      CalrecError: bad settings, inputs that do not belong together, or a loss that is not finite.
    """
    out = Path(out)
    if jax.process_count() > 1:
        raise CalrecError(f"train: {jax.process_count()} JAX processes; training over several hosts is not built yet")
    if log_every < 1:
        raise CalrecError(f"train.log_every={log_every!r}: must be a whole number of at least 1")
    plan = _Plan(
        num_steps=num_steps,
        eval_every=eval_every,
        eval_users=eval_users,
        patience=patience,
        checkpoint_every=checkpoint_every,
        seed=seed,
    )
    made_from = _inputs(datasets, tokenizer, init_from)
    if artifacts.is_done(out, kind="checkpoint", made_from=made_from, settings=plan.settings()):
        print(f"train: {out} is done already, skipped")
        return out
    mesh, batching = steps.make_mesh(mesh_shape), plan.batching
    train_examples = batching.examples(datasets, tokenizer, "train")
    valid_examples = _sample(batching.examples(datasets, tokenizer, "validation"), eval_users, seed)
    stream = PackedStream(train_examples, batching.packing(), seed=seed, mixture_exponent=batching.mixture_exponent)
    shards = steps.row_shards(mesh)
    if batching.batch_rows % shards:
        raise CalrecError(
            f"Batching.batch_rows={batching.batch_rows}: must divide by the mesh's {shards} parts of rows"
        )
    _claim(out, plan, made_from, train_examples, tokenizer, datasets)
    with TrainingLog(out, num_steps, log_every) as log:
        facts = _fit(out, plan, mesh, stream, valid_examples, tokenizer, init_from, log)
    artifacts.write_manifest(out, kind="checkpoint", made_from=made_from, settings=plan.settings(), **facts)
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
) -> dict[str, Any]:
    """Trains from where the stage stands to its end; returns the manifest's facts."""
    model, optimizer = Transformer(plan.model, tokenizer.vocab_size), plan.optimizer.transformation(plan.num_steps)
    state, shardings = steps.init_state(model, optimizer, mesh, plan.seed)
    with ckpt.manager(out) as checkpoints:
        resumed = ckpt.resume(checkpoints, state)
        if resumed is not None:
            state = resumed
        elif init_from is not None:
            state = dataclasses.replace(state, params=_parameters_from(init_from, plan.model, tokenizer, state.params))
        step = int(state.step)
        log.resume(step)
        train_step = steps.make_train_step(model, plan.loss, optimizer, plan.seed, mesh, shardings)
        validate = _Validation(model, plan.loss, mesh, valid_examples, plan.batching)
        log.start(step, state.params, stream.examples, stream, plan.batching)
        while step < plan.num_steps and not plan.stops(state):
            batch = training_batch(stream, step, plan.batching, plan.seed)
            state, metrics = train_step(state, jax.device_put(batch, steps.batch_sharding(mesh)))
            step += 1
            log.step(step, batch, metrics)
            if plan.validation_due(step):
                with log.aside():
                    values = validate(state.params)
                    state = _watch(state, values["loss_next_item"])
                    log.validation(step, values, best=int(state.since_best) == 0)
                    ckpt.save(checkpoints, step, state, values["loss_next_item"])
            elif plan.checkpoint_every and step % plan.checkpoint_every == 0:
                with log.aside():
                    ckpt.save(checkpoints, step, state, None)
        if step < plan.num_steps:
            print(f"train: no better validation loss in {plan.patience} validations, stopped at step {step}")
        with artifacts.disk_errors(out):
            checkpoints.wait_until_finished()
        return {"best_validation_loss": float(state.best_loss), "best_step": checkpoints.best_step(), "last_step": step}


def _watch(state: steps.TrainState, loss: float) -> steps.TrainState:
    """The state after a validation: the best loss so far, and how many validations ago it was."""
    better = np.float32(loss) < float(state.best_loss)
    best = np.float32(loss) if better else np.float32(state.best_loss)
    since = np.int32(0 if better else int(state.since_best) + 1)
    return dataclasses.replace(
        state,
        best_loss=jax.device_put(best, state.best_loss.sharding),
        since_best=jax.device_put(since, state.since_best.sharding),
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
    }
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


def _parameters_from(stage: Path, config: TransformerConfig, tokenizer: Tokenizer, like: Any) -> Any:
    """Another stage's best parameters in the layout of `like`."""
    other, params, facts = ckpt.load_checkpoint(stage)
    if facts["tokenizer"] != tokenizer.fingerprint:
        raise CalrecError(f"{stage}: was trained with another tokenizer; use that one, or train the stage again")
    if other.settings() != config.settings():
        differences = artifacts.request_differences({}, other.settings(), {}, config.settings())
        raise CalrecError(f"{stage}: has another model ({'; '.join(differences)}); use the same TransformerConfig")
    return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, like)


def _sample(examples: ExampleSet, users: int, seed: int) -> ExampleSet:
    """A seeded sample of examples, in their order."""
    if not users or len(examples) <= users:
        return examples
    keep = np.sort(
        np.random.Generator(np.random.Philox(key=[seed, 1 << 40])).choice(len(examples), users, replace=False)
    )
    fields = ("start", "end", "user", "group", "joint_lengths", "alone_lengths")
    return dataclasses.replace(examples, **{name: getattr(examples, name)[keep] for name in fields})


def training_batch(stream: PackedStream, step: int, batching: Batching, seed: int) -> dict[str, np.ndarray]:
    """Batch `step` of the stream; forced tokens sampled when asked (a function of seed and step alone)."""
    batch = stream.batch(step)
    if batching.sample_forced_tokens:
        weights = batch["decoder_loss_weights"]
        draw = np.random.Generator(np.random.Philox(key=[seed, (1 << 41) + step])).random(weights.shape, np.float32)
        batch["decoder_loss_weights"] = (draw < weights).astype(np.float32)
    return batch


class _Validation:
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
        sums: dict[str, Any] = {}
        for batch in evaluation_batches(self._examples, self._packing):
            metrics = self._step(params, jax.device_put(batch, self._sharding))
            sums = metrics if not sums else jax.tree.map(jnp.add, sums, metrics)
        return steps.averages({name: float(value) for name, value in jax.device_get(sums).items()})
