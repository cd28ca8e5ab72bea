import concurrent.futures
import csv
import io
import math
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time

import h5py
import numpy as np
import pytest
from conftest import (
    PRE_TRAINED,
    ROOT,
    assert_refused,
    edit_metadata,
    enumerate_sequences,
    finish,
    predict,
    random_model,
    run,
    start,
    terminal,
)

import model
import sample
from loaders import UserNameLoader, compose

WORDS = PRE_TRAINED / "english_words_5000.h5"  # the default of --weights_path


@pytest.fixture
def invent(capsys, monkeypatch):
    """Runs sample.py's `main` with text on stdin; returns the lines on stdout, and stderr."""

    def invent(*arguments, stdin="", encoding="utf-8", status=0):
        buffer = io.BytesIO(stdin.encode(encoding, "surrogateescape"))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(buffer)))
        try:
            ended = sample.main([*map(str, arguments)])
        except SystemExit as end:
            ended = end.code
        out, err = capsys.readouterr()
        assert ended == status, err
        return out.split("\n")[:-1], err

    return invent


@pytest.fixture
def change(tmp_path):
    """Makes a copy of the model of English words with another bias of its end or other metadata."""

    def change(end=None, **changes):
        path = tmp_path / "changed.h5"
        path.write_bytes(WORDS.read_bytes())
        if end is not None:
            with h5py.File(path, "r+") as file:
                file["model_weights/next_character/bias"][0] = end
        edit_metadata(path, **changes)
        return path

    return change


# Prompts


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_each_line_of_a_pipe_is_a_prompt(invent, encoding):
    lines, err = invent("--num_samples", 7, stdin="th\n\nqu\r\nlast", encoding=encoding)
    assert (len(lines), err) == (4 * 7, "")
    for line, prompt in zip(lines, np.repeat(["th", "", "qu", "last"], 7)):
        assert line.startswith(prompt)


def test_a_pipe_is_answered_line_by_line_until_nobody_reads_the_answers():
    with start("sample.py", "--num_samples", 2, stdin=subprocess.PIPE) as process:
        for prompt in ("un", "re"):
            process.stdin.write(prompt + "\n")
            process.stdin.flush()
            assert all(process.stdout.readline().startswith(prompt) for _ in range(2))
        process.stdout.close()
        assert process.communicate("th\n" * 9, timeout=60)[1] == ""
        assert process.returncode == 0


def test_prompts_that_can_not_be_answered_are_named_and_the_others_answered(invent, tmp_path):
    prompts = "ok\nnaïÏve\nyes\na b\n" + "x" * 99 + "\n"
    arguments = ["--num_samples", 2, "--seed", 1]
    lines, err = invent(*arguments, stdin=prompts, status=2)
    assert len(lines) == 2 * 2
    reasons = {
        2: "the model never saw 'Ï'",
        4: "the model never saw ' '",
        5: "it has 99 characters, but max_len is 15",
    }
    for (number, reason), error in zip(reasons.items(), err.splitlines(), strict=True):
        assert error.startswith(f"sample.py: error: prompt {number}: {reason}")
    arguments += ["--output", (path := tmp_path / "words.txt")]
    assert invent(*arguments, stdin=prompts, status=2)[1] == f"{err}{path} holds 4 sequences\n"
    assert path.read_text().splitlines() == lines
    _, err = invent(*arguments, stdin="a b\n", status=2)
    assert err.endswith(f"sample.py: error: no prompt can be answered, so {path} is not written\n")
    assert path.read_text().splitlines() == lines


def test_prompts_that_are_no_text_get_one_line(invent):
    damaged = "\ufefffirst\n".encode("utf-16-le") + b"\x00\xd8\n\0"
    for prompts, reason in (
        (damaged, "not UTF-16 from"),
        (b"th\n\xff\n", "byte 0xff is not UTF-8"),
    ):
        _, err = invent(stdin=prompts.decode("latin1"), encoding="latin1", status=2)
        assert re.fullmatch(rf"sample.py: error: standard input: -, line \d: {reason} .*\n", err)


