"Pruned checkpoints: every architecture and kind of plan from memory and from disk, what generation asks of them, and what must never be written"
import copy, json, subprocess, sys
from dataclasses import replace
import pytest, torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from conftest import DECODERS, LAYERS, make_decoder
from test_architectures import by_hand, close
from entrodrop import checkpoints
from entrodrop.checkpoints import FORMS, choose_form, cut_of, model_card, save
from entrodrop.dynamics import measure
from entrodrop.gguf_files import save_gguf
from entrodrop.layerwise import safetensors_header
from entrodrop.models import PRUNED, fingerprint, load_model, load_tokenizer
from entrodrop.pruning import Plan, dropped, plan
from entrodrop.speed import _cache, _step

PLANS = dict(attention=[by_hand("attention", (1, 3))], first=[by_hand("attention", (0, 3))], mlp=[by_hand("mlp", (0, 2))], layer=[by_hand("layer", (0, 3))],
             mixed=[by_hand("attention", (1, 3)), by_hand("mlp", (3, 4))], layer_and_attention=[by_hand("attention", (1,)), by_hand("layer", (0,))],
             all_attention=[by_hand("attention", tuple(range(LAYERS)))])


def pruned(model, plans): return dropped(model, plans, strict=False)


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


def contents(folder):
    "Every file but the card, by name"
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "README.md"}


@pytest.mark.parametrize("plans", PLANS.values(), ids=list(PLANS))
def test_folder_says_what_the_live_model_says_from_memory_and_from_disk(named, plans, ids, tmp_path):
    name, model, dense = named
    form = "entrodrop" if name == "mistral" and {p.target for p in plans} != {"layer"} else None  # its window
    with pruned(model, plans): expected = logits(model, ids)
    before = fingerprint(model)
    memory, disk = (save(source, plans, tmp_path / label, form=form) for label, source in (("memory", model), ("disk", dense)))
    assert fingerprint(model) == before and torch.equal(logits(model, ids), logits(AutoModelForCausalLM.from_pretrained(dense), ids))
    assert contents(memory) == contents(disk)
    loaded = load_model(memory, device="cpu")
    assert torch.equal(logits(loaded, ids), expected)
    if all(p.target == "layer" for p in plans): assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(disk), ids), expected) and not list(disk.glob("*.py"))
    held = {n for path in disk.glob("*.safetensors") for n in safetensors_header(path)}
    assert len(held) == len(set(held)) and sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in model.parameters())
    with torch.inference_mode():
        text = dict(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert torch.equal(loaded.generate(**text), loaded.generate(**text, use_cache=False))


MAPPED = dict(attention=([by_hand("attention", (1, 3))], (1, 3)), first=([by_hand("attention", (0, 3))], (0,)), beside_no_mlp=([by_hand("attention", (1, 2)), by_hand("mlp", (1,)), by_hand("layer", (0,))], (1,)))

@pytest.mark.parametrize("plans,mapped", MAPPED.values(), ids=list(MAPPED))
def test_linear_maps_in_the_place_of_attention_are_saved_and_loaded(named, plans, mapped, ids, tmp_path):
    name, model, dense = named
    form = "entrodrop" if name == "mistral" else None  # its window
    maps = {i: torch.randn(64, 64, generator=torch.Generator().manual_seed(i)) / 16 for i in mapped}
    with dropped(model, plans, strict=False, maps=maps): expected = logits(model, ids)
    with dropped(model, plans, strict=False): assert not torch.equal(logits(model, ids), expected)
    before = fingerprint(model)
    memory, disk = (save(source, plans, tmp_path / label, form=form, maps=maps) for label, source in (("memory", model), ("disk", dense)))
    assert fingerprint(model) == before and contents(memory) == contents(disk)
    loaded = load_model(disk, device="cpu")
    assert torch.equal(logits(loaded, ids), expected)
    assert f"attention replaced by a linear map in layers: {', '.join(map(str, mapped))}" in (disk / "README.md").read_text()
    with torch.inference_mode():
        text = dict(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert torch.equal(loaded.generate(**text), loaded.generate(**text, use_cache=False))
    if form is None and name == "llama": assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(disk, trust_remote_code=True), ids), expected)


