"""Bridges to other frameworks. Modules here may import them; nothing else of the package imports these modules."""
