"""Rivals on a random decoder of every class: nothing is left changed, and what their definitions imply holds."""
import copy
import hashlib

import numpy as np
import pytest
import torch
from conftest import DECODERS, LAYERS, make_decoder
from onlooker import multiplications

from entrodrop import rivals
from entrodrop.architectures import decoder_layers, fingerprint, layers_share, multiplied, stream
from entrodrop.rivals import (
    PUBLISHED_ORDERS,
    angular_distances,
    laco,
    magnitude,
    nearest_run,
    ordered,
    plus,
    published_ranking,
    taylor,
)
from entrodrop.surgery import Block, Plan, edited


@pytest.fixture(scope="module", params=DECODERS)
def model(request): return make_decoder(request.param)


@pytest.fixture(scope="module")
def text(): return torch.randint(2, 90, (5, 20), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def logits(model, text): return model(text, use_cache=False).logits


def without(model, *layers): return edited(model, Plan.dropping([("layer", i) for i in layers], LAYERS))


# Scores

def test_scores_of_weights_and_gradients(model, text):
    before = logits(model, text)
    for score in (lambda target: magnitude(model, target), lambda target: taylor(model, text, target, 2)):
        parts = {target: score(target) for target in ("attention", "mlp", "layer")}
        assert all(v.shape == (LAYERS,) and (v > 0).all() for v in parts.values())
        np.testing.assert_allclose(parts["layer"], parts["attention"] + parts["mlp"], rtol=1e-4)
    assert torch.equal(logits(model, text), before)
    assert all(p.grad is None for p in model.parameters())


def test_a_block_without_effect_has_no_gradient(llama, text):
    model = copy.deepcopy(llama)
    model.model.layers[3].mlp.down_proj.weight.data.zero_()
    scores = taylor(model, text, "mlp")
    assert scores.argmin() == 3 and scores[3] == 0


def test_scores_become_a_ranking_without_the_layers_that_are_kept():
    scores = [5, 4, 3, 2, 1, 0, 1, 9]
    found = ordered("attention", scores, "magnitude+", tokens=12, keep=plus(8), model=dict(layers=8, name="a"))
    assert found.layers_of("attention") == (5, 4) and found.scores == (0, 1) and found.record["all_scores"] == scores
    assert found.record["protected"] == [0, 1, 2, 3, 6, 7]
    (record,), plan = found.first(1).record, found.first(1)
    assert plan.model == dict(layers=8, name="a") and plan.gone("attention") == (5,)
    assert (record["method"], record["tokens"], record["target"]) == ("magnitude+", 12, "attention")
    with pytest.raises(ValueError, match="k=3 but magnitude\\+ has only 2 attention blocks"): found.first(3)


def test_angles_are_between_states_at_the_last_token(model, text):
    d = angular_distances(model, text, 2)
    assert d.shape == (LAYERS + 1,) * 2 and (0 <= d).all() and (d <= 1).all()
    np.testing.assert_allclose(d, d.T)
    np.testing.assert_allclose(d, angular_distances(model, text, 5), atol=1e-4)
    first = [angular_distances(model, text[:, :7], batch_size)[0, 1] for batch_size in (8, 1)]
    np.testing.assert_allclose(*first, atol=1e-4)
    run = nearest_run(d, 2, tokens=100)
    low, high = run.layers_of("layer")
    assert high == low + 1 and d[low, high + 1] == min(d[i, i + 2] for i in range(LAYERS - 1))
    assert run.scores == (d[low, high + 1],) * 2 and run.tokens == run.first(2).record[0]["tokens"] == 100
    with pytest.raises(ValueError, match="chose its 2 blocks together"): run.first(1)


def test_angles_cost_the_layers_alone(llama, text):
    weights, head = multiplied(llama)
    total = head + sum(n for (kind, _), n in weights.items() if kind == "layer")
    with multiplications() as seen: angular_distances(llama, text)
    assert layers_share(llama) * total * text.numel() == pytest.approx(sum(seen))


# Merging

def test_a_merge_of_two_layers_leaves_the_upper_and_is_taken_back(model, text):
    before, shapes = logits(model, text), [[p.shape for p in layer.parameters()] for layer in decoder_layers(model)]
    if shapes[-1] != shapes[-2]:
        with pytest.raises(ValueError, match="layers \\[3, 4\\] differ in the shapes of their weights"):
            laco(model, text, 1, threshold=-1.1, step=None, merge=2)
    else:
        plan = laco(model, text, 1, threshold=-1.1, step=None, merge=2)
        assert plan.gone("layer") == (4,) and plan.reweighted == (3,)
        upper = dict(decoder_layers(model)[4].named_parameters())
        tensors = plan.edits["layer", 3].tensors
        assert tensors.keys() == upper.keys()
        for name, p in upper.items(): torch.testing.assert_close(tensors[name], p.data, rtol=1e-4, atol=1e-4)
        with edited(model, plan): got = logits(model, text)
        torch.testing.assert_close(got, upper_weights_in_the_lower_place(model, text), rtol=1e-3, atol=1e-3)
    assert torch.equal(logits(model, text), before)


def upper_weights_in_the_lower_place(model, text):
    "Logits without layer 4, whose weights stand in layer 3: under that layer's window, where windows are mixed"
    other = copy.deepcopy(model)
    layers = decoder_layers(other)
    layers[3].load_state_dict(layers[4].state_dict())
    with without(other, 4): return logits(other, text)


def test_merging_equal_layers_is_dropping_them(llama, text):
    model = copy.deepcopy(llama)
    for layer in model.model.layers[3:]: layer.load_state_dict(model.model.layers[2].state_dict())
    plan = laco(model, text, 2, threshold=-1.1, step=None, merge=3)
    assert plan.gone("layer") == (3, 4)
    with edited(model, plan): got = logits(model, text)
    with without(model, 3, 4): torch.testing.assert_close(got, logits(model, text), rtol=1e-4, atol=1e-4)


def test_new_weights_are_the_sum_that_the_record_says(llama, text):
    plan = laco(llama, text, 4, threshold=-1.1, step=None, merge=3, interval=1)
    (record,) = plan.record
    assert {int(i) for i in record["mixtures"]} == {*plan.keep} and record["k"] == plan.k == 4
    layers = [dict(layer.named_parameters()) for layer in decoder_layers(llama)]
    for layer, mixture in record["mixtures"].items():
        assert sum(mixture.values()) == 1  # of equal layers, the same layer
        if mixture == {layer: 1}:
            assert int(layer) not in plan.reweighted
            continue
        for name, tensor in plan.edits["layer", int(layer)].tensors.items():
            expected = sum(share * layers[int(i)][name].data for i, share in mixture.items())
            torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [0, 1, 3])
