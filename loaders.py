"""How a file becomes an iterable of strings, one per sequence.

`SequenceLoader` reads the lines of a text file, `VocabularyLoader` English words
and `UserNameLoader` the first column of a table. `find_loader` picks one.

For another kind of file, list a subclass of `SequenceLoader` in `LOADERS`: its
`records` makes sequences of what `lines` yields (lines with their ends; what is blank
is dropped later, and so is whitespace at both ends) and raises `self.error(reason)`
where it can't; its `summary` is for `--help`, `when_empty` says what an empty file
lacks, and it reads the files whose names end in one of its `suffixes`.
"""

import bz2
import contextlib
import csv
import gzip
import io
import itertools
import lzma
import os
import re
import sys
import unicodedata
import zlib

LONGEST_LINE = 2**20  # characters; a file with a longer line is not a list of sequences
UNDECODED = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of bytes
CONVERT = "save it as UTF-8: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW (or -f its own encoding)"
DELIMITERS = {"\t": "tab", ";": "semicolon", "|": "bar", ",": "comma"}  # the rarest in text first
JSON_START = re.compile(r'[\[{][\[{\s]*("|$)')  # of strings; "[alpha]" is a name

# How files begin, since downloads and copies may lose the suffix.
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
UNPACKERS = {b"\x1f\x8b": gzip, b"\xfd7zXZ\0": lzma, **{b"BZh%d" % n: bz2 for n in range(1, 10)}}
NOT_TEXT = {
    b"PK\3\4": 'a zip archive or .xlsx: unzip it, or save a spreadsheet as "CSV UTF-8"',
    b"\xd0\xcf\x11\xe0": 'an .xls spreadsheet: save it as "CSV UTF-8"',
    b"%PDF-": "a PDF: save its text as a file",
    b"\x89HDF": "an HDF5 file, such as a model: pass a file of sequences",
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard: unpack it with zstd -d",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"Rar!\x1a": "a rar archive: unpack it",
}


class UserError(ValueError):
    """A mistake that the user can mend; the message says how."""


