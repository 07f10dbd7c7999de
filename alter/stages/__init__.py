"""The two stages of training, and what may follow."""

from alter.stages.base import StageModule
from alter.stages.growth import AddTaskModule, ConsolidateModule
from alter.stages.stage1 import Stage1Module
from alter.stages.stage2 import Stage2Module

__all__ = ["AddTaskModule", "ConsolidateModule", "Stage1Module", "Stage2Module", "StageModule"]
