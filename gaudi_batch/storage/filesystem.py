"""Opens the fsspec filesystem of a URL, with the settings that each store's library needs."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import sync

from gaudi_batch.errors import InputError
from gaudi_batch.redaction import learn, learn_url, redact
from gaudi_batch.storage.retry import BucketGone, no_credentials, status_of
from gaudi_batch.storage.waits import told_if_slow

log = logging.getLogger(__name__)

S3_CONFIG: Mapping[str, Any] = {"connect_timeout": 10, "read_timeout": 20, "retries": {"max_attempts": 2}}
"""What botocore gets unless the options say otherwise: a request that stalls three times ends within a minute, as one
try of ours may take. A few of its own it must have: a listing is many requests, and one that fails would start it all
over."""
STORES = ("file", "local", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
"""Protocols whose objects are seen whole or not at all. File servers show half-written files, and their connections
serve one thread at a time."""
READ_ONLY = ("http", "https", "hf")
"""Protocols that prompts are read from, too."""


def open_filesystem(url: str, options: Mapping[str, Any], read_only: bool = False) -> tuple[Any, str]:
    """The fsspec filesystem of a URL, with caches of listings off, and the path inside it.

    Args:
        url: a URL or a local path.
        options: fsspec storage options.
        read_only: whether nothing is to be written there.

    Raises:
        InputError: the protocol is none of those, its package is missing, or the options do not fit it.
    """
    learn(options)
    learn_url(url)
    try:
        protocol = fsspec.core.split_protocol(url)[0]
        if protocol in ("memory", "memoryfs"):
            raise InputError(f"{url!r}: memory:// lives in one process only, and cards are other processes")
        if "::" in url:
            raise InputError(f"{redact(url)!r}: URLs that are chained by :: are not opened; give that of the files")
        if protocol not in (None, *STORES, *(READ_ONLY if read_only else ())):
            raise InputError(
                f"{redact(url)!r}: prompts and output lie on a local or shared file system, in S3 (s3://), Google Cloud"
                " Storage (gs://) or Azure (az://, abfs://), and prompts behind http(s):// or hf://, too; mount what is"
                f" behind {protocol}:// on every node and give its path"
            )
        if protocol in ("s3", "s3a"):
            # A copy, since botocore changes it. Without concurrency a read is one request, without another one before
            # it for the size.
            config = {**copy.deepcopy(dict(S3_CONFIG)), **(options.get("config_kwargs") or {})}
            options = {"max_concurrency": 1, **options, "config_kwargs": config}
        waits_for = "connecting" if protocol in READ_ONLY else "looking for credentials"
        with told_if_slow(lambda: f"{redact(url)}: still {waits_for}"):
            filesystem, path = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True, **options)
    except InputError:
        raise
    except ImportError as error:
        extra = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}
        way_out = f"; pip install 'gaudi-batch[{extra[protocol]}]'" if protocol in extra else ""
        raise InputError(f"{redact(url)!r} can't be opened: {error}{way_out}") from None
    except Exception as error:
        raise InputError(f"{redact(url)!r} can't be opened: {redact(str(error), options)}") from None
    if _is_anonymous_for_want(filesystem):
        log.warning(
            "%s: no credentials of Google Cloud are found, so it is asked anonymously; the storage option token: anon"
            " says so at once",
            redact(url),
        )
    return filesystem, path


def is_s3(filesystem: Any) -> bool:
    """Whether it is s3fs."""
    return type(filesystem).__name__ == "S3FileSystem"


def is_azure(filesystem: Any) -> bool:
    """Whether it is adlfs."""
    return type(filesystem).__name__ == "AzureBlobFileSystem"


def is_google(filesystem: Any) -> bool:
    """Whether it is gcsfs."""
    return type(filesystem).__name__ in ("GCSFileSystem", "ExtendedGcsFileSystem")


def require_bucket(filesystem: Any, path: str, seconds: float) -> None:
    """Asks Google or Azure whether the bucket of a path exists, where their libraries have not said what is missing.
    S3's library always says.

    It asks by a listing of one object: who may only use objects may not ask for a bucket itself. That is one request
    for each object that is absent, beside the hundreds of the images of a shard.

    Raises:
        Exception: it is not there, as `bucket_is_gone` knows it, or that can't be found out.
    """
    if is_google(filesystem):
        bucket = filesystem.split_path(path)[0]
        try:
            filesystem.call("GET", "b/{}/o", bucket, maxResults=1, timeout=seconds)
        except FileNotFoundError:
            raise BucketGone(f"the bucket {bucket!r} is not there") from None
    elif is_azure(filesystem):
        sync(filesystem.loop, _list_one, filesystem, filesystem.split_path(path)[0], timeout=seconds)


async def _list_one(filesystem: Any, container: str) -> None:
    async with filesystem.service_client.get_container_client(container) as client:
        async for _ in client.list_blobs(results_per_page=1):
            break


def subdue(filesystem: Any) -> None:
    """s3fs would try five times what botocore has tried already, Azure's library waits 15 s before it does so the first
    time, and gcsfs prints every error that it raises. A copy in another process forgets this."""
    if is_s3(filesystem):
        filesystem.retries = 1
    elif is_azure(filesystem):
        policy = filesystem.service_client._config.retry_policy
        policy.initial_backoff = policy.random_jitter_range = 1
    elif is_google(filesystem):
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def _is_anonymous_for_want(filesystem: Any) -> bool:
    """Whether gcsfs found no credentials and was not told to do without."""
    if not is_google(filesystem):
        return False
    return filesystem.credentials.method == "anon" and filesystem.credentials.token is None


def lacks_credentials(filesystem: Any, error: BaseException) -> bool:
    """Whether a store was asked without credentials because none could be had, or could not be asked so. gcsfs then
    asks anonymously, or says what a store says of wrong ones."""
    if no_credentials(error) or type(error.__cause__).__name__ == "RefreshError":
        return True
    return _is_anonymous_for_want(filesystem) and status_of(error) in (401, 403)


def search_credentials_again(filesystem: Any) -> None:
    """Makes the library look for credentials again: s3fs keeps a client that found none, and gcsfs remembers that there
    are none. Other libraries look at each request."""
    if is_s3(filesystem):
        filesystem.connect(refresh=True)
    elif _is_anonymous_for_want(filesystem):
        filesystem.credentials.connect()


def expanded(path: str) -> Path:
    """A path with `~` filled in; unchanged if the home is unknown, as without HOME in a container."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
