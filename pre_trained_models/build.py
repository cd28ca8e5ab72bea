"""Makes what this folder holds, and the README's pictures, again.

    python pre_trained_models/build.py [NAME ...]

NAME is a model (english_words_5000.h5, user_names_10000.h5), a picture
(sampled1.png, sampled2.png, sampled3.png) or the list english_words_5000.txt;
without one everything is made. The pictures need matplotlib, for its font.
"""

import argparse
import contextlib
import fcntl
import os
import pathlib
import pty
import select
import shlex
import struct
import subprocess
import sys
import tempfile
import termios

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent

# The command line of train.py behind each model.
RECIPES = {
    "english_words_5000.h5": (
        "--loader_class VocabularyLoader --sequence_path pre_trained_models/english_words_5000.txt "
        "--num_sequences 5000 --sentinel ' ' --units 192 --layers 2 --dropout 0.4 "
        "--batch_size 32 --learning_rate 0.01 --epochs 12 --validation_split 0"
    ),
    "user_names_10000.h5": (
        "--loader_class UserNameLoader --sequence_path pre_trained_models/user_names_10000.csv "
        "--num_sequences 10000 --units 192 --layers 2 --dropout 0.4 "
        "--batch_size 32 --learning_rate 0.01 --epochs 8 --validation_split 0"
    ),
}
# What is typed at the prompt in each picture.
PICTURES = {"sampled1.png": "A", "sampled2.png": "Al", "sampled3.png": "Sta"}
SAMPLE = "sample.py --weights_path 'pre_trained_models/user_names_10000.h5'"
COLUMNS = 96


def make_list(name, target):
    """Writes the 5,000 most frequent English words by wordfreq, one a line."""
    import wordfreq

    words = wordfreq.top_n_list("en", 5000)
    target.write_text("".join(word + "\n" for word in words), encoding="utf-8")


def make_model(name, target):
    """Trains a model and keeps of its file what others need: not what continuing would."""
    import h5py

    with tempfile.TemporaryDirectory() as folder:
        trained = os.path.join(folder, name)
        command = ["train.py", *shlex.split(RECIPES[name]), "--save_path", trained]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
        with h5py.File(trained, "r") as source, h5py.File(target, "w", libver="latest") as copy:
            for attribute, value in source.attrs.items():
                copy.attrs[attribute] = value
            source.copy("model_weights", copy)


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


def main():
    """Runs the command line."""
    makers = {"english_words_5000.txt": (HERE, make_list)}
    makers |= dict.fromkeys(RECIPES, (HERE, make_model))
    makers |= dict.fromkeys(PICTURES, (ROOT, make_picture))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", default=list(makers))
    names = parser.parse_args().names
    for name in names:
        if name not in makers:
            parser.error(f"{name} is not among {', '.join(makers)}")
    for name in names:
        folder, make = makers[name]
        temporary = folder / f"{name}.tmp"
        make(name, temporary)
        os.replace(temporary, folder / name)


if __name__ == "__main__":
    main()
