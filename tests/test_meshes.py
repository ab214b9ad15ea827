"""The step over meshes of eight devices gives what one device gives: loss, gradients, and in which type they are."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from calrec_jax.data.packing import PackedStream
from calrec_jax.losses import LossConfig
from calrec_jax.models.transformer import Transformer, TransformerConfig
from calrec_jax.train import step as steps
from calrec_jax.train.batching import Batching
from calrec_jax.train.feed import training_batch
from calrec_jax.train.optimizer import OptimizerConfig

# A step of plain gradient descent at rate 1 takes the gradient from the parameters, so the step itself is what is
# compared. D = 20 divides by 4 and not by 8, so that axes move; 1 key-value head is repeated for the kernel.
MESHES = """
import sys, jax, numpy as np, optax
from jax.sharding import Mesh
from calrec_jax.losses import LossConfig
from calrec_jax.models import packed_attention
from calrec_jax.models.transformer import Transformer, TransformerConfig
from calrec_jax.train import step as steps
batch, vocab = dict(np.load(sys.argv[1], allow_pickle=False)), int(sys.argv[2])

def gradients(shape, micro_batches=1, attention="xla"):
    config = TransformerConfig(embed_dim=20, num_layers=2, num_heads=4, num_kv_heads=1, head_dim=6, mlp_dim=24,
                               attention=attention, attention_block=32)
    model, optimizer = Transformer(config, vocab), optax.sgd(1.0)
    mesh = Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), steps.MESH_AXES)
    state, shardings = steps.init_state(model, optimizer, mesh, 0)
    before = jax.device_get(state.params)
    step = steps.make_train_step(model, LossConfig(temperature=0.1, alpha=0.3, beta=0.3, chunk=16), optimizer, 0, mesh,
                                 shardings, micro_batches)
    state, metrics = step(state, jax.device_put(batch, steps.batch_sharding(mesh)))
    return float(metrics["loss"]), jax.tree.map(np.subtract, before, jax.device_get(state.params))

loss, wanted = gradients((1, 1, 1, 1))
assert max(np.abs(x).max() for x in jax.tree.leaves(wanted)) > 0.05
cases = [((1, 8, 1, 1), 1, "xla"), ((1, 1, 8, 1), 1, "xla"), ((1, 2, 4, 1), 1, "xla"), ((1, 1, 4, 2), 1, "xla"),
         ((2, 2, 1, 2), 1, "xla"), ((2, 1, 2, 2), 2, "xla"), ((1, 1, 2, 4), 1, "splash")]
for case in cases:
    other, got = gradients(*case)
    assert abs(other - loss) < 1e-5, (case, other, loss)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, err_msg=str(case)), got, wanted)
    print(case, "same")
