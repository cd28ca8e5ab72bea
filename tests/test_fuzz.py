"""A short run of the harnesses in `fuzz/`, and every file that once broke something."""

import re
import sys

import pytest
from conftest import ROOT, run

FUZZ = ROOT / "tests" / "fuzz"
RUNS = pytest.mark.parametrize(
    ("count", "seed"), [("20", "1"), pytest.param("200", "2", marks=pytest.mark.slow)]
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="watches files as Linux does")


def outcomes(process):
    """The verdicts in a harness's report, and how often each was given."""
    assert process.returncode == 0, process.stdout + process.stderr
    counts = {"works": 0, "refused": 0}
    for verdict, count in re.findall(
        r"\b(works long|works|refused|WRONG\b.*?) +([\d,]+)$", process.stdout, re.M
    ):
        counts[verdict] = counts.get(verdict, 0) + int(count.replace(",", ""))
    return counts


def test_what_once_broke_something_is_refused():
    paths = sorted((FUZZ / "corpus").iterdir())
    counts = outcomes(run("tests/fuzz/models.py", *paths))
    assert counts == {"works": 0, "refused": 4 * len(paths)}


@RUNS
def test_broken_models_are_refused_or_work(count, seed):
    counts = outcomes(run("tests/fuzz/models.py", "--count", count, "--seed", seed))
    assert sum(counts.values()) == 4 * int(count)
    assert min(counts.values()) > 0


@RUNS
def test_broken_texts_are_refused_or_read(count, seed):
    counts = outcomes(run("tests/fuzz/texts.py", "--count", count, "--seed", seed))
    assert sum(counts.values()) == 5 * int(count)
    assert min(counts.values()) > 0
