"""The verb `import_hf`: a Hugging Face folder in; a checkpoint, a gin file and a tokenizer of ours out.

Notable: a tensor is read, turned and laid onto the mesh before the next one is read, so that the host holds one tensor
and the shard that is being filled, however large the model is. Everything that can be checked is checked before that,
and the folder appears when it is whole.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from calrec_jax import artifacts
from calrec_jax.errors import CalrecError
from calrec_jax.models.transformer import Transformer, TransformerConfig
from calrec_jax.pretrained import reader
from calrec_jax.pretrained import tokenizer as tokenizers
from calrec_jax.pretrained.families import Described, from_hf
from calrec_jax.pretrained.tensors import HEAD, Leaf, leaves
from calrec_jax.train import checkpoints as ckpt
from calrec_jax.train import step as steps

CONFIG_FILE, GIN_FILE = "config.json", "model.gin"


def import_hf(folder: str | Path, out: str | Path, mesh_shape: Sequence[int] | None = None) -> Path:
    """Reads a Hugging Face folder.

    Args:
      folder: with config.json, safetensors files, and tokenizer.json or tokenizer.model.
      out: gets `checkpoints/`, `model.json`, `model.gin`, `tokenizer/` and `manifest.json`: a checkpoint that
        `run.init_from` can name.
      mesh_shape: (replica, data, fsdp, model) over which the parameters are laid while they are read; None: all
        devices are on fsdp.

    Returns:
      `out`.

    Raises:
      CalrecError: the folder is not such a model, is not whole, or does not hold together; the file, tensor or field is
        named, and nothing is left at `out`.
    """
    folder, out = Path(folder), Path(out)
    described = read_config(folder)
    with reader.opened(folder) as tensors:
        wanted = list(leaves(described.config, described.vocab_size))
        prefix = tensors.prefix()
        tensors.check(wanted, prefix, described.config.tied_embeddings)
        tokenizer = tokenizers.from_hf(folder, described)
        made_from = artifacts.hash_files([folder / CONFIG_FILE, *(folder / name for name in tensors.files)])
        made_from["tokenizer"] = tokenizer.fingerprint
        if artifacts.is_done(out, kind="checkpoint", made_from=made_from, settings={}):
            print(f"import_hf: {out} is done already, skipped")
            return out
        facts = _facts(folder, described, tokenizer, tensors.dtypes(wanted, prefix))
        facts["origin"]["repeats_embedding"] = described.config.tied_embeddings and HEAD in tensors
        with artifacts.atomic_folder(out) as temporary:
            params = load_parameters(tensors, wanted, prefix, described, mesh_shape)
            _write(
                temporary, f"{described.family.title}, imported from {folder.name}", params, described, facts, made_from
            )
            tokenizer.write(temporary / tokenizers.FOLDER)
    count = sum(x.size for x in jax.tree.leaves(params))
    print(f"import_hf: {described.family.title}, {count:,} parameters → {out}")
    return out


def read_config(folder: Path) -> Described:
    """`config.json` of a folder.

    Raises:
      CalrecError: it is missing, or of a model that is not supported.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CalrecError(f"{path} is missing; give a Hugging Face folder, with config.json and *.safetensors")
    config = artifacts.read_json(path)
    if not isinstance(config, dict):
        raise CalrecError(f"{path}: is not a table of fields")
    return from_hf(config, str(path))


def load_parameters(
    tensors: reader.Tensors,
    wanted: Sequence[Leaf],
    prefix: str,
    described: Described,
    mesh_shape: Sequence[int] | None = None,
) -> Any:
    """The parameters, float32, laid out over the mesh by the rules that training lays them out by."""
    mesh = steps.make_mesh(mesh_shape or (1, 1, len(jax.devices()), 1))
    model = Transformer(described.config, described.vocab_size)
    wanted_params = steps.abstract_params(model, mesh)
    params: dict[str, Any] = {}
    for leaf in wanted:
        own = params
        for name in leaf.path[:-1]:
            own = own.setdefault(name, {})
        own[leaf.path[-1]] = _stacked(tensors, leaf, prefix, leaf.of(wanted_params).sharding)
    return params


def _stacked(tensors: reader.Tensors, leaf: Leaf, prefix: str, sharding: NamedSharding) -> jax.Array:
    """A parameter: its layers one after the other, or the one tensor that it is."""
    if not leaf.layers:
        return _laid(leaf.ours(tensors.read(leaf.names(prefix)[0])), sharding)
    one = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    stacked = jax.jit(lambda: jnp.zeros((leaf.layers, *leaf.shape), jnp.float32), out_shardings=sharding)()
    for i, name in enumerate(leaf.names(prefix)):
        layer = _laid(leaf.ours(tensors.read(name)), one)
        stacked = _put(sharding)(stacked, layer, np.int32(i))
        stacked.block_until_ready()  # else layers are read faster than they are copied, and wait in memory
    return stacked


def _laid(tensor: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A tensor in float32 over the devices; each shard is cut out and converted by itself."""
    return jax.make_array_from_callback(
        tensor.shape, sharding, lambda index: np.ascontiguousarray(tensor[index], np.float32)
    )


@functools.cache
def _put(sharding: NamedSharding) -> Any:
    """Writes a layer into its place of a stack, which is given up for the result."""

    def put(stacked: jax.Array, layer: jax.Array, i: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stacked, layer, i, 0)

    return jax.jit(put, donate_argnums=0, out_shardings=sharding)


def _facts(
    folder: Path, described: Described, tokenizer: tokenizers.ImportedTokenizer, dtypes: dict[str, str]
) -> dict[str, Any]:
    """What `model.json` says beside the settings; `origin` travels on to what is trained from here."""
    most = max({*dtypes.values()}, key=[*dtypes.values()].count)
    others = {name: dtype for name, dtype in dtypes.items() if dtype != most}
    return {
        "vocab_size": described.vocab_size,
        "tokenizer": tokenizer.fingerprint,
        "origin": {
            "family": described.family.model_type,
            "config": described.text_config,
            "dtype": most,
            "dtype_of": others,
            "files": artifacts.hash_files([folder / CONFIG_FILE]),
        },
    }


def _write(
    temporary: Path, title: str, params: Any, described: Described, facts: dict[str, Any], made_from: dict[str, str]
) -> None:
    ckpt.write_facts(temporary, described.config, facts)
    ckpt.save_parameters(temporary, params)
    (temporary / GIN_FILE).write_text(gin_text(described.config, title), "utf-8")
    artifacts.write_manifest(temporary, kind="checkpoint", made_from=made_from, settings={}, **facts)


def gin_text(config: TransformerConfig, title: str) -> str:
    """A gin file that gives these settings, whatever files stand before it; how a model is run is left to those."""
    own = {name: value for name, value in dataclasses.asdict(config).items() if name in config.settings()}
    return "\n".join([f"# {title}.", "TransformerConfig:", *(f"  {k} = {v!r}" for k, v in own.items())]) + "\n"
