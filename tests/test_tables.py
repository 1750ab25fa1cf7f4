"""The committed tables are those that the notebooks write; `make test` runs them into build/test/figures first."""
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from entrodrop.regenerate import notebook_parameters, read_runs

ROOT = Path(__file__).parent.parent
COMMITTED, WRITTEN = (ROOT / folder / "smollm2-135m" for folder in ("figures", "build/test/figures"))
# time and memory, which differ from run to run
MEASURED = {"speed.csv": ["seconds", "ratio", "low", "high", "peak_bytes"], "tradeoff.csv": ["speedup"]}


def same_parameters(notebook, recorded):
    "Whether a notebook's defaults, with which `make test` runs it, are those of a committed run, or None"
    defaults = notebook_parameters(ROOT / f"nbs/{notebook}.ipynb")
    return all(value in (None, recorded.get(name)) for name, value in defaults.items() if name != "out")


TABLES = [(notebook, name) for notebook, run in read_runs(COMMITTED).items() for name in run["files"]
          if name.endswith(".csv") and same_parameters(notebook, run["parameters"])]


def circumstances(folder):
    "The model and the text of a folder's profile; other versions of Python carry other help topics"
    profile = json.loads((folder / "profile.json").read_text())
    return profile["model"]["fingerprint"], profile["tokens_sha256"]


def assert_same(written, committed, without=()):
    "Numbers may differ by a thousandth, as from one processor to another; all else must be equal"
    written, committed = (table.drop(columns=list(without)) for table in (written, committed))
    pd.testing.assert_frame_equal(written, committed, rtol=1e-3, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("name", [name for _, name in TABLES])
def test_make_test_writes_the_committed_table(name):
    if not (WRITTEN / name).exists(): pytest.skip("no tables in build/test/figures: make test runs the notebooks first")
    if circumstances(WRITTEN) != circumstances(COMMITTED):
        pytest.skip("this Python has other help topics: make test on the one that profile.json names")
    written, committed = (pd.read_csv(folder / name) for folder in (WRITTEN, COMMITTED))
    if "task" in written and set(written.task) != set(committed.task):
        pytest.skip("the tasks come from a copy of the Hub's data: make test without HF_DATASETS_CACHE")
    assert_same(written, committed, MEASURED.get(name, ()))


def test_which_tables_are_compared():
    expected = {"perplexity-attention.csv", "accuracy-limit4.csv", "findings-limit4.csv", "tasks-limit4.csv", *MEASURED}
    assert expected <= {name for _, name in TABLES}


def test_what_is_a_difference():
    table = pd.DataFrame(dict(method=["cosine", "bucket"], k=[4, 8], value=[1.27, 3e5], seconds=[1., 2.]))
    assert_same(table.assign(value=table.value * 1.0005, seconds=9.), table, ["seconds"])
    others = [table.assign(value=table.value * 1.002), table.assign(k=[4, 9]), table.assign(method="cosine"), table[:1],
              table[::-1], table.assign(value=[np.nan, 3e5]), table.rename(columns=dict(value="ratio"))]
    for other in others:
        with pytest.raises(AssertionError): assert_same(other, table)
