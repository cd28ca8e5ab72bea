"""Invents sequences with a model that train.py saved.

The flags → the model → sampling, the most likely sequences or scores → a prompt,
a pipe or a file. Neither Keras nor its backends are imported. `run`,
near the end, is the whole of it.
"""

import contextlib
import csv
import dataclasses
import heapq
import io
import itertools
import math
import os
import pathlib
import signal
import sys
import unicodedata
import warnings

import numpy as np

import model
from loaders import LOADERS, LONGEST_LINE, compose, find_loader
from model import CommandLine, UserError, within

DESCRIPTION = "Invents sequences with a model that train.py saved."
EXAMPLES = r"""examples:
  python sample.py --prompt un --temperature 0.8
  python sample.py --prompt '' --num_samples 1000 --unique --output new.txt
  printf 'th\nqu\n' | python sample.py --most_likely 3

On a terminal it asks for prompts; from a pipe, each line is a prompt. Results
go to stdout, everything else to stderr.
"""
ENGLISH_WORDS = (
    pathlib.Path(__file__).resolve().parent / "pre_trained_models" / "english_words_5000.h5"
)
MOST_IDLE = 20_000  # after this many in a row without a new one, assume that none are left
# Bytes that a search for the most likely sequences may take: a base, an addition for each
# sequence that is wanted, and a cap on their sum.
SEARCH_MEMORY = 3 * 2**25, 2**19, 2**30
SCREENFUL = 1000  # sequences that are arranged together on a terminal
# Flags that make no sense where nothing is drawn.
UNUSED = {
    "most_likely": "num_samples unique seed",
    "score": "prompt num_samples temperature top_k top_p unique exclude seed",
}


def parse_arguments(arguments=None):
    """Returns the parser and the parsed arguments (those of the process if None)."""
    parser = CommandLine(suggest_flag, prog="sample.py", description=DESCRIPTION, epilog=EXAMPLES)

    source = parser.add_argument_group("model and prompt")
    source.add_argument(
        "--weights_path",
        metavar="FILE",
        default=str(ENGLISH_WORDS),
        help="the model (default: the bundled English words)",
    )
    source.add_argument(
        "--prompt",
        metavar="TEXT",
        nargs="+",
        action="extend",
        help="how the sequences begin ('' for any beginning); answer and exit; write --prompt=-a "
        "for a dash",
    )

    drawing = parser.add_argument_group("drawing")
    drawing.add_argument(
        "--num_samples",
        metavar="N",
        type=within(int, 1, 10**12),
        default=100,
        help="sequences per prompt",
    )
    drawing.add_argument(
        "--temperature",
        metavar="T",
        type=within(float, 0, 1000),
        default=1.0,
        help="below 1 for safer characters, above 1 for bolder ones; 0 always takes the likeliest",
    )
    drawing.add_argument(
        "--top_k",
        metavar="K",
        type=within(int, 1, model.LIMITS["alphabet"]),
        help="draw from the K likeliest characters (default: all)",
    )
    drawing.add_argument(
        "--top_p",
        metavar="P",
        type=within(float, 0, 1),
        help="draw from the likeliest characters that together have probability P (default: 1)",
    )
    drawing.add_argument(
        "--max_len",
        metavar="N",
        type=within(int, 1, model.LIMITS["max_len"]),
        help="stop after N characters (default: as in training)",
    )
    drawing.add_argument(
        "--seed",
        metavar="N",
        type=within(int, 0, 2**64 - 1),
        help="make the results repeatable (default: they differ)",
    )
    drawing.add_argument("--unique", action="store_true", help="never repeat a sequence")
    drawing.add_argument(
        "--exclude",
        metavar="FILE",
        nargs="+",
        action="extend",
        help="skip sequences found in these files",
    )

    other = parser.add_argument_group("instead of drawing").add_mutually_exclusive_group()
    other.add_argument(
        "--most_likely",
        metavar="K",
        type=within(int, 1, 1_000_000),
        help="print the K most probable sequences, each after its probability and a tab",
    )
    other.add_argument(
        "--score",
        metavar="FILE",
        help="print the sequences of a file, each after its nats per character and a tab; the "
        "mean goes to stderr",
    )

    files = parser.add_argument_group("files")
    files.add_argument(
        "--loader_class",
        metavar="CLASS",
        choices=LOADERS,
        help="how to read the files of --exclude and --score, as in train.py (default: by name)",
    )
    files.add_argument(
        "--output",
        metavar="FILE",
        help="write the results here, with a header if it ends in .csv; Ctrl-C keeps what "
        "has been written",
    )
    args = parser.parse_args(arguments)
    for mode, names in UNUSED.items():
        if getattr(args, mode) is None:
            continue
        for name in names.split():
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{mode} can't be combined with --{name}; omit one of them")
    return parser, args


