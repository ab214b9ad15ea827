"""Decoding speed: samples against Hugging Face and T5X, constrained beams against free ones, growth.

    JAX_PLATFORMS=cpu python benchmarks/decode.py --part=peer --prompt=256
    JAX_PLATFORMS=cpu python benchmarks/decode.py --part=peer --prompt=256 --peer=t5x    # where docs/t5x.md is followed
    JAX_PLATFORMS=cpu python benchmarks/decode.py --part=trie --items=1000000
    JAX_PLATFORMS=cpu python benchmarks/decode.py --part=beam --run_dir=RUN    # any run: its catalogue and its users
    JAX_PLATFORMS=cpu python benchmarks/decode.py --part=growth

`peer` is against `generate` of transformers (extra `bench`), against T5X with --peer=t5x, or prints our figure alone
with --peer=none. Both sides write 32 samples of exactly 32 tokens a user at T = 0.5, in turns, and the medians of the
rounds are printed: of the clock, and of the processor time, which other work on the machine changes less. Compilation
is left out, and printed apart where it is ours. Both peers have our weights. T5X runs as its users run it, its
`DecoderOnlyModel` over its example decoder, which knows positions by T5's biases and not by RoPE. That decoder is not
in T5X's installed package: a checkout of T5X must be in PYTHONPATH.
"""

import argparse
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types

import numpy as np

from calrec_jax import allocator

# 8 M parameters in the body, as a Llama: RoPE, RMSNorm, SwiGLU, tied embeddings.
SIZES = {"embed_dim": 256, "num_layers": 8, "num_heads": 8, "num_kv_heads": 8, "mlp_dim": 960, "activation": "silu"}
VOCAB, NEW, SAMPLES, TEMPERATURE = 8192, 32, 32, 0.5


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", required=True, choices=("peer", "trie", "beam", "growth", "grow"))
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt (peer)")
    parser.add_argument("--users", type=int, default=32, help="users a round (peer), or in all (beam)")
    parser.add_argument("--batch_users", type=int, default=32)
    parser.add_argument("--peer", default="transformers", choices=("transformers", "t5x", "none"))
    parser.add_argument("--peer_users", type=int, default=1, help="users a round of the peer, which is slower")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--beams", type=int, default=50)
    parser.add_argument("--items", type=int, default=1_000_000, help="of the synthetic catalogue (trie, beam)")
    parser.add_argument("--run_dir", help="of a finished run: --part=beam on its catalogue, not a synthetic one")
    parser.add_argument("--target", default="Industrial_and_Scientific")
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    allocator.set_allocator()
    processor = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout
    name = next((line.split(":")[1].strip() for line in processor.splitlines() if line.startswith("Model name")), "?")
    print(f"machine: {os.cpu_count()} × {name}, load {os.getloadavg()[0]:.1f}")
    globals()[arguments.part](arguments)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"load {os.getloadavg()[0]:.1f}, peak memory {memory:.2f} GiB")


def interleaved(sides, rounds):
    """Median clock and processor seconds of each side, a round of each in turn."""
    seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            clock, processor = time.perf_counter(), time.process_time()
            run()
            seconds[name].append((time.perf_counter() - clock, time.process_time() - processor))
    return {name: tuple(statistics.median(x) for x in zip(*own, strict=True)) for name, own in seconds.items()}


def random_model(**sizes):
    import flax.linen as nn
    import jax

    from calrec_jax.models.transformer import Transformer, TransformerConfig

    model = Transformer(TransformerConfig(**SIZES | sizes), VOCAB)
    row = np.ones((1, 4), np.int32)
    return model, nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), row, row, row))["params"]


def random_batch(users, length, seed=0):
    from calrec_jax.decode.prefix import Batch
    from calrec_jax.decode.prompts import user_keys

    tokens = np.random.default_rng(seed).integers(2, VOCAB, (users, length)).astype(np.int32)
    keys = user_keys([str(i) for i in range(users)], 0)
    return Batch(tokens, np.full(users, length, np.int32), keys, np.arange(users))


