import collections
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
    expected = np.asarray(probabilities) * sum(counts)
    order = np.argsort(expected)[::-1]
    small = max(1, np.count_nonzero(expected >= 5))
    observed = np.asarray(counts)[order]
    expected = expected[order]
    observed = np.append(observed[:small], observed[small:].sum())
    expected = np.append(expected[:small], expected[small:].sum())
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


def test_the_loss_is_the_sum_over_characters_and_ends():
    corpus = model.encode(["abcdef", "abcd", "b"], sentinel="s", max_len=4)
    np.testing.assert_array_equal(corpus.complete, [False, True, True])
    np.testing.assert_array_equal(corpus.targets, [4, 5, 2])
    network = model.build_network(len(corpus.alphabet), 8, 2, 0.5, seed=1)
    numpy = model.SequenceModel(corpus.alphabet, 4, network.get_weights())
    expected = 0
    for text, count in (("abcd", 4), ("abcd", 5), ("b", 2)):
        probabilities = predict(numpy, text)
        ids = [*corpus.alphabet.encode(text), 0]
        expected -= sum(np.log(probabilities[step, ids[step]]) for step in range(count))
    for steps in (5, 9):
        rows = np.zeros((4, steps), np.uint8)
        rows[:3, :4] = corpus.rows
        targets = np.array([*corpus.targets, 0], np.int32)
        loss = model.total_loss(network, rows, targets)
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
    kept = tf.constant(rng.choice([0, 2], (batch, units)), "float32") if dropped else None

    def plain(projected, kernel, kept):
        hidden = cell = tf.zeros((batch, units))
        outputs = []
        for step in range(steps):
            read = hidden if kept is None else hidden * kept
            i, f, g, o = tf.split(projected[step] + read @ kernel, 4, axis=1)
            cell = tf.sigmoid(f) * cell + tf.sigmoid(i) * tf.tanh(g)
            hidden = tf.sigmoid(o) * tf.tanh(cell)
            outputs.append(hidden)
        return tf.stack(outputs)

    def differentiate(function):
        with tf.GradientTape() as tape:
            tape.watch([projected, kernel])
            outputs = function(projected, kernel, kept)
            total = tf.reduce_sum(outputs * weights)
        return [outputs, *tape.gradient(total, [projected, kernel])]

    for ours, theirs in zip(differentiate(model.run_lstm), differentiate(plain)):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_recurrent_dropout_is_for_training_and_for_what_is_read_back(share):
    import tensorflow as tf

    network = model.build_network(5, 64, 1, dropout=0.0, recurrent_dropout=share, seed=0)
    ids = np.eye(5, dtype=np.float32)[[[0, 1, 2, 3]] * 2]
    lstm = network.layers[0]
    lstm.by_hand = True
    compiled = tf.function(lstm, jit_compile=True)
    calm, first, second = (compiled(ids, training=choice).numpy() for choice in (False, True, True))
    np.testing.assert_allclose(calm[:, 0], first[:, 0], atol=1e-6)  # nothing to read back yet
    for one, other in ((calm, first), (first, second), (first[0], first[1])):
        assert np.allclose(one, other, atol=1e-6) == (share == 0)


def test_characters_that_are_given_are_in_the_alphabet():
    corpus = model.encode(["cab", "é"], characters="xb")
    assert corpus.alphabet.symbols == "\nabcxé"
    assert corpus.alphabet.decode(corpus.rows[0]) == "cab"


def test_max_len_is_the_longest_but_at_most_64():
    assert model.encode(["abc", "de"]).rows.shape == (2, 3)
    assert model.encode(["x" * 100]).rows.shape == (1, 64)
    corpus = model.encode(["abc"], max_len=10)
    assert corpus.max_len == 10
    assert corpus.rows.shape == (1, 3)


def test_characters_beyond_the_cut_are_not_in_the_alphabet():
    assert model.encode(["abz"], max_len=2).alphabet.symbols == "\nab"


