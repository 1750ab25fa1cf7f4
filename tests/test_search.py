"""Searching for sets of blocks, on a random decoder of every supported class: kept states change the cost of a trial and never its result."""
import copy
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import DECODERS, make_decoder
from test_architectures import by_hand
from torch import nn
from transformers.pytorch_utils import Conv1D

from entrodrop.dynamics import measure
from entrodrop.estimators import bucket_entropy
from entrodrop.models import fingerprint
from entrodrop.pruning import _apply, _undo, drop, dropped
from entrodrop.speed import account, savings
from entrodrop.rivals import angular_distances, laco
from entrodrop.search import Trials, candidates, change_point, distil, distilled, evolve, exchange, fit_linear, greedy, iterative, layers_share, multiplied

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


@contextmanager
def multiplications(model):
    "What an onlooker counts who knows nothing of blocks: for every matrix that is called, its weights times the tokens that went through it"
    seen = []
    def note(module, args, kwargs, output): seen.append(output.shape[:-1].numel() * module.weight.numel())
    hooks = [m.register_forward_hook(note, with_kwargs=True) for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))]
    try: yield seen
    finally:
        for hook in hooks: hook.remove()


def every_kind(): return [(target, i) for target in ("attention", "mlp", "layer") for i in range(5)]


SEARCHES = dict(
    greedy=lambda trials, blocks: greedy(trials, blocks, 3),
    few_tries=lambda trials, blocks: greedy(trials, blocks, 3, tries=2),
    finalists=lambda trials, blocks: greedy(trials, blocks, 3, tries=3, finalists=1),
    budget=lambda trials, blocks: greedy(trials, blocks, cost=dict.fromkeys(blocks, 1.), budget=2, finalists=2),
    exchange=lambda trials, blocks: exchange(trials, [blocks[:2], blocks[1:3]], blocks),
    exchange_finalists=lambda trials, blocks: exchange(trials, [blocks[:2], blocks[3:5]], blocks, tries=3, finalists=1, rounds=3),
    evolve=lambda trials, blocks: evolve(trials, blocks, 2, passes=9, offspring=4, start=3),
    evolve_two_batches=lambda trials, blocks: evolve(trials, blocks, 3, passes=9, offspring=3, survivors=1, batches=2, start=2))
DENSE_ONLY = [name for name in DECODERS if name not in ("mixtral", "qwen3_moe")]  # of experts, Trials counts all, and a token meets some


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("loss", ["kl", "nll"])
@pytest.mark.parametrize("kinds", ["attention", "every"])
def test_every_search_costs_what_an_onlooker_counts(search, loss, kinds, llama, text):
    blocks = [("attention", i) for i in range(5)] if kinds == "attention" else every_kind()
    with multiplications(llama) as seen: trials = Trials(llama, text, loss, 2)
    weights = trials.total * text.numel()
    assert trials.passes * weights == pytest.approx(sum(seen))
    with multiplications(llama) as seen: fresh = SEARCHES[search](trials, blocks)
    assert (fresh.record.passes.iloc[-1] - trials.setup) * weights == pytest.approx(sum(seen))
    trials.rebase({("layer", 1), ("mlp", 3)})  # whatever the trials were used for before
    with multiplications(llama) as seen: again = SEARCHES[search](trials, blocks)
    assert (again.record.passes.iloc[-1] - trials.setup) * weights == pytest.approx(sum(seen))


@pytest.mark.parametrize("name", DENSE_ONLY)
def test_a_part_of_the_text_costs_what_an_onlooker_counts(name, text):
    model = make_decoder(name)
    trials = Trials(model, text, batch_size=4)  # of six sequences: batches of four and two
    for base in ((), {("attention", 2)}, {("layer", 1), ("mlp", 3)}):
        trials.rebase(base)
        for blocks in ((), {("attention", 3)}, {("layer", 2), ("mlp", 4), ("attention", 2)}):
            for batches, samples in ((None, 6), ([0], 4), ([1], 2), ([0, 1], 6)):
                before = trials.passes
                with multiplications(model) as seen: assert len(trials.losses(blocks, batches)) == samples
                assert (trials.passes - before) * trials.total * text.numel() == pytest.approx(sum(seen)), (base, blocks, batches)


