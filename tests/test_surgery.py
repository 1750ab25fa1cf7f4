"""Plans and edits: all edits at once against the definition, edits that fail half way, what is equal, what is joined,
and what is written."""
import copy
import json

import pytest
import torch
from conftest import LAYERS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_architectures import everything, forward_by_hand, logits, parts
from torch import nn

from entrodrop import surgery
from entrodrop.architectures import ARCHITECTURES, BLOCKS, architecture, decoder_layers, fingerprint
from entrodrop.models import describe_model
from entrodrop.surgery import Block, Drop, LinearMap, NewWeights, Plan, drop, edited, plan_record, write_plan

close = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def ids():
    "Token ids `(2, 24)`, none of them padding or an image"
    return torch.randint(2, 97, (2, 24), generator=torch.Generator().manual_seed(0))


def random(shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 8


def every_edit(model):
    "A plan with each edit on another layer: attention 0 dropped, MLP 1 too, layer 2, a map in 3, new weights in 4"
    own = dict(decoder_layers(model)[4].named_parameters())
    tensors = {name: p.detach() + random(p.shape, i) for i, (name, p) in enumerate(own.items())}
    return Plan({("attention", 0): Drop(), ("mlp", 1): Drop(), ("layer", 2): Drop(),
                 ("attention", 3): LinearMap(random((64, 64))), ("layer", 4): NewWeights(tensors)}, LAYERS)


class Map(nn.Module):
    "What stands in the place of attention, written once more"
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, z, **kwargs): return z @ self.weight.T, None


def edited_by_hand(name, model, plan):
    "A copy with new weights written into the old ones and maps in place, in which nothing is dropped yet"
    model, block = copy.deepcopy(model), architecture(model).attention
    for i in plan.reweighted:
        for own, tensor in plan.edits["layer", i].tensors.items():
            parts(name, model)[0][i].get_parameter(own).data.copy_(tensor)
    for i in plan.linear: setattr(parts(name, model)[0][i], block, Map(plan.edits["attention", i].weight))
    return model


# What happens

def test_all_edits_at_once(named, ids):
    name, model = named
    plan, before = every_edit(model), everything(model)
    silent = {("attention", 0), ("mlp", 1), ("attention", 2), ("mlp", 2)}
    _, expected = forward_by_hand(name, edited_by_hand(name, model, plan), ids, silent)
    assert not torch.allclose(expected, logits(model, ids), rtol=.1)
    with edited(model, plan): torch.testing.assert_close(logits(model, ids), expected, **close)
    assert everything(model) == before
    pruned = copy.deepcopy(model)
    assert drop(pruned, plan) is pruned and len(decoder_layers(pruned)) == LAYERS - 1
    torch.testing.assert_close(logits(pruned, ids), expected, **close)
    options = dict(max_new_tokens=5, do_sample=False)
    cached, uncached = (pruned.generate(ids[:, :7], use_cache=c, **options) for c in (True, False))
    assert torch.equal(cached, uncached)


def test_a_plan_made_in_inference_mode_stands_in_a_model_that_learns(named, ids):
    name, model = named
    with torch.inference_mode():
        own, weight = next(decoder_layers(model)[1].named_parameters())
        edits = {("attention", 2): LinearMap(random((64, 64)) * 1), ("layer", 1): NewWeights({own: weight * 2})}
        plan = Plan(edits, LAYERS)
    model = copy.deepcopy(model)
    asked = [p.requires_grad for p in model.parameters()]
    with edited(model, plan):
        model(ids, labels=ids).loss.backward()
        learning = {n for n, p in model.named_parameters() if p.grad is not None}
        new = decoder_layers(model)[1].get_parameter(own)
        assert new.grad is not None and not any("linear_attn" in n for n in learning)
    assert [p.requires_grad for p in model.parameters()] == asked
    assert decoder_layers(model)[1].get_parameter(own).grad is None  # that was of the other values
    assert plan == Plan(edits, LAYERS) and not plan.edits["layer", 1].tensors[own].requires_grad


