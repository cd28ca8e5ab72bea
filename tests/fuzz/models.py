"""Points both scripts at files that claim to be models, thousands of them, each broken otherwise.

    python tests/fuzz/models.py --count 10000

Each input is a good file that was changed: some bytes, with or without mending HDF5's checksums
over them, or some objects, through h5py. Each script reads it in a process of its own. The only
outcomes allowed are a working sampler whose probabilities are numbers, and one line with exit
status 2; in little time and memory, without opening another file. A sampler that has much to do
must say so in time and stop at Ctrl-C. An input that takes the code somewhere new, or that brings
out another message, is changed further.

What breaks the rule is written to `--keep`; those that once did are in `corpus/`.
"""

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import io
import json
import math
import os
import pathlib
import pickle
import re
import resource
import select
import signal
import struct
import sys
import tempfile
import time

import h5py
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import model  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402

SECONDS = 10  # the most that reading a file may take, or inventing without a word
MEMORY = 200 * 2**20  # the most bytes that it may take beyond the file's own size
SETTINGS = {
    "max_len": 6,
    "sentinel": "\n",
    "units": 4,
    "layers": 2,
    "dropout": 0.3,
    "recurrent_dropout": 0.0,
    "batch_size": 32,
    "learning_rate": 0.01,
    "validation_split": 0.0,
    "seed": 0,
}
LINES = ["abc", "bca", "cab", "aabb", "cc", "abcabc"]
NUMBERS = [0, 1, 2, 7, 8, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1]
NUMBERS += [2**40, 2**48, 2**62, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1]


# The good files


def make_bases(folder):
    """Makes good files of several layouts, and the data that they are said to come from.

    Args:
        folder: `pathlib.Path`.

    Returns:
        List of bytes, the files' contents.
    """
    (folder / "lines.txt").write_text("\n".join(LINES))
    args = train.parse_arguments(command(folder, "x.h5")[1:])[1]
    train.read_source(args)
    corpus = train.read_corpus(args)
    metadata = train.describe(args, corpus, None, [])
    metadata["history"] = {"loss": [1.5], "val_loss": []}
    contents = []
    for options, state in (
        ({"libver": "latest"}, True),
        ({"libver": "latest"}, False),
        ({"libver": "earliest"}, True),
        ({"libver": "v108", "fs_strategy": "page", "fs_persist": True}, False),
        ({"libver": "earliest", "userblock_size": 512, "track_order": True}, False),
    ):
        with h5py.File(folder / "base.h5", "w", **options) as file:
            fill(file, metadata, len(corpus.alphabet), state)
        contents.append((folder / "base.h5").read_bytes())
    symbols = "\n" + "".join(map(chr, range(0x4E00, 0x4E00 + 20_000)))
    wide = {**metadata, "alphabet": symbols, "units": 1, "layers": 1}
    with h5py.File(folder / "base.h5", "w", libver="latest") as file:
        fill(file, wide, len(symbols), False)
        file["model_weights/next_character/bias"][0] = 8  # soon ends, which is soon proven
    return [*contents, (folder / "base.h5").read_bytes()]


def fill(file, metadata, characters, state):
    """Fills an open HDF5 file as `model.save` does, without Keras."""
    rng = np.random.default_rng(0)
    layer = {"class_name": "LSTM", "config": {"units": 4}}
    file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": [layer]})
    text = json.dumps({"format": model.FORMAT, **metadata}, ensure_ascii=False)
    file.attrs[model.METADATA] = np.bytes_(text.encode())
    shapes = model.weight_shapes(characters, metadata["units"], metadata["layers"])
    file.create_group("model_weights").attrs["layer_names"] = list(shapes)
    for name, weights in shapes.items():
        group = file["model_weights"].create_group(name)
        group.attrs["weight_names"] = list(weights)
        for weight, shape in weights.items():
            group[weight] = rng.standard_normal(shape).astype(np.float32)
            if state:
                number = len(file.get(model.TRAINING_STATE, ()))
                file[f"{model.TRAINING_STATE}/{number}"] = group[weight][()]
    if state:
        file[f"{model.TRAINING_STATE}/{number + 1}"] = np.int64(7)


