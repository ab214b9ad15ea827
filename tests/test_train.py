"""The trainer: a step against plain AdamW, resuming, stages, meshes, and its messages."""

import dataclasses
import json
import re
import shutil

import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from calrec_jax import artifacts
from calrec_jax.data.packing import PackedStream
from calrec_jax.errors import CalrecError
from calrec_jax.losses import LossConfig, calrec_loss
from calrec_jax.models.transformer import Transformer, TransformerConfig
from calrec_jax.train import checkpoints as ckpt
from calrec_jax.train import feed, memory, validation
from calrec_jax.train import step as steps
from calrec_jax.train.batching import Batching
from calrec_jax.train.feed import training_batch
from calrec_jax.train.loop import train
from calrec_jax.train.optimizer import OptimizerConfig

SETTINGS = """
TransformerConfig.embed_dim = 16
TransformerConfig.num_layers = 2
TransformerConfig.num_heads = 2
TransformerConfig.num_kv_heads = 1
TransformerConfig.mlp_dim = 24
TransformerConfig.dropout_rate = 0.1
Batching.batch_rows = 4
Batching.row_tokens = 256
Batching.row_examples = 4
Batching.max_history_tokens = 120
Batching.max_target_tokens = 24
Batching.next_item_loss = "all"
Batching.forced_token_weight = 0.5
Batching.sample_forced_tokens = True
train.num_steps = 6
train.eval_every = 3
train.checkpoint_every = 1
train.log_every = 2
"""


@pytest.fixture(autouse=True)
def settings():
    gin.clear_config()
    gin.parse_config(SETTINGS)
    yield
    gin.clear_config()


@pytest.fixture(scope="module")
def finished(small_run, tmp_path_factory):
    """A stage trained in one go."""
    gin.clear_config()
    gin.parse_config(SETTINGS)
    out = tmp_path_factory.mktemp("finished") / "stage1"
    return train(out, small_run.datasets, small_run.tokenizer)


def parameters(stage, which="latest"):
    return ckpt.load_checkpoint(stage, which)[1]


def assert_same(one, two):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), one, two)


def test_a_stage_leaves_checkpoints_facts_curves_and_a_manifest(finished, small_run):
    config, params, facts = ckpt.load_checkpoint(finished)
    assert config == TransformerConfig()
    assert facts["tokenizer"] == small_run.tokenizer.fingerprint
    assert facts["datasets"] == [d.hash for d in small_run.datasets]
    assert facts["step"] in (3, 6) and facts["max_target_tokens"] == 24
    manifest = artifacts.read_manifest(finished, kind="checkpoint")
    assert manifest["last_step"] == 6 and manifest["best_step"] == facts["step"]
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(r["split"], r["step"]) for r in rows] == [
        ("train", 2), ("validation", 3), ("train", 4), ("train", 6), ("validation", 6)
    ]  # fmt: skip
    assert manifest["best_validation_loss"] == pytest.approx(
        min(r["loss_next_item"] for r in rows if r["split"] == "validation"), rel=1e-6
    )
    assert all(np.isfinite(r["loss"]) for r in rows) and rows[0]["tokens_per_second"] > 0
    assert list((finished / "tensorboard").glob("events.*"))
    assert params["embedding"].shape == (small_run.tokenizer.vocab_size, 16)


def test_training_lowers_the_loss(small_run, tmp_path):
    gin.bind_parameter("train.num_steps", 40)
    gin.bind_parameter("train.eval_every", 20)
    gin.bind_parameter("OptimizerConfig.learning_rate", 1e-2)
    out = train(tmp_path / "stage1", small_run.datasets, small_run.tokenizer)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss_next_item"] for r in rows if r["split"] == "train"]
    assert losses[-1] < 0.7 * losses[0], losses


def test_a_second_run_is_skipped_and_the_same_seed_gives_the_same_bits(finished, small_run, tmp_path, capsys):
    train(finished, small_run.datasets, small_run.tokenizer)
    assert "is done already, skipped" in capsys.readouterr().out
    gin.bind_parameter("train.profile_steps", (1, 3))
    again = train(tmp_path / "stage1", small_run.datasets, small_run.tokenizer)
    assert_same(parameters(again), parameters(finished))
    said = capsys.readouterr().out
    assert re.search(r"train: memory: [\d.]+ GiB a device \(parameters 0.00, optimiser 0.00, step [\d.]+\)\n", said)
    assert f"train: steps 1 to 3 are traced in {again / 'profile'}" in said
    assert list((again / "profile").rglob("*.xplane.pb"))
    gin.bind_parameter("train.profile_steps", None)
    gin.bind_parameter("train.seed", 1)
    other = train(tmp_path / "other", small_run.datasets, small_run.tokenizer)
    assert (np.asarray(parameters(other)["embedding"]) != np.asarray(parameters(finished)["embedding"])).any()


