"""Write inside a folder and nowhere else, whatever names a source gives and whatever already lies in the folder.

Names of files come from others: a SHA256SUMS, a listing of a hub, the members of an archive, the index of a data set.
`check_names` says whether they are plain relative names on every system. `Folder` opens files below a folder by its
descriptor, part by part, and follows no link on the way: links that lie there, and a folder that is exchanged while it
is written, lead nowhere else. `refuse_links` does the same for one file that is opened by its path.
"""

import errno
import os
import re
import shutil
import stat
import unicodedata
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path, PurePosixPath
from typing import Literal

from core.atomic import sync_open_folder
from core.errors import DamagedData, RefusedInput
from core.printable import make_line

MAX_PARTS = 32
"""Largest number of folders and file in a name: a source must not make a thousand nested folders."""
PARTIAL = ".partial"
"""Ending of the name under which a file is received until it is whole."""
MAX_PART_BYTES, MAX_NAME_BYTES = 255 - len(PARTIAL), 1024
"""Longest part of a name, to which PARTIAL can be added, and longest name, in UTF-8. Most systems have 255 bytes."""
COPIED_BYTES = 8 << 20
SPECIAL = "is a pipe, a socket or a device"
_CONTROL = re.compile(r"[\x00-\x1f\x7f\u2028-\u202e\u2066-\u2069]")
"""Control characters, ends of lines, and characters that turn the direction of writing."""
_WINDOWS_DEVICE = re.compile(r"(CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|(COM|LPT)[0-9\u00b9\u00b2\u00b3])", re.IGNORECASE)
_FLAGS = {
    "read": os.O_RDONLY, "append": os.O_RDWR | os.O_CREAT | os.O_APPEND, "new": os.O_RDWR | os.O_CREAT | os.O_EXCL,
}  # fmt: skip
_NO_LINKS = os.O_NOFOLLOW | os.O_CLOEXEC
_IS_FOLDER = os.O_RDONLY | os.O_DIRECTORY | _NO_LINKS

Mode = Literal["read", "append", "new"]


def check_name(name: str, where: str) -> None:
    """Check that a name which a source gives is a plain path below a folder, here and on macOS and Windows.

    Args:
        where: file or address that the name comes from, for the message.

    Raises:
        RefusedInput: it is not; names the rule.
    """
    if problem := find_problem(name):
        shown = make_line(name if len(name) <= 100 else f"{name[:100]}...")
        raise RefusedInput(f"{where}: {shown!r} is not a plain path inside the folder: {problem}; rename it there")


def find_problem(name: str) -> str | None:
    """Return why a name cannot be that of a file below a folder; None where it can."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "it is not UTF-8"
    if _CONTROL.search(name):
        return "it has a control character"
    if "\\" in name or ":" in name:
        return "it has a backslash or a colon, which Windows reads as a folder or a drive"
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "it is absolute, or has an empty part, `.` or `..`"
    if len(parts) > MAX_PARTS:
        return f"it has {len(parts)} parts, and {MAX_PARTS} are the most"
    if size > MAX_NAME_BYTES or any(len(part.removesuffix(PARTIAL).encode()) > MAX_PART_BYTES for part in parts):
        return f"it has more than {MAX_NAME_BYTES} bytes, or a part of more than {MAX_PART_BYTES}"
    if any(part[-1] in ". " for part in parts):
        return "a part ends with a dot or a blank, which Windows drops"
    if any(_WINDOWS_DEVICE.fullmatch(part.partition(".")[0].rstrip(" ")) for part in parts):
        return "a part is the name of a device on Windows"
    return None


def check_names(names: Iterable[str], where: str) -> None:
    """Check names as `check_name` does, and that every file system can hold files of these names side by side.

    Raises:
        RefusedInput: one is no plain name; two differ by upper and lower case or by the spelling of an accent alone,
            which macOS and Windows take for one file; one is a file and a folder; or one is where another is received.
    """
    seen: dict[str, str] = {}
    for name in names:
        check_name(name, where)
        twin = seen.setdefault(_fold(name), name)
        if twin != name:
            raise RefusedInput(f"{where}: {twin!r} and {name!r} are one file on macOS and Windows; rename one of them")
    for key, name in seen.items():
        if parent := next((key[:i] for i, sign in enumerate(key) if sign == "/" and key[:i] in seen), None):
            raise RefusedInput(f"{where}: {seen[parent]!r} is a file, and the folder of {name!r}; rename one of them")
        if key + PARTIAL in seen:
            raise RefusedInput(f"{where}: {seen[key + PARTIAL]!r} is where {name!r} is received; rename one of them")


def _fold(name: str) -> str:
    """Return what is equal for two names that macOS or Windows take for one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def refuse_links(path: str, flags: int) -> int:
    """Open a file and return its descriptor; give this function to `open` as its `opener`.

    Use it for files that are appended to, cut or locked in place, in a folder that may have come from elsewhere: what
    is written into a link arrives in another file.

    Raises:
        RefusedInput: the path is a link, has a second name (a hard link), or is no file.
        OSError: as `open`.
    """
    return _open_plain(path, flags, None, Path(path))


