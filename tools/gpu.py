"""Everything that needs a GPU: build, tests, sanitizers, benchmarks; in parts, so that it can stop.

    python tools/gpu.py --out DIR                  all of it, with this Python, its torch, and nvcc
    python tools/gpu.py --out DIR --minutes 9      what fits; the same command again goes on
    python tools/gpu.py --out DIR --dry-run        the parts and their commands

Each part's result is kept in DIR/state.json and its output in DIR/<part>.log; DIR/summary.md has
the figures. The build is done in every call, since DIR may have come from another machine. A part
that failed is run again only with --retry. One that the total time cut off is run again, once.

Exit status: 0 if no part failed or the time was over, 1 if one failed, 2 for a bad argument.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import gpu_summary
from gpu_parts import ROOT, Part, make_parts

SHORTEST = 60.0  # seconds that must be left to start a part
GRACE = 20.0  # seconds between asking a command to stop and killing it
CUTS = 2  # a part that was cut off so often has failed


class State:
    """What became of each part: state.json, written at each change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts: dict[str, dict] = {}
        if path.exists():
            self.parts = json.loads(path.read_text())["parts"]
        for name, entry in self.parts.items():
            if entry["status"] == "running":  # the whole call was killed
                self.cut(name, "the call was killed")

    def set(self, name: str, status: str, **more: object) -> None:
        """status: running, passed, failed, skipped or cut."""
        cuts = 0 if status in ("passed", "skipped") else self.parts.get(name, {}).get("cuts", 0)
        self.parts[name] = {"status": status, "cuts": cuts, **more}
        draft = self.path.with_name(self.path.name + ".part")
        draft.write_text(json.dumps({"parts": self.parts}, indent=1) + "\n")
        draft.replace(self.path)

    def cut(self, name: str, note: str, **more: object) -> None:
        cuts = self.parts[name]["cuts"] + 1
        self.parts[name]["cuts"] = cuts
        if cuts >= CUTS:
            self.set(name, "failed", note=f"{note}, {cuts} times", **more)
        else:
            self.set(name, "cut", note=f"{note}; will be run again", **more)

    def status(self, name: str) -> str:
        return self.parts.get(name, {}).get("status", "")

    def is_due(self, part: Part, retry: bool) -> bool:
        status = self.status(part.name)
        return part.every_call or status in ("", "cut", "skipped") or (retry and status == "failed")


