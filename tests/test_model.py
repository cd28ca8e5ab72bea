import collections
import math
import os

import h5py
import numpy as np
import pytest
from conftest import PRE_TRAINED, decode, edit_metadata, enumerate_sequences, predict, random_model

import model
from loaders import UserError
from model import CommandLine

NOT_A_MODEL = r"not a model that train\.py saved"
SHIPPED = sorted(PRE_TRAINED.glob("*.h5"))


# Encoding


def test_a_corpus_has_the_characters_and_the_length_that_are_kept_or_given():
    corpus = model.build_corpus(["cab", "é", "abcz"], max_len=3, characters="xb")
    assert (corpus.alphabet.symbols, corpus.max_len) == ("\nabcxé", 3)
    assert decode(corpus) == ["cab", "é", "abc"]
    assert model.build_corpus(["x" * 100]).max_len == 64
    corpus = model.build_corpus(["abc", "de"])
    assert corpus.max_len == 3
    np.testing.assert_array_equal(corpus.targets, [1, 2, 3, 0, 4, 5, 0])
    assert model.build_corpus(["abc"], max_len=10).max_len == 10
    with pytest.raises(ValueError, match="contain the sentinel, ' '"):
        model.build_corpus(["ab", "a b"], sentinel=" ")


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


def test_what_has_too_many_characters_is_refused(monkeypatch):
    monkeypatch.setitem(model.LIMITS, "alphabet", 4)
    assert len(model.build_corpus(["abcba"] * 2)) == 2
    with pytest.raises(ValueError, match="4 different characters are more than the 3 that a model"):
        model.build_corpus(["abcd"])


# The network


