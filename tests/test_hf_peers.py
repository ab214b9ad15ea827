"""Our decoder against transformers, in both directions: logits, greedy texts, token ids.

transformers runs in a process of its own, by the Python that CALREC_PEERS_PYTHON names (`make test-slow` makes one), or
by this one. `pytest -m slow -s tests/test_hf_peers.py` prints the figures of docs/models.md.
"""

import json
import os
import pathlib
import subprocess
import sys

import hf_folders
import jax
import numpy as np
import pytest

from calrec_jax import artifacts
from calrec_jax.decode.prefix import Batch
from calrec_jax.decode.sampling import Sampler
from calrec_jax.models.transformer import Transformer
from calrec_jax.pretrained.export_hf import export_hf
from calrec_jax.pretrained.import_hf import import_hf
from calrec_jax.tokenizer import Tokenizer
from calrec_jax.train.checkpoints import FACTS_FILE, load_checkpoint

pytestmark = pytest.mark.slow
NAMES = list(hf_folders.CONFIGS)
PYTHON = os.environ.get("CALREC_PEERS_PYTHON", sys.executable)
STEPS, LENGTH = 24, 23


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """What transformers computes from each family's folder, and from our export with a config.json made anew."""
    if subprocess.run([PYTHON, "-c", "import torch, transformers"], capture_output=True).returncode:
        pytest.skip(f"{PYTHON} has no torch and transformers; name one that has by CALREC_PEERS_PYTHON")
    root, folders, tokens = tmp_path_factory.mktemp("peers"), {}, {}
    for i, name in enumerate(NAMES):
        hf_folders.write_folder(root / name, hf_folders.CONFIGS[name], seed=i, family=name)
        out = import_hf(root / name, root / f"{name}-imported")
        export_hf(_forgotten(out), root / f"{name}-exported", max_shard_gib=40_000 / 2**30)
        folders |= {name: str(root / name), f"{name}-exported": str(root / f"{name}-exported")}
        rows = np.random.default_rng(i).integers(3, hf_folders.VOCAB, (3, LENGTH)).astype(np.int32)
        tokens |= {name: rows, f"{name}-exported": rows}
    np.savez(root / "tokens.npz", **tokens)
    request = {"folders": folders, "tokens": str(root / "tokens.npz"), "steps": STEPS, "texts": hf_folders.TITLES}
    request["save"] = {name: str(root / f"{name}-saved") for name in NAMES}
    artifacts.write_json(root / "request.json", request)
    script = pathlib.Path(__file__).with_name("peer_transformers.py")
    command = [PYTHON, str(script), str(root / "request.json"), str(root / "out.npz")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONPATH", "XLA_"))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    return root, tokens, np.load(root / "out.npz")


def _forgotten(out: pathlib.Path) -> pathlib.Path:
    """The checkpoint without the original config.json, so that the export must write one of its own."""
    facts = json.loads((out / FACTS_FILE).read_text())
    del facts["origin"]
    artifacts.write_json(out / FACTS_FILE, facts)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_logits_greedy_texts_and_ids_equal_transformers(peers, name):
    root, tokens, theirs = peers
    config, params, facts = load_checkpoint(root / f"{name}-imported")
    model = Transformer(config, facts["vocab_size"])
    place = np.broadcast_to(np.arange(LENGTH), tokens[name].shape).astype(np.int32)
    ours = np.asarray(jax.jit(model.apply)({"params": params}, tokens[name], place, np.ones_like(place)))
    sampler = Sampler(
        model, params, eos_id=-1, num_samples=1, temperature=1e-5, max_new_tokens=STEPS, batch_users=len(place)
    )
    prompt = Batch(
        tokens[name], np.full(len(place), LENGTH, np.int32), np.zeros((len(place), 2), np.uint32), np.arange(len(place))
    )
    saved = import_hf(root / f"{name}-saved", root / f"{name}-saved-imported")  # as transformers of today writes it
    again = load_checkpoint(saved)
    assert again[0] == config
    jax.tree.map(np.testing.assert_array_equal, again[1], params)
    greedy = sampler(prompt).tokens[:, 0]
    ids = Tokenizer.load(root / f"{name}-imported" / "tokenizer").encode_many(hf_folders.TITLES)
    for direction in (name, f"{name}-exported"):
        difference = float(np.abs(theirs[f"{direction}/logits"] - ours).max())
        print(f"{direction:<24} {theirs[f'{direction}/class']!s:<20} {difference:.1e} of {np.abs(ours).max():.1f}")
        assert difference < 2e-4
        np.testing.assert_array_equal(theirs[f"{direction}/greedy"], greedy)
        np.testing.assert_array_equal(theirs[f"{direction}/ids"], np.concatenate(ids))
        assert theirs[f"{direction}/lengths"].tolist() == [len(row) for row in ids]
