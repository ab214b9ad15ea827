"""Adapters: what is trained, saved, merged and exported; and that nothing else moves."""

import dataclasses
import itertools
import json
import shutil

import flax.linen as nn
import gin
import hf_folders
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from calrec_jax.decode.run import decode
from calrec_jax.errors import CalrecError
from calrec_jax.models.transformer import Transformer, TransformerConfig
from calrec_jax.pipeline import Line
from calrec_jax.pretrained.export_hf import export_hf
from calrec_jax.pretrained.import_hf import import_hf
from calrec_jax.tokenizer import Tokenizer
from calrec_jax.train import checkpoints as ckpt
from calrec_jax.train import lora
from calrec_jax.train.loop import train
from calrec_jax.train.lora import LoraConfig

pytest.importorskip("qwix")
SIZES = {"embed_dim": 16, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 24}
SETTINGS = """
train.num_steps = 6
train.eval_every = 3
train.eval_users = 8
Batching.batch_rows = 2
Batching.row_tokens = 420
Batching.max_history_tokens = 300
Batching.max_target_tokens = 40
Batching.row_examples = 3
OptimizerConfig.learning_rate = 1e-2
LoraConfig.rank = 2
"""


def adapted_case(config, rank=2, modules=lora.MODULES):
    """A model, its adapted one, and parameters whose adapters do something."""
    lora_config = LoraConfig(rank=rank, alpha=3.0, modules=modules)
    model = Transformer(config, 31)
    adapted = lora.adapted(model, lora_config)
    tokens = jnp.zeros((1, 4), jnp.int32)
    params = nn.unbox(jax.jit(adapted.init)(jax.random.key(0), tokens, tokens, tokens + 1)["params"])
    adapters = jax.tree.map(lambda x: x + 0.2, lora.adapters_of(params))
    base = nn.unbox(jax.jit(model.init)(jax.random.key(0), tokens, tokens, tokens + 1)["params"])
    return model, adapted, base, adapters, lora_config


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("modules", [lora.MODULES, ("query", "down")])
def test_adapted_equals_merged_and_starts_as_the_base(scan, modules):
    config = TransformerConfig(**SIZES, scan_layers=scan, attention_pattern=("local", "global"), sliding_window=3)
    model, adapted, base, adapters, lora_config = adapted_case(config, modules=modules)
    assert {*adapters["layers"]} == {*modules}
    case = np.arange(18).reshape(2, 9) % 31, np.tile(np.arange(9), (2, 1)), np.ones((2, 9), np.int32)
    run = lambda m, p: jax.jit(m.apply)({"params": p}, *case)  # noqa: E731
    none = jax.tree.map_with_path(lambda path, x: x * (path[-1].key != "kernel_lora_b"), adapters)
    np.testing.assert_allclose(run(adapted, lora.join(base, none)), run(model, base), atol=1e-5)
    got = run(adapted, lora.join(base, adapters))
    assert np.abs(got - run(model, base)).max() > 0.1
    # float64 by hand: W + α/r · A·B, layer by layer.
    by_hand = jax.tree.map(np.asarray, base)
    for name, pair in adapters["layers"].items():
        a, b = (np.asarray(pair[k], np.float64) for k in ("kernel_lora_a", "kernel_lora_b"))
        kernel = by_hand["layers"][name]["kernel"]
        add = np.stack([(a[i] @ b[i]).reshape(kernel.shape[1:]) for i in range(config.num_layers)])
        by_hand["layers"][name]["kernel"] = (kernel + 3.0 / 2 * add).astype(np.float32)
    merged = lora.merge(jax.tree.map(jnp.array, base), adapters, lora_config)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), merged, by_hand)
    np.testing.assert_allclose(got, run(model, merged), atol=2e-5)


