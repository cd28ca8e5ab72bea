import json
import math
import os

import h5py
import numpy as np
import pytest
from conftest import PRE_TRAINED, enumerate_sequences, predict, random_model

import model
from model import Alphabet

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
    assert corpus.alphabet.decode(corpus.rows[0]) == "cab"


def test_max_len_is_the_longest_but_at_most_64():
    assert model.build_corpus(["abc", "de"]).rows.shape == (2, 3)
    assert model.build_corpus(["x" * 100]).rows.shape == (1, 64)
    corpus = model.build_corpus(["abc"], max_len=10)
    assert corpus.max_len == 10
    assert corpus.rows.shape == (1, 3)


@pytest.mark.parametrize(
    ("characters", "dtype"), [(255, np.uint8), (256, np.uint16), (70_000, np.uint32)]
)
def test_many_sequences_survive_encoding_in_the_smallest_type(characters, dtype):
    points = [c for c in range(1, 80_000) if c != 10 and not 0xD800 <= c <= 0xDFFF][:characters]
    symbols = list(map(chr, points))
    rng = np.random.default_rng(0)
    sequences = ["".join(symbols[start : start + 7]) for start in range(0, characters, 7)]
    sequences += ["".join(rng.choice(symbols[:50], rng.integers(1, 9))) for _ in range(70_000)]
    corpus = model.build_corpus(iter(sequences))
    assert corpus.rows.dtype == dtype
    assert corpus.complete.all()
    assert [corpus.alphabet.decode(row[row > 0]) for row in corpus.rows] == sequences


def test_a_sequence_with_the_sentinel_is_refused():
    with pytest.raises(ValueError, match="contain the sentinel, ' '"):
        model.build_corpus(["ab", "a b"], sentinel=" ")


def test_what_would_take_too_much_memory_is_refused(monkeypatch):
    monkeypatch.setattr(model, "LARGEST_CORPUS", 10)
    monkeypatch.setitem(model.LIMITS, "alphabet", 4)
    assert len(model.build_corpus(["abcba"] * 2)) == 2
    with pytest.raises(ValueError, match="2 sequences of up to 6 characters take more"):
        model.build_corpus(["abcabc"] * 2)
    with pytest.raises(
        ValueError, match="4 different characters are more than the 3 that a model can have"
    ):
        model.build_corpus(["abcd"])


# The network


@pytest.fixture(scope="module")
def stock_keras():
    import keras

    return keras


def build(keras, alphabet_size, **options):
    return keras.Sequential(model.build_layers(alphabet_size, **options))


@pytest.mark.parametrize("packed", [False, True])
def test_the_loss_is_the_sum_over_characters_and_ends(stock_keras, packed):
    import tensorflow as tf

    corpus = model.build_corpus(["abcdef", "abcd", "b"], sentinel="s", max_len=4)
    np.testing.assert_array_equal(corpus.complete, [False, True, True])
    np.testing.assert_array_equal(corpus.lengths, [4, 5, 2])
    options = {"units": 8, "layers": 2, "dropout": 0.5, "seed": 1, "by_hand": packed}
    network = build(stock_keras, len(corpus.alphabet), **options)
    numpy = model.SequenceModel(corpus.alphabet, 4, network.get_weights())
    expected = 0
    for text, count in (("abcd", 4), ("abcd", 5), ("b", 2)):
        probabilities = predict(numpy, text)
        ids = [*corpus.alphabet.encode(text), 0]
        expected -= sum(np.log(probabilities[step, ids[step]]) for step in range(count))
    a, b, c, d = corpus.alphabet.encode("abcd")
    rows = [[a, b, c, d, 0, 0], [a, b, c, d, 0, 0], [b, 0, 0, 0, 0, 0]]
    positions = [[1, 2, 3, 4, 0, 0], [1, 2, 3, 4, 5, 0], [1, 2, 0, 0, 0, 0]]
    if packed:
        rows = [[a, b, c, d, b, 0, a, b, c, d, 0, 0], [0] * 12]
        positions = [[1, 2, 3, 4, 1, 2, 1, 2, 3, 4, 5, 0], [0] * 12]
    compiled = tf.function(model.total_loss, jit_compile=packed)
    loss = compiled(network, np.array(rows, np.uint8), np.array(positions, np.int32), packed)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


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
def test_stock_keras_opens_a_file_and_agrees(stock_keras, trained, path):
    path = path or trained[0] / "incognito_model.h5"
    network = stock_keras.models.load_model(path)
    ours, _ = model.load(path)
    texts = [*ours.sample(count=20, seed=0), *ours.sample(count=20, temperature=3, max_len=60)]
    ids = np.zeros((40, 61), int)
    for row, text in zip(ids, texts):
        row[1 : len(text) + 1] = ours.alphabet.encode(text)
    predicted = network.predict(np.eye(len(ours.alphabet), dtype=np.float32)[ids], verbose=0)
    for text, expected in zip(texts, predicted):
        np.testing.assert_allclose(predict(ours, text), expected[: len(text) + 1], atol=1e-5)