@pytest.mark.parametrize("arguments", [[], ["--output", "words.txt"]])
def test_no_prompt_at_all_is_an_error_that_names_the_empty_one(tmp_path, arguments):
    close = None if arguments else lambda: os.close(0)
    stdin = subprocess.DEVNULL
    process = run("sample.py", *arguments, cwd=tmp_path, stdin=stdin, preexec_fn=close)
    assert_refused(process, "standard input is empty; pass a prompt, such as --prompt ''")
    assert os.listdir(tmp_path) == []


def test_every_prompt_of_the_command_line_is_answered(invent, monkeypatch):
    lines, _ = invent(*shlex.split("--prompt th qu --num_samples 3 --prompt ''"))
    assert [line[:2] for line in lines[:6]] == ["th"] * 3 + ["qu"] * 3
    assert len(lines) == 9
    monkeypatch.chdir("/")
    assert len(invent("--prompt", "")[0]) == 100


@pytest.mark.parametrize("symbols", ["ön", "o\u0308n"])
def test_a_prompt_may_be_composed_or_not_whatever_the_model_learned(symbols):
    trained = random_model("\n" + symbols, seed=3)
    for prompt in ("ö", "o\u0308"):
        texts = list(trained.sample("n" + prompt, count=5, seed=1))
        assert all(text.startswith("nö") for text in texts)
        assert texts == list(trained.sample("nö", count=5, seed=1))
        likely = [text for text, _ in sample.most_likely(trained, "n" + prompt, 3)]
        assert all(text.startswith("nö") for text in likely)
        rest = sample.most_likely(trained, "n" + prompt, 2, exclude=likely[:1])
        assert [text for text, _ in rest] == likely[1:]
    (_, nats, length), (_, other, _) = sample.score(trained, ["nön", "no\u0308n"])
    assert nats == other < np.inf
    assert length == 4 + symbols.count("\u0308")


def test_seed_temperature_and_max_len_are_obeyed(invent):
    once, again, other = (invent("--seed", seed, stdin="a\n\n") for seed in (1, 1, 2))
    assert once == again != other
    assert invent(stdin="a\n") != invent(stdin="a\n")
    assert len(set(invent("--prompt", "th", "--temperature", 0)[0])) == 1
    for max_len in (4, 40):
        lines, _ = invent("--prompt", "", "--temperature", 9, "--max_len", max_len)
        longest = max(map(len, lines))
        assert longest == 4 if max_len == 4 else 16 < longest <= 40


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--weights_path missing.h5", "--weights_path: can't read missing.h5: No such file"),
        ("--weights_path text.h5", "text.h5 is not a model"),
        ("--num_samples 0", "--num_samples: '0' is not a whole number from 1 to"),
        ("--temperature nan", "--temperature: 'nan' is not a number from 0 to"),
        ("names.h5", "'names.h5' needs a flag before it: --weights_path names.h5"),
        ("th", "'th' needs a flag before it: --prompt th"),
        ("--prompt x\u0302", "--prompt: the model never saw U+0302 within"),
        ("--prompt a B c", "--prompt: the model never saw 'B'"),
        ("--most_likely 3 --seed 1", "--most_likely can't be combined with --seed; omit one"),
        ("--score ~/missing", f"--score: can't read {os.path.expanduser('~')}/missing: No such"),
        ("--score latin.txt", "--score: latin.txt, line 1: byte 0xe9 is not UTF-8"),
        ("--exclude -", "--exclude: - holds no sequences"),
        ("--output=~/", f"--output: '{os.path.expanduser('~')}/' is not a regular file; pass one"),
        ("--output new.XLSX", "--output: can't write .XLSX; pass a .csv, which spreadsheets open"),
        ("--weights_path text.h5 --output text.h5", "text.h5 is the file of --weights_path; pass"),
        ("--score text.h5 --output ./text.h5", "--output: ./text.h5 is the file of --score; pass"),
    ],
)
def test_a_mistake_gets_one_line(invent, tmp_path, monkeypatch, arguments, message):
    (tmp_path / "text.h5").write_text("no model")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    monkeypatch.chdir(tmp_path)
    lines, err = invent(*shlex.split(arguments), status=2)
    assert lines == []
    assert re.fullmatch(f"sample.py: error: .*{re.escape(message)}.*\n", err)
    assert sorted(os.listdir(tmp_path)) == ["latin.txt", "text.h5"]


