"""Files that appear whole or not at all, and results that are kept for what made them."""
import os

import pytest

from entrodrop import files
from entrodrop.files import cache_folder, code_digest, file_digest, remembered, write_text


def test_a_text_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    def full_disk(*args): raise OSError("no space left")
    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"): write_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_file_is_known_by_every_byte(tmp_path):
    path, data = tmp_path / "a", bytearray(range(100))
    path.write_bytes(data)
    found = {file_digest(path)}
    for i in range(100):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1:])
        found.add(file_digest(path))
    path.write_bytes(data + b"\0")
    assert len(found | {file_digest(path)}) == 102


def test_the_cache_is_where_it_is_asked_to_be(tmp_path, monkeypatch):
    monkeypatch.setenv("ENTRODROP_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("ENTRODROP_CACHE")
    assert cache_folder().name == "entrodrop"


def test_a_result_is_kept_for_its_settings_and_its_code(tmp_path):
    made = []
    def ask(settings, code="a"):
        return remembered(tmp_path, "result", settings, lambda: made.append(settings) or len(made), code)
    assert [ask(dict(k=1)), ask(dict(k=1)), ask(dict(k=2)), ask(dict(k=1))] == [1, 1, 2, 1]
    assert [ask(dict(k=1), "b"), ask(dict(k=1), "b"), ask(dict(k=2), "b")] == [3, 3, 4]
    assert len(list(tmp_path.iterdir())) == 2
    first, second = sorted(tmp_path.iterdir())
    first.write_bytes(second.read_bytes())  # one put in the place of another
    ask(dict(k=1), "b"), ask(dict(k=2), "b")
    assert len(made) == 5
    for damaged in ("", "[]", "{}", "{", '{"result": 7}'):
        for path in tmp_path.iterdir(): path.write_text(damaged)
        count = len(made)
        assert ask(dict(k=1), "b") == count + 1


@pytest.mark.parametrize("old, new, changes", [
    ("starts == start", "starts >= start", True),
    ('f"{criterion} is finite for no sample', 'f"{criterion} is finite for none', True),  # what is said is done
    ('"What resamples say of a start"', '"What is said of a start"', False),
    ("# a supported decoder", "# a model", False),
    ("    draws = ", "\n    draws = ", False)])
def test_code_is_known_by_what_it_does(monkeypatch, old, new, changes):
    read = files._source
    def changed(module): return read(module).replace(old, new) if module == "dynamics" else read(module)
    assert old in read("dynamics")
    before, others = code_digest(["dynamics"]), code_digest(["estimators"])
    monkeypatch.setattr(files, "_source", changed)
    assert (code_digest(["dynamics"]) != before) == changes and code_digest(["estimators"]) == others
    assert code_digest(["pruning"]) != before  # which imports dynamics, and is more


@pytest.mark.parametrize("module, imported", [
    ("pruning", "dynamics"), ("pruning", "architectures"), ("dynamics", "models"), ("layerwise", "surgery")])
def test_code_that_is_imported_counts(monkeypatch, module, imported):
    read, before = files._source, code_digest([module])
    monkeypatch.setattr(files, "_source", lambda name: read(name) + ("\nlast = 1\n" if name == imported else ""))
    assert code_digest([module]) != before
