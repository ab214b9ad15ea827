"""Raw files read into tables in memory, for tests of the readers and of what they read."""

import dataclasses
import shutil

import pyarrow as pa
import pyarrow.parquet as pq

from calrec_jax.data import readers, sources
from calrec_jax.data.quarantine import LineCounts


@dataclasses.dataclass(frozen=True)
class Read:
    """What was read, its staged tables in memory."""

    raw: readers.RawCategory
    interactions: pa.Table
    items: pa.Table
    reviews: LineCounts
    metadata: LineCounts


def read_files(reviews, metadata, quarantine, share, layout="2018", **settings):
    out = quarantine.with_name("staged")
    shutil.rmtree(out, ignore_errors=True)
    raw = readers.read(
        out,
        sources.find(reviews),
        sources.find(metadata),
        layout=layout,
        quarantine=quarantine,
        max_bad_share=share,
        **settings,
    )
    tables = (pq.read_table(folder) for folder in (raw.interactions, raw.items))
    return Read(raw, *tables, raw.reviews, raw.metadata)