def test_a_missing_package_gets_one_line():
    command = [sys.executable, "-S", ROOT / "sample.py"]  # -S hides what pip installed
    process = subprocess.run(command, capture_output=True, text=True)
    assert_refused(process, "the package numpy is not installed; activate the environment")


# From Python and from pipes


def test_it_can_be_called_outside_the_main_thread_where_streams_are_not_real(monkeypatch):
    monkeypatch.setattr("sys.stdout", out := io.StringIO())
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pool.submit(sample.main, ["--prompt", "un", "--num_samples", "3"]).result()
    assert re.fullmatch(r"(un.*\n){3}", out.getvalue())


def test_keras_is_never_imported():
    command = [sys.executable, "-X", "importtime", ROOT / "sample.py", "--prompt", "a"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.stdout.count("\n") == 100
    assert re.search(r"\| +h5py\b", process.stderr)
    assert not re.search(r"\| +(keras|tensorflow|jax|wordfreq)\b", process.stderr)


# What is drawn


@pytest.mark.parametrize("arguments", ["", "--temperature 0", "--top_p 0.5", "--most_likely 9"])
def test_no_sequence_is_empty_however_likely_its_end_is(invent, change, arguments):
    lines, _ = invent("--weights_path", change(end=1000), *arguments.split(), stdin="\nab\n")
    texts = [line.split("\t")[-1] for line in lines]
    assert set(map(len, texts)) == {1, 2}
    assert {text for text in texts if len(text) == 2} == {"ab"}


def test_unique_sequences_are_the_first_of_each_kind_and_come_once_whatever_the_prompts(invent):
    unique, _ = invent("--unique", "--num_samples", 300, "--seed", 4, stdin="th\nthe\n\n")
    assert len(unique) == len(set(unique)) == 900
    everything, _ = invent("--prompt", "th", "--num_samples", 1000, "--seed", 4)
    assert list(dict.fromkeys(everything))[:300] == unique[:300]


def test_excluded_sequences_never_come_and_what_one_run_writes_the_next_reads(invent, tmp_path):
    arguments = ["--prompt", "th", "--seed", 4, "--num_samples"]
    everything, _ = invent(*arguments, 1000)
    invent(*arguments, 100, "--output", tmp_path / "old.csv")
    assert list(UserNameLoader(tmp_path / "old.csv")) == everything[:100]
    exclude = ["--exclude", "-", "--exclude", tmp_path / "old.csv"]
    more = "\n".join(everything[100:200:2])
    known = {*everything[:100], *everything[100:200:2]}
    rest = [text for text in everything if text not in known]
    assert invent(*arguments, 300, *exclude, stdin=more)[0] == rest[:300]
    unique = list(dict.fromkeys(rest))
    assert invent(*arguments, 300, *exclude, "--unique", stdin=more)[0] == unique[:300]


def test_a_model_that_has_nothing_new_left_ends_by_itself(invent):
    arguments = ["--prompt=", "--max_len", 1, "--temperature", 9, "--num_samples", 100, "--unique"]
    lines, err = invent(*arguments)
    assert sorted(lines) == sorted(model.load(WORDS)[0].alphabet.symbols[1:])
    assert err.startswith(f"sample.py: the model has nothing new left: found {len(lines)} of 100; ")
    assert err.endswith("a higher --temperature may find more\n")


# The most likely sequences


@pytest.mark.parametrize("prompt", ["", "b"])
@pytest.mark.parametrize(
    "shape", [{}, {"temperature": 0.3}, {"top_k": 2}, {"top_p": 0.8}, {"temperature": 0}], ids=str
)
@pytest.mark.parametrize("max_len", [1, 5])
def test_the_most_likely_are_those_that_brute_force_finds(prompt, shape, max_len):
    limits = {**shape, "max_len": max_len}
    for seed, scale in enumerate([0, 0.7, 2.0]):
        trained = random_model("\nabc", seed=seed, scale=scale)
        everything = enumerate_sequences(trained, prompt, **limits)
        expected = np.array(sorted(everything.values(), reverse=True))
        notes = []
        for count in (1, 7, 5000):
            found = list(sample.most_likely(trained, prompt, count, **limits, warn=notes.append))
            assert len(found) == min(count, len(everything))
            texts, probabilities = zip(*found)
            assert len(set(texts)) == len(texts)
            assert list(probabilities) == sorted(probabilities, reverse=True)
            for those in (expected[:count], [everything[text] for text in texts]):
                np.testing.assert_allclose(probabilities, those, rtol=1e-4)
        assert sum(probabilities) == pytest.approx(1, rel=1e-4)
        assert notes[-1] == f"found {len(everything):,} of 5,000: no other sequence is possible"


# With weights of 0 all sequences of the same length are as likely.
@pytest.mark.parametrize(("memory", "scale"), [(2**12, 1), (2**22, 1), (2**18, 0)])
def test_a_search_with_little_memory_yields_the_beginning_of_the_answer(monkeypatch, memory, scale):
    words, _ = model.load(WORDS)
    weights = [weight * scale for weight in words.weights]
    trained, notes = model.SequenceModel(words.alphabet, words.max_len, weights), []
    complete = [value for _, value in sample.most_likely(trained, count=150)]
    monkeypatch.setattr(sample, "SEARCH_MEMORY", (memory, 0, memory))
    proven = dict(sample.most_likely(trained, count=150, warn=notes.append))
    mebibytes = f"{memory / 2**20:,.0f} MiB of memory; a longer --prompt"
    told = f"found {len(proven)} of 150: to prove more would take over {mebibytes}"
    assert [note[: len(told)] for note in notes] == [told]
    assert (memory >= 2**22) <= len(proven) < 150
    assert [*proven.values()] == pytest.approx(complete[: len(proven)])


def test_a_text_that_could_be_spelled_in_two_ways_is_invented_in_one():
    trained = random_model("\naqá\u0301", max_len=4)
    everything = enumerate_sequences(trained)
    assert {*map(compose, everything)} == everything.keys()
    likely = list(sample.most_likely(trained, count=1000, warn=str))
    assert len(likely) == len(everything)
    assert dict(likely) == pytest.approx(everything, rel=1e-4)
    assert sum(everything.values()) == pytest.approx(1)
    assert {*trained.sample(count=500, seed=1)} <= everything.keys()


def test_the_most_likely_obey_the_other_flags(invent, tmp_path):
    arguments = ["--most_likely", 40, "--max_len", 4, "--top_k", 3, "--temperature", 0.5]
    prompts = ["th", "qu", "the"]
    lines, err = invent(*arguments, stdin="\n".join(prompts))
    texts = [line.split("\t")[1] for line in lines]
    # Of up to three followers each time: 1 + 2 + 4 + 9 ends, fewer without the end mark.
    assert 15 < len(texts) < 40
    assert set(map(len, texts)) <= {2, 3, 4}
    few = r"found \d+ of 40: no other sequence is possible\n"
    assert re.fullmatch("".join(f"sample.py: '{prompt}': {few}" for prompt in prompts), err)
    (tmp_path / "known.txt").write_text("\n".join(texts[::2]))
    rest, _ = invent(*arguments, "--exclude", tmp_path / "known.txt", "--prompt", *prompts)
    assert [line.split("\t")[1] for line in rest] == [t for t in texts if t not in texts[::2]]


# Scores


def test_the_score_of_a_sequence_is_its_cross_entropy():
    trained = random_model("\nabc", max_len=4)
    everything = enumerate_sequences(trained, max_len=6)
    not_empty = 1 - predict(trained, "")[0, 0]  # what sampling divides by, and scores don't
    texts = [text for text in everything if len(text) < 6][::5]
    scores = sample.score(trained, texts, max_len=6)
    for text, (scored, nats, targets) in zip(texts, scores, strict=True):
        assert (scored, targets) == (text, len(text) + 1)
        assert nats == pytest.approx(-np.log(everything[text] * not_empty), rel=1e-4)
    ((_, nats, targets),) = sample.score(trained, ["abcab"])  # which is cut
    assert targets == 4
    along = np.diag(predict(trained, "abca")[:4, trained.alphabet.encode("abca")])
    assert nats == pytest.approx(-np.log(along).sum(), rel=1e-4)
    with pytest.raises(TypeError, match=r"an iterable of str, not one. Received: 'abc'"):
        sample.score(trained, "abc")


def test_the_mean_is_that_of_what_the_model_knows(invent):
    table = 'word,n\nthe,1\n"Ïx, y",2\nunderstandingly,3\na b,4\n'
    arguments = ["--score", "-", "--max_len", 12]
    lines, err = invent(*arguments, "--loader_class", "UserNameLoader", stdin=table)
    values, texts = zip(*(line.split("\t") for line in lines))
    assert texts == ("the", "Ïx, y", "understandingly", "a b")
    assert values[1] == values[3] == "inf"
    mean = (4 * float(values[0]) + 12 * float(values[2])) / 16
    first, *others = err.splitlines()
    said, perplexity = re.findall(r"([\d.]+) nats .*, perplexity ([\d.]+):", first)[0]
    assert float(said) == pytest.approx(mean, rel=1e-5)
    assert float(perplexity) == pytest.approx(np.exp(mean), rel=1e-4)
    assert "the mean over 2 sequences with 16 characters and end marks" in first
    never = "with characters that the model never saw"
    cut = "cut to 12 characters (--max_len): 1 sequence"
    assert others == [f"sample.py: not scored: 2 sequences {never}", f"sample.py: {cut}"]
    lines, err = invent(*arguments, stdin="THE\n")
    assert (lines, err) == (["inf\tTHE"], f"sample.py: not scored: 1 sequence {never}\n")


# Into a file


@pytest.mark.parametrize("arguments", ["--most_likely 9", "--score texts.txt", "--seed 1"])
def test_an_output_holds_what_stdout_would_have(invent, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("the\nTHE\nan\n")
    expected, notes = invent(*arguments.split(), "--output", "-", stdin="th\nan\n")
    count = len(expected)
    assert count == {"--most_likely": 18, "--score": 3, "--seed": 200}[arguments.split()[0]]
    results = "new/folder/results.txt"
    lines, err = invent(*arguments.split(), "--output", results, stdin="th\nan\n")
    assert (lines, err) == ([], f"{notes}{results} holds {count} sequences\n")
    assert (tmp_path / results).read_text().splitlines() == expected
    assert os.listdir(tmp_path / "new/folder") == ["results.txt"]


def test_results_of_every_kind_can_be_a_csv(invent, tmp_path, change):
    letters = model.load(WORDS)[0].alphabet.symbols
    odd = '\n\r,;"=\té'
    path = change(alphabet="\0" + letters[1:].translate(str.maketrans("etaoinsr", odd)))
    texts = list(model.load(path)[0].sample(count=100, seed=np.random.default_rng(1)))
    assert {*"".join(texts)} > {*odd}

    def write(name, *arguments):
        _, err = invent("--weights_path", path, "--output", tmp_path / name, *arguments)
        with open(tmp_path / name, encoding="utf-8", newline="") as file:
            return list(csv.reader(file)) if name.endswith(".csv") else file.read(), err

    rows, err = write("o.csv", "--prompt", "", "--seed", 1)
    assert rows == [["sequence"], *([text] for text in texts)]
    assert err == f"{tmp_path / 'o.csv'} holds 100 sequences\n"
    content, err = write("o.txt", "--prompt", "", "--seed", 1)
    assert len(re.split(r"\r\n|\r|\n", content)) == 101
    assert err.startswith("sample.py: line ends within sequences are written as ")
    (header, row), _ = write("o.csv", "--prompt", "", "--most_likely", 1)
    assert (header, float(row[1]) > 0) == (["sequence", "probability"], True)
    (tmp_path / "known.txt").write_text("é;\né,\n", encoding="utf-8")
    rows, _ = write("o.csv", "--score", tmp_path / "known.txt")
    assert rows[0] == ["sequence", "nats_per_character"]
    assert [text for text, _ in rows[1:]] == ["é;", "é,"]


def test_an_output_that_can_not_be_written_leaves_the_old_one(tmp_path):
    (path := tmp_path / "words.txt").write_text("old")
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))}
    with open(path) as old:
        for options, message in (
            ({"input": "th\n" * 99, **limit}, "can't write the output: File too large"),
            ({"input": "th\n\0\n"}, "standard input: -, line 2: a NUL character"),
            ({"stdin": old}, f"{path} is the file of standard input; pass another one"),
        ):
            assert_refused(run("sample.py", "--output", path, **options), message)
            assert path.read_text() == "old"
            assert os.listdir(tmp_path) == ["words.txt"]


