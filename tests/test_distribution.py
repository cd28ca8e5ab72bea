"""Training with several processes and devices, each process as a user starts it on its host."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import KILLS, ROOT, assert_one_line_error, read_all, read_arrays, run, write_sequences

import model

JAX = {**os.environ, "KERAS_BACKEND": "jax"}
DEVICES = "--xla_force_host_platform_device_count="
# 270 sequences in batches of 30, which four devices can't share evenly: 54 steps.
SMALL = ["--units", 16, "--epochs", 6, "--batch_size", 30, "--recurrent_dropout", 0.2]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="can't choose cores")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_the_number_of_cores_changes_nothing_but_how_sums_are_rounded(tmp_path):
    write_sequences(tmp_path)
    flags = ["--units", 64, "--epochs", 3, "--batch_size", 30, "--recurrent_dropout", 0.2]
    cores = sorted(os.sched_getaffinity(0))
    arrays = []
    for count in (1, 2):
        process = run(
            "train.py",
            *[*flags, "--save_path", f"{count}.h5", "--log_dir", f"logs_{count}"],
            cwd=tmp_path,
            env=JAX,
            preexec_fn=lambda allowed=cores[:count]: os.sched_setaffinity(0, allowed),
        )
        assert process.returncode == 0, process.stderr
        assert process.stderr == ""
        devices = ", ".join(f"cpu:{number}" for number in range(count))
        assert f"trained by Keras on jax, {devices}\n" in process.stdout
        arrays.append(read_arrays(tmp_path / f"{count}.h5"))
    for name, one in arrays[0].items():
        np.testing.assert_allclose(arrays[1][name], one, rtol=1e-3, atol=1e-5)


@pytest.fixture
def hosts(tmp_path):
    """Two folders, each with the data, as on two hosts."""
    folders = [tmp_path / f"host_{rank}" for rank in range(2)]
    for folder in folders:
        folder.mkdir()
        write_sequences(folder)
    return folders


def start(folders, flags, others=None, devices=1):
    """Starts a group, a process in each folder, and returns the processes.

    `others` are the flags of all but the first.
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
        subprocess.Popen(
            [
                *[sys.executable, ROOT / "train.py", "--distribute"],
                *map(str, others if others and rank else flags),
            ],
            cwd=folder,
            env={**shared, "KERAS_DISTRIBUTION_PROCESS_ID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, folder in enumerate(folders)
    ]


def finish(processes):
    """Waits for processes and returns what they wrote."""
    try:
        return [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()


def finish_well(processes):
    """Returns what the first process shows and what the others do, all of which succeed."""
    (shown, errors), *others = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], errors
    assert [errors, *(other for _, other in others)] == ["", ""]
    return shown, others[0][0]


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
    flags = [*SMALL, "--log_dir", "logs"]
    shown, others = finish_well(start(hosts, flags, devices=2))
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
    finish_well(start(hosts, [*flags, "--save_path", "undisturbed.h5"]))
    rng = random.Random(0)
    for _ in range(max(1, KILLS // 4)):
        processes = start(hosts, flags)
        wait_for = rng.choice(["Network", "Epoch"])
        while not processes[0].stdout.readline().startswith(wait_for):
            assert processes[0].poll() is None, processes[0].communicate()
        time.sleep(rng.uniform(0, 0.3))
        for process in processes:
            process.send_signal(signal.SIGKILL)
        finish(processes)
    shown, _ = finish_well(start(hosts, flags))
    assert "Continuing incognito_model.h5 after epoch" in shown
    assert read_all(hosts[0] / "incognito_model.h5") == read_all(hosts[0] / "undisturbed.h5")
    shown, _ = finish_well(start(hosts, flags))
    assert "The run in incognito_model.h5 is finished, after 30 epochs" in shown
    alone = run("train.py", *flags, "--epochs", 31, cwd=hosts[0], env=JAX)
    assert "Continuing incognito_model.h5 after epoch 30" in alone.stdout
    assert alone.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "difference", [["--units", 17], ["--epochs", 7], ["--sequence_path", "other.txt"]]
)
def test_processes_that_were_not_started_alike_are_refused(hosts, difference):
    (hosts[1] / "other.txt").write_text("abc\nde\n")
    processes = start(hosts, SMALL, [*SMALL, *difference])
    for process, (_, errors) in zip(processes, finish(processes)):
        assert process.returncode == 2
        assert errors.startswith("train.py: error: --distribute: the processes differ in their fl")
        assert errors.count("\n") == 1
    assert os.listdir(hosts[0]) == ["sequences.txt"]


@pytest.mark.parametrize("backend", ["tensorflow", ""])
def test_it_needs_jax(hosts, backend):
    environment = {**JAX, "KERAS_BACKEND": backend}
    process = run("train.py", "--distribute", cwd=hosts[0], env=environment)
    assert_one_line_error(process, "train.py")
    assert "--distribute: needs Keras on JAX: pip install jax, and set KERAS" in process.stderr


@pytest.mark.slow
def test_variables_that_make_no_sense_are_named(hosts):
    values = {"JOB_ADDRESSES": "127.0.0.1:1", "NUM_PROCESSES": "2", "PROCESS_ID": "first"}
    environment = {**JAX, **{f"KERAS_DISTRIBUTION_{name}": text for name, text in values.items()}}
    process = run("train.py", "--distribute", cwd=hosts[0], env=environment)
    assert_one_line_error(process, "train.py")
    assert "check the KERAS_DISTRIBUTION_… variables on every host" in process.stderr
