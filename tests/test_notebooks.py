"The notebooks end to end, by papermill, on a small model in a folder; and what every committed notebook promises"
import ast, re
from configparser import ConfigParser
from pathlib import Path
import nbformat, papermill, pytest
from entrodrop.models import load_model

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
COMMON = {"model", "data", "samples", "length", "seed", "target", "criterion", "k", "out"}
SMALL = dict(data="pydoc", samples=4, length=32, bins=8, neighbour=5)
EXTRA = {"01_two_stage_dynamics": dict(lens_samples=2), "02_pruning": dict(criterion="cosine", k=2, ks=[1], windows=3, window_length=16),
         "03_benchmarks": dict(methods={"LLMDrop": ["attention", "cosine"], "EntroDrop attention": ["attention", "bucket"]}, ks=[1], tasks=["piqa:validation"], limit=4),
         "04_checkpoints_and_speed": dict(criterion="cosine", k=1, ks=[1], shapes=[[1, 16]], new_tokens=2, repeats=2)}

def run(name, folder, out, **parameters):
    "Execute a notebook; returns what it wrote, by file name"
    out.mkdir(exist_ok=True)
    papermill.execute_notebook(ROOT / f"nbs/{name}.ipynb", out.with_suffix(".ipynb"), dict(SMALL, model=str(folder), out=str(out), **{**EXTRA[name], **parameters}),
                               kernel_name="python3", progress_bar=False, cwd=str(out.parent))
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}

@pytest.mark.parametrize("name,expected", [
    ("01_two_stage_dynamics", {"profile.json", "profile.parquet", "entropy_by_depth.svg", "entropy_increase.png", "logit_lens.svg"}),
    ("02_pruning", {"profile.json", "plan-attention-cosine-k2.json", "plans-attention-k2.svg", "perplexity-attention.png", "perplexity-attention.csv"}),
    ("03_benchmarks", {"profile.json", "accuracy-limit4.csv", "accuracy-limit4.md", "retention-limit4.svg", "findings-limit4.md", "tasks-limit4.csv"})])
def test_every_run_writes_the_same_bytes(name, expected, word_folder, tmp_path):
    first, second = (run(name, word_folder, tmp_path / n) for n in "ab")
    assert expected <= set(first)
    again = run(name, word_folder, tmp_path / "a")  # now with the profile and the rows of the first run
    assert sorted(first) == sorted(second) == sorted(again)
    assert not [n for n in first if not first[n] == second[n] == again[n]]

STUDIES = {"ablations": (dict(samples=4, length=32, k=1, buckets=[8, 4], neighbours=[5, 3], alphas=[4, 2], tasks=["sciq:validation", "piqa:validation"], limit=3, windows=2, texts=["boolq"]),
                         {"ablations-attention-k1.csv", "ablations-attention-k1.md", "ablations-attention-k1.txt", "accuracy-attention-k1.svg", "heldout-attention-k1.png"}),
           "boundary": (dict(samples=4, length=32, seeds=[1, 2], targets={"attention": 1, "layer": 1}, windows=3, window_length=16, bins=8, neighbour=5),
                        {"boundaries.csv", "boundaries.svg", "protection.csv", "protection.md", "protection-attention.png", "protection-layer.svg", "boundary.txt"}),
           "budgets": (dict(samples=4, length=32, trial_samples=2, trial_length=16, budgets={"parameters": [.2], "kv_bytes": [.25]}, context=32, first=2, tries=2, windows=3, window_length=16, neighbour=5),
                       {"budgets.csv", "budgets.md", "budgets.svg", "budgets.txt"}),
           "healing": (dict(samples=4, length=32, cases={"attention": [1], "layer": [1]}, steps=3, batch_size=2, rank=2, windows=3, window_length=16, shape=[1, 16], repeats=2),
                       {"healing.csv", "healing.md", "healing.svg", "healing-speed.png", "healing.txt"}),
           "cost_of_measuring": (dict(samples=4, length=32, batch_size=2, repeats=2, memory_samples=4, bins=8, neighbour=5), {"time.csv", "time.svg", "time.png"}),
           "larger_than_memory": (dict(size="tiny", samples=64, length=128, batch_size=2, kill_after=1), {"tiny.json"})}

@pytest.mark.parametrize("name", STUDIES)
def test_studies_run_on_a_small_model(name, word_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ENTRODROP_CACHE", str(tmp_path / "cache"))
    (parameters, expected), out = STUDIES[name], tmp_path / "out"
    if name != "larger_than_memory": parameters = parameters | dict(model=str(word_folder))
    papermill.execute_notebook(ROOT / f"nbs/studies/{name}.ipynb", tmp_path / "out.ipynb", dict(parameters, out=str(out)), kernel_name="python3", progress_bar=False, cwd=str(tmp_path))
    assert expected <= {p.name for p in out.iterdir()}
    text = " ".join(o.get("text", "") for c in nbformat.read(tmp_path / "out.ipynb", 4).cells if c.cell_type == "code" for o in c.outputs if o.get("name") == "stdout")
    assert "nan" not in re.findall(r"\w+", text), text
    if name == "larger_than_memory": assert (killed := re.search(r"with ([123]) of 4 layers done \(exit status -9\)", text)) and f"going on after layer {int(killed[1]) - 1}" in text, text

def test_the_checkpoint_chapter_leaves_a_folder_where_it_is_asked_to(word_folder, tmp_path):
    written = run("04_checkpoints_and_speed", word_folder, tmp_path / "out", target="layer", checkpoint=str(tmp_path / "kept"))
    assert {"speed.csv", "speed.svg", "tradeoff.csv", "tradeoff.png"} <= set(written)
    assert len(load_model(tmp_path / "kept", device="cpu").model.layers) == 3 and (tmp_path / "kept/plan.json").exists() and (tmp_path / "kept/tokenizer.json").exists()

def test_k_too_large_says_what_is_possible_and_keeps_the_profile(word_folder, tmp_path):
    with pytest.raises(papermill.exceptions.PapermillExecutionError, match="k=99 but only 4 attention blocks lie outside the 0 protected layers; choose k ≤ 4"):
        run("02_pruning", word_folder, tmp_path / "out", k=99)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"profile.json", "profile.parquet"}

