"""Learns to write sequences like those in a file and saves what it learned as an `.h5`.

The flags → the data → the batches → the network → a run and its file → several devices →
training by Keras's `fit` and its callbacks. `run`, near the end, is the whole of it.
"""

import argparse
import contextlib
import ctypes
import gc
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import os
import pathlib
import re
import reprlib
import shlex
import shutil
import signal
import sys
import time
import typing

from loaders import LOADERS, UserError, compose, find_loader, needing_packages

with needing_packages("train.py"):
    import numpy as np

    import model
    from model import CommandLine, SequenceModel, within

DESCRIPTION = "Learns to write sequences like those in a file and saves what it learned."
EXAMPLES = """examples:
  python train.py --sequence_path pre_trained_models/english_words_5000.txt
  python train.py --sequence_path pre_trained_models/user_names_10000.csv \\
      --init_from incognito_model.h5 --save_path names.h5

The same command again continues an interrupted run; a larger --epochs extends a
finished one. Ctrl-C stops and keeps the run up to its last whole epoch.
"""
SENTINEL, VALIDATION_SPLIT = "\n", 0.05
SHORT = 15_000  # characters of a list that is better learned by a model of others
# What is best for lists of up to so many characters, found on names, words, user names
# and molecules: the less there is to learn from, the more is dropped, the smaller are the
# batches and, but for the shortest lists, the more passes there are.
DEFAULTS = {
    1_200: (128, 1, 0.5, 0.5, 4, 30, 0.02),
    6_000: (128, 1, 0.5, 0.5, 8, 45, 0.02),
    30_000: (256, 1, 0.4, 0.4, 16, 40, 0.02),
    50_000: (256, 1, 0.4, 0.3, 32, 22, 0.02),
    300_000: (128, 2, 0.3, 0.3, 16, 18, 0.01),
    math.inf: (128, 2, 0.3, 0.0, 32, 15, 0.01),
}
CHOSEN = "units", "layers", "dropout", "recurrent_dropout", "batch_size", "epochs", "learning_rate"
WIDE = 128  # units; a narrower network gets less dropout
SHIPPED = pathlib.Path(__file__).parent / "pre_trained_models" / "user_names_10000.h5"
FINE_TUNING_RATE = 0.005  # the learning rate for a network that has learned before
# What makes two runs the same run, besides their data and network.
SETTINGS = "dropout", "recurrent_dropout", "batch_size", "learning_rate", "validation_split", "seed"
WAYS_OUT = "pass --overwrite to start over, or another --save_path"
SHOWN, LINE_WIDTH = 8, 100  # sequences invented after each epoch, and the most characters of each
MOST_WEIGHTS = 2**30  # weights; Adam and the best epoch take four times as many numbers
SEQUENCES_PER_ROW = 4  # with fewer, rows are less equally long; with more, products are too small
VALIDATION_BATCH = 256  # sequences
# In a stack of batches. More operations would keep progress and Ctrl-C waiting, more batches
# would not make it faster, more cells would only take memory.
MOST_OPERATIONS, MOST_BATCHES, MOST_CELLS = 2 * 10**11, 64, 2**16
# Operations, some minutes on two cores. A pass of more is divided into parts, after each of
# which the run is validated and saved.
LARGEST_PART = 3 * 10**13
LARGEST_VALIDATION = 300_000  # characters held out unless --validation_split is given
OPERATIONS_PER_DEVICE = 3 * 10**7  # of a batch: with fewer, dividing it gains nothing


# The flags


def make_parser():
    """Returns the `CommandLine` of this script."""
    options = {"prog": "train.py", "description": DESCRIPTION, "epilog": EXAMPLES}
    parser = CommandLine("--save_path", "--sequence_path", **options)

    def add(group, flag, metavar_and_type, text, default=None):
        text += "" if default is None else " (default: %(default)s)"
        metavar, kind = metavar_and_type
        group.add_argument(flag, metavar=metavar, type=kind, default=default, help=text)

    def count(most, least=1):
        return "N", within(int, least, most)

    expand = os.path.expanduser
    path, folder, share = ("FILE", expand), ("DIR", expand), ("SHARE", within(float, 0, 0.9))
    epochs, sizes = count(50_000), model.LIMITS  # more losses would make the metadata too long

    data = parser.add_argument_group("data")
    loaders = "; ".join(f"{name}: {loader.summary}" for name, loader in LOADERS.items())
    loaders += " (default: by the file's name)"
    data.add_argument("--loader_class", metavar="CLASS", choices=LOADERS, help=loaders)
    add(data, "--sequence_path", path, "what to learn; - is standard input", "sequences.txt")
    data.add_argument("--sequences_path", dest="sequence_path", type=expand, help=argparse.SUPPRESS)
    add(data, "--num_sequences", count(10**12), "read only the first N (default: all)")
    cut = f"cut to N characters (default: longest, up to {model.DEFAULT_MAX_LEN})"
    add(data, "--max_len", count(sizes["max_len"]), cut)
    add(data, "--sentinel", ("CHAR", one_character), r"marks the end; in no sequence (default: \n)")
    add(data, "--validation_split", share, "held out to find the best epoch (default: up to 0.05)")

    fit = "by default what suits the amount of data"
    network = parser.add_argument_group(f"network ({fit})")
    add(network, "--units", count(sizes["units"]), "width of each LSTM layer")
    add(network, "--layers", count(sizes["layers"]), "LSTM layers")
    add(network, "--dropout", share, "share of outputs to drop")
    add(network, "--recurrent_dropout", share, "share of recurrent inputs to drop")

    training = parser.add_argument_group(f"training ({fit})")
    add(training, "--batch_size", count(2**20), "sequences per update of the weights")
    add(training, "--epochs", epochs, "passes over the data, in total")
    add(training, "--learning_rate", ("RATE", within(float, 1e-9, 10)), "Adam's; decays to 0")
    add(training, "--patience", epochs, "stop N epochs after the best one (default: never)")
    add(training, "--seed", count(2**32 - 1, 0), "another seed gives another model", 0)
    several = "use all GPUs or hosts; needs KERAS_BACKEND=jax"
    training.add_argument("--distribute", action="store_true", help=several)

    files = parser.add_argument_group("files")
    add(files, "--save_path", path, "the model", "incognito_model.h5")
    add(files, "--init_from", path, "a model to start from (default: none)")
    add(files, "--log_dir", folder, "for losses.csv and TensorBoard (default: none)")
    files.add_argument("--overwrite", action="store_true", help="start over if --save_path exists")
    return parser


