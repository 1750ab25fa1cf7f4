"The study notebooks end to end on a small model, where the answer is known by construction"
import json
import random
import re

import pandas as pd
import papermill
import pytest
from test_notebooks import execute, printed

SMALL = dict(protection="none", samples=4, length=32, seeds=[1, 2], ks=[1, 2, 9], bins=8, neighbour=5, probes=["same"],
             lengths=[16], counts=[1, 4, 8], resamples=50, subsets=20)


def write_documents(path, words, seed):
    "Twelve documents of random words, none with a run of 13 words in common"
    rng = random.Random(seed)
    documents = [" ".join(rng.choices(words, k=60)) for _ in range(12)]
    path.write_text("".join(json.dumps(dict(text=text)) + "\n" for text in documents))
    return str(path)


def run(folder, out, **parameters):
    "Execute the study; returns the files it wrote, by name, and its text outputs"
    parameters = SMALL | dict(model=str(folder), out=str(out)) | parameters
    notebook = execute("studies/calibration_sets", out.with_suffix(".ipynb"), parameters, out.parent)
    return {p.name: p.read_bytes() for p in sorted(out.iterdir())}, printed(notebook)


@pytest.fixture(scope="module")
def study(word_folder, tmp_path_factory):
    """One file under two names and a third of other words, studied twice: fresh, and with the profiles of the first
    time"""
    folder = tmp_path_factory.mktemp("study")
    one = write_documents(folder / "one.jsonl", ["tree", "house", "river", "stone", "cloud"], 0)
    other = write_documents(folder / "two.jsonl", list("0123456789"), 1)
    sources = dict(same=one, again=one, other=other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENTRODROP_CACHE", str(folder / "cache"))
        yield [run(word_folder, folder / name, sources=sources) for name in "ab"]


def test_a_study_writes_the_same_bytes_again(study):
    (first, _), (second, _) = study
    assert {"record.json", "sources-attention.png", "agreement-attention.svg", "amounts-attention.csv",
            "boundaries.csv"} <= set(first)
    assert first == second


def table(study, name): return pd.read_csv(pd.io.common.BytesIO(study[0][0][f"{name}-attention.csv"]))


def test_one_text_under_two_names_agrees_with_itself_where_the_draw_is_the_same(study):
    t = table(study, "pairs")
    t = t[t.measure == "Spearman"].set_index(["criterion", "first", "second"])
    value = t.value.unstack(["first", "second"])
    within, between = value["same", "same"], value["same", "again"]
    # of the four pairs of draws two are identical, and two are the seeds
    assert ((between - (1 + within) / 2).abs() < 2e-4).all()


def test_an_interval_holds_its_value_and_a_k_beyond_the_layers_is_left_out(study):
    t = table(study, "agreement")
    assert ((t.low <= t.value) & (t.value <= t.high)).all()
    assert "first 1" in set(t.measure) and "first 9" not in set(t.measure)


def test_all_of_the_pool_is_one_subset(study):
    t = table(study, "amounts")
    assert t.low.isna().equals(t.samples == 8)
    assert set(t.length) == {16, 32}


def test_tables_and_record_name_sources_without_their_folders(study):
    files, shown = study[0]
    record = json.loads(files["record.json"])
    assert {p["text"]["data"] for p in record["profiles"]} == {"one.jsonl", "two.jsonl"}
    del record["model"]["name"]  # the model's own folder, as it was given
    written = [b.decode() for n, b in files.items() if n.endswith((".csv", ".txt", ".svg"))]
    text = json.dumps(record) + shown + "".join(written)
    assert not re.search(r"(?<![\w.:/~}<])/(?:home|root|tmp|work|Users)/\w", text)


@pytest.mark.parametrize("wrong,message", [
    (dict(sources=["pydoc"]), "at least two sources and two seeds"),
    (dict(neighbour=16), "sequences of \\[16\\] tokens have no neighbour number 16"),
    (dict(sources=["pydoc", "boolq"], probes=["c4"]),
     "unknown probes \\['c4'\\]; choose from the sources pydoc, boolq")])
def test_impossible_parameters_are_refused_before_anything_is_measured(word_folder, tmp_path, wrong, message):
    parameters = dict(sources=["pydoc", "boolq"], probes=["pydoc"]) | wrong
    with pytest.raises(papermill.exceptions.PapermillExecutionError, match=message):
        run(word_folder, tmp_path / "out", **parameters)
    assert not (tmp_path / "out").exists()
