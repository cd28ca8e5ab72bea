"""How a file becomes an iterable of strings, one per sequence.

`SequenceLoader` reads the lines of a text file, `VocabularyLoader` English words
and `UserNameLoader` the first column of a CSV file. `find_loader` picks one.
"""

import csv
import gzip
import io
import itertools
import os
import re
import shlex
import unicodedata
import zlib

LONGEST_LINE = 2**20  # characters; a file with a longer line is not a list of sequences
UNDECODED = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of bytes


class SequenceLoader:
    r"""Iterates over the sequences of a text file, one per line.

    The file is UTF-8, with or without a byte order mark, or UTF-16 with one,
    and may be compressed with gzip. Lines end in `\n`, `\r\n` or `\r`. Blank
    ones are skipped, and characters are composed (Unicode's NFC): an `ö` is
    one character however it was typed. Nothing else is changed. The file is
    streamed, and read again at each iteration.

    Args:
        path: str or path-like.
        max_sequences: int or None, how many to yield at most; the first ones.

    Attributes:
        line: int, the line of the file, from 1, on which the last sequence
            yielded ends.

    Yields:
        str, one sequence.

    Raises:
        OSError: while iterating, if the file can't be opened or read.
        ValueError: while iterating, if the file is not text, has a line of
            `LONGEST_LINE` characters (the message names the line), or holds
            no sequence at all.

    Example:

    >>> list(SequenceLoader("pre_trained_models/english_words_5000.txt", max_sequences=3))
    ['the', 'to', 'and']
    """

    when_empty = "holds no sequences: every line is blank; put one sequence on each line"
    header, uneven = None, 0  # set only by UserNameLoader

    def __init__(self, path, max_sequences=None):
        self.path = path
        self.max_sequences = max_sequences

    def __iter__(self):
        self.line = 0
        sequences = filter(str.strip, self._records())
        sequence = None
        for sequence in itertools.islice(sequences, self.max_sequences):
            yield sequence
        if sequence is None:
            raise ValueError(f"{self.path} {self.when_empty}.")

    def _records(self):
        for line in self._lines():
            yield compose(line.rstrip("\r\n"))

    def _lines(self):
        try:
            with open(self.path, "rb") as file:
                # By content, since downloads and copies may lose the suffix.
                if file.peek(2).startswith(b"\x1f\x8b"):
                    file = gzip.GzipFile(fileobj=file)
                if file.peek(4).startswith((b"\x89HDF", b"PK\3\4")):
                    raise ValueError(
                        f"{self.path} is a model or a spreadsheet, not text; pass a text file "
                        'with one sequence per line, or save the spreadsheet as "CSV UTF-8".'
                    )
                utf_16 = file.peek(2).startswith((b"\xff\xfe", b"\xfe\xff"))
                encoding = "utf-16" if utf_16 else "utf-8-sig"
                text = io.TextIOWrapper(file, encoding, "surrogateescape", newline="")
                while line := text.readline(LONGEST_LINE):
                    self.line += 1
                    if not line.isascii() or "\0" in line or len(line) == LONGEST_LINE:
                        self._check(line)
                    yield line
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not UTF-16 text: {error}.") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{self.path} is damaged gzip: {error}.") from None

    def _check(self, line):
        if "\0" in line:
            raise self._error(
                "a NUL character, so this is not UTF-8 text; UTF-16 needs a byte order mark"
            )
        if undecoded := UNDECODED.search(line):
            raise self._error(
                f"byte {ord(undecoded[0]) & 0xFF:#04x} is not UTF-8 text; convert the file, for "
                f"example with iconv -f LATIN1 -t UTF-8 {shlex.quote(os.fspath(self.path))}, or "
                'save a spreadsheet as "CSV UTF-8"'
            )
        if len(line) == LONGEST_LINE:
            raise self._error(
                f"at least {LONGEST_LINE:,} characters long; pass a file with one sequence per line"
            )

    def _error(self, reason):
        return ValueError(f"{self.path}, line {self.line}: {reason}.")


