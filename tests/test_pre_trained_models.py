import re
import subprocess
import sys

import build
import numpy as np
import pytest
from build import ROOT
from conftest import PRE_TRAINED
from PIL import Image

import model
from loaders import SequenceLoader, UserNameLoader


@pytest.mark.parametrize("name", build.LISTS)
def test_a_shipped_model_is_small_and_freed_of_what_continuing_needs(name):
    path = PRE_TRAINED / f"{name}.h5"
    assert path.stat().st_size < 8_000_000
    assert model.load_training_state(path) == []
    trained, metadata = model.load(path)
    assert metadata["data"]["sequences"] == (10_000 if "names" in name else 5_000)
    assert len(metadata["teachers"]) == build.TEACHERS
    assert trained.alphabet.sentinel == ("\n" if "names" in name else " ")


@pytest.mark.slow
def test_the_card_says_what_the_shipped_files_give():
    process = subprocess.run(
        [sys.executable, PRE_TRAINED / "build.py", "--check"], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr


def test_another_figure_in_the_card_is_noticed():
    card = build.CARD.read_text(encoding="utf-8")
    assert build.find_difference(card, card) is None
    for line in ("new, not in the list", "parameters", "at temperature 1:", "have a digit"):
        row = next(row for row in card.split("\n") if line in row)
        digit = re.findall(r"\d", row)[-1]
        before, _, after = row.rpartition(digit)
        nearly, other = (f"{before}{(int(digit) + step) % 10}{after}" for step in (1, 5))
        assert line in build.find_difference(card.replace(row, other), card)
        if re.search(r"\.\d%[ |]*$", row) and digit != "9":
            assert build.find_difference(card.replace(row, nearly), card) is None


def test_what_is_original_is_counted():
    shares = build.count_invented(["", "ab", "ab", "cd", "ef"], ["cd", "gh"], ["ef", "cd"])
    assert shares == {"new": 0.6, "different": 0.8, "empty": 0.2, "known": 0.5}


def trigrams(texts):
    return [
        padded[i : i + 3] for text in texts for padded in [f" {text} "] for i in range(len(text))
    ]


def test_invented_words_look_like_english():
    import wordfreq

    english = set(trigrams(wordfreq.top_n_list("en", 10_000)))
    trained, _ = model.load(PRE_TRAINED / "english_words_5000.h5")
    words = list(trained.sample(count=2000, seed=0))
    learned = set(SequenceLoader(PRE_TRAINED / "english_words_5000.txt"))
    invented = [word for word in words if word not in learned]
    assert len(set(invented)) > 1000
    found = trigrams(invented)
    assert sum(trigram in english for trigram in found) / len(found) > 0.93
    shuffled = ["".join(np.random.default_rng(0).permutation(list(word))) for word in invented]
    found = trigrams(shuffled)
    assert sum(trigram in english for trigram in found) / len(found) < 0.75


def test_invented_names_are_written_as_people_write_them():
    people = list(UserNameLoader(PRE_TRAINED / "user_names_10000.csv"))
    trained, _ = model.load(PRE_TRAINED / "user_names_10000.h5")
    invented = list(trained.sample(count=3000, seed=0))
    assert len(set(invented) - set(people)) > 2500
    kinds = str.islower, str.isupper, str.isalpha, str.istitle, str.isdigit
    for kind in (*kinds, *(re.compile(found).search for found in ("-", "[0-9]$", "[a-z][A-Z]"))):
        shares = [np.mean([bool(kind(name)) for name in names]) for names in (people, invented)]
        assert shares[0] == pytest.approx(shares[1], abs=0.04)
    lengths = [np.mean([len(name) for name in names]) for names in (people, invented)]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.1)


def test_the_picture_of_the_card_is_drawn_from_the_words_model(tmp_path):
    build.draw_next_characters("next_character.png", tmp_path / "next_character.png")
    drawn, shipped = (
        np.asarray(Image.open(folder / "next_character.png").convert("L"), float)
        for folder in (tmp_path, PRE_TRAINED)
    )
    assert drawn.shape == shipped.shape
    assert np.abs(drawn - shipped).mean() < 1
    assert (PRE_TRAINED / "next_character.png").stat().st_size < 100_000


def test_a_picture_shows_what_the_program_showed(tmp_path, monkeypatch):
    lines = build.record("Sta")
    assert lines[0] == "$ python sample.py --weights_path 'pre_trained_models/user_names_10000.h5'"
    assert lines[2] == "> Sta"
    names = " ".join(lines[3:-1]).split()
    assert len(names) == 100
    assert all(name.startswith("Sta") for name in names)
    build.make_picture("sampled3.png", tmp_path / "sampled3.png")
    for path in (tmp_path / "sampled3.png", *ROOT.glob("sampled?.png")):
        assert path.stat().st_size < 100_000
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert 1200 < image.width < 2000
            dark, light = image.convert("L").getextrema()
            assert dark < 64 < 250 < light
