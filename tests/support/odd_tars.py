"""Tar shards that tarfile's own writer does not make: joined, sparse, with claims of other sizes, and with links."""

import io
import tarfile

BLOCK = 512
END = bytes(2 * BLOCK)


def header(name: str, size: int = 0, type: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    """The header of a member; the size may be one that no data follow."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, type, link
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def member(name: str, data: bytes) -> bytes:
    return header(name, len(data)) + padded(data)


def symlink(name: str, target: str) -> bytes:
    return header(name, type=tarfile.SYMTYPE, link=target)


def hardlink(name: str, target: str) -> bytes:
    return header(name, type=tarfile.LNKTYPE, link=target)


def with_checksum(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def gnu_sparse(name: str, segments: list[tuple[int, bytes]], real_size: int) -> bytes:
    """A sparse member of GNU tar's old form: four segments in the header, others in blocks of 21 after it."""
    stored = b"".join(data for _, data in segments)
    places = [b"%011o\0%011o\0" % (offset, len(data)) for offset, data in segments]
    block = bytearray(header(name, len(stored), tarfile.GNUTYPE_SPARSE))
    block[386 : 386 + 24 * len(places[:4])] = b"".join(places[:4])
    block[482], rest, blocks = len(places) > 4, places[4:], b""
    block[483:495] = b"%011o\0" % real_size
    while rest:
        more = bytearray(BLOCK)
        more[: 24 * len(rest[:21])] = b"".join(rest[:21])
        rest = rest[21:]
        more[504] = bool(rest)
        blocks += bytes(more)
    return with_checksum(block) + blocks + padded(stored)


def pax(attributes: dict[str, str], type: bytes = tarfile.XHDTYPE) -> bytes:
    """A header of attributes, which apply to the next member."""
    lines = b""
    for key, value in attributes.items():
        pair = f" {key}={value}\n".encode()
        length = len(pair) + 1
        while len(str(length)) + len(pair) != length:
            length += 1
        lines += str(length).encode() + pair
    return header("././@PaxHeader", len(lines), type) + padded(lines)


def pax_sparse(name: str, segments: list[tuple[int, bytes]], real_size: int) -> bytes:
    """A sparse member of the form 1.0 of PAX: its data begin with the map of the segments."""
    table = "".join(f"{number}\n" for offset, data in segments for number in (offset, len(data)))
    stored = padded(f"{len(segments)}\n{table}".encode()) + b"".join(data for _, data in segments)
    attributes = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name}
    attributes["GNU.sparse.realsize"] = str(real_size)
    return pax(attributes) + member(f"GNUSparseFile.7/{name}", stored)


def unpacked(archive: bytes) -> dict[str, bytes]:
    """Files and links of an archive as tarfile reads them, where it reads them right: the reference of tests."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar if not m.isdir()}