@pytest.mark.parametrize("target", ["attention", "mlp", "layer"])
def test_what_is_measured_anew_costs_what_an_onlooker_counts(target, llama, text):
    weights, head = multiplied(llama)
    total = (head + sum(n for (kind, _), n in weights.items() if kind == "layer")) * text.numel()
    with multiplications(llama) as seen: found = iterative(llama, text, target, "cosine", 3, {})
    assert found.record.passes.iloc[-1] * total == pytest.approx(sum(seen))
    with multiplications(llama) as seen: angular_distances(llama, text)
    assert layers_share(llama) * total == pytest.approx(sum(seen))
    for k, threshold in ((2, .9), (3, 0.), (1, .999)):
        with multiplications(llama) as seen: found = laco(llama, text, k, threshold, merge=2, interval=1)
        assert found.passes * total == pytest.approx(sum(seen))


def overlap(blocks): return any(a != b and a[1] == b[1] and "layer" in (a[0], b[0]) for a in blocks for b in blocks)


@pytest.mark.parametrize("k", [1, 3, 5, 9, 10])
def test_evolution_drops_k_blocks_of_any_kinds_and_none_twice(llama, text, k):
    for seed in range(5):
        found = evolve(Trials(llama, text), every_kind(), k, passes=1000, seed=seed, offspring=4, start=4, generations=4)
        assert len(found.order) == len({*found.order}) == k and not overlap(found.order)


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


def test_weights_that_are_not_finite_are_refused_and_predictions_are_infinitely_far(llama, text):
    broken = copy.deepcopy(llama)
    broken.model.layers[3].mlp.up_proj.weight.data[7, 5] = np.nan
    for search in (lambda: Trials(broken, text), lambda: fit_linear(broken, [1], text), lambda: iterative(broken, text, "attention", "cosine", 2, {}),
                   lambda: distilled(broken, by_hand("attention", (1,)), text, steps=1).__enter__()):
        with pytest.raises(ValueError, match="1 weights of the model hold NaN or infinite values: model.layers.3.mlp.up_proj.weight"): search()
    huge = copy.deepcopy(llama)
    huge.model.norm.weight.data.fill_(1e38)
    huge.lm_head.weight.data.fill_(1e38)
    with pytest.raises(ValueError, match="predictions are not finite"): Trials(huge, text)
    trials = Trials(llama, text)
    trials._logits = lambda z: torch.full((z.shape[0], 100), torch.nan)
    assert (trials.losses({("attention", 1)}) == np.inf).all()


def test_linear_maps_leave_no_trace_and_cached_generation_agrees(model, text):
    before, plan = log_probabilities(model, text), by_hand("attention", (0, 1, 2, 3))
    maps = fit_linear(model, [0, 2, 3], text)
    assert torch.equal(log_probabilities(model, text), before)
    with dropped(model, plan, strict=False, maps=maps):
        assert not torch.equal(log_probabilities(model, text), before)
        kept, fresh = (model.generate(text[:1, :12], max_new_tokens=8, do_sample=False, use_cache=c) for c in (True, False))
        assert torch.equal(kept, fresh)
    assert torch.equal(log_probabilities(model, text), before)


def test_a_linear_map_is_nearer_than_nothing(llama, text):
    plan = by_hand("attention", (2,))
    dense = log_probabilities(llama, text)
    with dropped(llama, plan): nothing = log_probabilities(llama, text)
    with dropped(llama, plan, maps=fit_linear(llama, [2], text)): mapped = log_probabilities(llama, text)
    nothing, mapped = ((dense.exp() * (dense - q)).sum(-1).mean() for q in (nothing, mapped))
    assert mapped < nothing