def tagged(nb): return [c for c in nb.cells if "parameters" in c.metadata.get("tags", [])]

SILENT = {"pop", "set", "setLevel", "disable_progress_bars", "set_verbosity_error", "unlink", "rebase", "write_text", "to_csv", "remove", "mkdir", "exec", "main", "embedded_model"}

def shows(source):
    "Whether a cell must have an output, were it run: it prints at its top level, or ends with an expression that is a value"
    if re.match(r"\s*#\|\s*(export|default_exp|hide)", source): return False
    nodes = ast.parse(source).body
    top = [n.value for n in nodes if isinstance(n, ast.Expr)]
    called = [v.func.attr if isinstance(v.func, ast.Attribute) else getattr(v.func, "id", "") for v in top if isinstance(v, ast.Call)]
    if "print" in called: return True
    if not nodes or not isinstance(nodes[-1], ast.Expr): return False
    return not isinstance(top[-1], ast.Call) or not (called[-1] in SILENT or called[-1].startswith("test_"))

def test_a_cell_that_would_show_something_is_known():
    assert [shows(s) for s in ("print(1)", "x = 2\nx", "x.head()", "x = 1", "#| export\nx", "test_eq(1, 1)", "assert x", "def f():\n    print(1)", "for i in y:\n    z(i)")] == [True] * 3 + [False] * 6

@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_notebooks_are_executed_and_clean(path):
    nb = nbformat.read(path, 4)
    nbformat.validate(nb)
    outputs = [o for c in nb.cells if c.cell_type == "code" for o in c.outputs]
    assert not [c.source for c in nb.cells if c.cell_type == "code" and shows(c.source) and not c.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not re.search(r"(?<![\w.:/~}])/(?:home|root|tmp|work|Users)/\w", path.read_text())

@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_cell_that_saves_a_figure_shows_it(path):
    cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code" and re.search(r"^ *save_figure\(", c.source, re.M) and "plt.close(" not in c.source]
    assert not [c.source for c in cells if not any("image/png" in o.get("data", {}) for o in c.outputs)]

@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if re.match(r"0[1-9]_", p.name)], ids=lambda p: p.stem)
def test_numbered_notebooks_share_parameter_names(path):
    (cell,) = tagged(nbformat.read(path, 4))
    names = {line.split("=")[0].strip() for line in cell.source.splitlines()}
    assert {"model", "data", "samples", "length", "seed", "out"} <= names
    assert not names & {"model_name", "n_samples", "seq_len", "num_samples", "output", "dataset"}
    assert all("#" in line for line in cell.source.splitlines() if line.split("=")[0].strip() not in ("criteria",))

@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.parent.name == "studies"], ids=lambda p: p.stem)
def test_studies_take_minutes_and_are_left_out_of_nbdev_test(path):
    assert "skip_exec: true" in nbformat.read(path, 4).cells[0].source.splitlines()

def test_imports_and_code_do_not_share_a_cell():
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, 4).cells:
            nodes = ast.parse(cell.source).body if cell.cell_type == "code" else []
            imports = [n for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))]
            assert not imports or len(imports) == len(nodes) or ast.unparse(nodes[-1]).startswith("logging."), (path.name, cell.source)

def test_parameter_files_name_parameters_that_exist():
    yaml = pytest.importorskip("yaml")
    known = {line.split("=")[0].strip() for p in NOTEBOOKS for c in tagged(nbformat.read(p, 4)) for line in c.source.splitlines()}
    files = sorted((ROOT / "params").glob("*.yaml"))
    assert len(files) == 3
    for file in files: assert set(yaml.safe_load(file.read_text())) <= known, file.name

MODULES = {"lm-eval": "lm_eval", "pyyaml": "yaml"}
# requirements that are used without being imported, by what shows their use
INDIRECT = dict(accelerate="device_map", tabulate="to_markdown", gguf="gguf_file", pyarrow="to_parquet", jupyterlab="jupyter lab", ipykernel="jupyter execute", ipywidgets="jupyter lab",
                nbdev="nbdev_export", execnb="nbdev_test", ghapi="nbdev_test", nbconvert="jupyter nbconvert") | {"pytest-xdist": "pytest -q -n 2"}

def imported(source):
    "Top-level names of the modules that a piece of Python imports"
    nodes = [n for n in ast.walk(ast.parse(source))]
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names] + [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
    return {n.split(".")[0] for n in names}

def test_every_requirement_has_a_range_and_a_use():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    python = [p.read_text() for folder in ("entrodrop", "tests") for p in (ROOT / folder).glob("*.py")]
    python += [c.source for p in NOTEBOOKS for c in nbformat.read(p, 4).cells if c.cell_type == "code"]
    modules, text = set().union(*map(imported, python)), (ROOT / "Makefile").read_text() + "".join(p.read_text() for p in (ROOT / "entrodrop").glob("*.py"))
    for requirement in (config["DEFAULT"]["requirements"] + " " + config["DEFAULT"]["dev_requirements"]).split():
        name, limits = re.match(r"([\w-]+)(.*)", requirement).groups()
        assert "<" in limits, f"{requirement} has no upper bound"
        assert INDIRECT[name] in text if name in INDIRECT else MODULES.get(name, name) in modules, f"{name} is required and not used"
