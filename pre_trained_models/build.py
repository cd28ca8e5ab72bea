"""Makes what this folder holds, and the README's pictures, again.

    python pre_trained_models/build.py [NAME ...]
    python pre_trained_models/build.py --check

A NAME is

- english_words_5000.txt, the list (that of the user names is taken as given),
- english_words_5000.h5 or user_names_10000.h5, a model,
- sampled1.png, sampled2.png or sampled3.png, a picture for the README,
- next_character.png, the one for the model card,
- held_out, which trains both models on nine tenths of their lists and writes
  their losses on the last tenth into the card, or
- card, which writes the recipe and the figures of the shipped files into it.

Without one everything is made: half an hour on two cores. If it is stopped, the
same command continues; what it has so far is in .build here, to be deleted if
the recipe has changed since. The pictures need matplotlib. --check makes
nothing, but fails if the list of words, or what the card says of the recipe and
of the shipped files, is not what would be made.
"""

import argparse
import concurrent.futures
import contextlib
import fcntl
import itertools
import os
import pathlib
import pty
import re
import select
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import termios

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import model  # noqa: E402 - found by the line above
from loaders import SequenceLoader, UserNameLoader  # noqa: E402

WORDS, NAMES = "english_words_5000", "user_names_10000"
CARD = HERE / "README.md"
# Trained models wait here until all is made of them that has to be.
WORKSHOP = HERE / ".build"
# What each model learned from, and the flags of train.py: for reading it, for the teachers, of
# which each has another --seed, and for the model that learns from them.
LISTS = {WORDS: f"{WORDS}.txt", NAMES: f"{NAMES}.csv"}
DATA = {
    WORDS: "--loader_class VocabularyLoader --num_sequences 5000 --sentinel ' '",
    NAMES: "--loader_class UserNameLoader --num_sequences 10000",
}
TEACHERS = 6
TEACHER = {
    WORDS: "--units 320 --layers 2 --dropout 0.3 --recurrent_dropout 0.3 --batch_size 16 "
    "--learning_rate 0.01 --epochs 16 --validation_split 0",
    NAMES: "--units 256 --layers 2 --dropout 0.3 --recurrent_dropout 0.2 --batch_size 16 "
    "--learning_rate 0.01 --epochs 10 --validation_split 0",
}
STUDENT = {
    WORDS: "--dropout 0 --batch_size 32 --learning_rate 0.004 --epochs 48 --validation_split 0",
    NAMES: "--dropout 0 --batch_size 32 --learning_rate 0.004 --epochs 24 --validation_split 0",
}
# What is typed at the prompt in each picture.
PICTURES = {"sampled1.png": "A", "sampled2.png": "Al", "sampled3.png": "Sta"}
ALONG = ("question", "thinking", "although")
SAMPLE = "sample.py --weights_path 'pre_trained_models/user_names_10000.h5'"
COLUMNS = 96
INVENT = "--num_samples 10000 --seed 0"
# What tests/benchmarks/invention.py prints of makemore's transformer.
PEER = {
    WORDS: {"new": 0.8248, "different": 0.8575, "empty": 0.0008, "known": 0.2309},
    NAMES: {"new": 0.9999, "different": 0.9998, "empty": 0.0001},
}
TEMPERATURES = (0.5, 1, 1.5)


