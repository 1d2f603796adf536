"""Numerical kernels of Widebatch: one folder each, reference beside fast versions.

The top-level name ``kernels`` also belongs to a package of Hugging Face's; ``WIDEBATCH`` lets the
command line tell ours from theirs.
"""

__all__ = ["WIDEBATCH"]

WIDEBATCH = True
