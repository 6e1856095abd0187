"""Teachers: models, caches and servers behind one interface, `gkd.teachers.base.Teacher`."""

import pkgutil
from typing import Any

from gkd.config.teacher import TEACHERS, TeacherArguments, teacher_flag
from gkd.teachers.base import Teacher


def describe(args: TeacherArguments) -> Teacher:
    """The teacher that a command's flags name, without its weights. Raises ValueError for a cache that can't be used."""
    return pkgutil.resolve_name(TEACHERS[teacher_flag(args)])(args)


def text_writer(args: Any) -> Any:
    """The `gkd.teachers.servers.text_server.TextServer` that the flags name, or None."""
    flag = "teacher_text_url"
    return None if getattr(args, flag) is None else pkgutil.resolve_name(TEACHERS[flag])(args)
