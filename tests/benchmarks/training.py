"""Times how fast train.py learns, against Keras's own fit and against PyTorch.

    pip install -r tests/benchmarks/requirements.txt
    python tests/benchmarks/training.py [--against DIR] [--sizes NAME ...]

DIR is another checkout, whose train.py takes the place of the peers and of single
cores. NAME is one of small, words, names and wide, to measure only some of the
networks. Each program trains the same network on the same sequences in a
process of its own, on two cores or, where it says so, on one; a round runs all of
them one after the other. Every figure is the median over the rounds of the median
epoch after the first, and each ratio the median of the ratios within a round,
because machines drift. All apply dropout as train.py does by default, except where
it says "without". PyTorch's build for machines without a GPU is enough. Linux only.
"""

import argparse
import csv
import functools
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
LISTS = ROOT / "pre_trained_models"
CORES = 2
ON_JAX = " on JAX"
DROPOUT = 0.3
# The list and the flags of train.py for each network; the other programs read them too.
SIZES = {
    "small": (
        "frequent.txt",
        dict(num_sequences=1000, max_len=8, units=32, layers=3, batch_size=32, epochs=10),
    ),
    "words": ("words.txt", dict(max_len=32, units=128, layers=2, batch_size=32, epochs=6)),
    "names": ("names.txt", dict(max_len=40, units=128, layers=2, batch_size=32, epochs=5)),
    "wide": ("names.txt", dict(max_len=24, units=256, layers=3, batch_size=128, epochs=3)),
}
# What train.py would choose by the list, and what it would do besides learning.
FIXED = f"--dropout {DROPOUT} --recurrent_dropout 0 --validation_split 0".split()


def write_lists(folder):
    """Writes the lists of `SIZES` into a folder."""
    import wordfreq

    with open(LISTS / "user_names_10000.csv", encoding="utf-8", newline="") as file:
        names = [row[0] for row in csv.reader(file)][1:]
    words = (LISTS / "english_words_5000.txt").read_text(encoding="utf-8").split("\n")
    frequent = wordfreq.top_n_list("en", 1000)
    lists = {"frequent.txt": frequent, "words.txt": words, "names.txt": names}
    for name, lines in lists.items():
        pathlib.Path(folder, name).write_text("\n".join(lines), encoding="utf-8")


def read(path, size):
    """Returns one-hot inputs, targets and weights of all sequences, padded to one length."""
    import numpy as np

    lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")
    lines = [line[: size["max_len"]] for line in lines if line][: size.get("num_sequences")]
    alphabet = "\n" + "".join(sorted(set("".join(lines))))
    length = max(map(len, lines)) + 1
    rows = np.zeros((len(lines), length + 1), np.int64)
    for row, line in zip(rows, lines):
        row[1 : len(line) + 1] = [alphabet.index(character) for character in line]
    targets = np.array([[len(line) + 1] for line in lines])
    weights = (np.arange(length) < targets).astype(np.float32)
    return np.eye(len(alphabet), dtype=np.float32)[rows[:, :-1]], rows[:, 1:], weights


def train_in_keras(path, size):
    """Trains with stock Keras, without dropout: returns the seconds of each epoch."""
    import keras

    inputs, targets, weights = read(path, size)
    network = keras.Sequential([keras.Input((None, inputs.shape[2]))])
    for _ in range(size["layers"]):
        network.add(keras.layers.LSTM(size["units"], return_sequences=True))
    network.add(keras.layers.Dense(inputs.shape[2], activation="softmax"))
    network.compile("adam", "sparse_categorical_crossentropy")
    times = []
    clock = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: times.append(time.perf_counter()),
        on_epoch_end=lambda epoch, logs: times.append(time.perf_counter()),
    )
    options = {"batch_size": size["batch_size"], "epochs": size["epochs"], "callbacks": [clock]}
    network.fit(inputs, targets, sample_weight=weights, verbose=0, **options)
    return [end - start for start, end in zip(times[::2], times[1::2])], len(inputs)


def train_in_torch(path, size, trim, dropout):
    """Trains with a plain PyTorch loop: returns the seconds of each epoch."""
    import torch

    inputs, targets, weights = read(path, size)
    inputs, targets = torch.from_numpy(inputs), torch.from_numpy(targets)
    targets[torch.from_numpy(weights) == 0] = -100  # what cross_entropy ignores
    lengths = torch.from_numpy(weights).sum(1).long()
    characters, units = inputs.shape[2], size["units"]
    lstm = torch.nn.LSTM(characters, units, size["layers"], batch_first=True, dropout=dropout)
    last = torch.nn.Sequential(torch.nn.Dropout(dropout), torch.nn.Linear(units, characters))
    adam = torch.optim.Adam([*lstm.parameters(), *last.parameters()], 0.003)
    torch.set_num_threads(CORES)
    seconds = []
    for _ in range(size["epochs"]):
        start = time.perf_counter()
        for chosen in torch.randperm(len(inputs)).split(size["batch_size"]):
            longest = lengths[chosen].max() if trim else inputs.shape[1]
            logits = last(lstm(inputs[chosen, :longest])[0])
            goals = targets[chosen, :longest]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), goals.flatten())
            adam.zero_grad()
            loss.backward()
            adam.step()
        seconds.append(time.perf_counter() - start)
    return seconds, len(inputs)


