import collections
import concurrent.futures
import errno
import json
import math
import os
import signal
import unicodedata

import h5py
import numpy as np
import pytest
from conftest import PRE_TRAINED, decode, enumerate_sequences, predict, random_model

import model
from loaders import UserError
from model import Alphabet, CommandLine

NOT_A_MODEL = r"not a model that train\.py saved"
SHIPPED = sorted(PRE_TRAINED.glob("*.h5"))


def assert_frequencies(counts, probabilities):
    """Asserts that counts are a plausible draw, by Pearson's χ² with small cells merged."""
    counts = np.asarray(counts)
    expected = np.asarray(probabilities) * counts.sum()
    order = np.argsort(-expected)
    cells = np.arange(max(1, np.count_nonzero(expected >= 5)) + 1)
    expected, observed = (np.add.reduceat([*x[order], 0], cells) for x in (expected, counts))
    kept = expected > 0
    assert observed[~kept].sum() == 0
    statistic = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = np.count_nonzero(kept) - 1
    if not freedom:  # only one is possible, and nothing else came
        return
    # Wilson and Hilferty: the cube root of χ² is nearly normal. 4.5 σ is 1 in 300,000.
    spread = 2 / (9 * freedom)
    assert ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread) < 4.5


# Encoding


def test_an_alphabet_names_what_it_does_not_know():
    alphabet = Alphabet("\nabc")
    np.testing.assert_array_equal(alphabet.encode("cab"), [3, 1, 2])
    with pytest.raises(ValueError, match=r"never saw '\\n', 'X', 'é'"):
        alphabet.encode("aXéb\nX")


def test_the_alphabet_has_the_characters_that_are_kept_or_given():
    corpus = model.build_corpus(["cab", "é", "abcz"], max_len=3, characters="xb")
    assert corpus.alphabet.symbols == "\nabcxé"
    assert decode(corpus) == ["cab", "é", "abc"]


def test_max_len_is_the_longest_but_at_most_64():
    assert model.build_corpus(["abc", "de"]).max_len == 3
    assert model.build_corpus(["x" * 100]).max_len == 64
    corpus = model.build_corpus(["abc", "de"], max_len=10)
    assert corpus.max_len == 10
    np.testing.assert_array_equal(corpus.targets, [1, 2, 3, 0, 4, 5, 0])


@pytest.mark.parametrize(
    ("characters", "dtype"), [(255, np.uint8), (256, np.uint16), (70_000, np.uint32)]
)
def test_many_sequences_survive_encoding_in_the_smallest_type(characters, dtype):
    points = [c for c in range(1, 80_000) if c != 10 and not 0xD800 <= c <= 0xDFFF][:characters]
    symbols = list(map(chr, points))
    rng = np.random.default_rng(0)
    sequences = ["".join(symbols[start : start + 7]) for start in range(0, characters, 7)]
    # One of them is so long that all take more than one block.
    lengths = [1000, *rng.integers(1, 9, 5000)]
    sequences += ["".join(rng.choice(symbols[:50], length)) for length in lengths]
    corpus = model.build_corpus(iter(sequences), max_len=1000)
    assert corpus.targets.dtype == dtype
    np.testing.assert_array_equal(corpus.lengths, [len(each) + 1 for each in sequences])
    assert decode(corpus) == sequences


def test_a_sequence_with_the_sentinel_is_refused():
    with pytest.raises(ValueError, match="contain the sentinel, ' '"):
        model.build_corpus(["ab", "a b"], sentinel=" ")


def test_what_has_too_many_characters_is_refused(monkeypatch):
    monkeypatch.setitem(model.LIMITS, "alphabet", 4)
    assert len(model.build_corpus(["abcba"] * 2)) == 2
    with pytest.raises(
        ValueError, match="4 different characters are more than the 3 that a model can have"
    ):
        model.build_corpus(["abcd"])


# The network


