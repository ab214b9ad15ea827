"""How long each step of a run took: `timing.json`, added up over resumed runs, and the summary at a run's end."""

from __future__ import annotations

import contextlib
import gc
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from calrec_jax import artifacts, hosts
from calrec_jax.errors import CalrecError
from calrec_jax.layout import RunLayout

_COMPUTING = ("train", "decode")


@contextlib.contextmanager
def step(layout: RunLayout, name: str, out: pathlib.Path) -> Iterator[None]:
    """Says what is done and where, and adds the seconds to `timing.json`, also when the step is interrupted.

    Args:
      layout: of the run folder.
      name: of the step, as `timing.json` has it.
      out: the artefact's folder.

    Raises:
      CalrecError: gin leaves a setting of the step unset that has no default.
    """
    was_complete = (out / artifacts.MANIFEST).exists()
    print(f"calrec: {name} → {out}" + (" (checking what is there)" if was_complete else ""), flush=True)
    start = time.monotonic()
    try:
        yield
    except KeyboardInterrupt:
        add_seconds(layout, name, time.monotonic() - start, _devices(name))
        raise
    except RuntimeError as error:
        if "Required bindings" not in str(error):  # gin's words
            raise
        raise CalrecError(f"the gin files leave a setting unset that has no default: {error}") from error
    seconds = time.monotonic() - start
    devices = _devices(name)
    _free_programs()
    if not was_complete:
        add_seconds(layout, name, seconds, devices)
    print(f"calrec: {name} " + ("was done already, skipped" if was_complete else f"took {seconds:.1f} s"), flush=True)


def add_seconds(layout: RunLayout, name: str, seconds: float, devices: tuple[str, int] | None = None) -> None:
    """Adds to what a step took, on the first of several hosts.

    Args:
      layout: of the run folder.
      name: of the step.
      seconds: by the clock.
      devices: (platform, how many) that computed for it, which gives its device-seconds.
    """
    if not hosts.is_first():
        return
    steps = {step["step"]: step for step in _read_steps(layout)}
    own = steps.setdefault(name, {"step": name, "seconds": 0.0})
    if devices is not None:
        before = own.get("device_seconds", 0.0)
        own |= {"device": devices[0], "device_seconds": round(before + seconds * devices[1], 3)}
    own["seconds"] = round(own["seconds"] + seconds, 3)
    total = round(sum(step["seconds"] for step in steps.values()), 3)
    artifacts.write_json(layout.timing, {"steps": list(steps.values()), "seconds": total})


def _devices(step: str) -> tuple[str, int] | None:
    """Platform and number of JAX's devices, for the steps that compute on them."""
    if step.split()[0] not in _COMPUTING or "jax" not in sys.modules:
        return None
    devices = sys.modules["jax"].devices()
    return devices[0].platform, len(devices)


def _free_programs() -> None:
    """Drops the step's compiled programs: those of all steps together would take half of a small machine's memory."""
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()


def _read_steps(layout: RunLayout) -> list[dict[str, Any]]:
    """What `timing.json` says of each step so far, in the order in which the steps were first run."""
    return artifacts.read_json(layout.timing)["steps"] if layout.timing.exists() else []


def _read_seconds(layout: RunLayout) -> dict[str, float]:
    """Seconds of each step so far, in the order in which the steps were first run."""
    return {step["step"]: step["seconds"] for step in _read_steps(layout)}


def print_summary(layout: RunLayout, split: str) -> None:
    """Prints the paths of what the run made and the seconds of each step; the table is `evaluate`'s."""
    made = [layout.root / "datasets", layout.tokenizer, layout.stage("stage1"), layout.stage("stage2")]
    made += [layout.root / "completions", layout.root / "rankings", layout.report(split) / "report.html"]
    print("Made:", *(f"  {path}" for path in made if path.exists()), sep="\n")
    timing = _read_seconds(layout)
    print("Seconds:", *(f"  {seconds:9.1f}  {name}" for name, seconds in timing.items()), sep="\n")
    print(f"  {sum(timing.values()):9.1f}  in all", flush=True)
