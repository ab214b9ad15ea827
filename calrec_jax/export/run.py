"""The verb `export`: a trained stage into a folder that is served, or trained on, without this package."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import gin
import jax

from calrec_jax import artifacts
from calrec_jax.data.dataset import Dataset
from calrec_jax.data.examples import TokenCatalogue, tokenise_catalogue
from calrec_jax.decode.run import check_inputs, history_budget
from calrec_jax.errors import CalrecError
from calrec_jax.export import card as cards
from calrec_jax.export.functions import Function, Lengths, make_functions
from calrec_jax.models.transformer import Transformer
from calrec_jax.tokenizer import Tokenizer
from calrec_jax.train.checkpoints import load_checkpoint

KIND = "export"
FORMATS = ("saved_model", "jax", "t5x")
FUNCTIONS = ("user", "item", "score", "sample")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


@gin.configurable(denylist=["out", "format", "origin", "dataset", "tokenizer"])
def export(
    out: pathlib.Path,
    format: str,
    origin: cards.Origin,
    dataset: Dataset,
    tokenizer: pathlib.Path,
    *,
    functions: Sequence[str] = FUNCTIONS,
    prompt_tokens: int | None = None,
    max_new_tokens: int | None = None,
    num_samples: int = 32,
    temperature: float = 0.5,
    top_k: int | None = None,
    top_p: float | None = None,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    text_inputs: bool = False,
    licence: str | None = None,
    base_model: str | None = None,
    base_licence: str | None = None,
) -> pathlib.Path:
    """Writes an export and its model card (docs/export.md), whole or not at all.

    Args:
      out: folder, which must not be there.
      format: "saved_model" (TensorFlow), "jax" (`jax.export`) or "t5x" (a T5X checkpoint of the parameters).
      origin: the run's parts; the last stage is exported, its best step.
      dataset: whose catalogue says how long a prompt may be, as in `decode`.
      tokenizer: folder of the checkpoint's tokenizer, which is copied.
      functions: of "user" and "item" (towers), "score" and "sample".
      prompt_tokens: L, of a prompt; None is what `decode` allows.
      max_new_tokens: of a sampled text, EOS included; None is the checkpoint's max_target_tokens.
      num_samples: N of "sample".
      temperature: of "sample".
      top_k: of "sample", as that of `decode`.
      top_p: of "sample", as that of `decode`.
      platforms: that the functions can run on: "cpu", "cuda", "rocm", "tpu".
      text_inputs: signatures that take texts, too (format "saved_model").
      licence: of the model, for its card; None is "not stated".
      base_model: name of the language model that training began with, and
      base_licence: its licence; both must be set where there is one.

    Returns:
      `out`.

    Raises:
      CalrecError: a setting is not valid, inputs do not belong together, `out` is there, or a package is missing.
    """
    settings: dict[str, Any] = {
        name: value for name, value in locals().items() if name not in ("out", "origin", "dataset", "tokenizer")
    }
    _check(settings)
    if out.exists():
        raise CalrecError(f"{out} exists already; delete it to export again, or choose another --out")
    checkpoint = origin.stages[-1]
    config, params, facts = load_checkpoint(checkpoint)
    own = Tokenizer.load(tokenizer)
    check_inputs(checkpoint, facts, dataset, own)
    catalogue = tokenise_catalogue([dataset], own, max_target_tokens=facts["max_target_tokens"])
    lengths = _lengths(settings, facts, catalogue)
    # The functions are lowered for several platforms at once, of which a kernel knows one.
    model = Transformer(dataclasses.replace(config, attention="xla"), facts["vocab_size"])
    made = make_functions(
        model, lengths, start_id=catalogue.start_id, eos_id=catalogue.eos_id, num_samples=num_samples,
        temperature=temperature, top_k=top_k, top_p=top_p,
    )  # fmt: skip
    chosen = {name: made[name] for name in functions} if format != "t5x" else {}
    card = cards.make_card(
        origin,
        facts,
        parameters=sum(math.prod(x.shape) for x in jax.tree.leaves(params)),
        licence=licence,
        base_model=base_model,
        base_licence=base_licence,
    )
    with artifacts.atomic_folder(out) as folder:
        if format == "saved_model":
            _write_saved_model(folder, chosen, params, settings, tokenizer, lengths, catalogue)
        elif format == "jax":
            _write_jax(folder, chosen, params, settings)
        else:
            from calrec_jax.export.t5x_format import write_t5x

            write_t5x(folder, params, facts["step"])
        shutil.copytree(tokenizer, folder / "tokenizer")
        artifacts.write_json(folder / cards.CARD_FILE, card)
        (folder / cards.README_FILE).write_text(cards.readme(card, _use(format, chosen)), encoding="utf-8")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        artifacts.write_manifest(
            folder,
            kind=KIND,
            made_from={"checkpoint": facts["hash"], "tokenizer": own.fingerprint, "dataset": dataset.hash},
            settings=settings,
            files={path.relative_to(folder).as_posix(): artifacts.hash_file(path) for path in files},
            functions={name: _described(function) for name, function in chosen.items()},
            prompt=_prompt(lengths, catalogue),
        )
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"export: {out}: {', '.join(chosen) or 'parameters'}; {size / 2**20:,.1f} MiB")
    return out


def _check(settings: dict[str, Any]) -> None:
    """Names the setting that is not valid, as a `CalrecError`."""
    if settings["format"] not in FORMATS:
        raise CalrecError(f"--format={settings['format']}: must be one of {', '.join(FORMATS)}")
    for name, known in (("functions", FUNCTIONS), ("platforms", PLATFORMS)):
        values = settings[name]
        if not values or isinstance(values, str) or not set(values) <= set(known) or len(set(values)) < len(values):
            raise CalrecError(f"export.{name}={values!r}: must be some of {known}, each once")
    for name in ("prompt_tokens", "max_new_tokens", "num_samples", "top_k"):
        value = settings[name]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise CalrecError(f"export.{name}={value!r}: must be a positive whole number")
    if not settings["temperature"] > 0:
        raise CalrecError(f"export.temperature={settings['temperature']!r}: must be above 0")
    if settings["top_p"] is not None and not 0 < settings["top_p"] <= 1:
        raise CalrecError(f"export.top_p={settings['top_p']!r}: must be above 0 and at most 1")
    if settings["text_inputs"] and settings["format"] != "saved_model":
        raise CalrecError("export.text_inputs=True: only --format=saved_model has text inputs")


def _lengths(settings: dict[str, Any], facts: dict[str, Any], catalogue: TokenCatalogue) -> Lengths:
    budget = history_budget(facts, catalogue)
    prompt = settings["prompt_tokens"] if settings["prompt_tokens"] is not None else budget
    least = 1 + len(catalogue.intro) + len(catalogue.first) + int(catalogue.lengths.max()) + len(catalogue.next)
    if not least <= prompt <= budget:
        raise CalrecError(
            f"export.prompt_tokens={prompt}: a prompt with the longest item takes {least}, and the model was trained "
            f"on at most {budget}"
        )
    limit = facts["max_target_tokens"]
    return Lengths(prompt, limit - 1, settings["max_new_tokens"] or limit)


def _write_jax(folder: pathlib.Path, functions: dict[str, Function], params: Any, settings: dict[str, Any]) -> None:
    try:
        from calrec_jax.export.jax_format import write_jax
    except ModuleNotFoundError as error:
        raise _not_installed(error) from error
    write_jax(folder, functions, params, settings["platforms"])


def _write_saved_model(
    folder: pathlib.Path,
    functions: dict[str, Function],
    params: Any,
    settings: dict[str, Any],
    tokenizer: pathlib.Path,
    lengths: Lengths,
    catalogue: TokenCatalogue,
) -> None:
    try:
        from calrec_jax.export.saved_model import write_saved_model
        from calrec_jax.export.text_inputs import TextInputs
    except ModuleNotFoundError as error:
        raise _not_installed(error) from error
    texts = TextInputs(tokenizer, lengths, catalogue.start_id) if settings["text_inputs"] else None
    write_saved_model(folder, functions, params, settings["platforms"], texts)


def _not_installed(error: ModuleNotFoundError) -> CalrecError:
    return CalrecError(f"exports need {error.name}, which is not installed: pip install -e '.[export]'")


def _described(function: Function) -> dict[str, Any]:
    """What a caller must know, in what JSON has."""
    arrays = {
        side: {name: {"dtype": dtype, "shape": list(shape)} for name, (dtype, shape) in of.items()}
        for side, of in (("inputs", function.inputs), ("outputs", function.outputs))
    }
    return {"purpose": function.purpose, **arrays}


def _prompt(lengths: Lengths, catalogue: TokenCatalogue) -> dict[str, Any]:
    """How token ids of a prompt are put together: start intro first item next … item next, each tokenised alone."""
    parts = {name: getattr(catalogue, name).tolist() for name in ("intro", "first", "next")}
    return {
        "order": "start_id, intro, first, then of each item from the oldest on: its tokens, next",
        "start_id": catalogue.start_id,
        "eos_id": catalogue.eos_id,
        **parts,
        "prompt_tokens": lengths.prompt,
        "item_tokens": lengths.text,
        "too_long": "items are cut to item_tokens; the oldest are left out until the prompt fits",
    }


_LOADING = {
    "jax": """
