"""Checkpoints that are read one layer at a time: the same states as the loaded model's for every architecture, what is in memory meanwhile, resuming, and bad folders."""
import json

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import DECODERS, LAYERS, make_decoder
from entrodrop.dynamics import Profile, measure, measured
from entrodrop.estimators import ESTIMATORS, bucket_entropy
from entrodrop.layerwise import Checkpoint, checkpoint_files, checkpoint_identity, safetensors_header, stream_checkpoint
from entrodrop.models import EMBEDDED, fingerprint, load_model, stream

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
    with torch.inference_mode(), stream(model, lambda point, z: points.__setitem__(point, copied(z))): model.base_model(ids, use_cache=False)
    return points


def test_states_are_those_of_the_loaded_model(saved, ids, tmp_path):
    model, folder = saved
    seen, again = {}, {}

    def visit(rows, point, z, repeated):
        for r, sample in zip(range(rows.start, rows.stop), z): (again if repeated else seen).setdefault(point, {})[r] = copied(sample)

    checkpoint = Checkpoint(folder, device="cpu")
    assert list(stream_checkpoint(checkpoint, ids, visit, tmp_path, batch_size=2)) == list(range(1, LAYERS + 1))
    expected = states(model, ids)
    assert sorted(seen) == list(range(2 * LAYERS + 1)) and sorted(again) == list(range(2, 2 * LAYERS, 2))
    for point, z in expected.items(): torch.testing.assert_close(torch.stack([seen[point][r] for r in range(5)]), z, rtol=1e-4, atol=1e-4)
    for point, samples in again.items(): assert all(torch.equal(samples[r], seen[point][r]) for r in range(5))
    assert checkpoint.fingerprint == fingerprint(model)
    assert not list(tmp_path.iterdir())


def test_profile_is_that_of_the_loaded_model(saved, ids):
    model, folder = saved
    loaded, read = measure(model, ids, ESTIMATOR, batch_size=2, name=str(folder)), measure(str(folder), ids, ESTIMATOR, batch_size=2)
    pd.testing.assert_frame_equal(read.table, loaded.table, rtol=1e-3, atol=1e-3)
    assert {k: v for k, v in read.provenance["model"].items() if k != "checkpoint"} == loaded.provenance["model"]
    assert {k: v for k, v in read.provenance.items() if k != "model"} == {k: v for k, v in loaded.provenance.items() if k != "model"}


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
    for _ in stream_checkpoint(Checkpoint(folder, dtype=dtype, device="cpu"), ids, lambda rows, point, z, again: seen.__setitem__(point, z), tmp_path, batch_size=5): pass
    for point, z in states(model, ids).items():
        assert seen[point].dtype == z.dtype == getattr(torch, dtype)
        torch.testing.assert_close(seen[point], z)


def test_one_layer_at_a_time_is_in_memory(saved, ids, tmp_path):
    checkpoint, present = Checkpoint(saved[1], device="cpu"), set()

    def visit(rows, point, z, again):
        present.add(frozenset(checkpoint._part(n) for n, p in checkpoint.model.named_parameters() if not p.is_meta))

    for _ in stream_checkpoint(checkpoint, ids, visit, tmp_path, batch_size=2): pass
    assert present == {frozenset({i}) for i in range(LAYERS)}
    assert all(p.is_meta for p in checkpoint.model.parameters())


def test_every_byte_is_read_once(saved, ids, tmp_path):
    checkpoint = Checkpoint(saved[1], device="cpu")
    for _ in stream_checkpoint(checkpoint, ids, lambda *args: None, tmp_path): pass
    stored = sum(t["data_offsets"][1] - t["data_offsets"][0] for f in checkpoint_files(saved[1]) for t in safetensors_header(f).values())
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
    pd.testing.assert_frame_equal(resumed.table, measure(folder, ids, ESTIMATOR, batch_size=batch_size).table, check_exact=True)


