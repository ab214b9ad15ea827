"""What transformers makes of folders; run by a Python that has it: `python peer_transformers.py request.json out.npz`.

The request: {"folders": {name: path}, "tokens": npz of name → [B, L], "steps": N, "texts": [...],
"save": {name: path}}, folders that transformers writes of a model.
"""

import json
import sys

import numpy as np
import torch
import transformers


def main(request_path, out_path):
    with open(request_path) as file:
        request = json.load(file)
    tokens, results = np.load(request["tokens"]), {}
    for name, folder in request["folders"].items():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        ids = torch.tensor(tokens[name].astype(np.int64))
        with torch.no_grad():
            results[f"{name}/logits"] = model(ids).logits.numpy()
            greedy = transformers.GenerationConfig(
                do_sample=False, max_new_tokens=request["steps"], eos_token_id=None, pad_token_id=0
            )
            model.generation_config = greedy
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
        results[f"{name}/greedy"] = out[:, ids.shape[1] :].numpy()
        results[f"{name}/class"] = np.array(type(model).__name__)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        if name in request["save"]:
            model.save_pretrained(request["save"][name], max_shard_size="40KB")
            tokenizer.save_pretrained(request["save"][name])
        rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in request["texts"]]
        results[f"{name}/ids"] = np.concatenate(rows)
        results[f"{name}/lengths"] = np.array([len(row) for row in rows])
    np.savez(out_path, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
