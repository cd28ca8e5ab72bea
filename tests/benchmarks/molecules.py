"""Learns molecules and compares what it invents with MOSES (Polykovskiy et al. 2020).

    KERAS_BACKEND=jax python tests/benchmarks/molecules.py train.csv.gz test.csv.gz DIR \
        --units 256 --batch_size 64 --dropout 0 --learning_rate 0.005 --epochs 3

The lists are the benchmark's own, which the source distribution of `molsets` 0.3.1 on PyPI
holds in moses/dataset/data. The flags after DIR, where the model is kept, are train.py's, but
for `--temperature`, which is sample.py's. Training takes hours; after Ctrl-C, or
`timeout -s INT 1h`, the same command goes on with it.
"""

import argparse
import functools
import multiprocessing
import pathlib
import subprocess
import sys

import numpy as np
from rdkit import Chem, RDLogger
from rdkit.Chem.Descriptors import MolWt

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from loaders import UserNameLoader  # noqa: E402 - found by the line above

COUNT = 30_000  # molecules that MOSES asks for
PAPER = {"valid": 0.9748, "unique of 1,000": 1.0, "unique of 10,000": 0.9994, "novel": 0.8419}


def canonize(smiles):
    """Returns the canonical spelling of a molecule and its weight, or None if it is not one."""
    molecule = Chem.MolFromSmiles(smiles)
    if molecule is not None and molecule.GetNumAtoms():
        return Chem.MolToSmiles(molecule), MolWt(molecule)
    return None


def distance(some, others):
    """Returns the Wasserstein distance of two samples of numbers."""
    shares = np.linspace(0, 1, 10_001)
    return np.abs(np.quantile(some, shares) - np.quantile(others, shares)).mean()


def measure(invented, learned, others, workers):
    """Returns a dict of the metrics of MOSES, given three iterables of SMILES."""
    canonize_all = functools.partial(workers.imap, canonize, chunksize=1000)
    valid = list(filter(None, canonize_all(invented)))
    spellings = [spelling for spelling, _ in valid]
    # It spells them as the RDKit of its day did.
    known = {spelling for spelling, _ in filter(None, canonize_all(learned))}
    different = set(spellings)
    found = {"valid": len(valid) / COUNT}
    for count in (1000, 10_000):
        found[f"unique of {count:,}"] = len(set(spellings[:count])) / len(spellings[:count])
    found["novel"] = len(different - known) / len(different)
    held_out = list(filter(None, canonize_all(others)))
    names = "length in characters", "weight in g/mol"
    sizes = [([len(text) for text, _ in each], [w for _, w in each]) for each in (valid, held_out)]
    for name, ours, theirs in zip(names, *sizes):
        found[f"distance of {name}"] = distance(ours, theirs)
    return found


def main():
    parser = argparse.ArgumentParser(usage="molecules.py TRAIN TEST DIR [train.py's flags]")
    for name in ("train", "test", "folder"):
        parser.add_argument(name, type=pathlib.Path)
    parser.add_argument("--temperature", default="1")
    args, flags = parser.parse_known_args()
    args.folder.mkdir(exist_ok=True, parents=True)
    path, samples = args.folder / "molecules.h5", args.folder / "invented.txt"
    command = [sys.executable, ROOT / "train.py", "--sequence_path", args.train]
    status = subprocess.run([*command, "--save_path", path, *flags]).returncode
    if status:
        sys.exit(status)
    command = [sys.executable, ROOT / "sample.py", "--weights_path", path, "--prompt", ""]
    command += ["--num_samples", str(COUNT), "--seed", "0", "--output", samples]
    command += ["--temperature", args.temperature]
    subprocess.run(command, check=True)
    RDLogger.DisableLog("rdApp.*")
    with multiprocessing.Pool() as workers:
        lists = UserNameLoader(args.train), UserNameLoader(args.test)
        invented = samples.read_text(encoding="utf-8").split("\n")[:-1]
        found = measure(invented, *lists, workers)
    print("| | train.py | CharRNN of the paper |\n|---|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value:.4f} | {PAPER.get(name, '')} |")


if __name__ == "__main__":
    main()