def peer(arguments):
    from calrec_jax.decode.sampling import Sampler

    model, params = random_model()
    # No token ends a completion, so both sides write all NEW tokens; then no row is ever freed early.
    sampler = Sampler(
        model, params, eos_id=VOCAB, num_samples=SAMPLES, temperature=TEMPERATURE, max_new_tokens=NEW,
        batch_users=arguments.batch_users,
    )  # fmt: skip
    ours = random_batch(arguments.users, arguments.prompt)
    sampler(ours)
    sides, users = {"calrec": lambda: sampler(ours)}, {"calrec": arguments.users}
    if arguments.peer != "none":
        prompts = ours.tokens[: arguments.peer_users]
        theirs = PEERS[arguments.peer](model, params, prompts)
        theirs()
        sides[arguments.peer], users[arguments.peer] = theirs, len(prompts)
    print(
        f"{SAMPLES} samples of {NEW} tokens, prompt {arguments.prompt}; compiling took {sampler.compiled.seconds:.1f} s"
    )
    figures = interleaved(sides, arguments.rounds)
    for name, (clock, processor) in figures.items():
        print(f"  {name:<14}{users[name] / clock:9.3f} users/s, {processor / users[name]:8.2f} processor s a user")
    if arguments.peer in figures:
        each = [[figures[name][i] / users[name] for i in (0, 1)] for name in (arguments.peer, "calrec")]
        ratio = [theirs / ours for theirs, ours in zip(*each, strict=True)]
        print(f"  calrec is {ratio[0]:.1f} times as fast by the clock, {ratio[1]:.1f} times by processor time")
    c = model.config
    prefix = 2 * c.num_layers * c.num_kv_heads * c.head_width * arguments.prompt * 4 / 2**20
    print(f"  keys and values of a prefix: {prefix:.1f} MiB a user here, {SAMPLES * prefix:.0f} MiB if tiled")


