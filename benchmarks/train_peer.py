"""Real tokens a second of our training step and of PyTorch with Hugging Face transformers, the same model and data.

    calrec prepare … ; calrec vocab …       # of any run: its datasets and tokenizer are read, nothing is written
    python benchmarks/train_peer.py --gin_file=runs/scientific_reproduction.gin --run_dir=RUN --peer_python=PYTHON

One line for each size and row length: our step, the peer as people run it (each example a row, padded to the longest),
and the peer over the very rows that we pack (block-diagonal masks). All start from the same weights, so that the losses
of their first steps, printed last, are the same; all have both losses of CALRec, float32, AdamW and clipping; the peer,
too, makes logits at weighted places alone. A rate is that of the fastest of --steps steps: what else a machine does
only ever adds. PYTHON is one that has torch and transformers.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

SIZES = {
    "2M": {"embed_dim": 128, "num_layers": 3, "num_heads": 4, "num_kv_heads": 4, "mlp_dim": 352},
    "8M": {"embed_dim": 256, "num_layers": 8, "num_heads": 8, "num_kv_heads": 4, "mlp_dim": 704},
    "40M": {"embed_dim": 512, "num_layers": 11, "num_heads": 8, "num_kv_heads": 8, "mlp_dim": 1408},
}
TOKENS = {"2M": 7680, "8M": 5120, "40M": 2560}  # a step; whole rows of 256 and of 1,280
LEARNING_RATE, TEMPERATURE, ALPHA, BETA = 1e-3, 0.5, 0.125, 0.025


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gin_file", action="append", default=[])
    parser.add_argument("--run_dir")
    parser.add_argument("--gin", action="append", default=[], help="further bindings")
    parser.add_argument("--peer_python", default=sys.executable)
    parser.add_argument("--size", action="append", choices=SIZES, default=[])
    parser.add_argument("--row_tokens", action="append", type=int, default=[])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--peer", metavar="FILE", help=argparse.SUPPRESS)  # how it calls itself, under peer_python
    arguments = parser.parse_args()
    if arguments.peer:
        print(json.dumps(peer(arguments.peer)))
        return
    from calrec_jax import allocator

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    allocator.set_allocator()
    print("| size, row | real share | ours | peer, padded | peer, packed | ours by them | loss |\n|" + " --- |" * 7)
    for size in arguments.size or SIZES:
        for row_tokens in arguments.row_tokens or (256, 1280):
            compare(arguments, size, row_tokens)


def compare(arguments, size, row_tokens):
    import gin
    import numpy as np

    from calrec_jax import config
    from calrec_jax.data.packing import PackedStream
    from calrec_jax.pipeline import Line
    from calrec_jax.train.batching import Batching

    config.load(arguments.gin_file, [f"RUN_DIR={arguments.run_dir!r}", *arguments.gin])
    with gin.config_scope("stage2"):
        line = Line()
    batching = Batching(
        batch_rows=TOKENS[size] // row_tokens, row_tokens=row_tokens, row_examples=max(2, row_tokens // 64),
        max_history_tokens=208 if row_tokens == 256 else 1024, max_target_tokens=24 if row_tokens == 256 else 128,
        next_item_loss="all",
    )  # fmt: skip
    tokenizer = line.tokenizer()
    examples = batching.examples(line.datasets([line.target]), tokenizer, "train")
    batch = PackedStream(examples, batching.packing(), seed=0).batch(0)
    real = int(np.count_nonzero(batch["decoder_segment_ids"]))
    weights, step = ours(SIZES[size], batch, tokenizer.vocab_size)
    loss, seconds = timed(step, arguments.steps)
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        settings = json.dumps([SIZES[size], tokenizer.vocab_size, arguments.steps])
        np.savez(file, settings=settings, **batch, **weights)
        file.flush()
        done = subprocess.run(
            [arguments.peer_python, __file__, "--peer", file.name], capture_output=True, text=True, check=False
        )
    if done.returncode:
        sys.exit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    rates = [real / s for s in (seconds, found["padded"][1], found["packed"][1])]
    losses = " ".join(f"{x:.3f}" for x in (loss, found["padded"][0], found["packed"][0]))
    print(
        f"| {size}, {row_tokens} | {100 * real / batch['decoder_segment_ids'].size:.1f} % | "
        + " | ".join(f"{rate:,.0f}" for rate in rates)
        + f" | {rates[0] / rates[1]:.2f}, {rates[0] / rates[2]:.2f} | {losses} |",
        flush=True,
    )


def timed(step, steps):
    """(the first step's loss, least seconds of a step after it)."""
    loss, seconds = step(), []
    for _ in range(steps):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return loss, min(seconds)


def ours(sizes, batch, vocab_size):
    """(weights by the peer's names before the first step, a step that gives its loss)."""
    import jax
    import numpy as np

    from calrec_jax.losses import LossConfig
    from calrec_jax.models.transformer import Transformer, TransformerConfig
    from calrec_jax.pretrained.tensors import leaves
    from calrec_jax.train import step as training
    from calrec_jax.train.optimizer import OptimizerConfig

    # Llama's function; blocks of 64 and small chunks of logits suit a CPU's caches.
    config = TransformerConfig(**sizes, scale_embeddings=False, dropout_rate=0.0, scan_layers=False, attention_block=64)
    model, loss_config = Transformer(config, vocab_size), LossConfig(ALPHA, BETA, TEMPERATURE, chunk=16)
    optimizer = OptimizerConfig(learning_rate=LEARNING_RATE).transformation(1000)
    mesh = training.make_mesh()
    state, shardings = training.init_state(model, optimizer, mesh, 0)
    weights = {}
    for leaf in leaves(config, vocab_size):
        array = np.array(leaf.of(state.params))  # a copy: the first step gives the buffer away
        weights |= {
            name: leaf.theirs(x) for name, x in zip(leaf.names(), array if leaf.layers else [array], strict=True)
        }
    train_step = training.make_train_step(model, loss_config, optimizer, 0, mesh, shardings)
    holder = [state]

    def step():
        holder[0], metrics = train_step(holder[0], batch)
        return float(jax.block_until_ready(metrics)["loss"])

    return weights, step


def peer(path):
    """Losses and seconds a step of both ways to run it."""
    import numpy as np
    import torch
    import transformers

    batch = dict(np.load(path))
    sizes, vocab_size, steps = json.loads(str(batch.pop("settings")))
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=sizes["embed_dim"], intermediate_size=sizes["mlp_dim"],
        num_hidden_layers=sizes["num_layers"], num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_kv_heads"], hidden_act="gelu_pytorch_tanh", rms_norm_eps=1e-6,
        max_position_embeddings=2048, tie_word_embeddings=True, attn_implementation="sdpa",
    )  # fmt: skip
    weights = {name: torch.tensor(batch.pop(name)) for name in [*batch] if name.endswith(".weight")}
    found = {}
    for name, prepare in (("padded", padded), ("packed", packed)):
        model = transformers.LlamaForCausalLM(config)
        model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        towers_and_loss = prepare(batch)

        def step(model=model, optimizer=optimizer, towers_and_loss=towers_and_loss):
            optimizer.zero_grad(set_to_none=True)
            generation, user, target, item = towers_and_loss(model)
            excluded = same(batch)
            tt, ut = (info_nce(item, context, excluded) for context in (target, user))
            loss = (1 - ALPHA - BETA) * generation + ALPHA * tt + BETA * ut
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            return float(loss.detach())

        found[name] = timed(step, steps)
    return found