def command(folder, path):
    """The `train.py` command that would continue a file, as a list of str."""
    flags = [f"--{name}={value}" for name, value in SETTINGS.items() if name != "sentinel"]
    data = f"--sequence_path={folder / 'lines.txt'}"
    return ["train.py", data, "--epochs=1", f"--save_path={path}", *flags]


# Changes to bytes


def checksum(data):
    """Jenkins's lookup3 (2006) of bytes, an int: HDF5's checksum of its own structures."""

    def rotate(x, k):
        return (x << k | x >> (32 - k)) & 0xFFFFFFFF

    words = [*struct.unpack(f"<{-(-len(data) // 4)}I", data + b"\0" * (-len(data) % 4))]
    words += [0] * (-len(words) % 3)
    a = b = c = (0xDEADBEEF + len(data)) & 0xFFFFFFFF
    for index in range(0, max(len(words) - 3, 0), 3):
        a, b, c = ((x + y) & 0xFFFFFFFF for x, y in zip((a, b, c), words[index : index + 3]))
        for shift in (4, 6, 8, 16, 19, 4):
            a = ((a - c) & 0xFFFFFFFF) ^ rotate(c, shift)
            c = (c + b) & 0xFFFFFFFF
            a, b, c = b, c, a
    if not data:
        return c
    a, b, c = ((x + y) & 0xFFFFFFFF for x, y in zip((a, b, c), words[-3:]))
    for shift in (14, 11, 25, 16, 4, 14, 24):
        c = ((c ^ b) - rotate(b, shift)) & 0xFFFFFFFF
        a, b, c = b, c, a
    return b  # which was c before the last turn


def find_checksums(content):
    """Finds what HDF5 guards by checksums.

    Returns:
        List of tuples `(start, end)`: the checksum of the bytes between
        stands in the four bytes from `end` on.
    """
    found = []
    signatures = rb"OHDR|OCHK|FRHP|FHDB|FHIB|BTHD|BTLF|BTIN|FSHD|FSSE|SMTB|SMLI|\x89HDF\r\n\x1a\n"
    for match in re.finditer(signatures, content):
        start = match.start()
        for end in range(start + 8, min(start + 1500, len(content) - 4)):
            if struct.unpack_from("<I", content, end)[0] == checksum(content[start:end]):
                found.append((start, end))
                break
    return found


def find_structures(content):
    """Finds what is not the numbers of an array, among which a change would mean little.

    Returns:
        List of tuples `(start, end)`: places in the file.
    """
    taken = []
    with h5py.File(io.BytesIO(content)) as file:
        for name in names_of(file):
            start = file[name].id.get_offset()
            if start is not None:
                taken.append((start, start + file[name].nbytes))
    ends = [0, *(end for _, end in sorted(taken))]
    starts = [*(start for start, _ in sorted(taken)), len(content)]
    return [(end, start) for end, start in zip(ends, starts) if end < start]


def change_bytes(content, rng, checksums, spans):
    """Returns bytes with some of them changed, and with good checksums more often than not."""
    content = bytearray(content)
    mend = rng.random() < 0.7
    for _ in range(1 + rng.geometric(0.4)):
        if not content:
            break
        size = len(content)
        if spans and rng.random() < 0.8:
            start, end = spans[rng.integers(len(spans))]
            end = min(end, size)
            place = int(rng.integers(start, max(end, start + 1))) % size
        else:
            place = int(rng.integers(size) ** rng.choice([1.0, 0.7]))
        length = int(rng.choice([1, 2, 4, 8, 16, 64]))
        kind = rng.integers(12)
        if kind <= 3:
            content[place] ^= 1 << int(rng.integers(8))
        elif kind == 4:
            content[place] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFE, 0xFF, rng.integers(256)]))
        elif kind <= 7:
            number = int(rng.choice([*NUMBERS, size, size - 1, size + 1, place]))
            width = int(rng.choice([1, 2, 4, 8]))
            data = (number % 256**width).to_bytes(width, "little")
            content[place : place + width] = data[: size - place]
        elif kind == 8:
            source = int(rng.integers(size))
            content[place : place + length] = content[source : source + length]
        elif kind == 9:
            content[place : place + length] = rng.bytes(min(length, size - place))
        elif kind == 10 and rng.random() < 0.3:
            del content[place : place + length]
            mend = False
        elif kind == 11 and rng.random() < 0.3:
            content = content[:place] if rng.random() < 0.7 else content + bytes(length * 1000)
    if mend:
        for start, end in checksums:
            if end + 4 <= len(content):
                content[end : end + 4] = struct.pack("<I", checksum(bytes(content[start:end])))
    return bytes(content)


