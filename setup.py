"""Ships the accelerate configurations inside the package, as gkd/ds_configs, which pyproject.toml can't express."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["gkd*"]), "gkd.ds_configs"], package_dir={"gkd.ds_configs": "ds_configs"})
