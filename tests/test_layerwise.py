"""Checkpoints that are read one layer at a time: the same states as the loaded model's for every architecture, what is
in memory meanwhile, resuming, and bad folders."""
import json
import os
import time

import pandas as pd
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import DECODERS, LAYERS, make_decoder
from safetensors.torch import load_file, save_file
from test_architectures import by_hand
from transformers.utils import logging

from entrodrop import layerwise
from entrodrop.architectures import dry_run, fingerprint, stream
from entrodrop.checkpoints import save
from entrodrop.dynamics import Profile, measure, measured
from entrodrop.estimators import ESTIMATORS, bucket_entropy
from entrodrop.layerwise import (
    Checkpoint,
    checkpoint_files,
    checkpoint_identity,
    part_of,
    safetensors_header,
    stream_checkpoint,
)
from entrodrop.models import EMBEDDED, load_model

ESTIMATOR = dict(bucket=bucket_entropy)


@pytest.fixture(scope="module")
def ids():
    "Token ids `(5, 20)`: with two at a time the last batch is smaller"
    return torch.randint(2, 97, (5, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=list(DECODERS))
def saved(request, tmp_path_factory):
    "A model of each architecture, and the folder it was saved to in small files"
    model, folder = make_decoder(request.param), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="150KB")
    return load_model(folder, device="cpu"), folder


@pytest.fixture
def folder(tmp_path):
    "A saved Llama, in several files"
    make_decoder("llama").save_pretrained(tmp_path / "model", max_shard_size="150KB")
    return tmp_path / "model"


def copied(z): return z.detach().clone()


def states(model, ids):
    "Every point of the stream of a loaded model"
    points = {}
    def keep(point, z): points[point] = copied(z)
    with torch.inference_mode(), stream(model, keep): model.base_model(ids, use_cache=False)
    return points


def write_config(folder, **change):
    "Change fields of a folder's config.json"
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_states_are_those_of_the_loaded_model(saved, ids, tmp_path):
    model, folder = saved
    seen, again = {}, {}

    def visit(rows, point, z, repeated):
        for r, sample in zip(range(rows.start, rows.stop), z, strict=True):
            (again if repeated else seen).setdefault(point, {})[r] = copied(sample)

    checkpoint = Checkpoint(folder, device="cpu")
    done = list(stream_checkpoint(checkpoint, ids, visit, tmp_path, batch_size=2))
    assert done == list(range(1, LAYERS + 1))
    expected = states(model, ids)
    assert sorted(seen) == list(range(2 * LAYERS + 1)) and sorted(again) == list(range(2, 2 * LAYERS, 2))
    for point, z in expected.items():
        found = torch.stack([seen[point][r] for r in range(5)])
        torch.testing.assert_close(found, z, rtol=1e-4, atol=1e-4)
    for point, samples in again.items(): assert all(torch.equal(samples[r], seen[point][r]) for r in range(5))
    assert checkpoint.fingerprint == fingerprint(model)
    assert not list(tmp_path.iterdir())


def test_profile_is_that_of_the_loaded_model(saved, ids):
    model, folder = saved
    loaded = measure(model, ids, ESTIMATOR, batch_size=2, name=str(folder))
    read = measure(str(folder), ids, ESTIMATOR, batch_size=2)
    pd.testing.assert_frame_equal(read.table, loaded.table, rtol=1e-3, atol=1e-3)
    assert read.provenance["model"].pop("checkpoint") and read.provenance == loaded.provenance


