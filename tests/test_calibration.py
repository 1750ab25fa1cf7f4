"""Text sources and their split, token windows, and perplexity: properties, bad input, and sums done by hand."""
import gzip
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st

from entrodrop import calibration
from entrodrop.calibration import (
    HUB,
    Hub,
    Perplexity,
    Text,
    calibration_batch,
    documents,
    heldout_windows,
    load_text,
    perplexity,
    shared_runs,
    window_documents,
)


def write_jsonl(path, docs, **options):
    path.write_text("".join(json.dumps(dict(text=d), **options) + "\n" for d in docs), encoding="utf-8")
    return path


def numbers(text, **options):
    "A tokenizer of texts that are numbers with spaces between"
    return SimpleNamespace(input_ids=[int(n) for n in text.split()])


numbers.bos_token_id = None


def marked(text, **options):
    "The same with a token in front that is the same for all texts"
    return SimpleNamespace(input_ids=[-1, *numbers(text).input_ids])


marked.bos_token_id = -1


def counted(*lengths):
    "Documents of these lengths whose tokens are 0, 1, 2, ..., so that every token tells its place"
    ends = np.cumsum(lengths)
    return [" ".join(map(str, range(end - length, end))) for end, length in zip(ends, lengths, strict=True)]


# The split

def runs(docs):
    "Every run of 13 words"
    split = [re.findall(r"\w+", d.lower()) for d in docs]
    return {tuple(w[i:i + 13]) for w in split for i in range(len(w) - 12)}


@st.composite
def copying_documents(draw):
    "Documents of a few passages each, from a common pool, so that many are copied; now and then in capitals"
    words = st.sampled_from(["a", "Bee", "sea", "Ünder", "e5", "f_"])
    pool = draw(st.lists(st.lists(words, min_size=1, max_size=30).map(" ".join), min_size=1, max_size=12))
    passage = st.tuples(st.sampled_from(pool), st.booleans()).map(lambda p: p[0].upper() if p[1] else p[0])
    return draw(st.lists(st.lists(passage, min_size=1, max_size=3).map(",\n".join), min_size=1, max_size=15))


def test_split_shares_no_run_of_13_words(tmp_path):
    outcomes = []
    @settings(deadline=None, max_examples=150, derandomize=True)
    @given(copying_documents(), st.randoms(use_true_random=False))
    def check(docs, rng):
        try: text = load_text(write_jsonl(tmp_path / "docs.jsonl", docs))
        except ValueError as e:
            assert "cannot be split" in str(e)
            outcomes.append(False)
            return
        assert text.calibration and text.heldout
        assert not runs(text.calibration) & runs(text.heldout)
        assert sorted(text.calibration + text.heldout) == sorted(set(docs))
        rng.shuffle(docs)
        assert load_text(write_jsonl(tmp_path / "docs.jsonl", docs)) == text
        outcomes.append(bool(runs(docs)))
    check()
    assert sum(outcomes) > 30  # enough were split although they had runs to share


def words(prefix, n): return " ".join(f"{prefix}{i}" for i in range(n))


@pytest.mark.parametrize("n, groups", [(12, [[0], [1]]), (13, [[0, 1]])])
def test_thirteen_words_join(n, groups):
    assert shared_runs([f"one {words('w', n)} two", f"Three: {words('W', n)}; four"]) == groups


def test_a_chain_of_copies_stays_together():
    a, b = words("a", 13), words("b", 13)
    assert shared_runs([a, "alone", f"{a} {b}", "alone too", b]) == [[0, 2, 4], [1], [3]]


def test_long_group_is_never_held_out(tmp_path):
    docs = [words("w", 13) + f" {words(f'x{i}', 20)}" for i in range(8)] + ["short and alone", "another one alone"]
    assert load_text(write_jsonl(tmp_path / "docs.jsonl", docs)).heldout == ["another one alone", "short and alone"]


def test_sha256_depends_on_text_alone(tmp_path):
    docs = [f"document {i} {words(f'd{i}x', 5)}" for i in range(10)]
    files = {"a.jsonl": docs, "b.jsonl": docs[::-1], "c.jsonl": docs + ["more"]}
    texts = [load_text(write_jsonl(tmp_path / name, d)) for name, d in files.items()]
    assert [t.data for t in texts] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert texts[0].sha256 == texts[1].sha256 != texts[2].sha256


