"""Dropped blocks against models whose blocks say zero, in every way a model is run; what stays behind; and what a
ranking may say."""
import copy
import gc
import json
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_architectures import by_hand
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MistralConfig
from transformers.cache_utils import Cache

from entrodrop.architectures import BLOCKS, decoder_layers, fingerprint
from entrodrop.dynamics import Profile, measure
from entrodrop.estimators import bucket_entropy, matrix_entropy
from entrodrop.models import describe_model
from entrodrop.pruning import Ranking, rank
from entrodrop.surgery import Block, Plan, drop, edited

ALL = (0, 1, 2, 3, 4)
SETS = [(0,), (4,), (0, 2, 3), ALL]
CASES = [(target, gone) for target in BLOCKS for gone in SETS if (target, gone) != ("layer", ALL)]  # which is no plan
each_target = pytest.mark.parametrize("target", BLOCKS)
each_case = pytest.mark.parametrize("target, gone", CASES, ids=str)


def silenced(model, target, gone):
    "A copy in which the last matrix of every dropped block is zero: the oracle, which runs in full"
    model = copy.deepcopy(model)
    for i in gone:
        layer = model.model.layers[i]
        if target != "mlp": layer.self_attn.o_proj.weight.data.zero_()
        if target != "attention": layer.mlp.down_proj.weight.data.zero_()
    return model


def kept(gone, layers=5): return [i for i in range(layers) if i not in gone]


@torch.inference_mode()
def logits(model, ids): return model(ids).logits


def greedy(model, ids, tokens=12, **options):
    return model.generate(ids, max_new_tokens=tokens, do_sample=False, **options)


def slots(model): return [m.layer_idx for m in model.modules() if hasattr(m, "layer_idx")]


# What a pruned model computes

@each_case
def test_logits_are_those_of_silenced_blocks(decoder, ids, target, gone):
    expected = logits(silenced(decoder, target, gone), ids)
    assert not torch.allclose(expected, logits(decoder, ids), rtol=.1)
    with edited(decoder, by_hand(target, gone)): torch.testing.assert_close(logits(decoder, ids), expected)


@each_case
def test_generation_with_any_cache_is_generation_without(decoder, ids, target, gone):
    prompts = ids[:, :12]
    expected = greedy(silenced(decoder, target, gone), prompts, use_cache=False)
    with edited(decoder, by_hand(target, gone)):
        for options in (dict(use_cache=True), dict(use_cache=False), dict(cache_implementation="static")):
            assert torch.equal(greedy(decoder, prompts, **options), expected)


@pytest.mark.parametrize("target, gone", [(t, (0, 3)) for t in BLOCKS] + [("attention", ALL), ("mlp", ALL)], ids=str)
def test_padded_batch_is_each_prompt_alone(decoder, ids, target, gone):
    prompts = [ids[0, :2], ids[1, :7], ids[2, :13]]
    batch = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left", padding_value=0)
    with edited(decoder, by_hand(target, gone)):
        together = greedy(decoder, batch, attention_mask=(batch != 0).long())[:, 13:]
        alone = [greedy(decoder, p[None], attention_mask=torch.ones_like(p[None]))[0, len(p):] for p in prompts]
    assert torch.equal(together, torch.stack(alone))


@each_target
def test_dropped_blocks_change_nothing_in_a_profile(decoder, ids, target):
    with edited(decoder, by_hand(target, (0, 3))):
        profile = measure(decoder, ids, dict(bucket=bucket_entropy, matrix=matrix_entropy))
    if target == "layer": assert profile.layers == 3
    else:
        scores = profile.scores(target, "bucket")
        assert (scores[:, [0, 3]] == 0).all() and (scores[:, [1, 2, 4]] != 0).any(0).all()
        np.testing.assert_allclose(profile.scores(target, "cosine")[:, [0, 3]], 0, atol=1e-6)


# What it costs

def parameters_of(target, hidden=64, heads=4, kv_heads=2, inner=128):
    "Weights of one block, its norm apart"
    attention, mlp = 2 * hidden * hidden + 2 * hidden * hidden * kv_heads // heads, 3 * hidden * inner
    return dict(attention=attention, mlp=mlp, layer=attention + mlp)[target]


@each_case
def test_flops_fall_by_the_share_of_the_blocks(decoder, ids, target, gone):
    model = copy.deepcopy(decoder)
    model.set_attn_implementation("eager")  # whose products are counted on every device
    def flops():
        with FlopCounterMode(display=False) as counter: logits(model, ids)
        return counter.get_total_flops()
    before = flops()
    with edited(model, by_hand(target, gone)): after = flops()
    samples, length = ids.shape
    token_pairs = 0 if target == "mlp" else 2 * 2 * samples * length**2 * 64  # queries by keys, weights by values
    assert before - after == len(gone) * (2 * samples * length * parameters_of(target) + token_pairs)


