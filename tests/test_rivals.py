"""Rivals on a random decoder of every supported class: nothing is left changed, and what their definitions imply holds."""
import copy

import numpy as np
import pytest
import torch
from conftest import DECODERS, LAYERS, make_decoder

from entrodrop.models import decoder_layers, stream
from entrodrop.pruning import _apply, _undo
from entrodrop.rivals import Merging, angular_distances, laco, magnitude, merged, nearest_run, taylor


@pytest.fixture(scope="module", params=DECODERS)
def model(request): return make_decoder(request.param)


@pytest.fixture(scope="module")
def text(): return torch.randint(2, 90, (5, 20), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def logits(model, text): return model(text, use_cache=False).logits


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
    assert taylor(model, text, "mlp").argmin() == 3 and taylor(model, text, "mlp")[3] == 0


def test_angles_are_between_states_at_the_last_token(model, text):
    d = angular_distances(model, text, 2)
    assert d.shape == (LAYERS + 1,) * 2 and (0 <= d).all() and (d <= 1).all()
    np.testing.assert_allclose(d, d.T)
    np.testing.assert_allclose(d, angular_distances(model, text, 5), atol=1e-4)
    np.testing.assert_allclose(angular_distances(model, text[:, :7])[0, 1], angular_distances(model, text[:, :7], 1)[0, 1], atol=1e-4)
    assert len(nearest_run(d, 2).order) == 2


def test_merging_is_taken_back_and_of_two_layers_leaves_the_upper(model, text):
    before, whole = logits(model, text), Merging(tuple((i, {i: 1}) for i in range(LAYERS)))
    pair = whole.collapse(1, 1)
    try:
        with merged(model, pair): got = logits(model, text)
    except ValueError as e:
        assert "differ in the shapes of their weights" in str(e)
        got = None
    assert torch.equal(logits(model, text), before)
    if got is None:
        shapes = [[p.shape for p in layer.parameters()] for layer in decoder_layers(model)[1:3]]
        assert shapes[0] != shapes[1]
        return
    torch.testing.assert_close(got, upper_weights_in_the_lower_place(model, text), rtol=1e-3, atol=1e-3)


def upper_weights_in_the_lower_place(model, text):
    "Logits without layer 2, whose weights stand in layer 1: under that layer's window, where windows are mixed"
    other = copy.deepcopy(model)
    layers = decoder_layers(other)
    layers[1].load_state_dict(layers[2].state_dict())
    changes = _apply(other, "layer", [2])
    try: return logits(other, text)
    finally: _undo(changes)


def test_merging_equal_layers_is_dropping_them(llama, text):
    model = copy.deepcopy(llama)
    for layer in model.model.layers[2:4]: layer.load_state_dict(model.model.layers[1].state_dict())
    with merged(model, Merging(tuple((i, {i: 1}) for i in range(LAYERS))).collapse(1, 2)): got = logits(model, text)
    changes = _apply(model, "layer", [2, 3])
    try: torch.testing.assert_close(got, logits(model, text), rtol=1e-4, atol=1e-4)
    finally: _undo(changes)


@pytest.mark.parametrize("k", [0, 1, 3])
def test_laco_stops_at_k(llama, text, k):
    found = laco(llama, text, k, threshold=-1.1, step=None, merge=3)
    assert len(found.rows) == LAYERS - k and len(decoder_layers(llama)) == LAYERS
    for layer, mixture in found.rows: assert sum(mixture.values()) == 1  # of equal layers, the same layer
    assert len(laco(llama, text, k, threshold=1.1, step=None).rows) == LAYERS


def by_hand_similarity(model, text, merging):
    states = {}
    def last(): return states["last"].float()
    with torch.inference_mode(), stream(model, lambda point, z: states.__setitem__("last", z)): model.base_model(text, use_cache=False)
    dense = last()
    with torch.inference_mode(), merged(model, merging), stream(model, lambda point, z: states.__setitem__("last", z)): model.base_model(text, use_cache=False)
    return torch.cosine_similarity(dense, last(), dim=-1).mean().item()


def test_a_threshold_parts_the_merges_that_are_kept_from_those_that_are_not(llama, text):
    whole = Merging(tuple((i, {i: 1}) for i in range(LAYERS)))
    similar = {at: by_hand_similarity(llama, text, whole.collapse(at, 1)) for at in (3, 2, 1, 0)}
    best, others = max(similar.values()), sorted(similar.values())[:-1]
    (at,) = [i for i, v in similar.items() if v == best]
    found = laco(llama, text, 1, threshold=(best + others[-1]) / 2, step=None, merge=2)  # only the best pair is similar enough
    assert found.rows == whole.collapse(at, 1).rows
    assert laco(llama, text, 1, threshold=(others[0] + others[1]) / 2, step=None, merge=2).rows == whole.collapse(next(i for i, v in similar.items() if v > others[0]), 1).rows
    lowered = laco(llama, text, 1, threshold=.9999, step=.0005, merge=2)  # and by the highest threshold that lets one go, it is found
    assert lowered.rows == found.rows and best > lowered.threshold >= best - .0005


@pytest.mark.parametrize("wrong,message", [(dict(k=5), "k must lie between 0 and 4"), (dict(merge=1), "merge must be at least 2")])
def test_impossible_merging(llama, text, wrong, message):
    with pytest.raises(ValueError, match=message): laco(llama, text, **dict(k=1, threshold=0) | wrong)