def test_split_of_boolq_is_what_it_was():
    text = load_text("boolq")
    recorded = "f9ec384ff387bf59fa008a1593a96f3dea5806a01beb6bd49c0f4888d6b96371"  # in profiles in the world
    assert text.hub is None and text.sha256 == recorded


# Files

@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
@pytest.mark.parametrize("content", ["", "\n \n\n"])
def test_file_without_text(tmp_path, suffix, content):
    path = tmp_path / f"empty{suffix}"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"empty{suffix}' holds no text"): load_text(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".txt"])
def test_missing_file(tmp_path, suffix):
    with pytest.raises(FileNotFoundError, match=f"nowhere{suffix}"): load_text(tmp_path / f"nowhere{suffix}")


@pytest.mark.parametrize("line", [
    "{'text': 'single quotes'}", '{"text": "cut off', '{"Text": "capital"}', '["text"]', '"text"', "7",
    '{"text": 7}', '{"text": null}'])
def test_malformed_line_is_numbered(tmp_path, line):
    (tmp_path / "bad.jsonl").write_text(f'{{"text": "good"}}\n\n{line}\n{{"text": "good too"}}\n')
    with pytest.raises(ValueError, match="bad.jsonl, line 3: expected a JSON object with a 'text' field"):
        documents(tmp_path / "bad.jsonl")


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_only_newlines_end_a_line(tmp_path, mark):
    docs = [f"before{mark}after", "second"]
    assert documents(write_jsonl(tmp_path / "docs.jsonl", docs, ensure_ascii=False)) == docs


@pytest.mark.parametrize("docs", [["the only document there is"], ["the same twice"] * 2])
def test_one_document_cannot_be_split(tmp_path, docs):
    with pytest.raises(ValueError, match="one.jsonl' cannot be split"):
        load_text(write_jsonl(tmp_path / "one.jsonl", docs))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", ["own", "own:v2"])
def test_column_of_a_file(tmp_path, suffix, name):
    path, docs = tmp_path / f"{name}{suffix}", [f"document {i}" for i in range(9)]
    if suffix == ".jsonl": path.write_text("".join(json.dumps(dict(text=f"other {d}", body=d)) + "\n" for d in docs))
    else: pq.write_table(pa.table(dict(text=[f"other {d}" for d in docs], body=docs)), path)
    assert documents(path) == documents(f"{path}:text") == [f"other {d}" for d in docs]
    assert documents(f"{path}:body") == docs
    assert [load_text(d).data for d in (path, f"{path}:body")] == [f"{name}{suffix}", f"{name}{suffix}:body"]


@pytest.mark.parametrize("column, docs", [
    ("text", ["a", "b", "c"]), ("gaps", ["a", "c"]), ("repeated", ["a", "b", "a"])])
def test_parquet_columns_that_hold_text(tmp_path, column, docs):
    repeated = pa.array(["a", "b", "a"]).dictionary_encode()
    table = pa.table(dict(text=["a", "b", "c"], gaps=["a", None, "c"], repeated=repeated))
    pq.write_table(table, tmp_path / "own.parquet")
    assert documents(f"{tmp_path}/own.parquet:{column}") == docs


@pytest.mark.parametrize("rows", [0, 3])
def test_parquet_column_that_is_not_there(tmp_path, rows):
    pq.write_table(pa.table(dict(body=["a"] * rows, n=pa.array([1] * rows))), tmp_path / "own.parquet")
    with pytest.raises(ValueError, match="own.parquet has no column 'text'; choose one of body, n"):
        documents(tmp_path / "own.parquet")


def test_parquet_column_that_is_no_text(tmp_path):
    pq.write_table(pa.table(dict(n=[1, 2])), tmp_path / "own.parquet")
    with pytest.raises(ValueError, match="column 'n' of .*own.parquet holds int, not text"):
        documents(f"{tmp_path}/own.parquet:n")


def test_file_that_is_no_parquet(tmp_path):
    (tmp_path / "own.parquet").write_text("text")
    with pytest.raises(ValueError, match="own.parquet cannot be read as a parquet file: "):
        documents(tmp_path / "own.parquet")


def test_text_file_has_no_columns(tmp_path):
    (tmp_path / "own.txt").write_text("text")
    with pytest.raises(ValueError, match="a .txt file has no columns, so .*own.txt' cannot have 'text'; leave it out"):
        documents(f"{tmp_path}/own.txt:text")


