"""Hugging Face folders in and out: every family against a float64 reference, the same bits back, bad input."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tracemalloc

import flax.linen as nn
import gin
import hf_folders
import hf_reference
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from calrec_jax import artifacts, config
from calrec_jax.errors import CalrecError
from calrec_jax.models.transformer import Transformer, TransformerConfig, empty_suffix
from calrec_jax.pretrained import families, reader
from calrec_jax.pretrained.export_hf import export_hf
from calrec_jax.pretrained.import_hf import import_hf
from calrec_jax.pretrained.to_hf import family_of, to_hf
from calrec_jax.tokenizer import Tokenizer
from calrec_jax.train.checkpoints import load_checkpoint, manager, save, write_facts

NAMES = list(hf_folders.CONFIGS)
LENGTH = 21


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Name of a family to (folder, tensors, what was imported from it), made when it is first asked for."""
    root, made = tmp_path_factory.mktemp("hf"), {}

    def get(name):
        if name not in made:
            tensors = hf_folders.write_folder(root / name, hf_folders.CONFIGS[name], family=name)
            made[name] = root / name, tensors, import_hf(root / name, root / f"{name}-imported")
        return made[name]

    return get


def tokens_of(name):
    return np.random.default_rng(NAMES.index(name)).integers(3, hf_folders.VOCAB, (2, LENGTH)).astype(np.int32)


def reference(name, tensors, tokens):
    return hf_reference.logits(hf_folders.CONFIGS[name], tensors, tokens)


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_float64_reference_scanned_unrolled_and_packed(imported, name):
    _, tensors, out = imported(name)
    config, params, facts = load_checkpoint(out)
    tokens = tokens_of(name)
    expected = [reference(name, tensors, row) for row in tokens]
    # Two segments of a row: the windows of the second must not reach into the first.
    cut = LENGTH - 9
    packed = np.concatenate([tokens[0], tokens[1, :9]])[None]
    positions = np.concatenate([np.arange(LENGTH), np.arange(9)])[None].astype(np.int32)
    segments = (1 + (np.arange(LENGTH + 9) >= LENGTH)[None]).astype(np.int32)
    assert cut > 0
    for scan, block in ((True, 8), (False, 8), (False, 3)):
        model = Transformer(dataclasses.replace(config, scan_layers=scan, attention_block=block), facts["vocab_size"])
        got = jax.jit(model.apply)({"params": params}, packed, positions, segments)[0]
        np.testing.assert_allclose(got[:LENGTH], expected[0], atol=2e-4)
        np.testing.assert_allclose(got[LENGTH:], expected[1][:9], atol=2e-4)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen2_windowed", "llama3"])
def test_decoding_equals_the_reference_past_the_window(imported, name):
    """Step by step in a ring that turns, and all at once: the suffix alone is longer than the window."""
    _, tensors, out = imported(name)
    config, params, facts = load_checkpoint(out)
    model = Transformer(config, facts["vocab_size"])
    tokens = tokens_of(name)
    lengths, steps, ring = np.array([9, 7]), 10, 16
    prefix_length = 10
    mask = np.arange(prefix_length) < lengths[:, None]
    places = np.broadcast_to(np.arange(prefix_length), mask.shape).astype(np.int32)
    apply = jax.jit(lambda method, *args: model.apply({"params": params}, *args, method=method), static_argnums=0)
    hidden, prefix = apply("prefill", tokens[:, :prefix_length], places, mask.astype(np.int32))
    rest = np.stack([tokens[b, lengths[b] : lengths[b] + steps] for b in range(2)])
    at = (lengths[:, None] + np.arange(steps)).astype(np.int32)
    expected = np.stack([reference(name, tensors, tokens[b, : lengths[b] + steps])[-steps:] for b in range(2)])

    suffix, clock, got = empty_suffix(config, 2, ring), 13, []
    for step in range(steps):
        place = (clock + step) % ring
        lag = (place - np.arange(ring)) % ring
        written = np.broadcast_to(lag <= step, (2, 1, ring))
        now = rest[:, step : step + 1], at[:, step : step + 1], jnp.int32(place)
        hidden, suffix = apply("decode", *now, prefix, mask, suffix, written)
        got.append(apply("logits", hidden)[:, 0])
    np.testing.assert_allclose(np.stack(got, 1), expected, atol=3e-4)

    causal, none = np.tri(steps, dtype=bool)[None], empty_suffix(config, 2, 0)
    whole, _ = apply("decode", rest, at, None, prefix, mask, none, causal)
    np.testing.assert_allclose(apply("logits", whole), expected, atol=3e-4)
    _, half = apply("decode", rest[:, :6], at[:, :6], None, prefix, mask, none, causal[:, :6, :6])
    behind, _ = apply("decode", rest[:, 6:], at[:, 6:], None, prefix, mask, half, causal[:, 6:])
    np.testing.assert_allclose(apply("logits", behind), expected[:, 6:], atol=3e-4)


