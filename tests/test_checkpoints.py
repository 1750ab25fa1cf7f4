"""Pruned checkpoints: every architecture and kind of edit from memory and from disk, what generation asks of them, and
what must never be written."""
import copy
import json
import subprocess
import sys

import pytest
import torch
from conftest import DECODERS, LAYERS, make_decoder
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from entrodrop import checkpoints
from entrodrop.architectures import decoder_layers, fingerprint
from entrodrop.checkpoints import model_card, save
from entrodrop.dynamics import measure
from entrodrop.gguf_files import save_gguf
from entrodrop.layerwise import safetensors_header
from entrodrop.models import load_model, load_tokenizer
from entrodrop.pruning import rank
from entrodrop.speed import cache_of, step
from entrodrop.surgery import LinearMap, NewWeights, Plan, edited, plan_record

CLOSE = dict(rtol=1e-4, atol=1e-4)


def by_hand(layers=LAYERS, model=None, **kinds):
    "A plan that drops these layers of each kind"
    return Plan.dropping([(kind, i) for kind, numbers in kinds.items() for i in numbers], layers, model)


PLANS = dict(attention=by_hand(attention=(1, 3)), first=by_hand(attention=(0, 3)), mlp=by_hand(mlp=(0, 2)),
             layer=by_hand(layer=(0, 3)), mixed=by_hand(attention=(1, 3), mlp=(3, 4)),
             layer_and_attention=by_hand(attention=(1,), layer=(0,)), all_attention=by_hand(attention=range(LAYERS)))


def random(shape, seed): return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 16


def mapped(*layers, plan=None):
    "A plan, or one that drops nothing, with random linear maps in the place of attention"
    return (plan or by_hand()) | Plan({("attention", i): LinearMap(random((64, 64), i)) for i in layers}, LAYERS)


def is_fused(parameter): return parameter.ndim == 3  # experts, which are stored one by one


def reweighted(model, *layers, fused=False):
    "A plan that gives layers other values of all parameters, those of experts only where they are asked for"
    edits = {}
    for i in layers:
        own = {n: p for n, p in decoder_layers(model)[i].named_parameters() if fused or not is_fused(p)}
        edits["layer", i] = NewWeights({n: p.detach() + random(p.shape, i) for n, p in own.items()})
    return Plan(edits, LAYERS)


HEALED = dict(  # functions of the dense model
    attention=lambda model: mapped(1, 3), first=lambda model: mapped(0, plan=PLANS["first"]),
    one_map=lambda model: mapped(0),
    beside_no_mlp=lambda model: mapped(1, plan=by_hand(attention=(2,), mlp=(1,), layer=(0,))),
    new_weights=lambda model: reweighted(model, 0, 4),
    silenced_with_new_weights=lambda model: PLANS["first"] | reweighted(model, 0, 3),
    everything=lambda model: mapped(2, plan=by_hand(attention=(1,), mlp=(3,), layer=(0,))) | reweighted(model, 2, 3, 4))


@pytest.fixture(scope="module", params=list(DECODERS))
def named(request, tmp_path_factory):
    "Name and model of each architecture in turn, and its dense checkpoint in files of a few tensors"
    model, folder = make_decoder(request.param), tmp_path_factory.mktemp("dense") / "model"
    model.save_pretrained(folder, max_shard_size="40KB")
    return request.param, model, folder


@pytest.fixture(scope="module")
def ids():
    return torch.randint(2, 97, (2, 28), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def logits(model, ids): return model(ids).logits


def logits_under(model, plan, ids):
    with edited(model, plan, strict=False): return logits(model, ids)


def contents(folder):
    "Every file but the card, by name"
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "README.md"}


def form_for(name, plan):
    "None, but for a Mistral with a window, which only one form holds without some of its blocks"
    whole = not (plan.gone("attention") or plan.gone("mlp") or plan.linear)
    return "entrodrop" if name == "mistral" and not whole else None


@torch.inference_mode()
def assert_generates_with_a_cache(model, ids):
    text = dict(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(**text), model.generate(**text, use_cache=False))


def saved_both_ways(model, dense, plan, folder, form=None):
    "The folder that was saved from disk, once it is known to be the same as that from memory; the model is unchanged"
    before = fingerprint(model)
    memory, disk = save(model, plan, folder / "memory", form=form), save(dense, plan, folder / "disk", form=form)
    assert fingerprint(model) == before
    assert contents(memory) == contents(disk)
    return disk


@pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
def test_folder_says_what_the_live_model_says_from_memory_and_from_disk(named, plan, ids, tmp_path):
    name, model, dense = named
    expected = logits_under(model, plan, ids)
    disk = saved_both_ways(model, dense, plan, tmp_path, form_for(name, plan))
    assert torch.equal(logits(model, ids), logits(AutoModelForCausalLM.from_pretrained(dense), ids))
    loaded = load_model(disk, device="cpu")
    assert torch.equal(logits(loaded, ids), expected)
    if plan.kind == "layer":
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(disk), ids), expected)
        assert not list(disk.glob("*.py"))
    held = {n for path in disk.glob("*.safetensors") for n in safetensors_header(path)}
    assert len(held) == len(set(held)) and loaded.num_parameters() < model.num_parameters()
    assert_generates_with_a_cache(loaded, ids)


@pytest.mark.parametrize("heal", HEALED.values(), ids=list(HEALED))
def test_healed_models_are_saved_and_loaded(named, heal, ids, tmp_path):
    name, model, dense = named
    plan = heal(model)
    form, expected = form_for(name, plan), logits_under(model, plan, ids)
    unhealed = by_hand(**{kind: plan.gone(kind) for kind in ("attention", "mlp", "layer")})
    assert not torch.equal(logits_under(model, unhealed, ids), expected)
    disk = saved_both_ways(model, dense, plan, tmp_path, form)
    loaded = load_model(disk, device="cpu")
    assert torch.equal(logits(loaded, ids), expected)
    assert_generates_with_a_cache(loaded, ids)
    card = (disk / "README.md").read_text()
    for layers, said in ((plan.linear, "attention replaced by a linear map"), (plan.reweighted, "new weights")):
        assert (f"{said} in layers: {', '.join(map(str, layers))}\n" in card) == bool(layers)
    if name == "llama" and plan.k:
        alone = AutoModelForCausalLM.from_pretrained(disk, trust_remote_code=True)
        assert torch.equal(logits(alone, ids), expected)


@pytest.mark.parametrize("name", [name for name in DECODERS if hasattr(DECODERS[name](), "num_experts_per_tok")])
def test_new_weights_of_experts_are_saved_from_memory_alone(name, ids, tmp_path):
    model = make_decoder(name)
    model.save_pretrained(tmp_path / "dense")
    plan = by_hand(attention=(1,)) | reweighted(model, 3, fused=True)
    with pytest.raises(ValueError, match="not stored as one tensor in .*load the model and save it from memory"):
        save(tmp_path / "dense", plan, tmp_path / "never")
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]
    loaded = load_model(save(model, plan, tmp_path / "saved"), device="cpu")
    assert torch.equal(logits(loaded, ids), logits_under(model, plan, ids))


def test_the_plan_lies_beside_the_weights_in_words(llama, tmp_path):
    llama.save_pretrained(tmp_path / "dense")
    plan = HEALED["silenced_with_new_weights"](llama)
    for source in (llama, tmp_path / "dense"):
        folder = save(source, plan, tmp_path / f"saved-{len(list(tmp_path.iterdir()))}")
        assert json.loads((folder / "plan.json").read_text()) == plan_record(plan) | dict(tensors=None)
        assert {p.name for p in folder.glob("*.safetensors")} == {"model.safetensors"}
        with pytest.raises(FileNotFoundError, match="of a checkpoint, they are in its own weights"):
            Plan.load(folder / "plan.json")


def test_new_weights_may_be_views_of_each_other(llama, ids, tmp_path):
    "What a solver or a merge returns: transposed, or one tensor for several layers"
    llama.save_pretrained(tmp_path / "dense")
    square, both = random((64, 64), 0), random((2, 64, 64), 1)
    dense = llama.model.layers[0].self_attn.o_proj.weight
    plan = Plan({("attention", 1): LinearMap(square.T), ("attention", 2): LinearMap(square.T),
                 ("attention", 3): LinearMap(both[0]), ("layer", 4): NewWeights({"self_attn.o_proj.weight": both[1].T}),
                 ("layer", 0): NewWeights({"self_attn.q_proj.weight": square, "self_attn.o_proj.weight": square}),
                 ("layer", 3): NewWeights({"self_attn.o_proj.weight": dense})}, LAYERS)
    disk = saved_both_ways(llama, tmp_path / "dense", plan, tmp_path)
    assert torch.equal(logits(load_model(disk, device="cpu"), ids), logits_under(llama, plan, ids))


