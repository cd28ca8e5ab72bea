import concurrent.futures
import contextlib
import csv
import io
import itertools
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from conftest import (
    CONTRACT,
    PRE_TRAINED,
    ROOT,
    assert_refused,
    decode,
    edit_metadata,
    finish,
    predict,
    random_model,
    read_all,
    run,
    start,
    terminal,
    wait_for_line,
    write_sequences,
)

import model
import train
from model import SequenceModel

# More than there are to learn from, so that it means 285.
SMALL = ["--units", 16, "--layers", 1, "--epochs", 3, "--batch_size", 1000]
SMALL += ["--dropout", 0.3, "--recurrent_dropout", 0.1]
SAVED = pathlib.Path("incognito_model.h5")


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A folder in which a run with the flags SMALL has ended and kept a log."""
    path = tmp_path_factory.mktemp("finished")
    write_sequences(path)
    process = run("train.py", *SMALL, "--log_dir", "logs/1", cwd=path)
    assert process.returncode == 0
    assert process.stderr == ""
    return path


@pytest.fixture
def finished(folder, finished_run):
    """The working directory, with what such a run leaves."""
    shutil.copytree(finished_run, folder, dirs_exist_ok=True)
    return folder


def call(*arguments):
    """Runs the command line in this process and returns its exit status."""
    return train.main(list(map(str, arguments)))


def fail(capsys, *arguments):
    """Runs a command line that must fail in its course, and returns the line that says why."""
    with pytest.raises(SystemExit, match="2"):
        call(*arguments)
    told = capsys.readouterr().err
    assert re.fullmatch(r"train\.py: error: .*\n", told)
    return told


def read(*flags):
    """Returns the values of flags, the data and the model to start from that they name."""
    args = train.make_parser().parse_args(list(map(str, flags)))
    source = train.read_source(args)
    return args, train.read_data(args, source), source


# A whole run


def test_the_contract_command_tells_what_it_does_and_nothing_else(trained):
    folder, process = trained
    output = process.stdout
    assert process.stderr == ""
    assert sorted(os.listdir(folder)) == ["incognito_model.h5", "sequences.txt"]
    assert re.search(r"Read 1,000 sequences, 4,991 characters, an alphabet of 38, from", output)
    assert re.search(r"Cut 44 sequences to 8 characters ", output)
    assert re.search(r"Learning from 950 sequences, holding out 50", output)
    assert re.search(r"3 × LSTM\(32\), 27,143 parameters", output)
    line = r"^Epoch \d+/10 - loss: ([\d.]+) - val_loss: ([\d.]+) - [\d,]+ sequences/s$"
    epochs = re.findall(line, output, re.M)
    assert len(epochs) == len(re.findall("Epoch ", output)) == 10
    losses, held_out = (list(map(float, values)) for values in zip(*epochs))
    assert losses[-1] < losses[0]
    best = held_out.index(min(held_out)) + 1
    hint = "; more --epochs may help" if best == 10 else ""
    assert re.search(rf"^best epoch +{best} of 10{hint}$", output, re.M)
    chosen = "--dropout 0.125 --recurrent_dropout 0 --learning_rate 0.02"
    assert f"\nChosen for this much data: {chosen} --validation_split 0.05\n" in output
    assert re.search(rf"^validation loss +{min(held_out):.4f} nats", output, re.M)
    assert re.search(r"^speed +[\d,]+ sequences/s$", output, re.M)
    assert "worse" not in output
    assert not set("\r\b") & set(output)
    assert output.endswith("python sample.py --weights_path incognito_model.h5\n")


def test_a_killed_run_continues_to_the_same_bits(trained, tmp_path):
    shutil.copy(trained[0] / "sequences.txt", tmp_path)
    command = shlex.split(CONTRACT)
    with start(*command, cwd=tmp_path) as process:
        wait_for_line(process, "Epoch 3")
        process.kill()
    process = run(*command, cwd=tmp_path)
    assert re.search(f"Continuing {SAVED} after epoch [2-9]\n", process.stdout), process.stderr
    assert read_all(tmp_path / SAVED) == read_all(trained[0] / SAVED)


def test_a_loaded_file_is_a_compiled_model_that_learns_on(trained):
    train.import_keras()
    import keras

    network = keras.models.load_model(trained[0] / SAVED)
    ours, _ = model.load(trained[0] / SAVED)
    ids = np.array([[0, *ours.alphabet.encode(text)] for text in ("hello", "there")])
    inputs = np.eye(len(ours.alphabet), dtype=np.float32)[ids]
    targets = np.roll(ids, -1, axis=1)
    before = network.evaluate(inputs, targets, verbose=0)
    network.fit(inputs, targets, epochs=10, verbose=0)
    assert network.evaluate(inputs, targets, verbose=0) < before


def test_the_loss_is_the_mean_over_characters_and_ends(trained):
    folder, _ = trained
    words = (folder / "sequences.txt").read_text(encoding="utf-8").split("\n")
    corpus = model.build_corpus(words, sentinel=" ", max_len=8)
    _, held_out = train.split(corpus, 0.05)
    ours, metadata = model.load(folder / SAVED)
    nats, texts = [], decode(corpus)
    for index in held_out:
        predicted = predict(ours, texts[index])
        targets = corpus.targets[corpus.starts[index] :][: corpus.lengths[index]]
        nats += [-np.log(predicted[step, target]) for step, target in enumerate(targets)]
    assert len(held_out) == 50
    assert min(metadata["history"]["val_loss"]) == pytest.approx(np.mean(nats), rel=1e-5)


def test_invented_sequences_are_new_held_out_or_learned(trained):
    folder, process = trained
    words = (folder / "sequences.txt").read_text(encoding="utf-8").split("\n")
    corpus = model.build_corpus(words, " ", 8)
    names = "new", "held out", "learned"
    found = {name: re.findall(f"^invented, {name}: (.*)$", process.stdout, re.M) for name in names}
    found = {name: " ".join(lines).split() for name, lines in found.items()}
    assert sum(map(len, found.values())) == 10 * train.SHOWN
    assert len(found["new"]) > 40
    texts, parts = decode(corpus), train.split(corpus, 0.05)
    data = train.Data(corpus, *parts, None, {})
    for name, part in zip(("learned", "held out"), parts):
        known = {texts[index] for index in part}
        assert train.find_place(data, texts[part[0]]) == name
        assert known >= set(found[name])
        assert not known & set(found["new"])


# Mistakes


MISTAKES = {
    "--batch_size ''": "--batch_size: '' is not a whole number from 1 to",
    "--units 8193": "'8193' is not a whole number from 1 to 8,192",
    "--units 8192 --layers 60": "; lower --units or --layers",
    "--learning_rate nan": "--learning_rate: 'nan' is not a number from",
    "--sentinel ab": "--sentinel: 'ab' is not a single Unicode character",
    "--sentinel n\u0304": r"'n\u0304' is not a single Unicode character",
    "names.txt": "'names.txt' needs a flag before it: --sequence_path names.txt",
    "--unit=3": "there is no flag --unit; did you mean --units?",
    "--patience 2 --num_sequences 3": "--patience: nothing is held out to judge by",
    "--patience 2 --validation_split 0": "--patience: nothing is held out to judge by",
    "--sequences_path .": "--sequence_path: can't read .: Is a directory; check the path",
    "--sequence_path latin.txt": "latin.txt, line 2: byte 0xe9 is not UTF-8",
    "--sequence_path header.csv": "header.csv has no data rows",
    "--sequence_path spaced.txt --sentinel ' '": "spaced.txt, line 3: it contains the "
    r"sentinel ' '; pass --sentinel '\0'",
    "--sequence_path - --sentinel ' '": "-, line 2: it contains the sentinel ' '",
    "--init_from none.h5": "--init_from: can't read none.h5: No such file or directory",
    "--init_from latin.txt": "--init_from: latin.txt is not a model",
    "--save_path new": "--save_path: Keras opens only .h5; pass new.h5",
    "--save_path=~/new": f"Keras opens only .h5; pass {os.path.expanduser('~/new')}.h5",
    "--save_path folder.h5": "--save_path: 'folder.h5' is not a regular file",
    "--save_path a.hdf5 --sequence_path a.hdf5 --overwrite": "is the file of --sequence_path",
    "--distribute": "--distribute needs Keras on JAX: pip install jax; set KERAS_BACKEND=jax",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_gets_one_line_at_once_and_no_file(folder, refuse, monkeypatch, command):
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\nc d\n"))
    (folder / "latin.txt").write_bytes(b"abc\ncaf\xe9\n")
    (folder / "header.csv").write_bytes(b"name,n\n")
    (folder / "spaced.txt").write_bytes(b"abc\n\na b\nc|d\ne f\n")
    (folder / "a.hdf5").write_bytes(b"abc\n")
    (folder / "folder.h5").mkdir()
    assert MISTAKES[command] in refuse(train, *shlex.split(command))


def test_a_log_folder_that_can_not_be_is_a_mistake(folder, capsys):
    told = fail(capsys, *SMALL, "--log_dir", "sequences.txt")
    assert re.search("--log_dir: can't .*sequences.txt: File exists", told)


def test_cheap_answers_do_not_wait_for_keras_and_help_shows_every_default(finished):
    command = [sys.executable, "-X", "importtime", ROOT / "train.py"]
    for flag, status in {"--sequence_path=missing": 2, "--units=17": 2, "--help": 0}.items():
        process = subprocess.run([*command, flag], capture_output=True, text=True)
        assert process.returncode == status
        assert "argparse" in process.stderr
        assert not re.search(r"\| +(keras|tensorflow|jax|wordfreq)\b", process.stderr)
    assert set(re.findall(r"--\w+", CONTRACT)) <= set(re.findall(r"--\w+", process.stdout))
    assert " ".join(process.stdout.split()).count("(default: ") == 11
    assert "examples:" in process.stdout


@pytest.mark.parametrize(
    "environment", [{"KERAS_BACKEND": "torch"}, {"KERAS_HOME": "."}, {"PYTHONPATH": "."}], ids=str
)
def test_a_backend_that_is_not_there_gets_one_line(folder, environment):
    (folder / "keras.json").write_text('{"backend": "openvino"}')
    (folder / "tensorflow").mkdir()
    (folder / "tensorflow" / "__init__.py").write_text("raise ImportError('a library')\n")
    assert_refused(run("train.py", *SMALL, env={**os.environ, **environment}), "KERAS_BACKEND")
    assert not SAVED.exists()


# What is told of the data


def test_what_is_not_learned_is_told(folder, capsys):
    (folder / "a.tsv").write_text("Ort\tLand\n" + "ab" * 5000 + "\n")
    args, data, source = read("--sequence_path", "a.tsv")
    train.tell_what_was_read(args, data, source)
    output = capsys.readouterr().out
    for told in (
        "Skipped the header (Ort, Land) and read the first column\n",
        "1 rows differ from the header in columns; quote",
        "Read 1 sequences, 64 characters, ",
        "Cut 1 sequences to 64 characters (--max_len), leaving out 9,936\n",
        "holding out 0 for validation",
    ):
        assert told in output
    assert max(map(len, output.splitlines())) <= 2 * train.LINE_WIDTH
    assert train.describe(args, data, source)["loader_class"] == "UserNameLoader"


def test_lines_that_look_like_a_table_are_learned_with_advice(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Emma,F,6887\nNoah,M,5042\n"))
    train.tell_what_was_read(*read("--sequence_path", "-"))
    told = capsys.readouterr().out
    assert "Read 2 sequences, 22 characters, an alphabet of 16, from -\n" in told
    assert "-: every line has 2 commas: if this is a table, pass --loader_class UserN" in told


# In a thread, as a notebook may do it.
def test_a_single_epoch_does_not_say_how_fast_it_was(folder):
    flags = [*SMALL, "--epochs", 1]
    pool = concurrent.futures.ThreadPoolExecutor()
    with contextlib.redirect_stdout(io.StringIO()) as told, pool:
        assert pool.submit(call, *flags).result() == 0
    assert "validation loss" in told.getvalue()
    assert "speed" not in told.getvalue()


# The file at --save_path


def test_more_epochs_continue_a_finished_run_and_its_log(finished, capsys):
    _, before = model.load(SAVED)
    events = {path: path.stat().st_size for path in finished.glob("logs/1/*/events.*")}
    assert {path.parent.name for path in events} == {"train", "validation"}
    assert call(*SMALL, "--epochs", 5, "--log_dir", "logs/1") == 0
    told = capsys.readouterr().out
    assert "Continuing incognito_model.h5 after epoch 3" in told
    assert "Epoch 4/5" in told
    assert len(list(finished.glob("logs/1/*/events.*"))) == 4
    assert all(path.stat().st_size == size > 100 for path, size in events.items())
    _, after = model.load(SAVED)
    with open(finished / "logs/1/losses.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["epoch"]) for line in lines] == [1, 2, 3, 4, 5]
    for name, losses in before["history"].items():
        assert after["history"][name][:3] == losses
        assert [float(line[name]) for line in lines] == after["history"][name]


def test_a_kill_between_the_model_and_its_log_leaves_no_epoch_out(finished, capsys):
    log = finished / "logs" / "1" / "losses.csv"
    whole = log.read_text()
    log.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    assert call(*SMALL, "--log_dir", "logs/1") == 0
    assert "is finished, after 3 epochs" in capsys.readouterr().out
    assert log.read_text() == whole


def test_flags_that_mean_the_same_are_the_same_run(finished, capsys):
    names = (finished / "sequences.txt").read_text(encoding="utf-8")
    (finished / "names.csv").write_text(f"name\n{names}", encoding="utf-8")
    before = SAVED.read_bytes()
    for flags in (
        ["--max_len", 8, "--batch_size", 285, "--sentinel", "\n", "--num_sequences", 300],
        ["--sequence_path", "names.csv", "--dropout", "3e-1"],
    ):
        assert call(*SMALL, *flags) == 0
        told = capsys.readouterr().out
        assert f"{SAVED} is finished, after 3 epochs; raise --epochs to go on\n" in told
        assert re.search(r"^validation loss +[\d.]+ nats", told, re.M)
        assert SAVED.read_bytes() == before


def test_another_run_is_refused_by_what_differs(finished, refuse):
    (finished / "copy.h5").write_bytes(SAVED.read_bytes())
    names = (finished / "sequences.txt").read_text()
    (finished / "other.txt").write_text("kk" + names[2:])
    (finished / "longer.txt").write_text(names + "\nk" * 99)
    for flags, difference in {
        "--units 17": "--units 16, not 17",
        "--layers 2": "--layers 1, not 2",
        "--seed 1": "--seed 0, not 1",
        "--recurrent_dropout 0.2": "--recurrent_dropout 0.1, not 0.2",
        "--batch_size 32": "--batch_size 285, not 32",
        "--max_len 9": "--max_len 8, not 9",
        "--sentinel |": r"--sentinel '\n', not '|'",
        "--max_len 7": "other data (--sequence_path, --num_sequences, --max_len)",
        "--validation_split 0.051": "--validation_split 0.05, not 0.051",
        "--sequence_path other.txt": "other data (",
        "--sequence_path longer.txt": "other data (",
        "--init_from copy.h5": "another --init_from",
    }.items():
        told = refuse(train, *SMALL, *flags.split())
        assert f"--save_path: {SAVED} was trained with {difference}" in told
        assert "pass --overwrite" in told


def test_what_can_not_be_continued_is_refused(finished, refuse):
    edit_metadata(SAVED, history={"loss": [1.0, 2.0, "3"], "val_loss": [1.0, 2.0, 3.0]})
    assert "lacks what continuing needs; pass --overwrite" in refuse(train, *SMALL)
    for content in (b"my diary\n", b"", b"\x89HDF\r\n\x1a\n" + bytes(2000)):
        SAVED.write_bytes(content)
        assert re.search("is not a model that train.py saved: .*; pass --ov", refuse(train, *SMALL))


def test_a_file_of_the_earlier_release_serves_but_for_being_continued(finished, refuse):
    with h5py.File(SAVED, "r+") as file:
        file.move(model.CHECKPOINT, "training_state")
    assert len(list(model.load(SAVED)[0].sample("k", count=3))) == 3
    assert read("--init_from", SAVED)[0].units == 16
    assert "lacks what continuing needs; pass --overwrite" in refuse(train, *SMALL, "--epochs", 4)


def overflow_sums(checkpoint):
    for array in checkpoint.values():
        if array.dtype == np.float32:
            array[...] = np.resize([3e38, -3e38, 3e38], array.shape)


def grow_a_bias(checkpoint):  # which leaves the loss finite
    arrays = (checkpoint[name] for name in sorted(checkpoint, key=int))
    next(array for array in arrays if array.shape == (11,))[...] = np.resize([1e31, 0], 11)


def lose_a_variable(checkpoint):
    del checkpoint[str(len(checkpoint) - 1)]


NOT_A_NUMBER = f"Epoch 4/4: the loss or a weight is NaN or .*{SAVED} keeps the last whole epoch"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (overflow_sums, NOT_A_NUMBER),
        pytest.param(grow_a_bias, NOT_A_NUMBER, marks=pytest.mark.slow),
        (lose_a_variable, "is of another version; pass --overwrite"),
    ],
)
def test_a_run_that_can_not_go_on_stops_with_a_line_and_keeps_the_file(
    finished, capsys, damage, message
):
    with h5py.File(SAVED, "r+") as file:
        damage(file[model.CHECKPOINT])
    before = SAVED.read_bytes()
    assert re.search(message, fail(capsys, *SMALL, "--epochs", 4))
    assert SAVED.read_bytes() == before


def test_a_run_leaves_the_file_alone_once_another_program_has_written_it(folder, capsys):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = pool.submit(call, *SMALL, "--epochs", 1000)
        while not running.done():
            if SAVED.exists():
                SAVED.write_bytes(b"of another run")
            time.sleep(0.01)
    assert isinstance(running.exception(), SystemExit)
    told = f"another program wrote {SAVED}; pass another path"
    assert capsys.readouterr().err == f"train.py: error: --save_path: {told}\n"
    assert SAVED.read_bytes() == b"of another run"


@pytest.mark.slow
def test_a_pipe_that_closes_stops_the_run_with_a_line(folder):
    with start("train.py", *SMALL, "--epochs", 1000) as process:
        wait_for_line(process, "invented, ")
        process.stdout.close()
        assert process.wait(60) == 2
        told = process.stderr.read()
    assert told == "train.py: error: can't write the output: Broken pipe\n"
    assert len(model.load(SAVED)[1]["history"]["loss"]) >= 1


@pytest.mark.slow
def test_a_source_of_known_entropy_is_learned_to_within_2_percent(tmp_path):
    rng = np.random.default_rng(11)
    # Each letter twice, so that every other one is certain, as is the end after eight.
    texts = ["".join(np.repeat(rng.choice(list("abcdefgh"), 4), 2)) for _ in range(4000)]
    (tmp_path / "pairs.txt").write_text("\n".join(texts))
    command = "--sequence_path pairs.txt --units 32 --layers 1 --dropout 0 --epochs 6"
    process = run("train.py", *command.split(), cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    _, metadata = model.load(tmp_path / SAVED)
    expected = 4 * np.log(8) / 9
    assert min(metadata["history"]["val_loss"]) == pytest.approx(expected, rel=0.02)


# How it learns


def test_the_held_out_part_is_a_share_of_the_lines():
    rng = np.random.default_rng(0)
    sequences = ["".join(rng.choice(list("abcd"), 4)) for _ in range(2000)] + ["common"] * 250
    corpus = model.build_corpus(sequences)
    parts = train.split(corpus, 0.1)
    assert sorted(np.concatenate(parts)) == list(range(2250))
    learned, held_out = ({sequences[index] for index in part} for part in parts)
    assert not learned & held_out
    assert "common" in learned
    assert 215 <= len(parts[1]) <= 225
    assert train.split(corpus, 0.1)[1].tobytes() == parts[1].tobytes()
    for texts, share, count in ("aa", 0.9, 0), ("ab", 0.1, 0), ("ab", 0.5, 1), ("abc", 0, 0):
        assert len(train.split(model.build_corpus(texts), share)[1]) == count


# Packed and, as on a GPU, one sequence in each row; each time in two stacks of three batches,
# some of which have a sequence less.
@pytest.mark.parametrize(
    ("batch_size", "packed"),
    [
        (32, True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(64, False), (3, True)]),
    ],
)
def test_it_learns_what_stock_keras_learns_from_the_same_batches(
    folder, monkeypatch, batch_size, packed
):
    train.import_keras()
    import keras

    monkeypatch.setattr(train, "learns_by_hand", lambda *how: packed)
    monkeypatch.setattr(train, "MOST_BATCHES", 4)
    flags = ["--units", 16, "--layers", 2, "--dropout", 0, "--learning_rate", 0.01, "--epochs", 1]
    args, data, _ = read(*flags, "--recurrent_dropout", 0, "--batch_size", batch_size)
    some = np.arange(min(len(data.corpus) - 1, 5 * batch_size))
    data = data._replace(training=some, held_out=some)
    before = train.prepare_network(args, data, None, packed, 6).get_weights()
    metadata = train.describe(args, data, None)
    train.fit(args, data, None, train.Progress(args, metadata))

    characters = len(data.corpus.alphabet)
    lstm = [keras.layers.LSTM(16, return_sequences=True) for _ in range(2)]
    dense = keras.layers.Dense(characters, activation="softmax")
    stock = keras.Sequential([keras.Input((None, characters)), *lstm, dense])
    stock.set_weights(before)
    rate = keras.optimizers.schedules.CosineDecay(0.01, 6)
    adam = keras.optimizers.Adam(rate, global_clipnorm=1.0, use_ema=True, ema_momentum=0)
    stock.compile(adam, "sparse_categorical_crossentropy")

    def one_by_one(batches, seed):
        for stack in batches.epoch(seed):
            for inputs, targets, weights in zip(*(array.swapaxes(0, 1) for array in stack)):
                # Keras divides by the number of cells.
                yield np.eye(characters)[inputs], targets, weights * weights.size

    batches = train.Batches(data.corpus, some, batch_size, 4, packed=False)
    assert (batches.stacks, batches.depth) == (2, 3)
    [whole] = one_by_one(train.Batches(data.corpus, some, len(some), packed=False), None)
    learned = one_by_one(batches, (0, 0))
    options = {"callbacks": [keras.callbacks.SwapEMAWeights()], "shuffle": False, "verbose": 0}
    told = stock.fit(learned, steps_per_epoch=6, validation_data=whole, **options)

    for name, losses in told.history.items():
        assert metadata["history"][name] == pytest.approx(losses, rel=1e-4)
    for ours, theirs, first in zip(model.load(SAVED)[0].weights, stock.get_weights(), before):
        assert np.abs(theirs - first).max() > 1e-3
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.slow
def test_jax_learns_it_too():
    command = [sys.executable, "-m", "pytest", "-n", "0", __file__, "-m", ""]
    command += ["-k", "stock_keras or old_sequences"]
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize(
    ("batch_size", "depth", "packed"),
    [(32, 5, True), (128, 2, True), (300, 64, True), (128, 9, False), (777, 1, False)],
)
def test_an_epoch_takes_each_sequence_once_and_pads_little(batch_size, depth, packed, devices):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcde"), length)) for length in rng.geometric(0.1, 1000)]
    corpus = model.build_corpus(texts, max_len=20)
    chosen = rng.permutation(1000)[:777]
    batches = train.Batches(corpus, chosen, batch_size, depth, packed, devices)
    seen, sizes, whole = [], [], 0
    for inputs, targets, weights in itertools.chain.from_iterable(
        zip(*(array.swapaxes(0, 1) for array in stack)) for stack in batches.epoch(seed=3)
    ):
        assert len(inputs) % devices == 0
        real = weights > 0
        starts = np.flatnonzero(inputs[real] == 0)
        found = [tuple(part) for part in np.split(targets[real], starts)[1:]]
        for sequence, read in zip(found, np.split(inputs[real], starts)[1:]):
            assert tuple(read) == (0, *sequence[:-1])
        seen += found
        sizes.append(len(found))
        whole += weights.sum()
    texts = np.split(corpus.targets, corpus.starts[1:])
    assert sorted(seen) == sorted(tuple(texts[index]) for index in chosen)
    assert batch_size >= max(sizes) >= min(sizes) >= max(sizes) - 1
    assert len(np.unique(weights)) <= 2  # 0 and that of any target
    assert whole / len(sizes) == pytest.approx(1)
    if packed and devices == 1:
        assert len(sizes) * inputs.size < 1.5 * corpus.lengths[chosen].sum()
    # Another one would be compiled anew.
    shapes = {stack[0].shape for seed in range(9) for stack in batches.epoch((0, seed))}
    assert len(shapes) == 1


def test_the_parts_of_a_pass_take_each_sequence_once():
    corpus = model.build_corpus(["".join(pair) for pair in itertools.product("abcdefgh", repeat=2)])
    batches = train.Batches(corpus, np.arange(64), batch_size=8, parts=3)
    parts = [list(batches.epoch((0, 0), part)) for part in range(3)]
    assert len({array.shape for part in parts for stack in part for array in stack[:1]}) == 1
    firsts = [np.count_nonzero(weights) for part in parts for _, _, weights in part]
    assert sum(firsts) == 3 * 64
    seen = [inputs[:, 0][targets[:, 0] > 0] for part in parts for inputs, targets, _ in part]
    letters = np.bincount(np.concatenate(seen), minlength=9)
    np.testing.assert_array_equal(letters, [64, *[8] * 8])


@pytest.mark.parametrize(
    ("lines", "units", "chosen"),
    [
        (100, 128, "--layers 1 --dropout 0.5 --recurrent_dropout 0.5 --batch_size 4 --epochs 30"),
        (4500, 256, "--layers 1 --dropout 0.4 --recurrent_dropout 0.3 --batch_size 32 --epochs 22"),
    ],
)
def test_settings_follow_the_amount_of_data_unless_they_are_given(capsys, lines, units, chosen):
    words = ["--sequence_path", PRE_TRAINED / "english_words_5000.txt", "--num_sequences", lines]
    args, data, _ = read(*words)
    train.tell_what_was_read(args, data, None)
    told = capsys.readouterr().out
    assert f"--units {units} {chosen} --learning_rate 0.02 " in told
    assert ("--init_from" in told) == (lines == 100)
    flags = shlex.split(chosen)
    assert [str(getattr(args, name[2:])) for name in flags[::2]] == flags[1::2]
    args, _, _ = read(*words, "--init_from", PRE_TRAINED / "user_names_10000.h5")
    assert (args.units, args.layers, args.learning_rate) == (256, 2, 0.005)
    assert read(*words, "--batch_size", 7, "--dropout", 0)[0].batch_size == 7
    assert read(*words, "--units", 32)[0].dropout == pytest.approx(args.dropout / 4, abs=1e-3)


def test_what_is_held_out_of_a_long_list_is_limited():
    characters = 9_000_000
    args = train.make_parser().parse_args([])
    assert train.choose_settings(args, characters, None)["validation_split"] == 1 / 30
    args = train.make_parser().parse_args(["--validation_split", "0.2"])
    assert "validation_split" not in train.choose_settings(args, characters, None)


def test_another_seed_or_epoch_is_another_order():
    corpus = model.build_corpus(["".join(pair) for pair in itertools.product("abcdefgh", repeat=2)])
    batches = train.Batches(corpus, np.arange(64), batch_size=8, depth=2)
    seeds = (0, 1), (0, 2), (1, 1), None, (0, 1)
    orders = [b"".join(inputs.tobytes() for inputs, *_ in batches.epoch(seed)) for seed in seeds]
    assert orders[0] == orders[-1]
    assert len(set(orders)) == 4


def test_any_script_can_be_learned_and_invented(folder, monkeypatch):
    names = ["さくら", "山田太郎", "محمد", "Zoë", "Čeněk", "😀👍", "👩‍🚀", "Doe, J", "two\nlines"]
    text = "\ufeffname,n\r\n" + "".join(f'"{name}",1\r\n\r\n' for name in names * 20)
    (folder / "names.csv").write_bytes(text.encode())
    command = (
        "--sequence_path names.csv --units 48 --layers 1 --sentinel '\\t' --dropout 0 "
        "--epochs 4 --batch_size 4 --learning_rate 0.02 --validation_split 0"
    )
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert call(*shlex.split(command)) == 0
    trained, metadata = model.load(SAVED)
    assert metadata["loader_class"] == "UserNameLoader"
    assert trained.alphabet.sentinel == "\t"
    invented = list(trained.sample(count=200))
    assert set(invented) >= set(names)
    assert sum(text in names for text in invented) > 150


# Starting from a model


@pytest.mark.parametrize("shift", [0, 800])  # exp(800) is no number
def test_an_extended_model_gives_the_old_sequences_the_same_odds(shift):
    train.import_keras()
    source = random_model("\nbcdf", units=8, layers=2, seed=5)
    source.weights[-1][...] += shift
    corpus = model.build_corpus(["abé", "fac", "éab"], characters="bcdf")
    assert corpus.alphabet.symbols == "\nabcdfé"
    flags = "--units 8 --layers 2 --dropout 0 --recurrent_dropout 0 --learning_rate 1 --seed 3"
    args = train.make_parser().parse_args(flags.split())
    data = train.Data(corpus, np.arange(3), np.arange(0), None, {})
    network = train.prepare_network(args, data, source, by_hand=True, updates=1)
    extended = SequenceModel(corpus.alphabet, 6, network.get_weights())
    known = [corpus.alphabet.symbols.index(symbol) for symbol in source.alphabet.symbols]
    for text in ("", "b", "dcfb", "ffffff"):
        before = predict(source, text)
        after = predict(extended, text)
        share = after[:, known].sum(axis=1, keepdims=True)
        np.testing.assert_allclose(after[:, known] / share, before, rtol=1e-5)
        assert (share < 1).all()
        assert (after > 0).all()


def test_a_model_is_tuned_on_other_data_into_another_file(finished, refuse, capsys):
    before = SAVED.read_bytes()
    (finished / "names.txt").write_text("Zoë Ågren\nÅsa Öberg\n" * 20, encoding="utf-8")
    command = ["--sequence_path", "names.txt", "--init_from", SAVED, "--epochs", 3]
    command += ["--validation_split", 0, "--save_path", "tuned.h5"]
    assert call(*command) == 0
    told = capsys.readouterr().out
    assert f"Starting from {SAVED}, with 8 characters added to its alphabet" in told
    assert "Network: 1 × LSTM(16)" in told
    tuned, metadata = model.load("tuned.h5")
    assert set(tuned.alphabet.symbols) == {*"\naeikmnostu", *"Zoë Ågren\nÅsa Öberg"}
    losses = metadata["history"]["loss"]
    assert losses[-1] < losses[0]
    assert call(*command) == 0
    assert "is finished, after 3 epochs" in capsys.readouterr().out
    for change, message in {
        ("--init_from", "tuned.h5", "--save_path", "new.h5", "--sentinel", "Z"): "--sentinel: ",
        ("--init_from", PRE_TRAINED / "english_words_5000.h5"): "contains the sentinel ' '",
        ("--units", 64): "--units: ",
        ("--layers", 3): "--layers: ",
        ("--save_path", SAVED): f"{SAVED} is the file of --init_from",
    }.items():
        assert message in refuse(train, *command, *change)
    assert SAVED.read_bytes() == before


# On a terminal


NOW = f"{SAVED} keeps the last whole epoch; the same command without --overwrite continues"
BEFORE = pytest.param("with another --save_path", "nothing new was saved", marks=pytest.mark.slow)


@pytest.mark.parametrize(("wait_for", "told"), [("Epoch 3/5000", NOW), BEFORE])
def test_a_terminal_shows_a_progress_bar_and_ctrl_c_stops(finished, wait_for, told):
    before = SAVED.read_bytes()
    child = terminal("train.py", *SMALL, "--epochs", 5000, "--overwrite", term="xterm")
    child.expect_exact(wait_for)
    shown = child.before
    child.sendintr()
    last, status = finish(child)
    assert status == 130
    assert f"Stopped: {told}\r\n" in last
    assert not re.search(r"Traceback|oneDNN|CUDA|cuda|absl", shown + last)
    assert (SAVED.read_bytes() == before) == (told != NOW)
    if told == NOW:
        assert re.search(r"1/1.* - loss: [\d.]+ - val_loss: [\d.]+\r\n", shown)
        assert len(re.findall("^invented, ", shown, re.M)) >= 2
        assert 2 <= len(model.load(SAVED)[1]["history"]["loss"]) < 5000


@pytest.mark.parametrize("variable", ["COLUMNS=80", "COLUMNS=79", "TERM=dumb", "NO_COLOR=1"])
def test_a_bar_is_shown_only_on_a_terminal_that_is_good_for_one(monkeypatch, variable):
    monkeypatch.setattr("sys.stdout", io.StringIO())
    sys.stdout.isatty = lambda: True
    monkeypatch.delenv("NO_COLOR", raising=False)
    for each in ("TERM=xterm", "COLUMNS=80", variable):
        monkeypatch.setenv(*each.split("="))
    assert train.shows_bar() == (variable == "COLUMNS=80")
