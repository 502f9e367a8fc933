"""neo_jax/data/{packing,feed}.py: sequences and batches."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neo_jax.data.feed import batches, evaluation_batches, num_batches_per_epoch
from neo_jax.data.packing import TokenDataset
from neo_jax.errors import NeoError


def memory_dataset(num_tokens, length):
    """Returns a data set whose token i is i."""
    return TokenDataset(
        tokens=np.arange(num_tokens, dtype=np.uint16),
        length=length,
        num_bytes=num_tokens,
        num_documents=1,
        vocab_size=2**16,
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


def test_errors_of_opening(folder, tmp_path_factory):
    def refused(source=folder, split="train", length=10):
        with pytest.raises(NeoError) as error:
            TokenDataset.open(source, split, length)
        assert "\n" not in str(error.value)
        return str(error.value)

    nowhere = tmp_path_factory.mktemp("empty") / "nowhere"
    assert f"neo-jax prepare FILE... --output {nowhere}" in refused(nowhere)
    assert "no split 'heldout'. Did you mean 'held_out'?" in refused(split="heldout")
    assert "Known are: held_out, train." in refused(split="x")
    assert "has 7 tokens, too few for a sequence of 7; choose a length below 7" in refused(
        split="held_out", length=7
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


def take(dataset, count, **arguments):
    stream = batches(dataset, **arguments)
    taken = list(itertools.islice(stream, count))
    stream.close()
    return taken


few = settings(max_examples=25, deadline=None)


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
    steps = num_batches_per_epoch(dataset, batch_size)
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
    steps = num_batches_per_epoch(dataset, batch_size)
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
