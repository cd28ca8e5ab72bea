"""Both scripts in bad hours: signals, vanished terminals, odd files, numbers and settings."""

import os
import re
import resource
import signal
import time

import pytest
from conftest import ROOT, assert_refused, run, start, terminal, wait_for_line

import model
import sample
import train

TINY = ["--units", 4, "--layers", 1, "--epochs", 1]
LONG = [*TINY, "--epochs", 20_000]
SCRIPTS = ["sample.py", pytest.param("train.py", marks=pytest.mark.slow)]


def wait_until(condition, process):
    """Waits until a condition holds while a process runs."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def limit_memory():
    resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))


# Signals


def test_a_signal_stops_the_training_as_ctrl_c_does(folder):
    (folder / "link.h5").symlink_to("target.h5")
    process = start("train.py", *LONG, "--save_path", "link.h5")
    wait_for_line(process, "Epoch 2/")
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err == "Stopped: link.h5 keeps the last whole epoch; the same command continues\n"
    assert (folder / "link.h5").is_symlink()
    _, _, checkpoint = model.load(folder / "target.h5", checkpoint=True)
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
    process.terminate()
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
    assert_refused(process, "standard input: -, line 1: a NUL character, so this is not UTF-8")
    for script, flag in (("sample.py", "--exclude"), ("train.py", "--sequence_path")):
        process = run(script, flag, "/dev/zero", cwd=tmp_path, preexec_fn=limit_memory)
        assert_refused(process, f"{flag}: /dev/zero, line 1: a NUL character")
    assert os.listdir(tmp_path) == []


# Files


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
def test_names_of_files_can_not_steer_the_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = "naïve 名前\x1b]0;title\x07\x9b2J\u202e\udcff"
    (tmp_path / f"{name}.txt").write_text("".join(f"{letter}\n" for letter in "abcdefghij" * 3))
    paths = ["--sequence_path", f"{name}.txt", "--save_path", f"{name}.h5"]
    assert train.main([*map(str, TINY), *paths]) == 0
    shown = capsys.readouterr().out
    assert r"naïve 名前\x1b]0;title\x07\x9b2J\u202e\udcff.h5" in shown
    assert "".join(shown.split()).isprintable()
    model.load(f"{name}.h5")


def test_the_default_model_is_found_through_a_link(tmp_path):
    (link := tmp_path / "invent").symlink_to(ROOT / "sample.py")
    process = run(link, "--prompt", "a", "--num_samples", 1)
    assert process.stdout.startswith("a"), process.stderr


# Numbers


def test_a_long_line_among_many_is_no_reason_to_take_all_memory(tmp_path):
    (tmp_path / "sequences.txt").write_text("a" * 60_000 + "\n" + "b\n" * 90_000)
    flags = "--max_len", 65_536, "--batch_size", 512
    process = run("train.py", *flags, cwd=tmp_path, preexec_fn=limit_memory)
    assert_refused(process, "not enough memory; lower --batch_size, --units or --max_len")


# Settings


@pytest.mark.slow
def test_the_configuration_of_keras_can_not_surprise(folder):
    environment = {**os.environ, "KERAS_HOME": str(folder)}
    for content in ('{"floatx": "float8"}', '{"image_data_format": "odd"}', "[]"):
        (folder / "keras.json").write_text(content)
        process = run("train.py", *TINY, env=environment)
        assert_refused(process, "Keras can't start: .*keras.json")
    (folder / "keras.json").write_text('{"floatx": "float16"}')
    process = run("train.py", *TINY, env=environment)
    assert (process.returncode, process.stderr) == (0, "")
    model.load("incognito_model.h5")
