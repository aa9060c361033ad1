"""How images are kept."""

from __future__ import annotations

from collections.abc import Mapping

from gaudi_batch.config.schema import JobConfig
from gaudi_batch.layout import IMAGES, attempt_name, data_path
from gaudi_batch.output.formats.base import Attempt, OutputFormat, WriteObject
from gaudi_batch.output.formats.files import FilesOutput
from gaudi_batch.output.formats.parquet import write_parquet
from gaudi_batch.output.formats.webdataset import write_tar
from gaudi_batch.output.formats.whole import WholeOutput
from gaudi_batch.output.manifest import FILES
from gaudi_batch.storage.store import Storage

WRITERS: Mapping[str, WriteObject] = {"webdataset": write_tar, "parquet": write_parquet}
"""The writers of objects with many images, by format."""
SUFFIXES = {"webdataset": "tar", "parquet": "parquet"}
"""What the names of these objects end with."""


def output_of(config: JobConfig, storage: Storage, attempt: Attempt) -> OutputFormat:
    """Where an attempt stores its images, in the format of the job."""
    if config.format == FILES:
        return FilesOutput(storage, config.encoding, attempt)
    return WholeOutput(storage, config.encoding, attempt, SUFFIXES[config.format], WRITERS[config.format])


def images_of(output_format: str, attempt: Attempt) -> str:
    """The directory or the object with the images of an attempt."""
    if output_format == FILES:
        return f"{IMAGES}/{attempt_name(*attempt)}"
    return data_path(*attempt, SUFFIXES[output_format])