def damage(folder):
    """Cuts every file that holds arrays."""
    cut = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 1000]
    assert cut, folder
    for path in cut:
        path.write_bytes(path.read_bytes()[:100])


def test_an_interrupted_stage_with_a_damaged_checkpoint_resumes_to_the_same_bits(
    finished, small_run, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "stage1"
    real = feed.training_batch

    def interrupted(stream, step, **options):
        if step == 5:
            raise KeyboardInterrupt
        return real(stream, step, **options)

    monkeypatch.setattr(feed, "training_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(out, small_run.datasets, small_run.tokenizer)
    with pytest.raises(CalrecError, match="is not complete"):
        ckpt.load_checkpoint(out)
    saved = sorted(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())
    assert saved[-2:] == [4, 5], saved
    damage(out / "checkpoints" / "5")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "spl')  # as a killed process leaves it
    monkeypatch.setattr(feed, "training_batch", real)
    train(out, small_run.datasets, small_run.tokenizer)
    said = capsys.readouterr().out
    assert "checkpoints/5: cannot be restored" in said and "falling back to step 4" in said and "at step 4" in said
    assert_same(parameters(out), parameters(finished))
    assert_same(parameters(out, "best"), parameters(finished, "best"))
    hashes = [artifacts.read_manifest(stage, kind="checkpoint")["hash"] for stage in (out, finished)]
    assert hashes[0] == hashes[1]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(r["split"], r["step"]) for r in rows] == [
        ("train", 2), ("validation", 3), ("train", 4), ("train", 6), ("validation", 6)
    ]  # fmt: skip


def test_a_half_trained_stage_of_other_settings_is_refused(small_run, tmp_path, monkeypatch):
    out = tmp_path / "stage1"

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(feed, "training_batch", stop)
    with pytest.raises(KeyboardInterrupt):
        train(out, small_run.datasets, small_run.tokenizer)
    gin.bind_parameter("OptimizerConfig.learning_rate", 1e-4)
    with pytest.raises(CalrecError, match="holds a stage begun otherwise .*optimizer.*delete the folder"):
        train(out, small_run.datasets, small_run.tokenizer)
    gin.bind_parameter("OptimizerConfig.learning_rate", 3e-3)
    with pytest.raises(CalrecError, match="made from another dataset/Office"):
        train(out, small_run.datasets[:1], small_run.tokenizer)


def test_stage_two_starts_from_stage_ones_best_parameters_with_a_fresh_optimiser(
    finished, small_run, tmp_path, monkeypatch
):
    seen = {}
    real = memory.compiled_within_memory

    class Spying:
        def __init__(self, *arguments):
            self.compiled = real(*arguments)
            self.memory_analysis = self.compiled.memory_analysis

        def __call__(self, state, batch):
            seen.setdefault("state", jax.device_get(state))
            return self.compiled(state, batch)

    monkeypatch.setattr(memory, "compiled_within_memory", Spying)
    out = train(tmp_path / "stage2", small_run.datasets[:1], small_run.tokenizer, init_from=finished)
    assert_same(seen["state"].params, jax.device_get(parameters(finished, "best")))
    assert int(seen["state"].step) == 0
    assert all((np.asarray(a) == 0).all() for a in jax.tree.leaves(seen["state"].opt_state))
    manifest = artifacts.read_manifest(out, kind="checkpoint")
    assert manifest["made_from"]["checkpoint"] == artifacts.read_manifest(finished, kind="checkpoint")["hash"]


def test_stage_two_refuses_another_model(finished, small_run, tmp_path):
    gin.bind_parameter("TransformerConfig.mlp_dim", 32)
    with pytest.raises(CalrecError, match="has another model .*mlp_dim"):
        train(tmp_path / "stage2", small_run.datasets[:1], small_run.tokenizer, init_from=finished)


def test_early_stop_ends_after_patience_also_when_the_end_was_interrupted(small_run, tmp_path, capsys, monkeypatch):
    gin.bind_parameter("train.num_steps", 30)
    gin.bind_parameter("train.eval_every", 1)
    gin.bind_parameter("train.patience", 2)
    losses = [3.0, 2.5, 2.0, 2.25, 2.125]  # the best is the third
    coming = iter(losses)
    monkeypatch.setattr(validation.Validation, "__call__", lambda *_: {"loss_next_item": next(coming)})

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "write_manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "stage1", small_run.datasets, small_run.tokenizer)
    assert "no better validation loss in 2 validations, stopped at step 5" in capsys.readouterr().out
    monkeypatch.setattr(feed, "training_batch", stop)  # nothing is left to train
    out = train(tmp_path / "stage1", small_run.datasets, small_run.tokenizer)
    manifest = artifacts.read_manifest(out, kind="checkpoint")
    assert (manifest["best_step"], manifest["last_step"], manifest["best_validation_loss"]) == (3, 5, 2.0)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["loss_next_item"] for r in rows if r["split"] == "validation"] == losses
    assert ckpt.load_checkpoint(out)[2]["step"] == 3


