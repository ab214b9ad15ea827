r"""Registers the tasks of the run folder in the environment variable CALREC_RUN_DIR when it is imported.

For programs that take the name of a module and import it:

    CALREC_RUN_DIR=runs/toys seqio_cache_tasks --module_import=calrec_jax.tasks.run_folder --tasks='calrec_.*' \
        --output_cache_dir=runs/toys/cache
"""

import os

from calrec_jax.errors import CalrecError
from calrec_jax.tasks.registry import register_run

VARIABLE = "CALREC_RUN_DIR"

if not os.environ.get(VARIABLE):
    raise CalrecError(f"{VARIABLE} is not set: calrec_jax.tasks.run_folder registers the tasks of the run folder there")
NAMES = register_run(os.path.expanduser(os.environ[VARIABLE]))
