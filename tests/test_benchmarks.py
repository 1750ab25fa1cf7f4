"""The way from plans to rows: real tasks, resumed runs, several processes, errors that help."""
import copy
import errno
import json
import math
import os
import pickle
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import dying
import lm_eval
import numpy as np
import pandas as pd
import pytest
import torch
from lm_eval.models.huggingface import HFLM

from entrodrop import benchmarks, stores, workers
from entrodrop.benchmarks import (
    FORMAT,
    LOCAL_TASKS,
    PAPER_TASKS,
    evaluate,
    load_task,
    local_tasks,
    make_cell,
    pack_rows,
    plan_entries,
    summarise,
    sweep,
)
from entrodrop.dynamics import measure
from entrodrop.pruning import rank
from entrodrop.stores import PACKED, Store
from entrodrop.surgery import LinearMap, NewWeights, Plan
from entrodrop.workers import Source

pytest.importorskip("datasets")
try: local_tasks()
except ModuleNotFoundError as e: pytest.skip(str(e), allow_module_level=True)


@pytest.fixture(scope="module")
def profile(word_model):
    return measure(word_model[0], torch.randint(3, 250, (4, 40), generator=torch.Generator().manual_seed(0)))


def keys(folder): return Store(folder).keys()


def unpack(folder):
    "Make a store one of single files, as all were before there was a packed one; returns them"
    store = Store(folder)
    for key in store.packed(): store.single(key).write_text(json.dumps(store.read(key)[0], sort_keys=True) + "\n")
    (store.folder / PACKED).unlink()
    return [store.single(key) for key in store.singles()]


@pytest.mark.parametrize("name", sorted(LOCAL_TASKS))
def test_embedded_task_has_a_right_answer_for_every_item(name):
    (task,) = load_task(f"{name}:validation").values()
    docs = list(task.test_docs())[:50]
    assert len(docs) == 50
    for doc in docs:
        choices = task.doc_to_choice(doc)
        # of winogrande, the choice is of contexts
        target = task.doc_to_text(doc) if name == "winogrande" else task.doc_to_target(doc)
        if isinstance(target, str): target = choices.index(target)
        assert 0 <= int(target) < len(choices)
        if name == "boolq": assert choices[int(target)] == ("yes" if doc["answer"] else "no")


