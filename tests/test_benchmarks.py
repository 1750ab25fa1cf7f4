"The way from plans to rows: real tasks, resumed runs, several processes, errors that help"
import copy, errno, json, math, os, signal, subprocess, sys, time
from pathlib import Path
import lm_eval, numpy as np, pandas as pd, pytest, torch
from lm_eval.models.huggingface import HFLM
from entrodrop import benchmarks
from entrodrop.benchmarks import FORMAT, LOCAL_TASKS, PAPER_TASKS, evaluate, load_task, local_tasks, summarise, sweep
from entrodrop.dynamics import measure
from entrodrop.pruning import plan

pytest.importorskip("datasets")
try: local_tasks()
except ModuleNotFoundError as e: pytest.skip(str(e), allow_module_level=True)

@pytest.fixture(scope="module")
def profile(word_model): return measure(word_model[0], torch.randint(3, 250, (4, 40), generator=torch.Generator().manual_seed(0)))

@pytest.mark.parametrize("name", sorted(LOCAL_TASKS))
def test_embedded_task_has_a_right_answer_for_every_item(name):
    (task,) = load_task(f"{name}:validation").values()
    docs = list(task.test_docs())[:50]
    assert len(docs) == 50
    for doc in docs:
        choices = task.doc_to_choice(doc)
        target = task.doc_to_text(doc) if name == "winogrande" else task.doc_to_target(doc)  # there the choice is of contexts
        if isinstance(target, str): target = choices.index(target)
        assert 0 <= int(target) < len(choices)
        if name == "boolq": assert choices[int(target)] == ("yes" if doc["answer"] else "no")

