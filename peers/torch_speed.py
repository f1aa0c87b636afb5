"""Times transformers + PyTorch in bf16 on a Llama of SmolLM2-135M's shape with random weights (speed does not depend on their values).

Usage: torch_speed.py THREADS. Reads lines `prefill N` and `decode DEPTH` from stdin, answers each with tokens per second on stdout.
A length that comes for the first time is run once before it is timed.
"""

import statistics
import sys
import time

import torch
import transformers

DECODE_STEPS = 32
SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "rope_theta": 100000.0, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}


def build():
    """The model, in bf16, with PyTorch's fused attention."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.to(torch.bfloat16).eval()


def prefill(model, ids, length):
    """Tokens per second of one pass over a prompt, with the logits of its last token; the cache it leaves."""
    start = time.perf_counter()
    cache = model(ids[:, :length], logits_to_keep=1, use_cache=True).past_key_values
    return length / (time.perf_counter() - start), cache


def decode(model, ids, depth):
    """Tokens per second of the median decode step at a depth."""
    _, cache = prefill(model, ids, depth)
    seconds = []
    for step in range(DECODE_STEPS):
        start = time.perf_counter()
        model(ids[:, step : step + 1], past_key_values=cache, use_cache=True)
        seconds.append(time.perf_counter() - start)
    return 1 / statistics.median(seconds)


def main():
    """Answers requests until stdin ends."""
    torch.set_num_threads(int(sys.argv[1]))
    model = build()
    ids = torch.randint(0, SHAPE["vocab_size"], (1, SHAPE["max_position_embeddings"]))
    with torch.no_grad():
        warm = set()
        for line in sys.stdin:
            what, length = line.split()[0], int(line.split()[1])
            if length not in warm:
                prefill(model, ids, length)
                warm.add(length)
            print(prefill(model, ids, length)[0] if what == "prefill" else decode(model, ids, length), flush=True)


if __name__ == "__main__":
    main()
