#!/usr/bin/env python3
"""Compares this project's speed, memory and quality with llama.cpp and PyTorch, and prints the tables of docs/performance.md.

Installs the peers and their weights into target/peers (needs pip, a C++ compiler, about 10 GB of disk and, the first time, a network),
then measures in rounds, each running every contestant once in turn; a figure is the median of the rounds' ratios."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import chart
import quality
from common import ROOT, WORK, Failure, Results, progress
from install import HYBRIDS, Tools, install
from report import SVG, markdown, rewrite
from rows import all_rows, repeats, runs_of, scales
from runs import Runner

QUICK_DEPTHS = tuple(depth for depth in chart.DEPTHS if depth <= 1024)
BUSY = 0.5
# Raised when results.json changes its meaning: older ones are then dropped.
FORMAT = 1
QUALITY_TOKENS, QUICK_TOKENS = 4096, 1024


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds (default 5)")
    parser.add_argument("--deep-rounds", type=int, help="rounds of the row at 32,000 tokens, 11 minutes each, nearly all of them llama.cpp's prefill (default: as --rounds)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of every contestant (default: all cores)")
    parser.add_argument("--only", metavar="PATTERN", default="", help="regular expression: rows (see --list), `quality`, `chart`")
    parser.add_argument("--quick", action="store_true", help="one round, no row at 32,000 tokens, little text, a short chart: to try it")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted command stopped")
    parser.add_argument("--binary", metavar="PATH", help="an existing recurformer binary, instead of building one")
    parser.add_argument("--doc", action="store_true", help="rewrite the tables in docs/performance.md and docs/performance.svg")
    parser.add_argument("--list", action="store_true", help="list the names of rows and parts")
    given = parser.parse_args()
    if given.deep_rounds is None:
        given.deep_rounds = given.rounds
    if min(given.rounds, given.deep_rounds, given.threads) < 1:
        parser.error("--rounds, --deep-rounds and --threads must be at least 1")
    if given.quick and given.doc:
        parser.error("--quick measures too little for --doc")
    if given.quick:
        given.rounds = given.deep_rounds = 1
    return given


class Selection:
    """What --only and --quick leave to be measured."""

    def __init__(self, given):
        pattern = re.compile(given.only)
        self.rows = [row for row in all_rows() if pattern.search(row.name) and not (given.quick and row.name == "deep")]
        self.quality = bool(pattern.search("quality"))
        self.chart = bool(pattern.search("chart"))
        self.runs = runs_of(self.rows)
        if not (self.rows or self.quality or self.chart):
            raise Failure(f"--only {given.only}: nothing has such a name", "see --list")

    def sections(self):
        """Names of the parts of results.json that are measured."""
        parts = {"rows": bool(self.rows), "quality": self.quality, "chart": self.chart}
        return [name for name, wanted in parts.items() if wanted]

    def files(self):
        """Pairs of a model and a weight type that the runs read."""
        found = {("base", kind) for run in self.runs for kind in ("q4_1", "q8_0", "bf16") if kind in run.split("/")}
        found |= {tuple(run.split("/")[1:3]) for run in self.runs if run.startswith("ours/")}
        if self.rows:
            found |= {("base", row.scale) for row in self.rows if row.scale in ("q4_1", "q8_0", "bf16")}
        return found | ({(model, chart.KIND) for model in ("base", *HYBRIDS)} if self.chart else set())


def machine():
    """The CPU's name and its number of cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return f"{name}, {os.cpu_count()} cores"


