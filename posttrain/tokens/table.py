"""Rendered documents as flat arrays, in memory or mapped from a store: five bytes a token, and fifty a document.

ids     a0 a1 a2 a3 | b0 b1 b2 | c0 c1
mask     .  .  T  T |  .  T  T |  .  T      T = trained
rows    end 4, ...  | end 7    | end 9      a fixed number of bytes each, see ROW
"""

# T = tokens of all documents, N = documents of a table, M = documents of a choice, P = bytes of all places

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from posttrain.data.records import UNKNOWN, Origin
from posttrain.tokens.chat import Rendered, as_array

ROW = np.dtype(
    [
        ("end", "<i8"),  # of its tokens
        ("place_end", "<i8"),  # of its place in the text of all places
        ("trained", "<i4"),  # tokens that the mask marks, without the first
        ("largest", "<i4"),  # of its ids
        ("origin", "<i4"),  # its number in the list of origins
        ("after", "<i4"),  # rows of the same record that follow
        ("digest", "V16"),  # of its ids: equal documents have equal ones
        ("flag", "?"),
        ("chat", "?"),
    ]
)
"""What is known of a document beside its tokens."""
TEXTS = 16
"""Conversations whose text is kept: the first ones."""

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TableRow:
    """A document on its way into a table."""

    rendered: Rendered
    origin: Origin = UNKNOWN
    flag: bool = False
    """A mark for the stage: the answer declines, or was judged good."""
    chat: bool = True
    """True for a conversation, False for a raw text."""
    after: int = 0
    """Rows of the same record that follow."""


@dataclass(frozen=True, slots=True)
class TokenTable:
    """Rendered documents, side by side."""

    ids: NDArray[np.int32]
    """Token ids, [T]."""
    mask: NDArray[np.bool_]
    """True for a trained token, [T]."""
    rows: NDArray[Any]
    """A ROW for each document, [N]."""
    places: NDArray[np.uint8]
    """The places of all records in UTF-8, end to end, [P]."""
    origins: tuple[Origin, ...] = ()
    """Sources of the documents, in the order of their first ones."""
    texts: tuple[str, ...] = ()
    """Texts of the first conversations, at most TEXTS."""
    sums: tuple[str, str] | None = None
    """SHA-256 of ids and mask, where a store has just verified them."""

    @classmethod
    def of(cls, made: Iterable[TableRow | Rendered]) -> TokenTable:
        """Return the table of rows in memory."""
        ids: list[NDArray[np.int32]] = [np.empty(0, np.int32)]
        mask: list[NDArray[np.bool_]] = [np.empty(0, np.bool_)]
        rows: list[tuple[Any, ...]] = []
        places = bytearray()
        origins: dict[Origin, int] = {}
        texts: list[str] = []
        end = 0
        for each in made:
            row = each if isinstance(each, TableRow) else TableRow(each)
            ids_T = as_array(row.rendered.ids)
            mask_T = np.frombuffer(bytes(row.rendered.mask), np.bool_)
            end += len(ids_T)
            places += row.rendered.where.encode("utf-8", "surrogatepass")
            trained, largest = int(np.count_nonzero(mask_T[1:])), int(ids_T.max(initial=-1))
            digest = hashlib.blake2b(ids_T.tobytes(), digest_size=16).digest()
            origin = origins.setdefault(row.origin, len(origins))
            rows.append((end, len(places), trained, largest, origin, row.after, digest, row.flag, row.chat))
            ids.append(ids_T)
            mask.append(mask_T)
            if row.chat and len(texts) < TEXTS:
                texts.append(row.rendered.text)
        found = np.array(rows, ROW)
        return cls(
            np.concatenate(ids),
            np.concatenate(mask),
            found,
            np.frombuffer(bytes(places), np.uint8),
            tuple(origins),
            tuple(texts),
        )

    def __len__(self) -> int:
        return len(self.rows)

    def content(self) -> tuple[str, str]:
        """Return the SHA-256 of ids and mask: equal for tables of equal tokens, wherever their records stand."""
        if self.sums is not None:
            return self.sums
        return hashlib.sha256(self.ids.tobytes()).hexdigest(), hashlib.sha256(self.mask.tobytes()).hexdigest()

    def all(self) -> Documents:
        """Return all documents."""
        return Documents(self, np.arange(len(self.rows)))

    def chats(self) -> list[Rendered]:
        """Return the first conversations with their texts."""
        documents, found = self.all(), np.flatnonzero(self.rows["chat"])[: len(self.texts)]
        return [documents.rendered(int(index), text) for index, text in zip(found, self.texts, strict=True)]


