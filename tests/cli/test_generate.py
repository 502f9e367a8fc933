"""neo-jax generate."""

import hashlib
import io
import json
import shutil
import sys

import jax
import pytest
from safetensors.numpy import load_file, save_file

import neo_jax
from neo_jax.checkpoints.peft import save_adapter
from neo_jax.cli.generate import Options, _what_decides
from neo_jax.cli.options import TextModelOptions
from neo_jax.cli.sample_file import Kept, kept_samples
from neo_jax.decode.options import SamplingOptions
from neo_jax.model.scan import stack, unstack
from neo_jax.transforms.lora import LoraConfig, add_adapters, init_adapters

FIELDS = ["prompt", "text", "ids", "logprobs", "finish_reason"]
OPTIONS = ["--max-new-tokens", 12, "--temperature", 0]
GREEDY = SamplingOptions(temperature=0.0)


@pytest.fixture(scope="module")
def lm(checkpoints):
    return neo_jax.load(checkpoints["bytes"])


@pytest.fixture
def model(checkpoints):
    return ["--model", checkpoints["bytes"]]


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_a_prompt_is_continued(succeed, model, lm):
    out = succeed("generate", "The fox", *model, *OPTIONS)
    assert out == f"The fox{lm.generate('The fox', 12, temperature=0)}\n"
    sampled = succeed("generate", "The fox", *model, "--max-new-tokens", 12, "--seed", 3)
    assert sampled == f"The fox{lm.generate('The fox', 12, seed=3)}\n"
    assert sampled != out


def test_defaults_of_the_model_are_followed_and_reported(run, checkpoints, lm, tmp_path):
    """Where the command says nothing; an option that says what ours says counts too."""
    folder = shutil.copytree(checkpoints["bytes"], tmp_path / "model")
    args = ["generate", "The fox", "--model", folder, "--seed", 3]
    fields = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": 0, "guidance_scale": 3}
    (folder / "generation_config.json").write_text(json.dumps(fields))
    said = (
        "generation_config.json: max_new_tokens 12, temperature 0.0; not followed: guidance_scale"
    )
    assert run(*args) == (0, f"The fox{lm.generate('The fox', 12, temperature=0)}\n", f"{said}\n")
    drawn = f"The fox{lm.generate('The fox', 12, seed=3)}\n"
    said = "generation_config.json: max_new_tokens 12; not followed: guidance_scale\n"
    assert run(*args, "--temperature", 0.7) == (0, drawn, said)
    assert run(*args, "--no-defaults", "--max-new-tokens=12") == (0, drawn, "")


def test_banned_words_are_said_one_by_one(succeed, model, lm):
    first = lm.sample(["The fox"], 12, sampling=GREEDY)[0].ids
    options = {"suppress_tokens": first[:2], "bad_words_ids": [first[3:5], first[5:6]]}
    args = ["--suppress-tokens", first[0], "--suppress-tokens", first[1]]
    args += ["--bad-words-ids", *first[3:5], "--bad-words-ids", first[5]]
    out = succeed("generate", "The fox", *model, *OPTIONS, *args)
    assert out == f"The fox{lm.generate('The fox', 12, temperature=0, **options)}\n"


def test_a_terminal_gets_a_stream(succeed, model, lm, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    out = succeed("generate", "The fox", *model, *OPTIONS)
    assert out == f"The fox{lm.generate('The fox', 12, temperature=0)}\n"


@pytest.mark.parametrize("stream", [True, False])
def test_a_terminal_is_told_why_it_waits(run, model, monkeypatch, stream):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: stream)
    args = ["generate", "The fox", *model, *OPTIONS]
    assert run(*args)[2] == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    status, out, err = run(*args)
    assert (status, err) == (0, "\0337 (compiling…)\0338\033[J")
    assert out.startswith("The fox")


