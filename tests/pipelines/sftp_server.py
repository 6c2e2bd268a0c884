"""An SFTP server over a folder, in threads of this process: paramiko's server side, one user, one password."""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import paramiko

USER, PASSWORD = "tester", "secret"


class _Login(paramiko.ServerInterface):
    def check_auth_password(self, username, password):
        good = (username, password) == (USER, PASSWORD)
        return paramiko.AUTH_SUCCESSFUL if good else paramiko.AUTH_FAILED

    def check_channel_request(self, kind, chanid):
        return paramiko.OPEN_SUCCEEDED


class _Files(paramiko.SFTPServerInterface):
    def __init__(self, server, *args, root: Path, **kwargs):
        super().__init__(server, *args, **kwargs)
        self._root = root

    def _path(self, path: str) -> Path:
        return self._root / path.lstrip("/")

    def _answer(self, act):
        try:
            return act()
        except OSError as error:
            return paramiko.SFTPServer.convert_errno(error.errno)

    def list_folder(self, path):
        def act():
            return [paramiko.SFTPAttributes.from_stat(p.stat(), p.name) for p in self._path(path).iterdir()]

        return self._answer(act)

    def stat(self, path):
        return self._answer(lambda: paramiko.SFTPAttributes.from_stat(self._path(path).stat()))

    lstat = stat

    def open(self, path, flags, attr):
        def act():
            descriptor = os.open(self._path(path), flags, 0o644)
            handle = paramiko.SFTPHandle(flags)
            handle.readfile = handle.writefile = os.fdopen(descriptor, "rb" if flags & os.O_ACCMODE == 0 else "r+b")
            return handle

        return self._answer(act)

    def mkdir(self, path, attr):
        return self._answer(lambda: self._path(path).mkdir()) or paramiko.SFTP_OK


@contextlib.contextmanager
def serve(root: Path) -> Iterator[int]:
    """Serve `root` as /, give the port."""
    key, listener = paramiko.RSAKey.generate(2048), socket.create_server(("127.0.0.1", 0))
    transports = []

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            transport = paramiko.Transport(connection)
            transports.append(transport)
            transport.add_server_key(key)
            transport.set_subsystem_handler("sftp", paramiko.SFTPServer, _Files, root=root)
            transport.start_server(server=_Login())

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for transport in transports:
            transport.close()
