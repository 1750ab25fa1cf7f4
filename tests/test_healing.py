"""Linear maps and adapters on a random decoder of every class: plans that do what was fitted, and models left alone."""
import copy
import hashlib
import re
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
import torch
from conftest import DECODERS, make_decoder
from onlooker import multiplications
from peft.tuners.lora import LoraLayer

from entrodrop import healing
from entrodrop.architectures import decoder_config, decoder_layers, fingerprint, multiplied
from entrodrop.healing import distil, fit_linear
from entrodrop.models import load_model
from entrodrop.rivals import laco
from entrodrop.surgery import Block, LinearMap, NewWeights, Plan, drop, edited

ROOT = Path(__file__).parent.parent
BLOCKS = [("attention", 1), ("attention", 3), ("mlp", 2)]
close = dict(rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module", params=DECODERS)
def model(request): return make_decoder(request.param)


@pytest.fixture(scope="module")
def text(): return torch.randint(2, 90, (6, 24), generator=torch.Generator().manual_seed(0))


def without(*blocks): return Plan.dropping(blocks, 5)


@torch.inference_mode()
def log_probabilities(model, text, plan=None):
    with edited(model, plan or without(), strict=False):
        return model(text, use_cache=False).logits.float().log_softmax(-1)


def divergence(p, q): return (p.exp() * (p - q)).sum(-1).mean().item()


def everything(model):
    "All that could change: modules and what they hold, weights to the last bit, what learns, random numbers"
    once = {"_output_capturing_hooks_installed"}  # a mark of transformers, from the first forward pass on
    modules = [(name, id(m), sorted(vars(m).keys() - once)) for name, m in model.named_modules()]
    weights = [(name, id(p), p.data_ptr(), p.requires_grad, p.grad) for name, p in model.named_parameters()]
    return modules, weights, fingerprint(model), model.config.to_dict(), torch.random.get_rng_state().tolist()


# Linear maps

def test_linear_maps_leave_no_trace_and_cached_generation_agrees(model, text):
    before, plan = log_probabilities(model, text), without(*[("attention", i) for i in range(4)])
    found = fit_linear(model, [0, 2, 3], text)
    assert torch.equal(log_probabilities(model, text), before)
    plan = plan | found
    assert (plan.gone("attention"), plan.linear, plan.k) == ((1,), (0, 2, 3), 4)
    with edited(model, plan):
        assert not torch.equal(log_probabilities(model, text), before)
        kept, fresh = (model.generate(text[:1, :12], max_new_tokens=8, do_sample=False, use_cache=cache)
                       for cache in (True, False))
        assert torch.equal(kept, fresh)
    assert torch.equal(log_probabilities(model, text), before)


def test_fitting_changes_nothing(model, text):
    before = everything(model)
    fit_linear(model, [0, 3], text, batch_size=4)
    assert everything(model) == before


def test_a_linear_map_is_nearer_than_nothing(llama, text):
    dense, plan = log_probabilities(llama, text), without(("attention", 2))
    maps = plan | fit_linear(llama, [2], text)
    nothing, mapped = (divergence(dense, log_probabilities(llama, text, p)) for p in (plan, maps))
    assert mapped < nothing


def test_the_map_is_what_least_squares_on_the_replaced_stream_gives(llama, text):
    maps, seen = fit_linear(llama, [1, 3], text, batch_size=2, ridges=[1e-6]), []
    def note(module, args, kwargs, output):
        seen.append((kwargs["hidden_states"].flatten(0, 1), output[0].flatten(0, 1)))
    first = Plan({Block("attention", 1): maps.edits["attention", 1]}, 5)
    with edited(llama, first), torch.inference_mode():  # the second map is fitted to what the first passes on
        hook = llama.model.layers[3].self_attn.register_forward_hook(note, with_kwargs=True)
        llama(text, use_cache=False)
        hook.remove()
    x, y = seen[0]
    expected = np.linalg.lstsq(x.double().numpy(), y.double().numpy(), rcond=None)[0].T
    np.testing.assert_allclose(maps.edits["attention", 3].weight.numpy(), expected, rtol=.02, atol=.02)


@pytest.mark.parametrize("name", [name for name in DECODERS if name not in ("mixtral", "qwen3_moe")])
def test_fitting_costs_what_an_onlooker_counts(name, text):
    model = make_decoder(name)
    weights, head = multiplied(model)
    total = head + sum(n for (kind, _), n in weights.items() if kind == "layer")
    for layers in ([], [2], [0, 1, 4]):
        with multiplications() as seen: (record,) = fit_linear(model, layers, text, batch_size=4).record
        assert record["tokens"] * total == pytest.approx(sum(seen))


def test_maps_say_from_what_they_were_fitted(llama, text):
    plan = fit_linear(llama, [3, 1], text, ridges=[.1])
    (record,) = plan.record
    assert record["method"] == plan.method == "linear maps" and record["ridges"] == {"1": .1, "3": .1}
    assert record["tokens_sha256"] == hashlib.sha256(text.numpy().tobytes()).hexdigest()
    assert plan.model["fingerprint"] == fingerprint(llama) and record["text"] == dict(samples=6, length=24)
    chosen = fit_linear(llama, [1], text).record[0]["ridges"]["1"]
    assert chosen in healing.RIDGES
    again = fit_linear(llama, [1], text, ridges=[chosen])
    assert torch.equal(again.edits["attention", 1].weight, fit_linear(llama, [1], text).edits["attention", 1].weight)
    assert fit_linear(llama, [1], text, described=dict(name="a")).model == dict(name="a")


def test_maps_join_what_a_profile_of_the_same_model_chose(llama, text):
    plan = Plan.dropping([("attention", 1)], 5, dict(name="mine", fingerprint=fingerprint(llama)))
    assert (plan | fit_linear(llama, [1], text)).model["name"] == "mine"
    other = Plan.dropping([("attention", 1)], 5, dict(name="other", fingerprint="0" * 16))
    with pytest.raises(ValueError, match="different models"): other | fit_linear(llama, [1], text)


def test_a_map_needs_the_attention_that_it_stands_in_for(llama):
    maps = Plan({Block("attention", 1): LinearMap(torch.zeros(64, 64))}, 5)
    with edited(llama, without(("attention", 1))):
        with pytest.raises(ValueError, match="attention of layers \\[1\\] is dropped already"):
            edited(llama, maps).__enter__()


def test_a_killed_fit_leaves_the_model_whole(llama, text, monkeypatch):
    before, answered = everything(llama), healing._least_squares
    calls = []
    def fails(*args):
        calls.append(1)
        return answered(*args) if len(calls) < 3 else 1 / 0
    monkeypatch.setattr(healing, "_least_squares", fails)
    with pytest.raises(ZeroDivisionError): fit_linear(llama, [0, 1, 2], text)
    monkeypatch.undo()
    monkeypatch.setattr(type(llama.model.layers[0].mlp), "forward", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError): fit_linear(llama, [0, 1, 2], text)
    monkeypatch.undo()
    assert everything(llama) == before


# Adapters

def spied_on(monkeypatch, model, text):
    "Let what the adapters give at the end of a training be noted"
    seen, learnt = [], healing._learnt
    def note(model, plan):
        assert any(isinstance(m, LoraLayer) for m in model.modules())
        with torch.inference_mode(): seen.append(model(text, use_cache=False).logits.float().log_softmax(-1))
        return learnt(model, plan)
    monkeypatch.setattr(healing, "_learnt", note)
    return seen


def test_a_healed_plan_does_what_the_adapters_did_and_the_model_is_left_alone(model, text, monkeypatch):
    before, dense = everything(model), log_probabilities(model, text)
    plan = without(*BLOCKS) | fit_linear(model, [3], text)
    ill, seen = log_probabilities(model, text, plan), spied_on(monkeypatch, model, text)
    healed = distil(model, plan, text, steps=30, batch_size=3, learning_rate=5e-3)
    assert everything(model) == before
    assert torch.equal(log_probabilities(model, text), dense)
    got = log_probabilities(model, text, healed)
    torch.testing.assert_close(got, seen[0], **close)
    assert divergence(dense, got) < .9 * divergence(dense, ill)
    assert (healed.gone("attention"), healed.gone("mlp"), healed.linear) == ((1,), (2,), (3,))
    assert not torch.equal(healed.edits["attention", 3].weight, plan.edits["attention", 3].weight)
    losses = healed.record[-1]["losses"]
    assert len(losses) == 30 and np.isfinite(losses).all()


def test_all_matrices_learn_but_experts(model, text):
    healed = distil(model, without(("attention", 1)), text, steps=2)
    for i, layer in enumerate(decoder_layers(model)):
        matrices = {n for n, p in layer.named_parameters() if p.ndim == 2}
        own = {n for n in matrices if not n.endswith(".gate.weight")}  # of experts, the router
        if i == 1: own = {n for n in own if "attn" not in n and "attention" not in n}
        learnt = healed.edits[Block("layer", i)].tensors if i in healed.reweighted else {}
        assert {*learnt} == own, i


def test_whole_layers_may_go_and_others_keep_their_numbers(llama, text, monkeypatch):
    plan, seen = without(("layer", 0), ("attention", 3), ("mlp", 3), ("mlp", 1)), spied_on(monkeypatch, llama, text)
    healed = distil(llama, plan, text, steps=4, batch_size=2)
    assert healed.keep == healed.reweighted == (1, 2, 4)
    torch.testing.assert_close(log_probabilities(llama, text, healed), seen[0], **close)


def test_new_weights_are_healed_on_top_of_others(llama, text, monkeypatch):
    norm = "input_layernorm.weight"
    plan = laco(llama, text, 2, merge=3) | Plan({Block("layer", 0): NewWeights({norm: torch.rand(64)})}, 5)
    seen = spied_on(monkeypatch, llama, text)
    healed = distil(llama, plan, text, steps=4, batch_size=2)
    torch.testing.assert_close(log_probabilities(llama, text, healed), seen[0], **close)
    assert torch.equal(healed.edits["layer", 0].tensors[norm], plan.edits["layer", 0].tensors[norm])
    assert [r["method"] for r in healed.record] == ["LaCo", "LoRA distillation"]


def test_healing_again_goes_on_from_the_healed(llama, text):
    plan = without(("attention", 1), ("attention", 3))
    once = distil(llama, plan, text, steps=10, learning_rate=5e-3)
    twice = distil(llama, once, text, steps=10, learning_rate=5e-3)
    first, second = once.record[-1], twice.record[-1]
    assert second["losses"][0] < .8 * first["losses"][0] and len(twice.record) == len(once.record) + 1


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_healed_plan_is_kept_and_used_in_another_process(as_folder, llama, text, tmp_path):
    plan = without(("attention", 1), ("attention", 3), ("layer", 0)) | fit_linear(llama, [3], text)
    healed = distil(llama, plan, text, steps=5, batch_size=2)
    healed.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == healed
    expected, model = log_probabilities(llama, text, healed), copy.deepcopy(llama)
    if as_folder:
        model.save_pretrained(tmp_path / "dense")
        model = load_model(tmp_path / "dense", device="cpu")
    drop(model, again)
    torch.testing.assert_close(log_probabilities_as_is(model, text), expected)


@torch.inference_mode()
def log_probabilities_as_is(model, text): return model(text, use_cache=False).logits.float().log_softmax(-1)


def test_a_healed_plan_fits_no_other_weights(llama, text):
    healed, other = distil(llama, without(("attention", 1)), text, steps=1), copy.deepcopy(llama)
    other.model.norm.weight.data += 1
    with pytest.raises(ValueError, match="made for other weights"): edited(other, healed).__enter__()
    with pytest.raises(ValueError, match="made for other weights"): distil(other, healed, text, steps=1)
    again = distil(other, healed, text, steps=1, strict=False)
    assert again.model["fingerprint"] == fingerprint(other) != healed.model["fingerprint"] == fingerprint(llama)


def test_the_record_says_how_it_was_trained(llama, text):
    given = Plan.dropping([("attention", 1)], 5, dict(name="mine", fingerprint=fingerprint(llama), checkpoint="abc"),
                          [dict(method="cosine", k=1)])
    healed = distil(llama, given, text, steps=3, batch_size=2, rank=4, learning_rate=1e-3, seed=7)
    first, record = healed.record
    assert first == dict(method="cosine", k=1) and healed.model == given.model
    settings = dict(steps=3, batch_size=2, rank=4, learning_rate=1e-3, seed=7)
    assert {name: record[name] for name in settings} == settings and record["method"] == "LoRA distillation"
    assert (record["first_loss"], record["last_loss"]) == (record["losses"][0], record["losses"][-1])
    assert record["tokens_sha256"] == hashlib.sha256(text.numpy().tobytes()).hexdigest()
    expected = divergence(log_probabilities(llama, text), log_probabilities(llama, text, given))
    whole = distil(llama, given, text, steps=1, batch_size=6).record[-1]["first_loss"]
    assert whole == pytest.approx(expected, rel=1e-3)  # before the first step, adapters add nothing


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2"])
def test_training_costs_what_an_onlooker_counts_forwards_and_twice_that_backwards(name, text):
    model = make_decoder(name)
    weights, head = multiplied(model)
    total, plan = head + sum(n for (kind, _), n in weights.items() if kind == "layer"), without(*BLOCKS)
    plan = plan | fit_linear(model, [3], text)
    hidden, steps, batch = decoder_config(model).hidden_size, 4, 3
    with multiplications() as seen: record = distil(model, plan, text, steps=steps, batch_size=batch, rank=4).record[-1]
    trained = steps * batch * text.shape[1]
    adapters = sum(n for n in seen if n in added_by_adapters(model, 4, batch * text.shape[1]))
    student = sum(weights["layer", i] for i in range(5)) - sum(weights[b] for b in BLOCKS) + hidden ** 2 + head
    assert sum(seen) - adapters == pytest.approx(text.numel() * (total - head) + trained * (student + head))
    backwards = 2 * trained * student
    assert record["tokens"] * total == pytest.approx(sum(seen) - adapters + backwards)


def added_by_adapters(model, rank, tokens):
    "What the two matrices of an adapter multiply, for every matrix of the model"
    shapes = {p.shape for layer in decoder_layers(model) for p in layer.parameters() if p.ndim == 2}
    hidden = decoder_config(model).hidden_size
    return {tokens * rank * n for shape in (*shapes, (hidden,)) for n in shape}


def test_maps_of_another_dtype_learn_as_well(llama, text, monkeypatch):
    fitted = fit_linear(llama, [3], text).edits["attention", 3].weight
    plan = Plan({Block("attention", 3): LinearMap(fitted.double())}, 5)
    seen = spied_on(monkeypatch, llama, text)
    healed = distil(llama, plan, text, steps=5, batch_size=2)
    weight = healed.edits["attention", 3].weight
    assert weight.dtype == torch.float64 and not torch.equal(weight, fitted.double())
    torch.testing.assert_close(log_probabilities(llama, text, healed), seen[0], **close)


def test_maps_fitted_in_inference_mode_can_be_trained(llama, text):
    with torch.inference_mode(): healed = distil(llama, fit_linear(llama, [1], text), text, steps=2)
    assert np.isfinite(healed.record[-1]["losses"]).all() and healed.linear == (1,)


def test_a_seed_decides_and_random_numbers_go_on_as_before(llama, text):
    given = torch.random.get_rng_state()
    one, same, other = (distil(llama, without(("attention", 1)), text, steps=3, seed=seed) for seed in (1, 1, 2))
    assert one == same and one.edits != other.edits and torch.equal(torch.random.get_rng_state(), given)


@pytest.mark.parametrize("where", ["entrodrop.healing.F.kl_div", "entrodrop.healing._learnt",
                                   "entrodrop.healing._schedule", "entrodrop.healing.inject_adapter_in_model",
                                   "torch.optim.AdamW.step"])
def test_adapters_do_not_outlive_a_failure(where, model, text, monkeypatch):
    before, plan = everything(model), without(*BLOCKS, ("layer", 0)) | fit_linear(model, [3], text)
    def fails(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(where, fails)
    with pytest.raises(KeyboardInterrupt): distil(model, plan, text, steps=1)
    monkeypatch.undo()
    assert everything(model) == before


def test_what_did_not_learn_does_not_learn_afterwards(llama, text):
    model = copy.deepcopy(llama)
    for i, p in enumerate(model.parameters()): p.requires_grad_(i % 2 == 0)
    before = everything(model)
    distil(model, without(("attention", 1)), text, steps=1)
    assert everything(model) == before


def test_weights_that_are_not_finite_are_refused(llama, text):
    broken = copy.deepcopy(llama)
    broken.model.layers[3].mlp.up_proj.weight.data[7, 5] = np.nan
    message = "1 weights of the model hold NaN or infinite values: model.layers.3.mlp.up_proj.weight"
    for heal in (lambda: fit_linear(broken, [1], text), lambda: distil(broken, without(("mlp", 1)), text, steps=1)):
        with pytest.raises(ValueError, match=message): heal()


@pytest.mark.parametrize("call,message", [
    (lambda m, t: fit_linear(m, [7], t), "no layers \\[7\\]"),
    (lambda m, t: fit_linear(m, [1], t[0]), "must have shape"),
    (lambda m, t: fit_linear(m, [1], t[:1, :1]), "two tokens at least"),
    (lambda m, t: distil(m, without(("attention", 1)), t[0]), "must have shape"),
    (lambda m, t: distil(m, without(("attention", 1)), t, steps=0), "steps=0: must be at least 1"),
    (lambda m, t: distil(m, without(("attention", 1)), t, rank=0, batch_size=0), "batch_size=0, rank=0: must be"),
    (lambda m, t: distil(m, Plan({}, 7), t), "layers 7 there, 5 here"),
    (lambda m, t: distil(m, Plan({Block("attention", 1): LinearMap(torch.zeros(64, 32))}, 5), t),
     "must have shape \\(64, 64\\)")])
def test_bad_input(call, message, llama, text):
    before = everything(llama)
    with pytest.raises(ValueError, match=message): call(llama, text)
    assert everything(llama) == before


# The chapter

@pytest.mark.parametrize("target,criterion", [("attention", "cosine"), ("layer", "bucket")])
def test_the_chapter_runs_on_a_small_model(target, criterion, word_folder, tmp_path):
    parameters = dict(model=str(word_folder), target=target, criterion=criterion, samples=4, length=32, k=1, steps=2,
                      batch_size=2, rank=2, windows=3, window_length=16, out=str(tmp_path / "out"))
    papermill.execute_notebook(ROOT / "nbs/06_healing.ipynb", tmp_path / "out.ipynb", parameters, cwd=str(tmp_path),
                               kernel_name="python3", progress_bar=False)
    written = {"heal.csv", "heal.md", "heal.txt", "heal.svg", "heal.png"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == written
    code = [c for c in nbformat.read(tmp_path / "out.ipynb", 4).cells if c.cell_type == "code"]
    said = " ".join(o.get("text", "") for c in code for o in c.outputs if o.get("name") == "stdout")
    assert "nan" not in re.findall(r"\w+", said)
    assert ("linear maps" in (tmp_path / "out/heal.csv").read_text()) == (target == "attention")