import jax, pathlib, safetensors.numpy

folder = pathlib.Path(".")  # this one
params = safetensors.numpy.load_file(folder / "params.safetensors")
{name} = jax.jit(jax.export.deserialize(bytearray((folder / "{name}.jax_export").read_bytes())).call)
outputs = {name}(params, {{{inputs}}})
""",
    "saved_model": """
import tensorflow as tf

{name} = tf.saved_model.load(".").signatures["{name}"]  # this folder
outputs = {name}({arguments})
""",
    "t5x": "",
}


def _use(format: str, functions: dict[str, Function]) -> str:
    """How the export is loaded, and what its functions take."""
    if format == "t5x":
        return (
            "A T5X checkpoint of the parameters, without optimiser state: give `checkpoint_<step>` to T5X's "
            "`RestoreCheckpointConfig`, with `calrec_jax.integrations.t5x.CalrecModel`."
        )
    name, first = next(iter(functions.items()))
    code = _LOADING[format].format(
        name=name,
        inputs=", ".join(f'"{key}": {key}' for key in first.inputs),
        arguments=", ".join(f"{key}={key}" for key in first.inputs),
    )
    lines = [
        "## Use",
        "",
        "```python",
        code.strip(),
        "```",
        "",
        "| function | inputs | outputs | |",
        "|---|---|---|---|",
    ]
    for key, function in functions.items():
        cells = [
            ", ".join(f"`{n}` {d} [{', '.join(map(str, s))}]" for n, (d, s) in of.items())
            for of in (function.inputs, function.outputs)
        ]
        lines.append(f"| `{key}` | {cells[0]} | {cells[1]} | {function.purpose} |")
    lines += [
        "",
        "`manifest.json` has the same for programs, and under `prompt` how the token ids of a prompt are put together.",
    ]
    return "\n".join(lines)