def make_list(name, target):
    """Writes the 5,000 most frequent English words by wordfreq, one a line.

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
    learned, held_out = sorted(order[:-500]), sorted(order[-500:])
    lines = [words[index] + "\n" for index in learned + held_out]
    target.write_text("".join(lines), encoding="utf-8")


def make_model(name, target):
    """Trains a model and keeps of its file what others need: not what continuing would."""
    import h5py

    stem = name.removesuffix(".h5")
    trained = train(stem, HERE / LISTS[stem], WORKSHOP / name)
    with h5py.File(trained, "r") as source, h5py.File(target, "w", libver="latest") as copy:
        for attribute, value in source.attrs.items():
            copy.attrs[attribute] = value
        source.copy("model_weights", copy)


def commands(stem, path, folder, seed):
    """Returns what trains a model, in two steps.

    Args:
        stem: str, `WORDS` or `NAMES`.
        path: str, its list.
        folder: str, where the models are kept, with a slash at its end.
        seed: what the first command's `--seed` is.

    Returns:
        Tuple of two command lines, both str: that of a teacher, and that of
        the model that learns from all teachers.
    """
    reading = f"python train.py --sequence_path {path} {DATA[stem]}"
    teacher = f"{folder}{stem}_teacher"
    return (
        f"{reading} {TEACHER[stem]} --seed {seed} --save_path {teacher}_{seed}.h5",
        f"{reading} {STUDENT[stem]} --init_from {teacher}_1.h5 --teachers {teacher}_?.h5 "
        f"--save_path {folder}{stem}.h5",
    )


def train(stem, path, folder):
    """Runs `commands`.

    Args:
        stem: str, `WORDS` or `NAMES`.
        path: `pathlib.Path`, its list.
        folder: `pathlib.Path`, where the models are kept; it is made.

    Returns:
        `pathlib.Path`, the trained model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    places = str(path.relative_to(ROOT)), f"{folder.relative_to(ROOT)}/"
    # As many teachers at a time as there are cores are faster than one on all of them.
    one = dict.fromkeys(("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"), "1")

    def teach(seed):
        command, _ = commands(stem, *places, seed)
        run(command, env={**os.environ, **one}, stdout=subprocess.DEVNULL)
        print(f"{stem}: teacher {seed} of {TEACHERS} is trained", flush=True)

    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(teach, range(1, TEACHERS + 1)))
    _, command = commands(stem, *places, None)
    run(command)
    return folder / f"{stem}.h5"


def run(command, **options):
    """Runs a command line of the project.

    Args:
        command: str that starts with `python`.
        options: for `subprocess.run`.

    Returns:
        The `subprocess.CompletedProcess`.
    """
    python = shlex.quote(sys.executable)
    command = python + command.removeprefix("python")
    return subprocess.run(command, shell=True, cwd=ROOT, check=True, encoding="utf-8", **options)


def read_list(stem):
    """Returns the sequences that a model is trained on, a list of str, in their file's order."""
    path = HERE / LISTS[stem]
    return list((UserNameLoader if path.suffix == ".csv" else SequenceLoader)(path))


def score(weights_path, path):
    """Returns what `sample.py --score` says, a float: nats per character of a list's sequences."""
    command = f"python sample.py --weights_path {weights_path} --score {path} --max_len 64 2>&1"
    said = run(command, stdout=subprocess.PIPE).stdout
    return float(re.search(r"([\d.]+) nats per character", said).group(1))


def invent(stem, flags):
    """Returns what `sample.py` prints when it is asked with these flags, a list of str."""
    command = f"python sample.py --weights_path pre_trained_models/{stem}.h5 --prompt '' {flags}"
    return run(command, stdout=subprocess.PIPE).stdout.split("\n")[:-1]


def measure_held_out(stem):
    """Trains a model on nine tenths of its list.

    Returns:
        Float, its loss on the last tenth in nats per character.
    """
    folder = WORKSHOP / "held_out" / stem
    folder.mkdir(parents=True, exist_ok=True)
    path = HERE / LISTS[stem]
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    header = lines[:1] if path.suffix == ".csv" else []
    most = len(header) + (len(lines) - len(header)) * 9 // 10
    learned, rest = folder / f"learned{path.suffix}", folder / f"held_out{path.suffix}"
    learned.write_text("".join(lines[:most]), encoding="utf-8")
    rest.write_text("".join(header + lines[most:]), encoding="utf-8")
    return score(train(stem, learned, folder).relative_to(ROOT), rest.relative_to(ROOT))


