"""The safetensors files of a Hugging Face folder: which tensors are there, and each one's values.

Notable: everything is checked by the headers before a value is read: files missing or cut off, tensors missing, not
expected, of another shape or an unreadable type. Values come one tensor at a time. Files that need pickle are never
opened.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from calrec_jax import artifacts
from calrec_jax.errors import CalrecError
from calrec_jax.pretrained.tensors import HEAD, PREFIXES, Leaf

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Tensors that hold no parameter of the text model: tables that old versions saved, and the towers of images.
_PASSED_OVER = re.compile(r".*rotary_emb\.inv_freq$|(model\.)?(vision_tower|multi_modal_projector)\..*")
_SHOWN = 5
_ROWS = 4096


class Tensors:
    """The tensors of a folder; open as long as the context that `opened` gives.

    Attributes:
      folder: where they are.
      files: the files, in order of their names.
    """

    def __init__(self, folder: Path, files: Mapping[str, Any]):
        self.folder, self.files = folder, sorted(files)
        self._file_of: dict[str, str] = {}
        for name, file in files.items():
            for tensor in file.keys():  # noqa: SIM118  # it is no mapping
                if tensor in self._file_of:
                    raise CalrecError(f"{folder}: the tensor {tensor} is in {self._file_of[tensor]} and in {name}, too")
                self._file_of[tensor] = name
        self._open = files

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, from the header."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors names it, such as "BF16"."""
        return str(self._slice(name).get_dtype())

    def _slice(self, name: str) -> Any:
        return self._open[self._file_of[name]].get_slice(name)

    def read(self, name: str) -> np.ndarray:
        """A tensor's values, in its own type."""
        try:
            return self._open[self._file_of[name]].get_tensor(name)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise CalrecError(
                f"{self.folder / self._file_of[name]}: cannot read the tensor {name} ({error})"
            ) from error

    def prefix(self) -> str:
        """What the names of the text model begin with."""
        for prefix in PREFIXES:
            if prefix + "embed_tokens.weight" in self:
                return prefix
        raise CalrecError(
            f"{self.folder}: the tensor {PREFIXES[0]}embed_tokens.weight is missing; a folder of a causal language "
            "model is wanted"
        )

    def check(self, wanted: Sequence[Leaf], prefix: str, tied: bool) -> None:
        """Raises a `CalrecError` naming tensors that are missing, not expected, misshapen or of an unreadable type."""
        shapes = {name: leaf.hf_shape for leaf in wanted for name in leaf.names(prefix)}
        problems = [
            f"{name} is missing ({list(shape)} is expected)" for name, shape in shapes.items() if name not in self
        ]
        for name in self._file_of:
            if name in shapes:
                shape, dtype = self.shape(name), self.dtype(name)
                if shape != shapes[name]:
                    problems.append(f"{name} has the shape {list(shape)}, and {list(shapes[name])} is expected")
                elif dtype not in DTYPES:
                    problems.append(f"{name} has the type {dtype}, and one of {list(DTYPES)} is expected")
            elif not _PASSED_OVER.fullmatch(name) and not (tied and name == HEAD):
                problems.append(f"{name} is not expected in this family")
        if problems:
            more = f", and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise CalrecError(f"{self.folder}: its tensors are not those of its config.json: "
                              f"{'; '.join(problems[:_SHOWN])}{more}")  # fmt: skip
        if tied and HEAD in self and not self._equal(HEAD, prefix + "embed_tokens.weight"):
            raise CalrecError(
                f"{self.folder}: tie_word_embeddings is true, and {HEAD} is not equal to embed_tokens.weight; "
                "set it to false in config.json if the model has a table of its own"
            )

    def _equal(self, one: str, other: str) -> bool:
        """Whether two tables have the same bits; some rows at a time are in memory."""
        if self.shape(one) != self.shape(other) or self.dtype(one) != self.dtype(other):
            return False
        a, b = self._slice(one), self._slice(other)
        count = self.shape(one)[0]
        parts = (slice(i, min(i + _ROWS, count)) for i in range(0, count, _ROWS))
        return all(a[part].tobytes() == b[part].tobytes() for part in parts)

    def dtypes(self, wanted: Sequence[Leaf], prefix: str) -> dict[str, str]:
        """The type of each tensor, by its name in a folder of a text model."""
        pairs = (pair for leaf in wanted for pair in zip(leaf.names(), leaf.names(prefix), strict=True))
        return {name: DTYPES[self.dtype(own)] for name, own in pairs}


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Tensors]:
    """Opens the safetensors files of a folder.

    Raises:
      CalrecError: there are none, one is missing or damaged, or the index does not hold.
    """
    with contextlib.ExitStack() as stack:
        index = _index(folder)
        files: dict[str, Any] = {}
        for name in sorted({*index.values()}) if index is not None else [SINGLE_FILE]:
            if not (folder / name).is_file():
                raise CalrecError(f"{folder / name} is missing; {INDEX_FILE} names it")
            try:
                files[name] = stack.enter_context(safetensors.safe_open(folder / name, framework="numpy"))
            except (safetensors.SafetensorError, OSError) as error:
                raise CalrecError(
                    f"{folder / name}: is no whole safetensors file ({error}); it may be cut off, download it again"
                ) from error
        tensors = Tensors(folder, files)
        for tensor, name in (index or {}).items():
            if tensor not in tensors or tensors._file_of[tensor] != name:
                raise CalrecError(f"{folder / name}: the tensor {tensor} is missing; {INDEX_FILE} says it is there")
        yield tensors


def _index(folder: Path) -> dict[str, str] | None:
    """Tensor to file; None where there is a single file."""
    if not folder.is_dir():
        raise CalrecError(f"{folder}: is not a folder; give one with config.json and *.safetensors")
    if not (folder / INDEX_FILE).exists():
        if (folder / SINGLE_FILE).exists():
            return None
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if pickled:
            raise CalrecError(
                f"{folder}: has {pickled[0]}, which is pickle and may run code, and no {SINGLE_FILE}; load it once "
                "where you trust it and save it by transformers' save_pretrained, which writes safetensors"
            )
        raise CalrecError(f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}")
    weight_map = artifacts.read_json(folder / INDEX_FILE)
    weight_map = weight_map.get("weight_map") if isinstance(weight_map, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CalrecError(f"{folder / INDEX_FILE}: weight_map is missing, or is not a table of tensors and files")
    strange = sorted(v for v in weight_map.values() if Path(v).name != v or not v.endswith(".safetensors"))
    if strange:
        raise CalrecError(
            f"{folder / INDEX_FILE}: weight_map names {strange[0]!r}, which is no *.safetensors beside it"
        )
    return weight_map