def test_laco_stops_at_k(llama, text, k):
    found = laco(llama, text, k, threshold=-1.1, step=None, merge=3)
    assert len(found.keep) == LAYERS - k and len(decoder_layers(llama)) == LAYERS
    assert not laco(llama, text, k, threshold=1.1, step=None).edits


def last_states(model, text):
    states = {}
    def note(point, z): states["last"] = z
    with torch.inference_mode(), stream(model, note): model.base_model(text, use_cache=False)
    return states["last"].float()


def by_hand_similarity(model, text, low):
    "Of the last states without a layer whose weights stand in the layer below, to those of the whole model"
    dense, other = last_states(model, text), copy.deepcopy(model)
    layers = decoder_layers(other)
    layers[low].load_state_dict(layers[low + 1].state_dict())
    with without(other, low + 1): return torch.cosine_similarity(dense, last_states(other, text), dim=-1).mean().item()


def test_a_threshold_parts_the_merges_that_are_kept_from_those_that_are_not(llama, text):
    similar = {low: by_hand_similarity(llama, text, low) for low in (3, 2, 1, 0)}
    best, others = max(similar.values()), sorted(similar.values())[:-1]
    low = max(similar, key=similar.get)
    found = laco(llama, text, 1, threshold=(best + others[-1]) / 2, step=None, merge=2)
    assert (found.gone("layer"), found.reweighted) == ((low + 1,), (low,))  # only the best pair is similar enough
    next_low = next(i for i, v in similar.items() if v > others[0])
    more = laco(llama, text, 1, threshold=(others[0] + others[1]) / 2, step=None, merge=2)
    assert (more.gone("layer"), more.reweighted) == ((next_low + 1,), (next_low,))
    lowered = laco(llama, text, 1, threshold=.9999, step=.0005, merge=2)  # and by the highest threshold, it is found
    assert lowered.edits == found.edits and best > lowered.record[0]["threshold"] >= best - .0005