def test_maps_that_do_not_fit_are_refused_before_anything_is_written(llama, tmp_path):
    plan, square = by_hand("attention", (1,)), torch.zeros(64, 64)
    for maps, message in (({2: square}, "layers \\[2\\], whose attention no plan drops"), ({1: torch.zeros(64, 32)}, "must have shape \\(64, 64\\)")):
        with pytest.raises(ValueError, match=message): save(llama, plan, tmp_path / "never", maps=maps)
    with dropped(llama, plan, maps={1: square}), pytest.raises(ValueError, match="blocks dropped already"): save(llama, by_hand("attention", (2,)), tmp_path / "never")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    "A Llama that lacks its second attention and another layer's MLP, as a folder; the dense model, and the plans"
    model, plans = make_decoder("llama"), PLANS["mixed"]
    return save(model, plans, tmp_path_factory.mktemp("pruned") / "llama"), model, plans


@pytest.mark.parametrize("plans", [PLANS["mixed"], PLANS["first"], PLANS["all_attention"]], ids=["mixed", "first", "all"])
def test_generation_in_every_way_equals_the_live_model(plans, ids, tmp_path):
    model = make_decoder("llama")
    loaded, mask = load_model(save(model, plans, tmp_path / "saved"), device="cpu"), torch.ones_like(ids)
    mask[0, :7] = 0  # left padding of the first
    ways = [dict(), dict(use_cache=False), dict(cache_implementation="static"), dict(num_beams=3), dict(num_beams=2, use_cache=False)]
    with torch.inference_mode(), pruned(model, plans):
        text = dict(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
        results = [[m.generate(**text, **way).tolist() for m in (model, loaded)] for way in ways if not (plans is PLANS["all_attention"] and "cache_implementation" in way)]
    assert all(live == folder for live, folder in results)
    assert results[0] == results[1]
    alone = loaded.generate(ids[:1, 7:], max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert alone[0, -12:].tolist() == results[0][1][0][-12:]  # padding changes nothing


def test_continuing_in_chunks_equals_one_pass(llama_folder, ids):
    loaded = load_model(llama_folder[0], device="cpu")
    with torch.inference_mode():
        first = loaded(ids[:, :9], use_cache=True)
        second = _step(loaded, ids[:, 9:], _cache(first))
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), logits(loaded, ids), **close)