class VocabularyLoader(SequenceLoader):
    """Iterates over the words of a text file, the most used in English first.

    Words are ranked by `wordfreq`'s estimate of their frequency in English;
    equally frequent ones keep the order of the file. Each word comes only
    once: the estimate ignores case, so of spellings that differ only in case
    one is kept, the lower-case one if there is one ("in" rather than "In";
    "English" if there is no "english"). The words are held in memory, since
    the last one may be the most frequent.

    Args:
        path: str or path-like, a file with one word per line, encoded as for
            `SequenceLoader`.
        max_sequences: int or None, yield only the n most frequent.

    Yields:
        str, one word.

    Raises:
        OSError, ValueError: as `SequenceLoader` does.
    """

    def _records(self):
        import wordfreq

        words = {}
        for word in super()._records():
            key = word.lower()
            if key not in words or word == key:
                words[key] = word, self.line

        def frequency(record):
            word, _ = record
            # Nothing longer is a word, and wordfreq would run out of memory.
            return wordfreq.word_frequency(word, "en") if len(word) <= 1000 else 0.0

        for word, line in sorted(words.values(), key=frequency, reverse=True):
            self.line = line
            yield word


class UserNameLoader(SequenceLoader):
    """Iterates over the first column of a CSV file with a header.

    The file is read by the `csv` module: a quoted field may hold delimiters,
    quotes and line ends. The delimiter is the comma, semicolon or tab that
    splits the first row into the most columns, unless an Excel line like
    `sep=;` names one. The first row is ignored, and so are rows whose first
    column is blank.

    Args:
        path: str or path-like, a CSV file, encoded as for `SequenceLoader`.
        max_sequences: int or None, how many to yield at most; the first ones.

    Attributes:
        line: as `SequenceLoader` has it.
        header: list of str, the first row.
        uneven: int, how many rows so far had more or fewer columns.

    Yields:
        str, one user name.

    Raises:
        OSError, ValueError: as `SequenceLoader` does; a ValueError too if
            the `csv` module finds the file malformed.
    """

    when_empty = "has no data rows: after the header it needs a row with a first column"

    def _records(self):
        self.header, self.uneven, row_end = [], 0, 0
        lines = itertools.dropwhile(lambda line: not line.strip("\r\n"), self._lines())
        first = next(lines, "")
        declared = re.fullmatch(r'"?sep=([^"\w\r\n])"?[\r\n]*', first, re.IGNORECASE)
        if declared:
            first = next(lines, "")
        try:
            delimiter = declared[1] if declared else find_delimiter(first)
            rows = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
            for row in filter(None, rows):
                row_end = self.line
                if not self.header:
                    self.header = row
                    continue
                self.uneven += len(row) != len(self.header)
                yield compose(row[0])
        except csv.Error as error:
            self.line = row_end + 1
            raise self._error(
                f"not CSV from here on: {error}; look for a quote that is never closed, "
                "or a quote within a field that is not doubled"
            ) from None


def compose(text):
    """Returns a str in Unicode's composed form, NFC."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def find_delimiter(line):
    """Returns the delimiter, a str, that splits a line of CSV into the most columns."""
    return max(",;\t", key=lambda each: len(next(csv.reader([line], delimiter=each), ())))


LOADERS = {loader.__name__: loader for loader in (SequenceLoader, VocabularyLoader, UserNameLoader)}


def find_loader(path, name=None):
    """Returns the class that reads a file: the one named, else the one its path implies.

    Args:
        path: str or path-like. What ends in `.csv` or `.csv.gz` is read by
            `UserNameLoader`, anything else by `SequenceLoader`.
        name: str or None, a key of `LOADERS`, which overrules the path.
    """
    if name is not None:
        return LOADERS[name]
    is_csv = os.fspath(path).lower().endswith((".csv", ".csv.gz"))
    return UserNameLoader if is_csv else SequenceLoader
