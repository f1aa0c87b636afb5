"""Paths, progress lines, errors with hints, and child processes. Knows nothing of what is compared."""

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "target" / "peers"
STARTED = time.monotonic()


class Failure(Exception):
    """An error that the user can act on: what happened, and a hint."""

    def __init__(self, what, hint):
        super().__init__(what)
        self.hint = hint


def progress(text):
    """One line to stderr, after the elapsed time."""
    minutes, seconds = divmod(int(time.monotonic() - STARTED), 60)
    print(f"[{minutes:3d}:{seconds:02d}] {text}", file=sys.stderr, flush=True)


def start(command, hint, **streams):
    """Starts a command whose messages go to target/peers/log.txt."""
    command = [str(part) for part in command]
    WORK.mkdir(parents=True, exist_ok=True)
    with open(WORK / "log.txt", "ab") as log:
        log.write(f"\n$ {' '.join(command)}\n".encode())
        log.flush()
        try:
            return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, **streams)
        except OSError as error:
            raise Failure(f"cannot start {command[0]}: {error}", hint) from error


def kill(child):
    """Ends a process that nobody waits for."""
    child.kill()
    child.wait()


def finish(child, hint):
    """Waits for a process to end well; its peak resident MiB."""
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise Failure(f"`{' '.join(child.args)}` ended with status {child.returncode}", f"{hint}; its messages end {WORK}/log.txt")
    return usage.ru_maxrss / 1024


def call(command, hint, cwd=None):
    """Runs a command, its log in target/peers/log.txt; returns stdout, wall seconds and peak resident MiB."""
    begin = time.monotonic()
    child = start(command, hint, cwd=cwd)
    try:
        output = child.stdout.read()
    except BaseException:
        kill(child)
        raise
    mib = finish(child, hint)
    return output.decode(), time.monotonic() - begin, mib


class Dialogue:
    """A process that answers every line it reads with a number. Knows its peak memory when it has ended."""

    def __init__(self, command, hint):
        self.hint = hint
        self.child = start(command, hint, stdin=subprocess.PIPE)
        self.peak_mib = None

    def ask(self, request=""):
        """The answer to one line."""
        try:
            self.child.stdin.write(f"{request}\n".encode())
            self.child.stdin.flush()
            line = self.child.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            finish(self.child, self.hint)
            raise Failure(f"`{self.child.args[0]}` ended before its work", self.hint)
        return float(line)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind:
            self.kill()
            return
        self.child.stdin.close()
        self.peak_mib = finish(self.child, self.hint)

    def kill(self):
        """Ends the process where it has not ended yet."""
        if self.child.returncode is None:
            kill(self.child)


def call_json(command, hint):
    """Runs a command and parses what it prints."""
    text, _, _ = call(command, hint)
    try:
        return json.loads(text)
    except ValueError as error:
        raise Failure(f"`{command[0]}` printed no JSON: {error}", hint) from error


class Results(dict):
    """What was measured, and the JSON file it is kept in."""

    def __init__(self, path):
        super().__init__(json.loads(path.read_text()) if path.exists() else {})
        self.path = path

    def save(self):
        """Writes the file whole or not at all."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self, indent=1))
        part.replace(self.path)


def write_ids(path, ids):
    """Token ids as an .npy file of int32."""
    header = f"{{'descr': '<i4', 'fortran_order': False, 'shape': ({len(ids)},), }}"
    header = header.ljust(-(len(header) + 11) % 64 + len(header)) + "\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + struct.pack(f"<{len(ids)}i", *ids))
