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
    assert_one_line_error,
    edit_metadata,
    read_all,
    read_arrays,
    run,
    start,
    wait_for_line,
    write_sequences,
)

import model

DEVICES = "--xla_force_host_platform_device_count="
# 270 sequences in batches of 30, packed into 8 rows each: 54 updates of the weights.
SMALL = ["--units", 16, "--epochs", 6, "--batch_size", 30, "--recurrent_dropout", 0.2]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="can't choose cores")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_the_number_of_cores_changes_nothing_but_how_sums_are_rounded(folder):
    cores = sorted(os.sched_getaffinity(0))
    flags = ["--units", 64, "--epochs", 3, "--batch_size", 30, "--recurrent_dropout", 0.2]
    for count in (1, 2):
        process = run(
            *["train.py", *flags, "--save_path", f"{count}.h5", "--log_dir", f"logs_{count}"],
            env=JAX,
            preexec_fn=lambda allowed=cores[:count]: os.sched_setaffinity(0, allowed),
        )
        assert (process.returncode, process.stderr) == (0, "")
        devices = ", ".join(f"cpu:{number}" for number in range(count))
        assert f"parameters, by Keras on jax, {devices}\n" in process.stdout
    assert_same_run(folder / "1.h5", folder / "2.h5")


@pytest.fixture
def hosts(tmp_path):
    """Two folders, each with the data, as on two hosts."""
    folders = [tmp_path / f"host_{rank}" for rank in range(2)]
    for folder in folders:
        folder.mkdir()
        write_sequences(folder)
    return folders


def start_group(folders, flags, others=None, devices=1):
    """Starts a group, a process in each folder, and returns the processes.

    `others` are the flags of all but the first, if they differ.
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
            *["train.py", "--distribute", *(others if others and rank else flags)],
            cwd=folder,
            env={**shared, "KERAS_DISTRIBUTION_PROCESS_ID": str(rank)},
        )
        for rank, folder in enumerate(folders)
    ]


def collect(processes):
    """Waits for processes and returns what they wrote, pairs of stdout and stderr."""
    try:
        return [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()


def train_in_group(folders, flags, **options):
    """Returns what each process of a group shows, all of which succeed."""
    processes = start_group(folders, flags, **options)
    shown, errors = zip(*collect(processes))
    assert [process.returncode for process in processes] == [0, 0], errors
    assert errors == ("", "")
    return shown


def assert_all_refused(processes, message):
    """Asserts that all processes of a group end with the same one line, a pattern."""
    begin = time.monotonic()
    _, (one, other) = zip(*collect(processes))
    assert [process.returncode for process in processes] == [2, 2]
    assert one == other
    assert re.fullmatch(f"train.py: error: {message}\n", one)
    assert time.monotonic() - begin < 90  # after 100 s JAX gives up on the others


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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("flags", [SMALL, ["--epochs", 10, "--num_sequences", 25]])
def test_four_devices_learn_what_one_does(hosts, flags):
    for name, extra, environment in (
        ("one.h5", [], JAX),
        ("many.h5", ["--distribute"], {**JAX, "XLA_FLAGS": f"{DEVICES}4"}),
    ):
        command = ["train.py", *flags, *extra, "--save_path", name]
        process = run(*command, cwd=hosts[0], env=environment)
        assert process.returncode == 0, process.stderr
    assert_same_run(hosts[0] / "one.h5", hosts[0] / "many.h5")


@pytest.mark.slow
def test_a_group_that_is_killed_continues_to_the_same_bits(hosts):
    flags = [*SMALL, "--epochs", 30]
    train_in_group(hosts, [*flags, "--save_path", "undisturbed.h5"])
    rng = random.Random(0)
    for _ in range(max(1, KILLS // 4)):
        processes = start_group(hosts, flags)
        wait_for_line(processes[0], rng.choice(["Network", "Epoch"]))
        time.sleep(rng.uniform(0, 0.3))
        for process in processes:
            process.kill()
        collect(processes)
    shown, _ = train_in_group(hosts, flags)
    assert "Continuing incognito_model.h5 after epoch" in shown
    assert read_all(hosts[0] / "incognito_model.h5") == read_all(hosts[0] / "undisturbed.h5")
    shown, _ = train_in_group(hosts, flags)
    assert "The run in incognito_model.h5 is finished, after 30 epochs" in shown
    alone = run("train.py", *flags, "--epochs", 31, cwd=hosts[0], env=JAX)
    assert "Continuing incognito_model.h5 after epoch 30" in alone.stdout
    assert alone.returncode == 0


# Mistakes


@pytest.mark.slow
@pytest.mark.parametrize(
    "difference", [["--units", 17], ["--epochs", 7], ["--sequence_path", "other.txt"]]
)
def test_processes_that_were_not_started_alike_are_refused(hosts, difference):
    (hosts[1] / "other.txt").write_text("abc\nde\n")
    processes = start_group(hosts, SMALL, [*SMALL, *difference])
    assert_all_refused(processes, "--distribute: the processes differ in their flags or data; .*")
    assert os.listdir(hosts[0]) == ["sequences.txt"]


@pytest.mark.slow
def test_what_process_0_refuses_to_replace_ends_them_all(hosts):
    path = shutil.copy(PRE_TRAINED / "user_names_10000.h5", hosts[0] / "incognito_model.h5")
    edit_metadata(path, init_from=None)
    message = "--save_path: incognito_model.h5 was trained with other data .*; pass --overwrite .*"
    assert_all_refused(start_group(hosts, SMALL), message)
    assert os.listdir(hosts[1]) == ["sequences.txt"]


@pytest.mark.slow
def test_variables_that_make_no_sense_are_named(hosts):
    values = {"JOB_ADDRESSES": "127.0.0.1:1", "NUM_PROCESSES": "2", "PROCESS_ID": "first"}
    environment = {**JAX, **{f"KERAS_DISTRIBUTION_{name}": text for name, text in values.items()}}
    process = run("train.py", "--distribute", cwd=hosts[0], env=environment)
    assert_one_line_error(process, "train.py")
    assert "check the KERAS_DISTRIBUTION_… variables on every host" in process.stderr
