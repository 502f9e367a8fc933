"""Two plans of one model: what each sends and holds, and both next to each other."""

import json

import pytest

from neo_jax.cli import main
from neo_jax.config import ModelConfig
from neo_jax.errors import NeoError
from neo_jax.sharding.rules import make_sharding
from neo_jax.tools.plan import compare, explain_report, report
from neo_jax.tools.plan.explanation import explain_plan
from neo_jax.tools.plan.plan import make_plan
from neo_jax.tools.plan.steps import training_step
from neo_jax.tools.plan.topology import find_topology
from neo_jax.training.config import TrainConfig

pytestmark = [pytest.mark.optimized, pytest.mark.usefixtures("lines_of_this_checkout")]
MESHES = ("fsdp=8", "fsdp=4,model=2")


@pytest.fixture(scope="module")
def plans():
    """A training step on each mesh."""
    model = ModelConfig(
        num_layers=1,
        embed_dim=128,
        num_heads=4,
        vocab_size=1024,
        max_length=64,
        attention_types=("global",),
    )
    config = TrainConfig("", "", 10, batch_size=16, model=model)
    topology = find_topology("cpu:8")
    shardings = [make_sharding(mesh, "", topology.devices) for mesh in MESHES]
    return [make_plan(training_step(config, sharding), topology) for sharding in shardings]


@pytest.fixture(scope="module")
def explained(plans):
    """Their explanations."""
    return [explain_plan(plan) for plan in plans]


@pytest.mark.parametrize("number", [0, 1])
def test_the_arrays_of_the_peak_add_up_to_what_the_compiler_says(explained, number):
    found = explained[number]
    assert found.expected == pytest.approx(found.peak.total, rel=0.1)
    assert sum(each.size for each in found.peak.held) == found.peak.total
    named = sum(each.size for each in found.peak.held if each.name != "smaller arrays")
    assert named >= 0.95 * found.peak.total


@pytest.mark.parametrize("number", [0, 1])
def test_all_that_is_sent_has_a_name_and_a_line(plans, explained, number):
    moved = explained[number].moved
    sent = sum(row.wire_bytes for row in plans[number].traffic)
    assert sum(row.wire_bytes for row in moved) == pytest.approx(sent, rel=1e-3)
    assert {row.name for row in moved} >= {
        "gradient of state.params['wte']['embedding']",
        "state.params['unit_0']['mlp']['c_fc']['kernel']",
    }
    assert all(row.origin.line and row.name for row in moved if row.wire_bytes > 1000)
    assert not any(row.findings for row in moved)


def test_an_explanation_as_text_json_and_picture(explained):
    for found in explained:
        text, fields = str(found), explain_report.describe(found)
        assert "gradient of state.params" in text
        assert "neo_jax/sharding/fsdp.py" in text
        assert json.loads(json.dumps(fields, allow_nan=False)) == fields
        assert len(fields["peak"]["changes"]) <= 3
        assert explain_report.draw(found).startswith(b"\x89PNG")


@pytest.fixture
def files(plans, tmp_path):
    """Their JSON files."""
    found = [tmp_path / "first.json", tmp_path / "second.json"]
    for path, plan in zip(found, plans, strict=True):
        path.write_text(json.dumps(report.describe(plan)))
    return [str(path) for path in found]


def test_two_plans_next_to_each_other(plans, files, capsys, tmp_path):
    picture = tmp_path / "both.png"
    assert main(["plan", "--compare", *files, "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "mesh                first: fsdp=8" in printed
    assert ["first", "second"] in [line.split() for line in printed]
    total = next(line for line in printed if line.startswith("  total"))
    assert f"x {plans[1].memory.total / plans[0].memory.total:.2f}" in total
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["plan", "--compare", *files, "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    rows = {(row["part"], row["name"]): row["values"] for row in fields["rows"]}
    assert rows["memory", "total"] == [plan.memory.total for plan in plans]
    sent = [sum(row.wire_bytes for row in plan.traffic) for plan in plans]
    assert rows["traffic", "all"] == sent
    assert rows["traffic", "model"][0] == 0 < rows["traffic", "model"][1]
    assert fields["facts"][1]["mesh"] == "fsdp=4, model=2"


def test_what_is_no_plan_cannot_be_compared(files, tmp_path):
    other = tmp_path / "other.json"
    for text, message in (
        ("[]", "not a JSON object"),
        ('{"memory": 3}', "is no plan; write one with"),
        ('{"ranking": [{"plan": null}]}', "is no plan; write one with"),
    ):
        other.write_text(text)
        with pytest.raises(NeoError, match=message):
            compare.read_plans([files[0], str(other)])
    with pytest.raises(NeoError, match="No such file"):
        compare.read_plans([files[0], "missing.json"])
    assert main(["plan", "--compare", files[0]]) == 2


def test_searches_and_servers_are_compared_by_their_best(files, tmp_path):
    with open(files[0]) as file:
        plan = json.load(file)
    (tmp_path / "search.json").write_text(json.dumps({"ranking": [{"plan": plan}, {"plan": None}]}))
    (tmp_path / "serve.json").write_text(json.dumps({"servers": [{"plan": None}, {"plan": plan}]}))
    found = compare.read_plans([str(tmp_path / f"{name}.json") for name in ("search", "serve")])
    assert found[0]._replace(name="") == found[1]._replace(name="")
