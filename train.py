"""Learns to write sequences like those in a file and saves what it learned as an `.h5`.

The flags → the data → an earlier run, if there is one → the batches → the network →
several devices → training by Keras's `fit` and its callbacks.
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
import reprlib
import shlex
import signal
import sys
import time
import typing

import numpy as np

import model
from loaders import LOADERS, find_loader
from model import CommandLine, SequenceModel, UserError, within

DESCRIPTION = "Learns to write sequences like those in a file and saves what it learned."
EXAMPLE = """example:
  python train.py --loader_class UserNameLoader --sequence_path names.csv --save_path names.h5

The same command again continues where the file at --save_path stands, and so
does a larger --epochs. Ctrl-C stops; what the last whole epoch learned is kept.
"""
UNITS, LAYERS, SENTINEL = 128, 2, "\n"
# What makes two runs the same run, besides their data and network.
SETTINGS = (
    "dropout",
    "recurrent_dropout",
    "batch_size",
    "learning_rate",
    "validation_split",
    "seed",
)
SHOWN = 8  # sequences that are invented after each epoch
LARGEST_NETWORK = 2**30  # weights; Adam and the best epoch take four times as many numbers
BACKENDS = ("tensorflow", "jax")


# The flags


def parse_arguments(arguments=None):
    """Returns the parser and what it makes of a list of str, or None for the process's."""
    parser = CommandLine(prog="train.py", description=DESCRIPTION, epilog=EXAMPLE)

    data = parser.add_argument_group("data")
    data.add_argument(
        "--loader_class",
        choices=LOADERS,
        help="what the file is: one sequence a line; English words, the most used first; or a CSV "
        "whose first column counts (default: UserNameLoader for a .csv, else SequenceLoader)",
    )
    data.add_argument(
        "--sequence_path", "--sequences_path", default="sequences.txt", help="the file"
    )
    data.add_argument(
        "--num_sequences", type=within(int, 1, 2**62), help="take only the first n (default: all)"
    )
    data.add_argument(
        "--max_len",
        type=within(int, 1, model.LIMITS["max_len"]),
        help="cut sequences to so many characters (default: the longest one's, "
        f"at most {model.LONGEST})",
    )
    data.add_argument(
        "--sentinel",
        type=one_character,
        help="a character that no sequence contains, to mark where they end "
        r"(default: the newline, '\n', or that of --init_from)",
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
        type=within(int, 1, model.LIMITS["units"]),
        help=f"width of each LSTM layer (default: {UNITS}, or that of --init_from)",
    )
    network.add_argument(
        "--layers",
        type=within(int, 1, model.LIMITS["layers"]),
        help=f"LSTM layers (default: {LAYERS}, or those of --init_from)",
    )
    network.add_argument(
        "--dropout",
        type=within(float, 0, 0.9),
        default=0.3,
        help="share of each layer's outputs that is dropped while training",
    )
    network.add_argument(
        "--recurrent_dropout",
        type=within(float, 0, 0.9),
        default=0.0,
        help="share of each layer's outputs that it does not itself read back while training",
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--batch_size", type=within(int, 1, 2**20), default=32, help="sequences per step"
    )
    epochs = within(int, 1, 50_000)  # more losses would make the metadata too long
    training.add_argument("--epochs", type=epochs, default=15, help="passes over the data, in all")
    training.add_argument(
        "--learning_rate",
        type=within(float, 1e-9, 10),
        default=0.01,
        help="Adam's at the start; it falls to 0 over all epochs along a cosine",
    )
    training.add_argument(
        "--patience",
        type=epochs,
        help="stop after n epochs without a better validation loss (default: never)",
    )
    training.add_argument(
        "--seed", type=within(int, 0, 2**32 - 1), default=0, help="makes a run repeatable"
    )
    training.add_argument(
        "--distribute",
        action="store_true",
        help="use all devices of this host or, where Keras's KERAS_DISTRIBUTION_… variables "
        "are set, of all hosts; needs KERAS_BACKEND=jax",
    )

    files = parser.add_argument_group("files")
    files.add_argument("--save_path", default="incognito_model.h5", help="where the model is kept")
    files.add_argument(
        "--init_from",
        help="a model to start from instead of from nothing; characters that it does not know "
        "are added (default: none)",
    )
    files.add_argument(
        "--log_dir", help="a folder for losses.csv and what TensorBoard shows (default: none)"
    )
    files.add_argument(
        "--overwrite", action="store_true", help="start over if the file exists already"
    )
    args = parser.parse_args(arguments)
    if args.patience and not args.validation_split:
        parser.error(
            "--patience waits for a better validation loss, so it needs a "
            "--validation_split above 0"
        )
    return parser, args


