"""cli: help, real processes, and command lines that cannot be understood."""

import errno
import os
import re
import shutil
import subprocess
import sys

import pytest

import neo_jax
from neo_jax.checkpoints.hub import PUBLISHED
from neo_jax.cli import VERBS

# What `neo-jax VERB --help` must name.
OPTIONS = {
    "bench": ["--model", "--batch", "--length", "--steps", "--quick", "--json", "--picture"],
    "convert": ["--revision", "--dtype", "--tokenizer", "--max-shard-gb", "--no-verify"],
    "quantize": ["the folder to write"],
    "generate": [
        "--model", "--prompts-file", "--output", "--json", "--max-new-tokens", "--num-samples",
        "--temperature", "--top-k", "--top-p", "--seed", "--mesh", "--rules", "--dtype",
    ],
    "score": ["--input", "--output", "--json", "--stride", "--model", "--mesh", "--dtype"],
    "eval": [
        "--text", "--wikitext", "--stride", "--tasks", "--include-path", "--num-fewshot", "--limit",
        "--suite", "--data", "--picture", "--glue", "--superglue", "--seeds", "--perturb",
        "--output", "--cache", "--json", "--model", "--mesh",
    ],
    "chat": ["--server", "--chat-template", "--system", "--filter", "--model", "--temperature"],
    "serve": ["--port", "--api-key", "--chat-template", "--max-sequences", "--filter", "--model"],
    "info": ["--model", "--revision", "--json"],
    "prepare": [
        "--output", "--tokenizer", "--train-tokenizer", "--tokenizer-kind", "--text-field",
        "--held-out", "--json", "--label-field", "--held-out-files", "--skip-bad",
    ],
    "classify": ["--input", "--output", "--json", "--model", "--mesh"],
    "train": ["CONFIG"],
    "recipe": ["CONFIG", "instructions, questions, summaries, translation"],
    "plan": ["--model", "--topology", "--step", "--mesh", "--rules", "--search", "--json"],
}  # fmt: skip


def environment():
    """That of this process, without a folder for compiled programs that its user has chosen."""
    chosen = {"JAX_COMPILATION_CACHE_DIR": None, "JAX_PLATFORMS": "cpu"}
    return {name: value for name, value in {**os.environ, **chosen}.items() if value is not None}


def process(*args, cwd, stdout=subprocess.PIPE):
    """Runs Python as a user would, outside the checkout."""
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env={**environment(), "XDG_CACHE_HOME": str(cwd)},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )


def test_help_names_the_verbs_and_imports_no_jax(tmp_path):
    script = (
        "import sys\n"
        "from neo_jax.cli import main\n"
        "assert main(['--help']) == main(['-h']) == main(['--version']) == 0\n"
        "print(sorted({'jax', 'flax', 'numpy', 'tyro'} & set(sys.modules)))"
    )
    done = process("-c", script, cwd=tmp_path)
    assert done.stderr == ""
    assert done.stdout.endswith(f"neo-jax {neo_jax.__version__}\n[]\n")
    for verb, what in VERBS.items():
        assert f"  {verb:<10} {what}\n" in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(run, verb):
    status, out, err = run(verb, "--help")
    assert (status, err) == (0, "")
    for option in OPTIONS[verb]:
        assert option in out, option


def test_no_arguments_print_the_usage(run):
    status, out, err = run()
    assert status == 2
    assert out.startswith("usage: neo-jax VERB")
    assert err == ""


