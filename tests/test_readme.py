import doctest
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import CONTRACT, PRE_TRAINED, ROOT, run

import loaders
import model
import sample
import train

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (.*)$", README, re.M)


@pytest.mark.parametrize(
    "command",
    [
        "pip install -r requirements.txt",
        "python sample.py --weights_path 'pre_trained_models/english_words_5000.h5'",
        "python sample.py --weights_path 'pre_trained_models/user_names_10000.h5'",
        f"python {CONTRACT}",
    ],
)
def test_the_contract_is_in_the_readme(command):
    assert command in COMMANDS


def test_every_flag_in_the_readme_exists():
    for script in ("train.py", "sample.py"):
        known = set(re.findall(r"--\w+", run(script, "--help").stdout))
        for command in COMMANDS:
            for part in re.findall(rf"{script}([^&>|;`]*)", command):
                assert set(re.findall(r"--\w+", part)) <= known


def test_the_one_line_command_makes_sequences_the_contract_can_learn(tmp_path):
    command = next(command for command in COMMANDS if "> sequences.txt" in command)
    shell = command.replace("python ", shlex.quote(sys.executable) + " ", 1)
    subprocess.run(shell, shell=True, check=True, cwd=tmp_path)
    lines = (tmp_path / "sequences.txt").read_text(encoding="utf-8").split("\n")
    assert len(lines) == 1001
    assert not any(" " in line for line in lines)


def test_the_python_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    end = r"\['Al.*'\]\n\[\(0\.\d+, 'Al\w*'\), \(0\.\d+, 'Al\w*'\)\]\n\[[\d.]+, [\d.]+\]\n"
    process = subprocess.run(
        [sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert re.fullmatch(end, process.stdout, re.S)


# Runs Python, on a smaller network for fewer epochs and samples than a command says.
SHORTENED = f"""#!/bin/sh
case "$*" in
    *train.py*--init_from*) exec {sys.executable} "$@" --epochs 1 ;;
    *train.py*) exec {sys.executable} "$@" --epochs 1 --units 8 --num_sequences 500 ;;
    *sample.py*--score*|*sample.py*--most_likely*) exec {sys.executable} "$@" ;;
    *sample.py*) exec {sys.executable} "$@" --num_samples 50 ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


def find_commands(text):
    """Returns the commands in a Markdown text or a `--help`, with all lines that belong to each."""
    blocks = re.findall(r"(?:^(?:  |    |      )[^ -].*\n(?:      .*\n)*)+", text, re.M)
    blocks += re.findall(r"`((?:python|printf) [^`]*)`", text)
    starts = r"(?=^ *(?:python |printf |for |KERAS_BACKEND))"
    commands = []
    for block in blocks:
        commands += [block] if "done" in block else re.split(starts, block, flags=re.M)
    return [command for command in commands if re.match(starts, command)]


@pytest.mark.slow
@pytest.mark.parametrize("shown", ["README.md", "card", "train.py", "sample.py"])
def test_every_command_that_a_user_is_shown_runs(tmp_path, shown):
    for name in ("train.py", "sample.py", "pre_trained_models"):
        (tmp_path / name).symlink_to(ROOT / name)
    names = (PRE_TRAINED / "user_names_10000.csv").read_text(encoding="utf-8").split("\n")[:300]
    for name in ("names.csv", "other.txt", "few.txt"):
        (tmp_path / name).write_text("\n".join(names), encoding="utf-8")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(SHORTENED)
    (tmp_path / "bin" / "python").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    text = README if shown == "README.md" else (PRE_TRAINED / "README.md").read_text("utf-8")
    if shown.endswith(".py"):
        text = run(shown, "--help").stdout
    commands = [c for c in find_commands(text) if not re.search(r"build\.py|benchmarks|…", c)]
    assert len(commands) >= 2
    for command in commands:
        process = subprocess.run(
            ["bash", "-ec", re.sub(r"1 2 3[ \d]*;", "1 2;", command)],
            cwd=tmp_path,
            env=environment,
            input="a\n",
            text=True,
            capture_output=True,
        )
        assert process.returncode == 0, (command, process.stderr)
        assert process.stdout or re.search("--output|>", command), command


@pytest.mark.parametrize("module", [loaders, model, train, sample])
def test_the_examples_in_docstrings_run(module, monkeypatch, capsys):
    import keras

    monkeypatch.chdir(ROOT)
    names, _ = model.load(PRE_TRAINED / "user_names_10000.h5")
    known = {"keras": keras, "path": PRE_TRAINED / "english_words_5000.h5", "names": names}
    result = doctest.testmod(module, extraglobs=known, optionflags=doctest.ELLIPSIS)
    assert result.attempted
    assert not result.failed, capsys.readouterr().out


def test_the_top_level_shows_what_it_should():
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    visible = {path.split("/")[0] for path in listing.stdout.split() if not path.startswith(".")}
    expected = (
        "sample.py train.py loaders.py model.py pre_trained_models requirements.txt README.md"
    )
    pictures = {f"sampled{number}.png" for number in (1, 2, 3)}
    assert visible <= {*expected.split(), "tests", "LICENSE"} | pictures
