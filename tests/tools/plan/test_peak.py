"""Which arrays are in memory when, against text made by hand and against the compiler's figures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import planted_faults
import pytest

from neo_jax.tools.plan import explain
from neo_jax.tools.plan.explanation import explain_text
from neo_jax.tools.plan.hlo import parse
from neo_jax.tools.plan.lifetimes import lifetimes, memory_bytes
from neo_jax.tools.plan.peak import ELSE

pytestmark = [pytest.mark.optimized, pytest.mark.usefixtures("lines_of_this_checkout")]

TEXT = """\
HloModule hand_made, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }, \
entry_computation_layout={(f32[100]{0}, f32[10]{0})->(f32[100]{0}, f32[20]{0})}

%double (p: f32[100]) -> f32[100] {
  %p = f32[100]{0} parameter(0)
  ROOT %twice = f32[100]{0} add(%p, %p)
}

%body (state: (s32[], f32[100], f32[7])) -> (s32[], f32[100], f32[7]) {
  %state = (s32[], f32[100]{0}, f32[7]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[100]{0} get-tuple-element(%state), index=1
  %same = f32[7]{0} get-tuple-element(%state), index=2
  %wide = f32[30,10]{1,0} custom-call(%x), custom_call_target="wide"
  %next = f32[100]{0} custom-call(%wide), custom_call_target="narrow"
  ROOT %out = (s32[], f32[100]{0}, f32[7]{0}) tuple(%i, %next, %same)
}

%condition (state.1: (s32[], f32[100], f32[7])) -> pred[] {
  %state.1 = (s32[], f32[100]{0}, f32[7]{0}) parameter(0)
  ROOT %go = pred[] custom-call(%state.1), custom_call_target="go"
}

ENTRY %main (a: f32[100], b: f32[10]) -> (f32[100], f32[20]) {
  %a = f32[100]{0} parameter(0)
  %b = f32[10]{0} parameter(1)
  %zero = s32[] constant(0)
  %seven = f32[7]{0} custom-call(%b), custom_call_target="seven"
  %start = f32[100]{0} custom-call(%a), custom_call_target="start"
  %in = (s32[], f32[100]{0}, f32[7]{0}) tuple(%zero, %start, %seven)
  %loop = (s32[], f32[100]{0}, f32[7]{0}) while(%in), condition=%condition, body=%body
  %y = f32[100]{0} get-tuple-element(%loop), index=1
  %doubled = f32[100]{0} fusion(%y), kind=kLoop, calls=%double
  %new = f32[20]{0} custom-call(%doubled), custom_call_target="new"
  %given = f32[100]{0} custom-call(%doubled), custom_call_target="given"
  ROOT %all = (f32[100]{0}, f32[20]{0}) tuple(%given, %new)
}
"""


def test_arrays_live_from_where_they_are_made_to_their_last_use():
    timeline = lifetimes(parse(TEXT), TEXT)
    # The place of the second result is taken from the start, and holds "seven" until then; that of
    # the argument that is given up holds what the condition says.
    always, i = 4 * (100 + 10 + 20), 4
    running = [each.name for each in timeline.running]
    bytes_at = dict(zip(running, timeline.curve() - always, strict=True))
    assert bytes_at["seven"] == 0
    assert bytes_at["start"] == 4 * 100
    assert bytes_at["go"] == 4 * 100 + i
    assert bytes_at["wide"] == 4 * (100 + 300) + i
    # The state of a loop is written in place.
    assert bytes_at["next"] == 4 * (300 + 100) + i
    # What is computed element by element takes its operand's place.
    assert bytes_at["doubled"] == 4 * 100
    assert bytes_at["new"] == 4 * 100
    # A result takes the place of the argument that is given up for it.
    assert bytes_at["given"] == 4 * 100
    peak = timeline.peak
    assert running[peak] == "wide"
    large = [life.size // 4 for life in timeline.alive(peak) if life.size > i]
    assert large == [300, 100, 100, 20, 10]


GIVEN_UP = """\
HloModule hand_made, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias), \
{1}: (1, {}, may-alias) }, \
entry_computation_layout={(f32[100]{0}, f32[100]{0})->(f32[100]{0}, f32[100]{0})}

