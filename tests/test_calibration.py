"""Text sources and their split, token windows, and perplexity: properties, bad input, and sums done by hand."""
import json
import math
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from entrodrop.calibration import Perplexity, Text, calibration_batch, documents, heldout_windows, load_text, perplexity, shared_runs


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
    return [" ".join(map(str, range(end - length, end))) for end, length in zip(ends, lengths)]


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
    texts = [load_text(write_jsonl(tmp_path / name, d)) for name, d in (("a.jsonl", docs), ("b.jsonl", docs[::-1]), ("c.jsonl", docs + ["more"]))]
    assert [t.data for t in texts] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert texts[0].sha256 == texts[1].sha256 != texts[2].sha256


# Files

@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
@pytest.mark.parametrize("content", ["", "\n \n\n"])
def test_file_without_text(tmp_path, suffix, content):
    path = tmp_path / f"empty{suffix}"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"empty{suffix}' holds no text"): load_text(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_missing_file(tmp_path, suffix):
    with pytest.raises(FileNotFoundError, match=f"nowhere{suffix}"): load_text(tmp_path / f"nowhere{suffix}")


@pytest.mark.parametrize("line", [
    "{'text': 'single quotes'}", '{"text": "cut off', '{"Text": "capital"}', '["text"]', '"text"', "7",
    '{"text": 7}', '{"text": null}'])
def test_malformed_line_is_numbered(tmp_path, line):
    (tmp_path / "bad.jsonl").write_text(f'{{"text": "good"}}\n\n{line}\n{{"text": "good too"}}\n')
    with pytest.raises(ValueError, match="bad.jsonl, line 3: expected a JSON object with a 'text' field"): documents(tmp_path / "bad.jsonl")


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_only_newlines_end_a_line(tmp_path, mark):
    docs = [f"before{mark}after", "second"]
    assert documents(write_jsonl(tmp_path / "docs.jsonl", docs, ensure_ascii=False)) == docs


@pytest.mark.parametrize("docs", [["the only document there is"], ["the same twice"] * 2])
def test_one_document_cannot_be_split(tmp_path, docs):
    with pytest.raises(ValueError, match="one.jsonl' cannot be split"): load_text(write_jsonl(tmp_path / "one.jsonl", docs))


def test_text_file_loses_nothing(tmp_path):
    paragraphs = [words(f"p{i}x", 50) for i in range(60)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    pages = documents(tmp_path / "book.txt")
    assert [p for page in pages for p in page.split("\n\n") if p] == paragraphs
    assert len(pages) > 2 and all(4000 <= len(page) < 4600 for page in pages[:-1])


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
    assert set(ids[:, 0].tolist()) == {*range(7, 20), 30}  # every start in the second document, the only one in the last


def test_provenance_says_what_was_drawn():
    text = Text("t", counted(30), counted(5))
    assert calibration_batch(numbers, text, 2, 4, 6).provenance == dict(data="t", sha256=text.sha256, samples=2, length=4, seed=6)


def test_length_beyond_every_document():
    with pytest.raises(ValueError, match="length=31 tokens, the longest has 30; choose a smaller length"):
        calibration_batch(numbers, Text("t", counted(10, 30, 20), []), length=31)


@pytest.mark.parametrize("wrong", [dict(samples=0), dict(samples=2.5), dict(length=0), dict(length=-8), dict(length="8")])
def test_numbers_that_are_no_counts(wrong):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got {value!r}"):
        calibration_batch(numbers, Text("t", counted(30), []), **wrong)


# Held-out windows

@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.lists(st.integers(1, 80), min_size=1, max_size=8), st.integers(1, 12), st.integers(2, 30), st.sampled_from([numbers, marked]))
def test_windows_do_not_overlap_and_come_from_all_documents(lengths, windows, length, tokenizer):
    text, size = Text("t", [], counted(*lengths)), length - (tokenizer is marked)
    there = [n // size for n in lengths]
    if sum(there) < windows:
        with pytest.raises(ValueError, match=f"has {sum(there)} windows of {length} tokens, not {windows}"): heldout_windows(tokenizer, text, windows, length)
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
    this, other = Perplexity((1., 2., 6.)), Perplexity((1., 1., 4.))  # differences 0, 1, 2: mean 1, deviation 1; t at 97.5 % and 2 degrees of freedom: 4.30265
    assert this.ratio(other) == pytest.approx([math.exp(1 + 4.30265 * s / math.sqrt(3)) for s in (0, -1, 1)], rel=1e-4)
    deviation = math.sqrt((4 + 1 + 9) / 2)
    assert this.interval() == pytest.approx([math.exp(3 + 4.30265 * s * deviation / math.sqrt(3)) for s in (0, -1, 1)], rel=1e-4)
    assert this.ratio(other)[0] == pytest.approx(1 / other.ratio(this)[0])


@pytest.mark.parametrize("shape", [(40,), (1, 40), (4, 1), (2, 3, 40)])
def test_windows_of_the_wrong_shape(llama, shape):
    with pytest.raises(ValueError, match=re.escape(f"both at least 2, got {shape}")): perplexity(llama, torch.ones(shape, dtype=int))
