"""Reading a program: text made by hand, every line of which can be checked by hand."""

import re
from pathlib import Path

import pytest

from neo_jax.tools.plan.hlo import elements, num_bytes, parse, runs, sizes

TEXT = (Path(__file__).parent / "program.hlo").read_text()


def test_a_program_is_read_line_by_line():
    program = parse(TEXT)
    assert program.entry == "main"
    assert len(program.computations) == 14
    root = program.computations["inner_condition"]["less"]
    assert root.opcode == "compare"
    assert root.operands == ("i.1", "limit")
    assert root.is_root
    assert program.computations["inner_condition"]["limit"].operands == ("5",)
    loop = program.computations["outer_body"]["loop"]
    assert loop.shape == "(s32[]{:T(128)}, f32[100]{0:T(128)})"


def test_elements_of_tuples_may_be_operands():
    lines = TEXT.splitlines()
    named = {"i": "inner#0", "v": "inner#1", "i.1": "inner.1#0", "result": "loop.1#1"}
    newer = "\n".join(line for line in lines if "get-tuple-element" not in line or "ROOT" in line)
    for name, element in named.items():
        newer = re.sub(rf"%{re.escape(name)}(?=[,)])", f"%{element}", newer)
    assert "inner#0" in newer
    before = [run for run in runs(parse(TEXT)) if run.instruction.name not in named]
    after = [run for run in runs(parse(newer)) if "#" not in run.instruction.name]
    assert [(run.instruction.name, run.times, run.path) for run in before] == [
        (run.instruction.name, run.times, run.path)
        for run in after
        if run.instruction.name not in named
    ]
    element = parse(newer).computations["inner_condition"]["inner.1#0"]
    assert (element.shape, element.opcode, element.operands) == (
        "s32[]{:T(128)}", "get-tuple-element", ("inner.1",),
    )  # fmt: skip


def test_every_instruction_runs_as_often_as_the_loops_around_it():
    found = {run.instruction.name: run for run in runs(parse(TEXT))}
    assert found["moved"].times == 3 * 5
    assert found["moved"].path == ("main", "outer_body", "inner_body")
    assert found["gathered.2"].times == 3
    assert found["gathered.2"].path == ("main", "outer_body")
    assert found["gathered.2"].fusions == ("link.2",)
    assert found["scattered"].times == found["everywhere"].times == found["same"].times == 1
    assert found["any"].times is None  # the loop ends when the data say so
    assert {run.instruction.name: run for run in runs(parse(TEXT), 7)}["any"].times == 7


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]", 4),
        ("bf16[1,1024,8,128]{1,3,2,0:T(8,128)(2,1)S(1)}", 2 * 1024 * 1024),
        ("(f32[4]{0}, /*index=1*/(s8[3]{0}, pred[5]{0}), u32[]{:S(2)})", 16 + 3 + 5 + 4),
        ("s4[10]{0:T(128)E(4)}", 5),
        ("f8e4m3fn[3,2]{1,0}", 6),
        ("s32[<=10]{0}", 40),
        ("token[]", 0),
    ],
)
def test_bytes_of_a_shape(shape, size):
    assert num_bytes(shape) == size


def test_a_shape_in_its_parts():
    assert elements("(s32[]{:T(128)}, (f32[2,3]{1,0}, pred[4]{0}))") == [
        "s32[]{:T(128)}",
        " (f32[2,3]{1,0}, pred[4]{0})",
    ]
    assert elements("f32[2,3]{1,0}") == ["f32[2,3]{1,0}"]
    assert sizes("bf16[2,3]{1,0:T(8,128)(2,1)}") == (2, 3)
    assert sizes("f32[]") == ()
