"""Loops compiled by numba, kept on disk between runs where that is possible."""

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Any:
    """Compiles a loop over arrays at its first call; without a folder to write to, each process compiles it anew.

    Other threads run meanwhile, so the arrays that it writes to must be its caller's own.
    """
    try:
        return numba.njit(function, cache=True, nogil=True)
    except (
        RuntimeError
    ):  # a read-only installation and no cache folder of the user's: numba finds no place for its cache
        return numba.njit(function, nogil=True)
