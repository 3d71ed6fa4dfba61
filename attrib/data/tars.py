"""The members of a plain tar shard as byte ranges, read from its headers alone.

Not tarfile: it stops at the first empty block, allocates what a header claims, takes the stored bytes of a sparse
member for its content, and reads a member of negative size for ever. Only its parser of a single header is used.
"""

import posixpath
import tarfile
from dataclasses import dataclass, field
from typing import IO, NamedTuple

import pyarrow as pa

from attrib.common.errors import AttribError
from attrib.common.storage import Storage, is_remote
from attrib.data.places import open_file
from attrib.data.selection import NameFilter, Reason, Skipped

BLOCK = 512
MAX_NAME_BYTES = 1 << 20  # of the names and attributes of a member; tar itself writes a few hundred
MAX_LINKS = 40  # from a link to a link, as in Linux
LOCAL_WINDOW = 1 << 16
REMOTE_WINDOW = 1 << 22  # a request costs more than to read past some images
FILE_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
DEVICE_TYPES = (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
TYPES_WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, *DEVICE_TYPES)
NAME_TYPES = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}
PAX_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)


class Member(NamedTuple):
    """The bytes [offset, offset + num_bytes) of the shard."""

    name: str
    offset: int
    num_bytes: int


class DamagedTarError(Exception):
    """Bytes that are no tar."""


def list_members(uri: str, selected: NameFilter, storage: Storage, skipped: Skipped) -> tuple[list[Member], str | None]:
    """Return the selected files of a shard and its version; links have the bytes of their target.

    Raises AttribError if the shard is damaged, cut off or compressed.
    """
    with open_file(uri, storage) as shard:
        reader = _Reader(shard.file, shard.num_bytes, REMOTE_WINDOW if is_remote(uri) else LOCAL_WINDOW)
        try:
            contents = _Contents(selected, skipped)
            while header := reader.next_header():
                contents.add(header)
        except (DamagedTarError, tarfile.TarError) as error:
            raise AttribError(
                f"{uri} is not a readable plain tar file ({error}); fetch it again if it is damaged, "
                "unpack it to .tar if it is compressed"
            ) from error
        return contents.members(), next(iter(shard.versions), None)


@dataclass
class _Header:
    name: str
    link: str
    type: bytes
    is_sparse: bool
    offset: int  # of the data
    num_bytes: int