def one_character(text):
    """The `argparse` type of `--sentinel`, which takes four escapes, too."""
    character = compose({r"\n": "\n", r"\r": "\r", r"\t": "\t", r"\0": "\0"}.get(text, text))
    if len(character) != 1 or "\ud800" <= character <= "\udfff":
        raise argparse.ArgumentTypeError(f"{character!a} is not a single Unicode character")
    return character


def check_flags(args):
    """Raises a `UserError`, before anything is read or imported, if the flags can't work."""
    backend = os.environ.get("KERAS_BACKEND") or "tensorflow"
    if args.distribute and backend != "jax":
        raise UserError("--distribute needs Keras on JAX: pip install jax; set KERAS_BACKEND=jax")
    check_backend(backend)
    inputs = ("--sequence_path", args.sequence_path), ("--init_from", args.init_from)
    model.check_target("--save_path", args.save_path, inputs)
    if not args.save_path.lower().endswith((".h5", ".hdf5")):
        raise UserError(f"--save_path: Keras opens only .h5; pass {args.save_path}.h5")


# The data


class Data(typing.NamedTuple):
    """What there is to learn from."""

    corpus: model.Corpus
    training: np.ndarray  # int32, the indices of the sequences to learn
    held_out: np.ndarray  # int32, those of the sequences to validate with
    loader: object  # what read them, of one of the classes in `LOADERS`
    chosen: dict  # the settings that depend on how much there is, by their flags


def read_source(args):
    """Returns the `SequenceModel` at `--init_from`, and fills in the flags that depend on it."""
    source = None
    if args.init_from is not None:
        with model.naming("--init_from", args.init_from):
            source, metadata = model.load(args.init_from)
        for name in ("units", "layers"):
            if getattr(args, name) not in (None, metadata[name]):
                raise UserError(f"--{name}: {args.init_from} has {metadata[name]}; omit the flag")
            setattr(args, name, metadata[name])
        if args.sentinel is not None and args.sentinel in source.alphabet.symbols[1:]:
            raise UserError(f"--sentinel: {args.init_from} knows it as a character; omit the flag")
    if args.sentinel is None:
        args.sentinel = source.alphabet.sentinel if source else SENTINEL
    return source


def read_data(args, source):
    """Reads the sequences, chooses the settings and what is held out: returns `Data`.

    The alphabet has the characters of the `SequenceModel` `source` too, if that is not None.
    """
    path, sentinel = args.sequence_path, args.sentinel
    loader = find_loader(path, args.loader_class)(path, max_sequences=args.num_sequences)
    characters = source.alphabet.symbols[1:] if source else ""

    def without_sentinel():
        for sequence in loader:
            if sentinel in sequence:
                raise loader.error(f"it contains the sentinel {sentinel!r}; pass --sentinel '\\0'")
            yield sequence

    with model.naming("--sequence_path", path):
        corpus = model.build_corpus(without_sentinel(), sentinel, args.max_len, characters)
    chosen = choose_settings(args, len(corpus.targets), source)
    return Data(corpus, *split(corpus, args.validation_split), loader, chosen)


def choose_settings(args, characters, source):
    """Sets the flags that were not given, by the number of characters: returns them, a dict."""
    values = next(values for most, values in DEFAULTS.items() if characters <= most)
    settings = dict(zip(CHOSEN, values))
    width = min(1, (args.units or settings["units"]) / WIDE)
    for name in ("dropout", "recurrent_dropout"):
        settings[name] = round(settings[name] * width, 3)
    settings["recurrent_dropout"] *= width >= 0.5  # in narrower ones not worth its compiling
    if source:
        settings["learning_rate"] = FINE_TUNING_RATE
    settings["validation_split"] = min(VALIDATION_SPLIT, LARGEST_VALIDATION / characters)
    chosen = {name: value for name, value in settings.items() if getattr(args, name) is None}
    vars(args).update(chosen)
    return chosen


def split(corpus, fraction):
    """Returns the indices of the sequences to learn and of those held out, two int32 arrays.

    The second has this fraction of all, or a little less, since equal ones go to
    the same side. The choice is random but always the same, so that runs with
    different seeds compare.
    """
    hashes, most = hash_sequences(corpus), round(fraction * len(corpus))
    # They are chosen from the lowest hashes, which are never all.
    place = min(4 * most, len(hashes) - 1)
    lowest = np.flatnonzero(hashes < np.partition(hashes, place)[place])
    kinds, counts = np.unique(hashes[lowest], return_counts=True)
    # What occurs often is held out less likely: a model never invents what it did not learn.
    order = np.argsort(kinds.astype(float) * counts)
    chosen = kinds[order[counts[order].cumsum() <= most]]
    held_out = np.zeros(len(corpus), bool)
    held_out[lowest[np.isin(hashes[lowest], chosen)]] = True
    return tuple(np.flatnonzero(side).astype(np.int32) for side in (~held_out, held_out))