@dataclass(frozen=True, slots=True, eq=False)
class Documents(Sequence[Rendered]):
    """A choice of documents of a table, each once or several times, in an order of their own."""

    table: TokenTable
    indices: Indices
    """Places in the table, [M]."""

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, place: int) -> Rendered: ...
    @overload
    def __getitem__(self, place: slice) -> list[Rendered]: ...
    def __getitem__(self, place: int | slice) -> Rendered | list[Rendered]:
        if isinstance(place, slice):
            return [self.rendered(number) for number in range(*place.indices(len(self)))]
        return self.rendered(place)

    def rendered(self, place: int, text: str = "") -> Rendered:
        """Return one document as lists."""
        ids, mask = self.tokens(place)
        return Rendered(ids.tolist(), mask.tolist(), text, self.where(place))

    def tokens(self, place: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Return ids and mask of one document, views of the table's."""
        index = int(self.indices[place])
        start, end = int(self.table.rows["end"][index - 1]) if index else 0, int(self.table.rows["end"][index])
        return self.table.ids[start:end], self.table.mask[start:end]

    def where(self, place: int) -> str:
        """Return the place of a document's record, as ``file:line``."""
        index, ends = int(self.indices[place]), self.table.rows["place_end"]
        start = int(ends[index - 1]) if index else 0
        return self.table.places[start : int(ends[index])].tobytes().decode("utf-8", "surrogatepass")

    def take(self, places: NDArray[Any]) -> Documents:
        """Return the documents at ``places``: numbers, or a True for each one to take."""
        return Documents(self.table, self.indices[places])

    def column(self, name: str) -> NDArray[Any]:
        """Return what ``ROW`` names of each document, [M]."""
        found: NDArray[Any] = self.table.rows[name][self.indices]
        return found

    @property
    def starts(self) -> Indices:
        """The first token of each document in the table, [M]."""
        ends_N = self.table.rows["end"]
        return np.where(self.indices > 0, ends_N[self.indices - 1], 0) if len(ends_N) else np.empty(0, np.int64)

    @property
    def lengths(self) -> Indices:
        """Tokens of each document, [M]."""
        return self.column("end").astype(np.int64) - self.starts

    @property
    def digests(self) -> list[bytes]:
        """The digest of the ids of each document."""
        return list(map(bytes, self.column("digest")))

    @property
    def records(self) -> Documents:
        """For each document the last one of its record: rows of one record have the same."""
        return Documents(self.table, self.indices + self.column("after"))

    def in_order(self) -> Iterator[int]:
        """Yield the places of the documents, sorted by their ids as lists are."""
        yield from self._sorted(list(range(len(self))), 0)

    def _sorted(self, places: list[int], depth: int) -> Iterator[int]:
        """Yield ``places`` in order, of documents that are equal up to ``depth``."""
        # A key of all of its tokens for each document would be the whole table as Python objects.
        compared = max(COMPARED, depth)
        groups: dict[bytes, list[int]] = {}
        for place in places:
            key = self.tokens(place)[0][depth : depth + compared].astype(">i4").tobytes()
            groups.setdefault(key, []).append(place)
        for key, group in sorted(groups.items()):
            if len(group) == 1 or len(key) < 4 * compared:
                yield from group
            else:
                yield from self._sorted(group, depth + compared)


COMPARED = 32
"""Tokens compared first when documents are sorted."""