def suggest_flag(word):
    """Returns what to write for a word, a str, that no flag stands before."""
    is_model = word.endswith(".h5") or os.path.isfile(word)
    return f"{'--weights_path' if is_model else '--prompt'} {word}"


# Drawing


def pick_new(sequences, known, unique, count, warn):
    """Yields the new ones among the sequences.

    Args:
        sequences: iterable of str.
        known: set of str, those that are not new.
        unique: bool, whether each that was passed on is known from then on.
        count: int, how many to pass on.
        warn: function called with a message if there are fewer: if none of
            `MOST_IDLE` in a row was new.

    Yields:
        str.
    """
    found = idle = 0
    for text in sequences:
        if text not in known:
            found, idle = found + 1, 0
            if unique:
                known.add(text)
            yield text
            if found == count:
                return
        elif (idle := idle + 1) == MOST_IDLE:
            warn(
                f"the model has nothing new left: found {found:,} of {count:,}, and none of the "
                f"last {MOST_IDLE:,} was new"
            )
            return


# The most likely sequences


@dataclasses.dataclass(frozen=True, slots=True)
class Prefix:
    """The beginning of sequences, with what may follow it.

    Attributes:
        text: str.
        state: `model.State` of one row, after the text was read.
        following: int array `(characters,)`: ids, the likeliest first.
        values: float64 array of that shape: the log-probabilities of the
            text followed by each of them.
    """

    text: str
    state: model.State
    following: np.ndarray
    values: np.ndarray