def test_a_process_that_succeeds_and_keeps_its_programs(checkpoints, tmp_path):
    args = ["generate", "The fox", "--max-new-tokens", 9, "--model", checkpoints["bytes"]]
    done = process("-m", "neo_jax", *args, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("The fox")
    assert done.stderr == ""
    assert any((tmp_path / "neo_jax" / "xla").iterdir())


def test_a_process_that_fails_has_no_traceback(tmp_path):
    done = process("-m", "neo_jax", "generate", "hi", "--model", "nowhere", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("neo-jax: there is no folder and no published model 'nowhere'")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = process("-m", "neo_jax", "info", "gpt-neo-125m", cwd=tmp_path, stdout=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


GROUPS = {
    "model": "which model, and how to hold it",
    "sampling": "how tokens are chosen",
    "beams": "search of the likeliest text, instead of sampling",
    "cluster": "where a mesh spans several processes; each of them runs the same command",
    "lora": "Adapters of low rank, in the place of all weights.",
}


@pytest.mark.parametrize(
    ("verb", "groups"),
    [
        (["generate"], ["model", "sampling", "beams", "cluster"]),
        (["score"], ["model", "cluster"]),
        (["eval"], ["model", "cluster"]),
        (["bench"], ["model"]),
        (["train", "bundled"], ["lora", "cluster"]),
    ],
)
def test_help_says_what_each_group_of_options_is(succeed, verb, groups):
    words = " ".join(re.sub(r"[^\w;,. ]", " ", succeed(*verb, "--help")).split())  # without boxes
    for name in groups:
        assert f" {name} options {GROUPS[name]} " in words


@pytest.mark.parametrize(
    ("verb", "names"),
    [
        ("generate", ["[PROMPT]"]),
        ("prepare", ["FILE..."]),
        ("info", ["[MODEL]"]),
        ("quantize", ["SOURCE", "OUTPUT"]),
        ("convert", ["SOURCE", "OUTPUT"]),
    ],
)
def test_arguments_without_a_flag_have_names(succeed, verb, names):
    usage = succeed(verb, "--help").splitlines()[0]
    assert usage.startswith(f"usage: neo-jax {verb} [-h] ")
    assert usage.endswith(f" {' '.join(names)}")


@pytest.mark.parametrize("verb", ["generate", "score", "eval", "bench"])
def test_help_lists_the_published_models(succeed, verb):
    words = succeed(verb, "--help").replace("│", " ").replace(",", " ").replace(";", " ").split()
    assert set(PUBLISHED) <= set(words)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generat", "hi"], "'generat' is not a verb. Did you mean 'generate'?"),
        (["--modle"], "'--modle' is not a verb."),
        (
            ["generate", "hi", "--temprature", "1"],
            "Unrecognized options: --temprature, 1; did you mean --temperature?",
        ),
        (
            ["generate", "hi", "--bogus=3"],
            "Unrecognized options: --bogus=3; see neo-jax generate --help.",
        ),
        (
            ["generate", "hi", "--temperature", "warm"],
            "Error parsing --temperature: could not convert string to float: 'warm'; see neo-jax",
        ),
        (["generate", "hi", "--temperature="], "could not convert string to float: ''; see neo-"),
        (
            ["generate", "hi", "--max-new-tokens", "1.5"],
            "--max-new-tokens: invalid literal for int() with base 10: '1.5'; see neo-jax ",
        ),
        (
            ["generate", "hi", "--max-new-tokens"],
            "Missing value for argument '--max-new-tokens'. Expected 1 values; see neo-jax gen",
        ),
        (["generate", "hi", "--top-p", "0"], "--top-p must lie in (0, 1], not 0.0; 1 is off."),
        (
            ["generate", "hi", "--temperature", "-1"],
            "--temperature must lie between 0 and 1e+06, not be -1.0.",
        ),
        (["generate", "hi", "--seed", "-1"], "--seed must be a whole number from 0"),
        (
            ["generate", "hi", "--dtype", "float64"],
            "'float64' for argument '--dtype'. Expected one of ('auto', 'float32', 'bfloat16'",
        ),
        (
            ["generate", "hi", "there, you"],
            "put a text of several words in quotes, as in: neo-jax generate 'hi there, you'",
        ),
        (["generate"], "give either a prompt or --prompts-file"),
        (["generate", "-"], "give either a prompt or --prompts-file"),
        (["generate", "hi", "--prompts-file", "a.txt"], "give either a prompt or --prompts-file"),
        (
            ["generate", "hi", "--num-samples", "0"],
            "--num-samples must be at least 1, not 0.",
        ),
        (["generate", "hi", "--num-samples", 10**9], "1000000000 samples of a prompt, which are"),
        (["generate", "hi", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1, not 0"),
        (
            ["generate", "hi", "--num-beams", "4", "--temperature", "0.9"],
            "--temperature has no effect on beam search, which draws nothing; leave it out, or",
        ),
        (
            ["generate", "hi", "--length-penalty", "0.3"],
            "--length-penalty has no effect without be",
        ),
        (
            ["generate", "hi", "--batch-size", "0"],
            "--batch-size must be at least 1, not 0.",
        ),
        (["score"], "name a file, as in: neo-jax score --input texts.jsonl"),
        (["score", "--inptu", "a"], "Unrecognized options: --inptu, a; did you mean --input?"),
        (["eval", "--tasks", ","], "--tasks names no task; write it as in --tasks piqa,lambada"),
        (["eval", "--text", "a", "--picture", "a.png"], "goes with --suite model-card, --glue or"),
        (["score", "--input", "a.txt", "--stride", "-1"], "--stride must be 0"),
        (["info", "--jsn"], "Unrecognized options: --jsn; did you mean --json?"),
        (["info", "a", "b"], "Unrecognized options: b; put a text"),
        (["info", "a", "--model", "b"], "name one model: a, or --model b."),
        (
            ["bench", "--batch", "x"],
            "--batch: Could not find valid parse for arguments: ['x']; see neo-jax bench --help.",
        ),
        (["prepare", "--output", "x"], "name the files to prepare"),
        (["prepare", "a.txt", "--output", "x"], "give either --tokenizer, as in"),
        (["prepare", "a.tsv.gz"], "tables hold examples with labels: name their column by --label"),
        (
            ["prepare", "a.txt", "--output", "x", "--tokenizer", "t", "--train-tokenizer", "9"],
            "give either --tokenizer, as in",
        ),
        (["train"], "name a config first: one of bundled"),
        (["train", "--steps", "3"], "name a config first"),
        (["train", "bundled", "--optimizer.lerning-rate", "1"], "--optimizer.learning-rate"),
        (
            ["train", "bundled", "--optimizer.learning-rate", "fast"],
            "--optimizer.learning-rate: could not convert string to float: 'fast'; see neo-jax",
        ),
        (
            ["train", "bundled", "--model.activation", "softplus"],
            "for argument '--model.activation'. Expected one of ('gelu_new', 'gelu', 'relu'",
        ),
        (["train", "bundled", "--steps", "0"], "--steps must be at least 1, not 0"),
        (["train", "bundled", "--lora.rank", "-1"], "--lora.rank must be 0 (off) or more"),
        (["train", "bundled", "--length", "4096"], "length 4096 exceeds the model's context"),
        (["train", "bundled", "--model.num-heads", "7"], "--model.num-heads 7 x head_dim 64 is"),
    ],
)
def test_command_lines_that_cannot_be_understood(fail, args, message):
    text = fail(*args, status=2)
    assert message in text
    assert ".;" not in text


def test_words_of_an_error_are_not_broken(fail):
    """As tyro breaks lines, in long names too."""
    name = "/a/" + 40 * "long-name-with-dashes,"
    said = fail("train", "bundled", "--model.activation", "relu", "--length", 4096, "--data", name,
                status=2)  # fmt: skip
    assert said.startswith("length 4096 exceeds the model's context of 1024; shorten it, or raise")
    assert name in fail("eval", "--suite", name, status=2)


def test_a_terminal_without_some_characters_is_a_line(fail, monkeypatch, tmp_path):
    def show(_):
        (tmp_path / "stdout").open("w", encoding="ascii").write("é")

    monkeypatch.setattr("neo_jax.cli.quantize.main", show)
    said = fail("quantize", "a", "b")
    assert said.startswith("what is printed is ascii, without 'é'; set PYTHONIOENCODING=utf-8, or")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.ENAMETOOLONG])
def test_what_the_system_refuses_is_a_line(fail, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr("neo_jax.cli.quantize.main", refuse)
    said = fail("quantize", "a", "b")
    assert said == f"some/file: {os.strerror(number)}; check the path, the disk and the rights."
    monkeypatch.setattr("neo_jax.cli.quantize.main", lambda _: (_ for _ in ()).throw(OSError("x")))
    with pytest.raises(OSError, match="x"):  # a fault of the program, or of a library
        fail("quantize", "a", "b")


@pytest.mark.parametrize(
    "args", [["bench"], ["eval", "--text", "a.txt", "--perturb", "typos"], ["plan", "--model", "a"]]
)
def test_a_picture_is_checked_before_any_work(fail, args, tmp_path):
    said = fail(*args, "--picture", tmp_path / "a.gif")
    assert said == f"--picture draws a PNG file, not {tmp_path}/a.gif; name one that ends in .png."
    said = fail(*args, "--picture", tmp_path / "no" / "a.png")
    assert said == f"cannot write {tmp_path}/no/a.png: No such file or directory."
    assert not any(tmp_path.iterdir())


def test_a_tilde_is_the_home_folder(succeed, checkpoints, tmp_path, monkeypatch):
    """As in --output=~/x, which shells leave alone."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    model = shutil.copytree(checkpoints["bytes"], tmp_path / "home" / "model")
    (tmp_path / "home" / "in.txt").write_text("The fox\nA dog\n")
    short = ["--model=~/model", "--max-new-tokens", 2]
    succeed("generate", "--prompts-file=~/in.txt", "--output=~/samples.jsonl", *short)
    succeed("score", "--input=~/in.txt", "--output=~/scores.jsonl", "--model=~/model")
    succeed("prepare", "~/*.txt", "--tokenizer=~/model", "--output=~/data")
    assert str(model) in succeed("info", "~/model")
    found = {path.name for path in (tmp_path / "home").iterdir()} - {".cache"}
    assert found == {"model", "in.txt", "samples.jsonl", "scores.jsonl", "data"}
    assert not any((tmp_path / "work").iterdir())


@pytest.mark.parametrize("cache", ["cache", "file/cache"], ids=["cache", "no cache"])
def test_inference_writes_nothing_but_the_compilation_cache(checkpoints, tmp_path, cache):
    model = shutil.copytree(checkpoints["pieces"], tmp_path / "model")
    folders = [tmp_path / name for name in ("home", "work", "temporary")]
    for folder in folders:
        folder.mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    home, work, temporary = folders
    done = subprocess.run(
        [sys.executable, "-m", "neo_jax", "generate", "the fox", "--model", model,
         "--max-new-tokens", "3"],
        cwd=work,
        env={
            **environment(), "HOME": str(home), "TMPDIR": str(temporary),
            "XDG_CACHE_HOME": str(tmp_path / cache),
        },
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("the fox")
    written = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path not in before]
    assert {path.parts[0] for path in written} == ({"cache"} if cache == "cache" else set())
