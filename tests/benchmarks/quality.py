"""Compares train.py's defaults with a Markov chain on lists of several sizes.

    python tests/benchmarks/quality.py NAMES.TXT MOLECULES.TXT … [--sizes 100 1000] [--seeds 3]

Prints for each list and size the held-out loss in nats per character on 1,500 other
sequences of the list, as the mean over random samples and, in brackets, the largest
difference between two of them: of an interpolated Kneser-Ney chain, the best of orders 2 to 6,
of `train.py --sequence_path LIST`, and of the same with `--init_from` the shipped user names.
"""

import argparse
import collections
import math
import pathlib
import random
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from loaders import find_loader  # noqa: E402 - found by the line above

SHIPPED = ROOT / "pre_trained_models" / "user_names_10000.h5"
HELD_OUT = 1500
END = "\n"


class Chain:
    """A Markov chain over characters with interpolated Kneser-Ney smoothing.

    As in Chen and Goodman (1999): the highest order counts how often a character
    follows a context, the lower ones after how many characters it does, and each order's
    discount is n1 / (n1 + 2 n2), of how many counts are 1 and 2.
    """

    def __init__(self, sequences, order):
        self.alphabet = {END}.union(*sequences)
        self.order = order
        counts = collections.Counter(gram for text in sequences for gram in self.grams(text, order))
        self.levels = []  # the highest order first
        while True:
            followers = collections.defaultdict(dict)
            for gram, count in counts.items():
                followers[gram[:-1]][gram[-1]] = count
            ones, twos = (sum(count == n for count in counts.values()) for n in (1, 2))
            self.levels.append((followers, ones / (ones + 2 * twos) if ones else 0.5))
            if len(self.levels) == order:
                break
            counts = collections.Counter(gram[1:] for gram in counts)

    def grams(self, text, order):
        """Yields the `order` characters up to each character of a text and up to its end."""
        padded = "\0" * (order - 1) + text + END
        return (padded[place : place + order] for place in range(len(text) + 1))

    def probability(self, gram, level=0):
        """Returns how likely the last character of a str follows what is before it."""
        if level == self.order:
            return 1 / len(self.alphabet)
        shorter = self.probability(gram[1:], level + 1)
        followers, discount = self.levels[level]
        found = followers.get(gram[:-1])
        if not found:
            return shorter
        left = max(found.get(gram[-1], 0) - discount, 0) + discount * len(found) * shorter
        return left / sum(found.values())

    def loss(self, sequences):
        """Returns the nats per character of sequences whose characters it knows."""
        known = [text for text in sequences if self.alphabet.issuperset(text)]
        grams = [gram for text in known for gram in self.grams(text, self.order)]
        return -sum(math.log(self.probability(gram)) for gram in grams) / len(grams)


def measure(folder, *flags):
    """Trains on train.txt in a folder and returns the loss on test.txt there."""
    command = [sys.executable, ROOT / "train.py", "--sequence_path", folder / "train.txt"]
    command += ["--save_path", folder / "model.h5", "--overwrite", *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    command = [sys.executable, ROOT / "sample.py", "--weights_path", folder / "model.h5"]
    command += ["--score", folder / "test.txt"]
    told = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stderr
    return float(re.search(r"([\d.]+) nats per character", told)[1])


def main():
    parser = argparse.ArgumentParser(usage="quality.py LIST ... [--sizes N ...] [--seeds N]")
    parser.add_argument("lists", nargs="+", type=pathlib.Path)
    parser.add_argument("--sizes", nargs="+", type=int, default=[100, 200, 400, 1000, 3000])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    print("| list | lines | Kneser-Ney | train.py | with --init_from |\n|---|---|---|---|---|")
    for path in args.lists:
        sequences = sorted(set(find_loader(path)(path)))
        random.Random(0).shuffle(sequences)
        held_out, rest = sequences[:HELD_OUT], sequences[HELD_OUT:]
        for size in args.sizes:
            losses = []
            for seed in range(args.seeds):
                learned = random.Random(seed).sample(rest, size)
                with tempfile.TemporaryDirectory() as name:
                    folder = pathlib.Path(name)
                    for part, texts in ("train.txt", learned), ("test.txt", held_out):
                        (folder / part).write_text("\n".join(texts) + "\n", encoding="utf-8")
                    chain = min(Chain(learned, order).loss(held_out) for order in range(2, 7))
                    flags = "--seed", str(seed)
                    tuned = measure(folder, *flags, "--init_from", SHIPPED)
                    losses.append((chain, measure(folder, *flags), tuned))
            cells = [
                f"{sum(column) / len(column):.3f} ({max(column) - min(column):.3f})"
                for column in zip(*losses)
            ]
            print(f"| {path.stem} | {size:,} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
