"""devices/processes.py and cli/cluster.py: runs of two processes of four devices each."""

import dataclasses
import json
import re
import signal
import socket
import time
from pathlib import Path

import jax
import pytest
from config_files import write_config
from several_processes import HEARTBEAT, Runs, ended, free_port

import neo_jax
from neo_jax.cli import UsageError
from neo_jax.cli.cluster import ClusterOptions
from neo_jax.config import ModelConfig
from neo_jax.data.feed import batches
from neo_jax.data.prepare import prepare
from neo_jax.devices.processes import join
from neo_jax.errors import NeoError
from neo_jax.text.language_model import Sample
from neo_jax.training import loop
from neo_jax.training.config import OptimizerConfig, TrainConfig
from neo_jax.training.loop import train

DIED = "neo-jax: another process of this run died or cannot be reached; start all of them again"


@pytest.fixture
def start(tmp_path_factory):
    with Runs(tmp_path_factory.getbasetemp()) as runs:
        yield runs


def assert_ends_with_a_line(survivor, progress="no such line", then=""):
    """Of a process that has lost another one: it ends in time, and says why."""
    lost = time.monotonic()
    status, out, err = ended(survivor)
    assert time.monotonic() - lost < HEARTBEAT
    assert (status, out) == (1, "")
    last = err.pop()
    assert last == f"{DIED}{then}."
    assert all(line.startswith(progress) for line in err)


# Training.


