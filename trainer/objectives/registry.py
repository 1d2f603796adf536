"""What a run can be told to learn by."""

from trainer.objectives.joint import JointConfig
from trainer.objectives.simclr import SimCLRConfig
from trainer.objectives.tasks import AnyTaskConfig

DefaultObjectiveConfig = SimCLRConfig
"""Of a run that names none."""

AnyObjectiveConfig = AnyTaskConfig | JointConfig
