import tracemalloc

import pytest
import wordfreq

from loaders import LOADERS, SequenceLoader, UserNameLoader, VocabularyLoader


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
        ("ab\ncd\n", ["ab", "cd"]),
        ("ab\ncd", ["ab", "cd"]),
        ("ab\r\ncd\r\n", ["ab", "cd"]),
        ("\ufeffab\ncd\n", ["ab", "cd"]),
        ("\nab\n\n \t\n\r\ncd\n\n", ["ab", "cd"]),
        (" ab \ncd\tef\n", [" ab ", "cd\tef"]),
        ("ab\x0bcd\u2028ef\x85gh\n", ["ab\x0bcd\u2028ef\x85gh"]),
        ("名前\nاسم\nnoël\n👩‍🚀\n", ["名前", "اسم", "noël", "👩‍🚀"]),
        ("ab\nab\n", ["ab", "ab"]),
    ],
)
def test_a_text_file_gives_its_lines(write, content, expected):
    assert list(SequenceLoader(write(content))) == expected


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
def test_bytes_that_are_not_utf8_are_named_by_line(write, loader):
    with pytest.raises(ValueError, match=r"data\.txt, line 3: not UTF-8.*0xe9"):
        list(loader(write(b"ab\ncd\n\xe9f\n")))


@pytest.mark.parametrize("loader", [SequenceLoader, UserNameLoader])
@pytest.mark.parametrize("line", [1, 2, 3000, 70_001, 99_999])
def test_bytes_that_are_not_utf8_are_named_by_line_in_a_large_file(write, loader, line):
    lines = [b"ann\xc3\xa9,%d" % number for number in range(100_000)]
    lines[line - 1] = b"caf\xe9"
    with pytest.raises(ValueError, match=rf"line {line}: not UTF-8"):
        list(loader(write(b"\n".join(lines))))


def test_the_line_of_a_sequence_is_where_it_ends(write):
    loader = UserNameLoader(write('name\n\nann\n"two\nlines"\n,\nlast\n'))
    assert [(loader.line, name) for name in loader] == [(3, "ann"), (5, "two\nlines"), (7, "last")]


@pytest.mark.parametrize("loader", LOADERS.values())
def test_a_path_without_a_readable_file_is_an_os_error(tmp_path, loader):
    with pytest.raises(FileNotFoundError):
        list(loader(tmp_path / "missing"))
    with pytest.raises(IsADirectoryError):
        list(loader(tmp_path))


@pytest.mark.parametrize("loader", LOADERS.values())
@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff\r\n \n"])
def test_a_file_without_a_sequence_is_an_error(write, loader, content):
    with pytest.raises(ValueError, match=r"data\.txt holds no"):
        list(loader(write(content)))


def test_a_csv_gives_its_first_column_without_the_header(write):
    content = (
        'name,packages\r\nann,1\r\n"Doe, Jane",2\r\n"two\nlines",3\r\n\r\n'
        '"say ""hi""",4\r\n,5\r\nlast\r\n'
    )
    expected = ["ann", "Doe, Jane", "two\nlines", 'say "hi"', "last"]
    assert list(UserNameLoader(write(content))) == expected
    assert list(UserNameLoader(write("\ufeff" + content), max_sequences=2)) == expected[:2]
    assert list(UserNameLoader(write("\n" + content))) == expected


def test_a_csv_needs_a_data_row(write):
    for content in ("name,packages\n", "name,packages\n,3\n\n"):
        with pytest.raises(ValueError, match="holds no data row"):
            list(UserNameLoader(write(content)))


@pytest.mark.parametrize("content", ["name\nann\nbob\rcarl\n", 'name\nann\n"bob\n'])
def test_a_malformed_csv_is_named_by_line(write, content):
    with pytest.raises(ValueError, match="line 3: not CSV"):
        list(UserNameLoader(write(content)))


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
