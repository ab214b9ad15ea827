"""Loops compiled by numba, kept on disk between runs where that is possible."""

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., None]) -> Any:
    """Compiles a loop over arrays at its first call; without a folder to write to, each process compiles it anew."""
    try:
        return numba.njit(function, cache=True, nogil=True)
    except RuntimeError:  # a read-only installation and no home folder: numba finds no place for its cache
        return numba.njit(function, nogil=True)
