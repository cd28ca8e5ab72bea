"""Both scripts in bad hours: signals, closed streams, other runs, and files of every kind."""

import fcntl
import json
import os
import pathlib
import pty
import re
import resource
import signal
import stat
import subprocess
import sys
import termios
import time

import h5py
import numpy as np
import pytest
from build import on_terminal, read_until
from conftest import ROOT, assert_one_line_error, random_model, run, write_sequences

import model
import sample
import train

TINY = ["--units", 4, "--layers", 1, "--epochs", 1]
LONG = ["--units", 4, "--layers", 1, "--epochs", 20_000]
MANY = ["--num_samples", 100_000_000, "--output", "new.txt"]


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


# Signals


HANG_UP = pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), HANG_UP])
def test_a_signal_stops_the_training_as_ctrl_c_does(folder, number, status):
    process = start("train.py", *LONG, cwd=folder)
    while not process.stdout.readline().startswith("Epoch 2/"):
        pass
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    path = "incognito_model.h5"
    assert err == f"\nStopped: {path} keeps the last whole epoch; the same command continues.\n"
    assert sorted(os.listdir(folder)) == [path, "sequences.txt"]
    assert len(model.load_training_state(folder / path)) > 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_what_was_invented(tmp_path, number, status):
    process = start("sample.py", *MANY, "--prompt", "", cwd=tmp_path)
    wait_for(lambda: sum(path.stat().st_size for path in tmp_path.iterdir()) > 4_000, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert re.fullmatch(r"Stopped: new\.txt holds [\d,]+ lines\n", err)
    assert os.listdir(tmp_path) == ["new.txt"]


@pytest.mark.slow
def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    process = start(
        *["sample.py", "--prompt", "", "--num_samples", 20_000, "--output", "new.txt"],
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    wait_for(lambda: any(tmp_path.iterdir()), process)
    time.sleep(0.1)
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=60)[1].endswith("new.txt holds 20,000 lines\n")
    assert process.returncode == 0


def test_a_closed_terminal_ends_a_conversation():
    with on_terminal([sys.executable, ROOT / "sample.py"]) as (terminal, process):
        read_until(terminal, "> ")
        time.sleep(1)  # Python's readline misses a signal that comes before it waits for keys
        os.kill(process.pid, signal.SIGHUP)
        assert "Traceback" not in read_until(terminal, None)
        assert process.wait(60) == 129


@pytest.mark.parametrize("script", ["sample.py", pytest.param("train.py", marks=pytest.mark.slow)])
def test_a_vanished_terminal_leaves_no_process(folder, script):
    flags = [str(flag) for flag in LONG] if script == "train.py" else []
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, ROOT / script, *flags],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        cwd=folder,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(terminal)
    read_until(master, "Epoch 2/" if script == "train.py" else "> ")
    os.close(master)
    assert process.wait(60) == 129
    if script == "train.py":
        model.load(folder / "incognito_model.h5")


@pytest.mark.parametrize("script", ["sample.py", "train.py"])
@pytest.mark.parametrize("module", ["numpy", "h5py"])
def test_ctrl_c_is_quiet_during_the_imports(tmp_path, script, module):
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", ROOT / script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    while f" {module}." not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert all(line.startswith("import time: ") for line in err.splitlines())


# Streams


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_as_good_as_none(folder, closed):
    for script, flags, made in (
        ("sample.py", "--prompt a --num_samples 3", None),
        ("sample.py", "--prompt a --num_samples 3 --output new.txt", "new.txt"),
        ("sample.py", "--score sequences.txt", None),
        ("train.py", "--units 4 --layers 1 --epochs 1 --save_path new.h5", "new.h5"),
    ):
        command = f"{sys.executable} {ROOT / script} {flags} {closed}"
        process = subprocess.run(
            command, shell=True, cwd=folder, capture_output=True, text=True, timeout=60
        )
        assert process.returncode == 0
        if "2" in closed:
            assert process.stderr == ""
        if "--score" in flags:
            assert "perplexity" not in process.stdout
        if made:
            assert (folder / made).stat().st_size > 0


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
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30))

    with open("/dev/zero", "rb") as endless:
        process = run("sample.py", "--num_samples", 1, stdin=endless, preexec_fn=limit)
    assert_one_line_error(process, "sample.py")
    assert "prompt 1 is longer than 1,048,576 characters" in process.stderr
    for script, flag in (("sample.py", "--exclude"), ("train.py", "--sequence_path")):
        process = run(script, flag, "/dev/zero", cwd=tmp_path, preexec_fn=limit)
        assert_one_line_error(process, script)
        assert f"{flag}: /dev/zero, line 1: it holds a NUL" in process.stderr
    assert os.listdir(tmp_path) == []


