import csv
import itertools
import json
import os
import re
import shlex
import subprocess
import sys

import h5py
import numpy as np
import pytest
from conftest import (
    CONTRACT,
    PRE_TRAINED,
    ROOT,
    assert_one_line_error,
    finish,
    predict,
    random_model,
    run,
    terminal,
    write_sequences,
)

import model
import train
from model import SequenceModel

# More than there are to learn from, so that it means 270.
SMALL = ["--units", 16, "--layers", 1, "--epochs", 3, "--batch_size", 1000]
JAX = {**os.environ, "KERAS_BACKEND": "jax"}


@pytest.fixture
def folder(tmp_path):
    """A folder with a few hundred different sequences to learn from."""
    write_sequences(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A folder in which a run with the flags SMALL has ended and kept a log."""
    path = tmp_path_factory.mktemp("finished")
    write_sequences(path)
    process = run("train.py", *SMALL, "--save_path", "new/m.h5", "--log_dir", "runs/1", cwd=path)
    assert process.returncode == 0, process.stderr
    return path


@pytest.fixture
def finished(folder, finished_run):
    """A folder with the sequences and the model of such a run."""
    (folder / "incognito_model.h5").write_bytes((finished_run / "new" / "m.h5").read_bytes())
    return folder


def say(path, **changes):
    """Changes the metadata in a model's file."""
    with h5py.File(path, "r+") as file:
        metadata = json.loads(file.attrs[model.METADATA])
        file.attrs[model.METADATA] = np.bytes_(json.dumps({**metadata, **changes}))


def assert_refused(folder, message, *flags):
    """Asserts that a run is refused for a reason and leaves the file at --save_path as it is."""
    before = (folder / "incognito_model.h5").read_bytes()
    process = run("train.py", *SMALL, *flags, cwd=folder)
    assert_one_line_error(process, "train.py")
    assert f"--save_path: incognito_model.h5 {message}" in process.stderr
    assert "pass --overwrite" in process.stderr
    assert (folder / "incognito_model.h5").read_bytes() == before


# A whole run


def test_the_contract_command_tells_what_it_does_and_nothing_else(trained):
    folder, process = trained
    output = process.stdout
    assert process.stderr == ""
    assert sorted(os.listdir(folder)) == ["incognito_model.h5", "sequences.txt"]
    assert re.search(r"Read 1,000 sequences, 4,991 characters, an alphabet of 38, from", output)
    assert re.search(r"Cut 44 sequences to 8 characters ", output)
    assert re.search(r"Learning from 900 sequences, holding out 100", output)
    assert re.search(r"3 × LSTM\(32\), 27,143 parameters", output)
    line = r"^Epoch \d+/10 - loss: ([\d.]+) - val_loss: ([\d.]+) - [\d,]+ sequences/s$"
    epochs = re.findall(line, output, re.M)
    assert len(epochs) == len(re.findall("Epoch ", output)) == 10
    losses, held_out = (list(map(float, values)) for values in zip(*epochs))
    assert losses[-1] < losses[0]
    best = held_out.index(min(held_out)) + 1
    assert re.search(rf"^best epoch +{best} of 10$", output, re.M)
    assert re.search(rf"^validation loss +{min(held_out):.4f} nats", output, re.M)
    assert re.search(r"^speed +[\d,]+ sequences/s$", output, re.M)
    assert "\r" not in output
    assert "\b" not in output
    assert output.endswith("python sample.py --weights_path incognito_model.h5\n")


def test_a_finished_run_says_so_and_changes_nothing(trained):
    folder, first = trained
    before = (folder / "incognito_model.h5").read_bytes()
    again = run(*shlex.split(CONTRACT), cwd=folder)
    assert again.returncode == 0
    assert again.stderr == ""
    assert "is finished, after 10 epochs" in again.stdout
    told = [line for line in first.stdout.splitlines() if not line.startswith("speed ")]
    assert again.stdout.splitlines()[-4:] == told[-4:]
    assert (folder / "incognito_model.h5").read_bytes() == before


def test_the_loss_is_the_mean_over_characters_and_ends(trained):
    folder, _ = trained
    with open(folder / "sequences.txt", encoding="utf-8") as file:
        corpus = model.build_corpus(file.read().split("\n"), sentinel=" ", max_len=8)
    _, held_out = train.split(corpus, 0.1)
    ours, metadata = model.load(folder / "incognito_model.h5")
    total = count = 0
    for row, complete in zip(corpus.rows[held_out], corpus.complete[held_out]):
        text = corpus.alphabet.decode(row[row > 0])
        distribution = predict(ours, text)
        targets = [*corpus.alphabet.encode(text)] + [0] * int(complete)
        total -= sum(np.log(distribution[step, target]) for step, target in enumerate(targets))
        count += len(targets)
    assert len(held_out) == 100
    assert count == corpus.lengths[held_out].sum()
    assert min(metadata["history"]["val_loss"]) == pytest.approx(total / count, rel=1e-5)


def test_invented_sequences_are_new_held_out_or_learned(trained):
    folder, process = trained
    words = (folder / "sequences.txt").read_text(encoding="utf-8").split("\n")
    corpus = model.build_corpus(words, " ", 8)
    found = {
        name: [
            text
            for line in re.findall(f"^invented, {name}: (.*)$", process.stdout, re.M)
            for text in line.split("  ")
        ]
        for name in ("new", "held out", "learned")
    }
    assert sum(map(len, found.values())) == 10 * train.SHOWN
    assert len(found["new"]) > 40
    assert "" not in found["new"]
    for name, part in zip(("learned", "held out"), train.split(corpus, 0.1)):
        known = {corpus.alphabet.decode(row[row > 0]) for row in corpus.rows[part]}
        assert known >= set(found[name])
        assert not known & set(found["new"])
    assert found["learned"]


@pytest.mark.slow
def test_a_source_of_known_entropy_is_learned_to_within_2_percent(tmp_path):
    symbols, end = "abcdefgh", 0.08
    rng = np.random.default_rng(11)
    first = rng.dirichlet(np.ones(8))
    following = rng.dirichlet(np.full(8, 0.5), size=8) * (1 - end)
    rows = np.hstack([following, np.full((8, 1), end)])

    def entropy(p):
        return -(p[p > 0] * np.log(p[p > 0])).sum()

    # How often a sequence visits each state: (I - Q)⁻¹ of an absorbing chain.
    visits = first @ np.linalg.inv(np.eye(8) - following)
    nats = entropy(first) + visits @ [entropy(row) for row in rows]
    expected = nats / (1 + visits.sum())

    def draw():
        text, state = "", rng.choice(8, p=first)
        while state < 8:
            text += symbols[state]
            state = rng.choice(9, p=rows[state])
        return text

    (tmp_path / "chain.txt").write_text("\n".join(draw() for _ in range(4000)))
    command = (
        "train.py --sequence_path chain.txt --units 32 --layers 1 --dropout 0 --epochs 6 "
        "--max_len 200 --validation_split 0.2 --save_path chain.h5"
    )
    process = run(*shlex.split(command), cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    _, metadata = model.load(tmp_path / "chain.h5")
    assert min(metadata["history"]["val_loss"]) == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
def test_a_model_of_cut_sequences_learns_no_end(tmp_path):
    rng = np.random.default_rng(0)
    lines = ["".join(rng.choice(list("abc"), 30)) for _ in range(500)]
    (tmp_path / "sequences.txt").write_text("\n".join(lines))
    flags = ["--units", 16, "--layers", 1, "--max_len", 10, "--epochs", 6]
    process = run("train.py", *flags, cwd=tmp_path)
    assert "Cut 500 sequences to 10 characters " in process.stdout
    ours, _ = model.load(tmp_path / "incognito_model.h5")
    assert predict(ours, lines[0])[:, 0].max() < 0.001
    assert np.mean([len(text) == 10 for text in ours.sample(count=500)]) > 0.97


def test_any_script_can_be_learned_and_invented(tmp_path):
    names = [
        "さくら",
        "山田太郎",
        "محمد",
        "فاطمة",
        "Zoë",
        "Čeněk",
        "😀👍",
        "👩‍🚀",
        "Doe, J",
        "two\nlines",
    ]
    text = "\ufeffname,n\r\n" + "".join(f'"{name}",1\r\n\r\n' for name in names)
    (tmp_path / "names.csv").write_bytes(text.encode())
    command = (
        "train.py --sequence_path names.csv --units 48 --layers 1 --sentinel | --dropout 0 "
        "--epochs 40 --batch_size 2 --learning_rate 0.02 --validation_split 0"
    )
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    process = run(*shlex.split(command), cwd=tmp_path, env=ascii_only)
    assert process.returncode == 0, process.stderr
    trained, metadata = model.load(tmp_path / "incognito_model.h5")
    assert metadata["loader_class"] == "UserNameLoader"
    invented = list(trained.sample(count=200))
    assert set(invented) >= set(names)
    assert sum(text in names for text in invented) > 150
    process = run(
        *shlex.split("sample.py --weights_path incognito_model.h5 --num_samples 3"),
        cwd=tmp_path,
        input="さ\nمح\nZo\n👩\n",
        env=ascii_only | {"PYTHONIOENCODING": ""},
    )
    assert process.returncode == 0, process.stderr
    starts = [line[:1] for line in process.stdout.split("\n")]
    assert starts == [*"さささمممZZZ👩👩👩", ""]


# Mistakes


MISTAKES = {
    "an empty number": (["--batch_size", ""], "--batch_size: '' is not a whole number from 1 to"),
    "too many units": (["--units", "8193"], "'8193' is not a whole number from 1 to 8,192"),
    "too large a network": (["--units", "8192", "--layers", "60"], "; lower --units or --layers"),
    "negative epochs": (["--epochs", "-3"], "--epochs: '-3' is not a whole number from 1 to"),
    "a NaN": (["--learning_rate", "nan"], "--learning_rate: 'nan' is not a number from"),
    "all held out": (["--validation_split", "1"], "'1' is not a number from 0 to 0.9"),
    "a long sentinel": (
        ["--sentinel", "ab"],
        "--sentinel: 'ab' is not a single character, but 2 code points: U+0061, U+0062",
    ),
    "a letter of several code points": (
        ["--sentinel", "n\u0304"],
        "is not a single character, but 2 code points: U+006E, U+0304",
    ),
    "no flag": (["names.txt"], "'names.txt' needs a flag before it: --sequence_path names.txt"),
    "no flag for a model": (["a.h5"], "'a.h5' needs a flag before it: --init_from a.h5 to start "),
    "no such flag": (["--unit=3"], "there is no flag --unit; did you mean --units?"),
    "nobody to wait for": (
        ["--patience", "2", "--num_sequences", "3"],
        "--patience: 0.1 of 3 sequences leaves none to validate with; omit --patience or raise",
    ),
    "nothing to wait for": (
        ["--patience", "2", "--validation_split", "0"],
        "--patience waits for a better validation loss",
    ),
    "no file": (["--sequences_path", "."], "--sequence_path: can't read .: Is a directory"),
    "a file not UTF-8": (
        ["--sequence_path", "latin.txt"],
        "latin.txt, line 2: byte 0xe9 is not UTF-8",
    ),
    "a CSV of a header": (["--sequence_path", "header.csv"], "header.csv has no data rows"),
    "a sentinel in use": (
        ["--sequence_path", "spaced.txt", "--sentinel", " "],
        "spaced.txt, line 3: the sequence contains the sentinel ' ' (2 sequences do); "
        "pass a character that none contains, such as --sentinel '~'",
    ),
    "a sentinel in a pipe": (
        ["--sequence_path", "/dev/stdin", "--sentinel", " "],
        "/dev/stdin, line 2: the sequence contains the sentinel ' '",
    ),
    "a path without a name": (["--save_path", "new/"], "--save_path: 'new/' is not a regular file"),
    "the data to save to": (
        ["--save_path", "sequences.txt", "--overwrite"],
        "--save_path: sequences.txt is the file of --sequence_path",
    ),
    "a backend that can't train": ([], "KERAS_BACKEND: 'torch' is not supported; set it to "),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_one_line_at_once_and_no_file(folder, arguments, message):
    (folder / "latin.txt").write_bytes(b"abc\ncaf\xe9\n")
    (folder / "header.csv").write_bytes(b"name,n\n")
    (folder / "spaced.txt").write_bytes(b"abc\n\na b\nc|d\ne f\n")
    before = sorted(os.listdir(folder))
    backend = {"KERAS_BACKEND": "torch"} if "torch" in message else {}
    process = run(
        "train.py", *arguments, cwd=folder, input="ab\nc d\n", env={**os.environ, **backend}
    )
    assert_one_line_error(process, "train.py")
    assert message in process.stderr
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize("how", ["variable", "keras.json", "damaged"])
def test_a_backend_that_is_not_there_gets_one_line(folder, how):
    environment = {**os.environ, "KERAS_HOME": str(folder)}
    if how == "variable":
        environment["KERAS_BACKEND"] = "mxnet"
    if how == "keras.json":
        (folder / "keras.json").write_text('{"backend": "openvino"}')
    if how == "damaged":
        (folder / "tensorflow").mkdir()
        (folder / "tensorflow" / "__init__.py").write_text("raise ImportError('a library')\n")
        environment["PYTHONPATH"] = str(folder)
    process = run("train.py", *SMALL, cwd=folder, env=environment)
    assert process.returncode == 2
    assert process.stderr.startswith("train.py: error: ")
    assert process.stderr.count("\n") == 1
    assert "KERAS_BACKEND" in process.stderr
    assert not (folder / "incognito_model.h5").exists()


def test_what_is_not_learned_is_told(folder):
    (folder / "a.csv").write_text("Ort;Land\n" + "ab" * 5000 + "\n")
    process = run("train.py", *SMALL, "--sequence_path", "a.csv", cwd=folder)
    assert process.returncode == 0, process.stderr
    for told in (
        "Skipped the header (Ort, Land) and read the first column\n",
        "Rows that don't have as many columns as the first: 1; ",
        "Only one sequence was found; is there one per line?",
        "Cut 1 sequences to 64 characters (--max_len): 9,936 of 10,000 characters are left out",
        "validation: too few distinct sequences for a --validation_split of 0.1",
    ):
        assert told in process.stdout
    assert max(map(len, process.stdout.splitlines())) <= 2 * train.LINE_WIDTH
    assert model.load(folder / "incognito_model.h5")[1]["loader_class"] == "UserNameLoader"


def test_a_run_that_is_worse_than_guessing_says_so(folder, trained):
    rng = np.random.default_rng(0)
    lines = ["".join(rng.choice(list("ab"), 8)) for _ in range(30)]
    (folder / "sequences.txt").write_text("\n".join(lines))
    flags = ["--units", 16, "--layers", 1, "--epochs", 1, "--learning_rate", 9, "--dropout", 0]
    process = run("train.py", *flags, cwd=folder)
    assert re.search(r"That is worse than [\d.]+, what character frequencies", process.stdout)
    assert "worse" not in trained[1].stdout


@pytest.mark.parametrize("sentinel", [r"\t", r"\n", r"\0", r"\u2028", "\\"])
def test_the_sentinel_may_be_an_escape(sentinel):
    _, args = train.parse_arguments(["--sentinel", sentinel])
    assert args.sentinel == {r"\t": "\t", r"\n": "\n", r"\0": "\0", r"\u2028": "\u2028"}.get(
        sentinel, "\\"
    )


def test_a_log_folder_that_can_not_be_is_a_mistake(folder):
    process = run("train.py", "--log_dir", "sequences.txt", cwd=folder)
    assert process.returncode == 2
    assert process.stderr.startswith("train.py: error: --log_dir: can't ")
    assert process.stderr.endswith("sequences.txt: File exists\n")
    assert os.listdir(folder) == ["sequences.txt"]


def test_cheap_answers_do_not_wait_for_keras_and_help_shows_every_default(folder):
    command = [sys.executable, "-X", "importtime", ROOT / "train.py"]
    for arguments in (["--sequence_path", "missing"], ["--units", "0"], ["--help"]):
        process = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=folder)
        assert "argparse" in process.stderr
        assert not re.search(r"\| +(keras|tensorflow|jax|wordfreq)\b", process.stderr)
    assert process.returncode == 0
    assert set(re.findall(r"--\w+", CONTRACT)) <= set(re.findall(r"--\w+", process.stdout))
    assert " ".join(process.stdout.split()).count("(default: ") == 18
    assert "examples:" in process.stdout


# The file at --save_path


def test_more_epochs_continue_a_finished_run_and_its_log(finished, finished_run):
    train.import_keras()
    import tensorflow as tf

    _, before = model.load(finished / "incognito_model.h5")
    logs = finished_run / "runs" / "1"
    process = run("train.py", *SMALL, "--epochs", 5, "--log_dir", logs, cwd=finished)
    assert process.stderr == ""
    assert "Continuing incognito_model.h5 after epoch 3" in process.stdout
    assert "Epoch 4/5" in process.stdout
    _, after = model.load(finished / "incognito_model.h5")
    for name, losses in before["history"].items():
        assert after["history"][name][:3] == losses
        assert len(after["history"][name]) == 5

    with open(logs / "losses.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["epoch"]) for line in lines] == [0, 1, 2, 3, 4]
    for name, losses in after["history"].items():
        assert [float(line[name]) for line in lines] == losses
    for name, losses in {"train": "loss", "validation": "val_loss"}.items():
        points = []
        for path in sorted((logs / name).iterdir(), key=lambda path: path.stat().st_mtime):
            for record in tf.data.TFRecordDataset(str(path)):
                event = tf.compat.v1.Event.FromString(record.numpy())
                for value in event.summary.value:
                    if value.tag == "epoch_loss":
                        points.append((event.step, float(tf.make_ndarray(value.tensor))))
        steps, values = zip(*points)
        assert steps == (0, 1, 2, 3, 4)
        assert values == pytest.approx(after["history"][losses])


def test_flags_that_mean_the_same_are_the_same_run(finished):
    names = (finished / "sequences.txt").read_text(encoding="utf-8").split("\n")
    (finished / "names.csv").write_text("name\n" + "\n".join(names), encoding="utf-8")
    for flags in (
        ["--max_len", 8, "--batch_size", 270, "--sentinel", "\n", "--num_sequences", 300],
        ["--sequence_path", "names.csv", "--dropout", "3e-1"],
    ):
        process = run("train.py", *SMALL, *flags, cwd=finished)
        assert process.returncode == 0, process.stderr
        assert "The run in incognito_model.h5 is finished, after 3 epochs" in process.stdout


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--units", 17], "--units 16, not 17"),
        (["--layers", 2], "--layers 1, not 2"),
        (["--seed", 1], "--seed 0, not 1"),
        (["--recurrent_dropout", 0.2], "--recurrent_dropout 0.0, not 0.2"),
        (["--batch_size", 32], "--batch_size 270, not 32"),
        (["--max_len", 9], "--max_len 8, not 9"),
        (["--sentinel", "|"], r"--sentinel '\n', not '|'"),
        (["--max_len", 7], "other data (--sequence_path, --num_sequences, --max_len)"),
        (["--validation_split", 0.099], "--validation_split 0.1, not 0.099"),
        (["--sequence_path", "other.txt"], "other data (--sequence_path, --num_sequences, "),
        (["--sequence_path", "longer.txt"], "other data (--sequence_path, --num_sequences, "),
        (["--init_from", "copy.h5"], "another --init_from"),
    ],
)
def test_another_run_is_refused_by_what_differs(finished, flags, difference):
    (finished / "copy.h5").write_bytes((finished / "incognito_model.h5").read_bytes())
    (finished / "other.txt").write_text("kk" + (finished / "sequences.txt").read_text()[2:])
    (finished / "longer.txt").write_text((finished / "sequences.txt").read_text() + "\nk" * 99)
    assert_refused(finished, f"was trained with {difference}", *flags)


def test_what_can_not_be_continued_is_refused_but_read(finished):
    path = finished / "incognito_model.h5"
    whole = path.read_bytes()
    for content in (b"my diary\n", b"", b"\x89HDF\r\n\x1a\n" + bytes(2000)):
        path.write_bytes(content)
        assert_refused(finished, "is not a model that train.py saved")
    path.write_bytes(whole)
    say(path, format=1)
    assert_refused(finished, "was begun by an earlier version of train.py", "--epochs", 4)
    process = run("train.py", *SMALL, cwd=finished)
    assert "The run in incognito_model.h5 is finished, after 3 epochs" in process.stdout
    process = run("sample.py", "--weights_path", path, "--prompt", "k", cwd=finished)
    assert process.stdout.startswith("k"), process.stderr
    with h5py.File(path, "r+") as file:
        del file[model.TRAINING_STATE]
    assert_refused(finished, "holds a model without the state needed to continue")


# Weights whose sums are more than a float32 can hold, and one that leaves the loss finite.
@pytest.mark.parametrize(
    ("values", "shapes"),
    [([3e38, -3e38, 3e38], ()), pytest.param([1e31, 0], (11,), marks=pytest.mark.slow)],
)
def test_numbers_that_are_none_stop_with_a_line_and_keep_the_file(finished, values, shapes):
    path = finished / "incognito_model.h5"
    with h5py.File(path, "r+") as file:
        for name in sorted(file[model.TRAINING_STATE], key=int):
            array = file[model.TRAINING_STATE][name]
            if not shapes or (array.dtype == np.float32 and array.shape == shapes):
                array[...] = np.resize(values, array.shape)
                if shapes:
                    break
    before = path.read_bytes()
    process = run("train.py", *SMALL, "--epochs", 4, cwd=finished)
    assert process.returncode == 2
    assert process.stderr.startswith("train.py: error: the loss of epoch 4 or a weight is NaN or ")
    assert "incognito_model.h5 keeps the last whole epoch" in process.stderr
    assert process.stderr.count("\n") == 1
    assert path.read_bytes() == before


@pytest.mark.slow
def test_a_pipe_that_closes_stops_the_run_with_a_line(folder):
    command = [sys.executable, ROOT / "train.py", *map(str, SMALL), "--epochs", "1000"]
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not process.stdout.readline().startswith("invented, "):
        pass
    process.stdout.close()
    assert process.wait(60) == 2
    expected = "train.py: error: can't write the output: Broken pipe; epochs that ended are kept\n"
    assert process.stderr.read() == expected
    assert len(model.load(folder / "incognito_model.h5")[1]["history"]["loss"]) >= 1


def test_the_held_out_part_is_a_share_of_the_distinct_sequences():
    rng = np.random.default_rng(0)
    sequences = ["".join(rng.choice(list("abcd"), 4)) for _ in range(2000)]
    corpus = model.build_corpus(sequences)
    parts = train.split(corpus, 0.1)
    assert sorted(np.concatenate(parts)) == list(range(2000))
    kinds = [{row.tobytes() for row in corpus.rows[part]} for part in parts]
    assert not kinds[0] & kinds[1]
    assert len(kinds[1]) == round(0.1 * len(set(sequences)))
    assert train.split(corpus, 0.1)[1].tobytes() == parts[1].tobytes()
    assert len(train.split(corpus, 0)[1]) == 0
    assert len(train.split(model.build_corpus(["a", "a"]), 0.9)[1]) == 0
    assert len(train.split(model.build_corpus(["a", "b"]), 0.1)[1]) == 0
    assert len(train.split(model.build_corpus(["a", "b"]), 0.5)[1]) == 1


# How it learns


# Packed and, as on a GPU, one sequence in each row; each time with a stack that is filled up.
@pytest.mark.parametrize(
    ("batch_size", "packed"),
    [(32, True), (64, False), pytest.param(3, True, marks=pytest.mark.slow)],
)
def test_it_learns_what_stock_keras_learns_from_the_same_batches(
    folder, monkeypatch, batch_size, packed
):
    train.import_keras()
    import keras

    flags = ["--units", 16, "--batch_size", batch_size, "--dropout", 0, "--epochs", 20]
    flags += ["--sequence_path", folder / "sequences.txt"]
    _, args = train.parse_arguments(list(map(str, flags)))
    source = train.read_source(args)
    corpus = train.read_data(args, source).corpus
    training = np.arange(min(len(corpus), 5 * batch_size))
    data = train.Data(corpus, training, training, None)
    monkeypatch.setattr(train, "learns_by_hand", lambda args: packed)
    network = train.prepare_network(args, data, source)
    before = network.get_weights()
    plan_stacks = train.plan_stacks
    monkeypatch.setattr(train, "plan_stacks", lambda *how: plan_stacks(*how)._replace(depth=4))
    stacked = train.make_data(args, data, 0, 0, 1)
    assert stacked["steps_per_epoch"] == 2
    told = network.fit(**stacked, epochs=1, shuffle=False, verbose=0).history

    characters = len(corpus.alphabet)
    one_hot = np.eye(characters, dtype=np.float32)
    lstm = [keras.layers.LSTM(16, return_sequences=True) for _ in range(2)]
    dense = keras.layers.Dense(characters, activation="softmax")
    stock = keras.Sequential([keras.Input((None, characters)), *lstm, dense])
    stock.set_weights(before)
    steps = 20 * -(-len(training) // batch_size)
    rate = keras.optimizers.schedules.CosineDecay(0.01, steps)
    adam = keras.optimizers.Adam(rate, global_clipnorm=1.0)
    stock.compile(adam, "sparse_categorical_crossentropy")
    targets_per_batch = batch_size * corpus.lengths[training].mean()
    nats = count = 0
    for batch in train.deal(corpus.lengths, training, batch_size, seed=(0, 0)):
        targets = np.pad(corpus.rows[batch].astype(int), [(0, 0), (0, 1)])
        inputs = one_hot[np.pad(targets[:, :-1], [(0, 0), (1, 0)])]
        weights = (np.arange(9) < corpus.lengths[batch, None]).astype(np.float32)
        # Keras divides by the size of the batch.
        weights *= weights.size / targets_per_batch
        nats += float(stock.train_on_batch(inputs, targets, weights)) * targets_per_batch
        count += corpus.lengths[batch].sum()
    assert count == corpus.lengths[training].sum()
    assert told["loss"] == pytest.approx([nats / count], rel=1e-4)
    for ours, theirs, first in zip(network.get_weights(), stock.get_weights(), before):
        assert np.abs(theirs - first).max() > 1e-3
        np.testing.assert_allclose(ours, theirs, atol=2e-5)

    rows = np.pad(corpus.rows[training].astype(int), [(0, 0), (1, 1)])
    predicted = stock.predict(one_hot[rows[:, :-1]], verbose=0)
    likelihood = np.take_along_axis(predicted, rows[:, 1:, None], axis=2)[:, :, 0]
    counted = np.arange(9) < corpus.lengths[training, None]
    assert told["val_loss"] == pytest.approx([-np.log(likelihood[counted]).mean()], rel=1e-4)


@pytest.mark.slow
def test_jax_learns_it_too():
    command = [sys.executable, "-m", "pytest", __file__, "-m", ""]
    command += ["-k", "stock_keras or old_sequences"]
    process = subprocess.run(command, cwd=ROOT, env=JAX, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize(
    ("batch_size", "rows", "depth", "seed"),
    [(32, 8, 5, 3), (128, 32, 2, (0, 1)), (300, 75, 64, None), (128, 128, 9, 0), (777, 100, 1, 0)],
)
def test_an_epoch_takes_each_sequence_once_and_pads_little(batch_size, rows, depth, seed, devices):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcde"), length)) for length in rng.geometric(0.1, 1000)]
    corpus = model.build_corpus(texts, max_len=20)
    chosen = rng.permutation(1000)[:777]
    seen, batches, sizes, cells = [], 0, set(), 0
    plan = train.Plan(batch_size, rows, depth)
    for ids, positions in train.make_stacks(corpus, chosen, plan, seed, devices):
        assert ids.shape == positions.shape
        assert ids.shape[0] == -(-rows // devices) * devices
        assert ids.shape[1] == depth
        starts = np.count_nonzero(positions == 1, axis=(0, 2))
        real = np.count_nonzero(starts)
        assert starts[:real].all()  # what only fills up comes last
        batches += real
        sizes.update(starts[:real])
        cells += ids[:rows, :real].size
        for row, places in zip(ids.reshape(-1, ids.shape[2]), positions.reshape(-1, ids.shape[2])):
            for sequence in np.split(row, np.flatnonzero(places == 1))[1:]:
                seen.append(corpus.alphabet.decode(sequence[sequence > 0]))
    assert batches == -(-777 // batch_size)
    assert max(sizes) <= batch_size
    assert len(sizes) <= 2
    expected = [corpus.alphabet.decode(row[row > 0]) for row in corpus.rows[chosen]]
    assert sorted(seen) == sorted(expected)
    if rows < batch_size:
        assert cells < 1.5 * corpus.lengths[chosen].sum()


def test_another_seed_or_epoch_is_another_order():
    corpus = model.build_corpus(["".join(pair) for pair in itertools.product("abcdefgh", repeat=2)])

    def order(seed):
        stacks = train.make_stacks(corpus, np.arange(64), train.Plan(8, 2, 2), seed)
        return b"".join(ids.tobytes() for ids, _ in stacks)

    assert order((0, 1)) == order((0, 1))
    assert len({order((0, 1)), order((0, 2)), order((1, 1)), order(None)}) == 4


# Starting from a model


@pytest.mark.parametrize("shift", [0, 800])  # exp(800) is no number
def test_an_extended_model_gives_the_old_sequences_the_same_odds(shift):
    train.import_keras()
    source = random_model("\nbcdf", units=8, layers=2, seed=5)
    source.weights[-1][...] += shift
    corpus = model.build_corpus(["abé", "fac", "éab"], characters="bcdf")
    assert corpus.alphabet.symbols == "\nabcdfé"
    arguments = ["--units", "8", "--layers", "2", "--seed", "3"]
    _, args = train.parse_arguments(arguments)
    data = train.Data(corpus, np.arange(3), np.arange(0), None)
    network = train.prepare_network(args, data, source)
    extended = SequenceModel(corpus.alphabet, 6, network.get_weights())
    known = [corpus.alphabet.symbols.index(symbol) for symbol in source.alphabet.symbols]
    for text in ("", "b", "dcfb", "ffffff"):
        before = predict(source, text)
        after = predict(extended, text)
        share = after[:, known].sum(axis=1, keepdims=True)
        np.testing.assert_allclose(after[:, known] / share, before, rtol=1e-5)
        assert (share < 1).all()
        assert (after > 0).all()


def test_a_model_is_tuned_on_other_data_into_another_file(finished):
    source = finished / "incognito_model.h5"
    say(source, format=1)
    before = source.read_bytes()
    (finished / "names.txt").write_text("Zoë Ågren\nÅsa Öberg\n" * 20, encoding="utf-8")
    command = ["train.py", "--sequence_path", "names.txt", "--init_from", source, "--epochs", 3]
    command += ["--validation_split", 0, "--save_path", "tuned.h5"]
    process = run(*command, cwd=finished)
    assert process.returncode == 0, process.stderr
    assert "incognito_model.h5, with 8 characters added" in process.stdout
    assert "Network: 1 × LSTM(16)" in process.stdout
    tuned, metadata = model.load(finished / "tuned.h5")
    assert set(tuned.alphabet.symbols) == {*"\naeikmnostu", *"Zoë Ågren\nÅsa Öberg"}
    losses = metadata["history"]["loss"]
    assert losses[-1] < losses[0]
    assert run(*command, cwd=finished).stdout.count("is finished, after") == 1
    for change, message in {
        ("--init_from", "tuned.h5", "--save_path", "new.h5", "--sentinel", "Z"): "--sentinel: ",
        ("--init_from", PRE_TRAINED / "english_words_5000.h5"): "contains the sentinel ' '",
        ("--units", 64): "--units: ",
        ("--layers", 3): "--layers: ",
        ("--init_from", "none.h5"): "--init_from: can't read none.h5: No such file",
        ("--init_from", "names.txt"): "--init_from: names.txt is not a model",
        ("--save_path", source): "incognito_model.h5 is the file of --init_from",
    }.items():
        process = run(*command, *change, cwd=finished)
        assert_one_line_error(process, "train.py")
        assert message in process.stderr
    assert source.read_bytes() == before


# On a terminal


@pytest.mark.parametrize(
    ("wait_for", "told"),
    [
        (
            "Epoch 3/5000",
            "incognito_model.h5 keeps the last whole epoch; the same command without ",
        ),
        pytest.param("Learning from", "nothing new was saved.", marks=pytest.mark.slow),
    ],
)
def test_a_terminal_shows_a_progress_bar_and_ctrl_c_stops(finished, wait_for, told):
    path = finished / "incognito_model.h5"
    before = path.read_bytes()
    child = terminal("train.py", *SMALL, "--epochs", 5000, "--overwrite", cwd=finished)
    child.expect_exact(wait_for)
    shown = child.before
    child.sendintr()
    last, status = finish(child)
    assert status == 130
    assert f"\r\nStopped: {told}" in last
    assert not re.search(r"Traceback|oneDNN|CUDA|cuda|absl", shown + last)
    if wait_for == "Learning from":
        assert path.read_bytes() == before
    else:
        assert re.search(r"1/1.* - loss: [\d.]+ - val_loss: [\d.]+\r\n", shown)
        assert len(re.findall("^invented, ", shown, re.M)) >= 2
        assert 2 <= len(model.load(path)[1]["history"]["loss"]) < 5000
