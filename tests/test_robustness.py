"""Both scripts in bad hours: signals, vanished terminals, odd files, numbers and settings."""

import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from conftest import ROOT, assert_one_line_error, finish, run, terminal, write_sequences

import model

TINY = ["--units", 4, "--layers", 1, "--epochs", 1]
LONG = ["--units", 4, "--layers", 1, "--epochs", 20_000]


@pytest.fixture
def folder(tmp_path):
    """A folder with a few hundred sequences to learn from."""
    write_sequences(tmp_path)
    return tmp_path


def start(script, *arguments, **options):
    """Starts a script of the project with pipes for its output."""
    return subprocess.Popen(
        [sys.executable, ROOT / script, *map(str, arguments)],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options},
    )


def wait_for(condition, process):
    """Waits until a condition holds while a process runs."""
    for _ in range(6000):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError(process.communicate())


def limit_memory():
    resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30))


# Signals


HANG_UP = pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), HANG_UP])
def test_a_signal_stops_the_training_as_ctrl_c_does(folder, number, status):
    (folder / "link.h5").symlink_to("target.h5")
    process = start("train.py", *LONG, "--save_path", "link.h5", cwd=folder)
    while not process.stdout.readline().startswith("Epoch 2/"):
        assert process.poll() is None, process.communicate()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert err == "\nStopped: link.h5 keeps the last whole epoch; the same command continues.\n"
    assert sorted(os.listdir(folder)) == ["link.h5", "sequences.txt", "target.h5"]
    assert (folder / "link.h5").is_symlink()
    assert len(model.load_training_state(folder / "target.h5")) > 0