# What fails half way

class Stopped(Exception): pass


def failing(number, late):
    "A `swap` that raises when it is called for the `number`th time, before or after it has changed something"
    swap, calls = surgery.swap, []
    def stop(undo, owner, name, value):
        calls.append(name)
        if len(calls) < number: return swap(undo, owner, name, value)
        if late: swap(undo, owner, name, value)
        raise Stopped
    return stop


@pytest.mark.parametrize("apply", [drop, lambda model, plan: edited(model, plan).__enter__()], ids=["drop", "edited"])
def test_an_edit_that_fails_half_way_leaves_the_model_as_it_was(named, ids, monkeypatch, apply):
    name, model = named
    plan, calls, swap = every_edit(model), [], surgery.swap
    weights = {n: p.clone() for n, p in model.state_dict().items()}
    def said(): return logits(model, ids), model.generate(ids[:, :5], max_new_tokens=4, do_sample=False)
    before, mark, expected = everything(model), fingerprint(model), said()
    with monkeypatch.context() as patch:
        patch.setattr(surgery, "swap", lambda *given: calls.append(given) or swap(*given))
        with edited(model, plan): pass
    assert len(calls) > 12
    for number in range(1, len(calls) + 1):
        for late in (False, True):
            with monkeypatch.context() as patch:
                patch.setattr(surgery, "swap", failing(number, late))
                with pytest.raises(Stopped): apply(model, plan)
            assert everything(model) == before, (number, late)
    assert fingerprint(model) == mark
    assert all(torch.equal(p, weights[n]) for n, p in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(said(), expected, strict=True))


def test_an_attribute_that_cannot_be_set_leaves_the_model_as_it_was(llama, monkeypatch):
    "Here the module itself refuses, half way through a plan"
    before, refused = everything(llama), llama.model.layers[3]
    def refuse(self, name, value):
        if self is refused and name == "mlp" and not isinstance(value, type(llama.model.layers[0].mlp)): raise Stopped
        nn.Module.__setattr__(self, name, value)
    monkeypatch.setattr(type(refused), "__setattr__", refuse)
    with pytest.raises(Stopped):
        with edited(llama, Plan.dropping([("attention", 0), ("mlp", 1), ("mlp", 3), ("layer", 4)], LAYERS)): pass
    assert everything(llama) == before


def test_what_fails_inside_leaves_the_model_as_it_was(named):
    name, model = named
    before = everything(model)
    with pytest.raises(Stopped), edited(model, every_edit(model)): raise Stopped
    assert everything(model) == before


# Which plans are equal

def plan_of_everything(): return Plan(
    {("attention", 0): Drop(), ("mlp", 1): Drop(), ("layer", 2): Drop(), ("attention", 3): LinearMap(random((4, 4))),
     ("layer", 3): NewWeights({"mlp.up_proj.weight": random((6, 4), 1), "mlp.norm": random((4,), 2).bfloat16()}),
     ("layer", 4): NewWeights({"mlp.down_proj.weight": random((4, 6), 3)})}, 6,
    dict(name="tiny", hidden=4, fingerprint="0a"),
    [dict(method="cosine", k=3, scores=[.1, .2], text=dict(data="c4", seed=1)), dict(method="by hand")])


def changed(edit):
    "All edits that differ from one in a value or a dtype"
    tensors = {"": edit.weight} if isinstance(edit, LinearMap) else getattr(edit, "tensors", {})
    for name, tensor in tensors.items():
        others = {f"dtype of {name}": tensor.double()}
        for place in range(tensor.numel()):
            others[f"value {place} of {name}"] = tensor.clone()
            others[f"value {place} of {name}"].view(-1)[place] += .5
        for what, t in others.items():
            yield what, LinearMap(t) if isinstance(edit, LinearMap) else NewWeights({**tensors, name: t})