def test_embedded_profile_is_that_of_the_loaded_model(embedded):
    model, tokenizer = embedded
    ids = torch.tensor([tokenizer("A decoder layer is an attention block and an MLP block. " * 20).input_ids[:48]] * 2)
    ids[1] = ids[1].flip(0)
    estimators = {n: f for n, f in ESTIMATORS.items() if n != "matrix"}
    loaded, read = measure(model, ids, estimators, name=EMBEDDED), measure(EMBEDDED, ids, estimators)
    pd.testing.assert_frame_equal(read.table, loaded.table, rtol=1e-4, atol=1e-3)
    assert read.provenance["model"]["fingerprint"] == loaded.provenance["model"]["fingerprint"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtype_is_that_of_the_computation(folder, ids, dtype, tmp_path):
    model, seen = load_model(folder, dtype=dtype, device="cpu"), {}
    def keep(rows, point, z, again): seen[point] = z
    for _ in stream_checkpoint(Checkpoint(folder, dtype=dtype, device="cpu"), ids, keep, tmp_path, batch_size=5): pass
    for point, z in states(model, ids).items():
        assert seen[point].dtype == z.dtype == getattr(torch, dtype)
        torch.testing.assert_close(seen[point], z)


def test_one_layer_at_a_time_is_in_memory(saved, ids, tmp_path):
    checkpoint, present = Checkpoint(saved[1], device="cpu"), set()

    def visit(rows, point, z, again):
        there = [n for n, p in checkpoint.model.named_parameters() if not p.is_meta]
        present.add(frozenset(part_of(checkpoint.model, n) for n in there))

    for _ in stream_checkpoint(checkpoint, ids, visit, tmp_path, batch_size=2): pass
    assert present == {frozenset({i}) for i in range(LAYERS)}
    assert all(p.is_meta for p in checkpoint.model.parameters())


def test_every_byte_is_read_once(saved, ids, tmp_path):
    checkpoint = Checkpoint(saved[1], device="cpu")
    for _ in stream_checkpoint(checkpoint, ids, lambda *args: None, tmp_path): pass
    places = [t["data_offsets"] for f in checkpoint_files(saved[1]) for t in safetensors_header(f).values()]
    stored = sum(end - start for start, end in places)
    assert checkpoint.bytes_read == stored == sum(checkpoint.bytes.values())
    assert all(seconds > 0 for seconds in checkpoint.seconds.values())


# Interrupted

class Interrupted(Exception): pass


def interrupt_at(monkeypatch, layer):
    "Fail when this layer is about to be read; every layer that is read lands in the list"
    read, original = [], Checkpoint.read

    def failing(self, part):
        if part == layer: raise Interrupted
        read.append(part)
        original(self, part)

    monkeypatch.setattr(Checkpoint, "read", failing)
    return read


@pytest.mark.parametrize("layer", [0, 1, LAYERS - 1, "head"])
def test_killed_run_goes_on_where_it_was(folder, ids, tmp_path, monkeypatch, layer, capsys):
    whole = measure(folder, ids, ESTIMATOR, batch_size=2)
    with monkeypatch.context() as patch:
        interrupt_at(patch, layer)
        with pytest.raises(Interrupted): measure(folder, ids, ESTIMATOR, batch_size=2, work=tmp_path / "work")
    read = interrupt_at(monkeypatch, None)
    resumed = measure(folder, ids, ESTIMATOR, batch_size=2, work=tmp_path / "work")
    pd.testing.assert_frame_equal(resumed.table, whole.table, check_exact=True)
    assert resumed.provenance == whole.provenance
    first = LAYERS if layer == "head" else layer
    assert read == ["base", *range(first, LAYERS), "head"]
    assert (f"going on after layer {first - 1}" in capsys.readouterr().out) == (first > 0)


@pytest.mark.parametrize("damage", ["lost", "shortened", "zeros", "one byte"])
def test_states_that_are_not_what_was_written_are_computed_again(folder, ids, tmp_path, monkeypatch, damage, capsys):
    whole, work = measure(folder, ids, ESTIMATOR, batch_size=2), tmp_path / "work"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(Interrupted): measure(folder, ids, ESTIMATOR, batch_size=2, work=work)
    states = work / "states-3"
    data = bytearray(states.read_bytes())
    if damage == "one byte": data[len(data) // 2] ^= 1
    states.write_bytes(dict(lost=b"", shortened=data[:-64], zeros=bytes(len(data))).get(damage, data))
    if damage == "lost": states.unlink()
    read = interrupt_at(monkeypatch, None)
    resumed = measure(folder, ids, ESTIMATOR, batch_size=2, work=work)
    assert read == ["base", *range(LAYERS), "head"]
    said = "the states that an earlier run left in work are damaged or gone; measuring from the first layer on"
    assert said in capsys.readouterr().out
    pd.testing.assert_frame_equal(resumed.table, whole.table, check_exact=True)


def test_states_that_are_not_there_are_not_made_up(folder, ids, tmp_path):
    with pytest.raises(FileNotFoundError, match="states-2 does not hold the states of an earlier run"):
        list(stream_checkpoint(Checkpoint(folder, device="cpu"), ids, lambda *args: None, tmp_path, start=2))


@pytest.mark.parametrize("change", ["tokens", "batch size", "weights"])
def test_other_work_is_not_taken_up(folder, ids, tmp_path, monkeypatch, change):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(Interrupted): measure(folder, ids, ESTIMATOR, batch_size=2, work=tmp_path / "work")
    batch_size = 3 if change == "batch size" else 2
    if change == "tokens": ids = ids.flip(0)
    if change == "weights":
        file = checkpoint_files(folder)[0]
        save_file({n: -t for n, t in load_file(file).items()}, file, metadata=dict(format="pt"))
    read = interrupt_at(monkeypatch, None)
    resumed = measure(folder, ids, ESTIMATOR, batch_size=batch_size, work=tmp_path / "work")
    assert read == ["base", *range(LAYERS), "head"]
    expected = measure(folder, ids, ESTIMATOR, batch_size=batch_size)
    pd.testing.assert_frame_equal(resumed.table, expected.table, check_exact=True)


def test_measured_keeps_the_profile_and_no_states(folder, ids, tmp_path, monkeypatch):
    first = measured(tmp_path / "profile", folder, ids, ESTIMATOR)
    assert {p.name for p in tmp_path.iterdir()} == {"model", "profile.json", "profile.parquet"}
    read = interrupt_at(monkeypatch, None)
    again = measured(tmp_path / "profile", folder, ids, ESTIMATOR)
    kept = Profile.load(tmp_path / "profile").provenance
    assert read == [] and again.provenance == json.loads(json.dumps(first.provenance)) == kept
    pd.testing.assert_frame_equal(again.table, first.table)
    measured(tmp_path / "profile", folder, ids.flip(0), ESTIMATOR)
    assert read


def test_measured_goes_on_too(folder, ids, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(Interrupted): measured(tmp_path / "profile", folder, ids, ESTIMATOR)
    read = interrupt_at(monkeypatch, None)
    measured(tmp_path / "profile", folder, ids, ESTIMATOR)
    assert read == ["base", *range(2, LAYERS), "head"]


# Folders

def test_a_folder_of_the_base_model_alone(ids, tmp_path):
    model = make_decoder("gpt2")  # its Hub checkpoint has such names, too
    model.transformer.save_pretrained(tmp_path / "base")
    names = [n for f in checkpoint_files(tmp_path / "base") for n in safetensors_header(f)]
    assert not [n for n in names if n.startswith("transformer.")]
    write_config(tmp_path / "base", architectures=["GPT2LMHeadModel"])
    read, loaded = measure(tmp_path / "base", ids, ESTIMATOR), measure(model, ids, ESTIMATOR)
    pd.testing.assert_frame_equal(read.table, loaded.table, rtol=1e-3, atol=1e-3)


def test_header_names_every_tensor(folder):
    for file in checkpoint_files(folder):
        found = {n: tuple(t["shape"]) for n, t in safetensors_header(file).items()}
        assert found == {n: tuple(t.shape) for n, t in load_file(file).items()}


@pytest.mark.parametrize("age", [0, 3600])
def test_identity_sees_one_value_anywhere(folder, age):
    "Of every tensor; also when the file was read before, and whatever its age then"
    files, rng = checkpoint_files(folder), torch.Generator().manual_seed(0)
    for file in files: os.utime(file, (time.time() - age,) * 2)
    before = checkpoint_identity(files)
    assert before == checkpoint_identity(files)
    for file in files:
        original = file.read_bytes()
        for name, tensor in load_file(file).items():
            place = int(torch.randint(tensor.numel(), (), generator=rng))
            changed = load_file(file)
            changed[name].view(-1)[place] += 1
            save_file(changed, file, metadata=dict(format="pt"))
            assert checkpoint_identity(files) != before, name
        file.write_bytes(original)
    assert checkpoint_identity(files) == before


def test_a_file_that_stays_as_it_was_is_read_once(folder, monkeypatch):
    files, read = checkpoint_files(folder), []
    for file in files: os.utime(file, (time.time() - 3600,) * 2)
    before = checkpoint_identity(files)
    monkeypatch.setattr(layerwise, "file_digest", lambda path: read.append(path))
    assert checkpoint_identity(files) == before and not read


def test_a_dry_run_leaves_the_layers_own_forward(folder, ids):
    "accelerate keeps its hooks in the instance's `forward`, as for a model that is spread over devices"
    model = load_model(folder, device="cpu")
    moved = []
    class Hook(AlignDevicesHook):
        def pre_forward(self, module, *args, **kwargs):
            moved.append(module)
            return super().pre_forward(module, *args, **kwargs)
    for layer in model.model.layers[::2]: add_hook_to_module(layer, Hook(execution_device="cpu"))
    before = [vars(layer).get("forward") for layer in model.model.layers]
    expected = states(model, ids)[2 * LAYERS]
    assert len(moved) == 3
    z, calls = dry_run(model, ids)
    with pytest.raises(IndexError): dry_run(model, ids + 1000)  # also if it fails
    assert [vars(layer).get("forward") for layer in model.model.layers] == before
    assert [f is None for f in before] == [False, True, False, True, False]
    with torch.inference_mode():
        for layer, (args, kwargs) in zip(model.model.layers, calls, strict=True): z = layer(z, *args, **kwargs)
    torch.testing.assert_close(z, expected)
    assert len(moved) == 6


def test_missing_file_is_named(folder):
    file = checkpoint_files(folder)[1]
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {file.name}, which its model.safetensors.index.json names"):
        Checkpoint(folder)


def test_missing_tensor_is_named(folder, ids):
    gone = "model.layers.3.mlp.down_proj.weight"
    file = next(f for f in checkpoint_files(folder) if gone in safetensors_header(f))
    save_file({n: t for n, t in load_file(file).items() if n != gone}, file, metadata=dict(format="pt"))
    with pytest.raises(ValueError, match=rf"holds no usable {gone} of shape \(64, 128\)"):
        measure(folder, ids, ESTIMATOR)


def test_tensor_of_another_shape_is_named(folder, ids):
    write_config(folder, intermediate_size=96)
    with pytest.raises(ValueError, match=r"holds no usable model.layers.0.mlp.gate_proj.weight of shape \(96, 64\)"):
        measure(folder, ids, ESTIMATOR)


def test_pickled_weights_are_not_read(folder):
    for file in folder.glob("*.safetensors*"): file.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="weights are read from safetensors only"): Checkpoint(folder)


def test_quantised_checkpoint_is_refused(folder):
    write_config(folder, quantization_config=dict(quant_method="gptq", bits=4))
    with pytest.raises(ValueError, match="is quantised"): Checkpoint(folder)


@pytest.mark.parametrize("name, error, message", [
    ("model.gguf", ValueError, "Load it with load_model"),
    ("./nowhere", FileNotFoundError, "no model folder at './nowhere'"),
    ("nowhere", FileNotFoundError, "a folder, or a Hub id"), ("owner/name", OSError, "could not load 'owner/name'")])
def test_names_that_are_no_checkpoint(name, error, message):
    with pytest.raises(error, match=message): Checkpoint(name)


def test_unknown_architecture_is_refused(folder):
    write_config(folder, model_type="bloom")
    with pytest.raises(ValueError, match="architecture 'bloom' is not supported"): Checkpoint(folder)


def test_complaint_of_an_estimator_says_where(folder, ids, tmp_path):
    def refuse(z): raise ValueError("no")
    with pytest.raises(ValueError, match="layer 0, input: no"):
        measure(folder, ids, dict(refuse=refuse), work=tmp_path / "work")


def test_progress_bars_are_left_as_they_were(folder, ids, tmp_path):
    shown = logging.is_progress_bar_enabled()
    for _ in stream_checkpoint(Checkpoint(folder), ids, lambda *args: None, tmp_path): pass
    assert logging.is_progress_bar_enabled() == shown


@pytest.mark.parametrize("layers, message", [
    (8, "holds no usable model.layers.5.self_attn.q_proj.weight of shape .* and 26 more"),
    (3, "holds model.layers.3.* says that there are 3 layers")])
def test_a_config_that_is_not_its_own_is_refused_before_anything_is_read_or_written(folder, layers, message, tmp_path):
    write_config(folder, num_hidden_layers=layers)
    with pytest.raises(ValueError, match=message): Checkpoint(folder)
    with pytest.raises(ValueError, match=message):
        save(str(folder), by_hand("attention", (1,), layers=layers), tmp_path / "saved", strict=False)
    assert not (tmp_path / "saved").exists()
