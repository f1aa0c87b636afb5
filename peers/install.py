"""Brings the contestants and their weights into target/peers, each step skipped when its result is there."""

import os
import platform
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from common import ROOT, WORK, Failure, call, call_json, progress, write_ids

TORCH, TRANSFORMERS, CMAKE, LLAMA = "2.15.0", "5.23.0", "4.4.4", "0.3.36"
MODEL = "smollm2-135m"
HYBRIDS = ("0.5", "0.75", "0.9")
# Heads of the default recipe.
HEADS = ("--mixer", "gated-delta", "--window", "192", "--dropped", "weighed")
PROMPT_TOKENS = 8000
# llama.cpp's build options, and the CPU flags that each needs. AMX stays off: its int8 path has crashed on virtual machines.
LLAMA_ISA = {
    "AVX": "avx", "AVX2": "avx2", "FMA": "fma", "F16C": "f16c", "BMI2": "bmi2", "AVX512": "avx512f avx512bw avx512cd avx512dq avx512vl",
    "AVX512_VNNI": "avx512_vnni", "AVX512_VBMI": "avx512vbmi", "AVX512_BF16": "avx512_bf16", "AVX_VNNI": "avx_vnni",
}


class Tools:
    """Where everything is, and how many threads each contestant gets."""

    def __init__(self, threads):
        self.threads = threads
        self.python = WORK / "venv" / "bin" / "python"
        self.llama_bench = WORK / "llama-build" / "bin" / "llama-bench"
        self.llama_quantize = WORK / "llama-build" / "bin" / "llama-quantize"
        self.binary = ROOT / "target" / "release" / "recurformer"
        self.weights = WORK / "weights"
        self.prompt = self.weights / "prompt.npy"

    def file(self, model, kind):
        """The GGUF of `base` or a hybrid (`0.9`) with weights of one type."""
        return self.weights / f"{model}-{kind}.gguf"

    def ours(self, *arguments):
        """A command line of this project's binary."""
        return [self.binary, *arguments, "--threads", str(self.threads)]


def build_binary(tools, given):
    """Builds this project, or takes a binary that exists."""
    if given:
        tools.binary = Path(given).resolve()
        if not tools.binary.is_file():
            raise Failure(f"--binary {given}: no such file", "leave --binary out to build it")
        return
    progress("cargo build --release")
    if subprocess.run(["cargo", "build", "--release"], cwd=ROOT, stdout=sys.stderr, check=False).returncode != 0:
        raise Failure("the build failed", "see the compiler's messages above")