def hash_sequences(corpus):
    """Returns a hash of each sequence, a uint32 array."""
    rng = np.random.default_rng(0)
    of_id, of_step = (
        rng.integers(2**64, size=size, dtype=np.uint64)
        for size in (len(corpus.alphabet), corpus.max_len + 1)
    )
    hashes = np.empty(len(corpus), np.uint32)
    for indices in in_blocks(np.arange(len(corpus), dtype=np.int32)):
        places, steps = corpus.locate(indices)
        products = of_id[corpus.targets[places]] * of_step[steps]
        hashes[indices] = np.add.reduceat(products, np.flatnonzero(steps == 0)) >> 32
    return hashes


def in_blocks(indices):
    """Yields the parts of an array of indices, to bound temporary memory."""
    for start in range(0, len(indices), 2**13):
        yield indices[start : start + 2**13]


def check_data(args, data):
    """Raises a `UserError` if the flags don't suit the data."""
    if args.patience and not len(data.held_out):
        raise UserError("--patience: nothing is held out to judge by; raise --validation_split")
    shapes = model.weight_shapes(len(data.corpus.alphabet), args.units, args.layers).values()
    count = sum(map(math.prod, shapes))
    if count > MOST_WEIGHTS:
        raise UserError(f"{count:,} parameters, over {MOST_WEIGHTS:,}; lower --units or --layers")


def hash_bytes(*parts):
    """Returns the SHA-256, a str, of bytes and arrays, one after the other."""
    digest = hashlib.sha256()
    for part in parts:  # not joined, which would copy all of a long list
        digest.update(part)
    return digest.hexdigest()


# The batches


def count_operations(corpus, units, layers):
    """Returns how many operations learning from a sequence takes on average, an int."""
    parameters = 4 * units * (len(corpus.alphabet) + (2 * layers - 1) * units)
    # A multiplication and an addition each; twice that in the backward pass.
    return 6 * parameters * math.ceil(corpus.lengths.mean())


class Batches:
    """Sequences in batches, and these in stacks, which `fit` takes one by one.

    Args:
        corpus: `model.Corpus`.
        indices: int array, the sequences to take.
        batch_size: int, sequences of a batch at most.
        depth: int, batches of a stack at most.
        packed: bool, whether a row holds several sequences, one after the other.
        devices: int, the number of rows is rounded up to a multiple of this.
        parts: int, how many epochs take all sequences together, each its share.

    Attributes:
        stacks: int, how many an epoch has.
        depth: int, how many batches each of them has.
        rows: int, how many each batch has.

    Example, six sequences in batches of three, each in one row:

    >>> corpus = model.build_corpus(["a", "bb", "ccc", "d", "ee", "fff"])
    >>> batches = Batches(corpus, np.arange(6), batch_size=3, depth=2)
    >>> [(inputs, targets, weights)] = batches.epoch()
    >>> inputs[:, 0]  # the first batch: "ccc", "bb" and "a", each after the sentinel
    array([[0, 3, 3, 3, 0, 2, 2, 0, 1]], dtype=int32)
    >>> targets[:, 0]
    array([[3, 3, 3, 0, 2, 2, 0, 1, 0]], dtype=int32)
    """

    def __init__(self, corpus, indices, batch_size, depth=1, packed=True, devices=1, parts=1):
        self.corpus, self.indices, self.parts = corpus, indices, parts
        size = math.ceil(len(indices) / parts)
        count = math.ceil(size / batch_size)
        # Sequences are dealt to as many batches as fill whole stacks, so that one shape is
        # all there is to compile. Some then have a sequence less than others.
        self.stacks = math.ceil(count / depth)
        self.depth = math.ceil(count / self.stacks)
        batch_size = math.ceil(size / (self.stacks * self.depth))
        self.filled = count_rows(batch_size) if packed else batch_size
        self.rows = math.ceil(self.filled / devices) * devices

    def epoch(self, seed=None, part=0):
        """Yields the stacks of an epoch.

        Args:
            seed: what `numpy.random.default_rng` takes, to shuffle the batches, and
                equally long sequences among them; None does neither.
            part: int, which share of them to take. Those with one seed have no
                sequence in common.

        Yields:
            Tuple `(inputs, targets, weights)` of arrays `(rows, depth, steps)`, two
            of int32 and one of float32: along the second axis, batch after batch.
            The shape is that of all epochs, if each takes all sequences.
            Inputs are 0, the sentinel, where a sequence begins. Weights are 0 where
            there is no target, and else such that the sum over a batch, averaged
            over all batches, is the mean over all targets.
        """
        order = self.deal(seed, part)
        lengths = np.where(order < 0, 0, self.corpus.lengths[order])
        weight = self.stacks * self.depth / lengths.sum()
        rows, begins, steps = self.pack(lengths)
        for start in range(0, order.shape[1], self.depth):
            stack = slice(start, start + self.depth)
            yield self.fill(order[:, stack], rows[:, stack], begins[:, stack], steps, weight)

    def deal(self, seed, part):
        """Deals the sequences out so that all batches get about equally many characters.

        Of the longest ones each batch gets one, then of the next longest, and so on,
        always a longer one where less has been dealt. Returns an int array `(batch_size,
        batches)` of indices, the longest last; where a batch has a sequence less, it
        begins with -1.
        """
        rng = np.random.default_rng(seed)
        order = self.indices if seed is None else rng.permutation(self.indices)
        order = order[part :: self.parts]
        order = order[np.argsort(self.corpus.lengths[order], kind="stable")]
        batches = self.stacks * self.depth
        order = np.pad(order, (-len(order) % batches, 0), constant_values=-1).reshape(-1, batches)
        dealt = np.zeros(batches, int)
        for alike in reversed(order):
            alike[np.argsort(-dealt, kind="stable")] = alike.copy()
            dealt += self.corpus.lengths[alike]  # wrong for -1, which is among the last only
        return order if seed is None else order[:, rng.permutation(batches)]

    def pack(self, lengths):
        """Puts each sequence of a batch, the longest first, into the row that is shortest so far.

        So the rows get about equally long, and little of a batch is padding.
        Takes the lengths by sequence and batch, and returns two int arrays of that
        shape, the row of each sequence and the step at which it begins there, and
        the length of the longest row.
        """
        batches = np.arange(lengths.shape[1])
        ends = np.zeros((len(batches), self.filled), np.int32)
        rows, begins = np.empty((2, *lengths.shape), np.int32)
        for place in reversed(range(len(lengths))):
            rows[place] = ends.argmin(axis=1)
            begins[place] = ends[batches, rows[place]]
            ends[batches, rows[place]] += lengths[place]
        return rows, begins, int(ends.max())

    def fill(self, order, rows, begins, steps, weight):
        """Returns the arrays of a stack, given what `deal` and `pack` say of its batches."""
        place, batch = np.nonzero(order >= 0)
        sequence, corpus = order[place, batch], self.corpus
        found, step = corpus.locate(sequence)
        place, batch = (each.repeat(corpus.lengths[sequence]) for each in (place, batch))
        cell = rows[place, batch], batch, begins[place, batch] + step
        targets = np.zeros((self.rows, self.depth, steps), np.int32)
        inputs, weights = np.zeros_like(targets), np.zeros(targets.shape, np.float32)
        targets[cell] = corpus.targets[found]
        inputs[cell] = np.where(step > 0, corpus.targets[found - 1], 0)
        weights[cell] = weight
        return inputs, targets, weights


