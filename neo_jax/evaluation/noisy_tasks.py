"""Tasks of lm-evaluation-harness, whose contexts have noise."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from neo_jax.errors import NeoError
from neo_jax.evaluation.harness import NeoLM
from neo_jax.evaluation.noise import Noise, perturb
from neo_jax.text.language_model import LanguageModel


class NoisyLM(NeoLM):
    """A model that reads contexts with noise; continuations and labels are as they are."""

    def __init__(
        self, lm: LanguageModel, noise: Noise, rate: float, seed: int, **options: Any
    ) -> None:
        """Takes a loaded model; the options are those of `NeoLM`."""
        super().__init__(lm, **options)
        self._noise, self._rate, self._seed = noise, rate, seed

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        """As `NeoLM`'s, after contexts with noise."""
        return super().loglikelihood([self._noisy(r) for r in requests], disable_tqdm)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """As `NeoLM`'s, after contexts with noise."""
        return super().generate_until([self._noisy(r) for r in requests], disable_tqdm)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Raises `NeoError` for tasks of whole texts, which have no contexts."""
        raise NeoError(
            f"task '{requests[0].task_name}' scores whole texts, which have no context to put "
            "noise into; give their file to --text."
        )

    def _noisy(self, request: Any) -> Any:
        context, follows = request.args
        changed = copy.copy(request)
        noisy = perturb(context, self._noise, self._rate, self._seed)
        changed.arguments = (noisy, follows)
        return changed


def read_values(results: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Returns the metrics of the harness's results, and their standard errors, by their names."""
    values: dict[str, tuple[float, float | None]] = {}
    for task, found in results["results"].items():
        for key, value in found.items():
            name, _, kept = key.partition(",")
            if not kept or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = found.get(f"{name}_stderr,{kept}")
            label = f"{task} {name}" + ("" if kept == "none" else f" ({kept})")
            values[label] = (float(value), float(error) if isinstance(error, float) else None)
    return values
