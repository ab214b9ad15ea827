"""Every packaged run file loads, binds nothing in vain, and means what it says."""

import gin
import pytest

from calrec_jax import config
from calrec_jax.baselines import split_name
from calrec_jax.data.templates import Template
from calrec_jax.evaluate.baselines import BASELINES
from calrec_jax.losses import LossConfig
from calrec_jax.models.transformer import TransformerConfig
from calrec_jax.pipeline import Line
from calrec_jax.train.batching import Batching

RUNS = sorted(path.name for path in (config.PACKAGED / "runs").glob("*.gin"))


def load(name):
    loaded = config.load([f"runs/{name}"], ["RUN_DIR='run'", "DATA_DIR='data'"])
    line = Line()
    line.check(loaded)
    return line


@pytest.mark.parametrize("name", RUNS)
def test_a_run_file_loads(name):
    line = load(name)
    assert line.run_dir == "run" and line.data_dir == "data"


def test_gpt4rec_has_titles_the_next_item_loss_and_a_beam_of_texts():
    line = load("gpt4rec_scientific.gin")
    assert Template().attributes == ("title",)
    assert (LossConfig().alpha, LossConfig().beta) == (0.0, 0.0)
    assert line.rankings == {"gpt4rec": "beam"} and line.decodes == ("beam",)
    assert gin.query_parameter("beam/decode.mode") == "beam"
    assert gin.query_parameter("gpt4rec/rank.source") == "completions"


@pytest.mark.parametrize("name", ["scientific_baselines.gin", "beauty_baselines.gin"])
def test_the_runs_of_baselines_name_baselines_and_three_seeds(name):
    line = load(name)
    counted = gin.query_parameter("evaluate.baselines")
    assert set(counted) <= set(BASELINES) and len(set(counted)) == len(counted)
    models = sorted({split_name(baseline)[0] for baseline in line.baselines})
    assert [gin.query_parameter(f"{model}/sasrec.seed") for model in models] == [0, 1, 2]
    assert not line.rankings and not line.stages


def test_the_papers_scale_has_its_categories_lengths_and_two_stages():
    line = load("paper_stage2.gin")
    assert len(set(line.categories)) == 13 and line.target in line.categories
    assert line.stages == ("stage1", "stage2") and line.decodes == ("sample",)
    with gin.config_scope("stage1"):
        batching, sizes = Batching(), TransformerConfig()
    assert batching.mixture_exponent == 0.3 and batching.next_item_loss == "last"
    assert (batching.max_history_tokens, batching.max_target_tokens, batching.row_tokens) == (1024, 128, 1280)
    assert (LossConfig().alpha, LossConfig().beta, LossConfig().temperature) == (0.125, 0.025, 0.5)
    assert sizes.dtype == "bfloat16" and sizes.embed_dim % gin.query_parameter("train.mesh_shape")[2] == 0
    assert gin.query_parameter("stage2/train.patience") > 0
    assert load("paper_stage1.gin").stages == ("stage1",)
