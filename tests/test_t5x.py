"""The model under T5X: parameters, losses, gradients, samples and checkpoints are ours. Skips where T5X is not."""

import functools

import flax.traverse_util
import jax
import numpy as np
import pytest

t5x_models = pytest.importorskip("t5x.models", reason="T5X is not installed (docs/t5x.md says how)")

import seqio  # noqa: E402
from decoding_reference import teacher_forced, tiny_model, write_stage  # noqa: E402
from flax.linen import partitioning as flax_partitioning  # noqa: E402
from t5x import checkpoints, partitioning, trainer, utils  # noqa: E402
from t5x import train_state as train_states  # noqa: E402

from calrec_jax import tasks  # noqa: E402
from calrec_jax.decode.prefix import Batch  # noqa: E402
from calrec_jax.decode.sampling import Sampler  # noqa: E402
from calrec_jax.errors import CalrecError  # noqa: E402
from calrec_jax.export.card import Origin  # noqa: E402
from calrec_jax.export.run import export  # noqa: E402
from calrec_jax.integrations.t5x import CalrecModel, make_optimizer, make_transformer  # noqa: E402
from calrec_jax.losses import LossConfig  # noqa: E402
from calrec_jax.train import step as steps  # noqa: E402
from calrec_jax.train.gradients import activations  # noqa: E402
from calrec_jax.train.optimizer import OptimizerConfig  # noqa: E402

LENGTHS = {"inputs": 64, "targets": 24}
LOSS, OPTIMIZER, ROWS, STEPS = LossConfig(temperature=0.2), OptimizerConfig(learning_rate=1e-2), 4, 4


@pytest.fixture(scope="module")
def parts(small_run, registries):
    """Our decoder and parameters, and T5X's model of them."""
    task = tasks.register_dataset(small_run.folders[0], small_run.tokenizer_folder, max_target_tokens=24)
    vocabulary = seqio.get_mixture_or_task(task).output_features["targets"].vocabulary
    model, params = tiny_model(small_run.tokenizer.vocab_size, attention="xla")
    ours = CalrecModel(
        make_transformer(model.config, vocabulary), vocabulary, make_optimizer(OPTIMIZER, STEPS), LOSS,
        batch_rows=ROWS, row_examples=3, num_samples=3, temperature=0.7, max_new_tokens=10, seed=5,
    )  # fmt: skip
    assert ours.module == model
    return task, model, params, ours


def batches(parts, split, pack, rows):
    config = utils.DatasetConfig(f"{parts[0]}_{'train' if pack else 'eval'}", LENGTHS, split, rows, False, 0, pack=pack)
    return utils.get_dataset(config, 0, 1, parts[3].FEATURE_CONVERTER_CLS).as_numpy_iterator()


def test_parameters_and_axes_are_ours(parts):
    _, model, _, ours = parts
    key = jax.random.key(3)
    variables = ours.get_initial_variables(key, {})
    row = np.ones((1, 8), np.int32)
    boxed = flax.traverse_util.flatten_dict(model.init(key, row, row, row)["params"])
    found = flax.traverse_util.flatten_dict(variables["params"].unfreeze(), sep="/")
    assert set(found) == {"/".join(path) for path in boxed}
    names = flax.traverse_util.flatten_dict(flax_partitioning.get_axis_names(variables["params_axes"]), sep="/")
    for path, box in boxed.items():
        np.testing.assert_array_equal(found["/".join(path)], box.value)
        assert tuple(names["/".join(path)]) == tuple(box.names), path


def state_of(parts, params):
    ours = parts[3]
    variables = ours.get_initial_variables(jax.random.key(0), {}).unfreeze() | {"params": params}
    return train_states.FlaxOptimTrainState.create(ours.optimizer_def, variables)


