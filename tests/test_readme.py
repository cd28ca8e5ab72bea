"""What the README, the model card and --help say."""

import doctest
import os
import re
import subprocess
import sys

import pytest
from conftest import CONTRACT, PRE_TRAINED, ROOT, run

import loaders
import model
import sample
import train
from loaders import LOADERS

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (.*)$", README, re.M)


def test_the_contract_is_in_the_readme():
    assert {f"python {CONTRACT}", "pip install -r requirements.txt"} <= {*COMMANDS}
    for name in ("english_words_5000", "user_names_10000"):
        assert f"python sample.py --weights_path 'pre_trained_models/{name}.h5'" in COMMANDS


def show_help(script):
    """Returns what a script's --help shows on a terminal of 80 columns."""
    return run(f"{script.__name__}.py", "--help", env={**os.environ, "COLUMNS": "80"}).stdout


@pytest.mark.parametrize("script", [train, sample])
def test_the_help_fits_a_screen_and_knows_every_flag_of_the_readme(script):
    shown = show_help(script)
    lines = shown.splitlines()
    assert 20 < len(lines) <= 48
    assert max(map(len, lines)) <= 80
    if script is train:
        (row,) = re.findall(r"^\| `--loader_class`.*", README, re.M)
        for name, loader in LOADERS.items():
            assert f"`{name}`" in row
            assert f"{name}: {loader.summary}" in " ".join(shown.split())
    known = set(re.findall(r"--\w+", shown))
    for command in COMMANDS:
        for part in re.findall(rf"{script.__name__}\.py([^&>|;`]*)", command):
            assert set(re.findall(r"--\w+", part)) <= known


@pytest.fixture
def copy(tmp_path):
    """A folder with the scripts, in which what a user is shown can be run."""
    for name in ("loaders.py", "model.py", "train.py", "sample.py", "pre_trained_models"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.slow
def test_the_python_example_runs(copy):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    command = [sys.executable, "-c", example.replace("--epochs 2", "--epochs 1 --units 8")]
    process = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    end = r"\n\['un.*'\]\n\[\('un\w*', 0\.\d+\), \('un\w*', 0\.\d+\)\]\n\[[\d.]+, [\d.]+\]\n$"
    assert re.search(end, process.stdout)


# Runs Python, on a smaller network for fewer epochs and samples than a command says.
SHORTENED = f"""#!/bin/sh
case "$*" in
    *train.py*--init_from*) set -- "$@" --epochs 1 ;;
    *train.py*) set -- "$@" --epochs 1 --units 8 --num_sequences 500 ;;
    *--score*|*--most_likely*) ;;
    *sample.py*) set -- "$@" --num_samples 50 ;;
esac
exec {sys.executable} "$@"
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
@pytest.mark.parametrize("shown", ["README.md", "pre_trained_models/README.md", train, sample])
def test_every_command_that_a_user_is_shown_runs(copy, shown):
    names = (PRE_TRAINED / "user_names_10000.csv").read_text(encoding="utf-8").split("\n")[:300]
    for name in ("names.csv", "other.txt", "few.txt"):
        (copy / name).write_text("\n".join(names), encoding="utf-8")
    (copy / "bin").mkdir()
    (copy / "bin" / "python").write_text(SHORTENED)
    (copy / "bin" / "python").chmod(0o755)
    environment = {**os.environ, "PATH": f"{copy / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    text = (ROOT / shown).read_text("utf-8") if isinstance(shown, str) else show_help(shown)
    commands = [c for c in find_commands(text) if not re.search(r"build\.py|benchmarks|…", c)]
    assert len(commands) >= 2
    for command in commands:
        process = subprocess.run(
            ["bash", "-ec", re.sub(r"1 2 3[ \d]*;", "1 2;", command)],
            cwd=copy,
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