def test_the_map_is_what_least_squares_on_the_replaced_stream_gives(llama, text):
    maps, seen = fit_linear(llama, [1, 3], text, batch_size=2, ridges=[1e-6]), []
    with dropped(llama, by_hand("attention", (1,)), maps={1: maps[1]}), torch.inference_mode():  # the second map is fitted to what the first passes on
        hook = llama.model.layers[3].self_attn.register_forward_hook(lambda m, args, kwargs, out: seen.append((kwargs["hidden_states"].flatten(0, 1), out[0].flatten(0, 1))), with_kwargs=True)
        llama(text, use_cache=False)
        hook.remove()
    x, y = seen[0]
    expected = np.linalg.lstsq(x.double().numpy(), y.double().numpy(), rcond=None)[0].T
    np.testing.assert_allclose(maps[3].numpy(), expected, rtol=.02, atol=.02)


def test_adapters_learn_and_leave_no_trace(model, text):
    before, plans, asked = log_probabilities(model, text), [by_hand("attention", (1, 3)), by_hand("mlp", (2,))], [p.requires_grad for p in model.parameters()]
    modules, given = {n: (type(m), set(vars(m))) for n, m in model.named_modules()}, torch.random.get_rng_state()
    maps = fit_linear(model, [3], text)
    with distilled(model, plans, text, maps, steps=30, batch_size=3, learning_rate=5e-3, strict=False) as losses: healed = log_probabilities(model, text)
    with dropped(model, plans, strict=False, maps=maps): ill = log_probabilities(model, text)
    assert len(losses) == 30 and np.isfinite(losses).all()
    nearer, farther = ((before.exp() * (before - q)).sum(-1).mean() for q in (healed, ill))
    assert nearer < .9 * farther
    assert torch.equal(log_probabilities(model, text), before) and [p.requires_grad for p in model.parameters()] == asked
    assert {n: (type(m), set(vars(m))) for n, m in model.named_modules()} == modules and torch.equal(torch.random.get_rng_state(), given)


def test_what_was_learnt_stays_in_the_weights_and_plans_fit_them(llama, text):
    model, plans = copy.deepcopy(llama), [by_hand("attention", (1, 3)), by_hand("layer", (0,))]
    maps = fit_linear(model, [3], text)
    old = maps[3].clone()
    with distilled(model, plans, text, maps, steps=5, batch_size=2) as losses: healed = log_probabilities(model, text)
    assert torch.equal(maps[3], old)
    new = distil(model, plans, text, maps, steps=5, batch_size=2)
    assert new[0].provenance["healing"]["last_loss"] == pytest.approx(losses[-1], rel=1e-4) and not torch.equal(maps[3], old)
    assert fingerprint(model) != fingerprint(llama)
    torch.testing.assert_close(log_probabilities(drop(model, new, maps=maps), text), healed, rtol=1e-3, atol=1e-3)


def test_maps_of_another_dtype_learn_as_well(llama, text):
    model, plan = copy.deepcopy(llama), by_hand("attention", (3,))
    maps = {i: w.double() for i, w in fit_linear(model, [3], text).items()}
    old = maps[3].clone()
    with distilled(model, plan, text, maps, steps=5, batch_size=2): healed = log_probabilities(model, text)
    new = distil(model, plan, text, maps, steps=5, batch_size=2)
    assert maps[3].dtype == torch.float64 and not torch.equal(maps[3], old)
    torch.testing.assert_close(log_probabilities(drop(model, new, maps=maps), text), healed, rtol=1e-3, atol=1e-3)


def test_maps_fitted_in_inference_mode_can_be_trained(llama, text):
    with torch.inference_mode(), distilled(llama, by_hand("attention", (1,)), text, fit_linear(llama, [1], text), steps=2) as losses: assert np.isfinite(losses).all()


def test_plans_may_be_any_iterable(llama, text):
    with dropped(llama, [by_hand("attention", (1,)), by_hand("mlp", (2,))]): expected = log_probabilities(llama, text)
    with dropped(llama, (p for p in (by_hand("attention", (1,)), by_hand("mlp", (2,))))): assert torch.equal(log_probabilities(llama, text), expected)


def test_a_map_needs_the_attention_that_it_stands_in_for(llama):
    with dropped(llama, by_hand("attention", (1,))), pytest.raises(ValueError, match="attention of layers \\[1\\] is dropped already"):
        dropped(llama, by_hand("attention", (1,)), maps={1: torch.zeros(64, 64)}).__enter__()


