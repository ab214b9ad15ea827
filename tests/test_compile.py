"""Training steps compiled for TPU slices that are not here; and what `compile` says without them."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

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
    config, batching = SMALL, ROWS
    c, total = config, 0
    for place in range(batching.row_tokens):
        block_end = (place // c.attention_block + 1) * c.attention_block
        total += 2 * 16 * c.head_width * (c.num_heads + 2 * c.num_kv_heads) + 2 * c.num_heads * c.head_width * 16
        total += 3 * 2 * 16 * 24 + 2 * c.head_width**2 * (c.num_heads + c.num_kv_heads)
        total += 2 * 2 * c.num_heads * c.head_width * min(block_end, batching.row_tokens)
    layers = total * c.num_layers * batching.batch_rows
    pooling = 3 * 2 * 4 * 2 * 64 * 16
    contrast = 2 * 2 * 8 * 8 * 16
    assert step_flops(config, batching) == 3 * layers + 2 * pooling + 3 * contrast


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
    per_pair = 4 * SMALL.num_heads * SMALL.head_width
    assert total - compiling.step_flops(narrow, ROWS) == 3 * 2 * per_pair * saved * ROWS.batch_rows, "2 of 3 are local"


def test_a_batch_that_does_not_divide_is_named():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), steps.MESH_AXES)
    batching = Batching(batch_rows=4, micro_batches=3)
    with pytest.raises(CalrecError, match="Batching.batch_rows=4: must divide by 3"):
        compiling.compile_step(mesh, SMALL, LossConfig(), OptimizerConfig(), batching, 50, 10)


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
    batching = {"batch_rows": rows, "row_tokens": 1280}
    request = json.dumps([topology, slices, shape, model, batching, {"chunk": 64}, vocab])
    done = subprocess.run([sys.executable, "-c", TPU, request], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    print(report)
    assert report["devices"] == devices and report["fits"]
    assert 0.9 < report["flops"] / report["analytic_flops"] <= 1.10
    assert report["vocabulary_flops"] > 0 and report["collective_bytes"]["all-gather"] > 0
