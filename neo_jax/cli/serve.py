"""neo-jax serve: an OpenAI-compatible server."""

import dataclasses
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
from tyro.conf import OmitArgPrefixes, UseAppendAction

from neo_jax import __version__
from neo_jax.checkpoints.hub import BUNDLED
from neo_jax.cli import parse
from neo_jax.cli.cluster import ClusterOptions
from neo_jax.cli.options import TextModelOptions
from neo_jax.devices.processes import check_same, is_leader, say
from neo_jax.devices.signals import taken
from neo_jax.errors import NeoError
from neo_jax.fields import check, number
from neo_jax.text.options import check_filter
from neo_jax.text.word_filter import WordFilter, read_word_filter

if TYPE_CHECKING:
    from neo_jax.decode.scheduler import Scheduler
    from neo_jax.devices.channel import Channel
    from neo_jax.serving.service import Service
    from neo_jax.text.language_model import LanguageModel

_KEY = "NEO_JAX_API_KEY"
_HEARD = 0.5  # seconds in which clients hear that their texts go no further
_DOCS = "https://github.com/neo-jax/neo_jax/blob/main/docs/serve.md"


@dataclasses.dataclass(frozen=True)
class Options:
    """Serves a GPT-Neo to clients of OpenAI's API: completions, chat, embeddings.

    Needs pip install 'neo_jax[serve]'. SIGTERM or Ctrl-C: what was accepted is finished first.
    """

    host: str = "127.0.0.1"  # 0.0.0.0 lets other machines in: give a key too
    port: int = number(8000, least=0, most=65535)  # 0 takes a free one
    max_sequences: int = number(16, least=1)  # texts that are written at a time; others wait
    max_queued_requests: int = number(256, least=1)  # prompts that may wait; more are answered 503
    # tokens of prompts that may wait; 0 is any number
    max_queued_tokens: int = number(0, least=0)
    # MB for what prompts began with, which others that begin so need not read; 0 is off
    prefix_cache: int = number(256, least=0)
    # likeliest tokens that a request may ask for
    max_logprobs: int = number(20, least=0, most=1000)
    # clients must send one of these; may be repeated; also NEO_JAX_API_KEY, which ps does not show
    api_key: tuple[str, ...] = ()
    # of conversations: plain, or a file in Jinja; else the checkpoint's own, if it has one
    chat_template: str = ""
    # what clients call the model; may be repeated; else what --model says
    served_model_name: tuple[str, ...] = ()
    # seconds that requests have after SIGTERM before they are cut
    shutdown_timeout: float = number(30.0, least=0)
    # seconds after which a request is cut, or answered 503 where it still waits; 0 is off
    request_timeout: float = number(0.0, least=0)
    # a file of words, one a line, before any of which a text ends; # begins a comment
    filter: str = ""
    filter_review: str = ""  # a file to which what the filter withholds is added, for people
    # which model, and how to hold it
    model: OmitArgPrefixes[TextModelOptions] = dataclasses.field(default_factory=TextModelOptions)
    # where a mesh spans several processes; each of them runs the same command, the first answers
    cluster: OmitArgPrefixes[ClusterOptions] = dataclasses.field(default_factory=ClusterOptions)

    def __post_init__(self) -> None:
        check(self)
        check_filter(self.filter, self.filter_review)
        if "" in (*self.api_key, *self.served_model_name):
            raise NeoError("a key or a name of the model is empty; leave it out.")

    @property
    def names(self) -> tuple[str, ...]:
        """What clients may call the model."""
        return self.served_model_name or (self.model.model or BUNDLED,)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that clients may send."""
        return (*self.api_key, *filter(None, [os.environ.get(_KEY)]))

    def scheduler(self, lm: "LanguageModel", channel: "Channel | None" = None) -> "Scheduler":
        """Returns what decides who is written when, the same in all processes."""
        from neo_jax.serving.engine import make_scheduler

        prefix_bytes = 10**6 * self.prefix_cache
        return make_scheduler(lm, self.max_sequences, self.max_logprobs, prefix_bytes, channel)


def main(args: Sequence[str]) -> None:
    """Runs the verb."""
    options = parse(UseAppendAction[Options], "serve", args)
    try:
        from neo_jax.serving import server
    except ImportError as error:
        raise NeoError(
            f"a server needs more packages ({error}); pip install 'neo_jax[serve]'."
        ) from None
    words = read_word_filter(options.filter, options.filter_review) if options.filter else None
    with options.cluster.joined(options.model.is_split) as lose:
        if not is_leader():
            _follow(options, lose)
            return
        with server.bind(options.host, options.port) as bound:  # known before the model is loaded
            _lead(options, bound, words, lose)


def _lead(
    options: Options, bound: socket.socket, words: WordFilter | None, lose: Callable[[], None]
) -> None:
    """Serves, as the only process or the first of several."""
    from neo_jax.serving import server

    lm = options.model.load()
    channel = _connect(options, lose)
    service = _service(options, lm, words, channel)
    if channel:
        channel.on_loss = lambda: _tell(service, lose)
    service.engine.start()
    try:
        server.serve(
            service,
            bound,
            options.shutdown_timeout,
            lambda: say(f"serving {service.names[0]} at {server.url(bound)} (docs: {_DOCS})"),
            lambda: say(
                f"ending: requests have {options.shutdown_timeout:g} s, or a second signal"
            ),
            channel.lines() if channel else (),
        )
    finally:
        service.engine.close()
    if channel:
        channel.close()


def _follow(options: Options, lose: Callable[[], None]) -> None:
    """Computes together with process 0, which decides what and until when."""
    from neo_jax.decode.lockstep import follow

    lm = options.model.load()
    channel = _connect(options, lose)
    assert channel is not None

    def leave() -> bool:
        channel.send(b"leave")
        return True

    with taken(leave):
        follow(options.scheduler(lm), channel)


def _connect(options: Options, lose: Callable[[], None]) -> "Channel | None":
    """Returns the way to the other processes, if there are any, which must serve the same."""
    if jax.process_count() == 1:
        return None
    from neo_jax.devices.channel import connect

    shared = (__version__, options.model, options.max_sequences, options.max_logprobs)
    check_same(repr((*shared, options.prefix_cache)))
    return connect(lose, options.cluster.start_timeout)


def _tell(service: "Service", lose: Callable[[], None]) -> None:
    """Ends the process where another one died; its clients hear of it."""
    service.engine.fail(RuntimeError("another process died"))
    time.sleep(_HEARD)
    lose()


def _service(
    options: Options, lm: "LanguageModel", words: WordFilter | None, channel: "Channel | None"
) -> "Service":
    from neo_jax.serving.engine import Engine
    from neo_jax.serving.metrics import Metrics
    from neo_jax.serving.service import Service
    from neo_jax.serving.templates import find_chat_template

    if lm.tokenizer is None:
        raise NeoError(f"{lm.folder} holds no tokenizer; name one with --tokenizer.")
    if line := lm.defaults.report({"num_beams": 1}):
        say(line)
    template = find_chat_template(lm, options.chat_template)
    if template is None:
        say("chat: the model has no template; --chat-template plain takes a simple one")
    elif options.chat_template:
        say("chat: GPT-Neo and GPT-2 are not instruction-tuned; they go on with a conversation")
    metrics = Metrics(options.names[0])
    engine = Engine(
        lm,
        options.scheduler(lm, channel),
        metrics,
        max_queued_requests=options.max_queued_requests,
        max_queued_tokens=options.max_queued_tokens,
        words=words,
    )
    return Service(
        lm,
        lm.tokenizer,
        engine,
        metrics,
        options.names,
        template,
        max_logprobs=options.max_logprobs,
        max_prompts=options.max_queued_requests,
        request_timeout=options.request_timeout,
        api_keys=options.keys,
        version=__version__,
    )