def count_rows(batch_size):
    """Returns how many rows the sequences of a batch are packed into, an int."""
    return math.ceil(batch_size / SEQUENCES_PER_ROW)


# The network


def check_backend(name):
    """Raises a `UserError` if the backend of Keras with that name, a str, can't be used."""
    if name not in ("tensorflow", "jax"):
        raise UserError(f"KERAS_BACKEND: {name!r} is not supported; set it to tensorflow or jax")


def keep_memory():
    """Makes glibc keep what is freed.

    An XLA program takes its memory anew at each call, and so does each matrix
    product. Given back to the system each time, it costs up to half of the
    speed in page faults.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # where there is no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, in malloc.h
        mallopt(-4, 0)  # M_MMAP_MAX


@contextlib.contextmanager
def quiet():
    """Hides what TensorFlow writes to stderr before any log level applies."""
    with open(os.devnull, "wb") as nowhere, os.fdopen(os.dup(2), "wb") as stderr:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr.fileno(), 2)


def import_keras():
    """Imports Keras and wakes its backend."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if not importlib.util.find_spec("jax_plugins"):  # with one, JAX may compile for a GPU
        # On a CPU it compiles in two thirds of the time, to programs that are as fast.
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
                # It takes the runs of a notebook for one that compiles too often.
                logging.getLogger("tensorflow").setLevel(logging.ERROR)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        ways = "pip install -r requirements.txt, or check KERAS_BACKEND and ~/.keras/keras.json"
        raise UserError(f"Keras can't start: {reason}; {ways}") from None
    finally:
        gc.enable()
    gc.freeze()
    check_backend(keras.backend.backend())
    keras.config.set_floatx("float32")  # whatever keras.json says


def learns_by_hand(recurrent_dropout, distributed):
    """Returns whether to train through `model.run_lstm`, compiled by XLA.

    On a GPU an LSTM is one call of cuDNN, which is faster, but can neither drop
    recurrent inputs nor be divided among devices.
    """
    import keras

    return recurrent_dropout > 0 or distributed or "cpu" in keras.distribution.list_devices()[0]


def make_network(layers, by_hand):
    """Makes a `keras.Model` of layers that `fit` trains with a stack of batches in each step.

    Each batch goes through Keras's own `train_step`. The model reads int tensors `(rows,
    steps)`, which it passes to the layers one-hot, and its loss is in nats per character
    or end mark. If the layers learn `by_hand`, rows hold several sequences in training;
    in validation, which takes single batches, a row is one sequence.
    """
    import keras
    from keras import losses, ops

    class Network(keras.Sequential):
        # It takes ids, though `input_shape` stays that of the first layer.
        def call(self, ids, training=False):
            one_hot = ops.one_hot(ids, self.input_shape[-1])
            mask = ops.not_equal(ids, 0) if by_hand and training else None
            return super().call(one_hot, training=training, mask=mask)

        # Not `compile(loss=…)`: Keras on JAX would build it with a stack as if it were a batch.
        def compute_loss(self, x, y, y_pred, sample_weight, training=True):
            return ops.sum(losses.sparse_categorical_crossentropy(y, y_pred) * sample_weight)

    if keras.backend.backend() == "jax":
        return stack_steps_of_jax(Network)(layers)
    return stack_steps_of_tf(Network, by_hand)(layers)


def stack_steps_of_jax(network_class):
    """Makes a subclass of a `keras.Model` whose `train_step` takes a stack of batches."""
    import jax

    class Stacked(network_class):
        def train_step(self, state, stack):
            one_step = super().train_step
            batches = jax.tree.map(lambda array: array.swapaxes(0, 1), stack)
            state, logs = jax.lax.scan(lambda *each: one_step(*each)[::-1], state, batches)
            return jax.tree.map(lambda values: values[-1], logs), state

    return Stacked


