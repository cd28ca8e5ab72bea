"""Loaders: a file on disk becomes an iterable of Python strings, one a sequence."""

import codecs
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
        return (sequence for _, sequence in self.numbered())

    def numbered(self):
        """Yields `(line, sequence)` pairs: where each sequence stands in the file.

        `line` is an int that counts from 1.
        """
        records = (record for record in self._records() if record[1].strip())
        first = next(records, None)
        if first is None:
            raise ValueError(f"{self.path} {self.empty}.")
        yield from itertools.islice(itertools.chain([first], records), self.max_sequences)

    def _records(self):
        return ((line, text.rstrip("\r\n")) for line, text in self._lines())

    def _lines(self):
        with open(self.path, "rb") as file:
            for line, raw in enumerate(file, start=1):
                if line == 1:
                    raw = raw.removeprefix(codecs.BOM_UTF8)
                try:
                    yield line, raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{self.path}, line {line}: not UTF-8 text; convert the file to "
                        f"UTF-8 first. Received: byte {raw[error.start]:#04x}."
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
        for line, word in super()._records():
            key = word.lower()
            if key not in words or word == key:
                words[key] = line, word
        return iter(
            sorted(words.values(), key=lambda record: -wordfreq.word_frequency(record[1], "en"))
        )


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
        reader = csv.reader((text for _, text in self._lines()), strict=True)
        rows = filter(None, reader)
        try:
            next(rows, None)
            for row in rows:
                yield reader.line_num, row[0]
        except csv.Error as error:
            raise ValueError(f"{self.path}, line {reader.line_num}: not CSV: {error}.") from None


LOADERS = {loader.__name__: loader for loader in (SequenceLoader, VocabularyLoader, UserNameLoader)}
