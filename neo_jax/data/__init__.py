"""From text to batches, in reading order: sources, tokenizer, prepare, packing, feed."""
