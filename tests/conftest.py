"""Eight CPU devices stand in for a mesh; shapes are checked wherever a signature names them."""

import contextlib
import functools
import gc
import itertools
import os
from pathlib import Path

import hypothesis
import jax
import jaxtyping
import numpy as np
import pytest
import tokenizers
from fake_gcs import serve

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Else a TPU's kernels name the folder that JAX is in, and what was compiled is not found again.
_LINES = "jax_traceback_in_locations_limit"
_USUAL_LINES = 10  # JAX's default
jax.config.update(_LINES, 0)
os.environ[_LINES.upper()] = "0"  # of processes that tests start

# How long an example takes is a matter of what else the machine does, and of what is compiled.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.load_profile("default")

# Must precede the first import of the modules that it checks.
_MODULES = [
    "neo_jax.sharding.fsdp", "neo_jax.ops.attention", "neo_jax.ops.cache_write",
    "neo_jax.ops.matmul", "neo_jax.model.cache", "neo_jax.model.layers",
    "neo_jax.model.scan", "neo_jax.model.transformer", "neo_jax.decode.beam",
    "neo_jax.decode.engine", "neo_jax.decode.scheduler", "neo_jax.decode.speculative",
    "neo_jax.text.score", "neo_jax.text.classify", "neo_jax.model.heads",
    "neo_jax.training.objectives.next_token", "neo_jax.training.objectives.classification",
    "neo_jax.training.objectives.streamed", "neo_jax.training.objectives.tokens",
]  # fmt: skip
jaxtyping.install_import_hook(_MODULES, "beartype.beartype")

from neo_jax.checkpoints.save import save_pretrained  # noqa: E402
from neo_jax.config import ModelConfig  # noqa: E402
from neo_jax.data.tokenizer_training import train_sentencepiece  # noqa: E402
from neo_jax.devices import torus  # noqa: E402
from neo_jax.model.transformer import Neo, init_params  # noqa: E402
from neo_jax.text.tokenizer import END_OF_TEXT, load_tokenizer  # noqa: E402
from neo_jax.tools.plan import compilation  # noqa: E402

# The files that take longest, so that all processes end together. The first traces with
# jax.profiler, which crashes in a process that has loaded a TPU's compiler.
_FIRST = [
    "training/test_loop.py", "sharding/test_strategies.py", "devices/test_processes.py",
    "test_notebooks.py", "model/test_scan.py", "training/test_checkpoint.py",
    "training/test_interrupt.py", "ops/attention/test_splash.py", "tools/plan/test_steps.py",
    "decode/test_compiled.py", "training/test_step.py", "model/test_parity.py", "test_bundled.py",
    "evaluation/test_harness.py",
]  # fmt: skip


def pytest_collection_modifyitems(items):
    """Begins with the files that take longest; of the others, like ones share compiled programs."""
    rank = {str(Path(__file__).parent / name): i for i, name in enumerate(_FIRST)}

    def place(item):
        return rank.get(str(item.path), len(rank)), _is_quick(item.getparent(pytest.Module))

    items.sort(key=place)


def _is_quick(module):
    """Whether a module's programs are compiled quickly."""
    marks = {mark.name for mark in module.iter_markers()}
    return marks.isdisjoint({"optimized", "tpu_compiler"})


def pytest_collection_finish():
    """Keeps what was imported out of collections of garbage: each would look through it all."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def _compiled_quickly(request):
    """Halves the time of compiling where numbers are compared with nothing outside.

    Modules marked `optimized` or `tpu_compiler` compile as users do.
    """
    quickly = _is_quick(request.node)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(quickly))  # of processes that it starts
    if quickly != jax.config.read("jax_disable_most_optimizations"):
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", quickly)


@contextlib.contextmanager
def _plans_depend_on(sources):
    """Has plans take what was compiled for TPUs for the same while these files are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation, "_SOURCES", sources)
        compilation._sources.cache_clear()
        yield
    compilation._sources.cache_clear()


@pytest.fixture(autouse=True, scope="session")
def _plans_known_by_their_programs():
    """Finds what was compiled for TPUs again where the program is the same, if not its lines.

    A program does not say in which order its mesh takes devices, nor its compiler's options.
    """
    with _plans_depend_on(("devices/torus.py", "sharding/rules.py", "ops/tuning.py")):
        yield


@pytest.fixture(scope="module")
def lines_of_this_checkout():
    """Keeps programs of the same operations but of other lines and names, as caches hold, out."""
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    jax.config.update(_LINES, _USUAL_LINES)
    with _plans_depend_on(_ALL_SOURCES):
        yield
    jax.config.update(_LINES, 0)
    jax.config.update("jax_compilation_cache_include_metadata_in_key", False)


