"""Learns to write sequences like those in a file and saves what it learned as an `.h5`."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import argparse
import atexit
import collections
import contextlib
import ctypes
import dataclasses
import functools
import gc
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import os
import queue
import re
import reprlib
import shlex
import socket
import sys
import threading
import time
from tempfile import TemporaryFile

import numpy as np

import model
from loaders import LOADERS
from model import CommandLine, SequenceModel, UserError, within

EXAMPLE = """example:
  python train.py --loader_class UserNameLoader --sequence_path names.csv --save_path names.h5

The same command again continues where the file at --save_path stands, and so
does a larger --epochs. Ctrl-C stops; what the last whole epoch learned is kept.
"""

REUSE = 4  # how often a sequence that teachers invented is learned from
PREDICTIONS = 2**24  # of what they predict of it, the most numbers that are kept at a time
ARRIVAL = 300  # seconds that the processes of a group wait for each other to begin
NOTHING_SAVED = "nothing new was saved"
OUT_OF_MEMORY = "there is not enough memory; lower --batch_size, --units, --layers or --max_len"
# The signals that asked to stop: a library can make another error of a KeyboardInterrupt or
# drop it.
stop_requests = []
UNITS, LAYERS, SENTINEL = 128, 2, "\n"
# What makes two runs the same run: a file is continued only if all of it agrees.
SETTINGS = (
    "max_len",
    "sentinel",
    "units",
    "layers",
    "dropout",
    "recurrent_dropout",
    "batch_size",
    "learning_rate",
    "validation_split",
    "seed",
)


def parse_arguments(arguments=None):
    """Returns the parser and what it makes of a list of str, or None for the process's."""
    parser = CommandLine(
        prog="train.py",
        description=__doc__,
        epilog=EXAMPLE,
    )

    def up_to(name):
        return within(int, 1, model.LIMITS[name])

    data = parser.add_argument_group("data")
    data.add_argument(
        "--loader_class",
        choices=LOADERS,
        default="SequenceLoader",
        help="what the file is: one sequence a line; English words, taken the most used first; "
        "or a CSV whose first column counts",
    )
    data.add_argument(
        "--sequence_path", "--sequences_path", default="sequences.txt", help="the file"
    )
    data.add_argument(
        "--num_sequences",
        type=within(int, 1, 2**62),
        help="take only the first so many (default: all)",
    )
    data.add_argument(
        "--max_len",
        type=up_to("max_len"),
        help="cut sequences to so many characters (default: the longest one's, "
        f"at most {model.LONGEST})",
    )
    data.add_argument(
        "--sentinel",
        type=one_character,
        help="a character that no sequence contains, to mark where they end "
        r"(default: the newline, '\n', or that of --init_from or --teachers)",
    )
    data.add_argument(
        "--validation_split",
        type=within(float, 0, 0.9),
        default=0.1,
        help="share of the distinct sequences that is not learned but used to choose the best "
        "epoch; 0 for none",
    )

    network = parser.add_argument_group("network")
    network.add_argument(
        "--units",
        type=up_to("units"),
        help=f"width of each LSTM layer (default: {UNITS}, or those of --init_from)",
    )
    network.add_argument(
        "--layers",
        type=up_to("layers"),
        help=f"LSTM layers (default: {LAYERS}, or those of --init_from)",
    )
    network.add_argument(
        "--dropout",
        type=within(float, 0, 0.9),
        default=0.3,
        help="share of each layer's outputs that is dropped while it learns",
    )
    network.add_argument(
        "--recurrent_dropout",
        type=within(float, 0, 0.9),
        default=0.0,
        help="share of each layer's outputs that it does not itself read back while it learns",
    )

    fit = parser.add_argument_group("fit")
    fit.add_argument(
        "--batch_size", type=within(int, 1, 2**20), default=32, help="sequences a training step"
    )
    epochs = within(int, 1, 50_000)  # more losses would make the metadata too long
    fit.add_argument("--epochs", type=epochs, default=15, help="passes over the data, in all")
    fit.add_argument(
        "--learning_rate",
        type=within(float, 1e-9, 10),
        default=0.01,
        help="Adam's at the start; it falls to 0 over all epochs along a cosine",
    )
    fit.add_argument(
        "--patience",
        type=epochs,
        help="stop after so many epochs without a better validation loss (default: never)",
    )
    fit.add_argument(
        "--seed", type=within(int, 0, 2**32 - 1), default=0, help="makes a run repeatable"
    )

    file = parser.add_argument_group("files")
    file.add_argument("--save_path", default="incognito_model.h5", help="where the model is kept")
    file.add_argument(
        "--init_from",
        help="a model to start from instead of from nothing; characters that it does not know "
        "are added (default: none)",
    )
    file.add_argument(
        "--teachers",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="models trained on this data with other --seed; what they predict together, for "
        "sequences that they invent, is learned in place of the data (default: none)",
    )
    file.add_argument(
        "--log_dir",
        help="a folder for losses.csv and for what TensorBoard shows (default: none)",
    )
    file.add_argument(
        "--overwrite", action="store_true", help="start over if there is such a file already"
    )

    machines = parser.add_argument_group("machines")
    machines.add_argument(
        "--distribute",
        action="store_true",
        help="use all devices of this host or, where Keras's KERAS_DISTRIBUTION_… variables "
        "are set, of all hosts; needs KERAS_BACKEND=jax",
    )
    return parser, parser.parse_args(arguments)


def one_character(text):
    """The `argparse` type of `--sentinel`."""
    if len(text) != 1 or "\ud800" <= text <= "\udfff":
        raise argparse.ArgumentTypeError(f"not a single character: {text!r}")
    return text


def read_source(args):
    """Reads the model at `--init_from` and lets it decide what the command line leaves open.

    Args:
        args: the command line. Its `units`, `layers` and `sentinel` are set
            if they are None.

    Returns:
        `SequenceModel`, or None without that flag.

    Raises:
        UserError: if it can't be read, or can't become what the flags ask for.
    """
    source, found = None, {"units": UNITS, "layers": LAYERS}
    sentinel = SENTINEL
    if args.init_from is not None:
        source, found = model.load_for("--init_from", args.init_from)
        sentinel = source.alphabet.sentinel
    for name in ("units", "layers"):
        asked = getattr(args, name)
        if source and asked not in (None, found[name]):
            raise UserError(
                f"--{name}: {args.init_from} has {found[name]}; leave the flag away to keep them"
            )
        setattr(args, name, found[name] if asked is None else asked)
    if args.sentinel is None:
        args.sentinel = sentinel
    elif source and args.sentinel in source.alphabet.symbols[1:]:
        raise UserError(
            f"--sentinel: to {args.init_from} {args.sentinel!r} is a character like others; "
            f"leave the flag away to keep its sentinel, {sentinel!r}"
        )
    return source


def read_teachers(args):
    """Reads the models at `--teachers` and lets them decide the sentinel if it is left open.

    Args:
        args: the command line. Its `sentinel` is set if it is None.

    Returns:
        List of tuples `(teacher, metadata)` as `model.load` returns them, of
        one alphabet; empty without that flag.

    Raises:
        UserError: if one can't be read or differs from the first, or has
            another sentinel than the command line.
    """
    loaded = [model.load_for("--teachers", path) for path in args.teachers]
    for path, (teacher, _) in zip(args.teachers, loaded):
        first = loaded[0][0].alphabet
        if teacher.alphabet.symbols != first.symbols:
            same = teacher.alphabet.sentinel == first.sentinel
            raise UserError(
                f"--teachers: {path} has {'other characters' if same else 'another sentinel'} than "
                f"{args.teachers[0]}; name models that were trained on the same data"
            )
        if args.sentinel is None:
            args.sentinel = first.sentinel
        elif args.sentinel != first.sentinel:
            raise UserError(
                f"--sentinel: that of {path} is {first.sentinel!r}; leave the flag away to keep it"
            )
    return loaded


