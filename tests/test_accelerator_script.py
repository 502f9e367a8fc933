"""benchmarks/accelerator.py at small sizes: every part, and what becomes of faults and limits."""

import argparse
import dataclasses
import importlib.util
import sys
import time
from pathlib import Path

import jax
import pytest

from neo_jax.ops import attention

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from accelerator import kernels, rows, table  # noqa: E402
from accelerator.parts import HERE, Part, measure, missing, parts  # noqa: E402
from accelerator.sizes import FULL, SMALL  # noqa: E402


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location(
        "accelerator_script", BENCHMARKS / "accelerator.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def args(tmp_path):
    return argparse.Namespace(output=tmp_path / "rows.jsonl", call=2, small=True)


@pytest.fixture
def quick_compiler():
    """XLA without most optimisations: nothing here is compared with a speed."""
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)


@pytest.mark.usefixtures("quick_compiler")
def test_every_part_gives_its_rows_at_small_sizes(tmp_path):
    path = tmp_path / "rows.jsonl"
    for part in parts(SMALL).values():
        measure(part, SMALL, path, call=1, at_once=2)
        assert not missing(part, SMALL, path, call=2)
    found = rows.read(path)
    assert {key: row for key, row in found.items() if "failed" in row or "error" in row} == {}
    text = table.markdown(found)
    for kind, (title, columns) in table.TABLES.items():
        here = kind != "memory"  # a CPU has no peak of its own
        assert (f"## {title}\n\n| {' | '.join(columns)} |" in text) == here
    assert "| splash | bfloat16 | 0 | - | - | - | not on this device |" in text
    assert "| blocked | float16 | 1 |" in text
    assert text.endswith("## Wrong or missing\n\nNothing.\n")


def test_the_limits_of_parts_are_eight_minutes():
    assert sum(part.seconds for part in parts(FULL).values()) <= 8 * 60


def test_a_kernel_that_is_off_by_more_than_its_tolerance_is_a_row(monkeypatch, tmp_path):
    monkeypatch.setitem(attention.KERNELS, "dense", lambda *args: 1.01 * attention.dense(*args))
    sizes = dataclasses.replace(SMALL, attention=SMALL.attention[:1])
    case = next(iter(kernels.cases(sizes).values()))
    row = kernels.start(sizes, [case], 1)(case)
    assert row["failed"] == "off by 0.01, 2e-05 is allowed"
    text = table.markdown({("kernels", "dense"): row | {"call": 1}})
    assert "| dense | float32 | 1 | 1.0e-02 | 1.0e-02 | 2.0e-05 | 1 wrong |" in text
    assert text.endswith("- kernels, dense: off by 0.01, 2e-05 is allowed\n")


def some_part(start):
    return Part("some", 10, lambda sizes: dict.fromkeys("abcd"), start, memory=0)


def test_rows_are_kept_as_they_come_and_only_what_is_missing_is_measured_again(args):
    measured = []

    def start(sizes, wanted, at_once):
        def run(case):
            measured.append(case)
            if len(measured) == 2:
                raise RuntimeError("no  luck\nhere")
            return {"figure": len(measured)}

        return run

    part = some_part(start)
    measure(part, SMALL, args.output, call=1, at_once=1)
    found = rows.read(args.output)
    assert found["some", "b"]["error"] == "RuntimeError: no luck here"
    assert [found["some", name].get("figure") for name in "abcd"] == [1, None, 3, 4]
    with args.output.open("a") as file:
        file.write('{"part": "some", "row": "a"')  # cut off
    assert not missing(part, SMALL, args.output, call=1)
    measure(part, SMALL, args.output, call=2, at_once=1)
    assert [rows.read(args.output)["some", name]["figure"] for name in "abcd"] == [1, 5, 3, 4]


def test_a_process_that_crashes_is_started_again_for_the_rows_after(script, args, monkeypatch):
    calls = []

    def run(part, args, at_once, seconds):
        calls.append(at_once)
        todo = [*missing(part, SMALL, args.output, args.call)]
        if len(calls) == 1:  # while several programs were compiled
            return -6
        rows.append(args.output, ("some", todo[0]), {"error": HERE, "call": args.call})
        if len(calls) in (2, 3):
            return -11
        return None  # its time is over

    monkeypatch.setattr(script, "_run", run)
    script.run_part(some_part(None), SMALL, args, time.perf_counter() + 60)
    assert calls[0] > calls[1] == 1 or calls[0] == 1
    found = rows.read(args.output)
    assert found["some", "a"]["error"] == "the process was ended with status -11"
    assert found["some", "c"]["error"].startswith("the process was stopped after ")
    assert found["some", "d"]["error"].startswith("not reached: the process was stopped after ")


def test_a_part_that_overruns_is_stopped(script, args, monkeypatch, tmp_path):
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text("import time\nprint('asleep', flush=True)\ntime.sleep(60)")
    monkeypatch.setattr(script, "__file__", str(sleeper))
    start = time.perf_counter()
    script.run_part(some_part(None), SMALL, args, start + 1)
    assert time.perf_counter() - start < 30
    assert "asleep" in args.output.with_suffix(".log").read_text()
    errors = [row["error"] for row in rows.read(args.output).values()]
    assert errors == ["not reached: the process was stopped after 1 s"] * 4


def test_figures_of_two_devices_are_not_mixed(args):
    rows.append(args.output, ("device", "limits"), {"device": "another", "call": 1})
    here = jax.local_devices()[0].device_kind
    with pytest.raises(SystemExit, match=f"figures of a another, and this is a {here}"):
        measure(parts(SMALL)["kernels"], SMALL, args.output, call=2, at_once=1)


def test_the_command_tells_by_its_exit_status_whether_all_is_well(
    script, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "rows.jsonl"
    outcomes = iter([{"figure": 1}, {"failed": "wrong"}])
    part = Part("some", 10, lambda sizes: {"a": None}, None)

    def run(part, args, at_once, seconds):
        rows.append(args.output, ("some", "a"), next(outcomes) | {"call": args.call})
        return 0

    monkeypatch.setattr(script, "_run", run)
    monkeypatch.setattr(script, "parts", lambda sizes: {"some": part})
    monkeypatch.setattr(sys, "argv", ["accelerator.py", "--small", "--output", str(path)])
    assert script.main() == 0
    assert script.main() == 0  # nothing is missing
    path.unlink()
    written = tmp_path / "table.md"
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--table", str(written)])
    assert script.main() == 1
    assert written.read_text().endswith("- some, a: wrong\n")
    assert "some: 1 rows  1 failed" in capsys.readouterr().err
