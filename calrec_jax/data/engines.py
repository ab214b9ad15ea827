"""Where the relational part runs: DuckDB in this process, out of core, or Spark and BigQuery by URL, through Ibis.

Notable: results leave the engine as Parquet and are read back row by row, so that nothing is held here but what is
being written. Tables are made under names of their own and dropped by a plain statement, and rows are never fetched as
record batches: under DuckDB 2.0 and sqlglot 30.30 Ibis 12 fails at both (`create_table(overwrite=True)`,
`Table.cache()` and `drop_table` write `DROP TABLE IF EXISTS` without a name, `to_pyarrow_batches` calls a method that
is gone).
"""

import contextlib
import importlib.util
import os
import re
import resource
import shutil
import sys
import urllib.parse
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ibis
from ibis.expr.types import Table

from calrec_jax.data.tables import Rows
from calrec_jax.errors import CalrecError

DUCKDB = "duckdb"
_EXTRAS = {"pyspark": ("pyspark", "spark"), "bigquery": ("google.cloud.bigquery", "bigquery")}
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B", re.I)


class Engine:
    """A connection, and the tables made on it.

    Attributes:
      connection: Ibis' own.
      version: name and version of the engine, for the data card.
    """

    def __init__(self, connection: Any, scratch: Path):
        self.connection = connection
        self.version = f"{connection.name} {connection.version}"
        self._scratch = scratch
        self._prefix = f"calrec_{uuid.uuid4().hex[:12]}"
        self._made = 0

    def read(self, pattern: str | Path) -> Table:
        """The rows of the Parquet files of a pattern."""
        return self.connection.read_parquet(str(pattern))

    def materialise(self, expression: Table) -> Table:
        """Runs an expression once, into a table of the engine."""
        self._made += 1
        return self.connection.create_table(f"{self._prefix}_{self._made}", expression)

    def drop(self, table: Table) -> None:
        """Drops a table that `materialise` made."""
        self.connection.raw_sql(f"DROP TABLE {table.get_name()}")

    def rows(self, expression: Table) -> list[dict[str, Any]]:
        """A small result."""
        return expression.to_pyarrow().to_pylist()

    def row(self, expression: Table) -> dict[str, Any]:
        """A result of one row."""
        (row,) = self.rows(expression)
        return row

    def export(self, expression: Table) -> Rows:
        """A result of any size, in the order that the expression gives it."""
        self._made += 1
        path = self._scratch / f"export_{self._made}.parquet"
        self.connection.to_parquet(expression, path)
        return Rows(sorted(path.glob("part-*.parquet")) if path.is_dir() else [path])


