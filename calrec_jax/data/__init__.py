"""From raw purchase logs to text and packed batches: readers, prepare, templates, examples, packing."""
