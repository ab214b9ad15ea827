"""SeqIO tasks and mixtures of calrec_jax. Imports TensorFlow; import it by its full name, `calrec_jax.tasks`."""

from calrec_jax.tasks.registry import CalrecMixture, register_dataset, register_mixture, register_run, task_source
from calrec_jax.tasks.source import CalrecDataSource, CatalogueSpace

__all__ = [
    "CalrecDataSource",
    "CalrecMixture",
    "CatalogueSpace",
    "register_dataset",
    "register_mixture",
    "register_run",
    "task_source",
]
