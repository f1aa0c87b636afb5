"""Runs one contestant once. A run is named `ours/MODEL/TYPE/DEPTH`, `llama/prefill|decode/TYPE/DEPTH`, `torch/prefill|decode/DEPTH`,
`doctor`, `first-token/TYPE`, `memory/ours|llama/TYPE` or `train/STEP/BATCHxLENGTH` (full, full-bf16, full-in-backward, full-half, full-lean, distill, align, align-frozen, align-mamba2: PyTorch's
step of every weight beside it), and gives a dictionary of metrics."""

import statistics
from pathlib import Path

from common import Dialogue, call, call_json
from install import MODEL

DECODE_STEPS = 32
CONTEXT = 8192
DEEP = 32000
CHOICE_DEPTH = 7900
FIRST_TOKEN_RUNS = 5
MEMORY_TOKENS = 8
# Steps of ours that count, each between two of PyTorch's.
TRAIN_STEPS = 8
FITS = "run `target/release/recurformer --help`: the binary may be older than this script"


def take_turns(ours, peer, steps):
    """Two processes step in turn, so that a mood of the machine, even one of seconds, meets both. After a step each that warms up: the median
    ratio of the peer's seconds, before and after one of our steps, to ours; and either side's median seconds."""
    ours.ask(), peer.ask()
    before = peer.ask()
    ratios, own, theirs = [], [], [before]
    for _ in range(steps):
        own.append(ours.ask())
        theirs.append(peer.ask())
        ratios.append((before + theirs[-1]) / 2 / own[-1])
        before = theirs[-1]
    return statistics.median(ratios), statistics.median(own), statistics.median(theirs)


class Runner:
    """Runs contestants; remembers which attention of llama.cpp (`-fa`) was the faster."""

    def __init__(self, tools, flash):
        self.tools = tools
        self.flash = flash
        self.torch = None

    def run(self, name):
        """The metrics of one run."""
        kind, *rest = name.split("/")
        return {
            "ours": self.ours, "llama": self.llama, "torch": self.by_torch, "doctor": self.doctor, "first-token": self.first_token,
            "memory": self.memory, "train": self.train,
        }[kind](*rest)

    def bench(self, model, kind, depths):
        """`recurformer bench` of a file at some depths."""
        depths = [int(depth) for depth in depths]
        command = self.tools.ours(
            "bench", "--model", self.tools.file(model, kind), "--depths", ",".join(map(str, depths)), "--json", "--kv-type", "f16",
            "--decode-steps", str(DECODE_STEPS),
        )
        if max(depths) + DECODE_STEPS > CONTEXT:
            command.append("--beyond-context")
        return call_json(command, FITS)["results"]

    def ours(self, model, kind, depth):
        """Prefill and decode tokens per second, and cache bytes."""
        (result,) = self.bench(model, kind, [depth])
        return {"prefill": result["prefill_tok_s"], "decode": result["decode_tok_s"], "cache": result["cache_bytes"]}

    def doctor(self):
        """What the machine can do: GB/s read from memory, bf16 GFLOP/s."""
        shown = call_json(self.tools.ours("doctor", "--json"), FITS)
        return {"memory": shown["memory_read_gigabytes_per_second"], "bf16": shown["bf16_gemm_gflops"]}

    def by_torch(self, what, depth):
        """Tokens per second of PyTorch, whose process is kept, so that building the model is not repeated."""
        if self.torch is None:
            self.torch = self.python("torch_speed.py")
        return {"speed": self.torch.ask(f"{what} {depth}")}

    def python(self, script, *arguments):
        """One of the scripts beside this one."""
        command = [self.tools.python, Path(__file__).with_name(script), str(self.tools.threads), *arguments]
        return Dialogue(command, "memory may be short")

    def close(self):
        """Ends the process that is kept."""
        if self.torch is not None:
            self.torch.kill()

    def llama_command(self, what, kind, depth, flash, steps=DECODE_STEPS):
        """llama-bench for one figure."""
        sizes = ["-p", depth, "-n", "0"] if what == "prefill" else ["-p", "0", "-n", str(steps), "-d", depth]
        model = ["-m", self.tools.file("base", kind), "-t", str(self.tools.threads)]
        return [self.tools.llama_bench, *model, *sizes, "-r", "1", "-fa", str(flash), "-o", "json"]

    def llama_speed(self, what, kind, depth, flash):
        """Tokens per second of llama.cpp."""
        command = self.llama_command(what, kind, depth, flash)
        (result,) = call_json(command, "remove target/peers/llama-build to build it again")
        return result["avg_ts"]

    def choose_flash(self, name):
        """Measures both attentions of llama.cpp once for a run and keeps the faster; at the deepest it is that of 7900 tokens."""
        _, what, kind, depth = name.split("/")
        known = f"{what}/{kind}/{min(int(depth), CHOICE_DEPTH)}"
        if known not in self.flash:
            speeds = [self.llama_speed(what, kind, known.split("/")[2], flash) for flash in (0, 1)]
            self.flash[known] = int(speeds[1] > speeds[0])
        self.flash[f"{what}/{kind}/{depth}"] = self.flash[known]

    def llama(self, what, kind, depth):
        """Tokens per second of llama.cpp with its faster attention."""
        return {"speed": self.llama_speed(what, kind, depth, self.flash[f"{what}/{kind}/{depth}"])}

    def first_token(self, kind):
        """Median seconds from starting the process to its end after one token of a short prompt, file in the page cache."""
        command = self.tools.ours("generate", "--model", self.tools.file("base", kind), "--prompt", "The whale", "--max-tokens", "1")
        return {"seconds": statistics.median(call(command, FITS)[1] for _ in range(FIRST_TOKEN_RUNS))}

    def memory(self, side, kind):
        """Peak resident MiB of generating a few tokens after 8,000."""
        if side == "llama":
            command = self.llama_command("decode", kind, "8000", "auto", MEMORY_TOKENS)
        else:
            command = self.tools.ours(
                "generate", "--model", self.tools.file("base", kind), "--prompt-file", self.tools.prompt, "--max-tokens",
                str(MEMORY_TOKENS), "--kv-type", "f16", "--json",
            )
        return {"mib": call(command, FITS)[2]}

    def train(self, step, shape):
        """Tokens per second of a training step and of PyTorch's, their ratio, and the peak resident MiB of both processes."""
        batch, length = map(int, shape.split("x"))
        with self.python("torch_train.py", shape) as torch:
            with Dialogue(self.train_command(step, batch, length), FITS) as ours:
                ratio, seconds, torch_seconds = take_turns(ours, torch, TRAIN_STEPS)
        tokens = batch * length
        return {
            "ratio": ratio, "ours": tokens / seconds, "torch": tokens / torch_seconds, "ours-mib": ours.peak_mib, "torch-mib": torch.peak_mib,
        }

    def train_command(self, step, batch, length):
        """`recurformer bench-train` that takes its steps on request."""
        step, _, how = step.partition("-")
        early = ["--moments", "bf16", "--optimizer-in-backward"]
        options = {
            "": [], "bf16": ["--moments", "bf16"], "in-backward": early, "half": [*early, "--checkpoint-activations", "14"],
            "lean": [*early, "--checkpoint-activations", "all"], "mamba2": ["--mixer", "mamba2", "--window", "64"],
            "frozen": ["--projection-lr-scale", "0"],
        }[how]
        sizes = ["--batch", str(batch), "--context", str(length)]
        return self.tools.ours("bench-train", "--model", MODEL, "--steps", step, *sizes, "--paced", *options)