def test_text_file_loses_nothing(tmp_path):
    paragraphs = [words(f"p{i}x", 50) for i in range(60)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    pages = documents(tmp_path / "book.txt")
    assert [p for page in pages for p in page.split("\n\n") if p] == paragraphs
    assert len(pages) > 2 and all(4000 <= len(page) < 4600 for page in pages[:-1])


# The Hub

SHARED = Path(os.environ.get("ENTRODROP_SHARED") or Path(__file__).parents[2] / "shared")
OFFLINE = "use what needs no network: pydoc, boolq, or a path ending in .jsonl, .parquet, .txt"


@pytest.fixture
def online(monkeypatch):
    "As if HF_HUB_OFFLINE were not set"
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(monkeypatch):
    "Stands in for the Hub: gives `rows`, and notes what it was asked for and how many rows were taken"
    fake = SimpleNamespace(rows=[dict(text="a document")], asked=[], taken=0)
    def load_dataset(name, config, **options):
        def stream():
            for row in fake.rows:
                fake.taken += 1
                yield row
        fake.asked.append((name, config, options))
        return stream()
    monkeypatch.setattr(calibration, "load_dataset", load_dataset)
    return fake


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data set `owner/name` that the real library reads: a column of text, one of numbers, and gaps.

    Prepared data go to a cache of the test's own."""
    (tmp_path / "owner/name/en").mkdir(parents=True)
    with gzip.open(tmp_path / "owner/name/en/shard.json.gz", "wt") as f:
        for i in range(100):
            text = None if i % 5 == 4 else f"document {i} {words(f'd{i}x', 20)}"
            f.write(json.dumps(dict(number=i, text=text)) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "owner/name"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "The validation and test splits of WikiText-2, as the library keeps what it has downloaded"
    if not (SHARED / "hub/Salesforce___wikitext").is_dir():
        pytest.skip("needs a cache of WikiText-2: make test ENTRODROP_SHARED=folder with hub/")
    shutil.copytree(SHARED / "hub/Salesforce___wikitext", tmp_path / "Salesforce___wikitext")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))


@pytest.mark.parametrize("data, name, config, files, split, column, streaming", [
    ("c4", "allenai/c4", None, "en/c4-train.00000-of-01024.json.gz", "train", "text", True),
    ("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", None, "train", "text", False),
    ("law", "AdaptLLM/law_knowledge_prob", None, None, "test", "text", False),
    ("medicine", "AdaptLLM/med_knowledge_prob", "Medicine", None, "test", "exp", False),
    ("owner/name", "owner/name", None, None, "train", "text", True),
    ("o-1/n_a.m-e:c", "o-1/n_a.m-e", "c", None, "train", "text", True),
    ("owner/name::s", "owner/name", None, None, "s", "text", True),
    ("owner/name:::f", "owner/name", None, None, "train", "f", True),
    ("owner/name:c:s:f", "owner/name", "c", None, "s", "f", True),
])
def test_what_the_hub_is_asked_for(hub, data, name, config, files, split, column, streaming):
    hub.rows = [{column: "the text", "other": "another text"}]
    assert documents(data) == ["the text"]
    assert hub.asked == [(name, config, dict(data_files=files, split=split, streaming=streaming))]


def test_stream_stops_where_it_has_enough(hub):
    hub.rows = ({"text": f"document {i}"} for i in range(10_000))
    assert documents("c4", limit=7) == [f"document {i}" for i in range(7)]
    assert hub.taken == 7