def step_case(small_run, dropout=0.0):
    batching = Batching()
    stream = PackedStream(
        batching.examples(small_run.datasets, small_run.tokenizer, "train"), batching.packing(), seed=0
    )
    config = dataclasses.replace(TransformerConfig(), dropout_rate=dropout)
    return Transformer(config, small_run.tokenizer.vocab_size), training_batch(
        stream, 0, sample_forced_tokens=True, seed=0
    )


def test_the_step_equals_plain_optax(small_run):
    model, batch = step_case(small_run)
    optimizer = OptimizerConfig(learning_rate=1e-2, clip_norm=0.5).transformation(10)
    mesh = steps.make_mesh()
    state, shardings = steps.init_state(model, optimizer, mesh, 0)
    params, opt_state = jax.device_get(state.params), jax.device_get(state.opt_state)
    train_step = steps.make_train_step(model, LossConfig(), optimizer, 0, mesh, shardings)

    @jax.jit
    def plain(params, opt_state):
        def loss(p):
            hidden = model.apply({"params": p}, batch["decoder_input_tokens"], batch["decoder_positions"],
                                 batch["decoder_segment_ids"], method="activations")  # fmt: skip
            return calrec_loss(hidden, p["embedding"], batch, LossConfig())[0]

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(3):
        state, metrics = train_step(state, batch)
        params, opt_state = plain(params, opt_state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), jax.device_get(state.params), params)
    assert int(state.step) == 3 and float(metrics["skipped"]) == 0


def test_a_step_without_a_finite_loss_changes_nothing_but_the_count(small_run):
    model, batch = step_case(small_run)
    optimizer, mesh = OptimizerConfig().transformation(10), steps.make_mesh()
    state, shardings = steps.init_state(model, optimizer, mesh, 0)
    before = jax.device_get(state)
    batch["decoder_loss_weights"] = np.full_like(batch["decoder_loss_weights"], np.inf)
    state, metrics = steps.make_train_step(model, LossConfig(), optimizer, 0, mesh, shardings)(state, batch)
    assert_same(jax.device_get(state.params), before.params)
    assert float(metrics["skipped"]) == 1 and int(state.step) == 1


def test_weight_decay_spares_norm_scales_and_the_schedule_warms_up():
    config = OptimizerConfig(learning_rate=0.1, warmup_fraction=0.1, weight_decay=0.5, clip_norm=0.0)
    params = {"layers": {"attention_norm": {"scale": jnp.ones((2, 3))}, "query": {"kernel": jnp.ones((2, 3, 4))}}}
    transformation = config.transformation(100)
    state = transformation.init(params)
    for _ in range(2):  # the first step's rate is 0
        updates, state = transformation.update(jax.tree.map(jnp.zeros_like, params), state, params)
    assert (updates["layers"]["attention_norm"]["scale"] == 0).all()
    assert (updates["layers"]["query"]["kernel"] < 0).all()
    schedule = config.schedule(100)
    np.testing.assert_allclose([schedule(0), schedule(5), schedule(10), schedule(100)], [0, 0.05, 0.1, 0], atol=1e-7)


