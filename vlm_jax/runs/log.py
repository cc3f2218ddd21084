"""A file of records that is written batch by batch, so that a run that was killed loses at most one batch."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from vlm_jax.errors import UserError, unwritten
from vlm_jax.files import parse_json
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.processes import Team, first, gathered, is_first


class LogFolder(Protocol):
    """The methods of a run folder that a log uses. :class:`vlm_jax.runs.folder.Run` has them."""

    folder: Path

    def begin(self) -> None: ...
    def path(self, name: str) -> Path: ...
    def save_lines(self, name: str, records: list[dict], artifact: Artifact | None) -> Path: ...
    def write_locally(self, name: str, writer: Callable[[Path], object], artifact: Artifact | None) -> None: ...


def records_of(path: Path, content: bytes) -> list[dict]:
    """The records in the content of a JSON Lines file that a run wrote.

    Raises:
        UserError: for a damaged line.
    """
    records = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            record = parse_json(line)
            assert isinstance(record, dict) and isinstance(record.get("id", ""), str)
        except (ValueError, AssertionError):
            raise UserError(
                f"{path}, line {number} is damaged: delete the file, and its samples are computed again"
            ) from None
        records.append(record)
    return records


class Log:
    """Records of samples. Each batch is written to disk when it is complete, in the same order in every session.

    If a run is killed, its file may end in the middle of a record. The next session keeps all complete batches. With
    several processes, each team writes its share to a separate file (:meth:`part`); in the end the shares are joined
    (:meth:`join`).

    Args:
        run: the folder of the file; None keeps the records in memory only.
        name: the file's name in the folder.
        team: the team whose share the file has; None for the file of all samples.
        artifact: the file's entry in ``artifacts.json``; None if it is not a result.
    """

    def __init__(
        self,
        run: LogFolder | None = None,
        name: str = "",
        team: Team | None = None,
        artifact: Artifact | None = None,
    ):
        self.run, self.name, self.artifact, self.joined = run, name, artifact, False
        self.writes = is_first() if team is None else team.writes
        # Only the process that writes the file reads it, and passes the records to the others.
        by_process = gathered(self._read(run) if run is not None and self.writes else [])
        self.records: list[dict] = by_process[0 if team is None else team.index * len(by_process) // team.count]

    def _read(self, run: LogFolder) -> list[dict]:
        """The complete records of the file."""
        path = run.folder / self.name
        whole = path.read_bytes().rpartition(b"\n")[0] if path.is_file() else b""
        return records_of(path, whole)

    def has(self, ids: Iterable[str]) -> bool:
        """Whether the log has exactly one record for each of these ids, and no others."""
        return sorted(str(record.get("id")) for record in self.records) == sorted(ids)

    def texts(self, field: str) -> dict[str, str]:
        """Id -> the text in a field of its record.

        Raises:
            UserError: for a record that has none.
        """
        found = {}
        for number, record in enumerate(self.records, 1):
            name, text = record.get("id"), record.get(field)
            if not isinstance(text, str) or not isinstance(name, str):
                log = "the log" if self.run is None else self.run.folder / self.name
                raise UserError(
                    f"{log}, line {number} is damaged (its id or {field} is no text): delete the file, and its samples "
                    "are computed again"
                )
            found[name] = text
        return found

    def part(self, team: Team, ids: Sequence[str]) -> "Log":
        """The log for one team's samples. If there is only one team, or if no record is missing, it is this log."""
        if team.count == 1:
            return self
        if self.has(ids):
            self.joined = True
            return self
        if self.run is not None:
            first(self.run.begin)  # writes the configuration before any team writes its share
        name = Path(self.name)
        share = f"{name.stem}.{team.index + 1}-of-{team.count}{name.suffix}"
        return Log(self.run, str(name.with_name(share)), team)

    def join(self, part: "Log", ids: Sequence[str], team: Team) -> None:
        """Puts the records of all teams into this log, in the order of ``ids``, and removes the teams' files."""
        if part is self:
            return
        shares = gathered(part.records if team.writes else [])
        by_id = {record["id"]: record for share in shares for record in share}
        self.records = [by_id[name] for name in ids]
        if self.run is not None:
            self.run.save_lines(self.name, self.records, self.artifact)
            name = Path(self.name)
            for share in (self.run.folder / name.parent).glob(f"{name.stem}.*-of-*{name.suffix}") if is_first() else ():
                share.unlink()

    def missing(
        self, batches: Iterable[tuple[Sequence[int], Any]], ids: Sequence[str]
    ) -> Iterator[tuple[Sequence[int], Any]]:
        """The batches for which the log lacks a record. Call :meth:`append` with the records of each batch, one for
        each row, before you ask for the next batch.

        All records after the first incomplete batch are removed, because the order of the records must not change.

        Args:
            batches: (rows, content) of each batch.
            ids: the id of every row. The row's record has it as ``id``.

        Yields:
            (Rows, content) of each batch.

        Raises:
            UserError: if two rows have the same id, or if a record's id is not that of its row.
        """
        twice = [name for name, count in Counter(ids).items() if count > 1]
        if twice:
            raise UserError(f"two samples have the id {twice[0]!r}: give every sample another id")
        if self.joined:  # nothing is missing, and the records are not in the order of the batches
            for _ in batches:  # the caller counts shapes while it makes batches
                pass
            return
        self._check(range(len(self.records)), set(ids))
        done, cut = 0, False
        for rows, batch in batches:
            if not cut and done + len(rows) <= len(self.records):
                for row in rows:
                    self._check([done], {ids[row]})
                    done += 1
                continue
            if not cut:
                self._keep(done)
                cut = True
            yield rows, batch
        if not cut:
            self._keep(done)

    def append(self, records: Sequence[dict]) -> None:
        """Writes the records of one batch to the disk."""
        if self.run is None or not self.writes:
            self.records += records
            return
        if not self.records and is_first():
            self.run.write_locally(self.name, lambda path: path.write_bytes(b""), self.artifact)
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        try:
            with open(self.run.path(self.name), "ab") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise unwritten(self.run.folder / self.name, error) from None
        self.records += [json.loads(line) for line in text.encode().splitlines()]

    def _check(self, numbers: Iterable[int], ids: set[str]) -> None:
        """Raises a UserError if one of the records with these numbers belongs to another sample than ``ids``."""
        for number in numbers:
            if (name := self.records[number].get("id")) not in ids:
                log = "the log" if self.run is None else self.run.folder / self.name
                raise UserError(
                    f"{log} holds records of other samples (record {number + 1} is of {name!r}): the data changed "
                    "since, choose another --out"
                )

    def _keep(self, count: int) -> None:
        """Removes all records after the first ``count``, also from the file."""
        self.records = self.records[:count]
        if self.run is not None and self.writes and (path := self.run.folder / self.name).is_file():
            with open(path, "rb+") as file:
                for _ in range(count):
                    file.readline()
                file.truncate(file.tell())
