"""What a run says of itself: one stream of step records, several readers.

Readers are a progress bar or log lines, ``metrics.jsonl``, TensorBoard, Weights & Biases and
Prometheus (:mod:`trainer.telemetry.prometheus`).
"""

from trainer.telemetry.files import JsonLines, TensorBoard, keep_lines
from trainer.telemetry.stream import (
    Reader,
    Record,
    Telemetry,
    TelemetryConfig,
)
from trainer.telemetry.terminal import LogLines, ProgressBar

__all__ = [
    "JsonLines",
    "LogLines",
    "ProgressBar",
    "Reader",
    "Record",
    "Telemetry",
    "TelemetryConfig",
    "TensorBoard",
    "keep_lines",
]
