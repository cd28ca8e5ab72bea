"""Times how fast sequences are invented, against PyTorch and Keras with the same weights.

    pip install -r tests/benchmarks/requirements.txt
    python tests/benchmarks/sampling.py [--weights_path PATH] [--against DIR]

Without a PATH it first trains 3 × 256 units on the shipped user names for two
epochs. DIR is another checkout, whose model.py invents in the same rounds. Every
figure is the median of several rounds, and each ratio the median of the ratios
within a round, because machines drift. All use two threads. PyTorch's build for
machines without a GPU is enough.
"""

import os

THREADS = 2
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = str(THREADS)  # read when the libraries are loaded
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import argparse  # noqa: E402
import importlib.util  # noqa: E402
import pathlib  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
RECIPE = (
    "train.py --sequence_path pre_trained_models/user_names_10000.csv "
    "--units 256 --layers 3 --batch_size 64 --learning_rate 0.003 --epochs 2 --save_path"
)
ONE_BY_ONE = 20


def load_model(folder, path):
    """Returns a `SequenceModel` of the model.py in a folder, and its metadata."""
    spec = importlib.util.spec_from_file_location(f"model in {folder}", folder / "model.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(path)


class Peer(torch.nn.Module):
    """The same network in PyTorch, made from a `SequenceModel`."""

    def __init__(self, trained):
        super().__init__()
        *lstm, kernel, bias = map(torch.from_numpy, trained.weights)
        characters, units, layers = len(trained.alphabet), len(kernel), len(lstm) // 3
        self.lstm = torch.nn.LSTM(characters, units, layers, batch_first=True)
        self.dense = torch.nn.Linear(units, characters)
        values = dict(self.named_parameters())
        with torch.no_grad():
            for layer in range(layers):
                values[f"lstm.weight_ih_l{layer}"].copy_(lstm[3 * layer].T)
                values[f"lstm.weight_hh_l{layer}"].copy_(lstm[3 * layer + 1].T)
                values[f"lstm.bias_ih_l{layer}"].copy_(lstm[3 * layer + 2])
                values[f"lstm.bias_hh_l{layer}"].zero_()
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
    """Invents sequences as a PyTorch program would; those that ended may leave the batch.

    Returns how many characters and ends were drawn, an int.
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


def sample_in_keras(network, characters, alphabet_size):
    """Predicts a character after the other, all of the sequence so far at each call."""
    ids = [0]
    for _ in range(characters):
        network.predict(np.eye(alphabet_size, dtype=np.float32)[ids][None], verbose=0)
        ids = [*ids, 1] if len(ids) < 12 else [0]
    return characters


def sample_in_numpy(trained, count, times=1):
    """Invents sequences so many times, and returns how many characters and ends were drawn."""
    texts = [text for _ in range(times) for text in trained.sample(count=count)]
    return sum(len(text) + (len(text) < trained.max_len) for text in texts)


def multiply(square, result):
    """Multiplies two matrices, and returns how many floating-point operations that takes."""
    np.matmul(square, square, out=result)
    return 2 * len(square) ** 3


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights_path")
    parser.add_argument("--against", metavar="DIR", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--count", type=int, default=10_000)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        path = args.weights_path or os.path.join(folder, "names.h5")
        if not args.weights_path:
            subprocess.run([sys.executable, *RECIPE.split(), path], cwd=ROOT, check=True)
        import keras

        trained, metadata = load_model(ROOT, path)
        other, _ = load_model(args.against, path) if args.against else (None, None)
        network = keras.models.load_model(path)
    peer = Peer(trained)
    logits, _ = trained.read_prompt("Al")
    theirs, _ = peer.lstm(torch.eye(peer.characters)[[0, *trained.alphabet.encode("Al")]][None])
    np.testing.assert_allclose(logits, peer.dense(theirs[0, -1:]).detach(), atol=1e-4)
    square = np.random.default_rng(0).random((2048, 2048), np.float32)

    # Each returns how much it did.
    product, ours, single = "a product of 2048 × 2048", "ours", "ours, one by one"
    work = {
        product: (multiply, square, np.empty_like(square)),
        ours: (sample_in_numpy, trained, args.count),
        single: (sample_in_numpy, trained, 1, ONE_BY_ONE),
    }
    if other:
        work[f"{args.against}"] = sample_in_numpy, other, args.count
        work[f"{args.against}, one by one"] = sample_in_numpy, other, 1, ONE_BY_ONE
    for leave in (False, True):
        for size in (256, 1024, args.count):
            name = f"PyTorch, batch {size}" + ", ended ones leave" * leave
            work[name] = sample_in_torch, peer, args.count, size, trained.max_len, leave
    work["Keras predict, one by one"] = sample_in_keras, network, 24, peer.characters
    rounds = []
    for number in range(args.rounds + 1):  # the first only warms up
        rounds.append({})
        for name, (function, *arguments) in work.items():
            start = time.perf_counter()
            done = function(*arguments)
            rounds[-1][name] = done / (time.perf_counter() - start)
        print(f"round {number} of {args.rounds}", file=sys.stderr)

    def median(name, divisor=None):
        return statistics.median(r[name] / (r[divisor] if divisor else 1) for r in rounds[1:])

    print(f"{metadata['layers']} × {metadata['units']} units, {args.count:,} sequences")
    for name in list(work)[1:]:
        base = single if "one by one" in name else ours
        ratio = "" if name == base else f"; {base} is {median(base, name):.2f} times as fast"
        print(f"{median(name):12,.0f} characters/s  {name}{ratio}")
    # Operations a character: two for each weight but those that a one-hot row only selects.
    operations = 2 * sum(weights.size for weights in trained.weights[1:] if weights.ndim == 2)
    print(f"{median(product) / 1e9:12,.0f} GFLOP/s  {product}")
    print(f"{median(ours, product) * operations:12.2f}  of that while ours invents")


if __name__ == "__main__":
    main()