def stop(process: subprocess.Popen) -> None:
    """Asks the command and its children to stop, as Ctrl-C does, and kills them if they do not."""
    for number, patience in ((signal.SIGINT, GRACE), (signal.SIGKILL, GRACE)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
        if number == signal.SIGKILL:
            return


def run_command(
    command: Sequence[str], env: dict[str, str], log: Path, hide: str, seconds: float
) -> int | None:
    """Runs it to its end, its output to the log and the terminal; None if the time was over."""
    hidden = re.compile(hide) if hide else None
    with log.open("a", encoding="utf-8", errors="replace") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            file.write(f"{error}\n")
            print(error, flush=True)
            return 127

        def copy() -> None:
            for line in process.stdout:
                file.write(line)
                file.flush()
                if hidden is None or not hidden.search(line):
                    print(line, end="", flush=True)

        reader = threading.Thread(target=copy, daemon=True)
        reader.start()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            stop(process)
            return None
        except BaseException:
            stop(process)
            raise
        finally:
            reader.join(GRACE)
        return process.returncode


def run_part(part: Part, state: State, out: Path, left: float) -> None:
    """Runs one part and records its result; ``left`` seconds of the whole call remain."""
    log = out / f"{part.name}.log"
    log.unlink(missing_ok=True)
    env = os.environ | {"PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"} | dict(part.env)
    paths = [str(ROOT), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    begin = time.monotonic()
    limit = min(60 * part.minutes, left)
    state.set(part.name, "running")
    try:
        for command in part.commands:
            remaining = limit - (time.monotonic() - begin)
            code = run_command(command, env, log, part.hide, max(remaining, 0.0))
            if code != 0:
                break
    except KeyboardInterrupt:
        state.cut(part.name, "interrupted")
        raise
    seconds = round(time.monotonic() - begin, 1)
    if code == 0:
        state.set(part.name, "passed", seconds=seconds)
    elif code is not None:
        note = f"exit status {code} of {Path(command[0]).name}; see {log.name}"
        state.set(part.name, "failed", seconds=seconds, note=note)
    elif limit < 60 * part.minutes:
        state.cut(part.name, "cut off by the total time", seconds=seconds)
    else:
        note = f"took longer than {part.minutes:g} minutes; see {log.name}"
        state.set(part.name, "failed", seconds=seconds, note=note)


def run_parts(
    parts: Sequence[Part],
    state: State,
    out: Path,
    minutes: float,
    retry: bool,
    write_summary: Callable[[], None],
) -> int:
    """Runs what is due, as far as the time goes; returns the exit status."""
    begin = time.monotonic()
    due = [part for part in parts if state.is_due(part, retry)]
    if all(part.every_call and state.status(part.name) == "passed" for part in due):
        due = []  # a build for nothing
    for number, part in enumerate(due):
        left = 60 * minutes - (time.monotonic() - begin) if minutes else float("inf")
        if left < SHORTEST:
            names = ", ".join(p.name for p in due[number:] if not p.every_call)
            failed = [p.name for p in parts if state.status(p.name) == "failed"]
            print(f"\nthe time is over; the same command goes on with: {names}")
            if failed:
                print(f"failed so far: {', '.join(failed)}")
            return 0
        if part.skip:
            state.set(part.name, "skipped", note=part.skip)
            print(f"\n== {part.name}: skipped: {part.skip}", flush=True)
        else:
            print(f"\n== {part.name} ({number + 1} of {len(due)})", flush=True)
            run_part(part, state, out, left)
            entry = state.parts[part.name]
            print(f"== {part.name}: {entry['status']} {entry.get('note', '')}", flush=True)
        write_summary()
        if part.needed and state.status(part.name) != "passed":
            print(f"\nnothing can go on without {part.name}")
            return 1 if state.status(part.name) == "failed" else 0
    failed = [part.name for part in parts if state.status(part.name) == "failed"]
    cut = [part.name for part in parts if state.status(part.name) == "cut"]
    print(f"\nall parts are done; failed: {', '.join(failed) or 'none'}")
    if cut:
        print(f"the same command runs again: {', '.join(cut)}")
    return 1 if failed else 0


def arch_of_device() -> str:
    """The GPU's architecture as LSTM_EXT_CUDA_ARCHS takes it; "90a" where there is no GPU."""
    try:
        import torch

        if not torch.cuda.is_available():
            return "90a"
        major, minor = torch.cuda.get_device_capability()
    except ImportError:
        return "90a"
    return "90a" if (major, minor) == (9, 0) else f"{major}{minor}"


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[Part]]:
    parser = argparse.ArgumentParser(
        prog="tools/gpu.py",
        description="Build, tests, sanitizers and benchmarks on a GPU, in parts.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results, logs")
    parser.add_argument("--minutes", type=float, default=0, help="of this call; 0: no limit")
    parser.add_argument("--only", default="", metavar="NAMES", help="of parts, with commas")
    parser.add_argument("--skip", default="", metavar="NAMES", help="of parts, with commas")
    parser.add_argument("--retry", action="store_true", help="also the parts that failed before")
    parser.add_argument("--arch", help="default: that of the GPU at hand, such as 90a")
    parser.add_argument("--dry-run", action="store_true", help="print the parts, run nothing")
    args = parser.parse_args(argv)
    args.out = args.out.absolute()
    parts = make_parts(args.out, args.arch or arch_of_device(), os.environ)
    only, skip = ([n for n in text.split(",") if n] for text in (args.only, args.skip))
    unknown = set(only + skip) - {part.name for part in parts}
    if unknown:
        names = "\n  ".join(part.name for part in parts)
        parser.error(f"there is no part {', '.join(sorted(unknown))}; the parts are\n  {names}")
    if args.minutes < 0:
        parser.error(f"--minutes must not be negative, got {args.minutes:g}")
    # What is needed goes along unless it is skipped by name.
    return args, [
        p for p in parts if p.name not in skip and (not only or p.name in only or p.needed)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    args, parts = parse(argv)
    if args.dry_run:
        for part in parts:
            print(f"{part.name}{f'  (skipped: {part.skip})' if part.skip else ''}")
            settings = [f"{key}={value}" for key, value in part.env.items()]
            for command in part.commands:
                print(f"    {shlex.join([*settings, *command])}")
        return 0
    (args.out / "bench").mkdir(parents=True, exist_ok=True)
    state = State(args.out / "state.json")

    def write_summary() -> None:
        text = gpu_summary.summary(args.out, state.parts)
        (args.out / "summary.md").write_text(text, encoding="utf-8")

    code = run_parts(parts, state, args.out, args.minutes, args.retry, write_summary)
    write_summary()
    print(f"results: {args.out / 'summary.md'}")
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
