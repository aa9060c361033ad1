"""The command `export`, from its flags to what it prints."""

from __future__ import annotations

import argparse

from gaudi_batch.export.card import write_card
from gaudi_batch.export.export import CARD, ExportRequest, begin, describe_files, plan_export, write_parts
from gaudi_batch.export.names import DEFAULT_TEMPLATE
from gaudi_batch.export.push import claim, prepare, push, require_few_files
from gaudi_batch.text import counted, read_yaml


def export_run(parsed: argparse.Namespace) -> str:
    """Exports a run; returns what to print. Raises InputError or StorageError."""
    options = read_yaml(parsed.storage_options, dict, "--storage-options") if parsed.storage_options else {}
    target_options = read_yaml(parsed.target_options, dict, "--target-options") if parsed.target_options else None
    if parsed.push:
        prepare(parsed.push)
    request = ExportRequest(
        output=parsed.output,
        target=parsed.target,
        format=parsed.format,
        target_size=parsed.target_size,
        filters=parsed.filter,
        split=parsed.split,
        name=parsed.name or DEFAULT_TEMPLATE,
        complete=parsed.complete,
        storage_options=options,
        target_options=target_options,
    )
    planned = plan_export(request)
    if parsed.push:
        require_few_files(planned)
    begin(planned)
    url = claim(planned, parsed.push, private=parsed.private) if parsed.push else None
    write_parts(planned, parsed.address)
    describe_files(planned)
    write_card(planned)
    splits = ", ".join(f"{name} {count}" for name, count in planned.splits.items())
    lines = [
        f"{counted(len(planned.rows), 'row')} in {counted(len(planned.parts), 'part')} ({splits})",
        f"exported: {planned.target.url}",
        f"card:     {planned.target.url}/{CARD}",
    ]
    if url is not None:
        push(planned, parsed.push, url)
        lines.append(f"pushed:   {url}")
    return "\n".join(lines)
