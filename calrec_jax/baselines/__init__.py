"""Baselines: their names, and SASRec, which is trained. Those that are counted are sources of `calrec_jax.rank`."""

# What a baseline's name may end in, and what that takes out of its ranking: one of `rank.sources.LEAVE_OUT`.
SUFFIXES = {"": "none", "_removed": "last", "_new": "all"}


def split_name(name: str) -> tuple[str, str]:
    """A baseline's name without its suffix, and which items that takes out: "none", the "last", or "all"."""
    for suffix, left_out in SUFFIXES.items():
        if suffix and name.endswith(suffix):
            return name.removesuffix(suffix), left_out
    return name, "none"
