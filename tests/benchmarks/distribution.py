"""Measures what it costs to train with several processes, on the cores of one machine.

    pip install -r tests/benchmarks/requirements.txt
    python tests/benchmarks/distribution.py

Groups of 1, 2 and 4 processes of one thread each train the same network with the
same batches on JAX, and exchange over the loopback interface. They are compared with
one process of one thread without --distribute. A round runs all of them; figures are
medians over the rounds of the median epoch after the first, ratios medians of the
ratios within a round.
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
ROUNDS, BATCH = 3, 128
DATA = f"--sequence_path {NAMES} --validation_split 0 --batch_size {BATCH}"
SIZES = (
    "--layers 2 --units 32 --epochs 6",
    "--layers 2 --units 128 --epochs 4 --num_sequences 4000",
    "--layers 3 --units 256 --epochs 4 --num_sequences 2000",
)


def train(flags, processes):
    """Returns the steps a second of a group; 0 processes are one without --distribute."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        variables = {"JOB_ADDRESSES": f"127.0.0.1:{server.getsockname()[1]}"}
    variables |= {"NUM_PROCESSES": f"{processes}"}
    command = [sys.executable, ROOT / "train.py", *flags.split(), *DATA.split()]
    command += ["--distribute"] * (processes > 0)
    with tempfile.TemporaryDirectory() as folder:
        options, started = {"cwd": folder, "stdout": subprocess.PIPE, "text": True}, []
        for rank in range(processes or 1):
            group = {**variables, "PROCESS_ID": f"{rank}"} if processes else {}
            group = {f"KERAS_DISTRIBUTION_{name}": value for name, value in group.items()}
            environment = {**os.environ, "KERAS_BACKEND": "jax", "NPROC": "1", **group}
            started.append(subprocess.Popen(command, env=environment, **options))
        shown, *_ = [process.communicate()[0] for process in started]
    rates = re.findall(r"([\d,]+) sequences/s", shown)[1:]
    return statistics.median(int(rate.replace(",", "")) for rate in rates) / BATCH


for size in SIZES:
    rounds = [{count: train(size, count) for count in (0, 1, 2, 4)} for _ in range(ROUNDS)]
    print(f"{size}, batches of {BATCH} user names, {os.cpu_count()} cores")
    for count in rounds[0]:
        rate = statistics.median(figures[count] for figures in rounds)
        ratio = statistics.median(figures[count] / figures[0] for figures in rounds)
        print(f"{rate:12.1f} steps/s, × {ratio:.2f}: {count or 'no'} processes in a group")
