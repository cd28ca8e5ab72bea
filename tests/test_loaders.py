import bz2
import gzip
import io
import itertools
import lzma
import os
import re
import sys
import threading
import time
import tracemalloc
from functools import partial

import pytest
import wordfreq

from loaders import (
    LOADERS,
    LONGEST_LINE,
    SequenceLoader,
    UserError,
    UserNameLoader,
    VocabularyLoader,
    find_loader,
    open_text,
)

TOWNS = ["Bad Tanville", "Stöwick", "Aldmere, North", 'Ost"mere', "São X", "東京", "ﬁn"]
# Without the time, which would name each process of the tests another case.
PACKED = {".gz": partial(gzip.compress, mtime=0), ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.fixture
def write(tmp_path):
    def write(content, name="data.txt"):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("ab\r\ncd\ref\n\r\rgh", ["ab", "cd", "ef", "gh"]),
        ("\nab\n\n \t\n\r\nab\n\n", ["ab", "ab"]),
        ("\ufeff a b \n\ufeffc\td\u3000\n\xa0\n\ufeff\n e\ufefff\n", ["a b", "c\td", "ef"]),
        ("ab\x0bcd\u2028ef\x85gh\n\x1a", ["ab\x0bcd\u2028ef\x85gh"]),
        ("名前\nاسم\nnoël\n👩‍🚀\n", ["名前", "اسم", "noël", "👩‍🚀"]),
        ("o\u0308\nö\ne\u0323\u0302\nx\u0302\n", ["ö", "ö", "ệ", "x\u0302"]),
        ("BZh\n%PDF\n7z", ["BZh", "%PDF", "7z"]),
    ],
)
def test_a_text_file_gives_its_lines(write, content, expected):
    assert list(SequenceLoader(write(content))) == expected


@pytest.mark.parametrize("loader", LOADERS.values())
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encoding_line_ends_and_compression_make_no_difference(write, loader, encoding, end):
    lines = ["Größe", "été", "日本", "😀"]
    text = end.join(["Name ", *(f"\xa0 {line}\ufeff " for line in lines)])
    content = (("\ufeff" if encoding == "utf-16-be" else "") + text).encode(encoding)
    expected = lines if loader is UserNameLoader else ["Name", *lines]
    for compress in (bytes, *PACKED.values()):
        assert sorted(loader(write(compress(content)))) == sorted(expected)


def test_a_loader_can_be_iterated_again_and_cut_short(write):
    loader = SequenceLoader(write("\na\nb\nc\n"), max_sequences=2)
    assert list(loader) == list(loader) == ["a", "b"]
    assert [(loader.line, sequence) for sequence in loader] == [(2, "a"), (3, "b")]


@pytest.mark.parametrize("loader", [SequenceLoader, UserNameLoader])
def test_a_large_file_is_streamed(write, loader):
    path = write("name,1\n" * 300_000)
    tracemalloc.start()
    assert sum(1 for _ in loader(path)) >= 299_999
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < path.stat().st_size / 20


@pytest.mark.parametrize("line", ["\n", "BZ\n", "é\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("pack", [bytes, *PACKED.values()])
def test_a_slow_pipe_hides_nothing_and_lines_need_not_wait(monkeypatch, pack, encoding, line):
    def send():
        for number in pack((line + "ab\n").encode(encoding)):
            os.write(writing, bytes([number]))
            time.sleep(0.001)
        if pack is not bytes:
            os.close(writing)

    reading, writing = os.pipe()
    with open(reading) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        threading.Thread(target=send, daemon=True).start()
        with open_text("-") as text:
            assert [text.readline(), text.readline()] == [line, "ab\n"]
        assert not stdin.closed


def test_standard_input_may_be_text_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\né\n"))
    assert list(SequenceLoader("-")) == ["ab", "é"]


@pytest.mark.parametrize("loader", LOADERS.values())
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xe9f\n", "line 1: byte 0xe9 is not UTF-8.*iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"),
        (b"ann\xc3\xa9,1\n" * 70_000 + b"\xed\xa0\x80", "line 70001: byte 0xed is not UTF-8"),
        (b"ab\ncd\na\0b\nef\n", "line 3: a NUL character, so this is not UTF-8 text"),
        (b"ab\n" + b"a" * LONGEST_LINE, "line 2: at least 1,048,576 characters"),
        (b"PK\3\4\x14\0\6\0", r"a zip archive or \.xlsx: .*CSV UTF-8"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", r"an \.xls spreadsheet: .*CSV UTF-8"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file, such as a model"),
        (b"\x28\xb5\x2f\xfd\x04", "Zstandard"),
        (gzip.compress(b"%PDF-1.7\n", mtime=0), "a PDF"),
        ("ab\ncd".encode("utf-16")[:-1], "not UTF-16 from about here on"),
        *((pack(b"abc")[:-9] + b"a" * n, "damaged") for pack in PACKED.values() for n in (0, 99)),
    ],
)
def test_what_is_no_text_is_refused(write, loader, content, message):
    with pytest.raises(UserError, match=r"data\.txt.*" + message):
        list(loader(write(content)))


