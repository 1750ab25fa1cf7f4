"""Searching for sets of blocks, on a random decoder of every supported class: kept states change the cost of a trial and never its result."""
import numpy as np
import pytest
import torch
from conftest import DECODERS, make_decoder

from entrodrop.dynamics import measure
from entrodrop.estimators import bucket_entropy
from entrodrop.pruning import _apply, _undo, dropped
from entrodrop.search import Trials, candidates, evolve, exchange, greedy, iterative, linearised

SETS = [{("attention", 1), ("mlp", 3)}, {("layer", 2), ("attention", 0)}, {("mlp", 4)}, {("attention", 1), ("attention", 4)}, {("layer", 0), ("layer", 4)}]


@pytest.fixture(scope="module", params=DECODERS)
def model(request): return make_decoder(request.param)


@pytest.fixture(scope="module")
def text(): return torch.randint(2, 90, (6, 24), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def log_probabilities(model, text, blocks=()):
    "Of a model without blocks, by dropping them and a forward pass"
    changes = []
    for target in ("attention", "mlp", "layer"): changes += _apply(model, target, [i for t, i in blocks if t == target])
    try: return model(text, use_cache=False).logits.float().log_softmax(-1)
    finally: _undo(changes)


def test_a_loss_is_that_of_the_pruned_model_from_whatever_base(model, text):
    p, kl, nll = log_probabilities(model, text), Trials(model, text, "kl", 4), Trials(model, text, "nll", 4)
    assert kl.passes == pytest.approx(1)
    for base in [(), *SETS]:
        kl.rebase(base)
        nll.rebase(base)
        for blocks in [(), *SETS]:
            q = log_probabilities(model, text, blocks)
            np.testing.assert_allclose(kl.losses(blocks), (p.exp() * (p - q)).sum(-1).mean(1), rtol=3e-3, atol=2e-5)
            np.testing.assert_allclose(nll.losses(blocks), -q[:, :-1].gather(2, text[:, 1:, None])[..., 0].mean(1), rtol=1e-4)
    assert torch.equal(log_probabilities(model, text), p)


def test_a_trial_costs_the_layers_from_the_first_difference_on(model, text):
    trials = Trials(model, text)
    def cost(blocks):
        before = trials.passes
        trials.losses(blocks)
        return (trials.passes - before) * trials.total
    of = trials.weights
    assert cost(()) == pytest.approx(trials.head)
    assert cost({("attention", 3)}) == pytest.approx(trials.head + of["mlp", 3] + of["layer", 4])
    trials.rebase({("layer", 1), ("layer", 3)})
    assert cost({("layer", 1), ("layer", 3), ("mlp", 4)}) == pytest.approx(trials.head + of["attention", 4])
    assert cost({("layer", 1)}) == pytest.approx(trials.head + of["layer", 3] + of["layer", 4])


def test_linear_maps_leave_no_trace_and_cached_generation_agrees(model, text):
    before = log_probabilities(model, text)
    with linearised(model, [0, 2, 3], text):
        assert not torch.equal(log_probabilities(model, text), before)
        kept, fresh = (model.generate(text[:1, :12], max_new_tokens=8, do_sample=False, use_cache=c) for c in (True, False))
        assert torch.equal(kept, fresh)
    assert torch.equal(log_probabilities(model, text), before)


def test_a_linear_map_is_nearer_than_nothing(llama, text):
    profile, trials = measure(llama, text, {}), Trials(llama, text)
    p = candidates(profile, "attention")[2:3]
    with linearised(llama, [p[0][1]], text): mapped = log_probabilities(llama, text)
    dense = log_probabilities(llama, text)
    assert (dense.exp() * (dense - mapped)).sum(-1).mean() < trials.losses(p).mean()


def test_a_killed_search_leaves_the_model_whole(llama, text, monkeypatch):
    before, trials = log_probabilities(llama, text), Trials(llama, text)
    monkeypatch.setattr(trials, "_log_probabilities", lambda z: 1 / 0)
    with pytest.raises(ZeroDivisionError): greedy(trials, [("attention", 1), ("attention", 2)], 2)
    with pytest.raises(ZeroDivisionError), linearised(llama, [1], text): 1 / 0
    assert torch.equal(log_probabilities(llama, text), before)


def test_searches_find_what_exhaustive_search_finds(llama, text):
    every = candidates(measure(llama, text, {}), "layer")
    trials = Trials(llama, text)
    pairs = {frozenset((a, b)): trials.losses((a, b)).mean() for a in every for b in every if a < b}
    best = min(pairs, key=pairs.get)
    assert frozenset(evolve(Trials(llama, text, batch_size=2), every, 2, 1000, generations=40).order) == best
    found = exchange(Trials(llama, text), greedy(Trials(llama, text), every, 2), every, 2, tries=5, rounds=5)
    assert found.record.loss.iloc[0] == pytest.approx(pairs[frozenset(found.order)], rel=1e-4)
    assert pairs[frozenset(found.order)] <= sorted(pairs.values())[2]  # a local optimum, of ten


def test_a_selection_becomes_a_plan_that_drops_its_blocks(llama, text):
    profile = measure(llama, text, dict(bucket=bucket_entropy))
    selection = greedy(Trials(llama, text), candidates(profile, "attention", ["cosine", "bucket"], 4), 3, tries=2)
    plan = selection.plan(profile, "attention", 2)
    with dropped(llama, plan): pruned = log_probabilities(llama, text)
    assert torch.equal(pruned, log_probabilities(llama, text, selection.order[:2]))
    assert plan.provenance["selection"]["passes"] == selection.record.passes[1] < selection.record.passes[2]


def test_gains_start_from_the_dense_model(llama, text):
    every = candidates(measure(llama, text, {}), "attention")
    trials = Trials(llama, text, "nll")
    assert trials.passes == pytest.approx(1) and trials.dense_loss == pytest.approx(trials.losses(()).mean())
    rises = {b: trials.losses({b}).mean() - trials.dense_loss for b in every}
    cost = {b: 1. + 9 * (b == max(rises, key=rises.get)) for b in every}  # per amount, another block may be best
    assert greedy(Trials(llama, text, "nll"), every, 1, cost=cost).order[0] == min(every, key=lambda b: rises[b] / cost[b])


def test_measured_anew_ranks_what_is_left(llama, text):
    order = [i for _, i in iterative(llama, text, "attention", "bucket", 3, dict(bucket=bucket_entropy)).order]
    with torch.inference_mode():
        for step, chosen in enumerate(order):
            changes = _apply(llama, "attention", order[:step])
            try: scores = measure(llama, text, dict(bucket=bucket_entropy)).scores("attention", "bucket").mean(0)
            finally: _undo(changes)
            assert chosen == min((i for i in range(5) if i not in order[:step]), key=lambda i: scores[i])


@pytest.mark.parametrize("call,message", [
    (lambda m, t: Trials(m, t[0]), "must have shape"), (lambda m, t: Trials(m, t[:, :1], "nll"), "must have shape"), (lambda m, t: Trials(m, t, "ppl"), "unknown loss 'ppl'; choose kl or nll"),
    (lambda m, t: greedy(Trials(m, t), [("attention", 0), ("layer", 0)], 2), "after 1 blocks no candidate is left")])
def test_bad_input(call, message, llama, text):
    with pytest.raises(ValueError, match=message): call(llama, text)