def cached(model, ids):
    "The keys and values that a forward pass leaves in the cache"
    with torch.inference_mode(): output = model(ids, use_cache=True)
    cache, = (v for v in output.values() if isinstance(v, Cache))
    return [(layer.keys, layer.values) for layer in cache.layers if layer.is_initialized]


@pytest.mark.parametrize("target, gone", [case for case in CASES if case[0] != "mlp"], ids=str)
def test_cache_holds_kept_attention_only(decoder, ids, target, gone):
    full = cached(silenced(decoder, target, gone), ids)
    with edited(decoder, by_hand(target, gone)): small = cached(decoder, ids)
    assert len(full) == 5
    torch.testing.assert_close(small, [full[i] for i in kept(gone)])


@each_case
def test_drop_lets_go_of_the_weights(decoder, ids, target, gone):
    model, expected = copy.deepcopy(decoder), logits(silenced(decoder, target, gone), ids)
    before = model.num_parameters()
    names = dict(attention=["self_attn", "input_layernorm"], mlp=["mlp", "post_attention_layernorm"], layer=[""])
    parts = [model.model.layers[i].get_submodule(name) for i in gone for name in names[target]]
    weights = [weakref.ref(p) for part in parts for p in part.parameters()]
    del parts
    assert drop(model, by_hand(target, gone)) is model
    gc.collect()
    assert weights and all(w() is None for w in weights)
    norms = 2 if target == "layer" else 1
    assert before - model.num_parameters() == len(gone) * (parameters_of(target) + norms * 64)
    torch.testing.assert_close(logits(model, ids), expected)


@pytest.mark.parametrize("gone", [(0,), (1, 4)], ids=str)
def test_model_without_layers_is_an_ordinary_model(decoder, ids, tmp_path, gone):
    model = drop(copy.deepcopy(decoder), by_hand("layer", gone))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(decoder_layers(again)) == again.config.num_hidden_layers == len(kept(gone))
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert torch.equal(greedy(again, ids), greedy(model, ids))


# Afterwards nothing has happened

def everything(model):
    "All that could change: every module and weight, where the weights lie, the config, the cache slots"
    modules = [(n, id(m), m.training) for n, m in model.named_modules()]
    return modules, [(n, p.data_ptr()) for n, p in model.named_parameters()], model.config.to_dict(), slots(model)


@pytest.mark.parametrize("fails", [False, True])
@each_case
def test_restored_bit_for_bit(decoder, ids, target, gone, fails):
    before, dense = everything(decoder), logits(decoder, ids)
    weights = {n: p.clone() for n, p in decoder.state_dict().items()}
    try:
        with edited(decoder, by_hand(target, gone)):
            assert everything(decoder) != before
            greedy(decoder, ids, 2)
            if fails: decoder(ids + 1000)  # beyond the vocabulary
    except IndexError: assert fails
    assert everything(decoder) == before
    assert all(torch.equal(p, weights[n]) for n, p in decoder.state_dict().items())
    assert torch.equal(logits(decoder, ids), dense)


@each_target
def test_fingerprint_changes_and_returns(decoder, target):
    before = fingerprint(decoder)
    with edited(decoder, by_hand(target, (1,))): assert fingerprint(decoder) != before
    assert fingerprint(decoder) == before


@each_case
def test_config_and_slots_agree_with_the_layers(target, gone):
    kinds = ["full_attention", "sliding_attention"] * 2 + ["full_attention"]
    config = MistralConfig(num_hidden_layers=5, hidden_size=16, intermediate_size=16, num_attention_heads=2,
                           num_key_value_heads=1, vocab_size=10, layer_types=kinds)
    model = AutoModelForCausalLM.from_config(config)
    with edited(model, by_hand(target, gone)):
        left = kept(gone) if target == "layer" else range(5)
        assert model.config.num_hidden_layers == len(decoder_layers(model)) == len(left)
        assert model.config.layer_types == [kinds[i] for i in left]
        attending = left if target != "attention" else kept(gone)
        for kind in set(kinds):  # attention of each kind fills the first slots of that kind, in order
            of_kind = [slot for slot, k in enumerate(model.config.layer_types) if k == kind]
            filled = [slot for slot, i in zip(slots(model), attending, strict=True) if kinds[i] == kind]
            assert filled == of_kind[:len(filled)]
    assert (model.config.num_hidden_layers, model.config.layer_types, slots(model)) == (5, kinds, [0, 1, 2, 3, 4])


