"""Training with several processes and devices, each process as a user starts it on its host."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import (
    ROOT,
    assert_one_line_error,
    read_all,
    read_arrays,
    run,
    write_sequences,
)

import model
import train

JAX = {**os.environ, "KERAS_BACKEND": "jax"}
FOUR_DEVICES = {**JAX, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
PREFIX = "KERAS_DISTRIBUTION_"
# 270 sequences in batches of 30, which four devices can't share evenly: 54 steps.
SMALL = ["--units", 16, "--epochs", 6, "--batch_size", 30, "--recurrent_dropout", 0.2]


@pytest.fixture
def hosts(tmp_path):
    """Three folders, each with the data, as on three hosts."""
    folders = [tmp_path / f"host_{rank}" for rank in range(3)]
    for folder in folders:
        folder.mkdir()
        write_sequences(folder)
    return folders


def variables(rank, size, port):
    """The environment of one process of a group."""
    addresses = ",".join(f"127.0.0.1:{port + other}" for other in range(size))
    values = {"JOB_ADDRESSES": addresses, "NUM_PROCESSES": str(size), "PROCESS_ID": str(rank)}
    return {PREFIX + name: value for name, value in values.items()}


def start(folders, flags, others=None, program=(ROOT / "train.py",), ranks=None):
    """Starts a group, a process in each folder, and returns the processes.

    `others` are the flags of all but the first; of `ranks` only those are started.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return [
        subprocess.Popen(
            [
                *[sys.executable, *program, "--distribute"],
                *map(str, others if others and rank else flags),
            ],
            cwd=folders[rank],
            env={**JAX, "PYTHONPATH": str(ROOT), **variables(rank, len(folders), port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (range(len(folders)) if ranks is None else ranks)
    ]


def finish(processes, seconds=60):
    """Waits for processes, kills those that take longer, and returns what they wrote."""
    end = time.monotonic() + seconds
    written = []
    for process in processes:
        try:
            written.append(process.communicate(timeout=max(0, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            process.kill()
            written.append(process.communicate())
    return written


def after(statement):
    """A program that does what train.py does, after a statement."""
    return ["-c", f"import os, resource, sys, train; {statement}; train.main(sys.argv[1:])"]


def assert_they_end(processes, message, seconds=60):
    """Asserts that all processes end with one line that says so, in so many seconds."""
    for process, (_, errors) in zip(processes, finish(processes, seconds)):
        assert process.returncode == 2, errors
        assert errors.startswith("train.py: error: ")
        assert message in errors
        assert errors.count("\n") == 1


def wait_for(process, beginning):
    """Reads what a process prints until a line begins so."""
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(process.stderr.read())


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


FLAGS = pytest.mark.parametrize(
    "flags",
    [
        SMALL,
        ["--epochs", 10, "--num_sequences", 25],
        ["--epochs", 25, "--batch_size", 130, "--units", 8],
        [*SMALL, "--teachers", "teacher.h5"],
    ],
    ids=["uneven batches", "less than a batch", "batches in parts", "a teacher"],
)


def learn_in_one_process(hosts, flags):
    """Lets one process learn `one.h5`, after it has made the teacher that the flags name."""
    for folder in hosts if "--teachers" in flags else []:
        assert (
            run("train.py", "--epochs", 1, "--save_path", "teacher.h5", cwd=folder).returncode == 0
        )
    one = run("train.py", *flags, "--save_path", "one.h5", cwd=hosts[0], env=JAX)
    assert one.returncode == 0, one.stderr
    return one


@pytest.mark.slow
@FLAGS
def test_a_group_learns_what_one_process_does(hosts, flags):
    one = learn_in_one_process(hosts, flags)
    path = hosts[0] / "incognito_model.h5"

    before = sorted(os.listdir(hosts[1]))
    processes = start(hosts[:2], flags)
    (shown, errors), (others, other_errors) = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], errors + other_errors
    assert (errors, other_errors) == ("", "")
    assert_same_run(hosts[0] / "one.h5", path)
    invented = re.findall("^invented, .*", one.stdout, re.M)
    assert invented
    assert re.findall("^invented, .*", shown, re.M) == invented
    assert re.fullmatch(r"Process 1 of 2; they meet at 127.0.0.1:\d+\n", others)
    assert sorted(os.listdir(hosts[1])) == before


@pytest.mark.slow
@FLAGS
def test_many_devices_learn_what_one_process_does(hosts, flags):
    learn_in_one_process(hosts, flags)
    command = ["train.py", "--distribute", *flags]
    many = run(*command, "--save_path", "many.h5", cwd=hosts[0], env=FOUR_DEVICES)
    assert many.returncode == 0, many.stderr
    assert_same_run(hosts[0] / "one.h5", hosts[0] / "many.h5")


@pytest.mark.parametrize("size", [2, 3])
def test_shares_add_up_to_the_whole(size):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcde"), length)) for length in rng.geometric(0.2, 100)]
    corpus = model.encode(texts)
    chosen = rng.permutation(100)[:77]
    shares = [corpus.take_share(rank, size) for rank in range(size)]
    assert sum(share.rows.nbytes for share in shares) == corpus.rows.nbytes
    assert max(len(share.rows) for share in shares) == -(-100 // size)
    calls = [list(train.make_calls(each, chosen, 8, 2, None, 1)) for each in (corpus, *shares)]
    for (whole, count), *parts in zip(*calls):
        rows, targets = whole[0]
        np.testing.assert_array_equal(rows, sum(part[0][0] for part, _ in parts))
        for part, each in parts:
            assert each == count
            np.testing.assert_array_equal(part[0][1], targets)


# What can go wrong before they begin


def complete(**changes):
    """The environment of a process of a group, with changes; None takes a variable away."""
    found = {**JAX, **variables(1, 2, 45000)}
    found.update({PREFIX + name: value for name, value in changes.items()})
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({**JAX, "KERAS_BACKEND": "tensorflow"}, "pip install jax, and set KERAS_BACKEND=jax"),
        ({**JAX, "KERAS_BACKEND": ""}, "pip install jax, and set KERAS_BACKEND=jax"),
        (complete(NUM_PROCESSES=None), f"set {PREFIX}NUM_PROCESSES too, or none of "),
        (complete(JOB_ADDRESSES=None), f"set {PREFIX}JOB_ADDRESSES too, or none of "),
        (complete(PROCESS_ID="2"), f"{PREFIX}PROCESS_ID must be a whole number"),
        (complete(PROCESS_ID="first"), "Received: first and 2"),
        (complete(NUM_PROCESSES="3"), "must be a host:port for each of 3 processes"),
        (complete(JOB_ADDRESSES="10.0.0.1"), "Received: 10.0.0.1"),
        (complete(JOB_ADDRESSES="10.0.0.1:65536"), "Received: 10.0.0.1:65536"),
    ],
)
def test_what_is_not_set_as_it_must_be_is_said_at_once(hosts, environment, message):
    process = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "train.py", "--distribute"],
        cwd=hosts[0],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    assert not re.search(r"\| +(keras|tensorflow|jax)\b", process.stderr)
    last = process.stderr.splitlines()[-1]
    assert last.startswith("train.py: error: --distribute: ")
    assert message in last
    assert os.listdir(hosts[0]) == ["sequences.txt"]


def test_a_port_that_is_taken_is_said_at_once(hosts):
    with socket.create_server(("127.0.0.1", 0)) as server:
        environment = {**JAX, **variables(0, 2, server.getsockname()[1])}
        process = run("train.py", "--distribute", cwd=hosts[0], env=environment)
    assert_one_line_error(process, "train.py")
    assert "Address already in use; name another one" in process.stderr


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        (["--units", 17], "with --units 17, not 16; start"),
        pytest.param(["--epochs", 7], "with --epochs 7, not 6; start", marks=pytest.mark.slow),
        pytest.param(
            ["--sequence_path", "other.txt"],
            "with other data (--sequence_path, --num_sequences); start all",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_process_that_was_started_otherwise_stops_them_all(hosts, difference, message):
    (hosts[1] / "other.txt").write_text("abc\nde\n")
    processes = start(hosts[:2], SMALL, [*SMALL, *difference])
    told = "error: --distribute: process 1 differs from process 0, it was started " + message
    assert_they_end(processes, told)
    assert os.listdir(hosts[0]) == ["sequences.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_never_comes_is_not_waited_for_for_ever(hosts, rank):
    program = after("train.ARRIVAL = 2")
    processes = start(hosts[:2], SMALL, program=program, ranks=[rank])
    assert_they_end(processes, "not all 2 processes came to 127.0.0.1:", 30)


# What can go wrong after that


def check_others_end(processes, victim, seconds):
    """Asserts that all but one process end with the right line in so many seconds."""
    others = [process for rank, process in enumerate(processes) if rank != victim]
    assert_they_end(others, "--distribute: the processes can't go on together: ", seconds)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_group_that_lost_a_process_continues_to_the_same_bits(hosts, victim):
    flags = [*SMALL, "--epochs", 12]
    undisturbed = start(hosts, [*flags, "--save_path", "undisturbed.h5"])
    finish(undisturbed)
    assert [process.returncode for process in undisturbed] == [0, 0, 0]

    processes = start(hosts, flags)
    wait_for(processes[0], "Epoch 3")
    processes[victim].send_signal(signal.SIGTERM if victim == 2 else signal.SIGKILL)
    check_others_end(processes, victim, 10)
    _, metadata = model.load(hosts[0] / "incognito_model.h5")
    assert 2 <= len(metadata["history"]["loss"]) < 12

    again = start(hosts, flags)
    (shown, errors), *_ = finish(again)
    assert [process.returncode for process in again] == [0, 0, 0], errors
    assert "Continuing incognito_model.h5 after epoch" in shown
    assert read_all(hosts[0] / "incognito_model.h5") == read_all(hosts[0] / "undisturbed.h5")
    finished = start(hosts, flags)
    (shown, _), *_ = finish(finished)
    assert "incognito_model.h5 is finished: it has learned for 12 epochs" in shown
    assert [process.returncode for process in finished] == [0, 0, 0]
    alone = run("train.py", *flags, "--epochs", 13, cwd=hosts[0], env=JAX)
    assert "Continuing incognito_model.h5 after epoch 12" in alone.stdout
    assert alone.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_falls_silent_is_not_waited_for_for_ever(hosts, victim):
    processes = start(hosts[:2], [*SMALL, "--epochs", 50_000])
    wait_for(processes[0], "Epoch 2")
    processes[victim].send_signal(signal.SIGSTOP)
    try:
        check_others_end(processes, victim, 150)
    finally:
        processes[victim].kill()
        processes[victim].communicate()


@pytest.mark.slow
def test_what_process_0_can_not_write_stops_them_all(hosts):
    program = after("resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))")
    processes = start(hosts[:2], SMALL, program=program)
    assert_they_end(processes, "--save_path: can't write incognito_model.h5: File too large")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_stops_one_that_waits_for_the_others(hosts, rank):
    [process] = start(hosts[:2], SMALL, ranks=[rank])
    time.sleep(8)
    process.send_signal(signal.SIGINT)
    [(_, errors)] = finish([process], 10)
    assert process.returncode == 130
    assert errors == "\nStopped: nothing new was saved.\n"


@pytest.mark.slow
def test_hosts_must_have_as_many_devices_as_each_other(hosts):
    program = after(
        "count = 1 + int(os.environ['KERAS_DISTRIBUTION_PROCESS_ID']); "
        "os.environ['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={count}'"
    )
    processes = start(hosts[:2], SMALL, program=program)
    assert_they_end(processes, "must have as many devices as the others. Received: 1, 2")


@pytest.mark.slow
def test_process_0_alone_can_keep_a_log(hosts):
    processes = start(hosts[:2], [*SMALL, "--log_dir", "logs"], SMALL)
    written = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], written
    assert (hosts[0] / "logs" / "losses.csv").read_text().count("\n") == 7
    assert not (hosts[1] / "logs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_ctrl_c_in_one_process_stops_them_all(hosts, victim):
    processes = start(hosts[:2], [*SMALL, "--epochs", 50_000])
    wait_for(processes[0], "Epoch 2")
    processes[victim].send_signal(signal.SIGINT)
    check_others_end(processes, victim, 10)
    [(_, errors)] = finish([processes[victim]])
    assert processes[victim].returncode == 130
    assert "Stopped: incognito_model.h5 keeps the last whole epoch" in errors