def test_greedy_samples_and_a_beam_of_one_equal_the_reference(imported):
    """The decoders themselves, at next to no temperature, over windows shorter than prompt and completion."""
    from calrec_jax.decode.beam import BeamSearch
    from calrec_jax.decode.prefix import Batch
    from calrec_jax.decode.sampling import Sampler

    _, tensors, out = imported("gemma3")
    config, params, facts = load_checkpoint(out)
    tokens, steps = tokens_of("gemma3"), 20
    lengths = np.array([11, 8], np.int32)
    sampler = Sampler(
        Transformer(config, facts["vocab_size"]), params, eos_id=1, num_samples=2, temperature=1e-4,
        max_new_tokens=steps, batch_users=2,
    )  # fmt: skip
    prompts = tokens[:, :12] * (np.arange(12) < lengths[:, None])
    batch = Batch(prompts.astype(np.int32), lengths, np.arange(4, dtype=np.uint32).reshape(2, 2), np.arange(2))
    done = sampler(batch)
    model = Transformer(config, facts["vocab_size"])
    beam = BeamSearch(model, params, eos_id=1, num_beams=1, max_new_tokens=steps, batch_users=2)(batch)
    for user in range(2):
        text = list(tokens[user, : lengths[user]])
        for _ in range(int(done.num_tokens[user, 0])):
            text.append(int(reference("gemma3", tensors, text)[-1].argmax()))
        for sample in range(2):
            assert done.tokens[user, sample, : done.num_tokens[user, 0]].tolist() == text[lengths[user] :]
        assert beam.tokens[user, 0, : beam.num_tokens[user, 0]].tolist() == text[lengths[user] :]
    assert done.num_tokens.max() > 12, "longer than two windows"


def read_all(folder):
    return {
        k: v
        for file in pathlib.Path(folder).glob("*.safetensors")
        for k, v in safetensors.numpy.load_file(file).items()
    }


def assert_same(a, b):
    assert {*a} == {*b}
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize(
    ("name", "dtype"), [(n, np.float32) for n in NAMES] + [("gemma3", ml_dtypes.bfloat16), ("qwen2", np.float16)]
)
def test_there_and_back_is_the_same_bit_for_bit(tmp_path, name, dtype):
    tensors = hf_folders.write_folder(tmp_path / "hf", hf_folders.CONFIGS[name], dtype=dtype, shards=3, family=name)
    first = import_hf(tmp_path / "hf", tmp_path / "first")
    out = export_hf(first, tmp_path / "out", max_shard_gib=30_000 / 2**30)
    assert_same(read_all(out), tensors)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len({*index["weight_map"].values()}) > 1 and {*index["weight_map"]} == {*tensors}
    assert json.loads((out / "config.json").read_text()) == json.loads((tmp_path / "hf" / "config.json").read_text())
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / file).read_bytes() == (tmp_path / "hf" / file).read_bytes()
    again = import_hf(out, tmp_path / "again")
    before, after = load_checkpoint(first), load_checkpoint(again)
    assert before[0] == after[0]
    jax.tree.map(np.testing.assert_array_equal, before[1], after[1])
    assert Tokenizer.load(first / "tokenizer").fingerprint == Tokenizer.load(again / "tokenizer").fingerprint


