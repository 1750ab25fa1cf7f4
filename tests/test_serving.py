"""Engines on real pruned checkpoints: equal greedy tokens, and a key-value cache that shrinks.

`make test-serving` installs the engines, each in an environment of its own, and runs these tests; elsewhere they are
skipped."""
import json
import os
import subprocess
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from entrodrop.benchmarks import sweep
from entrodrop.calibration import calibration_batch, load_text
from entrodrop.checkpoints import save
from entrodrop.gguf_files import LLAMA3, save_gguf
from entrodrop.healing import fit_linear
from entrodrop.speed import cache_of, engine, speed_ratios, step, time_runs
from entrodrop.surgery import NewWeights, Plan, edited

SERVING = Path(os.environ.get("ENTRODROP_SERVING", "nowhere"))
pytestmark = pytest.mark.skipif(not SERVING.is_dir(), reason="needs vLLM and llama.cpp: make test-serving")
HERE, NEW_TOKENS = Path(__file__).parent / "serving", 48
PROMPTS = ["The capital of France is", "Water boils at", "def fibonacci(n):", "Once upon a time",
           "The opposite of hot is", "Dear Sir or Madam,", "In 1969, people", "The three primary colours are"]
TEXTS = [*PROMPTS, "  two spaces\n\nand\ttabs", "naïve façade, 東京, 🙂", "12345 + 67 = 12412", "I'll say it's he'd",
         "<|im_start|>user\nhi<|im_end|>"]
CPU = dict(OMP_NUM_THREADS="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")


def by_hand(layers=30, **kinds):
    "A plan that drops these layers of each kind"
    return Plan.dropping([(kind, i) for kind, numbers in kinds.items() for i in numbers], layers)


PLANS = dict(dense=by_hand(), attention=by_hand(attention=(12, 20)), first=by_hand(attention=(0, 20)),
             mlp=by_hand(mlp=(12, 20)), layer=by_hand(layer=(12, 20)),
             mixed=by_hand(attention=(0, 12), mlp=(20,), layer=(25,)), linear=by_hand(attention=(0, 12, 20)),
             new_weights=by_hand(attention=(0, 20)))


def healed(name, model, tokenizer):
    "The plan of a name: with linear maps in the place of attention of two layers, with other norms in two, or as it is"
    plan = PLANS[name]
    ids = calibration_batch(tokenizer, load_text("pydoc"), 4, 128).ids
    if name == "linear": return plan | fit_linear(model, (0, 12), ids)
    if name != "new_weights": return plan
    norms = {i: model.model.layers[i].input_layernorm.weight.detach() for i in (0, 12)}
    edits = {("layer", i): NewWeights({"input_layernorm.weight": 1.1 * norm}) for i, norm in norms.items()}
    return plan | Plan(edits, 30)


@torch.inference_mode()
def greedy(model, ids):
    "Greedy continuation by the live model, through end-of-text tokens"
    out, tokens = model(torch.tensor([ids]), use_cache=True), []
    while True:
        tokens.append(out.logits[0, -1].argmax().item())
        if len(tokens) == NEW_TOKENS: return tokens
        out = step(model, torch.tensor([tokens[-1:]]), cache_of(out))


@pytest.fixture(scope="module", params=list(PLANS))
def served(request, embedded, tmp_path_factory):
    "Name, folder, token ids of the prompts and how the live pruned model continues them"
    model, tokenizer = embedded
    plan = healed(request.param, model, tokenizer)
    folder = save(model, plan, tmp_path_factory.mktemp("served") / request.param, tokenizer=tokenizer)
    ids = [tokenizer(p).input_ids for p in PROMPTS]
    with edited(model, plan, strict=False): return request.param, folder, ids, [greedy(model, i) for i in ids]


def ask(name, do="generate", **given):
    "Run an engine's script in its environment; its result, and what it said beside it"
    python = SERVING / ("vllm" if name == "vllm" else "llama") / "bin/python"
    if not python.exists(): pytest.skip(f"{python} is not there")
    asked = json.dumps(dict(new_tokens=NEW_TOKENS) | given)
    command = [python, HERE / f"{do}_{name}.py"]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, env=os.environ | CPU)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-1000:] + done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULT ")), done.stderr