class Search:
    """A best-first search for the most probable sequences.

    What a prefix becomes is at most as probable as the prefix. So a whole
    sequence is the best of those that remain once it is at least as probable
    as every prefix that is still open, or was given up for lack of memory;
    and a prefix can be forgotten once enough whole sequences are at least as
    probable.

    Args:
        trained: `model.SequenceModel`.
        count: int, how many sequences are wanted.
        max_len: int, the longest sequence.
        to_probabilities: function from logits.
        exclude: container of str that are not wanted.
    """

    def __init__(self, trained, count, max_len, to_probabilities, exclude):
        self.trained = trained
        self.max_len = max_len
        self.to_probabilities = to_probabilities
        self.exclude = exclude
        state = trained.start()
        # An id and a log-probability for each follower, the text, and Python's own objects.
        size = state.hidden.nbytes + state.cell.nbytes + 16 * len(trained.alphabet) + 4 * max_len
        base, each, most = SEARCH_MEMORY
        self.memory = min(base + each * count, most)
        self.limit = max(2, self.memory // (size + 1000))  # of prefixes and whole sequences
        self.count = min(count, self.limit // 2)
        # Heaps: the least stands first, hence the signs.
        self.whole = []  # (-log-probability, sequence)
        self.best = []  # the log-probabilities of the `count` best so far, the worst first
        self.open = []  # (-log-probability, serial, rank, prefix): its rank-th follower
        self.serial = itertools.count()  # a tie-breaker, so that prefixes are never compared
        self.given_up = -math.inf  # the log-probability of the best prefix that was

    @property
    def floor(self):
        """The log-probability, a float, that a sequence must exceed to be among the best."""
        return self.best[0] if len(self.best) == self.count else -math.inf

    def add(self, value, text):
        """Adds a whole sequence, a str, with its log-probability, a float."""
        if value > self.floor and compose(text) not in self.exclude:
            heapq.heappush(self.whole, (-value, text))
            full = len(self.best) == self.count
            (heapq.heappushpop if full else heapq.heappush)(self.best, value)

    def add_followers(self, texts, values, logits, state):
        """Adds what follows prefixes that were read: the ends of some, and longer prefixes.

        Args:
            texts: list of str.
            values: float array `(len(texts),)`, their log-probabilities.
            logits, state: what the network returned for them.
        """
        with np.errstate(divide="ignore"):  # the impossible becomes -inf
            values = np.log(self.to_probabilities(logits)) + values[:, None]
        for row, text in enumerate(texts):
            self.add(values[row, 0], text)
            following = 1 + np.flatnonzero(values[row, 1:] > self.floor)
            following = following[np.argsort(-values[row, following], kind="stable")]
            if len(text) + 1 < self.max_len:
                self.push(0, Prefix(text, state.take([row]), following, values[row, following]))
            else:
                for index in following:
                    self.add(values[row, index], text + self.trained.alphabet.symbols[index])

    def push(self, rank, prefix):
        """Opens a `Prefix` with its follower of this rank, if that can still be among the best."""
        if rank < len(prefix.values) and prefix.values[rank] > self.floor:
            heapq.heappush(self.open, (-prefix.values[rank], next(self.serial), rank, prefix))

    def read_best(self):
        """Extends the best prefixes by a character, many at once because NumPy is fast at that."""
        chosen = []
        most = min(256, self.trained.chunk_size(self.max_len))
        while self.open and len(chosen) < most:
            value, _, rank, prefix = heapq.heappop(self.open)
            self.push(rank + 1, prefix)
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
        if len(self.open) + len(self.whole) > self.limit:
            self.forget()

    def forget(self):
        """Forgets what can't be one of the best and, if that is too little, unlikely prefixes."""
        self.whole = sorted(entry for entry in self.whole if -entry[0] >= self.floor)
        self.open = sorted(entry for entry in self.open if -entry[0] > self.floor)
        # Leaves room, so that this does not run again at once.
        room = self.limit * 7 // 8 - len(self.whole)
        if len(self.open) > room:
            self.given_up = max(self.given_up, -self.open[room][0])
            del self.open[room:]

    def take_best(self):
        """Returns the best of the remaining sequences.

        Returns:
            Tuple `(log-probability, sequence)`, or None if there is none or
            it can't be proven within the memory.
        """
        while self.open and (not self.whole or self.open[0][0] < self.whole[0][0]):
            if -self.open[0][0] < self.given_up:
                return None
            self.read_best()
        if not self.whole or -self.whole[0][0] < self.given_up:
            return None
        value, text = heapq.heappop(self.whole)
        return -value, text


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
):
    """Finds the most probable of all sequences that `SequenceModel.sample` can invent.

    Args:
        trained: `model.SequenceModel`.
        prompt, temperature, top_k, top_p, max_len: as in its `sample`.
        count: int, how many.
        exclude: container of str that are not wanted.
        warn: function called with a message if there are fewer: if no
            other sequence is possible, or more prefixes would have to be
            remembered than fit into the bytes that `SEARCH_MEMORY` allows.

    Returns:
        An iterator of tuples `(probability, sequence)`, the best first. Each
        comes as soon as it is proven. Sequences are composed (NFC).

    Raises:
        ValueError: as `sample` does.

    Example:

    >>> list(most_likely(names, "Al", count=2))
    [(0.0..., 'Al...'), (0.0..., 'Al...')]
    """
    prompt, max_len, to_probabilities = trained.prepare(prompt, max_len, temperature, top_k, top_p)
    return _take_proven(
        Search(trained, count, max_len, to_probabilities, exclude), prompt, count, warn
    )


def _take_proven(search, prompt, count, warn):
    if len(prompt) == search.max_len:
        search.add(0.0, prompt)
    else:
        logits, state = search.trained.read_prompt(prompt)
        search.add_followers([prompt], np.zeros(1), logits, state)
    for found in range(count):
        best = search.take_best() if found < search.count else None
        if best is None:
            if found == search.count or search.given_up > -math.inf:
                warn(
                    f"only {found:,} of {count:,} are proven to be the most likely: more would "
                    f"take over {search.memory / 2**20:,.0f} MiB of memory; a longer --prompt, a "
                    "lower --temperature or --top_k needs less"
                )
            else:
                warn(f"found {found:,} of {count:,}: no other sequence is possible")
            return
        yield math.exp(best[0]), compose(best[1])


# Scores


def score(trained, sequences, max_len=None):
    """Scores sequences by how well the model predicts them.

    Each character and the end mark count. As in training, a sequence longer
    than `max_len` is cut, and its missing end does not count.

    Args:
        trained: `model.SequenceModel`.
        sequences: iterable of str.
        max_len: int or None, how many characters of each to read; None is
            the model's.

    Yields:
        Tuple `(sequence, nats, length)`: a str; a float, its negative
        log-likelihood; and an int, how many characters and ends that covers.
        `inf` and 0 if it holds a character that the model can't read.

    Example:

    >>> [(text, nats / length) for text, nats, length in score(names, ["Alan", "Xqzj"])]
    [('Alan', 2.9...), ('Xqzj', 4.6...)]
    """
    max_len = trained.max_len if max_len is None else max_len
    iterator = iter(sequences)
    while block := list(itertools.islice(iterator, trained.chunk_size(max_len))):
        yield from zip(block, *_score(trained, block, max_len))


def _score(trained, texts, max_len):
    rows, lengths = [], np.zeros(len(texts), int)
    for index, text in enumerate(texts):
        text = trained.alphabet.normalize(text)
        try:
            rows.append(trained.alphabet.encode(text[:max_len]))
            lengths[index] = len(rows[-1]) + (len(text) <= max_len)
        except ValueError:
            rows.append(np.zeros(0, int))
    order = np.argsort(-lengths, kind="stable")  # so that those still being read are the first
    padded = np.zeros((len(texts), lengths.max() + 1), int)
    for place, index in enumerate(order):
        padded[place, 1 : len(rows[index]) + 1] = rows[index]
    state = trained.start(len(texts))
    nats = np.where(lengths > 0, 0.0, np.inf)
    for step in range(lengths.max()):
        count = np.count_nonzero(lengths > step)
        logits = trained.step(padded[:count, step], state).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        likelihood = logits[np.arange(count), padded[:count, step + 1]]
        nats[order[:count]] += np.log(np.exp(logits).sum(axis=1)) - likelihood
    return nats.tolist(), lengths.tolist()


# Finding results as the command line asks: tuples of a sequence and perhaps a number


def make_finder(args, trained, unwanted, note):
    """Makes the function that finds the results for a prompt, as the command line asks.

    Args:
        args: the command line.
        trained: `model.SequenceModel`.
        unwanted: set of str, what must not be found.
        note: function called with a message if there are fewer results.
    """
    rng = np.random.default_rng(args.seed)
    shaping = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "max_len")}

    def find(prompt):
        def warn(message):
            note(f"{prompt!r}: {message}" if prompt else message)

        if args.most_likely is not None:
            limits = {"exclude": unwanted, "warn": warn}
            likeliest = most_likely(trained, prompt, args.most_likely, **shaping, **limits)
            return ((text, f"{probability:#.6g}") for probability, text in likeliest)
        picky = args.unique or args.exclude is not None
        count = None if picky else args.num_samples
        texts = trained.sample(prompt, count, **shaping, seed=rng)
        if picky:
            texts = pick_new(texts, unwanted, args.unique, args.num_samples, warn)
        return zip(texts)

    return find


