"""A decoding step, compiled for a TPU chip that is not here: `calrec compile` says whether prompts and samples fit.

Notable: decoding does not split a model; each process decodes its own shards on one device, so one chip is compiled
for. A sample's step and a constrained beam's level are what a decode spends its time in. The beam's catalogue is made
up, of a stated number of items, since no dataset is read.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import gin
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from calrec_jax.data.examples import TokenCatalogue
from calrec_jax.decode import modes
from calrec_jax.decode.constrained import ConstrainedBeam, Hypotheses
from calrec_jax.decode.prefix import Prefilled, prefill
from calrec_jax.decode.run import decode
from calrec_jax.decode.sampling import RING_TOKENS, Sampler
from calrec_jax.errors import CalrecError
from calrec_jax.models.transformer import Transformer, TransformerConfig, empty_suffix
from calrec_jax.train.batching import Batching
from calrec_jax.train.flops import CHIPS
from calrec_jax.train.hlo import Program

_STEPS = 16  # of a phase on an accelerator; see `sampling._phase_steps`
_ITEM_TOKENS = 24  # of a made-up item
_COMPILED = ("sample", "constrained_beam")


@dataclasses.dataclass(frozen=True)
class DecodeReport:
    """What a decoding step needs on one chip.

    Attributes:
      mode: of `decode`.
      users: whose prompts are in memory at once.
      rows: completions, or hypotheses, that a step computes.
      hbm_bytes: parameters, prompts' keys and values, suffixes, temporaries and program.
      hbm_limit: the chip's memory in bytes; None where it is not known.
      flops: of one step, or level.
    """

    mode: str
    users: int
    rows: int
    hbm_bytes: int
    hbm_limit: float | None
    flops: float


def compile_decode(name: str, stage: str, mesh: Mesh, vocab_size: int, items: int = 10_000) -> DecodeReport | None:
    """Compiles the step of a decode as gin has bound it in scope `name`, and prints the report.

    Args:
      name: of `run.decodes`.
      stage: whose checkpoint is decoded: its model and its lengths, from its scope.
      mesh: its first device is compiled for.
      vocab_size: V.
      items: of the made-up catalogue of a constrained beam.

    Returns:
      None for a mode whose step is not compiled ahead, which is said.

    Raises:
      CalrecError: it does not fit.
    """
    with gin.config_scope(name):
        defaults = {k: p.default for k, p in inspect.signature(decode).parameters.items()}
        settings: dict[str, Any] = defaults | gin.get_bindings("decode")
    with gin.config_scope(stage):
        batching, config = Batching(), TransformerConfig()
    if settings["mode"] not in _COMPILED:
        print(f"compile: {name}: steps of mode {settings['mode']!r} are not compiled ahead")
        return None
    settings["max_new_tokens"] = settings["max_new_tokens"] or batching.max_target_tokens
    modes.check(settings)
    model = Transformer(config, vocab_size)
    prompt = batching.max_history_tokens
    device = mesh.devices.flat[0]
    where = NamedSharding(Mesh(np.array([device]), ("chip",)), PartitionSpec())
    lowered, rows = (_sample if settings["mode"] == "sample" else _beam)(model, settings, prompt, where, items)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise CalrecError(f"{name} does not fit: {str(error).splitlines()[0]} {_WAYS_OUT}") from error
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    cost, chip = Program(text).cost(), CHIPS.get(device.device_kind)
    report = DecodeReport(
        mode=settings["mode"],
        users=settings["batch_users"],
        rows=rows,
        hbm_bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
        hbm_limit=None if chip is None else chip.hbm_gib * 2**30,
        flops=cost.flops / _STEPS,  # the loop is counted as often as it can turn
    )
    limit = "" if report.hbm_limit is None else f" of {report.hbm_limit / 2**30:.0f}"
    print(
        f"compile: {name} ({report.mode}) on one {device.device_kind}: {report.users} users with prompts of {prompt} "
        f"tokens, {report.rows:,} rows\n  HBM             {report.hbm_bytes / 2**30:.2f}{limit} GiB\n"
        f"  FLOPs a step    {report.flops / 1e9:,.1f} G"
    )
    if report.hbm_limit is not None and report.hbm_bytes > report.hbm_limit:
        raise CalrecError(f"{name} does not fit: {report.hbm_bytes / 2**30:.2f} GiB on one chip. {_WAYS_OUT}")
    return report


_WAYS_OUT = "Lower decode.batch_users, decode.live_share or decode.num_beams."


def _shapes(tree: Any, where: NamedSharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=where), tree)


def _parameters(model: Transformer, where: NamedSharding) -> Any:
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    boxed = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens, tokens)["params"]
    return _shapes(jax.tree.map(lambda x: x.unbox(), boxed, is_leaf=lambda x: hasattr(x, "unbox")), where)


def _sample(model: Transformer, settings: dict[str, Any], prompt: int, where: NamedSharding, _: int):
    """A phase of the sampler, with a suffix for the longest completion, lowered; and its rows."""
    own = {name: settings[name] for name in modes.MODES["sample"]}
    users, samples = settings["batch_users"], settings["num_samples"]
    params = _parameters(model, where)
    sampler = Sampler(model, params, eos_id=1, batch_users=users, **own)
    prefix = jax.eval_shape(lambda: sampler._empty_prefix(prompt))
    rows = sampler._rows
    suffix = jax.eval_shape(
        lambda: empty_suffix(model.config, rows, -(-settings["max_new_tokens"] // RING_TOKENS) * RING_TOKENS)
    )
    flat, by_user = np.zeros(rows, np.int32), np.zeros(users, np.int32)
    state = (np.int32(0), flat, by_user, np.zeros(rows, bool), np.zeros((users, samples), np.int32), flat, by_user)
    arguments = (prefix, suffix, *state, np.zeros((users, 2), np.uint32))
    jitted = jax.jit(functools.partial(sampler._extend, steps=_STEPS), donate_argnums=(2,))
    return jitted.lower(params, *_shapes(arguments, where)), rows


def _beam(model: Transformer, settings: dict[str, Any], prompt: int, where: NamedSharding, items: int):
    """The levels of the constrained beam behind the first, lowered; and its rows."""
    catalogue = _made_up(items, model.vocab_size)
    params = _parameters(model, where)
    made = modes.make(model, params, catalogue, settings)
    assert isinstance(made, ConstrainedBeam)
    users, beams = settings["batch_users"], settings["num_beams"]
    tokens, lengths = np.zeros((users, prompt), np.int32), np.zeros(users, np.int32)
    keys = np.zeros((users, 2), np.uint32)
    shared: Prefilled = jax.eval_shape(functools.partial(prefill, model), params, tokens, lengths, keys)[1]
    numbers = np.zeros((users, beams), np.int32)
    suffix = jax.eval_shape(lambda: empty_suffix(model.config, users * beams, 0))
    found = Hypotheses(np.int32(1), numbers, numbers.astype(np.float32), numbers.astype(bool), suffix)  # type: ignore[arg-type]
    arguments = (made._tables, shared, np.zeros((users, 0), np.int32), found)
    width = max(made._trie.fan_out(level) for level in range(1, min(_STEPS, made._trie.depth)))
    jitted = jax.jit(functools.partial(made._extend, bound=_STEPS, width=width))
    return jitted.lower(params, *_shapes(arguments, where)), users * beams


def _made_up(items: int, vocab_size: int) -> TokenCatalogue:
    """Items of random tokens; a few hundred begin alike, as those of a category do."""
    rng = np.random.Generator(np.random.Philox(key=[0, items]))
    tokens = rng.integers(3, vocab_size, (items, _ITEM_TOKENS)).astype(np.int32)
    tokens[:, 0] = 3 + rng.integers(0, max(1, min(items // 300 + 1, vocab_size - 3)), items)
    none = np.zeros(0, np.int32)
    return TokenCatalogue(
        tokens=tokens.reshape(-1),
        offsets=np.arange(items + 1, dtype=np.int64) * _ITEM_TOKENS,
        text_ids=np.arange(items, dtype=np.int32),
        token_weights=np.ones(items * (_ITEM_TOKENS + 1), np.float32),
        intro=none,
        first=none,
        next=none,
        start_id=2,
        eos_id=1,
        cut=0,
    )
