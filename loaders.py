"""How a file becomes an iterable of strings, one a sequence.

`SequenceLoader` reads the lines of a text file, `VocabularyLoader` English words
and `UserNameLoader` the first column of a CSV file. `find_loader` picks one.
"""

import csv
import itertools
import os

LONGEST_LINE = 2**20  # bytes; what is longer is no list of sequences


class SequenceLoader:
    r"""Iterates over the sequences of a text file, one a line.

    Blank lines are skipped; line ends (`\n` or `\r\n`) and a byte order mark
    are stripped; every other character is kept. The file is streamed, and
    read again at each iteration.

    Args:
        path: str or path-like, a UTF-8 text file.
        max_sequences: int or None, yield only the first so many.

    Attributes:
        line: int, the line of the file on which the last sequence ended; the
            first is 1.

    Yields:
        str, one sequence.

    Raises:
        OSError: while iterating, if the file can't be opened or read.
        ValueError: while iterating, if the file is not UTF-8, has a line of
            `LONGEST_LINE` bytes or a NUL (the message names the line), or
            holds no sequence at all.

    Example:

    >>> for sequence in SequenceLoader("sequences.txt", max_sequences=1000):
    ...     print(sequence)
    """

    empty = "holds no sequence: every line is blank; it needs one sequence a line"

    def __init__(self, path, max_sequences=None):
        self.path = path
        self.max_sequences = max_sequences

    def __iter__(self):
        self.line = 0
        sequences = filter(str.strip, self._records())
        first = next(sequences, None)
        if first is None:
            raise ValueError(f"{self.path} {self.empty}.")
        yield from itertools.islice(itertools.chain([first], sequences), self.max_sequences)

    def _records(self):
        for line in self._lines():
            yield line.rstrip("\n").removesuffix("\r")

    def _lines(self):
        with open(self.path, "rb") as file:
            while data := file.readline(LONGEST_LINE):
                self.line += 1
                if b"\0" in data:
                    raise self._error(
                        "it holds a NUL, so this is not UTF-8 text; if the file is text, "
                        "convert it to UTF-8 first"
                    )
                if len(data) == LONGEST_LINE:
                    raise self._error(
                        f"longer than {LONGEST_LINE:,} bytes; name a file with one sequence a line"
                    )
                try:
                    yield data.decode("utf-8-sig" if self.line == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise self._error(
                        "not UTF-8 text; if the file is text, convert it to UTF-8 first. "
                        f"Received: byte {error.object[error.start]:#04x}"
                    ) from None

    def _error(self, reason):
        return ValueError(f"{self.path}, line {self.line}: {reason}.")


class VocabularyLoader(SequenceLoader):
    """Iterates over the words of a text file, the most used in English first.

    Words are ranked by `wordfreq`'s estimate of their frequency in English;
    equally frequent ones keep the order of the file. Each word comes once:
    that estimate knows no case, so of spellings that differ only in case one
    is kept, the lower-case one if there is one ("in" rather than "In" and
    "IN", but "English"). The words are held in memory, since the last one may
    be the most frequent.

    Args:
        path: str or path-like, a UTF-8 text file with one word a line.
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
                words[key] = self.line, word

        def rank(record):
            word = record[1]
            # Anything longer is no word, and would take wordfreq more memory than there is.
            return -wordfreq.word_frequency(word, "en") if len(word) <= 1000 else 0.0

        for self.line, word in sorted(words.values(), key=rank):
            yield word


class UserNameLoader(SequenceLoader):
    """Iterates over the first column of a CSV file with a header.

    The file is read by the `csv` module: a quoted field may hold commas,
    quotes and line ends. The first row is ignored, and so are rows whose
    first column is blank.

    Args:
        path: str or path-like, a UTF-8 CSV file.
        max_sequences: int or None, yield only the first so many.

    Yields:
        str, one user name.

    Raises:
        OSError, ValueError: as `SequenceLoader` does; a ValueError too if
            the `csv` module finds the file malformed.
    """

    empty = "holds no data row: after the header it needs a row with a first column"

    def _records(self):
        rows = filter(None, csv.reader(self._lines(), strict=True))
        row_end = 0
        try:
            for number, row in enumerate(rows):
                row_end = self.line
                if number > 0:
                    yield row[0]
        except csv.Error as error:
            self.line = row_end + 1
            raise self._error(
                f"not CSV from here on: {error}; look for a quote that is never closed, "
                r"a quote within a field that is not written twice, and for lines that end in \r"
            ) from None


LOADERS = {loader.__name__: loader for loader in (SequenceLoader, VocabularyLoader, UserNameLoader)}


def find_loader(path, name=None):
    """Returns the class that reads a file: the one named, else the one its name asks for.

    Args:
        path: str or path-like. What ends in `.csv` is read by `UserNameLoader`,
            anything else by `SequenceLoader`.
        name: str or None, a key of `LOADERS`, which overrules the path.
    """
    if name is not None:
        return LOADERS[name]
    return UserNameLoader if os.fspath(path).lower().endswith(".csv") else SequenceLoader