@pytest.fixture(scope="module")
def config(tmp_path_factory, tokenizer_folders, text):
    """A run of 24 steps that saves every four; it names no mesh yet."""
    root = tmp_path_factory.mktemp("distributed")
    lines = [{"text": f"{i}. {line}"} for i in range(40) for line in text.splitlines()]
    (root / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare([root / "text.jsonl"], root / "data", tokenizer_folders["pieces"], held_out=0.1)
    return TrainConfig(
        data=str(root / "data"),
        output=str(root / "run"),
        steps=24,
        batch_size=8,
        model=ModelConfig(
            num_layers=1,
            embed_dim=16,
            num_heads=4,
            vocab_size=320,
            max_length=16,
            window_size=4,
            attention_types=("local",),
            eos_token_id=1,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2, weight_decay=0.1),
        across_documents=False,  # every array of a batch is sent
        dtype="float32",
        log_every=1,
        eval_every=24,
        save_every=4,
        keep=2,
    )


def newest(config):
    """The newest checkpoint that is whole."""
    folder = Path(config.output) / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def lines(config):
    """What metrics.jsonl holds: the loss of each step, and the evaluation."""
    content = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    found = list(map(json.loads, content))
    losses = [(line["step"], line["loss"]) for line in found if "loss" in line]
    return losses, [line for line in found if "loss" not in line]


class Killed(BaseException):
    """What a signal does to a run."""


def test_a_run_survives_the_death_of_a_process(start, config, monkeypatch):
    file = Path(config.output).with_name("config.py")
    write_config(file, config)
    # With these rules the rows of a process are every other one of the batch.
    args = ["--mesh", "data=2,fsdp=4", "--rules", "batch:fsdp+data,embed:fsdp"]
    first, second = start("-m", "neo_jax", "train", file, *args)
    deadline = time.monotonic() + 100
    while not newest(config):
        assert time.monotonic() < deadline
        assert first.poll() is None, ended(first)
        time.sleep(0.02)
    second.kill()
    then = ": training goes on from its newest checkpoint"
    assert_ends_with_a_line(first, progress="step ", then=then)
    assert ended(second) == (-signal.SIGKILL, "", [])
    assert 4 <= newest(config) < 20
    assert not (Path(config.output) / "model").exists()

    # On as one process, and on another mesh; that one dies too.
    def dying(*args, **options):
        yield from (batch for _, batch in zip(range(5), batches(*args, **options), strict=False))
        raise Killed

    monkeypatch.setattr(loop, "batches", dying)
    with pytest.raises(Killed):
        train(dataclasses.replace(config, mesh="fsdp=4,model=2"))
    monkeypatch.undo()

    # On as two processes, to the end.
    first, second = start("-m", "neo_jax", "train", file, "--mesh", "model=4,data=2")
    assert ended(second) == (0, "", [])
    status, out, err = ended(first)
    assert (status, out) == (0, f"{config.output}/model\n")
    assert err[0].startswith("resuming at step ")
    assert "; mesh fsdp=4,model=2 -> model=4,data=2" in err[0]
    assert all(line.startswith("step ") for line in err[1:])

    alone = dataclasses.replace(config, output=f"{config.output}-alone")
    train(alone)
    (losses, evaluations), (expected, expected_evaluations) = lines(config), lines(alone)
    assert [step for step, _ in losses] == list(range(1, 25))
    for (_, loss), (_, reference) in zip(losses, expected, strict=True):
        assert loss == pytest.approx(reference, rel=1e-5)
    for ours, theirs in zip(evaluations, expected_evaluations, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    ours, theirs = (neo_jax.load(f"{run.output}/model").params for run in (config, alone))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        # Adam divides small gradients by themselves, so rounding moves a weight by part of a step.
        assert abs(a - b).max() < 1e-3


def test_a_signal_to_one_process_stops_all_at_the_same_step(start, config, tmp_path):
    file = tmp_path / "config.py"
    config = dataclasses.replace(
        config, output=str(tmp_path / "run"), steps=100_000, prompts=("a",), sample_tokens=4
    )
    write_config(file, config)
    first, second = start("-m", "neo_jax", "train", file, "--mesh", "data=2,fsdp=4")
    while newest(config) < 24:  # an evaluation and its texts are behind
        assert first.poll() is None, ended(first)
        time.sleep(0.02)
    second.terminate()
    assert ended(second) == (0, "", [])
    status, out, err = ended(first)
    assert (status, out) == (0, "")
    assert any(line.startswith("step 24: 'a' goes on ") for line in err)
    assert err[-1] == (f"stopped after step {newest(config)}; the same command goes on from there")
    assert lines(config)[0][-1][0] == newest(config)


# Generating and scoring.


def test_two_processes_write_what_one_does(start, checkpoints, text, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(line[:20] for line in text.splitlines()) + "\nThe\n")
    model = ["--model", checkpoints["pieces"], "--mesh"]
    generate = ["-m", "neo_jax", "generate", "--prompts-file", prompts, "--json", *model]
    generate += ["data=2,fsdp=4", "--max-new-tokens", 8, "--num-samples", 2]
    score = ["-m", "neo_jax", "score", "--input", prompts, *model, "fsdp=4,model=2"]

    def together(command):
        first, second = start(*command)
        assert ended(second) == (0, "", [])
        status, out, err = ended(first)
        assert status == 0, err
        return list(map(json.loads, out.splitlines())), err

    lm = neo_jax.load(checkpoints["pieces"])
    ours, said = together(generate)
    theirs = lm.sample(prompts.read_text().splitlines(), 8, 2)
    assert (len(ours), said) == (8, [])
    for sample, expected in zip(ours, theirs, strict=True):
        assert sample.pop("logprobs") == pytest.approx(expected.logprobs, abs=1e-4)
        assert Sample(**sample, logprobs=expected.logprobs) == expected

    ours, said = together(score)
    _, alone, said_alone = ended(start(*score, count=1, devices=8)[0])
    assert len(said) == 1
    assert said == said_alone
    for score, line in zip(ours, alone.splitlines(), strict=True):
        expected = json.loads(line)
        assert score.pop("ids") == expected.pop("ids")
        assert score.pop("logprobs") == pytest.approx(expected.pop("logprobs"), abs=1e-4)
        assert score == pytest.approx(expected, abs=1e-4)


# How a run ends.

SCRIPT = """
import sys, time
from jax.experimental.multihost_utils import sync_global_devices
from neo_jax.cli import cluster
from neo_jax.devices.processes import join
from neo_jax.errors import NeoError

_, address, _, count, _, index, *_ = sys.argv[1:]
with cluster.ClusterOptions(address, int(count), int(index), 6, 60).joined(True):
    sync_global_devices("here")
    print("here", index, file=sys.stderr)
"""


def test_the_death_of_the_first_process(start):
    """It is the one that would tell the others of deaths."""
    loop = '    while True:\n        sync_global_devices("x")\n        print(end="", flush=True)\n'
    first, second = start("-c", SCRIPT + loop)
    assert first.stderr.readline() == "here 0\n"
    time.sleep(1)
    first.kill()
    assert_ends_with_a_line(second, progress="here 1")


@pytest.mark.parametrize(
    ("error", "shown"),
    [('NeoError("the disk is full.")', ["neo-jax: the disk is full."]), ("KeyError(7)", None)],
)
def test_an_error_in_one_process_ends_all(start, error, shown):
    body = f"    if index == '0':\n        raise {error}\n    time.sleep(100)\n"
    first, second = start("-c", SCRIPT + body)
    status, out, err = ended(first)
    assert (status, out) == (1, "")
    if shown:
        assert err[1:] == shown
    else:  # a fault of the program is not hidden
        assert (err[1], err[-1]) == ("Traceback (most recent call last):", "KeyError: 7")
    assert_ends_with_a_line(second, progress="here 1")


def test_processes_that_do_not_come(start):
    """Whether the one that lacks is the first or another one."""
    script = SCRIPT.replace("60", "2")
    waiting = [start("-c", script.replace("int(index)", i), come=1)[0] for i in "01"]
    for process in waiting:
        assert ended(process) == (
            1,
            "",
            [
                "neo-jax: not all processes of this run came within 2 s, or process 0 cannot be "
                "reached; start the same command for each of them, or give --coordinator none to "
                "run alone."
            ],
        )


def test_an_abort_of_another_kind_shows_its_reason(start):
    script = (
        "import ctypes, os; from neo_jax.cli import cluster; log, _ = cluster._divert();"
        "cluster._on_abort(log); os.write(2, b'Check failed: 1 > 2\\n');"
        "ctypes.CDLL(None).abort()"  # as XLA does, without the lock of the interpreter
    )
    process = start("-c", script, count=1)[0]
    assert ended(process) == (-signal.SIGABRT, "", ["Check failed: 1 > 2"])


# Who is there.


def test_where_nobody_else_is(start):
    """No cluster; and an interactive shell of Slurm, for which JAX would count eight tasks."""
    script = """
import os
from neo_jax.devices.processes import join
print(join(), end=" ")
slurm = "SLURM_JOB_ID=1 SLURM_STEP_NODELIST=n SLURM_NTASKS=8 SLURM_PROCID=0 SLURM_LOCALID=0"
os.environ.update(pair.split("=") for pair in (slurm + " SLURM_STEP_NUM_TASKS=1").split())
print(join(), join("none"))
"""
    assert ended(start("-c", script, count=1)[0]) == (0, "False False False\n", [])


def test_a_cluster_is_found(start):
    """Slurm's variables, as two tasks have them."""
    script = (
        "from neo_jax.cli.cluster import ClusterOptions; import jax\n"
        "with ClusterOptions().joined(True):\n"
        "    print(jax.process_count(), jax.device_count())"
    )
    cluster = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    cluster |= {"SLURM_STEP_NUM_TASKS": "2", "JAX_COORDINATOR_PORT": str(free_port())}
    tasks = [
        start("-c", script, count=1, **cluster, SLURM_PROCID=i, SLURM_LOCALID=i)[0] for i in "01"
    ]
    assert [ended(task) for task in tasks] == [(0, "2 8\n", []), (0, "", [])]


@pytest.fixture
def initialized(monkeypatch):
    """What JAX is told; nobody is joined."""
    told = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: told.append(options))
    for name in ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    return told


def test_what_jax_is_told(initialized):
    assert not join()  # one process, once joined
    assert not join("mpi4py", heartbeat_timeout=8, start_timeout=8)
    assert not join("10.0.0.1:8476", 4, 3)
    timeouts = {"heartbeat_timeout_seconds": 45, "initialization_timeout": 300}
    assert initialized == [
        timeouts,
        {
            "cluster_detection_method": "mpi4py",
            "heartbeat_timeout_seconds": 6,
            "initialization_timeout": 8,
        },
        {
            "coordinator_address": "10.0.0.1:8476",
            "num_processes": 4,
            "process_id": 3,
            "cluster_detection_method": "deactivate",
            **timeouts,
        },
    ]


@pytest.mark.parametrize(
    ("environment", "alone"),
    [
        ("OMPI_COMM_WORLD_SIZE=1", True),
        ("OMPI_COMM_WORLD_SIZE=2", False),
        ("SLURM_STEP_NUM_TASKS=1", True),
        ("SLURM_STEP_NUM_TASKS=1 OMPI_COMM_WORLD_SIZE=8", False),  # mpirun's daemon is the task
        ("SLURM_STEP_NUM_TASKS=4", False),
        ("TPU_WORKER_HOSTNAMES=localhost", True),
        ("TPU_PROCESS_ADDRESSES=local TPU_WORKER_HOSTNAMES=", True),
        ("TPU_WORKER_HOSTNAMES=a,b", False),
        ("TPU_WORKER_HOSTNAMES=a MEGASCALE_NUM_SLICES=2", False),
        ("", False),
    ],
)
def test_who_is_alone_does_not_ask_jax(initialized, monkeypatch, environment, alone):
    for pair in environment.split():
        monkeypatch.setenv(*pair.split("="))
    assert not join()
    assert (initialized == []) == alone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("10.0.0.1", 2, 0), "the coordinator '10.0.0.1' is not auto, none, mpi4py or HOST:PORT"),
        (("localhost:1", 0, -1), "process -1 is not one of 0; give --num-processes N and --proc"),
        (("localhost:1", 2, 2), "process 2 is not one of 2; give"),
        (("localhost:99999", 2, 0), "the coordinator 'localhost:99999' is not auto, none"),
        (("http://x:1", 2, 0), "the coordinator 'http://x:1' is not auto, none"),
        (("auto", 2, 1), "goes with the address of process 0; add --coordinator HOST:PORT"),
        (("none", 0, 0), "goes with the address of process 0; add --coordinator HOST:PORT"),
    ],
)
def test_places_that_cannot_be(initialized, arguments, message):
    with pytest.raises(NeoError, match=re.escape(message)):
        join(*arguments)
    assert initialized == []