def test_measured_keeps_the_profile_and_no_states(folder, ids, tmp_path, monkeypatch):
    first = measured(tmp_path / "profile", folder, ids, ESTIMATOR)
    assert {p.name for p in tmp_path.iterdir()} == {"model", "profile.json", "profile.parquet"}
    read = interrupt_at(monkeypatch, None)
    again = measured(tmp_path / "profile", folder, ids, ESTIMATOR)
    assert read == [] and again.provenance == json.loads(json.dumps(first.provenance)) == Profile.load(tmp_path / "profile").provenance
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
    assert all(not n.startswith("transformer.") for f in checkpoint_files(tmp_path / "base") for n in safetensors_header(f))
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | dict(architectures=["GPT2LMHeadModel"])))
    pd.testing.assert_frame_equal(measure(tmp_path / "base", ids, ESTIMATOR).table, measure(model, ids, ESTIMATOR).table, rtol=1e-3, atol=1e-3)


def test_header_names_every_tensor(folder):
    for file in checkpoint_files(folder):
        assert {n: tuple(t["shape"]) for n, t in safetensors_header(file).items()} == {n: tuple(t.shape) for n, t in load_file(file).items()}


def test_identity_depends_on_the_values(folder):
    files = checkpoint_files(folder)
    before = checkpoint_identity(files)
    assert before == checkpoint_identity(files)
    tensors = load_file(files[-1])
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, files[-1], metadata=dict(format="pt"))
    assert checkpoint_identity(files) != before


def test_missing_file_is_named(folder):
    file = checkpoint_files(folder)[1]
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {file.name}, which its model.safetensors.index.json names"): Checkpoint(folder)


def test_missing_tensor_is_named(folder, ids):
    file = next(f for f in checkpoint_files(folder) if any("layers.3." in n and "down_proj" in n for n in safetensors_header(f)))
    save_file({n: t for n, t in load_file(file).items() if "layers.3.mlp.down_proj" not in n}, file, metadata=dict(format="pt"))
    with pytest.raises(ValueError, match=r"holds no usable model.layers.3.mlp.down_proj.weight of shape \(64, 128\)"): measure(folder, ids, ESTIMATOR)


def test_tensor_of_another_shape_is_named(folder, ids):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(intermediate_size=96)))
    with pytest.raises(ValueError, match=r"holds no usable model.layers.0.mlp.gate_proj.weight of shape \(96, 64\)"): measure(folder, ids, ESTIMATOR)


def test_pickled_weights_are_not_read(folder):
    for file in folder.glob("*.safetensors*"): file.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="weights are read from safetensors only"): Checkpoint(folder)


def test_quantised_checkpoint_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(quantization_config=dict(quant_method="gptq", bits=4))))
    with pytest.raises(ValueError, match="is quantised"): Checkpoint(folder)


@pytest.mark.parametrize("name, error, message", [("model.gguf", ValueError, "Load it with load_model"), ("./nowhere", FileNotFoundError, "no model folder at './nowhere'"),
                                                  ("nowhere", FileNotFoundError, "a folder, or a Hub id"), ("owner/name", OSError, "could not load 'owner/name'")])
def test_names_that_are_no_checkpoint(name, error, message):
    with pytest.raises(error, match=message): Checkpoint(name)


def test_unknown_architecture_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(model_type="bloom")))
    with pytest.raises(ValueError, match="architecture 'bloom' is not supported"): Checkpoint(folder)


def test_complaint_of_an_estimator_says_where(folder, ids, tmp_path):
    def refuse(z): raise ValueError("no")
    with pytest.raises(ValueError, match="layer 0, input: no"): measure(folder, ids, dict(refuse=refuse), work=tmp_path / "work")


def test_progress_bars_are_left_as_they_were(folder, ids, tmp_path):
    from transformers.utils import logging
    shown = logging.is_progress_bar_enabled()
    for _ in stream_checkpoint(Checkpoint(folder), ids, lambda *args: None, tmp_path): pass
    assert logging.is_progress_bar_enabled() == shown