def commit():
    """What is measured, by its commit."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def warn_if_busy():
    """Says so when other programs are running: threads that wait for each other lose far more than those that do not."""
    load = os.getloadavg()[0]
    if load > BUSY:
        progress(f"warning: the load average is {load:.1f}; on a busy machine the ratios are not to be trusted")


def begin(given, selection):
    """Earlier results; those of the selected sections are dropped unless --resume keeps them. --quick has its own."""
    settings = {"format": FORMAT, "machine": machine(), "threads": given.threads}
    results = Results(WORK / ("quick.json" if given.quick else "results.json"))
    if results.setdefault("settings", settings) != settings:
        if given.resume:
            raise Failure("the earlier results are of another machine, number of threads or script", "leave --resume out to start again")
        results.clear()
        results["settings"] = settings
    for name in selection.sections():
        if not (given.resume and name in results):
            results[name] = empty_section(name)
        results[name]["sources"].append([commit(), shlex.join(["python3", "peers/compare.py", *sys.argv[1:]]), os.getloadavg()[0]])
    return results


def empty_section(name):
    """A part of the results before anything is measured; `sources` holds commit, command and load of every call that added to it."""
    parts = {"rows": {"rounds": [], "flash": {}, "constants": {}}, "quality": {"types": {}}, "chart": {"models": {}}}
    return {"sources": []} | parts[name]


def measure_rows(given, selection, runner, results):
    """The rounds; every other one in reverse order, so that no contestant always follows the same one."""
    section = results["rows"]
    section["constants"] = scales(runner.tools)
    for run in (run for run in selection.runs if run.startswith("llama/")):
        progress(f"llama.cpp with -fa 0 and 1: {run}")
        runner.choose_flash(run)
        results.save()
    for number in range(max(given.rounds, given.deep_rounds)):
        if number == len(section["rounds"]):
            section["rounds"].append({})
        taken = section["rounds"][number]
        wanted = [run for run in selection.runs if number < repeats(run, given.rounds, given.deep_rounds)]
        for run in wanted if number % 2 == 0 else reversed(wanted):
            if not any(metric.startswith(run + ":") for metric in taken):
                progress(f"round {number + 1}: {run}")
                taken.update({f"{run}:{metric}": value for metric, value in runner.run(run).items()})
                results.save()


def measure_quality(given, tools, results):
    """Every weight type on held-out text."""
    taken = results["quality"]["types"]
    for kind in ("f32", *quality.TYPES[: 2 if given.quick else None]):
        if kind not in taken:
            progress(f"quality: {kind}")
            taken[kind] = quality.measure(tools, kind, QUICK_TOKENS if given.quick else QUALITY_TOKENS)
            results.save()


def measure_chart(given, runner, results):
    """Every model of the chart at every depth, and the SVG."""
    taken = results["chart"]["models"]
    for model, _ in chart.SERIES:
        if model not in taken:
            progress(f"chart: {model}")
            taken[model] = runner.bench(model, chart.KIND, QUICK_DEPTHS if given.quick else chart.DEPTHS)
            results.save()
    target = SVG if given.doc else WORK / SVG.name
    target.write_text(chart.svg(taken))
    progress(f"wrote {target}")


def measure(given, selection, results):
    """Installs and measures what was selected."""
    tools = Tools(given.threads)
    install(tools, given.binary, selection.files(), any(run.startswith(("torch/", "train/")) for run in selection.runs))
    results.save()
    runner = Runner(tools, results["rows"]["flash"] if selection.rows else {})
    try:
        if selection.rows:
            measure_rows(given, selection, runner, results)
        if selection.quality:
            measure_quality(given, tools, results)
        if selection.chart:
            measure_chart(given, runner, results)
    finally:
        runner.close()


def main():
    """Measures, then prints and stores the tables."""
    given = arguments()
    if given.list:
        print("\n".join([*(row.name for row in all_rows()), "quality", "chart"]))
        return
    selection = Selection(given)
    warn_if_busy()
    results = begin(given, selection)
    measure(given, selection, results)
    text = markdown(results)
    print(text)
    if given.doc:
        rewrite(text)
        progress("wrote docs/performance.md")


if __name__ == "__main__":
    try:
        main()
    except Failure as error:
        sys.exit(f"error: {error}\nhint: {error.hint}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command with --resume goes on")