@pytest.mark.parametrize("outer, inner", [
    (("attention", (1, 3)), ("mlp", (0, 3))), (("mlp", (0, 4)), ("attention", (0, 2))),
    (("attention", (0, 1)), ("attention", (1, 2))),
    (("mlp", (2,)), ("layer", (2, 4))), (("attention", (0, 3)), ("layer", (1, 3)))], ids=str)
def test_nested(decoder, ids, outer, inner):
    before, outside = everything(decoder), silenced(decoder, *outer)
    with edited(decoder, by_hand(*outer)):
        between = everything(decoder)
        with edited(decoder, by_hand(*inner)):
            torch.testing.assert_close(logits(decoder, ids), logits(silenced(outside, *inner), ids))
            assert slots(decoder) == list(range(len(slots(decoder))))
            assert torch.equal(greedy(decoder, ids), greedy(decoder, ids, use_cache=False))
        assert everything(decoder) == between
        torch.testing.assert_close(logits(decoder, ids), logits(outside, ids))
    assert everything(decoder) == before


def test_plan_for_the_whole_does_not_fit_what_is_left(decoder):
    with edited(decoder, by_hand("layer", (1, 3))):
        with pytest.raises(ValueError, match="layers 5 there, 3 here"):
            with edited(decoder, by_hand("attention", (0,))): pass
        assert len(decoder_layers(decoder)) == 3


@pytest.mark.parametrize("target, recorded", [("layer", "hidden_states"), ("attention", "attentions")])
def test_states_first_asked_for_while_pruned(llama, ids, target, recorded):
    model = copy.deepcopy(llama)
    model.set_attn_implementation("eager")
    def count(): return len(model(ids, **{f"output_{recorded}": True})[recorded])
    with edited(model, by_hand(target, (1, 3))): inside = count()
    assert count() == inside + 2


# Rankings

def profile_of(scores, provenance=None):
    "A profile with these scores of all kinds of blocks under the bucket estimator and cosine, `(samples, layers)`"
    samples, layers = scores.shape
    index = pd.MultiIndex.from_product([range(samples), range(layers)], names=["sample", "layer"])
    curve = np.concatenate([np.zeros((samples, 1)), scores.cumsum(1)], 1)
    columns = dict(before=curve[:, :-1].ravel(), after=curve[:, 1:].ravel(), score=scores.ravel())
    tables = [index.to_frame(index=False).assign(block=b, criterion=c, **columns)
              for b in BLOCKS for c in ("bucket", "cosine")]
    known = dict(model=dict(layers=layers), estimators=dict(bucket=dict(bins=20)))
    return Profile(pd.concat(tables, ignore_index=True), known | (provenance or {}))


@st.composite
def score_tables(draw):
    "Scores `(samples, layers)`, small whole numbers, so that layers tie"
    samples, layers = draw(st.integers(1, 4)), draw(st.integers(1, 10))
    row = st.lists(st.integers(-4, 4), min_size=layers, max_size=layers)
    return np.array(draw(st.lists(row, min_size=samples, max_size=samples)), dtype=float)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(score_tables(), st.sampled_from(list(BLOCKS)), st.sampled_from(["bucket", "cosine", "random"]),
       st.sampled_from(["stage1", "literal", "released", "none", None]), st.sets(st.integers(0, 9)), st.integers(0, 3))
def test_ranking_of_anything(scores, target, criterion, protection, protect, seed):
    layers = scores.shape[1]
    protect = {i for i in protect if i < layers}
    found = rank(profile_of(scores), target, criterion, protection, protect, seed=seed)
    start, order, protected = found.record["start"], found.layers_of(target), set(protect)
    if protection == "released": protected |= {i for i in (0, 1, layers - 1) if i < layers}
    if protection == "stage1" or protection is None and criterion == "bucket":
        climbed = [0, *scores.mean(0).cumsum()]
        assert climbed[start] == pytest.approx(min(climbed))
        protected |= set(range(start))
    elif protection == "literal":
        lowest = rank(profile_of(scores), target, criterion, "stage1", protect, seed=seed).record["start"]
        assert start == max(0, lowest - 1)
        protected |= set(range(start))
    else: assert start is None
    assert found.record["protected"] == tuple(sorted(protected))
    assert found.blocks == tuple((target, i) for i in order) and len(found) == len(order)
    assert sorted(order) == [i for i in range(layers) if i not in protected]
    ranks = list(zip(found.scores, order, strict=True))
    assert ranks == sorted(ranks) and list(found.scores) == [found.record["all_scores"][i] for i in order]
    if criterion != "random": assert found.record["all_scores"] == pytest.approx(scores.mean(0))
    most = len(order) - (target == "layer" and len(order) == layers)  # all layers are no plan
    for k in range(most + 1):
        assert found.first(k) == Plan.dropping(found.blocks[:k], layers, found.model, record(found, k))
    with pytest.raises(ValueError, match=f"k={len(order) + 1} but only {len(order)} "): found.first(len(order) + 1)
    if most < len(order):
        with pytest.raises(ValueError, match=f"this plan drops all {layers} layers; lower k"): found.first(len(order))