PEERS = {
    "Keras fit, without": train_in_keras,
    "PyTorch, padded": functools.partial(train_in_torch, trim=False, dropout=DROPOUT),
    "PyTorch, trimmed": functools.partial(train_in_torch, trim=True, dropout=DROPOUT),
    "PyTorch, padded, without": functools.partial(train_in_torch, trim=False, dropout=0.0),
    "PyTorch, trimmed, without": functools.partial(train_in_torch, trim=True, dropout=0.0),
}


def run(*command, backend="tensorflow", folder=None, cores=CORES):
    """Runs Python and returns what it prints, a str, and the seconds that it took, a float."""
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment |= dict.fromkeys(threads, str(cores))
    bound = ["taskset", "--cpu-list", f"0-{cores - 1}", sys.executable, *command]
    options = {"env": environment, "cwd": folder, "capture_output": True, "text": True}
    start = time.perf_counter()
    process = subprocess.run(bound, **options)
    if process.returncode:
        sys.exit(process.stderr)
    return process.stdout, time.perf_counter() - start


def time_peer(name, path, size):
    """Returns a peer's sequences a second after the first epoch."""
    shown, _ = run(__file__, "--peer", name, path, json.dumps(size))
    seconds, count = json.loads(shown)
    return count / statistics.median(seconds[1:])


def make_command(folder, path, size):
    """Returns the command line, a list of str, of the train.py in a folder."""
    flags = (str(part) for name, value in size.items() for part in (f"--{name}", value))
    return [f"{folder}/train.py", "--sequence_path", path, "--overwrite", *flags]


def time_ours(folder, path, size, **options):
    """Returns train.py's sequences a second after the first epoch, as it prints them."""
    command = make_command(folder, path, size)
    with tempfile.TemporaryDirectory() as place:
        shown, _ = run(*command, *FIXED, folder=place, **options)
    rates = re.findall(r"- ([\d,]+) sequences/s", shown)[1:]
    return statistics.median(int(rate.replace(",", "")) for rate in rates)


def measure(count, programs):
    """Runs each of the functions in a dict so many times, and returns a dict of results a round."""
    rounds = []
    for number in range(count):
        rounds.append({name: program() for name, program in programs.items()})
        print(f"round {number + 1} of {count}", file=sys.stderr)
    return rounds


def report(rounds, base, unit, digits=0):
    """Prints the median of each figure, and how many times as large that of `base` is.

    A figure on JAX is compared with that of `base` on JAX.
    """
    for name in rounds[0]:
        ours = base + ON_JAX if ON_JAX in name else base
        ratio = statistics.median(figures[ours] / figures[name] for figures in rounds)
        figure = statistics.median(figures[name] for figures in rounds)
        compared = "" if name == ours else f"; {ours}: {ratio:.2f} times that"
        print(f"{figure:12,.{digits}f} {unit}  {name}{compared}")


def report_share(rounds, path, size):
    """Prints how much of the speed of a product of two matrices train.py has."""
    import numpy as np

    inputs, _, weights = read(path, size)
    units, layers, characters = size["units"], size["layers"], inputs.shape[2]
    matrices = 4 * units * (characters + (2 * layers - 1) * units) + units * characters
    operations = 6 * matrices * weights.sum() / len(weights)
    square = np.random.default_rng(0).random((2048, 2048), np.float32)
    times, result = [time.perf_counter()], np.empty_like(square)
    for _ in range(9):
        np.matmul(square, square, out=result)
        times.append(time.perf_counter())
    product = 2 * 2048**3 / statistics.median(np.diff(times)[1:])
    rate = statistics.median(figures["train.py"] for figures in rounds)
    print(f"{product / 1e9:12,.0f}  GFLOP/s, a product of two matrices of 2048 × 2048")
    print(f"{rate * operations / product:12.2f}  of that in train.py, padding not counted")


def name_processor():
    """Returns the name of the processor, a str."""
    return re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())[1]


def main():
    """Prints the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--against", metavar="DIR", type=os.path.abspath)
    parser.add_argument("--sizes", choices=SIZES, nargs="+", default=SIZES)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_lists(folder)
        for name in args.sizes:
            file, size = SIZES[name]
            path = os.path.join(folder, file)
            programs = {}
            for end, backend in ("", "tensorflow"), (ON_JAX, "jax"):
                ours = functools.partial(time_ours, ROOT, path, size, backend=backend)
                programs[f"train.py{end}"] = ours
                if args.against:
                    other = functools.partial(time_ours, args.against, path, size, backend=backend)
                    programs[f"{args.against}/train.py{end}"] = other
                else:
                    programs[f"train.py{end}, one core"] = functools.partial(ours, cores=1)
            programs |= (
                {}
                if args.against
                else {peer: functools.partial(time_peer, peer, path, size) for peer in PEERS}
            )
            print(f"{name}: {size}, {name_processor()}", flush=True)
            rounds = measure(args.rounds, programs)
            report(rounds, "train.py", "sequences/s")
            report_share(rounds, path, size)
        programs = {"import keras": lambda: run("-c", "import keras")[1]}
        file, size = SIZES["small"]
        for place in filter(None, (ROOT, args.against)):
            command = make_command(place, os.path.join(folder, file), size)
            for end, backend in ("", "tensorflow"), (ON_JAX, "jax"):
                whole = functools.partial(run, *command, backend=backend, folder=folder)
                programs[f"{place}/train.py{end}"] = lambda whole=whole: whole()[1]
        print("the training command of the README's quick start, as a whole process")
        report(measure(3 * args.rounds, programs), f"{ROOT}/train.py", "s", digits=2)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        _, _, peer, path, size = sys.argv
        print(json.dumps(PEERS[peer](path, json.loads(size))))
    else:
        main()
