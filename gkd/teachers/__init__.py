"""Teachers: models, caches and servers behind one interface, `gkd.teachers.base.Teacher`."""

import pkgutil

from gkd.config.teacher import TEACHERS, TeacherArguments, teacher_flag
from gkd.teachers.base import Teacher


def describe(args: TeacherArguments) -> Teacher:
    """The teacher that a command's flags name, without its weights. Raises ValueError for a cache that can't be used."""
    return pkgutil.resolve_name(TEACHERS[teacher_flag(args)])(args)