def check_teachers(args, loaded, corpus, data):
    """Raises a `UserError` if models can't teach what is to be learned.

    Args:
        args: the command line.
        loaded: what `read_teachers` returns.
        corpus: `model.Corpus`.
        data: what the metadata say of it.
    """
    for path, (teacher, found) in zip(args.teachers, loaded):
        missing = set(corpus.alphabet.symbols) - set(teacher.alphabet.symbols)
        if missing:
            raise UserError(
                f"--teachers: {path} never saw {model.name_some(sorted(missing))}, which "
                f"{'--init_from or ' if args.init_from else ''}--sequence_path has; name models "
                "that were trained on the same data"
            )
        if teacher.max_len < corpus.max_len:
            raise UserError(
                f"--teachers: {path} learned sequences of at most {teacher.max_len} characters; "
                f"pass --max_len {teacher.max_len}, or train it with --max_len {corpus.max_len}"
            )
        if model.distribution(teacher.read("")[0])[:, 1:].sum() < 1e-6:
            raise UserError(f"--teachers: {path} invents only empty sequences; leave it out")
        if not args.validation_split:
            continue
        settings = found.get("settings")
        share = settings.get("validation_split") if isinstance(settings, dict) else None
        difference = None
        if found.get("data") != data:
            difference = "its data, --num_sequences or --max_len were others"
        elif share != args.validation_split:
            difference = (
                f"its --validation_split was {reprlib.repr(share)}, not {args.validation_split!r}"
            )
        if difference:
            raise UserError(
                f"--teachers: {path} may have learned what is held out to validate: {difference}; "
                "train it like this one, or pass --validation_split 0"
            )


def read_corpus(args, characters=""):
    """Reads and encodes the data that the command line names.

    Args:
        args: the command line.
        characters: str, those that the alphabet has anyway.

    Returns:
        `model.Corpus`.

    Raises:
        UserError: if it can't be read or learned.
    """
    loader = LOADERS[args.loader_class](args.sequence_path, max_sequences=args.num_sequences)
    try:
        return model.encode(loader, args.sentinel, args.max_len, characters)
    except OSError as error:
        path = args.sequence_path or repr(args.sequence_path)
        raise UserError(
            f"--sequence_path: can't read {path}: {error.strerror}; name a file with your sequences"
        ) from None
    except model.SentinelError as error:
        raise UserError(explain_sentinel(args, loader, error, characters)) from None
    except ValueError as error:
        raise UserError(f"--sequence_path: {error}") from None


def explain_sentinel(args, loader, error, characters):
    """Returns what to tell the user about a `model.SentinelError` in a loader's data."""
    where, such_as = f"sequence {error.first + 1}", ""
    # What came through a pipe can't be read again, and a file may have changed since.
    if os.path.isfile(args.sequence_path):
        with contextlib.suppress(OSError, ValueError, StopIteration):
            used = {*characters, *itertools.chain.from_iterable(loader)}
            next(itertools.islice(loader, error.first, None))
            where = f"line {loader.line}"
            candidates = itertools.chain(" |~^_", map(chr, range(33, 0x110000)))
            free = next(
                character
                for character in candidates
                if character not in used and model.printable(character) == character
            )
            such_as = f", such as --sentinel {shlex.quote(free)}"
    return (
        f"{args.sequence_path}, {where}: the sequence contains the sentinel {args.sentinel!r} "
        f"({error.count} in all do); pass a character that none contains{such_as}"
    )


def split(corpus, fraction):
    """Chooses the sequences that are held out to validate.

    Equal sequences all go to the same side. The choice is random but always
    the same, so that runs with different seeds compare, and none learns from
    another what it is to be validated by.

    Args:
        corpus: `model.Corpus`.
        fraction: float, the share of the distinct sequences to hold out.

    Returns:
        Tuple `(training, held_out)` of two int arrays, the indices of their
        sequences. The second is empty if that share is less than one
        sequence; the first never is.
    """
    kinds = number_kinds(corpus.rows)
    distinct = kinds.max() + 1
    count = min(round(fraction * distinct), distinct - 1)
    chosen = np.random.default_rng(0).permutation(distinct)[:count]
    held_out = np.isin(kinds, chosen)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def number_kinds(rows):
    """Numbers the different rows of an array from 0, in the order of their bytes.

    Args:
        rows: int array `(sequences, length)`.

    Returns:
        Int array `(sequences,)`, in which equal rows have equal numbers.
    """
    # As bytes, because NumPy sorts those many times faster than rows of numbers.
    texts = np.ascontiguousarray(rows).view(f"V{rows[0].nbytes}").ravel()
    order = np.argsort(texts, kind="stable")
    first = np.ones(len(texts), bool)  # of its kind
    for start in range(1, len(texts), 65536):  # a copy of all would take as much as the rows
        here, before = (order[start - shift : start + 65536 - shift] for shift in (0, 1))
        first[start : start + 65536] = texts[here] != texts[before[: len(here)]]
    kinds = np.empty(len(texts), int)
    kinds[order] = np.cumsum(first) - 1
    return kinds


