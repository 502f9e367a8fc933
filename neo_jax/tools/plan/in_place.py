"""Which results of a compiled program take the places of which operands."""

import re

from neo_jax.tools.plan.dataflow import ELEMENTWISE
from neo_jax.tools.plan.hlo import Instruction, Program

WRITTEN = ("dynamic-update-slice", "scatter")
"""What writes a part of its first operand anew, in its place."""


def given_up(header: str) -> list[tuple[int, int]]:
    """Returns which results take the places of which arguments."""
    said = header.partition("input_output_alias={")[2].partition("entry_computation_layout")[0]
    pairs = re.findall(r"\{(\d*)\}: \((\d+), \{\}", said)
    return [(int(output or 0), int(number)) for output, number in pairs]


def said_in_place(each: Instruction) -> list[tuple[int, int]]:
    """Returns which results take the places of which operands, as the text says."""
    said = each.attributes.partition("output_to_operand_aliasing={")[2]
    pairs = re.findall(r"\{(\d*)\}: \((\d+), \{\}\)", said.partition("}}")[0] + "}")
    return [(int(output or 0), int(number)) for output, number in pairs]


def updated_in_place(program: Program, fused: str) -> list[tuple[int, int]]:
    """Returns which results of a fusion are an operand of which a part is written anew."""
    lines = program.computations[fused]
    root = next(each for each in lines.values() if each.is_root)
    results = [lines[name] for name in root.operands] if root.opcode == "tuple" else [root]
    found = []
    for output, each in enumerate(results):
        while each.opcode in ("bitcast", "copy") and each.operands:
            each = lines[each.operands[0]]
        if each.opcode not in WRITTEN:
            continue
        target = lines[each.operands[0]]
        while target.opcode == "bitcast":
            target = lines[target.operands[0]]
        if target.opcode == "parameter":
            found.append((output, int(target.operands[0])))
    return found


def element_by_element(program: Program, fused: str) -> list[tuple[int, int]]:
    """Returns which operands of a fusion are used element by element alone, for which results."""
    lines = program.computations[fused]
    root = next(each for each in lines.values() if each.is_root)
    results = root.operands if root.opcode == "tuple" else (root.name,)
    found = []
    for given in lines.values():
        if given.opcode != "parameter":
            continue
        reached = {given.name}
        for each in lines.values():
            if each is not root and not reached.isdisjoint(each.operands):
                reached.add(each.name)
        made = [lines[name] for name in reached if name != given.name]
        if root.opcode != "tuple" and not reached.isdisjoint(root.operands):
            made.append(root)
            reached.add(root.name)
        if all(each.opcode in ELEMENTWISE or each.opcode == "bitcast" for each in made):
            outputs = [output for output, name in enumerate(results) if name in reached]
            found += [(int(given.operands[0]), output) for output in outputs]
    return found
