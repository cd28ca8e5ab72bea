"""Invents sequences with a model that train.py saved."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import contextlib
import dataclasses
import functools
import heapq
import itertools
import math
import os
import pathlib
import shutil
import stat
import sys
import time
import unicodedata
import warnings

import numpy as np

import model
from loaders import LONGEST_LINE, SequenceLoader, UserNameLoader
from model import CommandLine, UserError, within

ENGLISH_WORDS = (
    pathlib.Path(__file__).resolve().parent / "pre_trained_models" / "english_words_5000.h5"
)
PATIENCE = 20_000  # so many sequences in a row without a new one, and there are no more
# Bytes that the search for the most likely sequences may take: for any search, more for each
# sequence that is wanted, and the most of both together.
SEARCH_MEMORY = 3 * 2**25, 2**19, 2**30
SCREENFUL = 1000  # sequences that are arranged together on a terminal, if they are not long

EXAMPLE = """examples:
  python sample.py --weights_path names.h5
  python sample.py --weights_path names.h5 --prompt Al --most_likely 10
  python sample.py --weights_path names.h5 --num_samples 1000000 --unique --output new.txt
  python sample.py --weights_path names.h5 --score other_names.txt > scores.tsv
  cut -c1-2 other_names.txt | python sample.py --weights_path names.h5 > invented.txt

On a terminal it asks for the first characters again and again; Ctrl-D leaves.
From a pipe, each line is a prompt. Results go to stdout, everything else to stderr.
"""

# What the ways that don't draw sequences have no use for.
UNUSED = {
    "most_likely": ("num_samples", "unique", "seed"),
    "score": (
        "prompt",
        "num_samples",
        "temperature",
        "top_k",
        "top_p",
        "unique",
        "exclude",
        "seed",
    ),
}


def parse_arguments(arguments=None):
    """Returns the parser and what it makes of a list of str, or None for the process's."""
    parser = CommandLine(
        prog="sample.py",
        description=__doc__,
        epilog=EXAMPLE,
    )
    source = parser.add_argument_group("model and prompt")
    source.add_argument(
        "--weights_path",
        default=str(ENGLISH_WORDS),
        help="a file that train.py saved (default: the English words that come with it)",
    )
    source.add_argument(
        "--prompt",
        help="answer these first characters, which may be none, and exit; "
        "write --prompt=-a if they start with a dash",
    )

    drawing = parser.add_argument_group("drawing")
    drawing.add_argument(
        "--num_samples",
        type=within(int, 1, 2**62),
        default=100,
        help="sequences for each prompt",
    )
    drawing.add_argument(
        "--temperature",
        type=within(float, 0, 1000),
        default=1.0,
        help="below 1 likely characters become likelier, above 1 less so; 0 always takes the "
        "likeliest",
    )
    drawing.add_argument(
        "--top_k",
        type=within(int, 1, model.LIMITS["alphabet"]),
        help="draw only from so many of the likeliest characters (default: from all)",
    )
    drawing.add_argument(
        "--top_p",
        type=within(float, 0, 1),
        help="draw only from the likeliest characters that together have this probability, "
        "of what --temperature and --top_k leave (default: from all)",
    )
    drawing.add_argument(
        "--max_len",
        type=within(int, 1, model.LIMITS["max_len"]),
        help="longest sequence (default: that of the training)",
    )
    drawing.add_argument(
        "--seed",
        type=within(int, 0, 2**64 - 1),
        help="the same seed invents the same sequences (default: others each time)",
    )
    drawing.add_argument(
        "--unique", action="store_true", help="no sequence twice, whatever the prompts"
    )
    drawing.add_argument(
        "--exclude",
        metavar="FILE",
        help="no empty sequence and none of this file's, say of the training: one a line or, in a "
        ".csv, the first column without the first line",
    )

    other = parser.add_argument_group("instead of drawing").add_mutually_exclusive_group()
    other.add_argument(
        "--most_likely",
        metavar="K",
        type=within(int, 1, 2**31),
        help="the K most probable sequences, the best first: probability given the prompt, tab, "
        "sequence",
    )
    other.add_argument(
        "--score",
        metavar="FILE",
        help="rate the sequences of a file (read as --exclude's is): nats per character, tab, "
        "sequence; the mean goes to stderr",
    )

    parser.add_argument_group("results").add_argument(
        "--output",
        metavar="FILE",
        help="write the results here, in one step at the end: an error leaves the old file, Ctrl-C "
        "keeps what there is; asks for no prompt on a terminal",
    )
    args = parser.parse_args(arguments)
    for mode, names in UNUSED.items():
        for name in names if getattr(args, mode) is not None else ():
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{mode} has no use for --{name}; leave one of them out")
    return parser, args


