"""Every supported architecture, as a tiny random model: the stream against a forward pass by hand, dropped blocks
against silent ones, caches, and what is saved."""
import copy
import functools
import operator
import re

import pytest
import torch
from conftest import DECODERS, LAYERS, make_decoder
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, OlmoConfig, OPTConfig
from transformers.cache_utils import Cache

from entrodrop.architectures import (
    ARCHITECTURES,
    PRUNED,
    Architecture,
    architecture,
    decoder_config,
    decoder_layers,
    fingerprint,
    readout,
    stream,
)
from entrodrop.dynamics import logit_lens, measure
from entrodrop.estimators import bucket_entropy
from entrodrop.models import describe_model, load_model
from entrodrop.surgery import Plan, drop, edited

each_target = pytest.mark.parametrize("target", ["attention", "mlp", "layer"])
close = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def ids():
    "Token ids `(2, 24)`, three windows long; none of them padding or an image"
    return torch.randint(2, 97, (2, 24), generator=torch.Generator().manual_seed(0))


def by_hand(target, gone, layers=LAYERS, model=None):
    "A plan that drops the blocks of one kind in these layers"
    return Plan.dropping([(target, i) for i in gone], layers, model)


def everything(model):
    "All that could change: modules, names and places of the weights, the config, cache slots"
    return ([(n, id(m)) for n, m in model.named_modules()], [(n, p.data_ptr()) for n, p in model.state_dict().items()],
            model.config.to_dict(), [(n, m.layer_idx) for n, m in model.named_modules() if hasattr(m, "layer_idx")])


@torch.inference_mode()
def logits(model, ids): return model(ids).logits


# Each architecture by hand: what attention and MLP of a layer add to the stream, and which layers see a window only

def contributions(attention, mlp):
    "Two functions of a layer and a state, of the names in it: modules joined by `>` are applied one after the other"
    def add_attention(layer, z, attend):
        for name in attention.split(">"):
            module = getattr(layer, name)
            z = attend(module, z) if name in ("self_attn", "attn", "attention") else module(z)
        return z
    def add_mlp(layer, z):
        for name in mlp.split(">"): z = torch.relu(z) if name == "relu" else getattr(layer, name)(z)
        return z
    return add_attention, add_mlp


LLAMA = contributions("input_layernorm>self_attn", "post_attention_layernorm>mlp")
GEMMA = contributions("input_layernorm>self_attn>post_attention_layernorm",
                      "pre_feedforward_layernorm>mlp>post_feedforward_layernorm")
NEOX = contributions("input_layernorm>attention", "post_attention_layernorm>mlp")
CONTRIBUTIONS = dict.fromkeys(DECODERS, LLAMA) | dict(
    gemma2=GEMMA, gemma3_text=GEMMA, gemma3=GEMMA, gpt_neox=NEOX, gpt_neox_in_turn=NEOX,
    olmo2=contributions("self_attn>post_attention_layernorm", "mlp>post_feedforward_layernorm"),
    gpt2=contributions("ln_1>attn", "ln_2>mlp"), phi=contributions("input_layernorm>self_attn", "input_layernorm>mlp"),
    opt=contributions("self_attn_layer_norm>self_attn", "final_layer_norm>fc1>relu>fc2"))
PARALLEL = {"gpt_neox", "phi"}
ALL = set(range(LAYERS))
WINDOWED = dict.fromkeys(["mistral", "phi3", "mixtral", "qwen3_moe"], ALL) | dict(
    qwen2={2, 3, 4}, qwen3={1, 2, 3, 4}, gemma2={0, 2, 4}, gemma3_text={0, 1, 3, 4}, gemma3={0, 2, 4})
MIXED = [n for n, layers in WINDOWED.items() if layers != ALL]


