"""Asks llama.cpp, in a Python of its own: stdin {base, adapter, prompts, tokens, top} -> stdout, per prompt, its answers.

Or {base, adapter, texts} -> the tokens of each text.

An answer is, for each new token of a greedy continuation, [id, {id: log-probability} of the likeliest]. Needs xllamacpp
and nothing else.
"""

import json
import sys
import urllib.request

import xllamacpp


def main() -> None:
    asked = json.load(sys.stdin)
    params = xllamacpp.CommonParams()
    params.model.path = asked["base"]
    params.n_ctx, params.n_parallel, params.verbosity = 256, 1, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    params.warmup = False
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if asked["adapter"]:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(asked["adapter"], 1.0)]
    server = xllamacpp.Server(params)
    if "texts" in asked:
        json.dump([tokenize(server.listening_address, text) for text in asked["texts"]], sys.stdout)
        return
    answers = []
    for prompt in asked["prompts"]:
        request = {
            "prompt": prompt,
            "max_tokens": asked["tokens"],
            "logprobs": asked["top"],
            "temperature": 0,
            "cache_prompt": False,
        }
        content = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
        answers.append(
            [[step["id"], {each["id"]: each["logprob"] for each in step["top_logprobs"]}] for step in content]
        )
    json.dump(answers, sys.stdout)


def tokenize(address: str, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    request = urllib.request.Request(f"{address}/tokenize", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)["tokens"]


if __name__ == "__main__":
    main()