def test_rows_equal_lm_evals_own_result(word_model):
    lm = HFLM(pretrained=word_model[0], tokenizer=word_model[1], batch_size=4)
    evaluate(lm, "piqa:validation", limit=12)
    # the second time, the requests of the first are used again
    rows = {r["metric"]: r for r in evaluate(lm, "piqa:validation", limit=12)}
    task = load_task("piqa:validation")["piqa"]
    samples = dict(piqa=[i * len(task.eval_docs) // 12 for i in range(12)])
    own = lm_eval.simple_evaluate(lm, tasks=[task], samples=samples)["results"]["piqa"]
    for metric in ("acc", "acc_norm"):
        assert rows[metric]["value"] == pytest.approx(own[f"{metric},none"])
        assert rows[metric]["stderr"] == pytest.approx(own[f"{metric}_stderr,none"])
    assert rows["acc"]["split"] == "validation" and rows["acc"]["n"] == 12 and rows["acc_norm"]["headline"]
    assert rows["acc"]["chance"] == .5


@pytest.fixture
def evaluations(monkeypatch):
    "A list that grows by one with each call of lm-eval, and is cleared by whoever counts"
    calls, real = [], lm_eval.evaluate
    def counted(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)
    monkeypatch.setattr(lm_eval, "evaluate", counted)
    return calls


def test_a_killed_sweep_resumes(word_model, profile, tmp_path, monkeypatch, evaluations):
    plans = {"cosine": rank(profile, "attention", "cosine").first(2)}
    arguments = (*word_model, plans, ["piqa:validation", "winogrande:validation"], tmp_path, 4)
    counted = lm_eval.evaluate
    def dies_at_the_third(*args, **kwargs):
        if len(evaluations) == 2: raise KeyboardInterrupt
        return counted(*args, **kwargs)
    with monkeypatch.context() as patched:
        patched.setattr(lm_eval, "evaluate", dies_at_the_third)
        with pytest.raises(KeyboardInterrupt): sweep(*arguments)
    assert len(Store(tmp_path).singles()) == 2 and not (tmp_path / PACKED).exists()
    evaluations.clear()
    first = sweep(*arguments)
    assert len(evaluations) == 2 and len(Store(tmp_path).packed()) == 4 and not Store(tmp_path).singles()
    evaluations.clear()
    assert sweep(*arguments).equals(first) and not evaluations


# The key of a cell

FACTS = dict(model=dict(fingerprint="73577b37b47f9c6b", dtype="float32", device="cpu"), batch_size=8)


def test_a_key_is_what_it_was_for_blocks_of_one_kind(monkeypatch):
    "Of the committed rows: the contents, and the name that a file with them had"
    monkeypatch.setattr(benchmarks, "_requests", lambda *a: benchmarks.Requests({}, {}, "a731250210035c94"))
    facts = FACTS | dict(tokenizer="33b7dd0ab4327c92")
    facts["versions"] = dict(lm_eval="0.4.13", torch="2.13.0+cpu", transformers="5.24.0")
    layers = [2, 3, 4, 7, 12, 13, 14, 15, 16, 17, 25, 26]
    plan = Plan.dropping([("layer", i) for i in reversed(layers)], 30)
    cell = make_cell(facts, plan, "openbookqa:validation", 4)
    assert cell.contents == dict(facts, target="layer", drop=layers, task="openbookqa:validation",
                                 requests="a731250210035c94", headline="acc_norm")
    assert cell.key == "012fbf3932bd48d2"


@pytest.mark.parametrize("kind", ["attention", "mlp", "layer"])
def test_what_a_key_says_of_dropped_blocks(kind):
    assert plan_entries(Plan.dropping([(kind, 3), (kind, 1)], 5)) == dict(target=kind, drop=[1, 3])
    assert plan_entries(Plan({}, 5)) == plan_entries(None) == dict(target=None, drop=[])


def test_attention_and_mlp_of_a_layer_have_the_key_of_the_layer():
    assert plan_entries(Plan.dropping([("attention", 1), ("mlp", 1)], 5)) == dict(target="layer", drop=[1])


def several_tensors(seed=0):
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    return [draw(4, 4), draw(4, 4), draw(6, 4)]


def mixture(first, second, weights, dropped=("mlp", 2), name="mlp.up_proj.weight"):
    edits = {("attention", 0): LinearMap(first), ("attention", 3): LinearMap(second)}
    return Plan(edits | {("layer", 1): NewWeights({name: weights})}, 5) | Plan.dropping([dropped], 5)


def test_one_value_changed_anywhere_gives_another_key():
    tensors, found = several_tensors(), []
    found.append(plan_entries(mixture(*tensors)))
    assert found == [plan_entries(mixture(*several_tensors()))]
    for i, tensor in enumerate(tensors):
        for place in range(tensor.numel()):
            others = [t.clone() for t in tensors]
            value = others[i].view(-1)[place]
            others[i].view(-1)[place] = torch.nextafter(value, value + 1)
            found.append(plan_entries(mixture(*others)))
    found.append(plan_entries(mixture(*(t.double() for t in tensors))))
    found.append(plan_entries(mixture(tensors[1], tensors[0], tensors[2])))
    found.append(plan_entries(mixture(*tensors, dropped=("mlp", 3))))
    found.append(plan_entries(mixture(*tensors, dropped=("layer", 2))))
    found.append(plan_entries(mixture(*tensors, name="mlp.gate_proj.weight")))
    assert len({json.dumps(entries) for entries in found}) == len(found) == 1 + 56 + 5


def test_plans_of_all_sorts_are_evaluated_as_what_they_are(word_model, tmp_path):
    model = word_model[0]
    zero = Plan({("attention", 1): LinearMap(torch.zeros(64, 64))}, 4)
    up = {"mlp.up_proj.weight": model.model.layers[2].mlp.up_proj.weight.detach() * 3}
    plans = dict(zero=zero, dropped=Plan.dropping([("attention", 1)], 4), new=Plan({("layer", 2): NewWeights(up)}, 4),
                 mixed=Plan.dropping([("attention", 1), ("mlp", 3)], 4), joined=zero | Plan.dropping([("mlp", 3)], 4))
    rows = sweep(*word_model, plans, ["piqa:validation"], tmp_path, 12)
    assert len(keys(tmp_path)) == 6
    items = rows[rows.headline].set_index("label")["items"]
    # a map to zero is what dropping comes to
    assert items["zero"] == items["dropped"] and items["joined"] == items["mixed"]
    said = rows[rows.headline].set_index("label")[["criterion", "protection", "target", "k"]]
    assert said.loc["joined"].tolist() == ["by hand", "none", "mixed", 2]
    assert said.loc["new"].tolist() == ["by hand", "none", "none", 0]
    assert said.loc["dense"].tolist() == ["dense", "none", "none", 0]


def test_what_rows_say_of_a_ranking(word_model, profile, tmp_path):
    plans = dict(a=rank(profile, "mlp", "bucket", protection="released").first(1))
    said = sweep(*word_model, plans, ["piqa:validation"], tmp_path, 3).set_index("label").loc["a"]
    assert set(said.criterion) == {"bucket"} and set(said.protection) == {"released"}
    assert set(said.target) == {"mlp"} and set(said.k) == {1}


# Stores

def test_rows_of_another_cell_are_not_returned(word_model, profile, tmp_path):
    plans = {t: rank(profile, t, "cosine").first(1) for t in ("attention", "mlp")}
    arguments = (*word_model, plans, ["piqa:validation"], tmp_path, 4)
    sweep(*arguments)
    first, second, _ = unpack(tmp_path)
    kept = first.read_text()
    first.write_text(second.read_text())
    wrong = rf"{first.name} holds the rows of another cell: (drop|target) is .* there and .* here"
    with pytest.raises(ValueError, match=wrong): sweep(*arguments)
    pack_rows(tmp_path)
    assert Store(tmp_path).singles() == [first.stem]  # it is not packed either
    first.write_text(kept)
    sweep(*arguments)


def test_rows_of_another_cell_in_the_packed_file_are_not_returned(word_model, tmp_path):
    for limit in (3, 4): sweep(*word_model, {}, ["piqa:validation"], tmp_path, limit)
    first, second = (lines := Store(tmp_path).packed())
    stores.write_lines(tmp_path / PACKED, {first: lines[second], second: lines[first]})
    with pytest.raises(ValueError, match=rf"in .*{PACKED} holds the rows of another cell: requests is"):
        sweep(*word_model, {}, ["piqa:validation"], tmp_path, 3)


def test_a_store_of_single_files_is_read_and_packed(word_model, profile, tmp_path, evaluations):
    plans = {"cosine": rank(profile, "attention", "cosine").first(2)}
    arguments = (*word_model, plans, ["piqa:validation", "winogrande:validation"], tmp_path, 4)
    first = sweep(*arguments)
    packed = (tmp_path / PACKED).read_bytes()
    assert len(unpack(tmp_path)) == 4
    evaluations.clear()
    assert sweep(*arguments).equals(first) and not evaluations
    assert (tmp_path / PACKED).read_bytes() == packed and not Store(tmp_path).singles()


def test_what_is_packed_is_added_to_what_was(word_model, tmp_path, evaluations):
    for limit in (3, 4, 3):
        rows = sweep(*word_model, {}, ["piqa:validation"], tmp_path, limit)
        assert set(rows.n) == {limit}
    assert len(Store(tmp_path).packed()) == len(evaluations) == 2


def test_a_sweep_that_adds_nothing_leaves_the_packed_file_as_it_is(word_model, tmp_path):
    sweep(*word_model, {}, ["piqa:validation"], tmp_path, 3)
    os.utime(tmp_path / PACKED, (1, 1))
    sweep(*word_model, {}, ["piqa:validation"], tmp_path, 3)
    assert (tmp_path / PACKED).stat().st_mtime == 1


def test_a_damaged_packed_file_is_named_before_anything_is_evaluated(word_model, tmp_path, evaluations):
    sweep(*word_model, {}, ["piqa:validation"], tmp_path, 3)
    whole = (tmp_path / PACKED).read_bytes()
    evaluations.clear()
    for damaged in (b"", whole[:100], whole[:50] + bytes([whole[50] ^ 1]) + whole[51:], whole[:-1]):
        (tmp_path / PACKED).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{PACKED} is damaged"):
            sweep(*word_model, {}, ["piqa:validation", "winogrande:validation"], tmp_path, 3)
        assert not evaluations and (tmp_path / PACKED).read_bytes() == damaged
    (tmp_path / PACKED).write_bytes(whole)
    sweep(*word_model, {}, ["piqa:validation"], tmp_path, 3)
    assert not evaluations


def test_a_store_that_cannot_be_written_can_be_read(word_model, tmp_path, monkeypatch):
    rows = sweep(*word_model, {}, ["piqa:validation"], tmp_path, 3)
    (single,) = unpack(tmp_path)
    def read_only(*args): raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(stores, "write_lines", read_only)
    with pytest.warns(UserWarning, match="keeps its single files: .*Permission denied"):
        assert sweep(*word_model, {}, ["piqa:validation"], tmp_path, 3).equals(rows)
    assert single.exists()


def test_weights_that_are_not_finite_are_not_evaluated(word_model, tmp_path):
    model = copy.deepcopy(word_model[0])
    model.model.layers[1].self_attn.q_proj.weight.data[3, 2] = math.inf
    wrong = "1 weights of the model hold NaN or infinite values: model.layers.1.self_attn.q_proj.weight"
    with pytest.raises(ValueError, match=wrong): sweep(model, word_model[1], {}, ["piqa:validation"], tmp_path, 2)
    assert not keys(tmp_path)


def test_another_limit_is_another_cell(word_model, tmp_path):
    for limit, cells in ((3, 1), (4, 2), (3, 2)):
        rows = sweep(*word_model, {}, ["piqa:validation"], tmp_path, limit)
        assert set(rows.n) == {limit} and len(keys(tmp_path)) == cells


def test_criteria_that_drop_the_same_blocks_share_a_cell(word_model, profile, tmp_path):
    p = rank(profile, "attention", "cosine").first(2)
    other = Plan.dropping(p.edits, p.layers, p.model, [dict(method="another")])
    rows = sweep(*word_model, {"a": p, "b": other}, ["piqa:validation"], tmp_path, 4)
    assert len(keys(tmp_path)) == 2 and set(rows.label) == {"dense", "a", "b"}
    assert set(rows.criterion) == {"dense", "cosine", "another"}
    table = summarise(rows).set_index("label")
    assert table.average["a"] == table.average["b"]


def test_task_names_are_checked_before_anything_runs(word_model, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks, "evaluate", lambda *a: pytest.fail("evaluated"))
    with pytest.raises(ValueError, match="did you mean piqa:validation"):
        sweep(*word_model, {}, ["winogrande:validation", "piqqa:validation"], tmp_path, 4)


def test_a_task_without_network_says_what_works_without_one(monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(OSError, match="arc_easy:validation"): load_task("lambada_openai_mt_fr")


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
    assert len(keys(tmp_path)) == 2


def test_limits_may_differ_by_task(word_model, tmp_path):
    limits = {"piqa:validation": 3, "others": 5}
    rows = sweep(*word_model, {}, ["piqa:validation", "winogrande:validation"], tmp_path, limits)
    assert dict(zip(rows.task, rows.n, strict=True)) == {"piqa:validation": 3, "winogrande:validation": 5}
    with pytest.raises(ValueError, match="at least 1"): sweep(*word_model, {}, ["piqa:validation"], tmp_path, 0)


def test_a_cell_of_a_newer_version_or_a_damaged_one_is_named(word_model, tmp_path):
    arguments = (*word_model, {}, ["piqa:validation"], tmp_path, 3)
    sweep(*arguments)
    (path,) = unpack(tmp_path)
    cell = json.loads(path.read_text())
    path.write_text(json.dumps(cell | dict(format=FORMAT + 1)))
    with pytest.raises(ValueError, match=f"{path.name} was written by a newer version of entrodrop"): sweep(*arguments)
    damaged = [json.dumps(cell)[:100], "[]", json.dumps(dict(cell=cell["cell"], format=FORMAT))]
    for text in damaged:
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{path.name} is damaged"): sweep(*arguments)
        assert pack_rows(tmp_path) == 0 and path.read_text() == text
    path.write_text(json.dumps(cell))
    sweep(*arguments)
    newer = Store(tmp_path).packed()
    newer = {key: line | dict(format=str(FORMAT + 1)) for key, line in newer.items()}
    stores.write_lines(tmp_path / PACKED, newer)
    with pytest.raises(ValueError, match=f"{PACKED} was written by a newer version of entrodrop"): sweep(*arguments)


def test_a_full_disk_keeps_what_is_finished(word_model, tmp_path, monkeypatch):
    both = ["piqa:validation", "winogrande:validation"]
    sweep(*word_model, {}, both[:1], tmp_path, 3)
    def full(self, *args, **kwargs): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "write_text", full)
    lost = "the disk is full: the rows of winogrande:validation could not be written. 1 finished cells are kept"
    with pytest.raises(OSError, match=lost): sweep(*word_model, {}, both, tmp_path, 3)
    monkeypatch.undo()
    # no half of a file, and no cell's lock
    assert {p.name for p in tmp_path.iterdir()} == {PACKED, ".pack.lock"}
    assert set(sweep(*word_model, {}, both, tmp_path, 3).task) == {*both}


def test_a_batch_too_large_for_memory_says_so(word_model, tmp_path, monkeypatch):
    def too_large(*args, **kwargs): raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(lm_eval, "evaluate", too_large)
    with pytest.raises(MemoryError, match="lower batch_size"):
        sweep(*word_model, {}, ["piqa:validation"], tmp_path, 3)


def test_what_workers_and_engines_need_is_said_at_once(word_model, profile, tmp_path):
    piqa, plans = (["piqa:validation"], tmp_path), dict(a=rank(profile, "layer", "cosine").first(1))
    with pytest.raises(ValueError, match="load the model by name"): sweep(*word_model, {}, *piqa, 3, jobs=2)
    with pytest.raises(ValueError, match="load the model by name"): sweep(*word_model, {}, *piqa, engine="vllm")
    with pytest.raises(ValueError, match="unknown engine 'llama.cpp'; choose transformers or vllm"):
        sweep("any", None, {}, *piqa, engine="llama.cpp")
    with pytest.raises(ValueError, match="entrodrop.checkpoints.save"): sweep("any", None, plans, *piqa, engine="vllm")


# Several processes

TASKS = ["piqa:validation", "winogrande:validation", "openbookqa:validation"]


def several(profile): return {f"cosine {k}": rank(profile, "attention", "cosine").first(k) for k in (1, 2)}


def same_rows(a, b):
    assert a.label.tolist() == b.label.tolist() and a.task.tolist() == b.task.tolist()
    assert a["items"].tolist() == b["items"].tolist()


def test_two_workers_give_the_rows_of_one(word_model, word_folder, profile, tmp_path):
    alone = sweep(*word_model, several(profile), TASKS, tmp_path / "a", 4)
    together = sweep(str(word_folder), None, several(profile), TASKS, tmp_path / "b", 4, jobs=2)
    same_rows(alone, together)
    assert (tmp_path / "a" / PACKED).read_bytes() == (tmp_path / "b" / PACKED).read_bytes()


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
    "A sweep in a process of its own, which notes every cell that it evaluates; it may kill itself before one"
    given = pickle.dumps((str(word_folder), str(store), plans, tasks, kill_at, str(log))).hex()
    return subprocess.Popen([sys.executable, "-c", SWEEP, given], stderr=subprocess.DEVNULL)


def test_two_processes_share_a_store_and_a_killed_one_costs_nothing_that_was_finished(word_folder, profile, tmp_path):
    plans, log, store = several(profile), tmp_path / "log", Store(tmp_path / "store")
    killed = start(word_folder, store.folder, plans, TASKS, log, kill_at=3)
    assert killed.wait(180) == -signal.SIGKILL
    assert len(store.singles()) == 2 and len(log.read_text().split()) == 2
    # the second of them has less to do, and packs the store while the other one is at work
    both = [start(word_folder, store.folder, plans, tasks, log) for tasks in (TASKS, TASKS[:2])]
    assert [p.wait(180) for p in both] == [0, 0]
    assert len(store.packed()) == 9 and not store.singles()
    assert len(log.read_text().split()) == 9  # no cell was evaluated twice


def with_metrics(**values):
    "What lm-eval returns for three items with these metrics"
    def sample(i):
        return dict(doc_id=i, arguments=[None] * 2, metrics=list(values)) | {n: v[i] for n, v in values.items()}
    return lambda *a, **k: dict(samples=dict(piqa=[sample(i) for i in range(3)]))


def test_a_task_without_acc_is_judged_by_its_first_metric(monkeypatch):
    monkeypatch.setattr(lm_eval, "evaluate", with_metrics(exact_match=[1, 0, 1], f1=[.5, .5, 1]))
    found = [(r["metric"], r["headline"]) for r in evaluate(None, "piqa:validation")]
    assert found == [("exact_match", True), ("f1", False)]


def test_a_task_without_a_value_for_every_item_is_refused(monkeypatch):
    monkeypatch.setattr(lm_eval, "evaluate", with_metrics(word_perplexity=[(1., 2)] * 3))
    with pytest.raises(ValueError, match="'piqa:validation' has no metric with a value for every item"):
        evaluate(None, "piqa:validation")


def test_a_worker_that_dies_is_replaced_until_nothing_more_gets_done(word_folder, profile, tmp_path, monkeypatch):
    arguments = (str(word_folder), None, several(profile), TASKS)
    monkeypatch.setattr(benchmarks, "fill_cell", dying.once)
    rows = sweep(*arguments, tmp_path / "store", 4, jobs=2)
    assert (tmp_path / "died").exists() and len(keys(tmp_path / "store")) == 9 and len(rows) >= 9
    monkeypatch.setattr(benchmarks, "fill_cell", dying.always)
    with pytest.raises(RuntimeError, match="a worker died .* 0 finished cells are kept"):
        sweep(*arguments, tmp_path / "other", 4, jobs=2)


def test_processes_with_gpus_take_one_each(monkeypatch, tmp_path):
    monkeypatch.setattr(workers.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(workers.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(workers.torch.cuda, "get_device_properties", lambda i: object())
    processes = [{} for _ in range(3)]  # what each of them would hold
    for held, expected in zip(processes, ("cuda:0", "cuda:1", None), strict=True):
        monkeypatch.setattr(workers, "_HELD", held)
        assert workers.own_device() == workers.own_device() == expected
    processes[0]["gpu"][1].release()  # as the system does when a process ends
    assert workers.own_device() == "cuda:0"


# Tables

def test_intervals_cover_what_is_true():
    truth, hits = dict(dense=.6, a=.5, b=.4), dict(difference=0, rival=0, retention=0)
    rng = np.random.default_rng(0)
    def luck(skill): return .7 * skill + .3 * rng.random(len(skill))  # items are as hard for one model as for another
    bar = {name: np.quantile(luck(rng.random(10**6)), p) for name, p in truth.items()}
    common = dict(protection="none", target="layer", k=0, headline=True, chance=.25)
    for _ in range(400):
        frames = []
        for t in range(2):
            skill = rng.random(150)
            for name in truth:
                items = (luck(skill) < bar[name]).astype(float).tolist()
                frames.append(common | dict(label=name, criterion=name, task=f"t{t}", items=items))
        t = summarise(pd.DataFrame(frames), dict(a="b")).set_index("label")
        hits["difference"] += t.low["a"] <= -.1 <= t.high["a"]
        hits["rival"] += t.rival_low["a"] <= .1 <= t.rival_high["a"]
        hits["retention"] += t.retention_low["a"] <= .25 / .35 <= t.retention_high["a"]
    assert all(.91 < h / 400 < .985 for h in hits.values()), hits


HUB = os.environ.get("HF_DATASETS_CACHE")


@pytest.mark.skipif(not HUB, reason="needs a copy of the Hub's benchmark data: "
                                    "make test-tasks HF_DATASETS_CACHE=folder")
@pytest.mark.parametrize("task", PAPER_TASKS)
def test_the_papers_tasks_run_from_the_hubs_cache(word_model, task):
    rows = evaluate(HFLM(pretrained=word_model[0], tokenizer=word_model[1], batch_size=8), task, 6)
    assert {r["n"] for r in rows} == {6} and all(0 < r["chance"] <= .5 for r in rows)
    assert [r["metric"] for r in rows if r["headline"]] == [benchmarks.HEADLINE.get(task, "acc")]


@pytest.mark.parametrize("plan, said", [
    (Plan.dropping([("attention", 1)], 28), "another model: layers 28 there, 4 here"),
    (Plan.dropping([("attention", 1)], 4, dict(model_type="gpt2")), "another model: model_type gpt2 there"),
    (Plan.dropping([("attention", 1)], 4, dict(fingerprint="another")), "other weights")])
def test_a_plan_for_another_model_has_no_rows_even_where_some_are(plan, said, word_model, tmp_path, evaluations):
    arguments = ["arc_easy:validation"], tmp_path / "rows", 2
    sweep(*word_model, {"right": Plan.dropping([("attention", 1)], 4)}, *arguments)
    done = len(evaluations)
    with pytest.raises(ValueError, match=said): sweep(*word_model, {"wrong": plan}, *arguments)
    assert len(evaluations) == done


def test_no_plan_takes_the_place_of_the_model_itself(word_model, tmp_path):
    with pytest.raises(ValueError, match="'dense' is the model itself"):
        sweep(*word_model, {"dense": Plan({}, 4)}, ["arc_easy:validation"], tmp_path / "rows", 2)


def test_a_load_that_failed_is_forgotten(word_folder, tmp_path):
    sources = [Source(name, None, 2, "transformers", dict(device="cpu")) for name in (word_folder, tmp_path / "none")]
    first = workers.opened(sources[0])
    with pytest.raises(FileNotFoundError): workers.opened(sources[1])
    assert workers.opened(sources[0]).facts == first.facts
