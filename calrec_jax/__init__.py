"""CALRec in JAX: text-based generative sequential recommendation, from raw purchases to ranked items and a report.

Importing the package imports nothing heavy; `docs/architecture.md` says what each module is.
"""

__version__ = "0.1.0"
