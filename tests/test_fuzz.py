"""Runs of the harness in `fuzz/`, and every file that once broke something."""

import re
import sys

import pytest
from conftest import ROOT, run

import model

FUZZ = ROOT / "tests" / "fuzz"


@pytest.mark.parametrize("path", sorted((FUZZ / "corpus").iterdir()), ids=lambda path: path.stem)
def test_what_once_broke_something_is_refused(path):
    with pytest.raises(ValueError, match=r"is not a model that train\.py saved: ") as refusal:
        model.load(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux counts it")
@pytest.mark.parametrize(
    ("kind", "count", "seed"),
    [
        ("models", 40, 1),
        ("lists", 40, 1),
        pytest.param("models", 600, 2, marks=pytest.mark.slow),
        pytest.param("lists", 300, 2, marks=pytest.mark.slow),
    ],
)
def test_broken_files_are_refused_or_work(kind, count, seed):
    process = run("tests/fuzz/fuzz.py", kind, "--count", count, "--seed", seed)
    assert process.returncode == 0, process.stdout + process.stderr
    assert re.search(rf"^inputs +{count:,}$", process.stdout, re.M)
    for outcome in ("worked", "refused"):
        assert re.search(rf"^\w+: {outcome} ", process.stdout, re.M)
