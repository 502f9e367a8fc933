"""neo-jax eval --glue and --superglue."""

import sys
from typing import TYPE_CHECKING

from neo_jax.cli.options import print_json, write_picture
from neo_jax.devices.compilation_cache import enable_compilation_cache
from neo_jax.devices.processes import is_leader
from neo_jax.errors import NeoError, suggest

if TYPE_CHECKING:
    from neo_jax.cli.eval import Options


def run_glue(options: "Options") -> None:
    """Fine-tunes or asks a model on the tasks at hand, and prints the table."""
    from neo_jax.cli.eval import named_tasks, print_columns
    from neo_jax.evaluation import glue, glue_table, glue_tasks

    if options.limit % 1:
        raise NeoError("with --glue and --superglue --limit is a number of examples, not a share.")
    enable_compilation_cache()
    suite, data = ("glue", options.glue) if options.glue else ("superglue", options.superglue)
    names = glue_tasks.at_hand(suite, data)
    if wanted := named_tasks(options.tasks):
        for name in wanted:
            if name not in names:
                raise NeoError(f"no task '{name}' of {suite} is in {data}.{suggest(name, names)}")
        names = tuple(wanted)
    results, limit = [], int(options.limit)
    for result in glue.run(
        names, data, options.output or "glue", options.tune, options.model, options.num_fewshot,
        limit,
    ):  # fmt: skip
        results.append(result)
        rows = glue_table.entries([result])
        said = ", ".join(f"{row['metric']} {row['mean']:.2f}" for row in rows)
        if is_leader():
            print(f"{rows[0]['title']}: {said}", file=sys.stderr, flush=True)
    if not results or not is_leader():
        return
    rows = glue_table.entries(results)
    model = options.model.model or "bundled"
    if options.json:
        how = {"shots": options.num_fewshot} if options.num_fewshot >= 0 else vars(options.tune)
        mean = glue_table.average(rows)
        print_json({"suite": suite, "model": model, **how, "mean": mean, "rows": rows})
    else:
        print_columns(glue_table.table(rows))
        print(glue_table.footer(rows))
    if options.picture:
        title = model.rstrip("/").rpartition("/")[2]
        write_picture(options.picture, glue_table.draw(rows, title))