def check_engine(url: str, memory_limit: str, threads: int | None) -> None:
    """Raises a CalrecError for an engine that cannot be used here, or settings of it that mean nothing."""
    if not _BYTES.fullmatch(str(memory_limit)):
        raise CalrecError(f"prepare.memory_limit={memory_limit!r}: a number and its unit, such as '3GB' or '512MiB'.")
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise CalrecError(f"prepare.threads={threads!r}: a whole number from 1, or None for all cores.")
    if url == DUCKDB:
        return
    scheme = url.split("://")[0] if "://" in url else ""
    if scheme not in _EXTRAS:
        raise CalrecError(
            f"prepare.engine={url!r}: 'duckdb', or a URL such as 'pyspark://?spark.master=local[2]' or "
            "'bigquery://project/dataset'."
        )
    module, extra = _EXTRAS[scheme]
    if not _is_installed(module):
        raise CalrecError(
            f"prepare.engine={url!r} needs what is not installed: pip install -e '.[{extra}]', or leave "
            "prepare.engine at 'duckdb'."
        )
    if scheme == "pyspark" and "spark.remote" not in url and not _has_java():
        raise CalrecError(
            f"prepare.engine={url!r} needs Java 17 or later, and there is none: install it (for example "
            "openjdk-17-jre-headless) or set JAVA_HOME, or leave prepare.engine at 'duckdb'."
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def _has_java() -> bool:
    home = os.environ.get("JAVA_HOME")
    return bool(home and Path(home, "bin", "java").exists()) or shutil.which("java") is not None


@contextlib.contextmanager
def open_engine(url: str, scratch: Path, memory_limit: str, threads: int | None) -> Iterator[Engine]:
    """Connects, and disconnects when the block ends.

    Args:
      url: "duckdb", ``pyspark://?spark.master=local[2]`` (further settings of Spark after ``&``), or any other URL of
        `ibis.connect`.
      scratch: a folder for what does not fit the memory, and for results on their way out.
      memory_limit: of this process, DuckDB included: its buffers get what the process has not held so far, a third at
        least. With Spark, of its driver, unless the URL sets it.
      threads: of DuckDB; None: all cores.

    Raises:
      CalrecError: the engine cannot be reached, or the work needs more memory than it may have.
    """
    try:
        with _connected(url, scratch, memory_limit, threads) as connection:
            yield Engine(connection, scratch)
    except CalrecError:
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryException":  # DuckDB's own; it has no subclass to import by
            raise CalrecError(
                f"{error}. prepare.memory_limit={memory_limit!r} is too small for this category: raise it, or lower "
                "prepare.threads."
            ) from error
        raise


@contextlib.contextmanager
def _connected(url: str, scratch: Path, memory_limit: str, threads: int | None) -> Iterator[Any]:
    if url == DUCKDB:
        # Tables in memory, which spill beyond the limit: in a file each would be compressed and written, to be dropped.
        connection = ibis.duckdb.connect(
            ":memory:",
            memory_limit=f"{_left_of(_bytes(memory_limit))}B",
            temp_directory=str(scratch / "spill"),
            preserve_insertion_order=False,
            **({} if threads is None else {"threads": threads}),
        )
        try:
            connection.raw_sql("SET enable_progress_bar = false")  # it goes to stdout
            yield connection
        finally:
            connection.disconnect()
    elif url.startswith("pyspark://"):
        with _spark(url, scratch, memory_limit) as session:
            yield ibis.pyspark.connect(session)
    else:
        try:
            connection = ibis.connect(url)
        except Exception as error:
            raise CalrecError(f"prepare.engine={url!r} cannot be reached: {error}") from error
        yield connection


@contextlib.contextmanager
def _spark(url: str, scratch: Path, memory_limit: str) -> Iterator[Any]:
    """A session of the URL's settings, stopped at the end; one that is there already is used, and left alone."""
    from pyspark.sql import SparkSession

    given = dict(urllib.parse.parse_qsl(url.partition("?")[2]))
    there = SparkSession.getActiveSession()
    settings = {
        "spark.app.name": "calrec prepare",
        "spark.driver.memory": f"{_megabytes(memory_limit)}m",
        "spark.log.level": "ERROR",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.local.dir": str(scratch / "spill"),
        "spark.sql.warehouse.dir": str(scratch / "warehouse"),
        **given,
    }
    builder = SparkSession.builder
    for name, value in ({} if there is not None else settings).items():
        builder = builder.config(name, value)
    try:
        session = builder.getOrCreate()
    except Exception as error:
        raise CalrecError(f"prepare.engine={url!r}: Spark does not start: {error}") from error
    try:
        yield session
    finally:
        if there is None:
            session.stop()


def _megabytes(limit: str) -> int:
    return max(1, _bytes(limit) // 2**20)


def _bytes(limit: str) -> int:
    match = _BYTES.fullmatch(limit)
    assert match is not None
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(prefix.upper()) + 1))


def _left_of(limit: int) -> int:
    """What of a process's limit, in bytes, is left for DuckDB: all but a fifth and what was held so far, or a third.

    Loading it takes a tenth of a GiB, and it holds somewhat more than it counts, hence the fifth.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return max(limit // 3, limit * 4 // 5 - peak)
