"""What a model is: its alphabet, its Keras network, the same network in NumPy, its `.h5` file.

1. `Alphabet` and `build_corpus`: strings become rows of small integers.
2. `build_layers`: the Keras network that learns from them, with `run_lstm`, whose
   gradient is worked out by hand.
3. `SequenceModel`: the same network in NumPy, ready in a fraction of the time that
   importing Keras takes. It reads text and invents what follows.
4. `save` and `load`: the file, which stock Keras opens too.
5. What the command lines of train.py and sample.py share.

The file is HDF5 in Keras's legacy layout of a whole model. Its root attribute
`sequence_model` adds as JSON what Keras has no place for: the format, the alphabet (the
sentinel first), `max_len`, the settings and the losses of each epoch. The group
`checkpoint` has what continuing needs: all variables of network and optimizer. A file
that Keras saves again lacks both.
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import io
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import sys
import tempfile
import unicodedata

import h5py
import numpy as np

from loaders import UserError, needing_packages

FORMAT = 2  # of the files that `save` writes
DEFAULT_MAX_LEN = 64  # characters kept of a sequence unless the user says otherwise
LARGEST_BATCH = 2048  # sequences invented at a time: more would overflow the CPU's cache
DRAWS = 32  # random numbers that are drawn at a time for each sequence
LIMITS = {"alphabet": 2**18, "max_len": 2**16, "units": 2**13, "layers": 2**6}  # upper limits
LARGEST_WEIGHT = 1e30  # far above any trained weight; sums of such products stay finite
METADATA = "sequence_model"  # the root attribute that holds what Keras has no place for
METADATA_SIZE = 2**22  # its maximum size in bytes: parsed JSON can take 30 times as much
CHECKPOINT = "checkpoint"  # the group that holds what continuing needs
# They join emoji, or letters of Persian and of India, or choose between two forms of one.
JOINERS = "\u200c\u200d\ufe0e\ufe0f"
# Those of Unicode's Default_Ignorable_Code_Point that Python calls printable.
INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


# 1. Alphabet and encoding


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
        self.ids = np.zeros(sys.maxunicode + 1, np.int32)
        self.ids[self._points] = np.arange(len(symbols))

    def __len__(self):
        return len(self.symbols)

    def normalize(self, text):
        """Returns a text composed (NFC) or, if the alphabet can write only that, decomposed."""
        composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
        return decomposed if self._knows(decomposed) and not self._knows(composed) else composed

    def _knows(self, text):
        return self.ids[code_points(text)].all()

    @functools.cached_property
    def marks(self):
        """Those of the characters that can compose with the one before them, a list of str."""
        jamo = re.compile("[\u1161-\u1175\u11a8-\u11c2]")
        return [s for s in self.symbols[1:] if unicodedata.category(s)[0] == "M" or jamo.match(s)]

    def respellings(self, index):
        """Returns the ids that can't follow a character, given by its id, in composed text.

        With one of them it would spell what other characters of the alphabet do:
        U+0301 after `e`, if there is an `é`.
        """
        found = []
        for mark in self.marks:
            pair = self.symbols[index] + mark
            composed = unicodedata.normalize("NFC", pair)
            if composed != pair and self._knows(composed):
                found.append(int(self.ids[ord(mark)]))
        return found

    def encode(self, text):
        """Returns the ids of a str's characters, an int32 array of the same length.

        Raises a UserError if the alphabet lacks one, or one is the sentinel; it names up to ten.
        """
        points = code_points(text)
        ids = self.ids[points]
        if not ids.all():
            unknown = np.unique(points[ids == 0])[:10]
            names = ", ".join(name_character(chr(point)) for point in unknown)
            raise UserError(f"the model never saw {names} within a sequence")
        return ids

    def decode(self, ids):
        """Returns the str that an int array of ids, of one dimension, stands for."""
        return self._points[ids].tobytes().decode("utf-32-le")


def code_points(text):
    """Returns the code points of a str, which may hold lone surrogates: a uint32 array."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Encoded sequences, one after the other.

    Attributes:
        alphabet: `Alphabet`.
        max_len: int, how many characters were kept of each sequence at most.
        targets: array of the smallest unsigned integer type that holds the
            alphabet, of one dimension: the ids of each sequence's characters and
            then 0, the end mark, which a sequence that was cut does not have.
        starts: int64 array `(sequences,)`: where in `targets` each one begins.
        lengths: int32 array `(sequences,)`: how many targets each one has.
        dropped: int, how many characters were cut off in all.
    """

    alphabet: Alphabet
    max_len: int
    targets: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    dropped: int

    def __len__(self):
        return len(self.lengths)

    def locate(self, indices):
        """Returns where in `targets` those of some sequences are, and which step each one is.

        Takes an int array of indices; returns two, the sequences one after the other.
        """
        lengths = self.lengths[indices]
        steps = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
        return np.repeat(self.starts[indices], lengths) + steps, steps


def build_corpus(sequences, sentinel="\n", max_len=None, characters=""):
    """Encodes sequences in one pass.

    Args:
        sequences: iterable of str.
        sentinel: str, one character.
        max_len: int or None, how many characters to keep of each sequence;
            None keeps all of the longest one, but at most `DEFAULT_MAX_LEN`.
        characters: str, without the sentinel: these are in the alphabet even
            if no sequence has them.

    Returns:
        A `Corpus`. Its alphabet is the sentinel and the sorted characters
        that were kept or given.

    Raises:
        ValueError: if there is no sequence, or what is kept of one contains the sentinel.
        UserError: if there are more different characters than a model can have.

    Example:

    >>> build_corpus(["ab", "b"]).targets
    array([1, 2, 0, 2, 0], dtype=uint8)
    """
    most, iterator = max_len or DEFAULT_MAX_LEN, iter(sequences)
    used = np.zeros(sys.maxunicode + 1, bool)
    used[code_points(characters)] = True
    blocks, lengths, dropped, longest = [], [], 0, 0
    # Some at a time, because a str takes many times the memory of its characters.
    while texts := list(itertools.islice(iterator, 4096)):
        kept = (text + sentinel if len(text) <= most else text[:most] for text in texts)
        points = code_points("".join(kept))
        used[points] = True
        blocks.append(points.astype(np.min_scalar_type(points.max())))
        whole = np.fromiter(map(len, texts), np.int64, len(texts))
        lengths.append((np.minimum(whole, most) + (whole <= most)).astype(np.int32))
        dropped += int(np.maximum(whole - most, 0).sum())
        longest = max(longest, int(whole.max()))
        if np.count_nonzero(points == ord(sentinel)) > np.count_nonzero(whole <= most):
            raise ValueError(f"sequences contain the sentinel, {sentinel!r}")
    if not longest:
        raise ValueError("there is no sequence, or all are empty")
    used[ord(sentinel)] = False
    symbols = sentinel + "".join(map(chr, np.flatnonzero(used)))
    if len(symbols) > LIMITS["alphabet"]:
        raise UserError(
            f"{len(symbols) - 1:,} different characters are more than the "
            f"{LIMITS['alphabet'] - 1:,} that a model can have; is this a file of text?"
        )
    alphabet = Alphabet(symbols)
    targets = np.empty(sum(map(len, blocks)), np.min_scalar_type(len(symbols) - 1))
    end = len(targets)
    while blocks:  # which makes room for the next
        block = blocks.pop()
        targets[end - len(block) : end] = alphabet.ids[block]
        end -= len(block)
    lengths = np.concatenate(lengths)
    starts = lengths.cumsum(dtype=np.int64)
    starts -= lengths
    return Corpus(alphabet, max_len or min(longest, most), targets, starts, lengths, dropped)


# 2. The Keras network


def run_lstm(projected, recurrent_kernel, kept_hidden, kept_cell):
    """Runs an LSTM over rows of whole sequences, from a state of zeros, differentiably.

    The gradient is that of backpropagation through time (Werbos 1990).
    Automatic differentiation adds each step's share to the gradient of the
    recurrent kernel, which for wide layers is more memory traffic than all
    else; here one product at the end computes the whole sum. On TensorFlow it
    needs XLA.

    Args:
        projected: float32 tensor `(steps, batch, 4 × units)`: the inputs times
            the kernel, plus the bias.
        recurrent_kernel: float32 tensor `(units, 4 × units)`.
        kept_hidden, kept_cell: float32 tensors `(steps, batch, units or 1)` by which a
            step multiplies the outputs and the cell of the one before, 0 where a
            sequence begins.

    Returns:
        Float32 tensor `(steps, batch, units)`: the outputs.
    """
    from keras import ops

    steps, batch, _ = ops.shape(projected)
    units = recurrent_kernel.shape[0]

    def put(array, step, value):
        return ops.slice_update(array, (step, 0, 0), value[None])

    @ops.custom_gradient
    def run(projected, recurrent_kernel):
        def forward(step, carry):
            hidden, cell, hiddens, cells, gates = carry
            hidden, cell = hidden * kept_hidden[step], cell * kept_cell[step]
            total = projected[step] + ops.matmul(hidden, recurrent_kernel)
            i, f, g, o = ops.split(total, 4, axis=1)
            i, f, g, o = ops.sigmoid(i), ops.sigmoid(f), ops.tanh(g), ops.sigmoid(o)
            cells = put(cells, step, cell)
            cell = f * cell + i * g
            hidden = o * ops.tanh(cell)
            gates = put(gates, step, ops.concatenate([i, f, g, o], 1))
            return hidden, cell, put(hiddens, step + 1, hidden), cells, gates

        zeros = ops.zeros((batch, units))
        hiddens = ops.zeros((steps + 1, batch, units))  # before and after each step
        cells = ops.zeros((steps, batch, units))  # as each step reads them
        gates = ops.zeros((steps, batch, 4 * units))
        carry = zeros, zeros, hiddens, cells, gates
        _, _, hiddens, cells, gates = ops.fori_loop(0, steps, forward, carry)

        def gradient(d_hiddens):
            transposed = ops.transpose(recurrent_kernel)

            def backward(done, carry):
                d_hidden, d_cell, d_totals = carry
                step = steps - 1 - done
                i, f, g, o = ops.split(gates[step], 4, axis=1)
                cell = cells[step]
                tanh_cell = ops.tanh(f * cell + i * g)
                d_hidden = d_hidden + d_hiddens[step]
                d_cell = d_cell + d_hidden * o * (1 - tanh_cell * tanh_cell)
                d_total = [
                    d_cell * g * i * (1 - i),
                    d_cell * cell * f * (1 - f),
                    d_cell * i * (1 - g * g),
                    d_hidden * tanh_cell * o * (1 - o),
                ]
                d_total = ops.concatenate(d_total, 1)
                d_hidden = ops.matmul(d_total, transposed) * kept_hidden[step]
                return d_hidden, d_cell * f * kept_cell[step], put(d_totals, step, d_total)

            *_, d_totals = ops.fori_loop(0, steps, backward, (zeros, zeros, ops.zeros_like(gates)))
            # Not reshaped for a plain product: devices that share the batch would first have
            # to exchange all of it.
            read = hiddens[:-1] * kept_hidden
            return d_totals, ops.tensordot(read, d_totals, ((0, 1), (0, 1)))

        return hiddens[1:], gradient

    return run(projected, recurrent_kernel)


def make_dropout_for_xla(share, seed=None, **options):
    """Makes a `keras.layers.Dropout` for networks that XLA compiles.

    There the generator that TensorFlow picks by itself takes a hundred times as long as
    Threefry (Salmon et al. 2011), which JAX uses: with small batches, longer than all
    else in training.
    """
    from keras import backend, layers

    if backend.backend() == "jax":
        return layers.Dropout(share, seed=seed, **options)
    import tensorflow as tf

    class Dropout(layers.Dropout):
        def call(self, inputs, training=False):
            if not (training and self.rate):
                return inputs
            seed = tf.cast(self.seed_generator.next(), tf.int32)
            return tf.nn.experimental.stateless_dropout(inputs, self.rate, seed, rng_alg="threefry")

    return Dropout(share, seed=seed, **options)


def make_lstm_by_hand(units, recurrent_dropout=0.0, seed=None, **options):
    """Makes a `keras.layers.LSTM` that, called with a mask, runs `run_lstm`.

    The mask does not say which steps to skip, as in Keras, but where the state is
    kept: it is False at the first step of each sequence in a row. Without one it is
    Keras's own layer, without recurrent dropout.

    `recurrent_dropout` is the share of each row's outputs that the layer does not read
    back, the same ones at every step (Gal and Ghahramani 2016). Keras's own uses a
    separate mask for each gate and so needs four products per step where this needs one.
    """
    from keras import layers, ops

    class LSTM(layers.LSTM):
        def inner_loop(self, sequences, initial_state, mask, training=False):
            if mask is None:
                return super().inner_loop(sequences, initial_state, mask, training)
            steps_first = ops.transpose(sequences, (1, 0, 2))
            projected = ops.matmul(steps_first, self.cell.kernel) + self.cell.bias
            kept_cell = kept_hidden = ops.cast(ops.transpose(mask), "float32")[:, :, None]
            if recurrent_dropout:  # else a loop would read a mask of all units for nothing
                kept_hidden = kept_cell * self.drop(1 + initial_state[0], training=training)
            kernel = ops.convert_to_tensor(self.cell.recurrent_kernel)
            hidden = ops.transpose(run_lstm(projected, kernel, kept_hidden, kept_cell), (1, 0, 2))
            return hidden[:, -1], hidden, initial_state  # nothing uses the last state

    # An LSTM of cuDNN can't be divided among devices.
    lstm = LSTM(units, seed=seed, use_cudnn=False, **options)
    lstm.drop = make_dropout_for_xla(recurrent_dropout, seed)
    return lstm


def build_layers(
    alphabet_size, units, layers, dropout=0.0, recurrent_dropout=0.0, seed=None, by_hand=False
):
    """Builds the layers of the network, for `keras.Sequential`.

    One-hot `(batch, steps, alphabet)` → `layers` × [LSTM → Dropout] → softmax
    `(batch, steps, alphabet)`: the distribution of the character that follows
    each step. `steps` may be any number.

    Args:
        alphabet_size: int, how many characters there are, sentinel included.
        units: int, the width of each LSTM layer.
        layers: int, how many there are.
        dropout: float, the share of each layer's outputs that is dropped in training.
        recurrent_dropout: float, as in `make_lstm_by_hand` or, without `by_hand`, as
            in `keras.layers.LSTM`.
        seed: int or None, makes the initial weights and the dropout repeatable.
        by_hand: bool, whether the LSTM layers come from `make_lstm_by_hand`.

    Returns:
        List of `keras.layers.Layer`, the input first.

    Example:

    >>> network = keras.Sequential(build_layers(27, units=128, layers=2))
    >>> network.count_params()
    214939
    """
    from keras.initializers import GlorotUniform, Orthogonal
    from keras.layers import LSTM, Dense, Dropout, Input

    # keras.utils.set_random_seed would import TensorFlow on every backend.
    seeds = iter(np.random.default_rng(seed).integers(2**31, size=4 * layers + 1).tolist())
    make_lstm = make_lstm_by_hand if by_hand else LSTM
    make_dropout = make_dropout_for_xla if by_hand else Dropout
    built = [Input((None, alphabet_size), name="characters")]
    for layer in range(1, layers + 1):
        lstm = make_lstm(
            units,
            recurrent_dropout=recurrent_dropout,
            return_sequences=True,
            kernel_initializer=GlorotUniform(next(seeds)),
            recurrent_initializer=Orthogonal(seed=next(seeds)),
            seed=next(seeds),
            name=f"lstm_{layer}",
        )
        built += [lstm, make_dropout(dropout, seed=next(seeds), name=f"dropout_{layer}")]
    kernel = GlorotUniform(next(seeds))
    built.append(Dense(alphabet_size, "softmax", kernel_initializer=kernel, name="next_character"))
    return built


def weight_shapes(alphabet_size, units, layers):
    """Returns a dict of shapes by `(layer, weight)`, in the order of Keras's `get_weights()`."""
    shapes = {}
    for layer in range(1, layers + 1):
        shapes[f"lstm_{layer}", "kernel"] = (alphabet_size if layer == 1 else units, 4 * units)
        shapes[f"lstm_{layer}", "recurrent_kernel"] = (units, 4 * units)
        shapes[f"lstm_{layer}", "bias"] = (4 * units,)
    shapes["next_character", "kernel"] = (units, alphabet_size)
    shapes["next_character", "bias"] = (alphabet_size,)
    return shapes