def installed(tools):
    """Versions of torch and transformers in the venv; empty without one."""
    if not tools.python.exists():
        return []
    code = "from importlib.metadata import version as v; print(v('torch').split('+')[0], v('transformers'), v('cmake'))"
    done = subprocess.run([tools.python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.split()


def install_python(tools):
    """A venv with PyTorch and transformers, and the cmake that builds llama.cpp."""
    if installed(tools) == [TORCH, TRANSFORMERS, CMAKE]:
        return
    progress(f"install torch {TORCH}, transformers {TRANSFORMERS}, cmake {CMAKE} (several GB)")
    hint = "python3 with venv and pip is needed, and their package index must be reachable"
    call([sys.executable, "-m", "venv", WORK / "venv"], hint)
    call([tools.python, "-m", "pip", "install", f"torch=={TORCH}", f"transformers=={TRANSFORMERS}", f"cmake=={CMAKE}"], hint)


def llama_flags():
    """llama.cpp's instruction set options for this CPU."""
    if platform.machine() != "x86_64":
        return ["-DGGML_NATIVE=ON"]
    info = Path("/proc/cpuinfo").read_text()
    present = set(next(line for line in info.splitlines() if line.startswith("flags")).split())
    on = {name: set(flags.split()) <= present for name, flags in LLAMA_ISA.items()}
    return ["-DGGML_NATIVE=OFF"] + [f"-DGGML_{name}={'ON' if value else 'OFF'}" for name, value in on.items()]


def unpack_llama(tools):
    """The source distribution of llama-cpp-python, whose vendor/llama.cpp is built; returns that folder."""
    source = WORK / f"llama_cpp_python-{LLAMA}"
    if not source.is_dir():
        hint = "pip's package index must be reachable"
        command = [tools.python, "-m", "pip", "download", "--no-binary", "llama-cpp-python", "--no-deps", "-d", WORK]
        call([*command, f"llama-cpp-python=={LLAMA}"], hint)
        with tarfile.open(source.with_name(source.name + ".tar.gz")) as archive:
            archive.extractall(WORK, filter="data")
    return source / "vendor" / "llama.cpp"


def build_llama(tools):
    """llama-bench and llama-quantize from the source distribution's llama.cpp."""
    if tools.llama_bench.exists() and tools.llama_quantize.exists():
        return
    progress(f"build llama.cpp of llama-cpp-python {LLAMA} (about 8 CPU minutes)")
    cmake, build = tools.python.parent / "cmake", WORK / "llama-build"
    parts = {"TESTS": "OFF", "EXAMPLES": "OFF", "SERVER": "OFF", "TOOLS": "ON"}
    options = [f"-DLLAMA_BUILD_{part}={value}" for part, value in parts.items()]
    options += ["-DLLAMA_CURL=OFF", "-DBUILD_SHARED_LIBS=OFF", "-DCMAKE_BUILD_TYPE=Release", *llama_flags()]
    hint = "a C++17 compiler and make are needed"
    call([cmake, "-S", unpack_llama(tools), "-B", build, *options], hint)
    targets = ["llama-bench", "llama-quantize"]
    call([cmake, "--build", build, "-j", str(os.cpu_count()), "--target", *targets], hint)


def base_files(tools, kinds):
    """The built-in model's own Q4_1 file, and llama-quantize's copies of it in other types: both engines read the same files."""
    stored = tools.file("base", "q4_1")
    if not stored.exists():
        shown = call_json([tools.binary, "inspect", MODEL, "--json"], f"try `recurformer fetch {MODEL}`")
        partial = stored.with_suffix(".part")
        shutil.copyfile(shown["path"], partial)
        partial.replace(stored)
    for kind in sorted(kinds - {"q4_1"}):
        target = tools.file("base", kind)
        if not target.exists():
            progress(f"llama-quantize: base as {kind}")
            partial = target.with_suffix(".part")
            call([tools.llama_quantize, "--allow-requantize", stored, partial, kind], "the disk may be full")
            partial.replace(target)


def prompt(tools):
    """Random token ids: the long prompt of the memory rows, and the text that heads are analysed on."""
    if not tools.prompt.exists():
        draw = random.Random(0)
        write_ids(tools.prompt, [draw.randrange(3, 49152) for _ in range(PROMPT_TOKENS)])


def hybrid_file(tools, beta, kind):
    """A hybrid with random groups converted to untrained heads of the default recipe: its speed is that of a trained one."""
    target, folder = tools.file(beta, kind), tools.weights / f"hybrid-{beta}"
    if target.exists():
        return
    progress(f"convert and export: hybrid {beta} as {kind}")
    heads, plan = tools.weights / "heads.json", tools.weights / f"plan-{beta}.json"
    hint = "remove target/peers/weights and try again"
    base = ["--model", tools.file("base", "q4_1")]
    if not heads.exists():
        text = ["--data", tools.prompt, "--tokens", "2048", "--context", "512", "--criteria", "random"]
        call(tools.ours("analyze", *base, *text, "--out", heads), hint)
    if not (folder / "model.safetensors").exists():
        choice = ["--criterion", "random", "--beta", beta, *HEADS]
        call([tools.binary, "plan", "--heads", heads, *choice, "--out", plan], hint)
        call([tools.binary, "convert", *base, "--plan", plan, "--heads", heads, "--out", folder], hint)
    call(tools.ours("export", "--model", folder, "--gguf", target, "--weights", kind), hint)


def install(tools, given, files, with_torch):
    """Everything that the selected measurements need; `files` holds pairs of a model and a type."""
    tools.weights.mkdir(parents=True, exist_ok=True)
    build_binary(tools, given)
    if with_torch or (files and not tools.llama_bench.exists()):
        install_python(tools)
    if not files:
        return
    build_llama(tools)
    base_files(tools, {kind for _, kind in files} | {"q4_1"})
    prompt(tools)
    for model, kind in sorted(files):
        if model != "base":
            hybrid_file(tools, model, kind)
