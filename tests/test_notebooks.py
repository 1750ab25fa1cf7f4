"The notebooks end to end, by papermill, on a small model in a folder; and what every committed notebook promises"
import ast
import re
from configparser import ConfigParser
from pathlib import Path

import nbformat
import papermill
import pytest

from entrodrop.models import load_model

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
SMALL = dict(data="pydoc", samples=4, length=32, bins=8, neighbour=5)
EXTRA = {
    "01_two_stage_dynamics": dict(lens_samples=2),
    "02_pruning": dict(criterion="cosine", k=2, ks=[1], windows=3, window_length=16),
    "03_benchmarks": dict(methods={"LLMDrop": ["attention", "cosine"], "EntroDrop attention": ["attention", "bucket"]},
                          ks=[1], tasks=["piqa:validation"], limit=4),
    "04_checkpoints_and_speed": dict(criterion="cosine", k=1, ks=[1], shapes=[[1, 16]], new_tokens=2, repeats=2)}


def execute(name, notebook, parameters, folder):
    "Execute a notebook in a folder"
    return papermill.execute_notebook(ROOT / f"nbs/{name}.ipynb", notebook, parameters, kernel_name="python3",
                                      progress_bar=False, cwd=str(folder))


def code_cells(nb): return [c for c in nb.cells if c.cell_type == "code"]
def printed(nb):
    outputs = (o for c in code_cells(nb) for o in c.outputs)
    return "".join(o.get("text", "") for o in outputs if o.get("name") == "stdout")


def run(name, folder, out, **parameters):
    "Execute a notebook; returns what it wrote, by file name"
    out.mkdir(exist_ok=True)
    parameters = SMALL | dict(model=str(folder), out=str(out)) | EXTRA[name] | parameters
    execute(name, out.with_suffix(".ipynb"), parameters, out.parent)
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name,expected", [
    ("01_two_stage_dynamics", {"profile.json", "profile.parquet", "entropy_by_depth.svg", "entropy_increase.png",
                               "logit_lens.svg"}),
    ("02_pruning", {"profile.json", "plan-attention-cosine-k2.json", "plans-attention-k2.svg",
                    "perplexity-attention.png", "perplexity-attention.csv"}),
    ("03_benchmarks", {"profile.json", "accuracy-limit4.csv", "accuracy-limit4.md", "retention-limit4.svg",
                       "findings-limit4.md", "tasks-limit4.csv"})])
def test_every_run_writes_the_same_bytes(name, expected, word_folder, tmp_path):
    first, second = (run(name, word_folder, tmp_path / n) for n in "ab")
    assert expected <= set(first)
    again = run(name, word_folder, tmp_path / "a")  # now with the profile and the rows of the first run
    assert sorted(first) == sorted(second) == sorted(again)
    assert not [n for n in first if not first[n] == second[n] == again[n]]


TINY = dict(samples=4, length=32)
JUDGED = dict(windows=3, window_length=16)
STUDIES = {
    "ablations": (
        TINY | dict(k=1, buckets=[8, 4], neighbours=[5, 3], alphas=[4, 2], tasks=["sciq:validation", "piqa:validation"],
                    limit=3, windows=2, texts=["boolq"]),
        {"ablations-attention-k1.csv", "ablations-attention-k1.md", "ablations-attention-k1.txt",
         "accuracy-attention-k1.svg", "heldout-attention-k1.png"}),
    "boundary": (
        TINY | JUDGED | dict(seeds=[1, 2], targets={"attention": 1, "layer": 1}, bins=8, neighbour=5),
        {"boundaries.csv", "boundaries.svg", "protection.csv", "protection.md", "protection-attention.png",
         "protection-layer.svg", "boundary.txt"}),
    "budgets": (
        TINY | JUDGED | dict(trial_samples=2, trial_length=16, budgets={"parameters": [.2], "kv_bytes": [.25]},
                             context=32, first=2, tries=2, neighbour=5),
        {"budgets.csv", "budgets.md", "budgets.svg", "budgets.txt"}),
    "healing": (
        TINY | JUDGED | dict(cases={"attention": [1], "layer": [1]}, steps=3, batch_size=2, rank=2, shape=[1, 16],
                             repeats=2),
        {"healing.csv", "healing.md", "healing.svg", "healing-speed.png", "healing.txt"}),
    "cost_of_measuring": (
        TINY | dict(batch_size=2, repeats=2, memory_samples=4, bins=8, neighbour=5),
        {"time.csv", "time.svg", "time.png"}),
    "larger_than_memory": (
        dict(size="tiny", samples=64, length=128, batch_size=2, kill_after=1), {"tiny.json"})}


