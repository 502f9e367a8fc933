"""neo-jax train: train by a config."""

import dataclasses
import os
import re
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

from tyro.conf import OmitArgPrefixes, arg

import neo_jax
from neo_jax.cli import UsageError, explain, parse
from neo_jax.cli.cluster import ClusterOptions
from neo_jax.config import ModelConfig
from neo_jax.errors import NeoError, suggest
from neo_jax.training.config import OptimizerConfig, TrainConfig
from neo_jax.transforms.lora import LoraConfig
from neo_jax.transforms.soft_prompt import SoftPromptConfig

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Options:
    """Trains by a config, each field of which is an option. A config is a program that runs."""

    config: Annotated[TrainConfig, arg(name="")]
    # where a mesh spans several processes; each of them runs the same command
    cluster: OmitArgPrefixes[ClusterOptions]


def main(args: Sequence[str]) -> None:
    """Runs the verb."""
    if not args or args[0].startswith("-"):
        if "-h" in args or "--help" in args:
            print(
                "usage: neo-jax train CONFIG [OPTIONS]\n\n"
                f"CONFIG is a .py file that defines `config`, or one of: {', '.join(names())}\n"
                "A .py file is a program that runs: take it from people you trust.\n"
                "neo-jax train CONFIG --help lists every field and its value."
            )
            return
        raise UsageError(f"name a config first: one of {', '.join(names())}, or a .py file.")
    default = Options(load_config(args[0]), ClusterOptions())
    options = parse(Options, "train", args[1:], default=default)
    from neo_jax.devices.compilation_cache import enable_compilation_cache
    from neo_jax.devices.processes import say
    from neo_jax.training.checkpoint import SaveError
    from neo_jax.training.loop import run

    enable_compilation_cache()
    config = options.config
    try:
        then = ": training goes on from its newest checkpoint"
        with options.cluster.joined(bool(config.mesh or config.rules), then):
            outcome = run(config)
            if outcome.is_done:
                print(f"{config.output}/{'adapter' if config.soft_prompt.tokens else 'model'}")
            else:
                say(f"stopped after step {outcome.state.step}; the same command goes on from there")
    except SaveError as error:
        os._exit(explain(error))  # the usual way out would wait for orbax's threads


def load_config(name: str) -> TrainConfig:
    """Reads a config from a .py file, or by its name in `configs/`; "-", "_" and "." are one.

    Raises:
      NeoError: there is no such config, or the file defines none.
    """
    return load_defined(name, "config", TrainConfig)


def load_defined(
    name: str, variable: str, kind: type[T], known: Callable[[], list[str]] | None = None
) -> T:
    """Reads what a config's file defines under a name; see `load_config`.

    Args:
      name: of the config, or the path of its file.
      variable: the name under which it defines that.
      kind: of what is defined.
      known: gives the names of configs that define it; None is all.

    Raises:
      NeoError: there is no such config, or the file defines nothing of the kind.
    """
    path = Path(name)
    if path.suffix != ".py":
        is_there = path.exists()
        path = installed_folder("configs") / f"{re.sub('[-.]', '_', name)}.py"
        if not path.is_file():
            if is_there:
                raise NeoError(f"{name} is no config; name a .py file that defines `{variable}`.")
            raise NeoError(f"no config is called '{name}'.{suggest(name, (known or names)())}")
    if not path.is_file():
        raise NeoError(f"{path} does not exist; name a .py file that defines `{variable}`.")
    try:
        found = runpy.run_path(str(path)).get(variable)
    except Exception as error:  # it is a program: anything may go wrong
        raise NeoError(f"{path}: {_reason(error)}") from error
    if not isinstance(found, kind):
        raise NeoError(f"{path} does not define a {kind.__name__} called `{variable}`.")
    return found


def _reason(error: Exception) -> str:
    """Says in one line why a config could not be read, and suggests a field for a wrong one."""
    text = " ".join(str(error).split()) or type(error).__name__
    wrong = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text)
    for kind in (TrainConfig, OptimizerConfig, LoraConfig, SoftPromptConfig, ModelConfig):
        if wrong and wrong[1] == kind.__name__:
            known = [field.name for field in dataclasses.fields(kind)]
            return f"{kind.__name__} has no field '{wrong[2]}'.{suggest(wrong[2], known)}"
    return text if isinstance(error, NeoError) else f"{type(error).__name__}: {text}"


def installed_folder(name: str) -> Path:
    """Returns the folder `configs/` or `convert/`: in the package; next to it in a checkout."""
    package = Path(neo_jax.__file__).parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def names() -> list[str]:
    """Returns the names of `configs/` as people write them: gpt_neo_1_3b is gpt-neo-1.3b."""
    stems = sorted(path.stem for path in installed_folder("configs").glob("[!_]*.py"))
    return [re.sub(r"(?<=\d)_(?=\d)", ".", stem).replace("_", "-") for stem in stems]