def test_rest_of_a_shard_is_never_read(tmp_path, monkeypatch):
    rng = random.Random(0)
    docs = [rng.randbytes(1000).hex() for _ in range(40_000)]
    whole = gzip.compress("".join(json.dumps(dict(text=d)) + "\n" for d in docs).encode(), compresslevel=1)
    half = whole[:len(whole) // 2]  # what comes after is missing, which only a reader who goes there can notice
    (tmp_path / "shard.json.gz").write_bytes(half)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(HUB, "mine", Hub(str(tmp_path), files="*.json.gz"))
    assert documents("mine", limit=500) == docs[:500]
    with pytest.raises(OSError, match="could not be read"): documents("mine", limit=40_000)


def test_limit_counts_documents_with_text(hub):
    hub.rows = ({"text": (None, " \n", f"document {i}")[i % 3]} for i in range(10_000))
    assert documents("owner/name", limit=2) == ["document 2", "document 5"]
    assert hub.taken == 6


def test_default_limit_is_2000(hub):
    hub.rows = ({"text": f"document {i} {words(f'd{i}x', 5)}"} for i in range(10_000))
    text = load_text("c4")
    assert len(text.calibration) + len(text.heldout) == hub.taken == 2000
    assert text.hub["limit"] == 2000


@pytest.mark.parametrize("limit", [0, -1, 2.5, None, "10"])
def test_limit_that_is_no_count(hub, limit):
    with pytest.raises(ValueError, match=f"limit must be a whole number of at least 1, got {limit!r}"):
        load_text("c4", limit=limit)
    assert not hub.asked


def test_other_sources_have_no_limit(tmp_path):
    assert len(documents(write_jsonl(tmp_path / "docs.jsonl", ["a", "b", "c"]), limit=2)) == 3
    assert len(documents("boolq")) > 2000


def test_provenance_says_what_was_taken_from_the_hub(hub):
    hub.rows = [{"text": f"{i} " * 9} for i in range(100)]
    text = load_text("owner/name:c", limit=30)
    place = dict(id="owner/name", config="c", files=None, split="train", column="text", limit=30)
    drawn = dict(data="owner/name:c", sha256=text.sha256, samples=2, length=4, seed=6, hub=place)
    assert calibration_batch(numbers, text, 2, 4, 6).provenance == drawn
    assert text == load_text("owner/name:c", limit=30) and text.sha256 != load_text("owner/name:c", limit=31).sha256


def test_table_can_be_extended(folder, monkeypatch):
    monkeypatch.setitem(HUB, "mine", Hub(str(folder), files="en/*.json.gz"))
    assert len(load_text("mine", limit=30).calibration) > 20
    with pytest.raises(ValueError, match="choose pydoc, boolq, c4, wikitext2, law, medicine, mine, a path ending in"):
        documents("nowhere")


@pytest.mark.parametrize("streaming", [True, False])
def test_the_real_library_reads_in_order(folder, monkeypatch, streaming):
    monkeypatch.setitem(HUB, "mine", Hub("owner/name", streaming=streaming))
    docs = documents("mine", limit=20)
    assert [int(d.split()[1]) for d in docs] == [i for i in range(25) if i % 5 != 4]
    if streaming: assert documents("owner/name", limit=20) == docs


@pytest.mark.parametrize("data, message", [
    ("owner/name:::body", "owner/name (default config, split train) has no column 'body'; choose one of number, text"),
    ("owner/name:::number", "column 'number' of owner/name (default config, split train) holds int, not text; "
     "choose one of number, text"),
    ("owner/name::dev", "owner/name (default config, split dev) was not found: Bad split: dev. "
     "Available splits: ['train']; choose as owner/name:config:split:column"),
    ("owner/name:fr", "owner/name (config fr, split train) was not found: BuilderConfig 'fr' not found. "
     "Available: ['default']; choose as owner/name:config:split:column"),
])
def test_what_there_is_instead(folder, data, message):
    with pytest.raises(ValueError) as e: documents(data)
    assert str(e.value) == message


def test_config_has_to_be_chosen(folder):
    configs = "- {config_name: a, data_files: en/*}\n- {config_name: b, data_files: en/*}\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert len(documents("owner/name:b", limit=3)) == 3
    choice = re.escape("available configs: ['a', 'b']; choose as owner/name:config:split:column")
    with pytest.raises(ValueError, match=choice): documents("owner/name")


def test_data_files_that_are_not_there(folder, monkeypatch):
    monkeypatch.setitem(HUB, "mine", Hub("owner/name", files="fr/*.json.gz"))
    missing = r"owner/name \(data file fr/\*.json.gz, split train\) could not be read .*: check its files; or use"
    with pytest.raises(FileNotFoundError, match=missing): documents("mine")


@pytest.mark.parametrize("streaming", [True, False])
def test_data_file_that_is_malformed(folder, monkeypatch, streaming):
    (folder / "broken.jsonl").write_text('{"text": "good"}\n{"text": oops}\n')
    monkeypatch.setitem(HUB, "mine", Hub("owner/name", files="broken.jsonl", streaming=streaming))
    broken = r"owner/name \(data file broken.jsonl, split train\) has a file that cannot be read: JSON parse error"
    with pytest.raises(ValueError, match=broken): documents("mine")


@pytest.mark.parametrize("data, message", [
    ("a/b:c:d:e:f", "'a/b:c:d:e:f' has 5 parts; expected owner/name[:config][:split][:column]"),
    *[(data, f"unknown text source {data!r}; choose pydoc, boolq, c4, wikitext2, law, medicine, "
       "a path ending in .jsonl, .parquet, .txt, or owner/name[:config][:split][:column]")
      for data in ("c4:en", "a/b/c", "/a", "./a", "owner/", "name.csv")]])
def test_names_that_mean_nothing(hub, data, message):
    with pytest.raises(ValueError) as e: documents(data)
    assert str(e.value) == message and not hub.asked


# The Hub out of reach

@pytest.mark.parametrize("data, tried", [
    ("c4", "allenai/c4 (data file en/c4-train.00000-of-01024.json.gz, split train)"),
    ("medicine", "AdaptLLM/med_knowledge_prob (config Medicine, split test)"),
    ("nobody/nothing", "nobody/nothing (default config, split train)")])
def test_offline(tmp_path, monkeypatch, data, tried):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("tries again although it is offline"))
    with pytest.raises(ConnectionError) as e: documents(data)
    assert str(e.value) == (f"{tried} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it: "
                            f"unset that where there is a network; or {OFFLINE}")


