"""Loops compiled by numba: with a place for the cache, and in an installation that has none."""

import os
import pathlib
import shutil
import subprocess
import sys

import numba
import numpy as np

import calrec_jax
from calrec_jax import compiled as room

PACKAGE = pathlib.Path(calrec_jax.__file__).parent
PACKS_ROWS = """
import numpy as np
from calrec_jax.data.packing import best_fit_decreasing
from calrec_jax.decode import prompts
assert best_fit_decreasing(np.array([3, 5, 4]), 8, 4).tolist() == [0, 0, 1]
print(prompts.__file__)
"""


def test_loops_compile_without_a_place_for_the_cache(monkeypatch):
    plain = numba.njit

    def no_place(function, *, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return plain(function, **options)

    monkeypatch.setattr(room.numba, "njit", no_place)

    def double(values):
        for place in range(len(values)):
            values[place] *= 2

    values = np.arange(3.0)
    room.compiled(double)(values)
    assert values.tolist() == [0.0, 2.0, 4.0]


def test_every_loop_is_compiled_by_the_one_helper():
    direct = [path.name for path in PACKAGE.rglob("*.py") if "import numba" in path.read_text(encoding="utf-8")]
    assert direct == ["compiled.py"]


def test_an_installation_that_cannot_be_written_to_packs_rows(tmp_path):
    """No folder of numba's locators can be made: a file stands where each would be."""
    shutil.copytree(PACKAGE, tmp_path / "calrec_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in [path for path in (tmp_path / "calrec_jax").rglob("*") if path.is_dir()]:
        (folder / "__pycache__").touch()
    (tmp_path / "home").touch()
    environment = {
        **{name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"},
        "HOME": str(tmp_path / "home"),
        "XDG_CACHE_HOME": str(tmp_path / "home"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PACKS_ROWS], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str(tmp_path / "calrec_jax" / "decode" / "prompts.py")