class TextSet:
    """A set of str made for millions: few bytes for each beyond its text in UTF-8.

    Most are stored in 17 bytes more than their text, and at most one in 16,
    or a few thousand, in a Python set that takes five times as much.
    """

    def __init__(self):
        self._recent = set()
        # The older ones: all of their UTF-8, each ended by a byte that UTF-8 never has,
        # and where the one with each hash begins, in the order of the hashes.
        self._stored = bytearray()
        self._index = np.empty(0, np.int64), np.empty(0, np.int64)

    def __contains__(self, text):
        if text in self._recent:
            return True
        hashes, begins = self._index
        key = hash(text)
        position = hashes.searchsorted(key)
        while position < len(hashes) and hashes[position] == key:
            stored = text.encode() + b"\xff"
            begin = int(begins[position])
            if self._stored[begin : begin + len(stored)] == stored:
                return True
            position += 1
        return False

    def add(self, text):
        """Adds a str and returns whether it is new, a bool."""
        if text in self:
            return False
        self._recent.add(text)
        if len(self._recent) >= max(2**12, len(self._index[0]) // 16):
            self._store()
        return True

    def _store(self):
        # In this order, so that Ctrl-C between two lines does no harm.
        texts = sorted(self._recent, key=hash)
        ends = itertools.accumulate((len(text.encode()) + 1 for text in texts), initial=0)
        added = np.fromiter(ends, np.int64)[:-1] + len(self._stored)
        added_hashes = np.fromiter(map(hash, texts), np.int64)
        self._stored += b"".join(text.encode() + b"\xff" for text in texts)
        hashes, begins = self._index
        positions = hashes.searchsorted(added_hashes)
        self._index = (
            np.insert(hashes, positions, added_hashes),
            np.insert(begins, positions, added),
        )
        self._recent = set()


def pick_new(sequences, known, unique, count, warn):
    """Passes on those of the sequences that are new.

    Args:
        sequences: iterable of str.
        known: `TextSet` of those that are not.
        unique: bool, whether each that was passed on is known from then on.
        count: int, how many to pass on.
        warn: function that is told, in a str, if there are fewer: if none of
            `PATIENCE` in a row was new.

    Yields:
        str.
    """
    found = idle = 0
    for text in sequences:
        if known.add(text) if unique else text not in known:
            found, idle = found + 1, 0
            yield text
            if found == count:
                return
        elif (idle := idle + 1) == PATIENCE:
            warn(
                f"the model has nothing new left to give: {found:,} found, not {count:,}, and "
                f"among the last {PATIENCE:,} that it invented there was none"
            )
            return


@dataclasses.dataclass(frozen=True, slots=True)
class Prefix:
    """The beginning of sequences, with what may follow it.

    Attributes:
        text: str.
        state: `model.State` of one row, after the text was read.
        following: int array `(characters,)`: ids, the likeliest first.
        values: float64 array of that shape: the log-probabilities of the
            text with each of them behind it.
    """

    text: str
    state: model.State
    following: np.ndarray
    values: np.ndarray

    @property
    def size(self):
        """About how many bytes it takes, an int."""
        arrays = self.state.hidden, self.state.cell, self.following, self.values
        return sum(array.nbytes for array in arrays) + 4 * len(self.text) + 1000


def measure(text):
    """Returns about how many bytes a whole sequence, a str, takes in a `Search`."""
    return 200 + 4 * len(text)


class Search:
    """A best-first search for the most probable sequences.

    What a prefix becomes is at most as probable as the prefix. So a whole
    sequence is the best of those that remain once it is at least as probable
    as every prefix that is still open, and a prefix can be forgotten once
    enough whole sequences are at least as probable.

    Args:
        trained: `model.SequenceModel`.
        count: int, how many sequences are wanted.
        max_len: int, the longest sequence.
        distribute: function from logits to probabilities.
        exclude: container of str that are not wanted.
        tick: None, or as in `SequenceModel.sample`.
    """

    def __init__(self, trained, count, max_len, distribute, exclude, tick=None):
        self.trained = trained
        self.count = count
        self.max_len = max_len
        self.distribute = distribute
        self.exclude = exclude
        self.tick = tick
        base, each, most = SEARCH_MEMORY
        self.memory = min(base + each * count, most)
        self.prefixes_read = 0
        # Heaps: the least stands first, hence the signs.
        self.whole = []  # (-log-probability, sequence)
        self.best = []  # the log-probabilities of the `count` best sequences so far
        self.open = []  # (-log-probability, serial, rank, prefix): its rank-th follower
        self.serial = itertools.count()  # so that no prefixes are ever compared
        self.open_size = 0  # about the bytes that the open prefixes take
        self.whole_size = 0  # and the whole sequences

    @property
    def floor(self):
        """The log-probability, a float, that a sequence must exceed to be among the best."""
        return self.best[0] if len(self.best) == self.count else -math.inf

    @property
    def size(self):
        """About how many bytes all that is remembered takes, an int."""
        return self.open_size + self.whole_size

    def add(self, value, text):
        """Adds a whole sequence, a str, with its log-probability, a float."""
        if value > self.floor and text not in self.exclude:
            heapq.heappush(self.whole, (-value, text))
            self.whole_size += measure(text)
            full = len(self.best) == self.count
            (heapq.heappushpop if full else heapq.heappush)(self.best, value)

    def add_followers(self, texts, values, logits, state):
        """Adds what follows prefixes that were read: the ends of some, and longer prefixes.

        Args:
            texts: list of str.
            values: float array `(len(texts),)`, their log-probabilities.
            logits, state: what reading them led to.
        """
        with np.errstate(divide="ignore"):  # the impossible becomes -inf
            values = np.log(self.distribute(logits)) + values[:, None]
        for row, text in enumerate(texts):
            self.add(values[row, 0], text)
            following = 1 + np.flatnonzero(values[row, 1:] > self.floor)
            following = following[np.argsort(-values[row, following], kind="stable")]
            if len(text) + 1 < self.max_len:
                prefix = Prefix(text, state.take([row]), following, values[row, following])
                if self.push(0, prefix):
                    self.open_size += prefix.size
            else:
                for index in following:
                    self.add(values[row, index], text + self.trained.alphabet.symbols[index])

    def push(self, rank, prefix):
        """Opens a `Prefix` with its follower of this rank, an int, if that may be of use.

        Returns:
            Bool, whether it is open.
        """
        if rank == len(prefix.values) or prefix.values[rank] <= self.floor:
            return False
        heapq.heappush(self.open, (-prefix.values[rank], next(self.serial), rank, prefix))
        return True

    def read_best(self):
        """Reads the best prefixes on by a character: a batch, since NumPy is fast at that."""
        chosen = []
        most = min(256, self.trained.batch_size(self.max_len))
        while self.open and len(chosen) < most:
            value, _, rank, prefix = heapq.heappop(self.open)
            if not self.push(rank + 1, prefix):
                self.open_size -= prefix.size
            chosen.append((-value, prefix.following[rank], prefix))
        values, ids, prefixes = zip(*chosen)
        state = model.State(
            np.concatenate([prefix.state.hidden for prefix in prefixes]),
            np.concatenate([prefix.state.cell for prefix in prefixes], axis=1),
        )
        logits = self.trained.step(np.array(ids), state)
        symbols = self.trained.alphabet.symbols
        texts = [prefix.text + symbols[index] for index, prefix in zip(ids, prefixes)]
        self.add_followers(texts, np.array(values), logits, state)
        self.prefixes_read += len(chosen)
        if self.tick:
            self.tick(self.describe)

    def describe(self):
        """Returns a line, a str, about how far the search is."""
        return f"{self.prefixes_read:,} beginnings looked through"

    def fit(self, found):
        """Lowers `count`, at most to `found`, until what is remembered fits into `memory`."""
        if self.size <= self.memory:
            return
        self.prune()
        # With some room, so that it does not come to this again at once.
        while self.size > 0.9 * self.memory:
            self.count = max(found, min(self.count // 2, len(self.best)))
            if self.count == found:
                self.open = []  # no more can be proven
                return
            self.best = sorted(self.best)[-self.count :]
            self.prune()

    def prune(self):
        """Forgets what can't become one of the best."""
        self.open = [entry for entry in self.open if -entry[0] > self.floor]
        self.whole = [entry for entry in self.whole if -entry[0] >= self.floor]
        heapq.heapify(self.open)
        heapq.heapify(self.whole)
        self.open_size = sum(prefix.size for *_, prefix in self.open)
        self.whole_size = sum(measure(text) for _, text in self.whole)


def most_likely(
    trained,
    prompt="",
    count=10,
    temperature=1.0,
    top_k=None,
    top_p=None,
    max_len=None,
    exclude=(),
    warn=warnings.warn,
    tick=None,
):
    """Finds the most probable of all sequences that `SequenceModel.sample` can invent.

    Args:
        trained: `model.SequenceModel`.
        prompt, temperature, top_k, top_p, max_len, tick: as in its `sample`.
        count: int, how many.
        exclude: container of str that are not wanted.
        warn: function that is told, in a str, if there are fewer: if no
            other sequence is possible, or more prefixes would have to be
            remembered than fit into the bytes that `SEARCH_MEMORY` allows.

    Returns:
        An iterator of tuples `(probability, sequence)`, the best first. Each
        comes as soon as it is proven.

    Raises:
        ValueError: as `sample` does.
    """
    max_len = max_len or trained.max_len
    trained.check_prompt(prompt, max_len)
    distribute = functools.partial(
        model.distribution, temperature=temperature, top_k=top_k, top_p=top_p
    )
    search = Search(trained, count, max_len, distribute, exclude, tick)
    return _take_proven(search, prompt, warn)


def _take_proven(search, prompt, warn):
    if len(prompt) == search.max_len:
        search.add(0.0, prompt)
    else:
        logits, state = search.trained.read(prompt, search.tick)
        search.add_followers([prompt], np.zeros(1), logits, state)
    wanted = search.count
    for found in range(wanted):
        while search.open and (not search.whole or search.open[0][0] < search.whole[0][0]):
            search.read_best()
            search.fit(found)
        if found == search.count:
            warn(
                f"only {found:,} of {wanted:,} are proven to be the most likely: more would "
                f"take over {search.memory / 2**20:,.0f} MiB of memory; a longer --prompt, a lower "
                "--temperature or --top_k take less"
            )
            return
        if not search.whole:
            warn(f"no more than {found:,} sequences are possible, not {wanted:,}")
            return
        value, text = heapq.heappop(search.whole)
        search.whole_size -= measure(text)
        yield math.exp(-value), text


def score(trained, sequences, max_len=None, tick=None):
    """Rates sequences by how well the model predicts them.

    Each character and the end mark count. As in training, a sequence longer
    than `max_len` is cut, and its missing end does not count.

    Args:
        trained: `model.SequenceModel`.
        sequences: iterable of str.
        max_len: int or None, how many characters of each to read; None is
            the model's.
        tick: None, or as in `SequenceModel.sample`.

    Yields:
        Tuple `(sequence, nats, targets)`: a str; a float, its negative
        log-likelihood; and an int, how many characters and ends that covers.
        `inf` and 0 if it holds a character that the model can't read.
    """
    max_len = max_len or trained.max_len
    iterator = iter(sequences)
    while block := list(itertools.islice(iterator, trained.batch_size(max_len))):
        yield from zip(block, *_score(trained, block, max_len, tick))


def _score(trained, texts, max_len, tick):
    rows = []
    for text in texts:
        try:
            rows.append(trained.alphabet.encode(text[:max_len]))
        except ValueError:
            rows.append(None)
    targets = np.array(
        [0 if row is None else len(row) + (len(text) <= max_len) for row, text in zip(rows, texts)]
    )
    order = np.argsort(-targets, kind="stable")  # so that those still being read are the first
    padded = np.zeros((len(texts), targets.max() + 2), int)
    for place, index in enumerate(order):
        if rows[index] is not None:
            padded[place, 1 : len(rows[index]) + 1] = rows[index]
    state = trained.start(len(texts))
    nats = np.where(targets[order] > 0, 0.0, np.inf)
    longest = targets.max()
    for step in range(longest):
        count = np.count_nonzero(targets > step)
        logits = trained.step(padded[:count, step], state).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        likelihood = logits[np.arange(count), padded[:count, step + 1]]
        nats[:count] += np.log(np.exp(logits).sum(axis=1)) - likelihood
        if tick:
            tick(functools.partial(model.describe_length, step + 1, longest))
    unsorted = np.empty_like(nats)
    unsorted[order] = nats
    return unsorted.tolist(), targets.tolist()


def show(lines, columns):
    """Writes lines to stdout.

    Args:
        lines: iterable of str, with no line ends.
        columns: bool, whether to arrange them in columns.
    """
    if columns:
        for block in take_screenfuls(lines):
            print(*arrange(block, shutil.get_terminal_size()[0]), sep="\n")
    else:
        for line in lines:
            sys.stdout.write(line + "\n")
    sys.stdout.flush()


def take_screenfuls(lines):
    """Yields lists of the lines that are to be arranged together."""
    block, size = [], 0
    for line in lines:
        block.append(line)
        size += len(line)
        if len(block) == SCREENFUL or size > 80 * SCREENFUL:
            yield block
            block, size = [], 0
    if block:
        yield block


def arrange(texts, width):
    """Arranges texts in as many columns as fit, to be read downwards.

    Args:
        texts: list of str, not empty.
        width: int, how many characters fit on a line of the terminal.

    Returns:
        List of str, the lines.
    """
    cells = [count_cells(text) for text in texts]
    # A terminal that knows how to write from right to left would mix up neighbours.
    most = 1 if any(map(runs_left, texts)) else max(1, min(len(texts), width // 3))
    for columns in range(most, 0, -1):
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
    if text.isascii():
        return len(text)
    import wcwidth  # here, because it takes time to import

    return max(0, wcwidth.wcswidth(text))


def runs_left(text):
    """Tells whether a str has characters that are written from right to left."""
    if text.isascii():
        return False
    return any(unicodedata.bidirectional(character) in ("R", "AL") for character in text)


def converse(answer):
    """Asks for prompts on the terminal and answers them until the user leaves.

    Args:
        answer: function that answers a prompt, a str; its ValueError is
            shown to the user.
    """
    print(
        "Type the first characters and press Enter (none: from nothing). Ctrl-D leaves.",
        file=sys.stderr,
    )
    while True:
        try:
            prompt = ask("> ")
        except (EOFError, KeyboardInterrupt) as end:
            with contextlib.suppress(OSError):  # of a terminal that is closed
                print(file=sys.stderr)
            if isinstance(end, EOFError) or end.args == (signal.SIGINT,):
                return
            raise
        try:
            answer(prompt)
        except ValueError as error:
            tell(f"Sorry, {error}.")
        except KeyboardInterrupt as stop:
            if stop.args != (signal.SIGINT,):
                raise
            print("\nStopped. Ctrl-D leaves.", file=sys.stderr)


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


def answer_lines(answer, lines):
    """Answers each line as a prompt.

    Args:
        answer: as in `converse`.
        lines: iterable of str, without line ends.

    Returns:
        Int, the exit status: 2 if some lines could not be answered. They
        are named on stderr, and the others are answered all the same.
    """
    status = 0
    for number, line in enumerate(lines, start=1):
        try:
            answer(line)
        except ValueError as error:
            tell(f"sample.py: error: prompt {number}: {error}")
            status = 2
    return status


def tell(text):
    """Prints a line on stderr; that nobody can read it there is no reason to stop."""
    with contextlib.suppress(OSError):
        print(model.printable(text), file=sys.stderr)


def read_prompts():
    """Yields the lines of stdin without their ends.

    Raises:
        UserError: if it can't be read, or a line is too long to be a prompt.
    """
    for number in itertools.count(1):
        try:
            line = sys.stdin.readline(LONGEST_LINE)
        except OSError as error:
            raise UserError(
                f"can't read the prompts from standard input: {error.strerror}"
            ) from None
        if not line:
            return
        if len(line) == LONGEST_LINE:
            raise UserError(
                f"prompt {number} is longer than {LONGEST_LINE:,} characters; pass one a line"
            )
        yield line.removesuffix("\n").removesuffix("\r")


def write(path, lines):
    """Writes lines to a file: all of them, or those that came before Ctrl-C.

    Args:
        path: str, replaced in one step at the end.
        lines: iterable of str, with no line ends.

    Returns:
        Tuple `(count, stopped)`: an int, how many it wrote, and the
        KeyboardInterrupt that stopped it, or None.

    Raises:
        OSError: if the file can't be written; then the old one still stands.
        KeyboardInterrupt: if it stopped before the first; likewise.
    """
    count = size = 0
    stopped = None
    with model.replacing(path) as file:
        try:
            for line in lines:
                size += file.write(line.encode() + b"\n")
                count += 1
        except KeyboardInterrupt as stop:
            if not count:
                raise  # the old file is worth more
            stopped = stop
            file.seek(size)  # what was being written
            file.truncate()
    return count, stopped


class Watch:
    """Shows on stderr how far work is that takes long: a bar on a terminal, lines in a log.

    Args:
        beside: bool, whether the results go to the same terminal.
        redraw: bool, whether a line on a terminal can be drawn anew.
    """

    def __init__(self, beside, redraw):
        self.beside = beside
        self.redraw = redraw
        self.start()

    def start(self, total=None):
        """Begins to count and to wait.

        Args:
            total: int or None, how many results are expected.
        """
        self.count, self.total = 0, total
        self.reached = 0.0  # the seconds after which there were so many
        self.shown = model.ProgressLine(sys.stderr, 8, terminal=self.redraw)  # seconds

    def over(self, results):
        """Yields what an iterable does, and counts it."""
        try:
            for result in results:
                if self.beside:
                    self.clear()
                yield result
                self.count += 1
                self.reached = time.monotonic() - self.shown.start
                self.tick()
        finally:
            self.clear()

    def tick(self, describe=None):
        """Shows how far the work is, if it is time to.

        Args:
            describe: None, or a function that returns how far the next result
                is, a str.
        """
        with contextlib.suppress(OSError):  # the work goes on if nobody watches any more
            self.shown.show(functools.partial(self.describe, describe))

    def describe(self, describe, seconds):
        """Returns the line to show, a str, after so many seconds."""
        if self.count:
            shown = model.describe_progress(self.count, self.total, self.reached)
        else:
            shown = f"0 of {self.total:,}" if self.total else "0 so far"
        # One that soon comes needs no words.
        if describe and seconds - self.reached > 2:
            shown += f"; {describe()} after {model.describe_time(seconds)}"
        return shown

    def clear(self):
        """Takes what was shown away from the terminal."""
        with contextlib.suppress(OSError):
            self.shown.clear()


def make_finder(args, trained, known, warn, escape, tick):
    """Makes the function that answers a prompt as the command line asks.

    Args:
        args: the command line.
        trained: `model.SequenceModel`.
        known: `TextSet` of what must not be found.
        warn: function that is told, in a str, why there are fewer results.
        escape: function from a str to how it is to be shown.
        tick: as in `SequenceModel.sample`.

    Returns:
        A function from a str to an iterator of str, the lines to show. It
        raises a ValueError if it can't answer.
    """
    rng = np.random.default_rng(args.seed)
    shaping = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "max_len")}

    def find(prompt):
        def warn_here(note):
            warn(f"{prompt!r}: {note}" if prompt else note)

        if args.most_likely is not None:
            found = most_likely(
                trained,
                prompt,
                args.most_likely,
                **shaping,
                exclude=known,
                warn=warn_here,
                tick=tick,
            )
            return (f"{probability:#.6g}\t{escape(text)}" for probability, text in found)
        picky = args.unique or args.exclude is not None
        count = None if picky else args.num_samples
        found = trained.sample(prompt, count, **shaping, seed=rng, tick=tick)
        if picky:
            found = pick_new(found, known, args.unique, args.num_samples, warn_here)
        return map(escape, found)

    return find


def keep_to_one_line(text):
    """Returns a str with an escape for each newline, since results are lines."""
    return text.replace("\n", "\\n")


def find_for_lines(find, lines):
    """Yields the results for each line.

    Raises:
        UserError: at a prompt that can't be answered, or if there is none.
    """
    number = 0
    for number, line in enumerate(lines, start=1):
        try:
            yield from find(line)
        except ValueError as error:
            raise UserError(f"prompt {number}: {error}; nothing was written") from None
    if not number:
        raise UserError("no prompt came in; pass one, such as --prompt ''")


def rate(args, trained, escape, tell, tick):
    """Yields the lines of `--score` and at the end tells, in a str, what the mean is."""
    nats = targets = known = unknown = cut = 0
    max_len = args.max_len or trained.max_len
    sequences = read_sequences("score", args.score)
    for text, value, count in score(trained, sequences, max_len, tick):
        yield f"{value / max(count, 1):.6f}\t{escape(text)}"
        if count:
            nats, targets, known = nats + value, targets + count, known + 1
            cut += len(text) > max_len
        else:
            unknown += 1
    if known:
        mean = nats / targets
        tell(
            f"{mean:.6f} nats per character, perplexity {math.exp(min(mean, 700)):.6g}: the mean "
            f"over {known:,} sequences with {targets:,} characters and ends"
        )
    if unknown:
        more = "more hold" if known else "sequences, all of them, hold"
        tell(f"{unknown:,} {more} characters that the model can't know")
    if cut:
        tell(f"{cut:,} were longer than {max_len} characters and cut (--max_len)")


def read_sequences(flag, path):
    """Yields the sequences of the file that a flag names, read by how its name ends.

    Raises:
        UserError: if it can't be read.
    """
    loader = UserNameLoader if path.lower().endswith(".csv") else SequenceLoader
    try:
        yield from loader(path)
    except OSError as error:
        raise UserError(
            f"--{flag}: can't read {path or repr(path)}: {error.strerror}; name a file of sequences"
        ) from None
    except ValueError as error:
        raise UserError(f"--{flag}: {error}") from None


def is_pipe(stream):
    """Tells whether a text file is a pipe or a socket."""
    mode = os.fstat(stream.fileno()).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def run(args):
    """Does what the command line asks for.

    Returns:
        Int, the exit status.

    Raises:
        UserError: if the user has to mend something first.
    """
    if args.output is not None:
        inputs = {
            "--weights_path": args.weights_path,
            "--exclude": args.exclude,
            "--score": args.score,
            "standard input": "/dev/stdin",
        }
        try:
            model.check_target(args.output, inputs)
        except ValueError as error:
            raise UserError(f"--output: {error}") from None
    asks = args.prompt is None and args.score is None
    if asks and args.exclude is not None and model.is_same_file(args.exclude, "/dev/stdin"):
        raise UserError("--exclude is standard input, from which prompts come; pass --prompt too")
    trained = model.load_for("--weights_path", args.weights_path)[0]
    known = TextSet()
    if args.exclude is not None:
        known.add("")  # which no file can name
        for sequence in read_sequences("exclude", args.exclude):
            known.add(sequence)
    to_terminal = args.output is None and sys.stdout.isatty()
    escape = model.printable if to_terminal else keep_to_one_line
    columns = to_terminal and args.most_likely is None and args.score is None
    notes = []
    # What a pipe holds may come to the same terminal at any time.
    watch = Watch(to_terminal, redraw=args.output is not None or not is_pipe(sys.stdout))
    find = make_finder(args, trained, known, notes.append, escape, watch.tick)
    # The most likely come in bursts, from which nothing follows for the rest.
    total = None if args.most_likely else args.num_samples

    def answer(prompt):
        watch.start(total)
        show_all(find(prompt))

    def show_all(lines):
        with contextlib.closing(watch.over(lines)) as watched:
            show(watched, columns)
        tell_notes()

    def tell_notes():
        while notes:
            tell(f"sample.py: {notes.pop(0)}")

    if args.score is not None:
        lines = rate(args, trained, escape, notes.append, watch.tick)
    elif args.prompt is not None or (args.output is not None and sys.stdin.isatty()):
        watch.start(total)
        try:
            lines = find(args.prompt or "")
        except ValueError as error:
            raise UserError(f"--prompt: {error}") from None
    elif args.output is not None:
        lines = find_for_lines(find, read_prompts())
    elif sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() edits lines once it is imported
        converse(answer)
        return 0
    else:
        return answer_lines(lambda prompt: show_all(find(prompt)), read_prompts())

    if args.output is None:
        show_all(lines)
        return 0
    try:
        with (
            model.locking(args.output),
            contextlib.closing(watch.over(lines)) as watched,
        ):
            count, stopped = write(args.output, watched)
    except OSError as error:
        raise UserError(f"--output: can't write {args.output}: {error.strerror}") from None
    except KeyboardInterrupt:
        tell("Stopped: nothing was written")
        raise
    tell_notes()
    tell(f"{'Stopped: ' if stopped else ''}{args.output} holds {count:,} lines")
    if stopped:
        raise stopped
    return 0


def main(arguments=None):
    """Runs the command line.

    Returns:
        Int, the exit status.
    """
    model.open_streams()
    parser, args = parse_arguments(arguments)
    # Bytes that are no characters become characters that no model knows.
    encoding = {} if sys.stdin.isatty() else {"encoding": "utf-8-sig"}
    sys.stdin.reconfigure(errors="surrogateescape", newline="\n", **encoding)
    if sys.stdout.isatty():
        sys.stdout.reconfigure(errors="backslashreplace")
    else:
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    model.catch_signals(stop)
    try:
        return run(args)
    except UserError as error:
        parser.error(str(error))
    except MemoryError:
        parser.error("there is not enough memory; lower --num_samples, --max_len or --most_likely")
    except BrokenPipeError:
        # Nobody reads the rest, which the interpreter would flush at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.error(f"can't write the results: {error.strerror}")
    except KeyboardInterrupt as stopped:
        model.catch_signals(signal.SIG_IGN)  # it is stopping already
        return 128 + stopped.args[0]
    return 0


def stop(number, frame):
    """Handles signals that ask the process to stop."""
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    sys.exit(main())