def answer(error, **fields):
    return error("the server's words", response=SimpleNamespace(headers={}, request=None), **fields)


@pytest.mark.parametrize("raised, error, why", [
    (lambda: answer(GatedRepoError), PermissionError,
     "is gated: accept its terms at https://huggingface.co/datasets/o/n "
     "and log in with `hf auth login` or set HF_TOKEN"),
    (lambda: answer(RepositoryNotFoundError), FileNotFoundError,
     "is not on the Hub, or it is private: check https://huggingface.co/datasets/o/n, "
     "and for a private one log in with `hf auth login` or set HF_TOKEN"),
    (lambda: TimeoutError("too\nslow"), ConnectionError,
     "could not be read (TimeoutError: too slow): check the network and https://huggingface.co/datasets/o/n, "
     "or set HF_HUB_OFFLINE=1 to read a copy in the cache")])
@pytest.mark.parametrize("request_", ["dataset_info", "auth_check"])
def test_refused(hub, online, monkeypatch, request_, raised, error, why):
    def refuse(*args, **options): raise raised()
    api = SimpleNamespace(dataset_info=lambda *args, **options: None, auth_check=lambda *args, **options: None)
    setattr(api, request_, refuse)
    monkeypatch.setattr(calibration, "HfApi", lambda: api)
    with pytest.raises(error) as e: documents("o/n")
    assert str(e.value) == f"o/n (default config, split train) {why}; or {OFFLINE}"
    assert not hub.asked  # what would try again and again


def test_connection_lost_on_the_way(hub, online, monkeypatch):
    def granted(*args, **options): return None
    monkeypatch.setattr(calibration, "HfApi", lambda: SimpleNamespace(dataset_info=granted, auth_check=granted))
    def rows():
        yield dict(text="the first")
        raise ConnectionResetError("gone")
    hub.rows = rows()
    with pytest.raises(ConnectionError, match=r"could not be read \(ConnectionResetError: gone\)"): documents("o/n")
    hub.rows = rows()
    assert documents("o/n", limit=1) == ["the first"]


def test_no_network_is_noticed_soon():
    "In another process, since the libraries read the flag and the address when they are imported"
    code = """import time
from entrodrop.calibration import documents
start = time.monotonic()
try: documents("c4")
except ConnectionError as e: print(e, time.monotonic() - start, sep="\\n")"""
    env = {k: v for k, v in os.environ.items() if "OFFLINE" not in k and not k.lower().endswith("_proxy")}
    env["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody listens there
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    said, seconds = run.stdout.splitlines()
    shard = "allenai/c4 (data file en/c4-train.00000-of-01024.json.gz, split train)"
    assert said.startswith(f"{shard} could not be read (ConnectError") and said.endswith(OFFLINE)
    assert float(seconds) < 10  # the library by itself tries six times, with waits of 23 s between


# What the library has in its cache

@pytest.mark.parametrize("split", ["test", "validation"])
@pytest.mark.parametrize("config", ["wikitext-2-raw-v1", ""])
def test_cached_copy_is_read_offline(cache, split, config):
    articles = documents(f"Salesforce/wikitext:{config}:{split}")
    assert len(articles) == 60  # as many as WikiText-2 has in either split
    assert all(re.match(r" = [^=\n]+ = \n", a) for a in articles)
    rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)["text"]
    assert "".join(articles) == "".join(rows)