CAPACITY = {}


def test_vllm_generates_the_same_tokens_and_its_cache_holds_more_of_them(served):
    name, folder, ids, expected = served
    if name == "linear": pytest.skip("vLLM has no linear maps in the place of attention")
    remote = json.loads((folder / "config.json").read_text())["model_type"] == "nemotron-nas"
    result, _ = ask("vllm", folder=str(folder), remote=remote, prompts=ids)
    assert result["tokens"] == expected
    CAPACITY[name] = result["capacity"]
    # the first attention stays, silenced
    kept = dict(dense=30, attention=28, first=29, mlp=30, layer=28, mixed=28, new_weights=29)[name]
    assert abs(result["capacity"] / CAPACITY["dense"] - 30 / kept) < .01, CAPACITY


def test_lm_eval_counts_the_same_items_right_through_vllm(served, tmp_path):
    name, folder, _, _ = served
    if name not in ("attention", "layer"): pytest.skip("two are enough")
    tasks = ["sciq:validation", "arc_easy:validation"]
    rows = sweep(str(folder), None, {}, tasks, tmp_path / "here", 8, label="pruned")
    result, _ = ask("vllm", "evaluate", folder=str(folder), tasks=tasks, limit=8, store=str(tmp_path / "there"))
    assert result == [[r.task, r.metric, r["items"]] for _, r in rows.iterrows()]


def test_vllm_needs_the_first_attention(served, tmp_path):
    "Why it is silenced and not left out"
    name, folder, ids, _ = served
    if name != "first": pytest.skip("once is enough")
    for path in folder.iterdir(): (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["block_configs"][0]["attention"] |= dict(no_op=True, n_heads_in_group=None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    first = ("model.layers.0.self_attn", "model.layers.0.input_layernorm")
    rest = {n: t for n, t in load_file(folder / "model.safetensors").items() if not n.startswith(first)}
    save_file(rest, tmp_path / "model.safetensors", metadata=dict(format="pt"))
    with pytest.raises(AssertionError, match="too many values to unpack"):
        ask("vllm", folder=str(tmp_path), remote=True, prompts=ids[:1])


def test_llama_cpp_generates_the_same_tokens_and_its_cache_shrinks(served, tmp_path):
    name, folder, ids, expected = served
    path = save_gguf(folder, tmp_path / "model.gguf", "float32")
    result, _ = ask("llama_cpp", path=str(path), prompts=ids)
    assert result["tokens"] == expected
    _, said = ask("llama_cpp", path=str(path), prompts=ids[:1], flash=True)
    lines = [line for line in said.splitlines() if "KV buffer size" in line]
    (size,) = {float(line.split("size =")[1].split()[0]) for line in lines}
    # here the first attention costs none
    kept = dict(dense=30, attention=28, first=28, mlp=30, layer=28, mixed=27, linear=27, new_weights=28)[name]
    assert abs(size - 256 * kept * 2 * 3 * 64 * 4 / 2**20) < .01


def test_llama_cpp_runs_quantised_files(served, tmp_path):
    name, folder, ids, expected = served
    if name not in ("attention", "mixed"): pytest.skip("two are enough")
    full, ours = (save_gguf(folder, tmp_path / f"{t}.gguf", t) for t in ("float32", "q8_0"))
    mine = ask("llama_cpp", path=str(ours), prompts=ids)[0]["tokens"]
    theirs = {}
    for kind in ("Q8_0", "Q4_K_M"):
        asked = dict(path=str(full), to=str(tmp_path / f"{kind}.gguf"), quantise=kind, prompts=ids)
        theirs[kind] = ask("llama_cpp", **asked)[0]["tokens"]
    assert mine == theirs["Q8_0"]  # the same weights as by llama.cpp's own quantisation
    found = theirs | dict(ours=mine)
    agree = {n: sum(a[0] == b[0] for a, b in zip(tokens, expected, strict=True)) for n, tokens in found.items()}
    assert agree["ours"] >= 5 and agree["Q4_K_M"] >= 3, agree  # of eight first tokens with the full precision
    assert os.path.getsize(tmp_path / "Q4_K_M.gguf") < os.path.getsize(ours) < .3 * os.path.getsize(full)


def sentencepiece():
    "An untrained tokenizer with the rules of SentencePiece, its special tokens and its alphabet"
    pieces = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    pieces.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                        decoders.Strip(" ", 1, 0)])
    return pieces, [f"<0x{byte:02X}>" for byte in range(256)], []


