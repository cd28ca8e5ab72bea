"""Times how fast sequences are invented, against PyTorch and Keras with the same weights.

    pip install -r tests/benchmarks/requirements.txt
    python tests/benchmarks/sampling.py [WEIGHTS_PATH]

Without a WEIGHTS_PATH it first trains 3 × 256 units on the shipped user names
for two epochs. Every figure is the median of several rounds, and each ratio the
median of the ratios within a round, because machines drift. All use two threads.
PyTorch's build for machines without a GPU is enough.
"""

import os

THREADS = 2
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = str(THREADS)  # read when the libraries are loaded
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import pathlib  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import model  # noqa: E402 - found by the line above

RECIPE = (
    "train.py --loader_class UserNameLoader "
    "--sequence_path pre_trained_models/user_names_10000.csv "
    "--units 256 --layers 3 --batch_size 64 --learning_rate 0.003 --epochs 2 --save_path"
)
ROUNDS = 7
COUNT = 10_000


class Peer(torch.nn.Module):
    """The same network in PyTorch.

    Args:
        trained: `model.SequenceModel`.
    """

    def __init__(self, trained):
        super().__init__()
        *lstm, kernel, bias = map(torch.from_numpy, trained.weights)
        characters, units, layers = len(trained.alphabet), len(kernel), len(lstm) // 3
        self.lstm = torch.nn.LSTM(characters, units, layers, batch_first=True)
        self.dense = torch.nn.Linear(units, characters)
        with torch.no_grad():
            for layer in range(layers):
                mine = (
                    getattr(self.lstm, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh")
                )
                for ours, theirs in zip(mine, lstm[3 * layer :]):
                    ours.copy_(theirs.T)
                getattr(self.lstm, f"bias_ih_l{layer}").copy_(lstm[3 * layer + 2])
                getattr(self.lstm, f"bias_hh_l{layer}").zero_()
            self.dense.weight.copy_(kernel.T)
            self.dense.bias.copy_(bias)
        self.characters = characters

    def forward(self, ids, state):
        """Reads one character of each sequence: returns logits and the new state."""
        one_hot = torch.nn.functional.one_hot(ids, self.characters).float()
        output, state = self.lstm(one_hot[:, None], state)
        return self.dense(output[:, 0]), state


@torch.inference_mode()
def sample_in_torch(peer, count, batch, max_len, leave):
    """Invents sequences as a PyTorch program would.

    Args:
        peer: `Peer`.
        count: int, how many sequences.
        batch: int, how many at a time.
        max_len: int, the longest sequence.
        leave: bool, whether those that have ended leave the batch.

    Returns:
        Int, how many characters and ends were drawn.
    """
    drawn = 0
    for start in range(0, count, batch):
        rows = min(batch, count - start)
        ids, state = torch.zeros(rows, dtype=torch.long), None
        going_on = torch.ones(rows, dtype=torch.bool)
        for _ in range(max_len):
            logits, state = peer(ids, state)
            ids = torch.multinomial(torch.softmax(logits, dim=1), 1)[:, 0]
            drawn += int(going_on.sum())
            going_on = going_on & (ids > 0)
            if not going_on.any():
                break
            if leave:
                state = tuple(part[:, going_on] for part in state)
                ids, going_on = ids[going_on], going_on[going_on]
    return drawn


def sample_in_keras(network, trained, characters):
    """Predicts a character after the other, all of the sequence so far at each call."""
    ids = [0]
    for _ in range(characters):
        one_hot = np.eye(len(trained.alphabet), dtype=np.float32)[ids]
        network.predict(one_hot[None], verbose=0)
        ids = [*ids, 1] if len(ids) < 12 else [0]


def count_drawn(trained, texts):
    """Returns how many characters and ends were drawn for these texts, an int."""
    return sum(len(text) + (len(text) < trained.max_len) for text in texts)


def time_it(function):
    """Returns what a function returns, and how many seconds it took."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def main():
    """Prints the table."""
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        path = sys.argv[1] if len(sys.argv) > 1 else os.path.join(folder, "names.h5")
        if len(sys.argv) < 2:
            subprocess.run([sys.executable, *RECIPE.split(), path], cwd=ROOT, check=True)
        import keras

        trained, metadata = model.load(path)
        network = keras.models.load_model(path)
    peer = Peer(trained)
    logits, _ = trained.read("Al")
    theirs, _ = peer.lstm(torch.eye(peer.characters)[[0, *trained.alphabet.encode("Al")]][None])
    np.testing.assert_allclose(logits, peer.dense(theirs[0, -1:]).detach(), atol=1e-4)

    # Operations a character: two for each weight but those that a one-hot row only selects.
    operations = 2 * sum(weights.size for weights in trained.weights[1:] if weights.ndim == 2)
    square = np.random.default_rng(0).random((2048, 2048), np.float32)
    result = np.empty_like(square)
    sizes = (256, 1024, COUNT)
    one_by_one = 20

    rounds = []
    for number in range(ROUNDS + 1):  # the first only warms up
        figures = {}
        _, seconds = time_it(lambda: np.matmul(square, square, out=result))
        peak = 2 * 2048**3 / seconds
        texts, seconds = time_it(lambda: list(trained.sample(count=COUNT)))
        figures["ours"] = count_drawn(trained, texts) / seconds
        figures["share"] = figures["ours"] * operations / peak
        figures["peak"] = peak / 1e9
        for leave in (False, True):
            for size in sizes:
                drawn, seconds = time_it(
                    lambda size=size, leave=leave: sample_in_torch(
                        peer, COUNT, size, trained.max_len, leave
                    )
                )
                name = "torch, ended ones leave" if leave else "torch"
                figures[f"{name}, batch {size}"] = drawn / seconds
        texts, seconds = time_it(
            lambda: [text for _ in range(one_by_one) for text in trained.sample()]
        )
        figures["ours, one by one"] = count_drawn(trained, texts) / seconds
        _, seconds = time_it(lambda: sample_in_keras(network, trained, 24))
        figures["keras predict"] = 24 / seconds
        rounds.append(figures)
        print(f"round {number} of {ROUNDS}", file=sys.stderr)

    def median(name):
        return statistics.median(figures[name] for figures in rounds[1:])

    def report(name, ours):
        ratio = statistics.median(figures[ours] / figures[name] for figures in rounds[1:])
        print(f"{median(name):12,.0f} characters/s  {name}; {ours} is {ratio:.2f} times as fast")

    print(f"{metadata['layers']} × {metadata['units']} units, {COUNT:,} sequences")
    print(f"{median('ours'):12,.0f} characters/s  ours")
    for name in rounds[0]:
        if name.startswith("torch"):
            report(name, "ours")
    print(f"{median('ours, one by one'):12,.0f} characters/s  ours, one by one")
    report("keras predict", "ours, one by one")
    print(f"{median('peak'):12,.0f} GFLOP/s  a product of two matrices of 2048 × 2048")
    print(f"{median('share'):12.2f}  of that while ours invents")


if __name__ == "__main__":
    main()
