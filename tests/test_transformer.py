"""The decoder against a float64 NumPy one, packed against unpacked, and step by step against the whole."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calrec_jax.errors import CalrecError
from calrec_jax.models.attention import Cells
from calrec_jax.models.transformer import Transformer, TransformerConfig, empty_suffix

SMALL = TransformerConfig(embed_dim=24, num_layers=2, num_heads=6, num_kv_heads=2, mlp_dim=40, attention_block=4)
VOCAB = 29


def build(config=SMALL, seed=0):
    model = Transformer(config, VOCAB)
    tokens = jnp.zeros((1, 4), jnp.int32)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(seed), tokens, tokens, tokens + 1)["params"])
    # Norm scales away from 1, so that a forgotten one shows.
    params = jax.tree_util.tree_map_with_path(
        lambda path, a: a + 0.3 * jax.random.normal(jax.random.key(7), a.shape) if path[-1].key == "scale" else a,
        params,
    )
    return model, params


@functools.partial(jax.jit, static_argnames=("model", "method"))
def apply(model, params, *arguments, method="__call__"):
    """Jitted: op by op, a pass takes a hundred times as long."""
    return model.apply({"params": params}, *arguments, method=method)


def packed_case(seed=0, rows=2, length=13):
    """Rows of two segments and padding; the second row starts its second segment elsewhere."""
    rng = np.random.default_rng(seed)
    segments, positions = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    for b in range(rows):
        cut, end = 5 + b, length - 1 - b
        segments[b, :cut], segments[b, cut:end] = 1, 2
        positions[b, :cut], positions[b, cut:end] = range(cut), range(end - cut)
    return rng.integers(0, VOCAB, (rows, length)).astype(np.int32), positions, segments


def reference_hidden(params, config, tokens):
    """One unpacked sequence [L], layer by layer and head by head, float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    norm = lambda x, scale: x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_epsilon) * scale  # noqa: E731
    width, length = config.head_width, len(tokens)
    x = p["embedding"][tokens] * np.sqrt(config.embed_dim)
    angle = np.arange(length)[:, None] * config.rope_base ** (-np.arange(0, width, 2) / width)

    def rope(v):  # [L, C]
        a, b = v[:, : width // 2], v[:, width // 2 :]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], 1)

    for i in range(config.num_layers):
        layer = jax.tree.map(lambda a, i=i: a[i], p["layers"])
        n, out = norm(x, layer["attention_norm"]["scale"]), 0.0
        for h in range(config.num_heads):
            g = h // (config.num_heads // config.num_kv_heads)
            q = rope(n @ layer["query"]["kernel"][:, h]) / np.sqrt(width)
            k, v = rope(n @ layer["key"]["kernel"][:, g]), n @ layer["value"]["kernel"][:, g]
            scores = np.where(np.tri(length, dtype=bool), q @ k.T, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out += weights / weights.sum(-1, keepdims=True) @ v @ layer["output"]["kernel"][h]
        x = x + out
        n = norm(x, layer["mlp_norm"]["scale"])
        gate = n @ layer["gate"]["kernel"]
        if config.activation == "gelu":
            gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        else:
            gate = gate / (1 + np.exp(-gate))
        x = x + (gate * (n @ layer["up"]["kernel"])) @ layer["down"]["kernel"]
    return norm(x, p["final_norm"]["scale"])


@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("scan", [True, False])
def test_packed_rows_equal_the_float64_reference_of_each_sequence(activation, scan):
    config = dataclasses.replace(SMALL, activation=activation, scan_layers=scan)
    model, params = build(config)
    tokens, positions, segments = packed_case()
    hidden = apply(model, params, tokens, positions, segments, method="activations")
    logits = apply(model, params, tokens, positions, segments)
    for b in range(2):
        for segment in (1, 2):
            places = segments[b] == segment
            expected = reference_hidden(params, config, tokens[b][places])
            np.testing.assert_allclose(hidden[b][places], expected, atol=2e-5)
            np.testing.assert_allclose(
                logits[b][places], expected @ np.asarray(params["embedding"], np.float64).T, atol=2e-5
            )


@functools.cache
def value_and_gradient(config):
    """Of a scalar of the logits at the real places, with the parameters of SMALL."""
    model, case = Transformer(config, VOCAB), packed_case()

    def loss(params):
        return jnp.sum(jnp.sin(model.apply({"params": params}, *case)) * (case[2] > 0)[..., None])

    return jax.jit(jax.value_and_grad(loss))(build()[1])


@pytest.mark.parametrize(
    ("remat", "scan", "block"),
    [("none", False, 3), ("dots", True, 64), ("dots", False, 3), ("full", True, 3), ("full", False, 64)],
)
def test_runtime_settings_change_neither_values_nor_gradients(remat, scan, block):
    got = value_and_gradient(dataclasses.replace(SMALL, remat=remat, scan_layers=scan, attention_block=block))
    expected = value_and_gradient(SMALL)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)


def test_decoding_step_by_step_equals_the_whole_sequence():
    model, params = build()
    rng = np.random.default_rng(3)
    users, samples, prefix_length, steps = 2, 3, 6, 4
    lengths = np.array([6, 4])
    prompt = rng.integers(0, VOCAB, (users, prefix_length)).astype(np.int32)
    suffix_tokens = rng.integers(0, VOCAB, (users, samples, steps)).astype(np.int32)
    places = np.arange(prefix_length)[None]
    mask = places < lengths[:, None]
    positions = np.where(mask, places, 0).astype(np.int32)
    _, prefix = apply(model, params, prompt, positions, mask.astype(np.int32), method="prefill")
    flat = suffix_tokens.reshape(users * samples, steps)
    at = np.repeat(lengths, samples)[:, None] + np.arange(steps, dtype=np.int32)
    cells = Cells(np.array([[0, 2, 4], [1, 3, 5]]), np.array([0, 3, 1, 4, 2, 5]))  # rows by sample, not by user
    expected = np.array(
        [
            [reference_hidden(params, SMALL, [*prompt[b, : lengths[b]], *suffix_tokens[b, n]])[-steps:]
             for n in range(samples)] for b in range(users)
        ]
    ).reshape(users * samples, steps, -1)  # fmt: skip

    def run(rows, cells):
        suffix, out = empty_suffix(SMALL, len(flat), steps), []
        for step in range(steps):
            written = np.arange(steps)[None, None] <= step
            now = (flat[rows, step : step + 1], at[rows, step : step + 1], jnp.int32(step))
            hidden, suffix = apply(model, params, *now, prefix, mask, suffix, written, cells, method="decode")
            out.append(hidden[:, 0])
        return np.stack(out, axis=1)

    np.testing.assert_allclose(run(slice(None), None), expected, atol=3e-5)
    by_sample = cells.cell_of
    np.testing.assert_allclose(run(by_sample, cells), expected[by_sample], atol=3e-5)
    # All tokens at once, and the last two behind the first two.
    causal = np.tri(steps, dtype=bool)[None]
    none = empty_suffix(SMALL, len(flat), 0)
    whole, _ = apply(model, params, flat, at, None, prefix, mask, none, causal, method="decode")
    np.testing.assert_allclose(whole, expected, atol=3e-5)
    _, half = apply(model, params, flat[:, :2], at[:, :2], None, prefix, mask, none, causal[:, :2, :2], method="decode")
    rest, _ = apply(model, params, flat[:, 2:], at[:, 2:], None, prefix, mask, half, causal[:, 2:], method="decode")
    np.testing.assert_allclose(rest, expected[:, 2:], atol=3e-5)


def test_logits_of_chosen_tokens():
    model, params = build()
    rng = np.random.default_rng(4)
    hidden = rng.normal(size=(5, SMALL.embed_dim)).astype(np.float32)
    tokens = rng.integers(0, VOCAB, (5, 3))
    whole = apply(model, params, hidden, method="logits")
    chosen = apply(model, params, hidden, tokens, method="logits_of")
    np.testing.assert_allclose(chosen, np.take_along_axis(np.asarray(whole), tokens, 1), atol=1e-5)


def test_dropout_acts_in_training_only():
    model, params = build(dataclasses.replace(SMALL, dropout_rate=0.3, scan_layers=False))
    case = packed_case()

    @functools.partial(jax.jit, static_argnames="deterministic")
    def apply_with_rng(params, key, deterministic):  # parameters as arguments: as constants they round differently
        return model.apply(
            {"params": params}, *case, rngs={"dropout": key}, method="activations", deterministic=deterministic
        )

    run = functools.partial(apply_with_rng, params)
    still = apply(model, params, *case, method="activations")
    one, same, two = (run(jax.random.key(k), deterministic=False) for k in (1, 1, 2))
    assert (one == same).all() and (one != two).any() and (one != still).any()
    assert (run(jax.random.key(1), deterministic=True) == still).all()


def test_bfloat16_computes_close_and_keeps_parameters_float32():
    model, params = build(dataclasses.replace(SMALL, dtype="bfloat16"))
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    hidden = apply(model, params, *packed_case(), method="activations")
    assert hidden.dtype == jnp.bfloat16
    exact = apply(build()[0], params, *packed_case(), method="activations")
    assert float(jnp.abs(hidden - exact).max()) < 0.25
    assert float(jnp.abs(hidden - exact).mean()) < 0.02


def test_parameters_carry_t5x_names():
    model = Transformer(SMALL, VOCAB)
    tokens = jnp.zeros((1, 4), jnp.int32)
    boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, tokens, tokens)["params"])
    specs = nn.get_partition_spec(boxed)
    assert tuple(specs["embedding"]) == ("vocab", "embed")
    assert tuple(specs["layers"]["query"]["kernel"]) == ("layers", "embed", "heads", "kv")
    assert tuple(specs["layers"]["down"]["kernel"]) == ("layers", "mlp", "embed")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads=4: must be a multiple of num_kv_heads=3"),
        ({"embed_dim": 30, "num_heads": 4}, "embed_dim=30: must divide by num_heads=4"),
        ({"head_dim": 5}, "head_dim=5: rotary embeddings need an even head_dim"),
        ({"activation": "relu"}, "activation='relu': must be one of"),
        ({"remat": "some"}, "remat='some': must be one of"),
        ({"dtype": "float16"}, "dtype='float16': must be"),
        ({"attention_pattern": ("local",)}, "sliding_window=None: attention_pattern has local layers"),
        ({"attention_pattern": ("near",)}, r"attention_pattern=\('near',\): must be kinds of layers"),
        ({"rope_scaling": "yarn"}, r"rope_scaling='yarn': must be one of \['none', 'linear', 'llama3'\]"),
        ({"rope_scaling": "linear", "rope_factor": 0.0}, "rope_factor=0.0: must be above 0"),
        ({"rope_scaling": "llama3", "rope_low_frequency": 5.0}, "rope_low_frequency=5.0: must be above 0 and below"),
        ({"logit_soft_cap": 0.0}, "logit_soft_cap=0.0: must be above 0, or None"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(CalrecError, match=message):
        TransformerConfig(**settings)


def test_settings_that_came_later_are_left_out_of_artefacts_at_their_default():
    """So that manifests and checkpoints from before them stay what they were."""
    first = dataclasses.asdict(SMALL)
    later = {name for name in first if name not in SMALL.described()}
    assert {"sliding_window", "qk_norm", "tied_embeddings", "rope_scaling"} <= later
    assert {"embed_dim", "head_dim", "dropout_rate", "attention_block"} <= {*SMALL.described()}
    old = {name: value for name, value in first.items() if name not in later}
    assert TransformerConfig.from_described(old) == SMALL
    wide = dataclasses.replace(SMALL, attention_pattern=("local", "global"), sliding_window=4, qk_norm=True)
    assert {*wide.described()} - {*old} == {"attention_pattern", "sliding_window", "qk_norm"}
    assert TransformerConfig.from_described(wide.described()) == wide
    assert TransformerConfig.from_described(old | {"unknown": 1}) is None
    assert TransformerConfig.from_described({"embed_dim": 3}) is None
    assert dataclasses.replace(SMALL, head_dim=4).settings() == SMALL.settings(), (
        "what follows from another is equal to it"
    )
