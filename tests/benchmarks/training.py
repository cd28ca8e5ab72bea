"""Times how fast train.py learns, against Keras's own fit and against PyTorch.

    pip install -r tests/benchmarks/requirements.txt
    python tests/benchmarks/training.py [SPLITS]

Each peer trains the same network on the same sequences in a process of its own,
with two threads; a round runs all of them one after the other. Every figure is
the median over the rounds of the median epoch after the first, and each ratio
the median of the ratios within a round, because machines drift. train.py drops
units out as it does by default; the peers, which that would slow down several
times, don't. PyTorch's build for machines without a GPU is enough.

SPLITS is a folder with english_words_train.txt, english_words_test.txt,
user_names_train.csv and user_names_test.csv. With it, the last lines are how long
train.py takes, from start to exit, to learn the first of each pair so well that
it predicts the second with the given loss.
"""

import csv
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
THREADS = "2"
NAMES = ROOT / "pre_trained_models" / "user_names_10000.csv"
ROUNDS = 3
# The command line of train.py for each size, and what the peers need to know of it.
SIZES = {
    "3 × 32, batch 32": (
        "--num_sequences 1000 --max_len 8 --units 32 --layers 3 --batch_size 32 --epochs 10",
        {"units": 32, "layers": 3, "batch": 32, "max_len": 8, "epochs": 10, "count": 1000},
    ),
    "3 × 256, batch 128": (
        "--max_len 24 --units 256 --layers 3 --batch_size 128 --learning_rate 0.003 --epochs 3",
        {"units": 256, "layers": 3, "batch": 128, "max_len": 24, "epochs": 3, "count": None},
    ),
}
REACH = {
    "english_words": (2.13, "test.txt", "train.txt", "--epochs 5"),
    "user_names": (2.91, "test.csv", "train.csv", "--loader_class UserNameLoader --epochs 2"),
}


def read(path, size):
    """Returns one-hot inputs, targets and weights of all sequences, padded to one length."""
    import numpy as np

    with open(path, encoding="utf-8") as file:
        lines = file.read().split("\n")[: size["count"]]
    lines = [line[: size["max_len"]] for line in lines if line]
    alphabet = "\n" + "".join(sorted(set("".join(lines))))
    length = max(map(len, lines)) + 1
    rows = np.zeros((len(lines), length + 1), np.int64)
    for row, line in zip(rows, lines):
        row[1 : len(line) + 1] = [alphabet.index(character) for character in line]
    targets = np.array([[len(line) + 1] for line in lines])
    weights = (np.arange(length) < targets).astype(np.float32)
    return np.eye(len(alphabet), dtype=np.float32)[rows[:, :-1]], rows[:, 1:], weights


def train_in_keras(path, size):
    """Trains with stock Keras and its default settings: returns the seconds of each epoch."""
    import keras

    inputs, targets, weights = read(path, size)
    network = keras.Sequential([keras.Input((None, inputs.shape[2]))])
    for _ in range(size["layers"]):
        network.add(keras.layers.LSTM(size["units"], return_sequences=True))
    network.add(keras.layers.Dense(inputs.shape[2], activation="softmax"))
    network.compile("adam", "sparse_categorical_crossentropy")
    times = []
    times_epochs = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: times.append(time.perf_counter()),
        on_epoch_end=lambda epoch, logs: times.append(time.perf_counter()),
    )
    network.fit(
        inputs,
        targets,
        batch_size=size["batch"],
        epochs=size["epochs"],
        sample_weight=weights,
        verbose=0,
        callbacks=[times_epochs],
    )
    return [end - start for start, end in zip(times[::2], times[1::2])], len(inputs)


def train_in_torch(path, size, trim=False):
    """Trains with a plain PyTorch loop: returns the seconds of each epoch."""
    import torch

    inputs, targets, weights = read(path, size)
    inputs, targets = torch.from_numpy(inputs), torch.from_numpy(targets)
    targets[torch.from_numpy(weights) == 0] = -100  # what cross_entropy ignores
    lengths = torch.from_numpy(weights).sum(1).long()
    characters, units = inputs.shape[2], size["units"]
    lstm = torch.nn.LSTM(characters, units, size["layers"], batch_first=True)
    dense = torch.nn.Linear(units, characters)
    adam = torch.optim.Adam([*lstm.parameters(), *dense.parameters()], 0.003)
    torch.set_num_threads(int(THREADS))
    seconds = []
    for _ in range(size["epochs"]):
        start = time.perf_counter()
        for chosen in torch.randperm(len(inputs)).split(size["batch"]):
            longest = lengths[chosen].max() if trim else inputs.shape[1]
            logits = dense(lstm(inputs[chosen, :longest])[0])
            goals = targets[chosen, :longest]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), goals.flatten())
            adam.zero_grad()
            loss.backward()
            adam.step()
        seconds.append(time.perf_counter() - start)
    return seconds, len(inputs)


PEERS = {
    "Keras fit": train_in_keras,
    "PyTorch": train_in_torch,
    "PyTorch, trimmed": lambda path, size: train_in_torch(path, size, trim=True),
}


