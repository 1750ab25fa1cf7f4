"""Greedy continuations of token ids by llama.cpp, what it makes of texts, and the bytes of its key-value cache. JSON
in, one line of JSON out"""
import ctypes
import json
import sys

import llama_cpp
from llama_cpp import Llama

given = json.load(sys.stdin)
if given.get("quantise"):
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + given["quantise"])
    failed = llama_cpp.llama_model_quantize(given["path"].encode(), given["to"].encode(), ctypes.byref(params))
    assert failed == 0
    given["path"] = given["to"]
model = Llama(given["path"], n_ctx=256, n_threads=2, flash_attn=given.get("flash", False), type_k=0, type_v=0,
              logits_all=False, verbose=True, seed=0)


def continued(ids):
    model.reset()
    if hasattr(model._ctx, "kv_cache_clear"): model._ctx.kv_cache_clear()
    out = []
    for token in model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
        out.append(token)
        if len(out) == given["new_tokens"]: return out


def split(text): return model.tokenize(text.encode(), add_bos=given.get("bos", False), special=True)


tokens = [continued(ids) for ids in given["prompts"]]
texts = [split(text) for text in given.get("texts", [])]
state = len(model.save_state().llama_state) if given.get("state") else None
print("RESULT " + json.dumps(dict(tokens=tokens, texts=texts, state=state)))
