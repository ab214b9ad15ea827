"""From completions to rankings: the BM25 layer, the quasi-round-robin and the other sources of scores."""
