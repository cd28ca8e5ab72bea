"""What a model is: its alphabet and encoding, its Keras network, its `.h5` file.

Strings become rows of small integers (`encode`), `build_network` makes the
Keras LSTM that learns from them by `total_loss`, and `save` writes it to a file
that stock Keras opens. `load` reads such a file with
h5py alone into a `SequenceModel`, which runs the same network in NumPy: it is
ready in a fraction of the time that importing Keras takes.
"""

import argparse
import codecs
import contextlib
import dataclasses
import errno
import functools
import glob
import io
import itertools
import json
import math
import os
import signal
import stat
import sys
import tempfile
import time
import warnings
import zlib

import h5py
import numpy as np

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

FORMAT = 1
LONGEST = 64  # characters kept of a sequence unless the user says otherwise
SECONDS, MEMORY = 2, 2**27  # what the HDF5 library may take to look through a file, and bytes
BATCH = 2048  # sequences that are invented at a time: more would not fit the cache
DRAWS = 32  # random numbers that are made at a time for each of them
LIMITS = {"alphabet": 2**18, "max_len": 2**16, "units": 2**16, "layers": 2**6}  # the most of each
LARGEST = float(np.float32(1e30))  # a weight; sums of as many as there can be are still numbers
METADATA = "sequence_model"  # the root attribute that holds what Keras has no place for
METADATA_SIZE = 2**22  # its most bytes: JSON can take 30 times its size in memory
TRAINING_STATE = "training_state"  # the group that holds what continuing needs


class Alphabet:
    """The characters a model knows, numbered: the sentinel is 0.

    A character is a Unicode code point. The sentinel is the one that starts,
    ends and pads every sequence, so no sequence may contain it.

    Args:
        symbols: str, each character once, the sentinel first.
    """

    def __init__(self, symbols):
        self.symbols = symbols
        self.sentinel = symbols[0]
        self._points = code_points(symbols)
        self._ids = np.zeros(sys.maxunicode + 1, np.int32)
        self._ids[self._points] = np.arange(len(symbols))

    def __len__(self):
        return len(self.symbols)

    def encode(self, text):
        """Returns the ids of a str's characters, an int array of its length.

        Raises:
            ValueError: if `text` holds the sentinel or a character that is
                not in the alphabet; the message names them.
        """
        points = code_points(text)
        ids = self._ids[points].astype(int)
        if not ids.all():
            unknown = map(chr, np.unique(points[ids == 0]))
            raise ValueError(f"the model never saw {name_some(unknown)} within a sequence")
        return ids

    def decode(self, ids):
        """Returns the str that an int array of ids, of any one length, stands for."""
        return self._points[ids].tobytes().decode("utf-32-le")


def code_points(text):
    """Returns the code points of a str, which may hold lone surrogates: a uint32 array."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def name_some(characters, most=10):
    """Returns a str that names characters, an iterable of str, but not more than so many."""
    characters = list(characters)
    named = ", ".join(map(repr, characters[:most]))
    more = len(characters) - most
    return named + (f" and {more:,} others" if more > 0 else "")


class SentinelError(ValueError):
    """Sequences contain the sentinel, so their ends could not be told.

    Attributes:
        first: int, the index of the first such sequence, from 0.
        count: int, how many there are.
    """

    def __init__(self, first, count):
        super().__init__(f"{count} sequences contain the sentinel, the first is number {first + 1}")
        self.first = first
        self.count = count


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Encoded sequences.

    Attributes:
        alphabet: `Alphabet`.
        max_len: int, how many characters were kept of each sequence at most.
        rows: array `(sequences, longest)`, of the smallest unsigned integer
            type that holds the alphabet: the ids of each sequence's
            characters, padded with 0, the sentinel.
        targets: int32 array `(sequences,)`: how many targets each sequence
            gives, one a character and one for the end mark, which a sequence
            that was cut does not have.
        complete: bool array `(sequences,)`, False where the sequence was
            longer than `max_len` and its end is missing.
        predictions: None, or float32 array `(sequences, steps, alphabet)`:
            how likely each character is as the target of each step, where
            that is known and so is to be learned in place of the one that
            came.
        share: tuple of int `(rank, size)`. `rows` and `predictions` keep only
            those of the sequences `rank`, `rank + size` and so on: all of
            them unless `take_share` was called; none if `rank` is -1.
    """

    alphabet: Alphabet
    max_len: int
    rows: np.ndarray
    targets: np.ndarray
    complete: np.ndarray
    predictions: np.ndarray | None = None
    share: tuple = (0, 1)

    def __len__(self):
        return len(self.targets)

    def take_share(self, rank, size):
        """Returns the corpus with a copy of a share of its rows, to let go of the others.

        Args:
            rank, size: int, as in `share`; this corpus must still have all,
                and no predictions.
        """
        rows = self.rows[rank::size].copy()
        return dataclasses.replace(self, rows=rows, share=(rank, size))

    def locate(self, chosen):
        """Finds sequences in this corpus's share.

        Args:
            chosen: int array, the indices of some sequences.

        Returns:
            Tuple `(kept, places)`: a bool array of the shape of `chosen`,
            which of them are in the share, and an int array `(kept ones,)`,
            where those stand in `rows`.
        """
        rank, size = self.share
        kept = chosen % size == rank
        return kept, chosen[kept] // size


