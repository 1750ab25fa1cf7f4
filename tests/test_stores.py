"""Nothing that was finished is lost: whenever packing is killed, whoever else packs or writes, whatever is damaged."""
import json
import subprocess
import sys

import pytest

from entrodrop.stores import PACKED, Store, fill, pack, read_lines, write_lines


def any_result(key, result): return True


def value_of(n): return dict(value=[n / 3, str(n)], note=None)


def filled(folder, numbers):
    "A store of single files"
    folder.mkdir(exist_ok=True)
    store = Store(folder)
    for n in numbers: fill(store, str(n), lambda n=n: value_of(n), f"result {n}")
    return store


def held(store): return {key: store.read(key)[0] for key in store.keys()}


def in_process(code, *arguments):
    "A process that runs code with these arguments in `arguments`; what it prints can be read"
    start = "import json, sys\narguments = json.loads(sys.argv[1])\n"
    command = [sys.executable, "-c", start + code, json.dumps(arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


KILLED = """
import os, signal
from pathlib import Path
from entrodrop import stores
folder, old = Path(arguments[0]), arguments[1]

def until(n):
    "A trace that kills the process at the n-th line that it runs of the module"
    count = 0
    def line(frame, event, argument):
        nonlocal count
        count += event == "line"
        if count == n: os.kill(os.getpid(), signal.SIGKILL)
        return line
    return lambda frame, event, argument: line if frame.f_code.co_filename == stores.__file__ else None

def value_of(n): return dict(value=[n / 3, str(n)], note=None)
def write(store, numbers):
    for n in numbers: stores.fill(store, str(n), lambda: value_of(n), str(n))

n = killed = 0
while killed == n:
    n += 1
    store = stores.Store(folder / str(n))
    store.folder.mkdir()
    if old:
        write(store, [0, 1])
        stores.pack(store, lambda *_: True)
    write(store, [2, 3, 4])
    expected = {key: store.read(key)[0] for key in store.keys()}
    child = os.fork()
    if not child:
        sys.settrace(until(n))
        stores.pack(store, lambda *_: True)
        os._exit(0)
    killed += os.waitpid(child, 0)[1] == signal.SIGKILL
    for _ in range(2):
        assert {key: store.read(key)[0] for key in store.keys()} == expected
        stores.pack(store, lambda *_: True)
    assert not store.singles() and {p.name for p in store.folder.iterdir()} == {"rows.parquet", ".pack.lock"}
print(killed)
"""


@pytest.mark.parametrize("old", [False, True])
def test_a_kill_at_any_line_of_packing_loses_nothing(tmp_path, old):
    process = in_process(KILLED, str(tmp_path), old)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and int(said) > 30  # lines at which it was killed


WRITER = """
from entrodrop.stores import Store, fill, pack
store, first, last = Store(arguments[0]), *arguments[1:]
for n in range(first, last):
    fill(store, str(n), lambda: dict(value=[n / 3, str(n)], note=None), str(n))
    pack(store, lambda *_: True)
"""


def test_two_processes_that_write_and_pack_at_once_lose_nothing_that_a_third_one_saw(tmp_path):
    store, seen = Store(tmp_path), set()
    writers = [in_process(WRITER, str(tmp_path), *numbers) for numbers in ((0, 60), (40, 100))]
    while any(w.poll() is None for w in writers):
        now = {*store.keys()}
        assert seen <= now and all(key in store and store.read(key)[0] == value_of(int(key)) for key in now)
        seen = now
    for w in writers:
        w.stdout.close()
        assert w.returncode == 0
    assert held(store) == {str(n): value_of(n) for n in range(100)} and not store.singles()


def test_single_files_and_packed_ones_are_read_alike(tmp_path):
    store = filled(tmp_path / "store", range(5))
    before = held(store)
    assert pack(store, any_result) == 5 and held(store) == before
    filled(store.folder, range(7))  # writes only what is new
    assert store.singles() == ["5", "6"] and len(store.keys()) == 7


def test_the_same_results_give_the_same_bytes_however_they_came(tmp_path):
    first, second = filled(tmp_path / "a", range(9)), tmp_path / "b"
    pack(first, any_result)
    for some in ([8, 3], [0], [1, 2, 4, 5, 6, 7]): pack(filled(second, some), any_result)
    assert (first.folder / PACKED).read_bytes() == (second / PACKED).read_bytes()


def test_nothing_is_packed_onto_a_damaged_file(tmp_path):
    store = filled(tmp_path / "store", [1])
    pack(store, any_result)
    filled(store.folder, [2])
    damaged = (store.folder / PACKED).read_bytes()[:-1]
    (store.folder / PACKED).write_bytes(damaged)
    with pytest.raises(ValueError, match=f"{PACKED} is damaged .*take it from where it came from, or delete it"):
        pack(store, any_result)
    assert (store.folder / PACKED).read_bytes() == damaged and store.singles() == ["2"]
    (store.folder / PACKED).unlink()
    assert pack(store, any_result) == 1 and list(store.packed()) == ["2"]


def test_every_damaged_byte_of_a_result_is_noticed(tmp_path):
    store = filled(tmp_path / "store", range(3))
    pack(store, any_result)
    path = store.folder / PACKED
    whole, lines, noticed = path.read_bytes(), read_lines(path), 0
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for at in range(footer):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1:])
        try: assert read_lines(path) == lines  # such as in a description of a page
        except ValueError: noticed += 1
    assert noticed > footer / 2


def test_a_file_of_another_kind_is_left_alone(tmp_path):
    store = filled(tmp_path / "store", [1])
    others = dict(damaged="{", words="[1, 2]", plan='{"format": 2}')
    for name, text in others.items(): store.single(name).write_text(text)
    (store.folder / ".123-2.json").write_text("what write_text leaves when it is killed")
    assert pack(store, lambda key, result: "value" in result) == 1 and store.keys() == ["1", *sorted(others)]
    assert {name: store.single(name).read_text() for name in others} == others
    assert (store.folder / ".123-2.json").exists()


def test_a_result_that_is_written_anew_takes_the_place_of_the_packed_one(tmp_path):
    store = filled(tmp_path / "store", [1, 2])
    pack(store, any_result)
    store.single("1").write_text('{"value": 0}')
    for _ in range(2):
        assert held(store) == {"1": dict(value=0), "2": value_of(2)}
        pack(store, any_result)


def test_what_is_not_there(tmp_path):
    store = Store(tmp_path / "new")
    assert store.keys() == [] and "1" not in store and pack(store, any_result) == 0 and not store.folder.exists()
    with pytest.raises(KeyError): store.read("1")


def test_numbers_come_back_to_the_last_digit(tmp_path):
    numbers = [.1 + .2, 1e-323, 2 ** 60 + 1, float("inf"), -0., 1 / 3]
    store = Store(tmp_path)
    fill(store, "a", lambda: dict(numbers=numbers, nothing=float("nan")), "numbers")
    pack(store, any_result)
    found, _ = store.read("a")
    assert list(map(repr, found["numbers"])) == list(map(repr, numbers)) and found["nothing"] != found["nothing"]


def test_an_entry_called_key_is_refused_before_anything_is_written(tmp_path):
    lines = {"a": {"key": "1"}}
    with pytest.raises(ValueError, match="cannot be called 'key'"): write_lines(tmp_path / "rows.parquet", lines)
    assert not list(tmp_path.iterdir())
