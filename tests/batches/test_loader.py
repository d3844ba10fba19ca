import numpy as np
import pytest

from nanomed.batches.loader import Loader, split
from nanomed.config import SFT, InputError
from nanomed.store import group_key
from nanomed.store.cache import limit_of
from tests.data import ListData


def loaders(n: int, world_size: int, **settings) -> list[Loader]:
    """One loader per rank, over n examples of different lengths."""
    data = ListData.of_lengths(np.random.default_rng(n).integers(5, 60, n).tolist())
    parts = split(data, 0.25)
    fixed = dict(batch_size=8, micro_tokens=128, seq_len=64, epochs=2, seed=3)
    c = SFT(**fixed | settings)
    return [Loader(c, data, rank, world_size, parts) for rank in range(world_size)]


def ids_of(rows) -> list[int]:
    return [i for row in rows for i in row.examples.tolist() if i >= 0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [40, 61])
def test_each_example_once_per_epoch_in_an_order_of_seed_and_epoch_alone(n, world_size):
    """The last step of an epoch is short; nothing is repeated, padded or dropped."""
    (alone,) = loaders(n, 1)
    ranks = loaders(n, world_size)
    epochs = [[], []]
    for step in range(alone.n_steps):
        got = sorted(i for loader in ranks for i in ids_of(loader.step(step)))
        assert got == sorted(alone.examples(step).tolist())
        assert len({len(loader.step(step)) for loader in ranks}) == 1  # no rank waits for another
        epochs[step // alone.steps_per_epoch] += alone.examples(step).tolist()
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(alone.train.tolist())
    assert epochs[0] != epochs[1]
    assert alone.n_steps == 2 * -(-len(alone.train) // 8)


def test_the_seed_changes_the_order():
    (a,), (b,) = loaders(40, 1), loaders(40, 1, seed=4)
    assert a.examples(0).tolist() != b.examples(0).tolist()


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_divisor_counts_the_labels_of_the_whole_step(world_size):
    ranks = loaders(61, world_size)
    for step in range(ranks[0].n_steps):
        labels = sum((r.labels >= 0).sum().item() for loader in ranks for r in loader.step(step))
        assert labels == ranks[0].divisor(step)
    labels = sum((r.labels >= 0).sum().item() for loader in ranks for r in loader.validation())
    assert labels == ranks[0].val_divisor()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_rows_are_bounded_and_balanced(world_size):
    for loader in loaders(200, world_size, batch_size=64, micro_tokens=128):
        assert all(len(row.tokens) <= 128 for row in loader.step(0))


def test_a_step_is_the_same_whenever_it_is_asked_for():
    """Also where it is not the one that was prepared in the background."""
    (a,), (b,) = loaders(40, 1), loaders(40, 1)
    list(map(a.step, range(5)))
    for step in (5, 1, 2, 0, 6):
        assert ids_of(a.step(step)) == ids_of(list(b.rows(b.examples(step))))


def test_steps_win_over_epochs():
    assert loaders(40, 1, steps=3)[0].n_steps == 3
    (long,) = loaders(40, 1, steps=300)  # as many epochs as it takes
    assert long.n_steps == 300 and len(long.examples(299)) > 0


def test_the_split_is_by_group_not_by_place():
    keys = np.array([group_key(f"question {i // 2}") for i in range(4000)], np.uint64)
    held_out = keys < limit_of(0.1)
    assert (held_out[::2] == held_out[1::2]).all()  # both copies of a question on one side
    assert 0.08 < held_out.mean() < 0.12
    assert not (keys < limit_of(0.0)).any() and (keys < limit_of(1.0)).all()
    assert (keys < limit_of(0.2))[held_out].all()  # a larger share holds out the same, and more


def test_a_split_without_one_of_its_sides_is_refused():
    data = ListData.of_lengths([5, 5])
    with pytest.raises(InputError, match="leaves 0 held out and 2 to train on: a hash of each"):
        split(data, 1e-9)
    train, val = split(data, 0.0)
    assert len(train) == 2 and len(val) == 0


def test_held_out_files_are_held_out_whole():
    data = ListData.of_lengths([5] * 6)
    data.source = np.array([[0, 1], [0, 2], [1, 1], [2, 1], [2, 2], [2, 3]])
    train, val = split(data, 0.1, n_train_files=2)
    assert train.tolist() == [0, 1, 2] and val.tolist() == [3, 4, 5]
    for n_train_files, sizes in ((3, "0 held out and 6"), (0, "6 held out and 0")):  # all dropped
        with pytest.raises(InputError, match=f"--val_data of 6 examples leaves {sizes} to train"):
            split(data, 0.1, n_train_files)


def test_training_on_nothing_is_refused():
    data = ListData([([1, 2, 3], [False] * 3)] * 4 + [([1, 2, 3], [False, True, True])])
    data.source = np.array([[0, 1], [0, 2], [0, 3], [0, 4], [1, 1]])
    with pytest.raises(InputError, match="none of the 4 examples to train on has a token to learn"):
        split(data, 0.1, n_train_files=1)