@contextlib.contextmanager
def needing_packages(script):
    """Ends a script with one line if a package that the block needs is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        print(
            f"{script}: error: the package {error.name} is not installed; activate the environment "
            "that has it (. .venv/bin/activate), or pip install -r requirements.txt",
            file=sys.stderr,
        )
        sys.exit(2)


class SequenceLoader:
    r"""Iterates over the sequences of a text file, one per line.

    It reads what `open_text` opens. Lines end in `\n`, `\r\n` or `\r`. Blank ones
    are skipped, whitespace at both ends and byte order marks are left out, and
    characters are composed (Unicode's NFC): an `ö` is one character however it
    was typed. The file is streamed, and read again at each iteration.

    Args:
        path: str or path-like, or `"-"` for standard input.
        max_sequences: int or None, how many to yield at most; the first ones.

    Attributes:
        line: int, the line of the file, from 1, on which the last sequence
            yielded ends.
        advice: str or None, what to tell the user if what was read so far looks
            like a table or JSON.

    Yields:
        str, one sequence.

    Raises:
        OSError: while iterating, if the file can't be opened or read.
        UserError: while iterating, if the file is not text, has a line of
            `LONGEST_LINE` characters (the message names the line), or holds
            no sequence at all.

    Example:

    >>> list(SequenceLoader("pre_trained_models/english_words_5000.txt", max_sequences=3))
    ['the', 'to', 'and']
    """

    summary = "one sequence per line"
    suffixes = ()
    when_empty = "holds no sequences: every line is blank; put one sequence on each line"
    line, header, uneven = 0, None, 0  # the last two are UserNameLoader's
    _start, _counts = "", None

    def __init__(self, path, max_sequences=None):
        self.path, self.max_sequences = path, max_sequences

    def __iter__(self):
        sequence = None
        sequences = filter(None, map(str.strip, self.records()))
        for sequence in itertools.islice(sequences, self.max_sequences):
            yield sequence
        if sequence is None:
            raise UserError(f"{self.path} {self.when_empty}")

    def records(self):
        """Yields the sequences, which may still be blank or have whitespace at their ends."""
        lines = self.lines()
        texts = filter(None, map(str.strip, lines))
        first = next(texts, "")
        counts = {each: first.count(each) for each in DELIMITERS if each in first}
        self._start, self._counts = first, None
        yield first
        for text in texts:
            counts = {each: count for each, count in counts.items() if text.count(each) == count}
            self._start, self._counts = first + text, counts
            yield text
            if not counts:
                break
        yield from lines  # which are no table's

    @property
    def advice(self):
        """See the class."""
        if JSON_START.match(self._start):
            return "this looks like JSON: if it is, write its strings to a file first, one per line"
        if not self._counts:
            return None
        delimiter, count = max(self._counts.items(), key=lambda item: item[1])
        many = f"{count} {DELIMITERS[delimiter]}{'s' * (count > 1)}"
        return f"every line has {many}: if this is a table, pass --loader_class UserNameLoader"

    def lines(self):
        """Yields the lines of the file with their ends, and counts them in `line`."""
        self.line = 0
        try:
            with open_text(self.path) as text:
                # Old files from DOS end in ^Z.
                while (line := text.readline(LONGEST_LINE)) not in ("", "\x1a"):
                    self.line += 1
                    # Rarely true, so that little is spent on most lines.
                    if not line.isascii() or "\0" in line or len(line) == LONGEST_LINE:
                        line = self._inspect(line)
                    yield line
        except UnicodeDecodeError:
            raise self.error("not UTF-16 from about here on; save the file as UTF-8") from None

    def error(self, reason):
        """Returns a `UserError` that names the file, the line and a reason, a str."""
        return UserError(f"{self.path}, line {self.line}: {reason}")

    def _inspect(self, line):
        if "\0" in line:
            raise self.error("a NUL character, so this is not UTF-8 text; save it as UTF-8 text")
        if undecoded := UNDECODED.search(line):
            raise self.error(f"byte {ord(undecoded[0]) & 0xFF:#04x} is not UTF-8 text; {CONVERT}")
        if len(line) == LONGEST_LINE:
            raise self.error(f"at least {LONGEST_LINE:,} characters; put one sequence on each line")
        return compose(line.replace("\ufeff", ""))  # which stands wherever files were joined


class VocabularyLoader(SequenceLoader):
    """Iterates over the words of a text file, the most used in English first.

    Words are ranked by `wordfreq`'s estimate of their frequency in English;
    equally frequent ones keep the order of the file. The estimate ignores case,
    so of spellings that differ only in case one is kept, the lower-case one if
    there is one ("in" rather than "In"; "English" if there is no "english").
    The words are held in memory: the last one may be the most frequent.
    """

    summary = "English words, the most used first"

    def records(self):
        """Yields the words, the most frequent first, and keeps `line`."""
        import wordfreq

        words = {}
        for word in filter(None, map(str.strip, super().records())):
            key = word.lower()
            if key not in words or word == key:
                # Nothing longer is a word, and wordfreq would run out of memory.
                words[key] = wordfreq.word_frequency(key[:1000], "en"), word, self.line
        for _, word, self.line in sorted(words.values(), key=lambda found: -found[0]):
            yield word


class UserNameLoader(SequenceLoader):
    """Iterates over the first column of a table with a header, such as a CSV file.

    The `csv` module reads it: a quoted field may hold delimiters, quotes and
    line ends. The delimiter is the one of `DELIMITERS` that splits the first
    row, which is ignored, into the most columns, unless an Excel line like
    `sep=;` names one. Rows whose first column is blank are skipped. Malformed
    CSV is a UserError.

    Attributes:
        header: list of str, the first row.
        uneven: int, how many rows so far had more or fewer columns.
    """

    summary = "the first column of a CSV or TSV file"
    suffixes = (".csv", ".tsv", ".tab")
    when_empty = "has no data rows: after the header it needs a row with a first column"

    def records(self):
        """Yields the first column, and keeps `header` and `uneven`."""
        self.header, self.uneven = [], 0
        lines = itertools.dropwhile(lambda line: not line.strip(), self.lines())
        first = next(lines, "")
        if declared := re.fullmatch(r'"?sep=([^"\w\r\n])"?[\r\n]*', first, re.IGNORECASE):
            first = next(lines, "")
        row_end = self.line - 1
        try:
            delimiter = declared[1] if declared else find_delimiter(first)
            lines = itertools.chain([first], lines)
            rows = filter(None, csv.reader(lines, delimiter=delimiter, strict=True))
            self.header, row_end = [cell.strip() for cell in next(rows, [])], self.line
            for row in rows:
                self.uneven += len(row) != len(self.header)
                yield row[0]
                row_end = self.line
        except csv.Error as error:
            self.line = row_end + 1
            raise self.error(f"not CSV from here on: {error}; find the unpaired quote") from None


LOADERS = {loader.__name__: loader for loader in (SequenceLoader, VocabularyLoader, UserNameLoader)}


def find_loader(path, name=None):
    """Returns the class that reads a file: the one named, else the one its path implies.

    Args:
        path: str or path-like. The first loader that has its ending, not counting
            `.gz`, `.bz2` and `.xz`, among its `suffixes` is picked, else
            `SequenceLoader`.
        name: str or None, a key of `LOADERS`, which overrules the path.
    """
    if name is not None:
        return LOADERS[name]
    stem = re.sub(r"\.(gz|bz2|xz)$", "", os.fspath(path).lower())
    return next((each for each in LOADERS.values() if stem.endswith(each.suffixes)), SequenceLoader)


def open_text(path):
    r"""Opens text whatever its encoding and compression.

    It is UTF-8, with or without a byte order mark, or UTF-16 with one, and may
    be compressed by gzip, bzip2 or xz. Each line is there to read as soon as it
    has come through a pipe.

    Args:
        path: str or path-like, or `"-"` for standard input, which stays open.

    Returns:
        An `io.TextIOWrapper` that leaves line ends as they are and makes lone
        surrogates of bytes that are not UTF-8.

    Raises:
        OSError: if the file can't be opened.
        UserError: if it is no text; while reading, if its compression is damaged.
    """
    opened = None if os.fspath(path) == "-" else open(path, "rb")  # noqa: SIM115 - see _Source
    # In a notebook, standard input may have no bytes.
    file = opened or getattr(sys.stdin, "buffer", None) or io.BytesIO(sys.stdin.read().encode())
    source = _Source(path, file, opened)
    if unpacker := UNPACKERS.get(source.start):
        source = _Source(path, unpacker.open(io.BufferedReader(source)), opened)
    if source.start in NOT_TEXT:
        raise UserError(f"{path} is not text but {NOT_TEXT[source.start]}")
    encoding = "utf-16" if source.start in UTF_16 else "utf-8-sig"
    buffer = io.BufferedReader(source, 2**15)  # which asks `source`, in Python, less often
    return io.TextIOWrapper(buffer, encoding, "surrogateescape", newline="")


class _Source(io.RawIOBase):
    """A binary file whose first bytes are known as `start`; it closes what was `opened` too."""

    def __init__(self, path, file, opened):
        self.path, self.file, self.opened, self.ahead = path, file, opened, io.BytesIO()
        # No more than a line, since a pipe may hold no more for now.
        begin = self.readline(6)
        self.start = next(filter(begin.startswith, (*UTF_16, *UNPACKERS, *NOT_TEXT)), b"")
        self.ahead = io.BytesIO(begin)

    def readable(self):
        return True

    def readinto(self, buffer):
        try:
            # Not `readinto1`, which waits for more where a pipe holds less than the buffer.
            data = self.ahead.read(len(buffer)) or self.file.read1(len(buffer))
            buffer[: len(data)] = data
            return len(data)
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            if getattr(error, "errno", None) is not None:
                raise  # the system's, not an unpacker's
            raise UserError(f"{self.path} is damaged: {error}; get it again") from None

    def close(self):
        super().close()
        if self.opened:
            self.opened.close()


def compose(text):
    """Returns a str in Unicode's composed form, NFC."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def find_delimiter(line):
    """Returns the delimiter, a str, that splits a line of CSV into the most columns."""
    return max(DELIMITERS, key=lambda each: len(next(csv.reader([line], delimiter=each), ())))