def environment(backend="tensorflow"):
    """Returns the environment of a process of this benchmark."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return {
        **os.environ,
        **dict.fromkeys(names, THREADS),
        "KERAS_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def time_peer(name, path, size):
    """Returns a peer's sequences a second after the first epoch."""
    process = subprocess.run(
        [sys.executable, __file__, "--peer", name, path, json.dumps(size)],
        env=environment(),
        check=True,
        capture_output=True,
        text=True,
    )
    seconds, count = json.loads(process.stdout)
    return count / statistics.median(seconds[1:])


def time_ours(path, flags, backend):
    """Returns train.py's sequences a second after the first epoch, as it prints them."""
    with tempfile.TemporaryDirectory() as folder:
        save = ["--save_path", os.path.join(folder, "model.h5"), "--validation_split", "0"]
        process = subprocess.run(
            [sys.executable, ROOT / "train.py", *flags.split(), "--sequence_path", path, *save],
            env=environment(backend),
            check=True,
            capture_output=True,
            text=True,
        )
    rates = re.findall(r"([\d,]+) sequences/s", process.stdout)[1:]
    return statistics.median(int(rate.replace(",", "")) for rate in rates)


def time_process(*command, folder=None):
    """Returns how many seconds a process takes, and what it prints on both streams."""
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, *command],
        env=environment(),
        check=True,
        capture_output=True,
        text=True,
        cwd=folder,
    )
    return time.perf_counter() - start, process.stdout + process.stderr


def time_product():
    """Returns how many floating-point operations a second a product of two matrices makes."""
    import numpy as np

    square = np.random.default_rng(0).random((2048, 2048), np.float32)
    result = np.empty_like(square)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        np.matmul(square, square, out=result)
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / statistics.median(times[1:])


def report(rounds, ours, theirs):
    """Prints how many times as fast one thing is as another."""
    ratio = statistics.median(figures[ours] / figures[theirs] for figures in rounds)
    print(f"{ratio:12.2f}  {ours} / {theirs}")


def main():
    """Prints the tables."""
    import wordfreq

    with tempfile.TemporaryDirectory() as folder:
        words, names = (os.path.join(folder, name) for name in ("words.txt", "names.txt"))
        with open(words, "w", encoding="utf-8") as file:
            file.write("\n".join(wordfreq.top_n_list("en", 1000)))
        with open(NAMES, encoding="utf-8") as file, open(names, "w", encoding="utf-8") as text:
            text.write("\n".join(row[0] for row in list(csv.reader(file))[1:]))

        for title, path in zip(SIZES, (words, names)):
            flags, size = SIZES[title]
            rounds = []
            for number in range(ROUNDS):
                figures = {
                    "train.py": time_ours(path, flags, "tensorflow"),
                    "train.py on JAX": time_ours(path, flags, "jax"),
                }
                figures |= {name: time_peer(name, path, size) for name in PEERS}
                rounds.append(figures)
                print(f"round {number + 1} of {ROUNDS}", file=sys.stderr)
            print(f"{title}, {size['max_len']} characters at most")
            for name in rounds[0]:
                rate = statistics.median(figures[name] for figures in rounds)
                print(f"{rate:12,.0f}  sequences/s, {name}")
            for ours in ("train.py", "train.py on JAX"):
                for theirs in PEERS:
                    report(rounds, ours, theirs)
        inputs, _, weights = read(names, size)
        units, layers, characters = size["units"], size["layers"], inputs.shape[2]
        matrices = 4 * units * (characters + (2 * layers - 1) * units) + units * characters
        operations = 6 * matrices * weights.sum() / len(weights)
        rate = statistics.median(figures["train.py"] for figures in rounds)
        product = time_product()
        print(f"{product / 1e9:12,.0f}  GFLOP/s, a product of two matrices of 2048 × 2048")
        print(f"{rate * operations / product:12.2f}  of that in train.py, padding not counted")

        rounds = []
        contract = [ROOT / "train.py", *SIZES["3 × 32, batch 32"][0].split()]
        contract += ["--sequence_path", words, "--sentinel", " ", "--overwrite"]
        for _ in range(9):
            keras, _ = time_process("-c", "import keras", folder=folder)
            ours, _ = time_process(*contract, folder=folder)
            rounds.append({"train.py, 10 epochs": ours, "import keras": keras})
        for name in rounds[0]:
            print(f"{statistics.median(figures[name] for figures in rounds):12.2f}  s, {name}")
        report(rounds, "train.py, 10 epochs", "import keras")

        for name, (target, test, train, flags) in REACH.items() if sys.argv[1:] else ():
            data = os.path.abspath(os.path.join(sys.argv[1], name))
            save = os.path.join(folder, f"{name}.h5")
            seconds, _ = time_process(
                ROOT / "train.py", "--sequence_path", f"{data}_{train}", "--save_path", save,
                *flags.split(), folder=folder,
            )  # fmt: skip
            _, shown = time_process(
                ROOT / "sample.py", "--weights_path", save, "--score", f"{data}_{test}"
            )
            loss = re.findall(r"[\d.]+ nats", shown)[-1]
            print(f"{seconds:12.1f}  s, {name}, {flags}: {loss} (asked for {target})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        _, _, peer, path, size = sys.argv
        print(json.dumps(PEERS[peer](path, json.loads(size))))
    else:
        main()