def test_a_loaded_file_is_a_compiled_model_that_learns_on(stock_keras, trained):
    network = stock_keras.models.load_model(trained[0] / "incognito_model.h5")
    ours, _ = model.load(trained[0] / "incognito_model.h5")
    ids = np.array([[0, *ours.alphabet.encode(text)] for text in ("hello", "there")])
    inputs = np.eye(len(ours.alphabet), dtype=np.float32)[ids]
    targets = np.roll(ids, -1, axis=1)
    before = network.evaluate(inputs, targets, verbose=0)
    network.fit(inputs, targets, epochs=30, verbose=0)
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


@pytest.mark.parametrize("prompt", ["", "a", "cab"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_next_character_follows_the_distribution(prompt, shape):
    invented = random_model("\nabcdefgh")
    probabilities = predict(invented, prompt)[-1]
    if not prompt:  # no sequence is empty
        probabilities[0] = 0
    with np.errstate(divide="ignore"):
        probabilities = model.distribution(np.log(probabilities / probabilities.sum()), **shape)
    texts = invented.sample(prompt, 20_000, **shape, max_len=len(prompt) + 1, seed=7)
    following = [text[len(prompt) :] for text in texts]
    counts = [following.count("")] + [following.count(c) for c in "abcdefgh"]
    assert sum(counts) == 20_000
    assert_frequencies(counts, probabilities)


@pytest.mark.parametrize("prompt", ["", "b"])
def test_whole_sequences_follow_the_distribution(prompt):
    invented = random_model("\nabc", max_len=3, scale=0.7)
    probabilities = enumerate_sequences(invented, prompt)
    assert sum(probabilities.values()) == pytest.approx(1)
    not_empty = 1 if prompt else 1 - predict(invented, "")[0, 0]
    for text, probability in probabilities.items():
        rows = predict(invented, text)
        ids = [*invented.alphabet.encode(text), 0]
        steps = range(len(prompt), len(text) + (len(text) < 3))
        expected = math.prod(rows[step, ids[step]] for step in steps) / not_empty
        assert probability == pytest.approx(expected, rel=1e-5)
    texts = list(invented.sample(prompt, 30_000, seed=3))
    assert set(texts) <= set(probabilities)
    assert_frequencies([texts.count(text) for text in probabilities], list(probabilities.values()))


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


def test_a_failed_save_leaves_the_file_as_it_was(tmp_path, stock_keras):
    path = tmp_path / "model.h5"
    network = build(stock_keras, 3, units=2, layers=1)
    network.compile(loss="sparse_categorical_crossentropy")
    metadata = {"alphabet": "\nab", "max_len": 4, "units": 2, "layers": 1}
    model.save(path, network, network.get_weights(), metadata)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        model.save(path, network, network.get_weights(), metadata, [object()])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.h5"]
    loaded, found = model.load(path)
    assert found == {"format": model.FORMAT, **metadata}
    for ours, theirs in zip(loaded.weights, network.get_weights()):
        np.testing.assert_array_equal(ours, theirs)


def test_an_alphabet_of_any_size_is_kept(tmp_path, stock_keras):
    symbols = "\n" + "".join(map(chr, range(0x4E00, 0x4E00 + 20_000)))
    network = build(stock_keras, len(symbols), units=1, layers=1)
    network.compile(loss="sparse_categorical_crossentropy")
    metadata = {"alphabet": symbols, "max_len": 4, "units": 1, "layers": 1}
    model.save(tmp_path / "model.h5", network, network.get_weights(), metadata)
    assert model.load(tmp_path / "model.h5")[0].alphabet.symbols == symbols
    stock_keras.models.load_model(tmp_path / "model.h5")


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


def test_a_file_of_the_first_format_is_read(copy):
    expected, _ = model.load(copy)
    with h5py.File(copy, "r+") as file:
        set_metadata(format=1)(file)
    found, metadata = model.load(copy)
    assert metadata["format"] == 1
    assert list(found.sample(count=9, seed=0)) == list(expected.sample(count=9, seed=0))


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.6, 0.999])
def test_a_truncated_file_is_refused(copy, share):
    content = copy.read_bytes()
    copy.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=NOT_A_MODEL):
        model.load(copy)


@pytest.mark.parametrize(
    ("count", "message"), [(60, "claim more bytes than it has"), (65, "larger training state than")]
)
def test_arrays_that_share_their_bytes_are_refused(copy, count, message):
    with h5py.File(copy, "r+") as file:
        state = file[model.TRAINING_STATE]
        largest = max(state.values(), key=lambda array: array.nbytes)
        for index in range(len(state), count):
            state[str(index)] = largest
    with pytest.raises(ValueError, match=message):
        model.load_training_state(copy)


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        model.load(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("naïve 名前 👍", "naïve 名前 👍"),
        ("a\x1b[31mb\nc\r\x07", r"a\x1b[31mb\nc\r\x07"),
        ("a\u202eb\u200d\x9b", r"a\u202eb\u200d\x9b"),
        ("\ud800", r"\ud800"),
    ],
)
def test_printable_text_can_not_steer_a_terminal(text, shown):
    assert model.printable(text) == shown