packed_attention._LONG = 128  # rows of which the longest segment is looked at, on whichever device it is
other, got = gradients((1, 2, 2, 2))
assert abs(other - loss) < 1e-5, (other, loss)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, wanted)
print("long rows same")
"""


@pytest.fixture(scope="module")
def batch(small_run):
    batching = Batching(
        batch_rows=8, row_tokens=128, row_examples=2, max_history_tokens=60, max_target_tokens=24, next_item_loss="all"
    )
    examples = batching.examples(small_run.datasets, small_run.tokenizer, "train")
    return training_batch(PackedStream(examples, batching.packing(), seed=0), 0, sample_forced_tokens=False, seed=0)


def test_every_mesh_gives_one_devices_loss_and_gradients(small_run, batch, tmp_path):
    np.savez(tmp_path / "batch.npz", **batch)
    flags = (
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
        "--xla_llvm_disable_expensive_passes=true"
    )
    done = subprocess.run(
        [sys.executable, "-c", MESHES, str(tmp_path / "batch.npz"), str(small_run.tokenizer.vocab_size)],
        capture_output=True, text=True, check=False, env={**os.environ, "XLA_FLAGS": flags},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("same") == 8


class Eight:
    """A mesh of eight devices need not be there to say where arrays would lie on it."""

    shape = (1, 1, 8, 1)

    @classmethod
    def shardings(cls, config, vocab):
        mesh = jax.sharding.AbstractMesh(cls.shape, steps.MESH_AXES)
        optimizer = OptimizerConfig().transformation(10)
        return steps.abstract_state(Transformer(config, vocab), optimizer, mesh)


def test_an_axis_that_does_not_divide_its_dimension_splits_another():
    config = TransformerConfig(embed_dim=20, num_layers=8, num_heads=4, num_kv_heads=1, head_dim=16, mlp_dim=24)
    state, shardings = Eight.shardings(config, 64)
    layers = shardings.params["layers"]
    assert shardings.params["embedding"].shard_shape((64, 20)) == (8, 20), "the vocabulary in place of the width"
    assert layers["gate"]["kernel"].shard_shape((8, 20, 24)) == (8, 20, 3)
    assert layers["key"]["kernel"].shard_shape((8, 20, 1, 16)) == (8, 20, 1, 2)
    scale = state.params["layers"]["mlp_norm"]["scale"].shape
    assert layers["mlp_norm"]["scale"].shard_shape(scale) == scale == (8, 20), "layers and vectors stay whole"
    adam = jax.tree.leaves(shardings.opt_state, is_leaf=lambda x: isinstance(x, NamedSharding))
    assert sum(s.spec == layers["gate"]["kernel"].spec for s in adam) >= 2, "both moments lie as their parameter does"


def test_nothing_is_split_where_no_dimension_divides():
    config = TransformerConfig(embed_dim=20, num_layers=2, num_heads=5, num_kv_heads=5, head_dim=6, mlp_dim=30)
    _, shardings = Eight.shardings(config, 63)
    assert all(s.is_fully_replicated for s in jax.tree.leaves(shardings))


def equations(jaxpr):
    """All equations of a jaxpr, those of inner ones among them."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_bfloat16_is_for_products_alone(small_run, batch, remat):
    config = TransformerConfig(
        embed_dim=20, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=6, mlp_dim=24, dtype="bfloat16", remat=remat
    )
    model, optimizer = Transformer(config, small_run.tokenizer.vocab_size), OptimizerConfig().transformation(10)
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), steps.MESH_AXES)
    state, shardings = steps.abstract_state(model, optimizer, mesh)
    assert {x.dtype for x in jax.tree.leaves((state.params, state.opt_state))} <= {jnp.dtype(d) for d in ("f4", "i4")}
    step = steps.make_train_step(model, LossConfig(chunk=16), optimizer, 0, mesh, shardings)
    shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}
    found = list(equations(jax.make_jaxpr(step)(state, shapes).jaxpr))

    def types(*primitives):
        return {str(e.invars[0].aval.dtype) for e in found if e.primitive.name in primitives}

    assert types("exp", "log", "rsqrt", "logistic") <= {"float32"}, "softmax, norms and losses"
    assert types("reduce_max", "argmax") <= {"float32", "int32"}
    products = [e for e in found if e.primitive.name == "dot_general"]
    narrow = [e for e in products if str(e.invars[0].aval.dtype) == "bfloat16"]
    assert len(narrow) > 20, "projections, attention, MLP and vocabulary"
    wide = [e for e in products if str(e.invars[0].aval.dtype) == "float32"]
    others = [e for e in wide if 20 not in (*e.invars[0].aval.shape, *e.invars[1].aval.shape)]
    assert wide and not others, "pooling and the contrastive scores alone"


@pytest.mark.parametrize("rows", [None, PartitionSpec(steps.MESH_AXES[:3])])
def test_a_mesh_of_one_device_changes_no_loss(batch, rows):
    from calrec_jax.losses import weighted_token_loss

    rng = np.random.default_rng(0)
    hidden, table = jnp.asarray(rng.normal(size=(8, 128, 6)), jnp.float32), jnp.asarray(rng.normal(size=(50, 6)))
    targets, weights = batch["decoder_target_tokens"] % 50, batch["decoder_loss_weights"]
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), steps.MESH_AXES)
    where = None if rows is None else NamedSharding(mesh, rows)
    logits = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], 2)[..., 0]
    got = weighted_token_loss(hidden, table.astype(jnp.float32), targets, weights, 16, rows=where)
    np.testing.assert_allclose(got, (losses * weights).sum(), rtol=1e-5)
