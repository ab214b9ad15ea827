"""Open language models in and out, in the folders of Hugging Face: weights, sizes, tokenizers."""
