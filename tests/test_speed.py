"""Running a checkpoint in vLLM, with a stand-in for the interpreter that has it: what it is asked to trust."""
import json

import pytest
from conftest import make_decoder
from test_architectures import by_hand

from entrodrop.checkpoints import MODELLING, only_our_code, save
from entrodrop.speed import engine

STAND_IN = """#!/usr/bin/env python3
import json, pathlib, sys
folder, trusted, options = json.loads(sys.argv[3])
pathlib.Path("{notes}").write_text(json.dumps([trusted, options, "trust_remote_code=trusted" in sys.argv[2]]))
print("READY", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def folder(tmp_path): return save(make_decoder("llama"), by_hand("attention", (1,)), tmp_path / "saved")


def trusted(folder, tmp_path, **options):
    "What vLLM is told of remote code"
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(notes=tmp_path / "notes"))
    python.chmod(0o755)
    engine(folder, "vllm", python, **options)
    value, given, used = json.loads((tmp_path / "notes").read_text())
    assert used and "trust_remote_code" not in given
    return value


def names_other_code(folder):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = "other.DeciLMForCausalLM"
    (folder / "config.json").write_text(json.dumps(config))


SPOILED = dict(
    byte=lambda f: (f / MODELLING).write_bytes((f / MODELLING).read_bytes() + b"#"),
    gone=lambda f: (f / MODELLING).unlink(),
    other_file=names_other_code,
    tokenizer=lambda f: (f / "tokenizer_config.json").write_text(json.dumps(dict(auto_map=dict(AutoTokenizer=["tokenization_x.X", None])))),
    elsewhere=lambda f: (f / "processor_config.json").write_text(json.dumps(dict(auto_map=dict(AutoProcessor="somebody/repo--modeling_nemotron_nas.X")))))


def test_a_checkpoint_as_it_was_saved_is_trusted(folder, tmp_path):
    assert only_our_code(folder) and trusted(folder, tmp_path) is True


@pytest.mark.parametrize("how", SPOILED)
def test_changed_or_foreign_code_is_not_trusted_unless_asked(folder, tmp_path, how):
    SPOILED[how](folder)
    assert not only_our_code(folder) and trusted(folder, tmp_path) is False
    assert trusted(folder, tmp_path, trust_remote_code=True) is True


def test_a_checkpoint_that_names_no_code_needs_no_trust(tmp_path):
    plain = save(make_decoder("llama"), by_hand("layer", (1,)), tmp_path / "plain")
    assert trusted(plain, tmp_path) is False