def variants():
    "All plans that differ from it in one value"
    plan = plan_of_everything()
    given = dict(edits=plan.edits, layers=plan.layers, model=plan.model, record=plan.record)
    def other(**change): return Plan(**given | change)
    yield "one layer more", other(layers=7)
    for block in plan.edits:
        yield f"no {block}", other(edits={b: e for b, e in plan.edits.items() if b != block})
    for block in (("mlp", 0), ("layer", 5), ("attention", 4)):
        yield f"{block} besides", other(edits={**plan.edits, block: Drop()})
    yield "dropped, not mapped", other(edits={**plan.edits, ("attention", 3): Drop()})
    for block, edit in plan.edits.items():
        for what, new in changed(edit): yield f"{what} of {block}", other(edits={**plan.edits, block: new})
    renamed = {"mlp.up_proj.bias": plan.edits["layer", 4].tensors["mlp.down_proj.weight"]}
    yield "name of a tensor", other(edits={**plan.edits, ("layer", 4): NewWeights(renamed)})
    for name in plan.model: yield f"model's {name}", other(model={**plan.model, name: "other"})
    yield "a record less", other(record=plan.record[:1])
    yield "records exchanged", other(record=plan.record[::-1])
    yield "a score", other(record=[plan.record[0] | dict(scores=[.1, .3]), plan.record[1]])
    yield "a seed", other(record=[plan.record[0] | dict(text=dict(data="c4", seed=2)), plan.record[1]])


def test_plans_are_equal_if_every_value_is():
    plan = plan_of_everything()
    assert plan == plan_of_everything() and plan is not plan_of_everything()
    found = dict(variants())
    assert len(found) > 16 + 24 + 4 + 24 + 4
    for what, other in found.items(): assert plan != other and other != plan, what


def test_a_difference_is_written_and_read(tmp_path):
    "No two of these plans are the same on disk either"
    for what, other in variants():
        other.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == other != plan_of_everything(), what


def test_one_form_for_one_thing():
    whole = Plan.dropping([("layer", 1)], 3)
    for blocks in ([("attention", 1), ("mlp", 1)], [("layer", 1), ("mlp", 1)], [("mlp", 1), ("layer", 1)]):
        assert Plan.dropping(blocks, 3) == whole
    covered = {("layer", 1): Drop(), ("attention", 1): LinearMap(torch.eye(2)), ("mlp", 1): Drop()}
    assert Plan(covered, 3) == whole
    assert list(Plan.dropping([("mlp", 2), ("attention", 0)], 3).edits) == [("attention", 0), ("mlp", 2)]
    assert whole.record == () and Plan.dropping([], 3).k == 0


# What a plan counts

def test_counts():
    plan = plan_of_everything()
    assert [plan.gone(kind) for kind in BLOCKS] == [(0,), (1,), (2,)]
    assert (plan.linear, plan.reweighted, plan.k, plan.keep) == ((3,), (3, 4), 4, (0, 1, 3, 4, 5))
    assert [plan.number(i) for i in plan.keep] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"layer 2 does not stay; those that do are \(0, 1, 3, 4, 5\)"): plan.number(2)
    assert (plan.kind, plan.method, plan.protection) == ("mixed", "cosine + by hand", "none")


@pytest.mark.parametrize("edits, kind", [
    ({}, "none"), ({("layer", 0): NewWeights({"a": torch.ones(1)})}, "none"), ({("mlp", 0): Drop()}, "mlp"),
    ({("attention", 0): Drop(), ("attention", 1): LinearMap(torch.eye(2))}, "attention"),
    ({("layer", 0): Drop(), ("layer", 1): NewWeights({"a": torch.ones(1)})}, "layer"),
    ({("layer", 0): Drop(), ("mlp", 1): Drop()}, "mixed")], ids=str)
def test_kind(edits, kind): assert Plan(edits, 3).kind == kind


# Joining

BLOCK_SETS = st.sets(st.tuples(st.sampled_from(list(BLOCKS)), st.integers(0, 4)))


