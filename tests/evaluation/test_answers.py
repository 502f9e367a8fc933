"""neo_jax/evaluation/answers.py: finished requests on disk."""

import jax
import jax.numpy as jnp
import pytest

from neo_jax.errors import NeoError
from neo_jax.evaluation.answers import Answers, fingerprint
from neo_jax.model import Neo
from neo_jax.sharding import make_sharding


def test_an_answer_is_found_by_its_model_and_its_request(tmp_path):
    path = tmp_path / "new" / "answers.sqlite"
    answers = Answers(path, "a")
    answers.add(("score", [1, 2], [3]), [-1.5, True])
    answers.add(("text", [1, 2]), "so it goes")
    assert answers.find(("score", [1, 2], [3])) == [-1.5, True]
    for other in (("score", [1], [2, 3]), ("score", [1, 2, 3]), ("text", [1, 2], [3])):
        assert answers.find(other) is None
    again = Answers(path, "a")  # while the other is open, as after a kill
    assert again.find(("text", (1, 2))) == "so it goes"
    assert Answers(path, "b").find(("text", [1, 2])) is None


def test_a_file_that_is_something_else(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("no database at all, but a text of some length " * 100)
    with pytest.raises(NeoError, match=r"cannot keep .*notes\.txt: file is not"):
        Answers(path, "a")
    with pytest.raises(NeoError, match="name another file with --cache, or none"):
        Answers(path / "inside", "a")


def test_every_weight_counts_and_where_it_lies_does_not(tiny):
    model, params = tiny
    original = fingerprint(model, params)
    assert fingerprint(model, params) == original
    kernel = params["h_1"]["mlp"]["c_fc"]["kernel"]
    for changed in (
        kernel.at[3, 5].add(1e-7),
        kernel.at[jnp.array([3, 4])].set(kernel[jnp.array([4, 3])]),  # the same numbers
    ):
        mlp = {**params["h_1"]["mlp"], "c_fc": {**params["h_1"]["mlp"]["c_fc"], "kernel": changed}}
        other = {**params, "h_1": {**params["h_1"], "mlp": mlp}}
        assert fingerprint(model, other) != original
    sharding = make_sharding("fsdp=2,model=4")
    where = jax.sharding.NamedSharding(sharding.mesh, jax.P("model"))
    split = jax.tree.map(lambda x: jax.device_put(x, where) if x.shape[0] % 4 == 0 else x, params)
    assert fingerprint(model, split) == original
    assert fingerprint(Neo(model.config, jnp.bfloat16), params) != original
