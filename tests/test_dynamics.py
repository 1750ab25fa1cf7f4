"""Profiles: what measuring costs and holds, when a stored profile is trusted, where faults are located, and how sure a
boundary is."""
import copy
import functools
import gc
import math
import weakref

import numpy as np
import pandas as pd
import pytest
import torch

from entrodrop import dynamics
from entrodrop.architectures import BLOCKS, readout
from entrodrop.calibration import Calibration
from entrodrop.dynamics import Profile, change_point, expansion_start, logit_lens, lowest_point, measure, measured
from entrodrop.estimators import bucket_entropy, knn_entropy, matrix_entropy, renyi_entropy
from entrodrop.surgery import Plan, edited

CHEAP = dict(bucket=bucket_entropy, matrix=matrix_entropy)


def hooks(model): return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


# One pass, and little memory

def test_one_forward_pass_per_batch_without_the_head(decoder, ids):
    seven, passes, heads = torch.cat([ids, ids, ids[:1]]), [], []
    watchers = [decoder.base_model.register_forward_pre_hook(lambda module, args: passes.append(args[0])),
                decoder.lm_head.register_forward_pre_hook(lambda module, args: heads.append(args))]
    try: measure(decoder, seven, batch_size=3)
    finally:
        for w in watchers: w.remove()
    assert [len(p) for p in passes] == [3, 3, 1] and torch.equal(torch.cat(passes), seven)
    assert not heads


def test_no_state_outlives_its_layer(decoder, ids):
    states, alive = [], []
    def count(z):
        states.append(weakref.ref(z))
        later = [state for i, state in enumerate(states) if i % 11]  # the model itself keeps point 0
        alive.append(sum(state() is not None for state in later))
        return torch.zeros(len(z))
    measure(decoder, ids, dict(count=count), batch_size=2)
    assert len(states) == 2 * 11 and max(alive) == 3  # before, between and after
    gc.collect()
    assert all(state() is None for state in states)


def test_batch_size_does_not_matter(decoder, ids):
    whole, single = (measure(decoder, ids, batch_size=b).table for b in (8, 1))
    pd.testing.assert_frame_equal(whole, single, rtol=1e-3, atol=1e-4)


def test_pieces_do_not_matter(windowed, ids):
    together = measure(windowed, ids, CHEAP)
    for i in range(3):
        alone = measure(windowed, ids[i:i + 1], CHEAP)
        for block in BLOCKS:
            for criterion in together.criteria:
                found, expected = alone.scores(block, criterion)[0], together.scores(block, criterion)[i]
                np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


# Mistral: the same function as Llama, but for the window

def numbers_of(model, ids): return measure(model, ids, CHEAP).table[["before", "after", "score"]].to_numpy()


def test_mistral_is_llama_without_a_window(llama, mistral, ids):
    for a, b in zip(llama.parameters(), mistral.parameters(), strict=True): assert torch.equal(a, b)
    np.testing.assert_allclose(numbers_of(mistral, ids), numbers_of(llama, ids), rtol=1e-4, atol=1e-5)


def test_window_matters_where_text_is_longer(mistral, windowed, ids):
    np.testing.assert_allclose(numbers_of(windowed, ids[:, :8]), numbers_of(mistral, ids[:, :8]), rtol=1e-4, atol=1e-5)
    assert not np.allclose(numbers_of(windowed, ids[:, :9]), numbers_of(mistral, ids[:, :9]), rtol=1e-3, equal_nan=True)


def changed(model):
    "A copy with one block a little different"
    model = copy.deepcopy(model)
    model.base_model.layers[2].mlp.up_proj.weight.data.mul_(1.01)
    return model


# Stored profiles

@pytest.fixture
def calibration(ids):
    return Calibration(ids, dict(seed=1))


@pytest.fixture
def count_measures(monkeypatch):
    calls = []
    monkeypatch.setattr(dynamics, "measure", lambda *args, **kwargs: calls.append(1) or measure(*args, **kwargs))
    return calls


def test_measured_once_for_the_same_inputs(llama, calibration, tmp_path, count_measures):
    first = measured(tmp_path / "p", llama, calibration, CHEAP)
    again = measured(tmp_path / "p", copy.deepcopy(llama), copy.deepcopy(calibration), dict(CHEAP))
    assert len(count_measures) == 1
    pd.testing.assert_frame_equal(first.table, again.table)