@pytest.mark.parametrize("dropped", [False, True])
def test_the_gradient_worked_out_by_hand_is_that_of_the_plain_recurrence(dropped):
    import tensorflow as tf

    rng = np.random.default_rng(0)
    steps, batch, units = 5, 3, 4
    projected, weights = (
        tf.constant(rng.standard_normal(shape), "float32")
        for shape in [(steps, batch, 4 * units), (steps, batch, units)]
    )
    kernel = tf.constant(rng.standard_normal((units, 4 * units)), "float32")
    kept_cell = tf.constant(rng.choice([0, 1], (steps, batch, 1)), "float32")
    kept_hidden = kept_cell * rng.choice([0, 2], (batch, units)) if dropped else kept_cell

    def plain(projected, kernel, kept_hidden, kept_cell):
        hidden = cell = tf.zeros((batch, units))
        outputs = []
        for step in range(steps):
            hidden, cell = hidden * kept_hidden[step], cell * kept_cell[step]
            i, f, g, o = tf.split(projected[step] + hidden @ kernel, 4, axis=1)
            cell = tf.sigmoid(f) * cell + tf.sigmoid(i) * tf.tanh(g)
            hidden = tf.sigmoid(o) * tf.tanh(cell)
            outputs.append(hidden)
        return tf.stack(outputs)

    def differentiate(function, projected):
        with tf.GradientTape() as tape:
            tape.watch([projected, kernel])
            outputs = function(projected, kernel, kept_hidden, kept_cell)
            total = tf.reduce_sum(outputs * weights)
        return [outputs, *tape.gradient(total, [projected, kernel])]

    unknown_sizes = tf.TensorSpec([None, None, 4 * units])  # as while Keras fits

    @tf.function(jit_compile=True, input_signature=[unknown_sizes])
    def ours(projected):
        return differentiate(model.run_lstm, projected)

    for found, expected in zip(ours(projected), differentiate(plain, projected)):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_recurrent_dropout_is_for_training_and_for_what_is_read_back(share):
    import tensorflow as tf

    _, lstm, *_ = model.build_layers(5, 64, 1, recurrent_dropout=share, seed=0, by_hand=True)
    ids = np.eye(5, dtype=np.float32)[[[0, 1, 2, 3]] * 2]
    mask = np.array([[False, True, True, True]] * 2)
    compiled = tf.function(lstm, jit_compile=True)
    calm, first, second = (
        compiled(ids, mask=mask, training=choice).numpy() for choice in (False, True, True)
    )
    np.testing.assert_allclose(calm[:, 0], first[:, 0], atol=1e-6)  # nothing to read back yet
    for one, other in ((calm, first), (first, second), (first[0], first[1])):
        assert np.allclose(one, other, atol=1e-6) == (share == 0)


@pytest.mark.parametrize("path", [*SHIPPED, None], ids=lambda path: path and path.stem)
def test_stock_keras_opens_a_file_and_agrees(trained, path):
    import keras

    path = path or trained[0] / "incognito_model.h5"
    network = keras.models.load_model(path)
    ours, _ = model.load(path)
    texts = [*ours.sample(count=20, seed=0), *ours.sample(count=20, temperature=3, max_len=60)]
    ids = np.zeros((40, 61), int)
    for row, text in zip(ids, texts):
        row[1 : len(text) + 1] = ours.alphabet.encode(text)
    predicted = network.predict(np.eye(len(ours.alphabet), dtype=np.float32)[ids], verbose=0)
    for text, expected in zip(texts, predicted):
        np.testing.assert_allclose(predict(ours, text), expected[: len(text) + 1], atol=1e-5)


def test_a_loaded_file_is_a_compiled_model_that_learns_on(trained):
    import keras

    network = keras.models.load_model(trained[0] / "incognito_model.h5")
    ours, _ = model.load(trained[0] / "incognito_model.h5")
    ids = np.array([[0, *ours.alphabet.encode(text)] for text in ("hello", "there")])
    inputs = np.eye(len(ours.alphabet), dtype=np.float32)[ids]
    targets = np.roll(ids, -1, axis=1)
    before = network.evaluate(inputs, targets, verbose=0)
    network.fit(inputs, targets, epochs=10, verbose=0)
    assert network.evaluate(inputs, targets, verbose=0) < before


