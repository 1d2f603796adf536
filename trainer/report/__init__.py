"""A run as one page: what it learnt from, how it went, what its encoder sees.

Numbers, drawing and page are kept apart. ``history``, ``evaluations``, ``settings`` and ``looks``
read a run into :class:`~trainer.report.contents.Contents`, plain values; ``charts`` and
``pictures`` make Plotly's figures and images of such values; ``sections`` and ``page`` fill
``page.html`` with them. ``png`` draws the same contents by matplotlib, and ``live`` keeps a page
up to date.
"""

from trainer.report.contents import Contents, names, read_contents
from trainer.report.looks import Looks, look
from trainer.report.options import ReportConfig
from trainer.report.settings import read_settings

__all__ = ["Contents", "Looks", "ReportConfig", "look", "names", "read_contents", "read_settings"]