def encode(sequences, sentinel="\n", max_len=None, characters=""):
    """Encodes sequences in one pass.

    Args:
        sequences: iterable of str.
        sentinel: str, one character.
        max_len: int or None, how many characters to keep of each sequence;
            None keeps all of the longest one, but at most `LONGEST`.
        characters: str, each character once, without the sentinel: these are
            in the alphabet even if no sequence has them.

    Returns:
        A `Corpus`. Its alphabet is the sentinel and the sorted characters
        that were kept or given.

    Raises:
        SentinelError: if a sequence contains the sentinel.
        ValueError: if there are more different characters than a model can
            have, or the rows would not fit into the memory.
    """
    limit = max_len or LONGEST
    first, clashes = None, 0
    ids = np.zeros(sys.maxunicode + 1, np.uint32)  # in the order in which they are first seen
    size = 1 + len(characters)
    ids[code_points(characters)] = np.arange(1, size)
    blocks, lengths, complete = [], [], []
    iterator = iter(sequences)
    # In blocks, because a list of all the strings would outweigh the rows many times.
    for done in itertools.count(step=65536):
        block = list(itertools.islice(iterator, 65536))
        if not block:
            break
        joined = sentinel.join(block)
        if joined.count(sentinel) >= len(block):
            found = [index for index, sequence in enumerate(block) if sentinel in sequence]
            first = done + found[0] if first is None else first
            clashes += len(found)
        length = np.fromiter(map(len, block), np.int64, len(block))
        complete.append(length <= limit)
        if not complete[-1].all():
            joined = sentinel.join(sequence[:limit] for sequence in block)
        lengths.append(np.minimum(length, limit).astype(np.int32))
        points = code_points(joined)
        points = points[points != ord(sentinel)]
        encoded = ids[points]
        if not encoded.all():
            new = np.unique(points[encoded == 0])
            ids[new] = np.arange(size, size + len(new))
            size += len(new)
            encoded = ids[points]
        blocks.append(encoded.astype(np.min_scalar_type(size)))
    if clashes:
        raise SentinelError(first, clashes)

    if size > LIMITS["alphabet"]:
        raise ValueError(
            f"{size - 1:,} different characters are more than a model can have, "
            f"{LIMITS['alphabet'] - 1:,}; name a file of text"
        )
    known = np.flatnonzero(ids).astype("<u4")
    alphabet = Alphabet(sentinel + known.tobytes().decode("utf-32-le"))
    final = np.zeros(size, np.min_scalar_type(len(known)))
    final[ids[known]] = np.arange(1, size)
    longest = max(int(length.max()) for length in lengths)
    count = sum(map(len, lengths))
    check_memory(
        count * longest * final.itemsize,
        f"{count:,} sequences of up to {longest:,} characters",
        "lower --max_len or --num_sequences",
    )
    rows = np.zeros((count, longest), final.dtype)
    begin = 0
    for length in lengths:
        encoded, done = final[blocks.pop(0)], 0
        step = max(1, 2**24 // longest)
        for start in range(0, len(length), step):
            some = length[start : start + step]
            part = rows[begin + start : begin + start + len(some)]
            total = some.sum(dtype=int)
            part[np.arange(longest) < some[:, None]] = encoded[done : done + total]
            done += total
        begin += len(length)
    complete = np.concatenate(complete)
    targets = np.concatenate(lengths) + complete.astype(np.int32)
    return Corpus(alphabet, max_len or longest, rows, targets, complete)


def check_memory(needed, what, advice):
    """Raises a ValueError if something takes more memory than this machine has.

    Args:
        needed: int, bytes.
        what: str, what takes them.
        advice: str, what would take less.
    """
    limits = []
    with contextlib.suppress(ImportError, AttributeError, ValueError, OSError):  # on Windows
        import resource

        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        limits.append(resource.getrlimit(resource.RLIMIT_AS)[0])
        with open("/sys/fs/cgroup/memory.max") as file:
            limits.append(int(file.read()))
    limits = [limit for limit in limits if limit > 0]
    if limits and needed > min(limits):
        raise ValueError(
            f"{what} would take at least {needed / 2**30:,.1f} GiB of memory, and there are "
            f"{min(limits) / 2**30:,.1f}; {advice}"
        )


def make_lstm(units, recurrent_dropout=0.0, **options):
    """Makes a `keras.layers.LSTM` that returns sequences and can learn faster.

    Where its attribute `by_hand` is True, as it must be for recurrent dropout,
    training steps use the gradient that is worked out in `run_lstm`; they must
    then be compiled by XLA. All else, and so the cuDNN kernel on a GPU, is
    Keras's.

    Args:
        units, options: what `keras.layers.LSTM` takes.
        recurrent_dropout: float, the share of each sequence's outputs that
            the layer does not read back, the same ones at every step (Gal and
            Ghahramani 2016). Keras's own, which draws other ones for each
            gate, takes four products a step where this takes one.

    Returns:
        The layer, of a subclass of `keras.layers.LSTM`.
    """
    from keras import layers, ops, random

    class LSTM(layers.LSTM):
        by_hand = recurrent_dropout > 0

        def inner_loop(self, sequences, initial_state, mask, training=False):
            if not (self.by_hand and training):
                return super().inner_loop(sequences, initial_state, mask, training)
            steps_first = ops.transpose(sequences, (1, 0, 2))
            projected = ops.matmul(steps_first, self.cell.kernel) + self.cell.bias
            kept = None
            if recurrent_dropout:
                kept = ops.ones_like(initial_state[0])
                kept = random.dropout(kept, recurrent_dropout, seed=self.cell.seed_generator)
            hidden = run_lstm(projected, ops.convert_to_tensor(self.cell.recurrent_kernel), kept)
            hidden = ops.transpose(hidden, (1, 0, 2))
            return hidden[:, -1], hidden, initial_state  # nobody asks for the last state

    return LSTM(units, return_sequences=True, **options)


def run_lstm(projected, recurrent_kernel, kept=None):
    """Runs an LSTM from a state of zeros, as `SequenceModel.step` does, differentiably.

    The gradient is that of backpropagation through time (Werbos 1990). What
    the compiler would find by itself adds each step's part to the gradient of
    the recurrent kernel, which for wide layers is more memory traffic than all
    else; here one product at the end makes the sum.

    Args:
        projected: float32 tensor `(steps, batch, 4 × units)`: the inputs times
            the kernel, plus the bias.
        recurrent_kernel: float32 tensor `(units, 4 × units)`.
        kept: float32 tensor `(batch, units)` or None, what the outputs are
            multiplied with before the layer reads them back.

    Returns:
        Float32 tensor `(steps, batch, units)`: the outputs.
    """
    from keras import ops

    steps, batch, _ = projected.shape
    units = recurrent_kernel.shape[0]

    def get(array, step):
        return ops.slice(array, (step, 0, 0), (1, *array.shape[1:]))[0]

    def put(array, step, value):
        return ops.slice_update(array, (step, 0, 0), value[None])

    def drop(hidden):
        return hidden if kept is None else hidden * kept

    @ops.custom_gradient
    def run(projected, recurrent_kernel):
        nothing = ops.zeros((batch, units))

        def forward(step, carry):
            hidden, cell, hiddens, cells, gates = carry
            total = get(projected, step) + ops.matmul(drop(hidden), recurrent_kernel)
            i, f, g, o = ops.split(total, 4, axis=1)
            i, f, g, o = ops.sigmoid(i), ops.sigmoid(f), ops.tanh(g), ops.sigmoid(o)
            cell = f * cell + i * g
            hidden = o * ops.tanh(cell)
            hiddens, cells = put(hiddens, step + 1, hidden), put(cells, step + 1, cell)
            return hidden, cell, hiddens, cells, put(gates, step, ops.concatenate([i, f, g, o], 1))

        states = ops.zeros((steps + 1, batch, units))  # before and after each step
        gates = ops.zeros((steps, batch, 4 * units))
        carry = nothing, nothing, states, states, gates
        _, _, hiddens, cells, gates = ops.fori_loop(0, steps, forward, carry)

        def gradient(upstream):
            transposed = ops.transpose(recurrent_kernel)

            def backward(done, carry):
                to_hidden, to_cell, slopes = carry
                step = steps - 1 - done
                i, f, g, o = ops.split(get(gates, step), 4, axis=1)
                output = ops.tanh(get(cells, step + 1))
                to_hidden = to_hidden + get(upstream, step)
                to_cell = to_cell + to_hidden * o * (1 - output * output)
                slope = [
                    to_cell * g * i * (1 - i),
                    to_cell * get(cells, step) * f * (1 - f),
                    to_cell * i * (1 - g * g),
                    to_hidden * output * o * (1 - o),
                ]
                slope = ops.concatenate(slope, 1)
                to_hidden = drop(ops.matmul(slope, transposed))
                return to_hidden, to_cell * f, put(slopes, step, slope)

            carry = nothing, nothing, ops.zeros_like(gates)
            _, _, slopes = ops.fori_loop(0, steps, backward, carry)
            # Not reshaped for a plain product: devices that share the batch would first have
            # to tell each other all of it.
            return slopes, ops.tensordot(drop(hiddens[:-1]), slopes, ((0, 1), (0, 1)))

        return hiddens[1:], gradient

    return run(projected, recurrent_kernel)


def total_loss(network, rows, targets, predictions=None, training=False):
    """Returns how badly a network predicts a batch: what it is trained to lower.

    With `s` for the sentinel, the row `abc` is read as `sabc` and should be
    predicted as `abcs`. Runs on any backend of Keras, compiled or not.

    Args:
        network: the Keras network.
        rows: int tensor `(batch, steps)`: ids, padded with 0. `steps` is at
            least the largest number in `targets`.
        targets: int tensor `(batch,)`, as in `Corpus`: the steps of each row
            that count. 0 makes a row count for nothing.
        predictions: float32 tensor `(batch, steps, alphabet)` or None, the
            distributions to predict in place of the rows, as in `Corpus`.
        training: bool, whether dropout is on.

    Returns:
        Float32 scalar tensor: cross-entropy in nats, summed over all targets.
    """
    from keras import losses, ops

    read = ops.pad(rows[:, :-1], [[0, 0], [1, 0]])
    predicted = network(ops.one_hot(read, network.input_shape[-1]), training=training)
    if predictions is None:
        nats = losses.sparse_categorical_crossentropy(rows, predicted)
    else:
        nats = losses.categorical_crossentropy(predictions, predicted)
    counts = ops.arange(ops.shape(rows)[1], dtype=targets.dtype) < targets[:, None]
    return ops.sum(ops.where(counts, nats, 0.0))


def build_network(alphabet_size, units, layers, dropout, recurrent_dropout=0.0, seed=None):
    """Builds the Keras network, not compiled.

    One-hot `(batch, steps, alphabet)` → `layers` × [LSTM → Dropout] → softmax
    `(batch, steps, alphabet)`: the distribution of the character that follows
    each step. `steps` may be any number.

    Args:
        alphabet_size: int, how many characters there are, sentinel included.
        units: int, the width of each LSTM layer.
        layers: int, how many there are.
        dropout: float between 0 and 1, the share of each layer's outputs
            that is dropped while training.
        recurrent_dropout: float between 0 and 1, as in `make_lstm`.
        seed: int or None, makes the initial weights and the dropout repeatable.

    Returns:
        A `keras.Sequential`.
    """
    from keras import Input, Sequential
    from keras.initializers import GlorotUniform, Orthogonal
    from keras.layers import Dense, Dropout

    rng = np.random.default_rng(seed)

    def draw():
        # keras.utils.set_random_seed would import TensorFlow on every backend.
        return int(rng.integers(2**31))

    network = Sequential([Input((None, alphabet_size), name="characters")], name=METADATA)
    for layer in range(1, layers + 1):
        lstm = make_lstm(
            units,
            recurrent_dropout,
            kernel_initializer=GlorotUniform(draw()),
            recurrent_initializer=Orthogonal(seed=draw()),
            seed=draw(),
            name=f"lstm_{layer}",
        )
        network.add(lstm)
        network.add(Dropout(dropout, seed=draw(), name=f"dropout_{layer}"))
    dense = Dense(
        alphabet_size,
        activation="softmax",
        kernel_initializer=GlorotUniform(draw()),
        name="next_character",
    )
    network.add(dense)
    return network


def weight_shapes(alphabet_size, units, layers):
    """Returns what a network's weights are called and how they are shaped.

    Args:
        alphabet_size, units, layers: as in `build_network`.

    Returns:
        Dict that maps each layer's name to a dict of its weights' names and
        shapes, both in the order of Keras's `get_weights()`.
    """
    shapes = {}
    for layer in range(1, layers + 1):
        shapes[f"lstm_{layer}"] = {
            "kernel": (alphabet_size if layer == 1 else units, 4 * units),
            "recurrent_kernel": (units, 4 * units),
            "bias": (4 * units,),
        }
    shapes["next_character"] = {"kernel": (units, alphabet_size), "bias": (alphabet_size,)}
    return shapes


def count_weights(alphabet_size, units, layers):
    """Returns how many numbers the weights of a network are, an int."""
    layers_of_names = weight_shapes(alphabet_size, units, layers).values()
    return sum(math.prod(shape) for names in layers_of_names for shape in names.values())


@dataclasses.dataclass(frozen=True)
class State:
    """What a network remembers of the sequences that it is reading, one a row.

    Attributes:
        hidden: float32 array `(rows, layers × units)`, each layer's last
            output beside that of the layer below.
        cell: float32 array `(layers, rows, units)`, each layer's memory cells.
    """

    hidden: np.ndarray
    cell: np.ndarray

    def take(self, rows):
        """Returns a `State` that holds copies of the rows in an int array."""
        return State(self.hidden[rows], self.cell[:, rows])

    def move(self, sources, targets):
        """Overwrites the rows in one int array by those in another of its length."""
        self.hidden[targets] = self.hidden[sources]
        self.cell[:, targets] = self.cell[:, sources]


class SequenceModel:
    """A trained network in NumPy: it reads characters and invents the ones that follow.

    Args:
        alphabet: `Alphabet`.
        max_len: int, the most characters that a sequence had in training.
        weights: list of float32 arrays, as Keras's `get_weights()` gives them.
    """

    def __init__(self, alphabet, max_len, weights):
        self.alphabet = alphabet
        self.max_len = max_len
        self.weights = weights
        *lstm, self._kernel, self._bias = weights
        self._layers = []
        for index in range(0, len(lstm), 3):
            kernel, recurrent_kernel, bias = lstm[index : index + 3]
            if index == 0:
                # A one-hot row times a matrix is a row of that matrix.
                offsets = self._by_gate(kernel)
                offsets += self._by_gate(bias)
                self._layers.append((self._by_gate(recurrent_kernel), offsets))
            else:
                self._layers.append((self._by_gate(kernel, recurrent_kernel), self._by_gate(bias)))

    def _by_gate(self, *weights):
        # Each gate's part becomes an array of its own, because NumPy is faster on whole
        # arrays than on columns; and those of the three sigmoids are halved, because
        # σ(x) = tanh(x / 2) / 2 + 1 / 2 then leaves one tanh to compute for all four.
        units = len(self._kernel)
        parts = [array.reshape(-1, 4, units) for array in weights]
        gates = np.empty((4, sum(map(len, parts)), units), np.float32)
        start = 0
        for part in parts:
            rows = slice(start, start := start + len(part))
            for gate, source in enumerate((0, 1, 3, 2)):  # i, f, o, g of i, f, g, o
                np.multiply(part[:, source], 0.5 if gate < 3 else 1, out=gates[gate, rows])
        return gates

    def start(self, rows=1):
        """Returns the `State` before anything is read, for so many sequences."""
        layers, units = len(self._layers), len(self._kernel)
        return State(
            np.zeros((rows, layers * units), np.float32),
            np.zeros((layers, rows, units), np.float32),
        )

    def step(self, ids, state):
        """Reads one character of each of several sequences.

        Each layer computes Hochreiter and Schmidhuber's LSTM with forget
        gates, as `keras.layers.LSTM` does: with `i, f, g, o` the four parts
        of `x·kernel + h·recurrent_kernel + bias`,
        `c ← σ(f)·c + σ(i)·tanh(g)` and `h ← σ(o)·tanh(c)`.

        Args:
            ids: int array `(batch,)`.
            state: `State` of at least so many rows. The first `batch` of
                them are read on, in place; the others stay.

        Returns:
            Float32 array `(batch, alphabet)`: logits, whose softmax is the
            distribution of the next character.
        """
        batch, units = len(ids), len(self._kernel)
        gates = np.empty((4, batch, units), np.float32)
        for layer, (weights, offsets) in enumerate(self._layers):
            hidden = state.hidden[:batch, : (layer + 1) * units]
            # What the layer below has just put out and what this one put out last
            # are neighbours there, so that one product serves both.
            np.matmul(hidden[:, max(layer - 1, 0) * units :], weights, out=gates)
            for gate, offset in zip(gates, offsets):
                gate += offset if layer else offset[ids]
            np.tanh(gates, out=gates)
            sigmoids = gates[:3]
            sigmoids *= 0.5
            sigmoids += 0.5
            i, f, o, g = gates
            cell = state.cell[layer, :batch]
            cell *= f
            cell += np.multiply(i, g, out=i)
            np.multiply(o, np.tanh(cell, out=g), out=hidden[:, -units:])
        return hidden[:, -units:] @ self._kernel + self._bias

    def read(self, text, tick=None):
        """Reads the sentinel and then a text.

        Args:
            text: str, the beginning of a sequence; may be empty.
            tick: None, or as in `sample`.

        Returns:
            Tuple `(logits, state)`: what `step` gave for the last character,
            and the `State` then, both of one row.

        Raises:
            ValueError: if `text` holds a character that the model can't read.
        """
        state = self.start()
        for length, index in enumerate((0, *self.alphabet.encode(text))):
            logits = self.step(np.array([index]), state)
            if tick:
                tick(functools.partial(describe_prompt, length, len(text)))
        return logits, state

    def sample(
        self,
        prompt="",
        count=1,
        temperature=1.0,
        top_k=None,
        top_p=None,
        max_len=None,
        seed=None,
        tick=None,
    ):
        """Invents sequences.

        Each next character is drawn from the model's distribution, until the
        sentinel is drawn or the sequence has `max_len` characters.

        Args:
            prompt: str, what each sequence starts with; may be empty.
            count: int, how many sequences; None goes on for ever.
            temperature, top_k, top_p: what is made of the distribution, as
                in `distribution`.
            max_len: int or None, the longest sequence; None is the model's.
            seed: what `numpy.random.default_rng` takes: an int for the same
                sequences each time, None for others, or a
                `numpy.random.Generator`. A sequence depends on the seed and
                its place in the count alone, so that a larger count or
                `max_len` begins with the sequences of a smaller one. (Sums
                are rounded a little differently in batches of another size;
                that changes about one sequence in 100,000.)
            tick: None, or a function that is called after each character of
                a batch of sequences, for whoever waits for them. It is given
                a function that returns how far the batch is, a str.

        Returns:
            An iterator of str, each with the prompt.

        Raises:
            ValueError: if the prompt holds a character that the model can't
                read or is longer than `max_len`.
        """
        max_len = max_len or self.max_len
        self.check_prompt(prompt, max_len)
        key = int(np.random.default_rng(seed).integers(2**63))
        distribute = functools.partial(
            distribution, temperature=temperature, top_k=top_k, top_p=top_p
        )
        return self._sample(prompt, count, max_len - len(prompt), distribute, key, tick)

    def _sample(self, prompt, count, steps, distribute, key, tick):
        logits, state = self.read(prompt, tick)
        most, start = self.batch_size(steps), 0
        while count is None or start < count:
            # Without a count a few may be enough, so that the batches only grow.
            batch = min(most, max(start, 128) if count is None else count - start)
            invented = self._finish(batch, start, steps, logits, state, distribute, key, tick)
            text = self.alphabet.decode(invented[invented > 0])
            end = 0
            for length in np.count_nonzero(invented, axis=1).tolist():
                begin, end = end, end + length
                yield prompt + text[begin:end]
            start += batch

    def _finish(self, batch, start, steps, logits, state, distribute, key, tick):
        first = np.zeros(batch, int)
        logits, state = logits[first], state.take(first)
        places = np.arange(batch)  # where each row's sequence stands among all of them
        ids, length = first, 0
        invented = np.zeros((batch, steps), np.min_scalar_type(len(self.alphabet) - 1))
        for step in range(steps):
            if step:
                logits = self.step(ids, state)
            if step % DRAWS == 0:
                draws = _draw(key, step // DRAWS, start, batch)
            ids = _choose(distribute(logits), draws[places, step % DRAWS])
            invented[places, step] = ids
            length = step + 1
            if tick:
                tick(functools.partial(describe_length, length, steps))
            # The last rows that go on take the places of those that have ended.
            going_on = ids > 0
            left = np.count_nonzero(going_on)
            if not left:
                break
            gaps = np.flatnonzero(~going_on[:left])
            last = left + np.flatnonzero(going_on[left:])
            state.move(last, gaps)
            for array in (places, ids):
                array[gaps] = array[last]
            places, ids = places[:left], ids[:left]
        return invented[:, :length]

    def batch_size(self, steps):
        """Returns how many sequences to work on at a time, an int.

        Args:
            steps: int, how long they may become.
        """
        layers, units = len(self._layers), len(self._kernel)
        sizes = 2**23 // (steps + 1), 2**21 // len(self.alphabet), 2**23 // (layers * units)
        return max(1, min(BATCH, *sizes))

    def check_prompt(self, prompt, max_len):
        """Raises a ValueError if no sequence of at most `max_len` characters has this beginning."""
        self.alphabet.encode(prompt)
        if len(prompt) > max_len:
            raise ValueError(
                f"{len(prompt)} characters are more than the longest sequence has, {max_len}; "
                "--max_len changes that"
            )


def invent(models, count, steps, seed):
    """Invents sequences of which the predictions of several models are known.

    Each next character is drawn from the mean of the models' distributions.
    No sequence is empty, since none that they learned from was.

    Args:
        models: list of `SequenceModel`, of one alphabet.
        count: int, how many sequences.
        steps: int, how many targets each has at most.
        seed: what `numpy.random.default_rng` takes.

    Returns:
        A `Corpus` with those means as its predictions.
    """
    rng = np.random.default_rng(seed)
    alphabet = models[0].alphabet
    rows = np.zeros((count, steps), np.min_scalar_type(len(alphabet) - 1))
    predictions = np.zeros((count, steps, len(alphabet)), np.float32)
    size = models[0].batch_size(steps)
    for start in range(0, count, size):
        part = slice(start, start + size)
        _invent(models, rows[part], predictions[part], rng)
    complete = rows[:, -1] == 0
    targets = (np.count_nonzero(rows, axis=1) + complete).astype(np.int32)
    return Corpus(alphabet, steps, rows, targets, complete, predictions)


def _invent(models, rows, predictions, rng):
    states = [each.start(len(rows)) for each in models]
    places = np.arange(len(rows))  # those of the sequences that go on
    ids = np.zeros(len(rows), int)
    for step in range(rows.shape[1]):
        logits = [each.step(ids, state) for each, state in zip(models, states)]
        mean = sum(map(distribution, logits)) / len(models)
        if step == 0:
            mean[:, 0] = 0
            mean /= mean.sum(axis=1, keepdims=True)
        predictions[places, step] = mean
        ids = _choose(mean, rng.random(len(places)))
        rows[places, step] = ids
        going_on = np.flatnonzero(ids)
        if not len(going_on):
            break
        places, ids = places[going_on], ids[going_on]
        states = [state.take(going_on) for state in states]


def _draw(key, block, start, rows):
    # Random numbers that depend on nothing but the key, the place of a sequence (one
    # a row, from `start` on) and that of a character in it (a block has DRAWS).
    bits = np.random.PCG64(np.random.SeedSequence(key, spawn_key=(block,)))
    bits.advance(start * DRAWS)
    return np.random.Generator(bits).random((rows, DRAWS))


def _choose(probabilities, draws):
    # The inverse of the cumulative distribution takes a uniform draw to a character;
    # rounding must not take it past the last one that is possible.
    cumulative = probabilities.cumsum(axis=1)
    total = cumulative[:, -1:]
    draws = np.minimum(draws[:, None] * total, np.nextafter(total, 0))
    return np.count_nonzero(cumulative <= draws, axis=1)


def distribution(logits, temperature=1.0, top_k=None, top_p=None):
    """Returns the probabilities that the next character is drawn from.

    As in Hugging Face's Transformers, the temperature comes first, then
    `top_k`, then `top_p` (Holtzman et al. 2020, nucleus sampling) on what
    `top_k` left, and what remains is scaled to a sum of 1. The end mark is a
    character as any other.

    Args:
        logits: array `(..., alphabet)`.
        temperature: float ≥ 0 that divides the logits: below 1 makes likely
            characters likelier, above 1 evens them out, 0 always takes the
            likeliest.
        top_k: int or None, how many characters remain, the likeliest.
        top_p: float or None: of the likeliest characters only so many remain
            that their probabilities sum to at least this, and at least one.

    Returns:
        Float64 array of that shape.
    """
    if temperature == 0:
        temperature, top_k = 1.0, 1
    logits = logits - logits.max(axis=-1, keepdims=True).astype(np.float64)
    if temperature != 1:
        with np.errstate(over="ignore"):  # then the character is impossible, as it should be
            logits /= temperature
    probabilities = np.exp(logits, out=logits)
    probabilities /= probabilities.sum(axis=-1, keepdims=True)
    if top_k is not None or top_p is not None:
        order = np.argsort(-probabilities, axis=-1, kind="stable")
        ranked = np.take_along_axis(probabilities, order, axis=-1)
        if top_k is not None:
            ranked[..., top_k:] = 0
        if top_p is not None:
            likelier = ranked.cumsum(axis=-1) - ranked
            likelier[..., 0] = -1  # the likeliest always remains
            ranked[likelier >= top_p * ranked.sum(axis=-1, keepdims=True)] = 0
        ranked /= ranked.sum(axis=-1, keepdims=True)
        np.put_along_axis(probabilities, order, ranked, axis=-1)
    return probabilities


class UserError(ValueError):
    """What the user has to know and can mend; the message says how."""


class CommandLine(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` whose every error is one line on stderr.

    Like its parent it exits with status 2. Its help shows the defaults, and
    it takes no abbreviations, since they change as flags are added.
    """

    def __init__(self, **options):
        super().__init__(formatter_class=_Help, allow_abbrev=False, **options)

    def error(self, message):
        """Prints the message, a str, and exits."""
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        if action.default is None or "(default" in action.help:
            return action.help
        return super()._get_help_string(action)


def within(kind, low, high):
    """Returns an `argparse` type: a number of a `kind`, int or float, from `low` to `high`."""

    def parse(text):
        number = kind(text)
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"not from {low} to {high}: {text}")
        return number

    parse.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return parse


def printable(text):
    """Returns a str that can't steer the terminal it is shown on.

    Every character that Python calls not printable (control and format
    characters, line ends, lone surrogates) or that Unicode wants to be shown
    as nothing is replaced by its escape.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable() and not _is_invisible(character)
        else character.encode("unicode_escape").decode()
        for character in text
    )


def _is_invisible(character):
    # Those of Unicode's Default_Ignorable_Code_Point that Python calls printable.
    return character in "\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0" or (
        "\ufe00" <= character <= "\ufe0f"
        or "\u180b" <= character <= "\u180f"
        or "\U000e0100" <= character <= "\U000e01ef"
    )


def open_streams():
    """Opens what is closed of stdin, stdout and stderr, lest another file take its place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))


def catch_signals(handler):
    """Sets what happens at Ctrl-C, at SIGTERM, and at SIGHUP, which a closed terminal sends.

    A signal that was ignored before, as `nohup` does with SIGHUP, still is.

    Args:
        handler: what `signal.signal` takes.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


class ProgressLine:
    """Shows how far work is: on a terminal in one line, in a log in a line now and then.

    Args:
        stream: text file.
        seconds: float, how long a log waits for the next line.
        title: str, what a terminal shows until there is more to show.
        terminal: bool, whether to treat a terminal as one, not as a log.
    """

    def __init__(self, stream, seconds, title="", terminal=True):
        self.stream = stream
        self.terminal = terminal and stream.isatty()
        self.pause = 0.2 if self.terminal else seconds
        self.start = time.monotonic()
        # Nothing shows of what is soon done, unless it has a title.
        self.due = self.start + (self.pause if title else max(self.pause, 1))
        self.width = 0
        if self.terminal and title:
            self._draw(title)

    def show(self, describe):
        """Shows what a function from the seconds so far makes, a str, if it is time to."""
        now = time.monotonic()
        if now < self.due:
            return
        self.due = now + self.pause
        text = describe(now - self.start)
        if self.terminal:
            self._draw(text)
        else:
            print(text, file=self.stream, flush=True)

    def clear(self):
        """Takes the line away from a terminal."""
        if self.width:
            self.width += 2  # and ^C
            self._draw("")
            print(end="\r", file=self.stream, flush=True)
            self.width = 0

    def _draw(self, text):
        columns = os.get_terminal_size(self.stream.fileno()).columns or 80  # 0 if none knows
        text = text[: columns - 1]
        self.width = min(max(self.width, len(text)), columns - 1)
        print(end="\r" + text.ljust(self.width), file=self.stream, flush=True)


def describe_prompt(length, whole):
    """Returns a line, a str, about a prompt of which so many characters are read."""
    return f"{length:,} of the prompt's {whole:,} characters"


def describe_length(length, longest):
    """Returns a line, a str, about a batch of sequences.

    Args:
        length: int, how many of their characters are done.
        longest: int, how many they may become.
    """
    return f"character {length:,} of at most {longest:,}"


def describe_progress(count, total, seconds):
    """Returns a line, a str, about work of which so much is done after some time.

    Args:
        count: int, how much is done.
        total: int or None, how much there is to do, if that is known.
        seconds: float, how long it took.
    """
    rate = count / seconds
    shown = f"{rate:,.{0 if rate >= 10 else 1}f} a second"
    if not total:
        return f"{count:,} so far, {shown}"
    bar = "#" * (20 * count // total)
    left = describe_time((total - count) / rate)
    return f"[{bar:-<20}] {count:,} of {total:,}, {shown}, {left} left"


def describe_time(seconds):
    """Returns a str such as 1:05:09 for so many seconds."""
    seconds = round(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def save(path, network, weights, metadata, training_state=()):
    """Writes a model's file: all of it or, should anything fail, nothing.

    The layout is Keras's own for a whole model in HDF5, so that
    `keras.models.load_model(path)` returns it compiled and ready. Beside it
    stand the metadata and the training state.

    Args:
        path: str or path-like, replaced if it exists.
        network: the compiled Keras network.
        weights: list of float32 arrays, those that the file is to hold; they
            need not be the network's present ones.
        metadata: dict that JSON can hold, with at least `alphabet` (str, the
            sentinel first), `max_len`, `units` and `layers`.
        training_state: list of arrays that only continuing the training needs.

    Raises:
        OSError: if the file can't be written; then the old one still stands.
    """
    import keras

    training_config = {
        "loss": network.loss,
        "loss_weights": None,
        "metrics": None,
        "weighted_metrics": None,
        "optimizer_config": {"class_name": "Adam", "config": {}},
    }
    shapes = weight_shapes(len(metadata["alphabet"]), metadata["units"], metadata["layers"])
    # In memory first, because HDF5 recovers badly from a full disk.
    content = io.BytesIO()
    # The newest layout, because an attribute of the old one ends at 64 KiB.
    with h5py.File(content, "w", libver="latest") as file:
        group = file.create_group("model_weights")
        for place in (file, group):
            place.attrs["keras_version"] = keras.__version__
            place.attrs["backend"] = keras.backend.backend()
        file.attrs["model_config"] = json.dumps(_describe_network(network))
        file.attrs["training_config"] = json.dumps(training_config)
        text = json.dumps({"format": FORMAT, **metadata}, ensure_ascii=False)
        file.attrs[METADATA] = np.bytes_(text.encode())
        group.attrs["layer_names"] = list(shapes)
        values = iter(weights)
        for layer, names in shapes.items():
            layer_group = group.create_group(layer)
            layer_group.attrs["weight_names"] = list(names)
            for name in names:
                layer_group[name] = next(values)
        for index, value in enumerate(training_state):
            file[f"{TRAINING_STATE}/{index}"] = value
    with replacing(path) as file:
        file.write(content.getbuffer())


def _describe_network(network):
    # Keras's own get_config() imports TensorFlow on every backend, and says things
    # that another version of Keras 3 would not know. What is left out is its default.
    configs = [("InputLayer", {"name": "characters", "batch_shape": network.input_shape})]
    for layer in network.layers:
        names = ("name", "units", "return_sequences", "rate")
        config = {name: getattr(layer, name) for name in names if hasattr(layer, name)}
        configs.append((type(layer).__name__, config))
    configs[-1][1]["activation"] = "softmax"
    layers = [
        {"module": "keras.layers", "class_name": name, "config": config, "registered_name": None}
        for name, config in configs
    ]
    return {"class_name": "Sequential", "config": {"name": network.name, "layers": layers}}


@contextlib.contextmanager
def replacing(path):
    """Opens a file that takes the place of the one at `path`, in one step and at the end.

    Args:
        path: str or path-like. A link is followed; permissions are kept, and
            the owner where that is allowed.

    Yields:
        A binary file. If the block fails it is removed and `path` stays as it was.

    Raises:
        OSError: if the file can't be written.
    """
    path = os.path.realpath(path)
    folder, name = os.path.split(path)
    number, temporary = tempfile.mkstemp(".tmp", _hidden(name), folder)
    try:
        with open(number, "wb") as file:  # which until the end nobody else can read
            yield file
            file.flush()
            os.fsync(file.fileno())
        try:
            old = os.stat(path)
            mode = old.st_mode & 0o777
            with contextlib.suppress(OSError, AttributeError):  # only root can give files away
                os.chown(temporary, old.st_uid, old.st_gid)
        except FileNotFoundError:
            mask = os.umask(0)
            os.umask(mask)
            mode = 0o666 & ~mask
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _hidden(name):
    # Short enough that what is added does not make it too long for a file system.
    if len(name) > 50:
        name = f"{name[:50]}~{zlib.crc32(os.fsencode(name)):08x}"
    return f".{name}."


@contextlib.contextmanager
def locking(path):
    """Keeps other processes from a file, and removes what killed ones have left beside it.

    A hidden empty file beside it is locked and at the end removed. One that
    exists already is no obstacle unless a process has locked it.

    Args:
        path: str, which need not exist.

    Raises:
        BlockingIOError: if another process keeps it.
        OSError: if there can be no file beside it.
    """
    if fcntl is None:
        yield
        return
    folder, name = os.path.split(os.path.realpath(path))
    path = os.path.join(folder, _hidden(name) + "lock")
    with _open_locked(path) as file:
        try:
            stale = glob.escape(os.path.join(folder, _hidden(name))) + "?" * 8 + ".tmp"
            for temporary in glob.glob(stale):
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
            yield
        finally:
            with contextlib.suppress(OSError):
                if _is_at(file, path) and not os.path.getsize(path):
                    os.unlink(path)


def _open_locked(path):
    flags = os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        file = open(os.open(path, flags, 0o666), "rb")  # noqa: SIM115 - it outlives this
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise BlockingIOError(error.errno, "another process is writing it") from None
        except OSError:  # a file system without locks
            return file
        if _is_at(file, path):
            return file
        file.close()  # the one who had it has just removed it


def _is_at(file, path):
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


def check_target(path, inputs):
    """Checks, before work is spent on it, that a file can be put at `path`.

    Args:
        path: str.
        inputs: dict that maps what to call each file that is read to its
            path, or to None.

    Raises:
        ValueError: if it can't or must not; the message says why.
    """
    try:
        stream = os.path.abspath(path).startswith(("/dev/std", "/dev/fd/", "/proc/"))
        special = os.path.exists(path) and not os.path.isfile(path)
        if stream or special or not os.path.basename(path):
            raise ValueError(f"{path!r} is not a regular file; name one")
        for name, other in inputs.items():
            if other is not None and is_same_file(path, other):
                raise ValueError(f"{path} is the file of {name}; name another one")
        real = os.path.realpath(path)
        if os.path.islink(real):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        with contextlib.suppress(FileNotFoundError):
            owner = os.stat(real).st_uid  # where its name is too long, that fails
            folder = os.stat(os.path.dirname(real))
            # In a sticky folder only an owner may replace a file.
            if folder.st_mode & stat.S_ISVTX and os.geteuid() not in (0, folder.st_uid, owner):
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        with tempfile.TemporaryFile(dir=os.path.dirname(real)):
            pass
    except OSError as error:
        raise ValueError(
            f"can't write {path}: {error.strerror}; name a file in a folder that you can write to"
        ) from None


def is_same_file(path, other):
    """Tells whether two paths lead to one file that exists."""
    with contextlib.suppress(OSError):
        return os.path.samefile(path, other)
    return False


def load(path):
    """Reads a model from the file that `save` wrote.

    Nothing in the file is executed, no other file is opened, and no size that
    it claims is believed before it is checked against the file's own.

    Args:
        path: str or path-like.

    Returns:
        Tuple `(model, metadata)`: a `SequenceModel` and the dict given to `save`.

    Raises:
        OSError: if the file can't be opened.
        ValueError: if it is not a model's file; the message says why.
    """
    with _open(path) as file:
        metadata, offsets = _find_arrays(file, _locate_weights)
        count = count_weights(len(metadata["alphabet"]), metadata["units"], metadata["layers"])
        # As they are in the file, and as they are computed with.
        check_memory(2 * 4 * count, f"the model in {path}", "name a smaller one")
        weights = [
            _read_array(file, name, "f4", shape, offset, LARGEST)
            for (name, shape), offset in zip(_places(metadata), offsets)
        ]
        return SequenceModel(Alphabet(metadata["alphabet"]), metadata["max_len"], weights), metadata


def load_for(flag, path):
    """Does what `load` does with the file that a flag names, for the user who gave it.

    Args:
        flag: str, such as `--weights_path`.
        path: str.

    Returns:
        What `load` returns.

    Raises:
        UserError: if it can't be read.
    """
    try:
        return load(path)
    except OSError as error:
        raise UserError(
            f"{flag}: can't read {path}: {error.strerror}; name a model's file"
        ) from None
    except MemoryError:
        raise UserError(
            f"{flag}: {path} takes more memory than there is; name a smaller model"
        ) from None
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from None


def load_training_state(path):
    """Reads the training state from the file that `save` wrote.

    Args:
        path: str or path-like.

    Returns:
        List of arrays, empty if the file holds no training state.

    Raises:
        OSError, ValueError: as `load` does.
    """
    with _open(path) as file:
        return [
            _read_array(file, f"{TRAINING_STATE}/{index}", *array, sys.float_info.max)
            for index, array in enumerate(_find_arrays(file, _locate_training_state)[1])
        ]


@contextlib.contextmanager
def _open(path):
    with open(path, "rb", opener=_open_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{path} is not a regular file")
        try:
            yield file
        except _ReadError as error:
            raise ValueError(f"{path} is not a model that train.py saved: {error}") from None


def _open_without_waiting(path, flags):
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


class _ReadError(Exception):
    pass


def _find_arrays(file, locate):
    # The HDF5 library was not made for files of strangers: at some of them its versions
    # crash, hang or take all memory. So it only says where in the file the arrays stand,
    # in a process of its own, and NumPy reads them there.
    answer = _call_apart(functools.partial(_search, file, locate))
    places, whole, text = answer.partition(b"\n")
    if not whole:
        raise _ReadError("the HDF5 library crashes at it, or takes too much time or memory")
    places = json.loads(places)
    if isinstance(places, str):
        raise _ReadError(printable(places))
    return _parse_metadata(text, file), places


def _search(file, locate):
    # Returns a line of JSON, where the arrays are or what is wrong, and then the metadata.
    try:
        with h5py.File(file, "r") as content:
            text = _read_metadata(content)
            places = locate(content, _parse_metadata(text, file), _size(file))
    except _ReadError as error:
        places, text = str(error), b""
    except (OSError, RuntimeError, TypeError, ValueError, LookupError) as error:
        reason = str(error.args[0] if error.args else error)
        places, text = f"it is damaged: {reason}", b""
        if "signature not found" in reason:
            places = "it is no HDF5 file"
    return json.dumps(places).encode() + b"\n" + text


def _locate_weights(content, metadata, size):
    offsets = [_locate(content, name, shape)[-1] for name, shape in _places(metadata)]
    if len(content["model_weights"]) > metadata["layers"] + 1:
        raise _ReadError(f"it holds more layers than the {metadata['layers']} it says")
    return offsets


def _locate_training_state(content, metadata, size):
    found = []
    if content.get(TRAINING_STATE, getlink=True) is not None:
        count = len(_child(content, TRAINING_STATE))
        if count > 16 * (metadata["layers"] + 1):
            raise _ReadError(
                f"it holds more of a training state than {metadata['layers']} layers have"
            )
        for index in range(count):
            found.append(_locate(content, f"{TRAINING_STATE}/{index}"))
            size -= np.dtype(found[-1][0]).itemsize * math.prod(found[-1][1])
            if size < 0:  # the same bytes can stand under many names
                raise _ReadError("its arrays claim more bytes than it has")
    return found


def _places(metadata):
    shapes = weight_shapes(len(metadata["alphabet"]), metadata["units"], metadata["layers"])
    for layer, names in shapes.items():
        for name, shape in names.items():
            yield f"model_weights/{layer}/{name}", shape


def _call_apart(function):
    """Calls a function in a process of its own, which can't do much beside computing.

    Args:
        function: returns bytes.

    Returns:
        The bytes, or not all of them if it crashed or took more than it may.
    """
    if not hasattr(os, "fork"):  # on Windows
        return function()
    import resource

    codecs.lookup("ascii")  # h5py needs it, and it can't be found where no file may be opened
    handled = [
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if callable(signal.getsignal(number))
    ]
    receive, send = os.pipe()
    # None of the handlers may run in the child, where they would undo what is the parent's.
    signal.pthread_sigmask(signal.SIG_BLOCK, handled)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, which take no part in what follows
        child = os.fork()
    if child == 0:
        try:
            for number in (*handled, signal.SIGPROF):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where the C library tells of a crash
            limits = dict.fromkeys(("RLIMIT_NOFILE", "RLIMIT_FSIZE", "RLIMIT_CORE"), 0)
            with contextlib.suppress(OSError), open("/proc/self/statm") as pages:
                limits["RLIMIT_AS"] = int(pages.read().split()[0]) * resource.getpagesize() + MEMORY
            for name, most in limits.items():
                hard = resource.getrlimit(getattr(resource, name))[1]
                most = most if hard == resource.RLIM_INFINITY else min(most, hard)
                resource.setrlimit(getattr(resource, name), (most, most))
            answer = function()
            while answer:
                answer = answer[os.write(send, answer) :]
        finally:
            os._exit(0)
    os.close(send)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)
        with open(receive, "rb") as pipe:
            return pipe.read(4 * METADATA_SIZE)
    finally:
        # Where children are ignored, there is none to wait for any more.
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _size(file):
    return os.fstat(file.fileno()).st_size


def _read_metadata(content):
    if METADATA not in content.attrs:
        raise _ReadError(f"it has no attribute {METADATA!r}")
    attribute = content.attrs.get_id(METADATA)
    if attribute.dtype.kind != "S" or attribute.shape != ():
        raise _ReadError(f"its attribute {METADATA!r} is not a text of a fixed size")
    if attribute.dtype.itemsize > METADATA_SIZE:
        raise _ReadError(f"its attribute {METADATA!r} is longer than {METADATA_SIZE} bytes")
    return bytes(content.attrs[METADATA])


def _parse_metadata(text, file):
    try:
        metadata = json.loads(text.decode())
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise _ReadError(f"its attribute {METADATA!r} is not a JSON object")
    if metadata.get("format") != FORMAT:
        raise _ReadError(f"it is not of format {FORMAT}, the one this version reads")
    symbols = metadata.get("alphabet")
    if not isinstance(symbols, str) or not 2 <= len(symbols) <= LIMITS["alphabet"]:
        raise _ReadError(f"its alphabet is not a string of 2 to {LIMITS['alphabet']} characters")
    if len(set(symbols)) < len(symbols):
        raise _ReadError("its alphabet holds a character twice")
    if any("\ud800" <= symbol <= "\udfff" for symbol in symbols):
        raise _ReadError("its alphabet holds a lone surrogate, which is no character")
    for key in ("max_len", "units", "layers"):
        number = metadata.get(key)
        if type(number) is not int or not 1 <= number <= LIMITS[key]:
            raise _ReadError(f"its {key} is not a whole number from 1 to {LIMITS[key]}")
    size = _size(file)
    units, layers = metadata["units"], metadata["layers"]
    if 4 * count_weights(len(symbols), units, layers) > size:
        raise _ReadError(f"{layers} layers of {units} units can't fit in a file of {size} bytes")
    return metadata


def _child(group, name):
    # A soft or external link could lead to another place, even another file.
    if not isinstance(group, h5py.Group) or not isinstance(
        group.get(name, getlink=True), h5py.HardLink
    ):
        raise _ReadError(f"it holds no {name} where one belongs")
    return group[name]


def _locate(content, name, shape=None):
    dataset = functools.reduce(_child, name.split("/"), content)
    # First of all: to ask for the shape of an array that is put together from other
    # files would open them.
    layout = dataset.id.get_create_plist() if isinstance(dataset, h5py.Dataset) else None
    if not layout or layout.get_layout() != h5py.h5d.CONTIGUOUS or layout.get_external_count():
        raise _ReadError(f"{name} is not an array stored in one piece")
    if dataset.dtype.kind not in "fiu" or dataset.shape is None:
        raise _ReadError(f"{name} is not an array of numbers")
    if shape and (dataset.shape != shape or dataset.dtype != np.float32):
        raise _ReadError(
            f"{name} should have shape {shape} and dtype float32. "
            f"Received: shape {dataset.shape}, dtype {dataset.dtype}"
        )
    offset = dataset.id.get_offset()
    if offset is None:
        raise _ReadError(f"{name} was never written")
    return dataset.dtype.str, dataset.shape, offset


def _read_array(file, name, dtype, shape, offset, largest):
    count = math.prod(shape)
    if offset + count * np.dtype(dtype).itemsize > _size(file):
        raise _ReadError(f"{name} claims more bytes than the file has")
    file.seek(offset)
    array = np.fromfile(file, dtype, count)
    if array.size < count:
        raise _ReadError("it became shorter while it was read")
    array = array.reshape(shape)
    # A comparison with NaN is false.
    if count and not (-largest <= array.min().item() and array.max().item() <= largest):
        raise _ReadError(f"{name} holds what is no number, or beyond ±{largest:.3g}")
    return array
