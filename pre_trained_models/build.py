"""Makes all that stands here, and the README's pictures, from wordfreq and the user names.

    python pre_trained_models/build.py [NAME ...]
    python pre_trained_models/build.py --check

A NAME is english_words_5000.txt, english_words_5000.h5, user_names_10000.h5, README.md
(the card, into which the figures of the two models are written), next_character.png,
sampled1.png, sampled2.png or sampled3.png. Without any, all are made, in that order,
the two models side by side, in about an hour on two cores; what was interrupted
continues. Two runs on one machine make the same files. tests/requirements.txt has what is
needed. --check makes nothing, but fails if the list, or what the card says of the models,
is not what would be made.
"""

import argparse
import concurrent.futures
import functools
import io
import itertools
import os
import pathlib
import re
import shlex
import subprocess
import sys

import h5py

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import model  # noqa: E402 - found by the line above
import sample  # noqa: E402
from loaders import find_loader  # noqa: E402

WORDS, NAMES = "english_words_5000", "user_names_10000"
LISTS = {WORDS: HERE / f"{WORDS}.txt", NAMES: HERE / f"{NAMES}.csv"}
CARD = HERE / "README.md"
MARKS = "<!-- figures -->\n", "<!-- end of figures -->"
# What tests/benchmarks/invention.py prints of makemore's transformer.
MAKEMORE = {WORDS: (0.8248, 0.8575, 0.2309), NAMES: (0.9999, 0.9998)}
HABITS = {"a capital letter": "[A-Z]", "a digit": "[0-9]", "a hyphen": "-"}
# What is typed at the prompt in each picture.
PICTURES = {"sampled1.png": "A", "sampled2.png": "Al", "sampled3.png": "Sta"}
SAMPLE = "sample.py --weights_path 'pre_trained_models/user_names_10000.h5' --seed 1"
COLUMNS = 96
ALONG = ("question", "thinking", "although")


def make_list():
    """Returns the 5,000 most frequent English words by wordfreq, one a line, as bytes.

    First the nine tenths that makemore learns from when it is given them, most
    frequent first, then the tenth that it holds out, so that figures compare.
    """
    import numpy as np
    import wordfreq

    words = wordfreq.top_n_list("en", 5000)
    # What torch.randperm gives after torch.manual_seed(3407).
    draws = np.random.RandomState(3407).randint(2**32, size=len(words) - 1, dtype=np.uint32)
    order = list(range(len(words)))
    for place, draw in enumerate(draws.tolist()):
        other = place + draw % (len(words) - place)
        order[place], order[other] = order[other], order[place]
    order = sorted(order[:-500]) + sorted(order[-500:])
    return "".join(words[index] + "\n" for index in order).encode()


# The models


def make_model(stem):
    """Returns a model's file, as bytes: runs the card's commands for it in `.build`.

    What they print is printed with the model's name, since two run side by side.
    """
    blocks = re.findall(r"(?:^    .*\n)+", CARD.read_text(encoding="utf-8"), re.M)
    (commands,) = (block for block in blocks if f"{stem}.h5" in block)
    folder = ROOT / ".build"
    folder.mkdir(exist_ok=True)
    for link in ("train.py", "sample.py", "pre_trained_models"):
        (folder / link).unlink(missing_ok=True)
        (folder / link).symlink_to(ROOT / link)
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    options = {"cwd": folder, "env": {**os.environ, "PATH": path}, "text": True}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(["bash", "-euc", commands], **options, **output) as shell:
        for line in shell.stdout:
            print(f"{stem}: {line}", end="")
    if shell.returncode:
        raise SystemExit(f"{stem}: a command of the card failed")
    return remove_checkpoint(folder / f"{stem}.h5")


