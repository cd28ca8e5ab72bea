"""Learns to write sequences like those in a file and saves what it learned as an `.h5`."""

import argparse
import contextlib
import hashlib
import itertools
import math
import os
import shlex
import signal
import sys
import tempfile
import threading

import numpy as np

import model
from loaders import LOADERS
from model import CommandLine, SequenceModel, UserError, within

EXAMPLE = """example:
  python train.py --loader_class UserNameLoader --sequence_path names.csv --save_path names.h5

The same command again continues where the file at --save_path stands, and so
does a larger --epochs. Ctrl-C stops; what the last whole epoch learned is kept.
"""

NOTHING_SAVED = "nothing new was saved"
# Set by Ctrl-C, since a library can make another error of a KeyboardInterrupt or drop it.
stop_requested = threading.Event()


# What makes two runs the same run: a file is continued only if all of it agrees.
SETTINGS = (
    "max_len",
    "sentinel",
    "units",
    "layers",
    "dropout",
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
    many = within(int, 1, model.LIMIT)

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
        type=many,
        help="cut sequences to so many characters (default: the longest one's, "
        f"at most {model.LONGEST})",
    )
    data.add_argument(
        "--sentinel",
        type=one_character,
        default="\n",
        help="a character that no sequence contains, to mark where they end "
        r"(default: the newline, '\n')",
    )
    data.add_argument(
        "--validation_split",
        type=within(float, 0, 0.9),
        default=0.1,
        help="share of the distinct sequences that is not learned but used to choose the best "
        "epoch; 0 for none",
    )

    network = parser.add_argument_group("network")
    network.add_argument("--units", type=many, default=128, help="width of each LSTM layer")
    network.add_argument("--layers", type=many, default=2, help="LSTM layers")
    network.add_argument(
        "--dropout",
        type=within(float, 0, 0.9),
        default=0.3,
        help="share of each layer's outputs that is dropped while it learns",
    )

    fit = parser.add_argument_group("fit")
    fit.add_argument("--batch_size", type=many, default=32, help="sequences a training step")
    fit.add_argument("--epochs", type=many, default=15, help="passes over the data, in all")
    fit.add_argument(
        "--learning_rate",
        type=within(float, 1e-9, 10),
        default=0.01,
        help="Adam's at the start; it falls to 0 over all epochs along a cosine",
    )
    fit.add_argument(
        "--patience",
        type=many,
        help="stop after so many epochs without a better validation loss (default: never)",
    )
    fit.add_argument(
        "--seed", type=within(int, 0, 2**32 - 1), default=0, help="makes a run repeatable"
    )

    file = parser.add_argument_group("file")
    file.add_argument("--save_path", default="incognito_model.h5", help="where the model is kept")
    file.add_argument(
        "--overwrite", action="store_true", help="start over if there is such a file already"
    )
    return parser, parser.parse_args(arguments)


def one_character(text):
    """The `argparse` type of `--sentinel`."""
    if len(text) != 1 or "\ud800" <= text <= "\udfff":
        raise argparse.ArgumentTypeError(f"not a single character: {text!r}")
    return text


def read_corpus(args):
    """Reads and encodes the data that the command line names.

    Returns:
        `model.Corpus`.

    Raises:
        UserError: if it can't be read or learned.
    """
    loader = LOADERS[args.loader_class](args.sequence_path, max_sequences=args.num_sequences)
    try:
        return model.encode(loader, args.sentinel, args.max_len)
    except OSError as error:
        raise UserError(
            f"--sequence_path: can't read {args.sequence_path}: {error.strerror}; "
            "name a file with your sequences"
        ) from None
    except model.SentinelError as error:
        raise UserError(explain_sentinel(args, loader, error)) from None
    except ValueError as error:
        raise UserError(f"--sequence_path: {error}") from None


def explain_sentinel(args, loader, error):
    """Returns what to tell the user about a `model.SentinelError` in a loader's data."""
    where, such_as = f"sequence {error.first + 1}", ""
    if os.path.isfile(args.sequence_path):  # what came through a pipe can't be read again
        used = set(itertools.chain.from_iterable(loader))
        next(itertools.islice(loader, error.first, None))
        candidates = itertools.chain(" |~^_", filter(str.isprintable, map(chr, range(33, 0xD800))))
        free = next(character for character in candidates if character not in used)
        where, such_as = f"line {loader.line}", f", such as --sentinel {shlex.quote(free)}"
    return (
        f"{args.sequence_path}, {where}: the sequence contains the sentinel {args.sentinel!r} "
        f"({error.count} in all do); pass a character that none contains{such_as}"
    )