def find_for_all(find, prompts):
    """Yields the results for each prompt; raises a UserError at one that can't be answered."""
    for number, prompt in enumerate(prompts, start=1):
        try:
            yield from find(prompt)
        except ValueError as error:
            raise UserError(f"prompt {number}: {error}; nothing was written") from None


def find_scores(args, trained, note):
    """Yields the results of `--score`, and finally notes their mean."""
    total = steps = scored = unknown = cut = 0
    max_len = args.max_len or trained.max_len
    for text, nats, length in score(trained, read_sequences(args, "--score", args.score), max_len):
        yield text, f"{nats / max(length, 1):.6f}"
        if length:
            total, steps, scored = total + nats, steps + length, scored + 1
            cut += len(text) > max_len
        else:
            unknown += 1
    if scored:
        mean = total / steps
        note(
            f"{mean:.6f} nats per character, perplexity {model.perplexity(mean):.6g}: the mean "
            f"over {scored:,} sequences with {steps:,} characters and end marks"
        )
    if unknown:
        which = f"{unknown:,} more sequences" if scored else f"all {unknown:,} sequences"
        note(f"{which} contain characters that the model does not know")
    if cut:
        note(f"{cut:,} were longer than {max_len} characters and cut (--max_len)")


def read_sequences(args, flag, path):
    """Yields the sequences of the file that a flag names; raises a UserError if it can't."""
    with model.reading(flag, path, "a file of sequences"):
        yield from find_loader(path, args.loader_class)(path)


# Showing them


def show(lines, columns):
    """Writes lines, an iterable of str, to stdout, in columns if asked to."""
    lines = iter(lines)
    while columns and (block := list(itertools.islice(lines, SCREENFUL))):
        show_in_columns(block)
    sys.stdout.writelines(f"{line}\n" for line in lines)
    sys.stdout.flush()