class _Reader:
    """Reads header after header. Reads no data of members but those that lie in its window."""

    def __init__(self, file: IO[bytes] | pa.NativeFile, num_bytes: int, window: int):
        self.file, self.num_bytes, self.window = file, num_bytes, window
        self.start, self.data = 0, b""
        self.offset = 0
        self.was_closed = False  # an end mark, of which archives that were joined have several
        self.global_attributes: dict[str, str] = {}

    def _read(self, offset: int, num_bytes: int) -> bytes:
        if not self.start <= offset <= offset + num_bytes <= self.start + len(self.data):
            self.file.seek(offset)
            self.start, self.data = offset, self.file.read(max(num_bytes, self.window))
        return self.data[offset - self.start : offset - self.start + num_bytes]

    def next_header(self) -> _Header | None:
        """Return the next header of a file, link or other entry; None at the end. Raises DamagedTarError."""
        attributes = dict(self.global_attributes)
        while True:
            block = self._read(self.offset, BLOCK)
            if not block.strip(b"\0"):
                if self._skip_empty_blocks():
                    continue
                return None
            self.was_closed = False
            info = _parse(block)
            self.offset += BLOCK
            if info.type in NAME_TYPES or info.type in PAX_TYPES:
                data = self._attribute_data(info)
                if info.type in NAME_TYPES:
                    attributes[NAME_TYPES[info.type]] = _text(data.split(b"\0", 1)[0])
                    continue
                found = _pax_attributes(data)
                attributes |= found
                if info.type == tarfile.XGLTYPE:
                    self.global_attributes |= found
                continue
            return self._header(info, attributes, block)

    def _skip_empty_blocks(self) -> bool:
        """Move to the next block that is not empty. Returns False at the end of the file."""
        while self.offset < self.num_bytes:
            block = self._read(self.offset, BLOCK)
            rest = self.data[self.offset - self.start :]
            if not rest:
                raise DamagedTarError("it became shorter while it was read")
            self.was_closed |= len(block) == BLOCK
            if rest.strip(b"\0"):
                self.offset += (len(rest) - len(rest.lstrip(b"\0"))) // BLOCK * BLOCK
                return True
            self.offset += len(rest)
        if not self.was_closed:
            raise DamagedTarError("it has no end-of-archive marker, so it is truncated")
        return False

    def _attribute_data(self, info: tarfile.TarInfo) -> bytes:
        if info.size > MAX_NAME_BYTES:
            raise DamagedTarError(f"its header claims {info.size:,} bytes of names and attributes")
        data = self._read(self.offset, self._checked(info.size))
        self._skip(info.size)
        return data

    def _checked(self, num_bytes: int) -> int:
        if not 0 <= num_bytes <= self.num_bytes - self.offset:
            left = self.num_bytes - self.offset
            raise DamagedTarError(f"a member of {num_bytes:,} bytes where {left:,} are left, so it is truncated")
        return num_bytes

    def _skip(self, num_bytes: int) -> None:
        self.offset += -(-num_bytes // BLOCK) * BLOCK

    def _header(self, info: tarfile.TarInfo, attributes: dict[str, str], block: bytes) -> _Header:
        is_sparse = info.type == tarfile.GNUTYPE_SPARSE or "SCHILY.realsize" in attributes
        is_sparse |= any(name.startswith("GNU.sparse.") for name in attributes)
        name = attributes.get("GNU.sparse.name") or attributes.get("path") or info.name
        # The map of a sparse member may go on in further blocks; each says at its end whether another one follows.
        is_extended = info.type == tarfile.GNUTYPE_SPARSE and block[482]
        while is_extended:
            more = self._read(self.offset, self._checked(BLOCK))
            self.offset += BLOCK
            is_extended = more[504]
        try:
            num_bytes = int(attributes.get("size") or info.size)
        except ValueError:
            raise DamagedTarError(f"a member has the size {attributes['size']!r}") from None
        if info.type in TYPES_WITHOUT_DATA:
            num_bytes = 0
        at = self.offset
        self._skip(self._checked(num_bytes))
        return _Header(name, attributes.get("linkpath") or info.linkname, info.type, is_sparse, at, num_bytes)


def _parse(block: bytes) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except tarfile.HeaderError as error:
        raise DamagedTarError(f"damaged header: {error}") from error


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


def _pax_attributes(data: bytes) -> dict[str, str]:
    """Parse lines of "LENGTH KEY=VALUE\\n", where the length is that of the line."""
    found = {}
    while data.strip(b"\0"):
        length, separator, _ = data.partition(b" ")
        end = int(length) if separator and length.isdigit() and len(length) < 10 else 0
        key, is_pair, value = data[len(length) + 1 : end - 1].partition(b"=")
        if not 0 < end <= len(data) or not is_pair or data[end - 1 : end] != b"\n":
            raise DamagedTarError("damaged attributes of a member")
        found[_text(key)] = _text(value)
        data = data[end:]
    return found


@dataclass
class _Contents:
    """What a shard holds, so that links find their targets, which may have any name and come later."""

    selected: NameFilter
    skipped: Skipped
    files: list[Member] = field(default_factory=list)
    places: dict[str, Member] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)

    def add(self, header: _Header) -> None:
        if header.type == tarfile.DIRTYPE:
            return
        # GNU tar writes ./NAME and FOLDER/./NAME; keys are those of the folder that was packed.
        name = "/".join(part for part in header.name.rstrip("/").split("/") if part != ".")
        is_link = header.type in (tarfile.LNKTYPE, tarfile.SYMTYPE)
        is_file = header.type in FILE_TYPES and not header.is_sparse
        if is_link:
            # A hard link names a member, a symbolic link a path that starts at its own folder.
            base = posixpath.dirname(name) if header.type == tarfile.SYMTYPE else ""
            self.links[posixpath.normpath(name)] = posixpath.normpath(posixpath.join(base, header.link))
        member = Member(name, header.offset, header.num_bytes)
        if is_file:
            self.places[posixpath.normpath(name)] = member
        if self.skipped.select(self.selected, name):
            if is_link or is_file:
                self.files.append(member)
            else:
                self.skipped.add(Reason.SPARSE if header.is_sparse else Reason.IRREGULAR, name)

    def members(self) -> list[Member]:
        return [found for member in self.files if (found := self._resolved(member))]

    def _resolved(self, member: Member) -> Member | None:
        target = self.links.get(posixpath.normpath(member.name))
        if target is None:
            return member
        for _ in range(MAX_LINKS):
            if target in self.places:
                return self.places[target]._replace(name=member.name)
            target = self.links.get(target, "")
        self.skipped.add(Reason.BROKEN, member.name)
        return None