def test_the_gradient_worked_out_by_hand_is_the_slope_of_the_outputs():
    import tensorflow as tf

    rng = np.random.default_rng(0)
    steps, batch, units = 5, 3, 4
    shapes = (steps, batch, 4 * units), (units, 4 * units), (steps, batch, units)
    *inputs, weights = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    kept_cell = tf.constant(rng.choice([0, 1], (steps, batch, 1)), "float32")
    kept_hidden = kept_cell * rng.choice([0, 2], (batch, units))

    @tf.function(jit_compile=True)
    def differentiate(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            total = tf.reduce_sum(model.run_lstm(*inputs, kept_hidden, kept_cell) * weights)
        return total, tape.gradient(total, inputs)

    for place, gradient in enumerate(differentiate(*map(tf.constant, inputs))[1]):
        change = 0.01 * rng.standard_normal(shapes[place]).astype(np.float32)
        totals = []
        for each in (change, -change):
            moved = [*inputs[:place], inputs[place] + each, *inputs[place + 1 :]]
            totals.append(float(differentiate(*map(tf.constant, moved))[0]))
        slope = (totals[0] - totals[1]) / 2
        assert slope == pytest.approx(float(np.sum(gradient * change)), rel=1e-3)


def test_dropout_is_for_training_and_recurrent_dropout_for_what_is_read_back():
    import tensorflow as tf

    _, lstm, *_ = model.build_layers(5, 64, 1, recurrent_dropout=0.5, seed=0, by_hand=True)
    ids = np.eye(5, dtype=np.float32)[[[0, 1, 2, 3]] * 2]
    mask = np.array([[False, True, True, True]] * 2)
    compiled = tf.function(lstm, jit_compile=True)
    calm, first, second = (
        compiled(ids, mask=mask, training=choice).numpy() for choice in (False, True, True)
    )
    np.testing.assert_allclose(calm[:, 0], first[:, 0], atol=1e-6)  # nothing to read back yet
    for one, other in ((calm, first), (first, second), (first[0], first[1])):
        assert not np.allclose(one, other, atol=1e-6)
    dropout = model.make_dropout_for_xla(0.25, seed=0)
    dropped = tf.function(dropout, jit_compile=True)(np.ones((100, 1000)), training=True).numpy()
    assert np.unique(dropped).tolist() == pytest.approx([0, 4 / 3])
    assert np.mean(dropped == 0) == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_stock_keras_opens_a_file_and_agrees(path):
    import keras

    network = keras.models.load_model(path)
    ours, _ = model.load(path)
    texts = [*ours.sample(count=20, seed=0), *ours.sample(count=20, temperature=3, max_len=60)]
    ids = np.zeros((40, 61), int)
    for row, text in zip(ids, texts):
        row[1 : len(text) + 1] = ours.alphabet.encode(text)
    predicted = network.predict(np.eye(len(ours.alphabet), dtype=np.float32)[ids], verbose=0)
    for text, expected in zip(texts, predicted):
        np.testing.assert_allclose(predict(ours, text), expected[: len(text) + 1], atol=1e-5)


# Sampling


SHAPES = [
    *({}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.7}, {"top_k": 1}, {"top_p": 0.0}),
    *({"top_k": 100, "top_p": 1.0}, {"temperature": 3.0, "top_k": 5, "top_p": 0.8}),
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
    for text, probability in probabilities.items():
        expected = 30_000 * probability
        assert abs(texts[text] - expected) < 5 * math.sqrt(expected) + 3  # about 5 σ


def test_temperature_0_takes_the_likeliest_and_near_0_tends_to_it():
    invented = random_model("\nabcdef", max_len=12)
    symbols = invented.alphabet.symbols
    expected = symbols[1 + predict(invented, "")[0, 1:].argmax()]
    while len(expected) < 12 and (best := predict(invented, expected)[-1].argmax()):
        expected += symbols[best]
    for temperature in (0, 1e-9, 1e-320):
        assert set(invented.sample(count=5, temperature=temperature)) == {expected}


@pytest.mark.parametrize("batch", [1, 64, 2048])
def test_a_larger_count_begins_with_the_sequences_of_a_smaller_one(monkeypatch, batch):
    invented = random_model("\nabcdef", max_len=20)
    few = list(invented.sample("b", 10, seed=5))
    monkeypatch.setattr(model, "LARGEST_BATCH", batch)
    many = list(invented.sample("b", 300, seed=5))
    assert many[:10] == few
    assert len(many) == 300
    assert len(set(many)) > 30
    endless = invented.sample("b", None, seed=5)
    assert [next(endless) for _ in range(300)] == many


def test_a_larger_max_len_goes_on_with_the_sequences_of_a_smaller_one():
    invented = random_model("\nab", scale=0.1)
    short, long = (list(invented.sample("a", 500, max_len=n, seed=1)) for n in (5, 100))
    assert [text[:5] for text in long] == short
    assert max(map(len, long)) > 5


@pytest.mark.parametrize(
    ("name", "value"), [("top_k", 0), ("top_p", 1.5), ("temperature", -1), ("temperature", np.nan)]
)
def test_a_shape_that_can_not_be_is_an_error_at_once(name, value):
    with pytest.raises(ValueError, match=rf"^{name} should be .* Received: {value}$"):
        random_model("\nab").sample(**{name: value})


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


def test_an_alphabet_of_any_size_is_kept(tmp_path):
    import keras

    symbols = "\n" + "".join(map(chr, range(0x4E00, 0x4E00 + 20_000)))
    model.save(tmp_path / "model.h5", random_model(symbols, 1, 1).weights, describe(symbols, 1))
    assert model.load(tmp_path / "model.h5")[0].alphabet.symbols == symbols
    keras.models.load_model(tmp_path / "model.h5")


@pytest.mark.parametrize("replaceable", [True, False])
def test_replacing_keeps_permissions_at_all_times_and_may_write_into_the_file(
    tmp_path, monkeypatch, replaceable
):
    def refuse(*paths):  # as where a single file is mounted into a container
        raise PermissionError

    path, link = tmp_path / "target", tmp_path / "link"
    path.write_bytes(b"something longer")
    path.chmod(0o640)
    link.symlink_to("target")
    before = path.stat()
    if not replaceable:
        monkeypatch.setattr(os, "replace", refuse)
    with model.replacing(link) as file:
        file.write(b"new")
        assert {each.stat().st_mode for each in tmp_path.iterdir()} == {before.st_mode}
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


def set_metadata(value):
    return lambda file: file.attrs.create(model.METADATA, value)


def link_kernel(make_link):
    return lambda file: file.pop(KERNEL) and file.__setitem__(KERNEL, make_link(file))


def store_kernel(**options):
    return lambda file: file.pop(KERNEL) and file.create_dataset(KERNEL, (3, 8), "f4", **options)


def borrow_kernel(file):
    """Puts an array without an end from another file there, here one that nobody writes."""
    del file[KERNEL]
    path = file.filename + ".pipe"
    os.mkfifo(path)
    layout = h5py.VirtualLayout((3, 8), np.float32, maxshape=(None, 8))
    source = h5py.VirtualSource(path, "x", (3, 8), np.float32, maxshape=(None, 8))
    layout[: h5py.h5s.UNLIMITED, :] = source[: h5py.h5s.UNLIMITED, :]
    file.create_virtual_dataset(KERNEL, layout)


WRONG = [
    {"format": 1},
    {"format": 3},
    {"max_len": True},
    {"max_len": 10**30},
    {"more": "x" * 2**22},
]
WRONG += [{"alphabet": "\na" + other} for other in ("a", "\ud800", "bc")]
WRONG += [{"units": 0}, {"units": 2**20}, {"layers": 2**20}, {"layers": 1}]
TAMPERED = {
    "no metadata": lambda file: file.attrs.pop(model.METADATA),
    "metadata of variable size": set_metadata("{}"),
    "metadata too deep": set_metadata(np.bytes_("[" * 60_000)),
    "a soft link": link_kernel(lambda file: h5py.SoftLink("/model_weights/lstm_2/kernel")),
    "an external link": link_kernel(lambda file: h5py.ExternalLink(file.filename, KERNEL)),
    "a chunked kernel": store_kernel(compression="gzip"),
    "a kernel never written": store_kernel(),
    "a kernel elsewhere": store_kernel(external=[("/dev/zero", 0, h5py.h5f.UNLIMITED)]),
    "a kernel from another file": borrow_kernel,
    "NaN": lambda file: file[KERNEL].__setitem__((0, 0), np.nan),
    "a weight that would overflow": lambda file: file[KERNEL].__setitem__((0, 0), 1e31),
}


@pytest.fixture
def saved(tmp_path):
    weights, metadata = random_model("\nab", 2, 2).weights, describe("\nab", 2, 2)
    model.save(tmp_path / "model.h5", weights, metadata, [*weights, np.arange(60_000)])
    model.load(tmp_path / "model.h5")
    return tmp_path / "model.h5"


@pytest.mark.parametrize("changes", WRONG, ids=lambda changes: str(changes)[:30])
def test_a_file_with_other_metadata_is_refused(saved, changes):
    edit_metadata(saved, **changes)
    with pytest.raises(UserError, match=NOT_A_MODEL):
        model.load(saved)


@pytest.mark.parametrize("tamper", TAMPERED.values(), ids=TAMPERED)
def test_a_file_that_is_not_a_whole_model_is_refused(saved, tamper):
    with h5py.File(saved, "r+") as file:
        tamper(file)
    with pytest.raises(UserError, match=NOT_A_MODEL) as caught:
        model.load(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("count", "message"), [(40, "claim more bytes than it has"), (65, "larger checkpoint than 2")]
)
def test_arrays_that_share_their_bytes_are_refused(saved, count, message):
    with h5py.File(saved, "r+") as file:
        checkpoint = file[model.CHECKPOINT]
        largest = max(checkpoint.values(), key=lambda array: array.nbytes)
        for index in range(len(checkpoint), count):
            checkpoint[str(index)] = largest
    with pytest.raises(UserError, match=message):
        model.load(saved, checkpoint=True)


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        model.load(tmp_path / "pipe")


# What both command lines share


@pytest.mark.parametrize("bug", [ValueError("a bug"), OSError("not from the system")], ids=repr)
def test_a_bug_is_not_told_as_a_mistake_of_the_user(bug):
    def run(args):
        raise bug

    with pytest.raises(type(bug), match=str(bug)):
        model.run_script(CommandLine("--m", "--f", prog="x.py"), run, None, "--units")


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