@pytest.fixture
def unbound():
    yield
    gin.clear_config()


def test_parameters_lie_as_training_lays_them_and_the_gin_file_says_the_same_model(imported, unbound):
    import optax

    from calrec_jax.train import step as steps

    for name in NAMES:
        _, _, out = imported(name)
        made, params, facts = load_checkpoint(out)
        config.load([str(out / "model.gin")])
        assert TransformerConfig() == made
        assert load_checkpoint(imported("llama3")[2])[0] != made or name == "llama3", "not filled up by what gin binds"
        model = Transformer(made, facts["vocab_size"])
        wanted = steps.abstract_state(model, optax.identity(), steps.make_mesh())[0].params
        jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), params, wanted)
        assert families.from_hf(to_hf(made, 512, family_of(made)), "x").config.settings() == made.settings()


def test_a_model_from_scratch_is_exported_with_a_config_of_its_family(tmp_path):
    config = TransformerConfig(
        embed_dim=24, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=40, activation="silu", scale_embeddings=False
    )
    hf_folders.write_folder(tmp_path / "hf", hf_folders.CONFIGS["llama3"])
    tokenizer = Tokenizer.load(import_hf(tmp_path / "hf", tmp_path / "in") / "tokenizer")
    model, tokens = Transformer(config, 512), jnp.zeros((1, 4), jnp.int32)
    params = nn.unbox(model.init(jax.random.key(0), tokens, tokens, tokens + 1)["params"])
    stage = tmp_path / "run" / "stage1"
    stage.mkdir(parents=True)
    write_facts(stage, config, {"vocab_size": 512, "tokenizer": tokenizer.fingerprint})
    with manager(stage) as checkpoints:
        save(checkpoints, 0, {"params": params}, None)
    artifacts.write_manifest(stage, kind="checkpoint", made_from={}, settings={})
    shutil.copytree(tmp_path / "in" / "tokenizer", tmp_path / "run" / "tokenizer")
    out = export_hf(stage, tmp_path / "out")
    written = json.loads((out / "config.json").read_text())
    assert (written["model_type"], written["architectures"], written["torch_dtype"]) == (
        "llama", ["LlamaForCausalLM"], "float32",
    )  # fmt: skip
    # The tokenizer's own: a family's defaults would let transformers go on behind EOS.
    ids = (tokenizer.start_id, tokenizer.eos_id, tokenizer.pad_id)
    assert (written["bos_token_id"], written["eos_token_id"], written["pad_token_id"]) == ids
    got = model.apply(
        {"params": params}, *(np.arange(5, dtype=np.int32)[None] + 3 * i for i in (1, 0)), np.ones((1, 5))
    )
    np.testing.assert_allclose(got[0], hf_reference.logits(written, read_all(out), np.arange(5) + 3), atol=2e-4)
    with pytest.raises(CalrecError, match="no family of open models.*nearest is llama.*scale_embeddings=True"):
        family_of(dataclasses.replace(config, scale_embeddings=True))


def test_the_host_holds_one_tensor_and_one_shard(tmp_path):
    """A model of many layers: what Python and NumPy hold at once is bounded by its largest tensor, not by its size."""
    from calrec_jax.pretrained import import_hf as importing
    from calrec_jax.pretrained.tensors import leaves

    config = hf_folders.CONFIGS["llama3"] | {"num_hidden_layers": 24, "hidden_size": 64, "intermediate_size": 2048}
    tensors = hf_folders.write_folder(tmp_path / "hf", config, dtype=ml_dtypes.bfloat16, shards=4)
    largest = max(t.nbytes for t in tensors.values())
    described = importing.read_config(tmp_path / "hf")
    with reader.opened(tmp_path / "hf") as opened:
        wanted = list(leaves(described.config, described.vocab_size))
        importing.load_parameters(opened, wanted[:1], "model.", described)  # compiles, and imports what it imports late
        tracemalloc.start()
        params = importing.load_parameters(opened, wanted, "model.", described)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    assert total > 60 * largest
    assert peak < 4 * largest + 2**21, (
        "the tensor in bfloat16, its shard in float32 of twice the bytes, and small change"
    )