# Changes to objects


class Payload:
    """What would leave a trace if anybody unpickled it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def change_objects(content, rng, canaries):
    """Returns the bytes of a file in which h5py has changed some objects.

    Args:
        content: bytes, which h5py can open.
        rng: `numpy.random.Generator`.
        canaries: `pathlib.Path`, a folder that nobody must look into.
    """
    memory = io.BytesIO(content)
    libver = str(rng.choice(["earliest", "latest"]))
    with h5py.File(memory, "r+", libver=libver) as file:
        for _ in range(1 + rng.geometric(0.6)):
            change = pick(rng, CHANGES)
            with contextlib.suppress(OSError, RuntimeError, TypeError, ValueError, LookupError):
                change(file, rng, canaries)
    return memory.getvalue()


def change_both(content, rng, canaries):
    """Does what `change_objects` does, and now and then what `change_bytes` does."""
    content = change_objects(content, rng, canaries)
    if rng.random() < 0.3:
        content = change_bytes(content, rng, find_checksums(content), find_structures(content))
    return content


def call_apart(function, *arguments):
    """Returns the bytes that a function gives, or none if it fails or crashes, as h5py may."""
    with tempfile.TemporaryFile() as file:
        child = os.fork()
        if not child:
            try:
                signal.alarm(SECONDS)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where the C library tells of a crash
                file.write(function(*arguments))
                file.flush()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        file.seek(0)
        return file.read()


def names_of(file, kind=h5py.Dataset):
    """The names of all objects of a kind in a file."""
    found = []
    file.visititems(lambda name, item: found.append(name) if isinstance(item, kind) else None)
    return found


def pick(rng, choices):
    """Any one of a sequence, of whatever types."""
    return choices[int(rng.integers(len(choices)))]


def pick_array(file, rng):
    """A dataset of the file, its name and value, after it was deleted."""
    name = pick(rng, names_of(file))
    value = file[name][()]
    del file[name]
    return name, value


def replace_array(file, rng, canaries):
    """Another shape, type or layout for an array."""
    name, value = pick_array(file, rng)
    value = np.atleast_1d(value)
    canary = str(canaries / "canary.h5")

    def virtual():
        layout = h5py.VirtualLayout(value.shape, value.dtype)
        layout[...] = h5py.VirtualSource(pick(rng, [canary, "."]), "x", value.shape)
        file.create_virtual_dataset(name, layout)

    def claim(**options):
        shape = pick(rng, [(2**40,), (2**62,), (2**31, 2**31), (0,), (0, 2**60), (2**26,)])
        file.create_dataset(name, shape, pick(rng, ["f4", "f8", "i1"]), **options)

    def external():
        source = pick(rng, [canary, "/dev/zero", "."])
        file.create_dataset(
            name, value.shape, value.dtype, external=[(source, 0, h5py.h5f.UNLIMITED)]
        )

    def compact():
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple(value.shape)
        h5py.h5d.create(
            file.id, name.encode(), h5py.h5t.py_create(value.dtype), space, properties
        ).write(h5py.h5s.ALL, h5py.h5s.ALL, value)

    def committed():
        file["a type"] = value.dtype
        file.create_dataset(name, value.shape, file["a type"], data=value)

    pick(
        rng,
        [
            virtual,
            external,
            compact,
            committed,
            claim,
            lambda: claim(chunks=True),
            lambda: claim(chunks=True, compression="gzip"),
            lambda: file.create_dataset(name, data=value, compression="gzip", shuffle=True),
            lambda: file.create_dataset(name, data=value, chunks=True, fletcher32=True),
            lambda: file.create_dataset(name, data=value, chunks=True, maxshape=None),
            lambda: file.create_dataset(name, data=value, chunks=True, scaleoffset=2),
            lambda: file.create_dataset(name, data=value, compression="lzf"),
            lambda: file.create_dataset(name, data=value.T),
            lambda: file.create_dataset(name, data=value.ravel()),
            lambda: file.create_dataset(name, data=value[:-1]),
            lambda: file.create_dataset(name, data=value[None]),
            lambda: file.create_dataset(name, data=value.astype(pick(rng, [">f4", "f8", "f2"]))),
            lambda: file.create_dataset(name, data=value.astype(pick(rng, ["i4", "c8", "?"]))),
            lambda: file.create_dataset(name, data=value.astype("S8")),
            lambda: file.create_dataset(name, data=[("a", 1)], dtype=[("x", "S1"), ("y", "i8")]),
            lambda: file.create_dataset(name, data="text"),
            lambda: file.create_dataset(name, data=h5py.Empty("f4")),
            lambda: file.create_dataset(name, data=np.array(file.ref, h5py.ref_dtype)),
            lambda: file.create_dataset(name, (2,), h5py.vlen_dtype(np.float32)),
            lambda: file.create_dataset(name, value.shape, h5py.enum_dtype({"a": 1}, "i4")),
            lambda: file.create_dataset(name, value.shape, np.dtype("V4")),
            lambda: file.create_dataset(name, (3,), np.dtype(("f4", (2,)))),
            lambda: file.create_dataset(name, value.shape, value.dtype, fillvalue=np.nan),
            lambda: file.create_group(name),
        ],
    )()


def replace_numbers(file, rng, canaries):
    """Numbers that are none, or hardly bearable."""
    array = file[pick(rng, names_of(file))]
    value = np.atleast_1d(array[()])
    number = pick(rng, [np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e30, 1e20, 1e-45, -0.0, 0.0])
    if rng.random() < 0.5:
        value[...] = number
    else:
        value.ravel()[rng.integers(value.size)] = number
    array[...] = value.reshape(array.shape)


def replace_link(file, rng, canaries):
    """A link that leads elsewhere."""
    every = names_of(file, (h5py.Dataset, h5py.Group))
    name, other = pick(rng, every), pick(rng, [*every, "/"])
    canary = str(canaries / "canary.h5")
    target = pick(
        rng,
        [
            file[other],
            h5py.SoftLink("/" + other),
            h5py.SoftLink("/" + name),
            h5py.SoftLink("nowhere"),
            h5py.ExternalLink(canary, "/" + name),
            h5py.ExternalLink("/dev/zero", "/"),
            h5py.ExternalLink(".", "/"),
        ],
    )
    del file[name]
    file[name] = target


def move(file, rng, canaries):
    """Groups and arrays that change places, go, or come twice."""
    every = names_of(file, (h5py.Dataset, h5py.Group))
    one, two = pick(rng, every), pick(rng, every)
    kind = rng.integers(3)
    if kind == 0:
        file.move(one, "aside")
        file.move(two, one)
        file.move("aside", two)
    elif kind == 1:
        del file[one]
    else:
        file.copy(one, file.require_group(pick(rng, names_of(file, h5py.Group))), "again")


def change_attribute(file, rng, canaries):
    """Attributes of any type, on any object."""
    place = file[pick(rng, ["/", *names_of(file, (h5py.Dataset, h5py.Group))])]
    names = [*place.attrs, model.METADATA, "another"]
    name = pick(rng, names)
    text = file.attrs.get(model.METADATA)
    value = pick(
        rng,
        [
            3,
            np.nan,
            "a text of variable size",
            np.bytes_(b""),
            np.bytes_(b"\xff\0\xff"),
            np.bytes_(b"[" * 60_000),
            np.bytes_(b'{"a":' * 20_000),
            np.bytes_(b"9" * 60_000),
            h5py.Empty("S1"),
            h5py.Empty("f4"),
            np.array([b"a", b"b"]),
            np.zeros((100, 100)),
            np.array([], "S3"),
            file.ref,
            np.array([(1, 2.0)], [("x", "i4"), ("y", "f8")]),
            np.array(["a", "bc"], h5py.string_dtype()),
            np.bytes_(pickle.dumps(Payload(str(canaries / "owned")))),
            text,
        ],
    )
    if value is None or rng.random() < 0.1:
        place.attrs.pop(name)
    else:
        place.attrs[name] = value


def change_metadata(file, rng, canaries):
    """Another value for something in the metadata."""
    metadata = json.loads(file.attrs[model.METADATA])
    place = metadata
    key = pick(rng, ["alphabet", "max_len", "units", "layers", *metadata])
    if isinstance(metadata.get(key), dict) and rng.random() < 0.8:
        place = metadata[key]
        key = pick(rng, list(place))
    deep = []
    for _ in range(500):
        deep = [deep]
    place[key] = pick(
        rng,
        [
            None,
            True,
            -1,
            0,
            1,
            2,
            5,
            1.0,
            1e300,
            math.nan,
            -math.inf,
            int(rng.integers(2**20 + 2)),
            2**20,
            2**31,
            2**64,
            10**4000,
            "",
            "\n",
            "\na",
            "\nabc",
            "cab\n",
            "\n\x1b[2J\u202e\0",
            "\nab\ud800",
            "\U0010ffffabc",
            "\naab",
            "\n" + "".join(map(chr, range(256, 60_000))),
            "x" * 100_000,
            [],
            {},
            deep,
            [0.5] * 1000,
            {"loss": [1.0], "val_loss": [math.nan]},
            {"loss": [], "val_loss": []},
            {"loss": [1.0] * 3, "val_loss": []},
        ],
    )
    if rng.random() < 0.1:
        place.pop(key)
    write_text(file, json.dumps(metadata))


def change_text(file, rng, canaries):
    """Some bytes of the metadata."""
    text = bytearray(file.attrs[model.METADATA])
    for _ in range(rng.geometric(0.3)):
        place = int(rng.integers(len(text)))
        text[place] = pick(rng, [*b'0123456789"\\{}[],:.-eN \n\0\xff\xc3', text[place] ^ 1])
    write_text(file, bytes(text))


def write_text(file, text):
    file.attrs[model.METADATA] = np.bytes_(text if isinstance(text, bytes) else text.encode())


def make_endless(file, rng, canaries):
    """Sequences that never end, and may become long."""
    metadata = json.loads(file.attrs[model.METADATA])
    metadata["max_len"] = int(2 ** rng.uniform(0, math.log2(model.LIMITS["max_len"])))
    write_text(file, json.dumps(metadata))
    file["model_weights/next_character/bias"][0] = -1000


def change_configuration(file, rng, canaries):
    """Code where Keras would run it."""
    payload = pickle.dumps(Payload(str(canaries / "owned")))
    function = {"class_name": "function", "config": payload.hex(), "module": "builtins"}
    config = pick(
        rng,
        [
            {"class_name": "Lambda", "config": {"function": [payload.hex(), None, None]}},
            {"class_name": "Lambda", "config": {"function": function}, "module": "keras.layers"},
            {"class_name": "TFSMLayer", "config": {"filepath": str(canaries)}},
            {"class_name": "open", "module": "builtins", "config": [str(canaries / "owned"), "w"]},
        ],
    )
    file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": [config]})


def nest(file, rng, canaries):
    """Many objects, one in another or beside another, and rings of them."""
    group = file[pick(rng, ["/", *names_of(file, h5py.Group)])]
    kind = rng.integers(4)
    if kind == 0:
        for _ in range(rng.integers(2000)):
            group = group.create_group("g")
    elif kind == 1:
        for index in range(rng.integers(2000)):
            group[f"many {index}"] = np.float32(index)
    elif kind == 2:
        array = file[pick(rng, names_of(file))]
        for index in range(rng.integers(2000)):
            group[str(index)] = array
    else:
        group["ring"] = pick(rng, [file["/"], group])


CHANGES = [
    change
    for change, weight in (
        (replace_array, 4),
        (replace_numbers, 2),
        (replace_link, 2),
        (move, 2),
        (change_attribute, 2),
        (change_metadata, 4),
        (change_text, 2),
        (make_endless, 1),
        (change_configuration, 1),
        (nest, 1),
    )
    for _ in range(weight)
]


# Running


@dataclasses.dataclass
class Result:
    """What came of reading a file in one way.

    Attributes:
        way: str, which of `WAYS`.
        verdict: str, "works", "refused", or what is wrong.
        message: str, what it said on stderr.
        features: frozenset of what it went through, to tell new inputs by.
        seconds, memory: float and int, what it took.
    """

    way: str
    verdict: str
    message: str
    features: frozenset
    seconds: float
    memory: int


class Watch:
    """Tells whether anybody opens what is in a folder, by Linux's inotify."""

    def __init__(self, folder):
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK)
        every = 0x20 | 0x100 | 0x1 | 0x2  # opened, made, read, written
        assert self._libc.inotify_add_watch(self._fd, os.fsencode(folder), every) >= 0

    def happened(self):
        """Whether something happened since the last call, a bool."""
        with contextlib.suppress(BlockingIOError):
            return bool(os.read(self._fd, 2**16))
        return False