# 3. The network in NumPy


class SequenceModel:
    """A trained network in NumPy: it reads characters and invents the ones that follow.

    Args:
        alphabet: `Alphabet`.
        max_len: int, the most characters that a sequence had in training.
        weights: list of float32 arrays, as Keras's `get_weights()` gives them.

    Example:

    >>> names, _ = load("pre_trained_models/user_names_10000.h5")
    >>> list(names.sample("Al", count=2, temperature=0.8, seed=1))
    ['Al...', 'Al...']
    """

    def __init__(self, alphabet, max_len, weights):
        self.alphabet, self.max_len, self.weights = alphabet, max_len, weights
        *lstm, self._kernel, self._bias = weights
        self._units = len(self._kernel)
        self._layers = []
        for kernel, recurrent_kernel, bias in zip(lstm[::3], lstm[1::3], lstm[2::3]):
            if self._layers:
                self._layers.append((self._by_gate(kernel, recurrent_kernel), self._by_gate(bias)))
            else:  # a one-hot row times a matrix is a row of that matrix
                offsets = self._by_gate(kernel)
                offsets += self._by_gate(bias)
                self._layers.append((self._by_gate(recurrent_kernel), offsets))

    def __repr__(self):
        network = f"{len(self._layers)} × LSTM({self._units}), {len(self.alphabet) - 1} characters"
        return f"<SequenceModel: {network}, max_len {self.max_len}>"

    def _by_gate(self, *weights):
        # Each gate's part becomes an array of its own, because NumPy is faster on whole
        # arrays than on columns; and those of the three sigmoids are halved, because
        # σ(x) = tanh(x / 2) / 2 + 1 / 2, so that one tanh then serves all four.
        parts = [array.reshape(-1, 4, self._units) for array in weights]
        gates = np.empty((4, sum(map(len, parts)), self._units), np.float32)
        for gate, source in zip(gates, (0, 1, 3, 2)):  # i, f, o, g of i, f, g, o
            np.concatenate([part[:, source] for part in parts], out=gate)
        gates[:3] *= 0.5
        return gates

    def start(self, rows=1):
        """Returns the state before anything is read, for this many sequences.

        It is a float32 array `(2, rows, layers × units)`: of each sequence the last outputs
        of all layers, side by side, and then their memory cells.
        """
        return np.zeros((2, rows, len(self._layers) * self._units), np.float32)

    def step(self, ids, state):
        """Reads one character of each of several sequences.

        Each layer computes Hochreiter and Schmidhuber's LSTM with forget gates, as
        `keras.layers.LSTM` does: with `i, f, g, o` the four parts of
        `x·kernel + h·recurrent_kernel + bias`,
        `c ← σ(f)·c + σ(i)·tanh(g)` and `h ← σ(o)·tanh(c)`.

        Args:
            ids: int array `(batch,)`.
            state: as from `start`. Its first `batch` rows, of the second axis, are
                updated in place; others stay.

        Returns:
            Float32 array `(batch, alphabet)`: logits, whose softmax is the
            distribution of the next character.
        """
        batch, units = len(ids), self._units
        gates = np.empty((4, batch, units), np.float32)
        for layer, (weights, offsets) in enumerate(self._layers):
            hidden, cells = state[:, :batch, : (layer + 1) * units]
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
            cell = cells[:, -units:]
            cell *= f
            cell += np.multiply(i, g, out=i)
            np.multiply(o, np.tanh(cell, out=g), out=hidden[:, -units:])
        return hidden[:, -units:] @ self._kernel + self._bias

    def read_prompt(self, prompt):
        """Reads the sentinel and a prompt, a str; no sequence ends right after an empty one.

        Returns what `follow` gave for the last character and the state then, both
        of one row. Raises a UserError if the prompt holds an unknown character.
        """
        state = self.start()
        for index in (0, *self.alphabet.encode(prompt)):
            logits = self.follow(np.array([index]), state)
        if not prompt:
            logits[:, 0] = -np.inf
        return logits, state

    def follow(self, ids, state):
        """Reads like `step`, but rules out a second spelling of any text.

        Text is composed before it is learned, so a letter is never followed by an
        accent where the alphabet has both as one character.
        """
        logits = self.step(ids, state)
        if self.alphabet.marks:
            for index in {*ids.tolist()} - {0}:
                logits[np.ix_(ids == index, self.alphabet.respellings(index))] = -np.inf
        return logits

    def prepare(self, prompt, max_len=None, **shape):
        """Checks what `sample` is asked for: raises as it does.

        Returns the prompt as the model can read it, the longest sequence, and `distribution`
        as a function of logits alone.
        """
        max_len = self.max_len if max_len is None else max_len
        prompt = self.alphabet.normalize(prompt)
        self.alphabet.encode(prompt)  # for what it raises
        if len(prompt) > max_len:
            raise UserError(f"it has {len(prompt)} characters, but max_len is {max_len}")
        to_probabilities = functools.partial(distribution, **shape)
        to_probabilities(np.zeros(1))  # likewise
        return prompt, max_len, to_probabilities

    def chunk_size(self, max_len):
        """Returns how many sequences of up to `max_len` characters to work on at a time, an int."""
        width = len(self._layers) * self._units
        sizes = 2**23 // (max_len + 1), 2**21 // len(self.alphabet), 2**23 // width
        return max(1, min(LARGEST_BATCH, *sizes))

    def sample(
        self, prompt="", count=1, temperature=1.0, top_k=None, top_p=None, max_len=None, seed=None
    ):
        """Invents sequences, none of them empty.

        Each next character is drawn from the model's distribution, until the
        sentinel is drawn or the sequence has `max_len` characters.

        Args:
            prompt: str, what each sequence starts with; may be empty.
            count: int, how many sequences; None goes on forever.
            temperature, top_k, top_p: as in `distribution`.
            max_len: int or None, the longest sequence; None is the model's.
            seed: what `numpy.random.default_rng` takes: an int for the same sequences
                each time, None for others, or a `Generator`. A sequence depends on the
                seed and its index alone, so that a larger count or `max_len` begins with
                the sequences of a smaller one. (Sums are rounded a little differently in
                batches of another size; that changes about one sequence in 100,000.)

        Returns:
            An iterator of str, each with the prompt, composed (NFC).

        Raises:
            ValueError: if the prompt holds a character that the model can't
                read or is longer than `max_len`, or as `distribution` does.

        Example:

        >>> list(names.sample("Al", count=2, top_k=20, seed=1))
        ['Al...', 'Al...']
        """
        shape = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        prompt, max_len, to_probabilities = self.prepare(prompt, max_len, **shape)
        key = int(np.random.default_rng(seed).integers(2**63))
        return self._sample(prompt, count, max_len - len(prompt), to_probabilities, key)

    def _sample(self, prompt, count, steps, to_probabilities, key):
        logits, state = self.read_prompt(prompt)
        most, start = self.chunk_size(steps), 0
        while count is None or start < count:
            # Without a count a few may be enough, so the batches start small and double.
            batch = min(most, max(start, 128) if count is None else count - start)
            rows = logits.repeat(batch, axis=0), state.repeat(batch, axis=1)
            invented = self._finish(*rows, steps, to_probabilities, key, start)
            text = self.alphabet.decode(invented[invented > 0])
            end = 0
            for length in np.count_nonzero(invented, axis=1).tolist():
                begin, end = end, end + length
                yield unicodedata.normalize("NFC", prompt + text[begin:end])
            start += batch

    def _finish(self, logits, state, steps, to_probabilities, key, start):
        # Returns the ids of what follows each row's prompt, padded with 0.
        ids = np.zeros(len(logits), int)
        places = np.arange(len(logits))  # where each row's sequence stands among all of them
        invented = np.zeros((len(logits), steps), np.min_scalar_type(len(self.alphabet) - 1))
        for step in range(steps):
            if step:
                logits = self.follow(ids, state)
            if step % DRAWS == 0:
                block = _draw(key, start, len(invented), step // DRAWS)
            ids = _choose(to_probabilities(logits), block[places, step % DRAWS])
            invented[places, step] = ids
            # The last rows that go on take the places of those that have ended.
            going_on = ids > 0
            left = np.count_nonzero(going_on)
            if not left:
                break
            gaps = np.flatnonzero(~going_on[:left])
            last = left + np.flatnonzero(going_on[left:])
            state[:, gaps] = state[:, last]
            for array in (places, ids):
                array[gaps] = array[last]
            places, ids = places[:left], ids[:left]
        return invented


def _draw(key, start, rows, block):
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
    character like any other.

    Args:
        logits: array `(..., alphabet)`; `-inf` is impossible.
        temperature: float ≥ 0 that divides the logits: below 1 makes likely characters
            likelier, above 1 evens them out, 0 always takes the likeliest.
        top_k: int ≥ 1 or None, how many characters remain, the likeliest.
        top_p: float from 0 to 1 or None, keeps the smallest set of likeliest
            characters whose probabilities add up to this.

    Returns:
        Float64 array of that shape. Raises a ValueError if an argument is out of range.

    Example:

    >>> distribution(np.log([0.5, 0.3, 0.2]), top_k=2)
    array([0.625, 0.375, 0.   ])
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature should be finite and at least 0. Received: {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k should be None or at least 1. Received: {top_k}")
    if top_p is not None and not 0 <= top_p <= 1:
        raise ValueError(f"top_p should be None or from 0 to 1. Received: {top_p}")
    if temperature == 0:
        temperature, top_k = 1.0, 1
    logits = logits - logits.max(axis=-1, keepdims=True).astype(np.float64)
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


# 4. The file


def save(path, weights, metadata, checkpoint=()):
    """Writes a model's file, which `keras.models.load_model(path)` returns compiled and ready.

    Args:
        path: str or path-like, replaced if it exists.
        weights: list of float32 arrays, as Keras's `get_weights()` gives them.
        metadata: dict that JSON can hold, with at least `alphabet` (str, the
            sentinel first), `max_len`, `units` and `layers`.
        checkpoint: list of arrays that only continuing the training needs.

    Example, in plain Keras, of what follows a "q":

    >>> network = keras.models.load_model(path)
    >>> alphabet = json.loads(h5py.File(path).attrs["sequence_model"])["alphabet"]
    >>> one_hot = np.eye(len(alphabet))[[[0, alphabet.index("q")]]]  # the sentinel comes first
    >>> alphabet[network.predict(one_hot, verbose=0)[0, -1].argmax()]
    'u'
    """
    import keras

    shapes = weight_shapes(len(metadata["alphabet"]), metadata["units"], metadata["layers"])
    # In memory first, because HDF5 recovers badly from a full disk.
    content = io.BytesIO()
    # The oldest layout in which an attribute may be longer than 64 KiB.
    with h5py.File(content, "w", libver=("v108", "v108")) as file:
        group = file.create_group("model_weights")
        for place in (file, group):
            place.attrs["keras_version"] = keras.__version__
            place.attrs["backend"] = keras.backend.backend()
        for name, config in _describe_network(metadata).items():
            file.attrs[name] = json.dumps(config)
        text = json.dumps({**metadata, "format": FORMAT}, ensure_ascii=False)
        file.attrs[METADATA] = np.bytes_(text.encode())
        layers = list(dict.fromkeys(layer for layer, _ in shapes))
        group.attrs["layer_names"] = layers
        for (layer, name), value in zip(shapes, weights, strict=True):
            group[f"{layer}/{name}"] = value
        for each in layers:
            group[each].attrs["weight_names"] = [name for layer, name in shapes if layer == each]
        for index, value in enumerate(checkpoint):
            file[f"{CHECKPOINT}/{index}"] = value
    with replacing(path) as file:
        file.write(content.getbuffer())


def _describe_network(metadata):
    # What Keras needs to build and compile the network, less its defaults. Its own
    # get_config() imports TensorFlow on every backend, and says things that another
    # version of Keras 3 would not know.
    characters, units = len(metadata["alphabet"]), metadata["units"]
    dropout = metadata.get("settings", {}).get("dropout", 0.0)

    def layer(kind, **config):
        return dict(module="keras.layers", class_name=kind, config=config, registered_name=None)

    layers = [layer("InputLayer", name="characters", batch_shape=(None, None, characters))]
    for number in range(1, metadata["layers"] + 1):
        layers.append(layer("LSTM", name=f"lstm_{number}", units=units, return_sequences=True))
        layers.append(layer("Dropout", name=f"dropout_{number}", rate=dropout))
    layers.append(layer("Dense", name="next_character", units=characters, activation="softmax"))
    network = {"class_name": "Sequential", "config": {"name": METADATA, "layers": layers}}
    training = dict.fromkeys(("loss_weights", "metrics", "weighted_metrics"))
    training["loss"] = "sparse_categorical_crossentropy"
    training["optimizer_config"] = {"class_name": "Adam", "config": {}}
    return {"model_config": network, "training_config": training}


@contextlib.contextmanager
def replacing(path):
    """Opens a binary file that takes the place of the one at `path` at the end, in one step.

    The folder is made, a link is followed, and permissions are kept. If the
    block fails, `path` stays as it was. A file that can be written but not
    replaced (it is mounted into a container, or in another user's folder) gets
    the new content written into it, which a full disk could cut short.
    """
    path = os.path.realpath(path)
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    # Less what the user's mask forbids; a secret must not be readable meanwhile.
    mode = os.stat(path).st_mode & 0o777 if os.path.exists(path) else 0o666
    if os.access(path, os.W_OK) and not os.access(folder, os.W_OK):
        folder = tempfile.gettempdir()
    temporary = os.path.join(folder, f".{name[:50]}.{os.urandom(4).hex()}.tmp")
    try:
        with open(temporary, "xb", opener=functools.partial(os.open, mode=mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):  # there is no file yet, or there are no permissions
            shutil.copymode(path, temporary)
        try:
            os.replace(temporary, path)
        except OSError:
            shutil.copyfile(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def load(path, checkpoint=False):
    """Reads a model from the file that `save` wrote.

    Nothing in the file is executed, no other file is opened, and no size that
    it claims is believed before it is checked against the file's own.

    Args:
        path: str or path-like.
        checkpoint: bool, whether to return the checkpoint, too.

    Returns:
        Tuple `(model, metadata)` or `(model, metadata, checkpoint)`: a `SequenceModel`
        and what was given to `save`, the metadata with its `format`. Beside what `save`
        needs, train.py notes there `loader_class`; `data`, how many sequences there were
        and a hash of them; `settings`, by the names of their flags; `init_from`, a hash
        of that model; `epochs`, how many passes were wanted; and `history`, a list of
        the `loss` and one of the `val_loss` of each epoch or, of a long list, of each
        part of one, in nats per character.

    Raises:
        OSError: if the file can't be opened.
        UserError: if it is not a model's file; the message says why.

    Example:

    >>> names, metadata = load("pre_trained_models/user_names_10000.h5")
    >>> metadata["units"], metadata["layers"], len(metadata["history"]["loss"])
    (256, 2, 1)
    """
    # A pipe or a device could block or never end.
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is not a regular file")
    with open(path, "rb"):  # whose errors are clearer than those of h5py
        pass
    try:
        with h5py.File(path, "r", locking=False) as file:
            found = _read_model(file)
            return (*found, _read_checkpoint(file)) if checkpoint else found
    except (OSError, RuntimeError, TypeError, ValueError, LookupError) as error:
        reason = str(error).partition("\n")[0]
        if "signature not found" in reason:
            reason = "it is not an HDF5 file"
        elif not isinstance(error, UserError):
            reason = f"it is damaged: {reason}"
        raise UserError(f"{path} is not a model that train.py saved: {reason}") from None


def _require(condition, reason):
    if not condition:
        raise UserError(reason)


def _read_model(file):
    metadata = _read_metadata(file)
    symbols, layers = metadata["alphabet"], metadata["layers"]
    shapes = weight_shapes(len(symbols), metadata["units"], layers)
    places = {f"model_weights/{layer}/{name}": shape for (layer, name), shape in shapes.items()}
    weights = _read_arrays(file, places, LARGEST_WEIGHT)
    _require(len(file["model_weights"]) == layers + 1, f"it holds more than its {layers} layers")
    return SequenceModel(Alphabet(symbols), metadata["max_len"], weights), metadata


def _read_metadata(file):
    attribute = file.attrs.get_id(METADATA) if METADATA in file.attrs else None
    # One of a variable size, once damaged, can make HDF5 hang.
    _require(
        attribute
        and attribute.dtype.kind == "S"
        and attribute.shape == ()
        and attribute.dtype.itemsize <= METADATA_SIZE,
        f"it has no attribute {METADATA!r} with text of up to {METADATA_SIZE:,} bytes",
    )
    metadata = json.loads(bytes(file.attrs[METADATA]).decode())
    same = isinstance(metadata, dict) and metadata.get("format") == FORMAT
    _require(same, f"this version reads format {FORMAT}, and it has another")
    symbols = metadata.get("alphabet")
    _require(
        isinstance(symbols, str)
        and 2 <= len(symbols) == len(set(symbols)) <= LIMITS["alphabet"]
        and not any("\ud800" <= symbol <= "\udfff" for symbol in symbols),
        f"its alphabet is not a string of 2 to {LIMITS['alphabet']:,} different characters",
    )
    for key in ("max_len", "units", "layers"):
        number = metadata.get(key)
        suits = type(number) is int and 1 <= number <= LIMITS[key]
        _require(suits, f"its {key} is not a whole number from 1 to {LIMITS[key]:,}")
    return metadata


def _read_checkpoint(file):
    count = len(_follow(file, CHECKPOINT)) if CHECKPOINT in file else 0
    layers = len(file["model_weights"]) - 1
    _require(count <= 16 * layers + 16, f"it holds a larger checkpoint than {layers} layers need")
    names = [f"{CHECKPOINT}/{index}" for index in range(count)]
    return _read_arrays(file, dict.fromkeys(names), sys.float_info.max)


def _read_arrays(file, places, largest):
    # Returns the arrays at several places, given with the shape that each should have.
    found = [_find_array(file, name, shape) for name, shape in places.items()]
    # Hard links can give the same bytes many names.
    size = sum(each.nbytes for each in found)
    _require(size <= file.id.get_filesize(), "its arrays claim more bytes than it has")
    arrays = [each[()] for each in found]
    for name, array in zip(places, arrays):
        _require(is_within(array, largest), f"{name} holds NaN, or numbers beyond ±{largest:.3g}")
    return arrays


def _find_array(file, name, shape):
    # Returns an h5py.Dataset that can be read at no risk; of any shape and kind of
    # number if none is given, else float32.
    found = _follow(file, name)
    # Checked first: asking a virtual dataset for its shape would open other files.
    _require(
        isinstance(found, h5py.Dataset)
        and found.id.get_offset() is not None  # neither virtual nor compressed, and written
        and not found.id.get_create_plist().get_external_count(),
        f"{name} is not an array stored in one piece",
    )
    _require(found.dtype.kind in "fiu", f"{name} holds no numbers")
    _require(
        shape is None or (found.shape, found.dtype) == (shape, np.float32),
        f"{name} should have shape {shape} and dtype float32. "
        f"Received: shape {found.shape}, dtype {found.dtype}",
    )
    return found


def _follow(file, name):
    # Returns what stands at a path in a file, if only hard links lead to it: a soft or
    # external one could lead to another place, even another file.
    found = file
    for part in name.split("/"):
        link = found.get(part, getlink=True) if isinstance(found, h5py.Group) else None
        _require(isinstance(link, h5py.HardLink), f"it has no {name}")
        found = found[part]
    return found


def is_within(array, largest):
    """Returns whether no number of an array is NaN or beyond ±`largest`."""
    return -largest <= float(array.min()) <= float(array.max()) <= largest


# 5. What both command lines share


class CommandLine(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` whose every error is one line on stderr.

    It accepts no abbreviations, since a new flag could change their meaning.
    `model_flag` and `flag` are probably forgotten before a word that ends in `.h5`,
    and before any other.
    """

    def __init__(self, model_flag, flag, **options):
        self.model_flag, self.flag = model_flag, flag
        make_help = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=30)
        usage = f"{options['prog']} [--flag value ...]"
        super().__init__(usage=usage, formatter_class=make_help, allow_abbrev=False, **options)

    def parse_args(self, args=None, namespace=None):
        """Parses like its parent, but says what a stray word should have been."""
        args, strays = self.parse_known_args(args, namespace)
        if not strays:
            return args
        word, flag = strays[0], strays[0].partition("=")[0]
        if not word.startswith("-"):
            missing = self.model_flag if word.endswith(".h5") else self.flag
            self.error(f"{word!r} needs a flag before it: {missing} {word}")
        close = difflib.get_close_matches(flag, self._option_string_actions, 1)
        hint = f"did you mean {close[0]}?" if close else "--help shows all"
        self.error(f"there is no flag {flag}; {hint}")

    def error(self, message):
        """Prints the message, a str, and exits."""
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")


def within(kind, low, high):
    """Returns an `argparse` type: a number of a `kind`, int or float, from `low` to `high`."""
    name = "a whole number" if kind is int else "a number"

    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= (number := kind(text)) <= high:
                return number
        raise argparse.ArgumentTypeError(f"{text!r} is not {name} from {low:,} to {high:,}")

    return parse


def run_script(parser, run, args, lower):
    """Returns the exit status of a script's `run(args)`; what stops it becomes a line on stderr.

    Args:
        parser: the script's `CommandLine`, for its name and errors.
        run: function that may raise a `UserError`, or a KeyboardInterrupt with a
            signal's number and a str that says what was kept.
        args: what `run` takes.
        lower: str, the flags to lower if there is not enough memory.
    """
    for name, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        if getattr(sys, name) is None:  # it was closed before the process began
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - until it ends
    before = catch_signals()
    try:
        with needing_packages(parser.prog):
            return run(args)
    except UserError as error:
        parser.error(str(error))
    except MemoryError:
        parser.error(f"there is not enough memory; lower {lower}")
    except OSError as error:
        if error.errno is None:  # it does not come from the system
            raise
        discard(sys.stdout)
        parser.error(f"can't write {error.filename or 'the output'}: {error.strerror}")
    except KeyboardInterrupt as stop:
        catch_signals(signal.SIG_IGN)  # it is stopping already
        number, *told = stop.args or [signal.SIGINT]
        with contextlib.suppress(OSError):  # of a terminal that has gone
            print(printable(": ".join(["Stopped", *told])), file=sys.stderr)
        return 128 + number
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt(number, frame):
    """Handles a signal by raising a KeyboardInterrupt that carries its number."""
    raise KeyboardInterrupt(number)


def catch_signals(handler=interrupt):
    """Handles Ctrl-C, SIGTERM, and SIGHUP, which a closed terminal sends.

    What is ignored, as `nohup` does with SIGHUP, still is. Returns what handled each
    until now, a dict by number.
    """
    before = {}
    with contextlib.suppress(ValueError):  # outside the main thread Python allows no handlers
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    return before


@contextlib.contextmanager
def holding_signals():
    """Lets a block end before a signal interrupts: what it changes is changed as a whole."""
    held = []
    catch_signals(lambda number, frame: held.append(number))
    try:
        yield
    finally:
        catch_signals()
    if held:
        raise KeyboardInterrupt(held[0])


@contextlib.contextmanager
def naming(flag, path, doing="read"):
    """Names a flag and its file in what goes wrong when that is read or written: a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        reason = f"can't {doing} {path or repr(path)}: {error.strerror}"
        raise UserError(f"{flag}: {reason}; check the path") from None
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None


def check_target(flag, path, inputs):
    """Raises a UserError, before any work is wasted, if no file can be put at `path`.

    It must be none of `inputs`, pairs of a flag and the path of what is read.
    """
    if not os.path.basename(path) or (os.path.exists(path) and not os.path.isfile(path)):
        raise UserError(f"{flag}: {path!r} is not a regular file; pass one")
    for name, other in inputs:
        with contextlib.suppress(OSError):  # one of them does not exist
            if other is not None and os.path.samefile(path, other):
                raise UserError(f"{flag}: {path} is the file of {name}; pass another one")
    with naming(flag, path, "write"):
        with contextlib.suppress(FileNotFoundError):
            os.stat(path)  # which fails for a name that is too long, or a circular link
        if not os.access(path, os.W_OK):
            folders = pathlib.Path(os.path.realpath(path)).parents
            with tempfile.TemporaryFile(dir=next(filter(os.path.exists, folders))):
                pass


def name_character(character):
    """Returns how to name a character in a message, a str: as it looks, if that is visible."""
    if "\udc80" <= character <= "\udcff":  # what Python makes of a byte that can't be decoded
        return f"the non-UTF-8 byte 0x{ord(character) - 0xDC00:02x}"
    visible = printable(character) == character and unicodedata.category(character)[0] != "M"
    return repr(character) if visible or character.isascii() else f"U+{ord(character):04X}"


def perplexity(nats):
    """Returns the perplexity, a float, of a cross-entropy in nats per character."""
    return math.exp(nats) if nats < 700 else math.inf


def reconfigure(stream, **options):
    """Reconfigures a standard stream, unless a notebook or a program has put its own there."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(**options)


def discard(stream):
    """Redirects a standard stream of the process, if it is one, to the null device."""
    with contextlib.suppress(OSError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def printable(text):
    """Returns a str that can't steer the terminal it is shown on: with escapes, but for `JOINERS`.

    They replace what Python calls not printable (control and format characters, line
    ends, lone surrogates) and what is `INVISIBLE`.
    """
    return "".join(
        character
        if character in JOINERS or (character.isprintable() and not INVISIBLE.match(character))
        else character.encode("unicode_escape").decode()
        for character in text
    )
