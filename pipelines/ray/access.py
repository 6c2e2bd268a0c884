"""Who may use a Ray that is started here: this user alone, on this machine.

Whoever reaches one of Ray's ports with its token can run code as its owner. Ray 2.60 makes a token in ~/.ray/auth_token
by itself, which every user can read where the home is open, and which all clusters of a user share. So each run has its
own, in the folder of its Ray, which nobody else may enter.
"""

import os
import secrets
from pathlib import Path

TOKEN_FILE = "token"
"""Name of the file with the token, in the folder that holds Ray's own."""
RAY_FOLDER = "ray"
"""Name of Ray's own folder. Ray opens it to everybody (mode 777), so it lies in one that is closed."""
MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
"""Variables from which Ray reads whether it asks for a token, and the token or the file that holds it."""

Variables = dict[str, str | None]


def close_to_others(folder: Path) -> Variables:
    """Make a token in `folder`, let Ray ask for it in this process and its children, and return the former variables.

    Args:
        folder: a folder with mode 700.
    """
    path = folder / TOKEN_FILE
    with open(path, "x", encoding="ascii", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(secrets.token_hex(32))
    former: Variables = {name: os.environ.get(name) for name in (MODE, TOKEN, TOKEN_PATH)}
    # The file and not the variable: Ray's dashboard and `ps e` show variables more readily than a closed folder.
    set_variables({MODE: "token", TOKEN: None, TOKEN_PATH: str(path)})
    return former


def set_variables(variables: Variables) -> None:
    """Set variables of the environment; None removes one."""
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
