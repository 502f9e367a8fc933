"""What a compiled program says of its lines: faults that were put there, names, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import planted_faults
import pytest

from neo_jax.errors import NeoError
from neo_jax.tools.plan import explain
from neo_jax.tools.plan.explanation import explain_text

pytestmark = [pytest.mark.optimized, pytest.mark.usefixtures("lines_of_this_checkout")]


@pytest.fixture(autouse=True, scope="module")
def _lines_of_now():
    """A kept program may be of other lines."""
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    yield
    jax.config.update("jax_compilation_cache_include_metadata_in_key", False)


@pytest.fixture(scope="module")
def mesh():
    return planted_faults.make_mesh(jax.devices())


def marked_lines(function):
    """The line of a function that ends in "# fault"."""
    with open(planted_faults.__file__) as file:
        lines = file.read().splitlines()
    start = function.__code__.co_firstlineno
    return next(n for n in range(start, len(lines) + 1) if lines[n - 1].endswith("# fault"))


def compiled(program, mesh):
    function, *arguments = program(mesh)
    return jax.jit(function).lower(*arguments).compile()


@pytest.mark.parametrize("name", planted_faults.FAULTS)
def test_a_fault_that_was_put_there_is_found_with_its_line(name, mesh):
    program, rule = planted_faults.FAULTS[name]
    explanation = explain(compiled(program, mesh))
    row = next(row for row in explanation.moved if row.findings)
    finding = next(finding for finding in row.findings if finding.rule == rule)
    line = finding.line or row.origin.line
    assert (line.file, line.line) == (planted_faults.__file__, marked_lines(program))
    assert f"planted_faults.py:{line.line}" in str(explanation)
    assert 0 < finding.saved <= row.wire_bytes


def test_every_fault_is_of_the_program_that_has_it(mesh):
    """What is written well has none: weights that must be gathered, and sums that must be."""

    def layer(w1, w2, x):
        w1 = planted_faults.constrain(w1, planted_faults.place(mesh, None, "model"))
        w2 = planted_faults.constrain(w2, planted_faults.place(mesh, "model", None))
        h = jnp.tanh(x @ w1)
        return planted_faults.constrain(h @ w2, planted_faults.place(mesh, "data"))

    array = planted_faults.array
    arguments = (
        array(mesh, (256, 512), "data", "model"),
        array(mesh, (512, 256), "model", "data"),
        array(mesh, (64, 256), "data"),
    )
    found = explain(jax.jit(layer).lower(*arguments).compile())
    assert {(row.kind, row.axes, row.name) for row in found.moved} == {
        ("all-gather", ("data",), "w1"),
        ("all-gather", ("data",), "w2"),
        ("all-reduce", ("model",), "dot_general"),
    }
    assert [row.findings for row in found.moved] == [(), (), ()]


def test_a_program_of_one_device_sends_nothing():
    found = explain(jax.jit(lambda x: 2 * x).lower(jnp.ones(4)).compile())
    assert not found.moved
    assert found.peak.total == found.expected == 32
    assert "sends nothing" in str(found)


def test_the_mesh_may_be_given_and_must_be_of_the_program(mesh):
    program = planted_faults.FAULTS["constraints_that_disagree"][0]
    other = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("rows", "columns"))
    axes = {axis for row in explain(compiled(program, mesh), other).moved for axis in row.axes}
    assert axes <= {"rows", "columns"}
    with pytest.raises(NeoError, match="for 8 devices, and the mesh has 2"):
        explain(compiled(program, mesh), jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",)))


LOOP = """\
HloModule hand_made, is_scheduled=true, entry_computation_layout={(f32[8]{0}, f32[8]{0})->f32[8]{0}}

%body (s: (s32[], f32[8], f32[8])) -> (s32[], f32[8], f32[8]) {
  %s = (s32[], f32[8]{0}, f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %same = f32[8]{0} get-tuple-element(%s), index=1
  %new = f32[8]{0} get-tuple-element(%s), index=2
  %one = f32[32]{0} all-gather(%same), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  %two = f32[32]{0} all-gather(%new), channel_id=2, replica_groups={{0,1,2,3}}, dimensions={0}
  %next = f32[8]{0} custom-call(%one, %two), custom_call_target="next"
  ROOT %out = (s32[], f32[8]{0}, f32[8]{0}) tuple(%i, %same, %next)
}

%condition (s.1: (s32[], f32[8], f32[8])) -> pred[] {
  %s.1 = (s32[], f32[8]{0}, f32[8]{0}) parameter(0)
  ROOT %go = pred[] custom-call(%s.1), custom_call_target="go"
}

ENTRY %main (w: f32[8], x: f32[8]) -> f32[8] {
  %w = f32[8]{0} parameter(0), metadata={op_name="w"}
  %x = f32[8]{0} parameter(1), metadata={op_name="x"}
  %zero = s32[] constant(0)
  %in = (s32[], f32[8]{0}, f32[8]{0}) tuple(%zero, %w, %x)
  %loop = (s32[], f32[8]{0}, f32[8]{0}) while(%in), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  ROOT %y = f32[8]{0} get-tuple-element(%loop), index=2
}
"""


def test_only_what_is_the_same_in_each_trip_need_not_be_moved_in_each():
    same, new = explain_text(LOOP, {"data": 4}).moved
    assert (same.name, same.times, same.wire_bytes) == ("w", 5, 5 * 24 * 4)
    assert [(each.rule, each.saved) for each in same.findings] == [("every_trip", 4 * 24 * 4)]
    assert new.role == "activation"
    assert new.findings == ()