def test_saving_what_was_loaded_changes_nothing(llama_folder, ids, tmp_path):
    folder, _, _ = llama_folder
    loaded = load_model(folder, device="cpu")
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    old, new = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again"))
    assert {n: v for n, v in new.items() if n != "_name_or_path"} == {n: v for n, v in old.items() if n != "_name_or_path"}
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
    loaded = load_model(llama_folder[0], device="cpu")
    in_memory, on_disk = measure(loaded, ids, batch_size=2), measure(str(llama_folder[0]), ids, batch_size=2)
    assert (in_memory.table.score == on_disk.table.score).all()
    assert (in_memory.table[(in_memory.table.block == "attention") & (in_memory.table.layer == 1)].score.abs() < 1e-6).all()  # there is none


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
    done = subprocess.run([sys.executable, "-c", BARE, str(folder)], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert "refused:" in done.stdout and "loaded" not in done.stdout.split(), (done.stdout, done.stderr)


def test_config_of_the_nemotron_form_is_what_engines_read(llama_folder):
    config = json.loads((llama_folder[0] / "config.json").read_text())
    assert {n: config[n] for n in ("architectures", "model_type", "auto_map", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings")} == dict(
        architectures=["DeciLMForCausalLM"], model_type="nemotron-nas", num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
        auto_map=dict(AutoConfig="modeling_nemotron_nas.DeciLMConfig", AutoModelForCausalLM="modeling_nemotron_nas.DeciLMForCausalLM"))
    kept = dict(attention=dict(no_op=False, n_heads_in_group=2, replace_with_linear=False), ffn=dict(no_op=False, intermediate_size=128))  # 128 is no multiple of 256, so no ffn_mult
    assert config["block_configs"] == [kept, kept | dict(attention=dict(no_op=True, n_heads_in_group=None, replace_with_linear=False)), kept, kept | dict(ffn=dict(no_op=True, intermediate_size=None))]
    assert not {"sliding_window", "layer_types"} & set(config)
    source = (llama_folder[0] / "modeling_nemotron_nas.py").read_text()
    assert "entrodrop" not in source and "AUTOGENERATED" not in source and compile(source, "modeling", "exec")


def test_the_first_attention_is_silenced_and_said_so(ids, tmp_path):
    model = make_decoder("llama")
    folder = save(model, PLANS["first"], tmp_path / "saved")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert not file.get_tensor("model.layers.0.self_attn.o_proj.weight").any() and file.get_tensor("model.layers.0.self_attn.q_proj.weight").any()
        assert not [n for n in file.keys() if n.startswith("model.layers.3.self_attn")]
    assert "Attention of layer 0 is dropped by zeros" in (folder / "README.md").read_text()
    assert "key-value cache: 4 of 5 layers" in (folder / "README.md").read_text()


def test_rotary_embedding_head_size_and_biases_survive(ids, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=100, attention_bias=True, mlp_bias=True,
                         tie_word_embeddings=True, eos_token_id=None, pad_token_id=0, max_position_embeddings=512,
                         rope_parameters=dict(rope_type="llama3", rope_theta=5e5, factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=64))
    model = LlamaForCausalLM(config).eval()
    for p in model.parameters(): p.data.add_(torch.randn_like(p), alpha=.1)
    for label, plans in PLANS.items():
        with pruned(model, plans): expected = logits(model, ids)
        assert torch.equal(logits(load_model(save(model, plans, tmp_path / label), device="cpu"), ids), expected), label


def test_large_models_are_written_in_shards(named, ids, tmp_path):
    name, model, dense = named
    plans = PLANS["layer"]
    folder = save(dense, plans, tmp_path / "disk", max_shard_size=40_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3 and {p.name for p in files} == set(index["weight_map"].values())
    assert {n: p.name for p in files for n in safetensors_header(p)} == index["weight_map"]
    with pruned(model, plans): assert torch.equal(logits(load_model(folder, device="cpu"), ids), logits(model, ids))


def test_a_write_that_fails_leaves_nothing_behind(named, tmp_path, monkeypatch):
    _, model, dense = named
    def full(*args, **kwargs): raise OSError(28, "No space left on device")
    monkeypatch.setattr(checkpoints, "write_text", full)
    for source in (model, dense):
        with pytest.raises(OSError, match="No space left"): save(source, PLANS["layer"], tmp_path / "out" / "saved")
    assert not list((tmp_path / "out").iterdir())
    assert model.config.num_hidden_layers == LAYERS if hasattr(model.config, "num_hidden_layers") else True


def test_only_what_belongs_to_the_pruned_model_is_copied(word_folder, tmp_path):
    dense = tmp_path / "dense"
    load_model(word_folder, device="cpu").save_pretrained(dense)
    load_tokenizer(word_folder).save_pretrained(dense)
    for name in ("params.json", "consolidated.safetensors", "pytorch_model.bin", "training_args.bin", "optimizer.pt"): (dense / name).write_bytes(b"{}")
    (dense / "chat_template.jinja").write_text("{{ messages }}")
    folder = save(dense, by_hand("attention", (1,), layers=4), tmp_path / "saved")
    assert {p.name for p in folder.iterdir()} == {"README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "modeling_nemotron_nas.py", "plan.json", "tokenizer.json", "tokenizer_config.json"}
    assert load_tokenizer(folder)("the for loop").input_ids == load_tokenizer(word_folder)("the for loop").input_ids
    assert Plan.load(folder / "plan.json").drop == (1,)


def test_a_plan_for_other_weights_is_refused(llama, ids, tmp_path):
    llama.save_pretrained(tmp_path / "dense")
    other = copy.deepcopy(llama)
    for p in other.parameters(): p.data.mul_(1.1)
    other.save_pretrained(tmp_path / "other")
    for profile in (measure(llama, ids, name="m"), measure(str(tmp_path / "dense"), ids)):
        p = plan(profile, "attention", "cosine", 2)
        assert save(tmp_path / "dense", p, tmp_path / f"right-{len(list(tmp_path.iterdir()))}").exists()
        for source in (other, tmp_path / "other"):
            with pytest.raises(ValueError, match="made for other weights of the same shape"): save(source, p, tmp_path / "wrong")
        assert not (tmp_path / "wrong").exists()
    assert save(other, p, tmp_path / "forced", strict=False).exists()
    with pytest.raises(ValueError, match="layers 4 there, 5 here"): save(llama, by_hand("layer", (1,), layers=4), tmp_path / "wrong")


def test_from_a_gguf_file(word_folder, ids, tmp_path):
    model = load_model(word_folder, device="cpu")
    path, p = save_gguf(word_folder, tmp_path / "model.gguf", "float32"), by_hand("attention", (1, 2), layers=4)
    folder = save(path, p, tmp_path / "saved")
    with dropped(model, p): torch.testing.assert_close(logits(load_model(folder, device="cpu"), ids), logits(model, ids), **close)
    assert load_tokenizer(folder)("the for loop").input_ids == load_tokenizer(word_folder)("the for loop").input_ids


def test_the_card_tells_base_model_rows_and_loading():
    provenance = dict(model=dict(name="owner/Base-1B", model_type="llama", parameters=1000), text=dict(data="c4", samples=128, seed=2024))
    p = Plan("attention", "bucket", 1, (2, 1), (0.,) * 4, "released", (0, 3), None, 4, provenance)
    card = model_card([p], "nemotron-nas", "small", 900, [dict(task="piqa", metric="acc_norm", value=.71234, stderr=.01, n=100)])
    for part in ("base_model: owner/Base-1B", "attention dropped in layers: 2", "parameters: 900 of 1,000", "key-value cache: 3 of 4 layers", "data c4, samples 128, seed 2024",
                 "| piqa | acc_norm | 0.7123 | 0.0100 | 100 |", "vllm serve small --trust-remote-code", 'from_pretrained("small", trust_remote_code=True)'): assert part in card


def test_a_plan_that_knows_no_weights_is_checked_by_shape_alone(named, ids, tmp_path):
    "Such as an order that others published"
    name, model, dense = named
    shape = dict(name="someone/model", model_type=model.config.model_type, layers=LAYERS, hidden=64)
    plan = replace(by_hand("layer", (1,)), provenance=dict(model=shape))
    for label, source in (("memory", model), ("disk", dense)): save(source, plan, tmp_path / label)
    assert contents(tmp_path / "memory") == contents(tmp_path / "disk")
    with pytest.raises(ValueError, match="hidden 4096 there, 64 here"): save(dense, replace(plan, provenance=dict(model=shape | dict(hidden=4096))), tmp_path / "never")


@pytest.mark.parametrize("wrong,message", [(dict(form="gguf"), "unknown form 'gguf'; choose plain, nemotron-nas, entrodrop"), (dict(form="plain"), "a plain llama cannot lack attention of layers \\[1, 3\\]")])
def test_forms_that_cannot_hold_the_plan_are_refused(llama, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message): save(llama, PLANS["attention"], tmp_path / "never", **wrong)
    assert not list(tmp_path.iterdir())


def test_windows_are_refused_by_the_form_that_has_none(windowed, tmp_path):
    with pytest.raises(ValueError, match="this model's is 8 tokens"): save(windowed, PLANS["attention"], tmp_path / "never")
    assert save(windowed, PLANS["attention"], tmp_path / "own", form="entrodrop").exists() and save(windowed, PLANS["layer"], tmp_path / "plain").exists()
