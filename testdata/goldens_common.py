"""What every golden maker shares: seeds, saving, digests, versions."""

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "gguf", "sentencepiece", "accelerate")


def generator(seed: int) -> torch.Generator:
    """A seeded CPU generator; every draw names its own."""
    return torch.Generator().manual_seed(seed)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes floating tensors as f32, others as i32, in one safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    out = {}
    for name, tensor in tensors.items():
        dtype = torch.float32 if tensor.is_floating_point() else torch.int32
        out[name] = tensor.detach().to(dtype).contiguous().clone()
    save_file(out, str(path))
    path.chmod(0o644)


def save_json(path: Path, value) -> None:
    """Writes indented JSON with a final newline; lists of plain numbers stay on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_render(value, 0) + "\n", encoding="utf-8")


def _render(value, depth: int) -> str:
    pad, inner = "  " * depth, "  " * (depth + 1)
    if isinstance(value, dict) and value:
        body = ",\n".join(f"{inner}{json.dumps(k)}: {_render(v, depth + 1)}" for k, v in value.items())
        return "{\n" + body + "\n" + pad + "}"
    if isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value):
        return "[\n" + ",\n".join(inner + _render(v, depth + 1) for v in value) + "\n" + pad + "]"
    return json.dumps(value, ensure_ascii=False)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}}