MESH = """
import pathlib, sys
from calrec_jax.pretrained import import_hf as importing, reader
from calrec_jax.pretrained.tensors import leaves
folder, out = map(pathlib.Path, sys.argv[1:])
described = importing.read_config(folder)
with reader.opened(folder) as tensors:
    wanted = list(leaves(described.config, described.vocab_size))
    params = importing.load_parameters(tensors, wanted, "model.", described, (1, 1, 2, 2))
layers = params["layers"]
for x, part in ((params["embedding"], (256, 12)), (layers["query"]["kernel"], (5, 12, 2, 10)),
                (layers["down"]["kernel"], (5, 20, 12)), (layers["key_norm"]["scale"], (5, 10))):
    assert {s.data.shape for s in x.addressable_shards} == {part}, (x.shape, part)
    assert len(x.addressable_shards) == 4
importing.import_hf(folder, out, (1, 1, 2, 2))
"""


def test_parameters_are_laid_over_a_mesh_as_they_are_read(imported, tmp_path):
    folder, _, out = imported("gemma3")
    environment = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", MESH, str(folder), str(tmp_path / "mesh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    jax.tree.map(np.testing.assert_array_equal, load_checkpoint(tmp_path / "mesh")[1], load_checkpoint(out)[1])


class Folder:
    """A whole folder, and how to spoil it."""

    def __init__(self, path, name="gemma3"):
        self.path = path
        self.tensors = hf_folders.write_folder(path, hf_folders.CONFIGS[name], family=name)

    def config(self, **fields):
        values = json.loads((self.path / "config.json").read_text()) | fields
        (self.path / "config.json").write_text(json.dumps(values))

    def tensor(self, name, value):
        kept = {k: v for k, v in (self.tensors | {name: value}).items() if v is not None}
        safetensors.numpy.save_file(kept, self.path / "model.safetensors")


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "hf")


def bad_folder(folder, match):
    """Refused with words that match, and with nothing left behind."""
    out = folder.path.parent / "out"
    with pytest.raises(CalrecError, match=match):
        import_hf(folder.path, out)
    assert [p.name for p in folder.path.parent.iterdir()] == [folder.path.name]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"model_type": "mixtral"}, r"config\.json: model_type='mixtral' is not supported; these are: llama .*gemma3"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling of rope_type='yarn' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling: factor=None: must be a number above 0"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "auto_map=.*it names code in the folder, which is never run"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.*unquantised"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"hidden_activation": "relu"}, "hidden_activation='relu' is not supported; Gemma 3 has 'gelu_pytorch_tanh'"),
        ({"hidden_size": "24"}, "hidden_size='24': must be a positive whole number"),
        ({"num_key_value_heads": 3}, "num_heads=4: must be a multiple of num_kv_heads=3"),
        ({"layer_types": ["chunked"] * 5}, "layer_types has 5 entries, one of them 'chunked': must be 5"),
        (
            {"num_hidden_layers": 6},
            r"model\.layers\.5\.input_layernorm\.weight is missing \(\[24\] is expected\).*more",
        ),
        ({"num_hidden_layers": 4}, r"model\.layers\.4\.\S+ is not expected in this family"),
        ({"model_type": "qwen3", "hidden_activation": "silu"}, "layernorm.weight is not expected in this family"),
        ({"intermediate_size": 48}, r"mlp\.\S+ has the shape \[40, 24\], and \[48, 24\] is expected"),
        ({"vocab_size": 4096}, r"embed_tokens\.weight has the shape \[512, 24\], and \[4096, 24\] is expected"),
    ],
)
def test_a_config_that_the_decoder_cannot_follow_is_named(folder, fields, match):
    folder.config(**fields)
    bad_folder(folder, match)