# Sampling


SHAPES = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 3},
    {"top_p": 0.7},
    {"top_k": 100, "top_p": 1.0},
    {"temperature": 3.0, "top_k": 5, "top_p": 0.8},
    {"top_k": 1},
    {"top_p": 0.0},
]


def shape_by_hand(logits, temperature=1.0, top_k=None, top_p=None):
    """The distribution by its definition, a character at a time."""
    likelihoods = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    ranked = sorted(range(len(logits)), key=lambda index: -likelihoods[index])[:top_k]
    total = sum(likelihoods[index] for index in ranked)
    kept = {}
    for index in ranked:
        if kept and top_p is not None and sum(kept.values()) / total >= top_p:
            break
        kept[index] = likelihoods[index]
    return [kept.get(index, 0) / sum(kept.values()) for index in range(len(logits))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_distribution_is_shaped_as_the_field_does(shape):
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=2, size=(200, 9)).astype(np.float32)
    logits[:50] = logits[:50].round()  # with equals
    found = model.distribution(logits, **shape)
    expected = [shape_by_hand(row, **shape) for row in logits.tolist()]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(found.sum(axis=1), 1)


@pytest.mark.parametrize(
    ("prompt", "shape"),
    [("", {}), ("b", {"temperature": 0.5}), ("", {"temperature": 3.0, "top_k": 3, "top_p": 0.8})],
)
def test_whole_sequences_follow_the_distribution(prompt, shape):
    invented = random_model("\nabc", max_len=3, scale=0.7)
    probabilities = enumerate_sequences(invented, prompt, **shape)
    assert sum(probabilities.values()) == pytest.approx(1)
    texts = collections.Counter(invented.sample(prompt, 30_000, **shape, seed=3))
    assert set(texts) <= set(probabilities)
    assert_frequencies([texts[text] for text in probabilities], list(probabilities.values()))


def test_temperature_0_takes_the_likeliest_and_near_0_tends_to_it():
    invented = random_model("\nabcdef", max_len=12)
    symbols = invented.alphabet.symbols
    expected = symbols[1 + predict(invented, "")[0, 1:].argmax()]
    while len(expected) < 12 and (best := predict(invented, expected)[-1].argmax()):
        expected += symbols[best]
    for temperature in (0, 1e-9, 1e-320):
        assert set(invented.sample(count=5, temperature=temperature)) == {expected}


@pytest.mark.parametrize(
    "shape", [{}, {"temperature": 0}, {"temperature": 9}, {"top_k": 1}, {"top_p": 0.0}], ids=str
)
def test_no_sequence_is_empty_however_likely_its_end_is(shape):
    invented = random_model("\nabc")
    invented.weights[-1][0] += 1000
    assert set(map(len, invented.sample(count=500, **shape))) == {1}
    assert set(invented.sample("ab", 500, **shape)) == {"ab"}


def test_what_is_invented_has_one_spelling():
    invented = random_model("\naá\u0301", max_len=9)
    invented.weights[-1][...] = [-100, 0, 0, 8]  # no end, and mostly accents
    assert set(invented.sample("a\u0301", 9, max_len=1)) == {"á"}
    for prompt in ("", "a"):
        texts = list(invented.sample(prompt, 500))
        assert any("á\u0301" in text for text in texts)
        assert all(unicodedata.is_normalized("NFC", text) for text in texts)
        # An accent drawn after an `a` would have been composed with it, into one character less.
        assert {len(text) for text in texts} == {9}


def test_a_larger_count_begins_with_the_sequences_of_a_smaller_one():
    invented = random_model("\nabcdef", max_len=20)
    few, many = (list(invented.sample("b", count, seed=5)) for count in (10, 3000))
    assert many[:10] == few
    assert len(many) == 3000
    assert len(set(many)) > 300
    endless = invented.sample("b", None, seed=5)
    assert [next(endless) for _ in range(3000)] == many


