"Greedy continuations of token ids by vLLM, how many tokens its key-value cache holds. JSON in, one line of JSON out"
import json
import sys

from vllm import LLM, SamplingParams


def main():  # vLLM starts processes that import this file
    given = json.load(sys.stdin)
    model = LLM(given["folder"], trust_remote_code=given["remote"], dtype="float32", max_model_len=256,
                enforce_eager=True, seed=0)
    asked = SamplingParams(temperature=0, max_tokens=given["new_tokens"], ignore_eos=True)
    results = model.generate([dict(prompt_token_ids=ids) for ids in given["prompts"]], asked, use_tqdm=False)
    cache, tokens = model.llm_engine.vllm_config.cache_config, [list(r.outputs[0].token_ids) for r in results]
    print("RESULT " + json.dumps(dict(tokens=tokens, capacity=cache.num_gpu_blocks * cache.block_size)))


if __name__ == "__main__": main()
