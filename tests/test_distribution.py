"""Training with several processes and devices, each process as a user starts it on its host."""

import os
import random
import re
import shutil
import socket
import time

import numpy as np
import pytest
from conftest import (
    JAX,
    KILLS,
    PRE_TRAINED,
    assert_refused,
    read_all,
    read_arrays,
    run,
    start,
    wait_for_line,
    write_sequences,
)

import model

pytestmark = pytest.mark.slow
DEVICES = "--xla_force_host_platform_device_count="
# 285 sequences in batches of up to 27, packed into 7 rows each, which no devices can share evenly.
SMALL = ["--units", 16, "--epochs", 6, "--batch_size", 27, "--recurrent_dropout", 0.2]
SMALL += ["--layers", 2, "--learning_rate", 0.01]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="can't choose cores")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_the_number_of_cores_or_devices_changes_nothing_but_how_sums_are_rounded(folder):
    cores = sorted(os.sched_getaffinity(0))
    flags = [*SMALL, "--units", 64, "--epochs", 3, "--batch_size", 30]
    several = {**JAX, "XLA_FLAGS": f"{DEVICES}4"}
    for count, used, more, environment in (
        (1, 1, ["--save_path", "one.h5"], JAX),
        (2, 2, ["--save_path", "cores.h5"], JAX),
        (4, 2, ["--save_path", "devices.h5", "--distribute"], several),
    ):
        process = run(
            *["train.py", *flags, *more],
            env=environment,
            preexec_fn=lambda allowed=cores[:used]: os.sched_setaffinity(0, allowed),
        )
        assert (process.returncode, process.stderr) == (0, "")
        devices = ", ".join(f"cpu:{number}" for number in range(count))
        assert f"parameters, by Keras on jax, {devices}\n" in process.stdout
    assert_same_run(folder / "one.h5", folder / "cores.h5")
    assert_same_run(folder / "one.h5", folder / "devices.h5")


@pytest.fixture
def hosts(tmp_path):
    """Two folders, each with the data, as on two hosts."""
    folders = [tmp_path / f"host_{rank}" for rank in range(2)]
    for folder in folders:
        folder.mkdir()
        write_sequences(folder)
    return folders


def start_group(folders, flags, others=(), devices=1):
    """Starts a group, a process in each folder, and returns the processes.

    `others` are more flags for all but the first.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {
        **JAX,
        "XLA_FLAGS": f"{DEVICES}{devices}",
        "KERAS_DISTRIBUTION_JOB_ADDRESSES": f"127.0.0.1:{port},127.0.0.1:{port + 1}",
        "KERAS_DISTRIBUTION_NUM_PROCESSES": "2",
    }
    return [
        start(
            *["train.py", "--distribute", *flags, *(others if rank else ())],
            cwd=folder,
            env={**shared, "KERAS_DISTRIBUTION_PROCESS_ID": str(rank)},
        )
        for rank, folder in enumerate(folders)
    ]


def collect(processes):
    """Waits for processes and returns what they wrote: a list of stdout and one of stderr."""
    try:
        return zip(*[process.communicate(timeout=120) for process in processes])
    finally:
        for process in processes:
            process.kill()


def train_in_group(folders, flags, devices=1):
    """Returns what each process of a group shows, all of which succeed."""
    processes = start_group(folders, flags, devices=devices)
    shown, errors = collect(processes)
    assert [process.returncode for process in processes] == [0, 0], errors
    assert errors == ("", "")
    return shown


def assert_same_run(path, other):
    """Asserts that two files hold the same run, but for how sums were rounded."""
    arrays, others = read_arrays(path), read_arrays(other)
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        difference = np.linalg.norm(array.astype(float) - others[name])
        assert difference <= 1e-5 * np.linalg.norm(array.astype(float)), name
    first, second = (model.load(each)[1]["history"] for each in (path, other))
    for name, losses in first.items():
        np.testing.assert_allclose(second[name], losses, rtol=1e-5)
    assert len(first["val_loss"]) == len(first["loss"]) > 0


def test_two_processes_of_two_devices_learn_what_one_process_does(hosts):
    one = run("train.py", *SMALL, "--save_path", "one.h5", cwd=hosts[0], env=JAX)
    assert one.returncode == 0, one.stderr
    before = sorted(os.listdir(hosts[1]))
    shown, others = train_in_group(hosts, [*SMALL, "--log_dir", "logs"], devices=2)
    assert_same_run(hosts[0] / "one.h5", hosts[0] / "incognito_model.h5")
    invented = re.findall("^invented, .*", one.stdout, re.M)
    assert len(invented) >= 6
    assert re.findall("^invented, .*", shown, re.M) == invented
    assert others == "Process 1 of 2; process 0 prints the rest\n"
    assert (hosts[0] / "logs" / "losses.csv").read_text().count("\n") == 7
    assert sorted(os.listdir(hosts[1])) == before


def test_a_group_that_is_killed_continues_to_the_same_bits(hosts):
    flags = [*SMALL, "--epochs", 15]
    train_in_group(hosts, [*flags, "--save_path", "undisturbed.h5"])
    rng = random.Random(0)
    for _ in range(max(1, KILLS // 4)):
        processes = start_group(hosts, flags)
        wait_for_line(processes[0], "Epoch")
        time.sleep(rng.uniform(0.1, 0.5))
        for process in processes:
            process.kill()
        collect(processes)
    shown, _ = train_in_group(hosts, flags)
    assert "Continuing incognito_model.h5 after epoch" in shown
    assert read_all(hosts[0] / "incognito_model.h5") == read_all(hosts[0] / "undisturbed.h5")
    shown, _ = train_in_group(hosts, flags)
    assert "The run in incognito_model.h5 is finished, after 15 epochs" in shown


# Mistakes


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["--epochs", 7], "--distribute: the processes differ in their flags or data; "),
        (["--sequence_path", "other.txt"], "--distribute: the processes differ in their flags or "),
        ([], "--save_path: incognito_model.h5 was trained with .*; pass --overwrite "),
    ],
)
def test_what_one_process_refuses_ends_them_all(hosts, others, message):
    shutil.copy(PRE_TRAINED / "user_names_10000.h5", hosts[0] / "incognito_model.h5")
    (hosts[1] / "other.txt").write_text("abc\nde\n")
    begin = time.monotonic()
    processes = start_group(hosts, SMALL, others)
    _, (one, other) = collect(processes)
    assert [process.returncode for process in processes] == [2, 2]
    assert one == other
    assert re.fullmatch(f"train.py: error: {message}.*\n", one)
    assert time.monotonic() - begin < 90  # after 100 s JAX gives up on the others
    assert sorted(os.listdir(hosts[1])) == ["other.txt", "sequences.txt"]


def test_variables_that_make_no_sense_are_named(hosts):
    values = {"JOB_ADDRESSES": "127.0.0.1:1", "NUM_PROCESSES": "2", "PROCESS_ID": "first"}
    environment = {**JAX, **{f"KERAS_DISTRIBUTION_{name}": text for name, text in values.items()}}
    process = run("train.py", "--distribute", cwd=hosts[0], env=environment)
    assert_refused(process, "check the KERAS_DISTRIBUTION_… variables on every host")
