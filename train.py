"""Learns to write sequences like those in a file and saves what it learned as an `.h5`.

The flags → the data → an earlier run, if there is one → the batches → the network →
several devices → training by Keras's `fit` and its callbacks. `run`, near the end, is the
whole of it.
"""

import argparse
import contextlib
import ctypes
import gc
import hashlib
import importlib.util
import itertools
import json
import math
import os
import pathlib
import reprlib
import shlex
import signal
import statistics
import sys
import time
import typing
import warnings

import numpy as np

import model
from loaders import LOADERS, compose, find_loader
from model import CommandLine, SequenceModel, UserError, within

DESCRIPTION = "Learns to write sequences like those in a file and saves what it learned."
EXAMPLES = """examples:
  python train.py --sequence_path pre_trained_models/english_words_5000.txt
  python train.py --sequence_path pre_trained_models/user_names_10000.csv \\
      --units 64 --epochs 5 --save_path names.h5
  python train.py --sequence_path pre_trained_models/english_words_5000.txt \\
      --init_from names.h5 --save_path tuned.h5

The same command again continues an interrupted run; a larger --epochs extends a
finished one. Ctrl-C stops and keeps the run up to its last whole epoch.
"""
UNITS, LAYERS, SENTINEL = 128, 2, "\n"
# What makes two runs the same run, besides their data and network.
SETTINGS = (
    "dropout", "recurrent_dropout", "batch_size", "learning_rate", "validation_split", "seed"
)  # fmt: skip
SHOWN = 8  # sequences that are invented after each epoch
LINE_WIDTH = 100  # characters that are shown of each
LARGEST_NETWORK = 2**30  # weights; Adam and the best epoch take four times as many numbers
SEQUENCES_PER_ROW = 4  # with fewer, rows are less equally long; with more, products are too small
OPERATIONS_PER_DEVICE = 3 * 10**7  # of a batch: with fewer, dividing it gains nothing
BACKENDS = ("tensorflow", "jax")


# The flags


def parse_arguments(arguments=None):
    """Returns the parser and the parsed arguments (those of the process if None)."""
    parser = CommandLine(suggest_flag, prog="train.py", description=DESCRIPTION, epilog=EXAMPLES)

    data = parser.add_argument_group("data")
    data.add_argument(
        "--loader_class",
        metavar="CLASS",
        choices=LOADERS,
        help="SequenceLoader: one sequence per line; VocabularyLoader: English words, the most "
        "used first; UserNameLoader: a CSV's first column (default: by the file's name)",
    )
    data.add_argument(
        "--sequence_path",
        metavar="FILE",
        default="sequences.txt",
        help="what to learn",
    )
    data.add_argument("--sequences_path", dest="sequence_path", help=argparse.SUPPRESS)
    data.add_argument(
        "--num_sequences",
        metavar="N",
        type=within(int, 1, 10**12),
        help="read only the first N (default: all)",
    )
    data.add_argument(
        "--max_len",
        metavar="N",
        type=within(int, 1, model.LIMITS["max_len"]),
        help=f"cut to N characters (default: longest, up to {model.DEFAULT_MAX_LEN})",
    )
    data.add_argument(
        "--sentinel",
        metavar="CHAR",
        type=one_character,
        help=r"marks the end; in no sequence (default: \n)",
    )
    data.add_argument(
        "--validation_split",
        metavar="SHARE",
        type=within(float, 0, 0.9),
        default=0.1,
        help="held out to choose the best epoch",
    )

    network = parser.add_argument_group("network")
    network.add_argument(
        "--units",
        metavar="N",
        type=within(int, 1, model.LIMITS["units"]),
        help=f"width of each LSTM layer (default: {UNITS})",
    )
    network.add_argument(
        "--layers",
        metavar="N",
        type=within(int, 1, model.LIMITS["layers"]),
        help=f"LSTM layers (default: {LAYERS})",
    )
    network.add_argument(
        "--dropout",
        metavar="SHARE",
        type=within(float, 0, 0.9),
        default=0.3,
        help="share of outputs to drop",
    )
    network.add_argument(
        "--recurrent_dropout",
        metavar="SHARE",
        type=within(float, 0, 0.9),
        default=0.0,
        help="share of recurrent inputs to drop",
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--batch_size",
        metavar="N",
        type=within(int, 1, 2**20),
        default=32,
        help="sequences per update of the weights",
    )
    epochs = within(int, 1, 50_000)  # more losses would make the metadata too long
    training.add_argument(
        "--epochs", metavar="N", type=epochs, default=15, help="passes over the data, in total"
    )
    training.add_argument(
        "--learning_rate",
        metavar="RATE",
        type=within(float, 1e-9, 10),
        default=0.01,
        help="Adam's; decays to 0",
    )
    training.add_argument(
        "--patience",
        metavar="N",
        type=epochs,
        help="stop N epochs after the best one (default: never)",
    )
    training.add_argument(
        "--seed",
        metavar="N",
        type=within(int, 0, 2**32 - 1),
        default=0,
        help="a different seed gives a different model",
    )
    training.add_argument(
        "--distribute",
        action="store_true",
        help="use all GPUs or hosts; needs KERAS_BACKEND=jax",
    )

    files = parser.add_argument_group("files")
    files.add_argument(
        "--save_path", metavar="FILE", default="incognito_model.h5", help="the model"
    )
    files.add_argument("--init_from", metavar="FILE", help="a model to start from (default: none)")
    files.add_argument(
        "--log_dir",
        metavar="DIR",
        help="for losses.csv and TensorBoard (default: none)",
    )
    files.add_argument("--overwrite", action="store_true", help="start over if --save_path exists")
    args = parser.parse_args(arguments)
    if args.patience and not args.validation_split:
        parser.error(
            "--patience waits for a better validation loss, so it needs a "
            "--validation_split above 0"
        )
    return parser, args


