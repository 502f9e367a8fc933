"""neo-jax chat: a conversation in the terminal."""

import contextlib
import dataclasses
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

from tyro.conf import OmitArgPrefixes, UseAppendAction

from neo_jax.cli import parse
from neo_jax.cli.chat_replies import model_reply, server_reply
from neo_jax.cli.options import TextModelOptions, said_in
from neo_jax.decode.options import SamplingOptions
from neo_jax.devices.processes import say
from neo_jax.devices.signals import WATCH, taken
from neo_jax.errors import NeoError, suggest
from neo_jax.fields import check, number
from neo_jax.text.conversation import Conversation, Reply, read_conversation
from neo_jax.text.options import TextOptions, check_filter, pick
from neo_jax.text.word_filter import read_word_filter

HELP = """\
/retry         another answer to the last question
/undo          takes back the last question and its answer
/system TEXT   what stands before the conversation; without TEXT, nothing
/save FILE     writes the conversation as JSON
/load FILE     goes on with one that was saved
/help          this list
/quit          ends; so does Ctrl-D
Ctrl-C stops an answer. A line that begins with // says what follows the first /."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Talks with a GPT-Neo, here or at a server; /help lists what can be done.

    Input that is piped in is a turn a line.
    """

    server: str = ""  # the address of a server to talk with, as http://127.0.0.1:8000
    api_key: str = ""  # of the server; also NEO_JAX_API_KEY, which ps does not show
    system: str = ""  # what stands before the conversation
    # plain, or a file in Jinja; else the checkpoint's own, or plain
    chat_template: str = ""
    max_new_tokens: int = number(200, least=1)  # tokens of an answer, at most
    stop: tuple[str, ...] = ()  # ends an answer before this string; may be repeated
    # a file of words, one a line, before any of which an answer ends; # begins a comment
    filter: str = ""
    filter_review: str = ""  # a file to which what the filter withholds is added, for people
    # which model, and how to hold it
    model: OmitArgPrefixes[TextModelOptions] = dataclasses.field(default_factory=TextModelOptions)
    # how tokens are chosen
    sampling: OmitArgPrefixes[SamplingOptions] = dataclasses.field(default_factory=SamplingOptions)

    def __post_init__(self) -> None:
        check(self)
        check_filter(self.filter, self.filter_review)
        if self.filter and self.server:
            raise NeoError("a server has its own --filter; leave it out, or --server.")
        if self.server and (self.model.model or self.chat_template):
            raise NeoError("a server has its own model and template; leave out --server, or these.")
        if self.api_key and not self.server:
            raise NeoError("--api-key has no effect without --server.")


def main(args: Sequence[str]) -> None:
    """Runs the verb."""
    options = parse(UseAppendAction[Options], "chat", args)
    _Chat(options, said_in(args)).run()


