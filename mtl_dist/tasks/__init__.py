"""One file per task. Importing this package registers the four tasks of the paper."""

from mtl_dist.tasks import audio_tagging, next_step, noise_reduction, upsampling
from mtl_dist.tasks.base import TASKS, Task, TaskBatch, TaskConfig, TaskContext, register_task

__all__ = [
    "TASKS",
    "Task",
    "TaskBatch",
    "TaskConfig",
    "TaskContext",
    "audio_tagging",
    "next_step",
    "noise_reduction",
    "register_task",
    "upsampling",
]
