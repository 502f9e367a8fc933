"""A checkpoint as EleutherAI/gpt-neo writes it, by TensorFlow, converts and matches.

TensorFlow is too heavy for the environment of the other tests: .ci/run gives this one its own.
"""

import json

import numpy as np
import pytest
import tensorflow
from flax.traverse_util import flatten_dict

from neo_jax.checkpoints.load import load_params
from neo_jax.checkpoints.open_model import read_config
from neo_jax.cli import main
from neo_jax.config import ModelConfig
from neo_jax.model.tensor_table import tensors

THEIRS = {
    "n_layer": 3, "n_embd": 24, "n_head": 3, "n_vocab": 97, "n_ctx": 40,
    "local_attention_radius": 8, "attention_types": [[["global", "global", "local"], 1]],
    "activation_function": "gelu", "scale_by_depth": True, "eos_id": 5,
    "lr": 1e-4, "train_batch_size": 8, "train_steps": 3, "model": "GPT",
}  # fmt: skip
CONFIG = ModelConfig(
    num_layers=3, embed_dim=24, num_heads=3, vocab_size=97, max_length=40, window_size=8,
    attention_types=("global", "global", "local"), eos_token_id=5,
)  # fmt: skip


def names_and_shapes():
    """The variables of a model of three layers, by name, as that program makes them."""
    yield "gpt2/wte", (128, 24)  # 31 rows more than the vocabulary has
    yield "gpt2/wpe", (40, 24)
    for i in range(3):
        for norm in ("norm_1", "norm_2"):
            yield f"gpt2/h{i}/{norm}/g", (24,)
            yield f"gpt2/h{i}/{norm}/b", (24,)
        for kernel in "qkvo":
            yield f"gpt2/h{i}/attn/{kernel}", (24, 24)
        yield f"gpt2/h{i}/attn/compute_output_bias/o_b", (24,)
        for name, shape in (("c_fc", (24, 96)), ("c_proj", (96, 24))):
            yield f"gpt2/h{i}/mlp/conv1d_main/{name}/kernel", shape
            yield f"gpt2/h{i}/mlp/conv1d_main/{name}/bias", shape[1:]
    yield "gpt2/ln_f/g", (24,)
    yield "gpt2/ln_f/b", (24,)


@pytest.fixture
def folder(tmp_path):
    """The checkpoint of step 7, an older one of another size beside it; and its values."""
    v1, place = tensorflow.compat.v1, tmp_path / "theirs"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(THEIRS))
    rng, values = np.random.default_rng(0), {}
    for step in (5, 7):
        with v1.Graph().as_default(), v1.Session() as session:
            variables = [v1.get_variable("global_step", initializer=np.int64(step))]
            for name, shape in names_and_shapes():
                values[name] = (0.3 * rng.normal(size=shape)).astype(np.float32)
                variables.append(v1.get_variable(name, initializer=values[name]))
                for slot in ("adam_m", "adam_v"):
                    zeros = np.zeros(shape, np.float32)
                    variables.append(v1.get_variable(f"{name}/{slot}", initializer=zeros))
            session.run(v1.global_variables_initializer())
            v1.train.Saver(variables).save(session, str(place / "model.ckpt"), global_step=step)
    return place, values


def test_it_converts_and_matches(folder, tmp_path, capsys):
    place, values = folder
    assert read_config(place) == CONFIG
    assert main(["convert", str(place), str(tmp_path / "ours"), "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert fields["largest_difference"] == 0
    assert fields["parameters"] == CONFIG.num_params
    assert fields["logits"].startswith("25 tokens: ")  # as transformers has them of what is written
    ours = flatten_dict(load_params(tmp_path / "ours", CONFIG))
    used = {"gpt2/wte"}
    np.testing.assert_array_equal(ours["wte", "embedding"][:97], values["gpt2/wte"][:97])
    for row in tensors(CONFIG)[1:]:
        name = row.places["mesh_tf"].name
        used.add(name)
        array, theirs = np.asarray(ours[row.path]), values[name]
        if row.num_inputs:  # where they have the inputs first
            theirs = theirs.T
        np.testing.assert_array_equal(array.reshape(theirs.shape), theirs, err_msg=name)
    assert used == values.keys()
    assert main(["info", str(place), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "float32"


def test_what_does_not_fit_is_refused(folder, tmp_path, capsys):
    place, _ = folder
    (place / "config.json").write_text(json.dumps(THEIRS | {"n_layer": 2, "attention_types": []}))
    assert main(["convert", str(place), str(tmp_path / "ours")]) == 1
    assert "a model of this config.json has not, the first gpt2/h2/" in capsys.readouterr().err
    (place / "model.ckpt-7.index").write_bytes(b"no table")
    assert main(["info", str(place)]) == 1
    assert "model.ckpt-7.index is damaged" in capsys.readouterr().err