@pytest.mark.parametrize("args", [[], ["-"]])
def test_a_prompt_may_be_piped_in(succeed, model, monkeypatch, args):
    monkeypatch.setattr(sys, "stdin", io.StringIO("The fox\nCall me\n"))
    out = succeed("generate", *args, *model, *OPTIONS)
    assert out == succeed("generate", "The fox\nCall me", *model, *OPTIONS)


def test_no_text_is_continued_by_one_that_begins(succeed, model, lm):
    out = succeed("generate", "", *model, *OPTIONS)
    assert out == f"{lm.generate('', 12, temperature=0)}\n"


def test_a_terminal_gets_no_prompt_that_cannot_be_continued(fail, model, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "exceed the context of 64" in fail("generate", "The fox " * 40, *model)


def test_json_tells_all_of_a_sample(succeed, model, lm):
    fields = lines(succeed("generate", "The fox", *model, *OPTIONS, "--json"))
    sample = lm.sample(["The fox"], 12, sampling=GREEDY)[0]
    assert list(fields[0]) == FIELDS
    assert fields == [{**sample.fields(), "logprobs": pytest.approx(sample.logprobs, abs=1e-5)}]


def test_several_samples_follow_each_other(succeed, model, lm):
    args = ["--num-samples", 3, "--max-new-tokens", 12, "--seed", 7, "--json"]
    found = lines(succeed("generate", "The fox", *model, *args))
    samples = lm.sample(["The fox"], 12, 3, SamplingOptions(seed=7))
    assert [line["ids"] for line in found] == [sample.ids for sample in samples]
    assert len({line["text"] for line in found}) == 3


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_prompts_of_a_jsonl_file_and_an_output_file(run, model, lm, tmp_path, batch_size):
    prompts = [lm.encode("Call me"), "The quick", "naïve 日"]
    path, output = tmp_path / "prompts.jsonl", tmp_path / "samples.jsonl"
    path.write_text(
        json.dumps({"ids": prompts[0]})
        + "\n\n"
        + "\n".join(json.dumps({"prompt": prompt, "other": 1}) for prompt in prompts[1:])
    )
    status, out, err = run(
        "generate", "--prompts-file", path, "--output", output, *model, *OPTIONS,
        "--batch-size", batch_size,
    )  # fmt: skip
    assert (status, out) == (0, "")
    assert err.splitlines()[-1].startswith("3/3 prompts, ")
    found = lines(output.read_text(encoding="utf-8"))
    assert [list(line) for line in found] == [FIELDS] * 3
    expected = lm.sample(prompts, 12, sampling=GREEDY)
    for line, sample in zip(found, expected, strict=True):
        assert (line["prompt"], line["text"], line["ids"]) == (
            sample.prompt,
            sample.text,
            sample.ids,
        )
        assert line["logprobs"] == pytest.approx(sample.logprobs, abs=1e-5)


def partial_file(output):
    (path,) = output.parent.glob(output.name + ".partial-*")
    return path


@pytest.fixture
def many(tmp_path, model):
    """A command line of five prompts, two samples each, and its output."""
    path, output = tmp_path / "prompts.txt", tmp_path / "samples.jsonl"
    path.write_text("The fox\nCall me\nthe dog\nnever\nI thought\n")
    args = ["generate", "--prompts-file", path, "--output", output, *model, "--num-samples", 2]
    return [*args, "--max-new-tokens", 12, "--batch-size", 3], output


def interrupt_after(prompts):
    """Keeps samples of so many prompts, and is interrupted."""
    left, add = iter(range(prompts)), Kept.add

    def interrupted(*args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        add(*args)

    return interrupted


@pytest.mark.parametrize("torn", [b"", b'[4, {"prompt": "the'])
def test_an_interrupted_run_goes_on_where_it_was(run, many, monkeypatch, torn):
    args, output = many
    assert run(*args)[0] == 0
    whole = output.read_bytes()
    assert whole.count(b"\n") == 10
    output.write_text("from another day")

    monkeypatch.setattr(Kept, "add", interrupt_after(2))
    status, _, err = run(*args)
    assert status == 130
    partial = partial_file(output)
    last = err.splitlines()[-1]
    assert last == (
        f"neo-jax: interrupted; 2 prompts are kept in {partial}; the same command goes on there"
    )
    assert output.read_text() == "from another day"
    kept = [json.loads(line) for line in partial.read_bytes().splitlines()]
    for prompt, *samples in kept:
        assert samples == lines(whole.decode())[2 * prompt : 2 * prompt + 2]
    with partial.open("ab") as file:
        file.write(torn)
    monkeypatch.undo()

    asked = []
    samples = neo_jax.LanguageModel.samples

    def noting(lm, prompts, *args, **options):
        asked.append(prompts)
        return samples(lm, prompts, *args, **options)

    monkeypatch.setattr(neo_jax.LanguageModel, "samples", noting)
    # Another run leaves it alone.
    assert run(*args, "--seed", 1)[0] == 0
    assert output.read_bytes() != whole
    assert run(*args)[0] == 0
    assert [len(prompts) for prompts in asked] == [5, 3]
    found, expected = lines(output.read_text()), lines(whole.decode())
    for line in expected:
        line["logprobs"] = pytest.approx(line["logprobs"], abs=1e-5)
    assert found == expected
    assert sorted(path.name for path in output.parent.iterdir()) == ["prompts.txt", output.name]


def test_another_model_behind_the_same_names_starts_over(checkpoints, tmp_path):
    """Neither the base of an adapter nor a draft lies in the folder that --model names."""
    base = tmp_path / "base"
    shutil.copytree(checkpoints["bytes"], base)
    lora, lm = LoraConfig(rank=2, targets=("c_fc",)), neo_jax.load(base)
    adapters = init_adapters(lm.config, lora, jax.random.key(0))
    params = unstack(add_adapters(stack(lm.params, lm.config), adapters, lora.scale), lm.config)
    save_adapter(tmp_path / "adapter", lm.config, lora, params, base=str(base))
    options = Options(prompt="The fox", model=TextModelOptions(model=str(tmp_path / "adapter")))
    weights = load_file(base / "model.safetensors")
    adapted, drafted = [], []
    for change in (0.0, 0.0, 1e-4):  # the second time nothing but the time of the file
        weights["transformer.wpe.weight"][3, 4] += change
        save_file(weights, base / "model.safetensors", {"format": "pt"})
        other = options.model.load()
        adapted.append(json.dumps(_what_decides(other, None, ["The fox"], options)))
        drafted.append(json.dumps(_what_decides(lm, other, ["The fox"], options)))
    for same, again, changed in (adapted, drafted):
        assert same == again != changed


def test_nothing_kept_is_not_spoken_of(run, many, monkeypatch):
    args, output = many

    monkeypatch.setattr(Kept, "add", interrupt_after(0))
    status, _, err = run(*args)
    assert (status, err.splitlines()[-1]) == (130, "neo-jax: interrupted")
    assert [path.name for path in output.parent.iterdir()] == ["prompts.txt"]


def test_other_processes_leave_the_file_to_the_first(monkeypatch, tmp_path):
    monkeypatch.setattr("neo_jax.cli.sample_file.is_leader", lambda: False)
    name = hashlib.sha256(json.dumps("run").encode()).hexdigest()[:8]
    partial = tmp_path / f"samples.jsonl.partial-{name}"

    def interrupted():
        with kept_samples(str(tmp_path / "samples.jsonl"), "run", 2) as kept:
            kept.add(0, [{}])
            partial.write_text('[0, {}]\n[1, {"being": "writ')
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as raised:
        interrupted()
    assert not raised.value.args
    assert partial.read_text() == '[0, {}]\n[1, {"being": "writ'


def test_a_damaged_file_of_kept_samples_is_named(run, fail, many, monkeypatch):
    args, output = many
    monkeypatch.setattr(Kept, "add", interrupt_after(1))
    assert run(*args)[0] == 130
    partial = partial_file(output)
    partial.write_text('[9, {"prompt": "none"}]\n')
    assert fail(*args) == f"cannot go on with {partial}: there is no prompt 9; remove it."


def test_a_prompt_of_a_file_that_does_not_fit_is_named(fail, many, tmp_path):
    args, _ = many
    (tmp_path / "prompts.txt").write_text("The fox\n" + "the dog " * 60 + "\n")
    message = fail(*args)
    assert message.startswith(f"{tmp_path / 'prompts.txt'}, prompt 2: ")
    assert "exceed the context of 64" in message


def test_the_file_of_prompts_is_not_written_over(fail, many, tmp_path):
    args, output = many
    args = [tmp_path / "prompts.txt" if arg == output else arg for arg in args]
    assert fail(*args).endswith("is the file that is read; name another.")
    assert (tmp_path / "prompts.txt").read_text().startswith("The fox\n")


def test_stops_and_penalties(succeed, model, lm):
    options = {"temperature": 1.0, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 4}
    options |= {"no_repeat_ngram_size": 2, "min_new_tokens": 12}
    args = [str(a) for k, v in options.items() for a in ("--" + k.replace("_", "-"), v)]
    args = ["generate", "The fox", *model, *args, "--max-new-tokens", 12]
    plain = lm.generate("The fox", 12, **options)
    assert succeed(*args) == f"The fox{plain}\n"
    stops = [plain[8:10], "never there"]
    expected = lm.generate("The fox", 12, stop=stops, **options)
    assert plain.startswith(expected) and len(expected) < len(plain)  # noqa: PT018
    assert succeed(*args, "--stop", stops[0], "--stop", stops[1]) == f"The fox{expected}\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_prompt_beyond_the_context_is_cut_if_asked(run, model, lm, monkeypatch, terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    prompt = "The fox and the dog, " * 8
    status, out, err = run("generate", prompt, *model, *OPTIONS, "--on-overflow", "truncate")
    assert status == 0
    assert err == "1 of 1 prompts cut to their newest 52 tokens\n"
    newest = lm.encode(prompt)[-52:]
    assert out == f"{prompt}{lm.generate([newest], 12, temperature=0)[0]}\n"


def test_prompts_of_a_text_file(succeed, model, lm, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"The fox\r\n\n  two\n")
    out = succeed("generate", "--prompts-file", path, *model, *OPTIONS, "--json")
    prompts = ["The fox", "  two"]
    assert [line["prompt"] for line in lines(out)] == prompts
    texts = lm.generate(prompts, 12, temperature=0)
    assert [line["text"] for line in lines(out)] == texts


def test_ids_without_a_tokenizer(succeed, fail, checkpoints, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"ids": [1, 2, 3]}\n')
    bare = ["--model", checkpoints["bare"]]
    fields = lines(succeed("generate", "--prompts-file", path, *bare, *OPTIONS, "--json"))[0]
    assert fields["text"] is None
    assert len(fields["ids"]) == 12
    plain = succeed("generate", "--prompts-file", path, *bare, *OPTIONS)
    assert plain == f"[1, 2, 3]{fields['ids']}\n"
    assert "holds no tokenizer; give prompts as token ids" in fail("generate", "hi", *bare)


def test_a_mesh_and_a_dtype(succeed, model, lm):
    out = succeed("generate", "The fox", *model, *OPTIONS, "--mesh", "fsdp=4,model=2")
    assert out == f"The fox{lm.generate('The fox', 12, temperature=0)}\n"
    half = succeed("generate", "The fox", *model, *OPTIONS, "--dtype", "bfloat16", "--json")
    assert len(lines(half)[0]["ids"]) > 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty; give a line for each text"),
        ("a.jsonl", b"\n \n", "is empty; give a line for each text"),
        ("a.txt", b"one\ncaf\xe9\n", "a.txt is not UTF-8: byte 7 is 0xe9"),
        ("a.jsonl", b'{"prompt": "caf\xe9"}', "a.jsonl is not UTF-8: byte 15"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": ', "a.jsonl:2: not valid JSON"),
        ("a.jsonl", b'["a"]', "a.jsonl:1: a list, not a JSON object"),
        ("a.jsonl", b'{"text": "a"}', 'a.jsonl:1: expected {"prompt": "text"} or {"ids": [1,'),
        ("a.jsonl", b'{"ids": [1, 2.5]}', 'a.jsonl:1: expected {"prompt": "text"}'),
        ("a.jsonl", b'{"ids": [true]}', 'a.jsonl:1: expected {"prompt": "text"}'),
        ("a.jsonl", b'{"ids": []}', "the prompt is empty; give at least one token"),
        ("a.jsonl", b'{"ids": [327]}', "token id 327 is not in the vocabulary, 0 to 326"),
        ("a.jsonl", b'{"ids": [-1]}', "token id -1 is not in the vocabulary"),
        ("a.jsonl", b'{"prompt": "\\ud800"}', "the lone surrogate '\\ud800'"),
        ("a.jsonl.gz", b"plain", "damaged"),
    ],
)
def test_prompts_that_cannot_be_read(fail, model, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in fail("generate", "--prompts-file", tmp_path / name, *model, *OPTIONS)


def test_a_bad_prompt_behind_good_ones_stops_all(fail, model, tmp_path):
    path, output = tmp_path / "prompts.jsonl", tmp_path / "samples.jsonl"
    path.write_text('{"ids": [1]}\n' * 9 + '{"ids": [999]}\n')
    args = ["generate", "--prompts-file", path, *model, *OPTIONS]
    assert "token id 999 is not in the vocabulary" in fail(*args)
    assert "token id 999 is not in the vocabulary" in fail(*args, "--output", output)
    assert not output.exists()
    output.write_text("from another day")
    fail(*args, "--output", output)
    assert output.read_text() == "from another day"


@pytest.mark.parametrize("verb", [("generate", "hi"), ("score", "--input", "prompts.txt")])
def test_an_output_is_tried_before_the_model_is_loaded(fail, tmp_path, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("hi")
    args = ("--output", "nowhere/x.jsonl", "--model", "nothing")
    assert "cannot write nowhere/x.jsonl: No such file or directory" in fail(*verb, *args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "hi", "--max-new-tokens", 64], "exceed the context of 64; shorten the"),
        (["generate", "hi " * 50], "tokens exceed the context of 64; shorten the text"),
        (["generate", "caf\udce9"], "the lone surrogate '\\udce9'"),
        (["generate", "--prompts-file", "nowhere.txt"], "cannot read nowhere.txt: No such file"),
        (["generate", "--prompts-file", "."], "cannot read .: Is a directory"),
        (["generate", "hi", "--max-new-tokens", 3, "--output", "."], "cannot write .: Is a dir"),
        (
            ["generate", "hi", "--max-new-tokens", 3, "--output", "/nowhere/x.jsonl"],
            "cannot write /nowhere/x.jsonl: No such file or directory",
        ),
        (["generate", "hi", "--mesh", "fsdp=9"], "mesh 'fsdp=9' asks for 9 devices, but 8 are"),
        (["generate", "hi", "--mesh", "fsdp"], "mesh axis 'fsdp' needs a size, as in 'fsdp=2'"),
        (["generate", "hi", "--mesh", "fspd=8"], "unknown mesh axis 'fspd' in 'fspd=8'. Did you"),
        (["generate", "hi", "--rules", "embed:fsdp"], "--rules needs a mesh"),
        (["generate", "hi", "--mesh", "fsdp=8", "--rules", "embd:fsdp"], "Did you mean 'embed'?"),
        (
            ["generate", "hi", "--mesh", "model=8", "--rules", "heads:model"],
            "axis 'heads' of size 2 does not divide over 8 devices",
        ),
    ],
)
def test_requests_that_cannot_be_met(fail, model, args, message):
    assert message in fail(*args, *model)