@settings(deadline=None, max_examples=100, derandomize=True)
@given(BLOCK_SETS, BLOCK_SETS, BLOCK_SETS)
def test_dropping_both(a, b, c):
    "Of drops alone, joining is the union, in whatever order"
    a, b, c = (Plan.dropping(blocks, 6) for blocks in (a, b, c))
    union = Plan.dropping([*a.edits, *b.edits], 6)
    assert (a | b) == (b | a) == union and (a | a) == a and (a | Plan.dropping([], 6)) == a
    assert ((a | b) | c) == (a | (b | c))


def test_the_later_edit_holds():
    drops = Plan.dropping([("attention", 1), ("mlp", 2)], 4)
    maps = Plan({("attention", 1): LinearMap(torch.eye(2))}, 4)
    assert (drops | maps).linear == (1,) and (drops | maps).gone("mlp") == (2,)
    assert (maps | drops) == drops
    other = Plan({("attention", 1): LinearMap(torch.ones(2, 2))}, 4)
    assert (maps | other) == other and (other | maps) == maps


def test_a_layer_that_either_drops_is_gone():
    layer = Plan.dropping([("layer", 1)], 4)
    for edit in ({("attention", 1): LinearMap(torch.eye(2))}, {("layer", 1): NewWeights({"a": torch.ones(1)})},
                 {("mlp", 1): Drop()}):
        assert (Plan(edit, 4) | layer) == (layer | Plan(edit, 4)) == layer


def test_new_weights_join_by_name():
    def weights(**values):
        return Plan({("layer", 0): NewWeights({n: torch.tensor([v]) for n, v in values.items()})}, 2)
    assert (weights(a=1., b=2.) | weights(b=3., c=4.)) == weights(a=1., b=3., c=4.)


def test_models_and_records_join():
    a = Plan.dropping([("mlp", 0)], 3, dict(name="one", hidden=8), [dict(method="cosine"), dict(method="bucket")])
    records = [dict(method="bucket"), dict(method="greedy")]
    b = Plan.dropping([("mlp", 1)], 3, dict(name="two", dtype="float32"), records)
    assert (a | b).model == dict(name="one", hidden=8, dtype="float32")
    assert (a | b).method == "cosine + bucket + greedy" and len((a | b).record) == 3


@pytest.mark.parametrize("here, there", [
    (dict(model_type="llama"), dict(model_type="phi")), (dict(hidden=8), dict(hidden=16)),
    (dict(fingerprint="0a"), dict(fingerprint="0b"))], ids=str)
def test_plans_for_different_models_do_not_join(here, there):
    a, b = (Plan.dropping([("mlp", 0)], 3, model) for model in (here, there))
    ((name, value),), ((_, other),) = here.items(), there.items()
    with pytest.raises(ValueError, match=f"different models, {name} {value} and {other}; take one profile"): a | b
    assert (a | Plan.dropping([], 3, dict.fromkeys(here))).k == 1  # one that does not say may join
    with pytest.raises(ValueError, match="one plan is for 3 layers, the other for 4"): a | Plan.dropping([], 4)


# On disk

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.int8,
          torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype_come_back(tmp_path, dtype):
    values = (8 * random((6, 4))).to(dtype)
    weights = NewWeights({"a.weight": values.clone(), "b": values[0]})
    plan = Plan({("attention", 1): LinearMap(values), ("layer", 0): weights}, 3)
    plan.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert read == plan and read.edits["attention", 1].weight.dtype == dtype
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "plan.safetensors"]


@pytest.mark.parametrize("tensors", [
    lambda w: (w, w), lambda w: (w, w[:2]), lambda w: (w.T, w[:, 1:3]), lambda w: (w[0], w[1])],
    ids=["same", "part", "turned", "apart"])
