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


def call(command, hint, cwd=None):
    """Runs a command, its log in target/peers/log.txt; returns stdout, wall seconds and peak resident MiB."""
    command = [str(part) for part in command]
    WORK.mkdir(parents=True, exist_ok=True)
    with open(WORK / "log.txt", "ab") as log:
        log.write(f"\n$ {' '.join(command)}\n".encode())
        log.flush()
        start = time.monotonic()
        try:
            child = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=log)
        except OSError as error:
            raise Failure(f"cannot start {command[0]}: {error}", hint) from error
        try:
            output = child.stdout.read()
        except BaseException:
            child.kill()
            child.wait()
            raise
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.monotonic() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise Failure(f"`{' '.join(command)}` ended with status {child.returncode}", f"{hint}; its messages end {WORK}/log.txt")
    return output.decode(), seconds, usage.ru_maxrss / 1024


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