def test_prompts_and_a_file_can_not_both_be_standard_input():
    process = run("sample.py", "--exclude", "/dev/stdin", input="a\nb\n")
    assert_one_line_error(process, "sample.py")
    assert "pass --prompt too" in process.stderr
    process = run("sample.py", "--exclude", "/dev/stdin", "--prompt", "a", input="a\nb\n")
    assert process.returncode == 0
    assert "a" not in process.stdout.split("\n")


def test_a_model_is_read_whatever_the_process_was_started_with(tmp_path):
    def ignore():
        for number in (signal.SIGCHLD, signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
        resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))

    for prepare in (ignore, limit):
        process = run("sample.py", "--prompt", "a", "--num_samples", 2, preexec_fn=prepare)
        assert process.returncode == 0, process.stderr
        assert process.stdout.count("\n") == 2


# Files


def test_the_second_run_on_a_file_is_told(folder):
    first = start("train.py", *LONG, cwd=folder)
    lock = folder / ".incognito_model.h5.lock"
    wait_for(lock.exists, first)
    for flags in ([], ["--overwrite"], ["--seed", 1]):
        second = run("train.py", *LONG, *flags, cwd=folder)
        assert_one_line_error(second, "train.py")
        assert "another run is writing incognito_model.h5; wait" in second.stderr
    first.kill()  # which leaves its lock, and can leave half of a file
    first.communicate()
    assert lock.exists()
    (folder / ".incognito_model.h5.12345678.tmp").write_text("half")
    process = run("train.py", *TINY, "--overwrite", cwd=folder)
    assert process.returncode == 0, process.stderr
    assert sorted(os.listdir(folder)) == ["incognito_model.h5", "sequences.txt"]


def test_the_second_writer_of_results_is_told(tmp_path):
    first = start("sample.py", *MANY, "--prompt", "", cwd=tmp_path)
    wait_for(lambda: sum(path.stat().st_size for path in tmp_path.iterdir()) > 4_000, first)
    command = ["sample.py", "--prompt", "a", "--num_samples", 2, "--output", "new.txt"]
    second = run(*command, cwd=tmp_path)
    assert_one_line_error(second, "sample.py")
    assert "can't write new.txt: another process is writing it" in second.stderr
    first.kill()  # which leaves its lock and its part of the results
    first.communicate()
    assert len(os.listdir(tmp_path)) == 2
    assert run(*command, cwd=tmp_path).returncode == 0
    assert os.listdir(tmp_path) == ["new.txt"]
    assert (tmp_path / "new.txt").read_text().count("\n") == 2


@pytest.mark.slow
def test_files_with_names_like_those_of_helpers_are_left_alone(folder):
    for name in ("new.h5.tmp", "new.h5.lock", ".new.h5.lock", ".new.h5.mine.tmp"):
        (folder / name).write_text("precious")
    process = run("train.py", *TINY, "--save_path", "new.h5", cwd=folder)
    assert process.returncode == 0, process.stderr
    for name in ("new.h5.tmp", "new.h5.lock", ".new.h5.lock", ".new.h5.mine.tmp"):
        assert (folder / name).read_text() == "precious"


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
        "missing/new": "No such file or directory",
        "sequences.txt/new": "Not a directory",
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
def test_a_link_to_nowhere_leads_to_a_new_file(folder):
    (folder / "link.h5").symlink_to("target.h5")
    process = run("train.py", *TINY, "--save_path", "link.h5", cwd=folder)
    assert process.returncode == 0, process.stderr
    model.load(folder / "target.h5")
    assert (folder / "link.h5").is_symlink()


