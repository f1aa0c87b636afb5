"""Quantised blocks: bytes that gguf makes of f32 values, and values that it makes of bytes.

`values` are quantised into `<type>.bytes`; K types, which gguf only reads, have random bytes. `<type>.values` is the result."""

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Q
from goldens_common import save_tensors

SEED = 20_240_602
QUANTISED = [Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1]
# Where the f16 scales lie in a block of the formats gguf cannot quantise to.
SCALES = {Q.Q4_K: [0, 2], Q.Q5_K: [0, 2], Q.Q6_K: [208]}


def values() -> np.ndarray:
    """Weights of several sizes, with blocks of one sign, constants, zeros and an outlier."""
    rng = np.random.default_rng(SEED)
    rows = rng.normal(0, 1, (24, 32)) * 10.0 ** rng.integers(-2, 3, (24, 1))
    rows[3] = np.abs(rows[3])
    rows[5] = -np.abs(rows[5]) - 1
    rows[7] = 0
    rows[9] = 0.75
    rows[11] = -0.75
    rows[13, 17] = 300
    return rows.astype(np.float32)


def make(root: Path) -> None:
    rng = np.random.default_rng(SEED + 1)
    out = {"values": torch.from_numpy(values())}
    for kind in [*QUANTISED, *SCALES]:
        if kind in SCALES:
            data = rng.integers(0, 256, (2, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
            for at in SCALES[kind]:
                data[:, at : at + 2] = rng.normal(0, 0.01, 2).astype(np.float16)[:, None].view(np.uint8)
        else:
            data = gguf.quants.quantize(values(), kind)
        out[f"{kind.name}.bytes"] = torch.from_numpy(data.astype(np.int32))
        out[f"{kind.name}.values"] = torch.from_numpy(gguf.quants.dequantize(data, kind).astype(np.float32))
    save_tensors(root / "crates/kernels/tests/data/quants.safetensors", out)
