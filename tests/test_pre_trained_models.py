"""What is shipped: the models, their card and their pictures."""

import io
import re
import subprocess
import sys

import build
import numpy as np
import pytest
from build import HERE, LISTS, NAMES, ROOT, WORDS
from PIL import Image

import model


@pytest.mark.parametrize("stem", LISTS)
def test_a_shipped_model_is_small_and_freed_of_what_continuing_needs(stem):
    path = HERE / f"{stem}.h5"
    assert path.stat().st_size < 8_000_000
    trained, _, checkpoint = model.load(path, checkpoint=True)
    assert checkpoint == []
    assert set("".join(build.read_list(stem))) == set(trained.alphabet.symbols[1:])
    assert trained.alphabet.sentinel == ("\n" if stem == NAMES else " ")


@pytest.mark.slow
def test_the_card_says_what_the_shipped_files_give():
    subprocess.run([sys.executable, HERE / "build.py", "--check"], check=True)


def test_another_figure_in_the_card_is_noticed():
    card = "new 72.2%, loss 1.501\n5,000 words, `arid`"
    for old, new in {"72.2": "72.5", "1.501": "1.51", "5,0": "5,1", "ar": "er", "\n5": ""}.items():
        assert "but the files give" in build.find_difference(card, card.replace(old, new))
    for same in (card, card.replace("72.2", "72.3"), card.replace("1.501", "1.500")):
        assert build.find_difference(card, same) is None


def test_what_is_original_is_counted():
    learned, invented = ["dog", "gh"], ["", "cat", "cat", "dog", "qzx"]
    assert build.count_invented(WORDS, learned, invented) == (0.6, 0.8, 0.5)
    assert build.count_invented(NAMES, learned, invented) == (0.6, 0.8)


def find_trigrams(texts):
    return [f" {text} "[i : i + 3] for text in texts for i in range(len(text))]


def test_invented_words_look_like_english():
    import wordfreq

    english = set(find_trigrams(wordfreq.top_n_list("en", 10_000)))
    trained, _ = model.load(HERE / f"{WORDS}.h5")
    learned = set(build.read_list(WORDS))
    invented = [word for word in trained.sample(count=2000, seed=0) if word not in learned]
    assert len(set(invented)) > 1000
    found = find_trigrams(invented)
    assert sum(trigram in english for trigram in found) / len(found) > 0.93
    found = find_trigrams("".join(np.random.default_rng(0).permutation([*w])) for w in invented)
    assert sum(trigram in english for trigram in found) / len(found) < 0.75


def test_invented_names_are_written_as_people_write_them():
    people = build.read_list(NAMES)
    trained, _ = model.load(HERE / f"{NAMES}.h5")
    invented = list(trained.sample(count=3000, seed=0))
    assert len(set(invented) - set(people)) > 2500
    for habit in ("^[^A-Z]*$", "^[^a-z]*$", "^[A-Za-z]*$", "^[0-9]*$", "-", "[0-9]$", "[a-z][A-Z]"):
        found = re.compile(habit).search
        shares = [sum(map(bool, map(found, n))) / len(n) for n in (people, invented)]
        assert shares[0] == pytest.approx(shares[1], abs=0.04)
    assert len("".join(invented)) / 3000 == pytest.approx(len("".join(people)) / 10_000, rel=0.1)


def test_the_picture_of_the_card_is_drawn_from_the_words_model():
    pictures = io.BytesIO(build.draw_next_characters()), HERE / "next_character.png"
    drawn, shipped = (np.asarray(Image.open(file).convert("L"), float) for file in pictures)
    assert drawn.shape == shipped.shape
    assert np.abs(drawn - shipped).mean() < 1


def test_two_runs_would_ship_the_same_bytes():
    for stem in build.LISTS:
        path = HERE / f"{stem}.h5"
        assert build.remove_checkpoint(path) == path.read_bytes()


def test_a_picture_shows_what_the_program_showed():
    lines = build.record("Sta")
    assert lines[0] == f"$ python {build.SAMPLE}"
    assert lines == build.record("Sta")
    assert lines[3] == "> Sta"
    assert len(names := " ".join(lines[4:-1]).split()) == 100
    assert all(name.startswith("Sta") for name in names)
    pictures = io.BytesIO(build.make_picture("Sta")), *ROOT.glob("sampled?.png")
    assert all(path.stat().st_size < 100_000 for path in [*ROOT.glob("*.png"), *HERE.glob("*.png")])
    for image in map(Image.open, pictures):
        assert 1200 < image.width < 2000
        assert image.convert("L").getextrema()[0] < 64
