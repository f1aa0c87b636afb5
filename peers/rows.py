"""The table of speed and memory: what is compared with what, the targets, and the figures from the rounds."""

import statistics
from dataclasses import dataclass

from common import call_json
from runs import DEEP, FITS

KINDS = ("q4_1", "q8_0", "bf16")


@dataclass(frozen=True)
class Row:
    """One figure: the best of `ours` over the best of `peer` (or `ours` alone), times `scale`.

    Both are metrics of runs, `RUN:METRIC`. `form` says how the figure reads and which way is better. Where a run took the ratio itself, step by
    step, `ratio` is that metric, and the sides are shown beside it."""

    name: str
    title: str
    ours: tuple
    peer: tuple
    target: float | None
    form: str = "times"
    unit: str = "tok/s"
    scale: str = ""
    ratio: str = ""


def decode_rows():
    """Decoding against llama.cpp, the bandwidth bound and PyTorch."""
    rows = []
    for kind, share in (("q4_1", 0.55), ("q8_0", 0.70), ("bf16", 0.70)):
        own = (f"ours/base/{kind}/512:decode",)
        title = f"decode, base, {kind}, depth 512"
        rows.append(Row(f"decode/base/512/{kind}", f"{title} / llama.cpp {kind}", own, (f"llama/decode/{kind}/512:speed",), 2.0))
        bound = f"{title}, share of the bandwidth bound"
        rows.append(Row(f"bandwidth/512/{kind}", bound, own, ("doctor:memory",), share, "share", scale=kind))
    own = ("ours/base/bf16/512:decode",)
    rows.append(Row("decode/base/512/torch", "decode, base, bf16, depth 512 / PyTorch bf16", own, ("torch/decode/512:speed",), None))
    for model, target in (("base", 3.0), ("0.75", 4.5), ("0.9", 5.5)):
        for kind in ("q4_1", "q8_0"):
            title = f"decode, {label(model)}, {kind}, depth 7900 / llama.cpp base {kind}"
            own = (f"ours/{model}/{kind}/7900:decode",)
            rows.append(Row(f"decode/{model}/7900/{kind}", title, own, (f"llama/decode/{kind}/7900:speed",), target))
    title = f"decode, {label('0.9')}, q8_0, depth 32,000 / llama.cpp base q8_0"
    rows.append(Row("deep", title, (f"ours/0.9/q8_0/{DEEP}:decode",), (f"llama/decode/q8_0/{DEEP}:speed",), 10.0))
    return rows


def prefill_rows():
    """Prompt processing against llama.cpp, PyTorch and the GEMM peak."""
    rows = []
    for depth in (512, 2048):
        title = f"prefill, base, {depth:,} tokens"
        own = tuple(f"ours/base/{kind}/{depth}:prefill" for kind in KINDS)
        llama = tuple(f"llama/prefill/{kind}/{depth}:speed" for kind in KINDS)
        rows.append(Row(f"prefill/base/{depth}/llama", f"{title}, best type / llama.cpp's best type", own, llama, 6.0))
        rows.append(prefill_torch("base", depth, 1.5))
    rows += [prefill_torch("base", 7900, 1.5), prefill_torch("0.9", 7900, 2.5)]
    own = ("ours/base/bf16/2048:prefill",)
    title = "prefill arithmetic, base, bf16, 2,048 tokens, share of the bf16 GEMM peak"
    rows.append(Row("arithmetic/2048", title, own, ("doctor:bf16",), 0.60, "share", scale="flops"))
    return rows


def prefill_torch(model, depth, target):
    """Prefill in bf16 against PyTorch's base."""
    title = f"prefill, {label(model)}, bf16, {depth:,} tokens / PyTorch base bf16"
    own = (f"ours/{model}/bf16/{depth}:prefill",)
    return Row(f"prefill/{model}/{depth}/torch", title, own, (f"torch/prefill/{depth}:speed",), target)


def memory_rows():
    """Cache size, start-up, peak memory."""
    cache = [(f"ours/{model}/q8_0/8192:cache",) for model in ("0.9", "base")]
    rows = [Row("cache/8192", f"cache at 8,192 tokens, {label('0.9')} / base (f16)", *cache, 0.13, "at-most-share", "bytes")]
    title = "q4_1: start of the process to the first token of a short prompt"
    rows.append(Row("first-token", title, ("first-token/q4_1:seconds",), (), 0.5, "at-most-seconds", "s"))
    for kind in ("q4_1", "q8_0"):
        sides = [(f"memory/{side}/{kind}:mib",) for side in ("ours", "llama")]
        title = f"peak memory, base, {kind}, generating after 8,000 tokens / llama.cpp {kind}"
        rows.append(Row(f"memory/{kind}", title, *sides, 1.0, "at-most-share", "MiB"))
    return rows