def test_a_port_that_is_taken(initialized):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(NeoError, match=f"process 0 cannot listen on port {port} .*; end what"):
            join(f"localhost:{port}", 2, 0)
    assert initialized == []


@pytest.mark.parametrize("timeouts", [{"heartbeat_timeout": -4}, {"start_timeout": 0}])
def test_timeouts_that_cannot_be(initialized, timeouts):
    with pytest.raises(NeoError, match="timeouts are whole seconds, at least 1"):
        join("localhost:1", 2, 0, **timeouts)
    assert initialized == []


def test_a_run_of_one_is_alone(initialized):
    assert not join("localhost:1", 1, 0)
    assert initialized == []


def test_a_cluster_that_cannot_be_asked(monkeypatch):
    def fail(**options):
        raise RuntimeError("Retry failed\nwith all attempts.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(NeoError) as error:
        join("mpi4py")
    assert str(error.value) == (
        "cannot join the other processes: Retry failed with all attempts; give --coordinator "
        "HOST:PORT --num-processes N --process-id I, or --coordinator none to run alone."
    )


def test_several_processes_need_a_mesh(monkeypatch):
    with (
        pytest.raises(UsageError, match="need a mesh"),
        ClusterOptions("localhost:1", 2, 0).joined(on_mesh=False),
    ):
        pass
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(UsageError, match="need a mesh"), ClusterOptions().joined(on_mesh=False):
        pass
    with ClusterOptions("none").joined(on_mesh=False):
        pass


def test_an_output_that_is_not_shared(start):
    """Each sees a folder of its own: the run would wait for itself at its first checkpoint."""
    script = (
        "import sys, tempfile; from pathlib import Path; from neo_jax.devices import processes\n"
        "from neo_jax.cli.cluster import ClusterOptions\n"
        "processes._TRIES = 1\n"
        "_, address, _, count, _, index, *_ = sys.argv[1:]\n"
        "with ClusterOptions(address, int(count), int(index)).joined(True):\n"
        "    with tempfile.TemporaryDirectory() as own:\n"
        "        processes.check_shared(Path(own))\n"
    )
    for process in start("-c", script):
        status, out, err = ended(process)
        assert (status, out, len(err)) == (1, "", 1)
        assert "the processes of this run do not see one folder" in err[0]