def test_tensors_that_are_missing_strange_misshapen_or_quantised_are_named(folder):
    name = "model.layers.1.self_attn.q_norm.weight"
    folder.tensor(name, None)
    bad_folder(folder, rf"its tensors are not those of its config\.json: {name} is missing \(\[10\] is expected\)")
    folder.tensor(name, np.ones(11, np.float32))
    bad_folder(folder, rf"{name} has the shape \[11\], and \[10\] is expected")
    folder.tensor(name, np.ones(10, np.int8))
    bad_folder(folder, rf"{name} has the type I8, and one of \['F32', 'F16', 'BF16'\] is expected")
    folder.tensor("model.layers.0.adapter.weight", np.ones(3, np.float32))
    bad_folder(folder, r"model\.layers\.0\.adapter\.weight is not expected in this family")
    folder.tensor("lm_head.weight", folder.tensors["model.embed_tokens.weight"] + 1)
    bad_folder(folder, r"tie_word_embeddings is true, and lm_head\.weight is not equal to embed_tokens")
    folder.tensor("model.embed_tokens.weight", None)
    bad_folder(folder, r"the tensor model\.embed_tokens\.weight is missing")


def test_what_folders_have_beside_the_model_does_no_harm(folder, monkeypatch):
    """A table stored twice (Qwen 3), tables of old versions, the towers of a model of images (Gemma 3)."""
    monkeypatch.setattr(reader, "_ROWS", 100)  # the two tables are compared in several parts
    extra = {
        "lm_head.weight": folder.tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(5, np.float32),
    }
    safetensors.numpy.save_file(folder.tensors | extra, folder.path / "model.safetensors")
    out = export_hf(import_hf(folder.path, folder.path.parent / "in"), folder.path.parent / "out")
    assert_same(read_all(out), folder.tensors | {"lm_head.weight": extra["lm_head.weight"]})

    whole = json.loads((folder.path / "config.json").read_text())
    text = {k: v for k, v in whole.items() if k not in ("architectures", "torch_dtype")}
    (folder.path / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    )
    tower = {"vision_tower.layers.0.weight": np.ones(3, np.float32)}
    inside = {f"language_model.{name}": x for name, x in folder.tensors.items()}
    safetensors.numpy.save_file(inside | tower, folder.path / "model.safetensors")
    import_hf(folder.path, folder.path.parent / "images")
    out = export_hf(folder.path.parent / "images", folder.path.parent / "text")
    assert_same(read_all(out), folder.tensors)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["Gemma3ForCausalLM"]


def test_files_that_are_cut_off_missing_or_pickle_are_named(tmp_path):
    folder = Folder(tmp_path / "hf")
    file = folder.path / "model.safetensors"
    whole = file.read_bytes()
    for size in (len(whole) - 100, 50, 4):
        file.write_bytes(whole[:size])
        bad_folder(folder, r"model\.safetensors: is no whole safetensors file .*cut off, download it again")
    file.unlink()
    bad_folder(folder, r"has neither model\.safetensors nor model\.safetensors\.index\.json")
    (folder.path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    bad_folder(folder, r"pytorch_model\.bin, which is pickle and may run code.*save_pretrained")
    (folder.path / "config.json").unlink()
    bad_folder(folder, r"config\.json is missing")


def test_an_index_that_does_not_hold_is_named(tmp_path):
    hf_folders.write_folder(tmp_path / "hf", hf_folders.CONFIGS["qwen3"], shards=2, family="qwen3")
    folder = Folder.__new__(Folder)
    folder.path = tmp_path / "hf"
    path = folder.path / "model.safetensors.index.json"
    index = json.loads(path.read_text())

    def with_map(**changes):
        path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | changes}))

    with_map(**{"model.norm.weight": "../other.safetensors"})
    bad_folder(folder, r"weight_map names '\.\./other\.safetensors', which is no \*\.safetensors beside it")
    with_map(**{"model.norm.weight": "model-00003-of-00002.safetensors"})
    bad_folder(folder, r"model-00003-of-00002\.safetensors is missing; model\.safetensors\.index\.json names it")
    files = sorted({*index["weight_map"].values()})
    other = files[1 - files.index(index["weight_map"]["model.norm.weight"])]
    with_map(**{"model.norm.weight": other})
    bad_folder(folder, rf"{other}: the tensor model\.norm\.weight is missing; .* says it is there")
    path.write_text("{}")
    bad_folder(folder, "weight_map is missing")