def count_invented(texts, learned, known=None):
    """Counts what is original in invented sequences.

    Args:
        texts: list of str.
        learned: collection of str, those that were learned from.
        known: collection of str or None, others that exist.

    Returns:
        Dict of the shares, floats, of those that are new, that is not empty
        and not among the learned; that are different; that are empty; and,
        unless `known` is None, those of the different new ones that are known.
    """
    learned = set(learned)
    new = [text for text in texts if text and text not in learned]
    shares = {
        "new": len(new) / len(texts),
        "different": len(set(texts)) / len(texts),
        "empty": texts.count("") / len(texts),
    }
    if known is not None:
        shares["known"] = len(set(new).intersection(known)) / len(set(new))
    return shares


def read_known_words():
    """Returns the 300,000 most frequent English words by wordfreq, a list of str."""
    import wordfreq

    return wordfreq.top_n_list("en", 300_000)


def describe_shipped():
    """Returns the part of the card that the recipe and the shipped files decide, a str."""
    rows = []
    columns = [
        [
            "",
            "learned from",
            "sequences",
            "alphabet, without the sentinel",
            "network",
            "parameters",
            "loss on what it learned, nats per character",
            "of 10,000 invented: new, not in the list",
            "different",
            "empty",
            "different new ones that are among wordfreq's 300,000 words",
        ]
    ]
    for stem in (WORDS, NAMES):
        path = f"pre_trained_models/{LISTS[stem]}"
        known = read_known_words() if stem == WORDS else None
        learned, invented = read_list(stem), invent(stem, INVENT)
        shares = count_invented(invented, learned, known)
        if stem == NAMES:
            habits = describe_habits(learned, invented)
        trained, metadata = model.load(HERE / f"{stem}.h5")
        columns.append(
            [
                f"{stem}.h5",
                LISTS[stem],
                f"{metadata['data']['sequences']:,}",
                f"{len(trained.alphabet) - 1} characters",
                f"{metadata['layers']} × LSTM {metadata['units']}",
                f"{sum(array.size for array in trained.weights):,}",
                f"{score(f'pre_trained_models/{stem}.h5', path):.3f}",
                *(f"{share:.1%}" for share in shares.values()),
            ]
        )
        columns.append(["makemore", *[""] * 6, *(f"{share:.1%}" for share in PEER[stem].values())])
        teacher, student = commands(stem, path, "", "$seed")
        seeds = " ".join(map(str, range(1, TEACHERS + 1)))
        rows += ["", f"`{stem}.h5`, made by", ""]
        rows += [f"    for seed in {seeds}; do {teacher}; done", f"    {student}"]
        rows += ["", "invents", ""]
        for temperature in TEMPERATURES:
            texts = invent(stem, f"--num_samples 12 --seed 1 --temperature {temperature}")
            quoted = ", ".join(f"`{text}`" for text in texts)
            rows.append(f"- at temperature {temperature}: {quoted}")
    table = [f"| {' | '.join(row)} |" for row in itertools.zip_longest(*columns, fillvalue="")]
    table.insert(1, "|---" * len(columns) + "|")
    return "\n".join([*table, "", habits, *rows])


def describe_habits(learned, invented):
    """Returns how people and the model write user names, a str, from two lists of them."""
    groups = {"in the list": learned, "invented": invented}
    kinds = {"a capital letter": "[A-Z]", "a digit": "[0-9]", "a hyphen": "-"}
    rows = ["| of the user names | " + " | ".join(groups) + " |", "|---|---|---|"]
    for kind, pattern in kinds.items():
        counts = [
            sum(bool(re.search(pattern, text)) for text in texts) for texts in groups.values()
        ]
        shares = [f"{n / len(texts):.1%}" for n, texts in zip(counts, groups.values())]
        rows.append(f"| have {kind} | {' | '.join(shares)} |")
    return "\n".join(rows)


def describe_held_out():
    """Trains on nine tenths of each list and returns the part of the card about it, a str."""
    losses = [measure_held_out(stem) for stem in (WORDS, NAMES)]
    return f"English words {losses[0]:.3f}, user names {losses[1]:.3f} nats per character"