# What sample.py shows of work that takes long.
PROGRESS = r"(?m)^(\[[#-]{20}\] )?[\d,]+ (of [\d,]+|so far)[,;] .*\n"
WAYS = {
    "prompt": lambda folder, path: ["sample.py", f"--weights_path={path}", "--prompt="],
    "search": lambda folder, path: [
        "sample.py",
        f"--weights_path={path}",
        "--prompt=",
        "--most_likely=3",
    ],
    "source": lambda folder, path: [
        "train.py",
        f"--init_from={path}",
        f"--save_path={folder / 'new.h5'}",
        "--sequence_path=no such file",
    ],
    "continue": command,
}


def run(arguments, follow):
    """Runs a script in a process of its own.

    Args:
        arguments: list of str, the script and its flags.
        follow: bool, whether to find out which lines of the code it goes through.

    Returns:
        Tuple `(status, stdout, stderr, lines, seconds, memory)`; the status
        is that of `os.waitstatus_to_exitcode`, or None if it did not stop at
        Ctrl-C after it had taken too long, and the memory is the largest
        resident set, in bytes.
    """
    streams = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115
    start = time.monotonic()
    child = os.fork()
    if not child:
        status = 99
        try:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored in a shell's background
            for number in (1, 2):
                os.dup2(streams[number - 1].fileno(), number)
            sys.stdout = os.fdopen(1, "w", encoding="utf-8")
            sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace")
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_CPU, (4 * SECONDS, 4 * SECONDS))
            lines = set()
            if follow:
                files = {model.__file__, train.__file__}

                def trace(frame, event, argument):
                    if frame.f_code.co_filename in files:
                        lines.add(f"{frame.f_code.co_name}:{frame.f_lineno}")
                        return trace
                    return None

                sys.settrace(trace)
            script = {"sample.py": sample, "train.py": train}[arguments[0]]
            try:
                status = script.main(arguments[1:]) or 0
            finally:
                sys.settrace(None)
                streams[2].write("\n".join(lines).encode())
                streams[2].flush()
                sys.stdout.flush()
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            os._exit(status)
    ended = os.pidfd_open(child)  # which becomes readable then
    for number in (signal.SIGINT, signal.SIGKILL):
        if not select.select([ended], [], [], SECONDS)[0]:
            os.kill(child, number)
    os.close(ended)
    _, status, usage = os.wait4(child, 0)
    seconds = time.monotonic() - start
    outputs = []
    for stream in streams:
        stream.seek(0)
        outputs.append(stream.read(2**24).decode("utf-8", "backslashreplace"))
        stream.close()
    out, err, lines = outputs
    status = None if seconds >= 2 * SECONDS else os.waitstatus_to_exitcode(status)
    return status, out, err, lines.split("\n"), seconds, usage.ru_maxrss * 1024


