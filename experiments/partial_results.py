"""Finished parts of a long measurement, in a file from which a run that was cut off goes on.

One JSON object a line: a header, what the measurement depends on, then one record for each row of
a stage (an image, or a knob). Lines are appended and synced; one that a cut left unfinished is
dropped when the file is opened again, so that a record is whole or absent and a cut costs what came
after the last `add`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Hashable
from pathlib import Path

from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import atomic_path, check_same_header


class PartialResults:
    """Records of the file `path`, by (stage, row): plain JSON values, NaN among them.

    header: JSON values. A file that was begun with another one is begun `anew`, or refused by a
    InputError; so is one that is damaged.
    """

    def __init__(self, path: Path, header: dict, *, anew: bool = False) -> None:
        self.path, self.records = path, {}
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # the last is unended
        try:
            begun, *records = map(json.loads, lines or [json.dumps(header)])
            begun.items()  # of anything but an object there are none
            self.records = {(r["stage"], r["row"]): r["values"] for r in records}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{path} is damaged: remove it and start again") from None
        if anew and begun != header:
            lines, self.records = [], {}
        else:
            check_same_header(str(path), begun, header, "remove it to start anew")
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            whole = [json.dumps(header).encode(), *lines[1:]]
            temporary.write_bytes(b"".join(line + b"\n" for line in whole))

    def add(self, stage: str, values: dict[Hashable, dict]) -> None:
        """Keep the values of some rows, row → values, for good."""
        records = [{"stage": stage, "row": row, "values": v} for row, v in values.items()]
        try:
            with open(self.path, "ab") as file:
                file.write(b"".join(json.dumps(r).encode() + b"\n" for r in records))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            error.filename = str(self.path)  # a write that fails does not say where
            raise
        self.records |= {(stage, row): v for row, v in values.items()}

    def remove(self) -> None:
        """All is done and written elsewhere."""
        self.path.unlink(missing_ok=True)