@pytest.mark.slow
def test_names_of_files_can_not_steer_the_terminal(tmp_path):
    folder = tmp_path / "naïve 名前 with spaces"
    folder.mkdir()
    write_sequences(folder)
    name = "\x1b]0;title\x07\x9b2J\u202e\udcff"
    os.rename(folder / "sequences.txt", folder / f"{name}.txt")
    flags = ["--sequence_path", f"{name}.txt", "--save_path", f"{name}.h5", "--log_dir", name]
    command = [sys.executable, ROOT / "train.py", *TINY, *flags]
    with on_terminal([*map(str, command)], columns=200, cwd=folder) as (terminal, process):
        shown = read_until(terminal, None)
        assert process.wait(60) == 0
    assert r"\x1b]0;title\x07\x9b2J\u202e\udcff.h5 " in shown
    assert "".join(shown.split()).isprintable()
    assert (folder / name / "losses.csv").exists()
    command = re.search(r"--weights_path (\$'.*?')", shown)[1]
    found = subprocess.run(["bash", "-c", f"ls {command} | wc -l"], cwd=folder, capture_output=True)
    assert found.stdout.strip() == b"1"


@pytest.mark.slow
def test_windows_line_ends_and_other_encodings_change_nothing(folder):
    content = "日本\nночь\nnaïve\n" * 4
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"}
    for name, text in (("unix", content), ("windows", "\ufeff" + content.replace("\n", "\r\n"))):
        (folder / f"{name}.txt").write_bytes(text.encode())
        files = ["--sequence_path", f"{name}.txt", "--save_path", f"{name}.h5"]
        options = {"env": environment, "encoding": "latin-1"}
        process = run("train.py", *TINY, *files, cwd=folder, **options)
        assert process.returncode == 0, process.stderr
    first, second = (model.load(folder / name)[0] for name in ("unix.h5", "windows.h5"))
    for ours, theirs in zip(first.weights, second.weights):
        np.testing.assert_array_equal(ours, theirs)
    answers = []
    for prompts, env in (("日\nн\n", None), ("\ufeff日\r\nн\r\n", environment)):
        command = ["sample.py", "--weights_path", "unix.h5", "--seed", 1]
        answers.append(run(*command, input=prompts, env=env, cwd=folder))
    assert answers[0].stdout == answers[1].stdout != ""
    assert not answers[1].stderr


@pytest.mark.slow
def test_hash_seeds_and_thread_counts_change_no_sequence(folder):
    results = set()
    for seed, threads in (("0", "1"), ("1", "2"), ("random", "7")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads}
        environment |= {"OPENBLAS_NUM_THREADS": threads}
        path = f"{seed}.h5"
        flags = ["--save_path", path, "--epochs", 2, "--units", 16, "--layers", 2]
        assert run("train.py", *flags, cwd=folder, env=environment).returncode == 0
        command = ["sample.py", "--weights_path", path, "--prompt", "", "--seed", 1]
        results.add(run(*command, cwd=folder, env=environment).stdout)
    assert len(results) == 1


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(folder):
    (folder / "sitecustomize.py").write_text(
        "import itertools, time\n"
        "jumps = itertools.cycle([0, -10**6, 10**9, -10**9])\n"
        "now = time.time\n"
        "time.time = lambda: now() + next(jumps)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    process = run("train.py", *TINY, "--log_dir", "log", cwd=folder, env=environment)
    assert process.returncode == 0, process.stderr
    assert "holds epoch 1" in process.stdout
    assert "-" not in re.search(r"([\d:-]+) left", process.stdout)[1]


# Numbers


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--units", 65_536], "training 2 layers of 65,536 units"),
        (["--units", 30_000, "--layers", 60], "training 60 layers of 30,000 units would take"),
        (["--units", 1_048_576], "--units: not from 1 to 65536"),
        (["--layers", 10**30], "--layers: not from 1 to 64"),
        (["--max_len", 10**9], "--max_len: not from 1 to 65536"),
        (["--learning_rate", "nan"], "--learning_rate: not from"),
        (["--dropout", "inf"], "--dropout: not from"),
        (["--epochs", "-1"], "--epochs: not from"),
        (["--batch_size", "0"], "--batch_size: not from"),
        (["--batch_size", ""], "--batch_size: invalid int value: ''"),
    ],
)
def test_what_can_not_be_is_said_at_once(folder, flags, named):
    begin = time.monotonic()
    process = run("train.py", *flags, cwd=folder)
    assert process.returncode == 2
    assert named in process.stderr
    assert process.stderr.count("\n") == 1
    assert time.monotonic() - begin < 2
    assert os.listdir(folder) == ["sequences.txt"]


