"""Breaks models and lists in thousands of ways to see that nothing else breaks.

Each works or is refused with one line, in a process of its own: in 30 seconds and 200 MiB, without
a crash, a warning or a look at another file. One in 100 is read by the scripts too.
"""

import argparse
import collections
import contextlib
import ctypes
import io
import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import unicodedata
import warnings

import h5py
import hypothesis
import numpy as np
from hypothesis import strategies as st

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import loaders  # noqa: E402
import model  # noqa: E402
import sample  # noqa: E402

SECONDS, PATIENCE, MEMORY = 30, 60, 200  # of the processor, by the clock; MiB
SCRIPTS = ["sample.py --weights_path=input.h5 --prompt= --num_samples=3"]
TRAIN = "train.py --sequence_path={} --save_path={}"
SCRIPTS += [TRAIN.format("good.h5", "input.h5"), TRAIN.format("input.h5", "good.h5")]
SCRIPTS += ["sample.py --score=input.h5"]
CHECKSUM = ctypes.CDLL(h5py.h5.__file__).H5_checksum_metadata  # HDF5's, which h5py is linked to
CHECKSUM.restype = lambda value: (value % 2**32).to_bytes(4, "little")
WORDS = [2**15, 2**16 - 1, 2**16, 2**31, 2**32 - 1, 2**32, 2**48, 2**62, 2**63, 2**64 - 1]
NUMBERS = [np.nan, np.inf, 1e38, -1e30, 9e29, -9e29, -1e3, -9, -5, -1, 1, 5, 9, 1e3, 1e-45, -0.0]
TEXTS = [b"\xff\0", b"[" * 60_000, *(b"[%s1]" % (b'{"":9},' * n) for n in (599_000, 2_000_000))]
ODD = [None, True, -1, 0, 7, 99, 2**16, 2**16 + 1, 10**4000, np.nan, {}, "cba\n\0", "\nab\ud800d"]
STRANGE = '\n\r\0 aB,"\x1b\x85é\u0301\u200b\u2028日\ufeff\U0010ffff'  # characters
TEXT = st.text(STRANGE, max_size=9) | st.permutations(STRANGE).map(lambda all: "".join(all[:5]))
VALUES = st.sampled_from(ODD) | TEXT | st.recursive(st.integers() | st.floats() | TEXT, st.lists)
PARTS = [b"ab", b"b,a", b'"a,b"', b" ", b"", b"a" * 99, "é\u2028".encode(), b"\x1b[2J"] * 9
PARTS += [b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b'"', b'a"', b"\r", b"a" * 2**20]
LINES = st.lists(st.sampled_from(PARTS) | TEXT.map(str.encode), max_size=40)
LISTS = st.builds(bytes.join, st.sampled_from([b"\n", b"\r\n", b"\n\n"]), LINES)


def make_model(libver, alphabet="\nabcd", units=4, layers=2, max_len=6):
    metadata = locals() | {"format": model.FORMAT}
    memory, rng = io.BytesIO(), np.random.default_rng(0)
    with h5py.File(memory, "w", libver=libver) as file:
        file.attrs[model.METADATA] = np.bytes_(json.dumps(metadata))
        for (layer, name), shape in model.weight_shapes(len(alphabet), units, layers).items():
            file[f"model_weights/{layer}/{name}"] = rng.standard_normal(shape).astype("f4")
        for index in range(12):
            file[f"{model.CHECKPOINT}/{index}"] = rng.random((index + 1, 3)).astype("f4")
    return bytes(mend(memory.getvalue(), find_checksums(memory.getvalue())))


def mend(content, checksums):
    content = bytearray(re.sub(rb"(?s)(\x12\0\x08\0{5}\x01\0{3})....", rb"\1\0\0\0\0", content))
    for start, end in checksums:
        if content[start : start + 5] == b"OHDR\2" and content[start + 5] & 0x20:
            content[start + 6 : start + 22] = bytes(16)  # times, as above, to be repeatable
        content[end : end + 4] = CHECKSUM(bytes(content[start:end]), len(content[start:end]), 0)
    return content


def find_checksums(content):
    for start in [match.start() for match in re.finditer(b"\x89HDF|OHDR|OCHK|FRHP|BTHD", content)]:
        for end in range(start + 8, min(start + 3000, len(content) - 3)):
            if content.startswith(CHECKSUM(content[start:end], end - start, 0), end):
                yield start, end
                break


BASES = [make_model("earliest"), make_model("latest"), make_model("latest", max_len=2**16)] * 50
BASES += [make_model("latest", "".join(map(chr, range(0xE000, 0xE000 + 2**18))), 1, 1)]
BASES += [(ROOT / "pre_trained_models" / "user_names_10000.h5").read_bytes()]