def record(found, k):
    "What a plan says of a ranking that has no steps"
    said = dict(method=found.method, k=k, order=found.blocks, scores=found.scores, tokens=found.tokens)
    return [said | dict(found.record)]


def test_random_criterion_is_its_seed(llama, ids):
    profile = measure(llama, ids, dict(bucket=bucket_entropy))
    orders = [rank(profile, criterion="random", seed=s).blocks for s in range(20)]
    assert orders == [rank(profile, criterion="random", seed=s).blocks for s in range(20)]
    assert len(set(orders)) > 10


SCORES = np.array([[-1., 3, 0, 2, 5, 1], [-1., 2, 1, 2, 5, 1]])


@pytest.mark.parametrize("protection", ["stage1", "literal", "released", "none"])
@pytest.mark.parametrize("criterion", ["bucket", "cosine", "random"])
def test_plan_is_the_same_after_a_round_trip(tmp_path, criterion, protection):
    text = dict(data="pydoc", samples=2, length=7)
    made = rank(profile_of(SCORES, dict(text=text)), "mlp", criterion, protection, protect=(3,)).first(2)
    made.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert read == made and read.gone("mlp") == made.gone("mlp") and len(read.gone("mlp")) == 2
    assert json.loads((tmp_path / "plan.json").read_text())["drop"]["mlp"] == list(made.gone("mlp"))
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    (said,) = read.record
    assert (read.method, read.protection, said["k"], said["text"]) == (criterion, protection, 2, text)
    assert said["tokens"] == (0 if criterion == "random" else 14) and 3 in said["protected"]


def test_from_profile_to_file_to_model(decoder, ids, tmp_path):
    measure(decoder, ids, dict(bucket=bucket_entropy), name="tiny").save(tmp_path / "profile")
    rank(Profile.load(tmp_path / "profile"), "attention", "cosine").first(2).save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    expected = logits(silenced(decoder, "attention", read.gone("attention")), ids)
    with edited(decoder, read): torch.testing.assert_close(logits(decoder, ids), expected)


@pytest.mark.parametrize("apply", [drop, lambda model, p: edited(model, p).__enter__()], ids=["drop", "edited"])
@pytest.mark.parametrize("fields, message", [
    (dict(layers=6), "layers 6 there, 5 here"), (dict(hidden=32), "hidden 32 there, 64 here"),
    (dict(model_type="other"), "model_type other there, {model_type} here"),
    (dict(layers=4, hidden=128), "layers 4 there, 5 here, hidden 128 there, 64 here")])
def test_plan_for_another_model(decoder, apply, fields, message):
    described = describe_model(decoder, "tiny") | fields
    p, before = by_hand("attention", (1,), described["layers"], described), everything(decoder)
    said = "made for another model: " + message.format(model_type=decoder.config.model_type) + "; make a plan"
    with pytest.raises(ValueError, match=said): apply(decoder, p)
    assert everything(decoder) == before


def test_the_plan_of_one_architecture_does_not_fit_the_other(llama, mistral, ids):
    p = rank(measure(llama, ids, dict(bucket=bucket_entropy)), criterion="cosine").first(1)
    with pytest.raises(ValueError, match="model_type llama there, mistral here"): drop(mistral, p)


@pytest.mark.parametrize("k", [-1, 1.0, 2.5, "2", None])
def test_k_that_is_no_count(k):
    with pytest.raises(ValueError, match=f"k must be a whole number of at least 0, got {k!r}"):
        rank(profile_of(SCORES)).first(k)


