"""Functions as `jax.export` artefacts: served by JAX alone, on any of the platforms they were lowered for.

    import pathlib, jax, safetensors.numpy
    folder = pathlib.Path("runs/toys/exports/jax")
    params = safetensors.numpy.load_file(folder / "params.safetensors")
    user = jax.jit(jax.export.deserialize(bytearray((folder / "user.jax_export").read_bytes())).call)
    user(params, {"tokens": tokens, "lengths": lengths})["user_embedding"]

Notable: the artefacts are StableHLO with jax.export's promises (six months back and three weeks forward, see its
documentation), in which the parameters are arguments: one file of them for all functions, in a format that runs no
code when it is read.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import safetensors.numpy

from calrec_jax.export.functions import Arrays, Function

PARAMS_FILE = "params.safetensors"
SUFFIX = ".jax_export"


def flat_params(params: Any) -> dict[str, np.ndarray]:
    """Parameters as "layers/query/kernel" → array, on the host."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    return {name: np.ascontiguousarray(jax.device_get(array)) for name, array in sorted(flat.items())}


def write_jax(folder: pathlib.Path, functions: Mapping[str, Function], params: Any, platforms: Sequence[str]) -> None:
    """Writes `<function>.jax_export` for each function, and the parameters of all of them.

    Args:
      folder: which exists.
      functions: to write.
      params: of the model.
      platforms: that the functions are lowered for: "cpu", "cuda", "rocm", "tpu".
    """
    flat = flat_params(params)
    safetensors.numpy.save_file(flat, folder / PARAMS_FILE)
    (folder / PARAMS_FILE).chmod(0o644)  # it writes for the owner alone
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in flat.items()}
    for name, function in functions.items():
        exported = jax.export.export(jax.jit(_over_flat(function)), platforms=tuple(platforms))(
            shapes, symbolic_inputs(function)
        )
        (folder / f"{name}{SUFFIX}").write_bytes(exported.serialize())


def _over_flat(function: Function) -> Any:
    def call(flat: dict[str, jax.Array], arrays: Arrays) -> Arrays:
        return function.call(flax.traverse_util.unflatten_dict(flat, sep="/"), arrays)

    return call


def symbolic_inputs(function: Function) -> dict[str, jax.ShapeDtypeStruct]:
    """The function's inputs, with one symbol for each axis that is not a number."""
    scope = jax.export.SymbolicScope()
    return {
        name: jax.ShapeDtypeStruct(jax.export.symbolic_shape(", ".join(map(str, shape)), scope=scope), dtype)
        for name, (dtype, shape) in function.inputs.items()
    }