def test_cached_copy_that_was_downloaded_whole(cache, monkeypatch):
    monkeypatch.setitem(HUB, "wikitext2", replace(HUB["wikitext2"], split="test"))
    text = load_text("wikitext2")
    assert len(text.calibration) + len(text.heldout) == 60
    assert min(map(len, text.calibration)) > 1000 and text.hub["split"] == "test"


@pytest.mark.parametrize("data, what", [
    ("wikitext2", "Unknown split \"train\". Should be one of ['test', 'validation']"),
    ("Salesforce/wikitext:wikitext-103-v1:test", "Available configs in the cache: ['wikitext-2-raw-v1']")])
def test_what_the_cache_has_instead(cache, data, what):
    with pytest.raises(ValueError, match="is not in the cache, and HF_HUB_OFFLINE forbids to fetch it") as e:
        documents(data)
    assert f"{what}; choose as owner/name:config:split:column; or {OFFLINE}" in str(e.value)


@pytest.mark.parametrize("rows, articles", [
    (["", " = A = \n", "", " text \n", " = not = \n", "", " = = B = = \n", "", " = C d = \n", "", " more \n"],
     [" = A = \n text \n = not = \n = = B = = \n", " = C d = \n more \n"]),
    ([" before \n", "", " = A = \n"], [" before \n", " = A = \n"]),
    ([" = \n", "", " = = \n"], [" = \n = = \n"])])
def test_titles_begin_articles(hub, rows, articles):
    hub.rows = [dict(text=row) for row in rows]
    assert documents("Salesforce/wikitext:wikitext-103-raw-v1") == articles


def test_web_pages_by_way_of_a_stream(tmp_path, monkeypatch):
    if not (SHARED / "text/c4_sample.jsonl").is_file():
        pytest.skip("needs a sample of C4: make test ENTRODROP_SHARED=folder with text/c4_sample.jsonl")
    shard = tmp_path / HUB["c4"].files
    shard.parent.mkdir()
    shard.write_bytes(gzip.compress((SHARED / "text/c4_sample.jsonl").read_bytes()))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(HUB, "c4", replace(HUB["c4"], id=str(tmp_path)))
    text = load_text("c4", limit=150)
    assert sorted(text.calibration + text.heldout) == sorted(documents(SHARED / "text/c4_sample.jsonl")[:150])
    assert .1 < sum(map(len, text.heldout)) / sum(map(len, text.calibration + text.heldout)) < .4


# Calibration samples

def test_batch_is_the_seed_s_alone():
    text, batches = Text("t", counted(30, 40, 50), []), []
    for seed in range(10):
        random.seed(seed % 3)  # other people's randomness
        state = random.getstate()
        first, again = (calibration_batch(numbers, text, samples=4, length=8, seed=seed).ids for _ in range(2))
        assert torch.equal(first, again) and random.getstate() == state
        batches.append(tuple(first.flatten().tolist()))
    assert len(set(batches)) == 10


def test_samples_are_whole_windows_of_long_enough_documents():
    text = Text("t", counted(7, 20, 3, 8), counted(50))
    ids = calibration_batch(numbers, text, samples=200, length=8).ids
    assert (ids.diff() == 1).all()
    assert set(ids[:, 0].tolist()) == {*range(7, 20), 30}  # every start in the second document, the one in the last


def test_provenance_says_what_was_drawn():
    text = Text("t", counted(30), counted(5))
    drawn = dict(data="t", sha256=text.sha256, samples=2, length=4, seed=6)
    assert calibration_batch(numbers, text, 2, 4, 6).provenance == drawn


def test_length_beyond_every_document():
    with pytest.raises(ValueError, match="length=31 tokens, the longest has 30; choose a smaller length"):
        calibration_batch(numbers, Text("t", counted(10, 30, 20), []), length=31)