def test_tensors_that_share_memory_come_back(tmp_path, tensors):
    first, second = tensors(random((4, 4)))
    plan = Plan({("layer", 0): NewWeights({"a": first}), ("layer", 1): NewWeights({"a": second})}, 3)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_tensors_of_inference_come_back(tmp_path):
    with torch.inference_mode(): plan = Plan({("attention", 1): LinearMap(random((4, 4)) * 2)}, 3)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_a_plan_without_weights_is_one_file_in_words(tmp_path):
    blocks = [("attention", 3), ("attention", 1), ("mlp", 1)]
    plan = Plan.dropping(blocks, 5, dict(name="tiny"), [dict(method="cosine")])
    plan.save(tmp_path / "plan.json")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    fields = json.loads((tmp_path / "plan.json").read_text())
    assert fields == plan_record(plan) | dict(tensors=None)
    assert fields["drop"] == dict(attention=[3], mlp=[], layer=[1]) and (fields["k"], fields["format"]) == (2, 2)
    assert Plan.load(tmp_path / "plan.json") == plan


def test_what_was_there_is_replaced(tmp_path):
    "A plan with weights, then one without, then another with weights, in the same place"
    path, plain = tmp_path / "plan.json", Plan.dropping([("mlp", 0)], 6)
    for plan in (plan_of_everything(), plain, Plan({("attention", 0): LinearMap(torch.eye(3))}, 6), plain):
        plan.save(path)
        assert Plan.load(path) == plan


def test_weights_that_are_elsewhere(tmp_path):
    write_plan(plan_of_everything(), tmp_path / "plan.json", tensors=False)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    said = "not beside it in plan.safetensors; of a checkpoint, they are in its own weights"
    with pytest.raises(FileNotFoundError, match=said):
        Plan.load(tmp_path / "plan.json")


def test_numbers_of_numpy_are_numbers(tmp_path):
    numpy = pytest.importorskip("numpy")
    plan = Plan.dropping([("mlp", i) for i in numpy.array([2, 0])], 3)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan == Plan.dropping([("mlp", 0), ("mlp", 2)], 3)


MADE_FROM = dict(model=dict(name="tiny", layers=5, hidden=8), text=dict(data="pydoc"), batch_size=8)
FIRST = dict(target="attention", criterion="bucket", k=2, order=[4, 1, 3], scores=[3., 2., 1., 5., 0.],
             protection="stage1", protected=[0, 2], start=1, layers=5, drop=[1, 4], provenance=MADE_FROM)


def written(path, fields):
    path.write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return path


def test_plans_of_version_0_1_are_read(tmp_path):
    plan = Plan.load(written(tmp_path / "plan.json", FIRST))
    assert (plan.gone("attention"), plan.k, plan.layers, plan.kind) == ((1, 4), 2, 5, "attention")
    assert (plan.method, plan.protection, plan.model) == ("bucket", "stage1", FIRST["provenance"]["model"])
    (said,) = plan.record
    assert said["order"] == [4, 1, 3] and said["scores"] == FIRST["scores"] and said["text"] == dict(data="pydoc")
    plan.save(tmp_path / "again.json")
    assert Plan.load(tmp_path / "again.json") == plan


@pytest.mark.parametrize("change, said", [
    (dict(order=[4, 9, 3]), r"the order \[4, 9, 3\] are no plan"), (dict(order=[4, -1, 3]), r"order \[4, -1, 3\]"),
    (dict(order=[4, 4, 3]), r"order \[4, 4, 3\]"), (dict(order=[0, 4, 3]), r"none of the protected \[0, 2\]"),
    (dict(k=4), "k=4 and the order"), (dict(k=-1), "k=-1 and the order")], ids=str)
def test_plans_of_version_0_1_that_cannot_be(llama, tmp_path, change, said):
    before = everything(llama)
    path = written(tmp_path / "plan.json", FIRST | change)
    with pytest.raises(ValueError, match=said): drop(llama, Plan.load(path))
    assert everything(llama) == before


