"""Engines on real pruned checkpoints: equal greedy tokens, and a key-value cache that shrinks.

`make test-serving` installs the engines, each in an environment of its own, and runs these tests; elsewhere they are skipped."""
import json, os, subprocess
from pathlib import Path
import pytest, torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from pydoc_data.topics import topics

from test_architectures import by_hand
from entrodrop.benchmarks import sweep
from entrodrop.calibration import calibration_batch, load_text
from entrodrop.checkpoints import save
from entrodrop.gguf_files import LLAMA3, save_gguf
from entrodrop.pruning import dropped
from entrodrop.search import fit_linear
from entrodrop.speed import engine, speed_ratios, time_runs

SERVING = Path(os.environ.get("ENTRODROP_SERVING", "nowhere"))
pytestmark = pytest.mark.skipif(not SERVING.is_dir(), reason="needs vLLM and llama.cpp: make test-serving")
HERE, NEW_TOKENS = Path(__file__).parent / "serving", 48
PROMPTS = ["The capital of France is", "Water boils at", "def fibonacci(n):", "Once upon a time", "The opposite of hot is", "Dear Sir or Madam,", "In 1969, people", "The three primary colours are"]
TEXTS = [*PROMPTS, "  two spaces\n\nand\ttabs", "naïve façade, 東京, 🙂", "12345 + 67 = 12412", "I'll say it's he'd", "<|im_start|>user\nhi<|im_end|>"]
BLOCKS = dict(dense=[by_hand("attention", (), layers=30)], attention=[by_hand("attention", (12, 20), layers=30)], first=[by_hand("attention", (0, 20), layers=30)], mlp=[by_hand("mlp", (12, 20), layers=30)],
              layer=[by_hand("layer", (12, 20), layers=30)], mixed=[by_hand("attention", (0, 12), layers=30), by_hand("mlp", (20,), layers=30), by_hand("layer", (25,), layers=30)],
              linear=[by_hand("attention", (0, 12, 20), layers=30)])
MAPPED = dict(linear=(0, 12))  # linear maps in the place of these
CPU = dict(OMP_NUM_THREADS="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")


@torch.inference_mode()
def greedy(model, ids):
    "Greedy continuation by the live model, through end-of-text tokens"
    out, tokens = model(torch.tensor([ids]), use_cache=True), []
    while True:
        tokens.append(out.logits[0, -1].argmax().item())
        if len(tokens) == NEW_TOKENS: return tokens
        out = model(torch.tensor([tokens[-1:]]), use_cache=True, cache=out.cache)


@pytest.fixture(scope="module", params=list(BLOCKS))
def served(request, embedded, tmp_path_factory):
    "Name, folder, token ids of the prompts and how the live pruned model continues them"
    (model, tokenizer), plans = embedded, BLOCKS[request.param]
    maps = fit_linear(model, MAPPED.get(request.param, ()), calibration_batch(tokenizer, load_text("pydoc"), 4, 128).ids)
    folder = save(model, plans, tmp_path_factory.mktemp("served") / request.param, tokenizer=tokenizer, maps=maps)
    ids = [tokenizer(p).input_ids for p in PROMPTS]
    with dropped(model, plans, strict=False, maps=maps):
        return request.param, folder, ids, [greedy(model, i) for i in ids]


def ask(name, do="generate", **given):
    "Run an engine's script in its environment; its result, and what it said beside it"
    python = SERVING / ("vllm" if name == "vllm" else "llama") / "bin/python"
    if not python.exists(): pytest.skip(f"{python} is not there")
    done = subprocess.run([python, HERE / f"{do}_{name}.py"], input=json.dumps(dict(new_tokens=NEW_TOKENS) | given), capture_output=True, text=True, env=os.environ | CPU)
    lines = [l for l in done.stdout.splitlines() if l.startswith("RESULT ")]
    assert lines, done.stdout[-1000:] + done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULT ")), done.stderr


CAPACITY = {}