def suggest_flag(word):
    """Returns what to write for a word, a str, that no flag stands before."""
    if word.endswith(".h5"):
        return (
            f"--init_from {word} to start from a model, or --save_path {word} to name the new one"
        )
    return f"--sequence_path {word}"


def one_character(text):
    """The `argparse` type of `--sentinel`, which takes the escapes of Python."""
    character = text
    if text.startswith("\\") and text.isascii():
        missing = UnicodeDecodeError, DeprecationWarning  # of an escape that doesn't exist
        with contextlib.suppress(*missing), warnings.catch_warnings():
            warnings.simplefilter("error")
            character = text.encode().decode("unicode_escape")
    character = compose(character)
    if len(character) != 1 or "\ud800" <= character <= "\udfff":
        points = ", ".join(f"U+{ord(point):04X}" for point in character[:8]) or "none"
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a single character, but {len(character)} code points: {points}"
        )
    return character


def check_flags(args):
    """Raises a `UserError`, before anything is read or imported, if the flags can't work."""
    if args.distribute and os.environ.get("KERAS_BACKEND") != "jax":
        raise UserError(
            "--distribute: needs Keras on JAX: pip install jax, and set KERAS_BACKEND=jax"
        )
    if os.environ.get("KERAS_BACKEND"):
        check_backend(os.environ["KERAS_BACKEND"])
    inputs = ("--sequence_path", args.sequence_path), ("--init_from", args.init_from)
    model.check_target("--save_path", args.save_path, inputs)


# The data


class Data(typing.NamedTuple):
    """What there is to learn from.

    Attributes:
        corpus: `model.Corpus`.
        training: int32 array, the indices of the sequences to learn.
        held_out: int32 array, those of the sequences to validate with.
        loader: what read them, of one of the classes in `LOADERS`.
    """

    corpus: model.Corpus
    training: np.ndarray
    held_out: np.ndarray
    loader: object


def read_source(args):
    """Returns the `SequenceModel` at `--init_from`, and fills in the flags that depend on it."""
    source, defaults = None, {"units": UNITS, "layers": LAYERS, "sentinel": SENTINEL}
    if args.init_from is not None:
        with model.reading("--init_from", args.init_from, "the path of a model"):
            source, metadata = model.load(args.init_from)
        defaults = {**metadata, "sentinel": source.alphabet.sentinel}
        for name in ("units", "layers"):
            if getattr(args, name) not in (None, defaults[name]):
                raise UserError(f"--{name}: {args.init_from} has {defaults[name]}; omit the flag")
        if args.sentinel is not None and args.sentinel in source.alphabet.symbols[1:]:
            raise UserError(
                f"--sentinel: {args.init_from} already uses {args.sentinel!r} as a character; "
                f"omit the flag to keep its sentinel, {defaults['sentinel']!r}"
            )
    for name in ("units", "layers", "sentinel"):
        if getattr(args, name) is None:
            setattr(args, name, defaults[name])
    return source


def read_data(args, source):
    """Reads the sequences and chooses those that are held out: returns `Data`.

    Their alphabet has the characters of the `SequenceModel` `source` too, if
    that is not None.
    """
    loader_class = find_loader(args.sequence_path, args.loader_class)
    loader = loader_class(args.sequence_path, max_sequences=args.num_sequences)
    characters = source.alphabet.symbols[1:] if source else ""
    sequences, clashes = [], []
    with model.reading("--sequence_path", args.sequence_path, "a file with your sequences"):
        for sequence in loader:
            sequences.append(sequence)
            if args.sentinel in sequence:
                clashes.append(loader.line)
        if clashes:
            raise ValueError(explain_clash(args, clashes, set(characters).union(*sequences)))
        corpus = model.build_corpus(sequences, args.sentinel, args.max_len, characters)
    return Data(corpus, *split(corpus, args.validation_split), loader)


def explain_clash(args, lines, used):
    """Returns the message for sequences that contain the sentinel, a str.

    `lines` is a list of their lines in the file, `used` the set of all
    characters there.
    """
    free = next(
        symbol
        for symbol in itertools.chain(" |~^_", map(chr, range(33, 0x110000)))
        if symbol not in used and model.printable(symbol) == symbol
    )
    return (
        f"{args.sequence_path}, line {lines[0]}: the sequence contains the sentinel "
        f"{args.sentinel!r} ({len(lines):,} sequences do); pass a character that none contains, "
        f"such as --sentinel {shlex.quote(free)}"
    )


def split(corpus, fraction):
    """Chooses the sequences that are held out to validate.

    Equal sequences all go to the same side. The choice is random but always
    the same, so that runs with different seeds compare.

    Args:
        corpus: `model.Corpus`.
        fraction: float, the share of the distinct sequences to hold out.

    Returns:
        Tuple `(training, held_out)` of two int32 arrays, the indices of their
        sequences. The second is empty if that share rounds to none; the
        first never is.
    """
    distinct, kinds = np.unique(as_bytes(corpus.rows), return_inverse=True)
    count = min(round(fraction * len(distinct)), len(distinct) - 1)
    chosen = np.random.default_rng(0).permutation(len(distinct))[:count]
    held_out = np.isin(kinds, chosen)
    indices = np.arange(len(kinds), dtype=np.int32)
    return indices[~held_out], indices[held_out]


def as_bytes(rows):
    """Returns a view of each row as one value, which NumPy sorts and compares much faster."""
    return rows.view(f"V{rows[0].nbytes}").ravel()


def count_characters(corpus, indices):
    """Counts the targets of sequences, an int array of indices: returns an array by id."""
    counts = sum(
        np.bincount(column[indices], minlength=len(corpus.alphabet)) for column in corpus.rows.T
    )
    counts[0] = np.count_nonzero(corpus.complete[indices])  # the padding is no target
    return counts


