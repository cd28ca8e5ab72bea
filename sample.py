"""Invents sequences with a model that train.py saved."""

import contextlib
import math
import os
import pathlib
import shutil
import sys
import unicodedata

import numpy as np

import model
from model import CommandLine, within

ENGLISH_WORDS = pathlib.Path(__file__).parent / "pre_trained_models" / "english_words_5000.h5"

EXAMPLE = """examples:
  python sample.py --weights_path names.h5
  python sample.py --weights_path names.h5 --prompt Al --num_samples 10
  cut -c1-2 some_names.txt | python sample.py --weights_path names.h5 > invented.txt

On a terminal it asks for the first characters again and again; Ctrl-D leaves.
From a pipe, each line is a prompt. Results go to stdout, everything else to stderr.
"""


def parse_arguments(arguments=None):
    """Returns the parser and what it makes of a list of str, or None for the process's."""
    parser = CommandLine(
        prog="sample.py",
        description=__doc__,
        epilog=EXAMPLE,
    )
    parser.add_argument(
        "--weights_path",
        default=str(ENGLISH_WORDS),
        help="a file that train.py saved (default: the English words that come with it)",
    )
    parser.add_argument(
        "--prompt",
        help="answer these first characters, which may be none, and exit; "
        "write --prompt=-a if they start with a dash",
    )
    parser.add_argument(
        "--num_samples",
        type=within(int, 1, 2**62),
        default=100,
        help="sequences for each prompt",
    )
    parser.add_argument(
        "--temperature",
        type=within(float, 0, 1000),
        default=1.0,
        help="below 1 likely characters become likelier, above 1 less so; 0 always takes the "
        "likeliest",
    )
    parser.add_argument(
        "--max_len",
        type=within(int, 1, model.LIMIT),
        help="longest sequence (default: that of the training)",
    )
    parser.add_argument(
        "--seed",
        type=within(int, 0, 2**64 - 1),
        help="the same seed invents the same sequences (default: others each time)",
    )
    return parser, parser.parse_args(arguments)


def show(sequences):
    """Writes sequences to stdout: on a terminal in columns, else one a line.

    On a terminal what would steer it is escaped; elsewhere every character
    is written as it is.

    Args:
        sequences: iterable of str.
    """
    if not sys.stdout.isatty():
        for sequence in sequences:
            sys.stdout.write(sequence + "\n")
    else:
        for line in arrange(list(map(model.printable, sequences)), shutil.get_terminal_size()[0]):
            print(line)
    sys.stdout.flush()


def arrange(texts, width):
    """Arranges texts in as many columns as fit, to be read downwards.

    Args:
        texts: list of str, not empty.
        width: int, how many characters fit on a line of the terminal.

    Returns:
        List of str, the lines.
    """
    cells = [count_cells(text) for text in texts]
    for columns in range(max(1, min(len(texts), width // 3)), 0, -1):
        rows = math.ceil(len(texts) / columns)
        widths = [max(cells[start : start + rows]) for start in range(0, len(texts), rows)]
        if sum(widths) + 2 * (len(widths) - 1) <= width:
            break
    lines = []
    for row in range(rows):
        indices = range(row, len(texts), rows)
        padding = [widths[column] - cells[index] for column, index in enumerate(indices)]
        padding[-1] = 0
        lines.append("  ".join(texts[index] + " " * gap for index, gap in zip(indices, padding)))
    return lines


def count_cells(text):
    """Returns how many columns of a terminal a str takes: wide characters two, marks none."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    marks = sum(unicodedata.category(character) in ("Mn", "Me") for character in text)
    return len(text) + wide - marks


def converse(invent):
    """Asks for prompts on the terminal and answers them until the user leaves.

    Args:
        invent: function from a prompt, a str, to an iterable of str; its
            ValueError is shown to the user.
    """
    print(
        "Type the first characters and press Enter; Enter alone invents from nothing, "
        "Ctrl-D leaves.",
        file=sys.stderr,
    )
    while True:
        try:
            show(invent(ask("> ")))
        except ValueError as error:
            print(model.printable(f"Sorry, {error}."), file=sys.stderr)
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return


def ask(question):
    """Returns the line that the user types; raises EOFError at the end of the input."""
    if sys.stdout.isatty():
        return input(question)
    # input() would mix its question into the results.
    print(question, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def answer_lines(invent, lines):
    """Answers each line as a prompt.

    Args:
        invent: as in `converse`.
        lines: iterable of str.

    Returns:
        Int, the exit status: 2 if some lines could not be answered. They
        are named on stderr, and the others are answered all the same.
    """
    status = 0
    for number, line in enumerate(lines, start=1):
        try:
            show(invent(line.rstrip("\r\n")))
        except ValueError as error:
            print(f"sample.py: error: prompt {number}: {error}", file=sys.stderr)
            status = 2
    return status


def main(arguments=None):
    """Runs the command line.

    Returns:
        Int, the exit status.
    """
    parser, args = parse_arguments(arguments)
    # Bytes that are no characters become characters that no model knows.
    encoding = {} if sys.stdin.isatty() else {"encoding": "utf-8-sig"}
    sys.stdin.reconfigure(errors="surrogateescape", **encoding)
    if sys.stdout.isatty():
        sys.stdout.reconfigure(errors="backslashreplace")
    else:
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    try:
        trained, _ = model.load(args.weights_path)
    except OSError as error:
        parser.error(f"--weights_path: can't read {args.weights_path}: {error.strerror}")
    except ValueError as error:
        parser.error(f"--weights_path: {error}")
    rng = np.random.default_rng(args.seed)

    def invent(prompt):
        return trained.sample(prompt, args.num_samples, args.temperature, args.max_len, rng)

    try:
        if args.prompt is not None:
            try:
                show(invent(args.prompt))
            except ValueError as error:
                parser.error(f"--prompt: {error}")
        elif sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - input() edits lines once it is imported
            converse(invent)
        else:
            return answer_lines(invent, sys.stdin)
    except BrokenPipeError:
        # Nobody reads the rest, which the interpreter would flush at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.error(f"can't write the results: {error.strerror}")
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
