"""Results as tidy Parquet tables, one observation per row, for statistics in other tools."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from interventions.statistics.restoration import EPS


class Traced(Protocol):
    """A traced task: the parts of :class:`interventions.trace.result.TaskTrace` that the table needs."""

    @property
    def ids(self) -> Sequence[str]: ...
    @property
    def cells(self) -> Sequence[str]: ...
    @property
    def p_clean(self) -> Float[np.ndarray, "samples"]: ...
    @property
    def p_corrupt(self) -> Float[np.ndarray, "samples replicates"]: ...
    @property
    def te(self) -> Float[np.ndarray, "samples replicates"]: ...
    @property
    def ie(self) -> Float[np.ndarray, "samples replicates cells"]: ...


_EFFECTS = pa.schema(
    [("task", pa.string()), ("id", pa.string()), ("replicate", pa.int32()), ("cell", pa.string())]
    + [(name, pa.float64()) for name in ("p_clean", "p_corrupt", "te", "ie", "rr")]
)


def write_effects(path: Path, tasks: Mapping[str, Traced], eps: float = EPS) -> None:
    """Writes a Parquet file of one row per task, sample, replicate and cell. ``rr = ie / (te + eps)`` uses only
    that replicate. Samples with a small TE have a row too."""
    with pq.ParquetWriter(path, _EFFECTS, compression="zstd") as writer:
        for task, traced in tasks.items():
            count, replicates, cells = traced.ie.shape
            te = np.asarray(traced.te, float)
            numbers = {
                "p_clean": np.repeat(traced.p_clean, replicates * cells),
                "p_corrupt": np.repeat(traced.p_corrupt, cells),
                "te": np.repeat(te, cells),
                "ie": np.ravel(traced.ie),
                "rr": np.ravel(traced.ie / (te[..., None] + eps)),
            }
            names = {
                "task": _named([task], np.zeros(traced.ie.size, np.int32)),
                "id": _named(traced.ids, np.repeat(np.arange(count, dtype=np.int32), replicates * cells)),
                "replicate": np.tile(np.repeat(np.arange(replicates, dtype=np.int32), cells), count),
                "cell": _named(traced.cells, np.tile(np.arange(cells, dtype=np.int32), count * replicates)),
            }
            columns = names | {name: np.asarray(values, float) for name, values in numbers.items()}
            writer.write_table(pa.table(columns, schema=_EFFECTS))


def _named(names: Sequence[str], which: np.ndarray) -> pa.Array:
    return pa.DictionaryArray.from_arrays(which, pa.array(list(names), pa.string())).dictionary_decode()


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a Parquet file of rows, such as those of :func:`interventions.statistics.rr_summary`: a column per key.
    A column without any value is one of numbers."""
    table = pa.Table.from_pylist(list(rows))
    schema = pa.schema([f.with_type(pa.float64()) if pa.types.is_null(f.type) else f for f in table.schema])
    pq.write_table(table.cast(schema), path, compression="zstd")