def test_the_same_batches_give_the_same_training(parts):
    """T5X's own accumulation and update, beside our training step: losses and parameters after four steps."""
    task, model, params, ours = parts
    theirs = state_of(parts, params)
    mesh = steps.make_mesh()
    optimizer = OPTIMIZER.transformation(STEPS)
    state, shardings = steps.init_state(model, optimizer, mesh, 0)
    state = state.replace(params=jax.tree.map(np.array, params))
    step = steps.make_train_step(model, LOSS, optimizer, 0, mesh, shardings, 1)
    update = jax.jit(
        functools.partial(
            trainer.train_with_lr, learning_rate=0.0, model=ours, num_microbatches=None, dropout_rng=jax.random.key(0)
        )
    )
    found = batches(parts, "train", True, ROWS)
    for _, batch in zip(range(STEPS), found, strict=False):
        theirs, metrics = update(theirs, batch)
        state, sums = step(state, batch)
        for name in ("loss", "loss_next_item", "loss_target_target", "loss_user_target", "accuracy_user_target"):
            wanted = float(sums[name] / sums[f"{name}_weight"])
            np.testing.assert_allclose(float(metrics[name].compute()), wanted, rtol=1e-5, err_msg=name)
    assert int(theirs.step) == int(state.step) == STEPS
    for one, other in zip(jax.tree.leaves(theirs.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    del task


def test_micro_batches_are_refused(parts):
    batch = next(batches(parts, "train", True, ROWS))
    with pytest.raises(CalrecError, match="given 2 rows of a batch of 4: .*negatives of a micro-batch alone"):
        trainer.train_with_lr(state_of(parts, parts[2]), batch, 0.0, jax.random.key(0), parts[3], 2)
    other_size = next(batches(parts, "validation", True, 2))
    assert np.isfinite(float(parts[3].eval_fn(parts[2], other_size)[0])), "evaluation takes any size"


def test_predictions_and_scores(parts, small_run):
    """Samples are our Sampler's for the same keys; scores are those of teacher forcing."""
    _, model, params, ours = parts
    batch = next(batches(parts, "test", False, 5))
    found, aux = ours.predict_batch_with_aux(params, batch)
    lengths = 1 + (batch["user_pool"] > 0).sum(1)
    users = batch["target_user"][:, 0]
    keys = np.stack([np.full(5, 5), users], 1).astype(np.uint32)
    tokens = np.where(np.arange(batch["user_pool"].shape[1]) < lengths[:, None], batch["decoder_input_tokens"], 0)
    sampler = Sampler(model, params, eos_id=1, num_samples=3, temperature=0.7, max_new_tokens=10, batch_users=5)
    wanted = sampler(Batch(tokens.astype(np.int32), lengths.astype(np.int32), keys, users))
    np.testing.assert_array_equal(found, wanted.tokens)
    np.testing.assert_allclose(aux["scores"], wanted.log_probs, atol=1e-4)
    np.testing.assert_array_equal(ours.predict_batch(params, batch), found)
    dataset = small_run.datasets[0]
    scores = np.asarray(ours.score_batch(params, batch))
    for row, user in enumerate(users):
        prompt = tokens[row, : lengths[row]].tolist()
        text = small_run.tokenizer.encode(dataset.texts[dataset.target(user, "test")])[:23]
        if len(prompt) + len(text) < 48:  # the reference's length
            assert scores[row] == pytest.approx(teacher_forced(model, params, prompt, [*text, 1]), abs=1e-3)
    assert (lengths < 30).any()
    packed = next(batches(parts, "validation", True, 2))
    with pytest.raises(CalrecError, match=r"DatasetConfig.pack = False"):
        ours.predict_batch(params, packed)


def test_logits_are_the_models(parts):
    _, model, params, ours = parts
    batch = next(batches(parts, "validation", True, 2))
    hidden = activations(model, params, batch)
    wanted = model.apply({"params": params}, hidden, method="logits")
    np.testing.assert_array_equal(ours._compute_logits(params, batch), wanted)


def test_t5x_reads_the_exported_checkpoint(parts, small_run, tmp_path):
    """By the manager of its checkpoints, into the state that infer.py makes."""
    _, model, params, ours = parts
    stage = write_stage(tmp_path / "stage", small_run, model, params)
    out = export(
        tmp_path / "out", "t5x", Origin([stage]), small_run.datasets[0], small_run.tokenizer_folder
    )  # fmt: skip
    partitioner = partitioning.PjitPartitioner(num_partitions=1)
    initializer = utils.TrainStateInitializer(
        optimizer_def=None,
        init_fn=ours.get_initial_variables,
        input_shapes={},
        input_types={},
        partitioner=partitioner,
    )
    config = utils.RestoreCheckpointConfig(path=str(out / "checkpoint_0"), mode="specific", dtype="float32")
    restored, _ = utils.create_checkpoint_manager_and_restore(
        initializer, partitioner, config, str(out / "checkpoint_0"), jax.random.key(0), use_orbax=True
    )
    assert checkpoints.all_steps(str(out)) == [0]
    for one, other in zip(jax.tree.leaves(restored.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, other)