def test_sampled_forced_tokens_have_the_same_expected_weight(small_run):
    batching = Batching()
    stream = PackedStream(
        batching.examples(small_run.datasets, small_run.tokenizer, "train"), batching.packing(), seed=0
    )
    weights = stream.batch(0)["decoder_loss_weights"]
    drawn = np.stack(
        [training_batch(stream, 0, sample_forced_tokens=True, seed=seed)["decoder_loss_weights"] for seed in range(300)]
    )
    assert set(np.unique(drawn)) == {0.0, 1.0} and set(np.unique(weights)) == {0.0, 0.5, 1.0}
    assert np.abs(drawn.mean(0) - weights).max() < 0.15  # five standard errors of 300 draws
    assert drawn.mean() == pytest.approx(weights.mean(), rel=0.02)


@pytest.mark.parametrize(
    ("binding", "value", "message"),
    [
        ("train.num_steps", 0, "train.num_steps=0: must be a whole number of at least 1"),
        ("train.num_steps", "many", "train.num_steps='many': must be a whole number"),
        ("train.patience", -1, "train.patience=-1: must be a whole number of at least 0"),
        ("train.log_every", 0, "train.log_every=0: must be"),
        ("train.profile_steps", (3,), r"train.profile_steps=\(3,\): must be two steps"),
        ("train.profile_steps", (3, 3), r"train.profile_steps=\(3, 3\): must be two steps"),
        ("OptimizerConfig.clip_norm", -1.0, "OptimizerConfig.clip_norm=-1.0: must be at least 0"),
        ("TransformerConfig.dropout_rate", 2.0, "TransformerConfig.dropout_rate=2.0"),
        ("TransformerConfig.embed_dim", 0, "TransformerConfig.embed_dim=0: must be at least 1"),
        ("Batching.mixture_exponent", -0.3, "Batching.mixture_exponent=-0.3: must be at least 0"),
        ("OptimizerConfig.learning_rate", 0.0, "OptimizerConfig.learning_rate=0.0: must be above 0"),
        ("OptimizerConfig.warmup_fraction", 1.0, "OptimizerConfig.warmup_fraction=1.0"),
        ("train.mesh_shape", (1, 3, 1, 1), "mesh_shape=\\(1, 3, 1, 1\\): must be"),
        ("Batching.row_tokens", 60, "row_tokens=60"),
        ("Batching.micro_batches", 3, "Batching.batch_rows=4: must divide by the mesh's 1 parts of rows times .*=3"),
    ],
)
def test_bad_settings_end_before_step_0(small_run, tmp_path, binding, value, message):
    gin.bind_parameter(binding, value)
    with pytest.raises(CalrecError, match=message):
        train(tmp_path / "stage1", small_run.datasets, small_run.tokenizer)
    assert not (tmp_path / "stage1" / "checkpoints").exists()


def test_inputs_that_do_not_belong_together_are_refused(small_run, tmp_path):
    with pytest.raises(CalrecError, match="no dataset given"):
        train(tmp_path / "stage1", [], small_run.tokenizer)
    other = dataclasses.replace(small_run.datasets[1], template="another")
    with pytest.raises(CalrecError, match="datasets of different templates: Tools .* Office"):
        train(tmp_path / "stage1", [small_run.datasets[0], other], small_run.tokenizer)
    with pytest.raises(CalrecError, match="no trained stage there"):
        ckpt.load_checkpoint(tmp_path / "nowhere")


def test_a_stage_of_another_tokenizer_is_refused(finished, small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(type(small_run.tokenizer), "fingerprint", "another")
    with pytest.raises(CalrecError, match="stage1: was trained with another tokenizer; use that one"):
        train(tmp_path / "stage2", small_run.datasets[:1], small_run.tokenizer, init_from=finished)


def test_a_dataset_without_training_examples_is_named(small_run, tmp_path):
    dataset = small_run.datasets[0]
    alone = dataclasses.replace(dataset, train_end=np.ones_like(dataset.train_end))
    with pytest.raises(CalrecError, match="train: no user of Tools has two purchases before the split"):
        train(tmp_path / "stage1", [alone], small_run.tokenizer)


def test_a_damaged_checkpoint_is_named(finished, tmp_path):
    copy = tmp_path / "stage1"
    shutil.copytree(finished, copy)
    damage(copy / "checkpoints")
    with pytest.raises(CalrecError, match="cannot be read .*delete .* and train again"):
        ckpt.load_checkpoint(copy)