def press_ctrl_c(condition):
    """Presses Ctrl-C once a condition holds, while the test goes on."""

    def press():
        while not condition():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()


def test_ctrl_c_keeps_what_was_invented_until_then_and_a_later_one_undoes_nothing(
    invent, tmp_path, monkeypatch
):
    def press_around(function):
        def press(*arguments):
            signal.raise_signal(signal.SIGINT)
            function(*arguments)
            signal.raise_signal(signal.SIGINT)

        return press

    for name in ("fsync", "replace"):  # while results reach the disk, and once they are there
        monkeypatch.setattr(os, name, press_around(getattr(os, name)))
    arguments = ["--prompt", "", "--seed", 1, "--num_samples"]
    path, handler = tmp_path / "words.txt", signal.getsignal(signal.SIGINT)
    assert invent(*arguments, 9, "--output", path)[1] == f"{path} holds 9 sequences\n"
    assert signal.getsignal(signal.SIGINT) == handler
    path.unlink()
    press_ctrl_c(lambda: any(path.stat().st_size for path in tmp_path.iterdir()))
    _, err = invent(*arguments, 10**8, "--output", path, status=130)
    lines = path.read_text().splitlines()
    assert err == f"Stopped: {path} holds {len(lines):,} sequences\n"
    assert os.listdir(tmp_path) == ["words.txt"]
    # In whole batches, as the first run did, so that they are rounded alike.
    whole = math.ceil(len(lines) / model.LARGEST_BATCH) * model.LARGEST_BATCH
    assert invent(*arguments, whole)[0][: len(lines)] == lines


