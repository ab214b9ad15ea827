"""What `calrec quickstart` adds to the line: the raw dumps of a synthetic shop, written into the run folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calrec_jax import artifacts

if TYPE_CHECKING:
    from calrec_jax.pipeline import Line

GIN_FILE = "runs/quickstart.gin"
RUN_DIR = "calrec_quickstart"


def make_shop(line: Line) -> None:
    """Writes the dumps of the run's categories, unless they are there.

    Raises:
      CalrecError: a category that the shop does not have; dumps of other settings are there; no space is left.
    """
    from calrec_jax.data.shop import Shop, write_shop

    shop = Shop()
    settings = {"shop": shop, "categories": sorted(line.all_categories)}
    with line.step("shop", line.layout.raw):
        if not artifacts.is_done(line.layout.raw, kind="shop", made_from={}, settings=settings):
            files = write_shop(line.layout.raw, shop, line.all_categories)
            artifacts.write_manifest(line.layout.raw, kind="shop", made_from={}, settings=settings, dirt=files.dirt)