def train_rows():
    """Training steps against PyTorch's full-weight step on the same batch."""
    early = "every weight, moments in bf16, updates in the backward pass"
    steps = {
        "full": "every weight", "full-bf16": "every weight, moments in bf16", "full-in-backward": early,
        "full-half": f"{early}, 14 of 30 layers checkpointed", "full-lean": f"{early}, all layers checkpointed",
        "align": "heads of all groups (align)", "align-frozen": "heads of all groups, copied projections frozen (align)",
        "align-mamba2": "Mamba-2 heads beside a window of 64 of all groups (align)",
        "distill": "new heads of β 0.75 (distill)",
    }
    targets = {
        ("full", "2x512"): 2.0, ("full", "1x2048"): 2.0, ("full-bf16", "2x512"): 2.0, ("full-in-backward", "2x512"): 2.0,
        ("full-in-backward", "1x2048"): 2.0, ("full-half", "1x2048"): 2.0, ("full-lean", "2x512"): None, ("full-lean", "1x2048"): None,
        ("align", "2x512"): 4.0, ("align", "1x2048"): None, ("align-frozen", "2x512"): 4.0, ("align-mamba2", "2x512"): 4.0,
        ("distill", "2x512"): 1.5, ("distill", "1x2048"): None,
    }
    rows = []
    for (step, shape), target in targets.items():
        title = f"training step, {steps[step]}, {shape.replace('x', ' × ')} / PyTorch's step of every weight"
        run = f"train/{step}/{shape}"
        rows.append(Row(run, title, (f"{run}:ours",), (f"{run}:torch",), target, ratio=f"{run}:ratio"))
    for step, shape in targets:
        if step.startswith("full"):
            run = f"train/{step}/{shape}"
            title = f"peak memory of training {steps[step]}, {shape.replace('x', ' × ')} / PyTorch"
            name = f"train/memory/{step}/{shape}"
            rows.append(Row(name, title, (f"{run}:ours-mib",), (f"{run}:torch-mib",), 0.5, "at-most-share", "MiB"))
    return rows


def label(model):
    """`base`, or a hybrid by its share of converted groups."""
    return model if model == "base" else f"hybrid {model}"


def all_rows():
    """Every row, in the table's order."""
    return decode_rows() + prefill_rows() + memory_rows() + train_rows()


def runs_of(rows):
    """The runs that some rows need, each once; a row's own stand side by side."""
    return list(dict.fromkeys(metric.rsplit(":", 1)[0] for row in rows for metric in row.ours + row.peer))


def repeats(run, rounds, deep_rounds):
    """How many rounds a run takes part in: sizes do not vary, and the deepest prefill takes many minutes."""
    if run.startswith("memory/") or run.endswith("/8192"):
        return 1
    return deep_rounds if run.endswith(f"/{DEEP}") else rounds


def scales(tools):
    """Constants of the shares: GB of weights read per token by type, and GFLOP per token of a 2,048-token prefill."""
    result = {}
    for kind in (kind for kind in KINDS if tools.file("base", kind).exists()):
        model = call_json([tools.binary, "inspect", tools.file("base", kind), "--json"], FITS)
        result[kind] = sum(entry["bytes"] for entry in model["dtypes"]) / 1e9
        result["flops"] = flops_per_token(model["config"], 2048) / 1e9
    return result


def flops_per_token(config, length):
    """2 per matrix parameter, and 4 · heads · head_dim · mean depth in each layer. The vocabulary's matrix makes one row: not counted."""
    width, heads, head_dim = config["d_model"], config["heads"], config["head_dim"]
    projections = width * head_dim * (2 * heads + 2 * config["kv_heads"])
    attention = 4 * heads * head_dim * (length + 1) / 2
    return config["layers"] * (2 * (projections + 3 * width * config["d_ff"]) + attention)


def values(row, rounds, side):
    """Per round, the best of a side's metrics that were measured; None where one is missing."""
    metrics = getattr(row, side)
    return [max(taken[m] for m in metrics) if all(m in taken for m in metrics) else None for taken in rounds]


def figure(row, rounds, constants):
    """A row's median over the rounds: figure, our median, the peer's median, number of rounds; None if unmeasured."""
    sides = values(row, rounds, "ours"), values(row, rounds, "peer") if row.peer else [1.0] * len(rounds)
    taken = [(ours, peer, whole) for ours, peer, whole in zip(*sides, rounds) if None not in (ours, peer)]
    if not taken:
        return None
    scale = constants[row.scale] if row.scale else 1.0
    ratio = statistics.median(whole[row.ratio] if row.ratio else scale * ours / peer for ours, peer, whole in taken)
    ours, peer = (statistics.median(entry[side] for entry in taken) for side in (0, 1))
    return {"figure": ratio, "ours": ours, "peer": peer if row.peer else None, "rounds": len(taken)}


def met(row, value):
    """Whether a figure reaches its target; None without one."""
    if row.target is None:
        return None
    return value <= row.target if row.form.startswith("at-most") else value >= row.target
