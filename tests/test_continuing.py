"""Whatever stops a run, and whenever: the file is a good one, and the same command goes on."""

import os
import random
import signal
import subprocess
import sys
import textwrap

import pytest
from conftest import KILLS, ROOT, read_all, run, write_sequences

import model

COMMAND = ["--units", 24, "--layers", 2, "--recurrent_dropout", 0.1, "--learning_rate", 0.05]
COMMAND += ["--epochs", 60, "--patience", 8]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Makes what a run leaves, with a backend, that nothing stopped but its patience."""
    known = {}

    def make(backend):
        if backend not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            write_sequences(folder)
            process = run("train.py", *COMMAND, cwd=folder, env=environment(backend))
            assert process.returncode == 0, process.stderr
            known[backend] = read_all(folder / "incognito_model.h5")
            _, metadata = model.load(folder / "incognito_model.h5")
            losses = metadata["history"]["val_loss"]
            assert 12 < len(losses) < 60
            assert losses.index(min(losses)) == len(losses) - 1 - 8
        return known[backend]

    return make


def environment(backend):
    return {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT)}


def kill_once(folder, backend, wait_for, seconds):
    """Starts a run, kills it so long after a line that begins so, and returns how it ended."""
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *map(str, COMMAND)],
        cwd=folder,
        env=environment(backend),
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith(wait_for):
            break
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def test_a_killed_run_continues_to_the_same_bits(tmp_path, undisturbed):
    path = tmp_path / "incognito_model.h5"
    write_sequences(tmp_path)
    assert kill_once(tmp_path, "tensorflow", "Epoch 3", 0) == -signal.SIGKILL
    _, metadata = model.load(path)
    assert 2 <= len(metadata["history"]["loss"]) < 12
    continued = run("train.py", *COMMAND, cwd=tmp_path)
    assert "Continuing incognito_model.h5 after epoch" in continued.stdout
    assert read_all(path) == undisturbed("tensorflow")
    assert "incognito_model.h5 is finished" in run("train.py", *COMMAND, cwd=tmp_path).stdout


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "count"), [("tensorflow", KILLS), ("jax", KILLS // 4)])
def test_a_run_that_is_killed_often_ends_with_the_same_bits(tmp_path, undisturbed, backend, count):
    # Each try begins anew once it is through, so that all moments get their share of kills.
    rng = random.Random(0)
    kills = 0
    path = tmp_path / "incognito_model.h5"
    write_sequences(tmp_path)
    while kills < count:
        wait_for, longest = rng.choice([("Read", 4), ("Network", 3), ("Epoch", 0.5), ("Epoch", 2)])
        status = kill_once(tmp_path, backend, wait_for, rng.uniform(0, longest))
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
        if path.exists():
            _, metadata = model.load(path)
            assert 1 <= len(metadata["history"]["loss"]) <= 60
            assert model.load_training_state(path)
        if status == 0:
            assert read_all(path) == undisturbed(backend)
            path.unlink()
    assert run("train.py", *COMMAND, cwd=tmp_path, env=environment(backend)).returncode == 0
    assert read_all(path) == undisturbed(backend)


# What goes wrong while a run writes its file for the second time, in Python, and how
# many epochs longer than before the run the file is then.
FAULTS = {
    "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))": 1,
    "os.fsync = fail": 1,
    "os.replace = fail": 1,
    "os.fsync = kill": 1,
    "os.replace = kill": 1,
    "replace = os.replace; os.replace = lambda *a: kill(replace(*a))": 2,
}
INJECTION = """
    import errno, os, resource, signal, sys
    import model, train

    def fail(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def kill(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    save, saved = model.save, 0

    def save_with_fault(*arguments):
        global saved
        saved += 1
        if saved == 2:
            {fault}
        save(*arguments)

    model.save = save_with_fault
    train.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_saves_that_fail_leave_a_good_file(tmp_path, undisturbed):
    write_sequences(tmp_path)
    epochs = 0
    for fault, longer in FAULTS.items():
        code = textwrap.dedent(INJECTION).format(fault=fault)
        process = subprocess.run(
            [sys.executable, "-c", code, *map(str, COMMAND)],
            cwd=tmp_path,
            env=environment("tensorflow"),
            capture_output=True,
            text=True,
        )
        if "kill" in fault:
            assert process.returncode == -signal.SIGKILL, process.stderr
        else:
            assert process.returncode == 2
            assert process.stderr.startswith(
                "train.py: error: --save_path: can't write incognito_model.h5: "
            )
            assert process.stderr.count("\n") == 1
            assert sorted(os.listdir(tmp_path)) == ["incognito_model.h5", "sequences.txt"]
        epochs += longer
        _, metadata = model.load(tmp_path / "incognito_model.h5")
        assert len(metadata["history"]["loss"]) == epochs
    assert run("train.py", *COMMAND, cwd=tmp_path).returncode == 0
    assert read_all(tmp_path / "incognito_model.h5") == undisturbed("tensorflow")
