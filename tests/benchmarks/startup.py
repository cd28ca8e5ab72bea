"""Times how soon the scripts answer, and how much memory a prompt takes.

    pip install -r tests/benchmarks/requirements.txt
    python tests/benchmarks/startup.py [--against DIR]

DIR is another checkout, which is measured in the same rounds. Each figure is the
median of several runs, and each ratio the median of the ratios of runs that
followed each other, because machines drift.
"""

import argparse
import contextlib
import pathlib
import re
import statistics
import subprocess
import sys
import time

import pexpect

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = "pre_trained_models/user_names_10000.h5"
COMMANDS = "train.py --help", "train.py --unit 3", "train.py --sequence_path missing"
PROMPT, KERAS = "sample.py, until its prompt", "python -c 'import keras'"


def time_to_end(folder, *arguments):
    """Returns how many seconds Python takes to run with these arguments."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True)
    return time.perf_counter() - start


def start_prompt(folder, peaks):
    """Returns how many seconds sample.py takes until it asks for input on a terminal.

    Adds to `peaks`, a list, the most memory in MB that it has taken by then; on Linux only.
    """
    start = time.perf_counter()
    terminal = pexpect.spawn(sys.executable, ["sample.py", "--weights_path", MODEL], cwd=folder)
    terminal.expect_exact("> ")
    seconds = time.perf_counter() - start
    with contextlib.suppress(OSError):
        status = pathlib.Path(f"/proc/{terminal.pid}/status").read_text()
        peaks.append(int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024 / 1e6)
    terminal.sendeof()
    terminal.expect(pexpect.EOF)
    return seconds


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--against", metavar="DIR", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    folders = {"": ROOT} | ({f" in {args.against}": args.against} if args.against else {})
    peaks, rounds = {where: [] for where in folders}, []
    for number in range(args.rounds + 1):  # the first only warms the caches
        figures = {KERAS: time_to_end(ROOT, "-c", "import keras")}
        for where, folder in folders.items():
            figures[PROMPT + where] = start_prompt(folder, peaks[where])
            for command in COMMANDS:
                figures[command + where] = time_to_end(folder, *command.split())
        rounds.append({**figures, "python -c pass": time_to_end(ROOT, "-c", "pass")})
        print(f"round {number} of {args.rounds}", file=sys.stderr)
    for name in rounds[0]:
        print(f"{statistics.median(r[name] for r in rounds[1:]):7.3f} s  {name}")
    for where in folders:
        ratio = statistics.median(r[PROMPT + where] / r[KERAS] for r in rounds[1:])
        print(f"{ratio:7.3f}    {PROMPT}{where} / {KERAS}")
        if peaks[where]:
            print(f"{statistics.median(peaks[where]):7.1f} MB {PROMPT}{where}, peak memory")


if __name__ == "__main__":
    main()
