"""Whatever stops a run, and whenever: the file is a good one, and the same command goes on."""

import functools
import os
import pathlib
import random
import re
import signal
import subprocess
import sys

import pytest
from conftest import KILLS, ROOT, read_all, write_sequences

import model

pytestmark = pytest.mark.slow
COMMAND = ["--units", 24, "--layers", 2, "--recurrent_dropout", 0.1, "--learning_rate", 0.05]
COMMAND += ["--batch_size", 32, "--epochs", 60, "--patience", 8]
SAVED = pathlib.Path("incognito_model.h5")
# Runs that differ in their backend, and in the operations of a pass's parts: few make three of it.
TENSORFLOW, JAX, DIVIDED = ("tensorflow", 3e13), ("jax", 3e13), ("tensorflow", 4e7)
CODE = """
import errno, os, resource, signal, sys
import train

def fail(*arguments):
    raise OSError(errno.EIO, os.strerror(errno.EIO))

def sending(number, function=print):
    def send(*arguments):
        function(*arguments)
        os.kill(os.getpid(), number)

    return send

train.LARGEST_PART = {}
{}
sys.exit(train.main(sys.argv[1:]))
"""


def start(kind, folder=".", fault="", **options):
    """Starts the command, of one of these kinds, in a folder, with what goes wrong in it."""
    backend, largest = kind
    command = [sys.executable, "-c", CODE.format(largest, fault), *map(str, COMMAND)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KERAS_BACKEND": backend}
    options = {"stdout": subprocess.PIPE, "encoding": "utf-8", **options}
    return subprocess.Popen(command, cwd=folder, env=environment, **options)


def train(folder, kind):
    """Runs the command to its end and returns what it printed."""
    with start(kind, folder) as process:
        told, _ = process.communicate()
    assert process.returncode == 0
    return told


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Makes what a run of a kind leaves that nothing stopped but its patience."""

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp("undisturbed")
        write_sequences(folder)
        told = train(folder, kind)
        losses, parts = read_history(folder)["val_loss"], 3 if kind == DIVIDED else 1
        assert 12 * parts < len(losses) < 60 * parts
        assert losses.index(min(losses)) == len(losses) - 1 - 8 * parts
        assert told.count(", part 3/3 - loss: ") == (len(losses) // 3 if kind == DIVIDED else 0)
        return read_all(folder / SAVED)

    return make


def read_history(folder):
    return model.load(folder / SAVED)[1]["history"]


def kill_once(kind, beginning, seconds):
    """Starts a run, kills it so long after a line that begins so, and returns how it ended."""
    with start(kind) as process:
        next((line for line in process.stdout if line.startswith(beginning)), None)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


@pytest.mark.parametrize(
    ("kind", "count"), [(TENSORFLOW, KILLS), (JAX, KILLS // 4), (DIVIDED, KILLS // 2)]
)
def test_a_run_that_is_killed_often_ends_with_the_same_bits(folder, undisturbed, kind, count):
    # Each try begins anew once it is through, so that all moments get their share of kills.
    rng = random.Random(0)
    kills = 0
    while kills < count:
        beginning, most = rng.choice([("Read", 4), ("Network", 3), ("Epoch", 0.5), ("Epoch 2/", 2)])
        status = kill_once(kind, beginning, rng.uniform(0, most))
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
        if SAVED.exists():
            assert len(read_history(folder)["loss"]) >= 1
        if status == 0:
            assert read_all(SAVED) == undisturbed(kind)
            SAVED.unlink()
    train(folder, kind)
    assert read_all(SAVED) == undisturbed(kind)


# What goes wrong while a run writes its first file, in Python, how the run ends then, and how
# many epochs the file has. Each run continues the one before.
FAULTS = {
    "os.replace = sending(signal.SIGINT, os.replace)": (130, 1),
    "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))": (2, 1),
    "os.replace = sending(signal.SIGKILL)": (-signal.SIGKILL, 1),
    "os.replace = sending(signal.SIGKILL, os.replace)": (-signal.SIGKILL, 2),
}


def train_with(fault):
    """Runs the command in the current folder with a fault: returns its status and stderr."""
    with start(TENSORFLOW, fault=fault, stderr=subprocess.PIPE) as process:
        _, told = process.communicate()
    return process.returncode, told


def test_a_save_that_fails_leaves_a_good_file(folder, undisturbed):
    for fault, (status, epochs) in FAULTS.items():
        found, told = train_with(fault)
        assert found == status, told
        assert len(read_history(folder)["loss"]) == epochs
        if status > 0:
            texts = {2: "train.py: error: --save_path: can't write incognito_model.h5: .*; check.*"}
            texts[130] = "Stopped: .* keeps the last whole epoch; the same command continues"
            assert re.fullmatch(texts[status] + "\n", told)
            assert sorted(os.listdir(folder)) == ["incognito_model.h5", "sequences.txt"]
    # A file that can't be replaced can still be written.
    assert train_with("os.replace = fail")[0] == 0
    assert read_all(SAVED) == undisturbed(TENSORFLOW)