ENTRY %main (a: f32[100], b: f32[100]) -> (f32[100], f32[100]) {
  %a = f32[100]{0} parameter(0)
  %b = f32[100]{0} parameter(1)
  %u = f32[100]{0} custom-call(%a), custom_call_target="u"
  %v = f32[100]{0} custom-call(%b), custom_call_target="v"
  %one = f32[100]{0} add(%u, %v)
  %first = f32[100]{0} add(%a, %one)
  %second = f32[100]{0} multiply(%a, %b)
  ROOT %all = (f32[100]{0}, f32[100]{0}) tuple(%first, %second)
}
"""


def test_a_result_takes_one_place_and_a_place_is_given_once():
    """As where parameters and moments of one size are updated by one instruction."""
    timeline = lifetimes(parse(GIVEN_UP), GIVEN_UP)
    arguments = 4 * (100 + 100)
    names = [each.name for each in timeline.running]
    assert names == ["u", "v", "one", "first", "second"]
    assert (timeline.curve() - arguments == [4 * 100, 4 * 200, 4 * 200, 4 * 100, 0]).all()


def test_the_best_change_is_measured_by_the_peak_without_it():
    found = explain_text(TEXT, {})
    assert found.peak.total == 4 * (100 + 10 + 20 + 100 + 300 + 1)
    assert sum(each.size for each in found.peak.held) == found.peak.total
    blocks = next(change for change in found.peak.changes if change.name == "blocks")
    assert blocks.saved == pytest.approx(4 * 300 * 7 / 8)


@pytest.mark.parametrize("text", [TEXT, GIVEN_UP])
def test_memory_over_time_adds_up_by_role(text):
    peak = explain_text(text, {}).peak
    curve = lifetimes(parse(text), text).curve()
    assert (sum(map(np.array, peak.curves.values())) == curve).all()
    held = dict.fromkeys(peak.curves, 0)
    for each in peak.held:
        held[each.role] += each.size
    assert {role: sizes[peak.time] for role, sizes in peak.curves.items()} == held
    if text == GIVEN_UP:  # "one" is not there at the peak, when "v" is made
        assert peak.curves[ELSE] == [0, 0, 4 * 100, 4 * 100, 0]


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[3,5]{1,0}", 60),
        ("f32[3,5]{1,0:T(8,128)}", 8 * 128 * 4),
        ("f32[3,5]{0,1:T(4,128)}", 8 * 128 * 4),
        ("bf16[16,256]{1,0:T(8,128)(2,1)}", 16 * 256 * 2),
        ("bf16[16,256]{1,0:T(8,128)(2,1)S(1)}", 0),
        ("f32[7,3,5]{2,1,0:T(8,128)}", 7 * 8 * 128 * 4),
        ("s32[]{:T(128)}", 4),
        ("f32[0,5]{1,0}", 0),
    ],
)
def test_tiles_are_filled_and_other_memories_do_not_count(shape, size):
    assert memory_bytes(shape) == size


def stacked(remat):
    """A step of a net of eight layers, whose arguments are given up."""

    def step(params, x):
        def layer(h, w):
            return jnp.tanh(h @ w), None

        def loss(params):
            body = jax.checkpoint(layer) if remat else layer
            return jnp.mean(jax.lax.scan(body, x, params)[0] ** 2)

        return jax.tree.map(lambda p, g: p - g, params, jax.grad(loss)(params))

    params = jax.ShapeDtypeStruct((8, 64, 64), jnp.float32)
    x = jax.ShapeDtypeStruct((256, 64), jnp.float32)
    return jax.jit(step, donate_argnums=0).lower(params, x).compile()


def of_faults(name):
    function, *arguments = planted_faults.FAULTS[name][0](planted_faults.make_mesh(jax.devices()))
    return jax.jit(function).lower(*arguments).compile()


PROGRAMS = {
    "scan": functools.partial(stacked, False),
    "checkpoint": functools.partial(stacked, True),
    **{name: functools.partial(of_faults, name) for name in planted_faults.FAULTS},
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_peak_is_what_the_compiler_says(name):
    found = explain(PROGRAMS[name]())
    assert found.peak.total == pytest.approx(found.expected, rel=0.05)
    assert sum(each.size for each in found.peak.held) == found.peak.total


def test_what_is_kept_for_the_backward_pass_is_named_and_recomputed():
    found = explain(stacked(False))
    kept = next(each for each in found.peak.held if each.role == "kept")
    assert kept.size >= 8 * 256 * 64 * 4
    assert kept.name.endswith("tanh")
    assert kept.line.file == __file__
    assert "recompute" in {change.name for change in found.peak.changes}