_ALL_SOURCES = compilation._SOURCES


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """What `-n auto` means: a process may take some 5 GB, and compiling keeps two cores busy."""
    return max(2, (os.cpu_count() or 1) // 2)


@pytest.fixture(autouse=True)
def _no_user_cache(monkeypatch, tmp_path_factory):
    """Keeps compiled programs of tests out of the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True, scope="module")
def _few_programs():
    """Forgets compiled programs before they are too many: each takes a dozen memory maps."""
    yield
    maps = Path("/proc/self/maps")  # of which Linux allows a process 65,530; beyond, LLVM aborts
    if maps.exists() and len(maps.read_text().splitlines()) > 20_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_config():
    """Four layers, a window of 8: small enough to compile in a second."""
    return ModelConfig(
        num_layers=4,
        embed_dim=32,
        num_heads=2,
        vocab_size=96,
        max_length=64,
        window_size=8,
        eos_token_id=0,
    )


@pytest.fixture(scope="session")
def tiny(tiny_config):
    """A model of `tiny_config` and its parameters."""
    model = Neo(tiny_config)
    return model, jax.jit(lambda key: init_params(model, key))(jax.random.key(0))


@pytest.fixture(params=["one axis", "along a torus"])
def cut(request, monkeypatch):
    """Meshes as a CPU's devices give them, and as if an axis of 4 spanned two of a torus."""
    torus.along_torus.cache_clear()
    if request.param == "along a torus":
        monkeypatch.setattr(torus, "_torus_sizes", lambda n: (2, 2) if len(n) == 4 else (len(n),))
    yield
    torus.along_torus.cache_clear()


@pytest.fixture
def rng():
    """A numpy generator of a fixed seed."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def compilations():
    """A context in which a list grows by each program that XLA compiles."""

    @contextlib.contextmanager
    def count():
        counted = []

        def listen(event, duration, **_):
            if event == "/jax/core/compile/backend_compile_duration":
                counted.append(duration)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield counted
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    return count


@pytest.fixture
def few_tasks(monkeypatch):
    """Of the harness's own 14,000 task files, which take seconds to list, those of PIQA."""
    from lm_eval.tasks import manager

    file = str(Path(manager.__file__).parent / "piqa" / "manager.py")
    monkeypatch.setattr(manager, "__file__", file)
    return file


TEXT = """The quick brown fox jumps over the lazy dog, and the dog does not mind it at all.
Call me Ishmael: some years ago, never mind how long, I thought I would sail about a little.
A naïve café in 日本 sells 12 cups for $3.45; the fox and the dog go there, and so do I.
"""


@pytest.fixture(scope="session")
def text():
    """Three lines that the tokenizers of `checkpoints` have learned from."""
    return TEXT


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory):
    """Folders with a tokenizer of 320 pieces each: SentencePiece, and byte-level BPE."""
    root = tmp_path_factory.mktemp("tokenizers")
    (root / "bytes").mkdir()
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT], trainer)
    bpe.save(str(root / "bytes" / "tokenizer.json"))
    train_sentencepiece([TEXT * 4], 320, root / "pieces")
    return {name: root / name for name in ("pieces", "bytes")}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, tokenizer_folders):
    """Folders of a tiny model: "pieces" and "bytes", named for their tokenizer, "bare" without.

    The weights are wider than at the start of training, so that what the model says of a token
    depends on all that it sees. Seven ids have no text: a vocabulary may be padded.
    """
    root = tmp_path_factory.mktemp("checkpoints")
    for name in ("pieces", "bytes", "bare"):
        tokenizer = load_tokenizer(tokenizer_folders[name]) if name != "bare" else None
        config = ModelConfig(
            num_layers=2,
            embed_dim=32,
            num_heads=2,
            vocab_size=327,
            max_length=64,
            window_size=8,
            eos_token_id=tokenizer.eos_id if tokenizer else -1,
        )
        params = jax.jit(functools.partial(init_params, Neo(config)))(jax.random.key(0))
        params = jax.tree.map(lambda leaf: 4 * leaf if leaf.ndim > 1 else leaf, params)
        save_pretrained(root / name, config, params, tokenizer=tokenizer)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="session")
def cloud():
    """Google Cloud Storage on this machine: its objects, by "bucket/name"."""
    with serve() as (address, objects), pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", address)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")  # else tensorstore looks for one
        # Else gcsfs asks the kind of a bucket by gRPC, which the stand-in does not speak.
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        yield objects


_BUCKETS = itertools.count()


@pytest.fixture
def bucket(cloud):
    """The name of an empty bucket."""
    return f"bucket-{next(_BUCKETS)}"