def show_in_columns(texts):
    """Prints a list of str in as many columns as fit the terminal, to be read downwards."""
    # A terminal that knows how to write from right to left would reorder the columns.
    if any(unicodedata.bidirectional(symbol) in ("R", "AL") for text in texts for symbol in text):
        print(*texts, sep="\n")
        return
    # Here, because they take time to import.
    from rich.columns import Columns
    from rich.console import Console
    from rich.text import Text

    console, cells = Console(), [Text(text) for text in texts]
    if max(cell.cell_len for cell in cells) > console.width:
        print(*texts, sep="\n")  # a table would cut or fold what is wider
    else:
        console.print(Columns(cells, padding=(0, 2), column_first=True))


def with_progress(results, total, shown):
    """Yields results while a bar on stderr, if it is to be shown, counts them up to `total`."""
    if not shown:
        yield from results
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    options = {"transient": True, "redirect_stdout": False, "redirect_stderr": False}
    with Progress(*columns, console=Console(stderr=True), **options) as progress:
        yield from progress.track(results, total, description="")


def to_line(result, escape):
    """Returns a result as a line, its number first and its sequence as `escape` returns it."""
    text, *number = result
    return "\t".join([*number, escape(text)])


def to_csv(values):
    """Returns a row of a CSV, a str without its line end."""
    row = io.StringIO()
    csv.writer(row).writerow(values)
    return row.getvalue().removesuffix("\r\n")


def write(path, lines, header):
    """Replaces a file by one with a header and these lines, or those that came before Ctrl-C.

    Returns how many lines it wrote and the KeyboardInterrupt that stopped it, or
    None. If that came before the first line, the old file still stands.
    """
    count, stopped = 0, None
    with model.replacing(path) as file:
        size = file.write(header.encode())
        try:
            for line in lines:
                size += file.write(line.encode() + b"\n")
                count += 1
        except KeyboardInterrupt as stop:
            if not count:
                raise  # the old file is worth more
            stopped = stop
            file.seek(size)  # drops a half-written line
            file.truncate()
    return count, stopped


# Asking for prompts


def converse(answer, path):
    """Asks for prompts on the terminal until the user leaves; `answer` takes each.

    Ctrl-C clears a line or stops an answer. Only the second in a row at an
    empty prompt leaves. `path` is the model's, told because it may be the default.
    """
    typed = str  # what an interrupted line holds: nothing, as far as is known without readline
    with contextlib.suppress(ImportError):
        import readline  # input() edits lines once it is imported

        typed = readline.get_line_buffer
    tell(f"Sampling from {path}")
    tell("Type how a sequence should begin and press Enter, or just press Enter. Ctrl-D leaves.")
    stopped = False
    while True:
        try:
            prompt = ask("> ")
        except EOFError:
            tell("")
            return
        except KeyboardInterrupt as stop:
            tell("")
            if stop.args != (signal.SIGINT,):
                raise
            empty = not typed()
            if empty and stopped:
                return
            if empty:
                tell("Press Ctrl-C again to leave.")
            stopped = empty
            continue
        try:
            answer(prompt)
        except ValueError as error:
            tell(f"Sorry, {error}.")
        except KeyboardInterrupt as stop:
            if stop.args != (signal.SIGINT,):
                raise
            tell("")
            tell("Stopped.")
        stopped = False


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


def answer_all(answer, prompts):
    """Answers prompts and returns the exit status: 2 if some, named on stderr, can't be."""
    status = 0
    for number, prompt in enumerate(prompts, start=1):
        try:
            answer(prompt)
        except ValueError as error:
            tell(f"sample.py: error: prompt {number}: {error}")
            status = 2
    return status


def read_prompts():
    """Yields the lines of stdin without their ends."""
    for number in itertools.count(1):
        with model.reading("standard input", "the prompts", "a --prompt"):
            line = sys.stdin.readline(LONGEST_LINE)
        if not line and number > 1:
            return
        if not line:
            raise UserError("standard input is empty; pass a prompt, such as --prompt ''")
        if len(line) == LONGEST_LINE:
            raise UserError(
                f"prompt {number} is longer than {LONGEST_LINE:,} characters; put one on each line"
            )
        yield line.removesuffix("\n").removesuffix("\r")


def tell(text):
    """Prints a line on stderr; a closed stderr is no reason to stop."""
    with contextlib.suppress(OSError):
        print(model.printable(text), file=sys.stderr)


# All of it


