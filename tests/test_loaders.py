import gzip
import itertools
import tracemalloc

import pytest
import wordfreq

from loaders import (
    LOADERS,
    LONGEST_LINE,
    SequenceLoader,
    UserNameLoader,
    VocabularyLoader,
    find_loader,
)

TOWNS = ["Bad Tanville", "Stöwick", "Aldmere, North", 'Ost"mere', "São X", "東京", "ﬁn"]


@pytest.fixture
def write(tmp_path):
    def write(content, name="data.txt"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("ab\ncd", ["ab", "cd"]),
        ("ab\r\ncd\r\n", ["ab", "cd"]),
        ("ab\rcd\r\ref\nghi", ["ab", "cd", "ef", "ghi"]),
        ("\ufeffab\ncd\n", ["ab", "cd"]),
        ("\nab\n\n \t\n\r\ncd\n\n", ["ab", "cd"]),
        (" ab \ncd\tef\n", [" ab ", "cd\tef"]),
        ("ab\x0bcd\u2028ef\x85gh\n", ["ab\x0bcd\u2028ef\x85gh"]),
        ("名前\nاسم\nnoël\n👩‍🚀\n", ["名前", "اسم", "noël", "👩‍🚀"]),
        ("ab\nab\n", ["ab", "ab"]),
        ("o\u0308\nö\ne\u0323\u0302\n", ["ö", "ö", "ệ"]),
        ("x\u0302\n\u1112\u1161\u11ab\n", ["x\u0302", "한"]),
    ],
)
def test_a_text_file_gives_its_lines(write, content, expected):
    assert list(SequenceLoader(write(content))) == expected


@pytest.mark.parametrize("loader", [SequenceLoader, VocabularyLoader, UserNameLoader])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_the_encoding_the_line_ends_and_gzip_make_no_difference(write, loader, encoding, end):
    lines = ["Größe", "été", "日本", "😀"]
    text = end.join(["Name", *lines])
    content = (("\ufeff" if encoding == "utf-16-be" else "") + text).encode(encoding)
    expected = lines if loader is UserNameLoader else ["Name", *lines]
    for name, written in ("data.txt", content), ("data.txt.gz", gzip.compress(content)):
        assert sorted(loader(write(written, name))) == sorted(expected)


def test_a_loader_can_be_iterated_again_and_cut_short(write):
    loader = SequenceLoader(write("\na\nb\nc\n"), max_sequences=2)
    assert list(loader) == list(loader) == ["a", "b"]
    assert [(loader.line, sequence) for sequence in loader] == [(2, "a"), (3, "b")]


@pytest.mark.parametrize("loader", [SequenceLoader, UserNameLoader])
def test_a_large_file_is_streamed(write, loader):
    path = write("name,1\n" * 300_000)
    tracemalloc.start()
    count = sum(1 for _ in loader(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count >= 299_999
    assert peak < path.stat().st_size / 10


@pytest.mark.parametrize("loader", LOADERS.values())
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"\xe9f", "byte 0xe9 is not UTF-8 text.*iconv -f LATIN1 -t UTF-8 .*CSV UTF-8"),
        (b"\xed\xa0\x80", "byte 0xed is not"),
        (b"a\0b", "a NUL character, so this is not UTF-8 text"),
        (b"a" * LONGEST_LINE, "at least 1,048,576 characters long"),
    ],
)
def test_what_is_no_text_is_named_by_line(write, loader, line, message):
    for before in (b"", b"ab\ncd\n", b"ann\xc3\xa9,1\n" * 70_000):
        number = 1 + before.count(b"\n")
        with pytest.raises(ValueError, match=rf"data\.txt, line {number}: .*{message}"):
            list(loader(write(before + line + b"\nlast\n")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04\x14\0\x06\0", "is a model or a spreadsheet, not text"),
        (b"\x89HDF\r\n\x1a\n", "is a model or a spreadsheet, not text"),
        ("ab\ncd".encode("utf-16")[:-1], "is not UTF-16 text: .* byte 0x64 "),
        (gzip.compress(b"abc\n" * 9, mtime=0)[:-9], "is damaged gzip: "),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + b"a" * 99, "is damaged gzip: "),
    ],
)
def test_what_was_never_text_is_refused(write, content, message):
    with pytest.raises(ValueError, match=message):
        list(SequenceLoader(write(content)))


