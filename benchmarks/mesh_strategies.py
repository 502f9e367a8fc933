"""Draws meshes, rules and models at random, and compares each that is accepted with one device.

    python benchmarks/mesh_strategies.py RESULTS.jsonl [--triples 60] [--seed 0] [--run-only]
        [--length-context]
    python benchmarks/mesh_strategies.py RESULTS.jsonl --split-sequences

Eight CPU devices train for three steps and continue three prompts: losses, the first gradients, the
parameters after the last step, greedy texts and the log-probabilities of given ones are to be those
of one device. A triple that is refused with a line is drawn again. --run-only leaves the comparison
out, to find what the compiler cannot do among more of them; --no-shardy takes XLA's older
partitioner. --length-context draws until the rules have length:context.
--split-sequences draws nothing: it takes every mesh of eight devices that splits sequences, with
data, fsdp and model axes, in turn by each rule, each once.

RESULTS.jsonl gets a line for each triple: what it is, and "equal", "refused" or "wrong" with the
reason. Triples run in processes that are started anew after one that aborts, which so is named; a
run that was interrupted goes on. Exits with 1 where one is wrong.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def work(options):
    """Runs triples one after another; prints a line before and after each."""
    sys.path.insert(0, str(TESTS))
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    if options.no_shardy:
        jax.config.update("jax_use_shardy_partitioner", False)
    import mesh_triples

    from neo_jax.errors import NeoError
    from neo_jax.sharding.rules import make_sharding

    listed = mesh_triples.split_sequences()
    for seed in range(options.first, options.first + 20):
        if options.split_sequences and seed >= len(listed):
            return
        draw = mesh_triples.draw_split if options.length_context else mesh_triples.draw
        triple = listed[seed] if options.split_sequences else draw(seed)
        print(json.dumps({"seed": seed, "triple": str(triple)}), flush=True)
        began = time.monotonic()
        try:
            if options.run_only:
                run = mesh_triples.Run(triple, make_sharding(triple.mesh, triple.rules))
                run.check()
                run.train(1)
                run.greedy(2)
                run.scores()
                result = {"result": "runs"}
            else:
                result = {"result": "equal", **mesh_triples.compare(triple)}
        except NeoError as error:
            result = {"result": "refused", "why": str(error)}
        except Exception as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
            result = {"result": "wrong", "why": why}
        result["seconds"] = round(time.monotonic() - began, 1)
        print(json.dumps(result), flush=True)
        jax.clear_caches()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--triples", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-only", action="store_true")
    parser.add_argument("--no-shardy", action="store_true")
    parser.add_argument("--length-context", action="store_true")
    parser.add_argument("--split-sequences", action="store_true")
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.first is not None:
        work(options)
        return
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    done = [json.loads(line) for line in lines]
    counts = collections.Counter(fields["result"] for fields in done)
    seed = max((fields["seed"] for fields in done), default=options.seed - 1) + 1
    if options.split_sequences:
        sys.path.insert(0, str(TESTS))
        import mesh_triples

        options.triples = len(mesh_triples.split_sequences())
    with options.results.open("a") as file:
        while counts.total() - counts["refused"] * (not options.split_sequences) < options.triples:
            command = [sys.executable, *sys.argv, "--first", str(seed)]
            environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "XLA_FLAGS": QUICK}
            worker = subprocess.Popen(
                command, env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True
            )
            fields, noise = {}, []
            for line in worker.stdout:
                if not line.startswith("{"):
                    noise.append(line.strip())
                    continue
                fields |= json.loads(line)
                if "result" in fields:
                    seed = record(fields, file, counts)
                    fields, noise = {}, []
                if counts.total() - counts["refused"] >= options.triples:
                    worker.kill()
                    break
            if worker.wait() and fields:  # it died on this one
                fields |= {"result": "wrong", "why": " ".join(noise)[:600]}
                seed = record(fields, file, counts)
    print(", ".join(f"{number} {result}" for result, number in sorted(counts.items())))
    sys.exit(bool(counts["wrong"]))


def record(fields, file, counts):
    """Writes what became of a triple; returns the next seed."""
    print(json.dumps(fields), file=file, flush=True)
    counts[fields["result"]] += 1
    if fields["result"] != "refused":
        print(fields["result"], fields["triple"], fields.get("why", ""), flush=True)
    return fields["seed"] + 1


if __name__ == "__main__":
    main()
