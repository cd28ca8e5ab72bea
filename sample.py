"""Invents sequences with a model that train.py saved.

The flags → the model → sampling, the most likely sequences or scores → a terminal,
a pipe or a file. Neither Keras nor its backends are imported. `run`, near the end,
is the whole of it.
"""

import bisect
import contextlib
import csv
import functools
import heapq
import itertools
import math
import os
import pathlib
import signal
import sys
import types
import unicodedata
import warnings

from loaders import LOADERS, SequenceLoader, UserError, compose, find_loader, needing_packages

with needing_packages("sample.py"):
    import numpy as np

    import model

DESCRIPTION = "Invents sequences with a model that train.py saved."
EXAMPLES = r"""examples:
  python sample.py --prompt un --temperature 0.8
  python sample.py --prompt '' --num_samples 1000 --unique --output new.txt
  printf 'th\nqu\n' | python sample.py --most_likely 3

On a terminal it asks for prompts; from a pipe, each line is a prompt. Results
go to stdout, everything else to stderr. For --exclude and --score, - is stdin.
"""
WORDS = pathlib.Path(__file__).resolve().parent / "pre_trained_models" / "english_words_5000.h5"
MOST_IDLE = 20_000  # after this many in a row without a new one, assume that none are left
# Bytes that a search for the most likely sequences may take: a base, an addition for each
# sequence that is wanted, and a cap on their sum.
SEARCH_MEMORY = 3 * 2**25, 2**19, 2**30
SCREENFUL = 1000  # sequences that are arranged together on a terminal
# Flags that make no sense where nothing is drawn.
CONFLICTS = {
    "most_likely": "num_samples unique seed",
    "score": "prompt num_samples temperature top_k top_p unique exclude seed",
}
# How names end that promise what --output does not write.
UNWRITTEN = {".xlsx", ".xls", ".ods", ".tsv", ".tab", ".json", ".gz", ".bz2", ".xz", ".zip", ".h5"}


def parse_arguments(arguments):
    """Returns the parser and the parsed arguments (those of the process if None)."""
    parser = model.CommandLine(
        "--weights_path", "--prompt", prog="sample.py", description=DESCRIPTION, epilog=EXAMPLES
    )
    path = os.path.expanduser  # shells leave the ~ of --output=~/new.txt as it is
    whole = model.within(int, 1, 10**12)

    def add(flag, metavar, kind, text, **options):
        group.add_argument(flag, metavar=metavar, type=kind, help=text, **options)

    group = parser.add_argument_group("model and prompt")
    add("--weights_path", "FILE", path, "the model (default: English words)", default=str(WORDS))
    text = "how sequences begin ('' for any beginning); answer and exit; --prompt=-a for a dash"
    add("--prompt", "TEXT", str, text, nargs="+", action="extend")

    group = parser.add_argument_group("drawing")
    add("--num_samples", "N", whole, "sequences per prompt (default: %(default)s)", default=100)
    text = "below 1 is safer, above 1 bolder, 0 always the likeliest (default: %(default)s)"
    add("--temperature", "T", model.within(float, 0, 1000), text, default=1.0)
    add("--top_k", "K", whole, "draw from the K likeliest characters (default: all)")
    text = "draw from the likeliest characters that together have probability P (default: 1)"
    add("--top_p", "P", model.within(float, 0, 1), text)
    longest = model.within(int, 1, model.LIMITS["max_len"])
    add("--max_len", "N", longest, "stop after N characters (default: as in training)")
    add("--seed", "N", model.within(int, 0, 2**64 - 1), "repeatable (default: results differ)")
    group.add_argument("--unique", action="store_true", help="never repeat a sequence")
    text = "skip sequences found in these files"
    add("--exclude", "FILE", path, text, nargs="+", action="extend", default=[])

    group = parser.add_argument_group("instead of drawing").add_mutually_exclusive_group()
    add("--most_likely", "K", whole, "print the K most probable sequences, with probabilities")
    text = "print a file's sequences, each after its nats per character; the mean goes to stderr"
    add("--score", "FILE", path, text)

    group = parser.add_argument_group("files")
    text = "how to read the files of --exclude and --score, as in train.py (default: by name)"
    add("--loader_class", "CLASS", str, text, choices=LOADERS)
    text = "write the results here, with a header if it ends in .csv; Ctrl-C keeps what is written"
    add("--output", "FILE", path, text)
    args = parser.parse_args(arguments)
    if args.output == "-":
        args.output = None  # standard output, as without the flag
    for mode in [mode for mode in CONFLICTS if getattr(args, mode) is not None]:
        for name in CONFLICTS[mode].split():
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{mode} can't be combined with --{name}; omit one of them")
    return parser, args


