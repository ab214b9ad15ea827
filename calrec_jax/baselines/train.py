"""Trains SASRec on a dataset's training items, and reads back what it learnt.

Order of precedence at start: 1. done already: skip; 2. a checkpoint in the folder: resume from its epoch, exactly;
3. scratch. It sees the items before the validation target alone; the epoch with the best NDCG@10 on the validation
targets is kept.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import flax.struct
import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax

from calrec_jax import artifacts, hosts
from calrec_jax.baselines.sasrec import SASRec, SASRecConfig, cross_entropy
from calrec_jax.baselines.sequences import Batch, Sequences
from calrec_jax.data.dataset import Dataset
from calrec_jax.errors import CalrecError
from calrec_jax.evaluate.metrics import metric_names, per_user_metrics, target_ranks
from calrec_jax.rank.histories import Histories
from calrec_jax.train import checkpoints as ckpt

KIND = "baseline"
WATCHED = "ndcg@10"
_FACTS_FILE = "model.json"
_LOG_FILE = "metrics.jsonl"
_SCORES_A_BLOCK = 2**24
_PREDICTED_ROWS = 32


@flax.struct.dataclass
class SASRecState:
    """What a checkpoint holds.

    Attributes:
      step: scalar int32.
      epoch: scalar int32, finished epochs; the data position.
      params: parameters.
      opt_state: the optimiser's.
      best: scalar float32, highest validation NDCG@10 so far.
      since_best: scalar int32, epochs since then.
    """

    step: jax.Array
    epoch: jax.Array
    params: Any
    opt_state: Any
    best: jax.Array
    since_best: jax.Array


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What decides the outcome beside the dataset; the arguments are `train_sasrec`'s."""

    num_epochs: int
    patience: int
    batch_rows: int
    row_items: int
    learning_rate: float
    weight_decay: float
    seed: int
    model: SASRecConfig = dataclasses.field(default_factory=SASRecConfig)

    def __post_init__(self) -> None:
        for name, least in (("num_epochs", 1), ("patience", 0), ("batch_rows", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise CalrecError(f"sasrec.{name}={value!r}: must be a whole number of at least {least}")
        if not isinstance(self.row_items, int) or self.row_items < self.model.max_items:
            raise CalrecError(
                f"sasrec.row_items={self.row_items!r}: must be at least SASRecConfig.max_items={self.model.max_items}"
            )
        if not self.learning_rate > 0 or not self.weight_decay >= 0:
            raise CalrecError(
                f"sasrec.learning_rate={self.learning_rate} and weight_decay={self.weight_decay}: must be above 0, "
                "and at least 0"
            )

    def settings(self) -> dict[str, Any]:
        """As the manifest keeps them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def stops(self, state: SASRecState) -> bool:
        """Whether patience has run out."""
        return bool(self.patience) and int(state.since_best) >= self.patience

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW at a constant rate; norms and biases are not decayed."""
        return optax.adamw(self.learning_rate, weight_decay=self.weight_decay, mask=_decayed)


def _decayed(params: Any) -> Any:
    return jax.tree_util.tree_map(lambda value: value.ndim > 1, params)


@gin.configurable("sasrec", denylist=["out", "dataset"])
def train_sasrec(
    out: Path,
    dataset: Dataset,
    *,
    num_epochs: int = 100,
    patience: int = 5,
    batch_rows: int = 8,
    row_items: int = 64,
    learning_rate: float = 1e-3,
    weight_decay: float = 1.0,
    seed: int = 0,
) -> Path:
    """Trains SASRec into `out`. Resumes after the last epoch; skips when that is done.

    Args:
      out: the baseline's folder: `model.json`, `checkpoints/`, `metrics.jsonl`, `manifest.json`.
      dataset: whose items before the validation targets are learnt.
      num_epochs: at most.
      patience: epochs without a better validation NDCG@10 before training ends; 0 is never.
      batch_rows: B.
      row_items: L; a row holds the sequences of several users.
      learning_rate: of AdamW, constant.
      weight_decay: decoupled, of matrices.
      seed: of initialisation, data order and dropout.

    Returns:
      `out`.

    Raises:
      CalrecError: bad settings, a loss that is not finite, or a folder that was begun otherwise.
    """
    out = Path(out)
    plan = _Plan(num_epochs, patience, batch_rows, row_items, learning_rate, weight_decay, seed)
    made_from = {"dataset": dataset.hash}
    if artifacts.is_done(out, kind=KIND, made_from=made_from, settings=plan.settings()):
        print(f"sasrec: {out} is done already, skipped")
        return out
    _claim(out, plan, made_from, dataset)
    facts = _fit(out, plan, dataset)
    artifacts.write_manifest(out, kind=KIND, made_from=made_from, settings=plan.settings(), **facts)
    return out


def _claim(out: Path, plan: _Plan, made_from: dict[str, str], dataset: Dataset) -> None:
    """Writes what is trained here, or refuses a half-trained folder that was begun otherwise."""
    path = out / _FACTS_FILE
    if path.exists():
        old = artifacts.read_json(path)
        differences = artifacts.request_differences(old["made_from"], old["settings"], made_from, plan.settings())
        if differences:
            raise CalrecError(
                f"{out}: holds a baseline begun otherwise ({'; '.join(differences)}); go back to those settings to "
                "resume it, delete the folder to train again, or choose another --run_dir"
            )
        return
    facts = {"made_from": made_from, "settings": plan.settings(), "num_items": len(dataset.item_ids)}
    artifacts.write_json(path, facts)


def _fit(out: Path, plan: _Plan, dataset: Dataset) -> dict[str, Any]:
    """Trains from where the folder stands to the end; returns the manifest's facts."""
    model, optimizer = SASRec(plan.model, len(dataset.item_ids)), plan.optimizer()
    validation = Histories(dataset, "validation")  # its histories are the items that training may see
    sequences = Sequences(dataset.items, dataset.offsets[:-1], validation.lengths)
    if not (sequences.lengths > 1).any():
        raise CalrecError(f"{dataset.name}: no user has two items to train SASRec on; take it out of run.baselines")
    train_step = make_train_step(model, optimizer, plan.seed)
    log = _Log(out)
    with ckpt.manager(out, alone=True) as checkpoints:
        fresh = init_state(model, optimizer, plan.seed)
        state = ckpt.resume(checkpoints, fresh, alone=True) or fresh
        log.resume(int(state.epoch))
        while int(state.epoch) < plan.num_epochs and not plan.stops(state):
            start = time.monotonic()
            epoch = sequences.cut(plan.model.max_items + 1).epoch(
                plan.seed, int(state.epoch), plan.row_items, plan.batch_rows
            )
            state, loss = _run_epoch(state, train_step, epoch, plan.batch_rows)
            trained = time.monotonic()
            hidden = last_hidden(model, state.params, sequences, plan.row_items)
            value = _validate(hidden, state.params, validation)
            state = _watch(state, value)
            log.epoch(state, loss, value, trained - start, time.monotonic() - trained)
            # Of one of several processes, orbax saves no arrays that lie on its own devices.
            saved = jax.device_get(state) if hosts.joined() else state
            ckpt.save(checkpoints, int(state.epoch), saved, -value)  # the manager's best is the least
        with artifacts.disk_errors(out):
            checkpoints.wait_until_finished()
        best = checkpoints.best_step()
    return {"best_epoch": best, "last_epoch": int(state.epoch), f"validation_{WATCHED}": float(state.best)}


def init_state(model: SASRec, optimizer: optax.GradientTransformation, seed: int) -> SASRecState:
    """A fresh state, a function of the seed alone."""

    def create(key: jax.Array) -> SASRecState:
        nothing = jnp.zeros((1, 1), jnp.int32)
        params = model.init(key, nothing, nothing, nothing)["params"]
        zero = jnp.zeros((), jnp.int32)
        return SASRecState(zero, zero, params, optimizer.init(params), jnp.full((), -1.0, jnp.float32), zero)

    return jax.jit(create)(jax.random.key(seed))


def make_train_step(
    model: SASRec, optimizer: optax.GradientTransformation, seed: int
) -> Callable[[SASRecState, Batch], tuple[SASRecState, jax.Array]]:
    """Builds the jitted `train_step(state, batch) -> (state, loss)`; the state is donated."""

    def loss_of(params: Any, batch: dict[str, jax.Array], step: jax.Array) -> jax.Array:
        rng = jax.random.fold_in(jax.random.key(seed, impl="rbg"), step)
        inputs = batch["items"], batch["segments"], batch["from_end"]
        hidden = model.apply({"params": params}, *inputs, deterministic=False, rngs={"dropout": rng})
        return cross_entropy(cast(jax.Array, hidden), params["embedding"], batch["targets"], batch["segments"])

    def train_step(state: SASRecState, batch: dict[str, jax.Array]) -> tuple[SASRecState, jax.Array]:
        loss, grads = jax.value_and_grad(loss_of)(state.params, batch, state.step)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state), loss

    return jax.jit(train_step, donate_argnums=0)


def _run_epoch(state: SASRecState, train_step: Callable, epoch: Batch, batch_rows: int) -> tuple[SASRecState, float]:
    """The state after an epoch's rows, and the mean loss of its batches."""
    losses = []
    for at in range(0, len(epoch["items"]), batch_rows):
        state, loss = train_step(state, {name: rows[at : at + batch_rows] for name, rows in epoch.items()})
        losses.append(loss)
    return dataclasses.replace(state, epoch=state.epoch + 1), float(np.mean(jax.device_get(losses)))


@functools.partial(jax.jit, static_argnums=0)
def _hidden(model: SASRec, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    return cast(jax.Array, model.apply({"params": params}, batch["items"], batch["segments"], batch["from_end"]))


def last_hidden(model: SASRec, params: Any, sequences: Sequences, row_items: int) -> np.ndarray:
    """The state [U, D] after each user's last item; 0 for a user without any.

    Args:
      model: the model.
      params: its parameters.
      sequences: of U users; the last `max_items` of each are read.
      row_items: L.
    """
    sequences = sequences.cut(model.config.max_items)
    batch = sequences.pack(np.arange(len(sequences.lengths)), row_items, _PREDICTED_ROWS, with_targets=False)
    found = np.zeros((len(sequences.lengths), model.config.width), np.float32)
    kept = []
    for at in range(0, len(batch["items"]), _PREDICTED_ROWS):
        part = {name: rows[at : at + _PREDICTED_ROWS] for name, rows in batch.items()}
        last = (part["segments"] > 0) & (part["from_end"] == 0)
        kept.append(np.asarray(_hidden(model, params, part))[last])
    found[sequences.lengths > 0] = np.concatenate(kept)  # rows are filled in the users' order
    return found


def _validate(hidden: np.ndarray, params: Any, histories: Histories) -> float:
    """NDCG@10 of the validation targets over the whole catalogue, the history left in, ties by mean rank."""
    embedding = np.asarray(params["embedding"])
    column = metric_names().index(WATCHED)
    block = max(1, _SCORES_A_BLOCK // len(embedding))
    total = 0.0
    for at in range(0, len(histories.users), block):
        users = histories.users[at : at + block]
        ranks = target_ranks(histories.targets[users], hidden[users] @ embedding.T)
        total += per_user_metrics(ranks, "mean_rank")[:, column].sum()
    return float(total / max(1, len(histories.users)))


def _watch(state: SASRecState, value: float) -> SASRecState:
    """The state after a validation: the best value so far, and how many epochs ago it was."""
    better = np.float32(value) > float(state.best)
    best = np.float32(value) if better else state.best
    since = np.int32(0) if better else state.since_best + 1
    return dataclasses.replace(state, best=jnp.asarray(best), since_best=jnp.asarray(since))


class _Log:
    """A line an epoch, printed, and the rows of `metrics.jsonl`."""

    def __init__(self, out: Path):
        self._out, self._rows = out, list[dict[str, Any]]()

    def resume(self, epoch: int) -> None:
        """Keeps the rows up to an epoch; later ones run again."""
        path = self._out / _LOG_FILE
        if epoch and path.exists():
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            self._rows = [row for row in rows if row["epoch"] <= epoch]
            print(f"sasrec: resuming {self._out} after epoch {epoch}")

    def epoch(self, state: SASRecState, loss: float, value: float, seconds: float, validation_seconds: float) -> None:
        """Reports an epoch."""
        epoch, step = int(state.epoch), int(state.step)
        if not math.isfinite(loss):
            raise CalrecError(f"{self._out}: the loss is not finite in epoch {epoch}; lower sasrec.learning_rate")
        row = {"step": step, "epoch": epoch}
        self._rows.append(row | {"split": "train", "loss": loss, "seconds": seconds})
        self._rows.append(row | {"split": "validation", WATCHED: value, "seconds": validation_seconds})
        with artifacts.atomic_file(self._out / _LOG_FILE) as temporary:
            temporary.write_text(
                "".join(json.dumps(row, sort_keys=True) + "\n" for row in self._rows), encoding="utf-8"
            )
        best = " (best)" if int(state.since_best) == 0 else ""
        print(
            f"sasrec: epoch {epoch} loss {loss:.4f}, validation NDCG@10 {value:.4f}{best}, "
            f"{seconds:.1f} + {validation_seconds:.1f} s",
            flush=True,
        )


def load_sasrec(folder: Path, dataset: Dataset, split: str) -> tuple[np.ndarray, np.ndarray]:
    """What a trained SASRec says of a split.

    Args:
      folder: as `train_sasrec` left it.
      dataset: it was trained on.
      split: "validation" or "test"; the latter's histories hold the validation item.

    Returns:
      [U, D] the states after each history (0 where it is empty), and [I, D] the embeddings.

    Raises:
      CalrecError: nothing complete is there, it is of another dataset, or it is damaged.
    """
    manifest = artifacts.read_manifest(folder, kind=KIND)
    if manifest["made_from"].get("dataset") != dataset.hash:
        raise CalrecError(f"{folder} was trained on another dataset than {dataset.name} as it is now; train it again")
    settings = manifest["settings"]
    config = SASRecConfig(**settings["model"])
    model = SASRec(config, len(dataset.item_ids))
    like = jax.eval_shape(lambda: init_state(model, optax.adamw(1.0, mask=_decayed), 0))
    with ckpt.manager(folder, read_only=True) as checkpoints:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like)
        params = ckpt.restore(checkpoints, manifest["best_epoch"], like).params
    histories = Histories(dataset, split)
    sequences = Sequences(dataset.items, dataset.offsets[:-1], histories.lengths)
    return last_hidden(model, params, sequences, settings["row_items"]), np.asarray(params["embedding"])
