"The code on the front page and in CONTRIBUTING.md runs as it stands, and the list of rooms is that of the package"
import ast
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from entrodrop.architectures import ARCHITECTURES
from entrodrop.calibration import SOURCES

ROOT = Path(__file__).parent.parent


def examples(page):
    "{title of the section: a Python block in it}"
    sections = re.split(r"^## ", (ROOT / page).read_text(encoding="utf-8"), flags=re.M)
    return {s.partition("\n")[0]: code for s in sections for code in re.findall(r"```python\n(.*?)```", s, re.S)}


def run(code, folder, **names):
    "Run a piece of code as a module with these names"
    (folder / "example.py").write_text(code, encoding="utf-8")
    spec = spec_from_file_location("example", folder / "example.py")
    module = module_from_spec(spec)
    vars(module).update(names)
    sys.modules["example"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("title", examples("CONTRIBUTING.md"))
def test_worked_examples_run_and_are_short(title, word_model, ids, tmp_path):
    model, tokenizer = word_model
    code, tables = examples("CONTRIBUTING.md")[title], (ARCHITECTURES, SOURCES)
    assert sum(bool(line.strip()) for line in code.splitlines()) < 20
    before = [dict(table) for table in tables]
    try: run(code, tmp_path, model=model, tokenizer=tokenizer, ids=ids)
    finally:
        for table, kept in zip(tables, before, strict=True):
            for added in table.keys() - kept.keys(): del table[added]


def test_the_front_page_prunes_heals_and_saves_a_model(word_folder, tmp_path, monkeypatch):
    (code,) = examples("README.md").values()
    smaller = {'"smollm2-135m"': repr(str(word_folder)), "first(8)": "first(2)", "samples=32": "samples=4, length=64",
               "windows=8, length=128": "windows=3, length=32"}
    for old, new in smaller.items():
        assert old in code, old
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    assert run(code, tmp_path).plan.k == 2
    assert (tmp_path / "smollm2-pruned/plan.json").exists()


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


def test_modules_import_only_from_the_lines_below_their_own():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lines = re.search(r"\*\*Rooms\.\*\*.*?```\n(.*?)```", page, re.S)[1].splitlines()
    place = {name: n for n, line in enumerate(lines) for name in re.findall(r"[a-z_]+", line)}
    modules = {p.stem: ast.parse(p.read_text(encoding="utf-8")) for p in (ROOT / "entrodrop").glob("[!_]*.py")}
    assert place.keys() == modules.keys()
    for name, tree in modules.items():
        taken = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level and n.module}
        assert all(place[other] > place[name] for other in taken), (name, taken)