def test_tokenizers_that_do_not_fit_are_named(folder):
    rows = folder.tensors["model.embed_tokens.weight"]
    folder.config(vocab_size=400)
    folder.tensor("model.embed_tokens.weight", rows[:400])
    bad_folder(folder, r"tokenizer\.json: has 512 ids, and config\.json's vocab_size is 400")
    folder.config(vocab_size=4000)
    folder.tensor("model.embed_tokens.weight", np.ones((4000, 24), np.float32))
    bad_folder(folder, r"tokenizer\.json: has 512 ids, and config\.json's vocab_size is 4,000")
    folder.config(vocab_size=512)
    folder.tensor("model.embed_tokens.weight", rows)
    names = json.loads((folder.path / "tokenizer_config.json").read_text())
    (folder.path / "tokenizer_config.json").write_text(json.dumps(names | {"eos_token": "<stop>"}))
    bad_folder(folder, r"eos_token='<stop>' is no token of tokenizer\.json")
    (folder.path / "tokenizer_config.json").unlink()
    folder.config(eos_token_id=None)
    bad_folder(folder, r"neither tokenizer_config\.json \(eos_token\) nor config\.json \(eos_token_id\) says")
    folder.config(eos_token_id=700)
    bad_folder(folder, "the eos id 700 is not in the model's vocabulary of 512")
    (folder.path / "tokenizer.json").write_text("{}")
    bad_folder(folder, r"tokenizer\.json: is no tokenizer of the tokenizers library")
    (folder.path / "tokenizer.json").unlink()
    bad_folder(folder, r"has neither tokenizer\.json nor tokenizer\.model")


def test_import_is_skipped_when_done_and_refused_over_another(folder, capsys):
    out = folder.path.parent / "out"
    import_hf(folder.path, out)
    import_hf(folder.path, out)
    assert "is done already, skipped" in capsys.readouterr().out
    folder.tensor("model.norm.weight", np.ones(24, np.float32))
    with pytest.raises(CalrecError, match=r"made from another model\.safetensors"):
        import_hf(folder.path, out)


def test_exports_that_cannot_be_are_named(folder, tmp_path):
    made = import_hf(folder.path, tmp_path / "in")
    with pytest.raises(CalrecError, match="--dtype=int8: must be one of"):
        export_hf(made, tmp_path / "out", dtype="int8")
    with pytest.raises(CalrecError, match="--max_shard_gib=0: must be above 0"):
        export_hf(made, tmp_path / "out", max_shard_gib=0)
    with pytest.raises(CalrecError, match="hf exists already"):
        export_hf(made, folder.path)
    other = Folder(tmp_path / "other", "qwen3")
    import_hf(other.path, tmp_path / "qwen3")
    with pytest.raises(CalrecError, match="is not the tokenizer that .* was trained with .*--tokenizer"):
        export_hf(made, tmp_path / "out", tokenizer=tmp_path / "qwen3" / "tokenizer")
    export_hf(made, tmp_path / "half", dtype="bfloat16")
    assert {x.dtype for x in read_all(tmp_path / "half").values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert not (tmp_path / "out").exists()