@pytest.mark.parametrize("name,routed", [("mixtral", 2), ("qwen3_moe", 2)])
def test_operations_of_experts_are_counted(name, routed):
    model = make_decoder(name)
    row, config = savings(model, 24).loc["mlp", 3], model.config
    width = getattr(config, "moe_intermediate_size", config.intermediate_size)
    assert row.flops == pytest.approx(2 * (routed * 3 * 64 * width + 64 * 4))  # two experts of three matrices, and the router


def test_adapters_do_not_outlive_a_failure(llama, text, monkeypatch):
    before, count = log_probabilities(llama, text), len(list(llama.modules()))
    monkeypatch.setattr("entrodrop.search.F.kl_div", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError), distilled(llama, by_hand("attention", (1,)), text, steps=1): pass
    assert torch.equal(log_probabilities(llama, text), before) and len(list(llama.modules())) == count


def test_savings_are_what_dropping_saves(model):
    table, dense = savings(model, 24), account(model, 1, 24)
    for target in ("attention", "mlp", "layer"):
        for i in (0, 3):
            with dropped(model, by_hand(target, (i,)), strict=False): less = account(model, 1, 24)
            row = table.loc[target, i]
            assert row.parameters == dense["parameters"] - less["parameters"]
            assert row.flops * 24 == pytest.approx(dense["prefill_flops"] - less["prefill_flops"], rel=.02)
            if not getattr(model.config.get_text_config(), "sliding_window", None): assert row.kv_bytes * 24 == pytest.approx(dense["kv_bytes"] - less["kv_bytes"])


def test_a_budget_is_met_and_no_block_too_many(llama, text):
    profile, cost = measure(llama, text, {}), savings(llama, 24)
    every = [b for target in ("attention", "mlp", "layer") for b in candidates(profile, target)]
    for kind in cost:
        costs, budget = cost[kind].to_dict(), .3 * sum(cost[kind]["layer", i] for i in range(5))
        found = greedy(Trials(llama, text), every, cost=costs, budget=budget)
        assert sum(costs[b] for b in found.order) >= budget > sum(costs[b] for b in found.order[:-1])
        assert kind != "kv_bytes" or not any(t == "mlp" for t, _ in found.order)
        with dropped(llama, found.plans(profile)): pruned = log_probabilities(llama, text)
        torch.testing.assert_close(pruned, log_probabilities(llama, text, found.order))


def test_where_the_loss_falls_what_saves_more_goes_first(llama, text):
    trials = Trials(llama, text)
    falls = {("attention", 0): -.1, ("mlp", 0): -.1, ("mlp", 1): .1}
    trials.losses = lambda blocks, batches=None: np.full(6, min(falls[b] for b in blocks))
    trials.rebase = lambda blocks: None
    assert greedy(trials, list(falls), 1, cost={("attention", 0): 1, ("mlp", 0): 10, ("mlp", 1): 100}).order == (("mlp", 0),)


def test_a_second_search_on_the_same_trials_costs_what_the_first_did(llama, text):
    every, trials = candidates(measure(llama, text, {}), "attention"), Trials(llama, text)
    first, second = (greedy(trials, every, 3, tries=2) for _ in range(2))
    assert first.order == second.order and second.record.passes.tolist() == pytest.approx(first.record.passes.tolist(), abs=1)  # going back to the dense model takes less than a pass
    assert first.record.passes.tolist() == greedy(Trials(llama, text), every, 3, tries=2).record.passes.tolist()


def test_a_part_of_the_text_costs_its_share_of_the_sequences(llama, text):
    trials = Trials(llama, text, batch_size=4)  # of six
    before = trials.passes
    assert len(trials.losses((), [0])) == 4 and (trials.passes - before) * trials.total == pytest.approx(trials.head * 4 / 6)


def test_racing_judges_fewer_on_all_of_the_text(llama, text):
    every = candidates(measure(llama, text, {}), "attention")
    judged = []
    trials = Trials(llama, text, batch_size=2)
    losses = trials.losses
    trials.losses = lambda blocks, batches=None: judged.append(batches) or losses(blocks, batches)
    raced, full = greedy(trials, every, 2, finalists=2), greedy(Trials(llama, text, batch_size=2), every, 2)
    assert judged == [[0]] * 5 + [None] * 2 + [[0]] * 4 + [None] * 2 and raced.record.passes.iloc[-1] < full.record.passes.iloc[-1]


