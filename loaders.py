"""Loaders: a file on disk becomes an iterable of Python strings, one a sequence."""

import codecs
import csv
import io
import itertools

LONGEST_ROW = 1000  # lines that a row of a CSV file may have
LONGEST_LINE = 2**20  # characters; what is longer is no list of sequences


class SequenceLoader:
    r"""Iterates over the sequences of a text file, one a line.

    Blank lines are skipped; line ends (`\n` or `\r\n`) and a UTF-8 byte
    order mark are stripped; every other character is kept. The file is
    streamed: it is read again at each iteration and never held in memory,
    whatever it is.

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
        ValueError: while iterating, if the file is not UTF-8, has a line of
            more than `LONGEST_LINE` characters or a NUL (the message names
            the line), or holds no sequence at all.

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
        for self.line, text in enumerate(self._lines(), start=1):  # noqa: B020
            yield text.rstrip("\n").removesuffix("\r")

    def _lines(self):
        # Python's own iteration over lines would first read a line of any length.
        decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        count, rest = 0, ""
        with open(self.path, "rb") as file:
            while True:
                # The csv module would look for the end of a row until memory runs out.
                if count - self.line > LONGEST_ROW:
                    raise csv.Error(f"no end within {LONGEST_ROW:,} lines")
                data = file.read1(2**14)
                try:
                    text = rest + decode(data, final=not data)
                except UnicodeDecodeError as error:
                    line = count + 1 + error.object.count(b"\n", 0, error.start)
                    raise ValueError(
                        f"{self.path}, line {line}: not UTF-8 text; if the file is text, convert "
                        f"it to UTF-8 first. Received: byte {error.object[error.start]:#04x}."
                    ) from None
                before, nul, _ = text.partition("\0")
                lines, end, rest = before.rpartition("\n")
                yield from io.StringIO(lines + end, newline="\n")
                count += before.count("\n")
                if nul:
                    raise ValueError(
                        f"{self.path}, line {count + 1}: it holds a NUL, so this is not UTF-8 "
                        "text; if the file is text, convert it to UTF-8 first."
                    )
                if len(rest) > LONGEST_LINE:
                    raise ValueError(
                        f"{self.path}, line {count + 1}: longer than {LONGEST_LINE:,} "
                        "characters; name a file with one sequence a line."
                    )
                if not data:
                    break
        if rest:
            yield rest


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

        def rank(record):
            word = record[1]
            # What is longer is no word, and takes wordfreq more memory than there is.
            return -wordfreq.word_frequency(word, "en") if len(word) <= 1000 else 0.0

        for self.line, word in sorted(words.values(), key=rank):
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
        header = True
        reader = csv.reader(self._lines(), strict=True)
        try:
            for row in reader:
                self.line = reader.line_num
                if row and not header:
                    yield row[0]
                header = header and not row
        except csv.Error as error:
            line = self.line + 1
            raise ValueError(
                f"{self.path}, line {line}: not CSV from here on: {self._explain(str(error))}."
            ) from None

    @staticmethod
    def _explain(reason):
        if "new-line character" in reason:
            return r"it has a carriage return outside quotes; end all lines by \n or \r\n"
        if "unexpected end" in reason or "no end" in reason or "field limit" in reason:
            return f"{reason}; look for a quote that is never closed"
        return f"{reason}; close each quoted field, and write a quote within one twice"


LOADERS = {loader.__name__: loader for loader in (SequenceLoader, VocabularyLoader, UserNameLoader)}