def describe(args, data, source):
    """Returns the metadata of a run that has not begun: a dict for `model.save`."""
    corpus = data.corpus
    fingerprint = hash_bytes(corpus.alphabet.symbols.encode(), corpus.rows, corpus.complete)
    return {
        "alphabet": corpus.alphabet.symbols,
        "max_len": corpus.max_len,
        "units": args.units,
        "layers": args.layers,
        "loader_class": type(data.loader).__name__,
        "data": {"sequences": len(corpus), "sha256": fingerprint},
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "init_from": source and hash_bytes(*source.weights),
        "epochs": args.epochs,
        "history": {"loss": [], "val_loss": []},
    }


def check_data(args, data):
    """Raises a `UserError` if the flags don't suit the data."""
    if args.patience and not len(data.held_out):
        raise UserError(
            f"--patience: {args.validation_split} of {len(data.corpus):,} sequences leaves none to "
            "validate with; omit --patience or raise --validation_split"
        )
    shapes = model.weight_shapes(len(data.corpus.alphabet), args.units, args.layers).values()
    count = sum(map(math.prod, shapes))
    if count > LARGEST_NETWORK:
        raise UserError(
            f"{args.layers:,} layers of {args.units:,} units are {count:,} parameters, over "
            f"{LARGEST_NETWORK:,}; lower --units or --layers"
        )


def hash_bytes(*parts):
    """Returns the SHA-256, a str, of bytes and arrays, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


# An earlier run


def read_earlier_run(args, metadata, validated):
    """Reads the run at `--save_path` and checks that it is this one.

    Args:
        args: the command line.
        metadata: this run's, from `describe`.
        validated: bool, whether there is anything to validate with.

    Returns:
        Tuple `(history, weights, state)`: the losses so far, the best weights
        and the training state.

    Raises:
        UserError: if training must not replace what is there.
    """
    path = args.save_path
    ways_out = "--overwrite to start over, or another --save_path"
    with model.reading("--save_path", path, ways_out):
        try:
            best, found = model.load(path)
            state = model.load_training_state(path)
        except ValueError as error:
            raise ValueError(f"{error}; pass {ways_out}") from None
    difference = find_difference(found, metadata)
    if difference:
        if difference.startswith("other data"):
            ways_out += f", with --init_from {path} to learn from what it knows"
        raise UserError(f"--save_path: {path} was trained with {difference}; pass {ways_out}")
    history = found.get("history")
    if not (state and is_history(history, validated)):
        raise UserError(
            f"--save_path: {path} holds a model without the state needed to continue; "
            f"pass {ways_out}"
        )
    if found["format"] < model.FORMAT and not is_finished(args, history):
        raise UserError(
            f"--save_path: {path} was begun by an earlier version of train.py, which took its "
            f"batches in another order; pass {ways_out}"
        )
    return history, best.weights, state


def find_difference(found, metadata):
    """Returns what another run was trained with that differs, a str, or None for the same run.

    What counts is what the flags mean, not how they were typed. Both are
    metadata, the other run's as `model.load` returns it.
    """
    if found["alphabet"][0] != metadata["alphabet"][0]:
        return f"--sentinel {found['alphabet'][0]!r}, not {metadata['alphabet'][0]!r}"
    if found.get("init_from") != metadata["init_from"]:
        return "another --init_from"
    # Before the settings, since a short list bounds the batch size.
    if found.get("data") != metadata["data"]:
        return "other data (--sequence_path, --num_sequences, --max_len)"
    settings = found.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    sizes = ("units", "layers", "max_len")
    then = {**settings, **{name: found[name] for name in sizes}}
    now = {**metadata["settings"], **{name: metadata[name] for name in sizes}}
    for name, value in now.items():
        if then.get(name) != value:
            return f"--{name} {reprlib.repr(then.get(name))}, not {value!r}"
    return None


def is_history(value, validated):
    """Returns whether a value from a file's metadata is a history of (validated) losses."""
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


def is_finished(args, history):
    """Returns whether a run with these losses so far has nothing left to do."""
    patient = not args.patience or epochs_since_best(history) < args.patience
    return len(history["loss"]) >= args.epochs or not patient


# The batches


class Plan(typing.NamedTuple):
    """How sequences are grouped into batches, and these into stacks, which `fit` takes one by one.

    Attributes:
        batch_size: int, sequences of a batch at most.
        rows: int, how many rows a batch is packed into.
        depth: int, batches of a stack: enough that what a call costs in
            Python is lost in the work, and few enough that progress and
            Ctrl-C are not kept waiting.
    """

    batch_size: int
    rows: int
    depth: int


def count_operations(args, corpus):
    """Returns how many operations learning from a sequence takes on average, an int."""
    parameters = 4 * args.units * (len(corpus.alphabet) + (2 * args.layers - 1) * args.units)
    # A multiplication and an addition each; twice that in the backward pass.
    return 6 * parameters * math.ceil(corpus.lengths.mean())


