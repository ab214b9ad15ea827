"""Attention of packed rows and its gradient against sums query by query in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calrec_jax.models import packed_attention as module
from calrec_jax.models.layers import Linear
from calrec_jax.models.packed_attention import farthest, first_key, lookbacks, packed_attention


def reference(query, key, value, segments, d_output, window=None, cap=None):
    """(output, gradients of query, key and value), one query after the other."""
    query, key, value, d_output = (np.asarray(x, np.float64) for x in (query, key, value, d_output))
    group = query.shape[2] // key.shape[2]
    output, grads = np.zeros_like(query), [np.zeros_like(x) for x in (query, key, value)]
    for b, place, head in np.ndindex(*query.shape[:3]):
        seen = [
            s for s in range(place + 1)
            if segments[b, s] == segments[b, place] and (window is None or place - s < window)
        ]  # fmt: skip
        keys, values = key[b, seen, head // group], value[b, seen, head // group]
        raw = keys @ query[b, place, head]
        scores = raw if cap is None else cap * np.tanh(raw / cap)
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        output[b, place, head] = weights @ values
        d_weights = values @ d_output[b, place, head]
        d_raw = weights * (d_weights - weights @ d_weights)
        if cap is not None:
            d_raw = d_raw * (1 - np.tanh(raw / cap) ** 2)
        grads[0][b, place, head] += d_raw @ keys
        grads[1][b, seen, head // group] += np.outer(d_raw, query[b, place, head])
        grads[2][b, seen, head // group] += np.outer(weights, d_output[b, place, head])
    return output, *grads


@pytest.mark.parametrize("block", [4, 7, 32])
@pytest.mark.parametrize(
    ("heads", "groups", "window", "local", "cap"),
    [
        (2, 2, None, False, None),
        (4, 2, None, False, 1.5),
        (6, 2, 5, True, None),
        (4, 1, 3, True, 2.0),
        (4, 2, 6, "traced", None),
        (4, 2, 6, "not", 2.0),
    ],
)
def test_output_and_gradients_equal_sums_in_float64(block, heads, groups, window, local, cap):
    rng = np.random.default_rng(heads * 10 + block)
    batch, length, width = 2, 19, 4
    query, d_output = (rng.normal(size=(batch, length, heads, width)).astype(np.float32) for _ in range(2))
    key, value = (rng.normal(size=(batch, length, groups, width)).astype(np.float32) for _ in range(2))
    segments = np.sort(rng.integers(1, 4, (batch, length)), axis=1)
    segments[0, -4:] = 0
    d_output *= (segments > 0)[..., None, None]  # what padding gives means nothing

    def run(query, key, value, is_local):
        kind = is_local if local in ("traced", "not") else local
        ids = jnp.asarray(segments)
        return packed_attention(query, key, value, ids, block, window=window, local=kind, soft_cap=cap)

    output, pull = jax.jit(lambda *x: jax.vjp(lambda q, k, v: run(q, k, v, x[3]), *x[:3]))(
        query, key, value, jnp.asarray(local == "traced")
    )
    expected = reference(query, key, value, segments, d_output, window if local in (True, "traced") else None, cap)
    real = segments > 0
    np.testing.assert_allclose(np.asarray(output)[real], expected[0][real], atol=2e-6)
    for got, wanted in zip(jax.jit(pull)(jnp.asarray(d_output)), expected[1:], strict=True):
        np.testing.assert_allclose(got, wanted, atol=5e-6)
    assert np.isfinite(output).all(), "padding means nothing, and is not NaN"


def test_scores_beyond_the_range_of_exponentials_stay_finite():
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(1, 8, 1, 4)) * 300, jnp.float32) for _ in range(3))
    segments = jnp.ones((1, 8), jnp.int32)
    grads = jax.grad(lambda *x: jnp.sum(packed_attention(*x, segments, 4)), (0, 1, 2))(query, key, value)
    assert all(np.isfinite(g).all() for g in grads)


def test_bfloat16_comes_and_goes_as_such():
    rng = np.random.default_rng(1)
    wide = [jnp.asarray(rng.normal(size=(2, 16, 2, 8)), jnp.float32) for _ in range(3)]
    segments = jnp.ones((2, 16), jnp.int32)

    def gradient(dtype):
        inputs = [x.astype(dtype) for x in wide]
        return jax.grad(lambda *x: jnp.sum(jnp.sin(packed_attention(*x, segments, 8).astype(jnp.float32))), (0, 1, 2))(
            *inputs
        )

    for narrow, exact in zip(gradient(jnp.bfloat16), gradient(jnp.float32), strict=True):
        assert narrow.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(narrow, np.float32), exact, atol=0.04, rtol=0.04)


def test_keys_before_a_windows_first_place_are_left_out():
    assert [first_key(begin, 5) for begin in (0, 4, 5, 16)] == [0, 0, 1, 12]
    assert first_key(16, None) == 0


@pytest.mark.parametrize(("inputs", "outputs"), [((3,), (5,)), ((7,), (2,)), ((4,), (2, 3)), ((2, 4), (3,))])
def test_a_linears_gradients_are_products_in_float64(inputs, outputs):
    """Either operand of the kernel's gradient may be the smaller one."""
    rng = np.random.default_rng(len(inputs))
    linear = Linear((*inputs, *outputs), ("embed",) * (len(inputs) + len(outputs)), len(inputs))
    x, d_y = (jnp.asarray(rng.normal(size=(2, 6, *shape)), jnp.float32) for shape in (inputs, outputs))
    params = jax.tree.map(lambda p: p.value, linear.init(jax.random.key(0), x), is_leaf=lambda p: hasattr(p, "value"))
    y, pull = jax.vjp(lambda p, x: linear.apply(p, x), params, x)
    grads, d_x = pull(d_y)
    kernel = np.asarray(params["params"]["kernel"], np.float64)
    flat, flat_d = (np.asarray(a, np.float64).reshape(12, -1) for a in (x, d_y))
    matrix = kernel.reshape(flat.shape[1], -1)
    np.testing.assert_allclose(y, (flat @ matrix).reshape(2, 6, *outputs), atol=1e-5)
    np.testing.assert_allclose(grads["params"]["kernel"], (flat.T @ flat_d).reshape(kernel.shape), atol=1e-5)
    np.testing.assert_allclose(d_x, (flat_d @ matrix.T).reshape(x.shape), atol=1e-5)


