"""What pyproject.toml can't say: the configurations of accelerate ship inside the package, as gkd/ds_configs."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["gkd*"]), "gkd.ds_configs"], package_dir={"gkd.ds_configs": "ds_configs"})
