"""Files below a folder on a local disk or in an object store, and what of them is left out.

A local folder is walked here and not by Arrow, which follows symbolic links in circles and gives up at a name that is
not UTF-8. A link to a folder is followed once, and only if the folder is not listed otherwise.
"""

import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow.fs

from attrib.common.errors import AttribError
from attrib.common.storage import Storage, is_remote, join
from attrib.data.places import can_read_key, local_version, s3fs_client, seconds, version
from attrib.data.selection import NameFilter, Reason, Skipped, folder_filter
from attrib.data.settings import CollectionSettings


class FoundFile(NamedTuple):
    """name: below the root, with / between its parts. file_version: of attrib.data.places."""

    uri: str
    name: str
    num_bytes: int
    file_version: str


class Folder(NamedTuple):
    """A local folder. name: below the root; real: without links; bases: real folders that links on the way left."""

    name: str
    real: str
    bases: tuple[str, ...] = ()


class LocalTree:
    """A local folder tree. Adds what it leaves out to skipped_folders and skipped_files."""

    def __init__(self, root: str, in_folder: NameFilter, selected: NameFilter):
        self.root, self.real = root, os.path.realpath(root)
        self.in_folder, self.selected = in_folder, selected
        self.skipped_folders, self.skipped_files = Skipped(), Skipped()
        self.targets: set[str] = set()  # of the links that were followed
        self.seen: set[str] = set()  # folders that were reached over a link

    def top(self, uri: str) -> Folder:
        """Return the root, or a folder directly below it."""
        name = uri.removeprefix(self.root).strip("/")
        real = os.path.realpath(uri)
        is_linked = real != os.path.join(self.real, name).rstrip("/")
        return Folder(name, real, (self.real,) if is_linked else ())

    def walk(self, folder: Folder) -> Iterator[FoundFile]:
        pending = [folder]
        while pending:
            folder = pending.pop()
            if folder.bases:
                if folder.real in self.seen:
                    self.skipped_folders.add(Reason.LISTED, folder.name)
                    continue
                self.seen.add(folder.real)
            entries = list(self._entries(folder))
            yield from self.files(folder, entries)
            pending += reversed(self.folders(folder, entries))

    def folders(self, folder: Folder, entries: list[tuple[os.DirEntry[str], str]] | None = None) -> list[Folder]:
        """Return the folders directly below one."""
        found = []
        for entry, name in self._entries(folder) if entries is None else entries:
            if not _is_folder(entry):
                continue
            if reason := self.in_folder(name):
                self.skipped_folders.add(reason, name)
                continue
            if not entry.is_symlink():
                found.append(Folder(name, os.path.join(folder.real, entry.name), folder.bases))
                continue
            real, bases = os.path.realpath(entry.path), (*folder.bases, self.real, folder.real)
            if real in self.targets or self._is_listed(real, bases):
                self.skipped_folders.add(Reason.LISTED, name)
            else:
                self.targets.add(real)
                found.append(Folder(name, real, bases))
        return found

    def _is_listed(self, real: str, bases: tuple[str, ...]) -> bool:
        """Whether a link would lead in a circle, or to a folder that the walk meets without the link."""
        if any(base == real or base.startswith(real.rstrip("/") + "/") for base in bases):
            return True
        name = os.path.relpath(real, self.real)
        return name.split("/")[0] != ".." and self.in_folder(name) is None

    def files(self, folder: Folder, entries: list[tuple[os.DirEntry[str], str]] | None = None) -> Iterator[FoundFile]:
        """Yield the selected files directly in a folder."""
        for entry, name in self._entries(folder) if entries is None else entries:
            if _is_folder(entry) or not self.skipped_files.select(self.selected, name):
                continue
            try:
                found = entry.stat()
            except OSError:  # it leads nowhere, or in a circle
                self.skipped_files.add(Reason.BROKEN, name)
                continue
            if stat.S_ISREG(found.st_mode):
                yield FoundFile(join(self.root, name), name, found.st_size, local_version(found))
            else:
                self.skipped_files.add(Reason.IRREGULAR, name)

    def _entries(self, folder: Folder) -> Iterator[tuple[os.DirEntry[str], str]]:
        path = join(self.root, folder.name) if folder.name else self.root
        try:
            with os.scandir(path) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    yield entry, f"{folder.name}/{entry.name}" if folder.name else entry.name
        except OSError as error:
            raise AttribError(f"{path} cannot be listed: {error.strerror}; correct its rights or exclude it") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def files_below(
    folder: str,
    recursive: bool,
    collection: CollectionSettings,
    selected: NameFilter,
    storage: Storage,
    skipped: Skipped,
) -> list[FoundFile]:
    """Return the selected files of a folder, sorted by URI. folder: that of the collection, or one below it."""
    if is_remote(folder):
        return sorted(_remote_files(collection.uri, folder, recursive, selected, storage, skipped))
    tree = LocalTree(collection.uri, folder_filter(collection), selected)
    top = tree.top(folder)
    found = sorted(tree.walk(top) if recursive else tree.files(top))
    skipped.update(tree.skipped_files)
    skipped.update(tree.skipped_folders)
    return found


