"""A conversation: what was said, what is taken back, and what is kept of it in a file."""

import dataclasses
import json
from collections.abc import Callable, Generator, Iterator, Sequence

from neo_jax.errors import NeoError, brief, reason
from neo_jax.files.json_text import read_json
from neo_jax.files.paths import make_path

Message = dict[str, str]
"""Its role, which is system, user or assistant, and its content."""

Reply = Callable[[Sequence[Message]], Iterator[str]]
"""Yields the pieces of an answer to messages, or raises `TooLong` before any."""

ROLES = ("system", "user", "assistant")


class TooLong(NeoError):  # noqa: N818
    """Messages that the context does not hold."""


@dataclasses.dataclass
class Conversation:
    """Messages in turns: after what the system says, a user's and an answer, and so on."""

    system: str = ""
    turns: list[Message] = dataclasses.field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """All that is said."""
        said = [{"role": "system", "content": self.system}] if self.system else []
        return [*said, *self.turns]

    def ask(self, text: str) -> None:
        """Adds what a user says."""
        self.turns.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """Adds what a model says."""
        self.turns.append({"role": "assistant", "content": text})

    def undo(self) -> str | None:
        """Takes back the last question and its answer; returns the question, if there was one."""
        while self.turns:
            last = self.turns.pop()
            if last["role"] == "user":
                return last["content"]
        return None

    def fitting(self, reply: Reply, on_cut: Callable[[int], None]) -> Generator[str, None, None]:
        """Yields an answer to as many of the newest turns as the context holds.

        Args:
          reply: gives an answer to messages.
          on_cut: called, where turns are left out, with how many messages these are.

        Raises:
          TooLong: the last question alone is too long.
        """
        before = len(self.messages) - len(self.turns)
        starts = [i for i, said in enumerate(self.turns) if said["role"] == "user"]
        for start in starts:
            messages = [*self.messages[:before], *self.turns[start:]]
            pieces = reply(messages)
            try:
                first = next(pieces, "")
            except TooLong:
                if start == starts[-1]:
                    raise
                continue
            if start > starts[0]:
                on_cut(start)
            yield first
            yield from pieces
            return

    def save(self, path: str) -> None:
        """Writes the messages to a file, as JSON.

        Raises:
          NeoError: it cannot be written.
        """
        text = json.dumps({"messages": self.messages}, ensure_ascii=False, indent=2)
        try:
            make_path(path).write_text(text + "\n", encoding="utf-8")
        except (OSError, ValueError) as error:
            raise NeoError(f"cannot write {path}: {reason(error)}.") from error


def read_conversation(path: str) -> Conversation:
    """Reads what `Conversation.save` wrote.

    Raises:
      NeoError: there is no such file, or it holds something else.
    """
    if not make_path(path).is_file():
        raise NeoError(f"there is no file {path}.")
    fields = read_json(make_path(path))
    messages = fields.get("messages")
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise NeoError(
            f'{path} must hold {{"messages": [{{"role": ..., "content": ...}}]}}, not '
            f"{brief(fields)}."
        )
    has_system = bool(messages) and messages[0]["role"] == "system"
    turns = messages[has_system:]
    wanted = [("user", "assistant")[i % 2] for i in range(len(turns))]
    if [each["role"] for each in turns] != wanted or len(turns) % 2:
        raise NeoError(f"{path}: after what the system says, user and assistant must take turns.")
    return Conversation(messages[0]["content"] if has_system else "", turns)


def _is_message(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"role", "content"}
        and value["role"] in ROLES
        and isinstance(value["content"], str)
    )