def bytewise(kind):
    "The same with the rules of a family of byte-level tokenizers"
    pieces = Tokenizer(models.BPE(ignore_merges=kind == "llama-3"))
    steps = {"llama-3": [pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
             "smollm": [pre_tokenizers.Digits(individual_digits=True),
                        pre_tokenizers.ByteLevel(add_prefix_space=False)]}
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Sequence(steps[kind]), decoders.ByteLevel()
    return pieces, [], pre_tokenizers.ByteLevel.alphabet()


def tokenizer_of(kind):
    "A tokenizer with the rules of a family, trained on a little text"
    lines = kind == "sentencepiece"
    pieces, bytes_, alphabet = sentencepiece() if lines else bytewise(kind)
    text = topics["for"].split("\n") if lines else [topics[name] for name in ("for", "class", "numbers")]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *bytes_],
                                  initial_alphabet=alphabet, show_progress=False)
    pieces.train_from_iterator(text, trainer)
    if lines:  # bytes are pieces, not added tokens
        described = json.loads(pieces.to_str())
        described["added_tokens"] = [a for a in described["added_tokens"] if a["id"] < 3]
        pieces = Tokenizer.from_str(json.dumps(described))
    return PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


STRETCHED = dict(rope_type="llama3", rope_theta=1e4, factor=8., low_freq_factor=1., high_freq_factor=4.,
                 original_max_position_embeddings=32)


@pytest.mark.parametrize("kind", ["sentencepiece", "llama-3", "smollm"])
def test_llama_cpp_splits_texts_in_the_same_way_and_knows_stretched_rotary_embeddings(kind, tmp_path):
    torch.manual_seed(0)
    tokenizer, rope = tokenizer_of(kind), dict(rope_parameters=STRETCHED) if kind == "llama-3" else {}
    model = LlamaForCausalLM(LlamaConfig(
        num_hidden_layers=4, hidden_size=64, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, max_position_embeddings=256, **rope)).eval()
    for p in model.parameters(): p.data.mul_(3)
    plan = by_hand(4, attention=(0, 2), mlp=(3,))
    path = save_gguf(save(model, plan, tmp_path / "saved", tokenizer=tokenizer), tmp_path / "model.gguf", "float32")
    ids = [tokenizer(t).input_ids for t in TEXTS[:8]]
    with edited(model, plan): expected = [greedy(model, i) for i in ids]
    texts = TEXTS if kind != "sentencepiece" else [t for t in TEXTS if "<|" not in t]
    result, _ = ask("llama_cpp", path=str(path), prompts=ids, texts=texts)
    assert result["texts"] == [tokenizer(t).input_ids for t in texts]
    assert result["tokens"] == expected


def test_engines_are_timed_by_the_same_call(served):
    name, folder, _, _ = served
    if name != "attention": pytest.skip("once is enough")
    os.environ.update(CPU)
    options = dict(dtype="float32", max_model_len=256, enforce_eager=True)
    runs = {n: engine(folder, "vllm", SERVING / "vllm/bin/python", **options) for n in ("dense", "again")}
    ratios = speed_ratios(time_runs(runs, [(1, 32), (2, 64)], 4, 3))
    assert len(ratios) == 8 and (ratios.ratio > 0).all() and (ratios.seconds > 0).all()