def parts(name, model):
    "Layers, positions `(tokens, hidden)` to add to embeddings, rotary function and final norm of a model"
    if name == "gpt2": return model.transformer.h, model.transformer.wpe.weight, None, model.transformer.ln_f
    if name == "opt":
        decoder = model.model.decoder
        return decoder.layers, decoder.embed_positions.weight[2:], None, decoder.final_layer_norm
    inner = model.gpt_neox if name.startswith("gpt_neox") else model.model
    if name == "gemma3": inner = inner.language_model
    names = ("norm", "final_layernorm", "final_layer_norm")
    norm = next(getattr(inner, n) for n in names if hasattr(inner, n))
    return inner.layers, None, inner.rotary_emb, norm


@torch.inference_mode()
def forward_by_hand(name, model, ids, silent=()):
    "All states of the stream and the logits, without the contributions in `silent`, pairs of target and layer"
    layers, positions, rotary, norm = parts(name, model)
    z, t = model.get_input_embeddings()(ids), torch.arange(ids.shape[1])
    if positions is not None: z = z + positions[:len(t)]
    attention, mlp = CONTRIBUTIONS[name]
    states = [z]
    for i, layer in enumerate(layers):
        windowed, given = i in WINDOWED.get(name, ()), {}
        seen = (t[:, None] >= t) & (t[:, None] - t < (8 if windowed else len(t)))
        given["attention_mask"] = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[None, None]
        kind = ["sliding_attention" if windowed else "full_attention"] if "gemma3" in name else []
        if rotary is not None: given["position_embeddings"] = rotary(z, t[None], *kind)
        def attend(block, x, given=given): return block(x, **given)[0]
        added = 0 * z if ("attention", i) in silent else attention(layer, z, attend)
        between = z + added
        z = between if ("mlp", i) in silent else between + mlp(layer, z if name in PARALLEL else between)
        states += [between, z]
    found = model.get_output_embeddings()(norm(z))
    return torch.stack(states), 5 * torch.tanh(found / 5) if name == "gemma2" else found


def states_and_logits(model, ids):
    seen = []
    with torch.inference_mode(), stream(model, lambda point, z: seen.append((point, z))): found = model(ids).logits
    assert [point for point, z in seen] == list(range(len(seen)))
    return torch.stack([z for point, z in seen]), found


def test_stream_is_that_of_a_forward_pass_by_hand(named, ids):
    name, model = named
    states, found = states_and_logits(model, ids)
    expected, by_hand_logits = forward_by_hand(name, model, ids)
    assert states.shape == (2 * LAYERS + 1, 2, 24, 64)
    assert (states[1:] - states[:-1]).abs().amax((1, 2, 3)).min() > .05
    torch.testing.assert_close(states, expected, **close)
    torch.testing.assert_close(found, by_hand_logits, **close)
    with torch.inference_mode(): torch.testing.assert_close(readout(model)(states[-1]), found)


def test_every_architecture_is_here():
    "But for our own form of a pruned Llama, which is in tests/test_checkpoints.py"
    assert {make().model_type for make in DECODERS.values()} == set(ARCHITECTURES) - {PRUNED}


# What a pruned model computes

def silent_pairs(target, gone): return {(t, i) for t in ("attention", "mlp") for i in gone if target in (t, "layer")}


@pytest.mark.parametrize("gone", [(0, 3), (1, 2, 4)], ids=str)
@each_target
def test_dropped_blocks_add_nothing(named, ids, target, gone):
    name, model = named
    expected, by_hand_logits = forward_by_hand(name, model, ids, silent_pairs(target, gone))
    assert not torch.allclose(by_hand_logits, logits(model, ids), rtol=.1)
    with edited(model, by_hand(target, gone)): states, found = states_and_logits(model, ids)
    torch.testing.assert_close(found, by_hand_logits, **close)
    if target != "layer":
        torch.testing.assert_close(states, expected, **close)
        point = 0 if target == "attention" else 1
        assert all(torch.equal(states[2 * i + point], states[2 * i + point + 1]) == (i in gone) for i in ALL)


def test_both_blocks_are_the_layer(named, ids):
    name, model = named
    layer, attention, mlp = (by_hand(kind, (0, 3)) for kind in ("layer", "attention", "mlp"))
    with edited(model, layer): expected = logits(model, ids)
    with edited(model, attention | mlp): assert torch.equal(logits(model, ids), expected)
    for outer, inner in ((attention, mlp), (mlp, attention)):
        with edited(model, outer), edited(model, inner): assert torch.equal(logits(model, ids), expected)