def rewrite_card(card, part, text):
    """Replaces what stands between two marks.

    Args:
        card: str.
        part: str, which is in the marks.
        text: str, what is to stand between them.

    Returns:
        Str.
    """
    begin, end = f"<!-- {part} -->\n", f"\n<!-- end of {part} -->"
    head, rest = card.split(begin)
    return head + begin + text + end + rest.split(end)[1]


def make_card(name, target):
    """Writes a card of which one of the `CARD_PARTS` is made again."""
    card = CARD.read_text(encoding="utf-8")
    target.write_text(rewrite_card(card, name, CARD_PARTS[name]()), encoding="utf-8")


CARD_PARTS = {"card": describe_shipped, "held_out": describe_held_out}


def check():
    """Returns what is wrong with the shipped files, a str, or None."""
    with tempfile.TemporaryDirectory() as folder:
        words = pathlib.Path(folder) / "words.txt"
        make_list(words.name, words)
        if words.read_bytes() != (HERE / LISTS[WORDS]).read_bytes():
            return f"{LISTS[WORDS]} is not the list that wordfreq gives"
    card = CARD.read_text(encoding="utf-8")
    return find_difference(card, rewrite_card(card, "card", describe_shipped()))


def find_difference(said, found):
    """Compares two cards but for the rounding of their decimal fractions.

    Sums are rounded differently on other machines, which changes few invented
    sequences in 100,000.

    Args:
        said, found: str, the card as it is and as it would be made.

    Returns:
        Str that shows the first lines that differ, or None.
    """
    for line, other in itertools.zip_longest(said.split("\n"), found.split("\n"), fillvalue=""):
        parts, others = (re.split(r"(\d+\.\d+)", text) for text in (line, other))
        same = parts[::2] == others[::2] and all(
            abs(float(number) - float(again)) < 1.5 * 10.0 ** -len(number.split(".")[1])
            for number, again in zip(parts[1::2], others[1::2])
        )
        if not same:
            return f"the card says\n  {line}\nbut the files give\n  {other}"
    return None


def record(prompt):
    """Runs sample.py on a terminal, types a prompt, and leaves.

    Args:
        prompt: str, what is typed.

    Returns:
        List of str, the lines that the terminal shows.
    """
    with on_terminal([sys.executable, *shlex.split(SAMPLE)], cwd=ROOT) as (terminal, _):
        shown = read_until(terminal, "> ")
        os.write(terminal, prompt.encode() + b"\n")
        shown += read_until(terminal, "\r\n> ")
        os.write(terminal, b"\x04")
        read_until(terminal, None)
    return [f"$ python {SAMPLE}", *shown.replace("\r", "").split("\n")]


