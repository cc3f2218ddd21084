"""Records that grow on disk batch by batch, and survive the process that wrote them."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from vlm_jax.errors import UserError, unwritten
from vlm_jax.runs.processes import Team, first, gathered, is_first


class LogFolder(Protocol):
    """What a log needs of the folder that it grows in; :class:`vlm_jax.runs.folder.Run` is one."""

    folder: Path

    def begin(self) -> None: ...
    def path(self, name: str) -> Path: ...
    def save_lines(self, name: str, records: list[dict]) -> Path: ...
    def write_locally(self, name: str, writer: Callable[[Path], None]) -> None: ...


class Log:
    """Records that are on disk as soon as they are known, in an order that does not change from session to session.

    A killed run leaves a file that ends anywhere; what is kept of it are whole batches. Without a run, records are in
    memory alone. Of several processes every team writes its own share (:meth:`part`), until all are there
    (:meth:`join`).
    """

    def __init__(self, run: LogFolder | None = None, name: str = "", team: Team | None = None):
        self.run, self.name, self.joined = run, name, False
        self.writes = run is not None and (is_first() if team is None else team.writes)
        # Whoever writes also reads, for all who go by it.
        said = gathered(self._read() if self.writes else [])
        self.records: list[dict] = said[0 if team is None else team.index * len(said) // team.count]

    def _read(self) -> list[dict]:
        path = self.run.folder / self.name
        whole = path.read_bytes().rpartition(b"\n")[0] if path.is_file() else b""
        return [json.loads(line) for line in whole.splitlines()]

    def has(self, ids: Iterable[str]) -> bool:
        """Whether there is a record of each of these, and of nothing else."""
        return sorted(record["id"] for record in self.records) == sorted(ids)

    def part(self, team: Team, ids: Sequence[str]) -> "Log":
        """The log of a team's share: of one team, or where all is done, this log itself."""
        if team.count == 1:
            return self
        if self.has(ids):
            self.joined = True
            return self
        if self.run is not None:
            first(self.run.begin)  # the shares' folder says of which run it is before any of them is there
        name = Path(self.name)
        share = f"{name.stem}.{team.index + 1}-of-{team.count}{name.suffix}"
        return Log(self.run, str(name.with_name(share)), team)

    def join(self, part: "Log", ids: Sequence[str], team: Team) -> None:
        """Puts all teams' shares together, in the order of ``ids``; their own files go."""
        if part is self:
            return
        shares = gathered(part.records if team.writes else [])
        by_id = {record["id"]: record for share in shares for record in share}
        self.records = [by_id[name] for name in ids]
        if self.run is not None:
            self.run.save_lines(self.name, self.records)
            name = Path(self.name)
            for share in (self.run.folder / name.parent).glob(f"{name.stem}.*-of-*{name.suffix}") if is_first() else ():
                share.unlink()

    def missing(
        self, batches: Iterable[tuple[Sequence[int], Any]], ids: Sequence[str]
    ) -> Iterator[tuple[Sequence[int], Any]]:
        """Those of the batches (rows and content) whose records are not all there. What follows the first of them is
        taken back: :meth:`append` its records, a row each, before the next one is asked for.

        Args:
            ids: of every row, what its record has as ``id``.

        Raises:
            UserError: if two rows have the same id, or if a record has another than its row.
        """
        twice = [name for name, count in Counter(ids).items() if count > 1]
        if twice:
            raise UserError(f"two samples have the id {twice[0]!r}: give every sample an id of its own")
        if self.joined:  # in an order of its own
            for _ in batches:  # whoever counts them sees all
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
        """Writes the records of one batch and makes sure that they are on the disk."""
        if not self.writes:
            self.records += records
            return
        if not self.records and is_first():
            self.run.write_locally(self.name, lambda path: path.write_bytes(b""))
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        try:
            with open(self.run.path(self.name), "ab") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise unwritten(self.run.folder / self.name, error) from None
        self.records += [json.loads(line) for line in text.encode().splitlines()]

    def _check(self, places: Iterable[int], ids: set[str]) -> None:
        """Refuses records at these places that are of none of these samples."""
        for place in places:
            if (found := self.records[place].get("id")) not in ids:
                where = "the log" if self.run is None else self.run.folder / self.name
                raise UserError(
                    f"{where} holds records of other samples (record {place + 1} is of {found!r}): the data changed "
                    "since, choose another --out"
                )

    def _keep(self, count: int) -> None:
        """Cuts the file after ``count`` records."""
        self.records = self.records[:count]
        if self.writes and (path := self.run.folder / self.name).is_file():
            with open(path, "rb+") as file:
                for _ in range(count):
                    file.readline()
                file.truncate(file.tell())