SERVES = dict.fromkeys(DECODERS, ("self_attn input_layernorm", "mlp post_attention_layernorm")) | dict.fromkeys(
    ("gemma2", "gemma3_text", "gemma3"), ("self_attn input_layernorm post_attention_layernorm",
                                          "mlp pre_feedforward_layernorm post_feedforward_layernorm")) | dict(
    phi=("self_attn", "mlp"), gpt2=("ln_1 attn", "ln_2 mlp"),
    olmo2=("self_attn post_attention_layernorm", "mlp post_feedforward_layernorm"),
    opt=("self_attn self_attn_layer_norm", "fc1 fc2 final_layer_norm"),
    gpt_neox=("attention input_layernorm", "mlp post_attention_layernorm"),
    gpt_neox_in_turn=("attention input_layernorm", "mlp post_attention_layernorm"))


@each_target
def test_nothing_but_what_serves_the_block_goes(named, target):
    "The weights that are gone are those under the dropped modules, norms included; Phi's one norm stays"
    name, model = named
    gone = {n for n, _ in model.named_parameters()}
    with edited(model, by_hand(target, (LAYERS - 1,))): gone -= {n for n, _ in model.named_parameters()}
    layer = {n.split(f".{LAYERS - 1}.")[1].split(".")[0] for n in gone}
    attention, mlp = ({*names.split()} for names in SERVES[name])
    shared = {"input_layernorm"} if name == "phi" else set()
    assert layer == dict(attention=attention, mlp=mlp, layer=attention | mlp | shared)[target]


# Caches

def silenced(name, model, gone):
    "A copy in which the last matrix of the attention of some layers, and its bias, are zero: it runs in full"
    model, of_last = copy.deepcopy(model), r"(self_attn|attn|attention)\.(o_proj|out_proj|c_proj|dense)\.(weight|bias)"
    for i in gone:
        last = [p for n, p in parts(name, model)[0][i].named_parameters() if re.fullmatch(of_last, n)]
        assert last
        for p in last: p.data.zero_()
    return model


def attention_sets(name):
    "Layer 0; layer 0 and a later one; all of one kind; all"
    kinds = [WINDOWED[name], ALL - WINDOWED[name]] if name in MIXED else []
    return [(0,), (0, 3), *(tuple(sorted(k)) for k in kinds), tuple(ALL)]


SETS = [pytest.param(name, gone, id=f"{name}-{''.join(map(str, gone))}")
        for name in DECODERS for gone in attention_sets(name)]
each_set = pytest.mark.parametrize("name, gone", SETS)
# with no attention nothing is cached that would tell a learned position
POSITIONED = [p for p in SETS if p.values[0] not in ("gpt2", "opt") or len(p.values[1]) < LAYERS]


@pytest.fixture(scope="module")
def decoders(): return {name: make_decoder(name) for name in DECODERS}


def check_generation(model, oracle, ids, **options):
    "Generate for a batch padded on the left; all its logits are those of the oracle for each text alone"
    prompts = [ids[0, :3], ids[1, :13]]
    batch = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left", padding_value=0)
    out = model.generate(batch, attention_mask=(batch != 0).long(), max_new_tokens=6, do_sample=False,
                         output_logits=True, return_dict_in_generate=True, **options)
    for text, prompt, found in zip(out.sequences, prompts, torch.stack(out.logits, 1), strict=True):
        alone = logits(oracle, text[None, 13 - len(prompt):])[0, len(prompt) - 1:-1]
        torch.testing.assert_close(found, alone, **close)


@each_set
def test_generation_from_a_padded_batch(decoders, ids, name, gone):
    model, oracle = decoders[name], silenced(name, decoders[name], gone)
    with edited(model, by_hand("attention", gone)):
        for options in (dict(use_cache=True), dict(use_cache=False), dict(cache_implementation="static")):
            check_generation(model, oracle, ids, **options)


