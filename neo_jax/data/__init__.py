"""Text to batches, in order: sources, tokenizer, writer, prepare, packing, mixture, feed."""
