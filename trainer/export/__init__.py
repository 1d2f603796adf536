"""Hand an encoder on to another library, with a proof that it is still the same function."""

from trainer.export.write import Exported, export

__all__ = ["Exported", "export"]
