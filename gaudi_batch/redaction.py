"""What is taken for secret, and where it is taken out.

Secret are

- in a URL: a user name with a password (`s3://key:secret@bucket`); a user name alone, which may be a token, unless the
  scheme has a container, an account or a repository there (`abfs://box@account`, `sftp://me@host`); the query of an
  http(s) URL, which may sign it, and any other in which a name says that its value is secret (`?sig=...`). An `@` or a
  `?` in a path is a part of it.
- of storage options: all under a name that says so (`SECRET_KEY`), and what is secret in their URLs.
- of a job: who is told of its end (`on_end`), as whoever knows the URL of a webhook may post to it.
- of the environment: the values of variables whose names say so (`SECRET_VARIABLE`).

In texts, values of options and variables are found from 8 characters on: a shorter one stands in names by chance, as
`test` does in `latest`.

They are taken out of all that is written down or told: log lines (`OneLineFormatter`), errors (`GaudiBatchError`), also
in manifests, tracebacks, run.json, the process title, `repr` of a `JobConfig`. What a program goes on with is as it was
given: the fields of a `JobConfig`, and `RunResult.output`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

SECRET_VARIABLE = re.compile(
    r"(?!PWD$|\w*_(?:FILE|PATH|DIR|URL|URI|ENDPOINT|NAME|MODE|TYPE)$"  # these say where it is, or how it is used
    r"|(?:\w*_)?(?:MAX|MIN|NUM)_(?:\w*_)?TOKENS$)"  # of a text
    r"(?:\w*_)?(?:"
    r"(?:SECRETS?|TOKEN|\w*PASSWORD|PASSWD|PASSPHRASE|PWD|APIKEY|CONNECTION_STRING|(?:API|ACCESS|ACCOUNT|PRIVATE)_KEY"
    r"|(?:AWS|AZURE|GCP|GCS|GOOGLE|HF|S3)_(?:\w+_)?(?:KEY|SAS))(?:_\w+)?"
    # Of a key that none of these is, the id is no secret.
    r"|(?:TOKENS|PASS|PAT|CREDENTIALS?|(?!(?:PUBLIC|SORT|PARTITION|CACHE)_)[A-Z0-9]+_KEYS?)(?:_(?:\d+|JSON|B64|BASE64))?"
    r")",
    re.IGNORECASE,
)
SECRET_KEY = re.compile(
    r"key|secret|token|pass|pwd|sas|credential|auth|connection_string|header|cookie|on_end", re.IGNORECASE
)
NO_SECRETS = frozenset(("anon", "browser", "cache", "cloud", "google_default"))
"""What `token` may be in gcsfs beside a token: ways to come to one."""
SHORTEST_SECRET = 8
"""Characters of one that is looked for in texts."""
_NAMES = "abfss?|adl|az|wasbs?|(?:web)?hdfs|viewfs|hf|ftps?|scp|sftp|ssh|smb"
"""Schemes with a name before the @ that is no secret: a container, an account, a repository."""
_URL = r"(?<![\w+.-])\w[\w+.-]{0,30}://"
_PASSWORD = re.compile(
    # Not the port of http://host:80/me@here, nor the colons of s3://arn:... and of zip://a::s3://b. The numbers keep
    # the search linear in a text that has been made to be long.
    rf"({_URL})(?!arn:)[^\s/?#:@'\"\[]{{0,500}}:(?!:|\d{{1,5}}(?:[\s/?#'\",]|$))(?:[^\s/?#]{{0,2000}}|[^\s@'\"]{{0,500}})@"
)
_USER = re.compile(rf"((?!(?:{_NAMES}):){_URL})[^\s/?#@'\"]{{1,2000}}@", re.IGNORECASE)
_QUERY = re.compile(rf"({_URL}[^\s?'\"]{{0,2000}})\?([^\s'\"]+)")
_SECRET_PARAMETER = re.compile(rf"(?:^|&)[^=&]*(?:{SECRET_KEY.pattern}|sig)[^=&]*=", re.IGNORECASE)
_OF_CONNECTION = re.compile(r"(?:Key|Signature)=([^;]+)")
"""The secret parts of a connection string of Azure."""
_PATH = re.compile(r"[/~.].*|[^{]*\.json")
"""A value that says where credentials are."""
_PLACE = re.compile(r"_ur[il]$")
"""Names in the JSON of credentials of which the values are public: `token_uri`, `auth_provider_x509_cert_url`."""
_learned: set[str] = set()


def learn(options: Mapping[str, Any]) -> None:
    """Has `redact` know what is secret in storage options for as long as the process lives."""
    _learned.update(_secrets(options))


def learn_url(url: str) -> None:
    """Has `redact` know the password of a URL wherever a library repeats it, also as the store gets it."""
    user, _, password = url.partition("://")[2].rpartition("@")[0].partition(":")
    if user and password and redact(url) != url:
        learn({"password": password})
        learn({"password": unquote(password)})


def redact(text: str, options: Mapping[str, Any] | None = None) -> str:
    """A text with `***` in place of what is secret in its URLs, in `options` (fsspec storage options), in those that
    were learned, and in the environment."""
    secrets = _learned | _secrets(options or {})
    for name, value in os.environ.items():
        if SECRET_VARIABLE.fullmatch(name):
            secrets |= _secrets_of_variable(name, value)
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    text = _USER.sub(r"\1***@", _PASSWORD.sub(r"\1***@", text))
    return _QUERY.sub(_without_query, text)


def has_secret(text: str) -> bool:
    """Whether there is a secret in a URL."""
    return redact(text) != text


def redacted_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same options with every value that is secret replaced by `***`, whatever lies below a secret name
    included."""
    return {key: _redacted(value, _is_secret(key)) for key, value in options.items()}


