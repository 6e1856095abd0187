"""What each run of a test would wait for and none needs. For this process, and by libraries.py for those that tests start."""

import functools
import os

import jinja2

os.fsync = lambda descriptor: None  # tests kill processes, but none cuts the power
# TRL and peft write a model card with each checkpoint, and would compile its template anew each time.
jinja2.Template.__new__ = functools.cache(jinja2.Template.__new__)
