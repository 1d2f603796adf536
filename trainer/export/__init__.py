"""Hand an encoder on to another library, with a proof that it is still the same function."""

from trainer.export.proof import Proof, prove
from trainer.export.write import FORMATS, Exported, export

__all__ = ["FORMATS", "Exported", "Proof", "export", "prove"]