@pytest.mark.parametrize("k,threshold", [(2, .9), (3, 0.), (1, .999)])
def test_merging_costs_what_an_onlooker_counts(llama, text, k, threshold):
    weights, head = multiplied(llama)
    total = (head + sum(n for (kind, _), n in weights.items() if kind == "layer")) * text.numel()
    with multiplications() as seen: (record,) = laco(llama, text, k, threshold, merge=2, interval=1).record
    assert record["passes"] * total == pytest.approx(sum(seen))
    assert record["tokens"] == record["passes"] * text.numel()


def test_a_merge_says_for_which_weights_and_from_which_text_it_is(llama, text, tmp_path):
    plan = laco(llama, text, 1, merge=2)
    assert plan.model["fingerprint"] == fingerprint(llama) and plan.method == "LaCo"
    assert plan.record[0]["tokens_sha256"] == hashlib.sha256(text.numpy().tobytes()).hexdigest()
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    other = copy.deepcopy(llama)
    other.model.norm.weight.data += 1
    with pytest.raises(ValueError, match="other weights"): edited(other, again).__enter__()
    assert laco(llama, text, 1, merge=2, described=dict(name="a")).model == dict(name="a")


def test_a_killed_merge_leaves_the_model_whole(llama, text, monkeypatch):
    before, places = logits(llama, text), [p.data_ptr() for p in llama.parameters()]
    monkeypatch.setattr("entrodrop.rivals.F.cosine_similarity", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError): laco(llama, text, 1)
    monkeypatch.undo()
    monkeypatch.setattr(type(llama.model.layers[0].mlp), "forward", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError): laco(llama, text, 1)
    monkeypatch.undo()
    assert torch.equal(logits(llama, text), before) and [p.data_ptr() for p in llama.parameters()] == places


@pytest.mark.parametrize("wrong,message", [
    (dict(k=5), "k must lie between 0 and 4"), (dict(merge=1), "merge must be at least 2"),
    (dict(step=0), "step must be positive"), (dict(k=4, merge=2, interval=4), "whatever the threshold")])
def test_impossible_merging(llama, text, wrong, message):
    with pytest.raises(ValueError, match=message): laco(llama, text, **dict(k=1, threshold=0) | wrong)


# Orders that others published

def test_published_orders_are_rankings():
    for name, known in PUBLISHED_ORDERS.items():
        found = published_ranking(name)
        plan = found.first(4)
        assert found.layers_of("layer") == known["order"] and len(found) == 16
        assert plan.edits.keys() == {Block("layer", i) for i in known["order"][:4]} and plan.layers == 32
        assert plan.model["hidden"] == 4096 and "2410.14649" in plan.record[0]["source"]
    with pytest.raises(ValueError, match="no published order for 'gpt2'"): published_ranking("gpt2")


def test_a_merge_whose_similarity_is_not_finite_is_not_kept(llama, text, monkeypatch):
    monkeypatch.setattr(rivals._Merger, "similarity", lambda self, mixtures: float("nan"))
    assert laco(llama, text, k=2, step=None).k == 0
