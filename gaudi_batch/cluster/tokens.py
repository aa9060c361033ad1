"""The token that a Ray cluster asks for, and where this process has it from."""

from __future__ import annotations

import os
from pathlib import Path

from gaudi_batch.storage.filesystem import expanded

FILE = "~/.ray/auth_token"
MODE, TOKEN, PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


def where_token_is() -> str | None:
    """Where Ray takes a token from in this process: a variable or a file; None if there is none."""
    if os.environ.get(TOKEN):
        return TOKEN
    if path := os.environ.get(PATH):
        return f"{PATH}={path}" if Path(path).is_file() else None
    return FILE if expanded(FILE).is_file() else None


def what_token_lacks() -> str:
    """What to do if a cluster asks for a token and refuses this process."""
    where, mode, path = where_token_is(), os.environ.get(MODE), os.environ.get(PATH)
    kept_back = mode is not None and mode.lower() != "token"
    if where and kept_back:
        return f"a token is here ({where}), and {MODE}={mode} keeps it back: set {MODE}=token"
    if where:
        return f"the token that is here ({where}) may not be the cluster's"
    missing = f"{PATH} names {path}, which is no file" if path and not os.environ.get(TOKEN) else "no token is here"
    mode_too = f", and set {MODE}=token, which is {mode} here" if kept_back else ""
    if mode and not kept_back:
        mode_too = f"; unset {MODE} if that cluster asks for none"
    return f"{missing}: put the cluster's into {FILE}, or into {TOKEN}{mode_too}"