def remove_checkpoint(path):
    """Returns a model's file, as bytes, without what only continuing to train it needs.

    Nor does it hold the time, which HDF5 notes in each group of its latest format: two runs
    make the same file.
    """
    with h5py.File(path) as file, h5py.File(made := io.BytesIO(), "w") as copy:

        def add(name, found):
            if not name.startswith((model.CHECKPOINT, "training_state")):  # its earlier name
                if isinstance(found, h5py.Dataset):
                    copy[name] = found[()]
                for key, value in found.attrs.items():
                    copy.require_group(name).attrs[key] = value

        add("/", file)
        file.visititems(add)
    return made.getvalue()


# The card


def make_card():
    """Returns the card with the figures of the shipped files between its marks, as bytes."""
    (begin, end), card = MARKS, CARD.read_text(encoding="utf-8")
    head, _, rest = card.partition(begin)
    return (head + begin + describe_shipped() + "\n" + end + rest.partition(end)[2]).encode()


def describe_shipped():
    """Returns what the card says of the shipped files, a str."""
    columns = "alphabet", "network", "parameters", "loss on its list", "new", "different", "known"
    table, lines, invented = [("", *columns)], [], {}
    for stem in LISTS:
        trained, metadata = model.load(HERE / f"{stem}.h5")
        learned, invented[stem] = read_list(stem), list(trained.sample(count=10_000, seed=0))
        shares = count_invented(stem, learned, invented[stem])
        _, nats, targets = zip(*sample.score(trained, learned))
        network = f"{metadata['layers']} × LSTM {metadata['units']}"
        parameters = f"{sum(array.size for array in trained.weights):,}"
        loss = f"{sum(nats) / sum(targets):.3f}"
        figures = len(trained.alphabet) - 1, network, parameters, loss
        table.append((f"{stem}.h5", *figures, *map("{:.1%}".format, shares)))
        table.append((f"makemore, {stem}", *[""] * 4, *map("{:.1%}".format, MAKEMORE[stem])))
        lines += ["", f"`{stem}.h5` invents", ""]
        for temperature in (0.5, 1, 1.5):
            texts = trained.sample(count=12, seed=1, temperature=temperature)
            lines.append(f"- at temperature {temperature}: " + ", ".join(f"`{t}`" for t in texts))
    habits = [("of the user names", "in the list", "invented")]
    for habit, pattern in HABITS.items():
        groups = read_list(NAMES), invented[NAMES]
        shares = (sum(map(bool, map(re.compile(pattern).search, g))) / len(g) for g in groups)
        habits.append((f"have {habit}", *map("{:.1%}".format, shares)))
    return "\n".join([*make_table(table), "", *make_table(habits), *lines])


def make_table(rows):
    """Returns the lines, str, of a Markdown table of tuples; the first is as long as any."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


def read_list(stem):
    """Returns the sequences that a model was trained on, a list of str, in their file's order."""
    return list(find_loader(LISTS[stem])(LISTS[stem]))


def count_invented(stem, learned, invented):
    """Returns which shares of invented sequences are new, different and, of words, known.

    New is what is neither empty nor in the list; known are those of the different new ones that
    are among wordfreq's 300,000 words.
    """
    import wordfreq

    learned, different = set(learned), set(invented)
    new = different - learned - {""}
    shares = sum(text in new for text in invented) / len(invented), len(different) / len(invented)
    if stem != WORDS:
        return shares
    return *shares, len(new.intersection(wordfreq.top_n_list("en", 300_000))) / len(new)


def find_difference(said, found):
    """Returns the first lines in which two str differ, a str, or None.

    Other machines round sums differently, and that may change the last digit of a fraction.
    """
    fraction = re.compile(r"(\d+)\.(\d+)")
    for lines in itertools.zip_longest(said.split("\n"), found.split("\n"), fillvalue=""):
        words, others = (fraction.sub("#", line) for line in lines)
        digits = ([int(a + b) for a, b in fraction.findall(line)] for line in lines)
        if words != others or any(abs(a - b) > 1 for a, b in zip(*digits)):
            return "the card says\n  {}\nbut the files give\n  {}".format(*lines)
    return None


# The pictures


