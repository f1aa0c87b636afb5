"""Ten optimiser steps of the tiny llama3 model: the losses every trainer has to reproduce."""

from pathlib import Path

import torch
import torch.nn.functional as F

import goldens_models
from goldens_common import generator, save_json, save_tensors

MODEL, STEPS, SEQUENCES, TOKENS = "llama3", 10, 2, 17
ADAMW = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
CLIP = 1.0


def make(root: Path) -> None:
    model = goldens_models.load(root / "crates/model/tests/data" / MODEL)
    vocab = model.config.vocab_size
    batches = torch.randint(0, vocab, (STEPS, SEQUENCES, TOKENS), generator=generator(500))
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    losses, norms = [], []
    for batch in batches:
        logits = model(batch).logits
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, vocab), batch[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        losses.append(loss.item())
    assert min(norms) > CLIP, "clipping should be active in every step"
    with torch.no_grad():
        final = model(batches[0]).logits
    data = root / "crates/train/tests/data"
    save_json(data / "ten_steps.json", {
        "model": f"crates/model/tests/data/{MODEL}", "optimizer": {"name": "adamw", **ADAMW, "betas": list(ADAMW["betas"])},
        "decayed": "every parameter", "clip_global_norm": CLIP, "tokens": batches.tolist(), "losses": losses,
        "gradient_norms": norms,
    })
    save_tensors(data / "ten_steps.safetensors", {"final_logits": final})
    print("ten steps:", " ".join(f"{loss:.4f}" for loss in losses))
