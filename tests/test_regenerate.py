"`make figures`: a made-up repository for what can go wrong, and the real notebooks on a tiny Llama and a tiny Mistral"
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, MistralConfig

from entrodrop import regenerate as module
from entrodrop.regenerate import index_page, main, numbered_notebooks, read_runs, regenerate, run_key

ROOT = Path(__file__).parent.parent
SMALL = dict(
    data="pydoc", samples=4, length=32, bins=8, neighbour=5, lens_samples=2, criterion="cosine", k=2, ks=[1],
    windows=3, window_length=16, tasks=["piqa:validation"], limit=4, shapes=[[1, 16], [2, 16]], new_tokens=2, repeats=2,
    methods={"LLMDrop": ["attention", "cosine"], "EntroDrop attention": ["attention", "bucket"]}, trial_length=30,
    targets={"attention": [1], "layer": [1]}, criteria=["cosine", "bucket"], proposers=["cosine", "bucket"],
    first=2, tries=2, rivals=1)

@pytest.fixture(scope="module", params=["llama", "mistral"])
def model_folder(request, word_folder, tmp_path_factory):
    "A random four-layer model with a tokenizer"
    if request.param == "llama": return word_folder
    folder = tmp_path_factory.mktemp("models") / "Tiny-Mistral"
    shutil.copytree(word_folder, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(0)
    config = MistralConfig(num_hidden_layers=4, hidden_size=64, intermediate_size=128, num_attention_heads=4,
                           num_key_value_heads=2, vocab_size=300, sliding_window=None,
                           bos_token_id=0, eos_token_id=0, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder

def contents(folder):
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".ipynb"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}

def test_all_notebooks_once_for_a_model_in_a_folder(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(SMALL | dict(model=str(model_folder))))
    out = tmp_path / "figures"
    page = regenerate(tmp_path / "tiny.yaml", ROOT, out)
    notebooks = [p.stem for p in numbered_notebooks(ROOT)]
    assert re.findall(r"^(\d\d_\w+): done in", capsys.readouterr().out, re.M) == notebooks == list(read_runs(out))
    before, text = contents(out), page.read_text()
    for name in before:
        if name.endswith((".svg", ".png", ".csv")) and "/" not in name: assert f"]({name})" in text, name
    links = [unquote(l) for l in re.findall(r"\]\(([^)]+)\)", text)]
    assert len(links) > 20 and not [l for l in links if "://" not in l and not (out / l).exists()]
    assert str(tmp_path) not in text.replace(f"`model = '{model_folder}'`", "")
    assert all((out / f"{n}.ipynb").exists() for n in notebooks)
    regenerate(tmp_path / "tiny.yaml", ROOT, out)
    assert re.findall(r"^(\d\d_\w+): skipped", capsys.readouterr().out, re.M) == notebooks
    assert contents(out) == before

# A made-up repository

def notebook(root, name, parameters, *sources):
    v4, path = nbformat.v4, root / "nbs" / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    first = v4.new_markdown_cell(f"# {name}\n\n> A claim.")
    tagged = v4.new_code_cell(parameters, metadata=dict(tags=["parameters"]))
    kernel = dict(name="python3", display_name="python3", language="python")
    cells = [first, tagged, *map(v4.new_code_cell, sources)]
    nbformat.write(v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel)), path)
    return path

def two(root, check="assert good, 'this went wrong'", value=2):
    "The second chapter"
    write = f"Path(out, 'two.csv').write_text('m\\n{value}\\n')"
    return notebook(root, "01_two", "good = True  # any\nout = None  # folder",
                    "\n".join(["from pathlib import Path", *([check] if check else []), write]))

@pytest.fixture
def repository(tmp_path):
    "Two chapters that write a file each; the second needs a value that is there only if the parameter `good` is true"
    notebook(tmp_path, "00_one", "n = 1  # any\nout = None  # folder",
             "from pathlib import Path\nPath(out, 'one.csv').write_text(f'n\\n{n}\\n')")
    two(tmp_path)
    (tmp_path / "params").mkdir()
    (tmp_path / "params/mine.yaml").write_text("n: 2\n")
    return tmp_path

def outcome(capsys): return re.findall(r"^(\d\d)_\w+: (done|skipped)", capsys.readouterr().out, re.M)