def judge(arguments, status, out, err, seconds, memory, allowed):
    """Returns the verdict, a str, on what a run of a script did."""
    script = arguments[0]
    progress = script == "sample.py" and re.search(PROGRESS, err)
    if status is None or (seconds >= SECONDS and not progress):
        return "WRONG: took too long"
    if status < 0:
        return f"WRONG: died of {signal.Signals(-status).name}"
    if memory > allowed:
        return f"WRONG: took {memory / 2**20:.0f} MB"
    if "Traceback" in err:
        return "WRONG: a traceback"
    if "Too many open files" in err:
        return "WRONG: needed another file"
    if status == 2:
        one_line = err.startswith(f"{script}: error: ") and err.count("\n") == 1
        if not one_line or out or not err[:-1].isprintable():
            return "WRONG: an error that is not one line"
        return "works" if "no such file" in err else "refused"
    err = re.sub(PROGRESS, "", err)
    if status == 130 and seconds >= SECONDS:
        return "WRONG: noise" if err else "works long"
    if status != 0:
        return f"WRONG: status {status}"
    if script == "train.py":
        return "works" if "is finished" in out and not err else "WRONG: unheard of"
    if "--most_likely=3" in arguments:
        for line in out.rstrip("\n").split("\n") if out else ():
            probability = line.partition("\t")[0]
            if not 0 <= float(probability) <= 1:
                return "WRONG: a probability that is none"
        return "works" if out or err else "WRONG: silence"
    if err:
        return "WRONG: noise"
    return "works" if out.count("\n") >= 100 else "WRONG: too few"


