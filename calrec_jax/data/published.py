"""Where the releases of the Amazon Reviews dumps are published, and under which names."""

import dataclasses

SUBSETS = ("5core", "full", "ratings", "benchmark")
_UCSD = ("https://mcauleylab.ucsd.edu/public_datasets/data", "https://datarepo.eng.ucsd.edu/mcauley_group/data")


@dataclasses.dataclass(frozen=True)
class Release:
    """Where a release is published.

    Attributes:
      mirrors: URLs that the paths begin from, tried in this order.
      metadata: path of a category's metadata; `{category}` stands for its name.
      reviews: subset to paths of reviews.
      page: what its authors say about it: terms of use, what to cite.
    """

    mirrors: tuple[str, ...]
    metadata: str
    reviews: dict[str, tuple[str, ...]]
    page: str


RELEASES = {
    "2014": Release(
        ("https://snap.stanford.edu/data/amazon/productGraph/categoryFiles", f"{_UCSD[0]}/amazon/categoryFiles"),
        "meta_{category}.json.gz",
        {
            "5core": ("reviews_{category}_5.json.gz",),
            "full": ("reviews_{category}.json.gz",),
            "ratings": ("ratings_{category}.csv",),
        },
        "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html",
    ),
    "2018": Release(
        (*(f"{base}/amazon_v2" for base in _UCSD), "https://jmcauley.ucsd.edu/data/amazon_v2"),
        "metaFiles2/meta_{category}.json.gz",
        {
            "5core": ("categoryFilesSmall/{category}_5.json.gz",),
            "full": ("categoryFiles/{category}.json.gz",),
            "ratings": ("categoryFilesSmall/{category}.csv",),
        },
        "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon_v2/",
    ),
    "2023": Release(
        tuple(f"{base}/amazon_2023" for base in _UCSD),
        "raw/meta_categories/meta_{category}.jsonl.gz",
        {
            "full": ("raw/review_categories/{category}.jsonl.gz",),
            "ratings": ("benchmark/5core/rating_only/{category}.csv.gz",),
            "benchmark": tuple(
                f"benchmark/5core/last_out/{{category}}.{part}.csv.gz" for part in ("train", "valid", "test")
            ),
        },
        "https://amazon-reviews-2023.github.io/",
    ),
}