def stack_steps_of_tf(network_class, by_hand):
    """Makes the same as `stack_steps_of_jax` on TensorFlow, compiled by XLA if `by_hand`."""
    import tensorflow as tf

    class Stacked(network_class):
        @tf.function(jit_compile=by_hand, reduce_retracing=True, autograph=False)
        def train_step(self, stack):
            one_step = super().train_step

            def learn_next(index):
                one_step(tuple(array[:, index] for array in stack))
                return [index + 1]

            tf.while_loop(lambda index: index < tf.shape(stack[0])[1], learn_next, [0])
            return self.get_metrics_result()

    return Stacked


def prepare_network(args, data, source, by_hand, updates):
    """Builds and compiles the network, with the weights that `initial_weights` gives.

    `updates` is the number of updates of the weights in all epochs.
    """
    import keras

    backend, devices = keras.backend.backend(), keras.distribution.list_devices()
    shares = args.dropout, args.recurrent_dropout
    size = len(data.corpus.alphabet), args.units, args.layers
    layers = model.build_layers(*size, *shares, args.seed, by_hand=by_hand)
    network = make_network(layers, by_hand)
    rate = keras.optimizers.schedules.CosineDecay(args.learning_rate, updates)
    # Over about the last eighth of the updates, but at most 300.
    momentum = 1 - 1 / min(max(updates / 8, 1), 300)
    adam = keras.optimizers.Adam(rate, global_clipnorm=1.0, use_ema=True, ema_momentum=momentum)
    network.compile(adam, jit_compile=backend == "jax")
    adam.build(network.trainable_variables)
    network.set_weights(initial_weights(network.get_weights(), data, source))
    say(
        f"Network: {args.layers} × LSTM({args.units}), {network.count_params():,} parameters, "
        f"by Keras on {backend}, {', '.join(devices)}"
    )
    return network


def initial_weights(weights, data, source):
    """Returns the weights to start from, a list of float32 arrays.

    They are random ones, `weights`, that know how frequent each character of
    the training data is, or what the `SequenceModel` `source` knows.
    """
    corpus = data.corpus
    blocks = (corpus.targets[corpus.locate(block)[0]] for block in in_blocks(data.training))
    counts = sum(np.bincount(block, minlength=len(corpus.alphabet)) for block in blocks)
    # A better start than zeros; what is never a target (the end, if all were cut) stays rare.
    weights[-1] = np.log((counts + 0.5) / counts.sum())
    return extend_weights(weights, corpus.alphabet, source) if source else weights


def extend_weights(weights, alphabet, source):
    """Returns the weights of the `SequenceModel` `source`, with room for a larger `Alphabet`.

    Characters that the model knows keep their odds among each other after
    any beginning, since a softmax keeps the ratios of the others when one is
    added. New ones start from their weights in `weights`, whose last bias is the
    logarithm of each character's frequency.
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


# A run and its file


class Progress:
    """How far a run has come.

    Flags and messages count passes over the data; `fit`, the history and this class
    count the parts of passes, and call them epochs.
    """

    def __init__(self, args, metadata, parts=1, group=(0, 1)):
        self.metadata, self.history = metadata, metadata["history"]  # two lists of losses, by name
        self.parts = parts  # epochs of a pass
        self.group = group  # the number of this process, and how many there are
        self.epochs = args.epochs * parts  # in all
        self.patience = (args.patience or math.inf) * parts  # epochs without a better one
        self.leads = group[0] == 0  # whether this process reads and writes files: one does
        self.path, self.log_dir = args.save_path, args.log_dir if self.leads else None
        self.weights, self.checkpoint = None, ()  # of the best epoch; what training continues with
        self.speeds, self.written = [], stamp(self.path)

    @property
    def done(self):
        """How many epochs are done, an int."""
        return len(self.history["loss"])

    @property
    def best(self):
        """Which of them is best, from 1; the last one if nothing is held out."""
        losses = self.history["val_loss"]
        return losses.index(min(losses)) + 1 if losses else self.done

    def name(self, epoch):
        """Returns what to call an epoch, from 0, a str: if passes are divided, a part of one."""
        number, part = divmod(epoch, self.parts)
        name = f"Epoch {number + 1}/{self.epochs // self.parts}"
        return name if self.parts == 1 else f"{name}, part {part + 1}/{self.parts}"

    def count(self, epochs):
        """Returns how many passes so many epochs are, a str."""
        return f"{epochs / self.parts:.6g}"

    @property
    def is_finished(self):
        """Whether nothing is left to do."""
        return self.done >= self.epochs or self.done - self.best >= self.patience

    @property
    def kept(self):
        """What the file holds now, a str."""
        return f"{self.path} keeps the last whole epoch" if self.done else "nothing new was saved"

    def save(self, checkpoint):
        """Writes the file, unless another program has done so."""
        if stamp(self.path) not in (None, self.written):
            raise UserError(f"--save_path: another program wrote {self.path}; pass another path")
        with model.naming("--save_path", self.path, "write"):
            model.save(self.path, self.weights, self.metadata, checkpoint)
        self.written = stamp(self.path)

    def write_losses(self):
        """Writes losses.csv anew, so that it holds whatever epoch the model's file holds."""
        columns = {name: losses for name, losses in self.history.items() if losses}
        passes = map(self.count, range(1, self.done + 1))
        rows = [("epoch", *columns), *zip(passes, *columns.values())]
        path = os.path.join(self.log_dir, "losses.csv")
        with model.naming("--log_dir", self.log_dir, "write"), model.replacing(path) as file:
            file.writelines(f"{','.join(map(str, row))}\n".encode() for row in rows)


def stamp(path):
    """Returns what tells a file from the one that replaces it, or None if there is none."""
    with contextlib.suppress(FileNotFoundError):
        found = os.stat(path)
        return found.st_ino, found.st_size, found.st_mtime_ns