def check_files(args):
    """Raises a `UserError`, before anything is read, if a file can't serve its purpose."""
    if args.output is not None:
        if args.output.lower().endswith(".gz"):
            raise UserError(f"--output: results are not compressed; omit the .gz of {args.output}")
        inputs = [("--weights_path", args.weights_path), ("--score", args.score)]
        inputs += [("standard input", "/dev/stdin")]
        inputs += [("--exclude", path) for path in args.exclude or ()]
        model.check_target("--output", args.output, inputs)
    asks = args.prompt is None and args.score is None
    if asks and any(model.is_same_file(path, "/dev/stdin") for path in args.exclude or ()):
        raise UserError(
            "--exclude reads standard input, which prompts come from; pass --prompt too"
        )


def run(args):
    """Does what the command line asks for and returns the exit status."""
    check_files(args)
    with model.reading("--weights_path", args.weights_path, "the path of a model"):
        trained, _ = model.load(args.weights_path)
    unwanted = set()
    for path in args.exclude or ():
        unwanted.update(read_sequences(args, "--exclude", path))
    to_terminal = args.output is None and sys.stdout.isatty()
    escape = model.printable if to_terminal else keep_to_one_line
    notes = []
    find = make_finder(args, trained, unwanted, notes.append)

    def tell_notes():
        while notes:
            tell(f"sample.py: {notes.pop(0)}")

    def show_results(results):
        lines = (to_line(result, escape) for result in results)
        show(lines, columns=to_terminal and args.most_likely is None and args.score is None)
        tell_notes()

    prompts = args.prompt or [""]
    total = (args.most_likely or args.num_samples) * len(prompts)
    if args.score is not None:
        results, total = find_scores(args, trained, notes.append), None
    elif args.prompt is not None or (args.output is not None and sys.stdin.isatty()):
        try:
            # Unpacked, so that every prompt is checked before the first result.
            results = itertools.chain(*map(find, prompts))
        except ValueError as error:
            raise UserError(f"--prompt: {error}") from None
    elif args.output is not None:
        results, total = find_for_all(find, read_prompts()), None
    elif sys.stdin.isatty():
        converse(lambda prompt: show_results(find(prompt)), args.weights_path)
        return 0
    else:
        return answer_all(lambda prompt: show_results(find(prompt)), read_prompts())

    results = with_progress(results, total, shown=sys.stderr.isatty() and not to_terminal)
    if args.output is None:
        show_results(results)
        return 0
    return write_results(args, results, escape, tell_notes)


def write_results(args, results, escape, tell_notes):
    """Writes the results to `--output`, tells how many they are and returns the exit status."""
    header, lines = "", (to_line(result, escape) for result in results)
    if args.output.lower().endswith(".csv"):
        columns = ["sequence"]
        if args.most_likely is not None:
            columns.append("probability")
        elif args.score is not None:
            columns.append("nats_per_character")
        header, lines = to_csv(columns) + "\n", map(to_csv, results)
    try:
        # Closed, so that the bar is gone before anything is told.
        with model.writing("--output", args.output), contextlib.closing(results):
            count, stopped = write(args.output, lines, header)
    except KeyboardInterrupt:
        tell("Stopped: nothing was written")
        raise
    tell_notes()
    tell(f"{'Stopped: ' if stopped else ''}{args.output} holds {count:,} sequences")
    if stopped:
        raise stopped
    return 0


def keep_to_one_line(text):
    """Returns a str with an escape for each character that ends a line."""
    return text.replace("\n", "\\n").replace("\r", "\\r")


def main(arguments=None):
    """Runs the command line and returns the exit status."""
    model.open_closed_streams()
    parser, args = parse_arguments(arguments)
    # Bytes that can't be decoded become surrogates, which no alphabet contains.
    encoding = {} if sys.stdin.isatty() else {"encoding": "utf-8-sig"}
    sys.stdin.reconfigure(errors="surrogateescape", newline="\n", **encoding)
    if sys.stdout.isatty():
        sys.stdout.reconfigure(errors="backslashreplace")
    else:
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    model.catch_signals()
    try:
        return run(args)
    except UserError as error:
        parser.error(str(error))
    except MemoryError:
        parser.error("there is not enough memory; lower --num_samples, --max_len or --most_likely")
    except BrokenPipeError:
        # Nobody reads the rest, which Python would try to flush on exit.
        model.discard(sys.stdout)
    except OSError as error:
        model.discard(sys.stdout)
        parser.error(f"can't write the results: {error.strerror}")
    except KeyboardInterrupt as stopped:
        model.catch_signals(signal.SIG_IGN)  # it is stopping already
        return 128 + stopped.args[0]
    return 0


if __name__ == "__main__":
    sys.exit(main())
