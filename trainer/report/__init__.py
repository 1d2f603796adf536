"""A run as one page: what it learnt from, how it went, what its encoder sees."""
