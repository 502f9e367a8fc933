"""From text to batches, in reading order: sources, tokenizer, writer, prepare, packing, feed."""
