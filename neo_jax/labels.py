"""The head of a model as data: which one it is, and the labels that it tells apart."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from neo_jax.errors import NeoError, brief
from neo_jax.fields import check, choice, converted, number

HeadKind = Literal["lm_head", "score", "classifier", "qa_outputs"]
"""Of language models; of labels for texts, for tokens, for the two ends of an answer."""

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]

_CLASSES = {
    "score": "ForSequenceClassification",
    "classifier": "ForTokenClassification",
    "qa_outputs": "ForQuestionAnswering",
}
CLASSIFIERS = tuple(_CLASSES)
"""The heads in the place of a language model's, by the names of their parameters."""

_MODELS: Mapping[HeadKind, str] = {
    "lm_head": "a language model",
    "score": "a classifier of texts",
    "classifier": "a classifier of words",
    "qa_outputs": "a model that finds answers",
}
_SINGLE = "single_label_classification"


def _labels(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(label, str) for label in value):
        raise NeoError(f"{name} must be names, not {brief(value)}.")
    labels = tuple(value)
    twice = [label for i, label in enumerate(labels) if label in labels[:i]]
    if twice:
        raise NeoError(f"{name} has {brief(twice[0])} twice; give each label a name of its own.")
    return labels


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """What stands on the last LayerNorm, in the terms of Hugging Face's config.json.

    Its parameters are next to the model's, named as it is; a language model's is its table of
    tokens, or one of its own.

    Raises:
      NeoError: labels that the kind cannot have, or twice the same.
    """

    kind: HeadKind = choice("lm_head", get_args(HeadKind))
    labels: tuple[str, ...] = converted((), _labels)  # id2label, in its order
    # What labels of texts are: a number, one of several, any of several.
    problem_type: ProblemType = choice(_SINGLE, get_args(ProblemType))
    dropout: float = number(0.1, least=0, below=1)  # of token classifiers: classifier_dropout

    def __post_init__(self) -> None:
        check(self, "head.")
        count, kind = len(self.labels), self.kind
        if not self.is_classifier and count:
            raise NeoError("head.labels are for a classifier; set head.kind to score.")
        if self.is_classifier and not count:
            raise NeoError(f"a head {kind} needs head.labels.")
        if kind == "qa_outputs" and count != 2:
            raise NeoError(f"a head qa_outputs has 2 labels, start and end, not {count}.")
        if kind == "score" and count == 1 and self.problem_type == _SINGLE:
            raise NeoError(
                "one label tells nothing apart: give two, or set problem_type to regression."
            )

    @property
    def is_classifier(self) -> bool:
        """Whether it is in the place of a language model's."""
        return self.kind != "lm_head"

    @property
    def has_bias(self) -> bool:
        """Whether it adds a number to each logit."""
        return self.kind in ("classifier", "qa_outputs")

    @property
    def words(self) -> str:
        """What a model with it is, in words."""
        return _MODELS[self.kind]

    def num_params(self, width: int) -> int:
        """Returns how many parameters it has next to the model's."""
        return len(self.labels) * (width + self.has_bias)

    def check_kind(self, kind: HeadKind) -> None:
        """Checks that a model with this head is one with that.

        Raises:
          NeoError: it is another.
        """
        if self.kind != kind:
            raise NeoError(
                f"this is {self.words}, not {_MODELS[kind]}; train one: docs/classify.md."
            )

    def check_writes(self) -> None:
        """Checks that a model with this head is a language model.

        Raises:
          NeoError: it is a classifier.
        """
        if self.is_classifier:
            raise NeoError(
                f"the model is a classifier, with a head {self.kind}: it neither writes nor scores "
                "texts; use classify, or load the model that it was made of."
            )

    def to_hf(self, prefix: str, pad_token_id: int | None) -> dict[str, Any]:
        """Returns its fields of config.json; those of a language model's are the family's.

        Args:
          prefix: what transformers' classes of the architecture begin with.
          pad_token_id: the token behind which transformers is to look for the end of a text.
        """
        if not self.is_classifier:
            return {}
        fields: dict[str, Any] = {
            "architectures": [prefix + _CLASSES[self.kind]],
            "id2label": {str(i): label for i, label in enumerate(self.labels)},
            "label2id": {label: i for i, label in enumerate(self.labels)},
            "pad_token_id": pad_token_id,
        }
        if self.kind == "score":
            fields["problem_type"] = self.problem_type
        if self.kind == "classifier":
            fields["classifier_dropout"] = self.dropout
        return fields

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> "HeadConfig":
        """Reads the fields of a config.json; its first architecture says which head there is.

        Raises:
          NeoError: labels that are not numbered from 0, or another value that cannot be.
        """
        names = fields.get("architectures")
        name = names[0] if isinstance(names, list) and names else ""
        name = name if isinstance(name, str) else ""
        kind: Any = next((kind for kind, end in _CLASSES.items() if name.endswith(end)), None)
        if kind is None:
            return cls()
        labels = _read_labels(fields)
        values: dict[str, Any] = {}
        if kind == "score" and len(labels) == 1:
            values = {"problem_type": "regression"}
        for theirs, ours, where in (
            ("problem_type", "problem_type", "score"),
            ("classifier_dropout", "dropout", "classifier"),
        ):
            if kind == where and fields.get(theirs) is not None:
                values[ours] = fields[theirs]
        return cls(kind, labels, **values)


def as_head(name: str, value: Any) -> HeadConfig:
    """Returns a head, also of its fields as a file has them; the name is for errors."""
    if isinstance(value, dict):
        known = {field.name for field in dataclasses.fields(HeadConfig)}
        return HeadConfig(**{field: x for field, x in value.items() if field in known})
    if not isinstance(value, HeadConfig):
        raise NeoError(f"{name} must be a HeadConfig, not {brief(value)}.")
    return value


def _read_labels(fields: Mapping[str, Any]) -> tuple[str, ...]:
    named = fields.get("id2label")
    if named is None:
        count = fields.get("num_labels")
        count = 2 if count is None else count
        if type(count) is not int or not 0 < count < _MOST:
            raise NeoError(f"num_labels {brief(count)} is no number of labels.")
        return unnamed(count)
    try:
        by_id = {int(key): label for key, label in named.items()}
        return _labels("id2label", [by_id[i] for i in range(len(named))])
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        if isinstance(error, NeoError):
            raise
        raise NeoError(
            f"id2label is {brief(named)}, not names by numbers from 0 as in "
            '{"0": "negative", "1": "positive"}.'
        ) from error


def unnamed(count: int) -> tuple[str, ...]:
    """Returns names of labels that nobody has named, as transformers gives them."""
    return tuple(f"LABEL_{i}" for i in range(count))


_MOST = 1 << 20