def plan_calls(args, corpus, batch_size, batches):
    """Chooses what `make_calls` has a choice of, by how much work there is.

    Args:
        args: the command line.
        corpus: `model.Corpus`.
        batch_size: int.
        batches: int, how many all epochs have together.

    Returns:
        Tuple `(steps, lengths)`: how many batches one call gets, an int:
        enough that what a call costs in Python is lost in the work, few
        enough that the progress bar and Ctrl-C are not kept waiting, and that
        what teachers predict fits the memory. And to
        which lengths batches are padded if each costs a compilation, a sorted
        int array: one more for some seconds of work, which a compilation takes.
    """
    longest = int(corpus.targets.max())
    weights = 4 * args.units * (len(corpus.alphabet) + (2 * args.layers - 1) * args.units)
    # A multiplication and an addition a weight and step, and twice that on the way back.
    operations = 6 * weights * batch_size * longest
    steps = min(64, math.ceil(batches / args.epochs), 2 * 10**11 // operations)
    if args.teachers:
        steps = min(steps, PREDICTIONS // (batch_size * longest * len(corpus.alphabet)))
    choices = 1 + min(7, batches * operations // 10**12)
    lengths = np.geomspace(longest, np.median(corpus.targets), choices)
    lengths = np.unique(np.ceil(lengths - 1e-6).astype(int))
    return max(1, steps), lengths


def make_calls(corpus, chosen, batch_size, steps, lengths=None, seed=None):
    """Cuts sequences into batches, and batches into calls of the compiled network.

    Which sequences make a batch is random, so that each is a fair sample;
    padding is kept low by what leaves it one: a call gets batches whose
    longest sequences are about equally long, and a large batch comes in
    several parts, the shortest sequences in the first, each part as long as
    it needs to be.

    Args:
        corpus: `model.Corpus`.
        chosen: int array, the indices of the sequences to take.
        batch_size: int.
        steps: int, how many batches a call gets.
        lengths: sorted int array or None, the lengths that a part may be
            padded to, where each new one costs a compilation; None allows all.
        seed: what `numpy.random.default_rng` takes, to shuffle the sequences
            and the calls; None leaves the sequences as they are.

    Yields:
        Tuple `(parts, count)`: a tuple of tuples `(rows, targets)`, the ids
        of each part, an int array `(steps, part of the batch, length)`, and
        how many targets each sequence gives, an int32 array `(steps, part of
        the batch)`, or `(rows, targets, predictions)` if the corpus has any;
        and how many of the batches are real. Rows that are not, in those or
        in the last real one, have no targets. Rows and predictions that the
        corpus does not keep are 0.
    """
    rng = None if seed is None else np.random.default_rng(seed)
    order = chosen if rng is None else rng.permutation(chosen)
    count = math.ceil(len(order) / batch_size)
    order = np.append(order, np.zeros(count * batch_size - len(order), int))
    order = order.reshape(count, batch_size)
    targets = corpus.targets[order]
    targets.ravel()[len(chosen) :] = 0
    ranking = np.argsort(targets, axis=1, kind="stable")
    order, targets = (np.take_along_axis(array, ranking, axis=1) for array in (order, targets))
    ranking = np.argsort(targets[:, -1], kind="stable")
    calls = [ranking[start : start + steps] for start in range(0, count, steps)]
    if rng is not None:
        calls = [rng.permutation(calls[index]) for index in rng.permutation(len(calls))]
    one_length = lengths is not None and len(lengths) == 1
    divisions = 1 if one_length else max(1, min(4, batch_size // 64))
    arrays = [array for array in (corpus.rows, corpus.predictions) if array is not None]
    for batches in calls:
        parts = []
        for columns in np.array_split(np.arange(batch_size), divisions):
            part = np.ix_(batches, columns)
            goals = np.zeros((steps, len(columns)), np.int32)
            goals[: len(batches)] = targets[part]
            # Of several parts each has one length, since all of them are compiled together.
            length = max(1, (targets[:, columns] if divisions > 1 else goals).max())
            if lengths is not None:
                length = lengths[np.searchsorted(lengths, length)]
            found = corpus.locate(order[part])
            rows, *predictions = (gather(array, *found, steps, length) for array in arrays)
            parts.append((rows, goals, *predictions))
        yield tuple(parts), np.int32(len(batches))


def gather(array, kept, places, steps, length):
    """Takes sequences out of an array, each cut or padded with 0 to a length.

    Args:
        array: array `(sequences, longest, ...)`.
        kept, places: as `model.Corpus.locate` returns them for an int array
            `(batches, sequences of each)`.
        steps: int, how many batches the result has; those beyond the given ones are 0.
        length: int.

    Returns:
        Array `(steps, sequences of each, length, ...)`, 0 where the array
        does not keep the sequence.
    """
    found = array[places, :length]
    padded = np.zeros((steps, kept.shape[1], length, *array.shape[2:]), array.dtype)
    padded[: len(kept)][kept, : found.shape[1]] = found
    return padded


def make_invented_calls(teachers, count, longest, batch_size, steps, lengths, seed, group):
    """Does what `make_calls` does with sequences that models invent.

    To invent a sequence is more work than to learn from it, and since its
    targets are whole distributions it can serve several times.

    Args:
        teachers: list of `SequenceModel`.
        count: int, how many sequences the batches have in all.
        longest: int, how many targets each has at most.
        batch_size, steps, lengths: as `make_calls` takes them.
        seed: tuple of int.
        group: `Group`, whose first process invents for all.

    Yields:
        What `make_calls` yields.
    """
    most = max(1, PREDICTIONS // (longest * len(teachers[0].alphabet)))
    for number, start in enumerate(range(0, count, REUSE * most)):
        now = min(REUSE * most, count - start)
        size = 0 if group.rank else math.ceil(now / REUSE)
        invented = model.invent(teachers, size, longest, (*seed, number, 0))
        if group.size > 1:
            targets = json.loads(group.exchange(json.dumps(invented.targets.tolist()))[0])
            share = (-1, 1) if group.rank else (0, 1)
            invented = dataclasses.replace(
                invented, targets=np.array(targets, np.int32), share=share
            )
        chosen = np.arange(now) % len(invented)
        yield from make_calls(invented, chosen, batch_size, steps, lengths, (*seed, number, 1))


def describe(args, corpus, source, teachers):
    """Returns the metadata of a run that has not begun: a dict for `model.save`.

    Args:
        args: the command line.
        corpus: `model.Corpus`.
        source: `SequenceModel` or None, the model that the run starts from.
        teachers: list of `SequenceModel`, those that it imitates.
    """
    fingerprint = hashlib.sha256(corpus.alphabet.symbols.encode())
    fingerprint.update(corpus.rows)
    fingerprint.update(corpus.complete)
    return {
        "alphabet": corpus.alphabet.symbols,
        "max_len": corpus.max_len,
        "units": args.units,
        "layers": args.layers,
        "loader_class": args.loader_class,
        "data": {"sequences": len(corpus), "sha256": fingerprint.hexdigest()},
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "init_from": source and hash_arrays(source.weights),
        "teachers": [hash_arrays(teacher.weights) for teacher in teachers],
        "epochs": args.epochs,
        "history": {"loss": [], "val_loss": []},
    }


def hash_arrays(arrays):
    """Returns a str that other arrays would not give."""
    fingerprint = hashlib.sha256()
    for array in arrays:
        fingerprint.update(np.ascontiguousarray(array))
    return fingerprint.hexdigest()


@contextlib.contextmanager
def claim(args):
    """Makes sure that this run, and no other at the same time, can write to `--save_path`.

    Raises:
        UserError: if it can't or must not.
    """
    try:
        inputs = {"--sequence_path": args.sequence_path, "--init_from": args.init_from}
        inputs |= {f"--teachers ({teacher})": teacher for teacher in args.teachers}
        model.check_target(args.save_path, inputs)
    except ValueError as error:
        raise UserError(f"--save_path: {error}") from None
    with contextlib.ExitStack() as claimed:
        try:
            claimed.enter_context(model.locking(args.save_path))
        except BlockingIOError:
            raise UserError(
                f"--save_path: another run is writing {args.save_path}; wait until it has ended, "
                "or pass another --save_path"
            ) from None
        except OSError as error:
            raise UserError(
                f"--save_path: can't write beside {args.save_path}: {error.strerror}; name a file "
                "in a folder that you can write to"
            ) from None
        yield


def find_earlier_run(args, metadata, validated):
    """Looks for a run to continue at `--save_path` and checks that it is this one.

    Args:
        args: the command line.
        metadata: this run's, from `describe`.
        validated: bool, whether there is anything to validate with.

    Returns:
        Tuple `(history, weights, state)`: the losses so far, the best weights
        and the training state; or None if this run begins.

    Raises:
        UserError: if training must not replace what is there.
    """
    path = args.save_path
    if args.overwrite or not os.path.exists(path):
        return None
    ways_out = "pass --overwrite to start over, or another --save_path"
    try:
        best, found = model.load(path)
        difference = find_difference(found, metadata)
        state = [] if difference else model.load_training_state(path)
    except OSError as error:
        raise UserError(f"--save_path: can't read {path}: {error.strerror}; {ways_out}") from None
    except ValueError as error:
        raise UserError(f"--save_path: {error}; {ways_out}") from None
    if difference:
        raise UserError(f"--save_path: {path} was trained with {difference}; {ways_out}")
    if not (state and is_history(found.get("history"), validated)):
        raise UserError(
            f"--save_path: {path} holds a finished model without what continuing needs; {ways_out}"
        )
    return found["history"], best.weights, state


def find_difference(found, metadata):
    """Returns with what, a str, another run was trained, or None if it is the same run.

    Args:
        found: the other run's metadata, which may be any dict.
        metadata: this run's, from `describe`.
    """
    settings = found.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    if "recurrent_dropout" not in settings:
        return "an earlier version of train.py"
    for name, now in metadata["settings"].items():
        then = settings.get(name)
        if now != then:
            return f"--{name} {reprlib.repr(then)}, not {now!r}"
    for name, difference in (
        ("data", "other data (--sequence_path, --num_sequences)"),
        ("init_from", "another --init_from"),
        ("teachers", "other --teachers"),
    ):
        if metadata[name] != found.get(name):
            return difference
    for name in ("alphabet", "max_len", "units", "layers"):
        if metadata[name] != found[name]:
            return f"other {name} than it says"
    return None


def is_history(value, validated):
    """Tells whether a value from a file's metadata is a history of losses.

    Args:
        value: anything that JSON can hold.
        validated: bool, whether there is a validation loss for each epoch.
    """
    return (
        isinstance(value, dict)
        and list(value) == ["loss", "val_loss"]
        and all(isinstance(losses, list) for losses in value.values())
        and all(type(loss) is float for losses in value.values() for loss in losses)
        and len(value["val_loss"]) == (len(value["loss"]) if validated else 0)
    )


def epochs_since_best(history):
    """Returns how many epochs ago the best validation loss was, 0 if there is none."""
    losses = history["val_loss"]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


@contextlib.contextmanager
def quiet():
    """Hides what the libraries below Keras say as they start, unless that fails.

    They write to the process's stderr before any log level applies, so the
    file descriptor itself is turned away.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    # In memory where that can be, since there may be no place for temporary files.
    in_memory = hasattr(os, "memfd_create")
    with open(os.memfd_create("messages"), "r+b") if in_memory else TemporaryFile() as messages:
        stderr = os.dup(2)
        os.dup2(messages.fileno(), 2)
        try:
            yield
        except Exception:
            if not stop_requests:
                messages.seek(0)
                os.write(stderr, messages.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def import_keras():
    """Imports Keras and wakes its backend.

    Returns:
        The module `keras`.

    Raises:
        UserError: if Keras's own configuration is damaged or names a backend of no use.
    """
    # What an import leaves is there to stay: to search it for garbage, again and again
    # and once more at the exit, takes a third of the time.
    gc.disable()
    try:
        with quiet():
            import keras

            if keras.backend.backend() == "tensorflow":
                import tensorflow as tf

                tf.config.list_physical_devices()
                tf.get_logger().setLevel("ERROR")  # it would warn of each length anew
        gc.freeze()
    except (AttributeError, TypeError, ValueError) as error:  # of what keras.json says
        if stop_requests:
            raise
        home = os.environ.get("KERAS_HOME", os.path.join(os.path.expanduser("~"), ".keras"))
        path = os.path.join(home, "keras.json")
        if not os.path.exists(path):
            raise
        raise UserError(
            f"Keras can't start: {str(error).partition(chr(10))[0]}; mend {path} if it is at fault"
        ) from None
    finally:
        gc.enable()
    check_backend(keras.backend.backend())
    keras.config.set_floatx("float32")  # whatever keras.json says
    return keras


def check_backend(name):
    """Raises a `UserError` if the backend of Keras with that name, a str, can't be used."""
    if name not in COMPILERS:
        raise UserError(
            f"KERAS_BACKEND: {name!r} can't train here; set it to {' or '.join(COMPILERS)}"
        )
    if importlib.util.find_spec(name) is None:
        raise UserError(f"KERAS_BACKEND: {name} is not installed: pip install {name}")


class Group:
    """The processes that train one model together, and their devices.

    Each of them runs this script with the same flags and data and takes its
    share of each batch; process 0 speaks and writes for all.

    Args:
        address: str or None, where process 0 waits for the others: host:port.
        size: int, how many processes there are.
        rank: int, which of them this is, from 0.

    Attributes:
        distribution: `keras.distribution.DataParallel`, or None if Keras is
            to use what it uses by itself.
        done: bool, whether this process may wait for the others as it ends.
    """

    def __init__(self, address=None, size=1, rank=0):
        self.address = address
        self.size = size
        self.rank = rank
        self.distribution = None
        self.done = False

    def join(self):
        """Waits for all processes and takes hold of all devices.

        Raises:
            UserError: if that fails.
        """
        keras = import_keras()
        import jax

        if self.size > 1:
            self._explain_abort(
                f"--distribute: not all {self.size} processes came to {self.address} within "
                f"{ARRIVAL} seconds; start the same command on every host, each with its own "
                "KERAS_DISTRIBUTION_PROCESS_ID, and see what the others said"
            )
            atexit.register(self._leave)
            logging.getLogger("jax").setLevel(logging.ERROR)  # it would warn of proxies
            jax.config.update("jax_cpu_collectives_implementation", "gloo")  # older ones have none
            # Not keras.distribution.initialize(), which waits for as long as JAX pleases, and
            # under Slurm takes one device only.
            self.together(
                functools.partial(
                    jax.distributed.initialize,
                    self.address,
                    self.size,
                    self.rank,
                    cluster_detection_method="deactivate",
                    initialization_timeout=ARRIVAL,
                )
            )
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))  # JAX would ignore it
            self._explain_abort(self._lost("another one has ended or can't be reached"))
            devices = self.together(jax.devices)
            counts = collections.Counter(device.process_index for device in devices)
            if len(set(counts.values())) > 1:
                raise UserError(
                    "--distribute: every host must have as many devices as the others. "
                    f"Received: {', '.join(str(counts[rank]) for rank in range(self.size))}"
                )
        self.distribution = self.together(
            functools.partial(keras.distribution.DataParallel, auto_shard_dataset=False)
        )

    def exchange(self, text):
        """Tells all processes a str, and returns the list of what they tell in their order."""
        if self.size == 1:
            return [text]
        from jax.experimental.multihost_utils import process_allgather

        data = np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)
        longest = self.together(process_allgather, np.int32(len(data))).max()
        padded = np.zeros(1 << int(longest).bit_length(), np.uint8)  # each size is compiled
        padded[: len(data)] = data
        rows = self.together(process_allgather, padded)
        return [bytes(row).rstrip(b"\0").decode("utf-8", "surrogateescape") for row in rows]

    def lead(self, action, *arguments):
        """Lets process 0 call a function, and all wait for it.

        Returns:
            What it returns, or in another process None.

        Raises:
            UserError: in all processes, if it does so in that one.
        """
        result, message = None, ""
        try:
            if self.rank == 0:
                result = action(*arguments)
        except UserError as error:
            message = str(error)
        message = self.exchange(message)[0]
        if message:
            raise UserError(message)
        return result

    def agree(self, metadata, **settings):
        """Makes sure that all processes train the same.

        Args:
            metadata: this process's, from `describe`.
            settings: what they need not be alike in to continue a file, but
                here must.

        Raises:
            UserError: in all processes, with the first difference.
        """
        mine = {**metadata, "settings": {**metadata["settings"], **settings}}
        first, *others = map(json.loads, self.exchange(json.dumps(mine)))
        for rank, other in enumerate(others, start=1):
            difference = find_difference(other, first)
            if difference:
                raise UserError(
                    f"--distribute: process {rank} differs from process 0, it was started with "
                    f"{difference}; start all of them with the same flags and data"
                )

    def spread(self, variables):
        """Gives Keras variables the values that they have in process 0, on all devices."""
        if not self.distribution:
            return
        import jax
        from jax.experimental.multihost_utils import broadcast_one_to_all

        values = [np.asarray(variable.value) for variable in variables]
        values = self.together(broadcast_one_to_all, values)
        for variable, value in zip(variables, values):
            layout = self.distribution.get_variable_layout(variable).backend_layout
            variable.assign(jax.make_array_from_process_local_data(layout, value))

    def together(self, function, *arguments):
        """Calls a function that all processes take part in, and returns what it returns.

        Raises:
            UserError: instead of what it raises, which mostly comes of
                another process that is lost. Alone it raises that itself.
        """
        if self.size == 1:
            return function(*arguments)
        results = queue.SimpleQueue()

        def call():
            try:
                results.put((function(*arguments), None))
            except Exception as error:
                results.put((None, str(error).partition("\n")[0]))

        # In a thread, because while JAX waits for others, it does not hear Ctrl-C.
        threading.Thread(target=call, daemon=True).start()
        result, reason = results.get()
        if reason is not None:
            raise UserError(self._lost(reason))
        return result

    def _lost(self, reason):
        return (
            f"--distribute: the processes can't go on together: {reason}; if one of them has "
            "ended, start the same command without --overwrite on every host again, to continue "
            "after the last whole epoch"
        )

    def _explain_abort(self, message):
        # When another process is lost, a thread of JAX prints pages and aborts.
        line = f"train.py: error: {model.printable(message)}\n".encode()
        stderr = sys.stderr.fileno()

        def end(signal_number):
            time.sleep(1)  # in which the main thread can end by itself, if it knows better why
            os.write(stderr, line)
            os._exit(2)

        handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
        ctypes.CDLL(None).signal(signal.SIGABRT, handler)
        self._handler = handler  # which must live as long as it may be called

    def _leave(self):
        # JAX would wait until the others end too, while they wait for this one.
        if not self.done:
            sys.stdout.flush()
            os._exit(128 + stop_requests[0] if stop_requests else 2)


def find_group(distribute):
    """Reads from the environment which process of how many this one is.

    The variables are those of `keras.distribution.initialize`.

    Args:
        distribute: bool, whether there may be others.

    Returns:
        `Group`, which is still to be joined.

    Raises:
        UserError: if that can't be, or the variables make no sense.
    """
    if not distribute:
        return Group()
    if os.environ.get("KERAS_BACKEND") != "jax":
        raise UserError(
            "--distribute: needs Keras on JAX: pip install jax, and set KERAS_BACKEND=jax"
        )
    prefix = "KERAS_DISTRIBUTION_"
    names = [prefix + name for name in ("JOB_ADDRESSES", "NUM_PROCESSES", "PROCESS_ID")]
    values = [os.environ.get(name) for name in names]
    if not any(values):
        return Group()
    for name, value in zip(names, values):
        if not value:
            raise UserError(f"--distribute: set {name} too, or none of {', '.join(names)}")
    try:
        rank, size = int(values[2]), int(values[1])
    except ValueError:
        rank = size = 0
    if not 0 <= rank < size:
        raise UserError(
            f"--distribute: {names[2]} must be a whole number from 0 to one less than {names[1]}. "
            f"Received: {values[2]} and {values[1]}"
        )
    addresses = values[0].split(",")
    ports = [re.fullmatch(r".+:(\d{1,5})", address) for address in addresses]
    if len(addresses) not in (1, size) or not all(
        port and 0 < int(port[1]) < 2**16 for port in ports
    ):
        raise UserError(
            f"--distribute: {names[0]} must be a host:port for each of {size} processes, or only "
            f"for the first. Received: {values[0]}"
        )
    if rank == 0 and size > 1:  # JAX would crash
        try:
            socket.create_server(("", int(ports[0][1]))).close()
        except OSError as error:
            raise UserError(
                f"--distribute: {names[0]}: can't use port {ports[0][1]} of this host: "
                f"{os.strerror(error.errno)}; name another one"
            ) from None
    return Group(addresses[0], size, rank)


def mute(speak):
    """Hides what libraries write to stdout and stderr past Python, for good.

    Args:
        speak: bool, whether Python may still write to stdout.
    """
    with open(os.devnull, "w") as nowhere:
        for number, name in ((1, "stdout"), (2, "stderr")):
            stream = getattr(sys, name)
            stream.flush()
            own = os.dup(number)
            os.dup2(nowhere.fileno(), number)
            if speak or stream is sys.stderr:
                options = {"encoding": stream.encoding, "errors": stream.errors}
                setattr(sys, name, os.fdopen(own, "w", buffering=1, **options))


def check_size(args, corpus):
    """Raises a `UserError` if a network is sure not to fit into the memory."""
    count = model.count_weights(len(corpus.alphabet), args.units, args.layers)
    # Adam has two averages of each weight; the best epoch's weights are kept too; and a file of
    # these four is put together in memory.
    try:
        model.check_memory(
            4 * 8 * count,
            f"training {args.layers:,} layers of {args.units:,} units",
            "lower --units or --layers",
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def prepare_network(args, corpus, training, steps, source, group):
    """Builds and compiles the Keras network and its optimizer.

    Args:
        args: the command line.
        corpus: `model.Corpus`.
        training: int array, the indices of the sequences that are learned.
        steps: int, how many training steps all epochs take together.
        source: `SequenceModel` or None, whose weights to start from.
        group: `Group`.

    Returns:
        A `keras.Sequential` that knows what `source` does or, without one,
        nothing but how frequent each character is.
    """
    import keras

    network = model.build_network(
        len(corpus.alphabet),
        args.units,
        args.layers,
        args.dropout,
        args.recurrent_dropout,
        args.seed,
    )
    rate = keras.optimizers.schedules.CosineDecay(args.learning_rate, steps)
    network.compile(
        optimizer=keras.optimizers.Adam(rate, global_clipnorm=1.0),
        loss="sparse_categorical_crossentropy",
    )
    network.optimizer.build(network.trainable_variables)
    # The softmax starts from the frequencies of the targets: a good place to learn
    # from, and what never is one (the end, if all sequences were cut) stays unlikely.
    _, places = corpus.locate(training)
    counts = sum(
        np.bincount(column[places], minlength=len(corpus.alphabet)) for column in corpus.rows.T
    )
    counts = sum(np.array(json.loads(text)) for text in group.exchange(json.dumps(counts.tolist())))
    counts[0] = np.count_nonzero(corpus.complete[training])
    bias = np.log((counts + 0.5) / counts.sum())
    weights = network.get_weights()
    weights[-1] = bias
    if source:
        weights = extend_weights(weights, corpus.alphabet, source)
    network.set_weights(weights)
    return network


def extend_weights(weights, alphabet, source):
    """Gives a model's weights room for an alphabet that holds more than its own.

    Characters that the model knows keep their odds among each other after
    any beginning, since a softmax only shares out anew what a new one takes.

    Args:
        weights: list of float32 arrays as `get_weights()` gives them, of a
            network of that alphabet whose last bias is the logarithm of each
            character's frequency: what new characters start from.
        alphabet: `Alphabet`, with at least the characters of the model's.
        source: `SequenceModel`.

    Returns:
        List of float32 arrays, of the shapes of `weights`.
    """
    known = np.array([0, *alphabet.encode(source.alphabet.symbols[1:])])
    kernel, *lstm, dense, bias = source.weights
    kernel, weights[0][known] = weights[0], kernel
    extended = np.zeros_like(weights[-2])
    extended[:, known] = dense
    highest = bias.max().astype(np.float64)
    offsets = weights[-1] + highest + np.log(np.exp(bias - highest).sum())
    offsets[known] = bias
    return [kernel, *lstm, extended, offsets.astype(np.float32)]


def differentiate_by_hand(network, choice):
    """Decides whether a network's layers use `model.run_lstm` to learn.

    Args:
        network: the Keras network.
        choice: bool, whether they are to if they can also do without.

    Returns:
        Bool, whether they do: with recurrent dropout they always do.
    """
    layers = [layer for layer in network.layers if hasattr(layer, "by_hand")]
    for layer in layers:
        layer.by_hand |= choice
    return layers[0].by_hand


def compile_for_tensorflow(network, batch_size, scale, group):
    """Makes the functions that train and evaluate a network on TensorFlow.

    Args:
        network: the compiled Keras network.
        batch_size: int, how many sequences a batch has.
        scale: float, what a step multiplies its loss with.
        group: `Group`, of this process and its devices alone.

    Returns:
        Tuple `(learn, evaluate, fixed)`: two functions from what `make_calls`
        yields to the sum of all losses, unscaled, of which the first also
        makes a training step a batch; and two bools, whether each length of
        their rows costs a compilation.
    """
    import tensorflow as tf

    # XLA makes one program of it all. That is several times as fast where a step is little
    # work, and faster where the layers are wide; what lies between is as fast or faster
    # without. On a GPU, an LSTM is one call of cuDNN, of which XLA knows nothing; but cuDNN
    # in its turn knows no recurrent dropout.
    units = network.layers[0].units
    little_or_wide = (units <= 64 and units * batch_size <= 4096) or units >= 256
    xla = little_or_wide and not tf.config.list_physical_devices("GPU")
    xla = differentiate_by_hand(network, xla)
    variables = network.trainable_variables

    def learn_batch(parts):
        with tf.GradientTape() as tape:
            loss = sum(model.total_loss(network, *part, training=True) for part in parts)
            scaled = loss * scale
        network.optimizer.apply(tape.gradient(scaled, variables), variables)
        return loss

    def evaluate_batch(parts):
        return sum(model.total_loss(network, *part) for part in parts)

    def compiled(function, xla):
        def call(parts, count):
            def body(step, total):
                return step + 1, total + function(
                    tf.nest.map_structure(lambda array: array[step], parts)
                )

            return tf.while_loop(lambda step, total: step < count, body, (0, 0.0))[1]

        program = None

        def run(*batches):
            nonlocal program
            batches = tf.nest.map_structure(tf.constant, batches)
            if program is None:
                # One program for all lengths, unless XLA makes one for each.
                specs = None if xla else tf.nest.map_structure(any_length, batches)
                program = tf.function(call, input_signature=specs, jit_compile=xla)
            return float(program(*batches))

        return run

    def any_length(batch):
        return tf.TensorSpec([*batch.shape[:2], *[None] * len(batch.shape[2:])], batch.dtype)

    # Without a way back there is too little work for a compilation to pay.
    return compiled(learn_batch, xla), compiled(evaluate_batch, False), (xla, False)


def compile_for_jax(network, batch_size, scale, group):
    """Does on JAX, which always compiles, what `compile_for_tensorflow` does there.

    If the group has a distribution, each device works on its part of each
    batch, and XLA adds up what they find.
    """
    import jax
    import jax.numpy as jnp
    import keras

    distribution = group.distribution
    differentiate_by_hand(network, distribution is not None or jax.default_backend() == "cpu")
    if distribution:  # an LSTM of cuDNN can't be divided among devices
        for layer in network.layers:
            layer.use_cudnn = False

    groups = (
        network.trainable_variables,
        network.non_trainable_variables,
        network.optimizer.variables,
    )

    def loss_of(trainable, others, parts, training):
        mapping = [*zip(groups[0], trainable), *zip(groups[1], others)]
        with keras.StatelessScope(state_mapping=mapping) as scope:
            loss = sum(model.total_loss(network, *part, training=training) for part in parts)
        return loss * scale, (loss, [scope.get_current_value(each) for each in groups[1]])

    def learn_batch(state, parts):
        trainable, others, slots = state
        gradient = jax.grad(loss_of, has_aux=True)
        gradients, (loss, others) = gradient(trainable, others, parts, True)
        trainable, slots = network.optimizer.stateless_apply(slots, gradients, trainable)
        return (trainable, others, slots), loss

    def evaluate_batch(state, parts):
        return state, loss_of(*state[:2], parts, False)[1][0]

    def give(array):
        # Each process gives the rows that it keeps and zeros for the others.
        local = np.zeros((jax.local_device_count(), *array.shape), array.dtype)
        local[0] = array
        layout = distribution.get_data_layout(local.shape).backend_layout
        return jax.make_array_from_process_local_data(layout, local)

    def divide(given):
        # Here their sum, which has all rows, is cut into one part of the batch a device.
        steps_of_batches = given.sum(0, dtype=given.dtype)
        devices, size = given.shape[0], steps_of_batches.shape[1]
        missing = -size % devices
        padding = [(0, missing if axis == 1 else 0) for axis in range(steps_of_batches.ndim)]
        layout = keras.distribution.TensorLayout(
            [None, distribution.batch_dim_name], distribution.device_mesh
        )
        padded = jnp.pad(steps_of_batches, padding)
        return keras.distribution.distribute_tensor(padded, layout)

    def compiled(function):
        def call(state, parts, count):
            if distribution:
                parts = jax.tree.map(divide, parts)

            def body(step, carry):
                state, total = carry
                state, loss = function(state, jax.tree.map(lambda array: array[step], parts))
                return state, total + loss

            return jax.lax.fori_loop(0, count, body, (state, 0.0))

        everywhere = None
        if distribution:
            everywhere = keras.distribution.TensorLayout([], distribution.device_mesh)
            everywhere = everywhere.backend_layout
        call = jax.jit(call, donate_argnums=0, out_shardings=everywhere)

        def run(*arguments):
            state, total = call(*arguments)
            return state, float(total)

        def update(parts, count):
            if distribution:
                # The targets are known to all.
                parts = [
                    (rows, targets * (group.rank == 0), *rest) for rows, targets, *rest in parts
                ]
                parts = jax.tree.map(give, parts)
            state = tuple([variable.value for variable in each] for each in groups)
            state, total = group.together(run, state, parts, count)
            for variables, values in zip(groups, state):
                for variable, value in zip(variables, values):
                    variable.assign(value)
            return total

        return update

    return compiled(learn_batch), compiled(evaluate_batch), (True, True)


COMPILERS = {"tensorflow": compile_for_tensorflow, "jax": compile_for_jax}


def fit(args, metadata, corpus, training, held_out, source, teachers, earlier, group):
    """Trains, saving after each epoch.

    Args:
        args: the command line.
        metadata: this run's, from `describe`; its history grows.
        corpus: `model.Corpus`.
        training, held_out: int arrays, as `split` returns them.
        source: `SequenceModel` or None, whose weights to start from.
        teachers: list of `SequenceModel`, those to learn from, or empty.
        earlier: tuple `(weights, state)`, the best weights so far and the
            training state; or None if this run begins, or in another process
            than the first.
        group: `Group`.

    Raises:
        UserError: if the loss stops being a number, the file can't be
            written, the earlier run's state can't be taken up, or another
            process is lost.
    """
    keras = import_keras()
    batch_size = min(args.batch_size, len(training))
    batches = math.ceil(len(training) / batch_size)
    network = prepare_network(args, corpus, training, args.epochs * batches, source, group)
    variables = network.variables + network.optimizer.variables
    best, state = earlier or (None, [])
    group.lead(take_up, args, variables, state)
    group.spread(variables)
    metadata["versions"] = {"keras": keras.__version__, "numpy": np.__version__}
    history = metadata["history"]
    print(f"Network: {args.layers} × LSTM({args.units}), {network.count_params():,} parameters")

    # Every target weighs the same, whichever batch it is in.
    scale = 1 / (batch_size * corpus.targets[training].mean())
    compiler = COMPILERS[keras.backend.backend()]
    learn, evaluate, fixed = compiler(network, batch_size, scale, group)
    steps, lengths = plan_calls(args, corpus, batch_size, args.epochs * batches)
    to_learn, to_evaluate = (lengths if each else None for each in fixed)

    log = group.lead(open_log, args.log_dir, history)
    first, begun = len(history["loss"]), time.monotonic()
    for epoch in range(first, args.epochs):
        title = f"Epoch {epoch + 1}/{args.epochs}"
        seed = (args.seed, epoch)
        start = time.monotonic()
        if teachers:
            plan = len(training), corpus.targets.max(), batch_size, steps, to_learn, seed
            calls = make_invented_calls(teachers, *plan, group)
        else:
            calls = make_calls(corpus, training, batch_size, steps, to_learn, seed)
        losses = {"loss": pass_over(learn, calls, title, len(training))}
        rate = len(training) / (time.monotonic() - start)
        if len(held_out):
            size = min(batch_size, len(held_out))
            calls = make_calls(corpus, held_out, size, steps, to_evaluate)
            losses["val_loss"] = pass_over(evaluate, calls, title + ", validation", len(held_out))
        state = [np.asarray(variable) for variable in variables]
        numbers = all(np.isfinite(array).all() for array in state)
        weights = network.get_weights()
        small = all(np.abs(array).max() <= model.LARGEST for array in weights)
        if not (all(map(math.isfinite, losses.values())) and numbers and small):
            raise UserError(
                f"the loss of epoch {epoch + 1} is not a number any more, or the weights are not; "
                f"{explain_kept(args, history)}; try a --learning_rate below "
                f"{args.learning_rate}, in another --save_path or with --overwrite"
            )
        grown = {**history, **{name: [*history[name], loss] for name, loss in losses.items()}}
        if epochs_since_best(grown) == 0:
            best = weights

        group.lead(save, args, network, best, {**metadata, "history": grown}, state)
        history.update(grown)
        left = (time.monotonic() - begun) / (epoch + 1 - first) * (args.epochs - epoch - 1)
        figures = [f"{name}: {loss:.4f}" for name, loss in losses.items()]
        figures += [f"{rate:,.0f} sequences/s", f"{model.describe_time(left)} left"]
        print(" - ".join([title, *figures]))
        texts = []
        if group.rank == 0:
            current = SequenceModel(corpus.alphabet, metadata["max_len"], weights)
            texts = list(current.sample(count=8, seed=seed))
        show_invented(texts, corpus, training, group)
        group.lead(log)
        if args.patience and epochs_since_best(history) >= args.patience:
            break


def take_up(args, variables, state):
    """Sets variables to what an earlier run's were, or raises a `UserError` if it can't.

    Without an earlier run, whose state is empty, they stay as they are.
    """
    if not state:
        return
    kinds = [(array.shape, name_kind(array.dtype)) for array in state]
    if kinds != [(tuple(each.shape), name_kind(each.dtype)) for each in variables]:
        raise UserError(
            f"--save_path: {args.save_path} was trained with a version of Keras that this "
            "one can't continue; pass --overwrite to start over, or another --save_path"
        )
    for variable, array in zip(variables, state):
        variable.assign(array)


def name_kind(dtype):
    """Returns a str for a NumPy dtype or its name, the same one for all integers.

    Which integers Keras counts in depends on the backend.
    """
    return "int" if "int" in str(dtype) else str(dtype)


def save(args, network, best, metadata, state):
    """Writes what an epoch learned to `--save_path`, or raises a `UserError` if it can't."""
    try:
        model.save(args.save_path, network, best, metadata, state)
    except OSError as error:
        raise UserError(
            f"--save_path: can't write {args.save_path}: {error.strerror}; "
            "the epochs before this one are kept if there were any"
        ) from None


def pass_over(function, calls, title, total):
    """Calls a compiled function on all batches of an epoch and shows how far it is.

    Args:
        function: as `compile_for_tensorflow` makes it.
        calls: what `make_calls` yields.
        title: str, what is shown before the progress.
        total: int, how many sequences there are.

    Returns:
        Float, the mean loss of a target in nats. Not finite as soon as one
        call's is not.
    """
    line = model.ProgressLine(sys.stdout, 60, title)
    nats = targets = done = 0
    for parts, count in calls:
        if stop_requests:
            raise KeyboardInterrupt
        nats += function(parts, count)
        if not math.isfinite(nats):
            break
        targets += sum(int(part[1].sum()) for part in parts)
        done += sum(np.count_nonzero(part[1]) for part in parts)
        loss = nats / targets
        line.show(
            lambda seconds, done=done, loss=loss: (
                f"{title} {model.describe_progress(done, total, seconds)} - loss: {loss:.4f}"
            )
        )
    line.clear()
    return nats / targets if targets else nats


def show_invented(texts, corpus, training, group):
    """Prints invented sequences: first the new ones, then those in the training data.

    Args:
        texts: list of str, of characters of the alphabet; those in process 0 count.
        corpus: `model.Corpus`.
        training: int array, the indices of the sequences that were learned.
        group: `Group`, whose processes look in their shares of the data.
    """
    texts = json.loads(group.exchange(json.dumps(texts))[0])
    _, places = corpus.locate(training)
    known = []
    for text in texts:
        row = np.zeros(max(len(text), corpus.rows.shape[1]), corpus.rows.dtype)
        row[: len(text)] = corpus.alphabet.encode(text)
        known.append(
            any(
                (corpus.rows[places[start : start + 65536]] == row).all(axis=1).any()
                for start in range(0, len(places), 65536)
                if len(row) == corpus.rows.shape[1]
            )
        )
    known = map(any, zip(*map(json.loads, group.exchange(json.dumps(known)))))
    groups = {"new": [], "known": []}
    for text, is_known in zip(texts, known):
        groups["known" if is_known else "new"].append(model.printable(text) or "(empty)")
    for name, found in groups.items():
        if found:
            print(f"invented, {name}: " + "  ".join(found))


def make_log_dir(folder):
    """Makes a folder unless it exists or is None, or raises a `UserError`."""
    try:
        if folder is not None:
            os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--log_dir: can't make {folder}: {error.strerror}; name a folder"
        ) from None


def open_log(folder, history):
    """Begins to log losses for people to watch.

    Args:
        folder: str, where the event file for TensorBoard and `losses.csv` go;
            it exists. Or None, to log nothing.
        history: dict, as in the metadata; what it holds already is logged.

    Returns:
        A function that logs what the history has gained since the last call.

    Raises:
        UserError: here and there, if the files can't be written.
    """
    if folder is None:
        return lambda: None
    with quiet():
        import tensorflow as tf  # on any backend

    # An event file is a file of TensorFlow records, so TensorBoard itself isn't needed.
    Event, Summary = tf.compat.v1.Event, tf.compat.v1.Summary
    path = os.path.join(folder, f"events.out.tfevents.{time.time():.0f}.{os.getpid()}")
    written = 0
    try:
        events = tf.io.TFRecordWriter(os.fsencode(path))
        events.write(Event(file_version="brain.Event:2", wall_time=time.time()).SerializeToString())
    except tf.errors.OpError as error:
        raise UserError(f"--log_dir: can't write {path}: {error.message}") from None

    def log():
        nonlocal written
        names = [name for name, losses in history.items() if losses]
        epochs = list(zip(*(history[name] for name in names)))
        try:
            for epoch, losses in enumerate(epochs[written:], start=written + 1):
                values = [Summary.Value(tag=n, simple_value=v) for n, v in zip(names, losses)]
                event = Event(step=epoch, wall_time=time.time(), summary=Summary(value=values))
                events.write(event.SerializeToString())
            events.flush()
            with model.replacing(os.path.join(folder, "losses.csv")) as file:
                file.write(",".join(["epoch", *names]).encode() + b"\n")
                for epoch, losses in enumerate(epochs, start=1):
                    file.write(",".join([str(epoch), *map(repr, losses)]).encode() + b"\n")
        except (OSError, tf.errors.OpError) as error:
            raise UserError(f"--log_dir: can't write to {folder}: {error}") from None
        written = len(epochs)

    log()
    return log


def run(args):
    """Does what the command line asks for, from reading the data to the last line printed.

    Raises:
        UserError: as the functions above do.
    """
    if os.environ.get("KERAS_BACKEND"):
        check_backend(os.environ["KERAS_BACKEND"])
    group = find_group(args.distribute)
    if group.size > 1:
        print(f"Process {group.rank} of {group.size}; they meet at {group.address}")
        mute(speak=group.rank == 0)
    with contextlib.nullcontext() if group.rank else claim(args):
        learn(args, group)


def learn(args, group):
    """Does all of it as one process of a `Group`."""
    loaded = read_teachers(args)
    source, teachers = read_source(args), [teacher for teacher, _ in loaded]
    known = "".join(each.alphabet.symbols[1:] for each in (source, *teachers) if each)
    corpus = read_corpus(args, "".join(sorted(set(known))))
    metadata = describe(args, corpus, source, teachers)
    check_teachers(args, loaded, corpus, metadata["data"])
    training, held_out = split(corpus, args.validation_split)
    earlier = None if group.rank else find_earlier_run(args, metadata, len(held_out) > 0)
    check_size(args, corpus)
    say(
        f"Read {len(corpus):,} sequences, {np.count_nonzero(corpus.rows):,} characters, "
        f"an alphabet of {len(corpus.alphabet) - 1:,}, from {args.sequence_path}"
    )
    if source:
        added = len(corpus.alphabet) - len(source.alphabet)
        say(f"Starting from {args.init_from}, which gains {added:,} characters")
    if not corpus.complete.all():
        print(
            f"Cut to {metadata['max_len']} characters, because they were longer: "
            f"{np.count_nonzero(~corpus.complete):,} (--max_len)"
        )
    taught = f" sequences that {len(teachers)} models invent" if teachers else ""
    print(f"Learning from {len(training):,}{taught}, holding out {len(held_out):,} to validate")

    if earlier:
        metadata["history"], *earlier = earlier
    history = metadata["history"]
    try:
        if args.distribute:
            group.join()
            group.agree(metadata, epochs=args.epochs, patience=args.patience)
            history.update(json.loads(group.exchange(json.dumps(history))[0]))
            corpus = corpus.take_share(group.rank, group.size)
        done = len(history["loss"])
        if done >= args.epochs or (args.patience and epochs_since_best(history) >= args.patience):
            say(f"{args.save_path} is finished: it has learned for {done} epochs")
        else:
            group.lead(make_log_dir, args.log_dir)
            if done:
                say(f"Continuing {args.save_path} after epoch {done}")
            fit(args, metadata, corpus, training, held_out, source, teachers, earlier, group)
    except (Exception, KeyboardInterrupt) as error:
        if stop_requests:
            raise KeyboardInterrupt(explain_stop(args, history)) from None
        # As TensorFlow and JAX call it.
        if type(error).__name__ == "ResourceExhaustedError" or "RESOURCE_EXHAUSTED" in str(error):
            raise UserError(OUT_OF_MEMORY) from None
        raise

    kept = len(history["loss"]) - epochs_since_best(history)
    loss = (history["val_loss"] or history["loss"])[kept - 1]
    perplexity = math.exp(loss) if loss < 700 else math.inf
    kind = "validation loss" if history["val_loss"] else "loss"
    if teachers and not history["val_loss"]:
        kind = "loss against its teachers"
    say(
        f"{args.save_path} holds epoch {kept}: {kind} {loss:.4f} nats per character, "
        f"perplexity {perplexity:.4g}"
    )
    say(f"Sample from it: python sample.py --weights_path {quote(args.save_path)}")
    group.done = True


def say(text):
    """Prints a line that may hold the name of a file."""
    print(model.printable(text))


def quote(path):
    """Returns a str that a shell, and whoever copies it from a terminal, takes for a path."""
    if model.printable(path) == path:
        return shlex.quote(path)
    escaped = [
        chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}"
        for byte in os.fsencode(path)
    ]
    return f"$'{''.join(escaped)}'"  # which bash, zsh and POSIX shells since 2024 know


def explain_stop(args, history):
    """Returns what to tell the user who stopped the training after these losses."""
    kept = explain_kept(args, history)
    if not history["loss"]:
        return kept
    without = " without --overwrite" if args.overwrite else ""
    return f"{kept}; the same command{without} continues"


def explain_kept(args, history):
    """Returns what `--save_path` holds after these losses, a str."""
    return f"{args.save_path} keeps the last whole epoch" if history["loss"] else NOTHING_SAVED


def request_stop(signal_number, frame):
    """Handles what asks to stop: raises KeyboardInterrupt, and remembers that it did."""
    stop_requests.append(signal_number)
    raise KeyboardInterrupt(NOTHING_SAVED)


def main(arguments=None):
    """Runs the command line."""
    model.open_streams()
    # A name in Japanese must not stop a night's training under LANG=C.
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    parser, args = parse_arguments(arguments)
    if args.patience and not args.validation_split:
        parser.error(
            "--patience waits for a better validation loss, so it needs a "
            "--validation_split above 0"
        )
    model.catch_signals(request_stop)
    try:
        run(args)
    except UserError as error:
        parser.error(str(error))
    except OSError as error:  # reading and saving explain themselves; this is stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.error(f"can't print what happens: {error.strerror}; epochs that ended are kept")
    except MemoryError:
        parser.error(OUT_OF_MEMORY)
    except KeyboardInterrupt as stop:
        model.catch_signals(signal.SIG_IGN)  # it is stopping already
        with contextlib.suppress(OSError):  # of a closed terminal
            print("\n" + model.printable(f"Stopped: {stop}."), file=sys.stderr)
        sys.exit(128 + stop_requests[0])


if __name__ == "__main__":
    main()