@pytest.mark.parametrize("name", STUDIES)
def test_studies_run_on_a_small_model(name, word_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ENTRODROP_CACHE", str(tmp_path / "cache"))
    (parameters, expected), out = STUDIES[name], tmp_path / "out"
    if name != "larger_than_memory": parameters = parameters | dict(model=str(word_folder))
    nb = execute(f"studies/{name}", tmp_path / "out.ipynb", parameters | dict(out=str(out)), tmp_path)
    text = printed(nb)
    assert expected <= {p.name for p in out.iterdir()}
    assert "nan" not in re.findall(r"\w+", text), text
    if name == "larger_than_memory":
        killed = re.search(r"with ([123]) of 4 layers done \(exit status -9\)", text)
        assert killed and f"going on after layer {int(killed[1]) - 1}" in text, text


def test_the_checkpoint_chapter_leaves_a_folder_where_it_is_asked_to(word_folder, tmp_path):
    kept = tmp_path / "kept"
    written = run("04_checkpoints_and_speed", word_folder, tmp_path / "out", target="layer", checkpoint=str(kept))
    assert {"speed.csv", "speed.svg", "tradeoff.csv", "tradeoff.png"} <= set(written)
    assert len(load_model(kept, device="cpu").model.layers) == 3
    assert (kept / "plan.json").exists() and (kept / "tokenizer.json").exists()


def test_k_too_large_says_what_is_possible_and_keeps_the_profile(word_folder, tmp_path):
    said = "k=99 but only 4 attention blocks lie outside the 0 protected layers; choose k ≤ 4"
    with pytest.raises(papermill.exceptions.PapermillExecutionError, match=said):
        run("02_pruning", word_folder, tmp_path / "out", k=99)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"profile.json", "profile.parquet"}


def tagged(nb): return [c for c in nb.cells if "parameters" in c.metadata.get("tags", [])]


def parameters(cell):
    "{name: the lines that give it a value} of a cell of parameters"
    lines = cell.source.splitlines()
    nodes = ast.parse(cell.source).body
    return {ast.unparse(node.targets[0]): lines[node.lineno - 1:node.end_lineno] for node in nodes}


SILENT = {"pop", "set", "setLevel", "disable_progress_bars", "set_verbosity_error", "unlink", "rebase", "write_text",
          "to_csv", "remove", "rmtree", "mkdir", "exec", "main", "embedded_model"}
SILENT_BEGINNINGS = ("test_", "assert_", "check_")
LATER = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)  # what is in them runs when it is called


def name_called(node):
    "The name of the function that a call is of, and an empty string for what is no call"
    if not isinstance(node, ast.Call): return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def prints(node):
    "Whether a piece of code prints, in whatever block of it, but not in a function"
    if isinstance(node, LATER): return False
    return name_called(node) == "print" or any(map(prints, ast.iter_child_nodes(node)))


def shows(source):
    "Whether a cell must have an output, were it run: it prints, or ends with an expression that is a value"
    if re.match(r"(\s*#\|.*\n)*\s*#\|\s*(export|default_exp|hide|eval: false)", source): return False
    tree = ast.parse(source)
    if prints(tree): return True
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.Expr) or source.rstrip().endswith(";"): return False
    name = name_called(last.value)
    return name not in SILENT and not name.startswith(SILENT_BEGINNINGS)


