"""data/{packing,mixture,feed}.py: sequences and batches."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neo_jax.data.feed import batches, evaluation_batches
from neo_jax.data.mixture import Mixture, parse_data
from neo_jax.data.packing import PairDataset, TokenDataset
from neo_jax.errors import NeoError


def memory_dataset(num_tokens, length):
    """Returns a data set whose token i is i."""
    return TokenDataset(
        tokens=np.arange(num_tokens, dtype=np.uint16),
        length=length,
        num_bytes=num_tokens,
        num_documents=1,
        vocab_size=2**16,
        eos_id=0,
        tokenizer_folder=Path(),
    )


datasets = st.integers(1, 9).flatmap(
    lambda length: st.builds(memory_dataset, st.integers(length + 1, 200), st.just(length))
)


@pytest.fixture
def folder(tmp_path):
    """Returns a data set on disk: 1000 tokens in train, 7 in held_out."""
    splits = {}
    for split, size in (("train", 1000), ("held_out", 7)):
        (tmp_path / split).mkdir()
        np.arange(size, dtype="<u2").tofile(tmp_path / split / "tokens.bin")
        splits[split] = {"documents": 2, "bytes": 3 * size, "tokens": size, "tokens_per_byte": 0.3}
    fields = {"version": 1, "dtype": "uint16", "vocab_size": 1000, "eos_id": 1, "splits": splits}
    (tmp_path / "dataset.json").write_text(json.dumps(fields))
    return tmp_path


def test_a_split_is_opened(folder):
    dataset = TokenDataset.open(folder, length=10)
    assert isinstance(dataset.tokens, np.memmap)
    assert (dataset.num_tokens, dataset.num_bytes, dataset.num_documents) == (1000, 3000, 2)
    assert (dataset.vocab_size, dataset.tokenizer_folder) == (1000, folder)
    assert len(dataset) == 99
    sequence = dataset[2]["tokens"]
    assert sequence.dtype == np.int32
    np.testing.assert_array_equal(sequence, np.arange(20, 31))
    np.testing.assert_array_equal(dataset[-1]["tokens"], np.arange(980, 991))
    with pytest.raises(IndexError):
        dataset[99]
    assert len(TokenDataset.open(folder, "held_out", length=6)) == 1


@given(datasets)
def test_every_token_is_a_target_once(dataset):
    targets = np.concatenate([dataset[i]["tokens"][1:] for i in range(len(dataset))])
    np.testing.assert_array_equal(targets, np.arange(1, len(targets) + 1))
    assert 0 <= dataset.num_tokens - 1 - len(targets) < dataset.length


def edit(folder, **fields):
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_what_is_held_out_need_not_fill_a_sequence(folder):
    dataset = TokenDataset.open(folder, "held_out", length=10)
    assert (len(dataset), dataset.num_sequences) == (0, 1)
    sequence = dataset.sequence(0)
    assert sequence["tokens"][:7].tolist() == dataset.tokens.tolist()
    assert sequence["weights"].tolist() == [1] * 6 + [0] * 4


def test_errors_of_opening(folder, tmp_path_factory):
    def refused(source=folder, split="train", length=10):
        with pytest.raises(NeoError) as error:
            TokenDataset.open(source, split, length)
        assert "\n" not in str(error.value)
        return str(error.value)

    nowhere = tmp_path_factory.mktemp("empty") / "nowhere"
    for source in (nowhere, nowhere.parent):  # a folder without anything in it
        assert f"neo-jax prepare FILE... --output {source}" in refused(source)
    assert "no split 'heldout'. Did you mean 'held_out'?" in refused(split="heldout")
    assert "Known are: held_out, train." in refused(split="x")
    assert "has 1000 tokens, too few for a sequence of 1000; choose a length below 1000" in refused(
        length=1000
    )
    assert "at least 1, not 0" in refused(length=0)
    with (folder / "train" / "tokens.bin").open("ab") as file:
        file.truncate(1500)
    assert "has 1500 bytes where 1000 tokens take 2000" in refused()
    shutil.rmtree(folder / "train")
    assert "cannot read" in refused()
    edit(folder, dtype="float32")
    assert "dtype 'float32' is not uint16" in refused(split="held_out", length=2)
    edit(folder, splits={"train": {"documents": 2, "bytes": 3}})
    assert "'tokens' is None; is the file whole?" in refused()
    edit(folder, splits=["train"])
    assert "'splits' is ['train']" in refused()
    edit(folder, version=2)
    assert "has version 2, not 1; run neo-jax prepare again" in refused()
    (folder / "dataset.json").write_text("{")
    assert "is not valid JSON" in refused()


@pytest.mark.parametrize("size", [0, 1])
def test_a_split_of_which_no_length_can_be_made(folder, size):
    (folder / "train" / "tokens.bin").write_bytes(bytes(2 * size))
    edit(folder, splits={"train": {"documents": size, "bytes": size, "tokens": size}})
    with pytest.raises(NeoError) as error:
        TokenDataset.open(folder, length=1)
    assert str(error.value).endswith("tokens, too few for a sequence of 1; prepare more text.")


def take(dataset, count, **arguments):
    stream = batches(dataset, **arguments)
    taken = list(itertools.islice(stream, count))
    stream.close()
    return taken


few = settings(max_examples=25)


@few
@given(datasets, st.integers(1, 7), st.integers(0, 2**32 - 1), st.integers(0, 9))
def test_a_run_resumes_at_any_step(dataset, batch_size, seed, step):
    whole = take(dataset, step + 3, batch_size=batch_size, seed=seed)
    resumed = take(dataset, 3, batch_size=batch_size, seed=seed, start_step=step)
    for batch, again in zip(whole[step:], resumed, strict=True):
        assert batch["tokens"].shape == (batch_size, dataset.length + 1)
        assert batch["tokens"].dtype == np.int32
        np.testing.assert_array_equal(batch["tokens"], again["tokens"])
        np.testing.assert_array_equal(batch["weights"], np.ones([batch_size, dataset.length]))
        assert batch["weights"].dtype == np.float32


@st.composite
def shares(draw):
    """A batch size, and which rows each of some processes reads: every row at least once."""
    batch_size = draw(st.integers(1, 8))
    owners = st.lists(st.integers(0, 3), min_size=batch_size, max_size=batch_size)
    owned = draw(owners)
    both = draw(st.lists(st.integers(0, batch_size - 1), max_size=2))  # where a mesh replicates
    rows = [
        sorted({row for row, owner in enumerate(owned) if owner == process} | set(both))
        for process in range(4)
    ]
    return batch_size, [share for share in rows if share]


def put_together(batch_size, rows, parts, name):
    """The global batch out of its parts, that agree where they overlap."""
    whole = {}
    for share, part in zip(rows, parts, strict=True):
        assert len(part[name]) == len(share)
        for row, values in zip(share, part[name], strict=True):
            np.testing.assert_array_equal(whole.setdefault(row, values), values)
    return np.stack([whole[row] for row in range(batch_size)])


@few
@given(datasets, shares(), st.integers(0, 5))
def test_processes_share_the_batch(dataset, shares, step):
    batch_size, rows = shares
    arguments = {"batch_size": batch_size, "seed": 3, "start_step": step}
    alone = take(dataset, 2, **arguments)
    parts = [take(dataset, 2, **arguments, rows=share) for share in rows]
    for i, batch in enumerate(alone):
        together = put_together(batch_size, rows, [part[i] for part in parts], "tokens")
        np.testing.assert_array_equal(batch["tokens"], together)


@few
@given(datasets, shares())
def test_processes_read_every_sequence_of_an_epoch_once(dataset, shares):
    batch_size, rows = shares
    steps = -(-len(dataset) // batch_size)
    parts = [take(dataset, steps, batch_size=batch_size, seed=5, rows=share) for share in rows]
    order = []
    for batch in zip(*parts, strict=True):
        whole = put_together(batch_size, rows, batch, "tokens")
        order += (whole[:, 0] // dataset.length).tolist()
    assert sorted(order[: len(dataset)]) == list(range(len(dataset)))


def test_a_process_reads_its_rows_and_no_others():
    read = set()

    class Watched(TokenDataset):
        def __getitem__(self, index):
            read.add(int(index))
            return super().__getitem__(index)

    dataset = memory_dataset(8 * 10 * 50 + 1, 10)
    whole = take(dataset, 50, batch_size=8, seed=1)
    mine = take(Watched(**vars(dataset)), 3, batch_size=8, seed=1, rows=[1, 6])
    for batch, part in zip(whole, mine, strict=False):
        np.testing.assert_array_equal(batch["tokens"][[1, 6]], part["tokens"])
    assert read <= {row // 10 for batch in whole for row in batch["tokens"][[1, 6], 0].tolist()}


@few
@given(datasets, st.integers(1, 7), st.integers(0, 100))
def test_every_epoch_has_every_sequence_once(dataset, batch_size, seed):
    size = len(dataset)
    steps = -(-len(dataset) // batch_size)
    assert (steps - 1) * batch_size < size <= steps * batch_size
    stream = take(dataset, 2 * steps, batch_size=batch_size, seed=seed)
    order = np.concatenate([batch["tokens"][:, 0] for batch in stream]) // dataset.length
    assert sorted(order[:size]) == sorted(order[size : 2 * size]) == list(range(size))


def test_epochs_and_seeds_differ():
    dataset = memory_dataset(1001, 10)

    def order(**arguments):
        return take(dataset, 1, batch_size=100, **arguments)[0]["tokens"][:, 0].tolist()

    orders = [order(seed=0), order(seed=1), order(seed=0, start_step=1), list(range(0, 1000, 10))]
    assert len(set(map(tuple, orders))) == 4


def test_the_order_is_the_one_of_earlier_releases():
    """If a new grain fails this, say in the release notes that resumed runs change their order."""
    tokens = take(memory_dataset(101, 10), 1, batch_size=10, seed=0)[0]["tokens"]
    assert (tokens[:, 0] // 10).tolist() == ORDER


ORDER = [1, 2, 4, 5, 9, 7, 8, 6, 0, 3]


def test_a_step_far_away_costs_nothing():
    dataset = memory_dataset(101, 10)
    assert take(dataset, 1, batch_size=4, seed=0, start_step=10**6)[0]["tokens"].shape == (4, 11)


@given(datasets, shares())
def test_evaluation_covers_the_split(dataset, shares):
    size, rows = shares
    parts = [list(evaluation_batches(dataset, size, share)) for share in rows]
    alone = list(evaluation_batches(dataset, size))
    targets = []
    for batch, *parts_of_batch in zip(alone, *parts, strict=True):
        tokens, weights = (
            put_together(size, rows, parts_of_batch, name) for name in ("tokens", "weights")
        )
        assert tokens.shape == (size, dataset.length + 1)
        assert weights.shape == (size, dataset.length)
        assert (tokens.dtype, weights.dtype) == (np.int32, np.float32)
        np.testing.assert_array_equal(tokens, batch["tokens"])
        np.testing.assert_array_equal(weights, batch["weights"])
        targets += tokens[:, 1:][weights == 1].tolist()
        assert not tokens[:, 1:][weights == 0].any()
    assert targets == list(range(1, dataset.num_tokens))


# Documents.


def test_starts_are_zero_unless_documents_are_asked_for(folder):
    assert not TokenDataset.open(folder, length=10).has_segment_starts
    sequence = TokenDataset.open(folder, length=10)[3]
    np.testing.assert_array_equal(sequence["segment_starts"], np.zeros(10))


@given(st.lists(st.integers(1, 12), min_size=2, max_size=30), st.integers(1, 9))
def test_tokens_start_at_the_end_of_text_before_their_document(sizes, length):
    offsets = np.cumsum([0, *sizes])
    size = int(offsets[-1])
    if size <= length:
        return
    plain = memory_dataset(size, length)
    dataset = dataclasses.replace(plain, offsets=offsets)
    assert dataset.has_segment_starts
    for i in range(dataset.num_sequences):
        sequence = dataset.sequence(i)
        assert sequence["segment_starts"].dtype == np.int32
        for name in ("tokens", "weights"):
            np.testing.assert_array_equal(sequence[name], plain.sequence(i)[name])
        start, expected = 0, []
        for t in range(length):
            if i * length + t + 1 in offsets:  # this token is the last of a document
                start = t
            expected.append(start)
        assert sequence["segment_starts"].tolist() == expected


def documents_on_disk(folder, documents, prompts=None, eos=99):
    """Writes a data set of documents, lists of ids to which an end of text is added."""
    (folder / "train").mkdir(parents=True)
    documents = [[*ids, eos] for ids in documents]
    ids = np.concatenate(documents).astype("<u2")
    ids.tofile(folder / "train" / "tokens.bin")
    np.save(folder / "train" / "offsets.npy", np.cumsum([0, *map(len, documents)]))
    if prompts:
        np.save(folder / "train" / "prompts.npy", np.array(prompts))
    numbers = {"documents": len(documents), "bytes": 3 * len(ids), "tokens": len(ids)}
    fields = {"version": 1, "dtype": "uint16", "vocab_size": 100, "eos_id": eos}
    fields |= {"pairs": bool(prompts), "splits": {"train": numbers}}
    (folder / "dataset.json").write_text(json.dumps(fields))
    return folder


def test_documents_are_told_apart_on_disk(tmp_path):
    folder = documents_on_disk(tmp_path / "a", [[1, 2], [3], [4, 5, 6, 7]])
    dataset = TokenDataset.open(folder, length=5, across_documents=False)
    assert dataset[0]["tokens"].tolist() == [1, 2, 99, 3, 99, 4]
    assert dataset[0]["segment_starts"].tolist() == [0, 0, 2, 2, 4]
    path = folder / "train" / "offsets.npy"
    np.save(path, np.load(path)[:-1])
    with pytest.raises(NeoError, match=r"offsets.npy has 3 numbers, not 4; copy it again, or run"):
        TokenDataset.open(folder, length=5, across_documents=False)
    path.unlink()
    with pytest.raises(NeoError, match=r"cannot read .*offsets.npy: No such file"):
        TokenDataset.open(folder, length=5, across_documents=False)
    assert TokenDataset.open(folder, length=5).num_tokens == 10


def test_pieces_of_a_stream_are_no_documents(tmp_path):
    folder = documents_on_disk(tmp_path / "a", [[1, 2], [3], [4, 5]])
    np.save(folder / "train" / "offsets.npy", np.array([0, 2, 4, 8]))
    with pytest.raises(NeoError, match=r"train' of .*a holds pieces of a stream, .* prepare the"):
        TokenDataset.open(folder, length=5, across_documents=False)


# Pairs.


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=20),
    st.integers(1, 14),
)
def test_pairs_are_whole_and_their_completions_count(tmp_path_factory, pairs, length):
    """Every token of a pair is another one, so that each can be told by its value."""
    root = tmp_path_factory.mktemp("pairs")
    ids = iter(range(100, 10_000))
    documents = [[next(ids) for _ in range(prompt + rest)] for prompt, rest in pairs]
    prompts = [prompt for prompt, _ in pairs]
    documents_on_disk(root, documents, prompts)
    fitting = [i for i, ids in enumerate(documents) if len(ids) <= length]
    if not fitting:
        shortest = min(map(len, documents))
        with pytest.raises(NeoError, match=rf"no pair of .* length of {shortest} or more\."):
            TokenDataset.open(root, length=length)
        assert len(TokenDataset.open(root, length=shortest)) >= 1
        return
    dataset = TokenDataset.open(root, length=length)
    assert isinstance(dataset, PairDataset)
    assert dataset.has_segment_starts
    assert np.isnan(dataset.num_target_bytes)
    assert len(dataset) == dataset.num_sequences
    seen = []
    for i in range(len(dataset)):
        tokens, weights, segment_starts = (
            dataset[i][name] for name in ("tokens", "weights", "segment_starts")
        )
        assert (tokens.dtype, weights.dtype, segment_starts.dtype) == (
            np.int32,
            np.float32,
            np.int32,
        )
        assert (len(tokens), len(weights), len(segment_starts)) == (length + 1, length, length)
        place = 0
        while place <= length and tokens[place]:
            number = fitting[len(seen)]
            whole = [*documents[number], 99]
            behind = place + len(whole)
            assert tokens[place:behind].tolist() == whole
            assert (segment_starts[place:behind] == place).all()
            first = place + max(prompts[number], 1)  # the first token that counts
            expected = [place + t >= first for t in range(len(whole))]
            if place:
                assert weights[place - 1] == 0
            assert weights[place : behind - 1].tolist() == expected[1:]
            seen.append(number)
            place = behind
        assert not tokens[place:].any()
        assert not weights[max(place - 1, 0) :].any()
        np.testing.assert_array_equal(segment_starts[place:], np.arange(place, length))
        if len(seen) < len(fitting):  # no room, or one that was left out comes between
            following = fitting[len(seen)]
            assert place + len(documents[following]) > length or following > seen[-1] + 1
    assert seen == fitting


def test_documents_and_pairs_of_the_cloud(tmp_path, cloud, bucket):
    text = documents_on_disk(tmp_path / "text", [[1, 2], [3], [4, 5, 6, 7]])
    pairs = documents_on_disk(tmp_path / "pairs", [[11, 12], [13, 14, 15], [16, 17]], [1, 1, 1])
    for folder in (text, pairs):
        for path in filter(Path.is_file, folder.rglob("*")):
            cloud[f"{bucket}/{path.relative_to(tmp_path)}"] = path.read_bytes()
    data = "{0}/text=0.5,{0}/pairs=0.5"
    here, there = (
        take(Mixture.open(data.format(root), "train", 4, False), 3, batch_size=4, seed=0)
        for root in (tmp_path, f"gs://{bucket}")
    )
    for ours, theirs in zip(here, there, strict=True):
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name])
    cloud[f"{bucket}/pairs/train/prompts.npy"] = b"damaged"
    with pytest.raises(NeoError, match=r"cannot read gs://.*prompts.npy: "):
        TokenDataset.open(f"gs://{bucket}/pairs", length=4)


def test_pairs_left_out_are_told(tmp_path, capsys):
    folder = documents_on_disk(tmp_path / "a", [[1, 2], [3, 4, 5, 6], [7, 8]], [1, 1, 1])
    TokenDataset.open(folder, length=4)
    assert capsys.readouterr().err == ""
    TokenDataset.open(folder, length=3)
    assert capsys.readouterr().err == (
        f"1 of 3 pairs of split 'train' of {folder} are longer than 3 and left out\n"
    )


@few
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=20), shares())
def test_evaluation_covers_the_pairs(tmp_path_factory, pairs, shares):
    batch_size, rows = shares
    root = tmp_path_factory.mktemp("pairs")
    prompts = [prompt for prompt, _ in pairs]
    documents_on_disk(root, [[1] * prompt + [2] * rest for prompt, rest in pairs], prompts)
    dataset = TokenDataset.open(root, length=9)
    alone = list(evaluation_batches(dataset, batch_size))
    parts = [list(evaluation_batches(dataset, batch_size, share)) for share in rows]
    counted = 0
    for batch, *parts_of_batch in zip(alone, *parts, strict=True):
        for name, array in batch.items():
            together = put_together(batch_size, rows, parts_of_batch, name)
            np.testing.assert_array_equal(array, together)
        targets = batch["tokens"][:, 1:][batch["weights"] == 1]
        assert set(targets.tolist()) <= {2, 99}
        counted += len(targets)
    assert counted == sum(rest + 1 - (prompt == 0) for prompt, rest in pairs)


# Mixtures.


def mixed(counts, shares):
    """A mixture of data sets of so many sequences each, whose tokens tell their part."""
    parts = [
        dataclasses.replace(
            memory_dataset(10 * count + 1, 10),
            tokens=np.arange(10_000 * i, 10_000 * i + 10 * count + 1, dtype=np.uint16),
        )
        for i, count in enumerate(counts)
    ]
    return Mixture(tuple(parts), tuple(shares))


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 1), (0.02, 3.0), (0.001, 0.1, 0.05)])
def test_parts_have_their_shares_and_epochs_of_their_own(weights):
    counts = (500, 7, 50)[: len(weights)]
    mixture = mixed(counts, weights)
    steps = 400
    firsts = np.concatenate([
        batch["tokens"][:, 0] for batch in take(mixture, steps, batch_size=4, seed=0)
    ])  # fmt: skip
    part, number = firsts // 10_000, firsts % 10_000 // 10
    for i, (count, weight) in enumerate(zip(counts, weights, strict=True)):
        mine = number[part == i]
        assert len(mine) == pytest.approx(4 * steps * weight / sum(weights), rel=0.011, abs=2)
        for epoch in range(0, len(mine) - count + 1, count):
            assert sorted(mine[epoch : epoch + count]) == list(range(count))
        rest = mine[len(mine) // count * count :]
        assert len(set(rest)) == len(rest)
        half = np.count_nonzero(part[: 2 * steps] == i)
        assert half == pytest.approx(len(mine) / 2, abs=len(weights))  # mixed all along


@few
@given(shares(), st.integers(0, 2**32 - 1), st.integers(0, 30))
def test_a_mixture_resumes_at_any_step_on_any_processes(shares, seed, step):
    batch_size, rows = shares
    mixture = mixed((20, 3), (0.6, 0.4))
    whole = take(mixture, step + 2, batch_size=batch_size, seed=seed)
    arguments = {"batch_size": batch_size, "seed": seed, "start_step": step}
    parts = [take(mixture, 2, **arguments, rows=share) for share in rows]
    for i, batch in enumerate(whole[step:]):
        together = put_together(batch_size, rows, [part[i] for part in parts], "tokens")
        np.testing.assert_array_equal(batch["tokens"], together)


def test_a_mixture_of_one_is_that_data_set():
    dataset = memory_dataset(101, 10)
    one = take(Mixture((dataset,), (0.3,)), 5, batch_size=4, seed=1)
    for ours, theirs in zip(one, take(dataset, 5, batch_size=4, seed=1), strict=True):
        np.testing.assert_array_equal(ours["tokens"], theirs["tokens"])


def test_data_names_a_folder_or_several(tmp_path, monkeypatch, cloud, bucket):
    monkeypatch.chdir(tmp_path)
    assert parse_data("books") == [("books", 1.0)]
    assert parse_data("pile=0.7, a=b/books=3e-1") == [("pile", 0.7), ("a=b/books", 0.3)]
    cloud[f"{bucket}/z=3/dataset.json"] = b"{}"
    remote = f"gs://{bucket}/x"
    assert parse_data(f"{remote}=2,y=1,{remote}=4") == [(remote, 2), ("y", 1), (remote, 4)]
    assert parse_data(f"gs://{bucket}/z=3") == [(f"gs://{bucket}/z=3", 1.0)]
    (tmp_path / "x=1").mkdir()
    assert parse_data("x=1") == [("x=1", 1.0)]
    assert parse_data("x=2") == [("x", 2.0)]


@pytest.mark.parametrize("part", ["b", "b=", "b=x", "b=0", "b=-1", "b=nan", "b=inf", "=1", ""])
def test_shares_are_positive_numbers(part):
    with pytest.raises(NeoError, match=rf"'{part}' is not a folder and its share, .* --data pile="):
        parse_data(f"a=0.5,{part}")


def test_parts_have_one_tokenizer(tmp_path):
    a, b = (documents_on_disk(tmp_path / name, [[1, 2], [3, 4]]) for name in "ab")
    data = f"{a}=0.5,{b}=0.5"
    mixture = Mixture.open(data, length=2)
    assert (mixture.shares, mixture.vocab_size, mixture.tokenizer_folder) == ((0.5, 0.5), 100, a)
    assert mixture.bytes_per_token == 3
    assert not mixture.has_segment_starts
    assert Mixture.open(data, length=2, across_documents=False).has_segment_starts
    assert Mixture.open(data, "held_out", length=2).parts == ()
    (b / "vocab.json").write_text("{}")
    expected = f"{a} and {b} have different tokenizers; prepare one again with --tokenizer {a}"
    with pytest.raises(NeoError, match=f"^{expected}$"):
        Mixture.open(data, length=2)
    (a / "vocab.json").write_text("{}")
    Mixture.open(data, length=2)
    edit(b, eos_id=98)
    with pytest.raises(NeoError, match="have different tokenizers"):
        Mixture.open(data, length=2)
    with pytest.raises(NeoError, match="nowhere holds no data set; make one: neo-jax prepare"):
        Mixture.open(f"{a}=1,{tmp_path}/nowhere=1", length=2)


def test_text_and_pairs_can_be_mixed(tmp_path):
    text = documents_on_disk(tmp_path / "text", [[1, 2, 3], [4, 5, 6, 7]])
    pairs = documents_on_disk(tmp_path / "pairs", [[11, 12], [13, 14, 15]], [1, 1])
    mixture = Mixture.open(f"{text}=2,{pairs}=1", length=4)
    assert mixture.has_segment_starts
    assert np.isnan(mixture.bytes_per_token)
    (batch,) = take(mixture, 1, batch_size=6, seed=0)
    of_pairs = batch["tokens"][:, 0] > 10
    assert of_pairs.sum() == 2
    assert not batch["segment_starts"][~of_pairs].any()
    assert (batch["weights"][~of_pairs] == 1).all()
    assert (batch["weights"][of_pairs][:, 0] == 1).all()
    assert (batch["weights"].sum(1)[of_pairs] < 4).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "a batch of 0 holds nothing; give it at least one"),
        ({"seed": -1}, "not -1"),
        ({"seed": 2**32}, "the seed is a whole number"),
        ({"start_step": -1}, "count steps from 0"),
    ],
)
def test_errors_come_at_the_call(arguments, message):
    dataset = dataclasses.replace(memory_dataset(101, 10))
    with pytest.raises(NeoError, match=message):
        batches(dataset, **{"batch_size": 4, "seed": 0, **arguments})