def test_a_larger_max_len_goes_on_with_the_sequences_of_a_smaller_one():
    invented = random_model("\nab", scale=0.1)
    short, long = (list(invented.sample("a", 500, max_len=n, seed=1)) for n in (5, 100))
    assert [text[:5] for text in long] == short
    assert max(map(len, long)) > 5


@pytest.mark.parametrize("batch", [1, 64])
def test_a_seed_gives_the_same_sequences_whatever_the_batch_size(monkeypatch, batch):
    trained, _ = model.load(SHIPPED[1])
    expected = list(trained.sample("S", 130, seed=2))
    monkeypatch.setattr(model, "LARGEST_BATCH", batch)
    assert list(trained.sample("S", 130, seed=2)) == expected


@pytest.mark.parametrize("max_len", [1, 2, 7, 200])
def test_sequences_never_exceed_max_len(max_len):
    invented = random_model("\nab", scale=0.1)
    texts = list(invented.sample("a", 300, max_len=max_len))
    assert max(map(len, texts)) <= max_len
    assert all(text.startswith("a") for text in texts)
    assert max(map(len, invented.sample("", 300))) <= invented.max_len


@pytest.mark.parametrize(
    "shape",
    [{"top_k": 0}, {"top_k": -1}, {"top_p": 1.5}, {"temperature": -1}, {"temperature": np.nan}],
    ids=str,
)
def test_a_shape_that_can_not_be_is_an_error_at_once(shape):
    ((name, value),) = shape.items()
    for function in (random_model("\nab").sample, lambda **shape: model.distribution([1], **shape)):
        with pytest.raises(ValueError, match=rf"^{name} should be .* Received: {value}$"):
            function(**shape)


def test_a_prompt_longer_than_max_len_is_an_error():
    invented = random_model("\nab", max_len=3)
    assert list(invented.sample("aba", 2)) == ["aba", "aba"]
    with pytest.raises(ValueError, match="it has 4 characters, but max_len is 3"):
        invented.sample("abab")


# The file


def describe(symbols, units=2, layers=1):
    return {"alphabet": symbols, "max_len": 4, "units": units, "layers": layers}


def test_a_failed_save_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "model.h5"
    metadata, weights = describe("\nab"), random_model("\nab", 2, 1).weights
    model.save(path, weights, metadata, [np.arange(3)])
    before = path.read_bytes()
    with pytest.raises(TypeError):
        model.save(path, weights, metadata, [object()])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.h5"]
    loaded, found, (checkpoint,) = model.load(path, checkpoint=True)
    assert found == {"format": model.FORMAT, **metadata}
    np.testing.assert_array_equal(checkpoint, [0, 1, 2])
    for ours, theirs in zip(loaded.weights, weights):
        np.testing.assert_array_equal(ours, theirs)


def test_what_is_read_is_of_one_epoch_while_another_program_saves(tmp_path):
    path, seen, weights = tmp_path / "model.h5", set(), random_model("\nab", 2, 1).weights

    def save(epoch):
        weights[-1][...] = epoch
        model.save(path, weights, {**describe("\nab"), "epoch": epoch}, [np.array([epoch])])

    save(0)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        writer = pool.submit(lambda: [save(epoch) for epoch in range(1, 100)])
        while not writer.done():
            trained, metadata, (checkpoint,) = model.load(path, checkpoint=True)
            seen.add((trained.weights[-1][0], metadata["epoch"], checkpoint[0]))
        writer.result()
    assert len(seen) > 1
    assert all(len(set(each)) == 1 for each in seen)


def test_an_alphabet_of_any_size_is_kept(tmp_path):
    import keras

    symbols = "\n" + "".join(map(chr, range(0x4E00, 0x4E00 + 20_000)))
    model.save(tmp_path / "model.h5", random_model(symbols, 1, 1).weights, describe(symbols, 1))
    assert model.load(tmp_path / "model.h5")[0].alphabet.symbols == symbols
    keras.models.load_model(tmp_path / "model.h5")