@pytest.mark.parametrize("source,expected", [
    ("print(1)", True), ("x = 2\nx", True), ("x.head()", True), ("for i in y: print(i)", True),
    ("with a:\n    if b: print(i)", True), ("[print(i) for i in y]", True), ("x = 1\nx.y", True),
    ("try: f()\nexcept E as e: print(e)", True), ("x.head();", False), ("torch.assert_close(x, y)", False),
    ("x = 1", False), ("#| export\nx", False), ("#| hide\nprint(1)", False), ("#| eval: false\nprint(1)", False),
    ("#| slow\n#| eval: false\nprint(1)", False), ("test_eq(1, 1)", False), ("assert x", False),
    ("def f():\n    for i in y: print(1)", False), ("f = lambda: print(1)", False), ("for i in y:\n    z(i)", False)])
def test_a_cell_that_would_show_something_is_known(source, expected): assert shows(source) == expected


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_notebooks_are_executed_and_clean(path):
    nb = nbformat.read(path, 4)
    nbformat.validate(nb)
    outputs = [o for c in code_cells(nb) for o in c.outputs]
    assert not [c.source for c in code_cells(nb) if shows(c.source) and not c.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not re.search(r"(?<![\w.:/~}])/(?:home|root|tmp|work|Users)/\w", path.read_text())


MOST_LINES = 10  # printed by a cell; a table or a picture says more
MORE_LINES = {"5d0f7b12": "an error that is a recipe, whole", "14d592b7": "the page that a function writes"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_cell_prints_more_than_a_few_lines(path):
    found = {c.id: sum(o.get("text", "").count("\n") for o in c.outputs) for c in code_cells(nbformat.read(path, 4))}
    assert not {cell: lines for cell, lines in found.items() if lines > MOST_LINES and cell not in MORE_LINES}


# Exported cells whose public names the next cell does not show, by the reason: the ids of the cells
UNSHOWN = {
    "a class whose longer methods are the next cell": [
        "01_two_stage_dynamics:a785c383", "02_pruning:f1c1e31d", "layerwise:49182d97", "layerwise:1a4e000e",
        "rivals:ddf67c44", "05_beyond_the_paper:f1a6931a"],
    "names and limits that functions of the next cell use": [
        "04_checkpoints_and_speed:d5de862a", "04_checkpoints_and_speed:d90d2d94", "figures:7c1e52f0",
        "figures:6f20d9b8", "models:c5d313da", "workers:30be0006"],
    "shown together with the function of the next cell": [
        "02_pruning:c0b3ab2d", "architectures:a2c4000b", "surgery:5c4e0023", "surgery:5c4e001c"],
    "parts of what comes at the end of the section, and is shown there": [
        "surgery:5c4e0019", "06_healing:6ea10018"],
    "the next cell runs it from the command line": ["regenerate:9d28ac4b"]}


def exported(source): return bool(re.match(r"(#\|.*\n)*#\| *exports?\b", source))


def defined(source):
    "Names that a cell gives to functions, classes and values"
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): found.append(node.name)
        elif isinstance(node, ast.Assign): found += [ast.unparse(target) for target in node.targets]
        elif not isinstance(node, (ast.Import, ast.ImportFrom)): found.append(type(node).__name__)
    return found


def unshown(cells):
    """Ids of exported cells that the next code cell does not show, as it is exported too, or as there is none. Private
    names may lead up to the exported cell that uses one of them, since cells are short."""
    found, last = [], len(cells) - 1
    for i, cell in enumerate(cells):
        if not exported(cell.source) or not defined(cell.source): continue
        after = cells[i + 1].source if i < last else ""
        if after and not exported(after): continue
        names = defined(cell.source)
        used = [name for name in names if re.search(rf"\b{re.escape(name)}\b", after)]
        if not used or not all(name.startswith("_") for name in names): found.append(cell.id)
    return found


def test_an_exported_cell_that_is_not_shown_is_known():
    sources = ["#| export\nimport a", "#| export\ndef f(): pass", "f()", "#| export\ndef _g(): pass",
               "#| hide\n#| export\nh = _g()", "h", "#| export\n_i = 1", "#| export\nclass J: pass", "#| export\nk = 1"]
    cells = [nbformat.v4.new_code_cell(source, id=str(i)) for i, source in enumerate(sources)]
    assert unshown(cells) == ["6", "7", "8"]  # not used by the next, public, and the last


def test_every_exported_cell_is_followed_by_one_that_shows_it():
    found = {f"{path.stem}:{cell}" for path in NOTEBOOKS for cell in unshown(code_cells(nbformat.read(path, 4)))}
    allowed = {cell for cells in UNSHOWN.values() for cell in cells}
    assert not found - allowed, "no cell that is not exported follows; show them, or give the reason in UNSHOWN"
    assert not allowed - found, "these are shown now, or gone; UNSHOWN need not have them"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_cell_that_saves_a_figure_shows_it(path):
    cells = [c for c in code_cells(nbformat.read(path, 4)) if re.search(r"^ *save_figure\(", c.source, re.M)]
    unseen = [c for c in cells if not any("image/png" in o.get("data", {}) for o in c.outputs)]
    assert not [c.source for c in unseen if "plt.close(" not in c.source]


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if re.match(r"0[1-9]_", p.name)], ids=lambda p: p.stem)
def test_numbered_notebooks_share_parameter_names(path):
    (cell,) = tagged(nbformat.read(path, 4))
    names = parameters(cell).keys()
    assert {"model", "data", "samples", "length", "seed", "out"} <= names
    assert not names & {"model_name", "n_samples", "seq_len", "num_samples", "output", "dataset"}
    lines = cell.source.splitlines()
    for name, own in parameters(cell).items():
        before = lines[lines.index(own[0]) - 1] if lines[0] != own[0] else ""
        assert any("#" in line for line in own) or before.startswith("#"), f"{name} has no comment"


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.parent.name == "studies"], ids=lambda p: p.stem)
def test_studies_take_minutes_and_are_left_out_of_nbdev_test(path):
    assert "skip_exec: true" in nbformat.read(path, 4).cells[0].source.splitlines()


