"""What pyproject.toml cannot say: the recipes of configs/ are installed inside the package."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["prumerge_jax*"]),
        *("prumerge_jax." + name for name in find_packages(include=["configs*"])),
    ],
    package_dir={"prumerge_jax.configs": "configs"},
)
