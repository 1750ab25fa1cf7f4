"""`make check`'s own eyes: each kind of fault is found in a made-up package, and none is in ours."""
import json
import re
from configparser import ConfigParser
from pathlib import Path

import pytest
from conftest import SLOW_FILES, SLOW_TESTS
from rooms import LONGEST, WIDEST, faults, rooms

ROOT = Path(__file__).parent.parent


def repository(folder, modules, cells=()):
    "A package `made` of some modules, and a notebook of some code cells with the ids 0, 1, …"
    (folder / "made").mkdir()
    (folder / "nbs/api").mkdir(parents=True)
    for name, code in modules.items(): (folder / f"made/{name}.py").write_text(code)
    cells = [dict(cell_type="code", id=str(i), source=c.splitlines(keepends=True)) for i, c in enumerate(cells)]
    cells.append(dict(cell_type="markdown", id="prose", source=["prose " * 99]))
    (folder / "nbs/api/one.ipynb").write_text(json.dumps(dict(cells=cells)))
    return folder


def found(folder, modules, cells=()): return list(faults(repository(folder, modules, cells), "made"))


@pytest.mark.parametrize("code", [
    "from .b import _y", "from made.b import x, _y", "from .b import _y as y", "def f():\n    from .b import _y",
    "from . import b\nb._y", "from made import b as c\nc._y()", "import made.b\nmade.b._y",
    "import made.b as c\nc._y.z", "import made\nmade.b._y"])
def test_a_private_name_of_another_module(tmp_path, code):
    line = len(code.splitlines())
    assert found(tmp_path, dict(a=code, b="")) == [f"made/a.py:{line}: _y is private to b"]


@pytest.mark.parametrize("code", [
    "from .b import y", "from .b import __doc__", "from . import b\nb.y._replace()\nb.f()._y", "_y = 1\n_y",
    "from . import _y", "import os\nos._exit", "from b import _y", "import b._y", "self._y", "from other.b import _y"])
def test_what_is_no_private_name_of_another_module(tmp_path, code):
    assert found(tmp_path, dict(a=code, b="")) == []


def test_a_circle_of_imports(tmp_path):
    inside = "\ndef f():\n    from . import c"
    modules = dict(a="from .b import x", b=inside, c="import made.a", d="from .a import y", e="")
    (said,) = found(tmp_path, modules)
    steps = ["made/a.py:1", "made/b.py:3", "made/c.py:1"]
    assert said.startswith("made/") and "imports run in a circle" in said
    assert re.findall(r"made/\w\.py:\d", said.split(": ")[-1])[:3] in [steps[i:] + steps[:i] for i in range(3)]


def test_modules_may_meet_again_below(tmp_path):
    modules = dict(a="from . import b, c", b="from .d import x", c="from .d import x", d="import torch")
    assert found(tmp_path, modules) == []


@pytest.mark.parametrize("directives", ["#| export", "#|exports", "#| hide\n#| export\n#| eval: false"])
def test_an_exported_cell_that_is_too_long(tmp_path, directives):
    cells = [f"{directives}\n" + "\n".join(["x = 1"] * n) for n in (LONGEST, LONGEST + 1)]
    assert found(tmp_path, {}, cells) == ["nbs/api/one.ipynb:1: 31 lines in an exported cell; 30 are allowed"]


def test_a_cell_that_is_not_exported_may_be_long(tmp_path):
    cells = ["\n".join(["x = 1"] * 99), "#| hide\n" + "\n".join(["x = 1"] * 99)]
    assert found(tmp_path, {}, cells) == []


def test_a_line_that_is_too_wide(tmp_path):
    cells = [f"x = 1\ny = '{'é' * (n - 6)}'" for n in (WIDEST, WIDEST + 1)]
    assert found(tmp_path, {}, cells) == ["nbs/api/one.ipynb:1:2: 121 columns; 120 are allowed"]


def test_a_notebook_that_uses_a_private_name(tmp_path):
    cells = ["#| export\nfrom made.b import _y", "x = 1\nfrom made.b import _y"]  # the first is the module's fault
    assert found(tmp_path, dict(b=""), cells) == ["nbs/api/one.ipynb:1:2: _y is private to b"]


def test_our_own_rooms():
    assert list(faults(ROOT)) == []


def notebooks_in_order():
    "What `make notebooks` runs, in its order"
    (names,) = re.findall(r"^NOTEBOOKS := (.*)", (ROOT / "Makefile").read_text(), re.M)
    return names.split()


def test_every_notebook_comes_after_what_it_imports():
    names, modules = notebooks_in_order(), {}
    for name in names:
        cells = json.loads((ROOT / f"nbs/{name}.ipynb").read_text())["cells"]
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        for module in re.findall(r"^#\| default_exp (\w+)", code, re.M): modules[module] = name
    files = {p.stem: p.read_text() for p in (ROOT / "entrodrop").glob("[!_]*.py")}
    assert modules.keys() == files.keys()
    for module, code in files.items():
        needs = {modules[other] for _, other, _ in rooms(code, "entrodrop", files)}
        late = {n for n in needs if names.index(n) > names.index(modules[module])}
        assert not late, f"{modules[module]} imports from {late}, which come later in NOTEBOOKS of the Makefile"


def test_every_notebook_but_the_studies_is_in_the_makefile():
    there = {str(p.relative_to(ROOT / "nbs").with_suffix("")) for p in ROOT.glob("nbs/**/*.ipynb")}
    assert sorted(notebooks_in_order()) == sorted(n for n in there if not n.startswith("studies/") and "/." not in n)


def test_one_oldest_python_everywhere():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    oldest = config["DEFAULT"]["min_python"]
    versions = re.findall(r'"(3\.\d+)"', (ROOT / ".github/workflows/test.yaml").read_text())
    assert min(versions, key=lambda v: int(v.split(".")[1])) == oldest
    assert f'target-version = "py{oldest.replace(".", "")}"' in (ROOT / ".ruff.toml").read_text()
    assert f"Python {oldest} or newer" in (ROOT / "Makefile").read_text()


def test_what_is_left_out_of_the_fast_tests_exists():
    files = (ROOT / "tests").glob("test_*.py")
    defined = {p.name: set(re.findall(r"^def (test_\w+)", p.read_text(), re.M)) for p in files}
    assert SLOW_FILES <= defined.keys()
    assert not [(file, name) for file, names in SLOW_TESTS.items() for name in names if name not in defined[file]]