@pytest.mark.parametrize("name, gone", POSITIONED)
def test_text_in_pieces(decoders, ids, name, gone):
    model, given = decoders[name], {}
    expected, found = logits(silenced(name, model, gone), ids), []
    with edited(model, by_hand("attention", gone)), torch.inference_mode():
        for piece in ids.split([5, 6, 1, 1, 11], 1):
            output = model(piece, use_cache=True, **given)
            given = {n: v for n, v in output.items() if isinstance(v, Cache)}
            found.append(output.logits)
    cache, = given.values()
    assert cache.get_seq_length() == (0 if len(gone) == LAYERS else 24)
    torch.testing.assert_close(torch.cat(found, 1), expected, **close)


@pytest.mark.parametrize("name, gone, kinds, slots", [
    ("gemma2", (0, 1), "wfwfw", [0, 1, 2]), ("gemma2", (0, 2, 4), "fffff", [0, 1]),
    ("gemma2", (1, 3), "wwwww", [0, 1, 2]), ("gemma2", (0, 1, 2, 3, 4), "wfwfw", []),
    ("qwen2", (0,), "ffwww", [0, 2, 3, 4]), ("qwen2", (0, 1), "wwwww", [0, 1, 2]),
    ("qwen2", (1, 2, 3), "ffwww", [0, 2]),
    ("gemma3_text", (0, 2), "wwwww", [0, 1, 2]), ("llama", (0, 2), None, [0, 1, 2]),
    ("mistral", (0, 1), None, [0, 1, 2])])
def test_kept_attention_fills_the_first_slots_of_its_kind(decoders, name, gone, kinds, slots):
    model = decoders[name]
    letters = dict(full_attention="f", sliding_attention="w")
    blocks = [layer.self_attn for layer in decoder_layers(model)]
    with edited(model, by_hand("attention", gone)):
        found = getattr(decoder_config(model), "layer_types", None)
        assert (None if found is None else "".join(letters[kind] for kind in found)) == kinds
        left = [block for i, block in enumerate(blocks) if i not in gone]
        assert [block.layer_idx for block in left] == slots


# Afterwards nothing has happened

@pytest.mark.parametrize("plans", [
    [("attention", (0, 3))], [("mlp", (0, 3))], [("layer", (0, 3))], [("attention", (0, 2, 4)), ("mlp", (1, 2))],
    [("mlp", (0,)), ("layer", (0, 2))], [("attention", (1, 3)), ("layer", (0, 1))]], ids=str)
def test_restored_bit_for_bit(named, ids, plans):
    "Plans one within the other, and all as one, compute what is left of a forward pass by hand, and leave nothing"
    name, model = named
    before, mark, dense = everything(model), fingerprint(model), logits(model, ids)
    weights = {n: p.clone() for n, p in model.state_dict().items()}
    plans, pairs = [by_hand(*given) for given in plans], [silent_pairs(*given) for given in plans]
    together = functools.reduce(operator.or_, plans)
    expected = forward_by_hand(name, model, ids, set().union(*pairs))[1]
    def inside(left):
        if not left: return logits(model, ids)
        outside = everything(model)
        with edited(model, left[0]):
            found = inside(left[1:])
            model.generate(ids[:, :3], max_new_tokens=2, do_sample=False)
        assert everything(model) == outside
        return found
    for given in (plans, [together]): torch.testing.assert_close(inside(given), expected, **close)
    assert everything(model) == before and fingerprint(model) == mark
    assert all(torch.equal(p, weights[n]) for n, p in model.state_dict().items())
    assert torch.equal(logits(model, ids), dense)


# Saved without layers

@pytest.mark.parametrize("gone", [(0, 3), (1,)], ids=str)
def test_model_without_layers_is_an_ordinary_model(named, ids, tmp_path, gone):
    name, model = named
    pruned = drop(copy.deepcopy(model), by_hand("layer", gone))
    pruned.save_pretrained(tmp_path)
    again = load_model(tmp_path, device="cpu")
    assert len(decoder_layers(again)) == decoder_config(again).num_hidden_layers == LAYERS - len(gone)
    found = logits(again, ids)
    assert torch.equal(found, logits(pruned, ids)) and not torch.allclose(found, logits(model, ids), rtol=.1)
    check_generation(again, pruned, ids)
    assert fingerprint(again) == fingerprint(pruned)


