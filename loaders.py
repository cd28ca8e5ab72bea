"""Loaders: a file on disk becomes an iterable of Python strings, one a sequence."""

import contextlib
import csv
import itertools


class SequenceLoader:
    r"""Iterates over the sequences of a text file, one a line.

    Blank lines are skipped; line ends (`\n` or `\r\n`) and a UTF-8 byte
    order mark are stripped; every other character is kept. The file is
    streamed: it is read again at each iteration and never held in memory.

    Args:
        path: str or path-like, a UTF-8 text file.
        max_sequences: int or None, yield only the first so many.

    Attributes:
        line: int, in which line of the file the sequence that came last ends;
            the first is 1.

    Yields:
        str, one sequence.

    Raises:
        OSError: while iterating, if the file can't be opened or read.
        ValueError: while iterating, if the file is not UTF-8 (the message
            names the line) or holds no sequence at all.

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
        with self._open() as file:
            for self.line, text in enumerate(file, start=1):
                yield text.rstrip("\r\n")

    @contextlib.contextmanager
    def _open(self):
        try:
            with open(self.path, encoding="utf-8-sig", newline="\n") as file:
                yield file
        except UnicodeDecodeError as error:
            # All lines before those bytes, which are read in one piece, have been counted.
            line = self.line + 1 + error.object.count(b"\n", 0, error.start)
            raise ValueError(
                f"{self.path}, line {line}: not UTF-8 text; convert the file to UTF-8 first. "
                f"Received: byte {error.object[error.start]:#04x}."
            ) from None


class VocabularyLoader(SequenceLoader):
    """Iterates over the words of a text file, the most used in English first.

    Words are ranked by `wordfreq`'s estimate of their frequency in English;
    equally frequent ones keep the order of the file. Each word comes once:
    that estimate knows no case, so of several spellings that differ in
    nothing else only one is kept, the lower-case one if there is one ("in"
    rather than "In" and "IN", but "English"). The list of words is held in
    memory, since the last one may be the most frequent.

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
        ranked = sorted(
            words.values(), key=lambda record: -wordfreq.word_frequency(record[1], "en")
        )
        for self.line, word in ranked:
            yield word


class UserNameLoader(SequenceLoader):
    """Iterates over the first column of a CSV file with a header.

    The file is read by the `csv` module: a quoted field may hold commas,
    quotes and line ends. The first line is ignored, and so are rows whose
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
        with self._open() as file:
            reader = csv.reader(file, strict=True)
            rows = filter(None, reader)
            try:
                next(rows, None)
                for row in rows:
                    self.line = reader.line_num
                    yield row[0]
            except csv.Error as error:
                line = reader.line_num
                raise ValueError(f"{self.path}, line {line}: not CSV: {error}.") from None
            finally:
                self.line = reader.line_num


LOADERS = {loader.__name__: loader for loader in (SequenceLoader, VocabularyLoader, UserNameLoader)}