def same(batch):
    import torch

    real = batch["example_mask"].reshape(-1) > 0
    ids = [torch.tensor(batch[k].reshape(-1)[real]) for k in ("target_user", "target_item", "target_text")]
    pairs = sum((x[:, None] == x[None, :]).int() for x in ids) > 0
    return pairs & ~torch.eye(len(pairs), dtype=torch.bool)


def info_nce(anchor, context, excluded):
    import torch

    scores = (torch.nn.functional.normalize(anchor) @ torch.nn.functional.normalize(context).T) / TEMPERATURE
    scores = scores.masked_fill(excluded, -1e30)
    return torch.nn.functional.cross_entropy(scores, torch.arange(len(scores)))


def next_item(model, hidden, targets, weights):
    """The weighted mean of the cross-entropy, with logits at weighted places alone."""
    import torch

    places = weights > 0
    losses = torch.nn.functional.cross_entropy(model.lm_head(hidden[places]), targets[places], reduction="none")
    return (losses * weights[places]).sum() / weights.sum()


def segments_of(batch):
    """(joint, alone) places of each example, in the order of the batch."""
    import numpy as np

    for row, slot in zip(*np.nonzero(batch["example_mask"]), strict=True):
        segments = batch["decoder_segment_ids"][row]
        yield row, np.flatnonzero(segments == 2 * slot + 1), np.flatnonzero(segments == 2 * slot + 2)


def padded(batch):
    """Each example a row of its own, the target alone another, both padded to their longest."""
    import numpy as np
    import torch

    examples = list(segments_of(batch))

    def rows(which, key):
        longest = max(len(e[which]) for e in examples)
        out = np.zeros((len(examples), longest), batch[key].dtype)
        for i, e in enumerate(examples):
            out[i, : len(e[which])] = batch[key][e[0], e[which]]
        return torch.tensor(out if out.dtype == np.float32 else out.astype(np.int64))

    joint, alone = (
        {k: rows(which, k) for k in batch if batch[k].shape == batch["user_pool"].shape} for which in (1, 2)
    )

    def run(model):
        states = [
            model.model(
                input_ids=part["decoder_input_tokens"], attention_mask=(part["decoder_segment_ids"] > 0).long()
            ).last_hidden_state
            for part in (joint, alone)
        ]
        generation = next_item(model, states[0], joint["decoder_target_tokens"], joint["decoder_loss_weights"])

        def pool(hidden, places):
            mask = (places > 0).float()[:, :, None]
            return (hidden * mask).sum(1) / mask.sum(1)

        user, target = (pool(states[0], joint[k]) for k in ("user_pool", "target_pool"))
        return generation, user, target, pool(states[1], alone["item_pool"])

    return run


def packed(batch):
    """The rows that we pack, with a block-diagonal causal mask."""
    import numpy as np
    import torch

    x = {k: torch.tensor(v if v.dtype == np.float32 else v.astype(np.int64)) for k, v in batch.items()}
    segments, length = x["decoder_segment_ids"], x["decoder_segment_ids"].shape[1]
    seen = (segments[:, :, None] == segments[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
    slots = torch.arange(1, x["example_mask"].shape[1] + 1)
    real = x["example_mask"].reshape(-1) > 0

    def run(model):
        hidden = model.model(
            input_ids=x["decoder_input_tokens"], attention_mask=mask, position_ids=x["decoder_positions"]
        ).last_hidden_state
        generation = next_item(model, hidden, x["decoder_target_tokens"], x["decoder_loss_weights"])

        def pool(places):
            member = (places[:, None, :] == slots[None, :, None]).float()
            total = (member @ hidden).reshape(-1, hidden.shape[-1])[real]
            return total / member.sum(-1).reshape(-1, 1)[real]

        return generation, pool(x["user_pool"]), pool(x["target_pool"]), pool(x["item_pool"])

    return run


if __name__ == "__main__":
    sys.exit(main())