def read(content, folder, watch, baseline, follow=True, ways=WAYS):
    """Lets both scripts read a file.

    Args:
        content: bytes.
        folder: `pathlib.Path`, with what `make_bases` wrote.
        watch: `Watch`, on what they must not open.
        baseline: int, the bytes that a script takes with a good file.
        follow: as `run` takes it.
        ways: iterable of str.

    Yields:
        `Result`, one for each way.
    """
    path = folder / "input.h5"
    path.write_bytes(content)
    for way in ways:
        arguments = WAYS[way](folder, path)
        status, out, err, lines, seconds, memory = run(arguments, follow)
        allowed = baseline + len(content) + MEMORY
        verdict = judge(arguments, status, out, err, seconds, memory, allowed)
        if watch.happened():
            verdict = "WRONG: opened another file"
        if path.read_bytes() != content:
            verdict = "WRONG: changed the file"
        err = re.sub(PROGRESS, "", err)
        shape = re.sub(r"\d+|'[^']*'", "#", err.replace(str(path), "PATH"))[:300]
        lines = [line for line in lines if not re.match("show:|clear:|_draw:|describe", line)]
        features = frozenset(lines) | {shape}
        yield Result(way, verdict, err, features, seconds, memory - baseline - len(content))


def prepare(folder):
    """Makes what `read` needs in a folder.

    Returns:
        Tuple `(bases, canaries, watch, baseline)`.
    """
    canaries = folder / "canaries"
    canaries.mkdir()
    bases = make_bases(folder)
    (canaries / "canary.h5").write_bytes(bases[0])
    watch = Watch(canaries)
    path = folder / "input.h5"
    path.write_bytes(bases[0])
    run(WAYS["prompt"](folder, path), False)
    baseline = run(WAYS["prompt"](folder, path), False)[-1]
    return bases, canaries, watch, baseline