class _Chat:
    """A conversation, and who answers."""

    def __init__(self, options: Options, said: Container[str]) -> None:
        self._conversation = Conversation(options.system)
        self._stopped, self._ended = threading.Event(), False
        self._sampling = options.sampling
        if "seed" not in said:
            self._reseed(secrets.randbelow(2**32))
        self._is_terminal = sys.stdin is not None and sys.stdin.isatty()
        self._reply = (
            self._at_server(options, said) if options.server else self._here(options, said)
        )

    def run(self) -> None:
        """Takes lines until they end."""
        if self._is_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (input() edits lines, and knows earlier ones)
            say("GPT-Neo and GPT-2 are not instruction-tuned; they go on with a conversation")
            say("/help lists what can be done, Ctrl-D ends")
        for line in self._lines():
            try:
                if line == "/quit":
                    return
                self._take(line)
            except NeoError as error:
                if not self._is_terminal:
                    raise
                say(f"neo-jax: {error}")
            if self._ended:
                return

    def _here(self, options: Options, said: Container[str]) -> Reply:
        try:
            from neo_jax.serving.templates import find_chat_template
        except ImportError as error:
            raise NeoError(
                f"a conversation needs more packages ({error}); pip install 'neo_jax[serve]'."
            ) from None
        lm = options.model.load()
        if lm.tokenizer is None:
            raise NeoError(f"{lm.folder} holds no tokenizer; name one with --tokenizer.")
        fields = dataclasses.asdict(options.sampling)
        given = {name: value for name, value in fields.items() if name in said} | {"num_beams": 1}
        if line := lm.defaults.report(given):
            say(line)
        filled = fields | pick(lm.defaults.fill(given), SamplingOptions)
        self._sampling = SamplingOptions(**filled | {"seed": self._sampling.seed})
        template = find_chat_template(lm, options.chat_template) or find_chat_template(lm, "plain")
        assert template
        text = TextOptions(options.max_new_tokens, options.stop)
        words = read_word_filter(options.filter, options.filter_review) if options.filter else None
        return model_reply(lm, template, lambda: self._sampling, text, words)

    def _at_server(self, options: Options, said: Container[str]) -> Reply:
        key = options.api_key or os.environ.get("NEO_JAX_API_KEY", "")
        sent = {"temperature", "top_p", "seed"}
        renamed = {"min_new_tokens": "min_tokens"}

        def fields() -> dict[str, Any]:
            found: dict[str, Any] = {"max_tokens": options.max_new_tokens}
            found |= {"stop": list(options.stop)} if options.stop else {}
            for name, value in dataclasses.asdict(self._sampling).items():
                if name in said or name in sent:
                    value = dict(value) if name == "logit_bias" else value
                    found[renamed.get(name, name)] = value
            return found

        return server_reply(options.server, key, fields, self._stopped)

    def _lines(self) -> Iterator[str]:
        """Yields what is typed or piped in."""
        if not self._is_terminal:
            lines = sys.stdin or ()
            yield from (line.strip() for line in lines if line.strip())
            return
        while (typed := _typed()) is not None:
            if typed:
                yield typed

    def _take(self, line: str) -> None:
        """Does what a line says."""
        if not line.startswith("/") or line.startswith("//"):
            self._ask(line[1:] if line.startswith("//") else line)
            return
        word, _, rest = line.partition(" ")
        commands = {
            "/retry": self._retry,
            "/undo": self._undo,
            "/system": self._system,
            "/save": self._save,
            "/load": self._load,
            "/help": lambda _: say(HELP),
        }
        if word not in commands:
            raise NeoError(f"there is no {word}.{suggest(word, [*commands, '/quit'])}")
        commands[word](rest.strip())

    def _ask(self, text: str) -> None:
        """Prints an answer as it is written, and keeps it."""
        conversation = self._conversation
        conversation.ask(text)
        self._stopped.clear()
        answer = ""
        try:
            with (
                self._stoppable() if self._is_terminal else contextlib.nullcontext(),
                contextlib.closing(conversation.fitting(self._reply, _say_cut)) as pieces,
            ):
                for piece in pieces:
                    new = piece if answer else piece.lstrip()
                    print(new, end="", flush=True)
                    answer += new
                    if self._stopped.is_set():
                        break
        except NeoError:
            conversation.undo()
            if answer:
                print()
            raise
        print()
        if self._stopped.is_set():
            say("(stopped)")
        conversation.answer(answer.rstrip())
        self._reseed(self._sampling.seed + 1)

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Within this context Ctrl-C stops an answer, and SIGTERM the conversation too."""

        def stop() -> bool:
            self._stopped.set()
            return True

        def end(*_: object) -> None:
            self._ended = stop()

        with taken(stop), _handling(signal.SIGTERM, end):
            yield

    def _reseed(self, seed: int) -> None:
        self._sampling = dataclasses.replace(self._sampling, seed=seed % 2**32)

    def _retry(self, _: str) -> None:
        turns = list(self._conversation.turns)
        question = self._conversation.undo()
        if question is None:
            raise NeoError("nothing was asked yet.")
        try:
            self._ask(question)
        except NeoError:
            self._conversation.turns = turns
            raise

    def _undo(self, _: str) -> None:
        question = self._conversation.undo()
        if question is None:
            raise NeoError("nothing was said yet.")
        say(f"(taken back: {question})")

    def _system(self, text: str) -> None:
        self._conversation.system = text

    def _save(self, path: str) -> None:
        self._conversation.save(_named(path, "/save"))
        say(f"(written to {path})")

    def _load(self, path: str) -> None:
        self._conversation = read_conversation(_named(path, "/load"))
        for said in self._conversation.messages:
            say(f"{said['role']}: {said['content']}")


def _named(path: str, command: str) -> str:
    if not path:
        raise NeoError(f"{command} needs a file, as in {command} talk.json.")
    return path


def _say_cut(count: int) -> None:
    say(f"(the oldest {count} messages no longer fit the context; they are left out)")


def _typed() -> str | None:
    """Returns a line, "" where Ctrl-C left it, and None at Ctrl-D or SIGTERM."""
    main, leaving, taking = threading.get_ident(), threading.Event(), threading.Lock()

    def wake() -> bool:
        """Is called in a thread for a signal: input() may have missed it just before it waits."""
        with taking:
            WATCH.takes = wake  # a line may be left many times
            while not leaving.wait(0.05):
                signal.pthread_kill(main, signal.SIGUSR1)
        return True

    def end(*_: object) -> None:
        raise EOFError

    with (
        taken(wake),
        _handling(signal.SIGUSR1, lambda *_: None),
        _handling(signal.SIGTERM, end),
        _handling(signal.SIGINT, signal.default_int_handler),
    ):
        try:
            return input("> ").strip()
        except KeyboardInterrupt:
            print()
            return ""
        except (EOFError, UnicodeDecodeError):
            print()
            return None
        finally:
            leaving.set()
            if WATCH.is_on:
                time.sleep(0.02)  # the signal, if there was one, reaches its thread too
            with taking:
                pass


@contextlib.contextmanager
def _handling(number: int, handler: Callable[[int, Any], Any]) -> Iterator[None]:
    """Within this context a signal calls a function."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