def _without_query(match: re.Match[str]) -> str:
    place, query = match.groups()
    secret = place.lower().startswith(("http://", "https://")) or _SECRET_PARAMETER.search(query.partition("/")[0])
    return f"{place}?***" if secret else match[0]


def _is_secret(name: object) -> bool:
    return SECRET_KEY.search(str(name)) is not None


def _redacted(value: Any, secret: bool) -> Any:
    if isinstance(value, Mapping):
        return {key: _redacted(item, secret or _is_secret(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redacted(item, secret) for item in value]
    if secret and not (isinstance(value, bool) or value is None or str(value) in NO_SECRETS):
        return "***"
    return redact(value) if isinstance(value, str) else value


def _secrets(value: Any, secret: bool = False) -> set[str]:
    if isinstance(value, Mapping):
        return set().union(*(_secrets(item, secret or _is_secret(key)) for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return set().union(*(_secrets(item, secret) for item in value))
    return _forms(str(value)) if secret and str(value) not in NO_SECRETS else set()


def _secrets_of_variable(name: str, value: str) -> set[str]:
    """What is secret in the value of a variable with a secret name: all, unless it is the path of credentials; of JSON
    also what its own names say, and of several tokens each."""
    if "CREDENTIAL" in name.upper() and _PATH.fullmatch(value):
        return set()
    try:
        fields = json.loads(value)
    except (ValueError, RecursionError):
        fields = None
    if isinstance(fields, dict):
        return _forms(value) | _secrets({key: item for key, item in fields.items() if not _PLACE.search(key)})
    several = re.split(r"[,;\s]+", value) if name.upper().endswith(("TOKENS", "KEYS")) else ()
    return _forms(value).union(*map(_forms, several))


def _forms(secret: str) -> set[str]:
    """A secret as texts may have it: as it is, as a URL has it, its lines, and the parts of a connection string."""
    lines = [line for line in secret.splitlines() if not line.startswith("-----")]
    parts = [part for part in (secret, *lines, *_OF_CONNECTION.findall(secret)) if len(part) >= SHORTEST_SECRET]
    return {*parts, *(quote(part, safe="") for part in parts)}
