"""From prompts to completions: sampling, the catalogue's trie, beam search, tower embeddings, shards."""