def test_imports_and_code_do_not_share_a_cell():
    for path in NOTEBOOKS:
        for cell in code_cells(nbformat.read(path, 4)):
            nodes = ast.parse(cell.source).body
            imports = [n for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))]
            alone = not imports or len(imports) == len(nodes)
            assert alone or ast.unparse(nodes[-1]).startswith("logging."), (path.name, cell.source)


def test_parameter_files_name_parameters_that_exist():
    yaml = pytest.importorskip("yaml")
    known = {name for path in NOTEBOOKS for cell in tagged(nbformat.read(path, 4)) for name in parameters(cell)}
    assert len(sorted((ROOT / "params").glob("*.yaml"))) == 3
    for file in sorted((ROOT / "params").rglob("*.yaml")):
        assert set(yaml.safe_load(file.read_text())) <= known, file.name


MODULES = {"lm-eval": "lm_eval", "pyyaml": "yaml"}
# requirements that are used without being imported, by what shows their use
INDIRECT = {"accelerate": "device_map", "tabulate": "to_markdown", "gguf": "gguf_file", "pyarrow": "to_parquet",
            "jupyterlab": "jupyter lab", "ipykernel": "jupyter execute", "ipywidgets": "jupyter lab",
            "nbdev": "nbdev_export", "execnb": "nbdev_test", "ghapi": "nbdev_test", "nbconvert": "jupyter nbconvert",
            "pytest-xdist": "pytest -q -n 2", "ruff": "ruff check"}


def imported(source):
    "Top-level names of the modules that a piece of Python imports"
    nodes = list(ast.walk(ast.parse(source)))
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    names += [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
    return {n.split(".")[0] for n in names}


def test_every_requirement_has_a_range_and_a_use():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    wanted = config["DEFAULT"]["requirements"] + " " + config["DEFAULT"]["dev_requirements"]
    package = [p.read_text() for p in (ROOT / "entrodrop").glob("*.py")]
    python = package + [p.read_text() for p in (ROOT / "tests").glob("*.py")]
    python += [c.source for p in NOTEBOOKS for c in code_cells(nbformat.read(p, 4))]
    modules, text = set().union(*map(imported, python)), (ROOT / "Makefile").read_text() + "".join(package)
    for requirement in wanted.split():
        name, limits = re.match(r"([\w-]+)(.*)", requirement).groups()
        used = INDIRECT[name] in text if name in INDIRECT else MODULES.get(name, name) in modules
        assert "<" in limits, f"{requirement} has no upper bound"
        assert used, f"{name} is required and not used"