def test_new_weights_get_the_dtype_of_those_on_disk(ids, tmp_path):
    wide = make_decoder("llama")
    plan = PLANS["first"] | mapped(2) | reweighted(wide, 4)
    wide.bfloat16().save_pretrained(tmp_path / "dense")
    model = load_model(tmp_path / "dense", "bfloat16", "cpu")
    disk = saved_both_ways(model, tmp_path / "dense", plan, tmp_path)
    assert {tensor["dtype"] for tensor in safetensors_header(disk / "model.safetensors").values()} == {"BF16"}
    assert torch.equal(logits(load_model(disk, "bfloat16", "cpu"), ids), logits_under(model, plan, ids))


def test_edits_that_do_not_fit_are_refused_before_anything_is_written(llama, tmp_path):
    llama.save_pretrained(tmp_path / "dense")
    narrow = Plan({("attention", 1): LinearMap(torch.zeros(64, 32))}, LAYERS)
    unknown = Plan({("layer", 1): NewWeights({"mlp.up_proj.bias": torch.zeros(128)})}, LAYERS)
    for plan, message in ((narrow, r"must have shape \(64, 64\)"), (unknown, "new weights of layer 1 do not fit")):
        for source in (llama, tmp_path / "dense"):
            with pytest.raises(ValueError, match=message): save(source, plan, tmp_path / "never")
    with edited(llama, mapped(1)), pytest.raises(ValueError, match="blocks dropped already"):
        save(llama, by_hand(attention=(2,)), tmp_path / "never")
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    "A Llama that lacks two attention blocks and another MLP, as a folder; and the dense model"
    model = make_decoder("llama")
    return save(model, PLANS["mixed"], tmp_path_factory.mktemp("pruned") / "llama"), model


@pytest.mark.parametrize("name", ["mixed", "first", "all_attention"])
def test_generation_in_every_way_equals_the_live_model(name, ids, tmp_path):
    model, plan = make_decoder("llama"), PLANS[name]
    loaded, mask = load_model(save(model, plan, tmp_path / "saved"), device="cpu"), torch.ones_like(ids)
    mask[0, :7] = 0  # left padding of the first
    ways = [dict(), dict(use_cache=False), dict(num_beams=3), dict(num_beams=2, use_cache=False)]
    if name != "all_attention": ways.append(dict(cache_implementation="static"))
    with torch.inference_mode(), edited(model, plan):
        text = dict(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
        results = [[m.generate(**text, **way).tolist() for m in (model, loaded)] for way in ways]
    assert all(live == folder for live, folder in results)
    assert results[0] == results[1]
    alone = loaded.generate(ids[:1, 7:], max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert alone[0, -12:].tolist() == results[0][1][0][-12:]  # padding changes nothing


def test_continuing_in_chunks_equals_one_pass(llama_folder, ids):
    loaded = load_model(llama_folder[0], device="cpu")
    with torch.inference_mode():
        first = loaded(ids[:, :9], use_cache=True)
        second = step(loaded, ids[:, 9:], cache_of(first))
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), logits(loaded, ids), **CLOSE)


def test_saving_what_was_loaded_changes_nothing(llama_folder, ids, tmp_path):
    folder, _ = llama_folder
    loaded = load_model(folder, device="cpu")
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    old, new = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again"))
    for config in (old, new): config.pop("_name_or_path", None)
    assert new == old
    assert torch.equal(logits(load_model(tmp_path / "again", device="cpu"), ids), logits(loaded, ids))


def test_a_training_step_changes_what_is_there_and_nothing_else(llama_folder, ids):
    loaded = load_model(llama_folder[0], device="cpu").train()
    optimizer = torch.optim.SGD(loaded.parameters(), lr=.01)
    loaded(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in loaded.parameters())
    before = logits(loaded, ids)
    optimizer.step()
    assert not torch.equal(logits(loaded, ids), before)


def test_a_pruned_folder_can_be_measured(llama_folder, ids):
    folder, _ = llama_folder
    in_memory = measure(load_model(folder, device="cpu"), ids, batch_size=2).table
    assert (in_memory.score == measure(str(folder), ids, batch_size=2).table.score).all()
    missing = in_memory[(in_memory.block == "attention") & (in_memory.layer == 1)]
    assert (missing.score.abs() < 1e-6).all()


BARE = """
import json, sys
from transformers import AutoModelForCausalLM
try: AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as e: print("refused:", str(e)[:300].replace(chr(10), " "))
else: print("loaded")
"""