def folders_in(collection: CollectionSettings, storage: Storage, skipped: Skipped) -> list[str]:
    """Return the URIs of the folders directly in the collection's, sorted. One in a store may end in a slash.

    Its name is then the empty part between two slashes.
    """
    in_folder, root = folder_filter(collection), collection.uri
    if not is_remote(root):
        tree = LocalTree(root, in_folder, in_folder)
        found = [join(root, folder.name) for folder in tree.folders(tree.top(root))]
        skipped.update(tree.skipped_folders)
        return sorted(found)
    filesystem, path = storage.resolve(root)
    client = s3fs_client(storage, root)
    if client:
        names = {entry["name"] for entry in client.ls(path, detail=True) if entry["type"] == "directory"}
    else:
        listed = filesystem.get_file_info(pyarrow.fs.FileSelector(path))
        names = {entry.path for entry in listed if entry.type == pyarrow.fs.FileType.Directory}
    # For an empty part, Arrow gives the path of the collection itself.
    names = {f"{path}/" if name == path else name for name in names}
    return sorted(f"s3://{name}" for name in names if skipped.select(in_folder, name.removeprefix(f"{path}/")))


def has_keys_below(uri: str, storage: Storage) -> bool:
    """Whether keys of a store begin with the URI and a slash. The URI itself may be the key of an object, too."""
    filesystem, path = storage.resolve(uri)
    client = s3fs_client(storage, uri)
    if client:
        return any(name.rstrip("/") != path for name in client.ls(path, detail=False))
    return bool(filesystem.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True)))


def _remote_files(
    root: str, folder: str, recursive: bool, selected: NameFilter, storage: Storage, skipped: Skipped
) -> Iterator[FoundFile]:
    filesystem, base = storage.resolve(root)
    start = f"{storage.resolve(folder)[1]}/"
    path = start.rstrip("/")  # clients cannot list what begins with an empty part alone
    client = s3fs_client(storage, root)
    entries: dict[str, tuple[int, str]] = {}
    if client:
        listed = client.find(path, detail=True).values() if recursive else client.ls(path, detail=True)
        entries = {entry["name"]: (entry["size"], entry["ETag"]) for entry in listed if entry["type"] == "file"}
    else:
        for entry in filesystem.get_file_info(pyarrow.fs.FileSelector(path, recursive=recursive, allow_not_found=True)):
            # The empty object that some tools write for a folder has the path of the folder, without its slash.
            if entry.type == pyarrow.fs.FileType.File and (entry.size or entry.path not in entries):
                entries[entry.path] = (entry.size, seconds(entry.mtime))
    for path, (size, mark) in entries.items():
        name = path.removeprefix(f"{base}/")
        if not path.startswith(start) or not skipped.select(selected, name):
            continue
        if can_read_key(path, storage):
            yield FoundFile(f"s3://{path}", name, size, version(size, mark))
        else:
            skipped.add(Reason.KEY, name)
