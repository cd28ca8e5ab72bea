"""What is shipped: the models, their card and their pictures."""

import io
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
    assert build.remove_checkpoint(path) == path.read_bytes()  # as the next run would ship it


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


@pytest.mark.parametrize("stem", LISTS)
def test_what_is_invented_looks_like_what_was_learned_but_is_new(stem):
    def find_trigrams(texts):
        return [f" {text} "[i : i + 3] for text in texts for i in range(len(text))]

    learned = build.read_list(stem)
    trained, _ = model.load(HERE / f"{stem}.h5")
    invented = set(trained.sample(count=2000, seed=0)) - set(learned)
    assert len(invented) > 1000
    lengths = (np.mean([*map(len, texts)]) for texts in (invented, learned))
    assert next(lengths) == pytest.approx(next(lengths), rel=0.1)
    rng, known = np.random.default_rng(0), set(find_trigrams(learned))
    shuffled = ["".join(rng.permutation([*text])) for text in sorted(invented)]
    shares = [np.mean([each in known for each in find_trigrams(t)]) for t in (invented, shuffled)]
    assert shares[0] > 0.87 > 0.72 > shares[1], shares


def test_the_picture_of_the_card_is_drawn_from_the_words_model():
    pictures = io.BytesIO(build.draw_next_characters()), HERE / "next_character.png"
    drawn, shipped = (np.asarray(Image.open(file).convert("L"), float) for file in pictures)
    assert drawn.shape == shipped.shape
    assert np.abs(drawn - shipped).mean() < 1


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