@pytest.mark.parametrize("k, arguments, message", [
    (6, {}, r"k=6 but only 5 attention blocks lie in the expansion stage \(layers 1 to 5\); choose k ≤ 5 or protect "
            r"fewer \(protection='stage1'\)"),
    (4, dict(target="mlp", protection="released"),
     "k=4 but only 3 mlp blocks lie outside the 3 protected layers; choose k ≤ 3"),
    (7, dict(criterion="random"), "k=7 but only 6 attention blocks lie outside the 0 protected layers; choose k ≤ 6"),
    (3, dict(target="layer", criterion="cosine", protect=range(4)),
     "k=3 but only 2 layers lie outside the 4 protected layers"),
    (1, dict(protect=range(6)), "k=1 but only 0 attention blocks lie in the expansion stage"),
    (0, dict(target="heads"), "unknown target 'heads'; choose attention, mlp, layer"),
    (0, dict(criterion="knn"), "unknown criterion 'knn'; choose bucket, cosine, random"),
    (0, dict(protection="all"), "unknown protection 'all'; choose stage1, literal, released, none"),
    (0, dict(criterion="cosine", protection="stage1", boundary="knn"), "no estimator 'knn'; choose bucket"),
    (0, dict(protect=[6]), r"cannot protect layers \[6\]: the model has layers 0 to 5"),
    (0, dict(protect=[2, -1, 99]), r"cannot protect layers \[-1, 99\]"),
], ids=lambda value: None if isinstance(value, str) else str(value))
def test_plan_that_cannot_be(k, arguments, message):
    with pytest.raises(ValueError, match=message): rank(profile_of(SCORES), **arguments).first(k)


def test_scores_that_are_not_finite():
    scores = SCORES.copy()
    scores[0, 3] = np.nan
    found = rank(profile_of(scores), criterion="cosine", protection="none")
    assert found.record["all_scores"] == list(scores[1:].mean(0))
    scores[:, 5] = -np.inf
    with pytest.raises(ValueError, match="cosine is finite for no sample"):
        rank(profile_of(scores), criterion="cosine", protection="none")


def search(**more):
    "What a search over blocks of both kinds might have found"
    blocks = [("mlp", 2), ("attention", 0), ("mlp", 0), ("attention", 3)]
    return Ranking(blocks, [.1, .2, .2, .4], "greedy", dict(layers=5), **more)


def test_a_ranking_of_two_kinds():
    found = search(tokens=90)
    assert found.blocks[1] == Block("attention", 0) and isinstance(found.blocks[1], Block)
    assert (found.layers_of("mlp"), found.layers_of("layer")) == ((2, 0), ())
    assert found.first(2).edits == Plan.dropping([("mlp", 2), ("attention", 0)], 5).edits
    assert found.first(3).gone("layer") == (0,) and found.first(3).k == 2  # both blocks of layer 0 are the layer
    with pytest.raises(ValueError, match="k=5 but greedy has only 4 blocks; choose k ≤ 4"): found.first(5)


@pytest.mark.parametrize("budget, blocks", [(0, 0), (.5, 1), (3, 1), (3.1, 2), (4, 2), (7, 3), (8, 4)])
def test_within_a_budget(budget, blocks):
    cost = {("mlp", 0): 3, ("mlp", 2): 3, ("attention", 0): 1, ("attention", 3): 1}
    found = search()
    assert found.within(budget, cost) == found.first(blocks)
    with pytest.raises(ValueError, match="budget=9, but all 4 blocks save 8"): found.within(9, cost)


def test_a_plan_says_what_finding_so_many_blocks_took():
    steps = pd.DataFrame(dict(k=[1, 2, 4], loss=[3., 3.1, 3.5], tokens=[10, 25, 40]))
    found = search(tokens=40, steps=steps)
    assert [found.first(k).record[0]["tokens"] for k in range(5)] == [0, 10, 25, 25, 40]


def test_blocks_that_were_chosen_together():
    found = search(nested=False)
    assert found.first(4).record[0]["k"] == 4
    for k in (0, 1, 3):
        with pytest.raises(ValueError, match=f"k={k}, but greedy chose its 4 blocks together; search again for {k}"):
            found.first(k)


@pytest.mark.parametrize("blocks, scores, message", [
    ([("mlp", 1), ("mlp", 1)], [0, 0], "a block is ranked twice"),
    ([("mlp", 1)], [0, 0], "one score for each block")])
def test_a_ranking_that_cannot_be(blocks, scores, message):
    with pytest.raises(ValueError, match=message): Ranking(blocks, scores, "by hand", dict(layers=5))


# A real model

def test_embedded_model_without_three_attention_blocks(embedded):
    model, tokenizer = embedded
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    before, dense = everything(model), logits(model, prompt)
    with edited(model, by_hand("attention", (0, 5, 12), 30)):
        assert not torch.equal(logits(model, prompt), dense)
        with_cache, without = (greedy(model, prompt, use_cache=c) for c in (True, False))
    assert torch.equal(with_cache, without) and with_cache.shape[1] == prompt.shape[1] + 12
    assert everything(model) == before
    assert torch.equal(logits(model, prompt), dense)