def test_rows_equal_lm_evals_own_result(word_model):
    lm = HFLM(pretrained=word_model[0], tokenizer=word_model[1], batch_size=4)
    rows = {r["metric"]: r for _ in range(2) for r in evaluate(lm, "piqa:validation", limit=12)}  # twice: the requests of the first time are used again
    size = len(load_task("piqa:validation")["piqa"].eval_docs)
    own = lm_eval.simple_evaluate(lm, tasks=list(load_task("piqa:validation").values()), samples=dict(piqa=[i * size // 12 for i in range(12)]))["results"]["piqa"]
    for metric in ("acc", "acc_norm"):
        assert rows[metric]["value"] == pytest.approx(own[f"{metric},none"])
        assert rows[metric]["stderr"] == pytest.approx(own[f"{metric}_stderr,none"])
    assert rows["acc"]["split"] == "validation" and rows["acc"]["n"] == 12 and rows["acc_norm"]["headline"]
    assert rows["acc"]["chance"] == .5

def test_a_killed_sweep_resumes(word_model, profile, tmp_path, monkeypatch):
    plans, calls, real = {"cosine": plan(profile, "attention", "cosine", 2)}, [], lm_eval.evaluate
    def dies_at(number):
        def run(*args, **kwargs):
            calls.append(1)
            if len(calls) == number: raise KeyboardInterrupt
            return real(*args, **kwargs)
        return run
    arguments = (*word_model, plans, ["piqa:validation", "winogrande:validation"], tmp_path, 4)
    monkeypatch.setattr(lm_eval, "evaluate", dies_at(3))
    with pytest.raises(KeyboardInterrupt): sweep(*arguments)
    assert len(list(tmp_path.glob("*.json"))) == 2
    monkeypatch.setattr(lm_eval, "evaluate", dies_at(0))
    calls.clear()
    first = sweep(*arguments)
    assert len(calls) == 2
    calls.clear()
    assert sweep(*arguments).equals(first) and not calls

def test_rows_of_another_cell_are_not_returned(word_model, profile, tmp_path):
    arguments = (*word_model, {"a": plan(profile, "attention", "cosine", 1), "b": plan(profile, "mlp", "cosine", 1)}, ["piqa:validation"], tmp_path, 4)
    sweep(*arguments)
    first, second, _ = sorted(tmp_path.glob("*.json"))
    kept = first.read_text()
    first.write_text(second.read_text())
    with pytest.raises(ValueError, match=rf"{first.name} holds the rows of another cell: (drop|target) is .* there and .* here"): sweep(*arguments)
    first.write_text(kept)
    sweep(*arguments)

def test_weights_that_are_not_finite_are_not_evaluated(word_model, tmp_path):
    model = copy.deepcopy(word_model[0])
    model.model.layers[1].self_attn.q_proj.weight.data[3, 2] = math.inf
    with pytest.raises(ValueError, match="1 weights of the model hold NaN or infinite values: model.layers.1.self_attn.q_proj.weight"): sweep(model, word_model[1], {}, ["piqa:validation"], tmp_path, 2)
    assert not list(tmp_path.glob("*.json"))

def test_another_limit_is_another_cell(word_model, tmp_path):
    for limit, cells in ((3, 1), (4, 2), (3, 2)):
        rows = sweep(*word_model, {}, ["piqa:validation"], tmp_path, limit)
        assert set(rows.n) == {limit} and len(list(tmp_path.glob("*.json"))) == cells

def test_criteria_that_drop_the_same_blocks_share_a_cell(word_model, profile, tmp_path):
    p = plan(profile, "attention", "cosine", 2)
    rows = sweep(*word_model, {"a": p, "b": p}, ["piqa:validation"], tmp_path, 4)
    assert len(list(tmp_path.glob("*.json"))) == 2 and set(rows.label) == {"dense", "a", "b"}
    table = summarise(rows).set_index("label")
    assert table.average["a"] == table.average["b"]

def test_task_names_are_checked_before_anything_runs(word_model, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks, "evaluate", lambda *a: pytest.fail("evaluated"))
    with pytest.raises(ValueError, match="did you mean piqa:validation"):
        sweep(*word_model, {}, ["winogrande:validation", "piqqa:validation"], tmp_path, 4)

def test_a_task_without_network_says_what_works_without_one(monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(OSError, match="arc_easy:validation"): load_task("lambada_openai_mt_fr")

def store_of(tmp_path): return sorted(tmp_path.glob("*.json"))

def test_a_group_is_judged_on_limit_items_in_all(word_model):
    lm = HFLM(pretrained=word_model[0], tokenizer=word_model[1], batch_size=8)
    rows = evaluate(lm, "mmlu:validation", 30)
    assert {r["n"] for r in rows} == {30} and {r["chance"] for r in rows} == {.25}
    _, items, _ = benchmarks._requests("mmlu:validation", 30)
    assert len(items) > 20 and sum(map(len, items.values())) == 30

def test_other_documents_are_other_cells(word_model, tmp_path, monkeypatch):
    sweep(*word_model, {}, ["piqa:validation"], tmp_path, 4)
    real = benchmarks._requests
    monkeypatch.setattr(benchmarks, "_requests", lambda *a: real(*a)._replace(digest="of another order"))
    sweep(*word_model, {}, ["piqa:validation"], tmp_path, 4)
    assert len(store_of(tmp_path)) == 2

def test_limits_may_differ_by_task(word_model, tmp_path):
    rows = sweep(*word_model, {}, ["piqa:validation", "winogrande:validation"], tmp_path, {"piqa:validation": 3, "others": 5})
    assert dict(zip(rows.task, rows.n)) == {"piqa:validation": 3, "winogrande:validation": 5}
    with pytest.raises(ValueError, match="at least 1"): sweep(*word_model, {}, ["piqa:validation"], tmp_path, 0)

def test_a_cell_of_a_newer_version_or_a_damaged_one_is_named(word_model, tmp_path):
    sweep(*word_model, {}, ["piqa:validation"], tmp_path, 3)
    (path,) = store_of(tmp_path)
    cell = json.loads(path.read_text())
    path.write_text(json.dumps(cell | dict(format=FORMAT + 1)))
    with pytest.raises(ValueError, match=f"{path.name} was written by a newer version of entrodrop"): sweep(*word_model, {}, ["piqa:validation"], tmp_path, 3)
    path.write_text(json.dumps(cell)[:100])
    with pytest.raises(ValueError, match=f"{path.name} is damaged"): sweep(*word_model, {}, ["piqa:validation"], tmp_path, 3)

def test_a_full_disk_keeps_what_is_finished(word_model, tmp_path, monkeypatch):
    sweep(*word_model, {}, ["piqa:validation"], tmp_path, 3)
    def full(self, *args, **kwargs): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="the disk is full: the rows of winogrande:validation could not be written. 1 finished cells are kept"):
        sweep(*word_model, {}, ["piqa:validation", "winogrande:validation"], tmp_path, 3)
    monkeypatch.undo()
    assert {p.suffix for p in tmp_path.iterdir()} == {".json"}  # no half of a file, no lock
    assert set(sweep(*word_model, {}, ["piqa:validation", "winogrande:validation"], tmp_path, 3).task) == {"piqa:validation", "winogrande:validation"}

def test_a_batch_too_large_for_memory_says_so(word_model, tmp_path, monkeypatch):
    def too_large(*args, **kwargs): raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(lm_eval, "evaluate", too_large)
    with pytest.raises(MemoryError, match="lower batch_size"): sweep(*word_model, {}, ["piqa:validation"], tmp_path, 3)

def test_what_workers_and_engines_need_is_said_at_once(word_model, profile, tmp_path):
    with pytest.raises(ValueError, match="load the model by name"): sweep(*word_model, {}, ["piqa:validation"], tmp_path, 3, jobs=2)
    with pytest.raises(ValueError, match="unknown engine 'llama.cpp'; choose transformers or vllm"): sweep("any", None, {}, ["piqa:validation"], tmp_path, engine="llama.cpp")
    with pytest.raises(ValueError, match="entrodrop.checkpoints.save"): sweep("any", None, dict(a=plan(profile, "layer", "cosine", 1)), ["piqa:validation"], tmp_path, engine="vllm")

TASKS = ["piqa:validation", "winogrande:validation", "openbookqa:validation"]

def several(profile): return {f"cosine {k}": plan(profile, "attention", "cosine", k) for k in (1, 2)}

def same_rows(a, b):
    assert a.label.tolist() == b.label.tolist() and a.task.tolist() == b.task.tolist() and a["items"].tolist() == b["items"].tolist()

def test_two_workers_give_the_rows_of_one(word_model, word_folder, profile, tmp_path):
    alone = sweep(*word_model, several(profile), TASKS, tmp_path / "a", 4)
    together = sweep(str(word_folder), None, several(profile), TASKS, tmp_path / "b", 4, jobs=2)
    same_rows(alone, together)
    assert [p.name for p in store_of(tmp_path / "a")] == [p.name for p in store_of(tmp_path / "b")]

SWEEP = """
import os, pickle, signal, sys
from pathlib import Path
import lm_eval
from entrodrop import benchmarks
folder, store, plans, tasks, kill_at, log = pickle.loads(bytes.fromhex(sys.argv[1]))
real, calls = lm_eval.evaluate, []
def evaluate(*args, **kwargs):
    calls.append(1)
    if len(calls) == kill_at: os.kill(os.getpid(), signal.SIGKILL)
    with open(log, "a") as f: f.write(f"{os.getpid()}\\n")
    return real(*args, **kwargs)
lm_eval.evaluate = evaluate
benchmarks.sweep(folder, None, plans, tasks, store, 4)
"""

def start(word_folder, store, plans, tasks, log, kill_at=0):
    "A sweep in a process of its own, which writes its number for every cell it evaluates; it may kill itself before one"
    import pickle
    return subprocess.Popen([sys.executable, "-c", SWEEP, pickle.dumps((str(word_folder), str(store), plans, tasks, kill_at, str(log))).hex()], stderr=subprocess.DEVNULL)

def test_two_processes_share_a_store_and_a_killed_one_costs_nothing_that_was_finished(word_folder, profile, tmp_path):
    plans, log = several(profile), tmp_path / "log"
    killed = start(word_folder, tmp_path / "store", plans, TASKS, log, kill_at=3)
    assert killed.wait(180) == -signal.SIGKILL
    assert len(store_of(tmp_path / "store")) == 2 and len(log.read_text().split()) == 2
    both = [start(word_folder, tmp_path / "store", plans, TASKS, log) for _ in range(2)]
    assert [p.wait(180) for p in both] == [0, 0]
    assert len(store_of(tmp_path / "store")) == 9 and len(log.read_text().split()) == 9  # no cell was evaluated twice

def with_metrics(**values):
    "What lm-eval returns for three items with these metrics"
    return lambda *a, **k: dict(samples=dict(piqa=[dict(doc_id=i, arguments=[None] * 2, metrics=list(values), **{n: v[i] for n, v in values.items()}) for i in range(3)]))

def test_a_task_without_acc_is_judged_by_its_first_metric(monkeypatch):
    monkeypatch.setattr(lm_eval, "evaluate", with_metrics(exact_match=[1, 0, 1], f1=[.5, .5, 1]))
    assert [(r["metric"], r["headline"]) for r in evaluate(None, "piqa:validation")] == [("exact_match", True), ("f1", False)]

def test_a_task_without_a_value_for_every_item_is_refused(monkeypatch):
    monkeypatch.setattr(lm_eval, "evaluate", with_metrics(word_perplexity=[(1., 2)] * 3))
    with pytest.raises(ValueError, match="'piqa:validation' has no metric with a value for every item"): evaluate(None, "piqa:validation")

def test_a_worker_that_dies_is_replaced_until_nothing_more_gets_done(word_folder, profile, tmp_path, monkeypatch):
    import dying
    monkeypatch.setattr(benchmarks, "_fill_in_worker", dying.once)
    rows = sweep(str(word_folder), None, several(profile), TASKS, tmp_path / "store", 4, jobs=2)
    assert (tmp_path / "died").exists() and len(store_of(tmp_path / "store")) == 9 and len(rows) >= 9
    monkeypatch.setattr(benchmarks, "_fill_in_worker", dying.always)
    with pytest.raises(RuntimeError, match="a worker died .* 0 finished cells are kept"): sweep(str(word_folder), None, several(profile), TASKS, tmp_path / "other", 4, jobs=2)

def test_intervals_cover_what_is_true():
    truth, hits = dict(dense=.6, a=.5, b=.4), dict(difference=0, rival=0, retention=0)
    rng = np.random.default_rng(0)
    luck = lambda skill: .7 * skill + .3 * rng.random(len(skill))  # items differ in how hard they are, for all models alike
    bar = {name: np.quantile(luck(rng.random(10**6)), p) for name, p in truth.items()}
    for _ in range(400):
        frames = []
        for t in range(2):
            skill = rng.random(150)
            for name, p in truth.items(): frames.append(dict(label=name, criterion=name, protection="none", target="layer", k=0, task=f"t{t}", headline=True, chance=.25, items=(luck(skill) < bar[name]).astype(float).tolist()))
        t = summarise(pd.DataFrame(frames), dict(a="b")).set_index("label")
        hits["difference"] += t.low["a"] <= -.1 <= t.high["a"]
        hits["rival"] += t.rival_low["a"] <= .1 <= t.rival_high["a"]
        hits["retention"] += t.retention_low["a"] <= .25 / .35 <= t.retention_high["a"]
    assert all(.91 < h / 400 < .985 for h in hits.values()), hits

HUB = os.environ.get("HF_DATASETS_CACHE")

@pytest.mark.skipif(not HUB, reason="needs a copy of the Hub's benchmark data: make test-tasks HF_DATASETS_CACHE=folder")
@pytest.mark.parametrize("task", PAPER_TASKS)
def test_the_papers_tasks_run_from_the_hubs_cache(word_model, task):
    rows = evaluate(HFLM(pretrained=word_model[0], tokenizer=word_model[1], batch_size=8), task, 6)
    assert {r["n"] for r in rows} == {6} and all(0 < r["chance"] <= .5 for r in rows)
    assert [r["metric"] for r in rows if r["headline"]] == [benchmarks.HEADLINE.get(task, "acc")]
