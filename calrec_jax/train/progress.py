"""What a person sees of training: a progress line, `metrics.jsonl`, and TensorBoard without TensorFlow."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import jax
import tensorboardX

from calrec_jax import artifacts
from calrec_jax.errors import CalrecError
from calrec_jax.models.transformer import vocabulary_table
from calrec_jax.train.flops import CHIPS, weight_flops
from calrec_jax.train.memory import MemoryPlan
from calrec_jax.train.step import averages


class TrainingLog:
    """Collects metrics on the device and reports them every `log_every` steps.

    Args:
      out: the stage's folder.
      num_steps: where the stage ends.
      log_every: steps between rows.
      writes: False for all processes but one: they count and do not write or print.

    Attributes:
      skipped: steps in a row, up to the last row, without a finite loss and gradient.
    """

    def __init__(self, out: Path, num_steps: int, log_every: int, *, writes: bool = True):
        self._writes = writes
        self.skipped = 0
        self._out, self._num_steps, self._log_every = out, num_steps, log_every
        self._path = out / "metrics.jsonl"
        self._sums: dict[str, jax.Array] | None = None
        self._began = self._window_began = time.monotonic()
        self._seconds_before = 0.0
        self._tokens = 0
        self._rate: float | None = None
        self._parameters = self._embedding = 0
        self._steps = 0
        self._file: TextIO | None = None
        self._board: tensorboardX.SummaryWriter | None = None

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def resume(self, step: int) -> None:
        """Opens the log at a step: rows up to it are kept, later ones are dropped, since their steps run again."""
        if not self._writes:
            return
        rows = _rows(self._path, step)
        with artifacts.atomic_file(self._path) as temporary:
            temporary.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows), encoding="utf-8")
        self._file = self._path.open("a", encoding="utf-8")
        self._board = tensorboardX.SummaryWriter(str(self._out / "tensorboard"), purge_step=step + 1)
        train = [row for row in rows if row["split"] == "train"]
        if train:
            self._seconds_before, self._tokens = train[-1]["seconds"], train[-1]["tokens"]
        if step:
            print(f"train: resuming {self._out} at step {step}")

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Seconds in this block are not training's: they do not count in tokens a second."""
        jax.block_until_ready(self._sums)  # steps still under way belong to training
        begin = time.monotonic()
        yield
        self._window_began += time.monotonic() - begin

    def start(self, step: int, params: Any, frozen: Any, examples: Any, stream: Any, batching: Any) -> None:
        """Says what is about to run; `frozen` are the parameters that adapters stand beside, or None."""
        self._began = self._window_began = time.monotonic()
        count = sum(x.size for x in jax.tree.leaves(params))
        if frozen is None:  # with adapters a step's products are others, and no utilisation is reported
            # Reading a row of the embedding is no product; what the logits are products with may be another table.
            lookup = params["embedding"].size if "head" in params else 0
            self._parameters, self._embedding = count - lookup, vocabulary_table(params).size
        if not self._writes:
            return
        base = sum(x.size for x in jax.tree.leaves(frozen))
        of_base = f" beside {base / 1e6:.2f} M that stay" if base else ""
        print(
            f"train: {self._out.name}: {count / 1e6:.2f} M parameters{of_base} on {jax.device_count()} "
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

    def memory(self, plan: MemoryPlan) -> None:
        """Says what the compiled step will keep in memory."""
        if self._writes:
            print(f"train: memory: {plan}", flush=True)

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Adds a step's metrics (still on the device) and reports when due."""
        self._sums = metrics if self._sums is None else jax.tree.map(lambda a, b: a + b, self._sums, metrics)
        self._steps += 1
        if step % self._log_every and step != self._num_steps:
            return
        sums = {k: float(v) for k, v in jax.device_get(self._sums).items()}
        now = time.monotonic()
        seconds = now - self._window_began
        real = int(sums["real_token_share"])
        self._tokens += real
        row = averages(sums) | {
            "tokens_per_second": real / max(seconds, 1e-9),
            "seconds": self._seconds_before + now - self._began,
            "tokens": self._tokens,
        }
        row |= self._utilisation(real, sums["loss_next_item_weight"], seconds)
        self.skipped = self.skipped + int(sums["skipped"]) if sums["skipped"] >= sums["skipped_weight"] else 0
        if self._writes:
            self._write(step, "train", row)
            self._print(step, row, seconds / self._steps)
        self._sums, self._steps, self._window_began = None, 0, time.monotonic()

    def _utilisation(self, real: int, weighted: float, seconds: float) -> dict[str, float]:
        """Products with weights by what the chips could do, where they are known; real tokens alone count."""
        chip = CHIPS.get(jax.devices()[0].device_kind)
        if chip is None or not self._parameters:
            return {}
        done = weight_flops(self._parameters, self._embedding, real, weighted)
        return {"flops_utilisation": done / max(seconds, 1e-9) / (jax.device_count() * chip.peak_tflops * 1e12)}

    def validation(self, step: int, values: dict[str, float], best: bool) -> None:
        """Reports a validation."""
        loss = values["loss_next_item"]
        if not math.isfinite(loss):
            raise CalrecError(
                f"{self._out}: validation loss is not finite at step {step}; lower OptimizerConfig.learning_rate"
            )
        if not self._writes:
            return
        self._write(step, "validation", values)
        print(f"train: step {step} validation next-item loss {loss:.4f}{' (best)' if best else ''}", flush=True)

    def _write(self, step: int, split: str, values: dict[str, float]) -> None:
        row = {"step": step, "split": split} | values
        assert self._file is not None and self._board is not None, "resume comes first"
        with artifacts.disk_errors(self._out):
            self._file.write(json.dumps(row, sort_keys=True) + "\n")
            self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{split}/{name}", value, step)

    def _print(self, step: int, row: dict[str, float], per_step: float) -> None:
        self._rate = per_step if self._rate is None else 0.7 * self._rate + 0.3 * per_step
        left = self._rate * (self._num_steps - step)
        share = row.get("flops_utilisation")
        utilisation = "" if share is None else f"{100 * share:.1f} % of the chips' peak "
        print(
            f"train: step {step}/{self._num_steps} loss {row.get('loss', math.nan):.3f} "
            f"next-item {row.get('loss_next_item', math.nan):.3f} tt {row.get('loss_target_target', math.nan):.3f} "
            f"ut {row.get('loss_user_target', math.nan):.3f} "
            f"{row['tokens_per_second']:,.0f} tokens/s ({100 * row['real_token_share']:.0f} % real) "
            f"{utilisation}{int(left // 60)}:{int(left % 60):02d} left",
            flush=True,
            file=sys.stdout,
        )


def _rows(path: Path, step: int) -> list[dict[str, Any]]:
    """The whole rows of a log up to a step; a killed process may have left half a line."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("step", step + 1) <= step:
            rows.append(row)
    return rows
