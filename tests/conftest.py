"""What several test modules need: the scripts as a user runs them, data and models."""

import hashlib
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys

# Threads that wait for each other would take most of the time of products this small. It must
# be said before NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import h5py
import numpy as np
import pexpect
import pytest

import model
from model import Alphabet, SequenceModel

# Importing TensorFlow would set another one, which train.py would inherit.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
# A shell makes what it starts in the background ignore Ctrl-C, and so would the scripts then.
signal.signal(signal.SIGINT, signal.default_int_handler)
# How often runs are killed. A longer harness: KILLS=20 python -m pytest -m slow
KILLS = int(os.environ.get("KILLS", "4"))
ROOT = pathlib.Path(__file__).resolve().parent.parent
PRE_TRAINED = ROOT / "pre_trained_models"
CONTRACT = (
    "train.py --loader_class 'SequenceLoader' --sequence_path 'sequences.txt' "
    "--num_sequences 1000 --max_len 8 --sentinel ' ' --units 32 --layers 3 --batch_size 32 "
    "--epochs 10 --save_path 'incognito_model.h5'"
)
JAX = {**os.environ, "KERAS_BACKEND": "jax"}


def decode(corpus):
    """Returns the sequences of a corpus, a list of str."""
    parts = np.split(corpus.targets, corpus.starts[1:])
    return [corpus.alphabet.decode(ids[ids > 0]) for ids in parts]


def run(script, *arguments, **options):
    """Runs a script of the project with text pipes and returns the finished process."""
    return subprocess.run(
        [sys.executable, ROOT / script, *map(str, arguments)],
        **{"capture_output": True, "encoding": "utf-8", "timeout": 300, **options},
    )


def start(script, *arguments, **options):
    """Starts a script of the project with text pipes and returns the process."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, ROOT / script, *map(str, arguments)],
        **{**pipes, "encoding": "utf-8", **options},
    )


def wait_for_line(process, beginning):
    """Reads what a process prints up to the first line that begins so."""
    while not process.stdout.readline().startswith(beginning):
        assert process.poll() is None, process.communicate()


def terminal(script, *arguments, columns=80, term="dumb", **options):
    """Starts a script of the project on a terminal of its own; returns a `pexpect.spawn`."""
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    return pexpect.spawn(
        sys.executable,
        [str(ROOT / script), *map(str, arguments)],
        dimensions=(24, columns),
        **{"encoding": "utf-8", "timeout": 60, "env": {**kept, "TERM": term}, **options},
    )


def finish(child):
    """Waits for a script on a terminal to end; returns what it still showed and its status."""
    child.expect(pexpect.EOF)
    return child.before, child.wait()


def assert_refused(process, message):
    """Asserts that a run failed as a user's mistake should, with a message, a pattern."""
    assert process.returncode == 2
    assert re.fullmatch(rf"\w+\.py: error: .*{message}.*\n", process.stderr)
    assert not process.stdout or "train.py" in process.stderr


@pytest.fixture
def refuse(tmp_path, capsys):
    """Calls a script, `train` or `sample`, that must refuse its arguments; returns its one line.

    It must touch no file of the test's folder either.
    """

    def read_files():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def refuse(script, *arguments):
        before = read_files()
        with pytest.raises(SystemExit) as end:
            script.main([*map(str, arguments)])
        out, err = capsys.readouterr()
        assert (end.value.code, out) == (2, "")
        assert re.fullmatch(rf"{script.__name__}\.py: error: .*\n", err)
        assert read_files() == before
        return err

    return refuse


def edit_metadata(path, **changes):
    """Changes the metadata in a model's file."""
    with h5py.File(path, "r+") as file:
        metadata = json.loads(file.attrs[model.METADATA]) | changes
        file.attrs[model.METADATA] = np.bytes_(json.dumps(metadata))


def read_arrays(path):
    """All arrays in an HDF5 file, by their whole names."""
    names = []
    with h5py.File(path) as file:
        file.visit(names.append)
        return {name: file[name][()] for name in names if isinstance(file[name], h5py.Dataset)}


def read_all(path):
    """Everything in a model's file that training decides, as comparable values."""
    _, metadata = model.load(path)
    # Hashes, because pytest would take minutes to compare long bytes that differ.
    arrays = read_arrays(path).items()
    return metadata, {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays}


def write_sequences(folder):
    """Writes sequences.txt, a few hundred different sequences to learn from."""
    rng = np.random.default_rng(0)
    names = ["".join(rng.choice(list("aeioukstmn"), rng.integers(3, 9))) for _ in range(300)]
    (folder / "sequences.txt").write_text("\n".join(names), encoding="utf-8")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a few hundred sequences to learn from, the current one of the test."""
    write_sequences(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder in which the contract's train command has run, and the finished process."""
    import wordfreq

    folder = tmp_path_factory.mktemp("trained")
    words = wordfreq.top_n_list("en", 1000)
    (folder / "sequences.txt").write_text("\n".join(words), encoding="utf-8")
    process = run(*shlex.split(CONTRACT), cwd=folder)
    assert process.returncode == 0, process.stderr
    return folder, process


def random_model(alphabet, units=8, layers=2, max_len=6, seed=0, scale=1.0):
    """A model that learned nothing, but has decided opinions."""
    rng = np.random.default_rng(seed)
    shapes = model.weight_shapes(len(alphabet), units, layers)
    weights = [(scale * rng.standard_normal(shape)).astype(np.float32) for shape in shapes.values()]
    return SequenceModel(Alphabet(alphabet), max_len, weights)


def predict(trained, text):
    """The distributions of a model after the sentinel and each character of a text, one a row."""
    state, ids = trained.start(), [0, *trained.alphabet.encode(text)]
    logits = [trained.step(np.array([index]), state)[0] for index in ids]
    return model.distribution(np.array(logits))


def enumerate_sequences(trained, prompt="", max_len=None, **shape):
    """Every sequence that a model can invent, with its probability, by brute force."""
    probabilities = {}

    def visit(text, probability):
        if len(text) == (max_len or trained.max_len):
            probabilities[text] = probability
            return
        state = trained.start()
        for index in (0, *trained.alphabet.encode(text)):
            logits = trained.follow(np.array([index]), state)
        following = model.distribution(logits[0])
        if not text:  # no sequence is empty
            following[0] = 0
        with np.errstate(divide="ignore"):
            following = model.distribution(np.log(following / following.sum()), **shape)
        for symbol, share in zip(trained.alphabet.symbols, following):
            if share and symbol == trained.alphabet.sentinel:
                probabilities[text] = probability * share
            elif share:
                visit(text + symbol, probability * share)

    visit(prompt, 1.0)
    return probabilities