@dataclasses.dataclass
class Report:
    """What came of many inputs.

    Attributes:
        outcomes: `Counter` of tuples `(way, verdict)`.
        refusals: `Counter` of what was said on stderr, without its details.
        seconds, memory: the worst of what `Result` says.
        found: int, how many inputs led somewhere new.
    """

    outcomes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    refusals: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    seconds: float = 0.0
    memory: int = 0
    found: int = 0

    def add(self, result):
        """Counts a `Result`."""
        self.outcomes[result.way, result.verdict] += 1
        self.seconds = max(self.seconds, result.seconds)
        self.memory = max(self.memory, result.memory)
        if result.verdict == "refused":
            self.refusals[re.sub(r"\d+|'[^']*'|[^ ]+/[^ ]+", "#", result.message)[:150]] += 1

    @property
    def wrong(self):
        """The verdicts, str, that break the rule."""
        return [verdict for _, verdict in self.outcomes if verdict.startswith("WRONG")]

    def __str__(self):
        crashes = sum(n for text, n in self.refusals.items() if "HDF5 library fails" in text)
        lines = [f"{way:10} {verdict:40} {n:8,}" for (way, verdict), n in self.outcomes.items()]
        lines = [
            *sorted(lines),
            f"{len(self.refusals)} different refusals; {crashes} of a crash or limit of HDF5's",
            f"slowest {self.seconds:.2f} s, largest {self.memory / 2**20:.1f} MB beyond the file's",
            f"{self.found} inputs led somewhere new",
        ]
        return "\n".join(lines)


