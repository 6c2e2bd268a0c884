"""Keep keys out of what is written: addresses that hold one are refused, and messages are printed without them.

Keys come from the environment (HF_TOKEN, AWS_SECRET_ACCESS_KEY, ...) or from files that only a library reads. Nothing
of ours writes either. But an error of a library may quote the address that it asked, with a signature in it, and a user
may write a key into an address.
"""

import os
import re

HIDDEN = "***"
"""What is printed in place of a key."""
_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(API|ACCESS|ACCOUNT|PRIVATE|AUTH)_?KEY", re.IGNORECASE)
"""Variables whose values are keys."""
_NO_KEY = re.compile(r"_(PATH|FILE|ID|NAME|URL|URI|DIR)$|TOKENIZER|AWS_ACCESS_KEY_ID", re.IGNORECASE)
"""Those of them that say where a key is, or whose it is."""
SHORTEST = 8
"""Characters of the shortest value that is hidden: a shorter one is a word or a number that messages hold anyway."""
# `Path` makes one slash of two.
_LOGINS = (
    re.compile(r"(\w:/{1,2})[^/@\s:]*:[^/@\s]+@"),
    re.compile(r"(https?:/{1,2})[^/@\s]+@", re.IGNORECASE),  # a token alone
    re.compile(
        r"((?:s3a?|gs):/{1,2})[^/@\s:]*:[^@\s]+@", re.IGNORECASE
    ),  # a key of S3 may have slashes, a bucket no colon
)
_QUERY = re.compile(
    r"([?&;](?:[\w-]*(?:signature|credential|token|secret|password|api[_-]?key|access[_-]?key)[\w-]*|sig|key|auth)=)"
    r"(?!\*{3})[^&#\s'\")]+",
    re.IGNORECASE,
)
"""What follows the name of a signature or a key in an address."""


def hide_keys(text: str) -> str:
    """Return a text with *** in place of logins and signatures of addresses, and of the values of secret variables."""
    for value in _read_values():
        text = text.replace(value, HIDDEN)
    for pattern in _LOGINS:
        text = pattern.sub(rf"\1{HIDDEN}@", text)
    return _QUERY.sub(rf"\1{HIDDEN}", text)


def holds_key(text: str) -> bool:
    """Return whether a text, such as an address, holds what `hide_keys` would hide."""
    return hide_keys(text) != text


def _read_values() -> list[str]:
    """Return the values of the environment's secret variables, the longest first: one may hold another."""
    values = {
        value for name, value in os.environ.items()
        if len(value) >= SHORTEST and _NAME.search(name) and not _NO_KEY.search(name)
    }  # fmt: skip
    return sorted(values, key=len, reverse=True)