@pytest.mark.parametrize(
    ("characters", "dtype"), [(255, np.uint8), (256, np.uint16), (70_000, np.uint32)]
)
def test_many_sequences_survive_encoding_in_the_smallest_type(characters, dtype):
    points = [c for c in range(1, 80_000) if c != 10 and not 0xD800 <= c <= 0xDFFF][:characters]
    symbols = list(map(chr, points))
    rng = np.random.default_rng(0)
    sequences = ["".join(symbols[start : start + 7]) for start in range(0, characters, 7)]
    sequences += ["".join(rng.choice(symbols[:50], rng.integers(1, 9))) for _ in range(70_000)]
    corpus = model.encode(iter(sequences))
    assert corpus.rows.dtype == dtype
    assert corpus.complete.all()
    decoded = [corpus.alphabet.decode(row[row > 0]) for row in corpus.rows]
    assert decoded == sequences


def test_sequences_with_the_sentinel_are_counted():
    with pytest.raises(model.SentinelError) as caught:
        model.encode(["ab", "a b", "c", "d e"], sentinel=" ", max_len=1)
    assert (caught.value.first, caught.value.count) == (1, 2)


def test_an_alphabet_names_what_it_does_not_know():
    alphabet = Alphabet("\nabc")
    np.testing.assert_array_equal(alphabet.encode("cab"), [3, 1, 2])
    with pytest.raises(ValueError, match=r"never saw '\\n', 'X', 'é'"):
        alphabet.encode("aXéb\nX")


# The distribution


@pytest.fixture(scope="module")
def stock_keras():
    import keras

    return keras


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_stock_keras_opens_a_shipped_model_and_agrees(stock_keras, path):
    assert_agrees_with_keras(stock_keras, path)


def test_stock_keras_opens_a_trained_model_and_agrees(stock_keras, trained):
    assert_agrees_with_keras(stock_keras, trained[0] / "incognito_model.h5")


def assert_agrees_with_keras(keras, path):
    network = keras.models.load_model(path)
    ours, _ = model.load(path)
    rng = np.random.default_rng(0)
    texts = list(ours.sample(count=20, seed=rng)) + list(
        ours.sample(count=20, seed=rng, temperature=3, max_len=60)
    )
    for text in texts:
        ids = [0, *ours.alphabet.encode(text)]
        one_hot = np.eye(len(ours.alphabet), dtype=np.float32)[ids]
        expected = network.predict(one_hot[None], verbose=0)[0]
        np.testing.assert_allclose(predict(ours, text), expected, rtol=0, atol=1e-5)


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


def shape_by_hand(logits, temperature, top_k, top_p):
    """The distribution by its definition, a character at a time."""
    likelihoods = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    ranked = sorted(range(len(logits)), key=lambda index: -likelihoods[index])[:top_k]
    total = sum(likelihoods[index] for index in ranked)
    kept = []
    for index in ranked:
        if (
            kept
            and top_p is not None
            and sum(likelihoods[other] for other in kept) / total >= top_p
        ):
            break
        kept.append(index)
    total = sum(likelihoods[index] for index in kept)
    return [likelihoods[index] / total if index in kept else 0 for index in range(len(logits))]


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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_distribution_is_shaped_as_the_field_does(shape):
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=2, size=(200, 9)).astype(np.float32)
    logits[:50] = logits[:50].round()  # with equals
    found = model.distribution(logits, **shape)
    complete = {"temperature": 1.0, "top_k": None, "top_p": None} | shape
    expected = [shape_by_hand(row, **complete) for row in logits.tolist()]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(found.sum(axis=1), 1)