@st.composite
def models(draw):
    (memory := io.BytesIO()).write(draw(st.sampled_from(BASES)))
    names = [f"model_weights/{layer}/{name}" for layer, name in model.weight_shapes(2, 1, 2)]
    names += [model.CHECKPOINT + "/7", *names[-1:] * 3]  # the last bias decides on the ends
    objects, words = draw(st.sampled_from([(1, 0), (1, 0), (2, 0), (3, 0), (0, 1), (0, 3), (1, 1)]))
    with h5py.File(memory, "r+") as file:
        for _ in range(objects):
            name = draw(st.sampled_from(names))
            names = [each for each in names if each != name]  # it is not safe to touch again
            with contextlib.suppress(OSError, RuntimeError, TypeError, ValueError, LookupError):
                change(draw, file, name, draw(st.sampled_from(["/", *names])))
    checksums = list(find_checksums(memory.getvalue()))
    content = mend(memory.getvalue(), checksums)
    for _ in range(words):
        end = draw(st.sampled_from([600, 20_000, 20_000, len(content)]))  # numbers come late
        place, width = draw(st.integers(0, end)) % len(content), 2 ** draw(st.integers(0, 3))
        word = draw(st.sampled_from([*WORDS, len(content), place]) | st.integers(0, 255))
        removed = draw(st.sampled_from([width] * 9 + [0, 100, 2**30]))
        content[place : place + removed] = (word % 256**width).to_bytes(width, "little")
    return bytes(mend(content, checksums) if draw(st.booleans()) else content)


def change(draw, file, name, other):
    array, metadata = file[name], json.loads(bytes(file.attrs[model.METADATA]))
    value, kind = np.atleast_1d(array[()]), draw(st.integers(0, 9))
    if kind <= 1:
        layout = h5py.VirtualLayout(value.shape, "f4")
        layout[...] = h5py.VirtualSource("pipe", "x", value.shape)
        data = [value, value.T, value[:-1], value[None], h5py.Empty("f4"), value.astype("i4,f4")]
        data += [value.astype(dtype) for dtype in (">f4", "f8", "f2", "c8", "S8")]
        kinds = [{"data": each} for each in data]
        kinds += [{"shape": each} for each in (value.shape, (2**40,), (2**31, 2**31), (0, 2**60))]
        kinds += [each | {"chunks": True} for each in kinds]
        kinds += [{"data": value, "compression": "gzip"}, {"data": value, "fletcher32": True}]
        kinds += [{"shape": value.shape, "external": [("pipe", 0, h5py.h5f.UNLIMITED)]}, {}] * 5
        del file[name]
        if options := draw(st.sampled_from(kinds)):
            file.create_dataset(name, **options)
        else:
            file.create_virtual_dataset(name, layout)
    elif kind == 2:
        links = [file[other], *map(h5py.SoftLink, (name, other)), h5py.ExternalLink("pipe", "/")]
        del file[draw(st.sampled_from([name, name, "model_weights"]))]
        file[name] = draw(st.sampled_from(links))
    elif kind == 3:
        for index in range(draw(st.sampled_from([1, 10, 300]))):
            file[f"{os.path.dirname(name)}/{12 + index}"] = (array, file["/"])[index % 2]
    elif kind == 4:
        values = ["of variable size", h5py.Empty("S1"), np.zeros(9), np.array([b"a"]), file.ref]
        file.attrs[model.METADATA] = draw(st.sampled_from([*values, *map(np.bytes_, TEXTS)]))
    elif kind <= 6:
        value[: draw(st.sampled_from([1, None]))] = draw(st.sampled_from(NUMBERS))
        array[...] = value
    else:
        key = draw(st.sampled_from(["max_len", "history", "settings", *metadata]))
        metadata[key] = draw(VALUES)
        file.attrs[model.METADATA] = np.bytes_(json.dumps(metadata))


def read_model(path):
    found, refusal = attempt(model.load, path, True)
    yield "load all", refusal
    assert not found or all(np.isfinite(array).all() for array in found[2]), "it is not finite"
    found, refusal = attempt(model.load, path)
    yield "load", refusal
    if found:
        trained = found[0]
        texts, symbols = list(trained.sample(count=5, seed=1)), trained.alphabet.symbols[1:]
        yield "sample", ""
        nats = [nats for _, nats, _ in sample.score(trained, texts)]
        yield "score", ""
        limits = {"top_k": 5, "max_len": min(999, trained.max_len)}  # searches can take hours
        likely = list(sample.most_likely(trained, count=3, warn=str, **limits))
        yield "most_likely", ""
        chances = [1, *(chance for _, chance in likely), 0]
        assert (sorted(chances)[::-1], np.isfinite(nats).all()) == (chances, True), (likely, nats)
        texts += [text.encode().decode() for text, _ in likely]  # no surrogates
        used, known = ({*unicodedata.normalize("NFD", text)} for text in ("".join(texts), symbols))
        assert not used - known | {*map(len, texts)} - {*range(1, trained.max_len + 1)}, texts


