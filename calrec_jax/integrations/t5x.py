"""The model, its loss and its sampling under T5X's own train.py, eval.py and infer.py. Imports t5x; nothing imports it.

Notable: batches are those of `CalrecFeatureConverter`, so packing, pools and negatives are the trainer's; the loss is
`losses.calrec_loss` and the completions are the exports' sampling. docs/t5x.md has the install and the launch lines.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.core
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import seqio
from clu import metrics as clu_metrics
from flax.linen import partitioning as flax_partitioning
from t5x import metrics as t5x_metrics
from t5x import models, optimizers

from calrec_jax.errors import CalrecError
from calrec_jax.export.functions import Lengths, make_functions
from calrec_jax.features import CalrecFeatureConverter
from calrec_jax.losses import LossConfig, calrec_loss
from calrec_jax.models.transformer import Transformer, TransformerConfig, vocabulary_table
from calrec_jax.train.gradients import activations
from calrec_jax.train.optimizer import OptimizerConfig
from calrec_jax.vocabularies import CalrecVocabulary

Batch = Mapping[str, jax.Array]


def make_transformer(config: TransformerConfig, vocabulary: CalrecVocabulary) -> Transformer:
    """The decoder over a task's vocabulary.

    Attention is XLA's: T5X's partitioner cannot split a kernel, and the model does not know its mesh.
    """
    return Transformer(dataclasses.replace(config, attention="xla"), vocabulary.vocab_size)


def make_optimizer(config: OptimizerConfig, steps: int) -> optimizers.OptaxWrapper:
    """The trainer's AdamW with its schedule over `steps` steps.

    T5X's wrapper of optax ignores `Trainer.learning_rate_fn`: the schedule is in here.
    """
    return optimizers.OptaxWrapper(config.transformation(steps))


class CalrecModel(models.BaseTransformerModel):
    """CALRec as T5X trains it.

    Args:
      module: the decoder.
      vocabulary: of the tasks.
      optimizer_def: see `make_optimizer`.
      loss: weights and choices of the objective.
      batch_rows: B, the rows of a training batch (T5X's BATCH_SIZE). A batch of another size is refused, since T5X
        sums gradients over micro-batches, and the contrastive terms need the whole batch at once.
      row_examples: K, examples packed in a row.
      row_tokens: L; None is that of the feature lengths: inputs + 2 · targets.
      next_item_loss: "last" or "all".
      window: examples that are packed together.
      num_samples: N texts a user.
      temperature: of sampling.
      max_new_tokens: of a text, EOS included.
      seed: of sampling; a user's stream depends on it and on the user's number alone.
    """

    def __init__(
        self,
        module: Transformer,
        vocabulary: CalrecVocabulary,
        optimizer_def: optimizers.OptimizerDefType,
        loss: LossConfig,
        *,
        batch_rows: int,
        row_examples: int = 8,
        row_tokens: int | None = None,
        next_item_loss: str = "last",
        window: int = 1024,
        num_samples: int = 32,
        temperature: float = 0.5,
        max_new_tokens: int = 128,
        seed: int = 0,
    ):
        super().__init__(module, vocabulary, vocabulary, optimizer_def)
        self._loss, self._batch_rows, self._seed = loss, batch_rows, seed
        self._sampling: dict[str, Any] = {"num_samples": num_samples, "temperature": temperature}
        self._max_new_tokens = max_new_tokens
        converter = functools.partial(
            CalrecFeatureConverter,
            row_examples=row_examples,
            row_tokens=row_tokens,
            next_item_loss=next_item_loss,
            window=window,
            start_id=vocabulary.calrec_tokenizer.start_id,
            eos_id=vocabulary.eos_id,
        )

        def feature_converter(pack: bool = True, use_custom_packing_ops: bool = False, **kwargs: Any) -> Any:
            """T5X's call; its own packing operations are not used."""
            del use_custom_packing_ops
            return converter(pack=pack, **kwargs)

        self.FEATURE_CONVERTER_CLS = feature_converter

    def get_initial_variables(
        self, rng: jax.Array, input_shapes: Mapping[str, Any], input_types: Mapping[str, Any] | None = None
    ) -> flax.core.FrozenDict:
        """Fresh parameters as `params`, and their logical axes as `params_axes`."""
        del input_shapes, input_types  # no parameter's shape depends on the batch
        tokens = jnp.zeros((1, 8), jnp.int32)
        boxed = self.module.init(rng, tokens, tokens, tokens + 1)["params"]
        return flax.core.freeze({"params": nn.unbox(boxed), "params_axes": _axes(boxed)})

    def _compute_logits(self, params: Any, batch: Batch, dropout_rng: jax.Array | None = None) -> jax.Array:
        hidden = activations(self.module, params, dict(batch), self._dropout(dropout_rng))
        return self.module.apply({"params": params}, hidden, method="logits")

    def _dropout(self, rng: jax.Array | None) -> jax.Array | None:
        return rng if self.module.config.dropout_rate > 0 else None

    def loss_fn(self, params: Any, batch: Batch, dropout_rng: jax.Array | None) -> tuple[jax.Array, dict[str, Any]]:
        """The whole objective over one training batch, and its metrics.

        Raises:
          CalrecError: the batch is not whole.
        """
        rows = batch["decoder_input_tokens"].shape[0]
        if rows != self._batch_rows:
            raise CalrecError(
                f"the loss is given {rows} rows of a batch of {self._batch_rows}: with Trainer.num_microbatches "
                "above 1 the contrastive terms would see the negatives of a micro-batch alone, so set it to None "
                "(calrec train has Batching.micro_batches, which is exact); or CalrecModel.batch_rows is not BATCH_SIZE"
            )
        return self._loss_of(params, batch, dropout_rng)

    def eval_fn(self, params: Any, batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
        """The objective without dropout, over batches of any size."""
        return self._loss_of(params, batch, None)

    def _loss_of(self, params: Any, batch: Batch, dropout_rng: jax.Array | None) -> tuple[jax.Array, dict[str, Any]]:
        hidden = activations(self.module, params, dict(batch), self._dropout(dropout_rng))
        loss, sums = calrec_loss(
            hidden, vocabulary_table(params), dict(batch), self._loss, self.module.config.logit_soft_cap
        )
        metrics: dict[str, Any] = {
            name: clu_metrics.Average(total=total, count=sums[f"{name}_weight"])
            for name, total in sums.items()
            if not name.endswith("_weight")
        }
        real = jnp.sum(batch["decoder_segment_ids"] > 0)
        metrics["real_tokens"] = t5x_metrics.Sum(total=real.astype(jnp.float32))
        return loss, metrics

    def predict_batch_with_aux(
        self, params: Any, batch: Batch, rng: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Completions [B, N, T] of unpacked rows, and `scores` [B, N], their log-probabilities at temperature 1.

        `rng` is not used: a user gets the same texts in any batch.
        """
        del rng
        tokens, lengths = self._prompts(batch)
        user = batch["target_user"][:, 0].astype(jnp.uint32)
        keys = jnp.stack([jnp.full_like(user, self._seed), user], axis=1)
        shape = Lengths(tokens.shape[1], 1, self._max_new_tokens)
        functions = make_functions(
            self.module, shape, start_id=self.output_vocabulary.calrec_tokenizer.start_id,
            eos_id=self.output_vocabulary.eos_id, **self._sampling,
        )  # fmt: skip
        found = functions["sample"].call(params, {"tokens": tokens, "lengths": lengths, "keys": keys})
        return found["completions"], {"scores": found["log_probs"]}

    def _prompts(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Tokens [B, L] and lengths [B] of the histories in unpacked rows."""
        if batch["example_mask"].shape[1] != 1:
            raise CalrecError("prompts are read from unpacked rows: set utils.DatasetConfig.pack = False")
        lengths = 1 + (batch["user_pool"] > 0).sum(axis=1)  # the start token is in no pool
        place = jnp.arange(batch["user_pool"].shape[1])
        return jnp.where(place < lengths[:, None], batch["decoder_input_tokens"], 0), lengths.astype(jnp.int32)

    def score_batch(self, params: Any, batch: Batch, return_intermediates: bool = False) -> jax.Array:
        """Log-probability [B] of each unpacked row's target, EOS included.

        Raises:
          CalrecError: intermediates are asked for, which the model does not keep.
        """
        if return_intermediates:
            raise CalrecError("the model keeps no intermediates; set infer.mode = 'score' without them")
        logits = self._compute_logits(params, batch)
        targets = batch["decoder_target_tokens"]
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
        inside = batch["target_pool"] > 0
        # The place before the target's first input token predicts it; its last input token predicts EOS.
        predicts = inside | jnp.pad(inside[:, 1:], ((0, 0), (0, 1)))
        return jnp.where(predicts, picked, 0).sum(axis=1)


def _axes(boxed: Any) -> dict[str, Any]:
    """`params_axes`, as T5X reads them, of parameters that are boxed with their logical axes."""
    specs = flax.traverse_util.flatten_dict(nn.get_partition_spec(boxed))
    shapes = flax.traverse_util.flatten_dict(nn.unbox(boxed))
    named = {
        (*path[:-1], f"{path[-1]}_axes"): flax_partitioning.AxisMetadata(
            names=tuple(spec) + (None,) * (len(shapes[path].shape) - len(spec))
        )
        for path, spec in specs.items()
    }
    return flax.traverse_util.unflatten_dict(named)


def vocabulary(task: str) -> seqio.Vocabulary:
    """The vocabulary of a registered task or mixture."""
    return seqio.get_mixture_or_task(task).output_features["targets"].vocabulary