@pytest.mark.parametrize("wrong", [
    dict(samples=0), dict(samples=2.5), dict(length=0), dict(length=-8), dict(length="8")])
def test_numbers_that_are_no_counts(wrong):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got {value!r}"):
        calibration_batch(numbers, Text("t", counted(30), []), **wrong)


# Held-out windows

@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.lists(st.integers(1, 80), min_size=1, max_size=8), st.integers(1, 12), st.integers(2, 30),
       st.sampled_from([numbers, marked]))
def test_windows_do_not_overlap_and_come_from_all_documents(lengths, windows, length, tokenizer):
    text, size = Text("t", [], counted(*lengths)), length - (tokenizer is marked)
    there = [n // size for n in lengths]
    if sum(there) < windows:
        with pytest.raises(ValueError, match=f"has {sum(there)} windows of {length} tokens, not {windows}"):
            heldout_windows(tokenizer, text, windows, length)
        return
    ids = heldout_windows(tokenizer, text, windows, length)
    assert ids.shape == (windows, length)
    if tokenizer is marked: assert (ids[:, 0] == -1).all()
    ids = ids[:, length - size:]
    assert (ids.diff() == 1).all() and len(ids.unique()) == windows * size
    used = np.searchsorted(np.cumsum(lengths), ids[:, 0].numpy(), side="right")
    counts = np.bincount(used, minlength=len(lengths))
    assert all(counts[i] == there[i] or counts[i] >= counts.max() - 1 for i in range(len(lengths)))


# Perplexity

def test_is_exp_of_the_library_s_loss(decoder, ids):
    with torch.inference_mode(): loss = decoder(ids, labels=ids).loss.item()
    assert perplexity(decoder, ids).interval()[0] == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_batch_size_does_not_matter(decoder, ids, batch_size):
    assert perplexity(decoder, ids, batch_size).nll == pytest.approx(perplexity(decoder, ids, 3).nll, rel=1e-5)


def test_interval_and_ratio_by_hand():
    this, other = Perplexity((1., 2., 6.)), Perplexity((1., 1., 4.))  # differences 0, 1, 2: mean 1, deviation 1
    quantile = 4.30265  # of t, at 97.5 % and 2 degrees of freedom
    expected = [math.exp(1 + side * quantile / math.sqrt(3)) for side in (0, -1, 1)]
    assert this.ratio(other) == pytest.approx(expected, rel=1e-4)
    half = quantile * math.sqrt((4 + 1 + 9) / 2) / math.sqrt(3)
    assert this.interval() == pytest.approx([math.exp(3 + side * half) for side in (0, -1, 1)], rel=1e-4)
    assert this.ratio(other)[0] == pytest.approx(1 / other.ratio(this)[0])


def test_windows_of_one_document_count_once():
    this, other = Perplexity((1., 2., 6.)), Perplexity((1., 1., 4.))
    copies, others = Perplexity(this.nll * 3), Perplexity(other.nll * 3)
    documents = ["a", "b", "c"] * 3
    assert copies.interval(documents) == pytest.approx(this.interval())
    assert copies.ratio(others, documents) == pytest.approx(this.ratio(other))
    assert copies.interval()[2] < this.interval()[2]
    with pytest.raises(ValueError, match="9 values, but 3 groups"): copies.interval(["a", "b", "c"])


@pytest.mark.parametrize("shape", [(40,), (1, 40), (4, 1), (2, 3, 40)])
def test_windows_of_the_wrong_shape(llama, shape):
    with pytest.raises(ValueError, match=re.escape(f"both at least 2, got {shape}")):
        perplexity(llama, torch.ones(shape, dtype=int))


def test_the_document_of_every_window_is_known():
    class Words:
        bos_token_id = 0
        def __call__(self, text, verbose): return SimpleNamespace(input_ids=[0, *map(int, text.split())])
    numbers = [range(100, 130), range(200, 207), range(300, 319)]
    text = Text("made up", [], [" ".join(map(str, n)) for n in numbers])
    windows, documents = (f(Words(), text, 6, 6) for f in (heldout_windows, window_documents))
    assert documents == [0, 1, 2, 0, 2, 0]
    assert all(ids[0] == 0 and {*ids[1:].tolist()} <= {*numbers[d]} for ids, d in zip(windows, documents, strict=True))
    assert len({int(i) for ids in windows for i in ids[1:]}) == 6 * 5  # none overlaps