def record(prompt):
    """Returns the lines, a list of str, that a terminal shows when sample.py answers a prompt."""
    import pexpect

    plain = {**os.environ, "TERM": "dumb", "COLUMNS": f"{COLUMNS}", "LINES": "50"}
    options = {"cwd": ROOT, "env": plain, "encoding": "utf-8"}
    terminal = pexpect.spawn(sys.executable, shlex.split(SAMPLE), **options)
    shown = f"$ python {SAMPLE}\n"
    for text in (f"{prompt}\n", "\x04"):
        terminal.expect_exact("\n> ")
        shown += terminal.before + "\n> "
        terminal.send(text)
    terminal.expect(pexpect.EOF)
    return shown.replace("\r", "").split("\n")


def make_picture(prompt):
    """Returns a PNG, as bytes, of the terminal after a prompt was answered."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    lines = record(prompt)
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSansMono.ttf", 24)
    image = Image.new("L", (round(COLUMNS * font.getlength("M")) + 48, 32 * len(lines) + 48), 255)
    for row, line in enumerate(lines):
        ImageDraw.Draw(image).text((24, 24 + 32 * row), line, fill=32, font=font)
    image.quantize(16).save(made := io.BytesIO(), "PNG", optimize=True)
    return made.getvalue()


def draw_next_characters():
    """Returns a PNG, as bytes, of what the words model expects after each letter of some words."""
    from matplotlib.figure import Figure

    trained, _ = model.load(HERE / f"{WORDS}.h5")
    shown = 6
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for axis, word in zip(figure.subplots(1, len(ALONG)), ALONG):
        read = (trained.read_prompt(word[:end])[0][0] for end in range(len(word) + 1))
        likely = [sorted(zip(model.distribution(row), itertools.count()))[::-1] for row in read]
        shades = zip(*([shade for shade, _ in row[:shown]] for row in likely))
        axis.imshow(list(shades), cmap="Greys", vmin=0, vmax=1)
        for step, (row, following) in enumerate(zip(likely, [*word, "end"])):
            for place, (shade, index) in enumerate(row[:shown]):
                symbol = trained.alphabet.symbols[index] if index else "end"
                style = {"color": "white" if shade > 0.5 else "black", "ha": "center"}
                style["weight"] = "bold" if symbol == following else "normal"
                style["size"] = 8 if symbol == "end" else 13 if symbol == following else 11
                axis.text(step, place, symbol, va="center", **style)
        axis.set_xticks(range(len(word) + 1), ["start", *word])
        axis.set_yticks(range(shown), range(1, shown + 1))
        axis.xaxis.tick_top()
        axis.tick_params(length=0)
    figure.savefig(made := io.BytesIO(), dpi=130)
    return made.getvalue()


# All of it


def main():
    """Runs the command line."""
    stages = [  # what is made side by side, after all that it needs
        {LISTS[WORDS]: make_list},
        {HERE / f"{stem}.h5": functools.partial(make_model, stem) for stem in LISTS},
        {CARD: make_card, HERE / "next_character.png": draw_next_characters},
        {ROOT / name: functools.partial(make_picture, text) for name, text in PICTURES.items()},
    ]
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--check", action="store_true", help="make nothing, but check the card")
    args = parser.parse_args()
    if unknown := {*args.names} - {path.name for stage in stages for path in stage}:
        parser.error(f"there is no {unknown.pop()}")
    if args.check:
        if make_list() != LISTS[WORDS].read_bytes():
            sys.exit(f"{LISTS[WORDS].name} is not the list that wordfreq gives")
        sys.exit(find_difference(CARD.read_text(encoding="utf-8"), make_card().decode()))
    for stage in stages:
        chosen = {path: stage[path] for path in stage if not args.names or path.name in args.names}
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(write, chosen, chosen.values()))


def write(path, make):
    """Writes the bytes that a function returns to a file."""
    made = make()
    with model.replacing(path) as file:
        file.write(made)
    print(f"Made {path.name}")


if __name__ == "__main__":
    main()
