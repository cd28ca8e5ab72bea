import csv
import json
import math
import os
import re
import resource
import shlex
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from conftest import (
    PRE_TRAINED,
    ROOT,
    assert_one_line_error,
    enumerate_sequences,
    finish,
    predict,
    random_model,
    run,
    terminal,
)

import model
import sample
from loaders import UserNameLoader

WORDS = PRE_TRAINED / "english_words_5000.h5"  # the default of --weights_path


def lines_of(*arguments, **options):
    """The lines that sample.py writes to stdout, when nothing goes wrong."""
    process = run("sample.py", *arguments, **options)
    assert process.returncode == 0, process.stderr
    return process.stdout.split("\n")[:-1]


def start(*arguments, **options):
    """Starts sample.py with text pipes."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, ROOT / "sample.py", *map(str, arguments)]
    return subprocess.Popen(command, **{**pipes, "text": True, **options})


@pytest.fixture
def change(tmp_path):
    """Makes a copy of the model of English words with another bias of its end or other metadata."""

    def change(end=None, **changes):
        path = tmp_path / "changed.h5"
        path.write_bytes(WORDS.read_bytes())
        with h5py.File(path, "r+") as file:
            if end is not None:
                file["model_weights/next_character/bias"][0] = end
            metadata = json.loads(file.attrs[model.METADATA]) | changes
            file.attrs[model.METADATA] = np.bytes_(json.dumps(metadata))
        return path

    return change


# Prompts


def test_each_line_of_a_pipe_is_a_prompt():
    process = run("sample.py", "--num_samples", 7, input="\ufeffth\n\nqu\r\nlast")
    assert process.returncode == 0
    assert process.stderr == ""
    lines = process.stdout.split("\n")
    assert len(lines) == 4 * 7 + 1
    for start, prompt in zip(range(0, 28, 7), ["th", "", "qu", "last"]):
        assert all(line.startswith(prompt) for line in lines[start : start + 7])


def test_a_pipe_is_answered_line_by_line():
    with start("--num_samples", 2) as process:
        for prompt in ("un", "re"):
            process.stdin.write(prompt + "\n")
            process.stdin.flush()
            assert process.stdout.readline().startswith(prompt)
            assert process.stdout.readline().startswith(prompt)


def test_prompts_that_can_not_be_answered_are_named_and_the_others_answered():
    prompts = "ok\nnaïÏve\nyes\na b\n".encode() + b"x" * 99 + b"\n\xff\n"
    process = run("sample.py", "--num_samples", 2, input=prompts, encoding=None)
    assert process.returncode == 2
    assert process.stdout.count(b"\n") == 2 * 2
    reasons = {
        2: "the model never saw 'Ï'",
        4: "the model never saw ' '",
        5: "it has 99 characters, but max_len is 15",
        6: "the model never saw the non-UTF-8 byte 0xff within",
    }
    errors = process.stderr.decode().splitlines()
    for (number, reason), error in zip(reasons.items(), errors, strict=True):
        assert error.startswith(f"sample.py: error: prompt {number}: {reason}")


@pytest.mark.parametrize("arguments", [[], ["--output", "words.txt"]])
@pytest.mark.parametrize("closed", [False, True])
def test_no_prompt_at_all_is_an_error_that_names_the_empty_one(tmp_path, arguments, closed):
    close = (lambda: os.close(0)) if closed else None
    stdin = subprocess.DEVNULL
    process = run("sample.py", *arguments, cwd=tmp_path, stdin=stdin, preexec_fn=close)
    assert_one_line_error(process, "sample.py")
    assert "standard input is empty; pass a prompt, such as --prompt ''" in process.stderr
    assert os.listdir(tmp_path) == []


def test_one_prompt_can_be_answered_from_the_command_line():
    lines = lines_of("--weights_path", WORDS, "--prompt", "inter", "--num_samples", 5)
    assert len(lines) == 5
    assert all(line.startswith("inter") for line in lines)
    assert len(lines_of("--prompt", "", cwd="/")) == 100


def test_every_prompt_of_the_command_line_is_answered():
    lines = lines_of(*shlex.split("--prompt th qu --num_samples 3 --prompt ''"))
    assert [line[:2] for line in lines[:6]] == ["th"] * 3 + ["qu"] * 3
    assert len(lines) == 9


@pytest.mark.parametrize(("symbols", "prompts"), [("ön", "öo\u0308"), ("o\u0308n", "öo\u0308")])
def test_a_prompt_may_be_composed_or_not_whatever_the_model_learned(symbols, prompts):
    trained = random_model("\n" + symbols, seed=3)
    for prompt in ("ö", "o\u0308"):
        texts = list(trained.sample("n" + prompt, count=5, seed=1))
        assert all(text.startswith("nö") for text in texts)
        assert texts == list(trained.sample("nö", count=5, seed=1))
        likely = [text for _, text in sample.most_likely(trained, "n" + prompt, 3)]
        assert all(text.startswith("nö") for text in likely)
        rest = sample.most_likely(trained, "n" + prompt, 2, exclude=likely[:1])
        assert [text for _, text in rest] == likely[1:]
    (_, nats, length), (_, other, _) = sample.score(trained, ["nön", "no\u0308n"])
    assert nats == other < np.inf
    assert length == 4 + symbols.count("\u0308")


def test_a_seed_makes_samples_repeatable():
    once, again, other = (lines_of("--seed", seed, input="a\n\n") for seed in (1, 1, 2))
    assert once == again != other
    assert lines_of(input="a\n") != lines_of(input="a\n")


def test_temperature_and_max_len_are_obeyed():
    assert len(set(lines_of("--prompt", "th", "--temperature", 0))) == 1
    for max_len in (4, 40):
        lines = lines_of("--prompt", "", "--temperature", 9, "--max_len", max_len)
        longest = max(map(len, lines))
        assert longest == 4 if max_len == 4 else 16 < longest <= 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--weights_path missing.h5", "can't read missing.h5: No such file"),
        ("--weights_path .", "can't read .: Is a directory"),
        ("--weights_path text.h5", "text.h5 is not a model"),
        ("--prompt A", "--prompt: the model never saw 'A'"),
        (f"--prompt {'a' * 99}", "--prompt: it has 99 characters"),
        ("--num_samples 0", "--num_samples: '0' is not a whole number from 1 to"),
        ("--temperature nan", "--temperature: 'nan' is not a number from 0 to"),
        ("--max_len 0", "--max_len: '0' is not a whole number from 1 to"),
        ("--top_k 0", "--top_k: '0' is not a whole number from 1 to"),
        ("--top_p 1.1", "--top_p: '1.1' is not a number from 0 to 1"),
        ("--weight x", "there is no flag --weight; did you mean --weights_path?"),
        ("names.h5", "'names.h5' needs a flag before it: --weights_path names.h5"),
        ("th", "'th' needs a flag before it: --prompt th"),
        ("--prompt x\u0302", "--prompt: the model never saw U+0302 within"),
        ("--prompt a B c", "--prompt: the model never saw 'B'"),
        ("--most_likely 3 --score text.h5", "not allowed with argument"),
        (
            "--most_likely 3 --seed 1",
            "--most_likely can't be combined with --seed; omit one of them",
        ),
        ("--score x --prompt ''", "--score can't be combined with --prompt"),
        ("--score missing", "--score: can't read missing: No such file"),
        ("--score latin.txt", "--score: latin.txt, line 1: byte 0xe9 is not UTF-8"),
        ("--exclude none.csv", "--exclude: can't read none.csv: No such"),
        ("--output text.h5/x --prompt ''", "--output: can't write text.h5/x: Not a directory"),
        ("--output /dev/stdout", "--output: '/dev/stdout' is not a regular file; pass"),
        ("--weights_path text.h5 --output text.h5", "text.h5 is the file of --weights_path; pass"),
        ("--exclude text.h5 --output text.h5", "--output: text.h5 is the file of --exclude; pass"),
        ("--score text.h5 --output ./text.h5", "--output: ./text.h5 is the file of --score; pass"),
    ],
)
def test_a_mistake_gets_one_line(tmp_path, arguments, message):
    (tmp_path / "text.h5").write_text("no model")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    process = run("sample.py", *shlex.split(arguments), cwd=tmp_path, input="")
    assert_one_line_error(process, "sample.py")
    assert message in process.stderr
    assert sorted(os.listdir(tmp_path)) == ["latin.txt", "text.h5"]


def test_keras_is_never_imported():
    command = [sys.executable, "-X", "importtime", ROOT / "sample.py", "--prompt", "a"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.stdout.count("\n") == 100
    assert re.search(r"\| +h5py\b", process.stderr)
    assert not re.search(r"\| +(keras|tensorflow|jax|wordfreq)\b", process.stderr)


def test_a_closed_pipe_is_a_normal_end():
    with start("--prompt", "", "--num_samples", 100_000_000) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 0
        assert process.stderr.read() == ""


# What is drawn


@pytest.mark.parametrize(
    "arguments", ["", "--temperature 0", "--temperature 9", "--top_p 0.5", "--most_likely 9"]
)
def test_no_sequence_is_empty_however_likely_its_end_is(change, arguments):
    path = change(end=1000)
    lines = lines_of("--weights_path", path, *shlex.split(arguments), input="\nab\n")
    texts = [line.split("\t")[-1] for line in lines]
    assert set(map(len, texts)) == {1, 2}
    assert {text for text in texts if len(text) == 2} == {"ab"}


def test_unique_sequences_are_the_first_of_each_kind_and_come_once_whatever_the_prompts():
    unique = lines_of("--unique", "--num_samples", 300, "--seed", 4, input="th\nthe\n\n")
    assert len(unique) == len(set(unique)) == 900
    everything = lines_of("--prompt", "th", "--num_samples", 1000, "--seed", 4)
    assert list(dict.fromkeys(everything))[:300] == unique[:300]


@pytest.mark.parametrize(("name", "header"), [("known.csv", "word,n\n"), ("known.txt", "")])
def test_excluded_sequences_never_come(tmp_path, name, header):
    arguments = ["--prompt", "th", "--seed", 4, "--num_samples"]
    everything = lines_of(*arguments, 1000)
    known = everything[:200:2]
    ends = ",1\n" if header else "\n"
    (tmp_path / name).write_text(header + "".join(word + ends for word in known))
    rest = [word for word in everything if word not in known]
    exclude = ["--exclude", tmp_path / name]
    assert lines_of(*arguments, 300, *exclude) == rest[:300]
    assert lines_of(*arguments, 300, *exclude, "--unique") == list(dict.fromkeys(rest))[:300]


def test_all_excluded_files_count_and_what_one_run_writes_the_next_reads(tmp_path):
    arguments = ["--prompt", "th", "--seed", 4, "--num_samples"]
    everything = lines_of(*arguments, 900)
    (tmp_path / "a.txt").write_text("\n".join(everything[:100]))
    (tmp_path / "b.txt").write_text("\n".join(everything[100:200]))
    for exclude in (["a.txt", "b.txt"], ["a.txt", "--exclude", "b.txt"]):
        found = lines_of(*arguments, 300, "--exclude", *exclude, cwd=tmp_path)
        assert not set(found) & set(everything[:200])
    (tmp_path / "a.txt").rename(tmp_path / "a.csv")
    as_lines = ["--exclude", "a.csv", "b.txt", "--loader_class", "SequenceLoader"]
    assert lines_of(*arguments, 300, *as_lines, cwd=tmp_path) == found
    assert run("sample.py", *arguments, 300, "--output", "o.csv", cwd=tmp_path).returncode == 0
    assert list(UserNameLoader(tmp_path / "o.csv")) == everything[:300]
    rest = lines_of(*arguments, 50, "--exclude", "o.csv", cwd=tmp_path)
    assert rest == [text for text in everything if text not in set(everything[:300])][:50]


def test_results_of_every_kind_can_be_a_csv(tmp_path, change):
    letters = model.load(WORDS)[0].alphabet.symbols
    odd = '\n\r,;"=\té'
    path = change(alphabet="\0" + letters[1:].translate(str.maketrans("etaoinsr", odd)))
    command = ["sample.py", "--weights_path", path, "--output", tmp_path / "o.csv"]

    def read_csv():
        with open(tmp_path / "o.csv", encoding="utf-8", newline="") as file:
            return list(csv.reader(file))

    assert run(*command, "--prompt", "", "--seed", 1).returncode == 0
    texts = list(model.load(path)[0].sample(count=100, seed=np.random.default_rng(1)))
    assert {*"".join(texts)} > {*odd}
    assert read_csv() == [["sequence"], *([text] for text in texts)]
    process = run("sample.py", "--weights_path", path, "--prompt", "", encoding=None)
    assert len(re.split(rb"\r\n|\r|\n", process.stdout)) == 101
    assert run(*command, "--prompt", "", "--most_likely", 30).returncode == 0
    header, *rows = read_csv()
    assert header == ["sequence", "probability"]
    likely = [float(probability) for _, probability in rows]
    assert likely == sorted(likely, reverse=True)
    (tmp_path / "known.txt").write_text("é;\né,\n", encoding="utf-8")
    assert run(*command, "--score", tmp_path / "known.txt").returncode == 0
    header, *rows = read_csv()
    assert header == ["sequence", "nats_per_character"]
    assert [text for text, _ in rows] == ["é;", "é,"]


@pytest.mark.slow
def test_a_model_that_knows_three_words_ends_by_itself(tmp_path):
    (tmp_path / "sequences.txt").write_text("alpha\nbeta\ngamma\n")
    small = "--units 16 --layers 1 --dropout 0 --batch_size 3 --epochs 150 --validation_split 0"
    assert run("train.py", *shlex.split(small), cwd=tmp_path).returncode == 0
    flags = "--weights_path incognito_model.h5 --prompt= --top_p 0.9 --num_samples 1000"
    for more, found in ((["--unique"], 3), (["--exclude", "sequences.txt"], 0)):
        process = run("sample.py", *shlex.split(flags), *more, cwd=tmp_path)
        assert process.returncode == 0
        assert sorted(process.stdout.split()) == ["alpha", "beta", "gamma"][:found]
        nothing_left = f"the model has nothing new left: found {found} of 1,000"
        assert process.stderr.startswith(f"sample.py: {nothing_left}")
        assert process.stderr.count("\n") == 1


# The most likely sequences


@pytest.mark.parametrize("prompt", ["", "b"])
@pytest.mark.parametrize(
    "shape", [{}, {"temperature": 0.3}, {"top_k": 2}, {"top_p": 0.8}, {"temperature": 0}], ids=str
)
@pytest.mark.parametrize("max_len", [1, 3, 6])
def test_the_most_likely_are_those_that_brute_force_finds(prompt, shape, max_len):
    limits = {**shape, "max_len": max_len}
    for seed, scale in enumerate([0.2, 0.7, 2.0]):
        trained = random_model("\nabc", seed=seed, scale=scale)
        everything = enumerate_sequences(trained, prompt, **limits)
        expected = np.array(sorted(everything.values(), reverse=True))
        notes = []
        for count in (1, 7, 5000):
            found = list(sample.most_likely(trained, prompt, count, **limits, warn=notes.append))
            assert len(found) == min(count, len(everything))
            probabilities, texts = zip(*found)
            assert len(set(texts)) == len(texts)
            assert list(probabilities) == sorted(probabilities, reverse=True)
            for those in (expected[:count], [everything[text] for text in texts]):
                np.testing.assert_allclose(probabilities, those, rtol=1e-4)
        assert sum(probabilities) == pytest.approx(1, rel=1e-4)
        assert notes[-1] == f"found {len(everything):,} of 5,000: no other sequence is possible"


@pytest.mark.parametrize(
    ("memory", "bias", "at_least"),
    [(2**12, 0, 0), (2**19, 0, 0), (2**22, 0, 4), (2**12, -40, 0), (2**23, -40, 0)],
)
def test_a_search_with_little_memory_yields_the_beginning_of_the_answer(
    monkeypatch, memory, bias, at_least
):
    trained, _ = model.load(WORDS)
    trained.weights[-1][0] += bias  # ends become unlikely, so that there is more to remember
    monkeypatch.setattr(sample, "SEARCH_MEMORY", (memory, 0, memory))
    notes = []
    proven = list(sample.most_likely(trained, count=150, warn=notes.append))
    monkeypatch.undo()
    (note,) = notes
    assert note.startswith(f"only {len(proven)} of 150 are proven to be the most likely")
    assert f"more would take over {memory / 2**20:,.0f} MiB of memory; " in note
    assert at_least <= len(proven) < 150
    if proven:
        complete = list(sample.most_likely(trained, count=len(proven)))
        assert [text for _, text in proven] == [text for _, text in complete]


def test_the_most_likely_obey_the_other_flags(tmp_path):
    arguments = ["--most_likely", 40, "--max_len", 4, "--top_k", 3, "--temperature", 0.5]
    process = run("sample.py", *arguments, input="th\nqu\nthe\n")
    texts = [line.split("\t")[1] for line in process.stdout.split("\n")[:-1]]
    assert process.returncode == 0
    # Of up to three followers each time: 1 + 2 + 4 + 9 ends, fewer without the end mark.
    assert 15 < len(texts) < 40
    assert set(map(len, texts)) <= {2, 3, 4}
    for note, prompt in zip(process.stderr.splitlines(), ["th", "qu", "the"], strict=True):
        few = r"found \d+ of 40: no other sequence is possible"
        assert re.fullmatch(rf"sample.py: '{prompt}': {few}", note)
    (tmp_path / "known.txt").write_text("\n".join(texts[::2]))
    rest = lines_of(*arguments, "--exclude", tmp_path / "known.txt", input="th\nqu\nthe\n")
    found = [line.split("\t")[1] for line in rest]
    assert found == [text for text in texts if text not in texts[::2]]


@pytest.mark.slow
def test_the_most_likely_of_the_command_line_are_often_drawn():
    rows = [line.split("\t") for line in lines_of("--prompt", "th", "--most_likely", 20)]
    assert len(rows) == 20
    drawn = lines_of("--prompt", "th", "--num_samples", 50_000)
    for probability, text in rows:
        assert text.startswith("th")
        spread = (float(probability) / 50_000) ** 0.5
        assert drawn.count(text) / 50_000 == pytest.approx(float(probability), abs=5 * spread)


# Scores


def score_in_keras(path, texts, max_len):
    """What stock Keras makes of the texts: two arrays, nats and numbers of targets."""
    import keras

    alphabet = model.load(path)[0].alphabet
    rows = np.zeros((len(texts), max_len + 2), int)
    for row, text in zip(rows, texts):
        row[1 : len(text[:max_len]) + 1] = alphabet.encode(text[:max_len])
    inputs = np.eye(len(alphabet), dtype=np.float32)[rows[:, :-1]]
    predicted = keras.models.load_model(path).predict(inputs, verbose=0)
    nats = -np.log(np.take_along_axis(predicted, rows[:, 1:, None], axis=2)[:, :, 0])
    # One a character, and one for an end that was not cut off.
    targets = np.array([len(text[:max_len]) + (len(text) <= max_len) for text in texts])
    return np.where(np.arange(max_len + 1) < targets[:, None], nats, 0).sum(axis=1), targets


@pytest.mark.parametrize(
    ("name", "max_len"),
    [
        pytest.param("english_words_5000.h5", None, marks=pytest.mark.slow),
        pytest.param("user_names_10000.h5", None, marks=pytest.mark.slow),
        ("user_names_10000.h5", 7),
    ],
)
def test_scores_agree_with_keras(tmp_path, name, max_len):
    path = PRE_TRAINED / name
    trained, _ = model.load(path)
    texts = sorted(trained.sample(count=700, temperature=1.2, seed=1), key=hash)
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    arguments = ["--weights_path", path, "--score", tmp_path / "texts.txt"]
    process = run("sample.py", *arguments, *(["--max_len", max_len] if max_len else []))
    assert process.returncode == 0
    values, scored = zip(*(line.split("\t") for line in process.stdout.split("\n")[:-1]))
    assert list(scored) == texts
    max_len = max_len or trained.max_len
    nats, targets = score_in_keras(path, texts, max_len)
    np.testing.assert_allclose(np.array(values, float), nats / targets, rtol=0, atol=2e-5)
    said = r"sample.py: ([\d.]+) nats per character, perplexity ([\d.]+):"
    mean, perplexity = map(float, re.match(said, process.stderr).groups())
    assert mean == pytest.approx(nats.sum() / targets.sum(), rel=1e-5)
    assert perplexity == pytest.approx(np.exp(mean), rel=1e-4)
    cut = sum(len(text) > max_len for text in texts)
    assert (f"{cut} were longer than {max_len} characters and cut" in process.stderr) == (cut > 0)


def test_the_score_of_a_sequence_is_its_cross_entropy():
    trained = random_model("\nabc", max_len=4)
    everything = enumerate_sequences(trained, max_len=9)
    not_empty = 1 - predict(trained, "")[0, 0]  # what sampling divides by, and scores don't
    texts = [text for text in everything if len(text) < 9][::5]
    for text, nats, targets in sample.score(trained, texts, max_len=9):
        assert targets == len(text) + 1
        assert nats == pytest.approx(-np.log(everything[text] * not_empty), rel=1e-4)


def test_what_the_model_can_not_know_is_counted_and_left_out_of_the_mean(tmp_path):
    (tmp_path / "all.csv").write_text('word,n\nthe,1\n"Ïx, y",2\nand,3\na b,4\n', encoding="utf-8")
    (tmp_path / "known.txt").write_text("the\nand\n")
    (tmp_path / "unknown.txt").write_text("THE\n")
    known, both, none = (
        run("sample.py", "--score", tmp_path / name)
        for name in ("known.txt", "all.csv", "unknown.txt")
    )
    the, *others = known.stdout.splitlines()
    assert both.stdout.splitlines() == [the, "inf\tÏx, y", *others, "inf\ta b"]
    assert "the mean over 2 sequences with 8 characters and end marks" in known.stderr
    more = "sample.py: 2 more sequences contain characters that the model does not know\n"
    assert both.stderr == known.stderr + more
    assert none.stdout == "inf\tTHE\n"
    all_of_them = "all 1 sequences contain characters that the model does not know"
    assert none.stderr == f"sample.py: {all_of_them}\n"


# Into a file


@pytest.mark.parametrize("arguments", ["--most_likely 9", "--score texts.txt", "--seed 1"])
def test_an_output_holds_what_stdout_would_have(tmp_path, arguments):
    (tmp_path / "texts.txt").write_text("the\nTHE\nan\n")
    arguments = ["--weights_path", WORDS, *shlex.split(arguments)]
    expected = run("sample.py", *arguments, input="th\nan\n", cwd=tmp_path)
    results = "new/folder/results.txt"
    process = run("sample.py", *arguments, "--output", results, input="th\nan\n", cwd=tmp_path)
    assert process.returncode == 0
    assert process.stdout == ""
    count = expected.stdout.count("\n")
    assert count == {"--most_likely": 18, "--score": 3, "--seed": 200}[arguments[2]]
    assert process.stderr == f"{expected.stderr}{results} holds {count} sequences\n"
    assert (tmp_path / results).read_text() == expected.stdout
    assert os.listdir(tmp_path / "new/folder") == ["results.txt"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_count(tmp_path):
    peaks = []
    for count in (5_000, 100_000):
        arguments = ["--prompt", "", "--output", "words.txt", "--num_samples", count]
        process = start(*arguments, cwd=tmp_path, stderr=None)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        peaks.append(usage.ru_maxrss)
    assert (tmp_path / "words.txt").read_text().count("\n") == 100_000
    assert peaks[1] < peaks[0] + 4000


def test_an_output_that_can_not_be_written_leaves_the_old_one(tmp_path):
    (tmp_path / "words.txt").write_text("old")

    def fail(*arguments, **options):
        process = run("sample.py", "--output", "words.txt", *arguments, cwd=tmp_path, **options)
        assert_one_line_error(process, "sample.py")
        assert (tmp_path / "words.txt").read_text() == "old"
        assert os.listdir(tmp_path) == ["words.txt"]
        return process.stderr

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))

    error = fail("--prompt", "", "--num_samples", 5000, preexec_fn=limit)
    assert "--output: can't write words.txt: File too large" in error
    error = fail(input="th\na b\n")
    assert "prompt 2: the model never saw ' '" in error
    assert error.endswith("; nothing was written\n")
    with open(tmp_path / "words.txt") as file:
        error = fail(stdin=file)
    assert "words.txt is the file of standard input; pass another one" in error


def test_ctrl_c_keeps_what_was_invented_until_then(tmp_path):
    arguments = ["--num_samples", 100_000_000, "--output", "words.txt", "--seed", 1]
    with terminal("sample.py", *arguments, cwd=tmp_path, term="xterm") as child:
        child.expect(r"[1-9]\d*/100000000")
        child.sendintr()
        shown, status = finish(child)
    assert status == 130
    assert "Traceback" not in shown
    (count,) = re.findall(r"Stopped: words.txt holds ([\d,]+) sequences", shown)
    count = int(count.replace(",", ""))
    lines = (tmp_path / "words.txt").read_text().split("\n")
    assert lines.pop() == ""
    assert len(lines) == count > 0
    # In whole batches, as the first run did, so that they are rounded alike.
    whole = math.ceil(count / model.LARGEST_BATCH) * model.LARGEST_BATCH
    assert lines_of("--prompt", "", "--num_samples", whole, "--seed", 1)[:count] == lines


def test_ctrl_c_before_the_first_result_leaves_the_old_file(tmp_path):
    (tmp_path / "old.txt").write_text("precious")
    os.mkfifo(tmp_path / "pipe")  # to wait at
    arguments = ["--score", "pipe", "--output", "old.txt"]
    with terminal("sample.py", *arguments, cwd=tmp_path) as child:
        while not any(name.startswith(".old.txt.") for name in os.listdir(tmp_path)):
            assert child.isalive()
            time.sleep(0.01)
        time.sleep(0.2)
        child.sendintr()
        shown, status = finish(child)
    assert status == 130
    assert "Traceback" not in shown
    assert sorted(os.listdir(tmp_path)) == ["old.txt", "pipe"]
    assert (tmp_path / "old.txt").read_text() == "precious"


# On a terminal


@pytest.fixture
def redirected(tmp_path):
    """Options of `terminal` that send stdout to words.txt instead."""

    def redirect():
        os.dup2(os.open(tmp_path / "words.txt", os.O_WRONLY | os.O_CREAT), 1)

    return {"preexec_fn": redirect}


def test_a_bar_is_shown_where_results_go_elsewhere(tmp_path, redirected):
    arguments = ["--prompt", "re", "--num_samples", 2000, "--seed", 1]
    with terminal("sample.py", *arguments, term="xterm", **redirected) as child:
        shown, status = finish(child)
    assert status == 0
    assert "2000/2000" in shown
    assert (tmp_path / "words.txt").read_text().split("\n")[:-1] == lines_of(*arguments)
    with terminal("sample.py", *arguments, term="xterm") as child:
        shown, status = finish(child)
    assert status == 0
    assert "/2000" not in shown


def test_results_can_be_redirected_while_prompts_are_typed(tmp_path, redirected):
    with terminal("sample.py", "--num_samples", 3, **redirected) as child:
        child.expect_exact("> ")
        child.sendline("pre")
        child.expect_exact("> ")
        assert child.before == "pre\r\n"
        child.sendeof()
        assert finish(child)[1] == 0
    assert re.fullmatch(r"(pre.*\n){3}", (tmp_path / "words.txt").read_text())


def test_prompts_typed_on_a_terminal_are_answered_in_columns():
    arguments = ["--weights_path", PRE_TRAINED / "user_names_10000.h5", "--seed", 3]
    with terminal("sample.py", *arguments) as child:
        child.expect_exact("Ctrl-D leaves.\r\n> ")
        for prompt in ("A", "Al", "Sta", ""):
            child.sendline(prompt)
            child.expect_exact("\r\n> ")
            echo, *lines = child.before.split("\r\n")
            assert echo == prompt
            assert max(map(len, lines)) <= 80
            assert len(lines) < 80
            invented = " ".join(lines).split()
            assert len(invented) == 100
            assert all(name.startswith(prompt) for name in invented)
            assert len(set(invented)) > 50
        child.sendline("日")
        child.expect_exact("Sorry, the model never saw '日' within a sequence.\r\n> ")
        child.sendline("Z")
        child.expect_exact("Z\r\nZ")
        child.expect_exact("\r\n> ")
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
        child.sendline("x")
        child.expect(r"x\r\nx\w*\r\n> ")
        child.sendintr()
        child.expect_exact("Press Ctrl-C again to leave.\r\n> ")
        child.sendline("y")  # so that the next is not the second in a row
        child.expect(r"y\r\ny.*\r\n> ")
        child.sendintr()
        child.expect_exact("Press Ctrl-C again to leave.\r\n> ")
        child.sendintr()
        shown, status = finish(child)
    assert "Traceback" not in shown
    assert status == 0


@pytest.mark.parametrize("arguments", ["--num_samples 9999999", "--most_likely 3000 --top_p 1"])
def test_ctrl_c_during_a_long_answer_returns_to_the_prompt(change, arguments):
    path = change(end=-1000, max_len=model.LIMITS["max_len"])
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
    size = len(model.load(WORDS)[0].alphabet)
    unsafe += "".join(map(chr, range(0xE000, 0xE100)))  # of private use, which is unsafe too
    path = change(alphabet=unsafe[:size])
    (tmp_path / "texts.txt").write_text("\x1b\x07\n\x1b[31m\n")
    for arguments, start in (
        (["--prompt", "\x1b"], r"\\x1b"),
        (["--score", tmp_path / "texts.txt"], r"\S+\t\\x1b"),
        (["--prompt=\x1b", "--most_likely", 5], r"\S+\t\\x1b"),
    ):
        with terminal("sample.py", "--weights_path", path, *arguments) as child:
            shown, status = finish(child)
        assert status == 0
        assert re.match(start, shown)
        assert shown.replace("\r\n", "").replace("\t", "").isprintable()
    process = run("sample.py", "--weights_path", path, "--prompt", "\x1b\x07", encoding=None)
    assert process.stdout.count(b"\x1b\x07") >= 100


@pytest.fixture
def columns(monkeypatch, capsys):
    """Shows texts on a terminal of some width and returns the lines there."""

    def show(texts, width):
        monkeypatch.setenv("COLUMNS", str(width))
        sample.show_in_columns(texts)
        return [line.rstrip() for line in capsys.readouterr().out.splitlines()]

    return show


@pytest.mark.parametrize("width", [20, 80, 1000])
def test_columns_line_up_and_fit(columns, width):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("ab漢字é"), rng.integers(1, 10))) for _ in range(57)]
    lines = columns(texts, width)
    rows = [line.split() for line in lines]
    downwards = [row[place] for place in range(57) for row in rows if place < len(row)]
    assert downwards == texts
    assert len(lines) <= math.ceil(57 / (width // 20))
    cells = [re.sub("([漢字])", r"\1-", line) for line in lines]  # they take two cells
    assert max(map(len, cells)) <= width
    starts = [{match.start() for match in re.finditer(r"\S+", line)} for line in cells]
    assert set.union(*starts) == starts[0]


@pytest.mark.parametrize("texts", [["a", "x" * 99, "b c " * 30 + "d"], ["שלום", "a", "مرحبا"]])
def test_what_does_not_fit_columns_is_shown_whole_one_a_line(columns, texts):
    assert columns(texts, 40) == texts
