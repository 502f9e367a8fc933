"""text/conversation.py: turns, what is taken back, what fits, and files."""

import json

import pytest

from neo_jax.errors import NeoError
from neo_jax.text.conversation import Conversation, TooLong, read_conversation


def talk(*contents, system=""):
    made = Conversation(system)
    for i, text in enumerate(contents):
        (made.answer if i % 2 else made.ask)(text)
    return made


def test_turns():
    made = talk("a", "b", "c", system="s")
    assert [each["content"] for each in made.messages] == ["s", "a", "b", "c"]
    assert made.undo() == "c"
    assert made.undo() == "a"
    assert made.undo() is None
    assert made.messages == [{"role": "system", "content": "s"}]


@pytest.mark.parametrize("room", [2, 4, 6])
def test_the_oldest_turns_are_left_out(room):
    asked, cut = [], []

    def reply(messages):
        asked.append([each["content"] for each in messages])
        if len(messages) > room:
            raise TooLong("no room")
        yield from ("one ", "two")

    made = talk("a", "b", "c", "d", "e", system="s")
    assert "".join(made.fitting(reply, cut.append)) == "one two"
    assert asked[-1] == ["s", *"abcde"[{2: 4, 4: 2, 6: 0}[room] :]]
    assert cut == {2: [4], 4: [2], 6: []}[room]
    assert len(made.turns) == 5  # what was said stays


def test_a_question_that_does_not_fit():
    def reply(messages):
        raise TooLong("no room")
        yield ""

    with pytest.raises(TooLong):
        list(talk("a", "b", "c").fitting(reply, print))


def test_files(tmp_path):
    path = tmp_path / "talk.json"
    made = talk("a\n\u2028é", "b", system="s")
    made.save(str(path))
    assert read_conversation(str(path)) == made
    with pytest.raises(NeoError, match=r"cannot write .*no/such: No such file"):
        made.save(str(tmp_path / "no/such"))
    with pytest.raises(NeoError, match="there is no file"):
        read_conversation(str(tmp_path / "nothing"))
    turn = {"role": "user", "content": "x"}
    for messages in (None, "x", [1], [{"role": "user"}], [{**turn, "role": "tool"}], [turn],
                     [turn, turn], [turn, {"role": "system", "content": "x"}]):  # fmt: skip
        path.write_text(json.dumps({"messages": messages}))
        with pytest.raises(NeoError, match=r"must hold|must take turns"):
            read_conversation(str(path))
