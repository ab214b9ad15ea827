"""gin/models of the public sizes: parameters counted against the published numbers, and the family each belongs to."""

import math

import jax
import jax.numpy as jnp
import pytest

from calrec_jax import config
from calrec_jax.models.transformer import Transformer, TransformerConfig
from calrec_jax.pretrained.to_hf import family_of

# Rows of the embedding, parameters as the models' pages count them (of Qwen 3 and Gemma 3 4B: without the table that is
# stored twice, and without the tower of images).
MODELS = {
    "gemma2_2b": ("gemma2", 256_000, 2_614_341_888),
    "gemma3_270m": ("gemma3_text", 262_144, 268_098_176),
    "gemma3_1b": ("gemma3_text", 262_144, 999_885_952),
    "gemma3_4b": ("gemma3_text", 262_208, 3_880_263_168),
    "llama3_2_1b": ("llama", 128_256, 1_235_814_400),
    "llama3_2_3b": ("llama", 128_256, 3_212_749_824),
    "qwen2_5_0_5b": ("qwen2", 151_936, 494_032_768),
    "qwen2_5_1_5b": ("qwen2", 151_936, 1_543_714_304),
    "qwen3_0_6b": ("qwen3", 151_936, 596_049_920),
    "qwen3_1_7b": ("qwen3", 151_936, 1_720_574_976),
    "smollm2_135m": ("llama", 49_152, 134_515_008),
    "smollm2_360m": ("llama", 49_152, 361_821_120),
}


def test_every_file_is_listed_here():
    files = {path.stem for path in (config.PACKAGED / "models").glob("*.gin")}
    assert files - {"baselines", "one_billion", "scientific", "small", "tiny"} == {*MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_as_many_as_published(name):
    family, vocab_size, count = MODELS[name]
    config.load([f"models/{name}.gin"])
    sizes = TransformerConfig()
    assert family_of(sizes).model_type == family
    model, tokens = Transformer(sizes, vocab_size), jnp.zeros((1, 4), jnp.int32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, tokens, tokens)["params"])
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == count
