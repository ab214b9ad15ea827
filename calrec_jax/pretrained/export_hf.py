"""The verb `export_hf`: a checkpoint of ours in; a folder that transformers, vLLM and others read out.

Notable: a tensor is taken from the devices when its file is written, so that the host holds one file. Of a model that
was imported the original `config.json` is written again, and its tensors in their original types: what was not trained
comes out bit for bit as it went in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

from calrec_jax import __version__, artifacts
from calrec_jax.errors import CalrecError
from calrec_jax.models.transformer import TransformerConfig
from calrec_jax.pretrained import families, reader
from calrec_jax.pretrained.import_hf import CONFIG_FILE
from calrec_jax.pretrained.tensors import HEAD, Leaf, leaves
from calrec_jax.pretrained.to_hf import family_of, to_hf
from calrec_jax.pretrained.tokenizer import FILES, FOLDER
from calrec_jax.tokenizer import MODEL_FILE, Tokenizer
from calrec_jax.train.checkpoints import load_checkpoint

NUMPY_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor of the export: layer `layer` of a parameter."""

    name: str
    leaf: Leaf
    layer: int
    dtype: str

    @property
    def bytes(self) -> int:
        return int(np.prod(self.leaf.hf_shape)) * np.dtype(NUMPY_DTYPES[self.dtype]).itemsize

    def value(self, params: Any) -> np.ndarray:
        """The values, copied from the devices."""
        array = self.leaf.of(params)
        layer = np.asarray(array[self.layer] if self.leaf.layers else array)
        return np.ascontiguousarray(self.leaf.theirs(layer), NUMPY_DTYPES[self.dtype])


def export_hf(
    checkpoint: str | Path,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: str | None = None,
    max_shard_gib: float = 5.0,
) -> Path:
    """Writes a Hugging Face folder.

    Args:
      checkpoint: a finished training stage, or what `import_hf` wrote.
      out: gets config.json, safetensors files and the tokenizer's files.
      tokenizer: folder of the checkpoint's tokenizer; None: `tokenizer` in the checkpoint's folder, or beside it.
      dtype: "float32", "bfloat16" or "float16" of all tensors; None: as imported, float32 of a model from scratch.
      max_shard_gib: largest file; a model that is larger is written in several with an index. A tensor is never cut.

    Returns:
      `out`.

    Raises:
      CalrecError: no family has this decoder's settings, the tokenizer is another one, or `out` exists.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if dtype is not None and dtype not in NUMPY_DTYPES:
        raise CalrecError(f"--dtype={dtype}: must be one of {list(NUMPY_DTYPES)}")
    if max_shard_gib <= 0:
        raise CalrecError(f"--max_shard_gib={max_shard_gib}: must be above 0")
    if out.exists():
        raise CalrecError(f"{out} exists already; delete it to export again, or choose another --out")
    config, params, facts = load_checkpoint(checkpoint)
    family = family_of(config)
    own, files = _tokenizer_files(checkpoint, tokenizer, facts["tokenizer"])
    origin = facts.get("origin", {})
    with artifacts.atomic_folder(out) as temporary:
        plan = list(_plan(config, facts["vocab_size"], dtype, origin))
        main = dtype or origin.get("dtype", "float32")
        artifacts.write_json(temporary / CONFIG_FILE, _config(config, own, family, origin, main))
        _write_shards(temporary, _shards(plan, max_shard_gib * 2**30), params)
        for path in files:
            (temporary / path.name).write_bytes(path.read_bytes())
    size = sum(tensor.bytes for tensor in plan)
    print(f"export_hf: {family.title}, {len(plan):,} tensors, {size / 2**30:.2f} GiB of {main} → {out}")
    return out


def _plan(config: TransformerConfig, vocab_size: int, dtype: str | None, origin: dict[str, Any]) -> Iterator[_Tensor]:
    """The tensors, layer by layer, so that a file holds whole layers."""
    own = list(leaves(config, vocab_size))
    most, others = origin.get("dtype", "float32"), origin.get("dtype_of", {})
    order = [leaf for leaf in own if not leaf.layers]
    first, last = order[:1], order[1:]

    def one(leaf: Leaf, i: int) -> _Tensor:
        name = leaf.names()[i]
        return _Tensor(name, leaf, i, dtype or others.get(name, most))

    yield from (one(leaf, 0) for leaf in first)
    yield from (one(leaf, i) for i in range(config.num_layers) for leaf in own if leaf.layers)
    yield from (one(leaf, 0) for leaf in last)
    if origin.get("repeats_embedding"):
        yield dataclasses.replace(one(first[0], 0), name=HEAD)


def _shards(plan: Sequence[_Tensor], limit: float) -> list[list[_Tensor]]:
    """Cuts the plan into files of at most `limit` bytes, or of one tensor."""
    shards: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in plan:
        if shards[-1] and size + tensor.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    return shards


def _write_shards(folder: Path, shards: Sequence[Sequence[_Tensor]], params: Any) -> None:
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = reader.SINGLE_FILE
        if len(shards) > 1:
            name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        # The format's name is what transformers asks for; the values have no framework.
        values = {tensor.name: tensor.value(params) for tensor in shard}
        safetensors.numpy.save_file(values, folder / name, metadata={"format": "pt"})
        weight_map |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        size = sum(tensor.bytes for shard in shards for tensor in shard)
        artifacts.write_json(folder / reader.INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _config(
    config: TransformerConfig, tokenizer: Tokenizer, family: families.Family, origin: dict[str, Any], dtype: str
) -> dict[str, Any]:
    """`config.json`: the original, where it still says what the model is."""
    original, vocab_size = origin.get("config"), tokenizer.vocab_size
    if original:
        made = dict(original)
    else:  # a family's defaults are ids of its own tokenizer
        ids = {"bos_token_id": tokenizer.start_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        made = to_hf(config, vocab_size, family) | ids
    found = families.from_hf(made, CONFIG_FILE)
    if found.config.settings() != config.settings() or found.vocab_size != vocab_size:
        raise CalrecError(
            f"{CONFIG_FILE} of a {family.model_type} cannot say all of this decoder's settings: "
            + "; ".join(artifacts.request_differences({}, found.config.settings(), {}, config.settings()))
        )
    made.setdefault("architectures", [family.architecture])
    dtype_fields = [name for name in ("torch_dtype", "dtype") if name in made] or ["torch_dtype"]
    return made | {name: dtype for name in dtype_fields} | ({} if original else {"calrec_jax_version": __version__})


def _tokenizer_files(checkpoint: Path, given: str | Path | None, fingerprint: str) -> tuple[Tokenizer, list[Path]]:
    """The tokenizer, and its files to copy."""
    candidates = [Path(given)] if given else [checkpoint / FOLDER, checkpoint.parent / FOLDER]
    folder = next((path for path in candidates if (path / artifacts.MANIFEST).exists()), candidates[-1])
    tokenizer = Tokenizer.load(folder)
    if tokenizer.fingerprint != fingerprint:
        raise CalrecError(
            f"{folder}: is not the tokenizer that {checkpoint} was trained with ({fingerprint[:8]}, and this one is "
            f"{tokenizer.fingerprint[:8]}); name it by --tokenizer"
        )
    return tokenizer, [folder / name for name in (*FILES, MODEL_FILE) if (folder / name).is_file()]