def read_list(path):
    for name, loader in loaders.LOADERS.items():
        texts, refusal = attempt(list, loader(path))
        # No text has a NUL character.
        corpus, refusal = attempt(model.build_corpus, texts, "\0") if texts else (None, refusal)
        yield name, refusal
        ids = np.split(corpus.targets, corpus.starts[1:]) if corpus else ()
        for text, each in zip(texts or (), ids):
            assert corpus.alphabet.decode(each[each > 0]) == text[:64] != "", text


def attempt(function, *arguments):
    try:
        return function(*arguments), ""
    except loaders.UserError as error:  # any other error is a bug
        return None, str(error)


def read_alone(read, by_script):
    signal.alarm(PATIENCE)
    warnings.simplefilter("error")
    before, clock, steps, problem = resource.getrusage(0).ru_maxrss, time.process_time(), [], ""
    try:
        for name, refusal in read("input.h5"):
            steps.append((name, refusal, -clock + (clock := time.process_time())))
            assert "\n" not in refusal, refusal
        for script, *flags in map(str.split, SCRIPTS * by_script):
            command = [sys.executable, ROOT / script, *flags]
            done = subprocess.run(command, capture_output=True, encoding="utf-8")
            wanted = {0: rf"({script}: .*\n)*", 2: rf"{script}: error: .*\n"}[done.returncode]
            assert re.fullmatch(wanted, done.stderr), done
    except BaseException as error:
        problem = repr(error)
    size = os.path.getsize("input.h5") / 2**20
    memory = (resource.getrusage(0).ru_maxrss - before) / 2**10 - size
    pathlib.Path("result").write_text(json.dumps((steps, problem, memory)))
    os._exit(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["models", "lists"])
    parser.add_argument("--count", type=int, default=1000, help="inputs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    read, inputs = (read_model, models()) if args.kind == "models" else (read_list, LISTS)
    start, counts, refusals, slowest, largest = time.time(), collections.Counter(), set(), [], []

    def visit(content):
        counts["inputs"] += 1
        pathlib.Path("input.h5").write_bytes(content)
        child = os.fork() or read_alone(read, counts["inputs"] % 100 == 99)
        steps, problem, memory = [], "crashed or hung", 0
        if os.waitpid(child, 0)[1] == 0:
            steps, problem, memory = json.loads(pathlib.Path("result").read_text())
        for step, refusal, seconds in steps:
            counts[f"{step}: {'refused' if refusal else 'worked'}"] += 1
            refusals.update({re.sub(r"\d+|'[^']*'", "#", refusal)} - {""})
            slowest.append((seconds, counts["inputs"], step))
        largest.append((memory, counts["inputs"]))
        if problem or memory > MEMORY or any(seconds > SECONDS for _, _, seconds in steps):
            counts["broke a rule"] += 1
            kept = f"{tempfile.gettempdir()}/fuzz_{args.kind}_{args.seed}_{counts['inputs']}"
            pathlib.Path(kept).write_bytes(content)
            print(f"{kept}: {problem[:500]}; {memory:.0f} MiB, {steps[-1:]}", flush=True)

    options = dict(database=None, deadline=None, suppress_health_check=[*hypothesis.HealthCheck])
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        hypothesis.configuration.set_hypothesis_home_dir(temporary)
        os.mkfifo("pipe")  # nobody writes into it, so that whoever opens it hangs
        pathlib.Path("good.h5").write_text("abc\n")
        list(read("good.h5"))  # what is loaded only once belongs to no input
        for part in range(0, args.count, 500):  # or it would remember more and more
            test = hypothesis.seed(f"{args.seed} {part}")(hypothesis.given(inputs)(visit))
            hypothesis.settings(max_examples=min(500, args.count - part), **options)(test)()
    print(*(f"{name:30} {count:8,}" for name, count in sorted(counts.items())), sep="\n")
    print(f"slowest (s, input): {max(slowest, default=0)}, largest (MiB, input): {max(largest)}")
    print(f"{len(refusals)} kinds of refusal, {time.time() - start:.0f} s, h5py {h5py.__version__}")
    sys.exit(counts["broke a rule"] > 0)


if __name__ == "__main__":
    main()