@pytest.mark.parametrize("prompt", ["", "a", "cab"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_next_character_follows_the_distribution(prompt, shape):
    invented = random_model("\nabcdefgh")
    probabilities = model.distribution(invented.read(prompt)[0][-1], **shape)
    texts = invented.sample(prompt, 20_000, **shape, max_len=len(prompt) + 1, seed=7)
    following = [text[len(prompt) :] for text in texts]
    counts = [following.count("")] + [following.count(c) for c in "abcdefgh"]
    assert sum(counts) == 20_000
    assert_frequencies(counts, probabilities)


def test_whole_sequences_follow_the_distribution():
    invented = random_model("\nabc", max_len=3, scale=0.7)
    probabilities = enumerate_sequences(invented)
    assert sum(probabilities.values()) == pytest.approx(1)
    texts = list(invented.sample(count=30_000, seed=3))
    assert set(texts) <= set(probabilities)
    assert_frequencies([texts.count(text) for text in probabilities], list(probabilities.values()))


def test_invented_sequences_come_with_the_predictions_they_were_drawn_from():
    models = [random_model("\nab", max_len=3, seed=seed) for seed in (0, 1)]
    corpus = model.invent(models, 20_000, 4, seed=3)
    texts = [corpus.alphabet.decode(row[row > 0]) for row in corpus.rows]
    probabilities = {"": 1.0}
    expected = {}
    for _ in range(4):
        longer = {}
        for text, share in probabilities.items():
            mean = sum(model.distribution(each.read(text)[0][-1]) for each in models) / 2
            if not text:
                mean = np.array([0, *mean[1:]]) / mean[1:].sum()
            first = texts.index(text) if text in texts else None
            if first is not None:
                np.testing.assert_allclose(corpus.predictions[first, len(text)], mean, atol=1e-6)
            expected[text] = share * mean[0]
            longer |= {text + symbol: share * p for symbol, p in zip("ab", mean[1:])}
        probabilities = longer
    expected |= probabilities  # cut, since four targets are all they may have
    counts = collections.Counter(texts)
    assert_frequencies([counts[text] for text in expected], list(expected.values()))
    for text, targets, complete in zip(texts, corpus.targets, corpus.complete):
        assert complete == (len(text) < 4)
        assert targets == len(text) + complete
    again = model.invent(models, 20_000, 4, seed=3)
    assert again.rows.tobytes() == corpus.rows.tobytes()
    assert again.predictions.tobytes() == corpus.predictions.tobytes()


def test_temperature_0_takes_the_likeliest_and_near_0_tends_to_it():
    invented = random_model("\nabcdef", max_len=12)
    expected = ""
    while len(expected) < 12 and (best := invented.read(expected)[0][-1].argmax()):
        expected += invented.alphabet.symbols[best]
    for temperature in (0, 1e-9, 1e-320):
        assert set(invented.sample(count=5, temperature=temperature)) == {expected}


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


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_a_seed_gives_the_same_sequences_whatever_the_batch_size(monkeypatch, batch):
    trained, _ = model.load(SHIPPED[1])
    expected = list(trained.sample("S", 300, seed=2))
    monkeypatch.setattr(model, "BATCH", batch)
    assert list(trained.sample("S", 300, seed=2)) == expected


@pytest.mark.parametrize("max_len", [1, 2, 7, 200])
def test_sequences_never_exceed_max_len(max_len):
    invented = random_model("\nab", scale=0.1)
    texts = list(invented.sample("a", 300, max_len=max_len))
    assert max(map(len, texts)) <= max_len
    assert all(text.startswith("a") for text in texts)
    assert max(map(len, invented.sample("", 300))) <= invented.max_len


def test_a_prompt_longer_than_max_len_is_an_error():
    invented = random_model("\nab", max_len=3)
    assert list(invented.sample("aba", 2)) == ["aba", "aba"]
    with pytest.raises(ValueError, match="4 characters are more than"):
        invented.sample("abab")


# The file


def test_a_failed_save_leaves_the_file_as_it_was(tmp_path, stock_keras):
    path = tmp_path / "model.h5"
    network = model.build_network(3, units=2, layers=1, dropout=0.0)
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
    network = model.build_network(len(symbols), units=1, layers=1, dropout=0.0)
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


def replace_kernel(make):
    def tamper(file):
        kernel = file[KERNEL][()]
        del file[KERNEL]
        make(file, kernel)

    return tamper


def borrow(path):
    """The layout of an array without an end in another file, here one that nobody writes."""
    os.mkfifo(path)
    layout = h5py.VirtualLayout((39, 128), np.float32, maxshape=(None, 128))
    source = h5py.VirtualSource(path, "x", (39, 128), np.float32, maxshape=(None, 128))
    layout[: h5py.h5s.UNLIMITED, :] = source[: h5py.h5s.UNLIMITED, :]
    return layout


TAMPERED = {
    "no metadata": lambda file: file.attrs.pop(model.METADATA),
    "metadata of another type": lambda file: file.attrs.create(model.METADATA, 3),
    "metadata of variable size": lambda file: file.attrs.create(model.METADATA, "{}"),
    "metadata not JSON": lambda file: file.attrs.create(model.METADATA, np.bytes_("{")),
    "metadata not UTF-8": lambda file: file.attrs.create(model.METADATA, np.bytes_(b'"\xff"')),
    "metadata not an object": lambda file: file.attrs.create(model.METADATA, np.bytes_("[]")),
    "metadata too deep": lambda file: file.attrs.create(model.METADATA, np.bytes_("[" * 60_000)),
    "another format": set_metadata(format=2),
    "no alphabet": set_metadata(alphabet=None),
    "a character twice": set_metadata(alphabet="\naa"),
    "a lone surrogate": set_metadata(alphabet="\na\ud800"),
    "another alphabet size": set_metadata(alphabet="\nab"),
    "no max_len": set_metadata(max_len=None),
    "a true max_len": set_metadata(max_len=True),
    "a huge max_len": set_metadata(max_len=10**30),
    "units below 1": set_metadata(units=0),
    "huge units": set_metadata(units=2**20),
    "huge layers": set_metadata(layers=2**20),
    "other layers": set_metadata(layers=2),
    "no weights": lambda file: file.pop("model_weights"),
    "no kernel": lambda file: file.pop(KERNEL),
    "a group for a kernel": replace_kernel(lambda file, _: file.create_group(KERNEL)),
    "a flat kernel": replace_kernel(lambda file, x: file.create_dataset(KERNEL, data=x.ravel())),
    "a double kernel": replace_kernel(
        lambda file, x: file.create_dataset(KERNEL, data=x.astype(float))
    ),
    "text for a kernel": replace_kernel(lambda file, _: file.create_dataset(KERNEL, data="text")),
    "a chunked kernel": replace_kernel(
        lambda file, x: file.create_dataset(KERNEL, data=x, compression="gzip")
    ),
    "a kernel elsewhere": replace_kernel(
        lambda file, x: file.create_dataset(
            KERNEL, x.shape, x.dtype, external=[("/dev/zero", 0, h5py.h5f.UNLIMITED)]
        )
    ),
    "a kernel from another file": replace_kernel(
        lambda file, x: file.create_virtual_dataset(KERNEL, borrow(file.filename + ".pipe"))
    ),
    "a soft link": replace_kernel(
        lambda file, _: file.__setitem__(KERNEL, h5py.SoftLink("/model_weights/lstm_2/kernel"))
    ),
    "an external link": replace_kernel(
        lambda file, _: file.__setitem__(KERNEL, h5py.ExternalLink(file.filename, KERNEL))
    ),
    "NaN": lambda file: file[KERNEL].__setitem__((0, 0), np.nan),
    "infinity": lambda file: file[KERNEL].__setitem__((0, 0), np.inf),
}


@pytest.mark.parametrize("tamper", TAMPERED.values(), ids=TAMPERED)
def test_a_file_that_is_not_a_whole_model_is_refused(tmp_path, trained, tamper):
    path = tmp_path / "model.h5"
    path.write_bytes((trained[0] / "incognito_model.h5").read_bytes())
    model.load(path)
    with h5py.File(path, "r+") as file:
        tamper(file)
    with pytest.raises(ValueError, match=NOT_A_MODEL) as caught:
        model.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.6, 0.999])
def test_a_truncated_file_is_refused(tmp_path, trained, share):
    content = (trained[0] / "incognito_model.h5").read_bytes()
    path = tmp_path / "model.h5"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=NOT_A_MODEL):
        model.load(path)


def test_arrays_that_share_their_bytes_are_refused(tmp_path, trained):
    path = tmp_path / "model.h5"
    path.write_bytes((trained[0] / "incognito_model.h5").read_bytes())
    with h5py.File(path, "r+") as file:
        state = file[model.TRAINING_STATE]
        largest = max(state.values(), key=lambda array: array.nbytes)
        for index in range(len(state), 60):
            state[str(index)] = largest
    with pytest.raises(ValueError, match="claim more bytes than it has"):
        model.load_training_state(path)


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
