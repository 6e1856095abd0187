"""Teachers: what each knows of a text, behind one door (`gkd.teachers.base.Teacher`)."""

import pkgutil

from gkd.config.teacher import TEACHERS, TeacherArguments, teacher_flag
from gkd.teachers.base import Teacher


def describe(args: TeacherArguments) -> Teacher:
    """The teacher that the flags of a command ask for; none of its weights are loaded.

    Raises:
        ValueError: a teacher cache that is not there, not complete or damaged.
    """
    return pkgutil.resolve_name(TEACHERS[teacher_flag(args)])(args)
