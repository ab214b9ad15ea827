"""Training speed of a run's model on its own data, in real (non-padding) tokens a second, and where the time goes.

    calrec quickstart                       # or any run: its datasets and tokenizer are read, nothing is written
    python benchmarks/train.py --gin_file=runs/quickstart.gin --run_dir=calrec_quickstart

Prints the median step, real tokens a second, the share of real tokens, peak memory, the share of the machine's
measured matrix-product rate, and the seconds of nested parts: the forward pass, with the loss, with the gradient.
Run it alone: on two cores another process halves every figure. The command's allocator settings apply (allocator.py).
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time

from calrec_jax import allocator


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gin_file", action="append", required=True)
    parser.add_argument("--run_dir", required=True)
    parser.add_argument("--stage", default="stage2")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--gin", action="append", default=[], help="further bindings, e.g. --gin='Batching.row_tokens=512'"
    )
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    allocator.set_allocator()
    measure(arguments)


def timed(function, *inputs, repeats=8):
    """Median seconds of a jitted function, after one call that compiles it."""
    import jax

    jax.block_until_ready(function(*inputs))
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(function(*inputs))
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def matmul_rate():
    """FLOP/s of a large float32 product: what this machine can do."""
    import jax
    import jax.numpy as jnp

    a = jnp.ones((2048, 2048))
    return 2 * 2048**3 / timed(jax.jit(lambda a: a @ a), a)


def measure(arguments):
    import gin
    import jax
    import numpy as np

    from calrec_jax import config
    from calrec_jax.data.packing import PackedStream
    from calrec_jax.losses import LossConfig, calrec_loss
    from calrec_jax.models.transformer import Transformer, TransformerConfig
    from calrec_jax.pipeline import Line
    from calrec_jax.train import step as steps
    from calrec_jax.train.batching import Batching
    from calrec_jax.train.feed import training_batch
    from calrec_jax.train.optimizer import OptimizerConfig

    config.load(arguments.gin_file, [f"RUN_DIR={arguments.run_dir!r}", *arguments.gin])
    with gin.config_scope(arguments.stage):
        line, model_config, batching, optimizer_config = Line(), TransformerConfig(), Batching(), OptimizerConfig()
        loss_config = LossConfig()
    names = [line.target] if arguments.stage == "stage2" else line.categories
    tokenizer = line.tokenizer()
    examples = batching.examples(line.datasets(names), tokenizer, "train")
    stream = PackedStream(examples, batching.packing(), seed=0, mixture_exponent=batching.mixture_exponent)
    begin = time.perf_counter()
    batches = [
        training_batch(stream, s, sample_forced_tokens=batching.sample_forced_tokens, seed=0)
        for s in range(arguments.steps)
    ]
    input_seconds = (time.perf_counter() - begin) / arguments.steps
    model, mesh = Transformer(model_config, tokenizer.vocab_size), steps.make_mesh()
    optimizer = optimizer_config.transformation(1000)
    state, shardings = steps.init_state(model, optimizer, mesh, 0)
    # Before the step donates the state's buffers.
    parts = _parts(model, loss_config, jax.device_get(state.params), batches[0], calrec_loss)
    train_step = steps.make_train_step(model, loss_config, optimizer, 0, mesh, shardings)
    begin = time.perf_counter()
    state, metrics = train_step(state, batches[0])
    jax.block_until_ready(metrics)
    compile_seconds = time.perf_counter() - begin
    seconds = []
    for batch in batches:
        begin = time.perf_counter()
        state, metrics = train_step(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - begin)
    step = statistics.median(seconds)
    real = np.mean([np.count_nonzero(b["decoder_segment_ids"]) for b in batches])
    places = batches[0]["decoder_segment_ids"].size
    weighted = np.mean([np.count_nonzero(b["decoder_loss_weights"]) for b in batches])
    sizes = {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in state.params.items()}
    body = sum(sizes.values()) - sizes["embedding"]
    flops = 6 * (body * places + sizes["embedding"] * weighted)  # of the weights' products, forward and backward
    peak = matmul_rate()
    processor = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout
    name = next((line.split(":")[1].strip() for line in processor.splitlines() if line.startswith("Model name")), "?")
    rows = {
        "machine": f"{os.cpu_count()} × {name}, jax {jax.__version__} on {jax.devices()[0].platform}",
        "model": f"{sum(sizes.values()) / 1e6:.2f} M parameters, {sizes['embedding'] / 1e6:.2f} M of them embeddings",
        "batch": f"{batching.batch_rows} rows of {batching.row_tokens} tokens, {100 * real / places:.1f} % real",
        "step": f"{1e3 * step:.0f} ms ({1e3 * min(seconds):.0f} to {1e3 * max(seconds):.0f})",
        "compile": f"{compile_seconds:.1f} s",
        "speed": f"{real / step:,.0f} real tokens/s",
        "input": f"{1e3 * input_seconds:.1f} ms a batch, {real / input_seconds:,.0f} real tokens/s",
        "products": f"{flops / step / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s measured, {100 * flops / step / peak:.0f} %",
        "peak memory": f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB",
    }
    for label, value in rows.items():
        print(f"{label:<14}{value}")
    for part, value in (*parts, ("whole step", step)):
        print(f"  {part:<32} {1e3 * value:6.0f} ms")


def _parts(model, loss_config, params, batch, calrec_loss):
    """Seconds of nested parts without dropout, so that differences say what each adds."""
    import jax

    def hidden_of(params):
        return model.apply({"params": params}, batch["decoder_input_tokens"], batch["decoder_positions"],
                           batch["decoder_segment_ids"], method="activations")  # fmt: skip

    def loss_of(params):
        return calrec_loss(hidden_of(params), params["embedding"], batch, loss_config)[0]

    forward = timed(jax.jit(hidden_of), params)
    loss = timed(jax.jit(loss_of), params)
    gradient = timed(jax.jit(jax.value_and_grad(loss_of)), params)
    return ("forward pass", forward), ("forward pass and losses", loss), ("… and gradients", gradient)


if __name__ == "__main__":
    sys.exit(main())