@pytest.mark.parametrize("change", [
    lambda model, given: dict(model=changed(model)),
    lambda model, given: dict(calibration=Calibration(given.ids.flip(0), given.provenance)),
    lambda model, given: dict(calibration=Calibration(given.ids, dict(seed=2))),
    lambda model, given: dict(estimators=CHEAP | dict(bucket=functools.partial(bucket_entropy, bins=21))),
    lambda model, given: dict(estimators=CHEAP | dict(renyi=renyi_entropy)),
    lambda model, given: dict(estimators=dict(bucket=matrix_entropy, matrix=bucket_entropy)),
    lambda model, given: dict(name="somebody/else"),
], ids=["weights", "tokens", "seed", "parameter", "one more estimator", "names exchanged", "name"])
def test_measured_anew_when_an_input_changes(llama, calibration, tmp_path, count_measures, change):
    inputs = dict(model=llama, calibration=calibration, estimators=CHEAP)
    measured(tmp_path / "p", **inputs)
    inputs |= change(llama, calibration)
    new = measured(tmp_path / "p", **inputs)
    assert len(count_measures) == 2
    pd.testing.assert_frame_equal(new.table, measure(**inputs).table)
    pd.testing.assert_frame_equal(Profile.load(tmp_path / "p").table, new.table)


def test_bare_token_ids(llama, ids, tmp_path):
    pd.testing.assert_frame_equal(measured(tmp_path / "p", llama, ids, CHEAP).table, measure(llama, ids, CHEAP).table)


def test_parameter_written_out_is_the_default(llama, calibration, tmp_path, count_measures):
    measured(tmp_path / "p", llama, calibration, dict(bucket=bucket_entropy))
    measured(tmp_path / "p", llama, calibration, dict(bucket=functools.partial(bucket_entropy, bins=20)))
    assert len(count_measures) == 1


def test_two_nameless_estimators_are_not_the_same(llama, calibration, tmp_path):
    for bins in (20, 5):
        estimators = dict(bucket=lambda z, bins=bins: bucket_entropy(z, bins))
        found = measured(tmp_path / "p", llama, calibration, estimators)
        pd.testing.assert_frame_equal(found.table, measure(llama, calibration, estimators).table)


def full_disk(*args, **kwargs): raise OSError("no space left")


@pytest.mark.parametrize("fault", [(pd.DataFrame, "to_parquet"), (dynamics, "write_text")], ids=["table", "record"])
def test_save_that_dies_leaves_no_false_profile(llama, calibration, tmp_path, monkeypatch, fault):
    old = measured(tmp_path / "p", llama, calibration, CHEAP)
    with monkeypatch.context() as patch:
        patch.setattr(*fault, full_disk)
        with pytest.raises(OSError, match="no space left"): measured(tmp_path / "p", changed(llama), calibration, CHEAP)
    pd.testing.assert_frame_equal(measured(tmp_path / "p", llama, calibration, CHEAP).table, old.table)


def test_half_a_first_profile_is_measured_anew(llama, calibration, tmp_path, monkeypatch, count_measures):
    with monkeypatch.context() as patch:
        patch.setattr(dynamics, "write_text", full_disk)
        with pytest.raises(OSError, match="no space left"): measured(tmp_path / "p", llama, calibration, CHEAP)
    measured(tmp_path / "p", llama, calibration, CHEAP)
    assert len(count_measures) == 2


# Faults

@pytest.mark.parametrize("layer", [0, 2, 4])
@pytest.mark.parametrize("weight", ["self_attn.o_proj", "mlp.down_proj"])
def test_nan_is_located(decoder, ids, layer, weight):
    broken = copy.deepcopy(decoder)
    broken.get_submodule(f"model.layers.{layer}.{weight}").weight.data[3, 3] = math.nan
    before = hooks(broken)
    block = "MLP" if "mlp" in weight else "attention"
    with pytest.raises(ValueError, match=f"layer {layer}, after {block}: 120 of 7680 state values are NaN"):
        measure(broken, ids)
    assert hooks(broken) == before


def test_sequences_too_short_for_an_estimator(llama, ids):
    with pytest.raises(ValueError, match="layer 0, input.*k=25 needs at least 26 tokens, got 9"):
        measure(llama, ids[:, :9], dict(knn=knn_entropy))


@pytest.mark.parametrize("shape", [(40,), (0, 40), (3, 0), (1, 3, 40)])
def test_token_ids_of_the_wrong_shape(llama, shape):
    with pytest.raises(ValueError, match=r"must have shape \(samples, length\), got"):
        measure(llama, torch.ones(shape, dtype=int))


# The boundary

def profile_of(curves):
    "A profile with these bucket entropies at layer boundaries, `(samples, layers + 1)`"
    samples, layers = curves.shape[0], curves.shape[1] - 1
    index = pd.MultiIndex.from_product([range(samples), range(layers)], names=["sample", "layer"]).to_frame(index=False)
    before, after = curves[:, :-1].ravel(), curves[:, 1:].ravel()
    table = index.assign(block="layer", criterion="bucket", before=before, after=after, score=after - before)
    return Profile(table, dict(model=dict(layers=layers), estimators=dict(bucket={})))


