"""The ways of decoding by name: which settings each reads, whether those are valid, and the decoder they make."""

from __future__ import annotations

from typing import Any

from calrec_jax.data.dataset import SPLITS
from calrec_jax.data.examples import TokenCatalogue
from calrec_jax.decode.beam import BeamSearch
from calrec_jax.decode.constrained import ConstrainedBeam
from calrec_jax.decode.given import LEAVE_OUT
from calrec_jax.decode.prefix import Decoder
from calrec_jax.decode.sampling import Sampler
from calrec_jax.decode.scoring import Candidates, Scorer, Tower
from calrec_jax.decode.trie import build_trie
from calrec_jax.errors import CalrecError
from calrec_jax.models.transformer import Transformer
from calrec_jax.rank.user_texts import MOST_COMPLETIONS

# The settings that a mode reads; the others are not part of what was asked for.
MODES: dict[str, tuple[str, ...]] = {
    "sample": ("num_samples", "temperature", "top_k", "top_p", "max_new_tokens", "live_share"),
    "beam": ("num_beams", "max_new_tokens"),
    "stochastic_beam": ("num_samples", "temperature", "max_new_tokens"),
    "constrained_beam": ("num_beams", "renormalise", "leave_out_history"),
    "score": ("num_candidates",),
    "tower": (),
}
_COUNTS = (
    "num_samples", "num_beams", "num_candidates", "max_new_tokens", "batch_users", "shard_users", "max_users", "top_k"
)  # fmt: skip
_OF_A_USER = ("num_samples", "num_beams", "num_candidates")


def check(settings: dict[str, Any]) -> None:
    """Names the setting that is not valid, as a `CalrecError`."""
    if settings["split"] not in SPLITS:
        raise CalrecError(f"split={settings['split']!r}: must be one of {list(SPLITS)}")
    if settings["mode"] not in MODES:
        raise CalrecError(f"decode.mode={settings['mode']!r}: must be one of {list(MODES)}")
    if settings.get("leave_out_history", "none") not in LEAVE_OUT:
        raise CalrecError(
            f"decode.leave_out_history={settings['leave_out_history']!r}: must be one of {list(LEAVE_OUT)}"
        )
    for name in (*_COUNTS, "temperature", "top_p", "live_share"):
        value = settings.get(name)
        if value is None:
            continue
        whole = name in _COUNTS
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not 0 < value < 2**31:
            raise CalrecError(f"decode.{name}={value!r}: must be a positive {'whole number' if whole else 'number'}")
        if name in ("top_p", "live_share") and value > 1:
            raise CalrecError(f"decode.{name}={value!r}: must be at most 1")
        if name in _OF_A_USER and value > MOST_COMPLETIONS:
            raise CalrecError(
                f"decode.{name}={value!r}: must be at most {MOST_COMPLETIONS:,}, the completions of a user that a "
                "ranking can name"
            )
    seed = settings["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise CalrecError(f"decode.seed={seed!r}: must be a whole number from 0 to 2^32 − 1")
    if settings["mode"] == "tower" and not settings["with_embeddings"]:
        raise CalrecError("decode.with_embeddings=False: mode 'tower' makes nothing else; set it to True")


def make(
    model: Transformer,
    params: Any,
    catalogue: TokenCatalogue,
    settings: dict[str, Any],
    *,
    keep: Any = None,
    left_out: Candidates | None = None,
    candidates: Candidates | None = None,
) -> Decoder:
    """The decoder that the settings ask for.

    Args:
      model: the language model.
      params: its parameters.
      catalogue: the items' tokens.
      settings: valid ones, all that the mode reads and `batch_users`.
      keep: [I] bool, the items that a constrained decode may give; None is all.
      left_out: items that single users are not to get; constrained decodes.
      candidates: of mode "score".

    Raises:
      CalrecError: the catalogue, or what is kept of it, is empty or more than a trie can hold.
    """
    mode, size = settings["mode"], settings["batch_users"]
    own = {name: settings[name] for name in MODES[mode]}
    if mode == "sample":
        return Sampler(model, params, eos_id=catalogue.eos_id, batch_users=size, **own)
    if mode == "beam":
        return BeamSearch(model, params, eos_id=catalogue.eos_id, batch_users=size, **own)
    if mode == "stochastic_beam":
        own["num_beams"] = own.pop("num_samples")
        return BeamSearch(model, params, eos_id=catalogue.eos_id, batch_users=size, **own)
    if mode == "constrained_beam":
        del own["leave_out_history"]
        trie = build_trie(catalogue.tokens, catalogue.offsets, catalogue.eos_id, keep)
        return ConstrainedBeam(
            model, params, catalogue=catalogue, trie=trie, batch_users=size, left_out=left_out, **own
        )  # fmt: skip
    if mode == "score":
        assert candidates is not None
        return Scorer(model, params, catalogue=catalogue, candidates=candidates, batch_users=size)
    return Tower(model, params, batch_users=size)