@pytest.mark.parametrize("target", ["attention", "mlp"])
def test_model_without_some_blocks_is_not_saved(named, tmp_path, target):
    name, model = named
    with edited(model, by_hand(target, (1,))):
        with pytest.raises(ValueError, match="checkpoints.save"): model.save_pretrained(tmp_path / "never")
    assert not (tmp_path / "never").exists()


# The rest of the library

def test_profile_lens_and_description(named, ids):
    name, model = named
    profile = measure(model, ids, dict(bucket=bucket_entropy), name=name)
    states, found = states_and_logits(model, ids)
    expected = torch.stack([bucket_entropy(z) for z in states])
    for block, (start, end) in dict(attention=(0, 1), mlp=(1, 2), layer=(0, 2)).items():
        increase = (expected[end::2][:LAYERS] - expected[start::2][:LAYERS]).double()
        torch.testing.assert_close(torch.tensor(profile.scores(block, "bucket")).T, increase, rtol=1e-3, atol=1e-3)
    lens = logit_lens(model, ids)
    assert (lens[lens.depth == LAYERS].agreement == 1).all() and len(lens) == 2 * (LAYERS + 1)
    described = describe_model(model, name)
    assert (described["layers"], described["hidden"], described["model_type"]) == (LAYERS, 64, model.config.model_type)


# What is refused, and how to add what is missing

@pytest.mark.parametrize("config, why", [
    (OPTConfig(do_layer_norm_before=False),
     "opt with do_layer_norm_before=False is not supported: the norms then act on the stream itself"),
    (OPTConfig(_remove_final_layer_norm=True), "opt with _remove_final_layer_norm=True is not supported: no norm"),
    (OPTConfig(hidden_size=64, word_embed_proj_dim=32),
     "opt with word_embed_proj_dim=32 is not supported: the vocabulary head then reads a projection"),
    (GPT2Config(add_cross_attention=True),
     "gpt2 with add_cross_attention=True is not supported: cross-attention is a third block"),
    (GPT2Config(scale_attn_by_inverse_layer_idx=True),
     "gpt2 with scale_attn_by_inverse_layer_idx=True is not supported: attention depends on the number")],
    ids=["norms after", "no last norm", "projected", "cross-attention", "numbered"])
def test_variant_that_the_table_does_not_describe(tmp_path, config, why):
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"reading this fails in another way")
    for refuse in (lambda: architecture(config), lambda: load_model(tmp_path)):
        with pytest.raises(ValueError, match=why): refuse()


def recipe(config):
    said = f"'{config.model_type}' is not supported; supported: gemma2, .*qwen3_moe. To add it, write its entry"
    with pytest.raises(ValueError, match=said) as e: architecture(config)
    return str(e.value).partition("\n\n")[2]


def test_recipe_of_the_error_is_llamas_entry(monkeypatch):
    lines = recipe(BloomConfig())
    monkeypatch.setitem(ARCHITECTURES, "bloom", None)
    exec(lines)
    assert architecture(BloomConfig()) == Architecture() == ARCHITECTURES["llama"]


def test_recipe_adds_an_architecture(monkeypatch, ids):
    "OLMo 1 has Llama's names"
    torch.manual_seed(0)
    config = OlmoConfig(num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=128, num_attention_heads=4,
                        vocab_size=100)
    model = AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters(): p.data.mul_(3)
    with pytest.raises(ValueError, match="'olmo' is not supported"), edited(model, by_hand("attention", (0, 3))): pass
    lines, oracle = recipe(model.config), silenced("olmo", model, (0, 3))
    monkeypatch.setitem(ARCHITECTURES, "olmo", None)
    exec(lines)
    with edited(model, by_hand("attention", (0, 3))): states, found = states_and_logits(model, ids)
    torch.testing.assert_close(found, logits(oracle, ids))
    assert len(states) == 2 * LAYERS + 1 and torch.equal(states[0], states[1]) and not torch.equal(states[2], states[3])