def describe(args, data, source):
    """Returns the metadata of a run that has not begun: a dict for `model.save`."""
    corpus = data.corpus
    fingerprint = hash_bytes(corpus.alphabet.symbols.encode(), corpus.targets, corpus.lengths)
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


def identify(metadata):
    """Returns all that makes two runs the same, a flat dict, given a run's metadata."""
    names = "init_from", "data", "units", "layers", "max_len"
    settings = metadata.get("settings")
    return {
        "sentinel": metadata["alphabet"][0],
        **{name: metadata.get(name) for name in names},
        **(settings if isinstance(settings, dict) else {}),
    }


def continue_run(progress):
    """Makes `Progress` go on from its file, if there is one.

    Of a group, process 0 reads that; if it refuses the file, all stop.
    """
    refusal = None
    if progress.leads and progress.written:
        try:
            with model.naming("--save_path", progress.path):
                read_earlier_run(progress)
        except UserError as error:
            refusal = f"{error}; {WAYS_OUT}"
    if progress.group[1] > 1:
        refusal, history = broadcast([refusal, progress.history])
        progress.history.update(history)
    if refusal:
        raise UserError(refusal)


def read_earlier_run(progress):
    """Sets `Progress` to what its file holds; raises a `UserError` if that is another run.

    What counts is what the flags mean, not how they were typed.
    """
    path = progress.path
    best, found, progress.checkpoint = model.load(path, checkpoint=True)
    progress.weights, then, now = best.weights, identify(found), identify(progress.metadata)
    if name := next((name for name in now if then.get(name) != now[name]), None):
        difference = f"--{name} {reprlib.repr(then.get(name))}, not {now[name]!r}"
        if name == "init_from":
            difference = "another --init_from"
        elif name == "data":
            difference = "other data (--sequence_path, --num_sequences, --max_len)"
            difference += f"; --init_from {path} with another --save_path learns from it"
        raise UserError(f"{path} was trained with {difference}")
    if not (progress.checkpoint and is_history(found.get("history"))):
        raise UserError(f"{path} lacks what continuing needs")
    progress.history.update(found["history"])


def is_history(value):
    """Returns whether a value from a file's metadata is a history."""
    match value:
        case {"loss": [*losses], "val_loss": [*held_out]} if len(held_out) in (0, len(losses)):
            return all(type(loss) is float for loss in losses + held_out)
    return False


# Several cores, devices and hosts


