"""Times how soon the scripts answer, and how much memory a prompt takes.

    python tests/benchmarks/startup.py

Each figure is the median of several runs, and each ratio the median of the
ratios of runs that followed each other, because machines drift.
"""

import contextlib
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "pre_trained_models"))

from build import on_terminal, read_until  # noqa: E402 - found by the line above

RUNS = 9
MODEL = "pre_trained_models/user_names_10000.h5"


def time_to_end(*arguments):
    """Returns how many seconds Python takes to run with these arguments."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True)
    return time.perf_counter() - start


def start_prompt(peaks):
    """Returns how many seconds sample.py takes until it asks for input on a terminal.

    Args:
        peaks: list, to which the most memory that it has taken by then is
            added, in MB; on Linux only.
    """
    command = [sys.executable, "sample.py", "--weights_path", MODEL]
    start = time.perf_counter()
    with on_terminal(command, cwd=ROOT) as (terminal, process):
        read_until(terminal, "> ")
        seconds = time.perf_counter() - start
        with contextlib.suppress(OSError):
            status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
            peaks.append(int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024 / 1e6)
        os.write(terminal, b"\x04")
        read_until(terminal, None)
    return seconds


def main():
    """Prints the table."""
    peaks = []
    figures = {
        "python -c 'import keras'": lambda: time_to_end("-c", "import keras"),
        "sample.py, until its prompt": lambda: start_prompt(peaks),
        "python -c pass": lambda: time_to_end("-c", "pass"),
        "train.py --help": lambda: time_to_end("train.py", "--help"),
        "train.py --unit 3": lambda: time_to_end("train.py", "--unit", "3"),
        "train.py --sequence_path missing": lambda: time_to_end(
            "train.py", "--sequence_path", "missing"
        ),
    }
    rounds = []
    for number in range(RUNS + 1):  # the first only warms the caches
        rounds.append({name: measure() for name, measure in figures.items()})
        print(f"round {number} of {RUNS}", file=sys.stderr)
    keras, prompt, nothing, *others = figures
    for name in figures:
        print(f"{statistics.median(r[name] for r in rounds[1:]):7.3f} s  {name}")
    ratio = statistics.median(r[prompt] / r[keras] for r in rounds[1:])
    print(f"{ratio:7.3f}    {prompt} / {keras}")
    if peaks:
        print(f"{statistics.median(peaks):7.1f} MB {prompt}, peak memory")
    for name in others:
        extra = statistics.median(r[name] - r[nothing] for r in rounds[1:])
        print(f"{extra:7.3f} s  {name} − {nothing}")


if __name__ == "__main__":
    main()