def test_a_signal_keeps_what_was_invented_and_one_that_is_ignored_changes_nothing(tmp_path):
    command = ["sample.py", "--prompt", "", "--num_samples", 100_000_000, "--output", "new.txt"]
    process = start(
        *command,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )

    def size():
        return sum(path.stat().st_size for path in tmp_path.iterdir())

    wait_for(lambda: size() > 4_000, process)
    process.send_signal(signal.SIGHUP)
    before = size()
    wait_for(lambda: size() > before, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert re.fullmatch(r"Stopped: new\.txt holds [\d,]+ sequences\n", err)
    assert os.listdir(tmp_path) == ["new.txt"]


@pytest.mark.parametrize("script", ["sample.py", pytest.param("train.py", marks=pytest.mark.slow)])
def test_a_vanished_terminal_leaves_no_process(folder, script):
    flags = LONG if script == "train.py" else []
    child = terminal(script, *flags, cwd=folder)
    child.expect_exact("Epoch 2/" if script == "train.py" else "> ")
    time.sleep(1)  # Python's readline misses a signal that comes before it waits for keys
    child.ptyproc.fileobj.close()
    child.wait()
    assert child.exitstatus == 129
    if script == "train.py":
        model.load(folder / "incognito_model.h5")


# Streams


def test_that_nobody_can_be_told_is_no_failure(tmp_path):
    with open("/dev/full", "w") as full:
        process = run(
            *["sample.py", "--prompt", "a", "--num_samples", 3, "--output", "new.txt"],
            cwd=tmp_path,
            capture_output=False,
            stderr=full,
        )
    assert process.returncode == 0
    assert (tmp_path / "new.txt").read_text().count("\n") == 3


def test_an_input_without_end_takes_little_memory(tmp_path):
    with open("/dev/zero", "rb") as endless:
        process = run("sample.py", "--num_samples", 1, stdin=endless, preexec_fn=limit_memory)
    assert_one_line_error(process, "sample.py")
    assert "prompt 1 is longer than 1,048,576 characters" in process.stderr
    for script, flag in (("sample.py", "--exclude"), ("train.py", "--sequence_path")):
        process = run(script, flag, "/dev/zero", cwd=tmp_path, preexec_fn=limit_memory)
        assert_one_line_error(process, script)
        assert f"{flag}: /dev/zero, line 1: a NUL character, so this is not UTF-8" in process.stderr
    assert os.listdir(tmp_path) == []


def test_prompts_and_a_file_can_not_both_be_standard_input():
    process = run("sample.py", "--exclude", "/dev/stdin", input="a\nb\n")
    assert_one_line_error(process, "sample.py")
    assert "pass --prompt too" in process.stderr
    process = run("sample.py", "--exclude", "/dev/stdin", "--prompt", "a", input="a\nb\n")
    assert process.returncode == 0
    assert "a" not in process.stdout.split("\n")


# Files


def test_a_link_is_followed_and_permissions_are_kept(tmp_path):
    target, link = tmp_path / "far" / "target.txt", tmp_path / "link.txt"
    target.parent.mkdir()
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    command = ["sample.py", "--score", "/dev/stdin", "--output", "link.txt"]
    process = start(*command, cwd=tmp_path, stdin=subprocess.PIPE)
    process.stdin.write("a\n")
    process.stdin.flush()
    wait_for(lambda: any(target.parent.glob(".target.txt.*.tmp")), process)
    for path in target.parent.glob(".target.txt.*.tmp"):  # nor can others read on the way
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    process.communicate()
    assert process.returncode == 0
    assert link.is_symlink()
    assert "\ta\n" in target.read_text()
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


@pytest.mark.parametrize("script", ["sample.py --output", "train.py --save_path"])
def test_where_nothing_can_be_written_is_said_at_once(folder, script):
    script, flag = script.split()
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")
    for path, reason in {
        "sequences.txt/new": "Not a directory",
        "sequences.txt/missing/new": "Not a directory",
        "n" * 300: "File name too long",
        "a": "Too many levels of symbolic links",
        ".": "is not a regular file",
        "/dev/stdout": "is not a regular file",
        "": "is not a regular file",
    }.items():
        begin = time.monotonic()
        process = run(script, flag, path, cwd=folder)
        assert_one_line_error(process, script)
        assert f"{flag}: " in process.stderr
        assert reason in process.stderr
        assert time.monotonic() - begin < 2
    gone = folder / "gone"
    gone.mkdir()
    command = f"rmdir ../gone; {sys.executable} {ROOT / script} {flag} new"
    process = subprocess.run(
        ["sh", "-c", command], cwd=gone, capture_output=True, text=True, timeout=60
    )
    assert_one_line_error(process, script)
    assert f"{flag}: can't write new: No such file or directory" in process.stderr


@pytest.mark.slow
def test_names_of_files_can_not_steer_the_terminal(tmp_path):
    folder = tmp_path / "naïve 名前 with spaces"
    folder.mkdir()
    write_sequences(folder)
    name = "\x1b]0;title\x07\x9b2J\u202e\udcff"
    os.rename(folder / "sequences.txt", folder / f"{name}.txt")
    flags = ["--sequence_path", f"{name}.txt", "--save_path", f"{name}.h5"]
    # As bytes, since pexpect knows no file names that are not UTF-8.
    child = terminal("train.py", *TINY, *flags, columns=200, cwd=folder, encoding=None)
    shown, status = finish(child)
    assert status == 0
    shown = shown.decode()
    assert r"\x1b]0;title\x07\x9b2J\u202e\udcff.h5" in shown
    bar = re.compile("\x1b\\[[0-9;]*m|\b")  # Keras's own
    assert "".join(bar.sub("", shown).split()).isprintable()
    model.load(folder / f"{name}.h5")


def test_the_default_model_is_found_through_a_link(tmp_path):
    link = tmp_path / "invent"
    link.symlink_to(ROOT / "sample.py")
    process = subprocess.run(
        [sys.executable, link, "--prompt", "a", "--num_samples", "1"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.stdout.startswith("a"), process.stderr


def test_a_sequence_with_a_newline_is_one_line(tmp_path):
    (tmp_path / "names.csv").write_text('name\n"a\na"\na\n')
    process = run("sample.py", "--score", "names.csv", cwd=tmp_path)
    assert [line.split("\t")[1] for line in process.stdout.splitlines()] == [r"a\na", "a"]


# Numbers


@pytest.mark.parametrize(
    ("rows", "message"),
    [(1_000_000, "1,000,001 sequences of up to 60,000 characters"), (90_000, "not enough memory")],
)
def test_a_long_line_among_many_is_no_reason_to_take_all_memory(tmp_path, rows, message):
    (tmp_path / "sequences.txt").write_text("a" * 60_000 + "\n" + "b\n" * rows)
    process = run("train.py", "--max_len", 65_536, cwd=tmp_path, preexec_fn=limit_memory)
    assert_one_line_error(process, "train.py")
    assert message in process.stderr
    assert re.search(r"lower [^;]*max_len", process.stderr)


def test_too_many_different_characters_are_no_text(tmp_path):
    characters = [chr(point) for point in range(32, 0x110000) if not 0xD800 <= point < 0xE000]
    (tmp_path / "sequences.txt").write_text("\n".join(characters))
    process = run("train.py", cwd=tmp_path)
    assert_one_line_error(process, "train.py")
    assert re.search(
        r"1,11\d,\d{3} different characters are more than the 262,143 that", process.stderr
    )


# Settings and damaged files


@pytest.mark.slow
def test_a_file_that_contradicts_itself_is_not_continued(folder):
    command = ["train.py", *TINY, "--layers", 2, "--validation_split", 0.1]
    assert run(*command, cwd=folder).returncode == 0
    path = folder / "incognito_model.h5"
    whole = path.read_bytes()

    def say(**changes):
        metadata = json.loads(file.attrs[model.METADATA])
        file.attrs[model.METADATA] = np.bytes_(json.dumps({**metadata, **changes}))

    def say_fewer_layers():
        del file["model_weights/lstm_2"]
        say(layers=1)

    def repeat_state():
        for index in range(100, 1000):
            file[f"{model.TRAINING_STATE}/{index}"] = np.float32(0)

    def convert_state(kind):
        state = file[model.TRAINING_STATE]
        for name in [name for name in state if kind in str(state[name].dtype)]:
            value = state[name][()].astype("f8")
            del state[name]
            state[name] = value

    another = "was trained with a version of Keras whose runs this one can't continue"
    for change, reason in (
        (lambda: say(max_len=5), "was trained with --max_len 5, not 8"),
        (say_fewer_layers, "was trained with --layers 1, not 2"),
        (
            lambda: say(history={"loss": [2.0], "val_loss": []}),
            "without the state needed to continue",
        ),
        (repeat_state, "it holds a larger training state than 2 layers need"),
        (lambda: convert_state("float"), another),
        (lambda: convert_state("int"), another),
    ):
        with h5py.File(path, "r+") as file:
            change()
        changed = path.read_bytes()
        process = run(*command, "--epochs", 2, cwd=folder)
        assert process.returncode == 2
        assert process.stderr.startswith("train.py: error: --save_path: incognito_model.h5")
        assert process.stderr.count("\n") == 1
        assert reason in process.stderr
        assert path.read_bytes() == changed
        assert run("sample.py", "--weights_path", path, "--prompt", "", cwd=folder).returncode == 0
        path.write_bytes(whole)


@pytest.mark.slow
def test_the_configuration_of_keras_can_not_surprise(folder):
    for content, status in (
        ('{"floatx": "float16"}', 0),
        ('{"floatx": "float8"}', 2),
        ('{"image_data_format": "odd"}', 2),
        ("[]", 2),
    ):
        (folder / "keras.json").write_text(content)
        environment = {**os.environ, "KERAS_HOME": str(folder)}
        process = run("train.py", *TINY, "--overwrite", cwd=folder, env=environment)
        assert process.returncode == status
        if status:
            assert process.stderr.startswith("train.py: error: Keras can't start: ")
            assert "keras.json" in process.stderr
            assert process.stderr.count("\n") == 1
        else:
            assert not process.stderr
            model.load(folder / "incognito_model.h5")