def test_a_long_line_among_many_is_no_reason_to_take_all_memory(tmp_path):
    lines = "a" * 60_000 + "\n" + "b\n" * 1_000_000
    (tmp_path / "sequences.txt").write_text(lines)
    process = run("train.py", "--max_len", 65_536, cwd=tmp_path)
    assert process.returncode == 2
    assert process.stderr.startswith(
        "train.py: error: --sequence_path: 1,000,001 sequences of up to 60,000 characters would "
        "take at least 55.9 GiB of memory"
    )
    assert "lower --max_len" in process.stderr


def test_too_many_different_characters_are_no_text(tmp_path):
    characters = [chr(point) for point in range(32, 0x110000) if not 0xD800 <= point < 0xE000]
    (tmp_path / "sequences.txt").write_text("\n".join(characters))
    process = run("train.py", cwd=tmp_path)
    assert_one_line_error(process, "train.py")
    assert "1,112,012 different characters are more than a model can have" in process.stderr


@pytest.mark.slow
def test_weights_that_are_no_numbers_are_not_saved(folder):
    # Infinity at the end of an epoch, of which no loss tells any more.
    code = """
import sys, train
def learn(*arguments):
    loss = own(*arguments)
    network.weights[-1].assign(network.weights[-1] * float("inf"))
    return loss
def prepare(*arguments):
    global network
    network = prepare_own(*arguments)
    return network
own, prepare_own = train.pass_over, train.prepare_network
train.prepare_network = prepare
if "broken" in sys.argv:
    sys.argv.remove("broken")
    train.pass_over = learn
train.main(sys.argv[1:])
"""
    flags = ["--units", 4, "--layers", 1, "--validation_split", 0]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for extra in (["--epochs", 1], ["--epochs", 2, "broken"]):
        process = subprocess.run(
            [sys.executable, "-c", code, *map(str, [*flags, *extra])],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert process.returncode == 2
    assert "incognito_model.h5 keeps the last whole epoch; try a --learning_rate" in process.stderr
    assert process.stderr.count("\n") == 1
    _, metadata = model.load(folder / "incognito_model.h5")
    assert len(metadata["history"]["loss"]) == 1


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

    for change, reason in (
        (lambda: say(max_len=5), "was trained with other max_len than it says"),
        (say_fewer_layers, "was trained with other layers than it says"),
        (lambda: say(history={"loss": [2.0], "val_loss": []}), "without what continuing needs"),
        (repeat_state, "it holds more of a training state than 2 layers have"),
    ):
        with h5py.File(path, "r+") as file:
            change()
        changed = path.read_bytes()
        process = run(*command, "--epochs", 2, cwd=folder)
        assert_one_line_error(process, "train.py")
        assert "--save_path: incognito_model.h5" in process.stderr
        assert reason in process.stderr
        assert path.read_bytes() == changed
        assert run("sample.py", "--weights_path", path, "--prompt", "", cwd=folder).returncode == 0
        path.write_bytes(whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["<f4", "<i8"])
def test_a_training_state_of_another_type_is_not_continued(folder, kind):
    assert run("train.py", *TINY, cwd=folder).returncode == 0
    path = folder / "incognito_model.h5"
    with h5py.File(path, "r+") as file:
        state = file[model.TRAINING_STATE]
        for name in [name for name in state if state[name].dtype == kind]:
            value = state[name][()].astype("f8")
            del state[name]
            state[name] = value
    changed = path.read_bytes()
    process = run("train.py", *TINY, "--epochs", 2, cwd=folder)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1
    assert "was trained with a version of Keras that this one can't continue" in process.stderr
    assert path.read_bytes() == changed


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
            assert process.stderr.endswith(f"mend {folder}/keras.json if it is at fault\n")
            assert process.stderr.count("\n") == 1
        else:
            assert not process.stderr
            model.load(folder / "incognito_model.h5")


# Terminals


def test_nothing_that_is_shown_is_invisible():
    hidden = [chr(point) for point in (0x034F, 0x115F, 0x3164, 0xFE0F, 0xE0100, 0x200B, 0x2066)]
    for character in [*hidden, "\x1b", "\x9b", "\u202e", "\ud800", "\n"]:
        shown = model.printable(f"a{character}b")
        assert shown.isascii()
        assert len(shown) > 3
    assert model.printable("日本 é ❤ \u0301") == "日本 é ❤ \u0301"


def test_texts_that_run_leftwards_stand_alone_on_their_lines():
    assert sample.arrange(["abc", "de", "f"], 80) == ["abc  de  f"]
    assert sample.arrange(["abc", "שלום", "مرحبا"], 80) == ["abc", "שלום", "مرحبا"]


def test_columns_count_decomposed_and_wide_characters():
    texts = ["\u1112\u1161\u11ab", "e\u0301", "日本", "abcd"]
    assert [sample.count_cells(text) for text in texts] == [2, 1, 4, 4]


def test_a_sequence_with_a_newline_is_one_line(tmp_path):
    trained = random_model("#a\n", units=4, layers=1, max_len=4)
    text = "a\na"
    (tmp_path / "names.csv").write_text(f'name\n"{text}"\na\n')
    assert [len(sample.keep_to_one_line(each).split("\n")) for each in trained.sample(count=9)] == (
        [1] * 9
    )
    process = run("sample.py", "--score", tmp_path / "names.csv")
    assert [line.split("\t")[1] for line in process.stdout.splitlines()] == [r"a\na", "a"]


@pytest.mark.slow
@pytest.mark.parametrize("columns", [0, 1, 5])
def test_a_terminal_of_any_width_shows_progress_in_one_line(folder, columns):
    command = [sys.executable, ROOT / "train.py", *LONG[:4], "--epochs", "2"]
    with on_terminal([*map(str, command)], columns=columns, cwd=folder) as (terminal, process):
        shown = read_until(terminal, None)
        assert process.wait(60) == 0
    drawn = [part for part in shown.split("\r") if part.startswith("Epoch 1/2")]
    assert all(len(part) < (columns or 80) or part.startswith("Epoch 1/2 - ") for part in drawn)


# What explains can fail too


def test_a_file_that_changes_while_it_is_explained_is_explained_all_the_same(tmp_path):
    class Shrinking:
        """Holds the sentinel at first, and nothing when it is read again."""

        line, readings = 0, 0

        def __iter__(self):
            self.readings += 1
            return iter(["ab", "c d"] if self.readings == 1 else [])

    path = tmp_path / "sequences.txt"
    path.write_text("ab\nc d\n")
    args = train.parse_arguments(["--sequence_path", str(path), "--sentinel", " "])[1]
    loader = Shrinking()
    with pytest.raises(model.SentinelError) as caught:
        model.encode(loader, " ")
    text = train.explain_sentinel(args, loader, caught.value, "")
    assert "sequence 2: the sequence contains the sentinel ' ' (1 in all do); pass a" in text


def test_the_default_model_is_found_through_a_link(tmp_path):
    link = pathlib.Path(tmp_path / "invent")
    link.symlink_to(ROOT / "sample.py")
    process = subprocess.run(
        [sys.executable, link, "--prompt", "a", "--num_samples", "1"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.stdout.startswith("a"), process.stderr
