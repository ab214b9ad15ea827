"""Splash attention, interpreted on CPU, against a slow reference; and which implementation is taken."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from calrec_jax.errors import CalrecError
from calrec_jax.models import attention_kernels
from calrec_jax.models.attention_kernels import Scope, splash_attention
from calrec_jax.models.packed_attention import packed_attention
from calrec_jax.models.transformer import Transformer, TransformerConfig
from calrec_jax.train.step import MESH_AXES


def rows_of(rng, length, heads, groups, width=8, batch=2):
    q, k, v = (jnp.asarray(rng.normal(size=(batch, length, n, width)), jnp.float32) for n in (heads, groups, groups))
    segments = np.sort(rng.integers(1, 6, (batch, length)), axis=1)
    segments[:, length - 9 :] = 0  # padding
    return q, k, v, jnp.asarray(segments, jnp.int32)


def reference(q, k, v, segments, scope):
    """Place by place, in float64."""
    q, k, v, segments = (np.asarray(x, np.float64) for x in (q, k, v, segments))
    out = np.zeros_like(q)
    batch, length, heads, _ = q.shape
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // k.shape[2])
            for i in range(length):
                first = 0 if scope.window is None else max(0, i + 1 - scope.window)
                seen = [j for j in range(first, i + 1) if segments[b, j] == segments[b, i]]
                scores = k[b, seen, g] @ q[b, i, h]
                scores = scores if scope.soft_cap is None else scope.soft_cap * np.tanh(scores / scope.soft_cap)
                weights = np.exp(scores - scores.max())
                out[b, i, h] = weights @ v[b, seen, g] / weights.sum()
    return out


@pytest.mark.parametrize(
    ("length", "heads", "groups", "scope"),
    [
        (128, 2, 2, Scope()),
        (256, 4, 2, Scope()),
        (256, 4, 1, Scope(window=40)),
        (128, 2, 1, Scope(soft_cap=1.5)),
        (384, 2, 1, Scope(window=150, soft_cap=3.0)),
    ],
)
def test_the_kernel_equals_a_sum_place_by_place(length, heads, groups, scope):
    q, k, v, segments = rows_of(np.random.default_rng(length + heads), length, heads, groups)
    got = splash_attention(q, k, v, segments, scope)
    real = np.asarray(segments) > 0
    np.testing.assert_allclose(np.asarray(got)[real], reference(q, k, v, segments, scope)[real], atol=2e-5)
    assert np.isfinite(got).all(), "padding means nothing, and is not NaN"


def test_the_kernels_gradient_is_that_of_xlas_attention():
    q, k, v, segments = rows_of(np.random.default_rng(0), 256, 4, 2)
    real = (segments > 0)[..., None, None]

    def gradient(function):
        return jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(function(*x)) * real), argnums=(0, 1, 2)))(q, k, v)

    kernel = gradient(lambda q, k, v: splash_attention(q, k, v, segments))
    plain = gradient(lambda q, k, v: packed_attention(q, k, v, segments, 64))
    for one, other in zip(kernel, plain, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_a_model_gives_the_same_by_either():
    config = TransformerConfig(embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=24, attention="xla")
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(0, 30, (2, 128)), jnp.int32)
    segments = jnp.asarray(np.sort(rng.integers(1, 4, (2, 128)), axis=1), jnp.int32)
    params = Transformer(config, 30).init(jax.random.key(0), tokens, tokens, segments)

    def hidden(setting):
        model = Transformer(dataclasses.replace(config, attention=setting), 30)
        return model.apply(params, tokens, tokens, segments, method="activations")

    np.testing.assert_allclose(hidden("splash"), hidden("xla"), atol=2e-5)
    np.testing.assert_array_equal(hidden("auto"), hidden("xla"), err_msg="on a CPU")


@pytest.mark.parametrize(
    ("setting", "platform", "length", "taken"),
    [
        ("auto", "tpu", 1280, True),
        ("auto", "tpu", 1000, False),
        ("auto", "cpu", 1280, False),
        ("xla", "tpu", 1280, False),
        ("splash", "cpu", 1280, True),
    ],
)
def test_which_one_is_taken(setting, platform, length, taken, monkeypatch):
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), MESH_AXES)
    rows = NamedSharding(mesh, PartitionSpec(MESH_AXES[:3]))
    assert attention_kernels._platform(rows) == attention_kernels._platform(None) == "cpu"
    monkeypatch.setattr(attention_kernels, "_platform", lambda rows: platform)
    assert attention_kernels.takes_splash(setting, rows, length) is taken


def test_rows_that_no_block_divides_are_named():
    with pytest.raises(CalrecError, match=r"attention='splash': rows of 200 tokens do not divide by 128; set"):
        attention_kernels.takes_splash("splash", None, 200)
    with pytest.raises(CalrecError, match="attention='flash': must be one of"):
        TransformerConfig(attention="flash")


@pytest.mark.parametrize(("length", "window"), [(128, None), (1280, None), (1280, 300), (1024, 512), (1024, 1)])
def test_visited_pairs_are_those_of_the_kernels_own_mask(length, window):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    block = attention_kernels.block_of(length)
    assert length % block == 0 and block % 128 == 0
    square = (length, length)
    mask = masks.CausalMask(square) if window is None else masks.LocalMask(square, (window - 1, 0), 0)
    blocks = mask[:, :].reshape(length // block, block, length // block, block)
    assert attention_kernels.visited_pairs(length, window) == blocks.any((1, 3)).sum() * block * block


def test_a_kernels_operations_follow_from_its_name_and_query():
    operands = [(1, 5, 5), (2, 4, 1280, 32), (2, 4, 1280, 32)]
    pairs = attention_kernels.visited_pairs(1280)
    for name, products in (("splash_mha_fwd_segmented.1", 2), ("splash_mha_dkv_x", 4), ("splash_mha_dq.7", 3)):
        assert attention_kernels.kernel_flops(name, operands) == products * 2 * 2 * 4 * 32 * pairs
    assert attention_kernels.kernel_flops("custom-call.3", [(5,)]) == 0


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("setting", ["xla", "splash"])
def test_a_scanned_layer_of_either_kind_is_told_on_the_device(setting, local):
    """As in models whose layers alternate: the kind is a traced scalar."""
    q, k, v, segments = rows_of(np.random.default_rng(3), 128, 2, 1)
    run = jax.jit(
        lambda local: attention_kernels.packed_attention(
            q, k, v, segments, 64, window=20, local=local, soft_cap=2.0, setting=setting
        )
    )
    real = np.asarray(segments) > 0
    expected = reference(q, k, v, segments, Scope(20 if local else None, 2.0))
    np.testing.assert_allclose(np.asarray(run(jnp.asarray(local)))[real], expected[real], atol=2e-5)
