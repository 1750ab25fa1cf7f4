"""Searches on a random decoder of every class: kept states change what a trial costs, and never its result."""
import copy
import hashlib

import numpy as np
import pytest
import torch
from conftest import DECODERS, make_decoder
from onlooker import multiplications

from entrodrop.architectures import fingerprint, layers_share, multiplied
from entrodrop.dynamics import measure
from entrodrop.estimators import bucket_entropy
from entrodrop.healing import fit_linear
from entrodrop.models import describe_model
from entrodrop.rivals import laco
from entrodrop.search import Trials, candidates, evolve, exchange, greedy, iterative, price
from entrodrop.speed import account, savings
from entrodrop.surgery import Block, Drop, NewWeights, Plan, edited

KINDS = ("attention", "mlp", "layer")
SETS = [{("attention", 1), ("mlp", 3)}, {("layer", 2), ("attention", 0)}, {("mlp", 4)},
        {("attention", 1), ("attention", 4)}, {("layer", 0), ("layer", 4)}, {("attention", 2), ("mlp", 2)}]


@pytest.fixture(scope="module", params=DECODERS)
def model(request): return make_decoder(request.param)


@pytest.fixture(scope="module")
def text(): return torch.randint(2, 90, (6, 24), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def log_probabilities(model, text, what=()):
    "Of a model without blocks, or under a plan, by editing it and a forward pass"
    plan = what if isinstance(what, Plan) else Plan.dropping(what, 5)
    with edited(model, plan, strict=False): return model(text, use_cache=False).logits.float().log_softmax(-1)


def divergences(model, text, what):
    p, q = log_probabilities(model, text), log_probabilities(model, text, what)
    return (p.exp() * (p - q)).sum(-1).mean(1)


def every_kind(): return [(kind, i) for kind in KINDS for i in range(5)]


# Trials

def test_a_loss_is_that_of_the_pruned_model_from_whatever_base(model, text):
    p, kl, nll = log_probabilities(model, text), Trials(model, text, "kl", 4), Trials(model, text, "nll", 4)
    assert kl.passes == pytest.approx(1)
    for base in [(), *SETS]:
        kl.rebase(base)
        nll.rebase(base)
        for blocks in [(), *SETS]:
            q = log_probabilities(model, text, blocks)
            np.testing.assert_allclose(kl.losses(blocks), (p.exp() * (p - q)).sum(-1).mean(1), rtol=3e-3, atol=2e-5)
            likelihood = q[:, :-1].gather(2, text[:, 1:, None])[..., 0].mean(1)
            np.testing.assert_allclose(nll.losses(blocks), -likelihood, rtol=1e-4)
    assert torch.equal(log_probabilities(model, text), p)


def mixtures(model, text):
    "Plans of every kind of edit: maps, new weights, drops, and all of them"
    maps, weights = fit_linear(model, [1, 3], text), {"mlp.down_proj.weight": torch.randn(64, 128)}
    weights = Plan({Block("layer", 2): NewWeights(weights)}, 5)
    return [Plan.dropping(SETS[1], 5), maps, weights, maps | weights | Plan.dropping([("mlp", 4), ("layer", 0)], 5)]


def test_a_plan_is_tried_as_well(llama, text):
    trials, plans = Trials(llama, text, batch_size=4), mixtures(llama, text)
    for base in ((), SETS[0], *plans):
        trials.rebase(base)
        for what in (*plans, SETS[0], ()):
            expected = divergences(llama, text, what)
            np.testing.assert_allclose(trials.losses(what), expected, rtol=3e-3, atol=2e-5)


def test_a_plan_costs_what_an_onlooker_counts(llama, text):
    trials, plans = Trials(llama, text, batch_size=4), mixtures(llama, text)
    for base in ((), *plans):
        trials.rebase(base)
        for what in (*plans, SETS[0]):
            before = trials.passes
            with multiplications() as seen: trials.losses(what)
            assert (trials.passes - before) * trials.counter.total * text.numel() == pytest.approx(sum(seen))


def test_a_trial_costs_the_layers_from_the_first_difference_on(model, text):
    trials = Trials(model, text)
    def cost(blocks):
        before = trials.passes
        trials.losses(blocks)
        return (trials.passes - before) * trials.counter.total
    of, head = trials.counter.weights, trials.counter.head
    assert cost(()) == pytest.approx(head)
    assert cost({("attention", 3)}) == pytest.approx(head + of["mlp", 3] + of["layer", 4])
    trials.rebase({("layer", 1), ("layer", 3)})
    assert cost({("layer", 1), ("layer", 3), ("mlp", 4)}) == pytest.approx(head + of["attention", 4])
    assert cost({("layer", 1)}) == pytest.approx(head + of["layer", 3] + of["layer", 4])


def test_a_set_that_names_a_layer_and_its_attention_costs_what_the_layer_does(llama, text):
    trials = Trials(llama, text)
    both, layer = {("layer", 2), ("attention", 2), ("mlp", 4)}, {("layer", 2), ("mlp", 4)}
    for act in (trials.losses, trials.rebase):
        spent = []
        for blocks in (both, layer):
            trials.rebase(())
            before = trials.passes
            act(blocks)
            spent.append(trials.passes - before)
        assert spent[0] == pytest.approx(spent[1]) and spent[1] > 0
    np.testing.assert_array_equal(trials.losses(both), trials.losses(layer))


def test_a_set_may_leave_nothing(llama, text):
    everything = [("attention", i) for i in range(5)] + [("mlp", i) for i in range(5)]
    trials, embedded = Trials(llama, text), llama.model.embed_tokens(text)
    with torch.inference_mode(): q = llama.lm_head(llama.model.norm(embedded)).log_softmax(-1)
    p = log_probabilities(llama, text)
    np.testing.assert_allclose(trials.losses(everything), (p.exp() * (p - q)).sum(-1).mean(1), rtol=1e-3)


def test_a_part_of_the_text_costs_its_share_of_the_sequences(llama, text):
    trials = Trials(llama, text, batch_size=4)  # of six
    before = trials.passes
    assert len(trials.losses((), [0])) == 4
    assert (trials.passes - before) * trials.counter.total == pytest.approx(trials.counter.head * 4 / 6)


def test_trials_describe_their_model_once_and_their_text(llama, text, monkeypatch):
    trials = Trials(llama, text)
    assert trials.described["fingerprint"] == fingerprint(llama)
    assert trials.text["tokens_sha256"] == hashlib.sha256(text.numpy().tobytes()).hexdigest()
    monkeypatch.setattr("entrodrop.surgery.fingerprint", lambda model: 1 / 0)
    monkeypatch.setattr("entrodrop.models.fingerprint", lambda model: 1 / 0)
    described = dict(name="a", layers=5, fingerprint="f" * 16)
    found = greedy(Trials(llama, text, described=described), [("attention", 1), ("attention", 2)], 2)
    assert found.model == described and found.first(1).model == described
    trials.losses({("attention", 1)})  # trials hash no weights


def test_weights_that_are_not_finite_are_refused_and_predictions_are_infinitely_far(llama, text):
    broken = copy.deepcopy(llama)
    broken.model.layers[3].mlp.up_proj.weight.data[7, 5] = np.nan
    message = "1 weights of the model hold NaN or infinite values: model.layers.3.mlp.up_proj.weight"
    for search in (lambda: Trials(broken, text), lambda: iterative(broken, text, "attention", "cosine", 2, {})):
        with pytest.raises(ValueError, match=message): search()
    huge = copy.deepcopy(llama)
    huge.model.norm.weight.data.fill_(1e38)
    huge.lm_head.weight.data.fill_(1e38)
    for loss in ("kl", "nll"):
        with pytest.raises(ValueError, match="predictions are not finite"): Trials(huge, text, loss)
    trials = Trials(llama, text)
    trials.judge.logits = lambda z: torch.full((z.shape[0], 100), torch.nan)
    assert (trials.losses({("attention", 1)}) == np.inf).all()


def test_a_killed_search_leaves_the_model_whole(llama, text, monkeypatch):
    before, trials, modules = log_probabilities(llama, text), Trials(llama, text), list(llama.modules())
    monkeypatch.setattr(trials.judge, "logits", lambda z: 1 / 0)
    with pytest.raises(ZeroDivisionError) as kept:  # with its frames
        greedy(trials, [("attention", 1), ("attention", 2)], 2)
    assert torch.equal(log_probabilities(llama, text), before) and list(llama.modules()) == modules and kept


def test_trials_go_on_after_a_base_that_failed(llama, text, monkeypatch):
    trials, expected = Trials(llama, text, batch_size=2), divergences(llama, text, SETS[0])
    calls, forward = [], llama.model.layers[4].forward
    def fails(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs) if len(calls) < 3 else 1 / 0
    monkeypatch.setattr(llama.model.layers[4], "forward", fails)
    with pytest.raises(ZeroDivisionError): trials.rebase({("attention", 0)})
    monkeypatch.undo()
    np.testing.assert_allclose(trials.losses(SETS[0]), expected, rtol=3e-3, atol=2e-5)


# What searches cost

SEARCHES = dict(
    greedy=lambda trials, blocks: greedy(trials, blocks, 3),
    few_tries=lambda trials, blocks: greedy(trials, blocks, 3, tries=2),
    finalists=lambda trials, blocks: greedy(trials, blocks, 3, tries=3, finalists=1),
    budget=lambda trials, blocks: greedy(trials, blocks, cost=dict.fromkeys(blocks, 1.), budget=2, finalists=2),
    exchange=lambda trials, blocks: exchange(trials, [blocks[:2], blocks[1:3]], blocks),
    exchange_finalists=lambda trials, blocks: exchange(trials, [blocks[:2], blocks[3:5]], blocks, tries=3, finalists=1,
                                                       rounds=3),
    evolve=lambda trials, blocks: evolve(trials, blocks, 2, passes=9, offspring=4, start=3),
    evolve_two_batches=lambda trials, blocks: evolve(trials, blocks, 3, passes=9, offspring=3, survivors=1, batches=2,
                                                     start=2))
DENSE_ONLY = [name for name in DECODERS if name not in ("mixtral", "qwen3_moe")]  # of experts, a token meets some


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("loss", ["kl", "nll"])
@pytest.mark.parametrize("kinds", ["attention", "every"])
def test_every_search_costs_what_an_onlooker_counts(search, loss, kinds, llama, text):
    blocks = [("attention", i) for i in range(5)] if kinds == "attention" else every_kind()
    with multiplications() as seen: trials = Trials(llama, text, loss, 2)
    weights = trials.counter.total * text.numel()
    assert trials.passes * weights == pytest.approx(sum(seen))
    with multiplications() as seen: fresh = SEARCHES[search](trials, blocks)
    assert (fresh.steps.passes.iloc[-1] - trials.setup) * weights == pytest.approx(sum(seen))
    assert fresh.tokens == fresh.steps.tokens.iloc[-1] == fresh.steps.passes.iloc[-1] * text.numel()
    trials.rebase({("layer", 1), ("mlp", 3)})  # whatever the trials were used for before
    with multiplications() as seen: again = SEARCHES[search](trials, blocks)
    assert (again.steps.passes.iloc[-1] - trials.setup) * weights == pytest.approx(sum(seen))


@pytest.mark.parametrize("name", DENSE_ONLY)
def test_a_part_of_the_text_costs_what_an_onlooker_counts(name, text):
    model = make_decoder(name)
    trials = Trials(model, text, batch_size=4)  # of six sequences: batches of four and two
    for base in ((), {("attention", 2)}, {("layer", 1), ("mlp", 3)}):
        trials.rebase(base)
        for blocks in ((), {("attention", 3)}, {("layer", 2), ("mlp", 4), ("attention", 2)}):
            for batches, samples in ((None, 6), ([0], 4), ([1], 2), ([0, 1], 6)):
                before = trials.passes
                with multiplications() as seen: assert len(trials.losses(blocks, batches)) == samples
                spent = (trials.passes - before) * trials.counter.total * text.numel()
                assert spent == pytest.approx(sum(seen)), (base, blocks, batches)


@pytest.mark.parametrize("target", KINDS)
def test_what_is_measured_anew_costs_what_an_onlooker_counts(target, llama, text):
    weights, head = multiplied(llama)
    total = (head + sum(n for (kind, _), n in weights.items() if kind == "layer")) * text.numel()
    with multiplications() as seen: found = iterative(llama, text, target, "cosine", 3, {})
    assert found.steps.passes.iloc[-1] * total == pytest.approx(sum(seen))
    assert found.tokens == found.steps.passes.iloc[-1] * text.numel()
    assert found.steps.passes.iloc[0] == pytest.approx(layers_share(llama))


def test_a_second_search_on_the_same_trials_costs_what_the_first_did(llama, text):
    every, trials = candidates(measure(llama, text, {}), "attention"), Trials(llama, text)
    one, two = (greedy(trials, every, 3, tries=2) for _ in range(2))
    assert one.blocks == two.blocks
    assert two.steps.passes.tolist() == pytest.approx(one.steps.passes.tolist(), abs=1)  # going back takes less
    assert one.steps.passes.tolist() == greedy(Trials(llama, text), every, 3, tries=2).steps.passes.tolist()


# What searches find

def overlap(blocks): return any(a != b and a[1] == b[1] and "layer" in (a[0], b[0]) for a in blocks for b in blocks)


@pytest.mark.parametrize("k", [1, 3, 5, 9, 10])
def test_evolution_drops_k_blocks_of_any_kinds_and_none_twice(llama, text, k):
    for seed in range(5):
        found = evolve(Trials(llama, text), every_kind(), k, passes=1000, seed=seed, offspring=4, start=4,
                       generations=4)
        assert len(found.blocks) == len({*found.blocks}) == k and not overlap(found.blocks)


def test_a_budget_is_met_and_no_block_too_many(llama, text):
    profile, cost = measure(llama, text, {}), savings(llama, 24)
    every = [b for kind in KINDS for b in candidates(profile, kind)]
    for amount in cost:
        costs, budget = cost[amount].to_dict(), .3 * sum(cost[amount]["layer", i] for i in range(5))
        found = greedy(Trials(llama, text), every, cost=costs, budget=budget)
        assert sum(costs[b] for b in found.blocks) >= budget > sum(costs[b] for b in found.blocks[:-1])
        assert amount != "kv_bytes" or not found.layers_of("mlp")
        plan = found.within(budget, costs)
        assert plan.edits == found.first(len(found)).edits
        np.testing.assert_allclose(divergences(llama, text, plan).mean(), found.scores[-1], rtol=3e-3)


def test_a_price_is_paid_for_what_is_saved():
    assert price(6., 3) == 2 and price(6., 2) > price(6., 3)  # of equal harm, what saves more goes first
    assert price(-6., 3) < price(-6., 2) < 0 and price(0., 5) == 0


def test_where_the_loss_falls_what_saves_more_goes_first(llama, text):
    trials = Trials(llama, text)
    falls = {("attention", 0): -.1, ("mlp", 0): -.1, ("mlp", 1): .1}
    trials.losses = lambda blocks, batches=None: np.full(6, min(falls[b] for b in blocks))
    trials.rebase = lambda blocks: None
    cost = {("attention", 0): 1, ("mlp", 0): 10, ("mlp", 1): 100}
    assert greedy(trials, list(falls), 1, cost=cost).blocks == (("mlp", 0),)


def test_gains_start_from_the_dense_model(llama, text):
    every = candidates(measure(llama, text, {}), "attention")
    trials = Trials(llama, text, "nll")
    assert trials.passes == pytest.approx(1) and trials.dense_losses.mean() == pytest.approx(trials.losses(()).mean())
    rises = {b: trials.losses({b}).mean() - trials.dense_losses.mean() for b in every}
    cost = {b: 1. + 9 * (b == max(rises, key=rises.get)) for b in every}  # per amount, another block may be best
    best = min(every, key=lambda b: price(rises[b], cost[b]))
    assert greedy(Trials(llama, text, "nll"), every, 1, cost=cost).blocks[0] == best


def test_racing_judges_fewer_on_all_of_the_text(llama, text):
    every = candidates(measure(llama, text, {}), "attention")
    judged = []
    trials = Trials(llama, text, batch_size=2)
    losses = trials.losses
    trials.losses = lambda blocks, batches=None: judged.append(batches) or losses(blocks, batches)
    raced, full = greedy(trials, every, 2, finalists=2), greedy(Trials(llama, text, batch_size=2), every, 2)
    assert judged == [[0]] * 5 + [None] * 2 + [[0]] * 4 + [None] * 2
    assert raced.steps.passes.iloc[-1] < full.steps.passes.iloc[-1]


def test_searches_find_what_exhaustive_search_finds(llama, text):
    every = candidates(measure(llama, text, {}), "layer")
    trials = Trials(llama, text)
    pairs = {frozenset((a, b)): trials.losses((a, b)).mean() for a in every for b in every if a < b}
    best = min(pairs, key=pairs.get)
    evolved = evolve(Trials(llama, text, batch_size=2), every, 2, 1000, generations=40)
    assert frozenset(evolved.blocks) == best
    starts = [greedy(Trials(llama, text), every, 2).blocks]
    found = exchange(Trials(llama, text), starts, every, tries=5, rounds=5)
    assert found.scores == pytest.approx([pairs[frozenset(found.blocks)]] * 2, rel=1e-4)
    assert pairs[frozenset(found.blocks)] <= sorted(pairs.values())[2]  # a local optimum, of ten


def test_measured_anew_ranks_what_is_left(llama, text):
    entropy = dict(bucket=bucket_entropy)
    found = iterative(llama, text, "attention", "bucket", 3, entropy)
    order = found.layers_of("attention")
    for step, chosen in enumerate(order):
        gone = Plan.dropping([("attention", i) for i in order[:step]], 5)
        with torch.inference_mode(), edited(llama, gone):
            scores = measure(llama, text, entropy).scores("attention", "bucket").mean(0)
        assert chosen == min((i for i in range(5) if i not in order[:step]), key=lambda i: scores[i])
        assert found.scores[step] == pytest.approx(scores[chosen])


@pytest.mark.parametrize("target", KINDS)
def test_measured_anew_speaks_of_the_dense_model(target, llama, text):
    found = iterative(llama, text, target, "cosine", 3, {})
    assert found.model == describe_model(llama, "") and found.record["target"] == target
    plan = found.first(2)
    assert plan.k == 2 and plan.record[0]["tokens"] == found.steps.tokens[1] < found.tokens
    log_probabilities(llama, text, plan)


# What they return

def test_a_ranking_of_a_search_becomes_a_plan_that_drops_its_blocks(llama, text):
    profile = measure(llama, text, dict(bucket=bucket_entropy))
    ranking = greedy(Trials(llama, text), candidates(profile, "attention", ["cosine", "bucket"], 4), 3, tries=2)
    plan = ranking.first(2)
    assert plan.gone("attention") == tuple(sorted(ranking.layers_of("attention")[:2]))
    with edited(llama, plan), torch.inference_mode(): pruned = llama(text, use_cache=False).logits.float()
    assert torch.equal(pruned.log_softmax(-1), log_probabilities(llama, text, ranking.blocks[:2]))
    (record,) = plan.record
    assert record["tokens"] == ranking.steps.tokens[1] < ranking.steps.tokens[2] == ranking.tokens
    assert record["method"] == "greedy kl, 2 tries" and record["scores"] == pytest.approx(ranking.steps.loss.tolist())
    assert record["tokens_sha256"] == hashlib.sha256(text.numpy().tobytes()).hexdigest()
    assert record["settings"]["tries"] == 2 and record["text"] == dict(samples=6, length=24)


@pytest.mark.parametrize("search", SEARCHES)
def test_a_plan_of_every_search_can_be_kept(search, llama, text, tmp_path):
    ranking = SEARCHES[search](Trials(llama, text, batch_size=2), every_kind())
    plan = ranking.first(len(ranking))
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan and again.model["fingerprint"] == fingerprint(llama)
    assert all(edit == Drop() for edit in plan.edits.values())
    assert divergences(llama, text, again).mean() == pytest.approx(ranking.scores[-1], rel=3e-3)


@pytest.mark.parametrize("search", ["exchange", "evolve"])
def test_blocks_that_were_chosen_together_are_no_order(search, llama, text):
    found = SEARCHES[search](Trials(llama, text, batch_size=2), every_kind())
    with pytest.raises(ValueError, match="chose its 2 blocks together; search again for 1"): found.first(1)


# Speed that they go by

@pytest.mark.parametrize("name,routed", [("mixtral", 2), ("qwen3_moe", 2)])
def test_operations_of_experts_are_counted(name, routed):
    model = make_decoder(name)
    row, config = savings(model, 24).loc["mlp", 3], model.config
    width = getattr(config, "moe_intermediate_size", config.intermediate_size)
    assert row.flops == pytest.approx(2 * (routed * 3 * 64 * width + 64 * 4))  # two of three matrices, and the router


def test_savings_are_what_dropping_saves(model):
    table, dense = savings(model, 24), account(model, 1, 24)
    windowed = getattr(model.config.get_text_config(), "sliding_window", None)
    for block in [(kind, i) for kind in KINDS for i in (0, 3)]:
        with edited(model, Plan.dropping([block], 5)): less = account(model, 1, 24)
        row = table.loc[block]
        assert row.parameters == dense["parameters"] - less["parameters"]
        assert row.flops * 24 == pytest.approx(dense["prefill_flops"] - less["prefill_flops"], rel=.02)
        if not windowed: assert row.kv_bytes * 24 == pytest.approx(dense["kv_bytes"] - less["kv_bytes"])


def test_a_merged_model_is_tried_too(llama, text):
    plan = laco(llama, text[:2], 2, merge=3)
    np.testing.assert_allclose(Trials(llama, text).losses(plan), divergences(llama, text, plan), rtol=3e-3, atol=2e-5)


ATTENTION = [("attention", 0)]


@pytest.mark.parametrize("call,message", [
    (lambda m, t: Trials(m, t[0]), "must have shape"),
    (lambda m, t: Trials(m, t[:, :1], "nll"), "must have shape"),
    (lambda m, t: Trials(m, t, "ppl"), "unknown loss 'ppl'; choose kl or nll"),
    (lambda m, t: Trials(m, t).losses([("head", 0)]), "unknown kind of block 'head'"),
    (lambda m, t: Trials(m, t).losses([("mlp", 5)]), "there is no layer 5"),
    (lambda m, t: greedy(Trials(m, t), [("attention", 0), ("layer", 0)], 2), "after 1 blocks no candidate is left"),
    (lambda m, t: greedy(Trials(m, t), ATTENTION), "either k, or a budget"),
    (lambda m, t: greedy(Trials(m, t), ATTENTION, cost={("attention", 0): 3}, budget=4),
     "budget=4, but after 1 blocks, which save 3, no candidate"),
    (lambda m, t: greedy(Trials(m, t), every_kind(), 1.5), "k must be a whole number of at least 1, got 1.5"),
    (lambda m, t: greedy(Trials(m, t), every_kind(), 2, tries=0), "tries must be a whole number"),
    (lambda m, t: evolve(Trials(m, t), every_kind(), 2, 9, offspring=0), "offspring must be a whole number"),
    (lambda m, t: evolve(Trials(m, t), every_kind(), 11, 9), "k=11, but only 10 of the candidates can be dropped"),
    (lambda m, t: exchange(Trials(m, t), [], ATTENTION), "sets of one size, got none"),
    (lambda m, t: iterative(m, t, "attention", "cosine", 0, {}), "k must be a whole number")])
def test_bad_input(call, message, llama, text):
    with pytest.raises(ValueError, match=message): call(llama, text)


@pytest.mark.parametrize("of", [dict(layers=3), dict(model=dict(model_type="gpt2")), dict(model=dict(hidden=7))])
def test_a_plan_for_another_model_is_not_tried(of, llama, text):
    trials = Trials(llama, text)
    plan = Plan.dropping([("attention", 1)], **dict(layers=5) | of)
    for tried in (trials.losses, trials.rebase):
        with pytest.raises(ValueError, match="different models|one plan is for"): tried(plan)