# Drawing


def pick_new(sequences, known, unique, count, warn):
    """Yields `count` sequences that are not in `known`, to which it adds them if `unique`."""
    for found in range(count):
        some = itertools.islice(sequences, MOST_IDLE)
        text = next(itertools.filterfalse(known.__contains__, some), None)
        if text is None:
            warn(
                f"the model has nothing new left: found {found:,} of {count:,}; a higher "
                "--temperature may find more"
            )
            break
        if unique:
            known.add(text)
        yield text


# The most likely sequences


class Search:
    """A best-first search for the most probable sequences: those of the least cost.

    A cost is a negative log-probability, which grows with each character. So
    a whole sequence is the best of those that remain once it costs no more
    than any prefix that is still open, and less than any that was given up for
    lack of memory; and a prefix can be forgotten once enough whole sequences
    cost no more.
    """

    def __init__(self, trained, count, max_len, to_probabilities, exclude):
        self.trained, self.max_len, self.exclude = trained, max_len, exclude
        self.to_probabilities = to_probabilities
        # The state of a prefix, an id and a cost for each follower, its text and a whole one's.
        size = trained.start().nbytes + 16 * len(trained.alphabet) + 8 * max_len
        base, each, most = SEARCH_MEMORY
        self.memory = min(base + each * count, most)
        self.limit = max(1, self.memory // (size + 1000))  # the rest is for Python's own objects
        self.count = min(count, self.limit)
        self.whole = [(math.inf, "")] * self.count  # sorted: the best that are still to be proven
        self.open = []  # a heap: (cost, prefix, id of a follower, iterator of dearer ones, state)
        self.given_up = math.inf  # the least cost of the prefixes that were

    @property
    def ceiling(self):
        """The cost, a float, that a sequence must stay below to be among the best."""
        return self.whole[-1][0] if self.whole else -math.inf

    def find(self, prompt, count, warn):
        """Yields `most_likely`'s tuples, as long as they are proven."""
        if len(prompt) == self.max_len:
            self.add(0.0, prompt)
        else:
            self.add_followers([prompt], np.zeros(1), *self.trained.read_prompt(prompt))
        while self.whole:
            cost, text = self.whole[0]
            prefix = self.open[0][0] if self.open else math.inf
            if min(cost, prefix) >= self.given_up:
                break
            if prefix < cost:
                self.read_best()
            else:
                del self.whole[0]
                yield text, math.exp(-cost)
        found = self.count - len(self.whole)
        reason = "no other sequence is possible"
        if not self.whole or self.given_up < math.inf:
            reason = f"to prove more would take over {self.memory / 2**20:,.0f} MiB of memory"
            reason += "; a longer --prompt, a lower --temperature or --top_k needs less"
        if found < count:
            warn(f"found {found:,} of {count:,}: {reason}")

    def add(self, cost, text):
        """Adds a whole sequence, a str."""
        text = compose(text)
        if cost < self.ceiling and text not in self.exclude:
            bisect.insort(self.whole, (cost, text))
            del self.whole[-1]

    def add_followers(self, texts, costs, logits, state):
        """Adds the ends and the longer prefixes that follow texts, which the network has read."""
        with np.errstate(divide="ignore"):  # the impossible costs infinitely much
            costs = costs[:, None] - np.log(self.to_probabilities(logits))
        for row, text in enumerate(texts):
            self.add(costs[row, 0], text)
            ids = 1 + np.flatnonzero(costs[row, 1:] < self.ceiling)
            ids = ids[np.argsort(costs[row, ids], kind="stable")]
            followers = zip(costs[row, ids], ids)
            if len(text) + 1 < self.max_len:
                self.push(text, followers, state[:, [row]])
            else:
                for cost, index in followers:
                    self.add(cost, text + self.trained.alphabet.symbols[index])

    def push(self, text, followers, state):
        """Opens a prefix by its next follower, if that can still be among the best."""
        cost, index = next(followers, (math.inf, 0))
        if cost < self.ceiling:
            heapq.heappush(self.open, (cost, text, index, followers, state))

    def read_best(self):
        """Extends the best prefixes by a character, many at once because NumPy is fast at that."""
        chosen = []
        most = min(256, self.trained.chunk_size(self.max_len))
        while self.open and len(chosen) < most:
            cost, text, index, followers, state = heapq.heappop(self.open)
            self.push(text, followers, state)
            chosen.append((cost, index, text + self.trained.alphabet.symbols[index], state))
        costs, ids, texts, states = zip(*chosen)
        state = np.concatenate(states, axis=1)
        logits = self.trained.follow(np.array(ids), state)
        self.add_followers(texts, np.array(costs), logits, state)
        if len(self.open) > self.limit:
            self.forget()

    def forget(self):
        """Forgets prefixes that can't lead to one of the best or, if too few, the dearest."""
        self.open = sorted(entry for entry in self.open if entry[0] < self.ceiling)
        room = self.limit * 7 // 8  # so that this does not run again at once
        if len(self.open) > room:
            self.given_up = min(self.given_up, self.open[room][0])
            del self.open[room:]


def most_likely(trained, prompt="", count=10, exclude=(), warn=warnings.warn, **shape):
    """Finds the most probable of all sequences that `SequenceModel.sample` can invent.

    Args:
        trained: `model.SequenceModel`.
        prompt: as in its `sample`.
        count: int, how many.
        exclude: container of str that are not wanted.
        warn: function called with a message if there are fewer: if no
            other sequence is possible, or more prefixes would have to be
            remembered than fit into the bytes that `SEARCH_MEMORY` allows.
        shape: `temperature`, `top_k`, `top_p` and `max_len`, as in `sample`, which
            raises the same errors.

    Returns:
        An iterator of tuples `(sequence, probability)`, the most probable
        first. Sequences are composed (NFC); the probability is that of
        inventing one given the prompt. Each comes as soon as it is proven.

    Example:

    >>> list(most_likely(names, "Al", count=2))
    [('Al...', 0.0...), ('Al...', 0.0...)]
    """
    prompt, max_len, to_probabilities = trained.prepare(prompt, **shape)
    return Search(trained, count, max_len, to_probabilities, exclude).find(prompt, count, warn)


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

    Returns:
        An iterator of tuples `(sequence, nats, length)`: a str; a float, its
        negative log-likelihood, `inf` if it holds a character that the model
        can't read; and an int, how many characters and ends that covers.

    Raises:
        TypeError: if `sequences` is a str.

    Example:

    >>> [(text, nats / length) for text, nats, length in score(names, ["Alan", "Xqzj"])]
    [('Alan', 2.9...), ('Xqzj', 4.6...)]
    """
    if isinstance(sequences, str):
        raise TypeError(f"sequences should be an iterable of str, not one. Received: {sequences!r}")
    max_len = trained.max_len if max_len is None else max_len
    iterator, size = iter(sequences), trained.chunk_size(max_len)
    blocks = iter(lambda: list(itertools.islice(iterator, size)), [])
    return itertools.chain.from_iterable(_score(trained, block, max_len) for block in blocks)


def _score(trained, texts, max_len):
    read = [trained.alphabet.normalize(text) for text in texts]
    lengths = np.array([min(len(text), max_len) + (len(text) <= max_len) for text in read])
    ids = np.zeros((len(texts), lengths.max() + 1), int)  # the sentinel first
    nats = np.zeros(len(texts))
    for row, text in enumerate(read):
        try:
            ids[row, 1 : min(len(text), max_len) + 1] = trained.alphabet.encode(text[:max_len])
        except UserError:
            nats[row] = np.inf
    order = np.argsort(-lengths, kind="stable")  # so that those still being read are the first
    state = trained.start(len(texts))
    for step in range(lengths.max()):
        rows = order[: np.count_nonzero(lengths > step)]
        logits = trained.step(ids[rows, step], state).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        likelihood = logits[np.arange(len(rows)), ids[rows, step + 1]]
        nats[rows] += np.log(np.exp(logits).sum(axis=1)) - likelihood
    return zip(texts, nats.tolist(), lengths.tolist())


# Finding results as the command line asks: rows of a sequence and perhaps a number


def find_rows(args, trained, rng, known, prompt):
    """Returns an iterator of the rows for a prompt, which tells why there are fewer."""

    def warn(message):
        tell(f"sample.py: {prompt!r}: {message}" if prompt else f"sample.py: {message}")

    shape = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "max_len")}
    if args.most_likely is not None:
        best = most_likely(trained, prompt, args.most_likely, **shape, exclude=known, warn=warn)
        return ((text, f"{probability:#.6g}") for text, probability in best)
    drawn = None if args.unique or args.exclude else args.num_samples
    texts = trained.sample(prompt, drawn, **shape, seed=rng)
    return zip(pick_new(texts, known, args.unique, args.num_samples, warn))


def answer_all(find, prompts, failed):
    """Yields the rows for each prompt; names and adds to `failed` what can't be answered."""
    for number, prompt in enumerate(prompts, start=1):
        try:
            yield find(prompt)
        except UserError as error:
            tell(f"sample.py: error: prompt {number}: {error}")
            failed.append(number)


def find_scores(trained, sequences, max_len):
    """Yields the rows of `--score`, and tells their mean and what it leaves out."""
    total = targets = known = unknown = cut = 0
    for text, nats, length in score(trained, sequences, max_len):
        yield text, f"{nats / length:.6f}"
        if math.isinf(nats):
            unknown += 1
        else:
            total, targets, known = total + nats, targets + length, known + 1
            cut += len(text) > max_len
    if known:
        mean = total / targets
        tell(
            f"sample.py: {mean:.6f} nats per character, perplexity {model.perplexity(mean):.6g}: "
            f"the mean over {quantity(known)} with {targets:,} characters and end marks"
        )
    if unknown:
        tell(f"sample.py: not scored: {quantity(unknown)} with characters that the model never saw")
    if cut:
        tell(f"sample.py: cut to {max_len} characters (--max_len): {quantity(cut)}")


def read_sequences(flag, path, loader_class):
    """Yields the sequences of the file that a flag names, and tells what its loader advises."""
    with model.naming(flag, path):
        loader = find_loader(path, loader_class)(path)
        yield from loader
    if loader.advice:
        tell(f"sample.py: {path}: {loader.advice}")


def quantity(count):
    """Returns how to say how many sequences there are, a str."""
    return f"{count:,} sequence{'' if count == 1 else 's'}"


# Showing or writing them


def tell(text):
    """Prints a line on stderr; a closed stderr is no reason to stop."""
    with contextlib.suppress(OSError):
        print(model.printable(text), file=sys.stderr)


def to_line(row, to_terminal=False):
    """Returns a row as a line, its number first; what would end it or steer a terminal escaped."""
    text, *number = row
    text = model.printable(text) if to_terminal else text.replace("\n", r"\n").replace("\r", r"\r")
    return "\t".join([*number, text])


# Returns a row of a CSV without its line end, which has both characters so that both are quoted.
to_csv = csv.writer(types.SimpleNamespace(write=lambda line: line[:-2])).writerow


def show(rows, names):
    """Writes rows to stdout, on a terminal in columns if sequences are all that they hold."""
    to_terminal = sys.stdout.isatty()
    lines = (to_line(row, to_terminal) for row in rows)
    if to_terminal and len(names) == 1:
        for first in lines:
            show_in_columns([first, *itertools.islice(lines, SCREENFUL - 1)])
    else:
        sys.stdout.writelines(f"{line}\n" for line in lines)


def show_in_columns(texts):
    """Prints a list of str in as many columns as fit the terminal, to be read downwards."""
    # Here, because they take time to import.
    from rich.columns import Columns
    from rich.console import Console
    from rich.text import Text

    console, cells = Console(), [Text(text) for text in texts]
    # A terminal that knows how to write from right to left would reorder the columns.
    mirrored = any(unicodedata.bidirectional(symbol) in ("R", "AL") for symbol in "".join(texts))
    # A table would cut or fold what is wider than the terminal.
    if mirrored or max(cell.cell_len for cell in cells) > console.width:
        print(*texts, sep="\n")
    else:
        console.print(Columns(cells, padding=(0, 2), column_first=True))


def make_bar():
    """Returns a progress bar on stderr, to be entered; what is told meanwhile stands above it."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False)


def stop_once(number, frame):
    """Handles the first signal as `model.interrupt` does, and lets no other disturb the rest."""
    model.catch_signals(signal.SIG_IGN)
    model.interrupt(number, frame)


def write(path, failed, rows, names):
    """Replaces a file by one with these rows, or those that came before Ctrl-C.

    If none came before it, or no prompt can be answered, the old file still stands. Once
    the last row is written signals are ignored, lest one undo that or go unanswered.
    """
    as_csv = path.lower().endswith(".csv")
    count, symbols, stopped_by = 0, set(), ()
    model.catch_signals(stop_once)
    with model.replacing(path) as file:
        size = file.write(f"{to_csv(names)}\n".encode()) if as_csv else 0
        try:
            for row in rows:
                line = to_csv(row) if as_csv else to_line(row)
                size, count = size + file.write(f"{line}\n".encode()), count + 1
                symbols.update(row[0])
            model.catch_signals(signal.SIG_IGN)
        except KeyboardInterrupt as stop:
            stopped_by = stop.args
            if not count:  # the old file is worth more
                raise KeyboardInterrupt(*stopped_by, "nothing was written") from None
            file.truncate(size)  # drops a half-written line
        if failed and not count:
            raise UserError(f"no prompt can be answered, so {path} is not written")
    if not as_csv and symbols & {"\n", "\r"}:
        tell(r"sample.py: line ends within sequences are written as \n and \r; a .csv keeps them")
    told = f"{path} holds {quantity(count)}"
    if stopped_by:
        raise KeyboardInterrupt(*stopped_by, told)
    tell(told)


# Asking for prompts


def converse(answer, path):
    """Asks for prompts until the user leaves, calls `answer` with each, and returns status 0.

    Ctrl-C clears a line or stops an answer. Only the second in a row at an
    empty prompt leaves. `path` is the model's, told because it may be the default.
    """
    readline = None  # which not every system has
    with contextlib.suppress(ImportError):
        import readline  # input() edits lines once it is imported
    tell(f"Sampling from {os.path.basename(path)}")
    tell("Type how a sequence should begin, or nothing, and press Enter. Ctrl-D leaves.")
    stops = 0  # how often Ctrl-C came in a row at an empty prompt
    while stops < 2:
        prompt = None
        try:
            # Asks where no results go.
            with contextlib.redirect_stdout(sys.stdout if sys.stdout.isatty() else sys.stderr):
                prompt = input("> ")
            stops = 0
            answer(prompt)
        except EOFError:
            tell("")
            break
        except UserError as error:
            tell(f"Sorry, {error}.")
        except KeyboardInterrupt as stop:
            tell("")
            if stop.args not in ((signal.SIGINT,), ()):  # the latter is input()'s own
                raise
            if prompt is not None:
                tell("Stopped.")
                continue
            stops = 0 if readline and readline.get_line_buffer() else stops + 1
            if stops == 1:
                tell("Press Ctrl-C again to leave.")
    return 0


def read_prompts():
    """Yields the lines of standard input without their ends."""
    loader = SequenceLoader("-")
    with model.naming("standard input", "-"):
        for line in loader.lines():
            yield line.rstrip("\r\n")
    if not loader.line:
        raise UserError("standard input is empty; pass a prompt, such as --prompt ''")


# All of it


def check_output(args):
    """Raises a `UserError`, before anything is read, if `--output` can't be written."""
    inputs = [("--weights_path", args.weights_path), ("--score", args.score)]
    inputs += [("--exclude", path) for path in args.exclude]
    model.check_target("--output", args.output, [*inputs, ("standard input", "/dev/stdin")])
    suffix = pathlib.Path(args.output).suffix
    if suffix.lower() in UNWRITTEN:
        raise UserError(f"--output: can't write {suffix}; pass a .csv, which spreadsheets open")


def run(args):
    """Does what the command line asks for and returns the exit status."""
    if args.output is not None:
        check_output(args)
    encoding = None if sys.stdout.isatty() else "utf-8"
    model.reconfigure(sys.stdout, encoding=encoding, errors="backslashreplace", line_buffering=True)
    # Bytes that can't be decoded become surrogates, which no alphabet contains.
    model.reconfigure(sys.stdin, errors="surrogateescape")
    with model.naming("--weights_path", args.weights_path):
        trained, _ = model.load(args.weights_path)
    read = functools.partial(read_sequences, loader_class=args.loader_class)
    known = {text for path in args.exclude for text in read("--exclude", path)}
    with contextlib.suppress(BrokenPipeError):
        return find_and_show(args, trained, known)
    model.discard(sys.stdout)  # nobody reads the rest, which Python would flush on exit
    return 0


def find_and_show(args, trained, known):
    """Finds answers, iterators of rows, shows or writes them, and returns the exit status."""
    rng, failed = np.random.default_rng(args.seed), []
    find = functools.partial(find_rows, args, trained, rng, known)
    prompts = args.prompt or [""]
    total = (args.most_likely or args.num_samples) * len(prompts)
    names = ["sequence"] if args.most_likely is None else ["sequence", "probability"]
    if args.score is not None:
        sequences = read_sequences("--score", args.score, args.loader_class)
        answers = [find_scores(trained, sequences, args.max_len or trained.max_len)]
        total, names = None, ["sequence", "nats_per_character"]
    elif args.prompt is not None or (args.output is not None and sys.stdin.isatty()):
        with model.naming("--prompt", None):
            # Unpacked, so that every prompt is checked before the first result.
            answers = [itertools.chain(*map(find, prompts))]
    elif sys.stdin.isatty():
        return converse(lambda prompt: show(find(prompt), names), args.weights_path)
    else:
        answers, total = answer_all(find, read_prompts(), failed), None

    deliver = show if args.output is None else functools.partial(write, args.output, failed)
    # No bar where a pipe leads: who reads it may write to the same terminal.
    to_file = args.output is not None or (sys.stdout.seekable() and not sys.stdout.isatty())
    with contextlib.ExitStack() as stack:
        if to_file:
            answers = [itertools.chain.from_iterable(answers)]
        if to_file and sys.stderr.isatty():
            answers = [stack.enter_context(make_bar()).track(*answers, total, description="")]
        for rows in answers:
            deliver(rows, names)
    return 2 if failed else 0


def main(arguments=None):
    """Runs the command line and returns the exit status."""
    parser, args = parse_arguments(arguments)
    return model.run_script(parser, run, args, "--num_samples, --max_len or --most_likely")


if __name__ == "__main__":
    sys.exit(main())
