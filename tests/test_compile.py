"""Training steps compiled for TPU slices that are not here; and what `compile` says without them."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import gin
import jax
import numpy as np
import pytest

from calrec_jax.decode.compile import compile_decode
from calrec_jax.errors import CalrecError
from calrec_jax.losses import LossConfig
from calrec_jax.models.transformer import TransformerConfig
from calrec_jax.train import compile as compiling
from calrec_jax.train import step as steps
from calrec_jax.train.batching import Batching
from calrec_jax.train.flops import step_flops
from calrec_jax.train.optimizer import OptimizerConfig

SMALL = TransformerConfig(embed_dim=16, num_layers=3, num_heads=4, num_kv_heads=2, mlp_dim=24, attention_block=32)
ROWS = Batching(batch_rows=4, row_tokens=64, row_examples=2, max_history_tokens=48, max_target_tokens=8)


def test_the_report_of_a_mesh_that_is_here():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), steps.MESH_AXES)
    report = compiling.compile_step(mesh, SMALL, LossConfig(chunk=8), OptimizerConfig(), ROWS, 50, 10)
    count = 50 * 16 + 16 + 3 * (2 * 16 + 16 * 4 * (4 + 2 + 2 + 4) + 3 * 16 * 24)
    assert report.parameters == count
    memory = report.memory
    assert memory.parameters == 4 * count and memory.optimizer == 2 * 4 * count + 2 * 4, "two moments, two counters"
    assert memory.temporaries > 4 * count and memory.rest > 0
    assert memory.total == memory.parameters + memory.optimizer + memory.temporaries + memory.rest
    assert memory.fits is None, "a CPU has no limit that we know"
    assert str(memory).endswith("GiB a device (parameters 0.00, optimiser 0.00, step 0.00)")
    assert not report.splash


def test_step_flops_equal_a_count_place_by_place():
    """Attention has two products forward and five backward, which compute scores anew."""
    config, batching = SMALL, ROWS
    c, total, products = config, 0, 0
    for place in range(batching.row_tokens):
        block_end = (place // c.attention_block + 1) * c.attention_block
        total += 2 * 16 * c.head_width * (c.num_heads + 2 * c.num_kv_heads) + 2 * c.num_heads * c.head_width * 16
        total += 3 * 2 * 16 * 24 + 2 * c.head_width**2 * (c.num_heads + c.num_kv_heads)
        products += 2 * c.num_heads * c.head_width * min(block_end, batching.row_tokens)
    layers = (3 * total + (2 + 5) * products) * c.num_layers * batching.batch_rows
    pooling = 3 * 2 * 4 * 2 * 64 * 16
    contrast = 2 * 2 * 8 * 8 * 16
    assert step_flops(config, batching) == layers + 2 * pooling + 3 * contrast


def test_step_flops_count_windows_where_layers_are_unrolled():
    """Scanned, layers of both kinds share a body, which computes what global ones need."""
    wide = dataclasses.replace(SMALL, attention_pattern=("local", "global"), sliding_window=5, attention_block=8)
    total = compiling.step_flops(dataclasses.replace(wide, attention_pattern=("global",)), ROWS)
    assert compiling.step_flops(wide, ROWS) == total
    narrow = dataclasses.replace(wide, scan_layers=False)
    saved = 0
    for place in range(ROWS.row_tokens):
        first = max(0, place // 8 * 8 - 4)  # the first place that the block's first query sees
        saved += first
    per_pair = (2 + 5) * 2 * SMALL.num_heads * SMALL.head_width
    assert total - compiling.step_flops(narrow, ROWS) == 2 * per_pair * saved * ROWS.batch_rows, "2 of 3 are local"


def test_a_batch_that_does_not_divide_is_named():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), steps.MESH_AXES)
    batching = Batching(batch_rows=4, micro_batches=3)
    with pytest.raises(CalrecError, match="Batching.batch_rows=4: must divide by 3"):
        compiling.compile_step(mesh, SMALL, LossConfig(), OptimizerConfig(), batching, 50, 10)


DECODES = """
TransformerConfig.embed_dim = 16
TransformerConfig.num_layers = 2
TransformerConfig.num_heads = 2
TransformerConfig.num_kv_heads = 1
TransformerConfig.mlp_dim = 24
Batching.max_history_tokens = 48
Batching.max_target_tokens = 8
decode.batch_users = 16
some/decode.num_samples = 2
some/decode.live_share = 1.0
items/decode.mode = "constrained_beam"
items/decode.num_beams = 3
alone/decode.mode = "tower"
"""


def test_decoding_steps_are_compiled_for_one_device(capsys):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), steps.MESH_AXES)
    weights = 2 * (2 * 16 * 8 * (2 + 1) + 3 * 16 * 24)  # those that a token meets in two layers
    gin.parse_config(DECODES)
    try:
        some = compile_decode("some", "stage2", mesh, 40)
        beam = compile_decode("items", "stage2", mesh, 40, items=200)
        assert compile_decode("alone", "stage2", mesh, 40) is None
    finally:
        gin.clear_config()
    assert (some.rows, some.users, some.hbm_limit) == (2 * 16, 16, None)
    assert (beam.rows, beam.mode) == (3 * 16, "constrained_beam")
    for report in (some, beam):
        products = 2 * report.rows * (weights + 40 * 16)
        attention = 2 * 2 * 2 * report.rows * 2 * 8 * (48 + 2 * 16)
        rotary = 2 * 2 * report.rows * 3 * 8 * 8
        assert products < report.flops <= 1.1 * (products + attention + rotary), report
        assert report.hbm_bytes > 4 * weights
    said = capsys.readouterr().out
    assert "compile: some (sample) on one cpu: 16 users with prompts of 48 tokens, 32 rows" in said
    assert "compile: alone: steps of mode 'tower' are not compiled ahead" in said


TPU = """
import dataclasses, json, sys
from calrec_jax.losses import LossConfig
from calrec_jax.models.transformer import TransformerConfig
from calrec_jax.train import compile as compiling
from calrec_jax.train.batching import Batching
from calrec_jax.train.flops import step_flops
from calrec_jax.train.optimizer import OptimizerConfig
topology, slices, shape, model, batching, loss, vocab = json.loads(sys.argv[1])
mesh = compiling.make_mesh(topology, slices, shape)
report = compiling.compile_step(
    mesh, TransformerConfig(**model), LossConfig(**loss), OptimizerConfig(), Batching(**batching), vocab, 100
)
print(json.dumps(dataclasses.asdict(report) | {"fits": report.memory.fits, "HBM": report.memory.total / 2**30}))
"""
TINY = {"embed_dim": 128, "num_layers": 3, "mlp_dim": 352, "dtype": "bfloat16"}
BILLION = {
    "embed_dim": 1152, "num_layers": 26, "num_heads": 4, "num_kv_heads": 1, "head_dim": 256, "mlp_dim": 6912,
    "dtype": "bfloat16", "remat": "full",
}  # fmt: skip


def compile_for_tpu(topology, slices, shape, model, rows, vocab):
    """The report of a training step, compiled in a process of its own for a slice that is not here."""
    batching = {"batch_rows": rows, "row_tokens": 1280}
    request = json.dumps([topology, slices, shape, model, batching, {"chunk": 64}, vocab])
    done = subprocess.run([sys.executable, "-c", TPU, request], capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    print(report)
    return report


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "slices", "devices", "shape", "model", "rows", "vocab"),
    [
        ("v5e:2x2", 1, 4, None, TINY, 8, 4096),
        ("v5e:2x2", 2, 8, None, TINY, 16, 4096),
        ("v5e:16x16", 1, 256, [1, 4, 64, 1], TINY, 256, 4096),
        ("v6e:8x8", 1, 64, [1, 1, 32, 2], BILLION, 64, 32768),
        ("v4:8x8x8", 1, 1024, [1, 4, 64, 4], BILLION, 512, 262144),
    ],
)
def test_whole_models_compile_for_slices_that_are_not_here(topology, slices, devices, shape, model, rows, vocab):
    report = compile_for_tpu(topology, slices, shape, model, rows, vocab)
    assert report["devices"] == devices and report["fits"]
    assert 0.9 < report["flops"] / report["analytic_flops"] <= 1.10
    assert report["vocabulary_flops"] > 0 and report["collective_bytes"]["all-gather"] > 0


@pytest.mark.slow
def test_a_public_model_of_local_and_global_layers_compiles_for_a_slice_that_is_not_here():
    """Gemma 3 270M with its own vocabulary: one scanned body holds the kernel with the window and without it."""
    gin.parse_config_file(str(pathlib.Path(__file__).parents[1] / "gin" / "models" / "gemma3_270m.gin"))
    config = dataclasses.replace(TransformerConfig(), dtype="bfloat16", remat="full")
    assert config.sliding_window == 512 < 1280 and len({*config.local_layers}) == 2
    report = compile_for_tpu("v5e:2x2", 1, None, dataclasses.asdict(config), 8, 262_144)
    assert report["devices"] == 4 and report["fits"] and report["splash"]
    assert 267e6 < report["parameters"] < 270e6
    assert 0.9 < report["flops"] / report["analytic_flops"] <= 1.10
    assert report["vocabulary_flops"] > 0 and report["collective_bytes"]["all-gather"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "arguments", "wanted"),
    [
        (
            "paper_stage2",
            ["--stage=stage2"],
            ["parameters      999.81 M", "attention       splash", "h for 2,000 steps"],
        ),
        ("paper_stage2", ["--name=sample"], ["one TPU v5 lite: 32 users with prompts of 1024 tokens"]),
        ("scientific_reproduction", ["--name=beam"], ["beam (constrained_beam) on one TPU v5 lite"]),
    ],
)
def test_the_command_compiles_a_run_files_steps(run, arguments, wanted):
    command = [sys.executable, "-m", "calrec_jax", "compile", f"--gin_file=runs/{run}.gin", "--run_dir=none"]
    command += ["--gin.DATA_DIR='data'", "--topology=v5e:16x16", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    assert all(words in done.stdout for words in wanted)
    assert re.search(r"HBM +[\d.]+ of 16(\.0)? GiB", done.stdout)
