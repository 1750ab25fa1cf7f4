"""Times and counts of healed models, and running a checkpoint in vLLM, with a stand-in for the interpreter that has it:
what it is asked to trust."""
import json

import pandas as pd
import pytest
import torch
from conftest import DECODERS, LAYERS, make_decoder

from entrodrop.architectures import decoder_layers
from entrodrop.checkpoints import MODELLING, only_our_code, save
from entrodrop.speed import account, engine, estimates, live, savings, speed_ratios, time_runs
from entrodrop.surgery import Drop, LinearMap, NewWeights, Plan, edited

WITHOUT_ATTENTION = Plan({("attention", 1): Drop(), ("attention", 3): Drop()}, LAYERS)
MAPPED = WITHOUT_ATTENTION | Plan({("attention", 3): LinearMap(torch.eye(64) / 8)}, LAYERS)


def healed(model):
    "Attention of layer 1 is gone, a map stands in the place of that of layer 3, and layer 4 has other norms"
    norms = {n: 2 * p.detach() for n, p in decoder_layers(model)[4].named_parameters() if "norm" in n or "ln_" in n}
    return MAPPED | Plan({("layer", 4): NewWeights(norms)}, LAYERS)


@pytest.fixture(scope="module", params=list(DECODERS))
def named(request): return request.param, make_decoder(request.param)


def counts(model, plan):
    with edited(model, plan): return account(model, 2, 6)  # less than a window


def test_what_healing_adds_is_counted(named):
    _, model = named
    dense, without, mapped = (counts(model, p) for p in (Plan({}, LAYERS), WITHOUT_ATTENTION, MAPPED))
    norms = sum(p.numel() for n, p in decoder_layers(model)[3].named_parameters() if "norm" in n or "ln_" in n)
    assert mapped == counts(model, healed(model))  # new weights cost nothing
    assert mapped["kv_bytes"] == without["kv_bytes"] and without["kv_bytes"] * LAYERS == dense["kv_bytes"] * 3
    assert mapped["prefill_flops"] - without["prefill_flops"] == 2 * 2 * 6 * 64 * 64
    more = mapped["parameters"] - without["parameters"]
    assert 64 * 64 <= more <= 64 * 64 + norms  # of which those stay that serve attention alone
    assert mapped["parameters"] < dense["parameters"] and mapped["prefill_flops"] < dense["prefill_flops"]


def test_healed_models_are_timed(named):
    _, model = named
    before = [id(module) for module in model.modules()], [p.data_ptr() for p in model.parameters()]
    runs = dict(dense=live(model), healed=live(model, healed(model)))
    times = time_runs(runs, [(2, 12)], new_tokens=2, repeats=2, warmup=0)
    assert ([id(module) for module in model.modules()], [p.data_ptr() for p in model.parameters()]) == before
    ratios = speed_ratios(times)
    assert (ratios.seconds > 0).all() and (ratios.ratio > 0).all()
    plans = dict(dense=Plan({}, LAYERS), healed=healed(model))
    left = estimates({label: {(2, 6): counts(model, plan)} for label, plan in plans.items()})
    assert (left[left.label == "healed"].estimate < 1).all() and (left[left.label == "dense"].estimate == 1).all()


def test_what_each_block_saves_is_indexed_by_kind_and_layer(llama):
    saved = savings(llama, 16)
    assert list(saved.index.names) == ["target", "layer"] and len(saved) == 3 * LAYERS
    whole = saved.loc["attention"] + saved.loc["mlp"]
    pd.testing.assert_frame_equal(saved.loc["layer"], whole, check_dtype=False)


STAND_IN = """#!/usr/bin/env python3
import json, pathlib, sys
folder, trusted, options = json.loads(sys.argv[3])
pathlib.Path("{notes}").write_text(json.dumps([trusted, options, "trust_remote_code=trusted" in sys.argv[2]]))
print("READY", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def folder(tmp_path): return save(make_decoder("llama"), WITHOUT_ATTENTION, tmp_path / "saved")


def trusted(folder, tmp_path, **options):
    "What vLLM is told of remote code"
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(notes=tmp_path / "notes"))
    python.chmod(0o755)
    engine(folder, "vllm", python, **options)
    value, given, used = json.loads((tmp_path / "notes").read_text())
    assert used and "trust_remote_code" not in given
    return value


def names_other_code(folder):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = "other.DeciLMForCausalLM"
    (folder / "config.json").write_text(json.dumps(config))


def names_a_class(file, auto, value):
    return lambda folder: (folder / file).write_text(json.dumps(dict(auto_map={auto: value})))


SPOILED = dict(
    byte=lambda f: (f / MODELLING).write_bytes((f / MODELLING).read_bytes() + b"#"),
    gone=lambda f: (f / MODELLING).unlink(),
    other_file=names_other_code,
    tokenizer=names_a_class("tokenizer_config.json", "AutoTokenizer", ["tokenization_x.X", None]),
    elsewhere=names_a_class("processor_config.json", "AutoProcessor", "somebody/repo--modeling_nemotron_nas.X"))


def test_a_checkpoint_as_it_was_saved_is_trusted(folder, tmp_path):
    assert only_our_code(folder) and trusted(folder, tmp_path) is True


@pytest.mark.parametrize("how", SPOILED)
def test_changed_or_foreign_code_is_not_trusted_unless_asked(folder, tmp_path, how):
    SPOILED[how](folder)
    assert not only_our_code(folder) and trusted(folder, tmp_path) is False
    assert trusted(folder, tmp_path, trust_remote_code=True) is True


@pytest.mark.parametrize("text,kind", [("[]", "list"), ('"x"', "str"), ("null", "NoneType")])
def test_a_config_that_is_none_is_named(folder, tmp_path, text, kind):
    (folder / "generation_config.json").write_text(text)
    said = f"generation_config.json of saved is no config: it must hold a JSON object, and holds a {kind}"
    with pytest.raises(ValueError, match=said): only_our_code(folder)
    with pytest.raises(ValueError, match=said): trusted(folder, tmp_path)


def test_a_checkpoint_that_names_no_code_needs_no_trust(tmp_path):
    plain = save(make_decoder("llama"), Plan.dropping([("layer", 1)], LAYERS), tmp_path / "plain")
    assert trusted(plain, tmp_path) is False