@pytest.mark.parametrize("fields, said", [
    ("{", "plan.json is damaged .*; make the plan again"), ("[]", "plan.json is no plan"),
    ("{}", "plan.json is no plan"),
    (dict(drop={}, format=3), "plan.json was written by a newer version of entrodrop; update it"),
    (dict(drop={}, format=2), "plan.json lacks 'linear'; make the plan again"),
    ({n: v for n, v in FIRST.items() if n != "provenance"}, "plan.json lacks 'provenance'"),
    (dict(format=2, drop=dict(mlp=[9]), linear=[], new_weights={}, layers=5, model={}, record=[]), "no layer 9")],
    ids=str)
def test_files_that_are_no_plan(tmp_path, fields, said):
    with pytest.raises(ValueError, match=said): Plan.load(written(tmp_path / "plan.json", fields))


def test_tensors_of_another_plan_are_noticed(tmp_path):
    path = tmp_path / "plan.json"
    plan_of_everything().save(path)
    fields = json.loads(path.read_text())
    written(path, fields | dict(linear=[5]))
    with pytest.raises(ValueError, match="plan.json lacks 'linear.5'"): Plan.load(path)


# What cannot be

@pytest.mark.parametrize("edits, said", [
    ({("heads", 0): Drop()}, "unknown kind of block 'heads'; choose attention, mlp, layer"),
    ({("mlp", 5): Drop()}, "there is no layer 5: the model has layers 0 to 4"),
    ({("mlp", -1): Drop()}, "there is no layer -1: the model has layers 0 to 4"),
    ({("mlp", "1"): Drop()}, "there is no layer '1'"), ({("mlp", 1.5): Drop()}, "there is no layer 1.5"),
    ({("mlp", 0): "drop"}, "an edit is Drop, LinearMap or NewWeights, got 'drop'"),
    ({("mlp", 0): LinearMap(torch.eye(2))}, "LinearMap edits attention, not mlp"),
    ({("layer", 0): LinearMap(torch.eye(2))}, "LinearMap edits attention, not layer"),
    ({("attention", 0): NewWeights({})}, "NewWeights edits layer, not attention"),
    ({("layer", i): Drop() for i in range(5)}, "this plan drops all 5 layers; lower k"),
    ({(kind, i): Drop() for i in range(5) for kind in ("attention", "mlp")}, "this plan drops all 5 layers; lower k"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_edits_that_cannot_be(edits, said):
    with pytest.raises(ValueError, match=said): Plan(edits, LAYERS)


def test_kinds_that_are_none():
    with pytest.raises(ValueError, match="unknown kind of block 'heads'; choose attention"):
        Plan.dropping([], 3).gone("heads")


def wide(**sizes): return Plan({("layer", 2): NewWeights({n: torch.zeros(s) for n, s in sizes.items()})}, LAYERS)


@pytest.mark.parametrize("plan, said", [
    (Plan({("attention", 2): LinearMap(torch.zeros(64, 32)), ("attention", 1): LinearMap(torch.zeros(64, 64))}, LAYERS),
     r"linear maps of layers \[2\] do not fit: a map must have shape \(64, 64\)"),
    (Plan({("attention", 2): LinearMap(torch.zeros(64))}, LAYERS), r"linear maps of layers \[2\] do not fit"),
    (wide(**{"mlp.up_proj.weight": (64, 128)}),
     r"new weights of layer 2 do not fit: mlp.up_proj.weight has shape \(128, 64\) here, \(64, 128\) in the plan"),
    (wide(**{"mlp.gate": (3,)}), r"layer 2 do not fit: mlp.gate has shape \(\) here, \(3,\) in the plan"),
    (Plan.dropping([("mlp", 0)], 6), "made for another model: layers 6 there, 5 here; make a plan"),
], ids=["wide map", "flat map", "wide weight", "unknown weight", "layers"])
@pytest.mark.parametrize("apply", [drop, lambda model, plan: edited(model, plan).__enter__()], ids=["drop", "edited"])
def test_plans_that_do_not_fit_the_model(llama, plan, said, apply):
    before = everything(llama)
    with pytest.raises(ValueError, match=said): apply(llama, Plan.dropping([("attention", 0)], plan.layers) | plan)
    assert everything(llama) == before


def test_a_map_for_attention_that_is_gone(llama):
    plan = Plan({("attention", 1): LinearMap(torch.zeros(64, 64))}, LAYERS)
    with edited(llama, Plan.dropping([("attention", 1)], LAYERS)):
        before = everything(llama)
        with pytest.raises(ValueError, match=r"the attention of layers \[1\] is dropped already; put linear maps"):
            with edited(llama, plan): pass
        assert everything(llama) == before


def test_plans_for_other_weights(llama):
    other = copy.deepcopy(llama)
    other.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    plan = Plan.dropping([("mlp", 0)], LAYERS, describe_model(llama, "tiny"))
    said = r"other weights of the same shape \(tiny\); make a plan .*, or pass strict=False to use it all the same"
    for apply in (drop, lambda model, plan: edited(model, plan).__enter__()):
        with pytest.raises(ValueError, match=said): apply(other, plan)
    with edited(llama, plan): pass
    with edited(other, plan, strict=False): pass
    half = copy.deepcopy(llama).half()  # its fingerprint is another, and says nothing of the weights
    with edited(half, plan): pass


def test_an_architecture_without_an_entry_is_refused_first(llama, monkeypatch):
    before = everything(llama)
    monkeypatch.delitem(ARCHITECTURES, "llama")
    with pytest.raises(ValueError, match="architecture 'llama' is not supported"):
        with edited(llama, Plan.dropping([("mlp", 0)], LAYERS)): pass
    assert everything(llama) == before


def test_blocks_are_plain_tuples():
    assert Block("mlp", 3) == ("mlp", 3) and Block("mlp", 3).kind == "mlp" and {("mlp", 3): 1}[Block("mlp", 3)] == 1


def test_a_plan_keeps_its_tensors_whatever_becomes_of_the_model(llama):
    "Neither training a model after its surgery nor a plan made of the model's own weights changes the other"
    model, name = copy.deepcopy(llama), "mlp.down_proj.weight"
    own = decoder_layers(model)[1].get_parameter(name)
    plan = Plan({("layer", 1): NewWeights({name: own}), ("attention", 2): LinearMap(torch.eye(64))}, LAYERS)
    before, said = own.clone(), copy.deepcopy(plan)
    with edited(model, plan):
        decoder_layers(model)[1].mlp.down_proj.weight.data.zero_()
        decoder_layers(model)[2].self_attn.linear_attn.weight.data.zero_()
    assert torch.equal(own, before) and plan == said


def test_a_fingerprint_counts_where_no_dtype_is_said(llama):
    plan = Plan.dropping([("attention", 1)], LAYERS, dict(fingerprint="another"))
    with pytest.raises(ValueError, match="other weights"), edited(llama, plan): pass


def test_plans_made_in_two_dtypes_of_one_model_join():
    here, there = (Plan({}, 3, dict(fingerprint=f, dtype=d)) for f, d in (("a", "bfloat16"), ("b", "float32")))
    assert (here | there).model["fingerprint"] == "a"


@pytest.mark.parametrize("damaged", [dict(drop=[1]), dict(format="2"), dict(layers="5"), dict(drop=dict(mlp=3))])
def test_a_plan_of_the_wrong_types_is_named(damaged, tmp_path):
    path = tmp_path / "plan.json"
    write_plan(Plan.dropping([("mlp", 1)], 3), path)
    path.write_text(json.dumps(json.loads(path.read_text()) | damaged))
    with pytest.raises(ValueError, match=r"plan\.json is no plan"): Plan.load(path)


@pytest.mark.parametrize("name", ["plan", "plan-0.5", "plan.safetensors"])
def test_a_plan_is_a_json_file(name, tmp_path):
    with pytest.raises(ValueError, match=r"written to a \.json file"): Plan({}, 3).save(tmp_path / name)
    assert not list(tmp_path.iterdir())
