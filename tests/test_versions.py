import re
import shlex
import subprocess
import sys

import pytest
from conftest import CONTRACT, PRE_TRAINED, ROOT


@pytest.mark.slow
def test_the_oldest_versions_that_are_allowed_work(tmp_path):
    lines = (ROOT / "requirements.txt").read_text().split()
    oldest = [re.sub(r">=([\d.]+),<.*", r"==\1", line) for line in lines]
    assert all("==" in line for line in oldest)
    (tmp_path / "sequences.txt").write_text("alpha\nbeta\ngamma\ndelta\nepsilon\n" * 3)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    check = "import keras, sys; [keras.models.load_model(path) for path in sys.argv[1:]]"
    for command in (
        ["-m", "pip", "install", "--quiet", *oldest],
        [ROOT / "train.py", *shlex.split(CONTRACT)[1:]],
        [ROOT / "sample.py", "--weights_path", "incognito_model.h5", "--prompt", "ga"],
        ["-c", check, "incognito_model.h5", *PRE_TRAINED.glob("*.h5")],
    ):
        process = subprocess.run([python, *command], cwd=tmp_path, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
