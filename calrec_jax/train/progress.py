"""What a person sees of training: a progress line, `metrics.jsonl`, and TensorBoard without TensorFlow."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorboardX

from calrec_jax.errors import CalrecError
from calrec_jax.train.step import averages

MAX_SKIPPED = 100  # steps in a row without a finite loss before the run stops


class TrainingLog:
    """Collects metrics on the device and reports them every `log_every` steps.

    Args:
      out: the stage's folder.
      num_steps: where the stage ends.
      log_every: steps between rows.
    """

    def __init__(self, out: Path, num_steps: int, log_every: int):
        self._out, self._num_steps, self._log_every = out, num_steps, max(1, log_every)
        self._path = out / "metrics.jsonl"
        self._sums: dict[str, jax.Array] | None = None
        self._real = self._places = 0
        self._began = self._window_began = time.monotonic()
        self._seconds_before = 0.0
        self._tokens = 0
        self._skipped = 0
        self._best, self._since_best = math.inf, 0
        self._rate: float | None = None

    def __enter__(self) -> TrainingLog:
        self._file = self._path.open("a", encoding="utf-8")
        self._board = tensorboardX.SummaryWriter(str(self._out / "tensorboard"))
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()
        self._board.close()

    def resume(self, step: int) -> None:
        """Keeps the rows up to `step`, drops later ones (their steps run again), and restores the running best."""
        rows = [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        rows = [row for row in rows if row["step"] <= step]
        self._file.close()
        self._path.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows), encoding="utf-8")
        self._file = self._path.open("a", encoding="utf-8")
        for row in rows:
            if row["split"] == "validation":
                self._track(row["loss_next_item"])
        train = [row for row in rows if row["split"] == "train"]
        if train:
            self._seconds_before, self._tokens = train[-1]["seconds"], train[-1]["tokens"]
        print(f"train: resuming {self._out} at step {step}")

    def start(self, step: int, params: Any, examples: Any, stream: Any, batching: Any) -> None:
        """Says what is about to run."""
        count = sum(x.size for x in jax.tree.leaves(params))
        print(
            f"train: {self._out.name}: {count / 1e6:.2f} M parameters on {jax.device_count()} "
            f"{jax.devices()[0].platform} device(s), {len(examples):,} examples of {examples.lengths.mean():.0f} "
            f"tokens, steps {step} to {self._num_steps} of {batching.batch_rows} rows of {batching.row_tokens} tokens"
        )
        if len(stream.rates) > 1:
            print("train: share of each category: " + ", ".join(f"{rate:.3f}" for rate in stream.rates))
        if examples.dropped_items:
            print(f"train: {examples.dropped_items:,} oldest history items lie beyond max_history_tokens")
        if examples.catalogue.cut:
            print(
                f"train: {examples.catalogue.cut:,} item texts are cut to "
                f"max_target_tokens={batching.max_target_tokens}"
            )
        self._began = self._window_began = time.monotonic()

    def step(self, step: int, batch: dict[str, np.ndarray], metrics: dict[str, jax.Array]) -> None:
        """Adds a step's metrics (still on the device) and reports when due."""
        self._sums = metrics if self._sums is None else jax.tree.map(lambda a, b: a + b, self._sums, metrics)
        self._real += int(np.count_nonzero(batch["decoder_segment_ids"]))
        self._places += batch["decoder_segment_ids"].size
        if step % self._log_every and step != self._num_steps:
            return
        sums = {k: float(v) for k, v in jax.device_get(self._sums).items()}
        now = time.monotonic()
        seconds = now - self._window_began
        self._tokens += self._real
        values = averages(sums)
        row = values | {
            "tokens_per_second": self._real / max(seconds, 1e-9),
            "real_token_share": self._real / self._places,
            "seconds": self._seconds_before + now - self._began,
            "tokens": self._tokens,
        }
        self._skipped = self._skipped + int(sums["skipped"]) if sums["skipped"] >= sums["skipped_weight"] else 0
        self._write(step, "train", row)
        self._print(step, row, seconds)
        self._sums, self._real, self._places, self._window_began = None, 0, 0, time.monotonic()
        if self._skipped >= MAX_SKIPPED:
            raise CalrecError(
                f"{self._out}: no finite loss in the last {self._skipped} steps; lower OptimizerConfig.learning_rate, "
                "delete the folder and train again"
            )

    def validation(self, step: int, values: dict[str, float]) -> None:
        """Reports a validation."""
        if not math.isfinite(values["loss_next_item"]):
            raise CalrecError(
                f"{self._out}: validation loss is not finite at step {step}; lower OptimizerConfig.learning_rate"
            )
        self._track(values["loss_next_item"])
        self._write(step, "validation", values)
        mark = " (best)" if self._since_best == 0 else ""
        print(f"train: step {step} validation next-item loss {values['loss_next_item']:.4f}{mark}", flush=True)
        self._window_began = time.monotonic()

    def _track(self, loss: float) -> None:
        self._since_best = 0 if loss < self._best else self._since_best + 1
        self._best = min(self._best, loss)

    def validations_since_best(self) -> int:
        """How many validations have passed without a new best."""
        return self._since_best

    def summary(self) -> dict[str, float]:
        """Facts for the manifest."""
        return {"best_validation_loss": self._best, "tokens": self._tokens}

    def _write(self, step: int, split: str, values: dict[str, float]) -> None:
        row = {"step": step, "split": split} | values
        self._file.write(json.dumps(row, sort_keys=True) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{split}/{name}", value, step)

    def _print(self, step: int, row: dict[str, float], seconds: float) -> None:
        per_step = seconds / self._log_every
        self._rate = per_step if self._rate is None else 0.7 * self._rate + 0.3 * per_step
        left = self._rate * (self._num_steps - step)
        print(
            f"train: step {step}/{self._num_steps} loss {row.get('loss', math.nan):.3f} "
            f"next-item {row.get('loss_next_item', math.nan):.3f} tt {row.get('loss_target_target', math.nan):.3f} "
            f"ut {row.get('loss_user_target', math.nan):.3f} "
            f"{row['tokens_per_second']:,.0f} tokens/s ({100 * row['real_token_share']:.0f} % real) "
            f"{int(left // 60)}:{int(left % 60):02d} left",
            flush=True,
            file=sys.stdout,
        )
