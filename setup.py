"""Where the packages lie; all metadata is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages('.', include=['linvis', 'linvis.*']),
        *find_packages('ops', include=['linvis_ops', 'linvis_ops.*']),
    ],
    package_dir={'linvis': 'linvis', 'linvis_ops': 'ops/linvis_ops'},
)