def _open_plain(path: str, flags: int, folder: int | None, shown: Path) -> int:
    """Open a file that is no link and, to write to it, has one name; `folder` is the descriptor of its folder."""
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for another process.
        file = os.open(path, flags & ~os.O_TRUNC | _NO_LINKS | os.O_NONBLOCK, 0o666, dir_fd=folder)
    except OSError as error:
        if stat.S_ISLNK(_read_mode(path, folder)):
            raise RefusedInput(_refusal(shown, "is a link")) from error
        if error.errno == errno.ENXIO:
            raise RefusedInput(_refusal(shown, SPECIAL)) from error
        raise
    try:
        status = os.fstat(file)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(shown))
        if not stat.S_ISREG(status.st_mode):
            raise RefusedInput(_refusal(shown, SPECIAL))
        if flags & (os.O_WRONLY | os.O_RDWR) and status.st_nlink > 1:
            raise RefusedInput(_refusal(shown, f"is one of {status.st_nlink} names of the same file (hard links)"))
        if flags & os.O_TRUNC:
            os.ftruncate(file, 0)
    except BaseException:
        os.close(file)
        raise
    return file


def _read_mode(path: str, folder: int | None) -> int:
    try:
        return os.stat(path, dir_fd=folder, follow_symlinks=False).st_mode
    except OSError:
        return 0


def _refusal(path: Path, problem: str) -> str:
    return f"{path}: {problem}, and what is written there would arrive in another file; remove it and call again"