def test_ctrl_c_before_the_first_result_leaves_the_old_file(invent, tmp_path):
    (path := tmp_path / "old.txt").write_text("precious")
    os.mkfifo(tmp_path / "pipe")  # to wait at
    press_ctrl_c(lambda: len(os.listdir(tmp_path)) == 3)
    _, err = invent("--score", tmp_path / "pipe", "--output", path, status=130)
    assert err == "Stopped: nothing was written\n"
    assert sorted(os.listdir(tmp_path)) == ["old.txt", "pipe"]
    assert path.read_text() == "precious"


# On a terminal


def redirected(path):
    """Options of `terminal` that send stdout to a file or a named pipe instead."""
    return {"preexec_fn": lambda: os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), 1)}


def test_a_bar_is_shown_only_where_results_go_into_a_file(invent, tmp_path):
    arguments = ["--prompt", "re", "--num_samples", 300, "--seed", 1]
    file, pipe = tmp_path / "words.txt", tmp_path / "pipe"
    os.mkfifo(pipe)
    for options, bar in ((redirected(file), True), (redirected(pipe), False), ({}, False)):
        with terminal("sample.py", *arguments, term="xterm", **options) as child:
            shown, status = finish(child)
        assert status == 0
        assert ("300/300" in shown) == ("%" in shown) == bar
    assert file.read_text().splitlines() == invent(*arguments)[0]


