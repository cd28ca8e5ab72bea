"""Both scripts in bad hours: signals, vanished terminals, odd files, numbers and settings."""

import os
import re
import resource
import shlex
import shutil
import signal
import stat
import subprocess
import time

import h5py
import pytest
from conftest import (
    CONTRACT,
    ROOT,
    assert_one_line_error,
    finish,
    run,
    start,
    terminal,
    wait_for_line,
)

import model
import sample
import train

TINY = ["--units", 4, "--layers", 1, "--epochs", 1]
LONG = ["--units", 4, "--layers", 1, "--epochs", 20_000]
SCRIPTS = ["sample.py", pytest.param("train.py", marks=pytest.mark.slow)]


def wait_until(condition, process):
    """Waits until a condition holds while a process runs."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def limit_memory():
    resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30))


# Signals


HANG_UP = pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), HANG_UP])
def test_a_signal_stops_the_training_as_ctrl_c_does(folder, number, status):
    (folder / "link.h5").symlink_to("target.h5")
    process = start("train.py", *LONG, "--save_path", "link.h5")
    wait_for_line(process, "Epoch 2/")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert err == "Stopped: link.h5 keeps the last whole epoch; the same command continues\n"
    assert sorted(os.listdir(folder)) == ["link.h5", "sequences.txt", "target.h5"]
    assert (folder / "link.h5").is_symlink()
    _, _, checkpoint = model.load_checkpoint(folder / "target.h5")
    assert checkpoint


def test_a_signal_keeps_what_was_invented_and_one_that_is_ignored_changes_nothing(tmp_path):
    command = ["sample.py", "--prompt", "", "--num_samples", 100_000_000, "--output", "new.txt"]
    ignore = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    process = start(*command, cwd=tmp_path, **ignore)

    def size():
        return sum(path.stat().st_size for path in tmp_path.iterdir())

    wait_until(lambda: size() > 4_000, process)
    process.send_signal(signal.SIGHUP)
    before = size()
    wait_until(lambda: size() > before, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert re.fullmatch(r"Stopped: new\.txt holds [\d,]+ sequences\n", err)
    assert os.listdir(tmp_path) == ["new.txt"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_vanished_terminal_leaves_no_process(folder, script):
    flags, shown = (LONG, "Epoch 2/") if script == "train.py" else ([], "> ")
    child = terminal(script, *flags)
    child.expect_exact(shown)
    time.sleep(1)  # Python's readline misses a signal that comes before it waits for keys
    child.ptyproc.fileobj.close()
    child.wait()
    assert child.exitstatus == 129
    if script == "train.py":
        model.load("incognito_model.h5")


# Streams


def test_that_nobody_can_be_told_is_no_failure(tmp_path):
    command = ["sample.py", "--prompt", "a", "--num_samples", 3, "--output", "new.txt"]
    with open("/dev/full", "w") as full:
        process = run(*command, cwd=tmp_path, capture_output=False, stderr=full)
    assert process.returncode == 0
    assert (tmp_path / "new.txt").read_text().count("\n") == 3


def test_an_input_without_end_takes_little_memory(tmp_path):
    with open("/dev/zero", "rb") as endless:
        process = run("sample.py", "--num_samples", 1, stdin=endless, preexec_fn=limit_memory)
    assert_one_line_error(process, "sample.py")
    assert "standard input: -, line 1: a NUL character, so this is not UTF-8" in process.stderr
    for script, flag in (("sample.py", "--exclude"), ("train.py", "--sequence_path")):
        process = run(script, flag, "/dev/zero", cwd=tmp_path, preexec_fn=limit_memory)
        assert_one_line_error(process, script)
        assert f"{flag}: /dev/zero, line 1: a NUL character, so this is not UTF-8" in process.stderr
    assert os.listdir(tmp_path) == []


# Files


def test_what_is_written_is_never_readable_by_others_if_the_file_was_not(tmp_path):
    (target := tmp_path / "target.txt").write_text("old")
    target.chmod(0o600)
    command = ["sample.py", "--score", "/dev/stdin", "--output", "target.txt"]
    process = start(*command, cwd=tmp_path, stdin=subprocess.PIPE)
    process.stdin.write("a\n")
    process.stdin.flush()
    wait_until(lambda: len(os.listdir(tmp_path)) > 1, process)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert "\ta\n" in target.read_text()
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


@pytest.mark.parametrize(("script", "flag"), [(sample, "--output"), (train, "--save_path")])
def test_where_nothing_can_be_written_is_said_at_once(folder, monkeypatch, refuse, script, flag):
    (folder / "a.h5").symlink_to("b.h5")
    (folder / "b.h5").symlink_to("a.h5")
    for path, reason in {
        "sequences.txt/new.h5": "Not a directory",
        "sequences.txt/missing/new.h5": "Not a directory",
        "n" * 300 + ".h5": "File name too long",
        "a.h5": "Too many levels of symbolic links",
    }.items():
        assert f"{flag}: can't write {path}: {reason}" in refuse(script, flag, path)
    (gone := folder / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert f"{flag}: can't write new.h5: No such file" in refuse(script, flag, "new.h5")


@pytest.mark.slow
def test_names_of_files_can_not_steer_the_terminal(tmp_path, monkeypatch):
    folder = tmp_path / "naïve 名前 with spaces"
    folder.mkdir()
    monkeypatch.chdir(folder)
    name = "\x1b]0;title\x07\x9b2J\u202e\udcff"
    (folder / f"{name}.txt").write_text("".join(f"{letter}\n" for letter in "abcdefghij" * 3))
    flags = ["--sequence_path", f"{name}.txt", "--save_path", f"{name}.h5"]
    # As bytes, since pexpect knows no file names that are not UTF-8.
    shown, status = finish(terminal("train.py", *TINY, *flags, columns=200, encoding=None))
    assert status == 0
    assert r"\x1b]0;title\x07\x9b2J\u202e\udcff.h5" in shown.decode()
    assert "".join(shown.decode().split()).isprintable()
    model.load(folder / f"{name}.h5")


def test_the_default_model_is_found_through_a_link(tmp_path):
    (link := tmp_path / "invent").symlink_to(ROOT / "sample.py")
    process = run(link, "--prompt", "a", "--num_samples", 1)
    assert process.stdout.startswith("a"), process.stderr


# Numbers


def test_a_long_line_among_many_is_no_reason_to_take_all_memory(tmp_path):
    (tmp_path / "sequences.txt").write_text("a" * 60_000 + "\n" + "b\n" * 90_000)
    process = run("train.py", "--max_len", 65_536, cwd=tmp_path, preexec_fn=limit_memory)
    assert_one_line_error(process, "train.py")
    assert "there is not enough memory; lower --batch_size, --units or --max_len" in process.stderr


def test_too_many_different_characters_are_no_text(folder, refuse):
    lines = ["".join(map(chr, range(point, point + 64))) for point in range(2**16, 6 * 2**16, 64)]
    (folder / "sequences.txt").write_text("\n".join(lines), encoding="utf-8")
    assert re.search(r"32\d,\d{3} different characters are more than the 262,143", refuse(train))


# Settings


@pytest.mark.slow
def test_a_run_of_another_version_of_keras_is_not_continued(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "incognito_model.h5"
    with h5py.File(path, "r+") as file:
        del file[model.CHECKPOINT][str(len(file[model.CHECKPOINT]) - 1)]
    before = path.read_bytes()
    process = run(*shlex.split(CONTRACT), "--epochs", 11, cwd=tmp_path)
    assert process.returncode == 2
    told = "is of another version of Keras; pass --overwrite .*\n"
    assert re.fullmatch(f"train.py: error: --save_path: .* {told}", process.stderr)
    assert path.read_bytes() == before


@pytest.mark.slow
def test_the_configuration_of_keras_can_not_surprise(folder):
    environment = {**os.environ, "KERAS_HOME": str(folder)}
    for content in ('{"floatx": "float8"}', '{"image_data_format": "odd"}', "[]"):
        (folder / "keras.json").write_text(content)
        process = run("train.py", *TINY, env=environment)
        assert process.returncode == 2
        assert re.fullmatch("train.py: error: Keras can't start: .*keras.json.*\n", process.stderr)
    (folder / "keras.json").write_text('{"floatx": "float16"}')
    process = run("train.py", *TINY, env=environment)
    assert (process.returncode, process.stderr) == (0, "")
    model.load("incognito_model.h5")
