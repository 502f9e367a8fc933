"""No host ever holds a model beside its shards: memory of loading 1.3 billion parameters."""

import json
import subprocess
import sys

import pytest

from neo_jax.config import preset
from neo_jax.model.tensor_table import tensors

LOAD = """
import json, re, sys, threading
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
from neo_jax.text.load import load
from neo_jax.sharding.rules import tree_shardings

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.01):
        peak = max(peak, anonymous())
jax.devices()
before = anonymous()
threading.Thread(target=watch, daemon=True).start()
lm = load(sys.argv[1], dtype="bfloat16", mesh=sys.argv[2])
done.set()
held = sum(shard.data.nbytes for leaf in jax.tree.leaves(lm.params)
           for shard in leaf.addressable_shards)
print(json.dumps({"peak": peak, "before": before, "held": held}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads RssAnon from /proc")
def test_peak_of_loading_float32_as_bfloat16_onto_eight_devices(tmp_path):
    config = preset("gpt-neo-1.3b")
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    header, end = {}, 0
    for tensor in tensors(config):
        size = 4
        for length in tensor.places["hf"].shape:
            size *= length
        header[tensor.hf_name] = {
            "dtype": "F32", "shape": tensor.places["hf"].shape, "data_offsets": (end, end + size)
        }  # fmt: skip
        end += size
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # zeros that take no room on the disk
    done = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path, "fsdp=4,model=2"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    target = 2 * config.num_params
    assert target <= found["held"] <= 1.01 * target
    assert found["held"] < found["peak"] <= 1.2 * target + 500e6
