"""Seconds and memory of `calrec import_hf` and `export_hf` on a folder of a public size, with random weights.

    python benchmarks/import_hf.py --model smollm2_135m --folder DIR

On CPU the devices' memory is the host's, so the parameters themselves are in the figures.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys

STEPS = """
import pathlib, re, sys, threading, time
from calrec_jax.pretrained import export_hf, import_hf, reader
from calrec_jax.pretrained.tensors import leaves
folder, out, what = sys.argv[1:]
peak = 0.0
def now():  # without the pages of mapped files, which the system takes back when it needs them
    return int(re.search(r"RssAnon:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 2**20
def watch():
    global peak
    while True:
        peak = max(peak, now())
        time.sleep(0.002)
import jax, jax.numpy as jnp
jnp.zeros(1).block_until_ready()
before, began = now(), time.perf_counter()
threading.Thread(target=watch, daemon=True).start()
if what == "read":
    described = import_hf.read_config(pathlib.Path(folder))
    with reader.opened(pathlib.Path(folder)) as tensors:
        wanted = list(leaves(described.config, described.vocab_size))
        params = import_hf.load_parameters(tensors, wanted, tensors.prefix(), described)
elif what == "import":
    import_hf.import_hf(folder, out)
else:
    export_hf.export_hf(folder, out, max_shard_gib=0.1)
print(f"{what}: {time.perf_counter() - began:.1f} s, peak {1024 * peak:,.0f} MiB, {1024 * before:,.0f} before it began")
"""


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2_135m", help="of gin/models")
    parser.add_argument("--vocab_size", type=int, default=49_152)
    parser.add_argument("--folder", required=True, help="is emptied")
    arguments = parser.parse_args()
    root = pathlib.Path(arguments.folder)
    shutil.rmtree(root, ignore_errors=True)
    largest, total = write_folder(root / "hf", arguments.model, arguments.vocab_size)
    print(f"{arguments.model}: {total / 2**20:,.0f} MiB in bfloat16, largest tensor {largest / 2**20:,.0f} MiB")
    for what, source in (("read", "hf"), ("import", "hf"), ("export", "import")):
        subprocess.run([sys.executable, "-c", STEPS, str(root / source), str(root / what), what], check=True)


def write_folder(folder: pathlib.Path, model: str, vocab_size: int) -> tuple[int, int]:
    """A folder with random weights; bytes of the largest tensor and of all."""
    import ml_dtypes
    import numpy as np
    import safetensors.numpy
    import tokenizers

    from calrec_jax import config
    from calrec_jax.models.transformer import TransformerConfig
    from calrec_jax.pretrained.tensors import leaves
    from calrec_jax.pretrained.to_hf import family_of, to_hf

    config.load([f"models/{model}.gin"])
    sizes = TransformerConfig()
    folder.mkdir(parents=True)
    values = to_hf(sizes, vocab_size, family_of(sizes)) | {"torch_dtype": "bfloat16", "eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(values))
    tokens = {f"<{i}>": i for i in range(vocab_size)}
    tokenizers.Tokenizer(tokenizers.models.BPE(tokens, [])).save(str(folder / "tokenizer.json"))
    rng, tensors = np.random.default_rng(0), {}
    for leaf in leaves(sizes, vocab_size):
        for name in leaf.names():
            tensors[name] = rng.standard_normal(leaf.hf_shape, np.float32).astype(ml_dtypes.bfloat16)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    sizes_in_bytes = [x.nbytes for x in tensors.values()]
    return max(sizes_in_bytes), sum(sizes_in_bytes)


if __name__ == "__main__":
    main()