def count_cores():
    """Returns how many cores this process may use, an int."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/cpu.max") as file:
        quota, period = map(int, file.read().split())
        cores = min(cores, max(1, quota // period))
    return cores


def use_cores(rows, operations):
    """Gives each usable core a device on JAX; returns whether Keras should divide batches.

    Within a device XLA keeps to about one core. Small batches, of few `rows` or
    `operations`, get fewer devices, each at least two rows.
    """
    import jax
    import keras

    count = max(1, min(count_cores(), rows // 2, operations // OPERATIONS_PER_DEVICE))
    # So that no rows are added: what dropout draws must not depend on the number of cores.
    count = max(divisor for divisor in range(1, count + 1) if rows % divisor == 0)
    if count > 1:
        with contextlib.suppress(RuntimeError):  # of a second run in one process
            jax.config.update("jax_num_cpu_devices", count)
    devices = keras.distribution.list_devices()
    return count > 1 and "cpu" in devices[0] and rows % len(devices) == 0


def join_group(args, metadata):
    """Joins the processes of a group, whose devices will share each batch.

    All must have been started alike, with flags and data of this metadata. Returns
    the number of this process and how many there are, two int.
    """
    import_keras()
    import jax
    import keras
    from jax.experimental import multihost_utils

    try:
        if os.environ.get("KERAS_DISTRIBUTION_JOB_ADDRESSES"):
            # Gloo writes its peers' names straight to file descriptor 1.
            sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, errors="backslashreplace")
            model.discard(sys.__stdout__)
            with quiet():  # it imports TensorFlow
                keras.distribution.initialize()
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"--distribute: {reason}; check the KERAS_DISTRIBUTION_… variables on every host"
        ) from None
    model.catch_signals()  # JAX has taken SIGTERM
    digest = hash_bytes(json.dumps([metadata, args.patience, args.overwrite]).encode()).encode()
    try:
        multihost_utils.assert_equal(np.frombuffer(digest, np.uint8))
    except AssertionError:
        raise UserError(
            "--distribute: the processes differ in their flags or data; start them all alike"
        ) from None
    if jax.process_index() > 0:
        print(f"Process {jax.process_index()} of {jax.process_count()}; process 0 prints the rest")
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    return jax.process_index(), jax.process_count()


def broadcast(value):
    """Returns in every process of a group what process 0 passes, a value that JSON can hold."""
    from jax.experimental.multihost_utils import broadcast_one_to_all

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(broadcast_one_to_all(np.int32(len(text))))
    return json.loads(bytes(broadcast_one_to_all(np.resize(text, size))))


# Training


def set_variables(variables, progress):
    """Sets Keras variables to the checkpoint of `Progress`, if it has one.

    All processes of a group must call it, and get the values of process 0.
    """
    values = progress.checkpoint or [np.asarray(each) for each in variables]
    fits = [value.shape for value in values] == [tuple(each.shape) for each in variables]
    if not (broadcast(fits) if progress.group[1] > 1 else fits):
        raise UserError(f"--save_path: {progress.path} is of another version; {WAYS_OUT}")
    values = [value.astype(variable.dtype) for variable, value in zip(variables, values)]
    if progress.group[1] > 1:
        from jax.experimental.multihost_utils import broadcast_one_to_all

        values = broadcast_one_to_all(values)
    for variable, value in zip(variables, values):
        variable.assign(value)  # which all processes of a group must do together


def stream(batches, group, seed=None, first=0):
    """Yields the stacks of all epochs from the `first` on: the rows that this process takes."""
    rank, processes = group
    size = batches.rows // processes
    for epoch in itertools.count(first):
        number, part = divmod(epoch, batches.parts)
        for stack in batches.epoch(None if seed is None else (seed, number), part):
            yield tuple(array[rank * size : (rank + 1) * size] for array in stack)


def as_data(arrays):
    """Returns tuples of arrays, an iterator, in the form in which `fit` takes them."""
    import keras

    if keras.backend.backend() == "jax":
        return arrays
    import tensorflow as tf

    first = next(arrays)
    signature = tuple(tf.TensorSpec([*array.shape[:-1], None], array.dtype) for array in first)
    arrays = itertools.chain([first], arrays)
    # Not prefetched: at Ctrl-C, Python and the thread that does it can wait for each other forever.
    data = tf.data.Dataset.from_generator(lambda: arrays, output_signature=signature)
    options = tf.data.Options()
    options.autotune.enabled = False  # its thread can take two seconds to end
    return data.with_options(options)


def make_callbacks(progress, data, seed):
    """Returns the Keras callbacks, a list, in the order in which they must run."""
    from keras.callbacks import Callback, ProgbarLogger, SwapEMAWeights, TensorBoard, TerminateOnNaN

    class Keeper(Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if self.params["verbose"] and progress.parts > 1:
                say(progress.name(epoch))
            self.start = time.perf_counter()

        def on_train_batch_end(self, batch, logs=None):
            self.seconds = time.perf_counter() - self.start  # without validation and saving

        def on_epoch_end(self, epoch, logs=None):
            averages = keep_epoch(progress, self.model, logs)
            self.model.stop_training = progress.is_finished
            progress.speeds.append(len(data.training) / progress.parts / self.seconds)
            if not self.params["verbose"]:  # else the bar has shown this
                losses = " - ".join(f"{name}: {loss:.4f}" for name, loss in logs.items())
                say(f"{progress.name(epoch)} - {losses} - {progress.speeds[-1]:,.0f} sequences/s")
            current = SequenceModel(data.corpus.alphabet, data.corpus.max_len, averages)
            show_invented(current, data, (seed, epoch))

    # The bar must end before anything else is printed.
    made = [SwapEMAWeights(), TerminateOnNaN(), ProgbarLogger(), Keeper()]
    if progress.log_dir is None:
        return made
    if not progress.done:  # TensorBoard would draw an earlier run into this one
        for part in ("train", "validation"):
            for old in pathlib.Path(progress.log_dir, part).glob("events.out.tfevents.*"):
                old.unlink()
    with quiet():  # before Keras imports it on JAX
        import tensorflow  # noqa: F401
    return [*made, TensorBoard(progress.log_dir, write_graph=False)]


def keep_epoch(progress, network, losses):
    """Adds an epoch with these losses to `Progress`, and saves that.

    Returns the weights to sample with, as `get_weights` does. Raises a `UserError` if
    the run diverged.
    """
    # The moving averages predict better than the weights, the more so the shorter the list.
    found = [each for each in network.optimizer.variables if each.name.endswith("_average")]
    averages = [np.asarray(each).copy() for each in found]  # JAX takes their memory again
    checkpoint = [np.asarray(each) for each in network.variables + network.optimizer.variables]
    arrays = *checkpoint, *map(np.asarray, losses.values())
    if not all(model.is_within(array, model.LARGEST_WEIGHT) for array in arrays):
        raise UserError(
            f"{progress.name(progress.done)}: the loss or a weight is NaN or too large; "
            f"{progress.kept}; try a lower --learning_rate"
        )
    with model.holding_signals():  # the history says what is saved, and nothing else
        for name, loss in losses.items():
            progress.history[name].append(loss)
        if progress.best == progress.done:
            progress.weights = averages
        if progress.leads:
            progress.save(checkpoint)
    if progress.log_dir is not None:
        progress.write_losses()
    return averages


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
    corpus = data.corpus
    if not set(text) <= set(corpus.alphabet.symbols):  # it is composed
        return "new"
    ids = [*corpus.alphabet.encode(text), 0]
    lacking = len(ids) - corpus.lengths
    places = np.flatnonzero((lacking == 0) | (lacking == 1))  # a sequence that was cut has no end
    for step, index in enumerate(ids):
        found = corpus.targets.take(corpus.starts[places] + step, mode="clip")
        places = places[(found == index) | (corpus.lengths[places] == step)]
    if not len(places):
        return "new"
    return "held out" if np.isin(places[0], data.held_out) else "learned"


def shows_bar():
    """Returns whether Keras's bar suits the terminal: it has colors and needs some width."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not plain and shutil.get_terminal_size().columns >= 80


