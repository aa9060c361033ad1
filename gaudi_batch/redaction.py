"""What is secret in texts and options, and how it is kept out of logs, records and job lists."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

SECRET_VARIABLE = re.compile(r"(AWS|AZURE|HF|GOOGLE)_\w*(SECRET|TOKEN|KEY|PASSWORD|CONNECTION_STRING)\w*")
SECRET_KEY = re.compile(r"key|secret|token|pass|pwd|sas|credential|auth|connection_string|header|cookie", re.IGNORECASE)
SHORTEST_SECRET = 4
SHORTEST_CERTAIN_SECRET = 8
"""Of a variable: a shorter value may stand in a name by chance, as `test` does in `latest`."""
_PASSWORD = re.compile(r"\w+://[^/?#:@]*:[^@]*@")
_USER = re.compile(r"\b(?!(?:abfss?|az|hdfs|sftp|smb|ssh|wasbs?):)\w+://[^/?#]*@", re.IGNORECASE)
"""A user name, which may be a token; these schemes have a container or an account there."""
_QUERY = re.compile(r"https?://[^?#]*\?|\w+://[^?]*\?[^/?#]*\w=", re.IGNORECASE)
"""`?` alone is a wildcard in the paths of stores."""
_URL_USERINFO = re.compile(r"(\w+://)(?:[^\s'\"]+|[^\s/?#]+)@")
_URL_QUERY = re.compile(r"(\w+://[^\s?'\"]+)\?[^\s'\"]+")


def redact(text: str, options: Mapping[str, Any] | None = None) -> str:
    """Takes secrets out of a text: user names, passwords and queries in URLs, and the values of `options` (fsspec
    storage options) and of the environment whose names say that they are secret."""
    variables = {name: value for name, value in os.environ.items() if SECRET_VARIABLE.fullmatch(name)}
    for secret in sorted(_secrets(variables, True) | _secrets(options or {}), key=len, reverse=True):
        text = text.replace(secret, "***")
    return _URL_QUERY.sub(r"\1?***", _URL_USERINFO.sub(r"\1***@", text))


def has_secret(url: str) -> bool:
    """Whether a URL has a secret in it: a password, a query such as that of a signed address, or the value of a secret
    variable of the environment. `redact` takes out more, such as the container's name in `abfs://box@account/path`."""
    variables = [value for name, value in os.environ.items() if SECRET_VARIABLE.fullmatch(name)]
    named = any(len(value) >= SHORTEST_CERTAIN_SECRET and value in url for value in variables)
    return bool(named or _PASSWORD.search(url) or _USER.search(url) or _QUERY.search(url))


def redacted_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same options with every value that may be a secret replaced by `***`, whatever lies below a secret name
    included."""
    return {key: _redacted(value, bool(SECRET_KEY.search(str(key)))) for key, value in options.items()}


def _redacted(value: Any, secret: bool) -> Any:
    if isinstance(value, Mapping):
        return {key: _redacted(item, secret or bool(SECRET_KEY.search(str(key)))) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redacted(item, secret) for item in value]
    if secret and not isinstance(value, bool) and value is not None:
        return "***"
    return redact(value) if isinstance(value, str) else value


def _secrets(value: Any, secret: bool = False) -> set[str]:
    if isinstance(value, Mapping):
        parts = [_secrets(item, secret or bool(SECRET_KEY.search(str(key)))) for key, item in value.items()]
        return set().union(*parts)
    if isinstance(value, (list, tuple)):
        return set().union(*(_secrets(item, secret) for item in value))
    text = str(value)
    return {text} if secret and not isinstance(value, bool) and len(text) >= SHORTEST_SECRET else set()