@pytest.mark.parametrize("loader", LOADERS.values())
def test_a_path_without_a_readable_file_is_an_os_error(tmp_path, loader):
    with pytest.raises(FileNotFoundError):
        list(loader(tmp_path / "missing"))
    with pytest.raises(IsADirectoryError):
        list(loader(tmp_path))


@pytest.mark.parametrize("loader", LOADERS.values())
def test_a_file_without_a_sequence_is_an_error(write, loader):
    blank = ["", "\n\n", "\ufeff\r\n \n"]
    headers = ["name,packages\n", "name,packages\n,3\n\n"] if loader is UserNameLoader else []
    for content in blank + headers:
        with pytest.raises(ValueError, match=r"data\.txt (holds|has) no"):
            list(loader(write(content)))


def test_a_csv_gives_its_first_column_without_the_header(write):
    content = (
        'name,packages\r\nann,1\r\n"Doe, Jane",2\r\n"two\nlines",3\r\n\r\n'
        '"say ""hi""",4\r\n,5\r\nlast\r\n'
    )
    expected = ["ann", "Doe, Jane", "two\nlines", 'say "hi"', "last"]
    for before in ("", "\ufeff", "\n"):
        assert list(UserNameLoader(write(before + content))) == expected
    loader = UserNameLoader(write(content), max_sequences=3)
    assert [(loader.line, name) for name in loader] == list(zip((2, 3, 5), expected))


@pytest.mark.parametrize("delimiter", list(",;\t"))
def test_a_csv_of_any_spreadsheet_gives_its_first_column(write, delimiter):
    header = ["Ort", "Einwohner, in Tsd.", "Land; Staat"]
    rows = [header] + [[town, "7,4" if delimiter != "," else "7", "D E"] for town in TOWNS]
    quoted = ["".join(f'{delimiter}"{x.replace(chr(34), chr(34) * 2)}"' for x in r) for r in rows]
    for end, encoding, say, name in itertools.product(
        ["\n", "\r\n", "\r"], ["utf-8-sig", "utf-16"], [False, True], ["a.csv", "A.CSV"]
    ):
        lines = [f"sep={delimiter}"] * say + [line[1:] for line in quoted]
        path = write(end.join(lines).encode(encoding), name)
        loader = find_loader(path)(path)
        assert list(loader) == TOWNS
        assert loader.header == header
        assert loader.uneven == 0


def test_commas_without_quotes_are_counted(write):
    loader = UserNameLoader(write("name,n\nBad, Tanville,3\nStowick,4\nOst\n"))
    assert list(loader) == ["Bad", "Stowick", "Ost"]
    assert loader.uneven == 2


@pytest.mark.parametrize("row", ['"bob\n', '"bob' + "\nx" * 100_000, '"bob"by\n'])
def test_a_malformed_csv_is_named_by_line(write, row):
    with pytest.raises(ValueError, match="line 3: not CSV"):
        list(UserNameLoader(write("name\nann\n" + row)))


def test_the_vocabulary_is_the_most_used_words_best_first(write):
    words = [*sorted(wordfreq.top_n_list("en", 3000)), "qqxzzy", "the", "zebra"]
    top = list(VocabularyLoader(write("\n".join(words)), max_sequences=300))
    frequencies = [wordfreq.word_frequency(word, "en") for word in top]
    assert len(set(top)) == len(top) == 300
    assert frequencies == sorted(frequencies, reverse=True)
    left_out = set(words) - set(top)
    assert max(wordfreq.word_frequency(word, "en") for word in left_out) <= frequencies[-1]
    assert list(VocabularyLoader(write("\n".join(words))))[-1] == "qqxzzy"


def test_the_vocabulary_has_one_spelling_of_a_word(write):
    words = ["A", "English", "In", "IN", "a", "in", "the", "The"]
    assert list(VocabularyLoader(write("\n".join(words)))) == ["the", "a", "in", "English"]


def test_a_path_finds_its_loader_unless_one_is_named():
    for name in ("names.csv", "NAMES.CSV", "names.csv.gz"):
        assert find_loader(name) is UserNameLoader
    assert find_loader("names.txt") is find_loader("csv") is SequenceLoader
    assert find_loader("names.csv", "VocabularyLoader") is VocabularyLoader
