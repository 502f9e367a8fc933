"""GPT-Neo behind an HTTP interface: continuous batching, OpenAI's API, metrics."""