def test_vllm_generates_the_same_tokens_and_its_cache_holds_more_of_them(served):
    name, folder, ids, expected = served
    if name == "linear": pytest.skip("vLLM has no linear maps in the place of attention")
    result, _ = ask("vllm", folder=str(folder), remote=json.loads((folder / "config.json").read_text())["model_type"] == "nemotron-nas", prompts=ids)
    assert result["tokens"] == expected
    CAPACITY[name] = result["capacity"]
    kept = dict(dense=30, attention=28, first=29, mlp=30, layer=28, mixed=28)[name]  # the first attention stays, silenced
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
    from safetensors.torch import load_file, save_file
    for path in folder.iterdir(): (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["block_configs"][0]["attention"] |= dict(no_op=True, n_heads_in_group=None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({n: t for n, t in load_file(folder / "model.safetensors").items() if not n.startswith(("model.layers.0.self_attn", "model.layers.0.input_layernorm"))}, tmp_path / "model.safetensors", metadata=dict(format="pt"))
    with pytest.raises(AssertionError, match="too many values to unpack"): ask("vllm", folder=str(tmp_path), remote=True, prompts=ids[:1])


def test_llama_cpp_generates_the_same_tokens_and_its_cache_shrinks(served, tmp_path):
    name, folder, ids, expected = served
    path = save_gguf(folder, tmp_path / "model.gguf", "float32")
    result, _ = ask("llama_cpp", path=str(path), prompts=ids)
    assert result["tokens"] == expected
    _, said = ask("llama_cpp", path=str(path), prompts=ids[:1], flash=True)
    (size,) = {float(l.split("size =")[1].split()[0]) for l in said.splitlines() if "KV buffer size" in l}
    kept = dict(dense=30, attention=28, first=28, mlp=30, layer=28, mixed=27, linear=27)[name]  # here the first attention costs none
    assert abs(size - 256 * kept * 2 * 3 * 64 * 4 / 2**20) < .01


def test_llama_cpp_runs_quantised_files(served, embedded, tmp_path):
    name, folder, ids, expected = served
    if name not in ("attention", "mixed"): pytest.skip("two are enough")
    full, ours = (save_gguf(folder, tmp_path / f"{t}.gguf", t) for t in ("float32", "q8_0"))
    mine = ask("llama_cpp", path=str(ours), prompts=ids)[0]["tokens"]
    theirs = {q: ask("llama_cpp", path=str(full), to=str(tmp_path / f"{q}.gguf"), quantise=q, prompts=ids)[0]["tokens"] for q in ("Q8_0", "Q4_K_M")}
    assert mine == theirs["Q8_0"]  # the same weights as by llama.cpp's own quantisation
    agree = {n: sum(a[0] == b[0] for a, b in zip(tokens, expected)) for n, tokens in (theirs | dict(ours=mine)).items()}
    assert agree["ours"] >= 5 and agree["Q4_K_M"] >= 3, agree  # of eight first tokens with the full precision
    assert os.path.getsize(tmp_path / "Q4_K_M.gguf") < os.path.getsize(ours) < .3 * os.path.getsize(full)


def tokenizer_of(kind):
    "A tokenizer with the rules of a family, trained on a little text"
    special = ["<unk>", "<s>", "</s>"]
    if kind == "sentencepiece":
        t = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        special, alphabet = [*special, *(f"<0x{b:02X}>" for b in range(256))], []
    else:
        t = Tokenizer(models.BPE(ignore_merges=kind == "llama-3"))
        steps = {"llama-3": [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
                 "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]}
        t.pre_tokenizer, t.decoder, alphabet = pre_tokenizers.Sequence(steps[kind]), decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator([topics[k] for k in ("for", "class", "numbers")] if kind != "sentencepiece" else topics["for"].split("\n"),
                          trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    if kind == "sentencepiece":  # bytes are pieces, not added tokens
        described = json.loads(t.to_str())
        described["added_tokens"] = [a for a in described["added_tokens"] if a["id"] < 3]
        t = Tokenizer.from_str(json.dumps(described))
    return PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["sentencepiece", "llama-3", "smollm"])
def test_llama_cpp_splits_texts_in_the_same_way_and_knows_stretched_rotary_embeddings(kind, tmp_path):
    torch.manual_seed(0)
    tokenizer = tokenizer_of(kind)
    rope = dict(rope_type="llama3", rope_theta=1e4, factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=32) if kind == "llama-3" else None
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, hidden_size=64, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2,
                                         max_position_embeddings=256, **(dict(rope_parameters=rope) if rope else {}))).eval()
    for p in model.parameters(): p.data.mul_(3)
    plans = [by_hand("attention", (0, 2), layers=4), by_hand("mlp", (3,), layers=4)]
    path = save_gguf(save(model, plans, tmp_path / "saved", tokenizer=tokenizer), tmp_path / "model.gguf", "float32")
    ids = [tokenizer(t).input_ids for t in TEXTS[:8]]
    with dropped(model, plans[0], strict=False), dropped(model, plans[1], strict=False): expected = [greedy(model, i) for i in ids]
    texts = TEXTS if kind != "sentencepiece" else [t for t in TEXTS if "<|" not in t]
    result, _ = ask("llama_cpp", path=str(path), prompts=ids, texts=texts)
    assert result["texts"] == [tokenizer(t).input_ids for t in texts]
    assert result["tokens"] == expected


def test_engines_are_timed_by_the_same_call(served):
    name, folder, _, _ = served
    if name != "attention": pytest.skip("once is enough")
    os.environ.update(CPU)
    runs = {n: engine(folder, "vllm", SERVING / "vllm/bin/python", dtype="float32", max_model_len=256, enforce_eager=True) for n in ("dense", "again")}
    ratios = speed_ratios(time_runs(runs, [(1, 32), (2, 64)], 4, 3))
    assert len(ratios) == 8 and (ratios.ratio > 0).all() and (ratios.seconds > 0).all()