def test_a_change_point_is_found_beside_outliers_and_not_invented():
    rng = np.random.default_rng(3)
    stages = np.where(np.arange(32) < 20, -2., 1.) + .3 * rng.standard_normal((8, 32))
    stages[:, 5] = -1e4
    found = change_point(stages)
    assert found.start == 20 and found.low <= 20 <= found.high and found.p < 1e-3
    flat = [change_point(rng.standard_normal((1, 32))).p for _ in range(200)]
    assert np.mean(np.array(flat) < .05) < .08  # a test of size 0.05
    with pytest.raises(ValueError, match="not finite"): change_point(stages * np.inf)


def test_a_killed_search_leaves_the_model_whole(llama, text, monkeypatch):
    before, trials = log_probabilities(llama, text), Trials(llama, text)
    monkeypatch.setattr(trials, "_logits", lambda z: 1 / 0)
    with pytest.raises(ZeroDivisionError): greedy(trials, [("attention", 1), ("attention", 2)], 2)
    with pytest.raises(ZeroDivisionError), dropped(llama, by_hand("attention", (1,)), maps=fit_linear(llama, [1], text)): 1 / 0
    assert torch.equal(log_probabilities(llama, text), before)


def test_searches_find_what_exhaustive_search_finds(llama, text):
    every = candidates(measure(llama, text, {}), "layer")
    trials = Trials(llama, text)
    pairs = {frozenset((a, b)): trials.losses((a, b)).mean() for a in every for b in every if a < b}
    best = min(pairs, key=pairs.get)
    assert frozenset(evolve(Trials(llama, text, batch_size=2), every, 2, 1000, generations=40).order) == best
    found = exchange(Trials(llama, text), [greedy(Trials(llama, text), every, 2).order], every, tries=5, rounds=5)
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
    assert trials.passes == pytest.approx(1) and trials.dense_losses.mean() == pytest.approx(trials.losses(()).mean())
    rises = {b: trials.losses({b}).mean() - trials.dense_losses.mean() for b in every}
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
    (lambda m, t: greedy(Trials(m, t), [("attention", 0), ("layer", 0)], 2), "after 1 blocks no candidate is left"), (lambda m, t: greedy(Trials(m, t), [("attention", 0)]), "either k, or a budget"),
    (lambda m, t: greedy(Trials(m, t), [("attention", 0)], cost={("attention", 0): 3}, budget=4), "budget=4, but after 1 blocks, which save 3, no candidate"),
    (lambda m, t: greedy(Trials(m, t), every_kind(), 1.5), "k must be a whole number of at least 1, got 1.5"), (lambda m, t: greedy(Trials(m, t), every_kind(), 2, tries=0), "tries must be a whole number"),
    (lambda m, t: evolve(Trials(m, t), every_kind(), 2, 9, offspring=0), "offspring must be a whole number"), (lambda m, t: evolve(Trials(m, t), every_kind(), 11, 9), "k=11, but only 10 of the candidates can be dropped together"),
    (lambda m, t: exchange(Trials(m, t), [], [("attention", 0)]), "sets of one size, got none"), (lambda m, t: fit_linear(m, [7], t), "no layers \\[7\\]"),
    (lambda m, t: dropped(m, by_hand("attention", (1,)), maps={2: torch.zeros(64, 64)}).__enter__(), "linear maps for layers \\[2\\], whose attention no plan drops"),
    (lambda m, t: dropped(m, by_hand("attention", (1,)), maps={1: torch.zeros(64, 32)}).__enter__(), "must have shape \\(64, 64\\)"),
    (lambda m, t: distilled(m, by_hand("attention", (1,)), t[0]).__enter__(), "must have shape"), (lambda m, t: distilled(m, by_hand("attention", (1,)), t, steps=0).__enter__(), "steps=0: must be at least 1")])
def test_bad_input(call, message, llama, text):
    with pytest.raises(ValueError, match=message): call(llama, text)