def split(corpus, fraction, seed):
    """Chooses the sequences that are held out to validate.

    Equal sequences all go to the same side.

    Args:
        corpus: `model.Corpus`.
        fraction: float, the share of the distinct sequences to hold out.
        seed: int.

    Returns:
        Tuple `(training, held_out)` of two `model.Corpus`. The second is
        empty if that share is less than one sequence; the first never is.
    """
    kinds = number_kinds(corpus.rows)
    distinct = kinds.max() + 1
    count = min(round(fraction * distinct), distinct - 1)
    chosen = np.random.default_rng(seed).permutation(distinct)[:count]
    held_out = np.isin(kinds, chosen)
    return corpus.subset(np.flatnonzero(~held_out)), corpus.subset(np.flatnonzero(held_out))


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


def make_dataset(corpus, batch_size):
    """Makes the `keras.utils.PyDataset` that feeds a corpus to Keras.

    The weights that it gives the targets make Keras's running mean of the
    losses of an epoch's batches exactly the mean over all real targets:
    Keras divides the weighted sum in a batch by its size × its steps, and
    weights batches by their size, so each real target gets the weight
    steps ÷ (targets a sequence has on average in the whole corpus).

    Args:
        corpus: `model.Corpus`.
        batch_size: int.

    Returns:
        The dataset. It keeps the corpus's order until its `shuffle` is called.
    """
    from keras.utils import PyDataset

    class Dataset(PyDataset):
        def __init__(self):
            super().__init__()
            self.order = np.arange(len(corpus))
            targets = corpus.targets
            self.targets_per_sequence = targets.mean()
            self.longer_than_any = targets.max() + 1

        def shuffle(self, seed):
            self.order = np.random.default_rng(seed).permutation(len(corpus))

        def __len__(self):
            return math.ceil(len(corpus) / batch_size)

        def __getitem__(self, index):
            chosen = self.order[index * batch_size : (index + 1) * batch_size]
            # On TensorFlow, Keras takes a length that the first two batches
            # share for that of all; so they must differ, if only in padding.
            steps = self.longer_than_any if index == 0 else None
            inputs, targets, weights = model.make_batch(corpus.subset(chosen), steps)
            return inputs, targets, weights * (weights.shape[1] / self.targets_per_sequence)

    return Dataset()


def describe(args, corpus):
    """Returns the metadata of a run that has not begun: a dict for `model.save`."""
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
        "epochs": args.epochs,
        "history": {"loss": [], "val_loss": []},
    }