def test_a_notebook_that_fails_leaves_the_earlier_ones_done(repository, capsys):
    (repository / "params/mine.yaml").write_text("good: false\n")
    place = r"01_two failed; as far as it came, it is .*01_two\.partial\.ipynb"
    with pytest.raises(RuntimeError, match=place + "(?s:.*)AssertionError: this went wrong$"):
        regenerate("mine", repository)
    assert outcome(capsys) == [("00", "done")] and not (repository / "figures/mine/README.md").exists()
    (repository / "params/mine.yaml").write_text("good: true\n")
    regenerate("mine", repository)
    assert outcome(capsys) == [("00", "skipped"), ("01", "done")]
    assert not (repository / "figures/mine/01_two.partial.ipynb").exists()

@pytest.mark.parametrize("change, rerun", [
    ("parameter", "00"), ("notebook", "01"), ("file", "01"), ("package", "0001"), ("prose", "")])
def test_what_makes_a_notebook_run_again(repository, capsys, monkeypatch, change, rerun):
    regenerate("mine", repository)
    if change == "parameter": (repository / "params/mine.yaml").write_text("n: 3\n")
    if change == "notebook": two(repository, check=None, value=3)
    if change == "file": (repository / "figures/mine/two.csv").write_text("m\n99\n")
    if change == "package": monkeypatch.setattr(module, "versions", lambda: dict(torch="0"))
    if change == "prose": two(repository)
    outcome(capsys)
    regenerate("mine", repository)
    assert "".join(n for n, how in outcome(capsys) if how == "done") == rerun

def test_key_knows_local_models_by_content(repository, tmp_path):
    path = notebook(repository, "02_three", "model = 'x'  # any\nout = None  # folder")
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"1234")
    first = run_key(path, dict(model=str(folder)), module.local_contents(dict(model=str(folder))))
    (folder / "model.safetensors").write_bytes(b"1235")
    assert run_key(path, dict(model=str(folder)), module.local_contents(dict(model=str(folder)))) != first

@pytest.mark.parametrize("text, message", [
    ("m: 1\n", r"no numbered notebook has a parameter 'm'.*; there are good, n"),
    ("out: here\n", "no numbered notebook has a parameter 'out'"),
    ("n: [1\n", "is not YAML"), ("- 1\n", "its content is a list")])
def test_bad_parameter_files(repository, text, message):
    (repository / "params/mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message): regenerate("mine", repository)
    assert not (repository / "figures").exists()

def test_damaged_record_says_what_to_do(repository):
    regenerate("mine", repository)
    (repository / "figures/mine/runs.json").write_text("{")
    with pytest.raises(ValueError, match="delete it, and all notebooks run again"): regenerate("mine", repository)

def test_page_is_made_from_the_records_alone(repository):
    page = regenerate("mine", repository)
    runs, file = read_runs(page.parent), repository / "params/mine.yaml"
    assert page.read_text() == index_page(runs, page.parent, file, repository)
    assert "make figures MODEL=mine" in page.read_text() and "| n |\n| --- |\n| 2 |" in page.read_text()
    assert str(repository) not in page.read_text() + (page.parent / "runs.json").read_text()

def test_command_line(repository):
    command = [sys.executable, "-m", "entrodrop.regenerate"]
    done = subprocess.run([*command, "nothing"], cwd=repository, capture_output=True, text=True)
    said = "no parameter file params/nothing.yaml; give the path of a .yaml file, or one of mine"
    assert (done.returncode, done.stderr.strip()) == (1, said)
    done = subprocess.run([*command, "mine"], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "see figures/mine/README.md"

def test_outside_of_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text("n: 1\n")
    with pytest.raises(SystemExit, match="not part of the installed package"): main(["p.yaml"])

@pytest.mark.parametrize("name", [p.stem for p in sorted((ROOT / "params").glob("*.yaml"))])
def test_parameter_files_fit_the_notebooks(name):
    plans = module.shares(module.read_params(module.params_file(name, ROOT)), numbered_notebooks(ROOT))
    assert all("model" in p for notebook, p in plans.items() if not notebook.name.startswith("00"))

def test_committed_pages_are_those_of_their_records():
    pages = sorted((ROOT / "figures").glob("*/runs.json"))
    assert [p.parent.name for p in pages] == ["smollm2-135m"]
    for record in pages:
        for run in json.loads(record.read_text()).values():
            assert all((record.parent / f).is_file() for f in run["files"])