def fit(args, data, source, progress):
    """Trains: builds the network, sets it to the run's variables and calls Keras's `fit`."""
    import_keras()
    import keras

    corpus, size = data.corpus, args.batch_size
    operations = count_operations(corpus, args.units, args.layers) * size
    on_jax = keras.backend.backend() == "jax"
    divided = args.distribute or (on_jax and use_cores(count_rows(size), operations))
    devices = len(keras.distribution.list_devices()) if divided else 1
    parallel = keras.distribution.DataParallel(auto_shard_dataset=False) if divided else None
    keras.distribution.set_distribution(parallel)  # or None, since an earlier run may have set it
    by_hand = learns_by_hand(args.recurrent_dropout, args.distribute)
    cells = size * math.ceil(corpus.lengths.mean())
    depth = max(1, min(MOST_BATCHES, MOST_OPERATIONS // operations, MOST_CELLS // cells))
    learned = Batches(corpus, data.training, size, depth, by_hand, devices, progress.parts)
    updates = progress.epochs * learned.stacks * learned.depth
    network = prepare_network(args, data, source, by_hand, updates)
    set_variables(network.variables + network.optimizer.variables, progress)
    validation = {}
    if len(data.held_out):
        size = min(VALIDATION_BATCH, len(data.held_out))
        held_out = Batches(corpus, data.held_out, size, packed=False, devices=devices)
        stacks = stream(held_out, progress.group)
        single = (tuple(array[:, 0] for array in stack) for stack in stacks)
        validation = {"validation_data": as_data(single), "validation_steps": held_out.stacks}
    say("Compiling, which takes a few seconds")
    # The data are endless; the numbers of steps say where an epoch ends.
    network.fit(
        as_data(stream(learned, progress.group, args.seed, progress.done)),
        steps_per_epoch=learned.stacks,
        **validation,
        initial_epoch=progress.done,
        epochs=progress.epochs,
        callbacks=make_callbacks(progress, data, args.seed),
        verbose=1 if shows_bar() else 0,
        shuffle=False,
    )


# All of it


def run(args):
    """Does what the command line asks for and returns the exit status."""
    # A name in Japanese must not stop a night's training under LANG=C.
    model.reconfigure(sys.stdout, errors="backslashreplace", line_buffering=True)
    check_flags(args)
    source = read_source(args)
    data = read_data(args, source)
    check_data(args, data)
    args.batch_size = min(args.batch_size, len(data.training))  # a larger one is the same run
    metadata, group = describe(args, data, source), (0, 1)
    if args.distribute:
        group = join_group(args, metadata)
    operations = count_operations(data.corpus, args.units, args.layers) * len(data.training)
    progress = Progress(args, metadata, math.ceil(operations / LARGEST_PART), group)
    if not args.overwrite:
        continue_run(progress)
    tell_what_was_read(args, data, source)
    if progress.log_dir is not None:
        progress.write_losses()
    if progress.is_finished:
        flag = "--epochs" if progress.done >= progress.epochs else "--patience"
        done = f"finished, after {progress.count(progress.done)} epochs"
        say(f"The run in {args.save_path} is {done}; raise {flag} to go on")
    else:
        if progress.done:
            say(f"Continuing {args.save_path} after epoch {progress.count(progress.done)}")
        try:
            fit(args, data, source, progress)
        except KeyboardInterrupt as stop:
            kept = progress.kept
            if progress.done:
                without = " without --overwrite" if args.overwrite else ""
                kept += f"; the same command{without} continues"
            stop.args = *(stop.args or [signal.SIGINT]), kept
            raise
        except Exception as error:
            # As TensorFlow and JAX call it.
            if re.search("resource_?exhausted", f"{type(error).__name__} {error}", re.IGNORECASE):
                raise MemoryError from None
            raise
    tell_what_was_learned(progress)
    return 0


def tell_what_was_read(args, data, source):
    """Prints what the data are, and what was left out of them."""
    corpus, loader = data.corpus, data.loader
    if loader.header:
        say(f"Skipped the header ({', '.join(loader.header)}) and read the first column")
    if loader.uneven:
        say(f"{loader.uneven:,} rows differ from the header in columns; quote their delimiters")
    characters = np.count_nonzero(corpus.targets)
    cut = len(corpus) - (len(corpus.targets) - characters)  # which have no end mark
    say(
        f"Read {len(corpus):,} sequences, {characters:,} characters, "
        f"an alphabet of {len(corpus.alphabet) - 1:,}, from {args.sequence_path}"
    )
    if loader.advice:
        say(f"{args.sequence_path}: {loader.advice}")
    if source:
        added = len(corpus.alphabet) - len(source.alphabet)
        say(f"Starting from {args.init_from}, with {added:,} characters added to its alphabet")
    if cut:
        dropped = f"leaving out {corpus.dropped:,}"
        say(f"Cut {cut:,} sequences to {corpus.max_len} characters (--max_len), {dropped}")
    count, held_out = len(data.training), len(data.held_out)
    say(f"Learning from {count:,} sequences, holding out {held_out:,} for validation")
    if flags := " ".join(f"--{name} {value:g}" for name, value in data.chosen.items()):
        say(f"Chosen for this much data: {flags}")
    if not source and len(corpus.targets) <= SHORT:
        say(
            "Starting from a model of similar sequences usually predicts better with so little: "
            f"--init_from {shlex.quote(os.path.relpath(SHIPPED))}, with another --save_path"
        )


def tell_what_was_learned(progress):
    """Prints a table of what the file holds, and how to go on."""
    table, best = {"saved in": progress.path}, progress.best
    if progress.history["val_loss"]:
        hint = "; more --epochs may help" if best == progress.epochs else ""
        table["best epoch"] = f"{progress.count(best)} of {progress.count(progress.done)}{hint}"
    for name, key in ("loss", "loss"), ("validation loss", "val_loss"):
        if losses := progress.history[key]:
            perplexity = f"perplexity {model.perplexity(losses[best - 1]):.4g}"
            table[name] = f"{losses[best - 1]:.4f} nats per character, {perplexity}"
    if speeds := progress.speeds[1:]:  # in the first epoch Keras compiles
        table["speed"] = f"{np.median(speeds):,.0f} sequences/s"
    for name, value in table.items():
        say(f"{name:17}{value}")
    say(f"Sample from it:  python sample.py --weights_path {shlex.quote(progress.path)}")


def say(text):
    """Prints a line that may hold text from a file."""
    print(model.printable(text))


def main(arguments=None):
    """Runs the command line and returns the exit status."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    return model.run_script(parser, run, args, "--batch_size, --units or --max_len")


if __name__ == "__main__":
    sys.exit(main())