def test_gradients_of_adapters_are_those_of_the_merged_kernels():
    """dL/dA = α/r · dL/dW · Bᵀ, dL/dB = α/r · Aᵀ · dL/dW."""
    model, adapted, base, adapters, _ = adapted_case(TransformerConfig(**SIZES))
    case = np.arange(18).reshape(2, 9) % 31, np.tile(np.arange(9), (2, 1)), np.ones((2, 9), np.int32)

    def loss(m, p):
        return jnp.sum(jnp.sin(m.apply({"params": p}, *case)))

    got = jax.jit(jax.grad(lambda a: loss(adapted, lora.join(base, a))))(adapters)["layers"]
    merged = lora.merge(jax.tree.map(jnp.array, base), adapters, LoraConfig(rank=2, alpha=3.0))
    whole = jax.jit(jax.grad(lambda p: loss(model, p)))(merged)["layers"]
    for name in ("query", "output", "down"):
        a, b = (np.asarray(adapters["layers"][name][k], np.float64) for k in ("kernel_lora_a", "kernel_lora_b"))
        d = np.asarray(whole[name]["kernel"], np.float64).reshape(3, a.shape[1], b.shape[2])
        np.testing.assert_allclose(got[name]["kernel_lora_a"], 1.5 * d @ b.swapaxes(1, 2), rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(got[name]["kernel_lora_b"], 1.5 * a.swapaxes(1, 2) @ d, rtol=2e-3, atol=2e-3)


@pytest.fixture(scope="module")
def trained(small_run, tmp_path_factory):
    """An imported model, a stage of adapters from it, and another stage from that."""
    root = tmp_path_factory.mktemp("lora")
    hf_folders.write_folder(root / "hf", hf_folders.CONFIGS["qwen2"], family="qwen2")
    base = import_hf(root / "hf", root / "base")
    gin.clear_config()
    gin.parse_config((base / "model.gin").read_text() + SETTINGS)
    tokenizer = Tokenizer.load(base / "tokenizer")
    one = train(root / "run" / "stage1", small_run.datasets, tokenizer, init_from=base)
    two = train(root / "run" / "stage2", small_run.datasets[:1], tokenizer, init_from=one)
    gin.clear_config()
    return base, one, two, tokenizer


def saved_arrays(stage):
    with ckpt.manager(stage, read_only=True) as checkpoints:
        tree = checkpoints.item_metadata(checkpoints.latest_step()).tree
    return {jax.tree_util.keystr(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def test_the_checkpoint_and_the_optimiser_hold_adapters_alone(trained):
    base, one, _, _ = trained
    saved = saved_arrays(one)
    large = {name for name, shape in saved.items() if len(shape) > 1}
    assert large and all("_lora_" in name for name in large)
    assert any("opt_state" in name for name in large)
    size = sum(np.prod(shape) for name, shape in saved.items() if "['params']" in name)
    assert size < 0.3 * sum(x.size for x in jax.tree.leaves(ckpt.load_checkpoint(base)[1]))
    facts = json.loads((one / "model.json").read_text())
    assert facts["lora"]["rank"] == 2 and facts["origin"]["family"] == "qwen2"


def test_a_reader_gets_base_and_adapters_merged_stage_upon_stage(trained):
    base, one, two, _ = trained
    before, first, second = (ckpt.load_checkpoint(stage)[1] for stage in (base, one, two))
    assert jax.tree.structure(before) == jax.tree.structure(first) == jax.tree.structure(second)
    for name in ("query", "down"):
        kernels = [p["layers"][name]["kernel"] for p in (before, first, second)]
        assert all(np.abs(a - b).max() > 1e-4 for a, b in itertools.pairwise(kernels))
    for path in (("embedding",), ("final_norm", "scale")):
        for params in (first, second):
            x, y = before, params
            for key in path:
                x, y = x[key], y[key]
            np.testing.assert_array_equal(x, y)


def test_training_adapters_lowers_the_loss(trained):
    rows = [json.loads(line) for line in (trained[1] / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss_next_item"] for row in rows if row["split"] == "validation"]
    assert losses[-1] < losses[0]


def test_a_run_takes_the_models_tokenizer_and_refuses_another_model(trained, small_run, tmp_path):
    base, _, _, tokenizer = trained
    line = Line(run_dir=str(tmp_path), target="Tools", init_from=str(base))
    line.vocab()
    assert Tokenizer.load(line.layout.tokenizer).fingerprint == tokenizer.fingerprint
    line.vocab()  # it is there
    gin.parse_config(SETTINGS.replace("LoraConfig.rank = 2", ""))
    try:
        with pytest.raises(CalrecError, match=rf"has another model \(.*embed_dim.*\); include {base}/model.gin"):
            train(tmp_path / "stage1", small_run.datasets, tokenizer, init_from=base)
        with pytest.raises(CalrecError, match="was trained with another tokenizer"):
            train(tmp_path / "stage2", small_run.datasets, small_run.tokenizer, init_from=base)
        with pytest.raises(CalrecError, match=r"was imported and not trained yet; name it in run\.init_from"):
            decode(tmp_path / "decoded", small_run.datasets[0], tokenizer, base, split="test", mode="sample")
    finally:
        gin.clear_config()


def test_completions_of_an_imported_and_adapted_model(trained, small_run, tmp_path):
    _, _, two, tokenizer = trained
    dataset = small_run.datasets[0]
    out = decode(
        tmp_path / "decoded", dataset, tokenizer, two, split="test", mode="constrained_beam", num_beams=4, max_users=3
    )
    rows = pq.read_table(out / "part-00000.parquet").to_pylist()
    assert len(rows) == 3
    for row in rows:
        assert {*row["item_ids"]} <= {*dataset.item_ids} and len(row["item_ids"]) >= 4
        assert all(text.startswith("Title: ") for text in row["texts"])


def test_the_merged_model_is_exported(trained):
    base, _, two, _ = trained
    out = export_hf(two, two.parent / "exported", tokenizer=base / "tokenizer")
    tensors = safetensors.numpy.load_file(out / "model.safetensors")
    params = ckpt.load_checkpoint(two)[1]
    name = "model.layers.1.self_attn.q_proj.weight"
    kernel = np.asarray(params["layers"]["query"]["kernel"])[1]
    np.testing.assert_array_equal(tensors[name], kernel.reshape(kernel.shape[0], -1).T)
    assert {*tensors} == {*hf_folders.tensor_shapes(hf_folders.CONFIGS["qwen2"])}
    again = import_hf(out, two.parent / "again")
    jax.tree.map(np.testing.assert_array_equal, ckpt.load_checkpoint(again)[1], params)


def test_a_base_that_is_gone_or_another_is_named(trained, tmp_path):
    one = trained[1]
    shutil.copytree(one, tmp_path / "run" / "stage1")
    with pytest.raises(
        CalrecError, match=rf"has adapters alone, and their base is not at {tmp_path}/base; put it back"
    ):
        ckpt.load_checkpoint(tmp_path / "run" / "stage1")
    hf_folders.write_folder(tmp_path / "hf", hf_folders.CONFIGS["qwen2"], seed=1, family="qwen2")
    import_hf(tmp_path / "hf", tmp_path / "base")
    with pytest.raises(CalrecError, match="its adapters belong to another base"):
        ckpt.load_checkpoint(tmp_path / "run" / "stage1")


def test_bad_settings_are_named(small_run, tmp_path):
    with pytest.raises(CalrecError, match=r"LoraConfig\.rank=-1: must be a whole number"):
        LoraConfig(rank=-1)
    with pytest.raises(CalrecError, match=r"LoraConfig\.alpha=0: must be above 0"):
        LoraConfig(rank=1, alpha=0)
    with pytest.raises(CalrecError, match=r"LoraConfig\.modules=\('embedding',\): must be some of \['query'"):
        LoraConfig(rank=1, modules=("embedding",))
    gin.parse_config(SETTINGS)
    try:
        with pytest.raises(CalrecError, match=r"LoraConfig\.rank=2: there is no base to adapt; set run\.init_from"):
            train(tmp_path / "stage1", small_run.datasets, small_run.tokenizer)
    finally:
        gin.clear_config()
    assert not (tmp_path / "stage1").exists()
    assert dataclasses.replace(LoraConfig(), rank=0).settings() == {}