def fuzz(count, seed, keep=None):
    """Lets both scripts read so many inputs.

    Args:
        count: int.
        seed: int.
        keep: `pathlib.Path` or None, a folder for the inputs that break the rule.

    Returns:
        `Report`.
    """
    rng = np.random.default_rng(seed)
    report = Report()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        bases, canaries, watch, baseline = prepare(folder)
        guards = {content: (find_checksums(content), find_structures(content)) for content in bases}
        pool, seen = list(bases), set()
        for content in bases:
            for result in read(content, folder, watch, baseline):
                assert not result.verdict.startswith("WRONG"), result
                seen |= result.features
        start = time.monotonic()
        for number in range(1, count + 1):
            # Half from the good ones, half from where those led that were new.
            parent = pick(rng, bases if rng.random() < 0.5 else pool)
            content = b""
            if rng.random() < 0.5:
                own = np.random.default_rng((seed, number))
                content = call_apart(change_both, parent, own, canaries)
            content = content or change_bytes(parent, rng, *guards[parent])
            watch.happened()
            results = list(read(content, folder, watch, baseline))
            features = frozenset().union(*(result.features for result in results))
            if not features <= seen:
                seen |= features
                pool.append(content)
                guards[content] = guards[parent]
                report.found += 1
            for result in results:
                report.add(result)
                if result.verdict.startswith("WRONG"):
                    last = result.message.strip().rpartition("\n")[2][:200]
                    print(f"{number} {result.way}: {result.verdict}: {last}", flush=True)
                    if keep:
                        keep.mkdir(exist_ok=True)
                        kind = re.sub(r"\W+", "_", result.verdict[7:])
                        (keep / f"{kind}_{seed}_{number}.h5").write_bytes(content)
            if number % 500 == 0:
                seconds = time.monotonic() - start
                print(f"{number:,} inputs, {seconds:,.0f} s, {len(seen)} features", flush=True)
    return report


def read_files(paths):
    """Does with files what `fuzz` does with its inputs."""
    report = Report()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        _, _, watch, baseline = prepare(folder)
        for path in paths:
            for result in read(path.read_bytes(), folder, watch, baseline):
                report.add(result)
                print(f"{path.name}, {result.way}: {result.verdict}: {result.message.strip()}")
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=pathlib.Path, help="a folder for what breaks the rule")
    parser.add_argument("files", type=pathlib.Path, nargs="*", help="read these instead")
    args = parser.parse_args()
    report = read_files(args.files) if args.files else fuzz(args.count, args.seed, args.keep)
    print(f"HDF5 {h5py.version.hdf5_version}, seed {args.seed}")
    print(report)
    sys.exit(bool(report.wrong))


if __name__ == "__main__":
    main()
