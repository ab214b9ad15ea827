"""What a stage survives: kills at any moment, losses that are not finite, a full disk."""

import errno
import os
import subprocess
import sys
import time

import gin
import jax
import numpy as np
import pytest
from test_train import SETTINGS

from calrec_jax import artifacts
from calrec_jax.errors import CalrecError
from calrec_jax.train import checkpoints as ckpt
from calrec_jax.train import feed
from calrec_jax.train.loop import train

LONG = SETTINGS.replace("train.num_steps = 6", "train.num_steps = 60").replace("eval_every = 3", "eval_every = 20")
SCRIPT = """
import sys, gin
from calrec_jax.data.dataset import Dataset
from calrec_jax.tokenizer import Tokenizer
from calrec_jax.train.loop import train
gin.parse_config(sys.argv[1])
train(sys.argv[2], [Dataset.load(f) for f in sys.argv[4:]], Tokenizer.load(sys.argv[3]))
"""
SEED = 0


@pytest.fixture(autouse=True)
def settings():
    gin.clear_config()
    yield
    gin.clear_config()


def start(small_run, out):
    arguments = [LONG, str(out), str(small_run.tokenizer_folder), *map(str, small_run.folders)]
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments], stdout=subprocess.DEVNULL)


def killed_at_random(small_run, out, kills):
    """Starts the stage and kills it, so many times, most of them while it saves every step; then lets it end."""
    rng = np.random.default_rng(SEED)
    print(f"seed {SEED}")
    for kill in range(kills):
        process = start(small_run, out)
        before = newest(out)
        # The first third may be killed while starting; the others once a step has been saved.
        until = time.monotonic() + 120
        while kill % 3 and process.poll() is None and newest(out) == before and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(float(rng.uniform(0, 0.5 if kill % 3 else 6.0)))
        process.kill()
        if process.wait() == 0:
            break
    assert start(small_run, out).wait(timeout=300) == 0


def newest(out):
    folder = out / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return max((int(name) for name in names if name.isdigit()), default=-1)


def assert_same_stage(out, alone):
    for which in ("latest", "best"):
        params = [ckpt.load_checkpoint(stage, which)[1] for stage in (out, alone)]
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), *params)
    hashes = [artifacts.read_manifest(stage, kind="checkpoint")["hash"] for stage in (out, alone)]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_a_stage_killed_at_random_moments_ends_as_one_left_alone(small_run, tmp_path, kills):
    assert start(small_run, tmp_path / "alone").wait(timeout=300) == 0
    killed_at_random(small_run, tmp_path / "killed", kills)
    assert_same_stage(tmp_path / "killed", tmp_path / "alone")


def test_steps_without_a_finite_loss_end_the_stage_and_leave_their_batch(small_run, tmp_path, monkeypatch):
    gin.parse_config(SETTINGS + "\ntrain.max_skipped = 2\ntrain.log_every = 1\n")
    real = feed.training_batch

    def broken(stream, step, **options):
        batch = real(stream, step, **options)
        if step in (1, 3, 4):
            batch["decoder_loss_weights"] = np.full_like(batch["decoder_loss_weights"], np.inf)
        return batch

    monkeypatch.setattr(feed, "training_batch", broken)
    message = "in the last 2 steps .*train.max_skipped.*batch of step 5 is in not_finite_step_5_process_0.npz"
    with pytest.raises(CalrecError, match=message):
        train(tmp_path / "stage1", small_run.datasets, small_run.tokenizer)
    with np.load(tmp_path / "stage1" / "not_finite_step_5_process_0.npz", allow_pickle=False) as saved:
        assert np.isinf(saved["decoder_loss_weights"]).all()
        assert saved["decoder_input_tokens"].shape == (4, 256)


def test_a_full_disk_ends_the_run_and_its_last_checkpoint_is_good(small_run, tmp_path, monkeypatch):
    gin.parse_config(SETTINGS)
    real = ckpt.save

    def full(checkpoints, step, state, loss):
        if step == 5:
            with artifacts.disk_errors(checkpoints.directory):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(checkpoints, step, state, loss)

    with monkeypatch.context() as patch:
        patch.setattr(ckpt, "save", full)
        with pytest.raises(CalrecError, match="(?i)no space left"):
            train(tmp_path / "stage1", small_run.datasets, small_run.tokenizer)
    assert train(tmp_path / "stage1", small_run.datasets, small_run.tokenizer)
    assert artifacts.read_manifest(tmp_path / "stage1", kind="checkpoint")["last_step"] == 6
