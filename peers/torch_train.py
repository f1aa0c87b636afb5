"""Times a full-weight training step of transformers + PyTorch in bf16 (weights, gradients, AdamW) on a Llama of SmolLM2-135M's shape.

Usage: torch_train.py THREADS BATCHxLENGTH. Takes a step for every line on stdin and answers it with the step's seconds, until stdin ends.
"""

import sys
import time

import torch

from torch_speed import SHAPE, build

LEARNING_RATE = 1e-5


def main():
    """Trains on random tokens."""
    torch.set_num_threads(int(sys.argv[1]))
    batch, length = map(int, sys.argv[2].split("x"))
    model = build().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for _ in sys.stdin:
        ids = torch.randint(0, SHAPE["vocab_size"], (batch, length))
        start = time.perf_counter()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
