"""What a server counts, under the names that vLLM's dashboards know.

Any thread may call all methods.
"""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
"""Of what `Metrics.text` returns."""

_WAITS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOTALS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
_STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """Counters, gauges and histograms of one model."""

    def __init__(self, model_name: str) -> None:
        """Begins at 0; every line has the label `model_name`."""
        self._registry = CollectorRegistry()
        self._model = model_name
        self._running = self._gauge("num_requests_running", "Texts that are being written.")
        self._waiting = self._gauge("num_requests_waiting", "Requests that nobody has begun.")
        self._usage = self._gauge("kv_cache_usage_perc", "Part of the cache's rows in use, 0 to 1.")
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts that were read.")
        self._written = self._counter("generation_tokens", "Tokens that were written.")
        self._queried = self._counter("prefix_cache_queries", "Tokens of prompts looked up.")
        self._hit = self._counter("prefix_cache_hits", "Of these, found: not read again.")
        self._kept = self._gauge("prefix_cache_bytes", "Of keys and values of prompts' beginnings.")
        self._before = 0, 0  # of the last call of `prefixes`
        self._rejected = self._counter("admission_rejections", "Requests answered by 503.")
        self._finished = Counter(
            "vllm:request_success",
            "Requests that ended.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        for reason in ("stop", "length", "content_filter", "abort"):
            self._finished.labels(model_name, reason)  # 0 is shown too
        self._first = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _WAITS
        )
        self._next = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a text.", _WAITS
        )
        self._each = self._histogram(
            "request_time_per_output_token_seconds", "Mean of a request.", _WAITS
        )
        self._whole = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the end.", _TOTALS
        )
        self._queue = self._histogram("request_queue_time_seconds", "Waiting.", _TOTALS)
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "Reading the prompt.", _TOTALS
        )
        self._decode = self._histogram("request_decode_time_seconds", "Writing.", _TOTALS)
        self._prompts = self._histogram(
            "request_prompt_tokens", "Tokens of a request's prompt.", _TOKENS
        )
        self._texts = self._histogram(
            "request_generation_tokens", "Tokens that a request got.", _TOKENS
        )
        self._steps = self._histogram("iteration_tokens_total", "Tokens that a step wrote.", _STEPS)

    def watch(
        self,
        running: Callable[[], int],
        waiting: Callable[[], int],
        usage: Callable[[], float],
    ) -> None:
        """Takes gauges from functions, which are called when somebody looks."""
        self._running.set_function(running)
        self._waiting.set_function(waiting)
        self._usage.set_function(usage)

    def queued(self, prompt_tokens: int) -> None:
        """A request is accepted."""
        self._prompts.observe(prompt_tokens)

    def rejected(self) -> None:
        """A request finds no room."""
        self._rejected.inc()

    def admitted(self, seconds_queued: float) -> None:
        """A request's prompt is begun."""
        self._queue.observe(seconds_queued)

    def read(self, prompt_tokens: int, seconds: float) -> None:
        """A prompt has been read."""
        self._prompt.inc(prompt_tokens)
        self._prefill.observe(seconds)

    def first_token(self, seconds_since_arrival: float) -> None:
        """A request has its first token."""
        self._first.observe(seconds_since_arrival)

    def next_token(self, seconds_since_last: float) -> None:
        """A request has another token."""
        self._next.observe(seconds_since_last)

    def step(self, num_tokens: int) -> None:
        """A step wrote so many tokens."""
        self._written.inc(num_tokens)
        self._steps.observe(num_tokens)

    def prefixes(self, queried: int, hit: int, num_bytes: int) -> None:
        """So many tokens of prompts were looked up so far, and found; what is kept has a size."""
        self._queried.inc(queried - self._before[0])
        self._hit.inc(hit - self._before[1])
        self._before = queried, hit
        self._kept.set(num_bytes)

    def finished(
        self, finish_reason: str, seconds_total: float, seconds_decoding: float, new_tokens: int
    ) -> None:
        """A request has ended, also by its client's leaving."""
        self._finished.labels(self._model, finish_reason).inc()
        self._whole.observe(seconds_total)
        self._texts.observe(new_tokens)
        if new_tokens:
            self._decode.observe(seconds_decoding)
        if new_tokens > 1:
            self._each.observe(seconds_decoding / (new_tokens - 1))

    def text(self) -> bytes:
        """Returns all of them in Prometheus' format, `CONTENT_TYPE`."""
        return generate_latest(self._registry)

    def _gauge(self, name: str, what: str) -> Gauge:
        made = Gauge(f"vllm:{name}", what, ["model_name"], registry=self._registry)
        return made.labels(self._model)

    def _counter(self, name: str, what: str) -> Counter:
        made = Counter(f"vllm:{name}", what, ["model_name"], registry=self._registry)
        return made.labels(self._model)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(
            f"vllm:{name}", what, ["model_name"], registry=self._registry, buckets=buckets
        )
        return made.labels(self._model)