@contextlib.contextmanager
def on_terminal(command, columns=COLUMNS, **options):
    """Starts a program on a terminal of its own.

    Args:
        command: list of str.
        columns: int, the width of the terminal.
        **options: for `subprocess.Popen`.

    Yields:
        Tuple of the file descriptor that is the user's side of the terminal,
        and the `subprocess.Popen`. The program is waited for at the end.
    """
    terminal, program = pty.openpty()
    fcntl.ioctl(program, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {**os.environ, "TERM": "dumb"}
    for name in ("COLUMNS", "LINES"):  # they would overrule the terminal's own size
        environment.pop(name, None)
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=program,
        stdout=program,
        stderr=program,
        # The new session takes the terminal as its own, so that Ctrl-C reaches it.
        preexec_fn=lambda: (os.setsid(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
        **options,
    )
    os.close(program)
    try:
        yield terminal, process
    finally:
        os.close(terminal)
        process.wait()


def read_until(terminal, ending, seconds=60):
    """Reads what a terminal shows.

    Args:
        terminal: int, the file descriptor that `on_terminal` yields.
        ending: str to stop after, or None to stop when the program is gone.
        seconds: how long to wait for more to show.

    Returns:
        Str, all that was shown.

    Raises:
        TimeoutError: if nothing more shows and it has not ended so.
    """
    shown = b""
    while ending is None or ending.encode() not in shown:
        if not select.select([terminal], [], [], seconds)[0]:
            raise TimeoutError(f"the terminal shows {shown!r} and no {ending!r}")
        try:
            read = os.read(terminal, 65536)
        except OSError:  # what Linux answers once the program is gone
            break
        if not read:
            break
        shown += read
    return shown.decode()


def make_picture(name, target):
    """Draws the terminal after a prompt was answered."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    lines = record(PICTURES[name])
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSansMono.ttf", 24)
    width, height, margin = font.getlength("M"), 32, 24
    size = round(width * COLUMNS) + 2 * margin, height * len(lines) + 2 * margin
    image = Image.new("L", size, 255)
    draw = ImageDraw.Draw(image)
    for row, line in enumerate(lines):
        draw.text((margin, margin + row * height), line, fill=32, font=font)
    image.quantize(16).save(target, format="PNG", optimize=True)


def draw_next_characters(name, target):
    """Draws what the words model expects after each letter of some words."""
    from matplotlib import pyplot

    trained, _ = model.load(HERE / f"{WORDS}.h5")
    shown = 6
    figure, axes = pyplot.subplots(1, len(ALONG), figsize=(12, 3.2), layout="constrained")
    for axis, word in zip(axes, ALONG):
        read = [trained.read(word[:end])[0][0] for end in range(len(word) + 1)]
        probabilities = list(map(model.distribution, read))
        best = [row.argsort()[::-1][:shown] for row in probabilities]
        shades = [row[ids] for row, ids in zip(probabilities, best)]
        axis.imshow(list(zip(*shades)), cmap="Greys", vmin=0, vmax=1)
        for step, ids in enumerate(best):
            for place, index in enumerate(ids):
                symbol = trained.alphabet.symbols[index] if index else "end"
                color = "white" if shades[step][place] > 0.5 else "black"
                came = symbol == [*word, "end"][step]
                weight, size = ("bold", 13) if came else ("normal", 11)
                style = {"ha": "center", "va": "center", "weight": weight}
                size = 8 if symbol == "end" else size
                axis.text(step, place, symbol, color=color, size=size, **style)
        axis.set_xticks(range(len(word) + 1), ["start", *word])
        axis.set_yticks(range(shown), range(1, shown + 1))
        axis.xaxis.tick_top()
        axis.tick_params(length=0)
    figure.savefig(target, format="png", dpi=130)
    pyplot.close(figure)


def main():
    """Runs the command line."""
    makers = {LISTS[WORDS]: (HERE, make_list)}
    makers |= {f"{stem}.h5": (HERE, make_model) for stem in (WORDS, NAMES)}
    makers |= dict.fromkeys(PICTURES, (ROOT, make_picture))
    makers["next_character.png"] = (HERE, draw_next_characters)
    makers |= dict.fromkeys(CARD_PARTS, (HERE, make_card))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", default=list(makers))
    parser.add_argument("--check", action="store_true", help="make nothing, but check the card")
    args = parser.parse_args()
    for name in args.names:
        if name not in makers:
            parser.error(f"{name} is not among {', '.join(makers)}")
    if args.check and args.names != list(makers):
        parser.error("--check takes no NAME")
    if args.check:
        wrong = check()
        if wrong:
            sys.exit(f"build.py: {wrong}")
        print("The card says what the files give.")
        return
    for name in args.names:
        folder, make = makers[name]
        with tempfile.TemporaryDirectory() as made:
            target = pathlib.Path(made) / name
            make(name, target)
            place = CARD if name in CARD_PARTS else folder / name
            with model.replacing(place) as file:
                file.write(target.read_bytes())
        shutil.rmtree(WORKSHOP / name, ignore_errors=True)
        print(f"Made {name}")


if __name__ == "__main__":
    main()