class Folder(AbstractContextManager):
    """An open folder: files below it are opened, replaced and removed by its descriptor and without following links.

    Names are relative, with `/` between their parts. Whoever moves the folder away and puts a link in its place gains
    nothing: the files arrive in the folder that was opened.
    """

    def __init__(self, path: Path, *, follow: bool = False):
        """Open a folder that exists.

        Args:
            follow: whether the path itself may be a link. The folders above it may be in any case: the user names them.

        Raises:
            RefusedInput: the path is a link, or no folder.
        """
        self.path, self._follow = path, follow
        try:
            self._descriptor = os.open(path, _IS_FOLDER & ~os.O_NOFOLLOW if follow else _IS_FOLDER)
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                raise RefusedInput(_refusal(path, "is a link, or no folder")) from error
            raise

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)

    def open(self, name: str, mode: Mode) -> int:
        """Open a file and return its descriptor, for `os.fdopen` or `io.FileIO`. Missing folders are made to write.

        Args:
            mode: read an existing file; append to one, which is made where it is missing; or make a new one in place
                of what has the name.

        Raises:
            RefusedInput: the name is not a plain one, or a link is on its way; what has the name is no file, or has a
                second name.
            FileNotFoundError: there is no file to read.
        """
        with self._parent(name, create=mode != "read") as (parent, base):
            if mode == "new":
                with suppress(FileNotFoundError):
                    os.unlink(base, dir_fd=parent)
            return _open_plain(base, _FLAGS[mode], parent, self.path / name)

    def replace(self, old: str, new: str) -> None:
        """Rename a file to a name in the same folder, in place of what has it, and flush the folder to the disk."""
        assert old.rpartition("/")[0] == new.rpartition("/")[0], (old, new)
        with self._parent(old) as (parent, base):
            os.replace(base, new.rpartition("/")[2], src_dir_fd=parent, dst_dir_fd=parent)
            sync_open_folder(parent)

    def remove(self, name: str) -> None:
        """Remove a file, or a link and not what it leads to; a missing one is no error."""
        with suppress(FileNotFoundError), self._parent(name) as (parent, base):
            os.unlink(base, dir_fd=parent)

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        with os.fdopen(self.open(name, "read"), "rb") as file:
            return file.read()

    def write(self, name: str, content: bytes) -> None:
        """Replace a file by `content`, flushed to the disk before the rename."""
        with os.fdopen(self.open(name + PARTIAL, "new"), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self.replace(name + PARTIAL, name)

    def copy(self, path: Path, name: str) -> None:
        """Replace a file by a copy of the file at `path`, flushed to the disk before the rename."""
        with path.open("rb") as source, os.fdopen(self.open(name + PARTIAL, "new"), "wb") as file:
            shutil.copyfileobj(source, file, COPIED_BYTES)
            file.flush()
            os.fsync(file.fileno())
        self.replace(name + PARTIAL, name)

    def remove_others(self, names: set[str]) -> None:
        """Remove the files and links that `names` does not list, and the folders that are empty then."""
        for root, folders, files, parent in os.fwalk(".", topdown=False, dir_fd=self._descriptor):
            for base in files:
                if PurePosixPath(root, base).as_posix() not in names:
                    os.unlink(base, dir_fd=parent)
            for base in folders:
                if stat.S_ISLNK(_read_mode(base, parent)):
                    os.unlink(base, dir_fd=parent)
                else:
                    with suppress(OSError):  # it holds files that stay
                        os.rmdir(base, dir_fd=parent)

    def require_in_place(self) -> None:
        """Check that the folder still has its path.

        Raises:
            DamagedData: another one lies there.
        """
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.path, follow_symlinks=self._follow), os.fstat(self._descriptor)):
                return
        raise DamagedData(
            f"{self.path}: another folder or a link was put in its place while it was written; write to a folder whose "
            "parent only you can change"
        )

    def _parent(self, name: str, *, create: bool = False) -> "_Parent":
        check_name(name, str(self.path))
        *parts, base = name.split("/")
        return _Parent(self._descriptor, self.path, parts, base, create)


class _Parent(AbstractContextManager):
    """The descriptor of the folder that a name lies in, and the name in it; closed when the block ends."""

    def __init__(self, top: int, path: Path, parts: list[str], base: str, create: bool):
        self._base, self._descriptor = base, os.dup(top)
        try:
            for number, part in enumerate(parts, 1):
                inner = _open_folder(part, self._descriptor, path.joinpath(*parts[:number]), create)
                os.close(self._descriptor)
                self._descriptor = inner
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> tuple[int, str]:
        return self._descriptor, self._base

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)


def _open_folder(name: str, parent: int, shown: Path, create: bool) -> int:
    """Open a folder of an open folder and return its descriptor; make it where it is missing and `create`."""
    if create:
        with suppress(FileExistsError):
            os.mkdir(name, dir_fd=parent)
    try:
        return os.open(name, _IS_FOLDER, dir_fd=parent)
    except OSError as error:
        if stat.S_ISLNK(_read_mode(name, parent)):
            raise RefusedInput(_refusal(shown, "is a link")) from error
        raise
