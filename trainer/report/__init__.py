"""A run as one page: what it learnt from, how it went, what its encoder sees.

``history``, ``evaluations`` and ``pictures`` read a run into
:class:`~trainer.report.contents.Contents`, plain values; ``page`` fills ``page.html`` with them and
with the figures of ``charts``. ``png`` draws the same contents by matplotlib, and ``live`` keeps a
page up to date.
"""
