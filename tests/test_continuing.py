"""Whatever stops a run, and whenever: the file is a good one, and the same command goes on."""

import functools
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import textwrap

import pytest
from conftest import KILLS, ROOT, read_all, run, start, write_sequences

import model

pytestmark = pytest.mark.slow
COMMAND = ["--units", 24, "--layers", 2, "--recurrent_dropout", 0.1, "--learning_rate", 0.05]
COMMAND += ["--epochs", 60, "--patience", 8]
SAVED = pathlib.Path("incognito_model.h5")


def train(folder, backend="tensorflow"):
    """Runs the command to its end."""
    process = run("train.py", *COMMAND, cwd=folder, env={**os.environ, "KERAS_BACKEND": backend})
    assert (process.returncode, process.stderr) == (0, "")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Makes what a run leaves, with a backend, that nothing stopped but its patience."""

    @functools.cache
    def make(backend):
        folder = tmp_path_factory.mktemp("undisturbed")
        write_sequences(folder)
        train(folder, backend)
        losses = read_history(folder)["val_loss"]
        assert 12 < len(losses) < 60
        assert losses.index(min(losses)) == len(losses) - 1 - 8
        return read_all(folder / SAVED)

    return make


def read_history(folder):
    return model.load(folder / SAVED)[1]["history"]


def kill_once(backend, beginning, seconds):
    """Starts a run, kills it so long after a line that begins so, and returns how it ended."""
    environment = {**os.environ, "KERAS_BACKEND": backend}
    with start("train.py", *COMMAND, env=environment, stderr=None) as process:
        next((line for line in process.stdout if line.startswith(beginning)), None)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


@pytest.mark.parametrize(("backend", "count"), [("tensorflow", KILLS), ("jax", KILLS // 4)])
def test_a_run_that_is_killed_often_ends_with_the_same_bits(folder, undisturbed, backend, count):
    # Each try begins anew once it is through, so that all moments get their share of kills.
    rng = random.Random(0)
    kills = 0
    while kills < count:
        beginning, most = rng.choice([("Read", 4), ("Network", 3), ("Epoch", 0.5), ("Epoch", 2)])
        status = kill_once(backend, beginning, rng.uniform(0, most))
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
        if SAVED.exists():
            assert 1 <= len(read_history(folder)["loss"]) <= 60
        if status == 0:
            assert read_all(SAVED) == undisturbed(backend)
            SAVED.unlink()
    train(folder, backend)
    assert read_all(SAVED) == undisturbed(backend)


# What goes wrong while a run writes its first file, in Python, how the run ends then, and how
# many epochs the file has. Each run continues the one before.
FAULTS = {
    "os.replace = sending(signal.SIGINT, os.replace)": (130, 1),
    "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))": (2, 1),
    "os.replace = sending(signal.SIGKILL)": (-signal.SIGKILL, 1),
    "os.replace = sending(signal.SIGKILL, os.replace)": (-signal.SIGKILL, 2),
}
INJECTION = """
    import errno, os, resource, signal, sys
    import train

    def fail(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def sending(number, function=print):
        def send(*arguments):
            function(*arguments)
            os.kill(os.getpid(), number)

        return send

    {fault}
    sys.exit(train.main(sys.argv[1:]))
"""


def train_with(fault):
    """Runs the command in the current folder with a fault, and returns the process."""
    code = textwrap.dedent(INJECTION).format(fault=fault)
    command = [sys.executable, "-c", code, *map(str, COMMAND)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_save_that_fails_leaves_a_good_file(folder, undisturbed):
    for fault, (status, epochs) in FAULTS.items():
        process = train_with(fault)
        assert process.returncode == status, process.stderr
        assert len(read_history(folder)["loss"]) == epochs
        if status > 0:
            told = {2: "train.py: error: --save_path: can't write incognito_model.h5: .*; check.*"}
            told[130] = "Stopped: .* keeps the last whole epoch; the same command continues"
            assert re.fullmatch(told[status] + "\n", process.stderr)
            assert sorted(os.listdir(folder)) == ["incognito_model.h5", "sequences.txt"]
    # A file that can't be replaced can still be written.
    assert train_with("os.replace = fail").returncode == 0
    assert read_all(SAVED) == undisturbed("tensorflow")
