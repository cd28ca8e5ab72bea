"""Points both scripts at files that claim to be text or CSV, each broken otherwise.

    python tests/fuzz/texts.py --count 3000

Each input is read by all loaders of `train.py` and by `--exclude` and `--score` of `sample.py`.
The only outcomes allowed are that it is read, and one line with exit status 2; and where that line
says that a line of the file is not UTF-8 text, it is not.
"""

import argparse
import collections
import pathlib
import re
import sys
import tempfile
import time

import models
import numpy as np
import wordfreq

# What files are put together from, beside letters.
PIECES = [b"\n", b"\r\n", b"\r", b"\n\n\n", b",", b'"', b'""', b'"\n', b",\n", b" ", b"\t", b"\\"]
PIECES += [
    "é",
    "日本",
    "\u0301",
    "\u202e",
    "\u2028",
    "\x85",
    "\ufeff",
    "\x1b[2J",
    "\x9b",
    "👍\ufe0f",
]
PIECES += [b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xef\xbb\xbf", b"\xfe"]
PIECES += ["abc\n".encode("utf-16"), b"a" * 5000, b"ab\n" * 5000, b"\n" * 20_000, b'"' * 3001]
PIECES = [piece.encode() if isinstance(piece, str) else piece for piece in PIECES]
# So large a network tells that the data were read, and goes no further.
READ = ["--units=65536", "--batch_size=1"]
MESSAGES = ("would take at least", "contains the sentinel")


def make_text(rng):
    """Returns the bytes of a file."""
    if rng.random() < 0.1:
        return rng.bytes(int(rng.integers(2000)))
    count = int(rng.geometric(0.02))
    letters = [bytes([letter]) for letter in b"abcdefgh"]
    risky = rng.choice([0.0, 0.05, 0.5])
    parts = []
    for _ in range(count):
        parts.append(models.pick(rng, PIECES[:12] if rng.random() < 0.3 else letters))
        if rng.random() < risky:
            parts.append(models.pick(rng, PIECES))
    if rng.random() < 0.01:
        parts.insert(int(rng.integers(len(parts))), b"a" * (2**20 + int(rng.integers(3))))
    return b"".join(parts)


def is_text(line):
    """Tells whether the bytes of a line are text."""
    try:
        return "\0" not in line.decode()
    except UnicodeDecodeError:
        return False


def ways(path, folder):
    """Yields the commands, lists of str, that read a file."""
    for loader in ("SequenceLoader", "VocabularyLoader", "UserNameLoader"):
        flags = [f"--loader_class={loader}", f"--save_path={folder / 'new.h5'}", *READ]
        yield ["train.py", f"--sequence_path={path}", *flags]
    weights = f"--weights_path={folder / 'model.h5'}"
    yield ["sample.py", weights, f"--exclude={path}", "--prompt=", "--num_samples=2"]
    yield ["sample.py", weights, f"--score={path}"]


def judge(arguments, content, status, err):
    """Returns the verdict, a str, on what a run of a script did."""
    script = arguments[0]
    if status is None or status < 0:
        return f"WRONG: too long, or died: {status}"
    if "Traceback" in err:
        return "WRONG: a traceback"
    if status == 2:
        if not re.fullmatch(rf"{script}: error: .*\n", err) or not err[:-1].isprintable():
            return "WRONG: an error that is not one line"
        line = re.search(r", line (\d+): (not UTF-8|it holds a NUL)", err)
        if line and is_text(content.split(b"\n")[int(line[1]) - 1]):
            return "WRONG: that line is text"
        return "works" if any(message in err for message in MESSAGES) else "refused"
    if status or script == "train.py":
        return f"WRONG: status {status}"
    notes = r"(sample\.py: [^\n]*\n)*"
    return "works" if re.fullmatch(notes, err) else "WRONG: noise"


def fuzz(count, seed, keep=None):
    """Reads so many inputs.

    Returns:
        Tuple `(outcomes, seconds, memory)`: a `Counter` of verdicts, and the
        worst that a run took, in seconds and in bytes beyond a good file's.
    """
    rng = np.random.default_rng(seed)
    outcomes, slowest, largest = collections.Counter(), 0.0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "model.h5").write_bytes(models.make_bases(folder)[0])
        (folder / "good.txt").write_bytes(b"abc\n" * 1000)
        wordfreq.word_frequency("a", "en")  # which takes a second at the first time
        good = [models.run(way, False)[-1] for way in ways(folder / "good.txt", folder)]
        for number in range(count):
            content = make_text(rng)
            path = folder / f"input.{models.pick(rng, ['txt', 'csv'])}"
            path.write_bytes(content)
            for arguments in ways(path, folder):
                status, _, err, _, seconds, memory = models.run(arguments, False)
                verdict = judge(arguments, content, status, err)
                memory -= max(good) + len(content)
                if memory > models.MEMORY:
                    verdict = "WRONG: memory"
                outcomes[verdict] += 1
                slowest, largest = max(slowest, seconds), max(largest, memory)
                if verdict.startswith("WRONG"):
                    print(number, verdict, arguments, err[-300:], flush=True)
                    if keep:
                        keep.mkdir(exist_ok=True)
                        (keep / f"{seed}_{number}{path.suffix}").write_bytes(content)
    return outcomes, slowest, largest


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=3000, help="inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=pathlib.Path, help="a folder for what breaks the rule")
    args = parser.parse_args()
    start = time.monotonic()
    outcomes, slowest, largest = fuzz(args.count, args.seed, args.keep)
    print(f"{args.count:,} inputs, {time.monotonic() - start:,.0f} s")
    print(f"slowest {slowest:.2f} s, largest {largest / 2**20:.1f} MB")
    for verdict, count in sorted(outcomes.items()):
        print(f"{verdict:40} {count:8,}")
    sys.exit(any(verdict.startswith("WRONG") for verdict in outcomes))


if __name__ == "__main__":
    main()
