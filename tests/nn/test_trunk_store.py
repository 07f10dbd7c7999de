"""The store against a dict, its bound, and what damage does to it."""

import errno
import os
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alter.nn import trunk_store
from alter.nn.trunk_store import TrunkStore

WIDTH = 4


def key(number):
    return number.to_bytes(16, "little")


def states(number, rows=3, dtype=torch.float32):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(number)).to(dtype)


def make(folder, max_bytes=10**6, dtype=torch.float32, **options):
    return TrunkStore(folder, WIDTH, dtype, max_bytes, **options)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 5), st.booleans()), max_size=30),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_it_holds_what_was_put_also_after_opening_again(tmp_path_factory, puts, dtype):
    folder = tmp_path_factory.mktemp("store") / "s"
    store, expected = make(folder, dtype=dtype), {}
    for number, rows, reopen in puts:
        store.put(key(number), states(number, rows))
        expected.setdefault(number, states(number, rows, dtype))
        if reopen:
            store.close()
            store = make(folder, dtype=dtype)
    assert len(store) == len(expected)
    for number in range(13):
        found = store.get(key(number))
        assert (found is None) if number not in expected else torch.equal(found, expected[number])


def test_two_that_write_at_once_do_not_disturb_each_other(tmp_path):
    first, second = make(tmp_path / "s"), make(tmp_path / "s")
    for number in range(20):
        (first if number % 2 else second).put(key(number), states(number))
    both = make(tmp_path / "s")
    assert all(torch.equal(both.get(key(n)), states(n)) for n in range(20))


def filled(folder, count=5):
    store = make(folder)
    for number in range(count):
        store.put(key(number), states(number))
    store.close()
    (data,) = folder.glob("*.data")
    return data


def test_a_flipped_bit_is_noticed_and_the_entry_can_be_put_again(tmp_path):
    data = filled(tmp_path / "s")
    content = bytearray(data.read_bytes())
    content[3 * WIDTH * 4 + 7] ^= 1  # in the second entry
    data.write_bytes(content)
    store = make(tmp_path / "s")
    with pytest.warns(UserWarning, match="damaged or missing"):
        assert store.get(key(1)) is None
    assert key(1) not in store
    assert torch.equal(store.get(key(2)), states(2))
    store.put(key(1), states(1))
    assert torch.equal(store.get(key(1)), states(1))
    store.close()
    assert torch.equal(make(tmp_path / "s").get(key(1)), states(1))


@pytest.mark.parametrize("kept", range(0, 5 * WIDTH * 3 * 4, 37))
def test_cut_off_data_are_absent_and_the_rest_is_whole(tmp_path, kept):
    data = filled(tmp_path / "s")
    os.truncate(data, kept)
    store = make(tmp_path / "s")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = [store.get(key(n)) for n in range(5)]
    whole = kept // (WIDTH * 3 * 4)
    assert all(torch.equal(f, states(n)) for n, f in enumerate(found[:whole]))
    assert found[whole:] == [None] * (5 - whole)


@pytest.mark.parametrize("cut", [1, 31, 32, 33])
def test_a_cut_off_index_record_is_absent(tmp_path, cut):
    index = filled(tmp_path / "s").with_suffix(".index")
    os.truncate(index, index.stat().st_size - cut)
    store = make(tmp_path / "s")
    assert len(store) == 5 - -(-cut // 32)
    assert all(torch.equal(store.get(key(n)), states(n)) for n in range(len(store)))


def test_what_another_process_has_evicted_is_absent(tmp_path):
    data = filled(tmp_path / "s")
    store = make(tmp_path / "s")
    data.unlink()
    with pytest.warns(UserWarning, match="damaged or missing"):
        assert store.get(key(0)) is None


def total(folder):
    return sum(path.stat().st_size for path in folder.glob("*/*.data"))


def test_it_stays_within_its_bound_and_evicts_what_was_longest_unused(tmp_path):
    bound, entry = 4000, WIDTH * 3 * 4
    old, newer = make(tmp_path / "old", bound), make(tmp_path / "newer", bound)
    for number in range(40):  # about half of the bound each
        old.put(key(number), states(number))
    for number in range(40):
        newer.put(key(number), states(number))
    for path in (tmp_path / "old").glob("*"):
        os.utime(path, (1, 1))
    store = make(tmp_path / "new", bound)
    for number in range(20):
        store.put(key(number), states(number))
        assert total(tmp_path) <= bound
    assert len(store) == 20
    assert len(make(tmp_path / "old", bound)) < 40
    assert len(make(tmp_path / "newer", bound)) * entry + total(tmp_path / "old") <= bound


def test_what_another_user_owns_is_read_and_neither_touched_nor_evicted(tmp_path, monkeypatch):
    data = filled(tmp_path / "theirs")

    def refuses(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "utime", refuses)
    monkeypatch.setattr(type(data), "unlink", refuses)
    assert torch.equal(make(tmp_path / "theirs").get(key(0)), states(0))
    store = make(tmp_path / "ours", data.stat().st_size)  # no room for more, unless theirs goes
    with pytest.warns(UserWarning, match="takes no more"):
        store.put(key(9), states(9))
    assert data.is_file()
    assert torch.equal(make(tmp_path / "theirs").get(key(0)), states(0))


def test_what_was_read_last_stays_longest(tmp_path):
    first, second = make(tmp_path / "first", 4000), make(tmp_path / "second", 4000)
    put_all(first, 40)
    put_all(second, 40)
    for name, time in (("first", 1), ("second", 2)):
        for path in (tmp_path / name).glob("*"):
            os.utime(path, (time, time))
    read = make(tmp_path / "first", 4000)
    assert all(read.get(key(number)) is not None for number in range(40))
    put_all(make(tmp_path / "new", 4000), 20)
    assert len(make(tmp_path / "first", 4000)) == 40
    assert len(make(tmp_path / "second", 4000)) < 40


def put_all(store, count):
    for number in range(count):
        store.put(key(number), states(number))


@pytest.mark.parametrize("evict", [True, False])
def test_when_nothing_may_go_it_takes_no_more_and_says_so_once(tmp_path, evict):
    store = make(tmp_path / "s", 1000, evict=evict)
    with pytest.warns(UserWarning, match="max_gb") as seen:
        put_all(store, 100)
    assert len([w for w in seen if "max_gb" in str(w.message)]) == 1
    assert 0 < len(store) < 100
    assert total(tmp_path) <= 1000
    assert all((f := store.get(key(n))) is None or torch.equal(f, states(n)) for n in range(100))


def test_a_full_disk_ends_the_storing_and_nothing_else(tmp_path, monkeypatch):
    store = make(tmp_path / "s")
    store.put(key(0), states(0))

    def full(self, data, record):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trunk_store._Segment, "append", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        store.put(key(1), states(1))
    assert store.full
    assert store.get(key(1)) is None
    assert torch.equal(store.get(key(0)), states(0))