def transformers_generate(model, params, prompts):
    """`generate(num_return_sequences=32)` of a Llama with our weights; its logits are checked against ours first."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=c.embed_dim, intermediate_size=c.mlp_dim, num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads, rms_norm_eps=c.norm_epsilon,
        rope_theta=c.rope_base, tie_word_embeddings=False, max_position_embeddings=4096, bos_token_id=None,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval()

    def tensor(x):
        return torch.from_numpy(np.ascontiguousarray(np.asarray(x, np.float32)))

    layers = params["layers"]
    weights = {
        "model.embed_tokens.weight": tensor(params["embedding"]) * c.embed_dim**0.5,  # ours scales what it reads
        "lm_head.weight": tensor(params["embedding"]),
        "model.norm.weight": tensor(params["final_norm"]["scale"]),
    }
    attention = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    names = {ours: f"self_attn.{theirs}" for ours, theirs in attention.items()}
    names |= {ours: f"mlp.{ours}_proj" for ours in ("gate", "up", "down")}
    for i in range(c.num_layers):
        for ours, theirs in names.items():
            kernel = np.asarray(layers[ours]["kernel"][i])
            into = np.prod(kernel.shape[:-1]) if ours in ("output", "down") else c.embed_dim
            weights[f"model.layers.{i}.{theirs}.weight"] = tensor(kernel.reshape(int(into), -1).T)
        for ours, theirs in (("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")):
            weights[f"model.layers.{i}.{theirs}.weight"] = tensor(layers[ours]["scale"][i])
    llama.load_state_dict(weights)
    ids = torch.from_numpy(prompts.astype(np.int64))
    place = np.broadcast_to(np.arange(prompts.shape[1], dtype=np.int32), prompts.shape)
    expected = np.asarray(model.apply({"params": params}, prompts, place, np.ones_like(prompts)))[:, -1]
    with torch.no_grad():
        found = llama(ids).logits[:, -1].numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3)

    def generate():
        with torch.no_grad():
            out = llama.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0,
                num_return_sequences=SAMPLES, max_new_tokens=NEW, min_new_tokens=NEW,
            )  # fmt: skip
        assert out.shape == (len(prompts) * SAMPLES, prompts.shape[1] + NEW)

    return generate


def t5x_sample(model, params, prompts):
    """`temperature_sample(num_decodes=32)` by T5X's `DecoderOnlyModel` over its example decoder, with our weights.

    Their logits are checked first: without T5's biases, and with all of our tokens at one position, the two agree.
    """
    import jax
    import seqio
    from t5x import models
    from t5x.examples.decoder_only import network

    c = model.config
    sizes = network.TransformerConfig(
        vocab_size=VOCAB, emb_dim=c.embed_dim, num_heads=c.num_heads, num_layers=c.num_layers, head_dim=c.head_width,
        mlp_dim=c.mlp_dim, mlp_activations=("silu", "linear"), dropout_rate=0.0, logits_via_embedding=True,
    )  # fmt: skip
    module = network.DecoderWrapper(sizes)
    theirs = models.DecoderOnlyModel(module, seqio.PassThroughVocabulary(VOCAB), None)
    users, length = prompts.shape
    # T5X reads a prompt behind its start token 0, which stands here for the first of ours. The row ends where NEW
    # tokens are written: the last of them is not read. `decoder_causal_attention` masks what is behind the prompt.
    tokens = np.zeros((users, length + NEW - 1), np.int32)
    tokens[:, 1:length] = prompts[:, 1:]
    read = np.broadcast_to(np.arange(tokens.shape[1]) < length, tokens.shape).astype(np.int32)
    batch = {"decoder_input_tokens": tokens, "decoder_causal_attention": read}
    layers = jax.tree.map(np.asarray, params["layers"])
    own = {
        "token_embedder": {"embedding": params["embedding"] * c.embed_dim**0.5},  # they divide the logits by as much
        "decoder_norm": params["final_norm"],
        "relpos_bias": {"rel_embedding": np.zeros((c.num_heads, 32), np.float32)},
    }
    for i in range(c.num_layers):
        layer = jax.tree.map(lambda x, i=i: x[i], layers)
        kernels = {name: layer[name]["kernel"].reshape(c.embed_dim, -1) for name in ("query", "key", "value")}
        kernels["query"] = kernels["query"] * c.head_width**-0.5  # their attention does not scale
        kernels["out"] = layer["output"]["kernel"].reshape(-1, c.embed_dim)
        own[f"layers_{i}"] = {
            "self_attention": {name: {"kernel": kernel} for name, kernel in kernels.items()},
            "mlp": {name: layer[ours] for name, ours in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down"))},
            "pre_self_attention_layer_norm": layer["attention_norm"],
            "pre_mlp_layer_norm": layer["mlp_norm"],
        }
    own = jax.tree.map(jax.numpy.asarray, {"decoder": own})
    shown = tokens[:, :length]
    expected = model.apply({"params": params}, shown, np.zeros_like(shown), np.ones_like(shown))
    found = module.apply({"params": own}, shown, np.ones_like(shown), enable_dropout=False)
    np.testing.assert_allclose(found, expected, atol=2e-3)

    @jax.jit
    def predict(params, batch, rng):
        options = {"temperature": TEMPERATURE, "topk": 0, "eos_id": VOCAB}
        return theirs.predict_batch_with_aux(
            params, batch, rng, return_all_decodes=True, num_decodes=SAMPLES, decoder_params=options
        )  # fmt: skip

    keys = iter(jax.random.split(jax.random.key(0), 1000))

    def sample():
        out, scores = (np.asarray(x) for x in jax.tree.leaves(predict(own, batch, next(keys))))
        assert out[..., :NEW].shape == (*scores.shape, NEW) == (users, SAMPLES, NEW)
        assert np.isfinite(scores).all()

    return sample


PEERS = {"transformers": transformers_generate, "t5x": t5x_sample}


def synthetic_catalogue(items, seed=0):
    """Titles of 8 to 39 tokens that part like real ones: early tokens come from few, later ones from more."""
    from calrec_jax.data.examples import TokenCatalogue

    rng = np.random.default_rng(seed)
    lengths = rng.integers(8, 40, items)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    choices = np.minimum(64 << np.minimum(place, 6), VOCAB - 2)
    tokens = (2 + (rng.random(len(place)) ** 3 * choices)).astype(np.int32)  # skewed, as words are
    none = np.zeros(0, np.int32)
    return TokenCatalogue(tokens, offsets, none, none, none, none, none, start_id=0, eos_id=1, cut=0)


def trie(arguments):
    from calrec_jax.decode.trie import build_trie

    catalogue = synthetic_catalogue(arguments.items)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clock, processor = time.perf_counter(), time.process_time()
    built = build_trie(catalogue.tokens, catalogue.offsets, catalogue.eos_id)
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    print(
        f"trie of {arguments.items:,} items, {len(catalogue.tokens):,} tokens: {clock:.1f} s, {processor:.1f} s "
        f"processor, {len(built.edge_tokens):,} edges, {built.nbytes / 2**20:.0f} MiB; while built, the peak rose by "
        f"{more:.2f} GiB"
    )


def beam(arguments):
    from calrec_jax.decode.beam import BeamSearch
    from calrec_jax.decode.constrained import ConstrainedBeam
    from calrec_jax.decode.trie import build_trie

    if arguments.run_dir:
        from calrec_jax.data.dataset import Dataset
        from calrec_jax.data.examples import tokenise_catalogue
        from calrec_jax.models.transformer import Transformer
        from calrec_jax.tokenizer import Tokenizer
        from calrec_jax.train.checkpoints import load_checkpoint

        run = pathlib.Path(arguments.run_dir)
        config, params, facts = load_checkpoint(run / "stage2")
        model = Transformer(config, facts["vocab_size"])
        dataset, tokenizer = Dataset.load(run / "datasets" / arguments.target), Tokenizer.load(run / "tokenizer")
        catalogue = tokenise_catalogue([dataset], tokenizer, max_target_tokens=facts["max_target_tokens"])
    else:
        model, params = random_model(num_layers=3, embed_dim=128, num_heads=4, num_kv_heads=4, mlp_dim=352)
        catalogue = synthetic_catalogue(arguments.items)
    tree = build_trie(catalogue.tokens, catalogue.offsets, catalogue.eos_id)
    batch = random_batch(arguments.users, arguments.prompt)
    batch = batch._replace(tokens=batch.tokens % model.vocab_size)
    shared = {"num_beams": arguments.beams, "batch_users": min(arguments.batch_users, arguments.users)}
    # The free beam writes texts as long as the longest item: what the constrained one scores without a step a token.
    longest = int(tree.leaf_lengths.max())
    decoders = {"free": BeamSearch(model, params, eos_id=model.vocab_size, max_new_tokens=longest, **shared)}
    for renormalise in (False, True):
        name = "constrained, renormalised" if renormalise else "constrained"
        decoders[name] = ConstrainedBeam(
            model, params, catalogue=catalogue, trie=tree, renormalise=renormalise, **shared
        )  # fmt: skip
    sides = {name: (lambda decoder=decoder: decoder(batch)) for name, decoder in decoders.items()}
    for run_side in sides.values():
        run_side()
    for decoder in decoders.values():
        decoder.compiled = counting(decoder.compiled)
    print(
        f"beam {arguments.beams}, {arguments.users} users, prompt {arguments.prompt}, {len(tree.leaf_items):,} items, "
        f"longest {longest} tokens"
    )
    figures = interleaved(sides, arguments.rounds)
    a_step = {name: decoder.compiled.seconds_of_steps / decoder.compiled.steps for name, decoder in decoders.items()}
    for name, (clock, processor) in figures.items():
        steps = decoders[name].compiled.steps / arguments.rounds
        print(
            f"  {name:<28}{clock:8.2f} s, {processor:8.2f} s processor ({clock / figures['free'][0]:.2f} and "
            f"{processor / figures['free'][1]:.2f} of the free beam's); {steps:.0f} steps after the first, "
            f"{a_step[name] * 1e3:.1f} ms each ({a_step[name] / a_step['free']:.2f})"
        )


def counting(compiled):
    """The same programs, which count the steps of the beams that they run and the seconds of them."""
    import jax

    class Counting:
        steps = 0
        seconds_of_steps = 0.0
        seconds = compiled.seconds

        def __call__(self, function, *arguments, **options):
            state = next((x for x in arguments if hasattr(x, "step")), None)
            begin = time.perf_counter()
            made = compiled(function, *arguments, **options)
            if state is not None:
                jax.block_until_ready(made)
                self.seconds_of_steps += time.perf_counter() - begin
                self.steps += int(made.step) - int(state.step)
            return made

    return Counting()


def growth(arguments):
    """Seconds and peak memory of processes that sample 1, 10 and 100 thousand users in shards."""
    for users in (1_000, 10_000, 100_000):
        command = [sys.executable, __file__, "--part=grow", f"--users={users}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(next(line for line in done.stdout.splitlines() if "users:" in line), flush=True)


def grow(arguments):
    """What one process of `growth` does: 4 samples of 4 tokens of a very small model, prompts of 16 tokens."""
    from calrec_jax.decode.sampling import Sampler
    from calrec_jax.decode.writer import Writer

    users = arguments.users
    model, params = random_model(num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=2, mlp_dim=24)
    sampler = Sampler(
        model, params, eos_id=1, num_samples=4, temperature=TEMPERATURE, max_new_tokens=4, batch_users=64
    )  # fmt: skip
    names = np.array([f"user {i}" for i in range(users)], object)
    prompts = types.SimpleNamespace(
        user_ids=names,
        lengths=np.full(users, 16),
        dropped_items=0,
        tokens=lambda rows, length: random_batch(len(rows), length, seed=int(rows[0])).tokens,
    )
    tokenizer = types.SimpleNamespace(decode_many=lambda rows: [" ".join(map(str, row)) for row in rows])
    with tempfile.TemporaryDirectory() as out:
        dataset = types.SimpleNamespace(user_ids=names)
        writer = Writer(pathlib.Path(out), "benchmark", dataset, tokenizer, prompts, sampler, 0, False)
        clock, processor = time.perf_counter(), time.process_time()
        writer.write(np.arange(users), 1024)
        clock, processor = time.perf_counter() - clock, time.process_time() - processor
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"  {users:>7,} users: {clock:7.1f} s, {processor:7.1f} s processor, {memory:.2f} GiB at the peak")


if __name__ == "__main__":
    main()
