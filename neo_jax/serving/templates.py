"""Chat templates: messages become the text that a model goes on with.

A template is a program in Jinja, and comes with a checkpoint or from who starts the server. It runs
in Jinja's sandbox, with what transformers gives it: without files, for a bounded time, to a text of
bounded length.
"""

import contextlib
import dataclasses
import json
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from neo_jax.errors import NeoError, brief, reason, suggest
from neo_jax.files.json_text import read_json
from neo_jax.files.paths import make_path
from neo_jax.text.language_model import LanguageModel

SECONDS = 1.0
"""How long a template may take."""

MOST_CHARACTERS = 4_000_000
"""The longest text that one may give, or be."""

PLAIN = """\
{% for message in messages -%}
{% if message.role == "system" -%}
{{ message.content | trim }}

{% else -%}
{{ message.role | capitalize }}: {{ message.content | trim }}
{% endif -%}
{% endfor -%}
{% if add_generation_prompt %}Assistant:{% endif %}"""
"""For models that have no template of their own."""

_BUNDLED = {"plain": (PLAIN, ("\nUser:",))}  # with what ends an answer
_FILE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclasses.dataclass(frozen=True)
class Template:
    """A template, ready to be used.

    Raises:
      NeoError: it is no template.
    """

    source: str
    stop: tuple[str, ...] = ()  # texts before which an answer ends
    tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)  # such as eos_token
    program: jinja2.Template = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        with _one_line("is no template"), _in_time():
            if len(self.source) > MOST_CHARACTERS:
                raise NeoError(f"it has more than {MOST_CHARACTERS} characters")
            object.__setattr__(self, "program", _environment().from_string(self.source))

    def render(
        self, messages: Sequence[Mapping[str, str]], begins: bool = True, goes_on: bool = False
    ) -> str:
        """Returns the text of a conversation.

        Args:
          messages: each with its role and content.
          begins: whether an answer begins at the end.
          goes_on: whether the last message is not complete, and the text ends with it.

        Raises:
          NeoError: the template refuses these messages, fails, or takes too long.
        """
        mark = secrets.token_hex(16) if goes_on else ""
        last = dict(messages[-1])
        last["content"] += mark
        said = {**self.tokens, "messages": [*messages[:-1], last], "add_generation_prompt": begins}
        size, pieces = 0, []
        with _one_line("fails"), _in_time():
            for piece in self.program.generate(said):
                size += len(piece)
                if size > MOST_CHARACTERS:
                    raise NeoError(f"it gives more than {MOST_CHARACTERS} characters")
                pieces.append(piece)
        text, found, _ = "".join(pieces).partition(mark) if mark else ("".join(pieces), True, "")
        if not found:
            raise NeoError("the chat template does not show the last message, which cannot go on.")
        return text


def tokenizer_folder(lm: LanguageModel) -> Path:
    """Returns where the files of a model's tokenizer are."""
    return getattr(lm.tokenizer, "folder", lm.folder)


def find_chat_template(lm: LanguageModel, named: str) -> Template | None:
    """Returns the template of conversations with a model; raises as `find_template`."""
    end = lm.tokenizer.eos_id if lm.tokenizer else None
    names = {} if end is None or not lm.tokenizer else {"eos_token": lm.tokenizer.token_name(end)}
    return find_template(tokenizer_folder(lm), named, names)


def find_template(folder: Path, named: str, tokens: Mapping[str, str]) -> Template | None:
    """Returns the template that is named, else that of a checkpoint, if it has one.

    Args:
      folder: of the tokenizer: chat_template.jinja, or chat_template in tokenizer_config.json.
      named: "plain", a file, or one of several templates in tokenizer_config.json; "" for none.
      tokens: special tokens that the files do not name.

    Raises:
      NeoError: there is no such template, or a file cannot be read.
    """
    config = read_json(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
    tokens = {**tokens, **special_tokens(config)}
    templates = _in_config(config)
    if named in _BUNDLED and named not in templates:
        source, stop = _BUNDLED[named]
        return Template(source, stop, tokens)
    if named:
        if named in templates:
            return Template(templates[named], (), tokens)
        if not make_path(named).is_file():
            known = [*templates, *_BUNDLED]
            raise NeoError(
                f"there is no chat template {brief(named)}; name a file.{suggest(named, known)}"
            )
        return Template(_read(make_path(named)), (), tokens)
    if (folder / _FILE).is_file():
        return Template(_read(folder / _FILE), (), tokens)
    if templates and "default" not in templates:
        raise NeoError(
            f"{folder / _CONFIG} has several chat templates; name one of them with "
            f"--chat-template: {', '.join(sorted(templates))}."
        )
    return Template(templates["default"], (), tokens) if templates else None


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the texts of the special tokens that a tokenizer_config.json names."""
    found = {name: config.get(name) for name in _ROLES}
    texts = {
        name: token.get("content") if isinstance(token, dict) else token
        for name, token in found.items()
    }
    return {name: token for name, token in texts.items() if isinstance(token, str)}


def _in_config(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the templates of a tokenizer_config.json by name; a single one is "default"."""
    found = config.get("chat_template") or []
    entries = found if isinstance(found, list) else [{"name": "default", "template": found}]
    with contextlib.suppress(TypeError, KeyError):
        templates = {entry["name"]: entry["template"] for entry in entries}
        if all(isinstance(text, str) for pair in templates.items() for text in pair):
            return templates
    raise NeoError(f"chat_template in {_CONFIG} must be a text, or a list of them with names.")


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(MOST_CHARACTERS + 1)
    except (OSError, ValueError) as error:
        raise NeoError(f"cannot read the chat template {path}: {reason(error)}.") from error


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, without operators whose results fill the memory."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Returns what an operator gives, unless that is large."""
        sizes = [len(x) if isinstance(x, str | bytes | list | tuple) else x for x in (left, right)]
        if operator == "*" and not abs(sizes[0] * sizes[1]) <= MOST_CHARACTERS:
            raise NeoError("it multiplies to something large")
        if operator == "**" and not (abs(left) <= 1000 and abs(right) <= 10):
            raise NeoError("it has a large power")
        if operator == "%" and isinstance(left, str | bytes):
            raise NeoError("it formats with %; take ~ or format()")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """The block around what an assistant says, which marks it for training: nothing here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        """Returns what is in the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    """Returns what transformers compiles templates with, and gives them."""
    extensions = ["jinja2.ext.loopcontrols", _Generation]
    made = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return made


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    allowed = {name: options[name] for name in ("indent", "separators", "sort_keys")
               if name in options}  # fmt: skip
    return json.dumps(value, ensure_ascii=ensure_ascii, **allowed)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


@contextlib.contextmanager
def _one_line(fault: str) -> Iterator[None]:
    """Turns whatever a template raises into an error of one line."""
    try:
        yield
    except Exception as error:  # a program that others wrote
        raise NeoError(f"the chat template {fault}: {reason(error).rstrip('.')}.") from error


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    """Ends programs of Jinja in this thread that take too long."""
    deadline, before = time.monotonic() + SECONDS, sys.gettrace()

    def look(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != "<template>":
            return None
        if time.monotonic() > deadline:
            raise NeoError(f"it takes more than {SECONDS:g} s")
        return look

    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(before)
