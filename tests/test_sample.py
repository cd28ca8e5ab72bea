import json
import os
import re
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from build import on_terminal, read_until
from conftest import PRE_TRAINED, ROOT, assert_one_line_error, run

import model
import sample

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
        assert longest == 4 or max_len == 40


MISTAKES = {
    "a missing file": (["--weights_path", "missing.h5"], "can't read missing.h5: No such file"),
    "a folder": (["--weights_path", "."], "can't read .: Is a directory"),
    "another file": (["--weights_path", "text.h5"], "text.h5 is not a model"),
    "an unknown character": ([*WORDS[1:], "--prompt", "A"], "--prompt: the model never saw 'A'"),
    "a long prompt": ([*WORDS[1:], "--prompt", "a" * 99], "--prompt: 99 characters are more"),
    "no samples": (["--num_samples", "0"], "--num_samples: not from 1 to"),
    "no temperature": (["--temperature", "nan"], "--temperature: not from 0 to"),
    "no length": (["--max_len", "0"], "--max_len: not from 1 to"),
    "an unknown flag": (["--weight", "x"], "unrecognized arguments: --weight x"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_one_line(tmp_path, arguments, message):
    (tmp_path / "text.h5").write_text("no model")
    process = run("sample.py", *arguments, cwd=tmp_path, input="")
    assert_one_line_error(process, "sample.py")
    assert message in process.stderr


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


# On a terminal


def start(*arguments, columns=80):
    return on_terminal([sys.executable, ROOT / "sample.py", *map(str, arguments)], columns)


def test_prompts_typed_on_a_terminal_are_answered_in_columns():
    arguments = ["--weights_path", PRE_TRAINED / "user_names_10000.h5", "--seed", 3]
    with start(*arguments) as (terminal, process):
        assert read_until(terminal, "> ").endswith("Ctrl-D leaves.\r\n> ")
        for prompt in ("A", "Al", "Sta", ""):
            os.write(terminal, prompt.encode() + b"\n")
            echo, *lines, last = read_until(terminal, "\r\n> ").split("\r\n")
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
    path.write_bytes((trained[0] / "incognito_model.h5").read_bytes())
    with h5py.File(path, "r+") as file:
        metadata = json.loads(file.attrs[model.METADATA])
        unsafe = "\n\x1b\x9b\r\x07\x08\u202e\u200f\u2028" + "".join(map(chr, range(0x80, 0x9F)))
        metadata["alphabet"] = "".join(dict.fromkeys(unsafe))[: len(metadata["alphabet"])]
        file.attrs[model.METADATA] = np.bytes_(json.dumps(metadata))
    return path


def test_nothing_invented_can_steer_the_terminal(steering):
    with start("--weights_path", steering, "--prompt", "\x1b") as (terminal, process):
        shown = read_until(terminal, None)
        assert process.wait(60) == 0
    assert shown.count(r"\x1b") >= 100
    assert shown.replace("\r\n", "").isprintable()


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
