"""Measures what it costs to train with several processes, and works out what a network would.

    pip install -r tests/benchmarks/requirements.txt
    python tests/benchmarks/distribution.py

Groups of 1, 2 and 4 processes train the same network with the same batches on the
JAX backend. Each process computes in one thread (beside it run those that send and
receive), and all share the cores of this machine and exchange over its loopback
interface. What they are compared with is one process of one thread without
--distribute; what a user of one machine would do is in the table too, one process
with all its threads. A round runs all of them one after the other; every figure is
the median over the rounds of the median epoch after the first, and each ratio the
median of the ratios within a round.

The last table is not measured. In a ring all-reduce (Patarasu and Yuan 2009) each
of P hosts sends and receives 2 (P - 1) / P of the gradients, four bytes a weight;
one sequence takes six operations a weight and character. It says how long the
first takes for 3 × 1024 units, and for how many sequences a host the second takes
as long, at a rate that the table names.
"""

import os
import pathlib
import re
import socket
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAMES = ROOT / "pre_trained_models" / "user_names_10000.csv"
ROUNDS = 3
BATCH = 128
DATA = f"--loader_class UserNameLoader --sequence_path {NAMES} --validation_split 0"
SIZES = {
    "2 × 32": "--layers 2 --units 32 --epochs 6",
    "2 × 128": "--layers 2 --units 128 --epochs 4 --num_sequences 4000",
    "3 × 256": "--layers 3 --units 256 --epochs 4 --num_sequences 2000",
}
ALONE = "one process, one thread"
CHARACTERS = 11  # of a user name and its end, on average
ALPHABET = 64


def train(flags, processes=0, threads=1):
    """Returns the training steps a second of a group after the first epoch.

    No processes are one without --distribute; 0 threads are as many as there are cores.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "train.py", *flags.split(), *DATA.split()]
        command += ["--batch_size", str(BATCH), *["--distribute"] * bool(processes)]
        started = [
            subprocess.Popen(
                command,
                cwd=folder,
                env={
                    **os.environ,
                    "KERAS_BACKEND": "jax",
                    **({"NPROC": str(threads)} if threads else {}),  # JAX asks it
                    "KERAS_DISTRIBUTION_JOB_ADDRESSES": f"127.0.0.1:{port}",
                    "KERAS_DISTRIBUTION_NUM_PROCESSES": str(processes),
                    "KERAS_DISTRIBUTION_PROCESS_ID": str(rank),
                },
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes or 1)
        ]
        shown, *_ = [process.communicate()[0] for process in started]
    rates = re.findall(r"([\d,]+) sequences/s", shown)[1:]
    return statistics.median(int(rate.replace(",", "")) for rate in rates) / BATCH


def measure(title):
    """Prints the table of one size of network."""
    rounds = []
    for number in range(ROUNDS):
        figures = {ALONE: train(SIZES[title]), "one process": train(SIZES[title], threads=0)}
        figures |= {f"--distribute, {n}": train(SIZES[title], n) for n in (1, 2, 4)}
        rounds.append(figures)
        print(f"round {number + 1} of {ROUNDS}", file=sys.stderr)
    print(f"{title} units, batches of {BATCH} user names, {os.cpu_count()} cores")
    for name in rounds[0]:
        rate = statistics.median(figures[name] for figures in rounds)
        ratio = statistics.median(figures[name] / figures[ALONE] for figures in rounds)
        print(f"{rate:12.1f} steps/s {ratio:6.2f} ×  {name}")


def work_out(units, layers):
    """Prints the table of what an exchange over a network costs."""
    matrices = 4 * units * (ALPHABET + (2 * layers - 1) * units) + units * ALPHABET
    weights = matrices + 4 * units * layers + ALPHABET
    print(f"on paper, {layers} × {units} units: {weights:,} weights, {4e-6 * weights:.0f} MB")
    for hosts in (2, 8):
        for gigabits in (10, 100):
            seconds = 2 * (hosts - 1) / hosts * 32 * weights / (gigabits * 1e9)
            print(f"{1000 * seconds:12.1f} ms a step, {hosts} hosts, {gigabits} Gbit/s; as long as")
            for rate in (0.15, 20):
                sequences = seconds * rate * 1e12 / (6 * matrices * CHARACTERS)
                print(f"{sequences:24,.1f} sequences a host at {rate} TFLOP/s")


if __name__ == "__main__":
    for size in SIZES:
        measure(size)
    work_out(1024, 3)
