import contextlib
import itertools
import json
import math
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
import tracemalloc

import h5py
import numpy as np
import pytest
from build import on_terminal, read_until
from conftest import (
    PRE_TRAINED,
    ROOT,
    assert_one_line_error,
    enumerate_sequences,
    random_model,
    run,
)

import model
import sample
from loaders import SequenceLoader

WORDS = ["sample.py", "--weights_path", PRE_TRAINED / "english_words_5000.h5"]


def test_each_line_of_a_pipe_is_a_prompt():
    process = run(*WORDS, "--num_samples", 7, input="th\n\nqu\r\nlast")
    assert process.returncode == 0
    assert process.stderr == ""
    lines = process.stdout.split("\n")
    assert len(lines) == 4 * 7 + 1
    assert run(*WORDS, input="\ufeffth\n").returncode == 0
    for start, prompt in zip(range(0, 28, 7), ["th", "", "qu", "last"]):
        assert all(line.startswith(prompt) for line in lines[start : start + 7])


def test_a_pipe_is_answered_line_by_line():
    command = [sys.executable, ROOT / WORDS[0], *map(str, WORDS[1:]), "--num_samples", "2"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        for prompt in ("un", "re"):
            process.stdin.write(prompt + "\n")
            process.stdin.flush()
            assert process.stdout.readline().startswith(prompt)
            assert process.stdout.readline().startswith(prompt)


def test_prompts_that_can_not_be_answered_are_named_and_the_others_answered():
    process = run(*WORDS, "--num_samples", 2, input="ok\nnaïÏve\nyes\na b\n" + "x" * 99 + "\n")
    assert process.returncode == 2
    assert len(process.stdout.split("\n")) == 2 * 2 + 1
    errors = process.stderr.splitlines()
    assert len(errors) == 3
    assert errors[0].startswith("sample.py: error: prompt 2: the model never saw 'Ï'")
    assert errors[1].startswith("sample.py: error: prompt 4: the model never saw ' '")
    assert errors[2].startswith("sample.py: error: prompt 5: 99 characters are more than")


def test_bytes_that_are_no_characters_are_characters_no_model_knows():
    process = run(*WORDS, input=b"\xff\n", encoding=None)
    assert process.returncode == 2
    assert process.stdout == b""
    assert rb"never saw '\udcff'" in process.stderr


def test_one_prompt_can_be_answered_from_the_command_line():
    process = run(*WORDS, "--prompt", "inter", "--num_samples", 5)
    assert process.returncode == 0
    assert re.fullmatch(r"(inter.*\n){5}", process.stdout)
    assert run("sample.py", "--prompt", "", cwd="/").stdout.count("\n") == 100


def test_a_seed_makes_samples_repeatable():
    once, again, other = (run(*WORDS, "--seed", seed, input="a\n\n").stdout for seed in (1, 1, 2))
    assert once == again != other
    assert run(*WORDS, input="a\n").stdout != run(*WORDS, input="a\n").stdout


def test_temperature_and_max_len_are_obeyed():
    process = run(*WORDS, "--prompt", "th", "--temperature", 0, "--num_samples", 20)
    assert len(set(process.stdout.split())) == 1
    for max_len in (4, 40):
        process = run(*WORDS, "--prompt", "", "--temperature", 9, "--max_len", max_len)
        longest = max(map(len, process.stdout.split("\n")))
        assert longest <= max_len
        assert longest == 4 if max_len == 4 else longest > 16


MISTAKES = {
    "a missing file": (["--weights_path", "missing.h5"], "can't read missing.h5: No such file"),
    "a folder": (["--weights_path", "."], "can't read .: Is a directory"),
    "another file": (["--weights_path", "text.h5"], "text.h5 is not a model"),
    "an unknown character": ([*WORDS[1:], "--prompt", "A"], "--prompt: the model never saw 'A'"),
    "a long prompt": ([*WORDS[1:], "--prompt", "a" * 99], "--prompt: 99 characters are more"),
    "no samples": (["--num_samples", "0"], "--num_samples: not from 1 to"),
    "no temperature": (["--temperature", "nan"], "--temperature: not from 0 to"),
    "no length": (["--max_len", "0"], "--max_len: not from 1 to"),
    "no top k": (["--top_k", "0"], "--top_k: not from 1 to"),
    "no top p": (["--top_p", "1.1"], "--top_p: not from 0 to 1: 1.1"),
    "two ways": (["--most_likely", "3", "--score", "text.h5"], "not allowed with argument"),
    "a useless flag": (
        ["--most_likely", "3", "--seed", "1"],
        "--most_likely has no use for --seed; leave one of them out",
    ),
    "a useless prompt": (["--score", "x", "--prompt", ""], "--score has no use for --prompt"),
    "nothing to score": (["--score", "missing"], "--score: can't read missing: No such file"),
    "nothing to exclude": (["--exclude", "none.csv"], "--exclude: can't read none.csv: No such"),
    "no text to score": (["--score", "latin.txt"], "--score: latin.txt, line 1: not UTF-8"),
    "no folder": (["--output", "no/x", "--prompt", ""], "--output: can't write no/x: No such"),
    "a device": (["--output", "/dev/null"], "--output: '/dev/null' is not a regular file; name"),
    "a stream": (["--output", "/dev/stdout"], "--output: '/dev/stdout' is not a regular file"),
    "the weights": (
        ["--weights_path", "text.h5", "--output", "text.h5"],
        "--output: text.h5 is the file of --weights_path; name another one",
    ),
    "the excluded": (
        ["--exclude", "text.h5", "--output", "text.h5"],
        "--output: text.h5 is the file of --exclude; name another one",
    ),
    "an input": (
        ["--score", "text.h5", "--output", "./text.h5"],
        "--output: ./text.h5 is the file of --score; name another one",
    ),
    "an unknown flag": (["--weight", "x"], "unrecognized arguments: --weight x"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_one_line(tmp_path, arguments, message):
    (tmp_path / "text.h5").write_text("no model")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    process = run("sample.py", *arguments, cwd=tmp_path, input="")
    assert_one_line_error(process, "sample.py")
    assert message in process.stderr
    assert sorted(os.listdir(tmp_path)) == ["latin.txt", "text.h5"]


def test_keras_is_never_imported():
    process = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "sample.py", "--prompt", "a"],
        capture_output=True,
        text=True,
    )
    assert process.stdout.count("\n") == 100
    assert "| h5py" in process.stderr.replace("  ", "")
    assert not re.search(r"\| +(keras|tensorflow|jax|wordfreq)\b", process.stderr)


def test_a_closed_pipe_is_a_normal_end():
    command = [sys.executable, ROOT / WORDS[0], *map(str, WORDS[1:]), "--prompt", ""]
    process = subprocess.Popen(
        [*command, "--num_samples", "100000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == ""


# Without repetition


def test_a_set_of_texts_is_a_set(monkeypatch):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abé漢\0\n"), rng.integers(2, 12))) for _ in range(150_000)]
    # With few hashes, so that different texts often share one.
    monkeypatch.setattr(sample, "hash", lambda text: hash(text) % 30_011, raising=False)
    ours, theirs = sample.TextSet(), set()
    for text in texts:
        assert ours.add(text) == (text not in theirs)
        theirs.add(text)
    assert len(theirs) > 2**16
    assert all(text in ours for text in theirs)
    assert not any(text + "x" in ours for text in theirs)


@pytest.mark.slow
def test_a_million_texts_take_less_than_64_bytes_each_beyond_their_characters():
    words = list(itertools.islice(SequenceLoader(PRE_TRAINED / "english_words_5000.txt"), 100))
    words *= 10_000
    tracemalloc.start()
    try:
        found = sample.TextSet()
        size = sum(len(text) for n, word in enumerate(words) if found.add(text := f"{word}{n}"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(words) == 1_000_000
    assert (peak - size) / 1_000_000 < 64


def test_unique_sequences_come_once_whatever_the_prompts():
    process = run(*WORDS, "--unique", "--num_samples", 1000, input="a\nab\n\n")
    assert process.returncode == 0
    assert process.stderr == ""
    lines = process.stdout.split("\n")[:-1]
    assert len(lines) == len(set(lines)) == 3000


def test_unique_sequences_are_the_first_of_each_kind():
    arguments = [*WORDS, "--seed", 4, "--prompt", "th", "--num_samples"]
    all_of_them = run(*arguments, 1000).stdout.split("\n")[:-1]
    unique = run(*arguments, 300, "--unique").stdout.split("\n")[:-1]
    assert list(dict.fromkeys(all_of_them))[:300] == unique


@pytest.mark.parametrize("unique", [[], pytest.param(["--unique"], marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "header"),
    [("user_names_10000.csv", "user_name,packages\n"), ("english_words_5000.txt", "")],
)
def test_excluded_sequences_never_come(name, header, unique):
    path = PRE_TRAINED / name
    content = path.read_text(encoding="utf-8")
    assert content.startswith(header)
    learned = {line.split(",")[0] for line in content.removeprefix(header).split()}
    arguments = ["sample.py", "--weights_path", path.with_suffix(".h5"), "--prompt", "", *unique]
    arguments += ["--num_samples", 5000, "--temperature", 0.7, "--seed", 0]
    plain, picked = (
        run(*arguments, *more).stdout.split("\n")[:-1] for more in ([], ["--exclude", path])
    )
    assert len(picked) == 5000
    learned.add("")
    assert set(plain) & learned
    assert not set(picked) & learned


@pytest.mark.slow
def test_a_model_that_knows_three_words_ends_by_itself(tmp_path):
    (tmp_path / "sequences.txt").write_text("alpha\nbeta\ngamma\n")
    command = (
        "train.py --units 16 --layers 1 --dropout 0 --batch_size 3 --epochs 150 "
        "--validation_split 0"
    )
    assert run(*shlex.split(command), cwd=tmp_path).returncode == 0
    command = "sample.py --weights_path incognito_model.h5 --prompt= --top_p 0.9 --num_samples 1000"
    process = run(*shlex.split(command), "--unique", cwd=tmp_path)
    assert process.returncode == 0
    assert sorted(process.stdout.split()) == ["alpha", "beta", "gamma"]
    nothing_left = "sample.py: the model has nothing new left to give: {} found, not 1,000"
    assert process.stderr.startswith(nothing_left.format(3))
    assert process.stderr.count("\n") == 1
    process = run(*shlex.split(command), "--exclude", "sequences.txt", cwd=tmp_path)
    assert process.returncode == 0
    assert process.stdout == ""
    assert process.stderr.startswith(nothing_left.format(0))


# The most likely sequences


@pytest.mark.parametrize("prompt", ["", "b"])
@pytest.mark.parametrize(
    "shape", [{}, {"temperature": 0.3}, {"top_k": 2}, {"top_p": 0.8}, {"temperature": 0}], ids=str
)
@pytest.mark.parametrize("max_len", [1, 3, 6])
def test_the_most_likely_are_those_that_brute_force_finds(prompt, shape, max_len):
    for seed, scale in enumerate([0.2, 0.7, 2.0]):
        trained = random_model("\nabc", seed=seed, scale=scale)
        everything = enumerate_sequences(trained, prompt, max_len=max_len, **shape)
        expected = sorted(everything.values(), reverse=True)
        notes = []
        for count in (1, 7, 5000):
            found = list(
                sample.most_likely(
                    trained, prompt, count, **shape, max_len=max_len, warn=notes.append
                )
            )
            assert len(found) == min(count, len(everything))
            probabilities, texts = zip(*found)
            assert len(set(texts)) == len(texts)
            np.testing.assert_allclose(probabilities, expected[:count], rtol=1e-4)
            np.testing.assert_allclose(
                probabilities, [everything[text] for text in texts], rtol=1e-4
            )
            assert list(probabilities) == sorted(probabilities, reverse=True)
        assert notes[-1] == (f"no more than {len(everything):,} sequences are possible, not 5,000")


def test_the_most_likely_can_exclude():
    trained = random_model("\nabcd", max_len=5)
    everything = [text for _, text in sample.most_likely(trained, count=40)]
    exclude = set(everything[::3])
    rest = [text for _, text in sample.most_likely(trained, count=20, exclude=exclude)]
    assert rest == [text for text in everything if text not in exclude][:20]


def test_a_search_that_would_take_too_much_memory_stops_with_what_is_proven(monkeypatch):
    trained, _ = model.load(PRE_TRAINED / "english_words_5000.h5")
    expected = list(sample.most_likely(trained, count=150))
    monkeypatch.setattr(sample, "SEARCH_MEMORY", (2**22, 0, 2**22))
    notes = []
    proven = list(sample.most_likely(trained, count=150, warn=notes.append))
    assert 3 < len(proven) < 150
    assert [text for _, text in proven] == [text for _, text in expected[: len(proven)]]
    (note,) = notes
    assert note.startswith(f"only {len(proven)} of 150 are proven to be the most likely")
    assert "more would take over 4 MiB of memory; " in note


@pytest.mark.parametrize("bias", [0, -40])
@pytest.mark.parametrize("memory", [2**12, 2**18])
def test_a_search_with_hardly_any_memory_ends(monkeypatch, bias, memory):
    trained = random_model("\nabcdefgh", max_len=60, scale=0.3)
    trained.weights[-1][0] += bias  # ends become unlikely
    monkeypatch.setattr(sample, "SEARCH_MEMORY", (memory, 0, memory))
    notes = []
    found = list(sample.most_likely(trained, count=1000, warn=notes.append))
    monkeypatch.undo()
    assert notes == [note := notes[0]]
    assert note.startswith(f"only {len(found)} of 1,000 are proven to be the most likely")
    assert (len(found) == 0) == (bias != 0)
    if found:
        assert found == list(sample.most_likely(trained, count=len(found)))


def test_the_most_likely_obey_the_other_flags(tmp_path):
    arguments = [*WORDS, "--most_likely", 40, "--max_len", 4, "--top_k", 3, "--temperature", 0.5]
    process = run(*arguments, input="th\nqu\nthe\n")
    texts = [line.split("\t")[1] for line in process.stdout.split("\n")[:-1]]
    assert process.returncode == 0
    # Of up to three followers each time: 1 + 2 + 4 + 9 ends, fewer without the end mark.
    assert 15 < len(texts) < 40
    assert set(map(len, texts)) <= {2, 3, 4}
    notes = process.stderr.split("\n")[:-1]
    for note, prompt in zip(notes, ["th", "qu", "the"], strict=True):
        assert re.fullmatch(
            rf"sample.py: '{prompt}': no more than \d+ sequences are possible, not 40", note
        )
    (tmp_path / "known.txt").write_text("\n".join(texts[::2]))
    rest = run(*arguments, "--exclude", tmp_path / "known.txt", input="th\nqu\nthe\n").stdout
    found = [line.split("\t")[1] for line in rest.split("\n")[:-1]]
    assert found == [text for text in texts if text not in texts[::2]]


@pytest.mark.slow
def test_the_most_likely_of_the_command_line_are_often_drawn():
    process = run(*WORDS, "--prompt", "th", "--most_likely", 20)
    assert process.returncode == 0
    assert process.stderr == ""
    rows = [line.split("\t") for line in process.stdout.split("\n")[:-1]]
    assert len(rows) == 20
    drawn = run(*WORDS, "--prompt", "th", "--num_samples", 50_000).stdout.split("\n")
    for probability, text in rows:
        assert text.startswith("th")
        spread = (float(probability) / 50_000) ** 0.5
        assert drawn.count(text) / 50_000 == pytest.approx(float(probability), abs=5 * spread)


# Scores


def evaluate_in_keras(path, texts, max_len):
    """What stock Keras makes of the texts: the mean over characters and ends."""
    import keras

    network = keras.models.load_model(path)
    trained, _ = model.load(path)
    alphabet = trained.alphabet
    rows = np.zeros((len(texts), max_len), int)
    for row, text in zip(rows, texts):
        row[: len(text[:max_len])] = alphabet.encode(text[:max_len])
    # One a character, and one for an end that was not cut off.
    targets = np.array([len(text[:max_len]) + (len(text) <= max_len) for text in texts])
    rows = np.pad(rows, [(0, 0), (1, 1)])
    inputs = np.eye(len(alphabet), dtype=np.float32)[rows[:, :-1]]
    weights = np.arange(rows.shape[1] - 1) < targets[:, None]
    total = network.evaluate(inputs, rows[:, 1:], sample_weight=weights, verbose=0)
    return total * weights.size / weights.sum()


@pytest.mark.parametrize(
    ("name", "max_len"),
    [
        pytest.param("english_words_5000.h5", None, marks=pytest.mark.slow),
        pytest.param("user_names_10000.h5", None, marks=pytest.mark.slow),
        ("user_names_10000.h5", 7),
    ],
)
def test_scores_agree_with_keras(tmp_path, name, max_len):
    trained, _ = model.load(PRE_TRAINED / name)
    texts = sorted(filter(None, trained.sample(count=700, temperature=1.2, seed=1)), key=hash)
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    arguments = ["--weights_path", PRE_TRAINED / name, "--score", "texts.txt"]
    arguments += ["--max_len", max_len] if max_len else []
    process = run("sample.py", *arguments, cwd=tmp_path)
    assert process.returncode == 0
    values, scored = zip(*(line.split("\t") for line in process.stdout.split("\n")[:-1]))
    assert list(scored) == texts
    max_len = max_len or trained.max_len
    expected = evaluate_in_keras(PRE_TRAINED / name, texts, max_len)
    mean, perplexity = map(
        float,
        re.match(
            r"sample.py: ([\d.]+) nats per character, perplexity ([\d.]+):", process.stderr
        ).groups(),
    )
    assert mean == pytest.approx(expected, rel=1e-5)
    assert perplexity == pytest.approx(np.exp(expected), rel=1e-4)
    counts = [min(len(text), max_len) + (len(text) <= max_len) for text in texts]
    assert np.average(list(map(float, values)), weights=counts) == pytest.approx(mean, abs=2e-6)
    cut = sum(len(text) > max_len for text in texts)
    assert (f"{cut} were longer than {max_len} characters and cut" in process.stderr) == (cut > 0)
    for index in (0, 300, -1):
        alone = evaluate_in_keras(PRE_TRAINED / name, [texts[index]], max_len)
        assert float(values[index]) == pytest.approx(alone, abs=2e-5)


def test_the_score_of_a_sequence_is_its_probability():
    trained = random_model("\nabc", max_len=4)
    everything = enumerate_sequences(trained, max_len=9)
    texts = [text for text in everything if len(text) < 9][::5]
    for text, nats, targets in sample.score(trained, texts, max_len=9):
        assert targets == len(text) + 1
        assert nats == pytest.approx(-np.log(everything[text]), rel=1e-4)


def test_what_the_model_can_not_know_is_counted_and_left_out_of_the_mean(tmp_path):
    (tmp_path / "all.csv").write_text('word,n\nthe,1\n"Ïx, y",2\nand,3\na b,4\n', encoding="utf-8")
    (tmp_path / "known.txt").write_text("the\nand\n")
    known, both = (run(*WORDS, "--score", tmp_path / name) for name in ("known.txt", "all.csv"))
    lines = both.stdout.split("\n")
    assert lines[1] == "inf\tÏx, y"
    assert lines[3] == "inf\ta b"
    assert [lines[0], lines[2], ""] == known.stdout.split("\n")
    mean, rest = both.stderr.split("\n", 1)
    assert mean + "\n" == known.stderr
    assert "the mean over 2 sequences with 8 characters and ends" in mean
    assert rest == "sample.py: 2 more hold characters that the model can't know\n"
    (tmp_path / "unknown.txt").write_text("THE\n")
    process = run(*WORDS, "--score", tmp_path / "unknown.txt")
    assert process.stdout == "inf\tTHE\n"
    assert process.stderr == (
        "sample.py: 1 sequences, all of them, hold characters that the model can't know\n"
    )


# Into a file


def test_an_output_holds_what_stdout_would_have(tmp_path):
    arguments = [*WORDS, "--prompt", "re", "--num_samples", 2000, "--seed", 1]
    expected = run(*arguments)
    process = run(*arguments, "--output", tmp_path / "words.txt")
    assert process.returncode == 0
    assert process.stdout == ""
    assert process.stderr == f"{tmp_path}/words.txt holds 2,000 lines\n"
    assert (tmp_path / "words.txt").read_text() == expected.stdout
    assert os.listdir(tmp_path) == ["words.txt"]


@pytest.mark.parametrize(
    "arguments", [["--most_likely", 9], ["--score", "texts.txt"], ["--num_samples", 9]]
)
def test_each_kind_of_result_can_go_into_a_file(tmp_path, arguments):
    arguments = [*WORDS, *arguments] + (["--seed", 1] if "--num_samples" in arguments else [])
    (tmp_path / "texts.txt").write_text("the\nTHE\nan\n")
    expected = run(*arguments, input="th\nan\n", cwd=tmp_path).stdout
    process = run(*arguments, "--output", "results", input="th\nan\n", cwd=tmp_path)
    assert process.returncode == 0
    assert expected.count("\n") == (3 if "--score" in arguments else 18)
    assert (tmp_path / "results").read_text() == expected


def measure_memory(*arguments):
    process = subprocess.Popen([sys.executable, ROOT / "sample.py", *map(str, arguments)])
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return usage.ru_maxrss


@pytest.mark.slow
def test_memory_does_not_grow_with_the_count(tmp_path):
    arguments = ["--prompt", "", "--output", tmp_path / "words.txt", "--num_samples"]
    few, many = (measure_memory(*arguments, count) for count in (5_000, 100_000))
    assert (tmp_path / "words.txt").read_text().count("\n") == 100_000
    assert many < few + 4000


def test_an_output_that_can_not_be_written_leaves_the_old_one(tmp_path):
    (tmp_path / "words.txt").write_text("old")
    arguments = [*WORDS, "--prompt", "", "--num_samples", 5000, "--output", "words.txt"]
    process = run(
        *arguments,
        cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)),
    )
    assert_one_line_error(process, "sample.py")
    assert "--output: can't write words.txt: File too large" in process.stderr
    process = run(*WORDS, "--output", "words.txt", cwd=tmp_path, input="th\na b\n")
    assert_one_line_error(process, "sample.py")
    assert "prompt 2: the model never saw ' '" in process.stderr
    assert process.stderr.endswith("; nothing was written\n")
    with open(tmp_path / "words.txt") as prompts:
        process = run(*WORDS, "--output", "words.txt", cwd=tmp_path, stdin=prompts)
    assert_one_line_error(process, "sample.py")
    assert "words.txt is the file of standard input; name another one" in process.stderr
    process = run(*WORDS, "--output", "words.txt", cwd=tmp_path, input="")
    assert_one_line_error(process, "sample.py")
    assert "no prompt came in; pass one, such as --prompt ''" in process.stderr
    assert (tmp_path / "words.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["words.txt"]


def test_ctrl_c_keeps_what_was_invented_until_then(tmp_path):
    arguments = ["--num_samples", 100_000_000, "--output", "words.txt", "--seed", 1]
    command = [sys.executable, ROOT / "sample.py", *map(str, arguments)]
    with on_terminal(command, cwd=tmp_path) as (terminal, process):
        shown = read_until(terminal, " left")
        time.sleep(0.5)
        os.write(terminal, b"\x03")
        shown += read_until(terminal, None)
        assert process.wait(60) == 130
    assert re.search(
        r"\r\[-{20}\] [\d,]+ of 100,000,000, [\d,]+ a second, \d+:\d\d:\d\d left", shown
    )
    count = int(re.search(r"Stopped: words.txt holds ([\d,]+) lines", shown)[1].replace(",", ""))
    lines = (tmp_path / "words.txt").read_text().split("\n")
    assert lines.pop() == ""
    assert len(lines) == count > 0
    # In whole batches, as the first run did, so that they are rounded alike.
    whole = math.ceil(count / model.BATCH) * model.BATCH
    expected = run(*WORDS, "--prompt", "", "--num_samples", whole, "--seed", 1).stdout
    assert expected.split("\n")[:count] == lines


def test_ctrl_c_before_the_first_result_leaves_the_old_file(tmp_path):
    (tmp_path / "old.txt").write_text("precious")
    os.mkfifo(tmp_path / "pipe")  # to wait at
    command = [sys.executable, str(ROOT / "sample.py"), "--score", "pipe", "--output", "old.txt"]
    with on_terminal(command, cwd=tmp_path) as (terminal, process):
        while not any(name.startswith(".old.txt.") for name in os.listdir(tmp_path)):
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.2)
        os.write(terminal, b"\x03")
        assert "Traceback" not in read_until(terminal, None)
        assert process.wait(60) == 130
    assert sorted(os.listdir(tmp_path)) == ["old.txt", "pipe"]
    assert (tmp_path / "old.txt").read_text() == "precious"


def test_a_log_gets_lines(capsys, monkeypatch):
    moments = itertools.count(step=2)
    monkeypatch.setattr(model.time, "monotonic", lambda: next(moments))
    watch = sample.Watch(beside=False, redraw=True)
    watch.start(total=6)
    assert list(watch.over("abcdef")) == list("abcdef")
    assert capsys.readouterr().err == (
        "[######--------------] 2 of 6, 0.3 a second, 0:00:12 left\n"
        "[#############-------] 4 of 6, 0.3 a second, 0:00:07 left\n"
        "[####################] 6 of 6, 0.3 a second, 0:00:00 left\n"
    )
    watch.start()
    list(watch.over("abc"))
    assert capsys.readouterr().err == "2 so far, 0.3 a second\n"


# On a terminal


def start(*arguments, columns=80):
    return on_terminal([sys.executable, ROOT / "sample.py", *map(str, arguments)], columns)


def test_prompts_typed_on_a_terminal_are_answered_in_columns():
    arguments = ["--weights_path", PRE_TRAINED / "user_names_10000.h5", "--seed", 3]
    with start(*arguments) as (terminal, process):
        assert read_until(terminal, "> ").endswith("Ctrl-D leaves.\r\n> ")
        for prompt in ("A", "Al", "Sta", ""):
            os.write(terminal, prompt.encode() + b"\n")
            shown = re.sub(r"\r0 of 100.*\r +\r", "", read_until(terminal, "\r\n> "))
            echo, *lines, last = shown.split("\r\n")
            assert (echo, last) == (prompt, "> ")
            assert max(map(len, lines)) <= 80
            assert len(lines) < 80
            invented = " ".join(lines).split()
            assert len(invented) == 100
            assert all(name.startswith(prompt) for name in invented)
            assert len(set(invented)) > 50
        os.write(terminal, "日\n".encode())
        assert "Sorry, the model never saw '日' within a sequence." in read_until(terminal, "\n> ")
        os.write(terminal, b"Z\n")
        assert "Z" in read_until(terminal, "\n> ")
        os.write(terminal, b"\x04")
        assert read_until(terminal, None) == "\r\n"
        assert process.wait(60) == 0


def test_ctrl_c_leaves_quietly():
    with start() as (terminal, process):
        read_until(terminal, "> ")
        time.sleep(1)  # Python's readline misses a signal that comes before it waits for keys
        os.write(terminal, b"\x03")
        assert "Traceback" not in read_until(terminal, None)
        assert process.wait(60) == 0


def test_ctrl_c_during_a_long_batch_returns_to_the_prompt():
    with start("--num_samples", 10_000_000) as (terminal, process):
        read_until(terminal, "> ")
        os.write(terminal, b"qu\n")
        read_until(terminal, "\r\nqu")
        os.write(terminal, b"\x03")
        assert read_until(terminal, "\r\n> ").endswith("Stopped. Ctrl-D leaves.\r\n> ")
        os.write(terminal, b"th\n")
        read_until(terminal, "\r\nth")
        os.write(terminal, b"\x03")
        read_until(terminal, "\r\n> ")
        os.write(terminal, b"\x04")
        assert "Traceback" not in read_until(terminal, None)
        assert process.wait(60) == 0


@contextlib.contextmanager
def changing_a_copy(source, path):
    """Copies a model's file and lets its open HDF5 file and its metadata be changed."""
    path.write_bytes(source.read_bytes())
    with h5py.File(path, "r+") as file:
        metadata = json.loads(file.attrs[model.METADATA])
        yield file, metadata
        file.attrs[model.METADATA] = np.bytes_(json.dumps(metadata))


@pytest.fixture
def endless(trained, tmp_path):
    """A model whose sequences never end and may become as long as a file can say."""
    path = tmp_path / "endless.h5"
    with changing_a_copy(trained[0] / "incognito_model.h5", path) as (file, metadata):
        metadata["max_len"] = model.LIMITS["max_len"]
        file["model_weights/next_character/bias"][0] = -1000
    return path


def test_a_long_answer_shows_how_far_it_is_and_stops_at_ctrl_c(endless):
    for arguments, shown in (
        ([], r"0 of 100; character [\d,]+ of at most 65,536 after 0:00:0"),
        (
            ["--most_likely", 3000, "--temperature", 9],
            r"0 so far; [\d,]+ beginnings looked through after 0:00:0",
        ),
    ):
        with start("--weights_path", endless, *arguments) as (terminal, process):
            read_until(terminal, "> ")
            os.write(terminal, b"\n")
            assert re.search("\r" + shown, read_until(terminal, " after 0:00:0"))
            os.write(terminal, b"\x03")
            assert read_until(terminal, "\r\n> ").endswith("\r\nStopped. Ctrl-D leaves.\r\n> ")
            os.write(terminal, b"\x04")
            read_until(terminal, None)
            assert process.wait(60) == 0


@pytest.mark.slow
def test_long_work_is_never_silent_for_ten_seconds(endless):
    command = [sys.executable, ROOT / "sample.py", "--weights_path", endless, "--prompt", ""]
    with subprocess.Popen(
        [*command, "--num_samples", "5000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        begin = time.monotonic()
        line = process.stderr.readline()
        assert re.fullmatch(
            r"0 of 5,000; character [\d,]+ of at most 65,536 after 0:00:0[89]\n", line
        )
        assert time.monotonic() - begin < 10
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=5) == ("", "")
        assert process.returncode == 130


def test_results_can_be_piped_while_prompts_are_typed(tmp_path):
    command = f"{sys.executable} {ROOT}/sample.py --num_samples 3 > {tmp_path}/results"
    with on_terminal(["sh", "-c", command]) as (terminal, process):
        read_until(terminal, "> ")
        os.write(terminal, b"pre\n")
        read_until(terminal, "\n> ")
        os.write(terminal, b"\x04")
        read_until(terminal, None)
        assert process.wait(60) == 0
    assert re.fullmatch(r"(pre.*\n){3}", (tmp_path / "results").read_text())


@pytest.fixture
def steering(trained, tmp_path):
    """A model whose every character would steer a terminal."""
    path = tmp_path / "steering.h5"
    with changing_a_copy(trained[0] / "incognito_model.h5", path) as (_, metadata):
        unsafe = "\n\x1b\x9b\r\x07\x08\u202e\u200f\u2028" + "".join(map(chr, range(0x80, 0x9F)))
        metadata["alphabet"] = "".join(dict.fromkeys(unsafe))[: len(metadata["alphabet"])]
    return path


def test_nothing_invented_can_steer_the_terminal(steering, tmp_path):
    with start("--weights_path", steering, "--prompt", "\x1b") as (terminal, process):
        shown = read_until(terminal, None)
        assert process.wait(60) == 0
    assert shown.count(r"\x1b") >= 100
    assert shown.replace("\r\n", "").isprintable()
    (tmp_path / "texts.txt").write_text("\x1b\x07\n\x1b[31m\n")
    for arguments in (["--score", tmp_path / "texts.txt"], ["--prompt=\x1b", "--most_likely", 5]):
        with start("--weights_path", steering, *arguments) as (terminal, process):
            shown = read_until(terminal, None)
            assert process.wait(60) == 0
        assert re.search(r"^\S+\t\\x1b", shown)
        assert shown.replace("\r\n", "").replace("\t", "").isprintable()


def test_a_pipe_gets_every_character_as_it_is(steering):
    process = run("sample.py", "--weights_path", steering, "--prompt", "\x1b\r", encoding=None)
    assert process.returncode == 0
    assert process.stdout.count(b"\x1b\r") >= 100


def test_columns_line_up_and_fit():
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("ab漢字é"), rng.integers(0, 12))) for _ in range(57)]
    for width in (1, 20, 80, 1000):
        lines = sample.arrange(texts, width)
        assert sorted(" ".join(lines).split()) == sorted(filter(None, texts))
        assert len(lines) == 57 or max(map(sample.count_cells, lines)) <= width
    assert sample.arrange(["a", "bb", "漢", "d"], 9) == ["a   漢", "bb  d"]
