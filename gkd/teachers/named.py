"""The teacher that a command's flags name, before its weights load."""

from typing import Any

from torch import nn

from gkd.config.teacher import TeacherArguments
from gkd.models import loading
from gkd.models.pairing import Side
from gkd.models.weights import check_adapter_weights, rehearse
from gkd.teachers.base import Teacher


class NamedTeacher(Teacher):
    """A model by its name or folder; or, in training, the student without its adapter."""

    def __init__(self, args: TeacherArguments):
        self.args = args
        self._is_student = getattr(args, "teacher_is_student", False)  # only `gkd train` has this flag

    def side(self, student: Side, args: Any) -> Side:
        return Side.of_teacher(self.args)

    def rehearse(self) -> None:
        model = None
        if not self._is_student:
            model = rehearse(self.args.teacher_model_name_or_path, loading.teacher_options(self.args))
        if self.args.teacher_adapter is not None:  # `side` has checked that it is an adapter
            check_adapter_weights(self.args.teacher_adapter, model)

    def load(self) -> nn.Module | None:
        """The frozen model, on the CPU unless its weights are packed."""
        return None if self._is_student else loading.load_teacher(self.args)
