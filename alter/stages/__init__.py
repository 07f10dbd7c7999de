"""The two stages of training."""

from alter.stages.base import StageModule
from alter.stages.stage1 import Stage1Module
from alter.stages.stage2 import Stage2Module

__all__ = ["Stage1Module", "Stage2Module", "StageModule"]
