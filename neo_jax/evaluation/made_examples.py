"""Examples of four tasks, made by rules: what a recipe learns where no files are given.

A seed decides them. They are no measure of language: their words are few and their sentences of
one mould, so that a small model learns a task on a CPU in minutes. No example that is judged is
among those that are learned, but its words are.
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from neo_jax.errors import NeoError, suggest


class Row(NamedTuple):
    """A prompt, the answer that is right, and what kind of question it is, or ""."""

    prompt: str
    completion: str
    kind: str = ""


def make_rows(task: str, count: int, seed: int, without: Sequence[Row] = ()) -> list[Row]:
    """Returns examples of a task with prompts of their own, none of them among those of `without`.

    Raises:
      NeoError: no such task, or fewer examples than that exist.
    """
    if task not in MAKERS:
        raise NeoError(f"no examples are made for '{task}'.{suggest(task, MAKERS)}")
    draw, seen = random.Random(f"{task} {seed}"), {row.prompt for row in without}
    rows: list[Row] = []
    for _ in range(10 * count + 100):
        if len(rows) == count:
            return rows
        row = MAKERS[task](draw)
        if row.prompt not in seen:
            seen.add(row.prompt)
            rows.append(row)
    raise NeoError(f"the rules of '{task}' make fewer than {count:,} examples; take fewer.")


def _words(text: str) -> list[str]:
    return text.split()


_UNITS = _words("zero one two three four five six seven eight nine ten eleven twelve")
_MONTHS = _words(
    "January February March April May June July August September October November December"
)
_SUBJECTS = [
    ("The captain", "Le capitaine"), ("The farmer", "Le fermier"), ("The doctor", "Le médecin"),
    ("The queen", "La reine"), ("My brother", "Mon frère"), ("My sister", "Ma sœur"),
]  # fmt: skip
_VERBS = [
    ("saw", "a vu"), ("bought", "a acheté"), ("sold", "a vendu"), ("found", "a trouvé"),
    ("lost", "a perdu"), ("counted", "a compté"),
]  # fmt: skip
# In the plural; the last says whether a noun is feminine.
_NOUNS = [
    ("horses", "chevaux", False), ("houses", "maisons", True), ("books", "livres", False),
    ("letters", "lettres", True), ("ships", "navires", False), ("doors", "portes", True),
    ("hats", "chapeaux", False), ("flowers", "fleurs", True),
]  # fmt: skip
_ADJECTIVES = [
    ("white", "blancs", "blanches"), ("black", "noirs", "noires"), ("green", "verts", "vertes"),
    ("heavy", "lourds", "lourdes"), ("round", "ronds", "rondes"),
]  # fmt: skip
_TOWNS = [("London", "Londres"), ("Paris", "Paris"), ("Lisbon", "Lisbonne"), ("Rome", "Rome")]
_NUMBERS = [
    ("two", "deux"), ("three", "trois"), ("four", "quatre"), ("five", "cinq"), ("six", "six"),
    ("seven", "sept"), ("eight", "huit"), ("nine", "neuf"), ("ten", "dix"), ("twelve", "douze"),
    ("twenty", "vingt"),
]  # fmt: skip


def _translation(draw: random.Random) -> Row:
    """A sentence, and the same in French, where gender and the place of adjectives differ."""
    subject, verb, number = draw.choice(_SUBJECTS), draw.choice(_VERBS), draw.choice(_NUMBERS)
    noun, french, is_feminine = draw.choice(_NOUNS)
    there, here = [number[0]], [number[1], french]
    if draw.random() < 0.7:
        adjective, *forms = draw.choice(_ADJECTIVES)
        there.append(adjective)
        here.append(forms[is_feminine])
    there.append(noun)
    if draw.random() < 0.5:
        town = draw.choice(_TOWNS)
        there.append(f"in {town[0]}")
        here.append(f"à {town[1]}")
    source, target = (
        " ".join([subject[i], verb[i], *words]) + "." for i, words in enumerate((there, here))
    )
    return Row(f"English: {source}\nFrench:", f" {target}")


_MEN = _words("John William Henry Thomas George Charles Edward James Robert Samuel")
_WOMEN = _words("Mary Emma Elizabeth Anne Jane Charlotte Fanny Harriet Catherine Maria")
_SURNAMES = _words(
    "Adams Bennet Clay Dawson Elliot Fairfax Grant Hall Jackson Knight Lee Martin Price Russell "
    "Smith Taylor Webster Wood"
)
_PLACES = _words(
    "Boston London Richmond Paris Bath Washington Charleston Dublin Portland Oxford Lisbon Rome "
    "Albany Vienna"
)
_TRADES = [
    "a painter", "a captain", "a teacher", "a merchant", "a farmer", "a doctor", "a printer",
    "a lawyer", "a sailor", "a baker", "a judge", "an engineer", "an actor", "a soldier",
]  # fmt: skip
_ASKED = {
    "birthplace": "Where was {} born?",
    "year": "In what year was {} born?",
    "trade": "What was {}?",
    "home": "Where did {} live?",
}


def _question(draw: random.Random) -> Row:
    """A life in two sentences, and a question about it; two places may be meant."""
    first = draw.choice(_MEN + _WOMEN)
    name, pronoun = f"{first} {draw.choice(_SURNAMES)}", "He" if first in _MEN else "She"
    born, home = draw.sample(_PLACES, 2)
    trade, year = draw.choice(_TRADES), str(draw.randrange(1700, 1900))
    told = draw.choice(
        [
            f"{name} was born in {born} in {year}. {pronoun} lived in {home} as {trade}.",
            f"{name} lived in {home} as {trade}. {pronoun} was born in {born} in {year}.",
        ]
    )
    kind = draw.choice([*_ASKED])
    answer = {"birthplace": born, "year": year, "trade": trade, "home": home}[kind]
    return Row(f"{told}\nQuestion: {_ASKED[kind].format(name)}\nAnswer:", f" {answer}", kind)


_BODIES = ["Senate", "House", "Assembly", "Council", "Convention"]
_TOPICS = [
    "the tariff", "the mails", "the navy", "the public lands", "the coinage", "the harbours",
    "the militia", "the canals", "the schools", "the railways", "the fisheries", "the banks",
    "the frontier", "the courts", "the census",
]  # fmt: skip
_MOVED = ["Mr. {} brought in a bill on {}.", "A bill on {1} was moved by Mr. {0}."]
_ENDS = {
    "passed": ["was passed by {} votes to {}", "was carried by {} to {}"],
    "rejected": ["was rejected by {} votes to {}", "was lost by {} to {}"],
}
_REASONS = ["without a debate", "after a long debate", "after some remarks", "the same evening"]


def _summary(draw: random.Random) -> Row:
    """The minutes of a sitting, and what it decided: not all bills that it speaks of."""
    body, (mover, other, third) = draw.choice(_BODIES), draw.sample(_SURNAMES, 3)
    topic, another, petition = draw.sample(_TOPICS, 3)
    verdict = draw.choice([*_ENDS])
    more = draw.randrange(30, 99)
    votes = (more, draw.randrange(2, more))
    ended = draw.choice(_ENDS[verdict]).format(*votes)
    month = draw.choice(_MONTHS)
    opening = draw.choice(
        [
            f"The {body} met at {draw.choice(_UNITS[9:13])} on the {draw.randrange(4, 21)}th of "
            f"{month}.",
            f"On the {draw.randrange(4, 21)}th of {month} the {body} came together.",
        ]
    )
    wording = draw.choice(_MOVED)
    delayed = draw.choice(["put off", "read"])
    moved = [
        wording.format(mover, topic),
        f"Mr. {other} brought in a bill on {another}, which was {delayed}.",
    ]
    asides = [
        f"A petition on {petition} was read.",
        f"Mr. {third} spoke of {another} at length.",
        f"Mr. {third} asked for a copy of the report on {petition}.",
        "A message from the President was read.",
    ]
    draw.shuffle(moved)
    middle = [*moved, draw.choice(asides)]
    if draw.random() < 0.5:
        middle.insert(1, draw.choice(asides))
    decided = draw.choice(
        [
            f"The bill on {topic} {ended}, {draw.choice(_REASONS)}.",
            f"{draw.choice(_REASONS).capitalize()} the bill on {topic} {ended}.",
        ]
    )
    closing = draw.choice([f"The {body} rose at {draw.choice(_UNITS[1:8])}.", "Then it adjourned."])
    text = " ".join([opening, *dict.fromkeys(middle), decided, closing])
    return Row(f"{text}\nSummary:", f" The {body} {verdict} the bill on {topic}.")


_NAMED = _words(
    "horse house book letter ship table bird hat door knife flower dog chair river garden church "
    "street paper water king queen captain soldier farmer mother brother friend winter morning "
    "country harbour gold"
)
_ORDERS = {
    "capitals": ["Write these words in capital letters.", "Put these words into capitals."],
    "backwards": ["Write these words in reverse order.", "Give these words from last to first."],
    "count": ["How many words are these?", "Count these words."],
    "first": ["Repeat the first of these words.", "Which of these words comes first?"],
    "last": ["Repeat the last of these words.", "Which of these words comes last?"],
    "list": ["Join these words with an and.", "Make one list of these words."],
}


def _answer(kind: str, words: list[str]) -> str:
    match kind:
        case "capitals":
            return " ".join(words).upper()
        case "backwards":
            return " ".join(words[::-1])
        case "count":
            return _UNITS[len(words)]
        case "first":
            return words[0]
        case "last":
            return words[-1]
        case _:
            return " and ".join(words)


def _instruction(draw: random.Random) -> Row:
    """What to do with two words, or of how many they are, in one of two wordings; the words."""
    kind = draw.choice([*_ORDERS])
    words = draw.sample(_NAMED, draw.randrange(2, 7) if kind == "count" else 2)
    order = draw.choice(_ORDERS[kind])
    prompt = f"Instruction: {order}\nInput: {' '.join(words)}\nResponse:"
    return Row(prompt, f" {_answer(kind, words)}", kind)


MAKERS: dict[str, Callable[[random.Random], Row]] = {
    "summaries": _summary,
    "translation": _translation,
    "questions": _question,
    "instructions": _instruction,
}
"""What makes an example of each task."""