def test_results_can_be_redirected_while_prompts_are_typed(tmp_path):
    file = tmp_path / "words.txt"
    with terminal("sample.py", "--num_samples", 3, **redirected(file)) as child:
        child.expect_exact("> ")
        child.sendline("pre")
        child.expect_exact("> ")
        assert child.before == "pre\r\n"
        child.sendeof()
        assert finish(child)[1] == 0
    assert re.fullmatch(r"(pre.*\n){3}", file.read_text())


def test_prompts_typed_on_a_terminal_are_answered_in_columns():
    arguments = ["--weights_path", PRE_TRAINED / "user_names_10000.h5", "--seed", 3]
    with terminal("sample.py", *arguments) as child:
        child.expect_exact("Ctrl-D leaves.\r\n> ")
        assert max(map(len, (child.before + child.after).split("\r\n"))) <= 80
        for prompt in ("Sta", ""):
            child.sendline(prompt)
            child.expect_exact("\r\n> ")
            echo, *lines = child.before.split("\r\n")
            assert (echo, max(map(len, lines)) <= 80, len(lines) < 80) == (prompt, True, True)
            invented = " ".join(lines).split()
            assert len([name for name in invented if name.startswith(prompt)]) == 100
        child.sendline("日")
        child.expect_exact("Sorry, the model never saw '日' within a sequence.\r\n> ")
        child.sendeof()
        assert finish(child) == ("\r\n", 0)