@pytest.mark.parametrize(("longest", "step"), [(3, 0), (4, 0), (5, 1), (8, 1), (9, 2), (17, 2)])
@pytest.mark.parametrize(("window", "local"), [(None, False), (6, True)])
def test_long_rows_leave_out_what_no_segment_reaches(longest, step, window, local, monkeypatch):
    """Blocks of 2 in rows of 24: keys up to 4 places back, up to 8, or all."""
    monkeypatch.setattr(module, "_LONG", 16)
    assert lookbacks(24, 2) == (4, 8)
    rng = np.random.default_rng(longest)
    segments = np.stack(
        [np.r_[np.repeat([1, 2, 3], 2), np.full(longest, 4)], np.repeat([1, 2, 3], [2, 3, 1 + longest])]
    )
    segments = np.pad(segments, ((0, 0), (0, 26)))[:, :24]
    far = int(farthest(jnp.asarray(segments)))
    assert far == max(np.bincount(row[row > 0]).max() for row in segments) - 1
    assert sum(far > s for s in (4, 8)) == step
    query, d_output = (rng.normal(size=(2, 24, 4, 4)).astype(np.float32) for _ in range(2))
    key, value = (rng.normal(size=(2, 24, 2, 4)).astype(np.float32) for _ in range(2))
    d_output *= (segments > 0)[..., None, None]
    ids = jnp.asarray(segments)
    output, pull = jax.vjp(lambda *x: packed_attention(*x, ids, 2, window=window, local=local), query, key, value)
    expected = reference(query, key, value, segments, d_output, window)
    np.testing.assert_allclose(np.asarray(output)[segments > 0], expected[0][segments > 0], atol=2e-6)
    for got, wanted in zip(pull(jnp.asarray(d_output)), expected[1:], strict=True):
        np.testing.assert_allclose(got, wanted, atol=5e-6)