def one_character(text):
    """The `argparse` type of `--sentinel`."""
    if len(text) != 1 or "\ud800" <= text <= "\udfff":
        raise argparse.ArgumentTypeError(f"not a single character: {text!r}")
    return text


# The data


def read_source(args):
    """Reads the `SequenceModel` at `--init_from` and fills in the flags that it decides."""
    source, found = None, {"units": UNITS, "layers": LAYERS, "sentinel": SENTINEL}
    if args.init_from is not None:
        with model.reading("--init_from", args.init_from, "a model's file"):
            source, metadata = model.load(args.init_from)
        found = {**metadata, "sentinel": source.alphabet.sentinel}
        for name in ("units", "layers"):
            if getattr(args, name) not in (None, found[name]):
                raise UserError(
                    f"--{name}: {args.init_from} has {found[name]}; omit the flag to keep them"
                )
        if args.sentinel is not None and args.sentinel in source.alphabet.symbols[1:]:
            raise UserError(
                f"--sentinel: to {args.init_from} {args.sentinel!r} is a character like others; "
                f"omit the flag to keep its sentinel, {found['sentinel']!r}"
            )
    for name in ("units", "layers", "sentinel"):
        if getattr(args, name) is None:
            setattr(args, name, found[name])
    return source


def read_corpus(args, characters):
    """Reads and encodes the data into a `model.Corpus` that has these characters anyway."""
    loader_class = find_loader(args.sequence_path, args.loader_class)
    loader = loader_class(args.sequence_path, max_sequences=args.num_sequences)
    sequences, clashes = [], []
    with model.reading("--sequence_path", args.sequence_path, "a file with your sequences"):
        for sequence in loader:
            sequences.append(sequence)
            if args.sentinel in sequence:
                clashes.append(loader.line)
        if not clashes:
            return model.encode(sequences, args.sentinel, args.max_len, characters)
    used = set(characters).union(*sequences)
    free = next(
        symbol
        for symbol in itertools.chain(" |~^_", map(chr, range(33, 0x110000)))
        if symbol not in used and model.printable(symbol) == symbol
    )
    raise UserError(
        f"{args.sequence_path}, line {clashes[0]}: the sequence contains the sentinel "
        f"{args.sentinel!r} ({len(clashes)} in all do); pass a character that none contains, "
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


def describe(args, corpus, source):
    """Returns the metadata of a run that has not begun: a dict for `model.save`."""
    data = hash_bytes(corpus.alphabet.symbols.encode(), corpus.rows, corpus.complete)
    return {
        "alphabet": corpus.alphabet.symbols,
        "max_len": corpus.max_len,
        "units": args.units,
        "layers": args.layers,
        "loader_class": find_loader(args.sequence_path, args.loader_class).__name__,
        "data": {"sequences": len(corpus), "sha256": data},
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "init_from": source and hash_bytes(*source.weights),
        "epochs": args.epochs,
        "history": {"loss": [], "val_loss": []},
    }


def check_size(args, alphabet):
    """Raises a `UserError` if the network is too large to be meant."""
    shapes = model.weight_shapes(len(alphabet), args.units, args.layers).values()
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
    ways_out = "pass --overwrite to start over, or another --save_path"
    try:
        with model.reading("--save_path", path, "another file"):
            best, found = model.load(path)
            state = model.load_training_state(path)
    except UserError as error:
        raise UserError(f"{error}; {ways_out}") from None
    difference = find_difference(found, metadata)
    if difference:
        if difference.startswith("other data"):
            ways_out += f", with --init_from {path} to learn from what it knows"
        raise UserError(f"--save_path: {path} was trained with {difference}; {ways_out}")
    history = found.get("history")
    if not (state and is_history(history, validated)):
        raise UserError(
            f"--save_path: {path} holds a finished model without what continuing needs; {ways_out}"
        )
    if found["format"] < model.FORMAT and not is_finished(args, history):
        raise UserError(
            f"--save_path: {path} was begun by an earlier version of train.py, which took its "
            f"batches in another order; {ways_out}"
        )
    return history, best.weights, state


def find_difference(found, metadata):
    """Returns with what, a str, another run was trained, or None if it is the same run.

    What counts is what the flags mean, not how they were typed. Both are
    metadata, the other run's as `model.load` returns it.
    """
    settings = found.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    then = {**settings, "units": found["units"], "layers": found["layers"]}
    now = {**metadata["settings"], "units": metadata["units"], "layers": metadata["layers"]}
    for name, value in now.items():
        if then.get(name) != value:
            return f"--{name} {reprlib.repr(then.get(name))}, not {value!r}"
    if found["alphabet"][0] != metadata["alphabet"][0]:
        return f"--sentinel {found['alphabet'][0]!r}, not {metadata['alphabet'][0]!r}"
    if found.get("init_from") != metadata["init_from"]:
        return "another --init_from"
    if found.get("data") != metadata["data"]:
        return "other data (--sequence_path, --num_sequences, --max_len)"
    if found["max_len"] != metadata["max_len"]:
        return f"--max_len {found['max_len']}, not {metadata['max_len']}"
    return None


def is_history(value, validated):
    """Tells whether a value from a file's metadata is a history of (validated) losses."""
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
    """Tells whether a run with these losses so far has nothing left to do."""
    patient = not args.patience or epochs_since_best(history) < args.patience
    return len(history["loss"]) >= args.epochs or not patient


# The batches


class Plan(typing.NamedTuple):
    """How sequences are cut into stacks.

    Attributes:
        batch_size: int, sequences of a batch.
        depth: int, batches of a stack: enough that what a call costs in
            Python is lost in the work, and few enough that progress and
            Ctrl-C are not kept waiting.
        parts: int, in how many parts a batch comes.
        lengths: sorted int array, the lengths that a part may be padded to.
    """

    batch_size: int
    depth: int
    parts: int
    lengths: np.ndarray


def plan_stacks(args, corpus, count, compiled):
    """Returns a `Plan`, by how much work there is.

    Args:
        args: the command line.
        corpus: `model.Corpus`.
        count: int, how many of its sequences an epoch has.
        compiled: bool, whether each length takes seconds to compile; then
            there is one more for some seconds of work.
    """
    batch_size = min(args.batch_size, count)
    batches = math.ceil(count / batch_size)
    longest = int(corpus.targets.max())
    weights = 4 * args.units * (len(corpus.alphabet) + (2 * args.layers - 1) * args.units)
    # A multiplication and an addition per weight and step, and twice that in the backward pass.
    operations = 6 * weights * batch_size * longest
    depth = max(1, min(64, batches, 2 * 10**11 // operations))
    parts = max(1, min(4, batch_size // 64))
    if not compiled:
        return Plan(batch_size, depth, parts, np.arange(1, longest + 1))
    choices = 1 + min(7, args.epochs * batches * operations // 10**12)
    if choices == 1:
        return Plan(batch_size, depth, 1, np.array([longest]))
    # About as long as the first part of a batch becomes, or half of all whole batches.
    share = 1 / parts if parts > 1 else 0.5 ** (1 / batch_size)
    lengths = np.geomspace(longest, np.quantile(corpus.targets, share), choices)
    return Plan(batch_size, depth, parts, np.unique(np.ceil(lengths - 1e-6).astype(int)))


def make_stacks(corpus, chosen, plan, seed=None, devices=1):
    """Cuts sequences into batches and stacks those of like length.

    Which sequences make a batch is random, so that each is a fair sample;
    padding is kept low by what leaves it one: batches whose longest sequences
    are about equally long share a stack, and a large batch comes in several
    parts, the shortest sequences in the first, each as long as it needs to be.

    Args:
        corpus: `model.Corpus`.
        chosen: int array, the indices of the sequences to take.
        plan: `Plan`.
        seed: what `numpy.random.default_rng` takes, to shuffle the sequences
            and the stacks; None leaves the sequences as they are.
        devices: int, the size of each part is a multiple of this.

    Yields:
        Tuple of a pair `(rows, targets)` for each part: ids `(part of the
        batch, depth, length)`, of the type of `corpus.rows`, and how many
        targets each row gives, int32 `(part of the batch, depth)`. Rows that
        only fill up have no targets.

    Example, five sequences in batches of two, a stack of three batches deep:

    >>> corpus = model.encode(["a", "bb", "ccc", "d", "ee"])
    >>> [(rows, targets)] = next(make_stacks(corpus, np.arange(5), Plan(2, 3, 1, np.arange(5))))
    >>> rows[1]  # the longer sequence of each batch: "bb", "ee", "ccc"
    array([[2, 2, 0, 0],
           [5, 5, 0, 0],
           [3, 3, 3, 0]], dtype=uint8)
    >>> targets  # beside "bb" stands "a", beside "ee" nothing, beside "ccc" "d"
    array([[2, 0, 2],
           [3, 3, 4]], dtype=int32)
    """
    batch_size, depth, parts, lengths = plan
    rng = None if seed is None else np.random.default_rng(seed)
    order = chosen if rng is None else rng.permutation(chosen)
    count = math.ceil(len(order) / batch_size)
    order = np.append(order, np.zeros(count * batch_size - len(order), order.dtype))
    order = order.reshape(count, batch_size)
    targets = corpus.targets[order]
    targets.ravel()[len(chosen) :] = 0
    ranking = np.argsort(targets, axis=1, kind="stable")
    order, targets = (np.take_along_axis(array, ranking, axis=1) for array in (order, targets))
    ranking = np.argsort(targets[:, -1], kind="stable")
    stacks = [ranking[start : start + depth] for start in range(0, count, depth)]
    if rng is not None:
        stacks = [rng.permutation(stacks[index]) for index in rng.permutation(len(stacks))]
    for batches in stacks:
        stack = []
        for part in np.array_split(np.arange(batch_size), parts):
            # All parts are compiled together, so that each of several has one length.
            longest = (targets if parts > 1 else targets[batches])[:, part].max()
            length = lengths[np.searchsorted(lengths, longest)]
            shape = math.ceil(len(part) / devices) * devices, depth, length
            rows = pad(corpus.rows[order[batches][:, part].T, :length], shape)
            stack.append((rows, pad(targets[batches][:, part].T, shape[:2])))
        yield tuple(stack)


def pad(array, shape):
    """Returns a copy of an array in the corner of one of zeros, of that shape."""
    padded = np.zeros(shape, array.dtype)
    padded[tuple(map(slice, array.shape))] = array
    return padded


# The network


def check_backend(name):
    """Raises a `UserError` if the backend of Keras with that name, a str, can't be used."""
    if name not in BACKENDS:
        raise UserError(
            f"KERAS_BACKEND: {name!r} can't train here; set it to {' or '.join(BACKENDS)}"
        )
    if importlib.util.find_spec(name) is None:
        raise UserError(f"KERAS_BACKEND: {name} is not installed: pip install {name}")


def keep_memory():
    """Makes glibc keep what is freed.

    An XLA program takes its memory anew at each call, and each matrix product its own: given back
    to the system each time, it costs up to half of the speed in page faults.
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
    keep_memory()
    # What an import leaves is there to stay: to search it for garbage, again and again
    # and once more at the exit, takes a third of the time.
    gc.disable()
    try:
        with quiet():
            import keras

            if keras.backend.backend() == "tensorflow":
                keras.distribution.list_devices()
    except (AttributeError, TypeError, ValueError) as error:  # of what keras.json says
        reason = str(error).partition("\n")[0]
        raise UserError(f"Keras can't start: {reason}; see ~/.keras/keras.json") from None
    gc.freeze()
    gc.enable()
    check_backend(keras.backend.backend())
    keras.config.set_floatx("float32")  # whatever keras.json says


def make_tensorflow_network(layers, scale, xla):
    """Makes a network that learns from a stack of batches in each step of `fit`.

    Args:
        layers: list of Keras layers, as `model.build_layers` returns it.
        scale: float, what an optimizer step multiplies the sum of losses by.
        xla: bool, whether XLA compiles the training.

    Returns:
        A `keras.Sequential` for `fit` on what `make_stacks` yields. Its loss
        is in nats per target.
    """
    import keras
    import tensorflow as tf

    nats = keras.metrics.Mean("loss")

    class Network(keras.Sequential):
        @property
        def metrics(self):
            return [nats]

        @tf.function(jit_compile=xla, reduce_retracing=True, autograph=False)
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
            return sum(model.total_loss(self, *part, training) for part in batch)

        def sum_losses(self, stack, of_batch):
            def add_next(step, total):
                batch = tf.nest.map_structure(lambda array: array[:, step], stack)
                return step + 1, total + of_batch(batch)

            batches, targets = count_targets(stack)
            total = tf.while_loop(lambda step, _: step < batches, add_next, (0, 0.0))[1]
            nats.update_state(total / targets, targets)
            return {"loss": nats.result()}

    return Network(layers)


def make_jax_network(layers, scale):
    """Does on JAX, which always uses XLA, what `make_tensorflow_network` does."""
    import jax
    import keras

    nats = keras.metrics.Mean("loss")

    class Network(keras.Sequential):
        @property
        def metrics(self):
            return [nats]

        def train_step(self, state, stack):
            gradient = jax.grad(self.batch_loss, has_aux=True)

            def learn_next(step, carry):
                trainable, others, slots, total = carry
                gradients, (loss, others) = gradient(trainable, others, stack, step, True)
                trainable, slots = self.optimizer.stateless_apply(slots, gradients, trainable)
                return trainable, others, slots, total + loss

            *state, metrics = state
            batches, targets = count_targets(stack)
            *state, total = jax.lax.fori_loop(0, batches, learn_next, (*state, 0.0))
            logs, metrics = self.report(metrics, total, targets)
            return logs, (*state, metrics)

        def test_step(self, state, stack):
            trainable, others, metrics = state

            def add_next(step, total):
                return total + self.batch_loss(trainable, others, stack, step, False)[1][0]

            batches, targets = count_targets(stack)
            total = jax.lax.fori_loop(0, batches, add_next, 0.0)
            logs, metrics = self.report(metrics, total, targets)
            return logs, (trainable, others, metrics)

        def batch_loss(self, trainable, others, stack, step, training):
            variables = self.trainable_variables + self.non_trainable_variables
            with keras.StatelessScope(zip(variables, [*trainable, *others])) as scope:
                loss = sum(
                    model.total_loss(self, rows[:, step], targets[:, step], training)
                    for rows, targets in stack
                )
                others = [scope.get_current_value(each) for each in self.non_trainable_variables]
            return loss * scale, (loss, others)

        def report(self, metrics, total, targets):
            metrics = nats.stateless_update_state(metrics, total / targets, targets)
            return {"loss": nats.stateless_result(metrics)}, metrics

    return Network(layers)


def count_targets(stack):
    """Returns how many batches of a stack are real, an int tensor, and their targets, float32."""
    from keras import ops

    counts = sum(ops.sum(targets, axis=0) for _, targets in stack)
    return ops.sum(ops.cast(counts > 0, "int32")), ops.cast(ops.sum(counts), "float32")


def learns_by_hand(args):
    """Tells whether training goes through `model.run_lstm`, which on TensorFlow needs XLA.

    On a CPU that is faster, unless TensorFlow has large batches, for which its
    own products use all cores. On a GPU an LSTM is one call of cuDNN, which
    knows no recurrent dropout and can't be divided among devices.
    """
    import keras

    on_cpu = "cpu" in keras.distribution.list_devices()[0]
    faster = on_cpu and (keras.backend.backend() == "jax" or args.batch_size <= 128)
    return faster or args.recurrent_dropout > 0 or args.distribute


def prepare_network(args, corpus, training, source):
    """Builds and compiles the network and its optimizer.

    It knows what the `SequenceModel` `source` does or, without one, how
    frequent each character of the training data is.
    """
    import keras

    backend, devices = keras.backend.backend(), keras.distribution.list_devices()
    layers = model.build_layers(
        len(corpus.alphabet),
        args.units,
        args.layers,
        args.dropout,
        args.recurrent_dropout,
        args.seed,
        learns_by_hand(args),
    )
    # Every target weighs the same, whichever batch it is in.
    scale = 1 / (args.batch_size * corpus.targets[training].mean())
    if backend == "jax":
        network = make_jax_network(layers, float(scale))
    else:
        network = make_tensorflow_network(layers, float(scale), xla=learns_by_hand(args))
    steps = args.epochs * math.ceil(len(training) / args.batch_size)
    rate = keras.optimizers.schedules.CosineDecay(args.learning_rate, steps)
    adam = keras.optimizers.Adam(rate, global_clipnorm=1.0)
    network.compile(adam, jit_compile=backend == "jax")
    network.optimizer.build(network.trainable_variables)
    print(
        f"Network: {args.layers} × LSTM({args.units}), {network.count_params():,} parameters, "
        f"trained by Keras on {backend}, {', '.join(devices)}"
    )
    # The softmax starts from the frequencies of the targets: a good place to learn
    # from, and what never is one (the end, if all sequences were cut) stays unlikely.
    counts = sum(
        np.bincount(column[training], minlength=len(corpus.alphabet)) for column in corpus.rows.T
    )
    counts[0] = np.count_nonzero(corpus.complete[training])
    weights = network.get_weights()
    weights[-1] = np.log((counts + 0.5) / counts.sum())
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
    old, *lstm, dense, bias = source.weights
    kernel = weights[0].copy()
    kernel[known] = old
    extended = np.zeros_like(weights[-2])
    extended[:, known] = dense
    highest = bias.max().astype(np.float64)
    offsets = weights[-1] + highest + np.log(np.exp(bias - highest).sum())
    offsets[known] = bias
    return [kernel, *lstm, extended, offsets.astype(np.float32)]


# Several devices, several hosts


def join_group(args, metadata):
    """Makes Keras divide each batch among all devices of all processes of a group.

    Returns which process this is, and of how many: a tuple of two int.
    """
    import_keras()
    import jax
    import keras
    from jax.experimental import multihost_utils

    with quiet():
        import tensorflow  # noqa: F401 - which Keras would import, noisily, to seed it

    try:
        if os.environ.get("KERAS_DISTRIBUTION_JOB_ADDRESSES"):
            # Past Python, Gloo would tell on stdout whom it meets.
            sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, errors="backslashreplace")
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            keras.distribution.initialize()
        data_parallel = keras.distribution.DataParallel(auto_shard_dataset=False)
        keras.distribution.set_distribution(data_parallel)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"--distribute: {reason}; check the KERAS_DISTRIBUTION_… variables on every host"
        ) from None
    model.catch_signals()  # JAX has taken SIGTERM
    plan = hash_bytes(json.dumps([metadata, args.epochs, args.patience]).encode())
    try:
        multihost_utils.assert_equal(np.frombuffer(plan.encode(), np.uint8))
    except AssertionError:
        raise UserError(
            "--distribute: the processes differ in their flags or data; start all of them alike"
        ) from None
    if jax.process_index() > 0:
        print(f"Process {jax.process_index()} of {jax.process_count()}; process 0 prints the rest")
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    return jax.process_index(), jax.process_count()


def broadcast_history(history):
    """Returns the history that process 0 of a group has, in all of them."""
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
            f"--save_path: {args.save_path} was trained with a version of Keras that this "
            "one can't continue; pass --overwrite to start over, or another --save_path"
        )
    if not (state or args.distribute):
        return
    values = [np.asarray(value, each.dtype) for value, each in zip(state or variables, variables)]
    if args.distribute:
        from jax.experimental.multihost_utils import broadcast_one_to_all

        values = broadcast_one_to_all(values)
    for variable, value in zip(variables, values):
        variable.assign(value)


def make_data(args, corpus, training, held_out, first_epoch, rank, processes):
    """Makes the arguments of `fit` that are data, and those that say how much is an epoch."""
    import keras

    backend = keras.backend.backend()
    devices = len(keras.distribution.list_devices()) if args.distribute else 1

    def share(array):
        size = len(array) // processes
        return array[rank * size : (rank + 1) * size]

    def feed(chosen, shuffle, compiled):
        plan = plan_stacks(args, corpus, len(chosen), compiled)

        def generate():
            for epoch in itertools.count(first_epoch):
                seed = (args.seed, epoch) if shuffle else None
                for stack in make_stacks(corpus, chosen, plan, seed, devices):
                    yield tuple(tuple(map(share, part)) for part in stack)

        data = generate()
        if backend == "tensorflow":
            data = as_dataset(data, fixed=len(plan.lengths) == 1)
        return data, math.ceil(len(chosen) / plan.batch_size / plan.depth)

    found = {}
    found["x"], found["steps_per_epoch"] = feed(
        training, True, backend == "jax" or learns_by_hand(args)
    )
    if len(held_out):
        # Without a backward pass there is too little work for TensorFlow to compile it.
        found["validation_data"], found["validation_steps"] = feed(
            held_out, False, backend == "jax"
        )
    return found


def as_dataset(stacks, fixed):
    """Makes a `tf.data.Dataset` of a generator whose arrays all have one size if `fixed`."""
    import tensorflow as tf

    first = next(stacks)
    signature = tf.nest.map_structure(
        lambda array: tf.TensorSpec(array.shape if fixed else [None] * array.ndim, array.dtype),
        first,
    )
    stacks = itertools.chain([first], stacks)
    data = tf.data.Dataset.from_generator(lambda: stacks, output_signature=signature).prefetch(2)
    options = tf.data.Options()
    options.autotune.enabled = False  # its thread can take two seconds to end
    return data.with_options(options)


def make_callbacks(args, network, corpus, count, metadata, best, leads):
    """Makes what happens at the end of each epoch, in this order.

    Args:
        args: the command line.
        network: the Keras network.
        corpus: `model.Corpus`.
        count: int, how many sequences are learned in an epoch.
        metadata: this run's, from `describe`; its history grows.
        best: list of arrays, the weights of the best epoch so far, or None.
        leads: bool, whether this process of a group writes.
    """
    from keras.callbacks import Callback, CSVLogger, ProgbarLogger, TensorBoard, TerminateOnNaN

    history = metadata["history"]

    class Save(Callback):
        best_weights = best

        def on_epoch_end(self, epoch, logs):
            weights = network.get_weights()
            state = [np.asarray(each) for each in network.variables + network.optimizer.variables]
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
            added = {name: [*history[name], loss] for name, loss in logs.items()}
            grown = {**history, **added}
            if epochs_since_best(grown) == 0:
                self.best_weights = weights
            if leads:
                saved = {**metadata, "history": grown}
                with model.writing("--save_path", args.save_path):
                    model.save(args.save_path, network, self.best_weights, saved, state)
            history.update(grown)
            network.stop_training = is_finished(args, history)

    class Tell(Callback):
        def on_epoch_begin(self, epoch, logs):
            self.start = time.perf_counter()

        def on_train_batch_end(self, batch, logs):
            self.seconds = time.perf_counter() - self.start

        def on_epoch_end(self, epoch, logs):
            if not sys.stdout.isatty():  # on a terminal, Keras's bar has shown this
                losses = " - ".join(f"{name}: {loss:.4f}" for name, loss in logs.items())
                rate = f"{count / self.seconds:,.0f} sequences/s"
                print(f"Epoch {epoch + 1}/{args.epochs} - {losses} - {rate}")
            current = SequenceModel(corpus.alphabet, corpus.max_len, network.get_weights())
            show_invented(current, corpus, (args.seed, epoch))

    callbacks = [TerminateOnNaN(), Save()]
    if args.log_dir is not None and leads:
        path, append = os.path.join(args.log_dir, "losses.csv"), bool(history["loss"])
        callbacks += [CSVLogger(path, append=append), TensorBoard(args.log_dir, write_graph=False)]
    return [*callbacks, ProgbarLogger(), Tell()]  # the bar ends before more is told


def show_invented(trained, corpus, seed):
    """Prints sequences that a `SequenceModel` invents: the new ones, then those in the data."""
    longest = 60  # so that each fits on a line
    groups = {"new": [], "in the data": []}
    for text in trained.sample(count=SHOWN, max_len=min(trained.max_len, longest), seed=seed):
        row = np.zeros_like(corpus.rows[:1])
        row[0, : len(text)] = corpus.alphabet.encode(text)[: row.size]
        known = len(text) <= row.size and (as_bytes(corpus.rows) == as_bytes(row)).any()
        groups["in the data" if known else "new"].append(model.printable(text))
    for name, texts in groups.items():
        if texts:
            print(f"invented, {name}: " + "  ".join(texts))


def run(args):
    """Does what the command line asks for, from reading the data to the last line printed."""
    if args.distribute and os.environ.get("KERAS_BACKEND") != "jax":
        raise UserError(
            "--distribute: needs Keras on JAX: pip install jax, and set KERAS_BACKEND=jax"
        )
    if os.environ.get("KERAS_BACKEND"):
        check_backend(os.environ["KERAS_BACKEND"])
    inputs = {"--sequence_path": args.sequence_path, "--init_from": args.init_from}
    model.check_target("--save_path", args.save_path, inputs)
    source = read_source(args)
    corpus = read_corpus(args, source.alphabet.symbols[1:] if source else "")
    check_size(args, corpus.alphabet)
    training, held_out = split(corpus, args.validation_split)
    args.batch_size = min(args.batch_size, len(training))
    metadata = describe(args, corpus, source)
    history, best, state = metadata["history"], None, None
    # Of a group, process 0 alone has the file.
    leads = not args.distribute or os.environ.get("KERAS_DISTRIBUTION_PROCESS_ID", "0") == "0"
    if leads and not args.overwrite and os.path.exists(args.save_path):
        history, best, state = read_earlier_run(args, metadata, len(held_out) > 0)
    rank, processes = join_group(args, metadata) if args.distribute else (0, 1)
    if args.distribute:
        history = broadcast_history(history)
    metadata["history"] = history
    tell_what_was_read(args, corpus, training, held_out, source)
    done = len(history["loss"])
    if is_finished(args, history):
        say(f"{args.save_path} is finished: it has learned for {done} epochs")
    else:
        if done:
            say(f"Continuing {args.save_path} after epoch {done}")
        if args.log_dir is not None and leads:
            with model.writing("--log_dir", args.log_dir):
                os.makedirs(args.log_dir, exist_ok=True)
        try:
            import_keras()
            network = prepare_network(args, corpus, training, source)
            set_variables(args, network.variables + network.optimizer.variables, state)
            network.fit(
                **make_data(args, corpus, training, held_out, done, rank, processes),
                initial_epoch=done,
                epochs=args.epochs,
                callbacks=make_callbacks(
                    args, network, corpus, len(training), metadata, best, leads
                ),
                verbose=1 if sys.stdout.isatty() else 0,
                shuffle=False,
            )
        except KeyboardInterrupt as stop:
            kept = explain_kept(args, history)
            if history["loss"]:
                without = " without --overwrite" if args.overwrite else ""
                kept += f"; the same command{without} continues"
            raise KeyboardInterrupt(stop.args[0], kept) from None
    tell_what_was_learned(args, history)


def tell_what_was_read(args, corpus, training, held_out, source):
    """Prints what the data are, and what was left out of them."""
    say(
        f"Read {len(corpus):,} sequences, {np.count_nonzero(corpus.rows):,} characters, "
        f"an alphabet of {len(corpus.alphabet) - 1:,}, from {args.sequence_path}"
    )
    if source:
        added = len(corpus.alphabet) - len(source.alphabet)
        say(f"Starting from {args.init_from}, which gains {added:,} characters")
    if not corpus.complete.all():
        print(
            f"Cut to {corpus.max_len} characters, because they were longer: "
            f"{np.count_nonzero(~corpus.complete):,} (--max_len)"
        )
    print(f"Learning from {len(training):,}, holding out {len(held_out):,} to validate")


def tell_what_was_learned(args, history):
    """Prints what the file holds, and how to go on."""
    kept = len(history["loss"]) - epochs_since_best(history)
    loss = (history["val_loss"] or history["loss"])[kept - 1]
    perplexity = math.exp(loss) if loss < 700 else math.inf
    kind = "validation loss" if history["val_loss"] else "loss"
    say(
        f"{args.save_path} holds epoch {kept}: {kind} {loss:.4f} nats per character, "
        f"perplexity {perplexity:.4g}"
    )
    say(f"Sample from it: python sample.py --weights_path {shlex.quote(args.save_path)}")


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
    # A name in Japanese must not stop a night's training under LANG=C.
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    parser, args = parse_arguments(arguments)
    model.catch_signals()
    try:
        run(args)
    except UserError as error:
        parser.error(str(error))
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        what = error.filename or "what happens"
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