def test_ctrl_c_clears_a_line_and_the_second_at_an_empty_prompt_leaves():
    with terminal("sample.py", "--num_samples", 1) as child:
        child.expect_exact("> ")
        time.sleep(1)  # Python's readline misses a signal that comes before it waits for keys
        for line in ("th", "qu"):  # each clears a line, so that they are not two in a row
            child.send(line)
            child.expect_exact(line)
            child.sendintr()
            child.expect_exact("\r\n> ")
        for prompt in ("x", "y"):  # an answer between, so that the next is not the second in a row
            child.sendline(prompt)
            child.expect(rf"{prompt}\r\n{prompt}[^\r]*\r\n> ")
            child.sendintr()
            child.expect_exact("Press Ctrl-C again to leave.\r\n> ")
        child.sendintr()
        shown, status = finish(child)
    assert "Traceback" not in shown
    assert status == 0


@pytest.mark.parametrize("arguments", ["--num_samples 9999999", "--most_likely 3000 --top_p 1"])
def test_ctrl_c_during_a_long_answer_returns_to_the_prompt(change, arguments):
    path = change(end=-1000, max_len=2000)
    with terminal("sample.py", "--weights_path", path, *shlex.split(arguments)) as child:
        for prompt in ("qu", ""):
            child.expect_exact("> ")
            child.sendline(prompt)
            child.expect_exact("\r\n")
            time.sleep(0.5)
            child.sendintr()
            child.expect_exact("\r\nStopped.\r\n")
        child.expect_exact("> ")
        child.sendeof()
        shown, status = finish(child)
    assert "Traceback" not in shown
    assert status == 0


def test_nothing_invented_can_steer_the_terminal_but_a_pipe_gets_it_as_it_is(change, tmp_path):
    unsafe = "\n\x1b\x9b\r\x07\x08\u202e\u200f\u2028" + "".join(map(chr, range(0x80, 0x9B)))
    unsafe += "".join(map(chr, range(0xE000, 0xE100)))  # of private use, which is unsafe too
    path = change(alphabet=unsafe[: len(model.load(WORDS)[0].alphabet)])
    (tmp_path / "texts.txt").write_text("\x1b\x07\n\x1b[31m\n")
    for arguments, beginning in (
        (["--prompt", "\x1b"], r"\\x1b"),
        (["--score", tmp_path / "texts.txt"], r"\S+\t\\x1b"),
        (["--prompt=\x1b", "--most_likely", 5], r"\S+\t\\x1b"),
    ):
        with terminal("sample.py", "--weights_path", path, *arguments) as child:
            shown, status = finish(child)
        assert status == 0
        assert re.match(beginning, shown)
        assert shown.replace("\r\n", "").replace("\t", "").isprintable()
    process = run("sample.py", "--weights_path", path, "--prompt", "\x1b\x07", encoding=None)
    assert process.stdout.count(b"\x1b\x07") >= 100


def test_columns_fit_the_terminal_or_there_is_one(monkeypatch, capsys):
    def show(texts, width):
        monkeypatch.setenv("COLUMNS", str(width))
        sample.show_in_columns(texts)
        return [line.rstrip() for line in capsys.readouterr().out.splitlines()]

    texts = [letter * length for length in (1, 4, 9) for letter in "abcdefgh漢字éi"]
    for width in (20, 80, 1000):
        lines = show(texts, width)
        rows = [line.split() for line in lines]
        assert [row[i] for i in range(36) for row in rows if i < len(row)] == texts  # downwards
        assert len(lines) <= math.ceil(36 / (width // 20))
        assert max(len(re.sub("[漢字]", "--", line)) for line in lines) <= width  # in cells
    for texts in (["a", "x" * 99, "b c " * 30 + "d"], ["שלום", "a", "مرحبا"]):
        assert show(texts, 40) == texts
