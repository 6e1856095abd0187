"""Teachers: what each knows of a text, behind one door (`gkd.teachers.base.Teacher`)."""

from gkd.config.training import GKDArguments
from gkd.teachers.base import Teacher
from gkd.teachers.cache import TeacherCache
from gkd.teachers.named import NamedTeacher


def describe(args: GKDArguments) -> Teacher:
    """The teacher that the flags of `gkd train` ask for; none of its weights are loaded.

    Raises:
        ValueError: a teacher cache that is not there, not complete or damaged.
    """
    if args.teacher_cache is not None:
        return TeacherCache(args.teacher_cache, verify=args.local_process_index == 0)
    return NamedTeacher(args)