@pytest.mark.parametrize("loader", LOADERS.values())
def test_a_file_that_is_missing_or_without_a_sequence_is_an_error(write, tmp_path, loader):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(OSError, match=r"No such file|Is a directory"):
            list(loader(path))
    headers = ["name,packages\n", "name,packages\n,3\n\n"] if loader is UserNameLoader else []
    for content in ["", "\n\n", "\ufeff\r\n \n", *headers]:
        with pytest.raises(UserError, match=r"data\.txt (holds|has) no"):
            list(loader(write(content)))


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        ("Ann,F,3\nBo,M,4\n\n \nCid,M,5\nDan\n", "every line has 2 commas.*table.*UserNameLoader"),
        ("a\t1\r\nb\t2\r\n\x1a", "every line has 1 tab: "),
        ("7,4|x|y\n8,5|z|z\n", "every line has 2 bars: "),
        ('["a", "b"]', "JSON.*one per line"),
        ('[\n  {\n    "name": "a"\n  }\n]\n', "JSON"),
        ('\n{"name": "a", "n": 1}\n{"name": "b", "n": 2}\n', "JSON"),
        ("a,b\nc,d\ne\nf,g\n", None),
        ("a,b\n", None),
        ("[alpha]\n[beta]\n[[gamma]]\n{d}\n", None),
        ("[\n\\\n]\n{\n}\n", None),
    ],
)
def test_a_table_or_json_read_as_lines_gets_advice(write, content, advice):
    loader = SequenceLoader(write(content), max_sequences=3)
    assert loader.advice is None
    for _ in range(2):
        assert list(loader)
        assert re.search(advice, loader.advice) if advice else loader.advice is None


def test_a_csv_gives_its_first_column_without_the_header(write):
    content = 'name,n\r\nann,1\n"Doe, Jane",2\n"two\nlines",3\n\n"say ""hi""",4\n ,5\nlast\n\x1a'
    expected = ["ann", "Doe, Jane", "two\nlines", 'say "hi"', "last"]
    for before in ("", "\ufeff", "\n"):
        assert list(UserNameLoader(write(before + content))) == expected
    loader = UserNameLoader(write(content), max_sequences=3)
    assert [(loader.line, name) for name in loader] == list(zip((2, 3, 5), expected))


@pytest.mark.parametrize("delimiter", list(",;\t|"))
def test_a_csv_of_any_spreadsheet_gives_its_first_column(write, delimiter):
    header = ["Ort", "Einwohner, in Tsd.", "Land; Staat"]
    rows = [header] + [[town, "7,4" if delimiter != "," else "7", "D E"] for town in TOWNS]
    quoted = ["".join(f'{delimiter}"{x.replace(chr(34), chr(34) * 2)}"' for x in r) for r in rows]
    for end, say in itertools.product(["\n", "\r\n", "\r"], [False, True]):
        lines = [f"sep={delimiter}"] * say + [line[1:] for line in quoted]
        path = write(end.join(lines).encode("utf-16"), "A.TSV")
        loader = find_loader(path)(path)
        assert list(loader) == TOWNS
        assert (loader.header, loader.uneven) == (header, 0)


def test_commas_without_quotes_are_counted(write):
    loader = UserNameLoader(write("name,n\nBad, Tanville,3\nStowick,4\nOst\n"))
    assert list(loader) == ["Bad", "Stowick", "Ost"]
    assert loader.uneven == 2
    assert list(UserNameLoader(write("Last, First\tn\nDoe, Jane\t3\n"))) == ["Doe, Jane"]


@pytest.mark.parametrize("row", ['"bob\n', '"bob' + "\nx" * 100_000, '"bob"by\n'])
def test_a_malformed_csv_is_named_by_line(write, row):
    with pytest.raises(UserError, match="line 3: not CSV"):
        list(UserNameLoader(write("name\nann\n" + row)))


def test_the_vocabulary_is_the_most_used_words_best_first(write):
    words = [*sorted(wordfreq.top_n_list("en", 3000)), "qqxzzy", "the", "zebra"]
    top = list(VocabularyLoader(write("\n".join(words)), max_sequences=300))
    frequencies = [wordfreq.word_frequency(word, "en") for word in set(words)]
    assert len(set(top)) == 300
    assert [wordfreq.word_frequency(x, "en") for x in top] == sorted(frequencies)[:-301:-1]
    assert list(VocabularyLoader(write("\n".join(words))))[-1] == "qqxzzy"


def test_the_vocabulary_has_one_spelling_of_a_word(write):
    words = ["A", "English", "In", "IN", "a", "in", "the", "The"]
    assert list(VocabularyLoader(write("\n".join(words)))) == ["the", "a", "in", "English"]


def test_a_path_finds_its_loader_unless_one_is_named():
    for ending, packed in itertools.product([".csv", ".TSV", ".tab"], ["", *PACKED]):
        assert find_loader(f"names{ending}{packed}") is UserNameLoader
    assert find_loader("names.txt.gz") is find_loader("csv") is find_loader("-") is SequenceLoader
    assert find_loader("names.csv", "VocabularyLoader") is VocabularyLoader


def test_another_loader_needs_only_to_be_listed(write, monkeypatch):
    class CountedLoader(SequenceLoader):
        summary = "what uniq -c prints"
        suffixes = (".counts", ".counted")

        def records(self):
            for line in self.lines():
                count, _, text = line.strip().partition(" ")
                if not count.isdecimal():
                    raise self.error("no count")
                yield text

    monkeypatch.setitem(LOADERS, "CountedLoader", CountedLoader)
    path = write(gzip.compress("\ufeff   2  nöe\n  12\n   1 al\n".encode()), "N.COUNTED.gz")
    loader = find_loader(path)(path)
    assert list(loader) == list(loader) == ["nöe", "al"]
    with pytest.raises(UserError, match=r"n\.txt, line 2: no count"):
        list(CountedLoader(write("3 a\nb\n", "n.txt")))
