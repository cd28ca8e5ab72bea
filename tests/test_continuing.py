"""Whatever stops a run, and whenever: the file is a good one, and the same command goes on."""

import os
import random
import signal
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT, read_all, run, write_sequences

import model

COMMAND = ["--units", 16, "--layers", 2, "--epochs", 12, "--patience", 9, "--learning_rate", 0.03]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a run leaves that nothing stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_sequences(folder)
    process = run("train.py", *COMMAND, cwd=folder)
    assert process.returncode == 0, process.stderr
    return read_all(folder / "incognito_model.h5")


def kill_once(folder, wait_for, seconds, flags=()):
    """Starts a run, kills it so long after a line that begins so, and returns how it ended."""
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *map(str, [*COMMAND, *flags])],
        cwd=folder,
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


def check_file(folder):
    """Asserts that the file, if there is one, is whole."""
    path = folder / "incognito_model.h5"
    if path.exists():
        _, metadata = model.load(path)
        assert 1 <= len(metadata["history"]["loss"]) <= 12
        assert model.load_training_state(path)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        # Not compiled by XLA, as the first is.
        pytest.param(["--units", 96, "--num_sequences", 290], marks=pytest.mark.slow),
        pytest.param(
            ["--recurrent_dropout", 0.2, "--teachers", "teacher.h5"], marks=pytest.mark.slow
        ),
    ],
)
def test_a_killed_run_continues_to_the_same_bits(tmp_path, flags):
    write_sequences(tmp_path)
    if "--teachers" in flags:
        teacher = run("train.py", "--epochs", 1, "--save_path", "teacher.h5", cwd=tmp_path)
        assert teacher.returncode == 0
    command = ["train.py", *COMMAND, *flags]
    assert run(*command, "--save_path", "undisturbed.h5", cwd=tmp_path).returncode == 0
    assert kill_once(tmp_path, "Epoch 3", 0, flags) == -signal.SIGKILL
    _, metadata = model.load(tmp_path / "incognito_model.h5")
    assert 1 <= len(metadata["history"]["loss"]) < 12
    continued = run(*command, cwd=tmp_path)
    assert "Continuing incognito_model.h5 after epoch" in continued.stdout
    assert read_all(tmp_path / "incognito_model.h5") == read_all(tmp_path / "undisturbed.h5")


@pytest.mark.slow
def test_a_run_that_is_killed_20_times_ends_with_the_same_bits(tmp_path, undisturbed):
    # Each try begins anew once it is through, so that all moments get their share of kills.
    rng = random.Random(0)
    kills = 0
    path = tmp_path / "incognito_model.h5"
    write_sequences(tmp_path)
    while kills < 20:
        wait_for, longest = rng.choice([("Read", 4), ("Network", 3), ("Epoch", 0.5)])
        status = kill_once(tmp_path, wait_for, rng.uniform(0, longest))
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
        check_file(tmp_path)
        if status == 0:
            assert read_all(path) == undisturbed
            path.unlink()
    assert run("train.py", *COMMAND, cwd=tmp_path).returncode == 0
    assert read_all(path) == undisturbed


# What goes wrong while the file is written for the fourth time, in Python.
FAULTS = {
    "an error while it is written": "model.h5py.File = fail",
    "a disk that is full": "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))",
    "an error as it is synced": "os.fsync = fail",
    "an error as it is renamed": "os.replace = fail",
    "a kill while it is written": "os.fsync = kill",
    "a kill before it is renamed": "os.replace = kill",
    "a kill after it is renamed": "replace = os.replace; os.replace = lambda *a: kill(replace(*a))",
}
INJECTION = """
    import errno, os, resource, signal, sys
    import model, train

    def fail(*arguments, **options):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def kill(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    save, saved = model.save, 0

    def save_with_fault(*arguments):
        global saved
        saved += 1
        if saved == 4:
            {fault}
        save(*arguments)

    model.save = save_with_fault
    train.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_save_that_fails_leaves_a_good_file(tmp_path, undisturbed, fault):
    write_sequences(tmp_path)
    process = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(INJECTION).format(fault=fault),
            *map(str, COMMAND),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if "kill" in fault:
        assert process.returncode == -signal.SIGKILL, process.stderr
    else:
        assert process.returncode == 2
        assert "error: --save_path: can't write incognito_model.h5: " in process.stderr
        assert process.stderr.count("\n") == 1
        assert sorted(os.listdir(tmp_path)) == ["incognito_model.h5", "sequences.txt"]
    _, metadata = model.load(tmp_path / "incognito_model.h5")
    assert len(metadata["history"]["loss"]) == (4 if "replace(*a)" in fault else 3)
    assert run("train.py", *COMMAND, cwd=tmp_path).returncode == 0
    assert read_all(tmp_path / "incognito_model.h5") == undisturbed