def plan_stacks(args, corpus, count, batch_size, packed):
    """Returns a `Plan` for `count` sequences; `packed` tells whether rows may hold several."""
    batch_size = min(batch_size, count)
    operations = count_operations(args, corpus) * batch_size
    depth = max(1, min(64, math.ceil(count / batch_size), 2 * 10**11 // operations))
    rows = math.ceil(batch_size / SEQUENCES_PER_ROW) if packed else batch_size
    return Plan(batch_size, rows, depth)


def make_stacks(corpus, chosen, plan, seed=None, devices=1):
    """Groups sequences into batches, packs each batch into rows, and stacks the batches.

    Args:
        corpus: `model.Corpus`.
        chosen: int array, the indices of the sequences to take.
        plan: `Plan`.
        seed: what `numpy.random.default_rng` takes, to shuffle the sequences;
            None groups them the same way each time.
        devices: int, the number of rows is rounded up to a multiple of this.

    Yields:
        Tuple `(ids, positions)` of arrays `(rows, depth, steps)`, of the type of
        `corpus.rows` and int32: along the second axis, one batch after another
        as `model.total_loss` takes them. A stack that is not full ends in zeros.

    Example, six sequences in batches of three, each in two rows:

    >>> corpus = model.build_corpus(["a", "bb", "ccc", "d", "ee", "fff"])
    >>> [(ids, positions)] = make_stacks(corpus, np.arange(6), Plan(3, 2, depth=2))
    >>> ids[:, 0]  # the first batch: "ccc", and below it "bb" and "a"
    array([[3, 3, 3, 0, 0, 0, 0, 0],
           [2, 2, 0, 1, 0, 0, 0, 0]], dtype=uint8)
    >>> positions[:, 0]
    array([[1, 2, 3, 4, 0, 0, 0, 0],
           [1, 2, 3, 1, 2, 0, 0, 0]], dtype=int32)
    """
    batch_size, rows, depth = plan
    batches = deal(corpus.lengths, chosen, batch_size, seed)
    for start in range(0, len(batches), depth):
        stack = [pack(corpus.lengths, batch, rows) for batch in batches[start : start + depth]]
        steps = max(end for places in stack for *_, end in places)
        # Rounded up, because each new shape is compiled anew.
        shape = math.ceil(rows / devices) * devices, depth, math.ceil(steps / 4) * 4
        ids, positions = np.zeros(shape, corpus.rows.dtype), np.zeros(shape, np.int32)
        for batch, places in enumerate(stack):
            for sequence, row, begin, end in places:
                text = corpus.rows[sequence, : end - begin]  # the end mark, 0, may lie beyond
                ids[row, batch, begin : begin + len(text)] = text
                positions[row, batch, begin:end] = np.arange(1, end - begin + 1)
        yield ids, positions


def deal(lengths, chosen, batch_size, seed):
    """Deals sequences out to batches so that each gets long and short ones alike.

    Each batch gets one of the shortest sequences, one of the next shortest, and
    so on, which one is random unless the seed is None. So all have nearly the
    same number of characters and need the same number of steps. None has more
    than `batch_size` sequences, or two fewer than another. Returns a list of
    lists of indices, the shortest sequence of each batch first.
    """
    rng = np.random.default_rng(seed)
    order = chosen if seed is None else rng.permutation(chosen)
    order = order[np.argsort(lengths[order], kind="stable")]
    count = math.ceil(len(order) / batch_size)
    missing = np.full(count * batch_size - len(order), -1)
    order = np.concatenate([missing, order]).reshape(batch_size, count)
    order = order if seed is None else rng.permuted(order, axis=1)
    return [batch[batch >= 0].tolist() for batch in order.T]


def pack(lengths, batch, rows):
    """Puts each sequence of a batch, the longest first, into the row that is shortest so far.

    So the rows get about equally long, and little of a batch is padding.
    Returns a list of tuples `(sequence, row, begin, end)`.
    """
    ends, places = [0] * rows, []
    for sequence in reversed(batch):
        begin = min(ends)
        row = ends.index(begin)
        ends[row] = begin + int(lengths[sequence])
        places.append((sequence, row, begin, ends[row]))
    return places


# The network


def check_backend(name):
    """Raises a `UserError` if the backend of Keras with that name, a str, can't be used."""
    if name not in BACKENDS:
        raise UserError(
            f"KERAS_BACKEND: {name!r} is not supported; set it to {' or '.join(BACKENDS)}"
        )
    if importlib.util.find_spec(name) is None:
        raise UserError(f"KERAS_BACKEND: {name} is not installed: pip install {name}")


def keep_memory():
    """Makes glibc keep what is freed.

    An XLA program takes its memory anew at each call, and so does each matrix
    product. Given back to the system each time, it costs up to half of the
    speed in page faults.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # where there is no glibc
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_max = -1, -4  # in malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


@contextlib.contextmanager
def quiet():
    """Hides what TensorFlow writes to stderr before any log level applies."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def import_keras():
    """Imports Keras and wakes its backend."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if os.environ.get("KERAS_BACKEND") != "jax":  # which may have a GPU to compile for
        # It compiles in two thirds of the time, to programs that are as fast.
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")
    keep_memory()
    # Imported objects live to the end; letting the garbage collector scan them again and
    # again takes a third of the import's time.
    gc.disable()
    try:
        with quiet():
            import keras

            if keras.backend.backend() == "tensorflow":
                keras.distribution.list_devices()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"Keras can't start: {reason}; reinstall with pip install -r requirements.txt, or "
            "check which backend ~/.keras/keras.json and KERAS_BACKEND name"
        ) from None
    gc.freeze()
    gc.enable()
    check_backend(keras.backend.backend())
    keras.config.set_floatx("float32")  # whatever keras.json says


def import_tensorflow():
    """Imports TensorFlow before Keras does so on JAX, where it would be noisy."""
    with quiet():
        import tensorflow  # noqa: F401


def make_tensorflow_network(layers, scale, packed):
    """Makes a network that learns from a stack of batches in each step of `fit`.

    Args:
        layers: list of Keras layers, as `model.build_layers` returns it.
        scale: float, what an optimizer step multiplies the sum of losses by.
        packed: bool, whether rows hold several sequences each in training,
            which XLA then compiles; in validation they hold one each.

    Returns:
        A `keras.Sequential` for `fit` on what `make_stacks` yields. Its loss
        is in nats per character or end mark.
    """
    import keras
    import tensorflow as tf

    mean_loss = keras.metrics.Mean("loss")

    class Network(keras.Sequential):
        metrics = property(lambda self: [mean_loss])

        @tf.function(jit_compile=packed, reduce_retracing=True, autograph=False)
        def train_step(self, stack):
            return self.sum_losses(stack, self.learn_batch)

        def test_step(self, stack):
            return self.sum_losses(stack, self.batch_loss)

        def learn_batch(self, batch):
            with tf.GradientTape() as tape:
                loss = self.batch_loss(batch, training=True)
                scaled = loss * scale
            gradients = tape.gradient(scaled, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            return loss

        def batch_loss(self, batch, training=False):
            return model.total_loss(self, *batch, packed and training, training)

        def sum_losses(self, stack, of_batch):
            def add_next(index, total):
                return index + 1, total + of_batch([array[:, index] for array in stack])

            batches, targets = count_targets(stack)
            total = tf.while_loop(lambda index, _: index < batches, add_next, (0, 0.0))[1]
            mean_loss.update_state(total / targets, targets)
            return {"loss": mean_loss.result()}

    return Network(layers)


def make_jax_network(layers, scale, packed):
    """Makes the same as `make_tensorflow_network` on JAX, validated with packed rows too."""
    import jax
    import keras

    mean_loss = keras.metrics.Mean("loss")

    class Network(keras.Sequential):
        metrics = property(lambda self: [mean_loss])

        def train_step(self, state, stack):
            gradient = jax.grad(self.batch_loss, has_aux=True)

            def learn_next(index, carry):
                trainable, others, slots, total = carry
                gradients, (loss, others) = gradient(trainable, others, stack, index, True)
                trainable, slots = self.optimizer.stateless_apply(slots, gradients, trainable)
                return trainable, others, slots, total + loss

            *state, metrics = state
            batches, targets = count_targets(stack)
            *state, total = jax.lax.fori_loop(0, batches, learn_next, (*state, 0.0))
            logs, metrics = self.report(metrics, total, targets)
            return logs, (*state, metrics)

        def test_step(self, state, stack):
            trainable, others, metrics = state

            def add_next(index, total):
                return total + self.batch_loss(trainable, others, stack, index, False)[1][0]

            batches, targets = count_targets(stack)
            total = jax.lax.fori_loop(0, batches, add_next, 0.0)
            logs, metrics = self.report(metrics, total, targets)
            return logs, (trainable, others, metrics)

        def batch_loss(self, trainable, others, stack, index, training):
            variables = self.trainable_variables + self.non_trainable_variables
            with keras.StatelessScope(zip(variables, [*trainable, *others])) as scope:
                batch = [array[:, index] for array in stack]
                loss = model.total_loss(self, *batch, packed, training)
                others = [scope.get_current_value(each) for each in self.non_trainable_variables]
            return loss * scale, (loss, others)

        def report(self, metrics, total, targets):
            metrics = mean_loss.stateless_update_state(metrics, total / targets, targets)
            return {"loss": mean_loss.stateless_result(metrics)}, metrics

    return Network(layers)


def count_targets(stack):
    """Returns how many batches of a stack are not empty, an int tensor, and its targets, float32.

    The empty ones come last.
    """
    from keras import ops

    targets = ops.sum(ops.cast(stack[1] > 0, "int32"), axis=(0, 2))
    return ops.sum(ops.cast(targets > 0, "int32")), ops.cast(ops.sum(targets), "float32")


def learns_by_hand(args):
    """Returns whether training goes through `model.run_lstm`, which on TensorFlow needs XLA.

    That is faster on a CPU, except on TensorFlow with large batches, for which
    its own products use all cores. On a GPU an LSTM is one call of cuDNN, which
    doesn't support recurrent dropout and can't be divided among devices.
    """
    import keras

    on_cpu = "cpu" in keras.distribution.list_devices()[0]
    faster = on_cpu and (keras.backend.backend() == "jax" or args.batch_size <= 128)
    return faster or args.recurrent_dropout > 0 or args.distribute


def prepare_network(args, data, source):
    """Builds and compiles the network, with the weights that `initial_weights` gives."""
    import keras

    backend, devices = keras.backend.backend(), keras.distribution.list_devices()
    by_hand = learns_by_hand(args)
    layers = model.build_layers(
        len(data.corpus.alphabet),
        args.units,
        args.layers,
        args.dropout,
        args.recurrent_dropout,
        args.seed,
        by_hand,
    )
    # Every target weighs the same, whichever batch it is in.
    scale = float(1 / (args.batch_size * data.corpus.lengths[data.training].mean()))
    make_network = make_jax_network if backend == "jax" else make_tensorflow_network
    network = make_network(layers, scale, packed=by_hand)
    steps = args.epochs * math.ceil(len(data.training) / args.batch_size)
    rate = keras.optimizers.schedules.CosineDecay(args.learning_rate, steps)
    adam = keras.optimizers.Adam(rate, global_clipnorm=1.0)
    network.compile(adam, jit_compile=backend == "jax")
    network.optimizer.build(network.trainable_variables)
    network.set_weights(initial_weights(network.get_weights(), data, source))
    print(
        f"Network: {args.layers} × LSTM({args.units}), {network.count_params():,} parameters, "
        f"trained by Keras on {backend}, {', '.join(devices)}"
    )
    return network


def initial_weights(weights, data, source):
    """Returns the weights to start from, a list of float32 arrays.

    They are random ones, `weights`, that know how frequent each character of
    the training data is, or what the `SequenceModel` `source` knows.
    """
    # A better start than zeros; what is never a target (the end, if all were cut) stays rare.
    counts = count_characters(data.corpus, data.training)
    weights[-1] = np.log((counts + 0.5) / counts.sum())
    return extend_weights(weights, data.corpus.alphabet, source) if source else weights


def extend_weights(weights, alphabet, source):
    """Gives a model's weights room for an alphabet that holds more than its own.

    Characters that the model knows keep their odds among each other after
    any beginning, since a softmax keeps the ratios of the others when one is
    added.

    Args:
        weights: list of float32 arrays, as `get_weights()` gives them, of a
            network of that alphabet whose last bias is the logarithm of each
            character's frequency: what new characters start from.
        alphabet: `Alphabet`, with at least the characters of the model's.
        source: `SequenceModel`.

    Returns:
        List of float32 arrays, of the shapes of `weights`.
    """
    kept = np.array([0, *alphabet.encode(source.alphabet.symbols[1:])])
    old, *lstm, dense, bias = source.weights
    kernel = weights[0].copy()
    kernel[kept] = old
    extended = np.zeros_like(weights[-2])
    extended[:, kept] = dense
    highest = bias.max().astype(np.float64)
    offsets = weights[-1] + highest + np.log(np.exp(bias - highest).sum())
    offsets[kept] = bias
    return [kernel, *lstm, extended, offsets.astype(np.float32)]


# Several cores, devices and hosts


def count_cores():
    """Returns how many cores this process may use, an int."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/cpu.max") as file:
        quota, period = map(int, file.read().split())
        cores = min(cores, max(1, quota // period))
    return cores


def use_cores(args, data):
    """Gives each usable core a device, so that Keras on JAX divides batches among them.

    Within a device XLA keeps to about one core. Small batches get fewer devices,
    each at least two rows.
    """
    import jax
    import keras

    operations = count_operations(args, data.corpus) * args.batch_size
    rows = plan_stacks(args, data.corpus, len(data.training), args.batch_size, packed=True).rows
    count = max(1, min(count_cores(), rows // 2, operations // OPERATIONS_PER_DEVICE))
    # So that no rows are added: what dropout draws must not depend on the number of cores.
    count = max(divisor for divisor in range(1, count + 1) if rows % divisor == 0)
    if count > 1:
        jax.config.update("jax_num_cpu_devices", count)
        if "cpu" in keras.distribution.list_devices()[0]:
            divide_batches()


def divide_batches():
    """Makes Keras divide each batch among all devices."""
    import keras

    data_parallel = keras.distribution.DataParallel(auto_shard_dataset=False)
    keras.distribution.set_distribution(data_parallel)


def join_group(args, metadata):
    """Makes Keras divide each batch among all devices of all processes of a group.

    Returns which process this is, and of how many: a tuple of two int.
    """
    import_keras()
    import jax
    import keras
    from jax.experimental import multihost_utils

    import_tensorflow()  # which seeding imports
    try:
        if os.environ.get("KERAS_DISTRIBUTION_JOB_ADDRESSES"):
            # Gloo writes its peers' names straight to file descriptor 1.
            sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, errors="backslashreplace")
            model.discard(sys.__stdout__)
            keras.distribution.initialize()
        divide_batches()
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"--distribute: {reason}; check the KERAS_DISTRIBUTION_… variables on every host"
        ) from None
    model.catch_signals()  # JAX has taken SIGTERM
    digest = hash_bytes(json.dumps([metadata, args.patience]).encode())
    try:
        multihost_utils.assert_equal(np.frombuffer(digest.encode(), np.uint8))
    except AssertionError:
        raise UserError(
            "--distribute: the processes differ in their flags or data; start them all with the "
            "same command"
        ) from None
    if jax.process_index() > 0:
        print(f"Process {jax.process_index()} of {jax.process_count()}; process 0 prints the rest")
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    return jax.process_index(), jax.process_count()


def broadcast_history(history):
    """Returns process 0's history in every process of a group."""
    from jax.experimental.multihost_utils import broadcast_one_to_all

    text = np.frombuffer(json.dumps(history).encode(), np.uint8)
    size = int(broadcast_one_to_all(np.int32(len(text))))
    return json.loads(bytes(broadcast_one_to_all(np.resize(text, size))))


# Training


def set_variables(args, variables, state):
    """Sets Keras variables to an earlier run's state, if any, and alike in all processes."""

    def kind(array):
        # Which integers Keras counts in depends on the backend.
        return tuple(array.shape), "int" if "int" in str(array.dtype) else str(array.dtype)

    if state and list(map(kind, state)) != list(map(kind, variables)):
        raise UserError(
            f"--save_path: {args.save_path} was trained with a version of Keras whose "
            "runs this one can't continue; pass --overwrite to start over, or another --save_path"
        )
    if not (state or args.distribute):
        return
    values = [np.asarray(value, each.dtype) for value, each in zip(state or variables, variables)]
    if args.distribute:
        from jax.experimental.multihost_utils import broadcast_one_to_all

        values = broadcast_one_to_all(values)
    for variable, value in zip(variables, values):
        variable.assign(value)


def make_data(args, data, first_epoch, rank, processes):
    """Returns the keyword arguments of `fit` that concern the data.

    The data are endless; the numbers of steps say where an epoch ends.
    """
    import keras

    backend = keras.backend.backend()
    devices = len(keras.distribution.list_devices()) if keras.distribution.distribution() else 1

    def share(array):
        size = len(array) // processes
        return array[rank * size : (rank + 1) * size]

    def feed(chosen, shuffle, batch_size, packed):
        plan = plan_stacks(args, data.corpus, len(chosen), batch_size, packed)

        def generate():
            for epoch in itertools.count(first_epoch):
                seed = (args.seed, epoch) if shuffle else None
                for stack in make_stacks(data.corpus, chosen, plan, seed, devices):
                    yield tuple(map(share, stack))

        stacks = generate()
        if backend == "tensorflow":
            stacks = as_dataset(stacks)
        return stacks, math.ceil(len(chosen) / plan.batch_size / plan.depth)

    arguments = {}
    packed = learns_by_hand(args)
    arguments["x"], arguments["steps_per_epoch"] = feed(
        data.training, True, args.batch_size, packed
    )
    if len(data.held_out):
        # On TensorFlow, compiling the forward pass would take longer than it saves.
        packed, batch_size = packed and backend == "jax", max(256, args.batch_size)
        arguments["validation_data"], arguments["validation_steps"] = feed(
            data.held_out, False, batch_size, packed
        )
    return arguments


def as_dataset(stacks):
    """Makes a `tf.data.Dataset` of what `make_stacks` yields."""
    import tensorflow as tf

    first = next(stacks)
    signature = tuple(tf.TensorSpec([*array.shape[:2], None], array.dtype) for array in first)
    stacks = itertools.chain([first], stacks)
    # Not prefetched: at Ctrl-C, Python and the thread that does it can wait for each other forever.
    data = tf.data.Dataset.from_generator(lambda: stacks, output_signature=signature)
    options = tf.data.Options()
    options.autotune.enabled = False  # its thread can take two seconds to end
    return data.with_options(options)


def make_callbacks(args, metadata, best, leads, teller):
    """Returns the Keras callbacks, a list, in the order in which they must run.

    Args:
        args: the command line.
        metadata: this run's, from `describe`; its history grows.
        best: list of arrays, the weights of the best epoch so far, or None.
        leads: bool, whether this process of a group writes.
        teller: the last of them, from `make_teller`.
    """
    from keras.callbacks import CSVLogger, ProgbarLogger, TensorBoard, TerminateOnNaN

    callbacks = [TerminateOnNaN(), make_saver(args, metadata, best, leads)]
    if args.log_dir is not None and leads:
        continues = bool(metadata["history"]["loss"])
        with model.writing("--log_dir", args.log_dir):
            os.makedirs(args.log_dir, exist_ok=True)
            if not continues:  # TensorBoard would draw an earlier run into this one
                for part in ("train", "validation"):
                    for old in pathlib.Path(args.log_dir, part).glob("events.out.tfevents.*"):
                        old.unlink()
        callbacks.append(CSVLogger(os.path.join(args.log_dir, "losses.csv"), append=continues))
        import_tensorflow()
        callbacks.append(TensorBoard(args.log_dir, write_graph=False))
    # The bar must end before anything else is printed.
    return [*callbacks, ProgbarLogger(), teller]


def make_saver(args, metadata, best, leads):
    """Makes the callback that saves, and stops a run that diverged or has nothing left to do."""
    from keras.callbacks import Callback

    history = metadata["history"]

    class Saver(Callback):
        best_weights = best

        def on_epoch_end(self, epoch, logs):
            weights = self.model.get_weights()
            variables = self.model.variables + self.model.optimizer.variables
            state = [np.asarray(each) for each in variables]
            if not (
                all(map(math.isfinite, logs.values()))
                and all(model.is_within(array, model.LARGEST_WEIGHT) for array in weights)
                and all(np.isfinite(array).all() for array in state)
            ):
                raise UserError(
                    f"the loss of epoch {epoch + 1} or a weight is NaN or too large; "
                    f"{explain_kept(args, history)}; try a --learning_rate below "
                    f"{args.learning_rate}, in another --save_path or with --overwrite"
                )
            # Until it is saved, `history` must not claim this epoch.
            added = {name: [*history[name], loss] for name, loss in logs.items()}
            grown = {**history, **added}
            if epochs_since_best(grown) == 0:
                self.best_weights = weights
            if leads:
                saved = {**metadata, "history": grown}
                with model.writing("--save_path", args.save_path):
                    model.save(args.save_path, self.model, self.best_weights, saved, state)
            history.update(grown)
            self.model.stop_training = is_finished(args, history)

    return Saver()


def make_teller(args, data):
    """Makes the callback that says how an epoch went and what the network invents now."""
    from keras.callbacks import Callback

    class Teller(Callback):
        def on_train_begin(self, logs):
            self.speeds = []
            print("Compiling, which takes a few seconds", flush=True)

        def on_epoch_begin(self, epoch, logs):
            self.start = time.perf_counter()

        def on_train_batch_end(self, batch, logs):
            self.seconds = time.perf_counter() - self.start  # without validation and saving

        def on_epoch_end(self, epoch, logs):
            self.speeds.append(len(data.training) / self.seconds)
            if not sys.stdout.isatty():  # on a terminal, Keras's bar has shown this
                losses = " - ".join(f"{name}: {loss:.4f}" for name, loss in logs.items())
                speed = f"{self.speeds[-1]:,.0f} sequences/s"
                print(f"Epoch {epoch + 1}/{args.epochs} - {losses} - {speed}")
            corpus = data.corpus
            current = SequenceModel(corpus.alphabet, corpus.max_len, self.model.get_weights())
            show_invented(current, data, (args.seed, epoch))

    return Teller()


def show_invented(trained, data, seed):
    """Prints sequences that a `SequenceModel` invents, grouped by where they occur in the data."""
    groups = {"new": [], "held out": [], "learned": []}
    for text in trained.sample(count=SHOWN, seed=seed):
        groups[find_place(data, text)].append(model.printable(text)[:LINE_WIDTH])
    for name, texts in groups.items():
        if texts:
            short = sum(map(len, texts)) <= 2 * LINE_WIDTH
            print(f"invented, {name}: " + ("  " if short else "\n  ").join(texts))


def find_place(data, text):
    """Returns where in `Data` a text occurs, a str: "learned", "held out" or, if not, "new"."""
    row = np.zeros_like(data.corpus.rows[:1])
    with contextlib.suppress(ValueError):  # the text is longer, or has other characters
        row[0, : len(text)] = data.corpus.alphabet.encode(text)
    places = np.flatnonzero(as_bytes(data.corpus.rows) == as_bytes(row))
    if not len(places):
        return "new"
    return "held out" if np.isin(places[0], data.held_out) else "learned"


def run(args):
    """Does what the command line asks for, from reading the data to the last line printed."""
    check_flags(args)
    source = read_source(args)
    data = read_data(args, source)
    check_data(args, data)
    args.batch_size = min(args.batch_size, len(data.training))
    metadata = describe(args, data, source)
    history, best, state, group = metadata["history"], None, None, (0, 1)
    # In a group only process 0 reads and writes the file.
    several = args.distribute and os.environ.get("KERAS_DISTRIBUTION_JOB_ADDRESSES")
    leads = not several or os.environ.get("KERAS_DISTRIBUTION_PROCESS_ID", "0") == "0"
    if leads and not args.overwrite and os.path.exists(args.save_path):
        history, best, state = read_earlier_run(args, metadata, len(data.held_out) > 0)
    if args.distribute:
        group = join_group(args, metadata)  # which compares the metadata, so without a history
        history = broadcast_history(history)
    metadata["history"] = history
    tell_what_was_read(args, data, source)
    done, speed = len(history["loss"]), None
    if is_finished(args, history):
        say(f"The run in {args.save_path} is finished, after {done} epochs")
    else:
        if done:
            say(f"Continuing {args.save_path} after epoch {done}")
        try:
            speed = fit(args, data, source, metadata, best, state, group)
        except KeyboardInterrupt as stop:
            kept = explain_kept(args, history)
            if history["loss"]:
                without = " without --overwrite" if args.overwrite else ""
                kept += f"; the same command{without} continues"
            raise KeyboardInterrupt(stop.args[0], kept) from None
    tell_what_was_learned(args, data, history, speed)


def fit(args, data, source, metadata, best, state, group):
    """Trains: builds the network, sets it to an earlier run's state and calls Keras's `fit`.

    Returns the sequences per second of the median epoch, a float.
    """
    import_keras()
    import keras

    if keras.backend.backend() == "jax" and not args.distribute:
        use_cores(args, data)
    done, (rank, processes) = len(metadata["history"]["loss"]), group
    teller = make_teller(args, data)
    callbacks = make_callbacks(args, metadata, best, rank == 0, teller)
    network = prepare_network(args, data, source)
    set_variables(args, network.variables + network.optimizer.variables, state)
    network.fit(
        **make_data(args, data, done, rank, processes),
        initial_epoch=done,
        epochs=args.epochs,
        callbacks=callbacks,
        verbose=1 if sys.stdout.isatty() else 0,
        shuffle=False,
    )
    return statistics.median(teller.speeds)


def tell_what_was_read(args, data, source):
    """Prints what the data are, and what was left out of them."""
    corpus, loader = data.corpus, data.loader
    if loader.header:
        say(f"Skipped the header ({', '.join(loader.header)}) and read the first column")
    if loader.uneven:
        say(
            f"Rows that don't have as many columns as the first: {loader.uneven:,}; if a comma is "
            "part of a sequence, quote it, or pass --loader_class SequenceLoader"
        )
    say(
        f"Read {len(corpus):,} sequences, {np.count_nonzero(corpus.rows):,} characters, "
        f"an alphabet of {len(corpus.alphabet) - 1:,}, from {args.sequence_path}"
    )
    if len(corpus) == 1 and args.num_sequences != 1:
        say("Only one sequence was found; is there one per line?")
    if source:
        added = len(corpus.alphabet) - len(source.alphabet)
        say(f"Starting from {args.init_from}, with {added:,} characters added to its alphabet")
    if corpus.dropped:
        whole = corpus.dropped + np.count_nonzero(corpus.rows)
        print(
            f"Cut {np.count_nonzero(~corpus.complete):,} sequences to {corpus.max_len} characters "
            f"(--max_len): {corpus.dropped:,} of {whole:,} characters are left out"
        )
    held_out = len(data.held_out)
    why = ""
    if args.validation_split and not held_out:
        why = f": too few distinct sequences for a --validation_split of {args.validation_split}"
    count = len(data.training)
    print(f"Learning from {count:,} sequences, holding out {held_out:,} for validation{why}")


def tell_what_was_learned(args, data, history, speed):
    """Prints a table of what the file holds, and how to go on.

    `speed` is in sequences per second, None if nothing was left to learn.
    """
    epochs = len(history["loss"])
    best = epochs - 1 - epochs_since_best(history)
    table = {"saved in": args.save_path}
    if history["val_loss"]:
        table["best epoch"] = f"{best + 1} of {epochs}"
    for name, losses in ("loss", history["loss"]), ("validation loss", history["val_loss"]):
        if losses:
            perplexity = f"perplexity {model.perplexity(losses[best]):.4g}"
            table[name] = f"{losses[best]:.4f} nats per character, {perplexity}"
    if speed:
        table["speed"] = f"{speed:,.0f} sequences/s"
    for name, value in table.items():
        say(f"{name:17}{value}")
    loss, guess = (history["val_loss"] or history["loss"])[best], loss_of_frequencies(data)
    if loss > guess:
        print(
            f"That is worse than {guess:.4f}, what character frequencies alone would give; "
            "try a lower --learning_rate, more --epochs or more sequences"
        )
    say(f"Sample from it:  python sample.py --weights_path {shlex.quote(args.save_path)}")


def loss_of_frequencies(data):
    """Returns the loss, a float, of a model that knows only how frequent each character is."""
    frequencies = count_characters(data.corpus, data.training) + 0.5
    frequencies /= frequencies.sum()
    indices = data.held_out if len(data.held_out) else data.training
    counts = count_characters(data.corpus, indices)
    return float(-(counts @ np.log(frequencies)) / counts.sum())


def say(text):
    """Prints a line that may hold the name of a file."""
    print(model.printable(text))


def explain_kept(args, history):
    """Returns what `--save_path` holds after these losses, a str."""
    if not history["loss"]:
        return "nothing new was saved"
    return f"{args.save_path} keeps the last whole epoch"


def main(arguments=None):
    """Runs the command line."""
    model.open_closed_streams()
    # A name in Japanese must not stop a night's training under LANG=C.
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    parser, args = parse_arguments(arguments)
    model.catch_signals()
    try:
        run(args)
    except UserError as error:
        parser.error(str(error))
    except OSError as error:
        model.discard(sys.stdout)
        what = error.filename or "the output"
        parser.error(f"can't write {what}: {error.strerror}; epochs that ended are kept")
    except KeyboardInterrupt as stop:
        model.catch_signals(signal.SIG_IGN)  # it is stopping already
        number, *told = stop.args
        told = model.printable("".join(told) or "nothing new was saved")
        with contextlib.suppress(OSError):  # of a terminal that has gone
            print(f"\nStopped: {told}.", file=sys.stderr)
        sys.exit(128 + number)
    except Exception as error:
        # As TensorFlow and JAX call it.
        exhausted = "ResourceExhausted" in type(error).__name__ or "RESOURCE_EXHAUSTED" in str(
            error
        )
        if not (exhausted or isinstance(error, MemoryError)):
            raise
        parser.error("there is not enough memory; lower --batch_size, --units or --max_len")


if __name__ == "__main__":
    main()