def noisy_v(seed, lowest=9):
    "Sixteen samples of a V, so noisy that the lowest point of their mean is often elsewhere"
    return .3 * abs(np.arange(31) - lowest) + 2 * np.random.default_rng(seed).standard_normal((16, 31))


def test_interval_covers_the_truth():
    found = [expansion_start(profile_of(noisy_v(seed))) for seed in range(40)]
    assert sum(f.low <= 9 <= f.high for f in found) >= 34
    assert sum(f.start != 9 for f in found) > 10  # the interval was needed
    assert np.mean([f.high - f.low for f in found]) < 10  # and says something


def test_boundary_is_deterministic():
    profile = profile_of(noisy_v(0))
    first = expansion_start(profile)
    np.random.default_rng().random()
    assert expansion_start(profile) == first
    assert 0 < first.agreement < 1 and first.low <= first.start <= first.high


def test_boundary_of_a_measured_profile(decoder, ids):
    profile = measure(decoder, ids, CHEAP)
    for estimator in CHEAP:
        scores = profile.scores("layer", estimator).mean(0)
        climbed = np.concatenate([[0], scores.cumsum()])  # entropy above that of the input
        assert expansion_start(profile, estimator).start == climbed.argmin()


def test_boundary_of_what_is_not_finite():
    curves = noisy_v(0)
    without = expansion_start(profile_of(np.delete(curves, 3, 0)))
    curves[3, 4] = -math.inf
    assert expansion_start(profile_of(curves)) == without
    curves[:, 4] = -math.inf
    with pytest.raises(ValueError, match="bucket is finite for no sample.*use another criterion"):
        expansion_start(profile_of(curves))
    with pytest.raises(ValueError, match="entropy is not finite at some layers"): lowest_point(curves)
    with pytest.raises(ValueError, match="no estimator 'knn'; choose bucket"):
        expansion_start(profile_of(noisy_v(0)), "knn")


def test_a_change_point_is_found_beside_outliers_and_not_invented():
    rng = np.random.default_rng(3)
    stages = np.where(np.arange(32) < 20, -2., 1.) + .3 * rng.standard_normal((8, 32))
    stages[:, 5] = -1e4
    found = change_point(stages)
    assert found.start == 20 and found.low <= 20 <= found.high and found.p < 1e-3
    assert found == change_point(stages)  # the draws are those of the seed
    flat = [change_point(rng.standard_normal((1, 32))).p for _ in range(200)]
    assert np.mean(np.array(flat) < .05) < .08  # a test of size 0.05
    with pytest.raises(ValueError, match="not finite"): change_point(stages * np.inf)
    with pytest.raises(ValueError, match=r"at least 3 layers, got \(32,\)"): change_point(stages[0])


@pytest.mark.parametrize("seed", range(5))
def test_the_statistic_is_pettitts(seed):
    "Against the definition, one pair at a time; ties count nothing"
    values = np.random.default_rng(seed).integers(0, 5, 9).astype(float)
    def u(t): return sum(np.sign(values[j] - values[i]) for i in range(t) for j in range(t, 9))
    statistic = [u(t) for t in range(1, 9)]
    found, highest = change_point(values[None], resamples=20), max(statistic)
    assert found.start == 1 + int(np.argmax(statistic)) and found.agreement == 1  # one sample, drawn again and again
    assert found.p == pytest.approx(min(1, math.exp(-6 * max(0, highest) ** 2 / (9**3 + 9**2))))


# The logit lens

def test_lens_at_each_depth_is_a_model_cut_there(decoder, ids):
    lens = logit_lens(decoder, ids).set_index(["depth", "sample"])
    with torch.inference_mode():
        final, embedded = decoder(ids).logits.argmax(-1), readout(decoder)(decoder.get_input_embeddings()(ids))
        for depth in range(6):
            cut = Plan.dropping([("layer", i) for i in range(max(depth, 1), 5)], 5)
            with edited(decoder, cut): logits = decoder(ids).logits if depth else embedded  # no plan drops all layers
            entropy = torch.distributions.Categorical(logits=logits).entropy().mean(-1)
            np.testing.assert_allclose(lens.entropy[depth], entropy, rtol=1e-4)
            np.testing.assert_allclose(lens.agreement[depth], (logits.argmax(-1) == final).float().mean(-1), rtol=1e-6)
    assert (lens.agreement[5] == 1).all() and (lens.agreement[0] < 1).all()