@pytest.mark.parametrize("replaceable", [True, False])
def test_replacing_keeps_permissions_and_may_write_into_the_file(
    tmp_path, monkeypatch, replaceable
):
    def refuse(*paths):  # as where a single file is mounted into a container
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    path, link = tmp_path / "target", tmp_path / "link"
    path.write_bytes(b"something longer")
    path.chmod(0o640)
    link.symlink_to("target")
    before = path.stat()
    if not replaceable:
        monkeypatch.setattr(os, "replace", refuse)
    with model.replacing(link) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode == before.st_mode
    assert (path.stat().st_ino == before.st_ino) != replaceable
    assert sorted(os.listdir(tmp_path)) == ["link", "target"]


def test_a_new_file_gets_the_permissions_that_any_other_would(tmp_path):
    for path in tmp_path / "ours", tmp_path / "new" / "ours":
        with model.replacing(path):
            pass
        (tmp_path / "other").touch()
        assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


KERNEL = "model_weights/lstm_1/kernel"


def set_metadata(**changes):
    def tamper(file):
        metadata = json.loads(file.attrs[model.METADATA])
        file.attrs[model.METADATA] = np.bytes_(json.dumps(metadata | changes))

    return tamper


def replace_metadata(value):
    return lambda file: file.attrs.create(model.METADATA, value)


def replace_kernel(make):
    def tamper(file):
        kernel = file[KERNEL][()]
        del file[KERNEL]
        file[KERNEL] = make(file, kernel)

    return tamper


def store_kernel(**options):
    def tamper(file):
        kernel = file.pop(KERNEL)
        file.create_dataset(KERNEL, kernel.shape, kernel.dtype, **options)

    return tamper


def set_weight(value):
    return lambda file: file[KERNEL].__setitem__((0, 0), value)


def borrow_kernel(file):
    """Puts an array without an end from another file there, here one that nobody writes."""
    del file[KERNEL]
    path = file.filename + ".pipe"
    os.mkfifo(path)
    layout = h5py.VirtualLayout((39, 128), np.float32, maxshape=(None, 128))
    source = h5py.VirtualSource(path, "x", (39, 128), np.float32, maxshape=(None, 128))
    layout[: h5py.h5s.UNLIMITED, :] = source[: h5py.h5s.UNLIMITED, :]
    file.create_virtual_dataset(KERNEL, layout)


WRONG = [
    {"format": 1},
    {"format": 3},
    {"alphabet": None},
    {"alphabet": "\naa"},
    {"alphabet": "\na\ud800"},
    {"alphabet": "\nab"},
    {"max_len": None},
    {"max_len": True},
    {"max_len": 10**30},
    {"units": 0},
    {"units": 2**20},
    {"layers": 2**20},
    {"layers": 2},
]
TAMPERED = {
    **{str(change): set_metadata(**change) for change in WRONG},
    "no metadata": lambda file: file.attrs.pop(model.METADATA),
    "metadata of another type": replace_metadata(3),
    "metadata of variable size": replace_metadata("{}"),
    "metadata not JSON": replace_metadata(np.bytes_("{")),
    "metadata not UTF-8": replace_metadata(np.bytes_(b'"\xff"')),
    "metadata not an object": replace_metadata(np.bytes_("[]")),
    "metadata too deep": replace_metadata(np.bytes_("[" * 60_000)),
    "metadata too long": set_metadata(more="x" * model.METADATA_SIZE),
    "no weights": lambda file: file.pop("model_weights"),
    "no kernel": lambda file: file.pop(KERNEL),
    "a group for a kernel": lambda file: (file.pop(KERNEL), file.create_group(KERNEL)),
    "a flat kernel": replace_kernel(lambda file, x: x.ravel()),
    "a double kernel": replace_kernel(lambda file, x: x.astype(float)),
    "text for a kernel": replace_kernel(lambda file, x: "text"),
    "a soft link": replace_kernel(lambda file, x: h5py.SoftLink("/model_weights/lstm_2/kernel")),
    "an external link": replace_kernel(lambda file, x: h5py.ExternalLink(file.filename, KERNEL)),
    "a chunked kernel": store_kernel(compression="gzip"),
    "a kernel never written": store_kernel(),
    "a kernel elsewhere": store_kernel(external=[("/dev/zero", 0, h5py.h5f.UNLIMITED)]),
    "a kernel from another file": borrow_kernel,
    "NaN": set_weight(np.nan),
    "infinity": set_weight(np.inf),
    "a weight that would overflow": set_weight(1e31),
}