@pytest.mark.parametrize("name,form", [("llama", "nemotron-nas"), ("llama", "entrodrop"), ("qwen2", None)])
def test_transformers_refuses_rather_than_filling_in_random_weights(name, form, tmp_path):
    folder = save(make_decoder(name), PLANS["attention"], tmp_path / "saved", form=form)
    command = [sys.executable, "-c", BARE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert "refused:" in done.stdout and "loaded" not in done.stdout.split(), (done.stdout, done.stderr)


def test_config_of_the_nemotron_form_is_what_engines_read(llama_folder):
    config = json.loads((llama_folder[0] / "config.json").read_text())
    expected = dict(
        architectures=["DeciLMForCausalLM"], model_type="nemotron-nas", num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
        auto_map=dict(AutoConfig="modeling_nemotron_nas.DeciLMConfig",
                      AutoModelForCausalLM="modeling_nemotron_nas.DeciLMForCausalLM"))
    assert {n: config[n] for n in expected} == expected
    kept = dict(attention=dict(no_op=False, n_heads_in_group=2, replace_with_linear=False),
                ffn=dict(no_op=False, intermediate_size=128))  # no multiple of 256, so no ffn_mult
    no_attention = kept | dict(attention=dict(no_op=True, n_heads_in_group=None, replace_with_linear=False))
    no_mlp = kept | dict(ffn=dict(no_op=True, intermediate_size=None))
    assert config["block_configs"] == [kept, no_attention, kept, no_mlp]
    assert not {"sliding_window", "layer_types"} & set(config)
    source = (llama_folder[0] / "modeling_nemotron_nas.py").read_text()
    assert "entrodrop" not in source and "AUTOGENERATED" not in source and compile(source, "modeling", "exec")


def test_the_first_attention_is_silenced_and_said_so(tmp_path):
    folder = save(make_decoder("llama"), PLANS["first"], tmp_path / "saved")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert not file.get_tensor("model.layers.0.self_attn.o_proj.weight").any()
        assert file.get_tensor("model.layers.0.self_attn.q_proj.weight").any()
        assert not [n for n in file.keys() if n.startswith("model.layers.3.self_attn")]
    card = (folder / "README.md").read_text()
    assert "Attention of layer 0 is dropped by zeros" in card and "key-value cache: 4 of 5 layers" in card
    assert "new weights" not in card  # which zeros are not, to a reader
    assert Plan.load(folder / "plan.json") == PLANS["first"]


def test_rotary_embedding_head_size_and_biases_survive(ids, tmp_path):
    torch.manual_seed(0)
    rope = dict(rope_type="llama3", rope_theta=5e5, factor=8., low_freq_factor=1., high_freq_factor=4.,
                original_max_position_embeddings=64)
    config = LlamaConfig(num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=128, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=8, vocab_size=100, attention_bias=True, mlp_bias=True,
                         tie_word_embeddings=True, eos_token_id=None, pad_token_id=0, max_position_embeddings=512,
                         rope_parameters=rope)
    model = LlamaForCausalLM(config).eval()
    for p in model.parameters(): p.data.add_(torch.randn_like(p), alpha=.1)
    model.save_pretrained(tmp_path / "dense")
    for label, plan in PLANS.items():
        folder = saved_both_ways(model, tmp_path / "dense", plan, tmp_path / label)
        assert torch.equal(logits(load_model(folder, device="cpu"), ids), logits_under(model, plan, ids)), label


@pytest.mark.parametrize("label", ["layer", "everything"])
def test_large_models_are_written_in_shards(named, label, ids, tmp_path):
    name, model, dense = named
    plan = PLANS[label] if label in PLANS else HEALED[label](model)
    folder = save(dense, plan, tmp_path / "disk", form=form_for(name, plan), max_shard_size=40_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3 and {p.name for p in files} == set(index["weight_map"].values())
    held = {n: (p.name, t["data_offsets"]) for p in files for n, t in safetensors_header(p).items()}
    assert {n: file for n, (file, _) in held.items()} == index["weight_map"]
    assert sum(end - begin for _, (begin, end) in held.values()) == index["metadata"]["total_size"]
    assert torch.equal(logits(load_model(folder, device="cpu"), ids), logits_under(model, plan, ids))


def test_a_write_that_fails_leaves_nothing_behind(named, tmp_path, monkeypatch):
    _, model, dense = named
    before = model.config.to_dict()
    def full(*args, **kwargs): raise OSError(28, "No space left on device")
    monkeypatch.setattr(checkpoints, "write_text", full)
    for source in (model, dense):
        with pytest.raises(OSError, match="No space left"): save(source, PLANS["layer"], tmp_path / "out" / "saved")
    assert not list((tmp_path / "out").iterdir())
    assert model.config.to_dict() == before and len(decoder_layers(model)) == LAYERS


def test_only_what_belongs_to_the_pruned_model_is_copied(word_folder, tmp_path):
    dense = tmp_path / "dense"
    load_model(word_folder, device="cpu").save_pretrained(dense)
    load_tokenizer(word_folder).save_pretrained(dense)
    others = ("params.json", "consolidated.safetensors", "pytorch_model.bin", "training_args.bin", "optimizer.pt")
    for name in others: (dense / name).write_bytes(b"{}")
    (dense / "chat_template.jinja").write_text("{{ messages }}")
    folder = save(dense, by_hand(4, attention=(1,)), tmp_path / "saved")
    assert {p.name for p in folder.iterdir()} == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "modeling_nemotron_nas.py", "plan.json", "tokenizer.json", "tokenizer_config.json"}
    assert load_tokenizer(folder)("the for loop").input_ids == load_tokenizer(word_folder)("the for loop").input_ids
    assert Plan.load(folder / "plan.json").gone("attention") == (1,)


def test_a_plan_for_other_weights_is_refused(llama, ids, tmp_path):
    llama.save_pretrained(tmp_path / "dense")
    other = copy.deepcopy(llama)
    for p in other.parameters(): p.data.mul_(1.1)
    other.save_pretrained(tmp_path / "other")
    for profile in (measure(llama, ids, name="m"), measure(str(tmp_path / "dense"), ids)):
        plan = rank(profile, "attention", "cosine").first(2)
        assert save(tmp_path / "dense", plan, tmp_path / f"right-{len(list(tmp_path.iterdir()))}").exists()
        for source in (other, tmp_path / "other"):
            with pytest.raises(ValueError, match="made for other weights of the same shape"):
                save(source, plan, tmp_path / "wrong")
        assert not (tmp_path / "wrong").exists()
    for source in (other, tmp_path / "other"):
        folder = save(source, plan, tmp_path / f"forced-{len(list(tmp_path.iterdir()))}", strict=False)
        assert Plan.load(folder / "plan.json") == plan
    with pytest.raises(ValueError, match="layers 4 there, 5 here"):
        save(llama, by_hand(4, layer=(1,)), tmp_path / "wrong")


def test_from_a_gguf_file(word_folder, ids, tmp_path):
    model = load_model(word_folder, device="cpu")
    path, plan = save_gguf(word_folder, tmp_path / "model.gguf", "float32"), by_hand(4, attention=(1, 2))
    folder = save(path, plan, tmp_path / "saved")
    torch.testing.assert_close(logits(load_model(folder, device="cpu"), ids), logits_under(model, plan, ids), **CLOSE)
    assert load_tokenizer(folder)("the for loop").input_ids == load_tokenizer(word_folder)("the for loop").input_ids


TEXT = dict(data="c4", samples=128, seed=2024)
RANKED = dict(method="bucket", target="attention", k=1, order=[["attention", 2], ["attention", 1]], scores=[0., 0.],
              protection="released", protected=[0, 3], start=None, tokens=32768., text=TEXT)
BASE = dict(name="owner/Base-1B", model_type="llama", parameters=1000)


def test_the_card_tells_base_model_rows_and_loading():
    plan = Plan.dropping([("attention", 2)], 4, BASE, [RANKED])
    row = dict(task="piqa", metric="acc_norm", value=.71234, stderr=.01, n=100)
    card = model_card(plan, "nemotron-nas", "small", 900, [row])
    for part in ("base_model: owner/Base-1B", "pruned without training by", "attention dropped in layers: 2",
                 "parameters: 900 of 1,000", "key-value cache: 3 of 4 layers",
                 "- 1 × attention by bucket, protection released (layers 0, 3)", "data c4, samples 128, seed 2024",
                 "| piqa | acc_norm | 0.7123 | 0.0100 | 100 |", "vllm serve small --trust-remote-code",
                 'from_pretrained("small", trust_remote_code=True)', "the whole record is in `plan.json`"):
        assert part in card


def test_the_card_tells_of_every_method():
    found = dict(method="greedy KL", k=2, order=[["mlp", 0], ["layer", 1], ["mlp", 3]], scores=[0.] * 3, tokens=5e6,
                 passes=12.34, text=TEXT)
    fitted = dict(method="linear maps", k=1, ridges={"1": .1}, tokens=9999.6, tokens_sha256="ab", text=dict(samples=32))
    trained = dict(method="LoRA distillation", rank=8, steps=20, learning_rate=2e-3, maps=[1])
    plan = Plan.dropping([("mlp", 0), ("layer", 1)], 4, BASE, [RANKED, found, fitted, trained])
    lines = model_card(plan, "entrodrop", "small", 900).splitlines()
    assert "Base-1B of 4 layers (llama), pruned by [entropy-based block pruning]" in "\n".join(lines)
    for line in ("- 2 × block by greedy KL, for 5,000,000 tokens through the model, 12.3 passes over the text of its "
                 "trials", "- linear maps: k 1, for 10,000 tokens through the model",
                 "- then trained: method LoRA distillation, rank 8, steps 20, learning_rate 0.002",
                 "- calibration: data c4, samples 128, seed 2024", "- calibration: samples 32"):
        assert lines.count(line) == 1


def test_the_card_of_a_plan_of_version_0_1(tmp_path):
    healing = dict(method="LoRA distillation", rank=8, steps=20, learning_rate=2e-3)
    old = dict(target="attention", criterion="greedy KL", k=1, order=[2, 1, 0, 3], scores=[0.] * 4, protection="none",
               protected=[], start=None, layers=4, drop=[2],
               provenance=dict(model=BASE, text=TEXT, healing=healing, selection=dict(method="KL", passes=3.21)))
    (tmp_path / "plan.json").write_text(json.dumps(old))
    card = model_card(Plan.load(tmp_path / "plan.json"), "nemotron-nas", "small", 900)
    assert "(llama), pruned by [" in card and "protection none (layers none), 3.2 passes over the text" in card
    assert "- then trained: method LoRA distillation, rank 8, steps 20, learning_rate 0.002\n" in card


def test_a_plan_that_knows_no_weights_is_checked_by_shape_alone(named, tmp_path):
    "Such as an order that others published"
    _, model, dense = named
    shape = dict(name="someone/model", model_type=model.config.model_type, layers=LAYERS, hidden=64)
    saved_both_ways(model, dense, by_hand(model=shape, layer=(1,)), tmp_path)
    wide = by_hand(model=shape | dict(hidden=4096), layer=(1,))
    with pytest.raises(ValueError, match="hidden 4096 there, 64 here"): save(dense, wide, tmp_path / "never")


@pytest.mark.parametrize("form,message", [
    ("gguf", "unknown form 'gguf'; choose plain, nemotron-nas, entrodrop"),
    ("plain", r"a plain llama cannot lack attention of layers \[1, 3\]")])
def test_forms_that_cannot_hold_the_plan_are_refused(llama, tmp_path, form, message):
    with pytest.raises(ValueError, match=message): save(llama, PLANS["attention"], tmp_path / "never", form=form)
    assert not list(tmp_path.iterdir())


def test_a_plain_form_holds_no_linear_maps(llama, tmp_path):
    with pytest.raises(ValueError, match=r"a plain llama cannot lack attention of layers \[2\] and MLP of layers \[\]"):
        save(llama, mapped(2), tmp_path / "never", form="plain")


def test_what_is_pruned_already_is_refused(llama_folder, tmp_path):
    with pytest.raises(ValueError, match="this model has blocks left out already; make a plan for the dense model"):
        save(llama_folder[0], by_hand(4, attention=(2,)), tmp_path / "never")


def test_windows_are_refused_by_the_form_that_has_none(windowed, tmp_path):
    with pytest.raises(ValueError, match="this model's is 8 tokens"):
        save(windowed, PLANS["attention"], tmp_path / "never")
    assert save(windowed, PLANS["attention"], tmp_path / "own", form="entrodrop").exists()
    assert save(windowed, PLANS["layer"], tmp_path / "plain").exists()


def test_a_map_in_the_place_of_the_first_attention_leaves_its_cache_slot_to_the_next(named, ids, tmp_path):
    "The slots are numbered anew when such a checkpoint is loaded, or the next token would believe it is the first"
    name, model, _ = named
    plan = mapped(0)
    with torch.inference_mode(), edited(model, plan):
        output = model(ids, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
        expected = step(model, token, cache_of(output)).logits
    save(model, plan, tmp_path / "mapped", form=form_for(name, plan))
    loaded = load_model(tmp_path / "mapped", device="cpu")
    with torch.inference_mode():
        torch.testing.assert_close(step(loaded, token, cache_of(loaded(ids, use_cache=True))).logits, expected)
