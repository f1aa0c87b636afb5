"""Quality of each weight type on held-out text, against the same model in exact f32."""

from common import call_json
from install import MODEL
from runs import FITS

# The perplexity ratio may differ from 1 by this much; other types are reported only.
PERPLEXITY_TARGETS = {"bf16": 0.003, "q8_0": 0.003}
TYPES = ("bf16", "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0")
TEXT = ("--data", "english-small", "--context", "1024")


# Tokens that the model reads together: as prompts are read, and (up to 4 take the same arithmetic) as text is generated.
PATHS = {"prompts": 512, "decoding": 4}


def measure(tools, kind, tokens):
    """Perplexity of one type on both paths; beside a base, KL to its exact f32 logits and agreement of the best tokens."""
    if kind == "f32":
        return judge(tools, kind, tokens, PATHS["prompts"])
    return {path: judge(tools, kind, tokens, chunk) for path, chunk in PATHS.items()}


def judge(tools, kind, tokens, chunk):
    """One type read `chunk` tokens at a time."""
    base = [] if kind == "f32" else ["--base", MODEL]
    cache = "f32" if kind == "f32" else "f16"
    command = ["eval", "ppl" if kind == "f32" else "kl", "--model", MODEL, *base, *TEXT, "--max-tokens", str(tokens)]
    options = ["--weights", kind, "--kv-type", cache, "--chunk", str(chunk), "--json"]
    shown = call_json(tools.ours(*command, *options), FITS)
    return shown["overall"]


def verdict(kind, ratio):
    """Target and result of a type's perplexity ratio."""
    if kind not in PERPLEXITY_TARGETS:
        return "–", ""
    allowed = PERPLEXITY_TARGETS[kind]
    return f"within {allowed:.1%}".replace("%", " %"), "met" if abs(ratio - 1) <= allowed else "**missed**"


def table(section):
    """Markdown of what was measured."""
    taken = section["types"]
    if "f32" not in taken or len(taken) < 2:
        return []
    exact = taken["f32"]["ppl"]
    head = "| weights | path | KL to f32, nats per token | top-1 agreement | perplexity | ratio to f32 | target | result |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for kind in (k for k in TYPES if k in taken):
        for path, own in taken[kind].items():
            ratio = own["ppl"] / exact
            target, result = verdict(kind, ratio)
            agree = f"{100 * own['top1_agreement']:.1f} %"
            lines.append(f"| {kind} | {path} | {own['kl']:.5f} | {agree} | {own['ppl']:.3f} | {ratio:.4f} | {target} | {result} |")
    note = f"Exact f32: perplexity {exact:.3f} over {taken['f32']['tokens']:,} scored tokens (geometric mean of the files)."
    return [*lines, "", note]