@pytest.fixture
def copy(tmp_path, trained):
    path = tmp_path / "model.h5"
    path.write_bytes((trained[0] / "incognito_model.h5").read_bytes())
    return path


@pytest.mark.parametrize("tamper", TAMPERED.values(), ids=TAMPERED)
def test_a_file_that_is_not_a_whole_model_is_refused(copy, tamper):
    model.load(copy)
    with h5py.File(copy, "r+") as file:
        tamper(file)
    with pytest.raises(ValueError, match=NOT_A_MODEL) as caught:
        model.load(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.6, 0.999])
def test_a_truncated_file_is_refused(copy, share):
    content = copy.read_bytes()
    copy.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=NOT_A_MODEL):
        model.load(copy)


@pytest.mark.parametrize(
    ("count", "message"), [(60, "claim more bytes than it has"), (65, "larger checkpoint than 3")]
)
def test_arrays_that_share_their_bytes_are_refused(copy, count, message):
    with h5py.File(copy, "r+") as file:
        checkpoint = file[model.CHECKPOINT]
        largest = max(checkpoint.values(), key=lambda array: array.nbytes)
        for index in range(len(checkpoint), count):
            checkpoint[str(index)] = largest
    with pytest.raises(UserError, match=message):
        model.load(copy, checkpoint=True)


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        model.load(tmp_path / "pipe")


# What both command lines share


@pytest.mark.parametrize(
    ("raised", "status", "told"),
    [
        (UserError("--n: no\x1b"), 2, r"x.py: error: --n: no\x1b"),
        (OSError(errno.EPIPE, "Broken"), 2, "x.py: error: can't write the output: Broken"),
        (OSError(errno.ENOSPC, "Full", "a.h5"), 2, "x.py: error: can't write a.h5: Full"),
        (MemoryError(), 2, "x.py: error: there is not enough memory; lower --units"),
        (KeyboardInterrupt(), 130, "Stopped"),
        (KeyboardInterrupt(signal.SIGTERM, "a.h5 is kept"), 143, "Stopped: a.h5 is kept"),
    ],
    ids=repr,
)
def test_what_stops_a_script_gets_one_line(capsys, raised, status, told):
    handler = signal.getsignal(signal.SIGINT)
    try:
        found = run_script(raised)
    except SystemExit as stop:
        found = stop.code
    assert found == status
    assert capsys.readouterr() == ("", f"{told}\n")
    assert signal.getsignal(signal.SIGINT) == handler


@pytest.mark.parametrize("bug", [ValueError("a bug"), OSError("not from the system")], ids=repr)
def test_a_bug_is_not_told_as_a_mistake_of_the_user(bug):
    with pytest.raises(type(bug), match=str(bug)):
        run_script(bug)


def run_script(raised):
    def run(args):
        raise raised

    return model.run_script(CommandLine("--m", "--f", prog="x.py"), run, None, "--units")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("naïve 名前 👍", "naïve 名前 👍"),
        ("a\x1b[31mb\nc\r\x07", r"a\x1b[31mb\nc\r\x07"),
        ("a\u202eb\u200b\x9b", r"a\u202eb\u200b\x9b"),
        ("👩\u200d🚀 ✂\ufe0f می\u200cخواهم", "👩\u200d🚀 ✂\ufe0f می\u200cخواهم"),
        ("\ud800", r"\ud800"),
    ],
)
def test_printable_text_can_not_steer_a_terminal(text, shown):
    assert model.printable(text) == shown
