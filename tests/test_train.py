import itertools
import os
import re
import resource
import shlex
import subprocess
import sys
import textwrap

import h5py
import numpy as np
import pytest
from build import on_terminal, read_until
from conftest import (
    CONTRACT,
    PRE_TRAINED,
    ROOT,
    assert_one_line_error,
    predict,
    random_model,
    run,
    write_sequences,
)

import model
import train
from model import SequenceModel

SMALL = ["--units", 16, "--layers", 1, "--epochs", 3]


@pytest.fixture
def folder(tmp_path):
    """A folder with a few hundred different sequences to learn from."""
    write_sequences(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The content of the file that a run with the flags SMALL leaves."""
    path = tmp_path_factory.mktemp("finished")
    write_sequences(path)
    process = run("train.py", *SMALL, cwd=path)
    assert process.returncode == 0, process.stderr
    return (path / "incognito_model.h5").read_bytes()


@pytest.fixture
def finished(folder, finished_run):
    """The folder after such a run."""
    (folder / "incognito_model.h5").write_bytes(finished_run)
    return folder


def test_the_contract_command_tells_what_it_does_and_nothing_else(trained):
    folder, process = trained
    output = process.stdout
    assert process.stderr == ""
    assert sorted(os.listdir(folder)) == ["incognito_model.h5", "sequences.txt"]
    assert re.search(r"Read 1,000 sequences, 4,991 characters, an alphabet of 38, from", output)
    assert re.search(r"Cut to 8 characters, because they were longer: 44 ", output)
    assert re.search(r"Learning from 900, holding out 100", output)
    assert re.search(r"3 × LSTM\(32\), 27,143 parameters", output)
    losses = [float(loss) for loss in re.findall(r"- loss: ([\d.]+)", output)]
    held_out = [float(loss) for loss in re.findall(r"val_loss: ([\d.]+)", output)]
    assert len(losses) == len(held_out) == len(re.findall("^Epoch ", output, re.M)) == 10
    assert len(re.findall(r" - [\d,]+ sequences/s - 0:\d\d:\d\d left$", output, re.M)) == 10
    assert losses[-1] < losses[0]
    best = held_out.index(min(held_out)) + 1
    assert f"h5 holds epoch {best}: validation loss {min(held_out):.4f} nats" in output
    assert "\r" not in output
    assert "\b" not in output
    assert output.endswith("python sample.py --weights_path incognito_model.h5\n")


def test_a_finished_run_says_so_and_changes_nothing(trained):
    folder, first = trained
    before = (folder / "incognito_model.h5").read_bytes()
    again = run(*shlex.split(CONTRACT), cwd=folder)
    assert again.returncode == 0
    assert "is finished: it has learned for 10 epochs" in again.stdout
    assert again.stdout.splitlines()[-2:] == first.stdout.splitlines()[-2:]
    assert (folder / "incognito_model.h5").read_bytes() == before


def test_the_loss_is_the_mean_over_characters_and_ends(trained):
    folder, _ = trained
    with open(folder / "sequences.txt", encoding="utf-8") as file:
        corpus = model.encode(file.read().split("\n"), sentinel=" ", max_len=8)
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
    assert count == corpus.targets[held_out].sum()
    assert min(metadata["history"]["val_loss"]) == pytest.approx(total / count, rel=1e-5)


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
    process = run("train.py", *SMALL, "--max_len", 10, "--epochs", 6, cwd=tmp_path)
    assert "Cut to 10 characters, because they were longer: 500 " in process.stdout
    ours, _ = model.load(tmp_path / "incognito_model.h5")
    assert predict(ours, lines[0])[:, 0].max() < 0.001
    assert np.mean([len(text) == 10 for text in ours.sample(count=500)]) > 0.97
    result = run("sample.py", "--weights_path", "incognito_model.h5", "--prompt", "", cwd=tmp_path)
    assert max(map(len, result.stdout.split())) == 10


SCRIPTS = "さくら\n山田太郎\nمحمد\nفاطمة\nZoë\nČeněk\n😀👍\n👩‍🚀\n"


@pytest.mark.parametrize(
    ("loader", "content"),
    [
        ("SequenceLoader", "\ufeff\n" + SCRIPTS.replace("\n", "\r\n\r\n")),
        pytest.param(
            "UserNameLoader",
            'name,n\n"Doe, J",1\n"two\nlines",2\n' + SCRIPTS,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_any_script_can_be_learned_and_invented(tmp_path, loader, content):
    (tmp_path / "names").write_bytes(content.encode())
    expected = set(SCRIPTS.split()) | ({"Doe, J", "two\nlines"} if "Doe" in content else set())
    command = (
        f"train.py --loader_class {loader} --sequence_path names --units 48 --layers 1 "
        "--sentinel | --dropout 0 --epochs 40 --batch_size 2 --learning_rate 0.02 "
        "--validation_split 0"
    )
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    process = run(*shlex.split(command), cwd=tmp_path, env=ascii_only)
    assert process.returncode == 0, process.stderr
    trained, _ = model.load(tmp_path / "incognito_model.h5")
    invented = list(trained.sample(count=200))
    assert set(invented) >= expected
    assert sum(text in expected for text in invented) > 150
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
    "an unknown flag": (["--unit", "3"], "unrecognized arguments: --unit 3"),
    "an unknown loader": (["--loader_class", "Loader"], "--loader_class: invalid choice"),
    "no number": (["--units", "many"], "--units: invalid int value: 'many'"),
    "no units": (["--units", "0"], "--units: not from 1 to"),
    "negative epochs": (["--epochs", "-3"], "--epochs: not from 1 to"),
    "a NaN": (["--dropout", "nan"], "--dropout: not from 0 to"),
    "all held out": (["--validation_split", "1"], "--validation_split: not from 0 to"),
    "a long sentinel": (["--sentinel", "ab"], "--sentinel: not a single character: 'ab'"),
    "no sentinel": (["--sentinel", ""], "--sentinel: not a single character: ''"),
    "nothing to wait for": (
        ["--patience", "2", "--validation_split", "0"],
        "--patience waits for a better validation loss",
    ),
    "a missing file": (
        ["--sequence_path", "missing.txt"],
        "--sequence_path: can't read missing.txt: No such file",
    ),
    "a folder for a file": (["--sequences_path", "."], "--sequence_path: can't read .: Is a dir"),
    "a file not UTF-8": (["--sequence_path", "latin.txt"], "latin.txt, line 2: not UTF-8"),
    "an empty file": (["--sequence_path", "blank.txt"], "blank.txt holds no sequence"),
    "an empty CSV": (
        ["--sequence_path", "latin.txt", "--loader_class", "UserNameLoader"],
        "latin.txt, line 2: not UTF-8",
    ),
    "a sentinel in use": (
        ["--sequence_path", "spaced.txt", "--sentinel", " "],
        "spaced.txt, line 3: the sequence contains the sentinel ' ' (2 in all do); "
        "pass a character that none contains, such as --sentinel '~'",
    ),
    "no such folder": (["--save_path", "missing/model.h5"], "--save_path: can't write missing/"),
    "a path without a name": (["--save_path", "new/"], "--save_path: 'new/' is not a regular file"),
    "the data to save to": (
        ["--save_path", "sequences.txt", "--overwrite"],
        "--save_path: sequences.txt is the file of --sequence_path",
    ),
    "a folder to save to": (
        ["--save_path", "."],
        "--save_path: '.' is not a regular file; name one",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_one_line_at_once_and_no_file(folder, arguments, message):
    (folder / "latin.txt").write_bytes(b"abc\ncaf\xe9\n")
    (folder / "blank.txt").write_bytes(b"\n \n")
    (folder / "spaced.txt").write_bytes(b"abc\n\na b\nc|d\ne f\n")
    before = sorted(os.listdir(folder))
    process = run("train.py", *arguments, cwd=folder)
    assert_one_line_error(process, "train.py")
    assert message in process.stderr
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--units", "0"], ["--sequence_path", "missing"]]
)
def test_cheap_answers_do_not_wait_for_keras(folder, arguments):
    process = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "train.py", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert "argparse" in process.stderr
    assert not re.search(r"\| +(keras|tensorflow|jax|wordfreq)\b", process.stderr)


def test_help_shows_every_flag_with_its_default(folder):
    process = run("train.py", "--help", cwd=folder)
    assert process.returncode == 0
    for flag in re.findall(r"--\w+", CONTRACT):
        assert flag in process.stdout
    shown = " ".join(process.stdout.split())
    assert shown.count("(default: ") == 21
    assert "example:" in shown


# The file at --save_path


def test_more_epochs_continue_a_finished_run(finished):
    _, before = model.load(finished / "incognito_model.h5")
    process = run("train.py", *SMALL, "--epochs", 5, cwd=finished)
    assert "Continuing incognito_model.h5 after epoch 3" in process.stdout
    assert "Epoch 4/5" in process.stdout
    _, after = model.load(finished / "incognito_model.h5")
    for name, losses in before["history"].items():
        assert after["history"][name][:3] == losses
        assert len(after["history"][name]) == 5


def test_a_full_disk_stops_with_a_line_and_keeps_the_file(finished):
    before = (finished / "incognito_model.h5").read_bytes()
    limit = len(before) // 2
    process = run(
        *["train.py", *SMALL, "--epochs", 5],
        cwd=finished,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert process.returncode == 2
    assert "error: --save_path: can't write incognito_model.h5: File too large" in process.stderr
    assert process.stderr.count("\n") == 1
    assert (finished / "incognito_model.h5").read_bytes() == before
    assert sorted(os.listdir(finished)) == ["incognito_model.h5", "sequences.txt"]


def test_another_run_never_replaces_a_file_unless_told_to(trained, tmp_path):
    folder, _ = trained
    path = folder / "incognito_model.h5"
    before = path.read_bytes()
    (tmp_path / "other.txt").write_text("abc\ndef\n")
    for change, message in {
        ("--units", 16): "was trained with --units 32, not 16",
        ("--seed", 1): "was trained with --seed 0, not 1",
        ("--max_len", 7): "was trained with --max_len 8, not 7",
        ("--num_sequences", 999): "was trained with other data (--sequence_path, --num_sequences)",
        ("--sentinel", "|"): "was trained with --sentinel ' ', not '|'",
        (
            "--sequence_path",
            tmp_path / "other.txt",
        ): "was trained with other data (--sequence_path, --num_sequences)",
    }.items():
        process = run(*shlex.split(CONTRACT), *change, cwd=folder)
        assert_one_line_error(process, "train.py")
        assert f"--save_path: incognito_model.h5 {message}; pass --overwrite" in process.stderr
    assert path.read_bytes() == before
    copy = tmp_path / "copy.h5"
    copy.write_bytes(before)
    (tmp_path / "sequences.txt").write_text("abc\ndef\n")
    process = run("train.py", *SMALL, "--save_path", copy, "--overwrite", cwd=tmp_path)
    assert process.returncode == 0
    assert model.load(copy)[1]["units"] == 16


@pytest.mark.parametrize("content", [b"my diary\n", b"", b"\x89HDF\r\n\x1a\n" + bytes(2000)])
def test_a_file_that_is_no_model_is_never_replaced(folder, content):
    (folder / "incognito_model.h5").write_bytes(content)
    process = run("train.py", *SMALL, cwd=folder)
    assert_one_line_error(process, "train.py")
    assert "not a model that train.py saved" in process.stderr
    assert "--overwrite" in process.stderr
    assert (folder / "incognito_model.h5").read_bytes() == content


def test_a_model_without_training_state_is_not_continued(finished):
    with h5py.File(finished / "incognito_model.h5", "r+") as file:
        del file[model.TRAINING_STATE]
    process = run("train.py", *SMALL, cwd=finished)
    assert_one_line_error(process, "train.py")
    assert "holds a finished model without what continuing needs" in process.stderr


def test_patience_stops_a_run_that_no_longer_improves(folder):
    arguments = ["--units", 64, "--layers", 1, "--dropout", 0, "--learning_rate", 0.05]
    command = ["train.py", *arguments, "--epochs", 60, "--patience", 2]
    process = run(*command, cwd=folder)
    assert process.returncode == 0
    _, metadata = model.load(folder / "incognito_model.h5")
    losses = metadata["history"]["val_loss"]
    assert 3 <= len(losses) < 60
    assert losses.index(min(losses)) == len(losses) - 3
    assert "is finished" in run(*command, cwd=folder).stdout


def test_a_loss_that_is_no_number_stops_with_a_line_and_keeps_the_file(finished):
    with h5py.File(finished / "incognito_model.h5", "r+") as file:
        for array in file[model.TRAINING_STATE].values():
            if array.dtype == np.float32:  # weights whose sums are more than a float32 can hold
                array[...] = np.resize([3e38, -3e38, 3e38], array.shape)
    before = (finished / "incognito_model.h5").read_bytes()
    process = run("train.py", *SMALL, "--epochs", 4, cwd=finished)
    assert process.returncode == 2
    assert process.stderr.startswith("train.py: error: the loss of epoch 4 is not a number")
    assert process.stderr.count("\n") == 1
    assert (finished / "incognito_model.h5").read_bytes() == before


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
    expected = (
        "train.py: error: can't print what happens: Broken pipe; epochs that ended are kept\n"
    )
    assert process.stderr.read() == expected
    assert len(model.load(folder / "incognito_model.h5")[1]["history"]["loss"]) >= 1


@pytest.mark.slow
def test_a_run_that_starts_over_does_not_promise_to_continue(finished):
    before = (finished / "incognito_model.h5").read_bytes()
    command = [sys.executable, ROOT / "train.py", *map(str, SMALL), "--overwrite"]
    with on_terminal([*command, "--epochs", "500"], cwd=finished) as (terminal, process):
        read_until(terminal, "Learning from")
        os.write(terminal, b"\x03")
        shown = read_until(terminal, None)
        assert process.wait(60) == 130
    assert shown.endswith("Stopped: nothing new was saved.\r\n")
    assert not re.search(r"oneDNN|CUDA|cuda|absl", shown)
    assert (finished / "incognito_model.h5").read_bytes() == before
    with on_terminal([*command, "--epochs", "500"], cwd=finished) as (terminal, process):
        read_until(terminal, "\rEpoch 3/500 - ")
        os.write(terminal, b"\x03")
        assert "same command without --overwrite continues" in read_until(terminal, None)
        assert process.wait(60) == 130


def test_the_sentinel_in_a_pipe_is_an_error_too(folder):
    process = run(
        *["train.py", "--sequence_path", "/dev/stdin", "--sentinel", " "], input="ab\nc d\n"
    )
    assert_one_line_error(process, "train.py")
    assert "/dev/stdin, sequence 2: the sequence contains the sentinel ' '" in process.stderr


def test_the_held_out_part_is_a_share_of_the_distinct_sequences():
    rng = np.random.default_rng(0)
    sequences = ["".join(rng.choice(list("abcd"), 4)) for _ in range(2000)]
    corpus = model.encode(sequences)
    parts = train.split(corpus, 0.1)
    assert sorted(np.concatenate(parts)) == list(range(2000))
    kinds = [{row.tobytes() for row in corpus.rows[part]} for part in parts]
    assert not kinds[0] & kinds[1]
    assert len(kinds[1]) == round(0.1 * len(set(sequences)))
    assert train.split(corpus, 0.1)[1].tobytes() == parts[1].tobytes()
    assert len(train.split(corpus, 0)[1]) == 0
    assert len(train.split(model.encode(["a", "a"]), 0.9)[1]) == 0
    assert len(train.split(model.encode(["a", "b"]), 0.1)[1]) == 0
    assert len(train.split(model.encode(["a", "b"]), 0.5)[1]) == 1


# How it learns


LEARN = """
    import sys
    import h5py
    import numpy as np
    import model, train

    arguments = ["--units", "16", "--batch_size", sys.argv[2], "--dropout", "0", "--max_len", "8"]
    _, args = train.parse_arguments(arguments)
    train.read_source(args)
    corpus = train.read_corpus(args)
    everything = np.arange(min(len(corpus), 5 * args.batch_size))
    keras = train.import_keras()
    network = train.prepare_network(args, corpus, everything, 100, None, train.Group())
    before = network.get_weights()
    scale = 1 / (args.batch_size * corpus.targets.mean())
    learn, evaluate, _ = train.COMPILERS[keras.backend.backend()](
        network, args.batch_size, scale, train.Group()
    )
    calls = list(train.make_calls(corpus, everything, args.batch_size, 1, None, 1))
    untrained = sum(evaluate(*call) for call in calls)
    losses = [learn(*call) for call in calls]
    with h5py.File(sys.argv[1], "w") as file:
        file["loss"] = untrained / corpus.targets[everything].sum()
        for index, (first, last) in enumerate(zip(before, network.get_weights())):
            file[f"before/{index}"], file[f"after/{index}"] = first, last
        for step, (parts, _) in enumerate(calls):
            for part, (rows, targets) in enumerate(parts):
                file[f"{step}/{part}/rows"], file[f"{step}/{part}/targets"] = rows[0], targets[0]
        file.attrs["scale"] = scale
"""


# In parts, or of several lengths.
@pytest.mark.parametrize("batch_size", [192, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", ["tensorflow", pytest.param("jax", marks=pytest.mark.slow)])
def test_it_learns_what_stock_keras_learns_from_the_same_batches(folder, backend, batch_size):
    import keras

    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LEARN), "learned.h5", str(batch_size)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    with h5py.File(folder / "learned.h5") as file:
        before, after = (
            [file[f"{name}/{index}"][()] for index in range(len(file[name]))]
            for name in ("before", "after")
        )
        calls = [
            [(part["rows"][()], part["targets"][()]) for part in file[step].values()]
            for step in ("01" if batch_size == 192 else "01234")
        ]
        scale, loss = file.attrs["scale"], file["loss"][()]
    characters = len(before[-1])
    network = keras.Sequential(
        [
            keras.Input((None, characters)),
            *(keras.layers.LSTM(16, return_sequences=True) for _ in range(2)),
            keras.layers.Dense(characters, activation="softmax"),
        ]
    )
    network.set_weights(before)
    network.compile(
        keras.optimizers.Adam(
            keras.optimizers.schedules.CosineDecay(0.01, 100), global_clipnorm=1.0
        ),
        "sparse_categorical_crossentropy",
    )
    # All parts in one batch, as long as the longest; Keras divides by its size.
    assert len(calls[0]) == (3 if batch_size == 192 else 1)
    assert len({rows.shape for parts in calls for rows, _ in parts}) > 1
    total = 0
    batches = []
    for parts in calls:
        length = max(rows.shape[1] for rows, _ in parts)
        rows = np.concatenate([np.pad(r, [(0, 0), (0, length - r.shape[1])]) for r, _ in parts])
        targets = np.concatenate([targets for _, targets in parts])
        inputs = np.eye(characters, dtype=np.float32)[np.pad(rows[:, :-1], [(0, 0), (1, 0)])]
        weights = (np.arange(length) < targets[:, None]).astype(np.float32)
        batches.append((inputs, rows, weights))
        nats = network.evaluate(inputs, rows, 1000, sample_weight=weights, verbose=0)
        total += nats * weights.size
    assert total / sum(weights.sum() for _, _, weights in batches) == pytest.approx(loss, rel=1e-5)
    for inputs, rows, weights in batches:
        network.train_on_batch(inputs, rows, weights * weights.size * scale)
    for ours, theirs, first in zip(after, network.get_weights(), before):
        assert np.abs(theirs - first).max() > 1e-3
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_a_pass_takes_each_sequence_once_and_pads_little():
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcde"), length)) for length in rng.geometric(0.1, 1000)]
    corpus = model.encode(texts)
    chosen = rng.permutation(1000)[:777]
    for batch_size, steps, seed in [(32, 5, 3), (128, 2, 3), (300, 64, None), (1000, 1, 0)]:
        seen, padded = [], 0
        for parts, count in train.make_calls(corpus, chosen, batch_size, steps, None, seed):
            width = sum(targets.shape[1] for _, targets in parts)
            assert width == batch_size
            for rows, targets in parts:
                padded += rows[:count].size
                assert not targets[count:].any()
                for row, real in zip(rows.reshape(-1, rows.shape[2]), targets.ravel()):
                    if real:
                        assert real <= len(row)
                        seen.append(corpus.alphabet.decode(row[row > 0]))
        assert sorted(seen) == sorted(corpus.alphabet.decode(r[r > 0]) for r in corpus.rows[chosen])
        assert padded < 777 * corpus.targets.max()
    allowed = np.array([40, 65])
    calls = train.make_calls(corpus, chosen, 32, 5, allowed, 0)
    assert {rows.shape[2] for parts, _ in calls for rows, _ in parts} == {40, 65}


def test_another_seed_or_epoch_is_another_order():
    corpus = model.encode(["".join(pair) for pair in itertools.product("abcdefgh", repeat=2)])

    def order(seed):
        calls = train.make_calls(corpus, np.arange(64), 8, 2, None, seed)
        return b"".join(rows.tobytes() for parts, _ in calls for rows, _ in parts)

    assert order((0, 1)) == order((0, 1))
    assert len({order((0, 1)), order((0, 2)), order((1, 1)), order(None)}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--batch_size", 128, "--recurrent_dropout", 0.2]])
def test_jax_trains_continues_and_is_read_by_all(folder, flags):
    jax = {**os.environ, "KERAS_BACKEND": "jax"}
    command = ["train.py", *SMALL, *flags, "--layers", 2]
    whole = run(*command, "--save_path", "whole.h5", cwd=folder, env=jax)
    assert whole.returncode == 0
    assert whole.stderr == ""
    assert len(re.findall("^Epoch ", whole.stdout, re.M)) == 3
    stop = "--epochs", 3, "--save_path", "stopped.h5"
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *map(str, [*command[1:], *stop])],
        cwd=folder,
        env=jax,
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("Epoch 1"):
            process.kill()
    process.wait()
    continued = run(*command, *stop, cwd=folder, env=jax)
    assert "Continuing stopped.h5 after epoch" in continued.stdout
    with h5py.File(folder / "whole.h5") as first, h5py.File(folder / "stopped.h5") as second:
        assert len(first["training_state"]) > 10
        for name, array in first["training_state"].items():
            assert array[()].tobytes() == second["training_state"][name][()].tobytes()
    import keras

    network = keras.models.load_model(folder / "whole.h5")
    ours, _ = model.load(folder / "whole.h5")
    inputs = np.eye(len(ours.alphabet), dtype=np.float32)[[0, *ours.alphabet.encode("kos")]]
    expected = predict(ours, "kos")
    np.testing.assert_allclose(network.predict(inputs[None], verbose=0)[0], expected, atol=1e-5)
    more = run(*command, "--epochs", 4, "--save_path", "whole.h5", cwd=folder)
    assert "Continuing whole.h5 after epoch 3" in more.stdout
    assert more.returncode == 0


@pytest.mark.parametrize("backend", ["torch", "nothing"])
def test_a_backend_that_can_not_train_is_named_at_once(folder, backend):
    process = run("train.py", cwd=folder, env={**os.environ, "KERAS_BACKEND": backend})
    assert_one_line_error(process, "train.py")
    assert f"KERAS_BACKEND: {backend!r} can't train here; set it to tensorflow or jax" in (
        process.stderr
    )


# Starting from a model


@pytest.mark.parametrize("shift", [0, 800])  # exp(800) is no number
def test_an_extended_model_gives_the_old_sequences_the_same_odds(shift):
    source = random_model("\nbcdf", units=8, layers=2, seed=5)
    source.weights[-1][...] += shift
    corpus = model.encode(["abé", "fac", "éab"], characters="bcdf")
    assert corpus.alphabet.symbols == "\nabcdfé"
    arguments = ["--units", "8", "--layers", "2", "--seed", "3"]
    _, args = train.parse_arguments(arguments)
    network = train.prepare_network(args, corpus, np.arange(3), 10, source, train.Group())
    extended = SequenceModel(corpus.alphabet, 6, network.get_weights())
    known = [corpus.alphabet.symbols.index(symbol) for symbol in source.alphabet.symbols]
    for text in ("", "b", "dcfb", "ffffff"):
        before = predict(source, text)
        after = predict(extended, text)
        share = after[:, known].sum(axis=1, keepdims=True)
        np.testing.assert_allclose(after[:, known] / share, before, rtol=1e-5)
        assert (share < 1).all()
        assert (after > 0).all()


def test_a_model_is_tuned_on_other_data_into_another_file(tmp_path):
    names = ["Zoë Ågren", "Åsa Öberg", "Zoë Öberg", "Åsa Ågren"]
    (tmp_path / "names.txt").write_text("\n".join(names * 10), encoding="utf-8")
    source = PRE_TRAINED / "user_names_10000.h5"
    before = source.read_bytes()
    command = ["train.py", "--sequence_path", "names.txt", "--init_from", source, "--epochs", 8]
    command += ["--validation_split", 0]
    process = run(*command, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "names_10000.h5, which gains 4 characters" in process.stdout
    assert "Network: 2 × LSTM(256)" in process.stdout
    tuned, metadata = model.load(tmp_path / "incognito_model.h5")
    original, _ = model.load(source)
    assert set(tuned.alphabet.symbols) == {*original.alphabet.symbols, *"ëÅÖ "}
    losses = metadata["history"]["loss"]
    assert losses[-1] < losses[0]
    fresh = run(*command, "--epochs", 1, cwd=tmp_path)
    assert fresh.stdout.count("is finished") == 1
    copy = tmp_path / "copy.h5"
    copy.write_bytes(before)
    (tmp_path / "other.h5").write_bytes((tmp_path / "incognito_model.h5").read_bytes())
    for change, message in {
        ("--init_from", "other.h5"): "was trained with another --init_from",
        ("--init_from", PRE_TRAINED / "english_words_5000.h5"): "contains the sentinel ' '",
        ("--units", 64): "--units: ",
        ("--layers", 3): "--layers: ",
        ("--sentinel", "a"): "'a' is a character like others",
        ("--init_from", "none.h5"): "--init_from: can't read none.h5: No such file",
        ("--init_from", "names.txt"): "--init_from: names.txt is not a model",
        ("--init_from", copy, "--save_path", copy): "copy.h5 is the file of --init_from",
    }.items():
        process = run(*command, *change, cwd=tmp_path)
        assert_one_line_error(process, "train.py")
        assert message in process.stderr
    assert source.read_bytes() == copy.read_bytes() == before
    without = run("train.py", *command[1:3], "--units", 192, "--epochs", 8, cwd=tmp_path)
    assert_one_line_error(without, "train.py")


# Learning from models


def save_teacher(path, teacher, texts, flags=()):
    """Saves a `SequenceModel` as if it had been trained on these texts with these flags."""
    units, layers = len(teacher.weights[-2]), len(teacher.weights) // 3
    flags = ["--units", str(units), "--layers", str(layers), *flags]
    _, args = train.parse_arguments(flags)
    corpus = model.encode(texts, max_len=args.max_len)
    train.import_keras()
    network = train.prepare_network(args, corpus, np.arange(len(texts)), 1, None, train.Group())
    model.save(path, network, teacher.weights, train.describe(args, corpus, None, []))


def test_a_model_learns_what_its_teachers_predict_together(tmp_path):
    texts = ["".join(word) for word in itertools.product("abc", repeat=3)]
    (tmp_path / "sequences.txt").write_text("\n".join(texts * 200), encoding="utf-8")
    teachers = [random_model("\nabc", max_len=3, units=4, layers=1, seed=seed) for seed in (1, 2)]
    for number, teacher in enumerate(teachers):
        save_teacher(tmp_path / f"teacher{number}.h5", teacher, texts)
    process = run(
        *["train.py", "--teachers", "teacher0.h5", "--teachers", "teacher1.h5", "--units", 24],
        *["--dropout", 0, "--epochs", 8, "--validation_split", 0, "--layers", 1],
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stderr
    assert "Learning from 5,400 sequences that 2 models invent, holding out 0" in process.stdout
    assert "holds epoch 8: loss against its teachers" in process.stdout
    student, _ = model.load(tmp_path / "incognito_model.h5")
    divergence = []
    for text in ["", *texts, *(text[:2] for text in texts)]:
        mean = sum(model.distribution(each.read(text)[0][-1]) for each in teachers) / 2
        if not text:  # no sequence is empty
            mean[0] = 0
            mean /= mean.sum()
        ours = predict(student, text)[-1]
        divergence.append((mean * np.log(np.maximum(mean, 1e-9) / ours)).sum())
    assert max(divergence) < 0.05
    assert np.mean(divergence) < 0.005


@pytest.mark.parametrize("kept", [2**24, 2000])
def test_an_epoch_of_invented_sequences_uses_each_as_often_as_others(monkeypatch, kept):
    monkeypatch.setattr(train, "PREDICTIONS", kept)
    teacher = random_model("\nabcdefgh", max_len=9)
    calls = list(train.make_invented_calls([teacher], 1000, 10, 32, 5, None, (3, 1), train.Group()))
    assert len({part[0].shape[:2] for parts, _ in calls for part in parts}) == 1
    rows = [
        row.tobytes()
        for parts, _ in calls
        for rows, targets, predictions in parts
        for row, count, wanted in zip(
            np.pad(rows, [(0, 0), (0, 0), (0, 10 - rows.shape[2])]).reshape(-1, 10),
            targets.ravel(),
            predictions.reshape(-1, *predictions.shape[2:]),
        )
        if count and wanted[:count].sum() == pytest.approx(count, abs=1e-4)
    ]
    assert len(rows) == 1000
    long = [row for row in rows if row.count(0) < 4]  # not likely to be invented twice
    counts = np.array([long.count(row) for row in long])
    assert np.mean(counts == train.REUSE) > 0.9
    again = list(train.make_invented_calls([teacher], 1000, 10, 32, 5, None, (3, 1), train.Group()))
    other = list(train.make_invented_calls([teacher], 1000, 10, 32, 5, None, (3, 2), train.Group()))
    same = [
        all(np.array_equal(a[0][0][0], b[0][0][0]) for a, b in zip(calls, others))
        for others in (again, other)
    ]
    assert same == [True, False]


def test_models_that_can_not_teach_are_named(finished):
    words = PRE_TRAINED / "english_words_5000.h5"
    path = finished / "incognito_model.h5"
    before = path.read_bytes()
    texts = (finished / "sequences.txt").read_text(encoding="utf-8").split("\n")
    teacher = random_model("\naeikmnostu", units=4, layers=1)
    for name, learned, flags in [
        ("fewer.h5", texts[:200], []),
        ("short.h5", texts, ["--max_len", "5"]),
        ("all.h5", texts, ["--validation_split", "0"]),
        ("silent.h5", texts, []),
    ]:
        taught = SequenceModel(teacher.alphabet, 5 if name == "short.h5" else 8, teacher.weights)
        if name == "silent.h5":
            taught.weights[-1][0] = 1e5
        save_teacher(finished / name, taught, learned, flags)
    (finished / "more.txt").write_text("\n".join([*texts, "täkö"]), encoding="utf-8")
    for flags, message in {
        (path, words): f"--teachers: {words} has another sentinel than {path}; name models",
        (words, "--sentinel", "#"): f"--sentinel: that of {words} is ' '; leave the flag away",
        ("none.h5",): "--teachers: can't read none.h5: No such file",
        ("sequences.txt",): "--teachers: sequences.txt is not a model",
        (
            path,
            "--sequence_path",
            "more.txt",
        ): f"--teachers: {path} never saw 'ä', 'ö', which --sequence_path has; name",
        ("short.h5",): "short.h5 learned sequences of at most 5 characters; pass --max_len 5",
        ("fewer.h5",): "fewer.h5 may have learned what is held out to validate: its data,",
        ("all.h5",): "held out to validate: its --validation_split was 0.0, not 0.1; train",
        ("silent.h5",): "--teachers: silent.h5 invents only empty sequences; leave it out",
        (path, "--save_path", path): f"--save_path: {path} is the file of --teachers",
        (
            path,
            "--save_path",
            finished / "copy.h5",
        ): "copy.h5 was trained with other --teachers; pass",
    }.items():
        (finished / "copy.h5").write_bytes(before)
        other = ["--save_path", "copy.h5"]
        process = run("train.py", *SMALL, *other, "--teachers", *flags, cwd=finished)
        assert_one_line_error(process, "train.py")
        assert message in process.stderr
        assert path.read_bytes() == (finished / "copy.h5").read_bytes() == before


# What people watch


def test_invented_sequences_are_known_or_new(trained):
    folder, process = trained
    words = (folder / "sequences.txt").read_text(encoding="utf-8").split("\n")
    corpus = model.encode(words, " ", 8)
    learned = {words[index][:8] for index in train.split(corpus, 0.1)[0]}
    found = {
        name: {
            text
            for line in re.findall(f"^invented, {name}: (.*)$", process.stdout, re.M)
            for text in line.split("  ")
        }
        for name in ("new", "known")
    }
    assert len(found["new"]) > 50
    assert found["known"]
    assert found["known"] <= learned
    assert not found["new"] & learned


@pytest.mark.slow
def test_losses_are_logged_for_tensorboard_and_as_csv(folder):
    import tensorflow as tf

    command = ["train.py", *SMALL, "--log_dir", "runs/first"]
    for epochs in (2, 4):
        assert run(*command, "--epochs", epochs, cwd=folder).returncode == 0
    _, metadata = model.load(folder / "incognito_model.h5")
    history = metadata["history"]
    header, *lines = (folder / "runs/first/losses.csv").read_text().splitlines()
    assert header == "epoch,loss,val_loss"
    assert [list(map(float, line.split(","))) for line in lines] == [
        [epoch, *losses]
        for epoch, losses in enumerate(zip(history["loss"], history["val_loss"]), start=1)
    ]
    files = sorted((folder / "runs/first").glob("events.out.tfevents.*"))
    assert len(files) == 2
    points = {}
    for record in tf.data.TFRecordDataset(str(files[-1])):
        event = tf.compat.v1.Event.FromString(record.numpy())
        for value in event.summary.value:
            points[value.tag, event.step] = value.simple_value
    assert points == pytest.approx(
        {(name, 1 + epoch): history[name][epoch] for name in history for epoch in range(4)}
    )


def test_a_log_folder_that_can_not_be_is_a_mistake(folder):
    process = run("train.py", *SMALL, "--log_dir", "sequences.txt", cwd=folder)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1
    assert (
        "error: --log_dir: can't make sequences.txt: File exists; name a folder" in process.stderr
    )


# On a terminal


def test_a_terminal_shows_a_progress_bar_and_ctrl_c_stops(folder):
    command = [sys.executable, ROOT / "train.py", *map(str, SMALL), "--epochs", "500"]
    with on_terminal(command, cwd=folder) as (terminal, process):
        shown = read_until(terminal, "\rEpoch 3/500 - ")
        os.write(terminal, b"\x03")
        shown += read_until(terminal, None)
        assert process.wait(60) == 130
    assert re.search(r"Epoch 1/500 - loss: [\d.]+ - val_loss: [\d.]+", shown)
    assert len(re.findall("^invented, ", shown, re.M)) >= 2
    assert "Stopped: incognito_model.h5 keeps the last whole epoch" in shown
    assert "Traceback" not in shown
    assert not re.search(r"oneDNN|CUDA|cuda|absl", shown)
    _, metadata = model.load(folder / "incognito_model.h5")
    assert 2 <= len(metadata["history"]["loss"]) < 500
