"""Times reading a large file, and measures what training on it needs of memory.

    python tests/benchmarks/loading.py FILE.csv

FILE.csv holds a name in its first column and has a header, as UserNameLoader
wants it; several hundred thousand lines show most. Figures are medians, and so
is the ratio, of rounds in which both ways to read follow each other.
"""

import csv
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import model  # noqa: E402 - found by the line above
from loaders import UserNameLoader  # noqa: E402

ROUNDS = 7
FLAGS = (
    "--loader_class UserNameLoader --units 16 --layers 1 --batch_size 1024 --epochs 1 "
    "--max_len 39 --save_path model.h5 --overwrite"
)


def iterate(path):
    """Reads all rows with the csv module and does nothing with them."""
    with open(path, encoding="utf-8", newline="") as file:
        for _ in csv.reader(file):
            pass


def time_it(function, *arguments):
    """Returns how many seconds a function takes, and what it returns."""
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def measure_training(path, *flags):
    """Returns the most memory in MB that an epoch of training took, and its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "train.py", *FLAGS.split(), *flags]
        start = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--sequence_path", path], cwd=folder, stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * 1024 / 1e6, time.perf_counter() - start


def main():
    """Prints the table."""
    path = os.path.abspath(sys.argv[1])
    rounds = []
    for _ in range(ROUNDS + 1):  # the first only warms the caches
        plain, _ = time_it(iterate, path)
        ours, corpus = time_it(model.build_corpus, UserNameLoader(path))
        rounds.append((plain, ours))
    plain, ours = (statistics.median(column) for column in zip(*rounds[1:]))
    ratio = statistics.median(ours / plain for plain, ours in rounds[1:])
    print(f"{len(corpus):10,}  names")
    print(f"{plain:10.3f}  s, csv.reader alone")
    print(f"{ours:10.3f}  s, loading and encoding: {ratio:.2f} times that")
    peaks = {}
    for name, flags in {"1,000": ["--num_sequences", "1000"], "all": []}.items():
        peaks[name], seconds = measure_training(path, *flags)
        print(f"{peaks[name]:10.0f}  MB at most while training on {name}, {seconds:.1f} s")
    print(f"{peaks['all'] - peaks['1,000']:10.0f}  MB more")


if __name__ == "__main__":
    main()
