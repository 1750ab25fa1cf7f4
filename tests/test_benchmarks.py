"The way from plans to rows: real tasks, resumed runs, errors that help"
import lm_eval, pytest, torch
from lm_eval.models.huggingface import HFLM
from entrodrop import benchmarks
from entrodrop.benchmarks import LOCAL_TASKS, evaluate, load_task, local_tasks, summarise, sweep
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
    rows = {r["metric"]: r for r in evaluate(lm, "piqa:validation", limit=12)}
    own = lm_eval.simple_evaluate(lm, tasks=list(load_task("piqa:validation").values()), limit=12)["results"]["piqa"]
    for metric in ("acc", "acc_norm"):
        assert rows[metric]["value"] == pytest.approx(own[f"{metric},none"])
        assert rows[metric]["stderr"] == pytest.approx(own[f"{metric}_stderr,none"])
    assert rows["acc"]["split"] == "validation" and rows["acc"]["n"] == 12 and rows["acc_norm"]["headline"]

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

def with_metrics(**values):
    "What lm-eval returns for three items with these metrics"
    return lambda *a, **k: dict(samples=dict(piqa=[dict(doc_id=i, metrics=list(values), **{n: v[i] for n, v in values.items()}) for i in range(3)]))

def test_a_task_without_acc_is_judged_by_its_first_metric(monkeypatch):
    monkeypatch.setattr(lm_eval, "evaluate", with_metrics(exact_match=[1, 0, 1], f1=[.5, .5, 1]))
    assert [(r["metric"], r["headline"]) for r in evaluate(None, "piqa:validation")] == [("exact_match", True), ("f1", False)]

def test_a_task_without_a_value_for_every_item_is_refused(monkeypatch):
    monkeypatch.setattr(lm_eval, "evaluate", with_metrics(word_perplexity=[(1., 2)] * 3))
    with pytest.raises(ValueError, match="'piqa:validation' has no metric with a value for every item"): evaluate(None, "piqa:validation")