def find_earlier_run(args, metadata):
    """Looks for a run to continue at `--save_path` and checks that it is this one.

    Args:
        args: the command line.
        metadata: this run's, from `describe`.

    Returns:
        Tuple `(history, weights, state)`: the losses so far, the best weights
        and the training state; or None if this run begins.

    Raises:
        UserError: if training must not or can't write there.
    """
    path = args.save_path
    try:
        model.check_target(path, {"--sequence_path": args.sequence_path})
    except ValueError as error:
        raise UserError(f"--save_path: {error}") from None
    if args.overwrite or not os.path.lexists(path):
        return None
    ways_out = "pass --overwrite to start over, or another --save_path"
    try:
        best, found = model.load(path)
        difference = find_difference(found, metadata)
        state = [] if difference else model.load_training_state(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--save_path: {error}; {ways_out}") from None
    if not difference and not (state and is_history(found.get("history"))):
        difference = "holds a finished model without what continuing needs"
    if difference:
        raise UserError(f"--save_path: {path} {difference}; {ways_out}")
    return found["history"], best.weights, state


def find_difference(found, metadata):
    """Returns in which way a file's metadata are not this run's, or None."""
    settings = found.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    for name in SETTINGS:
        now, then = metadata["settings"][name], settings.get(name)
        if now != then:
            return f"was trained with --{name} {then!r}, not {now!r}"
    return None if metadata["data"] == found.get("data") else "was trained on other data"


def is_history(value):
    """Tells whether a value from a file's metadata is a history of losses."""
    return (
        isinstance(value, dict)
        and list(value) == ["loss", "val_loss"]
        and all(isinstance(losses, list) for losses in value.values())
        and all(type(loss) is float for losses in value.values() for loss in losses)
        and len(value["val_loss"]) in (0, len(value["loss"]))
    )


def epochs_since_best(history):
    """Returns how many epochs ago the best validation loss was, 0 if there is none."""
    losses = history["val_loss"]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def import_keras():
    """Imports Keras without the start-up messages of the libraries below it.

    They are written to the process's stderr before any log level applies, so
    the file descriptor itself is turned away. If the import fails, they show.

    Returns:
        The module `keras`.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    with tempfile.TemporaryFile() as messages:
        stderr = os.dup(2)
        os.dup2(messages.fileno(), 2)
        try:
            import keras

            with contextlib.suppress(ImportError):
                import tensorflow  # noqa: F401 - on any backend, Keras would later
        except Exception:
            if not stop_requested.is_set():
                messages.seek(0)
                os.write(stderr, messages.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
    return keras


def prepare_network(args, training, steps):
    """Builds and compiles the Keras network and its optimizer.

    Args:
        args: the command line.
        training: `model.Corpus`.
        steps: int, how many training steps all epochs take together.

    Returns:
        A `keras.Sequential` that has learned nothing but how frequent each
        character is.
    """
    import keras

    keras.utils.set_random_seed(args.seed)
    network = model.build_network(len(training.alphabet), args.units, args.layers, args.dropout)
    rate = keras.optimizers.schedules.CosineDecay(args.learning_rate, steps)
    network.compile(
        optimizer=keras.optimizers.Adam(rate, global_clipnorm=1.0),
        loss="sparse_categorical_crossentropy",
    )
    network.optimizer.build(network.trainable_variables)
    # The softmax starts from the frequencies of the targets: a good place to learn
    # from, and what never is one (the end, if all sequences were cut) stays unlikely.
    counts = sum(
        np.bincount(column, minlength=len(training.alphabet)) for column in training.rows.T
    )
    counts[0] = np.count_nonzero(training.complete)
    network.layers[-1].bias.assign(np.log((counts + 0.5) / counts.sum()))
    return network


def fit(args, metadata, training, held_out, best, state):
    """Trains, saving after each epoch.

    Args:
        args: the command line.
        metadata: this run's, from `describe`; its history grows.
        training, held_out: `model.Corpus`, as `split` returns them.
        best, state: the best weights so far and the training state, as
            `find_earlier_run` returns them.

    Raises:
        UserError: if the loss stops being a number, the file can't be
            written, or the earlier run's state can't be taken up.
    """
    keras = import_keras()
    dataset = make_dataset(training, args.batch_size)
    network = prepare_network(args, training, args.epochs * len(dataset))
    variables = network.variables + network.optimizer.variables
    if state:
        if [array.shape for array in state] != [tuple(variable.shape) for variable in variables]:
            raise UserError(
                f"--save_path: {args.save_path} was trained with a version of Keras that this "
                "one can't continue; pass --overwrite to start over, or another --save_path"
            )
        for variable, array in zip(variables, state):
            variable.assign(array)
    metadata["versions"] = {"keras": keras.__version__, "numpy": np.__version__}
    history = metadata["history"]
    print(f"Network: {args.layers} × LSTM({args.units}), {network.count_params():,} parameters")

    def begin_batch(batch, logs):
        if stop_requested.is_set():
            raise KeyboardInterrupt

    def begin_epoch(epoch, logs):
        dataset.shuffle((args.seed, epoch))

    def end_epoch(epoch, logs):
        nonlocal best
        if not all(map(math.isfinite, logs.values())):
            raise UserError(
                f"the loss of epoch {epoch + 1} is not a number any more; try a --learning_rate "
                f"below {args.learning_rate}, in another --save_path or with --overwrite"
            )
        for name, losses in history.items():
            if name in logs:
                losses.append(logs[name])
        weights = network.get_weights()
        if epochs_since_best(history) == 0:
            best = weights
        state = [keras.ops.convert_to_numpy(variable) for variable in variables]
        try:
            model.save(args.save_path, network, best, metadata, state)
        except OSError as error:
            raise UserError(
                f"--save_path: can't write {args.save_path}: {error.strerror}; "
                "the epochs before this one are kept if there were any"
            ) from None
        current = SequenceModel(training.alphabet, metadata["max_len"], weights)
        invented = current.sample(count=8, seed=(args.seed, epoch))
        print("invented: " + "  ".join(map(model.printable, invented)))
        if args.patience and epochs_since_best(history) >= args.patience:
            network.stop_training = True

    network.fit(
        dataset,
        validation_data=make_dataset(held_out, args.batch_size) if len(held_out) else None,
        initial_epoch=len(history["loss"]),
        epochs=args.epochs,
        shuffle=False,  # Keras's own order could not be continued; the dataset has one that can
        callbacks=[
            keras.callbacks.ProgbarLogger(),  # first, so that its line ends before ours begins
            keras.callbacks.LambdaCallback(
                begin_epoch, end_epoch, on_train_batch_begin=begin_batch
            ),
        ],
        verbose=1 if sys.stdout.isatty() else 2,
    )


def run(args):
    """Does what the command line asks for, from reading the data to the last line printed.

    Raises:
        UserError: as the functions above do.
    """
    corpus = read_corpus(args)
    metadata = describe(args, corpus)
    earlier = find_earlier_run(args, metadata)
    training, held_out = split(corpus, args.validation_split, args.seed)
    print(
        f"Read {len(corpus):,} sequences, {np.count_nonzero(corpus.rows):,} characters, "
        f"{len(corpus.alphabet) - 1:,} different, from {args.sequence_path}"
    )
    if not corpus.complete.all():
        print(
            f"Cut to {metadata['max_len']} characters, because they were longer: "
            f"{np.count_nonzero(~corpus.complete):,} (--max_len)"
        )
    print(f"Learning from {len(training):,}, holding out {len(held_out):,} to validate")
    del corpus  # the two parts are copies

    best, state = None, []
    if earlier:
        metadata["history"], best, state = earlier
    history = metadata["history"]
    done = len(history["loss"])
    if done >= args.epochs or (args.patience and epochs_since_best(history) >= args.patience):
        print(f"{args.save_path} is finished: it has learned for {done} epochs")
    else:
        if done:
            print(f"Continuing {args.save_path} after epoch {done}")
        try:
            fit(args, metadata, training, held_out, best, state)
        except (Exception, KeyboardInterrupt):
            if not stop_requested.is_set():
                raise
            raise KeyboardInterrupt(explain_stop(args, history)) from None

    kept = len(history["loss"]) - epochs_since_best(history)
    loss = (history["val_loss"] or history["loss"])[kept - 1]
    perplexity = math.exp(loss) if loss < 700 else math.inf
    print(
        f"{args.save_path} holds epoch {kept}: {'validation ' if history['val_loss'] else ''}loss "
        f"{loss:.4f} nats per character, perplexity {perplexity:.4g}"
    )
    print(f"Sample from it: python sample.py --weights_path {shlex.quote(args.save_path)}")


def explain_stop(args, history):
    """Returns what to tell the user who stopped the training after these losses."""
    if not history["loss"]:
        return NOTHING_SAVED
    without = " without --overwrite" if args.overwrite else ""
    return f"{args.save_path} keeps the last whole epoch; the same command{without} continues"


def request_stop(signal_number, frame):
    """Handles Ctrl-C: raises KeyboardInterrupt, and remembers that it did."""
    stop_requested.set()
    raise KeyboardInterrupt


def main(arguments=None):
    """Runs the command line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, request_stop)
    # A name in Japanese must not stop a night's training under LANG=C.
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    parser, args = parse_arguments(arguments)
    if args.patience and not args.validation_split:
        parser.error(
            "--patience waits for a better validation loss, so it needs a "
            "--validation_split above 0"
        )
    try:
        run(args)
    except UserError as error:
        parser.error(str(error))
    except OSError as error:  # reading and saving explain themselves; this is stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.error(f"can't print what happens: {error.strerror}; whole epochs are kept")
    except KeyboardInterrupt as stop:
        print(f"\nStopped: {str(stop) or NOTHING_SAVED}.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
